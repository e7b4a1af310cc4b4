"""The book's text: notebooks read as blocks, plain words turned into links, the bibliography collected."""

import base64
import gzip
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from utils.book import citations, read_book
from utils.book.blocks import Callout, Code, Equation, Exercise, Figure, Heading, Output, Prose
from utils.book.figures import picture
from utils.book.links import PROTECTED, glossary_terms
from utils.plots import VECTOR
from utils.workspace import ROOT

NOTEBOOKS = sorted(path for path in ROOT.glob("ch0*/*.ipynb") if path.name != "assignment.ipynb")
HOME = "https://github.com" + "/ada/water"  # put together, so that it is no link to somebody
NO_WORK = {"GPT-2 (2019)", "Qwen3 (2025)", "Qwen3-30B-A3B (2025)", "DeepSeek-V3 (2024)", "October 2024"}

CHAPTER = r"""
# Chapter 1: Water

<!-- launch -->
[![Open in Colab](../docs/badges/colab.svg)](https://example.org)
<!-- /launch -->

Words of chapter 2, of section 1.2, of sections 1.1 and 1.2, and of [the dive](deep.ipynb); `deep.ipynb` too.
Not in code, `section 1.2`, nor in $\text{section 1.2}$, nor elsewhere: Hughes et al. 2020, section 1.2.
Nor in a work that is known: Okoro 2021, section 1.2, (Okoro 2021), chapter 1, and [a report](x.pdf) in its section 1.1.

## 1.1 Rivers

A **river** runs (Hughes et al. 2020). See the [shell](../run.sh) and [outside](https://example.org).

$$a = b^2$$

> **Before you run the next cell.** Will it rain?
> In section 1.2 it does.

```python
# section 1.1 inside a fence

## 1.9 No heading
```

## 1.2 Lakes

### A small one

## Exercises

These have no points.

**Exercise 1.1** (by hand). Count to ten.

And back, as in Exercise 1.2.

**Exercise 1.2.** Stop.

## Where this stands today

- Hughes et al. 2020, *On Rivers* (arXiv:2001.00001), and
  Hughes et al. 2020, *On Lakes: A Longer Title* (arXiv:2001.00002).
- Okoro 2021, *On Mud* (arXiv:2101.00003), section 1.2, and *Another* (Water Press), chapter 1.
"""
DIVE = """# Deep dive: what lies below

Back to chapter 1.

## 1. Mud

Section 1, Exercise A, section 7; section 1 of [the dive](deep.ipynb).

**Exercise A.** Dig.
"""


@pytest.fixture
def small(tmp_path):
    """A book of one chapter with a deep dive."""
    (tmp_path / "ch01_water").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "| [1 Water](ch01_water/water.ipynb) | a | b |\n| [Deep](ch01_water/deep.ipynb) | c |\n")
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\nversion = "3.2.1"\n[project.urls]\nRepository = "{HOME}"\n'
        '[tool.bytes-to-chat]\nbranch = "main"\nhub = ""\n')
    (tmp_path / "docs" / "glossary.md").write_text(
        "# Glossary\n\n- **river** (rivers, stream): water that runs ([section 1.1](../ch01_water/water.ipynb)).\n")
    printed = v4.new_output("stream", text="\x1b[31mwet\x1b[0m\n")
    write(tmp_path / "ch01_water" / "water.ipynb", v4.new_markdown_cell(CHAPTER),
          v4.new_code_cell("launch()", metadata={"tags": ["remove-cell"]}),
          v4.new_code_cell("#| export\ndef flow():\n    return 1"),
          v4.new_code_cell("flow()", outputs=[printed, _drawn()]))
    write(tmp_path / "ch01_water" / "deep.ipynb", v4.new_markdown_cell(DIVE))
    return read_book(tmp_path)


def write(path, *cells):
    nbformat.write(v4.new_notebook(cells=list(cells)), path)


