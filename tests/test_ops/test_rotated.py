"""Rotated boxes: their IoU beside shapely's and mmcv's, and the selection beside mmcv's and the definition."""

import math

import numpy as np
import pytest
import shapely
import torch
from mmcv.ops import batched_nms, box_iou_rotated

from mmdet_softnms.ops import rotated_iou, rotated_reference, rotated_soft_nms, soft_nms

METHODS = ('hard', 'linear', 'gaussian')


def draw(kind: str, count: int = 120, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Boxes of one kind, seeded by its name."""
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    boxes = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    boxes[:, :2] *= 100
    boxes[:, 2:4] = 2 + 40 * boxes[:, 2:4]
    boxes[:, 4] = (boxes[:, 4] - 0.5) * 4 * math.pi
    if kind == 'thin':
        boxes[:, 3] *= 0.01
    elif kind == 'equal centres':
        boxes[:, :2] = 50
    elif kind == 'upright':
        boxes[:, 4] = 0
    elif kind == 'turned by right angles':
        boxes[:, :4] = boxes[:, :4].round()
        boxes[:, 4] = torch.randint(0, 4, (count,), generator=generator) * math.pi / 2
    elif kind == 'far away':
        boxes[:, :2] += 8192
    elif kind == 'the same twice':
        boxes[count // 2 :] = boxes[: count // 2]
    return boxes.to(dtype)


KINDS = ('any', 'thin', 'equal centres', 'upright', 'turned by right angles', 'far away', 'the same twice')


def exact(boxes: torch.Tensor) -> torch.Tensor:
    """(N, N) IoUs of the boxes' polygons, by shapely in float64."""
    x, y, w, h, angle = boxes.double().numpy().T
    cosine, sine = np.cos(angle), np.sin(angle)
    centre = np.stack([x, y], 1)
    u, v = np.stack([cosine * w, sine * w], 1) / 2, np.stack([-sine * h, cosine * h], 1) / 2
    polygons = shapely.polygons(np.stack([centre - u - v, centre + u - v, centre + u + v, centre - u + v], 1))
    shared = shapely.area(shapely.intersection(polygons[:, None], polygons[None]))
    areas = shapely.area(polygons)
    return torch.from_numpy(shared / (areas[:, None] + areas[None] - shared))


@pytest.mark.parametrize('kind', KINDS)
def test_iou_is_that_of_the_polygons_and_mmcvs_to_its_rounding(kind):
    wide, boxes = draw(kind, dtype=torch.float64), draw(kind)
    torch.testing.assert_close(rotated_iou(wide, wide), exact(wide), rtol=0, atol=1e-10)
    iou = rotated_iou(boxes, boxes)
    assert iou.dtype == torch.float32 and iou.min() >= 0 and iou.max() <= 1 and bool((iou.diagonal() > 1 - 1e-6).all())
    torch.testing.assert_close(iou, exact(boxes).float(), rtol=0, atol=1e-7)
    if kind not in ('the same twice', 'turned by right angles'):  # where mmcv's own can be wrong: parallel edges
        torch.testing.assert_close(iou, box_iou_rotated(boxes, boxes).fill_diagonal_(1), rtol=0, atol=2e-5)


def test_touching_boxes_and_boxes_without_area_share_nothing():
    boxes = [[0.0, 0, 10, 10, 0], [10, 0, 10, 10, 0], [0, 10, 10, 10, math.pi], [0, 0, 0, 10, 0.3], [0, 0, -5, -5, 0]]
    boxes = torch.tensor(boxes, dtype=torch.float64)
    assert bool((rotated_iou(boxes[:1], boxes[1:]) < 1e-12).all())
    assert bool((rotated_iou(boxes[3:], boxes) == 0).all())
    assert rotated_iou(boxes[:0], boxes).shape == (0, 5) and rotated_iou(boxes, boxes[:0]).shape == (5, 0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('decay', ['product', 'strongest'])
def test_selection_is_the_definition_bit_for_bit(kind, decay):
    boxes = draw(kind)
    generator = torch.Generator().manual_seed(1)
    scores = (torch.rand(len(boxes), generator=generator) * 50).round() / 50  # with ties
    labels = torch.randint(0, 3, (len(boxes),), generator=generator)
    for method in METHODS:
        for max_num in (-1, 7):
            arguments = dict(method=method, decay=decay, max_num=max_num, min_score=0.02)
            keep, kept = rotated_soft_nms(boxes, scores, labels, **arguments)
            expected = rotated_reference(boxes, scores, labels, **arguments)
            assert torch.equal(keep, expected[0]) and torch.equal(kept, expected[1])
            assert bool((kept[1:] <= kept[:-1]).all())


@pytest.mark.parametrize('kind', ['any', 'thin', 'equal centres'])
def test_hard_is_mmcvs_and_soft_is_a_loop_over_its_iou(kind):
    boxes = draw(kind)
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(2))
    labels = torch.arange(len(boxes)) % 3
    keep, kept = rotated_soft_nms(boxes, scores, labels, method='hard', iou_threshold=0.1, min_score=0)
    _, expected = batched_nms(boxes, scores, labels, dict(type='nms_rotated', iou_threshold=0.1))
    assert (
        torch.equal(keep, expected) and torch.equal(kept, scores[keep]) and (kind == 'thin' or len(keep) < len(boxes))
    )
    for method in ('linear', 'gaussian'):
        keep, kept = rotated_soft_nms(boxes, scores, labels, method=method)
        expected, decayed = rotated_reference(boxes, scores, labels, method=method, overlaps=box_iou_rotated)
        assert torch.equal(keep, expected)
        torch.testing.assert_close(kept, decayed, rtol=1e-4, atol=1e-6)


def test_upright_boxes_are_those_of_soft_nms_and_classes_never_meet():
    boxes = draw('upright', dtype=torch.float64)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2], 1)
    scores = 0.05 + torch.rand(len(boxes), generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2
    keep, kept = rotated_soft_nms(boxes, scores)
    expected, decayed = soft_nms(corners, scores)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(kept, decayed, rtol=1e-9, atol=0)
    keep, kept = rotated_soft_nms(boxes, scores, torch.arange(len(boxes)) * 10**12)
    assert torch.equal(kept, scores.sort(descending=True).values)


def test_types_and_what_is_refused():
    boxes, scores = draw('any', 8), torch.linspace(0.1, 0.9, 8)
    keep, kept = rotated_soft_nms(boxes.half(), scores.half())
    assert kept.dtype == torch.float16 and keep.dtype == torch.int64
    assert [len(part) for part in rotated_soft_nms(boxes[:0], scores[:0], keep[:0])] == [0, 0]
    with pytest.raises(ValueError, match=r'boxes\[2, 4\] is nan'):
        rotated_soft_nms(boxes.index_put((torch.tensor(2), torch.tensor(4)), torch.tensor(math.nan)), scores)
    with pytest.raises(ValueError, match='area that overflows'):
        rotated_soft_nms(boxes * torch.tensor([1, 1, 1e30, 1e30, 1]), scores)
    with pytest.raises(ValueError, match='labels must not be negative'):
        rotated_soft_nms(boxes, scores, torch.full((8,), -1))
    with pytest.raises(ValueError, match=r'shape \(N, 5\), got \(8, 4\); axis-aligned boxes .* mmdet_softnms.SoftNMS'):
        rotated_soft_nms(boxes[:, :4], scores)
    with pytest.raises(
        ValueError, match=r'shape \(N, 4\), got \(8, 5\); rotated boxes .* mmdet_softnms.RotatedSoftNMS'
    ):
        soft_nms(boxes, scores)
    with pytest.raises(ValueError, match='sigma must be'):
        rotated_soft_nms(boxes, scores, sigma=0)
    with pytest.raises(NotImplementedError, match='no gradients'):
        rotated_soft_nms(boxes.requires_grad_(), scores)
