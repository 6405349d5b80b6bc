"""Kernels compiled by numba when they are first called; from its disk cache where there is one."""

import warnings
from collections.abc import Callable
from typing import Any

import numba


class compiled:  # noqa: N801  (a decorator)
    """Compile a kernel as ``numba.njit`` does, with the disk cache if that works and without it otherwise.

    The cache looks at changes of the kernel's own file only, so a kernel may use nothing that other files of this
    package define.

    Args:
        function: the kernel.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.py_func = function
        self._kernel = self._cached()

    def __call__(self, *args: Any) -> Any:
        try:
            return self._kernel(*args)
        except Exception as error:  # numba raises what it likes; an error of the kernel itself comes again below
            if not self._uses_cache:
                raise
            self._kernel = self._uncached(error)
        return self._kernel(*args)

    def _cached(self) -> Any:
        try:
            self._uses_cache = True
            return numba.njit(cache=True, nogil=True)(self.py_func)
        except Exception as error:
            return self._uncached(error)

    def _uncached(self, error: Exception) -> Any:
        self._uses_cache = False
        warnings.warn(
            f'the disk cache of numba cannot be used ({error or type(error).__name__}), so re-evaluation compiles its '
            'kernels anew in every process. Set NUMBA_CACHE_DIR to an empty, writable directory.',
            RuntimeWarning,
            stacklevel=2,
        )
        return numba.njit(nogil=True)(self.py_func)
