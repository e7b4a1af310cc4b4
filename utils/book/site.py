"""The book as a web site: each page staged as a notebook for Sphinx, with its numbers, anchors and vector figures.

``build_site`` writes a source folder of notebooks and runs Sphinx with ``docs/site/conf.py`` on it. Numbers of
sections, figures and exercises stand in the blocks already, so Sphinx counts nothing. Figures wait in files of
their own and are put into the finished pages, which keeps Sphinx's memory and the search index small.
"""

from __future__ import annotations

import ast
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from ..launch import BADGES, launch_links, read_place
from ..workspace import ROOT, atomic_write, workspace
from .blocks import Block, Book, Callout, Code, Equation, Exercise, Figure, Heading, Output, Page, Part

WIDEST = 700  # CSS pixels of the text column, which no figure exceeds
ORDER = ("glossary", "further_reading", "bibliography", "api/index", "house", "teaching", "launch", "changelog",
         "colophon", "genindex")  # the back matter
INDEX_MARK = re.compile("\ue000([^\ue001]*)\ue001")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
ENTRY = re.compile(r"^- \*\*(?P<term>.+?)\*\*(?P<forms> \([^)]*\))?: (?P<meaning>.+(?:\n +.+)*)\n*", re.M)
HELD = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)  # code, which stays as it is
FIGURE_FONTS = ("dejavu-sans", "dejavu-sans-bold", "dejavu-sans-oblique")
FORMULA_SIGNS = {code for first, last in (  # Greek, accents, arrows, operators, brackets, letters of the alphabets
    (0x370, 0x3FF), (0x300, 0x33F), (0x2016, 0x2016), (0x2032, 0x2034), (0x20D7, 0x20D7), (0x2190, 0x21D5),
    (0x2200, 0x22FF), (0x2308, 0x230B), (0x27E8, 0x27E9), (0x2A7D, 0x2A7E), (0x1D400, 0x1D467), (0x1D49C, 0x1D4CF),
    (0x1D538, 0x1D56B), (0x1D6A4, 0x1D6A5), (0x1D6FC, 0x1D71B), (0x2102, 0x2102), (0x2107, 0x2113),
    (0x2115, 0x211D)) for code in range(first, last + 1)}
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
          "language_info": {"name": "python", "pygments_lexer": "ipython3"}}


def build_site(book: Book, root: Path = ROOT, out: Path | None = None) -> Path:
    """Write the site of ``book`` into the folder ``out`` (``workspace/book/html``) and return its first page.

    The old site stays where it is until the new one is whole. Raises ``ValueError`` with Sphinx's words when it
    has a warning: a link that leads nowhere, for instance.
    """
    root, out = Path(root), Path(out) if out else workspace("book") / "html"
    with tempfile.TemporaryDirectory(prefix="site-", dir=workspace("book")) as name:
        stage(book, root, Path(name) / "source")
        _run_sphinx(root, Path(name))
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(Path(name) / "html", out)
    return out / "index.html"


def _run_sphinx(root: Path, folder: Path) -> None:
    """Sphinx on ``folder/source``, into ``folder/html``; it reads the chapters' modules for the API pages."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "2",
               "-c", str(root / "docs" / "site"), "-d", str(folder / "doctrees"),
               str(folder / "source"), str(folder / "html")]
    environment = {**os.environ, "BOOK_SOURCE": str(folder / "source"), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        said = done.stderr.replace(str(folder / "source") + os.sep, "")
        raise ValueError("The site was not written: Sphinx has something to say about the pages, and warnings "
                         f"count as errors (end code {done.returncode}).\n{said[-20000:]}")


# ---------------------------------------------------------------- the source folder


def stage(book: Book, root: Path, folder: Path) -> None:
    """Write everything that Sphinx reads into ``folder``: pages, figures, fonts, and what ``conf.py`` asks for."""
    for made in ("_figures", "_made/figures", "_made/fonts", "api"):
        (folder / made).mkdir(parents=True, exist_ok=True)
    pages = [page for part in book.parts for page in part.pages]
    for page in pages:
        _write_page(page, root, folder)
    definitions = {page.label: list(_definitions(page)) for page in pages}
    _write_api(book, definitions, folder)
    (folder / "bibliography.md").write_text(_bibliography(book), encoding="utf-8")
    (folder / "colophon.md").write_text(_colophon(book), encoding="utf-8")
    _write_landing(book, root, folder)
    _write_fonts(folder)
    _write_settings(book, root, folder, pages, definitions)


def _write_settings(book: Book, root: Path, folder: Path, pages: list[Page], definitions: dict) -> None:
    place = read_place(root)
    notebooks = {docname(page.path): page.path.as_posix() + ".ipynb" for page in pages
                 if (root / page.path).with_suffix(".ipynb").exists()}
    launch = {name: {BADGES[where].removeprefix("Open in ").removeprefix("Open with "): link
                     for where, link in launch_links(place, path).items()} for name, path in notebooks.items()}
    sections = {f"{module}.{name}": [label, title] for page in pages
                for module, name, label, title in definitions[page.label]}
    settings = {"title": book.title, "version": book.version, "commit": book.commit, "repository": book.repository,
                "address": f"https://{place.owner.lower()}.github.io/{place.name}/", "branch": place.branch,
                "launch": launch, "notebooks": notebooks, "sections": sections}
    (folder / "_site.json").write_text(json.dumps(settings), encoding="utf-8")


def docname(path: Path | PurePosixPath) -> str:
    """The name of a page on the site: pages of ``docs`` lie at the top, notebooks in their chapter's folder."""
    return PurePosixPath(*path.parts[1:] if path.parts[0] == "docs" else path.parts).as_posix()