def _drawn():
    svg = b'<?xml version="1.0"?>\n<svg id="a"><use href="#a"/><g clip-path="url(#a)"/></svg>'
    return v4.new_output(
        "display_data", {"image/png": base64.b64encode(b"png").decode(), "text/plain": "Figure: A blue line.",
                         VECTOR: base64.b64encode(gzip.compress(svg)).decode()},
        metadata={"image/png": {"alt": "A blue line.", "width": 460}})


def kinds(page, kind):
    return [block for block in page.blocks if isinstance(block, kind)]


def test_headings_carry_numbers_and_labels(small):
    chapter, dive = small.parts[1].pages
    assert [(h.level, h.number, h.text, h.label) for h in kinds(chapter, Heading)] == [
        (1, "1", "Water", "page-ch01-water-water"), (2, "1.1", "Rivers", "sec-1-1"), (2, "1.2", "Lakes", "sec-1-2"),
        (3, "", "A small one", "page-ch01-water-water-a-small-one"),
        (2, "", "Exercises", "page-ch01-water-water-exercises"),
        (2, "", "Where this stands today", "page-ch01-water-water-where-this-stands-today")]
    assert [(h.number, h.text, h.label) for h in kinds(dive, Heading)] == [
        ("D1", "What lies below", "page-ch01-water-deep"), ("D1.1", "Mud", "sec-d1-1")]


def test_words_become_links(small):
    words = kinds(small.parts[1].pages[0], Prose)[0].markdown
    assert "[section 1.2](#sec-1-2), of [sections 1.1](#sec-1-1) and [1.2](#sec-1-2)" in words
    assert "[the dive (D1)](#page-ch01-water-deep); [What lies below (D1)](#page-ch01-water-deep) too" in words
    assert "chapter 2" in words and "[chapter 2]" not in words, "there is no chapter 2 here"
    assert "`section 1.2`" in words and r"$\text{section 1.2}$" in words and "2020, section 1.2." in words
    assert "[Okoro 2021](#ref-arxiv-2101-00003), section 1.2, ([Okoro 2021](#ref-arxiv-2101-00003)), chapter 1" in words
    assert words.endswith("in its section 1.1.")
    listed = kinds(small.parts[1].pages[0], Prose)[-1].markdown
    assert listed.endswith("(arXiv:2101.00003), section 1.2, and *Another* (Water Press), chapter 1.")
    assert "Open in Colab" not in words
    dive = kinds(small.parts[1].pages[1], Prose)
    assert dive[0].markdown == "Back to [chapter 1](#page-ch01-water-water)."
    assert dive[1].markdown == "[Section D1.1](#sec-d1-1), [Exercise A](#ex-d1-a), section 7; " \
        "[section D1.1](#sec-d1-1) of [the dive](#page-ch01-water-deep)."


def test_works_and_terms(small):
    words = kinds(small.parts[1].pages[0], Prose)[1].markdown
    assert words.startswith("A \ue000river\ue001**river** runs (Hughes et al. 2020)"), "two such works: no guess"
    assert f"[shell]({HOME}/blob/main/run.sh) and [outside](https://example.org)" in words
    listed = kinds(small.parts[1].pages[0], Prose)[-1].markdown
    assert "[Hughes et al. 2020](#ref-arxiv-2001-00001), *On Rivers*" in listed
    assert "[Hughes et al. 2020](#ref-arxiv-2001-00002), *On Lakes" in listed
    assert [(r.authors, r.title, r.url, r.cited) for r in small.references] == [
        ("Hughes et al.", "On Lakes: A Longer Title", "https://arxiv.org/abs/2001.00002", ("page-ch01-water-water",)),
        ("Hughes et al.", "On Rivers", "https://arxiv.org/abs/2001.00001", ("page-ch01-water-water",)),
        ("Okoro", "On Mud", "https://arxiv.org/abs/2101.00003", ("page-ch01-water-water",))]
    assert small.terms == {"river": "river", "rivers": "river", "stream": "river"}


