"""Turn a ``.params`` of Deformable-ConvNets (R-FCN, Deformable R-FCN; ResNet-101, ResNet-50) into an mmdet checkpoint.

    python tools/model_converters/rfcn_mxnet_to_mmdet.py rfcn_dcn_coco-0000.params deformable-rfcn_r101_coco.pth

The result loads into ``configs/rfcn/rfcn_r101-mxnet_*.py`` or ``deformable-rfcn_r101-mxnet_*.py``, which have the
authors' pixel means, boxes and thresholds. The file is read as what it is, a list of arrays; nothing in it is executed,
and MXNet is not needed. Network, classes and anchors are those of the layers found. What changes:

* The first convolution takes RGB there and BGR in the configs: its input channels are turned round.
* A name with ``_test`` replaces the one without, as at the authors' test time. The box layer has one, with the box
  normalisation (stds .1 .1 .2 .2) multiplied in; it is divided out again, since mmdet's coder applies it. Without one,
  say which it is: ``--box-maps final`` (multiplied in) or ``--box-maps raw`` (not, as in training).
* Background, the first class in MXNet, becomes the last, in the offsets of the bins as well. Of the box maps, the
  foreground half stays.
* The RPN's pairs of logits become one: softmax over (background, object) is the sigmoid of object - background.

Offsets keep their order: y before x at each place of a deformable convolution, in 4 groups of channels; x before y for
the bins, for each class. What still differs from MXNet: box deltas are cut at log(1000 / 16); equal scores come in
another order; an image with fewer than 300 proposals has no repeated ones.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools
from model_converters.mxnet_params import ParamsError, read_params
from model_converters.rfcn_weights import (
    BINS,
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
    """A state dict for the detectors of ``configs/rfcn``, deformable where the file has offsets.

    Args:
        params: as :func:`model_converters.mxnet_params.read_params` returns them.
        box_maps: ``final`` or ``raw``, whether ``BOX_STDS`` are multiplied into the box layer or not; for files
            without ``rfcn_bbox_weight_test``, which settles it.

    Raises:
        ConversionError: layers are missing, left over, or have other shapes than in R-FCN; or nothing says whether the
            box layer is normalised.
    """
    left = for_testing(params)
    depth = find_depth(left, '_weight')
    state: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ConversionError(f'{name!r} is missing: no R-FCN on ResNet-{depth}, or a truncated file')
        return torch.from_numpy(left.pop(name))

    def conv(name: str, to: str, change: Callable[[Tensor], Tensor] = lambda each: each) -> None:
        weight, bias = take(f'{name}_weight'), take(f'{name}_bias')
        check_fit(name, weight, [bias])
        state[f'{to}.weight'], state[f'{to}.bias'] = change(weight), change(bias)

    def offsets(name: str, to: str, channels: int, change: Callable[[Tensor], Tensor] = lambda each: each) -> None:
        conv(name, to, change)
        if len(state[f'{to}.bias']) != channels:
            raise ConversionError(f'{name} has {len(state[f"{to}.bias"])} channels instead of {channels}')

    tested = any('rfcn_bbox_weight_test' in name for name in params)
    if not tested and box_maps is None:
        raise ConversionError(
            'rfcn_bbox_weight_test is missing, so nothing says whether the box normalisation is in rfcn_bbox: '
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
    conv('rpn_conv_3x3', 'rpn_head.rpn_conv')
    conv('rpn_cls_score', 'rpn_head.rpn_cls', object_minus_background)
    conv('rpn_bbox_pred', 'rpn_head.rpn_reg')
    conv('conv_new_1', 'roi_head.bbox_head.reduce')
    conv('rfcn_cls', 'roi_head.bbox_head.cls_maps', background_last)
    conv('rfcn_bbox', 'roi_head.bbox_head.reg_maps', lambda each: foreground_boxes(each, raw))
    if 'rfcn_cls_offset_t_weight' in left:
        for unit in resnet_units(depth):
            if unit.conv.startswith('res5') and unit.conv.endswith('branch2b'):
                offsets(f'{unit.conv}_offset', f'{unit.to_conv}.conv_offset', OFFSETS)
        maps = len(state['roi_head.bbox_head.cls_maps.bias'])
        offsets('rfcn_cls_offset_t', 'roi_head.bbox_head.cls_offset_maps', 2 * maps, _offsets_background_last)
        offsets('rfcn_bbox_offset_t', 'roi_head.bbox_head.reg_offset_maps', 2 * BINS)
    return finish(state, left)


def _bgr(weight: Tensor) -> Tensor:
    """(O, 3, 7, 7) on RGB -> on BGR."""
    if weight.shape[1] != 3:
        raise ConversionError(f'conv1 takes {weight.shape[1]} channels instead of RGB')
    return weight.flip(1)


def _offsets_background_last(maps: Tensor) -> Tensor:
    """((K + 1) * 2 * P * P, ...), background first -> background last; x before y for each class, as before."""
    return torch.cat([maps[2 * BINS :], maps[: 2 * BINS]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('params', type=Path)
    parser.add_argument('checkpoint', type=Path, help='the .pth to write')
    parser.add_argument(
        '--box-maps', choices=['final', 'raw'], help='box normalisation is in rfcn_bbox or not; for files without _test'
    )
    arguments = parser.parse_args()
    try:
        params = read_params(arguments.params)
        state = convert(params, box_maps=arguments.box_maps)
        depth = '101' if 'backbone.layer3.22.conv1.weight' in state else '50'
        kind = 'Deformable R-FCN' if 'roi_head.bbox_head.cls_offset_maps.bias' in state else 'R-FCN'
        write_checkpoint(arguments.checkpoint, state, f'{kind} on ResNet-{depth}')
    except (ConversionError, ParamsError, OSError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
