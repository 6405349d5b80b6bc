"""What code and data are, as hashes: of values of any type, and of the source behind classes and objects."""

import ast
import dataclasses
import functools
import hashlib
import importlib.machinery
import inspect
import os
import pickle
import sys
import sysconfig
import types
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement

from mmdet_softnms.files import sha256

_PINNED = ('torch', 'torchvision', 'numpy', 'cv2', 'PIL', 'numba', 'triton', 'scipy', 'fvcore', 'yacs')  # by version
_ALWAYS = ('mmcv', 'mmdet', 'mmengine')
LIBRARIES = (*_ALWAYS, 'detectron2', 'mmrotate')  # hashed whole, since people edit them; the last two where used
_OURS = 'mmdet_softnms'
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))


def digest(*values: Any) -> str:
    """The SHA-256 of values of any type; values that cannot be compared never have the same one."""
    hasher = hashlib.sha256()
    for value in values:
        for part in _parts(value):
            hasher.update(len(part).to_bytes(8, 'little') + part)
    return hasher.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(getattr(value, 'tensor', None), torch.Tensor):  # mmdet's boxes
        value = value.tensor
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        yield f'{value.dtype} {tuple(value.shape)}'.encode()
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b''
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f'{value.dtype} {value.shape}'.encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, (*_SIMPLE, np.generic)):
        yield f'{type(value).__name__} {value!r}'.encode()
    elif isinstance(value, dict):
        yield f'dict {len(value)}'.encode()
        for key in sorted(value, key=repr):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple, np.ndarray)):
        yield f'list {len(value)}'.encode()
        for each in value:
            yield from _parts(each)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(digest(each).encode() for each in value)
    elif isinstance(value, type):
        yield f'{value.__module__}.{value.__qualname__}'.encode()
    elif isinstance(value, BaseDataElement):
        yield from _parts([type(value), dict(value.metainfo_items()), dict(value.items())])
    elif dataclasses.is_dataclass(value):
        yield from _parts([type(value), {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}])
    elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        yield from _parts(_function(value, set()))
    else:
        try:
            yield pickle.dumps(value)
        except Exception:  # whatever an object raises that does not like to be pickled
            yield uuid.uuid4().bytes


@dataclasses.dataclass
class Code:
    """The code behind some objects.

    Attributes:
        files: SHA-256 of source by module; whole packages by their name.
        live: hash of the functions in memory, which a notebook changes without any file.
        unknown: classes and functions that have no file.
    """

    files: dict[str, str]
    live: str
    unknown: list[str]

    @property
    def foreign(self) -> bool:
        """Whether some of it is neither OpenMMLab's nor this package's."""
        return bool(set(self.files) - {*LIBRARIES, _OURS}) or bool(self.unknown)


def code_of(*roots: Any, modules: Iterable[str] = ()) -> Code:
    """The code of objects, of what they hold, of their classes' bases, and of the modules that these import.

    Args:
        roots: objects, classes and functions; tensors and plain values in them are passed over.
        modules: names of further modules (``custom_imports``).
    """
    walk = _Walk()
    for root in roots:
        walk.visit(root)
    names = {f'{_OURS}.{Path(__file__).parent.parent.name}.candidates.forward', *modules}
    files: dict[str, Path] = {}
    for name, thing in walk.modules.items():
        names.add(name)
        if _top(name) not in (*LIBRARIES, _OURS) and not _is_file(_origin(name)):
            walk.unknown.append(thing)
    for name in sorted(names):
        _add_module(name, files)
    hashes = {name: sha256(path) for name, path in files.items() if _top(name) != _OURS}
    ours = {name: sha256(path) for name, path in files.items() if _top(name) == _OURS}
    hashes[_OURS] = digest(ours)
    for name in LIBRARIES:
        if name in _ALWAYS or any(_top(module) == name for module in walk.modules):
            hashes[name] = _tree(name)
    return Code(hashes, digest(walk.live), sorted(set(walk.unknown)))


