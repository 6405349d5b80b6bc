"""The project's commands in this process: a process of its own would import mmdet first, which takes seconds."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from mmdet.visualization import DetLocalVisualizer
from mmengine.runner import CheckpointLoader

TOOLS = Path(__file__).parents[1] / 'tools'


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
        mock.patch.dict(DetLocalVisualizer._instance_dict, clear=True),  # by name, with the folder of the first run
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
