"""Notebooks and the pages of ``docs/`` read as blocks."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import nbformat

from ..launch import BLOCK, read_place
from .blocks import (
    Block,
    Book,
    Callout,
    Code,
    Equation,
    Exercise,
    Figure,
    Heading,
    Output,
    Page,
    Part,
    Prose,
    first_title,
    label_of,
    picture_controls,
)
from .figures import picture
from .links import link_book

FRONT = ("preface", "setup", "notation")
BACK = ("glossary", "further_reading", "measurements", "house", "teaching", "launch", "changelog")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
CALLOUT = re.compile(r"> \*\*(?P<title>[^*]+?)\.?\*\*\s*(?P<text>.*)", re.S)
EXERCISE = re.compile(r"\*\*(?P<title>Exercise (?P<number>[A-Z]|\d+\.\d+))\.?\*\*\s*(?P<note>\([^)]*\))?[.\s]*", re.S)
SOLVED = re.compile(r"Exercise (?P<number>[A-Z]|\d+\.\d+)\b.*")
HEADING = re.compile(r"(?P<marks>#{1,4}) +(?P<text>.+?)\s*#*")
NUMBERED = re.compile(r"(?P<number>\d+(?:\.\d+)?)\.? +(?P<text>.+)")


def read_book(root: Path) -> Book:
    """The whole book below ``root``: front matter, six parts, back matter, references.

    Chapters and deep dives come in the order in which README.md lists them. Raises ``FileNotFoundError`` for
    a page that README.md names and that does not exist.
    """
    place = read_place(root)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [("", FRONT)] + _chapters(root) + [("", BACK)]
    numbers = _numbers(groups)
    parts = []
    for title, names in groups:
        pages = [_read_page(root, root / path, numbers) for path in _existing(root, names)]
        parts.append(Part(title or ("Before you begin" if names is FRONT else "At the end"), pages))
    book = Book("Bytes to Chat", parts, [], project["version"], _commit(root),
                f"https://github.com/{place.owner}/{place.name}", place.branch)
    return link_book(book, root)


# ---------------------------------------------------------------- which pages, in which order


def _chapters(root: Path) -> list[tuple[str, tuple[str, ...]]]:
    """For each chapter its short name and its notebooks: main, deep dives, solutions."""
    listed = re.findall(r"^\| \[(?:\d )?([^\]]+)\]\((ch\d\d_\w+)/(\w+\.ipynb)\)",
                        (root / "README.md").read_text(encoding="utf-8"), re.M)
    names: dict[str, str] = {}
    notebooks: dict[str, list[str]] = {}
    for title, folder, name in listed:
        names.setdefault(folder, title)
        if name != "assignment.ipynb":
            notebooks.setdefault(folder, []).append(f"{folder}/{name}")
    for folder, paths in notebooks.items():
        if (root / folder / "solutions.ipynb").exists():
            paths.append(f"{folder}/solutions.ipynb")
    return [(names[folder], tuple(paths)) for folder, paths in notebooks.items()]


def _existing(root: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of a group; a page of docs/ that is not there yet is left out, a notebook must be there."""
    if names in (FRONT, BACK):
        return [path for name in names if (root / (path := Path("docs") / f"{name}.md")).exists()]
    for name in names:
        if not (root / name).exists():
            raise FileNotFoundError(f"README.md lists {name}, which does not exist: mend the table or the name.")
    return [Path(name) for name in names]


def _numbers(groups: list[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, str]]:
    """Kind and number of each notebook: ("chapter", "3"), ("dive", "D7"), ("solutions", "")."""
    numbers, dives = {}, 0
    for chapter, (_, names) in enumerate(groups[1:-1], start=1):
        numbers[names[0]] = ("chapter", str(chapter))
        for name in names[1:]:
            if name.endswith("/solutions.ipynb"):
                numbers[name] = ("solutions", "")
            else:
                dives += 1
                numbers[name] = ("dive", f"D{dives}")
    return numbers


def _commit(root: Path) -> str:
    """The short commit that is checked out, or "" outside a clone."""
    found = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


# ---------------------------------------------------------------- one page as blocks


def _printed(text: str) -> str:
    """What a reader sees of an output: no colours, nothing that no font shows."""
    return picture_controls(ANSI.sub("", text))


def _read_page(root: Path, path: Path, numbers: dict) -> Page:
    relative = path.relative_to(root)
    name = PurePosixPath(relative.with_suffix(""))
    kind, number = numbers.get(relative.as_posix(), ("front" if name.name in FRONT else "back", ""))
    label = label_of(f"page-{name}")
    reader = _Reader(kind, number, label)
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        title, blocks = first_title(text), list(reader.markdown(text))
    else:
        notebook = nbformat.read(path, as_version=4)
        title, blocks = first_title(notebook.cells[0].source), list(reader.notebook(notebook, name))
    return Page(name, kind, number, title, label, blocks)


