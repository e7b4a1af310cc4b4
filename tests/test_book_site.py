"""The book as a web site: is everything there, does every link lead somewhere, can everybody read it anywhere?

The site is built once. What must be on it is counted from the notebooks, not from what the builder was given.
"""

import ast
import importlib.util
import itertools
import json
import re
import threading
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
from browser import LOOPBACK, Heard, browser_path
from conftest import ROOT

pytest.importorskip("myst_nb", reason="the site needs what tests/requirements.txt pins: pip install -r it")

from utils.book import read_book  # noqa: E402
from utils.book.blocks import Book, Callout, Exercise, Figure, Heading, Page, Part, Prose  # noqa: E402
from utils.book.site import build_site, inline_svg, markdown_of  # noqa: E402

NOTEBOOKS = sorted(path for path in ROOT.glob("ch0*/*.ipynb") if path.name != "assignment.ipynb")
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
AXE_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")
# the first page, a chapter, dives with wide outputs and figures, terms, the library, works, the index, the search
LOOKED_AT = ("index", "ch03_attention/attention", "ch02_tokenizer/solutions", "ch05_pretrain/parallelism",
             "ch04_gpt/inside", "glossary", "api/ch03_attention", "bibliography", "genindex", "search")
SHORT = "ch05_pretrain/speed_run"  # a notebook on which axe looks at every word of the code
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


# ---------------------------------------------------------------- a page of the site, taken apart


