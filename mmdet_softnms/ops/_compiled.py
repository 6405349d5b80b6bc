"""Kernels compiled by numba: from its disk cache where that works, and without it otherwise."""

import functools
import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache

_OPTIONS = dict(nogil=True, error_model='numpy')
_cache_works = True


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's disk cache, which looks at the file of the compiled function alone, with further files in the key."""

    def __init__(self, function: Callable[..., Any], sources: Sequence[str]) -> None:
        super().__init__(function)
        self._sources = sources

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        contents = (Path(sys.modules[name].__file__).read_bytes() for name in self._sources)  # type: ignore[arg-type]
        return sig, codegen.magic_tuple(), hashlib.sha256(b''.join(contents)).hexdigest()


def compiled(
    make: Callable[[Any], Any], *, cached: bool = True, sources: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: compile for float32 and float64 now, never in a call; from numba's disk cache where there is one.

    Args:
        make: the signature for a floating type.
        cached: everything that is compiled in stands in the kernel's own file or in ``sources``.
        sources: modules, by name, besides the kernel's own that the compiled code depends on.
    """
    signatures = list(dict.fromkeys([make(types.float32), make(types.float64)]))
    return lambda function: _compile(function, signatures, cached, sources)


def compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: compile for the types of the arguments when they first occur.

    The disk cache looks at changes of the kernel's own file only, so the kernel may use nothing that other files of
    this package define.
    """
    kernels: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        signature = tuple(map(numba.typeof, args))
        if signature not in kernels:
            kernels[signature] = _compile(function, [signature])
        return kernels[signature](*args)

    return call


def _compile(
    function: Callable[..., Any], signatures: list[Any], cached: bool = True, sources: Sequence[str] = ()
) -> Any:
    global _cache_works
    if _cache_works and cached:
        # numba raises where no directory is writable, the disk is full or a cached file is damaged. None of this is a
        # reason not to run; an error of the compilation itself comes again below.
        try:
            dispatcher = numba.njit(**_OPTIONS)(function)
            dispatcher._cache = _Cache(function, sources)
            for signature in signatures:
                dispatcher.compile(signature)
            dispatcher.disable_compile()
            return dispatcher
        except Exception as error:
            _cache_works = False
            warnings.warn(
                'mmdet_softnms compiles its kernels anew in every process (a few seconds), because the disk cache '
                f'of numba cannot be used: {error or type(error).__name__}. '
                'Set NUMBA_CACHE_DIR to an empty, writable directory.',
                RuntimeWarning,
                stacklevel=3,
            )
    return numba.njit(signatures, **_OPTIONS)(function)
