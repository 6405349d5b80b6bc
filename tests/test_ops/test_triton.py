"""The GPU path against the reference: on the CPU under Triton's interpreter (small inputs), on a GPU if there is one.

What the interpreter shows: the algorithm and its arithmetic, operation by operation. What it cannot show: the
compiler's work (looked at below in the compiled code, as far as that goes without a GPU), order among a block's
threads, speed.
"""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmdet_softnms import soft_nms
from mmdet_softnms.ops import _arguments, _dispatch, _eager, _reference, _triton, batched_soft_nms
from tests.test_ops import triton_worker
from tests.test_ops.test_soft_nms import (
    DEFAULTS,
    FLOATS,
    METHODS,
    Case,
    Result,
    assert_same,
    cases,
    examples,
    is_inexact,
    make_boxes,
    make_scores,
    reference,
    repeatable,
    working_dtype,
)

MODULE = 'mmdet_softnms.ops._triton'
Padded = tuple[Tensor, Tensor, Tensor]


class Runner(NamedTuple):
    """Calls functions of ``_triton`` where kernels can run."""

    name: str
    call: Callable[..., Any]

    @property
    def most(self) -> int:
        """Candidates that take no longer than a test should; the interpreter does about 500 selections a second."""
        return 28 if self.name == 'interpreter' else 2000


@pytest.fixture(scope='module')
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    with triton_worker.start(interpret=True, cache=tmp_path_factory.mktemp('triton')) as worker:
        yield worker


@pytest.fixture(scope='module')
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    with triton_worker.start(interpret=False, cache=tmp_path_factory.mktemp('triton')) as worker:
        yield worker


@pytest.fixture(scope='module', params=['interpreter', pytest.param('cuda', marks=pytest.mark.gpu)])
def runner(request: pytest.FixtureRequest) -> Runner:
    if request.param == 'interpreter':
        worker = request.getfixturevalue('interpreter')
        return Runner(
            request.param, lambda name, *args, **kwargs: triton_worker.call(worker, MODULE, name, *args, **kwargs)
        )

    def on_gpu(name: str, *args: Any, **kwargs: Any) -> Any:
        there = tree_map_only(Tensor, Tensor.cuda, (args, kwargs))
        return tree_map_only(Tensor, Tensor.cpu, getattr(_triton, name)(*there[0], **there[1]))

    return Runner(request.param, on_gpu)


def trim(padded: Padded) -> Result:
    """The result of one image; what is behind the count must be padding."""
    keep, scores, count = padded
    assert keep.dtype == count.dtype == torch.int64 and count.dim() == 0
    assert keep.shape == scores.shape
    assert (keep[count:] == -1).all() and (scores[count:] == 0).all()
    assert (keep[:count] >= 0).all()
    return keep[:count], scores[:count]


def run(
    runner: Runner,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    images: Tensor | None = None,
    num_images: int = 1,
    chunk: int = _triton.CHUNK,
    **parameters: Any,
) -> Padded:
    """``_triton.run`` with the conversions of ``soft_nms_triton``, and chunks of any size."""
    dtype = working_dtype(boxes, scores)
    params = _arguments.check_parameters(**{**DEFAULTS, **parameters}, dtype=dtype)
    labels = None if labels is None else labels.to(torch.int64)
    keep, kept_scores, count = runner.call(
        'run', boxes.to(dtype), scores.to(dtype), labels, images, num_images, params, chunk
    )
    size = len(scores) if params.max_num < 0 else min(params.max_num, len(scores))
    assert keep.shape[-1] == size, 'the size of the output depends on the number of candidates and max_num alone'
    return keep, kept_scores.to(scores.dtype), count


# --- the same as the reference ----------------------------------------------------------------------------------------


