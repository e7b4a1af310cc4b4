"""The script for long runs: killed at any moment, told to stop, given nonsense, on a full disk, with a dead rank."""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from test_faults import SMALL_DISK, needs_small_disk

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer, open_shard, prepare_tokens
from ch04_gpt.gpt import GPT, PRESETS, GPTConfig, count_parameters, flops_per_token
from ch05_pretrain import train as script
from ch05_pretrain.pretrain import TrainConfig, checkpoints, evaluate, make_optimizer
from ch05_pretrain.train import (
    HELP,
    PRESET_RUNS,
    TABLES,
    Corpus,
    DataConfig,
    Log,
    StopRequest,
    entries,
    main,
    make_model,
    model_config,
    prepare_corpus,
    read_settings,
    read_shards,
    to_toml,
    training_bytes,
    training_parser,
)

posix = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL are POSIX")

TINY = {
    "model": {"vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "norm": "rmsnorm",
              "mlp": "swiglu", "position": "rope", "bias": False, "dropout": 0.1},
    "train": {"steps": 260, "batch_size": 2, "context_length": 16, "warmup_steps": 2, "eval_every": 50,
              "eval_tokens": 64, "save_every": 4, "sample_every": 90},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workspace of its own with a small text, and the settings of a tiny run on it."""
    folder = tmp_path_factory.mktemp("train")
    texts, draw = folder / "texts", random.Random(0)
    words = ["the", "moon", "and", "a", "king", "saw", "little", "mermaid", "who", "was", "very", "old", "told", "her"]
    texts.mkdir()
    for i in range(8):
        lines = (" ".join(draw.choice(words) for _ in range(40)).capitalize() + "." for _ in range(5))
        (texts / f"tale{i}.txt").write_text("\n\n".join(lines))
    (folder / "tiny.toml").write_text(to_toml(TINY | {"data": {"texts": [str(texts)]}}))
    before = os.environ.get("COURSE_WORKSPACE")
    os.environ["COURSE_WORKSPACE"] = str(folder / "workspace")
    prepare_corpus(DataConfig((str(texts),)), 300)
    yield folder
    os.environ.pop("COURSE_WORKSPACE")
    if before is not None:
        os.environ["COURSE_WORKSPACE"] = before


def arguments(place, out, *more):
    return ["--config", str(place / "tiny.toml"), "--out", str(out), "--device", "cpu", *more]


# ---------------------------------------------------------------- processes that start fast

NURSERY = """
import json, os, shutil, signal, sys, time
from pathlib import Path
import torch._dynamo  # torch imports it with the first optimizer, which takes a second
import ch04_gpt.weights, ch05_pretrain.parallelize
from ch05_pretrain import pretrain, train

def die(*ignored):
    os.kill(os.getpid(), signal.SIGKILL)

def after(count, function, then, instead=False):
    '''The function, but the call number ``count`` is followed (or replaced) by ``then``.'''
    calls = []
    def counted(*given, **named):
        calls.append(1)
        if instead and len(calls) == count:
            return then(*given)
        result = function(*given, **named)
        if len(calls) == count:
            then(*given)
        return result
    return counted

def half(tensors, path):
    path.write_bytes(b"half of it")
    die()

MOMENTS = {
    "in the middle of the weights": lambda n: setattr(pretrain, "save_file", after(n, pretrain.save_file, half, True)),
    "before the sync": lambda n: setattr(os, "fsync", after(5 * n, os.fsync, die, True)),
    "before the name": lambda n: setattr(Path, "rename", after(n, Path.rename, die, True)),
    "after the name": lambda n: setattr(Path, "rename", after(n, Path.rename, die)),
    "while old ones go": lambda n: setattr(shutil, "rmtree", after(4 * n, shutil.rmtree, die, True)),
    "slow steps": lambda n: setattr(pretrain, "train_step", after(n, pretrain.train_step, lambda *a: time.sleep(30))),
    "bad weights": lambda n: setattr(pretrain, "train_step", after(n, pretrain.train_step, lambda model, *a:
                                     model.blocks[0].mlp.w_down.weight.data.fill_(float("inf")))),
    "a bad loss": lambda n: setattr(pretrain, "cross_entropy", after(n, pretrain.cross_entropy, lambda logits, *a:
                                    logits.sum() * float("nan"), True)),
}

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(json.dumps(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(json.dumps(child), flush=True)
        continue
    os.environ.update(order.get("env", {}))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(order["log"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    if order.get("moment"):
        MOMENTS[order["moment"]](order.get("count", 1))
    code = 99
    try:
        code = train.main(order["arguments"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


class Nursery:
    """A Python that has imported everything and forks: a run starts in milliseconds, not in seconds."""

    def __init__(self, folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.folder, self.started = folder, 0

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, given, **order):
        self.started += 1
        child = Child(self, self.folder / f"run{self.started}")
        child.pid = self.ask(arguments=given, log=str(child.log), **order)
        return child

    def run(self, given, **order):
        return self.start(given, **order).wait()


class Child:
    """One run that the nursery has started: what ``subprocess`` would give."""

    def __init__(self, nursery, log):
        self.nursery, self.log = nursery, log

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)  # it is not reaped before wait, so the number is still its own

    def alive(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"

    def wait(self):
        status = self.nursery.ask(wait=self.pid)
        self.code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.out, self.err = (Path(f"{self.log}.{name}").read_text() for name in ("stdout", "stderr"))
        return self


@pytest.fixture(scope="module")
def nursery(place):
    nursery = Nursery(place)
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(60)


def final(folder):
    """Everything that must be the same, bit for bit: the weights as exported, the last checkpoint, the history."""
    last = checkpoints(folder / "checkpoints")[-1]
    history = json.loads((folder / "history.json").read_text())
    del history["seconds"]
    state = {name: tensor.numpy().tobytes() for name, tensor in load_file(last / "state.safetensors").items()}
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    loader = json.loads((last / "state.json").read_text())["loader"]
    return {"weights": weights, "state": state, "history": history, "loader": loader, "name": last.name}


@pytest.fixture(scope="module")
def straight(place, nursery):
    """The run that nobody disturbs."""
    result = nursery.run(arguments(place, place / "straight"))
    assert result.code == 0, result.err
    return place / "straight"


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.004)


# ---------------------------------------------------------------- killed at any moment


INSIDE = ["in the middle of the weights", "before the sync", "before the name", "after the name", "while old ones go"]


def kill_once(kind, given, folder, nursery, draw):
    """Start the run and kill it some steps on; what its parent is told."""
    before = checkpoints(folder)[-1:]

    def later():
        return checkpoints(folder)[-1:] != before

    if kind == "true command":
        process = subprocess.Popen([sys.executable, "-m", "ch05_pretrain.train", *given], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: later() or process.poll() is not None)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        return process.wait()
    child = nursery.start(given, moment=kind if kind in INSIDE else None, count=2)
    if kind not in INSIDE:
        wait_for(lambda: later() or not child.alive())
    if kind == "any moment":
        time.sleep(draw.uniform(0, 0.05))
        child.kill()
    if kind == "half a checkpoint":
        while child.alive() and not any(path.suffix == ".part" for path in folder.iterdir()):
            time.sleep(0.0005)  # a save takes a few milliseconds
        child.kill()
    return child.wait().code


@posix
def test_killed_twenty_times_it_ends_with_bitwise_the_same_weights(place, nursery, straight):
    """SIGKILL from outside at unforeseeable moments, when half a checkpoint lies there, and inside of a save."""
    out, draw = place / "killed", random.Random(1)
    kinds = ["true command"] * 3 + ["any moment"] * 6 + ["half a checkpoint"] * 6 + INSIDE
    draw.shuffle(kinds)
    deaths = [kill_once(kind, arguments(place, out), out / "checkpoints", nursery, draw) for kind in kinds]
    assert deaths == [-signal.SIGKILL] * 20
    killed_at = int(checkpoints(out / "checkpoints")[-1].name.split("-")[1])
    assert 0 < killed_at < TINY["train"]["steps"], "each of them was killed in the middle of the run"
    (out / "checkpoints" / ".step-000001.part").mkdir()  # as a kill leaves it, at a step that is never saved again
    result = nursery.run(arguments(place, out))
    assert result.code == 0 and f"Going on from step {killed_at} of 260" in result.out, result.err
    assert final(out) == final(straight)
    left = [path.name for path in (out / "checkpoints").iterdir() if not path.name.startswith("step-")]
    assert left == [] and len(checkpoints(out / "checkpoints")) <= 3, "no half checkpoint stays"


@posix
def test_a_signal_saves_and_stops_and_it_goes_on_twice(place, nursery, straight):
    out, rarely, steps = place / "stopped", ("--save-every", "1000", "--keep", "1"), [0]
    for number, line in ((signal.SIGTERM, "step 50 of"), (signal.SIGINT, "step 150 of")):
        child = nursery.start(arguments(place, out, *rarely))
        said = Path(f"{child.log}.stdout")
        wait_for(lambda said=said, line=line: said.exists() and line in said.read_text())
        child.kill(number)
        child.wait()
        assert child.code == 128 + number, child.err
        assert f"{number.name}: finishing this step, then saving." in child.err and "Traceback" not in child.err
        steps.append(int(re.search(rf"Stopped by {number.name} after step (\d+) of 260", child.out)[1]))
        assert checkpoints(out / "checkpoints")[-1].name == f"step-{steps[-1]:06}", "saved where it stopped"
        assert f"python -m ch05_pretrain.train --config {place}/tiny.toml" in child.out, "says how to go on"
        assert not (out / "model.safetensors").exists(), "an unfinished model looks unfinished"
    assert 50 <= steps[1] < 150 <= steps[2] < 260
    assert nursery.run(arguments(place, out, *rarely)).code == 0
    assert final(out) == final(straight)
    again = nursery.run(arguments(place, out, *rarely))
    assert again.code == 0 and "Going on from step 260 of 260" in again.out
    assert final(out) == final(straight), "resuming what is finished changes nothing"


@posix
def test_a_second_interrupt_stops_at_once(place, nursery):
    out = place / "impatient"
    child = nursery.start(arguments(place, out), moment="slow steps", count=6)
    wait_for(lambda: checkpoints(out / "checkpoints"))
    time.sleep(0.5)
    child.kill(signal.SIGINT)
    time.sleep(1.3)
    assert child.alive()
    child.kill(signal.SIGINT)
    began = time.monotonic()
    child.wait()
    assert child.code == 130 and time.monotonic() - began < 20
    assert "Stopped at once. The last checkpoint stands" in child.err and "Traceback" not in child.err
    assert checkpoints(out / "checkpoints")[-1].name == "step-000004"


def test_one_interrupt_that_comes_twice_is_one(monkeypatch):
    """Under torchrun the same Ctrl-C comes from the terminal and from torchrun."""
    now = 100.0
    monkeypatch.setattr(script.time, "monotonic", lambda: now)
    stop = StopRequest(speak=False)
    stop.ask(signal.SIGINT, None)
    now = 100.5
    stop.ask(signal.SIGINT, None)
    now = 102.0
    stop.ask(signal.SIGTERM, None)
    assert stop() and stop.name == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT, None)


def test_the_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in StopRequest.signals]
    with StopRequest(speak=False) as stop:
        assert not stop() and stop.name == "another process"
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(stop)
        assert stop.name == "SIGTERM"
    assert [signal.getsignal(number) for number in StopRequest.signals] == before


# ---------------------------------------------------------------- a loss that is no number, a disk that is full


@posix
def test_a_loss_that_is_no_number_names_step_and_module_and_keeps_the_state_before(place, nursery, straight):
    out = place / "nan"
    result = nursery.run(arguments(place, out), moment="bad weights", count=10)
    assert result.code == 1 and "Traceback" not in result.err
    assert re.search(r"FloatingPointError: The .* became (nan|inf) at step 11.*blocks\.0\.mlp.*max_lr", result.err)
    assert checkpoints(out / "checkpoints")[-1].name == "step-000008", "weights that are no numbers are not saved"
    result = nursery.run(arguments(place, out), moment="a bad loss", count=10)
    assert result.code == 1 and "The loss became nan at step 18" in result.err
    assert checkpoints(out / "checkpoints")[-1].name == "step-000017", "the state before that step is saved"
    assert nursery.run(arguments(place, out)).code == 0
    assert final(out) == final(straight), "nothing of the bad step is left"


@needs_small_disk
def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_later(place, straight):
    """A real file system of one megabyte; then it grows, and the same command goes on."""
    disk = place / "disk"
    run = shlex.join([sys.executable, "-m", "ch05_pretrain.train", *arguments(place, disk / "run", "--keep", "9")])
    disk.mkdir()
    command = (f"mount -t tmpfs -o size=1m tmpfs '{disk}'; {run}; echo ended $?; find '{disk}'; "
               f"mount -o remount,size=32m '{disk}'; {run}; echo ended $?; cp -r '{disk}/run' '{place}/saved'")
    result = subprocess.run([*SMALL_DISK, command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True, timeout=900)
    first, second = result.stdout.split("ended 1\n")
    assert "ended 0" in second and "Traceback" not in result.stderr, result.stderr
    for words in ("Could not write", "/run/checkpoints/step-0000", "the disk is full", "MB free there",
                  "What was there before is unchanged"):
        assert words in result.stderr, result.stderr
    there = second.split("Running on")[0]
    saved = re.findall(r"checkpoints/step-(\d+)/state.json", there)
    assert len(saved) >= 2 and ".part" not in there, "whole checkpoints, and nothing half"
    assert f"Going on from step {int(max(saved))} of 260" in second
    assert final(place / "saved") == final(straight)


# ---------------------------------------------------------------- several processes


def ranks(nursery, given, number=2, **more):
    """Children with torchrun's variables: the processes of one run, without an agent that would end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [nursery.start(given, env={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
                                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more})
            for rank in range(number)]


@posix
@pytest.mark.parametrize("dead", [0, 1])
def test_when_a_rank_dies_the_others_end_with_a_message_within_a_minute(place, nursery, dead):
    out = place / f"dead{dead}"
    children = ranks(nursery, arguments(place, out, "--steps", "60", "--dropout", "0"))
    wait_for(lambda: checkpoints(out / "checkpoints") or not all(child.alive() for child in children))
    children[dead].kill()
    killed = time.monotonic()
    left = children[1 - dead].wait()
    assert children[dead].wait().code == -signal.SIGKILL
    assert time.monotonic() - killed < 60
    assert left.code == 1 and "Traceback" not in left.err, left.err
    assert "lost another process" in left.err and "the last checkpoint" in left.err
    assert left.err.rstrip().splitlines()[-1].startswith("[process 1] " * (dead == 0) + "Lost: "), left.err
    stands = int(checkpoints(out / "checkpoints")[-1].name.split("-")[1])
    again = [child.wait() for child in ranks(nursery, arguments(place, out, "--steps", "60", "--dropout", "0"))]
    assert [child.code for child in again] == [0, 0], again[0].err + again[1].err
    assert f"Going on from step {stands} of 60" in again[0].out and "Finished" in again[0].out
    assert again[1].out == "", "the first process alone speaks"
    assert json.loads((out / "results.json").read_text())["processes"] == 2


@posix
def test_a_signal_to_one_process_stops_and_saves_all(place, nursery):
    out = place / "asked"
    children = ranks(nursery, arguments(place, out, "--dropout", "0"))
    wait_for(lambda: checkpoints(out / "checkpoints") or not all(child.alive() for child in children))
    children[1].kill(signal.SIGTERM)
    codes = [child.wait().code for child in children]
    assert all(code not in (0, 1) for code in codes), children[0].err + children[1].err
    stopped = int(re.search(r"after step (\d+) of 260", children[0].out)[1])
    assert checkpoints(out / "checkpoints")[-1].name == f"step-{stopped:06}"
    assert f"\n  torchrun --nproc-per-node 2 -m ch05_pretrain.train --config {place}/tiny.toml" in children[0].out


@pytest.mark.parametrize(("given", "words"), [
    ({}, "python -m"),
    ({"RANK": "1", "WORLD_SIZE": "4"}, "torchrun --nproc-per-node 4 -m"),
    ({"RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"},
     "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m"),
])
def test_the_command_is_told_as_it_was_started(monkeypatch, given, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert " ".join(script.started_with()) == words


@pytest.mark.parametrize("is_main", [True, False])
def test_nobody_goes_on_before_all_have_the_corpus(place, monkeypatch, is_main):
    """The others read it after the first process has made it, and that may take longer than a step may wait."""
    seen, engine = [], argparse.Namespace(is_main=is_main, barrier=lambda: seen.append("barrier"))
    monkeypatch.setattr(script, "prepare_corpus", lambda *given: seen.append("corpus") or argparse.Namespace())
    monkeypatch.setattr(script, "make_model", lambda *given: seen.append("model") or 1 / 0)
    monkeypatch.setattr(argparse.Namespace, "tokenizer", argparse.Namespace(vocab_size=300), raising=False)
    given = arguments(place, place / "never")
    with pytest.raises(ZeroDivisionError):
        script.run(training_parser().parse_args(given), settings(*given), engine, "")
    assert seen == (["corpus", "barrier"] if is_main else ["barrier", "corpus"]) + ["barrier", "model"]


@posix
def test_a_mesh_that_does_not_multiply_is_refused_once_and_at_once(place, nursery):
    results = [child.wait() for child in ranks(nursery, arguments(place, place / "mesh", "--fsdp", "3"))]
    assert [result.code for result in results] == [1, 1]
    assert re.search(r"ValueError: .*fsdp.*3.*2 processes", results[0].err) and results[1].err == ""
    assert not (place / "mesh").exists()


@posix
def test_a_restart_that_would_wait_for_ever_is_refused(place, nursery):
    more = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    results = [child.wait() for child in ranks(nursery, arguments(place, place / "restart"), **more)]
    assert [result.code for result in results] == [1, 1]
    assert "(restart 1)" in results[0].err and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in results[0].err


@posix
def test_torchrun_starts_it_unchanged_and_again_when_a_process_dies(place):
    import psutil
    out = place / "torchrun"
    given = arguments(place, out, "--steps", "48", "--dropout", "0", "--fsdp", "2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
                "--standalone", "-m", "ch05_pretrain.train", *given]
    with open(place / "torchrun.log", "w") as log:
        process = subprocess.Popen(torchrun, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1",
                                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    try:
        wait_for(lambda: checkpoints(out / "checkpoints") or process.poll() is not None)
        psutil.Process(process.pid).children()[-1].kill()
        code = process.wait(300)
    finally:
        process.terminate()
    said = (place / "torchrun.log").read_text()
    assert code == 0, said
    assert re.search(r"Going on from step \d+ of 48", said) and said.count("Finished") == 1
    assert json.loads((out / "results.json").read_text())["processes"] == 2
    assert isinstance(GPT.from_pretrained(out), GPT)


# ---------------------------------------------------------------- what is left at the end


def test_a_finished_run_is_a_model_that_everything_else_can_open(place, straight):
    model, tokenizer = GPT.from_pretrained(straight), BPETokenizer.load(straight / "tokenizer.json")
    corpus = prepare_corpus(DataConfig((str(place / "texts"),)), 300)
    result = evaluate(model, corpus.val, corpus.val_bytes, context_length=16)
    results = json.loads((straight / "results.json").read_text())
    assert results["loss"] == pytest.approx(result.loss) and results["parameters"] == count_parameters(model)
    assert results["bits_per_byte"]["this model"] == pytest.approx(result.bits_per_byte)
    texts = "".join(Path(place / "texts" / f"tale{i}.txt").read_text() for i in range(8))
    assert 0 < results["held_out"]["bytes"] < len(texts) and results["held_out"]["tokens"] == len(corpus.val)
    assert results["bits_per_byte"]["this model"] < 0.6 * results["bits_per_byte"]["uniform"], "it has learned"
    assert results["tokens"] == 260 * 2 * 16 and 0 < results["hours"] < 1 and results["processes"] == 1
    assert results["command"].startswith("python -m ch05_pretrain.train --config ") and results["sample"]
    assert tokenizer.fingerprint() == corpus.tokenizer.fingerprint()
    settings = tomllib.loads((straight / "train.toml").read_text())
    assert GPTConfig.from_dict(settings["model"]) == model.config
    assert TrainConfig.from_dict(settings["train"]) == TrainConfig(**TINY["train"])
    assert not list(straight.rglob("*.part")) and not list(straight.rglob("*.pkl"))


@posix
def test_the_settings_that_it_leaves_make_the_same_model(place, nursery, straight):
    result = nursery.run(["--config", str(straight / "train.toml"), "--out", str(place / "twin"), "--device", "cpu"])
    assert result.code == 0, result.err
    assert final(place / "twin") == final(straight)


def test_the_terminal_gets_a_line_for_an_evaluation_and_samples(place, straight, capsys, monkeypatch):
    monkeypatch.setattr(script.time, "monotonic", lambda: 100.0)
    log, seen = Log(TrainConfig(steps=1000), 200, lambda *entry: seen.append(entry)), []
    log("held out", 100, 3.0)  # told again when a run goes on: not said again
    monkeypatch.setattr(script.time, "monotonic", lambda: 300.0)  # 200 seconds for 100 steps: 1,400 for 700
    for name, value in {"training": 2.5, "learning rate": 1e-3, "tokens per second": 12345.6}.items():
        log(name, 300, value)
    log("held out", 300, 2.75)
    log("sample", 300, "Once upon\n\na time")
    said = capsys.readouterr().out.splitlines()
    assert said == ["step 300 of 1,000 | held out 2.7500 | training 2.5000 | learning rate 1.00e-03 | "
                    "tokens per second 12,346 | 0:23:20 left", "  it writes: Once upon a time"]
    assert seen[0] == ("held out", 100, 3.0) and seen[-1] == ("sample", 300, "Once upon\n\na time")


def test_tensorboard_hears_everything_or_says_what_is_missing(place, capfd, monkeypatch):
    given = arguments(place, place / "board", "--steps", "20", "--sample-every", "10", "--eval-every", "10",
                      "--tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(given) == 1
    assert "ModuleNotFoundError" in (said := capfd.readouterr().err) and "pip install tensorboard" in said
    heard = []
    board = argparse.Namespace(log=lambda *entry: heard.append(entry), close=lambda: heard.append("closed"))
    monkeypatch.setattr(script, "tensorboard", lambda folder: heard.append(folder) or board)
    assert main(given) == 0
    assert heard[0] == place / "board" / "tensorboard" and heard[-1] == "closed"
    assert {entry[0] for entry in heard[1:-1]} >= {"training", "held out", "learning rate", "gradient norm", "sample"}


# ---------------------------------------------------------------- what a run would cost


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(place, capfd, monkeypatch):
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(script, "measure_steps", lambda *given: 2.0)
    given = arguments(place, place / "never", "--dry-run", "--price", "9", "--peak", "1e-6", "--steps", "3000",
                      "--eval-every", "100", "--eval-tokens", "96")
    assert main(given) == 0
    said = capfd.readouterr().out
    config = model_config(TINY["model"], 300, 16)
    flops = flops_per_token(config, 16)
    # 3,000 steps of 2 seconds; 30 evaluations of 96 tokens, 3 steps' worth, at a third of their cost
    for words in (f"{count_parameters(GPT(config)):,}", "96,000 in 3,000 steps", f"{96000 * flops:.2e} FLOPs",
                  "2.000 s a step, 16 tokens a second", f"{16 * flops / 1e6:.0%} of the peak", "1:41:00 on 1 process",
                  f"{9 * 6060 / 3600:.2f} at 9 an hour", "Nothing was written"):
        assert words in said, (words, said)
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_knows_that_every_process_evaluates_all(place, capfd, monkeypatch):
    monkeypatch.setattr(script, "measure_steps", lambda *given: 2.0)
    monkeypatch.setenv("WORLD_SIZE", "8")
    given = arguments(place, place / "never", "--dry-run", "--steps", "3000", "--eval-every", "100", "--eval-tokens",
                      "96", "--batch-size", "8", "--dp", "4", "--pp", "2", "--n-layers", "2")
    chosen, tables = training_parser().parse_args(given), settings(*given)
    script.dry_run(chosen, tables, *script.settings_of(tables), argparse.Namespace(ranks=4, device=torch.device("cpu")))
    # 30 evaluations of 96 tokens: by each data rank, whose step has 32, and by one stage after the other
    assert "1:42:00 on 8 processes" in (said := capfd.readouterr().out), said


def test_a_checkpoint_is_one_copy_on_any_mesh():
    config = TrainConfig(**TINY["train"])
    model = make_model(TINY["model"], 300, config, None)
    plans = [script.describe_plan(model, config, None, training_bytes(model, config, shards, ranks))
             for shards, ranks in ((1, 1), (1, 2), (8, 2))]
    (said,) = {line for plan in plans for line in plan if line.startswith("a checkpoint:")}
    state = make_optimizer(model, config)
    model(torch.randint(300, (2, 16))).sum().backward()
    state.step()
    size = sum(p.nbytes for p in model.parameters())
    size += sum(v.nbytes for s in state.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert script.spell_bytes(size) in said and "each process" not in said


def test_measured_steps_can_be_cut_as_those_of_the_run():
    config = TrainConfig(batch_size=16, accumulate=2, context_length=16)
    model = make_model(TINY["model"], 300, config, None)
    for most in range(1, 9):
        flops = 2e11 / 16 / most
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "flops_per_token", lambda *given, flops=flops: flops * 0.999)
            rows = script.measured_rows(model, config, argparse.Namespace(ranks=2, device=torch.device("cpu")))
        assert rows == max(most - most % 2, 1)


def test_the_measurement_is_of_real_steps(place, monkeypatch):
    config = TrainConfig(**TINY["train"])
    model = make_model(TINY["model"], 300, config, None)
    real = sys.modules["ch05_pretrain.pretrain"].train_step
    slept = []

    def slow(*given):
        slept.append(1.5 if len(slept) < 1 else 0.03)  # a first step may take long: that is not counted
        time.sleep(slept[-1])
        return real(*given)

    monkeypatch.setattr("ch05_pretrain.pretrain.train_step", slow)
    tokens = np.random.default_rng(0).integers(300, size=400)
    seconds = script.measure_steps(model, tokens, config, script.OneProcess(), seconds=0.3)
    assert 0.03 < seconds < 1.4 and 3 <= len(slept) < 40
    large = dataclasses.replace(config, batch_size=40, accumulate=30)
    monkeypatch.setattr(script, "flops_per_token", lambda *given: 2e11 / 16 / 10)  # so that ten sequences are enough
    seen = []

    def look(model, optimizer, loader, config, *rest):
        seen.append((loader.batch_size, config.accumulate))
        return real(model, optimizer, loader, config, *rest)

    monkeypatch.setattr("ch05_pretrain.pretrain.train_step", look)
    model = make_model(TINY["model"], 300, config, None)
    began = time.perf_counter()
    seconds = script.measure_steps(model, tokens, large, script.OneProcess(), seconds=0.3)
    assert set(seen) == {(10, 10)} and seconds < 4 * (time.perf_counter() - began) / (len(seen) - 1)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_memory_is_that_of_the_tensors(optimizer):
    config = TrainConfig(**TINY["train"] | {"optimizer": optimizer})
    model = make_model(TINY["model"] | {"n_layers": 3}, 300, config, None)
    model(torch.randint(300, (2, 16))).sum().backward()
    (stepper := make_optimizer(model, config)).step()
    held = training_bytes(model, config)
    state = [v for s in stepper.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert held["weights"] == held["gradients"] == sum(p.nbytes for p in model.parameters())
    assert held["optimizer"] == sum(v.nbytes for v in state)
    half = training_bytes(model, dataclasses.replace(config, accumulate=2), shards=4)
    assert half["weights"] == held["weights"] // 4 and half["activations"] == held["activations"] // 2


# ---------------------------------------------------------------- settings


def settings(*given):
    return read_settings(training_parser().parse_args(list(map(str, given))))


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path, monkeypatch):
    preset, file = tmp_path / "preset.toml", tmp_path / "file.toml"
    preset.write_text('[model]\npreset = "gpt2-355m"\ndropout = 0.2\n[train]\nsteps = 5\nseed = 5\nkeep = 5\n'
                      '[data]\ntexts = ["andersen", "shakespeare"]\nweights = [1, 2]\n')
    file.write_text("[train]\nseed = 6\nkeep = 6\nmax_lr = 1\n")
    monkeypatch.setitem(PRESET_RUNS, "mine", preset)
    found = settings("--preset", "mine", "--config", file, "--keep", 7, "--compile", "--n-layers", 3)
    assert found["train"] == {"steps": 5, "seed": 6, "keep": 7, "max_lr": 1, "compile": True}
    assert found["model"] == {"preset": "gpt2-355m", "dropout": 0.2, "n_layers": 3}
    assert settings("--preset", "mine", "--model", "storyteller")["model"] == {"preset": "storyteller"}
    assert settings("--preset", "mine", "--data", "folio")["data"] == {"texts": ["folio"]}, "weights are of other texts"
    assert settings()["train"] == {} and settings("--weights", 2, 0.5)["data"] == {"weights": [2.0, 0.5]}


def test_every_entry_has_a_flag_that_sets_it_and_a_line_of_help():
    text = training_parser().format_help()
    for table in TABLES:
        assert set(HELP[table]) == set(entries(table)), "HELP and the fields belong together"
    values = {int: 3, float: 0.25, str: "x"}
    parser = training_parser()
    for table in TABLES:
        for name in set(entries(table)) - {"rope_scaling"}:
            (action,) = [a for a in parser._actions if a.dest == f"{table}.{name}"]
            assert action.option_strings[0] in text
            if isinstance(action, argparse.BooleanOptionalAction):
                assert settings(action.option_strings[1])[table] == {name: False}
            else:
                value = values[action.type]
                assert settings(action.option_strings[0], value)[table] == {name: [value] if action.nargs else value}
    assert settings("--context-length", 7) == {"model": {}, "train": {"context_length": 7}, "data": {}}
    assert settings("--model-context-length", 7)["model"] == {"context_length": 7}


@pytest.mark.parametrize("name", [*PRESETS, "storyteller"])
def test_every_preset_is_a_run(name):
    if name in PRESET_RUNS and not PRESET_RUNS[name].exists():
        pytest.skip("the record of this run is not there")
    tables = settings("--preset", name)
    config, data = script.settings_of(tables)
    model = model_config(tables["model"], 2048, config.context_length)
    assert config.context_length <= model.context_length
    if name not in PRESET_RUNS:
        assert model == PRESETS[name] and config.precision == "bfloat16"


def test_a_model_from_a_name_and_changes():
    wide = model_config({"preset": "gpt2-124m", "d_model": 96, "n_heads": 6}, 2048, 16)
    assert (wide.head_dim, wide.d_ff, wide.n_kv_heads, wide.n_layers) == (16, 384, 6, 12)
    small = model_config({"preset": "smollm2-135m", "vocab_size": 300}, 2048, 16)
    assert dataclasses.replace(PRESETS["smollm2-135m"], vocab_size=300) == small
    plain = model_config({"d_model": 32, "n_layers": 1, "n_heads": 2}, 300, 16)
    assert (plain.vocab_size, plain.context_length) == (300, 16)


def test_settings_written_are_settings_read():
    tables = {"model": {"window": None, "norm": "rmsnorm", "bias": False, "rope_theta": 1e5,
                        "rope_scaling": {"factor": 8.0}},
              "train": {"max_lr": 1e-05, "steps": 3}, "data": {"texts": ('say "ä"\\', "b"), "weights": (1, 0.5)}}
    read = tomllib.loads(to_toml(tables))
    assert read == {"model": {k: v for k, v in tables["model"].items() if v is not None}, "train": tables["train"],
                    "data": {"texts": ['say "ä"\\', "b"], "weights": [1, 0.5]}}


@pytest.mark.parametrize(("text", "words"), [
    ("[train]\nstep = 5", ["[train] has no entry 'step'", "Did you mean steps", "It knows steps, batch_size"]),
    ("[model]\nlayers = 5", ["[model] has no entry 'layers'", "n_layers"]),
    ("[trian]\nsteps = 5", ["no table 'trian'", "Did you mean train", "[model], [train], [data]"]),
    ("steps = 5", ["no table 'steps'", "an entry stands below one of them"]),
    ('[train]\nsteps = "many"', ["steps in [train] is 'many'", "type int"]),
    ("[train]\nsteps = 1e3", ["steps in [train] is 1000.0", "type int"]),
    ("[train]\nkeep = true", ["keep in [train] is True", "type int"]),
    ('[data]\ntexts = "andersen"', ["texts in [data] is 'andersen'", "tuple[str, ...]"]),
    ("[train]\nsteps = ", ["file.toml is not TOML: Invalid value"]),
    ("[data]\nweights = [1, 2, 3]", ["weights is [1, 2, 3] for 1 texts", "one number above 0 for each"]),
    ('[data]\ntexts = ["folio", "folio"]', ["texts is ['folio', 'folio']", "each once"]),
    ("[train]\nmax_lr = 0", ["max_lr is 0", "above 0"]),
    ("[train]\nmax_lr = -0.1", ["max_lr is -0.1", "above 0"]),
    ('[model]\npreset = "gpt2"', ["no model 'gpt2'", "Did you mean gpt2-"]),
])
def test_a_file_with_nonsense_is_refused_by_what_is_wrong(tmp_path, text, words, capfd):
    (tmp_path / "file.toml").write_text(text)
    assert main(["--config", str(tmp_path / "file.toml"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("ValueError: ") and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "words"), [
    (["--preset", "gpt2-124"], ["no preset 'gpt2-124'", "Did you mean gpt2-124m", "storyteller"]),
    (["--config", "nowhere.toml"], ["FileNotFoundError: There is no settings file nowhere.toml"]),
    (["--data", "andersn"], ["Unknown source 'andersn'", "andersen, shakespeare"]),
    (["--tokenizer", "gpt9"], ["There is no tokenizer 'gpt9'", "gpt2, smollm2, auto or the path"]),
    (["--device", "abacus"], ["abacus", "Use cpu, cuda or mps"]),
    (["--tp", "2", "--fsdp", "3"], ["fsdp 3, tp 2", "is 6 processes, and this is one", "torchrun --nproc-per-node 6"]),
    (["--batch-size", "5000"], ["batch_size is 5000", "windows of 16", "lower batch_size"]),
    (["--context-length", "500", "--model-context-length", "500"], ["held-out text has", "needs 501", "shorten"]),
    (["--context-length", "32", "--model-context-length", "16"], ["context_length is 32", "at most 16"]),
    (["--max-lr", "0"], ["max_lr is 0.0; it must be above 0"]),
    (["--max-lr", "-1"], ["max_lr is -1.0; it must be above 0"]),
    (["--vocab-size", "270", "--tokenizer", "TOKENIZER"], ["tokenizer has 300 ids, the model 270", "--vocab-size 300"]),
    (["--optimizer", "sgd"], ["optimizer is 'sgd'", "muon, adamw"]),
])
def test_bad_input_gets_value_bound_and_mend_and_nothing_is_written(place, straight, given, words, capfd, monkeypatch):
    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    given = [str(straight / "tokenizer.json") if word == "TOKENIZER" else word for word in given]
    assert main(arguments(place, place / "bad", *given)) == 1
    said = capfd.readouterr().err
    assert all(word in said for word in words) and "Traceback" not in said, said
    assert not (place / "bad").exists() or not any((place / "bad").rglob("*.*"))


def test_unknown_flags_are_refused_too(capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["--step", "5"])
    assert stopped.value.code == 2 and "--step" in capfd.readouterr().err


# ---------------------------------------------------------------- tokens


@pytest.fixture
def shards(place, tmp_path):
    """A folder of shards as chapter 2 leaves it, to break."""
    return Path(shutil.copytree(prepare_tokens(place / "texts", 300).folder, tmp_path / "shards"))


def refused(capfd, *given):
    code = main(["--device", "cpu", *map(str, given)])
    said = capfd.readouterr().err
    assert code == 1 and said.startswith("ValueError: "), said
    return said


def test_a_folder_of_shards_is_read_as_it_is(place, shards, straight):
    corpus = prepare_corpus(DataConfig((str(shards),)), None)
    ours = prepare_tokens(place / "texts", 300)
    assert np.array_equal(corpus.train[0], ours.train) and np.array_equal(corpus.val, ours.val)
    assert corpus.val_bytes == ours.val_bytes and isinstance(corpus, Corpus)
    shutil.copy(shards / "train.bin", shards / "train-2.bin")
    shutil.copy(shards / "val.bin", shards / "val-2.bin")
    both = read_shards(shards)
    assert len(both.train) == 2 and len(both.val) == 2 * len(ours.val) and both.val_bytes == 2 * ours.val_bytes


def test_shards_of_another_tokenizer_are_refused(place, shards, tmp_path, capfd):
    other = BPETokenizer.train("quite another text " * 20, 270, [END_OF_TEXT])
    other.save(tmp_path / "other.json")
    said = refused(capfd, "--data", shards, "--tokenizer", tmp_path / "other.json", "--out", tmp_path / "out")
    assert "was written with tokenizer" in said and other.fingerprint()[:12] in said
    other.save(shards / "tokenizer.json")
    assert "was written with tokenizer" in refused(capfd, "--data", shards, "--out", tmp_path / "out")
    (shards / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(capfd, "--data", shards, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_outside_the_vocabulary_are_refused(place, shards, tmp_path, capfd):
    raw = bytearray((shards / "train.bin").read_bytes())
    raw[-100:-98] = (60_000).to_bytes(2, "little")
    (shards / "train.bin").write_bytes(raw)
    said = refused(capfd, *arguments(place, tmp_path / "out"), "--data", shards)
    assert "is 60000; the model's vocabulary has 0 to 299" in said
    (shards / "train.bin").write_bytes(raw[:-51])
    assert "it was cut off" in refused(capfd, *arguments(place, tmp_path / "out"), "--data", shards)


def test_texts_together_with_weights(place, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"text": f"Number {i} of quite another kind of text."}) for i in range(30)))
    data = DataConfig((str(place / "texts"), str(more)), (2, 0.5))
    corpus = prepare_corpus(data, 300)
    assert "Built workspace/tokens/texts-more-300" in capsys.readouterr().out
    again = prepare_corpus(data, 300)
    assert "Using workspace/tokens/texts-more-300" in capsys.readouterr().out
    tales, once_more, some = corpus.train
    assert np.array_equal(tales, once_more) and np.array_equal(tales, again.train[0])
    whole = open_shard(corpus.folder / "train-01-more.bin", corpus.tokenizer)
    assert len(some) == len(whole) // 2 and np.array_equal(some, whole[:len(some)])
    alone = prepare_tokens(place / "texts", 300)
    assert corpus.tokenizer.decode(corpus.val) == alone.tokenizer.decode(alone.val), "held out: of the first text"
    assert corpus.tokenizer.decode(tales) == alone.tokenizer.decode(alone.train)
    assert corpus.tokenizer.decode(whole).startswith("Number 0 of quite"), "all of the second is for training"
    assert corpus.tokenizer.fingerprint() != alone.tokenizer.fingerprint(), "learned from both"
    more.write_text(more.read_text().replace("quite", "not quite"))
    assert len(prepare_corpus(data, 300).train[2]) > len(some)
    assert "Built" in capsys.readouterr().out, "another text is not the same corpus"
    given = prepare_corpus(dataclasses.replace(data, tokenizer=str(alone.folder / "tokenizer.json")), None)
    assert given.tokenizer.fingerprint() == alone.tokenizer.fingerprint() and given.folder != corpus.folder


def test_a_corpus_of_chapter_1_keeps_its_split(place, tmp_path):
    parts = {"train": ["One tale for training."] * 2, "val": ["One that is held out, a longer one."]}
    for side, texts in parts.items():
        (tmp_path / side).mkdir()
        lines = [json.dumps({"id": f"{side}{i}", "text": text, "source": "made"}) for i, text in enumerate(texts)]
        (tmp_path / side / "00000.jsonl").write_text("\n".join(lines))
    corpus = prepare_corpus(DataConfig((str(tmp_path),)), 270)
    assert corpus.tokenizer.decode(corpus.val) == "One that is held out, a longer one." + END_OF_TEXT
    assert corpus.tokenizer.decode(corpus.train[0]) == ("One tale for training." + END_OF_TEXT) * 2


# ---------------------------------------------------------------- checkpoints that do not belong


def test_foreign_and_damaged_checkpoints_are_refused_by_name(place, straight, capfd):
    out = Path(shutil.copytree(straight, place / "foreign"))
    assert "max_lr was 0.005, is 0.1" in refused(capfd, *arguments(place, out, "--max-lr", "0.1"))
    assert "n_layers was 1, is 2" in refused(capfd, *arguments(place, out, "--n-layers", "2"))
    assert "--resume is never" in refused(capfd, *arguments(place, out, "--resume", "never"))
    said = refused(capfd, *arguments(place, out, "--data", place / "texts", "--weights", "2"))
    assert "belongs to other data" in said and "tokens was" in said
    last = checkpoints(out / "checkpoints")[-1]
    raw = bytearray((last / "state.safetensors").read_bytes())
    raw[-5] ^= 1
    (last / "state.safetensors").write_bytes(raw)
    said = refused(capfd, *arguments(place, out))
    assert f"{last.name} cannot be read" in said and "Delete it: training then goes on from the one before" in said
    shutil.rmtree(last)
    assert main(arguments(place, out)) == 0 and final(out)["weights"] == final(straight)["weights"]


# ---------------------------------------------------------------- launch files

LAUNCH = ROOT / "ch05_pretrain" / "launch"


def torchrun_parses(words):
    """What torchrun itself makes of a command, and what is left for the script."""
    from torch.distributed.run import parse_args
    found = parse_args(words)
    assert found.module and found.training_script == "ch05_pretrain.train" and found.rdzv_backend == "c10d"
    return found, read_settings(training_parser().parse_args(found.training_script_args))


def test_the_kubernetes_file_is_a_job_that_torchrun_understands():
    documents = {d["kind"]: d for d in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())}
    job, claim = documents["Job"]["spec"], documents["PersistentVolumeClaim"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    found, tables = torchrun_parses(container["command"][1:])
    assert container["command"][0] == "torchrun" and job["completionMode"] == "Indexed"
    assert int(found.nnodes) == job["completions"] == job["parallelism"]
    assert int(found.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    chosen = training_parser().parse_args(found.training_script_args)
    assert int(found.nnodes) * int(found.nproc_per_node) == max(chosen.dp, 1) * chosen.fsdp * chosen.tp * chosen.pp
    name = documents["Job"]["metadata"]["name"]
    assert found.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29500"
    assert pod["subdomain"] == documents["Service"]["metadata"]["name"]
    assert documents["Service"]["spec"]["selector"] == {"job-name": name}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert found.shutdown_timeout < pod["terminationGracePeriodSeconds"], "time to save before the pod is killed"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert tables["model"]["preset"] == "gpt2-124m" and chosen.out.startswith("/shared/")


@posix
@pytest.mark.parametrize("told_to_go", [False, True])
def test_the_slurm_file_starts_torchrun_and_queues_again(tmp_path, told_to_go):
    """The commands of Slurm are replaced by ones that write down how they were called."""
    assert subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")]).returncode == 0
    stand_ins = {
        "scontrol": 'echo "$@" >> "$CALLS.scontrol"; [ "$1" = show ] && printf "node7\\nnode8\\n"; true',
        "srun": '[ "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" = 1 ] || exit 9\n'  # makes SIGKILL of SIGTERM, as the real one
                'for word in "$@"; do echo "$word" >> "$CALLS.srun"; done\n'
                '[ -n "$LONG" ] || exit 0\n'
                'bash -c \'sleep 20 & trap "touch $CALLS.saved; kill $!; exit 143" TERM; touch $CALLS.task; wait\' &\n'
                'echo $! > "$CALLS.pid"; trap "kill -KILL $!" TERM; wait $! || wait $!',
        "scancel": 'echo "$@" >> "$CALLS.scancel"; kill -TERM "$(cat "$CALLS.pid")"',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
                   "LONG": "yes" if told_to_go else "", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2",
                   "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "42", "SLURM_GPUS_ON_NODE": "8",
                   "SLURM_CPUS_PER_TASK": "32"}
    given = ["--preset", "gpt2-124m", "--data", "a folder", "--fsdp", "16"]
    process = subprocess.Popen(["bash", str(LAUNCH / "slurm.sh"), *given], env=environment)
    if told_to_go:
        wait_for(lambda: (tmp_path / "calls.task").exists())
        process.terminate()
    code = process.wait(30)
    words = (tmp_path / "calls.srun").read_text().splitlines()
    found, tables = torchrun_parses(words[words.index("torchrun") + 1:])
    assert found.rdzv_endpoint == "node7:29500" and found.rdzv_id == "42"
    assert (found.nnodes, found.nproc_per_node) == ("2", "8") and tables["data"]["texts"] == ["a folder"]
    calls = (tmp_path / "calls.scontrol").read_text()
    assert code == (143 if told_to_go else 0) and ("requeue 42" in calls) == told_to_go
    assert (tmp_path / "calls.saved").exists() == told_to_go, "the processes are told to save, and are not killed"
    assert not told_to_go or (tmp_path / "calls.scancel").read_text() == "--signal=TERM 42\n"
    assert "--cpus-per-task=32" in words, "since Slurm 22.05 srun does not take it over"
