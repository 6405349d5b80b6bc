"""The suite's own rule: a skip for another reason than a missing GPU or missing shared data fails the run."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ('reason', 'status'), [('no GPU: none here', 0), ('no shared data: none here', 0), ('too tired', 1)]
)
def test_skips_are_guarded(tmp_path, reason, status):
    (tmp_path / 'conftest.py').write_text((Path(__file__).parent / 'conftest.py').read_text())
    (tmp_path / 'test_it.py').write_text(
        f'import pytest\ndef test_one():\n    pass\ndef test_two():\n    pytest.skip({reason!r})\n'
    )
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout
