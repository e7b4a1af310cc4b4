"""A reader's hands and eyes in a real JupyterLab: a server, Chromium, and one open notebook."""

import os
import re
import shutil
import socket
import subprocess
import symtable
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest

from utils.workspace import workspace

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MISSING = ("These tests need Chromium and Playwright: apt-get install chromium (or set COURSE_CHROMIUM to a browser's "
           "path), and pip install -r tests/requirements.txt")
LOOPBACK = "127.0.0.1"
# JupyterLab's own, seen with a notebook in which nothing is wrong
HARMLESS = ()


def browser_path() -> str:
    """Where Chromium lies; without it, or without Playwright, the test is skipped (in CI on Linux it fails)."""
    named = os.environ.get("COURSE_CHROMIUM")
    found = named if named and Path(named).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        import playwright  # noqa: F401
    except ImportError:
        found = None
    if not found:
        must = sys.platform == "linux" and (os.environ.get("CI") or os.environ.get("COURSE_CI"))
        (pytest.fail if must else pytest.skip)(MISSING)
    return found


@contextmanager
def running_lab(folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A real ``course.py lab`` in ``folder``, on a free port: (address, token). Its log is ``folder/lab.log``."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    with open(folder / "lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "course.py", "lab", "--no-browser", f"--port={port}"], cwd=folder,
                                   env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield f"http://{LOOPBACK}:{port}", _token(folder / "lab.log", port, process)
    finally:
        if os.name == "posix" and process.poll() is None:
            os.killpg(process.pid, 15)
        process.terminate()
        process.wait(30)


def _token(log: Path, port: int, process: subprocess.Popen) -> str:
    for _ in range(240):
        if found := re.search(rf"http://127\.0\.0\.1:{port}/lab\?token=(\w+)", log.read_text()):
            return found.group(1)
        assert process.poll() is None, log.read_text()
        time.sleep(0.5)
    raise TimeoutError(f"JupyterLab named no address within two minutes:\n{log.read_text()}")


# ---------------------------------------------------------------- which cells a reader would run


def global_names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell makes at its top level, and those it takes from cells before it."""
    top = symtable.symtable(source, "cell", "exec")
    makes = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    takes, scopes = {s.get_name() for s in top.get_symbols() if s.is_referenced()}, list(top.get_children())
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        takes |= {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
    return makes, takes - makes


class Story:
    """A notebook's code cells by number, and which of them lean on which."""

    def __init__(self, path: Path, slow: set[str]):
        cells = nbformat.read(path, as_version=4).cells
        self.ids = [cell.id for cell in cells]
        self.sources = {i: cell.source for i, cell in enumerate(cells) if cell.cell_type == "code" and cell.source}
        self._names = {i: global_names(source) for i, source in self.sources.items()}
        unknown = slow - set(self.ids)
        assert not unknown, f"{path.name} has no cells {sorted(unknown)}: mend SLOW in tests/test_browser.py"
        self.cheap: list[int] = []
        for i, source in self.sources.items():  # an exported cell leans on exported ones alone
            leans_on_cheap = all(makers[-1] in self.cheap for makers in self._makers(i).values())
            if self.ids[i] not in slow and (leans_on_cheap or source.startswith("#| export")):
                self.cheap.append(i)

    def _makers(self, number: int) -> dict[str, list[int]]:
        """For each name that a cell takes, the cells before it that make it."""
        found = {name: [i for i in self.sources if i < number and name in self._names[i][0]]
                 for name in self._names[number][1]}
        return {name: makers for name, makers in found.items() if makers}

    def needed(self, number: int) -> list[int]:
        """The cells without which this one would not run, in order, itself the last; cheap ones if possible."""
        found, waiting = set(), [number]
        while waiting:
            i = waiting.pop()
            if i not in found:
                found.add(i)
                waiting += [([m for m in makers if m in self.cheap] or makers)[-1]
                            for makers in self._makers(i).values()]
        return sorted(found)

    def undisturbed(self, number: int, wanted: set[int]) -> set[int]:
        """Those of the wanted cells that leave alone what this one needs; those after it, too, make names anew."""
        needed = self.needed(number)
        names = set().union(*(self._names[i][1] for i in needed))
        left: set[int] = set()
        for i in sorted(wanted):
            whole = all(makers[-1] in left for makers in self._makers(i).values())
            disturbs = i > number and names & self._names[i][0]
            if i in needed or self.sources[i].startswith("#| export") or (whole and not disturbs):
                left.add(i)
        return left

    def spare(self, path: Path, wanted: set[int]) -> None:
        """Make raw cells of all code cells but these in the notebook at ``path``, as the key R does."""
        notebook = nbformat.read(path, as_version=4)
        for i in self.sources.keys() - wanted:
            cell = notebook.cells[i]
            assert not cell.source.startswith("#| export"), "an exported cell would leave the module"
            notebook.cells[i] = nbformat.v4.new_raw_cell(cell.source, id=cell.id, metadata=cell.metadata)
        nbformat.write(notebook, path)

    def with_line(self, start: str) -> list[int]:
        """The code cells with a line that begins so."""
        return [i for i, source in self.sources.items() if re.search(rf"^\s*{re.escape(start)}", source, re.M)]


