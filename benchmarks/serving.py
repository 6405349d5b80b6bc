"""``serving``: what a new process waits for (import, ``warmup()``), and batches of images."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.drawn import TENSORS, detector_candidates
from benchmarks.timing import FEWEST_ROUNDS, finish, in_turns, median
from mmdet_softnms import batched_soft_nms, soft_nms

WARMUP = 'mmdet_softnms.warmup()'


def one_by_one(boxes: list[Tensor], scores: list[Tensor], labels: list[Tensor], max_num: int) -> list[Any]:
    return [soft_nms(*image, max_num=max_num) for image in zip(boxes, scores, labels, strict=True)]


def run(arguments: argparse.Namespace) -> None:
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
    finish(arguments, [{'seconds': start}, *rows])


def startup(runs: int) -> dict[str, float]:
    """Median seconds of new processes: the import after torch's, the first ``warmup()``, with and without its cache."""
    program = (
        'import time, torch; start = time.perf_counter(); import mmdet_softnms; imported = time.perf_counter(); '
        f'{WARMUP}; print(imported - start, time.perf_counter() - imported)'
    )
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parents[1])}

    def run(cache: str) -> list[float]:
        here = environment | {'NUMBA_CACHE_DIR': cache}
        done = subprocess.run([sys.executable, '-c', program], env=here, check=True, capture_output=True, text=True)
        return [float(value) for value in done.stdout.split()]

    with tempfile.TemporaryDirectory() as cache:
        compiled = run(cache)[1]
        imports, warm = zip(*(run(cache) for _ in range(runs)), strict=True)
    return {
        'import, after torch': statistics.median(imports),
        'warmup, from the disk cache': statistics.median(warm),
        'warmup, compiled': compiled,
    }
