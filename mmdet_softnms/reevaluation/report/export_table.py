"""The table in the formats of papers and spreadsheets: CSV, LaTeX, Markdown; and class by class beside it."""

import csv
import io
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_softnms import __version__
from mmdet_softnms.files import ReevaluationError, write_whole
from mmdet_softnms.reevaluation.choice.resampling import weighted_ap
from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.report.table import (
    ALL_COLUMNS,
    COLUMNS,
    SHARES,
    baseline_row,
    best_row,
    columns_of,
    same_in_all,
    telling_label,
)
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.scoring.matching import Matches, Objects, match
from mmdet_softnms.reevaluation.scoring.settings import baseline_in_words
from mmdet_softnms.reevaluation.scoring.sweep import Row, detections

FORMATS = ('.csv', '.tex', '.md')
PER_CLASS = ('AP', 'AP50', 'AP75')
_MOST_BY_CLASS = 5  # rows of the table; of more, by class only the baseline, the best or chosen one, the config's


@dataclass(frozen=True)
class Column:
    """What the values of a column are: 'word', 'count', 'value' (of a metric), 'difference' or 'interval'."""

    name: str
    kind: str = 'word'


@dataclass
class Sheet:
    """A table before it has a format; None where a cell is empty."""

    caption: str
    columns: list[Column]
    rows: list[list[Any]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)  # rows with a line above them
    long: bool = False  # may go over several pages


def _reference(result: Reevaluation) -> str:
    return f'In percent, with the difference from {baseline_in_words(result.settings)}.'


def check_out(paths: Iterable[str | Path]) -> None:
    """Make sure that tables can be written, before anything slow.

    Raises:
        ReevaluationError: an unknown format, one file for two tables, or a folder that cannot be written.
    """
    names: set[Path] = set()
    for path in map(Path, paths):
        if path.suffix not in FORMATS:
            raise ReevaluationError(f'--out {path}: the name has to end in {", ".join(FORMATS)}')
        for one in (path, per_class_path(path)):
            if one in names:
                raise ReevaluationError(f'--out would write {one} twice; give each table a name of its own')
            if one.is_dir():
                raise ReevaluationError(f'--out {path}: {one} is a folder; name a file')
            names.add(one)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ReevaluationError(
                f'--out {path}: {folder} cannot be written ({error.strerror}); name another folder'
            ) from error


def per_class_path(path: Path) -> Path:
    """``results_per-class.csv``, beside ``results.csv``."""
    return path.with_name(f'{path.stem}_per-class{path.suffix}')


def write_tables(
    paths: Sequence[str | Path], result: Reevaluation, selection: Selection | None = None, *, title: str = ''
) -> list[Path]:
    """Write the table, and beside it the table by class, in the formats that the names end in.

    ``.csv`` holds every metric of every row, unrounded and in [0, 1] as in ``reevaluation.json``; ``.tex`` (booktabs,
    longtable) and ``.md`` hold what a paper shows, in %. A value and its difference from hard NMS (IoU 0.5, the same
    thresholds) have columns of their own.

    Args:
        paths: of the tables; see :func:`check_out`.
        result: the rows.
        selection: adds the 95 % interval of each difference in the metric that was chosen by.
        title: for the captions.

    Returns:
        The files written.

    Raises:
        ReevaluationError: see :func:`check_out`.
        OSError: no permission or no space; earlier files are intact.
    """
    check_out(paths)
    written = []
    scores = _class_scores(result, selection) if paths else {}
    for path in map(Path, paths):
        paper = path.suffix != '.csv'
        sheets = by_rule(result, selection, title, paper), by_class(result, selection, title, scores, paper)
        for place, sheet in zip((path, per_class_path(path)), sheets, strict=True):
            text = {'.csv': to_csv, '.tex': to_latex, '.md': to_markdown}[path.suffix](sheet)
            write_whole(place, text.encode(errors='backslashreplace'))
            written.append(place)
    return written


def by_rule(result: Reevaluation, selection: Selection | None, title: str, paper: bool) -> Sheet:
    """A line for each row; ``paper``: labels instead of all parameters, and the metrics that papers show."""
    rows = result.rows
    metrics = columns_of(rows, COLUMNS if paper else ALL_COLUMNS)
    params = [] if paper else list(dict.fromkeys(name for row in rows for name in row.params))
    columns = [Column('rule'), *([] if paper else [Column('source'), *map(Column, params)])]
    for name in metrics:
        columns += [Column(name, 'value'), Column(name, 'difference')]
        if selection is not None and name == selection.criterion:
            columns.append(Column(name, 'interval'))
    columns += [] if paper else [Column('suppression_seconds')]
    caption = (
        f'{title}: {result.dataset}, {result.num_images} images, {same_in_all(result.settings)}. {_reference(result)}'
    )
    sheet = Sheet(caption, columns)
    for number, row in enumerate(rows):
        baseline = baseline_row(row, rows)
        cells = _words(row, rows, params, paper)
        for name in metrics:
            before = None if baseline is None or baseline is row else baseline.metrics[name]
            cells += _value_and_difference(row.metrics[name], before)
            if selection is not None and name == selection.criterion:
                one = selection.settings[number]
                cells.append(None if row.setting.is_baseline else (one.low, one.high))
        sheet.rows.append(cells if paper else [*cells, row.seconds])
        if number and (row.setting.is_baseline or row.source == 'config'):
            sheet.sections.add(number)
    return sheet


