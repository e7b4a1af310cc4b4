"""The pages around the chapters: the glossary against the notebooks, symbols, commands, messages and links."""

import ast
import collections
import functools
import json
import re
import shlex
from typing import NamedTuple

import pytest
from conftest import ROOT

import course
from utils.export import chapter_notebooks

DOCS = ROOT / "docs"
PAGES = ["preface", "notation", "setup", "house", "glossary", "further_reading", "changelog"]
NOTEBOOKS = [path for path in chapter_notebooks() if path.name not in ("assignment.ipynb", "solutions.ipynb")]
ENTRY = re.compile(r"- \*\*(?P<term>.+?)\*\*(?: \((?P<forms>[^)]*)\))?: (?P<meaning>.+) "
                   r"\((?P<links>\[.+\]\([^)]*\))\)\.")
EMPHASIS = re.compile(r"\*\*(.+?)\*\*|(?<![*\w])\*(?!\s)([^*]+?)\*(?!\*)|`([^`]+)`")


def listed(words: str) -> set[str]:
    return {" ".join(word.split()) for word in words.split("|")}


# terms that their section explains in a running sentence, without bold or italics
RUNNING = listed("""adapter | attention | attention map | bits per byte | Bradley–Terry model | contamination |
    GELU | Kullback–Leibler divergence | LayerNorm | loader | log-probability | log-sum-exp | merge |
    mixture of experts | pointwise mutual information | policy | policy gradient | pooling | pre-norm | RMSNorm |
    SiLU | student | SwiGLU | test set | z-loss | ZeRO | Zipf's law""")

# short bold phrases in the notebooks that stress a word, name a part of a list or a thing of that page alone
NO_TERMS = listed("""one | after | cannot change | none | copy | latest | chord | smollm2-135m | head 1 | head 2 |
    head 3 | head 8 | difference | β | α | norms | additions | shared | positions | biases | parts | mixed values |
    italy | france | sign | a smaller model | suffixes | andersen himself | rmsnorm without gains | smaller model |
    only training is timed | the last four characters | which text | training | columns | rows | normal | signed |
    with an offset | a window""")


class Entry(NamedTuple):
    """One line of the glossary: the term, its other forms, and (text, notebook) of each link."""

    term: str
    forms: list[str]
    links: list[tuple[str, str]]


class Section(NamedTuple):
    """The words and the code of a notebook's section, headings included."""

    text: str
    code: str


@functools.cache
def glossary() -> list[Entry]:
    lines = [x for x in (DOCS / "glossary.md").read_text(encoding="utf-8").splitlines() if x.startswith("- ")]
    entries = []
    for line in lines:
        found = ENTRY.fullmatch(line)
        assert found, f"not of the form '- **term** (forms): meaning ([section](notebook)).': {line[:90]}"
        links = re.findall(r"\[([^\]]+)\]\(([^)]*)\)", found["links"])
        entries.append(Entry(found["term"], re.split(r",\s*", found["forms"]) if found["forms"] else [], links))
    return entries


@functools.cache
def sections(name: str) -> dict[str, Section]:
    """The sections of a notebook by number ("3.3", or "2" in a deep dive); "" is what stands before the first."""
    number, texts, codes = "", collections.defaultdict(list), collections.defaultdict(list)
    for cell in json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        for piece in re.split(r"(?m)^(?=#)", source) if cell["cell_type"] == "markdown" else [source]:
            heading = re.match(r"## (?:(\d+(?:\.\d+)?)\.? )?(.*)", piece)
            if heading and cell["cell_type"] == "markdown":
                number = heading[1] or heading[2]
            (texts if cell["cell_type"] == "markdown" else codes)[number].append(piece)
    return {key: Section("\n\n".join(texts[key]), "\n".join(codes[key])) for key in [*texts, *codes]}


