"""RoI heads whose suppression is a registered rule."""

from mmdet_softnms.roi_heads.soft_nms_roi_heads import (
    SoftNMSCascadeRoIHead,
    SoftNMSDoubleHeadRoIHead,
    SoftNMSMixin,
    SoftNMSRoIHead,
)

__all__ = ['SoftNMSCascadeRoIHead', 'SoftNMSDoubleHeadRoIHead', 'SoftNMSMixin', 'SoftNMSRoIHead']
