"""A re-evaluation as a table in a terminal of any width, or in a file."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.scoring.metrics import AP_NAMES, COCO_STATS, VOC_NAMES
from mmdet_softnms.reevaluation.scoring.settings import Setting, baseline_in_words, baseline_of, varied_thresholds
from mmdet_softnms.reevaluation.scoring.sweep import Row
from mmdet_softnms.rules import RotatedSoftNMS, SoftNMS

#: Columns of the table on the screen, those that matter most first; those no row has are left out.
COLUMNS = ('AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC12_AP50')
#: Columns of the report.
ALL_COLUMNS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AP_crowded', 'AR1', 'AR10', 'AR100', *VOC_NAMES)
#: Metrics that are shares, and shown in %; any other is a configured evaluator's and shown as it gives it.
SHARES = {*COCO_STATS, *AP_NAMES, 'AP_crowded', *VOC_NAMES}

GAP = 2  # between columns
_LABEL = 28  # a label is folded rather than a column left out, down to this width
_PLAIN = Box('    \n    \n -- \n    \n    \n    \n    \n    \n', ascii=True)  # for files: no line drawing


def columns_of(rows: Sequence[Row], ours: Sequence[str], most: int | None = None) -> list[str]:
    """Columns that the rows have: ours, then the configured evaluator's, at most so many of these."""
    metrics = rows[0].metrics
    return [one for one in ours if one in metrics] + [one for one in metrics if one not in SHARES][:most]


def to_table(
    result: Reevaluation,
    selection: Selection | None = None,
    *,
    width: int | None = None,
    plain: bool = False,
    most_rows: int | None = None,
) -> Table:
    """The rows in percent, baseline on top, each variant's difference from it in points beside its value.

    Args:
        result: the rows.
        selection: adds the 95 % interval of each difference.
        width: in characters; what matters least is left out, and the caption says what. None: nothing is.
        plain: without line drawing, for a file.
        most_rows: of a long table only baselines, the best rows and the config's own; None: all.
    """
    rows, caption = result.rows, notes(result)
    if most_rows is not None and len(rows) > most_rows:
        rows = _best_of(rows, most_rows, selection.criterion if selection else 'AP')
        caption.insert(0, f'The best {len(rows)} of {len(result.rows)} rows; all are in reevaluation.json.')
    return rows_table(rows, result.dataset, '\n'.join(caption), result.rows, selection, width=width, plain=plain)


