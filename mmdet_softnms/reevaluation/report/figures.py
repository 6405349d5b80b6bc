"""Plots of the report, each with words for those who cannot see it; readable on a light and on a dark page."""

import base64
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.report.table import baseline_row
from mmdet_softnms.reevaluation.scoring.errors import KINDS
from mmdet_softnms.reevaluation.scoring.metrics import AP_NAMES, IOU_THRS, RECALLS
from mmdet_softnms.reevaluation.scoring.settings import baseline_in_words, varied_thresholds
from mmdet_softnms.reevaluation.scoring.sweep import Row

#: Colours of Okabe and Ito (2008), which people with any kind of colour blindness can tell apart.
BLUE, ORANGE, GREEN = '#0072b2', '#d55e00', '#009e73'
_INK = '#010203'  # stands for the page's text colour, see svg_url
_STYLE: dict[Any, Any] = {
    'font.size': 10,
    'text.color': _INK,
    'axes.labelcolor': _INK,
    'axes.edgecolor': _INK,
    'axes.facecolor': 'none',
    'axes.titlesize': 10,
    'figure.facecolor': 'none',
    'savefig.facecolor': 'none',
    'xtick.color': _INK,
    'ytick.color': _INK,
    'legend.fontsize': 9,
    'legend.frameon': False,
    'svg.hashsalt': 'mmdet_softnms',
    'hatch.linewidth': 0.8,
}
_MAX_BARS = 40  # classes in the bar chart; beyond, those that change most
_MAX_WRITTEN = 12  # columns of a heat map up to which each cell has its number


class Plot(NamedTuple):
    """A figure, what it shows, and its numbers in words."""

    figure: Figure
    caption: str
    words: str


def sensitivity_plots(rows: Sequence[Row], selection: Selection | None = None, chosen: Row | None = None) -> list[Plot]:
    """The criterion over every parameter with three values or more, all else being that of the best row.

    Args:
        rows: of the table.
        selection: brings the intervals.
        chosen: the row to mark.
    """
    metric = selection.criterion if selection else 'AP'
    families: dict[Any, list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        if row.source == 'config':
            continue
        for name, value in row.params.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = tuple(sorted((key, str(other)) for key, other in row.params.items() if key != name))
                families[row.rule, str(row.params.get('method', '')), name, rest].append((value, row))
    best: dict[Any, list[tuple[float, Row]]] = {}
    for (rule, method, name, _), points in families.items():
        if len({value for value, _ in points}) < 3:
            continue
        earlier = best.get((rule, method, name))
        if earlier is None or _highest(points, metric) > _highest(earlier, metric):
            best[rule, method, name] = points
    return [_sensitivity(key, points, rows, metric, selection, chosen) for key, points in best.items()]


def _highest(points: Sequence[tuple[float, Row]], metric: str) -> float:
    return max(row.metrics[metric] for _, row in points)


def _sensitivity(
    key: tuple[str, str, str],
    points: Sequence[tuple[float, Row]],
    rows: Sequence[Row],
    metric: str,
    selection: Selection | None,
    chosen: Row | None,
) -> Plot:
    rule, method, name = key
    points = sorted(points, key=lambda point: point[0])
    values = [value for value, _ in points]
    symbol = {'sigma': 'σ', 'iou_threshold': 'IoU threshold'}.get(name, name)
    baseline = baseline_row(points[0][1], rows)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.5, 5.6), layout='constrained')
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
        _draw_curve(above, points, rows, metric, baseline, selection, chosen)
        _draw_heat_map(figure, below, points, baseline)
        below.set_xlabel(plain(symbol))
        if min(values) > 0 and max(values) / min(values) >= 100:
            below.set_xscale('log')
        words = ' '.join(word for word in (rule, method, 'over', symbol, _at(name, points[0][1], rows)) if word)
    top = max(points, key=lambda point: point[1].metrics[metric])
    description = (
        f'{metric} of {words}: highest at {top[0]:g} with {100 * top[1].metrics[metric]:.2f}, from '
        f'{100 * points[0][1].metrics[metric]:.2f} at {values[0]:g} to {100 * points[-1][1].metrics[metric]:.2f} at '
        f'{values[-1]:g}'
    )
    if baseline is not None:
        description += f'; hard NMS {100 * baseline.metrics[metric]:.2f}'
    return Plot(figure, words, description + '.')


