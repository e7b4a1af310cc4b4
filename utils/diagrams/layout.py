"""Where each node of a diagram goes, in inches, from below upwards; nothing is placed by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from .trace import Diagram, Edge, Node

BOLD, PLAIN, SMALL = 8.5, 7.8, 7.2         # sizes of letters, in points
PAD, GAP, ROUND = 0.08, 0.16, 0.1          # inside a box, between columns, radius of a sum
LINE = {size: 1.17 * size / 72 for size in (BOLD, PLAIN, SMALL)}
WIDEST = 1.55                              # of the words in a box
ROLES = {  # who stands for what, in words of a class or of its name: the first that fits
    "normalisation": ("norm",), "attention": ("attention", "attn"), "table looked up": ("embedding", "table"),
    "MLP": ("mlp", "feed", "expert", "glu"), "matrix": ("linear", "proj", "lora", "matrix", "weights")}
FILLS = {  # fill and edge; black can be read on all, and in grey they go from light to dark
    "attention": ("#85B4D8", "#0072B2"), "MLP": ("#F0C3A2", "#B34F00"), "normalisation": ("#E4F3EC", "#007A59"),
    "table looked up": ("#DFB0CA", "#A04A7C"), "matrix": ("#D6D6D6", "#595959"),
    "no weights": ("#FFFFFF", "#595959"),
    "several parts": ("#A0A0A0", "#303030"), "other weights": ("#F3E3B0", "#7E5000")}


def role(node: Node) -> str:
    """What a box is there for: its colour, and its word in the legend."""
    if not node.parameters:
        return "attention" if node.kind == "function" and "attention" in node.name else "no weights"
    several = node.module is not None and next(node.module.children(), None) is not None
    return _known(node) or ("several parts" if several else "other weights")


def _known(node: Node) -> str:
    words = (f"{node.name.rpartition('.')[2]} {node.class_name}".lower()).replace("embeddings", "embedding")
    return next((name for name, keys in ROLES.items() if any(key in words for key in keys)), "")


def line_width(text: str, size: float, bold: bool = False) -> float:
    """The width of a line of text, in inches, with room for another font's."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return 1.04 * TextToPath().get_text_width_height_descent(text, font, ismath=False)[0] / 72


def box_lines(node: Node, widest: float = WIDEST) -> list[tuple[str, float, bool]]:
    """The words in a box: (text, size, bold)."""
    count = f"{node.parameters:,} weights" if node.parameters else ""
    if node.shared:
        count = f"weights of {node.shared}"
    elif node.times > 1 and count:
        count = f"each {count}"
    count += ", frozen" if node.frozen else ""
    kind = node.class_name if node.class_name != node.name else ""
    loud = node.kind != "function" or node.parameters > 0
    title = (node.name + (f" × {node.times}" if node.times > 1 else ""), BOLD if loud else PLAIN, loud)
    together = ", ".join(filter(None, (kind, count)))
    below = [together] if line_width(together, SMALL) <= widest else [kind, count]
    return [title, *((text, SMALL, False) for text in below if text)]


@dataclass(eq=False)
class NodePlace:
    """Where a node lies: its arrow's column and row, and how far it reaches from there."""

    node: Node
    row: int = 0
    column: int = 0
    left: float = 0.0
    right: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0      # of its lower edge
    inner: DiagramLayout | None = None

    @property
    def top(self) -> float:
        return self.y + self.height


@dataclass(eq=False)
class Wire:
    """The tensors from one node to another, drawn as one line."""

    source: NodePlace
    target: NodePlace
    edges: list[Edge]
    way: str = "straight"   # or "side", "out", "in", "lane": see DiagramLayout._route
    lane: int = 0
    port: float = 0.0       # where it meets a box, from the middle
    label: list[str] = field(default_factory=list)


