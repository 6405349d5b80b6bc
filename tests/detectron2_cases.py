"""Rules in Detectron2, beside its own NMS: small models with random weights, and drawn boxes."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mmdet_softnms.rules import HardNMS, NoSuppression, SoftNMS, SupportedNMS, VotedNMS, describe
from tests import detectron2_for_tests

if WHY_NOT := detectron2_for_tests.find():
    pytest.skip(WHY_NOT, allow_module_level=True)

from detectron2 import model_zoo
from detectron2.config import LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformRotated
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances

from mmdet_softnms.detectron2 import (
    SoftNMSCascadeROIHeads,
    SoftNMSFCOS,
    SoftNMSOutputLayers,
    SoftNMSRetinaNet,
    SoftNMSWithTTA,
    add_soft_nms_config,
    build_rule,
    inference,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'detectron2.md'
CLASSES = 3
RULES = [
    SoftNMS(),
    SoftNMS('linear', 0.3),
    SoftNMS(class_agnostic=True),
    SoftNMS(decay='strongest'),
    HardNMS(0.5),
    VotedNMS(),
    SupportedNMS(),
    SupportedNMS(VotedNMS(HardNMS())),
    NoSuppression(),
]
HEADS = {
    'mask': ('COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml', 'StandardROIHeads', 'SoftNMSROIHeads'),
    'cascade': ('Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml', 'CascadeROIHeads', 'SoftNMSCascadeROIHeads'),
    'C4': ('COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml', 'Res5ROIHeads', 'SoftNMSRes5ROIHeads'),
}


def small_config(kind: str, *options: object):
    """A zoo config made small, with the keys of the rules."""
    cfg = get_cfg()
    add_soft_nms_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(HEADS[kind][0]))
    size = ['MODEL.RESNETS.STEM_OUT_CHANNELS', 8, 'MODEL.RESNETS.RES2_OUT_CHANNELS', 16]
    size += ['MODEL.RESNETS.WIDTH_PER_GROUP', 8, 'MODEL.FPN.OUT_CHANNELS', 16, 'MODEL.ROI_BOX_HEAD.FC_DIM', 16]
    size += ['MODEL.ROI_BOX_HEAD.NUM_FC', 1, 'MODEL.ROI_MASK_HEAD.CONV_DIM', 8, 'MODEL.ROI_MASK_HEAD.NUM_CONV', 1]
    size += ['MODEL.RPN.POST_NMS_TOPK_TEST', 60, 'MODEL.ROI_HEADS.NUM_CLASSES', CLASSES, 'MODEL.DEVICE', 'cpu']
    cfg.merge_from_list([*size, *map(str, options)])
    return cfg


SPREAD = {'objectness_logits': 1.0, 'anchor_deltas': 0.3, 'cls_score': 2.0, 'bbox_pred': 2.0}


def spread_out(model: torch.nn.Module, inputs: list, **wanted: float) -> None:
    """Draw the weights of the last layers so that their outputs lie around 0, and far apart."""

    def draw(apart: float, layer: torch.nn.Module, x: tuple[torch.Tensor]) -> None:
        if layer in done:  # a layer of several levels
            return
        done.add(layer)
        features = x[0].movedim(1, -1).flatten(0, -2)
        mean, now = features.mean(0), float((features - features.mean(0)).norm(dim=1).mean())
        torch.nn.init.normal_(layer.weight, std=apart / max(now, 1e-6))
        layer.bias.copy_(-layer.weight.reshape(*layer.weight.shape[:2], -1).sum(-1) @ mean)

    spread, done = SPREAD | wanted, set()
    parts = [(part, name.rpartition('.')[2]) for name, part in model.named_modules()]
    hooks = [part.register_forward_pre_hook(partial(draw, spread[name])) for part, name in parts if name in spread]
    model(inputs)
    for hook in hooks:
        hook.remove()


def with_weights(cfg, weights=None):
    """The model of a config with weights of another one, or with drawn ones, for which its scores differ."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if weights is None:
        spread_out(model, images())
    else:
        model.load_state_dict(weights, strict=True)
    return model


def images(*sizes: tuple[int, int]):
    torch.manual_seed(1)
    drawn = [torch.rand(3, *size) * 255 for size in sizes or [(96, 128), (64, 96)]]
    return [dict(image=image, height=2 * image.shape[1], width=2 * image.shape[2]) for image in drawn]


