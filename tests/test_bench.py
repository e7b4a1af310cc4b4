"""``course.py bench``: every row runs small, and what it writes is what it measured."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import course
from utils.bench import COURSE, Row, measure


@pytest.mark.parametrize("name", course.BENCHES)
def test_every_row_runs_small(name, tmp_path, monkeypatch):
    downloads = course_workspace_packages()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "packages").symlink_to(downloads, target_is_directory=True)
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path))
    result = subprocess.run([sys.executable, "course.py", "bench", name, "--quick"], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "bench" / f"{name}.json").read_text())
    assert document["machine"]["cores"] >= 1 and document["sizes"] == "quick"
    for row in document["rows"]:
        assert row["work"] in result.stdout
        assert COURSE in row["contenders"] and len(row["contenders"]) > 1
        for timing in row["contenders"].values():
            assert len(timing["wall_seconds"]) == document["rounds"] == 1
            assert timing["wall_seconds"][0] > 0 and timing["peak_memory_bytes"] > 1e7
    assert (tmp_path / "bench" / f"{name}.png").stat().st_size > 5000


def course_workspace_packages():
    from utils.workspace import workspace
    return workspace("data", "packages")


def sleeper(seconds):
    import time
    return lambda: time.sleep(seconds)


def spinner(seconds):
    import time

    def run():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
    return run


def hoarder(megabytes):
    return lambda: len(b"x" * (megabytes * 1_000_000))


def breaker(message):
    def run():
        raise ValueError(message)
    return run


def test_wall_and_cpu_time_are_told_apart_and_warm_up_is_left_out():
    measured = measure(Row("wait", "tests.test_bench", {"sleeps": "sleeper", "spins": "spinner"}, 0.2, 1, "MB"), 2)
    assert len(measured["sleeps"].wall) == 2
    assert min(measured["sleeps"].wall) >= 0.2 and max(measured["sleeps"].cpu) < 0.1
    assert min(measured["spins"].cpu) >= 0.2


def test_memory_is_the_contenders_own():
    kept = b"x" * 400_000_000  # what this process holds is nobody else's
    measured = measure(Row("hold", "tests.test_bench", {"holds": "hoarder"}, 200, 1, "MB"), 1)
    assert 200e6 < measured["holds"].memory < 200e6 + 150e6 and len(kept)


def test_a_contender_that_fails_is_named():
    with pytest.raises(RuntimeError, match="wait, bad: ValueError: seven"):
        measure(Row("wait", "tests.test_bench", {"bad": "breaker"}, "seven", 1, "MB"), 1)
    with pytest.raises(ValueError, match="rounds is 0"):
        measure(Row("wait", "tests.test_bench", {"bad": "breaker"}, "seven", 1, "MB"), 0)
