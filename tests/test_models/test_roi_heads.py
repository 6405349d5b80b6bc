"""The RoI heads: hard NMS equals mmdet's, soft NMS equals the operator, and nothing else of the detector changes."""

import copy
import pickle

import pytest
import torch
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict

from mmdet_softnms import soft_nms
from mmdet_softnms.models.places import check_places
from mmdet_softnms.post_process import post_process
from mmdet_softnms.reevaluation.candidates.plug import family_of, plug
from mmdet_softnms.rules import SoftNMS
from tests.tiny import build, plugged, predict, predict_raw, tiny_config

HEADS = ['SoftNMSRoIHead', 'SoftNMSCascadeRoIHead', 'SoftNMSDoubleHeadRoIHead']
GAUSSIAN = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=0.01)
HARD = dict(type='mmdet_softnms.HardNMS', iou_threshold=0.5)


def _assert_same(ours, theirs, atol=0.0):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a.pred_instances) > 5  # an empty comparison would show nothing
        torch.testing.assert_close(a.pred_instances.labels, b.pred_instances.labels)
        torch.testing.assert_close(a.pred_instances.bboxes, b.pred_instances.bboxes, rtol=0, atol=0)
        torch.testing.assert_close(a.pred_instances.scores, b.pred_instances.scores, rtol=0, atol=atol)


@pytest.mark.parametrize('head', HEADS)
def test_hard_nms_is_mmdets_own(head):
    cfg = tiny_config(head)
    stock = build(cfg)
    ours = build(plugged(cfg, head, HARD), like=stock)  # strict: no parameter more or less
    _assert_same(predict(ours), predict(stock), atol=1e-6)


@pytest.mark.parametrize('head', HEADS)
def test_stock_nms_type_is_left_to_mmdet(head):
    cfg = tiny_config(head)
    stock = build(cfg)
    ours = build(plugged(cfg, head, dict(type='nms', iou_threshold=0.5)), like=stock)
    _assert_same(predict(ours), predict(stock))


@pytest.mark.parametrize('class_agnostic', [False, True])
def test_soft_nms_is_the_operator_on_the_raw_results(class_agnostic):
    cfg = tiny_config('SoftNMSRoIHead')
    cfg.model.roi_head.bbox_head.reg_class_agnostic = class_agnostic
    model = build(plugged(cfg, 'SoftNMSRoIHead', GAUSSIAN))
    for result, raw in zip(predict(model), predict_raw(model), strict=True):
        num_rois, num_classes = raw.scores.shape[0], raw.scores.shape[1] - 1
        assert raw.bboxes.shape == (num_rois, 4 if class_agnostic else 4 * num_classes)
        boxes = raw.bboxes.repeat(1, num_classes) if class_agnostic else raw.bboxes
        boxes, scores = boxes.reshape(-1, 4), raw.scores[:, :-1].reshape(-1)
        labels = torch.arange(num_classes).repeat(num_rois)
        above = scores > 0.01
        boxes, scores, labels = boxes[above], scores[above], labels[above]
        keep, decayed = soft_nms(boxes, scores, labels, sigma=0.5, min_score=0.01, max_num=100)
        assert len(keep) > 5 and (decayed < scores[keep]).any()  # something was decayed
        torch.testing.assert_close(result.pred_instances.scores, decayed, rtol=0, atol=0)
        torch.testing.assert_close(result.pred_instances.bboxes, boxes[keep], rtol=0, atol=0)
        torch.testing.assert_close(result.pred_instances.labels, labels[keep])


def test_a_rule_that_is_edited_in_a_built_model_is_another_rule():
    """In a notebook: test_cfg changed in place, or replaced; mmdet looks at it for every image, too."""
    model = build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN))
    other = build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', dict(GAUSSIAN, sigma=0.1)), like=model)
    stock = build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', dict(type='nms', iou_threshold=0.5)))
    before = predict(model)
    model.roi_head.test_cfg.nms.sigma = 0.1
    _assert_same(predict(model), predict(other))
    model.roi_head.test_cfg = copy.deepcopy(stock.roi_head.test_cfg)
    _assert_same(predict(model), predict(stock))
    model.roi_head.test_cfg.nms = ConfigDict(GAUSSIAN)
    _assert_same(predict(model), before)


