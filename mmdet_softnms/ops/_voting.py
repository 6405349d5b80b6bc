"""Box voting, and the support of a box by its neighbours: what all raw candidates of a class say about a selected one.

Plain PyTorch, which is the definition, has gradients and can be compiled; on the CPU a numba kernel
(``ops/_neighbours.py``) where neither is asked for.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmdet_softnms.ops._arguments import Parameters, check_tensors, working_type
from mmdet_softnms.ops._dispatch import select
from mmdet_softnms.ops._operator import _iou

_PAIRS = 1 << 18  # looked at together: 4 coordinates in float64 are 8 MB


def vote(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, keep: Tensor, *, tolerance: float = 0.025, offset: float = 0
) -> Tensor:
    """Where all candidates say that the selected ones are: the mean of those that overlap, near ones counting most.

    For a selected box i, over all candidates j of its class with a positive score, itself included, whose IoU with it
    is above 0: ``sum(p_j * box_j) / sum(p_j)`` with ``p_j = score_j * exp(-(1 - IoU_ij) ** 2 / tolerance)``. IoUs are
    rounded as in :func:`mmdet_softnms.soft_nms`; from there on in float64 and in input order, rounded once. An
    exponential below ``exp(-700)`` is 0. A box for which nobody votes, itself included (no area, or no positive score),
    stays where it is. It is the variance voting of Softer-NMS (He,
    Zhu, Wang, Savvides, Zhang, CVPR 2019, equation 10) with equal variances, and with scores as weights as in Gidaris
    and Komodakis (ICCV 2015).

    Args:
        boxes (Tensor[N, 4]), scores (Tensor[N]), labels (Tensor[N], optional): raw candidates, as ``soft_nms`` takes
            them, not decayed.
        keep (Tensor[M], int64): the selected ones.
        tolerance: finite and > 0; how far ``1 - IoU`` may be from 0, squared. Small values change little.
        offset: of ``soft_nms``.

    Returns:
        (M, 4) boxes in the type of ``boxes``. They have gradients to boxes and scores.

    Raises:
        TypeError, ValueError: as ``soft_nms``; ``tolerance`` is out of range.
    """
    check_tolerance(tolerance)
    boxes_, scores_, labels_ = _working(boxes, scores, labels)
    if _has_kernel(boxes_, scores_):
        from mmdet_softnms.ops import _cpu, _neighbours  # numba takes long to import

        dense, num_classes = _cpu.dense_labels(boxes_, scores_, labels_, offset)
        voted = torch.empty(len(keep), 4, dtype=boxes_.dtype)
        keep_ = keep.contiguous().numpy()
        arrays = boxes_.numpy(), scores_.numpy(), dense
        by_left = _neighbours.by_left_edge(arrays[0], num_classes, len(keep))
        offset_ = arrays[1].dtype.type(offset)
        _neighbours.vote(*arrays, num_classes, by_left, keep_, float(tolerance), offset_, voted.numpy())
        return voted.to(boxes.dtype)
    wide, raw = boxes_.double(), scores_.double().clamp(min=0)
    voted_ = [wide.new_empty(0, 4)]
    for rows in keep.split(max(1, _PAIRS // max(len(boxes), 1))):
        iou = _overlaps(boxes_, labels_, rows, offset).double()
        exponent = -((1 - iou) ** 2) / tolerance
        weights = torch.where((iou > 0) & (exponent > -700), raw * torch.exp(exponent.clamp(min=-700)), 0.0)
        total = _last(weights)[:, None]
        mean = _last(weights[:, :, None] * wide) / torch.where(total > 0, total, 1.0)
        voted_.append(torch.where(total > 0, mean, wide[rows]))
    return torch.cat(voted_).to(boxes_.dtype).to(boxes.device, boxes.dtype)


def quality(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    power: float = 8,
    prior: float = 1,
    offset: float = 0,
) -> Tensor:
    """How much its neighbours support each box: ``S / (S + prior)``, ``S_i = sum(score_j * IoU_ij ** power)``.

    The sum is over all candidates j of i's class with a positive score, itself included; float64 in input order, and
    the quotient is rounded once.

    Args:
        boxes, scores, labels, offset: as :func:`vote`.
        power: finite and > 0; large values count near neighbours only.
        prior: finite and > 0; the support at which a score is halved.

    Returns:
        (N,) in [0, 1), in float64 where boxes or scores are, else in float32; without gradients.
    """
    check_support(power, prior)
    boxes_, scores_, labels_ = _working(boxes.detach(), scores.detach(), labels)
    if _has_kernel(boxes_, scores_):
        from mmdet_softnms.ops import _cpu, _neighbours

        dense, num_classes = _cpu.dense_labels(boxes_, scores_, labels_, offset)
        sums = torch.empty(len(scores), dtype=torch.float64)
        arrays = boxes_.numpy(), scores_.numpy(), dense
        by_left = _neighbours.by_left_edge(arrays[0], num_classes, len(scores))
        offset_ = arrays[1].dtype.type(offset)
        _neighbours.support(*arrays, num_classes, by_left, float(power), offset_, sums.numpy())
    else:
        raw, parts = scores_.double().clamp(min=0), [scores_.new_empty(0, dtype=torch.float64)]
        everything = torch.arange(len(scores_), device=scores_.device)
        for rows in everything.split(max(1, _PAIRS // max(len(boxes), 1))):
            parts.append(_last(raw * _overlaps(boxes_, labels_, rows, offset).double() ** power))
        sums = torch.cat(parts)
    return (sums / (sums + prior)).to(device=scores.device, dtype=scores_.dtype)


def ranked_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    quality: Tensor,
    *,
    method: str = 'gaussian',
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_num: int = -1,
    offset: float = 0,
    decay: str = 'product',
) -> tuple[Tensor, Tensor]:
    """:func:`mmdet_softnms.soft_nms` in the order of current score times quality, which is also the score returned.

    Args:
        quality (Tensor[N]): in [0, 1], of :func:`quality`. ``min_score`` is compared with the current score alone.

    Raises:
        NotImplementedError: an input requires a gradient, or this is being compiled.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError('a selection by support cannot be compiled; call it outside of the compiled model')
    if torch.is_grad_enabled() and (boxes.requires_grad or scores.requires_grad):
        raise NotImplementedError('a selection by support has no gradients; call it under torch.no_grad()')
    parameters = Parameters(method, iou_threshold, sigma, min_score, max_num, offset, decay)
    return select(boxes, scores, labels, parameters, quality)


