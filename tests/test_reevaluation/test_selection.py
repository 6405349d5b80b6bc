"""Choice of settings: resampled APs are COCO's on resampled data, and luck is not sold as skill."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.choice.resampling import bootstrap_weights, by_rank, image_ap, pool_folds, weighted_ap
from mmdet_softnms.reevaluation.choice.selection import Difference, select
from mmdet_softnms.reevaluation.report.verdict import selection_text
from mmdet_softnms.reevaluation.result import Reevaluation, Session
from mmdet_softnms.reevaluation.scoring.matching import Objects, match
from mmdet_softnms.reevaluation.scoring.metrics import CRITERIA, Evaluator
from mmdet_softnms.reevaluation.scoring.settings import Setting
from mmdet_softnms.reevaluation.scoring.sweep import detections, evaluate_all, match_all
from mmdet_softnms.roi_heads import SoftNMSRoIHead
from mmdet_softnms.rules import HardNMS, NoSuppression, SoftNMS, SupportedNMS, VotedNMS
from tests.drawn import drawn_test_set
from tests.tiny import build, predict, tiny_config

RULES = [HardNMS(0.5), SoftNMS('gaussian'), NoSuppression()]
NOWHERE = np.zeros(60, np.int64)


@pytest.fixture(scope='module', params=[0, 1])
def drawn(request):
    return drawn_test_set(seed=request.param)


def _results(candidates, rule, max_per_img=-1):
    return detections(candidates, Setting(rule, 0.0, max_per_img))


def _resampled(results, truth, drawn_images):
    """Detections and ground truth in which images are really there as often as they were drawn."""
    resampled = copy.deepcopy(truth)
    resampled.image_ids = list(range(1, len(drawn_images) + 1))
    resampled.coco['images'] = [dict(id=image_id) for image_id in resampled.image_ids]
    resampled.coco['annotations'] = []
    for new, image in enumerate(drawn_images, 1):
        for one in truth.coco['annotations']:
            if one['image_id'] == truth.image_ids[image]:
                number = len(resampled.coco['annotations']) + 1
                resampled.coco['annotations'].append(dict(one, id=number, image_id=new))
    return [results[image] for image in drawn_images], resampled


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize('criterion', CRITERIA)
def test_equal_weights_give_cocos_ap(drawn, rule, criterion):
    candidates, truth = drawn
    results, objects = _results(candidates, rule), Objects.of(truth)
    value = weighted_ap(match(results, objects), objects.counts, np.ones((1, 30), np.int32), NOWHERE, 0, criterion)
    assert value[0, 0] == pytest.approx(Evaluator(truth)(results).metrics[criterion], abs=1e-12)


def test_more_than_100_detections_of_a_class_in_an_image(drawn):
    candidates, truth = drawn
    random = np.random.default_rng(0)
    results = []
    for result in _results(candidates, NoSuppression()):
        more = (
            torch.from_numpy(random.integers(0, len(result), 400)) if len(result) else torch.zeros(0, dtype=torch.int64)
        )
        repeated = result[more] if len(result) else result
        results.append(InstanceData(bboxes=repeated.bboxes, scores=repeated.scores, labels=repeated.labels))
    assert max(int(torch.bincount(result.labels).max()) for result in results if len(result)) > 100
    objects = Objects.of(truth)
    value = weighted_ap(match(results, objects), objects.counts, np.ones((1, 30), np.int32), NOWHERE, 0)
    assert value[0, 0] == pytest.approx(Evaluator(truth)(results).metrics['AP'], abs=1e-12)


def test_a_resample_gives_cocos_ap_on_the_images_drawn(drawn):
    """Scores are made distinct: equal ones of different images have no order that resampling could keep."""
    candidates, truth = drawn
    results = _results(candidates, SoftNMS('gaussian'))
    random = np.random.default_rng(0)
    for result in results:
        result.scores = torch.tensor(np.sort(random.random(len(result)))[::-1].copy(), dtype=torch.float32)
    objects = Objects.of(truth)
    weights = bootstrap_weights(30, 4, seed=3)
    folds = np.arange(30) % 3
    values = weighted_ap(match(results, objects), objects.counts, weights, folds, 3)
    for weight, value in zip(weights, values, strict=True):
        for fold in range(4):  # the last: all images
            images = [i for i in range(30) for _ in range(weight[i]) if folds[i] != fold]
            some, resampled = _resampled(results, truth, images)
            assert value[fold] == pytest.approx(Evaluator(resampled)(some).metrics['AP'], abs=1e-12)


def test_pooled_folds_are_scored_once(drawn):
    candidates, truth = drawn
    objects, folds = Objects.of(truth), np.arange(30) % 3
    results = [_results(candidates, rule) for rule in RULES]
    pooled = pool_folds([match(one, objects) for one in results], [2, 0, 1], folds, objects.image_order)
    value = weighted_ap(pooled, objects.counts, np.ones((1, 30), np.int32), NOWHERE, 0)
    mixed = [results[[2, 0, 1][folds[image]]][image] for image in range(30)]
    assert value[0, 0] == pytest.approx(Evaluator(truth)(mixed).metrics['AP'], abs=1e-12)


def test_the_ap_of_one_image_is_cocos_on_that_image(drawn):
    """With one class an image; over classes it is weighted by objects."""
    candidates, truth = drawn
    results, objects = _results(candidates, HardNMS(0.5)), Objects.of(truth)
    values = image_ap(match(results, objects), objects.counts)
    checked = 0
    for image in range(30):
        per_class = objects.counts[image]
        if per_class.sum() == 0:
            assert values[image] == -1
            continue
        some, alone = _resampled(results, truth, [image])
        aps = Evaluator(alone)(some).per_class
        expected = (
            sum(aps[f'class {label}'] * count for label, count in enumerate(per_class) if count) / per_class.sum()
        )
        assert values[image] == pytest.approx(expected, abs=1e-12)
        checked += 1
    assert checked > 15


def _noise(num_settings, num_images=60, seed=0):
    """Settings that are all equally good: one drawn result, its scores shaken anew for each."""
    candidates, truth = drawn_test_set(num_images, seed=seed)
    objects = Objects.of(truth)
    base = _results(candidates, HardNMS(0.5))
    random = np.random.default_rng(seed)
    settings, matches = [Setting(HardNMS(0.5), 1e-3, 100)], [match(base, objects)]
    for number in range(1, num_settings):
        shaken = []
        for result in base:
            scores = result.scores + torch.tensor(random.normal(0, 0.15, len(result)), dtype=torch.float32)
            order = scores.argsort(descending=True)
            shaken.append(InstanceData(bboxes=result.bboxes[order], scores=scores[order], labels=result.labels[order]))
        settings.append(Setting(SoftNMS('gaussian', sigma=number / num_settings), 1e-3, 100))
        matches.append(match(shaken, objects))
    return settings, matches, objects


def test_rules_that_rescale_scores_are_pooled_as_well_as_others():
    """The scores of every second setting in another scale: not a digit changes, though the folds mix the settings."""
    settings, matches, objects = _noise(6)
    chosen = select(settings, matches, objects)
    assert len({number % 2 for number in chosen.chosen_by_fold}) == 2
    scaled = [
        dataclasses.replace(one, score=0.3 * one.score**3) if number % 2 else one for number, one in enumerate(matches)
    ]
    assert select(settings, scaled, objects) == chosen
    folds = np.random.default_rng(0).permutation(60) % 5  # the control: as they are, these scores cannot be pooled
    values = []
    for some in (matches, scaled, [by_rank(one) for one in scaled]):
        pooled = pool_folds(some, chosen.chosen_by_fold, folds, objects.image_order)
        values.append(weighted_ap(pooled, objects.counts, np.ones((1, 60), np.int32), NOWHERE, 0)[0, 0])
    assert values[1] < values[0] - 0.01
    assert values[2] == chosen.procedure.value


def test_support_on_and_off_in_one_grid():
    """Nearly as good as one another here, so that folds choose both, whose scores are of different scales."""
    candidates, truth = drawn_test_set(60, seed=2)
    rules = [HardNMS(0.5), SoftNMS(), VotedNMS(SoftNMS(), tolerance=0.05), SupportedNMS(SoftNMS())]
    settings, objects = [Setting(rule, 1e-3, 100) for rule in rules], Objects.of(truth)
    matches = match_all(candidates, settings, truth, processes=1)
    chosen = select(settings, matches, objects)
    assert {settings[number].name for number in chosen.chosen_by_fold} == {'VotedNMS', 'SupportedNMS'}
    worth, fixed = chosen.procedure, chosen.settings[chosen.chosen]
    assert fixed.low < worth.value - worth.baseline < fixed.high
    assert worth.high - worth.low < 1.25 * (fixed.high - fixed.low)


def test_the_best_of_many_lucky_settings_is_not_flattered():
    """Nothing is better than a baseline that is just as noisy; the best of 30 looks so, the procedure must not."""
    flattered, honest = [], []
    for seed in range(3):
        settings, matches, objects = _noise(32, seed=seed)
        aps = [weighted_ap(one, objects.counts, np.ones((1, 60), np.int32), NOWHERE, 0)[0, 0] for one in matches[1:]]
        matches[0] = matches[1 + int(np.argsort(aps)[len(aps) // 2])]
        chosen = select(settings, matches, objects, seed=seed, resamples=1000)
        flattered.append(max(one.value - one.baseline for one in chosen.settings))
        honest.append(chosen.procedure.value - chosen.procedure.baseline)
        assert not chosen.procedure.significant
    assert min(flattered) > 0.01
    assert np.mean(honest) < np.mean(flattered) / 2


def test_a_real_gain_is_found():
    candidates, truth = drawn_test_set(60)
    objects = Objects.of(truth)
    good = _results(candidates, SoftNMS('linear', iou_threshold=0.5))
    bad = []
    for result in good:
        half = torch.arange(len(result)) % 2 == 0
        bad.append(InstanceData(bboxes=result.bboxes[half], scores=result.scores[half], labels=result.labels[half]))
    settings = [Setting(HardNMS(0.5), 1e-3, 100), Setting(SoftNMS('linear', iou_threshold=0.5), 1e-3, 100)]
    matches = [match(bad, objects), match(good, objects)]
    chosen = select(settings, matches, objects)
    assert chosen.chosen == 1 and chosen.chosen_by_fold == [1] * 5
    assert chosen.procedure.significant and chosen.procedure.low > 0
    assert chosen.procedure.value == pytest.approx(chosen.settings[1].value, abs=1e-12)
    # On a split of its own it is the same setting, so the same value.
    elsewhere = select(settings, matches, objects, tuning=(matches, objects), seed=5)
    assert elsewhere.chosen == 1 and elsewhere.chosen_by_fold == []
    assert elsewhere.procedure.value == pytest.approx(chosen.settings[1].value, abs=1e-12)


def test_settings_that_are_the_same_do_not_differ():
    settings, matches, objects = _noise(2)
    chosen = select(settings, [matches[0]] * 2, objects)
    assert chosen.procedure.value == chosen.procedure.baseline
    assert not chosen.procedure.significant and chosen.procedure.low == chosen.procedure.high == 0


def test_it_can_be_repeated():
    settings, matches, objects = _noise(3)
    assert select(settings, matches, objects) == select(settings, matches, objects, threads=2)


def test_the_interval_is_that_of_95_percent():
    """Against a bootstrap of its own seed: 90 or 99 % would be 16 % narrower or 31 % wider, not within 8 %."""
    settings, matches, objects = _noise(2)
    chosen = select(settings, matches, objects, resamples=4000)
    weights = bootstrap_weights(60, 4000, seed=77)[1:]
    value, baseline = (weighted_ap(one, objects.counts, weights, NOWHERE, 0)[:, 0] for one in matches[::-1])
    differences = np.sort(value - baseline)
    tails = differences[100], differences[-101]  # 2.5 % on either side
    width = tails[1] - tails[0]
    assert chosen.settings[1].low == pytest.approx(tails[0], abs=0.04 * width)
    assert chosen.settings[1].high == pytest.approx(tails[1], abs=0.04 * width)


@pytest.mark.parametrize(
    ('low', 'high', 'significant'),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False), (-0.1, 0.0, False)],
)
def test_significant_is_an_interval_without_zero(low, high, significant):
    assert Difference('', 0.5, 0.5, low, high).significant == significant


def _aps(matches, objects, weights, folds, num_folds, criterion):
    return np.stack([weighted_ap(one, objects.counts, weights, folds, num_folds, criterion)[0] for one in matches])


@pytest.mark.parametrize('split', ['folds', 'val'])
@pytest.mark.parametrize('criterion', ['AP', 'AP75'])
def test_chosen_is_the_best_by_the_criterion_on_the_images_as_they_are(split, criterion):
    """Not by another criterion, and not on one of the resamples; each choice is computed here once more."""
    others, resampled = 0, 0
    for seed in (2, 3):
        settings, matches, objects = _noise(12, num_images=30, seed=seed)
        weights, folds = np.ones((1, 30), np.int32), np.random.default_rng(seed).permutation(30) % 3

        options = dict(tuning=(matches, objects)) if split == 'val' else dict(num_folds=3)
        chosen = select(settings, matches, objects, criterion=criterion, seed=seed, **options)
        values = _aps(matches, objects, weights, folds, 3, criterion)
        by_fold = values[:, :3].argmax(0).tolist()
        assert chosen.criterion == criterion and chosen.chosen == values[:, 3].argmax()
        assert chosen.chosen_by_fold == ([] if split == 'val' else by_fold)
        assert [one.value for one in chosen.settings] == pytest.approx(values[:, 3].tolist(), abs=1e-12)
        if split == 'val':
            expected = values[chosen.chosen, 3]
        else:
            pooled = pool_folds([by_rank(one) for one in matches], by_fold, folds, objects.image_order)
            expected = weighted_ap(pooled, objects.counts, weights, folds, 0, criterion)[0, 0]
        assert chosen.procedure.value == pytest.approx(expected, abs=1e-12)
        assert chosen.procedure.baseline == pytest.approx(values[0, 3], abs=1e-12)
        others += any(_aps(matches, objects, weights, folds, 0, by).argmax() != chosen.chosen for by in CRITERIA)
        last = bootstrap_weights(30, 1000, seed + (2 if split == 'val' else 1))[-1:]
        resampled += _aps(matches, objects, last, folds, 0, criterion).argmax() != chosen.chosen
    assert others and resampled  # so that each could be mistaken


@pytest.mark.parametrize('split', ['folds', 'val'])
def test_each_group_of_thresholds_has_its_baseline(split):
    """Two of ``score_thr`` by two of ``max_per_img``; the best setting is of the last group."""
    candidates, truth = drawn_test_set(30)
    objects = Objects.of(truth)
    groups = [(score_thr, number) for score_thr in (1e-3, 0.3) for number in (20, 5)]
    settings = [Setting(rule, *group) for group in groups for rule in (HardNMS(0.5), SoftNMS('gaussian'))]
    matches = [match(_results(candidates, setting.rule, setting.max_per_img), objects) for setting in settings]
    for number in range(4):  # each group a little worse than the one before, so that no baseline is like another
        few = [one[: max(1, len(one) - 2 * number)] for one in _results(candidates, HardNMS(0.5), 12)]
        matches[2 * number] = match(few, objects)
    matches[7] = match(_results(candidates, SoftNMS('linear', iou_threshold=0.5)), objects)
    weights, nowhere = np.ones((1, 30), np.int32), np.zeros(30, np.int64)
    matches[1] = matches[0]
    aps = _aps(matches, objects, weights, nowhere, 0, 'AP')[:, 0].tolist()
    assert len({aps[number] for number in (0, 2, 4, 6)}) == 4
    options = dict(tuning=(matches, objects)) if split == 'val' else dict(num_folds=3)
    chosen = select(settings, matches, objects, **options)
    assert [one.baseline for one in chosen.settings] == pytest.approx([aps[n // 2 * 2] for n in range(8)], abs=1e-12)
    assert chosen.chosen == 7 and set(chosen.chosen_by_fold) <= {7}
    assert chosen.procedure.value == pytest.approx(aps[7], abs=1e-12)
    assert chosen.procedure.baseline == pytest.approx(aps[6], abs=1e-12)


@pytest.mark.parametrize('split', ['folds', 'val'])
def test_the_row_of_the_config_is_never_chosen(split):
    """It is the best by far here, and is reported as that, but it is not of the grid."""
    settings, matches, objects = _noise(3)
    truth = drawn_test_set(60)[1]
    perfect = [InstanceData(bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long())] * 60
    for number, image_id in enumerate(truth.image_ids):
        there = [one for one in truth.coco['annotations'] if one['image_id'] == image_id]
        boxes = torch.tensor([one['bbox'] for one in there], dtype=torch.float32).reshape(-1, 4)
        perfect[number] = InstanceData(
            bboxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            scores=torch.ones(len(there)),
            labels=torch.tensor([one['category_id'] - 1 for one in there], dtype=torch.int64),
        )
    settings = [*settings, Setting(SoftNMS('linear'), 1e-3, 100, source='config')]
    matches = [*matches, match(perfect, objects)]
    chosen = select(settings, matches, objects, tuning=(matches, objects) if split == 'val' else None)
    assert chosen.settings[3].value > 0.9 > max(one.value for one in chosen.settings[:3])
    assert chosen.settings[3].significant
    assert chosen.chosen != 3 and 3 not in chosen.chosen_by_fold
    assert chosen.procedure.value <= max(one.value for one in chosen.settings[:3]) + 0.02
    assert chosen.procedure.high < 0.3


@pytest.mark.parametrize('head', ['SoftNMSRoIHead', 'SoftNMSCascadeRoIHead', 'SoftNMSDoubleHeadRoIHead'])
@pytest.mark.parametrize('plugged', [False, True], ids=['stock', 'plugged'])
def test_what_is_to_be_pasted_keeps_the_detector(tmp_path, head, plugged):
    """Below a config of any supported head it builds the same network, weights and all, with the chosen rule."""
    cfg = tiny_config(head)
    stock = build(cfg)
    if plugged:
        cfg.model.roi_head.type = f'mmdet_softnms.{head}'
    settings = [Setting(HardNMS(0.5), 0.002, 70), Setting(SoftNMS('linear', iou_threshold=0.4), 0.002, 70)]
    candidates, truth = drawn_test_set(10)
    objects = Objects.of(truth)
    good = _results(candidates, SoftNMS('linear', iou_threshold=0.5))
    some = [one[torch.arange(len(one)) % 3 == 0] for one in good]
    selection = select(settings, [match(some, objects), match(good, objects)], objects)
    assert selection.chosen == 1
    rows = evaluate_all(candidates, settings, truth)
    session = Session(candidates, truth, [''] * 10)
    result = Reevaluation(
        dataset='', num_images=10, num_candidates=candidates.num_candidates, masks_left_out=False, store='',
        store_bytes=0, forward_images=0, forward_seconds=0.0, notes=[], rows=rows, session=session,
    )  # fmt: skip
    text = selection_text(selection, result, cfg)
    cfg.dump(tmp_path / 'base.py')
    (tmp_path / 'pasted.py').write_text(f"_base_ = 'base.py'\n{text[text.index('model = dict') :]}\n")
    model = build(Config.fromfile(tmp_path / 'pasted.py'), like=stock)
    assert isinstance(model.roi_head, type(stock.roi_head)) and type(model.roi_head).__name__ == head
    assert (model.roi_head.test_cfg.score_thr, model.roi_head.test_cfg.max_per_img) == (0.002, 70)
    raw, pasted = predict(stock), predict(model)
    assert [len(one.pred_instances) for one in raw] != [len(one.pred_instances) for one in pasted]


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(resamples=100), 'at least 1000'),
        (dict(num_folds=1), 'folds'),
        (dict(num_folds=61), 'folds'),
        (dict(criterion='AP60'), 'AP60'),
    ],
)
def test_bad_arguments(options, words):
    settings, matches, objects = _noise(2)
    with pytest.raises(ReevaluationError, match=words):
        select(settings, matches, objects, **options)


def test_a_snippet_is_the_setting(tmp_path):
    """Pasted below a stock config, it builds the head and the rule it was printed for."""
    setting = Setting(SoftNMS('linear', iou_threshold=0.4, min_score=0.002), 0.003, 70)
    base = tiny_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    base.dump(tmp_path / 'base.py')
    (tmp_path / 'pasted.py').write_text(f"_base_ = 'base.py'\n{setting.snippet('SoftNMSRoIHead')}\n")
    model = build(Config.fromfile(tmp_path / 'pasted.py'))
    assert isinstance(model.roi_head, SoftNMSRoIHead)
    assert model.roi_head.test_cfg.score_thr == 0.003 and model.roi_head.test_cfg.max_per_img == 70
    assert model.roi_head._rule.params == setting.rule.params
