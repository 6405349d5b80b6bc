"""Reading checkpoints without unpickling anything a model zoo's files do not really hold.

mmengine writes its message hub and the data set's metainfo into every checkpoint, so a file holds ``HistoryBuffer`` and
``ConfigDict`` objects and numpy scalars and arrays beside the tensors. torch >= 2.6 refuses those by default; the
maintained mmengine fork then falls back to unpickling everything, which runs whatever code the file brings. Here
exactly those types are allowed, and nothing else.

Three things can be wrong with a file, and each has a remedy of its own: it is *damaged* (fetch it again), it is of
another *format* (convert it), or it holds types that are *not allowed* (trust it, or do not).
"""

import datetime
import importlib.util
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn

from mmdet_softnms.files import CheckpointError
from mmdet_softnms.locate import forget_fetched, local_checkpoint

__all__ = [
    'CheckpointError',
    'LoadedWeights',
    'allow_unsafe_loading',
    'allow_zoo_types',
    'check_weights',
    'forbid_unsafe_loading',
    'load_checkpoint',
    'local_checkpoint',
    'verify_loaded',
]


def forbid_unsafe_loading() -> None:
    """For scripts: every ``torch.load`` of this process is from now on safe or an error, on either mmengine.

    What mmengine's Runner loads by itself (``load_from``, ``resume``, ``init_cfg=dict(type='Pretrained')``) is read by
    :func:`read`, with its messages.
    """
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    allow_zoo_types()
    CheckpointLoader.register_scheme(['', 'http://', 'https://', 'file://'], load_from_safely, force=True)


def load_from_safely(filename: str, map_location: Any = None, **_: Any) -> Any:
    """A loader for mmengine's ``CheckpointLoader``."""
    return read(filename, map_location=map_location)


def allow_unsafe_loading() -> None:
    """For scripts, on the user's explicit word: ``torch.load`` of this process unpickles whatever a file holds."""
    os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'


class _OneCycle:
    """Stands for the class ``OneCycleParamScheduler`` in a file, which names it as the owner of a function only."""


#: The functions that mmengine pickles, which it does as ``getattr(class, name)``.
_FUNCTIONS = {
    HistoryBuffer: (HistoryBuffer, ('min', 'max', 'mean', 'current', 'statistics')),
    _OneCycle: (OneCycleParamScheduler, ('_annealing_cos', '_annealing_linear')),
}


