"""ps_roi_pool against loops written from each kind's definition, one output number at a time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from mmdet_softnms.models import ps_roi_pool as module
from mmdet_softnms.models.ps_roi_pool import KINDS, ps_roi_pool

SCALE = 1 / 16
# xyxy in pixels of an image of 160 x 112 (a map of 10 x 7): inside, one pixel, no area, inverted, partly and wholly
# outside, larger than the image, halves and bin edges that fall on whole numbers, a sliver.
BOXES = [
    [10, 20, 100, 90], [33, 33, 33, 33], [48, 48, 48, 80], [90, 70, 40, 20], [-60, -40, 50, 30], [120, 80, 260, 200],
    [400, 400, 500, 480], [-300, -300, -200, -250], [-100, -100, 400, 300], [0.5, 1.5, 110.5, 110.5],
    [16, 16, 127, 127], [0, 0, 159, 111], [24.49, 7.51, 87.5, 100.49], [5, 50, 150, 52],
]  # fmt: skip


def c_round(value: float) -> float:
    return math.copysign(math.floor(abs(value) + 0.5), value)


def rectangle(kind: str, start: np.float32, end: np.float32, index: int, bins: int, size: int) -> tuple[int, int]:
    """First pixel of a bin and the one behind its last, in float32 and in the order of the original code."""
    f = np.float32
    if kind == 'caffe':
        first = f(c_round(start)) * f(SCALE)
        extent = max((f(c_round(end)) + f(1)) * f(SCALE) - first, f(0.1))
        step = extent / f(bins)
        lower, upper = math.floor(f(index) * step + first), math.ceil(f(index + 1) * step + first)
        return min(max(lower, 0), size), min(max(upper, 0), size)
    whole = int(c_round(start * f(SCALE)))
    step = f(max(int(c_round(end * f(SCALE))) - whole, 1)) / f(bins)
    lower, upper = math.floor(f(index) * step) + whole, math.ceil(f(index + 1) * step) + whole
    return min(max(lower, 0), size - 1), min(max(upper, 0), size - 1)


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    x1, y1 = math.floor(x), math.floor(y)
    x2, y2 = math.ceil(x), math.ceil(y)
    dx, dy = x - x1, y - y1
    above = (1 - dx) * image[y1, x1] + dx * image[y1, x2]
    below = (1 - dx) * image[y2, x1] + dx * image[y2, x2]
    return float((1 - dy) * above + dy * below)


def naive(maps: Tensor, rois: Tensor, bins: int, kind: str, offsets: Tensor | None = None, std: float = 0.1) -> Tensor:
    """The definition, one RoI, channel and bin at a time."""
    channels, (height, width) = maps.shape[1] // bins**2, maps.shape[2:]
    out = np.zeros((len(rois), channels, bins, bins))
    images = maps.detach().double().numpy()
    for r, c, i, j in np.ndindex(*out.shape):
        image = images[int(rois[r, 0]), (c * bins + i) * bins + j]
        x1, y1, x2, y2 = rois[r, 1:].numpy()
        if kind in ('caffe', 'torchvision'):
            top, bottom = rectangle(kind, y1, y2, i, bins, height)
            left, right = rectangle(kind, x1, x2, j, bins, width)
            if bottom > top and right > left:
                out[r, c, i, j] = image[top:bottom, left:right].mean()
            continue
        values = []
        if kind == 'bilinear':
            x1, y1, x2, y2 = (float(value) * SCALE for value in (x1, y1, x2, y2))
            for at_y in (0.25, 0.75):
                for at_x in (0.25, 0.75):
                    x = min(max(x1 + (j + at_x) * (x2 - x1) / bins, 0.001), width - 1.001)
                    y = min(max(y1 + (i + at_y) * (y2 - y1) / bins, 0.001), height - 1.001)
                    values.append(bilinear(image, x, y))
        else:
            x1, y1 = c_round(x1) * SCALE - 0.5, c_round(y1) * SCALE - 0.5
            x2, y2 = (c_round(x2) + 1) * SCALE - 0.5, (c_round(y2) + 1) * SCALE - 0.5
            roi_width, roi_height = max(x2 - x1, 0.1), max(y2 - y1, 0.1)
            move_x = move_y = 0.0
            if offsets is not None:
                group = c // (channels // (offsets.shape[1] // 2))
                move_x = float(offsets[r, 2 * group, i, j]) * std * roi_width
                move_y = float(offsets[r, 2 * group + 1, i, j]) * std * roi_height
            for k_y in range(4):
                for k_x in range(4):
                    x = j * roi_width / bins + x1 + move_x + k_x * roi_width / bins / 4
                    y = i * roi_height / bins + y1 + move_y + k_y * roi_height / bins / 4
                    if -0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5:
                        values.append(bilinear(image, min(max(x, 0), width - 1), min(max(y, 0), height - 1)))
        out[r, c, i, j] = np.mean(values) if values else 0
    return torch.from_numpy(out)


def test_bilinear_samples_on_whole_pixels_may_count_nothing() -> None:
    """A bin of 2 pixels from 0.5 has samples at 1 and 2: whole. The original weighs by ceil(x) - x and x - floor(x)."""
    maps = torch.rand(1, 4, 7, 10) + 1
    rois = torch.tensor([[0.0, 8, 8, 72, 72], [0, 8, 9, 72, 73]])  # the second: whole along x only
    pooled = ps_roi_pool(maps, rois, 2, SCALE, kind='bilinear', drop_whole=True)
    assert pooled.abs().max() == 0
    assert ps_roi_pool(maps, rois, 2, SCALE, kind='bilinear').min() >= 1
    rois = rois + torch.tensor([0, 3, 5, 3, 5.0])
    pooled = ps_roi_pool(maps, rois, 2, SCALE, kind='bilinear', drop_whole=True)
    assert pooled.equal(ps_roi_pool(maps, rois, 2, SCALE, kind='bilinear'))


def scene(bins: int, channels: int = 3, boxes: list[list[float]] = BOXES, images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bins)
    maps = torch.randn(images, channels * bins**2, 7, 10, generator=generator)
    rois = torch.tensor([[index % images, *box] for index, box in enumerate(boxes)], dtype=torch.float32)
    return maps, rois


@pytest.mark.parametrize('bins', [1, 3, 7])
@pytest.mark.parametrize('kind', KINDS)
def test_equals_the_definition(kind: str, bins: int) -> None:
    maps, rois = scene(bins)
    pooled = ps_roi_pool(maps, rois, bins, SCALE, kind=kind)
    torch.testing.assert_close(pooled.double(), naive(maps, rois, bins, kind), rtol=1e-5, atol=2e-6)
    assert pooled.dtype == torch.float32 and pooled.is_contiguous()


@pytest.mark.parametrize('kind', KINDS)
def test_equals_the_definition_for_many_random_rois(kind: str) -> None:
    corners = torch.rand(60, 2, generator=torch.Generator().manual_seed(1)) * 200 - 40
    sizes = torch.rand(60, 2, generator=torch.Generator().manual_seed(2)) ** 2 * 160
    maps, rois = scene(3, boxes=torch.cat([corners, corners + sizes], dim=1).tolist())
    pooled = ps_roi_pool(maps, rois, 3, SCALE, kind=kind)
    torch.testing.assert_close(pooled.double(), naive(maps, rois, 3, kind), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_offsets_move_the_bins_of_their_group(groups: int) -> None:
    maps, rois = scene(3, channels=4)
    offsets = torch.randn(len(rois), 2 * groups, 3, 3, generator=torch.Generator().manual_seed(0)) * 2
    pooled = ps_roi_pool(maps, rois, 3, SCALE, kind='deformable', offsets=offsets, trans_std=0.2)
    expected = naive(maps, rois, 3, 'deformable', offsets, 0.2)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=5e-6)
    assert not torch.allclose(pooled, ps_roi_pool(maps, rois, 3, SCALE, kind='deformable'))


def test_offsets_that_are_not_finite_move_a_bin_out_of_the_map() -> None:
    maps, rois = scene(3, channels=1)
    offsets = torch.zeros(len(rois), 2, 3, 3)
    offsets[0, 0, 0, 0], offsets[0, 1, 1, 1] = math.nan, math.inf
    pooled = ps_roi_pool(maps, rois, 3, SCALE, kind='deformable', offsets=offsets)
    expected = ps_roi_pool(maps, rois, 3, SCALE, kind='deformable')
    expected[0, 0, 0, 0] = expected[0, 0, 1, 1] = 0
    torch.testing.assert_close(pooled, expected)


def test_gradients_are_the_same_whether_sums_are_kept_or_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for kept in (0, 2**40):
        monkeypatch.setattr(module, '_KEPT_BYTES', kept)
        maps, rois = scene(2, channels=1)
        offsets = torch.full((len(rois), 2, 2, 2), 0.3, requires_grad=True)
        pooled = ps_roi_pool(maps.requires_grad_(), rois, 2, SCALE, kind='deformable', offsets=offsets)
        gradients.append(torch.autograd.grad(pooled.square().sum(), (maps, offsets)))
    for again, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)
        assert bool(again.any())


@pytest.mark.parametrize('kind', ['caffe', 'torchvision'])
def test_means_of_large_rectangles_are_exact(kind: str) -> None:
    """float32 sums would lose the small numbers beside the large ones."""
    maps = torch.full((1, 1, 64, 64), 1e-3)
    maps[0, 0, 0, 0] = 1e6
    maps[0, 0, 1, 0] = -1e6
    rois = torch.tensor([[0.0, 0, 0, 1023, 1023], [0, 512, 512, 800, 800]])
    pooled = ps_roi_pool(maps, rois, 1, SCALE, kind=kind)
    torch.testing.assert_close(pooled.double(), naive(maps, rois, 1, kind), rtol=1e-6, atol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    """Number by number with one channel, which is a quarter of the work; along random directions with two."""
    for channels in (1, 2):
        maps, rois = scene(2, channels=channels, boxes=BOXES[:7])
        inputs = [maps.double().requires_grad_()]
        if kind == 'deformable':
            generator = torch.Generator().manual_seed(5)
            offsets = torch.randn(7, 2 * channels, 2, 2, generator=generator, dtype=torch.float64)
            inputs.append(offsets.requires_grad_())

        def pool(each: Tensor, moved: Tensor | None = None, rois: Tensor = rois) -> Tensor:
            return ps_roi_pool(each, rois.double(), 2, SCALE, kind=kind, offsets=moved)

        assert gradcheck(pool, inputs, fast_mode=channels == 2)


@pytest.mark.parametrize('kind', KINDS)
def test_no_rois(kind: str) -> None:
    maps, _ = scene(3)
    maps.requires_grad_()
    pooled = ps_roi_pool(maps, torch.zeros(0, 5), 3, SCALE, kind=kind)
    assert pooled.shape == (0, 3, 3, 3)
    pooled.sum().backward()
    assert maps.grad is not None and not maps.grad.any()


@pytest.mark.parametrize('kind', KINDS)
def test_an_image_without_rois_and_rois_out_of_order(kind: str) -> None:
    maps, rois = scene(3, images=3)
    rois[:, 0] = torch.tensor([2, 0] * 7)
    pooled = ps_roi_pool(maps, rois, 3, SCALE, kind=kind)
    for index, roi in enumerate(rois):
        alone = ps_roi_pool(maps[int(roi[0])][None], roi[None] * torch.tensor([0, 1, 1, 1, 1]), 3, SCALE, kind=kind)
        torch.testing.assert_close(pooled[index], alone[0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('kind', KINDS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Half types lose nothing but the rounding of input and output: the edges stay in float32."""
    maps, rois = scene(3)
    maps = maps.to(dtype).requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        pooled = ps_roi_pool(maps, rois, 3, SCALE, kind=kind)
    assert pooled.dtype == dtype
    expected = naive(maps, rois, 3, kind)
    torch.testing.assert_close(pooled.double(), expected, rtol=2 * torch.finfo(dtype).eps + 1e-7, atol=2e-3)
    pooled.sum().backward()
    assert maps.grad is not None and maps.grad.dtype == dtype and bool(torch.isfinite(maps.grad).all())


