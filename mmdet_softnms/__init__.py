"""Soft-NMS for MMDetection 3.x: the operator, and RoI heads that use it by config alone.

``import mmdet_softnms`` needs torch and numba only, and registers ``torch.ops.mmdet_softnms.soft_nms`` (torch 2.4 or
newer). The parts registered for configs (rules, RoI heads) live behind :mod:`mmdet_softnms.registry`, which mmengine imports by itself for any ``type='mmdet_softnms.X'``.
"""

from mmdet_softnms.ops import batched_soft_nms, padded_soft_nms, reference, soft_nms, warmup

__version__ = '0.1.0'
__all__ = ['__version__', 'batched_soft_nms', 'padded_soft_nms', 'reference', 'soft_nms', 'warmup']