def _write_page(page: Page, root: Path, folder: Path) -> None:
    """One page as a notebook, its figures beside it."""
    name = docname(page.path)
    up = "../" * name.count("/")
    cells = [cell for block, outputs in _grouped(page.blocks) for cell in _cells(block, outputs, page, up)]
    for figure in (block for block in page.blocks if isinstance(block, Figure)):
        _write_figure(figure, folder)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    path = folder / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


def _grouped(blocks: Iterable[Block]) -> Iterator[tuple[Block, list[Output]]]:
    """Each block, code together with the text outputs that follow it at once."""
    waiting: tuple[Block, list[Output]] | None = None
    for block in blocks:
        if waiting and isinstance(waiting[0], Code) and isinstance(block, Output):
            waiting[1].append(block)
            continue
        if waiting:
            yield waiting
        waiting = (block, [])
    if waiting:
        yield waiting


# ---------------------------------------------------------------- a block as cells


def _cells(block: Block, outputs: list[Output], page: Page, up: str) -> list[dict]:
    if isinstance(block, Code):
        return [_code_cell(block.source, outputs), *_exported(block, up)]
    if isinstance(block, Output):  # one that follows a figure, and so stands apart from its code
        return [_markdown_cell(_printed(block))]
    return [_markdown_cell(markdown_of(block, page, up))]


