"""Diagrams of modules, computed from one run of them; nothing is placed by hand.

``record`` runs a module once on an example and notes what happened (``trace``); ``DiagramLayout`` finds places for it
(``layout``), ``draw`` draws it (``drawing``) and ``describe_diagram`` says it in words (``words``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..plots import show
from .drawing import draw
from .trace import Diagram, Edge, Node, record
from .words import describe_diagram, describe_diagrams

__all__ = ["Diagram", "Edge", "Node", "describe_diagram", "draw", "plot_module", "plot_modules", "record"]


def plot_module(module: nn.Module, *inputs, title: str, depth: int = 1, look_into: Collection[str] = (),
                **options) -> None:
    """Draw what happens when ``module(*inputs, **options)`` runs: see ``record``."""
    diagram = record(module, *inputs, depth=depth, look_into=look_into, **options)
    show(draw({"": diagram}, title), f"Diagram. {describe_diagram(diagram)}")


def plot_modules(calls: Mapping[str, tuple], *, title: str, depth: int = 1,
                 look_into: Collection[str] = ()) -> None:
    """Draw modules side by side, {name: (module, *inputs)}; what only one of them has gets a thick frame."""
    diagrams = {name: record(module, *inputs, depth=depth, look_into=look_into)
                for name, (module, *inputs) in calls.items()}
    show(draw(diagrams, title), f"{len(diagrams)} diagrams. {describe_diagrams(diagrams)}")
