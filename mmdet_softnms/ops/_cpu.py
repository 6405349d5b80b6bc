"""Exact Soft-NMS on the CPU by lazy selection, compiled with numba.

Why it is exact: every weight lies in [0, 1], so a score that has not been brought up to date is an upper bound of the
current one. Keep all candidates in a max-heap ordered by (score, then lowest index). Look at the root: if boxes of its
class were selected since its score was last brought up to date, apply just those decays, in selection order (so the
same roundings happen as in the definition), and let it sink; otherwise nothing can beat it and it is the next
selection. A box once below ``min_score`` can never be selected, so it leaves the heap at once. A few thousand IoUs are
computed instead of N squared, and the work stops at ``max_num``.

Names: ``heap_scores``/``heap_index`` (N,): the heap, two parallel arrays. ``selected`` (N, 4): the boxes selected so
far, each class in rows of its own from ``start`` up to ``stop`` (C,), so that a box meets them in order and next to
each other in memory. ``seen`` (N,): how many selections of its class a box's score already reflects.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from mmdet_softnms.ops._soft_nms import Parameters, raise_bad_values

# Numbered here, not by their place in another module: numba freezes them into its disk cache and only looks at
# changes of this file.
_LINEAR, _GAUSSIAN, _HARD = range(3)
_METHOD_NUMBERS = {'linear': _LINEAR, 'gaussian': _GAUSSIAN, 'hard': _HARD}
_BAD_VALUE = -1


def select(boxes: Tensor, scores: Tensor, labels: Tensor | None, params: Parameters) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.soft_nms`; CPU tensors only.

    Args, Returns, Raises: as :func:`mmdet_softnms.ops._reference.select`.
    """
    num_boxes = len(scores)
    boxes, scores = boxes.contiguous(), scores.contiguous()
    dense = torch.zeros(num_boxes, dtype=torch.int64) if labels is None else labels.contiguous()
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
        _METHOD_NUMBERS[params.method],
        real(params.iou_threshold),
        params.sigma,
        real(params.min_score),
        real(params.offset),
        keep,
        kept_scores,
    )
    return torch.from_numpy(keep[:count]), torch.from_numpy(kept_scores[:count])


_cache_works = True


def _compiled(make: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Any]:
    """Compile for float32 and float64 at import, never in a call; from numba's disk cache where there is one.

    Args:
        make: the signature for a floating type.
    """

    def compile_now(function: Callable[..., Any]) -> Any:
        global _cache_works
        options: dict[str, Any] = {'nogil': True, 'error_model': 'numpy'}
        signatures = [make(types.float32), make(types.float64)]
        if _cache_works:
            # numba raises where no directory is writable, the disk is full or a cached file is damaged. None of this
            # is a reason not to run; an error of the compilation itself comes again below.
            try:
                return numba.njit(signatures, cache=True, **options)(function)
            except Exception as error:
                _cache_works = False
                warnings.warn(
                    'mmdet_softnms compiles its kernels anew in every process (a few seconds), because the disk cache '
                    f'of numba cannot be used: {error or type(error).__name__}. '
                    'Set NUMBA_CACHE_DIR to an empty, writable directory.',
                    RuntimeWarning,
                    stacklevel=2,
                )
        return numba.njit(signatures, **options)(function)

    return compile_now


@_compiled(lambda real: types.int64(real[:, ::1], real[::1], types.int64[::1], real))
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


@numba.njit(nogil=True, error_model='numpy', inline='always')
def _iou(a, b, offset):  # type: ignore[no-untyped-def]
    """IoU of two boxes, rounded as the reference rounds it."""
    zero = a.dtype.type(0)
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    if width <= zero:
        return zero
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    if height <= zero:
        return zero
    intersection = width * height
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    union = area_a + area_b - intersection
    if union <= zero:
        return zero
    return intersection / union


@numba.njit(nogil=True, error_model='numpy', inline='always')
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


@_compiled(
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
)
def _select(  # type: ignore[no-untyped-def]
    boxes, scores, labels, num_classes, method, iou_threshold, sigma, min_score, offset, keep, kept_scores
):
    """Fill ``keep`` and ``kept_scores``; returns how many were selected."""
    real = scores.dtype.type
    heap_scores = np.empty(len(scores), scores.dtype)
    heap_index = np.empty(len(scores), np.int64)
    stop = np.zeros(num_classes, np.int64)
    size = 0
    for i in range(len(scores)):
        if scores[i] >= min_score:
            heap_scores[size], heap_index[size] = scores[i], i
            stop[labels[i]] += 1
            size += 1
    for place in range(size // 2 - 1, -1, -1):
        _sink(heap_scores, heap_index, size, place)

    total = 0
    for c in range(num_classes):  # where each class's rows begin; selections move the stop on
        stop[c], total = total, total + stop[c]
    start = stop.copy()
    selected = np.empty((size, 4), boxes.dtype)
    seen = np.zeros(len(scores), np.int64)
    count = 0
    while size > 0 and count < len(keep):
        score, i = heap_scores[0], heap_index[0]
        c = labels[i]
        removed = False
        for row in range(start[c] + seen[i], stop[c]):
            iou = _iou(boxes[i], selected[row], offset)
            if iou == real(0):
                continue
            if method == _GAUSSIAN:
                score = score * real(math.exp(-(np.float64(iou) * np.float64(iou)) / sigma))
            elif iou > iou_threshold:
                if method == _HARD:
                    removed = True
                else:
                    score = score * (real(1) - iou)
            if removed or score < min_score:
                removed = True
                break
        seen[i] = stop[c] - start[c]
        if removed:
            size -= 1
            heap_scores[0], heap_index[0] = heap_scores[size], heap_index[size]
            _sink(heap_scores, heap_index, size, 0)
        elif score < heap_scores[0]:
            heap_scores[0] = score
            _sink(heap_scores, heap_index, size, 0)
        else:
            keep[count], kept_scores[count] = i, score
            selected[stop[c]] = boxes[i]
            stop[c] += 1
            count += 1
            size -= 1
            heap_scores[0], heap_index[0] = heap_scores[size], heap_index[size]
            _sink(heap_scores, heap_index, size, 0)
    return count
