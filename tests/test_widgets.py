"""Controls over HTML that Python computes, and the picture that stands for them without a kernel."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
import types

import nbformat
import numpy as np
import pytest
from test_notebooks import notebook

from utils import dashboard, widgets
from utils.attention_viewer import MAX_CHARACTERS, MAX_TOKENS, AttentionViewer, draw_heads
from utils.dashboard import MAX_POINTS, Dashboard, TrainingView
from utils.notebooks import Job, run_notebooks
from utils.plots import VECTOR
from utils.progress import progress
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
    assert sorted(output.data) == [VECTOR, "image/png", "text/plain"]
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


@pytest.mark.parametrize("widget", [Explorer, AttentionViewer, TrainingView])
def test_a_widget_asks_nobody_outside_and_keeps_the_notebooks_keys(widget):
    source = widget._esm + widget._css
    assert "export default { render }" in source
    for word in ("http", "fetch(", "import(", "import ", "@import", "url(", "XMLHttpRequest", "eval(", "window."):
        assert word not in source, word
    assert "stopPropagation" in source


@pytest.mark.parametrize("widget", [Explorer, AttentionViewer, TrainingView])
def test_a_widget_sets_text_and_background_where_its_hosts_variables_are_wrong(widget):
    """VS Code and Colab load the widget library's variables of a light theme, in dark themes too."""
    (name,) = re.findall(r'el.classList.add\("(\w+)"\)', widget._esm)
    rules = dict(re.findall(r"([^{}]+?)\s*\{([^}]*)\}", widget._css))
    rules = {" ".join(selector.split()): set(re.findall(r"([\w-]+):", body)) for selector, body in rules.items()}
    for selector in (f":is(.vscode-light, .vscode-dark, .vscode-high-contrast) .{name}", f"html[theme=dark] .{name}"):
        assert rules[selector] >= {"color", "background", "--jp-layout-color1"}
    assert rules[f".{name}"] & {"color", "font-family"}


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize("widget", [Explorer, AttentionViewer, TrainingView])
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
    assert sorted(data) == [VECTOR, widgets.WIDGET, "image/png", "text/plain"]
    assert metadata["image/png"]["alt"] == "Two maps." and metadata[widgets.WIDGET] == colab[widgets.WIDGET]


