"""What happened in one call of a module: which parts ran, what was done between them, with which shapes.

Hooks see the modules; a mode that sees every torch function finds the additions, products and functions between
them. The example may lie on the ``meta`` device, where models have shapes and no contents.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(eq=False)
class Node:
    """One thing that happened: a module that ran, a sum, a product, a function, or weights used as they are."""

    kind: str                         # "input", "output", "module", "weight", "sum", "product" or "function"
    name: str                         # as the module above calls it: "norm1"
    class_name: str = ""
    parameters: int = 0               # of one, each once
    shared: str = ""                  # the box below that has the same weights
    frozen: bool = False              # none of its weights may be trained
    times: int = 1                    # so many alike, one after the other
    made: tuple[int, ...] | None = None  # the shape of what it made, if that is one tensor
    inside: Diagram | None = None     # what happened in it, if the depth reaches so far
    module: nn.Module | None = None
    moves_only: bool = False          # it only cut, turned or copied: not drawn


@dataclass(eq=False)
class Edge:
    """A tensor on its way: where from, where to, its shape when it arrives, and the argument it becomes."""

    source: Node
    target: Node
    shape: tuple[int, ...]
    name: str = ""


@dataclass(eq=False)
class Diagram:
    """What happened in one call of a module: nodes in the order in which they ran, and the tensors between."""

    name: str
    class_name: str
    parameters: int
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def into(self, node: Node) -> list[Edge]:
        """The tensors that a node was given."""
        return [edge for edge in self.edges if edge.target is node]

    def out_of(self, node: Node) -> list[Edge]:
        """The tensors that a node gave to others."""
        return [edge for edge in self.edges if edge.source is node]

    def connect(self, source: Node, target: Node, shape: tuple[int, ...], name: str = "") -> None:
        """Add a tensor from ``source`` to ``target``, once."""
        if all((e.source, e.target, e.shape, e.name) != (source, target, shape, name) for e in self.edges):
            self.edges.append(Edge(source, target, shape, name))

    def remove(self, node: Node) -> None:
        """Take a node out, with its edges."""
        self.nodes.remove(node)
        self.edges = [edge for edge in self.edges if node not in (edge.source, edge.target)]


def record(module: nn.Module, *inputs, depth: int = 1, look_into: Collection[str] = (), **options) -> Diagram:
    """Run ``module(*inputs, **options)`` once, without gradients, and return what happened.

    ``depth`` 1 shows the modules in it as boxes, 2 also what is inside those, and so on. A Python function that
    a module calls is one box, unless ``look_into`` has its name. The module's weights and mode and the random
    numbers of the caller stay as they are; buffers, such as running means, change as in any call.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; it must be at least 1: the modules directly inside this one.")
    recorder = _Recorder(depth, frozenset(look_into))
    gpus = {tensor.device for tensor in [*module.parameters(), *_tensors((inputs, options))] if tensor.is_cuda}
    hooks = [hook for part in module.modules() for hook in (
        part.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True),
        part.register_forward_hook(recorder.leave, with_kwargs=True))]
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=gpus), recorder:
            module(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.finished


# Functions that change where numbers lie and not what they are.
MOVES = frozenset([
    "view", "reshape", "transpose", "permute", "unflatten", "flatten", "squeeze", "unsqueeze", "expand",
    "expand_as", "view_as", "contiguous", "chunk", "split", "tensor_split", "unbind", "getitem", "narrow",
    "select", "T", "mT", "movedim", "swapaxes", "to", "type", "float", "clone", "detach", "data",
    "broadcast_to", "alias"])
SPOKEN = {"radd": "add", "iadd": "add", "rmul": "mul", "imul": "mul", "multiply": "mul", "truediv": "div",
          "itruediv": "div", "rmatmul": "matmul", "bmm": "matmul", "concat": "cat"}
SIGNS = {"add": "+", "sub": "−", "mul": "×", "div": "÷"}
WORDS = {"matmul": "matrix product", "cat": "put side by side"}
MODULE_FILE, TORCH = inspect.getfile(nn.Module), os.path.dirname(torch.__file__)


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; one made in inference mode does not count, and here stays as it is."""
    return 0 if tensor.is_inference() else tensor._version


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Call:
    """One call of a module while it runs. ``diagram`` is None where the depth ends: then it is a closed box."""

    def __init__(self, module: nn.Module, node: Node | None, opened: bool):
        self.module, self.node, self.operations, self.calls = module, node, 0, 0
        name = node.name if node else ""
        self.diagram = Diagram(name, type(module).__name__, _count(module)) if opened else None
        self.origin: dict[int, Node] = {}       # which node made the tensor of this id
        self.groups: dict[tuple, Node] = {}     # functions, by their Python frame
        self.weights = {id(p): (name, p) for name, p in module.named_parameters()} if opened else {}
        self.parts = {id(part): name for name, part in module.named_modules()} if opened else {}
        self.names: dict[int, str] = {}         # of tensors, as the arguments of functions

    def add(self, node: Node) -> Node:
        self.diagram.nodes.append(node)
        return node


class _Recorder(TorchFunctionMode):
    """Sees modules by their hooks and everything between them as a mode; builds the diagram as it goes."""

    def __init__(self, depth: int, look_into: frozenset[str]):
        super().__init__()
        self.depth, self.look_into, self.calls, self.kept, self.finished = depth, look_into, [], [], None
        self.owners: dict[int, str] = {}  # which box first had a parameter

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a module runs."""
        self.kept.append((args, kwargs))  # so that no id is used twice
        parent = self.calls[-1] if self.calls else None
        if parent and parent.diagram is None:
            self.calls.append(_Call(module, None, opened=False))
            return
        opened = parent is None or (len(self.calls) < self.depth and next(module.children(), None) is not None)
        node = self._function(parent, outside=True) if parent else None
        if node is not None and node.module is module:  # called by a function of its own
            self.calls.append(_Call(module, node, opened=False))
            return
        if parent:
            parent.calls += 1
            node = self._box(parent, module, _tensors((args, kwargs)), opened)
        self.calls.append(_Call(module, node, opened))
        if opened:
            self._arrive(module, args, kwargs)

    def _box(self, parent: _Call, module: nn.Module, given: list[Tensor], opened: bool) -> Node:
        """A node for a module that begins to run."""
        name = parent.parts.get(id(module), "")
        node = parent.add(Node("module", name, type(module).__name__, _count(module), module=module))
        for tensor in given:
            self._use(len(self.calls) - 1, tensor, node)
        if not opened:
            self._own(node, list(module.parameters()))
        return node

    def _arrive(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """An input node for each tensor that a module is called with, under its argument's name."""
        call = self.calls[-1]
        for name, value in inspect.signature(module.forward).bind(*args, **kwargs).arguments.items():
            for tensor in _tensors(value):
                if id(tensor) not in call.origin:
                    call.origin[id(tensor)] = call.add(Node("input", name, made=tuple(tensor.shape)))

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """After a module has run."""
        self.kept.append(output)
        call, made = self.calls.pop(), _tensors(output)
        parent = self.calls[-1] if self.calls else None
        if parent and parent.diagram is None:
            return
        given = {id(tensor) for tensor in _tensors((args, kwargs))}
        if parent and not call.operations and all(id(tensor) in given for tensor in made):
            if call.node.kind == "module":
                parent.diagram.remove(call.node)  # it handed on what it was given, such as nn.Identity
            return
        if call.diagram is not None:
            self._close(call, made)
        for tensor in made if parent else []:
            parent.origin[id(tensor)] = call.node
        if parent and call.node.kind == "module" and len(made) == 1:
            call.node.made = tuple(made[0].shape)

    def _close(self, call: _Call, made: list[Tensor]) -> None:
        end = call.add(Node("output", ""))
        self.calls.append(call)
        for tensor in made:
            self._use(len(self.calls) - 1, tensor, end)
        self.calls.pop()
        _tidy(call.diagram)
        if call.node is None:
            self.finished = call.diagram
        else:
            call.node.inside = call.diagram

    def _source(self, level: int, tensor: Tensor) -> Node | Tensor | None:
        """Who made this tensor: a node, a parameter of the module, or None for a constant."""
        call = self.calls[level]
        found = call.origin.get(id(tensor))
        if found is None and id(tensor) in call.weights:
            return call.weights[id(tensor)][1]
        if found is None and level and self.calls[level - 1].diagram is not None and call.node is not None:
            outer = self._source(level - 1, tensor)
            if isinstance(outer, Node):  # it did not come as an argument
                self.calls[level - 1].diagram.connect(outer, call.node, tuple(tensor.shape))
                found = call.origin[id(tensor)] = Node("input", "")
                call.diagram.nodes.insert(0, found)
        return found

    def _use(self, level: int, tensor: Tensor, target: Node, name: str = "") -> None:
        """Note that ``target`` was given this tensor."""
        call, source = self.calls[level], self._source(level, tensor)
        if isinstance(source, Tensor):
            source = self._weight(call, source)
        if source is not None and source is not target:
            call.diagram.connect(source, target, tuple(tensor.shape), name)

    def _weight(self, call: _Call, parameter: Tensor) -> Node:
        """A box for weights that are used as they are, such as a table of positions."""
        path, _, last = call.weights[id(parameter)][0].rpartition(".")
        owner = call.module.get_submodule(path) if path else None
        node = Node("weight", path or last, type(owner).__name__ if path else "weights", parameter.numel())
        call.diagram.nodes.insert(sum(other.kind == "input" for other in call.diagram.nodes), node)
        self._own(node, [parameter])
        call.origin[id(parameter)] = node
        return node

    def _own(self, node: Node, parameters: list[Tensor]) -> None:
        """Say whose weights these are, if an earlier box has them all, and whether they can be trained."""
        ids = [id(parameter) for parameter in parameters]
        if ids and all(i in self.owners for i in ids):
            node.shared = self.owners[ids[0]]
        for i in ids:
            self.owners.setdefault(i, node.name)
        node.frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    # ------------------------------------------------------------ between the modules

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = _tensors((args, kwargs))
        before = [_version(tensor) for tensor in given]
        result = func(*args, **(kwargs or {}))
        made, name = _tensors(result), getattr(func, "__name__", "")
        spoken = (func.__self__.__name__ if name == "__get__" else name).strip("_")
        same = all(any(m is g for g in given) for m in made)
        if self.calls and made and (not same or before != [_version(tensor) for tensor in given]):
            for call in self.calls:
                call.operations += 1
            if self.calls[-1].diagram is not None:
                self.kept.append((args, kwargs, result))
                self._happened(SPOKEN.get(spoken, spoken), args, given, made)
        return result

    def _happened(self, name: str, args: tuple, given: list[Tensor], made: list[Tensor]) -> None:
        level, call = len(self.calls) - 1, self.calls[-1]
        sources = [self._source(level, tensor) for tensor in given]
        if all(source is None for source in sources):
            return  # a constant
        group = self._function(call)
        if name in MOVES and len(made) == 1 and id(given[0]) in call.names:
            call.names.setdefault(id(made[0]), call.names[id(given[0])])
        if name in MOVES and not any(isinstance(source, Node) for source in sources):
            for tensor in made if id(given[0]) in call.weights else []:  # still the same weights, cut or turned
                call.weights[id(tensor)] = call.weights[id(given[0])]
            return
        if group is not None:
            node = group
            node.moves_only &= name in MOVES
        elif name in ("addmm", "addcmul", "baddbmm"):
            node = self._fused(name, given)
            given = []
        else:
            node = call.add(self._operation(name, args, sources))
            node.made = tuple(made[0].shape) if len(made) == 1 else None
        for tensor in given:
            self._give(level, tensor, node)
        for tensor in made:
            call.origin[id(tensor)] = node

    def _give(self, level: int, tensor: Tensor, node: Node) -> None:
        """Connect a tensor to a node; weights become part of a function, and boxes of their own beside a sum."""
        call, source = self.calls[level], self._source(level, tensor)
        if isinstance(source, Tensor) and node.kind == "function":
            if node.module is None:
                self._has(node, source, call.weights[id(source)][0])
            return
        self._use(level, tensor, node, call.names.get(id(tensor), ""))

    def _has(self, node: Node, weights: Tensor, name: str) -> None:
        """Note that a function uses these weights: one tensor gives it its name, several do not."""
        if not node.parameters:
            node.name, node.class_name = name, node.name
        elif node.class_name:
            node.name, node.class_name = node.class_name, ""
        node.parameters += weights.numel()
        self._own(node, [weights])

    def _operation(self, name: str, args: tuple, sources: list) -> Node:
        """The node for a torch function that a module calls itself."""
        parts = [source for source in sources if source is not None]
        if name in MOVES:
            return Node("function", name, moves_only=True)
        if name in ("add", "mul") and len(sources) == len(parts) == 2:
            return Node("sum" if name == "add" else "product", SIGNS[name])
        numbers = [value for value in args if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if name in SIGNS and len(parts) == 1:
            return Node("function", f"{SIGNS[name]} {numbers[0]:.3g}" if numbers else f"{SIGNS[name]} constant")
        return Node("function", WORDS.get(name, name))

    def _fused(self, name: str, given: list[Tensor]) -> Node:
        """a + b @ c and a + b * c in one function: a product, then a sum."""
        level, call = len(self.calls) - 1, self.calls[-1]
        first, *factors = given
        product = call.add(Node("product", "×") if name == "addcmul" else Node("function", WORDS["matmul"]))
        total = call.add(Node("sum", "+"))
        for tensor in factors:
            self._give(level, tensor, product)
        total.made = product.made = tuple(first.shape)
        call.diagram.connect(product, total, product.made)
        self._use(level, first, total)
        return total

    def _function(self, call: _Call, outside: bool = False) -> Node | None:
        """The node of the Python function, not the module's own, in which torch was called; None if in none.

        With ``outside``, the function in which the module that has just begun was called.
        """
        for frame in _frames(outside):
            owner, code = frame.f_locals.get("self"), frame.f_code
            if owner is call.module or code.co_name.startswith("<") or code.co_filename.startswith(TORCH):
                continue
            for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
                for tensor in _tensors(frame.f_locals.get(name)):
                    call.names.setdefault(id(tensor), name)
            if code.co_name in self.look_into:
                continue
            key = (frame, call.calls)  # a frame that calls modules is a new function after each
            if key not in call.groups:
                call.groups[key] = call.add(self._named(call, code.co_name, owner))
            return call.groups[key]
        return None

    def _named(self, call: _Call, name: str, owner) -> Node:
        if not isinstance(owner, nn.Module):
            return Node("function", name, moves_only=True)
        path = call.parts.get(id(owner), "")
        name = f"{path}.{name}" if path else name
        node = Node("function", name, type(owner).__name__, _count(owner), module=owner, moves_only=True)
        self._own(node, list(owner.parameters()))
        return node


def _frames(outside: bool) -> list:
    """The Python frames of a module's helpers, the outermost first, without that of its ``forward``."""
    frames, frame = [], sys._getframe()
    while frame.f_code.co_filename == __file__ or (outside and frame.f_code.co_filename == MODULE_FILE):
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename != MODULE_FILE:
        frames.append(frame)
        frame = frame.f_back
    return frames[-2::-1]


# ---------------------------------------------------------------- made readable


def _tidy(diagram: Diagram) -> None:
    """Take out what only moves numbers or leads nowhere; fold what repeats."""
    for node in [node for node in diagram.nodes if node.moves_only]:
        arriving, leaving = diagram.into(node), diagram.out_of(node)
        diagram.remove(node)
        for edge in leaving:
            for source in {edge.source: None for edge in arriving}:
                diagram.connect(source, edge.target, edge.shape, edge.name)
    for node in reversed(list(diagram.nodes)):
        if node.kind not in ("module", "output", "input") and not diagram.out_of(node):
            diagram.remove(node)
    _drop_unused_inputs(diagram)
    for node in list(diagram.nodes):
        if node in diagram.nodes and node.kind == "module":
            _fold(diagram, node)


def _drop_unused_inputs(diagram: Diagram) -> None:
    inputs = [node for node in diagram.nodes if node.kind == "input"]
    unused = [node for node in inputs if not diagram.out_of(node)]
    for node in unused if len(unused) < len(inputs) else []:
        diagram.remove(node)


def _signature(diagram: Diagram, node: Node) -> tuple:
    inside = node.inside and tuple(_signature(node.inside, part) for part in node.inside.nodes)
    shapes = tuple(edge.shape for edge in diagram.into(node)), tuple({edge.shape for edge in diagram.out_of(node)})
    name = node.name if node.kind != "module" else ""
    return node.kind, name, node.class_name, node.parameters, node.times, bool(node.shared), shapes, inside


def _fold(diagram: Diagram, first: Node) -> None:
    """Make one node with ``times`` of equal modules that follow one another, each with weights of its own."""
    run = [first]
    while True:
        leaving = diagram.out_of(run[-1])
        following = {id(edge.target): edge.target for edge in leaving}
        after = next(iter(following.values()), None)
        if (len(following) != 1 or any(edge.source is not run[-1] for edge in diagram.into(after))
                or any(after.module is node.module for node in run)
                or _signature(diagram, after) != _signature(diagram, first)):
            break
        run.append(after)
    if len(run) > 1:
        shapes = [(edge.target, edge.shape, edge.name) for edge in diagram.out_of(run[-1])]
        for node in run[1:]:
            diagram.remove(node)
        first.times, first.name = len(run), first.name.rpartition(".")[0] or first.name
        diagram.edges = [edge for edge in diagram.edges if edge.source is not first]
        for target, shape, name in shapes:
            diagram.connect(first, target, shape, name)


def paths(diagram: Diagram, path: str = "") -> list[tuple[tuple[str, str, str], Node]]:
    """All nodes of a diagram, those inside others too, each with what it is: (kind, path, class)."""
    found = []
    for node in diagram.nodes:
        here = f"{path}.{node.name}".lstrip(".")
        found.append(((node.kind, here, node.class_name), node))
        found += paths(node.inside, here) if node.inside is not None else []
    return found


def only_here(diagrams: Sequence[Diagram]) -> set[Node]:
    """The nodes that not all diagrams have under the same name and of the same class."""
    known = [{key for key, _ in paths(diagram)} for diagram in diagrams]
    return {node for diagram in diagrams for key, node in paths(diagram)
            if node.kind not in ("input", "output") and not all(key in keys for keys in known)}
