"""Soft-NMS as a torch operator, ``torch.ops.mmdet_softnms.soft_nms``: for compilers, export and gradients.

The sizes of its results follow from the sizes of its input alone, so a compiler can plan with it; how many of them
count is a tensor.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from mmdet_softnms.ops import _soft_nms, _triton

_ROWS = 256  # kept boxes whose weights are held at a time in the backward pass: 256 x M values


@custom_op('mmdet_softnms::soft_nms', mutates_args=())
def padded_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    method: str = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmdet_softnms.soft_nms` with results of a size that is known beforehand; needs torch 2.4.

    Args:
        boxes, scores, labels, method, iou_threshold, sigma, min_score, max_num, offset: as there.

    Returns:
        ``keep`` (Tensor[P], int64), padded with -1; ``scores`` (Tensor[P]), padded with 0, in the dtype of the input
        scores; ``count`` (Tensor[], int64), how many of them count. P is N, or ``min(N, max_num)`` where ``max_num``
        is a limit. On a GPU with Triton (``ops/_triton.py``) nothing waits for the device, so bad values raise nothing
        there: ``count`` is -1.

    Gradients flow from the returned scores to the input scores and boxes. A kept score is its input score times the
    weights of the boxes of its class selected before it; who is selected, and in which order, is piecewise constant,
    so its derivative is that of this product. It is undefined (and what is returned is one-sided) where scores tie,
    where an IoU is ``iou_threshold`` (the linear weight jumps there), where a score meets ``min_score``, and where
    edges of two boxes coincide. ``hard``: 1 to the score, 0 to the boxes.
    """
    if _triton.available(scores.device):
        return _triton.soft_nms_triton(
            boxes, scores, labels, method=method, iou_threshold=iou_threshold,
            sigma=sigma, min_score=min_score, max_num=max_num, offset=offset,
        )  # fmt: skip
    keep, kept = _soft_nms.soft_nms(
        boxes.detach(), scores.detach(), labels, method=method, iou_threshold=iou_threshold,  # type: ignore[arg-type]
        sigma=sigma, min_score=min_score, max_num=max_num, offset=offset,
    )  # fmt: skip
    size = len(scores) if max_num < 0 else min(len(scores), max_num)
    padded = keep.new_full((size,), -1), kept.new_zeros(size)
    padded[0][: len(keep)], padded[1][: len(keep)] = keep, kept
    return *padded, torch.tensor(len(keep), device=scores.device)


