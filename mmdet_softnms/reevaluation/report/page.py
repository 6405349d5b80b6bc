"""A re-evaluation as people read it: one self-contained HTML page, and its table in Markdown."""

import base64
import csv
import io
import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import mmdet
from mmengine.config import Config

from mmdet_softnms import __version__
from mmdet_softnms.files import write_whole
from mmdet_softnms.reevaluation.candidates.identity import digest
from mmdet_softnms.reevaluation.choice.selection import Selection
from mmdet_softnms.reevaluation.report import why
from mmdet_softnms.reevaluation.report.export_table import by_rule, to_csv, to_latex
from mmdet_softnms.reevaluation.report.figures import (
    Plot,
    class_plot,
    errors_plot,
    precision_recall_plots,
    sensitivity_plots,
    svg_url,
)
from mmdet_softnms.reevaluation.report.pictures import KINDS, PICTURE_SCORE_THR, Picture, draw_pictures
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
from mmdet_softnms.reevaluation.report.verdict import verdict_of
from mmdet_softnms.reevaluation.result import Reevaluation
from mmdet_softnms.reevaluation.scoring.settings import baseline_in_words, paste_block, varied_thresholds
from mmdet_softnms.reevaluation.scoring.sweep import Row

_BEST = 5  # rows of the short table, besides baseline and config
_GLOSSARY = (
    ('AP', 'average precision, mean over classes and over the ten IoU thresholds 0.50, 0.55, …, 0.95 (COCO); in %.'),
    ('AP50, AP75', 'AP at one IoU threshold.'),
    ('APs, APm, APl', 'AP of objects below 32² pixels, from 32² to 96², and above; - where there is no such object.'),
    ('AR1, AR10, AR100', 'recall with at most 1, 10 or 100 detections of each class and image; mean over thresholds.'),
    ('IoU', 'intersection over union of two boxes: 1 where they are the same, 0 where they do not touch.'),
    ('hard NMS', 'removes every box that overlaps a better one of its class by more than a threshold; the baseline is '
     '{baseline} with the same score_thr and max_per_img.'),
    ('Soft-NMS', 'lowers the score of such a box instead: linear by 1 - IoU, gaussian by exp(-IoU²/σ).'),
    ('score_thr', 'detections below it are dropped before suppression.'),
    ('max_per_img', 'so many detections are kept of each image.'),
    ('95 % interval', 'percentiles of the difference from hard NMS over bootstrap resamples of images: in the table of '
     'that row alone, in the verdict of the whole procedure, choice included.'),
    ('points', 'difference of two percentages.'),
    ('TIDE', 'errors of a detector by kind, and what AP50 would gain without them (Bolya et al., ECCV 2020).'),
    ('recovered, lost', 'an object that a detection matches at IoU 0.5 only after, only before.'),
    ('tighter, looser', 'an object that is matched up to a higher, to a lower IoU threshold than before.'),
)  # fmt: skip


