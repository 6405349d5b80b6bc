"""Measure mmdet_softnms against its alternatives. ``python tools/benchmark.py op --help`` lists the options.

``op``: the operator on the CPU, or by ``--device cuda`` on a GPU, against ``mmcv.ops.batched_nms`` (soft and hard), the
soft NMS of ensemble-boxes, of birder and of TensorFlow, torchvision's hard NMS and the definition in plain PyTorch, as
far as they are installed (``--tensorflow`` takes the Python of an environment of its own), all on the same candidates,
in one run, in turns. The candidates are drawn, but shaped like a detector's:

* A scene of 1333 x 800 px holds 20 objects. 1,000 proposals (more where so many candidates need them): four in five lie
  round an object, with normal errors of a tenth of its size, the others anywhere.
* Every class has its own box for each proposal (class-aware regression, 3 % apart) and a softmax score: random logits,
  with a margin for the background and a larger one for the object's class where there is an object.
* The score threshold is set so that the wanted number of candidates remains. ``min_score`` is 1e-3, or that threshold
  where it is lower: nothing is dropped before it has met another box.
* "1 dense" is one class of that many proposals round the 20 objects; "1 spread" is one class of small boxes all over
  the image, few of which overlap: nearly all survive, which is the most work there is for anyone.

``pool``: position-sensitive RoI pooling, forward and backward at VOC size, against its definition in plain PyTorch and,
where torchvision is installed, against its operator.

``stage``: logits and deltas in, detections out, against mmdet's own stage with hard NMS, at several ``score_thr``.

``growth``: time and memory against candidates, classes and ``max_num``, with fitted exponents and a plot.

``serving``: what a new process waits for (import, ``warmup()``), and a batch of images against one after the other.

``sweep``: many suppression settings over the stored candidates of a drawn test set the size of COCO val2017: 5,000 of
the scenes above with 7 objects each, 80 classes. Tells the size of the store and how the time divides into reading
it, suppression and COCO metrics.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing

from _benchmark_peers import MMCV_HARD, MMCV_SOFT, PEERS, REMARKS, TensorFlow, peers
from _benchmark_plots import plot_growth, plot_peers
from _benchmark_stage import PARTS, STOCK, exponent, median, peak_bytes, stages, startup

from mmdet_softnms import batched_soft_nms, soft_nms, warmup
from mmdet_softnms.models.ps_roi_pool import KINDS, _caffe_edges, _torchvision_edges, ps_roi_pool
from mmdet_softnms.ops import _reference, _soft_nms

WIDTH, HEIGHT = 1333, 800
PARAMETERS: dict[str, dict[str, Any]] = {
    'gaussian': {'method': 'gaussian', 'sigma': 0.5},
    'linear': {'method': 'linear', 'iou_threshold': 0.3},
    'hard': {'method': 'hard', 'iou_threshold': 0.5},
}
OURS = 'ours'
SLOW = 2.0  # seconds; a peer whose first call takes longer is not called again
TOO_SLOW = 1.0  # seconds; a peer that took longer on fewer candidates of the same kind is not called at all
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
CHECKED = 2000  # selections compared with the reference, which needs a pass over all boxes for each


TENSORS = ('boxes', 'scores', 'labels')


class Candidates(NamedTuple):
    """boxes (N, 4) xyxy in pixels, scores (N,) and labels (N,) of one image; ``kind``: the classes, in words."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    kind: str
    min_score: float


# --- candidates -------------------------------------------------------------------------------------------------------


