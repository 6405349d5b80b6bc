"""Exact Soft-NMS of rotated boxes by lazy selection, compiled with numba: ``_cpu.py`` over another IoU.

The heap, and why it is exact, are those of ``_cpu.py``. What is different:

* Selected boxes lie as centre, half sides, direction, and half sides of the upright rectangle that encloses them. Two
  boxes whose enclosing rectangles do not overlap by enough for an IoU above the threshold are done with; a dozen
  comparisons for ``_LANES`` boxes at once. Most pairs are.
* The rest are gathered, in selection order, and their IoUs computed ``_LANES`` at a time without a branch. The other
  box is moved into the frame of the first one, which is upright there. Then the area that they share is the integral
  over the first one's width of the other's upper edge minus its lower one, both cut at the first one's height (Green's
  theorem): four edges, each a piece of a straight line cut at two heights. No polygon is built and no point is sorted.

All in float64 from the boxes as they are given, rounded once.

Names: ``block`` (8, _LANES): x, y, half width, half height, cosine and sine of the angle, half sides of the enclosing
rectangle. ``selected``, ``after``, ``head``, ``tail``, ``seen`` as in ``_cpu.py``. ``near`` (8, 2 * _LANES): gathered.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from mmdet_softnms.ops import _cpu, weights
from mmdet_softnms.ops._arguments import Parameters, has_safe_area, raise_bad_values
from mmdet_softnms.ops._compiled import compiled
from mmdet_softnms.ops._cpu import _LANES, _lanes_of, _number, _sink, _weight_of

_SOURCES = (_cpu.__name__, __name__)  # all that is compiled into a kernel
_FEW = 4  # weights, below which the library's exp is sooner done than _LANES at once
_shared = numba.njit(nogil=True, error_model='numpy')  # compiled once for all rules
_inline = numba.njit(nogil=True, error_model='numpy', forceinline=True)  # by LLVM: numba's own way takes minutes


def select(boxes: Tensor, scores: Tensor, labels: Tensor | None, params: Parameters) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.ops.rotated_soft_nms`; CPU tensors only.

    Args, Returns, Raises: as :func:`mmdet_softnms.ops._reference.select`, boxes (N, 5).
    """
    num_boxes = scores.shape[0]
    if num_boxes >= 2**30:
        raise ValueError(f'boxes has {num_boxes:,} rows, and the kernel counts to 2^30; raise score_thr')
    fine = boxes.isfinite().all() and scores.isfinite().all() and has_safe_area(boxes, 0).all()
    if not fine or (labels is not None and bool((labels < 0).any())):
        raise_bad_values(boxes, scores, labels, 0)
    dense, num_classes = np.zeros(num_boxes, np.int64), 1
    if labels is not None and num_boxes:
        dense, num_classes = labels.contiguous().numpy(), int(labels.max()) + 1
        if num_classes > num_boxes + 2048:
            numbers = np.empty(num_boxes, np.int64)
            dense, num_classes = numbers, int(_number(dense, numbers))
    scores_ = scores.contiguous().numpy()
    real = scores_.dtype.type
    weight = weights.get(params.method)
    limit = num_boxes if params.max_num < 0 else min(params.max_num, num_boxes)
    keep, kept_scores = np.empty(limit, np.int64), np.empty(limit, real)
    count = kernel(weight, params.decay == 'strongest' and not weight.removes)(
        boxes.contiguous().numpy(),
        scores_,
        dense,
        num_classes,
        params.iou_threshold,
        params.sigma,
        real(params.min_score),
        keep,
        kept_scores,
    )
    return torch.from_numpy(keep[:count]), torch.from_numpy(kept_scores[:count])


def pairwise(boxes: Tensor, others: Tensor) -> Tensor:
    """(N, M) IoUs in float64 of (N, 5) with (M, 5) boxes."""
    ious = torch.empty(len(boxes), len(others), dtype=torch.float64)
    _pairs(boxes.double().contiguous().numpy(), others.double().contiguous().numpy(), ious.numpy())
    return ious


