"""Zoo checkpoints are read without unsafe unpickling; anything else is refused with a reason."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.logging.history_buffer import HistoryBuffer

from mmdet_softnms.checkpoint import CheckpointError, check_weights, load_checkpoint

TOOLS = Path(__file__).parents[1] / 'tools'


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self):
        return os.system, ('touch pwned',)


@pytest.fixture
def zoo_checkpoint(tmp_path):
    """What mmengine's Runner writes: weights, a message hub of HistoryBuffers, numpy scalars and arrays."""
    buffer = HistoryBuffer()
    for value in (np.float64(0.5), 0.25, 1.0):
        buffer.update(value)
    hub = MessageHub('test_zoo_checkpoint')
    hub.update_scalar('train/loss', np.float64(1.5))
    hub.update_info('iter', np.int64(7))
    content = dict(
        meta=dict(epoch=12, dataset_meta=dict(classes=('a', 'b')), seed=np.int64(3), flag=np.bool_(True)),
        state_dict=collections.OrderedDict({'module.weight': torch.ones(2, 3), 'module.bias': torch.zeros(2)}),
        message_hub=dict(hub.state_dict(), extra=buffer),
        param_schedulers=[dict(last_step=np.int32(5), table=np.arange(3.0))],
    )
    torch.save(content, tmp_path / 'zoo.pth')
    return tmp_path / 'zoo.pth'


def test_zoo_checkpoints_are_read_safely(zoo_checkpoint):
    checkpoint = load_checkpoint(zoo_checkpoint)
    assert set(checkpoint['state_dict']) == {'weight', 'bias'}
    assert checkpoint['meta']['seed'] == 3
    assert checkpoint['message_hub']['extra'].current() == 1.0
    check_weights(torch.nn.Linear(3, 2), zoo_checkpoint)


@pytest.mark.parametrize('other', ['core', '_core'])
def test_files_of_either_numpy_are_read(zoo_checkpoint, tmp_path, other):
    """numpy 2 renamed numpy.core to numpy._core, and a file names the module it was written under."""
    import zipfile

    mine = 'core' if other == '_core' else '_core'
    changed = tmp_path / 'other.pth'
    replaced = 0
    with zipfile.ZipFile(zoo_checkpoint) as source, zipfile.ZipFile(changed, 'w') as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith('data.pkl'):
                # Protocol 2 writes a global's module as a line of text, so its length may change.
                old, new = f'cnumpy.{mine}.multiarray\n'.encode(), f'cnumpy.{other}.multiarray\n'.encode()
                replaced += data.count(old) + data.count(new)
                data = data.replace(old, new)
            target.writestr(name, data)
    assert replaced
    assert load_checkpoint(changed)['meta']['seed'] == 3


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': {'weight': torch.ones(1)}, 'meta': Evil()}, 'evil.pth')
    with pytest.raises(CheckpointError, match='system.*--trust-checkpoint') as raised:
        load_checkpoint('evil.pth')
    assert '\n' not in str(raised.value)
    assert not Path('pwned').exists()
    load_checkpoint('evil.pth', trust=True)
    assert Path('pwned').exists()


@pytest.mark.parametrize('script', ['test.py', 'train.py', 'reevaluate.py'])
def test_the_tools_do_not_run_it_either(tmp_path, script):
    """Negative control included: with the flag, it is run."""
    torch.save({'state_dict': {'weight': torch.ones(1)}, 'meta': Evil()}, tmp_path / 'evil.pth')
    (tmp_path / 'config.py').write_text("model = dict(type='FasterRCNN', roi_head=dict(type='StandardRoIHead'))\n")
    arguments = ['config.py', 'evil.pth'] if script != 'train.py' else ['config.py', '--resume', 'evil.pth']
    command = [sys.executable, str(TOOLS / script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('error: checkpoint evil.pth holds more than weights')
    assert not (tmp_path / 'pwned').exists()
    if script == 'reevaluate.py':
        subprocess.run([*command, '--trust-checkpoint'], cwd=tmp_path, capture_output=True, text=True)
        assert (tmp_path / 'pwned').exists()


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (None, 'does not exist'),
        (b'', 'cannot be read|more than weights'),
        (b'not a checkpoint at all', 'cannot be read|more than weights'),
        ({'state_dict': {}}, 'no state_dict'),
        ({'optimizer': {'lr': 0.1}}, 'no state_dict'),
        ([1, 2], 'holds a list'),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, words):
    path = tmp_path / 'bad.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def test_a_truncated_file_is_refused(zoo_checkpoint):
    data = zoo_checkpoint.read_bytes()
    zoo_checkpoint.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match='cannot be read'):
        load_checkpoint(zoo_checkpoint)


@pytest.mark.parametrize(
    ('model', 'words'),
    [
        (torch.nn.Linear(3, 4), r'weight is \(2, 3\) there but \(4, 3\)'),
        (torch.nn.Linear(3, 2, bias=False), 'also holds 1 entries, first bias'),
        (torch.nn.Sequential(torch.nn.Linear(3, 2)), 'lacks 2 entries, first 0.weight'),
    ],
)
def test_weights_that_do_not_fit_are_refused(zoo_checkpoint, model, words):
    with pytest.raises(CheckpointError, match=words):
        check_weights(model, zoo_checkpoint)
    check_weights(torch.nn.Linear(3, 2, bias=False), zoo_checkpoint, ignore=('bias',))
