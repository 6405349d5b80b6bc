"""The candidate store: exact, resumable to the same bytes, and never fooled by damaged or foreign files."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates import store as store_module
from mmdet_softnms.reevaluation.candidates.fingerprint import differences, fingerprint
from mmdet_softnms.reevaluation.candidates.forward import collect
from mmdet_softnms.reevaluation.candidates.store import CandidateStore, ImageCandidates
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from tests.tiny_dataset import make_project

ROOT = Path(__file__).parents[2]


def _images(num=10, ids=str):
    """Images with any float32 that there is, none on some of them."""
    random = np.random.default_rng(0)
    images = []
    for number in range(num):
        size = 0 if number in (0, 3, 4, 5) else int(random.integers(1, 50))
        bits = random.integers(0, 2**32, (size, 5), dtype=np.uint32).view(np.float32)
        candidates = InstanceData(
            bboxes=torch.from_numpy(bits[:, :4].copy()),
            scores=torch.from_numpy(bits[:, 4].copy()),
            labels=torch.from_numpy(random.integers(0, 1203, size)),
            views=torch.from_numpy(random.integers(0, 3, size)),
        )
        images.append(ImageCandidates(ids(number), (number + 1, 2000 - number), candidates))
    return images


def _fill(folder, images, shard_size=3):
    store = CandidateStore.create(folder, {'of': 'a test'}, len(images), shard_size)
    for shard in range(store.num_shards):
        store.write(shard, [images[number] for number in store.images_of(shard)])
    return store


def _files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize(('ids', 'in_memory'), [(int, 1 << 31), (str, 1 << 31), (int, 100)])
def test_values_come_back_bit_for_bit(tmp_path, ids, in_memory, monkeypatch):
    """Also where they are more than the memory is to hold, 2 GB in earnest."""
    monkeypatch.setattr(store_module, '_IN_MEMORY', in_memory)
    images = _images(ids=ids)
    store = _fill(tmp_path, images)
    assert store.check() == {}
    loaded = CandidateStore.open(tmp_path).load()
    assert len(loaded) == 10 and loaded.img_ids == [ids(number) for number in range(10)]
    for views in ([0, 1, 2], [1]):
        some = loaded.of_views(views)
        for values in (some.bboxes, some.scores, some.labels, some.extras['views']):
            assert isinstance(values.base, np.memmap) == (in_memory == 100)
        for one, other in zip(some, images, strict=True):
            there = torch.isin(other.candidates.views, torch.tensor(views))
            assert one.ori_shape == other.ori_shape
            for key in ('bboxes', 'scores'):
                assert one.candidates[key].dtype == torch.float32
                # As integers: NaN payloads and signs of zero count too.
                wanted = other.candidates[key][there].view(torch.int32)
                assert torch.equal(one.candidates[key].view(torch.int32), wanted)
            for key in ('labels', 'views'):
                assert torch.equal(one.candidates[key], other.candidates[key][there])


def test_a_shard_larger_than_can_be_read_again_is_not_written(tmp_path, monkeypatch):
    store = _fill(tmp_path, _images())
    monkeypatch.setattr(store_module, '_LARGEST_SHARD', 100)
    assert all(problem.endswith(' bytes') for problem in store.check().values()) and len(store.check()) == 4
    before = _files(tmp_path)
    with pytest.raises(ReevaluationError, match='a store takes 100 at once: raise score_thr, or take fewer views'):
        _fill(tmp_path, _images())
    assert _files(tmp_path) == before


def test_a_store_without_any_candidate(tmp_path):
    images = [ImageCandidates(1, (5, 5), _images()[0].candidates)]
    assert _fill(tmp_path, images).load().num_candidates == 0


def test_checksums_are_what_sha256sum_reads(tmp_path):
    _fill(tmp_path, _images())
    done = subprocess.run('sha256sum --check *.sha256', shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('OK') == 4


def test_damage_is_named(tmp_path):
    store = _fill(tmp_path, _images())
    path = store.path_of(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    store.path_of(2).unlink()
    assert list(store.check()) == [1, 2]
    assert 'is damaged: its SHA-256' in store.check()[1] and store.check()[2] == 'missing'
    path.with_name(path.name + '.sha256').unlink()
    assert store.check()[1] == 'has no checksum'


def test_foreign_shards_are_named(tmp_path):
    """Whole and valid, but of another store or another place."""
    store = _fill(tmp_path / 'a', _images())
    other = CandidateStore.create(tmp_path / 'b', {'of': 'another test'}, 10, 3)
    for shard in range(4):
        other.write(shard, [_images()[number] for number in other.images_of(shard)])
    for source, target in ((other.path_of(0), store.path_of(0)), (store.path_of(2), store.path_of(1))):
        for suffix in ('', '.sha256'):
            content = source.with_name(source.name + suffix).read_bytes()
            target.with_name(target.name + suffix).write_bytes(content)
    assert list(store.check()) == [0, 1]
    assert all('is foreign' in problem for problem in store.check().values())


@pytest.mark.parametrize(
    'content',
    [
        None,
        'not json',
        '{}',
        '{"format": "mmdet_softnms candidates 0"}',
        '{"format": "mmdet_softnms candidates 1", "fingerprint": {}, "num_images": 3, "shard_size": 0}',
    ],
)
def test_folders_that_are_no_store(tmp_path, content):
    if content is not None:
        (tmp_path / 'store.json').write_text(content)
    with pytest.raises(ReevaluationError, match='store.json|not a store'):
        CandidateStore.open(tmp_path)


def test_a_full_disk_loses_no_finished_shard(tmp_path):
    """A real refusal of the system to write: a limit on the size of files, in a fork."""
    store = _fill(tmp_path, _images())

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            store.write(1, [_images()[number] for number in store.images_of(1)])
        except OSError:
            os._exit(7)

    child = multiprocessing.get_context('fork').Process(target=write)
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert CandidateStore.open(tmp_path).check() == {}
    assert not list(tmp_path.glob('.*.tmp'))


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def finished(project, tmp_path_factory):
    """The store of an undisturbed run, shards of two images."""
    folder = tmp_path_factory.mktemp('finished')
    return _collect(project, folder).store


def _collect(project, folder, floor=1e-3, cfg=None, said=None, **options):
    cfg = cfg or Config.fromfile(project.coco_config)
    checkpoint = options.pop('checkpoint', project.checkpoint)
    say = [].append if said is None else said.append
    return collect(cfg, checkpoint, floor, folder, shard_size=2, say=say, **options)


def test_a_finished_store_is_found(project, finished):
    said = []
    again = _collect(project, finished.folder.parent, said=said)
    assert again.forward_images == 0 and again.store.folder == finished.folder
    assert said == [f'stored candidates found: {finished.folder}; no forward pass is needed']


def test_only_what_is_damaged_is_computed_again(project, finished):
    before = _files(finished.folder)
    path = finished.path_of(1)
    path.write_bytes(path.read_bytes()[:-1] + b'!')
    said = []
    again = _collect(project, finished.folder.parent, said=said)
    assert again.forward_images == 2
    assert f'{path} is damaged' in said[0] and 'images 2 to 3 are computed anew' in said[0]
    assert _files(finished.folder) == before


def test_a_killed_run_is_taken_up_and_leaves_the_same_bytes(project, finished, tmp_path, tmp_path_factory, forks):
    (project.root / 'store_slow.py').write_text(
        'import time\n'
        'from mmdet.datasets import CocoDataset\n'
        'from mmdet.registry import DATASETS\n'
        '@DATASETS.register_module(force=True)\n'
        'class SlowAtTheEnd(CocoDataset):\n'
        '    def __getitem__(self, index):\n'
        '        if index >= 3:\n'
        '            time.sleep(60)\n'
        '        return super().__getitem__(index)\n'
    )
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(project.root)!r}]
import store_slow
from mmengine.config import Config
from mmdet_softnms.reevaluation.candidates.forward import collect
cfg = Config.fromfile({str(project.coco_config)!r})
cfg.test_dataloader.dataset.type = 'SlowAtTheEnd'
collect(cfg, {str(project.checkpoint)!r}, 1e-3, {str(tmp_path)!r}, shard_size=2)
"""
    folder = tmp_path_factory.mktemp('killed')
    (folder / 'script.py').write_text(script)
    process = forks.start(folder, folder / 'script.py')
    for _ in range(1200):
        if list(tmp_path.glob('*/00000.parquet')):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert CandidateStore.open(folder).check() == {1: 'missing', 2: 'missing'}
    # The other class of data set is another config: its store is found by its own fingerprint.
    sys.path.insert(0, str(project.root))
    import store_slow

    store_slow.SlowAtTheEnd.__getitem__ = store_slow.CocoDataset.__getitem__
    cfg = Config.fromfile(project.coco_config)
    cfg.test_dataloader.dataset.type = 'SlowAtTheEnd'
    said = []
    again = _collect(project, tmp_path, cfg=cfg, said=said)
    assert again.forward_images == 4
    assert said == [f'{folder}: 1 of 3 shards are there; the run is taken up']
    loaded, expected = again.store.load(), finished.load()
    for name in ('offsets', 'bboxes', 'scores', 'labels'):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(expected, name))
    # The same bytes as an undisturbed run of that very config.
    _collect(project, tmp_path / 'undisturbed', cfg=cfg)
    (undisturbed,) = (tmp_path / 'undisturbed').iterdir()
    assert _files(folder) == _files(undisturbed)


