"""How a sweep is written on a command line."""

from pathlib import Path

import pytest

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.scoring.grid import read_spec, read_values


@pytest.mark.parametrize(
    ('text', 'values'),
    [
        (
            '0.1:1.0:0.1',
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        ),  # no 0.30000000000000004
        ('0.3:0.75:0.2', [0.3, 0.5, 0.7]),
        ('50:150:50', [50, 100, 150]),
        ('0.5:0.5:0.1', [0.5]),
        ('0.4,0.6', [0.4, 0.6]),
        ('100', [100]),
        ('true,False', [True, False]),
        ('linear,gaussian', ['linear', 'gaussian']),
    ],
)
def test_values(text, values):
    found = read_values(text, f'SoftNMS.x={text}')
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


@pytest.mark.parametrize('text', ['0.1:1.0', '1:0:0.1', '0:1:0', '0:1:-1', '0:1:1e-9', 'a:b:c', 'nan:1:1', '0:inf:1'])
def test_what_is_no_range(text):
    with pytest.raises(ReevaluationError, match='SoftNMS.x=.*a range is first:last:step'):
        read_values(text, f'SoftNMS.x={text}')


def test_specs():
    assert read_spec('SoftNMS.sigma=0.5') == ('SoftNMS', 'sigma', [0.5])
    assert read_spec('package.Rule.sigma=0.5') == ('package.Rule', 'sigma', [0.5])
    assert read_spec('score_thr=0.01,0.05') == ('', 'score_thr', [0.01, 0.05])
    assert read_spec('some/sweep.yaml') == Path('some/sweep.yaml')


@pytest.mark.parametrize('spec', ['SoftNMS.sigma', 'sigma=0.5', 'sweep.json', '', '=', '.=1'])
def test_what_is_no_sweep(spec):
    with pytest.raises(ReevaluationError, match='is not a sweep; write RULE.PARAMETER=VALUES'):
        read_spec(spec)