def _markdown_cell(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def _printed(output: Output) -> str:
    """What was printed, as Markdown that looks like the output of a cell."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", output.text))])
    return (f":{fence.replace('`', ':')}{{container}} printed\n{fence}text\n{output.text}\n{fence}\n"
            f":{fence.replace('`', ':')}")


def _code_cell(source: str, outputs: list[Output]) -> dict:
    streams = [{"output_type": "stream", "name": "stderr" if output.kind == "error" else "stdout",
                "text": output.text} for output in outputs]
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "source": source,
            "outputs": streams}


def _exported(block: Code, up: str) -> list[dict]:
    if not block.exported:
        return []
    chapter, _, module = block.exported.partition("/")
    target = f"{up}api/{chapter}.html#{_module_anchor(block.exported)}"
    link = f'<a href="{target}">{chapter}/<wbr>{module}</a>'
    return [_markdown_cell(f'<p class="exported">in the library: {link}</p>')]


def _module_anchor(exported: str) -> str:
    return "module-" + exported.removesuffix(".py").replace("/", ".")


def markdown_of(block: Block, page: Page, up: str = "") -> str:
    """A block that is not code, as MyST Markdown; ``up`` is the way from its page to the top of the site."""
    if isinstance(block, Heading):
        return _heading(block, page)
    if isinstance(block, Equation):
        number = f'<div class="eqno">({block.number})</div>' if block.number else ""
        opened = f'{_target(block.label)}<div class="equation"{_id(block.label)}>'
        return f"{opened}\n\n$$\n{block.tex.strip()}\n$$\n\n{number}</div>"
    if isinstance(block, Callout):
        return _admonition(block.kind, block.title, block.markdown)
    if isinstance(block, Exercise):
        title = f"{block.title} {block.note}".strip()
        solution = f"\n\n[Solution](#{block.solution})" if block.solution else ""
        return _target(block.label) + _admonition("exercise", title, block.markdown + solution)
    if isinstance(block, Figure):
        return _target(block.label) + _figure(block, up)
    if page.path.name == "glossary":
        return _glossary(block.markdown)
    return myst(block.markdown)


def _target(label: str) -> str:
    """What links to a label need before the block that has it; HTML needs ``_id`` too."""
    return f"({label})=\n\n" if label else ""


def _id(label: str) -> str:
    return f' id="{label}"' if label else ""


def _heading(heading: Heading, page: Page) -> str:
    labels = dict.fromkeys([page.label, heading.label] if heading.level == 1 else [heading.label])
    text = f"{heading.number}\u2002{heading.text}" if heading.number else heading.text
    title = "".join(f"({label})=\n" for label in labels if label) + f"{'#' * heading.level} {myst(text)}"
    return f"{title}\n\n<!--launch-->" if heading.level == 1 and page.path.parts[0] != "docs" else title


def _admonition(kind: str, title: str, markdown: str) -> str:
    fence = ":" * max([3, *(len(run) + 1 for run in re.findall(r"^:{3,}", markdown, re.M))])
    return f"{fence}{{admonition}} {myst(title)}\n:class: {kind}\n\n{myst(markdown)}\n{fence}"


def myst(markdown: str) -> str:
    """Markdown as MyST reads it: index marks as roles, and lines that MyST would take for its own kept as text."""
    parts = HELD.split(markdown)
    for number in range(0, len(parts), 2):
        text = INDEX_MARK.sub(r"{idx}`\1`", parts[number])
        parts[number] = re.sub(r"^(\s*)(%|\+\+\+|\([\w-]+\)=)", r"\1\\\2", text, flags=re.M)
    return "".join(parts)


def _glossary(markdown: str) -> str:
    """The list of terms as Sphinx's glossary, which gives each an anchor and a place in the index."""
    found = list(ENTRY.finditer(markdown))
    if not found:
        return myst(markdown)
    entries = "\n\n".join(f"{entry['term']}\n  {_forms(entry['forms'])}{myst(' '.join(entry['meaning'].split()))}"
                          for entry in found)
    before, after = markdown[:found[0].start()], markdown[found[-1].end():]
    return f"{myst(before)}\n\n````{{glossary}}\n{entries}\n````\n\n{myst(after)}"


def _forms(brackets: str | None) -> str:
    return f"{brackets.strip()} " if brackets else ""


# ---------------------------------------------------------------- figures


def _figure(figure: Figure, up: str) -> str:
    """A figure's place: conf.py puts the SVG where the comment stands, so that Sphinx need not carry it."""
    inner = f"<!--figure {figure.label}-->" if figure.svg else _image(figure, up)
    caption = f"<figcaption>Figure {figure.number}</figcaption>" if figure.number else ""
    return f'<figure class="plot"{_id(figure.label)}><div class="scrolls">{inner}</div>{caption}</figure>'


def _image(figure: Figure, up: str) -> str:
    wide, high = struct.unpack(">II", figure.png[16:24])
    return (f'<img src="{up}_static/figures/{figure.label}.png" alt="{html.escape(figure.alt)}" '
            f'width="{figure.width}" height="{round(figure.width * high / wide)}" '
            f'style="--wide:{figure.width}px" loading="lazy">')


def _write_figure(figure: Figure, folder: Path) -> None:
    if figure.svg:
        (folder / "_figures" / f"{figure.label}.svg").write_text(inline_svg(figure), encoding="utf-8")
    else:
        (folder / "_made" / "figures" / f"{figure.label}.png").write_bytes(figure.png)


def inline_svg(figure: Figure) -> str:
    """A figure's SVG as it stands in a page: with its alternative text and size, without a style of its own."""
    svg = figure.svg[figure.svg.index("<svg"):]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<style\b.*?</style>|<title>.*?</title>|<!--.*?-->", "", svg)
    head, body = re.match(r"(<svg\b[^>]*>)(.*)", svg, re.S).groups()
    box = re.search(r'viewBox="([^"]*)"', head)[1]
    wide, high = (float(number) for number in box.split()[2:])
    width = min(figure.width, WIDEST)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
            f'width="{width}" height="{round(width * high / wide)}" style="--wide:{width}px" role="img" '
            f'aria-label="{html.escape(figure.alt)}">{body}')


# ---------------------------------------------------------------- pages that are made