class _Reader:
    """Turns the cells of one page into blocks, and counts what is numbered."""

    def __init__(self, kind: str, number: str, label: str):
        self.kind, self.number, self.label = kind, number, label
        self.figures = self.equations = 0
        self.taken: set[str] = {label}
        self.under = ""  # the page of solutions says under which notebook an exercise stands

    def notebook(self, notebook, name: PurePosixPath) -> Iterator[Block]:
        for cell in notebook.cells:
            if "remove-cell" in cell.metadata.get("tags", ()):
                continue
            if cell.cell_type == "markdown":
                yield from self.markdown(cell.source)
            elif cell.cell_type == "code" and cell.source.strip():
                yield self._code(cell.source, name)
                yield from self._outputs(cell.outputs)

    def _code(self, source: str, name: PurePosixPath) -> Code:
        if source.startswith("#| export"):
            return Code(source.split("\n", 1)[1].strip("\n"), f"{name}.py")
        return Code(source.strip("\n"), "")

    def _outputs(self, outputs) -> Iterator[Block]:
        for output in outputs:
            if output.output_type == "stream":
                yield Output(_printed(output.text).strip("\n"), "text")
            elif output.output_type == "error":
                yield Output(_printed("\n".join(output.traceback)), "error")
            elif "image/png" in output.data:
                yield self._figure(output)
            elif output.data.get("text/plain", "").strip():
                yield Output(_printed(output.data["text/plain"]), "text")

    def _figure(self, output) -> Figure:
        self.figures += 1
        number = f"{self.number or self._letter()}.{self.figures}"
        label = self._label(f"fig-{number}")
        return Figure(*picture(output, label), number, label)

    def _letter(self) -> str:
        return "S" + re.search(r"ch0?(\d+)", self.label)[1] if self.kind == "solutions" else ""

    def markdown(self, text: str) -> Iterator[Block]:
        """The blocks of a Markdown text; ordinary paragraphs that follow one another stay together."""
        prose: list[str] = []
        exercise: list | None = None
        for piece in _pieces(BLOCK.sub("", text)):
            block = self._special(piece)
            if exercise is not None and block is None:
                exercise[1].append(piece)
                continue
            if exercise is not None:
                yield self._exercise(*exercise)
                exercise = None
            if block is None:
                prose.append(piece)
                continue
            if prose:
                yield Prose("\n\n".join(prose))
                prose = []
            if isinstance(block, re.Match):
                exercise = [block, [piece[block.end():]]]
            else:
                yield block
        if exercise is not None:
            yield self._exercise(*exercise)
        if prose:
            yield Prose("\n\n".join(prose))

    def _special(self, piece: str) -> Block | re.Match | None:
        """A heading, formula or box, the start of an exercise, or None for ordinary text."""
        if found := HEADING.fullmatch(piece):
            return self._heading(len(found["marks"]), found["text"])
        if piece.startswith("$$") and piece.endswith("$$") and piece.count("$$") == 2:
            self.equations += 1
            number = f"{self.number or self._letter()}.{self.equations}"
            return Equation(piece[2:-2].strip(), number, self._label(f"eq-{number}"))
        if found := CALLOUT.fullmatch(piece):
            words = re.sub(r"^> ?", "", found["text"], flags=re.M)
            return Callout("predict" if found["title"].startswith("Before") else "note", found["title"], words)
        return EXERCISE.match(piece)

    def _heading(self, level: int, text: str) -> Heading:
        if level == 1:
            return Heading(1, self.number, first_title(f"# {text}"), self.label)
        numbered = NUMBERED.fullmatch(text)
        if numbered and self.kind in ("chapter", "dive"):
            number = numbered["number"] if self.kind == "chapter" else f"{self.number}.{numbered['number']}"
            return Heading(level, number, numbered["text"], self._label(f"sec-{number}"))
        if self.kind == "solutions" and level == 2:
            self.under = first_title(f"# {text}")
        if solved := self.kind == "solutions" and SOLVED.fullmatch(text):
            return Heading(level, "", text, self._label(f"solution-{self.under}-{solved['number']}"))
        return Heading(level, "", text, self._label(f"{self.label}-{text}"))

    def _exercise(self, start: re.Match, pieces: list[str]) -> Exercise:
        number = start["number"] if "." in start["number"] else f"{self.number}.{start['number']}"
        words = "\n\n".join(pieces).strip()
        return Exercise(number, start["title"], start["note"] or "", words, self._label(f"ex-{number}"))

    def _label(self, wish: str) -> str:
        label, count = label_of(wish), 1
        while label in self.taken:
            count += 1
            label = f"{label_of(wish)}-{count}"
        self.taken.add(label)
        return label


def _pieces(text: str) -> Iterator[str]:
    """Paragraphs, headings, lists, fenced code and so on: what empty lines separate, fences kept whole."""
    piece: list[str] = []
    fence = ""
    for line in text.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and not fence:
            fence = mark[1]
        elif fence and line.strip() == fence:
            fence = ""
        heading = not fence and not mark and HEADING.fullmatch(line)
        if piece and (heading or (not fence and not line.strip())):
            yield "\n".join(piece)
            piece = []
        if heading:
            yield line
        elif line.strip() or fence:
            piece.append(line.rstrip())
    if piece:
        yield "\n".join(piece)
