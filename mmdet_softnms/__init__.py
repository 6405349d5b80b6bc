"""Soft-NMS for MMDetection 3.x: the operator, and RoI heads that use it by config alone.

``import mmdet_softnms`` needs torch and numba only, and registers ``torch.ops.mmdet_softnms.soft_nms`` (torch 2.4 or
newer). The parts registered for configs (rules, RoI heads) live behind :mod:`mmdet_softnms.registry`, which mmengine
imports by itself for any ``type='mmdet_softnms.X'``.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'
__all__ = ['__version__', 'batched_soft_nms', 'padded_soft_nms', 'reference', 'soft_nms', 'warmup']


def _is_command() -> bool:
    """Whether this process is one of the package's commands, by the ways there are to start one.

    Every other import brings the operator at once, so that ``torch.ops.mmdet_softnms.soft_nms`` exists from then on. A
    command reads its arguments first: torch takes seconds to import, and neither ``--help`` nor a misspelt option
    should wait for it. Python runs this file before any code of a command, so nothing but how the process was started
    can tell. Where this does not know a way to start a command, that command is slower, and nothing else.
    """
    started = Path(sys.argv[0] if sys.argv else '')
    if str(started) == '-m':  # what Python puts there while it looks for the module to run
        return sys.orig_argv[sys.orig_argv.index('-m') + 1 :][:1] == [__name__] if '-m' in sys.orig_argv else False
    if started.stem == 'mmdet-softnms':  # the console script
        return True
    package = Path(__file__).resolve().parent
    return started.name in ('reevaluate.py', 'reproduce.py', 'export_onnx.py', 'benchmark.py') and (
        started.resolve().parent in (package.parent / 'tools', package / '.mim' / 'tools')
    )


if TYPE_CHECKING or not _is_command():
    from mmdet_softnms.ops import batched_soft_nms, padded_soft_nms, reference, soft_nms, warmup
else:

    def __getattr__(name: str) -> Any:
        """Import the operator with the first use of its names."""
        if name not in __all__:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        import mmdet_softnms.ops

        return getattr(mmdet_softnms.ops, name)
