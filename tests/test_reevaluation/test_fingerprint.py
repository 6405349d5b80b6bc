"""What candidates and finished rows depend on: nothing that made them may change without being noticed."""

import ast
import copy
import gc
import importlib
import json
import os
import pickle
import sys
from pathlib import Path

import mmengine.fileio as fileio
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData

import mmdet_softnms
from mmdet_softnms.files import ReevaluationError, clear_temporaries
from mmdet_softnms.reevaluation.candidates import identity
from mmdet_softnms.reevaluation.candidates.fingerprint import differences, fingerprint
from mmdet_softnms.reevaluation.candidates.forward import collect
from mmdet_softnms.reevaluation.candidates.images import ImageReader
from mmdet_softnms.reevaluation.candidates.store import CandidateStore
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.choice.plan import image_identities
from mmdet_softnms.reevaluation.request import Listener, Request
from mmdet_softnms.reevaluation.run import reevaluate
from tests.tiny_dataset import make_project

PACKAGE = Path(mmdet_softnms.__file__).parent


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('fingerprint'))


@pytest.fixture
def cfg(project):
    return Config.fromfile(project.coco_config)


@pytest.fixture(scope='module')
def plain(project):
    """The fingerprint of the config as it is."""
    return _fingerprint(project, Config.fromfile(project.coco_config))


def _fingerprint(project, cfg):
    return fingerprint(cfg, project.checkpoint, build_test_set(cfg), 1e-3)


def _forward(project, cfg, folder, **options):
    said = []
    collected = collect(cfg, project.checkpoint, 1e-3, folder, say=said.append, **options)
    return collected.forward_images, ' '.join(said)


def _module(folder, name, text, monkeypatch):
    (folder / f'{name}.py').write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def test_what_does_not_matter_to_the_forward_pass(project, plain, cfg):
    assert plain == _fingerprint(project, cfg) and plain['unknown'] == []
    cfg.model.train_cfg.rcnn.sampler.num = 7
    cfg.train_cfg.max_epochs = 9
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    cfg.max_epochs = 9  # a variable of the config file
    cfg.log_level = 'ERROR'
    cfg.test_dataloader.num_workers = 2
    cfg.default_hooks = dict(logger=dict(type='LoggerHook', interval=7))
    assert differences(plain, _fingerprint(project, cfg)) == ''


@pytest.mark.parametrize(
    'change',
    [
        {'custom_hooks': [dict(type='EMAHook')]},
        {'default_hooks': dict(other=dict(type='EMAHook'))},
        {'model.data_preprocessor.mean': [1.0, 2.0, 3.0]},
        {'model.roi_head.bbox_head.loss_cls.use_sigmoid': True},
        {'env_cfg': dict(cudnn_benchmark=True)},
        {'test_cfg': dict(type='TestLoop', fp16=True)},
        {'test_dataloader.collate_fn': dict(type='default_collate')},
    ],
)
def test_what_matters_in_a_config(project, plain, cfg, change):
    cfg.merge_from_dict(change)
    assert differences(plain, _fingerprint(project, cfg)) == 'config'


def test_proposals_and_files_that_the_config_names(project, cfg, tmp_path):
    def write(shift):
        names = [path.name for path in sorted((project.root / 'VOC2007/JPEGImages').iterdir())]
        boxes = np.array([[5, 5, 40, 40]], np.float32) + shift
        content = {f'JPEGImages/{name}': InstanceData(bboxes=boxes, scores=np.ones(1, np.float32)) for name in names}
        (tmp_path / 'proposals.pkl').write_bytes(pickle.dumps(content))

    write(0)
    mapping = tmp_path / 'mapping.json'
    mapping.write_text('{}')
    cfg.test_dataloader.dataset.proposal_file = str(tmp_path / 'proposals.pkl')
    cfg.model.backbone.names = str(mapping)
    with pytest.raises(ReevaluationError, match='model of the config cannot be built'):
        _fingerprint(project, cfg)
    cfg.model.backbone.pop('names')
    cfg.test_cfg = dict(type='TestLoop', names=str(mapping))
    first = _fingerprint(project, cfg)
    write(3)
    assert differences(first, _fingerprint(project, cfg)) == 'proposals of the data set'
    write(0)
    mapping.write_text('{"a": 1}')
    assert differences(first, _fingerprint(project, cfg)) == 'content of mapping.json'


