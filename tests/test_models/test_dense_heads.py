"""Dense heads: hard NMS equals mmdet's, Soft-NMS equals the operator on the candidates, by each head's zoo config."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from mmdet.models import dense_heads as mmdets
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config

from mmdet_softnms import soft_nms
from mmdet_softnms.models import dense_heads
from mmdet_softnms.models.dense_heads import SoftNMSDenseHead, SoftNMSDenseMixin, how_to_write, with_rules
from mmdet_softnms.models.places import check_places
from tests.tiny_dense import ZOO, build, predict, with_head, zoo_config

GAUSSIAN = dict(type='mmdet_softnms.SoftNMS', method='gaussian', sigma=0.5, min_score=0.01)
HARD = dict(type='mmdet_softnms.HardNMS', iou_threshold=0.5)
RAW = dict(type='mmdet_softnms.NoSuppression')


def _sorted(instances):
    """Rows (score, label, box) in one order, also where scores are equal: mmcv's sort may return those in another."""
    rows = torch.cat([instances.scores[:, None], instances.labels[:, None], instances.bboxes], 1).double()
    return torch.tensor(sorted(map(tuple, rows.tolist()), reverse=True))


def _set(model, nms=None, **thresholds):
    model.bbox_head.test_cfg.update(thresholds)
    if nms is not None:
        model.bbox_head.test_cfg.nms = ConfigDict(nms)
    return model


def _with_kept_maps(model):
    """The model, whose network runs once: what comes after it is asked for the same images again."""

    def once(function):
        results = []

        def kept(*args):
            if not results:
                results.append(function(*args))
            return copy.deepcopy(results[0])

        return kept

    model.extract_feat, model.bbox_head.forward = once(model.extract_feat), once(model.bbox_head.forward)
    return model


@pytest.mark.parametrize('name', ZOO)
def test_hard_is_mmdets_and_soft_is_the_operator(name):
    cfg = zoo_config(name)
    test_cfg = cfg.model.test_cfg
    if test_cfg.nms.type != 'nms':  # CornerNet comes with mmcv's soft_nms
        test_cfg.nms = ConfigDict(type='nms', iou_threshold=0.5)
    if name in ('CondInstBboxHead', 'BoxInstBboxHead', 'RTMDetInsSepBNHead'):
        test_cfg.nms_pre = 60  # a mask for each candidate takes long
    if name in ('SSDHead', 'PISASSDHead'):
        with pytest.raises(AttributeError, match='loss_cls'):  # mmdet #11063; should it be mended there, compare
            build(cfg)
        stock = build(with_head(cfg, test_cfg.nms))  # left to mmdet
    else:
        stock = build(cfg)
    ours = build(with_head(cfg, dict(HARD, iou_threshold=test_cfg.nms.iou_threshold)), like=stock)  # strict: same keys
    hard = predict(_with_kept_maps(ours))
    for mine, theirs in zip(hard, predict(stock), strict=True):
        assert len(mine) > 5  # an empty comparison would show nothing
        torch.testing.assert_close(_sorted(mine), _sorted(theirs), rtol=0, atol=0)
        if 'masks' in theirs:
            assert mine.masks.sum() == theirs.masks.sum() and mine.masks.shape == theirs.masks.shape

    raw = predict(_set(ours, RAW, max_per_img=-1))
    assert any(len(one) > len(mine) for one, mine in zip(raw, hard, strict=True))  # something was suppressed
    for mine, one in zip(predict(_set(ours, GAUSSIAN)), raw, strict=True):
        keep, scores = soft_nms(one.bboxes, one.scores, one.labels.long(), sigma=0.5, min_score=0.01)
        assert (scores < one.scores[keep]).any()
        torch.testing.assert_close(mine.bboxes, one.bboxes[keep], rtol=0, atol=0)
        # CondInst suppresses in network scale, and the candidates are in original scale here.
        torch.testing.assert_close(mine.scores, scores, rtol=0, atol=1e-6 if 'masks' in mine else 0)
        torch.testing.assert_close(mine.labels, one.labels[keep], check_dtype=False)

    if name == 'CornerHead':  # mmdet ignores its score_thr
        return
    # Candidates above a low threshold, restricted by what mmdet asks of a higher one, are those above it; also where
    # nms_pre cuts.
    low = predict(_set(ours, RAW, max_per_img=-1, nms_pre=60))
    gates = torch.cat([one.get('class_scores', one.scores) for one in low])
    threshold = float(gates.median())
    for mine, one in zip(predict(_set(ours, score_thr=threshold)), low, strict=True):
        above = one.get('class_scores', one.scores) > threshold
        assert 5 < len(mine) < len(one)
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(mine[key], one[key][above], rtol=0, atol=0)


