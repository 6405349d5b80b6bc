"""The Caffe converter, against OpenCV's Caffe importer running the same random R-FCN, layer by layer.

The weights are those of no trained model, but every layer type of the published deploy.prototxt is there, with batch
norm that does something, and OpenCV reads the files with its own code.
"""

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_softnms import soft_nms
from tests.commands import run_tool

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/model_converters/rfcn_caffe_to_mmdet.py'
spec = importlib.util.spec_from_file_location('rfcn_caffe_to_mmdet', SCRIPT)
converter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(converter)

WIDTH, CLASSES, SCALES, RATIOS = 4, 3, (2, 4, 8), (0.5, 1, 2)
ANCHORS = len(SCALES) * len(RATIOS)
HEIGHT_WIDTH = (96, 128)


class Net:
    """A Caffe net: its prototxt, and random blobs."""

    def __init__(self, depth='50', seed=0):
        self.random = np.random.default_rng(seed)
        self.blobs = {}
        height, width = HEIGHT_WIDTH
        self.text = [
            f'input: "data" input_shape {{ dim: 1 dim: 3 dim: {height} dim: {width} }}',
            'input: "im_info" input_shape { dim: 1 dim: 3 }',
        ]
        self._backbone(depth)
        self._heads()

    def layer(self, kind, name, bottoms, top, parameters=''):
        bottoms = ' '.join(f'bottom: "{each}"' for each in ([bottoms] if isinstance(bottoms, str) else bottoms))
        self.text.append(f'layer {{ name: "{name}" type: "{kind}" {bottoms} top: "{top}" {parameters} }}')
        return top

    def conv(self, name, bottom, channels, out, kernel=1, bias=True, std=None, **extra):
        extra = ' '.join(f'{key}: {value}' for key, value in extra.items())
        std = std or (2 / (channels * kernel**2)) ** 0.5
        self.blobs[name] = [self.random.normal(0, std, (out, channels, kernel, kernel))]
        if bias:
            self.blobs[name].append(self.random.normal(0, 0.3, out))
        parameters = f'num_output: {out} kernel_size: {kernel} bias_term: {str(bias).lower()} {extra}'
        return self.layer('Convolution', name, bottom, name, f'convolution_param {{ {parameters} }}')

    def bn(self, suffix, top, channels):
        factor = self.random.uniform(0.2, 5)
        mean, var = self.random.normal(0, 0.3, channels), self.random.uniform(0.5, 2, channels)
        self.blobs[f'bn{suffix}'] = [mean * factor, var * factor, np.array([factor])]
        self.blobs[f'scale{suffix}'] = [self.random.uniform(0.5, 1.2, channels), self.random.normal(0, 0.3, channels)]
        self.layer('BatchNorm', f'bn{suffix}', top, top, 'batch_norm_param { use_global_stats: true }')
        self.layer('Scale', f'scale{suffix}', top, top, 'scale_param { bias_term: true }')

    def _backbone(self, depth):
        # ResNet-50's first convolution has a bias, ResNet-101's has none.
        top = self.conv('conv1', 'data', 3, WIDTH, 7, bias=depth == '50', std=0.02, pad=3, stride=2)
        self.bn('_conv1', top, WIDTH)
        self.layer('ReLU', 'conv1_relu', top, top)
        top = self.layer('Pooling', 'pool1', top, 'pool1', 'pooling_param { kernel_size: 3 stride: 2 pool: MAX }')
        channels = WIDTH
        for stage in range(4):
            planes = WIDTH * 2**stage
            for index, block in enumerate(converter.block_names(depth, stage)):
                name = f'{stage + 2}{block}'
                stride = 2 if index == 0 and stage in (1, 2) else 1  # res5 is dilated instead
                dilation = 2 if stage == 3 else 1
                shortcut = top
                if index == 0:
                    shortcut = self.conv(f'res{name}_branch1', top, channels, 4 * planes, bias=False, stride=stride)
                    self.bn(f'{name}_branch1', shortcut, 4 * planes)
                inner = self.conv(f'res{name}_branch2a', top, channels, planes, bias=False, stride=stride)
                self.bn(f'{name}_branch2a', inner, planes)
                self.layer('ReLU', f'{inner}_relu', inner, inner)
                inner = self.conv(
                    f'res{name}_branch2b', inner, planes, planes, 3, bias=False, pad=dilation, dilation=dilation
                )
                self.bn(f'{name}_branch2b', inner, planes)
                self.layer('ReLU', f'{inner}_relu', inner, inner)
                inner = self.conv(f'res{name}_branch2c', inner, planes, 4 * planes, bias=False, std=0.1 / planes**0.5)
                self.bn(f'{name}_branch2c', inner, 4 * planes)
                top = self.layer('Eltwise', f'res{name}', [shortcut, inner], f'res{name}')
                self.layer('ReLU', f'res{name}_relu', top, top)
                channels = 4 * planes
            if stage == 2:
                self.res4 = top
        self.res5 = top

    def _heads(self):
        rpn = self.conv('rpn_conv/3x3', self.res4, 16 * WIDTH, 16, 3, std=0.05, pad=1)
        self.layer('ReLU', 'rpn_relu/3x3', rpn, rpn)
        score = self.conv('rpn_cls_score', rpn, 16, 2 * ANCHORS, std=0.04)
        deltas = self.conv('rpn_bbox_pred', rpn, 16, 4 * ANCHORS, std=0.01)
        shape = 'reshape_param { shape { dim: 0 dim: %d dim: -1 dim: 0 } }'
        pairs = self.layer('Reshape', 'rpn_cls_score_reshape', score, 'rpn_cls_score_reshape', shape % 2)
        pairs = self.layer('Softmax', 'rpn_cls_prob', pairs, 'rpn_cls_prob')
        prob = self.layer('Reshape', 'rpn_cls_prob_reshape', pairs, 'rpn_cls_prob_reshape', shape % (2 * ANCHORS))
        anchors = ' '.join([f'ratio: {each}' for each in RATIOS] + [f'scale: {each}' for each in SCALES])
        self.layer(
            'Proposal',
            'proposal',
            [prob, deltas, 'im_info'],
            'rois',
            'proposal_param { feat_stride: 16 base_size: 16 min_size: 0 pre_nms_topn: 6000 post_nms_topn: 300 '
            f'nms_thresh: 0.7 {anchors} }}',
        )
        reduced = self.conv('conv_new_1', self.res5, 32 * WIDTH, 32, std=0.05)
        self.layer('ReLU', 'conv_new_1_relu', reduced, reduced)
        for name, out, pooled, vote in (
            ('rfcn_cls', CLASSES + 1, 'psroipooled_cls_rois', 'cls_score'),
            ('rfcn_bbox', 8, 'psroipooled_loc_rois', 'bbox_pred'),
        ):
            maps = self.conv(name, reduced, 32, out * 49, std=0.4 if name == 'rfcn_cls' else 0.02)
            parameters = f'psroi_pooling_param {{ spatial_scale: 0.0625 output_dim: {out} group_size: 7 }}'
            self.layer('PSROIPooling', pooled, [maps, 'rois'], pooled, parameters)
            self.layer('Pooling', vote, pooled, vote, 'pooling_param { pool: AVE kernel_size: 7 stride: 7 }')
        self.layer('Softmax', 'cls_prob', 'cls_score', 'cls_prob')

    def caffemodel(self):
        net = converter.caffe_message()(name=b'random')
        for name, arrays in self.blobs.items():
            layer = net.layer.add(name=name.encode(), type=b'?')
            for array in arrays:
                blob = layer.blobs.add(data=array.ravel().tolist())
                blob.shape.dim.extend(array.shape)
        return net

    def write(self, folder):
        (folder / 'deploy.prototxt').write_text('\n'.join(self.text))
        # OpenCV wants the type of a layer in both files.
        kinds = {}
        for line in self.text[2:]:
            words = line.split('"')
            kinds[words[1]] = words[3]
        net = self.caffemodel()
        for layer in net.layer:
            layer.type = kinds[layer.name.decode()].encode()
        (folder / 'random.caffemodel').write_bytes(net.SerializeToString())
        return folder / 'deploy.prototxt', folder / 'random.caffemodel'


