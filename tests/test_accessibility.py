"""Can everybody read it? Words for pictures, headings, links and tables of every notebook; colours, measured.

What a keyboard reaches, and what a screen reader is told of it, `tests/test_browser.py` asks a real browser.
"""

import ast
import collections
import itertools
import re

import matplotlib
import nbformat
import numpy as np
import pytest
from conftest import ROOT

from utils import plots
from utils.attention_viewer import AttentionViewer
from utils.chat_box import ChatBox
from utils.dashboard import TrainingView
from utils.export import chapter_notebooks
from utils.plots import GREY, PALETTE
from utils.widgets import Explorer

NOTEBOOKS = chapter_notebooks()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
by_place = pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def cells(path):
    return nbformat.read(path, as_version=4).cells


def prose(path):
    """The Markdown of a notebook or of a page, without its code."""
    text = (path.read_text(encoding="utf-8") if path.suffix == ".md"
            else "\n\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown"))
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def figures(path):
    """The alternative text of each figure in a notebook, with the code that drew it."""
    return [(output.metadata.get("image/png", {}).get("alt", ""), cell.source)
            for cell in cells(path) if cell.cell_type == "code"
            for output in cell.outputs if "image/png" in output.get("data", {})]


# ---------------------------------------------------------------- words


def plain(text):
    return re.sub(r"\W+", " ", text).strip().lower()


