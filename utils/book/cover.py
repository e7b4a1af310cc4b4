"""The drawing on the cover: where a model of the course looks while it reads a sentence.

Each token is a line of a list, and each attention weight an arc from the token that looks to the one it looks at.
Layers have colours. The weights come from the caller, so that this file knows no chapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT = 595.28, 841.89  # A4 in points
GROUND = "#0a1a2b"
COLORS = ("#56b4e9", "#2bd1a7", "#f0b429", "#ff8552", "#d98cc0", "#f2f5f8")  # by layer
LEFT, TOP, BOTTOM = 138.0, 262.0, 762.0
STRONGEST = 900  # arcs that are drawn


@dataclass(frozen=True)
class Cover:
    """What the cover shows: ``weights`` (layers, heads, T, T), row looks, column is looked at; T ``tokens``."""

    weights: np.ndarray
    tokens: tuple[str, ...]

    def __post_init__(self):
        length = len(self.tokens)
        if self.weights.ndim != 4 or self.weights.shape[2:] != (length, length):
            raise ValueError(f"weights have the shape {self.weights.shape}; for {length} tokens they need "
                             f"(layers, heads, {length}, {length}).")


def draw_cover(cover: Cover) -> str:
    """The cover's arcs as SVG of A4 size, without its title, which the template sets."""
    weights, tokens = np.asarray(cover.weights, dtype=float), cover.tokens
    step = (BOTTOM - TOP) / max(len(tokens) - 1, 1)
    places = [TOP + number * step for number in range(len(tokens))]
    size = f'width="{WIDTH}pt" height="{HEIGHT}pt" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
                      f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{GROUND}"/>',
                      '<g fill="none" stroke-linecap="round">', *_arcs(weights, places), "</g>",
                      *_words(tokens, places), "</svg>"])


def _arcs(weights: np.ndarray, places: Sequence[float]) -> Iterator[str]:
    """The strongest weights as arcs, weak ones first; a token's look at itself is left out.

    Most heads rest on the first token when they find nothing (a "sink"), so those arcs are drawn faintly.
    """
    shown = weights.copy()
    shown[..., np.arange(len(places)), np.arange(len(places))] = 0
    shown[..., 0] *= 0.12
    order = np.argsort(shown, axis=None)[-STRONGEST:]
    for layer, head, row, column in zip(*np.unravel_index(order, shown.shape), strict=True):
        weight = shown[layer, head, row, column]
        if weight < 0.012:
            continue
        top, bottom = places[column], places[row]
        x = LEFT + 6 + 0.9 * head  # heads beside one another
        reach = x + 24 + 2.3 * (bottom - top) ** 0.93 * (0.80 + 0.05 * head)
        yield (f'<path d="M{x:.1f} {bottom:.1f}C{reach:.1f} {bottom:.1f} {reach:.1f} {top:.1f} {x:.1f} {top:.1f}" '
               f'stroke="{COLORS[layer % len(COLORS)]}" stroke-width="{0.35 + 2.6 * weight:.2f}" '
               f'stroke-opacity="{min(0.12 + 0.95 * weight, 0.95):.2f}"/>')


def _words(tokens: Sequence[str], places: Sequence[float]) -> Iterator[str]:
    """The tokens, one below the other, right-aligned at the feet of the arcs."""
    yield '<g font-family="DejaVu Sans Mono" font-size="11.5" fill="#dfe7ef" text-anchor="end">'
    for token, y in zip(tokens, places, strict=True):
        word = escape(token.strip().replace("\n", "\u21b5")) or "\u2423"
        yield f'<text x="{LEFT - 4:.1f}" y="{y + 4:.1f}">{word}</text>'
        yield f'<circle cx="{LEFT + 3:.1f}" cy="{y:.1f}" r="1.9" fill="#dfe7ef"/>'
    yield "</g>"
