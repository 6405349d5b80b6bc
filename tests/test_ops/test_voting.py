"""Votes, support and the order by it against their definitions; the kernel, plain PyTorch, gradients, compilers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmdet_softnms.ops import _reference, _voting, quality, ranked_soft_nms, soft_nms, vote
from mmdet_softnms.ops._arguments import Parameters
from tests.test_ops.test_soft_nms import LAYOUTS, examples, make_boxes, make_scores, repeatable, spread_out

Image = tuple[Tensor, Tensor, Tensor]


# --- the definitions, on numpy scalars --------------------------------------------------------------------------------


def naive_ious(boxes: Tensor, labels: Tensor | None, i: int, offset: float) -> list[float]:
    """IoUs of box i with all boxes, 0 with those of other classes, rounded to the boxes' type."""
    rows = boxes.numpy()
    real: Any = rows.dtype.type
    gap = real(offset)
    found = []
    for j in range(len(rows)):
        a, b = rows[i], rows[j]
        width = min(a[2], b[2]) - max(a[0], b[0]) + gap
        height = min(a[3], b[3]) - max(a[1], b[1]) + gap
        areas = [(box[2] - box[0] + gap) * (box[3] - box[1] + gap) for box in (a, b)]
        union = areas[0] + areas[1] - width * height
        overlaps = width > 0 and height > 0 and union > 0 and (labels is None or labels[i] == labels[j])
        found.append(float(width * height / union) if overlaps else 0.0)
    return found


def naive_vote(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, keep: Tensor, tolerance: float, offset: float
) -> Tensor:
    voted = []
    for i in keep.tolist():
        total, sums = 0.0, [0.0] * 4
        for iou, score, box in zip(naive_ious(boxes, labels, i, offset), scores.tolist(), boxes.tolist(), strict=True):
            if iou > 0 and score > 0 and -((1 - iou) ** 2) / tolerance > -700:
                weight = score * math.exp(-((1 - iou) ** 2) / tolerance)
                total += weight
                sums = [old + weight * coordinate for old, coordinate in zip(sums, box, strict=True)]
        voted.append([one / total for one in sums] if total > 0 else boxes[i].tolist())
    return torch.tensor(voted, dtype=torch.float64).reshape(-1, 4).to(boxes.dtype)


def naive_quality(boxes: Tensor, scores: Tensor, labels: Tensor | None, power: float, prior: float) -> Tensor:
    found = []
    for i in range(len(boxes)):
        total = 0.0
        for iou, score in zip(naive_ious(boxes, labels, i, 0), scores.tolist(), strict=True):
            total += max(score, 0.0) * iou**power
        found.append(total / (total + prior))
    return torch.tensor(found, dtype=torch.float64).to(scores.dtype)


