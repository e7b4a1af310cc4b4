"""Chapter 1's deep dives: the corpus pipeline, whole under every kind of trouble, and the laws of how much data."""

import contextlib
import hashlib
import html
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_data.data import contamination, load_documents, near_duplicates, split_documents
from ch01_data.how_much_data import BESIROGLU, HOFFMANN, effective_tokens, mixture_weights, training_flops
from ch01_data.pipeline import (
    CorpusSettings,
    build_corpus,
    corpus_summary,
    in_processes,
    main,
    on_ray,
    plan_units,
    read_unit,
    run_tasks,
)

ROOT = Path(__file__).resolve().parent.parent
UNIT = 20_000  # bytes: many units from little text
SETTINGS = CorpusSettings(shard_bytes=60_000, on_error="skip", val_fraction=0.1)


def prose(seed: int, sentences: int = 14) -> str:
    """Text that passes all quality rules and has nothing in common with that of another seed."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("aeioubcdfglmnprst", k=generator.randint(3, 8))) for _ in range(400)]
    lines = [" ".join(["The", *generator.choices(words, k=5), "and", *generator.choices(words, k=4), "of",
                       generator.choice(words) + "."]) for _ in range(sentences)]
    return "\n\n".join(lines)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two folders and a JSON Lines file with every kind of dirt, 250 documents or so."""
    room = tmp_path_factory.mktemp("sources")
    (room / "good" / "deep").mkdir(parents=True)
    for i in range(60):
        (room / "good" / "deep" / f"{i:02}.txt").write_text(prose(i), encoding="utf-8")
    (room / "web").mkdir()
    for i in range(20):
        page = f"<html><body><nav>Home</nav><p>{html.escape(prose(100 + i))}</p></body></html>"
        (room / "web" / f"{i}.html").write_text(page, encoding="utf-8")
    (room / "web" / "copy.txt").write_text(prose(7), encoding="utf-8")  # exact: good/deep/07
    (room / "web" / "near.txt").write_text(prose(8).replace("The", "A", 1), encoding="utf-8")  # near: good/deep/08
    (room / "web" / "menu.txt").write_text("Home | About", encoding="utf-8")
    (room / "web" / "void.txt").write_text(" \n", encoding="utf-8")
    (room / "web" / "old.txt").write_bytes("på landet".encode("cp1252"))
    rows = [{"id": f"line/{i}", "text": prose(1000 + i)} for i in range(150)]
    rows[3]["text"] += " Write to hans@example.org."
    rows[5]["text"] = ""
    rows[9] = {"words": "no text"}
    rows[20]["text"] += "\n\n" + "\n\n".join(prose(30).split("\n\n")[:2])  # quotes good/deep/30
    content = "\n".join(json.dumps(row) for row in rows)
    (room / "crawl.jsonl").write_bytes(content.encode()[:-300] + b"\n" + b'{"text": "\xff"}\n')
    return [room / "good", room / "web", room / "crawl.jsonl"]


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a corpus, but for its parts."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*"))
            if p.is_file() and ".parts" not in p.parts and p.suffix != ".part"}


@pytest.fixture(scope="module")
def reference(sources, tmp_path_factory):
    """The corpus as one undisturbed process makes it: (folder, manifest)."""
    out = tmp_path_factory.mktemp("reference") / "corpus"
    return out, build_corpus(sources, out, SETTINGS, unit_bytes=UNIT)


def test_counts_add_up_and_nothing_is_lost(sources, reference):
    out, manifest = reference
    steps = manifest["steps"]
    assert [s["step"] for s in steps] == ["read", "normalize", "quality", "personal data", "exact duplicates",
                                          "near duplicates"]
    assert all(a["out"] == b["in"] for a, b in zip(steps, steps[1:], strict=False))
    assert steps[0]["in"] == 60 + 25 + 151
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text("utf-8").splitlines()]
    for step in steps:
        assert step["in"] - step["out"] == sum(d["step"] == step["step"] for d in dropped)
    documents = {side: load_documents(out / side) for side in ("train", "val")}
    ids = [d.id for side in documents.values() for d in side]
    assert len(ids) == len(set(ids)) == steps[-1]["out"]
    assert len({d["id"] for d in dropped} | set(ids)) == len(dropped) + len(ids) == steps[0]["in"]
    for side, some in documents.items():
        assert manifest[side] == {"documents": len(some), "characters": sum(len(d.text) for d in some)}
    listed = {s["name"]: s for s in manifest["shards"]}
    assert set(listed) == {f"{s}/{p.name}" for s in ("train", "val") for p in (out / s).iterdir()}
    for name, shard in listed.items():
        raw = (out / name).read_bytes()
        assert (len(raw), raw.count(b"\n")) == (shard["bytes"], shard["documents"])
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"] and len(raw) <= SETTINGS.shard_bytes
    assert len(listed) > 3


