"""Sweeps: what a grid means, that every way of running it gives the same rows, and that nothing is done twice."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.scoring.settings import (
    DEFAULT_SWEEP,
    baseline_of,
    check_thresholds,
    default_settings,
    sweep_settings,
)
from mmdet_softnms.reevaluation.scoring.sweep import evaluate_all, forget_partial, match_all
from mmdet_softnms.registry import TASK_UTILS, build_rule
from tests.drawn import drawn_test_set

ROOT = Path(__file__).parents[2]
CFG = Config(
    dict(model=dict(test_cfg=dict(rcnn=dict(score_thr=0.05, max_per_img=100, nms=dict(type='nms', iou_threshold=0.5)))))
)


def _settings(*specs, score_thr=1e-3, max_per_img=100, min_score=1e-3):
    return sweep_settings(specs, CFG, score_thr, max_per_img, min_score)


def _rows(*specs):
    """Everything but the baseline before and the config's own behind."""
    settings = _settings(*specs)
    assert settings[0].is_baseline and settings[-1].source == 'config'
    return [setting.params for setting in settings[1:-1]]


def test_a_range_has_both_ends():
    assert [row['sigma'] for row in _rows('SoftNMS.sigma=0.1:1.0:0.1')] == [
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0
    ]  # fmt: skip
    assert [row['sigma'] for row in _rows('SoftNMS.sigma=0.3:0.75:0.2')] == [0.3, 0.5, 0.7]


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
    settings = _settings(*specs, min_score=0.01)
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
    assert [one.params for one in _settings(str(path), min_score=0.01)] == [one.params for one in settings]
    rows = _rows('VotedNMS.rule=SupportedNMS', 'VotedNMS.rule.power=4,8', 'VotedNMS.rule.rule.iou_threshold=0.4')
    assert [(row['rule']['power'], row['rule']['rule']['iou_threshold']) for row in rows] == [(4, 0.4), (8, 0.4)]


def eval_config(text):
    names = {}
    exec(text, {}, names)
    return names


def test_class_agnostic_rules_inside_a_rule_have_that_baseline():
    settings = _settings('VotedNMS.rule=HardNMS', 'VotedNMS.rule.class_agnostic=false,true')
    assert [(one.name, one.class_agnostic) for one in settings[:-1]] == [
        ('HardNMS', False), ('VotedNMS', False), ('HardNMS', True), ('VotedNMS', True)
    ]  # fmt: skip


def test_presets_stand_for_their_specs():
    rows = _rows('recommended')
    assert 15 <= len(rows) <= 25 and {'SupportedNMS'} & {row.get('rule', {}).get('type') for row in rows} == set()
    everything = _settings('all-rules')
    rules = {name for name in TASK_UTILS.module_dict if name.endswith(('NMS', 'Fusion', 'Weighted'))}
    assert {one.name for one in everything[:-1]} == rules - {'MmcvNMS'}  # which is mmdet's
    assert len(_settings('recommended', 'HardNMS.iou_threshold=0.6')) == len(rows) + 3


def test_thresholds_are_crossed_with_everything_and_bring_their_baselines():
    settings = _settings('SoftNMS.sigma=0.4,0.6', 'score_thr=0.001,0.05', 'max_per_img=50,100', 'min_score=0.001,0.01')
    assert len(settings) == 4 * (1 + 4) + 1
    for number, setting in enumerate(settings[:-1]):
        assert setting.is_baseline == (number % 5 == 0)
        assert setting.group == settings[number - number % 5].group


def test_without_rules_the_default_ones_are_taken():
    names = [setting.name for setting in _settings('score_thr=0.01,0.05')]
    assert names == ['HardNMS', 'SoftNMS', 'SoftNMS'] * 2 + ['nms']


def test_the_default_grid_of_select():
    assert len(_settings(*DEFAULT_SWEEP)) == 1 + 10 + 7 + 4 + 1


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
        _settings(spec)


def test_values_of_a_parameter_that_is_named_again_are_added(tmp_path):
    (tmp_path / 'sweep.yml').write_text('score_thr: [0.001]')
    specs = ['SoftNMS.sigma=0.1,0.2', 'SoftNMS.sigma=0.2,0.5', 'score_thr=0.05', str(tmp_path / 'sweep.yml')]
    rows = [(one.rule.params.get('sigma'), one.score_thr) for one in _settings(*specs) if one.source == 'table']
    assert rows == [(sigma, score_thr) for score_thr in (0.05, 0.001) for sigma in (None, 0.1, 0.2, 0.5)]


@pytest.mark.parametrize('value', [True, '0.05', None])
def test_thresholds_are_numbers(value):
    with pytest.raises(ReevaluationError, match='score_thr must be in'):
        check_thresholds(value, 100)
    with pytest.raises(ReevaluationError, match='max_per_img must be'):
        check_thresholds(0.05, value)


def test_a_sweep_without_effect_is_refused():
    with pytest.raises(ReevaluationError, match=r'SoftNMS.sigma changes nothing'):
        _settings('SoftNMS.method=linear', 'SoftNMS.sigma=0.1:1:0.1')


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
        _settings(str(tmp_path / 'sweep.yml'))
    assert '\n' not in str(raised.value)


def _without_times(rows):
    return [row.to_dict() | dict(seconds=0, metric_seconds=0) for row in rows]


@pytest.fixture(scope='module')
def drawn():
    return drawn_test_set()


@pytest.fixture(scope='module')
def rows(drawn):
    return evaluate_all(drawn[0], _settings('SoftNMS.sigma=0.2,0.5,0.9'), drawn[1])


