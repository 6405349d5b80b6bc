"""Rules in mmrotate's detectors, beside their own NMS: zoo configs made small, random weights, two drawn images."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import mmrotate_for_tests

if WHY_NOT := mmrotate_for_tests.find():
    pytest.skip(WHY_NOT, allow_module_level=True)

from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData
from mmrotate.registry import MODELS
from mmrotate.utils import register_all_modules
from torch import nn

from mmdet_softnms.models.places import check_places
from mmdet_softnms.ops import rotated_soft_nms
from tests import rotated_walk

register_all_modules()
ZOO = {
    'Faster R-CNN': 'rotated_faster_rcnn/rotated-faster-rcnn-le90_r50_fpn_1x_dota',
    'Oriented R-CNN': 'oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota',
    'RoI Transformer': 'roi_trans/roi-trans-le90_r50_fpn_1x_dota',
    'RetinaNet': 'rotated_retinanet/rotated-retinanet-rbox-le90_r50_fpn_1x_dota',
    'FCOS': 'rotated_fcos/rotated-fcos-le90_r50_fpn_1x_dota',
    'ATSS': 'rotated_atss/rotated-atss-le90_r50_fpn_1x_dota',
    'S2A-Net': 's2anet/s2anet-le135_r50_fpn_1x_dota',
}
CONFIGS = sorted((Path(__file__).parents[1] / 'configs/rotated').glob('*.py'))
SIGMA = dict(method='gaussian', sigma=0.5, min_score=1e-3)
GAUSSIAN = dict(type='mmdet_softnms.RotatedSoftNMS', **SIGMA)
HARD = dict(type='mmdet_softnms.RotatedSoftNMS', method='hard', min_score=0.0)


def narrow(node: Any) -> None:
    """Fewer channels everywhere."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            narrow(value)
        elif isinstance(value, int) and value in (256, 1024) and not isinstance(value, bool):
            node[name] = 32
        elif name == 'num_groups':
            node[name] = 8


@functools.cache
def small_config(name: str) -> Config:
    """The zoo's config of a detector, narrow; a threshold at which random scores take part."""
    cfg = Config.fromfile(rotated_walk.ROOT / f'{ZOO[name]}.py')
    model = cfg.model
    model.backbone = ConfigDict(
        type='mmdet.ResNet', depth=18, base_channels=8, norm_eval=True, out_indices=(0, 1, 2, 3)
    )
    model.train_cfg = None
    for key in ('neck', 'rpn_head', 'roi_head', 'bbox_head', 'bbox_head_init', 'bbox_head_refine'):
        if key in model:
            narrow(model[key])
    model.neck.in_channels = [8, 16, 32, 64]
    if 'rpn' in model.test_cfg:
        model.test_cfg.rpn.max_per_img = 60
    else:
        model.test_cfg.nms_pre = 60
    return cfg


def with_rule(cfg: Config, nms: dict[str, Any]) -> Config:
    """The config with our head and a rule, as a user writes it."""
    cfg = copy.deepcopy(cfg)
    if 'roi_head' in cfg.model:
        head, kind = cfg.model.roi_head, 'mmdet_softnms.SoftNMSRoIHead'
    else:
        head = (cfg.model.get('bbox_head_refine') or [cfg.model.get('bbox_head')])[-1]
        kind = 'mmdet_softnms.SoftNMSDenseHead'
    head.head, head.type = head.type, kind
    thresholds(cfg).nms = ConfigDict(nms)
    return cfg


def thresholds(cfg: Config) -> ConfigDict:
    return cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg)


