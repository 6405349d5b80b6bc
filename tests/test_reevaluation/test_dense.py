"""Re-evaluation of dense heads: detections and AP equal a live run's, and one store serves every higher threshold."""

import copy
import json
import pickle

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from mmdet_softnms.cli.export import main as export
from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.fingerprint import differences, fingerprint
from mmdet_softnms.reevaluation.candidates.forward import collect
from mmdet_softnms.reevaluation.candidates.plug import DENSE_HEADS, family_of, most_candidates, plug
from mmdet_softnms.reevaluation.candidates.store import CandidateStore
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.choice.plan import plan_choice
from mmdet_softnms.reevaluation.report.table import to_table
from mmdet_softnms.reevaluation.request import Listener, Request
from mmdet_softnms.reevaluation.run import reevaluate
from mmdet_softnms.reevaluation.scoring.settings import Setting, default_settings, paste_block
from mmdet_softnms.reevaluation.scoring.sweep import detections
from mmdet_softnms.rules import SoftNMS
from tests.tiny_dataset import CLASSES, make_project
from tests.tiny_dense import build, predict, with_head, zoo_config


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('dense'))


def _project(data, head, folder, **test_cfg):
    """The test set of two-stage tests with a dense detector: its config and its checkpoint."""
    cfg = Config.fromfile(data.coco_config)
    zoo = zoo_config(head, num_classes=len(CLASSES))
    zoo.model.test_cfg.update(test_cfg)
    zoo.model.data_preprocessor.pad_size_divisor = 32  # RTMDet's and YOLOX' own pipelines pad
    cfg.model = zoo.model
    torch.save({'meta': {}, 'state_dict': build(zoo).state_dict()}, folder / 'tiny.pth')
    return cfg, folder / 'tiny.pth'


def _live(cfg, checkpoint, setting, folder):
    """What the Runner's test loop gives with a setting written into the config as the report's block says it."""
    cfg = copy.deepcopy(cfg)
    block = {}
    exec(setting.snippet(family_of(cfg).written(cfg)), block)
    cfg.merge_from_dict(dict(model=block['model']))
    cfg.load_from, cfg.work_dir = str(checkpoint), str(folder)
    cfg.visualizer = dict(type='Visualizer', name=folder.name)
    cfg.test_evaluator = dict(type='DumpDetResults', out_file_path=str(folder / 'out.pkl'))
    Runner.from_cfg(cfg).test()
    return [one['pred_instances'] for one in pickle.loads((folder / 'out.pkl').read_bytes())]


@pytest.mark.parametrize('head', ['ATSSHead', 'YOLOXHead', 'RTMDetInsSepBNHead'])
def test_detections_equal_the_live_runs_at_and_above_the_floor(data, head, tmp_path):
    cfg, checkpoint = _project(data, head, tmp_path, nms_pre=80)
    said = []
    store = collect(cfg, checkpoint, 1e-3, tmp_path / 'candidates', say=said.append).store
    images = store.load()
    assert ('class_scores' in images.extras) == (head != 'RTMDetInsSepBNHead')
    if head == 'ATSSHead':
        assert said == [
            'at most 400 candidates an image (nms_pre of each level), so 6 images take up to 6e-05 GB; less where '
            'scores do not exceed 0.001'
        ]
    gates = images.extras.get('class_scores', images.scores)
    high = min(float(torch.from_numpy(gates).median()), 0.9)
    for score_thr in (1e-3, high):
        setting = Setting(SoftNMS('gaussian', sigma=0.5, min_score=1e-3), score_thr, 50)
        live = _live(cfg, checkpoint, setting, tmp_path)
        for ours, theirs in zip(detections(images, setting), live, strict=True):
            for key in ('bboxes', 'scores', 'labels'):
                torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert sum(map(len, detections(images, setting))) > 20


