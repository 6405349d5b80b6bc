"""Reading Detectron2's files: whatever else a file holds is one line, and no code of it runs.

``detectron2_converter_cases.py`` converts Detectron2's own models, in the process of ``test_detectron2.py``.
"""

import importlib.util
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / 'tools/model_converters/detectron2_to_mmdet.py'


@pytest.fixture(scope='module')
def converter():
    spec = importlib.util.spec_from_file_location('detectron2_to_mmdet', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WEIGHTS = {'backbone.stem.conv1.weight': np.arange(6, dtype=np.float32).reshape(2, 3), 'head.bias': np.float64([1, 2])}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_a_pickle_of_arrays_is_read(converter, protocol, tmp_path):
    old = {'pixel_mean': np.zeros(3), 'proposal_generator.anchor_generator.cell_anchors.0': np.zeros((3, 4))}
    model = OrderedDict(WEIGHTS | old | {'bn.num_batches_tracked': np.int64([3])})
    content = dict(model=model, __author__='Detectron2 Model Zoo', step=np.float32(3))
    (tmp_path / 'model.pkl').write_bytes(pickle.dumps(content, protocol))
    converter.main([str(tmp_path / 'model.pkl'), str(tmp_path / 'wrapper.pth'), '--wrapper'])
    state = torch.load(tmp_path / 'wrapper.pth')['state_dict']
    assert set(state) == {f'd2_model.{name}' for name in (*WEIGHTS, 'bn.num_batches_tracked')}
    for name, value in WEIGHTS.items():
        assert torch.equal(state[f'd2_model.{name}'], torch.from_numpy(value))


def test_a_file_of_the_trainer_is_read(converter, tmp_path):
    model = {f'module.{name}': torch.from_numpy(value) for name, value in WEIGHTS.items()}
    torch.save(dict(model=model, optimizer=dict(state={}), iteration=7), tmp_path / 'model_final.pth')
    converter.main([str(tmp_path / 'model_final.pth'), str(tmp_path / 'wrapper.pth'), '--wrapper'])
    assert set(torch.load(tmp_path / 'wrapper.pth')['state_dict']) == {f'd2_model.{name}' for name in WEIGHTS}


class Runs:
    """What a hostile file does: its pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ZOO = dict(model=WEIGHTS, __author__='Detectron2 Model Zoo')
GOOD = pickle.dumps(ZOO)
BAD = {
    'runs a command': (lambda: pickle.dumps(dict(ZOO, more=Runs(os.mkdir, 'hostile'))), 'posix.mkdir, and reading'),
    'looks up attributes': (lambda: pickle.dumps(dict(ZOO, more=Runs(getattr, 'a', 'upper'))), 'builtins.getattr'),
    'holds objects': (lambda: pickle.dumps(dict(model=dict(a=np.array([None])))), 'an array of type'),
    'allocates': (lambda: pickle.dumps(dict(ZOO, more=Runs(np.ndarray, (1 << 50,)))), 'damaged'),
    'truncated': (lambda: GOOD[:-60], 'no pickle of arrays, or damaged'),
    'empty': (lambda: b'', 'no pickle of arrays, or damaged'),
    'a text': (lambda: b'<html>Not found</html>', 'no pickle of arrays, or damaged'),
    'of Caffe2': (lambda: pickle.dumps(dict(blobs=WEIGHTS, cfg='...')), "holds no 'model'"),
    'of another code base': (lambda: pickle.dumps(dict(ZOO, matching_heuristics=True)), 'Detectron2 guesses its names'),
    'a list': (lambda: pickle.dumps(dict(model=dict(a=[1.0]))), "a list in 'a' instead of an array"),
    'not finite': (lambda: pickle.dumps(dict(model=dict(a=np.float32([1, np.nan])))), "not finite in 'a'"),
    'of nameless weights': (lambda: pickle.dumps(dict(model={3: np.float32([1])})), '3 for the name of a weight'),
    'no network': (lambda: GOOD, 'res4 has 0 blocks instead of 6'),
}


@pytest.mark.parametrize('what', BAD)
def test_any_other_file_is_one_line(converter, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = BAD[what]
    Path('model.pkl').write_bytes(content())
    with pytest.raises(SystemExit) as caught:
        converter.main(['model.pkl', 'out.pth'])
    message = str(caught.value)
    assert message.startswith('error: model.pkl') and words in message and '\n' not in message
    assert not Path('out.pth').exists() and not Path('hostile').exists()


def test_a_file_that_is_not_there_is_one_line(converter, tmp_path):
    for path in (tmp_path / 'none.pkl', tmp_path):
        with pytest.raises(SystemExit, match=r'error: \S+ cannot be read: '):
            converter.main([str(path), str(tmp_path / 'out.pth')])