def assert_same(some: list, others: list) -> None:
    for one, other in zip(some, others, strict=True):
        one, other = one['instances'], other['instances']
        assert len(one) == len(other) and set(one.get_fields()) == set(other.get_fields())
        for name, value in one.get_fields().items():
            theirs = other.get(name)
            equal = torch.equal(value.tensor, theirs.tensor) if name == 'pred_boxes' else torch.equal(value, theirs)
            assert equal, name


@pytest.mark.parametrize('kind', HEADS)
@torch.no_grad()
def test_yacs_heads(kind):
    _, stock_name, name = HEADS[kind]
    thresholds = ['MODEL.ROI_HEADS.SCORE_THRESH_TEST', 0.01, 'MODEL.ROI_HEADS.NMS_THRESH_TEST', 0.3]
    stock = with_weights(small_config(kind, 'MODEL.ROI_HEADS.NAME', stock_name, *thresholds))
    weights = stock.state_dict()
    expected = stock(images())
    assert min(len(one['instances']) for one in expected) > 20

    def ours(*options):
        return with_weights(small_config(kind, 'MODEL.ROI_HEADS.NAME', name, *thresholds, *options), weights)

    on = ('MODEL.ROI_HEADS.SOFT_NMS_ENABLED', True)
    assert_same(ours()(images()), expected)
    assert_same(ours(*on, 'MODEL.ROI_HEADS.SOFT_NMS_METHOD', 'hard')(images()), expected)

    soft = ours(*on, 'MODEL.ROI_HEADS.SOFT_NMS_METHOD', 'linear', 'TEST.DETECTIONS_PER_IMAGE', -1)
    place = soft.roi_heads if kind == 'cascade' else soft.roi_heads.box_predictor
    assert describe(place.rule) == 'SoftNMS linear iou_threshold=0.3 min_score=0.001'
    prepared = soft.preprocess_image(images())
    detections = soft.inference(images(), do_postprocess=False)
    place.rule = NoSuppression()
    candidates = soft.inference(images(), do_postprocess=False)
    for found, raw, hard in zip(detections, candidates, expected, strict=True):
        keep, scores = SoftNMS('linear', 0.3)(raw.pred_boxes.tensor, raw.scores, raw.pred_classes, -1)
        assert torch.equal(found.scores, scores) and torch.equal(found.pred_classes, raw.pred_classes[keep])
        assert torch.equal(found.pred_boxes.tensor, raw.pred_boxes.tensor[keep])
        assert len(hard['instances']) < len(found) <= len(raw)
    # Masks are those of the boxes.
    masks = [one.pred_masks for one in detections]
    for one in detections:
        one.remove('pred_masks')
    again = soft.roi_heads.forward_with_given_boxes(soft.backbone(prepared.tensor), detections)
    assert all(torch.equal(mask, one.pred_masks) for mask, one in zip(masks, again, strict=True))