def _function(owner: type, name: str) -> Any:
    """Stands in for ``getattr``: a few functions by name, and no other attribute of anything."""
    real, names = _FUNCTIONS.get(owner, (None, ()))
    if real is None or name not in names:
        raise pickle.UnpicklingError(f'Unsupported: getattr({owner!r}, {name!r})')
    return getattr(real, name)


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, which a file names for those of length 0 (an empty array's) only."""
    return b''


def allow_zoo_types() -> None:
    """Let ``torch.load(weights_only=True)`` of this process read the types that mmengine's checkpoints hold."""
    if not hasattr(torch.serialization, 'add_safe_globals'):  # torch < 2.4 knows no allow-list: tensors only
        return
    # The fork allows these for each load of its own, the real getattr among them, and disallows them afterwards.
    mmengine.runner.checkpoint.get_torch_safe_globals = list
    multiarray: Any = (np._core if hasattr(np, '_core') else np.core).multiarray  # type: ignore[attr-defined]
    # Constructors that only take values: of containers, of dates, of arrays, of dtypes without Python objects.
    allowed: list[Any] = [HistoryBuffer, Config, ConfigDict, np.ndarray, np.dtype]
    allowed += [set, frozenset, slice, range]
    allowed += [datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone]
    allowed += sorted({type(np.dtype(code)) for code in '?bhilqBHILQefdgFDGSUMm'}, key=lambda kind: kind.__name__)
    for name in ('scalar', '_reconstruct'):
        function = getattr(multiarray, name)
        # Files written under numpy 1 and numpy 2 name the same function by different modules.
        allowed += [(function, f'numpy.{core}.multiarray.{name}') for core in ('core', '_core')]
    # ``builtins`` is ``__builtin__`` in a file of pickle protocol 2, which torch translates.
    allowed += [(_function, 'builtins.getattr'), (_no_bytes, 'builtins.bytes')]
    allowed.append((_OneCycle, f'{OneCycleParamScheduler.__module__}.{OneCycleParamScheduler.__qualname__}'))
    try:
        torch.serialization.add_safe_globals(allowed)
    except AttributeError:  # torch 2.4 and 2.5 take no (object, name) pairs: only this numpy's own names
        torch.serialization.add_safe_globals([one[0] if isinstance(one, tuple) else one for one in allowed])


def read(name: str | Path, *, map_location: Any = 'cpu', trust: bool = False) -> Any:
    """The content of a file that ``torch.save`` wrote.

    Args:
        name: see :func:`mmdet_softnms.locate.local_checkpoint`.
        map_location: see ``torch.load``.
        trust: unpickle whatever the file holds; this can run any code the file brings.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or holds a type that is not allowed; the
            message names the file, the reason and the remedy.
    """
    allow_zoo_types()
    path = local_checkpoint(name, trust=trust)
    try:
        try:
            _check_format(path)
        except OSError as error:
            raise CheckpointError(f'checkpoint {path} cannot be read: {error.strerror or error}') from error
        try:
            return torch.load(path, map_location=map_location, weights_only=not trust)
        except Exception as error:  # a damaged pickle may raise anything
            raise _explained(path, error, trust) from error
    except CheckpointError as error:
        if 'fetch it again' in str(error) and forget_fetched(path):
            raise CheckpointError(f'{name} gave no checkpoint: {error} (run again to do so)') from error
        raise


def _check_format(path: Path) -> None:
    """Whether a file is whole, as far as can be seen without reading tensors, and of a format that torch reads.

    Raises:
        CheckpointError: it is not.
    """
    if path.is_dir():
        raise CheckpointError(f'checkpoint {path} is a folder; name a file in it')
    with open(path, 'rb') as file:
        head = file.read(512)
    if not head:
        raise _damaged(path, 'it is empty')
    if head.startswith(b'version https://git-lfs'):
        raise CheckpointError(f'checkpoint {path} is a Git LFS pointer, not the file: fetch it by "git lfs pull"')
    if head.lstrip().startswith(b'<'):
        raise _damaged(path, 'it is a web page')
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size:
        raise _other_format(path, 'a safetensors file')
    if head.startswith(b'PK'):
        _check_archive(path)
    elif not head.startswith(b'\x80'):
        raise _damaged(path, 'it is not a file that torch wrote')
    elif _LEGACY_MAGIC not in head[:64]:
        raise _other_format(path, 'a bare pickle')


#: What torch < 1.6 wrote first: a pickled number.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:-1]


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.compress_size for member in members) > path.stat().st_size or any(
                member.file_size > 1024 * member.compress_size + 1024 for member in members
            ):
                raise _damaged(path, 'it claims to hold more than it can')
            for member in members:
                if member.CRC:  # torch.serialization.set_crc32_options(False) leaves it out
                    with archive.open(member) as file:
                        while file.read(1 << 22):
                            pass
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises half a dozen types
        raise _damaged(path, str(error) or type(error).__name__) from error
    names = [name.rpartition('/')[2] for name in (member.filename for member in members)]
    if 'constants.pkl' in names:
        raise _other_format(path, 'a TorchScript archive')
    if 'data.pkl' not in names:
        raise _other_format(path, 'a ZIP archive')


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f'checkpoint {path} is damaged ({reason}): fetch it again')


def _other_format(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f'checkpoint {path} is {what}; load it with what wrote it, and write torch.save(dict(state_dict=...), FILE)'
    )


def _explained(path: Path, error: Exception, trust: bool) -> CheckpointError:
    """What an error of ``torch.load`` means for its user."""
    reason = next(iter(str(error).splitlines()), '') or type(error).__name__
    if not isinstance(error, pickle.UnpicklingError) or trust:
        if isinstance(error, (ImportError, AttributeError)) and trust:
            return CheckpointError(f'checkpoint {path} needs code that is not installed here ({reason})')
        return _damaged(path, reason)
    forbidden = re.search(r'(?:GLOBAL|Unsupported class) ([\w.]+)|unrecognized function|Unsupported: (getattr\(.*\))|'
                          r'Can only (?:create new object|build)', str(error))  # fmt: skip
    if forbidden is None:
        details = re.search(r'WeightsUnpickler error: (.*)', str(error))
        return _damaged(path, details[1].strip() if details else reason)
    what = forbidden[1] or forbidden[2] or forbidden[0]
    package = (forbidden[1] or 'builtins').partition('.')[0]
    if forbidden[1] and '.' in forbidden[1] and importlib.util.find_spec(package) is None:
        return CheckpointError(
            f'checkpoint {path} holds {what}, and no package {package} is installed here: the file is damaged (fetch '
            'it again), or to be read where it was written'
        )
    return CheckpointError(
        f'checkpoint {path} holds more than weights and training statistics, and reading it would run code from '
        f'the file ({what}); if you trust its source, pass --trust-checkpoint'
    )


