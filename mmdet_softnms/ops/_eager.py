"""Exact Soft-NMS on the CPU where large classes are wanted nearly whole: each selection decays its neighbours at once.

The lazy selection (``_cpu.py``) holds a candidate against every box of its class that was selected before it. With a
class of thousands, all wanted, those are half of all pairs, and most do not overlap. Here the candidates of a class lie
by their left edge (``_neighbours.py``), a selection finds the window of those that it can overlap, and decays them.
Decays come in selection order, with the same roundings, and what is outside of the window has an IoU of 0 and a weight
of 1: the same bits. The heap is the lazy one: scores only fall, so a score that has fallen since is put back.

Candidates that are done with stay in the windows until they are an eighth of all; then the rest move together.

Names, all by place in the layout: ``columns`` (5, N), ``reach`` (N,) as in ``_neighbours.py``; ``who`` (N,): input
index; ``live`` (N,): current score, -1 where the candidate is out; ``nearest`` (N,): largest IoU with a selected box.
``place_of`` (N,), by input index: the place in the layout.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from mmdet_softnms.ops import _cpu, _neighbours, weights
from mmdet_softnms.ops._arguments import Parameters
from mmdet_softnms.ops._cpu import _LANES, _lanes_of, _sink, _weight_of
from mmdet_softnms.ops._neighbours import _window

_SOURCES = (_cpu.__name__, _neighbours.__name__, __name__)  # all that is compiled into a kernel
_LARGE = 512  # candidates of a class, on average


def select(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, params: Parameters, quality: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.soft_nms`, eagerly or lazily; CPU tensors only.

    Args, Returns, Raises: as :func:`mmdet_softnms.ops._reference.select`.
    """
    num_boxes = scores.shape[0]
    limit = num_boxes if params.max_num < 0 else min(params.max_num, num_boxes)
    few = num_boxes < _LARGE or 4 * limit < num_boxes or num_boxes >= 2**30 or quality is not None
    if few or (labels is not None and num_boxes < _LARGE * (int(labels.max()) + 1)):
        return _cpu.select(boxes, scores, labels, params, quality)
    boxes, scores = boxes.contiguous(), scores.contiguous()
    dense, num_classes = _cpu.dense_labels(boxes, scores, labels, params.offset)
    boxes_, scores_ = boxes.numpy(), scores.numpy()
    real = scores_.dtype.type
    by_left = np.argsort(boxes_[:, 0])
    if num_classes > 1:
        by_left = by_left[np.argsort(dense[by_left], kind='stable')]
    keep, kept_scores = np.empty(limit, np.int64), np.empty(limit, real)
    weight = weights.get(params.method)
    count = kernel(weight, params.decay == 'strongest' and not weight.removes)(
        boxes_,
        scores_,
        dense,
        num_classes,
        by_left,
        params.iou_threshold,
        params.sigma,
        real(params.min_score),
        real(params.offset),
        keep,
        kept_scores,
    )
    return torch.from_numpy(keep[:count]), torch.from_numpy(kept_scores[:count])


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


def _selection_types(real: Any) -> Any:
    wide, whole = types.float64, types.int64
    numbers = whole[::1]
    return whole(real[:, ::1], real[::1], numbers, whole, numbers, wide, wide, real, real, numbers, real[::1])


