"""Rules for the whole suite: which skips are allowed, which tests see a GPU, and where the shared real data is."""

import functools
import gc
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import utils as config_utils
from yapf.yapflib import yapf_api

from tests.processes import Forks

# mmengine lays out every config that it writes or logs with yapf: a second each, three a Runner.
# Without it the text is the same Python.
yapf_api.FormatCode = lambda text, *arguments, **options: (text, True)
# mmengine reads the metafiles of all of mmdet's models for every config that names one of mmdet's: half a second each.
config_utils.load = functools.cache(config_utils.load)

SHARED = Path(__file__).parents[2] / 'shared'
ALLOWED_SKIPS = (
    'no GPU: ',
    'no MXNet: ',
    'no detectron2: ',
    'no mmrotate: ',
    'no shared data: ',
    'no browser: ',
    'no /proc: ',
)


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of real images and checkpoints beside the project; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip('no shared data: there is no ../shared beside the project')
    return SHARED


@pytest.fixture(scope='session')
def forks() -> Generator[Forks, None, None]:
    """Starts processes that have imported mmdet already."""
    started = Forks()
    yield started
    started.close()


class _SkipGuard:
    """Fails a run in which a test was skipped for any other reason: nothing goes untested in silence."""

    def __init__(self) -> None:
        self.forbidden: list[str] = []

    def _look(self, report) -> None:
        if report.skipped and not hasattr(report, 'wasxfail') and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix('Skipped: ')
            if not reason.startswith(ALLOWED_SKIPS):
                self.forbidden.append(f'{report.nodeid}: {reason}')

    pytest_runtest_logreport = pytest_collectreport = lambda self, report: self._look(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session) -> None:
        if self.forbidden and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        for line in self.forbidden:
            terminalreporter.write_line(f'forbidden skip: {line}', red=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item) -> Generator[None, Any, Any]:
    """Only tests marked ``gpu`` see a GPU; the others give the same numbers on every machine.

    mmengine's Runner moves models to a GPU that is there, and what tests start as other programs does, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker('gpu') is None:
            patch.setattr(torch.cuda, 'is_available', lambda: False)
            patch.setenv('CUDA_VISIBLE_DEVICES', '')
            if 'mmengine.device.utils' in sys.modules:  # it has looked when it was imported
                patch.setattr(sys.modules['mmengine.device.utils'], 'DEVICE', 'cpu')
        return (yield)


def pytest_collection_modifyitems(items) -> None:
    """Skip what needs a GPU where there is none. Modules that start processes come first, for several workers' sake."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='no GPU: CUDA is not available'))
    slow = ('test_tools', 'test_reevaluation', 'test_integration')
    items.sort(key=lambda item: not any(name in item.nodeid for name in slow))


def pytest_collection_finish() -> None:
    """Half a million objects are there for good: without this the garbage collector walks them all run long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20000, 20, 20)


def pytest_configure(config) -> None:
    config.addinivalue_line('markers', 'gpu: needs a CUDA device; all other tests run as if there were none')
    config.pluginmanager.register(_SkipGuard(), 'skip-guard')
