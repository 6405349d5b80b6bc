"""Everything a machine with a GPU can tell of the operator, as one Markdown file: ``bash tools/check_gpu.sh``.

Tests marked for a GPU, random cases against the oracle (tests/fuzz.py), gradients, ``torch.compile``, and ``op`` and
``stage`` against what is installed. ``--device cpu`` goes the same way with few cases, to test the way itself.
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ('torch', 'numpy', 'numba', 'pytest', 'hypothesis')
TIME_LIMIT = 150  # seconds for each other process


class StepError(Exception):
    """A step found something wrong; the message is for the report."""


class NotRunError(Exception):
    """What a step needs is not there; the message is for the report."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every step, whatever the others find; write the report; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog='check_gpu.sh', description=(__doc__ or '').split('\n\n')[0])
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda', help='cpu: only tests these steps')
    parser.add_argument('--out', type=Path, default=Path('check_gpu.md'), help='the report (default: %(default)s)')
    options = parser.parse_args(arguments)
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(f'error: {" and ".join(absent)} missing: {sys.executable} -m pip install {" ".join(absent)}')
    import torch

    if options.device == 'cuda' and not torch.cuda.is_available():
        sys.exit(f'error: torch {torch.__version__} sees no GPU; --device cpu tests these steps without one')
    from benchmarks.op import device_name
    from benchmarks.timing import machine
    from mmdet_softnms import warmup
    from mmdet_softnms.files import write_whole

    warmup()
    about = {'device': device_name(torch.device(options.device)), 'CUDA': torch.version.cuda, **machine()}
    if find_spec('triton'):
        about['triton'] = importlib.import_module('triton').__version__
    steps: dict[str, Callable[[str], str]] = {
        'Tests': tests,
        'Random cases against the oracle': random_cases,
        'Gradients': gradients,
        'torch.compile': compiled,
        'Operator': operator,
        'Post-processing stage': stage,
    }
    summary, details, failed = [], [], False
    for title, step in steps.items():
        start = time.perf_counter()
        try:
            verdict, words = 'passed', step(options.device)
        except NotRunError as reason:
            verdict, words = 'not run', str(reason)
        except (Exception, SystemExit) as error:  # the other steps still have something to tell
            verdict, words = (
                'FAILED',
                str(error) if isinstance(error, StepError) else f'{type(error).__name__}: {error}',
            )
        failed |= verdict == 'FAILED'
        summary.append(f'| {title} | {verdict} | {time.perf_counter() - start:.0f} |')
        details += [f'## {title}: {verdict}', '', words, '']
        print(summary[-1], flush=True)
    lines = ['# mmdet_softnms on ' + about['device'], '', *(f'- {key}: {value}' for key, value in about.items()), '']
    lines += ['| step | result | seconds |', '|---|---|---|', *summary, '', *details]
    write_whole(options.out, '\n'.join(lines).encode())
    print(f'written: {options.out}')
    return int(failed)


def _python(*arguments: str) -> str:
    """The last lines of a Python program that ends well."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise StepError(f'{" ".join(arguments)}: not finished after {TIME_LIMIT} s') from None
    tail = '\n'.join((done.stdout + done.stderr).strip().replace(str(ROOT), '.').splitlines()[-25:])
    if done.returncode:
        raise StepError(f'`python {" ".join(arguments)}` ended with status {done.returncode}:\n\n```\n{tail}\n```')
    return tail.splitlines()[-1] if tail else 'no output'


def tests(device: str) -> str:
    """The operator's tests that need a GPU; the summary line of pytest."""
    chosen = ['tests/test_ops', '-k', 'cuda or gpu'] if device == 'cuda' else ['tests/test_ops/test_arguments.py']
    return _python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--tb=short', *chosen)


def random_cases(device: str) -> str:
    """Drawn inputs of every kind against the definition on numpy arrays."""
    if not (ROOT / 'tests' / 'fuzz.py').is_file():
        raise NotRunError('tests/fuzz.py is not there')
    return _python('-m', 'tests.fuzz', '--cases', '3000' if device == 'cuda' else '100', '--device', device)


