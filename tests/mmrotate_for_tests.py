"""mmrotate for the tests of its heads: an installed one, or what ``tools/setup_env.sh`` put beside the packages.

Its models import torchvision, which is that of the tests of Detectron2 where none is installed.
"""

import importlib.util
import sys
from pathlib import Path

from tests import detectron2_for_tests

PLACE = Path(sys.prefix) / 'mmrotate'


def missing() -> str:
    """Why there is no mmrotate, or nothing."""
    if importlib.util.find_spec('mmrotate') is None and not (PLACE / 'mmrotate').is_dir():
        return 'no mmrotate: it is not installed, and setup_mmrotate of tools/setup_env.sh has not run'
    if importlib.util.find_spec('torchvision') is None and not (detectron2_for_tests.PLACE / 'torchvision').is_dir():
        return 'no mmrotate: its models import torchvision, and setup_detectron2 of tools/setup_env.sh has not run'
    return ''


def find() -> str:
    """Make ``import mmrotate`` work in this process; returns why it cannot, or nothing."""
    if reason := missing():
        return reason
    if importlib.util.find_spec('mmrotate') is None:
        sys.path.append(str(PLACE))  # last: packages that are installed win
    if importlib.util.find_spec('torchvision') is None:
        detectron2_for_tests.load_torchvision()
    return ''