def test_a_rule_may_be_a_class():
    """As in mmengine's pure Python configs."""
    ours = build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', dict(GAUSSIAN, type=SoftNMS)))
    _assert_same(predict(ours), predict(build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN))))


VOTED = dict(type='mmdet_softnms.VotedNMS', tolerance=0.5, rule=GAUSSIAN)


@pytest.mark.parametrize('nms', [GAUSSIAN, VOTED], ids=['selected', 'voted'])
def test_masks_belong_to_the_surviving_boxes(nms):
    model = build(plugged(tiny_config('mask'), 'SoftNMSRoIHead', nms))
    boxes_only = build(plugged(_without_masks(tiny_config('mask')), 'SoftNMSRoIHead', nms))
    boxes_only.load_state_dict(model.state_dict(), strict=False)
    seen = {}

    def keep_rois(module, args, output):
        seen['rois'] = args[1]

    model.roi_head.mask_roi_extractor.register_forward_hook(keep_rois)
    results = predict(model)
    _assert_same(results, predict(boxes_only), atol=1e-6)  # masks change no box
    survivors = torch.cat([result.pred_instances.bboxes for result in results])
    # Masks are predicted for the survivors only, in network scale: half of the original one here.
    torch.testing.assert_close(seen['rois'][:, 1:] * 2, survivors, rtol=0, atol=1e-3)
    for result in results:
        assert result.pred_instances.masks.shape == (len(result.pred_instances), 192, 256)
    if nms is VOTED:  # other boxes than those that the rule inside selects, with the same scores
        model.roi_head.test_cfg.nms = ConfigDict(GAUSSIAN)
        for voted, selected in zip(results, predict(model), strict=True):
            assert torch.equal(voted.pred_instances.scores, selected.pred_instances.scores)
            assert (voted.pred_instances.bboxes - selected.pred_instances.bboxes).abs().max() > 0.1


def _without_masks(cfg):
    for part in ('mask_head', 'mask_roi_extractor'):
        cfg.model.roi_head.pop(part)
    return cfg


def test_no_proposal_gives_no_detection():
    model = build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN))
    model.rpn_head.test_cfg.min_bbox_size = 10**6
    for result in predict(model):
        assert result.pred_instances.bboxes.shape == (0, 4)
        assert result.pred_instances.scores.shape == result.pred_instances.labels.shape == (0,)


def test_a_config_survives_dump_and_reload(tmp_path):
    cfg = plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN)
    cfg.dump(tmp_path / 'dumped.py')
    again = Config.fromfile(tmp_path / 'dumped.py')
    assert again.model == cfg.model
    _assert_same(predict(build(again)), predict(build(cfg)))


def test_max_per_img_and_score_thr_are_obeyed():
    cfg = plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN)
    cfg.model.test_cfg.rcnn.max_per_img = 3
    assert [len(result.pred_instances) for result in predict(build(cfg))] == [3, 3]
    cfg.model.test_cfg.rcnn.score_thr = 1.0
    assert [len(result.pred_instances) for result in predict(build(cfg))] == [0, 0]


