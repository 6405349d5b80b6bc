"""What the converters of R-FCN's published weights share: names of layers, and the order of channels here and there.

Caffe's files and MXNet's name their layers alike, put background first and give each class, or coordinate, 7 x 7 maps
in a row. mmdet's have background last and normalised boxes of the foreground alone.
"""

import io
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone without installing
from mmdet_softnms.files import write_whole

BINS = 49
BOX_STDS = (0.1, 0.1, 0.2, 0.2)
BLOCKS = {'50': (3, 4, 6, 3), '101': (3, 4, 23, 3)}
STATISTICS = ('weight', 'bias', 'running_mean', 'running_var')


class ConversionError(ValueError):
    """The file holds no R-FCN that the converter knows; the message says why, in one line."""


class Unit(NamedTuple):
    """A convolution of ResNet and the batch norm behind it: published names, and names in mmdet's ``ResNet``."""

    conv: str
    bn: str
    to_conv: str
    to_bn: str


def find_depth(names: Collection[str], suffix: str = '') -> str:
    """'50' or '101', from the names of the layers, each with ``suffix`` behind it.

    Raises:
        ConversionError: neither.
    """
    if f'res4b22_branch2a{suffix}' in names:
        return '101'
    if f'res4f_branch2a{suffix}' in names:
        return '50'
    raise ConversionError(
        'neither res4b22_branch2a (ResNet-101) nor res4f_branch2a (ResNet-50) is there, only '
        f'{", ".join(list(names)[:5])!r:.200}, ...: convert R-FCN models on these two networks'
    )


def block_names(depth: str, stage: int) -> list[str]:
    """Published names of the blocks of a stage: a, b, c, ..., or a, b1, b2, ... in ResNet-101's long stages."""
    count = BLOCKS[depth][stage]
    numbered = depth == '101' and stage in (1, 2)
    return ['a', *(f'b{i}' if numbered else chr(ord('a') + i) for i in range(1, count))]


def resnet_units(depth: str) -> Iterator[Unit]:
    """Every convolution of the network, from the input on."""
    yield Unit('conv1', 'bn_conv1', 'backbone.conv1', 'backbone.bn1')
    for stage in range(4):
        for index, block in enumerate(block_names(depth, stage)):
            suffix, to = f'{stage + 2}{block}', f'backbone.layer{stage + 1}.{index}'
            if index == 0:
                branch = f'{suffix}_branch1'
                yield Unit(f'res{branch}', f'bn{branch}', f'{to}.downsample.0', f'{to}.downsample.1')
            for number, letter in enumerate('abc', start=1):
                branch = f'{suffix}_branch2{letter}'
                yield Unit(f'res{branch}', f'bn{branch}', f'{to}.conv{number}', f'{to}.bn{number}')


def check_fit(name: str, weight: Tensor, others: list[Tensor], dims: int = 4) -> None:
    """Refuse a convolution, or a layer of other ``dims``, whose bias or normalisation has another number of channels.

    Raises:
        ConversionError: naming the layer and the shapes.
    """
    if weight.dim() != dims or any(other.numel() != len(weight) for other in others):
        shapes = ', '.join(str(tuple(each.shape)) for each in (weight, *others))
        raise ConversionError(f'layer {name!r} and its normalisation or bias do not fit together: {shapes}')


def object_minus_background(pairs: Tensor) -> Tensor:
    """(2 A, ...), backgrounds first -> (A, ...): softmax over the pair is the sigmoid of the difference, exactly."""
    if len(pairs) % 2:
        raise ConversionError(f'rpn_cls_score has {len(pairs)} channels: pairs of background and object are expected')
    background, foreground = pairs.chunk(2)
    return foreground - background


def background_last(maps: Tensor) -> Tensor:
    """((K + 1) * P * P, ...), background first -> background last."""
    if len(maps) % BINS:
        raise ConversionError(f'rfcn_cls has {len(maps)} channels, no multiple of {BINS}: 7 x 7 bins are expected')
    return torch.cat([maps[BINS:], maps[:BINS]])


def foreground_boxes(maps: Tensor, raw: bool) -> Tensor:
    """(8 * P * P, ...), the background's box first -> (4 * P * P, ...), normalised deltas.

    ``raw``: the published maps give normalised deltas, too; else ``BOX_STDS`` are divided out.
    """
    if len(maps) != 8 * BINS:
        raise ConversionError(
            f'rfcn_bbox has {len(maps)} channels instead of {8 * BINS}: class-agnostic boxes of 7 x 7'
        )
    foreground = maps[4 * BINS :].unflatten(0, (4, BINS))
    if not raw:
        foreground = foreground / torch.tensor(BOX_STDS).view(4, *[1] * (foreground.dim() - 1))
    return foreground.flatten(0, 1)


def finish(state: dict[str, Tensor], left: Collection[str], network: str = 'R-FCN') -> dict[str, Tensor]:
    """The state dict, after the last checks.

    Raises:
        ConversionError: layers of the file are left over, or anchors have no four deltas each.
    """
    if left:
        raise ConversionError(f'these layers belong to no {network}: {", ".join(list(left)[:8])!r:.200}')
    anchors = state['rpn_head.rpn_cls.bias'].numel()
    if state['rpn_head.rpn_reg.bias'].numel() != 4 * anchors:
        raise ConversionError(f'rpn_bbox_pred does not have 4 channels for each of the {anchors} anchors')
    return {key: value.contiguous() for key, value in state.items()}


def write_checkpoint(path: Path, state: dict[str, Tensor], network: str) -> None:
    """Write the checkpoint as a whole or not at all, and print what is in it."""
    content = io.BytesIO()
    torch.save({'meta': {}, 'state_dict': state}, content)
    write_whole(path, content.getbuffer())
    head = 'roi_head.bbox_head'
    maps = state.get(f'{head}.cls_maps.bias')  # R-FCN's; the other heads have a fully connected layer
    classes = (len(state[f'{head}.fc_cls.bias']) if maps is None else len(maps) // BINS) - 1
    anchors = state['rpn_head.rpn_cls.bias'].numel()
    print(f'{path}: {network}, {classes} classes, {anchors} anchors, {len(state)} tensors')