@settings(repeatable, max_examples=120)
@given(data=st.data(), chunk=st.sampled_from([4, 16, _triton.CHUNK]))
def test_equals_the_reference(runner: Runner, data: st.DataObject, chunk: int) -> None:
    """All methods, types, layouts of ties and parameters; chunks so small that small inputs have many."""
    case: Case = data.draw(cases(st.integers(0, runner.most)))
    if is_inexact(case):  # the float64 exp of numpy, torch and the GPU may differ in the last bit
        case.parameters['method'] = 'linear'
    assert_same(trim(run(runner, *case[:3], chunk=chunk, **case.parameters)), run_reference(case))


def run_reference(case: Case) -> Result:
    return reference(case.boxes, case.scores, case.labels, **case.parameters)


@settings(repeatable, max_examples=12)
@given(data=st.data(), chunk=st.sampled_from([8, _triton.CHUNK]))
def test_double_precision_gaussian_is_within_ulps_of_the_reference(
    runner: Runner, data: st.DataObject, chunk: int
) -> None:
    case: Case = data.draw(cases(st.integers(1, runner.most), dtypes=(torch.float64,), exact_ties=False))
    case.parameters['method'] = 'gaussian'
    assert_same(trim(run(runner, *case[:3], chunk=chunk, **case.parameters)), run_reference(case), ulps=16)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('layout', ['clusters', 'duplicates', 'grid'])
def test_long_segments_change_chunks_often(runner: Runner, method: str, layout: str) -> None:
    """One class, 9 chunks (more take the interpreter long); in a crowd scores fall fast, so that chunks take turns."""
    for boxes, scores, _ in examples(1, seed=21, layout=layout, num=36):
        boxes = boxes / 8 if layout == 'clusters' else boxes
        expected = reference(boxes, scores, method=method)
        assert_same(trim(run(runner, boxes, scores, method=method, chunk=4)), expected)
        first = expected[0][:9], expected[1][:9]
        assert_same(trim(run(runner, boxes, scores, method=method, chunk=4, max_num=9)), first)
        expected = reference(boxes, scores, method=method, decay='strongest')
        assert_same(trim(run(runner, boxes, scores, method=method, decay='strongest', chunk=4)), expected)


@pytest.mark.parametrize('dtype', FLOATS)
@pytest.mark.parametrize('method', METHODS)
def test_public_function_takes_every_type(runner: Runner, method: str, dtype: torch.dtype) -> None:
    for boxes, scores, labels in examples(1, seed=22, num=30):
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        padded = runner.call('soft_nms_triton', boxes, scores, labels.to(torch.int32), method=method, max_num=12)
        assert padded[1].dtype == dtype and padded[0].shape == (12,)
        ulps = 16 if dtype == torch.float64 and method == 'gaussian' else 0
        assert_same(trim(padded), reference(boxes, scores, labels, method=method, max_num=12), ulps=ulps)


def test_ties_between_chunks_go_to_the_lowest_index(runner: Runner) -> None:
    """Chunks of two: ``first`` halves ``upper``, which ties with ``rest`` of the other chunk; those two overlap, so
    whichever comes first halves the other."""
    first, upper, rest = [0.0, 0, 2, 1], [0.0, 0, 2, 2], [0.0, 1, 2, 2]
    # The other chunk waits, never loaded so far, and its 0.4 has the lower index.
    boxes, scores = torch.tensor([rest, first, upper]), torch.tensor([0.4, 1.0, 0.8])
    keep, kept_scores = trim(run(runner, boxes, scores, method='linear', chunk=2))
    assert keep.tolist() == [1, 0, 2] and kept_scores.tolist() == torch.tensor([1.0, 0.4, 0.2]).tolist()
    # The chunk of ``upper`` went back to wait, when a far box of 0.5 came; its bound must carry the lower index.
    boxes = torch.tensor([upper, first, rest, [50, 50, 51, 51]])
    keep, kept_scores = trim(run(runner, boxes, torch.tensor([0.8, 1.0, 0.4, 0.5]), method='linear', chunk=2))
    assert keep.tolist() == [1, 3, 0, 2] and kept_scores.tolist() == torch.tensor([1.0, 0.5, 0.4, 0.2]).tolist()


