"""From notebook to module: the cells that begin with ``#| export`` become the chapter's library.

Standard library only. The module is rewritten whole or left as it was; the exporter refuses, naming
the notebook and the cell, what could not be imported by the next chapter.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import symtable
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .workspace import ROOT, write_text

MARKER = "#| export"
MODULE_NAMES = {"__name__", "__file__", "__doc__", "__package__", "__spec__", "__annotations__"}


class ExportError(ValueError):
    """An exported cell that cannot become part of a module; the message names notebook and cell."""


@dataclass(frozen=True)
class Cell:
    """One exported cell: its place among the notebook's cells (from 1) and its source without the marker."""

    number: int
    source: str

    def __str__(self) -> str:
        first = next((line for line in self.source.splitlines() if line.strip()), "")
        return f"cell {self.number} ({first.strip()[:50]!r})"


def chapter_notebooks(root: Path = ROOT) -> list[Path]:
    """The notebooks of the course in order: ``ch*/*.ipynb``."""
    return sorted(p for p in root.glob("ch[0-9][0-9]_*/*.ipynb") if not p.name.startswith("."))


def exported_cells(notebook: Path) -> tuple[str, list[Cell]]:
    """The notebook's title (its first heading) and its exported cells."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise ExportError(f"{_name(notebook)} is not a readable notebook: {error}") from error
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    headings = [re.match(r"#\s+(.+)", text) for kind, text in sources if kind == "markdown"]
    title = next((h.group(1).strip() for h in headings if h), notebook.stem)
    marked = [
        Cell(number, text.split("\n", 1)[1] if "\n" in text else "")
        for number, (kind, text) in enumerate(sources, 1)
        if kind == "code" and text.split("\n", 1)[0].rstrip() == MARKER
    ]
    return title, marked


def module_source(notebook: Path) -> str | None:
    """The text of the module that the notebook's exported cells make, or None if it exports nothing.

    Raises ``ExportError`` for a syntax error, a duplicate definition, a star import, an import from
    ``__future__``, or a name that the cells use but nothing exported or imported defines.
    """
    title, cells = exported_cells(notebook)
    if not cells:
        return None
    where = _name(notebook)
    defined: dict[str, Cell] = {}
    public: list[str] = []
    imports: set[str] = set()  # these may be repeated
    for cell in cells:
        for name, imported in _top_level_names(where, cell):
            if name in defined and not (imported and name in imports):
                raise ExportError(
                    f"{where}, {cell}: {name!r} is defined already in {defined[name]}. "
                    "Rename one of them, or take the marker off the cell that only shows a step on the way.")
            defined.setdefault(name, cell)
            if imported:
                imports.add(name)
            elif not name.startswith("_"):
                public.append(name)
    for cell in cells:
        for name in sorted(_global_names(cell.source, where) - set(defined) - set(dir(builtins)) - MODULE_NAMES):
            raise ExportError(
                f"{where}, {cell}: uses {name!r}, which no exported cell defines or imports. "
                f"Put {MARKER!r} on the cell that defines it, or import it in an exported cell.")
    exported = "".join(f"    {name!r},\n".replace("'", '"') for name in public)
    return (
        f'"""{title}.\n\n'
        f"Written from {where} by `python course.py export`:\n"
        f'edit the notebook, not this file.\n"""\n\n'
        f"__all__ = [\n{exported}]\n\n{_body(cells)}"
    )


def _body(cells: list[Cell]) -> str:
    return "\n\n\n".join(_relative_imports(cell.source).strip("\n") for cell in cells) + "\n"


def export_notebook(notebook: Path) -> bool:
    """Write the notebook's module beside it; True if that changed the file. Raises ``ExportError``."""
    source, module = module_source(notebook), notebook.with_suffix(".py")
    if source is None or (module.exists() and module.read_text(encoding="utf-8") == source):
        return False
    write_text(module, source)
    return True


