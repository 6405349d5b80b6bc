"""A re-evaluation as people and programs read it: tables, ``reevaluation.json``, and one self-contained HTML page."""

import base64
import io
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import colormaps
from matplotlib.figure import Figure
from mmengine.config import Config
from rich.table import Table

from mmdet_softnms.reevaluation.engine import Reevaluation
from mmdet_softnms.reevaluation.metrics import AP_NAMES, IOU_THRS, RECALLS
from mmdet_softnms.reevaluation.pictures import COLOURS, PICTURE_SCORE_THR, Picture, draw_pictures
from mmdet_softnms.reevaluation.selection import Selection
from mmdet_softnms.reevaluation.store import write_whole
from mmdet_softnms.reevaluation.sweep import Row

#: Columns of the table on the screen; those no row has are left out.
COLUMNS = ('AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC12_AP50')
#: Columns of the report.
ALL_COLUMNS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'VOC07_AP50', 'VOC12_AP50')
_MAX_BARS = 40  # classes in the bar chart; beyond, the largest gains and losses


def to_table(result: Reevaluation, selection: Selection | None = None) -> Table:
    """The rows in percent, baseline on top, each variant's difference to it in points beside its value.

    With a selection, the 95 % interval of each difference, too.
    """
    return rows_table(result.rows, result.dataset, '\n'.join(notes(result)), selection=selection)


def notes(result: Reevaluation) -> list[str]:
    """What a reader of the table has to know, a line each."""
    if result.forward_images == result.num_images:
        origin = f'one forward pass of {result.forward_seconds:.0f} s'
    elif result.forward_images:
        origin = (
            f'a forward pass over {result.forward_images} images, {result.forward_seconds:.0f} s; the rest was stored'
        )
    else:
        origin = 'all stored before: no forward pass'
    lines = [
        f'{result.num_images} images, {result.num_candidates} candidates ({origin}). In %, with the difference to hard '
        'NMS at IoU 0.5 with the same score_thr and max_per_img.',
        _about_own_row(result.rows),
        *result.notes,
    ]
    if result.masks_left_out:
        lines.append('Masks are left out: boxes are suppressed and evaluated in original image scale.')
    return lines


def _about_own_row(rows: Sequence[Row]) -> str:
    own, first = rows[-1], baseline_of(rows[-1], rows)
    if first is None or _group(first) == _group(own):
        return 'The last row is the setting of the config.'
    return 'The last row is the setting of the config, with thresholds of its own; its difference is to the first row.'


def rows_table(
    rows: Sequence[Row],
    title: str,
    caption: str = '',
    among: Sequence[Row] | None = None,
    selection: Selection | None = None,
) -> Table:
    """Rows as a table for a terminal; baselines are looked for among all rows, where these are only some of them."""
    table = Table(title=title, caption=caption, caption_justify='left')
    columns = [column for column in COLUMNS if column in rows[0].metrics]
    heading, intervals = _intervals(rows, selection)
    table.add_column('rule', no_wrap=True)
    for column in ('score_thr', 'max_per_img', *columns, *heading, 'suppression s'):
        table.add_column(column, justify='right', no_wrap=True)
    for number, (row, following) in enumerate(zip(rows, [*rows[1:], None], strict=True)):
        baseline = baseline_of(row, among or rows)
        table.add_row(
            row_label(row),
            f'{row.params["score_thr"]:g}',
            str(row.params['max_per_img']),
            *(_cell(row, baseline, column) for column in columns),
            *intervals[number],
            f'{row.seconds:.2f}',
            end_section=row is baseline or (following is not None and is_baseline(following)),
        )
    return table


def _intervals(rows: Sequence[Row], selection: Selection | None) -> tuple[list[str], list[list[str]]]:
    """The column of a selection's intervals: its heading and a cell for each row; both empty without a selection."""
    if selection is None:
        return [], [[] for _ in rows]
    cells = [
        '' if is_baseline(row) else f'[{100 * one.low:+.2f}, {100 * one.high:+.2f}]'
        for row, one in zip(rows, selection.settings, strict=True)
    ]
    return [f'{selection.criterion} gain, 95 %'], [[cell] for cell in cells]


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that differences refer to: hard NMS of the same thresholds; for a config's row without one, the first."""
    baselines = [one for one in rows if is_baseline(one)]
    for one in baselines:
        if _group(one) == _group(row):
            return one
    return baselines[0] if row.source == 'config' and baselines else None


def is_baseline(row: Row) -> bool:
    """Hard NMS at IoU 0.5 of the table."""
    return (
        row.rule == 'HardNMS'
        and row.source == 'table'
        and row.params['iou_threshold'] == 0.5
        and not row.params['offset']
    )


def _group(row: Row) -> tuple[float, int]:
    return row.params['score_thr'], row.params['max_per_img']


def best_row(rows: Sequence[Row]) -> Row:
    """The row of the table, baselines aside, with the highest AP."""
    others = [row for row in rows if row.source == 'table' and not is_baseline(row)]
    return max(others, key=lambda row: row.metrics['AP']) if others else rows[0]