def _draw_curve(
    axes: Axes,
    points: Sequence[tuple[float, Row]],
    rows: Sequence[Row],
    metric: str,
    baseline: Row | None,
    selection: Selection | None,
    chosen: Row | None,
) -> None:
    values = [value for value, _ in points]
    shown = [100 * row.metrics[metric] for _, row in points]
    if selection is not None and baseline is not None:
        number = {id(row): position for position, row in enumerate(rows)}
        around = [selection.settings[number[id(row)]] for _, row in points]
        base = 100 * baseline.metrics[metric]
        low, high = ([base + 100 * getattr(one, end) for one in around] for end in ('low', 'high'))
        axes.fill_between(values, low, high, color=BLUE, alpha=0.35, lw=0, label='95 % interval of the difference')
    axes.plot(values, shown, color=BLUE, marker='o', ms=4, lw=2, label=metric)
    for value, row in points:
        if row is chosen:
            axes.plot([value], [100 * row.metrics[metric]], ls='', marker='*', ms=15, color=ORANGE, label='chosen')
    if baseline is not None:
        label = baseline_in_words([baseline.setting]).replace(' at', ',')
        axes.axhline(100 * baseline.metrics[metric], color=_INK, ls='--', lw=1.2, label=label)
    axes.set_ylabel(f'{metric} in %')
    axes.grid(color='#808080', alpha=0.3)
    axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=2)


def _draw_heat_map(figure: Figure, axes: Axes, points: Sequence[tuple[float, Row]], baseline: Row | None) -> None:
    """The ten thresholds that AP is the mean over: gain over hard NMS, or the value where there is no baseline."""
    values = np.array([value for value, _ in points], float)
    cells = 100 * np.array([[row.metrics[name] for _, row in points] for name in AP_NAMES])
    if baseline is not None:
        cells -= 100 * np.array([[baseline.metrics[name]] for name in AP_NAMES])
    logarithmic = values.min() > 0 and values.max() / values.min() >= 100
    places = np.log(values) if logarithmic else values
    middles = (places[1:] + places[:-1]) / 2
    edges = np.concatenate([[2 * places[0] - middles[0]], middles, [2 * places[-1] - middles[-1]]])
    edges = np.exp(edges) if logarithmic else edges
    largest = max(float(np.abs(cells).max()), 0.01)
    colours: dict[str, Any] = dict(cmap='PuOr_r', vmin=-largest, vmax=largest) if baseline is not None else {}
    mesh = axes.pcolormesh(edges, np.arange(len(IOU_THRS) + 1) - 0.5, cells, **(dict(cmap='cividis') | colours))
    axes.set_yticks(range(len(IOU_THRS)), [f'{threshold:.2f}' for threshold in IOU_THRS])
    axes.invert_yaxis()
    axes.set_ylabel('at IoU')
    label = 'points over hard NMS' if baseline is not None else 'AP in %'
    figure.colorbar(mesh, ax=axes, label=label, orientation='horizontal', aspect=40, pad=0.02)
    if len(points) > _MAX_WRITTEN:
        return
    for (line, column), value in np.ndenumerate(cells):
        dark = float(np.dot(colormaps[mesh.get_cmap().name](mesh.norm(value))[:3], (0.2126, 0.7152, 0.0722))) < 0.45
        text = f'{value:.0f}' if baseline is None else f'{value:+.1f}'
        axes.text(values[column], line, text, ha='center', va='center', fontsize=7, color='white' if dark else 'black')


def _at(swept: str, row: Row, rows: Sequence[Row]) -> str:
    """The thresholds of a curve, where the table has several and they are not what is swept."""
    several = [name for name in varied_thresholds(other.setting for other in rows) if name != swept]
    return f'at {", ".join(f"{name} {row.params[name]:g}" for name in several)}' if several else ''


def precision_recall_plots(baseline: Row, best: Row) -> list[Plot]:
    """Precision, mean over classes, over recall, before and after; a plot for each of three IoU thresholds."""
    plots = []
    for name in ('AP50', 'AP75', 'AP90'):
        if name not in best.precision or name not in baseline.precision:
            continue
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(4.5, 4.2), layout='constrained')
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
            before, after = (np.array(row.precision[name]) for row in (baseline, best))
            axes.fill_between(RECALLS, before, after, color=BLUE, alpha=0.15, lw=0)
            axes.plot(RECALLS, before, '--', color=ORANGE, lw=2, label='hard NMS')
            axes.plot(RECALLS, after, '-', color=BLUE, lw=2, label=plain(best.rule))
            axes.set(ylabel='precision', xlim=(0, 1), ylim=(0, 1.03))
            below.fill_between(RECALLS, 100 * (after - before), color=BLUE, alpha=0.35, lw=0)
            below.plot(RECALLS, 100 * (after - before), color=BLUE, lw=1.5)
            below.axhline(0, color=_INK, lw=0.8)
            below.set(xlabel='recall', ylabel='difference,\npoints')
            for one in (axes, below):
                one.grid(color='#808080', alpha=0.3)
            axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=2)
        gap = after - before
        most = int(np.abs(gap).argmax())
        words = (
            f'Precision over recall at IoU 0.{name[2:]}: {_area(before)} for hard NMS, {_area(after)} for {best.rule}; '
            f'the largest difference, {100 * gap[most]:+.1f} points, is at recall {RECALLS[most]:.2f}.'
        )
        plots.append(Plot(figure, f'IoU 0.{name[2:]}', words))
    return plots