def test_each_document_meets_the_fate_it_deserves(reference):
    out, manifest = reference
    fate = {d["id"]: d for d in map(json.loads, (out / "dropped.jsonl").read_text("utf-8").splitlines())}
    assert fate["web/copy"]["rule"] == "as good/deep/07" and fate["web/copy"]["step"] == "exact duplicates"
    assert fate["web/near"]["rule"] == "as good/deep/08" and fate["web/near"]["step"] == "near duplicates"
    assert "too_few_words" in fate["web/menu"]["rule"] and fate["web/void"]["rule"] == "empty"
    assert fate["line/5"]["rule"] == "empty" and fate["crawl/10"]["rule"] == "unreadable"
    assert "not valid UTF-8" in fate["web/old"]["message"] and "cut off" in fate["crawl/150"]["message"]
    assert "UTF-8" in fate["crawl/151"]["message"]
    assert len(fate) == 9
    assert str(out.parent) not in (out / "dropped.jsonl").read_text("utf-8")
    texts = {d.id: d.text for side in ("train", "val") for d in load_documents(out / side)}
    assert "[email]" in texts["line/3"] and "Home" not in texts["web/0"] and "<p>" not in texts["web/0"]
    assert manifest["steps"][3]["masked"] == 1


def test_equals_the_steps_of_the_chapter_in_memory(sources, reference):
    out, _ = reference
    from ch01_data.data import mask_personal, quality_flags
    items = [d for unit in plan_units(sources)[0] for d in read_unit(unit) if not isinstance(d, dict)]
    good = [(d.id, mask_personal(d.text)) for d in items if d.text and not quality_flags(d.text)]
    place = {name: number for number, (name, _) in enumerate(good)}
    by_text = {}
    for name, text in good:
        by_text.setdefault(text, name)
    from ch01_data.data import Document
    kept = [Document(name, text, "") for text, name in by_text.items()]
    later = {n for group in near_duplicates(kept) for n in sorted(group, key=place.get)[1:]}
    expected = split_documents([d for d in kept if d.id not in later], 0.1)
    for side, documents in zip(("train", "val"), expected, strict=True):
        assert {d.id: d.text for d in load_documents(out / side)} == {d.id: d.text for d in documents}


def test_contamination_is_that_of_the_chapter(tmp_path):
    texts = [prose(i) for i in range(40)]
    texts[1] += "\n\n" + texts[0].split("\n\n")[3]  # thirteen words and more
    texts[2] += " " + " ".join(texts[3].split()[:12])  # one too few
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"{i:02}", "text": t}) for i, t in enumerate(texts)))
    seen = set()
    for seed in range(12):
        manifest = build_corpus([path], tmp_path / str(seed), CorpusSettings(seed=seed, val_fraction=0.5))
        train, val = (load_documents(tmp_path / str(seed) / side) for side in ("train", "val"))
        found = manifest["contamination"]
        assert found["share"] == pytest.approx(contamination(train, val))
        assert found["documents"] == len(found["ids"]) and set(found["ids"]) <= {"00", "01"}
        seen.add(found["documents"])
    assert seen == {0, 1}


@pytest.mark.parametrize(("workers", "unit_bytes"), [(1, 3_000), (1, 1 << 22), (2, UNIT), (3, 9_000)])
def test_same_bytes_whatever_the_workers_and_units(sources, reference, tmp_path, workers, unit_bytes):
    build_corpus(sources, tmp_path / "out", SETTINGS, workers=workers, unit_bytes=unit_bytes)
    assert contents(tmp_path / "out") == contents(reference[0])