def drawn(rois: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (rois, 4 * columns), some beyond an image of 80 by 100, and scores."""
    torch.manual_seed(seed)
    corners = torch.rand(rois, columns, 2) * 80 - 5
    boxes = torch.cat([corners, corners + 5 + torch.rand(rois, columns, 2) * 40], -1).view(rois, 4 * columns)
    return boxes, torch.softmax(torch.randn(rois, CLASSES + 1) * 2, 1)


@pytest.mark.parametrize('topk', [-1, 0, 7, 100])
@pytest.mark.parametrize('columns', [1, CLASSES])
def test_hard_nms_is_detectron2s_own(columns, topk):
    raw = [drawn(rois, columns, rois) for rois in (60, 0, 25)]
    boxes, scores = map(list, zip(*raw, strict=True))
    shapes = [(80, 100)] * 3
    expected, rows = fast_rcnn_inference(boxes, scores, shapes, 0.05, 0.5, topk)
    found, kept = inference(boxes, scores, shapes, 0.05, HardNMS(0.5), topk)
    assert_same([dict(instances=one) for one in found], [dict(instances=one) for one in expected])
    assert all(map(torch.equal, kept, rows))
    assert [one.image_size for one in found] == shapes and (topk != 7 or len(found[0]) == 7)


@pytest.mark.parametrize('rule', RULES, ids=describe)
def test_every_rule_and_rows_that_are_not_finite(rule):
    boxes, scores = drawn(40, CLASSES)
    usable = torch.ones(40, dtype=torch.bool)
    for row, tensor, value in [(3, boxes, float('nan')), (17, scores, float('nan')), (30, boxes, float('inf'))]:
        tensor[row, 1] = value
        usable[row] = False
    with pytest.warns(RuntimeWarning, match='3 RoIs whose box or scores are not finite'):
        (found,), (rows,) = inference([boxes], [scores], [(80, 100)], 0.05, rule, 100)
    (expected,), (among,) = inference([boxes[usable]], [scores[usable]], [(80, 100)], 0.05, rule, 100)
    assert_same([dict(instances=found)], [dict(instances=expected)])
    assert torch.equal(rows, usable.nonzero()[:, 0][among])
    assert 0 < len(found) <= 100 and (isinstance(rule, NoSuppression) or bool((found.scores.diff() <= 0).all()))
    if rule.params.get('rule') is None:  # no voting: the boxes are those of the rows
        clipped = Boxes(boxes.view(-1, CLASSES, 4)[rows, found.pred_classes])
        clipped.clip((80, 100))
        assert torch.equal(found.pred_boxes.tensor, clipped.tensor)


@torch.no_grad()
def test_half_precision_on_a_cpu():
    torch.manual_seed(0)
    arguments = dict(
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)), num_classes=CLASSES, test_score_thresh=0.05
    )
    predictor = SoftNMSOutputLayers(ShapeSpec(channels=8), rule=SoftNMS(), **arguments)
    torch.nn.init.normal_(predictor.cls_score.weight, std=0.7)
    stock = FastRCNNOutputLayers(ShapeSpec(channels=8), **arguments)
    stock.load_state_dict(predictor.state_dict(), strict=True)
    proposals = [Instances((80, 100), proposal_boxes=Boxes(drawn(30, 1)[0]))]
    features = torch.randn(30, 8)
    (full,), _ = predictor.inference(predictor(features), proposals)
    halves = predictor.half()(features.half())
    (half,), _ = predictor.inference(halves, proposals)
    assert half.scores.dtype == torch.float16 and half.pred_boxes.tensor.dtype == torch.float32
    most = min(10, len(half), len(full))
    torch.testing.assert_close(half.scores[:most].float(), full.scores[:most], rtol=0.02, atol=0.01)
    with pytest.raises(RuntimeError):
        stock.half().inference(halves, proposals)


def small_lazy_config():
    cfg = model_zoo.get_config('COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py')
    model = cfg.model
    model.backbone.bottom_up.freeze_at = 0
    model.roi_heads.num_classes = CLASSES
    return cfg


def test_lazy_config_saved_reloaded_and_overridden(tmp_path):
    cfg = small_lazy_config()
    cfg.model.roi_heads.box_predictor._target_ = SoftNMSOutputLayers
    cfg.model.roi_heads.box_predictor.rule = LazyCall(SoftNMS)(method='linear', iou_threshold=0.3)
    LazyConfig.save(cfg, str(tmp_path / 'config.yaml'))
    again = LazyConfig.load(str(tmp_path / 'config.yaml'))
    assert isinstance(instantiate(again.model.roi_heads.box_predictor), SoftNMSOutputLayers)
    place = 'model.roi_heads.box_predictor.rule'
    again = LazyConfig.apply_overrides(again, [f'{place}.iou_threshold=0.4', f'{place}.min_score=0.01'])
    model = instantiate(again.model)
    stock = instantiate(small_lazy_config().model)
    model.load_state_dict(stock.state_dict(), strict=True)
    rule = model.roi_heads.box_predictor.rule
    assert describe(rule) == 'SoftNMS linear iou_threshold=0.4 min_score=0.01'

    # A rule as a dict, one inside another.
    again.model.roi_heads.box_predictor.rule = dict(type='VotedNMS', rule=dict(type='mmdet_softnms.SoftNMS', sigma=0.4))
    LazyConfig.save(again, str(tmp_path / 'config.yaml'))
    voted = instantiate(LazyConfig.load(str(tmp_path / 'config.yaml')).model.roi_heads.box_predictor).rule
    assert describe(voted) == describe(VotedNMS(SoftNMS(sigma=0.4)))


def test_lazy_cascade_takes_the_rule_at_its_heads():
    cfg = model_zoo.get_config('common/models/cascade_rcnn.py')
    cfg.model.roi_heads._target_ = SoftNMSCascadeROIHeads
    cfg.model.roi_heads.rule = dict(type='SoftNMS')
    heads = instantiate(cfg.model.roi_heads)
    assert type(heads) is SoftNMSCascadeROIHeads and describe(heads.rule) == describe(SoftNMS())


@torch.no_grad()
def test_heads_that_would_leave_the_rule_out_are_refused():
    cfg = small_config('cascade', 'MODEL.ROI_HEADS.SOFT_NMS_ENABLED', True)
    model = with_weights(cfg)
    predictor = model.roi_heads.box_predictor[-1] = SoftNMSOutputLayers(cfg, ShapeSpec(channels=16))
    with pytest.raises(RuntimeError, match='use SoftNMSCascadeROIHeads'):
        model(images())
    predictor.rule = None
    assert len(model(images())) == 2 and predictor.test_nms_thresh == 0.5


@pytest.mark.parametrize('name', ['retinanet', 'fcos'])
@torch.no_grad()
def test_one_stage(name):
    cfg = model_zoo.get_config(f'common/models/{name}.py').model
    cfg.num_classes, cfg.test_topk_candidates, cfg.test_score_thresh = CLASSES, 100, 0.05
    cfg.backbone.out_channels, cfg.head.conv_dims, cfg.head.norm = 16, [16], ''
    cfg.head.input_shape = [ShapeSpec(channels=16)] * 5
    if name == 'fcos':  # its last levels come from p5
        cfg.backbone.top_block.in_channels = 16
    inputs = images((160, 192), (128, 160))
    torch.manual_seed(1)
    stock = instantiate(cfg).eval()
    spread_out(stock, inputs, bbox_pred=0.3 if name == 'retinanet' else 2.0)  # of the anchor's size; of the stride
    expected = stock(inputs)
    assert min(len(one['instances']) for one in expected) > 5
    cfg._target_ = {'retinanet': SoftNMSRetinaNet, 'fcos': SoftNMSFCOS}[name]
    cfg.rule = dict(type='HardNMS', iou_threshold=cfg.get('test_nms_thresh', 0.5 if name == 'retinanet' else 0.6))
    model = instantiate(cfg).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    assert_same(model(inputs), expected)
    model.rule = None
    assert_same(model(inputs), expected)
    model.rule, model.max_detections_per_image = SoftNMS('linear', 0.3), -1

    def at_the_networks_scale():  # boxes are clipped when they are rescaled
        prepared = model.preprocess_image(inputs)
        features = model.backbone(prepared.tensor)
        features = [features[level] for level in model.head_in_features]
        return model.forward_inference(prepared, features, model.head(features))

    detections = at_the_networks_scale()
    model.rule = NoSuppression()
    for found, raw in zip(detections, at_the_networks_scale(), strict=True):
        keep, scores = SoftNMS('linear', 0.3)(raw.pred_boxes.tensor, raw.scores, raw.pred_classes, -1)
        assert torch.equal(found.scores, scores) and torch.equal(found.pred_classes, raw.pred_classes[keep])
        assert torch.equal(found.pred_boxes.tensor, raw.pred_boxes.tensor[keep])
        assert not torch.equal(found.scores, raw.scores[keep])
    model.max_detections_per_image = 0
    assert [len(found) for found in at_the_networks_scale()] == [0, 0]


@pytest.mark.parametrize(
    ('rule', 'error', 'message'),
    [
        (dict(type='SoftNms'), ValueError, 'one of SoftNMS, HardNMS, VotedNMS'),
        (dict(sigma=0.5), ValueError, 'got None'),
        (dict(type='MmcvNMS'), ValueError, 'one of SoftNMS'),
        (dict(type='SoftNMS', sigma=-1), ValueError, 'sigma'),
        (dict(type='SoftNMS', treshold=1), TypeError, 'treshold'),
        (SoftNMS, TypeError, 'must be a rule'),
        ('SoftNMS', TypeError, 'must be a rule'),
    ],
    ids=str,
)
def test_a_wrong_rule_is_refused(rule, error, message):
    with pytest.raises(error, match=message):
        build_rule(rule)


def test_what_else_is_refused():
    arguments = dict(num_classes=CLASSES, input_shape=ShapeSpec(channels=8))
    with pytest.raises(TypeError, match='rule'):  # no default
        SoftNMSOutputLayers(box2box_transform=Box2BoxTransform(weights=(1, 1, 1, 1)), **arguments)
    rotated = Box2BoxTransformRotated(weights=(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match='upright boxes'):
        SoftNMSOutputLayers(box2box_transform=rotated, rule=SoftNMS(), **arguments)
    cfg = small_config('mask', 'MODEL.ROI_HEADS.NAME', 'SoftNMSROIHeads')
    del cfg.MODEL.ROI_HEADS['SOFT_NMS_ENABLED']
    with pytest.raises(KeyError, match='call add_soft_nms_config'):
        build_model(cfg)
    with pytest.raises(ValueError, match='method must be one of'):
        build_model(
            small_config(
                'mask',
                *('MODEL.ROI_HEADS.NAME', 'SoftNMSROIHeads', 'MODEL.ROI_HEADS.SOFT_NMS_ENABLED', True),
                *('MODEL.ROI_HEADS.SOFT_NMS_METHOD', 'exponential'),
            )
        )


@torch.no_grad()
def test_test_time_augmentation_uses_the_rule_in_the_merge_only():
    options = ['MODEL.ROI_HEADS.SCORE_THRESH_TEST', 0.01, 'TEST.AUG.MIN_SIZES', '(64, 80)', 'TEST.AUG.FLIP', True]
    options += ['MODEL.ROI_HEADS.NAME', 'SoftNMSROIHeads', 'MODEL.ROI_HEADS.SOFT_NMS_ENABLED', True]
    hard = small_config('mask', *options, 'MODEL.ROI_HEADS.SOFT_NMS_METHOD', 'hard')
    soft = small_config('mask', *options)
    stock_model = with_weights(small_config('mask', 'MODEL.ROI_HEADS.SCORE_THRESH_TEST', 0.01))
    model = with_weights(soft, stock_model.state_dict())
    image = images((64, 96))
    expected = GeneralizedRCNNWithTTA(hard, stock_model)(image)
    assert_same(SoftNMSWithTTA(hard, model)(image), expected)
    found = SoftNMSWithTTA(soft, model)(image)
    assert describe(model.roi_heads.box_predictor.rule) == describe(SoftNMS())  # there again
    # The first view to the merge: raw scores of the highest detection, whose score no rule touches.
    assert found[0]['instances'].scores[0] == expected[0]['instances'].scores[0]
    assert len(found[0]['instances']) >= len(expected[0]['instances'])
    assert_same(SoftNMSWithTTA(hard, stock_model, rule=dict(type='SoftNMS'))(image), found)
    model.roi_heads.box_predictor.test_score_thresh = 1.0  # no view finds anything
    assert len(SoftNMSWithTTA(soft, model)(image)[0]['instances']) == 0


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    """docs/detectron2.md."""
    monkeypatch.chdir(tmp_path)
    Path('your_config.yaml').write_text('MODEL: {MASK_ON: True}\n')
    names: dict = {}
    marked = re.findall(r'<!-- run by: tests/test_detectron2.py.*?```python\n(.*?)```', PAGE.read_text(), re.S)
    for code in marked:
        exec(code, names)
    assert len(marked) == 2
    assert describe(instantiate(names['model'].roi_heads.box_predictor).rule) == describe(SoftNMS())
    heads = names['cfg'].MODEL.ROI_HEADS
    assert heads.SOFT_NMS_ENABLED and names['cfg'].MODEL.MASK_ON
    assert (heads.SOFT_NMS_METHOD, heads.SOFT_NMS_SIGMA, heads.SOFT_NMS_PRUNE) == ('gaussian', 0.5, 0.001)


def test_importing_it_imports_nothing_of_mmdet():
    code = (
        'import sys; sys.path.insert(0, "tests"); import detectron2_for_tests; detectron2_for_tests.find(); '
        'import mmdet_softnms.detectron2; '
        "print({name.split('.')[0] for name in sys.modules} & {'mmdet', 'mmcv', 'mmengine'})"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == 'set()', done.stderr
