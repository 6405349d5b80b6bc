"""The page: whole, self-contained, true to the rows, and right in a real browser."""

import base64
import csv
import dataclasses
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import axe_core_python
import pytest

import mmdet_softnms
from mmdet_softnms.reevaluation.report.export_table import by_rule, to_csv, to_latex
from mmdet_softnms.reevaluation.report.page import write_report
from mmdet_softnms.reevaluation.report.verdict import verdict_of


class _Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.code: dict[str, list[str]] = {'script': [], 'style': []}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.code.get(self.tags[-1][0] if self.tags else '', self.text).append(data)


def _read(page: Path) -> _Reader:
    reader = _Reader()
    reader.feed(page.read_text())
    return reader


def test_the_page_fetches_nothing_and_runs_its_one_script(page):
    reader = _read(page)
    tags = [tag for tag, _ in reader.tags]
    assert set(tags) & {'link', 'iframe', 'object', 'base', 'embed'} == set() and tags.count('script') == 1
    folder = Path(mmdet_softnms.__file__).parent / 'reevaluation/report'
    assert ''.join(reader.code['script']).strip() == (folder / 'report.js').read_text().strip()
    addresses = [
        value for _, attributes in reader.tags for name, value in attributes.items() if name in ('src', 'href')
    ]
    assert len(addresses) > 20 and all(address.startswith(('data:', '#')) for address in addresses)
    anchors = {attributes['id'] for _, attributes in reader.tags if 'id' in attributes}
    assert {address[1:] for address in addresses if address[0] == '#'} <= anchors
    assert not re.search(r'url\(|@import|https?://(?!www\.w3\.org)', page.read_text())
    assert not any(name.startswith('on') for _, attributes in reader.tags for name in attributes)


def test_names_are_shown_and_not_obeyed(page):
    text = ''.join(_read(page).text)
    assert 'A & B' in text and 'Drawn <b>set</b>' in text and 'chosen: <nothing>' in text
    assert '<script>alert(' in text and '<script>alert(' not in page.read_text()


def _tables(page: Path) -> list[list[tuple[str, list[str]]]]:
    """The tables of settings: of each row its class and its cells, without marks."""
    tables = []
    for part in page.read_text().split('<table class="sortable rows">')[1:]:
        body = part.split('<tbody>')[1].split('</tbody>')[0]
        rows = re.findall(r'<tr class="(.*?)">(.*?)</tr>', body, re.DOTALL)
        tables.append([
            (kinds, [re.sub('<.*?>', '', cell) for cell in re.findall(r'<t[hd].*?>(.*?)</t[hd]>', row, re.DOTALL)])
            for kinds, row in rows
        ])  # fmt: skip
    return tables


def test_the_rows_of_the_page_are_the_rows(page, result, selection):
    short, whole = _tables(page)
    assert len(whole) == len(result.rows) == 2 * 7 + 1
    for number, ((_, cells), row, one) in enumerate(zip(whole, result.rows, selection.settings, strict=True)):
        group = 0 if row.params['score_thr'] == 0.001 else 7  # differences refer to the hard NMS of the same
        value, baseline = row.metrics['AP'], result.rows[group].metrics['AP']
        expected = f'{100 * value:.2f}'
        interval = ''
        if number != group:
            expected += f'{100 * (value - baseline):+.2f}'
            interval = f'[{100 * one.low:+.2f}, {100 * one.high:+.2f}]'
        assert cells[1:4] == [f'{row.params["score_thr"]:g}', expected, interval]
    kinds = [kinds for kinds, _ in whole]
    assert sum('baseline' in one for one in kinds) == 2 and sum('config' in one for one in kinds) == 1
    assert [number for number, one in enumerate(kinds) if 'chosen' in one] == [selection.chosen]
    # The short one: baseline, config, the best five.
    assert len(short) == 7 and 'baseline' in short[0][0] and 'config' in short[1][0]
    values = [float(re.match(r'[\d.]+', cells[2])[0]) for _, cells in short[2:]]
    best = sorted((100 * row.metrics['AP'] for row in result.rows[:-1] if not row.setting.is_baseline), reverse=True)
    assert values == pytest.approx(best[:5], abs=0.005)
    assert any('chosen' in kinds for kinds, _ in short)


