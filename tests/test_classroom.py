"""Handing out and grading: real kernels in the real sandbox, hostile submissions, nbgrader as reference."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import xml.dom.minidom
from pathlib import Path

import nbformat
import psutil
import pytest

from tests import hostile
from tests.small_assignment import (
    HIDDEN_SECRET,
    cell_of,
    check,
    filled_in,
    source_notebook,
    write_source,
)
from utils import classroom
from utils.classroom import assignments as plans
from utils.classroom import gradebook, grading, handout, running, submissions
from utils.classroom.guard import check_code, read_report
from utils.classroom.kernel import SandboxedKernel
from utils.classroom.remarks import risky_code
from utils.classroom.sandbox import Limits, sandbox_problem

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"seconds": 8, "memory_gb": 1.0}
needs_sandbox = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bubblewrap is for Linux")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def released(source) -> nbformat.NotebookNode:
    return plans.student_copy(plans.read_assignment(source))


def rows(out: Path, name: str = "grades.csv") -> dict[str, dict[str, str]]:
    with open(out / name, encoding="utf-8", newline="") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def page(out: Path, student: str) -> str:
    return (out / "feedback" / f"{gradebook.file_name(student)}.html").read_text(encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------- handing out

def test_a_release_shows_no_solution_no_hidden_test_no_output_and_no_badge(tmp_path, source):
    notebook = classroom.release([source], tmp_path / "class")[0]
    assert notebook == tmp_path / "class" / "ch03" / "assignment.ipynb"
    text = notebook.read_text(encoding="utf-8")
    for secret in ("2 * each", "np.sum(", HIDDEN_SECRET, "addition commutes", "BEGIN ", "HIDDEN TESTS", "badge",
                   "<!-- launch"):
        assert secret.lower() not in text.lower(), f"the students' copy shows {secret!r}"
    assert "def double(values):" in text and "Twice every number" in text and "double([1, 2]) == [2, 4]" in text
    plain = nbformat.read(notebook, as_version=4)
    nbformat.validate(plain)
    assert "launch" in [cell.id for cell in plain.cells], "the cell that starts Colab stays"
    assert cell_of(plain, "double").metadata.nbgrader.checksum
    guide = (notebook.parent / "INSTRUCTIONS.md").read_text(encoding="utf-8")
    assert "| 1: Twice | 5 | 30 |" in guide and "about 20 minutes" in guide and "100 points" in guide
    assert guide.count("- [ ]") == 4 + 2


def test_a_solution_line_that_is_left_over_stops_the_release(source):
    plan = plans.read_assignment(source)
    copy = plans.student_copy(plan)
    assert plans.leaks(plan, copy) == []
    for leak in ("    return [2 * each for each in values]", HIDDEN_SECRET, "### END HIDDEN TESTS"):
        cell_of(copy, "imports").source += "\n" + leak
        assert plans.leaks(plan, copy), f"{leak!r} was not noticed"
        cell_of(copy, "imports").source = cell_of(source_notebook(), "imports").source
    cell_of(copy, "imports").outputs = [nbformat.v4.new_output("stream", text="6")]
    assert "output" in plans.leaks(plan, copy)[0]


def broken(change) -> nbformat.NotebookNode:
    notebook = source_notebook()
    change(notebook)
    return notebook


@pytest.mark.parametrize("change, said", [
    (lambda one: cell_of(one, "answer").metadata.nbgrader.update(points=19), "sum to 99, not to 100"),
    (lambda one: cell_of(one, "answer").metadata.nbgrader.pop("points"), "its points are None"),
    (lambda one: cell_of(one, "answer").metadata.nbgrader.update(points=0), "its points are 0"),
    (lambda one: cell_of(one, "answer").metadata.nbgrader.update(grade_id="double"), "'double' stands at 2 cells"),
    (lambda one: cell_of(one, "answer").metadata.nbgrader.update(grade_id=""), "grade_id must be"),
    (lambda one: one.metadata.pop("course"), "lack the chapter"),
    (lambda one: cell_of(one, "total").update(source="def total(values):\n    return 1"), "BEGIN SOLUTION"),
    (lambda one: cell_of(one, "total").update(source="### BEGIN SOLUTION\n1"), "pairs"),
    (lambda one: cell_of(one, "imports").update(source="### BEGIN SOLUTION\n1\n### END SOLUTION"),
     "students get as it is"),
    (lambda one: cell_of(one, "imports").update(source="%pip install x"), "does not parse"),
])
def test_a_faulty_assignment_is_refused_by_name_before_anything_is_written(tmp_path, change, said):
    path = write_source(tmp_path / "course", broken(change))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        classroom.release([path], tmp_path / "class")
    assert str(path) in str(caught.value) and not (tmp_path / "class").exists()


def test_a_release_replaces_an_earlier_one_and_nothing_else(tmp_path, source):
    folder = tmp_path / "class"
    classroom.release([source], folder)
    before = contents(folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("a class's repository")
    classroom.release([source], folder)
    assert {name: text for name, text in contents(folder).items() if not name.startswith(".git/")} == before
    (folder / "ch03" / "grades.txt").write_text("mine")
    with pytest.raises(ValueError, match="ch03/grades.txt"):
        classroom.release([source], folder)
    (folder / "ch03" / "grades.txt").unlink()
    (folder / "ch03" / "assignment.ipynb").write_text("my own work")
    with pytest.raises(ValueError, match="ch03/assignment.ipynb"):
        classroom.release([source], folder)
    with pytest.raises(ValueError, match="holds the course itself"):
        classroom.release([source], ROOT)


def test_a_release_deletes_nothing_outside_its_folder(tmp_path, source):
    for victim in (tmp_path / "thesis.txt", tmp_path / "class" / ".git" / "config"):
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_text("my own work")
    listed = json.dumps({"../thesis.txt": "0", ".git/config": "0", str(tmp_path / "thesis.txt"): "0"})
    (tmp_path / "class" / ".release.json").write_text(listed)
    classroom.release([source], tmp_path / "class")
    assert (tmp_path / "thesis.txt").exists() and (tmp_path / "class" / ".git" / "config").exists()


@pytest.mark.parametrize("written", range(4))
def test_an_interrupted_release_is_taken_up_by_the_next(tmp_path, source, monkeypatch, written):
    folder, real, calls = tmp_path / "class", handout.atomic_write, []
    classroom.release([source], folder)
    before = contents(folder)
    (changed := source_notebook()).metadata.course.minutes = 25
    cell_of(changed, "imports").source += "  # twice"

    def interrupted(path):
        calls.append(path)
        if len(calls) > written:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(handout, "atomic_write", interrupted)
        classroom.release([write_source(tmp_path / "course", changed)], folder)
    classroom.release([source], folder)
    assert contents(folder) == before


def test_the_whole_course_is_released_without_what_shows_solutions(tmp_path, source):
    if not (ROOT / ".git").exists():
        with pytest.raises(ValueError, match="clone"):
            classroom.release([source], tmp_path / "class", whole_course=True)
        return
    notebook = classroom.release([source], tmp_path / "class", whole_course=True)[0]
    names = contents(tmp_path / "class")
    assert notebook == tmp_path / "class" / "ch03_attention" / "assignment.ipynb"
    assert {"README.md", "course.py", "ch03_attention/attention.ipynb", "utils/plots.py"} <= set(names)
    assert [name for name in names if name.endswith("assignment.ipynb")] == ["ch03_attention/assignment.ipynb"]
    assert not [name for name in names if name.startswith(("tests/attempts", "workspace", ".git/"))]
    assert HIDDEN_SECRET.encode() not in names["ch03_attention/assignment.ipynb"]


@needs_sandbox
def test_a_reader_works_in_a_release_inside_the_course_and_grades_it(scratch, source):
    """The released copy finds the course from where it lies; outside the course it says what to do."""
    homework = scratch / "homework"
    (notebook,) = classroom.release([source], homework)
    start = [sys.executable, "-c", "import previous_chapters, utils; print(utils.__file__)"]
    inside = subprocess.run(start, cwd=notebook.parent, capture_output=True, text=True)
    assert inside.stdout.strip() == str(scratch / "utils" / "__init__.py"), inside.stderr
    shutil.copytree(homework, scratch.parent / "elsewhere")
    outside = subprocess.run(start, cwd=scratch.parent / "elsewhere" / "ch03", capture_output=True, text=True)
    assert "lies outside the course" in outside.stderr and "Move this folder" in outside.stderr
    nbformat.write(filled_in(nbformat.read(notebook, as_version=4)), notebook)
    table = classroom.grade(homework, [source], scratch / "grades", **LIMITS)
    (row,) = rows(table.parent).values()
    assert row["student"] == "homework" and float(row["automatic"]) == 90.0


# ------------------------------------------------------------------------------------- what is handed in

def test_the_layouts_of_platforms_are_understood(tmp_path, source, released):
    plan, text = plans.read_assignment(source), nbformat.writes(released)
    for name in ("alice.ipynb", "bob/assignment.ipynb", "carol/ch03/assignment.ipynb",
                 "Dora Díaz_4711_assignsubmission_file/my work.ipynb",
                 "Eve O'Neil_12_assignsubmission_file_/x.ipynb", "foxfred_99_1234_assignment.ipynb",
                 "foxfred_99_1300_assignment-1.ipynb", "ginagee_LATE_7_8_a_b.ipynb", ".hidden.ipynb",
                 "__MACOSX/x.ipynb", "henry/.ipynb_checkpoints/old.ipynb", "henry/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = {one.student: one for one in submissions.find_submissions(tmp_path, [plan])}
    assert {name: (one.number, one.chapter, bool(one.problem)) for name, one in found.items()} == {
        "alice": ("", "ch03", False), "bob": ("", "ch03", False), "carol": ("", "ch03", False),
        "Dora Díaz": ("4711", "ch03", False), "Eve O'Neil": ("12", "ch03", False),
        "foxfred": ("99", "ch03", False), "ginagee": ("7", "ch03", False), "henry": ("", "ch03", True)}
    assert found["foxfred"].path.name == "foxfred_99_1300_assignment-1.ipynb"
    assert "several files" in found["foxfred"].remarks[0] and "notes.txt" in found["henry"].problem


def test_a_notebook_tells_its_chapter_by_its_cells_not_by_what_it_claims(tmp_path, source, released):
    other = source_notebook()
    other.metadata.course.assignment = "ch04"
    for cell in other.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader.grade_id = "x_" + cell.metadata.nbgrader.grade_id
    plan = [plans.read_assignment(source), plans.read_assignment(write_source(tmp_path / "course", other))]
    released = nbformat.from_dict(released)
    (tmp_path / "in").mkdir()
    nbformat.write(released, tmp_path / "in" / "alice.ipynb")
    claims = nbformat.from_dict({**released, "metadata": {**released.metadata, "course": {"assignment": "ch04"}}})
    nbformat.write(claims, tmp_path / "in" / "bob.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "in" / "carol.ipynb")
    found = {one.student: one for one in submissions.find_submissions(tmp_path / "in", plan)}
    assert found["alice"].chapter == found["bob"].chapter == "ch03"
    assert "none of the assignments" in found["carol"].problem


def test_cells_that_lost_their_metadata_are_found_again(source, released):
    plan, work = plans.read_assignment(source), filled_in(released)
    for number, cell in enumerate(work.cells):
        cell.metadata, cell.id = {}, f"n{number}"
    cells = tuple(submissions._cell(cell) for cell in work.cells)
    steps, answers, remarks = submissions.assemble(plan, submissions.Submission("a", None, cells=cells), {})
    assert set(answers) == {"double", "total", "answer_cell"} and "lost" in " ".join(remarks)
    assert [step.source for step in steps if step.kind == "test"] == [
        cell.source for cell in plan.cells if plans.kind(cell) == "test"]


def test_checks_come_from_the_source_and_own_cells_stay_where_they_were(source, released):
    plan, work = plans.read_assignment(source), filled_in(released)
    cell_of(work, "double_hidden").source = "pass"
    cell_of(work, "imports").source = "np = None"
    at = work.cells.index(cell_of(work, "total"))
    work.cells.insert(at, nbformat.v4.new_code_cell("mine = 1"))
    work.cells.append(check("double_visible"))
    work.cells.append(cell_of(filled_in(released, total="def total(values):\n    return 0"), "total"))
    cells = tuple(submissions._cell(cell) for cell in work.cells)
    steps, answers, remarks = submissions.assemble(plan, submissions.Submission("a", None, cells=cells), {})
    order = [step.grade_id or step.source for step in steps]
    assert order == ["imports", "double", "double_visible", "double_hidden", "mine = 1", "total", "total_close",
                     "total_empty", "answer_cell", "answer"]
    assert HIDDEN_SECRET in steps[3].source and "import numpy as np" in steps[0].source
    assert "np.sum" in answers["total"]
    assert "double_hidden" in remarks[-1] and "imports" in remarks[-1] and "more than once" in remarks[0]


# ------------------------------------------------------------------------------------------------ remarks

def remarks_on(*sources: str) -> list[str]:
    return risky_code([submissions.Step("own", source) for source in sources], ["numpy.cumsum"])


@pytest.mark.parametrize("code, remark", [
    ("import linecache", "reads the text of cells"),
    ("from sys import modules as known", "uses sys.modules"),
    ("import sys as s\ns.modules", "uses sys.modules"),
    ("import os\nos.sys.modules", "uses sys.modules"),
    ("from os import sys as s\ns.modules", "uses sys.modules"),
    ("import sys\nvars(sys)['modules']", "hands sys on"),
    ("import sys as s\nother = s", "hands sys on"),
    ("import sys\ngetattr(sys, '_get' + 'frame')", "hands sys on"),
    ("import sys\nsys.__dict__['modules']", "uses sys.__dict__"),
    ("getattr(thing, '_getframe')", "uses sys._getframe"),
    ("import inspect\ninspect.stack()[1].code_context", "walks frames"),
    ("from inspect import stack", "walks frames"),
    ("import traceback\ntraceback.extract_stack()[-2].line", "walks frames"),
    ("import pkgutil\npkgutil.resolve_name('sys:modules')", "imports by name"),
    ("import numpy as n\nsetattr(n, 'allclose', None)", "calls setattr"),
])
def test_ways_to_the_checks_get_a_remark(code, remark):
    assert remark in remarks_on(code)


@pytest.mark.parametrize("first", [
    "files = !ls\n", "x, y = %sx ls\n", "numpy?\n", "?numpy.sum\n", "for each in range(2):\n    %time each\n",
    "if 1:\n    !ls\n", "%%capture\n", "%%time\n", "%matplotlib inline\n", "%timeit -n 10 -r2 ", "t = %timeit -o ",
    "%%timeit ", "%time "])
def test_a_line_for_ipython_hides_nothing_of_a_cell(first):
    assert remarks_on(first + "numpy.cumsum([gc])") == ["uses gc", "uses numpy.cumsum, which the assignment forbids"]


def test_a_cell_that_is_no_python_is_named():
    assert remarks_on("%%bash\nls -l here\n", "answer = 1") == ["has a cell that is no plain Python: not examined"]


@pytest.mark.parametrize("code", [
    "import torch\ntorch.stack([1])\nfor each in model.modules():\n    getattr(each, 'weight')",
    "getattr(self, f'layer_{number}')\ngetattr(torch, name)\nvars(config) | self.__dict__\nfrom torch import stack",
    "import sys\nsys.path.append('x')\nprint(sys.version, file=sys.stderr)",
    "import inspect, traceback\ninspect.signature(double)\ntraceback.print_exc()",
    "setattr(parent, name, merged)",
    "%matplotlib inline\n%timeit double([1])\nif 1:\n    !ls\nx = (7\n     % 2)\n",
    'x = """\n!important\nwhy?\n""" + str(7\n% 2)',
])
def test_ordinary_code_gets_no_remark(code):
    assert remarks_on(code) == []


def test_an_answer_in_prose_is_not_read_as_code(tmp_path, source, released):
    plan, work = plans.read_assignment(source), filled_in(released, why="It is so, because gc is.")
    cells = tuple(submissions._cell(cell) for cell in work.cells)
    steps, answers, _ = submissions.assemble(plan, submissions.Submission("a", None, cells=cells), {})
    assert "why" in answers and risky_code(steps, plan.forbidden) == []


# ------------------------------------------------------------------------------------ hostile submissions

def spy(places: list[str], attempt: str) -> hostile.Attack:
    return hostile.Attack({"double": hostile.SPY.format(places=places, attempt=attempt)}, 60, says="reached []")


def spies(source: Path, folder: Path, out: Path, port: int) -> dict[str, hostile.Attack]:
    """Attacks that need to know this machine."""
    files = [source, folder / "right.ipynb", out / "results", out / "grades.csv", ROOT / "README.md",
             ROOT / "ch03_attention" / "attention.ipynb", ROOT / "tests" / "hostile.py", ROOT / "course.py",
             "/course/ch03_attention/assignment.ipynb", "/course/ch03_attention/attention.ipynb", "/course/tests",
             "/course/.git", "/etc/shadow", "/etc/passwd", Path.home() / ".bashrc", "/var/log",
             "/proc/1/root/etc/shadow", f"/proc/{os.getpid()}/environ"]
    places = ["", "/usr", "/etc", "/course", "/course/utils", sys.prefix, ROOT, folder, out, "/dev", "/root",
              "/home", "/workspace/data/packages", "/var/tmp"]
    look = "import os; os.listdir(place) if os.path.isdir(place) else open(place)"
    return {
        "reads-files": spy([str(one) for one in files], look),
        "reads-secrets": spy(["COURSE_SECRET", "PYTEST_CURRENT_TEST"], "import os; os.environ[place]"),
        "reaches-out": spy([f"127.0.0.1 {port}", "10.0.0.1 80", "1.1.1.1 53", "example.org 443"],
                           "import socket; h, p = place.split(); socket.create_connection((h, int(p)), 1)"),
        "writes-outside": spy([f"{one}/written" for one in places if one != ROOT or ROOT.parts[1] != "tmp"],
                              "open(place, 'w').write('x')"),  # a folder below /tmp is inside the sandbox's own /tmp
        "changes-the-course": spy(["/course/ch03_attention/attention.py", "/course/utils/plots.py",
                                   sys.executable], "open(place, 'a').write('x')"),
    }


def strange_files(folder: Path, released: nbformat.NotebookNode) -> dict[str, tuple[float, str]]:
    """Files that are no ordinary notebooks: {student: (points, part of the remarks)}."""
    right = nbformat.writes(filled_in(released))
    outside = folder.parent / "outside.ipynb"
    outside.write_text(right, encoding="utf-8")
    long, formula, script, lines = "n" * 240, "=1+1", "<b>x<b>", "two\nlines"
    odd = '{"cells": [1, {"source": 3}, {"metadata": [], "cell_type": "code", "source": ["x", 2]}]}'
    texts = {"text": "hello", "empty": "", "cut-off": right[:2000], "list": "[1, 2]", "odd-cells": odd,
             "no-cells": '{"metadata": {}}', "deep": "[" * 100_000, long: "", formula: right, script: "",
             lines: ""}
    for name, text in texts.items():
        (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (folder / "report.pdf").write_bytes(b"%PDF")
    with open(folder / "huge.ipynb", "wb") as file:
        file.truncate(11_000_000)
    (folder / "link.ipynb").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent, target_is_directory=True)
    (folder / "nothing").mkdir()
    nbformat.write(nbformat.convert(filled_in(released), 3), folder / "old.ipynb", version=3)
    return {"text": (0, "not valid JSON"), "empty": (0, "empty"), "cut-off": (0, "not valid JSON"),
            "list": (0, "no cells"), "no-cells": (0, "no cells"), "odd-cells": (0, "not in the notebook"),
            "deep": (0, "not valid JSON"),
            "report": (0, "no notebook"), "huge": (0, "11 MB"), "link": (0, "link"), "linked": (0, "link"),
            "nothing": (0, "No notebook"), "old": (90, ""), long: (0, "empty"), "'=1+1": (90, ""),
            script: (0, "empty"), "two lines": (0, "empty")}


def hand_in(folder: Path, released: nbformat.NotebookNode, attacks: dict[str, hostile.Attack]) -> None:
    for name, attack in attacks.items():
        work = filled_in(released, **attack.cells)
        at = work.cells.index(cell_of(work, "imports")) + 1
        work.cells[at:at] = [nbformat.v4.new_code_cell("", id=f"own{number}") for number in range(len(attack.own))]
        for number, text in enumerate(attack.own):
            work.cells[at + number].source = text
        (folder / f"{name}.ipynb").write_text(json.dumps(work), encoding="utf-8")


class Peak(threading.Thread):
    """The most memory that this process held while something ran, bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            self.most = max(self.most, psutil.Process().memory_info().rss)


