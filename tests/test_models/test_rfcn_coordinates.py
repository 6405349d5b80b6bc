"""``RFCN(coordinates='caffe')`` beside the authors' steps from score maps to detections, written again in NumPy.

The steps are those that ``lib/rpn/proposal_layer.py``, ``lib/fast_rcnn/test.py`` and ``lib/nms/cpu_nms.pyx`` of
bharatsingh430/soft-nms describe. The networks' own layers are compared elsewhere (pooling in test_ps_roi_pool.py), so
both sides share them here.
"""

import copy

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmdet_softnms.registry import build_rule
from tests.tiny import tiny_rfcn_model

CLASSES, STRIDE, STDS = 5, 8, np.array([0.1, 0.1, 0.2, 0.2])
SCALES, RATIOS = (2, 4, 8), (0.5, 1, 2)
SIZE = (120, 160)  # of the network's input: height, width
GAUSSIAN = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=1e-3, offset=1)
LINEAR = dict(type='mmdet_softnms.SoftNMS', method='linear', iou_threshold=0.3, min_score=1e-3, offset=1)
HARD = dict(type='mmdet_softnms.HardNMS', iou_threshold=0.3, offset=1)


def sides(boxes):
    return boxes[..., 2:] - boxes[..., :2] + 1


def decode(boxes, deltas, height, width):
    """``bbox_transform_inv`` and ``clip_boxes``: centres move by sizes, sizes grow by exponentials, last pixel kept."""
    size = sides(boxes)
    centre = boxes[:, :2] + size / 2 + deltas[:, :2] * size
    half = size * np.exp(deltas[:, 2:]) / 2
    last = np.array([width, height]) - 1
    return np.concatenate([np.clip(centre - half, 0, last), np.clip(centre + half, 0, last)], axis=1)


def overlap(box, boxes):
    """Common area (N,) in whole pixels, and IoU (N,)."""
    common = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + 1
    common = common.clip(0).prod(axis=1)
    return common, common / (sides(box).prod() + sides(boxes).prod(axis=1) - common)


def all_anchors(rows, columns):
    """(rows * columns * A, 4), anchors of a cell fastest."""
    of_cell = []
    for ratio in RATIOS:
        width = np.round(np.sqrt(STRIDE**2 / ratio))
        height = np.round(width * ratio)
        for scale in SCALES:
            half = np.array([width * scale - 1, height * scale - 1]) / 2
            of_cell.append([*((STRIDE - 1) / 2 - half), *((STRIDE - 1) / 2 + half)])
    x, y = np.meshgrid(np.arange(columns) * STRIDE, np.arange(rows) * STRIDE)
    moved = np.stack([x, y, x, y], axis=-1)[:, :, None] + np.array(of_cell)
    return moved.reshape(-1, 4)


def proposal_layer(objectness, deltas, scale, min_size, before, threshold, after):
    """``objectness`` (A, h, w), ``deltas`` (4A, h, w): proposals (R, 4) in pixels of the network's input."""
    rows, columns = objectness.shape[1:]
    boxes = decode(all_anchors(rows, columns), deltas.transpose(1, 2, 0).reshape(-1, 4), *SIZE)
    scores = objectness.transpose(1, 2, 0).ravel()
    large = (sides(boxes) >= min_size * scale).all(axis=1)
    small_ones_among_the_best = (~large[np.argsort(-scores)[:before]]).sum()
    order = np.argsort(-scores[large])[:before]
    boxes = boxes[large][order]
    chosen = []
    while len(boxes) and len(chosen) < after:
        chosen.append(boxes[0])
        boxes = boxes[1:][overlap(boxes[0], boxes[1:])[1] <= threshold]
    return np.array(chosen), small_ones_among_the_best


def cpu_soft_nms(boxes, scores, nms):
    """Indices and scores; the floor is asked only of boxes that share a pixel with one that was selected."""
    floor = nms.get('min_score', 1e-3)
    scores, left, kept = scores.copy(), list(range(len(scores))), []
    while left:
        best = max(left, key=lambda each: scores[each])
        left.remove(best)
        kept.append(best)
        common, iou = overlap(boxes[best], boxes)
        if nms.get('method') == 'gaussian':
            weight = np.exp(-(iou**2) / nms['sigma'])
        elif nms.get('method') == 'linear':
            weight = np.where(iou > nms['iou_threshold'], 1 - iou, 1)
        else:
            weight = np.where(iou > nms['iou_threshold'], 0, 1)
        for each in left:
            scores[each] *= weight[each] if common[each] > 0 else 1
        left = [each for each in left if common[each] == 0 or scores[each] >= floor]
    return kept, scores[kept]


