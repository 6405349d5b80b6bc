"""The tables of docs/rules.md: measured as a sweep measures, and on the page as they are stored."""

import importlib.util
import json
from pathlib import Path

import pytest

from mmdet_softnms.reevaluation.scoring.sweep import evaluate_all
from tests.drawn import CFG, drawn_test_set

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('rules_table', ROOT / 'docs/rules_table.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_as_the_sweep_of_all_rules(script, monkeypatch):
    monkeypatch.setattr(script, 'FAMILIES', {'two': ('VotedNMS.rule.sigma=0.5', 'VotedNMS.tolerance=0.0125,0.05')})
    candidates, truth = drawn_test_set(num_images=8)
    settings = script.settings_of(('all-rules',), CFG)
    expected = evaluate_all(candidates, settings, truth)
    found = script.measure(candidates, truth, CFG)
    assert len(found['rows']) == len(expected) == 25
    for row, other in zip(found['rows'], expected, strict=True):
        assert (row['rule'], row['params']) == (other.rule, other.setting.rule.params)
        for name, value in row['metrics'].items():
            assert value == pytest.approx(other.metrics[name], abs=1e-6)
        gain, is_reference = row['gain'], script.label(row['rule'], row['params']) == 'gaussian 0.5'
        assert row['ms'] > 0 and gain['low'] <= gain['high'] and (gain['sd'] == 0) >= is_reference
    reference = next(row.metrics['AP'] for row in expected if script.is_reference(row.setting))
    assert expected[0].setting.is_baseline
    assert found['rows'][0]['gain']['value'] == pytest.approx(expected[0].metrics['AP'] - reference, abs=1e-6)
    assert [one['family'] for one in found['tuned']] == list(script.FAMILIES)
    for one in found['tuned']:
        assert one['AP'] - one['value'] == pytest.approx(reference, abs=1e-5)  # pooled: the gaussian rule in all folds
    json.dumps(found, allow_nan=False)


def test_holm(script):
    """The worked example of Holm's procedure: 0.01 and 0.005 survive, 0.03 > 0.05 / 2 stops it."""
    assert script.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert script.holm([0.04]) == [True] and script.holm([0.04, 0.06]) == [False, False]


def test_the_page_is_what_is_stored(script):
    """And what is stored is of every rule of the preset: ``measure`` and ``write`` again where this fails."""
    content = json.loads(script.STORE.read_text())
    settings = script.settings_of(('all-rules',), CFG)
    for one in content.values():
        assert [(row['rule'], row['params']) for row in one['rows']] == [
            (own.name, own.rule.params) for own in settings
        ]
    text = script.PAGE.read_text()
    assert script.page(text, content) == text
    assert all(script.kind_of(row) for one in content.values() for row in one['rows'])
    for name in script.NAMED:
        assert f'>{name}<' in script.FIGURE.read_text()
    with pytest.raises(ValueError, match='no markers of the summary'):
        script.page('', content)


def _gain(value, sd=0.001):
    return dict(value=value, low=value - 2 * sd, high=value + 2 * sd, sd=sd)


def test_marks_of_the_summary(script):
    """Bold survives the correction over both detectors, a star only leaves zero out by itself."""
    rows = [
        dict(rule='HardNMS', params=dict(iou_threshold=0.5), gain=_gain(-0.0021)),
        dict(rule='SoftNMS', params=dict(method='gaussian', sigma=0.5), gain=_gain(0, 0)),
        dict(rule='VotedNMS', params=dict(rule=dict(type='HardNMS', iou_threshold=0.5)), gain=_gain(0.01)),
        dict(rule='FastNMS', params={}, gain=_gain(-0.001)),
    ]
    rows = [row | dict(metrics=dict(AP=0.5), ms=1.0) for row in rows]
    about = dict(images=2, objects=3, crowded=1, candidates=9, rows=rows, tuned=[])
    content = dict(a=about | dict(title='A'), b=about | dict(title='B'))
    lines = script.summary(content)
    assert lines[:2] == ['| ΔAP to gaussian 0.5 | A | B |', '| --- | --: | --: |']
    assert lines[2:6] == [
        '| hard 0.5 | −0.21* | −0.21* |',
        '| gaussian 0.5 | AP 50.00 | AP 50.00 |',
        '| voted hard 0.5 | **+1.00** | **+1.00** |',
        '| Fast NMS | −0.10 | −0.10 |',
    ]
    assert lines[-1].startswith('6 differences') and 'here 4 do' in lines[-1] and 'the 2 that survive' in lines[-1]
    assert '| voted hard 0.5 | **50.00** | 1 | +1.00 [+0.80, +1.20] |' in script.details(content)