@pytest.mark.parametrize(
    'base',
    [
        'mmdet::grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py',
        'mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py',
        'mmdet::crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py',
        'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
        'mmdet::sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py',
    ],
)
def test_foreign_heads_are_refused_in_one_sentence(base):
    from mmengine.hub import get_config

    cfg = plugged(get_config(base), 'SoftNMSRoIHead', GAUSSIAN)
    cfg.model.roi_head.update(train_cfg=None, test_cfg=cfg.model.test_cfg.rcnn)
    with pytest.raises(TypeError, match='cannot be (plugged|used)') as raised:
        MODELS.build(cfg.model.roi_head)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('nms', 'error', 'words'),
    [
        (dict(type='mmdet_softnms.SoftNMS', sigma=0), ValueError, 'sigma'),
        (dict(type='mmdet_softnms.SoftNMS', method='cubic'), ValueError, 'method'),
        (dict(type='mmdet_softnms.HardNMS', iou_threshold=1.5), ValueError, 'iou_threshold'),
        (dict(type='mmdet_softnms.HardNMS', iou_thr=0.5), TypeError, "did you mean 'iou_threshold'"),
        (dict(type='mmdet_softnms.HardNMS', split_thr=5), TypeError, '_delete_=True'),
        (dict(type='mmdet_softnms.NoSuchRule'), KeyError, 'NoSuchRule'),
    ],
)
def test_bad_rules_are_refused_when_the_model_is_built(nms, error, words):
    cfg = plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', nms)
    with pytest.raises(error, match=words):
        build(cfg)


def test_the_comparison_notices_another_rule():
    """Negative control of the comparisons above."""
    cfg = tiny_config('SoftNMSRoIHead')
    stock = build(cfg)
    ours = build(plugged(cfg, 'SoftNMSRoIHead', GAUSSIAN), like=stock)
    with pytest.raises(AssertionError):
        _assert_same(predict(ours), predict(stock), atol=1e-6)


def test_any_head_of_the_contract_takes_rules_and_survives_copies():
    from mmdet.models.roi_heads import DynamicRoIHead

    cfg = tiny_config('SoftNMSRoIHead')
    cfg.model.roi_head.bbox_head.loss_bbox = ConfigDict(type='SmoothL1Loss', beta=1.0)
    stock = build(cfg)
    ours = plugged(cfg, 'SoftNMSRoIHead', HARD)
    ours.model.roi_head.head = 'DynamicRoIHead'
    ours.model.train_cfg.rcnn.dynamic_rcnn = dict(iou_topk=75, beta_topk=10, update_iter_interval=100, initial_iou=0.4)
    ours.model.train_cfg.rcnn.dynamic_rcnn.initial_beta = 1.0
    model = build(ours, like=stock)
    assert isinstance(model.roi_head, DynamicRoIHead)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _assert_same(predict(again), predict(stock), atol=1e-6)


def test_scnet_by_its_zoo_config():
    """Three stages, a semantic branch, global context and masks from relayed features."""
    cfg = tiny_config('mmdet::scnet/scnet_r50_fpn_1x_coco.py')
    stock = build(cfg)
    hard = plugged(cfg, 'SoftNMSRoIHead', HARD)
    hard.model.roi_head.head = 'SCNetRoIHead'
    ours = build(hard, like=stock)
    results, expected = predict(ours), predict(stock)
    _assert_same(results, expected, atol=1e-6)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result.pred_instances.masks, other.pred_instances.masks)
    ours.roi_head.test_cfg.nms = ConfigDict(GAUSSIAN)
    raw = ours.roi_head.test_cfg.copy()
    soft = predict(ours)
    ours.roi_head.test_cfg = ConfigDict(raw, nms=ConfigDict(type='mmdet_softnms.NoSuppression'), max_per_img=-1)
    for result, candidates in zip(soft, predict(ours), strict=True):
        every = candidates.pred_instances
        keep, scores = soft_nms(every.bboxes, every.scores, every.labels, sigma=0.5, min_score=0.01, max_num=100)
        assert (scores < every.scores[keep]).any()
        torch.testing.assert_close(result.pred_instances.scores, scores, rtol=0, atol=0)


def test_max_per_img_0_is_no_limit():
    cfg = plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN)
    cfg.model.test_cfg.rcnn.max_per_img = 0
    assert all(len(result.pred_instances) > 5 for result in predict(build(cfg)))