def test_net(rois, probabilities, deltas, scale, original, score_thr, nms, cap):
    """``rois`` (R, 4) in pixels of the network's input, ``probabilities`` (R, 1 + K): rows of box, score and class."""
    boxes = decode(rois / scale, deltas, *original)
    found = []
    for label in range(CLASSES):
        above = probabilities[:, 1 + label] > score_thr
        kept, scores = cpu_soft_nms(boxes[above], probabilities[above, 1 + label], nms)
        found += [[*boxes[above][index], score, label] for index, score in zip(kept, scores, strict=True)]
    found = np.array(found)
    if len(found) > cap:
        found = found[found[:, 4] >= np.sort(found[:, 4])[-cap]]
    return found[np.argsort(-found[:, 4])]


test_net.__test__ = False


class Case:
    """A random R-FCN behind its feature maps, and both sides' way from there."""

    def __init__(self, scale, coordinates, nms=GAUSSIAN, pooling='caffe', seed=0):
        register_all_modules()
        config = tiny_rfcn_model(pooling=pooling)
        config.coordinates = coordinates
        config.test_cfg.rpn.update(nms_pre=80, nms=dict(iou_threshold=0.5))
        config.test_cfg.rcnn = dict(score_thr=1e-4, nms=nms, max_per_img=100)
        torch.manual_seed(seed)
        self.model = MODELS.build(copy.deepcopy(config)).eval()
        self.test_cfg = self.model.roi_head.test_cfg
        head = self.model.roi_head.bbox_head
        for maps, std in ((head.cls_maps, 0.7), (head.reg_maps, 0.7)):
            torch.nn.init.normal_(maps.weight, std=std)
        rows, columns = SIZE[0] // STRIDE, SIZE[1] // STRIDE
        anchors = len(SCALES) * len(RATIOS)
        self.objectness = torch.randn(1, anchors, rows, columns) * 2
        self.deltas = torch.randn(1, 4 * anchors, rows, columns) * 0.6
        # Wide ones that come from far outside: cut at log(1000 / 16), they would not reach the image.
        self.objectness[0, 0, 3:12:4, 10] = torch.tensor([8.0, 7.5, 7.0])
        self.deltas[0, 0, 3:12:4, 10], self.deltas[0, 2, 3:12:4, 10] = -40, 4.5
        self.feature = torch.randn(1, head.in_channels, rows, columns)
        self.scale = scale
        self.original = tuple(round(side / scale) for side in SIZE)
        self.meta = dict(img_shape=SIZE, ori_shape=self.original, scale_factor=(scale, scale))

    @torch.no_grad()
    def proposals(self):
        head = self.model.rpn_head
        return head.predict_by_feat([self.objectness], [self.deltas], batch_img_metas=[self.meta], cfg=head.test_cfg)

    @torch.no_grad()
    def ours(self, proposals):
        found = self.model.roi_head.predict_bbox((self.feature,), [self.meta], proposals, self.test_cfg, True)[0]
        return np.column_stack([found.bboxes, found.scores, found.labels])

    @torch.no_grad()
    def raw(self, proposals, rescale=True):
        found = self.model.roi_head.predict_bbox((self.feature,), [self.meta], proposals, None, rescale)[0]
        return found.bboxes.numpy()

    @torch.no_grad()
    def theirs(self):
        """Proposals, and detections."""
        rpn = self.model.rpn_head.test_cfg
        rois, small = proposal_layer(
            self.objectness[0].double().sigmoid().numpy(), self.deltas[0].double().numpy(), self.scale,
            rpn.min_bbox_size, rpn.nms_pre, rpn.nms.iou_threshold, rpn.max_per_img,
        )  # fmt: skip
        assert small > 5  # so that it matters when they are removed
        inputs = torch.from_numpy(np.column_stack([np.zeros(len(rois)), rois])).float()
        logits, deltas = self.model.roi_head.bbox_head(self.feature, inputs)
        probabilities = logits.softmax(-1).roll(1, dims=1).numpy()  # background first
        detections = test_net(
            rois, probabilities.astype(float), deltas.numpy() * STDS, self.scale, self.original, 1e-4,
            dict(self.test_cfg.nms), self.test_cfg.max_per_img,
        )  # fmt: skip
        return rois, detections


