"""A figure as the book needs it: its picture as vectors, its words, its size."""

from __future__ import annotations

import base64
import gzip
import re

from ..plots import VECTOR

IDENTIFIER = re.compile(r'(\bid="|url\(#|href="#)([^")]+)')


def picture(output, name: str) -> tuple[str, bytes, str, int]:
    """The SVG ("" where there is none), the PNG, the alternative text and the width in CSS pixels of an output.

    ``name`` goes before every identifier in the SVG, so that many of them can stand on one page.
    """
    metadata = output.metadata.get("image/png", {})
    png = base64.b64decode(output.data["image/png"])
    svg = ""
    if VECTOR in output.data:
        svg = gzip.decompress(base64.b64decode(output.data[VECTOR])).decode()
        svg = IDENTIFIER.sub(lambda match: f"{match[1]}{name}-{match[2]}", svg[svg.index("<svg"):])
        svg = _once(svg)
    alt = metadata.get("alt") or output.data.get("text/plain", "").removeprefix("Figure: ")
    return svg, png, alt, int(metadata.get("width", 660))


def _once(svg: str) -> str:
    """Equal parts of a picture have equal identifiers; all but the first of each get a number."""
    counts: dict[str, int] = {}

    def numbered(match: re.Match) -> str:
        counts[match[1]] = counts.get(match[1], 0) + 1
        return match[0] if counts[match[1]] == 1 else f'{match[0][:-1]}-{counts[match[1]]}"'
    return re.sub(r'\bid="([^"]+)"', numbered, svg)
