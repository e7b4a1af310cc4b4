"""A training run at a glance while it runs: losses, learning rate, gradient norm, speed, samples.

In a notebook a small widget is redrawn at most once a second; when the run ends, or stops, a figure
and the samples stand in its place, so that what is saved needs no kernel. In a terminal there is a
progress bar, unless the training shows one itself. TensorBoard's log can be written besides.
"""

from __future__ import annotations

import math
import textwrap
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from matplotlib.figure import Figure
from tqdm import tqdm

from .plots import GREY, PALETTE, bundle
from .progress import in_notebook, progress
from .widgets import WIDGET, themed

LOSSES = ("training", "held out")
MAX_POINTS = 300  # of a curve in the browser; more than that no screen shows
REPLAY = 20e-6  # seconds a step: what comes faster is a resumed run telling its past again


class Dashboard:
    """Watches a run of ``total_steps`` steps; use as a context manager, with ``log`` as ``train``'s ``on_log``.

    ``references`` are losses to compare with, drawn as horizontal lines: {"3-gram model": 4.1}. ``every`` is
    the least time between two drawings, in seconds. With ``tensorboard``, a folder, every point is written there
    too. ``series`` is {name: (steps, values)}, ``samples`` {step: text}. ``ValueError`` for no steps,
    ``ModuleNotFoundError`` for a log that lacks its package. The figure left at the end holds no times
    and no speed, so that the same run leaves the same figure.
    """

    def __init__(self, total_steps: int, title: str = "Training", *, every: float = 1.0,
                 references: Mapping[str, float] | None = None, tensorboard: str | Path | None = None):
        if total_steps < 1:
            raise ValueError(f"A dashboard for {total_steps} steps has nothing to show. Give total_steps >= 1.")
        self.total_steps, self.title, self.every = int(total_steps), title, every
        self.references = {name: float(value) for name, value in (references or {}).items()}
        self.series: dict[str, tuple[array, array]] = {}
        self.samples: dict[int, str] = {}
        self.step = 0
        self._clock = _Pace()
        self._board = TensorBoard(tensorboard) if tensorboard else None
        self._widget = self._handle = self._bar = None
        self._errors: dict[str, str] = {}  # what failed, and how
        self._running = False
        self._drawn_at = -math.inf

    def log(self, name: str, step: int, value: float | str) -> None:
        """Note one point; ``name`` "sample" takes a text, any other a number.

        A point at an earlier step begins its curve again from there, as a resumed run does.
        """
        if name == "sample":
            for later in [known for known in self.samples if known >= step]:
                del self.samples[later]
            self.samples[step] = value = str(value)
        else:
            value = float(value)
            if name not in self.series:
                self.series[name] = array("q"), array("d")
            steps, values = self.series[name]
            if steps and step <= steps[-1]:
                keep = bisect_left(steps, step)
                del steps[keep:], values[keep:]
            steps.append(step)
            values.append(value)
        now = time.monotonic()
        if step > self.step:
            self._clock.tick(now, self.step, step)
            self.step = step
        if self._board:
            self._try("TensorBoard's log", self._board.log, name, step, value)
        if now - self._drawn_at >= self.every:
            self._try("the dashboard", self._draw)

    def __enter__(self) -> Dashboard:
        self._drawn_at = time.monotonic()
        self._clock.start(self._drawn_at, self.step)
        if in_notebook():
            from IPython.display import display
            self._widget = TrainingView(state=self._state())
            view, metadata = self._widget._repr_mimebundle_()  # the metadata tell Colab who draws the widget
            data = {WIDGET: view[WIDGET], "text/plain": f"{self.title}: a live dashboard stands here while it runs."}
            self._handle = display(data, metadata=metadata, raw=True, display_id=True)
        self._running = True
        return self

    def __exit__(self, *exception) -> None:
        if self._board:
            self._try("TensorBoard's log", self._board.close)
        if self._bar is not None:
            self._try("the dashboard", self._draw)
            self._bar.close()
        if self._widget is not None:
            words = self.describe() if self.series else f"{self.title}: stopped before its first point."
            self._handle.update({"text/plain": words}, metadata={}, raw=True)
            if self.series:
                self._try("the last picture", self._leave_picture)
            self._widget.layout.close()
            self._widget.close()
            if self.samples:
                print(self.samples_text())
        for what, error in self._errors.items():
            print(f"{self.title}: {what} could not go on ({error}); the run did.")
        self._widget = self._handle = self._bar = None
        self._running = False

    def _leave_picture(self) -> None:
        data, metadata = bundle(self.draw(), self.describe(), vector=True)
        self._handle.update(data, metadata=metadata, raw=True)

    def draw(self) -> Figure:
        """The figure that stays: losses above, every other curve but the speed in a panel below."""
        below = [name for name in self.series if name not in (*LOSSES, "tokens per second")]
        rows = [below[i : i + 2] for i in range(0, len(below), 2)]
        if rows and len(rows[-1]) == 1 and len(rows) > 1:
            rows[-1].append(".")
        width = max(map(len, rows), default=1)
        fig = Figure(figsize=(6.6, 3.0 + 1.7 * len(rows)), layout="constrained")
        panels = fig.subplot_mosaic([["losses"] * width, *rows], height_ratios=[3.0] + [1.7] * len(rows))
        axes = panels["losses"]
        for name, value in self.references.items():
            axes.axhline(value, color=GREY, linewidth=1, linestyle=":")
            axes.annotate(f"{name} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color=GREY, fontsize=9)
        for number, name in enumerate(name for name in LOSSES if name in self.series):
            self._draw_curve(axes, name, PALETTE[number], ("-", "--")[number], label=name)
        axes.set(title=f"{self.title}, {self._reached()}{self._latest_losses()}", ylabel="loss (nats per token)",
                 xlabel="step")
        for name in below:
            self._draw_curve(panels[name], name, PALETTE[2], "-")
            panels[name].set(title=name, xlabel="step")
        for axes in panels.values():
            axes.set_xlim(0, max(self.step, 1))
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        return fig

    def _draw_curve(self, axes, name: str, color: str, linestyle: str, **options) -> None:
        steps, values = (np.array(numbers, dtype=float) for numbers in self.series[name])
        good = np.isfinite(values)
        axes.plot(steps, np.where(good, values, np.nan), color=color, linestyle=linestyle,
                  marker="o" if good.sum() < 30 else None, markersize=4, **options)
        if not good.all():  # at the height of the last number before it
            axes.plot(steps[~good], _before(values)[~good], linestyle="", marker="x", color="black", markersize=8,
                      markeredgewidth=2, clip_on=False, label="not a number")

    def describe(self) -> str:
        """One sentence for those who cannot see the figure."""
        said = []
        for name in [*filter(self.series.get, LOSSES), *(name for name in self.series if name not in LOSSES)]:
            steps, values = self.series[name]
            finite = [value for value in values if math.isfinite(value)]
            what = f"{name} loss" if name in LOSSES else name
            if name != "tokens per second" and finite:
                broken = next((step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)), 0)
                said.append(f"{what} from {finite[0]:.3g} to {finite[-1]:.3g}"
                            + f" (not a number at step {broken:,})" * bool(broken))
        said += [f"{name} at {value:.3g} for comparison" for name, value in self.references.items()]
        return f"{self.title}, {self._reached()}: {'; '.join(said) or 'no number yet'}."

    def samples_text(self, most: int = 4, width: int = 76) -> str:
        """The samples, first to last; of more than ``most``, that many spread over the run."""
        steps = sorted(self.samples)
        if len(steps) > most:
            steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
        blocks = []
        for step in steps:
            paragraphs = self.samples[step].splitlines()
            lines = [line for part in paragraphs for line in textwrap.wrap(part, width - 4) or [""]]
            blocks.append("\n".join([f"Sample at step {step:,}:", *("    " + line for line in lines)]))
        return "\n".join(line.rstrip() for line in "\n".join(blocks).splitlines())

    def _latest_losses(self) -> str:
        said = [f"{name} {self.series[name][1][-1]:.2f}" for name in LOSSES if name in self.series]
        return f": {', '.join(said)}" if said else ""

    def _reached(self) -> str:
        whole = self.step >= self.total_steps
        return f"{self.step:,} steps" if whole else f"stopped at step {self.step:,} of {self.total_steps:,}"

    def _try(self, what: str, call: Callable, *arguments) -> None:
        """A picture that fails, or a full disk, must not end hours of training, nor one of them the other."""
        if what not in self._errors:
            try:
                call(*arguments)
            except Exception as error:
                self._errors[what] = f"{type(error).__name__}: {error}"

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        if self._widget is not None:
            self._widget.state = self._state()
        elif self._running:
            self._show_bar()

    def _state(self) -> dict:
        """What the browser draws: a few hundred points a curve, the numbers as text, the latest samples."""
        spent, left = self._clock.times(time.monotonic(), self.step, self.total_steps)
        shown = sorted(self.samples)[-3:]
        return {
            "title": self.title, "step": self.step, "total": self.total_steps,
            "spent": _minutes(spent), "left": _minutes(left), "references": self.references,
            "curves": {name: _thinned(*numbers) for name, numbers in self.series.items() if numbers[0]},
            "samples": [{"step": step, "text": self.samples[step][:1_000]} for step in reversed(shown)],
        }

    def _show_bar(self) -> None:
        if self._bar is None and not len(getattr(tqdm, "_instances", ())):  # two bars would fight for a line
            self._bar = progress(description=self.title, total=self.total_steps, unit="step")
        bar, past = self._bar, self._clock.past
        if bar is None or bar.disable:
            return
        if past > bar.initial:  # a resumed run's past took no time
            bar.initial = bar.n = bar.last_print_n = past
        latest = {name: values[-1] for name, (_, values) in self.series.items() if values}
        bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in latest.items()), refresh=False)
        bar.update(self.step - bar.n)
        bar.refresh()


