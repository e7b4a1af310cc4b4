"""Controls over HTML that Python computes, and the picture that stands for them without a kernel."""

import nbformat
import pytest
from test_notebooks import notebook

from utils import widgets
from utils.notebooks import Job, run_notebooks
from utils.widgets import Choice, Explorer, Slider, Text

CONTROLS = [Text("text", "Type", "hop", limit=10), Slider("n", "Times", 1, 5, 1, 2, show="{:.0f} times".format),
            Choice("unit", "Unit", ["book", "day"])]


def render(text, n, unit):
    return f"<p>{text} {n} {unit}</p>"


def test_it_starts_rendered_and_follows_its_controls():
    widget = Explorer(render, CONTROLS)
    assert widget.html == "<p>hop 2 book</p>" and widget.shown == {"n": "2 times"}
    widget.values = {"text": "hip", "n": 4, "unit": "day"}
    assert widget.html == "<p>hip 4 day</p>" and widget.shown == {"n": "4 times"}


def test_what_a_browser_sends_is_kept_within_bounds():
    widget = Explorer(render, CONTROLS)
    widget.values = {"text": "x" * 50, "n": 99, "unit": "<script>"}
    assert widget.html == f"<p>{'x' * 10} 5 book</p>"
    widget.values = {"n": "many"}
    assert widget.html == "<p>hop 2 book</p>"


def test_an_error_is_shown_and_escaped_and_the_widget_goes_on():
    def fragile(text):
        if text == "<b>":
            raise ValueError(f"no {text} please")
        return text
    widget = Explorer(fragile, [Text("text", "Type", "fine")])
    widget.values = {"text": "<b>"}
    assert widget.html == "<p>ValueError: no &lt;b&gt; please</p>"
    widget.values = {"text": "again"}
    assert widget.html == "again"


@pytest.mark.parametrize(("controls", "words"), [
    ([Text("a", "A"), Text("a", "B")], ["'a'", "name of its own"]),
    ([Slider("n", "N", 0, 1, 0.1, 2)], ["starts at 2", "0 and 1"]),
    ([Choice("c", "C", ["x", "y"], "z")], ["'z'", "['x', 'y']"]),
])
def test_mistakes_are_named(controls, words):
    with pytest.raises(ValueError) as error:
        Explorer(render, controls)
    assert all(word in str(error.value) for word in words)


def test_a_committed_notebook_keeps_the_picture_and_not_the_dead_widget(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    path = notebook(tmp_path, f"""
import sys; sys.path.insert(0, {str(widgets.__file__).rsplit("/", 2)[0]!r})
from utils.plots import figure
from utils.widgets import Slider, explore
def draw(n):
    return figure()[0]
explore(format, [Slider("n", "N", 0, 9, 1, 3)], picture=draw, alt="An empty figure for n = 3.")
""")
    run_notebooks([Job(path, "a test", 5)], save=True)
    (output,) = nbformat.read(path, as_version=4).cells[1].outputs
    assert sorted(output.data) == ["image/png", "text/plain"]
    assert output.metadata["image/png"]["alt"] == "An empty figure for n = 3."