def _area(curve: np.ndarray) -> str:
    return f'AP {100 * float(curve.mean()):.2f}'


def class_plot(baseline: Row, best: Row) -> Plot:
    """Gain in AP of every class; of many classes, those that change most."""
    gains = sorted(
        (100 * (best.per_class[name] - value), name)
        for name, value in baseline.per_class.items()
        if name in best.per_class
    )
    shown = sorted(sorted(gains, key=lambda one: abs(one[0]))[-_MAX_BARS:])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, max(2.0, 0.9 + 0.22 * len(shown))), layout='constrained')
        axes = figure.subplots()
        bars = axes.barh(
            range(len(shown)),
            [gain for gain, _ in shown],
            color=[ORANGE if gain < 0 else BLUE for gain, _ in shown],
            edgecolor=_INK,
            lw=0.5,
        )
        for bar, (gain, _) in zip(bars, shown, strict=True):
            bar.set_hatch('////' if gain < 0 else '')
        axes.set_yticks(range(len(shown)), [plain(_short(name)) for _, name in shown], fontsize=9)
        axes.set(xlabel='AP points over hard NMS', ylim=(-0.6, len(shown) - 0.4))
        axes.axvline(0, color=_INK, lw=0.8)
        axes.grid(color='#808080', alpha=0.3, axis='x')
        if math.isclose(max((abs(gain) for gain, _ in shown), default=0.0), 0.0):
            axes.set_xlim(-1, 1)
    caption = 'Gain in AP by class' + (
        '' if len(shown) == len(gains) else f' (the {len(shown)} that change most, of {len(gains)})'
    )
    up, down = sum(gain > 0 for gain, _ in gains), sum(gain < 0 for gain, _ in gains)
    words = f'{caption}: {up} of {len(gains)} classes gain, {down} lose'
    if gains:
        words += f'; from {gains[0][1]} {gains[0][0]:+.2f} to {gains[-1][1]} {gains[-1][0]:+.2f}'
    return Plot(figure, caption, words + '.')


def errors_plot(found: Mapping[str, Mapping[str, Any]]) -> Plot:
    """TIDE's errors of several rows, as :func:`mmdet_softnms.reevaluation.report.why.errors_of` gives them."""
    styles = dict(baseline=(ORANGE, '////'), best=(BLUE, ''), chosen=(BLUE, ''), config=('#999999', '....'))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout='constrained')
        axes = figure.subplots()
        thickness = 0.8 / len(found)
        for number, (name, one) in enumerate(found.items()):
            colour, hatch = styles[name]
            places = np.arange(len(KINDS)) + (number - (len(found) - 1) / 2) * thickness
            axes.barh(places, [100 * one['dAP'][kind] for kind in KINDS], thickness * 0.92, color=colour, hatch=hatch,
                      edgecolor=_INK, lw=0.5, label='hard NMS' if name == 'baseline' else name)  # fmt: skip
        axes.set_yticks(range(len(KINDS)), KINDS)
        axes.invert_yaxis()
        axes.set_xlabel('AP50 points lost to it')
        axes.grid(color='#808080', alpha=0.3, axis='x')
        axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=3)
    rows = [
        f'{"hard NMS" if name == "baseline" else name}: '
        + ', '.join(f'{kind} {100 * one["dAP"][kind]:.2f}' for kind in KINDS)
        for name, one in found.items()
    ]
    return Plot(figure, 'Errors by kind', f'AP50 points lost to each kind of error. {"; ".join(rows)}.')


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f'{name[: most - 1]}…'


def plain(text: str) -> str:
    """A name as it is: matplotlib takes a pair of dollars for mathematics."""
    return text.replace('$', r'\$')


def svg_url(figure: Figure) -> str:
    """A figure as the address of an image whose ink follows the reader's preference for dark pages."""
    # Drawn through Figure, not pyplot: no display is looked for. As an image of its own, so that ids do not meet.
    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format='svg', metadata={'Date': None})
    text = content.getvalue().decode().replace(_INK, 'currentColor')
    style = '<style>svg{color:#1c2128}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>'
    text = re.sub(r'(<svg\b[^>]*>)', lambda opening: opening[1] + style, text, count=1)
    return 'data:image/svg+xml;base64,' + base64.b64encode(text.encode()).decode()