def export_all(root: Path = ROOT, check: bool = False) -> list[str]:
    """Export every notebook (or only compare, with ``check``); one line for each problem found."""
    problems = []
    for notebook in chapter_notebooks(root):
        try:
            if check:
                problems += _difference(notebook)
            elif export_notebook(notebook):
                print(f"{_name(notebook.with_suffix('.py'))} written from {_name(notebook)}")
        except ExportError as error:
            problems.append(str(error))
    for module in root.glob("ch[0-9][0-9]_*/*.py"):
        text = module.read_text(encoding="utf-8")
        if "Written from " in text[:300] and not module.with_suffix(".ipynb").exists():
            problems.append(f"{_name(module)}: its notebook is gone. Delete the module or bring the notebook back.")
    return problems


def warn_if_stale(*folders: str) -> None:
    """Say it, on standard error, if a chapter's notebook was edited but its module not rewritten.

    Each ``previous_chapters.py`` calls this, so that nobody trains yesterday's attention unawares.
    """
    for folder in folders:
        _warn_once(folder)


@cache  # chapter 6 asks about chapter 1, and so do the chapters that it imports
def _warn_once(folder: str) -> None:
    for notebook in sorted((ROOT / folder).glob("*.ipynb")):
        try:
            problems = [] if _same_cells(notebook) else _difference(notebook)
        except ExportError as error:
            problems = [f"{error}\n  Until that is mended, the module of before is used."]
        for problem in problems:
            print(f"Note: {problem}", file=sys.stderr)


def _same_cells(notebook: Path) -> bool:
    """Whether the module consists of the notebook's cells: then it needs no closer look, which takes longer."""
    module = notebook.with_suffix(".py")
    if not module.exists():
        return MARKER not in notebook.read_text(encoding="utf-8")
    return module.read_text(encoding="utf-8").endswith("]\n\n" + _body(exported_cells(notebook)[1]))


def _difference(notebook: Path) -> list[str]:
    source, module = module_source(notebook), notebook.with_suffix(".py")
    if source is None or (module.exists() and module.read_text(encoding="utf-8") == source):
        return []
    state = "differs from" if module.exists() else "is missing beside"
    return [f"{_name(module)} {state} {_name(notebook)}. Run: python course.py export"]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _top_level_names(where: str, cell: Cell) -> list[tuple[str, bool]]:
    """The names that a cell binds at its top level, each with whether an import binds it."""
    try:
        tree = ast.parse(cell.source)
        compile(tree, where, "exec", dont_inherit=True)
    except SyntaxError as error:
        magic = (error.text or "").lstrip().startswith(("%", "!"))
        hint = " An exported cell is plain Python: keep magics (% and !) in cells of their own." if magic else ""
        line = (error.lineno or 0) + 1  # the marker is line 1
        raise ExportError(f"{where}, {cell}: line {line}: {error.msg}.{hint}") from error
    defined_here = set()
    for node in ast.walk(tree):
        if getattr(node, "module", None) == "__future__":
            raise ExportError(f"{where}, {cell}: 'from __future__' must open a file, and a cell cannot: leave it out.")
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            if alias.name == "*":
                raise ExportError(f"{where}, {cell}: 'import *' hides where names come from: import them by name.")
            if alias.name == "previous_chapters":
                raise ExportError(f"{where}, {cell}: write 'from previous_chapters import NAME' instead of "
                                  "'import previous_chapters', which means another module in each chapter.")
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name in defined_here:
                raise ExportError(f"{where}, {cell}: {node.name!r} is defined twice in this cell.")
            defined_here.add(node.name)
    symbols = symtable.symtable(cell.source, where, "exec").get_symbols()
    return [(s.get_name(), s.is_imported()) for s in symbols
            if s.is_assigned() or s.is_imported() or s.is_namespace()]


def _global_names(source: str, where: str) -> set[str]:
    """The names that this source reads from the module's scope, functions and classes included."""
    found: set[str] = set()

    def visit(table: symtable.SymbolTable, top: bool) -> None:
        for symbol in table.get_symbols():
            bound = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
            if symbol.is_referenced() and (symbol.is_global() or (top and not bound)):
                found.add(symbol.get_name())
        for child in table.get_children():
            visit(child, False)

    visit(symtable.symtable(source, where, "exec"), True)
    return found


def _relative_imports(source: str) -> str:
    """``previous_chapters`` is the notebook's neighbour; in the module it is named as such."""
    return re.sub(r"^(\s*)from previous_chapters import", r"\1from .previous_chapters import", source, flags=re.M)
