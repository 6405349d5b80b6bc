"""A re-evaluation equals live runs: the same detections and the same unrounded AP, for every kind of data and head."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.evaluation.functional import eval_map
from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.forward import collect
from mmdet_softnms.reevaluation.candidates.plug import plug
from mmdet_softnms.reevaluation.request import Request
from mmdet_softnms.reevaluation.run import reevaluate
from mmdet_softnms.reevaluation.scoring.settings import default_settings
from mmdet_softnms.reevaluation.scoring.sweep import detections
from tests.commands import run_tool
from tests.tiny_dataset import CLASSES, make_project

LINEAR = dict(type='mmdet_softnms.SoftNMS', method='linear', iou_threshold=0.3, min_score=1e-3)
GAUSSIAN = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3)
HARD = dict(type='mmdet_softnms.HardNMS', iou_threshold=0.5)


@pytest.fixture(scope='module')
def projects(tmp_path_factory):
    return {
        kind: make_project(tmp_path_factory.mktemp('tiny'), kind) for kind in ('class-aware', 'class-agnostic', 'r-fcn')
    }


@pytest.fixture
def project(projects):
    return projects['class-aware']


def _live(config: Path, checkpoint: Path, nms: dict, out: Path) -> list[dict]:
    """Detections of a live run of tools/test.py with the rule in the config, by mmdet's own --out."""
    cfg = Config.fromfile(config)
    if cfg.model.roi_head.type != 'mmdet_softnms.RFCNRoIHead':
        cfg.model.roi_head.type = 'mmdet_softnms.SoftNMSRoIHead'
    cfg.model.test_cfg.rcnn = dict(score_thr=1e-3, max_per_img=100, nms=nms)
    changed = config.with_name(f'{out.stem}.py')
    cfg.dump(changed)
    return _tested(changed, checkpoint, out)


def _tested(config: Path, checkpoint: Path, out: Path) -> list[dict]:
    done = run_tool('test.py', config, checkpoint, '--out', out, '--work-dir', out.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return pickle.loads(out.read_bytes())


# Every detector, every evaluator and every rule at least once, not every combination: what an evaluator gets does not
# depend on which detector the boxes are of, and class-agnostic boxes are repeated for every class before any rule.
@pytest.mark.parametrize(
    ('detector', 'kind', 'nms', 'row'),
    [
        ('class-aware', 'voc', GAUSSIAN, 2),
        ('class-aware', 'coco', HARD, 0),
        ('class-agnostic', 'voc', LINEAR, 1),
        ('r-fcn', 'coco', GAUSSIAN, 2),
    ],
)
def test_reevaluation_equals_the_live_run(projects, detector, kind, nms, row, tmp_path):
    project = projects[detector]
    config = project.coco_config if kind == 'coco' else project.voc_config
    cfg = Config.fromfile(config)
    live = _live(config, project.checkpoint, nms, tmp_path / 'live.pkl')

    store = collect(cfg, project.checkpoint, 1e-3, tmp_path / 'candidates').store
    images = store.load()
    ours = detections(images, default_settings(cfg, 1e-3, 100, 1e-3)[row])
    assert [image.img_id for image in images] == [result['img_id'] for result in live]
    for one, result in zip(ours, live, strict=True):
        assert len(one) > 5
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(one[key], result['pred_instances'][key], rtol=0, atol=0)

    metrics = reevaluate(Request(cfg, project.checkpoint, store=store.folder)).rows[row].metrics
    expected = _coco_ap(project.root / 'coco.json', live)
    if kind == 'coco':
        assert 0.01 < metrics['AP'] < 0.99
        for name, position in (('AP', 0), ('AP50', 1), ('AP75', 2), ('AR1', 6), ('AR10', 7), ('AR100', 8)):
            assert metrics[name] == pytest.approx(expected[position], abs=1e-9)
    else:
        # The same objects, so the same COCO numbers; crowd and difficult objects are one to COCO.
        assert metrics['AP'] == pytest.approx(expected[0], abs=1e-9)
        annotations, results = _voc_lists(cfg, live)
        for name, mode in (('VOC07_AP50', '11points'), ('VOC12_AP50', 'area')):
            value, _ = eval_map(
                results, annotations, iou_thr=0.5, eval_mode=mode, use_legacy_coordinate=True, logger='silent'
            )
            assert 0.01 < value < 0.99
            assert metrics[name] == pytest.approx(value, abs=1e-9)


def _coco_ap(ann_file: Path, live: list[dict]) -> np.ndarray:
    coco = COCO(str(ann_file))
    results = [
        dict(image_id=int(result['img_id']), category_id=int(label) + 1, score=float(score),
             bbox=[float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])])
        for result in live
        for box, score, label in zip(*(result['pred_instances'][key] for key in ('bboxes', 'scores', 'labels')),
                                     strict=True)
    ]  # fmt: skip
    evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def _voc_lists(cfg: Config, live: list[dict]):
    from mmdet.datasets import VOCDataset

    dataset = VOCDataset(**{key: value for key, value in cfg.test_dataloader.dataset.items() if key != 'type'})
    annotations, results = [], []
    for number, result in enumerate(live):
        instances = dataset.get_data_info(number)['instances']
        for_flag = [[one for one in instances if one['ignore_flag'] == flag] for flag in (0, 1)]
        boxes, ignored = (np.array([one['bbox'] for one in part], np.float32).reshape(-1, 4) for part in for_flag)
        labels, labels_ignored = (np.array([one['bbox_label'] for one in part], int) for part in for_flag)
        annotations.append(dict(bboxes=boxes, labels=labels, bboxes_ignore=ignored, labels_ignore=labels_ignored))
        found = result['pred_instances']
        dets = torch.cat([found['bboxes'], found['scores'][:, None]], 1).numpy()
        results.append([dets[found['labels'].numpy() == label] for label in range(len(CLASSES))])
    return annotations, results