def test_special_blocks(small):
    chapter = small.parts[1].pages[0]
    assert kinds(chapter, Equation) == [Equation("a = b^2", "1.1", "eq-1-1")]
    assert kinds(chapter, Callout) == [Callout("predict", "Before you run the next cell",
                                               "Will it rain?\nIn [section 1.2](#sec-1-2) it does.")]
    assert kinds(chapter, Exercise) == [
        Exercise("1.1", "Exercise 1.1", "(by hand)", "Count to ten.\n\nAnd back, as in [Exercise 1.2](#ex-1-2).",
                 "ex-1-1"),
        Exercise("1.2", "Exercise 1.2", "", "Stop.", "ex-1-2")]
    fenced = [block.markdown for block in kinds(chapter, Prose) if "```" in block.markdown]
    assert fenced == ["```python\n# section 1.1 inside a fence\n\n## 1.9 No heading\n```"]
    assert kinds(small.parts[1].pages[1], Exercise)[0].number == "D1.A"


def test_cells_and_figures(small):
    chapter = small.parts[1].pages[0]
    assert kinds(chapter, Code) == [Code("def flow():\n    return 1", "ch01_water/water.py"), Code("flow()", "")]
    assert kinds(chapter, Output) == [Output("wet", "text")]
    [figure] = kinds(chapter, Figure)
    assert (figure.png, figure.alt, figure.width) == (b"png", "A blue line.", 460)
    assert (figure.number, figure.label) == ("1.1", "fig-1-1")
    assert figure.svg == '<svg id="fig-1-1-a"><use href="#fig-1-1-a"/><g clip-path="url(#fig-1-1-a)"/></svg>'
    assert (small.version, small.repository) == ("3.2.1", HOME)
    assert small.parts[2].pages[0].title == "Glossary"


