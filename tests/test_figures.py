"""Can a figure be read? No words on other words, none cut off, logarithmic axes in plain numbers.

The committed figures are looked at as the book prints them: their words stand in an SVG beside the PNG. What the
words of a screen reader and the colours are, `tests/test_accessibility.py` asks.
"""

import base64
import functools
import gzip
import itertools
import math
import re
from xml.etree import ElementTree

import nbformat
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath, text_to_path
from matplotlib.ticker import StrMethodFormatter
from matplotlib.transforms import Affine2D
from PIL import Image

from utils import plots
from utils.export import chapter_notebooks

SVG = "{http://www.w3.org/2000/svg}"
NOTEBOOKS = chapter_notebooks()


# ---------------------------------------------------------------- where the words of an SVG stand


def settings(element):
    return dict(re.findall(r"([\w-]+)\s*:\s*([^;]+)", element.get("style", "")))


def moved(element):
    """The element's own transform."""
    found = Affine2D()
    for name, numbers in re.findall(r"(\w+)\(([^)]*)\)", element.get("transform", ""))[::-1]:
        first, *rest = (float(number) for number in re.split(r"[ ,]+", numbers.strip()))
        if name == "rotate":
            found.rotate_deg_around(*(rest or (0, 0)), first)
        else:
            {"translate": found.translate, "scale": found.scale}[name](first, rest[0] if rest else first)
    return found


@functools.cache
def ink(words, size, mono, weight):
    """(left, top, right, bottom) of what is printed, from the start of the line, and how far the line advances."""
    font = FontProperties(family="monospace" if mono else "sans-serif", size=size, weight=int(weight))
    box = TextPath((0, 0), words, prop=font).get_extents()
    return (box.x0, -box.y1, box.x1, -box.y0), text_to_path.get_text_width_height_descent(words, font, False)[0]


def words_of(element, outer=None):
    """Each text below an element: (what it says, its corners in the figure, its line's number)."""
    here = moved(element) + (outer or Affine2D())
    if element.tag != SVG + "text":
        return [one for child in element for one in words_of(child, here)]
    found = []
    for part in element.iter(SVG + "tspan") if len(element) else [element]:
        style, places = settings(element) | settings(part), [(part.get(way) or "0").split() for way in "xy"]
        (x, *others), y = map(float, places[0]), float(places[1][0])
        words = (part.text or "").strip()
        if not words:
            continue
        size = float(style["font-size"].removesuffix("px"))
        (left, top, right, bottom), advance = ink(words, size, "Mono" in style["font-family"],
                                                  style.get("font-weight", "400"))
        right = others[-1] - x + size / 2 if others else right  # a formula places its letters one by one
        x -= {"middle": advance / 2, "end": advance}.get(style.get("text-anchor"), 0)
        corners = (left, top), (right, top), (right, bottom), (left, bottom)
        found.append((words, here.transform([(x + a, y + b) for a, b in corners]), id(element)))
    return found


def unreadable(svg):
    """What is wrong with the words of a figure: those on others, those that leave it."""
    root = ElementTree.fromstring(svg)
    width, height = (float(number) for number in root.get("viewBox").split()[2:])
    words, found = words_of(root), []
    for text, corners, _ in words:
        (left, top), (right, bottom) = corners.min(0), corners.max(0)
        if min(left, top) < -0.5 or right > width + 0.5 or bottom > height + 0.5:
            found.append(f"{text!r} leaves the figure")
    for (text, one, line), (other, two, other_line) in itertools.combinations(words, 2):
        if line != other_line and overlap(one, two):
            found.append(f"{text!r} lies on {other!r}")
    return found


def overlap(one, two, least=0.3):
    """Whether two rectangles, turned or not, lie on each other: no edge of either keeps them apart."""
    for (ax, ay), (bx, by) in (edge for corners in (one, two) for edge in itertools.pairwise(corners[:3])):
        across = ((ax - bx) / math.dist((ax, ay), (bx, by)), (ay - by) / math.dist((ax, ay), (bx, by)))
        (a, b), (c, d) = ((side.min(), side.max()) for side in (one @ across, two @ across))
        if min(b, d) - max(a, c) < least:
            return False
    return True


def svg_of(data):
    return gzip.decompress(base64.b64decode(data[plots.VECTOR])).decode()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_words_of_a_figure_lie_on_others_or_leave_it(path):
    wrong = [f"{cell.id}: {what}" for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
             for output in cell.outputs if plots.VECTOR in output.get("data", {})
             for what in unreadable(svg_of(output.data))]
    assert not wrong, "\n".join(wrong)


