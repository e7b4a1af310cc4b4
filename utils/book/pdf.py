"""The book as a PDF: blocks to Typst source, Typst to a tagged PDF. The look is docs/print/book.typ.

Every page of the book becomes a few calls of functions that book.typ defines. Figures lie beside the source as
SVG. The PDF meets PDF/UA-1, the standard for readers who listen; Typst checks that while it writes.
"""

from __future__ import annotations

import datetime
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ..workspace import atomic_write
from .cover import Cover, draw_cover
from .packing import pack_pdf
from .text import Book, Callout, Code, Equation, Exercise, Figure, Heading, Output, Page, Prose
from .typesetting import COLUMNS, column_width, markdown_to_typst, typst_dictionary, typst_string, wrap_lines

PRINT = Path("docs", "print")
FULL_WIDTH = 800  # CSS pixels of a figure as wide as the printed column: its words come out at 8 points
SMALLEST = 1.25  # an output so many times as wide as the column is printed smaller, a wider one is wrapped
SUBTITLE = ("A large language model from scratch, in plain PyTorch: raw text, tokenizer, attention, GPT, "
            "pretraining, chat")
COVER_WORDS = ("Where the storyteller of chapter 5 looks while it reads: every arc is a weight of one of its "
               "{heads} attention heads, every colour a layer.")


def build_pdf(book: Book, root: Path, out: Path, cover: Cover | None = None) -> None:
    """Write the book below ``root`` as the PDF ``out``, with what its ``cover`` shows, or without a cover.

    Raises ``ValueError`` for a text that pandoc or Typst cannot take, with the place in its message.
    """
    with tempfile.TemporaryDirectory(prefix="book-") as folder:
        source = write_typst(book, root, Path(folder), cover)
        data = pack_pdf(compile_typst(source))
    with atomic_write(out) as temporary:
        temporary.write_bytes(data)


def cover_png(book: Book, root: Path, cover: Cover) -> bytes:
    """The cover alone as a picture, 1240 by 1754 pixels."""
    with tempfile.TemporaryDirectory(prefix="cover-") as folder:
        pages = replace(book, parts=[], references=[])
        return compile_typst(write_typst(pages, root, Path(folder), cover, only_cover=True), png=True)


def write_typst(book: Book, root: Path, folder: Path, cover: Cover | None = None,
                only_cover: bool = False) -> Path:
    """Write main.typ with all that it needs into ``folder``: the template, the figures, the cover."""
    for path in (root / PRINT).iterdir():
        shutil.copy(path, folder)
    (folder / "figures").mkdir()
    if cover:
        (folder / "cover.svg").write_text(draw_cover(cover), encoding="utf-8")
    words = COVER_WORDS.format(heads=cover.weights.shape[0] * cover.weights.shape[1]) if cover else ""
    if only_cover:
        source = (f'#import "book.typ": *\n#set document(title: {typst_string(book.title)})\n'
                  f"#cover-page({typst_string(book.title)}, {typst_string(SUBTITLE)}, {typst_string(words)})\n")
    else:
        source = _Source(book, root, folder).text(words)
    path = folder / "main.typ"
    path.write_text(source, encoding="utf-8")
    return path


def compile_typst(source: Path, png: bool = False) -> bytes:
    """Typst's PDF (or ``png``, 150 dots an inch) of a source, with fonts from packages only.

    So every computer makes the same pages. Raises ``ValueError`` with Typst's words and the place.
    """
    import typst

    form = {"format": "png", "ppi": 150} if png else {"pdf_standards": ["ua-1"]}
    try:
        return typst.compile(str(source), root=str(source.parent), font_paths=book_fonts(),
                             ignore_system_fonts=True, **form)
    except typst.TypstError as error:
        raise ValueError(f"Typst could not set the book: {error.diagnostic[:2000]}") from error


def book_fonts():
    """Typst's own fonts, Noto for headings and for the world's scripts, Matplotlib's for what figures say."""
    import typst

    folders = []
    for package in ("manimgx_fonts", "manimgx_fonts_cjk", "matplotlib"):
        found = find_spec(package)
        if found is None:
            raise ModuleNotFoundError(f"The PDF needs the package {package}: pip install 'bytes-to-chat[book]', "
                                      "or build only the site with `course.py book html`.")
        folders.append(Path(found.origin).parent)
    folders[2] = folders[2] / "mpl-data" / "fonts" / "ttf"
    return typst.Fonts(include_system_fonts=False, font_paths=folders)


@dataclass(frozen=True)
class Markdown:
    """Text of a notebook that still has to become Typst markup."""

    text: str


