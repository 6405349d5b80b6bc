"""What a command line may name that is no local file: a config of an installed package, a checkpoint to be fetched."""

import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from mmengine.config import Config
from mmengine.fileio import register_handler
from mmengine.fileio.handlers import YamlHandler
from mmengine.hub import get_config
from mmengine.infer import BaseInferencer
from mmengine.runner.checkpoint import CheckpointLoader

from mmdet_softnms.files import CheckpointError, ReevaluationError, first_line
from mmdet_softnms.yaml_file import WithTuples, parse_yaml

_URLS = ('http://', 'https://', 'file://')
_TIMEOUT = 60  # seconds without a byte


def local_config(name: str | Path) -> str:
    """The file of a config: a path, ``'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'``, or the name or an alias of
    a model of mmdet's zoo, as mmdet's inferencer takes it.

    Raises:
        ReevaluationError: there is no such config.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return path
    package, separator, inside = str(name).partition('::')
    if separator and package.isidentifier():
        if importlib.util.find_spec(package) is None:  # mmengine would install it
            raise ReevaluationError(f'config {name} does not exist: package {package} is not installed')
        try:
            return str(get_config(str(name) if inside.endswith('.py') else f'{name}.py').filename)
        except Exception as error:  # a config is a program: whatever it raises is about the config
            raise ReevaluationError(
                f'config {name} cannot be read ({type(error).__name__}: {first_line(error)}); write '
                f'{package}::FOLDER/NAME.py'
            ) from error
    if not inside and re.fullmatch(r'[\w.-]+', str(name)) and not str(name).endswith('.py'):
        root = BaseInferencer._get_repo_or_mim_dir('mmdet')
        for model in BaseInferencer._get_models_from_metafile(root):
            aliases = model.get('Alias', [])
            names = [model['Name'], *([aliases] if isinstance(aliases, str) else aliases)]
            if str(name).lower() in (one.lower() for one in names):
                return os.path.join(root, model['Config'])
        raise ReevaluationError(f'config {name} does not exist, nor does mmdet have a model of that name')
    raise ReevaluationError(f'config {name} does not exist')


class _PlainYaml(YamlHandler):  # type: ignore[misc]
    """mmengine's reader of YAML, without the objects that a file can name."""

    def load_from_fileobj(self, file: Any, **_: Any) -> Any:
        return parse_yaml(file, WithTuples)


def read_config(name: str | Path, options: dict[str, Any] | None = None) -> Config:
    """A config by any name that :func:`local_config` takes, with overrides.

    From then on mmengine reads the YAML files of this process as plain data.

    Raises:
        ReevaluationError: there is none, or it cannot be read.
    """
    path = local_config(name)
    register_handler(['yml', 'yaml'])(_PlainYaml)
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(options or {})
    except Exception as error:  # a config is a program: whatever it raises is about the config
        raise ReevaluationError(f'config {name} cannot be read: {type(error).__name__}: {first_line(error)}') from error
    return cfg


def local_checkpoint(name: str | Path, *, trust: bool = False, say: Callable[[str], None] | None = None) -> Path:
    """The file of a checkpoint: a path, a URL, or whatever else mmengine's loader fetches (``s3://``,
    ``torchvision://``, ``open-mmlab://``, ...).

    A fetched file stays below torch's hub directory. A URL is asked each time whether its content has changed; without
    a network the earlier content is taken.

    Args:
        name: what the user wrote.
        trust: see :func:`mmdet_softnms.checkpoint.load_checkpoint`; for what mmengine reads while it fetches.
        say: called with a line where something is fetched; default: printed to stderr.

    Raises:
        CheckpointError: there is none, or it cannot be fetched.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    text = str(name)
    say = say or (lambda line: print(line, file=sys.stderr))
    if text.startswith(_URLS):
        place = _place(text)
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{place}.lock'):  # the processes of a launcher share one download
            _fetch(text, place, say)
        return place
    if any(prefix and re.match(prefix, text) for prefix in CheckpointLoader._schemes):
        return _read_by_mmengine(text, trust)
    raise CheckpointError(f'checkpoint {name} does not exist; download it or correct the path')


def forget_fetched(path: Path) -> bool:
    """Throw a file away if it was fetched, since it turned out to be no checkpoint; whether it was."""
    was_fetched = path.is_file() and path.is_relative_to(_fetched())
    if was_fetched:
        path.unlink()
    return was_fetched


def _fetched() -> Path:
    return Path(torch.hub.get_dir()) / 'mmdet_softnms'


def _place(url: str) -> Path:
    """By the whole URL: epoch_12.pth of two servers are two files, which torch's cache would take for one."""
    file = urllib.parse.unquote(urllib.parse.urlparse(url).path).rsplit('/', 1)[-1] or 'checkpoint.pth'
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    return _fetched() / folder / file


