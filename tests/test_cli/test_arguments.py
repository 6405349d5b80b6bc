"""The command lines without torch: help, wrong arguments, missing packages; and options as mmengine reads them."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import DictAction

from mmdet_softnms.cli import main as command_line
from mmdet_softnms.cli.arguments import EXTRAS, config_options

ROOT = Path(__file__).parents[2]
SLOW = ('torch', 'numpy', 'numba', 'mmengine', 'mmdet', 'mmcv', 'rich', 'pyarrow', 'onnx')


def _without(modules, *command):
    """Runs a command where some modules cannot be found: whatever is printed, was printed without them."""
    start = f"""
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {tuple(modules)!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
"""
    runner = {
        '-m': "sys.argv[:] = ['-m', *sys.argv[2:]]; sys.orig_argv = ['python', '-m', 'mmdet_softnms']\n"
        "runpy.run_module('mmdet_softnms', run_name='__main__', alter_sys=True)",
        'script': "sys.argv[:] = ['mmdet-softnms', *sys.argv[2:]]\n"
        'from mmdet_softnms.cli.main import main; sys.exit(main())',
    }.get(command[0], "sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(
        [sys.executable, '-c', start + runner, *map(str, command)], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    'command',
    [
        ('-m', '--help'),
        ('script', '--version'),
        *((way, name, '--help') for way in ('-m', 'script') for name in command_line.COMMANDS),
        *(
            (ROOT / 'tools' / f'{name}.py', '--help')
            for name in ('reevaluate', 'reproduce', 'export_onnx', 'benchmark')
        ),
    ],
    ids=lambda command: ' '.join(Path(word).name for word in command),
)
def test_help_needs_the_standard_library_alone(command):
    done = _without(SLOW, *command)
    assert done.returncode == 0 and ('usage: ' in done.stdout or '--version' in command), done.stderr


REEVALUATE = ('-m', 'reevaluate', 'config.py', 'checkpoint.pth')


@pytest.mark.parametrize(
    ('command', 'words'),
    [
        (('-m', 'evaluate'), "invalid choice: 'evaluate'"),
        ((*REEVALUATE, '--no-such-option'), 'unrecognized arguments: --no-such-option'),
        ((*REEVALUATE, '--select', 'AP99'), "invalid choice: 'AP99'"),
        ((*REEVALUATE, '--processes', '0'), '--processes: must be at least 1, got 0'),
        ((*REEVALUATE, '--folds', 'x'), "--folds: 'x' is not a whole number"),
        ((*REEVALUATE, '--folds', '1'), '--folds: must be at least 2, got 1'),
        ((*REEVALUATE, '--score-thr', 'nan'), 'score_thr must be in [0, 1), got nan'),
        ((*REEVALUATE, '--max-per-img', '-2'), 'max_per_img must be at least 1'),
        ((*REEVALUATE, '--min-score', '2'), 'min_score must be in [0, 1], got 2'),
        ((*REEVALUATE, '--sweep', 'sigma'), "'sigma' is not a sweep"),
        ((*REEVALUATE, '--sweep', 'SoftNMS.sigma=1:0:1'), 'a range is first:last:step'),
        ((*REEVALUATE, '--sweep', 'SoftNMS.sigma=1,,2'), 'has an empty value'),
        ((*REEVALUATE, '--sweep', 'missing.yml'), 'sweep file missing.yml does not exist'),
        ((*REEVALUATE, '--cfg-options', 'a'), "'a' is not KEY=VALUE"),
        ((ROOT / 'tools/export_onnx.py', 'config.py', 'out.onnx', '--num-rois', '0'), 'must be at least 1, got 0'),
        ((ROOT / 'tools/reproduce.py',), 'give the NAME of a model, or --list'),
    ],
    ids=lambda value: ' '.join(Path(word).name for word in value[2:]) if isinstance(value, tuple) else '',
)
def test_wrong_arguments_are_told_before_torch_is_imported(command, words):
    done = _without(SLOW, *command)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith('error: ') and words in last, done.stderr


@pytest.mark.parametrize(
    ('command', 'extra', 'names'),
    [
        (REEVALUATE, 'reevaluate', ('pyarrow', 'rich')),
        (('-m', 'reproduce', '--list'), 'reevaluate', EXTRAS['reevaluate']),
        (('-m', 'export', 'config.py', 'out.onnx'), 'export', ('onnx',)),
    ],
    ids=['reevaluate', 'reproduce', 'export'],
)
def test_missing_packages_are_named_with_their_extra(command, extra, names):
    done = _without(names, *command)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(name in done.stderr for name in names) and f"pip install '.[{extra}]'" in done.stderr


OPTIONS = ['a.b=1', 'c=[1,(2,x)]', 'd=1.5,true', 'e="text"', 'f=None', 'g=k=v', 'a.b=2']


def test_config_options_are_those_of_mmengine():
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    assert config_options(OPTIONS) == parser.parse_args(['--cfg-options', *OPTIONS]).cfg_options
    assert config_options(OPTIONS)['c'] == [1, (2, 'x')] and config_options([]) == {}
    with pytest.raises(SystemExit, match=r'error: --cfg-options a=\[1,2: '):
        config_options(['a=[1,2'])


def test_an_installed_package_without_benchmarks_says_so(monkeypatch, tmp_path):
    from mmdet_softnms.cli import benchmark

    monkeypatch.setattr(benchmark, 'CLONE', tmp_path)
    with pytest.raises(SystemExit, match='not part of the installed package; clone the project'):
        command_line.main(['benchmark', 'op'])
