"""Rules of other papers against their definitions on Python numbers, or against rules that must give the same."""

import math

import ensemble_boxes
import pytest
import torch

from mmdet_softnms.ops import soft_nms
from mmdet_softnms.paper_rules import (
    ClusterNMS,
    DIoUNMS,
    FastNMS,
    GidarisNMS,
    MatrixNMS,
    NonMaximumWeighted,
    WeightedBoxesFusion,
)
from mmdet_softnms.post_process import Instances, suppress
from mmdet_softnms.registry import TASK_UTILS, build_rule
from mmdet_softnms.rules import HardNMS, SoftNMS, VotedNMS, describe

RULES = [
    FastNMS(),
    MatrixNMS(),
    MatrixNMS('linear'),
    ClusterNMS('none'),
    ClusterNMS('spm'),
    ClusterNMS('spm_d', weighted=True),
    DIoUNMS(),
    DIoUNMS('gaussian'),
    GidarisNMS(),
    WeightedBoxesFusion(),
    NonMaximumWeighted(),
]


def _scene(num=60, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 20 + torch.rand(num, 2, generator=generator) * 20], 1)
    scores = (torch.rand(num, generator=generator) * 20).ceil() / 20  # ties
    return boxes, scores, torch.randint(classes, (num,), generator=generator)


def _iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def _distance(a, b):
    apart = sum(((a[k] + a[k + 2] - b[k] - b[k + 2]) / 2) ** 2 for k in (0, 1))
    return apart / sum((max(a[k + 2], b[k + 2]) - min(a[k], b[k])) ** 2 for k in (0, 1))


def _classes(boxes, scores, labels):
    """For each class the indices by falling score, and boxes and scores as numbers."""
    rows, values = boxes.tolist(), scores.tolist()
    for label in labels.unique().tolist():
        members = [i for i in range(len(rows)) if labels[i] == label]
        yield sorted(members, key=lambda i: (-values[i], i)), rows, values


def _assert_found(rule, inputs, expected):
    """``expected``: the score of each index that is kept."""
    for max_num in (-1, 7):
        keep, kept = rule(*inputs, max_num)
        best = sorted(expected, key=lambda i: (-expected[i], i))[: None if max_num < 0 else max_num]
        assert len(keep) == len(best) and bool((kept[1:] <= kept[:-1]).all())
        assert sorted(keep.tolist()) == sorted(best)
        torch.testing.assert_close(kept, torch.tensor([expected[i] for i in keep.tolist()]))


def test_fast_nms():
    inputs, expected = _scene(), {}
    for members, rows, scores in _classes(*inputs):
        for place, j in enumerate(members):
            if all(_iou(rows[i], rows[j]) <= 0.5 for i in members[:place]):
                expected[j] = scores[j]
    _assert_found(FastNMS(), inputs, expected)
    assert len(expected) < len(HardNMS()(*inputs, -1)[0])  # it removes more than greedy NMS


@pytest.mark.parametrize('kernel', ['gaussian', 'linear'])
def test_matrix_nms(kernel):
    inputs, expected = _scene(), {}

    def decay(iou):
        return math.exp(-2.0 * iou**2) if kernel == 'gaussian' else 1 - iou

    for members, rows, scores in _classes(*inputs):
        for place, j in enumerate(members):
            least = 1.0
            for before, i in enumerate(members[:place]):
                most = max((_iou(rows[h], rows[i]) for h in members[:before]), default=0.0)
                least = min(least, decay(_iou(rows[i], rows[j])) / decay(most))
            expected[j] = scores[j] * least
    _assert_found(MatrixNMS(kernel, min_score=0.0), inputs, expected)


def test_cluster_nms_without_penalty_is_greedy_nms():
    for seed in range(5):
        inputs = _scene(seed=seed)
        keep, kept = ClusterNMS('none', iou_threshold=0.4, min_score=0.0)(*inputs, -1)
        expected, expected_scores = HardNMS(0.4)(*inputs, -1)
        assert torch.equal(keep, expected) and torch.equal(kept, expected_scores)


@pytest.mark.parametrize('penalty', ['spm', 'spm_d'])
def test_cluster_nms_with_penalty(penalty):
    inputs, expected = _scene(), {}
    greedy = set(HardNMS(0.5)(*inputs, -1)[0].tolist())
    for members, rows, scores in _classes(*inputs):
        for place, j in enumerate(members):
            expected[j] = scores[j]
            for i in members[:place]:
                iou = _iou(rows[i], rows[j])
                if i in greedy and iou > 0:
                    away = _distance(rows[i], rows[j]) ** 0.6 if penalty == 'spm_d' else 0.0
                    expected[j] *= min(1.0, math.exp(-(iou**2) / 0.2) + away)
    _assert_found(ClusterNMS(penalty, min_score=0.0), inputs, expected)


def test_weighted_cluster_nms():
    boxes, scores, labels = _scene()
    boxes[1::2] = boxes[::2] + 0.7  # neighbours above 0.8
    labels[1::2] = labels[::2]
    rule = ClusterNMS('none', weighted=True)
    keep, kept = rule(boxes, scores, labels, -1)
    moved = rule.refine(boxes, scores, labels, keep, kept)
    for members, rows, values in _classes(boxes, scores, labels):
        for place, i in enumerate(members):
            if i not in keep.tolist():
                continue
            total, sums = values[i], [values[i] * one for one in rows[i]]
            for j in members[place + 1 :]:
                if (iou := _iou(rows[i], rows[j])) > 0.8:
                    total += iou * values[j]
                    sums = [old + iou * values[j] * one for old, one in zip(sums, rows[j], strict=True)]
            expected = torch.tensor([one / total for one in sums])
            torch.testing.assert_close(moved[keep.tolist().index(i)], expected)
    assert not torch.equal(moved, boxes[keep])