@padded_soft_nms.register_fake
def _fake(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    method: str = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    size = scores.shape[0] if max_num < 0 else torch.sym_min(scores.shape[0], max_num)
    return (
        scores.new_empty(size, dtype=torch.int64),
        scores.new_empty(size),
        scores.new_empty((), dtype=torch.int64),
    )


@custom_op('mmdet_softnms::soft_nms_backward', mutates_args=())
def soft_nms_backward(
    gradient: Tensor,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    keep: Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of (N, 4) boxes and (N,) scores from (P,) gradients of the kept scores; see :func:`padded_soft_nms`."""
    to_boxes, to_scores = torch.zeros_like(boxes), torch.zeros_like(scores)
    real = keep >= 0
    keep, gradient = keep[real], gradient[real]
    if method == 'hard':
        to_scores[keep] = gradient.to(scores.dtype)
        return to_boxes, to_scores
    dtype = torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32
    kept, kept_scores, gradient = boxes[keep].to(dtype), scores[keep].to(dtype), gradient.to(dtype)
    of_class = None if labels is None else labels[keep]
    order = torch.arange(len(keep), device=keep.device)
    box_gradients = torch.zeros_like(kept)
    for start in range(0, len(keep), _ROWS):
        rows, earlier = slice(start, start + _ROWS), slice(0, min(start + _ROWS, len(keep)))
        decays = order[earlier] < order[rows, None]
        if of_class is not None:
            decays &= of_class[earlier] == of_class[rows, None]
        iou, iou_of_row, iou_of_column = _iou_and_derivatives(kept[rows], kept[earlier], offset)
        if method == 'linear':
            over = decays & (iou > iou_threshold)
            weights, slopes = torch.where(over, 1 - iou, 1.0), torch.where(over, -1.0, 0.0).to(dtype)
        else:
            weights = torch.where(decays, torch.exp(-(iou**2) / sigma), 1.0)
            slopes = torch.where(decays, -2 * iou / sigma * weights, 0.0)
        to_scores[keep[rows]] = (gradient[rows] * weights.prod(1)).to(scores.dtype)
        per_iou = (gradient[rows] * kept_scores[rows])[:, None] * _products_of_others(weights) * slopes
        box_gradients[rows] += (per_iou[..., None] * iou_of_row).sum(1)
        box_gradients[earlier] += (per_iou[..., None] * iou_of_column).sum(0)
    to_boxes[keep] = box_gradients.to(boxes.dtype)
    return to_boxes, to_scores


@soft_nms_backward.register_fake
def _fake_backward(
    gradient: Tensor,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    keep: Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(boxes), torch.empty_like(scores)


def _iou_and_derivatives(rows: Tensor, columns: Tensor, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """(R, C) IoUs of boxes, and their derivatives by the row's and by the column's (x1, y1, x2, y2): (R, C, 4) each."""
    a, b = rows[:, None], columns[None]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + offset
    sides_a, sides_b = a[..., 2:] - a[..., :2] + offset, b[..., 2:] - b[..., :2] + offset
    inside = sides.prod(-1)
    union = sides_a.prod(-1) + sides_b.prod(-1) - inside
    overlap = (sides > 0).all(-1) & (union > 0)
    union = torch.where(overlap, union, 1.0)
    iou = torch.where(overlap, inside / union, 0.0)
    # IoU = I / U, U = A + B - I:  dIoU = dI (U + I) / U^2 - (dA + dB) I / U^2
    by_inside = torch.where(overlap, (union + inside) / union**2, 0.0)[..., None]
    by_area = torch.where(overlap, -inside / union**2, 0.0)[..., None]

    def by(own: Tensor, other: Tensor, own_sides: Tensor) -> Tensor:
        across = sides.flip(-1)  # what a unit of width is worth in area: the height
        inside_by = torch.cat([-across * (own[..., :2] > other[..., :2]), across * (own[..., 2:] < other[..., 2:])], -1)
        area_by = torch.cat([-own_sides.flip(-1), own_sides.flip(-1)], -1)
        return by_inside * inside_by + by_area * area_by

    return iou, by(a, b, sides_a), by(b, a, sides_b)


def _products_of_others(weights: Tensor) -> Tensor:
    """(R, C): the product of a row without each of its entries; a weight may be 0, so nothing is divided by it."""
    zero = weights == 0
    zeros = zero.sum(1, keepdim=True)
    product = torch.where(zero, 1.0, weights).prod(1, keepdim=True)
    without = torch.where(zero, product, product / torch.where(zero, 1.0, weights))
    return torch.where(zeros - zero.long() > 0, 0.0, without)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    boxes, scores, labels, ctx.method, ctx.iou_threshold, ctx.sigma, _, _, ctx.offset = inputs
    keep, _, count = output
    ctx.mark_non_differentiable(keep, count)
    ctx.save_for_backward(boxes, scores, labels, keep)


def _backward(ctx, _keep, gradient, _count):  # type: ignore[no-untyped-def]
    boxes, scores, labels, keep = ctx.saved_tensors
    to_boxes, to_scores = soft_nms_backward(
        gradient, boxes, scores, labels, keep, ctx.method, ctx.iou_threshold, ctx.sigma, ctx.offset
    )
    return to_boxes, to_scores, None, None, None, None, None, None, None


padded_soft_nms.register_autograd(_backward, setup_context=_setup_context)
