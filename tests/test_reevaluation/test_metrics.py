"""Metrics: faster-coco-eval's numbers are pycocotools', and ground truth that cannot be used is refused."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.candidates.test_set import build_test_set
from mmdet_softnms.reevaluation.scoring.metrics import (
    AP_NAMES,
    COCO_STATS,
    RECALLS,
    Evaluator,
    GroundTruth,
    are_crowded,
    read_ground_truth,
)
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections
from mmdet_softnms.rules import HardNMS, NoSuppression, SoftNMS, describe
from tests.drawn import drawn_test_set, pycocotools_evaluation
from tests.tiny_dataset import make_project


@pytest.mark.parametrize('rule', [HardNMS(0.5), SoftNMS('gaussian'), SoftNMS('linear'), NoSuppression()], ids=describe)
@pytest.mark.parametrize('seed', [0, 1])
def test_every_number_ispycocotools_evaluation(rule, seed):
    candidates, truth = drawn_test_set(seed=seed)
    results = detections(candidates, Setting(rule, 0.0, 100))
    scores = Evaluator(truth)(results)
    expected = pycocotools_evaluation(truth, results)
    assert 0.05 < scores.metrics['AP'] < 0.95
    for name, value in zip(COCO_STATS, expected.stats, strict=True):
        assert scores.metrics[name] == pytest.approx(value, abs=1e-9), name
    curves = expected.eval['precision'][:, :, :, 0, -1]
    exists = curves[0, 0] > -1
    assert exists.tolist() == [True, True, True, False]
    for number, name in enumerate(AP_NAMES):
        assert scores.metrics[name] == pytest.approx(curves[number][:, exists].mean(), abs=1e-9)
        assert scores.precision[name] == pytest.approx(curves[number][:, exists].mean(1).tolist(), abs=1e-9)
        assert len(scores.precision[name]) == len(RECALLS)
    assert scores.per_class == pytest.approx(
        {f'class {label}': curves[:, :, label].mean() for label in range(3)}, abs=1e-9
    )


def _iou(one, other):
    (x, y, w, h), (u, v, s, t) = one, other
    inside = max(min(x + w, u + s) - max(x, u), 0) * max(min(y + h, v + t) - max(y, v), 0)
    return inside / (w * h + s * t - inside)


class _CrowdedEval(COCOeval):
    """pycocotools' evaluation with ``ignore`` set on all objects that are not crowded."""

    def _prepare(self):
        super()._prepare()  # which sets ignore to iscrowd
        for objects in self._gts.values():
            for one in objects:
                others = (other for other in objects if other is not one)
                if not any(_iou(one['bbox'], other['bbox']) >= 0.3 for other in others):
                    one['ignore'] = 1


@pytest.mark.parametrize('seed', [0, 1])
def test_crowded_ap_is_pycocotools_with_ignore_set_on_the_other_objects(seed):
    candidates, truth = drawn_test_set(seed=seed)
    results = detections(candidates, Setting(SoftNMS('gaussian'), 0.0, 100))
    metrics = Evaluator(truth)(results).metrics
    crowded, ignored = are_crowded(truth), [bool(one['iscrowd']) for one in truth.coco['annotations']]
    assert (
        10 < crowded.sum() < len(crowded) - 10 and (crowded & ignored).any() and (~crowded & ~np.array(ignored)).any()
    )
    expected = pycocotools_evaluation(truth, results, _CrowdedEval).stats[0]
    assert metrics['AP_crowded'] == pytest.approx(expected, abs=1e-9)
    assert abs(expected - metrics['AP']) > 0.01


def test_without_a_crowded_object_there_is_no_crowded_ap():
    candidates, truth = drawn_test_set()
    truth.coco['annotations'] = [
        one for one, is_crowded in zip(truth.coco['annotations'], are_crowded(truth), strict=True) if not is_crowded
    ]
    assert not are_crowded(truth).any()
    metrics = Evaluator(truth)(detections(candidates, Setting(HardNMS(), 0.0, 100))).metrics
    assert metrics['AP_crowded'] == -1 and metrics['AP'] > 0


def test_crowded_begins_at_the_named_iou_within_a_class_and_counts_ignored_neighbours():
    def truth(second, iscrowd=0, category_id=1):
        first = dict(image_id=1, category_id=1, bbox=[0.0, 0.0, 13.0, 10.0], iscrowd=0)
        annotations = [first, first | dict(category_id=category_id, bbox=[*second, 13.0, 10.0], iscrowd=iscrowd)]
        return GroundTruth(('a', 'b'), dict(annotations=annotations), [1], [1, 2])

    assert are_crowded(truth([7, 0])).all()  # IoU 60 / 200
    assert not are_crowded(truth([7.001, 0])).any()
    assert not are_crowded(truth([7, 0], category_id=2)).any()
    assert are_crowded(truth([7, 0], iscrowd=1)).all()


def test_an_evaluator_can_be_used_again():
    candidates, truth = drawn_test_set()
    evaluator = Evaluator(truth)
    first, _, again = (
        evaluator(detections(candidates, Setting(rule, 0.0, 100))) for rule in (HardNMS(), SoftNMS(), HardNMS())
    )
    assert first == again


