"""The Triton kernels behind :mod:`mmdet_softnms.ops._triton`; importing this module needs triton.

A *segment* is one class of one image: a run of candidates in ``order``, best score first. One program takes one segment
(and the next, where there are more segments than programs) and selects inside it; nothing crosses segments.

Within a segment the selection is lazy by *chunks* of ``CHUNK`` candidates. One chunk is loaded: its boxes and scores
are in registers, and each selection decays all of it. The others wait in memory with the scores they had when they were
last loaded. Weights lie in [0, 1], so the best (score, lowest index) of a waiting chunk, as stale as it is, bounds what
the chunk can offer now; only when that bound beats the best of the loaded chunk do the two change places, and the
decays the newcomer missed are applied then, in selection order, with the same roundings as if they had been applied at
once. So a segment of any length is handled, and of a long one only those chunks are ever read that could matter.

Arithmetic is the reference's, operation by operation. The launches turn multiply-add fusion off, ``_divide`` is the
correctly rounded division (plain ``/`` on float32 is not, in Triton), and weights are computed in float64.

Names: ``live`` (N,): current scores, >= 0; -1 where the candidate is out (below ``min_score``, removed, selected, or
past the segment's end). ``index``: input index. ``s``, ``s0``: current score, and the one to start from.
``head``, ``winner``: best live score of the loaded chunk and its
lowest input index. ``rival``, ``rival_index``, ``rival_chunk``: the best bound among the waiting chunks. ``k``:
selections so far in the segment. ``seen``: how many of them a waiting chunk's scores reflect.
"""

# mypy: disable-error-code="no-untyped-def, misc"

import ast
import functools
import inspect
import linecache
import textwrap
from typing import Any

import triton
import triton.language as tl

from mmdet_softnms.ops import weights

_LAST = tl.constexpr(0x7FFFFFFF)  # no input index: behind all others in a tie


@triton.jit
def _where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _cos(x):
    return tl.cos(x)


@triton.jit
def _sqrt(x):
    return tl.sqrt_rn(x)