def test_candidates_in_caffe_coordinates_are_those_of_a_live_run(projects, tmp_path):
    """Stored after decoding in the original image; those of the other coordinates are never taken for them."""
    project = projects['r-fcn']
    cfg = Config.fromfile(project.coco_config)
    mmdets = collect(cfg, project.checkpoint, 1e-3, tmp_path / 'candidates').store
    cfg.model.coordinates = 'caffe'
    cfg.model.test_cfg.rcnn = dict(score_thr=1e-3, max_per_img=100, nms=HARD)
    store = collect(cfg, project.checkpoint, 1e-3, tmp_path / 'candidates').store
    assert store.folder != mmdets.folder
    images = store.load()
    model = init_detector(cfg, str(project.checkpoint), device='cpu')
    for image, found in zip(images, detections(images, default_settings(cfg, 1e-3, 100, 1e-3)[0]), strict=True):
        path = project.root / 'VOC2007/JPEGImages' / f'{image.img_id:06d}.jpg'
        live = inference_detector(model, str(path)).pred_instances
        assert len(live) > 5
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(found[key], live[key], rtol=0, atol=0)


def test_the_table_is_fair(project):
    result = reevaluate(
        Request(Config.fromfile(project.coco_config), project.checkpoint, score_thr=0.002, max_per_img=50)
    )
    names = [(row.rule, row.params.get('method'), row.source) for row in result.rows]
    assert names == [
        ('HardNMS', None, 'table'), ('SoftNMS', 'linear', 'table'), ('SoftNMS', 'gaussian', 'table'),
        ('nms', None, 'config'),
    ]  # fmt: skip
    assert [(row.params['score_thr'], row.params['max_per_img']) for row in result.rows] == [(0.002, 50)] * 3 + [
        (0.01, 100)
    ]
    assert result.num_images == 6
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(('detector', 'nms'), [('class-aware', 'stock'), ('class-agnostic', None)])
def test_the_configs_own_row_is_mmdets_own_result(projects, detector, nms, tmp_path):
    """Stock suppression, or none at all, over stored candidates equals the stock detector, class offset and all."""
    project = projects[detector]
    cfg = Config.fromfile(project.coco_config)
    if nms is None:
        cfg.model.test_cfg.rcnn.nms = None
    cfg.dump(tmp_path / 'own.py')
    live = _tested(tmp_path / 'own.py', project.checkpoint, tmp_path / 'stock.pkl')
    setting = default_settings(cfg, 1e-3, 100, 1e-3)[3]
    images = collect(cfg, project.checkpoint, 1e-3, tmp_path / 'candidates').store.load()
    for one, result in zip(detections(images, setting), live, strict=True):
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(one[key], result['pred_instances'][key], rtol=0, atol=0)


