"""A re-evaluation as a table in a terminal, and what is said below it."""

from collections.abc import Sequence

from mmengine.config import Config
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mmdet_softnms.reevaluation.candidates.plug import family_of
from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.scoring.metrics import AP_NAMES, COCO_STATS
from mmdet_softnms.reevaluation.scoring.settings import baseline_of, varied_thresholds
from mmdet_softnms.reevaluation.scoring.sweep import Row

#: Columns of the table on the screen; those no row has are left out.
COLUMNS = ('AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC12_AP50')
#: Columns of the report.
ALL_COLUMNS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'VOC07_AP50', 'VOC12_AP50')
#: Metrics that are shares, and shown in %; any other is a configured evaluator's and shown as it gives it.
SHARES = {*COCO_STATS, *AP_NAMES, 'VOC07_AP50', 'VOC12_AP50'}


def columns_of(rows: Sequence[Row], ours: Sequence[str], most: int | None = None) -> list[str]:
    """Columns that the rows have: ours, then the configured evaluator's, at most so many of these."""
    metrics = rows[0].metrics
    return [one for one in ours if one in metrics] + [one for one in metrics if one not in SHARES][:most]


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
    own, first = rows[-1], baseline_row(rows[-1], rows)
    if first is None or first.setting.group == own.setting.group:
        return 'The last row is the setting of the config.'
    return 'The last row is the setting of the config, with thresholds of its own; its difference is to the first row.'


def rows_table(
    rows: Sequence[Row],
    title: str,
    caption: str = '',
    among: Sequence[Row] | None = None,
    selection: Selection | None = None,
) -> Table:
    """Rows as a table for a terminal; baselines are looked for among all rows, where these are only some of them.

    Everything is text as it is: the name of a file, a class or a rule may look like rich's markup.
    """
    table = Table(title=Text(title, 'table.title'), caption=Text(caption, 'table.caption'), caption_justify='left')
    columns = columns_of(rows, COLUMNS, 6)
    heading, intervals = interval_cells(rows, selection)
    table.add_column('rule', no_wrap=True)
    for column in ('score_thr', 'max_per_img', *columns, *heading, 'suppression s'):
        table.add_column(escape(column), justify='right', no_wrap=True)
    for number, (row, following) in enumerate(zip(rows, [*rows[1:], None], strict=True)):
        baseline = baseline_row(row, among or rows)
        cells = [
            row.setting.label,
            f'{row.params["score_thr"]:g}',
            str(row.params['max_per_img']),
            *(cell(row, baseline, column) for column in columns),
            *intervals[number],
            f'{row.seconds:.2f}',
        ]
        table.add_row(
            *map(Text, cells),
            end_section=row is baseline or (following is not None and following.setting.is_baseline),
        )
    return table


def interval_cells(rows: Sequence[Row], selection: Selection | None) -> tuple[list[str], list[list[str]]]:
    """The column of a selection's intervals: its heading and a cell for each row; both empty without a selection."""
    if selection is None:
        return [], [[] for _ in rows]
    cells = [
        '' if row.setting.is_baseline else f'[{100 * one.low:+.2f}, {100 * one.high:+.2f}]'
        for row, one in zip(rows, selection.settings, strict=True)
    ]
    return [f'{selection.criterion} gain, 95 %'], [[cell] for cell in cells]


def baseline_row(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that differences refer to (:func:`mmdet_softnms.reevaluation.scoring.settings.baseline_of`)."""
    baseline = baseline_of(row.setting, (other.setting for other in rows))
    return next((other for other in rows if other.setting is baseline), None)


def best_row(rows: Sequence[Row]) -> Row:
    """The row of the table, baselines aside, with the highest AP."""
    others = [row for row in rows if row.source == 'table' and not row.setting.is_baseline]
    return max(others, key=lambda row: row.metrics['AP']) if others else rows[0]


def full_label(row: Row, rows: Sequence[Row]) -> str:
    """The setting's label, with ``score_thr`` and ``max_per_img`` where the table has several of them."""
    varied = varied_thresholds(other.setting for other in rows)
    return ' '.join([row.setting.label, *(f'{name}={row.params[name]:g}' for name in varied)])


def cell(row: Row, baseline: Row | None, column: str) -> str:
    """A metric as a table shows it, and behind a space its difference from the baseline's."""
    value = row.metrics[column]
    if value == -1:  # COCO's "no such object"
        return '-'
    factor, digits = (100, 2) if column in SHARES else (1, 4)
    if baseline is None or row is baseline:
        return f'{factor * value:.{digits}f}'
    return f'{factor * value:.{digits}f} {factor * (value - baseline.metrics[column]):+.{digits}f}'


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
    setting = rows[selection.chosen].setting
    lines += [f'Chosen on all tuning images: {label[selection.chosen]}. To paste into the config:', '']
    return '\n'.join([*lines, setting.snippet(family_of(cfg).written(cfg)), ''])


def _interval(value: float, low: float, high: float) -> str:
    return f'{100 * value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]'