@_shared
def _place(box, block, lane):  # type: ignore[no-untyped-def]
    """Write a box into a lane of a block. One that has no area gets no sides: it shares nothing with any."""
    half_w, half_h = 0.5 * np.float64(box[2]), 0.5 * np.float64(box[3])
    if half_w <= 0.0 or half_h <= 0.0:
        half_w = half_h = 0.0
    angle = np.float64(box[4])
    cosine, sine = math.cos(angle), math.sin(angle)
    block[0, lane], block[1, lane], block[2, lane], block[3, lane] = box[0], box[1], half_w, half_h
    block[4, lane], block[5, lane] = cosine, sine
    block[6, lane] = half_w * abs(cosine) + half_h * abs(sine)
    block[7, lane] = half_w * abs(sine) + half_h * abs(cosine)


@_inline
def _under_edge(x0, y0, dx, dy, per_dx, half_w, half_h):  # type: ignore[no-untyped-def]
    """The integral over x of the height of an edge, both cut at the half sides; negative where it runs to the left.

    The edge goes from (x0, y0) by (dx, dy); ``per_dx`` is 1 / dx, and anything finite where dx is 0.
    """
    x1, y1 = x0 + dx, y0 + dy
    begin = half_w if x0 > half_w else (-half_w if x0 < -half_w else x0)
    end = half_w if x1 > half_w else (-half_w if x1 < -half_w else x1)
    # From the end that is nearer: where nothing is cut off, the end itself and no rounding.
    first = y0 + (begin - x0) * per_dx * dy
    last = y1 + (end - x1) * per_dx * dy
    low, high = (first, last) if first < last else (last, first)
    rise = high - low
    per_rise = 1.0 / (rise if rise > 0.0 else 1.0)
    below, above = (-half_h - low) * per_rise, (high - half_h) * per_rise  # parts of the edge that are cut flat
    below = 1.0 if below > 1.0 else (0.0 if below < 0.0 else below)
    above = 1.0 if above > 1.0 else (0.0 if above < 0.0 else above)
    low = half_h if low > half_h else (-half_h if low < -half_h else low)
    high = half_h if high > half_h else (-half_h if high < -half_h else high)
    return (end - begin) * (half_h * (above - below) + (1.0 - below - above) * 0.5 * (low + high))


@_inline
def _iou(x, y, half_w, half_h, cosine, sine, other_x, other_y, other_w, other_h, other_cosine, other_sine):  # type: ignore[no-untyped-def]
    """IoU of two boxes, without a branch; 0 where one has no sides."""
    dx, dy = other_x - x, other_y - y
    px, py = dx * cosine + dy * sine, dy * cosine - dx * sine
    c, s = other_cosine * cosine + other_sine * sine, other_sine * cosine - other_cosine * sine
    ux, uy, vx, vy = other_w * c, other_w * s, -other_h * s, other_h * c  # half sides as vectors
    per_ux, per_vx = 0.5 / (ux if ux != 0.0 else 1.0), 0.5 / (vx if vx != 0.0 else 1.0)
    # Round the other box: its lower edge to the right, ..., which counts what is under it as negative.
    shared = -(
        _under_edge(px - ux - vx, py - uy - vy, 2.0 * ux, 2.0 * uy, per_ux, half_w, half_h)
        + _under_edge(px + ux - vx, py + uy - vy, 2.0 * vx, 2.0 * vy, per_vx, half_w, half_h)
        + _under_edge(px + ux + vx, py + uy + vy, -2.0 * ux, -2.0 * uy, -per_ux, half_w, half_h)
        + _under_edge(px - ux + vx, py - uy + vy, -2.0 * vx, -2.0 * vy, -per_vx, half_w, half_h)
    )
    union = 4.0 * (half_w * half_h + other_w * other_h) - shared
    iou = shared / (union if union > 0.0 else 1.0)
    return 0.0 if shared <= 0.0 else (1.0 if iou > 1.0 else iou)


