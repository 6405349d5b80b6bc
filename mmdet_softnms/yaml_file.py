"""YAML files as data: mmengine's reader would construct any Python object that a file names, and unpickle others."""

from pathlib import Path
from typing import IO, Any

import yaml  # type: ignore[import-untyped]

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000


class YamlError(ValueError):
    """The file cannot be read, or is not plain data; one line without the file's name."""


class WithTuples(yaml.SafeLoader):  # type: ignore[misc]
    """Reads tuples, too, which mmengine writes into the configs that it dumps."""


WithTuples.add_constructor(
    'tag:yaml.org,2002:python/tuple', lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)


def read_yaml(path: Path) -> Any:
    """Lists, dicts, strings and numbers of a ``.yml`` or ``.yaml`` file.

    Raises:
        YamlError: anything else.
    """
    if path.suffix not in ('.yml', '.yaml'):
        raise YamlError('only .yml and .yaml files are read')
    try:
        with open(path, 'rb') as file:
            return parse_yaml(file)
    except OSError as error:
        raise YamlError(error.strerror or str(error)) from error


def parse_yaml(file: IO[Any], loader: type = yaml.SafeLoader) -> Any:
    """The same of an open file.

    Raises:
        YamlError: anything else.
    """
    try:
        text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise YamlError(f'it is longer than {_MAX_BYTES} bytes')
        content = yaml.load(text.decode('utf-8-sig') if isinstance(text, bytes) else text, loader)
        _count(content, {})
    except yaml.MarkedYAMLError as error:
        line = f' in line {error.problem_mark.line + 1}' if error.problem_mark else ''
        raise YamlError(f'{error.problem or error.context}{line}') from error
    except RecursionError as error:
        raise YamlError('it is nested too deeply') from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:  # a date such as 2020-99-99
        raise YamlError(next(iter(str(error).splitlines()), type(error).__name__)) from error
    return content


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values a value holds when its aliases are written out; a few lines can name billions.

    ``known``: the count of each value, by its id; while a value is being counted, more than is allowed.
    """
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_VALUES + 1  # found again inside itself
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inside)
    if known[id(value)] > _MAX_VALUES:
        raise YamlError(f'it holds more than {_MAX_VALUES} values when its aliases are written out')
    return known[id(value)]