def test_the_commands_questions_work_on_a_dense_detector(data, tmp_path):
    cfg, checkpoint = _project(data, 'ATSSHead', tmp_path, nms_pre=80)
    request = Request(
        cfg, checkpoint, work_dir=tmp_path / 'work', select='AP', folds=3, sweep=('SoftNMS.sigma=0.3,0.5',)
    )
    pages = []
    result = reevaluate(request, report=lambda result, selection: pages.append((to_table(result), selection)))
    assert [row.setting.name for row in result.rows] == ['HardNMS', 'SoftNMS', 'SoftNMS', 'nms']
    assert result.rows[-1].params == dict(iou_threshold=0.6, score_thr=0.05, max_per_img=100)
    assert not result.masks_left_out and pages[0][1] is not None
    block = {}
    exec(result.rows[1].setting.snippet(family_of(cfg).written(cfg)), block)
    assert block['model']['bbox_head'] == dict(type='mmdet_softnms.SoftNMSDenseHead', head='mmdet.ATSSHead')
    assert block['model']['test_cfg']['nms']['type'] == 'mmdet_softnms.SoftNMS'
    again = reevaluate(Request(cfg, checkpoint, work_dir=tmp_path / 'work', score_thr=0.2))  # the same store
    assert again.forward_images == 0 and again.store == result.store
    # The config's own row is what mmdet itself gives.
    live = _live_stock(cfg, checkpoint, tmp_path)
    own = detections(result.session.candidates, result.rows[-1].setting)
    for ours, theirs in zip(own, live, strict=True):
        assert len(ours) == len(theirs['scores']) > 5
        torch.testing.assert_close(ours.scores, theirs['scores'], rtol=0, atol=0)


def _live_stock(cfg, checkpoint, folder):
    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.work_dir = str(checkpoint), str(folder)
    cfg.visualizer = dict(type='Visualizer', name='stock')
    cfg.test_evaluator = dict(type='DumpDetResults', out_file_path=str(folder / 'stock.pkl'))
    Runner.from_cfg(cfg).test()
    return [one['pred_instances'] for one in pickle.loads((folder / 'stock.pkl').read_bytes())]


def test_what_cuts_candidates_belongs_to_the_fingerprint(data, tmp_path):
    cfg, checkpoint = _project(data, 'YOLOV3Head', tmp_path)
    dataset = build_test_set(cfg)
    before = fingerprint(cfg, checkpoint, dataset, 1e-3)
    for key, value in (('nms_pre', 7), ('conf_thr', 0.3), ('multi_label', False), ('min_bbox_size', 3)):
        changed = copy.deepcopy(cfg)
        changed.model.test_cfg[key] = value
        assert differences(before, fingerprint(changed, checkpoint, dataset, 1e-3)) == 'config', key
    for key, value in (('score_thr', 0.3), ('max_per_img', 7), ('nms', dict(type='soft_nms'))):
        changed = copy.deepcopy(cfg)
        changed.model.test_cfg[key] = value
        assert not differences(before, fingerprint(changed, checkpoint, dataset, 1e-3)), key


def test_families_and_refusals():
    atss = zoo_config('ATSSHead')
    assert family_of(atss) is DENSE_HEADS and most_candidates(atss) == 5000
    assert plug(atss, 0.0).model.bbox_head.head == 'mmdet.ATSSHead'
    yolox = default_settings(zoo_config('YOLOXHead'), 1e-3, 100, 1e-3)[-1]
    assert (yolox.score_thr, yolox.max_per_img) == (0.01, -1) and most_candidates(zoo_config('YOLOXHead')) is None
    for head, words in (('CornerHead', 'ignores score_thr'), ('CondInstBboxHead', 'mask head')):
        with pytest.raises(ReevaluationError, match=words):
            plug(zoo_config(head), 0.0)
    atss.model.bbox_head.type = 'PAAHead'
    with pytest.raises(ReevaluationError, match='PAAHead cannot be plugged: it votes'):
        plug(atss, 0.0)


def test_a_network_that_gives_nan_is_refused(data, tmp_path):
    cfg, checkpoint = _project(data, 'ATSSHead', tmp_path)
    weights = torch.load(checkpoint, weights_only=True)
    weights['state_dict']['bbox_head.atss_centerness.bias'][:] = float('nan')
    torch.save(weights, checkpoint)
    with pytest.raises(ReevaluationError, match='not finite, first on image'):
        collect(cfg, checkpoint, 1e-3, tmp_path / 'candidates')
    assert json.loads((tmp_path / 'candidates').glob('*/store.json').__next__().read_text())['num_images'] == 6


