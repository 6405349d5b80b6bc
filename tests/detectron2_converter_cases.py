"""The converter of Detectron2's zoo files: Detectron2's network beside mmdet's with the weights converted.

Small models with drawn weights and batch norms, saved as the zoo saves them. Each planted mistake has to be noticed.
"""

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch

from tests import detectron2_for_tests

if WHY_NOT := detectron2_for_tests.find():
    pytest.skip(WHY_NOT, allow_module_level=True)

from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_softnms.checkpoint import check_weights
from tests.detectron2_cases import spread_out

ROOT = Path(__file__).parents[1]
CLASSES = 3
SIZE = (128, 160)
KINDS = {  # Detectron2's config, and ours in configs/detectron2
    'faster': ('COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml', 'd2_faster-rcnn_r50_fpn_1x_coco.py'),
    'faster R101': ('COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml', 'd2_faster-rcnn_r101_fpn_3x_coco.py'),
    'C4': ('COCO-Detection/faster_rcnn_R_50_C4_1x.yaml', 'd2_faster-rcnn_r50-c4_1x_coco.py'),
    'mask': ('COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml', 'd2_mask-rcnn_r50_fpn_1x_coco.py'),
    'cascade': ('Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml', 'd2_cascade-mask-rcnn_r50_fpn_1x_coco.py'),
    'retinanet': ('COCO-Detection/retinanet_R_50_FPN_1x.yaml', 'd2_retinanet_r50_fpn_1x_coco.py'),
}


@pytest.fixture(scope='module', autouse=True)
def converter():
    path = ROOT / 'tools/model_converters/detectron2_to_mmdet.py'
    spec = importlib.util.spec_from_file_location('detectron2_to_mmdet', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register_all_modules()
    return module


def small(kind):
    """Detectron2's model of a kind, small, with drawn weights. C4's res5 has one width in mmdet: not so small."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(KINDS[kind][0]))
    options = ['MODEL.DEVICE', 'cpu', 'MODEL.ROI_HEADS.NUM_CLASSES', CLASSES, 'MODEL.RETINANET.NUM_CLASSES', CLASSES]
    options += ['MODEL.RPN.POST_NMS_TOPK_TEST', 12 if kind == 'C4' else 80, 'MODEL.RETINANET.TOPK_CANDIDATES_TEST', 20]
    if kind == 'retinanet':
        options += ['MODEL.RETINANET.NMS_THRESH_TEST', 1.0, 'TEST.DETECTIONS_PER_IMAGE', 200]
    if kind != 'C4':
        options += ['MODEL.RESNETS.STEM_OUT_CHANNELS', 8, 'MODEL.RESNETS.RES2_OUT_CHANNELS', 32]
        options += ['MODEL.RESNETS.WIDTH_PER_GROUP', 8, 'MODEL.FPN.OUT_CHANNELS', 16, 'MODEL.ROI_BOX_HEAD.FC_DIM', 16]
        options += ['MODEL.ROI_MASK_HEAD.CONV_DIM', 16]
    cfg.merge_from_list(list(map(str, options)))
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for part in model.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.weight.uniform_(0.7, 1.3), part.bias.normal_(0, 0.1)
            part.running_mean.normal_(0, 0.1), part.running_var.uniform_(0.7, 1.3)
    # RetinaNet's features grow from level to level: scores of 1.0 would be ties.
    spread = dict(cls_score=0.3, bbox_pred=0.03) if kind == 'retinanet' else dict(bbox_pred=1)
    spread_out(model, [dict(image=picture(), height=SIZE[0], width=SIZE[1])], **spread)
    return model


def picture():
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5)) * 255


def same_in_mmdet(kind, checkpoint):
    """mmdet's model of our config, made as small, with the weights of a file."""
    cfg = Config.fromfile(ROOT / 'configs/detectron2' / KINDS[kind][1])
    model = cfg.model
    if kind != 'C4':
        model.backbone.base_channels = 8
        model.neck.update(in_channels=[32, 64, 128, 256], out_channels=16)
    if kind == 'retinanet':  # whose boxes are clipped before suppression here and after it there: nothing suppressed
        model.test_cfg.update(nms_pre=20, nms=dict(type='nms', iou_threshold=1.0), max_per_img=200)
        model.bbox_head.update(in_channels=16, feat_channels=16, num_classes=CLASSES)
    else:
        model.test_cfg.rpn.max_per_img = 12 if kind == 'C4' else 80
        if kind != 'C4':
            model.rpn_head.update(in_channels=16, feat_channels=16)
            model.roi_head.bbox_roi_extractor.out_channels = 16
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.num_classes = CLASSES
            if kind != 'C4':
                head.update(in_channels=16, fc_out_channels=16)
        if 'mask_head' in model.roi_head:
            model.roi_head.mask_roi_extractor.out_channels = 16
            model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=CLASSES)
    built = MODELS.build(model).eval()
    check_weights(built, checkpoint)
    built.load_state_dict(torch.load(checkpoint)['state_dict'], strict=True)
    return built


