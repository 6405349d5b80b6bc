"""Reading Detectron2's files: a model zoo's ``.pkl`` and a ``.pth`` of its trainer, without running code from them.

A zoo file is a pickle of ``{'model': {name: NumPy array}, '__author__': ...}``. A pickle can call anything it names;
here it can name NumPy's arrays, types and scalars and an ordered dict, and nothing else.
"""

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone without installing
from mmdet_softnms.checkpoint import read
from mmdet_softnms.files import CheckpointError, first_line

#: Buffers that older files hold. Detectron2 itself takes them from the config.
_FROM_CONFIG = ('pixel_mean', 'pixel_std')
_ANCHORS = 'anchor_generator.cell_anchors'


class _Array:
    """Stands for ``numpy.ndarray``, which a file names and does not call."""


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """Stands in for ``numpy.core.multiarray._reconstruct``: the array that the pickle fills afterwards."""
    if kind is not _Array or shape != (0,):
        raise pickle.UnpicklingError(f'an array of {kind!r:.60} and shape {shape!r:.60}')
    return np.ndarray((0,), 'b')


def _dtype(name: Any, *flags: Any) -> np.dtype:
    """Stands in for ``numpy.dtype``: types of numbers only."""
    made = np.dtype(name) if isinstance(name, str) else np.dtype(object)
    if made.kind not in 'biuf':
        raise pickle.UnpicklingError(f'an array of type {name!r:.60}')
    return made


def _scalar(kind: Any, value: Any = b'') -> Any:
    """Stands in for ``numpy.core.multiarray.scalar``."""
    if not isinstance(kind, np.dtype) or not isinstance(value, (bytes, str)):
        raise pickle.UnpicklingError(f'a number of type {kind!r:.60}')
    content = value.encode('latin1') if isinstance(value, str) else value
    return np.frombuffer(content, kind, 1)[0]


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any, *more: Any) -> np.ndarray:
    """Stands in for ``numpy.core.numeric._frombuffer``, by which pickles of protocol 5 write arrays."""
    fits = isinstance(content, (bytes, bytearray)) and isinstance(kind, np.dtype) and order in ('C', 'F')
    if not fits or not isinstance(shape, tuple):
        raise pickle.UnpicklingError(f'an array of type {kind!r:.60} and shape {shape!r:.60}')
    return np.frombuffer(content, kind).reshape(shape, order=order)


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands in for ``_codecs.encode``, by which pickles of protocol 2 write bytes."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise pickle.UnpicklingError(f'a text in {encoding!r:.60}')
    return text.encode('latin1')


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ('numpy', 'ndarray'): _Array,
    ('numpy', 'dtype'): _dtype,
    ('_codecs', 'encode'): _encode,
    ('collections', 'OrderedDict'): OrderedDict,
}
for _core in ('numpy.core', 'numpy._core'):  # of NumPy 1 and 2
    _ALLOWED |= {
        (f'{_core}.multiarray', '_reconstruct'): _empty_array,
        (f'{_core}.multiarray', 'scalar'): _scalar,
        (f'{_core}.numeric', '_frombuffer'): _from_buffer,
    }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise CheckpointError(f'holds {module}.{name}, and reading that could run code from the file')
        return found


def read_detectron2(path: Path) -> dict[str, Tensor]:
    """The weights of a file of Detectron2's, by its names; without the buffers that it takes from the config.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or holds more than arrays; or it is one whose
            names Detectron2 itself has to guess. One line, with the file.
    """
    try:
        with open(path, 'rb') as file:
            head = file.read(4)
        is_archive = head.startswith(b'PK')
        content = read(path) if is_archive else _unpickle(path)
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
    model = content.get('model') if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not model:
        raise CheckpointError(f"{path} holds no 'model': it is no detector of Detectron2's zoo or trainer")
    if content.get('matching_heuristics'):
        raise CheckpointError(
            f'{path} is of another code base, and Detectron2 guesses its names (matching_heuristics): load it there, '
            'and convert what DetectionCheckpointer(model).save writes'
        )
    weights: dict[str, Tensor] = {}
    for name, value in model.items():
        if not isinstance(name, str):
            raise CheckpointError(f'{path} has {name!r:.60} for the name of a weight')
        name = name.removeprefix('module.')
        if name in _FROM_CONFIG or _ANCHORS in name:
            continue
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in 'fiu':
                raise CheckpointError(f'{path} holds {value.dtype} in {name!r:.60} instead of numbers')
            value = torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder('='))))
        if not isinstance(value, Tensor):
            raise CheckpointError(f'{path} holds a {type(value).__name__} in {name!r:.60} instead of an array')
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f'{path} has numbers that are not finite in {name!r:.60}')
        weights[name] = value
    return weights


def _unpickle(path: Path) -> Any:
    content = path.read_bytes()
    try:
        return _Unpickler(io.BytesIO(content), encoding='latin1').load()
    except CheckpointError as error:
        raise CheckpointError(f'{path} {error}') from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f'{path} is no pickle of arrays, or damaged: {first_line(error)}') from error
