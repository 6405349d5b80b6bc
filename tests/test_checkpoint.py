"""Zoo checkpoints are read without unsafe unpickling; anything else is refused with a reason."""

import collections
import datetime
import os
import pickle
import zipfile
from pathlib import Path

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.logging import MessageHub
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import CheckpointLoader, Runner

from mmdet_softnms.checkpoint import (
    CheckpointError,
    LoadedWeights,
    check_weights,
    forbid_unsafe_loading,
    load_checkpoint,
    verify_loaded,
)
from tests.commands import run_tool


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
    done = run_tool(script, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('error: checkpoint evil.pth holds more than weights')
    assert not (tmp_path / 'pwned').exists()
    if script == 'reevaluate.py':
        run_tool(script, *arguments, '--trust-checkpoint', cwd=tmp_path)
        assert (tmp_path / 'pwned').exists()


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (None, 'does not exist'),
        (b'', 'damaged .it is empty.: fetch it again'),
        (b'not a checkpoint at all', 'damaged .it is not a file that torch wrote.: fetch it again'),
        (b'\n<!DOCTYPE html><html>404</html>', 'damaged .it is a web page.: fetch it again'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git lfs pull'),
        ((2).to_bytes(8, 'little') + b'{}' + b'0' * 8, 'is a safetensors file'),
        (pickle.dumps({'state_dict': 1}), 'is a bare pickle'),
        (pickle.dumps(os.system), 'is a bare pickle'),
        ({'state_dict': {}}, 'no state_dict'),
        ({'optimizer': {'lr': 0.1}}, 'no state_dict'),
        ({'state_dict': {'weight': 1}}, 'no state_dict'),
        ({'state_dict': [torch.ones(1)]}, 'holds a list as its state_dict'),
        ({'state_dict': 'weights'}, 'holds a str as its state_dict'),
        ({'state_dict': {1: torch.ones(1)}}, 'has 1 in its state_dict'),
        ({1: torch.ones(1)}, 'has 1 in its state_dict'),
        ({'state_dict': {'a': torch.ones(1), 'module.a': torch.ones(1)}}, 'holds weights twice'),
        ([1, 2], 'holds a list'),
    ],
    ids=str,
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, words):
    path = tmp_path / 'bad.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=words) as raised:
            load_checkpoint(path, trust=trust)
        assert '\n' not in str(raised.value) and '--trust-checkpoint' not in str(raised.value)


def _changed(path: Path, change) -> Path:
    """The archive with the content of its members changed, their checksums right."""
    other = path.with_name('changed.pth')
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, 'w') as target:
        for name in source.namelist():
            target.writestr(name, change(name.rpartition('/')[2], source.read(name)))
    return other


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'short storage', 'absurd storage', 'bomb', 'pickle'])
def test_a_damaged_file_is_to_be_fetched_again(tmp_path, damage):
    """torch itself reads over a flipped bit."""
    path = tmp_path / 'some.pth'
    torch.save({'state_dict': {'weight': torch.arange(100.0)}}, path)
    if damage == 'truncated':
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == 'flipped':
        _flip(path, path.read_bytes().index(torch.arange(100.0).numpy().tobytes()) + 200)
        assert len(torch.load(path, weights_only=True)['state_dict']) == 1
    elif damage == 'short storage':
        path = _changed(path, lambda name, data: data[:40] if name == '0' else data)
    elif damage == 'absurd storage':  # ten trillion numbers instead of a hundred
        many = b'\x8a\x06' + (10**13).to_bytes(6, 'little')
        path = _changed(path, lambda name, data: data.replace(b'Kd', many) if name == 'data.pkl' else data)
    elif damage == 'bomb':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as target:
            target.writestr('some/data.pkl', bytes(30 << 20))
            target.writestr('some/data/0', bytes(30 << 20))
        data = path.read_bytes().replace((30 << 20).to_bytes(4, 'little'), (2**31).to_bytes(4, 'little'))
        path.write_bytes(data)
    else:
        path = _changed(path, lambda name, data: data[:60] + b'\xff' + data[61:] if name == 'data.pkl' else data)
    with pytest.raises(CheckpointError, match='is damaged .*: fetch it again') as raised:
        load_checkpoint(path)
    assert 'trust' not in str(raised.value) and '\n' not in str(raised.value)


