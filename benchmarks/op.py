"""``op``: the operator against its alternatives, all on the same candidates, in one run, in turns."""

import argparse
import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import drawn
from benchmarks.drawn import HEIGHT, TENSORS, WIDTH, Candidates, detector_candidates, spread_candidates
from benchmarks.peers import ENSEMBLE, MMCV_HARD, MMCV_SOFT, PEERS, REMARKS, TensorFlow, definition, missing, peers
from benchmarks.timing import CLOCKS, OURS, SLOW, check_device, finished, in_turns, machine
from mmdet_softnms import soft_nms
from mmdet_softnms.files import write_json, write_whole

PARAMETERS: dict[str, dict[str, Any]] = {
    'gaussian': {'method': 'gaussian', 'sigma': 0.5},
    'linear': {'method': 'linear', 'iou_threshold': 0.3},
    'hard': {'method': 'hard', 'iou_threshold': 0.5},
}
TOO_SLOW = 1.0  # seconds; a peer that took longer on fewer candidates of the same kind is not called at all
CHECKED = 2000  # selections compared with the reference, which needs a pass over all boxes for each


def calls(
    candidates: Candidates, rule: str, max_num: int, tensorflow: TensorFlow | None = None
) -> dict[str, Callable[[], Any]]:
    """What is timed: ours, and every peer there is."""
    boxes, scores, labels, _, min_score = candidates
    parameters = PARAMETERS[rule]
    ours = {OURS: lambda: soft_nms(boxes, scores, labels, min_score=min_score, max_num=max_num, **parameters)}
    size = (WIDTH, HEIGHT)
    timed = ours | peers(boxes, scores, labels, rule, parameters, min_score, max_num, size, tensorflow)
    return {name: finished(call) for name, call in timed.items()} if scores.is_cuda else timed


def check(candidates: Candidates, rule: str, max_num: int, keep: Tensor, scores: Tensor) -> None:
    """Our selection is the reference's, bit for bit (the first CHECKED of it)."""
    limit = CHECKED if max_num < 0 else min(max_num, CHECKED)
    inputs = candidates.boxes.cpu(), candidates.scores.cpu(), candidates.labels.cpu()
    expected_keep, expected_scores = definition(*inputs, PARAMETERS[rule], candidates.min_score, limit)
    if not (torch.equal(keep[:limit].cpu(), expected_keep) and torch.equal(scores[:limit].cpu(), expected_scores)):
        raise SystemExit(f'{rule}, {candidates.kind} classes, {len(candidates.scores)} candidates: not the reference')


def in_common(keep: Tensor, other: Tensor) -> float:
    """Share of the selections that both made, whatever their order."""
    return len(set(keep.tolist()) & set(other.tolist())) / max(len(keep), len(other), 1)


def measure(
    candidates: Candidates,
    rule: str,
    max_num: int,
    seconds: float,
    tensorflow: TensorFlow | None = None,
    left_out: Iterable[str] = (),
    clock: str = 'wall',
) -> dict[str, Any]:
    """One row: median milliseconds of each peer, called in turns, so that a busy moment hits all of them alike."""
    timed = calls(candidates, rule, max_num, tensorflow)
    times, results = in_turns(
        {name: call for name, call in timed.items() if name not in left_out}, seconds, CLOCKS[clock]
    )
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
    lines += ['Candidates, from `benchmarks/drawn.py`:', '', (drawn.__doc__ or '').split('\n\n', 1)[1]]
    return '\n'.join(lines)