def test_glip_is_hard_nms_as_ever_and_the_operator_on_its_candidates():
    """Its zoo config's head on drawn maps: what makes the maps needs transformers and its language model."""

    class WithoutLanguageModel(mmdets.ATSSVLFusionHead):
        def __init__(self, **kwargs):
            super(mmdets.ATSSVLFusionHead, self).__init__(**kwargs)

    cfg = get_config('mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py')
    arguments = {key: value for key, value in cfg.model.bbox_head.items() if key not in ('type', 'lang_model_name')}
    generator = torch.Generator().manual_seed(0)
    sides, tokens, classes = (24, 12, 6, 3, 2), 9, {1: [0, 1], 2: [3], 3: [5, 6, 7]}  # label: its tokens
    logits = [torch.randn(1, side**2, tokens, generator=generator) for side in sides]
    boxes = [torch.randn(1, 4, side, side, generator=generator) for side in sides]
    factors = [torch.randn(1, 1, side, side, generator=generator) for side in sides]
    meta = dict(img_id=0, img_shape=(192, 192), scale_factor=(0.5, 0.5))

    def predicted(head, nms, max_per_img=100):
        head = head(**arguments, test_cfg=ConfigDict(cfg.model.test_cfg, nms=nms, max_per_img=max_per_img))
        (found,) = head.predict_by_feat(
            logits, boxes, factors, batch_img_metas=[meta], batch_token_positive_maps=[classes], rescale=True
        )
        return found

    ours = with_rules(WithoutLanguageModel)
    stock = predicted(WithoutLanguageModel, ConfigDict(type='nms', iou_threshold=0.5))
    assert len(stock) == 100
    assert torch.equal(_sorted(predicted(ours, ConfigDict(HARD))), _sorted(stock))
    raw, soft = predicted(ours, ConfigDict(RAW), -1), predicted(ours, ConfigDict(GAUSSIAN))
    keep, scores = soft_nms(
        raw.bboxes - torch.tensor([0.0, 0, 1, 1]), raw.scores, raw.labels, sigma=0.5, min_score=0.01, max_num=100
    )
    assert (scores < raw.scores[keep]).any()
    torch.testing.assert_close(soft.scores, scores, rtol=0, atol=1e-5)  # GLIP adds 1 to the corners afterwards
    torch.testing.assert_close(soft.bboxes, raw.bboxes[keep], rtol=0, atol=0)
    logits[0][0, :7, 3] = float('nan')
    with pytest.warns(RuntimeWarning, match='dropped 7 candidates'):
        predicted(ours, ConfigDict(GAUSSIAN))


def test_centripetal_is_corner():
    """Random weights give it no box, and what suppresses is CornerNet's."""
    made = with_rules(mmdets.CentripetalHead)
    assert made._bboxes_nms is with_rules(mmdets.CornerHead)._bboxes_nms
    assert mmdets.CentripetalHead._bboxes_nms is mmdets.CornerHead._bboxes_nms
    assert mmdets.CentripetalHead._predict_by_feat_single is mmdets.CornerHead._predict_by_feat_single