def test_processes_give_the_same_rows_and_matches(drawn, rows):
    settings = _settings('SoftNMS.sigma=0.2,0.5,0.9')
    assert len({row.metrics['AP'] for row in rows}) > 3
    assert _without_times(evaluate_all(drawn[0], settings, drawn[1], processes=2)) == _without_times(rows)
    one, two = (match_all(drawn[0], settings[:2], drawn[1], processes=number) for number in (1, 2))
    for left, right in zip(one, two, strict=True):
        for name, values in vars(left).items():
            assert (values == getattr(right, name)).all()


def wait_for_ever(scorer, setting):
    print('at work', flush=True)
    time.sleep(600)


def test_workers_end_with_a_killed_parent():
    """Nobody tells them, and they would wait for more work; what they share is cleared away, too."""
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from tests.drawn import drawn_test_set
from tests.test_reevaluation.test_sweep import _settings, wait_for_ever
from mmdet_softnms.reevaluation.scoring.sweep import _run
if __name__ == '__main__':
    candidates, truth = drawn_test_set()
    settings = _settings('SoftNMS.sigma=0.2,0.5')
    list(_run(wait_for_ever, candidates, settings, [0, 1], truth, 2))
"""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'main.py').write_text(script)
        environment = dict(os.environ, TMPDIR=folder)
        command = [sys.executable, f'{folder}/main.py']
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert parent.stdout.readline() == parent.stdout.readline() == 'at work\n'
        assert list(Path(folder).glob('mmdet_softnms_*'))
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ''  # the pipe ends with the last process that holds it
        assert not list(Path(folder).glob('mmdet_softnms_*'))


class _StopError(Exception):
    pass


def test_an_interrupted_sweep_goes_on_where_it_stopped(drawn, rows, tmp_path):
    settings = _settings('SoftNMS.sigma=0.2,0.5,0.9')

    def stop(row, done, total):
        if done == 2:
            raise _StopError

    with pytest.raises(_StopError):
        evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a', on_row=stop)
    partial = tmp_path / 'sweep-partial-0.jsonl'
    # A kill in the middle of writing leaves half a line.
    partial.write_text(partial.read_text() + '{"identity": "a", "setting": "tab')
    fresh = []
    again = evaluate_all(
        drawn[0],
        settings,
        drawn[1],
        work_dir=tmp_path,
        identity='a',
        on_row=lambda row, done, total: fresh.append(done),
    )
    assert _without_times(again) == _without_times(rows)
    # Two kept, three new: kept ones keep the seconds they took.
    assert [one.seconds for one in again[:2]] == [
        one.seconds for one in evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a')[:2]
    ]
    assert fresh == [1, 2, 3, 4, 5]
    forget_partial(tmp_path)
    assert not partial.exists()


def test_kept_rows_of_any_content_are_ignored_with_a_line(drawn, rows, tmp_path):
    """Kept rows are read from a folder that anybody may have written to: none is taken that is not a row."""
    settings = _settings('SoftNMS.sigma=0.2,0.5,0.9')
    evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a')
    partial = tmp_path / 'sweep-partial-0.jsonl'
    kept = [json.loads(line) for line in partial.read_text().split('\n') if line]
    one = {**kept[0], 'row': {**kept[0]['row'], 'metrics': {**kept[0]['row']['metrics'], 'AP': 0.123}}}
    strange = [
        one | dict(row=[]),
        one | dict(row={**one['row'], 'surplus': 1}),
        one | dict(row={**one['row'], 'rule': 'Other'}),
        one | dict(row={**one['row'], 'seconds': 'long'}),
        one | dict(row={**one['row'], 'metrics': {'AP': 0.123}}),
        one | dict(row={**one['row'], 'metrics': {**one['row']['metrics'], 'AP': float('nan')}}),
        one | dict(row={**one['row'], 'metrics': {**one['row']['metrics'], 'AP': 7}}),
        [],
        dict(identity='a'),
    ]
    partial.write_bytes(b'\xff\x00\n' + '\n'.join(map(json.dumps, strange)).encode())
    (tmp_path / 'sweep-partial-1.jsonl').mkdir()
    said = []
    again = evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a', say=said.append)
    assert _without_times(again) == _without_times(rows)
    assert len(said) == 2 and f'{len(strange) + 1} lines are not finished rows' in said[0]
    forget_partial(tmp_path)


def test_class_agnostic_rows_have_a_baseline_of_their_own():
    settings = _settings('SoftNMS.sigma=0.5', 'SoftNMS.class_agnostic=true,false')
    assert [(one.name, one.class_agnostic, one.is_baseline) for one in settings[:-1]] == [
        ('HardNMS', False, True), ('SoftNMS', False, False), ('HardNMS', True, True), ('SoftNMS', True, False),
    ]  # fmt: skip
    assert [settings.index(baseline_of(one, settings)) for one in settings[:-1]] == [0, 0, 2, 2]
    every = default_settings(CFG, 1e-3, 100, 1e-3, class_agnostic=True)
    assert [one.class_agnostic for one in every] == [True, True, True, False]  # the config's is what it is


def test_kept_rows_of_other_candidates_are_not_taken(drawn, rows, tmp_path):
    settings = _settings('SoftNMS.sigma=0.2,0.5,0.9')
    evaluate_all(drawn[0], settings, drawn[1], work_dir=tmp_path, identity='a')
    other = drawn_test_set(seed=1)
    found = evaluate_all(other[0], settings, other[1], work_dir=tmp_path, identity='b')
    assert found[0].metrics['AP'] != rows[0].metrics['AP']
