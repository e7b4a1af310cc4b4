"""Text made ready for Typst: Markdown through pandoc, string literals, code lines that fit their column.

Markdown alone becomes Typst markup, and only pandoc writes that. Code, outputs, captions and titles travel as
string literals, so nothing that stands in a notebook can be taken for a command.
"""

from __future__ import annotations

import re
import subprocess
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from .blocks import picture_controls

COLUMNS = 120  # letters of code on a line of the printed page, at the size that book.typ sets
READER = "gfm+raw_attribute+tex_math_dollars+footnotes-smart-autolink_bare_uris"
INDEX_MARK = re.compile("\ue000(.*?)\ue001", re.S)
Wrapped = dict[int, tuple[int, int, str]]
_FIELD = "//@@field "
_FENCED = re.compile(r'#fenced\("((?:[^"\\]|\\.)*)", "((?:[^"\\]|\\.)*)"\)')


def typst_string(text: str) -> str:
    """A Typst string literal; control characters, which no font shows, become their visible pictures."""
    text = INDEX_MARK.sub("", text).expandtabs(4).encode("utf-8", "replace").decode("utf-8")
    return '"' + picture_controls(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def markdown_to_typst(fields: Sequence[str], pandoc: str, lua_filter: Path) -> list[str]:
    """Each Markdown text as Typst markup, all in one run of pandoc.

    Raises ``ValueError`` naming a text that opens what it does not close, or a formula pandoc cannot read.
    """
    joined = "\n\n".join(f"```{{=typst}}\n{_FIELD}{i}\n```\n\n{_indexed(text)}" for i, text in enumerate(fields))
    done = subprocess.run([pandoc, "-f", READER, "-t", "typst-smart", "--wrap=none", f"--lua-filter={lua_filter}"],
                          input=joined, capture_output=True, encoding="utf-8", check=False)
    if done.returncode or "WARNING" in done.stderr:
        raise ValueError(f"pandoc could not read a text of the book: {done.stderr.strip()[:500]}")
    pieces = re.split(rf"^{_FIELD}(\d+)$", done.stdout, flags=re.M)
    numbers = [int(number) for number in pieces[1::2]]
    if numbers != list(range(len(fields))):
        first = next(i for i, n in enumerate([*numbers, -1]) if n != i)
        raise ValueError(f"The text before field {first} swallows what follows it; close its code fence: "
                         f"{fields[max(first - 1, 0)][:200]!r}")
    return [_FENCED.sub(_fitted, piece).strip() for piece in pieces[2::2]]


def _indexed(text: str) -> str:
    """Marks for the index as raw Typst, which pandoc hands through."""
    return INDEX_MARK.sub(lambda m: f"``#ix({typst_string(m[1])});``{{=typst}}", text)


def _fitted(match: re.Match) -> str:
    """A fenced block of a text, its lines wrapped like those of a code cell."""
    source = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), match[2])
    body, wrapped = wrap_lines(source, columns=COLUMNS - 2)
    return f'#fenced("{match[1]}", {typst_string(body)}, wrapped: {typst_dictionary(wrapped)})'


def typst_dictionary(wrapped: Wrapped) -> str:
    """Where lines continue, as a Typst dictionary for book.typ: line -> (indent, letters held, their kind)."""
    entries = [f'"{line}": ({indent}, {held}, "{kind}")' for line, (indent, held, kind) in wrapped.items()]
    return f"({', '.join(entries)})" if entries else "(:)"


# ---------------------------------------------------------------- lines that fit


def column_width(text: str) -> float:
    """The width of a text in columns of the code font, rather too large than too small."""
    return sum(_letter_width(letter) for letter in text)


def _letter_width(letter: str) -> float:
    if letter < "\u0250" or "\u0370" <= letter < "\u0530" or "\u2010" <= letter < "\u2e00":
        return 1.0  # Latin, Greek, Cyrillic, arrows and boxes: in the code font itself
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Cf"):
        return 0.3
    if unicodedata.east_asian_width(letter) in "WF" or letter > "\uffff":
        return 2.2  # Chinese, Japanese, Korean, emoji
    return 1.4


def wrap_lines(source: str, columns: int = COLUMNS, python: bool = False) -> tuple[str, Wrapped]:
    """Lines cut to ``columns`` with a hanging indent: (text, by line number from 1 what continues there).

    For a continued line: its indent, how many letters of it belong to the string or comment it was cut in
    (with ``python``, else 0), and "s", "c" or "" for which. Cuts fall after spaces and commas where they can.
    """
    source = INDEX_MARK.sub("", source).expandtabs(4)
    kinds = _kinds(source) if python and any(column_width(line) > columns for line in source.split("\n")) else None
    lines: list[str] = []
    wrapped: Wrapped = {}
    start = 0
    for line in source.split("\n"):
        indent = min(len(line) - len(line.lstrip()) + 4, columns // 2)
        at, cuts = 0, _cuts(line, columns, indent)
        for number, cut in enumerate([*cuts, len(line)]):
            if number == 0:
                lines.append(line[:cut])
            else:
                lines.append(" " * indent + line[at:cut])
                wrapped[len(lines)] = (indent, *_held(kinds, start + at, start + cut))
            at = cut
        start += len(line) + 1
    return "\n".join(lines), wrapped


def _cuts(line: str, columns: int, indent: int) -> list[int]:
    """Where a line is cut, so that no piece is wider than ``columns`` (less ``indent`` from the second on)."""
    cuts: list[int] = []
    at, room = 0, float(columns)
    while column_width(line[at:]) > room:
        end, used = at, 0.0
        while used + _letter_width(line[end]) <= room:
            used += _letter_width(line[end])
            end += 1
        good = [m.end() for m in re.finditer(r"[ ,;/|)\]}]+", line[at:end]) if m.end() > (end - at) * 0.6]
        at = at + good[-1] if good else max(end, at + 1)
        cuts.append(at)
        room = float(columns - indent)
    return cuts


def _kinds(source: str) -> str:
    """For every letter of Python code "s" in a string, "c" in a comment, "." elsewhere."""
    from pygments import lex
    from pygments.lexers import PythonLexer
    from pygments.token import Comment, String

    parts = []
    for token, text in lex(source, PythonLexer(stripnl=False, ensurenl=False)):
        kind = "s" if token in String else "c" if token in Comment else "."
        parts.append(kind * len(text))
    return "".join(parts)


def _held(kinds: str | None, start: int, end: int) -> tuple[int, str]:
    """How much of a piece that begins in the middle of a string or comment still belongs to it."""
    if kinds is None or start == 0 or kinds[start - 1] != kinds[start] or kinds[start] == ".":
        return 0, ""
    piece = kinds[start:end]
    return len(piece) - len(piece.lstrip(kinds[start])), kinds[start]
