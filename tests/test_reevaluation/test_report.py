"""The report: whole, self-contained, true to the rows, and right in a real browser."""

import base64
import copy
import dataclasses
import html.parser
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from rich.console import Console

from mmdet_softnms.cli.terminal import Terminal
from mmdet_softnms.reevaluation.candidates.store import Candidates, ImageCandidates
from mmdet_softnms.reevaluation.choice.selection import Selection, select
from mmdet_softnms.reevaluation.report.figures import sensitivity_figures
from mmdet_softnms.reevaluation.report.page import markdown, write_report
from mmdet_softnms.reevaluation.report.pictures import draw_pictures
from mmdet_softnms.reevaluation.report.table import (
    baseline_row,
    best_row,
    full_label,
    notes,
    rows_table,
    to_table,
)
from mmdet_softnms.reevaluation.report.verdict import selection_text
from mmdet_softnms.reevaluation.result import Reevaluation, Session
from mmdet_softnms.reevaluation.scoring.matching import Objects
from mmdet_softnms.reevaluation.scoring.metrics import GroundTruth
from mmdet_softnms.reevaluation.scoring.settings import Setting, sweep_settings
from mmdet_softnms.reevaluation.scoring.sweep import evaluate_all, match_all
from mmdet_softnms.rules import HardNMS, SoftNMS
from tests.drawn import drawn_test_set

CFG = Config(
    dict(
        model=dict(
            roi_head=dict(type='StandardRoIHead'),
            test_cfg=dict(rcnn=dict(score_thr=0.05, max_per_img=100, nms=dict(type='nms', iou_threshold=0.5))),
        )
    )
)
EVIL = r'<script>alert("$\frac$")</script>'  # a class name; matplotlib would read mathematics, and fail


def _picture(path: Path, size=(500, 500)) -> str:
    cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    return str(path)


def _reevaluation(session: Session, settings: list[Setting], **options) -> Reevaluation:
    rows = evaluate_all(session.candidates, settings, session.truth)
    about = dict(
        dataset='Drawn <b>set</b>',
        num_images=len(session.candidates),
        num_candidates=session.candidates.num_candidates,
        masks_left_out=False,
        store='',
        store_bytes=0,
        forward_images=0,
        forward_seconds=0.0,
        notes=[],
    )
    return Reevaluation(**(about | options), rows=rows, session=session)


@pytest.fixture(scope='module')
def result(tmp_path_factory) -> Reevaluation:
    """A sweep over a drawn test set, one of whose classes has a dangerous name."""
    candidates, truth = drawn_test_set()
    truth.classes = (EVIL, *truth.classes[1:])
    specs = ['SoftNMS.sigma=0.2,0.5,0.9', 'SoftNMS.iou_threshold=0.2,0.4,0.6', 'score_thr=0.001,0.05']
    settings = sweep_settings(specs, CFG, 1e-3, 100, 1e-3)
    path = _picture(tmp_path_factory.mktemp('images') / 'one.jpg')
    return _reevaluation(Session(candidates, truth, [path] * len(candidates)), settings)


@pytest.fixture(scope='module')
def selection(result) -> Selection:
    session = result.session
    matches = match_all(session.candidates, result.settings, session.truth)
    return select(result.settings, matches, Objects.of(session.truth))


