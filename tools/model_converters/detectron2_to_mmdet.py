"""Convert a detector of Detectron2's model zoo to a native checkpoint of mmdet.

    python tools/model_converters/detectron2_to_mmdet.py model_final_b275ba.pkl faster-rcnn_r50_fpn_1x.pth

Faster and Mask R-CNN with FPN or C4, Cascade R-CNN and RetinaNet on ResNet-50 and -101, a ``.pkl`` of the zoo or a
``.pth`` of Detectron2's trainer. The checkpoint fits mmdet's configs with a backbone of Caffe's style (stride in the
1x1 convolution; configs/detectron2 has them); the network is the same, and gives the same numbers.
``--wrapper`` writes a checkpoint for mmdet's Detectron2Wrapper instead, of any model: names with a prefix.

What is not a matter of names:
* Anchors: Detectron2 counts sizes, then ratios; mmdet ratios, then sizes. Channels of RPN and RetinaNet are reordered.
* Deltas of a cascade's third stage: divided by 30 and 15 in Detectron2, times 0.033 and 0.067 in mmdet; the layer is
  scaled. Cascade R-CNN: mmdet averages the logits of the stages, Detectron2 their probabilities.
* RetinaNet: P7 follows a ReLU in Detectron2: ``neck=dict(relu_before_extra_convs=True)``.
* Frozen batch norms become batch norms.

Both agree on the order of classes (background last), of box coordinates, of channels (BGR), and of the first fc layer's
input (C, H, W).
"""

import argparse
import io
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools
from model_converters.detectron2_weights import read_detectron2

from mmdet_softnms.files import CheckpointError, write_whole

BLOCKS = {6: (3, 4, 6, 3), 23: (3, 4, 23, 3)}  # of the stages of ResNet-50 and -101, by those of the third
RATIOS = 3  # of anchors, in every zoo model
#: Weights of Detectron2's third stage beside mmdet's target_stds.
THIRD_STAGE = (1 / (30 * 0.033), 1 / (30 * 0.033), 1 / (15 * 0.067), 1 / (15 * 0.067))


class ConversionError(ValueError):
    """The file holds no detector that the converter knows; the message says why, in one line."""


class _Weights:
    """The weights of a file; what is taken under a new name is no longer left."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.left = dict(weights)
        self.state: dict[str, Tensor] = {}

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.left)

    def count(self, pattern: str) -> int:
        """How many different numbers stand where the pattern has its group."""
        return len({found[1] for name in self.left if (found := re.match(pattern, name))})

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise ConversionError(f'{name} is missing: no detector that is converted, or a truncated file')
        return self.left.pop(name).float()

    def layer(self, name: str, to: str, order: Tensor | None = None, factors: Tensor | None = None) -> None:
        """A convolution or fc layer with its bias; ``order`` of its output channels, ``factors`` for them."""
        for kind in ('weight', 'bias'):
            value = self.take(f'{name}.{kind}')
            value = value if order is None else value[order]
            if factors is not None:
                value = value * factors.view(-1, *[1] * (value.dim() - 1))
            self.state[f'{to}.{kind}'] = value

    def conv_and_norm(self, name: str, to_conv: str, to_norm: str) -> None:
        weight = self.take(f'{name}.weight')
        self.state[f'{to_conv}.weight'] = weight
        for kind in ('weight', 'bias', 'running_mean', 'running_var'):
            self.state[f'{to_norm}.{kind}'] = value = self.take(f'{name}.norm.{kind}')
            if value.shape != weight.shape[:1]:
                raise ConversionError(f'{name} has {len(weight)} channels and its norm {tuple(value.shape)}')
        self.left.pop(f'{name}.norm.num_batches_tracked', None)
        self.state[f'{to_norm}.num_batches_tracked'] = torch.zeros((), dtype=torch.long)


def convert(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights of Detectron2 under mmdet's names, and what the network is, in words.

    Raises:
        ConversionError: weights are missing, left over, or of another network.
    """
    found = _Weights(weights)
    fpn = found.has('backbone.bottom_up.')
    bottom_up = 'backbone.bottom_up' if fpn else 'backbone'
    third = found.count(rf'{re.escape(bottom_up)}\.res4\.(\d+)\.')
    if third not in BLOCKS:
        raise ConversionError(
            f'res4 has {third} blocks instead of 6 (ResNet-50) or 23 (ResNet-101): of {len(weights)} weights the first '
            f'are {", ".join(list(weights)[:3])!r:.160}'
        )
    found.conv_and_norm(f'{bottom_up}.stem.conv1', 'backbone.conv1', 'backbone.bn1')
    for stage, count in enumerate(BLOCKS[third][: 4 if fpn else 3], start=1):
        _stage(found, f'{bottom_up}.res{stage + 1}', f'backbone.layer{stage}', count)
    retinanet = found.has('head.')
    if fpn:
        first = 3 if retinanet else 2
        for level in range(first, 6):
            found.layer(f'backbone.fpn_lateral{level}', f'neck.lateral_convs.{level - first}.conv')
            found.layer(f'backbone.fpn_output{level}', f'neck.fpn_convs.{level - first}.conv')
    if retinanet:
        name = _retinanet(found)
    else:
        found.layer('proposal_generator.rpn_head.conv', 'rpn_head.rpn_conv')
        _anchors(found, 'proposal_generator.rpn_head.objectness_logits', 'rpn_head.rpn_cls')
        _anchors(found, 'proposal_generator.rpn_head.anchor_deltas', 'rpn_head.rpn_reg', 4)
        name = _roi_heads(found, fpn, BLOCKS[third])
    if found.left:
        raise ConversionError(f'these weights belong to no {name}: {", ".join(list(found.left)[:6])!r:.200}')
    depth = {6: 50, 23: 101}[third]
    return {key: value.contiguous() for key, value in found.state.items()}, f'{name}, ResNet-{depth}'


