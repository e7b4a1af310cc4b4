"""What students hand in: found in a folder, read with care, put together to the notebook that is run.

Nothing here runs a student's code. A file that is not a notebook, a link, a huge or broken file becomes a
submission with a ``problem``, which is graded with 0 points, never an error that stops the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import nbformat

from .assignments import Assignment, defined_names, grade_id, kind
from .handout import RELEASE_LIST

MAX_BYTES = 10_000_000
MAX_CELLS = 1000
CANVAS = re.compile(r"(?P<name>[^_]+)_(?:LATE_)?(?P<id>\d+)_\d+_(?P<file>.+)", re.S)
MOODLE = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_file_?", re.S)
ATTEMPT = re.compile(r"-(\d+)\.ipynb$")  # Canvas numbers what is handed in again


@dataclass(frozen=True)
class Submission:
    """One file of one student, or the lack of one. ``problem`` says why it cannot be graded, for the student."""

    student: str
    path: Path | None
    number: str = ""  # the learning platform's number for the student
    chapter: str = ""
    problem: str = ""
    remarks: tuple[str, ...] = ()
    digest: str = ""
    cells: tuple[StudentCell, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class StudentCell:
    """A cell as it was handed in: its source, and the identifiers that tell where it belongs."""

    code: bool
    source: str
    grade_id: str = ""
    identifier: str = ""


@dataclass(frozen=True)
class Step:
    """A cell of the notebook that is run. ``kind`` is "given", "solution", "own" or "test"."""

    kind: str
    source: str
    grade_id: str = ""


def find_submissions(folder: Path, assignments: list[Assignment], *, chapter: str | None = None,
                     skip: Path | None = None) -> list[Submission]:
    """Every submission in a folder, sorted by student. ``chapter`` settles which assignment all of them are.

    Understood are NAME.ipynb, NAME/*.ipynb, NAME/ch03/*.ipynb (nbgrader), what Canvas and Moodle give to download,
    and a release itself: then it is one student's, called as the folder is, and ``chapter`` says which notebook.
    Hidden files are passed over, links never followed. ``ValueError`` if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the students' notebooks.")
    if (folder / RELEASE_LIST).is_file():
        return _own_homework(folder, [one for one in assignments if chapter in (None, one.chapter)])
    found: dict[tuple[str, str, str], list[Submission]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__MACOSX")) or (skip and entry.resolve() == Path(skip).resolve()):
            continue
        student, number = _owner(entry)
        for path in _files_of(entry):
            for read in [read_submission(student, number, path, assignments, chapter)]:
                found.setdefault((student, number, read.chapter), []).append(read)
    kept = [_choose(several) for several in found.values()]
    named = {(one.student, one.number) for one in kept if not one.problem}
    kept = [one for one in kept if not (one.problem and not one.chapter and (one.student, one.number) in named)]
    return sorted(kept, key=lambda one: (one.student, one.number, one.chapter))


def _own_homework(folder: Path, assignments: list[Assignment]) -> list[Submission]:
    """The notebooks of a reader who works in a release and grades it: one for each chapter that is in it."""
    places = [(one.chapter, folder / one.chapter / "assignment.ipynb") for one in assignments]
    return [read_submission(folder.resolve().name, "", path, assignments, chapter)
            for chapter, path in places if path.exists()]


def _owner(entry: Path) -> tuple[str, str]:
    """The student's name and number that a file's or folder's name tells."""
    match = MOODLE.fullmatch(entry.name) or CANVAS.fullmatch(entry.name)
    if match:
        return match["name"], match["id"]
    linked = entry.is_symlink() or entry.is_file()
    return (entry.stem if linked and entry.suffix else entry.name) or entry.name, ""


def _files_of(entry: Path) -> list[Path]:
    """The notebooks of one student, or, where there is none, one path that is none."""
    if entry.is_symlink() or not entry.is_dir():
        return [entry]
    notebooks, others = [], []
    for path in sorted(_walk(entry, 3)):
        (notebooks if path.suffix == ".ipynb" else others).append(path)
    return notebooks or others[:1] or [entry]


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith((".", "__MACOSX")):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, depth - 1) if depth else ()
        else:
            yield path


def _choose(several: list[Submission]) -> Submission:
    """Of several files of a student for the same chapter: a readable one, then the last attempt."""
    def rank(one: Submission) -> tuple:
        attempt = ATTEMPT.search(one.path.name)
        name = one.path.name
        return not one.problem, int(attempt[1]) if attempt else 0, name == "assignment.ipynb", name
    best = max(several, key=rank)
    if len(several) == 1:
        return best
    others = ", ".join(sorted(_short(one.path.name) for one in several if one is not best))
    remark = f"several files; graded is {_short(best.path.name)}, not {others}"
    return replace(best, remarks=(*best.remarks, remark))


def _short(text: str, length: int = 60) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= length else text[:length - 3] + "..."


def read_submission(student: str, number: str, path: Path, assignments: list[Assignment],
                    chapter: str | None = None) -> Submission:
    """One file, read; whatever is wrong with it becomes its ``problem``."""
    found = Submission(_clean(student), path, number, chapter or _named_chapter(path, assignments))
    try:
        data, text = _load(path)
        cells = _cells(data)
    except (ValueError, OSError, RecursionError, MemoryError) as error:
        return replace(found, problem=str(error), digest=hashlib.sha256(str(error).encode()).hexdigest())
    digest = hashlib.sha256(text).hexdigest()
    if not found.chapter or not chapter:
        found = replace(found, chapter=_which(data, cells, assignments) or found.chapter)
    if found.chapter not in {one.chapter for one in assignments}:
        return replace(found, digest=digest, problem="It belongs to none of the assignments that are graded: "
                       "neither its cells nor its metadata name one. Was it made from the handed-out notebook?")
    return replace(found, digest=digest, cells=tuple(cells))


def _clean(name: str) -> str:
    """A name without control characters, at most 200 characters: for files, tables and pages."""
    name = unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode("utf-8", "replace"))
    name = re.sub(r"\s+", " ", "".join(letter if letter.isprintable() else " " for letter in name)).strip()
    if len(name) > 200:
        return f"{name[:180]}...{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "unnamed"


def _named_chapter(path: Path, assignments: list[Assignment]) -> str:
    """The chapter that a folder on the way is called (nbgrader's layout), or the only one there is."""
    chapters = [one.chapter for one in assignments]
    return next((part for part in reversed(path.parts[-3:-1]) if part in chapters),
                chapters[0] if len(chapters) == 1 else "")


def _load(path: Path) -> tuple[dict, bytes]:
    if path.is_symlink():
        raise ValueError("A link was handed in, not a notebook.")
    if not path.is_file():
        raise ValueError("No notebook was handed in.")
    if path.suffix != ".ipynb":
        raise ValueError(f"The file handed in is no notebook (.ipynb) but {_short(path.name)!r}.")
    size = path.stat().st_size
    if size == 0:
        raise ValueError("The file handed in is empty.")
    if size > MAX_BYTES:
        raise ValueError(f"The notebook has {size / 1e6:.0f} MB, more than the {MAX_BYTES / 1e6:.0f} MB allowed. "
                         "Clear its outputs (Edit, Clear Outputs of All Cells), save it and hand it in again.")
    text = path.read_bytes()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("The file handed in is no notebook: it is not valid JSON. Open it in JupyterLab, "
                         "see that it is whole, save it and hand it in again.") from error
    if not isinstance(data, dict) or ("cells" not in data and "worksheets" not in data):
        raise ValueError("The file handed in is JSON, but no notebook: it has no cells.")
    return data, text


def _cells(data: dict) -> list[StudentCell]:
    """The cells of a notebook of any version, taken apart without trusting any of it."""
    if "worksheets" in data:
        try:
            data = nbformat.reads(json.dumps(data), as_version=4)
        except Exception as error:  # whatever an old or forged file makes the converter raise
            raise ValueError("The notebook has an old format that could not be read. "
                             "Save it in JupyterLab.") from error
    cells = data.get("cells")
    if not isinstance(cells, list):
        raise ValueError("The file handed in is JSON, but no notebook: it has no cells.")
    return [_cell(cell) for cell in cells[:MAX_CELLS] if isinstance(cell, dict)]


def _cell(cell: dict) -> StudentCell:
    source = cell.get("source", "")
    source = "".join(part for part in source if isinstance(part, str)) if isinstance(source, list) else source
    source = source if isinstance(source, str) else ""
    metadata = cell.get("metadata") if isinstance(cell.get("metadata"), dict) else {}
    identifier = cell.get("id") or metadata.get("id") or ""
    source = source.encode("utf-8", "replace").decode("utf-8").replace("\x00", "")
    return StudentCell(cell.get("cell_type") == "code", source, grade_id({"metadata": metadata}), str(identifier))


def _which(data: dict, cells: list[StudentCell], assignments: list[Assignment]) -> str:
    """The chapter of the assignment that a notebook has most cells of, else the one its metadata name."""
    names = {cell.grade_id for cell in cells if cell.grade_id}
    shared = {one.chapter: len(names & {grade_id(cell) for cell in one.cells}) for one in assignments}
    best = max(shared, key=shared.get, default="")
    if best and shared[best] and list(shared.values()).count(shared[best]) == 1:
        return best
    metadata = data.get("metadata") if isinstance(data.get("metadata"), dict) else {}
    course = metadata.get("course") if isinstance(metadata.get("course"), dict) else {}
    return str(course.get("assignment", "")) if course.get("assignment") in shared else ""


def assemble(assignment: Assignment, submission: Submission,
             released: dict[str, str]) -> tuple[list[Step], dict[str, str], list[str]]:
    """What is run, the student's answers by grade_id, and remarks.

    Given cells and tests come from the source, solutions and answers from the student, and the student's own
    cells stand after the cell they followed. ``released`` is what the students' copy has in each such cell.
    """
    remarks = []
    wanted = {grade_id(cell): cell for cell in assignment.cells if grade_id(cell)}
    chosen, own = _sort_cells(assignment, submission.cells, wanted, remarks)
    own_work = [name for name, cell in wanted.items() if kind(cell) in ("solution", "question")]
    answers = {name: chosen[name] for name in own_work if name in chosen}
    missing = [name for name in own_work if name not in answers]
    if missing:
        remarks.append(f"not in the notebook: {', '.join(missing)}")
    steps = [Step("own", source) for source in own.get("", [])]
    for cell in assignment.cells:
        name, what = grade_id(cell), kind(cell)
        if what in ("given", "code", "test") and runs(cell):
            steps.append(Step("test" if what == "test" else "given", cell.source, name))
        elif what == "solution" and runs(cell) and name in answers:
            steps.append(Step("solution", answers[name], name))
        steps += [Step("own", source) for source in (own.get(name, []) if name else [])]
    unchanged = [name for name, text in answers.items() if text.strip() == released.get(name, "").strip()]
    return steps, {name: text for name, text in answers.items() if name not in unchanged}, remarks


def runs(cell) -> bool:
    """Whether a cell of an assignment is run when it is graded: all code but the cell that starts Colab."""
    return cell.cell_type == "code" and "launch" not in (*cell.metadata.get("tags", []), cell.get("id"))


def _sort_cells(assignment: Assignment, cells: tuple[StudentCell, ...], wanted: dict,
                remarks: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The student's cells: the first of each grade_id, and the others by the grade_id of the cell before them."""
    chosen, own, last = {}, {}, ""
    unnamed = [cell for cell in assignment.cells if not grade_id(cell)]
    handed_out, handed_out_ids = {cell.source.strip() for cell in unnamed}, {cell.get("id") for cell in unnamed}
    without = not any(cell.grade_id in wanted for cell in cells)
    for cell in cells:
        name = cell.grade_id if cell.grade_id in wanted else _guess(cell, wanted, chosen) if without else ""
        if name and name in chosen:
            remarks.append(f"{name} stands in the notebook more than once; the first one counts")
        elif name:
            chosen[name], last = cell.source, name
        elif cell.code and cell.identifier not in handed_out_ids and cell.source.strip() not in handed_out:
            own.setdefault(last, []).append(cell.source)
    if without and chosen:
        remarks.append("the cells' grade_ids were lost; the cells were found by their ids and what they define")
    edited = [name for name, text in chosen.items() if kind(wanted[name]) in ("test", "given")
              and text.strip() != _visible(wanted[name].source).strip()]
    if edited:
        remarks.append(f"changed cells that are not to be changed (the originals were run): {', '.join(edited)}")
    return chosen, own


def _visible(source: str) -> str:
    return re.sub(r"[^\n]*BEGIN HIDDEN TESTS.*?END HIDDEN TESTS[^\n]*\n?", "", source, flags=re.S)


def _guess(cell: StudentCell, wanted: dict, chosen: dict[str, str]) -> str:
    """The grade_id of a cell that lost it: by its id, or by the names that its top level defines."""
    for name, original in wanted.items():
        if cell.identifier and cell.identifier == original.get("id"):
            return name
    defined = defined_names(cell.source, variables=True) if cell.code else set()
    for name, original in wanted.items():
        needed = defined_names(original.source, variables=True)
        if kind(original) == "solution" and name not in chosen and needed and needed <= defined:
            return name
    return ""