class DiagramLayout:
    """Places for the nodes of one diagram, from below upwards: the straight way through it is column 0."""

    def __init__(self, diagram: Diagram, outermost: bool = True):
        self.diagram, self.outermost = diagram, outermost
        self.places = {node: self._measured(node) for node in diagram.nodes}
        self.wires = self._make_wires()
        self._rows()
        self.rows = 1 + max(place.row for place in self.places.values())
        self._columns()
        for wire in self.wires:
            self._route(wire)
        self._ports()
        self._labels()
        self._across()
        self._up()

    # ------------------------------------------------------------ sizes and rows

    def _measured(self, node: Node) -> NodePlace:
        place = NodePlace(node)
        if node.kind in ("sum", "product"):
            place.left = place.right = ROUND
            place.height = 2 * ROUND
        elif node.kind == "input" and self.outermost:
            place.left = place.right = line_width(node.name, BOLD, bold=True) / 2 + 0.02
            place.height = LINE[BOLD]
        elif node.inside is not None:
            self._frame(place)
        elif node.kind not in ("input", "output"):
            lines = box_lines(node)
            place.left = place.right = max(line_width(*line) for line in lines) / 2 + PAD
            place.height = sum(LINE[size] for _, size, _ in lines) + 1.1 * PAD
        return place

    def _frame(self, place: NodePlace) -> None:
        """A box as large as what happens in it, with its words at the top beside the way out."""
        place.inner = inner = DiagramLayout(place.node.inside, outermost=False)
        place.left, place.right = inner.left + 1.5 * PAD, inner.right + 1.5 * PAD
        lines = box_lines(place.node, place.right - 2 * PAD)
        place.right = max(place.right, max(line_width(*line) for line in lines) + 2 * PAD)
        place.height = inner.height + sum(LINE[size] for _, size, _ in lines) + PAD

    def _make_wires(self) -> list[Wire]:
        together: dict[tuple[int, int], list[Edge]] = {}
        for edge in self.diagram.edges:
            together.setdefault((id(edge.source), id(edge.target)), []).append(edge)
        return [Wire(self.places[edges[0].source], self.places[edges[0].target], edges)
                for edges in together.values()]

    def _rows(self) -> None:
        """A row for each node: above all that it needs; weights just below where they are used."""
        order = [self.places[node] for node in self.diagram.nodes]
        for place in order:
            place.row = max((wire.source.row + 1 for wire in self.wires if wire.target is place), default=0)
        for place in order:
            uses = [wire.target.row - 1 for wire in self.wires if wire.source is place]
            if place.node.kind == "weight" and uses:
                place.row = max(min(uses), 0)
        last = max(place.row for place in order)
        for place in order:
            if place.node.kind == "output":
                place.row = max(last, place.row)

    # ------------------------------------------------------------ columns

    def _spine(self) -> list[NodePlace]:
        """The shortest way from the first input to the output: in a transformer, the residual stream."""
        start = next((p for n, p in self.places.items() if n.kind == "input"), next(iter(self.places.values())))
        ways, seen = [[start]], {start}
        for way in ways:
            if way[-1].node.kind == "output":
                return way
            for wire in self.wires:
                if wire.source is way[-1] and wire.target not in seen:
                    seen.add(wire.target)
                    ways.append([*way, wire.target])
        return max(ways, key=len)

    def _columns(self) -> None:
        spine = self._spine()
        taken: dict[int, list[tuple[int, int, NodePlace]]] = {}
        for place in (self.places[node] for node in self.diagram.nodes):
            if place in spine:
                continue
            sources = [wire.source for wire in self.wires if wire.target is place]
            targets = [wire.target for wire in self.wires if wire.source is place]
            first = min([place.row] + [source.row + 1 for source in sources if source in spine])
            last = max([place.row] + [target.row - (not self._round(target)) for target in targets])
            wanted = [source.column for source in sources if source not in spine]
            place.column = next(c for c in [*wanted, *range(1, len(self.places) + 1)] if all(
                first > b or last < a or (other in sources and place.row > other.row)
                for a, b, other in taken.get(c, [])))
            taken.setdefault(place.column, []).append((first, last, place))

    @staticmethod
    def _round(place: NodePlace) -> bool:
        return place.node.kind in ("sum", "product")

    def _free(self, column: int, first: int, last: int) -> bool:
        """Is there no box in a column from one row to another?"""
        return not any(p.column == column and first <= p.row <= last for p in self.places.values())

    def _route(self, wire: Wire) -> None:
        """Straight up; up and into the side of a sum; across and up; up and across; or by a lane of its own."""
        source, target = wire.source, wire.target
        between = source.row + 1, target.row - 1
        if source.column == target.column and self._free(source.column, *between):
            wire.way = "straight"
        elif (self._round(target) and source.column > target.column
              and self._free(source.column, between[0], target.row)
              and all(self._free(c, target.row, target.row) for c in range(target.column + 1, source.column))):
            wire.way = "side"
        elif source.column != target.column and self._free(target.column, *between) and source.column == 0:
            wire.way = "out"
        elif source.column != target.column and self._free(source.column, *between):
            wire.way = "in"
        elif source.column != target.column and self._free(target.column, *between):
            wire.way = "out"
        else:
            wire.way = "lane"
            wire.lane = 1 + max(max(p.column for p in self.places.values()), max(w.lane for w in self.wires))

    def _ports(self) -> None:
        """Where several lines meet one box: the straight one in the middle, the others beside it."""
        for place in self.places.values():
            meeting = [wire for wire in self.wires if wire.target is place and wire.way != "side"]
            aside = sorted((w for w in meeting if w.way != "straight"), key=lambda w: w.lane or w.source.column)
            if len(meeting) > 1 and aside:
                step = place.right / (len(aside) + 0.6)
                for number, wire in enumerate(aside, start=1):
                    wire.port = number * step

    # ------------------------------------------------------------ words on the lines

    def _labels(self) -> None:
        """Shapes: above a box that of what it made, and below the next one what has become of it on the way."""
        self.above: dict[NodePlace, str] = {}
        for place in self.places.values():
            leaving = [wire for wire in self.wires if wire.source is place]
            shapes = {edge.shape for wire in leaving for edge in wire.edges}
            made = place.node.made or (next(iter(shapes)) if len(shapes) == 1 else None)
            for wire in leaving:
                self._changed(wire, made)
            ends = place.node.kind == "input" or any(wire.target.node.kind == "output" for wire in leaving)
            told = ends and not self.outermost and shapes == {made}  # by the frame
            if leaving and made and not told and not (place.node.made is None and all(w.label for w in leaving)):
                self.above.setdefault(place, shape_words(made))

    def _changed(self, wire: Wire, made: tuple[int, ...] | None) -> None:
        """Words for a line along which shapes change, or where tensors have names."""
        if wire.way == "side" and made and wire.edges[0].shape != made:
            self.above[wire.source] = f"{shape_words(made)} → {shape_words(wire.edges[0].shape)}"
        elif self._names(wire) or any(edge.shape != made for edge in wire.edges):
            name = self._names(wire)
            wire.label = [f"{edge.name if name else ''} {shape_words(edge.shape)}".strip()
                          for edge in self._ordered(wire)]

    def _names(self, wire: Wire) -> bool:
        """Are the arguments' names worth saying? If there are several."""
        arriving = self.diagram.into(wire.target.node)
        return wire.target.node.kind == "function" and len(arriving) > 1 and any(edge.name for edge in arriving)

    def _ordered(self, wire: Wire) -> list[Edge]:
        order = ("query", "key", "value")
        return sorted(wire.edges, key=lambda e: order.index(e.name) if e.name in order else len(order))

    # ------------------------------------------------------------ inches

    def _verticals(self, wire: Wire) -> list[tuple[int, float, float]]:
        """(column, from, to) of its upright parts; rows are whole numbers, the gaps above them halves."""
        a, b = wire.source.row + 0.5, wire.target.row - 0.5
        return {"straight": [(wire.source.column, a, b)], "side": [(wire.source.column, a, b + 0.5)],
                "out": [(wire.target.column, a, b)], "in": [(wire.source.column, a, b)],
                "lane": [(wire.lane, a, b)]}[wire.way]

    def _reach(self) -> dict[int, dict[float, tuple[float, float]]]:
        """How far each column reaches to the left and right, in each row and gap."""
        reach: dict[int, dict[float, tuple[float, float]]] = {}

        def widen(column, key, left, right):
            old = reach.setdefault(column, {}).get(key, (0.0, 0.0))
            reach[column][key] = max(old[0], left), max(old[1], right)

        for place in self.places.values():
            widen(place.column, place.row, place.left, place.right)
            if place in self.above:
                widen(place.column, place.row + 0.5, 0.0, 0.07 + line_width(self.above[place], SMALL))
        for wire in self.wires:
            for column, first, last in self._verticals(wire):
                for half in range(round(2 * first), round(2 * last) + 1):
                    widen(column, half / 2, 0.03, 0.03)
            if wire.label:
                wide = 0.07 + max(line_width(text, SMALL) for text in wire.label)
                left = wide if self._on_left(wire) else 0.0
                widen(wire.target.column, wire.target.row - 0.5, left, 0.0 if left else wire.port + wide)
        return reach

    def _on_left(self, wire: Wire) -> bool:
        """Is its label to the left of the line? Where another line comes in on the right."""
        return any(other.target is wire.target and other.port > wire.port for other in self.wires)

    def _across(self) -> None:
        reach, self.x = self._reach(), {}
        for column in sorted(reach):
            self.x[column] = max([0.0] + [
                self.x[other] + 0.2 * (column > 0) for other in self.x] + [
                self.x[other] + reach[other][key][1] + GAP + reach[column][key][0]
                for other in self.x for key in reach[other] if key in reach[column]])
        self.left = max(left for left, _ in reach[0].values())
        self.left = max(self.left, *(left - self.x[c] for c in reach for left, _ in reach[c].values()))
        self.right = max(self.x[c] + right for c in reach for _, right in reach[c].values())
        for place in self.places.values():
            place.x = self.x[place.column]

    def _crossings(self, gap: int) -> list[tuple[Wire, float, float]]:
        """The level parts of lines in the gap above row ``gap``: (wire, from x, to x)."""
        found = []
        for wire in self.wires:
            start, end = wire.source.x, wire.target.x + wire.port
            upright = self.x[self._verticals(wire)[0][0]]
            if wire.way == "out" and wire.source.row == gap:
                found.append((wire, start, end))
            if wire.way == "in" and wire.target.row - 1 == gap:
                found.append((wire, start, end))
            if wire.way == "lane" and wire.source.row == gap:
                found.append((wire, start, upright))
            if wire.way == "lane" and wire.target.row - 1 == gap:
                found.append((wire, upright, end))
        return found

    def _tracks(self, gap: int) -> list[list[tuple[Wire, float, float]]]:
        """Heights for the level parts in a gap: those that overlap get one each, unless they leave one box."""
        tracks: list[list[tuple[Wire, float, float]]] = []
        for part in self._crossings(gap):
            low, high = sorted(part[1:])
            fits = (track for track in tracks if all(
                wire.source is part[0].source or high < min(a, b) or low > max(a, b) for wire, a, b in track))
            track = next(fits, None)
            if track is None:
                tracks.append(track := [])
            track.append(part)
        return tracks

    def _up(self) -> None:
        """The height of every row and gap, and of every level line."""
        self.levels: dict[tuple[int, int], float] = {}
        y = 0.0
        for row in range(self.rows):
            here = [place for place in self.places.values() if place.row == row]
            height = max((place.height for place in here), default=0.0)
            for place in here:
                place.y = y + (height - place.height) / 2
            y += height
            if row < self.rows - 1:
                y = self._gap(row, y)
        self.height = y + (0.12 if self.outermost else 0.0)

    def _gap(self, row: int, y: float) -> float:
        said = [1 for place in self.above if place.row == row]
        asked = max((len(wire.label) for wire in self.wires if wire.target.row - 1 == row), default=0)
        tracks = self._tracks(row)
        last = all(place.node.kind == "output" for place in self.places.values() if place.row == row + 1)
        if last and not (self.outermost or said or asked or tracks):
            return y + 0.03  # the frame is the end
        y += 0.04 + (LINE[SMALL] if said else 0.0)
        for track in tracks:
            y += 0.04
            for wire, a, _ in track:
                self.levels[id(wire), row, a == wire.source.x] = y
        if tracks or not said:
            y += 0.09
        return y + 0.05 + LINE[SMALL] * asked

    def points(self, wire: Wire) -> list[tuple[float, float]]:
        """The corners of a line."""
        source, target = wire.source, wire.target
        x, end = source.x, target.x + wire.port
        start, stop = (x, source.top), (end, target.y)
        if wire.way == "side":
            middle = target.y + target.height / 2
            return [start, (x, middle), (target.x + target.right, middle)]
        if wire.way == "straight":
            return [start, (x, target.y)]
        if wire.way == "lane":
            lane = self.x[wire.lane]
            low, high = self.levels[id(wire), source.row, True], self.levels[id(wire), target.row - 1, False]
            return [start, (x, low), (lane, low), (lane, high), (end, high), stop]
        row = source.row if wire.way == "out" else target.row - 1
        level = self.levels[id(wire), row, True]
        return [start, (x, level), (end, level), stop]


def shape_words(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")" if shape else "one number"
