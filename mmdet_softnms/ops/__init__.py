"""The suppression operator and its kernels. Needs torch and numba, never mmdet, mmcv or mmengine."""

from mmdet_softnms.ops._batch import batched_soft_nms, warmup
from mmdet_softnms.ops._soft_nms import soft_nms

__all__ = ['batched_soft_nms', 'soft_nms', 'warmup']
