"""What only the compiled path does: layers, lanes and its own exp; threads, processes and numba's disk cache."""

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

import mmdet_softnms
from mmdet_softnms import soft_nms
from mmdet_softnms.ops import _compiled, _cpu, _eager, _reference, weights
from mmdet_softnms.ops._arguments import Parameters

WARNING = 'compiles its kernels anew'


def crowd(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = 300 * torch.rand(num, 2, generator=generator)
    boxes = torch.cat([corner, corner + 5 + 60 * torch.rand(num, 2, generator=generator)], dim=1)
    return boxes, torch.rand(num, generator=generator), torch.randint(5, (num,), generator=generator)


def assert_equals_the_definition(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, **parameters: Any
) -> None:
    keep, kept_scores = soft_nms(boxes, scores, labels, **parameters)
    values: dict[str, Any] = {'iou_threshold': 0.3, 'sigma': 0.5, 'min_score': 1e-3, 'offset': 0.0, **parameters}
    for name in ('iou_threshold', 'sigma', 'min_score'):
        values[name] = torch.tensor(values[name], dtype=scores.dtype).item()
    expected_keep, expected_scores = _reference.select(boxes, scores, labels, Parameters(**values))
    assert torch.equal(keep, expected_keep)
    assert torch.equal(kept_scores, expected_scores)


# --- layers of the heap, lanes of the selected boxes, exp ------------------------------------------------------------


def unseen_by_the_sample(num: int) -> torch.Tensor:
    """Scores whose highest are exactly those that the first bound is not taken from."""
    scores = 0.5 + torch.rand(num, generator=torch.Generator().manual_seed(1)) / 2
    scores[[k * 2654435761 % num for k in range(_cpu._SAMPLE)]] = 0.25
    return scores


SCORES: dict[str, Callable[[int], torch.Tensor]] = {
    'all equal': lambda num: torch.full((num,), 0.5),
    'rising': lambda num: torch.linspace(0.01, 1, num),
    'few above many': lambda num: torch.where(torch.arange(num) % 997 == 3, 0.9, 0.1),
    'unseen by the sample': unseen_by_the_sample,
    'zeros': torch.zeros,
}


@pytest.mark.parametrize('method', ['linear', 'gaussian', 'hard'])
@pytest.mark.parametrize('min_score', [0.0, 1e-3, 0.2])
@pytest.mark.parametrize('max_num', [1, 40, 375])
@pytest.mark.parametrize('kind', list(SCORES))
def test_layers_lose_no_candidate(kind: str, max_num: int, min_score: float, method: str) -> None:
    """Enough candidates for a heap in layers; in the crowd, a layer sinks below what lies outside of it."""
    boxes, _, labels = crowd(3000)
    scores = SCORES[kind](len(boxes))
    parameters = {'method': method, 'max_num': max_num, 'min_score': min_score}
    for layout in (boxes, boxes / 5, boxes % 60 + boxes.new_tensor([0, 0, 60, 60])):
        assert_equals_the_definition(layout, scores, labels % 2, **parameters)


@pytest.mark.parametrize('method', ['linear', 'gaussian', 'hard'])
@pytest.mark.parametrize('num', [*range(1, 40), 500])
def test_every_number_of_lanes(num: int, method: str) -> None:
    """One class, all wanted: blocks are begun, full to the last lane, and walked through."""
    boxes, scores, labels = crowd(num)
    for spread in (1.0, 5.0, 0.01):  # crowded, sparse, all over one another
        parameters = {'method': method, 'max_num': -1, 'min_score': 0.0, 'iou_threshold': 0.5}
        assert_equals_the_definition(boxes * boxes.new_tensor(spread), scores, 0 * labels, **parameters)
        overlapping = boxes % 60 + boxes.new_tensor([0, 0, 60, 60])
        assert_equals_the_definition(overlapping, scores, 0 * labels, **parameters)


@pytest.mark.parametrize('sigma', [1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0, 7.0, 1e6])
def test_lanes_of_exp_round_to_what_exp_rounds_to(sigma: float) -> None:
    ious = np.concatenate([np.linspace(0, 1, 160_000), np.geomspace(1e-30, 1, 160_000), [0, 1] * 8]).astype(np.float32)
    expected = np.exp(-(ious.astype(np.float64) ** 2) / sigma).astype(np.float32)
    actual = np.empty_like(ious)
    lanes = _cpu._lanes_of(weights.get('gaussian'))

    @numba.njit(error_model='numpy')
    def weigh(ious: Any, sigma: float, results: Any) -> None:
        for k in range(0, len(ious), _cpu._LANES):
            lanes(ious[k:], 0.0, sigma, results[k:])

    weigh(ious, sigma, actual)
    # Two good ones differ where float64's last bit decides the rounding to float32: once in hundreds of millions.
    np.testing.assert_array_equal(actual, expected)


# --- each selection decays its neighbours at once --------------------------------------------------------------------


@pytest.mark.parametrize('decay', ['product', 'strongest'])
@pytest.mark.parametrize('method', ['linear', 'gaussian', 'hard'])
def test_large_classes_give_the_same_bits_eagerly(monkeypatch: pytest.MonkeyPatch, method: str, decay: str) -> None:
    """Sizes at which the layout is moved together several times; ties; classes; and the control that it was used."""
    used: list[Any] = []
    kernel = _eager.kernel
    monkeypatch.setattr(_eager, 'kernel', lambda *key: used.append(key) or kernel(*key))
    for name, value in (('_LARGE', 20), ('_MANY', 0), ('_WHOLE', 20), ('_WHOLE_CLASS', 20)):
        monkeypatch.setattr(_eager, name, value)
    for num, classes, spread in ((20, 1, 1.0), (400, 1, 1.0), (300, 3, 0.3), (300, 1, 4.0)):
        boxes, scores, labels = crowd(num)
        boxes[::50, 2] = 1000  # reach across all others
        boxes[1::40, 2] = boxes[1::40, 0]  # no area
        scores = (scores * 40).floor() / 40
        for max_num, min_score, offset in ((-1, 1e-3, 0.0), (-1, 0.0, 1.0), (num // 2, 0.3, 0.0)):
            assert_equals_the_definition(
                boxes * boxes.new_tensor(spread), scores, labels % classes, method=method, decay=decay,
                max_num=max_num, min_score=min_score, offset=offset,
            )  # fmt: skip
    assert len(used) == 12
    boxes, scores, labels = crowd(200)
    soft_nms(boxes.double(), scores.double(), labels * 0, method=method, decay=decay)  # compiled for float64, too
    assert len(used) == 13
    soft_nms(boxes, scores, method=method, decay=decay, max_num=20)  # few are wanted
    soft_nms(boxes, scores, labels * 100, method=method, decay=decay)  # small classes
    assert len(used) == 13


@pytest.mark.parametrize(
    'rule', [dict(method='gaussian'), dict(method='linear', decay='strongest'), dict(method='hard')]
)
def test_smaller_classes_are_suppressed_eagerly_where_all_pairs_count(
    monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    """All wanted, a product of weights, 48 of a class or more, and no more classes than that; the bits in any case."""
    used: list[Any] = []
    kernel = _eager.kernel
    monkeypatch.setattr(_eager, 'kernel', lambda *key: used.append(key) or kernel(*key))
    eager = []
    for num, classes, max_num in ((300, 6, -1), (300, 6, 300), (300, 6, 299), (300, 7, -1), (240, 1, -1)):
        boxes, scores, _ = crowd(num)
        labels = torch.arange(num) % classes
        assert_equals_the_definition(boxes, scores, labels, max_num=max_num, **rule)
        eager.append(len(used))
    assert eager == ([1, 2, 2, 2, 2] if rule['method'] == 'gaussian' else [0] * 5)


def test_the_quicker_way_of_hard_nms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lazily where a few selections remove a class of hundreds; eagerly where few overlap, and for other rules."""
    used: list[str] = []
    kernel = _eager.kernel
    monkeypatch.setattr(_eager, 'kernel', lambda weight, *rest: used.append(weight.name) or kernel(weight, *rest))
    boxes, scores, _ = crowd(600)
    for layout, method in ((boxes % 60, 'hard'), (boxes * 5, 'hard'), (boxes % 60, 'linear')):
        corners = layout[:, :2]
        around = torch.cat([corners, corners + (60 if layout.max() <= 60 else 20)], dim=1)
        assert_equals_the_definition(around, scores, torch.zeros(600, dtype=torch.int64), method=method, max_num=-1)
    assert used == ['hard', 'linear']


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_get_the_same_results() -> None:
    jobs = [(crowd(2000, seed), method) for seed in range(8) for method in ('linear', 'gaussian', 'hard')]
    alone = [soft_nms(*inputs, method=method) for inputs, method in jobs]  # type: ignore[arg-type]
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda job: soft_nms(*job[0], method=job[1]), jobs))
        for (keep, scores), (expected_keep, expected_scores) in zip(together, alone, strict=True):
            assert torch.equal(keep, expected_keep)
            assert torch.equal(scores, expected_scores)


@pytest.fixture
def gil_is_never_taken_away() -> Iterator[None]:
    """Only a thread that gives the GIL up by itself lets another one run."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(interval)


def runs_beside_others(kernel: Callable[..., int]) -> bool:
    """Whether another thread got to run between the kernel's call and its return (which takes half a second)."""
    boxes, scores, _ = (tensor.numpy() for tensor in crowd(12000))
    boxes[:, 0::2] += 1000 * np.arange(len(boxes), dtype=np.float32)[:, None]  # no overlaps: as many pairs as there are
    labels = np.zeros(len(boxes), np.int64)
    keep, kept = np.empty(len(boxes), np.int64), np.empty(len(boxes), np.float32)
    zero = np.float32(0)
    about_to_call, returned = threading.Event(), threading.Event()

    def work() -> None:
        about_to_call.set()
        for _ in range(8):
            kernel(boxes, scores, scores, labels, 1, 0.0, 0.5, zero, zero, keep, kept)
        returned.set()

    thread = threading.Thread(target=work)
    thread.start()
    about_to_call.wait()
    beside = not returned.is_set()
    thread.join()
    return beside


@pytest.mark.usefixtures('gil_is_never_taken_away')
def test_kernel_releases_the_gil() -> None:
    assert runs_beside_others(_cpu.kernel(weights.get('gaussian')))


@pytest.mark.usefixtures('gil_is_never_taken_away')
def test_a_kernel_that_holds_the_gil_would_be_noticed() -> None:
    """The control of the test above: the same kernel compiled without nogil."""
    kernel = _cpu.kernel(weights.get('gaussian'))
    assert not runs_beside_others(numba.njit([kernel.signatures[0]], error_model='numpy')(kernel.py_func))


def test_every_kernel_is_compiled_for_all_types_at_once() -> None:
    kernels = [_cpu._check, *(_cpu.kernel(weights.get(method)) for method in ('linear', 'gaussian', 'hard'))]
    for kernel in kernels:
        assert len(kernel.signatures) == 2
        assert kernel.targetoptions['nogil']
    boxes, scores, labels = crowd(10)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for method in ('linear', 'gaussian', 'hard'):
            soft_nms(boxes.to(dtype), scores.to(dtype), labels.int(), method=method)
        soft_nms(boxes.to(dtype).mT.contiguous().mT, scores.to(dtype).flip(0)[::2].repeat_interleave(2))
    for kernel in kernels:
        assert len(kernel.signatures) == 2, 'a call compiled another variant'


# --- processes and the disk cache -------------------------------------------------------------------------------------

PROGRAM = """
import torch
from mmdet_softnms.ops import _cpu
boxes, labels = torch.tensor([[0., 0, 4, 4], [1, 0, 5, 4], [9, 9, 12, 12]]), torch.tensor([7, 10**9, 7])
dense, above = _cpu.dense_labels(boxes, torch.tensor([.9, .8, .7]), labels, 0.0)
hits = sum(sum(kernel.stats.cache_hits.values()) for kernel in (_cpu._check, _cpu._number))
print(dense.tolist(), above, 'hits', hits)
"""
EXPECTED = '[0, 1, 0] 2'
KERNELS = 3  # _check for two types, _number; a rule's, cached in the same way, takes five times as long to compile
ROOT = Path(mmdet_softnms.__file__).parents[1]


def start(
    cache: Path | None, root: Path = ROOT, before: Callable[[], None] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """PROGRAM in a process of its own; ``cache``: where numba keeps its files, None: where it likes."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith('NUMBA_')}
    variables |= {'PYTHONPATH': str(root), 'PYTHONDONTWRITEBYTECODE': '1', 'OMP_NUM_THREADS': '1', **environment}
    if cache is not None:
        variables['NUMBA_CACHE_DIR'] = str(cache)
    return subprocess.Popen(
        [sys.executable, '-c', PROGRAM],
        cwd=root,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, int, str]:
    """The result as printed, the number of kernels taken from the cache, and the error output."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    result, _, hits = output.strip().rpartition(' hits ')
    return result, int(hits), errors


def test_processes_that_start_together_on_an_empty_cache(tmp_path: Path) -> None:
    """numba replaces whole files, so each process finds a kernel or compiles its own; afterwards nobody compiles."""
    processes = [start(tmp_path) for _ in range(3)]
    for process in processes:
        result, _, errors = finish(process)
        assert result == EXPECTED
        assert WARNING not in errors
    result, hits, errors = finish(start(tmp_path))
    assert (result, hits) == (EXPECTED, KERNELS), errors


def test_damaged_cache_is_worth_a_warning_not_a_failure(tmp_path: Path) -> None:
    assert finish(start(tmp_path))[0] == EXPECTED
    files = list(tmp_path.rglob('*.nbi'))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:20])
    result, hits, errors = finish(start(tmp_path))
    assert (result, hits) == (EXPECTED, 0)
    assert errors.count(WARNING) == 1
    assert 'NUMBA_CACHE_DIR' in errors


def test_no_writable_place_is_worth_a_warning_not_a_failure(tmp_path: Path) -> None:
    """An installation whose __pycache__ cannot be written, for a user whose home cannot be either.

    A file stands where each directory would be, which stops even root.
    """
    shutil.copytree(
        ROOT / 'mmdet_softnms', tmp_path / 'mmdet_softnms', ignore=shutil.ignore_patterns('__pycache__', '.mim')
    )
    (tmp_path / 'mmdet_softnms' / 'ops' / '__pycache__').touch()
    home = tmp_path / 'home'
    home.touch()
    process = start(None, root=tmp_path, HOME=str(home), XDG_CACHE_HOME=str(home / 'cache'))
    result, hits, errors = finish(process)
    assert (result, hits) == (EXPECTED, 0)
    assert errors.count(WARNING) == 1
    assert 'no locator available' in errors


def test_full_disk_is_worth_a_warning_not_a_failure(tmp_path: Path) -> None:
    """No file may grow beyond 100 bytes: the probe of the directory succeeds, the cache cannot be written."""

    def allow_small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    result, hits, errors = finish(start(tmp_path, before=allow_small_files_only))
    assert (result, hits) == (EXPECTED, 0)
    assert errors.count(WARNING) == 1


def test_compilation_error_is_not_mistaken_for_a_cache_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(real_array: Any) -> int:
        return real_array.no_such_attribute  # type: ignore[no-any-return]

    monkeypatch.setattr(_compiled, '_cache_works', True)
    with pytest.raises(numba.core.errors.TypingError), pytest.warns(RuntimeWarning, match=WARNING):
        _compiled.compiled(lambda real: numba.types.int64(real[::1]))(broken)
