"""Handing out: the students' copies of assignments, with instructions, or a whole course that has them in it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import nbformat

from ..workspace import ROOT, atomic_write, write_text
from .assignments import Assignment, read_assignment, student_copy

RELEASE_LIST = ".release.json"
NOT_FOR_STUDENTS = ("tests/attempts", "tests/test_assignments.py", "tests/test_classroom.py", "tests/hostile.py",
                    "tests/small_assignment.py", ".github/")  # the last would test what is left out here

WAY_TO_THE_COURSE = '''\
"""Stands in for the chapter's own file, so that the notebook beside it runs anywhere in the course."""

from pathlib import Path

_COURSE = next((folder for folder in Path(__file__).resolve().parents if (folder / "course.py").exists()), None)
if _COURSE is None:
    raise ImportError(
        f"{{Path(__file__).resolve().parent}} lies outside the course. Move this folder into the course's folder (the "
        "one with course.py), or only the notebook into {chapter}/ there, under a name of your own.")
__file__ = str(_COURSE / "{chapter}" / "previous_chapters.py")
exec(compile(Path(__file__).read_text(encoding="utf-8"), __file__, "exec"))
'''


def release(sources: list[Path], folder: Path, *, whole_course: bool = False) -> list[Path]:
    """Write the students' copies of assignments into ``folder``, and return the paths of the notebooks.

    ``folder/ch03/assignment.ipynb``, with INSTRUCTIONS.md and the way to the course beside it; with
    ``whole_course`` a copy of the course that has them in place of the sources, ready to be pushed as the class's
    repository. ``ValueError`` if a source is faulty, a copy would show a solution, or the folder holds anything
    but an earlier release.
    """
    folder = Path(folder)
    assignments = [read_assignment(path) for path in sources]
    if not assignments:
        raise ValueError("There is no assignment to release.")
    copies = [(one, student_copy(one)) for one in assignments]
    _check_release_folder(folder)
    files: dict[str, bytes] = _course_files() if whole_course else {"README.md": _readme(assignments).encode()}
    notebooks = []
    for one, copy in copies:
        place = one.folder if whole_course else one.chapter
        notebooks.append(folder / place / "assignment.ipynb")
        files[f"{place}/assignment.ipynb"] = (nbformat.writes(copy).rstrip("\n") + "\n").encode()
        files[f"{place}/INSTRUCTIONS.md"] = instructions(one).encode()
        if not whole_course:
            files[f"{place}/previous_chapters.py"] = WAY_TO_THE_COURSE.format(chapter=one.folder).encode()
    _replace_release(folder, files)
    return notebooks


def _check_release_folder(folder: Path) -> None:
    """``ValueError`` if writing a release there would lose anything."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for the release.")
    if folder.resolve() == ROOT or ROOT.is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} holds the course itself; give a folder of its own for the release.")
    before = _released_before(folder)
    others = []
    for path in sorted(_files_below(folder)):
        name = path.relative_to(folder).as_posix()
        if name != RELEASE_LIST and hashlib.sha256(path.read_bytes()).hexdigest() not in before.get(name, "").split():
            others.append(name)
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(f"{folder} holds files that are not from an earlier release, or were changed since: "
                         f"{shown}. Nothing was written. Give an empty folder, or move them away.")


def _files_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.rglob("*") if (path.is_file() or path.is_symlink())
            and path.relative_to(folder).parts[0] != ".git"]


def _released_before(folder: Path) -> dict[str, str]:
    """The hash of each released file; of one whose release was interrupted, all that it may have."""
    try:
        listed = json.loads((folder / RELEASE_LIST).read_text(encoding="utf-8"))
        return {name: str(hashes) for name, hashes in listed.items()} if isinstance(listed, dict) else {}
    except (OSError, ValueError):
        return {}


def _replace_release(folder: Path, files: dict[str, bytes]) -> None:
    before = _released_before(folder)
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    either = before | {name: f"{before.get(name, '')} {new}".strip() for name, new in listed.items()}
    write_text(folder / RELEASE_LIST, json.dumps(either, indent=1) + "\n")  # counts if this is interrupted
    for path in _files_below(folder):  # the list alone says nothing: it could name files elsewhere
        name = path.relative_to(folder).as_posix()
        if name in before and name not in files:
            path.unlink()
    for name, content in files.items():
        path = folder / name
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
        if name.endswith("course.py"):
            path.chmod(0o755)
    write_text(folder / RELEASE_LIST, json.dumps(listed, indent=1) + "\n")


def _course_files() -> dict[str, bytes]:
    """The course's tracked files without assignments, and without the tests that show solutions."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError("The whole course can be released only from a clone of its repository: git cannot list "
                         f"its files in {ROOT}.") from error
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    return {name: (ROOT / name).read_bytes() for name in names
            if not name.endswith("assignment.ipynb") and not name.startswith(NOT_FOR_STUDENTS)}


def instructions(assignment: Assignment) -> str:
    """INSTRUCTIONS.md of one assignment: its exercises with their points, how to hand in, a checklist."""
    rows = [f"| {one.title.removeprefix('Exercise ')} | {one.minutes} | {one.points:g} |"
            for one in assignment.exercises]
    minutes = f"about {assignment.minutes} minutes" if assignment.minutes else "time not stated"
    by_hand = [one.title for one in assignment.exercises if one.questions]
    boxes = [f"- [ ] {one.title}" for one in assignment.exercises]
    read = f"\nGraded by hand: {', '.join(by_hand)}.\n" if by_hand else ""
    return "\n".join([
        f"# {assignment.title}", "", f"{sum(one.points for one in assignment.exercises):g} points, {minutes}.", "",
        "| exercise | minutes | points |", "| --- | --- | --- |", *rows, read, "## How to work", "",
        "1. Put this folder into the course's folder if it is not there already (on Colab, the notebook alone is "
        "enough), and open `assignment.ipynb`. Write where `# YOUR CODE HERE` stands.",
        "2. Run the checks below each exercise. Grading runs the same checks and further ones, which test the "
        "same specification on other inputs.",
        "3. Leave the cells with checks as they are: grading takes the originals. Cells of your own are welcome.",
        "",
        "## Before you hand in", "", *boxes,
        "- [ ] Restart the kernel and run all cells: every visible check passes.",
        "- [ ] Save the notebook and hand in this one file, `assignment.ipynb`.", ""])


def _readme(assignments: list[Assignment]) -> str:
    rows = [f"- `{one.chapter}/`: {one.title}" + (f" (about {one.minutes} minutes)" if one.minutes else "")
            for one in sorted(assignments, key=lambda one: one.chapter)]
    how = ("Each folder holds a notebook to work in, its INSTRUCTIONS.md, and a `previous_chapters.py` that finds "
           "the course. The notebooks run wherever these folders lie inside the course's folder, and on Colab.")
    return "\n".join(["# Assignments", "", *rows, "", how, ""])
