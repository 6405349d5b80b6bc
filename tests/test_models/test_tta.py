"""Test-time augmentation: hard NMS equals mmdet's merge, a rule is applied once to the union of the views."""

import copy

import cv2
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict

from mmdet_softnms import soft_nms
from mmdet_softnms.models.places import check_places
from tests.tiny import plugged, tiny_config
from tests.tiny_dense import DEMO, build, with_head, zoo_config

HARD = dict(type='mmdet_softnms.HardNMS', iou_threshold=0.5)
GAUSSIAN = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3)
RAW = dict(type='mmdet_softnms.NoSuppression')
STOCK = dict(type='nms', iou_threshold=0.5)


def _tta(model, kind, nms, max_per_img=100):
    tta_cfg = ConfigDict(nms=nms, max_per_img=max_per_img)
    return MODELS.build(dict(type=kind, tta_cfg=tta_cfg, module=model)).eval()


@torch.no_grad()
def _predict(tta):
    """One drawn image in two scales, each plain and flipped."""
    image = cv2.imread(str(sorted(DEMO.glob('*.jpg'))[0]))
    inputs, samples = [], []
    for size in (160, 192):
        for flip in (False, True):
            small = cv2.resize(image, (size, size))
            small = small[:, ::-1] if flip else small
            inputs.append([torch.from_numpy(small.transpose(2, 0, 1).copy())])
            meta = dict(img_id=0, ori_shape=image.shape[:2], img_shape=(size, size), flip=flip)
            meta |= dict(scale_factor=(size / image.shape[1], size / image.shape[0]), flip_direction='horizontal')
            samples.append([DetDataSample(metainfo=meta)])
    (result,) = tta.test_step(dict(inputs=inputs, data_samples=samples))
    return result.pred_instances


@pytest.fixture(scope='module', params=['ATSSHead', 'Faster R-CNN'])
def detector(request):
    """A function from the nms of the model's test_cfg to the detector."""
    if request.param == 'ATSSHead':
        cfg = zoo_config('ATSSHead')
        weights = build(cfg)
        return lambda nms, limit: build(with_head(cfg, nms, max_per_img=limit), like=weights)
    from tests.tiny import build as build_two_stage

    cfg = tiny_config('SoftNMSRoIHead')
    weights = build_two_stage(cfg)

    def make(nms, limit):
        changed = plugged(cfg, 'SoftNMSRoIHead', nms)
        changed.model.test_cfg.rcnn.max_per_img = limit
        return build_two_stage(changed, like=weights)

    return make


def test_hard_is_mmdets_and_soft_is_the_operator_on_the_union(detector):
    model = detector(STOCK, 100)
    stock = _predict(_tta(model, 'DetTTAModel', STOCK))
    hard = _predict(_tta(model, 'mmdet_softnms.SoftNMSTTAModel', HARD))
    assert len(stock) > 20
    for key in ('bboxes', 'scores', 'labels'):
        torch.testing.assert_close(hard[key], stock[key], rtol=0, atol=0)
    left = _predict(_tta(model, 'mmdet_softnms.SoftNMSTTAModel', STOCK))  # to mmdet
    assert torch.equal(left.scores, stock.scores)

    every = detector(RAW, -1)
    union = _predict(_tta(every, 'mmdet_softnms.SoftNMSTTAModel', RAW, -1))
    assert union.views.unique().tolist() == [0, 1, 2, 3]
    ours = _predict(_tta(every, 'mmdet_softnms.SoftNMSTTAModel', GAUSSIAN))
    keep, scores = soft_nms(union.bboxes, union.scores, union.labels, sigma=0.5, min_score=1e-3, max_num=100)
    assert (scores < union.scores[keep]).any() and len(union.views[keep].unique()) > 1
    torch.testing.assert_close(ours.bboxes, union.bboxes[keep], rtol=0, atol=0)
    torch.testing.assert_close(ours.scores, scores, rtol=0, atol=0)


def test_a_rule_in_both_places_is_refused_with_the_remedy(detector):
    for nms in (GAUSSIAN, dict(type='soft_nms', iou_threshold=0.5)):
        with pytest.raises(ValueError, match='scores would decay twice.*NoSuppression'):
            _tta(detector(nms, 100), 'mmdet_softnms.SoftNMSTTAModel', GAUSSIAN)


def test_places_know_the_tta_model():
    cfg = Config(dict(model=with_head(zoo_config('ATSSHead'), RAW).model))
    cfg.tta_model = dict(type='mmdet_softnms.SoftNMSTTAModel', tta_cfg=dict(nms=GAUSSIAN, max_per_img=100))
    check_places(cfg)
    twice = copy.deepcopy(cfg)
    twice.model.test_cfg.nms = GAUSSIAN
    with pytest.raises(ValueError, match='decay twice'):
        check_places(twice)
    cfg.tta_model.type = 'DetTTAModel'
    with pytest.raises(ValueError, match=r"tta_model=dict\(type='mmdet_softnms.SoftNMSTTAModel'"):
        check_places(cfg)