def _fetch(url: str, place: Path, say: Callable[[str], None]) -> None:
    """Download a file unless the server says that the content is what is there already."""
    stamp = place.with_name(f'{place.name}.json')
    known = json.loads(stamp.read_text()) if place.is_file() and stamp.is_file() else {}
    temporary = place.with_name(f'{place.name}.{uuid.uuid4().hex}.partial')
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=known), timeout=_TIMEOUT) as response:
            say(f'fetching {url} to {place}')
            with open(temporary, 'wb') as file:
                shutil.copyfileobj(response, file)
            expected = response.headers.get('Content-Length')
            if expected is not None and temporary.stat().st_size != int(expected):
                raise CheckpointError(
                    f'checkpoint {url} ended after {temporary.stat().st_size} of {expected} bytes: run again'
                )
            stamp.unlink(missing_ok=True)
            os.replace(temporary, place)
            stamp.write_text(json.dumps(_validators(response.headers)))
    except urllib.error.HTTPError as error:
        if error.code != 304:
            raise CheckpointError(
                f'checkpoint {url} cannot be fetched: the server answers {error.code} {error.reason}'
            ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, no such URL, broken off
        if not place.is_file():
            raise CheckpointError(
                f'checkpoint {url} cannot be fetched ({first_line(getattr(error, "reason", error))}); check the '
                'network, or download it elsewhere and give its path'
            ) from error
        say(f'{url} cannot be reached: its content of an earlier run is used, {place}')
    finally:
        temporary.unlink(missing_ok=True)


def _validators(headers: Any) -> dict[str, str]:
    """What to ask a server with, next time; a date tells nothing of a file that was written within the same second."""
    if etag := headers.get('ETag'):
        return {'If-None-Match': etag}
    try:
        modified, now = (parsedate_to_datetime(headers[key]) for key in ('Last-Modified', 'Date'))
    except (TypeError, ValueError):
        return {}
    return {'If-Modified-Since': headers['Last-Modified']} if (now - modified).total_seconds() > 60 else {}


def _read_by_mmengine(name: str, trust: bool) -> Path:
    """Let mmengine's loader of a scheme fetch and read, and keep what it gives as a file."""
    try:
        with _weights_only(not trust):
            checkpoint = CheckpointLoader.load_checkpoint(name, map_location='cpu', logger='silent')
    except Exception as error:  # a backend's client may raise anything
        raise CheckpointError(
            f'checkpoint {name} cannot be fetched by mmengine ({type(error).__name__}: {first_line(error)}); download '
            'it and give its path'
        ) from error
    place = _place(name).with_suffix('.pth')
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f'{place.name}.{uuid.uuid4().hex}.partial')
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
    return place


@contextmanager
def _weights_only(forced: bool) -> Iterator[None]:
    """mmengine would fall back to unpickling everything."""
    key = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = os.environ.get(key)
    if forced:
        os.environ[key] = '1'
    try:
        yield
    finally:
        if forced and before is None:
            del os.environ[key]
