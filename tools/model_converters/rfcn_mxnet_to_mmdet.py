"""Turn a ``.params`` of Deformable-ConvNets into an mmdet checkpoint, on ResNet-101 or ResNet-50.

    python tools/model_converters/rfcn_mxnet_to_mmdet.py rfcn_dcn_coco-0000.params deformable-rfcn_r101_coco.pth

R-FCN, Faster R-CNN with two fully connected layers ("2fc"), and the deformable form of both. The result loads into a
config with ``-mxnet`` in its name in ``configs/rfcn`` or ``configs/faster_rcnn``; docs/rfcn.md says which file goes
with which. They have the authors' pixel means, boxes and thresholds. The file is read as what it is, a list of arrays;
nothing in it is executed, and MXNet is not needed. Network, classes and anchors are those of the layers found. What
changes:

* The first convolution takes RGB there and BGR in the configs: its input channels are turned round.
* A name with ``_test`` replaces the one without, as at the authors' test time. The box layer has one, with the box
  normalisation (stds .1 .1 .2 .2) multiplied in; it is divided out again, since mmdet's coder applies it. Without one,
  say which it is: ``--box-maps final`` (multiplied in) or ``--box-maps raw`` (not, as in training).
* Background, the first class in MXNet, becomes the last, in the offsets of the bins as well. Its box is left out: of
  R-FCN's box maps the foreground half stays, of the two-fc head's layer one box for each class.
* The RPN's pairs of logits become one: softmax over (background, object) is the sigmoid of object - background.

Offsets keep their order: y before x at each place of a deformable convolution, in 4 groups of channels; x before y for
the bins, for each class in R-FCN and for all of them in the two-fc head. Its first fully connected layer takes a
channel's bins one after another on both sides. What still differs from MXNet: box deltas are cut at log(1000 / 16);
equal scores come in another order; an image with fewer than 300 proposals has no repeated ones.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools
from model_converters.mxnet_params import ParamsError, read_params
from model_converters.rfcn_weights import (
    BINS,
    BOX_STDS,
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

DEFORM_GROUPS = 4  # of the configs, and of the published models
OFFSETS = 2 * 3 * 3 * DEFORM_GROUPS


def for_testing(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of the test network, without ``arg:`` and ``aux:``; names with ``_test`` replace those without.

    Raises:
        ConversionError: a name without either beginning, or two arrays for one name.
    """
    weights: dict[str, np.ndarray] = {}
    for name, array in sorted(params.items(), key=lambda item: '_test' in item[0]):
        kind, colon, plain = name.partition(':')
        if kind not in ('arg', 'aux') or not colon:
            raise ConversionError(f'{name!r:.80} begins with neither arg: nor aux:, unlike the weights of a symbol')
        if plain in weights:
            raise ConversionError(f'{plain!r:.80} is there twice, as arg: and as aux:')
        weights[plain.replace('_test', '')] = array
    return weights


