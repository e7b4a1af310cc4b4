"""An assignment as a teacher writes it: its exercises and points, what is wrong with it, and the students' copy.

The notebook is an nbgrader source (solution regions, visible and hidden tests, points in the cells' metadata),
and the copies are made by nbgrader's own steps, so both tools can be used on the same files.
"""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbgrader import preprocessors as steps

MARKS = re.compile(r"(BEGIN|END) (SOLUTION|HIDDEN TESTS|MARK SCHEME)")
REGION = re.compile(r"BEGIN (SOLUTION|HIDDEN TESTS|MARK SCHEME).*?END \1[^\n]*", re.S)
LAUNCH = re.compile(r"[ \t]*<!-- launch -->.*?<!-- /launch -->[ \t]*\n?", re.S)
EXERCISE = re.compile(r"^##\s+(Exercise\s+\d+\s*:?[^\n]*)", re.M)
GRADE_ID = re.compile(r"[a-z0-9_]+")
TOTAL = 100
STEPS = (steps.LockCells, steps.ClearSolutions, steps.ClearOutput, steps.CheckCellMetadata, steps.ComputeChecksums,
         steps.ClearHiddenTests, steps.ClearMarkScheme, steps.ComputeChecksums, steps.CheckCellMetadata)


@dataclass
class Assignment:
    """One source notebook. ``chapter`` is "ch03", ``folder`` the name of the chapter's folder."""

    path: Path
    notebook: nbformat.NotebookNode
    chapter: str
    folder: str
    title: str
    minutes: int | None
    forbidden: list[str]
    exercises: list[GradedExercise] = field(default_factory=list)

    @property
    def cells(self) -> list:
        return self.notebook.cells

    def digest(self) -> str:
        """Changes when a cell that is run or graded changes; not with outputs or with the prose."""
        counted = [(cell.cell_type, cell.source, sorted(grading(cell).items(), key=str)) for cell in self.cells
                   if cell.cell_type == "code" or grading(cell)]
        return hashlib.sha256(repr((counted, self.forbidden)).encode()).hexdigest()


@dataclass
class GradedExercise:
    """A section of an assignment: its heading, and the graded cells in it with their points."""

    title: str
    minutes: str = ""
    tests: dict[str, float] = field(default_factory=dict)
    questions: dict[str, float] = field(default_factory=dict)
    solutions: list[str] = field(default_factory=list)

    @property
    def points(self) -> float:
        return sum(self.tests.values()) + sum(self.questions.values())


def grading(cell) -> dict:
    """nbgrader's part of a cell's metadata, or {}."""
    found = cell.get("metadata", {}).get("nbgrader", {})
    return found if isinstance(found, dict) else {}


def grade_id(cell) -> str:
    return str(grading(cell).get("grade_id", ""))


def kind(cell) -> str:
    """ "test", "question" (graded by hand), "solution", "given" (locked code), "text" or "code" (neither)."""
    marks = grading(cell)
    if marks.get("grade") and marks.get("solution"):
        return "question"
    if marks.get("grade"):
        return "test"
    if marks.get("solution"):
        return "solution"
    if cell.cell_type != "code":
        return "text"
    return "given" if marks.get("locked") else "code"


def read_assignment(path: Path) -> Assignment:
    """A source notebook. ``ValueError`` names the file and all that is wrong with it."""
    path = Path(path)
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ValueError(f"{path}: this is no notebook ({str(error)[:200]}).") from error
    course = notebook.metadata.get("course", {})
    title = next((line[2:].strip() for cell in notebook.cells if cell.cell_type == "markdown"
                  for line in cell.source.splitlines() if line.startswith("# ")), path.parent.name)
    assignment = Assignment(path, notebook, str(course.get("assignment", "")), path.resolve().parent.name, title,
                            course.get("minutes"), [str(name) for name in course.get("forbidden", [])])
    assignment.exercises = _exercises(notebook.cells)
    found = problems(assignment)
    if found:
        raise ValueError(f"{path} cannot be used as an assignment:\n  " + "\n  ".join(found))
    return assignment


def _exercises(cells: list) -> list[GradedExercise]:
    """The sections that begin with ``## Exercise``, with what is graded in them."""
    found: list[GradedExercise] = []
    for cell in cells:
        heading = EXERCISE.search(cell.source) if cell.cell_type == "markdown" and kind(cell) == "text" else None
        if heading:
            minutes = re.search(r"(\d+) minutes", heading[1])
            title = re.sub(r"\s*\([^)]*\)\s*$", "", heading[1]).strip()
            found.append(GradedExercise(title, minutes[1] if minutes else ""))
        if kind(cell) in ("test", "question", "solution") and not found:
            found.append(GradedExercise("Exercise 1"))
        points = grading(cell).get("points", 0)
        if kind(cell) == "test":
            found[-1].tests[grade_id(cell)] = _number(points)
        elif kind(cell) == "question":
            found[-1].questions[grade_id(cell)] = _number(points)
        elif kind(cell) == "solution":
            found[-1].solutions.append(grade_id(cell))
    return [exercise for exercise in found if exercise.points or exercise.solutions]


def _number(points: object) -> float:
    return float(points) if isinstance(points, int | float) else 0.0


