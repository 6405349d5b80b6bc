"""soft_nms against its definition.

Three statements of the definition meet here: the CPU kernel (what users run), the PyTorch reference (the portable path
and the oracle for large inputs), and ``naive`` below, a scalar transcription of the definition that shares no code with
the other two (the oracle's own check, for small inputs). They have to agree bit for bit. mmcv's ops are a fourth,
foreign witness where its definitions agree with ours.

The last section breaks the operator on purpose: every comparison above is only worth something if it notices.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mmcv.ops
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmdet_softnms import soft_nms
from mmdet_softnms.ops import _arguments, _reference, weights

DEFAULTS: dict[str, Any] = {
    'method': 'gaussian',
    'iou_threshold': 0.3,
    'sigma': 0.5,
    'min_score': 1e-3,
    'max_num': -1,
    'offset': 0,
    'decay': 'product',
}
METHODS = ('linear', 'gaussian', 'hard')
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Result = tuple[Tensor, Tensor]

# The same examples in every run: a red CI run can be repeated, a green one is not luck.
repeatable = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


# --- the oracles ------------------------------------------------------------------------------------------------------


def working_dtype(boxes: Tensor, scores: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (boxes.dtype, scores.dtype) else torch.float32


def reference(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **parameters: Any) -> Result:
    """The PyTorch oracle, with the parameters as soft_nms validates and rounds them."""
    dtype = working_dtype(boxes, scores)
    params = _arguments.check_parameters(**{**DEFAULTS, **parameters}, dtype=dtype)
    labels = None if labels is None else labels.to(torch.int64)
    keep, kept_scores = _reference.select(boxes.to(dtype), scores.to(dtype), labels, params)
    return keep, kept_scores.to(scores.dtype)


def naive(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **parameters: Any) -> Result:
    """The definition, word by word, on numpy scalars: every class on its own, then the sequences merged."""
    p = {**DEFAULTS, **parameters}
    real: Any = np.float64 if working_dtype(boxes, scores) == torch.float64 else np.float32
    rows = boxes.to(torch.float64).numpy().astype(real)
    current: list[Any] = list(scores.to(torch.float64).numpy().astype(real))
    first, nearest = list(current), [real(0)] * len(current)
    classes = [0] * len(current) if labels is None else [int(label) for label in labels]
    threshold, sigma, min_score, offset = (real(p[name]) for name in ('iou_threshold', 'sigma', 'min_score', 'offset'))

    def area(x1: Any, y1: Any, x2: Any, y2: Any) -> Any:
        return (x2 - x1 + offset) * (y2 - y1 + offset)

    def iou(a: Any, b: Any) -> Any:
        width = min(a[2], b[2]) - max(a[0], b[0]) + offset
        height = min(a[3], b[3]) - max(a[1], b[1]) + offset
        if width <= 0 or height <= 0:
            return real(0)
        union = area(*a) + area(*b) - width * height
        return width * height / union if union > 0 else real(0)

    sequences = []
    for label in set(classes):
        remaining = [i for i in range(len(current)) if classes[i] == label and current[i] >= min_score]
        sequence = []
        while remaining:
            best = min(remaining, key=lambda i: (-current[i], i))
            sequence.append((-current[best], best))
            remaining.remove(best)
            for i in list(remaining):
                overlap = iou(rows[best], rows[i])
                before = current[i]
                if p['decay'] == 'strongest':
                    overlap = nearest[i] = max(nearest[i], overlap)
                    before = first[i]
                if p['method'] == 'gaussian':
                    current[i] = before * real(math.exp(-float(overlap) * float(overlap) / float(sigma)))
                elif overlap > threshold and p['method'] == 'linear':
                    current[i] = before * (real(1) - overlap)
                elif overlap > threshold:
                    remaining.remove(i)
                    continue
                if current[i] < min_score:
                    remaining.remove(i)
        sequences.append(sequence)
    merged = list(heapq.merge(*sequences))  # compares the heads only: highest score first, then lowest index
    if p['max_num'] >= 0:
        merged = merged[: p['max_num']]
    keep = torch.tensor([i for _, i in merged], dtype=torch.int64)
    return keep, torch.tensor([-float(s) for s, _ in merged], dtype=torch.float64).to(scores.dtype)


def assert_same(actual: Result, expected: Result, ulps: int = 0) -> None:
    """Same boxes in the same order, scores bit-equal (or within ``ulps`` units in the last place)."""
    for result in (actual, expected):
        assert result[0].dtype == torch.int64
        assert len(result[0]) == len(result[1])
    assert actual[0].tolist() == expected[0].tolist()
    assert actual[1].dtype == expected[1].dtype
    if ulps == 0:
        assert torch.equal(actual[1], expected[1])
    else:
        spacing = np.spacing(expected[1].numpy())
        assert ((actual[1] - expected[1]).abs().numpy() <= ulps * spacing).all()


# --- inputs -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    boxes: Tensor
    scores: Tensor
    labels: Tensor | None
    parameters: dict[str, Any]


LAYOUTS = ('clusters', 'grid', 'duplicates', 'degenerate', 'huge', 'sparse')


def make_boxes(layout: str, num: int, generator: torch.Generator) -> Tensor:
    """(num, 4) float64 boxes; all but 'clusters', 'huge' and 'sparse' full of exact ties."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).double()

    if layout == 'grid':
        corner, size = integers(12, num, 2), 1 + integers(6, num, 2)
        return torch.cat([corner, corner + size], dim=1)
    if layout == 'duplicates':
        few = make_boxes('clusters', max(1, num // 8), generator)
        return few[torch.randint(len(few), (num,), generator=generator)]
    if layout == 'degenerate':  # a third ordinary, a third of zero width or height, a third inverted
        boxes = make_boxes('grid', num, generator)
        kind = torch.randint(6, (num,), generator=generator)
        boxes[kind == 0, 2] = boxes[kind == 0, 0]
        boxes[kind == 1, 3] = boxes[kind == 1, 1]
        boxes[kind == 2] = boxes[kind == 2][:, [2, 1, 0, 3]]
        boxes[kind == 3] = boxes[kind == 3][:, [2, 3, 0, 1]]
        return boxes
    centres = 600 * uniform(max(1, num // 20), 2)
    if layout == 'sparse':
        centres = 600 * uniform(max(1, num), 2)
    at = torch.randint(len(centres), (num,), generator=generator)
    size = 8 + 60 * uniform(num, 2)
    centre = centres[at] + 20 * (uniform(num, 2) - 0.5)
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    # Areas up to 1.2e38, just under half of float32's largest number, beyond which no union is safe.
    return boxes * 1.6e17 if layout == 'huge' else boxes


def make_scores(kind: str, num: int, min_score: float, generator: torch.Generator) -> Tensor:
    """(num,) float64 scores in [0, 1]."""
    scores = torch.rand(num, generator=generator, dtype=torch.float64)
    if kind == 'low':
        return scores**8
    if kind == 'coarse':
        return (scores * 9).floor() / 8  # 0, 1/8, ..., 1: ties and certain scores
    if kind == 'equal':
        return torch.full((num,), 0.75, dtype=torch.float64)
    if kind == 'at min_score':  # exactly there, one step below and above, and anywhere
        kinds = torch.randint(4, (num,), generator=generator)
        single = torch.tensor(min_score, dtype=torch.float32)
        for value, choice in (
            (single, 0),
            (single.nextafter(torch.tensor(0.0)), 1),
            (single.nextafter(torch.tensor(1.0)), 2),
        ):
            scores[kinds == choice] = value.double()
    return scores


def spread_out(tensor: Tensor) -> Tensor:
    """The same values at every third place of a larger memory: nothing contiguous."""
    wide = torch.zeros(*tensor.shape, 3, dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide[..., 1]


parameters_strategy: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        'method': st.sampled_from(METHODS),
        'iou_threshold': st.sampled_from([0.3, 0.5, 1 / 3, 0.25, 0.7, 0.0, 1.0]),
        'sigma': st.sampled_from([0.5, 0.1, 2.0, 1e-3, 1e4]),
        'min_score': st.sampled_from([1e-3, 0.0, 0.05, 0.3, 1.0]),
        'max_num': st.sampled_from([-1, -1, -1, -1, 100, 7, 1, 0, 10**12]),
        'offset': st.sampled_from([0, 1, 0.5]),
        'decay': st.sampled_from(['product', 'product', 'strongest']),
    }
)


@st.composite
def cases(
    draw: st.DrawFn, sizes: st.SearchStrategy[int], dtypes: tuple[torch.dtype, ...] = FLOATS, exact_ties: bool = True
) -> Case:
    num, parameters = draw(sizes), draw(parameters_strategy)
    num_classes = draw(st.sampled_from([1, 2, 7, 80, 1203]))
    layout = draw(st.sampled_from(LAYOUTS if exact_ties else ('clusters', 'sparse')))
    kind = draw(st.sampled_from(('uniform', 'low', 'coarse', 'equal', 'at min_score') if exact_ties else ('uniform',)))
    label_type = draw(st.sampled_from((torch.int64, torch.int32, torch.uint8, 'far apart', None)))
    box_dtype, score_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    contiguous = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    if layout == 'huge' and box_dtype == torch.float16:
        layout = 'clusters'  # 65504 is the largest float16
    boxes = make_boxes(layout, num, generator).to(box_dtype)
    scores = make_scores(kind, num, parameters['min_score'], generator).to(score_dtype)
    labels = torch.randint(num_classes, (num,), generator=generator)
    if label_type == 'far apart':
        labels = labels * 10**12 + 5
    elif label_type is not None:
        labels = (labels % 256 if label_type == torch.uint8 else labels).to(label_type)
    if not contiguous:
        boxes, scores, labels = spread_out(boxes), spread_out(scores), spread_out(labels)
    return Case(boxes, scores, None if label_type is None else labels, parameters)


# Most examples small, where mistakes are easiest to read, some up to 2,000.
SIZES = st.one_of(st.integers(1, 120), st.integers(0, 12), st.integers(60, 600), st.integers(1200, 2000))


def run(operator: Callable[..., Result], case: Case) -> Result:
    return operator(case.boxes, case.scores, case.labels, **case.parameters)


def is_inexact(case: Case) -> bool:
    """torch's float64 exp and libm's may differ in the last bit; rounded to float32 they do not."""
    return case.parameters['method'] == 'gaussian' and working_dtype(case.boxes, case.scores) == torch.float64


def examples(
    count: int, seed: int, layout: str = 'clusters', kind: str = 'uniform', num: int = 60, classes: int = 3
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``count`` fixed float32 inputs, for the tests that need no search."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            make_boxes(layout, num, generator).float(),
            make_scores(kind, num, 1e-3, generator).float(),
            torch.randint(classes, (num,), generator=generator),
        )
        for _ in range(count)
    ]


# --- the properties ---------------------------------------------------------------------------------------------------


@settings(repeatable, max_examples=500)
@given(cases(SIZES, dtypes=(torch.float16, torch.bfloat16, torch.float32)))
def test_single_precision_equals_the_reference(case: Case) -> None:
    assert_same(run(soft_nms, case), run(reference, case))


@settings(repeatable, max_examples=200)
@given(cases(SIZES, dtypes=(torch.float64, torch.float32)).filter(lambda case: not is_inexact(case)))
def test_double_precision_equals_the_reference(case: Case) -> None:
    assert_same(run(soft_nms, case), run(reference, case))


@settings(repeatable, max_examples=120)
@given(cases(SIZES, dtypes=(torch.float64,), exact_ties=False))
def test_double_precision_gaussian_is_within_ulps_of_the_reference(case: Case) -> None:
    """One ulp a decay at most; without exact ties and scores at the limit, the selections are the same all the same."""
    case.parameters['method'] = 'gaussian'
    assert_same(run(soft_nms, case), run(reference, case), ulps=16)


@settings(repeatable, max_examples=600)
@given(cases(st.integers(0, 60)))
def test_equals_the_naive_definition(case: Case) -> None:
    """In every type, float64 gaussian included: both take exp from libm."""
    assert_same(run(soft_nms, case), run(naive, case))


@settings(repeatable, max_examples=200)
@given(cases(st.integers(0, 40)).filter(lambda case: not is_inexact(case)))
def test_reference_equals_the_naive_definition(case: Case) -> None:
    assert_same(run(reference, case), run(naive, case))


@settings(repeatable, max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), min_size=4, max_size=4),  # corners, ordered or not
            st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]),
            st.integers(0, 1),
        ),
        max_size=8,
    ),
    parameters_strategy,
)
def test_tiny_integer_boxes_equal_the_naive_definition(
    rows: list[tuple[list[int], float, int]], parameters: dict[str, Any]
) -> None:
    """Nearly everything ties here, and a failure shrinks to something a person can draw."""
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    labels = torch.tensor([row[2] for row in rows], dtype=torch.int64)
    case = Case(boxes, scores, labels, parameters)
    assert_same(run(soft_nms, case), run(naive, case))
    assert_same(run(reference, case), run(naive, case))


