"""RoI heads whose suppression is a registered rule, and R-FCN."""

from mmdet_softnms.roi_heads.rfcn import RFCNBBoxHead, RFCNRoIHead, RFCNRPNHead
from mmdet_softnms.roi_heads.soft_nms_roi_heads import (
    SoftNMSCascadeRoIHead,
    SoftNMSDoubleHeadRoIHead,
    SoftNMSMixin,
    SoftNMSRoIHead,
)

__all__ = [
    'RFCNBBoxHead',
    'RFCNRPNHead',
    'RFCNRoIHead',
    'SoftNMSCascadeRoIHead',
    'SoftNMSDoubleHeadRoIHead',
    'SoftNMSMixin',
    'SoftNMSRoIHead',
]