def check_tolerance(tolerance: float) -> None:
    """Raise a TypeError or ValueError that names the value."""
    _check_positive('tolerance', tolerance)


def check_support(power: float, prior: float) -> None:
    """Raise a TypeError or ValueError that names the value."""
    _check_positive('power', power)
    _check_positive('prior', prior)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f'{name} must be finite and > 0, got {value}')


def _working(boxes: Tensor, scores: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    check_tensors(boxes, scores, labels)
    dtype = working_type(boxes, scores)
    labels = None if labels is None else labels.to(torch.int64)
    if boxes.device.type == 'mps':  # no float64 there
        boxes, scores, labels = boxes.cpu(), scores.cpu(), None if labels is None else labels.cpu()
    return boxes.to(dtype).contiguous(), scores.to(dtype).contiguous(), labels


def _has_kernel(*tensors: Tensor) -> bool:
    """Whether the kernel may be called: CPU tensors, and neither a compiler nor derivatives."""
    if torch.compiler.is_compiling() or any(tensor.device.type != 'cpu' for tensor in tensors):
        return False
    if getattr(forward_ad, '_current_level', -1) >= 0:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _overlaps(boxes: Tensor, labels: Tensor | None, rows: Tensor, offset: float) -> Tensor:
    """(M, N) IoUs of some boxes with all of their class; 0 with others."""
    # As a tensor of the working type: a Python number would be added in a type of torch's choosing.
    iou = _iou(boxes[rows, None], boxes[None], boxes.new_tensor(offset))[0]
    return iou if labels is None else torch.where(labels[rows, None] == labels, iou, 0.0)


def _last(terms: Tensor) -> Tensor:
    """Sums along the second dimension, term by term on the CPU, where torch's sum takes them in another order."""
    return terms.cumsum(1)[:, -1] if terms.shape[1] else terms.sum(1)