def test_the_verdict_says_what_to_do(result, selection, page, tmp_path):
    rows = result.rows
    # The block to paste is that of the verdict.
    verdict = verdict_of(selection, rows)
    sentence, row = verdict.sentence[1:], rows[verdict.row]  # the page writes the first letter large
    text = ''.join(_read(page).text)
    assert sentence in text and row.setting.snippet('mmdet_softnms.SoftNMSRoIHead') in text
    assert text.index(sentence) < text.index('Settings compared')
    # Without a selection it is the best row, and says that this flatters; there is no config to paste without one.
    few = dataclasses.replace(result, rows=rows[:7] + rows[-1:])
    write_report(tmp_path, few, title='t', command='c', num_pictures=0)
    text = (tmp_path / 'report.html').read_text()
    assert 'Best row: ' in text and 'flatters' in text and '_delete_' not in text and 'id="why"' not in text


def test_downloads_are_in_the_page(page, result, selection):
    links = {one['download']: one['href'] for tag, one in _read(page).tags if tag == 'a' and 'download' in one}
    texts = {name: base64.b64decode(url.split('base64,')[1]).decode() for name, url in links.items()}
    assert list(texts) == ['rows.csv', 'rows.tex', 'rows.json', 'classes.csv']
    assert texts['rows.csv'] == to_csv(by_rule(result, selection, 'A & B', paper=False))
    assert texts['rows.tex'] == to_latex(by_rule(result, selection, 'A & B', paper=True))
    table = list(csv.DictReader(io.StringIO(texts['rows.csv'])))
    assert [float(one['AP']) for one in table] == [row.metrics['AP'] for row in result.rows]
    assert float(table[1]['AP_difference']) == pytest.approx(float(table[1]['AP']) - float(table[0]['AP']))
    assert table[0]['AP_difference'] == ''
    content = json.loads(texts['rows.json'])
    assert [one['metrics'] for one in content['rows']] == [row.metrics for row in result.rows]
    assert content['selection']['criterion'] == 'AP' and 'duplicate' in content['errors']['baseline']['dAP']
    assert len(texts['classes.csv'].splitlines()) == 1 + len(result.rows[0].per_class)


def test_the_report_says_where_it_comes_from(page, result, tmp_path):
    text = ''.join(_read(page).text)
    assert re.search(r'20\d\d-\d\d-\d\d \d\d:\d\d UTC', text) and f'mmdet_softnms {mmdet_softnms.__version__}' in text
    assert 'some.pth' in text and 'python x --y "z"' in text
    (data,) = re.findall(r'annotated objects ([0-9a-f]{64})', text)
    truth = result.session.truth
    annotations = [dict(truth.coco['annotations'][0], bbox=[0.0, 0.0, 9.0, 9.0]), *truth.coco['annotations'][1:]]
    moved = dataclasses.replace(truth, coco=dict(truth.coco, annotations=annotations))
    session = dataclasses.replace(result.session, truth=moved)
    few = dataclasses.replace(result, rows=result.rows[:1], session=session, checkpoint_sha256='f' * 64)
    write_report(tmp_path, few, title='t', command='c')  # a single row: nothing to compare, and no empty section
    other = (tmp_path / 'report.html').read_text()
    assert data not in other and re.search(r'annotated objects [0-9a-f]{64}', other) and 'f' * 64 in other
    assert 'id="pictures"' not in other and 'href="#pictures"' not in other


