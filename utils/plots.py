"""One look for every figure of the course, and alternative text for those who cannot see it.

Colours are four of Okabe and Ito's and three that join them: each stands out from white by 3:1 or more, and the
common kinds of colour blindness can tell them apart. Lines differ in dash as well, fills in their outlines, so
that nothing rests on colour alone. Every figure goes through ``show``, which
puts ``alt`` where screen readers, plain-text viewers and the book find it.
"""

from __future__ import annotations

import base64
import gzip
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from .progress import in_notebook
from .workspace import atomic_write

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#1499F8", "#7E5000", "#000000"]
GREY = "#595959"
VECTOR = "application/vnd.bytes-to-chat.svg+gzip"  # a figure for the book, base64 of a gzipped SVG
STYLE = {
    "axes.prop_cycle": cycler(color=PALETTE) + cycler(
        linestyle=["-", "--", "-.", ":", (0, (9, 2)), (0, (6, 2, 1, 2, 1, 2)), (0, (1, 1))]),
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": 11, "axes.labelsize": 10, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "lines.linewidth": 1.8, "legend.frameon": False,
    "font.size": 10, "figure.facecolor": "white", "savefig.facecolor": "white", "image.cmap": "Blues",
    "svg.hashsalt": "bytes-to-chat",
}
matplotlib.rcParams.update(STYLE)