def place(text: str, target: str) -> Section:
    """What a link of the glossary means: a section, or the whole notebook where it names none."""
    found = sections(target.removeprefix("../"))
    number = re.search(r"section (\d+(?:\.\d+)?)$", text)
    if number:
        return found[number[1]]
    return Section("\n\n".join(s.text for s in found.values()), "\n".join(s.code for s in found.values()))


def emphasised(text: str) -> list[str]:
    """Headings, and what is bold, italic or code, with line breaks as spaces."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return headings + [next(filter(None, found)) for found in EMPHASIS.findall(" ".join(text.split()))]


def stands_in(forms: list[str], texts: list[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text, re.I) for form in forms for text in texts)


def order(term: str) -> str:
    return re.sub(r"[^\w]+", " ", term.casefold()).strip()


# ---------------------------------------------------------------- the glossary


def test_the_glossary_is_sorted_and_says_nothing_twice():
    terms = [order(entry.term) for entry in glossary()]
    assert terms == sorted(terms)
    forms = collections.Counter(form.casefold() for entry in glossary() for form in [entry.term, *entry.forms])
    assert [form for form, count in forms.items() if count > 1] == []
    assert len(terms) >= 200


def test_every_link_of_the_glossary_names_a_section_that_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    dives = {path: name for name, path in re.findall(r"^\| \[([^\]]+)\]\(([^)]+\.ipynb)\)", readme, re.M)}
    main = {path for path, _, _ in course.CHAPTERS.values()}
    for entry in glossary():
        for text, target in entry.links:
            name = target.removeprefix("../")
            number = re.search(r"section (\d+(?:\.\d+)?)$", text)
            assert not number or number[1] in sections(name), f"{entry.term}: no section {number[1]} in {name}"
            head = text[:number.start()].rstrip(", ") if number else text
            expected = ("" if number else f"chapter {name[3]}") if name in main else f"deep dive {dives[name]}"
            assert head == expected, entry
            assert name not in main or not number or number[1].startswith(f"{name[3]}."), entry


@pytest.mark.parametrize("entry", glossary(), ids=lambda entry: entry.term)
def test_a_term_stands_where_the_glossary_says(entry):
    """In every section that is named; set off in at least one of them, unless a running sentence explains it."""
    forms, places = [entry.term, *entry.forms], [place(*link) for link in entry.links]
    for found, link in zip(places, entry.links, strict=True):
        assert stands_in(forms, [" ".join(found.text.split()), found.code]), f"not in {link}"
    set_off = any(stands_in(forms, emphasised(found.text)) for found in places)
    assert set_off != (entry.term in RUNNING), "set it off, or keep RUNNING in step"


def bold_definitions(name: str) -> set[str]:
    """Bold phrases of at most four words that do not end a sentence, outside of boxes, exercises and readings."""
    found = set()
    for number, section in sections(name).items():
        if number in ("Exercises", "Where this stands today"):
            continue
        words = re.sub(r"(?ms)^```.*?^```|^>.*?(?=\n\n|\Z)", "", section.text)
        for phrase in re.findall(r"\*\*([^*]+)\*\*", " ".join(words.split())):
            if len(phrase.split()) <= 4 and phrase[-1] not in ".?":
                found.add(phrase.strip("`").casefold())
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_sets_in_bold_is_in_the_glossary(path):
    known = {form.casefold() for entry in glossary() for form in [entry.term, *entry.forms]}
    assert bold_definitions(path.relative_to(ROOT).as_posix()) - known - NO_TERMS == set()


def test_the_lists_of_this_file_are_in_use():
    bold = set().union(*(bold_definitions(path.relative_to(ROOT).as_posix()) for path in NOTEBOOKS))
    assert NO_TERMS - bold == set()
    assert RUNNING - {entry.term for entry in glossary()} == set()


# ---------------------------------------------------------------- notation, commands, messages


@functools.cache
def everything() -> str:
    return "\n".join(f"{section.text}\n{section.code}" for path in NOTEBOOKS
                     for section in sections(path.relative_to(ROOT).as_posix()).values())


def symbols() -> list[str]:
    """The first column of notation.md's tables of shapes, letters, names and types."""
    page = (DOCS / "notation.md").read_text(encoding="utf-8").split("## Units")
    rows = re.findall(r"^\| ((?:`[^`]+`|\$[^$]+\$)(?:, (?:`[^`]+`|\$[^$]+\$))*) \|", page[0] + page[1], re.M)
    return sorted({symbol for row in rows for symbol in re.findall(r"`[^`]+`|\$[^$]+\$", row)})