def problems(assignment: Assignment) -> list[str]:
    """What keeps a notebook from being used as an assignment, each in one line. [] if nothing does."""
    found = []
    if not re.fullmatch(r"ch\d\d", assignment.chapter):
        found.append('its metadata lack the chapter, as in "course": {"assignment": "ch03"}; '
                     f"found {assignment.chapter!r}.")
    for number, cell in enumerate(assignment.cells):
        if kind(cell) in ("test", "question", "solution", "given"):
            where = f"cell {number} ({grade_id(cell) or 'without grade_id'})"
            found += [f"{where}: {line}" for line in _cell_problems(cell)]
    counts = Counter(grade_id(cell) for cell in assignment.cells if grade_id(cell))
    found += [f"the grade_id {name!r} stands at {count} cells; each cell needs its own."
              for name, count in counts.items() if count > 1]
    graded = [cell for cell in assignment.cells if kind(cell) in ("test", "question")]
    total = sum(_number(grading(cell).get("points")) for cell in graded)
    if total != TOTAL:
        found.append(f"its points sum to {total:g}, not to {TOTAL}.")
    return found


def _cell_problems(cell) -> list[str]:
    found, marks, source = [], grading(cell), cell.source
    if not GRADE_ID.fullmatch(grade_id(cell)):
        found.append("its grade_id must be of the letters a-z, digits and _.")
    if kind(cell) in ("test", "question") and not 0 < _number(marks.get("points")) <= TOTAL:
        found.append(f"it is graded, but its points are {marks.get('points')!r}; give it more than 0.")
    if kind(cell) == "test" and cell.cell_type != "code":
        found.append("a test must be a code cell.")
    for name in ("SOLUTION", "HIDDEN TESTS", "MARK SCHEME"):
        if source.count(f"BEGIN {name}") != source.count(f"END {name}"):
            found.append(f"BEGIN {name} and END {name} do not come in pairs.")
    if kind(cell) in ("solution", "question") and "BEGIN SOLUTION" not in source:
        found.append("its solution does not stand between ### BEGIN SOLUTION and ### END SOLUTION.")
    if kind(cell) in ("given", "test") and "BEGIN SOLUTION" in source:
        found.append("a solution stands in a cell that students get as it is.")
    if cell.cell_type == "code" and not _parses(source):
        found.append("its code does not parse as Python (no magics or shell lines in an assignment).")
    return found


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
        return True
    except (SyntaxError, ValueError):
        return False


def student_copy(assignment: Assignment) -> nbformat.NotebookNode:
    """What students get: no solutions, hidden tests, outputs, badges. ``ValueError`` if any is left."""
    notebook = copy.deepcopy(assignment.notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LAUNCH.sub("", cell.source)
    resources = {"nbgrader": {"assignment": assignment.chapter, "notebook": assignment.path.stem}}
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    for step in STEPS:
        notebook, resources = step().preprocess(notebook, resources)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    left = leaks(assignment, notebook)
    if left:
        raise ValueError(f"{assignment.path}: the students' copy would still show\n  " + "\n  ".join(left))
    return notebook


def leaks(assignment: Assignment, released: nbformat.NotebookNode) -> list[str]:
    """Lines of solutions, hidden tests or outputs that a released notebook still shows. [] if it shows none.

    A line counts as shown if it stands in the copy more often than outside of the source's hidden regions.
    """
    found = [f"an output of cell {number}" for number, cell in enumerate(released.cells) if cell.get("outputs")]
    found += [f"the mark {mark[0]!r}" for cell in released.cells for mark in MARKS.finditer(cell.source)]
    solution_ids = {grade_id(cell) for cell in assignment.cells if kind(cell) in ("solution", "question")}
    stubs = Counter(dict.fromkeys(_lines("\n".join(_stub_texts())), 1000)) if solution_ids else Counter()
    public = Counter(line for cell in assignment.cells for line in _lines(REGION.sub("", cell.source))) + stubs
    shown = Counter(line for cell in released.cells for line in _lines(cell.source))
    found += [f"the line {line!r}" for line, count in shown.items() if count > public[line]]
    return found


def _stub_texts() -> list[str]:
    stub = steps.ClearSolutions()
    return [*stub.code_stub.values(), stub.text_stub]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() not in ("", "#", "###")]


def hidden_lines(assignment: Assignment) -> set[str]:
    """The lines of code of hidden tests: no message that quotes one of them is shown to a student."""
    lines = {line for cell in assignment.cells if kind(cell) == "test"
             for region in REGION.finditer(cell.source) for line in _lines(region[0])}
    return {line for line in lines if len(line) >= 12 and not MARKS.search(line)}


def imported_modules(source: str) -> set[str]:
    """The dotted names of the modules that a cell imports."""
    found = set()
    for node in _nodes(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def defined_names(source: str, *, variables: bool = False) -> set[str]:
    """The names that a cell's top level imports or defines, and with ``variables`` those it assigns, too."""
    found = set()
    for node in (ast.parse(source).body if _parses(source) else []):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif variables:
            found |= {part.id for part in ast.walk(node)
                      if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return found


def used_names(source: str) -> set[str]:
    """The names that a cell reads and does not set itself."""
    names = [node for node in _nodes(source) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | defined_names(source)
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - stored


def special_methods(assignment: Assignment) -> list[str]:
    """The special methods (``__eq__`` ...) that the assignment's own solutions and given code define."""
    nodes = [node for cell in assignment.cells if cell.cell_type == "code" for node in _nodes(cell.source)]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return sorted(name for name in names if name.startswith("__"))


def shadowed_builtins(assignment: Assignment) -> set[str]:
    """Names of builtins that the assignment itself defines or sets."""
    return {name for cell in assignment.cells if cell.cell_type == "code"
            for name in defined_names(cell.source, variables=True) if hasattr(builtins, name)}


def _nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source))) if _parses(source) else []
