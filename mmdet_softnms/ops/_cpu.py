"""Exact Soft-NMS on the CPU by lazy selection, compiled with numba.

Why it is exact: every weight lies in [0, 1], so a score that has not been brought up to date is an upper bound of the
current one. Keep candidates in a max-heap ordered by (score, then lowest index). Look at the root: if boxes of its
class were selected since its score was last brought up to date, apply just those decays, in selection order (so the
same roundings happen as in the definition), and let it sink; otherwise nothing can beat it and it is the next
selection. A box once below ``min_score`` can never be selected, so it leaves the heap at once. A few thousand IoUs are
computed instead of N squared, and the work stops at ``max_num``.

What the profile asked for on top of that:

* Where few of many are wanted, building the heap was most of the time. It starts with the candidates above a ``bound``
  taken from a sample of the scores; those below it can only matter once the root has sunk below it, and then the next
  layer joins. A poor sample costs time, never exactness.
* Where many are wanted, the IoUs are. Selected boxes of a class lie in blocks of ``_LANES``, one coordinate after the
  other, so that LLVM computes a block's IoUs at once; the few that count are gathered, and their weights are computed
  ``_LANES`` at a time.

Every rule has a kernel of its own, with its weight from :mod:`mmdet_softnms.ops.weights` compiled in: a factory,
``_selection``, makes the function that numba compiles at the first call of that rule.

Names: ``heap_scores``/``heap_index`` (N,): the heap, two parallel arrays. ``selected`` (B, 5, _LANES): blocks of
selected boxes, x1, y1, x2, y2 and area; ``after`` (B,): the next block of the same class. A place in them is
``block * _LANES + lane``. ``head``, ``tail`` (C,): the places of a class's first selection and of its next one, -1
before there is any. ``seen`` (N,): the place up to which a box's score reflects the selections of its class, -1: none.
"""

import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from mmdet_softnms.ops import weights
from mmdet_softnms.ops._arguments import Parameters, raise_bad_values
from mmdet_softnms.ops._compiled import compiled

_BAD_VALUE = -1
_LANES = 16
_FEW = 4  # weights, below which the library's exp is sooner done than _LANES at once
_SAMPLE = 512  # scores looked at for the first bound