@st.composite
def images(draw: st.DrawFn, most: int = 24) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    num = draw(st.integers(0, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    boxes = make_boxes(draw(st.sampled_from(LAYOUTS)), num, generator).float()
    scores = make_scores(draw(st.sampled_from(('uniform', 'low', 'coarse', 'equal'))), num, 1e-3, generator).float()
    scores[torch.rand(num, generator=generator) < 0.1] *= -1
    labels = torch.randint(3, (num,), generator=generator) * draw(st.sampled_from([1, 10**12]))
    parameters = dict(tolerance=draw(st.sampled_from([0.025, 1e-4, 1e-8, 0.5, 1e4])))
    return boxes, scores, draw(st.sampled_from([labels, labels, None])), parameters


@settings(repeatable, max_examples=150)
@given(images(), st.sampled_from([0, 0, 1, 0.5]), st.booleans())
def test_votes_equal_the_definition(image: Any, offset: float, plain: bool) -> None:
    """Bit for bit; the kernel, and plain PyTorch."""
    boxes, scores, labels, parameters = image
    keep = torch.arange(len(scores) - 1, -1, -2)
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(_voting, '_has_kernel', lambda *tensors: False)
        voted = vote(boxes, scores, labels, keep, offset=offset, **parameters)
    assert torch.equal(voted, naive_vote(boxes, scores, labels, keep, offset=offset, **parameters))


@settings(repeatable, max_examples=100)
@given(images(), st.sampled_from([8, 1, 3, 2.5]), st.sampled_from([1, 0.1]), st.booleans())
def test_support_equals_the_definition(image: Any, power: float, prior: float, plain: bool) -> None:
    boxes, scores, labels, _ = image
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(_voting, '_has_kernel', lambda *tensors: False)
        found = quality(boxes, scores, labels, power=power, prior=prior)
    assert torch.equal(found, naive_quality(boxes, scores, labels, power, prior))
    assert bool(((found >= 0) & (found < 1)).all())


@settings(repeatable, max_examples=100)
@given(
    images(60),
    st.sampled_from([('linear', 'strongest'), ('gaussian', 'product'), ('hard', 'product')]),
    st.sampled_from([0.0, 1e-3, 0.3]),
    st.sampled_from([-1, 0, 3]),
)
def test_selection_by_support_equals_the_definition(
    image: Any, how: tuple[str, str], min_score: float, max_num: int
) -> None:
    method, decay = how
    boxes, scores, labels, _ = image
    support = quality(boxes, scores, labels, prior=0.5)
    arguments = dict(method=method, min_score=min_score, max_num=max_num, decay=decay)
    keep, kept = ranked_soft_nms(boxes, scores, labels, support, **arguments)  # type: ignore[arg-type]
    least, threshold = (float(np.float32(value)) for value in (min_score, 0.3))
    parameters = Parameters(method, threshold, 0.5, least, max_num, 0.0, decay)
    expected, expected_scores = _reference.select(boxes, scores, labels, parameters, support)
    assert keep.tolist() == expected.tolist() and torch.equal(kept, expected_scores)
    assert bool((kept[1:] <= kept[:-1]).all())


def test_selection_by_support_in_layers() -> None:
    """Few of many are wanted: the heap begins with some, and those outside may be ahead."""
    for boxes, scores, labels in examples(2, seed=3, num=3000, classes=2):
        support = quality(boxes, scores, labels)
        keep, kept = ranked_soft_nms(boxes, scores, labels, support, max_num=40)
        parameters = Parameters('gaussian', 0.3, 0.5, float(np.float32(1e-3)), 40, 0.0)
        expected, expected_scores = _reference.select(boxes, scores, labels, parameters, support)
        assert keep.tolist() == expected.tolist() and torch.equal(kept, expected_scores)


# --- neighbours by their left edge ------------------------------------------------------------------------------------


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('offset', [0, 1])
def test_large_classes_give_the_same(monkeypatch: pytest.MonkeyPatch, layout: str, offset: float) -> None:
    """Enough members for windows; among them ones that reach across all, so that windows begin early."""
    for boxes, scores, labels in examples(1, seed=5, layout=layout, num=700, classes=2):
        if layout != 'huge':  # areas would overflow
            boxes[::97, 2] = boxes[:, 2].max()
        keep = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:300]
        arguments = dict(tolerance=0.05, offset=offset)
        ours = vote(boxes, scores, labels, keep, **arguments), quality(boxes, scores, labels, offset=offset)
        with monkeypatch.context() as patch:
            patch.setattr(_voting, '_has_kernel', lambda *tensors: False)
            plain = vote(boxes, scores, labels, keep, **arguments), quality(boxes, scores, labels, offset=offset)
        assert all(map(torch.equal, ours, plain))


# --- types, layouts, gradients, compilers -----------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_and_layout(dtype: torch.dtype) -> None:
    for boxes, scores, labels in examples(1, seed=7):
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        keep = torch.arange(0, 60, 3)
        voted = vote(spread_out(boxes), spread_out(scores), spread_out(labels).int(), spread_out(keep))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = naive_vote(boxes.to(wide), scores.to(wide), labels, keep, 0.025, 0)
        assert voted.dtype == dtype and voted.shape == (20, 4)
        torch.testing.assert_close(voted, expected.to(dtype), rtol=1e-12 if dtype == torch.float64 else 0, atol=0)


def test_gradients_of_the_votes() -> None:
    boxes, scores, labels = (one.double() for one in examples(1, seed=9, num=14, classes=2)[0])
    labels, keep = labels.long(), soft_nms(boxes, scores, labels.long())[0][:5]
    inputs = (boxes / 50).requires_grad_(), scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda b, s: vote(b, s, labels, keep, tolerance=0.1), inputs)
    tangents = vote(*(one.detach() for one in inputs), labels, keep, tolerance=0.1)
    assert torch.allclose(vote(*inputs, labels, keep, tolerance=0.1), tangents, rtol=1e-12)
    with pytest.raises(NotImplementedError, match='no gradients; call it under torch.no_grad'):
        ranked_soft_nms(*inputs, labels, quality(*inputs, labels))


def test_votes_are_compiled_in_one_graph() -> None:
    boxes, scores, labels = examples(1, seed=11)[0]
    keep = torch.arange(9)
    compiled = torch.compile(vote, fullgraph=True, backend='eager')
    assert torch.equal(compiled(boxes, scores, labels, keep), vote(boxes, scores, labels, keep))
    with pytest.raises(Exception, match='a selection by support cannot be compiled'):
        torch.compile(ranked_soft_nms, fullgraph=True, backend='eager')(boxes, scores, labels, scores)


@pytest.mark.parametrize(
    ('function', 'arguments', 'words'),
    [
        (vote, dict(tolerance=0), 'tolerance must be finite and > 0, got 0'),
        (vote, dict(tolerance=float('nan')), 'tolerance must be finite and > 0, got nan'),
        (quality, dict(power=-1), 'power must be finite and > 0, got -1'),
        (quality, dict(prior=0.0), 'prior must be finite and > 0, got 0.0'),
    ],
)
def test_parameters_out_of_range_are_named(function: Any, arguments: dict[str, Any], words: str) -> None:
    boxes, scores, labels = examples(1, seed=13, num=3)[0]
    with pytest.raises(ValueError, match=words):
        function(boxes, scores, labels, *([torch.arange(3)] if function is vote else []), **arguments)


def test_bad_values_are_named() -> None:
    boxes, scores, labels = examples(1, seed=15, num=3)[0]
    scores[1] = float('nan')
    with pytest.raises(ValueError, match=r'scores\[1\] is nan'):
        vote(boxes, scores, labels, torch.arange(3))
