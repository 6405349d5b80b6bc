"""mmdet's dense detectors by their own zoo configs, shrunk: random weights, a narrow backbone, two drawn images."""

import copy
import functools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.structures import InstanceData
from torch import nn

#: A zoo config for every head that takes rules.
ZOO = {
    'RetinaHead': 'retinanet/retinanet_r50_fpn_1x_coco',
    'FCOSHead': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'ATSSHead': 'atss/atss_r50_fpn_1x_coco',
    'GFLHead': 'gfl/gfl_r50_fpn_1x_coco',
    'LDHead': 'ld/ld_r18-gflv1-r101_fpn_1x_coco',
    'VFNetHead': 'vfnet/vfnet_r50_fpn_1x_coco',
    'TOODHead': 'tood/tood_r50_fpn_1x_coco',
    'DDODHead': 'ddod/ddod_r50_fpn_1x_coco',
    'FSAFHead': 'fsaf/fsaf_r50_fpn_1x_coco',
    'FreeAnchorRetinaHead': 'free_anchor/freeanchor_r50_fpn_1x_coco',
    'PISARetinaHead': 'pisa/retinanet-r50_fpn_pisa_1x_coco',
    'RetinaSepBNHead': 'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco',
    'NASFCOSHead': 'nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco',
    'AutoAssignHead': 'autoassign/autoassign_r50-caffe_fpn_1x_coco',
    'FoveaHead': 'foveabox/fovea_r50_fpn_4xb4-1x_coco',
    'RepPointsHead': 'reppoints/reppoints-moment_r50_fpn_1x_coco',
    'SABLRetinaHead': 'sabl/sabl-retinanet_r50_fpn_1x_coco',
    'YOLOFHead': 'yolof/yolof_r50-c5_8xb8-1x_coco',
    'YOLOXHead': 'yolox/yolox_tiny_8xb8-300e_coco',
    'YOLOV3Head': 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco',
    'SSDHead': 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco',
    'PISASSDHead': 'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco',  # its own is a whole VGG16
    'RTMDetSepBNHead': 'rtmdet/rtmdet_tiny_8xb32-300e_coco',
    'RTMDetInsSepBNHead': 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco',
    'CondInstBboxHead': 'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance',
    'BoxInstBboxHead': 'boxinst/boxinst_r50_fpn_ms-90k_coco',
    'CenterNetUpdateHead': 'centernet/centernet-update_r18_fpn_8xb8-amp-lsj-200e_coco',
    'CornerHead': 'cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco',
}
WIDTH = 8  # channels of the first ResNet-18 stage
#: Of an image's longer side in the network, where the last level has to be large enough for a kernel.
SIZES = {'DDODHead': 320}
DEMO = Path(__file__).parents[1] / 'data/demo/VOC2007/JPEGImages'


def zoo_config(head: str, num_classes: int = 6) -> Config:
    """The zoo's config for a head, narrow."""
    cfg = get_config(f'mmdet::{ZOO[head]}.py')
    model = cfg.model
    model.pop('teacher_config', None)
    if head == 'PISASSDHead':
        model.bbox_head.type = head
    if model.type == 'KnowledgeDistillationSingleStageDetector':
        model.type = 'GFL'
        for name in ('teacher_ckpt', 'output_feature', 'eval_teacher'):
            model.pop(name, None)
    for part in (model.backbone, model.get('neck'), model.bbox_head):
        if part:
            part.pop('init_cfg', None)
    backbone, neck = model.backbone, model.get('neck') or {}
    if backbone.type == 'ResNet':
        out = backbone.get('out_indices', (0, 1, 2, 3))
        model.backbone = ConfigDict(type='ResNet', depth=18, base_channels=WIDTH, norm_eval=True, out_indices=out)
        widths = [WIDTH * 2**number for number in out]
        neck['in_channels'] = widths if isinstance(neck['in_channels'], list) else widths[-1]
        for name in ('out_channels', 'mid_channels', 'block_mid_channels'):
            if name in neck:
                neck[name] = 32
        neck.pop('add_extra_convs', None) if neck['type'] == 'NASFPN' else None
        narrow(model.bbox_head)
    elif backbone.type == 'HourglassNet':
        backbone.update(stage_channels=[16] * 6, stage_blocks=[1] * 6, feat_channel=16)
        model.bbox_head.in_channels = 16
    if model.bbox_head.type == 'YOLOXHead':
        model.test_cfg.nms.iou_threshold = 0.1  # random boxes are small
    model.bbox_head.num_classes = num_classes
    if 'mask_head' in model:
        narrow(model.mask_head)
    if 'mask_feature_head' in model.get('mask_head', {}):
        model.mask_head.mask_feature_head.update(in_channels=32, feat_channels=32)
    return cfg


def narrow(head: ConfigDict) -> None:
    """256 or 512 channels become 32."""
    for name, value in head.items():
        if value in (256, 512) and isinstance(value, int):
            head[name] = 32
        if isinstance(value, dict) and value.get('num_groups') == 32:
            value['num_groups'] = 8


def with_head(cfg: Config, nms: dict[str, Any], **thresholds: Any) -> Config:
    """The config with our head and a rule, as a user writes it."""
    cfg = copy.deepcopy(cfg)
    head = cfg.model.bbox_head
    head.head, head.type = head.type, 'mmdet_softnms.SoftNMSDenseHead'
    cfg.model.test_cfg.nms = ConfigDict(nms)
    cfg.model.test_cfg.update(thresholds)
    return cfg


def build(cfg: Config, like: nn.Module | None = None) -> nn.Module:
    """The detector in eval mode, seeded, or with the weights of another (all keys must match)."""
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    if like is not None:
        model.load_state_dict(like.state_dict(), strict=True)
        return model
    # Initial weights predict much the same everywhere; make scores and boxes differ as in a trained network.
    for name, module in model.bbox_head.named_modules():
        if isinstance(module, nn.Conv2d):
            # YOLOX takes the exponential; RTMDet's scores would be 1, and equal ones come in any order.
            spread = 0.2 if 'multi_level_conv_reg' in name else 0.05 if 'rtm_cls' in name else 1.0
            nn.init.normal_(module.weight, std=spread * module.weight[0].numel() ** -0.5)
            if module.bias is not None:  # CondInst takes no box whose sides are negative
                nn.init.constant_(module.bias, 1.0 if 'conv_reg' in name else 0.0)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:  # statistics of two images instead of mean 0 and variance 1
        module.train()
        module.momentum = 1.0
    predict(model)
    return model.eval()


@functools.cache
def _drawn() -> list[np.ndarray]:
    return [cv2.imread(str(path)) for path in sorted(DEMO.glob('*.jpg'))[:2]]


@torch.no_grad()
def predict(model: nn.Module, images: list[np.ndarray] | None = None) -> list[InstanceData]:
    """Detections on two drawn images, in original scale: twice that of the network."""
    images = images or _drawn()
    inputs, samples = [], []
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        factor = SIZES.get(type(model.bbox_head).__name__.removeprefix('SoftNMS'), 160) / max(height, width)
        small = cv2.resize(image, (round(width * factor), round(height * factor)))
        inputs.append(torch.from_numpy(small.transpose(2, 0, 1).copy()))
        meta = dict(img_id=number, ori_shape=(height, width), img_shape=small.shape[:2])
        meta |= dict(scale_factor=(small.shape[1] / width, small.shape[0] / height), border=(0, 0, 0, 0))
        samples.append(DetDataSample(metainfo=meta))
    results = model.test_step(dict(inputs=inputs, data_samples=samples))
    return [result.pred_instances for result in results]
