"""A candidate takes part where its score is above ``score_thr``: one exactly there does not, as in mmdet."""

import pytest
import torch
from mmdet.models.layers import multiclass_nms
from mmengine.structures import InstanceData

from mmdet_softnms.post_process import post_process
from mmdet_softnms.reevaluation.candidates.store import Candidates, ImageCandidates
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections
from mmdet_softnms.rules import HardNMS, SoftNMS

THRESHOLD = 0.25  # exact in every floating type
SCORES = torch.tensor([0.75, THRESHOLD, 0.5, 0.125])
ABOVE = SCORES.nextafter(torch.ones(4))  # one bit more
BOXES = torch.arange(4)[:, None] * 100.0 + torch.tensor([0.0, 0, 10, 10])


@pytest.mark.parametrize('rule', [SoftNMS(), HardNMS()], ids=['soft', 'hard'])
@pytest.mark.parametrize(('scores', 'kept'), [(SCORES, 2), (ABOVE, 3)], ids=['at', 'one bit above'])
def test_a_score_of_exactly_the_threshold_is_out(rule, scores, kept):
    raw = torch.stack([scores, 1 - scores], 1)
    live = post_process(BOXES, raw, rule, THRESHOLD, -1)
    assert len(live.scores) == kept and (live.scores > THRESHOLD).all()
    candidates = InstanceData(bboxes=BOXES, scores=scores, labels=torch.zeros(4, dtype=torch.int64))
    (stored,) = detections(
        Candidates.of([ImageCandidates('one', (500, 500), candidates)]), Setting(rule, THRESHOLD, -1)
    )
    assert torch.equal(stored.scores, live.scores) and torch.equal(stored.bboxes, live.bboxes)
    dets, _ = multiclass_nms(BOXES, raw, THRESHOLD, dict(type='nms', iou_threshold=0.5), -1)
    assert torch.equal(dets[:, 4], live.scores)


def test_background_and_other_classes_are_no_candidates_of_the_first():
    """Candidates come by RoI, then by class, each with the box of its class; the last column is the background."""
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]])
    boxes = torch.arange(24.0).reshape(3, 8) + torch.tensor([0, 0, 50, 50] * 2) + torch.arange(3)[:, None] * 500
    found = post_process(boxes, scores, HardNMS(), 0.2, -1)
    assert found.labels.tolist() == [1, 0, 1]
    expected = [boxes[1, 4:], boxes[0, :4], boxes[0, 4:]]
    assert torch.equal(found.bboxes, torch.stack(expected))
    assert post_process(boxes, scores, HardNMS(), 0.2, 1).labels.tolist() == [1]