BACKBONE = """
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS

@MODELS.register_module(force=True)
class FingerprintResNet(ResNet):
    scale = 1.0
    def forward(self, x):
        from fingerprint_helper import times
        return tuple(times(one, self.scale) for one in super().forward(x))
"""


def test_code_of_the_model(project, cfg, tmp_path, monkeypatch):
    """A custom backbone, what it imports inside a function, its attributes in memory, and a method put in its place."""
    helper = 'def times(value, factor):\n    return value * factor\n'
    _module(tmp_path, 'fingerprint_helper', helper, monkeypatch)
    module = _module(tmp_path, 'fingerprint_backbone', BACKBONE, monkeypatch)
    cfg.model.backbone.type = 'FingerprintResNet'
    cfg.custom_imports = dict(imports=['fingerprint_backbone'])
    first = _fingerprint(project, cfg)
    assert {'fingerprint_backbone', 'fingerprint_helper'} <= set(first['code'])
    cfg.my_variable = 3  # other people's hooks may read it
    assert differences(first, _fingerprint(project, cfg)) == 'config'
    cfg.pop('my_variable')
    module.FingerprintResNet.scale = 0.2
    assert differences(first, _fingerprint(project, cfg)) == 'code in memory'
    module.FingerprintResNet.scale = 1.0
    assert differences(first, _fingerprint(project, cfg)) == ''
    (tmp_path / 'fingerprint_helper.py').write_text(helper.replace('*', '+'))
    assert differences(first, _fingerprint(project, cfg)) == 'code of fingerprint_helper'
    (tmp_path / 'fingerprint_helper.py').write_text(helper)
    (tmp_path / 'fingerprint_backbone.py').write_text(BACKBONE.replace('1.0', '0.2'))
    changed = _fingerprint(project, cfg)
    assert differences(first, changed) == 'code of fingerprint_backbone'
    assert differences(first, changed, elsewhere=True) == 'code of fingerprint_backbone'


RUNNING = """
from mmdet.registry import HOOKS, RUNNERS
from mmengine.hooks import Hook
from mmengine.runner import Runner

@HOOKS.register_module(force=True)
class FingerprintHook(Hook):
    def after_test(self, runner):
        runner.fingerprinted = 1

@RUNNERS.register_module(force=True)
class FingerprintRunner(Runner):
    tests = []

    def test(self):
        self.tests.append(1)
        return super().test()
"""


def test_a_function_that_batches(project, cfg, tmp_path, monkeypatch):
    text = 'def batch(items):\n    return items\n'
    cfg.test_dataloader.collate_fn = _module(tmp_path, 'fingerprint_batch', text, monkeypatch).batch
    first = _fingerprint(project, cfg)
    (tmp_path / 'fingerprint_batch.py').write_text(f'{text}EDITED = True\n')
    assert differences(first, _fingerprint(project, cfg)) == 'code of fingerprint_batch'


@pytest.mark.parametrize('change', [{'runner_type': 'FingerprintRunner'},
                                    {'custom_hooks': [dict(type='FingerprintHook')]}])  # fmt: skip
def test_hooks_and_runners_of_the_users(project, plain, cfg, tmp_path, monkeypatch, change):
    module = _module(tmp_path, 'fingerprint_running', RUNNING, monkeypatch)
    cfg.merge_from_dict(change)
    first = _fingerprint(project, cfg)
    assert 'config' in differences(plain, first)
    (tmp_path / 'fingerprint_running.py').write_text(f'{RUNNING}EDITED = True\n')
    assert differences(first, _fingerprint(project, cfg)) == 'code of fingerprint_running'
    if 'runner_type' in change:  # which runs the network, as in mmdet's tools/test.py
        assert _forward(project, cfg, tmp_path / 'candidates')[0] == 6 and module.FingerprintRunner.tests == [1]


