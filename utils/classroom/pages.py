"""A page for each student: points, what every check said, and the code that was graded.

The pages are whole in themselves: no script, nothing fetched, everything that a student wrote is shown as text.
They never quote a hidden test, only what a failed check says.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..workspace import write_text
from .gradebook import exercise_points, file_name, load_results, points_summary, read_manual

STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }
main { max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
caption { text-align: left; font-weight: 600 }
th, td { border-bottom: 1px solid #767676; padding: .3rem .6rem; text-align: left; vertical-align: top }
td.points, th.points { text-align: right; white-space: nowrap }
.passed { color: #00563b }
.failed { color: #8b1a00 }
pre { background: #f4f4f4; border: 1px solid #767676; padding: .6rem; overflow-x: auto; white-space: pre-wrap }
summary { cursor: pointer } .message { white-space: pre-wrap; overflow-wrap: anywhere }
"""


def feedback(out: Path) -> list[Path]:
    """Write ``out/feedback/STUDENT.html`` for every student from the results, running nothing.

    ``ValueError`` if nothing was graded there yet.
    """
    results = load_results(out)
    if not results:
        raise ValueError(f"{out} holds no results; grade first: "
                         f"course.py assignments grade SUBMISSIONS --out {out}")
    manual = read_manual(out)
    pages: dict[Path, list[dict]] = {}
    for result in results:
        pages.setdefault(Path(out) / "feedback" / f"{page_name(result)}.html", []).append(result)
    for path in sorted(pages):
        text = page(pages[path], manual)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return sorted(pages)


def page_name(result: dict) -> str:
    return file_name(result["student"])


def page(results: list[dict], manual: dict) -> str:
    """The page of one student as HTML, with a section for each chapter."""
    student = escape(results[0]["student"])
    sections = "".join(_chapter(result, points_summary(result, manual)) for result in results)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f"<title>Feedback for {student}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>Feedback for {student}</h1>\n{sections}</main>\n</body>\n</html>\n")


def _chapter(result: dict, found: dict) -> str:
    title = escape(result["title"] or "Handed in")
    if result.get("problem"):
        return f"<h2>{title}</h2>\n<p>This could not be graded: {escape(result['problem'])}</p>\n"
    open_points = [point for point in found["points"] if point is None]
    waiting = " The open question is not graded yet." if open_points else ""
    rows = "".join(_exercise_row(exercise, found, result) for exercise in result["exercises"])
    table = (f'<table>\n<caption>Points</caption>\n<tr><th scope="col">Exercise</th>'
             f'<th scope="col" class="points">Points</th><th scope="col" class="points">Out of</th></tr>\n{rows}'
             f'<tr><th scope="row">Total</th><td class="points">{found["total"]:g}</td>'
             f'<td class="points">{found["out_of"]:g}</td></tr>\n</table>\n')
    exercises = "".join(_exercise(exercise, found, result) for exercise in result["exercises"])
    return (f"<h2>{title}</h2>\n<p>{found['total']:g} of {found['out_of']:g} points.{waiting}</p>\n"
            f"{table}{exercises}")


def _hand_points(exercise: dict, found: dict, result: dict) -> list[tuple[dict, float | None, str]]:
    """An exercise's open questions with the points and the comment that were entered for them."""
    everything = [question["id"] for one in result["exercises"] for question in one["questions"]]
    places = [everything.index(question["id"]) for question in exercise["questions"]]
    return [(question, found["points"][place], found["comments"][place])
            for question, place in zip(exercise["questions"], places, strict=True)]


def _exercise_row(exercise: dict, found: dict, result: dict) -> str:
    by_hand = [points for _, points, _ in _hand_points(exercise, found, result)]
    points = exercise_points(exercise) + sum(point or 0 for point in by_hand)
    shown = "not graded yet" if by_hand and None in by_hand and not exercise["tests"] else f"{points:g}"
    return (f'<tr><th scope="row">{escape(exercise["title"])}</th><td class="points">{shown}</td>'
            f'<td class="points">{exercise["points"]:g}</td></tr>\n')


def _exercise(exercise: dict, found: dict, result: dict) -> str:
    parts = [f"<h3>{escape(exercise['title'])}</h3>\n"]
    if exercise["tests"]:
        parts.append('<table>\n<caption>Checks</caption>\n<tr><th scope="col">Check</th>'
                     '<th scope="col">Result</th><th scope="col" class="points">Points</th></tr>\n'
                     + "".join(_test_row(test) for test in exercise["tests"]) + "</table>\n")
    for question, points, comment in _hand_points(exercise, found, result):
        got = "Not graded yet." if points is None else f"{points:g} of {question['points']:g} points."
        parts.append(f"<p>{got} {escape(comment)}</p>\n<h4>Your answer</h4>\n"
                     f"<pre>{escape(question['answer'] or '(none)')}</pre>\n")
    for code in exercise["code"]:
        parts.append(f"<details>\n<summary>Your code: {escape(_words(code['id']))}</summary>\n"
                     f"<pre><code>{escape(code['source'])}</code></pre>\n</details>\n")
    return "".join(parts)


def _test_row(test: dict) -> str:
    name = "passed" if test["passed"] else "failed"
    word = f'<strong class="{name}">{"passed" if test["passed"] else "not passed"}</strong>'
    message = f'<div class="message">{escape(test["message"])}</div>' if test["message"] else ""
    points = f"{test['points'] if test['passed'] else 0:g} of {test['points']:g}"
    return (f'<tr><th scope="row">{escape(_words(test["id"]))}</th><td>{word}{message}</td>'
            f'<td class="points">{points}</td></tr>\n')


def _words(name: str) -> str:
    return name.replace("_", " ")