def _without_annotations(function: Any) -> Any:
    """The same function as Triton can read it, which takes the source, and annotations there for its types."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    source, file = ast.unparse(tree) + '\n', f'<{function.__module__}.{function.__name__} for Triton>'
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # where inspect looks
    exec(compile(source, file, 'exec'), function.__globals__)
    return function.__globals__.pop(function.__name__)


@functools.cache
def rule(weight: weights.Weight) -> dict[str, Any]:
    """The constants of :func:`select` for a rule: its weight as a function of Triton, and which parameters it takes."""
    unknown = set(weight.parameters) - {'iou_threshold', 'sigma'}
    assert not unknown, f'_decay passes no {unknown}'
    words = dict(where=_where, exp=_exp, cos=_cos, sqrt=_sqrt)
    # The compiler wants a module's numbers as constexpr, and the interpreter cannot calculate with those.
    number = tl.constexpr if isinstance(_where, triton.JITFunction) else float
    function: Any = _without_annotations(weights.rewritten(weight.function, words, number))
    function.__globals__['tl'] = tl  # the interpreter looks for it
    return dict(
        WEIGHT=triton.jit(function),
        THRESHOLD='iou_threshold' in weight.parameters,
        SIGMA='sigma' in weight.parameters,
        REMOVES=weight.removes,
    )


@triton.jit(do_not_specialize=['num_boxes', 'num_images'])  # no variants for 1 and multiples of 16
def prepare(
    boxes,
    scores,
    labels,
    images,
    live,
    group,
    bad,
    num_boxes,
    num_images,
    largest_area: tl.float64,
    min_score: tl.float64,
    offset: tl.float64,
    HAS_LABELS: tl.constexpr,  # noqa: N803
    HAS_IMAGES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Check the values and write the scores to start from.

    ``bad`` (1,) int32 becomes 1 where a value is not finite, an area overflows, a label is negative or an image index
    is out of range. ``group`` (N,) int64, only with labels: the label, or the largest int64 for candidates that are out
    from the start, so that they do not burden the segment of their class.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_boxes
    score = tl.load(scores + place, mask=inside, other=0)
    x1 = tl.load(boxes + place * 4, mask=inside, other=0)
    y1 = tl.load(boxes + place * 4 + 1, mask=inside, other=0)
    x2 = tl.load(boxes + place * 4 + 2, mask=inside, other=0)
    y2 = tl.load(boxes + place * 4 + 3, mask=inside, other=0)
    area = _area(x1, y1, x2, y2, tl.full((), offset, score.dtype))
    # An infinite or NaN coordinate makes the area infinite or NaN. Comparisons with NaN are false.
    fine = (tl.abs(area) <= tl.full((), largest_area, score.dtype)) & (tl.abs(score) < float('inf'))
    alive = score >= tl.full((), min_score, score.dtype)
    if HAS_LABELS:
        label = tl.load(labels + place, mask=inside, other=0)
        fine = fine & (label >= 0)
        tl.store(group + place, tl.where(alive, label, 0x7FFFFFFFFFFFFFFF), mask=inside)
    if HAS_IMAGES:
        image = tl.load(images + place, mask=inside, other=0)
        fine = fine & (image >= 0) & (image < num_images)
    # -0.0 is alive where min_score is 0, and ties with 0.0: from here on there is only the latter.
    tl.store(live + place, tl.where(alive, tl.where(score > 0, score, 0.0), -1.0), mask=inside)
    if tl.max((inside & (fine == 0)).to(tl.int32), axis=0) > 0:
        tl.store(bad, 1)


@triton.jit(do_not_specialize=['max_num'])
def select(
    boxes,
    live,
    raw,
    order,
    starts,
    segments,
    bad,
    picked,
    final,
    max_num,
    iou_threshold: tl.float64,
    sigma: tl.float64,
    min_score: tl.float64,
    offset: tl.float64,
    WEIGHT: tl.constexpr,  # noqa: N803
    THRESHOLD: tl.constexpr,  # noqa: N803
    SIGMA: tl.constexpr,  # noqa: N803
    REMOVES: tl.constexpr,  # noqa: N803
    STRONGEST: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    TABLE: tl.constexpr,  # noqa: N803
):
    """Select in every segment; write the score of each selected candidate to ``final[its input index]``.

    Args:
        boxes: (N, 4), by input index.
        live: (N,), in ``order``; changed.
        raw: (N,), in ``order``: the scores to start from; looked at where STRONGEST.
        order: (N,) int64 input indices, segment by segment, each by falling score and rising index. Where every
            segment fits into one chunk (TABLE = 1) any order within them will do.
        starts: (N + 1,) int64: where each segment begins; N behind the last.
        segments: (1,) int64: how many there are.
        bad: (1,) int32: nothing is done where it is not 0.
        picked: (N,) int32, scratch: the selections of a segment, in order, from its start on.
        final: (N,), filled with -1 by the caller.
        max_num: at most this many selections in a segment.
        WEIGHT, THRESHOLD, SIGMA, REMOVES: of a rule, by :func:`rule`.
        STRONGEST: the strongest decay alone counts, not the product of all.
        TABLE: a power of 2, at least the number of chunks in the longest segment that may come.
    """
    lane = tl.arange(0, CHUNK)
    slot = tl.arange(0, TABLE)
    real = live.dtype.element_ty
    threshold = tl.full((), iou_threshold, tl.float64)
    lowest = tl.full((), min_score, real)
    extra = tl.full((), offset, real)
    width64 = tl.full((), sigma, tl.float64)
    count = tl.load(segments).to(tl.int32)
    count = tl.where(tl.load(bad) == 0, count, 0)

    for segment in range(tl.program_id(0), count, tl.num_programs(0)):
        start = tl.load(starts + segment)
        length = (tl.load(starts + segment + 1) - start).to(tl.int32)
        limit = tl.minimum(length, max_num)
        index, x1, y1, x2, y2, area, s, s0 = _load(boxes, live, raw, order, start, length, lane, extra, STRONGEST)
        head, winner = _front(s, index)
        k = 0

        chunk = 0
        first = start + slot.to(tl.int64) * CHUNK  # the best of each chunk is its first, by the order
        waits = (slot > 0) & (slot * CHUNK < length)
        bound = tl.load(live + first, mask=waits, other=-1.0)
        bound_index = tl.load(order + first, mask=waits, other=_LAST).to(tl.int32)
        seen = tl.zeros((TABLE,), tl.int32)
        rival, rival_index, rival_chunk = _top(bound, bound_index, slot)

        while (k < limit) & (tl.maximum(head, rival) >= 0):
            # Equal scores: the rival may hold a lower index. Bounds are exact right after a chunk was loaded, so two
            # chunks cannot go on changing places without a selection.
            if (TABLE > 1) & ((rival > head) | ((rival == head) & (rival_index < winner))):
                place = chunk * CHUNK + lane
                tl.store(live + start + place, s, mask=place < length)
                here = slot == chunk
                bound = tl.where(here, head, bound)
                bound_index = tl.where(here, winner, bound_index)
                seen = tl.where(here, k, seen)
                chunk = rival_chunk
                # All of the block's stores to live and picked come before the loads below, whoever made them.
                tl.debug_barrier()
                place = chunk * CHUNK + lane
                index, x1, y1, x2, y2, area, s, s0 = _load(
                    boxes, live, raw, order, start, length, place, extra, STRONGEST
                )
                here = slot == chunk
                missed = tl.max(tl.where(here, seen, 0), axis=0)
                while missed < k:
                    by = tl.load(picked + start + missed)
                    s = _decay(
                        s, s0, x1, y1, x2, y2, area, boxes, by, threshold, width64, lowest, extra,
                        WEIGHT, THRESHOLD, SIGMA, REMOVES, STRONGEST,
                    )  # fmt: skip
                    missed += 1
                bound = tl.where(here, -1.0, bound)
                rival, rival_index, rival_chunk = _top(bound, bound_index, slot)
            else:
                tl.store(final + winner, head)
                tl.store(picked + start + k, winner)
                k += 1
                s = tl.where(index == winner, -1.0, s)
                s = _decay(
                    s, s0, x1, y1, x2, y2, area, boxes, winner, threshold, width64, lowest, extra,
                    WEIGHT, THRESHOLD, SIGMA, REMOVES, STRONGEST,
                )  # fmt: skip
            head, winner = _front(s, index)


@triton.jit
def _load(boxes, live, raw, order, start, length, place, extra, STRONGEST: tl.constexpr):  # noqa: N803
    """The candidates at ``place`` of a segment: input index, corners, area, current score and the one to start from."""
    inside = place < length
    s = tl.load(live + start + place, mask=inside, other=-1.0)
    index = tl.load(order + start + place, mask=inside, other=_LAST)
    x1 = tl.load(boxes + index * 4, mask=inside, other=0.0)
    y1 = tl.load(boxes + index * 4 + 1, mask=inside, other=0.0)
    x2 = tl.load(boxes + index * 4 + 2, mask=inside, other=0.0)
    y2 = tl.load(boxes + index * 4 + 3, mask=inside, other=0.0)
    s0 = tl.load(raw + start + place, mask=inside, other=-1.0) if STRONGEST else s
    return index.to(tl.int32), x1, y1, x2, y2, _area(x1, y1, x2, y2, extra), s, s0


@triton.jit
def _area(x1, y1, x2, y2, extra):
    return (x2 - x1 + extra) * (y2 - y1 + extra)


@triton.jit
def _front(s, index):
    """Highest score and the lowest index that has it; a score of -1 where all are out."""
    if s.dtype == tl.float64:
        best = tl.max(s, axis=0)
        lowest_index = tl.min(tl.where(s == best, index, _LAST), axis=0)
    else:
        # One reduction instead of two: the bits of a float32 >= 0 order as the number does, and -1 has the sign bit.
        bits = s.to(tl.int32, bitcast=True).to(tl.int64)
        packed = tl.max((bits << 32) | (index ^ _LAST).to(tl.int64), axis=0)
        best = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        lowest_index = (packed & 0x7FFFFFFF).to(tl.int32) ^ _LAST
    return best, lowest_index


@triton.jit
def _top(bound, bound_index, slot):
    """The best bound, its index, and the chunk that has it."""
    rival, rival_index = _front(bound, bound_index)
    rival_chunk = tl.min(tl.where((bound == rival) & (bound_index == rival_index), slot, _LAST), axis=0)
    return rival, rival_index, rival_chunk


@triton.jit
def _divide(a, b):
    """Correctly rounded, as IEEE 754 asks."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _decay(
    s,
    s0,
    x1,
    y1,
    x2,
    y2,
    area,
    boxes,
    by,
    threshold,
    sigma,
    lowest,
    extra,
    WEIGHT: tl.constexpr,  # noqa: N803
    THRESHOLD: tl.constexpr,  # noqa: N803
    SIGMA: tl.constexpr,  # noqa: N803
    REMOVES: tl.constexpr,  # noqa: N803
    STRONGEST: tl.constexpr,  # noqa: N803
):
    """The scores after the box with input index ``by`` was selected; -1 where that leaves too little."""
    corner = boxes + by.to(tl.int64) * 4
    u1 = tl.load(corner)
    v1 = tl.load(corner + 1)
    u2 = tl.load(corner + 2)
    v2 = tl.load(corner + 3)
    width = tl.minimum(x2, u2) - tl.maximum(x1, u1) + extra
    height = tl.minimum(y2, v2) - tl.maximum(y1, v1) + extra
    intersection = width * height
    union = area + _area(u1, v1, u2, v2, extra) - intersection
    overlaps = (width > 0) & (height > 0) & (union > 0)
    iou = tl.where(overlaps, _divide(intersection, tl.where(overlaps, union, 1.0)), 0.0)
    exact = iou.to(tl.float64)
    if THRESHOLD and SIGMA:
        weight = WEIGHT(exact, iou_threshold=threshold, sigma=sigma)
    elif THRESHOLD:
        weight = WEIGHT(exact, iou_threshold=threshold)
    elif SIGMA:
        weight = WEIGHT(exact, sigma=sigma)
    else:
        weight = WEIGHT(exact)
    if REMOVES:
        after = s
        stays = weight > 0
    elif STRONGEST:
        # Weights never rise with the IoU, and rounding keeps order: the least product is that of the largest IoU.
        after = tl.minimum(s, s0 * weight.to(s.dtype))
        stays = after >= lowest
    else:
        after = s * weight.to(s.dtype)
        stays = after >= lowest
    # What is out stays out: -1 times a weight of 0 would be back where min_score is 0.
    return tl.where((s >= 0) & stays, after, -1.0)
