"""The command line of tools/reevaluate.py: what it prints and writes, and one clear line for every bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_dataset import make_project

TOOL = Path(__file__).parents[2] / 'tools' / 'reevaluate.py'


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('cli'))


def _run(*arguments, **options):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_table_and_file(project, tmp_path):
    done = _run(project.voc_config, project.checkpoint, '--work-dir', tmp_path, '--max-per-img', 20)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / 'reevaluation.json').read_text())
    assert content['num_images'] == 6
    assert [row['rule'] for row in content['rows']] == ['HardNMS', 'SoftNMS', 'SoftNMS', 'nms']
    for row in content['rows']:
        assert {'AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC12_AP50'} <= set(row['metrics'])
        assert row['params']['max_per_img'] == (100 if row['source'] == 'config' else 20)
        assert row['seconds'] >= 0
    # Unrounded: mmdet's evaluators would leave three decimals.
    assert any(round(row['metrics']['AP'], 3) != row['metrics']['AP'] for row in content['rows'])
    lines = [line for line in done.stdout.splitlines() if '│' in line]
    assert 'HardNMS' in lines[0] and '+' not in lines[0]
    base, gaussian = content['rows'][0]['metrics']['AP'], content['rows'][2]['metrics']['AP']
    assert f'{100 * gaussian:.2f} {100 * (gaussian - base):+.2f}' in lines[2]


def _replace(config: Path, old: str, new: str) -> Path:
    text = config.read_text()
    assert old in text
    changed = config.with_name(f'changed_{abs(hash((old, new)))}.py')
    changed.write_text(text.replace(old, new))
    return changed


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda p: ('missing.py', p.checkpoint), 'config missing.py does not exist'),
        (lambda p: (p.coco_config, 'missing.pth'), 'checkpoint missing.pth does not exist'),
        (lambda p: (_broken_config(p), p.checkpoint), 'cannot be read: SyntaxError'),
        (
            lambda p: (p.coco_config, p.checkpoint, '--cfg-options', 'test_dataloader.dataset.ann_file=no.json'),
            'annotations of the test set cannot be read',
        ),
        (
            lambda p: (p.voc_config, p.checkpoint, '--cfg-options', 'test_dataloader.dataset.ann_file=no.txt'),
            'annotations of the test set cannot be read',
        ),
        (
            lambda p: (p.coco_config, p.checkpoint, '--cfg-options', 'test_evaluator.ann_file=no.json'),
            'annotation file no.json of test_evaluator does not exist',
        ),
        (
            lambda p: (p.coco_config, p.checkpoint, '--cfg-options', 'test_dataloader.dataset.data_prefix.img=no/'),
            '6 of 6 test images are missing',
        ),
        (
            lambda p: (_replace(p.coco_config, "'eel',", ''), p.checkpoint),
            'the model predicts 5 classes but the test set',
        ),
        (
            lambda p: (p.coco_config, p.checkpoint, '--cfg-options', 'model.neck.out_channels=8'),
            'does not fit the config: neck.lateral_convs.0.conv.weight',
        ),
        (
            lambda p: (p.coco_config, p.checkpoint, '--cfg-options', 'model.roi_head.type=GridRoIHead'),
            'GridRoIHead cannot be plugged',
        ),
        (lambda p: (p.coco_config, p.checkpoint, '--score-thr', 3), 'score_thr must be in'),
    ],
    ids=[
        'config', 'checkpoint', 'syntax', 'coco annotations', 'voc annotations', 'evaluator annotations', 'images',
        'classes', 'shapes', 'head', 'threshold',
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_earlier_results_stay(project, tmp_path, change, words):
    earlier = tmp_path / 'reevaluation.json'
    earlier.write_text('{"earlier": true}')
    done = _run(*change(project), '--work-dir', tmp_path, cwd=project.root)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and words in last
    assert 'Traceback' not in done.stderr
    assert earlier.read_text() == '{"earlier": true}'


def _broken_config(project):
    path = project.root / 'broken.py'
    path.write_text('model = dict(\n')
    return path


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_run_leaves_earlier_results(project, tmp_path, number, status):
    earlier = tmp_path / 'reevaluation.json'
    earlier.write_text('{"earlier": true}')
    # A slow test set, so that there is something to interrupt.
    (project.root / 'slow_dataset.py').write_text(
        'import time\n'
        'from mmdet.datasets import CocoDataset\n'
        'from mmdet.registry import DATASETS\n'
        "@DATASETS.register_module(name='SlowDataset', force=True)\n"
        'class SlowDataset(CocoDataset):\n'
        '    def __getitem__(self, index):\n'
        "        open('started', 'w').close()\n"
        '        time.sleep(20)\n'
        '        return super().__getitem__(index)\n'
    )
    (project.root / 'started').unlink(missing_ok=True)
    config = project.root / 'slow.py'
    config.write_text(
        project.coco_config.read_text().replace("'CocoDataset'", "'SlowDataset'")
        + "\ncustom_imports = dict(imports=['slow_dataset'])\n"
    )
    command = [sys.executable, str(TOOL), str(config), str(project.checkpoint), '--work-dir', str(tmp_path)]
    environment = dict(os.environ, PYTHONPATH=str(project.root))
    process = subprocess.Popen(
        command,
        cwd=project.root,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background job, as a CI may be, ignores SIGINT and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if (project.root / 'started').exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    if number == signal.SIGINT:
        assert 'interrupted: nothing was written' in error
    assert earlier.read_text() == '{"earlier": true}'
    assert [path.name for path in tmp_path.iterdir() if path.suffix == '.tmp'] == []


def test_a_work_dir_that_cannot_be_written(project, tmp_path):
    (tmp_path / 'file').write_text('')
    done = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path / 'file' / 'below')
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith('error: ')


def test_two_processes_give_the_same_rows(project, tmp_path):
    single = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path / 'one')
    assert single.returncode == 0, single.stderr
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(TOOL)]
    command += [str(project.coco_config), str(project.checkpoint), '--work-dir', str(tmp_path / 'two')]
    done = subprocess.run([*command, '--launcher', 'pytorch'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads((tmp_path / name / 'reevaluation.json').read_text())['rows'] for name in ('one', 'two')]
    for one, two in zip(*rows, strict=True):
        assert one['metrics'] == pytest.approx(two['metrics'], abs=1e-4)
