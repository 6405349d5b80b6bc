"""The converter of Deformable-ConvNets' ``.params``, against MXNet 1.9.1 running the same random network.

MXNet needs a Python of its own (``mxnet_rfcn.py`` says what runs there): the one that ``MXNET_PYTHON`` names, or
``.venv-mxnet``. The reader of the format is tested without it, on files written here byte by byte.
"""

import copy
import functools
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config

from tests.commands import run_tool

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/model_converters/rfcn_mxnet_to_mmdet.py'
spec = importlib.util.spec_from_file_location('rfcn_mxnet_to_mmdet', SCRIPT)
converter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(converter)
shared = sys.modules['model_converters.rfcn_weights']
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA

WIDTH, CLASSES, REDUCED, SCALES, RATIOS = 4, 3, 32, (2, 4, 8), (0.5, 1, 2)
# No multiples of the stride; rounded up in conv1 and in the pooling behind it.
HEIGHT_WIDTH, SCALE = (100, 136), 1.6
MEANS = [103.06, 115.9, 123.15]
DEPTHS = {'R-FCN': '50', 'Deformable R-FCN': '101', 'Faster R-CNN': '50', 'Deformable Faster R-CNN': '50'}
# With all classes among the first 100 detections.
SEEDS = {'R-FCN': 1, 'Deformable R-FCN': 0, 'Faster R-CNN': 1, 'Deformable Faster R-CNN': 3}
CONFIGS = {
    'R-FCN': 'rfcn/rfcn_r101-mxnet_voc0712.py',
    'Deformable R-FCN': 'rfcn/deformable-rfcn_r101-mxnet_voc0712.py',
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r101-mxnet_coco.py',
    'Deformable Faster R-CNN': 'faster_rcnn/deformable-faster-rcnn_r101-mxnet_coco.py',
}


@pytest.fixture(scope='module')
def mxnet():
    """The Python that has MXNet."""
    named = os.environ.get('MXNET_PYTHON')
    python = Path(named or ROOT / '.venv-mxnet/bin/python')
    if not python.is_file():
        assert named is None, f'MXNET_PYTHON={named} is no file'
        pytest.skip('no MXNet: there is neither MXNET_PYTHON nor .venv-mxnet/bin/python')
    return python


@pytest.fixture(scope='module')
def nets(mxnet, tmp_path_factory):
    """``nets[kind]``: the folder with the weights and outputs of a network that MXNet has run; one process for all."""
    folder = tmp_path_factory.mktemp('nets')
    options = [
        dict(
            depth=depth, two_fc='Faster' in kind, deformable='Deformable' in kind, width=WIDTH, classes=CLASSES,
            reduced=REDUCED, seed=SEEDS[kind], scales=SCALES, ratios=RATIOS, height_width=HEIGHT_WIDTH, scale=SCALE,
            means_bgr=MEANS,
        )
        for kind, depth in DEPTHS.items()
    ]  # fmt: skip
    command = [mxnet, Path(__file__).with_name('mxnet_rfcn.py'), folder, *map(json.dumps, options)]
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return {kind: folder / str(number) for number, kind in enumerate(DEPTHS)}


def detector(kind, state, change=None):
    """The model of a config at the width of the random net; ``change``: of the config."""
    model = copy.deepcopy(unchanged(kind)) if change is None else built(kind, change)
    model.load_state_dict(state, strict=True)
    return model.eval()


@functools.cache
def unchanged(kind):
    return built(kind)