def _definitions(page: Page) -> Iterator[tuple[str, str, str, str]]:
    """(module, name, label of the section, its title) for what a notebook's exported cells define."""
    label, title = page.label, page.title
    for block in page.blocks:
        if isinstance(block, Heading):
            label = block.label or label
            title = f"section {block.number}" if block.number and block.level > 1 else f"“{block.text}”"
        elif isinstance(block, Code) and block.exported:
            module = block.exported.removesuffix(".py").replace("/", ".")
            for node in ast.parse(block.source).body:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    yield module, node.name, label, title


def _write_api(book: Book, definitions: dict, folder: Path) -> None:
    """A page of the API for each chapter, and one that lists them."""
    lines = ["(page-api)=", "# The library", "",
             "What the chapters define, from the docstrings of their code. Each name leads back to the section "
             "that builds it. A name is imported from its module, for example "
             "`from ch03_attention.attention import MultiHeadAttention`.", "", "```{toctree}", ":maxdepth: 1", ""]
    for part in book.parts:
        modules = list(dict.fromkeys(module for page in part.pages for module, *_ in definitions[page.label]))
        if not modules:
            continue
        chapter = modules[0].partition(".")[0]
        lines.append(chapter)
        (folder / "api" / f"{chapter}.rst").write_text(_api_page(part, chapter, modules), encoding="utf-8")
    (folder / "api" / "index.md").write_text("\n".join([*lines, "```", ""]), encoding="utf-8")


def _api_page(part: Part, chapter: str, modules: list[str]) -> str:
    title = f"Library of chapter {int(chapter[2:4])}: {chapter}"
    lines = [title, "=" * len(title), ""]
    pages = {page.path.as_posix().replace("/", "."): page for page in part.pages}
    for module in modules:
        page = pages.get(module)
        of = f"From :ref:`{page.title.replace('`', '')} <{page.label}>`." if page else ""
        lines += [module, "-" * len(module), "", of, "", f".. automodule:: {module}", "   :members:", ""]
    return "\n".join(lines)


def _bibliography(book: Book) -> str:
    titles = {page.label: (f"{page.number} " if page.number else "") + page.title
              for part in book.parts for page in part.pages}
    lines = ["(page-bibliography)=", "# Bibliography", "",
             "The works that the notebooks name, each with the pages that name it.", ""]
    for entry in book.references:
        where = f"[{entry.where or entry.url}]({entry.url})" if entry.url else entry.where
        named = ", ".join(f"[{titles[label]}](#{label})" for label in entry.cited if label in titles)
        text = f"{entry.authors} ({entry.year}). *{entry.title}*." + (f" {where}." if where else "")
        lines += [f"({entry.label})=", "", f'<div class="work"{_id(entry.label)}>', "",
                  text + (f' <span class="cited">Named in {named}.</span>' if named else ""), "", "</div>", ""]
    return "\n".join(lines)


def _colophon(book: Book) -> str:
    commit = f"[{book.commit}]({book.repository}/commit/{book.commit})" if book.commit else "an unknown commit"
    return f"""(page-colophon)=
# Colophon

{book.title}, version {book.version}, from commit {commit}. The text, the code and the figures come from the
notebooks as they are committed, with the outputs that their last run left in them; nothing is executed to make
these pages. `python3 course.py book` makes them anew.

The pages are set in Noto Sans, code in DejaVu Sans Mono, the words in figures in DejaVu Sans and formulas in
STIX Two Math; all four are free fonts and lie with the pages. Noto and STIX are under the SIL Open Font License,
DejaVu under its own licence. Sphinx, MyST-NB and the Sphinx Book Theme make the site; pandoc turns the formulas
into MathML, which browsers draw by themselves. Nothing is loaded from anywhere else, and nobody is counted.

Text, code and figures: Apache License 2.0.
"""


# ---------------------------------------------------------------- the landing page


def _write_landing(book: Book, root: Path, folder: Path) -> None:
    """``docs/index.md`` with its links led to the pages of the site, and the contents that Sphinx follows."""
    text = (root / "docs" / "index.md").read_text(encoding="utf-8")
    text = LINK.sub(partial(_landing_link, book=book, root=root, folder=folder), text)
    about = f"{book.title}: build a large language model from raw text, in six notebooks of plain PyTorch."
    lines = ["---", "myst:", "  html_meta:", f'    description: "{about}"', "---", "", text.rstrip(), ""]
    names = {docname(page.path) for part in book.parts for page in part.pages}
    for part in book.parts:
        pages = [docname(page.path) for page in part.pages]
        if part is book.parts[-1]:
            pages += [name for name in ("bibliography", "api/index", "colophon", "genindex") if name not in names]
            pages.sort(key=lambda name: ORDER.index(name) if name in ORDER else ORDER.index("house"))
        first = part.pages[0] if part.pages else None
        caption = f"Chapter {first.number}" if first and first.kind == "chapter" else part.title
        lines += ["```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```", ""]
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")