def load_checkpoint(name: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        name, trust: see :func:`read`.

    Returns:
        The checkpoint, with at least ``'state_dict'`` (``module.`` prefixes removed).

    Raises:
        CheckpointError: see :func:`read`; or it is no checkpoint of a model.
    """
    checkpoint = read(name, trust=trust)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'checkpoint {name} holds a {type(checkpoint).__name__}, not a dict with a state_dict')
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f'checkpoint {name} holds a {type(state_dict).__name__} as its state_dict, not a dict of tensors'
        )
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(f'checkpoint {name} holds no state_dict of tensors; is it a detector checkpoint?')
    if odd := [key for key in state_dict if not isinstance(key, str)]:
        raise CheckpointError(f'checkpoint {name} has {odd[0]!r:.80} in its state_dict, which is no name of a weight')
    checkpoint = checkpoint if 'state_dict' in checkpoint else {}
    checkpoint['state_dict'] = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if len(checkpoint['state_dict']) != len(state_dict):
        raise CheckpointError(f'checkpoint {name} holds weights twice, with and without the prefix "module."')
    return checkpoint


def check_weights(model: nn.Module, name: str | Path, *, trust: bool = False, ignore: tuple[str, ...] = ()) -> None:
    """Check that a checkpoint's weights fit a model entirely.

    mmengine's own loader only logs a mismatch, and then evaluates the half-loaded model.

    Args:
        model: the detector.
        name, trust: see :func:`load_checkpoint`.
        ignore: prefixes of checkpoint entries the model may lack (a mask head that is left out).

    Raises:
        CheckpointError: see :func:`load_checkpoint`; or shapes or kinds of number differ, entries are missing or left
            over.
    """
    state_dict = load_checkpoint(name, trust=trust)['state_dict']
    expected = model.state_dict()
    for key, value in expected.items():
        if key not in state_dict:
            continue
        found = state_dict[key]
        if (have := _kind(found)) != (want := _kind(value)):
            raise CheckpointError(
                f'checkpoint {name} does not fit the config: {key} holds {have} there but {want} in the model; save '
                'the weights as plain tensors of the types they were trained in'
            )
        if found.shape != value.shape:
            raise CheckpointError(
                f'checkpoint {name} does not fit the config: {key} is {tuple(found.shape)} there but '
                f'{tuple(value.shape)} in the model; if this is the classifier, num_classes of the config and of the '
                'checkpoint differ'
            )
    # Files from before torch 0.4.1 lack the counter, which inference does not use.
    missing = [key for key in expected if key not in state_dict and not key.endswith('num_batches_tracked')]
    left_over = [key for key in state_dict if key not in expected and not key.startswith(ignore)]
    for what, names in (('lacks', missing), ('also holds', left_over)):
        if names:
            raise CheckpointError(
                f'checkpoint {name} is not of the model in the config: it {what} {len(names)} entries, first {names[0]}'
            )


def _kind(value: Tensor) -> str:
    """What sort of numbers a tensor holds, in words; sorts are converted into each other with a loss, or not at all."""
    if value.is_quantized:
        return 'quantized numbers'
    if value.is_nested or value.layout != torch.strided:
        return 'a nested tensor' if value.is_nested else f'a {str(value.layout).removeprefix("torch.")} tensor'
    if value.is_meta:
        return 'no numbers (device meta)'
    if value.dtype == torch.bool:
        return 'truth values'
    if value.is_complex():
        return 'complex numbers'
    return 'floating-point numbers' if value.is_floating_point() else 'integers'


def verify_loaded(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Check that a model holds the values of a state dict after it was loaded.

    Raises:
        CheckpointError: a weight differs, named.
    """
    state_dict = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    # A wrapper (DistributedDataParallel, a test-time augmentation) has the prefix on its side.
    for key, value in ((key.removeprefix('module.'), value) for key, value in model.state_dict().items()):
        if key not in state_dict:
            continue
        expected = state_dict[key]
        if _kind(expected) == _kind(value) and expected.shape == value.shape:
            expected = expected.to(value)
            if ((value == expected) | (value != value) & (expected != expected)).all():  # NaN is what was there
                continue
        raise CheckpointError(f'{key} of the checkpoint was not copied into the model, which differs from it')


class LoadedWeights(Hook):
    """Applies :func:`verify_loaded` to what a Runner loads, before its test loop begins.

    The checkpoint is looked at as the Runner's hooks leave it (one may put an average of weights in its place), and the
    model before any of them exchanges weights for the test, which mmengine's ``EMAHook`` does later.
    """

    priority = 'HIGHEST'

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Called by the Runner before it copies the weights."""
        self._checkpoint = checkpoint

    def before_test(self, runner: Runner) -> None:
        """Called by the Runner when they are copied."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        verify_loaded(model, self._checkpoint.get('state_dict', self._checkpoint))
        self._checkpoint = {}
