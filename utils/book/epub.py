"""The book as an EPUB: the same blocks as one Markdown text, which pandoc makes into EPUB 3 with MathML.

Figures go in as PNG, which every reading program shows. Words that are not Markdown (titles, captions) are
escaped, code stands in fences longer than any inside it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..workspace import atomic_write
from .blocks import picture_controls
from .cover import Cover
from .pdf import cover_png
from .text import Book, Callout, Code, Equation, Exercise, Figure, Heading, Output, Page, Prose
from .typesetting import INDEX_MARK

DIALECT = ("commonmark+attributes+fenced_divs+bracketed_spans+pipe_tables+strikeout+tex_math_dollars+footnotes"
           "+smart+task_lists+raw_attribute")


def build_epub(book: Book, root: Path, out: Path, cover: Cover | None = None) -> None:
    """Write the book below ``root`` as EPUB 3 and its ``cover``; ``ValueError`` says what pandoc could not."""
    import pypandoc

    with tempfile.TemporaryDirectory(prefix="epub-") as name:
        folder = Path(name)
        (folder / "book.md").write_text("\n\n".join(_book_text(book, folder)), encoding="utf-8")
        command = [pypandoc.get_pandoc_path(), "book.md", "-f", DIALECT, "-t", "epub3", "--mathml", "--toc",
                   "--toc-depth=3", "--split-level=2", f"--css={(root / 'docs/print/epub.css').resolve()}",
                   f"--metadata=title:{book.title}", "--metadata=lang:en-GB", f"--metadata=version:{book.version}",
                   f"--metadata=identifier:{book.repository}#{book.version}", "--metadata=rights:Apache-2.0",
                   "-o", "book.epub"]
        if cover:
            (folder / "cover.png").write_bytes(cover_png(book, root, cover))
            command.append("--epub-cover-image=cover.png")
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
        if done.returncode or "WARNING" in done.stderr:
            raise ValueError(f"pandoc could not make the EPUB: {done.stderr.strip()[:500]}")
        with atomic_write(out) as temporary:
            temporary.write_bytes((folder / "book.epub").read_bytes())


def _book_text(book: Book, folder: Path) -> Iterator[str]:
    for part in book.parts:
        if not part.pages:
            continue
        number = part.pages[0].number if part.pages[0].kind == "chapter" else ""
        yield f"# {_plain_text(f'Part {number}: {part.title}' if number else part.title)} {{.part}}"
        for page in part.pages:
            yield from _page_text(page, folder)
    if book.references:
        yield "## Bibliography {#page-bibliography}"
        for entry in book.references:
            where = f", [{_plain_text(entry.where or entry.url)}]({entry.url})" if entry.url else (
                f", {_plain_text(entry.where)}" if entry.where else "")
            words = f"{_plain_text(entry.authors)} {entry.year}. *{_plain_text(entry.title)}*{where}."
            yield _fenced_div(words, entry.label, "reference")
    commit = f", commit `{book.commit}`" if book.commit else ""
    yield (f"## Colophon {{#page-colophon}}\n\nThis is *{_plain_text(book.title)}*, version {book.version}"
           f"{commit}, made from the executed notebooks of [{_plain_text(book.repository)}]({book.repository}) by "
           "`python3 course.py book epub`.")


def _page_text(page: Page, folder: Path) -> Iterator[str]:
    number = f"{page.number} " if page.number else ""
    yield f"## {_plain_text(number + page.title)} {{#{page.label} .page-{page.kind}}}"
    for block in page.blocks:
        text = _block_text(block, folder)
        if text:
            yield text


def _block_text(block, folder: Path) -> str:
    """One block as Markdown."""
    match block:
        case Heading():
            number = f"{block.number} " if block.number else ""
            marks = "#" * (block.level + 1)
            return f"{marks} {number}{_unmarked(block.text)} {{#{block.label}}}" if block.level > 1 else ""
        case Prose():
            return _unmarked(block.markdown)
        case Equation():
            words = f"$${block.tex}$$" + (f"\n\n({block.number})" if block.number else "")
            return _fenced_div(words, block.label, "equation")
        case Callout():
            words = f"**{_plain_text(block.title)}.** {_unmarked(block.markdown)}"
            return _fenced_div(words, "", f"callout {block.kind}")
        case Exercise():
            note = f" {_plain_text(block.note)}" if block.note else ""
            note += f" [Solution](#{block.solution})" if block.solution else ""
            words = f"**{_plain_text(block.title)}**{note}\n\n{_unmarked(block.markdown)}"
            return _fenced_div(words, block.label, "exercise")
        case Code():
            label = _fenced_div(_plain_text(block.exported), "", "module") + "\n\n" if block.exported else ""
            return label + _fence(block.source, ".python .exported" if block.exported else ".python")
        case Output():
            return _fence(block.text, f".output .{block.kind}")
        case Figure():
            return _picture_text(block, folder)
    raise TypeError(f"{type(block).__name__} is no block that the EPUB knows; add it to _block_text.")


def _picture_text(block: Figure, folder: Path) -> str:
    name = f"{block.label}.png"
    (folder / name).write_bytes(block.png)
    alt = _plain_text(" ".join(block.alt.split()))
    caption = f"**Figure {block.number}** {alt}" if block.number else alt
    share = min(round(block.width / 6.6), 100)
    return _fenced_div(f"![{alt}]({name}){{width={share}%}}\n\n{caption}", block.label, "figure")


def _unmarked(text: str) -> str:
    return INDEX_MARK.sub("", text)


def _plain_text(text: str) -> str:
    """Words as Markdown that says just them: every sign that could mean something is escaped."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", _unmarked(text))


def _fence(text: str, classes: str) -> str:
    text = picture_controls(_unmarked(text))
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks} {{{classes}}}\n{text}\n{ticks}"


def _fenced_div(text: str, label: str, classes: str) -> str:
    marks = " ".join([f"#{label}"] * bool(label) + [f".{name}" for name in classes.split()])
    return f"::::: {{{marks}}}\n{text}\n:::::"
