"""What the command lines share, of the standard library alone: no argument waits for torch to be checked."""

import argparse
import errno
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

#: Modules of each extra of pyproject.toml that a command needs.
EXTRAS = {
    'reevaluate': ('rich', 'pyarrow', 'faster_coco_eval', 'matplotlib', 'jinja2', 'filelock', 'yaml', 'joblib'),
    'export': ('onnx', 'onnxscript'),
}


class Parser(argparse.ArgumentParser):
    """Exit status 1 for a wrong command line, as for every other bad input; ``reproduce`` gives 2 a meaning."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f'{self.format_usage()}error: {message}\n')


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options KEY=VALUE ...`` as texts, for :func:`config_options`."""
    parser.add_argument(
        '--cfg-options', nargs='+', action='extend', type=_key_value, default=[], metavar='KEY=VALUE', help='overrides'
    )


def _key_value(text: str) -> str:
    key, equals, _ = text.partition('=')
    if not key or not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE')
    return text


def config_options(texts: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as mmengine's ``DictAction`` reads them, which needs torch.

    Raises:
        SystemExit: a value has unbalanced brackets; with one line.
    """
    from mmengine.config import DictAction

    read = argparse.Namespace(options={})
    for text in texts:
        try:
            DictAction([], 'options')(argparse.ArgumentParser(), read, [text])
        except AssertionError as error:
            sys.exit(f'error: --cfg-options {text}: {error}')
    options: dict[str, Any] = read.options
    return options


def at_least(smallest: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from ``smallest`` on."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not a whole number') from None
        if value < smallest:
            raise argparse.ArgumentTypeError(f'must be at least {smallest}, got {value}')
        return value

    return whole_number


def require(extra: str) -> None:
    """Make sure that the packages of an extra are there, without importing them.

    Raises:
        SystemExit: with one line that names what is missing and how to install it.
    """
    if missing := [name for name in EXTRAS[extra] if not _is_installed(name)]:
        sys.exit(
            f'error: {" and ".join(missing)} {"is" if len(missing) == 1 else "are"} not installed; '
            f"in the clone of mmdet_softnms: pip install '.[{extra}]'"
        )


def start(args: argparse.Namespace, extra: str) -> None:
    """What a command does once its arguments are read: packages are there, mmdet works, options are mmengine's.

    Raises:
        SystemExit: with one line that names what is missing.
    """
    require(extra)
    try:
        from mmdet_softnms.registry import require_mmdet

        require_mmdet()
    except ImportError as error:
        sys.exit(f'error: {error}')
    args.cfg_options = config_options(args.cfg_options)
    warnings.filterwarnings('ignore', category=UserWarning, module='mmengine|mmdet|mmcv|torch')


def cannot_write(error: OSError, work_dir: Path) -> str:
    """One line for a work directory that cannot be written; empty where an error is of something else."""
    kinds = PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError
    if not (isinstance(error, kinds) or error.errno == errno.EROFS) or error.filename is None:
        return ''
    path, folder = Path(error.filename).absolute(), work_dir.absolute()
    if path != folder and folder not in path.parents and path not in folder.parents:
        return ''
    return (
        f'error: {work_dir} cannot be written ({error.strerror}: {error.filename}); name another folder by --work-dir'
    )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False
