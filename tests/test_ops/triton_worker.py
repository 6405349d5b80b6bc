"""The GPU path in a process of its own, under Triton's interpreter or with its compiler.

Triton decides between the two while it is imported, so neither can be had in a process where something else imported it
before. Nothing here but the standard library is imported at the top.
"""

import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def start(interpret: bool, cache: Path) -> ProcessPoolExecutor:
    """One process, which starts with the first request; ``cache``: where Triton may keep compiled kernels."""
    return ProcessPoolExecutor(1, get_context('spawn'), initializer=_become_worker, initargs=(interpret, str(cache)))


def call(worker: ProcessPoolExecutor, module: str, function: str, *args: Any, **kwargs: Any) -> Any:
    """``module.function(*args, **kwargs)`` over there; exceptions come back too. Tensors are copied, not shared."""
    return pickle.loads(worker.submit(_answer, pickle.dumps((module, function, args, kwargs))).result())


def _become_worker(interpret: bool, cache: str) -> None:
    assert 'triton' not in sys.modules
    os.environ['TRITON_INTERPRET'] = '1' if interpret else '0'
    os.environ['TRITON_CACHE_DIR'] = cache
    import torch

    assert 'triton' not in sys.modules
    torch.set_num_threads(1)


def _answer(request: bytes) -> bytes:
    import importlib

    module, function, args, kwargs = pickle.loads(request)
    return pickle.dumps(getattr(importlib.import_module(module), function)(*args, **kwargs))


def count_syncs(*args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The result of ``_triton.run``, and the torch operators it called that must wait for a GPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from mmdet_softnms.ops import _triton

    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            indices = args[1] if name.startswith('index') and len(args) > 1 else ()
            masks = isinstance(indices, (list, tuple)) and any(
                isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices
            )
            if masks or any(part in name for part in WAITING):
                found.append(name)
            return func(*args, **(kwargs or {}))

    waits = kwargs.pop('and_wait', False)
    with Watch():
        result = _triton.run(*args, **kwargs)
        if waits:
            int(result[2].sum())
            result[0][result[0] >= 0]
    return result, found


# Whose results' shapes or values the host needs: .item() and comparisons in Python, boolean masks, unique, copies.
WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'repeat_interleave', 'bincount', '_to_copy')


def compile_for(capability: int, floating: str, method: str, table: int, fusion: bool, strongest: bool = False) -> str:
    """The PTX of the selection kernel; no GPU needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmdet_softnms.ops import _triton, _triton_kernels, weights

    types = dict.fromkeys(('boxes', 'live', 'raw', 'final'), f'*{floating}')
    types |= dict.fromkeys(('order', 'starts', 'segments'), '*i64') | dict.fromkeys(('bad', 'picked'), '*i32')
    types |= dict.fromkeys(('iou_threshold', 'sigma', 'min_score', 'offset'), 'fp64') | {'max_num': 'i32'}
    constants = {**_triton_kernels.rule(weights.get(method)), 'CHUNK': _triton.CHUNK, 'TABLE': table}
    constants['STRONGEST'] = strongest
    kernel = _triton_kernels.select
    signature = {name: types.get(name, 'constexpr') for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {'num_warps': _triton._WARPS, 'enable_fp_fusion': fusion}
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options).asm['ptx']
