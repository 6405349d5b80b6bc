"""RoI heads by import, for mmengine's pure Python configs: ``roi_head=dict(type=SoftNMSRoIHead, ...)``."""

from mmdet_softnms.models.rfcn import RFCN, RFCNBBoxHead, RFCNRoIHead, RFCNRPNHead
from mmdet_softnms.models.roi_heads import (
    SoftNMSCascadeRoIHead,
    SoftNMSDoubleHeadRoIHead,
    SoftNMSMixin,
    SoftNMSRoIHead,
)

__all__ = [
    'RFCN',
    'RFCNBBoxHead',
    'RFCNRPNHead',
    'RFCNRoIHead',
    'SoftNMSCascadeRoIHead',
    'SoftNMSDoubleHeadRoIHead',
    'SoftNMSMixin',
    'SoftNMSRoIHead',
]
