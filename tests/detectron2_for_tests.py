"""Detectron2 for the tests of its adapter: an installed one, or what ``tools/setup_env.sh`` put beside the packages."""

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import PIL.Image

PLACE = Path(sys.prefix) / 'detectron2'


def missing() -> str:
    """Why there is no Detectron2, or nothing."""
    if importlib.util.find_spec('detectron2') is not None or (PLACE / 'detectron2').is_dir():
        return ''
    return 'no detectron2: it is not installed, and setup_detectron2 of tools/setup_env.sh has not run'


def find() -> str:
    """Make ``import detectron2`` work in this process; returns why it cannot, or nothing."""
    if importlib.util.find_spec('detectron2') is not None:
        return ''
    if reason := missing():
        return reason
    load_torchvision()
    # Release 0.6 is of 2021, and was not built.
    PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]
    sys.modules['detectron2._C'] = ModuleType('detectron2._C')
    return ''


def load_torchvision() -> None:
    """Make ``import torchvision`` work in this process, with the one beside Detectron2."""
    sys.path.append(str(PLACE))  # last: packages that are installed win
    for library in (PLACE / 'stubs').glob('*.so*'):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