def strings_after(name, source):
    """The texts that a cell gives to arguments of this name."""
    tree = ast.parse(source)
    given = [word.value for node in ast.walk(tree) if isinstance(node, ast.Call)
             for word in node.keywords if word.arg == name]
    return [node.value for value in given for node in ast.walk(value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@by_name
def test_every_figure_has_a_sentence_that_is_not_its_title(path):
    for alt, source in figures(path):
        assert len(alt.split()) >= 6 and alt[:1].strip() and alt.rstrip("\"'”’)")[-1:] in ".?!", (
            f"the alternative text {alt!r} is no sentence: say in one what the figure shows")
        titles = [plain(title) for title in strings_after("title", source)]
        assert plain(alt) not in titles, f"{alt!r} says the title again; say what can be seen"


@by_name
def test_no_two_figures_are_described_in_the_same_words(path):
    counts = collections.Counter(alt for alt, _ in figures(path))
    assert [alt for alt, n in counts.items() if n > 1] == []


@by_place
def test_pictures_in_the_text_have_alternative_text(path):
    text = prose(path)
    for alt in re.findall(r"!\[([^\]]*)\]", text):
        assert len(alt.split()) >= 2, f"a picture is described as {alt!r}"
    for tag in re.findall(r"<img\b[^>]*>", text):
        assert re.search(r'\balt="[^"]*\w+ \w+', tag), f"{tag} has no alternative text"


@by_place
def test_headings_do_not_skip_levels(path):
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose(path), re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


@by_place
def test_links_say_where_they_lead(path):
    empty = {"", "a", "click", "click here", "it", "here", "link", "more", "page", "read more", "see", "see here",
             "that", "this", "this link", "this one", "this page", "there"}
    for text in re.findall(r"(?<!!)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(", prose(path)):
        said = plain(re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", text))
        assert said not in empty, f"the link [{text}] does not say where it leads"
        assert not said.startswith(("http ", "https ", "www ")), f"[{text}] is an address, not a name"


@by_place
def test_tables_have_a_row_of_headers(path):
    for block in re.findall(r"(?:^\|.*\n?)+", prose(path), re.M):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
                for line in block.strip().splitlines()]
        assert len(rows) > 2 and all(re.fullmatch(r":?-+:?", cell) for cell in rows[1]), f"no header row: {rows[0]}"
        assert all(rows[0][1:]) and len(rows[0]) == len(rows[1]), f"columns without a header: {rows[0]}"


@by_name
def test_tables_among_the_outputs_have_headers(path):
    for cell in cells(path):
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            for table in re.findall(r"<table\b.*?</table>", html, re.S):
                assert "<th" in table, f"a table without a header: {table[:200]}"


# ---------------------------------------------------------------- colours as numbers

# Machado, Oliveira and Fernandes 2009, A Physiologically-based Model for Simulation of Color Vision Deficiency,
# IEEE Transactions on Visualization and Computer Graphics 15(6): severity 1.0, for linear RGB. The model is made for
# a lack of red or green cones; for blue it is an approximation.
VISION = {
    "all colours": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])  # of linear sRGB; IEC 61966-2-1
WHITE, TEXT, SHAPE = (1.0, 1.0, 1.0), 4.5, 3.0  # WCAG 2.2: 1.4.3, and 1.4.11 for lines and controls


def rgb(color):
    return np.array(matplotlib.colors.to_rgb(color))


def linear(color):
    """Light from a colour's sRGB numbers."""
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """WCAG's ratio of two colours, from 1 to 21."""
    low, high = sorted(float(XYZ[1] @ linear(np.asarray(color))) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def over(color, opacity, background):
    """What is seen of a colour that lets its background through."""
    return opacity * np.asarray(color) + (1 - opacity) * np.asarray(background)


def lab(color, vision="all colours"):
    """CIE L*a*b* of a colour as somebody sees it."""
    xyz = XYZ @ np.clip(np.asarray(VISION[vision]) @ linear(np.asarray(color)), 0, 1) / XYZ.sum(1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(one, other):
    """CIEDE2000 of two L*a*b* colours; a difference of 1 is just seen. Sharma, Wu and Dalal 2005."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    a1, a2 = ((1.5 - 0.5 * np.sqrt(mean / (mean + 25**7))) * a for a in (a1, a2))
    c1, c2, h1, h2 = np.hypot(a1, b1), np.hypot(a2, b2), np.arctan2(b1, a1), np.arctan2(b2, a2)
    turn = (h2 - h1 + np.pi) % (2 * np.pi) - np.pi if c1 * c2 else 0.0
    lightness, chroma, hue = (l1 + l2) / 2, (c1 + c2) / 2, h1 + turn / 2 if c1 * c2 else h1 + h2
    weight = (1 - 0.17 * np.cos(hue - np.pi / 6) + 0.24 * np.cos(2 * hue) + 0.32 * np.cos(3 * hue + np.pi / 30)
              - 0.20 * np.cos(4 * hue - np.radians(63)))
    steps = ((l2 - l1) / (1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)),
             (c2 - c1) / (1 + 0.045 * chroma),
             2 * np.sqrt(c1 * c2) * np.sin(turn / 2) / (1 + 0.015 * chroma * weight))
    bend = np.radians(60) * np.exp(-((((np.degrees(hue) % 360) - 275) / 25) ** 2))
    return np.sqrt(sum(step**2 for step in steps)
                   - np.sin(bend) * 2 * np.sqrt(chroma**7 / (chroma**7 + 25**7)) * steps[1] * steps[2])


def test_the_measures_are_the_published_ones():
    assert contrast(rgb("white"), rgb("black")) == pytest.approx(21)
    assert contrast(rgb("#767676"), WHITE) == pytest.approx(4.54, abs=0.01)  # the lightest grey for text on white
    pairs = [((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425), ((50, 2.5, 0), (73, 25, -18), 27.1492),
             ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
             ((50, -1, 2), (50, 0, 0), 2.3669), ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082)]
    for one, other, published in pairs:  # from the test data of Sharma, Wu and Dalal
        assert difference(one, other) == pytest.approx(published, abs=1e-4)
    assert lab(rgb("white")) == pytest.approx([100, 0, 0], abs=0.01)
    for matrix in VISION.values():
        assert np.asarray(matrix).sum(1) == pytest.approx(1, abs=1e-5)  # greys stay as they are


# ---------------------------------------------------------------- the figures' colours

def test_text_and_lines_of_the_figures_stand_out_from_white():
    assert contrast(rgb(GREY), WHITE) >= TEXT
    for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor", "axes.titlecolor"):
        color = matplotlib.rcParams[name]
        assert contrast(rgb("black" if color == "auto" else color), WHITE) >= TEXT
    assert [color for color in PALETTE if contrast(rgb(color), WHITE) < SHAPE] == []


def test_no_curve_is_told_by_its_colour_alone():
    cycle = plots.STYLE["axes.prop_cycle"].by_key()
    assert cycle["color"] == PALETTE and len(set(cycle["linestyle"][:4])) == 4
    styles = list(zip(cycle["color"], cycle["linestyle"], strict=True))
    for (color, dash), (other, same) in itertools.combinations(styles, 2):
        if dash == same:  # the same dash: then they differ in lightness, as they would in grey print
            assert abs(lab(rgb(color))[0] - lab(rgb(other))[0]) >= 15, f"{color} and {other} are alike in grey"


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_of_the_palette_differ_for_everybody(vision):
    seen = {color: lab(rgb(color), vision) for color in [*PALETTE, GREY]}
    nearest = min((difference(seen[a], seen[b]), a, b) for a, b in itertools.combinations(seen, 2))
    assert nearest[0] >= 10, f"{nearest[1]} and {nearest[2]} differ by {nearest[0]:.1f} with {vision}"


@pytest.mark.parametrize("vision", VISION)
def test_heat_maps_go_from_light_to_dark_for_everybody(vision):
    shades = matplotlib.colormaps[matplotlib.rcParams["image.cmap"]](np.linspace(0, 1, 64))[:, :3]
    lightness = [lab(shade, vision)[0] for shade in shades]
    assert all(b < a for a, b in itertools.pairwise(lightness)) and lightness[0] - lightness[-1] > 60


def test_numbers_in_heat_maps_stand_out():
    fig, axes = plots.figure()
    for cmap in ("Blues", "RdBu_r"):
        image = plots.draw_heatmap(axes, np.linspace(0, 1, 41)[None], numbers=".2f", cmap=cmap)
        shades = image.cmap(image.norm(image.get_array()))[0, :, :3]
        texts = axes.texts[-41:]
        ratios = [contrast(rgb(text.get_color()), shade) for text, shade in zip(texts, shades, strict=True)]
        assert min(ratios) >= TEXT, f"{cmap}: {min(ratios):.2f} at {np.argmin(ratios) / 40:.2f}"


# ---------------------------------------------------------------- the widgets' colours

# where a widget stands: JupyterLab (its two nearest layers), Colab, VS Code; and the text that it finds there
THEMES = {"light": (["#ffffff"], "#212121"), "dark": (["#111111", "#212121", "#202124", "#1e1e1e"], "#e8eaed")}
NEEDED = {"color": TEXT, "fill": SHAPE, "stroke": SHAPE, "border": SHAPE, "outline": SHAPE, "accent-color": SHAPE}
FAINT = {".dash-grid": "lines that help the eye; the numbers beside them say the same"}


def rules(widget):
    """The rules of a widget's stylesheet: (selector, {property: value})."""
    for selector, body in re.findall(r"([^{}]+?)\s*\{([^}]*)\}", re.sub(r"/\*.*?\*/", "", widget._css, flags=re.S)):
        pairs = (line.split(":", 1) for line in body.split(";") if ":" in line)
        yield " ".join(selector.split()), {name.strip(): value.strip() for name, value in pairs}


def variables(widget, theme):
    """What its variables stand for in a theme: later rules win, those for dark hosts only in the dark."""
    known = {}
    for selector, body in rules(widget):
        dark = "dark" in selector
        if not dark or theme == "dark":
            known |= {name: value for name, value in body.items() if name.startswith("--") and value.startswith("#")}
    return known


def colours(widget, theme):
    """(selector, property, colour, background or None, ratio it needs) for every colour that the widget sets."""
    known = variables(widget, theme)
    for selector, body in rules(widget):
        if "vscode" in selector or (theme == "light" and "dark" in selector):
            continue
        own = re.search(r"#[0-9a-fA-F]{3,6}\b", body.get("background", ""))
        for name, value in body.items():
            value = re.sub(r"var\((--[\w-]+)\)", lambda m: known.get(m[1], m[0]), value)
            kind = next((kind for kind in NEEDED if name == kind or name.startswith(kind + "-")), None)
            if kind and "var(" not in value:
                for found in re.findall(r"#[0-9a-fA-F]{3,6}\b", value):
                    yield selector, name, found, own and own.group(), NEEDED[kind]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("widget", [Explorer, AttentionViewer, ChatBox, TrainingView])
def test_a_widgets_text_lines_and_controls_stand_out_in_both_themes(widget, theme):
    grounds, checked = THEMES[theme][0], 0
    for selector, name, color, own, needed in colours(widget, theme):
        behind = [own] if own else ["#ffffff"] if "attention-tokens button" in selector and name == "color" else grounds
        for ground in behind:
            ratio = contrast(rgb(color), rgb(ground))
            assert ratio >= needed, f"{selector} {{ {name}: {color} }}: {ratio:.2f} of {needed} on {ground} ({theme})"
        checked += 1
    assert checked, "no colour was found: does the widget still set its own?"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("widget", [Explorer, AttentionViewer, ChatBox, TrainingView])
def test_what_a_widget_lets_shine_through_can_still_be_read(widget, theme):
    grounds, text = THEMES[theme]
    for selector, body in rules(widget):
        if "opacity" in body and selector not in FAINT:
            needed = SHAPE if "stroke" in body else TEXT
            for ground in grounds:
                seen = over(rgb(text), float(body["opacity"]), rgb(ground))
                assert contrast(seen, rgb(ground)) >= needed, f"{selector}, opacity {body['opacity']} on {ground}"


def test_words_on_the_viewers_shades_can_be_read():
    """The tokens' shades are computed by the script: black on all of them, the grey of what is out of sight on none."""
    numbers = re.search(r"x = ([\d.]+) \* Math\.sqrt.*?return \[255 \* \(1 - x\), 255 - (\d+) \* x, 255 - (\d+) \* x\]",
                        AttentionViewer._esm, re.S)
    most, green, blue = map(float, numbers.groups())
    for x in np.linspace(0, most, 20):
        shade = np.array([255 * (1 - x), 255 - green * x, 255 - blue * x]) / 255
        assert contrast(rgb("black"), shade) >= TEXT
