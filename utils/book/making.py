"""All forms of the book at once, with the time left, and what came out."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

from .blocks import Book
from .cover import Cover
from .text import read_book

FORMS = {"html": ("site", "build_site", "html"), "pdf": ("pdf", "build_pdf", "bytes-to-chat.pdf"),
         "epub": ("epub", "build_epub", "bytes-to-chat.epub")}  # module, function, what it writes below the folder
SECONDS = {"html": 70, "pdf": 70, "epub": 20}  # on two cores, one form on each


class BookError(RuntimeError):
    """A form of the book could not be made; the message says which, and what its program said."""


@dataclass(frozen=True)
class Made:
    """A finished form: where it lies, how large it is, how long it took."""

    form: str
    path: Path
    size: int  # bytes
    seconds: float


def make_book(root: Path, out: Path, forms: Sequence[str], cover: Callable[[], Cover]) -> list[Made]:
    """Write the ``forms`` ("html", "pdf", "epub") of the book below ``root`` into the folder ``out``, two at a time.

    ``cover`` computes what the cover shows; it is asked only if a form has one. Raises ``BookError``.
    """
    book = read_book(root)
    out.mkdir(parents=True, exist_ok=True)
    picture = cover() if set(forms) - {"html"} else None
    made: list[Made] = []
    with _bar(forms) as bar, ProcessPoolExecutor(2) as pool:
        running = {pool.submit(_make, form, book, root, out, picture): form for form in forms}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                made.append(_result(future, running.pop(future)))
                bar.write(_line(made[-1]))
    return made


def _make(form: str, book: Book, root: Path, out: Path, cover: Cover | None) -> Made:
    module, function, name = FORMS[form]
    began, target = time.monotonic(), out / name
    build = getattr(import_module(f".{module}", __package__), function)
    build(book, root, target) if form == "html" else build(book, root, target, cover)
    size = sum(path.stat().st_size for path in target.rglob("*")) if target.is_dir() else target.stat().st_size
    return Made(form, target, size, time.monotonic() - began)


def _result(future: Future, form: str) -> Made:
    error = future.exception()
    if error is not None:
        raise BookError(f"The {form} form of the book could not be made.\n{type(error).__name__}: {error}") from error
    return future.result()


def _line(made: Made) -> str:
    return f"{made.form:<5} {made.size / 1e6:6.1f} MB {made.seconds:5.0f} s"


@contextmanager
def _bar(forms: Sequence[str]) -> Iterator[tqdm]:
    """A bar of the seconds that these forms take together, moved by the clock."""
    longest = max([sum(SECONDS[form] for form in forms) / 2, *(SECONDS[form] for form in forms)])
    stop = threading.Event()
    with tqdm(total=round(longest), desc="making the book", bar_format="{desc} {bar} {elapsed} gone, {remaining} left",
              ncols=min(100, shutil.get_terminal_size().columns), leave=False) as bar:
        def tick() -> None:
            while not stop.wait(1):
                bar.update(min(1, max(0, bar.total - 1 - bar.n)))
        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield bar
        finally:
            stop.set()
            clock.join()