def test_other_formats_and_places(tmp_path, zoo_checkpoint):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / 'script.pth')
    with zipfile.ZipFile(tmp_path / 'images.pth', 'w') as archive:
        archive.writestr('a.jpg', 'a')
    for path, words in (
        (tmp_path / 'script.pth', 'TorchScript archive'),
        (tmp_path / 'images.pth', 'ZIP archive'),
        (tmp_path, 'is a folder'),
        (tmp_path / 'no\0where.pth', 'does not exist'),
        (tmp_path / ('x' * 300), 'does not exist'),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path)
    # Without checksums, as torch can be told to write, and as torch < 1.6 wrote.
    content = load_checkpoint(zoo_checkpoint)
    if hasattr(torch.serialization, 'set_crc32_options'):
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(content, tmp_path / 'unchecked.pth')
        finally:
            torch.serialization.set_crc32_options(True)
        assert 'weight' in load_checkpoint(tmp_path / 'unchecked.pth')['state_dict']
    legacy = tmp_path / 'legacy.pth'
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    assert 'weight' in load_checkpoint(legacy)['state_dict']
    legacy.write_bytes(legacy.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match='is damaged'):
        load_checkpoint(legacy)
    torch.save({'state_dict': {}, 'meta': Evil()}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match='more than weights.*--trust-checkpoint'):
        load_checkpoint(legacy)


def _with_pickle(path: Path, content: bytes) -> Path:
    """A checkpoint of a hand-made pickle, beside one weight that is not in it."""
    torch.save({}, path)
    return _changed(path, lambda name, data: content if name == 'data.pkl' else data)


@pytest.mark.parametrize('module', ['builtins', '__builtin__'])
@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        ('mmengine.logging.history_buffer HistoryBuffer', '__init__'),
        ('mmengine.logging.history_buffer HistoryBuffer', '__setstate__'),
        ('mmengine.logging.history_buffer HistoryBuffer', 'register_statistics'),
        ('mmengine.logging.history_buffer HistoryBuffer', '_statistics_methods'),
        ('mmengine.config.config ConfigDict', 'min'),
        ('collections OrderedDict', 'mean'),
        ('mmengine.optim.scheduler.param_scheduler OneCycleParamScheduler', '__init__'),
        ('mmengine.optim.scheduler.param_scheduler OneCycleParamScheduler', 'min'),
    ],
)
def test_getattr_reaches_the_pickled_functions_and_nothing_else(tmp_path, module, owner, name):
    def by_getattr(name):
        called = f'c{module}\ngetattr\n(c{owner.replace(" ", chr(10))}\nX'.encode()
        return b'\x80\x02}' + called + len(name).to_bytes(4, 'little') + name.encode() + b'tRK\x01s.'

    for trusted in (False, True):  # the second time after a load by mmengine, whose fork allows the real getattr
        with pytest.raises(CheckpointError, match='more than weights.*getattr'):
            load_checkpoint(_with_pickle(tmp_path / 'a.pth', by_getattr(name)))
        if trusted:
            continue
        torch.save({'state_dict': {'weight': torch.ones(1)}}, tmp_path / 'b.pth')
        mmengine.runner.load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / 'b.pth'))
    if 'HistoryBuffer' in owner:
        with pytest.raises(CheckpointError, match='no state_dict'):
            load_checkpoint(_with_pickle(tmp_path / 'a.pth', by_getattr('mean')))


def test_trust_is_not_asked_for_where_it_would_not_help(tmp_path):
    """A class of a package that is not here cannot be made, trusted or not."""
    content = b'\x80\x02}cno_such_package.models\nThing\n)R}s.'
    path = _with_pickle(tmp_path / 'a.pth', content)
    with pytest.raises(CheckpointError, match='no package no_such_package is installed') as raised:
        load_checkpoint(path)
    assert '--trust' not in str(raised.value)
    with pytest.raises(CheckpointError, match='needs code that is not installed'):
        load_checkpoint(path, trust=True)