class _Walk:
    """Classes and functions reachable from objects."""

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}  # name: the first thing met that is defined there
        self.live: dict[str, Any] = {}
        self.unknown: list[str] = []
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # so that no id is given twice

    def visit(self, thing: Any) -> None:
        if isinstance(thing, (*_SIMPLE, torch.Tensor, np.ndarray, np.generic, types.ModuleType)):
            return
        if id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        self._alive.append(thing)
        if isinstance(thing, dict):
            self._visit_all(thing.values())
        elif isinstance(thing, (list, tuple, set, frozenset)):
            self._visit_all(thing)
        elif isinstance(thing, type):
            self._class(thing)
        elif isinstance(thing, functools.partial):
            self._visit_all([thing.func, thing.args, thing.keywords])
        elif isinstance(thing, types.MethodType):
            self._visit_all([thing.__func__, thing.__self__])
        elif isinstance(thing, types.FunctionType):
            if self._defined(thing.__module__, thing.__qualname__):
                self.live[f'{thing.__module__}.{thing.__qualname__}'] = _function(thing, set())
            self._visit_all(_contents(thing))
        elif self._class(type(thing)) or isinstance(thing, torch.nn.Module):
            self._visit_all(getattr(thing, '__dict__', {}).values())

    def _visit_all(self, things: Iterable[Any]) -> None:
        for thing in list(things):
            self.visit(thing)

    def _class(self, cls: type) -> bool:
        """Note a class and its bases; whether its objects are looked into."""
        looked_into = False
        for base in cls.__mro__:
            if not self._defined(base.__module__, base.__qualname__):
                continue
            looked_into = True
            if id(base) in self._seen and base is not cls:
                continue
            self._seen.add(id(base))
            self._alive.append(base)
            name = f'{base.__module__}.{base.__qualname__}'
            values = {key: value for key, value in vars(base).items() if not key.startswith('__') or key == '__init__'}
            self.live[name] = {key: _member(value) for key, value in values.items()}
            # A method put there by somebody else's code.
            for value in values.values():
                function = inspect.unwrap(value) if isinstance(value, types.FunctionType) else None
                if function is not None and function.__module__ != base.__module__:
                    self._defined(function.__module__, function.__qualname__)
        return looked_into

    def _defined(self, module: str | None, name: str) -> bool:
        if module is None or _top(module) in _PINNED or _top(module) in sys.stdlib_module_names:
            return False
        self.modules.setdefault(module, f'{module}.{name}')
        return True


def _member(value: Any) -> Any:
    """What of a class attribute can be compared: functions, and plain values."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        return [_member(each) for each in (value.fget, value.fset)]
    if isinstance(value, types.FunctionType):
        return _function(value, set())
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, str) and os.sep in value:
        return None  # where something lies
    return value if isinstance(value, (*_SIMPLE, np.generic)) else None


def _contents(function: types.FunctionType) -> list[Any]:
    """Values in a function's closure and defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _function(function: Any, seen: set[int]) -> Any:
    if isinstance(function, functools.partial):
        return [_function(function.func, seen), _plain(function.args), sorted(function.keywords)]
    if isinstance(function, types.MethodType):
        function = function.__func__
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return _plain(function)
    seen.add(id(function))
    inside = [_function(value, seen) for value in _contents(function)]
    return [function.__module__, function.__qualname__, _bytecode(function.__code__), inside]


def _bytecode(code: types.CodeType) -> Any:
    constants = [_bytecode(one) if isinstance(one, types.CodeType) else one for one in code.co_consts]
    return [code.co_code, code.co_names, code.co_varnames, constants]


def model_state(model: torch.nn.Module) -> str:
    """Hash of the plain values that the modules of a model hold: a class attribute changed from outside, say."""
    return digest({name: {k: _plain(v) for k, v in vars(one).items()} for name, one in model.named_modules()})


def _top(name: str) -> str:
    return name.partition('.')[0]


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(os.path.realpath(paths[key]) + os.sep for key in ('purelib', 'platlib', 'stdlib', 'platstdlib'))


def _is_installed(path: Path) -> bool:
    return os.path.realpath(path).startswith(_installed_folders()) or 'site-packages' in path.parts


def _origin(name: str) -> Path | None:
    """The file of a module, whether it is imported or not; nothing is imported for it."""
    module = sys.modules.get(name)
    file = getattr(module, '__file__', None) if module is not None else None
    if file is not None:
        return Path(file)
    spec, path = None, None
    for length in range(1, name.count('.') + 2):
        part = '.'.join(name.split('.')[:length])
        try:
            spec = importlib.machinery.PathFinder.find_spec(part, path)
        except (ImportError, ValueError, OSError):
            return None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin not in (None, 'built-in', 'frozen') else None


def _add_module(name: str, files: dict[str, Path]) -> None:
    """Add a module's file and, unless it is installed, those of the modules it imports, anywhere in its code."""
    waiting, first = [name], name
    while waiting:
        name = waiting.pop()
        top = _top(name)
        if name in files or top in _PINNED or top in LIBRARIES or top in sys.stdlib_module_names:
            continue
        path = _origin(name)
        installed = top != _OURS and path is not None and _is_installed(path)
        if path is None or not path.is_file() or (installed and name != first):
            continue
        files[name] = path
        if path.suffix != '.py' or installed:
            continue
        waiting += ['.'.join(name.split('.')[:length]) for length in range(1, name.count('.') + 1)]
        package = name if path.name == '__init__.py' else name.rpartition('.')[0]
        waiting += _imports(path.read_bytes(), package)


@functools.lru_cache(maxsize=512)  # by content: what follows from it cannot be stale
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # it is imported already, so this is an edit that is not finished
        return ()
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            names += [base, *(f'{base}.{alias.name}' for alias in node.names)]
    return tuple(name for name in names if name)


def _tree(package: str) -> str:
    """Hash of all Python files of an installed package."""
    origin = _origin(package)
    if origin is None:
        return ''
    found = {}
    for folder, folders, names in os.walk(origin.parent):
        folders[:] = sorted(one for one in folders if one not in ('.mim', '__pycache__'))
        for name in names:
            if name.endswith('.py'):
                path = os.path.join(folder, name)
                found[os.path.relpath(path, origin.parent)] = sha256(path)
    return digest(found)