@pytest.mark.parametrize('kind', KINDS)
def test_maps_in_any_memory_order(kind: str) -> None:
    maps, rois = scene(3)
    strided = maps.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ps_roi_pool(strided, rois, 3, kind=kind), ps_roi_pool(maps, rois, 3, kind=kind))
    torch.testing.assert_close(
        ps_roi_pool(maps.transpose(2, 3), rois, 3, kind=kind),
        ps_roi_pool(maps.transpose(2, 3).contiguous(), rois, 3, kind=kind),
    )


@pytest.mark.parametrize('kind', KINDS)
def test_maps_of_one_pixel(kind: str) -> None:
    maps = torch.arange(9.0).view(1, 9, 1, 1)
    pooled = ps_roi_pool(maps, torch.tensor([[0.0, 0, 0, 15, 15]]), 3, kind=kind)
    expected = maps.view(1, 1, 3, 3) * (kind != 'torchvision')  # which never uses the last row and column
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        ({'kind': 'max'}, "kind 'max'"),
        ({'maps': torch.zeros(2, 27, 7)}, 'maps must be'),
        ({'maps': torch.zeros(2, 27, 7, 10, dtype=torch.int64)}, 'maps must be'),
        ({'maps': torch.zeros(2, 27, 0, 10)}, 'maps must be'),
        ({'output_size': 2}, '27 channels are no multiple'),
        ({'output_size': 0}, '27 channels are no multiple'),
        ({'rois': torch.zeros(3, 4)}, 'rois must be'),
        ({'rois': torch.tensor([[0, 0, 0, math.nan, 1]])}, 'finite'),
        ({'rois': torch.tensor([[2.0, 0, 0, 1, 1]])}, '0 to 1'),
        ({'rois': torch.tensor([[-1.0, 0, 0, 1, 1]])}, '0 to 1'),
        ({'offsets': torch.zeros(1, 2, 3, 3)}, "belong to kind 'deformable'"),
        ({'offsets': torch.zeros(1, 3, 3, 3), 'kind': 'deformable'}, 'offsets must be'),
        ({'offsets': torch.zeros(2, 2, 3, 3), 'kind': 'deformable'}, 'offsets must be'),
        ({'offsets': torch.zeros(1, 4, 3, 3), 'kind': 'deformable'}, '3 output channels'),
    ],
)
def test_errors(changed: dict, message: str) -> None:
    arguments = {'maps': torch.zeros(2, 27, 7, 10), 'rois': torch.zeros(1, 5), 'output_size': 3, **changed}
    with pytest.raises(ValueError, match=message):
        ps_roi_pool(**arguments)
