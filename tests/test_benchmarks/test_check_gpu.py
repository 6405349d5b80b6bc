"""tools/check_gpu.sh on the CPU: the same steps, few cases; and what it says where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check_gpu

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='sees no GPU; --device cpu') as caught:
        check_gpu.main([])
    assert '\n' not in str(caught.value)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, 'NEEDED', ('torch', 'no_such_package'))
    with pytest.raises(SystemExit, match='no_such_package missing: .* -m pip install no_such_package'):
        check_gpu.main([])


def test_every_step_on_the_cpu(tmp_path: Path) -> None:
    command = ['bash', str(ROOT / 'tools/check_gpu.sh'), '--help']
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHON=sys.executable))
    assert done.returncode == 0 and 'check_gpu.sh' in done.stdout and '--device' in done.stdout, done.stderr
    # What it starts, in this process: another one would import everything anew.
    assert check_gpu.main(['--device', 'cpu', '--out', str(tmp_path / 'report.md')]) == 0
    text = (tmp_path / 'report.md').read_text()
    for step in ('Tests', 'Gradients', 'torch.compile', 'Operator', 'Post-processing stage'):
        assert f'## {step}: passed' in text
    assert 'worst against mmcv hard' in text and str(ROOT) not in text


def test_a_failing_step_fails_the_whole_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(device: str) -> str:
        raise check_gpu.StepError('wrong bits')

    for name in ('tests', 'random_cases', 'operator', 'stage', 'compiled'):
        monkeypatch.setattr(check_gpu, name, lambda device: 'fine')
    monkeypatch.setattr(check_gpu, 'gradients', fail)
    assert check_gpu.main(['--device', 'cpu', '--out', str(tmp_path / 'report.md')]) == 1
    text = (tmp_path / 'report.md').read_text()
    assert '## Gradients: FAILED\n\nwrong bits' in text and '## Post-processing stage: passed' in text