def test_the_exported_post_processing_is_that_of_the_dense_head(capsys, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    rule = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3)
    cfg = with_head(zoo_config('ATSSHead'), rule, nms_pre=40)
    cfg.dump(tmp_path / 'atss.py')
    export([str(tmp_path / 'atss.py'), str(tmp_path / 'out.onnx')])
    assert 'score_thr and nms_pre' in capsys.readouterr().out
    model = build(cfg)
    live = predict(model)[0]
    model.bbox_head.test_cfg.max_per_img = -1
    model.bbox_head.test_cfg.nms = ConfigDict(type='mmdet_softnms.NoSuppression')  # update would merge
    raw = predict(model)[0]
    scores = torch.zeros(len(raw), cfg.model.bbox_head.num_classes + 1)
    scores[torch.arange(len(raw)), raw.labels] = raw.scores
    session = onnxruntime.InferenceSession(str(tmp_path / 'out.onnx'))
    dets, labels = session.run(None, dict(boxes=raw.bboxes.numpy(), scores=scores.numpy()))
    there = labels >= 0
    assert there.sum() == len(live) > 20
    torch.testing.assert_close(torch.from_numpy(labels[there]), live.labels)
    torch.testing.assert_close(torch.from_numpy(dets[there][:, :4]), live.bboxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(dets[there][:, 4]), live.scores, rtol=0, atol=1e-6)


def _views(data, head, tmp_path):
    cfg, checkpoint = _project(data, head, tmp_path)
    return cfg, checkpoint, dict(scales=('144x192', '192x256'), flip=True, work_dir=tmp_path / 'work')


def _live_views(cfg, checkpoint, result, row, request, folder):
    """What ``tools/test.py --tta`` gives with the block of a row pasted under the user's config."""
    cfg.dump(folder / 'base.py')
    block = paste_block(result.rows[row].setting, request.cfg)
    (folder / 'pasted.py').write_text(f"_base_ = './base.py'\n{block}\n")
    live = Config.fromfile(folder / 'pasted.py')
    live.model = ConfigDict(**live.tta_model, module=live.model)
    live.test_dataloader.dataset.pipeline = live.tta_pipeline
    return _live_stock(live, checkpoint, folder)


def _assert_equal(found, live):
    for ours, theirs in zip(found, live, strict=True):
        assert len(ours) == len(theirs['scores']) > 5
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


def test_views_are_one_store_and_the_pasted_block_gives_them_live(data, tmp_path):
    cfg, checkpoint, asked = _views(data, 'ATSSHead', tmp_path)
    request = Request(cfg, checkpoint, **asked)
    assert most_candidates(request.cfg) == 4 * most_candidates(cfg)
    result = reevaluate(request)
    union = result.session.candidates
    assert set(union.extras['views'].tolist()) == {0, 1, 2, 3}
    assert 'Candidates are those of all 4 views of each image, suppressed once.' in result.notes
    gaussian = result.rows[2].setting
    _assert_equal(detections(union, gaussian), _live_views(cfg, checkpoint, result, 2, request, tmp_path))

    # The smaller scale as it is and the larger one flipped: no product of scales and flips.
    request = Request(cfg, checkpoint, views=(0, 3), **asked)
    some = reevaluate(request)
    assert some.forward_images == 0 and some.store == result.store
    assert 'Candidates are those of views 0, 3 of the 4 of each image, suppressed once.' in some.notes
    found = detections(some.session.candidates, gaussian)
    _assert_equal(found, _live_views(cfg, checkpoint, some, 2, request, tmp_path))

    some = reevaluate(Request(cfg, checkpoint, views=(2,), **asked))
    # One view alone is the detector at that scale.
    alone = copy.deepcopy(cfg)
    next(one for one in alone.test_dataloader.dataset.pipeline if one['type'] == 'Resize').scale = (256, 192)
    single = reevaluate(Request(alone, checkpoint)).session.candidates
    assert some.session.candidates.num_candidates == single.num_candidates < union.num_candidates
    assert (some.session.candidates.bboxes == single.bboxes).all()