class _Pace:
    """How long a run took and how long it will take, from its own steps, not from a past told again."""

    def __init__(self):
        self.past = 0  # the step that a resumed run went on from
        self._began = self._last = 0.0
        self._marks: deque[tuple[float, int]] = deque(maxlen=240)  # a second or more apart

    def start(self, now: float, step: int) -> None:
        self._began = self._last = now
        self._marks.clear()
        self._marks.append((now, step))

    def tick(self, now: float, before: int, step: int) -> None:
        if now - self._last < REPLAY * (step - before):
            self.past = step
            self._marks.clear()
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, step))
        self._last = now

    def times(self, now: float, step: int, total: int) -> tuple[float, float]:
        """Seconds since the start, and seconds left (NaN while no step of this run is done)."""
        if not self._marks or step <= self._marks[0][1]:
            return now - self._began, math.nan
        first, at = self._marks[0]
        left = (self._last - first) / (step - at) * max(total - step, 0) - (now - self._last)
        return now - self._began, max(left, 0.0)


class TensorBoard:
    """TensorBoard's log in a folder, through ``log``; end with ``close``.

    The past that a resumed run tells again is not written twice: it stands in the folder already.
    ``ModuleNotFoundError`` without the package tensorboard.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                f"The log in {str(folder)!r} needs the package tensorboard ({error}). Install it with "
                "`pip install tensorboard`, or do without the log.") from None
        self._make, self._folder, self._writer = SummaryWriter, Path(folder), None
        self._clock, self._step, self._past = _Pace(), 0, 0
        self._waiting, self._since = [], 0.0

    def log(self, name: str, step: int, value: float | str) -> None:
        """Note one point: a number, or a text."""
        now = time.monotonic()
        if step > self._step:
            self._clock.tick(now, self._step, step)
            self._step = step
        if not self._waiting:
            self._since = now
        self._waiting.append((name, step, value))
        if now - self._since >= 1:  # by now the step that a resumed run goes on from is known
            self._write()

    def close(self) -> None:
        """Write what still waits."""
        self._write()
        if self._writer:
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        if self._waiting and self._writer is None:
            known = any(self._folder.glob("events.out.tfevents.*"))
            self._past = self._clock.past if known else 0
            self._writer = self._make(str(self._folder), purge_step=self._past + 1 if known else None)
        for name, step, value in self._waiting:
            if step > self._past:
                (self._writer.add_text if isinstance(value, str) else self._writer.add_scalar)(name, value, step)
        self._waiting.clear()


def _minutes(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _before(values: np.ndarray) -> np.ndarray:
    """Each value, or where it is not finite the last finite one before it (the first, if none is before)."""
    good = np.flatnonzero(np.isfinite(values))
    if not len(good):
        return np.zeros(len(values))
    last = np.searchsorted(good, np.arange(len(values)), side="right") - 1
    return values[good[np.maximum(last, 0)]]


def _thinned(steps: array, values: array) -> dict:
    """A curve of at most ``MAX_POINTS`` points that keeps its extremes, and where it was not a number."""
    xs, ys = np.array(steps), np.array(values)
    good = np.isfinite(ys)
    stops = [[int(x), float(f"{y:.5g}")] for x, y in zip(xs[~good][:40], _before(ys)[~good][:40], strict=True)]
    xs, ys = xs[good], ys[good]
    if len(xs) > MAX_POINTS:
        size = -(-len(xs) // (MAX_POINTS // 2 - 1))
        starts = np.arange(0, len(xs), size)
        blocks = np.pad(ys, (0, -len(ys) % size), "edge").reshape(-1, size)
        chosen = np.unique(np.concatenate([starts + blocks.argmin(1), starts + blocks.argmax(1), [len(xs) - 1]]))
        xs, ys = xs[chosen], ys[chosen]
    return {"x": xs.tolist(), "y": [float(f"{y:.5g}") for y in ys], "stops": stops}


class TrainingView(anywidget.AnyWidget):
    """The widget: ``state`` goes to the browser, nothing comes back."""

    state = traitlets.Dict().tag(sync=True)

    _esm = """
    const make = (tag, properties = {}, ...children) => {
      const node = Object.assign(document.createElement(tag), properties);
      node.append(...children);
      return node;
    };
    const draw = (tag, attributes, ...children) => {
      const { namespaceURI } = make("div", { innerHTML: "<svg></svg>" }).firstChild;
      const node = document.createElementNS(namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
      node.append(...children);
      return node;
    };
    const whole = (x) => Math.round(x).toLocaleString("en");
    const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 1000 ? whole(x)
      : Math.abs(x) < 0.001 ? x.toExponential(1) : String(Number(x.toPrecision(3))));
    function ticks(low, high, count) {   // round numbers between low and high
      const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
      const first = Math.ceil(low / step - 1e-9);
      return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
    }
    function chart(title, curves, total, references, width, height, zero) {
      const all = curves.flatMap(([, c]) => [...c.y, ...c.stops.map((s) => s[1])]).concat(Object.values(references));
      let [low, high] = [Math.min(...all), Math.max(...all)];
      if (!(high > low)) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
      const pad = (high - low) * 0.06;
      low = zero && low >= 0 ? 0 : low - pad;
      high += pad;
      const left = 52, right = 8, top = 6, bottom = 20;
      const x = (step) => left + (width - left - right) * Math.min(step / total, 1);
      const y = (value) => top + (height - top - bottom) * (1 - (value - low) / (high - low));
      const parts = [];
      for (const value of ticks(low, high, height > 150 ? 5 : 3))
        parts.push(draw("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "dash-grid" }),
          draw("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, short(value)));
      for (const step of ticks(0, total, width > 400 ? 6 : 2))
        parts.push(draw("text", { x: x(step), y: height - 5,
          "text-anchor": x(step) > width - 30 ? "end" : "middle" }, step ? whole(step) : "step 0"));
      for (const [name, value] of Object.entries(references))
        parts.push(draw("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "dash-reference" }),
          draw("text", { x: width - right, y: y(value) - 4, "text-anchor": "end" }, `${name} ${value.toFixed(2)}`));
      curves.forEach(([name, curve], i) => {
        const points = curve.x.map((step, k) => `${x(step).toFixed(1)},${y(curve.y[k]).toFixed(1)}`);
        parts.push(draw("polyline", { points: points.join(" "), class: "dash-line dash-" + i }));
        if (points.length < 30)
          points.forEach((p) => { const [cx, cy] = p.split(",");
            parts.push(draw("circle", { cx, cy, r: 2.5, class: "dash-dot dash-" + i })); });
        for (const [step, value] of curve.stops) {
          const [cx, cy] = [x(step), y(value)];
          parts.push(draw("path", { d: `M${cx - 5} ${cy - 5}l10 10m0 -10l-10 10`, class: "dash-stop" }));
        }
      });
      const said = curves.map(([name, c]) => name + " "
        + (c.y.length ? `${short(c.y[0])} at first, ${short(c.y.at(-1))} now` : "has no number")
        + (c.stops.length ? `, not a number at step ${whole(c.stops[0][0])}` : "")).join("; ");
      const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
        "aria-label": `${title} by step: ${said}.` }, ...parts);
      const legend = make("div", { className: "dash-legend", ariaHidden: "true" }, make("b", { textContent: title }));
      curves.forEach(([name, c], i) => {
        const key = draw("svg", { width: 26, height: 8 },
          draw("line", { x1: 0, x2: 26, y1: 4, y2: 4, class: "dash-line dash-" + i }));
        const value = c.stops.length && !(c.x.at(-1) > c.stops.at(-1)[0]) ? "not a number" : short(c.y.at(-1));
        legend.append(make("span", {}, ...(curves.length > 1 ? [key] : []),
          `${curves.length > 1 ? name + " " : ""}${value}`));
      });
      return make("div", { className: "dash-chart" }, legend, svg);
    }
    function render({ model, el }) {
      const title = make("b"), bar = make("progress", { ariaLabel: "Training progress" }), line = make("span");
      const charts = make("div", { className: "dash-charts" }), samples = make("div", { className: "dash-samples" });
      const heard = make("div", { className: "dash-heard", role: "status" });
      const latest = make("div"), list = make("div");   // what can hold the keyboard's focus is never replaced
      const older = make("details", {}, make("summary", { textContent: "Earlier samples" }), list);
      samples.append(latest, older);
      let told = 0, shown = "";
      const sample = ({ step, text }) => make("figure", {},
        make("figcaption", { textContent: `Sample at step ${whole(step)}` }),
        make("blockquote", { textContent: text }));
      function write() {
        const s = model.get("state");
        if (!s.total) return;
        el.ariaLabel = s.title + ": live dashboard";
        title.textContent = s.title;
        Object.assign(bar, { max: s.total, value: Math.min(s.step, s.total) });
        line.textContent = `step ${whole(s.step)} of ${whole(s.total)} · ${s.spent} so far · ${s.left} left`;
        const width = Math.max(260, el.clientWidth || 600), columns = width < 330 ? 1 : width < 620 ? 2 : 3;
        const of = (names) => names.filter((name) => s.curves[name]).map((name) => [name, s.curves[name]]);
        const losses = of(["training", "held out"]);
        const others = Object.keys(s.curves).filter((name) => !["training", "held out"].includes(name));
        const small = (width - 12 * (columns - 1)) / columns;
        charts.replaceChildren(
          ...(losses.length ? [chart("Loss (nats per token)", losses, s.total, s.references, width, 220)] : []),
          ...others.map((name) =>
            chart(name[0].toUpperCase() + name.slice(1), of([name]), s.total, {}, small, 110, true)));
        const key = JSON.stringify(s.samples);
        if (key !== shown) {
          shown = key;
          latest.replaceChildren(...s.samples.slice(0, 1).map(sample));
          list.replaceChildren(...s.samples.slice(1).map(sample));
          older.hidden = s.samples.length < 2;
        }
        const held = s.curves["held out"];   // the one number worth hearing, and it comes seldom
        if (held?.x.length && held.x.at(-1) > told) {
          told = held.x.at(-1);
          heard.textContent = `Step ${whole(told)}: held-out loss ${short(held.y.at(-1))}.`;
        }
      }
      el.classList.add("dash");
      el.role = "group";
      el.dataset.lmSuppressShortcuts = "true";   // keys pressed here are not commands to the notebook
      for (const event of ["keydown", "keypress", "keyup"]) el.addEventListener(event, (e) => e.stopPropagation());
      el.append(make("div", { className: "dash-head" }, title, bar, line), charts, samples, heard);
      older.hidden = true;
      let seen = 0;
      const watcher = new ResizeObserver(() => {
        if (Math.abs(el.clientWidth - seen) > 2) { seen = el.clientWidth; write(); }
      });
      watcher.observe(el);
      model.on("change:state", write);
      write();
      return () => {
        watcher.disconnect();
        model.off("change:state", write);
      };
    }
    export default { render };
    """
    _css = themed("dash") + """
    .dash { font-family: system-ui, sans-serif; font-size: 14px; max-width: 60rem;
            --dash-0: #0072B2; --dash-1: #D55E00; }
    :is([data-jp-theme-light="false"], .vscode-dark, html[theme=dark]) .dash {
      --dash-0: #56B4E9; --dash-1: #E69F00; }
    .dash [hidden] { display: none; }
    .dash-head { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; margin-bottom: 8px; }
    .dash-head progress { flex: 1 1 120px; min-width: 100px; accent-color: var(--dash-0); }
    .dash-head span, .dash-legend { font-variant-numeric: tabular-nums; }
    .dash-charts { display: flex; flex-wrap: wrap; gap: 10px 12px; }
    .dash-legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: 13px; }
    .dash-legend span { display: inline-flex; gap: 5px; align-items: center; }
    .dash svg { display: block; max-width: 100%; }
    .dash text { font-size: 11px; fill: currentColor; }
    .dash-grid { stroke: currentColor; opacity: 0.18; }
    .dash-reference { stroke: currentColor; opacity: 0.7; stroke-dasharray: 2 3; }
    .dash-line { fill: none; stroke-width: 2; stroke-linejoin: round; }
    .dash-line.dash-0 { stroke: var(--dash-0); }
    .dash-line.dash-1 { stroke: var(--dash-1); stroke-dasharray: 7 3; }
    .dash-dot.dash-0 { fill: var(--dash-0); }
    .dash-dot.dash-1 { fill: var(--dash-1); }
    .dash-stop { stroke: currentColor; stroke-width: 2.5; fill: none; }
    .dash-samples figure { margin: 10px 0 0; }
    .dash-samples figcaption { font-size: 13px; font-weight: bold; }
    .dash-samples blockquote { margin: 4px 0; padding-left: 10px; border-left: 3px solid var(--dash-0);
                               white-space: pre-wrap; overflow-wrap: anywhere; }
    .dash-heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
    """
