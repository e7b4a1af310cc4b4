"""The PDF and the EPUB of the book, read back by programs that did not write them.

The PDF is read with pypdfium2, which knows nothing of Typst; what must be in it is counted from the notebooks
themselves, not from the book's blocks. A small book of everything nasty is made beside the whole one.
"""

import ctypes
import io
import posixpath
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure as Drawing

pdfium = pytest.importorskip("pypdfium2", reason="reading a PDF back needs pypdfium2 (tests/requirements.txt)")
pytest.importorskip("typst", reason="the PDF needs the extra 'book'")

from conftest import ROOT  # noqa: E402

from utils.book import read_book  # noqa: E402
from utils.book.cover import Cover, draw_cover  # noqa: E402
from utils.book.epub import build_epub  # noqa: E402
from utils.book.packing import pack_pdf  # noqa: E402
from utils.book.pdf import build_pdf, compile_typst, write_typst  # noqa: E402
from utils.book.text import (  # noqa: E402
    Book,
    Callout,
    Code,
    Equation,
    Exercise,
    Figure,
    Heading,
    Output,
    Page,
    Part,
    Prose,
)
from utils.book.typesetting import COLUMNS, column_width, markdown_to_typst, typst_string, wrap_lines  # noqa: E402

raw = pdfium.raw
MM = 72 / 25.4
LEFT, RIGHT, TOP, BOTTOM = 20 * MM, 195 * MM, 9 * MM, 290 * MM  # nothing is printed outside, from the upper left
TEXT_RIGHT = 169 * MM  # paragraphs end here; code, figures and tables may go on to RIGHT
UNBROKEN = "x" * 300
CAPTION = re.compile(r"Figure [DS]?\d+\.\d+")
SPOKEN = "日本語, 한국어, नमस्ते, ไทย, مرحبا, 😀 🦆"


# ---------------------------------------------------------------- reading a PDF


@dataclass
class Words:
    """Text in one font: its box from the upper left in points, its font, what it says ("" for code)."""

    left: float
    top: float
    right: float
    bottom: float
    font: str
    embedded: bool
    text: str


@dataclass
class Sheet:
    """One page as it was read back."""

    words: list[Words] = field(default_factory=list)
    text: str = ""
    links: list[int] = field(default_factory=list)  # pages that links inside the book lead to, -1 for none
    alternatives: list[str] = field(default_factory=list)
    ink: tuple[int, ...] = ()  # dark spots left, right, above and below the printed area


class Read:
    """A PDF with all its pages read."""

    def __init__(self, path: Path):
        self.path = path
        self.document = pdfium.PdfDocument(path)
        self.sheets = [read_sheet(self.document, page) for page in self.document]
        self.text = "\n".join(sheet.text for sheet in self.sheets)
        self.toc = [(mark.level, mark.get_title(), *place_of(mark.get_dest())) for mark in self.document.get_toc()]


def read_sheet(document, page) -> Sheet:
    textpage = page.get_textpage()
    sheet = Sheet(text=textpage.get_text_range().replace("\r\n", "\n"))
    height = page.get_height()
    for thing in page.get_objects(max_depth=1, textpage=textpage):
        if thing.type == raw.FPDF_PAGEOBJ_TEXT:
            left, low, right, high = thing.get_bounds()
            font = thing.get_font()
            name = font.get_base_name()
            words = "" if "Mono" in name else said(thing, textpage)  # code: see the page's text
            sheet.words.append(Words(left, height - high, right, height - low, name, font.is_embedded, words))
    sheet.links = list(links_of(document, page))
    sheet.alternatives = list(alternatives_of(page)) if "Figure " in sheet.text else []
    sheet.ink = ink_outside(page)
    return sheet