@settings(repeatable, max_examples=100)
@given(cases(SIZES))
def test_result_keeps_its_promises(case: Case) -> None:
    tensors = [tensor for tensor in case[:3] if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    keep, kept_scores = run(soft_nms, case)

    assert keep.dtype == torch.int64 and kept_scores.dtype == case.scores.dtype
    assert keep.device == kept_scores.device == case.scores.device
    assert keep.dim() == kept_scores.dim() == 1 and len(keep) == len(kept_scores)
    assert not kept_scores.requires_grad
    assert len(keep.unique()) == len(keep)
    assert ((keep >= 0) & (keep < len(case.scores))).all()
    assert kept_scores.isfinite().all()
    assert (kept_scores[1:] <= kept_scores[:-1]).all()
    assert (kept_scores <= case.scores[keep]).all()
    assert (kept_scores >= torch.tensor(case.parameters['min_score']).to(case.scores.dtype)).all()
    assert len(keep) <= case.parameters['max_num'] or case.parameters['max_num'] < 0
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy), 'the input was modified'


@settings(repeatable, max_examples=60)
@given(cases(st.integers(0, 300)), st.integers(0, 40))
def test_max_num_takes_the_first_of_the_full_sequence(case: Case, limit: int) -> None:
    keep, kept_scores = soft_nms(case.boxes, case.scores, case.labels, **{**case.parameters, 'max_num': -1})
    first = soft_nms(case.boxes, case.scores, case.labels, **{**case.parameters, 'max_num': limit})
    assert_same(first, (keep[:limit], kept_scores[:limit]))