def detector(depth, state):
    """The model of configs/rfcn at the width of the random net."""
    register_all_modules()
    model = Config.fromfile(ROOT / 'configs/_base_/rfcn_r50-caffe.py').model
    model.backbone.update(depth=int(depth), base_channels=WIDTH, init_cfg=None)
    model.rpn_head.update(in_channels=16 * WIDTH, feat_channels=16)
    model.rpn_head.anchor_generator.update(scales=list(SCALES), ratios=list(RATIOS))
    model.roi_head.bbox_head.update(in_channels=32 * WIDTH, reduced_channels=32, num_classes=CLASSES)
    model.test_cfg.rpn.min_bbox_size = -1  # OpenCV's layer has no minimum
    model = MODELS.build(model)
    model.load_state_dict(state, strict=True)
    model.eval()
    return model


@torch.no_grad()
def compare(depth, net, state, folder):
    """Both nets on one image; asserts that every layer, the proposals and the detections agree."""
    image = net.random.normal(0, 60, (1, 3, *HEIGHT_WIDTH)).astype(np.float32)
    opencv = cv2.dnn.readNetFromCaffe(*map(str, net.write(folder)))
    opencv.enableFusion(False)
    opencv.setInput(image, 'data')
    opencv.setInput(np.array([[*HEIGHT_WIDTH, 1]], dtype=np.float32), 'im_info')
    names = [
        'pool1', f'{net.res4}_relu', f'{net.res5}_relu', 'rpn_relu/3x3', 'rpn_cls_prob_reshape', 'rpn_bbox_pred',
        'proposal', 'conv_new_1_relu', 'rfcn_cls', 'rfcn_bbox', 'cls_prob', 'bbox_pred',
    ]  # fmt: skip
    theirs = {name: torch.from_numpy(value) for name, value in zip(names, opencv.forward(names), strict=True)}

    model = detector(depth, state)
    seen = {}
    head = model.roi_head.bbox_head
    for name, module in (
        ('pool1', model.backbone.maxpool), ('rpn_cls', model.rpn_head.rpn_cls), ('rpn_reg', model.rpn_head.rpn_reg),
        ('reduce', head.reduce), ('cls_maps', head.cls_maps), ('reg_maps', head.reg_maps),
    ):  # fmt: skip
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    features = model.extract_feat(torch.from_numpy(image))
    meta = dict(img_shape=HEIGHT_WIDTH, scale_factor=(1.0, 1.0))
    proposals = model.rpn_head.predict_by_feat(
        *model.rpn_head(features), batch_img_metas=[meta], cfg=model.rpn_head.test_cfg
    )
    raw = model.roi_head.predict_bbox(features, [meta], proposals, None)[0]

    def same(ours, their, name):
        scale = float(their.abs().max())
        assert scale > 1e-2, f'{name} says nothing'
        torch.testing.assert_close(ours, their, rtol=0, atol=2e-5 * scale, msg=lambda text: f'{name}: {text}')

    same(seen['pool1'], theirs['pool1'], 'pool1')
    same(features[0], theirs[f'{net.res4}_relu'], 'res4')
    same(features[1], theirs[f'{net.res5}_relu'], 'res5')
    same(seen['rpn_cls'].sigmoid(), theirs['rpn_cls_prob_reshape'][:, ANCHORS:], 'objectness')
    same(seen['rpn_reg'], theirs['rpn_bbox_pred'], 'rpn deltas')
    same(seen['reduce'].relu(), theirs['conv_new_1_relu'], 'reduction')
    same(seen['cls_maps'].roll(49, dims=1), theirs['rfcn_cls'], 'score maps')
    stds = torch.tensor(converter.BOX_STDS).repeat_interleave(49)[:, None, None]
    same(seen['reg_maps'] * stds, theirs['rfcn_bbox'][:, 4 * 49 :], 'box maps')

    rois = theirs['proposal'][:, 1:]
    # The layer pads to 300 rows with zeros, which an anchor that was clipped to the corner pixel looks like, too.
    real, ours_real = rois.any(dim=1), proposals[0].bboxes.any(dim=1)
    rois = rois[real]
    assert 50 <= len(rois) < 300
    torch.testing.assert_close(proposals[0].bboxes[ours_real], rois, rtol=0, atol=2e-3)
    raw = raw[ours_real]
    probabilities = theirs['cls_prob'].flatten(1)[real]
    same(raw.scores.roll(1, dims=1), probabilities, 'class probabilities')
    deltas = theirs['bbox_pred'].flatten(1)[real][:, 4:].numpy()

    # py-faster-rcnn's bbox_transform_inv and clip_boxes, on OpenCV's numbers.
    boxes = rois.numpy()
    sizes = boxes[:, 2:] - boxes[:, :2] + 1
    centres = boxes[:, :2] + 0.5 * sizes + deltas[:, :2] * sizes
    half = 0.5 * np.exp(deltas[:, 2:]) * sizes
    limit = np.array(HEIGHT_WIDTH[::-1]) - 1
    decoded = torch.from_numpy(
        np.concatenate([np.clip(centres - half, 0, limit), np.clip(centres + half, 0, limit)], axis=1)
    ).float()
    torch.testing.assert_close(raw.bboxes, decoded, rtol=0, atol=5e-3)

    # Detections: every class on its own, the Soft-NMS authors' areas.
    def detections(boxes, scores):
        boxes, labels = boxes.repeat_interleave(CLASSES, 0), torch.arange(CLASSES).repeat(len(boxes))
        keep, scores = soft_nms(boxes, scores.flatten(), labels, sigma=0.5, max_num=50, offset=1)
        return boxes[keep], scores, labels[keep]

    ours, their = detections(raw.bboxes, raw.scores[:, :-1]), detections(decoded, probabilities[:, 1:].contiguous())
    torch.testing.assert_close(ours[0], their[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(ours[1], their[1], rtol=0, atol=1e-4)
    assert ours[2].equal(their[2])


@pytest.mark.parametrize('depth', ['50', '101'])
def test_equals_opencvs_caffe_importer_layer_by_layer(depth, tmp_path):
    net = Net(depth)
    _, caffemodel = net.write(tmp_path)
    checkpoint = tmp_path / 'converted.pth'
    result = _run(caffemodel, checkpoint)
    assert result.returncode == 0, result.stderr
    assert f'ResNet-{depth}, {CLASSES} classes, {ANCHORS} anchors' in result.stdout
    compare(depth, net, torch.load(checkpoint, weights_only=True)['state_dict'], tmp_path)


@pytest.mark.parametrize(
    'broken', ['cls background first', 'rpn background minus object', 'background boxes', 'batch norm sums', 'stds']
)
def test_the_comparison_notices(broken, tmp_path, monkeypatch):
    """Each swap that a converter could get wrong makes the comparison fail."""
    net = Net()
    blobs = {name: [np.asarray(each, dtype=np.float32) for each in arrays] for name, arrays in net.blobs.items()}
    if broken == 'cls background first':
        monkeypatch.setattr(converter, '_background_last', lambda maps: maps)
    elif broken == 'rpn background minus object':
        original = converter._object_minus_background
        monkeypatch.setattr(converter, '_object_minus_background', lambda pairs: -original(pairs))
    elif broken == 'background boxes':
        blobs['rfcn_bbox'] = [np.roll(each, 4 * 49, axis=0) for each in blobs['rfcn_bbox']]
    elif broken == 'batch norm sums':
        blobs['bn4a_branch1'][2] = np.ones(1, dtype=np.float32)
    state = converter.convert(blobs, raw_box_maps=broken == 'stds')
    with pytest.raises(AssertionError):
        compare('50', net, state, tmp_path)


def _run(*arguments):
    return run_tool('model_converters/rfcn_caffe_to_mmdet.py', *arguments)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('missing', 'No such file'),
        ('truncated', 'truncated or no caffemodel'),
        ('foreign', 'truncated or no caffemodel'),
        ('empty', 'holds no layer with weights'),
        ('other network', 'convert R-FCN models on these two networks'),
        ('without rfcn_cls', "layer 'rfcn_cls' is missing"),
        ('with more', 'belong to no R-FCN: fc6'),
        ('class-aware boxes', 'instead of 392'),
        ('short blob', 'numbers for a blob'),
    ],
)
def test_errors(name, message, tmp_path):
    net = Net()
    if name == 'other network':
        net.blobs = {'conv1_1': net.blobs['conv1']}
    elif name == 'without rfcn_cls':
        del net.blobs['rfcn_cls']
    elif name == 'with more':
        net.blobs['fc6'] = [np.zeros(3)]
    elif name == 'class-aware boxes':
        net.blobs['rfcn_bbox'] = [np.zeros((16 * 49, 32, 1, 1)), np.zeros(16 * 49)]
    model = net.caffemodel()
    if name == 'short blob':
        del model.layer[0].blobs[0].data[0]
    data = model.SerializeToString()
    data = {'truncated': data[: len(data) // 2], 'foreign': b'PK\x03\x04 not a net' * 50, 'empty': b''}.get(name, data)
    if name != 'missing':
        (tmp_path / 'net.caffemodel').write_bytes(data)
    (tmp_path / 'out.pth').write_text('a good checkpoint')
    result = _run(tmp_path / 'net.caffemodel', tmp_path / 'out.pth')
    assert result.returncode != 0 and message in result.stderr, result.stderr
    assert result.stderr.count('\n') == 1 and result.stderr.startswith('error: ')
    assert (tmp_path / 'out.pth').read_text() == 'a good checkpoint' and len(list(tmp_path.iterdir())) <= 2


def _negative(blob):
    blob.shape.dim[0], blob.shape.dim[1] = -blob.shape.dim[0], -blob.shape.dim[1]


def _huge(blob):
    """The product is 2 ** 64, which is 0 in 64 bits."""
    del blob.data[:]
    blob.shape.dim[:] = [2**32, 2**32]


def _old_negative(blob):
    blob.ClearField('shape')
    blob.num, blob.channels, blob.height, blob.width = -1, -1, 1, len(blob.data)


def _zero(blob):
    del blob.data[:]
    blob.shape.dim[:] = [0, 2**62]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda layers: _negative(layers['conv1'].blobs[0]), 'numbers for a blob of'),
        (lambda layers: _huge(layers['conv1'].blobs[0]), 'has 0 numbers for a blob of'),
        (lambda layers: _zero(layers['conv1'].blobs[0]), 'has 0 numbers for a blob of'),
        (lambda layers: _old_negative(layers['conv1'].blobs[0]), 'numbers for a blob of'),
        (lambda layers: layers['conv1'].blobs[0].shape.dim.extend([1] * 90), 'numbers for a blob of'),
        (lambda layers: layers['conv1'].blobs[0].data.__setitem__(0, float('nan')), 'not finite'),
        (lambda layers: setattr(layers['rfcn_cls'], 'name', b'\xff\xfe\n[/x]'), "layer 'rfcn_cls' is missing"),
        (lambda layers: setattr(layers['rfcn_cls'], 'name', b'rfcn_bbox'), "layer 'rfcn_bbox' is there twice"),
        (lambda layers: layers['scale_conv1'].blobs[0].shape.dim.__setitem__(0, 2), 'numbers for a blob of'),
        (lambda layers: layers['scale_conv1'].blobs[0].CopyFrom(layers['rfcn_cls'].blobs[1]), 'do not fit together'),
        (lambda layers: layers['rfcn_cls'].blobs[0].shape.dim.__setitem__(slice(0, 2), [32, 196]), 'fit together'),
        (lambda layers: layers['bn_conv1'].blobs.pop(), "layer 'bn_conv1' has 2 blobs"),
    ],
)
def test_odd_files(change, message, tmp_path, monkeypatch, capsys):
    model = Net().caffemodel()
    change({layer.name.decode(): layer for layer in model.layer})
    (tmp_path / 'net.caffemodel').write_bytes(model.SerializeToString())
    monkeypatch.setattr(sys, 'argv', ['convert', str(tmp_path / 'net.caffemodel'), str(tmp_path / 'out.pth')])
    with pytest.raises(SystemExit) as raised:
        converter.main()
    assert str(raised.value).startswith('error: ') and message in str(raised.value)
    assert '\n' not in str(raised.value) and not (tmp_path / 'out.pth').exists()