@_shared
def _gather(block, first, stop, own, threshold, flags, near, num_near):  # type: ignore[no-untyped-def]
    """Append to ``near`` the lanes that may have an IoU above the threshold with the first of ``own``; their number."""
    x, y, wide, high, area = own[0, 0], own[1, 0], own[6, 0], own[7, 0], 4.0 * own[2, 0] * own[3, 0]
    found = np.int32(0)
    for lane in range(_LANES):  # all of them, without branches, so that LLVM vectorises it
        # What the enclosing rectangles share, and neither box is larger than itself: what the boxes can share.
        other = 4.0 * block[2, lane] * block[3, lane]
        gap_x = wide + block[6, lane] - abs(block[0, lane] - x)
        gap_y = high + block[7, lane] - abs(block[1, lane] - y)
        least_x, least_y = min(wide, block[6, lane]), min(high, block[7, lane])
        most = min(gap_x, 2.0 * least_x) * min(gap_y, 2.0 * least_y)
        most = min(most, min(area, other)) * 1.000001 + 1e-300  # a little more than rounding can take away
        counts = (gap_x > 0.0) & (gap_y > 0.0) & (most >= threshold * (area + other - most))
        flag = counts & (lane >= first) & (lane < stop)
        flags[lane] = flag
        found += np.int32(flag)
    if found:
        for lane in range(first, stop):
            if flags[lane]:
                for row in range(6):
                    near[row, num_near] = block[row, lane]
                num_near += 1
    return num_near


@_shared
def _ious(own, place, others, count, ious):  # type: ignore[no-untyped-def]
    """Fill ``ious`` with those of the box in a place of ``own`` with the first of ``others``."""
    x, y, half_w, half_h = own[0, place], own[1, place], own[2, place], own[3, place]
    cosine, sine = own[4, place], own[5, place]
    for k in range(count):
        ious[k] = _iou(
            x, y, half_w, half_h, cosine, sine,
            others[0, k], others[1, k], others[2, k], others[3, k], others[4, k], others[5, k],
        )  # fmt: skip


@compiled(lambda real: types.void(types.float64[:, ::1], types.float64[:, ::1], types.float64[:, ::1]))
def _pairs(boxes, others, ious):  # type: ignore[no-untyped-def]
    """Fill ``ious`` (N, M)."""
    own, block = np.empty((8, len(boxes))), np.empty((8, len(others)))
    for i in range(len(boxes)):
        _place(boxes[i], own, i)
    for j in range(len(others)):
        _place(others[j], block, j)
    for i in range(len(boxes)):
        _ious(own, i, block, len(others), ious[i])


_kernels: dict[tuple[weights.Weight, bool], Any] = {}


def kernel(weight: weights.Weight, strongest: bool = False) -> Any:
    """The compiled selection of a rule, as :func:`mmdet_softnms.ops._cpu.kernel`."""
    variant = weight, strongest
    known = _kernels.get(variant)
    if known is not None:
        return known
    return _cpu.compile_variant(_kernels, variant, _selection, _selection_types, *_SOURCES)


def _selection_types(real: Any) -> Any:
    wide, whole = types.float64, types.int64
    return whole(real[:, ::1], real[::1], whole[::1], whole, wide, wide, real, whole[::1], real[::1])


