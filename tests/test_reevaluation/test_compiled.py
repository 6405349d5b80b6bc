"""Kernels of the re-evaluation without a place for numba's disk cache."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
from mmdet_softnms.reevaluation.choice.resampling import image_ap
from mmdet_softnms.reevaluation.scoring.matching import Objects, match
from tests.drawn import drawn_test_set
candidates, truth = drawn_test_set(6)
objects = Objects.of(truth)
print(image_ap(match([image.candidates for image in candidates], objects), objects.counts).sum())
"""


def _run(root: Path, **environment: str) -> tuple[str, str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith('NUMBA_')}
    variables |= {'PYTHONPATH': f'{root}{os.pathsep}{ROOT}', 'PYTHONDONTWRITEBYTECODE': '1', **environment}
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], capture_output=True, text=True, cwd=root, env=variables, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_no_writable_place_is_worth_a_warning_not_a_failure(tmp_path: Path) -> None:
    """A file stands where each directory would be, which stops even root."""
    shutil.copytree(
        ROOT / 'mmdet_softnms', tmp_path / 'mmdet_softnms', ignore=shutil.ignore_patterns('__pycache__', '.mim')
    )
    for folder in ('choice', 'scoring'):
        (tmp_path / 'mmdet_softnms' / 'reevaluation' / folder / '__pycache__').touch()
    home = tmp_path / 'home'
    home.touch()
    result, errors = _run(tmp_path, HOME=str(home), XDG_CACHE_HOME=str(home / 'cache'))
    with contextlib.redirect_stdout(io.StringIO()) as expected:
        exec(PROGRAM, {})
    assert result == expected.getvalue() and float(result) > 0
    assert 'the disk cache of numba cannot be used' in errors and 'Set NUMBA_CACHE_DIR' in errors