def built(kind, change=lambda model: None):
    register_all_modules()
    model = Config.fromfile(ROOT / 'configs' / CONFIGS[kind]).model
    model.backbone.update(depth=int(DEPTHS[kind]), base_channels=WIDTH, init_cfg=None)
    model.rpn_head.update(in_channels=16 * WIDTH, feat_channels=16)
    model.rpn_head.anchor_generator.update(scales=list(SCALES), ratios=list(RATIOS))
    head = model.roi_head.bbox_head
    head.num_classes = CLASSES
    if 'Faster' in kind:
        model.roi_head.bbox_roi_extractor.update(in_channels=32 * WIDTH, out_channels=REDUCED)
        head.update(in_channels=REDUCED, fc_out_channels=48)
    else:
        head.update(in_channels=32 * WIDTH, reduced_channels=REDUCED)
    change(model)
    return MODELS.build(model)


@torch.no_grad()
def compare(kind, folder, model):
    """Both nets on one image; asserts that every layer, the proposals and the detections agree.

    A part is run when those before it agree: the first difference names its layer.
    """
    with np.load(folder / 'outputs.npz') as outputs:
        theirs = {name: torch.from_numpy(array) for name, array in outputs.items()}
    seen = {}
    two_fc, deformable = 'Faster' in kind, 'Deformable' in kind
    head, pooled = model.roi_head.bbox_head, []
    modules = {
        'pool1': model.backbone.maxpool, 'objectness': model.rpn_head.rpn_cls, 'rpn_bbox_pred': model.rpn_head.rpn_reg,
    }  # fmt: skip
    if two_fc:
        extractor = model.roi_head.bbox_roi_extractor
        modules.update(
            relu1=extractor.reduce, roi_pool=extractor, fc_new_1=head.shared_fcs[0], fc_new_2=head.shared_fcs[1],
            bbox_pred=head.fc_reg,
        )  # fmt: skip
        if deformable:
            modules['offset'] = extractor.offset_fc
    else:
        modules.update(relu1=head.reduce, rfcn_cls=head.cls_maps, rfcn_bbox=head.reg_maps)
        pool = head._pool
        head._pool = lambda *arguments: pooled.append(pool(*arguments)) or pooled[-1]
    for letter, block in zip('abc', model.backbone.layer4, strict=True):
        modules[f'res5{letter}_branch2b'] = block.conv2
        if deformable:
            modules[f'res5{letter}_offset'] = block.conv2.conv_offset
    for name, module in modules.items():
        # Copies: what stands behind a layer works in place.
        module.register_forward_hook(lambda _module, _inputs, out, name=name: seen.update({name: out.clone()}))

    image = theirs['picture'].flip(-1).permute(2, 0, 1)  # BGR, as mmdet loads it
    sample = DetDataSample(metainfo=dict(img_shape=HEIGHT_WIDTH, ori_shape=(62, 85), scale_factor=(SCALE, SCALE)))
    data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]))
    batch = data['data_samples']

    def same(name, ours, their):
        scale = float(their.abs().max())
        assert scale > 1e-2, f'{name} says nothing'
        torch.testing.assert_close(ours, their, rtol=0, atol=2e-5 * scale, msg=lambda text: f'{name}: {text}')

    features = model.extract_feat(data['inputs'])
    same('pool1', seen['pool1'], theirs['pool1'])
    same('res4', features[0], theirs['res4'])
    (proposals,) = model.rpn_head.predict(features, batch, rescale=False)
    same('objectness', seen['objectness'].sigmoid(), theirs['rpn_cls_prob'][:, len(SCALES) * len(RATIOS) :])
    same('rpn_bbox_pred', seen['rpn_bbox_pred'], theirs['rpn_bbox_pred'])
    assert 50 <= len(proposals) < 300
    same('proposals', proposals.bboxes, theirs['rois'][:, 1:])
    raw = model.roi_head.predict_bbox(features, [sample.metainfo], [proposals], None)[0]
    for letter in 'abc':
        for part in (f'res5{letter}_offset', f'res5{letter}_branch2b'):
            if part in theirs:
                same(part, seen[part], theirs[part])
    same('res5', features[1], theirs['res5'])
    same('relu1', seen['relu1'].relu(), theirs['relu1'])
    stds = torch.tensor(shared.BOX_STDS)
    if two_fc:
        if deformable:
            same('offset', seen['offset'], theirs['offset'])
        same('roi_pool', seen['roi_pool'], theirs['roi_pool'])
        for name in ('fc_new_1', 'fc_new_2'):
            same(name, seen[name].relu(), theirs[name].relu())
        deltas = seen['bbox_pred'] * stds.repeat(CLASSES)
    else:
        same('rfcn_cls', seen['rfcn_cls'].roll(49, dims=1), theirs['rfcn_cls'])
        per_map = stds.repeat_interleave(49)[:, None, None]
        same('rfcn_bbox', seen['rfcn_bbox'] * per_map, theirs['rfcn_bbox'][:, 4 * 49 :])
        if deformable:
            offsets, _, box_offsets, _ = pooled[:4]
            same('rfcn_cls_offset', offsets.roll(2, dims=1), theirs['rfcn_cls_offset'])
            same('rfcn_bbox_offset', box_offsets, theirs['rfcn_bbox_offset'])
        deltas = pooled[-1].mean(dim=(2, 3)) * stds
    same('class probabilities', raw.scores.roll(1, dims=1), theirs['cls_vote'])
    same('deltas', deltas, theirs['bbox_vote'][:, 4:])

    (found,) = model.roi_head.predict(features, [proposals], batch, rescale=True)
    detections = theirs['detections'].float()
    assert len(detections) == len(found) == 100 and len(detections[:, 5].unique()) == CLASSES
    same('boxes', found.bboxes, detections[:, :4])
    same('scores', found.scores, detections[:, 4])
    assert found.labels.equal(detections[:, 5].long()), 'labels'


