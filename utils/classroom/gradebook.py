"""From results to tables: grades.csv, manual.csv for what is graded by hand, and columns for Canvas and Moodle.

A result is a JSON file of one student and chapter in ``results/``. Tables are written from all of them, so that
they are the same however often and in whatever order the results came about.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path

from ..workspace import write_text

MANUAL = ("student", "chapter", "question", "points", "out of", "comment")
COLUMNS = ("plain", "canvas", "moodle")
NOT_ANSWERED = "not answered (entered by the grader)"  # what no teacher types


def file_name(*parts: str) -> str:
    """A file name of letters, digits, ``-``, ``_`` and ``.``: safe everywhere, different for different texts.

    Parts are joined by ``-``: ("anna-12",) and ("anna", "12") are one text.
    """
    text = "-".join(part for part in parts if part)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60] or "student"
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", plain)
    unchanged = plain == text and plain == plain.lower() and not reserved
    return plain if unchanged else f"{plain}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def load_results(out: Path) -> list[dict]:
    """All results, sorted by student and chapter. One that cannot be read is passed over and graded again."""
    results = {}
    for path in sorted((Path(out) / "results").glob("*.json"), reverse=True):
        result = load_result(path)
        if result:  # NAME-7-0-ch03.json replaces NAME-7-ch03.json, as earlier versions called it
            results[result["student"], result["number"], result["chapter"]] = result
    return [results[key] for key in sorted(results)]


def load_result(path: Path) -> dict | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"student", "number", "chapter", "exercises", "remarks"} <= set(result) else None
    except (OSError, ValueError, TypeError):
        return None


def save_result(path: Path, result: dict) -> None:
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def automatic(result: dict) -> float:
    return sum(exercise_points(exercise) for exercise in result["exercises"])


def exercise_points(exercise: dict) -> float:
    """The points of an exercise's tests that passed."""
    return sum(test["points"] for test in exercise["tests"] if test["passed"])


def questions(result: dict) -> list[dict]:
    return [question for exercise in result["exercises"] for question in exercise["questions"]]


