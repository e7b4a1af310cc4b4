"""Definitions that stand only in a notebook, for another notebook: solutions change a piece and run it again."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path


def borrow(notebook: str, *names: str, changes: Sequence[tuple[str, str]] = (), **known):
    """What ``notebook.ipynb`` of this chapter defines under ``names``: a list, or the one thing for one name.

    The definitions see what the notebook imports and exports, the functions and classes of the notebook that they
    use, and ``known``, which goes before the rest. ``changes`` are pairs (old, new) made in their source first;
    each old text must occur exactly once. Raises ``KeyError`` for a name that the notebook does not define,
    ``ValueError`` for a change that does not fit.
    """
    path = Path.cwd() / f"{notebook}.ipynb"
    scope, defined = _exported(path), {}
    for source in _code(path):
        for statement in ast.parse(source).body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(statement), scope)
            elif name := _defines(statement):
                defined.setdefault(name, (statement, _source(source, statement)))
    if missing := [name for name in names if name not in defined]:
        raise KeyError(f"{path.name} defines no {', '.join(missing)} at the top of a cell.")
    wanted = _with_what_they_need(names, defined, {*scope, *known})
    sources = _changed([source for name, (_, source) in defined.items() if name in wanted], changes, path.name)
    scope |= known
    for source in sources:
        exec(source, scope)
    return scope[names[0]] if len(names) == 1 else [scope[name] for name in names]


def _with_what_they_need(names: Sequence[str], defined: dict, known: set[str]) -> set[str]:
    """``names`` and the functions and classes of the notebook that they use, directly or not, unless ``known``."""
    wanted, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        used = {node.id for node in ast.walk(defined[name][0]) if isinstance(node, ast.Name)}
        waiting += [other for other in used - wanted - known
                    if other in defined and isinstance(defined[other][0], (ast.ClassDef, ast.FunctionDef))]
    return wanted


def _changed(sources: list[str], changes: Sequence[tuple[str, str]], name: str) -> list[str]:
    for old, new in changes:
        if (count := sum(source.count(old) for source in sources)) != 1:
            raise ValueError(f"{old!r} occurs {count} times in what is borrowed from {name}; it must occur once.")
        sources = [source.replace(old, new) for source in sources]
    return sources


def _exported(path: Path) -> dict:
    """The names of the module that is written from the notebook, if there is one."""
    if not path.with_suffix(".py").exists():
        return {}
    return dict(vars(import_module(f"{path.parent.name}.{path.stem}")))


def _code(path: Path) -> Iterator[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def _source(source: str, statement: ast.stmt) -> str:
    """The statement's text, its decorators included."""
    first = min([statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1:statement.end_lineno])


def _defines(statement: ast.stmt) -> str:
    """The name that a class, a function or a plain assignment gives, or ""."""
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return statement.name
    targets = getattr(statement, "targets", [])
    return targets[0].id if targets and isinstance(targets[0], ast.Name) else ""