@settings(repeatable, max_examples=60)
@given(cases(st.integers(0, 300)), st.randoms(use_true_random=False))
def test_classes_are_independent(case: Case, random: Any) -> None:
    parameters = {**case.parameters, 'max_num': -1}
    labels = torch.zeros(len(case.scores), dtype=torch.int64) if case.labels is None else case.labels.long()
    keep, kept_scores = soft_nms(case.boxes, case.scores, labels, **parameters)

    # Other names for the classes, other distances between the names: the same result.
    names = labels.unique().tolist()
    renamed = torch.zeros_like(labels)
    for name, other in zip(names, random.sample(range(10**6), len(names)), strict=True):
        renamed[labels == name] = other
    assert_same(soft_nms(case.boxes, case.scores, renamed, **parameters), (keep, kept_scores))

    # A class on its own: what it contributes to the whole.
    for name in names[:5]:
        members = (labels == name).nonzero()[:, 0]
        alone, alone_scores = soft_nms(case.boxes[members], case.scores[members], **parameters)
        mine = labels[keep] == name
        assert_same((members[alone], alone_scores), (keep[mine], kept_scores[mine]))


def test_classes_merged_into_one_decay_each_other() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    scores = torch.tensor([0.9, 0.8])
    apart = soft_nms(boxes, scores, torch.tensor([0, 1]))
    assert_same(apart, (torch.tensor([0, 1]), scores))
    together = soft_nms(boxes, scores)
    assert_same(together, soft_nms(boxes, scores, torch.tensor([4, 4])))
    assert_same(together, (torch.tensor([0, 1]), torch.tensor([0.9, 0.8 * math.exp(-1 / 0.5)])))


