"""What a rule is made with, class-agnostic suppression, and rules round a rule."""

import pytest
import torch
from mmcv.ops import batched_nms, nms

from mmdet_softnms.ops import quality, vote
from mmdet_softnms.post_process import Instances, _apply, post_process, suppress
from mmdet_softnms.reevaluation.scoring.settings import _written
from mmdet_softnms.registry import build_rule
from mmdet_softnms.rules import HardNMS, MmcvNMS, RotatedSoftNMS, SoftNMS, SupportedNMS, VotedNMS, describe


def _drawn(number=300):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(number, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 20 + torch.rand(number, 2, generator=generator) * 20], 1)
    return boxes, torch.rand(number, generator=generator), torch.randint(5, (number,), generator=generator)


def test_class_agnostic_hard_nms_is_mmdets():
    boxes, scores, labels = _drawn()
    dets, keep = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.5, class_agnostic=True))
    ours, kept = HardNMS(0.5, class_agnostic=True)(boxes, scores, labels, -1)
    assert torch.equal(ours, keep) and torch.equal(kept, dets[:, 4])
    assert len(HardNMS(0.5)(boxes, scores, labels, -1)[0]) > len(keep)  # classes matter here


def test_class_agnostic_stands_in_params_only_where_asked_for():
    assert 'class_agnostic' not in SoftNMS().params and HardNMS().params == dict(iou_threshold=0.5, offset=0)
    assert SoftNMS(class_agnostic=True).params['class_agnostic'] is True
    with pytest.raises(TypeError, match="True or False, got 'yes'"):
        SoftNMS(class_agnostic='yes')


def test_mmcvs_function_is_its_name():
    boxes, scores, labels = _drawn()
    by_name, by_function = MmcvNMS('nms', iou_threshold=0.4), MmcvNMS(nms, iou_threshold=0.4)
    assert by_function.nms_type == 'nms'
    assert torch.equal(by_name(boxes, scores, labels, 50)[0], by_function(boxes, scores, labels, 50)[0])


# --- rules round a rule -----------------------------------------------------------------------------------------------

WRAPPED = [
    VotedNMS(),
    VotedNMS(HardNMS(0.4, offset=1), tolerance=0.1),
    VotedNMS(SoftNMS('linear', decay='strongest'), first_only=True),
    VotedNMS(MmcvNMS('nms', iou_threshold=0.5), class_agnostic=True),
    SupportedNMS(),
    VotedNMS(SupportedNMS(SoftNMS('linear'), power=4, prior=0.5)),
    SupportedNMS(VotedNMS(HardNMS(), class_agnostic=True), class_agnostic=True),
]


def test_voting_leaves_the_selection_alone_and_moves_the_boxes():
    boxes, scores, labels = _drawn()
    image = Instances(boxes, scores, labels)
    for inner in (SoftNMS(), HardNMS(), MmcvNMS('nms', iou_threshold=0.5), SupportedNMS()):
        plain, voted = suppress(image, inner, 0.1, 50), suppress(image, VotedNMS(inner, tolerance=0.1), 0.1, 50)
        assert torch.equal(plain.scores, voted.scores) and torch.equal(plain.labels, voted.labels)
        assert not torch.equal(plain.bboxes, voted.bboxes)
        # Candidates up to score_thr have no vote, and all others have one, selected or not.
        above = Instances(*(part[scores > 0.1] for part in image))
        keep = inner(*above, 50)[0]
        assert torch.equal(voted.bboxes, vote(*above, keep, tolerance=0.1))


def test_first_only_leaves_decayed_boxes_where_they_are():
    boxes, scores, labels = _drawn()
    rule = VotedNMS(first_only=True)
    keep, kept = rule(boxes, scores, labels, 100)
    decayed = kept < 0.9 * scores[keep]
    moved = rule.refine(boxes, scores, labels, keep, kept)
    assert 0 < decayed.sum() < len(keep)
    assert torch.equal(moved[decayed], boxes[keep][decayed])
    assert torch.equal(moved[~decayed], VotedNMS().refine(boxes, scores, labels, keep, kept)[~decayed])


def test_class_agnostic_rules_see_one_class():
    boxes, scores, labels = _drawn()
    one = torch.zeros_like(labels)
    for rule, plain in (
        (VotedNMS(class_agnostic=True), VotedNMS()),
        (SupportedNMS(class_agnostic=True), SupportedNMS()),
        (SupportedNMS(VotedNMS(), class_agnostic=True), SupportedNMS(VotedNMS())),
    ):
        found = suppress(Instances(boxes, scores, labels), rule, 0.0, -1)
        expected = suppress(Instances(boxes, scores, one), plain, 0.0, -1)
        assert torch.equal(found.bboxes, expected.bboxes) and torch.equal(found.scores, expected.scores)
        assert set(found.labels.tolist()) == set(range(5))


def test_support_orders_by_the_current_score_times_q_and_tests_the_current_score():
    boxes, scores, labels = _drawn()
    keep, kept = SupportedNMS(HardNMS(1.0))(boxes, scores, labels, -1)  # nothing is decayed, nothing dropped
    by_support = scores * quality(boxes, scores, labels)
    order = torch.sort(by_support, descending=True, stable=True).indices
    assert torch.equal(keep, order) and torch.equal(kept, by_support[order])
    undecayed = SoftNMS('linear', iou_threshold=1.0, min_score=0.5)
    keep, kept = SupportedNMS(undecayed)(boxes, scores, labels, -1)
    assert len(keep) == int((scores >= 0.5).sum()) and float(kept.min()) < 0.5


