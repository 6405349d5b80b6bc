"""The command line of tools/reevaluate.py: what it prints and writes, and one clear line for every bad input."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmdet_softnms.cli import reevaluate as command_line
from mmdet_softnms.reevaluation.run import only_run_in
from tests.commands import run_tool
from tests.tiny_dataset import make_project

TOOL = Path(__file__).parents[2] / 'tools' / 'reevaluate.py'


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('cli'))


def _run(*arguments, **options):
    return run_tool('reevaluate.py', *arguments, **options)


def test_table_and_file(project, tmp_path, forks):
    """As a process of its own: the others are run in this one."""
    arguments = (project.voc_config, project.checkpoint, '--work-dir', tmp_path, '--max-per-img', 20)
    status, out, errors = forks.start(project.root, TOOL, *arguments).wait()
    assert status == 0, errors
    assert 'terminated' not in errors  # mmdet's VOC evaluation forks, and ends its processes by SIGTERM
    content = json.loads((tmp_path / 'reevaluation.json').read_text())
    assert content['num_images'] == 6
    assert [row['rule'] for row in content['rows']] == ['HardNMS', 'SoftNMS', 'SoftNMS', 'nms']
    for row in content['rows']:
        assert {'AP', 'AP50', 'AP75', 'AR100', 'VOC07_AP50', 'VOC12_AP50'} <= set(row['metrics'])
        assert row['params']['max_per_img'] == (100 if row['source'] == 'config' else 20)
        assert row['seconds'] >= 0
    # Unrounded: mmdet's evaluators would leave three decimals.
    assert any(round(row['metrics']['AP'], 3) != row['metrics']['AP'] for row in content['rows'])
    lines = out.splitlines()
    lines = lines[next(number for number, line in enumerate(lines) if line.startswith('HardNMS')) :]
    assert max(map(len, out.splitlines()[:-1])) <= 80 and '+' not in lines[0]
    base, gaussian = content['rows'][0]['metrics']['AP'], content['rows'][2]['metrics']['AP']
    shown = ' '.join(next(line for line in lines if line.startswith('gaussian')).split())
    assert f'{100 * gaussian:.2f} {100 * (gaussian - base):+.2f}' in shown


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
        (lambda p: (p.coco_config, p.checkpoint, '--select', '--folds', 7), '7 folds of 6 images are not possible'),
    ],
    ids=[
        'config', 'checkpoint', 'syntax', 'coco annotations', 'voc annotations', 'evaluator annotations', 'images',
        'classes', 'shapes', 'head', 'threshold', 'folds',
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


@pytest.mark.parametrize(
    ('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 1), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_interrupted_run_leaves_earlier_results(project, tmp_path, forks, number, status):
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
    process = forks.start(project.root, TOOL, config, project.checkpoint, '--work-dir', tmp_path)
    for _ in range(600):
        if (project.root / 'started').exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, number)
    found, _, error = process.wait(60)
    assert found == status, error
    if number == signal.SIGINT:
        assert 'interrupted: earlier results are intact' in error
    if number == signal.SIGTERM:
        assert error.strip().splitlines()[-1].startswith('terminated: earlier results are intact')
        assert error.count('terminated') == 1
    assert earlier.read_text() == '{"earlier": true}'
    assert [path.name for path in tmp_path.iterdir() if path.suffix == '.tmp'] == []


def test_only_the_process_itself_says_that_it_was_terminated(tmp_path, forks):
    """Not its processes, however they were started, nor those of a pool, which its end terminates."""
    (tmp_path / 'script.py').write_text("""
import multiprocessing, os, signal, time
from mmdet_softnms.cli.reevaluate import _listen_to_scheduler

def wait(begun):
    begun.set()
    time.sleep(60)