# --- the edges of the definition ----------------------------------------------------------------------------------


@settings(repeatable, max_examples=200)
@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([0, 1]), st.sampled_from(FLOATS))
def test_iou_exactly_at_the_threshold_does_not_decay(a: int, b: int, offset: int, dtype: torch.dtype) -> None:
    """A box of width min(a, b) inside one of width max(a, b): their IoU is min / max, rounded once."""
    inner, outer = min(a, b), max(a, b)
    boxes = torch.tensor([[0, 0, outer - offset, 1 - offset], [0, 0, inner - offset, 1 - offset]], dtype=dtype)
    scores = torch.tensor([1.0, 0.5], dtype=dtype)
    working = working_dtype(boxes, scores)
    at = torch.tensor(inner / outer, dtype=working)
    below = at.nextafter(at.new_tensor(0.0)).item()
    decayed = (scores.to(working)[1] * (1 - at)).to(dtype)
    for operator in (soft_nms, reference, naive):
        linear: dict[str, Any] = {'method': 'linear', 'min_score': 0, 'offset': offset}
        hard: dict[str, Any] = {**linear, 'method': 'hard'}
        assert operator(boxes, scores, iou_threshold=inner / outer, **linear)[1].tolist() == scores.tolist()
        assert operator(boxes, scores, iou_threshold=below, **linear)[1].tolist() == [1.0, decayed.item()]
        assert operator(boxes, scores, iou_threshold=inner / outer, **hard)[0].tolist() == [0, 1]
        assert operator(boxes, scores, iou_threshold=below, **hard)[0].tolist() == [0]


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
@pytest.mark.parametrize('dtype', FLOATS)
def test_score_exactly_at_min_score_stays(operator: Callable[..., Result], dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6]], dtype=dtype)
    for min_score in (0.5, 0.001, 1.0, 0.0):
        limit = torch.tensor(min_score, dtype=dtype)
        scores = torch.stack([limit, limit.nextafter(limit.new_tensor(-1))]) if dtype.itemsize > 2 else limit[None]
        keep, _ = operator(boxes[: len(scores)], scores, min_score=limit.item())
        assert keep.tolist() == [0]


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
def test_first_pick_below_min_score_is_dropped(operator: Callable[..., Result]) -> None:
    boxes, scores = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0.5])
    assert len(operator(boxes, scores, min_score=0.6)[0]) == 0


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
def test_hard_removes_whatever_min_score_is(operator: Callable[..., Result]) -> None:
    boxes, scores = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4]]), torch.tensor([1.0, 1.0])
    assert operator(boxes, scores, method='hard', min_score=0)[0].tolist() == [0]
    # Soft methods keep it with what is left, zero included.
    keep, kept_scores = operator(boxes, scores, method='linear', min_score=0)
    assert keep.tolist() == [0, 1] and kept_scores.tolist() == [1, 0]


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
@pytest.mark.parametrize('method', METHODS)
def test_ties_go_to_the_lowest_index(operator: Callable[..., Result], method: str) -> None:
    boxes = torch.tensor([[float(10 * i), 0, 10 * i + 5, 5] for i in range(50)])
    assert operator(boxes, torch.full((50,), 0.5), method=method)[0].tolist() == list(range(50))
    labels = torch.arange(50).flip(0) % 7
    assert operator(boxes, torch.full((50,), 0.5), labels, method=method)[0].tolist() == list(range(50))


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
def test_score_that_decays_into_a_tie_goes_by_index(operator: Callable[..., Result]) -> None:
    """0.8 * (1 - 0.5) is exactly the 0.4 of another box: the lower index is next, whichever was decayed."""
    half = [[0.0, 0, 2, 1], [0, 0, 1, 1], [50, 50, 51, 51]]
    for order in ([0, 1, 2], [0, 2, 1], [2, 1, 0]):
        boxes = torch.tensor(half)[order]
        scores = torch.tensor([1.0, 0.8, 0.4])[order]
        keep, kept_scores = operator(boxes, scores, method='linear')
        first = order.index(0)
        assert keep.tolist() == [first, *(i for i in range(3) if i != first)]
        assert kept_scores.tolist() == torch.tensor([1, 0.4, 0.4]).tolist()


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
@pytest.mark.parametrize('method', METHODS)
def test_boxes_without_area_overlap_nothing(operator: Callable[..., Result], method: str) -> None:
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [10, 10, 0, 0], [8, 2, 2, 8]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    assert_same(operator(boxes, scores, method=method, iou_threshold=0), (torch.arange(5), scores))


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
@pytest.mark.parametrize('method', METHODS)
def test_areas_that_underflow_to_zero_overlap_nothing(operator: Callable[..., Result], method: str) -> None:
    """1e-30 px wide and high: the sides are positive, but areas, intersection and union are 0 in float32."""
    boxes, scores = torch.tensor([[0, 0, 1e-30, 1e-30], [0, 0, 1e-30, 1e-30]]), torch.tensor([0.9, 0.8])
    assert_same(operator(boxes, scores, method=method, iou_threshold=0), (torch.arange(2), scores))
    assert_same(
        operator(boxes.double(), scores, method='hard', iou_threshold=0), (torch.tensor([0]), torch.tensor([0.9]))
    )