def write_call(folder: Path, sources: list[Path], options: str) -> str:
    """A script that builds the reference corpus in the folder `out` of where it is run."""
    script = folder / "call.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from ch01_data.pipeline import CorpusSettings, build_corpus\n"
        "if __name__ == '__main__':\n"
        f"    settings = CorpusSettings(**{vars(SETTINGS)!r})\n"
        f"    build_corpus({[str(s) for s in sources]!r}, 'out', settings, {options})\n", encoding="utf-8")
    return str(script)


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `scale` is not installed")


@needs_ray
def test_ray_makes_the_same_bytes(sources, reference, tmp_path):
    """A Ray of its own, as `--engine ray` starts it, through the command line."""
    options = ["--on-error", "skip", "--shard-bytes", "60000", "--val-fraction", "0.1", "--workers", "2"]
    command = [sys.executable, "-m", "ch01_data.pipeline", *map(str, sources), "--out", str(tmp_path / "out"),
               "--engine", "ray", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(reference[0])
    assert "Traceback" not in done.stderr and done.stdout.startswith(corpus_summary(reference[1]))


@needs_ray
def test_ray_cluster_by_address(sources, reference, tmp_path):
    """`ray start --head` on loopback, then the same call with its address, from a folder that is not the course."""
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    port = random.Random().randint(20_000, 30_000)
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0",
                   "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    environment.pop("PYTHONPATH", None)
    before = {p.pid for p in psutil.process_iter()}
    subprocess.run([*ray, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
                    "--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats"],
                   cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    started = [p for p in psutil.process_iter() if p.pid not in before and "ray" in " ".join(_words(p))]
    try:
        script = write_call(tmp_path, sources, f"engine='ray', address='127.0.0.1:{port}', unit_bytes={UNIT}")
        done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
    finally:
        started += [child for p in started if p.is_running() for child in p.children(recursive=True)]
        for process in started:  # those of this cluster only; `ray stop` would stop every Ray of the machine
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=20)
        note = Path("/tmp/ray/ray_current_cluster")  # by which --address auto would look for it
        if note.exists() and note.read_text().endswith(f":{port}"):
            note.unlink()
    assert contents(tmp_path / "out") == contents(reference[0])


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_ray_missing_says_how_to_get_it(monkeypatch, sources, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"ray\[data\]\"") as error, on_ray(1, None):
        pass
    assert "bytes-to-chat[scale]" in str(error.value) and "--engine" in str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_resumes_after_kills_at_random_moments(sources, reference, tmp_path, workers):
    script = write_call(tmp_path, sources, f"workers={workers}, unit_bytes=4_000")
    generator, out, kills = random.Random(), tmp_path / "out", 0
    for kill in range(5):
        process = subprocess.Popen([sys.executable, script], cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        family = psutil.Process(process.pid)
        parts = len(list((out / ".parts").glob("*.json"))) if kill else 0
        wanted = parts + generator.randint(1, 6)
        try:  # some work is done, then a moment passes, then the power fails
            while process.poll() is None and len(list(out.glob(".parts/*.json"))) < wanted:
                time.sleep(0.002)
            time.sleep(generator.random() * 0.02)
            children = family.children(recursive=True) if process.poll() is None else []
            kills += process.poll() is None
        finally:
            process.kill()
            process.wait()
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "workers outlive their parent"
    assert kills >= 3, f"only {kills} of 5 runs were still going when the power failed"
    assert subprocess.run([sys.executable, script], cwd=tmp_path, timeout=120).returncode == 0
    assert contents(out) == contents(reference[0])


def _part(out: Path, suffix: str) -> Path:
    return max(out.glob(f".parts/*{suffix}"), key=lambda p: (p.stat().st_size, p.name))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink, lambda p: p.write_bytes(b"")],
                         ids=["flipped", "cut", "gone", "emptied"])
def test_damage_is_noticed_and_mended(reference, sources, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    for victim in (".jsonl", ".npy", ".json", "shard", "dropped", "manifest"):
        path = {"shard": out / "train" / "00000.jsonl", "dropped": out / "dropped.jsonl",
                "manifest": out / "manifest.json"}.get(victim) or _part(out, victim)
        damage(path)
        build_corpus(sources, out, SETTINGS, unit_bytes=UNIT)
        assert contents(out) == contents(reference[0]), victim


@pytest.mark.parametrize("change", [{"mask": False}, {"ignore_rules": ("all",)}, {"n_perm": 64}, {"on_error": "stop"}])
def test_changed_settings_make_their_parts_anew(reference, sources, tmp_path, change):
    shutil.copytree(reference[0], tmp_path / "replaced")
    changed = CorpusSettings(**vars(SETTINGS) | change)
    outcomes = []
    for folder in ("replaced", "fresh"):
        try:
            build_corpus(sources, tmp_path / folder, changed, unit_bytes=UNIT, replace_old=True)
            outcomes.append(contents(tmp_path / folder))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] != contents(reference[0])


