"""Definitions borrowed from a notebook."""

import nbformat
import pytest

from utils.borrow import borrow

CELLS = ["import math\nBASE = 10", "def scaled(x):\n    return x * BASE",
         "class Ring:\n    radius = math.floor(scaled(2))", "def scaled(x):\n    return 'a second one'",
         "import functools\n\n@functools.cache\ndef square(x):\n    return x * x"]


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS] + [nbformat.v4.new_markdown_cell("def no code")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "story.ipynb")
    monkeypatch.chdir(tmp_path)


def test_definitions_come_with_what_they_need(chapter):
    scaled = borrow("story", "scaled", BASE=3)
    assert scaled(2) == 6
    base, scaled, ring = borrow("story", "BASE", "scaled", "Ring")
    assert (base, scaled(2), ring.radius) == (10, 20, 20)
    assert borrow("story", "Ring", BASE=4).radius == 8, "the function that it uses comes with it"


def test_decorators_come_along(chapter):
    square = borrow("story", "square")
    assert square(3) == 9 and square.cache_info().currsize == 1


def test_known_names_replace_those_of_the_notebook(chapter):
    assert borrow("story", "Ring", scaled=lambda x: x + 0.5).radius == 2


def test_changes_are_made_in_the_source(chapter):
    assert borrow("story", "scaled", BASE=3, changes=[("x * BASE", "x + BASE")])(2) == 5


@pytest.mark.parametrize("change", ["nowhere", "x"])
def test_a_change_must_fit_once(chapter, change):
    with pytest.raises(ValueError, match="must occur once"):
        borrow("story", "scaled", changes=[(change, "y")])


def test_a_name_that_is_not_there(chapter):
    with pytest.raises(KeyError, match=r"story\.ipynb defines no ring"):
        borrow("story", "ring")
