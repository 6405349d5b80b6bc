"""Conventions of Deformable-ConvNets (MXNet) that its published weights rely on, where they differ from Caffe's.

Boxes hold their last pixel, as in :mod:`mmdet_softnms.models.caffe`, and a decoded box does, too: in py-faster-rcnn it
ends a pixel later. A deformable convolution sees nothing outside the map, and repeats its last row and column.
"""

from typing import Any

import torch
from mmcv.ops import DeformConv2dPack, deform_conv2d
from torch import Tensor

from mmdet_softnms.models.caffe import CaffeDeltaXYWHBBoxCoder
from mmdet_softnms.registry import MODELS, TASK_UTILS


@TASK_UTILS.register_module()
class MXNetDeltaXYWHBBoxCoder(CaffeDeltaXYWHBBoxCoder):
    """``bbox_transform.py`` of Deformable-ConvNets: as :class:`CaffeDeltaXYWHBBoxCoder`, decoded boxes a pixel shorter.

    Only then does decoding give back what was encoded.
    """

    def decode(
        self, bboxes: Tensor, pred_bboxes: Tensor, max_shape: Any = None, wh_ratio_clip: float | None = 16 / 1000
    ) -> Tensor:
        """Boxes of the shape of ``pred_bboxes``; ``max_shape``: (height, width) of the image, to clip to."""
        boxes = super().decode(bboxes, pred_bboxes, None, wh_ratio_clip)
        corners = boxes.unflatten(-1, (-1, 2, 2)) - boxes.new_tensor([[0, 0], [1, 1]])
        if max_shape is not None and self.clip_border:
            height, width = max_shape[:2]
            corners = torch.minimum(corners.clamp(min=0), corners.new_tensor([width - 1, height - 1]))
        return corners.flatten(-3)


@MODELS.register_module()
class MXNetDeformConv2d(DeformConv2dPack):
    """mmcv's ``DCN`` with the border of Deformable-ConvNets (``deformable_im2col.cuh``); same weights.

    A sample at row y of a map of H rows counts where ``0 <= y < H``, and between the last row and H it is the last row;
    columns alike. mmcv fades it to 0 over the pixel before the first row and behind the last. Samples are moved before
    mmcv's operator takes them: so far out that they are 0, or onto the last row or column.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, C, H, W); as mmcv's."""
        offset = self.conv_offset(x)
        return deform_conv2d(
            x,
            self._within(offset, x.shape[2:]),
            self.weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deform_groups,
            False,
            self.im2col_step,
        )

    def _within(self, offset: Tensor, size: torch.Size) -> Tensor:
        """Offsets (N, G * P * 2, H', W'), y before x, for P places of the kernel."""
        rows, columns = self.kernel_size
        # Where each place of the kernel looks without an offset: y (P, H', 1) and x (P, 1, W').
        y, x = (
            (torch.arange(count, device=offset.device) * dilation)[:, None]
            + torch.arange(steps, device=offset.device) * stride
            - padding
            for count, dilation, steps, stride, padding in zip(
                self.kernel_size, self.dilation, offset.shape[2:], self.stride, self.padding, strict=True
            )
        )
        starts = (y.repeat_interleave(columns, 0)[:, :, None], x.repeat(rows, 1)[:, None])
        moved = offset.unflatten(1, (self.deform_groups, rows * columns, 2)).unbind(3)
        places = [start + by for start, by in zip(starts, moved, strict=True)]
        outside = torch.stack([(p < 0) | (p >= n) for p, n in zip(places, size, strict=True)]).any(dim=0)
        kept = [
            torch.where(outside, -2.0 - start, torch.where(place > n - 1, n - 1.0 - start, by))
            for start, place, by, n in zip(starts, places, moved, size, strict=True)
        ]
        return torch.stack(kept, dim=3).flatten(1, 3).to(offset.dtype)