def test_offset_gives_a_point_an_area() -> None:
    boxes, scores = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5]]), torch.tensor([0.9, 0.8])
    assert soft_nms(boxes, scores, method='hard', offset=1)[0].tolist() == [0]
    assert soft_nms(boxes, scores, method='hard', offset=0)[0].tolist() == [0, 1]


@pytest.mark.parametrize('operator', [soft_nms, reference, naive])
def test_largest_safe_area(operator: Callable[..., Result]) -> None:
    """The union of two boxes whose areas add up to float32's largest number is still a number."""
    largest = torch.finfo(torch.float32).max / 2
    boxes = torch.tensor([[0, 0, largest, 1], [0, 0, largest, 1], [-largest / 2, 0, largest / 2, 1]])
    keep, kept_scores = operator(boxes, torch.tensor([0.9, 0.8, 0.7]), method='linear', min_score=0)
    assert keep.tolist() == [0, 2, 1]
    third = np.float32(0.7) * (np.float32(1) - np.float32(1 / 3))
    assert kept_scores.tolist() == torch.tensor([0.9, third, 0]).tolist()


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('labels', [None, torch.zeros(0, dtype=torch.int64)])
@pytest.mark.parametrize('dtype', FLOATS)
def test_empty_input(device: torch.device, method: Any, labels: Tensor | None, dtype: torch.dtype) -> None:
    labels = None if labels is None else labels.to(device)
    keep, kept_scores = soft_nms(
        torch.zeros(0, 4, dtype=dtype, device=device),
        torch.zeros(0, dtype=dtype, device=device),
        labels,
        method=method,
    )
    assert keep.shape == kept_scores.shape == (0,)
    assert keep.dtype == torch.int64 and kept_scores.dtype == dtype
    assert keep.device.type == kept_scores.device.type == device.type