@pytest.fixture(scope='module')
def page(result, selection, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('report')
    words = 'chosen: <nothing>\nsecond line'
    command = 'python x --y "z"'
    write_report(folder, result, title='A & B', command=command, selection=selection, selection_words=words)
    return folder / 'report.html'


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def _read(page: Path) -> _Reader:
    reader = _Reader()
    reader.feed(page.read_text())
    return reader


def test_the_page_fetches_nothing_and_runs_nothing(page):
    reader = _read(page)
    assert {tag for tag, _ in reader.tags} & {'script', 'link', 'iframe', 'object', 'base'} == set()
    sources = [attributes['src'] for tag, attributes in reader.tags if 'src' in attributes]
    assert len(sources) > 5 and all(source.startswith('data:image/') for source in sources)
    assert not re.search(r'url\(|@import', page.read_text())


def test_names_are_shown_and_not_obeyed(page):
    text = ''.join(_read(page).text)
    assert 'A & B' in text and 'Drawn <b>set</b>' in text and 'chosen: <nothing>' in text
    assert '<script' not in page.read_text()


def test_the_rows_of_the_page_are_the_rows(page, result, selection):
    body = page.read_text().split('<tbody>')[1].split('</tbody>')[0]
    rows = [re.findall(r'<td>(.*?)</td>', row) for row in body.split('<tr')[1:]]
    assert len(rows) == len(result.rows) == 2 * 7 + 1
    for cells, row, one in zip(rows, result.rows, selection.settings, strict=True):
        group = 0 if row.params['score_thr'] == 0.001 else 7  # differences refer to the hard NMS of the same
        value, baseline = row.metrics['AP'], result.rows[group].metrics['AP']
        expected = f'{100 * value:.2f}'
        interval = ''
        if row is not result.rows[group]:
            expected += f'{100 * (value - baseline):+.2f}'
            interval = f'[{100 * one.low:+.2f}, {100 * one.high:+.2f}]'
        assert re.sub('<.*?>', '', cells[3]) == expected and cells[-2] == interval
    assert body.count('class="baseline"') == 2 and body.count('class="config"') == 1


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
    page = _read(tmp_path / 'report.html')
    assert MARKUP in ''.join(page.text)
    assert {tag for tag, _ in page.tags} & {'b', 'script'} == set()
    for figure in sensitivity_figures(rows):
        assert r'$\frac$' not in figure.get_suptitle() and r'\$\frac\$' in figure.get_suptitle()


def test_what_a_run_says_is_text(capsys):
    with Terminal() as terminal:
        terminal.say(MARKUP)
        terminal.progress(MARKUP, 1, 1)
    shown = capsys.readouterr().err
    assert shown.count(MARKUP[:30]) == 2


def test_curves_of_both_parameters_and_of_the_best_rest(result):
    figures = sensitivity_figures(result.rows)
    titles = [figure.get_suptitle() for figure in figures]
    # Two groups of score_thr: each curve is that of the better one, and says which.
    assert [title.split(' at ')[0] for title in titles] == [
        'SoftNMS linear over N_t (IoU threshold)',
        'SoftNMS gaussian over σ',
    ]
    for title, method in zip(titles, ('linear', 'gaussian'), strict=True):
        best = max(
            (row for row in result.rows if row.params.get('method') == method), key=lambda row: row.metrics['AP']
        )
        assert title.endswith(f' at score_thr {best.params["score_thr"]:g}')
    lines = figures[1].axes[0].get_lines()
    assert len(lines) == 12  # ten thresholds, AP, the baseline
    ap = next(line for line in lines if line.get_label() == 'AP')
    assert ap.get_xdata().tolist() == [0.2, 0.5, 0.9]
    shown = [100 * row.metrics['AP'] for row in result.rows if row.params.get('method') == 'gaussian']
    assert ap.get_ydata().tolist() in (pytest.approx(shown[:3]), pytest.approx(shown[3:]))
    gains = figures[1].axes[1].get_lines()[10]
    assert gains.get_ydata().tolist() != ap.get_ydata().tolist()


def test_plots_are_drawn_without_a_display(page):
    environment = {
        key: value for key, value in os.environ.items() if key not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')
    }
    script = (
        'import matplotlib; import mmdet_softnms.reevaluation.report.page; '
        'print(matplotlib.get_backend(auto_select=False))'
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, '-c', script], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] in ('None', 'agg')  # none was chosen: nothing looked for a display


def _scene(tmp_path):
    """Two cats side by side, the second lost to hard NMS; on another image Soft-NMS keeps a second box of one dog."""

    def image(number, boxes, scores, labels):
        found = InstanceData(bboxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))
        return ImageCandidates(f'image {number}', (200, 300), found)

    pair, dog = [[50.0, 50, 150, 150], [80.0, 50, 180, 150]], [[20.0, 20, 120, 120], [50.0, 20, 150, 120]]
    candidates = Candidates.of([image(0, pair, [0.9, 0.8], [0, 0]), image(1, dog, [0.9, 0.85], [1, 1])])
    objects = [(1, 0, pair[0]), (1, 0, pair[1]), (2, 1, dog[0]), (2, 1, [200.0, 20, 250, 70])]
    annotations = [
        dict(id=number + 1, image_id=image_id, category_id=label + 1, iscrowd=0, area=1e4,
             bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]])
        for number, (image_id, label, box) in enumerate(objects)
    ]  # fmt: skip
    coco = dict(
        images=[dict(id=1), dict(id=2)],
        annotations=annotations,
        categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
    )
    path = _picture(tmp_path / 'one.jpg', (200, 300))
    classes = (r'a $\frac$ cat', 'dog')
    settings = [Setting(HardNMS(0.5), 1e-3, 100), Setting(SoftNMS('linear', iou_threshold=0.3), 1e-3, 100)]
    return Session(candidates, GroundTruth(classes, coco, [1, 2], [1, 2]), [path, path]), settings


def _decode(url: str) -> np.ndarray:
    content = base64.b64decode(url.split(',')[1])
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(int)


def _near(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture - colour).max(-1) < 60).sum())


def test_recovered_objects_are_marked(tmp_path):
    session, settings = _scene(tmp_path)
    pictures, remark = draw_pictures(session, *settings, 4)
    (picture,) = pictures  # the dog's second box comes after all its objects: no gain, no loss
    assert (picture.img_id, picture.objects, picture.recovered, picture.lost, picture.added) == ('image 0', 2, 1, 0, 0)
    assert picture.ap[0] == pytest.approx(51 / 101) and picture.ap[1] == 1.0 and remark == ''
    before, after = _decode(picture.before), _decode(picture.after)
    assert before.shape == after.shape and abs(before.shape[1] - 640) <= 2
    gold = (255, 200, 0)
    assert _near(before, gold) < 50 < 500 < _near(after, gold)