def empty_table(title: str, caption: str = '', plain: bool = False) -> Table:
    """A table in the style of the commands, for columns of fixed width; ``plain``: without line drawing, for a file."""
    return Table(
        title=Text(title, 'bold'),
        caption=Text(caption),
        box=_PLAIN if plain else SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def print_table(console: Console, table: Table) -> None:
    """Print a table with its title and caption as wide as the console; into a file without trailing blanks."""
    title, caption = table.title, table.caption
    table.title = table.caption = None
    needed = sum((column.width or 0) + GAP for column in table.columns)
    width = console.width
    with console.capture() as captured:
        console.print(title, '', sep='\n', highlight=False)
        console.width = max(needed, width)  # no number is cut short, however narrow the screen
        console.print(table, crop=False)
        console.width = width
        if caption:
            console.print('', caption, sep='\n', highlight=False)
    lines = captured.get().splitlines()
    console.file.write('\n'.join(lines if console.is_terminal else map(str.rstrip, lines)) + '\n\n')


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
        f'{result.num_images} images, {result.num_candidates} candidates ({origin}). In %, with the difference from '
        f'{baseline_in_words(result.settings)} with the same score_thr and max_per_img.',
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


def _best_of(rows: Sequence[Row], most: int, criterion: str) -> list[Row]:
    """Baselines, the config's own row, and the best of the others by a metric, at most so many, in their order."""
    kept = [row for row in rows if row.setting.is_baseline or row.source == 'config']
    others = sorted((row for row in rows if row not in kept), key=lambda row: -row.metrics[criterion])
    kept += others[: max(most - len(kept), 1)]
    return [row for row in rows if row in kept]


@dataclass
class _Column:
    """What a column shows; all of one width."""

    heading: str
    cells: list[Text]

    @classmethod
    def of(cls, heading: str, cells: Sequence[str]) -> '_Column':
        """Flush right."""
        width = max(map(len, (heading, *cells)))
        return cls(heading.rjust(width), [Text(cell.rjust(width)) for cell in cells])

    @property
    def width(self) -> int:
        return len(self.heading)


def rows_table(
    rows: Sequence[Row],
    title: str,
    caption: str = '',
    among: Sequence[Row] | None = None,
    selection: Selection | None = None,
    *,
    width: int | None = None,
    plain: bool = False,
) -> Table:
    """Rows as a table; baselines are looked for among all rows, where these are only some of them.

    What is the same in every row stands once above the table. The best value of a column is bold. Everything is text
    as it is: the name of a file, a class or a rule may look like rich's markup.

    Args:
        rows: of the table.
        title, caption: above and below it.
        among: all rows; with a selection those that it is of.
        selection, width, plain: see :func:`to_table`.
    """
    among = among or rows
    settings = [row.setting for row in among]
    varied = varied_thresholds(settings)
    fixed = [_Column.of(name, [f'{row.params[name]:g}' for row in rows]) for name in varied]
    names = columns_of(rows, COLUMNS, 6)
    metrics = {name: _metric_column(rows, [baseline_row(row, among) for row in rows], name) for name in names}
    shown = list(metrics.values())
    important = list(shown)
    if selection is not None:
        heading, cells = interval_cells(among, selection)
        positions = [next(number for number, other in enumerate(among) if other is row) for row in rows]
        interval = _Column.of(heading[0], [cells[number][0] for number in positions])
        first = metrics[selection.criterion]
        shown.insert(shown.index(first) + 1, interval)
        important = [first, interval, *(column for column in metrics.values() if column is not first)]
    seconds = _Column.of('suppression s', [f'{row.seconds:.2f}' for row in rows])
    shown, important = [*shown, seconds], [*important, seconds]

    labels = _labels(rows, among, varied)
    if width is not None:
        full = sum(column.width + GAP for column in (*fixed, *important[:-1])) + max(map(len, labels))
        if full > width:
            labels = _labels(rows, among, varied, short=True)
    longest = max(map(len, labels))
    if width is None:
        label_width, left_out = longest, []
    else:
        in_table = [label for label, row in zip(labels, rows, strict=True) if row.source == 'table'] or labels
        label_width = min(max(map(len, in_table)), _LABEL)
        room = width - label_width - sum(column.width + GAP for column in fixed)
        widths = itertools.accumulate(column.width + GAP for column in important)
        fitting = max(sum(one <= room for one in widths), 1)  # the first column is shown in any case
        left_out = important[fitting:]
        room -= sum(column.width + GAP for column in important[:fitting])
        label_width = min(longest, label_width + max(room, 0))
    shown = [column for column in shown if not any(column is other for other in left_out)]

    above = same_in_all(settings)
    if any(column is not seconds for column in left_out):
        names_left = '; '.join(column.heading.strip() for column in left_out if column is not seconds)
        caption = f'{caption}\nLeft out here, for lack of width: {names_left}.'.lstrip('\n')
    table = empty_table(f'{title}\n{above}' if above else title, caption, plain)
    table.add_column('rule', width=label_width, overflow='fold')
    for column in (*fixed, *shown):
        table.add_column(escape(column.heading), width=column.width, no_wrap=True)
    for number, label in enumerate(labels):
        if number and rows[number].setting.is_baseline:
            table.add_section()
        table.add_row(Text(label), *(column.cells[number] for column in (*fixed, *shown)))
    return table


def _constants(settings: Sequence[Setting]) -> dict[str, Any]:
    """Parameters of the rules that have one value in all rows of the table, where a rule has more than one row.

    Not those that rows of the same rule and method are without, as ``decay`` where it is the product.
    """
    table = [setting for setting in settings if setting.source == 'table']
    found = {}
    for name in dict.fromkeys(name for setting in table for name in setting.rule.params if name != 'method'):
        having = [setting for setting in table if name in setting.rule.params]
        values = [setting.rule.params[name] for setting in having]
        kinds = {(setting.name, setting.rule.params.get('method')) for setting in having}
        if any(
            name not in setting.rule.params and (setting.name, setting.rule.params.get('method')) in kinds
            for setting in table
        ):
            continue
        repeated = max(Counter((setting.name, setting.group) for setting in having).values()) > 1
        if repeated and all(value == values[0] for value in values) and not (name == 'offset' and not values[0]):
            found[name] = values[0]
    return found


def same_in_all(settings: Sequence[Setting]) -> str:
    """``'score_thr 0.001, max_per_img 100, min_score 0.001'``: what all rows of a table share, with its values."""
    varied = varied_thresholds(settings)
    around = {name: getattr(settings[0], name) for name in ('score_thr', 'max_per_img') if name not in varied}
    return ', '.join(
        f'{name} {value:g}' if isinstance(value, float) else f'{name} {value}'
        for name, value in (around | _constants(settings)).items()
    )


def _labels(rows: Sequence[Row], among: Sequence[Row], columns: Sequence[str] = (), short: bool = False) -> list[str]:
    """What tells rows apart from all others.

    ``columns``: thresholds that have a column, and need not be in the label; ``short``: Soft-NMS by its method alone.
    """
    settings = [row.setting for row in among]
    known, varied = _constants(settings), varied_thresholds(settings)
    labels = []
    for setting in (row.setting for row in rows):
        own = setting.source == 'config'
        label = setting.label_without({} if own else known).removesuffix(' (config)')
        if short and type(setting.rule) in (SoftNMS, RotatedSoftNMS):
            label = label.removeprefix(f'{setting.name} ')
        words = [
            f'{name}={getattr(setting, name):g}'
            for name in ('score_thr', 'max_per_img')
            if name not in columns and (name in varied or getattr(setting, name) != getattr(settings[0], name))
        ]
        labels.append(' '.join([label, *words, *(['(config)'] if own else [])]))
    return labels


def _metric_column(rows: Sequence[Row], baselines: Sequence[Row | None], name: str) -> _Column:
    """Values and differences, each at its place; the best value bold."""
    parts = [cell(row, baseline, name).partition(' ') for row, baseline in zip(rows, baselines, strict=True)]
    values, differences = [value for value, _, _ in parts], [difference for _, _, difference in parts]
    wide, narrow = max(map(len, values)), max(map(len, differences))
    best = values[max(range(len(rows)), key=lambda number: rows[number].metrics[name])]
    width = max(len(name), wide + (narrow and narrow + 1))
    cells = []
    for value, difference in zip(values, differences, strict=True):
        bold = name in SHARES and value == best != '-' and len(rows) > 1
        changed = difference.strip('+-0.')
        colour = 'green' if changed and difference[0] == '+' else 'red' if changed else ''
        text = Text().append(value.rjust(wide), 'bold' if bold else '')
        text.append(f' {difference:>{narrow}}' if narrow else '', colour)
        text.pad_left(width - text.cell_len)
        cells.append(text)
    value_end = width - (narrow and narrow + 1)
    return _Column(name.rjust(value_end).ljust(width), cells)


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


def telling_label(row: Row, rows: Sequence[Row]) -> str:
    """The setting's label with no more parameters and thresholds than set it apart from the other rows."""
    return _labels([row], rows)[0]


def cell(row: Row, baseline: Row | None, column: str) -> str:
    """A metric as a table shows it, and behind a space its difference from the baseline's."""
    value = row.metrics[column]
    if value == -1:  # COCO's "no such object"
        return '-'
    factor, digits = (100, 2) if column in SHARES else (1, 4)
    if baseline is None or row is baseline:
        return f'{factor * value:.{digits}f}'
    return f'{factor * value:.{digits}f} {factor * (value - baseline.metrics[column]):+.{digits}f}'