@pytest.mark.parametrize('kind', DEPTHS)
def test_equals_mxnet_layer_by_layer(kind, nets, tmp_path):
    folder = nets[kind]
    result = run_tool('model_converters/rfcn_mxnet_to_mmdet.py', folder / 'net-0000.params', tmp_path / 'converted.pth')
    assert result.returncode == 0, result.stderr
    assert f': {kind} on ResNet-{DEPTHS[kind]}, {CLASSES} classes, 9 anchors' in result.stdout
    state = torch.load(tmp_path / 'converted.pth', weights_only=True)['state_dict']
    compare(kind, folder, detector(kind, state))


def _to_weights(key, change):
    def plant(state, _params):
        for name in [name for name in state if key in name]:
            state[name] = change(state[name]).contiguous()

    return plant


def _to_model(change):
    return lambda _state, _params: change


def _without_test(state, params):
    """The training's box layer, as if it were the test's."""
    left = {name: array for name, array in params.items() if '_test' not in name}
    state.update(converter.convert(left, box_maps='final'))


def _bins_first(weight):
    """A fully connected layer as if the bins of all channels came one after another, and not a channel's bins."""
    return weight.unflatten(1, (-1, 49)).transpose(1, 2).flatten(1)


MISTAKES = {
    'image in RGB': ('pool1', _to_weights('backbone.conv1.weight', lambda each: each.flip(1))),
    'means in RGB': ('pool1', _to_model(lambda model: model.data_preprocessor.update(mean=MEANS[::-1]))),
    'gamma lost': ('pool1', _to_weights('backbone.bn1.weight', torch.ones_like)),
    'RPN pairs swapped': ('objectness', _to_weights('rpn_cls', torch.neg)),
    'boxes a pixel longer': (
        'proposals',
        _to_model(lambda model: model.rpn_head.bbox_coder.update(type='mmdet_softnms.CaffeDeltaXYWHBBoxCoder')),
    ),
    'cut cells': ('proposals', _to_model(lambda model: model.rpn_head.update(whole_cells=False))),
    'places swapped x and y': (
        'res5a_offset',
        _to_weights('conv_offset', lambda each: each.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)),
    ),
    'one deformable group': (
        'res5a_offset',
        _to_weights('conv_offset', lambda each: each[:18].repeat_interleave(4, 0)),
    ),
    'border of mmcv': ('res5a_branch2b', _to_model(lambda model: model.backbone.dcn.update(type='DCN'))),
    'background first': ('rfcn_cls', _to_weights('cls_maps', lambda each: each.roll(49, 0))),
    'bins turned': (
        'rfcn_cls',
        _to_weights('cls_maps', lambda each: each.unflatten(0, (-1, 7, 7)).transpose(1, 2).flatten(0, 2)),
    ),
    'box layer of training': ('rfcn_bbox', _without_test),
    'bins swapped x and y': (
        'rfcn_cls_offset',
        _to_weights('cls_offset_maps', lambda each: each.unflatten(0, (-1, 2, 49)).flip(1).flatten(0, 2)),
    ),
    'background of offsets first': (
        'rfcn_cls_offset',
        _to_weights('cls_offset_maps', lambda each: each.roll(2 * 49, 0)),
    ),
    'boxes swapped x and y': (
        'rfcn_bbox_offset',
        _to_weights('reg_offset_maps', lambda each: each.unflatten(0, (2, 49)).flip(0).flatten(0, 1)),
    ),
}