def show(rows: list[dict[str, Any]], about: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    titles, present = header(rows)
    table = Table(*titles, title='soft_nms', caption=', '.join(f'{k} {v}' for k, v in about.items()))
    for column in table.columns[4:]:
        column.justify = 'right'
    for row in rows:
        table.add_row(*cells(row, present))
    console.print(table)
    for line in (*extremes(rows), '', *DIFFERENCES):
        console.print(line, highlight=False, markup=False)


def require_peers() -> None:
    """One clear line instead of a traceback from inside a package."""
    remedies = {
        MMCV_HARD: 'Install mmcv (or onedl-mmcv) with pip install --no-build-isolation after torch.',
        ENSEMBLE: "Install it, in the clone: pip install '.[bench]'",
    }
    absent = missing(torch.device('cpu'))
    for peer, remedy in remedies.items():
        if peer in absent:
            raise SystemExit(f'benchmark op compares with {peer}, which cannot be used ({absent[peer]}). {remedy}')


def scenes(sizes: Sequence[int], classes: Sequence[int], dense: Sequence[int]) -> Iterator[Candidates]:
    """From few candidates to many, so that who is too slow is known before it hurts."""
    for num_classes in classes:
        for num in sorted(sizes):
            # A proposal has one candidate for each class; a quarter more than needed, so that a threshold does the cut.
            yield detector_candidates(num, num_classes, num_proposals=max(1000, 5 * num // (4 * num_classes)))
    for num in sorted(dense):
        yield detector_candidates(num, 1, num_proposals=num, kind='1 dense')
    for num in sorted(dense):
        yield spread_candidates(num)


def run(arguments: argparse.Namespace) -> None:
    """Measure, with a bar; show and write."""
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    from benchmarks.plots import plot_peers

    require_peers()
    if arguments.out:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        except OSError as error:
            raise SystemExit(f'--out {arguments.out}: {error.strerror}') from None
    device = torch.device(arguments.device)
    check_device(device)
    if arguments.clock == 'cpu' and (arguments.tensorflow or device.type != 'cpu'):
        raise SystemExit('--clock cpu counts this process alone; leave out --tensorflow and --device')
    about = machine() | {'device': device_name(device), 'clock': arguments.clock}
    tensorflow = TensorFlow(arguments.tensorflow) if arguments.tensorflow else None
    if tensorflow is not None:
        about['tensorflow'] = tensorflow.version
    console = Console()
    rows: list[dict[str, Any]] = []
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task('', total=None)
        for row, done, total in measure_all(
            scenes(arguments.sizes, arguments.classes, arguments.dense),
            arguments.wanted,
            device,
            arguments.seconds,
            tensorflow,
            arguments.clock,
        ):
            rows.append(row)
            words = f'{row["candidates"]:,} x {row["classes"]}, {row["rule"]}'
            progress.update(task, description=words, completed=done, total=total)
            if not console.is_terminal:  # no bar to watch there
                print(' | '.join(cells(row, PEERS)), flush=True)
    if tensorflow is not None:
        tensorflow.close()
    about['load_at_end'] = round(os.getloadavg()[0], 2)
    show(rows, about, console if console.is_terminal else Console(width=200))
    if arguments.out:
        write_json(arguments.out / 'benchmark_op.json', {'machine': about, 'rows': rows})
        write_whole(arguments.out / 'benchmark_op.md', markdown(rows, about).encode())
        plot_peers(rows, [OURS, *header(rows)[1]], arguments.out / 'benchmark_op.svg')


def device_name(device: torch.device) -> str:
    """What the table says of it."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'


def measure_all(
    everything: Iterable[Candidates],
    wanted: Sequence[int],
    device: torch.device,
    seconds: float,
    tensorflow: TensorFlow | None = None,
    clock: str = 'wall',
) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Row after row, with how many are done and how many there are."""
    there = [scene._replace(**{key: getattr(scene, key).to(device) for key in TENSORS}) for scene in everything]
    cases = list(itertools.product(there, PARAMETERS, wanted))
    rows: list[dict[str, Any]] = []
    for number, (candidates, rule, max_num) in enumerate(cases, start=1):
        slow = {
            peer
            for row in rows
            for peer in PEERS
            if _kind(row) == (candidates.kind, rule, max_num)
            and (peer in row['too_slow'] or row['milliseconds'].get(peer, 0) > 1e3 * TOO_SLOW)
        }
        rows.append(measure(candidates, rule, max_num, seconds, tensorflow, slow, clock))
        yield rows[-1], number, len(cases)


def _kind(row: dict[str, Any]) -> tuple[str, str, int]:
    return row['classes'], row['rule'], row['max_num']