BROWSERS = ('chromium-headless-shell', 'chromium', 'chromium-browser', 'google-chrome', 'chrome')
#: Of a copy of the page: what is seen, what the script does, what axe-core finds; then a control it has to find.
PROBE = """<script>onload = async () => {
  const images = [...document.images], out = {};
  const right = selector => document.querySelector(selector).getBoundingClientRect().right;
  try {
    out.width = innerWidth;
    out.wide = document.documentElement.scrollWidth - innerWidth;
    out.images = images.length;
    out.broken = images.filter(one => !one.complete || one.naturalWidth < 50).length;
    out.pictures = document.querySelectorAll('svg.picture').length;
    const sides = [...document.querySelectorAll('svg.picture')];
    out.drawn = Math.min(...sides.map(one => one.getBoundingClientRect().width));
    out.cut = [...document.querySelectorAll('body *')].filter(one => one.checkVisibility() && !one.closest('.scroll') &&
      one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80));
    out.interval = right('table.rows tbody td:nth-child(3)') - innerWidth;
    out.paper = getComputedStyle(document.body).backgroundColor;
    out.rows = document.querySelectorAll('#all tbody tr').length;
    const table = document.querySelector('#all table'), head = table.tHead.rows[0].cells[2];
    document.querySelector('#all').open = true;
    const values = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[2].textContent));
    out.original = values();
    head.querySelector('button').click();
    out.sorted = [values(), head.getAttribute('aria-sort')];
    head.querySelector('button').click(); head.querySelector('button').click();
    out.again = values();
    const box = table.closest('.scroll');
    box.style.height = '200px'; box.scrollTo(150, 80);
    const place = one => { const a = one.getBoundingClientRect(), b = box.getBoundingClientRect();
      return [Math.round(a.left - b.left), Math.round(a.top - b.top)]; };
    out.sticky = [place(table.tBodies[0].rows[5].cells[0])[0], place(table.tHead.rows[0].cells[2])[1]];
    document.querySelector('button.copy').click();
    await new Promise(done => setTimeout(done, 200));
    out.copied = document.querySelector('button.copy').textContent;
    document.querySelector('.comparison button.enlarge').click();
    const dialog = document.querySelector('dialog');
    out.enlarged = [dialog.open, dialog.querySelector('svg').getBoundingClientRect().width];
    dialog.close();
    for (const one of document.querySelectorAll('details')) one.open = true;
    const seen = async () => (await axe.run(document, {resultTypes: ['violations']})).violations.map(
      one => one.id + ': ' + one.nodes[0].html.slice(0, 150));
    out.violations = await seen();
    document.querySelector('img').removeAttribute('alt');
    document.querySelector('nav a').style.color = 'light-dark(#aaa, #444)';
    out.control = await seen();
  } catch (error) { out.error = String(error); }
  document.title = JSON.stringify(out);
};</script>"""


def test_in_a_real_browser(page, tmp_path):
    """At the width of a laptop and of a telephone, on a light and on a dark page: nothing cut off, all buttons work,
    and axe-core finds no violation."""
    browser = os.environ.get('BROWSER') or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f'no browser: none of {", ".join(BROWSERS)} is installed, and BROWSER names none')
    axe = (Path(axe_core_python.__file__).parent / 'axe.min.js').read_text().replace('</script', r'<\/script')
    copy = tmp_path / 'copy.html'
    copy.write_text(page.read_text().replace('</body>', f'<script>{axe}</script>{PROBE}</body>'))
    for width, scheme in ((1400, 'light'), (390, 'dark')):
        done = subprocess.run(
            [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path / str(width)}',
             f'--window-size={width},900', f'--blink-settings=preferredColorScheme={int(scheme == "light")}',
             '--virtual-time-budget=60000', '--dump-dom', copy.as_uri()],
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        title = re.search(r'<title>(\{.*?\})</title>', done.stdout, re.DOTALL)
        assert title, done.stdout[:500]
        found = json.loads(html.unescape(title[1]))
        assert 'error' not in found, found
        assert found['width'] in (width, 500)  # a browser with a window of its own is at least 500 wide
        assert found['images'] > 5 and found['broken'] == 0 and found['pictures'] > 4 and found['drawn'] > 100
        assert found['wide'] <= 0 and found['cut'] == [] and found['interval'] <= 0
        assert found['paper'] == ('rgb(255, 255, 255)' if scheme == 'light' else 'rgb(13, 17, 23)')
        values, order = found['sorted']
        assert found['rows'] == len(values) == 15 and order == 'descending' and values == sorted(values, reverse=True)
        assert found['again'] == found['original'] != values
        assert found['sticky'][0] <= 1 and found['sticky'][1] <= 1
        assert found['copied'].startswith(('Copied', 'Selected'))
        assert found['enlarged'][0] and found['enlarged'][1] > 300
        assert found['violations'] == []
        names = {one.split(':')[0] for one in found['control']}
        assert {'image-alt', 'color-contrast'} <= names, found['control']
