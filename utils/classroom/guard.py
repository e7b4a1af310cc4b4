"""What stands inside a student's kernel while it is graded: it notices when what the checks rely on is replaced.

``setup_code`` is run before any code of the student. Then every check is sent as ``check_code`` makes it and
counts as passed only if its last line was reached, which the guard reports signed with a key of its own.

What this cannot stop: student code runs in the same process as the checks. Code that walks the frames of its
callers, searches the heap or puts a function back after its first use can read a check while it runs, or fool
it. Most such code has to name what it uses (``sys._getframe``, ``gc``, ``ctypes``, assignments to modules), and
grading puts it under the teacher's eyes as a remark. Names can be hidden; only reading the code finds those.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import hmac
import importlib
import json
import linecache
import sys
import types
from pathlib import Path

NAMES = {  # what checks use: replaced means not to be trusted
    "math": ("isclose", "isfinite", "isnan", "exp", "log", "sqrt", "fabs"),
    "inspect": ("signature", "getsource", "isfunction", "isclass", "getmembers"),
    "torch": ("equal", "allclose", "isclose", "all", "any", "eq", "ne", "abs", "is_tensor", "tensor", "isnan",
              "isfinite", "isinf", "where", "softmax", "matmul", "arange", "zeros_like", "Tensor"),
    "torch.testing": ("assert_close",),
    "torch.nn.functional": ("softmax", "log_softmax", "cross_entropy", "scaled_dot_product_attention"),
    "numpy": ("array_equal", "allclose", "isclose", "all", "any", "equal", "abs", "asarray", "array", "ndarray"),
    "numpy.testing": ("assert_allclose", "assert_array_equal", "assert_equal", "assert_almost_equal"),
}
COMPARING = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__")
TENSOR = (*COMPARING, "__float__", "__sub__", "__rsub__", "__getitem__", "all", "any", "abs", "equal", "allclose",
          "isclose", "item", "max", "min", "sum", "mean", "tolist", "shape", "dtype", "detach", "clone", "numpy",
          "isnan", "isfinite")
SHELL = ("run_cell", "run_cell_async", "_run_cell", "run_code", "run_ast_nodes", "transform_cell", "showtraceback",
         "transform_ast", "user_expressions")
KERNEL = ("do_execute", "execute_request", "dispatch_shell", "finish_metadata", "init_metadata")
RULES = (*COMPARING, "__class__", "__getattribute__", "__instancecheck__", "__torch_function__",
         "__torch_dispatch__", "__array__", "__array_function__", "__array_ufunc__")
CHANGING = ("input", "exit", "quit", "_", "display", "get_ipython")  # builtins that IPython itself sets
BUILT_IN = (types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType,
            types.ClassMethodDescriptorType)


class Guard:
    """Keeps what was there before the student's code. ``allowed``: special methods that solutions may have."""

    def __init__(self, shell, key: str, modules: list[str], allowed: list[str]) -> None:
        self._shell, self._key, self._allowed = shell, key.encode(), set(allowed)
        self._sign, self._dump = hmac.new, json.dumps
        self._reached, self._fine, self._bad = "", set(), {}
        shell.user_ns.pop("exit", None)  # these end a kernel a moment later, in the middle of another cell
        shell.user_ns.pop("quit", None)
        self._first = dict(shell.user_ns)
        self._given: dict[str, tuple] = {}
        self._pristine = {name: _identity(value) for name, value in vars(builtins).items() if name not in CHANGING}
        self._modules = {}
        for name in modules:
            self._remember(name)
        self._machine = self._machinery()
        for name in [name for name, entry in linecache.cache.items() if len(entry) > 2 and key in "".join(entry[2])]:
            del linecache.cache[name]  # the first cell, which holds the key
        self._lines = set(linecache.cache)

    def _remember(self, name: str) -> None:
        try:
            module = importlib.import_module(name)
        except Exception:  # a module that this machine lacks: the check itself will say so
            return
        self._modules[name] = module
        wanted = NAMES.get(name) or [key for key, value in vars(module).items()
                                     if isinstance(value, types.FunctionType | type)]
        for key in wanted:
            if hasattr(module, key):
                value = getattr(module, key)
                self._pristine[f"{name}.{key}"] = _identity(value)
                methods = vars(value).items() if isinstance(value, type) and name not in NAMES else ()
                self._pristine |= {f"{name}.{key}.{part}": _identity(thing) for part, thing in methods
                                   if isinstance(thing, types.FunctionType)}
        if name == "torch":
            self._pristine |= {f"torch.Tensor.{key}": _identity(getattr(module.Tensor, key)) for key in TENSOR}

    def _machinery(self) -> dict[str, object]:
        """What runs a cell, as things that can be compared."""
        shell, kernel = self._shell, self._shell.kernel
        manager = shell.input_transformer_manager
        return {
            "IPython's run_cell": [_identity(getattr(type(shell), name, None)) for name in SHELL],
            "IPython's shell": sorted(set(SHELL) & set(vars(shell))),
            "IPython's compiler": (id(shell.compile), type(shell.compile)),
            "the kernel": [_identity(getattr(type(kernel), name, None)) for name in KERNEL],
            "the kernel's methods": sorted(set(KERNEL) & set(vars(kernel))),
            "the kernel's handlers": dict(kernel.shell_handlers),
            "IPython's AST transformers": list(shell.ast_transformers),
            "IPython's input transformers": [list(shell.input_transformers_post), list(manager.cleanup_transforms),
                                             list(manager.line_transforms), list(manager.token_transformers)],
            "IPython's handler of exceptions": shell.custom_exceptions,
            "the trace function": (sys.gettrace(), sys.getprofile()),
        }

    def given(self, names: list[str]) -> None:
        """Remember what a given cell has just imported or defined, under the names that checks use."""
        space = self._shell.user_ns
        self._given |= {name: _identity(space[name]) for name in names if name in space}

    def reached(self, token: str) -> None:
        """The last line of every check."""
        self._reached = token

    def report(self, challenge: str, names: list[str]) -> str:
        """JSON: what has changed, the token of the last check that ended, and a signature over both."""
        changed = self._changed(names)
        for name in set(linecache.cache) - self._lines:  # the text of a check that has run
            if "ipykernel" in name and challenge.startswith("after"):
                linecache.cache.pop(name, None)
        self._lines = set(linecache.cache)
        body = self._dump([challenge, changed, self._reached])
        return self._dump([body, self._sign(self._key, body.encode(), hashlib.sha256).hexdigest()])

    def _changed(self, names: list[str]) -> list[str]:
        found = []
        for name, before in self._pristine.items():
            if _identity(self._look_up(name)) != before:
                found.append(name)
        found += [name for name, module in self._modules.items() if sys.modules.get(name) is not module]
        machine = self._machinery()
        found += [name for name, before in self._machine.items() if machine[name] != before]
        space = self._shell.user_ns
        for name in names:
            if name in self._given:
                if _identity(space.get(name)) != self._given[name]:
                    found.append(name)
            elif hasattr(builtins, name) and name in space \
                    and space[name] is not self._first.get(name, getattr(builtins, name)):
                found.append(name)
        return sorted(set(found))

    def _look_up(self, name: str) -> object:
        if name in vars(builtins) or "." not in name:
            return vars(builtins).get(name)
        for module in sorted(self._modules, key=len, reverse=True):
            if name.startswith(module + "."):
                thing = self._modules[module]
                for part in name[len(module) + 1:].split("."):
                    thing = getattr(thing, part, None)
                return thing
        return None

    def plain(self, value, depth: int = 0):
        """``value`` itself, if comparing it means what it says; else ``AssertionError``."""
        kind = type(value)
        if kind not in self._fine:
            if self._own_rules(kind):
                raise AssertionError(f"This check got an object of a class {kind.__name__!r} with its own rules "
                                     f"for {self._bad[kind]}. Give back plain values, tensors or arrays.")
            self._fine.add(kind)
        if depth < 3 and kind in (list, tuple, dict, set):
            for part in list(value.values() if kind is dict else value)[:100]:
                self.plain(part, depth + 1)
        return value

    def _own_rules(self, kind: type) -> bool:
        for parent in type.mro(kind) if kind is not type else []:
            for name in RULES if not _from_a_library(parent) else ():
                rule = vars(parent).get(name)
                if rule is not None and not isinstance(rule, BUILT_IN) and name not in self._allowed \
                        and not _of_a_dataclass(parent, rule):
                    self._bad[kind] = name
                    return True
        return False