@pytest.fixture(scope='module')
def pairs(converter, tmp_path_factory):
    """``pairs(kind)``: Detectron2's model, and mmdet's with its weights by way of a file of the zoo's form."""
    made = {}

    def pair(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp('zoo')
            with torch.no_grad():
                model = small(kind)
            arrays = {name: value.numpy() for name, value in model.state_dict().items()}
            content = dict(model=arrays, __author__='Detectron2 Model Zoo')
            (folder / 'model.pkl').write_bytes(pickle.dumps(content, 2))
            converter.main([str(folder / 'model.pkl'), str(folder / 'model.pth')])
            made[kind] = model, same_in_mmdet(kind, folder / 'model.pth')
        return made[kind]

    return pair


def far_apart(ours, theirs, atol):
    """Whether two tensors differ by more, in shape or value."""
    return ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=atol)


@torch.no_grad()
def differences(theirs, ours):
    """What differs: names of features, proposals, stages, detections."""
    found = []
    image = picture()
    sample = DetDataSample(metainfo=dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, scale_factor=(1.0, 1.0)))
    data = ours.data_preprocessor(dict(inputs=[image], data_samples=[sample]))
    prepared = theirs.preprocess_image([dict(image=image)])
    expected = theirs.backbone(prepared.tensor)
    levels = ours.extract_feat(data['inputs'])
    found += [f'feature {name}' for a, (name, b) in zip(levels, expected.items(), strict=True) if far_apart(a, b, 1e-4)]
    if hasattr(theirs, 'proposal_generator'):
        proposals = theirs.proposal_generator(prepared, expected)[0][0]
        mine = ours.rpn_head.predict(levels, data['data_samples'], rescale=False)[0]
        if far_apart(mine.bboxes, proposals.proposal_boxes.tensor, 1e-2):
            found.append('proposals')
        found += stages(theirs, ours, expected, levels)
    if not hasattr(ours, 'roi_head') or not isinstance(ours.roi_head.bbox_head, torch.nn.ModuleList):
        live = theirs([dict(image=image, height=SIZE[0], width=SIZE[1])]) if found == [] else None
        mine = ours.test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_instances
        if live is not None:
            live = live[0]['instances']
            assert len(live) > 5
            differ = far_apart(mine.scores, live.scores, 1e-4) or far_apart(mine.bboxes, live.pred_boxes.tensor, 1e-2)
            found += ['detections'] if differ or not torch.equal(mine.labels, live.pred_classes) else []
            if not found and live.has('pred_masks') and (mine.masks != live.pred_masks).float().mean() > 1e-3:
                found.append('masks')
    return found


