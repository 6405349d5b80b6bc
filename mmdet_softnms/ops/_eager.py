"""Exact Soft-NMS on the CPU where classes of some size are wanted nearly whole: selections decay their neighbours.

The lazy selection (``_cpu.py``) holds a candidate against every box of its class that was selected before it. With a
class of thousands, all wanted, those are half of all pairs, and most do not overlap. Here candidates that lie together
share a block of ``_LANES`` lanes, and ``_BLOCKS`` blocks a group. Blocks and groups know the rectangle that holds their
boxes and their highest score. A selection is the highest of all groups, then of its blocks, then of its lanes. It
decays those blocks of its class whose rectangles it overlaps, all lanes at once and without a branch: where the IoU is
0, the weight is 1. Rectangles are asked with the IoU's own arithmetic, so what lies outside has an IoU of 0 however it
is rounded. Decays come in selection order, with the same roundings as everywhere: the same bits.

Candidates that are done with stay in their lanes until they are an eighth of all (half, where the rule removes: blocks
without any other cost little); then the rest are laid out anew.

Names: ``order``: input indices as they are laid out; ``starts`` (C + 1,): the first block of each class; ``blocks`` (B,
5, _LANES): x1, y1, x2, y2 and area; by lane, (B, _LANES): ``who``: input index, ``live``: current score, -1 where the
lane is empty or done with, ``near``: largest IoU with a selected box, ``first``: score as it was given; ``bounds`` (4,
B): x1, y1, x2, y2 of rectangles; ``best`` (B,): highest score. ``current``, ``nearest`` (N,): of ``live`` and ``near``,
by input index, what they were at the last layout.
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
from mmdet_softnms.ops._arguments import Parameters
from mmdet_softnms.ops._compiled import compiled
from mmdet_softnms.ops._cpu import _LANES, _lanes_of, _weight_of

_SOURCES = (_cpu.__name__, __name__)  # all that is compiled into a kernel
_LARGE = 512  # candidates of a class, on average
_MANY = 4096  # the same, below which few selections remove all others sooner than these are laid out
# Where all are wanted and weights multiply, half of all pairs count either way, and fewer are enough: on average of a
# class (as many as there are classes, for every selection looks for the best of all), and in all.
_WHOLE_CLASS, _WHOLE = 48, 256
_BLOCKS = 32  # of a group

_shared = numba.njit(nogil=True, error_model='numpy')  # compiled once for all rules


def select(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, params: Parameters, quality: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.soft_nms`, eagerly or lazily; CPU tensors only.

    Args, Returns, Raises: as :func:`mmdet_softnms.ops._reference.select`.
    """
    num_boxes = scores.shape[0]
    limit = num_boxes if params.max_num < 0 else min(params.max_num, num_boxes)
    weight = weights.get(params.method)
    whole = limit == num_boxes and not weight.removes and params.decay == 'product'
    few = num_boxes < (_WHOLE if whole else _LARGE) or 4 * limit < num_boxes or num_boxes >= 2**30
    if few or quality is not None or num_boxes < _least(labels, whole):
        return _cpu.select(boxes, scores, labels, params, quality)
    boxes, scores = boxes.contiguous(), scores.contiguous()
    dense, num_classes = _cpu.dense_labels(boxes, scores, labels, params.offset)
    boxes_, scores_ = boxes.numpy(), scores.numpy()
    if weight.removes and num_boxes < _MANY * num_classes and _are_crowded(boxes_, dense):
        return _cpu.select(boxes, scores, labels, params)
    real = scores_.dtype.type
    keep, kept_scores = np.empty(limit, np.int64), np.empty(limit, real)
    count = kernel(weight, params.decay == 'strongest' and not weight.removes)(
        boxes_,
        scores_,
        dense,
        num_classes,
        _in_tiles(boxes_, dense, num_classes),
        params.iou_threshold,
        params.sigma,
        real(params.min_score),
        real(params.offset),
        keep,
        kept_scores,
    )
    return torch.from_numpy(keep[:count]), torch.from_numpy(kept_scores[:count])


