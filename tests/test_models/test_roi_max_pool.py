"""roi_max_pool against a loop written from MXNet's ``roi_pooling.cc``."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdet_softnms.models.roi_max_pool import roi_max_pool

# A map of 23 x 40: whole, one pixel, inverted, over every border, outside, and edges that round up and away from zero.
BOXES = [
    [0, 0, 639, 367], [33, 33, 33, 33], [300, 200, 100, 90], [-70, -40, 200, 150], [500, 300, 800, 500],
    [700, 500, 900, 600], [8, 24, 104, 120], [-24, -8, 40, 56], [631.5, 359.5, 640, 368], [0, 100, 639, 104],
]  # fmt: skip


def by_definition(maps: Tensor, rois: Tensor, bins: int) -> Tensor:
    f = np.float32

    def edges(start: float, end: float, index: int, size: int) -> tuple[int, int]:
        first, last = (int(math.copysign(math.floor(abs(f(at) / f(16)) + 0.5), at)) for at in (start, end))
        step = f(max(last - first + 1, 1)) / f(bins)
        lower, upper = math.floor(f(index) * step) + first, math.ceil(f(index + 1) * step) + first
        return min(max(lower, 0), size), min(max(upper, 0), size)

    out = torch.zeros(len(rois), maps.shape[1], bins, bins)
    for r, i, j in np.ndindex(len(rois), bins, bins):
        x1, y1, x2, y2 = rois[r, 1:].tolist()
        top, bottom = edges(y1, y2, i, maps.shape[2])
        left, right = edges(x1, x2, j, maps.shape[3])
        if bottom > top and right > left:
            out[r, :, i, j] = maps[int(rois[r, 0]), :, top:bottom, left:right].amax(dim=(1, 2))
    return out


@pytest.mark.parametrize('bins', [1, 3, 7])
def test_equals_the_definition(bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 23, 40, generator=generator)
    corners = torch.rand(30, 2, generator=generator) * torch.tensor([700, 450]) - 40
    random = torch.cat([corners, corners + torch.rand(30, 2, generator=generator) * 500], dim=1)
    boxes = torch.cat([torch.tensor(BOXES), random])
    rois = torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], dim=1)
    assert roi_max_pool(maps, rois, bins).equal(by_definition(maps, rois, bins))
    assert roi_max_pool(maps.half(), rois, bins).equal(by_definition(maps.half(), rois, bins).half())
    assert roi_max_pool(maps, rois[:0], bins).shape == (0, 5, bins, bins)


def test_the_gradient_goes_to_the_maximum() -> None:
    maps = torch.randn(1, 2, 23, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    rois = torch.tensor([[0.0, 20, 30, 500, 300], [0, 100, 0, 639, 200]])
    weights = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    gradients = [
        torch.autograd.grad((pool(maps, rois, 3) * weights).sum(), maps)[0] for pool in (roi_max_pool, by_definition)
    ]
    torch.testing.assert_close(*gradients)
    assert 20 < (gradients[0] != 0).sum() <= 36


@pytest.mark.parametrize(
    ('maps', 'rois', 'message'),
    [
        ((2, 7, 10), (1, 5), 'maps must be'),
        ((2, 3, 7, 10), (1, 4), 'rois .R, 5.'),
        ((2, 3, 7, 10), (1, 5), 'an image index, 0 to 1'),
    ],
)
def test_errors(maps: tuple[int, ...], rois: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roi_max_pool(torch.zeros(maps), torch.full(rois, 2.0))
