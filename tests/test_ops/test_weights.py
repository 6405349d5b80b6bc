"""A rule is one function: a rule added here is right in every backend, and what cannot be a rule is refused."""

import importlib.util
import inspect
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

from mmdet_softnms import batched_soft_nms, padded_soft_nms, reference, soft_nms
from mmdet_softnms.export import rule_to_onnx
from mmdet_softnms.ops import _cpu, weights
from mmdet_softnms.ops._derivative import with_derivative
from mmdet_softnms.ops.weights import cos, exp, sqrt, where
from mmdet_softnms.reevaluation.report.table import to_table
from mmdet_softnms.reevaluation.result import Session
from mmdet_softnms.reevaluation.scoring.settings import sweep_settings
from mmdet_softnms.rules import SoftNMS, describe
from tests.drawn import CFG, drawn_reevaluation, drawn_test_set
from tests.test_ops import cosine, triton_worker


@pytest.fixture(scope='module', autouse=True)
def _with_cosine() -> Iterator[None]:
    """Registered once: its kernels belong to what is registered, and take ten seconds to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, 'WEIGHTS', dict(weights.WEIGHTS))
        cosine.add()
        yield


def scene(num: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num)
    corners = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 60
    sides = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 40 + 10
    scores = torch.rand(num, generator=generator, dtype=torch.float64) * 0.9 + 0.1
    labels = torch.randint(2, (num,), generator=generator)
    return torch.cat([corners, corners + sides], 1).to(dtype), scores.to(dtype), labels


def by_hand(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> tuple[list[int], list[float]]:
    """The definition in plain Python, with the cosine written once more, by numpy."""
    boxes_, current, label = boxes.double().numpy(), scores.double().numpy().copy(), labels.numpy()
    left, keep, kept = set(range(len(current))), [], []
    while left:
        best = max(left, key=lambda index: (current[index], -index))
        left.remove(best)
        if current[best] < 1e-3:
            break
        keep.append(best)
        kept.append(float(current[best]))
        for other in left:
            low, high = np.maximum(boxes_[best, :2], boxes_[other, :2]), np.minimum(boxes_[best, 2:], boxes_[other, 2:])
            inside = np.prod(np.clip(high - low, 0, None))
            areas = [np.prod(boxes_[index, 2:] - boxes_[index, :2]) for index in (best, other)]
            iou = inside / (sum(areas) - inside)
            if label[best] == label[other] and iou > 0.3:
                current[other] *= (1 + np.cos(np.pi * iou)) / 2
    return keep, kept


def test_a_new_rule_is_right_in_numba_the_reference_and_the_operator() -> None:
    for num in (1, 7, 60, 150):
        inputs = scene(num)
        keep, kept = reference(*inputs, method='cosine')
        expected_keep, expected = by_hand(*inputs)
        assert keep.tolist() == expected_keep
        np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-7)
        fast = [soft_nms(*inputs, method='cosine'), batched_soft_nms(*([x] for x in inputs), method='cosine')[0]]
        padded = padded_soft_nms(*inputs, method='cosine')
        for result in (*fast, [one[: int(padded[2])] for one in padded[:2]]):
            assert torch.equal(result[0], keep) and torch.equal(result[1], kept)


def test_a_new_rule_has_gradients() -> None:
    boxes, scores, labels = scene(20, torch.float64)

    def kept(boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return soft_nms(boxes, scores, labels, method='cosine')[1]

    assert torch.autograd.gradcheck(kept, (boxes.requires_grad_(), scores.requires_grad_()))


def every_operation(iou: Any, iou_threshold: Any, sigma: Any) -> Any:
    curve = 2 / (1 + sqrt(iou * 0.5 + 0.5) ** 2 / sigma - iou / 8 + (0.25 - iou) * iou)
    return where((iou >= iou_threshold) & (curve < 3) | (iou <= -1), -curve + 3 + cos(iou), exp(-iou) + 0)


@pytest.mark.parametrize('function', [weights.linear, weights.gaussian, cosine.cosine, every_operation])
def test_derivatives_are_autograds(function: Any) -> None:
    weight = weights.Weight('some', function, tuple(inspect.signature(function).parameters)[1:], removes=False)
    values = [weights.PARAMETERS[name].default for name in weight.parameters]
    iou = torch.linspace(0.001, 0.999, 333, dtype=torch.float64, requires_grad=True)
    expected = function(iou, *values)
    value, slope = with_derivative(weight, iou.detach(), values)
    assert torch.equal(value, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), iou)[0])


def test_a_new_rule_is_exported() -> None:
    rule = SoftNMS('cosine')
    session = onnxruntime.InferenceSession(rule_to_onnx(rule).SerializeToString(), providers=['CPUExecutionProvider'])
    boxes, scores, labels = scene(60)
    found = session.run(None, dict(boxes=boxes.numpy(), scores=scores.numpy(), labels=labels.numpy()))
    keep, kept = rule(boxes, scores, labels, -1)
    assert found[0].tolist() == keep.tolist()
    np.testing.assert_allclose(found[1], kept.numpy(), rtol=0, atol=1e-6)


def test_a_new_rule_is_right_in_triton(tmp_path: Path) -> None:
    """Under the interpreter, and down to machine code."""
    inputs = scene(25)
    with triton_worker.start(interpret=True, cache=tmp_path) as worker:
        triton_worker.call(worker, cosine.__name__, 'add')
        keep, kept, count = triton_worker.call(
            worker, 'mmdet_softnms.ops._triton', 'soft_nms_triton', *inputs, method='cosine'
        )
    expected = reference(*inputs, method='cosine')
    assert torch.equal(keep[:count], expected[0]) and torch.equal(kept[:count], expected[1])
    with triton_worker.start(interpret=False, cache=tmp_path) as worker:
        triton_worker.call(worker, cosine.__name__, 'add')
        ptx = triton_worker.call(worker, 'tests.test_ops.triton_worker', 'compile_for', 80, 'fp32', 'cosine', 1, False)
    assert 'cosine' in ptx or 'f64' in ptx


def test_a_new_rule_is_described_by_its_parameters() -> None:
    assert SoftNMS('cosine').params == dict(method='cosine', iou_threshold=0.3, min_score=1e-3, offset=0)
    assert describe(SoftNMS('cosine')) == 'SoftNMS cosine iou_threshold=0.3 min_score=0.001'


def test_a_new_rule_is_swept_and_reported() -> None:
    candidates, truth = drawn_test_set()
    specs = ['SoftNMS.method=cosine', 'SoftNMS.iou_threshold=0.3,0.6']
    result = drawn_reevaluation(Session(candidates, truth, []), sweep_settings(specs, CFG, 1e-3, 100, 1e-3))
    rows = [row for row in result.rows if row.params.get('method') == 'cosine']
    assert [row.params['iou_threshold'] for row in rows] == [0.3, 0.6]
    baseline = next(row for row in result.rows if row.setting.is_baseline)
    assert all(0 < row.metrics['AP'] != baseline.metrics['AP'] for row in rows)
    out = io.StringIO()
    Console(file=out, width=400).print(to_table(result))
    assert out.getvalue().count('cosine') == 2


def test_the_parameters_of_the_public_functions_are_those_of_the_table() -> None:
    for function in (soft_nms, reference, padded_soft_nms._init_fn):
        for name, parameter in weights.PARAMETERS.items():
            assert inspect.signature(function).parameters[name].default == parameter.default


def takes_more(iou: Any, power: Any) -> Any:
    return iou**power


def uses_torch(iou: Any) -> Any:
    return torch.exp(-iou)


def decays_the_rest(iou: Any, sigma: Any) -> Any:
    return exp(-1 - iou * sigma)


def rises(iou: Any, sigma: Any) -> Any:
    return exp(iou / sigma)


def removes_half(iou: Any) -> Any:
    return 1 - iou


def comes_back(iou: Any, iou_threshold: Any) -> Any:
    return where(iou > iou_threshold, iou, 1)


@pytest.mark.parametrize(
    ('function', 'removes', 'words'),
    [
        (takes_more, False, 'takes_more takes iou, power; a weight takes iou, then any of iou_threshold, sigma'),
        (uses_torch, False, 'uses_torch uses torch; a weight may use'),
        (decays_the_rest, False, 'gives 0.36.* at an IoU of 0 '),
        (rises, False, 'gives 1.01.* at an IoU of 0.005'),
        (removes_half, True, 'gives 0.995 at an IoU of 0.005'),
        (weights.linear, False, "there is a rule named 'linear' already"),
    ],
)
def test_what_cannot_be_a_rule_is_refused(function: Any, removes: bool, words: str) -> None:
    before = dict(weights.WEIGHTS)
    with pytest.raises(ValueError, match=words):
        weights.register(function, removes=removes)
    assert before == weights.WEIGHTS


KERNEL = """
from mmdet_softnms.ops._cpu import _weight_of

