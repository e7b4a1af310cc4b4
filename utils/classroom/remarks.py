"""What a program can notice in a student's code, for a person to judge: remarks change no points."""

from __future__ import annotations

import ast

from .submissions import Step

RISKY = {
    "get_ipython": "uses get_ipython", "ctypes": "uses ctypes", "gc": "uses gc", "_getframe": "uses sys._getframe",
    "currentframe": "uses inspect.currentframe", "f_back": "walks frames", "f_globals": "walks frames",
    "f_locals": "walks frames", "settrace": "sets a trace function", "setprofile": "sets a trace function",
    "__builtins__": "touches __builtins__", "__globals__": "uses __globals__", "__closure__": "uses __closure__",
    "__code__": "uses __code__", "subprocess": "starts processes",
    "fork": "starts processes", "_exit": "calls os._exit", "kill": "sends signals", "socket": "uses sockets",
    "atexit": "uses atexit", "meta_path": "changes how modules are found",
    "importlib": "imports by name", "__import__": "imports by name",
}
KNOWN = ("torch", "np", "numpy", "builtins", "math", "inspect", "sys", "F")  # modules under their usual names
CALLS = ("setattr", "delattr", "exec", "eval")
METHODS = ("__eq__", "__ne__", "__bool__", "__torch_function__", "__array__")


def risky_code(answers: dict[str, str], steps: list[Step], forbidden: list[str]) -> list[str]:
    """Remarks for the teacher on code that could read or fool the checks, or that the assignment forbids.

    They change no points: a name alone proves nothing.
    """
    sources = [*answers.values(), *(step.source for step in steps if step.kind == "own")]
    found = set()
    for source in sources:
        try:
            tree = ast.parse(_without_magics(source))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        found |= _risks(tree) | _forbidden(tree, forbidden)
    return sorted(found)


def _without_magics(source: str) -> str:
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


def _risks(tree: ast.AST) -> set[str]:
    found, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(alias.asname or alias.name.split(".")[0]): alias.name for alias in node.names}
    for node in ast.walk(tree):
        found |= {RISKY[name] for name in _names(node) if name in RISKY}
        if isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store | ast.Del) and _root(node) in {*modules, *KNOWN}:
                found.add(f"assigns to {ast.unparse(node)}")
            if ast.unparse(node) == "sys.modules":
                found.add("uses sys.modules")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.add(f"calls {node.func.id}")
        if isinstance(node, ast.FunctionDef) and node.name in METHODS:
            found.add(f"defines {node.name}")
    return found


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
    return []


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
