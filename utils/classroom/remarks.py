"""What a program can notice in a student's code, for a person to judge: remarks change no points."""

from __future__ import annotations

import ast
import re
import textwrap

from .submissions import Step

RISKY = {
    "get_ipython": "uses get_ipython", "ctypes": "uses ctypes", "gc": "uses gc", "_getframe": "uses sys._getframe",
    "currentframe": "uses inspect.currentframe", "f_back": "walks frames", "f_globals": "walks frames",
    "f_locals": "walks frames", "settrace": "sets a trace function", "setprofile": "sets a trace function",
    "__builtins__": "touches __builtins__", "__globals__": "uses __globals__", "__closure__": "uses __closure__",
    "__code__": "uses __code__", "subprocess": "starts processes",
    "fork": "starts processes", "_exit": "calls os._exit", "kill": "sends signals", "socket": "uses sockets",
    "atexit": "uses atexit", "meta_path": "changes how modules are found",
    "importlib": "imports by name", "__import__": "imports by name", "resolve_name": "imports by name",
    "linecache": "reads the text of cells", "_current_frames": "walks frames", "tb_frame": "walks frames",
    "extract_stack": "walks frames", "format_stack": "walks frames", "walk_stack": "walks frames",
}
REACHED = {"sys.modules": "uses sys.modules", "sys.__dict__": "uses sys.__dict__", "inspect.stack": "walks frames",
           "inspect.trace": "walks frames"}
KNOWN = ("torch", "np", "numpy", "builtins", "math", "inspect", "sys", "F")  # modules under their usual names
METHODS = ("__eq__", "__ne__", "__bool__", "__torch_function__", "__array__")
ASSIGNED = r"""^(\s*)(?:\w[\w ,.\[\]'"]*=\s*)?"""
TIMED = re.compile(ASSIGNED + r"%%?(?:time|timeit|prun)\b(?:\s+-\w+(?:\s+\d+)?)*\s+(?=\S)")
MAGIC = re.compile(ASSIGNED + r"(?:%%?[\w!]|!|\?).*|^(\s*)[\w.%*]+\?\??\s*$")


def risky_code(steps: list[Step], forbidden: list[str]) -> list[str]:
    """Remarks for the teacher on code that could read or fool the checks, or that the assignment forbids.

    They change no points: a name alone proves nothing.
    """
    trees = [_tree(step.source) for step in steps if step.kind in ("own", "solution")]
    known = [tree for tree in trees if tree]
    whole = ast.Module([node for tree in known for node in tree.body], [])  # one cell may use another's imports
    unknown = {"has a cell that is no plain Python: not examined"} if len(known) < len(trees) else set()
    return sorted(_risks(whole) | _forbidden(whole, forbidden) | unknown)


def _tree(source: str) -> ast.Module | None:
    """The syntax tree of a cell: as it stands, or else without what only IPython understands."""
    for text in (source, _without_magics(source)):
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _without_magics(source: str) -> str:
    """A cell with ``pass`` for magics, commands and questions. Code that a magic takes the time of stays."""
    lines = [TIMED.sub(r"\1", line) for line in textwrap.dedent(source).split("\n")]
    return "\n".join(MAGIC.sub(r"\1\2pass", line) for line in lines)


def _risks(tree: ast.AST) -> set[str]:
    found, modules, names, bases = set(), {}, {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(alias.asname or alias.name.split(".")[0]): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
            found |= {REACHED.get(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Attribute):
            bases.add(node.value)
    names |= modules
    for node in ast.walk(tree):
        found |= {RISKY[name] for name in _names(node) if name in RISKY}
        if isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store | ast.Del) and _root(node) in {*modules, *KNOWN}:
                found.add(f"assigns to {ast.unparse(node)}")
            found.add(REACHED.get(f"{_last(node.value, names)}.{node.attr}"))
        if _last(node, names) == "sys" and node not in bases and isinstance(node.ctx, ast.Load):
            found.add("hands sys on")  # to vars or getattr, for instance
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name, at = node.func.id, _root(node.args[0]) if node.args else ""
            if name in ("exec", "eval") or (name in ("setattr", "delattr") and at in {*modules, *KNOWN}):
                found.add(f"calls {name}")
        if isinstance(node, ast.FunctionDef) and node.name in METHODS:
            found.add(f"defines {node.name}")
    return found - {None}


def _names(node: ast.AST) -> list[str]:
    """The names that a node of a syntax tree reads, sets or imports."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        return [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
    return []


def _last(node: ast.AST, names: dict[str, str]) -> str:
    """The last part of a dotted name, as it was called before an ``as``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _forbidden(tree: ast.AST, forbidden: list[str]) -> set[str]:
    """Which forbidden dotted names a cell imports, or reaches through what it imports."""
    known = {"torch": "torch", "np": "numpy", "F": "torch.nn.functional", "nn": "torch.nn"}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            used |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _root(node):
            root, _, rest = ast.unparse(node).partition(".")
            used.add(f"{known.get(root, root)}.{rest}")
        elif isinstance(node, ast.Name):
            used.add(known.get(node.id, node.id))
    return {f"uses {name}, which the assignment forbids" for name in forbidden
            if any(one == name or one.startswith(name + ".") for one in used)}
