"""What a rule is made with, and class-agnostic suppression."""

import pytest
import torch
from mmcv.ops import batched_nms, nms

from mmdet_softnms.rules import HardNMS, MmcvNMS, SoftNMS


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