def test_code_of_this_package_and_of_openmmlab(project, plain, cfg, monkeypatch):
    real = identity.sha256
    for name, words in (('ps_roi_pool.py', 'mmdet_softnms'), ('standard_roi_head.py', 'mmdet')):
        if name == 'ps_roi_pool.py':  # of an R-FCN: not part of this model's code
            name = 'post_process.py'
        monkeypatch.setattr(identity, 'sha256', lambda path, name=name: real(path)[:: -1 if name in str(path) else 1])
        assert differences(plain, _fingerprint(project, cfg)) == f'code of {words}'
    monkeypatch.undo()
    from mmdet.models import StandardRoIHead

    original = StandardRoIHead._bbox_forward
    monkeypatch.setattr(StandardRoIHead, '_bbox_forward', lambda self, *args: original(self, *args))
    assert 'code of' in differences(plain, _fingerprint(project, cfg))


def test_code_without_a_file_is_never_the_same(project, cfg, tmp_path):
    """As written in a notebook."""
    exec(
        compile(BACKBONE.replace('FingerprintResNet', 'NotebookResNet').replace('times(one, self.scale)', 'one'),
                '<cell>', 'exec'),
        {'__name__': '__notebook__'},
    )  # fmt: skip
    cfg.model.backbone.type = 'NotebookResNet'
    for _ in range(2):
        images, said = _forward(project, cfg, tmp_path)
        assert images == 6 and 'NotebookResNet cannot be read here' in said
    assert len(list(tmp_path.iterdir())) == 1


TRANSFORM = """
import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS

@TRANSFORMS.register_module(force=True)
class FingerprintDepth(BaseTransform):
    def transform(self, results):
        depth = results['img_path'].replace('JPEGImages', 'Depth').replace('.jpg', '.npy')
        results['img'] = results['img'] + np.load(depth)
        return results
"""


def test_files_that_only_a_transform_knows(project, cfg, tmp_path, monkeypatch):
    depth = project.root / 'VOC2007' / 'Depth'
    depth.mkdir()
    for number in range(1, 7):
        np.save(depth / f'{number:06d}.npy', np.float32(0))
    _module(tmp_path, 'fingerprint_transform', TRANSFORM, monkeypatch)
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='FingerprintDepth'))
    first = _fingerprint(project, cfg)
    assert differences(first, _fingerprint(project, cfg)) == ''
    np.save(depth / '000003.npy', np.float32(1))
    assert differences(first, _fingerprint(project, cfg)) == 'input of the network'


def test_images_by_a_storage_backend(project, cfg, tmp_path):
    """LMDB: no file of that name; the same detections, hashed content, no reuse where it cannot be read."""
    lmdb = pytest.importorskip('lmdb')
    content = {path.name: path.read_bytes() for path in sorted((project.root / 'VOC2007/JPEGImages').iterdir())}

    def write(images):
        fileio.io.backend_instances.clear()  # LMDB opens a data base once a process
        gc.collect()
        environment = lmdb.open(str(tmp_path / 'images.lmdb'), map_size=2**24)
        with environment.begin(write=True) as transaction:
            for name, value in images.items():
                transaction.put(f'nowhere/{name}'.encode(), value)
        environment.close()

    write(content)
    stored = copy.deepcopy(cfg)
    data = stored.test_dataloader.dataset
    data.data_root, data.ann_file, data.data_prefix.img = '', str(project.root / 'coco.json'), 'nowhere/'
    data.pipeline[0].backend_args = dict(backend='lmdb', db_path=str(tmp_path / 'images.lmdb'))
    dataset = build_test_set(stored)
    first = _fingerprint(project, stored)
    assert first['images'] == _fingerprint(project, cfg)['images'] and first['unknown'] == []
    assert image_identities(dataset) == image_identities(build_test_set(cfg))
    assert ImageReader(dataset).read(2) == content['000003.jpg']
    result = reevaluate(Request(stored, project.checkpoint, work_dir=tmp_path / 'work'))
    assert result.rows[0].metrics == reevaluate(Request(cfg, project.checkpoint)).rows[0].metrics
    assert result.session.read_image(0) == content['000001.jpg']
    write({'000003.jpg': content['000004.jpg']})
    assert differences(first, _fingerprint(project, stored)) == 'content of the images'
    write({'000003.jpg': b'no image'})
    with pytest.raises(ReevaluationError, match='image nowhere/000003.jpg cannot be read'):
        _forward(project, stored, tmp_path / 'broken')
    data.data_prefix.img = 'gone/'
    assert _fingerprint(project, stored)['unknown'] == ['an image']
    with pytest.raises(ReevaluationError, match='image gone/000001.jpg cannot be read'):
        _forward(project, stored, tmp_path / 'gone')