def read_manual(out: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """What was entered by hand, by (student, chapter, question). ``ValueError`` names a line without sense."""
    path = Path(out) / "manual.csv"
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as 'CSV UTF-8 (comma delimited)'."
                         ) from error
    first = text.split("\n", 1)[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","
    rows, entered = csv.DictReader(io.StringIO(text), delimiter=delimiter), {}
    if not set(MANUAL[:4]) <= set(rows.fieldnames or []):
        raise ValueError(f"{path} begins with {first[:100]!r}; its columns must be {', '.join(MANUAL)}.")
    for number, row in enumerate(rows, 2):
        row = {name: (row.get(name) or "").strip() for name in MANUAL}
        _points(row, f"{path}, line {number}")
        entered[row["student"], row["chapter"], row["question"]] = row
    return entered


def _points(row: dict[str, str], where: str) -> float | None:
    """The points entered in a row, None if none were."""
    if not row["points"]:
        return None
    try:
        points, most = float(row["points"].replace(",", ".")), float(row["out of"].replace(",", ".") or "inf")
    except ValueError:
        points, most = float("nan"), 0.0
    if not 0 <= points <= most:
        raise ValueError(f"{where}: {row['points']!r} points for {row['student']}; "
                         f"enter a number from 0 to {row['out of']}.")
    return points


def update_manual(out: Path, results: list[dict]) -> dict[tuple[str, str, str], dict[str, str]]:
    """Give every open question a row in manual.csv and return all rows. What was entered is never changed."""
    rows = read_manual(out)
    for result in results:
        for question in questions(result):
            key = (safe_cell(result["student"]), result["chapter"], question["id"])
            empty = {"points": "", "comment": ""}
            waits = question["answer"] or result.get("retry")
            new = empty if waits else {"points": "0", "comment": NOT_ANSWERED}
            row = rows.setdefault(key, dict(zip(MANUAL[:3], key, strict=True)) | new)
            if row["comment"] == NOT_ANSWERED and row["points"] == "0" and question["answer"]:
                row |= empty  # handed in later
            row["out of"] = f"{question['points']:g}"
    text = _table([list(MANUAL), *([rows[key][name] for name in MANUAL] for key in sorted(rows))], clean=False)
    path = Path(out) / "manual.csv"
    if not path.exists() or path.read_text(encoding="utf-8-sig").replace("\r\n", "\n") != text:
        write_text(path, text)
    return rows


def points_summary(result: dict, manual: dict) -> dict:
    """Points and status of a result with what was entered by hand: automatic, by_hand, total, out_of, status."""
    rows = [manual.get((safe_cell(result["student"]), result["chapter"], question["id"]))
            for question in questions(result)]
    points = [_points(row, "manual.csv") if row else None for row in rows]
    by_hand = sum(point for point in points if point is not None)
    out_of = sum(exercise["points"] for exercise in result["exercises"])
    status = "not graded" if result.get("problem") else "complete"
    if not result.get("problem") and None in points:
        status = "open question to be graded"
    comments = [row["comment"] if row else "" for row in rows]
    return {"automatic": automatic(result), "by_hand": by_hand, "total": automatic(result) + by_hand,
            "out_of": out_of, "status": status, "comments": comments, "points": points}


def write_tables(out: Path, results: list[dict], manual: dict, columns: str) -> Path:
    """Write grades.csv, and with ``columns`` "canvas" or "moodle" a file for that platform beside it."""
    most = max((len(result["exercises"]) for result in results), default=0)
    rows = [["student", "number", "chapter", *(f"exercise {number + 1}" for number in range(most)), "automatic",
             "open question", "total", "out of", "status", "remarks"]]
    for result in results:
        found = points_summary(result, manual)
        each = [f"{exercise_points(exercise):g}" if exercise["tests"] else "" for exercise in result["exercises"]]
        remarks = [result["problem"]] * bool(result.get("problem")) + result["remarks"]
        sums = ["" if name == "total" and result.get("retry") else f"{found[name]:g}"
                for name in ("automatic", "by_hand", "total", "out_of")]
        rows.append([result["student"], result["number"], result["chapter"], *each, *[""] * (most - len(each)),
                     *sums, found["status"], "; ".join(remarks)])
    path = Path(out) / "grades.csv"
    write_text(path, _table(rows))
    if columns == "canvas":
        write_text(Path(out) / "grades-canvas.csv", _table(canvas_table(results, manual)))
    chapters = sorted({result["chapter"] for result in results}) if columns == "moodle" else []
    for chapter in chapters:
        name = f"grades-moodle-{chapter or 'unknown'}.csv" if len(chapters) > 1 else "grades-moodle.csv"
        rows = moodle_table([result for result in results if result["chapter"] == chapter], manual)
        write_text(Path(out) / name, _table(rows).replace(",'-,", ",-,"))
    return path


def _final(result: dict, manual: dict) -> str:
    """The total where it is final; "" where something is still to be graded by hand, or to be run again."""
    found = points_summary(result, manual)
    return "" if found["status"].startswith("open") or result.get("retry") else f"{found['total']:g}"


def _people(results: list[dict]) -> list[tuple[str, str]]:
    return sorted({(result["student"], result["number"]) for result in results})


def canvas_table(results: list[dict], manual: dict) -> list[list[str]]:
    """Canvas's gradebook import: its five columns for the person, then one column for each assignment.

    Canvas matches rows by ID, which is the first number in the names of the files that it gives to download.
    """
    chapters = sorted({(result["chapter"], result["title"]) for result in results if result["chapter"]})
    grades = {(result["student"], result["number"], result["chapter"]): result for result in results}
    out_of = {result["chapter"]: f"{sum(one['points'] for one in result['exercises']):g}" for result in results}
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *(title for _, title in chapters)],
            ["Points Possible", "", "", "", "", *(out_of[chapter] for chapter, _ in chapters)]]
    for student, number in _people(results):
        login = "" if number else student
        got = [grades.get((student, number, chapter)) for chapter, _ in chapters]
        rows.append([student, number, "", login, "", *(_final(one, manual) if one else "" for one in got)])
    return rows


def moodle_table(results: list[dict], manual: dict) -> list[list[str]]:
    """Moodle's offline grading worksheet for one assignment.

    Moodle needs Identifier, Grade and Last modified (grade). "Participant N" is the number in the names of the
    folders that it gives to download.
    """
    rows = [["Identifier", "Full name", "Grade", "Maximum Grade", "Last modified (grade)", "Feedback comments"]]
    for result in results:
        found = points_summary(result, manual)
        comments = "; ".join(comment for comment in [result.get("problem", ""), *found["comments"]] if comment)
        rows.append([f"Participant {result['number']}" if result["number"] else "", result["student"],
                     _final(result, manual), f"{found['out_of']:g}", "-", comments])
    return rows


def safe_cell(text: object) -> str:
    """A cell that no spreadsheet takes for a formula, on one line."""
    text = re.sub(r"\s+", " ", str(text))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _table(rows: list[list[str]], *, clean: bool = True) -> str:
    file = io.StringIO()
    rows = [[safe_cell(cell) for cell in row] for row in rows] if clean else rows
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