def test_negative_zero_scores_tie_with_zero(runner: Runner) -> None:
    boxes = torch.tensor([[float(9 * i), 0, 9 * i + 5, 5] for i in range(12)])
    scores = torch.tensor([-0.0, 0.0, 0.5] * 4)
    for chunk in (4, 16):
        assert_same(trim(run(runner, boxes, scores, min_score=0, chunk=chunk)), reference(boxes, scores, min_score=0))


@pytest.mark.parametrize('chunk', [4, 16])
def test_what_is_out_stays_out(runner: Runner, chunk: int) -> None:
    """min_score 0 and weights of exactly 0: a candidate that is done with must not come back as -1 x 0."""
    boxes, scores = torch.tensor([[0.0, 0, 4, 4]]).repeat(10, 1), torch.tensor([0.5, -1.0] * 5)
    for parameters in ({'method': 'linear'}, {'sigma': 1e-3}, {'method': 'hard'}):
        expected = reference(boxes, scores, min_score=0, **parameters)
        assert_same(trim(run(runner, boxes, scores, min_score=0, chunk=chunk, **parameters)), expected)


@pytest.mark.parametrize('max_num', [-1, 0, 1, 3, 10**12])
@pytest.mark.parametrize('labels', [None, torch.zeros(0, dtype=torch.int64)])
def test_empty_input(runner: Runner, labels: Tensor | None, max_num: int) -> None:
    keep, scores, count = runner.call('soft_nms_triton', torch.zeros(0, 4), torch.zeros(0), labels, max_num=max_num)
    assert keep.shape == scores.shape == (0,) and int(count) == 0
    images = torch.zeros(0, dtype=torch.int64)
    padded = runner.call(
        'soft_nms_triton', torch.zeros(0, 4), torch.zeros(0), labels, images, num_images=3, max_num=max_num
    )
    assert padded[0].shape == padded[1].shape == (3, 0) and padded[2].tolist() == [0, 0, 0]


def test_nothing_above_min_score(runner: Runner) -> None:
    for boxes, scores, labels in examples(1, seed=23, num=20):
        keep, kept_scores, count = run(runner, boxes, scores / 10, labels, min_score=0.5, chunk=4)
        assert (int(count), set(keep.tolist()), set(kept_scores.tolist())) == (0, {-1}, {0.0})


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('in_order', [True, False])
@pytest.mark.parametrize('max_num', [-1, 0, 7])
@pytest.mark.parametrize('chunk', [8, _triton.CHUNK])
def test_images_of_a_batch_are_as_if_alone(runner: Runner, chunk: int, max_num: int, in_order: bool) -> None:
    """Images of different sizes, one without candidates, the last one too; classes of the same names in each."""
    generator = torch.Generator().manual_seed(24)
    sizes = [12, 0, 25, 1, 9, 0]
    images = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))
    if not in_order:
        images = images[torch.randperm(len(images), generator=generator)]
    boxes = make_boxes('grid', len(images), generator).float()
    scores = make_scores('coarse', len(images), 0.0, generator).float()
    labels = torch.randint(3, (len(images),), generator=generator) * 10**12
    for names in (labels, None):
        keep, kept_scores, count = run(
            runner, boxes, scores, names, images, 6, method='linear', max_num=max_num, chunk=chunk
        )
        assert keep.shape[0] == kept_scores.shape[0] == 6 and count.shape == (6,)
        for i in range(6):
            mine = (images == i).nonzero()[:, 0]
            own = None if names is None else names[mine]
            alone, alone_scores = reference(boxes[mine], scores[mine], own, method='linear', max_num=max_num)
            assert_same(trim((keep[i], kept_scores[i], count[i])), (mine[alone], alone_scores))