def figure(ncols: int = 1, nrows: int = 1, width: float = 6.6, height: float = 3.0, **options):
    """A figure with ``nrows * ncols`` axes in the course's style: ``(figure, axes)``, sizes in inches."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(nrows, ncols, **options)


def show(fig: Figure, alt: str) -> None:
    """Display a figure here, with ``alt`` as its alternative text (what it shows, in one sentence)."""
    data, metadata = bundle(fig, alt, vector=True)
    if in_notebook():
        from IPython.display import display
        display(data, metadata=metadata, raw=True)


def save(fig: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    _plain_numbers(fig)
    with atomic_write(path) as temporary:
        temporary.write_bytes(_png(fig))


def _png(fig: Figure) -> bytes:
    drawn, buffer = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=144)
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def bundle(fig: Figure, alt: str, vector: bool = False) -> tuple[dict, dict]:
    """A figure as Jupyter's MIME bundle: (data, metadata), with ``alt`` as its alternative text.

    Notebook viewers show the PNG. With ``vector`` the same figure stands beside it as an SVG, gzipped and
    under a type of its own: the book prints that one, and no viewer refuses it or doubles the file's size.
    """
    if not alt.strip():
        raise ValueError("A figure needs alternative text: say in a sentence what it shows.")
    _plain_numbers(fig)
    data = {"image/png": base64.b64encode(_png(fig)).decode(), "text/plain": f"Figure: {alt}"}
    if vector:
        data[VECTOR] = base64.b64encode(gzip.compress(_svg(fig), mtime=0)).decode()
    width = round(fig.get_figwidth() * 100)  # in CSS pixels; the image holds 1.44 pixels for each
    return data, {"image/png": {"alt": alt, "width": width}}


def _plain_numbers(fig: Figure) -> None:
    """Label axes with 20,000 instead of 20000, logarithmic ones with 1, 10, 100 and short ones with 1, 2, 5, 10.

    What a notebook has set itself stays; axes beyond 0.0001 and a million keep their powers of ten.
    """
    for axis in (axis for axes in fig.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        if axis.get_scale() == "log":
            if axis.isDefault_majloc and axis.get_transform().base == 10 and high < 300 * low:
                axis.set_major_locator(LogLocator(subs=range(1, 10) if high < 4 * low else (1, 2, 5)))
            plain = low > 3e-5 and high < 2e6
        else:
            plain = axis.get_scale() == "linear" and 10_000 <= max(-low, high) < 2e6
        if plain and axis.isDefault_majfmt:
            axis.set_major_formatter("{x:,.7g}")
            axis.set_minor_formatter(NullFormatter())


def _svg(fig: Figure) -> bytes:
    """The figure as SVG with its text as text: searchable, small, and set in the same font everywhere."""
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        fig.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def plot_lines(series: Mapping[str, tuple[Sequence, Sequence]], *, title: str, xlabel: str, ylabel: str,
               alt: str, references: Mapping[str, float] | None = None, log: str = "",
               markers: bool = False, height: float = 3.0) -> None:
    """Lines by name, each ``(x, y)``, with horizontal ``references``; ``log`` names log axes: "x", "y", "xy"."""
    fig, axes = figure(height=height)
    _draw_lines(axes, series, references, markers)
    _finish(axes, title, xlabel, ylabel, log)
    marked = sorted({float(x) for xs, _ in series.values() for x in xs}) if markers and "x" in log else []
    if len(marked) > 1 and marked[0] > 0 and np.diff(np.log(marked)).min() > np.log(marked[-1] / marked[0]) / 9.5:
        axes.set_xticks(marked)  # every point that was measured has its number
        axes.xaxis.set_minor_locator(NullLocator())
    show(fig, alt)


def plot_bars(values: Mapping[str, float], *, title: str, xlabel: str, alt: str, form: str = "{:.2f}",
              highlight: str | None = None) -> None:
    """Horizontal bars by name with their values written out; one may be highlighted."""
    fig, axes = figure(height=0.8 + 0.36 * len(values))
    names = list(values)
    colors = [PALETTE[1] if name == highlight else PALETTE[0] for name in names]
    bars = axes.barh(names, [float(values[n]) for n in names], color=colors, height=0.65)
    for bar, name in zip(bars, names, strict=True):
        if name == highlight:
            bar.set_hatch("//")
            bar.set_edgecolor("white")
    axes.bar_label(bars, [form.format(float(values[n])) for n in names], padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.13)
    _finish(axes, title, xlabel, "", "")
    show(fig, alt)


def plot_histogram(values, *, title: str, xlabel: str, ylabel: str, alt: str, bins=40, log: str = "") -> None:
    """A histogram of numbers, or of several sets of them by name; with ``log="x"`` the bins widen."""
    sets = values if isinstance(values, Mapping) else {"": values}
    everything = np.concatenate([np.asarray(v, dtype=float) for v in sets.values()])
    if "x" in log and isinstance(bins, int):
        bins = np.geomspace(max(everything.min(), 1e-9), everything.max(), bins)
    fig, axes = figure()
    for number, (name, numbers) in enumerate(sets.items()):
        axes.hist(np.asarray(numbers, dtype=float), bins=bins, label=name, histtype="stepfilled",
                  facecolor=(PALETTE[number], 0.5), edgecolor=PALETTE[number], linestyle="-", linewidth=1.2)
    if len(sets) > 1:
        axes.legend()
    _finish(axes, title, xlabel, ylabel, log)
    show(fig, alt)


def draw_heatmap(axes, matrix, *, title: str = "", xlabel: str = "", ylabel: str = "", xticks=None, yticks=None,
                 numbers: str = "", vmin=None, vmax=None, cmap="Blues", aspect="equal"):
    """A matrix as coloured squares on existing axes; ``numbers`` (".2f") writes the values into them."""
    matrix = np.asarray(matrix, dtype=float)
    image = axes.imshow(matrix, vmin=vmin, vmax=vmax, cmap=cmap, aspect=aspect)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for axis, labels in ((axes.xaxis, xticks), (axes.yaxis, yticks)):
        if labels is None:
            axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        else:
            axis.set_ticks(range(len(labels)), labels)
    if xticks is not None and max(map(len, xticks), default=0) > 2:
        axes.tick_params(axis="x", labelrotation=60 if len(xticks) > 6 else 0)
    if numbers:
        for row, column in np.ndindex(*matrix.shape):
            value = matrix[row, column]
            axes.text(column, row, format(value, numbers), ha="center", va="center", fontsize=8.5,
                      color=text_color(image.to_rgba(value)))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return image


def text_color(background) -> str:
    """"black" or "white", whichever has the greater contrast on ``background`` (WCAG 2.2, relative luminance)."""
    channels = np.asarray(to_rgb(background))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.179 else "black"


def plot_heatmap(matrix, *, title: str, alt: str, xlabel: str = "", ylabel: str = "", xticks=None, yticks=None,
                 numbers: str = "", vmin=None, vmax=None, cmap="Blues", width: float = 4.6, height: float = 3.8,
                 colorbar: str = "") -> None:
    """One heat map as a figure of its own; ``colorbar`` is the label of its scale, with the unit."""
    fig, axes = figure(width=width, height=height)
    image = draw_heatmap(axes, matrix, title=title, xlabel=xlabel, ylabel=ylabel, xticks=xticks, yticks=yticks,
                         numbers=numbers, vmin=vmin, vmax=vmax, cmap=cmap)
    if colorbar:
        fig.colorbar(image, ax=axes, label=colorbar)
    show(fig, alt)


class LiveCurves:
    """Curves that grow while something trains: redrawn at most every ``every`` seconds, kept at the end.

    Drawing takes at most about a twentieth of the time, so that the training goes on nearly as fast as without.

    Use as a context manager; outside a notebook it only collects. ``series`` is {name: (xs, ys)}.
    """

    def __init__(self, *, title: str, xlabel: str, ylabel: str, alt: str, references=None, log: str = "",
                 every: float = 2.0):
        self.labels, self.alt, self.references, self.every = (title, xlabel, ylabel, log), alt, references, every
        self.series: dict[str, tuple[list, list]] = {}
        self._handle, self._next, self._changed = None, 0.0, False

    def add(self, name: str, x: float, y: float) -> None:
        """Add one point to the curve ``name``."""
        xs, ys = self.series.setdefault(name, ([], []))
        xs.append(x)
        ys.append(y)
        self._changed = True
        if time.monotonic() > self._next:
            self.draw()

    def draw(self, final: bool = False) -> None:
        """Draw the curves as they are now; the ``final`` picture is also kept for print."""
        if not in_notebook() or not (self._changed or final and self.series):
            return
        from IPython.display import display
        began = time.monotonic()
        fig, axes = figure(height=3.3)
        _draw_lines(axes, self.series, self.references, markers=False)
        _finish(axes, *self.labels)
        data, metadata = bundle(fig, self.alt, vector=final)
        if self._handle is None:
            self._handle = display(data, metadata=metadata, raw=True, display_id=True)
        else:
            self._handle.update(data, metadata=metadata, raw=True)
        now = time.monotonic()
        self._next, self._changed = now + max(self.every, 20 * (now - began)), False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.draw(final=True)


def _draw_lines(axes, series, references, markers) -> None:
    for name, (xs, ys) in series.items():
        axes.plot(np.asarray(xs, dtype=float), np.asarray(ys, dtype=float), label=name,
                  marker="o" if markers else None, markersize=4)
    for name, value in (references or {}).items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(f"{name} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", color=GREY, fontsize=9,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    if len(series) > 1 or (series and next(iter(series))):
        axes.legend()


def _finish(axes, title, xlabel, ylabel, log) -> None:
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