def test_nothing_detected_is_zero():
    candidates, truth = drawn_test_set()
    scores = Evaluator(truth)(detections(candidates, Setting(HardNMS(), 0.999999, 100)))
    assert scores.metrics['AP'] == scores.metrics['AR100'] == 0.0


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp('metrics'))


def _with_annotations(project, tmp_path, change):
    cfg = Config.fromfile(project.coco_config)
    content = json.loads((project.root / 'coco.json').read_text())
    change(content)
    (tmp_path / 'changed.json').write_text(json.dumps(content))
    dataset = build_test_set(cfg)
    cfg.test_evaluator.ann_file = str(tmp_path / 'changed.json')
    return cfg, dataset


def _rename(content):
    content['categories'].append(dict(id=9, name='yak'))
    content['annotations'].append(dict(id=99, image_id=1, category_id=9, bbox=[0, 0, 9, 9], area=81, iscrowd=0))


def test_classes_the_model_does_not_know_are_left_out_and_said_so(project, tmp_path):
    truth = read_ground_truth(*_with_annotations(project, tmp_path, _rename))
    assert truth.notes == [
        '1 annotated objects are of classes the model does not know (yak) and are left out, as mmdet does.'
    ]
    assert {one['category_id'] for one in truth.coco['annotations']} <= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda content: content['images'].pop(0), 'lacks 1 of the 6 test images, first id 1'),
        (lambda content: content['annotations'][0].pop('bbox'), 'annotation 1 of .* has no bbox'),
        (lambda content: content['annotations'].clear(), 'has no annotated object'),
        (lambda content: content.pop('categories'), 'is not a COCO json: KeyError'),
        (lambda content: content['categories'].pop(2), r"4 of the model's 5 classes \(not cat\)"),
        (lambda content: [one.update(name='yak') for one in content['categories']], "none of the model's classes"),
    ],
)
def test_annotations_that_cannot_be_used(project, tmp_path, change, words):
    with pytest.raises(ReevaluationError, match=words):
        read_ground_truth(*_with_annotations(project, tmp_path, change))


def test_labels_follow_the_files_order_of_categories(project, tmp_path):
    """As in mmdet's CocoDataset, whatever order the model's classes have."""
    truth = read_ground_truth(*_with_annotations(project, tmp_path, lambda content: content['categories'].reverse()))
    assert truth.category_ids == [5, 4, 3, 2, 1]
    assert truth.classes == ('eel', 'dog', 'cat', 'bee', 'ant')  # label 0 is what the file names first


def test_voc_ground_truth_keeps_difficult_objects_apart(project):
    cfg = Config.fromfile(project.voc_config)
    truth = read_ground_truth(cfg, build_test_set(cfg))
    assert len(truth.voc) == 6
    assert all(len(one['bboxes_ignore']) == 1 and len(one['bboxes']) >= 2 for one in truth.voc)
    assert sum(one['iscrowd'] for one in truth.coco['annotations']) == 6
    assert np.concatenate([one['bboxes'] for one in truth.voc]).dtype == np.float32


def test_real_coco_annotations(shared):
    """Crowds, areas of segmentations, 80 classes with gaps in their ids: objects moved a little, as detections."""
    root = shared / 'data/coco'
    ann_file = root / 'annotations/instances_val2017_206.json'
    cfg = Config(
        dict(
            test_dataloader=dict(
                dataset=dict(
                    type='CocoDataset',
                    data_root=f'{root}/',
                    ann_file='annotations/instances_val2017_206.json',
                    data_prefix=dict(img='val2017/'),
                    test_mode=True,
                    pipeline=[],
                )
            ),
            test_evaluator=dict(type='CocoMetric', ann_file=str(ann_file)),
        )
    )
    dataset = build_test_set(cfg, check_images=False)
    truth = read_ground_truth(cfg, dataset)
    content = json.loads(ann_file.read_text())
    random = np.random.default_rng(0)
    results, found = [], []
    for number in range(len(dataset)):
        img_id = dataset.get_data_info(number)['img_id']
        boxes, labels = [], []
        for one in content['annotations']:
            if one['image_id'] == img_id:
                for _ in range(2):
                    x, y, w, h = np.array(one['bbox']) * random.normal(1, 0.05, 4)
                    boxes.append([x, y, x + w, y + h])
                    labels.append(truth.category_ids.index(one['category_id']))
        result = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor(random.random(len(boxes)), dtype=torch.float32),
            labels=torch.tensor(labels, dtype=torch.int64),
        )
        results.append(result)
        found += [
            dict(image_id=img_id, category_id=truth.category_ids[label], score=score, bbox=[x1, y1, x2 - x1, y2 - y1])
            for (x1, y1, x2, y2), score, label in zip(
                result.bboxes.tolist(), result.scores.tolist(), labels, strict=True
            )
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(ann_file))
        expected = COCOeval(coco, coco.loadRes(found), 'bbox')
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    metrics = Evaluator(truth)(results).metrics
    assert any(one['iscrowd'] for one in truth.coco['annotations']) and 0.1 < metrics['AP'] < 0.9
    for name, value in zip(COCO_STATS, expected.stats, strict=True):
        assert metrics[name] == pytest.approx(value, abs=1e-9), name