METAINFO = dict(
    classes=('a', 'b'),
    plain=dict(a=1, b=[1.5, True, None, b'bytes']),
    config=Config(dict(a=dict(b=[dict(c=1)], d=(dict(e=2),)))),
    config_dict=ConfigDict(a=dict(b=1), c=[dict(d='x')]),
    ordered=collections.OrderedDict(a=dict(b=1)),
    sets=({1, 2}, frozenset({'x'}), slice(1, 2), range(3)),
    palette=np.array([[1, 2, 3]], dtype=np.uint8),
    words=np.array([['x', 'yy']]),
    word=np.str_('word'),
    raw=np.array([b'ab']),
    numbers=[np.float32(0.5), np.int16(3), np.bool_(True), np.complex64(1j), np.float16(1)],
    day=np.datetime64('2020-01-01'),
    empty=np.zeros((0, 4)),
    moment=datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
)


@MODELS.register_module()
class ToyModel(BaseModel):
    """What a Runner can train."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, inputs, mode, **_):
        return dict(loss=self.layer(torch.stack(list(inputs))).sum())


@DATASETS.register_module()
class ToyDataset(BaseDataset):
    """With every shape of metainfo."""

    METAINFO = METAINFO

    def load_data_list(self):
        return [dict(inputs=torch.ones(2))] * 2


def _train(folder: Path, **options) -> Path:
    settings = dict(
        model=dict(type='ToyModel'),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler'),
            # As the config of a user brings them: ConfigDict at every level.
            dataset=dict(type='ToyDataset', metainfo=dict(own=dict(a=[dict(b=1)], c=(dict(d=2),)), more={1, 2})),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        default_scope='mmengine',
        log_level='ERROR',
        experiment_name=folder.name,
    )
    runner = Runner.from_cfg(Config({**settings, **options}))
    runner.train()
    return folder / 'epoch_1.pth'


def test_what_mmengine_writes_is_read(tmp_path):
    """The Runner's own files, by way of every shape of metainfo and of schedulers that pickle their functions."""
    cycle = dict(type='OneCycleLR', eta_max=0.1, total_steps=10)
    schedulers = [cycle, dict(cycle, anneal_strategy='linear'), dict(type='ReduceOnPlateauLR', monitor='loss')]
    path = _train(tmp_path / 'first', param_scheduler=schedulers, custom_hooks=[dict(type='EMAHook')])
    checkpoint = load_checkpoint(path)
    found = checkpoint['meta']['dataset_meta']
    assert found['own'] == dict(a=[dict(b=1)], c=(dict(d=2),)) and found['more'] == {1, 2}
    assert isinstance(found['own'], ConfigDict)
    for key, value in METAINFO.items():
        assert type(found[key]) is type(value)
        if key == 'config':
            assert found[key].to_dict() == value.to_dict()
        else:
            np.testing.assert_equal(found[key], value)
    assert checkpoint['param_schedulers'][0]['anneal_func'](0, 1, 1) == pytest.approx(1)
    assert 'ema_state_dict' in checkpoint and 'optimizer' in checkpoint


