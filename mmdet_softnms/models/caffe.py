"""Conventions of the Caffe detectors (py-faster-rcnn, R-FCN) that their published weights rely on.

Boxes there hold their last pixel: ``[x1, y1, x2, y2]`` is ``x2 - x1 + 1`` wide. mmdet's boxes end at an edge. The
parts below let a model with such weights compute what it computed in Caffe; for models trained here they are only worth
having where numbers are to be compared.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import VGG
from mmdet.models.backbones import ResNet
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmdet.structures.bbox import get_box_tensor
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_softnms.registry import MODELS, TASK_UTILS


@MODELS.register_module()
class CaffeResNet(ResNet):
    """mmdet's ``ResNet`` with the first pooling of the original ResNets: not padded, rounded up.

    The map has the same size for even inputs, but each window begins one pixel further to the lower right. Use it with
    ``style='caffe'``.
    """

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        super()._make_stem_layer(in_channels, stem_channels)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)


@MODELS.register_module()
class CaffeVGG(VGG, BaseModule):
    """VGG up to conv5_3, stride 16, poolings rounded up as in Caffe; mmcv's layers and names.

    Args:
        depth: 11, 13, 16 or 19.
        frozen_stages: so many stages are not trained; py-faster-rcnn froze conv1 and conv2.
        init_cfg: as for every module of mmengine.
    """

    def __init__(self, depth: int = 16, frozen_stages: int = 2, init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(depth, with_last_pool=False, ceil_mode=True, out_indices=(4,), frozen_stages=frozen_stages)
        self.init_cfg = init_cfg

    def init_weights(self, pretrained: None = None) -> None:
        """By ``init_cfg``, not by mmcv's own ``VGG.init_weights``."""
        BaseModule.init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """``x``: images (N, 3, H, W). Returns one map (N, 512, H / 16, W / 16)."""
        return (super().forward(x),)


@TASK_UTILS.register_module()
class CaffeAnchorGenerator(AnchorGenerator):
    """The anchors of py-faster-rcnn's ``generate_anchors.py``: sizes rounded for each ratio, last pixel included.

    Args:
        strides, ratios, **kwargs: the arguments of mmdet's ``AnchorGenerator``. Ratios are taken in float64, as there:
            in float32 a height such as 5 * 0.1 would be rounded up.
    """

    def __init__(self, strides: Any, ratios: Sequence[float], *args: Any, **kwargs: Any) -> None:
        self._ratios = torch.tensor(ratios, dtype=torch.float64)
        super().__init__(strides, ratios, *args, **kwargs)

    def gen_base_anchors(self) -> list[Tensor]:
        """Anchors (A, 4) of the cell at the origin, one Tensor a level."""
        self.ratios = self._ratios
        anchors: list[Tensor] = super().gen_base_anchors()
        return anchors

    def gen_single_level_base_anchors(
        self, base_size: float, scales: Tensor, ratios: Tensor, center: tuple[float, float] | None = None
    ) -> Tensor:
        """Anchors (A, 4) of the cell at the origin, ratios outside, scales inside; Tensor arguments are 1-D."""
        x_center, y_center = center or (0.5 * (base_size - 1), 0.5 * (base_size - 1))
        area = torch.tensor(float(base_size), dtype=torch.float64) ** 2
        widths = (area / ratios.double()).sqrt().round()  # to even for halves, as numpy's
        heights = (widths * ratios).round()
        widths = (widths[:, None] * scales).flatten()
        heights = (heights[:, None] * scales).flatten()
        x, y = 0.5 * (widths - 1), 0.5 * (heights - 1)
        return torch.stack([x_center - x, y_center - y, x_center + x, y_center + y], dim=-1).float()


@TASK_UTILS.register_module()
class CaffeDeltaXYWHBBoxCoder(DeltaXYWHBBoxCoder):
    """``bbox_transform.py`` of py-faster-rcnn: ``DeltaXYWHBBoxCoder`` for boxes that hold their last pixel.

    Their widths are one larger; decoded boxes end half a width right of the centre, not a pixel less, and are clipped
    to the last pixel, both as in Caffe.

    Args:
        cut_deltas: cut deltas of widths and heights at log(1000 / 16), as mmdet does. In Caffe they are not cut.
        *args, **kwargs: the arguments of mmdet's ``DeltaXYWHBBoxCoder``.
    """

    def __init__(self, *args: Any, cut_deltas: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cut_deltas = cut_deltas

    def encode(self, bboxes: Tensor, gt_bboxes: Tensor) -> Tensor:
        """Deltas (N, 4) from ``bboxes`` to ``gt_bboxes``, both (N, 4) xyxy."""
        return super().encode(_with_last_pixel(bboxes), _with_last_pixel(gt_bboxes))

    def decode(
        self, bboxes: Tensor, pred_bboxes: Tensor, max_shape: Any = None, wh_ratio_clip: float | None = 16 / 1000
    ) -> Tensor:
        """Boxes of the shape of ``pred_bboxes``; ``max_shape``: (height, width) of the image, to clip to."""
        inner = None if max_shape is None else tuple(size - 1 for size in max_shape[:2])
        if not self.cut_deltas:
            wh_ratio_clip = sys.float_info.min  # its logarithm is beyond what float32 can take the exponential of
        return super().decode(_with_last_pixel(bboxes), pred_bboxes, inner, wh_ratio_clip)


def _with_last_pixel(bboxes: Tensor) -> Tensor:
    """``xyxy`` to the edge behind the last pixel."""
    bboxes = get_box_tensor(bboxes)
    return bboxes + bboxes.new_tensor([0, 0, 1, 1])
