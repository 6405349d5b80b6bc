"""The plots of the benchmarks ``op`` and ``growth``, on log axes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: The row kinds of ``op`` that the plot shows: the usual one, and the worst for us.
SHOWN = (('80', 'gaussian', 100), ('1 dense', 'gaussian', -1))
TITLES = ('80 classes, the best 100 wanted', '1 crowded class, all wanted: our worst case')


def plot_peers(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Milliseconds over candidates, a line a peer (``names``, ours first); what was not measured is left out."""
    figure = Figure(figsize=(10, 4), layout='constrained')
    all_axes = figure.subplots(1, 2, sharey=True)
    for axes, kind, title in zip(all_axes, SHOWN, TITLES, strict=True):
        alike = sorted(
            (row for row in rows if (row['classes'], row['rule'], row['max_num']) == kind),
            key=lambda row: row['candidates'],
        )
        for number, name in enumerate(names):
            points = [(row['candidates'], row['milliseconds'][name]) for row in alike if name in row['milliseconds']]
            style = {'color': 'black', 'linewidth': 2.5, 'zorder': 3} if number == 0 else {'color': f'C{number - 1}'}
            axes.plot(*zip(*points, strict=True) if points else ([], []), 'o-', markersize=4, label=name, **style)
        _logarithmic(axes, title, 'candidates', 'ms')
    all_axes[0].legend(fontsize=8)
    _save(figure, path)


def plot_growth(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds and peak megabytes over each size that grew, with the fitted exponents in the legend."""
    figure = Figure(figsize=(10, 4.5), layout='constrained')
    time_axes, memory_axes = figure.subplots(1, 2)
    for row in rows:
        label = f'{row["name"]}: {row["exponent"]:.2f}, at the end {row["exponent_of_the_last"]:.2f}'
        time_axes.plot(row['sizes'], row['milliseconds'], 'o-', markersize=4, label=label)
        known = [(size, value / 2**20) for size, value in zip(row['sizes'], row['bytes'], strict=True) if value]
        memory_axes.plot(*zip(*known, strict=True) if known else ([], []), 'o-', markersize=4)
    _logarithmic(time_axes, 'time', 'number', 'ms')
    _logarithmic(memory_axes, 'memory beyond the input', 'number', 'MiB')
    figure.legend(
        *time_axes.get_legend_handles_labels(),
        loc='outside lower center',
        ncols=2,
        fontsize=8,
        title='exponents of time',
    )
    _save(figure, path)


def _logarithmic(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(xscale='log', yscale='log', title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    with rc_context({'svg.hashsalt': 'mmdet_softnms'}):  # the same numbers, the same file
        figure.savefig(path, metadata={'Date': None})
