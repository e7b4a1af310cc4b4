"""What the book is made of: parts of pages, pages of blocks.

A label is unique in the whole book; links in Markdown point to it as ``[section 3.5](#sec-3-5)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from .citations import Reference

INDEX = "\ue000{}\ue001"  # a mark for the index, in front of words that stand for a term
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def picture_controls(text: str) -> str:
    """Control characters, which no font shows and HTML forbids, become the pictures that stand for them."""
    return CONTROL.sub(lambda m: "\u2421" if m[0] == "\x7f" else chr(0x2400 + ord(m[0])), text)


@dataclass(frozen=True)
class Heading:
    """A title of ``level`` 1 (the page's) to 4; ``number`` "3.5", "D7.2" or ""."""

    level: int
    number: str
    text: str
    label: str


@dataclass(frozen=True)
class Prose:
    """Paragraphs, lists, tables and quotations in Markdown."""

    markdown: str


@dataclass(frozen=True)
class Equation:
    """A displayed formula in TeX."""

    tex: str
    number: str
    label: str


@dataclass(frozen=True)
class Callout:
    """A box: ``kind`` "predict" asks the reader for a prediction before the next cell, "note" says something."""

    kind: str
    title: str
    markdown: str


@dataclass(frozen=True)
class Exercise:
    """``title`` "Exercise 3.2" or "Exercise A", ``note`` "(by hand)" or "", ``solution`` the label of its solution."""

    number: str
    title: str
    note: str
    markdown: str
    label: str
    solution: str = ""


@dataclass(frozen=True)
class Code:
    """A code cell; ``exported`` is the module of the chapter's library it is written to, or ""."""

    source: str
    exported: str


@dataclass(frozen=True)
class Output:
    """What a cell printed or returned (``kind`` "text"), or the error it ended with ("error")."""

    text: str
    kind: str


@dataclass(frozen=True)
class Figure:
    """A picture: ``svg`` text ("" where the notebook has none), ``png``, ``width`` in CSS pixels (660 = full)."""

    svg: str
    png: bytes
    alt: str
    width: int
    number: str
    label: str


Block = Heading | Prose | Equation | Callout | Exercise | Code | Output | Figure


@dataclass(frozen=True)
class Page:
    """One notebook or Markdown file; ``path`` relative to the repository, without suffix."""

    path: PurePosixPath
    kind: str  # "front", "chapter", "dive", "solutions" or "back"
    number: str  # "3", "D7" or ""
    title: str
    label: str
    blocks: list[Block]


@dataclass(frozen=True)
class Part:
    """Pages that belong together: the front matter, a chapter with its deep dives, the back matter."""

    title: str
    pages: list[Page]


@dataclass(frozen=True)
class Book:
    """Everything that is printed, in its order, and what the colophon says of it."""

    title: str
    parts: list[Part]
    references: list[Reference]
    version: str
    commit: str
    repository: str
    branch: str = "main"
    terms: dict[str, str] = field(default_factory=dict)  # by the form in the text: the glossary's term

    @property
    def pages(self) -> list[Page]:
        """All pages in reading order."""
        return [page for part in self.parts for page in part.pages]


def first_title(markdown: str) -> str:
    """ "Attention" of "# Chapter 3: Attention", "Which state knows" of "# Deep dive: Which state knows"."""
    title = re.search(r"^# +(.+)$", markdown, re.M)[1].strip()
    title = re.sub(r"^(Chapter \d+|Deep dive):\s*", "", title)
    return title[:1].upper() + title[1:]


def label_of(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.casefold().replace("\u2019", "")).strip("-")


def page_words(page: Page) -> Iterator[str]:
    """The Markdown of a page, piece by piece."""
    for block in page.blocks:
        if isinstance(block, (Prose, Callout, Exercise)):
            yield block.markdown


def with_words(block: Block, change: Callable[[str], str]) -> Block:
    """The block with its Markdown changed; other blocks stay as they are."""
    if isinstance(block, (Prose, Callout, Exercise)):
        return replace(block, markdown=change(block.markdown))
    return block