def _selection(weight: weights.Weight, strongest: bool) -> Callable[..., Any]:
    """The function that numba compiles for a rule."""
    weigh, weigh_lanes = _weight_of(weight, math.exp), _lanes_of(weight)
    removes, has_threshold = weight.removes, 'iou_threshold' in weight.parameters

    def select(boxes, scores, labels, num_classes, iou_threshold, sigma, min_score, keep, kept_scores):  # type: ignore[no-untyped-def]
        """Fill ``keep`` and ``kept_scores``; returns how many were selected."""
        real = scores.dtype.type
        num_boxes, limit = len(scores), len(keep)
        heap_scores, heap_index = np.empty(num_boxes, scores.dtype), np.empty(num_boxes, np.int64)
        seen = np.full(num_boxes, -1, np.int32)
        head, tail = np.full(num_classes, -1, np.int32), np.full(num_classes, -1, np.int32)
        num_blocks = limit // _LANES + min(num_classes, limit) + 1
        selected, after = np.empty((num_blocks, 8, _LANES)), np.empty(num_blocks, np.int32)
        blocks_used = 0
        own, near = np.empty((8, 1)), np.zeros((6, 2 * _LANES))
        ious, flags = np.zeros(_LANES), np.zeros(_LANES, np.bool_)
        hits, factors = np.zeros(3 * _LANES, scores.dtype), np.zeros(_LANES, scores.dtype)
        threshold = real(iou_threshold) if has_threshold else real(0)  # an IoU has to be above it to matter
        is_double = scores.itemsize == 8
        closest = np.zeros(num_boxes if strongest else 0, scores.dtype)  # the largest IoU with a selected box

        size = count = 0
        for i in range(num_boxes):
            if scores[i] >= min_score:
                heap_scores[size], heap_index[size] = scores[i], i
                size += 1
        for place in range(size // 2 - 1, -1, -1):
            _sink(heap_scores, heap_index, size, place)
        while count < limit and size > 0:
            score, i = heap_scores[0], heap_index[0]
            c = labels[i]
            place, end = seen[i], tail[c]
            if place < 0:
                place = head[c]
            removed = False
            num_near = num_hits = 0
            _place(boxes[i], own, 0)
            while place != end and not removed:
                number, first = place // _LANES, place % _LANES
                last = number == end // _LANES
                stop = end % _LANES if last else _LANES
                place = end if last else after[number] * _LANES
                num_near = _gather(selected[number], first, stop, own, np.float64(threshold), flags, near, num_near)
                while num_near >= _LANES or (num_near > 0 and place == end):
                    ready = min(num_near, _LANES)
                    _ious(own, 0, near, ready, ious)
                    for k in range(ready):
                        hits[num_hits] = ious[k]
                        num_hits += np.int64(hits[num_hits] > threshold)
                    num_near -= ready
                    for row in range(6):
                        for k in range(num_near):
                            near[row, k] = near[row, k + _LANES]
                if removes:
                    for k in range(num_hits):
                        removed = removed or weigh(np.float64(hits[k]), iou_threshold, sigma) == 0
                    num_hits = 0
                    continue
                if strongest:
                    nearest = closest[i]
                    for k in range(num_hits):
                        nearest = max(nearest, hits[k])
                    num_hits = 0
                    if nearest > closest[i]:
                        closest[i] = nearest
                        score = scores[i] * real(weigh(np.float64(nearest), iou_threshold, sigma))
                    continue
                while num_hits >= _LANES or (num_hits > 0 and place == end):
                    ready = min(num_hits, _LANES)
                    if ready < _FEW or is_double:
                        for k in range(ready):
                            score = score * real(weigh(np.float64(hits[k]), iou_threshold, sigma))
                    else:
                        weigh_lanes(hits, iou_threshold, sigma, factors)
                        for k in range(ready):
                            score = score * factors[k]
                    num_hits -= ready
                    for k in range(num_hits):
                        hits[k] = hits[k + _LANES]
                removed = score < min_score
            removed = removed or score < min_score
            seen[i] = end
            if not removed and score < heap_scores[0]:
                heap_scores[0] = score
                _sink(heap_scores, heap_index, size, 0)
                continue
            if not removed:
                keep[count], kept_scores[count] = i, score
                count += 1
                if end < 0:
                    head[c] = end = blocks_used * _LANES
                    blocks_used += 1
                number, lane = end // _LANES, end % _LANES
                for row in range(8):
                    selected[number, row, lane] = own[row, 0]
                end += 1
                if lane == _LANES - 1:
                    after[number], end = blocks_used, blocks_used * _LANES
                    blocks_used += 1
                tail[c] = end
            size -= 1
            heap_scores[0], heap_index[0] = heap_scores[size], heap_index[size]
            _sink(heap_scores, heap_index, size, 0)
        return count

    select.__qualname__ = f'_select_rotated_{weight.name}{"_strongest" * strongest}'  # names the file in numba's cache
    return select