#: Of the two-fc heads alone; what comes before them is that of R-FCN.
TWO_FC_MISTAKES = {
    'gamma lost': ('pool1', _to_weights('backbone.bn1.weight', torch.ones_like)),
    'means in RGB': ('pool1', MISTAKES['means in RGB'][1]),
    'one deformable group': ('res5a_offset', MISTAKES['one deformable group'][1]),
    'offsets swapped x and y': ('offset', _to_weights('offset_fc', lambda each: each.roll(49, 0))),
    'bins of offsets turned': (
        'offset',
        _to_weights('offset_fc', lambda each: each.unflatten(0, (2, 7, 7)).transpose(1, 2).flatten(0, 2)),
    ),
    'bins first into the offsets': ('offset', _to_weights('offset_fc.weight', _bins_first)),
    'no offsets': ('offset', _to_weights('offset_fc', torch.zeros_like)),
    'offsets ten times as far': (
        'roi_pool',
        _to_model(lambda model: model.roi_head.bbox_roi_extractor.update(trans_std=1.0)),
    ),
    'bins first into the fc': ('fc_new_1', _to_weights('shared_fcs.0.weight', _bins_first)),
    'background first': ('class probabilities', _to_weights('fc_cls', lambda each: each.roll(1, 0))),
    "box of background is a class's": ('deltas', _to_weights('fc_reg', lambda each: each.roll(4, 0))),
    'box layer of training': ('deltas', _without_test),
}


@pytest.mark.parametrize(
    ('kind', 'mistake'),
    [
        *(('Deformable R-FCN', mistake) for mistake in MISTAKES),
        *(('Deformable Faster R-CNN', mistake) for mistake in TWO_FC_MISTAKES),
    ],
)
def test_the_comparison_notices(kind, mistake, nets):
    """Each mistake that a converter or a config could make is noticed, in the layer where it acts first."""
    layer, plant = (TWO_FC_MISTAKES if 'Faster' in kind else MISTAKES)[mistake]
    folder = nets[kind]
    params = converter.read_params(folder / 'net-0000.params')
    state = converter.convert(params)
    model = detector(kind, state, plant(state, params))
    with pytest.raises(AssertionError, match=f'^{layer}: '):
        compare(kind, folder, model)


def write_array(array, version=V2, shape=None, element=None, storage=0):
    shape = array.shape if shape is None else shape
    element = {'f4': 0, 'f8': 1, 'f2': 2, 'u1': 3, 'i4': 4}[array.dtype.str[1:]] if element is None else element
    if version is None:
        head = struct.pack(f'<{len(shape) + 1}I', len(shape), *shape)
    else:
        head = struct.pack('<I', version) + (struct.pack('<i', storage) if version != V1 else b'')
        head += struct.pack(f'<i{len(shape)}q', len(shape), *shape)
    return head + struct.pack('<3i', 1, 0, element) + array.tobytes()


