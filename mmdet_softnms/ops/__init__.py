"""The suppression operator and its kernels. Needs torch and numba, never mmdet, mmcv or mmengine.

Modules from the lowest up, each importing only what stands before it: ``weights`` (one function a rule), ``_arguments``
(types, checks, words of errors), ``_reference``, ``_cpu``, ``_triton`` (the paths), ``_dispatch`` (the path of a
device), ``_operator`` (registered in torch, gradients), ``_soft_nms``, ``_batch``; ``_voting`` (what all raw
candidates say of a selected one), on the CPU with ``_neighbours``; ``_rotated`` (rotated boxes) with ``_rotated_cpu``.
"""

from mmdet_softnms.ops._batch import batched_soft_nms, warmup
from mmdet_softnms.ops._operator import padded_soft_nms
from mmdet_softnms.ops._reference import reference
from mmdet_softnms.ops._rotated import rotated_iou, rotated_reference, rotated_soft_nms
from mmdet_softnms.ops._soft_nms import soft_nms
from mmdet_softnms.ops._voting import quality, ranked_soft_nms, vote

__all__ = [
    'batched_soft_nms', 'padded_soft_nms', 'quality', 'ranked_soft_nms', 'reference', 'rotated_iou',
    'rotated_reference', 'rotated_soft_nms', 'soft_nms', 'vote', 'warmup',
]  # fmt: skip