class _Source:
    """Collects the texts of a book, has them converted in one go, and writes main.typ from the pieces."""

    def __init__(self, book: Book, root: Path, folder: Path):
        self.book, self.root, self.folder = book, root, folder
        self.fields: list[str] = []
        self.figures = 0

    def text(self, cover: str) -> str:
        """main.typ. Converted texts are put in last, where their numbers stand between two private letters."""
        lines = list(self._lines(cover))
        import pypandoc

        done = markdown_to_typst(self.fields, pypandoc.get_pandoc_path(), self.root / PRINT / "typst.lua")
        source = re.sub(r"\ue002(\d+)\ue003", lambda m: done[int(m[1])], "\n".join(lines))
        return self._checked(source)

    def _checked(self, source: str) -> str:
        """The source, if every link inside the book has its goal; ``ValueError`` naming those without."""
        goals = set(re.findall(r'place: "([^"]+)"', source))
        links = set(re.findall(r'#xref\("([^"]+)"\)', source)) | set(re.findall(r'solution: "([^"]+)"', source))
        missing = sorted(links - goals)
        if missing:
            raise ValueError(f"Links of the book lead nowhere: {', '.join(missing[:10])}. Mend them in the text.")
        return source

    def _lines(self, cover: str) -> Iterator[str]:
        book = self.book
        yield '#import "book.typ": *'
        settings = self._call("x", title=book.title, subtitle=SUBTITLE, version=book.version, commit=book.commit,
                              repository=book.repository, date=datetime.date.today(), cover=cover)
        yield f"#show: book.with{settings[2:]}"
        for part in book.parts:
            if part.pages:
                first = part.pages[0]
                pages = tuple((page.number, page.title, page.label) for page in part.pages)
                yield self._call("part", first.number if first.kind == "chapter" else "", part.title, pages)
            for page in part.pages:
                yield from self._page(page)
        yield from self._references()
        yield "#index()\n#colophon()"

    def _page(self, page: Page) -> Iterator[str]:
        yield self._call("page-opening", page.kind, page.number, page.title, place=page.label)
        level = 1
        for block, following in zip(page.blocks, [*page.blocks[1:], None], strict=True):
            match block:
                case Heading(level=1):
                    continue
                case Heading():
                    level = min(block.level, level + 1)  # PDF/UA: no level may be left out
                    yield self._call("section", level, block.number, Markdown(block.text), place=block.label)
                case Prose() if page.path.name == "glossary":
                    yield from self._glossary(block.markdown)
                case Code() | Output():
                    yield self._lines_of(block, following)
                case Figure():
                    yield self._figure(block)
                case _:
                    yield self._words(block)

    def _words(self, block: Prose | Equation | Callout | Exercise) -> str:
        match block:
            case Prose():
                return self._call("prose", Markdown(block.markdown))
            case Equation():
                formula = Markdown(f"$${block.tex}$$")
                return self._call("numbered-equation", block.number, formula, place=block.label)
            case Callout():
                return self._call("callout", block.kind, block.title, Markdown(block.markdown))
            case Exercise():
                return self._call("exercise", block.number, block.title, block.note, Markdown(block.markdown),
                                  place=block.label, solution=block.solution)
        raise TypeError(f"{type(block).__name__} is no block that the PDF knows; add it to _words.")

    def _glossary(self, markdown: str) -> Iterator[str]:
        """A list of terms, each entry as a paragraph of its own, which hangs in two columns."""
        before, mark, entries = markdown.partition("- **")
        if before.strip():
            yield self._call("prose", Markdown(before))
        if mark:
            yield self._call("glossary", Markdown(re.sub(r"^- ", "\n", mark + entries, flags=re.M)))

    def _lines_of(self, block: Code | Output, following) -> str:
        if isinstance(block, Output):
            widest = max(map(column_width, block.text.split("\n")))
            columns = widest if COLUMNS < widest <= SMALLEST * COLUMNS else COLUMNS  # a table, rather small than broken
            body, wrapped = wrap_lines(block.text, columns=math.ceil(columns))
            return self._call("out", body, kind=block.kind, length=body.count("\n") + 1, wrapped=wrapped,
                              size=COLUMNS / math.ceil(columns))
        body, wrapped = wrap_lines(block.source, python=True)
        return self._call("code", body, module=block.exported, keep=isinstance(following, Output),
                          length=body.count("\n") + 1, wrapped=wrapped)

    def _figure(self, block: Figure) -> str:
        self.figures += 1
        name = f"figures/{self.figures}.{'svg' if block.svg else 'png'}"
        if block.svg:
            (self.folder / name).write_text(block.svg, encoding="utf-8")
        else:
            (self.folder / name).write_bytes(block.png)
        share = min(block.width / FULL_WIDTH, 1.0)
        return self._call("picture", name, block.alt, share, block.number, place=block.label)

    # ------------------------------------------------------------ what the book makes of itself

    def _references(self) -> Iterator[str]:
        if not self.book.references:
            return
        yield self._call("page-opening", "back", "", "Bibliography", place="page-bibliography")
        for entry in self.book.references:
            yield self._call("reference", entry.authors, entry.year, entry.title, entry.where or entry.url,
                             entry.url, entry.cited, place=entry.label)

    def _call(self, name: str, *given, **named) -> str:
        """A call of a function of book.typ with Python's values as Typst's."""
        values = [self._value(value) for value in given]
        values += [f"{key}: {self._value(value)}" for key, value in named.items()]
        return f"#{name}({', '.join(values)})"

    def _value(self, value) -> str:
        match value:
            case Markdown():
                self.fields.append(value.text)
                return f"[\ue002{len(self.fields) - 1}\ue003]"
            case bool() | int() | float():
                return str(value).lower()
            case dict():
                return typst_dictionary(value)
            case tuple():
                return f"({''.join(f'{self._value(one)}, ' for one in value)})"
            case datetime.date():
                return f"datetime(year: {value.year}, month: {value.month}, day: {value.day})"
        return typst_string(value)
