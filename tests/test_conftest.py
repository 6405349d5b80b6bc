"""The suite's own rules: skips for another reason than those allowed fail the run; only marked tests see a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As if torch and mmengine had found a GPU when they were imported.
FAKE_GPU = """
import mmengine.device.utils, torch
torch.cuda.is_available = lambda: True
mmengine.device.utils.DEVICE = 'cuda'
"""
TESTS = """
import os, mmengine.device, pytest, torch

@pytest.fixture(scope='module')
def made_once():
    return mmengine.device.get_device()

def test_ordinary(made_once):
    assert not torch.cuda.is_available() and os.environ['CUDA_VISIBLE_DEVICES'] == ''
    assert made_once == mmengine.device.get_device() == 'cpu'

@pytest.mark.gpu
def test_marked():
    assert torch.cuda.is_available() and 'CUDA_VISIBLE_DEVICES' not in os.environ
    assert mmengine.device.get_device() == 'cuda'
"""


def _pytest(folder: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A run of some tests under this suite's conftest.py, in a folder of their own."""
    (folder / 'conftest.py').write_text((Path(__file__).parent / 'conftest.py').read_text())
    (folder / 'test_it.py').write_text(tests)
    environment = {key: value for key, value in os.environ.items() if key != 'CUDA_VISIBLE_DEVICES'}
    environment['PYTHONPATH'] = os.pathsep.join([str(folder), *filter(None, [environment.get('PYTHONPATH')])])
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '--strict-markers',
        '--rootdir',
        str(folder),
        *options,
        str(folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.parametrize(
    ('reasons', 'status'),
    [
        (
            (
                'no GPU: none here',
                'no shared data: none here',
                'no browser: none here',
                'no /proc: none here',
                'no detectron2: none here',
            ),
            0,
        ),
        (('no GPU: none here', 'too tired'), 1),
    ],
)
def test_skips_are_guarded(tmp_path, reasons, status):
    skips = [f'def test_{number}():\n    pytest.skip({reason!r})\n' for number, reason in enumerate(reasons)]
    # In torch's place, which takes seconds to import.
    (tmp_path / 'torch.py').write_text('class cuda:\n    is_available = staticmethod(lambda: False)\n')
    done = _pytest(tmp_path, ''.join(['import pytest\ndef test_one():\n    pass\n', *skips]))
    assert done.returncode == status, done.stdout
    assert ('forbidden skip: ' in done.stdout) == bool(status)


def test_only_marked_tests_see_a_gpu(tmp_path):
    (tmp_path / 'fake_gpu.py').write_text(FAKE_GPU)
    done = _pytest(tmp_path, TESTS, '-p', 'fake_gpu')
    assert done.returncode == 0 and '2 passed' in done.stdout, done.stdout


def test_marked_tests_are_skipped_without_a_gpu(tmp_path):
    (tmp_path / 'no_gpu.py').write_text('import torch\ntorch.cuda.is_available = lambda: False\n')
    done = _pytest(tmp_path, TESTS, '-p', 'no_gpu')
    assert done.returncode == 0 and '1 passed, 1 skipped' in done.stdout, done.stdout