def test_views_are_tuned_on_the_views_of_another_split(data, tmp_path):
    cfg = Config.fromfile(data.coco_config)
    annotations = json.loads((data.root / 'coco.json').read_text())
    for split, images in (('val', annotations['images'][:3]), ('test', annotations['images'][3:])):
        ids = {image['id'] for image in images}
        of_them = [one for one in annotations['annotations'] if one['image_id'] in ids]
        path = tmp_path / f'{split}.json'
        path.write_text(json.dumps(dict(annotations, images=images, annotations=of_them)))
        cfg[f'{split}_dataloader'] = copy.deepcopy(cfg.test_dataloader)
        cfg[f'{split}_dataloader'].dataset.ann_file = str(path)
        cfg[f'{split}_evaluator'] = copy.deepcopy(cfg.test_evaluator)
        cfg[f'{split}_evaluator'].ann_file = str(path)
    asked = dict(
        scales=('96x128', '120x160'), select='AP', sweep=('SoftNMS.sigma=0.3,0.5',), work_dir=tmp_path / 'work'
    )
    tuned = {}
    for views in ((), (1,)):
        request = Request(cfg, data.checkpoint, views=views, **asked)
        split = plan_choice(request, build_test_set(request.cfg), Listener())
        assert [len(each) for each in split.dataset[0]['inputs']] == [3, 3]  # channels of each view
        reevaluate(request, report=lambda result, selection, views=views: tuned.update({views: (result, selection)}))
        assert tuned[views][1].tuned_on == 'a split of its own'
    stores = [CandidateStore.open(path.parent) for path in (tmp_path / 'work/candidates').glob('*/store.json')]
    assert sorted(store.num_images for store in stores) == [3, 3]  # of each split one with all views
    assert tuned[(1,)][0].forward_images == 0


@pytest.mark.parametrize(
    ('asked', 'words'),
    [
        (dict(flip=True), 'belongs to --scales'),
        (dict(tta=True), 'no tta_model'),
        (dict(tta=True, scales=('96x128',)), 'one of them'),
        (dict(scales=('96',)), 'as 480x800, got 96'),
        (dict(views=(0,)), '--views chooses among'),
        (dict(scales=('96x128',), flip=True, views=(0, 7)), 'no view 7: the views of an image are numbered 0 to 1'),
    ],
)
def test_views_that_cannot_be_are_refused(data, asked, words):
    cfg = Config.fromfile(data.coco_config)
    cfg.pop('tta_model', None)
    with pytest.raises(ReevaluationError, match=words):
        Request(cfg, data.checkpoint, **asked)


def test_the_configs_own_tta_is_taken(data, tmp_path):
    cfg = Config.fromfile(data.coco_config)
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
    cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.4), max_per_img=30))
    resizes = [dict(type='Resize', scale=(size, size), keep_ratio=True) for size in (96, 128)]
    pack = [dict(type='PackDetInputs', meta_keys=meta)]
    views = dict(type='TestTimeAug', transforms=[resizes, [dict(type='RandomFlip', prob=0.0)], pack])
    cfg.tta_pipeline = [dict(type='LoadImageFromFile'), views]
    request = Request(cfg, data.checkpoint, tta=True)
    result = reevaluate(request)
    assert set(result.session.candidates.extras['views'].tolist()) == {0, 1}
    assert result.rows[-1].params['iou_threshold'] == 0.4 and result.rows[-1].params['max_per_img'] == 30
    # The pipeline is the config's, and its rule suppresses once where mmdet's model would do it in each view, too.
    assert 'tta_pipeline' not in paste_block(result.rows[-1].setting, request.cfg)
    found = detections(result.session.candidates, result.rows[-1].setting)
    _assert_equal(found, _live_views(cfg, data.checkpoint, result, -1, request, tmp_path))