def scene_objects(generator: torch.Generator, num: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (num, 2) and sizes (num, 2) in pixels and classes (num,) of a scene's objects, drawn first of all."""
    centres = torch.rand(num, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    sizes = 32 * 12 ** torch.rand(num, 1, generator=generator)  # 32 to 384 px
    sizes = sizes * (0.3 * torch.randn(num, 2, generator=generator)).exp()
    return centres, sizes, torch.randint(num_classes, (num,), generator=generator)


def detector_candidates(
    num: int, num_classes: int, num_proposals: int = 1000, kind: str | None = None, seed: int = 0, num_objects: int = 20
) -> Candidates:
    """The ``num`` candidates of highest score of the scene in the module's docstring."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image = torch.tensor([WIDTH, HEIGHT])
    objects, sizes, classes = scene_objects(generator, num_objects, num_classes)
    nearest = torch.randint(num_objects, (num_proposals,), generator=generator)
    stray = torch.rand(num_proposals, generator=generator) < 0.2
    centres = objects[nearest] + 0.1 * sizes[nearest] * normal(num_proposals, 2)
    centres[stray] = torch.rand(int(stray.sum()), 2, generator=generator) * image
    sides = sizes[nearest] * (0.15 * normal(num_proposals, 2)).exp()

    logits = 1.5 * normal(num_proposals, num_classes + 1) + normal(num_classes + 1)
    logits[torch.arange(num_proposals), classes[nearest]] += torch.where(stray, 0.0, 6.0)
    logits[:, -1] += 4  # background
    scores = logits.softmax(dim=1)[:, :-1].reshape(-1)
    best = scores.topk(min(num, len(scores))).indices.sort().values
    proposal, labels = best // num_classes, best % num_classes

    centres = centres[proposal] + 0.03 * sides[proposal] * normal(len(best), 2)
    half = sides[proposal] * (0.05 * normal(len(best), 2)).exp() / 2
    return _candidates(centres, half, scores[best], labels, kind or f'{num_classes:,}')


def spread_candidates(num: int, seed: int = 0) -> Candidates:
    """One class of small boxes all over the image."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(num, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    half = (5 + 20 * torch.rand(num, 2, generator=generator)) / 2
    scores = 0.01 + 0.99 * torch.rand(num, generator=generator)
    return _candidates(centres, half, scores, torch.zeros(num, dtype=torch.int64), '1 spread')


def _candidates(centres: Tensor, half: Tensor, scores: Tensor, labels: Tensor, kind: str) -> Candidates:
    """Clip to the image, as a detector does; centres are moved inside first, so that no box loses all its area."""
    limit = torch.tensor([WIDTH, HEIGHT], dtype=torch.float32)
    centres = torch.minimum(centres.clamp(min=2), limit - 2)
    boxes = torch.cat([(centres - half).clamp(min=0), torch.minimum(centres + half, limit)], dim=1)
    return Candidates(boxes, scores, labels, kind, min(1e-3, float(scores.min())))


# --- one row ----------------------------------------------------------------------------------------------------------


def calls(
    candidates: Candidates, rule: str, max_num: int, tensorflow: TensorFlow | None = None
) -> dict[str, Callable[[], Any]]:
    """What is timed: ours, and every peer there is."""
    boxes, scores, labels, _, min_score = candidates
    parameters = PARAMETERS[rule]
    ours = {OURS: lambda: soft_nms(boxes, scores, labels, min_score=min_score, max_num=max_num, **parameters)}
    size = (WIDTH, HEIGHT)
    timed = ours | peers(boxes, scores, labels, rule, parameters, min_score, max_num, size, tensorflow)
    if not scores.is_cuda:
        return timed
    return {name: call if hasattr(call, 'seconds') else finished(call) for name, call in timed.items()}


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call until the GPU has done its work, too."""

    def call_and_wait() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return call_and_wait


def check(candidates: Candidates, rule: str, max_num: int, keep: Tensor, scores: Tensor) -> None:
    """Our selection is the reference's, bit for bit (the first CHECKED of it)."""
    limit = CHECKED if max_num < 0 else min(max_num, CHECKED)
    options = {'iou_threshold': 0.3, 'sigma': 0.5, 'offset': 0, **PARAMETERS[rule]}
    params = _soft_nms.check_parameters(min_score=candidates.min_score, max_num=limit, dtype=torch.float32, **options)
    inputs = candidates.boxes.cpu(), candidates.scores.cpu(), candidates.labels.cpu()
    expected_keep, expected_scores = _reference.select(*inputs, params)
    if not (torch.equal(keep[:limit].cpu(), expected_keep) and torch.equal(scores[:limit].cpu(), expected_scores)):
        raise SystemExit(f'{rule}, {candidates.kind} classes, {len(candidates.scores)} candidates: not the reference')


def in_common(keep: Tensor, other: Tensor) -> float:
    """Share of the selections that both made, whatever their order."""
    return len(set(keep.tolist()) & set(other.tolist())) / max(len(keep), len(other), 1)


def in_turns(timed: dict[str, Callable[[], Any]], seconds: float) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each call, and the result of its first, which warms up and is the only one of a slow peer."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    results = {}
    once = set()
    for name, call in timed.items():
        start = time.perf_counter()
        results[name] = call()
        # A peer in another process tells what it took there.
        if (elapsed := getattr(call, 'seconds', time.perf_counter() - start)) > SLOW:
            once.add(name)
            times[name].append(elapsed)
    begin, rounds = time.perf_counter(), 0
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - begin < seconds):
        for name, call in timed.items():
            if name not in once:
                start = time.perf_counter()
                call()
                times[name].append(getattr(call, 'seconds', time.perf_counter() - start))
        rounds += 1
    return times, results


def measure(
    candidates: Candidates,
    rule: str,
    max_num: int,
    seconds: float,
    tensorflow: TensorFlow | None = None,
    left_out: Iterable[str] = (),
) -> dict[str, Any]:
    """One row: median milliseconds of each peer, called in turns, so that a busy moment hits all of them alike."""
    timed = calls(candidates, rule, max_num, tensorflow)
    times, results = in_turns({name: call for name, call in timed.items() if name not in left_out}, seconds)
    keep, scores = results[OURS]
    check(candidates, rule, max_num, keep, scores)
    kept = {name: len(result[0] if name == OURS else result) for name, result in results.items()}
    return {
        'candidates': len(candidates.scores),
        'classes': candidates.kind,
        'rule': rule,
        'max_num': max_num,
        'score_thr': float(candidates.scores.min()),
        'min_score': candidates.min_score,
        'milliseconds': {name: 1e3 * statistics.median(values) for name, values in times.items()},
        'calls': {name: len(values) for name, values in times.items()},
        'kept': kept,
        'too_slow': sorted(set(timed) & set(left_out)),
        'in_common_with_mmcv': (
            in_common(keep, results[mmcv]) if (mmcv := MMCV_HARD if rule == 'hard' else MMCV_SOFT) in results else None
        ),
    }


def ratio(row: dict[str, Any], peer: str) -> float | None:
    """How many times as long the peer takes; below 1, we are the slower ones."""
    times = row['milliseconds']
    return times[peer] / times[OURS] if peer in times else None


# --- the report -------------------------------------------------------------------------------------------------------


def header(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Titles of the columns, and the peers that have one."""
    present = [peer for peer in PEERS if any(peer in row['milliseconds'] for row in rows)]
    return ['candidates', 'classes', 'rule', 'wanted', 'ours', *present, 'same as mmcv'], present


def cells(row: dict[str, Any], present: Iterable[str]) -> list[str]:
    """A row as texts: milliseconds, and for a peer how many times ours that is."""
    times, number = row['milliseconds'], row['calls']
    texts = [
        f'{row["candidates"]:,}',
        row['classes'],
        row['rule'],
        'all' if row['max_num'] < 0 else f'top {row["max_num"]}',
        f'{times[OURS]:.3g}',
    ]
    for peer in present:
        value = ratio(row, peer)
        if value is None:
            texts.append('too slow' if peer in row['too_slow'] else '')
        else:
            time_text = f'{times[peer]:.3g}' if times[peer] < 1000 else f'{times[peer]:,.0f}'
            ratio_text = f'{value:,.0f}x' if value >= 10 else f'{value:.2g}x'
            texts.append(f'{time_text} ({ratio_text}{", once" if number[peer] == 1 else ""})')
    common = row['in_common_with_mmcv']
    return [*texts, '' if common is None else f'{100 * common:.2f} %']


def extremes(rows: list[dict[str, Any]]) -> list[str]:
    """For each peer the worst and the best row, in a line each."""
    lines = []
    for peer in PEERS:
        measured = [(value, row) for row in rows if (value := ratio(row, peer)) is not None]
        for word, (value, row) in (
            ('worst', min(measured, key=lambda pair: pair[0], default=(None, None))),
            ('best', max(measured, key=lambda pair: pair[0], default=(None, None))),
        ):
            if value is not None and row is not None:
                what = ', '.join(cells(row, [])[2:4])
                lines.append(
                    f'{word} against {peer}: {value:.3g}x ({row["candidates"]:,} candidates, {row["classes"]} classes, '
                    f'{what}: {row["milliseconds"][OURS]:.3g} ms against {row["milliseconds"][peer]:.3g} ms)'
                )
    return lines


def machine() -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or directories."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line.split(':', 1)[1].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        model = names[0] if names else model
    return {
        'cpu': model,
        'cores': os.cpu_count(),
        'load_at_start': round(os.getloadavg()[0], 2),
        'torch_threads': torch.get_num_threads(),
        'python': platform.python_version(),
        **{name: _version(name) for name in ('torch', 'numba', 'numpy', 'ensemble-boxes')},
        'mmcv': _mmcv_version(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return 'unknown'


def _mmcv_version() -> str:
    """By whatever name it was installed."""
    import mmcv

    name = next(iter(metadata.packages_distributions().get('mmcv', ['mmcv'])))
    return f'{name} {mmcv.__version__}'


DIFFERENCES = (
    'Milliseconds are medians of calls made in turns, behind them the ratio to ours: above 1, ours is faster. "once": '
    f'a single call, because it took more than {SLOW:.0f} s; "too slow": not called, because it took more than '
    f'{TOO_SLOW:.0f} s on fewer candidates.',
    '"same as mmcv": share of the selections that mmcv\'s op of the same rule also makes. Its class offset shifts '
    'IoUs; its soft_nms decays at IoU >= threshold; below 10,000 candidates all classes are one O(N^2) pass.',
    'Checked in every row: our selection and scores equal the plain PyTorch reference on the CPU bit for bit '
    f'(the first {CHECKED:,} of them).',
    *(f'{peer}: {remark}' for peer, remark in REMARKS.items()),
)


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = ['# soft_nms', '', ', '.join(f'{key} {value}' for key, value in about.items()), '']
    titles, present = header(rows)
    lines += ['| ' + ' | '.join(titles) + ' |', '|' + '---|' * len(titles)]
    lines += ['| ' + ' | '.join(cells(row, present)) + ' |' for row in rows]
    lines += ['', *(f'- {line}' for line in extremes(rows)), '', *(f'- {line}' for line in DIFFERENCES), '']
    lines += ['Candidates, from `tools/benchmark.py`:', '', (__doc__ or '').split('\n\n', 1)[1]]
    return '\n'.join(lines)


def show(rows: list[dict[str, Any]], about: dict[str, Any], console: Console) -> None:
    titles, present = header(rows)
    table = Table(*titles, title='soft_nms', caption=', '.join(f'{k} {v}' for k, v in about.items()))
    for column in table.columns[4:]:
        column.justify = 'right'
    for row in rows:
        table.add_row(*cells(row, present))
    console.print(table)
    for line in (*extremes(rows), '', *DIFFERENCES):
        console.print(line, highlight=False, markup=False)


def write(path: Path, text: str) -> None:
    """All or nothing: an interrupted run leaves the earlier file."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- position-sensitive RoI pooling -----------------------------------------------------------------------------------


class NaivePool(torch.autograd.Function):
    """The definition as a loop: a slice for each RoI and bin, all channels at once, and its gradient the same way."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, rois: Tensor, kind: str) -> Tensor:
        edges = _caffe_edges if kind == 'caffe' else _torchvision_edges
        columns = edges(rois[:, 1], rois[:, 3], 7, 1 / 16, maps.shape[3]).tolist()
        rows = edges(rois[:, 2], rois[:, 4], 7, 1 / 16, maps.shape[2]).tolist()
        ctx.bins = [
            (r, image, i, j, top, bottom, left, right)
            for r, image in enumerate(rois[:, 0].int().tolist())
            for i, (top, bottom) in enumerate(rows[r])
            for j, (left, right) in enumerate(columns[r])
            if bottom > top and right > left
        ]
        ctx.shape = maps.shape
        grouped = maps.unflatten(1, (-1, 7, 7))
        pooled = maps.new_zeros(len(rois), grouped.shape[1], 7, 7)
        for r, image, i, j, top, bottom, left, right in ctx.bins:
            pooled[r, :, i, j] = grouped[image, :, i, j, top:bottom, left:right].mean((1, 2))
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        to_maps = grads[0].new_zeros(ctx.shape)
        grouped = to_maps.unflatten(1, (-1, 7, 7))
        for r, image, i, j, top, bottom, left, right in ctx.bins:
            share = grads[0][r, :, i, j] / ((bottom - top) * (right - left))
            grouped[image, :, i, j, top:bottom, left:right] += share[:, None, None]
        return to_maps, None, None


def naive_pool(maps: Tensor, rois: Tensor, kind: str) -> Tensor:
    return NaivePool.apply(maps, rois, kind)


def forward_and_backward(pool: Callable[[], Tensor], maps: Tensor) -> Tensor:
    maps.grad = None
    pooled = pool()
    pooled.sum().backward()
    return pooled.detach()


def run_pool(arguments: argparse.Namespace) -> None:
    try:
        from torchvision.ops import ps_roi_pool as torchvision_pool
    except ImportError:
        torchvision_pool = None
    torch.manual_seed(0)
    maps = torch.randn(1, 21 * 49, 38, 63, requires_grad=True)
    centres, sizes = torch.rand(300, 2) * torch.tensor([1000.0, 600.0]), torch.rand(300, 2) * 300 + 16
    rois = torch.cat([torch.zeros(300, 1), centres - sizes / 2, centres + sizes / 2], dim=1)
    table = Table('kind', 'pass', 'ours, ms', 'naive, ms', 'ratio', 'torchvision, ms', 'ratio')
    for kind in KINDS:
        pools: dict[str, Callable[[], Tensor]] = {OURS: partial(ps_roi_pool, maps, rois, kind=kind)}
        if kind in ('caffe', 'torchvision'):
            pools['naive'] = partial(naive_pool, maps, rois, kind)
        if kind == 'torchvision' and torchvision_pool is not None:
            pools['torchvision'] = partial(torchvision_pool, maps, rois, 7, 1 / 16)
        both: dict[str, Callable[[], Tensor]] = {
            key: partial(forward_and_backward, each, maps) for key, each in pools.items()
        }
        for name, timed in (('forward', pools), ('forward and backward', both)):
            times, results = in_turns(timed, arguments.seconds)
            for other in results.values():
                torch.testing.assert_close(other, results[OURS], rtol=1e-4, atol=1e-5)
            medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
            peers = [
                text
                for peer in ('naive', 'torchvision')
                for text in (
                    (f'{medians[peer]:.1f}', f'{medians[peer] / medians[OURS]:.2g}x') if peer in medians else ('', '')
                )
            ]
            table.add_row(kind, name, f'{medians[OURS]:.1f}', *peers)
    about = machine()
    table.caption = 'VOC: 21 x 7 x 7 maps of 38 x 63, 300 RoIs, one image; ' + ', '.join(
        f'{key} {about[key]}' for key in ('cpu', 'torch_threads', 'load_at_start', 'torch')
    )
    if torchvision_pool is None:
        table.caption += '; torchvision is not installed'
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


# --- command line -----------------------------------------------------------------------------------------------------


# --- stage and growth -------------------------------------------------------------------------------------------------


def run_stage(arguments: argparse.Namespace) -> None:
    """mmdet's post-processing stage with hard NMS, and ours."""
    rows = []
    for score_thr in arguments.score_thr:
        timed = stages(score_thr)
        times, results = in_turns(timed, arguments.seconds)
        candidates = len(results[PARTS[1]])
        medians = {name: median(values) for name, values in times.items()}
        rows.append(dict(score_thr=score_thr, candidates=candidates, milliseconds=medians))
    names = list(rows[0]['milliseconds'])
    table = Table(
        'score_thr', 'candidates', *names, title='one image, 1,000 proposals, 80 classes, ms (ratio to mmdet)'
    )
    for row in rows:
        stock = row['milliseconds'][STOCK]
        cells_of = [
            f'{value:.2f}' + (f' ({stock / value:.2f}x)' if name.startswith('ours') else '')
            for name, value in row['milliseconds'].items()
        ]
        table.add_row(f'{row["score_thr"]:g}', f'{row["candidates"]:,}', *cells_of)
    Console(width=180).print(table)
    _finish(arguments, 'stage', rows)


def run_growth(arguments: argparse.Namespace) -> None:
    """Time and memory against one size at a time, and the exponents."""
    num = arguments.largest
    sizes = [num // 4**step for step in range(6, -1, -1)]
    scenes_of: dict[str, list[tuple[int, Candidates, int]]] = {
        'candidates, 80 classes, top 100': [
            (size, detector_candidates(size, 80, num_proposals=max(1000, 5 * size // 320)), 100) for size in sizes
        ],
        'candidates, 80 classes, all': [
            (size, detector_candidates(size, 80, num_proposals=max(1000, 5 * size // 320)), -1) for size in sizes
        ],
        'candidates, 1 crowded class, top 100': [
            (size, detector_candidates(size, 1, num_proposals=size), 100) for size in sizes
        ],
        'candidates, 1 crowded class, all': [
            (size, detector_candidates(size, 1, num_proposals=size), -1) for size in sizes[:-1]
        ],
        'classes, 20,000 candidates, top 100': [
            (size, detector_candidates(20_000, size, num_proposals=max(1000, 25_000 // size)), 100)
            for size in (1, 4, 20, 80, 320, 1203)
        ],
        'max_num, 20,000 candidates, 80 classes': [
            (size, detector_candidates(20_000, 80), size) for size in (10, 40, 160, 640, 2560, 10240)
        ],
    }
    rows: list[dict[str, Any]] = []
    for name, scenes_here in scenes_of.items():
        milliseconds, memory, reading = [], [], []
        for _, one, max_num in scenes_here:
            timed = calls(one, 'gaussian', max_num)
            milliseconds.append(median(in_turns({OURS: timed[OURS]}, arguments.seconds)[0][OURS]))
            memory.append(peak_bytes(one.boxes, one.scores, one.labels, max_num))
            reading.append(median(in_turns({'read': one.scores.max}, arguments.seconds / 10)[0]['read']))
        measured = [size for size, _, _ in scenes_here]
        rows.append(
            dict(
                name=name,
                sizes=measured,
                candidates=[len(one.scores) for _, one, _ in scenes_here],
                milliseconds=milliseconds,
                bytes=memory,
                reading_the_scores_once=reading,
                exponent=exponent(measured, milliseconds),
                exponent_of_the_last=exponent(measured[-3:], milliseconds[-3:]),
                exponent_of_memory=(
                    exponent(measured[-3:], [float(value) for value in memory[-3:] if value]) if all(memory) else None
                ),
            )
        )
    titles = (
        'grows',
        'sizes',
        'ms',
        'peak MiB',
        'exponent',
        'of the last three',
        'of memory',
        'ns a candidate',
        'reading its score',
    )
    table = Table(*titles, title='gaussian, one image; the last two columns for the largest size')
    for row in rows:
        table.add_row(
            row['name'],
            *(' '.join(texts) for texts in (
                [f'{size:,}' for size in row['sizes']],
                [f'{value:.3g}' for value in row['milliseconds']],
                ['?' if value is None else f'{value / 2**20:.1f}' for value in row['bytes']],
            )),
            f'{row["exponent"]:.2f}',
            f'{row["exponent_of_the_last"]:.2f}',
            '?' if row['exponent_of_memory'] is None else f'{row["exponent_of_memory"]:.2f}',
            f'{1e6 * row["milliseconds"][-1] / row["candidates"][-1]:.2g}',
            f'{1e6 * row["reading_the_scores_once"][-1] / row["candidates"][-1]:.2g}',
        )  # fmt: skip
    Console(width=240).print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot_growth(rows, arguments.out / 'benchmark_growth.svg')
    _finish(arguments, 'growth', rows)


def one_by_one(boxes: list[Tensor], scores: list[Tensor], labels: list[Tensor], max_num: int) -> list[Any]:
    return [soft_nms(*image, max_num=max_num) for image in zip(boxes, scores, labels, strict=True)]


def run_serving(arguments: argparse.Namespace) -> None:
    """New processes, and batches of images."""
    start = startup(FEWEST_ROUNDS)
    rows: list[dict[str, Any]] = []
    table = Table(
        'candidates x classes of an image', 'wanted', 'images', 'one by one, ms', 'batched, ms', title='gaussian'
    )
    for num, max_num in ((1000, 100), (10_000, 100), (10_000, -1)):
        images = [detector_candidates(num, 80, seed=seed) for seed in range(max(arguments.images))]
        for size in arguments.images:
            boxes, scores, labels = ([getattr(image, name) for image in images[:size]] for name in TENSORS)
            timed: dict[str, Callable[[], Any]] = {
                'one by one': partial(one_by_one, boxes, scores, labels, max_num),
                'batched': partial(batched_soft_nms, boxes, scores, labels, max_num=max_num),
            }
            medians = {name: median(times) for name, times in in_turns(timed, arguments.seconds)[0].items()}
            rows.append(dict(candidates=num, classes=80, max_num=max_num, images=size, milliseconds=medians))
            alone, batch = medians['one by one'], medians['batched']
            wanted = 'all' if max_num < 0 else f'top {max_num}'
            table.add_row(f'{num:,} x 80', wanted, str(size), f'{alone:.3g}', f'{batch:.3g} ({alone / batch:.2f}x)')
    table.caption = 'a new process: ' + ', '.join(f'{name} {value:.3g} s' for name, value in start.items())
    Console(width=120).print(table)
    _finish(arguments, 'serving', [{'seconds': start}, *rows])


def _finish(arguments: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> None:
    about = machine()
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write(arguments.out / f'benchmark_{name}.json', json.dumps({'machine': about, 'rows': rows}, indent=1))


# --- sweep ------------------------------------------------------------------------------------------------------------


def run_sweep(arguments: argparse.Namespace) -> None:
    """Draw a test set, store its candidates, and sweep over them, timing each part."""
    import tempfile

    from mmengine.structures import InstanceData

    from mmdet_softnms.reevaluation.candidates.store import CandidateStore, ImageCandidates
    from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
    from mmdet_softnms.reevaluation.scoring.settings import Setting
    from mmdet_softnms.reevaluation.scoring.sweep import evaluate_all
    from mmdet_softnms.rules import HardNMS, SoftNMS

    num_classes = 80
    annotations: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        store = CandidateStore.create(Path(folder) / 'store', {'drawn': True}, arguments.images, 64)
        task = progress.add_task('drawing', total=arguments.images)
        writing = 0.0
        for shard in range(store.num_shards):
            images = []
            for number in store.images_of(shard):
                drawn = detector_candidates(arguments.candidates, num_classes, seed=number, num_objects=7)
                found = InstanceData(bboxes=drawn.boxes, scores=drawn.scores, labels=drawn.labels)
                images.append(ImageCandidates(number + 1, (HEIGHT, WIDTH), found))
                objects = scene_objects(torch.Generator().manual_seed(number), 7, num_classes)
                for centre, size, label in zip(*objects, strict=True):
                    low = (centre - size / 2).clamp(min=0)
                    width, height = (torch.minimum(centre + size / 2, torch.tensor([WIDTH, HEIGHT])) - low).tolist()
                    annotations.append(
                        dict(id=len(annotations) + 1, image_id=number + 1, category_id=int(label) + 1, iscrowd=0,
                             bbox=[*low.tolist(), width, height], area=width * height)
                    )  # fmt: skip
                progress.advance(task)
            start = time.perf_counter()
            store.write(shard, images)
            writing += time.perf_counter() - start
        image_ids = list(range(1, arguments.images + 1))
        coco = dict(
            images=[dict(id=image_id) for image_id in image_ids],
            annotations=annotations,
            categories=[dict(id=number, name=str(number)) for number in range(1, num_classes + 1)],
        )
        truth = GroundTruth(
            tuple(map(str, range(1, num_classes + 1))), coco, image_ids, list(range(1, num_classes + 1))
        )
        rules: list[SoftNMS] = [HardNMS(0.5)]
        for number in range(1, arguments.settings):
            value = round(number / arguments.settings, 4)
            rules.append(SoftNMS('gaussian', sigma=value) if number % 2 else SoftNMS('linear', iou_threshold=value))
        settings = [Setting(rule, 1e-3, 100) for rule in rules]
        start = time.perf_counter()
        assert not store.check()
        candidates = store.load()
        reading = time.perf_counter() - start
        task = progress.add_task('settings', total=arguments.settings)
        rows = evaluate_all(
            candidates,
            settings,
            truth,
            processes=arguments.processes,
            on_row=lambda row, done, total: progress.update(task, completed=done),
        )
        wall = time.perf_counter() - start
        bytes_each = store.num_bytes / candidates.num_candidates
    suppression, metric = sum(row.seconds for row in rows), sum(row.metric_seconds for row in rows)
    cpu = reading + suppression + metric
    about = machine()
    result = dict(
        images=arguments.images,
        objects=len(annotations),
        candidates=candidates.num_candidates,
        settings=arguments.settings,
        bytes_per_candidate=bytes_each,
        writing_seconds=writing,
        wall_seconds=wall,
        reading_seconds=reading,
        suppression_seconds=suppression,
        metric_seconds=metric,
    )
    table = Table(title=f'{arguments.settings} settings over {arguments.images:,} images', show_header=False)
    table.add_row('candidates', f'{candidates.num_candidates:,}; {bytes_each:.2f} bytes each in the store')
    table.add_row('whole sweep', f'{wall:.1f} s')
    table.add_row('reading and checking', f'{reading:.2f} s, {100 * reading / cpu:.1f} % of the work')
    table.add_row('suppression', f'{suppression / len(rows):.2f} s a setting, {100 * suppression / cpu:.1f} %')
    table.add_row('metrics', f'{metric / len(rows):.2f} s a setting, {100 * metric / cpu:.1f} %')
    Console(width=120).print(table)
    print('; '.join(f'{name} {value}' for name, value in about.items()))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write(arguments.out / 'benchmark_sweep.json', json.dumps({'machine': about, 'sweep': result}, indent=1))


def require_peers() -> None:
    """One clear line instead of a traceback from inside a package."""
    try:
        import mmcv.ops  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f'benchmark op compares with mmcv and its compiled ops, which cannot be imported ({error}). '
            'Install mmcv (or onedl-mmcv) with pip install --no-build-isolation after torch.'
        ) from None
    try:
        import ensemble_boxes  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f'benchmark op compares with ensemble-boxes, which cannot be imported ({error}). '
            "Install it with: pip install 'mmdet_softnms[bench]'"
        ) from None


def scenes(arguments: argparse.Namespace) -> Iterable[Candidates]:
    """From few candidates to many, so that who is too slow is known before it hurts."""
    for num_classes in arguments.classes:
        for num in sorted(arguments.sizes):
            # A proposal has one candidate for each class; a quarter more than needed, so that a threshold does the cut.
            yield detector_candidates(num, num_classes, num_proposals=max(1000, 5 * num // (4 * num_classes)))
    for num in sorted(arguments.dense):
        yield detector_candidates(num, 1, num_proposals=num, kind='1 dense')
    for num in sorted(arguments.dense):
        yield spread_candidates(num)


def run_op(arguments: argparse.Namespace) -> None:
    require_peers()
    if arguments.out:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        except OSError as error:
            raise SystemExit(f'--out {arguments.out}: {error.strerror}') from None
    device = torch.device(arguments.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise SystemExit(f'--device {device}: this torch ({torch.__version__}) sees no GPU; leave the option out')
    about = machine() | {'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}
    everything = [one._replace(**{key: getattr(one, key).to(device) for key in TENSORS}) for one in scenes(arguments)]
    rows: list[dict[str, Any]] = []
    tensorflow = TensorFlow(arguments.tensorflow) if arguments.tensorflow else None
    if tensorflow is not None:
        about['tensorflow'] = tensorflow.version
    console = Console()
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task('', total=len(everything) * len(PARAMETERS) * len(arguments.wanted))
        for candidates in everything:
            for rule in PARAMETERS:
                for max_num in arguments.wanted:
                    progress.update(task, description=f'{len(candidates.scores):,} x {candidates.kind}, {rule}')
                    alike = [row for row in rows if _kind(row) == (candidates.kind, rule, max_num)]
                    slow = {
                        peer
                        for row in alike
                        for peer in PEERS
                        if peer in row['too_slow'] or row['milliseconds'].get(peer, 0) > 1e3 * TOO_SLOW
                    }
                    rows.append(measure(candidates, rule, max_num, arguments.seconds, tensorflow, slow))
                    progress.advance(task)
                    if not console.is_terminal:  # no bar to watch there
                        print(' | '.join(cells(rows[-1], PEERS)), flush=True)
    if tensorflow is not None:
        tensorflow.close()
    about['load_at_end'] = round(os.getloadavg()[0], 2)
    show(rows, about, console if console.is_terminal else Console(width=200))
    if arguments.out:
        write(arguments.out / 'benchmark_op.json', json.dumps({'machine': about, 'rows': rows}, indent=1))
        write(arguments.out / 'benchmark_op.md', markdown(rows, about))
        plot_peers(rows, [OURS, *header(rows)[1]], arguments.out / 'benchmark_op.svg')


def _kind(row: dict[str, Any]) -> tuple[str, str, int]:
    return row['classes'], row['rule'], row['max_num']


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f'{value} is not positive')
    return value


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(required=True, metavar='COMMAND')
    op = commands.add_parser('op', help='the operator on the CPU against all others')
    sizes = [100, 1000, 10000, 100000]
    op.add_argument('--sizes', type=positive, nargs='+', default=sizes, help='candidates')
    op.add_argument('--classes', type=positive, nargs='+', default=[20, 80, 1203], help='classes')
    op.add_argument('--dense', type=positive, nargs='*', default=sizes, help='candidates of the two one-class scenes')
    op.add_argument('--wanted', type=int, nargs='+', default=[100, 300, -1], help='max_num; -1: no limit')
    op.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='where the candidates are (default: cpu)')
    op.add_argument('--tensorflow', metavar='PYTHON', help='interpreter of an environment that has TensorFlow')
    op.add_argument('--seconds', type=float, default=2.0, help='time to spend on a row, at least (default: 2)')
    op.add_argument('--out', type=Path, metavar='DIR', help='write benchmark_op.md and benchmark_op.json there')
    op.set_defaults(run=run_op)
    pool = commands.add_parser('pool', help='position-sensitive RoI pooling against the naive form and torchvision')
    pool.add_argument('--seconds', type=float, default=2.0, help='time to spend on a row, at least (default: 2)')
    pool.set_defaults(run=run_pool)
    stage = commands.add_parser('stage', help="logits to detections, against mmdet's own stage with hard NMS")
    stage.add_argument('--score-thr', type=float, nargs='+', default=[0.05, 0.01, 1e-3, 1e-4], help='thresholds')
    stage.set_defaults(run=run_stage)
    growth = commands.add_parser('growth', help='time and memory against sizes, with fitted exponents')
    growth.add_argument('--largest', type=positive, default=102_400, help='candidates (default: 102,400)')
    growth.set_defaults(run=run_growth)
    serving = commands.add_parser('serving', help='import, warmup(), and batches of images')
    serving.add_argument('--images', type=positive, nargs='+', default=[1, 2, 4, 8, 16], help='in a batch')
    serving.set_defaults(run=run_serving)
    for command in (stage, growth, serving):
        command.add_argument('--seconds', type=float, default=1.0, help='time to spend on a point (default: 1)')
        command.add_argument('--out', type=Path, metavar='DIR', help='write benchmark_COMMAND.json there')
    sweep = commands.add_parser('sweep', help='many settings over the stored candidates of a test set')
    sweep.add_argument('--images', type=positive, default=5000, help='of the drawn test set (default: 5000)')
    sweep.add_argument('--candidates', type=positive, default=1500, help='of each image (default: 1500)')
    sweep.add_argument('--settings', type=positive, default=50, help='to sweep over (default: 50)')
    sweep.add_argument('--processes', type=positive, help='default: one a core')
    sweep.add_argument('--out', type=Path, metavar='DIR', help='write benchmark_sweep.json there')
    sweep.set_defaults(run=run_sweep)
    return result


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    warmup()  # otherwise the first row's first call may compile the kernels, and count as a slow peer
    options.run(options)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('interrupted; nothing was written')
