"""mmrotate's detectors, tested in a process of their own (``mmrotate_*cases.py``), for torchvision's sake."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import mmrotate_for_tests

ROOT = Path(__file__).resolve().parents[1]


def test_in_a_process_of_its_own():
    if reason := mmrotate_for_tests.missing():
        pytest.skip(reason)
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('tests/mmrotate_*cases.py'))
    assert len(files) >= 2
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert ' passed' in done.stdout and 'skipped' not in done.stdout