def test_better_located_boxes_are_marked(tmp_path):
    """The object lies under the second box, the first one is 12 px off: only where both stay is it found up to 0.95."""
    session, settings = _scene(tmp_path)
    session.truth.coco['annotations'][2]['bbox'] = [32.0, 20, 100, 100]
    found = InstanceData(
        bboxes=torch.tensor([[20.0, 20, 120, 120], [32.0, 20, 132, 120]]),
        scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 1]),
    )  # fmt: skip
    session.candidates = Candidates.of([session.candidates[0], ImageCandidates('dog', (200, 300), found)])
    pictures, _ = draw_pictures(session, *settings, 4)
    (dog,) = (picture for picture in pictures if picture.img_id == 'dog')
    assert (dog.recovered, dog.lost, dog.tighter, dog.looser, dog.added) == (0, 0, 1, 0, 0) and dog.gain > 0
    blue = (64, 140, 255)
    assert _near(_decode(dog.before), blue) < 50 < 300 < _near(_decode(dog.after), blue)
    pictures, _ = draw_pictures(session, *reversed(settings), 4)
    (dog,) = (picture for picture in pictures if picture.img_id == 'dog')
    assert (dog.recovered, dog.lost, dog.tighter, dog.looser, dog.added) == (0, 0, 0, 1, 0) and dog.gain < 0


def test_losses_and_added_false_positives_are_marked(tmp_path):
    """From soft to hard, the same scene is a loss; a second box that is no object is an added false positive."""
    session, settings = _scene(tmp_path)
    (picture,), _ = draw_pictures(session, *reversed(settings), 4)
    assert picture.gain < 0 and (picture.recovered, picture.lost, picture.added) == (0, 1, 0)
    # Without the second cat's annotation its box is a false positive that comes with Soft-NMS, above a later object.
    session.truth.coco['annotations'][1] = dict(session.truth.coco['annotations'][1], bbox=[250.0, 10, 40, 40])
    late = Candidates.of([
        ImageCandidates('image 0', (200, 300), InstanceData(
            bboxes=torch.tensor([[50.0, 50, 150, 150], [80.0, 50, 180, 150], [250.0, 10, 290, 50]]),
            scores=torch.tensor([0.9, 0.89, 0.3]), labels=torch.tensor([0, 0, 0]))),
        session.candidates[1],
    ])  # fmt: skip
    session.candidates = late
    (picture,), _ = draw_pictures(session, *settings, 4)
    assert picture.gain < 0 and (picture.recovered, picture.lost, picture.added) == (0, 0, 1)
    red = (220, 40, 40)
    assert _near(_decode(picture.before), red) < 50 < 300 < _near(_decode(picture.after), red)


def test_images_that_are_gone_are_counted(tmp_path):
    session, settings = _scene(tmp_path)
    Path(session.image_paths[0]).unlink()
    pictures, remark = draw_pictures(session, *settings, 4)
    assert pictures == [] and remark == '1 images could not be read.'


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


BROWSERS = ('chromium-headless-shell', 'chromium', 'chromium-browser', 'google-chrome', 'chrome')


def test_in_a_real_browser(page, tmp_path):
    """Every picture is decoded, nothing runs over the page at the width of a laptop and of a telephone."""
    browser = os.environ.get('BROWSER') or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f'no browser: none of {", ".join(BROWSERS)} is installed, and BROWSER names none')
    # The page has no script; the copy that is looked at gets one that writes down what it finds.
    probe = (
        '<script>onload = () => { const images = [...document.images]; document.title = JSON.stringify({'
        ' images: images.length, broken: images.filter(one => !one.complete || one.naturalWidth < 50).length,'
        ' wide: document.documentElement.scrollWidth - innerWidth,'
        ' rows: document.querySelectorAll("#rows tbody tr").length,'
        ' text: document.querySelector("#rows tbody td").getBoundingClientRect().height }); }</script></body>'
    )
    copy = tmp_path / 'copy.html'
    copy.write_text(page.read_text().replace('</body>', probe))
    for width in (1400, 500):
        done = subprocess.run(
            [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path / str(width)}',
             f'--window-size={width},900', '--dump-dom', copy.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found = re.search(r'<title>\{(.*?)\}</title>', done.stdout)
        assert found, done.stdout[:500]
        values = dict(re.findall(r'"(\w+)":(-?[\d.]+)', found[1]))
        assert int(values['images']) > 5 and values['broken'] == '0' and values['rows'] == '15'
        assert float(values['wide']) <= 0 and float(values['text']) > 10
