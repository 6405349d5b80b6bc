"""Exact Soft-NMS on the CPU by lazy selection, compiled with numba.

Why it is exact: every weight lies in [0, 1], so a score that has not been brought up to date is an upper bound of the
current one. Keep all candidates in a max-heap ordered by (score, then lowest index). Look at the root: if boxes of its
class were selected since its score was last brought up to date, apply just those decays, in selection order (so the
same roundings happen as in the definition), and let it sink; otherwise nothing can beat it and it is the next
selection. A box once below ``min_score`` can never be selected, so it leaves the heap at once. A few thousand IoUs are
computed instead of N squared, and the work stops at ``max_num``.

Names: ``heap_scores``/``heap_index`` (N,): the heap, two parallel arrays. ``first``/``last`` (C,): ordinal of the first
and last selection of a class, -1 if none. ``following`` (M,): ordinal of the next selection of the same class.
``seen`` (N,): ordinal of the last selection whose decay a box has received.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from mmdet_softnms.ops._soft_nms import METHODS, Parameters, raise_bad_values

_LINEAR, _GAUSSIAN, _HARD = (METHODS.index(name) for name in ('linear', 'gaussian', 'hard'))
_BAD_VALUE = -1


def select(boxes: Tensor, scores: Tensor, labels: Tensor | None, params: Parameters) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.soft_nms`; CPU tensors only.

    Args, Returns, Raises: as :func:`mmdet_softnms.ops._reference.select`.
    """
    num_boxes = len(scores)
    boxes, scores = boxes.contiguous(), scores.contiguous()
    dense = torch.zeros(num_boxes, dtype=torch.int64) if labels is None else labels.to(torch.int64).contiguous()
    boxes_, scores_, dense_ = boxes.numpy(), scores.numpy(), dense.numpy()
    real = scores_.dtype.type

    highest = _check(boxes_, scores_, dense_, real(params.offset))
    if highest == _BAD_VALUE:
        raise_bad_values(boxes, scores, labels, params.offset)
    if highest > 4 * num_boxes + 1024:  # sparse label values: number the classes that occur
        dense_ = np.unique(dense_, return_inverse=True)[1].astype(np.int64).reshape(-1)
        highest = num_boxes - 1
    limit = num_boxes if params.max_num < 0 else min(params.max_num, num_boxes)
    keep, kept_scores = np.empty(limit, np.int64), np.empty(limit, real)
    count = _select(
        boxes_,
        scores_,
        dense_,
        highest + 1,
        METHODS.index(params.method),
        real(params.iou_threshold),
        params.sigma,
        real(params.min_score),
        real(params.offset),
        keep,
        kept_scores,
    )
    return torch.from_numpy(keep[:count]), torch.from_numpy(kept_scores[:count])


def _signatures(make: Any) -> list[Any]:
    """One signature for float32 and one for float64: compiled or read from the disk cache at import, never in a call."""
    return [make(types.float32), make(types.float64)]


@numba.njit(
    _signatures(lambda real: types.int64(real[:, ::1], real[::1], types.int64[::1], real)),
    cache=True,
    nogil=True,
    error_model='numpy',
)
def _check(boxes, scores, labels, offset):  # type: ignore[no-untyped-def]
    """The highest label, or _BAD_VALUE where a value is not finite, an area overflows or a label is negative."""
    highest = 0
    largest = np.finfo(boxes.dtype).max / boxes.dtype.type(2)
    for i in range(len(scores)):
        area = (boxes[i, 2] - boxes[i, 0] + offset) * (boxes[i, 3] - boxes[i, 1] + offset)
        # An infinite or NaN side makes the area so too, unless it cancels: x1 = x2 = inf gives NaN, never a number;
        # only a product with a zero side can hide an overflowed one, and 0 * inf is NaN as well.
        if not (abs(area) <= largest and math.isfinite(scores[i])) or labels[i] < 0:
            return _BAD_VALUE
        highest = max(highest, labels[i])
    return highest