def test_weights_multiply_in_selection_order_rounded_each_time() -> None:
    """0.9 decayed by two boxes: the product is rounded after each weight, the weight once from float64."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [7, 0, 17, 10], [3, 0, 14, 10]])
    scores = torch.tensor([1.0, 0.95, 0.9])
    expected = np.float32(0.9)
    for inter, union in ((70, 140), (70, 140)):
        iou = np.float32(inter) / np.float32(union)
        expected = expected * np.float32(math.exp(-(float(iou) ** 2) / 0.5))
    keep, kept_scores = soft_nms(boxes, scores)
    assert keep.tolist() == [0, 1, 2]
    assert kept_scores[2].item() == expected


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dtype', FLOATS)
def test_every_device_equals_the_reference_on_the_cpu(device: torch.device, method: Any, dtype: torch.dtype) -> None:
    ulps = 16 if dtype == torch.float64 and method == 'gaussian' else 0
    for boxes, scores, labels in examples(3, seed=7, num=300):
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        for max_num in (-1, 20):
            keep, kept_scores = soft_nms(
                boxes.to(device), scores.to(device), labels.to(device), method=method, max_num=max_num
            )
            assert keep.device.type == kept_scores.device.type == device.type
            assert_same(
                (keep.cpu(), kept_scores.cpu()),
                reference(boxes, scores, labels, method=method, max_num=max_num),
                ulps=ulps,
            )


# --- against mmcv -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('method', ['linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('layout', ['clusters', 'sparse'])
def test_agrees_with_mmcv_soft_nms(method: Any, offset: int, layout: str) -> None:
    """One class, no IoU exactly at the threshold (mmcv decays there), a first pick above min_score (mmcv never drops
    it). mmcv takes the gaussian weight in float32, so scores agree closely rather than exactly."""
    for boxes, scores, _ in examples(5, seed=11, layout=layout, num=400):
        keep, kept_scores = soft_nms(boxes, scores, method=method, offset=offset)
        dets, expected = mmcv.ops.soft_nms(
            boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=1e-3, method=method, offset=offset
        )
        assert keep.tolist() == expected.tolist()
        torch.testing.assert_close(kept_scores, dets[:, 4], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('iou_threshold', [0.3, 0.5, 0.7])
def test_hard_agrees_with_mmcv_nms(iou_threshold: float, offset: int) -> None:
    for boxes, scores, _ in examples(5, seed=12, num=400):
        keep, kept_scores = soft_nms(
            boxes, scores, method='hard', iou_threshold=iou_threshold, min_score=0, offset=offset
        )
        dets, expected = mmcv.ops.nms(boxes, scores, iou_threshold=iou_threshold, offset=offset)
        assert keep.tolist() == expected.tolist()
        assert torch.equal(kept_scores, dets[:, 4])


@pytest.mark.parametrize('method', ['linear', 'gaussian'])
def test_agrees_with_mmcv_batched_nms_where_its_class_offset_is_exact(method: Any) -> None:
    """Boxes on a grid of 1/16 px and few classes: adding label * (max + 1) rounds nothing away, so mmcv's classes are
    as separate as ours. (A threshold that no fraction of such small boxes can hit.)"""
    for boxes, scores, labels in examples(5, seed=13, num=400, classes=8):
        boxes = ((boxes + 32) * 16).round() / 16
        keep, kept_scores = soft_nms(boxes, scores, labels, method=method, iou_threshold=0.30001)
        dets, expected = mmcv.ops.batched_nms(
            boxes, scores, labels, {'type': 'soft_nms', 'method': method, 'iou_threshold': 0.30001}
        )
        assert keep.tolist() == expected.tolist()
        torch.testing.assert_close(kept_scores, dets[:, 4], rtol=1e-5, atol=1e-8)


# --- negative controls ------------------------------------------------------------------------------------------------


def decays_at_the_threshold(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    """>= instead of >."""
    threshold = torch.tensor(p.get('iou_threshold', 0.3)).nextafter(torch.tensor(0.0)).item()
    return soft_nms(boxes, scores, labels, **{**p, 'iou_threshold': threshold})


def doubles_sigma(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    """TensorFlow's and OpenVINO's weight."""
    return soft_nms(boxes, scores, labels, **{**p, 'sigma': 2 * p.get('sigma', 0.5)})


def ignores_classes(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    return soft_nms(boxes, scores, None, **p)


def shifts_classes_apart(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    """mmcv's way: one class after all, with label * (largest coordinate + 1) added to the boxes."""
    assert labels is not None
    return soft_nms(boxes + (labels * (boxes.max() + 1))[:, None].to(boxes), scores, None, **p)