@pytest.mark.parametrize('layer', ['roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg', 'rpn_head.rpn_cls', ''])
def test_networks_that_give_nan_are_refused(project, cfg, layer, tmp_path):
    weights = torch.load(project.checkpoint, weights_only=True)
    for name, value in weights['state_dict'].items():
        if name.startswith(layer) and value.is_floating_point():
            value[:] = float('nan')
    torch.save(weights, tmp_path / 'nan.pth')
    with pytest.raises(ReevaluationError, match='not finite, first on image 1'):
        collect(cfg, tmp_path / 'nan.pth', 1e-3, tmp_path / 'candidates')
    assert not list(tmp_path.glob('candidates/*/*.parquet'))


RULE = """
from mmdet_softnms.registry import TASK_UTILS
from mmdet_softnms.rules import HardNMS

@TASK_UTILS.register_module(force=True)
class FingerprintRule(HardNMS):
    def __call__(self, boxes, scores, labels, max_num):
        keep, kept = super().__call__(boxes, scores, labels, max_num)
        return keep[:WANTED], kept[:WANTED]
"""


def test_rows_of_a_rule_that_was_edited(project, cfg, tmp_path, monkeypatch):
    """From Python the rows of a finished call are still there; only the same code may take them."""
    cfg.model.roi_head.type = 'mmdet_softnms.SoftNMSRoIHead'
    cfg.model.test_cfg.rcnn.nms = dict(type='mmdet_softnms.FingerprintRule')

    def rows():
        result = reevaluate(Request(cfg, project.checkpoint, work_dir=tmp_path / 'work'))
        return result.rows[-1].metrics['AR100'], result.rows[0].seconds

    _module(tmp_path, 'fingerprint_rule', RULE.replace('WANTED', '100'), monkeypatch)
    many, seconds = rows()
    assert rows() == (many, seconds)  # kept
    _module(tmp_path, 'fingerprint_rule', RULE.replace('WANTED', '1'), monkeypatch)
    few, _ = rows()
    assert few < many

    # The same, in a notebook.
    for wanted, expected in (('100', many), ('1', few)):
        exec(compile(RULE.replace('WANTED', wanted), '<cell>', 'exec'), {'__name__': '__notebook__'})
        assert rows()[0] == expected


def test_rows_of_objects_that_were_edited(project, cfg, tmp_path):
    first = reevaluate(Request(cfg, project.checkpoint, work_dir=tmp_path))
    path = project.root / 'coco.json'
    content = path.read_text()
    try:
        changed = json.loads(content)
        for one in changed['annotations']:
            one['bbox'][2] += 9
        path.write_text(json.dumps(changed))
        second = reevaluate(Request(cfg, project.checkpoint, work_dir=tmp_path))
    finally:
        path.write_text(content)
    assert second.forward_images == 0 and second.rows[0].metrics['AP'] != first.rows[0].metrics['AP']


def _refuse(store, **changes):
    (store / 'store.json').write_text(json.dumps({**json.loads((store / 'store.json').read_text()), **changes}))


def test_malformed_neighbours_block_nothing(project, cfg, tmp_path):
    assert _forward(project, cfg, tmp_path)[0] == 6
    (good,) = tmp_path.iterdir()
    manifest = json.loads((good / 'store.json').read_text())
    contents = [b'\xff\xfe', b'[]', b'{}', b'[' * 100_000, b'null', b'']
    for key, value in [
        ('num_images', 10**18), ('num_images', True), ('num_images', '6'), ('shard_size', 0), ('shard_size', -1),
        ('shard_size', 0.5), ('fingerprint', []), ('fingerprint', None), ('fingerprint', {}), ('format', None),
        ('format', [1] * 1000), ('num_images', 2**31), ('num_images', 10**400),
    ]:  # fmt: skip
        contents.append(json.dumps({**manifest, key: value}).encode())
    for key in manifest['fingerprint']:
        for value in (None, 'x', 3, ['x'], {'x': {}}):
            contents.append(json.dumps(dict(manifest, fingerprint={**manifest['fingerprint'], key: value})).encode())
    for number, content in enumerate(contents):
        (tmp_path / f'n{number}').mkdir()
        (tmp_path / f'n{number}' / 'store.json').write_bytes(content)
    (tmp_path / 'folder' / 'store.json').mkdir(parents=True)
    (tmp_path / 'file').write_text('')
    os.mkfifo(tmp_path / 'folder' / 'pipe')
    assert _forward(project, cfg, tmp_path)[0] == 0
    other = copy.deepcopy(cfg)
    other.model.test_cfg.rpn.max_per_img = 7
    assert _forward(project, other, tmp_path)[0] == 6