@pytest.mark.parametrize('max_num', [-1, 0, 4])
def test_a_list_of_images(runner: Runner, max_num: int) -> None:
    images = [
        (b[:size], s[:size], c[:size]) for size, (b, s, c) in zip((9, 0, 14), examples(3, seed=29, num=20), strict=True)
    ]
    boxes, scores, labels = (list(tensors) for tensors in zip(*images, strict=True))
    results = runner.call('soft_nms_of_list', boxes, scores, labels, method='linear', max_num=max_num)
    for result, image in zip(results, images, strict=True):
        assert_same(result, reference(*image, method='linear', max_num=max_num))
    results = runner.call('soft_nms_of_list', boxes, scores, None, method='hard', max_num=max_num)
    for result, image in zip(results, images, strict=True):
        assert_same(result, reference(*image[:2], method='hard', max_num=max_num))
    scores[2][3] = float('nan')
    assert runner.call('soft_nms_of_list', boxes, scores, labels) is None


# --- values that are errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('boxes', 'score', 'label', 'image'),
    [
        ([0.0, 0, float('nan'), 4], 0.5, 0, 0),
        ([0.0, 0, float('inf'), 4], 0.5, 0, 0),
        ([0.0, float('-inf'), 4, float('inf')], 0.5, 0, 0),
        ([float('inf'), 0, float('inf'), 4], 0.5, 0, 0),
        ([-1e38, 0, 3e38, 4], 0.5, 0, 0),
        ([0.0, 0, 2e19, 2e19], 0.5, 0, 0),
        ([0.0, 0, 4, 4], float('nan'), 0, 0),
        ([0.0, 0, 4, 4], float('inf'), 0, 0),
        ([0.0, 0, 4, 4], float('-inf'), 0, 0),
        ([0.0, 0, 4, 4], 0.5, -1, 0),
        ([0.0, 0, 4, 4], 0.5, 0, -1),
        ([0.0, 0, 4, 4], 0.5, 0, 2),
    ],
)
def test_bad_values_are_counted_as_minus_one(
    runner: Runner, boxes: list[float], score: float, label: int, image: int
) -> None:
    for at in (0, 19):
        all_boxes, scores = torch.tensor([[0.0, 0, 4, 4]]).repeat(20, 1), torch.full((20,), 0.5)
        labels, images = torch.zeros(20, dtype=torch.int64), torch.zeros(20, dtype=torch.int64)
        all_boxes[at], scores[at], labels[at], images[at] = torch.tensor(boxes), score, label, image
        keep, kept_scores, count = run(runner, all_boxes, scores, labels, images, 2, chunk=4, max_num=5)
        assert keep.shape == (2, 5)
        assert (keep == -1).all() and (kept_scores == 0).all() and (count == -1).all()