def by_class(
    result: Reevaluation,
    selection: Selection | None,
    title: str,
    scores: dict[int, dict[str, np.ndarray]],
    paper: bool,
) -> Sheet:
    """A line for each class, of several rows of the table; ``paper``: of the best or chosen row alone.

    ``scores``: of :func:`_class_scores`.
    """
    rows, truth = result.rows, result.session.truth
    best = _best(result, selection)
    objects = Objects.of(truth).counts.sum(0)
    params = [] if paper else list(dict.fromkeys(name for row in rows for name in row.params))
    columns = [*([] if paper else [Column('rule'), Column('source'), *map(Column, params)]), Column('class')]
    columns.append(Column('objects', 'count'))
    for name in PER_CLASS:
        columns += [Column(name, 'value'), Column(name, 'difference')]
    caption = f'{title}: {result.dataset}, by class.'
    if paper:
        caption = f'{caption[:-1]}, {telling_label(best, rows)} ({same_in_all(result.settings)}). {_reference(result)}'
    sheet = Sheet(caption, columns, long=True)
    for number, found in scores.items():
        row = rows[number]
        if paper and row is not best:
            continue
        baseline = baseline_row(row, rows)
        others = None if baseline is None or baseline is row else scores[rows.index(baseline)]
        for label, name in enumerate(truth.classes):
            cells = [] if paper else _words(row, rows, params, paper)
            cells += [name, int(objects[label])]
            for metric in PER_CLASS:
                cells += _value_and_difference(found[metric][label], None if others is None else others[metric][label])
            sheet.rows.append(cells)
    return sheet


def _best(result: Reevaluation, selection: Selection | None) -> Row:
    rows = result.rows
    if selection is None or rows[selection.chosen].setting.is_baseline:
        return best_row(rows)
    return rows[selection.chosen]


def _class_scores(result: Reevaluation, selection: Selection | None) -> dict[int, dict[str, np.ndarray]]:
    """(K,) AP, AP50 and AP75 of each class by number of the row, for the rows that a table by class shows."""
    rows, objects = result.rows, Objects.of(result.session.truth)
    best = _best(result, selection)
    wanted = [row for row in rows if len(rows) <= _MOST_BY_CLASS or row is best or row.source == 'config']
    wanted += [row for row in (baseline_row(one, rows) for one in wanted) if row is not None]
    return {
        number: class_scores(match(detections(result.session.candidates, row.setting), objects), objects)
        for number, row in enumerate(rows)
        if any(row is one for one in wanted)
    }


def class_scores(matches: Matches, objects: Objects) -> dict[str, np.ndarray]:
    """(K,) AP, AP50 and AP75 of every class, in [0, 1]; -1 where it has no object."""
    num_images, num_classes = objects.counts.shape
    weights, folds = np.ones((1, num_images), np.int32), np.zeros(num_images, np.int64)
    found = {name: np.empty(num_classes) for name in PER_CLASS}
    for label in range(num_classes):
        part = slice(matches.starts[label], matches.starts[label + 1])
        starts = np.array([0, part.stop - part.start], matches.starts.dtype)
        one = Matches(matches.image[part], matches.score[part], matches.true[part], matches.ignored[part], starts)
        counts = np.ascontiguousarray(objects.counts[:, label : label + 1])
        for name, values in found.items():
            values[label] = weighted_ap(one, counts, weights, folds, 0, name)[0, -1]
    return found


def _value_and_difference(value: float, before: float | None) -> list[float | None]:
    """None for COCO's -1, "no such object"."""
    if value == -1:
        return [None, None]
    return [float(value), None if before is None else float(value - before)]


def _words(row: Row, rows: Sequence[Row], params: Sequence[str], paper: bool) -> list[Any]:
    return [telling_label(row, rows)] if paper else [row.rule, row.source, *(row.params.get(one) for one in params)]