def test_whatever_is_wrong_with_a_shard_heals(project, cfg, tmp_path):
    """Three things at a time, each with a shard of its own."""
    _forward(project, cfg, tmp_path, shard_size=2)
    (folder,) = tmp_path.iterdir()
    store = CandidateStore.open(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def truncated(shard, checksum):
        content = shard.read_bytes()
        shard.write_bytes(content[:4] + bytes(len(content) // 2 - 4) + content[len(content) // 2 :])
        checksum.write_text(f'{identity.sha256(shard)}  x\n')

    def folder_instead(path):
        path.unlink()
        (path / 'inside').mkdir(parents=True)

    for damages in (
        (
            lambda shard, checksum: checksum.write_bytes(b'\xff\xfe\x00'),
            lambda shard, checksum: checksum.write_bytes(b''),
            lambda shard, checksum: shard.write_bytes(b''),
        ),
        (
            lambda shard, checksum: folder_instead(checksum),
            lambda shard, checksum: folder_instead(shard),
            truncated,
        ),
    ):
        for number, damage in enumerate(damages):
            damage(store.path_of(number), folder / f'{number:05d}.parquet.sha256')
            (folder / f'.{number:05d}.parquet.999999999.tmp').write_bytes(b'left over')
            assert list(store.check()) == list(range(number + 1))
        assert _forward(project, cfg, tmp_path, shard_size=2)[0] == 6
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    folder_instead(folder / 'store.json')
    assert _forward(project, cfg, tmp_path, shard_size=2)[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_rows_of_a_given_store_are_looked_at(project, cfg, tmp_path):
    _forward(project, cfg, tmp_path, shard_size=2)
    (folder,) = tmp_path.iterdir()
    store = CandidateStore.open(folder)
    images = store.load()[2:4]

    def change(key, value):
        changed = copy.deepcopy(images)
        changed[1].candidates[key][0] = value
        store.write(1, changed)

    def swap():
        store.write(1, images[::-1])

    for damage, words in (
        (lambda: change('labels', 5), 'label 5, but the test set has 5 classes'),
        (lambda: change('labels', -1), 'label -1'),
        (lambda: change('bboxes', float('inf')), 'not finite'),
        (lambda: change('scores', float('nan')), 'not finite'),
        (lambda: change('scores', 1.5), r'score of 1.5, outside \(0.001, 1\]'),
        (lambda: change('scores', 1e-4), 'score of 0.0001'),
        (swap, 'other image ids'),
    ):
        damage()
        with pytest.raises(ReevaluationError, match=words):
            reevaluate(Request(cfg, project.checkpoint, store=folder))
    store.write(1, images)
    said = []
    assert (
        len(reevaluate(Request(cfg, project.checkpoint, store=folder), Listener(say=said.append)).rows) == 4
        and not said
    )


def test_left_over_files_of_dead_processes_are_cleared(tmp_path):
    (tmp_path / '.a.json.999999999.tmp').touch()
    (tmp_path / f'.b.json.{os.getppid()}.tmp').touch()  # alive
    (tmp_path / '.c.tmp').touch()  # not ours
    clear_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'.b.json.{os.getppid()}.tmp', '.c.tmp']


def test_kernels_in_numbas_cache_use_nothing_of_other_files():
    """The cache looks at the kernel's own file, and at modules it is told of: others would stay as they were."""
    kernels = 0
    for path in PACKAGE.rglob('*.py'):
        tree = ast.parse(path.read_text())
        told = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and (node.module or '').startswith('mmdet_softnms')
            and node.module not in told
            for alias in node.names
        }
        for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
            if any('compiled' in ast.unparse(one) or 'njit' in ast.unparse(one) for one in function.decorator_list):
                kernels += 1
                used = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
                assert not used & imported, f'{path.name}: {function.name} uses {used & imported}'
    assert kernels > 6
