"""Solutions that people really hand in, wrong ones and right ones, to test the tests of an assignment.

``attempts_chNN.py`` holds those of one chapter. Each replaces one solution cell of the assignment or a part of
it; the graded cells, hidden tests included, are then run as the grader runs them, only without a kernel of
their own. A wrong attempt must lose the points of the test that is meant for it, a right one must keep all.
"""

import contextlib
import importlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Attempt:
    """One solution. ``code`` is the whole cell; else ``edits`` (old, new) change the model solution.

    ``cell`` is the grade_id of the solution cell, ``loses`` that of the test that must catch it; an attempt
    without ``loses`` is right. ``why`` says what its author did, in a few words.
    """

    why: str
    cell: str
    loses: str | None = None
    code: str = ""
    edits: tuple[tuple[str, str], ...] = ()


def assignment_path(chapter: str) -> Path:
    """``ch03`` -> ``.../ch03_attention/assignment.ipynb``."""
    return next(ROOT.glob(f"{chapter}_*/assignment.ipynb"))


def chapters() -> list[str]:
    """The chapters that have an assignment: ["ch01", ...]."""
    return sorted(path.parent.name[:4] for path in ROOT.glob("ch[0-9][0-9]_*/assignment.ipynb"))


def attempts_of(chapter: str) -> list[Attempt]:
    return importlib.import_module(f"tests.attempts_{chapter}").ATTEMPTS


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def grading(cell) -> dict:
    """nbgrader's part of a cell's metadata."""
    return cell.metadata.get("nbgrader", {})


def is_test(cell) -> bool:
    return bool(grading(cell).get("grade")) and not grading(cell).get("solution")


def changed_source(cell, attempt: Attempt) -> str:
    """The solution cell as this attempt has it. ``ValueError`` for an edit that does not fit any more."""
    source = attempt.code or cell.source
    for old, new in attempt.edits:
        if cell.source.count(old) != 1:
            times = cell.source.count(old)
            raise ValueError(f"{attempt.why!r}: {old!r} stands {times} times in {attempt.cell}, not once")
        source = source.replace(old, new)
    if source == cell.source:
        raise ValueError(f"{attempt.why!r} changes nothing in {attempt.cell}")
    return source


def grade_attempt(chapter: str, attempt: Attempt | None = None) -> dict[str, str | None]:
    """Run an assignment with one solution cell replaced: {grade_id of a test: None, or how it failed}.

    Cells tagged ``experiment`` (and the tests tagged so) take seconds; they run only for an attempt on a cell
    that is tagged so itself, or with no attempt at all: then the model solution is graded whole.
    """
    path = assignment_path(chapter)
    cells = code_cells(path)
    if attempt:
        target = next(cell for cell in cells if grading(cell).get("grade_id") == attempt.cell)
        target.source = changed_source(target, attempt)
        if "experiment" not in target.metadata.get("tags", []):
            cells = [cell for cell in cells if "experiment" not in cell.metadata.get("tags", [])]
    results = {}
    with _chapter_folder(path.parent):
        names = {"__name__": "__main__"}
        for number, cell in enumerate(cells):
            failed = _run(cell.source, names, f"{chapter} cell {number}")
            if is_test(cell):
                results[grading(cell)["grade_id"]] = failed
            elif failed and not attempt:
                raise AssertionError(f"{path.parent.name}/{path.name}, cell {cell.id}: {failed}")
    return results


def _run(source: str, names: dict, where: str) -> str | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, where, "exec"), names)
    except Exception as error:  # whatever a student's code raises
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _chapter_folder(folder: Path):
    """As a kernel in the chapter's folder: there ``previous_chapters`` is that chapter's."""
    before = os.getcwd()
    known = sys.modules.get("previous_chapters")  # kept from one attempt to the next: some check what they import
    if known and Path(known.__file__).parent != folder:
        del sys.modules["previous_chapters"]
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))


def table(names: list[str]) -> tuple[str, list[str]]:
    """The attempts of some chapters as a text table, and what is wrong with the tests: ([] if nothing)."""
    lines, problems = [], []
    for chapter in names:
        lines += [f"\n{chapter}", f"{'attempt':<66} {'on':<22} {'meant test':<26} result"]
        for attempt in attempts_of(chapter):
            results = grade_attempt(chapter, attempt)
            lost = [name for name, failed in results.items() if failed]
            good = attempt.loses in lost if attempt.loses else not lost
            result = f"loses {', '.join(lost)}" if lost else "full marks"
            lines.append(f"{attempt.why:<66} {attempt.cell:<22} {attempt.loses or '(right)':<26} "
                         f"{'' if good else 'WRONG: '}{result}")
            if not good:
                problems.append(f"{chapter}, {attempt.cell}, {attempt.why!r}: {result}; "
                                f"it should {'lose ' + attempt.loses if attempt.loses else 'keep every point'}.")
    return "\n".join(lines), problems
