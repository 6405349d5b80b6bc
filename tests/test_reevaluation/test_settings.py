"""What a sweep means: grids, their baselines, labels, and what is refused."""

from dataclasses import FrozenInstanceError

import pytest
from mmengine.config import Config

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.ops import weights
from mmdet_softnms.ops.weights import cos, where
from mmdet_softnms.reevaluation.scoring.settings import (
    DEFAULT_SWEEP,
    Setting,
    baseline_of,
    check_thresholds,
    default_settings,
    sweep_settings,
    varied_thresholds,
)
from mmdet_softnms.registry import TASK_UTILS, build_rule
from mmdet_softnms.rules import HardNMS, SoftNMS

CFG = Config(
    dict(
        model=dict(
            roi_head=dict(type='StandardRoIHead'),
            test_cfg=dict(rcnn=dict(score_thr=0.05, max_per_img=100, nms=dict(type='nms', iou_threshold=0.5))),
        )
    )
)


def settings_of(*specs, score_thr=1e-3, max_per_img=100, min_score=1e-3):
    return sweep_settings(specs, CFG, score_thr, max_per_img, min_score)


def _rows(*specs):
    """Everything but the baseline before and the config's own behind."""
    settings = settings_of(*specs)
    assert settings[0].is_baseline and settings[-1].source == 'config'
    return [setting.params for setting in settings[1:-1]]


def test_the_swept_parameter_says_the_method():
    rows = _rows('SoftNMS.sigma=0.4,0.6', 'SoftNMS.iou_threshold=0.3,0.5')
    assert [(row['method'], row.get('sigma', row.get('iou_threshold'))) for row in rows] == [
        ('linear', 0.3), ('linear', 0.5), ('gaussian', 0.4), ('gaussian', 0.6)
    ]  # fmt: skip


def test_parameters_of_one_rule_are_crossed_and_rules_are_not():
    rows = _rows(
        'SoftNMS.sigma=0.4,0.6', 'SoftNMS.offset=0,1', 'HardNMS.iou_threshold=0.4,0.5,0.6', 'nms.iou_threshold=0.7'
    )
    # Hard NMS at 0.5 is the baseline, and not there twice.
    assert len(rows) == 4 + 2 + 1


def test_rules_inside_a_rule(tmp_path):
    specs = ('VotedNMS.tolerance=0.02,0.05', 'VotedNMS.rule.sigma=0.4', 'VotedNMS.rule.iou_threshold=0.3')
    settings = settings_of(*specs, min_score=0.01)
    soft = dict(type='SoftNMS', min_score=0.01, offset=0)
    linear, gaussian = soft | dict(method='linear', iou_threshold=0.3), soft | dict(method='gaussian', sigma=0.4)
    found = [(one.params['rule'], one.params['tolerance']) for one in settings[1:-1]]
    assert found == [(linear, 0.02), (linear, 0.05), (gaussian, 0.02), (gaussian, 0.05)]
    assert settings[3].label == 'VotedNMS rule=(SoftNMS gaussian sigma=0.4 min_score=0.01) tolerance=0.02'
    pasted = dict(eval_config(settings[3].snippet('SoftNMSRoIHead')))['model']['test_cfg']['rcnn']['nms']
    assert pasted.pop('_delete_') and build_rule(pasted).params == settings[3].rule.params
    # The same from a file, and two rules deep.
    path = tmp_path / 'sweep.yml'
    path.write_text('rules: [{type: VotedNMS, tolerance: [0.02, 0.05], rule: {sigma: 0.4, iou_threshold: 0.3}}]')
    assert [one.params for one in settings_of(str(path), min_score=0.01)] == [one.params for one in settings]
    rows = _rows('VotedNMS.rule=SupportedNMS', 'VotedNMS.rule.power=4,8', 'VotedNMS.rule.rule.iou_threshold=0.4')
    assert [(row['rule']['power'], row['rule']['rule']['iou_threshold']) for row in rows] == [(4, 0.4), (8, 0.4)]


def eval_config(text):
    names = {}
    exec(text, {}, names)
    return names


def test_class_agnostic_rules_inside_a_rule_have_that_baseline():
    settings = settings_of('VotedNMS.rule=HardNMS', 'VotedNMS.rule.class_agnostic=false,true')
    assert [(one.name, one.class_agnostic) for one in settings[:-1]] == [
        ('HardNMS', False), ('VotedNMS', False), ('HardNMS', True), ('VotedNMS', True)
    ]  # fmt: skip


def test_presets_stand_for_their_specs():
    rows = _rows('recommended')
    assert 15 <= len(rows) <= 25 and {'SupportedNMS'} & {row.get('rule', {}).get('type') for row in rows} == set()
    everything = settings_of('all-rules')
    rules = {name for name in TASK_UTILS.module_dict if name.endswith(('NMS', 'Fusion', 'Weighted'))}
    others = {'MmcvNMS', 'RotatedSoftNMS'}  # mmdet's, and of other boxes
    assert {one.name for one in everything[:-1]} == rules - others
    assert len(settings_of('recommended', 'HardNMS.iou_threshold=0.6')) == len(rows) + 3