if __name__ == '__main__':
    _listen_to_scheduler()
    with multiprocessing.get_context('fork').Pool(2) as pool:
        pool.map(abs, range(4))
    for start in ('fork', 'spawn', 'forkserver'):
        processes = multiprocessing.get_context(start)
        begun = processes.Event()
        child = processes.Process(target=wait, args=(begun,))
        child.start()
        assert begun.wait(60), start
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM, (start, child.exitcode)
    print('children done', flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
""")
    status, out, errors = forks.start(tmp_path, tmp_path / 'script.py').wait(120)
    assert status == 1 and 'children done' in out, errors
    assert errors.strip().startswith('terminated: ') and errors.count('terminated') == 1


def test_a_work_dir_that_cannot_be_written(project, tmp_path):
    (tmp_path / 'file').write_text('')
    done = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path / 'file' / 'below')
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith('error: ')


def test_an_unwritable_work_dir_is_told_before_the_network_runs(project, tmp_path):
    """As another user, since root may write anywhere; in a fork, which needs no import of mmdet."""
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)

    def try_it():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            only_run_in(tmp_path / 'work')
        except PermissionError:
            os._exit(7)

    child = multiprocessing.get_context('fork').Process(target=try_it)
    child.start()
    child.join(60)
    assert child.exitcode == 7 and not (tmp_path / 'work').exists()


def test_a_second_run_needs_no_network_and_says_so(project, tmp_path):
    first = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path)
    assert first.returncode == 0, first.stderr
    before = json.loads((tmp_path / 'reevaluation.json').read_text())
    assert before['forward_images'] == 6
    second = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path, '--sweep', 'SoftNMS.sigma=0.5')
    assert 'stored candidates found' in second.stderr and 'forward pass, batches' not in second.stderr
    after = json.loads((tmp_path / 'reevaluation.json').read_text())
    assert after['forward_images'] == 0 and after['store'] == before['store']
    assert after['rows'][1]['metrics'] == before['rows'][2]['metrics']
    for name in ('report.html', 'report.md'):
        assert 'sigma=0.5' in (tmp_path / name).read_text()
    # Made elsewhere: copied into another work directory by hand, or named.
    named = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path / 'b', '--store', before['store'])
    assert named.returncode == 0, named.stderr
    assert (
        json.loads((tmp_path / 'b' / 'reevaluation.json').read_text())['rows'][0]['metrics']
        == before['rows'][0]['metrics']
    )


def test_stores_that_cannot_be_taken(project, tmp_path):
    from mmengine.config import Config

    from mmdet_softnms.files import ReevaluationError
    from mmdet_softnms.reevaluation.candidates.forward import collect
    from mmdet_softnms.reevaluation.request import Request
    from mmdet_softnms.reevaluation.run import reevaluate

    cfg = Config.fromfile(project.coco_config)
    store = collect(cfg, project.checkpoint, 1e-3, tmp_path).store

    def refused(words, **options):
        with pytest.raises(ReevaluationError, match=words):
            reevaluate(Request(cfg, project.checkpoint, **options))

    refused('holds candidates above 0.001 only', store=store.folder, score_thr=1e-5)
    refused('is not a store of candidates', store=tmp_path)
    weights = torch.load(project.checkpoint, weights_only=True)
    weights['state_dict']['roi_head.bbox_head.fc_cls.bias'] += 0.1
    torch.save(weights, tmp_path / 'other.pth')
    with pytest.raises(ReevaluationError, match='was made with another checkpoint than what is given'):
        reevaluate(Request(cfg, tmp_path / 'other.pth', store=store.folder))
    cfg.test_dataloader.dataset.indices = 4
    refused('holds 6 images but the test set 4', store=store.folder)
    del cfg.test_dataloader.dataset['indices']
    # On a machine without the images: everything but the pictures.
    cfg.test_dataloader.dataset.data_prefix.img = 'gone/'
    assert len(reevaluate(Request(cfg, project.checkpoint, store=store.folder)).rows) == 4
    store.path_of(0).unlink()
    refused('1 of 6 shards cannot be used .00000.parquet missing', store=store.folder)


def test_select_prints_a_config_that_can_be_pasted(project, tmp_path):
    command = (project.coco_config, project.checkpoint, '--work-dir', tmp_path, '--select', '--folds', 3)
    done = _run(*command, '--sweep', 'SoftNMS.sigma=0.3,0.7')
    assert done.returncode == 0, done.stderr
    chosen = json.loads((tmp_path / 'reevaluation.json').read_text())['selection']
    assert chosen['resamples'] == 1000 and len(chosen['settings']) == 4 and len(chosen['chosen_by_fold']) == 3
    text = done.stdout[done.stdout.index('model = dict') :].split('written:')[0]
    pasted: dict = {}
    exec(text, pasted)
    assert pasted['model']['test_cfg']['rcnn']['nms']['type'].startswith('mmdet_softnms.')
    assert 'How the setting was chosen' in (tmp_path / 'report.html').read_text()
    first = done.stdout.splitlines()[0]
    assert first == chosen['verdict'] and first.startswith(('use ', 'keep '))
    assert first.startswith('keep ') or chosen['significant']


def test_select_tunes_on_a_split_of_its_own(project, tmp_path):
    """Half of the images as val_dataloader: tuned there, reported on the other half; shared images are refused."""
    content = json.loads((project.root / 'coco.json').read_text())
    for name, ids in (('tune', {1, 2, 3}), ('report', {4, 5, 6})):
        part = dict(content, images=[one for one in content['images'] if one['id'] in ids])
        part['annotations'] = [one for one in content['annotations'] if one['image_id'] in ids]
        (project.root / f'{name}.json').write_text(json.dumps(part))
    options = ['--cfg-options']
    for loader, name in (('test', 'report'), ('val', 'tune')):
        options += [f'{loader}_dataloader.dataset.ann_file={name}.json']
        options += [f'{loader}_evaluator.ann_file={project.root}/{name}.json']
    select = ('--select', '--sweep', 'SoftNMS.sigma=0.3,0.7')
    done = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path, *select, *options)
    assert done.returncode == 0, done.stderr
    chosen = json.loads((tmp_path / 'reevaluation.json').read_text())['selection']
    assert chosen['tuned_on'] == 'a split of its own' and chosen['chosen_by_fold'] == []
    same = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path / 'b', *select, '--tune-on', 'val')
    assert same.returncode == 1
    assert '6 of 6 images of val_dataloader are test images too' in same.stderr


def test_tuning_split_of_the_same_names_and_one_that_is_not_there(project, tmp_path):
    """train/0001.jpg and val/0001.jpg are two images; what cannot be read is no reason not to tune by folds."""
    from mmengine.config import Config

    from mmdet_softnms.files import ReevaluationError
    from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
    from mmdet_softnms.reevaluation.choice.plan import plan_choice
    from mmdet_softnms.reevaluation.request import Listener, Request

    cfg = Config.fromfile(project.coco_config)
    said = []

    def plan(**options):
        request = Request(cfg, project.checkpoint, select='AP', **options)
        return plan_choice(request, build_test_set(cfg), Listener(say=said.append))

    assert plan() is None and said == []  # the same images
    other = tmp_path / 'other'
    other.mkdir()
    for path in (project.root / 'VOC2007/JPEGImages').iterdir():
        (other / path.name).write_bytes(path.read_bytes() + b' ')
    cfg.val_dataloader.dataset.data_prefix.img = f'{other}/'
    split = plan()
    assert len(split.dataset) == 6 and said == []
    assert split.cfg.test_dataloader.dataset.data_prefix.img == f'{other}/'
    cfg.val_dataloader.dataset.ann_file = 'nowhere.json'
    assert plan() is None
    assert 'annotations of the val set cannot be read' in said[0]
    with pytest.raises(ReevaluationError, match='val_dataloader.dataset'):
        plan(tune_on='val')
    with pytest.raises(ReevaluationError, match='say'):
        plan(resamples=10)


def test_a_checkpoint_is_fetched_once(project, tmp_path, monkeypatch):
    fetched, given = [], []

    def fetch(name, map_location=None):
        fetched.append(name)
        return torch.load(project.checkpoint, map_location, weights_only=True)

    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes | {'store://': fetch})
    monkeypatch.setattr('mmdet_softnms.reevaluation.run.reevaluate', lambda request, *_: given.append(request))
    done = _run(project.coco_config, 'store://tiny.pth', '--work-dir', tmp_path)
    assert done.returncode == 0 and fetched == ['store://tiny.pth']
    assert given[0].checkpoint.is_file() and given[0].checkpoint.is_relative_to(tmp_path / 'hub')


def test_nothing_can_be_chosen_without_candidates(project, tmp_path):
    from mmengine.config import Config

    from mmdet_softnms.files import ReevaluationError
    from mmdet_softnms.reevaluation.request import Request
    from mmdet_softnms.reevaluation.run import reevaluate

    cfg = Config.fromfile(project.coco_config)
    result = reevaluate(Request(cfg, project.checkpoint, score_thr=0.999, work_dir=tmp_path))
    assert result.num_candidates > 0  # the config's own row has a lower one
    cfg.model.test_cfg.rcnn.score_thr = 0.999
    result = reevaluate(Request(cfg, project.checkpoint, score_thr=0.999, work_dir=tmp_path / 'b'))
    assert result.num_candidates == 0 and 'not one candidate' in result.notes[-1]
    with pytest.raises(ReevaluationError, match='nothing can be chosen: .* holds not one candidate'):
        reevaluate(Request(cfg, project.checkpoint, score_thr=0.999, work_dir=tmp_path / 'b', select='AP'))


def test_two_runs_in_one_directory(project, tmp_path):
    with (tmp_path / '.lock').open('w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as another process does
        done = _run(project.coco_config, project.checkpoint, '--work-dir', tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f'error: another run is at work in {tmp_path}')


def test_two_processes_give_the_same_bytes_and_rows(project, tmp_path, forks):
    """At equal threads: torchrun sets one, as here. The sweep is divided among the processes, too."""
    arguments = (project.coco_config, project.checkpoint, '--sweep', 'SoftNMS.sigma=0.3,0.5,0.7', '--work-dir')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        variables = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE='2')
    variables |= dict(LOCAL_WORLD_SIZE='2', OMP_NUM_THREADS='1')
    ranks = [
        forks.start(project.root, TOOL, *arguments, tmp_path / 'two', '--launcher', 'pytorch', **variables,
                    RANK=number, LOCAL_RANK=number)
        for number in ('0', '1')
    ]  # fmt: skip
    for rank in ranks:
        status, _, errors = rank.wait()
        assert status == 0, errors[-3000:]
    status, _, errors = forks.start(project.root, TOOL, *arguments, tmp_path / 'one').wait()
    assert status == 0, errors
    one, two = (json.loads((tmp_path / name / 'reevaluation.json').read_text()) for name in ('one', 'two'))
    stores = [{path.name: path.read_bytes() for path in Path(content['store']).iterdir()} for content in (one, two)]
    assert stores[0] == stores[1] and len(stores[0]) == 1 + 2 * 6
    for left, right in zip(one['rows'], two['rows'], strict=True):
        assert {**left, 'seconds': 0, 'metric_seconds': 0} == {**right, 'seconds': 0, 'metric_seconds': 0}
    assert len(one['rows']) == 5


@pytest.mark.parametrize('raised', [SystemExit('terminated'), KeyboardInterrupt(), ValueError('a fault')])
def test_a_signal_is_not_taken_for_a_config_that_cannot_be_formatted(monkeypatch, raised):
    """As mmengine's ``Config.pretty_text`` does with whatever is raised in it."""

    def run(args):
        try:
            raise raised
        except BaseException:
            raise SyntaxError('Failed to format the config file')  # noqa: B904

    monkeypatch.setattr(command_line, 'run', lambda args, terminal: run(args))
    with pytest.raises(SyntaxError if isinstance(raised, ValueError) else type(raised)):
        command_line._run(None, None)