def test_record_with_a_wrong_number_is_noticed(reference, sources, tmp_path):
    shutil.copytree(reference[0], tmp_path / "out")
    path = _part(tmp_path / "out", ".json")
    content = json.loads(path.read_text())
    content["record"]["documents"] = content["record"]["documents"][1:]
    path.write_text(json.dumps(content))
    build_corpus(sources, tmp_path / "out", SETTINGS, unit_bytes=UNIT)
    assert contents(tmp_path / "out") == contents(reference[0])


def test_damaged_plan_is_a_message(reference, sources, tmp_path):
    shutil.copytree(reference[0], tmp_path / "out")
    (tmp_path / "out" / ".parts" / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="--replace"):
        build_corpus(sources, tmp_path / "out", SETTINGS, unit_bytes=UNIT)
    build_corpus(sources, tmp_path / "out", SETTINGS, unit_bytes=UNIT, replace_old=True)
    assert contents(tmp_path / "out") == contents(reference[0])


def test_finished_parts_are_not_made_again(sources, reference, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reference[0], out)
    times = {p: p.stat().st_mtime_ns for p in out.glob(".parts/*.npy")}
    build_corpus(sources, out, SETTINGS, unit_bytes=UNIT)
    assert {p: p.stat().st_mtime_ns for p in out.glob(".parts/*.npy")} == times and len(times) > 5
    build_corpus(sources, out, CorpusSettings(on_error="skip", threshold=0.5), unit_bytes=UNIT, replace_old=True)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert len(list((out / "train").iterdir())) == 1  # larger shards; those of before are gone