def select(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, params: Parameters, quality: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select by the definition in :func:`mmdet_softnms.soft_nms`; CPU tensors only.

    Args, Returns, Raises: as :func:`mmdet_softnms.ops._reference.select`.
    """
    num_boxes = scores.shape[0]
    if num_boxes >= 2**30:
        raise ValueError(f'boxes has {num_boxes:,} rows, and the kernel counts to 2^30; raise score_thr')
    boxes, scores = boxes.contiguous(), scores.contiguous()
    dense_, num_classes = dense_labels(boxes, scores, labels, params.offset)
    boxes_, scores_ = boxes.numpy(), scores.numpy()
    real = scores_.dtype.type
    weight = weights.get(params.method)
    limit = num_boxes if params.max_num < 0 else min(params.max_num, num_boxes)
    keep, kept_scores = np.empty(limit, np.int64), np.empty(limit, real)
    strongest = params.decay == 'strongest' and not weight.removes  # which removes the same boxes either way
    count = kernel(weight, strongest, quality is not None)(
        boxes_,
        scores_,
        scores_ if quality is None else quality.contiguous().numpy(),
        dense_,
        num_classes,
        params.iou_threshold,
        params.sigma,
        real(params.min_score),
        real(params.offset),
        keep,
        kept_scores,
    )
    return torch.from_numpy(keep[:count]), torch.from_numpy(kept_scores[:count])


def dense_labels(boxes: Tensor, scores: Tensor, labels: Tensor | None, offset: float) -> tuple[Any, int]:
    """(N,) int64 array of labels small enough to count with, and a number that is above them all.

    Args:
        boxes, scores: contiguous CPU tensors of one type.

    Raises:
        ValueError: a value is not finite, an area overflows, or a label is negative.
    """
    num_boxes = scores.shape[0]
    dense = np.zeros(num_boxes, np.int64) if labels is None else labels.contiguous().numpy()
    scores_ = scores.numpy()
    highest = _check(boxes.numpy(), scores_, dense, scores_.dtype.type(offset))
    if highest == _BAD_VALUE:
        raise_bad_values(boxes, scores, labels, offset)
    if highest > num_boxes + 2048:  # the kernel has two places for every label: rather for those that occur
        numbers = np.empty(num_boxes, np.int64)
        return numbers, _number(dense, numbers)
    return dense, highest + 1


@compiled(lambda real: types.int64(real[:, ::1], real[::1], types.int64[::1], real))
def _check(boxes, scores, labels, offset):  # type: ignore[no-untyped-def]
    """The highest label, or _BAD_VALUE where a value is not finite, an area overflows or a label is negative."""
    real = scores.dtype.type
    largest = np.finfo(boxes.dtype).max / real(2)
    # Nearly always all coordinates are so small that no area can overflow; counted without branches, so that LLVM
    # vectorises it.
    safe, finite = real(math.sqrt(largest) / 8), np.finfo(scores.dtype).max
    corners = boxes.reshape(-1)
    bad = signs = highest = 0
    for k in range(len(corners)):
        bad += 0 if abs(corners[k]) <= safe else 1
    for k in range(len(scores)):
        bad += 0 if abs(scores[k]) <= finite else 1
    for k in range(len(labels)):
        signs |= labels[k]
        highest = max(highest, labels[k])
    if bad == 0 and signs >= 0 and offset <= safe:
        return highest
    for i in range(len(scores)):
        area = (boxes[i, 2] - boxes[i, 0] + offset) * (boxes[i, 3] - boxes[i, 1] + offset)
        # An infinite or NaN side makes the area so too, unless it cancels: x1 = x2 = inf gives NaN, never a number;
        # only a product with a zero side can hide an overflowed one, and 0 * inf is NaN as well.
        if not (abs(area) <= largest and math.isfinite(scores[i])) or labels[i] < 0:
            return _BAD_VALUE
    return highest


@compiled(lambda real: types.int64(types.int64[::1], types.int64[::1]))
def _number(labels, numbers):  # type: ignore[no-untyped-def]
    """Write 0, 1, ... for the labels in the order they occur; returns how many there are."""
    bits = 1
    while (1 << bits) < 2 * len(labels):
        bits += 1
    mask, shift = np.int64((1 << bits) - 1), np.uint64(64 - bits)
    table = np.full(1 << bits, -1, np.int32)  # a hash table of numbers, at most half full
    known = np.empty(len(labels), np.int64)  # label of each number
    count = 0
    for i in range(len(labels)):
        label = labels[i]
        # Fibonacci hashing (Knuth, TAOCP 3, 6.4): neighbours and multiples are scattered.
        place = np.int64((np.uint64(label) * np.uint64(11400714819323198485)) >> shift)
        while table[place] >= 0 and known[table[place]] != label:
            place = (place + 1) & mask
        if table[place] < 0:
            table[place], known[count] = count, label
            count += 1
        numbers[i] = table[place]
    return count


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


@numba.njit(nogil=True, error_model='numpy', inline='always')
def _iou(block, k, x1, y1, x2, y2, area, offset):  # type: ignore[no-untyped-def]
    """IoU with the box in lane ``k``, rounded as the reference rounds it."""
    zero = block.dtype.type(0)
    width = min(x2, block[2, k]) - max(x1, block[0, k]) + offset
    if width <= zero:
        return zero
    height = min(y2, block[3, k]) - max(y1, block[1, k]) + offset
    if height <= zero:
        return zero
    intersection = width * height
    union = area + block[4, k] - intersection
    return intersection / union if union > zero else zero


@numba.njit(nogil=True, error_model='numpy', inline='always')
def _gather(  # type: ignore[no-untyped-def]
    block, first, stop, x1, y1, x2, y2, area, offset, threshold, ious, hits, num_hits
):
    """Append to ``hits`` the IoUs above the threshold with lanes ``first`` to ``stop``; returns the new number.

    All lanes are computed, which is quicker than not all; what lies outside is anything, and not looked at.
    """
    zero = ious.dtype.type(0)
    found = np.int32(0)
    for lane in range(_LANES):
        # _iou, written out and without branches: otherwise LLVM does not vectorise it.
        width = min(x2, block[2, lane]) - max(x1, block[0, lane]) + offset
        height = min(y2, block[3, lane]) - max(y1, block[1, lane]) + offset
        intersection = width * height
        union = area + block[4, lane] - intersection
        quotient = intersection / union
        iou = quotient if (width > zero) & (height > zero) & (union > zero) else zero
        ious[lane] = iou
        found += np.int32((iou > threshold) & (lane >= first) & (lane < stop))
    if found:
        for lane in range(first, stop):
            hits[num_hits] = ious[lane]
            num_hits += np.int64(ious[lane] > threshold)
    return num_hits


@numba.njit(nogil=True, error_model='numpy', inline='always')
def _closest(  # type: ignore[no-untyped-def]
    selected, after, place, end, least, x1, y1, x2, y2, area, offset, ious
):
    """The largest of ``least`` and the IoUs with the selected boxes from ``place`` to ``end``."""
    zero = ious.dtype.type(0)
    for lane in range(_LANES):
        ious[lane] = least
    while place != end:
        number, first = place // _LANES, place % _LANES
        last = number == end // _LANES
        stop = end % _LANES if last else _LANES
        block = selected[number]
        for lane in range(_LANES):
            # As in _gather; and the maximum is kept for each lane, which vectorises.
            width = min(x2, block[2, lane]) - max(x1, block[0, lane]) + offset
            height = min(y2, block[3, lane]) - max(y1, block[1, lane]) + offset
            intersection = width * height
            union = area + block[4, lane] - intersection
            quotient = intersection / union
            counts = (width > zero) & (height > zero) & (union > zero) & (lane >= first) & (lane < stop)
            iou = quotient if counts else zero
            ious[lane] = iou if iou > ious[lane] else ious[lane]
        place = end if last else after[number] * _LANES
    for lane in range(_LANES):
        least = max(least, ious[lane])
    return least


@numba.njit(nogil=True, error_model='numpy', inline='always')
def _where(condition, a, b):  # type: ignore[no-untyped-def]
    return a if condition else b


@numba.njit(nogil=True, error_model='numpy', inline='always')
def _exp(x):  # type: ignore[no-untyped-def]
    """exp for several lanes at once, whose results are rounded to float32.

    In float64 to its last bit or two, so that rounding it to float32 gives what any good exp gives, but without a
    call, so that it vectorises: exp(x) = 2^n exp(r) with abs(r) <= log(2) / 2, and Taylor's polynomial for exp(r),
    whose remainder is below 1e-17. Cut at -700 and 700, where float32 has long been at 0 and at infinity.
    """
    x = x if x > -700.0 else -700.0
    x = x if x < 700.0 else 700.0
    shifted = x * 1.4426950408889634 + 6755399441055744.0  # 1.5 * 2^52: rounds, and leaves n in the lowest bits
    n = shifted - 6755399441055744.0
    r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10  # log(2) in two parts
    p = 1 / 6227020800.0
    p = p * r + 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    p = (p * r) * r + r + 1.0
    power = np.int64((np.float64(shifted).view(np.int64) + np.int64(1023)) << np.int64(52)).view(np.float64)
    return p * power


def _weight_of(weight: weights.Weight, exp: Any) -> Any:
    """The weight for numba, of a float64 IoU and all parameters."""
    words = dict(where=_where, exp=exp, cos=math.cos, sqrt=math.sqrt)
    options = dict(nogil=True, error_model='numpy', inline='always')
    function = numba.njit(**options)(weights.rewritten(weight.function, words))
    taken = ', '.join(('iou', *weight.parameters))
    call = eval(f'lambda iou, {", ".join(weights.PARAMETERS)}: function({taken})', {'function': function})
    return numba.njit(**options)(call)


def _lanes_of(weight: weights.Weight) -> Any:
    """A function that computes ``_LANES`` weights of float32 at once."""
    weigh = _weight_of(weight, _exp)

    @numba.njit(nogil=True, error_model='numpy', inline='always')
    def lanes(ious, iou_threshold, sigma, results):  # type: ignore[no-untyped-def]
        for k in range(_LANES):
            results[k] = results.dtype.type(weigh(np.float64(ious[k]), iou_threshold, sigma))

    return lanes


_kernels: dict[tuple[weights.Weight, bool, bool], Any] = {}
_one_compiles = threading.Lock()


def kernel(weight: weights.Weight, strongest: bool = False, supported: bool = False) -> Any:
    """The compiled selection of a rule; compiled at the first call."""
    variant = weight, strongest, supported
    known = _kernels.get(variant)
    return compile_variant(_kernels, variant, _selection, _selection_types, __name__) if known is None else known


def compile_variant(
    kernels: dict[Any, Any], variant: tuple[Any, ...], make: Callable[..., Any], types_of: Any, *sources: str
) -> Any:
    """Compile ``make(*variant)``, whose first value is a weight, into ``kernels``; one at a time in all threads.

    From the disk cache where the rule is one of ``weights.py``: numba would not see a change of other files.
    ``sources``: the other modules that are compiled in.
    """
    with _one_compiles:
        if variant not in kernels:
            cached = variant[0].function.__module__ == weights.__name__
            decorate = compiled(types_of, cached=cached, sources=[weights.__name__, *sources])
            kernels[variant] = decorate(make(*variant))
    return kernels[variant]


def _selection_types(real: Any) -> Any:
    wide, whole = types.float64, types.int64
    return whole(real[:, ::1], real[::1], real[::1], whole[::1], whole, wide, wide, real, real, whole[::1], real[::1])


def _selection(weight: weights.Weight, strongest: bool, supported: bool) -> Callable[..., Any]:
    """The function that numba compiles for a rule.

    Args:
        strongest: the strongest decay alone counts, not the product of all.
        supported: the order is that of current scores times a quality of each box.
    """
    weigh, weigh_lanes = _weight_of(weight, math.exp), _lanes_of(weight)
    removes, has_threshold = weight.removes, 'iou_threshold' in weight.parameters

    def select(  # type: ignore[no-untyped-def]
        boxes, scores, quality, labels, num_classes, iou_threshold, sigma, min_score, offset, keep, kept_scores
    ):
        """Fill ``keep`` and ``kept_scores``; returns how many were selected."""
        real = scores.dtype.type
        num_boxes, limit = len(scores), len(keep)
        heap_scores, heap_index = np.empty(num_boxes, scores.dtype), np.empty(num_boxes, np.int64)
        seen = np.full(num_boxes, -1, np.int32)
        head, tail = np.full(num_classes, -1, np.int32), np.full(num_classes, -1, np.int32)
        num_blocks = limit // _LANES + min(num_classes, limit) + 1
        selected, after = np.empty((num_blocks, 5, _LANES), boxes.dtype), np.empty(num_blocks, np.int32)
        blocks_used = 0
        ious, factors = np.zeros(_LANES, boxes.dtype), np.zeros(_LANES, boxes.dtype)
        hits = np.zeros(2 * _LANES, boxes.dtype)
        threshold = real(iou_threshold) if has_threshold else real(0)  # an IoU has to be above it to matter
        is_double = boxes.itemsize == 8
        # What the heap orders by, and how low it may be: the scores, unless there is a quality of each box.
        keys, floor, current = scores, min_score, scores
        if supported:
            keys, floor, current = np.empty(num_boxes, scores.dtype), real(0), scores.copy()
            for i in range(num_boxes):
                keys[i] = scores[i] * quality[i] if scores[i] >= min_score else real(-1)
        closest = np.zeros(num_boxes if strongest else 0, boxes.dtype)  # the largest IoU with a selected box

        few_wanted = num_boxes >= 4 * _SAMPLE and limit <= num_boxes // 8
        sample = np.empty(_SAMPLE if few_wanted else 0, scores.dtype)
        for k in range(len(sample)):
            sample[k] = keys[(k * 2654435761) % num_boxes]  # scattered: columns of classes have a period
        sample.sort()
        above = 2 + 4 * limit * _SAMPLE // num_boxes  # how many of the sample the next layer reaches down to
        bound = real(np.inf)
        size = count = 0
        while count < limit:
            if size == 0 or heap_scores[0] < bound:  # a candidate outside of the heap may be ahead
                if bound <= floor:
                    break
                upper, bound = bound, floor
                if above <= len(sample):
                    bound = max(bound, sample[len(sample) - above])
                    above *= 4
                for i in range(num_boxes):
                    if bound <= keys[i] < upper:
                        heap_scores[size], heap_index[size] = keys[i], i
                        size += 1
                for place in range(size // 2 - 1, -1, -1):
                    _sink(heap_scores, heap_index, size, place)
                continue

            score, i = heap_scores[0], heap_index[0]
            if supported:
                score = current[i]
            x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
            area = (x2 - x1 + offset) * (y2 - y1 + offset)
            c = labels[i]
            place, end = seen[i], tail[c]
            if place < 0:
                place = head[c]
            removed = False
            num_hits = 0
            if strongest and place != end:
                near = _closest(selected, after, place, end, closest[i], x1, y1, x2, y2, area, offset, ious)
                if near > closest[i]:
                    closest[i] = near
                    score = scores[i] * real(weigh(np.float64(near), iou_threshold, sigma))
                place = end
            if end - place < _FEW and place // _LANES == end // _LANES:  # nearly always where few are wanted
                block = selected[end // _LANES]
                for lane in range(place % _LANES, end % _LANES):
                    iou = _iou(block, lane, x1, y1, x2, y2, area, offset)
                    if iou > threshold:
                        factor = real(weigh(np.float64(iou), iou_threshold, sigma))
                        if removes:
                            removed = removed or factor == 0
                        else:
                            score = score * factor
                place = end
            while place != end and not removed:
                number, first = place // _LANES, place % _LANES
                last = number == end // _LANES
                stop = end % _LANES if last else _LANES
                place = end if last else after[number] * _LANES
                num_hits = _gather(
                    selected[number], first, stop, x1, y1, x2, y2, area, offset, threshold, ious, hits, num_hits
                )
                if removes:
                    for k in range(num_hits):
                        removed = removed or weigh(np.float64(hits[k]), iou_threshold, sigma) == 0
                    num_hits = 0
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
            if supported:
                current[i] = score
                score = score * quality[i]

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
                block = selected[number]
                block[0, lane], block[1, lane], block[2, lane], block[3, lane], block[4, lane] = x1, y1, x2, y2, area
                end += 1
                if lane == _LANES - 1:
                    after[number], end = blocks_used, blocks_used * _LANES
                    blocks_used += 1
                tail[c] = end
            size -= 1
            heap_scores[0], heap_index[0] = heap_scores[size], heap_index[size]
            _sink(heap_scores, heap_index, size, 0)
        return count

    variant = '_strongest' * strongest + '_supported' * supported
    select.__qualname__ = f'_select_{weight.name}{variant}'  # names the file in numba's cache
    return select