def _stage(found: _Weights, name: str, to: str, count: int) -> None:
    for block in range(count):
        if f'{name}.{block}.shortcut.weight' in found.left:
            found.conv_and_norm(f'{name}.{block}.shortcut', f'{to}.{block}.downsample.0', f'{to}.{block}.downsample.1')
        elif block == 0:
            raise ConversionError(f'{name}.0.shortcut is missing: no ResNet with bottlenecks')
        for number in (1, 2, 3):
            found.conv_and_norm(
                f'{name}.{block}.conv{number}', f'{to}.{block}.conv{number}', f'{to}.{block}.bn{number}'
            )
        middle = found.state[f'{to}.{block}.conv2.weight']
        if middle.dim() != 4 or middle.shape[0] != middle.shape[1]:
            raise ConversionError(f'{name}.{block}.conv2 is {tuple(middle.shape)}: ResNeXt is not converted')


def _anchors(found: _Weights, name: str, to: str, each: int = 1) -> None:
    """A layer with ``each`` channels for every anchor; sizes, then ratios -> ratios, then sizes."""
    channels = len(found.left.get(f'{name}.bias', ()))
    if not channels or channels % (RATIOS * each):
        raise ConversionError(f'{name} has {channels} channels, not {each} for each anchor of {RATIOS} ratios')
    order = torch.arange(channels).view(-1, RATIOS, each).transpose(0, 1).flatten()
    found.layer(name, to, order)