def test_another_corpus_in_the_folder_is_refused(sources, reference, tmp_path):
    before = contents(reference[0])
    changed = CorpusSettings(shard_bytes=60_000, on_error="skip", val_fraction=0.2, threshold=0.7)
    with pytest.raises(ValueError, match="holds another corpus") as error:
        build_corpus(sources, reference[0], changed, unit_bytes=UNIT)
    for part in ("val_fraction was 0.1 and is now 0.2", "threshold was 0.8 and is now 0.7", "--replace", "--out"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="the sources or their contents have changed"):
        build_corpus(sources[:2], reference[0], SETTINGS, unit_bytes=UNIT)
    assert contents(reference[0]) == before
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no corpus"):
        build_corpus(sources, tmp_path, SETTINGS)
    with pytest.raises(OSError, match="a file is in its way"):
        build_corpus(sources, tmp_path / "diary.txt" / "x", SETTINGS)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_folder_that_cannot_be_written(sources, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("ch01_data.pipeline.write_text", refuse)
    with pytest.raises(OSError, match="cannot be written to") as error:
        build_corpus(sources, tmp_path / "out", SETTINGS)
    assert str(tmp_path / "out") in str(error.value)


def test_changed_source_is_read_again(sources, tmp_path):
    copies = [shutil.copytree(s, tmp_path / s.name) if s.is_dir() else shutil.copy(s, tmp_path) for s in sources]
    build_corpus(copies, tmp_path / "out", SETTINGS, unit_bytes=UNIT)
    (tmp_path / "good" / "deep" / "00.txt").write_text(prose(5000))
    with pytest.raises(ValueError, match="contents have changed"):
        build_corpus(copies, tmp_path / "out", SETTINGS, unit_bytes=UNIT)
    build_corpus(copies, tmp_path / "out", SETTINGS, unit_bytes=UNIT, replace_old=True)
    texts = {d.id: d.text for side in ("train", "val") for d in load_documents(tmp_path / "out" / side)}
    assert texts["good/deep/00"] == prose(5000)


@pytest.mark.parametrize("name", ["1.txt", "rows.jsonl"])
def test_source_changed_while_it_is_read_is_refused(tmp_path, monkeypatch, name):
    def plan_then_edit(*arguments):
        planned = plan_units(*arguments)
        path.write_bytes(before.replace(b"planned", b"changed"))
        return planned

    (tmp_path / "some").mkdir()
    for i in range(3):
        (tmp_path / "some" / f"{i}.txt").write_text(f"The text {i} as it was planned.\n")
    (tmp_path / "some" / "rows.jsonl").write_text('{"text": "first"}\n{"text": "planned"}\n')
    path, options = tmp_path / "some" / name, CorpusSettings(ignore_rules=("all",), val_fraction=0)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("ch01_data.pipeline.plan_units", plan_then_edit)
        with pytest.raises(ValueError, match=r"was changed while this ran.*--replace"):
            build_corpus([tmp_path / "some"], tmp_path / "out", options)
    path.write_bytes(before)
    build_corpus([tmp_path / "some"], tmp_path / "out", options)
    build_corpus([tmp_path / "some"], tmp_path / "fresh", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_interrupted_replacement_leaves_no_manifest_of_the_old_corpus(sources, reference, tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    out = shutil.copytree(reference[0], tmp_path / "out")
    unmasked = CorpusSettings(**vars(SETTINGS) | {"mask": False})
    monkeypatch.setattr("ch01_data.pipeline.write_jsonl_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(sources, out, SETTINGS, unit_bytes=UNIT)
    assert contents(out) == contents(reference[0])  # the same corpus once more: nothing has changed
    with pytest.raises(KeyboardInterrupt):
        build_corpus(sources, out, unmasked, unit_bytes=UNIT, replace_old=True)
    assert not (out / "manifest.json").exists()


def test_unreadable_text_stops_with_place_and_mend(sources, tmp_path):
    for source, place in ((sources[1], "old.txt"), (sources[2], "line 10")):
        with pytest.raises(ValueError, match=place) as error:
            build_corpus([source], tmp_path / source.stem, CorpusSettings())
        assert str(source) in str(error.value) and "--on-error skip" in str(error.value)
    with pytest.raises(ValueError, match=r"crawl\.jsonl, line 10: no string"):
        build_corpus(sources[2:], tmp_path / "pool", CorpusSettings(), workers=2, unit_bytes=UNIT)


def test_bad_calls_name_the_value_and_the_mend(sources, tmp_path):
    for call, kind, words in [
        (lambda: build_corpus(["grimm"], tmp_path / "a"), ValueError, ["'grimm'", "andersen", "folder"]),
        (lambda: build_corpus([tmp_path / "nowhere"], tmp_path / "a"), FileNotFoundError, ["nowhere", "Check"]),
        (lambda: build_corpus([], tmp_path / "a"), ValueError, ["at least one"]),
        (lambda: build_corpus("andersen", tmp_path / "a"), ValueError, ["a list"]),
        (lambda: build_corpus([sources[0], sources[0]], tmp_path / "a"), ValueError, ["'good'", "Rename"]),
        (lambda: build_corpus(sources, tmp_path / "a", workers=0), ValueError, ["workers 0", "at least 1"]),
        (lambda: build_corpus(sources, tmp_path / "a", engine="spark"), ValueError, ["'spark'", "'ray'"]),
        (lambda: build_corpus(sources, tmp_path / "a", address="auto"), ValueError, ["'auto'", "'ray'"]),
        (lambda: build_corpus(sources, tmp_path / "a", licences={"x": "MIT"}), ValueError, ["'x'", "good"]),
        (lambda: CorpusSettings(threshold=0), ValueError, ["threshold is 0", "above 0"]),
        (lambda: CorpusSettings(threshold=1.5), ValueError, ["1.5", "at most 1"]),
        (lambda: CorpusSettings(val_fraction=1), ValueError, ["val_fraction is 1", "below 1"]),
        (lambda: CorpusSettings(n_perm=0), ValueError, ["n_perm is 0", "128"]),
        (lambda: CorpusSettings(on_error="ignore"), ValueError, ["'ignore'", "'skip'"]),
        (lambda: CorpusSettings(ignore_rules=("nice",)), ValueError, ["nice", "too_few_words"]),
    ]:
        with pytest.raises(kind) as error:
            call()
        assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file of the kinds"):
        build_corpus([tmp_path / "empty"], tmp_path / "b")
    (tmp_path / "one.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="No document is left of 1"):
        build_corpus([tmp_path / "one.txt"], tmp_path / "c")
    assert "too_few_words" in (tmp_path / "c" / "dropped.jsonl").read_text()


def test_ids_that_occur_twice(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", "text": prose(1)}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "x", "text": prose(2)}))
    with pytest.raises(ValueError, match="'x' occurs 2 times"):
        build_corpus([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out")


def test_command_line(sources, tmp_path, capsys):
    assert main([*map(str, sources), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "--on-error skip" in capsys.readouterr().err
    options = ["--on-error", "skip", "--workers", "1", "--licence", "web=crawled, rights unclear", "--replace",
               "--ignore-rule", "all", "--no-mask", "--val-fraction", "0"]
    assert main([*map(str, sources), "--out", str(tmp_path / "out"), *options]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert [s["licence"] for s in manifest["sources"]] == ["not stated", "crawled, rights unclear", "not stated"]
    assert manifest["steps"][2]["in"] == manifest["steps"][2]["out"] and manifest["val"]["documents"] == 0
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "ray start --head" in text and "--address" in text and "goes on where" in text


def test_named_source_has_its_licence(tmp_path):
    manifest = build_corpus(["andersen"], tmp_path / "out")
    assert "public domain" in manifest["sources"][0]["licence"] and manifest["train"]["documents"] > 100


@given(st.lists(st.text(max_size=40), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_any_cut_of_json_lines_gives_the_same_documents(tmp_path_factory, texts, unit_bytes):
    path = tmp_path_factory.mktemp("cut") / "some.jsonl"
    path.write_bytes(b"\n".join(json.dumps({"text": t}, ensure_ascii=n % 2 == 0).encode("utf-8", "surrogatepass")
                                for n, t in enumerate(texts)))
    units, _ = plan_units([path], unit_bytes)
    found = [d if isinstance(d, dict) else (d.id, d.text) for unit in units for d in read_unit(unit)]
    assert [f if isinstance(f, dict) else f[1] for f in found] == texts
    assert [f[0] for f in found] == [f"some/{n}" for n in range(1, len(texts) + 1)]


def test_the_ending_of_a_file_may_have_capitals(tmp_path):
    (tmp_path / "ALICE30.TXT").write_text("Down the hole")
    (tmp_path / "Rows.JsonL").write_text('{"text": "first"}\n{"text": "second"}\n')
    units, described = plan_units([tmp_path], 1)
    assert [(unit.kind, d.text) for unit in units for d in read_unit(unit)] == [
        ("files", "Down the hole"), ("lines", "first"), ("lines", "second")]
    assert described[0]["files"] == 2 and len(plan_units([tmp_path / "ALICE30.TXT"])[0]) == 1


def test_errors_in_workers_keep_their_kind(sources, tmp_path):
    units, _ = plan_units(sources[:1])
    task = {"step": "clean", "unit": {**vars(units[0]), "files": [(str(tmp_path / "gone.txt"), "gone")]},
            "settings": vars(CorpusSettings()), "code": "", "folder": str(tmp_path)}
    with in_processes(2) as spread, pytest.raises(FileNotFoundError, match="a folder that all of them share"):
        run_tasks(spread, [task], "")


MEMORY = """
import json, random, resource, sys
sys.path.insert(0, {root!r})
from ch01_data.pipeline import CorpusSettings, build_corpus
if __name__ == "__main__":
    build_corpus([sys.argv[1]], sys.argv[2], CorpusSettings(ignore_rules=("all",), n_perm=16), unit_bytes=1 << 20)
    if sys.platform == "linux":  # there, ru_maxrss begins with what the parent used
        lines = open("/proc/self/status").read().splitlines()
        print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the module resource is not there")
def test_memory_does_not_grow_with_the_texts(tmp_path):
    (tmp_path / "call.py").write_text(MEMORY.format(root=str(ROOT)))
    words = [prose(i).replace("\n\n", " ").split() for i in range(20)]
    generator, megabytes = random.Random(0), {}
    for n in (300, 3_000):
        path = tmp_path / f"{n}.jsonl"
        with open(path, "w") as file:
            for _ in range(n):
                file.write(json.dumps({"text": " ".join(generator.choices(generator.choice(words), k=1_500))}) + "\n")
        done = subprocess.run([sys.executable, str(tmp_path / "call.py"), str(path), str(tmp_path / f"out{n}")],
                              check=True, capture_output=True, text=True, timeout=120)
        megabytes[n] = float(done.stdout.split()[-1])
    more_text = 2_700 * 1_500 * 6.5 / 1e6
    assert more_text > 25
    assert megabytes[3_000] - megabytes[300] < 0.4 * more_text, megabytes


# How much data

def test_optimum_is_the_lowest_point_of_its_bill():
    for law in (HOFFMANN, BESIROGLU):
        for flops in (1e18, 1e21, 5.76e23):
            n, d = law.optimum(flops)
            assert training_flops(n, d) == pytest.approx(flops)
            others = n * np.geomspace(0.01, 100, 4001)
            losses = law.loss(others, flops / 6 / others)
            assert law.loss(n, d) <= losses.min() + 1e-9
            assert others[losses.argmin()] == pytest.approx(n, rel=2e-3)
    n, d = BESIROGLU.optimum(6 * 70e9 * 1.4e12)
    assert 15 < d / n < 25 and 60e9 < n < 80e9
    with pytest.raises(ValueError, match="flops is 0"):
        BESIROGLU.optimum(0)


def test_effective_tokens():
    assert effective_tokens(100, 40) == 40 and effective_tokens(100, 100) == 100
    assert effective_tokens(100, 101) == pytest.approx(101, abs=0.01)  # the first repeated token is worth a fresh one
    worth = [effective_tokens(1, e) for e in range(1, 200)]
    assert all(0 <= b - a <= 1 for a, b in zip(worth, worth[1:], strict=False))
    assert worth[3] > 3.7 and worth[-1] == pytest.approx(16.4, abs=0.01) and max(worth) < 16.4
    for bad in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match=f"unique is {bad[0]} and seen is {bad[1]}"):
            effective_tokens(*bad)


def test_mixture_weights():
    sizes = {"a": 1, "b": 3, "c": 96}
    assert mixture_weights(sizes) == pytest.approx({"a": 0.01, "b": 0.03, "c": 0.96})
    assert mixture_weights(sizes, float("inf")) == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    shares = [mixture_weights(sizes, t) for t in (1, 1.5, 3, 10, 1e9)]
    assert all(sum(s.values()) == pytest.approx(1) for s in shares)
    assert all(x["a"] < y["a"] and x["c"] > y["c"] for x, y in zip(shares, shares[1:], strict=False))
    assert mixture_weights({"a": 1e300, "b": 1e300}, 1) == {"a": 0.5, "b": 0.5}
    for bad, words in ((({"a": 0}, 1), "'a' has size 0"), ((sizes, 0.5), "temperature is 0.5"),
                       ((sizes, float("nan")), "temperature is nan")):
        with pytest.raises(ValueError, match=words):
            mixture_weights(*bad)


@pytest.fixture(scope="module")
def calculator():
    """The functions of the calculator, from the notebook, with round numbers for what it measures."""
    from utils.plots import GREY, PALETTE, figure
    names = {"html": html, "np": np, "figure": figure, "GREY": GREY, "PALETTE": PALETTE, "BESIROGLU": BESIROGLU,
             "training_flops": training_flops, "BOOK": 500_000, "BYTES_PER_TOKEN": 4.0, "WORDS_PER_TOKEN": 0.75,
             "UTILISATION": 0.4, "A100": 312e12}
    notebook = nbformat.read(ROOT / "ch01_data" / "how_much_data.ipynb", as_version=4)
    for cell in notebook.cells:
        if any(cell.source.startswith(start) for start in ("WORDS_PER_MINUTE", "GPUS", "def render(")):
            exec(cell.source.split("\n\neverything =")[0], names)
    return names


def test_calculator_renders(calculator):
    shown = calculator["render"](log_n=np.log10(7e9), log_d=np.log10(2e12), gpu="A100")
    for part in ("7 G parameters", "2 T tokens", "8 TB", "4,000,000 books", "285.7", "8.4e+22 operations"):
        assert part in shown, part
    days = 8.4e22 / (0.4 * 312e12) / 86400
    assert f"{days:,.2f} days of one A100" in shown
    assert shown.count("color:#111") == shown.count("background:#") == 2 * shown.count("<tr>")
    assert calculator["render"](6, 7, "B200") != calculator["render"](6, 7, "H100")
    assert calculator["draw"](9.85, 12.3, "A100").axes[0].get_ylabel() == "training tokens"