def write_report(
    work_dir: Path,
    result: Reevaluation,
    *,
    title: str,
    command: str,
    selection: Selection | None = None,
    selection_words: str = '',
    num_pictures: int = 4,
    cfg: Config | None = None,
    checkpoint: str = '',
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
        cfg: of the detector; brings the lines to paste.
        checkpoint: as it was given.

    Raises:
        OSError: no permission or no space; earlier files are intact.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('mmdet_softnms.reevaluation.report', '.'),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    rows = result.rows
    compared = why.compared_rows(rows, selection)
    baseline = compared['baseline']
    best = compared.get('chosen') or compared.get('best') or baseline
    changed = best is not baseline
    pictures: list[Picture] = []
    remark = ''
    if changed:
        pictures, remark = draw_pictures(result.session, baseline.setting, best.setting, num_pictures)
    chosen = rows[selection.chosen] if selection else None
    columns, shown = _table(rows, selection)
    short = _short_table(rows, baseline, chosen, selection.criterion if selection else 'AP')
    contents = [('settings', 'Settings')]
    contents += [('why', 'Why it changed')] if result.errors else []
    contents += [('sensitivity', 'Sensitivity')]
    if changed:
        contents += [('curves', 'Precision and recall'), ('classes', 'Classes'), ('pictures', 'Pictures')]
    contents += [('glossary', 'Glossary'), ('about', 'About')]
    page = environment.get_template('report.html.jinja').render(
        title=title,
        dataset=result.dataset,
        date=datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        verdict=_verdict(result, selection, cfg),
        contents=contents,
        columns=columns,
        rows=shown,
        short=[shown[number] for number in short],
        caption=_caption(rows),
        notes=notes(result),
        downloads=_downloads(result, selection, baseline, best, title),
        selection=selection_words,
        errors=_errors(result) if result.errors else None,
        criterion=selection.criterion if selection else 'AP',
        sensitivity=[_image(plot) for plot in sensitivity_plots(rows, selection, chosen)],
        curves=[_image(plot) for plot in precision_recall_plots(baseline, best)] if changed else [],
        bars=_image(class_plot(baseline, best)) if changed else None,
        classes=_classes(result, baseline, best),
        baseline=full_label(baseline, rows),
        best=full_label(best, rows),
        pictures=pictures,
        picture_remark=remark,
        picture_score_thr=PICTURE_SCORE_THR,
        kinds=KINDS,
        glossary=[(term, text.replace('{baseline}', baseline_in_words(result.settings))) for term, text in _GLOSSARY],
        about=_about(result, command, checkpoint),
    )
    paths = [work_dir / 'report.html', work_dir / 'report.md']
    write_whole(paths[0], page.encode(errors='backslashreplace'))  # a file name may be no text
    text = markdown(result, title=title, command=command, selection=selection, selection_words=selection_words)
    write_whole(paths[1], text.encode(errors='backslashreplace'))
    return paths


def _verdict(result: Reevaluation, selection: Selection | None, cfg: Config | None) -> dict[str, Any]:
    rows = result.rows
    if selection is not None:
        verdict = verdict_of(selection, rows)
        sentence, row = verdict.sentence[0].upper() + verdict.sentence[1:], rows[verdict.row]
        details = (
            f'Chosen by {selection.criterion} on {selection.tuned_on}, scored on images it was not chosen on; 95 % '
            f'interval of the whole procedure over {selection.resamples} paired bootstrap resamples of images.'
        )
    else:
        row = best_row(rows)
        baseline = baseline_row(row, rows)
        gain = 100 * (row.metrics['AP'] - (baseline or row).metrics['AP'])
        if baseline is None or gain <= 0:
            row = baseline or row
            sentence, details = (
                'Keep hard NMS: no other row scores better',
                'For a choice among many settings: --select.',
            )
        else:
            sentence = f'Best row: {full_label(row, rows)}, {gain:+.2f} AP'
            details = (
                f'The best of {sum(one.source == "table" for one in rows)} rows on the images it is scored on, without '
                'an interval, flatters. For a setting to rely on, run the same command with --select; it takes no '
                'forward pass.'
            )
    paste = paste_block(row.setting, cfg) if cfg is not None else ''
    if paste:
        details += f' To paste into the config ({full_label(row, rows)}):'
    return dict(sentence=sentence, details=details, paste=paste, use=not row.setting.is_baseline)


def _caption(rows: Sequence[Row]) -> str:
    """What is the same in every row."""
    varied = varied_thresholds(row.setting for row in rows)
    same = [f'{name} {rows[0].params[name]:g}' for name in ('score_thr', 'max_per_img') if name not in varied]
    text = 'In %; below each value its difference from hard NMS, in points.'
    return f'{text} {" and ".join(same)} in every row that says nothing else.' if same else text


def _table(rows: Sequence[Row], selection: Selection | None) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Columns and rows as the template wants them."""
    metrics = columns_of(rows, ALL_COLUMNS)
    varied = varied_thresholds(row.setting for row in rows)
    heading, intervals = interval_cells(rows, selection)
    names: list[str] = []
    for metric in metrics:
        names += [metric, *(heading if selection and metric == selection.criterion else [])]
    columns = [dict(name='rule', first='ascending', title='')]
    columns += [dict(name=name, first='ascending', title='') for name in varied]
    columns += [dict(name=name, first='descending', title='') for name in names]
    columns.append(dict(name='seconds', first='ascending', title='of suppression, all images together'))
    shown = []
    for number, row in enumerate(rows):
        baseline = baseline_row(row, rows)
        cells = [_cell(f'{row.params[name]:g}', row.params[name]) for name in varied]
        for name in names:
            if name in heading and selection is not None:
                low = selection.settings[number].low
                cells.append(_cell(intervals[number][0], '' if row.setting.is_baseline else low))
            else:
                cells.append(_cell(cell(row, baseline, name), row.metrics[name]))
        cells.append(_cell(f'{row.seconds:.2f}', row.seconds))
        shown.append(_row(row, rows, cells, chosen=selection is not None and number == selection.chosen))
    return columns, shown


def _row(row: Row, rows: Sequence[Row], cells: list[dict[str, Any]], chosen: bool) -> dict[str, Any]:
    varied = varied_thresholds(one.setting for one in rows)
    same = [name for name in ('score_thr', 'max_per_img') if name not in varied]
    other = [f'{name}={row.params[name]:g}' for name in same if row.params[name] != rows[0].params[name]]
    kinds = {'baseline': row.setting.is_baseline, 'config': row.source == 'config', 'chosen': chosen}
    names = [name for name, is_so in kinds.items() if is_so]
    label = row.setting.label.removesuffix(' (config)')
    return dict(label=' '.join([label, *other]), kinds=names, badges=names, cells=cells)


def _cell(text: str, value: Any) -> dict[str, Any]:
    shown, _, difference = ('', '', '') if not text else (text, '', '') if text[0] == '[' else text.partition(' ')
    sign = '' if not difference or float(difference) == 0 else 'up' if difference.startswith('+') else 'down'
    return dict(value=shown, difference=difference, sign=sign, sort='' if value in ('', -1) else value)


def _short_table(rows: Sequence[Row], baseline: Row, chosen: Row | None, criterion: str) -> list[int]:
    """Positions of baseline, config's row, the best of the others, and the chosen one."""
    first = [number for number, row in enumerate(rows) if row is baseline]
    first += [number for number, row in enumerate(rows) if row.source == 'config']
    others = [number for number, row in enumerate(rows) if row.source == 'table' and not row.setting.is_baseline]
    best = sorted(others, key=lambda number: -rows[number].metrics[criterion])[:_BEST]
    last = [number for number, row in enumerate(rows) if row is chosen]
    return list(dict.fromkeys([*first, *best, *last]))


def _errors(result: Reevaluation) -> dict[str, Any]:
    found = result.errors
    base = found['baseline']
    lines = []
    for kind, meaning in why.MEANING.items():
        cells = []
        for name, one in found.items():
            value, change = 100 * one['dAP'][kind], 100 * (one['dAP'][kind] - base['dAP'][kind])
            shown = '' if name == 'baseline' else f'{round(change, 2) + 0.0:+.2f}'  # never -0.00
            sign = 'down' if change >= 0.005 else 'up' if change <= -0.005 else ''  # fewer errors are better
            thing, count = 'object' if kind == 'missed' else 'error', one['count'][kind]
            counted = f'{count} {thing}{"s" * (count != 1)}'
            cells.append(dict(value=f'{value:.2f}', difference=shown, sign=sign, count=counted))
        lines.append(dict(name=kind, meaning=meaning, cells=cells))
    names = ['hard NMS' if name == 'baseline' else name for name in found]
    return dict(sentence=why.sentence(found), plot=_image(errors_plot(found)), names=names, rows=lines)


def _image(plot: Plot) -> dict[str, Any]:
    width, height = (round(96 * inches) for inches in plot.figure.get_size_inches())
    return dict(url=svg_url(plot.figure), caption=plot.caption, words=plot.words, width=width, height=height)


def _classes(result: Reevaluation, baseline: Row, best: Row) -> list[dict[str, Any]]:
    """AP and objects of each class, largest gain first."""
    truth = result.session.truth
    label_of = {category: label for label, category in enumerate(truth.category_ids)}
    objects = dict.fromkeys(truth.classes, 0)
    for one in truth.coco['annotations']:
        objects[truth.classes[label_of[one['category_id']]]] += not one['iscrowd']
    found = []
    for name, before in baseline.per_class.items():
        after = best.per_class.get(name, before)
        found.append(dict(name=name, objects=objects[name], before=100 * before, after=100 * after,
                          gain=100 * (after - before)))  # fmt: skip
    return sorted(found, key=lambda one: -one['gain'])


def _about(result: Reevaluation, command: str, checkpoint: str) -> list[tuple[str, str]]:
    truth = result.session.truth
    data = digest(truth.coco, [str(one) for one in result.session.candidates.img_ids])
    return [
        ('command', command),
        ('checkpoint', ' '.join(filter(None, (checkpoint, f'sha256 {result.checkpoint_sha256 or "unknown"}')))),
        ('data', f'{result.num_images} images; sha256 of image ids and annotated objects {data}'),
        ('versions', f'mmdet_softnms {__version__}, mmdet {mmdet.__version__}'),
    ]


def _downloads(
    result: Reevaluation, selection: Selection | None, baseline: Row, best: Row, title: str
) -> list[dict[str, str]]:
    rows = result.rows
    classes = io.StringIO()
    writer = csv.DictWriter(classes, ('name', 'objects', 'before', 'after', 'gain'))
    writer.writeheader()
    writer.writerows(_classes(result, baseline, best))
    content = dict(
        dataset=result.dataset,
        checkpoint_sha256=result.checkpoint_sha256,
        rows=[dict(rule=row.rule, params=row.params, source=row.source, metrics=row.metrics) for row in rows],
        errors=result.errors,
        selection=selection.to_dict() if selection else None,
    )
    texts = {
        'rows.csv': ('text/csv', to_csv(by_rule(result, selection, title, paper=False))),
        'rows.tex': ('application/x-tex', to_latex(by_rule(result, selection, title, paper=True))),
        'rows.json': ('application/json', json.dumps(content, indent=1, default=repr)),
        'classes.csv': ('text/csv', classes.getvalue()),
    }
    return [
        dict(name=name, url=f'data:{kind};base64,{base64.b64encode(text.encode(errors="backslashreplace")).decode()}')
        for name, (kind, text) in texts.items()
    ]


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
    if result.errors:
        lines += ['', '## Why it changed', '', 'AP50 points lost to each kind of error (TIDE):', '']
        lines += why.markdown(result.errors)
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
