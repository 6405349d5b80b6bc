"""README and docs: every command is run, or says where it is run or why it is not; links and paths exist.

A comment before a block of code says which: ``<!-- run -->``, ``<!-- file: NAME -->``, ``<!-- run by: FILE -->`` or
``<!-- not run: REASON -->``. The blocks of a page run in its order, in one folder.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md'), *ROOT.glob('configs/*/README.md')]
)
BLOCK = re.compile(
    r'(?:^<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>bash|python|console)\n(?P<code>.*?)^```', re.M | re.S
)


class Block(NamedTuple):
    """One block of code in a page."""

    mark: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    return [Block(m['mark'] or '', m['language'], m['code']) for m in BLOCK.finditer(page.read_text())]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_every_command_is_run_or_says_why_not(page):
    for block in blocks(page):
        kind, _, what = block.mark.partition(': ')
        if block.language == 'python':
            ast.parse(block.code)
            if not kind:  # a config, or a part of one: shown, not run
                assert re.search(r'^(model|_base_|custom_imports) =', block.code, re.M), block.code
                continue
        assert kind in ('run', 'file', 'run by', 'not run'), f'{name(page)}: no mark before\n{block.code}'
        assert bool(what) == (kind != 'run')
        if kind == 'run by':
            assert (ROOT / what.split()[0].rstrip(',')).is_file(), what


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        target, _, anchor = link.partition('#')
        if '://' in link or link.startswith('mailto:'):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            titles = re.findall(r'^#+ (.+)$', file.read_text(), re.M)
            assert anchor in [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles], link
    prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    for path in re.findall(r'`((?:mmdet_softnms|tools|tests|configs|benchmarks|resources|docs)/[\w./-]+)`', prose):
        assert (ROOT / path).exists(), f'{name(page)} names {path}'


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


@pytest.mark.parametrize('page', [page for page in PAGES if any(b.mark == 'run' for b in blocks(page))], ids=name)
def test_commands_run(page, tmp_path):
    for entry in ('configs', 'tools', 'mmdet_softnms', 'benchmarks'):
        (tmp_path / entry).symlink_to(ROOT / entry)
    environment = os.environ | {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'PYTHONPATH': str(ROOT)}
    for number, (mark, language, code) in enumerate(blocks(page)):
        if mark.startswith('file: '):
            (tmp_path / mark.removeprefix('file: ')).write_text(code)
        elif mark == 'run':
            script = tmp_path / f'block{number}.{language}'
            script.write_text(code)
            command = ['bash', '-euo', 'pipefail', str(script)] if language == 'bash' else [sys.executable, str(script)]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f'{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