@pytest.fixture(scope="module")
def graded(tmp_path_factory, source, released):
    """All hostile submissions, graded at once: (folder, out, attacks, files as expected, bytes of memory)."""
    if not sys.platform.startswith("linux"):
        pytest.skip("bubblewrap is for Linux")
    base = tmp_path_factory.mktemp("hostile")
    folder, out = base / "in", base / "out"
    folder.mkdir()
    (out / "results").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_SECRET", "secret")
        attacks = hostile.ATTACKS | spies(source, folder, out, server.getsockname()[1])
        hand_in(folder, released, attacks)
        files, peak, before = strange_files(folder, released), Peak(), psutil.Process().memory_info().rss
        peak.start()
        classroom.grade(folder, [source], out, jobs=2, **LIMITS)
        peak.ended.set()
    return folder, out, attacks, files, peak.most - before


@needs_sandbox
@pytest.mark.parametrize("name", [*hostile.ATTACKS, "reads-files", "reads-secrets", "reaches-out",
                                  "writes-outside", "changes-the-course"])
def test_a_hostile_notebook_gets_the_points_it_earned_and_a_remark(graded, name):
    _, out, attacks, _, _ = graded
    row, attack = rows(out)[name], attacks[name]
    assert (float(row["automatic"]), row["out of"]) == (attack.points, "100"), row["remarks"]
    assert attack.remark in row["remarks"] and attack.says in page(out, name)
    assert not (ROOT / "written").exists() and not (out / "written").exists()


