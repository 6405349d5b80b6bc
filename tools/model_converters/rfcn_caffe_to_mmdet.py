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

BGR input, mean, stride placement, anchors and box conventions are the configs', with ``coordinates='caffe'`` those of
the smallest proposals and of decoding, too. docs/rfcn.md lists what still differs from Caffe.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools
from model_converters.rfcn_weights import (
    STATISTICS,
    ConversionError,
    background_last,
    check_fit,
    find_depth,
    finish,
    foreground_boxes,
    object_minus_background,
    resnet_units,
    write_checkpoint,
)

Blobs = dict[str, list[np.ndarray]]


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

    def conv(name: str, to: str, change: Callable[[Tensor], Tensor] = lambda each: each) -> None:
        weight, bias = take(name, 2)
        check_fit(name, weight, [bias])
        state[f'{to}.weight'] = change(weight)
        state[f'{to}.bias'] = change(bias.flatten())

    for unit in resnet_units(depth):
        weight, *bias = take(unit.conv, 1, 2)
        total_mean, total_var, factor = take(unit.bn, 3)
        gamma, beta = take(f'scale{unit.bn.removeprefix("bn")}', 2)
        check_fit(unit.conv, weight, [total_mean, total_var, gamma, beta, *bias])
        scale = 0.0 if float(factor.flatten()[0]) == 0 else 1 / float(factor.flatten()[0])
        mean = total_mean.flatten() * scale
        if bias:
            mean = mean - bias[0].flatten()
        state[f'{unit.to_conv}.weight'] = weight
        for key, value in zip(STATISTICS, (gamma, beta, mean, total_var * scale), strict=True):
            state[f'{unit.to_bn}.{key}'] = value.flatten()
        state[f'{unit.to_bn}.num_batches_tracked'] = torch.zeros((), dtype=torch.long)
    conv('rpn_conv/3x3', 'rpn_head.rpn_conv')
    conv('rpn_cls_score', 'rpn_head.rpn_cls', object_minus_background)
    conv('rpn_bbox_pred', 'rpn_head.rpn_reg')
    conv('conv_new_1', 'roi_head.bbox_head.reduce')
    conv('rfcn_cls', 'roi_head.bbox_head.cls_maps', background_last)
    conv('rfcn_bbox', 'roi_head.bbox_head.reg_maps', lambda each: foreground_boxes(each, raw_box_maps))
    return finish(state, left)


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
        write_checkpoint(arguments.checkpoint, state, f'R-FCN on ResNet-{find_depth(blobs)}')
    except (ConversionError, OSError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
