"""Conventions of Deformable-ConvNets, against their definitions; tests/test_tools has MXNet itself."""

import math

import pytest
import torch
from mmcv.ops import DeformConv2dPack
from mmdet.registry import MODELS, TASK_UTILS

from mmdet_softnms.models.mxnet import MXNetDeformConv2d

IMAGE = (40, 60)


def test_boxes_keep_their_last_pixel():
    """``bbox_transform.py``: what was encoded is decoded, and clipped to the last pixel."""
    coder = TASK_UTILS.build(dict(type='mmdet_softnms.MXNetDeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]))
    rois = torch.tensor([[2.0, 3, 20, 30], [10, 5, 10, 5], [30, 20, 59, 39]])
    boxes = torch.tensor([[4.0, 1, 25, 28], [9, 5, 12, 7], [33, 22, 59, 39]])
    torch.testing.assert_close(coder.decode(rois, coder.encode(rois, boxes), IMAGE), boxes)
    torch.testing.assert_close(coder.decode(rois, torch.zeros(3, 4), IMAGE), rois)
    outside = coder.decode(rois, torch.tensor([[30.0, 30, 0, 0], [-30, -300, 5, 5], [0, 0, 10, 10]]), IMAGE)
    half = (math.e - 1) / 2  # a width of e, of which one is the last pixel
    expected = [[59, 39, 59, 39], [7 - half, 0, 7 + half, 0], [0, 0, 59, 39]]
    torch.testing.assert_close(outside, torch.tensor(expected))
    # One box for each of several classes.
    deltas = torch.randn(3, 8)
    both = coder.decode(rois, deltas, IMAGE)
    for part in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(both[:, part], coder.decode(rois, deltas[:, part].contiguous(), IMAGE))
    assert both.shape == (3, 8)


def _by_definition(conv, x):
    """``deformable_im2col`` and a product, place by place."""
    offset = conv.conv_offset(x)[0].unflatten(0, (conv.deform_groups, 9, 2))
    _, channels, height, width = x.shape
    out_height, out_width = offset.shape[-2:]
    columns = torch.zeros(channels, 9, out_height, out_width)
    outside = last = 0
    for c in range(channels):
        group = c // (channels // conv.deform_groups)
        for place in range(9):
            for i in range(out_height):
                for j in range(out_width):
                    y, x_ = (
                        float(at * conv.stride[0] - conv.padding[0] + at_kernel * conv.dilation[0])
                        + float(offset[group, place, axis, i, j])
                        for axis, (at, at_kernel) in enumerate(((i, place // 3), (j, place % 3)))
                    )
                    if not (0 <= y < height and 0 <= x_ < width):
                        outside += 1
                        continue
                    last += y > height - 1 or x_ > width - 1
                    y, x_ = min(y, height - 1), min(x_, width - 1)
                    top, left = math.floor(y), math.floor(x_)
                    for row, weight_y in ((top, top + 1 - y), (min(top + 1, height - 1), y - top)):
                        for column, weight_x in ((left, left + 1 - x_), (min(left + 1, width - 1), x_ - left)):
                            columns[c, place, i, j] += weight_y * weight_x * x[0, c, row, column]
    assert outside > 20 and last > 20
    return torch.einsum('ock,ckhw->ohw', conv.weight.flatten(2), columns)[None]


@pytest.mark.parametrize('stride', [1, 2])
@torch.no_grad()
def test_the_border_of_deformable_convolutions(stride):
    torch.manual_seed(0)
    settings = dict(stride=stride, padding=2, dilation=2, deform_groups=2, bias=False)
    conv = MODELS.build(
        dict(type='mmdet_softnms.MXNetDeformConv2d', in_channels=4, out_channels=3, kernel_size=3, **settings)
    )
    assert type(conv) is MXNetDeformConv2d
    torch.nn.init.normal_(conv.conv_offset.weight, std=0.4)
    x = torch.randn(1, 4, 6, 9)
    torch.testing.assert_close(conv(x), _by_definition(conv, x), rtol=1e-4, atol=1e-5)
    # The same weights in mmcv's layer: equal where nothing reaches the border, which here is nowhere near true.
    mmcv = DeformConv2dPack(4, 3, 3, **settings)
    mmcv.load_state_dict(conv.state_dict())
    assert (mmcv(x) - conv(x)).abs().max() > 0.1
    conv.conv_offset.weight.zero_()
    mmcv.conv_offset.weight.zero_()
    torch.testing.assert_close(conv(x), mmcv(x))


def test_deformable_convolutions_learn():
    torch.manual_seed(0)
    conv = MXNetDeformConv2d(4, 3, 3, padding=1, deform_groups=2)
    torch.nn.init.normal_(conv.conv_offset.weight, std=0.4)
    x = torch.randn(2, 4, 6, 9, requires_grad=True)
    conv(x).square().sum().backward()
    for value in (x, conv.weight, conv.conv_offset.weight, conv.conv_offset.bias):
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().max() > 0