def write_list(arrays, names, head=(0x112, 0), counts=None):
    """Bytes of a ``.params``: ``arrays`` as bytes, ``names`` as strings."""
    counts = counts or (len(arrays), len(names))
    content = struct.pack('<3Q', *head, counts[0]) + b''.join(arrays) + struct.pack('<Q', counts[1])
    return content + b''.join(struct.pack('<Q', len(name.encode())) + name.encode() for name in names)


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3) / 7


@pytest.mark.parametrize('version', [None, V1, V2, V3])
@pytest.mark.parametrize('dtype', ['<f4', '<f8', '<f2'])
def test_reads_every_version(version, dtype, tmp_path):
    other = np.ones((4, 1, 2, 1), dtype=dtype)
    content = write_list([write_array(ARRAY.astype(dtype), version), write_array(other, version)], ['arg:a', 'aux:ä'])
    (tmp_path / 'a.params').write_bytes(content)
    read = converter.read_params(tmp_path / 'a.params')
    assert list(read) == ['arg:a', 'aux:ä'] and {array.dtype for array in read.values()} == {np.dtype('float32')}
    np.testing.assert_array_equal(read['arg:a'], ARRAY.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(read['aux:ä'], other.astype(np.float32))
    for length in range(0, len(content), 1 if dtype == '<f4' else 41):
        (tmp_path / 'a.params').write_bytes(content[:length])
        with pytest.raises(converter.ParamsError, match='are left: truncated'):
            converter.read_params(tmp_path / 'a.params')


def _with(**options):
    return write_list([write_array(ARRAY, **options)], ['arg:a'])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'PK\x03\x04' + b'x' * 99, 'instead of 0x112: no .params of MXNet'),
        (b'', 'the header needs 16 bytes, and 0 are left'),
        (write_list([], []), 'has 0 arrays and 0 names'),
        (write_list([write_array(ARRAY)], []), 'has 1 arrays and 0 names'),
        (write_list([write_array(ARRAY)] * 2, ['arg:a'] * 2), "has 'arg:a' twice"),
        (write_list([write_array(ARRAY)], ['arg:a']) + b'!', 'goes on for 1 bytes'),
        (write_list([write_array(ARRAY)], ['arg:a'], counts=(2**63, 1)), 'the number of arrays is 9223372036854775808'),
        (write_list([write_array(ARRAY)], ['arg:a'], counts=(1, 2**62)), 'the number of names is 4611686018427387904'),
        (_with(shape=(2**62, 2**62)), 'array 0 of shape (4611686018427387904, 4611686018427387904) needs'),
        (_with(shape=(2**32, 2**32)), 'needs 73786976294838206464 bytes'),  # 0 in 64 bits
        (_with(shape=(-2, -3)), 'shape (-2, -3)'),
        (_with(shape=(0, 2**60)), 'shape (0, 1152921504606846976)'),
        (_with(shape=()), '0 dimensions instead of 1 to 8'),
        (_with(shape=(1,) * 9), '9 dimensions'),
        (_with(version=0x7FFFFFFF), 'dimensions instead of 1 to 8'),
        (_with(storage=1), 'storage type 1: only dense'),
        (_with(element=4), 'element type 4: floats'),
        (_with(element=-1), 'element type -1: floats'),
        (write_list([write_array(np.float32([np.nan]))], ['arg:a\nb']), "not finite in 'arg:a\\\\nb'"),
        (write_list([write_array(np.float64([1e300]))], ['arg:a']), 'not finite'),
    ],
)
def test_refuses_foreign_and_hostile_files(content, message, tmp_path, monkeypatch):
    (tmp_path / 'a.params').write_bytes(content)
    monkeypatch.setattr(sys, 'argv', ['convert', str(tmp_path / 'a.params'), str(tmp_path / 'out.pth')])
    with pytest.raises(SystemExit) as raised:
        converter.main()
    assert str(raised.value).startswith('error: ') and message.replace('\\\\', '\\') in str(raised.value)
    assert '\n' not in str(raised.value) and len(str(raised.value)) < 400
    assert not (tmp_path / 'out.pth').exists()


