"""Diagrams drawn: boxes by role, arrows with shapes, a legend; several side by side show where they differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from ..plots import GREY
from .layout import BOLD, FILLS, LINE, PAD, ROUND, SMALL, DiagramLayout, NodePlace, Wire, box_lines, line_width, role
from .trace import Diagram, Node, only_here, paths

NOT_BOXES = ("input", "output", "sum", "product")


class _Pen:
    """Draws layouts on axes whose unit is an inch."""

    def __init__(self, axes, marked: Collection[Node]):
        self.axes, self.marked = axes, marked

    def draw(self, layout: DiagramLayout, x: float, y: float) -> None:
        """A layout with its column 0 at ``x`` and its lower edge at ``y``."""
        for place in layout.places.values():
            self._place(place, x, y)
        for wire in layout.wires:
            self._wire(layout, wire, x, y)
        for place, text in layout.above.items():
            self._text(x + place.x + 0.05, y + place.top + 0.045, text, SMALL, color=GREY)

    def _place(self, place: NodePlace, x: float, y: float) -> None:
        node, left, low = place.node, x + place.x - place.left, y + place.y
        if node.kind == "input" and place.height:
            self._text(x + place.x, low, node.name, BOLD, bold=True, ha="center")
        elif node.kind in ("sum", "product"):
            self._sign(node, x + place.x, low + ROUND)
        elif place.inner is not None:
            self._box(node, left, low, place.left + place.right, place.height, frame=True)
            words = box_lines(node, place.right - 2 * PAD)
            self._words(words, x + place.x + PAD, low + place.height - 0.6 * PAD, "left")
            self.draw(place.inner, x + place.x, low)
            for end in (p for p in place.inner.places.values() if p.node.kind == "output"):
                self._line([x + place.x + end.x] * 2, [low + end.y, low + place.height], linewidth=1.1, zorder=2.5)
        elif node.kind not in ("input", "output"):
            self._box(node, left, low, place.left + place.right, place.height)
            self._words(box_lines(node), x + place.x, low + place.height - 0.5 * PAD, "center")

    def _sign(self, node: Node, x: float, y: float) -> None:
        self.axes.add_patch(Circle((x, y), ROUND, facecolor="white", edgecolor="black", linewidth=1.3, zorder=3))
        upright, slanted = (((1, 0), (0, 1)), 0.6 * ROUND), (((1, 1), (1, -1)), 0.42 * ROUND)
        strokes, r = upright if node.kind == "sum" else slanted
        for a, b in strokes:
            self._line([x - a * r, x + a * r], [y - b * r, y + b * r], linewidth=1.3, zorder=4)

    def _line(self, xs: list[float], ys: list[float], **options) -> None:
        self.axes.plot(xs, ys, color="black", linestyle="-", **options)

    def _box(self, node: Node, x: float, y: float, width: float, height: float, frame: bool = False) -> None:
        fill, edge = ("#FAFAFA", GREY) if frame else FILLS[role(node)]
        other = node in self.marked
        self.axes.add_patch(FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.05", facecolor=fill, linestyle="-",
            edgecolor="black" if other else edge, linewidth=2.4 if other else 1.0, zorder=1 if frame else 2))

    def _words(self, lines: list[tuple[str, float, bool]], x: float, y: float, ha: str) -> None:
        for text, size, bold in lines:
            y -= LINE[size]
            self._text(x, y + 0.22 * LINE[size], text, size, bold=bold, ha=ha)

    def _text(self, x, y, text, size, bold=False, ha="left", color="black") -> None:
        self.axes.text(x, y, text, fontsize=size, fontweight="bold" if bold else "normal", ha=ha, va="baseline",
                       color=color, zorder=5)

    def _wire(self, layout: DiagramLayout, wire: Wire, x: float, y: float) -> None:
        points = [(x + a, y + b) for a, b in layout.points(wire)]
        inside = wire.target.inner is not None or (not layout.outermost and wire.target.node.kind == "output")
        if layout.outermost and wire.target.node.kind == "output":
            points[-1] = points[-1][0], points[-1][1] + 0.12
        self.axes.add_patch(FancyArrowPatch(
            path=Path(points), arrowstyle="-" if inside else "-|>", mutation_scale=7, color="black", linewidth=1.1,
            shrinkA=0, shrinkB=0, joinstyle="round", zorder=2.5, linestyle="-"))
        several = sum(other.source is wire.source for other in layout.wires) > 1
        if several and wire.way in ("out", "lane", "in"):
            self.axes.plot(*points[1], marker="o", markersize=3, color="black", zorder=4)
        for number, text in enumerate(reversed(wire.label)):
            left = layout._on_left(wire)
            self._text(points[-1][0] + (-0.05 if left else 0.05), points[-1][1] - 0.11 - LINE[SMALL]
                       * (len(wire.label) - 1) + LINE[SMALL] * number - 0.03, text, SMALL,
                       ha="right" if left else "left", color=GREY)


def _legend(diagrams: Sequence[Diagram], marked: Collection[Node], width: float) -> list[list[tuple[str, str]]]:
    """What the colours and signs stand for, those that occur, in rows that fit the width: (key, words)."""
    boxes = [node for diagram in diagrams for _, node in paths(diagram) if node.inside is None]
    kinds, roles = {node.kind for node in boxes}, {role(node) for node in boxes if node.kind not in NOT_BOXES}
    items = [(name, name) for name in FILLS if name in roles]
    items += [(kind, words) for kind, words in (("sum", "added"), ("product", "multiplied")) if kind in kinds]
    items += [("marked", "only on this side")] if marked else []
    rows: list[list[tuple[str, str]]] = [[]]
    for item in items:
        if rows[-1] and sum(0.4 + line_width(words, SMALL) for _, words in [*rows[-1], item]) > width + 0.1:
            rows.append([])
        rows[-1].append(item)
    return rows


def _draw_legend(pen: _Pen, rows: list[list[tuple[str, str]]], y: float) -> None:
    for number, row in enumerate(rows):
        x, low = 0.0, y - 0.2 * number
        for key, words in row:
            if key in ("sum", "product"):
                pen._sign(Node(key, key), x + 0.11, low + 0.045)
            else:
                fill, edge = FILLS.get(key, ("#FFFFFF", "#000000"))
                pen.axes.add_patch(FancyBboxPatch(
                    (x, low - 0.02), 0.22, 0.13, boxstyle="round,pad=0,rounding_size=0.03", facecolor=fill,
                    edgecolor=edge, linewidth=2.4 if key == "marked" else 1.0, linestyle="-"))
            pen._text(x + 0.28, low, words, SMALL)
            x += 0.4 + line_width(words, SMALL)


def draw(diagrams: Mapping[str, Diagram], title: str = "") -> Figure:
    """Diagrams side by side, each below its name; a thick frame for what only one of them has."""
    layouts = {name: DiagramLayout(diagram) for name, diagram in diagrams.items()}
    marked = only_here(list(diagrams.values())) if len(diagrams) > 1 else set()
    width = sum(layout.left + layout.right + 0.2 for layout in layouts.values()) - 0.2
    width = max(width, line_width(title, 11), 2.4)
    rows = _legend(list(diagrams.values()), marked, width)
    low, tallest = 0.2 * len(rows) + 0.12, max(layout.height for layout in layouts.values())
    height = low + tallest + (0.24 if len(diagrams) > 1 else 0.0) + (0.28 if title else 0.0)
    pen, x = _Pen(_sheet(width, height), marked), 0.0
    for name, layout in layouts.items():
        pen.draw(layout, x + layout.left, low)
        pen._text(x, low + tallest + 0.08, name, BOLD, bold=True)
        x += layout.left + layout.right + 0.2
    _draw_legend(pen, rows, low - 0.26)
    pen.axes.text(0.0, height - 0.1, title, fontsize=11, va="center")
    return pen.axes.figure


def _sheet(width: float, height: float):
    """Axes without frame or ticks in a new figure, with a little room around them."""
    axes = Figure(figsize=(width + 0.16, height + 0.12)).add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.08, width + 0.08), ylim=(-0.06, height + 0.06))
    axes.set_axis_off()
    return axes