class Parsed(HTMLParser):
    """What one page of HTML has: ids, links, things it loads, and the text of some of its elements."""

    KEPT = {"h1", "h2", "h3", "h4", "pre", "dt", "figcaption"}
    MUTE = {"pre", "code", "annotation", "script", "style", "svg"}  # not the words of the text

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.pictures, self.texts = [], [], [], [], []
        self.words, self.crossed, self._open, self._texts, self._mute = [], [], [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        classes = (given.get("class") or "").split()
        if given.get("id"):
            self.ids.append(given["id"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self._loads(tag, given)
        if tag in ("svg", "img") and any("plot" in names for _, names, _ in self._open):
            self.pictures.append(given.get("aria-label") or given.get("alt"))
        if tag not in VOID:
            text = [] if tag in self.KEPT or "admonition-title" in classes else None
            self._open.append((tag, classes, text))
            self._texts += [text] if text is not None else []
            self._mute += tag in self.MUTE

    def _loads(self, tag, given):
        if tag == "link" and not {"canonical", "next", "prev", "index", "search"} & set(given["rel"].split()):
            self.loads.append(given["href"])
        self.loads += [given[name] for name in ("src", "srcset", "data", "poster") if given.get(name)]
        if tag in ("image", "use"):
            self.loads += [given[name] for name in ("href", "xlink:href") if given.get(name)]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style") or "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self.crossed.append(f"</{tag}> in line {self.getpos()[0]}")
        while any(name == tag for name, _, _ in self._open):
            name, classes, text = self._open.pop()
            self._mute -= name in self.MUTE
            if text is not None:
                self._texts.pop()
                around = {one for _, names, _ in self._open for one in names}
                self.texts.append((name, set(classes), around, "".join(text)))
            if name == tag:
                return

    def handle_data(self, data):
        for text in self._texts:
            text.append(data)
        if not self._mute:
            self.words.append(data)

    def kept(self, *tags, within=(), title="") -> list[str]:
        """The texts of these elements, of those inside an element of a class, or of the titles of boxes."""
        return [text for tag, classes, around, text in self.texts
                if (title in classes if title else tag in tags) and (not within or around & set(within))]


@cache
def parsed(path: Path) -> Parsed:
    return Parsed(path)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the whole site, built from the notebooks as they are."""
    return build_site(read_book(ROOT), ROOT, tmp_path_factory.mktemp("book") / "html").parent


@pytest.fixture(scope="session")
def pages(site) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


def page_of(site: Path, path: Path) -> Parsed:
    return parsed(site / path.relative_to(ROOT).with_suffix(".html"))


def cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells
            if "remove-cell" not in cell.metadata.get("tags", ())]


# ---------------------------------------------------------------- is everything there?


@by_notebook
def test_every_figure_is_there_in_its_order(site, path):
    expected = [output.metadata["image/png"]["alt"] for cell in cells(path) if cell.cell_type == "code"
                for output in cell.outputs if "image/png" in output.get("data", {})]
    assert page_of(site, path).pictures == expected


@by_notebook
def test_every_exercise_and_every_prediction_is_there(site, path):
    text = "\n\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    exercises = re.findall(r"(?m)^\*\*(Exercise (?:[A-Z]|\d+\.\d+))\b", text)
    predictions = re.findall(r"(?m)^> \*\*Before", text)
    titles = page_of(site, path).kept(title="admonition-title")
    found = [re.match(r"Exercise [\w.]*\w", title)[0] for title in titles if title.startswith("Exercise")]
    assert found == exercises
    assert sum(title.startswith("Before") for title in titles) == len(predictions)


@by_notebook
def test_every_code_cell_is_there_to_the_letter(site, path):
    sources = [cell.source.removeprefix("#| export\n").strip("\n") for cell in cells(path)
               if cell.cell_type == "code" and cell.source.strip()]
    found = [text.strip("\n") for text in page_of(site, path).kept("pre", within=["cell_input"])]
    assert found == sources


@by_notebook
def test_what_cells_printed_is_there(site, path):
    def plain(text):
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\x1b", "\u241b")  # a model may write anything
        return re.sub(r"\s+", " ", text).strip()

    printed = [plain(output.get("text") or "\n".join(output.get("traceback", ())) or output.data["text/plain"])
               for cell in cells(path) if cell.cell_type == "code" for output in cell.outputs
               if "image/png" not in output.get("data", {})]
    found = [plain(text) for text in page_of(site, path).kept("pre", within=["cell_output", "printed"])]
    assert " ".join(filter(None, found)) == " ".join(filter(None, printed))


@by_notebook
def test_every_heading_is_there(site, path):
    text = "\n\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    headings = re.findall(r"(?m)^#{2,4} +(.+?)\s*$", text)
    found = page_of(site, path).kept("h2", "h3", "h4", within=["bd-article"])

    def plain(heading):
        return re.sub(r"[^\w]+", "", re.sub(r"^D?[\d.]*\d[. ]*", "", heading)).lower()
    assert list(map(plain, found)) == list(map(plain, headings))


def test_what_the_first_page_quotes_stands_in_the_notebook_that_it_names():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    quotes = re.findall(r"\]\(\.\./(ch\w+/\w+\.ipynb)\)[^\n]*\n\n((?:>[^\n]*\n)+)", text)
    assert len(quotes) == text.count("\n\n>") >= 2
    for path, quote in quotes:
        printed = " ".join(output.get("text", "") for cell in nbformat.read(ROOT / path, 4).cells
                           for output in cell.get("outputs", []))
        assert " ".join(re.sub(r"^>", "", quote, flags=re.M).split()) in " ".join(printed.split())


def test_every_page_of_docs_is_there(site):
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / f"{path.stem}.html").exists(), f"docs/{path.name} is not on the site"


def exported(path: Path):
    """The public classes and functions with docstrings in a notebook's exported cells."""
    for cell in cells(path):
        if cell.cell_type == "code" and cell.source.startswith("#| export"):
            for node in ast.parse(cell.source).body:
                if (isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
                        and ast.get_docstring(node)):
                    yield node.name


@by_notebook
def test_the_library_describes_what_the_notebook_exports(site, path):
    names = list(exported(path))
    if not names:
        return
    library = parsed(site / "api" / f"{path.parent.name}.html")
    missing = {name for name in names if f"{path.parent.name}.{path.stem}.{name}" not in library.ids}
    assert not missing, f"not in the library's pages: {sorted(missing)}"


def test_every_term_of_the_glossary_has_an_anchor_and_stands_in_the_index(site):
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"(?m)^- \*\*(.+?)\*\*", text)
    found = [" ".join(text.rstrip("#¶ \n").split()) for text in parsed(site / "glossary.html").kept("dt")]
    assert terms and found == [term.replace("'", "’") for term in terms]
    index = set((site / "genindex.html").read_text(encoding="utf-8").split("term-")[1:])
    assert len({entry.split('"')[0] for entry in index}) >= len(terms)


def test_formulas_are_drawn_by_the_browser(site, pages):
    for path in pages:
        words = "".join(parsed(path).words)
        assert not (found := re.search(r"\$\$|\\(?:frac|sum|text|mathbf|sqrt|left)\b", words)), (
            f"{path.relative_to(site)} shows TeX: {words[max(0, found.start() - 60):found.end() + 60]!r}")
    assert "<math" in (site / "ch05_pretrain" / "pretrain.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- does every link lead somewhere?


def inner(page: Path, link: str) -> tuple[Path, str] | None:
    """The file and the anchor that a link leads to, or None for one that leaves the site."""
    if urlsplit(link).scheme or link.startswith("//"):
        return None
    path, anchor = urldefrag(link)
    path = unquote(path)
    target = (page.parent / path).resolve() if path else page
    return (target / "index.html" if target.is_dir() else target), unquote(anchor)


def broken(page: Path) -> list[str]:
    found = []
    for link in parsed(page).links:
        if not (place := inner(page, link)):
            continue
        target, anchor = place
        if not target.exists():
            found.append(f"{link} (no such page)")
        elif anchor and anchor != "top" and target.suffix == ".html" and anchor not in parsed(target).ids:
            found.append(f"{link} (no such anchor)")
    return found


def test_every_link_inside_the_site_leads_somewhere(site, pages):
    wrong = {path.relative_to(site).as_posix(): bad for path in pages if (bad := broken(path))}
    assert not wrong, json.dumps(wrong, indent=1)[:4000]


def test_no_identifier_stands_twice_on_a_page(site, pages):
    for path in pages:
        ids = sorted(parsed(path).ids)
        twice = [one for one, other in itertools.pairwise(ids) if one == other]
        assert not twice, f"{path.relative_to(site)}: {twice[:10]}"


def test_elements_end_where_they_should(site, pages):
    for path in pages:
        assert not parsed(path).crossed, f"{path.relative_to(site)}: {parsed(path).crossed[:5]}"


def test_every_page_can_be_reached_from_the_first(site, pages):
    seen, waiting = set(), [site / "index.html"]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".html":
            seen.add(page)
            waiting += [place[0] for link in parsed(page).links if (place := inner(page, link))]
    missing = {path.relative_to(site).as_posix() for path in set(pages) - seen} - {"search.html"}
    assert not missing


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path in pages:
        away = [link for link in parsed(path).loads
                if (urlsplit(link).scheme not in ("", "data") or link.startswith("//"))]
        assert not away, f"{path.relative_to(site)} loads {away[:5]}"
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        away = re.findall(r"(?:url\(|@import\s+)['\"]?((?:https?:)?//[^'\")]+)", text)
        assert not away, f"{path.relative_to(site)} loads {away[:5]}"


@by_notebook
def test_a_notebook_s_page_says_where_to_run_it(site, path):
    links = page_of(site, path).links
    name = path.relative_to(ROOT).as_posix()
    assert any(link.startswith("https://colab.research.google.com/") and link.endswith(name) for link in links)
    assert any(link.startswith("https://mybinder.org/") and name in unquote(link) for link in links)


# ---------------------------------------------------------------- what becomes of a block, and of a mistake


def a_page(*blocks) -> Page:
    return Page(PurePosixPath("docs/preface"), "front", "", "A page", "page-a",
                [Heading(1, "", "A page", "page-a"), *blocks])


def a_book(*blocks) -> Book:
    home = "https://github.com" + "/ada/course"  # put together, so that it is no link to somebody
    return Book("A book", [Part("Before you begin", [a_page(*blocks)])], [], "0.0", "", home)


def test_a_link_that_leads_nowhere_is_an_error_and_the_old_site_stays(tmp_path):
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("the old site")
    with pytest.raises(ValueError, match="sec-99-9"):
        build_site(a_book(Prose("See [section 99.9](#sec-99-9).")), ROOT, tmp_path / "html")
    assert (tmp_path / "html" / "index.html").read_text() == "the old site"


def test_an_exercise_is_a_box_with_its_number_and_an_anchor():
    text = markdown_of(Exercise("3.2", "Exercise 3.2", "(by hand)", "Do it.", "ex-3-2"), a_page())
    assert text.startswith("(ex-3-2)=") and "Exercise 3.2 (by hand)" in text and "Do it." in text


def test_a_box_can_hold_code_with_colons():
    text = markdown_of(Callout("predict", "Before", ":::{note}\nx\n:::"), a_page())
    assert text.startswith("::::{admonition}") and text.endswith("::::")


def test_lines_that_only_myst_would_take_for_its_own_stay_text():
    text = markdown_of(Prose("% of all\n\n+++\n\n(label)=\n\n`% code`"), a_page())
    assert "\\% of all" in text and "\\+++" in text and "\\(label)=" in text and "`% code`" in text


def test_an_index_mark_becomes_a_role_before_the_term():
    assert "{idx}`softmax`**softmax**" in markdown_of(Prose("the \ue000softmax\ue001**softmax** of"), a_page())


def test_a_figure_in_a_page_has_its_words_and_no_style_for_the_whole_page():
    svg = ('<?xml version="1.0"?><svg width="10pt" height="5pt" viewBox="0 0 720 360"><metadata>x</metadata>'
           '<style>*{stroke: red}</style><path id="a"/></svg>')
    text = inline_svg(Figure(svg, b"", 'Says "this".', 660, "3.1", "fig-3-1"))
    assert 'role="img"' in text and 'aria-label="Says &quot;this&quot;."' in text
    assert 'width="660" height="330"' in text and "<style" not in text and "metadata" not in text


# ---------------------------------------------------------------- in a real browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def address(site):
    server = ThreadingHTTPServer((LOOPBACK, 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{LOOPBACK}:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")  # closed before another file of tests opens its own
def chromium():
    path = browser_path()
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The program of axe-core, which comes with a package for tests."""
    found = importlib.util.find_spec("axe_playwright_python")
    if not found:
        pytest.skip("axe-core is not installed: pip install -r tests/requirements.txt")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def visit(chromium, address):
    """Open a page of the site by its name; afterwards nothing may have been asked elsewhere or have gone wrong."""
    opened = []

    def go(name: str, width: int = 1280, theme: str = "light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme,
                                       reduced_motion="reduce")
        heard = Heard()
        heard.listen(context)
        page = context.new_page()
        page.on("response", lambda got: got.status >= 400 and heard.errors.append(f"{got.status} for {got.url}"))
        page.goto(urljoin(address, f"{name}.html"))
        page.evaluate("() => document.fonts.ready.then(() => null)")
        opened.append((context, heard))
        return page

    yield go
    for context, heard in opened:
        context.close()
        heard.check()


@pytest.mark.parametrize("width", [360, 800])
def test_menu_and_contents_open_by_their_buttons(visit, width):
    page = visit("ch03_attention/attention", width)
    for kind in ("primary", "secondary"):
        button = page.locator(f".{kind}-toggle:visible").first
        button.click()
        shown = page.locator(f"#pst-{kind}-sidebar-modal[open]")
        shown.wait_for(timeout=5000)
        assert shown.locator("a").count() > 5
        page.keyboard.press("Escape")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_never_scrolls_sideways(visit, name, width, theme):
    page = visit(name, width, theme)
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    wide, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= room, f"{name} is {wide} pixels wide where there are {room}: {page.evaluate(TOO_WIDE)}"


TOO_WIDE = """() => [...document.querySelectorAll('.bd-article *')]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('.scrolls, pre, .pst-scrollable-table-container'))
    .slice(0, 5).map((e) => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", sorted({*LOOKED_AT, SHORT} - {"ch04_gpt/inside", "ch05_pretrain/parallelism"}))
def test_axe_finds_nothing_against_the_rules_of_wcag(visit, axe, name, theme):
    page = visit(name, 1280, theme)
    page.evaluate(axe)
    spared = ["figure.plot svg"] + ([] if name == SHORT else ["div.cell_input pre"])
    found = page.evaluate("""([spared, rules]) => axe.run({exclude: spared.map((one) => [one])},
                                                         {runOnly: rules, preload: false})""",
                          [spared, list(AXE_RULES)])
    assert found["passes"], "axe looked at nothing"
    said = [f"{one['id']}: {one['help']} {[node['html'][:150] for node in one['nodes'][:3]]}"
            for one in found["violations"]]
    assert not said, "\n".join(said)


def test_axe_sees_a_mistake(visit, axe):
    page = visit("colophon")
    page.evaluate(axe)
    page.evaluate("document.querySelector('.bd-article p').style.color = '#ddd'")  # on white
    found = page.evaluate("rules => axe.run(document, {runOnly: rules, preload: false})", list(AXE_RULES))
    assert "color-contrast" in {one["id"] for one in found["violations"]}


def test_the_search_finds_a_term(visit, site):
    page = visit("search")
    page.goto(page.url + "?q=perplexity")
    page.wait_for_selector("#search-results li a")
    found = page.locator("#search-results li a").evaluate_all("links => links.map((a) => a.getAttribute('href'))")
    assert any("pretrain" in link for link in found)
    first = found[0].split("?")[0].split("#")[0]
    assert (site / first).exists()


def test_wide_boxes_scroll_by_keyboard(visit):
    page = visit("ch05_pretrain/parallelism", 360)
    page.wait_for_function("() => document.querySelector('.cell_input pre[tabindex]')")
    for kind in (".cell_input pre", ".cell_output pre", "figure.plot .scrolls"):
        wide = page.locator(kind).evaluate_all(
            "all => all.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.tabIndex)")
        assert wide and set(wide) == {0}, f"{kind} scrolls sideways, and no key reaches it"
    box = page.locator(".cell_input pre[tabindex]").first
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("box => box.scrollLeft > 0", arg=box.element_handle())


def test_code_has_a_copy_button_and_outputs_have_none(visit):
    page = visit("ch03_attention/attention")
    page.wait_for_selector("button.copybtn", state="attached")
    code, outputs = (page.locator(f"{kind} button.copybtn").count() for kind in (".cell_input", ".cell_output"))
    assert code == page.locator(".cell_input pre").count() and outputs == 0


def test_the_words_of_figures_are_words_in_a_font_of_the_site(visit):
    page = visit("ch04_gpt/inside")
    assert page.locator("figure.plot svg text").count() > 50
    assert page.evaluate("document.fonts.check('12px \"DejaVu Sans\"')")
    loaded = page.evaluate("[...document.fonts].filter((f) => f.status == 'loaded').map((f) => f.family)")
    assert "DejaVu Sans" in {name.strip('"') for name in loaded}


def test_formulas_have_a_size_and_a_font_for_them(visit):
    page = visit("ch05_pretrain/pretrain")
    boxes = page.locator("math").evaluate_all("all => all.map((m) => m.getBoundingClientRect().height)")
    assert boxes and min(boxes) > 5
    loaded = page.evaluate("[...document.fonts].filter((f) => f.status == 'loaded').map((f) => f.family)")
    assert "STIX Two Math" in {name.strip('"') for name in loaded}


def test_previous_and_next_go_through_the_whole_book(visit, site):
    page = visit("preface")
    seen = 1
    while page.locator("a.right-next").count():
        name = page.locator("a.right-next").get_attribute("href")
        seen += 1
        target = (site / urlsplit(page.url).path.lstrip("/")).parent / name
        page.goto(urljoin(page.url, name), wait_until="commit")
        page.wait_for_load_state("domcontentloaded")
        assert target.resolve().exists() and seen < 200
    assert seen > len(NOTEBOOKS)