def test_what_makes_other_candidates_is_not_mistaken(project, finished, tmp_path):
    folder = finished.folder.parent

    def differs(said):
        return [line.split('are of another ')[1].split(':')[0] for line in said if 'of another' in line]

    other = tmp_path / 'other.pth'
    weights = torch.load(project.checkpoint, weights_only=True)
    weights['state_dict']['roi_head.bbox_head.fc_cls.bias'] += 0.1
    torch.save(weights, other)
    cfg = Config.fromfile(project.coco_config)
    cfg.model.test_cfg.rpn.max_per_img = 7
    fewer = Config.fromfile(project.coco_config)
    fewer.test_dataloader.dataset.indices = 4
    for number, (options, words) in enumerate(
        [(dict(checkpoint=other), 'checkpoint'), (dict(cfg=cfg), 'config'), (dict(floor=1e-4), 'score floor')]
    ):
        said = []
        place = tmp_path / str(number) / finished.folder.name
        place.parent.mkdir()
        place.symlink_to(finished.folder)
        assert _collect(project, place.parent, said=said, **options).forward_images == 6
        assert differs(said) == [words]
    assert _collect(project, folder, cfg=fewer).forward_images == 4


def test_other_pixels_in_files_of_the_same_name_and_size(project, finished):
    cfg = Config.fromfile(project.coco_config)
    path = project.root / 'VOC2007/JPEGImages/000003.jpg'
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes(255 - value for value in content[-20:-10]) + content[-10:])
    try:
        changed = fingerprint(cfg, project.checkpoint, build_test_set(cfg), 1e-3)
    finally:
        path.write_bytes(content)
    assert differences(finished.fingerprint, changed) == 'content of the images'
    # Where the images are not there, they cannot tell.
    cfg.test_dataloader.dataset.data_prefix.img = 'gone/'
    gone = fingerprint(cfg, project.checkpoint, build_test_set(cfg, check_images=False), 1e-3)
    assert gone['images'] is None and differences(finished.fingerprint, gone) == ''


