"""Starting the course: the environment, JupyterLab with its token and save hook, one place for the device."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import pytest
import torch
from conftest import ROOT

from utils.device import compare_with_cpu, pick_device

# ---------------------------------------------------------------- the environment


def test_makes_an_environment_installs_once_and_again_after_a_change(scratch, clean_environment, base_python):
    """A real .venv from a real requirements file, small so that it takes seconds."""
    (scratch / "requirements.txt").write_text("")
    (scratch / "tests" / "requirements.txt").write_text("")

    def course(*arguments):
        return subprocess.run([base_python, "course.py", *arguments], cwd=scratch, env=clean_environment,
                              capture_output=True, text=True)

    first = course("run", "ch01")
    assert "Making a virtual environment in .venv" in first.stdout
    assert "Installing requirements.txt" in first.stdout
    assert (scratch / ".venv" / "pyvenv.cfg").exists()
    assert "No module named 'nbformat'" in first.stderr and "Traceback" not in first.stderr  # nothing was pinned
    second = course("run", "ch01")
    assert "Making" not in second.stdout and "Installing" not in second.stdout
    (scratch / "requirements.txt").write_text("# changed\n")
    assert "Installing requirements.txt" in course("run", "ch01").stdout


def test_uses_the_active_environment(scratch, clean_environment, tmp_path, base_python):
    subprocess.run([base_python, "-m", "venv", str(tmp_path / "mine")], check=True)
    (scratch / "requirements.txt").write_text("")
    scripts = tmp_path / "mine" / ("Scripts" if os.name == "nt" else "bin")
    environment = {**clean_environment, "VIRTUAL_ENV": str(tmp_path / "mine")}
    result = subprocess.run([str(scripts / "python"), "course.py", "run", "ch01"], cwd=scratch, env=environment,
                            capture_output=True, text=True)
    assert "Installing requirements.txt into mine" in result.stdout
    assert not (scratch / ".venv").exists()


def test_export_needs_nothing_installed(scratch, clean_environment, base_python):
    result = subprocess.run([base_python, "-S", "course.py", "export", "--check"], cwd=scratch, env=clean_environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not (scratch / ".venv").exists()


def test_requirements_are_pinned_and_inside_the_ranges():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "requirements.txt").read_text(), re.M))
    project = (ROOT / "pyproject.toml").read_text()
    ranges = dict(re.findall(r'"([\w-]+)>=([\w.]+)"', project))
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert len(lines) == len(pins) and pins["torch"] == "2.13.0"
    for name, version in pins.items():
        assert tuple(map(int, version.split(".")[:2])) >= tuple(map(int, ranges[name].split(".")[:2])), name


def test_help_and_readme_know_every_command():
    shown = subprocess.run([sys.executable, "course.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("run", "test", "lab", "chat", "serve", "export", "assignments", "links"):
        assert re.search(rf"^ +{command}\b", shown, re.M) and f"course.py {command}" in readme


# ---------------------------------------------------------------- JupyterLab


@pytest.fixture
def lab(scratch, clean_environment):
    """A real `course.py lab` on a free port: (scratch folder, address, token)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**clean_environment, "VIRTUAL_ENV": sys.prefix, "PYTHONUNBUFFERED": "1"}
    with open(scratch / "lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "course.py", "lab", "--no-browser", f"--port={port}"], cwd=scratch,
                                   env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(240):
            text = (scratch / "lab.log").read_text()
            found = re.search(rf"http://127\.0\.0\.1:{port}/lab\?token=(\w+)", text)
            if found:
                break
            assert process.poll() is None, text
            time.sleep(0.5)
        yield scratch, f"http://127.0.0.1:{port}", found.group(1)
    finally:
        if os.name == "posix" and process.poll() is None:
            os.killpg(process.pid, 15)
        process.terminate()
        process.wait(30)


def request(address, token="", method="GET", body=None):
    headers = {"Authorization": f"token {token}"} if token else {}
    data = json.dumps(body).encode() if body else None
    call = urllib.request.Request(address, data=data, method=method, headers=headers)
    with urllib.request.urlopen(call, timeout=60) as answer:
        return json.loads(answer.read())


def test_lab_asks_for_its_token_and_saving_rewrites_the_module(lab):
    scratch, address, token = lab
    place = f"{address}/api/contents/ch03_attention/attention.ipynb"
    with pytest.raises(urllib.error.HTTPError) as refused:
        request(place)
    assert refused.value.code == 403
    model = request(place, token)
    document = nbformat.from_dict(model["content"])
    cell = next(c for c in document.cells if "def softmax(" in c.source and c.source.startswith("#| export"))
    module = scratch / "ch03_attention" / "attention.py"

    cell.source += "\n\n\nEDITED_IN_LAB = True"
    request(place, token, "PUT", {"type": "notebook", "format": "json", "content": document})
    assert "EDITED_IN_LAB = True" in module.read_text()

    cell.source += "\ndef broken(:"  # saved all the same; the module stays usable; the log says why
    request(place, token, "PUT", {"type": "notebook", "format": "json", "content": document})
    assert "broken" not in module.read_text() and "EDITED_IN_LAB = True" in module.read_text()
    assert "broken(:" in (scratch / "ch03_attention" / "attention.ipynb").read_text()
    assert "attention.py was left as it was" in (scratch / "lab.log").read_text()


@pytest.mark.skipif(not shutil.which("ss"), reason="needs ss to list listening sockets")
def test_lab_listens_on_loopback_only(lab):
    port = lab[1].rsplit(":", 1)[1]
    listening = subprocess.run(["ss", "-ltnH", f"sport = :{port}"], capture_output=True, text=True).stdout
    addresses = {line.split()[3].rsplit(":", 1)[0] for line in listening.splitlines()}
    assert addresses == {"127.0.0.1"}


# ---------------------------------------------------------------- the device


def test_device_is_chosen_in_one_place(monkeypatch, capsys):
    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "Running on" in capsys.readouterr().out
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    assert pick_device() == torch.device("cpu")
    for nonsense in ("tpu9000", "cuda:77"):
        monkeypatch.setenv("COURSE_DEVICE", nonsense)
        with pytest.raises(ValueError, match=f"COURSE_DEVICE='{nonsense}' cannot be used here.*unset it"):
            pick_device()
    for path in ROOT.glob("ch0*/*.py"):
        assert "cuda.is_available" not in path.read_text(), "utils/device.py chooses, nobody else"


def test_a_device_that_computes_wrongly_is_caught():
    class Drifting(torch.nn.Linear):
        """Right the first time (the reference), wrong the second, as a broken backend would be."""

        calls = 0

        def forward(self, x):
            Drifting.calls += 1
            return super().forward(x) * (1 if Drifting.calls == 1 else 1.01)

    torch.manual_seed(0)
    inputs = torch.randn(5, 4)
    assert compare_with_cpu(torch.nn.Linear(4, 3), inputs, torch.device("cpu")) == 0.0
    with pytest.raises(ArithmeticError, match="disagrees with the CPU.*COURSE_DEVICE=cpu"):
        compare_with_cpu(Drifting(4, 3), inputs, torch.device("cpu"))