def test_thresholds_are_crossed_with_everything_and_bring_their_baselines():
    settings = settings_of(
        'SoftNMS.sigma=0.4,0.6', 'score_thr=0.001,0.05', 'max_per_img=50,100', 'min_score=0.001,0.01'
    )
    assert len(settings) == 4 * (1 + 4) + 1
    for number, setting in enumerate(settings[:-1]):
        assert setting.is_baseline == (number % 5 == 0)
        assert setting.group == settings[number - number % 5].group


def test_without_rules_the_default_ones_are_taken():
    names = [setting.name for setting in settings_of('score_thr=0.01,0.05')]
    assert names == ['HardNMS', 'SoftNMS', 'SoftNMS'] * 2 + ['nms']


def test_the_default_grid_of_select():
    """Of the recommended rules, some of each; none that rescales scores."""
    settings = settings_of(*DEFAULT_SWEEP)
    assert len(settings) <= 1 + 10 + 7 + 4 + 1  # as many as the grid over SoftNMS and HardNMS had that came before
    assert [one.params for one in settings] == [one.params for one in settings_of('recommended')]
    assert {one.name for one in settings[:-1]} == {'HardNMS', 'SoftNMS', 'VotedNMS'}


def test_a_file(tmp_path):
    path = tmp_path / 'sweep.yaml'
    path.write_text(
        'rules:\n'
        '  - {type: SoftNMS, method: gaussian, sigma: 0.4:0.6:0.1}\n'
        '  - {type: SoftNMS, method: linear, iou_threshold: [0.2, 0.3]}\n'
        '  - {type: soft_nms, iou_threshold: 0.3}\n'
        'score_thr: 0.01\n'
    )
    rows = _rows(str(path))
    assert len(rows) == 6
    assert rows[-1] == dict(iou_threshold=0.3, min_score=1e-3, score_thr=0.01, max_per_img=100)


@pytest.mark.parametrize(
    ('spec', 'words'),
    [
        ('SoftNMS.sigma', 'is not a sweep'),
        ('sigma=0.5', 'is not a sweep'),
        ('SoftNMS.sigma=', 'empty value'),
        ('SoftNMS.sigma=0.1,,0.3', 'empty value'),
        ('SoftNMS.sigma=0.1:1.0', 'a range is first:last:step'),
        ('SoftNMS.sigma=1.0:0.1:0.1', 'a range is first:last:step'),
        ('SoftNMS.sigma=0.1:1.0:0', 'a range is first:last:step'),
        ('SoftNMS.sigma=0.1:1.0:-0.1', 'a range is first:last:step'),
        ('SoftNMS.sigma=0:1:1e-9', 'a range is first:last:step'),
        ('SoftNMS.sigma=0.0,0.5', 'sigma'),
        ('SoftNMS.iou_threshold=1.5', 'iou_threshold'),
        ('SoftNMS.method=cubic', 'method'),
        ('SoftNMS.sigmoid=0.5', 'sigmoid'),
        ('HarderNMS.iou_threshold=0.5', 'HarderNMS'),
        ('score_thr=2', 'score_thr must be in'),
        ('score_thr=much', 'score_thr must be in'),
        ('max_per_img=-2', 'max_per_img must be'),
        ('max_per_img=10.5', 'max_per_img must be'),
        ('min_score=2', 'min_score'),
        ('missing.yaml', 'cannot be read'),
        ('soft_nms.sigma=-1', 'sigma must be'),
        ('soft_nms.foo=1', 'foo'),
        ('soft_nms.method=bogus', 'bogus'),
        ('nms.iou_threshold=abc', 'abc'),
    ],
)
def test_bad_grids_name_what_is_wrong(spec, words):
    with pytest.raises(ReevaluationError, match=words):
        settings_of(spec)


def test_values_of_a_parameter_that_is_named_again_are_added(tmp_path):
    (tmp_path / 'sweep.yml').write_text('score_thr: [0.001]')
    specs = ['SoftNMS.sigma=0.1,0.2', 'SoftNMS.sigma=0.2,0.5', 'score_thr=0.05', str(tmp_path / 'sweep.yml')]
    rows = [(one.rule.params.get('sigma'), one.score_thr) for one in settings_of(*specs) if one.source == 'table']
    assert rows == [(sigma, score_thr) for score_thr in (0.05, 0.001) for sigma in (None, 0.1, 0.2, 0.5)]


@pytest.mark.parametrize('value', [True, '0.05', None])
def test_thresholds_are_numbers(value):
    with pytest.raises(ReevaluationError, match='score_thr must be in'):
        check_thresholds(value, 100)
    with pytest.raises(ReevaluationError, match='max_per_img must be'):
        check_thresholds(0.05, value)


