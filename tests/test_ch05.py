"""Chapter 5: the loss, the optimizer, the loop, and what happens when the power goes."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from ch04_gpt.gpt import GPT, GPTConfig
from ch05_pretrain import pretrain
from ch05_pretrain.pretrain import (
    AdamW,
    Muon,
    NGramModel,
    TrainConfig,
    checkpoints,
    clip_grad_norm,
    cosine_schedule,
    cross_entropy,
    evaluate,
    load_storyteller,
    measures,
    orthogonalize,
    parameter_groups,
    pretrain_storyteller,
    save_checkpoint,
    train,
)

TINY = GPTConfig(60, 16, 32, 2, 2, d_ff=64, norm="rmsnorm", mlp="swiglu", position="rope", bias=False, dropout=0.1)
SHORT = TrainConfig(steps=12, batch_size=2, context_length=16, warmup_steps=2, eval_every=4, eval_tokens=64,
                    save_every=3)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(TINY, **changes))


@pytest.fixture
def tokens():
    return torch.randint(60, (600,), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------- loss and measures


def test_cross_entropy_is_torchs_with_gradients_and_large_logits():
    for scale in (1.0, 1e4):
        logits = (scale * torch.randn(3, 7, 11)).requires_grad_()
        targets = torch.randint(11, (3, 7))
        ours, theirs = cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0])
    with pytest.raises(ValueError, match=r"\(3, 7, 11\) need targets \(3, 7\), not \(3, 6\)"):
        cross_entropy(logits, targets[:, :-1])


def test_measures_are_one_loss_in_three_units():
    result = measures(math.log(256), 10, 10)
    assert result.perplexity == pytest.approx(256) and result.bits_per_byte == pytest.approx(8)
    assert measures(math.log(4), 5, 20).bits_per_byte == pytest.approx(0.5)
    assert measures(1.0, 5, None).bits_per_byte is None


def test_evaluate_predicts_every_token_once(tokens):
    model = tiny().train()
    for n in (2, 16, 17, 18, 100, 600):
        x = torch.tensor(tokens[:n].astype(np.int64))
        losses = []
        for start in range(0, n - 1, 16):  # one window after the other, by hand
            window = x[start : start + 17]
            with torch.no_grad():
                logits = model.eval()(window[None, :-1])[0]
            losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
        assert len(losses) == n - 1
        model.train()
        result = evaluate(model, tokens[:n], n_bytes=3 * n, batch_size=4)
        assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 3, rel=1e-6)
        assert model.training
    assert evaluate(model, tokens, max_tokens=50).loss == pytest.approx(evaluate(model, tokens[:50]).loss)
    with pytest.raises(ValueError, match="1 tokens leave nothing to predict: give at least 2"):
        evaluate(model, tokens[:1])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_probabilities_add_up_to_one(order, tokens):
    model = NGramModel(tokens % 12, order, vocab_size=15)
    for context in ((), (3,), (14,), (3, 4), (14, 14)):
        if len(context) < order:
            assert sum(model.probability(t, context) for t in range(15)) == pytest.approx(1)


def test_ngram_by_hand_and_against_more_context():
    model = NGramModel([0, 1, 0, 1, 0, 2], 2, 4, discount=0.5)
    unigram_of_1 = (2 - 0.5) / 6 + 0.5 * 3 / 6 / 4
    assert model.probability(1, ()) == pytest.approx(unigram_of_1)
    assert model.probability(1, (0,)) == pytest.approx((2 - 0.5) / 3 + 0.5 * 2 / 3 * unigram_of_1)
    repeating = [0, 1, 2, 1] * 50
    losses = [NGramModel(repeating, order, 3).loss(repeating) for order in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2]
    with pytest.raises(ValueError, match="order is 0"):
        NGramModel([1, 2], 0, 3)


# ---------------------------------------------------------------- optimization


def test_adamw_is_torchs_over_a_thousand_steps():
    models = [tiny(dropout=0.0) for _ in range(2)]
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizers = [AdamW(parameter_groups(models[0], 0.1), **options),
                  torch.optim.AdamW(parameter_groups(models[1], 0.1), **options)]
    for step in range(1000):
        torch.manual_seed(step)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = torch.randn_like(p) * (1 + step % 7)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="lr is -1"):
        AdamW(models[0].parameters(), lr=-1)


def test_weight_decay_pulls_on_matrices_only():
    model = tiny()
    groups = parameter_groups(model, 0.1, matrix_lr_scale=4.0)
    assert [{p.dim() for p in g["params"]} for g in groups] == [{2}, {2}, {1}]
    assert [g["orthogonal"] for g in groups] == [True, False, False] and groups[0]["lr_scale"] == 4.0
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    before, matrix = model.norm.weight.clone(), model.token_embedding.weight.clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    AdamW(groups, lr=0.1).step()
    assert torch.equal(model.norm.weight, before)
    torch.testing.assert_close(model.token_embedding.weight, matrix * (1 - 0.1 * 0.1))


@pytest.mark.parametrize("shape", [(8, 8), (64, 16), (16, 64)])
def test_orthogonalize_keeps_directions_and_equalises_strengths(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 0.1
    result = orthogonalize(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    strengths = left.T @ result @ right.T  # diagonal if the singular vectors are the same
    torch.testing.assert_close(strengths, torch.diag(strengths.diagonal()), atol=1e-3, rtol=0)
    assert strengths.diagonal().min() > 0.4 and strengths.diagonal().max() < 1.3


def test_muon_is_torchs_and_leaves_other_groups_to_adamw():
    """torch runs the iteration in bfloat16, so the comparison is as wide as that."""
    torch.manual_seed(0)
    start = torch.randn(24, 16)
    ours, theirs, vector, twin = (t.clone().requires_grad_() for t in (start, start, start[0], start[0]))
    options = {"lr": 0.02, "weight_decay": 0.1}
    muon = Muon([{"params": [ours], "orthogonal": True}, {"params": [vector]}], **options)
    reference = torch.optim.Muon([theirs], **options)
    adamw = torch.optim.AdamW([twin], betas=(0.9, 0.95), **options)
    for _ in range(10):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        vector.grad = torch.randn_like(vector)
        twin.grad = vector.grad.clone()
        for optimizer in (muon, reference, adamw):
            optimizer.step()
    moved = (theirs - start).detach().flatten(), (ours - start).detach().flatten()
    assert torch.cosine_similarity(*moved, dim=0) > 0.999
    assert moved[1].norm().item() == pytest.approx(moved[0].norm().item(), rel=0.02)
    torch.testing.assert_close(vector, twin)


def test_clipping_is_torchs_and_leaves_short_gradients_alone():
    for scale in (1e-3, 1e3):
        models = [tiny() for _ in range(2)]
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = torch.randn_like(p) * scale
            q.grad = p.grad.clone()
        ours = clip_grad_norm(models[0].parameters(), 1.0)
        assert ours == pytest.approx(torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0).item(), rel=1e-5)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_schedule_warms_up_and_ends_low():
    rates = [cosine_schedule(s, 1.0, 0.1, 10, 100) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert all(b > a for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(b < a for a, b in zip(rates[10:100], rates[11:101], strict=True))
    assert rates[100] == pytest.approx(0.1) and rates[55] == pytest.approx(0.55)
    assert cosine_schedule(500, 1.0, 0.1, 10, 100) == pytest.approx(0.1)
    assert cosine_schedule(0, 1.0, 0.1, 0, 100) == 1.0


def test_training_learns_and_records(tokens):
    pattern = np.tile(np.arange(8, dtype=np.uint16), 100)
    seen = []
    history = train(tiny(dropout=0.0), pattern, pattern, dataclasses.replace(SHORT, steps=60),
                    on_log=lambda name, step, value: seen.append((name, step)))
    assert history.train_loss[0] == pytest.approx(math.log(60), abs=0.3)
    assert history.train_loss[-1] < 0.5 and history.val_loss[-1] < 0.5
    assert history.steps == list(range(1, 61)) and history.eval_steps == list(range(4, 61, 4))
    assert ("training", 60) in seen and ("held out", 60) in seen


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("cut", [3, 4, 8, 11])
def test_a_resumed_run_is_bitwise_the_same_run(tokens, tmp_path, cut, monkeypatch):
    """Dropout is on, so both random states matter. The run is cut after any step, not only after a save."""
    straight = tiny(1)
    expected = train(straight, tokens, tokens, SHORT)

    class PowerCut(Exception):
        pass

    original = pretrain.train_step

    def until_the_cut(model, optimizer, tokens, config, step, generator):
        if step == cut:
            raise PowerCut
        return original(model, optimizer, tokens, config, step, generator)

    monkeypatch.setattr(pretrain, "train_step", until_the_cut)
    with pytest.raises(PowerCut):
        train(tiny(1), tokens, tokens, SHORT, folder=tmp_path)
    monkeypatch.undo()
    assert [p.name for p in checkpoints(tmp_path)][-1] == f"step-{cut // 3 * 3:06}"
    resumed = tiny(2)
    seen = []
    history = train(resumed, tokens, tokens, SHORT, folder=tmp_path, on_log=lambda *entry: seen.append(entry[:2]))
    assert same(straight, resumed) and history == expected
    assert sorted(seen) == [("held out", 4), ("held out", 8), ("held out", 12), ("training", 10)], "curves are whole"


RUN = """
import sys; sys.path.insert(0, {root!r})
import numpy as np, torch
from tests.test_ch05 import SHORT, tiny
from ch05_pretrain.pretrain import train, dataclasses
tokens = torch.randint(60, (600,), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)
model = tiny(int(sys.argv[2]))
print('started', flush=True)
train(model, tokens, tokens, dataclasses.replace(SHORT, steps=250, save_every=5, eval_every=250), folder=sys.argv[1])
print('finished', flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_killed_at_any_moment_it_ends_with_the_same_weights(tokens, tmp_path):
    """A real process, SIGKILL at unforeseeable moments (in the middle of a save too), started again each time."""
    script = RUN.format(root=str(ROOT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    random = np.random.default_rng(0)
    for attempt in range(30):
        seed = attempt + 2 if checkpoints(tmp_path) else 1  # what a checkpoint holds must not depend on the start
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(seed)], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        assert process.stdout.readline() == "started\n"
        if attempt < 4:
            time.sleep(float(random.uniform(0.2, 1.2)))
            process.send_signal(signal.SIGKILL)
        if "finished" in process.communicate(timeout=120)[0]:
            break
    config = dataclasses.replace(SHORT, steps=250, save_every=5, eval_every=250)
    straight, resumed = tiny(1), tiny(99)
    train(straight, tokens, tokens, config)
    train(resumed, tokens, tokens, config, folder=tmp_path)  # nothing left to do: loads the last state
    assert same(straight, resumed)


@pytest.mark.parametrize("where", ["get_batch", "clip_grad_norm"])
def test_interrupted_in_the_middle_of_a_step_it_is_still_the_same_run(tokens, tmp_path, capsys, monkeypatch, where):
    """Ctrl-C may come when the batch is drawn but the step is not done: such a half step must not be saved."""
    straight, calls, original = tiny(1), [], getattr(pretrain, where)
    train(straight, tokens, tokens, SHORT)

    def interrupted(*arguments):
        result = original(*arguments)
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(pretrain, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(1), tokens, tokens, SHORT, folder=tmp_path)
    monkeypatch.undo()
    assert checkpoints(tmp_path)[-1].name == "step-000006"
    assert "Stopped in step 8. Run this again to go on from the last checkpoint." in capsys.readouterr().out
    resumed = tiny(2)
    train(resumed, tokens, tokens, SHORT, folder=tmp_path)
    assert same(straight, resumed)


def test_a_full_disk_keeps_the_checkpoint_before(tokens, tmp_path, monkeypatch):
    train(tiny(), tokens, tokens, dataclasses.replace(SHORT, steps=3), folder=tmp_path)
    before = checkpoints(tmp_path)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrain, "save_file", full)
    model = tiny()
    with pytest.raises(OSError, match="the disk is full.*COURSE_WORKSPACE.*unchanged"):
        save_checkpoint(tmp_path, model, AdamW(model.parameters()), 6, torch.Generator(), SHORT, pretrain.History())
    assert checkpoints(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == [before[0].name]


def test_foreign_and_damaged_checkpoints_are_refused_by_name(tokens, tmp_path):
    config = dataclasses.replace(SHORT, steps=3)
    train(tiny(), tokens, tokens, config, folder=tmp_path)
    with pytest.raises(ValueError, match="max_lr was 0.005, is 0.1.*another folder"):
        train(tiny(), tokens, tokens, dataclasses.replace(config, max_lr=0.1), folder=tmp_path)
    with pytest.raises(ValueError, match="n_layers was 2, is 3"):
        train(tiny(n_layers=3), tokens, tokens, config, folder=tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-000003 cannot be read.*Delete it"):
        train(tiny(), tokens, tokens, config, folder=tmp_path)


def test_a_checkpoint_from_before_the_configuration_had_more_entries_goes_on(tokens, tmp_path):
    train(tiny(), tokens, tokens, dataclasses.replace(SHORT, steps=3), folder=tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.json"
    record = json.loads(path.read_text())
    for name in ("head_dim", "qk_norm", "rope_scaling", "window"):
        del record["model_config"][name]
    path.write_text(json.dumps(record))
    history = train(tiny(), tokens, tokens, dataclasses.replace(SHORT, steps=3), folder=tmp_path)
    assert history.steps == [1, 2, 3]


def test_only_the_newest_checkpoints_stay_and_no_pickle(tokens, tmp_path):
    train(tiny(), tokens, tokens, SHORT, folder=tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000009", "step-000012"]
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert json.loads((checkpoints(tmp_path)[0] / "state.json").read_text())["step"] == 9


def test_a_loss_that_is_no_number_stops_the_run(tokens):
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="became nan at step 1.*Lower max_lr"):
        train(model, tokens, tokens, SHORT)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("batch_size", -1), ("max_lr", 0.0), ("save_every", 0)])
def test_senseless_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be above 0"):
        dataclasses.replace(SHORT, **{field: value})
    with pytest.raises(ValueError, match="min_lr is 1.0; it must be from 0 to max_lr"):
        dataclasses.replace(SHORT, min_lr=1.0)


def test_the_storyteller_is_kept_and_found_again(tmp_path, monkeypatch, capsys):
    tokens = pretrain.prepare_tokens("andersen").folder.parent
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path))
    shutil.copytree(tokens, tmp_path / "tokens")
    shutil.copytree(tokens.parent / "data", tmp_path / "data")
    config = dataclasses.replace(SHORT, steps=2, context_length=32)
    model, tokenizer, history = pretrain_storyteller(config=config)
    assert len(history.steps) == 2 and not (tmp_path / "pretrain" / "storyteller" / "checkpoints").exists()
    again, same_tokenizer = load_storyteller()
    assert same(model, again) and same_tokenizer.encode("the moon") == tokenizer.encode("the moon")
    assert "Loaded the storyteller" in capsys.readouterr().out