def gradients(device: str) -> str:
    """gradcheck in float64, class by class and as one class."""
    import torch

    from mmdet_softnms import soft_nms

    for method in ('gaussian', 'linear'):
        for seed in range(3):
            boxes, scores, labels = _scene(20, seed, device)
            for some_labels in (labels, None):

                def kept(boxes, scores, some_labels=some_labels, method=method):  # type: ignore[no-untyped-def]
                    return soft_nms(boxes, scores, some_labels, method=method)[1]

                if not torch.autograd.gradcheck(kept, (boxes.requires_grad_(), scores.requires_grad_())):
                    raise StepError(f'{method}, seed {seed}: not the gradient of finite differences')
    return 'the same as finite differences for boxes and scores, gaussian and linear, 12 scenes'


def compiled(device: str) -> str:
    """A function with the registered operator, in one graph."""
    import torch

    from mmdet_softnms import soft_nms
    from mmdet_softnms.ops import _operator  # noqa: F401  # registers it

    def model(boxes, scores, labels):  # type: ignore[no-untyped-def]
        keep, kept, count = torch.ops.mmdet_softnms.soft_nms(
            boxes * 2, scores, labels, 'gaussian', 0.3, 0.5, 1e-3, 100, 0.0
        )
        return keep, kept * 2, count

    backend = 'inductor' if device == 'cuda' else 'aot_eager'
    boxes, scores, labels = (tensor.detach() for tensor in _scene(500, 0, device))
    keep, kept, count = torch.compile(model, fullgraph=True, backend=backend)(boxes, scores, labels)
    expected_keep, expected = soft_nms(boxes * 2, scores, labels, max_num=100)
    if not (torch.equal(keep[:count], expected_keep) and torch.equal(kept[:count], expected * 2)):
        raise StepError('the compiled function does not select what soft_nms selects')
    return f'fullgraph=True, backend {backend}: the same {len(expected)} detections'


def _scene(num: int, seed: int, device: str):  # type: ignore[no-untyped-def]
    """Overlapping boxes in float64 with scores far enough apart for finite differences."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    corners = 40 * torch.rand(num, 2, generator=generator, dtype=torch.float64)
    sides = 10 + 30 * torch.rand(num, 2, generator=generator, dtype=torch.float64)
    scores = torch.linspace(0.1, 0.95, num, dtype=torch.float64)[torch.randperm(num, generator=generator)]
    labels = torch.randint(3, (num,), generator=generator)
    return torch.cat([corners, corners + sides], 1).to(device), scores.to(device), labels.to(device)


def operator(device: str) -> str:
    """``benchmark op``, fewer cells, with the peers that are there; every row is checked with the definition."""
    import torch

    from benchmarks import op, peers

    here = torch.device(device)
    few = device == 'cpu'
    scenes = op.scenes([100] if few else [100, 1000, 10_000], [5] if few else [80], [100] if few else [1000, 10_000])
    rows = [row for row, _, _ in op.measure_all(scenes, [100] if few else [100, -1], here, 0.0 if few else 0.3)]
    titles, present = op.header(rows)
    absent = [f'- {peer} left out: {reason}' for peer, reason in peers.missing(here).items()]
    return '\n'.join([*table(titles, [op.cells(row, present) for row in rows]), '',
                      *(f'- {line}' for line in (*op.extremes(rows), *op.DIFFERENCES)), *absent])  # fmt: skip


def stage(device: str) -> str:
    """``benchmark stage``: mmdet's stage with hard NMS, and ours."""
    import torch

    try:
        import mmcv.ops  # noqa: F401
        import mmdet  # noqa: F401
    except (ImportError, AttributeError) as error:
        raise NotRunError(f'mmdet with mmcv is not there ({error})') from None
    from benchmarks import peers
    from benchmarks import stage as stages

    here = torch.device(device)
    if reason := peers.missing(here).get(peers.MMCV_HARD):
        raise NotRunError(f'mmcv has no NMS for this device ({reason})')
    few = device == 'cpu'
    rows = stages.measure_all([0.05] if few else [0.05, 0.01, 1e-3, 1e-4], here, 0.0 if few else 1.0)
    return '\n'.join(['Milliseconds, one image, 1,000 proposals, 80 classes (ratio to mmdet)', '',
                      *table(stages.header(rows), [stages.cells(row) for row in rows])])  # fmt: skip


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f'| {" | ".join(cells)} |' for cells in (titles, ['---'] * len(titles), *rows)]


if __name__ == '__main__':
    sys.exit(main())