def _from_a_library(kind: type) -> bool:
    """Whether a class stands in its module under its name: not so those of a notebook, or with a borrowed name."""
    thing = sys.modules.get(kind.__module__) if kind.__module__ != "__main__" else None
    for part in kind.__qualname__.split("."):
        thing = getattr(thing, part, None)
    return thing is kind


def _of_a_dataclass(kind: type, rule: object) -> bool:
    """Whether ``rule`` is one that ``@dataclass`` wrote, which compares field by field."""
    return "__dataclass_params__" in vars(kind) and getattr(rule, "__code__", None) is not None \
        and rule.__code__.co_filename == "<string>"


def _identity(thing: object) -> tuple:
    """Something that is equal only for the same thing in the same state."""
    if isinstance(thing, types.FunctionType):
        return id(thing), id(thing.__code__), id(thing.__defaults__), id(thing.__kwdefaults__)
    return (id(thing),)


class _Plain(ast.NodeTransformer):
    """Sends what a check calls and compares through ``Guard.plain``; leaves the messages alone."""

    def __init__(self, guard: str) -> None:
        self.guard = guard

    def _wrap(self, node: ast.expr) -> ast.expr:
        return ast.Call(ast.Attribute(ast.Name(self.guard, ast.Load()), "plain", ast.Load()), [node], [])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return self._wrap(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        node.left, node.comparators = self._wrap(node.left), [self._wrap(part) for part in node.comparators]
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        node.test = self.visit(node.test)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        return node


def setup_code(guard: str, key: str, modules: list[str], allowed: list[str]) -> str:
    """The first cell of a graded kernel: a guard that is reached as a module of that name."""
    text = Path(__file__).read_text(encoding="utf-8")
    return (f"import sys as _s, types as _t\n_m = _t.ModuleType({guard!r})\nexec({text!r}, _m.__dict__)\n"
            f"_g = _m.Guard(get_ipython(), {key!r}, {modules!r}, {allowed!r})\n_s.modules[{guard!r}] = _g\n"
            "del _s, _t, _m, _g")


def check_code(source: str, guard: str, token: str) -> str:
    """A check as it is sent: calls and comparisons guarded, a last line that says it was reached."""
    last = f"{guard}.reached({token!r})"
    try:
        tree = _Plain(guard).visit(ast.parse(source))
        code = ast.unparse(ast.fix_missing_locations(tree))
    except (SyntaxError, ValueError):
        code = source
    return f"import {guard}\n{code}\n{last}"


def given_call(guard: str, names: list[str]) -> str:
    """The expression that has the guard remember what a given cell has just defined."""
    return f"__import__('sys').modules[{guard!r}].given({names!r})"


def report_call(guard: str, challenge: str, names: list[str]) -> str:
    """The expression whose value ``read_report`` understands."""
    return f"__import__('sys').modules[{guard!r}].report({challenge!r}, {names!r})"


def read_report(value: str, key: str, challenge: str) -> tuple[list[str], str] | None:
    """What has changed and the last token reached; None if the report is missing or not the guard's."""
    try:
        body, signature = json.loads(ast.literal_eval(value))
        good = hmac.new(key.encode(), body.encode(), hashlib.sha256).hexdigest()
        said, changed, reached = json.loads(body)
    except (ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError):
        return None
    if not hmac.compare_digest(good, str(signature)) or said != challenge:
        return None
    return [str(name)[:100] for name in changed], str(reached)
