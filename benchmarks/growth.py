"""``growth``: time and memory of the operator against candidates, classes and ``max_num``, with fitted exponents."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.drawn import Candidates, detector_candidates
from benchmarks.memory import peak_bytes
from benchmarks.op import calls
from benchmarks.plots import plot_growth
from benchmarks.timing import OURS, finish, in_turns, median


def run(arguments: argparse.Namespace) -> None:
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
    finish(arguments, rows)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of a line through the logarithms: 1 is linear growth, 2 quadratic."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
