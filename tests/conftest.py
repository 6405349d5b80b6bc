"""Rules for the whole suite: which skips are allowed, and where the shared real data is."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / 'shared'
ALLOWED_SKIPS = ('no GPU: ', 'no shared data: ', 'no browser: ')


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder of real images and checkpoints beside the project; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip('no shared data: there is no ../shared beside the project')
    return SHARED


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


def pytest_collection_modifyitems(items) -> None:
    """Modules that start processes come first: with several workers, none is left with them in the end."""
    slow = ('test_tools', 'test_reevaluation', 'test_integration')
    items.sort(key=lambda item: not any(name in item.nodeid for name in slow))


def pytest_configure(config) -> None:
    config.pluginmanager.register(_SkipGuard(), 'skip-guard')