def test_no_detection_at_all_is_an_ap_of_zero(project):
    result = reevaluate(Request(Config.fromfile(project.voc_config), project.checkpoint, score_thr=0.999))
    assert result.rows[0].metrics['AP'] == result.rows[0].metrics['VOC07_AP50'] == 0.0


def test_masks_are_left_out_and_said_so(project):
    cfg = Config.fromfile(project.coco_config)
    from mmdet_softnms.reevaluation.report.table import to_table
    from tests.tiny import tiny_config

    masks = tiny_config('mask', num_classes=len(CLASSES)).model.roi_head
    cfg.model.roi_head.update(mask_head=masks.mask_head, mask_roi_extractor=masks.mask_roi_extractor)
    result = reevaluate(Request(cfg, project.checkpoint))
    assert result.masks_left_out and 'Masks are left out' in to_table(result).caption


@pytest.mark.parametrize('roi_head', ['GridRoIHead', 'SparseRoIHead', 'mmdet.TridentRoIHead', 'MultiInstanceRoIHead'])
def test_heads_that_cannot_be_plugged_are_refused(project, roi_head):
    cfg = Config.fromfile(project.coco_config)
    cfg.model.roi_head.type = roi_head
    with pytest.raises(ReevaluationError, match=f'{roi_head.split(".")[-1]} cannot be plugged'):
        plug(cfg, 0.0)


def test_detectors_without_a_head_that_predicts_boxes_are_refused():
    with pytest.raises(ReevaluationError, match='SORT has no roi_head and no bbox_head'):
        plug(Config(dict(model=dict(type='SORT'))), 0.0)


@pytest.mark.parametrize(
    'thresholds', [dict(score_thr=-0.1), dict(score_thr=1.0), dict(max_per_img=-2), dict(min_score=2)]
)
def test_thresholds_out_of_range_are_refused(project, thresholds):
    with pytest.raises(ReevaluationError, match=next(iter(thresholds))):
        reevaluate(Request(Config.fromfile(project.coco_config), project.checkpoint, **thresholds))


def test_a_config_dumped_after_its_model_was_built_is_accepted(project, tmp_path):
    """mmdet's detectors write test_cfg into the head's config, and ConfigDict.update merges."""
    cfg = Config.fromfile(project.coco_config)
    cfg.model.roi_head.test_cfg = cfg.model.test_cfg.rcnn
    assert collect(cfg, project.checkpoint, 0.5, tmp_path).forward_images == 6


def test_what_mmdet_cannot_run_is_one_line(project, tmp_path):
    cfg = Config.fromfile(project.coco_config)
    cfg.dump(tmp_path / 'lists.json')
    with pytest.raises(ReevaluationError, match=r'lists.json has lists where mmcv needs tuples.*; give a .py'):
        collect(Config.fromfile(tmp_path / 'lists.json'), project.checkpoint, 0.5, tmp_path / 'a')
    cfg.test_cfg.fp16 = True
    with pytest.raises(ReevaluationError, match=r'half precision here \(.*; use test_cfg.fp16=False, or a GPU'):
        collect(cfg, project.checkpoint, 0.5, tmp_path / 'b')


def test_batches_move_ap_by_less_than_1e_4(project):
    """Last bits differ, and with them the fingerprint; what is published does not.

    All images of one size: mmdet pads those of a batch to the largest, which a network sees at its borders.
    """
    cfg = Config.fromfile(project.coco_config)
    cfg.test_dataloader.dataset.pipeline[1].keep_ratio = False
    single = reevaluate(Request(cfg, project.checkpoint))
    assert single.rows[0].metrics['AP'] > 0
    cfg.test_dataloader.batch_size = 4
    cfg.test_dataloader.drop_last = True  # would leave two images without candidates
    batches = reevaluate(Request(cfg, project.checkpoint))
    assert batches.store.split('/')[-1] != single.store.split('/')[-1]
    for one, other in zip(single.rows, batches.rows, strict=True):
        assert one.metrics == pytest.approx(other.metrics, abs=1e-4)
