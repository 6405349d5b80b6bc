"""The registered operator: schema, shapes without data, compilers, gradients; and several images at once."""

import multiprocessing
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import mmdet_softnms
from mmdet_softnms import batched_soft_nms, padded_soft_nms, soft_nms, warmup
from mmdet_softnms.ops._operator import soft_nms_backward

ROOT = Path(__file__).parents[2]
METHODS = ('linear', 'gaussian', 'hard')


def _scene(num, seed=0, num_classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 60
    sides = torch.rand(num, 2, generator=generator, dtype=torch.float64) * 40 + 10
    scores = torch.rand(num, generator=generator, dtype=torch.float64) * 0.9 + 0.1
    labels = torch.randint(num_classes, (num,), generator=generator)
    return torch.cat([corners, corners + sides], 1).to(dtype), scores.to(dtype), labels


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('max_num', [-1, 0, 7, 1000])
def test_padded_results_hold_the_public_ones(method, max_num):
    boxes, scores, labels = _scene(40, dtype=torch.float32)
    keep, kept, count = padded_soft_nms(boxes, scores, labels, method, min_score=0.3, max_num=max_num)
    expected_keep, expected = soft_nms(boxes, scores, labels, method=method, min_score=0.3, max_num=max_num)
    num = int(count)
    assert num == len(expected_keep) and len(keep) == len(kept) == (40 if max_num < 0 else min(40, max_num))
    assert torch.equal(keep[:num], expected_keep) and torch.equal(kept[:num], expected)
    assert (keep[num:] == -1).all() and (kept[num:] == 0).all()


def test_torchs_own_checks_of_an_operator():
    boxes, scores, labels = _scene(30)
    arguments = (boxes.requires_grad_(), scores.requires_grad_(), labels)
    # Not test_aot_dispatch_dynamic: it sums integer results into floats; compilers are tested below.
    utilities = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    torch.library.opcheck(padded_soft_nms, arguments, dict(max_num=10), test_utils=utilities)
    keep = padded_soft_nms(boxes.detach(), scores.detach(), labels)[0]
    backward = (torch.rand(30, dtype=torch.float64), boxes.detach(), scores.detach(), labels, keep)
    torch.library.opcheck(soft_nms_backward, (*backward, 'linear', 0.3, 0.5, 0.0, True), test_utils=utilities)


class _Padded(torch.nn.Module):
    def forward(self, boxes, scores, labels):
        keep, kept, count = padded_soft_nms(boxes * 2, scores, labels, max_num=10)
        return keep, kept + 1, count


class _Public(torch.nn.Module):
    def forward(self, boxes, scores, labels):
        keep, kept = soft_nms(boxes * 2, scores, labels, max_num=10, method='linear', decay='strongest')
        return boxes[keep], kept * 2


def _same(results, expected):
    return len(results) == len(expected) and all(map(torch.equal, results, expected))


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_a_model_compiles_in_one_graph(backend):
    inputs = _scene(30)
    compiled = torch.compile(_Padded(), fullgraph=True, backend=backend)
    assert _same(compiled(*inputs), _Padded()(*inputs))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # the number of results becomes a symbol
        assert _same(torch.compile(_Public(), fullgraph=True, backend=backend)(*inputs), _Public()(*inputs))


class _Batch(torch.nn.Module):
    def forward(self, boxes, scores, labels):
        (_, kept), (_, other) = batched_soft_nms([boxes, boxes * 2], [scores, scores], [labels, labels], max_num=10)
        return kept, other * 2


def test_batches_compile_and_are_exported():
    """Threads, and how many there are, are nothing for a graph."""
    inputs = _scene(3000)
    expected = _Batch()(*inputs)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert _same(torch.compile(_Batch(), fullgraph=True, backend='aot_eager')(*inputs), expected)
    for strict in (False, True):
        assert _same(torch.export.export(_Batch(), inputs, strict=strict).module()(*inputs), expected)


def test_other_threads_go_on_while_one_compiles(monkeypatch):
    """torch says that it is compiling to all of them."""
    scene = _scene(30, dtype=torch.float32)
    expected = soft_nms(*scene)
    monkeypatch.setattr(torch.compiler, '_is_compiling_flag', True)
    assert torch.compiler.is_compiling()
    assert _same(soft_nms(*scene), expected)
    assert _equal(batched_soft_nms(*([one] * 3 for one in scene)), [expected] * 3)


def test_forward_mode_is_refused():
    """It would give tangents of 0."""
    boxes, scores, labels = _scene(5)
    with pytest.raises(NotImplementedError, match='forward-mode'):
        torch.func.jvp(lambda given: soft_nms(boxes, given, labels)[1], (scores,), (torch.ones(5).double(),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='forward-mode'):
        soft_nms(boxes, forward_ad.make_dual(scores, torch.ones(5).double()), labels)


def test_gradients_pass_through_a_compiled_model():
    results = []
    for model in (_Padded(), torch.compile(_Padded(), fullgraph=True, backend='aot_eager')):
        boxes, scores, labels = _scene(30)
        model(boxes.requires_grad_(), scores.requires_grad_(), labels)[1].square().sum().backward()
        results.append((boxes.grad, scores.grad))
    assert _same(*results) and results[0][0].abs().sum() > 0


@pytest.mark.parametrize('model', [_Padded(), _Public()], ids=['padded', 'public'])
@pytest.mark.parametrize('strict', [False, True])
def test_a_model_is_exported_for_any_number_of_boxes(model, strict):
    num = torch.export.Dim('num', min=11, max=4096)
    shapes = dict(boxes={0: num}, scores={0: num}, labels={0: num})
    exported = torch.export.export(model, _scene(30), dynamic_shapes=shapes, strict=strict)
    for seed in range(3):
        inputs = _scene(20 + 30 * seed, seed=seed)
        assert _same(exported.module()(*inputs), model(*inputs))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
    'options',
    [
        dict(min_score=0.05, max_num=12, offset=1),
        dict(min_score=0.0),
        dict(iou_threshold=0.5, sigma=0.2),
        dict(decay='strongest', min_score=0.0),
    ],
)
@pytest.mark.parametrize('seed', range(3))
def test_gradients_are_those_of_finite_differences(method, options, seed):
    boxes, scores, labels = _scene(20, seed)
    for some_labels in (labels, None):

        def kept(boxes, scores, some_labels=some_labels):
            return soft_nms(boxes, scores, some_labels, method=method, **options)[1]

        assert torch.autograd.gradcheck(kept, (boxes.requires_grad_(), scores.requires_grad_()))


def test_gradients_of_more_boxes_than_are_held_at_a_time(monkeypatch):
    results = []
    for rows in (7, 1000):
        monkeypatch.setattr('mmdet_softnms.ops._operator._ROWS', rows)
        boxes, scores, labels = _scene(100)
        soft_nms(boxes.requires_grad_(), scores.requires_grad_(), labels, min_score=0)[1].square().sum().backward()
        results.append((boxes.grad, scores.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_classes_have_the_gradients_they_have_alone(monkeypatch):
    monkeypatch.setattr('mmdet_softnms.ops._operator._ROWS', 8)  # classes begin and end within the rows held at a time
    boxes, scores, labels = _scene(120, num_classes=9)
    keep, kept = soft_nms(boxes.requires_grad_(), scores.requires_grad_(), labels, min_score=0)
    factors = torch.rand(len(kept), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = torch.autograd.grad((kept * factors).sum(), [boxes, scores])
    of_box = dict(zip(keep.tolist(), factors, strict=True))
    loss = 0
    for label in range(9):
        index = (labels == label).nonzero()[:, 0]
        alone, kept = soft_nms(boxes[index], scores[index], min_score=0)
        loss += (kept * torch.stack([of_box[number] for number in index[alone].tolist()])).sum()
    for one, other in zip(together, torch.autograd.grad(loss, [boxes, scores]), strict=True):
        torch.testing.assert_close(one, other)
    # Where only the scores need it, that of the boxes is not computed.
    monkeypatch.setattr('mmdet_softnms.ops._operator._iou_derivatives', None)
    kept = soft_nms(boxes.detach(), scores, labels, min_score=0)[1]
    torch.testing.assert_close(torch.autograd.grad((kept * factors).sum(), [scores])[0], together[1])


@pytest.mark.parametrize('around', [lambda: FlopCounterMode(display=False), torch.autograd.graph.save_on_cpu])
def test_gradients_under_modes_and_hooks(around):
    results = []
    for context in (nullcontext, around):
        boxes, scores, labels = _scene(30)
        with context():
            soft_nms(boxes.requires_grad_(), scores.requires_grad_(), labels)[1].square().sum().backward()
        results.append((boxes.grad, scores.grad))
    assert _same(*results) and results[0][0].abs().sum() > 0


def test_gradients_where_a_weight_is_zero():
    """A duplicate under the linear rule: its score is 0, and so is its slope but for the duplicate's own IoU."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [4, 0, 14, 10]], requires_grad=True)
    scores = torch.tensor([0.9, 0.8, 0.7], requires_grad=True)
    soft_nms(boxes, scores, method='linear', min_score=0)[1].sum().backward()
    assert scores.grad.isfinite().all() and boxes.grad.isfinite().all()
    assert scores.grad[0] == 1 and scores.grad[1] == 0


def test_half_precision_and_no_grad():
    boxes, scores, labels = _scene(30, dtype=torch.bfloat16)
    kept = soft_nms(boxes, scores.requires_grad_(), labels)[1]
    kept.sum().backward()
    assert kept.dtype == scores.grad.dtype == torch.bfloat16
    with torch.no_grad():
        assert not soft_nms(boxes, scores, labels)[1].requires_grad


def test_bad_values_are_named_with_gradients_too():
    boxes, scores, labels = _scene(5)
    with pytest.raises(ValueError, match='sigma'):
        soft_nms(boxes.requires_grad_(), scores, labels, sigma=0)
    with pytest.raises(ValueError, match='labels'):
        soft_nms(boxes, scores, -labels - 1)


def test_the_package_is_light_to_import():
    """Beside torch: numba, triton and torch's compilers wait for the first call that needs them; 0.3 s are allowed."""
    script = (
        'import sys, time, torch; before = set(sys.modules); start = time.process_time(); import mmdet_softnms; '
        'print(time.process_time() - start, sorted(set(sys.modules) - before))'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.split(' ', 1)
    packages = {name.split('.')[0] for name in eval(modules)} - {'mmdet_softnms', *sys.stdlib_module_names}
    assert packages <= {'torch'} and not any('_dynamo' in name or 'sympy' in name for name in eval(modules))
    assert float(seconds) < 0.3


def test_an_exported_program_is_loaded_by_the_package_alone(tmp_path):
    """The operator is registered by ``import mmdet_softnms``."""
    inputs = _scene(30)
    torch.export.save(torch.export.export(_Padded(), inputs), tmp_path / 'program.pt2')
    torch.save([inputs, _Padded()(*inputs)], tmp_path / 'expected.pt')
    script = (
        'import sys, torch, mmdet_softnms; assert torch.ops.mmdet_softnms.soft_nms.default; '
        'program = torch.export.load(sys.argv[1]).module(); inputs, expected = torch.load(sys.argv[2]); '
        'assert all(map(torch.equal, program(*inputs), expected))'
    )
    files = [str(tmp_path / name) for name in ('program.pt2', 'expected.pt')]
    done = subprocess.run([sys.executable, '-c', script, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_before_torch_2_4_the_package_works_without_gradients():
    script = (
        'import torch; del torch.library.custom_op; from mmdet_softnms import padded_soft_nms, soft_nms\n'
        'boxes, scores = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([0.5], requires_grad=True)\n'
        'assert soft_nms(boxes, scores)[0].tolist() == [0]\n'
        'try: padded_soft_nms(boxes, scores)\n'
        'except NotImplementedError as error: print(error)'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith('padded_soft_nms needs torch 2.4 or newer')


# --- several images ---------------------------------------------------------------------------------------------------


def _batch(num=6, size=3000):
    scenes = [_scene(size + number, number, dtype=torch.float32) for number in range(num)]
    return [list(column) for column in zip(*scenes, strict=True)]


def _equal(results, expected):
    return len(results) == len(expected) and all(
        _same(one, other) for one, other in zip(results, expected, strict=True)
    )


@pytest.mark.parametrize('size', [0, 10, 3000])
def test_a_batch_is_its_images(size):
    boxes, scores, labels = _batch(size=size)
    expected = [soft_nms(*image, max_num=50) for image in zip(boxes, scores, labels, strict=True)]
    assert _equal(batched_soft_nms(boxes, scores, labels, max_num=50), expected)
    alone = [soft_nms(*image, method='linear') for image in zip(boxes[:2], scores[:2], strict=True)]
    assert _equal(batched_soft_nms(boxes[:2], scores[:2], method='linear'), alone)
    assert batched_soft_nms([], [], []) == []
    same = [torch.stack([one[0]] * 2) for one in (boxes, scores, labels)]  # one tensor instead of a list
    assert _equal(batched_soft_nms(*same, max_num=50), [expected[0]] * 2)


def test_a_batch_uses_threads_only_where_it_is_worth_it(monkeypatch):
    here, used, helped = threading.current_thread().name, [], threading.Event()
    original = mmdet_softnms.ops._batch.soft_nms

    def noted(*arguments, **options):
        used.append(threading.current_thread().name)
        if used[-1] != here:
            helped.set()
        elif waits:
            assert helped.wait(60)
        return original(*arguments, **options)

    boxes, scores, labels = _batch(num=4)
    expected = [soft_nms(*image) for image in zip(boxes, scores, labels, strict=True)]
    monkeypatch.setattr('mmdet_softnms.ops._batch.soft_nms', noted)
    monkeypatch.setattr('mmdet_softnms.ops._batch._cores', lambda: 2)
    waits = True
    assert _equal(batched_soft_nms(boxes, scores, labels), expected)
    assert len(used) == 4 and len(set(used)) == 2 and here in used

    waits = False
    used.clear()
    batched_soft_nms(boxes[:1], scores[:1], labels[:1])
    batched_soft_nms([box[:10] for box in boxes], [score[:10] for score in scores])
    batched_soft_nms(boxes[:3], scores[:3], labels[:3], max_num=100)
    monkeypatch.setattr('mmdet_softnms.ops._batch._cores', lambda: 1)
    batched_soft_nms(boxes, scores, labels)
    assert set(used) == {here}


def test_gradients_and_no_grad_reach_the_threads():
    boxes, scores, labels = _batch(num=3)
    for score in scores:
        score.requires_grad_()
    kept = [kept for _, kept in batched_soft_nms(boxes, scores, labels, max_num=20)]
    sum(one.sum() for one in kept).backward()
    assert all(score.grad.abs().sum() > 0 for score in scores)
    with torch.no_grad():
        assert not any(kept.requires_grad for _, kept in batched_soft_nms(boxes, scores, labels, max_num=20))


def test_errors_of_one_image_are_raised():
    boxes, scores, labels = _batch(num=3)
    scores[1][5] = float('nan')
    with pytest.raises(ValueError, match='scores must be finite'):
        batched_soft_nms(boxes, scores, labels)
    with pytest.raises(ValueError, match='3 boxes, 2 scores'):
        batched_soft_nms(boxes, scores[:2])
    for wrong in ((box for box in boxes), dict(enumerate(boxes)), boxes[0], None):
        with pytest.raises(TypeError, match='boxes must be a list with a tensor for each image'):
            batched_soft_nms(wrong, scores, labels)
    with pytest.raises(ValueError, match='scores must have shape'):
        batched_soft_nms(boxes, [score[0] for score in scores])
    with pytest.raises(ValueError, match='sigma'):
        batched_soft_nms([], [], sigma=-1)
    with pytest.raises(TypeError, match='max_num'):
        batched_soft_nms(boxes[::2], scores[::2], labels[::2], max_num='many')


@pytest.mark.parametrize('bad', range(4))
def test_whichever_thread_meets_an_error_raises_it_here(bad, monkeypatch):
    monkeypatch.setattr('mmdet_softnms.ops._batch._cores', lambda: 3)
    boxes, scores, labels = _batch(num=4)
    expected = [soft_nms(*image) for image in zip(boxes, scores, labels, strict=True)]
    broken = [score.clone() for score in scores]
    broken[bad][5] = float('nan')
    for _ in range(5):
        with pytest.raises(ValueError, match='scores must be finite'):
            batched_soft_nms(boxes, broken, labels)
    assert _equal(batched_soft_nms(boxes, scores, labels), expected)


def test_a_batch_on_the_way_out():
    """The interpreter starts no thread any more: the calling one does the work."""
    script = (
        'import atexit; from tests.test_ops.test_operator import _batch; from mmdet_softnms import batched_soft_nms\n'
        'import concurrent.futures.thread\n'  # its own handler runs before ours
        'atexit.register(lambda: print(len(batched_soft_nms(*_batch()))))'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '6', done.stderr


def test_64_threads_at_once():
    boxes, scores, labels = _batch(num=3, size=2000)
    expected = batched_soft_nms(boxes, scores, labels, max_num=100)
    wrong = []

    def call():
        for _ in range(3):
            if not _equal(batched_soft_nms(boxes, scores, labels, max_num=100), expected):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=call) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class _Suppressed(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        boxes, scores, labels = _batch(num=2, size=2500)
        return sum(float(kept.sum()) for _, kept in batched_soft_nms(boxes, scores, labels, max_num=30))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_data_loader_workers(method):
    """Forked ones inherit a pool whose threads are not there; they must not wait for them."""
    expected = _Suppressed()[0]
    assert method in multiprocessing.get_all_start_methods()
    loader = DataLoader(_Suppressed(), num_workers=2, multiprocessing_context=method, timeout=120)
    assert [float(value) for value in loader] == [pytest.approx(expected)] * 4


def test_warming_up_leaves_nothing_for_the_first_call():
    """Of any rule, decay, type and size of class: no kernel is compiled or loaded, and no module imported."""
    script = """
import sys, torch
from mmdet_softnms import warmup
warmup(METHODS); warmup(METHODS)
from mmdet_softnms import rules
from mmdet_softnms.ops import _compiled, weights
def refuse(function, *others):
    raise LookupError(f'{function.__qualname__} was not there')
_compiled._compile = refuse
modules = set(sys.modules)
soft = [rules.SoftNMS(method, decay=decay) for method in weights.WEIGHTS for decay in ('product', 'strongest')]
every = [*soft, *(wrap(rule=one) for one in soft for wrap in (rules.VotedNMS, rules.SupportedNMS))]
boxes = torch.rand(600, 4).cumsum(1)
for rule in every:
    for num in (5, 600):
        for dtype in (torch.float16, torch.float32, torch.float64):
            image = boxes[:num].to(dtype), torch.rand(num).to(dtype), torch.zeros(num, dtype=torch.int64)
            keep, scores = rule(*image, -1)
            if hasattr(rule, 'refine'):
                rule.refine(*image, keep, scores)
print(sorted(set(sys.modules) - modules))
"""

    def run(methods):
        command = [sys.executable, '-c', script.replace('METHODS', str(methods))]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(None)
    assert done.stdout.strip() == '[]', done.stderr
    assert 'LookupError: _select_linear was not there' in run(['hard']).stderr  # the control
    assert warmup(['hard']) is None
    with pytest.raises(ValueError, match="method must be one of .*, got 'cubic'"):
        warmup(['cubic'])


def test_a_million_candidates():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1_000_000, 2, generator=generator) * 2000
    boxes = torch.cat([corners, corners + 30], 1)
    scores, labels = torch.rand(1_000_000, generator=generator), torch.randint(1203, (1_000_000,), generator=generator)
    keep, kept = soft_nms(boxes, scores, labels, max_num=300)
    assert len(keep) == 300 and kept[0] == scores.max() and (kept[1:] <= kept[:-1]).all()


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='no /proc: the memory of a process is read there')
def test_ten_thousand_tiny_calls_leave_no_trace():
    boxes, scores, labels = _scene(20, dtype=torch.float32)

    def resident():
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    for _ in range(2000):
        soft_nms(boxes, scores, labels)
    before = resident()
    for _ in range(10_000):
        soft_nms(boxes, scores, labels)
    assert resident() - before < 2 * 2**20  # 10,000 results of this size would be 4 MB, had they stayed
