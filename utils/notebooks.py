"""Running notebooks from the command line: progress with the time left, peak memory, tidy outputs."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from .workspace import atomic_write, short_path, workspace

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT = ("tags", "slideshow", "jupyter", "nbgrader")  # of a cell's metadata; the rest changes from run to run
BAR = re.compile(r"\d+%\|[^|]*\|")  # a tqdm bar; another output may come before the bar is blanked
BEFORE_A_LINE = re.compile(r"[^\n|]*\d+%\|[^|\n]*\| [^\s/]+/\S+ \[[^\]\n]*\]")  # a bar, then what a cell printed
NESTED = re.compile(r"\n\r[^\n]*?\x1b\[A")  # a bar inside another: down a line, the bar, and up again
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Job:
    """A notebook to run, and how many seconds that takes on two cores."""

    notebook: Path
    title: str
    seconds: float


class NotebookError(RuntimeError):
    """A cell failed; the message shows the cell, the error and where the notebook as far as it got lies."""


def run_notebooks(jobs: list[Job], save: bool = False, timeout: int = 1800) -> None:
    """Execute notebooks one after the other, with a progress line.

    The executed copies go to ``workspace/notebooks``, a folder a chapter; with ``save`` they also replace the notebooks
    themselves (for maintainers: that is how outputs are committed). Raises ``NotebookError``.
    """
    with _Clock(jobs) as clock:
        for number, job in enumerate(jobs):
            clock.start(number)
            notebook, peak = execute(job.notebook, clock.cell, timeout)
            clock.finish(peak)
            for target in [_copy_of(job.notebook)] + [job.notebook] * save:
                write_notebook(notebook, target)


def execute(path: Path, on_cell=lambda done, total: None, timeout: int = 1800):
    """Run one notebook in a fresh kernel: (executed notebook, peak memory in bytes)."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = KERNELSPEC
    total, done = sum(cell.cell_type == "code" for cell in notebook.cells), 0

    def started(cell, cell_index):
        nonlocal done
        if cell.cell_type == "code":
            on_cell(done, total)
            done += 1

    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=started, record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # no advice about transports in a reader's terminal
    )
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # so that a kernel that crashes says where
    memory = _PeakMemory(client)
    with tempfile.TemporaryFile() as said:  # what the kernel's process itself prints, at its end for instance
        try:
            with memory:
                client.execute(stdout=said, stderr=said)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            copy = _copy_of(path)
            write_notebook(notebook, copy)
            said.seek(0)
            last_words = said.read().decode("utf-8", "replace").strip()
            raise NotebookError(_describe(notebook, path, copy, error, done, last_words)) from None
    return notebook, memory.peak


def _copy_of(path: Path) -> Path:
    return workspace("notebooks", path.parent.name) / path.name


def write_notebook(notebook, path: Path) -> None:
    """Write a notebook with its volatile parts normalised, so that a re-run leaves a small diff."""
    with atomic_write(path) as temporary:
        nbformat.write(normalised(notebook), temporary)


def normalised(notebook):
    """The notebook with fixed kernel metadata, merged streams and no trace of progress bars."""
    course = {key: notebook.metadata[key] for key in ("course",) if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict({
        **course,
        "kernelspec": KERNELSPEC,
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python",
                          "pygments_lexer": "ipython3"},
    })
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT})
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs)
    return notebook


def _tidy(outputs: list) -> list:
    tidy = []
    for output in outputs:
        last = tidy[-1] if tidy else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last.text += output.text
        else:
            tidy.append(output)
    for output in tidy:
        if "data" in output:  # a widget without its kernel is dead: what stays is the picture beside it
            output.data.pop("application/vnd.jupyter.widget-view+json", None)
        if output.output_type == "stream":
            lines = re.findall(r"[^\n]*\n|[^\n]+", NESTED.sub("", output.text))
            output.text = BEFORE_A_LINE.sub("", "".join(map(_overwritten, lines)))
    return [o for o in tidy if o.output_type != "stream" or o.text.strip()]


def _overwritten(line: str) -> str:
    """What a terminal shows of a line with carriage returns; a progress bar, blanked or cut off, vanishes."""
    if "\r" not in line.rstrip("\r\n"):
        return line.replace("\r\n", "\n")
    end = "\n" if line.endswith("\n") else ""
    if not end and BAR.search(line):
        return ""
    screen: list[str] = []
    for part in line.rstrip("\r\n").split("\r"):
        screen[: len(part)] = list(part)
    text = "".join(screen).rstrip()
    return text + end if text else ""