@pytest.mark.parametrize("symbol", symbols())
def test_a_symbol_stands_in_some_notebook(symbol):
    """Code as a word of its own; a letter of a formula within one, as TeX, or as its Unicode character."""
    bare = symbol.strip("`$")
    if symbol.startswith("`"):
        assert re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", everything())
        return
    formulas = " ".join(a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", everything(), re.S))
    assert re.search(rf"(?<![A-Za-z\\]){re.escape(bare)}(?![A-Za-z])", formulas), f"{symbol} is in no formula"


def test_notation_has_its_symbols():
    assert len(symbols()) >= 50 and {"`B`", "`T`", "`D`", "`H`", "`K`", "`d`", "`V`", "`S`"} <= set(symbols())


def commands(page: str) -> list[str]:
    """What a page tells the reader to type after "course.py", from code blocks and inline code."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    typed = [line for block in re.findall(r"(?ms)^```\n(.*?)^```", text) for line in block.splitlines()]
    typed += re.findall(r"`([^`\n]*course\.py [^`\n]*)`", text)
    found = [re.match(r"(?:.*; ?)?(?:[A-Z_]+=\S+ )?(?:(?:python3?(?:\.\d+)?|py) )?course\.py (\S.*)", line)
             for line in typed]
    return sorted({match[1].split("#")[0].strip() for match in found if match})


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_course_py_understands_a_command_of_the_pages(page, command):
    try:
        course.parse(shlex.split(command))
    except SystemExit:
        pytest.fail(f"{page}.md shows 'course.py {command}', which course.py --help does not know")


def test_the_pages_of_setup_and_house_show_commands():
    assert len(commands("setup")) >= 5 and len(commands("house")) >= 8


@functools.cache
def strings() -> list[str]:
    """Every string in course.py and utils/, the constant parts of f-strings included."""
    files = [ROOT / "course.py", *(ROOT / "utils").rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def messages() -> list[str]:
    text = (DOCS / "setup.md").read_text(encoding="utf-8").split("## When something goes wrong")[1]
    return re.findall(r"^\| `([^`]+)`", text, re.M)


@pytest.mark.parametrize("message", messages())
def test_a_message_of_setup_is_one_that_the_course_gives(message):
    if message == "No module named ...":  # Python's own
        return
    parts = [part.strip(" :;,.()'") for part in message.split("...")]
    for part in filter(None, parts):
        assert any(part in string for string in strings()), f"nothing says {part!r}"


# ---------------------------------------------------------------- files and links


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = DOCS / path if path else DOCS / f"{page}.md"
        assert file.exists(), f"{page}.md links to {target}"
        if anchor:
            heads = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_the_tour_names_files_that_exist():
    text = (DOCS / "house.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|utils|ch0\d_\w+|docs|binder|\.\w+)/[\w./]*)`", text))
    assert len(named) >= 25
    assert [name for name in sorted(named) if "NN" not in name and not (ROOT / name).exists()] == []


def test_the_tour_sends_to_tests_about_what_it_promises():
    """Each guard of the table of invariants exists, and every file of tests but the chapters' own is named."""
    text = (DOCS / "house.md").read_text(encoding="utf-8").split("## Invariants")[1]
    named = set(re.findall(r"`tests/(test_\w+\.py)`", text))
    house = {path.name for path in (ROOT / "tests").glob("test_*.py") if not path.name.startswith("test_ch0")}
    assert house - named <= {"test_bench.py", "test_chat.py", "test_widgets.py", "test_diagrams.py"}