# ---------------------------------------------------------------- the training dashboard


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told to."""
    now = types.SimpleNamespace(time=100.0)
    monkeypatch.setattr(dashboard, "time", types.SimpleNamespace(monotonic=lambda: now.time))
    return now


def curve(board, name):
    return [list(numbers) for numbers in board.series[name]]


def test_a_resumed_run_tells_its_past_again_and_no_point_doubles():
    board = Dashboard(60)
    for step in range(10, 50, 10):
        board.log("training", step, 5 - step / 20)
        board.log("gradient norm", step, 1.0)
        board.log("sample", step, f"at {step}")
    for step in (10, 20):  # from the checkpoint at 20: the past again, then two new steps
        board.log("training", step, 5 - step / 20)
    for step in (30, 40):
        board.log("training", step, 1.0)
        board.log("gradient norm", step, 2.0)
    board.log("sample", 30, "again")
    assert curve(board, "training") == [[10, 20, 30, 40], [4.5, 4.0, 1.0, 1.0]]
    assert curve(board, "gradient norm") == [[10, 20, 30, 40], [1.0, 1.0, 2.0, 2.0]]
    assert board.samples == {10: "at 10", 20: "at 20", 30: "again"}


def test_the_time_left_counts_this_runs_steps_only(clock):
    board = Dashboard(300)
    with board:
        clock.time += 0.5  # reading a checkpoint
        for step in range(10, 101, 10):
            board.log("training", step, 3.0)
            clock.time += 1e-5
        for step in range(101, 121):
            clock.time += 2.0
            board.log("training", step, 3.0)
        assert board._state()["left"] == "6:00"  # 180 steps of two seconds
        assert board._state()["spent"] == "0:41"  # 0.5 seconds and 20 steps, rounded
        clock.time += 60
        assert board._state()["left"] == "5:00"


def test_before_the_first_step_no_time_is_promised(clock):
    with Dashboard(300) as board:
        assert board._state()["left"] == "–"
        clock.time += 7200
        assert board._state()["spent"] == "2:00:00"


def test_the_browser_is_told_at_most_once_a_second(clock):
    board, told = Dashboard(1000), []
    with board:
        board._widget = types.SimpleNamespace()
        board._state = lambda: told.append(clock.time)
        for step in range(1, 1001):
            clock.time += 0.03
            board.log("training", step, 1.0)
            board.log("learning rate", step, 1.0)
        board._widget = None
    assert 28 <= len(told) <= 30 and min(np.diff(told)) >= 1


def test_a_number_that_is_none_is_marked_where_it_came_and_does_not_break_the_message():
    board = Dashboard(10)
    for step, value in enumerate([5.0, 4.0, math.nan, math.inf], start=1):
        board.log("training", step, value)
    board.log("held out", 1, math.nan)
    state = json.loads(json.dumps(board._state(), allow_nan=False))
    assert state["curves"]["training"] == {"x": [1, 2], "y": [5.0, 4.0], "stops": [[3, 4.0], [4, 4.0]]}
    assert state["curves"]["held out"] == {"x": [], "y": [], "stops": [[1, 0.0]]}
    assert "training loss from 5 to 4 (not a number at step 3)" in board.describe()
    marks = [line for line in board.draw().axes[0].lines if line.get_label() == "not a number"]
    assert marks[0].get_xydata().tolist() == [[3, 4], [4, 4]] and marks[1].get_xydata().tolist() == [[1, 0]]


def test_a_long_curve_is_thinned_but_keeps_its_spikes_and_its_ends():
    board = Dashboard(100_000)
    for step in range(1, 100_001):
        board.log("gradient norm", step, 50.0 if step == 77_777 else -9.0 if step == 1_234 else math.sin(step))
    sent = board._state()["curves"]["gradient norm"]
    assert MAX_POINTS / 2 < len(sent["x"]) <= MAX_POINTS and sent["x"] == sorted(set(sent["x"]))
    assert sent["x"][-1] == 100_000 and sent["x"][0] < 1_000
    assert sent["y"][sent["x"].index(77_777)] == 50.0 and sent["y"][sent["x"].index(1_234)] == -9.0


@pytest.mark.parametrize("points", [301, 302, 596, 1_000, 1_001])
def test_the_newest_spike_is_drawn(points):
    for behind in range(1, 8):
        values = [2.0] * points
        values[-behind] = 50.0
        sent = dashboard._thinned(range(points), values)
        assert len(sent["x"]) <= MAX_POINTS and sent["x"][-1] == points - 1
        assert sent["y"][sent["x"].index(points - behind)] == max(sent["y"]) == 50.0


def test_what_stays_shows_every_curve_but_the_speed_and_says_so():
    board = Dashboard(400, "A test", references={"guessing": 6.9})
    for step in (100, 200):
        for name, value in [("tokens per second", 5e3 + step), ("learning rate", 0.1), ("gradient norm", 2 / step),
                            ("skipped steps", 0), ("held out", 5.0), ("training", 500 / step)]:
            board.log(name, step, value)
    figure = board.draw()
    assert [axes.get_title("left") or axes.get_title() for axes in figure.axes] == [
        "A test, stopped at step 200 of 400: training 2.50, held out 5.00",
        "learning rate", "gradient norm", "skipped steps"]
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    assert board.describe() == (
        "A test, stopped at step 200 of 400: training loss from 5 to 2.5; held out loss from 5 to 5; learning rate "
        "from 0.1 to 0.1; gradient norm from 0.02 to 0.01; skipped steps from 0 to 0; guessing at 6.9 for comparison.")
    board.log("training", 400, 1.0)
    assert "A test, 400 steps" in board.describe()


def test_a_browser_gets_the_latest_samples_cut_short():
    board = Dashboard(100)
    for step in range(10, 101, 10):
        board.log("sample", step, f"{step} " + "x" * 10_000)
    sent = board._state()["samples"]
    assert [sample["step"] for sample in sent] == [100, 90, 80]
    assert all(sample["text"].startswith(str(sample["step"])) and len(sample["text"]) == 1_000 for sample in sent)


def test_of_many_samples_the_first_the_last_and_some_between_stay():
    board = Dashboard(100)
    for step in range(10, 101, 10):
        board.log("sample", step, f"{step} " + "word " * 40 + "\n\nend")
    said = board.samples_text()
    assert [line for line in said.splitlines() if "Sample" in line] == [
        f"Sample at step {step}:" for step in (10, 40, 70, 100)]
    assert max(map(len, said.splitlines())) <= 76 and "    100 word" in said and "\n\n    end" in said


@pytest.mark.parametrize("steps", [0, -3])
def test_a_dashboard_needs_steps(steps):
    with pytest.raises(ValueError, match=rf"{steps} steps .* total_steps >= 1"):
        Dashboard(steps)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_there_is_a_bar_and_nothing_else(monkeypatch, clock, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Dashboard(100, "A run") as board:
        for step in range(1, 51):
            clock.time += 0.1
            board.log("training", step, 2.5)
            board.log("held out", step, 2.75)
            board.log("sample", step, "Once upon a time")
    assert "A run" in terminal.getvalue() and "50/100" in terminal.getvalue()
    assert "training 2.5, held out 2.75" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_where_a_training_shows_its_own_bar_there_is_no_second(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Dashboard(100, "A run") as board, progress(description="its own", total=100) as bar:
        for step in range(1, 51):
            clock.time += 0.1
            bar.update()
            board.log("training", step, 2.5)
    assert "its own" in terminal.getvalue() and "A run" not in terminal.getvalue()


def test_a_drawing_that_fails_ends_no_training_and_is_told(clock, capsys):
    with Dashboard(10, "A run") as board:
        board._widget = types.SimpleNamespace()
        board._state = lambda: 1 / 0
        for step in range(1, 11):
            clock.time += 2
            board.log("training", step, 1.0)
        board._widget = None
    assert len(board.series["training"][0]) == 10
    assert capsys.readouterr().out == (
        "A run: the dashboard could not go on (ZeroDivisionError: division by zero); the run did.\n")


def test_a_drawing_that_fails_does_not_end_the_log(tmp_path, monkeypatch, clock, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Dashboard, "_show_bar", lambda self: 1 / 0)
    Writer.made.clear()
    train_with_log(tmp_path, clock, 1, 12)
    assert Writer.made[0].closed and len(Writer.made[0].points) == 25
    assert capsys.readouterr().out.count("could not go on (ZeroDivisionError") == 1


def test_a_last_picture_that_fails_leaves_words(monkeypatch, capsys):
    shown = []
    handle = types.SimpleNamespace(update=lambda data, **_: shown.append(data))
    monkeypatch.setattr(dashboard, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: handle)
    with Dashboard(2, "The loss of $x^$") as board:
        board.log("training", 2, 1.5)
    assert shown[-1] == {"text/plain": "The loss of $x^$, 2 steps: training loss from 1.5 to 1.5."}
    assert "ValueError" in capsys.readouterr().out


def test_a_full_disk_under_tensorboards_log_ends_no_training(tmp_path, monkeypatch, clock, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=full))
    train_with_log(tmp_path, clock, 1, 12)
    assert "No space left on device); the run did." in capsys.readouterr().out


RUN = """
import sys, time; sys.path.insert(0, {root!r})
from utils.dashboard import Dashboard
def run(steps, pause=0, error=None):
    with Dashboard(20, "A run", every=0.05) as board:
        for step in range(1, steps + 1):
            time.sleep(pause)
            board.log("tokens per second", step, 100 * time.monotonic())
            board.log("training", step, 5 / step)
        if steps:
            board.log("sample", step, "Once upon a time")
        if error:
            raise error
