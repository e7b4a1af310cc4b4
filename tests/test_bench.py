"""``course.py bench``: every row runs small, and what it writes is what it measured."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import course
from utils.bench import (
    COURSE,
    Aim,
    Contender,
    Growth,
    Measurement,
    Row,
    exponent,
    measure,
    reached,
    shares,
    times_as_fast,
)
from utils.bench_report import RECORD, page_block, readme_block, save_measurements, with_block


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
        timings = list(row.get("contenders", {}).values()) + [
            point for curve in row.get("growth", {}).values() for point in curve["points"]]
        assert len(timings) > (name != "limits")
        for timing in timings:
            assert len(timing["wall_seconds"]) == document["rounds"] == 1
            assert timing["wall_seconds"][0] > 0 and timing["peak_memory_bytes"] > 1e7
        if name != "limits" and "contenders" in row:
            assert any(peer.startswith(COURSE) for peer in row["contenders"])
            assert row["share_of_the_machine"], f"{row['work']}: no limit of the machine"
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


def failing_check(_):
    def run():
        pass

    def check():
        raise ValueError("not done")
    run.check = check
    return run


def job(function, argument):
    return Contender("tests.test_bench", function, argument)


def test_wall_and_cpu_time_are_told_apart_and_warm_up_is_left_out():
    measured = measure({"sleeps": job("sleeper", 0.2), "spins": job("spinner", 0.2)}, 2)
    assert len(measured["sleeps"].wall) == 2
    assert min(measured["sleeps"].wall) >= 0.2 and max(measured["sleeps"].cpu) < 0.1
    assert min(measured["spins"].cpu) >= 0.2


def test_memory_is_the_contenders_own():
    kept = b"x" * 400_000_000  # what this process holds is nobody else's
    measured = measure({"holds": job("hoarder", 200)}, 1)
    assert 200e6 < measured["holds"].memory < 200e6 + 150e6 and len(kept)


def test_a_contender_that_fails_is_named():
    with pytest.raises(RuntimeError, match="wait, bad: ValueError: seven"):
        measure({"bad": job("breaker", "seven")}, 1, "wait")
    with pytest.raises(RuntimeError, match="wait, bad: ValueError: not done"):
        measure({"bad": job("failing_check", None)}, 1, "wait")
    with pytest.raises(RuntimeError, match="wait, bad: AttributeError"):
        measure({"bad": job("nobody", None)}, 1, "wait")
    with pytest.raises(ValueError, match="rounds is 0"):
        measure({"bad": job("breaker", "seven")}, 0)


def took(*wall, cpu=1.0):
    return Measurement(list(wall), [cpu] * len(wall), 1)


def test_figures_say_what_was_measured():
    measured = {COURSE: took(2, 2, 9), f"{COURSE}, int8": took(1), "peer": took(4, cpu=3.0), "slow": took(50, cpu=0.5),
                "this machine, products": took(0.5)}
    assert times_as_fast(measured) == {"wall": 2.0, "cpu": 0.5}
    assert shares(measured) == {"this machine, products": {COURSE: 0.25, f"{COURSE}, int8": 0.5, "peer": 0.125,
                                                           "slow": 0.01}}
    row = Row("w", "m", {}, None, 10, "MB")
    assert reached(row, measured, Aim("times", 1)) == 2 and reached(row, measured, Aim("cpu times", 1)) == 0.5
    assert reached(row, measured, Aim("share", 1)) == 0.25 and reached(row, measured, Aim("rate", 1)) == 5
    assert reached(row, measured, Aim("times", 1, f"{COURSE}, int8")) == 4
    with pytest.raises(ValueError, match="kind is 'much'"):
        Aim("much", 2)


def test_exponent_is_the_slope_of_the_logarithms():
    sizes = [10, 100, 1000]
    slope, least, most = exponent(sizes, [took(1e-3 * n**2, 1e-3 * n**2.5) for n in sizes])
    assert (round(least, 6), round(slope, 2), round(most, 6)) == (2.0, 2.25, 2.5)


def test_the_pages_show_the_record():
    documents = json.loads(RECORD.read_text(encoding="utf-8"))
    assert set(documents) == set(course.BENCHES)
    for path, block in ((ROOT / "docs" / "measurements.md", page_block), (ROOT / "README.md", readme_block)):
        text = path.read_text(encoding="utf-8")
        assert with_block(text, block(documents)) == text, f"{path.name}: run `course.py bench all --save`"
    with pytest.raises(ValueError, match="once each"):
        with_block("no marks", "")


def test_quick_or_missing_figures_are_not_kept(tmp_path):
    before = RECORD.read_bytes()
    for name in course.BENCHES:
        (tmp_path / f"{name}.json").write_text(json.dumps({"sizes": "quick"}))
    with pytest.raises(ValueError, match="limits has quick figures"):
        save_measurements(list(course.BENCHES), tmp_path)
    with pytest.raises(ValueError, match="limits has no figures"):
        save_measurements(list(course.BENCHES), tmp_path / "nowhere")
    assert RECORD.read_bytes() == before


def test_growth_measures_every_size():
    growth = Growth("wait", "tests.test_bench", {"sleeps": "sleeper"}, [0.05, 0.2], "s", {"sleeps": 1.0})
    measured = measure(growth.jobs(), 1)
    assert measured["sleeps", 0.2].wall[0] > 2 * measured["sleeps", 0.05].wall[0]
