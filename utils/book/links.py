"""What the words of the book refer to, as links.

The notebooks are written for a reader in JupyterLab: "section 3.5", "Exercise 3.2", "chapter 4", "Su et al.
2021" and ``inside.ipynb`` are ordinary words there. Here each of them becomes a link to a label of the book. Words
inside code, formulas and links are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from .blocks import (
    INDEX,
    Block,
    Book,
    Exercise,
    Heading,
    Page,
    Part,
    Prose,
    first_title,
    label_of,
    page_words,
    with_words,
)
from .citations import Reference, cite, collect

OF_ANOTHER = r"(?P<word>[Ss]ection)\s+(?P<number>\d+)(?P<of>\s+of\s+)(?P<link>\[[^\]]*\]\((?P<file>[^)#]+\.ipynb)\))"
PROTECTED = re.compile(  # fenced code, code, display and inline formulas, links and pictures, comments
    r"(^```.*?^```[^\n]*$|(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`)|\$\$.+?\$\$|(?<![\\$])\$[^$\n]+\$"
    r"|!?\[[^\]]*\]\([^)]*\)|<!--.*?-->|" + OF_ANOTHER + ")", re.S | re.M)
ELSEWHERE = re.compile(  # "Dao et al. 2022, section 2", "*Mining of Massive Datasets*, chapter 3", "their section 2"
    r"(?:(?:19|20)\d\d\)?\]?(?:\([^)]*\))?,|arXiv[:\s]\s*\d{4}\.\d{4,5}\)?,|(?<!\*)\*(?:\s*\([^)]*\))?,"
    r"|\b(?:their|his|her|(?:paper|report)(?:'s|\W+in its)))\s*$")
OF_A_PAPER = re.compile(
    r"\s+of\s+(?:the|their|his|its|that)\s+\w*\s*(?:paper|report|book)|,\s+(?:figure|table|appendix|equation)\b")
EMPHASIS = re.compile(r"(?<!\*)(?P<stars>\*\*?)(?![*\s])(?P<words>[^*\n]+(?:\n[^*\n]+)?)(?P=stars)(?!\*)")


def link_book(book: Book, root: Path) -> Book:
    """The book with every reference in its words turned into a link."""
    texts = {page.label: "\n\n".join(page_words(page)) for page in book.pages}
    references = collect(texts)
    by_key: dict[tuple[str, str], list[Reference]] = {}
    for reference in references:
        by_key.setdefault(reference.key, []).append(reference)
    named: dict[str, set[str]] = {}
    links = _Links(book, root, by_key, named)
    parts = [Part(part.title, [links.page(page) for page in part.pages]) for part in book.parts]
    parts = _all_terms_marked(parts)
    order = [page.label for page in book.pages]
    cited = [replace(entry, cited=tuple(sorted({*entry.cited, *named.get(entry.label, ())}, key=order.index)))
             for entry in references]
    return replace(book, parts=parts, references=cited,
                   terms={form: term for form, (term, _) in links.terms.items()})


def glossary_terms(path: Path) -> dict[str, str]:
    """From every form in which a term stands in the text to the glossary's form, both without capitals.

    An entry is a list item ``- **term** (another form, abbreviation): meaning``.
    """
    return {form: term for form, (term, _) in _glossary(path).items()}


def _glossary(path: Path) -> dict[str, tuple[str, set[str]]]:
    """For every form its term, and the names of the notebooks that the entry links to."""
    forms: dict[str, tuple[str, set[str]]] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for term, others, meaning in re.findall(r"^- \*\*(.+?)\*\*(?: \(([^)]*)\))?:(.*)", text, re.M):
        defined = set(re.findall(r"/(\w+)\.ipynb\)", meaning))
        for form in [term, *re.split(r",\s*", others or "")]:
            if form.strip():
                forms.setdefault(form.strip().casefold(), (term, defined))
    return forms


def _all_terms_marked(parts: list[Part]) -> list[Part]:
    """A term that never stands in bold or italics gets its mark in the section that the glossary names."""
    pages = [page for part in parts for page in part.pages]
    glossary = "".join(text for page in pages if page.path.name == "glossary" for text in page_words(page))
    marked = {term for page in pages for text in page_words(page) for term in re.findall("\ue000(.*?)\ue001", text)}
    wanted: dict[str, list[str]] = {}
    for term, label in re.findall(r"^- \*\*(.+?)\*\*.*\]\(#([^)]*)\)\)?\.?$", glossary, re.M):
        if term not in marked:
            wanted.setdefault(label, []).append(term)
    return [Part(part.title, [replace(page, blocks=list(_with_marks(page.blocks, wanted))) for page in part.pages])
            for part in parts]


def _with_marks(blocks: list[Block], wanted: dict[str, list[str]]) -> Iterator[Block]:
    waiting: list[str] = []
    for block in blocks:
        waiting += wanted.get(block.label, []) if isinstance(block, Heading) else []
        if waiting and isinstance(block, Prose) and block.markdown[:1].isalpha():
            block = replace(block, markdown="".join(map(INDEX.format, waiting)) + block.markdown)
            waiting = []
        yield block


class _Links:
    """What the words of the book may refer to, and where that stands."""

    def __init__(self, book: Book, root: Path, references: dict, named: dict):
        self.root, self.references, self.named = root, references, named
        self.terms = _glossary(root / "docs" / "glossary.md")
        self.files = {page.path.as_posix(): page for page in book.pages}
        self.labels = {block.label for page in book.pages for block in page.blocks if hasattr(block, "label")}
        self.address = f"{book.repository}/blob/{book.branch}/"
        self.chapters = {page.number: page.label for page in book.pages if page.kind == "chapter"}
        self.titles = {page.title: page for page in book.pages if page.kind in ("chapter", "dive")}

    def page(self, page: Page) -> Page:
        """The page with its words linked; in solutions "section 2" means that of the notebook they stand under."""
        blocks, context = [], page
        for block in page.blocks:
            if page.kind == "solutions" and isinstance(block, Heading) and block.level == 2:
                context = self.titles.get(first_title(f"# {block.text}"), page)
            if isinstance(block, Exercise):
                solved = label_of(f"solution-{page.title}-{block.title.removeprefix('Exercise ')}")
                block = replace(block, solution=solved if solved in self.labels else "")
            blocks.append(with_words(block, lambda text, context=context: self.text(text, context)))
        return replace(page, blocks=blocks)

    def text(self, text: str, page: Page) -> str:
        """Markdown with its references as links, its links resolved and its terms marked for the index."""
        pieces, end = [], 0
        for match in PROTECTED.finditer(text):
            pieces += [self._plain(text[end:match.start()], text[:end], page), self._kept(match[0], page)]
            end = match.end()
        pieces.append(self._plain(text[end:], text[:end], page))
        return "".join(pieces)

    def _plain(self, text: str, before: str, page: Page) -> str:
        if page.kind not in ("front", "back"):
            text = EMPHASIS.sub(lambda match: self._marked(match, page), text)
        text = cite(text, page.label, self.references, self.named)
        return _outside_links(text, lambda piece, before: self._places(piece, before, page), before)

    def _marked(self, match: re.Match, page: Page) -> str:
        """A term in bold, or in italics on the page that defines it, with its mark for the index."""
        words = " ".join(match["words"].split()).rstrip(".:,").casefold()
        term, defined = self.terms.get(words) or self.terms.get(words.removesuffix("s")) or ("", set())
        wanted = term and (match["stars"] == "**" or page.path.name in defined)
        return f"{INDEX.format(term)}{match[0]}" if wanted else match[0]

    def _places(self, text: str, before: str, page: Page) -> str:
        """ "section 3.5", "sections 3.5 and 3.7", "chapter 4" and "Exercise 3.2" as links, if they are ours."""
        text = re.sub(r"(?<![\w.])([Ss]ections?)\s+(\d+(?:\.\d+)*)(?:(,\s+|\s+(?:and|to)\s+)(\d+(?:\.\d+)*))?",
                      lambda match: self._sections(match, before + text[:match.start()], text, page), text)
        text = _outside_links(text, lambda piece, before: re.sub(
            r"(?<![\w.])([Cc]hapter)\s+(\d)(?![\d.]?\d)",
            lambda match: self._chapter(match, before + piece[:match.start()]), piece), before)
        return _outside_links(text, lambda piece, _: re.sub(
            r"\bExercise\s+(\d\.\d+|[A-Z])\b", lambda match: self._exercise(match, page), piece))

    def _sections(self, match: re.Match, before: str, text: str, page: Page) -> str:
        if _elsewhere(before) or OF_A_PAPER.match(text[match.end():]):
            return match[0]
        first, second = (self._section_link(f"{match[1]} ", match[2], page), match[4] or "")
        return first + match[3] + self._section_link("", second, page) if second else first

    def _section_link(self, words: str, number: str, page: Page) -> str:
        """A link to a section by its number; "section 3" of a deep dive is printed with the dive's own, D12.3."""
        label = self._section(number, page)
        if label and "." not in number and page.number:
            number = f"{page.number}.{number}"
        return f"[{words}{number}](#{label})" if label else words + number

    def _section(self, number: str, page: Page) -> str:
        label = label_of(f"sec-{number}" if "." in number or not page.number else f"sec-{page.number}.{number}")
        return label if label in self.labels else ""

    def _chapter(self, match: re.Match, before: str) -> str:
        if match[2] not in self.chapters or _elsewhere(before):
            return match[0]
        return f"[{match[1]} {match[2]}](#{self.chapters[match[2]]})"

    def _exercise(self, match: re.Match, page: Page) -> str:
        number = match[1] if "." in match[1] else f"{page.number}.{match[1]}"
        label = label_of(f"ex-{number}")
        return f"[{match[0]}](#{label})" if label in self.labels else match[0]

    def _kept(self, text: str, page: Page) -> str:
        """Code, a formula or a link; links to files of the course are resolved."""
        if found := re.fullmatch(r"`([\w./-]+\.ipynb)`", text):
            other = self._file(found[1], page) or self._named(found[1])
            return f"[{self._numbered(other.title, other, page)}](#{other.label})" if other else text
        if found := re.fullmatch(OF_ANOTHER, text):
            other = self._file(found["file"], page) or page
            return (self._section_link(f"{found['word']} ", found["number"], other) + found["of"]
                    + self._kept(found["link"], page))
        if found := re.fullmatch(r"(!?)\[([^\]]*)\]\(([^)\s]*)\)", text, re.S):
            return self._link(found[1], found[2], found[3], page)
        return text

    def _link(self, mark: str, words: str, target: str, page: Page) -> str:
        if urlsplit(target).scheme or mark:
            return f"{mark}[{words}]({target})"
        path, _, anchor = target.partition("#")
        other = self._file(path, page) if path else page
        if other:
            place = self._within(other, anchor, words)
            if words.strip("`").endswith(".ipynb"):
                words = other.title
            return f"[{self._numbered(words, other, page)}](#{place})"
        return f"[{words}]({self.address}{self._relative(path, page)})"

    def _numbered(self, words: str, other: Page, page: Page) -> str:
        """Words that lead to a deep dive, with its number in the contents: "Many machines (D18)"."""
        return f"{words} ({other.number})" if other.kind == "dive" and other is not page else words

    def _within(self, page: Page, anchor: str, words: str) -> str:
        """The label on ``page`` of an anchor, or of the section that the words of the link end with."""
        section = re.search(r"\bsection\s+(\d+(?:\.\d+)?)$", words)
        label = label_of(f"{page.label}-{anchor}") if anchor else self._section(section[1], page) if section else ""
        return label if label in self.labels else page.label

    def _file(self, path: str, page: Page) -> Page | None:
        return self.files.get(re.sub(r"\.(ipynb|md)$", "", self._relative(path, page)))

    def _named(self, name: str) -> Page | None:
        found = [page for path, page in self.files.items() if path.endswith("/" + name.removesuffix(".ipynb"))]
        return found[0] if len(found) == 1 else None

    def _relative(self, path: str, page: Page) -> str:
        """A path as it is written on ``page``, from the root of the repository."""
        parts: list[str] = []
        for part in (page.path.parent / path).parts:
            parts = parts[:-1] if part == ".." else [*parts, part]
        return "/".join(parts)


def _elsewhere(before: str) -> bool:
    """Whether the words before "section 3" say that it is a section of somebody else's work."""
    return bool(ELSEWHERE.search(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", before[-400:])))


def _outside_links(text: str, change: Callable[[str, str], str], before: str = "") -> str:
    """``change`` applied to what is not a link or a mark for the index yet, and to what stands before that."""
    pieces = re.split(r"(\[[^\]]*\]\([^)]*\)|\ue000.*?\ue001)", text)
    return "".join(piece if number % 2 else change(piece, before + "".join(pieces[:number]))
                   for number, piece in enumerate(pieces))