def test_a_sweep_without_effect_is_refused():
    with pytest.raises(ReevaluationError, match=r'SoftNMS.sigma changes nothing'):
        settings_of('SoftNMS.method=linear', 'SoftNMS.sigma=0.1:1:0.1')


@pytest.mark.parametrize(
    'content',
    [
        '- a',
        'rule: []',
        'rules: [SoftNMS]',
        'rules: [{sigma: 1}]',
        'rules: [',
        'rules: 5',
        'score_thr: []',
        'score_thr: [null]',
        'score_thr: [[1]]',
        'score_thr: [2020-01-01]',
        'score_thr: [!!set {a}]',
        'rules: [{type: [SoftNMS]}]',
        'rules: [{type: SoftNMS, 1: 2}]',
        'rules: [{type: SoftNMS, sigma: {a: 1}}]',
        'rules: [{type: SoftNMS, sigma: [.nan]}]',
        '1: 2',
        '',
    ],
)
def test_bad_files(tmp_path, content):
    (tmp_path / 'sweep.yml').write_text(content)
    with pytest.raises(ReevaluationError, match='sweep.yml|sweep over SoftNMS') as raised:
        settings_of(str(tmp_path / 'sweep.yml'))
    assert '\n' not in str(raised.value)


def test_class_agnostic_rows_have_a_baseline_of_their_own():
    settings = settings_of('SoftNMS.sigma=0.5', 'SoftNMS.class_agnostic=true,false')
    assert [(one.name, one.class_agnostic, one.is_baseline) for one in settings[:-1]] == [
        ('HardNMS', False, True), ('SoftNMS', False, False), ('HardNMS', True, True), ('SoftNMS', True, False),
    ]  # fmt: skip
    assert [settings.index(baseline_of(one, settings)) for one in settings[:-1]] == [0, 0, 2, 2]
    every = default_settings(CFG, 1e-3, 100, 1e-3, class_agnostic=True)
    assert [one.class_agnostic for one in every] == [True, True, True, False]  # the config's is what it is


def cosine(iou, iou_threshold):
    return where(iou > iou_threshold, (1 + cos(3.141592653589793 * iou)) / 2, 1)


def test_a_parameter_sweeps_the_first_rule_that_takes_it(monkeypatch):
    monkeypatch.setattr(weights, 'WEIGHTS', dict(weights.WEIGHTS))
    weights.register(cosine)
    assert [row['method'] for row in _rows('SoftNMS.iou_threshold=0.3')] == ['linear']
    monkeypatch.setattr(weights, 'WEIGHTS', {name: weights.WEIGHTS[name] for name in ('hard', 'linear', 'gaussian')})
    assert [row['method'] for row in _rows('SoftNMS.iou_threshold=0.3')] == ['hard']
    assert [row['method'] for row in _rows('SoftNMS.sigma=0.3')] == ['gaussian']


def test_a_setting_is_a_rule_with_its_thresholds():
    setting = Setting(SoftNMS('gaussian', sigma=0.4), 0.01, 50)
    assert setting.params == dict(
        method='gaussian', sigma=0.4, min_score=1e-3, offset=0, score_thr=0.01, max_per_img=50
    )
    assert setting.label == 'SoftNMS gaussian sigma=0.4 min_score=0.001'
    assert Setting(HardNMS(0.5), 0.01, 50, source='config').label == 'HardNMS iou_threshold=0.5 (config)'
    with pytest.raises(FrozenInstanceError):
        setting.score_thr = 0.5
    with pytest.raises(ReevaluationError, match='score_thr must be in'):
        Setting(HardNMS(0.5), 1.0, 50)


def test_only_hard_nms_at_one_half_is_a_baseline():
    assert Setting(HardNMS(0.5), 0.01, 50).is_baseline
    for other in (HardNMS(0.4), HardNMS(0.5, offset=1), SoftNMS('hard', iou_threshold=0.5)):
        assert not Setting(other, 0.01, 50).is_baseline
    assert not Setting(HardNMS(0.5), 0.01, 50, source='config').is_baseline


def test_the_configs_row_refers_to_the_first_baseline_where_its_group_has_none():
    first, second = (Setting(HardNMS(0.5), score_thr, 100) for score_thr in (0.01, 0.05))
    settings = [first, second, Setting(HardNMS(0.7), 0.05, 100, 'config'), Setting(HardNMS(0.7), 0.2, 9, 'config')]
    assert [baseline_of(one, settings) for one in settings] == [first, second, second, first]
    assert baseline_of(Setting(SoftNMS(), 0.2, 9), settings) is None
    assert baseline_of(settings[2], []) is None


def test_thresholds_with_several_values_are_named():
    settings = settings_of('score_thr=0.001,0.05', 'SoftNMS.sigma=0.4,0.6')
    assert varied_thresholds(settings) == ['score_thr']
    assert varied_thresholds(settings_of('SoftNMS.sigma=0.4,0.6')) == []
