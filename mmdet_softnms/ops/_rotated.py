"""Soft-NMS of rotated boxes ``(x, y, w, h, angle)``: the operator, its definition, and their IoU.

A box is the rectangle of w by h round (x, y), turned by the angle in radians from the x axis towards the y axis, which
is clockwise in an image: mmcv's and mmrotate's convention (``clockwise=True``). It is the same definition as
:func:`mmdet_softnms.soft_nms` over another IoU, and computed on the CPU (``ops/_rotated_cpu.py``) wherever the tensors
lie: of the thousands of candidates a few are wanted, and these need few of the IoUs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmdet_softnms.ops import _reference
from mmdet_softnms.ops._arguments import Parameters, checked


def rotated_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    decay: str = 'product',
) -> tuple[Tensor, Tensor]:
    """Soft-NMS of rotated boxes: the definition, types and rounding of :func:`mmdet_softnms.soft_nms`.

    The IoU is that of the two rectangles, computed in float64 and rounded once to the type the scores are computed in
    (:func:`rotated_iou`). Classes are kept apart without shifting coordinates.

    Args:
        boxes (Tensor[N, 5]): ``(x, y, w, h, angle)``: centre, sides in pixels, radians; any floating type, finite. A
            box one of whose sides is not positive overlaps nothing.
        scores, labels, method, iou_threshold, sigma, min_score, max_num, decay: as there.

    Returns:
        ``keep`` (Tensor[M], int64), input indices in selection order, and ``scores`` (Tensor[M]), as there.

    Raises:
        TypeError, ValueError: as there.
        NotImplementedError: an input requires a gradient, or this is being compiled.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError('rotated_soft_nms cannot be compiled; call it outside of the compiled model')
    parameters = Parameters(method, iou_threshold, sigma, min_score, max_num, 0.0, decay)
    boxes_, scores_, labels_, params = checked(boxes, scores, labels, parameters, box_dim=5)
    if torch.is_grad_enabled() and (boxes.requires_grad or scores.requires_grad):
        raise NotImplementedError('rotated_soft_nms has no gradients; call it under torch.no_grad()')
    from mmdet_softnms.ops import _rotated_cpu  # numba takes long to import

    keep, kept = _rotated_cpu.select(boxes_.cpu(), scores_.cpu(), None if labels_ is None else labels_.cpu(), params)
    return keep.to(scores.device), kept.to(device=scores.device, dtype=scores.dtype)


def rotated_reference(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    overlaps: Callable[[Tensor, Tensor], Tensor] | None = None,
    method: str = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    decay: str = 'product',
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`rotated_soft_nms` in plain PyTorch, one selection a turn; slow, to compare with.

    Args:
        overlaps: IoUs of (1, 5) boxes with (N, 5) ones, (1, N), as ``mmcv.ops.box_iou_rotated``; None:
            :func:`rotated_iou`. Values outside of [0, 1] are moved there.

    Args, Returns, Raises: otherwise as there.
    """
    measure = rotated_iou if overlaps is None else overlaps
    parameters = Parameters(method, iou_threshold, sigma, min_score, max_num, 0.0, decay)
    keep, kept_scores = _reference.select(
        *checked(boxes, scores, labels, parameters, box_dim=5),
        overlaps=lambda one, all_: measure(one, all_).clamp(0, 1),
    )
    return keep, kept_scores.to(scores.dtype)


def rotated_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(N, M) IoUs of (N, 5) with (M, 5) rotated boxes, on the CPU, in [0, 1].

    Computed in float64: exact but for some 1e-15, and rounded once to float32, or not at all where both are float64.
    0 where a side is not positive. ``mmcv.ops.box_iou_rotated`` computes in the boxes' own type.

    Raises:
        ValueError: the shapes are others.
    """
    for name, tensor in (('boxes', boxes), ('others', others)):
        if tensor.dim() != 2 or tensor.shape[1] != 5:
            raise ValueError(f'{name} must have shape (N, 5), got {tuple(tensor.shape)}')
    from mmdet_softnms.ops import _rotated_cpu

    iou = _rotated_cpu.pairwise(boxes.detach().cpu(), others.detach().cpu())
    wide = boxes.dtype == others.dtype == torch.float64
    return iou.to(device=boxes.device, dtype=torch.float64 if wide else torch.float32)