def convert(params: Mapping[str, np.ndarray], *, box_maps: str | None = None) -> dict[str, Tensor]:
    """A state dict for the ``-mxnet`` detectors of the configs, deformable where the file has offsets.

    Args:
        params: as :func:`model_converters.mxnet_params.read_params` returns them.
        box_maps: ``final`` or ``raw``, whether ``BOX_STDS`` are multiplied into the box layer or not; for files
            without a ``_test`` form of it, which settles it.

    Raises:
        ConversionError: layers are missing, left over, or have other shapes than in these networks; or nothing says
            whether the box layer is normalised.
    """
    left = for_testing(params)
    two_fc = any(name.startswith('fc_new_') for name in left)
    network, box_layer = ('Faster R-CNN', 'bbox_pred') if two_fc else ('R-FCN', 'rfcn_bbox')
    depth = find_depth(left, '_weight')
    state: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ConversionError(f'{name!r} is missing: no {network} on ResNet-{depth}, or a truncated file')
        return torch.from_numpy(left.pop(name))

    def layer(name: str, to: str, change: Callable[[Tensor], Tensor] = lambda each: each, dims: int = 4) -> None:
        weight, bias = take(f'{name}_weight'), take(f'{name}_bias')
        check_fit(name, weight, [bias], dims)
        state[f'{to}.weight'], state[f'{to}.bias'] = change(weight), change(bias)

    def offsets(name: str, to: str, channels: int, **how: Any) -> None:
        layer(name, to, **how)
        if len(state[f'{to}.bias']) != channels:
            raise ConversionError(f'{name} has {len(state[f"{to}.bias"])} channels instead of {channels}')

    tested = f'arg:{box_layer}_weight_test' in params
    if not tested and box_maps is None:
        raise ConversionError(
            f'{box_layer}_weight_test is missing, so nothing says whether the box normalisation is in {box_layer}: '
            'name it, --box-maps final (it is) or --box-maps raw (it is not, as in training)'
        )
    raw = box_maps == 'raw' and not tested

    for unit in resnet_units(depth):
        weight = take(f'{unit.conv}_weight')
        statistics = [take(f'{unit.bn}_{each}') for each in ('gamma', 'beta', 'moving_mean', 'moving_var')]
        check_fit(unit.conv, weight, statistics)
        if unit.conv == 'conv1':
            weight = _bgr(weight)
        state[f'{unit.to_conv}.weight'] = weight
        for key, value in zip(STATISTICS, statistics, strict=True):
            state[f'{unit.to_bn}.{key}'] = value
        state[f'{unit.to_bn}.num_batches_tracked'] = torch.zeros((), dtype=torch.long)
    layer('rpn_conv_3x3', 'rpn_head.rpn_conv')
    layer('rpn_cls_score', 'rpn_head.rpn_cls', object_minus_background)
    layer('rpn_bbox_pred', 'rpn_head.rpn_reg')
    deformable = ('offset_weight' if two_fc else 'rfcn_cls_offset_t_weight') in left
    if deformable:
        for unit in resnet_units(depth):
            if unit.conv.startswith('res5') and unit.conv.endswith('branch2b'):
                offsets(f'{unit.conv}_offset', f'{unit.to_conv}.conv_offset', OFFSETS)
    if not two_fc:
        head = 'roi_head.bbox_head'
        layer('conv_new_1', f'{head}.reduce')
        layer('rfcn_cls', f'{head}.cls_maps', background_last)
        layer('rfcn_bbox', f'{head}.reg_maps', lambda each: foreground_boxes(each, raw))
        if deformable:
            maps = len(state[f'{head}.cls_maps.bias'])
            offsets('rfcn_cls_offset_t', f'{head}.cls_offset_maps', 2 * maps, change=_offsets_background_last)
            offsets('rfcn_bbox_offset_t', f'{head}.reg_offset_maps', 2 * BINS)
    else:
        extractor, head = 'roi_head.bbox_roi_extractor', 'roi_head.bbox_head'
        layer('conv_new_1', f'{extractor}.reduce')
        if deformable:
            offsets('offset', f'{extractor}.offset_fc', 2 * BINS, dims=2)
        layer('fc_new_1', f'{head}.shared_fcs.0', dims=2)
        layer('fc_new_2', f'{head}.shared_fcs.1', dims=2)
        layer('cls_score', f'{head}.fc_cls', lambda each: each.roll(-1, 0), dims=2)
        classes = len(state[f'{head}.fc_cls.bias']) - 1
        layer('bbox_pred', f'{head}.fc_reg', lambda each: _box_of_each_class(each, classes, raw), dims=2)
    return finish(state, left, network)


def _bgr(weight: Tensor) -> Tensor:
    """(O, 3, 7, 7) on RGB -> on BGR."""
    if weight.shape[1] != 3:
        raise ConversionError(f'conv1 takes {weight.shape[1]} channels instead of RGB')
    return weight.flip(1)


def _offsets_background_last(maps: Tensor) -> Tensor:
    """((K + 1) * 2 * P * P, ...), background first -> background last; x before y for each class, as before."""
    return torch.cat([maps[2 * BINS :], maps[: 2 * BINS]])


def _box_of_each_class(rows: Tensor, classes: int, raw: bool) -> Tensor:
    """(4 * (K + 1), ...), the background's box first -> (4 * K, ...), normalised deltas."""
    if len(rows) != 4 * (classes + 1):
        raise ConversionError(
            f'bbox_pred has {len(rows)} channels for {classes} classes and background instead of {4 * (classes + 1)}: '
            'one box for each class is expected'
        )
    boxes = rows[4:].unflatten(0, (classes, 4))
    if not raw:
        boxes = boxes / torch.tensor(BOX_STDS).view(4, *[1] * (boxes.dim() - 2))
    return boxes.flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('params', type=Path)
    parser.add_argument('checkpoint', type=Path, help='the .pth to write')
    parser.add_argument(
        '--box-maps',
        choices=['final', 'raw'],
        help='box normalisation is in the box layer or not; for files without _test',
    )
    arguments = parser.parse_args()
    try:
        params = read_params(arguments.params)
        state = convert(params, box_maps=arguments.box_maps)
        depth = '101' if 'backbone.layer3.22.conv1.weight' in state else '50'
        network = 'R-FCN' if 'roi_head.bbox_head.cls_maps.bias' in state else 'Faster R-CNN'
        kind = f'Deformable {network}' if any('offset' in name for name in state) else network
        write_checkpoint(arguments.checkpoint, state, f'{kind} on ResNet-{depth}')
    except (ConversionError, ParamsError, OSError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