def test_networks_that_diverged_and_images_that_are_none(project, tmp_path):
    weights = torch.load(project.checkpoint, weights_only=True)
    weights['state_dict']['roi_head.bbox_head.fc_reg.bias'][:] = float('nan')
    torch.save(weights, tmp_path / 'nan.pth')
    with pytest.raises(ReevaluationError, match='not finite, first on image 1; it diverged'):
        _collect(project, tmp_path / 'a', checkpoint=tmp_path / 'nan.pth')
    path = project.root / 'VOC2007/JPEGImages/000003.jpg'
    content = path.read_bytes()
    try:
        path.write_bytes(b'')
        with pytest.raises(ReevaluationError, match='000003.jpg cannot be read; replace it'):
            _collect(project, tmp_path / 'b')
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (
            lambda cfg, root: cfg.merge_from_dict({'test_dataloader.dataset.type': 'NoDataset'}),
            'NoDataset.*default_scope',
        ),
        (lambda cfg, root: (root / 'bad.json').write_text('{"images": [1,'), 'bad.json.*JSONDecodeError'),
        (lambda cfg, root: (root / 'bad.json').write_text('[]'), 'bad.json.*cannot be built'),
    ],
)
def test_data_sets_that_cannot_be_built(project, change, words):
    cfg = Config.fromfile(project.coco_config)
    cfg.test_dataloader.dataset.ann_file = 'bad.json'
    change(cfg, project.root)
    with pytest.raises(ReevaluationError, match=words):
        build_test_set(cfg)