def stages(theirs, ours, expected, levels):
    """What differs in what each stage makes of the same RoIs."""
    corners = torch.rand(20, 2, generator=torch.Generator().manual_seed(2)) * 80
    boxes = torch.cat([corners, corners + 8 + corners.flip(1)], 1)
    heads, rois = theirs.roi_heads, torch.cat([torch.zeros(20, 1), boxes], 1)
    if not isinstance(ours.roi_head.bbox_head, torch.nn.ModuleList):
        return []
    found = []
    for stage, head in enumerate(ours.roi_head.bbox_head):
        proposals = [Instances(SIZE, proposal_boxes=Boxes(boxes))]
        predictions = heads._run_stage([expected[name] for name in heads.box_in_features], proposals, stage)
        decoded = heads.box_predictor[stage].predict_boxes(predictions, proposals)[0]
        mine = ours.roi_head._bbox_forward(stage, levels, rois)
        differ = far_apart(mine['cls_score'], predictions[0], 1e-4)
        if differ or far_apart(head.bbox_coder.decode(rois[:, 1:], mine['bbox_pred']), decoded, 1e-3):
            found.append(f'stage {stage}')
    features = torch.randn(4, 16, 14, 14, generator=torch.Generator().manual_seed(3))
    mask_head = ours.roi_head.mask_head[-1]
    for other in ours.roi_head.mask_head:
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), mask_head.parameters(), strict=True))
    return found + ['masks'] * far_apart(mask_head(features), heads.mask_head.layers(features), 1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_the_converted_model_is_the_same(pairs, kind):
    theirs, ours = pairs(kind)
    assert differences(theirs, ours) == []


def rgb(state):
    state['backbone.conv1.weight'] = state['backbone.conv1.weight'].flip(1)


def no_statistics(state):
    state['backbone.layer3.1.bn2.running_mean'] = torch.zeros_like(state['backbone.layer3.1.bn2.running_mean'])


def swapped_statistics(state):
    names = 'backbone.layer1.0.downsample.1.weight', 'backbone.layer1.0.downsample.1.running_var'
    state[names[0]], state[names[1]] = state[names[1]], state[names[0]]


def swapped_levels(state):
    for kind in ('weight', 'bias'):
        names = f'neck.fpn_convs.0.conv.{kind}', f'neck.fpn_convs.1.conv.{kind}'
        state[names[0]], state[names[1]] = state[names[1]], state[names[0]]


def heights_first(state):
    name = 'roi_head.bbox_head.shared_fcs.0.weight'
    state[name] = state[name].unflatten(1, (16, 7, 7)).movedim(1, 3).flatten(1)


def background_first(state):
    state['roi_head.bbox_head.fc_cls.weight'] = state['roi_head.bbox_head.fc_cls.weight'].roll(1, 0)


def y_before_x(state):
    name = 'roi_head.bbox_head.fc_reg.weight'
    state[name] = state[name].view(-1, 4, 16)[:, [1, 0, 3, 2]].flatten(0, 1)


def other_ratios(state):
    state['rpn_head.rpn_cls.weight'] = state['rpn_head.rpn_cls.weight'].flip(0)


def sizes_first(name):
    def plant(state):
        for kind in ('weight', 'bias'):
            value = state[f'{name}.{kind}']
            each = len(value) // 9 if 'retina' in name else len(value) // 15
            state[f'{name}.{kind}'] = value.view(3, -1, each, *value.shape[1:]).transpose(0, 1).flatten(0, 2)

    plant.__name__ = f'sizes_first {name}'
    return plant


def third_stage_as_it_was(state):
    factors = torch.tensor([30 * 0.033, 30 * 0.033, 15 * 0.067, 15 * 0.067])
    name = 'roi_head.bbox_head.2.fc_reg.weight'
    state[name] = state[name] * factors.repeat(len(state[name]) // 4)[:, None]


def no_relu(state):
    """By the config: mmdet's own."""


PLANTED = {
    'faster': [rgb, no_statistics, swapped_statistics, swapped_levels, heights_first, background_first, y_before_x,
               other_ratios],
    'C4': [sizes_first('rpn_head.rpn_cls'), sizes_first('rpn_head.rpn_reg')],
    'cascade': [third_stage_as_it_was],
    'retinanet': [sizes_first('bbox_head.retina_cls'), sizes_first('bbox_head.retina_reg'), no_relu],
}  # fmt: skip


@pytest.mark.parametrize(
    ('kind', 'plant'),
    [(kind, plant) for kind in PLANTED for plant in PLANTED[kind]],
    ids=lambda one: getattr(one, '__name__', one),
)
def test_a_planted_mistake_is_noticed(pairs, kind, plant):
    theirs, ours = pairs(kind)
    good = {name: value.clone() for name, value in ours.state_dict().items()}
    state = dict(good)
    plant(state)
    if plant is no_relu:
        ours.neck.relu_before_extra_convs = False
    try:
        ours.load_state_dict(state, strict=True)
        assert differences(theirs, ours)
    finally:
        ours.load_state_dict(good)
        if plant is no_relu:
            ours.neck.relu_before_extra_convs = True


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda w: w.pop('backbone.fpn_lateral3.bias'), 'backbone.fpn_lateral3.bias is missing'),
        (lambda w: w.update({'backbone.bottom_up.res3.0.conv2_offset.weight': torch.zeros(1)}), 'belong to no Faster'),
        (lambda w: w.pop('backbone.bottom_up.res2.0.shortcut.weight'), 'no ResNet with bottlenecks'),
        (lambda w: w.update({'backbone.bottom_up.stem.conv1.norm.bias': torch.zeros(3)}), 'its norm'),
        (lambda w: w.update({'backbone.bottom_up.res4.6.conv1.weight': torch.zeros(3)}), 'res4 has 7 blocks'),
        (lambda w: w.update({'backbone.bottom_up.res2.0.conv2.weight': torch.zeros(8, 2, 3, 3)}), 'ResNeXt'),
        (lambda w: w.update({'proposal_generator.rpn_head.objectness_logits.bias': torch.zeros(4)}), '4 channels'),
    ],
    ids=lambda one: one.replace(' ', '_') if isinstance(one, str) else '',
)
def test_another_network_is_refused(converter, pairs, change, words):
    weights = dict(pairs('faster')[0].state_dict())
    change(weights)
    with pytest.raises(converter.ConversionError, match=words):
        converter.convert(weights)