def to_csv(sheet: Sheet) -> str:
    """Unrounded; the differences of AP are ``AP_difference``, its interval ``AP_low`` and ``AP_high``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    heading: list[str] = []
    for column in sheet.columns:
        if column.kind == 'interval':
            heading += [f'{column.name}_low', f'{column.name}_high']
        else:
            heading.append(f'{column.name}_difference' if column.kind == 'difference' else column.name)
    writer.writerow(heading)
    for row in sheet.rows:
        cells: list[Any] = []
        for column, cell in zip(sheet.columns, row, strict=True):
            cells += (cell or (None, None)) if column.kind == 'interval' else [cell]
        writer.writerow(cells)
    return out.getvalue()


def to_latex(sheet: Sheet) -> str:
    """A ``table`` with booktabs' rules, or a ``longtable``; the first line says which packages it needs."""
    kinds = ''.join('l' if column.kind == 'word' else 'r' for column in sheet.columns)
    heading = ' & '.join(_latex_heading(column) for column in sheet.columns)
    best = _best_cells(sheet)
    lines = []
    for number, row in enumerate(sheet.rows):
        if number in sheet.sections:
            lines.append(r'\midrule')
        cells = []
        for place, (column, cell) in enumerate(zip(sheet.columns, row, strict=True)):
            text = _shown(column, cell)
            text = latex(text) if column.kind == 'word' else text.replace('-', '$-$').replace('+', '$+$')
            cells.append(rf'\textbf{{{text}}}' if (number, place) in best else text)
        lines.append(' & '.join(cells) + r' \\')
    about = f'% mmdet_softnms {__version__}. Needs \\usepackage{{booktabs{",longtable" if sheet.long else ""}}}.'
    if sheet.long:
        begin = [rf'\begin{{longtable}}{{@{{}}{kinds}@{{}}}}', rf'\caption{{{latex(sheet.caption)}}} \\']
        begin += [r'\toprule', rf'{heading} \\', r'\midrule', r'\endhead', r'\bottomrule', r'\endfoot']
        end = [r'\end{longtable}']
    else:
        begin = [r'\begin{table}', r'\centering', rf'\caption{{{latex(sheet.caption)}}}']
        begin += [rf'\begin{{tabular}}{{@{{}}{kinds}@{{}}}}', r'\toprule', rf'{heading} \\', r'\midrule']
        end = [r'\bottomrule', r'\end{tabular}', r'\end{table}']
    return '\n'.join([about, *begin, *lines, *end]) + '\n'


def to_markdown(sheet: Sheet) -> str:
    """A table as GitHub shows it, the caption below."""
    heading = [_plain_heading(column) for column in sheet.columns]
    best = _best_cells(sheet)
    lines = [heading, ['---' if column.kind == 'word' else '--:' for column in sheet.columns]]
    for number, row in enumerate(sheet.rows):
        texts = [_shown(column, cell) for column, cell in zip(sheet.columns, row, strict=True)]
        texts = [
            _markdown(one) if column.kind == 'word' else one for column, one in zip(sheet.columns, texts, strict=True)
        ]
        lines.append([f'**{one}**' if (number, place) in best else one for place, one in enumerate(texts)])
    return '\n'.join([*(f'| {" | ".join(line)} |' for line in lines), '', _markdown(sheet.caption)]) + '\n'


def _best_cells(sheet: Sheet) -> set[tuple[int, int]]:
    """Row and column of the best values of each metric in %, where lines are rules and not classes."""
    found = set()
    for place, column in enumerate(sheet.columns):
        if column.kind == 'value' and column.name in SHARES and not sheet.long:
            shown = [_shown(column, row[place]) for row in sheet.rows]
            values = [-1.0 if row[place] is None else row[place] for row in sheet.rows]
            best = shown[int(np.argmax(values))]
            found |= {(number, place) for number, text in enumerate(shown) if text == best and max(values) >= 0}
    return found


def _shown(column: Column, cell: Any) -> str:
    """A cell as a paper shows it."""
    if cell is None:
        return '' if column.kind in ('word', 'interval', 'difference') else '--'
    if column.kind == 'interval':
        return f'[{100 * cell[0]:+.2f}, {100 * cell[1]:+.2f}]'
    if column.kind in ('value', 'difference'):
        factor, digits = (100, 2) if column.name in SHARES else (1, 4)
        return f'{factor * cell:{"+" if column.kind == "difference" else ""}.{digits}f}'
    return str(cell)


def _plain_heading(column: Column) -> str:
    if column.kind == 'interval':
        return '95 %'
    return 'Δ' if column.kind == 'difference' else _markdown(column.name)


def _latex_heading(column: Column) -> str:
    if column.kind == 'interval':
        return r'95\,\%'
    if column.kind == 'difference':
        return r'$\Delta$'
    name, _, metric = column.name.rpartition('_')
    if found := re.fullmatch('(AP|AR)([0-9sml]+)', metric):
        return f'{latex(name)} {found[1]}$_{{{found[2]}}}$'.strip()
    return latex(column.name)


_LATEX = {
    '\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}', '<': r'\textless{}',
    '>': r'\textgreater{}', '|': r'\textbar{}', **{one: f'\\{one}' for one in '{}_%&#$'},
}  # fmt: skip


def latex(text: str) -> str:
    """Text as LaTeX: nothing in it is a command. Letters beyond Latin ones need XeLaTeX or LuaLaTeX and a font."""
    return ''.join(_LATEX.get(one, one) for one in ' '.join(text.split()))


def _markdown(text: str) -> str:
    return re.sub(r'([\\`*_|<>&$#~\[\]])', r'\\\1', ' '.join(text.split()))