def test_a_listed_notebook_that_is_missing(tmp_path, small):
    (tmp_path / "ch01_water" / "deep.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match=r"README\.md lists ch01_water/deep\.ipynb"):
        read_book(tmp_path)


@pytest.mark.parametrize("text, expected", [
    ("Su et al. 2021, *RoFormer* (arXiv:2104.09864)", ("Su et al.", "2021", "RoFormer", "arXiv:2104.09864")),
    ("Su et al. (2021), *RoFormer*, arXiv 2104.09864.", ("Su et al.", "2021", "RoFormer", "arXiv:2104.09864")),
    ("Su et al. 2021 (*RoFormer*, arXiv:2104.09864)", ("Su et al.", "2021", "RoFormer", "arXiv:2104.09864")),
    ("Bengio et al. 2003, *A Neural Model* (Journal of Learning 3).",
     ("Bengio et al.", "2003", "A Neural Model", "Journal of Learning 3")),
    ("the bootstrap is Efron's (1979, *Another Look*)", ("Efron", "1979", "Another Look", "")),
    ("Berglund and van der Merwe 2023, *Formal* (arXiv:2309.08715)",
     ("Berglund and van der Merwe", "2023", "Formal", "arXiv:2309.08715")),
])
def test_forms_of_a_reference(text, expected):
    [found] = citations.collect({"page": text})
    assert (found.authors, found.year, found.title, found.where) == expected


# ---------------------------------------------------------------- the real book


@pytest.fixture(scope="module")
def book():
    return read_book(ROOT)


def words(page):
    return "\n\n".join(block.markdown for block in page.blocks if hasattr(block, "markdown"))


def test_every_notebook_is_in_it_once(book):
    printed = [f"{page.path}.ipynb" for page in book.pages if str(page.path).startswith("ch")]
    assert sorted(printed) == [path.relative_to(ROOT).as_posix() for path in NOTEBOOKS]


def test_labels_are_unique_and_links_arrive(book):
    labels = [block.label for page in book.pages for block in page.blocks if hasattr(block, "label")]
    labels += [reference.label for reference in book.references]
    assert len(labels) == len(set(labels))
    assert all(re.fullmatch(r"[a-z0-9-]+", label) for label in labels)
    targets = {(page.label, target) for page in book.pages for target in re.findall(r"\]\(#([^)]*)\)", words(page))}
    assert len(targets) > 500
    assert [found for found in sorted(targets) if found[1] not in set(labels)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_notebook_is_lost(book, path):
    notebook = nbformat.read(path, as_version=4)
    page = next(page for page in book.pages if f"{page.path}.ipynb" == path.relative_to(ROOT).as_posix())
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = [cell for cell in notebook.cells
            if cell.cell_type == "code" and "remove-cell" not in cell.metadata.get("tags", [])]
    assert len(kinds(page, Figure)) == pictures
    assert len(kinds(page, Exercise)) == len(re.findall(r"^\*\*Exercise", markdown, re.M))
    assert len(kinds(page, Code)) == len(code)
    assert len(kinds(page, Callout)) == len(re.findall(r"^> \*\*", markdown, re.M))
    said = len(re.sub(r"\W", "", re.sub(r"<!-- launch.*?/launch -->", "", markdown, flags=re.S)))
    kept = sum(len(re.sub(r"\W", "", re.sub(r"\]\([^)]*\)|\ue000.*?\ue001", "", text))) for text in _all_words(page))
    assert 0.9 * said < kept < 1.1 * said


def _all_words(page):
    for block in page.blocks:
        if not isinstance(block, (Code, Output, Figure)):
            yield from (getattr(block, name, "") for name in ("markdown", "text", "tex", "title", "note", "number"))


def test_every_figure_has_its_vector_form(book):
    figures = [figure for page in book.pages for figure in kinds(page, Figure)]
    without = [figure.label for figure in figures if not figure.svg.startswith("<svg")]
    assert without == [], "run these notebooks again: course.py run --save"


def test_every_work_that_is_named_is_listed(book):
    numbers = {reference.where.removeprefix("arXiv:") for reference in book.references}
    unknown, untitled = set(), set()
    for page in book.pages:
        plain = PROTECTED.sub(" ", words(page))
        unknown |= {(page.label, match[0]) for match in citations.NAMED.finditer(plain)}
        untitled |= {(page.label, number) for number in re.findall(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})", words(page))
                     if number not in numbers}
    assert {found for found in unknown if found[1] not in NO_WORK} == set(), "list it under Where this stands today"
    assert untitled == set()


def test_one_number_has_one_title(book):
    titles = {}
    for page in book.pages:
        for entry in citations.collect({page.label: words(page)}):
            titles.setdefault(entry.label, set()).add(re.sub(r"\W+", " ", entry.title).casefold().strip())
    different = {label: found for label, found in titles.items()
                 if any(not (a in b or b in a) for a in found for b in found)}
    assert different == {}


def test_glossary_forms():
    forms = glossary_terms(ROOT / "docs" / "glossary.md")
    assert len(forms) > 150 and forms["token"] == "token"


def test_identifiers_of_pictures_differ():
    one, other = (picture(_drawn(), name)[0] for name in ("fig-1", "fig-2"))
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0] and not ids[0] & ids[1]


def test_no_identifier_of_a_picture_comes_twice(book):
    for figure in (figure for page in book.pages for figure in kinds(page, Figure)):
        ids = re.findall(r'\bid="([^"]+)"', figure.svg)
        assert len(ids) == len(set(ids)), figure.label


def test_the_path_of_the_book_is_the_readmes(book):
    order = re.findall(r"\((ch\d\d_\w+/\w+)\.ipynb\)", Path(ROOT, "README.md").read_text(encoding="utf-8"))
    chapters = [str(page.path) for page in book.pages if page.kind in ("chapter", "dive")]
    order = [name for name in dict.fromkeys(order) if not name.endswith(("assignment", "solutions"))]
    assert chapters == sorted(order, key=lambda name: name[:4])