def test_data_sets_without_image_ids_are_refused(project, tmp_path):
    cfg = Config.fromfile(project.coco_config)
    (tmp_path / 'set.jsonl').write_text(json.dumps(dict(filename='a.jpg', height=64, width=64)))
    (tmp_path / 'labels.json').write_text('{"0": "a"}')
    cfg.test_dataloader.dataset = dict(
        type='ODVGDataset',
        data_root=str(tmp_path),
        ann_file='set.jsonl',
        label_map_file='labels.json',
        data_prefix=dict(img=''),
        return_classes=True,
        pipeline=[],
    )
    with pytest.raises(ReevaluationError, match=r'\(ODVGDataset\) gives its images no img_id'):
        build_test_set(cfg, check_images=False)


def test_damaged_xml_is_named_and_so_is_an_unknown_model(project, tmp_path):
    cfg = Config.fromfile(project.voc_config)
    path = project.root / 'VOC2007/Annotations/000002.xml'
    content = path.read_text()
    try:
        path.write_text(content[:50])
        with pytest.raises(ReevaluationError, match=r'000002.xml\) cannot be built: ParseError'):
            build_test_set(cfg)
    finally:
        path.write_text(content)
    cfg.model.neck.type = 'NoNeck'
    with pytest.raises(ReevaluationError, match='model of the config cannot be built.*NoNeck'):
        _collect(project, tmp_path, cfg=cfg)


def test_what_makes_the_same_candidates_is_recognised(project, finished, tmp_path):
    """A higher floor, other suppression, paths and threads: no forward pass."""
    folder = finished.folder.parent
    cfg = Config.fromfile(project.coco_config)
    cfg.model.test_cfg.rcnn = dict(score_thr=0.3, max_per_img=7, nms=dict(type='soft_nms'))
    moved = tmp_path / 'moved'
    moved.symlink_to(project.root)
    cfg.test_dataloader.dataset.data_root = f'{moved}/'
    assert _collect(project, folder, cfg=cfg).forward_images == 0
    assert _collect(project, folder, floor=0.2).forward_images == 0
    threads = torch.get_num_threads()
    said = []
    try:
        torch.set_num_threads(threads + 1)
        assert _collect(project, folder, said=said).forward_images == 0
    finally:
        torch.set_num_threads(threads)
    assert f'made with threads {threads}' in said[0]


def test_a_store_that_has_lost_its_description(project, tmp_path):
    first = _collect(project, tmp_path)
    before = _files(first.store.folder)
    (first.store.folder / 'store.json').write_text('{')
    said = []
    assert _collect(project, tmp_path, said=said).forward_images == 0
    assert 'is damaged: written anew' in said[0]
    assert _files(first.store.folder) == before


def test_the_description_says_what_it_was_made_of(finished):
    content = json.loads((finished.folder / 'store.json').read_text())['fingerprint']
    assert set(content) == {
        'config', 'checkpoint', 'dataset', 'infos', 'images', 'inputs', 'files', 'code', 'live', 'versions', 'unknown',
        'number', 'score_floor', 'execution',
    }  # fmt: skip
    assert content['unknown'] == [] and content['inputs'] is None and not content['files']
    assert content['execution']['batch_size'] == 1 and content['execution']['threads'] == torch.get_num_threads()
    assert os.fspath(ROOT) not in json.dumps(content)