@numba.njit(cache=True, nogil=True, error_model='numpy', inline='always')
def _iou(boxes, a, b, offset):  # type: ignore[no-untyped-def]
    """IoU of boxes a and b, rounded as the reference rounds it."""
    zero = boxes.dtype.type(0)
    width = min(boxes[a, 2], boxes[b, 2]) - max(boxes[a, 0], boxes[b, 0]) + offset
    if width <= zero:
        return zero
    height = min(boxes[a, 3], boxes[b, 3]) - max(boxes[a, 1], boxes[b, 1]) + offset
    if height <= zero:
        return zero
    intersection = width * height
    area_a = (boxes[a, 2] - boxes[a, 0] + offset) * (boxes[a, 3] - boxes[a, 1] + offset)
    area_b = (boxes[b, 2] - boxes[b, 0] + offset) * (boxes[b, 3] - boxes[b, 1] + offset)
    union = area_a + area_b - intersection
    if union <= zero:
        return zero
    return intersection / union


@numba.njit(cache=True, nogil=True, error_model='numpy', inline='always')
def _sink(heap_scores, heap_index, size, place):  # type: ignore[no-untyped-def]
    """Let the entry at ``place`` sink until no child is ahead of it (higher score, or equal and lower index)."""
    score, index = heap_scores[place], heap_index[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (
            heap_scores[right] > heap_scores[child]
            or (heap_scores[right] == heap_scores[child] and heap_index[right] < heap_index[child])
        ):
            child = right
        if heap_scores[child] < score or (heap_scores[child] == score and heap_index[child] > index):
            break
        heap_scores[place], heap_index[place] = heap_scores[child], heap_index[child]
        place = child
    heap_scores[place], heap_index[place] = score, index


@numba.njit(
    _signatures(
        lambda real: types.int64(
            real[:, ::1],
            real[::1],
            types.int64[::1],
            types.int64,
            types.int64,
            real,
            types.float64,
            real,
            real,
            types.int64[::1],
            real[::1],
        )
    ),
    cache=True,
    nogil=True,
    error_model='numpy',
)
def _select(  # type: ignore[no-untyped-def]
    boxes, scores, labels, num_classes, method, iou_threshold, sigma, min_score, offset, keep, kept_scores
):
    """Fill ``keep`` and ``kept_scores``; returns how many were selected."""
    real = scores.dtype.type
    heap_scores = np.empty(len(scores), scores.dtype)
    heap_index = np.empty(len(scores), np.int64)
    size = 0
    for i in range(len(scores)):
        if scores[i] >= min_score:
            heap_scores[size], heap_index[size] = scores[i], i
            size += 1
    for place in range(size // 2 - 1, -1, -1):
        _sink(heap_scores, heap_index, size, place)

    first = np.full(num_classes, -1, np.int64)
    last = np.full(num_classes, -1, np.int64)
    following = np.empty(len(keep), np.int64)
    seen = np.full(len(scores), -1, np.int64)
    count = 0
    while size > 0 and count < len(keep):
        score, i = heap_scores[0], heap_index[0]
        c = labels[i]
        removed = False
        while seen[i] != last[c] and not removed:
            ordinal = first[c] if seen[i] < 0 else following[seen[i]]
            seen[i] = ordinal
            iou = _iou(boxes, keep[ordinal], i, offset)
            if method == _GAUSSIAN:
                if iou > real(0):
                    score = score * real(math.exp(-(np.float64(iou) * np.float64(iou)) / sigma))
            elif iou > iou_threshold:
                if method == _HARD:
                    removed = True
                else:
                    score = score * (real(1) - iou)
            removed = removed or score < min_score
        if removed:
            size -= 1
            heap_scores[0], heap_index[0] = heap_scores[size], heap_index[size]
            _sink(heap_scores, heap_index, size, 0)
        elif score < heap_scores[0]:
            heap_scores[0] = score
            _sink(heap_scores, heap_index, size, 0)
        else:
            keep[count], kept_scores[count] = i, score
            if last[c] < 0:
                first[c] = count
            else:
                following[last[c]] = count
            last[c] = count
            count += 1
            size -= 1
            heap_scores[0], heap_index[0] = heap_scores[size], heap_index[size]
            _sink(heap_scores, heap_index, size, 0)
    return count
