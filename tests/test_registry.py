"""What a ``type`` of a config stands for, whatever form and scope it has."""

import mmdet.registry
import pytest
import torch
from mmcv.ops import batched_nms, nms, soft_nms
from mmdet.models.roi_heads import StandardRoIHead
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import TASK_UTILS as ROOT_TASK_UTILS
from mmengine.registry import DefaultScope, Registry

from mmdet_softnms.models.roi_heads import SoftNMSRoIHead
from mmdet_softnms.registry import TASK_UTILS, build_rule, is_stock, resolve
from mmdet_softnms.rules import MmcvNMS, SoftNMS

OTHER = Registry('task util', parent=ROOT_TASK_UTILS, scope='another_package')
#: ``from mmdet.models.roi_heads import StandardRoIHead`` of a lazy config.
LAZY = LazyAttr('StandardRoIHead', LazyObject('mmdet.models.roi_heads'))


@OTHER.register_module()
class ThirdPartyRule(SoftNMS):
    """Registered in a scope that is not the name of its module."""


@pytest.mark.parametrize('scope', ['another_package', 'mmdet', 'mmengine'])
def test_rules_resolve_under_any_default_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        assert type(ROOT_TASK_UTILS.build(dict(type='mmdet_softnms.SoftNMS'))) is SoftNMS
        assert ROOT_MODELS.get('mmdet_softnms.SoftNMSRoIHead').__name__ == 'SoftNMSRoIHead'


@pytest.mark.parametrize(
    'kind',
    [
        'StandardRoIHead',
        'mmdet.StandardRoIHead',
        'mmdet.models.roi_heads.StandardRoIHead',
        'mmdet_softnms.mmdet.StandardRoIHead',
        StandardRoIHead,
        LAZY,
    ],
    ids=str,
)
def test_every_form_is_one_class(kind):
    found = resolve(kind, mmdet.registry.MODELS)
    assert (found.scope, found.name, found.cls) == ('mmdet', 'StandardRoIHead', StandardRoIHead)
    assert found.type == 'mmdet.StandardRoIHead'


def test_a_rule_is_named_by_the_scope_it_is_registered_in():
    assert resolve(ThirdPartyRule, TASK_UTILS).type == 'another_package.ThirdPartyRule'


@pytest.mark.parametrize('kind', [nms, 'nms', 'mmcv.ops.nms', 'mmcv.ops.nms.nms'])
def test_mmcvs_function_is_stock_nms(kind):
    rule = build_rule(dict(type=kind, iou_threshold=0.4))
    assert isinstance(rule, MmcvNMS) and rule.nms_type == 'nms' and rule.params == dict(iou_threshold=0.4)
    assert is_stock(dict(type=soft_nms)) and not is_stock(dict(type=SoftNMS))


@pytest.mark.parametrize(
    ('kind', 'words'),
    [
        ('SoftNMS', "write type='mmdet_softnms.SoftNMS'"),
        ('ThirdPartyRule', "write type='another_package.ThirdPartyRule'"),
        ('NoSuchRule', "not one of mmcv's functions"),
        ('mmdet_softnms.NoSuchRule', 'not registered'),
    ],
)
def test_a_wrong_name_is_one_sentence(kind, words):
    with pytest.raises(KeyError, match=words) as raised:
        build_rule(dict(type=kind))
    assert '\n' not in str(raised.value)


BOXES = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]])
SCORES, LABELS = torch.tensor([0.3, 0.9, 0.6]), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize('kind', ['mmdet_softnms.SoftNMS', 'mmdet_softnms.rules.HardNMS'])
def test_mmcv_says_where_a_rule_belongs(kind):
    """Where none of our heads looks at ``nms.type``, but something of ours is imported: in ``rpn.nms``, say."""
    assert issubclass(SoftNMSRoIHead, StandardRoIHead)  # imported
    with pytest.raises(ValueError, match='cannot stand where mmdet takes.*rpn.nms.*SoftNMSTTAModel.*test_cfg.rcnn'):
        batched_nms(BOXES, SCORES, LABELS, dict(type=kind, sigma=0.5))
    with pytest.raises(NameError):
        batched_nms(BOXES, SCORES, LABELS, dict(type='another_package.SoftNMS'))
    assert batched_nms(BOXES, SCORES, LABELS, dict(type='nms', iou_threshold=0.5))[1].tolist() == [1, 2]


def test_nms_none_only_sorts_as_in_mmdet():
    assert is_stock(None)
    rule = build_rule(None)
    dets, order = batched_nms(BOXES, SCORES, LABELS, None)
    keep, scores = rule(BOXES, SCORES, LABELS, -1)
    assert keep.tolist() == order.tolist() == [1, 2, 0] and scores.tolist() == dets[:, 4].tolist()
    assert rule(BOXES, SCORES, LABELS, 2)[0].tolist() == [1, 2] and rule.nms_type == 'nms=None' and not rule.params