def _describe(notebook, path: Path, copy: Path, error: Exception, done: int, last_words: str) -> str:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cell = code[max(done - 1, 0)]
    source = "\n".join("    " + line for line in cell.source.splitlines()[:6])
    if isinstance(error, CellTimeoutError):
        reason = "The cell took too long and was stopped."
    elif isinstance(error, DeadKernelError):
        reason = "The kernel died: most often the machine ran out of memory. Close other programs and try again."
        if last_words:
            reason += "\nBefore that it said:\n" + "\n".join(last_words.splitlines()[:12])
    else:
        reason = f"{error.ename}: {ANSI.sub('', error.evalue)}"
    return (f"{path.parent.name}/{path.name} stopped in code cell {done} of {len(code)}:\n\n{source}\n\n{reason}\n\n"
            f"The notebook as far as it got: {short_path(copy)}\n"
            f"To look closer: python course.py lab, and open {path.parent.name}/{path.name}")


class _PeakMemory:
    """Watches the resident memory of a kernel and its children while a notebook runs."""

    def __init__(self, client: NotebookClient):
        self.client, self.peak = client, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            try:
                process = psutil.Process(self.client.km.provisioner.pid)
                family = [process, *process.children(recursive=True)]
                self.peak = max(self.peak, sum(p.memory_info().rss for p in family))
            except (AttributeError, TypeError, psutil.Error):  # not started yet, or just gone
                continue

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()


class _Clock:
    """One line in the terminal: which chapter, which cell, how long it took, how long it will take.

    The time left starts from the seconds that each job gives and is scaled by this machine's pace.
    """

    def __init__(self, jobs: list[Job]):
        self.jobs, self.number, self.cells = jobs, 0, (0, 1)
        self.began = self.chapter_began = time.monotonic()
        self.spent = self.expected = 0.0  # over the finished chapters
        self._stop, self._tty = threading.Event(), sys.stderr.isatty()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def start(self, number: int) -> None:
        self.number, self.cells, self.chapter_began = number, (0, 1), time.monotonic()
        if not self._tty:
            self._print(self._line())

    def cell(self, done: int, total: int) -> None:
        self.cells = (done, total)

    def finish(self, peak: int) -> None:
        seconds = time.monotonic() - self.chapter_began
        self.spent, self.expected = self.spent + seconds, self.expected + self.jobs[self.number].seconds
        job = self.jobs[self.number]
        self._print(f"{job.notebook.parent.name:<15} {job.title:<44} {_minutes(seconds):>6}  {peak / 1e9:4.2f} GB")

    def left(self) -> float:
        """Seconds to go over all chapters, by the table of expected times and the pace so far."""
        now = time.monotonic() - self.chapter_began
        pace = self.spent / self.expected if self.expected else 1.0
        later = sum(job.seconds for job in self.jobs[self.number + 1 :])
        current = self.jobs[self.number].seconds * pace
        share = self.cells[0] / self.cells[1]
        current = max(current - now, now / share - now if share > 0.5 else 0.05 * current)
        return current + pace * later

    def _line(self) -> str:
        job = self.jobs[self.number]
        done = self.spent + (time.monotonic() - self.chapter_began)
        share = done / (done + self.left())
        bar = ("█" * round(20 * share)).ljust(20, "·")
        return (f"{bar} {share:4.0%}  {job.notebook.parent.name} cell {self.cells[0] + 1}/{self.cells[1]}"
                f"  {_minutes(time.monotonic() - self.began)} gone, about {_minutes(self.left())} left")

    def _tick(self) -> None:
        while not self._stop.wait(1 if self._tty else 30):
            self._print(self._line(), final=not self._tty)

    def _print(self, text: str, final: bool = True) -> None:
        start, end = ("\r\x1b[2K", "\n" if final else "") if self._tty else ("", "\n")
        try:
            print(start + text, end=end, file=sys.stderr, flush=True)
        except UnicodeEncodeError:  # a terminal without the bar's characters
            print(start + text.replace("█", "#").replace("·", "."), end=end, file=sys.stderr, flush=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        if self._tty:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