def make(weight):
    weigh = _weight_of(weight, None)
    def kernel(iou):
        return weigh(iou, 0.3, 0.5)
    return kernel
"""


def test_an_edited_weight_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's disk cache looks at the file of the kernel alone, whose contents and time do not change here.

    A kernel of one line stands for the rules' own, which go the same way and take ten seconds each.
    """
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'one_line_kernel.py').write_text(KERNEL)
    make = importlib.import_module('one_line_kernel').make

    def run() -> tuple[float, int]:
        """What the weight of ``sys.modules`` gives, and how many kernels were in the cache."""
        linear = sys.modules[weights.__name__].get('linear')  # type: ignore[attr-defined]
        kernel = _cpu.compile_variant({}, (linear,), make, lambda real: real(real))
        return kernel(0.5), sum(kernel.stats.cache_hits.values())

    assert run() == (0.5, 0)
    assert run() == (0.5, 2)
    text = Path(weights.__file__).read_text()
    edited = text.replace('where(iou > iou_threshold, 1 - iou, 1)', 'where(iou > iou_threshold, (1 - iou) / 2, 1)')
    assert edited != text
    (tmp_path / 'edited.py').write_text(edited)
    spec = importlib.util.spec_from_file_location(weights.__name__, tmp_path / 'edited.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, weights.__name__, module)
        spec.loader.exec_module(module)
        assert run() == (0.25, 0)
        assert run() == (0.25, 2)
    assert run() == (0.5, 2)


def test_the_strongest_decay_needs_a_weight_that_never_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, 'WEIGHTS', dict(weights.WEIGHTS))
    weights.register(comes_back)
    box = torch.tensor([[0.0, 0, 4, 4]])
    assert reference(box, torch.ones(1), method='comes_back')[0].tolist() == [0]
    with pytest.raises(ValueError, match="needs a weight that never rises with the IoU, and 'comes_back' does"):
        soft_nms(box, torch.ones(1), method='comes_back', decay='strongest')
