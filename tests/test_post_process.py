"""Raw results to detections: thresholds, limits, values that are not finite, one image and a batch."""

import subprocess
import sys

import pytest
import torch

from mmdet_softnms.post_process import post_process, to_candidates
from mmdet_softnms.rules import HardNMS, NoSuppression, SoftNMS

BOXES = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60]])
SCORES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1]])


def _raw(images=3, rois=40, classes=4):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(images, rois, classes, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 30], -1).flatten(2)
    scores = torch.rand(images, rois, classes + 1, generator=generator).softmax(-1)
    return list(boxes), list(scores)


def test_score_thr_is_exclusive():
    assert to_candidates(BOXES, SCORES, 0.3).scores.tolist() == pytest.approx([0.6, 0.5, 0.4, 0.7])


@pytest.mark.parametrize('max_per_img', [0, -1])
def test_no_limit_as_in_mmdet(max_per_img):
    for rule in (HardNMS(1.0), SoftNMS(), NoSuppression()):
        assert len(post_process(BOXES, SCORES, rule, 0.01, max_per_img).scores) == 6


@pytest.mark.parametrize('rule', [SoftNMS(), HardNMS(class_agnostic=True), NoSuppression()])
def test_a_batch_is_each_image(rule):
    boxes, scores = _raw()
    batch = post_process(boxes, scores, rule, 0.05, 20)
    for image, *raw in zip(batch, boxes, scores, strict=True):
        for ours, alone in zip(image, post_process(*raw, rule, 0.05, 20), strict=True):
            assert torch.equal(ours, alone) and len(ours)


def test_a_subclass_with_a_call_of_its_own_is_called_in_a_batch():
    class First(SoftNMS):
        def __call__(self, boxes, scores, labels, max_num):
            return torch.arange(min(1, len(scores))), scores[:1]

    assert [len(image.scores) for image in post_process(*_raw(), First(), 0.05, -1)] == [1, 1, 1]


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 1e25])
def test_boxes_that_are_not_usable_are_dropped_and_counted(value):
    boxes = BOXES.repeat(1, 2)
    boxes[0, 2:4] = value  # of RoI 0, class 0
    seen = []
    found = post_process([boxes], [SCORES], HardNMS(1.0), 0.01, -1, seen.append)[0]
    assert seen == [[1]] and len(found.scores) == 5
    with pytest.warns(RuntimeWarning, match='1 candidates'):
        post_process(boxes, SCORES, SoftNMS(), 0.01, -1)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_scores_that_are_not_finite_are_dropped_and_counted(value):
    scores = SCORES.clone()
    scores[1] = value
    with pytest.warns(RuntimeWarning, match='2 candidates'):
        found = post_process(BOXES, scores, HardNMS(1.0), 0.01, -1)
    assert len(found.scores) == 4
    assert len(post_process(BOXES, scores, NoSuppression(), 0.01, -1).scores) == 6  # for whoever collects


def test_rules_and_post_processing_need_torch_only():
    code = (
        'import sys, mmdet_softnms.rules, mmdet_softnms.post_process\n'
        "assert not {'mmengine', 'mmcv', 'mmdet'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0