def build(cfg: Config, like: nn.Module | None = None) -> nn.Module:
    """The detector in eval mode, seeded, or with the weights of another (all keys must match)."""
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    if like is not None:
        model.load_state_dict(like.state_dict(), strict=True)
        return model
    for name, module in model.named_modules():  # scores and boxes that differ, as in a trained network
        if 'head' in name and isinstance(module, (nn.Conv2d, nn.Linear)):
            # Boxes far outside of the image would be shifted onto those of another class by mmcv's batched_nms.
            spread = 0.1 if 'reg' in name else 1.0
            nn.init.normal_(module.weight, std=spread * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.constant_(module.bias, 1.0 if name.endswith('conv_reg') else 0.0)  # FCOS: sides above 0
    return model


@torch.no_grad()
def predict(model: nn.Module) -> list[InstanceData]:
    """Detections on two images, in original scale: twice that of the network."""
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for number in range(2):
        inputs.append((torch.rand(3, 128, 160, generator=generator) * 255).byte())
        meta = dict(img_id=number, ori_shape=(256, 320), img_shape=(128, 160), scale_factor=(0.5, 0.5))
        samples.append(DetDataSample(metainfo=meta))
    return [result.pred_instances for result in model.test_step(dict(inputs=inputs, data_samples=samples))]


def rows(found: InstanceData) -> torch.Tensor:
    """Detections as rows, in an order that equal scores do not change."""
    table = torch.cat([-found.scores[:, None], found.labels[:, None].float(), found.bboxes], 1)
    return torch.tensor(sorted(map(tuple, table.tolist())))


@pytest.mark.parametrize('name', ZOO)
def test_hard_is_mmrotates_own_and_soft_is_the_rule_on_its_candidates(name):
    cfg = small_config(name)
    stock = build(cfg)
    expected = predict(stock)
    check_places(with_rule(cfg, GAUSSIAN))
    threshold = thresholds(cfg).nms.iou_threshold
    hard = predict(build(with_rule(cfg, dict(HARD, iou_threshold=threshold)), like=stock))
    raw = predict(build(with_rule(cfg, dict(type='mmdet_softnms.NoSuppression')), like=stock))
    soft = predict(build(with_rule(cfg, GAUSSIAN), like=stock))
    for own, ours, candidates, decayed in zip(expected, hard, raw, soft, strict=True):
        assert own.bboxes.shape[1] == 5 and len(own) > 10 and len(candidates) > len(own)
        assert torch.equal(rows(ours), rows(own))
        # Not beside mmcv's IoU, which is rounded otherwise: random weights give many boxes that are nearly the same.
        # tests/test_ops/test_rotated.py holds the operator to the loop over it.
        keep, scores = rotated_soft_nms(
            candidates.bboxes, candidates.scores, candidates.labels, max_num=thresholds(cfg).max_per_img, **SIGMA
        )
        assert torch.equal(candidates.bboxes[keep], decayed.bboxes)
        assert torch.equal(candidates.labels[keep], decayed.labels)
        assert torch.equal(scores, decayed.scores)
        assert not torch.equal(decayed.scores[: len(own)], own.scores[: len(decayed)])


@pytest.mark.parametrize('name', ['Faster R-CNN', 'RetinaNet'])
def test_rules_of_the_other_kind_of_boxes_are_refused_when_the_head_is_built(name):
    with pytest.raises(ValueError, match="SoftNMS takes axis-aligned .* write type='mmdet_softnms.RotatedSoftNMS'"):
        build(with_rule(small_config(name), dict(type='mmdet_softnms.SoftNMS')))


def test_a_detector_that_refines_names_its_last_head():
    cfg = copy.deepcopy(small_config('S2A-Net'))
    cfg.model.test_cfg.nms = ConfigDict(GAUSSIAN)
    with pytest.raises(ValueError, match="head='mmrotate.S2ARefineHead', ...\\) as the last of bbox_head_refine"):
        check_places(cfg)


def test_our_configs_are_the_zoos_with_a_rule():
    for path in CONFIGS:
        cfg = Config.fromfile(path)
        check_places(cfg)
        rule = MODELS.build(cfg.model).roi_head._rule
        assert rule.params['method'] == ('linear' if 'linear' in path.stem else 'gaussian')
        assert rule.params['min_score'] == cfg.model.test_cfg.rcnn.score_thr == 1e-3


def test_every_config_of_the_zoo_takes_rules_or_says_why_not():
    found = [one for path in rotated_walk.configs() if (one := rotated_walk.verdict(path)) is not None]
    refused = {head for head, reason in found if reason and 'cannot be read' not in reason}
    assert len(found) > 50 and refused == {'GVRatioRoIHead'}
    assert sum(not reason for _, reason in found) > 40