def test_words_on_words_and_words_cut_off_are_seen():
    def look(write):
        fig, axes = plots.figure()
        write(axes)
        return unreadable(svg_of(plots.bundle(fig, "A test.", vector=True)[0]))

    assert look(lambda axes: axes.set(title="A title", xlabel="x", ylabel="y with $10^3$")) == []
    assert look(lambda axes: axes.text(0.5, 0.5, "one\ntwo", rotation=30)) == []
    assert look(lambda axes: axes.set_title("A title as long as no figure is wide, and longer " * 3))
    assert look(lambda axes: [axes.text(x, 0.5, "some words") for x in (0.5, 0.55)])
    assert look(lambda axes: [axes.text(0.5, 0.5, "some words", rotation=angle) for angle in (0, 60)])
    assert look(lambda axes: [axes.text(x, 0.5, "words", rotation=45) for x in (0.4, 0.5)]) == []


# ---------------------------------------------------------------- logarithmic axes


def drawn(monkeypatch, draw):
    """The labels inside the limits of the axes of the figure that ``draw`` shows: (below, beside)."""
    kept = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: (plots.bundle(fig, alt, vector=True), kept.append(fig)))
    draw()
    return tuple([text.get_text() for place, text in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                  if axis.get_view_interval()[0] <= place <= axis.get_view_interval()[1]]
                 for axis in (kept[-1].axes[0].xaxis, kept[-1].axes[0].yaxis))


def lines(xs, ys, **options):
    return lambda: plots.plot_lines({"a": (xs, ys)}, title="t", xlabel="x", ylabel="y", alt="A line.", **options)


def test_short_logarithmic_axes_count_one_two_five_and_long_ones_tens(monkeypatch):
    below, beside = drawn(monkeypatch, lines([0.26, 37], [0.003, 9], log="xy"))
    assert below == ["0.5", "1", "2", "5", "10", "20"]
    assert beside == ["0.01", "0.1", "1", "10"]
    below, beside = drawn(monkeypatch, lines([50, 2e5], [0.17, 0.55], log="xy"))
    assert below == ["100", "1,000", "10,000", "100,000"] and beside == ["0.2", "0.3", "0.4", "0.5"]


def test_what_is_too_small_or_too_large_for_plain_numbers_keeps_its_powers(monkeypatch):
    below, beside = drawn(monkeypatch, lines([1e3, 1e9], [1e-9, 1], log="xy"))
    assert all("10^" in label for label in below + beside) and below and beside


def test_measured_points_have_their_own_numbers_where_there_is_room(monkeypatch):
    below, _ = drawn(monkeypatch, lines([1, 2, 4, 8, 16, 32, 64], range(7), log="x", markers=True))
    assert below == ["1", "2", "4", "8", "16", "32", "64"]
    below, _ = drawn(monkeypatch, lines([10, 11, 12, 100], range(4), log="x", markers=True))
    assert below == ["10", "20", "50", "100"]


def test_what_a_notebook_sets_itself_stays():
    fig, (one, two) = plots.figure(ncols=2)
    one.set(xscale="log", xlim=(1, 50))
    one.set_xticks([3, 30], ["three", "thirty"])
    two.set_xscale("log", base=2)
    two.set(xlim=(1, 64), yscale="log", ylim=(1, 20))
    two.yaxis.set_major_formatter("{x:.1f} MB")
    plots.bundle(fig, "Two axes.")
    assert [text.get_text() for text in one.get_xticklabels()] == ["three", "thirty"]
    assert all(math.log2(place).is_integer() for place in two.get_xticks())
    assert isinstance(two.yaxis.get_major_formatter(), StrMethodFormatter)
    assert "5.0 MB" in [text.get_text() for text in two.get_yticklabels()]


def test_large_numbers_have_their_commas(monkeypatch):
    below, beside = drawn(monkeypatch, lines([0, 18_000], [-40_000, 900], markers=True))
    assert "15,000" in below and "−20,000" in beside
    below, beside = drawn(monkeypatch, lines([0, 1800], [0, 3e7]))
    assert "1500" in below and not any("," in label for label in beside)


def test_a_saved_picture_has_the_same_axes(tmp_path):
    fig, axes = plots.figure()
    axes.set(xscale="log", xlim=(1, 50))
    plots.save(fig, tmp_path / "a.png")
    assert "20" in [text.get_text() for text in axes.get_xticklabels()]
    assert Image.open(tmp_path / "a.png").size == (950, 432)
