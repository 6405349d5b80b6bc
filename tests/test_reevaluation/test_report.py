"""Tables on the screen and in Markdown, and names that look like markup."""

import copy
import dataclasses
import html
import io
import os
import re

import pytest
from rich.console import Console

from mmdet_softnms.cli.terminal import Terminal
from mmdet_softnms.reevaluation.choice.selection import select
from mmdet_softnms.reevaluation.report.figures import precision_recall_plots
from mmdet_softnms.reevaluation.report.page import markdown, write_report
from mmdet_softnms.reevaluation.report.table import (
    baseline_row,
    best_row,
    full_label,
    notes,
    rows_table,
    to_table,
)
from mmdet_softnms.reevaluation.report.verdict import selection_text
from mmdet_softnms.reevaluation.scoring.matching import Objects
from mmdet_softnms.reevaluation.scoring.sweep import match_all
from mmdet_softnms.rules import SoftNMS
from tests.drawn import CFG


def test_the_best_of_several_groups_is_the_best(result, selection):
    """A larger gain over a poorer baseline is no better setting; labels say the threshold where there are several."""
    rows, table = result.rows, [row for row in result.rows if row.source == 'table']
    assert best_row(rows).metrics['AP'] == max(row.metrics['AP'] for row in table if row.rule != 'HardNMS')
    assert full_label(rows[1], rows).endswith('score_thr=0.001') and full_label(rows[8], rows).endswith(
        'score_thr=0.05'
    )
    assert full_label(rows[1], rows[:7]) == rows[1].setting.label
    # The config has the second group's score_thr, and is compared with its baseline in every table.
    own = rows[-1]
    assert own.params['score_thr'] == 0.05 and baseline_row(own, rows) is rows[7]
    assert selection.settings[-1].baseline == pytest.approx(rows[7].metrics['AP'])
    assert 'its difference is to the first row' in notes(dataclasses.replace(result, rows=[*rows[:7], own]))[1]
    assert 'its difference' not in notes(result)[1]


def test_markdown_and_screen_say_the_same(result, selection):
    best = best_row(result.rows)
    for chosen in (None, selection):
        text = markdown(result, title='T', command='c', selection=chosen)
        lines = [line for line in text.splitlines() if line.startswith('|')]
        assert len(lines) == 2 + len(result.rows)
        assert len({line.count('|') for line in lines}) == 1
        assert f'{100 * best.metrics["AP"]:.2f} (' in text
        table = rows_table(result.rows, 'T', selection=chosen)
        assert table.row_count == len(result.rows)
        headings = [str(column.header).strip() for column in table.columns]
        assert ('AP gain, 95 %' in text) == ('AP gain, 95 %' in headings)
        assert ('AP gain, 95 %' in text) == (chosen is not None)


MARKUP = '[/nope] [red]x :smile: $\\frac$ `a` | <b> *b* [a](b)'


def _screen(table) -> str:
    out = io.StringIO()
    Console(file=out, width=400).print(table)
    return out.getvalue()


def test_names_that_look_like_markup_are_text(result, tmp_path):
    """rich's on the screen, Markdown's and HTML's in the report, mathematics in plots."""
    odd_class = type(MARKUP, (SoftNMS,), {})

    def renamed(row):
        if row.rule != 'SoftNMS':
            return row
        rule = copy.copy(row.setting.rule)
        rule.__class__ = odd_class
        return dataclasses.replace(row, setting=dataclasses.replace(row.setting, rule=rule))

    rows = [renamed(row) for row in result.rows]
    odd = dataclasses.replace(result, rows=rows, dataset=MARKUP, notes=[MARKUP])
    screen = _screen(to_table(odd))
    assert screen.count(MARKUP) == 2 + sum(row.rule == MARKUP for row in rows)
    command = f'python ``x`` {MARKUP}\n# second'
    text = markdown(odd, title=MARKUP, command=command, selection_words=f'```\n{MARKUP}')
    lines = text.splitlines()
    escaped = r'\[/nope\] \[red\]x :smile: \$\\frac\$ \`a\` \| \<b\> \*b\* \[a\](b)'
    assert lines[0] == f'# {escaped}' and f'{escaped}  ' in lines and escaped in lines
    assert lines[2] == f'``` python ``x`` {MARKUP} # second ```'
    assert lines[-4:] == ['````', '```', MARKUP, '````']
    table = [line for line in lines if line.startswith('|')]
    assert len({len(re.findall(r'(?<!\\)\|', line)) for line in table}) == 1
    write_report(tmp_path, odd, title='\udcff', command=command)  # of a file name that is no UTF-8
    page = (tmp_path / 'report.html').read_text()
    assert html.escape(MARKUP, quote=False) in page and '<b>' not in page and MARKUP not in page
    odd_row = next(row for row in rows if row.rule == MARKUP)
    for plot in precision_recall_plots(rows[0], odd_row):
        label = plot.figure.axes[0].get_legend().get_texts()[1].get_text()
        assert r'\$\frac\$' in label and r' $\frac' not in label


def test_what_a_run_says_is_text(capsys):
    with Terminal() as terminal:
        terminal.say(MARKUP)
        terminal.progress(MARKUP, 1, 1)
    shown = capsys.readouterr().err
    assert shown.count(MARKUP[:30]) == 2


def test_an_unwritable_folder_leaves_the_earlier_report(result, tmp_path, monkeypatch):
    (tmp_path / 'report.html').write_text('earlier')

    def full(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        write_report(tmp_path, result, title='t', command='c')
    assert (tmp_path / 'report.html').read_text() == 'earlier'
    assert [path.name for path in tmp_path.iterdir()] == ['report.html']


def test_what_is_said_of_a_selection(result, selection):
    session = result.session
    matches = match_all(session.candidates, result.settings, session.truth)
    objects = Objects.of(session.truth)
    text = selection_text(selection, result, CFG)
    assert '5-fold over images' in text and "roi_head=dict(type='mmdet_softnms.SoftNMSRoIHead')" in text
    same = select(result.settings, [matches[0]] * len(matches), objects)
    assert 'keep hard NMS: ' in selection_text(same, result, CFG)
    worse = select(result.settings, [matches[0]] * len(matches), objects)
    worse.chosen, worse.procedure.low, worse.procedure.high = 1, -0.2, -0.1
    assert 'keep hard NMS: the tuned suppression is worse' in selection_text(worse, result, CFG)