def test_unsafe_is_what_the_reference_calls_unsafe(runner: Runner) -> None:
    largest = torch.finfo(torch.float32).max / 2
    safe = torch.tensor([[0, 0, largest, 1], [-largest / 2, 0, largest / 2, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert_same(trim(run(runner, safe, scores)), reference(safe, scores))
    over = torch.tensor([[0, 0, largest, 1.0000001]])
    assert int(run(runner, over, scores[:1])[2]) == -1
    assert int(run(runner, over.double(), scores[:1])[2]) == 1


def test_select_raises_as_the_other_paths(runner: Runner) -> None:
    params = _arguments.check_parameters(**DEFAULTS, dtype=torch.float32)
    boxes, scores = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([float('nan')])
    with pytest.raises(ValueError, match=r'scores must be finite, but scores\[0\] is nan'):
        runner.call('select', boxes, scores, None, params)
    scores = torch.tensor([0.5])
    assert_same(runner.call('select', boxes, scores, None, params), reference(boxes, scores))


@pytest.mark.parametrize(
    ('images', 'num_images', 'error', 'message'),
    [
        (torch.zeros(3, dtype=torch.int64), 1, ValueError, 'images must have shape'),
        (torch.zeros(2), 1, TypeError, 'images must be of an integer type'),
        (torch.zeros(2, dtype=torch.int64), -1, ValueError, 'num_images must be >= 0'),
    ],
)
def test_wrong_arguments_are_refused(images: Tensor, num_images: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _triton.soft_nms_triton(torch.zeros(2, 4), torch.zeros(2), None, images, num_images=num_images)
    with pytest.raises(ValueError, match='method must be one of'):
        _triton.soft_nms_triton(torch.zeros(2, 4), torch.zeros(2), method='soft')


# --- no waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('batch', [False, True])
def test_no_operator_that_waits_for_the_device(interpreter: ProcessPoolExecutor, batch: bool) -> None:
    (boxes, scores, labels) = examples(1, seed=25, num=20)[0]
    images = torch.arange(20) % 2 if batch else None
    params = _arguments.check_parameters(**DEFAULTS, dtype=torch.float32)
    arguments = (boxes, scores, labels, images, 2, params, 8)
    worker = 'tests.test_ops.triton_worker'
    assert triton_worker.call(interpreter, worker, 'count_syncs', *arguments)[1] == []
    # The control: a comparison on the host and a boolean mask are noticed.
    found = triton_worker.call(interpreter, worker, 'count_syncs', *arguments, and_wait=True)[1]
    assert found == ['_local_scalar_dense', 'index']


@pytest.mark.gpu
def test_cuda_is_never_waited_for() -> None:
    boxes, scores, labels = (tensor.cuda() for tensor in examples(1, seed=26, num=2000, classes=80)[0])
    images = torch.arange(2000, device='cuda') % 4
    for extra in ({}, {'images': images, 'num_images': 4, 'max_num': 100}):
        expected = _triton.soft_nms_triton(boxes, scores, labels, **extra)  # compiles
        torch.cuda.set_sync_debug_mode('error')
        try:
            actual = _triton.soft_nms_triton(boxes, scores, labels, **extra)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(('num', 'classes'), [(20_000, 80), (20_000, 1), (60_000, 1203)])
def test_cuda_equals_the_cpu_kernel_on_large_inputs(method: Any, num: int, classes: int) -> None:
    """The CPU kernel, itself checked against the reference, which would take minutes here."""
    for layout, kind in (('clusters', 'uniform'), ('grid', 'coarse')):
        for boxes, scores, labels in examples(1, seed=27, layout=layout, kind=kind, num=num, classes=classes):
            for max_num in (100, 2000):
                assert_same(
                    tuple(
                        result.cpu()
                        for result in soft_nms(
                            boxes.cuda(), scores.cuda(), labels.cuda(), method=method, max_num=max_num
                        )
                    ),
                    soft_nms(boxes, scores, labels, method=method, max_num=max_num),
                )


@pytest.mark.gpu
def test_cuda_gives_the_same_every_time() -> None:
    boxes, scores, labels = (tensor.cuda() for tensor in examples(1, seed=28, num=5000, classes=3)[0])
    first = _triton.soft_nms_triton(boxes, scores, labels)
    for _ in range(20):
        for one, other in zip(_triton.soft_nms_triton(boxes, scores, labels), first, strict=True):
            assert torch.equal(one, other)


# --- what the compiler makes of it ------------------------------------------------------------------------------------


BITS = {'fp32': 'f32', 'fp64': 'f64'}


def instructions(ptx: str, kind: str) -> set[str]:
    return set(re.findall(rf'\b{kind}\.[a-z0-9_.]*', ptx))


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('floating', ['fp32', 'fp64'])
@pytest.mark.parametrize(
    ('method', 'strongest'), [*((method, False) for method in METHODS), ('linear', True), ('gaussian', True)]
)
def test_compiles_without_fusion_and_with_exact_division(
    compiler: ProcessPoolExecutor, capability: int, floating: str, method: str, strongest: bool
) -> None:
    """Down to machine code, by Triton's own assembler; only a run on a GPU shows more."""
    worker = 'tests.test_ops.triton_worker'
    ptx = triton_worker.call(compiler, worker, 'compile_for', capability, floating, method, 64, False, strongest)
    divisions = {f'div.rn.{BITS[floating]}'} | ({'div.rn.f64'} if method == 'gaussian' else set())
    assert instructions(ptx, 'div') == divisions
    # float64's exp is libdevice's, which is written in multiply-adds; nothing else may have any.
    fused = {'fma.rn.f64'} if method == 'gaussian' else set()
    assert instructions(ptx, 'fma') == fused
    assert 'approx' not in ptx
    # Spelled with .rn, so that the assembler may not fuse them either.
    names = [name for name in instructions(ptx, '(?:mul|add|sub)') if name.endswith(BITS[floating])]
    arithmetic = {tuple(name.split('.')[:2]) for name in names}
    assert arithmetic == {('mul', 'rn'), ('add', 'rn'), ('sub', 'rn')}


def test_fusion_would_be_noticed(compiler: ProcessPoolExecutor) -> None:
    """The control of the test above."""
    ptx = triton_worker.call(compiler, 'tests.test_ops.triton_worker', 'compile_for', 80, 'fp32', 'linear', 1, True)
    assert instructions(ptx, 'fma') == {'fma.rn.f32'}


# --- where it is used, and where not ----------------------------------------------------------------------------------


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU that Triton supports, as far as ``available`` looks."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(_triton, '_version', lambda: (3, 10))
    monkeypatch.setattr(_triton, '_probe', lambda device: None)
    _triton._works.cache_clear()
    yield monkeypatch
    _triton._works.cache_clear()


CUDA = torch.device('cuda', 0)


def test_available_on_a_supported_gpu_only(pretend_gpu: pytest.MonkeyPatch) -> None:
    assert _triton.available(CUDA)
    for name in ('cpu', 'meta', 'mps', 'xpu'):
        assert not _triton.available(torch.device(name))
    pretend_gpu.setattr(torch.version, 'hip', '6.3')
    assert not _triton.available(CUDA)


@pytest.mark.parametrize(
    ('owner', 'name', 'value'),
    [
        (_triton, '_version', lambda: ()),
        (_triton, '_version', lambda: (3, 5)),
        (torch.cuda, 'is_available', lambda: False),
        (torch.cuda, 'get_device_capability', lambda device: (7, 5)),
    ],
)
def test_not_available_without_triton_or_with_an_old_one_or_on_an_old_gpu(
    pretend_gpu: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    pretend_gpu.setattr(owner, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not _triton.available(CUDA)


def test_triton_that_does_not_work_is_worth_one_warning(pretend_gpu: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError('Failed to find C compiler')

    pretend_gpu.setattr(_triton, '_probe', fail)
    with pytest.warns(RuntimeWarning, match='plain PyTorch .* Failed to find C compiler'):
        assert not _triton.available(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not _triton.available(CUDA)


def test_every_device_gets_its_path(pretend_gpu: pytest.MonkeyPatch) -> None:
    assert _dispatch.path(torch.device('cpu')) is _eager
    assert _dispatch.path(CUDA) is _triton
    assert _dispatch.path(torch.device('xpu')) is _reference
    pretend_gpu.setattr(_triton, '_version', lambda: ())
    _triton._works.cache_clear()
    assert _dispatch.path(CUDA) is _reference


def test_batches_and_the_operator_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the GPU's functions: which is called, and that a count of -1 is an error by name."""
    boxes, scores, labels = examples(1, seed=30, num=6)[0]
    bad = scores.clone()
    bad[2] = float('nan')
    calls = []
    monkeypatch.setattr(_triton, 'available', lambda device: True)
    monkeypatch.setattr(
        _triton, 'soft_nms_of_list', lambda boxes, *rest, **parameters: calls.append(('list', len(boxes), parameters))
    )
    minus_one = torch.full((6,), -1), torch.zeros(6), torch.tensor(-1)
    monkeypatch.setattr(_triton, 'soft_nms_triton', lambda *inputs, **parameters: calls.append('one') or minus_one)

    expected = soft_nms(boxes, scores, labels)
    for result in batched_soft_nms([boxes] * 3, [scores] * 3, [labels] * 3, min_score=0.01):  # None: one by one
        assert_same(result, soft_nms(boxes, scores, labels, min_score=0.01))
    assert calls == [('list', 3, {'min_score': 0.01})]
    calls.clear()

    # None of these is a batch for one launch.
    assert_same(batched_soft_nms([boxes], [scores], [labels])[0], expected)
    batched_soft_nms([boxes, boxes.double()], [scores, scores])
    assert calls == []
    with pytest.raises(ValueError, match='scores has 5 values for 6 boxes'):
        batched_soft_nms([boxes, boxes], [scores, scores[:5]])
    with pytest.raises(ValueError, match=r'scores\[2\] is nan'):
        soft_nms(boxes, bad.requires_grad_(), labels)
    assert calls == ['one']
    with pytest.raises(ValueError, match=r'scores\[2\] is nan'):
        batched_soft_nms([boxes, boxes], [scores, bad], [labels, labels])
    assert calls == ['one', 'one']


@pytest.mark.gpu
def test_cuda_operator_and_batches() -> None:
    from mmdet_softnms import padded_soft_nms

    images = [[tensor.cuda() for tensor in image] for image in examples(4, seed=31, num=500, classes=20)]
    boxes, scores, labels = zip(*images, strict=True)
    expected = [soft_nms(*image, max_num=50) for image in images]
    for result, one in zip(batched_soft_nms(boxes, scores, labels, max_num=50), expected, strict=True):
        assert_same((result[0].cpu(), result[1].cpu()), (one[0].cpu(), one[1].cpu()))
    torch.cuda.set_sync_debug_mode('error')
    try:
        padded = padded_soft_nms(*images[0], max_num=50)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert_same(trim(tuple(tensor.cpu() for tensor in padded)), (expected[0][0].cpu(), expected[0][1].cpu()))
    compiled = torch.compile(lambda *image: soft_nms(*image, max_num=50), fullgraph=True)(*images[0])
    assert torch.equal(compiled[0], expected[0][0]) and torch.equal(compiled[1], expected[0][1])
    images[1][1][3] = float('nan')
    with pytest.raises(ValueError, match=r'scores\[3\] is nan'):
        batched_soft_nms(boxes, scores, labels)


def test_version_is_read(compiler: ProcessPoolExecutor) -> None:
    version = triton_worker.call(compiler, MODULE, '_version')
    assert version >= _triton._VERSION and len(version) == 2


PROGRAM = """
import sys
sys.modules['triton'] = None  # as if it were not installed: importing it fails
import torch
from mmdet_softnms.ops import _dispatch, _reference, soft_nms

boxes, scores = torch.tensor([[0., 0, 4, 4], [1, 0, 5, 4], [9, 9, 12, 12]]), torch.tensor([.9, .8, .7])
expected = soft_nms(boxes, scores)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device: (9, 0)
path = _dispatch.path(torch.device('cuda', 0))
assert path is _reference, path
_dispatch.path = lambda device: path
actual = soft_nms(boxes, scores)
assert all(torch.equal(one, other) for one, other in zip(actual, expected)), (actual, expected)
"""


def test_portable_path_works_without_triton() -> None:
    """In a process where Triton cannot be imported; the tensors are on the CPU, the path is what a GPU would get."""
    subprocess.run([sys.executable, '-c', PROGRAM], check=True, timeout=120)


def test_package_does_not_import_triton() -> None:
    program = "import sys, mmdet_softnms.ops._triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


@pytest.mark.gpu
def test_cuda_tensors_go_through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reference, 'select', None)
    keep, _ = soft_nms(torch.tensor([[0.0, 0, 4, 4]], device='cuda'), torch.tensor([0.5], device='cuda'))
    assert keep.tolist() == [0]