"""


def test_what_is_saved_is_a_picture_without_times_whatever_ended_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    caught = "try:\n    {}\nexcept BaseException as error:\n    print(type(error).__name__)"
    path = notebook(tmp_path, RUN.format(root=str(widgets.__file__).rsplit("/", 2)[0]),
                    "run(20, 0.02)", "run(20)", *(caught.format(f"run({steps}, 0.01, {error})") for steps, error in [
                        (7, "KeyboardInterrupt"), (7, "FloatingPointError('nan')"), (0, "ValueError('early')")]),
                    "from ipywidgets.widgets.widget import _instances\nprint(len(_instances), 'left alive')")
    run_notebooks([Job(path, "a test", 5)], save=True)
    saved = nbformat.read(path, as_version=4)
    slow, fast, stopped, failed, early, (alive,) = [cell.outputs for cell in saved.cells[2:]]
    assert slow == fast  # to the pixel
    for outputs, words in [(slow, "20 steps"), (stopped, "stopped at step 7 of 20"), (failed, "step 7 of 20")]:
        assert sorted(outputs[0].data) == [VECTOR, "image/png", "text/plain"]
        assert words in outputs[0].metadata["image/png"]["alt"] and "loss from 5 to" in outputs[0].data["text/plain"]
        assert outputs[1].name == "stdout" and "Once upon a time" in outputs[1].text
    assert stopped[1].text.endswith("KeyboardInterrupt\n") and failed[1].text.endswith("FloatingPointError\n")
    assert early[0].data == {"text/plain": "A run: stopped before its first point."}
    assert alive.text == "0 left alive\n" and "widgets" not in saved.metadata and len(json.dumps(slow)) < 60_000


def test_watching_costs_a_training_nothing_to_speak_of():
    from time import perf_counter
    board = Dashboard(1_500)
    with board:
        board._widget = types.SimpleNamespace(state=None)
        began = perf_counter()
        for step in range(1, 1_501):
            for name in ("training", "learning rate", "gradient norm", "tokens per second"):
                board.log(name, step, 1.0 / step)
        logged = perf_counter() - began
        drawn = min(timed(board._state) for _ in range(5))
        board._widget = None
    assert logged / 1_500 < 100e-6  # of a step that takes tens of milliseconds
    assert drawn < 10e-3  # at most once a second


def timed(call):
    from time import perf_counter
    began = perf_counter()
    call()
    return perf_counter() - began


# ---------------------------------------------------------------- TensorBoard's log


class Writer:
    """What ``SummaryWriter`` is told."""

    made = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.points, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.points.append((name, step, value))

    add_text = add_scalar

    def close(self):
        self.closed = True


def train_with_log(folder, clock, start, stop, replayed=()):
    with Dashboard(100, tensorboard=folder) as board:
        clock.time += 1.5
        for step in replayed:
            board.log("training", step, 1.0)
            clock.time += 1e-6
        for step in range(start, stop + 1):
            clock.time += 0.4
            board.log("training", step, 1.0)
            board.log("learning rate", step, 0.5)
        board.log("sample", step, "Once")


def test_tensorboard_gets_every_point_once_and_a_resumed_past_stands_there_already(tmp_path, monkeypatch, clock):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    Writer.made.clear()
    train_with_log(tmp_path, clock, 1, 12)
    (tmp_path / "events.out.tfevents.1").touch()
    train_with_log(tmp_path, clock, 11, 20, replayed=range(1, 11))
    train_with_log(tmp_path / "new", clock, 11, 12, replayed=range(1, 11))
    first, second, elsewhere = Writer.made
    assert first.purge_step is None and second.purge_step == 11 and elsewhere.purge_step is None
    assert all(writer.closed for writer in Writer.made)
    for writer, steps in [(first, range(1, 13)), (second, range(11, 21)), (elsewhere, range(1, 13))]:
        assert [step for name, step, _ in writer.points if name == "training"] == list(steps)
        assert writer.points[-1] == ("sample", steps[-1], "Once")


def test_without_its_package_tensorboards_log_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="'runs/1' needs the package tensorboard.*pip install tensorboard"):
        Dashboard(10, tensorboard="runs/1")


def test_tensorboard_itself_reads_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Dashboard(10, tensorboard=tmp_path) as board:
        for step in range(1, 11):
            board.log("training", step, float(step))
        board.log("sample", 10, "Once upon a time")
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("training")] == [(i, i) for i in range(1, 11)]
    assert events.Tags()["tensors"] == ["sample/text_summary"]
