"""Many processes: every layout computes what one process computes, goes on from any other's checkpoint, and says so
when it cannot, or when a process is lost. Real processes, gloo, tiny models."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ch04_gpt.gpt import GPT, GPTConfig
from ch05_pretrain.parallelize import (
    Layout,
    Lost,
    ManyProcesses,
    check_layout,
    head_order,
    local,
    micro_batches,
)
from ch05_pretrain.pretrain import (
    History,
    OneProcess,
    Run,
    TokenLoader,
    TrainConfig,
    checkpoints,
    load_checkpoint,
    train,
)

GPT2 = GPTConfig(65, 16, 16, 4, 4)  # biases, learned positions, tied; 65 tokens do not divide by two
LLAMA = GPTConfig(67, 16, 16, 4, 4, n_kv_heads=2, d_ff=24, norm="rmsnorm", mlp="swiglu", position="rope", bias=False,
                  qk_norm=True)
UNTIED = dataclasses.replace(GPT2, tie_embeddings=False)
RUN = TrainConfig(steps=6, batch_size=8, context_length=16, warmup_steps=1, eval_every=3, eval_tokens=150, save_every=3)
ADAMW = dataclasses.replace(RUN, optimizer="adamw")
SPLIT = dataclasses.replace(RUN, split_qkv=True)
PAIRS = [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"pp": 2}]
FOURS = [{"dp": 2, "fsdp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"fsdp": 2, "tp": 2}, {"fsdp": 2, "pp": 2},
         {"tp": 2, "pp": 2}, {"pp": 4}]
name_of = lambda layout: "x".join(f"{name}{n}" for name, n in layout.items())  # noqa: E731


# ---------------------------------------------------------------- processes that wait for work


def serve(rank: int, pipe) -> None:
    """A worker: takes (function, arguments, world size, rendezvous) and answers (ok, result)."""
    torch.set_num_threads(1)
    while True:
        function, arguments, world, meeting = pipe.recv()
        try:
            os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world,
                                    timeout=timedelta(seconds=50))
            answer = True, function(*arguments)
        except BaseException as error:  # noqa: BLE001 - it is told to the test
            answer = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(answer)


class Farm:
    """Processes that have imported PyTorch and wait for functions, so that each test need not start its own."""

    def __init__(self, size: int, folder: Path):
        self.folder, self.calls = folder, 0
        self.pipes, self.processes = [None] * size, [None] * size
        for rank in range(size):
            self.hire(rank)

    def hire(self, rank: int) -> None:
        context = mp.get_context("spawn")
        self.pipes[rank], there = context.Pipe()
        self.processes[rank] = context.Process(target=serve, args=(rank, there), daemon=True)
        self.processes[rank].start()
        there.close()  # so that a process that ends is noticed

    def start(self, world: int, function, *arguments) -> None:
        """Let the first ``world`` processes begin. One that ended after its last answer is replaced."""
        self.calls += 1
        for rank, process in enumerate(self.processes[:world]):
            if not process.is_alive():
                warnings.warn(f"process {rank} ended between two calls: exit code {process.exitcode}", stacklevel=2)
                self.hire(rank)
        for pipe in self.pipes[:world]:
            pipe.send((function, arguments, world, self.folder / f"meeting-{self.calls}"))

    def answer(self, rank: int, seconds: float = 240):
        """(ok, result) of one process."""
        assert self.pipes[rank].poll(seconds), f"process {rank} said nothing for {seconds} s"
        return self.pipes[rank].recv()

    def run(self, world: int, function, *arguments) -> list:
        """The results of all; an error of one fails the test."""
        self.start(world, function, *arguments)
        answers = [self.answer(rank) for rank in range(world)]
        for ok, result in answers:
            assert ok, result
        return [result for _, result in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def test_the_farm_replaces_a_process_that_ended_between_two_calls(tmp_path):
    made = Farm(2, tmp_path)
    try:
        assert made.run(2, os.getpid) == [process.pid for process in made.processes]
        made.processes[1].kill()
        made.processes[1].join()
        with pytest.warns(UserWarning, match="process 1 ended between two calls: exit code -9"):
            assert made.run(2, os.getpid) == [process.pid for process in made.processes]
        made.start(2, os._exit, 3)
        with pytest.raises(EOFError):  # but in the middle of its work is another matter
            made.answer(0)
    finally:
        made.close()


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    made = Farm(4, tmp_path_factory.mktemp("farm"))
    yield made
    made.close()


# ---------------------------------------------------------------- one process and many, side by side


def build(config: GPTConfig, frozen: tuple[str, ...] = ()) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen or ("-",)))
        with torch.no_grad():
            if parameter.dim() == 1:  # not all ones and zeros, and no two the same
                torch.nn.init.normal_(parameter, 0.5, 0.2)
            else:  # large enough for attention to look at something
                parameter.mul_(8)
    return model


def text() -> np.ndarray:
    return (np.arange(3000) ** 2 // 7 % 61).astype(np.uint16)  # something that can be learned


def steps_of(engine, config: GPTConfig, run: TrainConfig, frozen=(), steps: int = 3) -> dict:
    """Losses, lengths of gradients, the first gradients and the last weights, whole and by name."""
    model = engine.prepare(build(config, frozen), run)
    optimizer = engine.optimizer(model, run)
    loader = TokenLoader(text(), run.batch_size, run.context_length, rank=engine.rank, ranks=engine.ranks)
    named = engine._named if isinstance(engine, ManyProcesses) else lambda model: model.named_parameters()

    def whole(name, tensor):
        if isinstance(engine, ManyProcesses):
            tensor = engine._model_order(name, tensor)
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()  # clipped later

    told = {"losses": [], "norms": []}
    for step in range(steps):
        optimizer.zero_grad()
        told["losses"].append(engine.forward_backward(model, *loader.next(), run))
        if step == 0:
            told["gradients"] = {n: whole(n, p.grad) for n, p in named(model) if p.grad is not None}
            for name, parameter in model.named_parameters():
                if isinstance(parameter.grad, DTensor):
                    assert parameter.grad.placements == parameter.placements, name
        told["norms"].append(engine.clip(model.parameters(), 0.5))
        optimizer.step()
    told["weights"] = {n: whole(n, p.detach()) for n, p in named(model)}
    told["held out"] = engine.evaluate(model, text()[:150], run).loss
    return told


def many_steps(layouts: list[dict], *arguments) -> list[dict]:
    return [steps_of(ManyProcesses(**layout), *arguments) for layout in layouts]


def assert_same(many: list[dict], one: dict) -> None:
    """All that the processes hold together is what one process has, and each holds the same where both hold it."""
    for told in many:
        for name in ("losses", "norms", "held out"):
            np.testing.assert_allclose(told[name], one[name], rtol=1e-5, err_msg=name)
        for kind, tolerance in (("gradients", 1e-5), ("weights", 1e-4)):
            for name, value in told[kind].items():
                if kind == "weights" and name.endswith("w_qkv.bias"):
                    continue  # a bias of all keys changes no softmax: its gradient is rounding; Adam makes it steps
                error = (value - one[kind][name]).norm() / one[kind][name].norm().clamp(min=1e-4)
                assert error < tolerance, f"{kind} of {name}: {error}"
    for kind in ("gradients", "weights"):
        assert {name for told in many for name in told[kind]} == set(one[kind])


@pytest.fixture(scope="module")
def references():
    """What one process does, by case."""
    return {}


CASES = {
    "gpt2": (GPT2, RUN, ()),
    "llama": (LLAMA, RUN, ()),
    "llama, queries, keys and values apart": (LLAMA, SPLIT, ()),
    "untied, frozen, adamw": (UNTIED, ADAMW, ("token_embedding", "blocks.1.", "lm_head")),
    "frozen tied, accumulated": (LLAMA, dataclasses.replace(RUN, accumulate=2),
                                 ("token_embedding", "blocks.0.attention")),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(farm, case):
    config, run, frozen = CASES[case]
    one = steps_of(OneProcess(), config, run, frozen)
    told = farm.run(2, many_steps, PAIRS, config, run, frozen)
    for number, _ in enumerate(PAIRS):
        assert_same([process[number] for process in told], one)


@pytest.mark.parametrize("layout", FOURS, ids=name_of)
def test_four_processes_are_one(farm, references, layout):
    run = SPLIT if layout == {"fsdp": 2, "tp": 2} else RUN
    one = references.setdefault(run, steps_of(OneProcess(), LLAMA, run))
    told = farm.run(4, many_steps, [layout], LLAMA, run)
    assert_same([process[0] for process in told], one)


def test_bfloat16_is_that_of_one_process(farm):
    run = dataclasses.replace(RUN, precision="bfloat16")
    one, full = (steps_of(OneProcess(), GPT2, choice, (), 1)["losses"][0] for choice in (run, RUN))
    for process in farm.run(2, many_steps, PAIRS, GPT2, run, (), 1):
        for layout, told in zip(PAIRS, process, strict=True):
            allowed = 1e-4 if "tp" in layout else 0.5 * abs(full - one)  # tp rounds parts of sums; not float32's
            assert abs(told["losses"][0] - one) < allowed, layout


# ---------------------------------------------------------------- who holds what


def holdings(layout: dict, config: GPTConfig) -> dict:
    engine = ManyProcesses(**layout)
    model = engine.prepare(build(config), RUN)
    optimizer = engine.optimizer(model, RUN)
    x = torch.zeros(8 // engine.ranks, 16, dtype=torch.long)
    engine.forward_backward(model, x, x, RUN)
    optimizer.step()
    state = sum(local(t).numel() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    return {"weights": sum(local(p).numel() for p in model.parameters()), "state": state,
            "names": [name for name, _ in model.named_parameters()]}


def test_fsdp_and_pipeline_share_out_the_memory(farm):
    whole = sum(p.numel() for p in build(LLAMA).parameters())
    everything = farm.run(2, holdings, {"dp": 2}, LLAMA)
    assert [process["weights"] for process in everything] == [whole, whole]
    slices = farm.run(2, holdings, {"fsdp": 2}, LLAMA)
    assert sum(process["weights"] for process in slices) == whole
    assert abs(slices[0]["weights"] - slices[1]["weights"]) < 0.05 * whole
    assert sum(process["state"] for process in slices) == everything[0]["state"]  # the optimizer's too
    first, last = farm.run(2, holdings, {"pp": 2}, LLAMA)
    assert first["weights"] + last["weights"] == whole + 67 * 16  # the tied embedding stands at both ends
    assert "blocks.1.norm1.weight" in first["names"] and "blocks.2.norm1.weight" in last["names"]
    assert not set(first["names"]) & set(last["names"])
    cut = farm.run(2, holdings, {"tp": 2}, LLAMA)
    norms = sum(p.numel() for n, p in build(LLAMA).named_parameters() if p.dim() == 1)
    assert sum(process["weights"] for process in cut) == whole + norms


def test_attention_is_cut_by_whole_heads():
    order = head_order(n_heads=4, n_kv_heads=2, head_dim=3, tp=2)
    rows = [f"{kind}{head}" for kind, n in (("q", 4), ("k", 2), ("v", 2)) for head in range(n) for _ in range(3)]
    reordered = [rows[i] for i in order]
    assert reordered[:12:3] == ["q0", "q1", "k0", "v0"] and reordered[12::3] == ["q2", "q3", "k1", "v1"]
    assert sorted(order.tolist()) == list(range(24))
    assert torch.equal(head_order(4, 2, 3, 1), torch.arange(24))


# ---------------------------------------------------------------- checkpoints


def train_until(layout: dict, config: GPTConfig, run: TrainConfig, folder: Path, end: int | None = None) -> dict:
    """A run, stopped after step ``end`` of this call; its history, and whether rank 0 alone wrote the model."""
    engine, asked = ManyProcesses(**layout), []
    history = train(build(config), text(), text()[:200], run, folder=folder, engine=engine,
                    stop=lambda: asked.append(1) or len(asked) == end)
    engine.export(None, folder / "export")
    return dataclasses.asdict(history)


@pytest.mark.parametrize(("config", "run", "first", "then"), [
    (LLAMA, SPLIT, (2, {"tp": 2}), [(4, {"fsdp": 2, "tp": 2}), (1, {}), (2, {"pp": 2})]),
    (GPT2, RUN, (2, {"fsdp": 2}), [(4, {"dp": 2, "tp": 2}), (2, {"fsdp": 2})]),
    (LLAMA, RUN, (2, {"pp": 2}), [(4, {"tp": 2, "pp": 2}), (1, {})]),
    (LLAMA, SPLIT, None, [(2, {"tp": 2}), (4, {"dp": 2, "pp": 2})]),  # begun by one process alone
], ids=["tp", "fsdp", "pp", "one process"])
def test_another_number_of_processes_goes_on(farm, tmp_path, config, run, first, then):
    whole = build(config)
    reference = dataclasses.asdict(train(whole, text(), text()[:200], run))
    if first is None:
        asked = []
        train(build(config), text(), text()[:200], run, folder=tmp_path / "begun",
              stop=lambda: asked.append(1) or len(asked) == 3)
    else:
        farm.run(first[0], train_until, first[1], config, run, tmp_path / "begun", 3)
        files = {path.name for path in (tmp_path / "begun" / "step-000003").iterdir()}
        assert "state.json" in files and len(files) == 1 + first[0]  # one file a process, no pickle
        assert all(name.endswith((".json", ".safetensors")) for name in files)
    for number, (world, layout) in enumerate(then):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "begun", folder)
        history = farm.run(world, train_until, layout, config, run, folder)[0]
        assert history["steps"] == reference["steps"]
        for name in ("train_loss", "grad_norm", "val_loss"):
            np.testing.assert_allclose(history[name], reference[name], rtol=2e-5, err_msg=f"{layout} {name}")
        weights = load_file(folder / "export" / "model.safetensors")
        whole.save_pretrained(tmp_path / "expected")
        expected = load_file(tmp_path / "expected" / "model.safetensors")
        for name, value in expected.items():
            if name.endswith("c_attn.bias"):  # see assert_same
                continue
            assert (weights[name] - value).norm() / value.norm() < 1e-4, f"{layout} {name}"


def test_a_checkpoint_of_the_first_format_goes_on_in_many_processes(farm, tmp_path):
    reference = dataclasses.asdict(train(build(LLAMA), text(), text()[:200], RUN))
    asked = []
    train(build(LLAMA), text(), text()[:200], RUN, folder=tmp_path, stop=lambda: asked.append(1) or len(asked) == 3)
    path = checkpoints(tmp_path)[-1] / "state.json"
    record = {name: value for name, value in json.loads(path.read_text()).items()
              if name not in ("loader", "engine", "sha256")} | {"format": "bytes-to-chat checkpoint 1"}
    path.write_text(json.dumps(record))
    history = farm.run(2, train_until, {"fsdp": 2}, LLAMA, RUN, tmp_path)[0]
    np.testing.assert_allclose(history["train_loss"], reference["train_loss"], rtol=2e-5)


def test_checkpoints_are_whole_or_not_there_and_the_last_ones_stay(farm, tmp_path):
    run = dataclasses.replace(RUN, steps=8, save_every=1, eval_every=100, keep=2)
    (tmp_path / ".step-000007.part").mkdir()  # of a run that was killed while saving
    farm.run(2, train_until, {"fsdp": 2}, LLAMA, run, tmp_path)
    kept = [path.name for path in checkpoints(tmp_path)]
    assert kept[-2:] == ["step-000007", "step-000008"] and len(kept) <= 3  # and the best
    assert not list(tmp_path.glob(".*"))
    record = json.loads((tmp_path / "step-000008" / "state.json").read_text())
    assert record["layout"] == {"dp": 1, "fsdp": 2, "tp": 1, "pp": 1} and len(record["sha256"]) == 2


def failing_save(folder: Path) -> str:
    engine = ManyProcesses(fsdp=2)
    model = engine.prepare(build(LLAMA), RUN)
    optimizer = engine.optimizer(model, RUN)
    loader = TokenLoader(text(), RUN.batch_size, RUN.context_length, rank=engine.rank, ranks=engine.ranks)
    arguments = (folder, model, optimizer, 1, loader, RUN, History())
    engine.save(*arguments)
    if dist.get_rank() == 1:  # on this process alone the disk is full
        import torch.distributed.checkpoint as dcp

        def no_space(*given, **options):
            raise OSError(28, "No space left on device")
        before, dcp.HuggingFaceStorageWriter.write_data = dcp.HuggingFaceStorageWriter.write_data, no_space
    try:
        engine.save(folder, model, optimizer, 2, *arguments[4:])
    except OSError as error:
        return str(error)
    finally:
        if dist.get_rank() == 1:
            dcp.HuggingFaceStorageWriter.write_data = before
    return "saved"


def test_a_full_disk_of_one_process_is_told_by_all_and_the_last_checkpoint_stays(farm, tmp_path):
    for message in farm.run(2, failing_save, tmp_path):
        assert "the disk is full" in message and "COURSE_WORKSPACE" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def load_after(folder: Path, config: GPTConfig, run: TrainConfig) -> str:
    try:
        train_until({"fsdp": 2}, config, run, folder)
    except ValueError as error:
        return str(error)
    return "went on"


def test_foreign_and_damaged_checkpoints_are_refused_by_every_process(farm, tmp_path):
    farm.run(2, train_until, {"tp": 2}, LLAMA, RUN, tmp_path, 3)
    for message in farm.run(2, load_after, tmp_path, dataclasses.replace(LLAMA, d_ff=32), RUN):
        assert "d_ff was 24, is 32" in message
    for message in farm.run(2, load_after, tmp_path, LLAMA, dataclasses.replace(RUN, seed=5)):
        assert "seed was 0, is 5" in message
    file = sorted((tmp_path / "step-000003").glob("*.safetensors"))[1]
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    for message in farm.run(2, load_after, tmp_path, LLAMA, RUN):
        assert file.name in message and "Delete it" in message
    file.unlink()
    for message in farm.run(2, load_after, tmp_path, LLAMA, RUN):
        assert file.name in message and "Delete it" in message
    model = build(LLAMA)
    with pytest.raises(ValueError, match="cannot be read|several processes"):
        load_checkpoint(tmp_path / "step-000003", model, OneProcess().optimizer(model, RUN),
                        TokenLoader(text(), 8, 16), RUN)


def begin_differently(layout: dict) -> dict:
    engine = ManyProcesses(**layout)
    model = build(LLAMA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dist.get_rank())  # as if every process had drawn its own
    engine.prepare(model, RUN)
    whole = engine._whole_model()
    return {} if whole is None else {name: p.detach() for name, p in whole.named_parameters()}


@pytest.mark.parametrize("layout", PAIRS, ids=name_of)
def test_all_begin_with_the_weights_of_the_first_process(farm, layout):
    first, other = farm.run(2, begin_differently, layout)
    assert not other  # the whole model is made by one process only
    for name, parameter in build(LLAMA).named_parameters():
        assert torch.equal(first[name], parameter), name


def train_with_dropout(layout: dict, folder: Path, ends: list) -> list:
    """The losses of a run with dropout, stopped at each of ``ends``; its samples."""
    config, samples = dataclasses.replace(LLAMA, dropout=0.3), []
    for end in ends:
        asked = []
        history = train(build(config), text(), text()[:200], dataclasses.replace(RUN, sample_every=2), folder=folder,
                        engine=ManyProcesses(**layout),
                        stop=lambda end=end, asked=asked: asked.append(1) or len(asked) == end,
                        sample=lambda model: f"{type(model).__name__} {list(model(torch.zeros(1, 4).long()).shape)}",
                        on_log=lambda name, step, value: samples.append(value) if name == "sample" else None)
    return [history.train_loss, samples]


@pytest.mark.parametrize("layout", [{"fsdp": 2}, {"pp": 2}], ids=name_of)
def test_dropout_goes_on_where_it_was_and_differs_between_shares(farm, tmp_path, layout):
    (whole, samples), (others, no_samples) = farm.run(2, train_with_dropout, layout, tmp_path / "whole", [0])
    (resumed, _), _ = farm.run(2, train_with_dropout, layout, tmp_path / "parts", [2, 2, 0])
    assert whole == resumed == others
    assert samples == ["GPT [1, 4, 67]"] * 3 and not no_samples


def dropped(layout: dict, folder: Path | None) -> set[bytes]:
    """Which positions this process drops in one step, a mask for each time; with a folder, after resuming there."""
    run = Run(build(dataclasses.replace(LLAMA, dropout=0.3)), text(), RUN, ManyProcesses(**layout), folder)
    assert run.resume() == (folder is not None)
    masks = set()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, given, output: masks.add((output == 0).numpy().tobytes()))
    run.model.train()
    run.step()
    return masks


def test_no_stage_drops_what_another_drops(farm, tmp_path):
    train(build(dataclasses.replace(LLAMA, dropout=0.3)), text(), text()[:200], RUN, folder=tmp_path, stop=lambda: True)
    for folder in (None, tmp_path):
        first, last = farm.run(2, dropped, {"pp": 2}, folder)
        assert len(first) >= 8 <= len(last) and not first & last


# ---------------------------------------------------------------- bad input, bad luck


@pytest.mark.parametrize(("processes", "choice", "said"), [
    (4, {"tp": 3}, "tp 3 x pp 1 has 3 places, but there are 4 processes: fsdp x tp x pp = 3 must divide 4"),
    (4, {"dp": 1, "tp": 2}, "--dp 2 would do"),
    (2, {"dp": 4}, "--nproc-per-node 4"),
    (2, {"pp": 0}, "pp is 0; it must be a whole number of at least 1"),
    (2, {"dp": -1}, "dp is -1"),
])
def test_a_mesh_must_multiply_to_the_processes(monkeypatch, processes, choice, said):
    monkeypatch.setenv("WORLD_SIZE", str(processes))  # nobody else is started: it must not wait for them
    with pytest.raises(ValueError) as error:
        ManyProcesses(**choice)
    assert said in str(error.value)


def test_what_is_left_goes_to_data_parallel():
    assert Layout.of(8, tp=2) == Layout(dp=4, tp=2)
    assert Layout.of(8, 0, 2, 2, 2) == Layout(1, 2, 2, 2)
    assert Layout.of(6).data_ranks == 6


@pytest.mark.parametrize(("layout", "model", "run", "said"), [
    (Layout(tp=3), {}, {}, "n_heads is 4, which tp 3 does not divide: choose tp from 1, 2, 4"),
    (Layout(tp=4), {}, {}, "n_kv_heads is 2, which tp 4 does not divide: choose tp from 1, 2"),
    (Layout(tp=2), {"d_ff": 25}, {}, "d_ff is 25, which tp 2 does not divide"),
    (Layout(tp=2), {"dropout": 0.1}, {}, "dropout is 0.1 with tp 2"),
    (Layout(pp=5), {}, {}, "pp is 5, but there are 4 blocks"),
    (Layout(dp=2), {}, {"precision": "float16"}, "choose bfloat16"),
    (Layout(dp=3), {}, {}, "batch_size is 8, to be cut in 3 data ranks x 1 micro-batches: make it a multiple of 3"),
    (Layout(dp=2), {}, {"accumulate": 3}, "make it a multiple of 6"),
    (Layout(pp=2), {}, {"accumulate": 5}, "make it a multiple of 5"),
])
def test_what_cannot_be_spread_is_refused(layout, model, run, said):
    with pytest.raises(ValueError) as error:
        check_layout(layout, dataclasses.replace(LLAMA, **model), dataclasses.replace(RUN, **run))
    assert said in str(error.value)


def test_a_pipeline_takes_up_to_four_micro_batches_a_stage():
    assert micro_batches(Layout(pp=2), RUN) == 8
    assert micro_batches(Layout(pp=2), dataclasses.replace(RUN, batch_size=22)) == 2
    assert micro_batches(Layout(dp=4, pp=2), RUN) == 2
    assert micro_batches(Layout(pp=2), dataclasses.replace(RUN, accumulate=4)) == 4
    assert micro_batches(Layout(dp=2), RUN) == 1


def one_nan(layout: dict, where: str) -> tuple[str, bool]:
    engine = ManyProcesses(**layout)
    model = build(LLAMA)
    if where == "weight":
        torch.nn.init.constant_(model.blocks[3].mlp.w_up.weight, torch.nan)
    model = engine.prepare(model, RUN)
    tokens = torch.zeros(8 // engine.ranks, 16, dtype=torch.long)
    return (engine.first_bad_module(model, tokens, tokens, RUN),
            engine.any(dist.get_rank() == 1), engine.any(False))


def test_the_first_bad_module_is_named_by_all(farm):
    for layout, process in (({"dp": 2}, 0), ({"tp": 2}, 0), ({"pp": 2}, 1)):
        for told, one_says_so, none_says_so in farm.run(2, one_nan, layout, "weight"):
            assert told == f"the output of blocks.3.mlp.w_up on process {process}"
            assert one_says_so and not none_says_so
    assert farm.run(2, one_nan, {"fsdp": 2}, "nowhere") == [("", True, False)] * 2


def work_on(folder: Path, timeout: float) -> float:
    """Steps until another process is lost, telling by a file that they have begun; how long it took to notice."""
    engine = ManyProcesses(dp=0, timeout=timeout)
    model = engine.prepare(build(GPT2), dataclasses.replace(RUN, batch_size=engine.ranks))
    tokens = torch.zeros(1, 16, dtype=torch.long)
    for step in range(100_000):
        before = time.monotonic()
        if step == 3:
            (folder / f"{dist.get_rank()} steps").touch()
        try:
            engine.forward_backward(model, tokens, tokens, dataclasses.replace(RUN, batch_size=engine.ranks))
        except Lost as error:
            assert "lost another process" in str(error) and "goes on from the last checkpoint" in str(error)
            return time.monotonic() - before
    raise AssertionError("nobody was lost")


def wait_for(folder: Path, processes: int) -> None:
    """Until so many have made their first steps."""
    end = time.monotonic() + 200
    while len(list(folder.glob("* steps"))) < processes:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(os.name != "posix", reason="SIGSTOP is POSIX")
def test_the_others_end_when_a_process_hangs_or_dies(tmp_path):
    farm = Farm(3, tmp_path)
    try:
        for world, timeout, sent in ((3, 4.0, signal.SIGSTOP), (2, 50.0, signal.SIGKILL)):
            folder = tmp_path / str(world)
            folder.mkdir()
            farm.start(world, work_on, folder, timeout)
            wait_for(folder, world)
            os.kill(farm.processes[world - 1].pid, sent)  # it hangs, and is waited for 4 s; or dies, seen at once
            for rank in range(world - 1):
                ok, noticed = farm.answer(rank, 100)
                assert ok, noticed
                assert noticed < 30
    finally:
        farm.close()


def test_torchrun_starts_it(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import json, torch\n"
        "from test_ch05_parallel import *\n"
        "engine = ManyProcesses(tp=2, device='cpu')\n"
        "history = train(build(LLAMA), text(), text()[:200], RUN, engine=engine)\n"
        "engine.barrier()\n"
        "if engine.is_main: print('told', json.dumps(history.train_loss))\n"
        "engine.close()\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(ROOT),
         str(ROOT / "tests")], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.split("told", 1)[1])
    np.testing.assert_allclose(told, train(build(LLAMA), text(), text()[:200], RUN).train_loss, rtol=2e-5)
