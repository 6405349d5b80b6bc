"""The table at any width, the verdict, and the tables for papers, on drawn rows."""

import csv
import io
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from mmengine.config import Config
from rich.console import Console

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.choice.selection import Difference, Selection
from mmdet_softnms.reevaluation.report.export_table import check_out, latex, write_tables
from mmdet_softnms.reevaluation.report.table import print_table, telling_label, to_table
from mmdet_softnms.reevaluation.report.verdict import selection_text, verdict_of, wider_grid
from mmdet_softnms.reevaluation.result import Reevaluation, Session
from mmdet_softnms.reevaluation.scoring.settings import DEFAULT_SWEEP, Setting, sweep_settings
from mmdet_softnms.reevaluation.scoring.sweep import Row, evaluate_all
from mmdet_softnms.rules import HardNMS, MmcvNMS, SoftNMS
from tests.drawn import drawn_test_set

CFG = Config(
    dict(
        model=dict(
            roi_head=dict(type='StandardRoIHead'),
            test_cfg=dict(rcnn=dict(score_thr=0.05, max_per_img=100, nms=dict(type='nms', iou_threshold=0.5))),
        )
    )
)
METRICS = ('AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC12_AP50')


def _result(settings: list[Setting], session: Session | None = None, **aps: float) -> Reevaluation:
    """Rows with AP 0.5, 0.51, ... and other metrics a little off; ``aps`` by position, as ``row3=0.6``."""
    rows = []
    for number, setting in enumerate(settings):
        ap = aps.get(f'row{number}', 0.5 + 0.01 * number)
        metrics = {name: ap + 0.001 * place for place, name in enumerate(METRICS)}
        rows.append(Row(setting, metrics, 1.0, 1.0, {}, {}))
    return Reevaluation(
        dataset='drawn', num_images=30, num_candidates=5, masks_left_out=False, store='', store_bytes=0,
        forward_images=0, forward_seconds=0.0, rows=rows, notes=[], session=session,
    )  # fmt: skip


def _selection(result: Reevaluation, chosen: int, low: float, high: float) -> Selection:
    each = [Difference('', row.metrics['AP'], 0.5, -0.01, 0.02) for row in result.rows]
    procedure = Difference('procedure', 0.5 + (low + high) / 2, 0.5, low, high)
    return Selection('AP', '5-fold over images', procedure, each, chosen, [chosen] * 5, 1000)


def _screen(
    result: Reevaluation, width: int, selection: Selection | None = None, terminal: bool = False, **more
) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system='truecolor' if terminal else None
    )
    print_table(console, to_table(result, selection, width=width, plain=not terminal, **more))
    return console.file.getvalue()


GRID = ['SoftNMS.sigma=0.1:1.0:0.1', 'SoftNMS.iou_threshold=0.1:0.7:0.1', 'HardNMS.iou_threshold=0.3:0.7:0.1']
SWEPT = sweep_settings(GRID, CFG, 1e-3, 100, 1e-3)
DEFAULT = [
    Setting(HardNMS(), 1e-3, 100),
    Setting(SoftNMS('linear'), 1e-3, 100),
    Setting(SoftNMS(), 1e-3, 100),
    SWEPT[-1],
]