def test_non_finite_boxes_of_a_class_are_dropped_with_one_warning():
    model = build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN))
    model.roi_head.bbox_head.fc_reg.weight.data[:4] = float('nan')
    with pytest.warns(RuntimeWarning, match='dropped .* candidates') as seen:
        results = [*predict(model), *predict(model)]
    assert len(seen) == 1
    for result in results:
        assert len(result.pred_instances) > 5 and (result.pred_instances.labels > 0).all()


def test_half_precision_reaches_the_rule():
    """Under autocast, and with raw results of half precision: the operator's result on their values."""
    model = build(plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN))
    predict_bbox, seen = model.roi_head.predict_bbox, []

    def in_half(*args, rcnn_test_cfg, **kwargs):
        with torch.autocast('cpu', torch.bfloat16):
            seen.extend(predict_bbox(*args, rcnn_test_cfg=None, **kwargs))
            return predict_bbox(*args, rcnn_test_cfg=rcnn_test_cfg, **kwargs)

    model.roi_head.predict_bbox = in_half
    rule = SoftNMS('gaussian', sigma=0.5, min_score=0.01)
    for result, raw in zip(predict(model), seen, strict=True):
        found, expected = result.pred_instances, post_process(raw.bboxes, raw.scores, rule, 0.01, 100)
        assert len(found) > 5 and torch.equal(found.bboxes, expected.bboxes)
        assert torch.equal(found.scores, expected.scores)
        for dtype in (torch.bfloat16, torch.float16):
            halves = raw.bboxes.to(dtype), raw.scores.to(dtype)
            half = post_process(*halves, rule, 0.01, 100)
            whole = post_process(*(one.float() for one in halves), rule, 0.01, 100)
            assert torch.equal(half.bboxes.float(), whole.bboxes) and torch.equal(half.scores, whole.scores.to(dtype))


def test_a_cascade_config_is_sent_to_the_cascade_head():
    with pytest.raises(TypeError, match='SoftNMSCascadeRoIHead'):
        build(plugged(tiny_config('SoftNMSCascadeRoIHead'), 'SoftNMSRoIHead', GAUSSIAN))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'test_cfg.rpn.nms': dict(_delete_=True, type='mmdet_softnms.SoftNMS')}, 'model.test_cfg.rpn.nms: .*write'),
        ({'roi_head.type': 'StandardRoIHead'}, "roi_head=dict\\(type='mmdet_softnms.SoftNMSRoIHead'\\)"),
        ({'test_cfg.rcnn.nms': dict(_delete_=True, type='SoftNMS')}, 'mmdet_softnms.SoftNMS'),
        ({'test_cfg.rcnn.nms': ['SoftNMS']}, 'nms must be a dict'),
        ({'test_cfg.rcnn.nms': dict(_delete_=True, type=3)}, 'nms.type must be a name'),
        ({'roi_head.type': 'SoftNMSRoIHead'}, 'is it mmdet_softnms.SoftNMSRoIHead'),
        ({'roi_head.head': 'MaskScoringRoIHead'}, 'needs mask_iou_head'),
    ],
)
def test_misplaced_rules_are_one_sentence(options, words):
    cfg = plugged(tiny_config('SoftNMSRoIHead'), 'SoftNMSRoIHead', GAUSSIAN)
    check_places(cfg)
    cfg.merge_from_dict({f'model.{name}': value for name, value in options.items()})
    with pytest.raises(ValueError, match=words) as raised:
        check_places(cfg)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('kind', ['DynamicRoIHead', 'PISARoIHead', CascadeRoIHead])
def test_heads_of_the_contract_are_plugged(kind):
    cfg = tiny_config('SoftNMSCascadeRoIHead' if kind is CascadeRoIHead else 'SoftNMSRoIHead')
    cfg.model.roi_head.type = kind
    written = family_of(cfg).written(cfg)
    assert written.get('head', written['type']).endswith(getattr(kind, '__name__', kind))
    assert plug(cfg, 0.0).model.roi_head.type == written['type']