# ---------------------------------------------------------------- what a page says and asks for


@dataclass
class Heard:
    """What a page asked of the network and wrote to its console."""

    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def listen(self, context) -> None:
        """Note every request and every console message of a browser's context."""
        context.on("request", lambda request: self._asked(request.url))
        context.on("console", lambda message: self._said(message.type, message.text))
        context.on("weberror", lambda error: self._said("error", str(error.error)))
        context.on("page", lambda page: page.on("websocket", lambda socket: self._asked(socket.url)))

    def _asked(self, url: str) -> None:
        place = re.match(r"(?:https?|wss?)://([^/:?#]*)", url)
        if (place and place.group(1) != LOOPBACK) or not (place or url.startswith(("data:", "blob:", "about:"))):
            self.foreign.append(url[:200])

    def _said(self, kind: str, text: str) -> None:
        self.lines.append(f"{kind}: {text}")
        if kind == "error" and not any(re.search(pattern, text) for pattern in HARMLESS):
            self.errors.append(text)

    def check(self) -> None:
        """``AssertionError`` for a request that would have left this machine, or an error in the console."""
        assert not self.foreign, f"asked another machine for {self.foreign}"
        assert not self.errors, "the browser's console has errors:\n" + "\n".join(self.errors)


@contextmanager
def browsing(browser, address: str, token: str, name: str, **options) -> Iterator["Sheet"]:
    """A page of JupyterLab for one test; when the test fails, its picture and console are kept."""
    heard = Heard()
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, reduced_motion="reduce", **options)
    heard.listen(context)
    sheet = Sheet(context.new_page(), address, token)
    try:
        yield sheet
        heard.check()
    except BaseException as error:
        error.add_note(f"The page as it was, and its console: {_keep(sheet.page, heard, name)}")
        raise
    finally:
        sheet.shut_kernels()
        context.close()


def _keep(page, heard: Heard, name: str) -> str:
    stem = workspace("browser") / re.sub(r"[^\w.-]+", "_", name)
    asked = [f"another machine was asked for: {url}" for url in heard.foreign]
    stem.with_suffix(".log").write_text("\n".join(heard.lines + asked) + "\n", encoding="utf-8")
    try:
        page.screenshot(path=stem.with_suffix(".png"), timeout=10_000)
    except Exception as problem:  # the browser itself may have died
        return f"{stem.with_suffix('.log')} (no picture: {problem})"
    return f"{stem.with_suffix('.png')} and {stem.with_suffix('.log')}"


