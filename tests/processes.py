"""Processes of the project's commands, each a fork of one that has imported what they need and has done nothing else.

For tests that send signals, kill, or look at an exit status: such a process would import mmdet first, for seconds.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = ('mmdet_softnms.cli.reevaluate', 'mmdet_softnms.reevaluation.run', 'mmdet.apis', 'mmdet.visualization')


class Forks:
    """The process that forks; its answers come one by one, so that it needs no thread."""

    def __init__(self) -> None:
        variables = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
        command = [sys.executable, '-c', 'from tests.processes import serve; serve()']
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables, cwd=ROOT
        )

    def ask(self, **request: Any) -> int:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(f'{json.dumps(request)}\n')
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, folder: Path, *command: object, **variables: str) -> 'Fork':
        """``python SCRIPT ARGUMENTS`` in a folder, with variables of the environment."""
        return Fork(self, folder, [*map(str, command)], variables)

    def close(self) -> None:
        self._server.communicate()  # it ends with its input


class Fork:
    """A process that has been started, and what it prints."""

    def __init__(self, forks: Forks, folder: Path, command: list[str], variables: Mapping[str, str]) -> None:
        self._forks = forks
        self._out, self._err = (folder / f'{id(self)}.{name}' for name in ('out', 'err'))
        files = dict(out=str(self._out), err=str(self._err))
        self.pid = forks.ask(command=command, folder=str(folder), variables=variables, **files)

    def wait(self, seconds: float = 300) -> tuple[int, str, str]:
        """The exit status, as of ``subprocess``, and what was printed to standard output and error."""
        timer = threading.Timer(seconds, os.kill, (self.pid, signal.SIGKILL))
        timer.start()
        status = self._forks.ask(wait=self.pid)
        timer.cancel()
        texts = self._out.read_text(), self._err.read_text()
        for path in (self._out, self._err):
            path.unlink()
        return status, *texts


def serve() -> None:
    """Answer one request a line: the id of a process that was started, or the status of one that has ended."""
    from yapf.yapflib import yapf_api

    yapf_api.FormatCode = lambda text, *arguments, **options: (text, True)  # as in conftest.py
    answers = open(os.dup(1), 'w')  # noqa: SIM115
    os.dup2(2, 1)  # what an import prints is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request['wait'], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                return _run(**request)
        print(answer, file=answers, flush=True)
    return None


def _run(command: list[str], folder: str, variables: Mapping[str, str], out: str, err: str) -> None:
    """What a new process would do; the interpreter ends with it, as ever."""
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI's background job ignores it
    sys.argv = command
    sys.path[0:1] = [str(Path(command[0]).parent), folder]
    runpy.run_path(command[0], run_name='__main__')