def test_a_threshold_that_equals_a_score_is_yoloxs():
    """YOLOX keeps a score equal to score_thr, every other head drops it."""
    model = build(with_head(zoo_config('YOLOXHead'), RAW))
    one = predict(model)[0]
    threshold = float(one.scores.sort().values[len(one) // 2])
    kept = predict(_set(model, score_thr=threshold))[0]
    assert torch.equal(kept.scores, one.scores[one.class_scores > threshold])
    assert (kept.scores == threshold).any()
    assert len(predict(_set(model, score_thr=0.0))[0]) == len(one)


def test_yolox_obeys_max_per_img_and_no_limit_is_none():
    model = build(with_head(zoo_config('YOLOXHead'), HARD, max_per_img=7))
    stock = build(zoo_config('YOLOXHead'), like=model)
    assert len(predict(model)[0]) == 7 < len(predict(_set(stock, max_per_img=7))[0])
    assert len(predict(_set(model, max_per_img=0))[0]) == len(predict(_set(model, max_per_img=-1))[0]) > 7


def test_stock_types_are_left_to_mmdet_and_edits_are_seen():
    cfg = zoo_config('ATSSHead')
    stock = build(cfg)
    ours = build(with_head(cfg, cfg.model.test_cfg.nms), like=stock)
    expected = _sorted(predict(stock)[0])
    assert torch.equal(_sorted(predict(ours)[0]), expected)
    assert not torch.equal(_sorted(predict(_set(ours, GAUSSIAN))[0]), expected)


def test_copies_pickles_and_dumped_configs_are_the_same_detector(tmp_path):
    cfg = with_head(zoo_config('YOLOXHead'), GAUSSIAN, max_per_img=20)
    cfg.dump(tmp_path / 'dumped.py')
    again = Config.fromfile(tmp_path / 'dumped.py')
    assert again.model == cfg.model
    model = build(again)
    assert isinstance(model.bbox_head, mmdets.YOLOXHead) and isinstance(model.bbox_head, SoftNMSDenseMixin)
    copied = copy.deepcopy(model)
    assert type(copied.bbox_head) is type(model.bbox_head)
    assert torch.equal(predict(copied)[0].scores, predict(model)[0].scores)
    (tmp_path / 'head.pickle').write_bytes(pickle.dumps(model.bbox_head))
    code = (
        f'import pickle; head = pickle.load(open({str(tmp_path / "head.pickle")!r}, "rb")); '
        'print(type(head).__name__, head.test_cfg.nms.type, len(head.state_dict()))'
    )
    printed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ['SoftNMSYOLOXHead', 'mmdet_softnms.SoftNMS', str(len(model.bbox_head.state_dict()))]


@pytest.mark.parametrize(
    ('head', 'words'),
    [
        ('DETRHead', 'nothing to suppress'),
        ('DINOHead', 'nothing to suppress'),
        ('CenterNetHead', 'nothing to suppress'),
        ('Mask2FormerHead', 'nothing to suppress'),
        ('SOLOV2Head', 'Matrix NMS'),
        ('YOLACTHead', 'Fast NMS'),
        ('PAAHead', 'votes'),
        ('LADHead', 'votes'),
        ('GARetinaHead', 'multiclass_nms'),
        ('RPNHead', 'proposals'),
        ('StandardRoIHead', 'is a RoI head; write roi_head='),
        ('FPN', 'not a dense head'),
        ('NoSuchHead', 'not registered'),
        (None, "head='RTMDetSepBNHead'"),
    ],
)
def test_heads_that_cannot_take_rules_are_refused_in_one_sentence(head, words):
    with pytest.raises((TypeError, KeyError), match=words) as caught:
        MODELS.build(dict(type='mmdet_softnms.SoftNMSDenseHead', head=head))
    assert '\n' not in str(caught.value)


class OwnWay(mmdets.ATSSHead):
    """Somebody's head that suppresses before it reaches mmdet's method."""

    def _predict_by_feat_single(self, *args, **kwargs):
        from mmengine.structures import InstanceData

        return InstanceData(bboxes=torch.zeros(1, 4), scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.int64))


class WithMixin(SoftNMSDenseMixin, mmdets.ATSSHead):
    """Somebody's head that has the mixin."""


def test_a_head_that_never_asks_the_rule_is_refused():
    cfg = with_head(zoo_config('ATSSHead'), GAUSSIAN)
    cfg.model.bbox_head.head = OwnWay
    with pytest.raises(TypeError, match='SoftNMSOwnWay cannot take rules'):
        build(cfg)


def test_what_a_config_writes_builds_the_same_class():
    for head in (mmdets.ATSSHead, with_rules(mmdets.ATSSHead)):
        assert how_to_write(head) == dict(type='mmdet_softnms.SoftNMSDenseHead', head='mmdet.ATSSHead')
    assert with_rules(mmdets.ATSSHead) is with_rules(with_rules(mmdets.ATSSHead))
    assert with_rules(WithMixin) is WithMixin
    assert how_to_write(WithMixin)['type'].endswith('WithMixin')
    assert dense_heads.why_not(SoftNMSDenseHead).startswith('SoftNMSDenseHead needs')


def test_an_inherited_threshold_is_said_and_a_missing_rule_refused(recwarn):
    def warned(nms):
        recwarn.clear()
        cfg = with_head(zoo_config('ATSSHead'), dict(type='nms', iou_threshold=0.6))
        cfg.merge_from_dict(dict(model=dict(test_cfg=dict(nms=nms))))
        MODELS.build(dict(cfg.model.bbox_head, test_cfg=cfg.model.test_cfg))
        return [str(one.message) for one in recwarn if 'iou_threshold' in str(one.message)]

    (sentence,) = warned(dict(type='mmdet_softnms.SoftNMS', method='linear'))
    assert 'iou_threshold=0.6' in sentence and '_delete_=True' in sentence
    assert not warned(dict(type='mmdet_softnms.SoftNMS', method='gaussian'))  # does not use it
    assert not warned(dict(type='mmdet_softnms.HardNMS'))  # meant to
    assert not warned(dict(_delete_=True, type='mmdet_softnms.SoftNMS', method='linear', iou_threshold=0.6))
    assert not warned(dict(_delete_=True, iou_threshold=0.3, method='linear', type='mmdet_softnms.SoftNMS'))  # dumped
    cfg = with_head(zoo_config('ATSSHead'), GAUSSIAN)
    cfg.model.test_cfg.pop('nms')
    with pytest.raises(TypeError, match='finds no nms in its test_cfg: model.test_cfg has to hold nms='):
        build(cfg)


def test_boxes_that_are_not_finite_are_dropped_with_a_warning():
    model = build(with_head(zoo_config('ATSSHead'), GAUSSIAN))
    before = predict(model)
    model.bbox_head.scales[0].scale.data.fill_(float('nan'))
    with pytest.warns(RuntimeWarning, match='SoftNMSATSSHead dropped .* first on image 0'):
        after = predict(model)
    assert before[0].bboxes.isfinite().all() and after[0].bboxes.isfinite().all() and len(after[0])


@pytest.mark.parametrize(('head', 'bias'), [
    ('ATSSHead', 'atss_cls.bias'), ('YOLOXHead', 'multi_level_conv_obj.0.bias'), ('YOLOV3Head', 'convs_pred.0.bias'),
])  # fmt: skip
def test_scores_that_are_no_numbers_are_dropped_with_one_warning_that_counts_them(head, bias):
    """mmdet asks whether they exceed score_thr, and shows them no more."""
    model = build(with_head(zoo_config(head), GAUSSIAN))
    number = 5 + 1 if head == 'YOLOV3Head' else 1 if head == 'ATSSHead' else 0  # class 1; objectness of a level
    with torch.no_grad():
        model.get_parameter(f'bbox_head.{bias}')[number] = float('nan')
    maps = []
    handle = model.bbox_head.register_forward_hook(lambda module, args, outputs: maps.append(outputs))
    with pytest.warns(RuntimeWarning, match='not finite') as seen:
        found, _ = predict(model)
    handle.remove()
    scores = maps[0][2] if head == 'YOLOXHead' else maps[0][0]
    count = sum(int(one.isnan().sum()) for one in scores)
    assert count > 20 and len(found)
    (warning,) = [one for one in seen if 'not finite' in str(one.message)]
    assert f'dropped {count} candidates' in str(warning.message) and 'first on image 0' in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        predict(model)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({}, ''),
        (dict(type='ATSSHead', head=None), "write bbox_head=dict\\(type='mmdet_softnms.SoftNMSDenseHead', head='mmdet"),
        (dict(head='PAAHead'), 'votes'),
        (dict(head=None), 'needs the name of the head'),
    ],
)
def test_places_of_dense_heads(changes, words):
    cfg = with_head(zoo_config('ATSSHead'), GAUSSIAN)
    cfg.model.bbox_head.update({key: value for key, value in changes.items() if value is not None})
    for key, value in changes.items():
        cfg.model.bbox_head.pop(key) if value is None else None
    if not words:
        check_places(cfg)
        return
    with pytest.raises(ValueError, match=words):
        check_places(cfg)
