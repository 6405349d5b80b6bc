"""YAML is read as data: no objects, no code, no bombs; what is wrong is one line. The same through both its readers."""

import pickle
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_softnms.files import ReevaluationError
from mmdet_softnms.reevaluation.reproduction import load_models
from mmdet_softnms.reevaluation.scoring.settings import sweep_settings
from mmdet_softnms.yaml_file import YamlError, read_yaml

ROOT = Path(__file__).parents[1]
LAUGHS = 'a: &a [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join([f"*{before}"] * 10)}]\n' for before, name in zip('abcdefgh', 'bcdefghi', strict=True)
)
BAD = {
    'object': (b'rules: !!python/object/apply:os.system ["touch RAN"]', 'could not determine a constructor'),
    'name': (b'rules: !!python/name:os.system', 'could not determine a constructor'),
    'module': (b'rules: !!python/module:antigravity', 'could not determine a constructor'),
    'laughs': (LAUGHS.encode(), 'more than 100000 values'),
    'recursive': (b'rules: &a [*a]', 'more than 100000 values'),
    'long': (b'rules: ' + b'x' * (1 << 20), 'longer than 1048576 bytes'),
    'deep': (b'[' * 5000, 'nested too deeply'),
    'binary': (b'rules: \xff\xfe\xfa', "can't decode"),
    'zero': (b'rules: \x00', 'special characters are not allowed'),
    'date': (b'rules: 2020-99-99', 'month must be in'),
    'unhashable': (b'? {a: 1}\n: 1', 'unhashable'),
    'broken': (b'a: [', 'line 1'),
}


@pytest.mark.parametrize('kind', BAD)
def test_what_is_no_plain_data(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, words = BAD[kind]
    path = tmp_path / 'bad.yml'
    path.write_bytes(content)
    (tmp_path / 'index.yml').write_text('Import: [bad.yml]')
    for read in (
        lambda: sweep_settings([str(path)], Config(), 1e-3, 100, 1e-3),
        lambda: load_models(path, ROOT),
        lambda: load_models(tmp_path / 'index.yml', ROOT),
    ):
        with pytest.raises(ReevaluationError, match=words) as raised:
            read()
        assert '\n' not in str(raised.value) and len(str(raised.value)) < 400
    assert not (tmp_path / 'RAN').exists()


@pytest.mark.parametrize('name', ['a.pkl', 'a.json', 'a.py', 'a.pickle', 'a', 'a.yml.pkl'])
def test_other_files_are_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({'Models': []}))
    (tmp_path / 'index.yml').write_text(f'Import: [{name}]')
    for path in (tmp_path / name, tmp_path / 'index.yml'):
        with pytest.raises(ReevaluationError, match='only .yml and .yaml files are read'):
            load_models(path, ROOT)
    with pytest.raises(ReevaluationError, match='is not a sweep'):
        sweep_settings([str(tmp_path / name)], Config(), 1e-3, 100, 1e-3)


def test_what_is_data(tmp_path):
    path = tmp_path / 'a.yaml'
    path.write_bytes(b'\xef\xbb\xbfa: &x [1, 2.5, {b: null}]\nc: *x\n')
    assert read_yaml(path) == dict(a=[1, 2.5, dict(b=None)], c=[1, 2.5, dict(b=None)])
    for missing in (tmp_path / 'b.yml', tmp_path):
        with pytest.raises(YamlError):
            read_yaml(missing)


MODEL = """
Datasets: {d: {Fetch: f, Images: 1}}
Models:
  - Name: n
    Config: c.py
    Weights: w.pth
    Reproduction: {Data: d, Published: [{Metric: AP, Value: 1.5, Tolerance: 1, Because: b, Source: s, Row: config}]}
"""


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('Datasets: {d: {Fetch: f, Images: 1}}', 'Datasets: 5'),
        ('{Fetch: f, Images: 1}', '[1]'),
        ('Images: 1', 'Images: [1]'),
        ('Fetch: f', 'Fetch: 2020-01-01'),
        ('Name: n', 'Name: {a: 1}'),
        ('Name: n', 'Other: n'),
        ('Config: c.py', 'Config: 1'),
        ('Weights: w.pth', 'Weights: [w.pth]'),
        ('Data: d', 'Data: [d]'),
        ('Data: d', 'Data: e'),
        ('Metric: AP', 'Metric: [AP]'),
        ('Value: 1.5', 'Value: much'),
        ('Value: 1.5', 'Value: .nan'),
        ('Value: 1.5', 'Value: true'),
        ('Tolerance: 1', 'Tolerance: .inf'),
        ('Tolerance: 1', 'Tolerance: "1"'),
        ('Because: b', 'Because: 1'),
        ('Row: config', 'Row: 5'),
        ('Row: config', 'Row: {rule: 5}'),
        ('Row: config', 'Row: {sigma: x}'),
        ('[{Metric', '[5, {Metric'),
        ('Published: [', 'Options: 5, Published: ['),
        ('Published: [', 'Weights: 5, Published: ['),
        ('  - Name: n', '  - 5\n  - Name: n'),
        ('Models:\n  - Name: n\n    ', 'Models:\n    '),
    ],
)
def test_metafiles_are_checked_at_every_level(tmp_path, old, new):
    path = tmp_path / 'metafile.yml'
    path.write_text(MODEL)
    assert load_models(path, ROOT)['n'].published[0].value == 1.5
    assert old in MODEL
    path.write_text(MODEL.replace(old, new))
    with pytest.raises(ReevaluationError, match='metafile.yml cannot be') as raised:
        load_models(path, ROOT)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('content', ['', '5', '[]', 'Import: 5', 'Import: [5]', 'Import: {a: b}', 'Import: [a.yml]'])
def test_an_index_of_another_form(tmp_path, content):
    (tmp_path / 'index.yml').write_text(content)
    with pytest.raises(ReevaluationError, match=r'\.yml cannot be'):
        load_models(tmp_path / 'index.yml', ROOT)
