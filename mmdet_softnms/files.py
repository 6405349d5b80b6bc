"""Errors of the tools, files written whole or not at all, and hashes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class ReevaluationError(RuntimeError):
    """The input of a re-evaluation cannot be used; the message is one line with the remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, not allowed, or not of the model it is loaded into; one line."""


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
