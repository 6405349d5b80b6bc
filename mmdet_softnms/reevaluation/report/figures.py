"""Plots of the report."""

import base64
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from mmdet_softnms.reevaluation.report.table import baseline_row
from mmdet_softnms.reevaluation.scoring.metrics import AP_NAMES, IOU_THRS, RECALLS
from mmdet_softnms.reevaluation.scoring.settings import varied_thresholds
from mmdet_softnms.reevaluation.scoring.sweep import Row

_MAX_BARS = 40  # classes in the bar chart; beyond, the largest gains and losses


def sensitivity_figures(rows: Sequence[Row]) -> list[Figure]:
    """AP at each IoU threshold over every parameter with three values or more, all else being that of the best row."""
    families: dict[Any, list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        if row.source == 'config':
            continue
        for name, value in row.params.items():
            if isinstance(value, (int, float)):
                rest = tuple(sorted((key, str(other)) for key, other in row.params.items() if key != name))
                families[row.rule, str(row.params.get('method', '')), name, rest].append((value, row))
    chosen: dict[Any, list[tuple[float, Row]]] = {}
    for (rule, method, name, _), points in families.items():
        if len({value for value, _ in points}) < 3:
            continue
        earlier = chosen.get((rule, method, name))
        if earlier is None or _best_ap(points) > _best_ap(earlier):
            chosen[rule, method, name] = points
    return [_sensitivity_figure(key, points, rows) for key, points in chosen.items()]


def _best_ap(points: Sequence[tuple[float, Row]]) -> float:
    return max(row.metrics['AP'] for _, row in points)


def _sensitivity_figure(key: tuple[str, str, str], points: Sequence[tuple[float, Row]], rows: Sequence[Row]) -> Figure:
    rule, method, name = key
    points = sorted(points, key=lambda point: point[0])
    values = [value for value, _ in points]
    symbol = {'sigma': 'σ', 'iou_threshold': 'N_t (IoU threshold)'}.get(name, name)
    baseline = baseline_row(points[0][1], rows)
    figure = Figure(figsize=(12, 4.2), layout='constrained')
    absolute, gains = figure.subplots(1, 2)
    for axes, reference in ((absolute, None), (gains, baseline)):
        for number, metric in enumerate((*AP_NAMES, 'AP')):
            values_of = [row.metrics[metric] - (reference.metrics[metric] if reference else 0.0) for _, row in points]
            if metric == 'AP':
                style: dict[str, Any] = dict(color='black', marker='o', lw=2, ms=4, label='AP')
            else:
                colour = colormaps['viridis'](number / (len(AP_NAMES) - 1))
                style = dict(color=colour, lw=1, label=f'AP at IoU {IOU_THRS[number]:.2f}')
            axes.plot(values, [100 * value for value in values_of], **style)
        if min(values) > 0 and max(values) / min(values) >= 100:
            axes.set_xscale('log')
        axes.set(xlabel=plain(symbol), ylabel='%' if reference is None else 'points over hard NMS, IoU 0.5')
        axes.grid(alpha=0.3)
    if baseline is not None:
        absolute.axhline(100 * baseline.metrics['AP'], color='black', ls='--', lw=1, label='AP of hard NMS, IoU 0.5')
        gains.axhline(0, color='black', ls='--', lw=1)
    words = (rule, method, 'over', symbol, _at(name, points[0][1], rows))
    figure.suptitle(plain(' '.join(word for word in words if word)))
    figure.legend(*absolute.get_legend_handles_labels(), loc='outside right center', fontsize=8, frameon=False)
    return figure


def _at(swept: str, row: Row, rows: Sequence[Row]) -> str:
    """The thresholds of a curve, where the table has several and they are not what is swept."""
    several = [name for name in varied_thresholds(other.setting for other in rows) if name != swept]
    return f'at {", ".join(f"{name} {row.params[name]:g}" for name in several)}' if several else ''


def precision_recall_figure(baseline: Row, best: Row) -> Figure:
    """Precision, mean over classes, over recall, before and after."""
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    axes = figure.subplots()
    for number, name in enumerate(('AP50', 'AP75', 'AP90')):
        colour = colormaps['tab10'](number)
        for row, style in ((baseline, '--'), (best, '-')):
            if name in row.precision:
                label = f'IoU {int(name[2:]) / 100:.2f}, {"hard NMS" if row is baseline else plain(row.rule)}'
                axes.plot(RECALLS, row.precision[name], style, color=colour, lw=1.5, label=label)
    axes.set(
        title='Precision over recall, mean of classes', xlabel='recall', ylabel='precision', xlim=(0, 1), ylim=(0, 1.02)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    return figure


def class_gain_figure(baseline: Row, best: Row) -> Figure:
    """Gain in AP of every class; of many classes, those that gain and lose the most."""
    gains = sorted(
        (
            (100 * (best.per_class[name] - value), name)
            for name, value in baseline.per_class.items()
            if name in best.per_class
        )
    )
    shown = gains if len(gains) <= _MAX_BARS else gains[: _MAX_BARS // 2] + gains[-_MAX_BARS // 2 :]
    figure = Figure(figsize=(6.4, max(2.0, 0.8 + 0.2 * len(shown))), layout='constrained')
    axes = figure.subplots()
    names = [plain(name) for _, name in shown]
    axes.barh(
        range(len(shown)),
        [gain for gain, _ in shown],
        color=['#c0392b' if gain < 0 else '#27803b' for gain, _ in shown],
    )
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    title = 'Gain in AP by class' + ('' if len(shown) == len(gains) else f' (the extremes of {len(gains)})')
    axes.set(title=title, xlabel='points', ylim=(-0.6, len(shown) - 0.4))
    axes.axvline(0, color='black', lw=0.8)
    axes.grid(alpha=0.3, axis='x')
    spread = max((abs(gain) for gain, _ in shown), default=0.0)
    if math.isclose(spread, 0.0):
        axes.set_xlim(-1, 1)
    return figure


def plain(text: str) -> str:
    """A name as it is: matplotlib takes a pair of dollars for mathematics."""
    return text.replace('$', r'\$')


def svg_url(figure: Figure) -> str:
    # Drawn through Figure, not pyplot: no display is looked for. As an image of its own, so that ids do not meet.
    content = io.BytesIO()
    figure.savefig(content, format='svg', metadata={'Date': None})
    return 'data:image/svg+xml;base64,' + base64.b64encode(content.getvalue()).decode()
