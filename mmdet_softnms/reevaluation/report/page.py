"""A re-evaluation as people and programs read it: tables, ``reevaluation.json``, and one self-contained HTML page."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mmdet_softnms.files import write_whole
from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.report.figures import (
    class_gain_figure,
    precision_recall_figure,
    sensitivity_figures,
    svg_url,
)
from mmdet_softnms.reevaluation.report.pictures import COLOURS, PICTURE_SCORE_THR, Picture, draw_pictures
from mmdet_softnms.reevaluation.report.table import (
    ALL_COLUMNS,
    baseline_row,
    best_row,
    cell,
    columns_of,
    full_label,
    interval_cells,
    notes,
)
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.scoring.sweep import Row


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
    best = best_row(rows) if selection is None or rows[selection.chosen].setting.is_baseline else rows[selection.chosen]
    columns = columns_of(rows, ALL_COLUMNS)
    baseline = baseline_row(best, rows) or rows[0]
    pictures: list[Picture] = []
    remark = ''
    if best is not baseline:
        pictures, remark = draw_pictures(result.session, baseline.setting, best.setting, num_pictures)
    heading, intervals = interval_cells(rows, selection)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('mmdet_softnms.reevaluation.report', '.'),
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
        sensitivity=[svg_url(figure) for figure in sensitivity_figures(rows)],
        curves=svg_url(precision_recall_figure(baseline, best)) if best is not baseline else '',
        bars=svg_url(class_gain_figure(baseline, best)) if best is not baseline else '',
        baseline=full_label(baseline, rows),
        best=full_label(best, rows),
        pictures=pictures,
        picture_remark=remark,
        picture_score_thr=PICTURE_SCORE_THR,
        colours=COLOURS,
    )
    paths = [work_dir / 'report.html', work_dir / 'report.md']
    write_whole(paths[0], page.encode(errors='backslashreplace'))  # a file name may be no text
    text = markdown(result, title=title, command=command, selection=selection, selection_words=selection_words)
    write_whole(paths[1], text.encode(errors='backslashreplace'))
    return paths


def markdown(
    result: Reevaluation, *, title: str, command: str, selection: Selection | None = None, selection_words: str = ''
) -> str:
    """The table for an issue, a pull request or a README; arguments as in :func:`write_report`."""
    columns = columns_of(result.rows, ALL_COLUMNS)
    heading, intervals = interval_cells(result.rows, selection)
    lines = [f'# {_escaped(title)}', '', _code(command), '', _escaped(result.dataset), '']
    lines.append('| ' + ' | '.join(['rule', 'score_thr', 'max_per_img', *columns, *heading]) + ' |')
    lines.append('|---' * 3 + '|--:' * (len(columns) + len(heading)) + '|')
    for row, more in zip(result.rows, intervals, strict=True):
        baseline = baseline_row(row, result.rows)
        around = [f'{row.params["score_thr"]:g}', str(row.params['max_per_img'])]
        cells = []
        for column in columns:
            value, _, difference = cell(row, baseline, column).partition(' ')
            cells.append(f'{value} ({difference})' if difference else value)
        lines.append('| ' + ' | '.join([_escaped(row.setting.label), *around, *cells, *more]) + ' |')
    lines += ['', *(f'{_escaped(line)}  ' for line in notes(result))]
    if selection_words:
        fence = _fence(selection_words, 3)
        lines += ['', fence, selection_words.rstrip(), fence]
    return '\n'.join(lines) + '\n'


def _escaped(text: str) -> str:
    """Text as Markdown: nothing in it becomes a cell, a link, emphasis, mathematics, HTML or another line."""
    return re.sub(r'([\\`*|<>&$#~\[\]]|(?<!\w)_|_(?!\w))', r'\\\1', ' '.join(text.split()))


def _code(text: str) -> str:
    """Text as a code span of one line."""
    text, fence = ' '.join(text.split()), _fence(text, 1)
    return f'{fence} {text} {fence}' if '`' in text else f'{fence}{text}{fence}'


def _fence(text: str, least: int) -> str:
    """More backticks than the text has in a row."""
    return '`' * max([least, *(len(run) + 1 for run in re.findall('`+', text))])


def _html_row(row: Row, rows: Sequence[Row], columns: Sequence[str], more: Sequence[str]) -> dict[str, Any]:
    baseline = baseline_row(row, rows)
    cells = []
    for column in columns:
        value, _, difference = cell(row, baseline, column).partition(' ')
        sign = '' if not difference or float(difference) == 0 else 'up' if difference.startswith('+') else 'down'
        cells.append(dict(value=value, difference=difference, sign=sign))
    cells += [dict(value=text, difference='', sign='') for text in more]
    return dict(
        label=row.setting.label,
        score_thr=f'{row.params["score_thr"]:g}',
        max_per_img=row.params['max_per_img'],
        cells=cells,
        seconds=f'{row.seconds:.2f}',
        baseline=row.setting.is_baseline,
        config=row.source == 'config',
    )