KINDS = ('weight', 'bias')
FULLY_CONNECTED = ('fc_new', 'cls_score', 'bbox_pred', 'offset')


def tiny(deformable=True, two_fc=False):
    """Weights of the right names, with as few channels as the converter takes; one class."""
    arrays = {}

    def conv(name, out, channels=2):
        size = (out, channels) if name.startswith(FULLY_CONNECTED) else (out, channels, 1, 1)
        arrays[f'arg:{name}_weight'] = np.random.default_rng(out).normal(size=size)
        arrays[f'arg:{name}_bias'] = np.random.default_rng(out).normal(size=out)

    for unit in shared.resnet_units('50'):
        conv(unit.conv, 2, 3 if unit.conv == 'conv1' else 2)
        del arrays[f'arg:{unit.conv}_bias']
        for kind, name in (('arg', 'gamma'), ('arg', 'beta'), ('aux', 'moving_mean'), ('aux', 'moving_var')):
            arrays[f'{kind}:{unit.bn}_{name}'] = np.ones(2)
        if deformable and unit.conv.startswith('res5') and unit.conv.endswith('2b'):
            conv(f'{unit.conv}_offset', 72)
    layers = dict(rpn_conv_3x3=2, rpn_cls_score=4, rpn_bbox_pred=8, conv_new_1=2)
    if two_fc:
        layers.update(fc_new_1=2, fc_new_2=2, cls_score=2, bbox_pred=8, **(dict(offset=98) if deformable else {}))
    else:
        layers.update(rfcn_cls=98, rfcn_bbox=392)
        if deformable:
            layers.update(rfcn_cls_offset_t=2 * 98, rfcn_bbox_offset_t=98)
    for name, out in layers.items():
        conv(name, out)
    for kind in ('weight', 'bias'):
        box_layer = f'arg:{"bbox_pred" if two_fc else "rfcn_bbox"}_{kind}'
        arrays[f'{box_layer}_test'] = arrays[box_layer] * 3
    return {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()}


def test_box_layer_with_and_without_its_test_form():
    params = tiny()
    plain = {name: array for name, array in params.items() if '_test' not in name}
    key = 'roi_head.bbox_head.reg_maps.bias'
    stds = torch.tensor(shared.BOX_STDS).repeat_interleave(49)
    raw = torch.from_numpy(plain['arg:rfcn_bbox_bias'])[4 * 49 :]
    for box_maps in (None, 'raw', 'final'):  # a file that has both says it itself
        torch.testing.assert_close(converter.convert(params, box_maps=box_maps)[key], raw * 3 / stds)
    torch.testing.assert_close(converter.convert(plain, box_maps='raw')[key], raw)
    torch.testing.assert_close(converter.convert(plain, box_maps='final')[key], raw / stds)
    with pytest.raises(converter.ConversionError, match='name it, --box-maps final'):
        converter.convert(plain)


