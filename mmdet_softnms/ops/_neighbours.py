"""Which boxes of its class overlap a box, found quickly, and what voting and support make of them; numba, CPU.

The candidates of a class lie together, one coordinate after the other, in input order. Where many of a large class are
asked about, they lie by their left edge instead: those that can overlap a box are then a window, found by two binary
searches, one over the left edges and one over the rightmost right edge so far. Both ask with the IoU's own arithmetic,
so what lies outside of the window has an IoU of 0 however it is rounded. A grid was not quicker: of a window, sixteen
IoUs are computed at once, and in two dimensions large boxes lie in many cells.

Sums are in float64 and in input order: windows are put back into that order first.

Names: ``columns`` (5, size): x1, y1, x2, y2 and area of a class's members; ``reach`` (size,): the largest x2 up to
each, ``order`` (size,): the place of each among the members in input order; both only where they lie by the left edge.
``by_left`` (N,): all candidates by their left edge, or nothing where that was not worth it (:func:`by_left_edge`).
"""

from typing import Any

import numba
import numpy as np
from numba import types

from mmdet_softnms.ops._compiled import compiled
from mmdet_softnms.ops._cpu import _exp

_WORTH_SORTING = 256  # members of a class, and a question about them for 128 of them
_BLOCK = 64  # members of whom it is noted together whether there is a hit among them

_shared = numba.njit(nogil=True, error_model='numpy')  # compiled once, for both kernels


@_shared
def _by_class(labels, num_classes, wanted):  # type: ignore[no-untyped-def]
    """(C + 1,) where each class begins, and (M,) the candidates of the classes that are wanted, in input order."""
    starts = np.zeros(num_classes + 1, np.int64)
    for i in range(len(labels)):
        starts[labels[i] + 1] += 1 if wanted[labels[i]] > 0 else 0
    for c in range(num_classes):
        starts[c + 1] += starts[c]
    place = starts[:-1].copy()
    members = np.empty(starts[-1], np.int64)
    for i in range(len(labels)):
        c = labels[i]
        if wanted[c] > 0:
            members[place[c]] = i
            place[c] += 1
    return starts, members


def by_left_edge(boxes: Any, num_classes: int, questions: int) -> Any:
    """``by_left`` for a number of questions about (N, 4) boxes."""
    num_boxes = len(boxes)
    if num_boxes < _WORTH_SORTING * num_classes or 128 * questions < num_boxes:
        return np.empty(0, np.int64)
    return np.argsort(boxes[:, 0])


@_shared
def _places(labels, members, starts, by_left, order):  # type: ignore[no-untyped-def]
    """Fill ``order`` for all classes, one after the other as in ``members``."""
    place_of, place = np.full(len(labels), -1, np.int64), starts[:-1].copy()
    for c in range(len(place)):
        for k in range(starts[c], starts[c + 1]):
            place_of[members[k]] = k - starts[c]
    for i in by_left:
        if place_of[i] >= 0:
            order[place[labels[i]]] = place_of[i]
            place[labels[i]] += 1


@_shared
def _lay_out(boxes, members, offset, by_edge, columns, reach, order):  # type: ignore[no-untyped-def]
    """Fill ``columns``, and ``reach`` where the members shall lie by their left edge."""
    for k in range(len(members)):
        i = members[order[k]] if by_edge else members[k]
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        columns[0, k], columns[1, k], columns[2, k], columns[3, k] = x1, y1, x2, y2
        columns[4, k] = (x2 - x1 + offset) * (y2 - y1 + offset)
        if by_edge:
            reach[k] = max(reach[k - 1], x2) if k > 0 else x2


@_shared
def _window(columns, reach, size, x1, x2, offset):  # type: ignore[no-untyped-def]
    """From where to where members by their left edge can overlap a box."""
    zero = columns.dtype.type(0)
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        if reach[middle] - x1 + offset > zero:
            high = middle
        else:
            low = middle + 1
    first, high = low, size
    while low < high:
        middle = (low + high) // 2
        if x2 - columns[0, middle] + offset > zero:
            low = middle + 1
        else:
            high = middle
    return first, low