def _selection(weight: weights.Weight, strongest: bool) -> Callable[..., Any]:
    """The function that numba compiles for a rule."""
    weigh, weigh_lanes = _weight_of(weight, math.exp), _lanes_of(weight)
    removes, has_threshold = weight.removes, 'iou_threshold' in weight.parameters

    def select(  # type: ignore[no-untyped-def]
        boxes, scores, labels, num_classes, by_left, iou_threshold, sigma, min_score, offset, keep, kept_scores
    ):
        """Fill ``keep`` and ``kept_scores``; returns how many were selected. ``by_left``: by class, then left edge."""
        real = scores.dtype.type
        zero, out = real(0), real(-1)
        num_boxes, limit = len(scores), len(keep)
        heap_scores, heap_index = np.empty(num_boxes, scores.dtype), np.empty(num_boxes, np.int64)
        columns, reach = np.empty((5, num_boxes), boxes.dtype), np.empty(num_boxes, boxes.dtype)
        who, place_of = np.empty(num_boxes, np.int64), np.full(num_boxes, -1, np.int64)
        live, nearest = np.empty(num_boxes, scores.dtype), np.zeros(num_boxes if strongest else 0, boxes.dtype)
        starts = np.zeros(num_classes + 1, np.int64)
        ious, hits = np.empty(num_boxes, boxes.dtype), np.empty(num_boxes + 1, np.int32)
        hit_ious, factors = np.zeros(num_boxes + _LANES, boxes.dtype), np.zeros(num_boxes + _LANES, boxes.dtype)
        threshold = real(iou_threshold) if has_threshold else zero  # an IoU has to be above it to matter
        is_double = boxes.itemsize == 8

        size = 0
        for i in by_left:
            if scores[i] >= min_score:
                x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
                columns[0, size], columns[1, size], columns[2, size], columns[3, size] = x1, y1, x2, y2
                columns[4, size] = (x2 - x1 + offset) * (y2 - y1 + offset)
                reach[size] = x2 if size == 0 or labels[who[size - 1]] != labels[i] else max(reach[size - 1], x2)
                who[size], live[size], place_of[i] = i, scores[i], size
                size += 1
                starts[labels[i] + 1] += 1
        for c in range(num_classes):
            starts[c + 1] += starts[c]
        alive = in_layout = waiting = size
        for k in range(size):
            heap_scores[k], heap_index[k] = live[k], who[k]
        for place in range(size // 2 - 1, -1, -1):
            _sink(heap_scores, heap_index, size, place)

        count = 0
        while count < limit and waiting > 0:
            i = heap_index[0]
            at = place_of[i]
            now = live[at] if at >= 0 else out
            if now >= zero and now < heap_scores[0]:
                heap_scores[0] = now
                _sink(heap_scores, heap_index, waiting, 0)
                continue
            waiting -= 1
            heap_scores[0], heap_index[0] = heap_scores[waiting], heap_index[waiting]
            _sink(heap_scores, heap_index, waiting, 0)
            if now < zero:
                continue
            keep[count], kept_scores[count] = i, now
            count += 1
            live[at] = out
            alive -= 1

            x1, y1, x2, y2, area = columns[0, at], columns[1, at], columns[2, at], columns[3, at], columns[4, at]
            begin, end = starts[labels[i]], starts[labels[i] + 1]
            first, stop = _window(columns[:, begin:end], reach[begin:end], end - begin, x1, x2, offset)
            first, stop = first + begin, stop + begin
            for k in range(first, stop):  # without branches, so that LLVM vectorises it
                width = min(x2, columns[2, k]) - max(x1, columns[0, k]) + offset
                height = min(y2, columns[3, k]) - max(y1, columns[1, k]) + offset
                intersection = width * height
                union = area + columns[4, k] - intersection
                quotient = intersection / union
                counts = (width > zero) & (height > zero) & (union > zero) & (live[k] >= zero)
                ious[k] = quotient if counts else zero
            found = 0
            for k in range(first, stop):
                hits[found], hit_ious[found] = k, ious[k]
                found += np.int64(ious[k] > threshold)
            if strongest:
                nearer = 0
                for n in range(found):
                    if hit_ious[n] > nearest[hits[n]]:
                        nearest[hits[n]] = hit_ious[n]
                        hits[nearer], hit_ious[nearer] = hits[n], hit_ious[n]
                        nearer += 1
                found = nearer
            if is_double or removes:
                for n in range(found):
                    factors[n] = real(weigh(np.float64(hit_ious[n]), iou_threshold, sigma))
            else:
                for n in range(0, found, _LANES):
                    weigh_lanes(hit_ious[n:], iou_threshold, sigma, factors[n:])
            for n in range(found):
                k = hits[n]
                left = live[k]
                if removes:
                    left = out if factors[n] == zero else left
                elif strongest:
                    left = scores[who[k]] * factors[n]
                else:
                    left = left * factors[n]
                if left < min_score or left < zero:
                    left = out
                    alive -= 1
                live[k] = left

            if 8 * alive < 7 * in_layout and in_layout > 64:
                size, k, before = 0, 0, 0
                for c in range(num_classes):
                    stop = starts[c + 1]
                    starts[c + 1] = 0
                    for k in range(before, stop):
                        i = who[k]
                        if live[k] < zero:
                            place_of[i] = -1
                            continue
                        for row in range(5):
                            columns[row, size] = columns[row, k]
                        reach[size] = columns[2, k] if size == starts[c] else max(reach[size - 1], columns[2, k])
                        who[size], live[size], place_of[i] = i, live[k], size
                        if strongest:
                            nearest[size] = nearest[k]
                        size += 1
                    before = stop
                    starts[c + 1] = size
                in_layout = size
        return count

    select.__qualname__ = f'_eager_{weight.name}{"_strongest" * strongest}'  # names the file in numba's cache
    return select