def _retinanet(found: _Weights) -> str:
    for number in (6, 7):
        found.layer(f'backbone.top_block.p{number}', f'neck.fpn_convs.{number - 3}.conv')
    for mine, theirs in (('cls', 'cls'), ('bbox', 'reg')):
        for number in range(found.count(rf'head\.{mine}_subnet\.(\d+)\.weight')):
            found.layer(f'head.{mine}_subnet.{2 * number}', f'bbox_head.{theirs}_convs.{number}.conv')
    deltas = found.left.get('head.bbox_pred.bias', torch.empty(0))
    scores = found.left.get('head.cls_score.bias', torch.empty(0))
    anchors = len(deltas) // 4
    if not anchors or len(scores) % anchors:
        raise ConversionError(f'head.bbox_pred has {len(deltas)} channels and head.cls_score {len(scores)}')
    _anchors(found, 'head.cls_score', 'bbox_head.retina_cls', len(scores) // anchors)
    _anchors(found, 'head.bbox_pred', 'bbox_head.retina_reg', 4)
    return f'RetinaNet, {len(scores) // anchors} classes'


def _roi_heads(found: _Weights, fpn: bool, blocks: tuple[int, ...]) -> str:
    cascade = found.has('roi_heads.box_predictor.0.')
    if not fpn:
        _stage(found, 'roi_heads.res5', 'roi_head.shared_head.layer4', blocks[3])
    stages = list(_stages(found, cascade))
    for number, (suffix, to) in enumerate(stages):
        for layer in range(found.count(rf'roi_heads\.box_head{re.escape(suffix)}\.fc(\d+)\.weight')):
            found.layer(f'roi_heads.box_head{suffix}.fc{layer + 1}', f'{to}.shared_fcs.{layer}')
        found.layer(f'roi_heads.box_predictor{suffix}.cls_score', f'{to}.fc_cls')
        boxes = len(found.left.get(f'roi_heads.box_predictor{suffix}.bbox_pred.bias', ()))
        factors = torch.tensor(THIRD_STAGE).repeat(boxes // 4) if number == 2 and boxes % 4 == 0 else None
        found.layer(f'roi_heads.box_predictor{suffix}.bbox_pred', f'{to}.fc_reg', factors=factors)
    masks = found.has('roi_heads.mask_head.')
    if masks:
        for number in range(found.count(r'roi_heads\.mask_head\.mask_fcn(\d+)\.weight')):
            found.layer(f'roi_heads.mask_head.mask_fcn{number + 1}', f'roi_head.mask_head.convs.{number}.conv')
        found.layer('roi_heads.mask_head.deconv', 'roi_head.mask_head.upsample')
        found.layer('roi_heads.mask_head.predictor', 'roi_head.mask_head.conv_logits')
    if masks and cascade:  # mmdet has one for each stage, and averages what they give
        start = 'roi_head.mask_head.'
        for name in [one for one in found.state if one.startswith(start)]:
            value = found.state.pop(name)
            found.state |= {f'{start}{stage}.{name.removeprefix(start)}': value.clone() for stage in range(3)}
    classes = len(found.state[f'{stages[0][1]}.fc_cls.bias']) - 1
    words = ['Cascade'] * cascade + ['Mask' if masks else 'Faster'] * (masks or not cascade)
    return f'{" ".join(words)} R-CNN with {"FPN" if fpn else "C4"}, {classes} classes'


def _stages(found: _Weights, cascade: bool) -> Iterator[tuple[str, str]]:
    if not cascade:
        yield '', 'roi_head.bbox_head'
        return
    count = found.count(r'roi_heads\.box_predictor\.(\d+)\.')
    if count != 3:
        raise ConversionError(f'the cascade has {count} stages instead of 3')
    for stage in range(count):
        yield f'.{stage}', f'roi_head.bbox_head.{stage}'


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', type=Path, help="a .pkl of Detectron2's model zoo, or a .pth of its trainer")
    parser.add_argument('checkpoint', type=Path, help='the .pth to write')
    parser.add_argument('--wrapper', action='store_true', help="for mmdet's Detectron2Wrapper")
    options = parser.parse_args(arguments)
    try:
        weights = read_detectron2(options.model)
        if options.wrapper:
            state, what = (
                {f'd2_model.{name}': value for name, value in weights.items()},
                "for mmdet's Detectron2Wrapper",
            )
        else:
            state, what = convert(weights)
        content = io.BytesIO()
        torch.save({'meta': {}, 'state_dict': state}, content)
        write_whole(options.checkpoint, content.getbuffer())
    except ConversionError as error:
        sys.exit(f'error: {options.model}: {error}')
    except (CheckpointError, OSError) as error:
        sys.exit(f'error: {error}')
    print(f'{options.checkpoint}: {what}, {len(state)} tensors')


if __name__ == '__main__':
    main()
