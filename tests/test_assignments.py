"""The assignments, and above all their tests: wrong solutions lose the points meant for them, right ones none."""

import pytest

from tests.attempts import (
    ROOT,
    assignment_path,
    attempts_of,
    changed_source,
    chapters,
    code_cells,
    grade_attempt,
    grading,
    is_test,
    table,
)
from utils.classroom.assignments import read_assignment
from utils.classroom.remarks import risky_code
from utils.classroom.running import solution_steps
from utils.classroom.submissions import Step

by_chapter = pytest.mark.parametrize("chapter", chapters())


@by_chapter
def test_the_model_solution_gets_full_marks(chapter):
    assert {name: failed for name, failed in grade_attempt(chapter).items() if failed} == {}


@by_chapter
def test_wrong_attempts_lose_the_points_meant_for_them_and_right_ones_none(chapter):
    text, problems = table([chapter])
    print(text)
    assert problems == []


@by_chapter
def test_right_solutions_get_no_remark(chapter):
    plan = read_assignment(assignment_path(chapter))
    cells = {grading(cell).get("grade_id"): cell for cell in plan.cells}
    right = [changed_source(cells[one.cell], one) for one in attempts_of(chapter) if not one.loses]
    steps = [*solution_steps(plan), *(Step("own", source) for source in right)]
    assert risky_code(steps, plan.forbidden) == []


@by_chapter
def test_there_are_enough_attempts_and_every_graded_function_has_some(chapter):
    attempts = attempts_of(chapter)
    wrong = [attempt for attempt in attempts if attempt.loses]
    assert len(wrong) >= 12 and len(attempts) - len(wrong) >= 4
    assert len({(a.cell, a.why) for a in attempts}) == len(attempts), "each attempt says in its own words what it does"
    cells = code_cells(next(ROOT.glob(f"{chapter}_*/assignment.ipynb")))
    solved = {grading(c)["grade_id"] for c in cells if grading(c).get("solution")}
    assert {a.cell for a in wrong} == solved, "a solution cell that no wrong attempt tries"
    tests = {grading(c)["grade_id"] for c in cells if is_test(c)}
    assert {a.loses for a in wrong} == tests, "a test that no wrong attempt is meant for cannot be shown to work"
