"""The course as a reader has it: JupyterLab in a browser, cells run, widgets moved, an edit saved and felt."""

import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from browser import Heard, Sheet, Story, browser_path, browsing, running_lab
from conftest import ROOT, SKIP

import course
from utils.workspace import workspace

# Cells that take longer than a second or two of one core, or need what such a one has written to the disk: they, and
# what leans on them, are left out here.
SLOW = {
    "ch01": {"2ce820bd", "073a9378", "46a87de1"},
    "ch02": {"fb482a47", "d01a5536", "d60c2925", "04c3614d", "60900cf4"},
    "ch03": {"4381f699", "4237cf0b", "282a55cb", "f3beeb35", "0209db1c", "38d6a869", "10f6b71e", "6dca601e"},
    "ch04": {"c655a19e", "d3fbbd0b", "46343493", "453174f4", "c58dd4d2", "692e2e31", "4f9ec577"},
    "ch05": {"72bdbb8f", "91439452", "0dba7bea", "1b755299", "03b15072", "fdfd6804", "457f7c4e", "06323028",
             "6f9f99b9"},
    "ch06": {"7b9e8c44", "73124e9b", "0c6a9c01", "ffb4009c", "d85c1f85", "4d3b9ba2", "28ef9e45"},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """One `course.py lab` for all of these tests, on a copy of the course: (folder, address, token)."""
    browser_path()
    home = tmp_path_factory.mktemp("browser")
    folder = Path(shutil.copytree(ROOT, home / "course", ignore=SKIP))
    packages = home / "workspace" / "data" / "packages"
    packages.mkdir(parents=True)
    course.share_downloads(workspace("data", "packages"), packages)
    jupyter = {f"JUPYTER_{kind}_DIR": str(home / "jupyter" / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **jupyter, "COURSE_WORKSPACE": str(home / "workspace"), "VIRTUAL_ENV": sys.prefix,
                   "PYTHONUNBUFFERED": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    with running_lab(folder, environment) as (address, token):
        yield folder, address, token


@pytest.fixture(scope="module")
def chromium():
    """A browser that finds no other machine, whatever a page asks for."""
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        if getattr(os, "geteuid", lambda: 1)() == 0:
            arguments.append("--no-sandbox")
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def jupyter(lab, chromium, request):
    """Opens pages: `with jupyter() as sheet`."""
    return partial(browsing, chromium, lab[1], lab[2], request.node.name)


def story_of(chapter):
    path = course.CHAPTERS[chapter][0]
    return path, Story(ROOT / path, SLOW[chapter])


# ---------------------------------------------------------------- moving things


KEYS = {"textarea": [["End", *" dog"]], "text": [["End", *" dog"]], "select-one": [["ArrowDown"], ["ArrowUp"]],
        "range": [["ArrowRight"] * 3, ["End"], ["Home"]]}


def change(sheet, control, changed):
    """Use the keyboard on one control, in each way that its kind has, until ``changed()``."""
    control.focus()
    for keys in KEYS[control.evaluate("e => e.type")]:
        for key in keys:
            sheet.page.keyboard.press("Space" if key == " " else key)
        for _ in range(60):
            if changed():
                return
            sheet.page.wait_for_timeout(50)
    raise AssertionError(f"{control.evaluate('e => e.labels[0].innerText')!r} was moved, and nothing changed")


REACHABLE = """el => {
  const all = [...el.querySelectorAll("input, select, textarea, button, summary, a[href], [tabindex]")];
  window.reachable = all.filter((e) => e.tabIndex >= 0 && !e.disabled && e.checkVisibility());
  window.reachable[0].focus();
  return window.reachable.length;
}"""
FOCUS = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  return { number: window.reachable.indexOf(e), what: e.outerHTML.slice(0, 200),
           outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth) };
}"""


# texts of a widget with less contrast than WCAG 2.2's 4.5 to 1 (3 to 1 for large ones), as the browser draws them
FAINT = """el => {
  const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, below) => below.map((x, i) => top[3] * top[i] + (1 - top[3]) * x);
  const linear = (x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const faint = [], texts = document.createTreeWalker(el, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), e = texts.currentNode.parentElement, style = getComputedStyle(e);
    if (!text || e.tagName === "OPTION" || !e.checkVisibility()) continue;
    const around = [];
    for (let node = e; node; node = node.parentElement) around.unshift(getComputedStyle(node));
    const ground = around.reduce((below, s) => over(parse(s.backgroundColor), below), [255, 255, 255]);
    const color = parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
    color[3] *= around.reduce((product, s) => product * Number(s.opacity), 1);
    const [dark, light] = [luminance(over(color, ground)), luminance(ground)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}, ${color} on ${ground}`);
  }
  return faint;
}"""


def use_keyboard(sheet, widget):
    """Tab goes from control to control and out, Shift+Tab the same way back; each shows that it has the focus."""
    assert widget.evaluate(FAINT) == []
    count, page = widget.evaluate(REACHABLE), sheet.page
    there, back = [("Tab", i) for i in range(1, count)], [("Shift+Tab", i) for i in reversed(range(count - 1))]
    for key, number in [*there, ("Tab", -1), ("", count - 1), *back]:
        if key:
            page.keyboard.press(key)
        else:
            page.evaluate("() => window.reachable.at(-1).focus()")
        focus = page.evaluate(FOCUS)
        assert focus["number"] == number, f"{key} should lead to control {number}; it leads to {focus['what']}"
        assert number < 0 or focus["outline"] >= 1, f"nothing shows the focus on {focus['what']}"
    client = page.context.new_cdp_session(page)
    for i in range(count):
        control = client.send("Runtime.evaluate", {"expression": f"window.reachable[{i}]"})["result"]
        asked = {"objectId": control["objectId"], "fetchRelatives": False}
        (node, *_) = client.send("Accessibility.getPartialAXTree", asked)["nodes"]
        name = node.get("name", {}).get("value", "")
        assert name.strip(), f"a screen reader has no name for {control['description']} {i}"
    client.detach()


def use_explorer(sheet, number):
    """Every control of an explore widget changes what stands below it; put back, it shows what was there."""
    widget = shown(sheet, number, ".explore")
    use_keyboard(sheet, widget)
    result = widget.locator(".explore-result")
    assert result.inner_text().strip() and "Error:" not in result.inner_text()
    for control in widget.locator("input, select, textarea").all():
        before, value = result.inner_html(), control.input_value()
        change(sheet, control, lambda before=before: result.inner_html() != before)
        assert "Error:" not in result.inner_text()
        control.select_option(value) if control.evaluate("e => e.options") else control.fill(value)
        sheet.wait_until(lambda before=before: result.inner_html() == before, "what was put back shows what was there")


def shown(sheet, number, name):
    """The widget that a cell shows; a cell that has not run is woken and run."""
    if sheet.cell(number).get_attribute("class").count("jp-RawCell"):
        sheet.run_raw(number)
    widget = sheet.cell(number).locator(name)
    widget.wait_for()
    return widget


def use_viewer(sheet, number):
    """Text, layer, head, direction, buttons and tokens of the attention viewer change map and sentence."""
    widget = shown(sheet, number, ".attention")
    use_keyboard(sheet, widget)
    said, drawn = widget.locator(".attention-tokens + p"), widget.locator("canvas.attention-map")

    def state():
        return said.inner_text(), drawn.evaluate("e => e.toDataURL()")

    for control in widget.locator("textarea, select").all():
        before = state()
        change(sheet, control, lambda before=before: all(a != b for a, b in zip(before, state(), strict=True)))

    def presses(button, key):
        before = said.inner_text()
        button.press(key)
        sheet.wait_until(lambda: said.inner_text() != before, f"{key} on {button.inner_text()!r} changes the sentence")

    for button in widget.locator(".attention-bar button[aria-pressed=false]").all()[:2]:
        presses(button, "Enter")
    presses(widget.locator(".attention-tokens button[tabindex='0']"), "ArrowLeft")


def use_chat(sheet, number):
    """A message is answered, Escape stops it, the dials are kept, a new conversation is empty."""
    widget, page = shown(sheet, number, ".chat"), sheet.page
    use_keyboard(sheet, widget)
    log, send = widget.locator(".chat-log"), widget.locator(".chat-send")
    before = log.inner_text()
    widget.get_by_label("Your message").focus()
    page.keyboard.type("Tell me a long story about a bear.")
    page.keyboard.press("Enter")
    sheet.wait_until(lambda: send.inner_text() == "Stop" and "bear" in log.inner_text(), "the message stands there")
    sheet.wait_until(lambda: len(log.inner_text()) > len(before) + 60, "the answer grows", 60)
    page.keyboard.press("Escape")
    sheet.wait_until(lambda: "Stopped." in widget.locator(".chat-note").inner_text(), "Escape stops it", 60)
    slider, value = widget.get_by_role("slider"), widget.locator("output")
    warmth = value.inner_text()
    change(sheet, slider, lambda: value.inner_text() != warmth)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "New conversation"
    page.keyboard.press("Enter")
    sheet.wait_until(lambda: "Nothing has been said yet" in log.inner_text(), "a new conversation is empty")


def use_dashboard(sheet, number):
    """The curves of a training run grow; interrupted by the menu, the run leaves a figure in their place."""
    sheet.start_raw(number)
    widget, curve = sheet.cell(number).locator(".dash"), sheet.cell(number).locator(".dash polyline").first
    curve.wait_for(state="attached")
    before, drawn = widget.locator(".dash-head").inner_text(), curve.get_attribute("points")
    sheet.wait_until(lambda: curve.get_attribute("points") != drawn, "the curve grows", 60)
    assert widget.locator(".dash-head").inner_text() != before
    assert widget.evaluate(FAINT) == []
    unnamed = "els => els.filter((e) => !e.ariaLabel).length"
    assert widget.locator("[role=img], progress").evaluate_all(unnamed) == 0
    sheet.command("Kernel", "Interrupt Kernel")
    sheet.cell(number).locator("img[alt*='stopped at step']").wait_for()
    assert not widget.count() and "Stopped in step" in sheet.cell(number).inner_text()


WIDGETS = {"explore(": use_explorer, "view_attention(": use_viewer, "chat_box(smol": use_chat,
           "with Dashboard(": use_dashboard}


# ---------------------------------------------------------------- chapter by chapter


def run_and_use(lab, jupyter, path, story, wanted):
    """Open a notebook, run the wanted cells and those that its widgets need, and use each widget."""
    widgets = {number: use for start, use in WIDGETS.items() for number in story.with_line(start)}
    wanted = set(wanted).union(*(story.needed(number) for number in widgets))
    for number in widgets:
        wanted = story.undisturbed(number, wanted)
    story.spare(lab[0] / path, wanted - {number for number in widgets if number not in story.cheap})
    with jupyter() as sheet:
        sheet.open(path, len(story.ids))
        sheet.clear()
        sheet.run_all()
        words = sheet.page.locator(".jp-Notebook .jp-RenderedImage img").evaluate_all("all => all.map((e) => e.alt)")
        assert all(words), "a figure came without its alternative text"
        for number, use in widgets.items():
            use(sheet, number)
    return widgets, words


@pytest.mark.parametrize("chapter", course.CHAPTERS)
def test_a_chapters_cheap_cells_run_and_its_widgets_follow_the_keyboard(lab, jupyter, chapter):
    path, story = story_of(chapter)
    widgets, words = run_and_use(lab, jupyter, path, story, story.cheap)
    assert len(words) >= 2 and len(story.cheap) > len(story.sources) / 2
    assert widgets or chapter in ("ch01", "ch02")


def test_without_the_token_a_browser_sees_the_login_and_programs_get_403(lab, chromium):
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{lab[1]}/lab/tree/ch03_attention/attention.ipynb")
    assert "/login" in page.url and not page.locator(".jp-LabShell").count()
    for place in ("contents/ch03_attention/attention.ipynb", "kernels", "sessions"):
        for token in ("", "?token=" + "0" * len(lab[2])):
            assert context.request.get(f"{lab[1]}/api/{place}{token}").status == 403
    context.close()


def test_the_watchers_notice(chromium):
    """A request to another machine, an error in the console, a control without a name, faint words."""
    heard, context = Heard(), chromium.new_context()
    heard.listen(context)
    sheet = Sheet(context.new_page(), "", "")
    sheet.page.set_content("""<main><input><button style='color: #888'>Faint</button></main>
        <img src='http://pictures.example/cat.png'><script>console.error('oh')</script>""")
    sheet.wait_until(lambda: heard.foreign and heard.errors, "both are noticed")
    assert heard.foreign == ["http://pictures.example/cat.png"] and "oh" in heard.errors
    with pytest.raises(AssertionError, match="pictures.example"):
        heard.check()
    widget = sheet.page.locator("main")
    assert [text.split(":")[0] for text in widget.evaluate(FAINT)] == ["Faint"]
    sheet.page.locator("button").evaluate("e => { e.style.color = 'black'; }")
    with pytest.raises(AssertionError, match="no name for"):
        use_keyboard(sheet, widget)
    sheet.page.locator("input").evaluate("e => { e.ariaLabel = 'Name'; e.style.outline = 'none'; }")
    with pytest.raises(AssertionError, match="nothing shows the focus"):
        use_keyboard(sheet, widget)
    context.close()


def test_the_attention_viewer_follows_the_keyboard(lab, jupyter):
    path = course.DEEP_DIVES["inside"][0]
    story = Story(ROOT / path, set())
    story.cheap = []  # only what the viewer and the explorer of this deep dive need
    widgets, _ = run_and_use(lab, jupyter, path, story, [i for i in story.sources if "#| export" in story.sources[i]])
    assert set(widgets.values()) == {use_explorer, use_viewer}


# Each edit is the same: after the `return` that ends the cell which defines the name, " 2 *" is typed.
# name, the next chapter that uses it, what is run there, and what it prints with the edit (without: half of it)
EDITS = {
    "ch01": ("normalize", "ch02", 'print(normalize("x"))', "xx"),
    "ch02": ("get_batch", "ch05", "import torch\nprint(get_batch(torch.arange(5), 1, 4)[0])", "tensor([[0, 2, 4, 6]])"),
    "ch03": ("MultiHeadAttention", "ch04", """import torch
layer = MultiHeadAttention(4, 1, bias=True)
torch.nn.init.zeros_(layer.out_proj.weight)
torch.nn.init.ones_(layer.out_proj.bias)
print(layer(torch.zeros(1, 2, 4))[0, 0].tolist())""", "[2.0, 2.0, 2.0, 2.0]"),
    "ch04": ("generate", "ch05", """import dataclasses, torch
from previous_chapters import GPT, PRESETS
small = dataclasses.replace(PRESETS["storyteller"], head_dim=None, d_model=32, n_layers=1, d_ff=32, context_length=8)
print(generate(GPT(small), torch.tensor([[7]]), 1)[0, 0].item())""", "14"),
    "ch05": ("clip_grad_norm", "ch06", """import torch
weight = torch.zeros(4, requires_grad=True)
weight.grad = torch.ones(4)
print(clip_grad_norm([weight], 9.0))""", "4.0"),
    "ch06": ("dpo_loss", "", "", ""),
}


def defining(story, name):
    """The exported cell that defines a name, and ends with a ``return`` of it."""
    found = [i for i, source in story.sources.items()
             if source.startswith("#| export") and re.search(rf"^(def|class) {name}\b", source, re.M)]
    assert len(found) == 1 and story.sources[found[0]].splitlines()[-1].lstrip().startswith("return ")
    return found[0]


def test_an_edit_saved_in_the_browser_is_felt_by_the_next_chapter(lab, jupyter):
    with jupyter() as sheet:
        for chapter, (name, *_) in EDITS.items():
            path, story = story_of(chapter)
            module = (lab[0] / path).with_suffix(".py")
            shutil.copy(ROOT / path, lab[0] / path)  # without the dead widgets of a saved run
            before, number = module.read_text(encoding="utf-8"), defining(story, name)
            sheet.open(path, number + 1)
            sheet.type_at_end(number, ["Home", "Control+ArrowRight", *" 2 *"])
            sheet.page.keyboard.press("Control+s")
            sheet.wait_until(lambda module=module, before=before: module.read_text(encoding="utf-8") != before,
                             f"saving {path} rewrites {module.name}")
            line = story.sources[number].splitlines()[-1]
            assert module.read_text(encoding="utf-8") == before.replace(line, line.replace("return", "return 2 *"))
            for used, where, code, printed in EDITS.values():
                if where == chapter:
                    said = sheet.try_out(f"from previous_chapters import {used}\n{code}")
                    assert said == printed, f"{used} was edited, saved, and in {chapter} it gives {said}"