class Sheet:
    """One notebook on the page, its cells by their number in the file."""

    def __init__(self, page, address: str, token: str):
        self.page, self.address, self.token, self.ran = page, address, token, 0
        page.set_default_timeout(180_000)

    def open(self, path: str, cells: int) -> None:
        """Open a notebook by its path in the course and wait for all its cells and its kernel."""
        self.page.goto(f"{self.address}/lab/tree/{path}?token={self.token}&reset")
        self.page.wait_for_selector(f".jp-Notebook [data-windowed-list-index='{cells - 1}']", state="attached")
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        self.ran = 0

    def shut_kernels(self) -> None:
        """End every kernel that this page has started."""
        headers = {"Authorization": f"token {self.token}"}
        for session in self.page.request.get(f"{self.address}/api/sessions", headers=headers).json():
            self.page.request.delete(f"{self.address}/api/sessions/{session['id']}", headers=headers)

    def cell(self, number: int):
        """The cell with this number."""
        return self.page.locator(f".jp-Notebook [data-windowed-list-index='{number}']")

    def clear(self) -> None:
        """Empty every output, so that what is seen later was computed here."""
        self.command("Edit", "Clear Outputs of All Cells")
        self.page.wait_for_function("() => !document.querySelector('.jp-Notebook .jp-OutputArea-child')")

    def command(self, menu: str, entry: str) -> None:
        """Choose an entry of one of JupyterLab's menus."""
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile(f"^{entry}")).click()

    def run_all(self, seconds: float = 300) -> None:
        """Run > Run All Cells, and wait for the last; ``AssertionError`` with the error if one fails."""
        code = self.page.locator(".jp-Notebook .jp-CodeCell").count()
        self.command("Run", "Run All Cells")
        self.wait_for_count(code, seconds)

    def run_raw(self, number: int, seconds: float = 60) -> None:
        """Make a raw cell a code cell with the key Y, run it with Shift+Enter, and wait for it."""
        self.start_raw(number)
        self.wait_for_count(self.ran + 1, seconds)

    def start_raw(self, number: int) -> None:
        """The same, without waiting."""
        self.cell(number).evaluate("cell => cell.focus()")
        self.page.keyboard.press("y")
        self.page.wait_for_selector(f".jp-Notebook .jp-CodeCell[data-windowed-list-index='{number}']")
        self.page.keyboard.press("Shift+Enter")

    def type_at_end(self, number: int, keys: list[str]) -> None:
        """Press these keys in a cell's editor, from the end of its text on."""
        self.cell(number).locator(".cm-content").click()
        for key in ["Control+End", *keys]:
            self.page.keyboard.press("Space" if key == " " else key)

    def try_out(self, code: str, seconds: float = 60) -> str:
        """Insert a cell below the first with the key B, run this code in it: what it prints."""
        self.cell(0).evaluate("cell => cell.focus()")
        self.page.keyboard.press("b")
        self.page.keyboard.press("Enter")
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Shift+Enter")
        self.ran += 1
        said = self.cell(1).locator(".jp-OutputArea-output")
        said.first.wait_for(timeout=1000 * seconds)
        return "\n".join(text.strip() for text in said.all_inner_texts())

    def wait_for_count(self, count: int, seconds: float) -> None:
        """Wait until the kernel has run so many cells."""
        prompts = "() => [...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')].map((p) => p.textContent)"
        failed = self.page.locator(".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']")
        deadline = time.monotonic() + seconds
        while f"[{count}]:" not in self.page.evaluate(prompts):
            assert not failed.count(), f"a cell failed:\n{failed.first.text_content()[-1500:]}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done after {seconds} s; is a slow cell missing in SLOW? "
                                   f"{self.page.evaluate(prompts)}")
            self.page.wait_for_timeout(200)
        self.ran = count

    def output(self, number: int):
        """The output area of a cell."""
        return self.cell(number).locator(".jp-OutputArea-output")

    def wait_until(self, check, what: str, seconds: float = 20) -> None:
        """Wait for ``check()`` to be true; ``AssertionError`` names ``what`` did not happen."""
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            self.page.wait_for_timeout(50)