def rounds_the_weight_early(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    """exp in float32, as an eager kernel would do it."""

    rule = dataclasses.replace(
        weights.get('gaussian'), function=lambda iou, sigma: torch.exp(-(iou**2 / sigma).float())
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights.WEIGHTS, 'gaussian', rule)
        return reference(boxes, scores, labels, **p)


def multiplies_the_weights_first(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    """score * (w1 * w2) instead of (score * w1) * w2: the same number, other bits."""
    keep, once = soft_nms(boxes, torch.ones_like(scores), labels, **{**p, 'min_score': 0})
    # Only meaningful where the order of selection does not depend on the scores: the scores of the test are descending.
    return keep, scores[keep] * once


def breaks_ties_by_the_last_index(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    keep, kept_scores = soft_nms(boxes.flip(0), scores.flip(0), None if labels is None else labels.flip(0), **p)
    return len(scores) - 1 - keep, kept_scores


def forgets_min_score(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    return soft_nms(boxes, scores, labels, **{**p, 'min_score': 0})


def adds_one_pixel(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    return soft_nms(boxes, scores, labels, **{**p, 'offset': 1})


def drops_only_at_the_end(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    """Boxes below min_score go on decaying others in hard mode: removed by one that is not there."""
    keep, kept_scores = soft_nms(boxes, scores, labels, **{**p, 'max_num': -1, 'min_score': 0})
    stays = kept_scores > p.get('min_score', 1e-3)  # and > instead of >=
    return keep[stays], kept_scores[stays]


def picks_once_without_updating(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, **p: Any) -> Result:
    """Lazy selection gone wrong: the order of the undecayed scores."""
    keep, kept_scores = soft_nms(boxes, scores, labels, **p)
    order = scores[keep].sort(descending=True, stable=True).indices
    return keep[order], kept_scores[order]


@pytest.mark.parametrize(
    ('wrong', 'inputs', 'parameters'),
    [
        (decays_at_the_threshold, {'layout': 'grid'}, {'method': 'linear', 'iou_threshold': 0.5}),
        (decays_at_the_threshold, {'layout': 'grid'}, {'method': 'hard', 'iou_threshold': 1 / 3}),
        (doubles_sigma, {}, {}),
        (ignores_classes, {}, {}),
        (shifts_classes_apart, {'classes': 80, 'num': 400}, {}),
        (rounds_the_weight_early, {'num': 400}, {}),
        (multiplies_the_weights_first, {'layout': 'duplicates', 'kind': 'equal'}, {}),
        (breaks_ties_by_the_last_index, {'kind': 'coarse'}, {}),
        (breaks_ties_by_the_last_index, {'layout': 'duplicates', 'kind': 'equal'}, {'method': 'hard'}),
        (forgets_min_score, {}, {'min_score': 0.05}),
        (adds_one_pixel, {}, {'method': 'linear'}),
        (drops_only_at_the_end, {'kind': 'at min_score'}, {}),
        (picks_once_without_updating, {}, {}),
    ],
)
def test_comparison_notices(wrong: Callable[..., Result], inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
    """A deliberately wrong operator fails assert_same, on the kind of input the properties above use."""
    if wrong is multiplies_the_weights_first:
        # Equal scores, so that the selections do not move; 0.7 and its products have rounding to lose.
        batches = [(b, torch.full_like(s, 0.7), c) for b, s, c in examples(20, seed=3, **inputs)]
    else:
        batches = examples(20, seed=3, **inputs)
    failures = 0
    for boxes, scores, labels in batches:
        expected = reference(boxes, scores, labels, **parameters)
        assert_same(soft_nms(boxes, scores, labels, **parameters), expected)
        try:
            assert_same(wrong(boxes, scores, labels, **parameters), expected)
        except AssertionError:
            failures += 1
    assert failures > 0, f'{wrong.__name__} went unnoticed'