def _landing_link(found: re.Match, book: Book, root: Path, folder: Path) -> str:
    picture, words, target = found.groups()
    if re.match(r"[a-z]+:|#", target):
        return found[0]
    path, _, anchor = target.partition("#")
    place = PurePosixPath(os.path.relpath((root / "docs" / path).resolve(), root.resolve()).replace(os.sep, "/"))
    if picture:
        shutil.copy(root / place, folder / "_made" / place.name)
        return f"![{words}](_made/{place.name})"
    for page in (page for part in book.parts for page in part.pages):
        if page.path == Path(place).with_suffix(""):
            return f"[{words}](#{page.label})"
    if place.as_posix() in ("docs/bibliography.md", "docs/colophon.md", "docs/api.md"):
        return f"[{words}](#page-{place.stem})"
    return f"[{words}]({book.repository}/blob/{read_place(root).branch}/{place})"


# ---------------------------------------------------------------- fonts


def _fonts() -> dict[str, Path]:
    """Name on the site -> file in an installed package."""
    matplotlib, noto = _package("matplotlib") / "mpl-data" / "fonts" / "ttf", _package("manimgx_fonts")
    return {"noto-sans": noto / "NotoSans[wght].ttf",
            "noto-sans-italic": noto / "NotoSans-Italic[wght].ttf",
            "dejavu-sans": matplotlib / "DejaVuSans.ttf",
            "dejavu-sans-bold": matplotlib / "DejaVuSans-Bold.ttf",
            "dejavu-sans-oblique": matplotlib / "DejaVuSans-Oblique.ttf",
            "dejavu-sans-mono": matplotlib / "DejaVuSansMono.ttf",
            "dejavu-sans-mono-bold": matplotlib / "DejaVuSansMono-Bold.ttf",
            "stix-two-math": _package("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"}


def _package(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if not spec or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The package {name}, which brings a font for the book, is not installed: run "
                                  "python3 course.py book, which installs what the book needs.")
    return Path(next(iter(spec.submodule_search_locations)))


def _write_fonts(folder: Path) -> None:
    """What the pages need of each font, as WOFF2; what was made for the same characters before is taken again."""
    text = _characters([*folder.rglob("*.ipynb"), *folder.rglob("*.md")])
    figures = _characters(folder.rglob("*.svg"))
    for name, source in _fonts().items():
        wanted = figures if name in FIGURE_FONTS else text | figures if name.startswith("dejavu") else text
        codes = sorted(wanted | FORMULA_SIGNS) if name.startswith("stix") else sorted(wanted)
        made = f"{source.name}-{source.stat().st_size}-{codes}"
        kept = workspace("book", "fonts") / f"{name}-{hashlib.sha256(made.encode()).hexdigest()[:16]}.woff2"
        if not kept.exists():
            with atomic_write(kept) as temporary:
                _subset(source, codes, temporary)
        shutil.copyfile(kept, folder / "_made" / "fonts" / f"{name}.woff2")


def _characters(paths: Iterable[Path]) -> set[int]:
    """Every character in these files, with those that typography may put in their place."""
    found = {*map(chr, range(0x20, 0x7F)), *map(chr, range(0xA0, 0x180)), *"‘’“”–…−×·→←↑↓"}
    for path in paths:
        found |= set(path.read_text(encoding="utf-8"))
    return {ord(character) for character in found}


def _subset(source: Path, codes: list[int], target: Path) -> None:
    """Write these characters of a font as WOFF2."""
    from fontTools import subset
    from fontTools.ttLib import TTFont
    font = TTFont(source, lazy=True)
    options = subset.Options(notdef_outline=True, hinting=False)
    options.layout_features = ["kern", "mark", "mkmk", "ccmp", "locl", "ssty", "dtls", "flac"]
    options.drop_tables += ["DSIG", "FFTM"]
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=codes)
    subsetter.subset(font)
    font.flavor = "woff2"
    font.save(target)
