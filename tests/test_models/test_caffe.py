"""The Caffe conventions, against numbers and formulas of py-faster-rcnn."""

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.utils import register_all_modules


@pytest.fixture(scope='module', autouse=True)
def _registered():
    register_all_modules()


def test_anchors_are_those_in_the_head_of_generate_anchors():
    generator = TASK_UTILS.build(
        dict(type='mmdet_softnms.CaffeAnchorGenerator', strides=[16], ratios=[0.5, 1.0, 2.0], scales=[8, 16, 32])
    )
    expected = [
        [-83, -39, 100, 56], [-175, -87, 192, 104], [-359, -183, 376, 200],
        [-55, -55, 72, 72], [-119, -119, 136, 136], [-247, -247, 264, 264],
        [-35, -79, 52, 96], [-79, -167, 96, 184], [-167, -343, 184, 360],
    ]  # fmt: skip
    # That file lists MATLAB's anchors, which count pixels from 1.
    torch.testing.assert_close(generator.base_anchors[0], torch.tensor(expected) - 1.0)
    grid = generator.grid_priors([(2, 3)], device='cpu')[0]
    torch.testing.assert_close(grid[9 * 3 : 9 * 4], generator.base_anchors[0] + torch.tensor([0.0, 16, 0, 16]))


def test_anchors_round_by_ratios_in_float64():
    """numpy: a width of 25 makes a height of round(25 * 0.1) = round(2.5) = 2; in float32 it would be 3."""
    generator = TASK_UTILS.build(
        dict(type='mmdet_softnms.CaffeAnchorGenerator', strides=[8], ratios=[0.1], scales=[1, 2])
    )
    base = generator.base_anchors[0]
    torch.testing.assert_close(base[:, 2:] - base[:, :2] + 1, torch.tensor([[25.0, 2], [50, 4]]))


def _bbox_transform_inv(boxes, deltas, height, width):
    """py-faster-rcnn, lib/fast_rcnn/bbox_transform.py, with clip_boxes."""
    w, h = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    x, y = boxes[:, 0] + 0.5 * w + deltas[:, 0] * w, boxes[:, 1] + 0.5 * h + deltas[:, 1] * h
    w, h = np.exp(deltas[:, 2]) * w, np.exp(deltas[:, 3]) * h
    out = np.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], axis=1)
    return np.clip(out, 0, [width - 1, height - 1, width - 1, height - 1])


@pytest.mark.parametrize('stds', [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_coder_is_bbox_transform(stds):
    coder = TASK_UTILS.build(dict(type='mmdet_softnms.CaffeDeltaXYWHBBoxCoder', target_stds=stds))
    random = np.random.default_rng(0)
    corners = random.uniform(0, 150, (50, 2))
    boxes = np.concatenate([corners, corners + random.uniform(0, 80, (50, 2))], axis=1).astype(np.float32)
    deltas = random.normal(0, 1.2, (50, 4)).clip(-4, 4).astype(np.float32)
    decoded = coder.decode(torch.from_numpy(boxes), torch.from_numpy(deltas), max_shape=(180, 200, 3))
    expected = _bbox_transform_inv(boxes, deltas * np.float32(stds), 180, 200)
    np.testing.assert_allclose(decoded.numpy(), expected, rtol=1e-5, atol=1e-3)
    assert (decoded[:, 2] == 199).any() and (decoded[:, 0] == 0).any()  # some were clipped

    targets = coder.encode(torch.from_numpy(boxes[:25]), torch.from_numpy(boxes[25:]))
    w, h = boxes[:25, 2] - boxes[:25, 0] + 1, boxes[:25, 3] - boxes[:25, 1] + 1
    gt_w, gt_h = boxes[25:, 2] - boxes[25:, 0] + 1, boxes[25:, 3] - boxes[25:, 1] + 1
    dx = (boxes[25:, 0] + 0.5 * gt_w - boxes[:25, 0] - 0.5 * w) / w
    dy = (boxes[25:, 1] + 0.5 * gt_h - boxes[:25, 1] - 0.5 * h) / h
    expected = np.stack([dx, dy, np.log(gt_w / w), np.log(gt_h / h)], axis=1) / np.array(stds)
    np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_deltas_are_cut_or_not():
    boxes, deltas = torch.tensor([[10.0, 10, 19, 19]] * 2), torch.tensor([[0.0, 0, 5, -5], [0, 0, 800, 800]])
    for cut, width in ((True, 10 * 1000 / 16), (False, 10 * np.exp(5))):
        coder = TASK_UTILS.build(dict(type='mmdet_softnms.CaffeDeltaXYWHBBoxCoder', cut_deltas=cut))
        x1, _, x2, _ = coder.decode(boxes, deltas)[0].tolist()
        assert x2 - x1 == pytest.approx(width, rel=1e-5)
        assert coder.decode(boxes, deltas, (80, 90))[1].tolist() == [0, 0, 89, 79]


def test_first_pooling_is_not_padded():
    arguments = dict(depth=18, base_channels=4, style='caffe', out_indices=(0,))
    ours = MODELS.build(dict(type='mmdet_softnms.CaffeResNet', **arguments))
    stock = MODELS.build(dict(type='ResNet', **arguments))
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.eval()  # mmdet's returns None
    stock.eval()
    image = torch.randn(1, 3, 64, 96)
    assert ours(image)[0].shape == stock(image)[0].shape
    assert not torch.allclose(ours(image)[0], stock(image)[0])
    pooled = ours.maxpool(torch.arange(16.0).view(1, 1, 4, 4))
    torch.testing.assert_close(pooled, torch.tensor([[[[10.0, 11], [14, 15]]]]))
