"""Reading checkpoints without unpickling anything a model zoo's files do not really hold.

mmengine writes its message hub into every checkpoint, so a zoo file holds ``HistoryBuffer`` objects and numpy scalars
and arrays beside the tensors. torch >= 2.6 refuses those by default; the maintained mmengine fork then falls back to
unpickling everything, which runs whatever code the file brings. Here exactly those types are allowed, and nothing else.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, not allowed, or not of the model it is loaded into."""


def forbid_unsafe_loading() -> None:
    """For scripts: every ``torch.load`` of this process is from now on safe or an error, on either mmengine.

    That covers what mmengine's Runner loads by itself: ``load_from``, ``resume``, ``init_cfg=dict(type='Pretrained')``.
    """
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    allow_zoo_types()


def allow_unsafe_loading() -> None:
    """For scripts, on the user's explicit word: ``torch.load`` of this process unpickles whatever a file holds."""
    os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'


def allow_zoo_types() -> None:
    """Let ``torch.load(weights_only=True)`` of this process read the types that zoo checkpoints hold."""
    if not hasattr(torch.serialization, 'add_safe_globals'):  # torch < 2.4 knows no allow-list: tensors only
        return
    multiarray: Any = (np._core if hasattr(np, '_core') else np.core).multiarray  # type: ignore[attr-defined]
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype]
    allowed += sorted({type(np.dtype(code)) for code in '?bhilqBHILQefd'}, key=lambda kind: kind.__name__)
    for name in ('scalar', '_reconstruct'):
        function = getattr(multiarray, name)
        # Files written under numpy 1 and numpy 2 name the same function by different modules.
        allowed += [(function, f'numpy.{core}.multiarray.{name}') for core in ('core', '_core')]
    allowed.append((_statistic, 'builtins.getattr'))
    try:
        torch.serialization.add_safe_globals(allowed)
    except AttributeError:  # torch 2.4 and 2.5 take no (object, name) pairs: only this numpy's own names
        torch.serialization.add_safe_globals([one[0] if isinstance(one, tuple) else one for one in allowed])


def _statistic(owner: type, name: str) -> Any:
    """Stands in for the ``getattr`` of a pickled HistoryBuffer, which only ever means one of its own statistics."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current', 'statistics'):
        raise pickle.UnpicklingError(f'Unsupported: getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def load_checkpoint(path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a ``.pth`` file as mmengine writes it.
        trust: unpickle whatever the file holds; this can run any code the file brings.

    Returns:
        The checkpoint, with at least ``'state_dict'`` (``module.`` prefixes removed).

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or holds a type that is not allowed; the
            message names the file, the reason and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'checkpoint {path} does not exist; download it or correct the path')
    allow_zoo_types()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=not trust)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if 'GLOBAL' in line or 'Unsupported' in line), str(error)
        )
        raise CheckpointError(
            f'checkpoint {path} holds more than weights and training statistics, and reading it would run code from '
            f'the file ({reason.split(" was not")[0].strip()}); if you trust its source, pass --trust-checkpoint'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f'checkpoint {path} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); '
            'it may be truncated or not a torch file: download it again'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__}, not a dict with a state_dict')
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise CheckpointError(f'checkpoint {path} holds no state_dict of tensors; is it a detector checkpoint?')
    checkpoint = checkpoint if 'state_dict' in checkpoint else {}
    checkpoint['state_dict'] = {name.removeprefix('module.'): value for name, value in state_dict.items()}
    return checkpoint


def check_weights(
    model: torch.nn.Module, path: str | Path, *, trust: bool = False, ignore: tuple[str, ...] = ()
) -> None:
    """Check that a checkpoint's weights fit a model entirely.

    mmengine's own loader only logs a mismatch, and then evaluates the half-loaded model.

    Args:
        model: the detector.
        path, trust: see :func:`load_checkpoint`.
        ignore: prefixes of checkpoint entries the model may lack (a mask head that is left out).

    Raises:
        CheckpointError: see :func:`load_checkpoint`; or shapes differ, entries are missing or left over.
    """
    state_dict = load_checkpoint(path, trust=trust)['state_dict']
    expected = model.state_dict()
    for name, value in expected.items():
        if name in state_dict and state_dict[name].shape != value.shape:
            raise CheckpointError(
                f'checkpoint {path} does not fit the config: {name} is {tuple(state_dict[name].shape)} there but '
                f'{tuple(value.shape)} in the model; if this is the classifier, num_classes of the config and of the '
                'checkpoint differ'
            )
    # Files from before torch 0.4.1 lack the counter, which inference does not use.
    missing = [name for name in expected if name not in state_dict and not name.endswith('num_batches_tracked')]
    left_over = [name for name in state_dict if name not in expected and not name.startswith(ignore)]
    for what, names in (('lacks', missing), ('also holds', left_over)):
        if names:
            raise CheckpointError(
                f'checkpoint {path} is not of the model in the config: it {what} {len(names)} entries, first {names[0]}'
            )
