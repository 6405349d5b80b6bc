"""What is seen of a command while it works, and what goes to its log instead."""

import os
import sys
import tempfile
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

LINE_EVERY = 60.0  # seconds
LINE_AT_MOST_EVERY = 5.0


@dataclass
class _Task:
    """One thing that is going on."""

    began: float
    first: int  # what was done at that time
    said: float  # when the last line was written
    done: int  # at that time
    bar: Any = None


class Terminal:
    """Standard output for results alone, progress on standard error, everything else in a log; a context manager.

    Whatever other packages print ("loading annotations into memory...") goes to the log, also from processes that are
    started meanwhile. The log is kept once :meth:`keep_log` says where; of a command that ends before, nothing is.

    Progress is a bar on a terminal, drawn from this thread only: mmdet's VOC evaluation forks, and a fork must not meet
    another thread holding a lock. Elsewhere, and in the log, it is a line every minute or ten per cent.

    Attributes:
        out: the real standard output.
        quiet: nothing is shown (of processes that are not the main one).
    """

    def __init__(self, sweep: bool = False) -> None:
        """``sweep``: the best rows so far are shown, on a terminal."""
        self.quiet = False
        self.out: TextIO = sys.stdout
        self._sweep = sweep
        self._stack = ExitStack()
        self._tasks: dict[str, _Task] = {}
        self._rows: list[Any] = []
        self._live: Any = None
        self._bars: Any = None
        self._drawn = 0.0

    def __enter__(self) -> 'Terminal':
        self._early = self._stack.enter_context(tempfile.TemporaryFile())
        # The same file object throughout, since loggers hold it; keep_log() puts another file behind its number.
        self._log = self._stack.enter_context(
            open(os.dup(self._early.fileno()), 'w', 1, encoding='utf-8', errors='backslashreplace')
        )
        self.out.flush()
        try:
            self._is_descriptor_1 = self.out.fileno() == 1
        except (AttributeError, OSError, ValueError):  # not a file: a notebook's, or a test's
            self._is_descriptor_1 = False
        if self._is_descriptor_1:  # for processes started anew, too, which know nothing of this one's sys.stdout
            self.out = self._stack.enter_context(
                open(os.dup(1), 'w', 1, encoding=self.out.encoding, errors=self.out.errors)
            )
            self._stack.callback(os.dup2, self.out.fileno(), 1)
            os.dup2(self._log.fileno(), 1)
        self._stack.enter_context(redirect_stdout(self._log))
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._stack.close()

    def keep_log(self, path: Path) -> None:
        """Append to a file from now on, beginning with what was said so far.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'ab') as file:
            self._log.flush()
            self._early.seek(0)
            file.write(self._early.read())
            file.flush()
            for number in (self._log.fileno(), *([1] if self._is_descriptor_1 else [])):
                os.dup2(file.fileno(), number)

    def log(self, text: str) -> None:
        """Write to the log alone."""
        self._log.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {text}\n')

    def say(self, line: str) -> None:
        """Write a line to standard error (above the bars, as it is: a path in it may look like markup) and the log."""
        from rich.text import Text

        self.log(line)
        if self._console.is_terminal:
            self._console.print(Text(line), soft_wrap=True)
        else:
            self._line(line)

    def print(self, text: str, style: str = '') -> None:
        """Write a result to standard output, and to the log."""
        from rich.console import Console
        from rich.text import Text

        self.log(text)
        self.stop()
        if not self.quiet:
            Console(file=self.out).print(Text(text, style), soft_wrap=True)

    def print_table(self, make: Any) -> None:
        """Write a table to standard output: ``make(width=..., plain=...)`` of it."""
        from rich.console import Console

        from mmdet_softnms.reevaluation.report.table import print_table

        self.stop()
        console = Console(file=self.out)
        if not console.is_terminal:  # rich would ask the terminal of standard error how wide it is
            console = Console(file=self.out, width=int(os.environ.get('COLUMNS') or 80))
        if not self.quiet:
            print_table(console, make(width=console.width, plain=not console.is_terminal))

    def progress(self, what: str, done: int, total: int) -> None:
        """Move a bar, or write a line where it is time."""
        now = time.monotonic()
        task = self._tasks.setdefault(what, _Task(now, done, now, done))
        finished = done >= total
        waited = now - task.said
        if finished or waited >= LINE_EVERY or (waited >= LINE_AT_MOST_EVERY and done - task.done >= total / 10):
            task.said, task.done = now, done
            line = f'{what}: {done} of {total}'
            if finished:
                line += f' in {_clock(now - task.began)}'
            elif done > task.first:
                left = (now - task.began) / (done - task.first) * (total - done)
                line += f' ({100 * done // total} %), {_clock(left)} left'
            self.log(line)
            if not self._console.is_terminal:
                self._line(line)
        if self._console.is_terminal:
            self._draw(what, task, done, total)

    def on_row(self, row: Any, done: int, total: int) -> None:
        """Count a finished row, and show the best so far."""
        self._rows.append(row)
        if self._sweep and self._console.is_terminal and not self.quiet:
            from rich.console import Group

            from mmdet_softnms.reevaluation.report.table import rows_table

            best = sorted(self._rows, key=lambda one: -one.metrics['AP'])[:8]
            table = rows_table(best, f'best of {done} so far', among=self._rows, width=self._console.width)
            self._start().update(Group(table, self._bars))
        self.progress('settings', done, total)

    def stop(self) -> None:
        """Leave the bars as they are; what is printed next stands below them."""
        if self._live is not None:
            self._live.stop()

    def _line(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    @property
    def _console(self) -> Any:
        """rich's view of standard error; made when it is needed, since rich may not be installed."""
        from rich.console import Console

        if not hasattr(self, '_stderr'):
            self._stderr = Console(stderr=True, quiet=self.quiet)
        return self._stderr

    def _start(self) -> Any:
        """rich's live display, drawing."""
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self._live is None:
            self._bars = Progress(
                TextColumn('{task.description}', markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn('left'), TimeRemainingColumn(), auto_refresh=False,
            )  # fmt: skip
            self._live = Live(
                self._bars, console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=True
            )
            self._live.start()
        return self._live

    def _draw(self, what: str, task: _Task, done: int, total: int) -> None:
        live = self._start()
        if task.bar is None:
            task.bar = self._bars.add_task(what, total=total)
        self._bars.update(task.bar, completed=done, total=total)
        now = time.monotonic()
        if done == total or now - self._drawn > 0.1:
            live.refresh()
            self._drawn = now


def _clock(seconds: float) -> str:
    """``'1:02:03'`` or ``'2:03'``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{rest:02d}' if hours else f'{minutes}:{rest:02d}'