@pytest.mark.parametrize('decay', ['hard', 'gaussian'])
def test_diou_nms(decay):
    inputs, expected = _scene(), {}
    for members, rows, scores in _classes(*inputs):
        current = {i: scores[i] for i in members}
        while current:
            best = min(current, key=lambda i: (-current[i], i))
            if (score := current.pop(best)) < 1e-3:
                break
            expected[best] = score
            for j in list(current):
                diou = _iou(rows[best], rows[j]) - _distance(rows[best], rows[j])
                if decay == 'gaussian':
                    current[j] *= math.exp(-(max(diou, 0.0) ** 2) / 0.5)
                elif diou > 0.5:
                    del current[j]
    _assert_found(DIoUNMS(decay), inputs, expected)


def test_gidaris_voting():
    boxes, scores, labels = _scene()
    rule = GidarisNMS(HardNMS(0.3))
    keep, kept = rule(boxes, scores, labels, 20)
    assert torch.equal(keep, HardNMS(0.3)(boxes, scores, labels, 20)[0])
    moved = rule.refine(boxes, scores, labels, keep, kept)
    for row, i in zip(moved, keep.tolist(), strict=True):
        votes = [j for j in range(60) if labels[j] == labels[i] and _iou(boxes[i].tolist(), boxes[j].tolist()) >= 0.5]
        torch.testing.assert_close(row, (boxes[votes] * scores[votes, None]).sum(0) / scores[votes].sum())


@pytest.mark.parametrize('rule', [WeightedBoxesFusion(), NonMaximumWeighted(0.55)], ids=describe)
def test_fusion_is_that_of_the_package(rule):
    boxes, scores, labels = _scene()
    found = suppress(Instances(boxes, scores, labels), rule, 0.0, 12)
    function = getattr(ensemble_boxes, rule.function)
    lists = [(boxes / 128).tolist()], [scores.tolist()], [labels.tolist()]
    fused, kept, of_class = function(*lists, iou_thr=0.55)
    torch.testing.assert_close(found.scores, torch.from_numpy(kept).float()[:12])
    # Equal scores may change places; every box is one of the package's, with its score and class.
    expected = torch.cat([torch.from_numpy(fused).float() * 128, torch.from_numpy(kept).float()[:, None]], 1)
    for box, score, label in zip(*found, strict=True):
        apart = (expected - torch.cat([box, score[None]])).abs().amax(1)
        assert float(apart.min()) < 1e-3 and int(of_class[int(apart.argmin())]) == int(label)
    again = suppress(Instances(boxes + 100, scores, labels), rule, 0.0, 12)  # nothing is clipped at 0 or 1
    torch.testing.assert_close(again.bboxes.sort(0).values, found.bboxes.sort(0).values + 100, rtol=0, atol=1e-2)


@pytest.mark.parametrize('rule', RULES, ids=describe)
def test_empty_images_half_precision_and_classes(rule):
    boxes, scores, labels = _scene()
    empty = suppress(Instances(boxes[:0], scores[:0], labels[:0]), rule, 0.0, 10)
    assert empty.bboxes.shape == (0, 4) and len(empty.scores) == len(empty.labels) == 0
    half = suppress(Instances(boxes.half(), scores.half(), labels), rule, 0.0, 10)
    assert half.bboxes.dtype == half.scores.dtype == torch.float16 and len(half.scores) == 10
    kind = next(name for name, cls in TASK_UTILS.module_dict.items() if cls is type(rule))
    agnostic = build_rule(dict(type=f'mmdet_softnms.{kind}', class_agnostic=True))
    found = suppress(Instances(boxes, scores, labels), agnostic, 0.0, -1)
    plain = suppress(Instances(boxes, scores, 0 * labels), build_rule(dict(type=f'mmdet_softnms.{kind}')), 0.0, -1)
    assert torch.equal(found.bboxes, plain.bboxes) and torch.equal(found.scores, plain.scores)
    assert agnostic.params['class_agnostic'] is True


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: MatrixNMS('cosine'), "kernel must be 'gaussian' or 'linear', got 'cosine'"),
        (lambda: ClusterNMS('d'), "penalty must be 'none', 'spm' or 'spm_d', got 'd'"),
        (lambda: DIoUNMS('linear'), "decay must be 'hard' or 'gaussian', got 'linear'"),
        (lambda: FastNMS(1.5), r'iou_threshold must be in \[0, 1\], got 1.5'),
        (lambda: GidarisNMS(VotedNMS()), 'cannot wrap VotedNMS'),
        (lambda: WeightedBoxesFusion(conf_type='box'), "conf_type must be 'avg' or 'max', got 'box'"),
    ],
)
def test_what_cannot_be_made_is_refused(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_gaussian_diou_without_distance_is_soft_nms():
    """The control of the loop: with a large power of the distance there is none left."""
    boxes, scores, labels = _scene()
    keep, kept = DIoUNMS('gaussian', beta=1e6, min_score=1e-3)(boxes, scores, labels, -1)
    expected, expected_scores = SoftNMS()(boxes, scores, labels, -1)
    assert keep.tolist() == expected.tolist() == soft_nms(boxes, scores, labels)[0].tolist()
    torch.testing.assert_close(kept, expected_scores)