def full_label(row: Row, rows: Sequence[Row]) -> str:
    """:func:`row_label`, with ``score_thr`` and ``max_per_img`` where the table has several of them."""
    return ' '.join([row_label(row), *(f'{name}={row.params[name]:g}' for name in _varied(rows))])


def _varied(rows: Sequence[Row]) -> list[str]:
    """The thresholds around the rules of which the table has several values."""
    table = [row for row in rows if row.source == 'table']
    return [name for name in ('score_thr', 'max_per_img') if len({row.params[name] for row in table}) > 1]


def row_label(row: Row) -> str:
    """``'SoftNMS gaussian sigma=0.5'``: the rule and what sets it apart, thresholds around it left to their columns."""
    params = {name: value for name, value in row.params.items() if name not in ('score_thr', 'max_per_img')}
    if not params.get('offset', 1):
        del params['offset']
    words = [str(params.pop('method'))] if 'method' in params else []
    words += [f'{name}={value:g}' if isinstance(value, float) else f'{name}={value}' for name, value in params.items()]
    return ' '.join([row.rule, *words]) + (' (config)' if row.source == 'config' else '')


def _cell(row: Row, baseline: Row | None, column: str) -> str:
    value = row.metrics[column]
    if value < 0:  # COCO's "no such object"
        return '-'
    if baseline is None or row is baseline:
        return f'{100 * value:.2f}'
    return f'{100 * value:.2f} {100 * (value - baseline.metrics[column]):+.2f}'


def selection_text(selection: Selection, result: Reevaluation, cfg: Config) -> str:
    """What ``--select`` says: what tuning is worth, how much the best row flatters, and the config to paste."""
    worth, rows = selection.procedure, result.rows
    label = [full_label(row, rows) for row in rows]
    best = max(
        (number for number, row in enumerate(rows) if row.source == 'table'),
        key=lambda number: selection.settings[number].value,
    )
    naive = selection.settings[best]
    lines = [
        f'Chosen by {selection.criterion} on {selection.tuned_on}, reported on images it was not chosen on:',
        f'  tuned suppression {100 * worth.value:.2f}, hard NMS at IoU 0.5 {100 * worth.baseline:.2f}, '
        f'difference {_interval(worth.value - worth.baseline, worth.low, worth.high)}',
        f'  (95 % interval of the whole procedure, {selection.resamples} paired bootstrap resamples of images)',
    ]
    if selection.chosen_by_fold:
        chosen = ', '.join(label[number] for number in dict.fromkeys(selection.chosen_by_fold))
        lines.append(f'  chosen in the folds: {chosen}')
    lines.append(
        f'For comparison, the best of all {sum(row.source == "table" for row in rows)} rows on the images it was '
        f'chosen on, which flatters: {label[best]}, {_interval(naive.value - naive.baseline, naive.low, naive.high)}'
    )
    if not worth.significant:
        lines.append('There is no significant difference: these images give no reason to change the suppression.')
    elif worth.high < 0:
        lines.append('Tuned suppression is significantly worse here: keep hard NMS.')
    else:
        lines.append('The difference is significant.')
    setting = result.session.settings[selection.chosen]
    head = {'CascadeRoIHead': 'SoftNMSCascadeRoIHead', 'DoubleHeadRoIHead': 'SoftNMSDoubleHeadRoIHead'}
    own = cfg.model.roi_head.type.split('.')[-1]
    name = own if cfg.model.roi_head.type.startswith('mmdet_softnms.') else head.get(own, 'SoftNMSRoIHead')
    lines += [f'Chosen on all tuning images: {label[selection.chosen]}. To paste into the config:', '']
    return '\n'.join([*lines, setting.snippet(name), ''])


