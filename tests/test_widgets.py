"""Controls over HTML that Python computes, and the picture that stands for them without a kernel."""

import base64
import shutil
import subprocess

import nbformat
import numpy as np
import pytest
from test_notebooks import notebook

from utils import widgets
from utils.attention_viewer import MAX_CHARACTERS, MAX_TOKENS, AttentionViewer, draw_heads
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


# ---------------------------------------------------------------- the attention viewer


def attention(text):
    """Six tokens at most as words; each of 2 layers and 3 heads looks at all it can see, unevenly."""
    tokens = text.split()
    if "boom" in tokens:
        raise ValueError("no <b>boom</b>")
    weights = np.random.default_rng(0).random((2, 3, len(tokens), len(tokens))) * np.tri(len(tokens))
    return tokens, weights / np.maximum(weights.sum(-1, keepdims=True), 1e-9)


def unpacked(reading):
    n = len(reading["tokens"])
    flat = np.frombuffer(base64.b64decode(reading["weights"]), dtype=np.uint8)
    return flat.reshape(reading["n_layers"], reading["n_heads"], n, n) / 255


HEADS = {"second": (1, 2), "first": (0, 0)}


def test_the_viewer_opens_at_the_first_named_head_with_all_weights():
    viewer = AttentionViewer(attention, "dog bites man", HEADS)
    assert (viewer.layer, viewer.head) == (1, 2)
    assert viewer.marks == [{"name": "second", "layer": 1, "head": 2}, {"name": "first", "layer": 0, "head": 0}]
    assert viewer.reading["tokens"] == ["dog", "bites", "man"] and viewer.reading["message"] == ""
    assert unpacked(viewer.reading).shape == (2, 3, 3, 3)
    assert np.abs(unpacked(viewer.reading) - attention("dog bites man")[1]).max() <= 0.5 / 255 + 1e-9


def test_the_viewer_follows_its_text_survives_an_error_and_goes_on():
    viewer = AttentionViewer(attention, "dog bites man", HEADS)
    viewer.text = "man bites dog again"
    assert viewer.reading["tokens"] == ["man", "bites", "dog", "again"]
    assert np.abs(unpacked(viewer.reading) - attention(viewer.text)[1]).max() < 0.01
    viewer.text = "boom"
    assert viewer.reading["message"] == "ValueError: no <b>boom</b>" and viewer.reading["tokens"] == []
    viewer.text = ""
    assert "Type something" in viewer.reading["message"]
    viewer.text = "fine"
    assert viewer.reading["tokens"] == ["fine"] and viewer.reading["message"] == ""


@pytest.mark.parametrize("given_all", [True, False])
def test_a_long_text_is_cut_and_says_so(given_all):
    def read(text):
        tokens, weights = attention(text)
        return tokens, weights if given_all else weights[:, :, :MAX_TOKENS, :MAX_TOKENS]
    viewer = AttentionViewer(read, " ".join("ab" for _ in range(60)), HEADS)
    assert len(viewer.reading["tokens"]) == MAX_TOKENS
    assert f"first {MAX_TOKENS} of 60" in viewer.reading["message"]
    assert np.abs(unpacked(viewer.reading) - read(viewer.text)[1][:, :, :MAX_TOKENS, :MAX_TOKENS]).max() < 0.01
    viewer.text = "x " * MAX_CHARACTERS
    assert f"of {MAX_CHARACTERS // 2} tokens" in viewer.reading["message"]


@pytest.mark.parametrize(("read", "heads", "words"), [
    (attention, {"far": (2, 0)}, ["'far'", "layer 2", "0 to 1"]),
    (attention, {"far": (0, 3)}, ["'far'", "head 3", "0 to 2"]),
    (attention, {}, ["at least one"]),
    (lambda text: (["a", "b"], np.ones((2, 3, 3, 3)) / 3), HEADS, ["(2, 3, 3, 3)", "2 tokens"]),
    (lambda text: (["a"], np.ones((1, 1))), HEADS, ["(1, 1)", "layers, heads"]),
    (lambda text: (["a"], np.full((2, 3, 1, 1), -4.0)), HEADS, ["-4.0", "before the softmax"]),
    (lambda text: (["a"], np.full((2, 3, 1, 1), np.nan)), HEADS, ["nan"]),
    (lambda text: ([], np.ones((2, 3, 0, 0))), HEADS, ["no token"]),
])
def test_the_viewer_names_mistakes(read, heads, words):
    with pytest.raises(ValueError) as error:
        AttentionViewer(read, "dog bites man", heads)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_picture_has_a_labelled_map_for_each_named_head(n):
    tokens, weights = attention("dog bites man")
    heads = {f"head number {i}": (i % 2, i % 3) for i in range(n)}
    maps = [axis for axis in draw_heads(tokens, weights, heads).axes if axis.images]
    assert [axis.get_title("left") for axis in maps] == [
        f"{name}\nlayer {layer}, head {head}" for name, (layer, head) in heads.items()]
    for axis, (layer, head) in zip(maps, heads.values(), strict=True):
        assert np.array_equal(axis.images[0].get_array(), weights[layer, head])
        assert [label.get_text() for label in axis.get_xticklabels()] == tokens


@pytest.mark.parametrize("widget", [Explorer, AttentionViewer])
def test_a_widget_asks_nobody_outside_and_keeps_the_notebooks_keys(widget):
    source = widget._esm + widget._css
    assert "export default { render }" in source
    for word in ("http", "fetch(", "import(", "import ", "@import", "url(", "XMLHttpRequest", "eval(", "window."):
        assert word not in source, word
    assert "stopPropagation" in source


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize("widget", [Explorer, AttentionViewer])
def test_a_widgets_script_is_a_module(widget, tmp_path):
    script = tmp_path / "widget.mjs"
    script.write_text(widget._esm + "\nif (typeof render !== 'function') throw new Error('no render');\n")
    subprocess.run(["node", str(script)], check=True, capture_output=True, timeout=60)


def test_colab_is_told_who_draws_the_widget(monkeypatch):
    shown = []
    viewer = AttentionViewer(attention, "dog bites man", HEADS)
    colab = {widgets.WIDGET: {"colab": {"custom_widget_manager": {"url": "manager"}}}}
    view = {"text/plain": "", widgets.WIDGET: {"model_id": viewer.model_id}}
    monkeypatch.setattr(type(viewer), "_repr_mimebundle_", lambda self, **_: (view, colab))
    monkeypatch.setattr(widgets, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, metadata, raw: shown.append((data, metadata)))
    widgets.show_widget(viewer, draw_heads(*attention("dog bites man"), HEADS), "Two maps.")
    ((data, metadata),) = shown
    assert sorted(data) == ["application/vnd.jupyter.widget-view+json", "image/png", "text/plain"]
    assert metadata["image/png"]["alt"] == "Two maps." and metadata[widgets.WIDGET] == colab[widgets.WIDGET]