@_shared
def _overlapping(  # type: ignore[no-untyped-def]
    columns, reach, order, size, by_edge, x1, y1, x2, y2, offset, ious, scratch, flags, hits, hit_ious
):
    """Write the members that overlap a box, in input order, and their IoUs; returns how many.

    ``scratch``, ``flags``: zeros, and zeros again afterwards.
    """
    zero = columns.dtype.type(0)
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    first, stop = 0, size
    if by_edge:
        first, stop = _window(columns, reach, size, x1, x2, offset)
    for k in range(first, stop):  # without branches, so that LLVM vectorises it; rounded as everywhere
        width = min(x2, columns[2, k]) - max(x1, columns[0, k]) + offset
        height = min(y2, columns[3, k]) - max(y1, columns[1, k]) + offset
        intersection = width * height
        union = area + columns[4, k] - intersection
        quotient = intersection / union
        ious[k] = quotient if (width > zero) & (height > zero) & (union > zero) else zero
    count = 0
    if not by_edge:
        for k in range(size):
            hits[count], hit_ious[count] = k, ious[k]
            count += 1 if ious[k] > zero else 0
        return count
    for k in range(first, stop):
        if ious[k] > zero:
            scratch[order[k]], flags[order[k] // _BLOCK] = ious[k], 1
    for number in range((size - 1) // _BLOCK + 1):
        if flags[number]:
            flags[number] = 0
            for k in range(number * _BLOCK, min((number + 1) * _BLOCK, size)):
                hits[count], hit_ious[count] = k, scratch[k]
                count += 1 if scratch[k] > zero else 0
                scratch[k] = zero
    return count


_SOURCES = ['mmdet_softnms.ops._cpu', 'mmdet_softnms.ops.weights']  # compiled into the kernels below


@compiled(
    lambda real: types.void(
        real[:, ::1],
        real[::1],
        types.int64[::1],
        types.int64,
        types.int64[::1],
        types.int64[::1],
        types.float64,
        real,
        real[:, ::1],
    ),
    sources=_SOURCES,
)
def vote(boxes, scores, labels, num_classes, by_left, keep, tolerance, offset, voted):  # type: ignore[no-untyped-def]
    """Fill ``voted`` (M, 4) by the definition in :func:`mmdet_softnms.ops._voting.vote`."""
    wanted = np.zeros(num_classes, np.int64)
    for m in range(len(keep)):
        wanted[labels[keep[m]]] += 1
    starts, members = _by_class(labels, num_classes, wanted)
    largest = 0
    for c in range(num_classes):
        largest = max(largest, starts[c + 1] - starts[c])
    columns, reach = np.empty((5, largest), boxes.dtype), np.empty(largest, boxes.dtype)
    order, hits = np.empty(len(members) if len(by_left) > 0 else 0, np.int64), np.empty(largest + 1, np.int64)
    if len(by_left) > 0:
        _places(labels, members, starts, by_left, order)
    flags = np.zeros(largest // _BLOCK + 1, np.int8)
    ious, scratch = np.empty(largest, boxes.dtype), np.zeros(largest, boxes.dtype)
    hit_ious, weights = np.empty(largest + 1, boxes.dtype), np.empty(largest, np.float64)
    # The kept boxes of a class one after the other, so that its members are laid out once.
    of_class, queue = _by_class(labels[keep], num_classes, wanted)
    for c in range(num_classes):
        if wanted[c] == 0:
            continue
        start, size = starts[c], starts[c + 1] - starts[c]
        by_edge = len(by_left) > 0 and size >= _WORTH_SORTING and 128 * wanted[c] >= size
        places = order[start : start + size]
        _lay_out(boxes, members[start : start + size], offset, by_edge, columns, reach, places)
        for at in range(of_class[c], of_class[c + 1]):
            m = queue[at]
            i = keep[m]
            x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
            count = _overlapping(
                columns, reach, places, size, by_edge, x1, y1, x2, y2, offset, ious, scratch, flags, hits, hit_ious
            )
            for k in range(count):
                distance = 1.0 - np.float64(hit_ious[k])
                exponent = -(distance * distance) / tolerance
                weights[k] = _exp(exponent) if exponent > -700.0 else 0.0
            total = sum1 = sum2 = sum3 = sum4 = 0.0
            for k in range(count):
                j = members[start + hits[k]]
                weight = max(np.float64(scores[j]), 0.0) * weights[k]
                total += weight
                sum1 += weight * np.float64(boxes[j, 0])
                sum2 += weight * np.float64(boxes[j, 1])
                sum3 += weight * np.float64(boxes[j, 2])
                sum4 += weight * np.float64(boxes[j, 3])
            if total > 0.0:
                voted[m, 0], voted[m, 1], voted[m, 2], voted[m, 3] = (
                    sum1 / total,
                    sum2 / total,
                    sum3 / total,
                    sum4 / total,
                )
            else:
                voted[m, 0], voted[m, 1], voted[m, 2], voted[m, 3] = x1, y1, x2, y2


@compiled(
    lambda real: types.void(
        real[:, ::1],
        real[::1],
        types.int64[::1],
        types.int64,
        types.int64[::1],
        types.float64,
        real,
        types.float64[::1],
    ),
    sources=_SOURCES,
)
def support(boxes, scores, labels, num_classes, by_left, power, offset, sums):  # type: ignore[no-untyped-def]
    """Fill ``sums`` (N,) by the definition of S in :func:`mmdet_softnms.ops._voting.quality`."""
    wanted = np.ones(num_classes, np.int64)
    starts, members = _by_class(labels, num_classes, wanted)
    largest = 0
    for c in range(num_classes):
        largest = max(largest, starts[c + 1] - starts[c])
    columns, reach = np.empty((5, largest), boxes.dtype), np.empty(largest, boxes.dtype)
    order, hits = np.empty(len(members) if len(by_left) > 0 else 0, np.int64), np.empty(largest + 1, np.int64)
    if len(by_left) > 0:
        _places(labels, members, starts, by_left, order)
    flags = np.zeros(largest // _BLOCK + 1, np.int8)
    ious, scratch = np.empty(largest, boxes.dtype), np.zeros(largest, boxes.dtype)
    hit_ious = np.empty(largest + 1, boxes.dtype)
    whole = np.int64(power) if power == np.floor(power) and power <= 64.0 else np.int64(0)
    for c in range(num_classes):
        start, size = starts[c], starts[c + 1] - starts[c]
        by_edge = len(by_left) > 0 and size >= _WORTH_SORTING
        places = order[start : start + size]
        _lay_out(boxes, members[start : start + size], offset, by_edge, columns, reach, places)
        for k in range(size):
            i = members[start + k]
            count = _overlapping(
                columns, reach, places, size, by_edge, boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3], offset,
                ious, scratch, flags, hits, hit_ious,
            )  # fmt: skip
            total = 0.0
            for n in range(count):
                iou = np.float64(hit_ious[n])
                raised = 1.0
                if whole > 0:
                    left = whole
                    while left > 0:
                        if left & 1:
                            raised *= iou
                        iou *= iou
                        left >>= 1
                else:
                    raised = iou**power
                total += max(np.float64(scores[members[start + hits[n]]]), 0.0) * raised
            sums[i] = total