@needs_sandbox
def test_a_cell_that_gets_no_more_memory_before_the_watcher_looks_is_named(tmp_path, source, released, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    hoard = "    kept = []\n    while True:\n        kept.append(bytearray(b'x') * 50_000_000)"
    attacks = {name: hostile.ATTACKS[name] for name in ("allocates", "prints")}
    attacks["in-a-check"] = hostile.Attack({"double": f"def double(values):\n{hoard}"}, 60)
    hand_in(folder, released, attacks)
    monkeypatch.setattr(SandboxedKernel, "_watch", lambda self: None)
    classroom.grade(folder, [source], tmp_path / "out", jobs=2, **LIMITS)
    for name, row in rows(tmp_path / "out").items():
        assert float(row["automatic"]) == attacks[name].points, name
        # a kernel that prints without end was once dead at once, with no MemoryError; by what is not known (ZeroMQ
        # holds what is printed, and ends its process when it gets no memory)
        named = "more memory than " + "a notebook may hold (1 GB)" * (name != "prints")
        assert named in row["remarks"] or "time limit" in row["remarks"], name


@needs_sandbox
def test_what_is_no_notebook_gets_nothing_and_names_do_no_harm(graded):
    _, out, _, files, _ = graded
    table = rows(out)
    for name, (points, remark) in files.items():
        found = table.get(name) or next(row for key, row in table.items() if key.startswith(name[:150]))
        assert float(found["automatic"]) == points and remark in found["remarks"], (name, found)
    assert not [cell for row in table.values() for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]
    assert not (out.parent / "written").exists() and not list(out.parent.glob("*.html"))


@needs_sandbox
def test_everybody_is_graded_and_nothing_is_left_running(graded):
    _, out, attacks, files, memory = graded
    assert len(rows(out)) == len(attacks) + len(files)
    assert not [one for one in psutil.Process().children(recursive=True) if "bwrap" in " ".join(one.cmdline())]
    assert memory < 300e6, f"grading took {memory / 1e6:.0f} MB: is what students print kept?"


@needs_sandbox
def test_feedback_is_whole_in_itself_accessible_and_quotes_no_hidden_test(graded, source):
    _, out, _, _, _ = graded
    secrets = plans.hidden_lines(plans.read_assignment(source))
    assert HIDDEN_SECRET in secrets
    for path in (out / "feedback").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not any(secret in text for secret in secrets), path.name
        assert "Content-Security-Policy" in text and "default-src 'none'" in text
        document = xml.dom.minidom.parseString(re.sub(r"<meta[^>]*>|<!doctype html>", "", text))
        assert not [tag for tag in ("script", "img", "a", "link", "iframe") if document.getElementsByTagName(tag)]
        assert document.documentElement.getAttribute("lang") == "en" and document.getElementsByTagName("title")
        assert all(cell.getAttribute("scope") for cell in document.getElementsByTagName("th"))
        levels = [int(level) for level in re.findall(r"<h([1-6])>", text)]
        steps = [after - before for before, after in zip(levels, levels[1:], strict=False)]
        assert levels[0] == 1 and max(steps) <= 1, path.name
    failed = page(out, "endless")
    assert "not passed" in failed and "time limit" in failed and "double is wrong for negative" not in failed
    assert "while True" in failed, "the student's own code is shown"


@needs_sandbox
def test_grading_again_runs_nothing_and_gives_the_same_bytes(graded, source, monkeypatch):
    folder, out, _, _, _ = graded
    before = contents(out)
    monkeypatch.setattr(grading, "SandboxedKernel", None)  # a kernel would be an error
    classroom.grade(folder, [source], out, **LIMITS)
    assert contents(out) == before
    classroom.feedback(out)
    assert contents(out) == before


# ---------------------------------------------------------------------------------------- a class's grades

@needs_sandbox
def test_interrupted_grading_goes_on_where_it_was_and_ends_the_same(tmp_path, source, released, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("ann", "ben"):
        nbformat.write(filled_in(released), folder / f"{name}.ipynb")
    real, calls = grading.grade_submission, []

    def interrupted(submission, *arguments):
        calls.append(submission.student)
        if submission.student == "ben":
            raise KeyboardInterrupt
        return real(submission, *arguments)

    monkeypatch.setattr(grading, "grade_submission", interrupted)
    with pytest.raises(KeyboardInterrupt):
        classroom.grade(folder, [source], tmp_path / "out", jobs=1, **LIMITS)
    monkeypatch.setattr(grading, "grade_submission",
                        lambda one, *rest: (calls.append(one.student), real(one, *rest))[1])
    classroom.grade(folder, [source], tmp_path / "out", jobs=1, **LIMITS)
    assert calls.count("ann") == 1 and calls.count("ben") == 2
    first = contents(tmp_path / "out")
    classroom.grade(folder, [source], tmp_path / "out", jobs=2, again=True, **LIMITS)
    assert contents(tmp_path / "out") == first and calls.count("ann") == 2


@needs_sandbox
def test_points_entered_by_hand_are_kept_and_counted_and_reach_the_platforms(tmp_path, source, released):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    nbformat.write(filled_in(released), folder / "adaada_11_5_assignment.ipynb")
    nothing = filled_in(released, why=cell_of(released, "why").source)
    nbformat.write(nothing, folder / "bobbob_12_6_assignment.ipynb")
    classroom.grade(folder, [source], out, columns="canvas", **LIMITS)
    assert rows(out)["adaada"]["status"] == "open question to be graded"
    assert rows(out)["bobbob"]["status"] == "complete" and rows(out)["bobbob"]["total"] == "90"
    manual = (out / "manual.csv").read_text(encoding="utf-8").splitlines()
    assert manual == ["student,chapter,question,points,out of,comment", "adaada,ch03,why,,10,",
                      f"bobbob,ch03,why,0,10,{gradebook.NOT_ANSWERED}"]
    manual[1] = 'adaada,ch03,why,7.5,10,"Good, but short"'
    (out / "manual.csv").write_text("\n".join(manual) + "\n", encoding="utf-8")
    before = (out / "manual.csv").read_bytes()
    classroom.grade(folder, [source], out, columns="canvas", **LIMITS)
    assert (out / "manual.csv").read_bytes() == before
    work = filled_in(released, double=hostile.WRONG_DOUBLE, why="Because.")
    nbformat.write(work, folder / "bobbob_12_6_assignment.ipynb")
    classroom.grade(folder, [source], out, columns="moodle", **LIMITS)
    assert (rows(out)["bobbob"]["total"], rows(out)["bobbob"]["status"]) == ("60", "open question to be graded")
    assert rows(out)["adaada"]["total"] == "97.5" and "Good, but short" in page(out, "adaada")
    canvas = list(csv.reader((out / "grades-canvas.csv").read_text(encoding="utf-8").splitlines()))
    assert canvas[0][:5] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"] and canvas[1][5] == "100"
    assert canvas[2] == ["adaada", "11", "", "", "", "97.5"]
    moodle = list(csv.DictReader((out / "grades-moodle.csv").read_text(encoding="utf-8").splitlines()))
    assert moodle[0]["Identifier"] == "Participant 11" and moodle[0]["Grade"] == "97.5"
    assert {"Identifier", "Grade", "Last modified (grade)"} <= set(moodle[0])
    (out / "manual.csv").write_text("\n".join(manual).replace("7.5", "11"), encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: '11' points for adaada"):
        classroom.grade(folder, [source], out, **LIMITS)


def graded_without_kernels(monkeypatch, *arguments, run=None, **options) -> Path:
    """``grade`` with every test passed, or ``run`` in place of the sandbox."""
    monkeypatch.setattr(grading, "check_solution", lambda *a: None)
    monkeypatch.setattr(running.GradedRun, "run", run or (lambda self: running.Result(
        {step.grade_id: "" for step in self.steps if step.kind == "test"})))
    return classroom.grade(*arguments, unsafe=True, **options).parent


def test_namesakes_keep_their_points_and_pages_however_late_they_hand_in(tmp_path, source, released, monkeypatch):
    out = tmp_path / "out"
    for number in ("111", "333"):
        (tmp_path / number).mkdir()
        work = filled_in(released, why=f"answer of {number}")
        nbformat.write(work, tmp_path / number / f"annlee_{number}_5_a.ipynb")
        (tmp_path / "both").mkdir(exist_ok=True)
        nbformat.write(work, tmp_path / "both" / f"annlee_{number}_5_a.ipynb")

    def canvas(folder: str) -> list[list[str]]:
        graded_without_kernels(monkeypatch, tmp_path / folder, [source], out, columns="canvas")
        return list(csv.reader((out / "grades-canvas.csv").read_text(encoding="utf-8").splitlines()))[2:]

    canvas("111")
    manual = out / "manual.csv"
    manual.write_text(manual.read_text(encoding="utf-8").replace("why,,", "why,8,"), encoding="utf-8")
    expected = [["annlee", "111", "", "", "", "98"], ["annlee (333)", "333", "", "", "", ""]]
    assert canvas("333") == expected and canvas("both") == expected
    assert canvas("111") == expected, "one of them alone keeps the name, too"
    assert "answer of 333" not in page(out, "annlee") and "answer of 111" not in page(out, "annlee (333)")
    fresh = tmp_path / "fresh"
    graded_without_kernels(monkeypatch, tmp_path / "both", [source], fresh)
    assert set(rows(fresh)) == {"annlee (111)", "annlee (333)"}


@pytest.mark.parametrize("earlier, found, names", [
    ([("A", "1", "ch03"), ("A", "2", "ch04")], [("1", "ch05"), ("2", "ch05")], ["A (1)", "A (2)"]),
    ([("A", "1", "ch03"), ("A (2)", "2", "ch03")], [("1", "ch04"), ("2", "ch04")], ["A", "A (2)"]),
    ([("A (1)", "1", "ch03"), ("A (2)", "2", "ch03")], [("1", "ch04")], ["A (1)"]),
    ([("A", "1", "ch03")], [("2", "ch03"), ("", "ch03")], ["A (2)", "A"]),
    ([("A", "1", "ch03")], [("2", "ch04")], ["A"]),  # as Moodle has it: a student with a new number
])
def test_a_name_stands_for_one_number_in_a_chapter(earlier, found, names):
    earlier = [{"student": name, "number": number, "chapter": chapter} for name, number, chapter in earlier]
    found = [submissions.Submission("A", None, number, chapter) for number, chapter in found]
    assert [one.student for one in grading._tell_apart(found, earlier)] == names


def test_what_the_grader_could_not_run_is_no_grade(tmp_path, source, released, monkeypatch, capsys):
    def fails(self):
        raise RuntimeError("A kernel did not answer")

    (tmp_path / "in").mkdir()
    nbformat.write(filled_in(released), tmp_path / "in" / "annann_11_5_a.ipynb")
    for columns, name, column in (("canvas", "grades-canvas.csv", 5), ("moodle", "grades-moodle.csv", 2)):
        out = graded_without_kernels(monkeypatch, tmp_path / "in", [source], tmp_path / "out", run=fails,
                                     columns=columns)
        assert (out / name).read_text(encoding="utf-8").splitlines()[-1].split(",")[column] == ""
    assert "annann,ch03,why,,10,\n" in (out / "manual.csv").read_text(encoding="utf-8")
    assert (rows(out)["annann"]["total"], rows(out)["annann"]["status"]) == ("", "not graded")
    assert "1 of 1 could not be run (annann)" in capsys.readouterr().err
    graded_without_kernels(monkeypatch, tmp_path / "in", [source], out)
    assert rows(out)["annann"]["automatic"] == "90"
    graded_without_kernels(monkeypatch, tmp_path / "in", [source], out, run=fails, again=True)
    assert rows(out)["annann"]["automatic"] == "90", "a result of the same notebook is kept"


def test_a_changed_module_of_the_course_has_everything_graded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "ROOT", tmp_path)
    (tmp_path / "ch03_attention").mkdir()
    module, digests = tmp_path / "ch03_attention" / "attention.py", set()
    for text in ("a = 1", "a = 2"):
        module.write_text(text)
        settings = grading._settings(1, 1, 1, True, "plain")
        digests.add(grading._digest(submissions.Submission("a", None), None, settings))
    assert len(digests) == 2


def one_result(student: str, number: str = "", answer: str = "because") -> dict:
    question = {"id": "why", "points": 10, "answer": answer}
    exercise = {"title": "4", "points": 10, "tests": [], "questions": [question], "code": []}
    return {"student": student, "number": number, "chapter": "ch03", "title": "", "exercises": [exercise],
            "remarks": []}


def test_a_teachers_own_not_answered_is_kept(tmp_path):
    gradebook.update_manual(tmp_path, [one_result("bob")])
    path = tmp_path / "manual.csv"
    path.write_text(path.read_text().replace("why,,10,", "why,0,10,not answered"))
    before = path.read_text()
    gradebook.update_manual(tmp_path, [one_result("bob")])
    assert path.read_text() == before and "bob,ch03,why,0,10,not answered\n" in before


def test_a_table_in_another_encoding_is_refused_by_name_with_the_way_out(tmp_path):
    text = ";".join(gradebook.MANUAL) + "\nbob;ch03;why;5;10;sch\u00f6n\n"
    (tmp_path / "manual.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(ValueError, match=r"manual\.csv is not UTF-8 \(byte 6\d\); save it as 'CSV UTF-8"):
        gradebook.read_manual(tmp_path)


def test_results_of_different_people_lie_in_different_files(tmp_path):
    people = [("anna", "12"), ("anna-12", ""), ("anna-12", "3"), ("anna-12-3", ""), ("anna", ""), ("12", "")]
    found = [submissions.Submission(name, None, number, "ch03") for name, number in people]
    assert len({grading._result_path(tmp_path, one) for one in found}) == len(found)
    for name in ("anna-12-ch03", "anna-12-0-ch03"):  # the first is as earlier versions named it
        (one := one_result("anna-12"))["remarks"] = [name]
        gradebook.save_result(tmp_path / "results" / f"{name}.json", one)
    assert [one["remarks"] for one in gradebook.load_results(tmp_path)] == [["anna-12-0-ch03"]]


@needs_sandbox
def test_nobody_is_graded_where_the_assignments_own_solution_fails(tmp_path, released):
    wrong = source_notebook()
    cell_of(wrong, "total").source = cell_of(wrong, "total").source.replace("np.sum", "np.max")
    (tmp_path / "in").mkdir()
    nbformat.write(filled_in(released), tmp_path / "in" / "ann.ipynb")
    said = "(?s)nobody was graded.*total_close: the total of several numbers is wrong"
    with pytest.raises(ValueError, match=said):
        classroom.grade(tmp_path / "in", [write_source(tmp_path, wrong)], tmp_path / "out", **LIMITS)
    assert not (tmp_path / "out" / "grades.csv").exists()


@needs_sandbox
def test_nbgraders_own_commands_give_the_same_points(tmp_path, source, released, monkeypatch):
    students = {"ann": {}, "ben": {"double": hostile.WRONG_DOUBLE, "answer_cell": "answer = 5"}, "cem": None}
    course, folder = tmp_path / "nbgrader", tmp_path / "in"
    shutil.copytree(source.parent, course / "source" / "ch03")
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
                   "IPYTHONDIR": str(tmp_path / "ipython"), "HOME": str(tmp_path),
                   "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}

    def nbgrader(*arguments: str) -> None:
        done = subprocess.run([sys.executable, "-m", "nbgrader", *arguments, f"--CourseDirectory.root={course}"],
                              cwd=course, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    nbgrader("generate_assignment", "ch03")
    theirs = nbformat.read(course / "release" / "ch03" / "assignment.ipynb", as_version=4)
    assert [cell.source for cell in theirs.cells if cell.cell_type == "code"] == \
        [cell.source for cell in released.cells if cell.cell_type == "code"], "the students' copies are the same"
    for name, code in students.items():
        work = filled_in(released, **code) if code is not None else released
        place = course / "submitted" / name / "ch03"
        place.mkdir(parents=True)
        nbformat.write(work, place / "assignment.ipynb")
        nbformat.write(work, folder / f"{name}.ipynb")
    nbgrader("autograde", "ch03")
    from nbgrader.api import Gradebook

    classroom.grade(folder, [source], tmp_path / "out", **LIMITS)
    monkeypatch.setenv("PATH", environment["PATH"])  # nbgrader calls alembic by name
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        expected = {name: book.find_submission("ch03", name).score for name in students}
    assert {name: float(row["automatic"]) for name, row in rows(tmp_path / "out").items()} == expected
    assert expected == {"ann": 90, "ben": 40, "cem": 0}


# ------------------------------------------------------------------------------------- sandbox and guard

def test_without_a_sandbox_grading_is_refused_with_the_way_out(tmp_path, source, released, monkeypatch):
    (tmp_path / "in").mkdir()
    nbformat.write(filled_in(released), tmp_path / "in" / "ann.ipynb")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="(?s)bubblewrap.*(apt install|is for Linux)"):
        classroom.grade(tmp_path / "in", [source], tmp_path / "out", **LIMITS)


def test_with_the_flag_it_works_without_a_sandbox_and_warns(tmp_path, source, released, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    nbformat.write(filled_in(released), tmp_path / "in" / "ann.ipynb")
    leaves = filled_in(released, answer_cell="import os\nos._exit(1)")
    nbformat.write(leaves, tmp_path / "in" / "ben.ipynb")
    monkeypatch.setenv("PATH", str(tmp_path))
    classroom.grade(tmp_path / "in", [source], tmp_path / "out", unsafe=True, seconds=60, memory_gb=1.0)
    assert {name: row["automatic"] for name, row in rows(tmp_path / "out").items()} == {"ann": "90", "ben": "70"}
    assert "WITHOUT a sandbox" in capsys.readouterr().err


@needs_sandbox
def test_the_courses_modules_and_torch_work_in_the_sandbox():
    assert sandbox_problem() is None
    kernel = SandboxedKernel("ch03_attention", Limits())
    kernel.start()
    try:
        reply = kernel.run("import previous_chapters, torch, pathlib\nfrom utils.workspace import workspace\n"
                           "from ch03_attention.attention import softmax\npathlib.Path('here').write_text('x')\n"
                           "rows = softmax(torch.zeros(2, 4)).sum(-1).tolist()", 120,
                           {"rows": "rows", "user": "__import__('os').getuid()"})
        assert reply.status == "ok" and reply.values["rows"] == "[1.0, 1.0]", reply
        assert reply.values["user"] != "0"
    finally:
        kernel.stop()
    assert not kernel.alive() and not kernel.folder.exists()


def test_a_check_is_sent_with_its_meaning_unchanged_and_a_last_line():
    check = "for a in range(3):\n    assert a == [0, 1, 2][a], f'{a} {max(1, a)!r}'"
    sent = check_code(check, "course_x", "token")
    names = {"course_x": None, "reached": []}

    class Guard:
        plain = staticmethod(lambda value: value)
        reached = staticmethod(names["reached"].append)

    sys.modules["course_x"] = Guard
    try:
        exec(sent, {})
    finally:
        del sys.modules["course_x"]
    assert names["reached"] == ["token"]
    assert "{max(1, a)!r}" in sent, "messages stay as they were written"


def test_a_replaced_function_matters_to_the_checks_that_use_it():
    assert running.matters("numpy.allclose", "assert np.allclose(a, b)")
    assert not running.matters("numpy.allclose", "assert double([1]) == [2]")
    assert running.matters("torch.allclose", "torch.testing.assert_close(a, b)"), "libraries may use it inside"
    assert running.matters("all", "assert x"), "builtins are used everywhere"
    assert running.matters("IPython's run_cell", "assert x")
    assert running.matters("ch03_attention.attention.softmax", "assert x")


@pytest.mark.parametrize("value", ["", "None", "'[1, 2]'", "'{}'", "1", "[",
                                   repr(json.dumps(['["before x", [], ""]', "0" * 64]))])
def test_a_report_that_the_guard_did_not_sign_is_no_report(value):
    assert read_report(value, "key", "before x") is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "CON", "ann ", "Ann", "ann", "x" * 300, "<b>", "=1",
                                  "", "..", "ä"])
def test_file_names_are_safe_and_different(name):
    made = gradebook.file_name(name)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,80}", made) and not made.startswith(".")
    others = {gradebook.file_name(other).lower() for other in ("ANN", "b", "ann.", "x" * 299, "b-", "student")}
    assert made.lower() not in others
