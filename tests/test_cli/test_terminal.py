"""What is seen of a command, and what goes to its log: in a process of its own, with a file or a terminal as output."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from mmdet_softnms.cli import terminal as module
from mmdet_softnms.cli.arguments import cannot_write
from mmdet_softnms.cli.terminal import Terminal

SCRIPT = """
import os, pathlib, subprocess, sys
from mmdet_softnms.cli.terminal import Terminal
with Terminal() as terminal:
    print('loading annotations into memory...')
    terminal.keep_log(pathlib.Path('run.log'))
    print('creating index...')
    subprocess.run([sys.executable, '-c', "print('of a process started anew')"])
    terminal.say('stored candidates found')
    terminal.progress('forward pass', 1, 2)
    terminal.progress('forward pass', 2, 2)
    terminal.print('use X: +1.02 AP', 'bold')
print('afterwards')
"""
CHATTER = ('loading annotations into memory...', 'creating index...', 'of a process started anew')


def _environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]), TERM='xterm', COLUMNS='80')


def test_piped_output_is_the_result_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True, env=_environment()
    )
    assert done.stdout == 'use X: +1.02 AP\nafterwards\n'
    assert done.stderr.splitlines() == ['stored candidates found', 'forward pass: 2 of 2 in 0:00']
    log = (tmp_path / 'run.log').read_text()
    for line in (*CHATTER, 'stored candidates found', 'forward pass: 2 of 2 in 0:00', 'use X: +1.02 AP'):
        assert line in log
    assert 'afterwards' not in log


def test_on_a_terminal_there_are_bars_and_no_chatter(tmp_path):
    """As under ``script``: standard output and error are a terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, '-c', SCRIPT], cwd=tmp_path, stdout=child, stderr=child, stdin=child, env=_environment()
    )
    os.close(child)
    shown = b''
    try:
        while block := os.read(parent, 4096):
            shown += block
    except OSError:  # Linux's way to say that the other end is closed
        pass
    assert process.wait() == 0
    text = shown.decode()
    assert '━' in text and '2/2' in text and 'use X: +1.02 AP' in text
    assert not any(line in text for line in CHATTER) and 'of 2 in' not in text
    assert all(line in (tmp_path / 'run.log').read_text() for line in (*CHATTER, 'forward pass: 2 of 2'))


def test_a_line_every_ten_per_cent_or_minute_with_the_time_left(monkeypatch, capsys, tmp_path):
    now = 0.0
    monkeypatch.setattr(module.time, 'monotonic', lambda: now)
    with Terminal() as terminal:
        terminal.keep_log(tmp_path / 'log')
        for done in range(1, 101):  # ten minutes: every 10 %
            terminal.progress('short', done, 100)
            now += 6
        for done in range(1, 11):  # two minutes a step: every step, though each is 1 %
            terminal.progress('long', done, 1000)
            now += 120
        for done in range(1, 1001):  # a second in all: the end alone
            terminal.progress('quick', done, 1000)
            now += 0.001
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == 'short: 11 of 100 (11 %), 8:54 left' and lines[9] == 'short: 100 of 100 in 9:54'
    assert len(lines) == 10 + 9 + 1 and lines[10] == 'long: 2 of 1000 (0 %), 33:16:00 left' and 'quick' in lines[-1]
    assert [line.split(' ', 2)[2] for line in (tmp_path / 'log').read_text().splitlines()] == lines


def test_a_command_that_ends_before_its_log_has_a_place_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Terminal():
        print('chatter')
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ''


def test_a_folder_that_cannot_be_written(tmp_path):
    for error, told in (
        (PermissionError(13, 'Permission denied', str(tmp_path / 'work' / '.lock')), True),
        (OSError(30, 'Read-only file system', str(tmp_path / 'work')), True),
        (PermissionError(13, 'Permission denied', '/other/image.jpg'), False),
        (OSError(28, 'No space left on device', str(tmp_path / 'work')), False),
    ):
        said = cannot_write(error, tmp_path / 'work')
        assert bool(said) == told and (not told or said.endswith('name another folder by --work-dir'))