def _least(labels: Tensor | None, whole: bool) -> int:
    """Candidates that are worth it for their number of classes; ``whole``: all are wanted, weights multiply."""
    num_classes = 1 if labels is None else int(labels.max()) + 1
    of_class = min(max(num_classes, _WHOLE_CLASS), _LARGE) if whole else _LARGE
    return of_class * num_classes


def _in_tiles(boxes: Any, labels: Any, num_classes: int) -> Any:
    """(N,) indices by class, then in strips by left edges, and in a strip by upper edges.

    So _LANES after each other fill a tile about as wide as high (Leutenegger, Lopez, Edgington, ICDE 1997: STR).
    """
    by_x, by_y = np.argsort(boxes[:, 0]), np.argsort(boxes[:, 1])
    if num_classes > 1:
        by_x = by_x[np.argsort(labels[by_x], kind='stable')]
    size = _LANES * max(math.isqrt(len(by_x) // (num_classes * _LANES)), 1)  # candidates of a strip
    numbers = np.arange(len(by_x)) // size + labels[by_x]  # no two classes have a number in common
    strip = np.empty(len(by_x), np.min_scalar_type(numbers[-1]))  # a small type is sorted by its digits
    strip[by_x] = numbers
    return by_y[np.argsort(strip[by_y], kind='stable')]


@compiled(lambda real: types.boolean(real[:, ::1], types.int64[::1]))
def _are_crowded(boxes, labels):  # type: ignore[no-untyped-def]
    """Whether more than one in 50 pairs of a class overlap, in a sample of at most 64 boxes."""
    step = (len(boxes) + 63) // 64
    pairs = overlapping = 0
    for i in range(0, len(boxes), step):
        for j in range(0, i, step):
            if labels[i] == labels[j]:
                pairs += 1
                wide = min(boxes[i, 2], boxes[j, 2]) > max(boxes[i, 0], boxes[j, 0])
                overlapping += wide and min(boxes[i, 3], boxes[j, 3]) > max(boxes[i, 1], boxes[j, 1])
    return 50 * overlapping > pairs


_kernels: dict[tuple[weights.Weight, bool], Any] = {}


def kernel(weight: weights.Weight, strongest: bool = False) -> Any:
    """The compiled selection of a rule, as :func:`mmdet_softnms.ops._cpu.kernel`."""
    variant = weight, strongest
    known = _kernels.get(variant)
    if known is not None:
        return known
    return _cpu.compile_variant(_kernels, variant, _selection, _selection_types, *_SOURCES)


def load(weight: weights.Weight) -> None:
    """Compile, or take from the disk cache, every kernel that a rule of this weight may call."""
    for strongest in (False, True) if weight.falls and not weight.removes else (False,):
        kernel(weight, strongest)
        for supported in (False, True):
            _cpu.kernel(weight, strongest, supported)


@_shared
def _lay_out(boxes, labels, order, current, offset, starts, blocks, who, live, bounds):  # type: ignore[no-untyped-def]
    """Fill blocks with the candidates in ``order``, each block of one class; returns how many blocks."""
    number, lane, label = -1, _LANES, -1
    for i in order:
        if lane == _LANES or labels[i] != label:
            number, lane = number + 1, 0
            for c in range(label + 1, labels[i] + 1):
                starts[c] = number
            label = labels[i]
            live[number] = -1
            bounds[0, number] = bounds[1, number] = np.inf
            bounds[2, number] = bounds[3, number] = -np.inf
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        block = blocks[number]
        block[0, lane], block[1, lane], block[2, lane], block[3, lane] = x1, y1, x2, y2
        block[4, lane] = (x2 - x1 + offset) * (y2 - y1 + offset)
        who[number, lane], live[number, lane] = i, current[i]
        bounds[0, number], bounds[1, number] = min(bounds[0, number], x1), min(bounds[1, number], y1)
        bounds[2, number], bounds[3, number] = max(bounds[2, number], x2), max(bounds[3, number], y2)
        lane += 1
    starts[label + 1 :] = number + 1
    return number + 1


@_shared
def _summarise(bounds, group_bounds, num_blocks):  # type: ignore[no-untyped-def]
    """Fill the rectangles of groups; returns how many groups."""
    num_groups = (num_blocks + _BLOCKS - 1) // _BLOCKS
    for group in range(num_groups):
        begin, end = group * _BLOCKS, min((group + 1) * _BLOCKS, num_blocks)
        for row in range(2):
            group_bounds[row, group] = bounds[row, begin:end].min()
            group_bounds[row + 2, group] = bounds[row + 2, begin:end].max()
    return num_groups


@numba.njit(nogil=True, error_model='numpy', forceinline=True, fastmath={'nnan', 'nsz'})
def _highest(values):  # type: ignore[no-untyped-def]
    """Of all; no value is NaN, which LLVM has to know to vectorise it."""
    highest = values[0]
    for k in range(1, len(values)):
        highest = values[k] if values[k] > highest else highest
    return highest


@_shared
def _highest_lane(live, who, best, group_best, num_blocks, num_groups):  # type: ignore[no-untyped-def]
    """The block and the lane of the highest score, of equal ones that of the lowest input index."""
    highest, found, lowest = _highest(group_best[:num_groups]), -1, -1
    for group in range(num_groups):
        if group_best[group] == highest:
            for number in range(group * _BLOCKS, min((group + 1) * _BLOCKS, num_blocks)):
                if best[number] == highest:
                    for lane in range(_LANES):
                        if live[number, lane] == highest and (found < 0 or who[number, lane] < lowest):
                            found, lowest = number * _LANES + lane, who[number, lane]
    return found // _LANES, found % _LANES


def _selection_types(real: Any) -> Any:
    wide, whole = types.float64, types.int64
    numbers = whole[::1]
    return whole(real[:, ::1], real[::1], numbers, whole, numbers, wide, wide, real, real, numbers, real[::1])


def _selection(weight: weights.Weight, strongest: bool) -> Callable[..., Any]:
    """The function that numba compiles for a rule."""
    weigh, weigh_lanes = _weight_of(weight, math.exp), _lanes_of(weight)
    removes, has_threshold = weight.removes, 'iou_threshold' in weight.parameters

    def select(  # type: ignore[no-untyped-def]
        boxes, scores, labels, num_classes, order, iou_threshold, sigma, min_score, offset, keep, kept_scores
    ):
        """Fill ``keep`` and ``kept_scores``; returns how many were selected."""
        real = scores.dtype.type
        zero, one, out = real(0), real(1), real(-1)
        num_boxes, limit = len(scores), len(keep)
        most_blocks = num_boxes // _LANES + num_classes
        blocks, who = np.zeros((most_blocks, 5, _LANES), boxes.dtype), np.zeros((most_blocks, _LANES), np.int64)
        live, current = np.empty((most_blocks, _LANES), scores.dtype), scores.copy()
        bounds, best = np.empty((4, most_blocks), boxes.dtype), np.empty(most_blocks, scores.dtype)
        most_groups = (most_blocks + _BLOCKS - 1) // _BLOCKS
        group_bounds, group_best = np.empty((4, most_groups), boxes.dtype), np.empty(most_groups, scores.dtype)
        starts, close = np.zeros(num_classes + 1, np.int64), np.empty(_BLOCKS + 1, np.int64)
        ious, factors = np.zeros(_LANES, boxes.dtype), np.ones(_LANES, boxes.dtype)
        nearest = np.zeros(num_boxes if strongest else 0, boxes.dtype)
        near = np.zeros((most_blocks if strongest else 0, _LANES), boxes.dtype)
        first = np.zeros((most_blocks if strongest else 0, _LANES), scores.dtype)
        threshold = real(iou_threshold) if has_threshold else zero  # an IoU has to be above it to matter
        is_double = boxes.itemsize == 8

        alive = 0
        for i in order:
            if scores[i] >= min_score:
                order[alive] = i
                alive += 1
        count = 0
        while count < limit and alive > 0:
            num_blocks = _lay_out(boxes, labels, order[:alive], current, offset, starts, blocks, who, live, bounds)
            num_groups = _summarise(bounds, group_bounds, num_blocks)
            for number in range(num_blocks):
                best[number] = _highest(live[number])
                if strongest:
                    for lane in range(_LANES):
                        near[number, lane] = nearest[who[number, lane]]
                        first[number, lane] = scores[who[number, lane]]
            for group in range(num_groups):
                group_best[group] = _highest(best[group * _BLOCKS : min((group + 1) * _BLOCKS, num_blocks)])

            enough = (alive // 2 if removes else 7 * alive // 8) if alive > 64 else 0
            while count < limit and alive > enough:
                own, lane = _highest_lane(live, who, best, group_best, num_blocks, num_groups)
                keep[count], kept_scores[count] = who[own, lane], live[own, lane]
                count += 1
                alive -= 1
                live[own, lane] = out
                block = blocks[own]
                x1, y1, x2, y2, area = block[0, lane], block[1, lane], block[2, lane], block[3, lane], block[4, lane]
                begin, end = starts[labels[who[own, lane]]], starts[labels[who[own, lane]] + 1]

                for group in range(begin // _BLOCKS, (end - 1) // _BLOCKS + 1):
                    width = min(x2, group_bounds[2, group]) - max(x1, group_bounds[0, group]) + offset
                    height = min(y2, group_bounds[3, group]) - max(y1, group_bounds[1, group]) + offset
                    if (width <= zero or height <= zero) and group != own // _BLOCKS:
                        continue
                    num_close = 0
                    for number in range(max(begin, group * _BLOCKS), min(end, (group + 1) * _BLOCKS)):
                        width = min(x2, bounds[2, number]) - max(x1, bounds[0, number]) + offset
                        height = min(y2, bounds[3, number]) - max(y1, bounds[1, number]) + offset
                        close[num_close] = number
                        overlaps = (width > zero) & (height > zero) & (best[number] >= zero)
                        num_close += np.int64(overlaps | (number == own))
                    for n in range(num_close):
                        number = close[n]
                        block, scores_ = blocks[number], live[number]
                        hits = np.int32(0)
                        for lane in range(_LANES):  # without branches, so that LLVM vectorises it
                            width = min(x2, block[2, lane]) - max(x1, block[0, lane]) + offset
                            height = min(y2, block[3, lane]) - max(y1, block[1, lane]) + offset
                            intersection = width * height
                            union = area + block[4, lane] - intersection
                            quotient = intersection / union
                            iou = quotient if (width > zero) & (height > zero) & (union > zero) else zero
                            ious[lane] = iou
                            hits += np.int32(iou > threshold)
                        if hits > 0:
                            if strongest:
                                for lane in range(_LANES):
                                    ious[lane] = ious[lane] if ious[lane] > near[number, lane] else near[number, lane]
                                    near[number, lane] = ious[lane]
                            if is_double:
                                for lane in range(_LANES):
                                    factors[lane] = one
                                    if scores_[lane] >= zero and ious[lane] > threshold:
                                        factors[lane] = real(weigh(np.float64(ious[lane]), iou_threshold, sigma))
                            else:
                                weigh_lanes(ious, iou_threshold, sigma, factors)
                            gone = np.int32(0)
                            for lane in range(len(scores_)):
                                before = scores_[lane]
                                if removes:
                                    left = before if factors[lane] > zero else out
                                elif strongest:
                                    left = first[number, lane] * factors[lane]
                                else:
                                    left = before * factors[lane]
                                left = left if (left >= min_score) & (before >= zero) else out
                                scores_[lane] = left
                                gone += np.int32(before >= zero) - np.int32(left >= zero)
                            alive -= gone
                        best[number] = _highest(scores_)
                    group_best[group] = _highest(best[group * _BLOCKS : min((group + 1) * _BLOCKS, num_blocks)])

            alive = 0
            for number in range(num_blocks):
                for lane in range(_LANES):
                    if live[number, lane] >= zero:
                        order[alive], current[who[number, lane]] = who[number, lane], live[number, lane]
                        if strongest:
                            nearest[who[number, lane]] = near[number, lane]
                        alive += 1
        return count

    select.__qualname__ = f'_eager_{weight.name}{"_strongest" * strongest}'  # names the file in numba's cache
    return select