def test_the_runner_reads_safely_in_training_too(tmp_path, monkeypatch):
    """resume, load_from and init_cfg: the zoo's types are read, code is not run, and damage is told as such."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    forbid_unsafe_loading()
    first = _train(tmp_path / 'one')
    longer = dict(by_epoch=True, max_epochs=2)
    _train(tmp_path / 'two', load_from=str(first), resume=True, train_cfg=longer)
    assert (tmp_path / 'two' / 'epoch_2.pth').is_file()
    (tmp_path / 'page.pth').write_text('<html>')
    evil = torch.load(first, weights_only=False)
    torch.save({**evil, 'evil': Evil()}, 'evil.pth')
    for name, words in (('page.pth', 'damaged'), ('evil.pth', 'more than weights')):
        pretrained = dict(type='ToyModel', init_cfg=dict(type='Pretrained', checkpoint=name))
        for number, options in enumerate((dict(load_from=name), dict(load_from=name, resume=True))):
            with pytest.raises(CheckpointError, match=words):
                _train(tmp_path / f'{name}{number}', **options)
        with pytest.raises(CheckpointError, match=words):
            mmengine.model.initialize(ToyModel(), pretrained['init_cfg'])
    assert not Path('pwned').exists()


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


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda weight: weight.to_sparse(), 'weight holds a sparse_coo tensor there but floating-point numbers'),
        (lambda weight: weight.to_sparse_csr(), 'holds a sparse_csr tensor'),
        (lambda weight: weight.to('meta'), r'holds no numbers \(device meta\)'),
        (lambda weight: weight.to(torch.int8), 'holds integers there'),
        (lambda weight: weight.to(torch.uint8), 'holds integers there'),
        (lambda weight: weight.to(torch.bool), 'holds truth values there'),
        (lambda weight: weight.to(torch.complex64), 'holds complex numbers there'),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), 'holds quantized numbers there'),
        (lambda weight: torch.nested.nested_tensor([weight[0], weight[1]]), 'holds a nested tensor there'),
        (lambda weight: weight.double(), ''),
        (lambda weight: weight.half(), ''),
        (lambda weight: weight.bfloat16(), ''),
        (lambda weight: weight[:, :1].expand(2, 3), ''),
    ],
)
def test_weights_of_another_kind_are_refused(tmp_path, change, words):
    """mmengine copies some of them into nonsense, and only logs where it cannot."""
    torch.save({'state_dict': {'weight': change(torch.ones(2, 3)), 'bias': torch.zeros(2)}}, tmp_path / 'a.pth')
    if not words:
        check_weights(torch.nn.Linear(3, 2), tmp_path / 'a.pth')
        return
    with pytest.raises(CheckpointError, match=words):
        check_weights(torch.nn.Linear(3, 2), tmp_path / 'a.pth')


def test_a_copy_that_failed_is_an_error():
    model = torch.nn.Linear(3, 2).double()
    state = {f'module.{key}': value.clone().float() for key, value in model.float().state_dict().items()}
    state['module.bias'][0] = float('nan')
    state['module.bias'][1] = float('inf')
    with pytest.raises(CheckpointError, match='bias of the checkpoint was not copied'):
        verify_loaded(model, state)
    model.load_state_dict({key.removeprefix('module.'): value for key, value in state.items()})
    verify_loaded(model.double(), state)
    verify_loaded(torch.nn.BatchNorm1d(2), {'weight': torch.ones(2)})  # what a file lacks is not compared


@pytest.mark.parametrize('averaged', [False, True])
def test_the_runner_is_watched(tmp_path, averaged):
    """An average of weights (mmengine's EMAHook) is exchanged after the look; a weight that was not copied is seen."""
    path = _train(tmp_path / 'train')
    test = dict(
        test_dataloader=dict(num_workers=0, sampler=dict(type='DefaultSampler'), dataset=dict(type='ToyDataset')),
        test_cfg=dict(),
        test_evaluator=dict(type='DumpResults', out_file_path=str(tmp_path / 'out.pkl')),
        custom_hooks=[dict(type='EMAHook')] if averaged else [],
    )
    options = dict(model=dict(type='ToyModel'), work_dir=str(tmp_path), default_scope='mmengine', log_level='ERROR')

    def run(checkpoint: Path) -> None:
        runner = Runner.from_cfg(Config({**options, **test, 'load_from': str(checkpoint)}))
        runner.register_hook(LoadedWeights())
        runner.test_loop.run_iter = lambda *_: None
        runner.test_evaluator.evaluate = lambda size: {}
        runner.test()

    run(path)
    content = load_checkpoint(path)
    content['state_dict']['layer.weight'] = content['state_dict']['layer.weight'].to_sparse()
    torch.save(content, tmp_path / 'sparse.pth')
    with pytest.raises(CheckpointError, match='layer.weight of the checkpoint was not copied'):
        run(tmp_path / 'sparse.pth')
