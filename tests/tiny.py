"""Tiny, randomly initialised detectors of mmdet's own architectures, for tests that need a model but no accuracy."""

import copy
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from torch import nn

BASES = {
    'SoftNMSRoIHead': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'SoftNMSCascadeRoIHead': 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'SoftNMSDoubleHeadRoIHead': 'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    'mask': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
}
WIDTH = 8  # channels of the first ResNet-18 stage


def tiny_config(base: str, num_classes: int = 5, score_thr: float = 0.01) -> Config:
    """One of mmdet's configs with a narrow ResNet-18, a narrow FPN and few proposals.

    A low ``score_thr`` makes sure that random weights give candidates to suppress.
    """
    cfg = get_config(BASES.get(base, base))
    cfg.model.backbone = dict(type='ResNet', depth=18, base_channels=WIDTH, norm_eval=True, out_indices=(0, 1, 2, 3))
    cfg.model.neck.update(in_channels=[WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH], out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.test_cfg.rpn.max_per_img = 60
    cfg.model.test_cfg.rcnn.score_thr = score_thr
    roi_head = cfg.model.roi_head
    roi_head.bbox_roi_extractor.out_channels = 16
    for head in roi_head.bbox_head if isinstance(roi_head.bbox_head, list) else [roi_head.bbox_head]:
        head.update(in_channels=16, fc_out_channels=32, num_classes=num_classes)
        if 'conv_out_channels' in head:  # Double-Head
            head.conv_out_channels = 32
    for part in ('semantic_head', 'glbctx_head'):  # SCNet
        if roi_head.get(part):
            roi_head[part].update(in_channels=16, conv_out_channels=16)
    if roi_head.get('semantic_roi_extractor'):
        roi_head.semantic_roi_extractor.out_channels = 16
    if roi_head.get('feat_relay_head'):
        roi_head.feat_relay_head.update(in_channels=32, out_conv_channels=16)
    if roi_head.get('mask_head'):
        roi_head.mask_roi_extractor.out_channels = 16
        roi_head.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=num_classes)
    return cfg


def tiny_rfcn_model(pooling: str = 'caffe', ohem: int | None = 24) -> ConfigDict:
    """The authors' R-FCN with a narrow ResNet-18, 3 bins, 5 classes, and stride 8 for small images."""
    model = Config.fromfile(Path(__file__).parents[1] / 'configs/_base_/rfcn_r50-caffe.py').model
    model.backbone.update(
        depth=18,
        base_channels=WIDTH,
        init_cfg=None,
        frozen_stages=-1,
        strides=(1, 2, 1, 1),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        zero_init_residual=False,
    )
    model.rpn_head.update(in_channels=4 * WIDTH, feat_channels=32)
    model.rpn_head.anchor_generator.update(scales=[2, 4, 8], strides=[8])
    model.roi_head.bbox_head.update(
        in_channels=8 * WIDTH,
        reduced_channels=32,
        num_classes=5,
        output_size=3,
        stride=8,
        pooling=pooling,
        ohem=ohem,
    )
    model.train_cfg.rpn_proposal.update(max_per_img=60)
    model.test_cfg.rpn.update(max_per_img=60)
    model.test_cfg.rcnn.score_thr = 0.01
    return model


def plugged(cfg: Config, roi_head: str, nms: dict[str, Any]) -> Config:
    """The config with one of our RoI heads and a rule, the way a user's config says it."""
    cfg = Config(cfg.to_dict())
    cfg.model.roi_head.type = f'mmdet_softnms.{roi_head}'
    cfg.model.test_cfg.rcnn.nms = nms
    return cfg


def build(cfg: Config, like: nn.Module | None = None) -> nn.Module:
    """Build the detector in eval mode, seeded, or with the weights of another (all keys must match)."""
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()  # building writes into the config
    if like is not None:
        model.load_state_dict(like.state_dict(), strict=True)
    else:
        _spread_classes(model)
    return model


def _spread_classes(model: nn.Module) -> None:
    """Random heads predict much the same for every RoI; make scores and boxes differ as in a trained one."""
    for name, parameter in model.named_parameters():
        if name.endswith(('fc_cls.weight', 'fc_reg.weight', '.cls_maps.weight')):
            nn.init.normal_(parameter, std=0.5 if 'cls' in name else 0.05)


@torch.no_grad()
def predict(model: nn.Module) -> list[DetDataSample]:
    """Detections on two noise images whose original scale is twice the network's."""
    images, samples = _batch()
    return model.predict(images, samples, rescale=True)


@torch.no_grad()
def predict_raw(model: nn.Module) -> list[InstanceData]:
    """Raw boxes (R, 4K) or (R, 4) and scores (R, K+1) on the same images, by mmdet's own contract."""
    images, samples = _batch()
    features = model.extract_feat(images)
    proposals = model.rpn_head.predict(features, samples, rescale=False)
    metas = [sample.metainfo for sample in samples]
    return model.roi_head.predict_bbox(features, metas, proposals, rcnn_test_cfg=None, rescale=True)


def _batch(size: tuple[int, int] = (96, 128)) -> tuple[torch.Tensor, list[DetDataSample]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, *size, generator=generator) * 4 - 2
    shapes = dict(img_shape=size, pad_shape=size, batch_input_shape=size, ori_shape=(2 * size[0], 2 * size[1]))
    return images, [
        DetDataSample(metainfo=dict(img_id=i, scale_factor=(0.5, 0.5), **shapes)) for i in range(len(images))
    ]
