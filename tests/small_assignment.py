"""A small assignment that is graded in a second, for the tests of the classroom."""

from __future__ import annotations

import copy
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TITLE = """# Assignment 3: Small numbers
<!-- launch -->
[a badge](https://example.org/badge)
<!-- /launch -->
About 20 minutes."""
SOLUTION = """def {name}(values):
    \"\"\"{doc}\"\"\"
    ### BEGIN SOLUTION
    {code}
    ### END SOLUTION"""
CODE = {
    "double": "return [2 * each for each in values]",
    "total": "return float(np.sum(np.asarray(values, dtype=float)))",
}
VISIBLE = "assert double([1, 2]) == [2, 4], f'double([1, 2]) is {double([1, 2])}, not [2, 4]'"
HIDDEN_SECRET = "numbers_of_the_hidden_test = [3, -1, 10]"
TESTS = {
    "double_visible": (VISIBLE, 10),
    "double_hidden": (f"""assert isinstance(double([5]), list), "double gives back something that is no list"
### BEGIN HIDDEN TESTS
{HIDDEN_SECRET}
assert double(numbers_of_the_hidden_test) == [6, -2, 20], "double is wrong for negative numbers (often: abs)"
### END HIDDEN TESTS""", 20),
    "total_close": ("""### BEGIN HIDDEN TESTS
assert np.allclose(total([0.5, 0.25, 7.0]), 7.75), "the total of several numbers is wrong"
### END HIDDEN TESTS""", 20),
    "total_empty": ("""assert total([]) == 0, "the total of nothing is 0"
### BEGIN HIDDEN TESTS
assert all([total([1.5]) == 1.5, total([2.5]) == 2.5]), "the total of one number is that number"
### END HIDDEN TESTS""", 20),
    "answer": ("""### BEGIN HIDDEN TESTS
assert abs(answer - 6) < 1e-9, "the answer is not the one that the experiment gives"
### END HIDDEN TESTS""", 20),
}


def marks(name: str, **keys) -> dict:
    """A cell's metadata for nbgrader."""
    return {"nbgrader": {"grade": False, "grade_id": name, "locked": False, "schema_version": 3, "solution": False,
                         "task": False, **keys}}


def solution(name: str, code: str) -> nbformat.NotebookNode:
    doc = {"double": "Twice every number of a list, as a list.", "total": "The sum of numbers, a float."}[name]
    source = SOLUTION.format(name=name, doc=doc, code=code)
    return new_code_cell(source, id=name, metadata=marks(name, solution=True))


def check(name: str) -> nbformat.NotebookNode:
    source, points = TESTS[name]
    metadata = marks(name, grade=True, locked=True, points=points)
    return new_code_cell(source, id=name.replace("_", "-"), metadata=metadata)


def source_notebook() -> nbformat.NotebookNode:
    """Points: double 10 + 20, total 20 + 20, an experiment 20, an open question 10."""
    answer = "### BEGIN SOLUTION\nanswer = sum(double([1, 2]))\n### END SOLUTION"
    question = "### BEGIN SOLUTION\nBecause addition commutes.\n### END SOLUTION"
    cells = [
        new_markdown_cell(TITLE, id="title"),
        new_code_cell("import sys\nif 'google.colab' in sys.modules:\n    raise SystemExit", id="launch",
                      metadata=marks("launch", locked=True) | {"tags": ["launch"]}),
        new_code_cell("import math\n\nimport numpy as np", id="imports", metadata=marks("imports", locked=True)),
        new_markdown_cell("## Exercise 1: Twice (30 points, about 5 minutes)", id="e1"),
        solution("double", CODE["double"]), check("double_visible"), check("double_hidden"),
        new_markdown_cell("## Exercise 2: Sums (40 points, about 5 minutes)", id="e2"),
        solution("total", CODE["total"]), check("total_close"), check("total_empty"),
        new_markdown_cell("## Exercise 3: An experiment (20 points, about 5 minutes)", id="e3"),
        new_code_cell(answer, id="answer-cell", metadata=marks("answer_cell", solution=True)), check("answer"),
        new_markdown_cell("## Exercise 4: In your words (10 points, about 5 minutes)\n\nWhy?", id="e4"),
        new_markdown_cell(question, id="why", metadata=marks("why", grade=True, solution=True, points=10)),
    ]
    course = {"assignment": "ch03", "minutes": 20, "forbidden": ["ch03_attention", "numpy.cumsum"]}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"course": course, "kernelspec": kernel, "language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=metadata)


def write_source(folder: Path, notebook: nbformat.NotebookNode | None = None) -> Path:
    path = Path(folder) / "ch03_attention" / "assignment.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook or source_notebook(), path)
    return path


def filled_in(released: nbformat.NotebookNode, **code: str) -> nbformat.NotebookNode:
    """A student's work in a released copy: right where nothing else is given. Names are grade_ids, whole cells."""
    work = copy.deepcopy(released)
    right = {name: f"def {name}(values):\n    {body}" for name, body in CODE.items()}
    right |= {"answer_cell": "answer = 6", "why": "Addition commutes."}
    for cell in work.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name in (right | code):
            cell.source = (right | code)[name]
    return work


def cell_of(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == name)
