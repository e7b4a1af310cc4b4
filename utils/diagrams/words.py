"""A diagram in words: its alternative text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .layout import shape_words
from .trace import Diagram, Node, only_here, paths


def describe_diagram(diagram: Diagram, inside: bool = True) -> str:
    """A diagram in words, for those who cannot see it; with or without what is inside its boxes."""
    weights = f", {diagram.parameters:,} weights" if diagram.parameters else ""
    return f"{diagram.class_name}{weights}: {' '.join(_Spoken(diagram, inside).sentences)}"


def describe_diagrams(diagrams: Mapping[str, Diagram]) -> str:
    """Several diagrams in words: each from outside, and what only one of them has."""
    marked = only_here(list(diagrams.values()))
    words = [f"{name}: {describe_diagram(diagram, inside=False)}" for name, diagram in diagrams.items()]
    for name, diagram in diagrams.items():
        found = [f"{path} ({kind})" if kind else path.replace("×", "product").replace("+", "sum")
                 for (_, path, kind), node in paths(diagram) if node in marked]
        words.append(f"Only in {name}: {', '.join(found) or 'nothing'}.")
    return " ".join(words)


class _Spoken:
    """Follows the nodes in their order and says where each chain of them begins and ends."""

    def __init__(self, diagram: Diagram, inside: bool = True):
        self.diagram, self.sentences, self.chain, self.named = diagram, [], [], set()
        for node in diagram.nodes:
            self._follow(node)
        self._end()
        for node in diagram.nodes:
            if inside and node.inside is not None:
                each = f"In each of the {node.times} {node.name}" if node.times > 1 else f"In {node.name}"
                self.sentences.append(f"{each}, {' '.join(_Spoken(node.inside).sentences)}")

    def _follow(self, node: Node) -> None:
        """Say how a node came to be, or let the chain grow by it."""
        sources = list({id(edge.source): edge.source for edge in self.diagram.into(node)}.values())
        if node.kind in ("input", "weight") or not sources:
            return
        if node.kind in ("sum", "product"):
            self._joined(node, sources)
        elif node.kind == "output" and len(sources) > 1:
            self._end()
            self._sentence(f"Out come {_and([self._name(source) for source in sources])}")
        elif len(sources) == 1 and (not self.chain or sources[0] is self.chain[-1]):
            self.chain = [*(self.chain or sources), node]
        else:
            self._end()
            self.chain = [node] if len(sources) > 1 else [sources[0], node]
            if len(sources) > 1:
                self._sentence(f"{_and([self._name(s) for s in sources])} meet in {self._name(node)}")

    def _joined(self, node: Node, sources: list[Node]) -> None:
        verb = "added to" if node.kind == "sum" else "multiplied with"
        if len(self.chain) > 1 and self.chain[-1] in sources:
            others = [source for source in sources if source is not self.chain[-1]] or sources
            self._end(f"; the result is {verb} {{}}, giving {{}}", [*others[:1], node])
        else:
            self._end()
            first, second = (sources * 2)[:2]
            self._sentence(f"{self._name(first)} is {verb} {self._name(second)}, giving {self._name(node)}")
        self.chain = [node]

    def _end(self, then: str = "", named: Sequence[Node] = ()) -> None:
        """Say the chain that has grown so far, and ``then``, with the names of these nodes in it."""
        start, *rest = self.chain or [None]
        if rest and rest[-1].kind == "output":
            then = f"{'; o' if rest[1:] else 'O'}ut comes {shape_words(self.diagram.into(rest.pop())[0].shape)}"
        if rest:
            begin, way = self._name(start), _and([self._name(part) for part in rest])
            self._sentence(f"{begin} goes through {way}{then.format(*map(self._name, named))}")
        elif then:
            self._sentence(then)
        self.chain = []

    def _sentence(self, text: str) -> None:
        if text.startswith(("the ", "sum ", "product ")):  # a name from the code stays as it is
            text = text[0].upper() + text[1:]
        self.sentences.append(f"{text}.")

    def _name(self, node: Node) -> str:
        """What a node is called; when it is first named, with its class or its shape."""
        alike = [other for other in self.diagram.nodes if (other.kind, other.name) == (node.kind, node.name)]
        number = f" {alike.index(node) + 1}" if len(alike) > 1 and node.kind != "module" else ""
        first = node not in self.named
        self.named.add(node)
        if node.kind in ("sum", "product"):
            return node.kind + number if number else f"the {node.kind}"
        if node.kind == "input":
            shape = shape_words(node.made) if first and node.made else ""
            return f"{node.name or 'the input'} {shape}".strip()
        times = f"{node.times} times " if node.times > 1 else ""
        facts = [node.class_name if node.class_name != node.name else "", "frozen" if node.frozen else ""]
        known = f" ({', '.join(filter(None, facts))})" if first and any(facts) else ""
        to = f" to {shape_words(node.made)}" if first and node.made and self._new(node) else ""
        return f"{times}{node.name}{number}{known}{to}"

    def _new(self, node: Node) -> bool:
        """Has what it made another shape than all that it was given?"""
        return all(edge.shape != node.made for edge in self.diagram.into(node))


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
