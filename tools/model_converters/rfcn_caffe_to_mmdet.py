"""Turn a published R-FCN ``.caffemodel`` (ResNet-50 or ResNet-101, VOC or COCO) into an mmdet checkpoint.

    python tools/model_converters/rfcn_caffe_to_mmdet.py resnet101_rfcn_final.caffemodel rfcn_r101_voc0712.pth

The result loads into ``configs/rfcn/rfcn_r50-caffe_*.py`` or ``rfcn_r101-caffe_*.py``. The file is read as what it is,
a protobuf message; nothing in it is executed. Network, classes and anchors are those of the layers found. What changes:

* Batch-norm sums are divided by their factor; a bias of the first convolution (ResNet-50 has one) goes into its mean.
* Background, the first class in Caffe, becomes the last.
* Of the box maps, the foreground half stays (the other is the background's box, which nobody uses).
* The RPN's pairs of logits become one: softmax over (background, object) is the sigmoid of object - background,
  exactly.
* Published files have the box normalisation (stds .1 .1 .2 .2) multiplied into the box maps; it is divided out again,
  since mmdet's coder applies it. ``--raw-box-maps``: it was not, as in a solver's own snapshots.

BGR input, mean, stride placement, anchors and box conventions are the configs'. What still differs from Caffe:
proposals below the minimum size are dropped at 8 px of the resized image instead of 8 px of the original, and with
``>`` instead of ``>=``; box deltas are cut at log(1000 / 16), where Caffe lets them explode.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone without installing
from mmdet_softnms.files import write_whole

Blobs = dict[str, list[np.ndarray]]
BINS = 49
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
BLOCKS = {'50': (3, 4, 6, 3), '101': (3, 4, 23, 3)}


class ConversionError(ValueError):
    """The file is no R-FCN caffemodel this converter knows; the message says why."""


def caffe_message() -> type:
    """``caffe.NetParameter`` as a protobuf class, with the fields that hold weights (Caffe's caffe.proto).

    Described here instead of compiled from the .proto, which would need protoc; unknown fields are skipped on reading.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    # Names as bytes: Caffe never checked that they are text.
    text, whole, real = field.TYPE_BYTES, field.TYPE_INT64, field.TYPE_FLOAT
    messages: dict[str, list[tuple[str, int, int, int | str]]] = {
        'BlobShape': [('dim', 1, many, whole)],
        'BlobProto': [
            ('num', 1, one, whole),
            ('channels', 2, one, whole),
            ('height', 3, one, whole),
            ('width', 4, one, whole),
            ('data', 5, many, real),
            ('shape', 7, one, 'BlobShape'),
        ],
        'LayerParameter': [('name', 1, one, text), ('type', 2, one, text), ('blobs', 7, many, 'BlobProto')],
        'V1LayerParameter': [('name', 4, one, text), ('blobs', 6, many, 'BlobProto')],
        'NetParameter': [
            ('name', 1, one, text),
            ('layers', 2, many, 'V1LayerParameter'),
            ('layer', 100, many, 'LayerParameter'),
        ],
    }
    file = descriptor_pb2.FileDescriptorProto(name='caffe_weights.proto', package='caffe', syntax='proto2')
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field_name, number, label, kind in fields:
            added = message.field.add(name=field_name, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = field.TYPE_MESSAGE, f'.caffe.{kind}'
            else:
                added.type = kind
                added.options.packed = label == many and kind != text
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName('caffe.NetParameter'))


def read_caffemodel(path: Path) -> Blobs:
    """The arrays of each layer that has any, in float32 and in Caffe's shapes.

    Raises:
        ConversionError: not a caffemodel, or one that ends too soon.
        OSError: the file cannot be read.
    """
    from google.protobuf.message import DecodeError

    net = caffe_message()()
    try:
        net.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ConversionError(f'{path} is truncated or no caffemodel: {error}') from error
    blobs: Blobs = {}
    for layer in [*net.layer, *net.layers]:
        name = layer.name.decode(errors='backslashreplace')
        arrays = []
        for blob in layer.blobs:
            shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
            data = np.array(blob.data, dtype=np.float32)
            if data.size != math.prod(shape) or not 0 < len(shape) <= 8 or min(shape) < 1:
                raise ConversionError(f'{path}: layer {name!r:.80} has {data.size} numbers for a blob of {shape!s:.80}')
            if not np.isfinite(data).all():
                raise ConversionError(f'{path}: layer {name!r:.80} has numbers that are not finite')
            arrays.append(data.reshape(shape))
        if arrays and name in blobs:
            raise ConversionError(f'{path}: layer {name!r:.80} is there twice')
        if arrays:
            blobs[name] = arrays
    if not blobs:
        raise ConversionError(f'{path} holds no layer with weights: it is no caffemodel, or one of another network')
    return blobs


def find_depth(blobs: Mapping[str, Any]) -> str:
    """'50' or '101'.

    Raises:
        ConversionError: neither.
    """
    if 'res4b22_branch2a' in blobs:
        return '101'
    if 'res4f_branch2a' in blobs:
        return '50'
    raise ConversionError(
        'neither res4b22_branch2a (ResNet-101) nor res4f_branch2a (ResNet-50) is there, only '
        f'{", ".join(list(blobs)[:5])!r:.200}, ...: convert R-FCN models on these two networks'
    )


def block_names(depth: str, stage: int) -> list[str]:
    """Caffe's names of the blocks of a stage: a, b, c, ..., or a, b1, b2, ... in ResNet-101's long stages."""
    count = BLOCKS[depth][stage]
    numbered = depth == '101' and stage in (1, 2)
    return ['a', *(f'b{i}' if numbered else chr(ord('a') + i) for i in range(1, count))]


def convert(blobs: Blobs, *, raw_box_maps: bool = False) -> dict[str, Tensor]:
    """A state dict for the detectors of ``configs/rfcn``.

    Args:
        blobs: as :func:`read_caffemodel` returns them.
        raw_box_maps: box normalisation is not multiplied into the box maps.

    Raises:
        ConversionError: layers are missing, left over, or have other shapes than in R-FCN.
    """
    depth = find_depth(blobs)
    left = dict(blobs)
    state: dict[str, Tensor] = {}

    def take(name: str, *counts: int) -> list[Tensor]:
        arrays = left.pop(name, None)
        if arrays is None:
            raise ConversionError(f'layer {name!r} is missing: no R-FCN on ResNet-{depth}, or a truncated file')
        if len(arrays) not in counts:
            raise ConversionError(f'layer {name!r} has {len(arrays)} blobs instead of {" or ".join(map(str, counts))}')
        return [torch.from_numpy(array) for array in arrays]

    def fit(name: str, weight: Tensor, others: list[Tensor]) -> None:
        if weight.dim() != 4 or any(other.numel() != len(weight) for other in others):
            shapes = ', '.join(str(tuple(one.shape)) for one in (weight, *others))
            raise ConversionError(f'layer {name!r} and its normalisation or bias do not fit together: {shapes}')

    def conv_bn(conv: str, suffix: str, to_conv: str, to_bn: str) -> None:
        weight, *bias = take(conv, 1, 2)
        total_mean, total_var, factor = take(f'bn{suffix}', 3)
        gamma, beta = take(f'scale{suffix}', 2)
        fit(conv, weight, [total_mean, total_var, gamma, beta, *bias])
        scale = 0.0 if float(factor.flatten()[0]) == 0 else 1 / float(factor.flatten()[0])
        mean = total_mean.flatten() * scale
        if bias:
            mean = mean - bias[0].flatten()
        state[f'backbone.{to_conv}.weight'] = weight
        for key, value in (
            ('weight', gamma),
            ('bias', beta),
            ('running_mean', mean),
            ('running_var', total_var.flatten() * scale),
        ):
            state[f'backbone.{to_bn}.{key}'] = value.flatten()
        state[f'backbone.{to_bn}.num_batches_tracked'] = torch.zeros((), dtype=torch.long)

    def conv(name: str, to: str, change: Callable[[Tensor], Tensor] = lambda each: each) -> None:
        weight, bias = take(name, 2)
        fit(name, weight, [bias])
        state[f'{to}.weight'] = change(weight)
        state[f'{to}.bias'] = change(bias.flatten())

    conv_bn('conv1', '_conv1', 'conv1', 'bn1')
    for stage in range(4):
        for index, block in enumerate(block_names(depth, stage)):
            suffix, to = f'{stage + 2}{block}', f'layer{stage + 1}.{index}'
            if index == 0:
                conv_bn(f'res{suffix}_branch1', f'{suffix}_branch1', f'{to}.downsample.0', f'{to}.downsample.1')
            for number, letter in enumerate('abc', start=1):
                conv_bn(
                    f'res{suffix}_branch2{letter}',
                    f'{suffix}_branch2{letter}',
                    f'{to}.conv{number}',
                    f'{to}.bn{number}',
                )
    conv('rpn_conv/3x3', 'rpn_head.rpn_conv')
    conv('rpn_cls_score', 'rpn_head.rpn_cls', _object_minus_background)
    conv('rpn_bbox_pred', 'rpn_head.rpn_reg')
    conv('conv_new_1', 'roi_head.bbox_head.reduce')
    conv('rfcn_cls', 'roi_head.bbox_head.cls_maps', _background_last)
    conv('rfcn_bbox', 'roi_head.bbox_head.reg_maps', lambda each: _foreground_boxes(each, raw_box_maps))
    if left:
        raise ConversionError(f'these layers belong to no R-FCN: {", ".join(list(left)[:8])}')
    anchors = state['rpn_head.rpn_cls.bias'].numel()
    if state['rpn_head.rpn_reg.bias'].numel() != 4 * anchors:
        raise ConversionError(f'rpn_bbox_pred does not have 4 channels for each of the {anchors} anchors')
    return {key: value.contiguous() for key, value in state.items()}


def _object_minus_background(pairs: Tensor) -> Tensor:
    """(2 A, ...), backgrounds first -> (A, ...)."""
    if len(pairs) % 2:
        raise ConversionError(f'rpn_cls_score has {len(pairs)} channels: pairs of background and object are expected')
    background, foreground = pairs.chunk(2)
    return foreground - background


def _background_last(maps: Tensor) -> Tensor:
    """((K + 1) * P * P, ...), background first -> background last."""
    if len(maps) % BINS:
        raise ConversionError(f'rfcn_cls has {len(maps)} channels, no multiple of {BINS}: 7 x 7 bins are expected')
    return torch.cat([maps[BINS:], maps[:BINS]])


def _foreground_boxes(maps: Tensor, raw: bool) -> Tensor:
    """(8 * P * P, ...), the background's box first -> (4 * P * P, ...), normalised deltas."""
    if len(maps) != 8 * BINS:
        raise ConversionError(
            f'rfcn_bbox has {len(maps)} channels instead of {8 * BINS}: class-agnostic boxes of 7 x 7'
        )
    foreground = maps[4 * BINS :].unflatten(0, (4, BINS))
    if not raw:
        foreground = foreground / torch.tensor(BOX_STDS).view(4, *[1] * (foreground.dim() - 1))
    return foreground.flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('caffemodel', type=Path)
    parser.add_argument('checkpoint', type=Path, help='the .pth to write')
    parser.add_argument('--raw-box-maps', action='store_true', help='box normalisation is not in the box maps')
    arguments = parser.parse_args()
    try:
        import google.protobuf  # noqa: F401
    except ImportError:
        sys.exit('error: reading a caffemodel needs protobuf: pip install protobuf')
    try:
        blobs = read_caffemodel(arguments.caffemodel)
        state = convert(blobs, raw_box_maps=arguments.raw_box_maps)
        content = io.BytesIO()
        torch.save({'meta': {}, 'state_dict': state}, content)
        write_whole(arguments.checkpoint, content.getbuffer())
    except (ConversionError, OSError) as error:
        sys.exit(f'error: {error}')
    classes = state['roi_head.bbox_head.cls_maps.bias'].numel() // BINS - 1
    anchors = state['rpn_head.rpn_cls.bias'].numel()
    print(
        f'{arguments.checkpoint}: R-FCN on ResNet-{find_depth(blobs)}, {classes} classes, {anchors} anchors, '
        f'{len(state)} tensors'
    )


if __name__ == '__main__':
    main()