def test_box_layer_of_two_fc_with_and_without_its_test_form():
    params = tiny(two_fc=True)
    plain = {name: array for name, array in params.items() if '_test' not in name}
    key, raw = 'roi_head.bbox_head.fc_reg.bias', torch.from_numpy(plain['arg:bbox_pred_bias'])[4:]
    stds = torch.tensor(shared.BOX_STDS)
    torch.testing.assert_close(converter.convert(params)[key], raw * 3 / stds)
    torch.testing.assert_close(converter.convert(plain, box_maps='raw')[key], raw)
    torch.testing.assert_close(converter.convert(plain, box_maps='final')[key], raw / stds)
    with pytest.raises(converter.ConversionError, match='bbox_pred_weight_test is missing'):
        converter.convert(plain)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda params: params.pop('arg:fc_new_1_weight'), "'fc_new_1_weight' is missing: no Faster R-CNN on"),
        (lambda params: params.pop('arg:offset_weight'), "belong to no Faster R-CNN: 'res5a_branch2b_offset"),
        (lambda params: _layer(params, 'rfcn_cls', 98), "belong to no Faster R-CNN: 'rfcn_cls_weight"),
        (lambda params: _layer(params, 'fc_new_2', 2), "layer 'fc_new_2' and its normalisation or bias"),
        (lambda params: _replace(params, 'offset_bias', (2,)), "layer 'offset' and its normalisation or bias"),
        (lambda params: _replace(params, 'bbox_pred_bias_test', (12,)), "layer 'bbox_pred' and its"),
        (
            lambda params: [_replace(params, f'cls_score_{kind}', (4, 2)[: 2 - (kind == 'bias')]) for kind in KINDS],
            'bbox_pred has 8 channels for 3 classes and background instead of 16',
        ),
    ],
)
def test_refuses_other_two_fc_networks(change, message):
    params = tiny(two_fc=True)
    change(params)
    with pytest.raises(converter.ConversionError) as raised:
        converter.convert(params)
    assert message in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda params: params.pop('arg:rfcn_cls_bias'), "'rfcn_cls_bias' is missing"),
        (lambda params: params.pop('aux:bn5b_branch2c_moving_var'), "'bn5b_branch2c_moving_var' is missing"),
        (lambda params: params.pop('arg:res5b_branch2b_offset_bias'), "'res5b_branch2b_offset_bias' is missing"),
        (lambda params: params.pop('arg:rfcn_cls_offset_t_weight'), "belong to no R-FCN: 'res5a_branch2b_offset"),
        (lambda params: params.pop('arg:res4f_branch2a_weight'), 'neither res4b22_branch2a'),
        (lambda params: params.update({'arg:fc6_weight': np.ones(1)}), "belong to no R-FCN: 'fc6_weight'"),
        (lambda params: params.update({'conv\n': np.ones(1)}), "'conv\\n' begins with neither arg: nor aux:"),
        (lambda params: params.update({'aux:conv1_weight': np.ones(1)}), "'conv1_weight' is there twice"),
        (lambda params: _replace(params, 'bn_conv1_gamma', (3,)), "'conv1' and its normalisation"),
        (lambda params: _replace(params, 'conv1_weight', (2, 4, 1, 1)), 'conv1 takes 4 channels'),
        (lambda params: _layer(params, 'res5a_branch2b_offset', 18), 'res5a_branch2b_offset has 18 channels instead'),
        (lambda params: _layer(params, 'rfcn_cls_offset_t', 98), 'rfcn_cls_offset_t has 98 channels instead of 196'),
        (lambda params: _layer(params, 'rfcn_cls', 97), 'rfcn_cls has 97 channels'),
        (lambda params: _layer(params, 'rpn_cls_score', 3), 'rpn_cls_score has 3 channels'),
        (lambda params: _layer(params, 'rpn_bbox_pred', 12), '4 channels for each of the 2 anchors'),
    ],
)
def test_refuses_other_networks(change, message):
    params = tiny()
    change(params)
    with pytest.raises(converter.ConversionError) as raised:
        converter.convert(params)
    assert message in str(raised.value) and '\n' not in str(raised.value)


def _replace(params, name, shape):
    params[f'arg:{name}'] = np.ones(shape, dtype=np.float32)


def _layer(params, name, out):
    _replace(params, f'{name}_weight', (out, 2, 1, 1))
    _replace(params, f'{name}_bias', (out,))
