"""Things to move: a few controls over a piece of HTML that Python computes anew at each change.

One small widget serves every chapter. The formula behind it stays where it is explained, in the
notebook, as a plain function ``render(**values) -> html``; the browser only draws controls and shows
what comes back. Where no kernel runs (a web page, the PDF, GitHub) a static picture stands instead.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import anywidget
import traitlets
from matplotlib.figure import Figure

from .plots import bundle
from .progress import in_notebook

WIDGET = "application/vnd.jupyter.widget-view+json"


def themed(name: str) -> str:
    """CSS for a widget of class ``name``: its colours where it is shown, in light and dark themes.

    JupyterLab tells its text colour. In VS Code and Colab the widget library's own variables are those of a
    light theme whatever the theme is, so text and background are both set there.
    """
    return f"""
    .{name} {{ color: var(--jp-content-font-color1, inherit); }}
    :is(.vscode-light, .vscode-dark, .vscode-high-contrast) .{name} {{
      color: var(--vscode-editor-foreground); background: var(--vscode-editor-background);
      --jp-layout-color1: var(--vscode-editor-background); }}
    html[theme=dark] .{name} {{ color: #e8eaed; background: #202124; --jp-layout-color1: #202124; }}
    """


@dataclass(frozen=True)
class Text:
    """A field to type into; ``rows`` above 1 makes it a box, ``limit`` bounds its characters."""

    name: str
    label: str
    value: str = ""
    rows: int = 2
    limit: int = 2_000
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Slider:
    """A number from ``low`` to ``high``; ``show`` writes it for its label, 9.0 as "1 billion" for instance."""

    name: str
    label: str
    low: float
    high: float
    step: float
    value: float
    show: Callable[[float], str] = "{:g}".format
    kind: str = field(default="slider", init=False)


@dataclass(frozen=True)
class Choice:
    """One of several ``options``; without ``value``, the first."""

    name: str
    label: str
    options: Sequence[str]
    value: str | None = None
    kind: str = field(default="choice", init=False)


Control = Text | Slider | Choice


def explore(render: Callable[..., str], controls: Sequence[Control], *, picture: Callable[..., Figure],
            alt: str) -> None:
    """Show controls over ``render(**values)``, an HTML text that follows them.

    ``picture(**values)``, a figure of ``utils.plots.figure``, is drawn once with the starting values, for
    viewers without a kernel; ``alt`` is its alternative text. ``render`` escapes what readers type. An
    error that it raises is shown in place of its result. ``ValueError`` for two controls of one name.
    """
    widget = Explorer(render, controls)
    show_widget(widget, picture(**widget.values), alt)


def show_widget(widget: anywidget.AnyWidget, still: Figure, alt: str) -> None:
    """Display a widget here, and for viewers without a kernel the figure ``still`` with its ``alt``."""
    data, metadata = bundle(still, alt, vector=True)
    if in_notebook():
        from IPython.display import display
        view, view_metadata = widget._repr_mimebundle_()  # the metadata tell Colab who draws the widget
        display({**data, WIDGET: view[WIDGET]}, metadata={**metadata, **view_metadata}, raw=True)


class Explorer(anywidget.AnyWidget):
    """The widget itself: ``values`` comes from the browser, ``html`` and ``shown`` go to it."""

    controls = traitlets.List().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)
    html = traitlets.Unicode().tag(sync=True)

    def __init__(self, render: Callable[..., str], controls: Sequence[Control]):
        names = [control.name for control in controls]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Two controls are named {name!r}. Give each a name of its own.")
        self._render, self._specs = render, {control.name: _checked(control) for control in controls}
        sent = [{key: value for key, value in asdict(control).items() if key != "show"} for control in controls]
        super().__init__(controls=sent, values={name: _start(spec) for name, spec in self._specs.items()})
        self.observe(self._update, "values")
        self._update()

    def _update(self, change=None) -> None:
        values = {name: _bounded(spec, self.values.get(name)) for name, spec in self._specs.items()}
        sliders = {name: spec for name, spec in self._specs.items() if isinstance(spec, Slider)}
        self.shown = {name: slider.show(values[name]) for name, slider in sliders.items()}
        try:
            self.html = self._render(**values)
        except Exception as error:  # a message beats a widget that stands still
            self.html = f"<p>{html.escape(f'{type(error).__name__}: {error}')}</p>"

    _esm = """
    function control(spec, model, changed) {
      const box = document.createElement("label");
      const name = document.createElement("span");
      name.textContent = spec.label;
      let input, value;
      if (spec.kind === "text") {
        input = document.createElement(spec.rows > 1 ? "textarea" : "input");
        if (spec.rows > 1) input.rows = spec.rows;
        input.maxLength = spec.limit;
        input.spellcheck = false;
      } else if (spec.kind === "choice") {
        input = document.createElement("select");
        for (const option of spec.options) input.add(new Option(option, option));
      } else {
        input = document.createElement("input");
        Object.assign(input, { type: "range", min: spec.low, max: spec.high, step: spec.step });
        value = document.createElement("output");
        const write = () => {
          value.textContent = model.get("shown")[spec.name];
          input.setAttribute("aria-valuetext", value.textContent);
        };
        model.on("change:shown", write);
        write();
      }
      input.value = model.get("values")[spec.name];
      for (const event of ["keydown", "keypress", "keyup"])   // typing is not a notebook command
        input.addEventListener(event, (e) => e.stopPropagation());
      input.addEventListener("input", () =>
        changed(spec.name, spec.kind === "slider" ? Number(input.value) : input.value));
      box.append(name, input, ...(value ? [value] : []));
      box.className = "explore-" + spec.kind;
      return box;
    }
    function render({ model, el }) {
      let timer, waiting = {};
      const changed = (name, value) => {
        waiting[name] = value;
        clearTimeout(timer);
        timer = setTimeout(() => {
          model.set("values", { ...model.get("values"), ...waiting });
          model.save_changes();
          waiting = {};
        }, 120);
      };
      const form = document.createElement("div");
      form.className = "explore-controls";
      form.append(...model.get("controls").map((spec) => control(spec, model, changed)));
      const result = document.createElement("div");
      result.setAttribute("aria-live", "polite");
      result.className = "explore-result";
      const write = () => { result.innerHTML = model.get("html"); };
      model.on("change:html", write);
      write();
      el.classList.add("explore");
      el.append(form, result);
    }
    export default { render };
    """
    _css = themed("explore") + """
    .explore { font-family: system-ui, sans-serif; font-size: 14px; max-width: 60rem; }
    .explore-controls { display: flex; flex-wrap: wrap; gap: 8px 20px; margin-bottom: 10px; }
    .explore label { display: flex; flex-wrap: wrap; gap: 2px 8px; align-items: center; }
    .explore label.explore-text { flex: 1 1 100%; flex-direction: column; align-items: stretch; }
    .explore textarea, .explore select, .explore label.explore-text input {
      font: inherit; padding: 4px 6px; color: inherit; border: 1px solid #767676; border-radius: 3px;
      background: var(--jp-layout-color1, transparent); box-sizing: border-box; }
    .explore option { color: CanvasText; background: Canvas; }
    .explore input[type=range] { flex: 1 1 130px; width: 220px; max-width: 220px; }
    .explore-result { overflow-x: auto; }
    .explore output { min-width: 6em; font-variant-numeric: tabular-nums; }
    """


def _start(control: Control):
    return control.options[0] if isinstance(control, Choice) and control.value is None else control.value


def _checked(control: Control) -> Control:
    if isinstance(control, Slider) and not control.low <= control.value <= control.high:
        raise ValueError(f"The slider {control.name!r} starts at {control.value}; its bounds are {control.low} and "
                         f"{control.high}. Start it between them.")
    if isinstance(control, Choice) and _start(control) not in control.options:
        raise ValueError(f"The choice {control.name!r} starts at {control.value!r}, which is none of "
                         f"{list(control.options)}. Start it at one of these.")
    return control


def _bounded(control: Control, value):
    """What the browser sent, brought back within the control's bounds."""
    if isinstance(control, Slider):
        number = value if isinstance(value, int | float) else control.value
        return min(max(number, control.low), control.high)
    if isinstance(control, Choice):
        return value if value in control.options else _start(control)
    return str(control.value if value is None else value)[: control.limit]
