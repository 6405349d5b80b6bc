"""The project's commands in this process: a process of its own would import mmdet first, which takes seconds."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mmengine.runner import CheckpointLoader
from mmengine.utils import ManagerMixin

TOOLS = Path(__file__).parents[1] / 'tools'


@contextlib.contextmanager
def own_instances() -> Iterator[None]:
    """No logger, visualizer or scope of an earlier run: mmengine names them by the second in which a Runner starts.

    Two Runners of one second would share the first one's logger, which writes to that one's standard output and file.
    """
    with contextlib.ExitStack() as stack:
        classes: list[type] = [ManagerMixin]
        for one in classes:  # grows while it is walked
            classes += one.__subclasses__()
            stack.enter_context(mock.patch.dict(vars(one)['_instance_dict'], clear=True))
        yield


def run_tool(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python tools/NAME ARGUMENTS``: its exit status and what it prints.

    What the tool sets for its process is put back. An exception that is not the tool's end reaches the test.
    """
    out, err = io.StringIO(), io.StringIO()
    status: int | str | None = 0
    before, previous = Path.cwd(), signal.getsignal(signal.SIGTERM)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ),
        mock.patch.object(sys, 'argv', [str(TOOLS / name), *map(str, arguments)]),
        mock.patch.object(sys, 'path', [str(TOOLS), *sys.path]),
        own_instances(),
        mock.patch.object(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes)),
    ):
        try:
            os.chdir(cwd or before)
            runpy.run_path(str(TOOLS / name), run_name='__main__')
        except SystemExit as end:
            status = end.code
        finally:
            os.chdir(before)
            signal.signal(signal.SIGTERM, previous)
    if isinstance(status, str):  # as Python ends then
        err.write(f'{status}\n')
        status = 1
    return subprocess.CompletedProcess(list(map(str, arguments)), status or 0, out.getvalue(), err.getvalue())
