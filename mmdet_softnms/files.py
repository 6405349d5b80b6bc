"""Errors of the tools and words for other errors, files written whole or not at all, and hashes."""

import difflib
import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class ReevaluationError(RuntimeError):
    """The input of a re-evaluation cannot be used; the message is one line with the remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, not allowed, or not of the model it is loaded into; one line."""


def first_line(error: object) -> str:
    """What an error says in one line; of one that says nothing, as a bare ``assert`` does, the code that raised it."""
    if said := next(iter(str(error).splitlines()), ''):
        return said
    frames = traceback.extract_tb(getattr(error, '__traceback__', None))
    place = f' in {Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line}' if frames else ''
    return f'{type(error).__name__}{place}'


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``"; did you mean 'gaussian'?"`` where a name is like one that there is, whatever its case; else nothing."""
    by_lower = {one.lower(): one for one in known}
    similar = difflib.get_close_matches(str(word).lower(), by_lower, 1)
    return f'; did you mean {by_lower[similar[0]]!r}?' if similar else ''


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; an earlier one stays until the new one is complete and on disk.

    Raises:
        OSError: no permission or no space; the earlier file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_temporaries(folder: Path) -> None:
    """Delete what :func:`write_whole` left in a folder when its process was killed."""
    for path in folder.glob('.*.tmp'):
        number = path.name.split('.')[-2]
        try:
            if number.isdecimal() and path.is_file() and _is_left_over(path, int(number)):
                path.unlink(missing_ok=True)
        except OSError:  # somebody else's file: in nobody's way
            continue


def _is_left_over(path: Path, pid: int) -> bool:
    """Whether nobody writes the file any more: this process does not yet, others are dead, or it is a day old."""
    if pid == os.getpid() or time.time() - path.stat().st_mtime > 86_400:
        return True
    if os.name != 'posix':  # os.kill ends a process there
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; an earlier one stays until the new one is complete.

    Raises:
        OSError: no permission or no space; the earlier file is intact.
    """
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + '\n').encode())