def _interval(value: float, low: float, high: float) -> str:
    return f'{100 * value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]'


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; an earlier one stays until the new one is complete.

    Raises:
        OSError: no permission or no space; the earlier file is intact.
    """
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + '\n').encode())


def write_report(
    work_dir: Path,
    result: Reevaluation,
    *,
    title: str,
    command: str,
    selection: Selection | None = None,
    selection_words: str = '',
    num_pictures: int = 4,
) -> list[Path]:
    """Write ``report.html`` (one file, nothing fetched from anywhere) and ``report.md`` (the table).

    Args:
        work_dir: where.
        result: what to report.
        title: of the page.
        command: that made it.
        selection: what was chosen, if anything.
        selection_words: of :func:`selection_text`.
        num_pictures: images with the largest gain, and as many with the largest loss.

    Raises:
        OSError: no permission or no space; earlier files are intact.
    """
    rows = result.rows
    best = best_row(rows) if selection is None or is_baseline(rows[selection.chosen]) else rows[selection.chosen]
    columns = [column for column in ALL_COLUMNS if column in rows[0].metrics]
    baseline = baseline_of(best, rows) or rows[0]
    pictures: list[Picture] = []
    remark = ''
    if best is not baseline:
        settings = result.session.settings
        pair = [settings[rows.index(baseline)], settings[rows.index(best)]]
        pictures, remark = draw_pictures(result.session, pair[0], pair[1], num_pictures)
    heading, intervals = _intervals(rows, selection)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('mmdet_softnms.reevaluation', '.'),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template('report.html.jinja').render(
        title=title,
        dataset=result.dataset,
        command=command,
        notes=notes(result),
        columns=[*columns, *heading],
        rows=[_html_row(row, rows, columns, more) for row, more in zip(rows, intervals, strict=True)],
        selection=selection_words,
        sensitivity=[_data_url(figure) for figure in sensitivity_figures(rows)],
        curves=_data_url(precision_recall_figure(baseline, best)) if best is not baseline else '',
        bars=_data_url(class_gain_figure(baseline, best)) if best is not baseline else '',
        baseline=full_label(baseline, rows),
        best=full_label(best, rows),
        pictures=pictures,
        picture_remark=remark,
        picture_score_thr=PICTURE_SCORE_THR,
        colours=COLOURS,
    )
    paths = [work_dir / 'report.html', work_dir / 'report.md']
    write_whole(paths[0], page.encode())
    text = markdown(result, title=title, command=command, selection=selection, selection_words=selection_words)
    write_whole(paths[1], text.encode())
    return paths


def markdown(
    result: Reevaluation, *, title: str, command: str, selection: Selection | None = None, selection_words: str = ''
) -> str:
    """The table for an issue, a pull request or a README; arguments as in :func:`write_report`."""
    columns = [column for column in ALL_COLUMNS if column in result.rows[0].metrics]
    heading, intervals = _intervals(result.rows, selection)
    lines = [f'# {title}', '', f'`{command}`', '', result.dataset, '']
    lines.append('| ' + ' | '.join(['rule', 'score_thr', 'max_per_img', *columns, *heading]) + ' |')
    lines.append('|---' * 3 + '|--:' * (len(columns) + len(heading)) + '|')
    for row, more in zip(result.rows, intervals, strict=True):
        baseline = baseline_of(row, result.rows)
        around = [f'{row.params["score_thr"]:g}', str(row.params['max_per_img'])]
        cells = []
        for column in columns:
            value, _, difference = _cell(row, baseline, column).partition(' ')
            cells.append(f'{value} ({difference})' if difference else value)
        lines.append('| ' + ' | '.join([row_label(row), *around, *cells, *more]) + ' |')
    lines += ['', *(f'{line}  ' for line in notes(result))]
    if selection_words:
        lines += ['', '```', selection_words.rstrip(), '```']
    return '\n'.join(lines) + '\n'


def _html_row(row: Row, rows: Sequence[Row], columns: Sequence[str], more: Sequence[str]) -> dict[str, Any]:
    baseline = baseline_of(row, rows)
    cells = []
    for column in columns:
        value, _, difference = _cell(row, baseline, column).partition(' ')
        sign = '' if not difference or float(difference) == 0 else 'up' if difference.startswith('+') else 'down'
        cells.append(dict(value=value, difference=difference, sign=sign))
    cells += [dict(value=text, difference='', sign='') for text in more]
    return dict(
        label=row_label(row),
        score_thr=f'{row.params["score_thr"]:g}',
        max_per_img=row.params['max_per_img'],
        cells=cells,
        seconds=f'{row.seconds:.2f}',
        baseline=is_baseline(row),
        config=row.source == 'config',
    )


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
    baseline = baseline_of(points[0][1], rows)
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
        axes.set(xlabel=symbol, ylabel='%' if reference is None else 'points over hard NMS, IoU 0.5')
        axes.grid(alpha=0.3)
    if baseline is not None:
        absolute.axhline(100 * baseline.metrics['AP'], color='black', ls='--', lw=1, label='AP of hard NMS, IoU 0.5')
        gains.axhline(0, color='black', ls='--', lw=1)
    figure.suptitle(' '.join(word for word in (rule, method, 'over', symbol, _at(name, points[0][1], rows)) if word))
    figure.legend(*absolute.get_legend_handles_labels(), loc='outside right center', fontsize=8, frameon=False)
    return figure


def _at(swept: str, row: Row, rows: Sequence[Row]) -> str:
    """The thresholds of a curve, where the table has several and they are not what is swept."""
    several = [name for name in _varied(rows) if name != swept]
    return f'at {", ".join(f"{name} {row.params[name]:g}" for name in several)}' if several else ''


def precision_recall_figure(baseline: Row, best: Row) -> Figure:
    """Precision, mean over classes, over recall, before and after."""
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    axes = figure.subplots()
    for number, name in enumerate(('AP50', 'AP75', 'AP90')):
        colour = colormaps['tab10'](number)
        for row, style in ((baseline, '--'), (best, '-')):
            if name in row.precision:
                label = f'IoU {int(name[2:]) / 100:.2f}, {"hard NMS" if row is baseline else row.rule}'
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
    # Escaped: matplotlib takes a pair of dollars in a class name for mathematics.
    names = [name.replace('$', r'\$') for _, name in shown]
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


def _data_url(figure: Figure) -> str:
    # Drawn through Figure, not pyplot: no display is looked for. As an image of its own, so that ids do not meet.
    content = io.BytesIO()
    figure.savefig(content, format='svg', metadata={'Date': None})
    return 'data:image/svg+xml;base64,' + base64.b64encode(content.getvalue()).decode()