def test_votes_inside_support_count_supported_scores():
    boxes, scores, labels = _drawn()
    rule = SupportedNMS(VotedNMS())
    keep, kept = rule(boxes, scores, labels, 50)
    assert torch.equal(keep, SupportedNMS()(boxes, scores, labels, 50)[0])
    expected = vote(boxes, scores * quality(boxes, scores, labels), labels, keep)
    assert torch.equal(rule.refine(boxes, scores, labels, keep, kept), expected)
    outside = VotedNMS(SupportedNMS()).refine(boxes, scores, labels, keep, kept)
    assert torch.equal(outside, vote(boxes, scores, labels, keep)) and not torch.equal(outside, expected)


@pytest.mark.parametrize('rule', WRAPPED, ids=describe)
def test_a_batch_and_a_config_give_what_the_rule_gives(rule):
    scenes = [Instances(*_drawn(number)) for number in (40, 0, 300)]
    candidates = [suppress(scene, rule, 0.05, 30) for scene in scenes]
    together = _apply([Instances(*(part[scene.scores > 0.05] for part in scene)) for scene in scenes], rule, 30)
    again = build_rule(eval(f'dict({_written(rule)})'))  # what a report tells people to paste
    assert again.params == rule.params and describe(again) == describe(rule)
    for alone, (one, _), scene in zip(candidates, together, scenes, strict=True):
        assert all(map(torch.equal, alone, one))
        assert all(map(torch.equal, alone, suppress(scene, again, 0.05, 30)))


def test_what_a_line_of_a_table_says():
    assert describe(WRAPPED[5]) == (
        'VotedNMS rule=(SupportedNMS rule=(SoftNMS linear iou_threshold=0.3 min_score=0.001) power=4 prior=0.5) '
        'tolerance=0.025'
    )
    assert WRAPPED[3].params['rule'] == dict(type='nms', iou_threshold=0.5)


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: VotedNMS(dict(type='SoftNMS')), 'rule must be a rule, as mmdet_softnms.rules.SoftNMS'),
        (lambda: VotedNMS(VotedNMS()), 'VotedNMS cannot wrap VotedNMS, which moves boxes itself'),
        (lambda: VotedNMS(SupportedNMS(VotedNMS())), 'VotedNMS cannot wrap SupportedNMS, which moves boxes itself'),
        (lambda: VotedNMS(SupportedNMS(), first_only=True), 'first_only compares with the raw score'),
        (lambda: VotedNMS(tolerance=-1), 'tolerance must be finite and > 0, got -1'),
        (lambda: VotedNMS(first_only=1), 'first_only must be True or False, got 1'),
        (lambda: SupportedNMS(MmcvNMS()), "SupportedNMS takes SoftNMS, HardNMS, or VotedNMS of these, not mmdet's nms"),
        (lambda: SupportedNMS(power='8'), "power must be a number, got '8'"),
        (lambda: SoftNMS(decay='weakest'), "decay must be 'product' or 'strongest', got 'weakest'"),
    ],
)
def test_what_cannot_be_made_is_refused(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_rotated_boxes_have_a_rule_of_their_own():
    boxes = torch.tensor([[10.0, 10, 8, 4, 0.3], [10, 10, 8, 4, 0.4], [90, 10, 8, 4, 0.3], [10, float('nan'), 8, 4, 0]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 1])
    rule = RotatedSoftNMS('linear', 0.3)
    assert describe(rule) == 'RotatedSoftNMS linear iou_threshold=0.3 min_score=0.001'
    assert describe(build_rule(dict(type='mmdet_softnms.RotatedSoftNMS', class_agnostic=True))).endswith(
        'agnostic=True'
    )
    keep, kept = rule(boxes[:3], scores[:3], labels[:3], -1)
    assert keep.tolist() == [0, 2, 1] and kept[2] < 0.3
    raw = torch.cat([scores[:, None], 1 - scores[:, None]], 1)
    with pytest.warns(RuntimeWarning, match='1 candidates'):
        found = post_process(boxes, raw, rule, 0.05, 100)  # (R, 5) of one class
    assert found.bboxes.shape == (3, 5) and found.scores.tolist()[:2] == scores.tolist()[::2][:2]
    per_class = torch.cat([boxes[:3], boxes[:3] + 200], 1)  # (R, 5K)
    both = torch.cat([scores[:3, None] / 2, scores[:3, None] / 2, 1 - scores[:3, None]], 1)
    found = post_process(per_class, both, rule, 0.05, 100)
    assert torch.equal(found.bboxes[:, 0] > 100, found.labels == 1) and len(found.labels) == 6
    with pytest.raises(ValueError, match=r"SoftNMS takes axis-aligned .* write type='mmdet_softnms.RotatedSoftNMS'"):
        post_process(boxes[:3], raw[:3], SoftNMS(), 0.05, 100)
    with pytest.raises(ValueError, match=r"RotatedSoftNMS takes rotated .* write type='mmdet_softnms.SoftNMS'"):
        post_process(boxes[:3, :4], raw[:3], rule, 0.05, 100)
    with pytest.raises(TypeError, match='RotatedSoftNMS cannot be wrapped'):
        VotedNMS(rule)
