"""Hashes of values and of code: what differs has another, what cannot be compared never the same."""

import functools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmdet_softnms.ops import weights
from mmdet_softnms.reevaluation.candidates import identity
from mmdet_softnms.reevaluation.candidates.identity import code_of, digest, model_state
from mmdet_softnms.rules import SoftNMS


@dataclass
class Point:
    x: float
    y: float = 0.0


class Opaque:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        raise TypeError('cannot be pickled')


VALUES = [
    0, 1, 1.0, True, None, '', '1', b'1', [], {}, [1], [[1]], [1, 2], [2, 1], {'a': 1}, {'a': 2}, {'b': 1}, {1},
    torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(0),
    np.zeros(2), np.zeros(2, np.float32), np.float32(1), Point(1.0), Point(2.0), Point, int,
    InstanceData(labels=torch.zeros(2)), InstanceData(labels=torch.zeros(2), metainfo=dict(scale=1)),
    lambda: 0, lambda: 1, lambda x=1: x, lambda x=2: x, functools.partial(max, 1), functools.partial(max, 2), Path('a'),
]  # fmt: skip


def test_different_values_have_different_hashes():
    hashes = [digest(value) for value in VALUES]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [digest(value) for value in VALUES]
    assert digest('ab', 'c') != digest('a', 'bc') and digest() != digest(None)


def test_equal_values_have_the_same_hash():
    assert digest({'a': 1, 'b': 2}) == digest({'b': 2, 'a': 1}) == digest(OrderedDict(b=2, a=1))
    assert digest(torch.arange(6).view(2, 3).T) == digest(torch.arange(6).view(2, 3).T.contiguous())
    assert digest(torch.ones(2, requires_grad=True)) == digest(torch.ones(2))
    assert digest(SimpleNamespace(tensor=torch.ones(2))) == digest(torch.ones(2))  # mmdet's boxes


def test_what_cannot_be_compared_never_has_the_same_hash():
    value = Opaque(1)
    assert digest(value) != digest(value)


SOURCE = 'import {helper}\n\ndef rule():\n    return {value}\n\nclass Rule:\n    limit = 1\n'


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of a user, which imports another of theirs; the installed libraries are not hashed, for time."""
    monkeypatch.setattr(identity, '_tree', lambda package: '')
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'identity_helper.py').write_text('')
    (tmp_path / 'identity_module.py').write_text(SOURCE.format(helper='identity_helper', value=1))
    import identity_module

    return identity_module


def test_code_is_the_file_what_it_imports_and_what_is_in_memory(module, tmp_path):
    before = code_of(module.Rule())
    assert {'identity_module', 'identity_helper'} <= set(before.files) and before.unknown == [] and before.foreign
    assert code_of(module.Rule()) == before
    module.Rule.limit = 2
    assert code_of(module.Rule()).live != before.live and code_of(module.Rule()).files == before.files
    module.Rule.limit = 1
    (tmp_path / 'identity_helper.py').write_text('EDITED = 1\n')
    after = code_of(module.Rule())
    assert {name for name in after.files if after.files[name] != before.files.get(name)} == {'identity_helper'}


def test_code_of_this_package_and_code_without_a_file(module):
    code = code_of(SoftNMS('gaussian'), weights.linear)
    assert not code.foreign and code.unknown == []
    scope = {'__name__': 'a_notebook'}
    exec('class Rule:\n    pass\n', scope)
    assert code_of(scope['Rule']()).unknown == ['a_notebook.Rule']
    assert code_of(scope['Rule']()).foreign


def test_the_plain_values_of_modules_are_their_state():
    model = torch.nn.Sequential(torch.nn.Dropout(0.1))
    before = model_state(model)
    assert before == model_state(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    model[0].p = 0.2
    assert model_state(model) != before