@pytest.mark.parametrize(
    ('scale', 'nms', 'pooling'),
    [(1.6, GAUSSIAN, 'caffe'), (1.6, HARD, 'caffe'), (1.6, LINEAR, 'bilinear'), (1.0, GAUSSIAN, 'caffe')],
)
def test_detections_are_the_authors(scale, nms, pooling):
    case = Case(scale, 'caffe', nms, pooling)
    proposals = case.proposals()
    rois, theirs = case.theirs()
    assert 30 <= len(rois) <= 60 and proposals[0].bboxes.shape == rois.shape
    np.testing.assert_allclose(proposals[0].bboxes, rois, rtol=0, atol=1e-3)
    ours = case.ours(proposals)
    assert len(ours) == len(theirs) > 50
    assert theirs[-1, 4] > 1e-3  # so that the floor, which ours asks of every box, decides nothing
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    np.testing.assert_allclose(case.raw(proposals, False), case.raw(proposals) * scale, rtol=0, atol=1e-3)


@pytest.mark.parametrize(('scale', 'difference'), [(1.6, 0.375), (1.0, 0.0)])
def test_without_the_switch_boxes_are_decoded_before_they_are_scaled(scale, difference):
    """A pixel of the network's input is 1 / scale of the image's: a box that keeps its RoI is that much shorter."""
    boxes = {}
    proposals = Case(scale, 'caffe').proposals()
    for coordinates in ('mmdet', 'caffe'):
        case = Case(scale, coordinates)
        for parameter in case.model.roi_head.bbox_head.reg_maps.parameters():
            torch.nn.init.zeros_(parameter)
        boxes[coordinates] = case.raw(proposals)[:, :4]
    inside = (boxes['caffe'][:, 2:] < np.array(case.original[::-1]) - 2).all(axis=1)
    assert inside.sum() > 20
    longer = (boxes['caffe'] - boxes['mmdet'])[inside]
    np.testing.assert_allclose(longer, [[0, 0, difference, difference]] * inside.sum(), rtol=0, atol=1e-4)
    # At the image's border it is the last pixel that differs.
    largest = [each.max(axis=0)[2:] for each in (boxes['mmdet'], boxes['caffe'])]
    np.testing.assert_allclose(largest[0] - largest[1], difference, rtol=0, atol=1e-4)


def test_without_the_switch_the_proposals_are_others():
    """The limit is not the authors', and small ones take places among the best."""
    ours, rois = Case(1.6, 'mmdet').proposals()[0].bboxes, Case(1.6, 'caffe').theirs()[0]
    near = np.abs(ours.numpy()[:, None] - rois).max(axis=2) < 1e-3
    assert near.any(axis=0).sum() < len(rois)


def test_the_authors_floor_spares_boxes_that_share_no_pixel_with_a_selected_one():
    """What docs/rfcn.md lists: below the floor theirs and ours differ, above it they do not."""
    boxes = np.array([[0.0, 0, 9, 9], [50, 50, 59, 59], [6, 6, 15, 15], [9, 0, 14, 9]])
    scores = np.array([0.9, 5e-4, 6e-4, 0.5])
    for nms, ours in ((GAUSSIAN, [0, 3]), (LINEAR, [0, 3]), (HARD, [0, 3, 2, 1])):
        assert cpu_soft_nms(boxes, scores, nms)[0] == [0, 3, 1]
        rule = build_rule(nms)
        assert rule(*map(torch.tensor, (boxes, scores, [0] * 4)), -1)[0].tolist() == ours


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(coordinates='matlab'), "coordinates 'matlab' is not one of mmdet, caffe"),
        (
            dict(roi_head=dict(bbox_head=dict(bbox_coder=dict(type='mmdet_softnms.MXNetDeltaXYWHBBoxCoder')))),
            'needs model.roi_head.bbox_head.bbox_coder=.*CaffeDeltaXYWHBBoxCoder.*, not MXNetDeltaXYWHBBoxCoder',
        ),
        (dict(rpn_head=dict(type='RPNHead')), 'needs model.rpn_head=.*RFCNRPNHead.*, not RPNHead'),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    register_all_modules()
    config = Config(dict(model=tiny_rfcn_model()))
    config.merge_from_dict({'model.coordinates': 'caffe'})
    config.merge_from_dict(dict(model=changed))
    with pytest.raises(ValueError, match=message):
        MODELS.build(config.model)


def test_an_image_without_its_scale_is_named():
    case = Case(1.6, 'caffe')
    proposals = case.proposals()
    for key in ('ori_shape', 'scale_factor'):
        del case.meta[key]
        with pytest.raises(ValueError, match=f'needs {key} of every image: name it in meta_keys of PackDetInputs'):
            case.ours(proposals)
        case.meta['ori_shape'] = case.original
