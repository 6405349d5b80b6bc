"""Soft-NMS as a torch operator, ``torch.ops.mmdet_softnms.soft_nms``: for compilers, export and gradients.

The sizes of its results follow from the sizes of its input alone, so a compiler can plan with it; how many of them
count is a tensor.

It is registered where this module is imported, which ``import mmdet_softnms`` does: a program that ``torch.export`` has
saved is loaded in a process that has imported nothing else of ours. Before torch 2.4 there is nothing to register it
with, and :func:`padded_soft_nms` raises.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmdet_softnms.ops import _triton, weights
from mmdet_softnms.ops._arguments import Parameters, working_type
from mmdet_softnms.ops._derivative import with_derivative
from mmdet_softnms.ops._dispatch import select

REGISTERS = hasattr(torch.library, 'custom_op')  #: torch 2.4 or newer
_ROWS = 256  # kept boxes whose weights are held at a time in the backward pass: 256 x M values


def _custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op``; before torch 2.4, a function that says so."""
    if REGISTERS:
        return torch.library.custom_op(name, mutates_args=())

    def refuse(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def refused(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f'{function.__name__} needs torch 2.4 or newer, this is {torch.__version__}')

        return refused

    return refuse


@_custom_op('mmdet_softnms::soft_nms')
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
    decay: str = 'product',
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mmdet_softnms.soft_nms` with results of a size that is known beforehand; needs torch 2.4.

    Args:
        boxes, scores, labels, method, iou_threshold, sigma, min_score, max_num, offset, decay: as there.

    Returns:
        ``keep`` (Tensor[P], int64), padded with -1; ``scores`` (Tensor[P]), padded with 0, in the dtype of the input
        scores; ``count`` (Tensor[], int64), how many of them count. P is N, or ``min(N, max_num)`` where ``max_num``
        is a limit. On a GPU with Triton (``ops/_triton.py``) nothing waits for the device, so bad values raise nothing
        there: ``count`` is -1.

    Gradients flow from the returned scores to the input scores and boxes. A kept score is its input score times the
    weights of the boxes of its class selected before it (``strongest``: of the nearest of them); who is selected, and
    in which order, is piecewise constant, so its derivative is that of this product. It is undefined (and what is
    returned is one-sided) where scores tie, where two boxes are the nearest, where an IoU is ``iou_threshold`` (the
    linear weight jumps there), where a score meets ``min_score``, and where edges of two boxes coincide. ``hard``: 1
    to the score, 0 to the boxes. First derivatives in backward mode only: a second one raises, and this operator gives
    no tangents to ``torch.func.jvp`` (``soft_nms`` refuses it).
    """
    if _triton.available(scores.device):
        return _triton.soft_nms_triton(
            boxes, scores, labels, method=method, iou_threshold=iou_threshold,
            sigma=sigma, min_score=min_score, max_num=max_num, offset=offset, decay=decay,
        )  # fmt: skip
    parameters = Parameters(method, iou_threshold, sigma, min_score, max_num, offset, decay)
    keep, kept = select(boxes, scores, labels, parameters)
    size = len(scores) if max_num < 0 else min(len(scores), max_num)
    padded = keep.new_full((size,), -1), kept.new_zeros(size)
    padded[0][: len(keep)], padded[1][: len(keep)] = keep, kept
    return *padded, torch.tensor(len(keep), device=scores.device)


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
    decay: str = 'product',
) -> tuple[Tensor, Tensor, Tensor]:
    size = scores.shape[0] if max_num < 0 else torch.sym_min(scores.shape[0], max_num)
    return (
        scores.new_empty(size, dtype=torch.int64),
        scores.new_empty(size),
        scores.new_empty((), dtype=torch.int64),
    )


@_custom_op('mmdet_softnms::soft_nms_backward')
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
    wants_boxes: bool,
    decay: str = 'product',
) -> tuple[Tensor, Tensor]:
    """Gradients of (N, 4) boxes and (N,) scores from (P,) gradients of the kept scores; see :func:`padded_soft_nms`.

    ``wants_boxes``: where it is False, that of the boxes is 0 and costs nothing.
    """
    to_boxes, to_scores = torch.zeros_like(boxes), torch.zeros_like(scores)
    real = keep >= 0
    keep, gradient = keep[real], gradient[real]
    rule = weights.get(method)
    if rule.removes:  # what is kept has not been decayed
        to_scores[keep] = gradient.to(scores.dtype)
        return to_boxes, to_scores
    parameters = dict(iou_threshold=iou_threshold, sigma=sigma)
    values = [parameters[name] for name in rule.parameters]
    dtype = working_type(boxes, scores)
    # Class by class, each in selection order: a box is decayed by some of those between its class's first and itself.
    of_class = torch.zeros_like(keep) if labels is None else labels[keep].to(torch.int64)
    of_class, by_class = torch.sort(of_class, stable=True)
    keep, gradient = keep[by_class], gradient[by_class].to(dtype)
    kept, kept_scores = boxes[keep].to(dtype), scores[keep].to(dtype)
    first = torch.searchsorted(of_class, of_class)  # where the class of each begins
    place = torch.arange(len(keep), device=keep.device)
    box_gradients = torch.zeros_like(kept)
    for start in range(0, len(keep), _ROWS):
        stop = min(start + _ROWS, len(keep))
        begin = int(first[start])
        rows, earlier = slice(start, stop), slice(begin, stop)
        decays = (place[earlier] < place[rows, None]) & (place[earlier] >= first[rows, None])
        iou = _iou(kept[rows, None], kept[None, earlier], offset)[0]
        row, column = (decays & (iou > 0)).nonzero(as_tuple=True)  # most pairs do not overlap
        left, slopes = with_derivative(rule, iou[row, column].double(), values)
        weight = torch.ones_like(iou)
        weight[row, column] = left.to(dtype)
        others = None
        if decay == 'strongest':  # a product of one weight
            nearest = torch.where(decays, iou, 0.0).argmax(1, keepdim=True)
            alone = torch.zeros_like(decays).scatter_(1, nearest, True)
            weight = torch.where(alone, weight, 1.0)
            others = alone.to(dtype)
        to_scores[keep[rows]] = (gradient[rows] * weight.prod(1)).to(scores.dtype)
        if not wants_boxes:
            continue
        others = _products_of_others(weight) if others is None else others
        per_iou = (gradient[rows] * kept_scores[rows])[row] * others[row, column]
        per_iou = (per_iou * slopes.to(dtype))[:, None]
        of_row, of_column = _iou_derivatives(kept[start + row], kept[begin + column], offset)
        box_gradients.index_add_(0, start + row, per_iou * of_row)
        box_gradients.index_add_(0, begin + column, per_iou * of_column)
    to_boxes[keep] = box_gradients.to(boxes.dtype)
    return to_boxes, to_scores


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
    wants_boxes: bool,
    decay: str = 'product',
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(boxes), torch.empty_like(scores)


def _iou(a: Tensor, b: Tensor, offset: float | Tensor) -> tuple[Tensor, ...]:
    """IoUs of (..., 4) boxes, 0 where they do not overlap; their intersections, unions (1 there), and (..., 2) sides of
    intersections and boxes."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + offset
    sides_a, sides_b = a[..., 2:] - a[..., :2] + offset, b[..., 2:] - b[..., :2] + offset
    inside = sides[..., 0] * sides[..., 1]
    union = sides_a[..., 0] * sides_a[..., 1] + sides_b[..., 0] * sides_b[..., 1] - inside
    overlap = (sides[..., 0] > 0) & (sides[..., 1] > 0) & (union > 0)
    union = torch.where(overlap, union, 1.0)
    return torch.where(overlap, inside / union, 0.0), inside, union, sides, sides_a, sides_b


def _iou_derivatives(a: Tensor, b: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Derivatives of the IoUs of (P, 4) overlapping pairs by the first's and by the second's (x1, y1, x2, y2)."""
    _, inside, union, sides, sides_a, sides_b = _iou(a, b, offset)
    # IoU = I / U, U = A + B - I:  dIoU = dI (U + I) / U^2 - (dA + dB) I / U^2
    by_inside, by_area = ((union + inside) / union**2)[:, None], (-inside / union**2)[:, None]
    across = sides.flip(-1)  # what a unit of width is worth in area: the height

    def by(own: Tensor, other: Tensor, own_sides: Tensor) -> Tensor:
        inside_by = torch.cat([-across * (own[:, :2] > other[:, :2]), across * (own[:, 2:] < other[:, 2:])], 1)
        area_by = torch.cat([-own_sides.flip(-1), own_sides.flip(-1)], 1)
        return by_inside * inside_by + by_area * area_by

    return by(a, b, sides_a), by(b, a, sides_b)


def _products_of_others(weights: Tensor) -> Tensor:
    """(R, C): the product of a row without each of its entries; a weight may be 0, so nothing is divided by it."""
    zero = weights == 0
    zeros = zero.sum(1, keepdim=True)
    product = torch.where(zero, 1.0, weights).prod(1, keepdim=True)
    without = torch.where(zero, product, product / torch.where(zero, 1.0, weights))
    return torch.where(zeros - zero.long() > 0, 0.0, without)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    boxes, scores, labels, ctx.method, ctx.iou_threshold, ctx.sigma, _, _, ctx.offset, ctx.decay = inputs
    keep, _, count = output
    ctx.mark_non_differentiable(keep, count)
    ctx.save_for_backward(boxes, scores, labels, keep)


def _backward(ctx, _keep, gradient, _count):  # type: ignore[no-untyped-def]
    boxes, scores, labels, keep = ctx.saved_tensors
    to_boxes, to_scores = soft_nms_backward(
        gradient, boxes, scores, labels, keep, ctx.method, ctx.iou_threshold, ctx.sigma, ctx.offset,
        ctx.needs_input_grad[0], ctx.decay,
    )  # fmt: skip
    return to_boxes, to_scores, *[None] * 8


if REGISTERS:
    padded_soft_nms.register_fake(_fake)
    padded_soft_nms.register_autograd(_backward, setup_context=_setup_context)
    soft_nms_backward.register_fake(_fake_backward)
