"""Modules import what lies below them, and nothing else: the package's imports, read and not run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = 'mmdet_softnms'
#: From the lowest layer up; one layer a line, without the package's name. A name stands for itself and all inside it,
#: unless a longer one is listed too. Modules of one line may import one another, but not in a circle.
LAYERS = """
files yaml_file
locate
ops.weights ops._compiled
ops._arguments ops._derivative
ops._reference ops._cpu ops._triton ops._triton_kernels ops._neighbours ops._eager ops._rotated_cpu
ops._dispatch
ops._operator
ops._soft_nms
ops._batch
ops._voting ops._rotated
ops .
rules
paper_rules
registry
post_process
checkpoint export
models detectron2
roi_heads export_detector
reevaluation
reevaluation.candidates
reevaluation.scoring
reevaluation.request
reevaluation.result
reevaluation.choice
reevaluation.report
reevaluation.reproduction reevaluation.run
cli __main__
"""
HEIGHTS = {name: height for height, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}


def modules(root: Path) -> dict[str, Path]:
    """Every module under ``root/mmdet_softnms``, by its name without the package's; the package itself is '.'."""
    found = {}
    for path in sorted((root / PACKAGE).rglob('*.py')):
        parts = path.relative_to(root / PACKAGE).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts) or '.'] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """What a module imports of the package, wherever the statement stands, with its line."""
    tree = ast.parse(path.read_text('utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                here = [PACKAGE, *([] if name == '.' else name.split('.'))]
                above = len(here) - node.level + (path.name == '__init__.py')
                base = '.'.join([*here[:above], *([base] if base else [])])
            names = [f'{base}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for full in names:
            if full.split('.')[0] != PACKAGE:
                continue
            inner = full.removeprefix(PACKAGE).lstrip('.')
            while inner and inner not in known:  # a function or class of a module, or of the package itself
                inner = inner.rpartition('.')[0]
            yield inner or '.', node.lineno


def graph(root: Path) -> dict[str, dict[str, int]]:
    found = modules(root)
    return {
        name: {other: line for other, line in imports(name, path, set(found)) if other != name}
        for name, path in found.items()
    }


def height(module: str) -> int:
    """The layer of a module: its own line in the table, or that of the package it is in."""
    name = module
    while name not in HEIGHTS:
        name = name.rpartition('.')[0]
        if not name:
            raise KeyError(f'{module} is in no layer of tests/test_layers.py')
    return HEIGHTS[name]


def circle(edges: dict[str, dict[str, int]]) -> list[str]:
    """The modules of some circle, in order, or none."""
    done: set[str] = set()
    way: list[str] = []

    def visit(name: str) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        way.append(name)
        for other in edges.get(name, {}):
            if found := visit(other):
                return found
        way.pop()
        done.add(name)
        return []

    for name in edges:
        if found := visit(name):
            return found
    return []


def upwards(edges: dict[str, dict[str, int]]) -> list[str]:
    return [
        f'{name}, line {line}, imports {other}, which is above it'
        for name, others in edges.items()
        for other, line in others.items()
        if height(other) > height(name)
    ]


def test_no_import_circle() -> None:
    assert circle(graph(ROOT)) == []


def test_nothing_imports_what_is_above_it() -> None:
    assert upwards(graph(ROOT)) == []


def test_every_layer_of_the_table_is_there_once() -> None:
    names = LAYERS.split()
    assert len(set(names)) == len(names)
    edges = graph(ROOT)
    assert len(edges) > 30 and 'ops._arguments' in edges['ops._cpu'] and '.' in edges['export']


@pytest.mark.parametrize(
    ('module', 'statement', 'found'),
    [
        ('ops/_arguments.py', 'from mmdet_softnms.ops import _dispatch', 'upwards'),
        ('ops/_arguments.py', 'def late():\n    from mmdet_softnms.ops._dispatch import path', 'circle'),
        ('ops/weights.py', 'import mmdet_softnms.ops._arguments', 'circle'),
        ('ops/_reference.py', 'from . import _cpu', 'nothing'),
        ('files.py', 'from .ops import soft_nms', 'upwards'),
        ('files.py', 'from mmdet_softnms import soft_nms', 'upwards'),
        ('ops/_batch.py', 'if True:\n    from ..cli import reevaluate', 'upwards'),
    ],
)
def test_a_wrong_import_would_be_found(tmp_path: Path, module: str, statement: str, found: str) -> None:
    """The control: one import is added to a copy of the package's sources."""
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text('utf-8'), 'utf-8')
    with open(tmp_path / PACKAGE / module, 'a') as file:
        file.write(f'\n{statement}\n')
    edges = graph(tmp_path)
    if found == 'circle':
        assert circle(edges)
    elif found == 'upwards':
        assert upwards(edges)
    else:
        assert not circle(edges)