def test_eighty_columns_hold_what_matters():
    text = _screen(_result(DEFAULT), 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and text.isascii() and not any(line.endswith(' ') for line in lines)
    assert lines[1] == 'score_thr 0.001, max_per_img 100, min_score 0.001' and text.count('min_score') == 1
    assert lines[3].split() == ['rule', 'AP', 'AP50', 'AP75', 'AR100']
    assert lines[5].split() == ['HardNMS', 'iou_threshold=0.5', '50.00', '50.10', '50.20', '50.30']
    assert lines[7].split()[:4] == ['gaussian', 'sigma=0.5', '52.00', '+2.00']
    assert lines[8].startswith('nms iou_threshold=0.5') and lines[9] == 'score_thr=0.05 (config)'
    assert lines[-2] == 'Left out here, for lack of width: VOC07_AP50; VOC12_AP50.'
    wide = _screen(_result(DEFAULT), 160)
    assert 'SoftNMS linear iou_threshold=0.3' in wide and 'suppression s' in wide and 'Left out' not in wide
    # Values of a column stand below one another, the baseline's, too.
    assert (
        len({line.index(value) for line, value in zip(lines[5:9], ('50.00', '51.00', '52.00', '53.00'), strict=True)})
        == 1
    )


def test_a_selection_and_long_names_fit_as_well():
    long = type('AVeryLongNameOfARuleThatSomebodyGave' * 2, (SoftNMS,), {})
    result = _result([*SWEPT[:5], Setting(long('linear', iou_threshold=0.2), 1e-3, 100), SWEPT[-1]])
    for selection in (None, _selection(result, 3, 0.01, 0.02)):
        for width in (80, 60):
            text = _screen(result, width, selection)
            assert max(map(len, text.splitlines())) <= width
            assert text.count('55.00 +5.00') == 1 and ('[-1.00, +2.00]' in text) == (selection is not None)
    assert '55.00 +5.00' in _screen(result, 20)  # wider than the screen, never a number cut short
    few = _screen(_result(SWEPT), 80, most_rows=6)
    rows = [line for line in few.splitlines() if re.match('(HardNMS|linear|gaussian|nms) ', line)]
    assert len(rows) == 6 and 'The best 6 of 23 rows' in few and rows[0].split()[2] == '50.00'


def test_on_a_terminal_the_best_of_a_column_is_bold():
    text = _screen(_result(DEFAULT, row1=0.59, row3=0.45), 80, terminal=True)
    assert re.findall(r'\x1b\[1m([\d.]+)\x1b\[0m', text) == ['59.00', '59.10', '59.20', '59.30']
    assert '\x1b[32m' in text and '\x1b[31m' in text and '─' in text


def test_several_thresholds_have_a_column():
    settings = sweep_settings(['SoftNMS.sigma=0.3,0.5', 'score_thr=0.001,0.05'], CFG, 1e-3, 100, 1e-3)
    text = _screen(_result(settings), 80)
    header = next(line for line in text.splitlines() if line.startswith('rule'))
    assert header.split()[:3] == ['rule', 'score_thr', 'AP'] and 'max_per_img 100, min_score 0.001' in text
    assert [line.split()[2] for line in text.splitlines() if line.startswith('HardNMS')] == ['0.001', '0.05']


@pytest.mark.parametrize(
    ('chosen', 'interval', 'aps', 'first', 'pasted'),
    [
        (17, (0.01, 0.02), {}, 'use SoftNMS gaussian sigma=1: +1.50 AP [+1.00, +2.00]', 'SoftNMS'),
        (17, (-0.01, 0.02), {}, 'keep hard NMS: no significant difference, +0.50 AP [-1.00, +2.00]', 'HardNMS'),
        (17, (-0.02, -0.01), {}, 'keep hard NMS: the tuned suppression is worse, -1.50 AP [-2.00, -1.00]', 'HardNMS'),
        (0, (-0.01, 0.02), {}, 'keep hard NMS: none of the settings tried scores better', 'HardNMS'),
        (17, (0.01, 0.02), dict(row22=0.9), 'keep nms iou_threshold=0.5 score_thr=0.05 (config): 90.00 AP', "'nms'"),
    ],
    ids=['better', 'no difference', 'worse', 'hard is best', 'config is best'],
)  # fmt: skip
def test_the_verdict_is_the_first_line_and_what_is_pasted_follows_it(tmp_path, chosen, interval, aps, first, pasted):
    result = _result(SWEPT, **({'row22': 0.4} | aps))
    selection = _selection(result, chosen, *interval)
    text = selection_text(selection, result, CFG)
    assert text.splitlines()[0].startswith(first)
    # The README's recipe: sed -n '/^model = dict/,/^$/p'.
    (tmp_path / 'chosen.txt').write_text(text)
    done = subprocess.run(
        ['sed', '-n', '/^model = dict/,/^$/p', str(tmp_path / 'chosen.txt')], capture_output=True, text=True, check=True
    )
    config: dict = {}
    exec(done.stdout, config)
    assert config['model']['roi_head'] == dict(type='mmdet_softnms.SoftNMSRoIHead')
    assert pasted.strip("'") in config['model']['test_cfg']['rcnn']['nms']['type']
    asked = selection_text(selection, result, CFG, paste_anyway=True)
    assert ("'mmdet_softnms.SoftNMS'" in asked) == (chosen == 17)
    assert ('--paste-anyway' in text) == (pasted == 'HardNMS' and chosen == 17)
    assert ('--sweep SoftNMS.sigma=1:1.9:0.1' in text.splitlines()[-7] or '--sweep' in text) == (chosen == 17)


def test_who_has_soft_nms_is_told_to_use_hard_nms():
    settings = [*SWEPT[:-1], Setting(MmcvNMS('soft_nms', iou_threshold=0.3), 0.05, 100, 'config')]
    result = _result(settings, row22=0.4)
    assert verdict_of(_selection(result, 17, -0.01, 0.02), result.rows).sentence.startswith('use hard NMS: no sig')


GRIDS = [
    GRID,
    list(DEFAULT_SWEEP),
    ['VotedNMS.rule=SupportedNMS', 'VotedNMS.rule.rule.sigma=0.4,0.5', 'VotedNMS.rule.power=4,8'],
    ['SoftNMS.sigma=0.3,0.5', 'score_thr=0.001,0.05'],
    ['SoftNMS.sigma=0.1,0.5', 'SoftNMS.min_score=0.001,0.01'],
    ['soft_nms.method=linear,gaussian', 'soft_nms.sigma=0.1,0.5'],
    ['nms.iou_threshold=0.3,0.9'],
    ['max_per_img=50,100'],
]


@pytest.mark.parametrize('specs', GRIDS, ids=lambda specs: specs[0])
@pytest.mark.parametrize('agnostic', [False, True])
def test_the_wider_grid_goes_on_from_the_edge(specs, agnostic):
    """Its text, read as --sweep reads it, holds the setting itself and others beyond it."""
    if agnostic and specs[0].startswith(('nms', 'soft_nms')):
        return
    settings = sweep_settings(specs, CFG, 1e-3, 100, 1e-3, agnostic)
    edges = 0
    for setting in settings[:-1]:
        if wider := wider_grid(setting, settings):
            again = sweep_settings(shlex.split(wider[1])[1:], CFG, 1e-3, 100, 1e-3, agnostic)
            mine = [one for one in again if one.name == setting.name]
            assert setting.params in [one.params for one in mine], wider
            assert any(one.params not in [other.params for other in settings] for one in mine)
            edges += 1
    assert edges >= 1 and (specs != GRID or edges == 6)


@pytest.mark.parametrize('specs', GRIDS[:3], ids=lambda specs: specs[0])
def test_no_two_rows_are_called_the_same(specs):
    rows = _result(sweep_settings(specs, CFG, 1e-3, 100, 1e-3)).rows
    labels = [telling_label(row, rows) for row in rows]
    assert len(set(labels)) == len(labels)


def test_no_edge_where_a_parameter_can_go_no_further():
    settings = sweep_settings(['SoftNMS.iou_threshold=0.8:1.0:0.1'], CFG, 1e-3, 100, 1e-3)
    assert wider_grid(settings[-2], settings) is None and wider_grid(settings[1], settings) is not None
    assert wider_grid(settings[2], settings) is None


EVIL = r'50% of A_1 & B#2 {x} $\frac$ ~^<|>"'


@pytest.fixture(scope='module')
def measured() -> Reevaluation:
    """A real evaluation of drawn candidates, one class with a name that LaTeX would obey."""
    candidates, truth = drawn_test_set(12)
    truth.classes = (EVIL, *truth.classes[1:])
    session = Session(candidates, truth, [''] * 12)
    result = _result(DEFAULT, session)
    result.rows = evaluate_all(candidates, DEFAULT, truth)
    return result


def test_tables_for_papers(measured, tmp_path):
    paths = [tmp_path / 'new' / f'a{suffix}' for suffix in ('.csv', '.tex', '.md')]
    selection = _selection(measured, 2, 0.01, 0.02)
    written = write_tables(paths, measured, selection, title=EVIL)
    assert len(written) == 6 and all(path.is_file() for path in written)
    rows = list(csv.DictReader(io.StringIO(written[0].read_text())))
    base = measured.rows[0].metrics
    for line, row in zip(rows, measured.rows, strict=True):
        assert float(line['AP']) == row.metrics['AP'] and line['rule'] == row.rule
        if row is not measured.rows[0]:
            assert float(line['AP_difference']) == row.metrics['AP'] - base['AP'] and float(line['AP_low']) == -0.01
    classes = list(csv.DictReader(io.StringIO(written[1].read_text())))
    assert len(classes) == 4 * 4 and classes[0]['class'] == EVIL and classes[3]['objects'] == '0'
    truth = measured.session.truth
    counts = [sum(one['category_id'] == label + 1 and not one['iscrowd'] for one in truth.coco['annotations'])
              for label in range(4)]  # fmt: skip
    assert [int(line['objects']) for line in classes[:4]] == counts
    for number, row in enumerate(measured.rows):
        mine = [line for line in classes[4 * number : 4 * number + 4] if line['AP']]
        assert {line['class']: float(line['AP']) for line in mine} == pytest.approx(row.per_class, abs=1e-9)
        for metric in ('AP', 'AP50', 'AP75'):
            assert sum(float(line[metric]) for line in mine) / len(mine) == pytest.approx(row.metrics[metric], abs=1e-9)
    for path in written[2:4]:
        _check_latex(path.read_text())
    markdown = written[4].read_text().splitlines()
    assert len({len(re.findall(r'(?<!\\)\|', line)) for line in markdown if line.startswith('|')}) == 1
    assert markdown[0].startswith('| rule | AP | Δ | 95 % | AP50 | Δ |')


def _check_latex(text: str) -> None:
    """Cells, braces and environments match; where there is a TeX, it compiles."""
    assert text.count(r'\toprule') == text.count(r'\bottomrule') == 1
    bare = re.sub(r'\\[{}_%&#$]', '', re.sub(r'^%.*', '', text, flags=re.M))
    assert bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0 and '#' not in bare and '%' not in bare
    assert re.findall(r'\\begin\{(\w+)\}', text) == re.findall(r'\\end\{(\w+)\}', text)[::-1]
    assert len({line.count('&') for line in bare.splitlines() if line.endswith(r'\\') and '&' in line}) == 1
    if (tex := shutil.which('pdflatex')) is not None:
        packages = r'\usepackage{booktabs,longtable}'
        document = f'\\documentclass{{article}}{packages}\\begin{{document}}\n{text}\\end{{document}}'
        _compile(tex, document)


def _compile(tex: str, document: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 't.tex').write_text(document)
        command = [tex, '-interaction=nonstopmode', '-halt-on-error', 't.tex']
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors='replace')
        assert done.returncode == 0, done.stdout[-2000:]


def test_latex_of_what_could_be_a_command():
    assert latex('a_b\\c  {50%}\n') == r'a\_b\textbackslash{}c \{50\%\}'


def test_tables_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.csv').mkdir()
    for paths, words in (
        ([tmp_path / 'a.xlsx'], 'has to end in .csv, .tex, .md'),
        ([tmp_path / 'a.csv', tmp_path / 'a_per-class.csv'], 'twice'),
        ([tmp_path / 'file' / 'a.csv'], 'cannot be written'),
        ([tmp_path / 'folder.csv'], 'is a folder'),
    ):
        with pytest.raises(ReevaluationError, match=words):
            check_out(paths)
    check_out([tmp_path / 'new' / 'deep' / 'a.csv'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder.csv']