def said(thing, textpage) -> str:
    """What a text object says; half a surrogate pair, which pdfium gives for some emoji, is left out."""
    length = raw.FPDFTextObj_GetText(thing, textpage, None, 0)
    buffer = (ctypes.c_ushort * (length // 2 + 1))()
    raw.FPDFTextObj_GetText(thing, textpage, buffer, length)
    return bytes(buffer).decode("utf-16-le", "ignore").split("\0")[0]


def links_of(document, page):
    at, link = ctypes.c_int(0), raw.FPDF_LINK()
    while raw.FPDFLink_Enumerate(page, at, link):
        action = raw.FPDFLink_GetAction(link)
        if action and raw.FPDFAction_GetType(action) == raw.PDFACTION_URI:
            continue
        goal = raw.FPDFLink_GetDest(document, link) or (action and raw.FPDFAction_GetDest(document, action))
        yield raw.FPDFDest_GetDestPageIndex(document, goal) if goal else -1


def alternatives_of(page):
    """The alternative texts of the pictures that have something drawn on this page, from its tags; "" for none."""
    tree = raw.FPDF_StructTree_GetForPage(page)
    todo = [raw.FPDF_StructTree_GetChildAtIndex(tree, i) for i in range(raw.FPDF_StructTree_CountChildren(tree))]
    while todo:
        element = todo.pop()
        if not element:
            continue
        if spoken(raw.FPDF_StructElement_GetType, element) == "Figure":
            yield spoken(raw.FPDF_StructElement_GetAltText, element)
        todo += [raw.FPDF_StructElement_GetChildAtIndex(element, i)
                 for i in range(raw.FPDF_StructElement_CountChildren(element))]
    raw.FPDF_StructTree_Close(tree)


def spoken(ask, *given) -> str:
    """A text that pdfium writes into a buffer, as UTF-16."""
    length = ask(*given, None, 0)
    buffer = (ctypes.c_ushort * (length // 2))()
    ask(*given, buffer, length)
    return bytes(buffer).decode("utf-16-le").rstrip("\0")


def place_of(goal) -> tuple[int, float]:
    """Page index and height from above (points) that a bookmark leads to."""
    known, there = [ctypes.c_int() for _ in range(3)], [ctypes.c_float() for _ in range(3)]
    raw.FPDFDest_GetLocationInPage(goal, *known, *there)
    return goal.get_index(), 297 * MM - there[1].value


def ink_outside(page, scale: float = 0.6) -> tuple[int, ...]:
    """How many spots of the page, drawn small, are dark left, right, above and below of the printed area."""
    dark = page.render(scale=scale, grayscale=True).to_numpy().squeeze() < 200
    left, right, top, bottom = (round(x * scale) for x in (LEFT, RIGHT, TOP, BOTTOM))
    return tuple(int(part.sum()) for part in (dark[:, :left - 1], dark[:, right + 2:], dark[:top], dark[bottom:]))


# ---------------------------------------------------------------- a small book of everything nasty


def drawing() -> tuple[str, bytes]:
    picture = Drawing(figsize=(6.6, 3))
    picture.subplots().plot([1, 3, 2])
    png, svg = io.BytesIO(), io.StringIO()
    picture.savefig(png, format="png")
    picture.savefig(svg, format="svg")
    return svg.getvalue()[svg.getvalue().index("<svg"):], png.getvalue()


def nasty_blocks() -> list:
    svg, png = drawing()
    eight = "|" + "|".join(f" column {i} " for i in range(8)) + "|\n|" + "---|" * 8 + "\n"
    eight += ("|" + "|".join(f" `a_long_name_number_{i}` and words " for i in range(8)) + "|\n") * 3
    return [
        Heading(1, "9", "Everything nasty", "page-one"),
        Prose("Hash # dollar $ at @ star * backslash \\ under_score <unk> tilde ~ percent % {} [x] `#let x = $1$`"
              f" and \ue000attention\ue001**attention**. {SPOKEN}. See [the next page](#page-two) and "
              "[section 9.1](#sec-9-1). `" + "a_very_long.name(of_code)" * 9 + "` ends here.[^1]\n\n"
              "[^1]: A footnote."),
        Heading(2, "9.1", "A section with `code_x` and $x^2$", "sec-9-1"),
        Heading(4, "", "Two levels deeper", "sec-deeper"),
        Prose('- " Paris" and "London", it\'s\n- second\n\n1. one\n2. two\n\n> quoted\n\n```bash\n# a shell\n'
              f"echo {UNBROKEN}\n```\n\n{eight}"),
        Equation(r"J(A, B) = \frac{|A \cap B|}{|A \cup B|} \otimes \sum_i x_i", "9.1", "eq-9-1"),
        Callout("predict", "Before you run the next cell", "What will happen? `1/0`"),
        Code(f'text = "{UNBROKEN}"  # {"a comment that goes on " * 9}\nprint("#let $ @ \\\\ \\" ` ``` ```` ]")\n'
             f'word = "{SPOKEN}"\n' + "value = 1\n" * 120, "ch09_nasty/nasty.py"),
        Output(f"{UNBROKEN}\n\x07\x00 bell {SPOKEN}\n" + "row " * 60, "text"),
        Output("Traceback (most recent call last):\nZeroDivisionError: division by zero", "error"),
        Figure(svg, png, 'A line with "quotes", #hash, $5 and *stars*.', 660, "9.1", "fig-9-1"),
        Figure("", png, "The same without vectors.", 330, "9.2", "fig-9-2"),
        Exercise("9.1", "Exercise 9.1", "(by hand)", "Find **it**.\n\n- a\n- b", "ex-9-1"),
    ]


@pytest.fixture(scope="session")
def small_book() -> Book:
    one = Page(PurePosixPath("ch09_nasty/nasty"), "chapter", "9", "Everything #nasty", "page-one", nasty_blocks())
    two = Page(PurePosixPath("docs/glossary"), "back", "", "Glossary", "page-two", [
        Heading(1, "", "Glossary", "page-two"),
        Prose("Words.\n\n- **attention**: a weighted average ([section 9.1](#sec-9-1)).\n- **byte**: eight.")])
    return Book("A small book", [Part("Nasty", [one]), Part("At the end", [two])], [], "1.0", "abc1234",
                "https://example.org/a/b")


@pytest.fixture(scope="session")
def small(small_book, tmp_path_factory) -> Read:
    path = tmp_path_factory.mktemp("small") / "small.pdf"
    build_pdf(small_book, ROOT, path)
    return Read(path)


def test_small_book_keeps_every_letter(small):
    """Code, outputs and signs arrive as they were: nothing is taken for a command of Typst."""
    squeezed = re.sub(r"\s+", "", small.text)
    for words in ("Hash#dollar$at@star*backslash\\under_score<unk>", "#letx=$1$",
                  'print("#let$@\\\\\\"````````]")', "division by zero",
                  "日本語", "한국어", "ไทย", 'Alinewith"quotes",#hash,$5and*stars*.'):
        assert re.sub(r"\s+", "", words) in squeezed, words
    assert squeezed.count("x" * 40) >= 6  # the unbroken word, broken
    assert "“ Paris” and “London”, it’s" in small.text
    assert small.text.count("value = 1") == 120


def test_small_book_stays_inside_the_margins(small):
    check_margins(small)


def test_small_book_has_its_parts(small):
    titles = [title for _, title, _, _ in small.toc]
    for expected in ("Part 9: Nasty", "9 Everything #nasty", "Glossary", "Index", "Colophon"):
        assert any(expected in " ".join(title.split()) for title in titles), (expected, titles)
    assert "Exercise 9.1 (by hand)" in small.text and "(9.1)" in small.text
    assert "ch09_nasty/nasty.py" in small.text and "A footnote." in small.text
    assert sorted(alt for sheet in small.sheets for alt in sheet.alternatives) == [
        'A line with "quotes", #hash, $5 and *stars*.', "The same without vectors."]


def test_index_gives_the_page_of_the_term(small):
    page = next(i for i, sheet in enumerate(small.sheets, 1) if "and attention." in " ".join(sheet.text.split()))
    index = next(sheet.text for sheet in reversed(small.sheets) if sheet.text.lstrip().startswith("Index"))
    assert re.search(rf"attention\s+{page}\b", index), index


def test_page_of_a_link_is_printed_beside_it(small):
    page = next(i for i, sheet in enumerate(small.sheets, 1) if sheet.text.startswith("Glossary"))
    assert f"the next page (p. {page})" in " ".join(small.text.replace("\xa0", " ").split())


def test_every_font_is_embedded_in_the_small_book(small):
    assert all(words.embedded for sheet in small.sheets for words in sheet.words)


def test_link_without_a_goal_is_an_error(small_book, tmp_path):
    page = Page(PurePosixPath("a/b"), "front", "", "One", "page-a", [Prose("[x](#sec-77) and [y](#page-a)")])
    with pytest.raises(ValueError, match="sec-77"):
        build_pdf(Book("t", [Part("p", [page])], [], "1", "", "https://example.org"), ROOT, tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


def test_text_that_swallows_the_next_is_an_error():
    import pypandoc
    with pytest.raises(ValueError, match="close its code fence"):
        markdown_to_typst(["fine", "```\nnever closed", "lost"], pypandoc.get_pandoc_path(),
                          ROOT / "docs/print/typst.lua")


@pytest.mark.parametrize("line", [UNBROKEN, "    " + "word " * 70, "x = [" + "1, " * 100 + "]", "日本語" * 50, "",
                                  " " * 200, "a" * COLUMNS, "a" * (COLUMNS + 1), "\t" * 40 + "x"])
def test_wrapped_lines_fit_and_lose_nothing(line):
    text, continued = wrap_lines(line)
    pieces = text.split("\n")
    assert all(column_width(piece) <= COLUMNS for piece in pieces)
    assert set(continued) == set(range(2, len(pieces) + 1))
    joined = pieces[0] + "".join(piece[continued[n][0]:] for n, piece in enumerate(pieces[1:], 2))
    assert joined == line.expandtabs(4)


def test_wrapped_string_and_comment_keep_their_colour():
    string, comment = '"' + "s" * 150 + '"', "# " + "c" * 150
    text, continued = wrap_lines(f"a = f({string}, 1)\nb = 2  {comment}", python=True)
    lines = text.split("\n")
    kinds = {look for _, _, look in continued.values()}
    assert kinds == {"s", "c"}
    number = next(n for n, (_, _, look) in continued.items() if look == "s")
    indent, held, _ = continued[number]
    assert lines[number - 1][indent + held:] == ", 1)"


def test_typst_string_says_the_text_and_nothing_else():
    import json

    import typst
    nasty = 'quote " backslash \\ #let $x$ \n new \\u{41} \\n'
    assert json.loads(typst.eval(b"", typst_string(nasty))) == nasty


def test_packed_pdf_shows_the_same_pages(small_book, tmp_path):
    data = compile_typst(write_typst(small_book, ROOT, tmp_path))
    packed = pack_pdf(data)
    before, after = pdfium.PdfDocument(data), pdfium.PdfDocument(packed)
    assert len(packed) < len(data) and len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.render(scale=0.5).to_numpy(), other.render(scale=0.5).to_numpy())
    assert [m.get_title() for m in before.get_toc()] == [m.get_title() for m in after.get_toc()]
    with pytest.raises(ValueError, match="cross-reference table"):
        pack_pdf(packed)


def test_cover_draws_the_weights():
    weights = np.zeros((1, 1, 4, 4))
    weights[0, 0, 3, 1] = 1.0
    svg = ElementTree.fromstring(draw_cover(Cover(weights, ("a", "b", "<c>", "d"))))
    paths = [e for e in svg.iter() if e.tag.endswith("path")]
    words = [e.text for e in svg.iter() if e.tag.endswith("text")]
    assert len(paths) == 1 and words == ["a", "b", "<c>", "d"]
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\).*3 tokens"):
        Cover(weights, ("a", "b", "c"))


# ---------------------------------------------------------------- the whole book


@pytest.fixture(scope="session")
def book() -> Book:
    return read_book(ROOT)


@pytest.fixture(scope="session")
def whole(book, tmp_path_factory) -> Read:
    path = tmp_path_factory.mktemp("whole") / "bytes-to-chat.pdf"
    weights = np.tril(np.random.default_rng(0).random((2, 2, 12, 12)))
    build_pdf(book, ROOT, path, Cover(weights, tuple("tokens of it".ljust(12))))
    return Read(path)


@pytest.fixture(scope="session")
def notebooks(book) -> list:
    """The notebooks of the book, as they lie in the repository."""
    paths = sorted(path for path in ROOT.glob("ch0*/*.ipynb") if path.stem != "assignment")
    assert {f"{page.path}.ipynb" for page in book.pages if not str(page.path).startswith("docs")} == {
        path.relative_to(ROOT).as_posix() for path in paths}
    return [nbformat.read(path, as_version=4) for path in paths]


def check_margins(read: Read) -> None:
    """No text box and no ink outside of the printed area; the cover, which fills its page, is left out."""
    for number, sheet in enumerate(read.sheets, start=1):
        if number == 1 and "Contents" not in sheet.text:
            continue
        assert sheet.ink == (0, 0, 0, 0), f"page {number}: ink left, right, above, below: {sheet.ink}"
        for words in sheet.words:
            assert words.left >= LEFT - 2 and words.right <= RIGHT + 2, f"page {number}: {words}"
            assert words.top >= TOP and words.bottom <= BOTTOM, f"page {number}: {words}"


def test_nothing_outside_the_margins(whole):
    check_margins(whole)


def test_paragraphs_end_at_their_column(whole):
    """Between parts and back matter, words in the text's own font never run into the margin beside them."""
    last = next(page for level, title, page, _ in whole.toc if level == 0 and "At the end" in title)
    for number, sheet in enumerate(whole.sheets[:last], start=1):
        over = [w for w in sheet.words if "Libertinus" in w.font and w.text.strip() and w.right > TEXT_RIGHT + 4]
        assert not over or number == 1, f"page {number}: {over[:3]}"


def test_every_figure_has_its_picture_caption_and_words(whole, notebooks):
    """Counted from the notebooks: as many captions, each on a page with its picture, and each alternative text."""
    outputs = [output for notebook in notebooks for cell in notebook.cells
               if "remove-cell" not in cell.metadata.get("tags", ())
               for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(outputs) > 200
    captions = 0
    for number, sheet in enumerate(whole.sheets, start=1):
        here = [w for w in sheet.words if "Noto" in w.font and CAPTION.fullmatch(w.text.strip())]
        pictures = len(sheet.alternatives)
        assert pictures == len(here), f"page {number} has {len(here)} captions and {pictures} pictures"
        captions += len(here)
    assert captions == len(outputs)
    spoken_there = [" ".join(alt.split()) for sheet in whole.sheets for alt in sheet.alternatives]
    for output in outputs:
        words = output.metadata["image/png"]["alt"]
        assert " ".join(words.split()) in spoken_there, words


def test_every_exercise_is_there(whole, notebooks):
    starts = [found for notebook in notebooks for cell in notebook.cells if cell.cell_type == "markdown"
              for found in re.findall(r"^\*\*(Exercise (?:[A-Z]|\d+\.\d+))", cell.source, re.M)]
    assert len(starts) > 80
    titles = [w.text.strip() for sheet in whole.sheets for w in sheet.words
              if abs(w.left - LEFT - 9) < 3 and re.fullmatch(r"Exercise ([A-Z]|\d+\.\d+)", w.text.strip())]
    assert not Counter(starts) - Counter(titles)  # a line of text may begin with such words by chance


def test_every_line_of_code_is_printed_whole(whole, notebooks):
    """Each line of each code cell, wrapped as the book wraps it, is a line of some page: nothing is clipped."""
    printed = {re.sub(r"\s+", "", line) for sheet in whole.sheets for line in sheet.text.split("\n")}
    lost = []
    for notebook in notebooks:
        for cell in notebook.cells:
            if cell.cell_type != "code" or "remove-cell" in cell.metadata.get("tags", ()):
                continue
            lines = wrap_lines(cell.source.removeprefix("#| export\n").strip("\n"))[0].split("\n")
            lost += [line for line in lines
                     if line.strip() and line.isascii() and re.sub(r"\s+", "", line) not in printed]
    assert not lost, (len(lost), lost[:5])


def test_no_heading_stands_last_on_its_page(whole):
    for level, title, page, top in whole.toc:
        start = top + (50, 34, 22)[min(level, 2)]  # below the heading itself
        below = [w for w in whole.sheets[page].words if w.top > start and w.bottom < 280 * MM]
        assert below, f"page {page + 1}: nothing after {title!r}"


def test_document_says_what_it_is(whole):
    document = whole.document
    assert raw.FPDFCatalog_IsTagged(document)
    assert spoken(raw.FPDFCatalog_GetLanguage, document) == "en-GB"
    assert document.get_metadata_value("Title") == "Bytes to Chat"
    assert b"pdfuaid" in whole.path.read_bytes()


def test_bookmarks_name_every_page_of_the_book(whole, book):
    titles = {" ".join(title.split()) for _, title, _, _ in whole.toc}
    for page in book.pages:
        assert " ".join(f"{page.number} {page.title}".split()) in titles
    numbered = {f"{block.number} " for page in book.pages for block in page.blocks
                if isinstance(block, Heading) and block.number and block.level > 1}
    assert numbered <= {title.split(" ")[0] + " " for title in titles}


def test_every_link_inside_has_a_goal(whole):
    goals = [goal for sheet in whole.sheets for goal in sheet.links]
    assert len(goals) > 2000 and min(goals) >= 0 and max(goals) < len(whole.sheets)


def test_every_font_is_embedded(whole):
    fonts = {(words.font, words.embedded) for sheet in whole.sheets for words in sheet.words}
    assert all(embedded for _, embedded in fonts), sorted(fonts)
    assert any("CJK" in font for font, _ in fonts) and any("Emoji" in font for font, _ in fonts)


def test_nothing_raw_is_left_in_the_text(whole):
    assert "<Figure size" not in whole.text
    assert not re.search("[\ue000-\ue00f]", whole.text)
    tag = re.compile(r"</?(?:div|span|br|p|img|table|t[dhr]|b|i|sub|sup|a|details|summary|pre)\b[^>]*>")
    for number, sheet in enumerate(whole.sheets, start=1):
        prose = "".join(words.text for words in sheet.words)
        assert not tag.search(prose), f"page {number}: {tag.search(prose)[0]}"
        assert not re.search(r"#(?:link|emph|strong|xref|c)\(", prose), f"page {number}"


def test_contents_bibliography_and_colophon(whole, book):
    pages = [i for i, sheet in enumerate(whole.sheets) if i and sheet.text.lstrip().startswith("Contents")]
    first = next(page for level, _, page, _ in whole.toc if level == 0)
    assert pages and first - pages[0] <= 8
    there = next(page for _, title, page, _ in whole.toc if title == "Bibliography")
    listed = letters_of("".join(sheet.text for sheet in whole.sheets[there:]))
    missing = [entry.title for entry in book.references if letters_of(entry.title) not in listed]
    assert not missing
    assert f"version {book.version}" in whole.text and (not book.commit or book.commit in whole.text)


def letters_of(text: str) -> str:
    """Letters and figures alone, so that line ends, hyphens and the shapes of quotation marks do not count."""
    return re.sub(r"[\W_]+", "", text)


def test_pdf_weighs_less_than_25_megabytes(whole):
    assert whole.path.stat().st_size < 25e6


# ---------------------------------------------------------------- EPUB


@pytest.fixture(scope="session")
def epub(book, tmp_path_factory) -> zipfile.ZipFile:
    path = tmp_path_factory.mktemp("epub") / "bytes-to-chat.epub"
    build_epub(book, ROOT, path, Cover(np.ones((1, 1, 3, 3)), ("a", "b", "c")))
    return zipfile.ZipFile(path)


def test_epub_is_well_formed_and_every_link_resolves(epub):
    names, ids, links = set(epub.namelist()), {}, []
    for name in names:
        if name.endswith((".xhtml", ".opf", ".ncx", ".xml")):
            for element in ElementTree.fromstring(epub.read(name)).iter():
                ids.setdefault(name, []).extend([element.attrib["id"]] if "id" in element.attrib else [])
                links += [(name, element.attrib[key]) for key in ("href", "src") if key in element.attrib]
    for name, held in ids.items():
        assert len(held) == len(set(held)), name
    for name, link in links:
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            goal = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            assert goal in names and (not anchor or anchor in ids[goal]), (name, link)


def test_epub_has_every_figure_with_its_words(epub, notebooks):
    wanted = sum("image/png" in output.get("data", {}) for notebook in notebooks for cell in notebook.cells
                 for output in cell.get("outputs", []))
    pages = [ElementTree.fromstring(epub.read(name)) for name in epub.namelist()
             if re.search(r"text/ch\d+\.xhtml$", name)]
    pictures = [e for page in pages for e in page.iter() if e.tag.endswith("}img")]
    assert len(pictures) == wanted and all(picture.attrib["alt"].strip() for picture in pictures)
    assert any(e.tag.endswith("}math") for page in pages for e in page.iter())
    text = "".join("".join(page.itertext()) for page in pages)
    assert "<Figure size" not in text and not re.search("[\ue000-\ue00f]", text)
