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

from ch02_tokenizer.tokenizer import BPETokenizer
from ch04_gpt.gpt import GPT, GPTConfig
from ch05_pretrain import pretrain
from ch05_pretrain.pretrain import (
    AdamW,
    History,
    LossScaler,
    Muon,
    NGramModel,
    OneProcess,
    TokenLoader,
    TrainConfig,
    best_checkpoint,
    checkpoints,
    clip_grad_norm,
    cosine_schedule,
    cross_entropy,
    evaluate,
    first_bad_module,
    load_storyteller,
    measures,
    orthogonalize,
    parameter_groups,
    pretrain_storyteller,
    save_checkpoint,
    save_finished,
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


@pytest.fixture
def small_tokenizer():
    return BPETokenizer.train("the moon and the sea, the sea and the moon " * 3, 60 + 210, ["<|endoftext|>"])


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


def test_queries_keys_and_values_get_a_group_of_their_own():
    model = tiny()
    together, apart = parameter_groups(model, 0.1, 4.0), parameter_groups(model, 0.1, 4.0, split_qkv=True)
    fused = [block.attention.w_qkv.weight for block in model.blocks]
    assert [id(p) for p in apart[3]["params"]] == [id(p) for p in fused]
    assert apart[3]["rows"] == [model.config.d_model] * 3 and "rows" not in apart[0]
    assert {k: v for k, v in apart[3].items() if k not in ("params", "rows")} == {
        k: v for k, v in together[0].items() if k != "params"}
    assert sorted(id(p) for g in apart for p in g["params"]) == sorted(id(p) for p in model.parameters())


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

    def until_the_cut(model, optimizer, loader, config, step, engine):
        if step == cut:
            raise PowerCut
        return original(model, optimizer, loader, config, step, engine)

    monkeypatch.setattr(pretrain, "train_step", until_the_cut)
    with pytest.raises(PowerCut):
        train(tiny(1), tokens, tokens, SHORT, folder=tmp_path)
    monkeypatch.undo()
    last_save = max(step for step in (3, 6, 9, *expected.eval_steps) if step <= cut and (
        step % 3 == 0 or expected.val_loss[step // 4 - 1] == min(expected.val_loss[: step // 4])))
    assert checkpoints(tmp_path)[-1].name == f"step-{last_save:06}"
    resumed = tiny(2)
    seen = []
    history = train(resumed, tokens, tokens, SHORT, folder=tmp_path, on_log=lambda *entry: seen.append(entry[:2]))
    assert same(straight, resumed) and history == expected
    seen = sorted(entry for entry in seen if entry[0] in ("held out", "training"))
    assert seen == [("held out", 4), ("held out", 8), ("held out", 12), ("training", 10)], "curves are whole"


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


@pytest.mark.parametrize("where", ["check_vocabulary", "clip_grad_norm"])
def test_interrupted_in_the_middle_of_a_step_it_is_still_the_same_run(tokens, tmp_path, capsys, monkeypatch, where):
    """Ctrl-C may come when the batch is drawn but the step is not done: such a half step must not be saved."""
    straight, calls, original = tiny(1), [], getattr(pretrain, where)
    train(straight, tokens, tokens, SHORT)

    def interrupted(*arguments):
        result = original(*arguments)
        calls.append(arguments[-1])
        if len([call for call in calls if call not in ("the text", "the held-out text")]) == 8:
            raise KeyboardInterrupt  # the batch of step 8 is dealt, or its gradient is clipped
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
        save_checkpoint(tmp_path, model, AdamW(model.parameters()), 6, TokenLoader(tokens, 2, 16), SHORT,
                        pretrain.History())
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
    kept = [int(p.name.removeprefix("step-")) for p in checkpoints(tmp_path)]
    assert kept[-2:] == [9, 12] and len(kept) <= 3
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert json.loads((checkpoints(tmp_path)[-2] / "state.json").read_text())["step"] == 9


def test_a_loss_that_is_no_number_stops_the_run(tokens):
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="became nan at step 1.*the output of norm. Begin anew in another "
                       r"folder with a lower max_lr \(now 0.005\) or matrix_lr"):
        train(model, tokens, tokens, SHORT)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("batch_size", -1), ("max_lr", 0.0), ("save_every", 0)])
def test_senseless_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be above 0"):
        dataclasses.replace(SHORT, **{field: value})
    with pytest.raises(ValueError, match="min_lr is 1.0; it must be from 0 to max_lr"):
        dataclasses.replace(SHORT, min_lr=1.0)


# ---------------------------------------------------------------- the loader


@pytest.mark.parametrize("sizes", [(100,), (33,), (17,), (31,), (32,), (400, 40, 5, 17, 90)])
def test_an_epoch_reads_every_window_once_whatever_the_shards(sizes):
    shards = [np.arange(1000 * i, 1000 * i + n) for i, n in enumerate(sizes)]
    loader = TokenLoader(shards if len(shards) > 1 else shards[0], 1, 16)
    n_windows, orders = sum(loader.windows), []
    for _ in range(3):
        epoch = [loader.next() for _ in range(n_windows)]
        for inputs, targets in epoch:
            assert torch.equal(inputs[0, 1:], targets[0, :-1]) and inputs.dtype == torch.int64
            assert torch.equal(targets - inputs, torch.ones(1, 16, dtype=torch.int64)), "a window crosses shards"
        read = torch.cat([inputs[0] for inputs, _ in epoch])
        assert len(read.unique()) == len(read) == 16 * n_windows
        for i, n in enumerate(sizes):
            mine = read[(read >= 1000 * i) & (read < 1000 * i + n)]
            assert len(mine) >= max(n - 1 - 2 * 16 + 2, 16 if n > 16 else 0) // 16 * 16, "too much is left out"
        orders.append(read.tolist())
    if n_windows > 5:
        assert orders[0] != orders[1] != orders[2], "each epoch has its own order"
        assert sorted(orders[0]) != sorted(orders[1]), "and its own cuts"


def test_the_loader_depends_on_seed_and_position_alone(tokens):
    batches = [TokenLoader(tokens, 4, 16, seed=3).next()[0] for _ in range(2)]
    assert torch.equal(*batches) and not torch.equal(batches[0], TokenLoader(tokens, 4, 16, seed=4).next()[0])
    loader, again = TokenLoader(tokens, 4, 16), TokenLoader(tokens, 4, 16)
    for _ in range(21):  # more than two epochs of 36 windows
        expected = loader.next()
    again.load_state_dict(loader.state_dict() | {"position": 20})
    assert all(torch.equal(a, b) for a, b in zip(again.next(), expected, strict=True))
    assert again.state_dict() == loader.state_dict() and json.loads(json.dumps(loader.state_dict()))["position"] == 21


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_ranks_share_the_batch_of_one_process(tokens, ranks):
    alone = TokenLoader(tokens, 6, 16)
    together = [TokenLoader(tokens, 6, 16, rank=rank, ranks=ranks) for rank in range(ranks)]
    for _ in range(15):
        rows = [loader.next() for loader in together]
        assert all(len(x) == 6 // ranks for x, _ in rows)
        for part, expected in enumerate(alone.next()):
            assert torch.equal(torch.cat([row[part] for row in rows]), expected)
    assert len({json.dumps(loader.state_dict()) for loader in [alone, *together]}) == 1, "any number may go on"


def test_memory_mapped_shards_are_read_in_place(tmp_path, tokens):
    np.save(tmp_path / "shard.npy", tokens)
    mapped = np.load(tmp_path / "shard.npy", mmap_mode="r")
    loader = TokenLoader([mapped, mapped], 2, 16, vocab_size=60)
    assert all(np.shares_memory(shard, mapped) for shard in loader.shards)
    from_list, from_tensor = TokenLoader(tokens.tolist(), 2, 16), TokenLoader(torch.tensor(tokens.astype(int)), 2, 16)
    assert torch.equal(from_list.next()[0], from_tensor.next()[0]) and from_list.fingerprint == from_tensor.fingerprint


def test_other_data_is_refused_by_name(tokens):
    state = TokenLoader(tokens, 4, 16).state_dict()
    changed = tokens.copy()
    changed[300] = (changed[300] + 1) % 60
    for loader, message in ((TokenLoader(tokens[:-1], 4, 16), "tokens was 600, is 599"),
                            (TokenLoader(tokens, 4, 16, seed=1), "seed was 0, is 1"),
                            (TokenLoader(tokens, 2, 16), "batch_size was 4, is 2"),
                            (TokenLoader(tokens, 4, 8), "context_length was 16, is 8"),
                            (TokenLoader(changed, 4, 16), "fingerprint was")):
        with pytest.raises(ValueError, match=f"belongs to other data: .*{message}.*begin anew"):
            loader.load_state_dict(state)
        assert loader.position == 0
    TokenLoader(tokens.astype(np.int64), 4, 16).load_state_dict(state)  # the same numbers in another type


def test_tokens_that_make_no_batches_are_refused(tokens):
    for arguments, message in (
            ((tokens[:16], 1, 16), "The longest text has 16 tokens; a window of context_length 16 needs 17"),
            (([tokens[:10], tokens[:12]], 1, 16), "The longest text has 12 tokens"),
            (([], 1, 16), "0 tokens"),
            ((tokens, 37, 16), "batch_size is 37, but 600 tokens hold only 36 windows of 16: lower batch_size"),
            ((tokens, 0, 16), "batch_size is 0"),
            ((tokens.reshape(2, 300), 2, 16), r"shape \(2, 300\).*in one row"),
            ((tokens * 0.5, 2, 16), "type float64; they must be whole numbers")):
        with pytest.raises(ValueError, match=message):
            TokenLoader(*arguments)
    with pytest.raises(ValueError, match="batch_size is 4 for 3 processes.*multiple of 3, for instance 3"):
        TokenLoader(tokens, 4, 16, ranks=3)
    bad = tokens.copy()
    bad[599] = 60
    with pytest.raises(ValueError, match="Token 599 of the text is 60; the model's vocabulary has 0 to 59: encode"):
        TokenLoader(bad, 4, 16, vocab_size=60)
    with pytest.raises(ValueError, match="Token 599 of shard 1 is 60"):
        TokenLoader([tokens, bad], 4, 16, vocab_size=60)
    with pytest.raises(ValueError, match="Token 3 of the text is -1"):
        TokenLoader([5, 6, 7, -1, *range(30)], 1, 16, vocab_size=60)
    late = TokenLoader(tokens, 4, 16, vocab_size=60)
    late.shards[0] = np.where(np.arange(600) == 300, 60, tokens)  # as if it lay beyond what is looked at at once
    with pytest.raises(ValueError, match=r"of batch \d+ is 60"):
        for _ in range(30):
            late.next()


# ---------------------------------------------------------------- configuration and what does not fit


def test_a_configuration_survives_json_and_names_unknown_keys():
    config = dataclasses.replace(SHORT, optimizer="adamw", schedule="wsd", precision="bfloat16", accumulate=2)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict({"steps": 7}) == TrainConfig(steps=7), "older files hold fewer keys"
    with pytest.raises(ValueError, match="unknown 'learning_rate'.*It knows steps, batch_size.*sample_every"):
        TrainConfig.from_dict({"learning_rate": 1e-3})


@pytest.mark.parametrize(("changes", "message"), [
    ({"max_lr": -1e-3}, r"max_lr is -0.001; it must be above 0, for instance 0.005"),
    ({"matrix_lr": 0.0}, r"matrix_lr is 0.0; it must be above 0, for instance 0.02"),
    ({"max_lr": math.nan}, "max_lr is nan; it must be above 0"),
    ({"max_lr": math.inf}, "max_lr is inf.*must be finite"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
    ({"seed": -1}, "seed is -1; it must be at least 0"),
    ({"steps": 2.5}, "steps is 2.5; it must be a whole number, for instance 1000"),
    ({"steps": True}, "steps is True; it must be a whole number"),
    ({"max_lr": "0.1"}, "max_lr is '0.1'; it must be a number"),
    ({"compile": 1}, "compile is 1; it must be true or false"),
    ({"optimizer": "adam"}, "optimizer is 'adam'; it must be one of muon, adamw"),
    ({"schedule": "linear"}, "schedule is 'linear'; it must be one of cosine, wsd"),
    ({"precision": "fp8"}, "precision is 'fp8'; it must be one of float32, bfloat16, float16"),
    ({"accumulate": 3}, "accumulate is 3; a batch of 2 windows makes at most 2"),
    ({"eval_tokens": 1}, "eval_tokens is 1; it must be at least 2"),
    ({"keep": 0}, "keep is 0; it must be above 0"),
])
def test_each_senseless_choice_is_named_with_its_bound_and_mend(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_what_does_not_fit_is_refused_before_the_folder_is_touched(tokens, tmp_path):
    foreign = tokens.copy()
    foreign[7] = 60
    folder = tmp_path / "run"
    for arguments, message in (((tokens, tokens[:16]), "held-out text has 16 tokens; one window of context_length 16"),
                               ((tokens, [tokens, tokens]), "held-out text comes in 2 rows.*np.concatenate"),
                               ((tokens, foreign), "Token 7 of the held-out text is 60"),
                               ((foreign, tokens), "Token 7 of the text is 60"),
                               ((tokens[:20], tokens), "batch_size is 2, but 20 tokens hold only 1 windows")):
        with pytest.raises(ValueError, match=message):
            train(tiny(), *arguments, SHORT, folder=folder)
        assert not folder.exists()
    with pytest.raises(ValueError, match="context_length is 16; the model sees at most 8"):
        train(tiny(context_length=8), tokens, tokens, SHORT)


def test_the_held_out_text_is_one_row_in_any_form(tokens):
    class OnAGpu(torch.Tensor):
        def __array__(self, *given):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    expected = evaluate(tiny(), tokens)
    with pytest.raises(ValueError, match=r"shape \(2, 600\).*in one row"):
        evaluate(tiny(), [tokens, tokens])
    assert evaluate(tiny(), torch.tensor(tokens.astype(np.int64)).as_subclass(OnAGpu)) == expected
    config = dataclasses.replace(SHORT, steps=1)
    assert train(tiny(), tokens, [tokens], config) == train(tiny(), tokens, tokens, config)


# ---------------------------------------------------------------- the step


def gradients(model, inputs, targets, config, engine=None):
    model.zero_grad()
    loss = (engine or OneProcess()).forward_backward(model, inputs, targets, config)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_accumulated_micro_batches_are_the_large_batch(tokens, accumulate):
    """Five rows in two or three pieces: the pieces hold different numbers of tokens."""
    model, (inputs, targets) = tiny(dropout=0.0), TokenLoader(tokens, 5, 16).next()
    config = dataclasses.replace(SHORT, batch_size=5)
    whole, expected = gradients(model, inputs, targets, config)
    reference = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    pieces, found = gradients(model, inputs, targets, dataclasses.replace(config, accumulate=accumulate))
    assert whole == pytest.approx(reference, rel=1e-6) and pieces == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_accumulation_needs_the_memory_of_one_micro_batch_only(tokens):
    sizes, model = [], tiny(dropout=0.0)
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    gradients(model, *TokenLoader(tokens, 6, 16).next(), dataclasses.replace(SHORT, batch_size=6, accumulate=3))
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_half_precision_gradients_are_close_and_weights_stay_float32(tokens, precision, bound):
    model, batch = tiny(dropout=0.0), TokenLoader(tokens, 4, 16).next()
    seen = []
    model.blocks[0].mlp.w_up.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    loss, exact = gradients(model, *batch, SHORT)
    half, found = gradients(model, *batch, dataclasses.replace(SHORT, precision=precision))
    assert seen == [torch.float32, getattr(torch, precision)] and found.dtype == torch.float32
    assert half == pytest.approx(loss, rel=0.01) and (found - exact).norm() / exact.norm() < bound
    assert not torch.equal(found, exact)


def test_float16_scales_the_loss_and_repeats_an_overflowing_batch(tokens):
    model, batch, engine = tiny(dropout=0.0), TokenLoader(tokens, 4, 16).next(), OneProcess()
    config = dataclasses.replace(SHORT, precision="float16")
    _, expected = gradients(model, *batch, config)
    engine.scaler = LossScaler(scale=2.0**40, growth_steps=2)  # far too large: no float16 gradient survives it
    _, found = gradients(model, *batch, config, engine)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-4)
    scale = engine.scaler.scale
    assert scale < 2.0**30 and torch.isfinite(found).all()
    gradients(model, *batch, config, engine)
    assert engine.scaler.scale == 2 * scale, "two good steps: the scale grows again"


def test_without_scaling_small_gradients_would_be_zero():
    small = torch.tensor(1e-9)
    assert (small.half() == 0) and (small * LossScaler().scale).half() > 0
    gradient = [torch.tensor([3.0, 6.0])]
    assert LossScaler(scale=3.0).unscale(gradient) and gradient[0].tolist() == [1.0, 2.0]
    assert not LossScaler().unscale([torch.tensor([math.inf])]) and not LossScaler().unscale([torch.tensor([math.nan])])


def test_compile_is_asked_for_once_and_in_place(tokens, monkeypatch):
    compiled = []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
    model = tiny()
    train(model, tokens, tokens, dataclasses.replace(SHORT, steps=2, compile=True))
    train(tiny(), tokens, tokens, dataclasses.replace(SHORT, steps=2))
    assert compiled == [model]


def test_schedule_and_optimizer_are_the_configured_ones(tokens):
    config = dataclasses.replace(SHORT, steps=100, warmup_steps=10, schedule="wsd", decay_steps=40, min_lr=0.0)
    rates = [pretrain.learning_rate(step, config) for step in range(100)]
    assert rates[10:60] == [config.max_lr] * 50 and rates[80] == pytest.approx(config.max_lr / 2)
    fifth = dataclasses.replace(config, decay_steps=0)
    assert pretrain.learning_rate(79, fifth) == config.max_lr > pretrain.learning_rate(81, fifth)
    cosine = dataclasses.replace(config, schedule="cosine")
    assert pretrain.learning_rate(50, cosine) == cosine_schedule(50, config.max_lr, 0.0, 10, 100)
    model = tiny()
    muon, adamw = (pretrain.make_optimizer(model, dataclasses.replace(SHORT, optimizer=n)) for n in ("muon", "adamw"))
    assert isinstance(muon, Muon) and type(adamw) is AdamW
    assert muon.param_groups[0]["lr_scale"] == pytest.approx(SHORT.matrix_lr / SHORT.max_lr)
    assert {group["lr_scale"] for group in adamw.param_groups} == {1.0}


def test_the_log_tells_loss_rate_norm_speed_and_samples(tokens):
    seen = {}
    config = dataclasses.replace(SHORT, steps=20, sample_every=8)
    history = train(tiny(), tokens, tokens, config, sample=lambda model: f"a {torch.rand(3).shape[0]}",
                    on_log=lambda name, step, value: seen.setdefault(name, {}).update({step: value}))
    assert seen["training"] == {10: pytest.approx(np.mean(history.train_loss[:10])),
                                20: pytest.approx(np.mean(history.train_loss[10:]))}
    assert seen["gradient norm"][20] == pytest.approx(np.mean(history.grad_norm[10:]))
    assert seen["learning rate"][10] == pretrain.learning_rate(9, config)
    assert seen["tokens per second"][20] == pytest.approx(10 * 2 * 16 / sum(history.seconds[10:]))
    assert seen["sample"] == {8: "a 3", 16: "a 3"} and list(seen["held out"]) == [4, 8, 12, 16, 20]
    assert history.best_step() == history.eval_steps[int(np.argmin(history.val_loss))]


def test_samples_do_not_change_the_run(tokens):
    models = tiny(1), tiny(1)
    train(models[0], tokens, tokens, SHORT)
    often = dataclasses.replace(SHORT, sample_every=1)
    train(models[1], tokens, tokens, often, sample=lambda model: str(torch.rand(5)))
    assert same(*models)


# ---------------------------------------------------------------- not a number


def poisoned(place):
    model = tiny(dropout=0.0)
    with torch.no_grad():
        dict(model.named_parameters())[place].view(-1)[0] = math.inf
    return model


@pytest.mark.parametrize(("place", "named"), [
    ("blocks.0.attention.w_qkv.weight", "the output of blocks.0.attention.w_qkv"),
    ("blocks.1.mlp.w_down.weight", "the output of blocks.1.mlp.w_down"),
    ("norm.weight", "the output of norm"),
])
def test_the_first_module_that_is_not_finite_is_named(tokens, place, named):
    batch = TokenLoader(tokens, 4, 16).next()
    assert first_bad_module(poisoned(place), *batch) == named
    healthy = tiny()
    assert first_bad_module(healthy, *batch) == "" and all(p.grad is None for p in healthy.parameters())
    assert not healthy.norm._forward_hooks, "the hooks are gone again"


def test_a_bad_gradient_is_named_where_it_arose(tokens):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.nan

    model, batch = tiny(dropout=0.0), TokenLoader(tokens, 4, 16).next()
    model.blocks[1].mlp.register_forward_pre_hook(lambda module, given: (Bad.apply(given[0]),))
    assert first_bad_module(model, *batch) == "the gradient of blocks.1.norm2"
    with pytest.raises(FloatingPointError, match="length of the gradient became nan at step 1.*of blocks.1.norm2"):
        train(model, tokens, tokens, SHORT)


def test_a_run_that_breaks_leaves_the_state_before_on_the_disk(tokens, tmp_path, monkeypatch):
    """Broken in step 8, between two saves: step 7 is saved, and goes on bitwise once the cause is gone."""
    straight = tiny(1)
    expected = train(straight, tokens, tokens, SHORT)
    original, calls = OneProcess.loss, []

    def breaks(self, model, *arguments):
        calls.append(1)
        return original(self, model, *arguments) * (math.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(OneProcess, "loss", breaks)
    with pytest.raises(FloatingPointError, match="loss became nan at step 8. First not finite: nothing, when"):
        train(tiny(1), tokens, tokens, SHORT, folder=tmp_path)
    monkeypatch.undo()
    assert checkpoints(tmp_path)[-1].name == "step-000007"
    resumed = tiny(2)
    assert train(resumed, tokens, tokens, SHORT, folder=tmp_path) == expected and same(straight, resumed)


def test_what_broke_is_found_in_the_pieces_of_the_step(tokens, tmp_path, monkeypatch):
    original, calls = OneProcess.loss, []

    def breaks(self, model, *arguments):
        calls.append(1)
        return original(self, model, *arguments) * (math.nan if len(calls) > 24 else 1)

    def small_memory(module, given):
        if len(given[0]) > 1 and module.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(OneProcess, "loss", breaks)
    model = tiny()
    model.register_forward_pre_hook(small_memory)
    config = dataclasses.replace(SHORT, batch_size=8, accumulate=8, save_every=99)
    with pytest.raises(FloatingPointError, match="loss became nan at step 4. First not finite: nothing, when"):
        train(model, tokens, tokens, config, folder=tmp_path)
    assert checkpoints(tmp_path)[-1].name == "step-000003"


def test_what_the_message_of_a_broken_step_names_works(tokens, tmp_path):
    config = dataclasses.replace(SHORT, max_lr=1e6, matrix_lr=1e6, eval_every=99)
    with pytest.raises(FloatingPointError, match="Begin anew in another folder.*own settings only"):
        train(tiny(dropout=0.0), tokens, tokens, config, folder=tmp_path / "one")
    lower = dataclasses.replace(config, max_lr=1e-3, matrix_lr=1e-3)
    with pytest.raises(ValueError, match="is of another run"):
        train(tiny(dropout=0.0), tokens, tokens, lower, folder=tmp_path / "one")
    assert train(tiny(dropout=0.0), tokens, tokens, lower, folder=tmp_path / "another").steps[-1] == 12


def test_a_step_that_breaks_in_float16_leaves_the_scale_of_before(tokens, tmp_path, monkeypatch):
    config, straight = dataclasses.replace(SHORT, precision="float16"), tiny(1)
    expected = train(straight, tokens, tokens, config)
    original, steps = OneProcess.accumulate, []

    def overflows(self, model, *arguments):
        loss = original(self, model, *arguments)
        if len(steps) == 5:
            model.norm.weight.grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(OneProcess, "accumulate", overflows)
    with pytest.raises(FloatingPointError, match="at step 6"):
        train(tiny(1), tokens, tokens, config, folder=tmp_path, stop=lambda: steps.append(1))
    monkeypatch.undo()
    found = checkpoints(tmp_path)[-1]
    assert found.name == "step-000005" and json.loads((found / "state.json").read_text())["engine"]["scale"] == 2.0**16
    resumed = tiny(2)
    assert train(resumed, tokens, tokens, config, folder=tmp_path) == expected and same(straight, resumed)


def test_broken_weights_are_not_saved(tokens, tmp_path):
    with pytest.raises(FloatingPointError, match="step 1"):
        train(poisoned("norm.weight"), tokens, tokens, SHORT, folder=tmp_path)
    assert not checkpoints(tmp_path)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("changes", [{"precision": "float16"}, {"accumulate": 2},
                                     {"optimizer": "adamw", "schedule": "wsd"}])
def test_every_kind_of_run_resumes_bitwise(tokens, tmp_path, changes):
    config = dataclasses.replace(SHORT, **changes)
    straight, resumed = tiny(1), tiny(2)
    expected = train(straight, tokens, tokens, config)
    half = train(tiny(1), tokens, tokens, config, folder=tmp_path, stop=lambda: len(checkpoints(tmp_path)) > 0)
    assert half.steps[-1] == 4 < config.steps
    history = train(resumed, tokens, tokens, config, folder=tmp_path)
    assert same(straight, resumed) and history == expected


def test_the_loss_scale_is_part_of_a_checkpoint(tokens, tmp_path):
    config, engine = dataclasses.replace(SHORT, precision="float16", steps=3), OneProcess()
    engine.scaler = LossScaler(scale=8.0, growth_steps=100)
    train(tiny(), tokens, tokens, config, folder=tmp_path, engine=engine)
    again = OneProcess()
    train(tiny(), tokens, tokens, config, folder=tmp_path, engine=again)
    assert (again.scaler.scale, again.scaler.good_steps) == (8.0, 3)


def test_stop_is_asked_after_every_step_and_saves(tokens, tmp_path):
    straight, asked = tiny(1), []
    expected = train(straight, tokens, tokens, SHORT)

    def stop():
        asked.append(1)
        return len(asked) == 5

    history = train(tiny(1), tokens, tokens, SHORT, folder=tmp_path, stop=stop)
    assert history.steps[-1] == 5 and checkpoints(tmp_path)[-1].name == "step-000005"
    resumed = tiny(2)
    assert train(resumed, tokens, tokens, SHORT, folder=tmp_path) == expected and same(straight, resumed)


def test_resuming_twice_and_resuming_a_finished_run(tokens, tmp_path):
    straight = tiny(1)
    expected = train(straight, tokens, tokens, SHORT)
    for limit in (1, 7, 99):  # also the seed of the model that is thrown away
        model = tiny(limit)
        history = train(model, tokens, tokens, SHORT, folder=tmp_path,
                        stop=lambda limit=limit: limit <= newest(tmp_path))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    again = tiny(5)
    assert train(again, tokens, tokens, SHORT, folder=tmp_path) == history == expected
    assert same(straight, model) and same(straight, again)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}, "nothing is written again"


def newest(folder):
    return int(checkpoints(folder)[-1].name[5:]) if checkpoints(folder) else 0


def test_the_best_checkpoint_is_kept_besides_the_newest(tokens, tmp_path, monkeypatch):
    losses = iter([5.0, 2.0, 3.0, 4.0, 2.5, 9.0])
    monkeypatch.setattr(OneProcess, "evaluate", lambda *arguments: measures(next(losses), 1, None))
    config = dataclasses.replace(SHORT, steps=24, keep=1)
    history = train(tiny(), tokens, tokens, config, folder=tmp_path)
    assert history.best_step() == 8 and [p.name for p in checkpoints(tmp_path)] == ["step-000008", "step-000024"]
    assert best_checkpoint(tmp_path).name == "step-000008"
    assert json.loads((tmp_path / "step-000008" / "state.json").read_text())["val_loss"] == 2.0
    assert best_checkpoint(tmp_path / "empty") is None


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tokens, tmp_path, monkeypatch):
    assert History(eval_steps=[1, 2, 3], val_loss=[2.0, math.nan, 1.0]).best_step() == 3
    assert History(eval_steps=[1, 2], val_loss=[math.nan, math.inf]).best_step() is None is History().best_step()
    losses = iter([5.0, 2.0, math.nan, 4.0, math.inf, 1.0])
    monkeypatch.setattr(OneProcess, "evaluate", lambda *arguments: measures(next(losses), 1, None))
    config, best = dataclasses.replace(SHORT, steps=24, keep=1), []
    train(tiny(), tokens, tokens, config, folder=tmp_path, stop=lambda: best.append(best_checkpoint(tmp_path)))
    assert [path.name for path in best[12:23:5]] == ["step-000008"] * 3
    assert best_checkpoint(tmp_path).name == "step-000024"


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux tells which files are mapped")
def test_a_resumed_run_does_not_hold_on_to_the_file(tokens, tmp_path):
    train(tiny(), tokens, tokens, dataclasses.replace(SHORT, steps=3), folder=tmp_path)
    run = pretrain.Run(tiny(1), tokens, dataclasses.replace(SHORT, steps=3), OneProcess(), tmp_path)
    assert run.resume() and run.optimizer.state
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    for name in ("step-1000000", "step-999999", "step-000003", ".step-000004.part", "step-abc", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-999999", "step-1000000"]


@pytest.mark.parametrize("function", ["save_file", "file_sha256", "sync", "finish_folder"])
def test_killed_in_the_middle_of_a_save_nothing_half_is_taken_for_whole(tokens, tmp_path, monkeypatch, function):
    """SystemExit is not caught by the code, as a kill is not: what it leaves is ignored and cleared away."""
    straight, config = tiny(1), dataclasses.replace(SHORT, eval_every=100)
    expected = train(straight, tokens, tokens, config)
    original, calls = getattr(pretrain, function), []

    def killed(*arguments):
        result = original(*arguments) if function != "finish_folder" else None
        calls.append(1)
        if (tmp_path / ".step-000009.part").exists():  # in the third save
            raise SystemExit
        return result if function != "finish_folder" else original(*arguments)

    monkeypatch.setattr(pretrain, function, killed)
    with pytest.raises(SystemExit):
        train(tiny(1), tokens, tokens, config, folder=tmp_path)
    monkeypatch.undo()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000003", "step-000006"]
    assert (tmp_path / ".step-000009.part").exists()
    resumed = tiny(2)
    assert train(resumed, tokens, tokens, config, folder=tmp_path) == expected and same(straight, resumed)
    assert not list(tmp_path.glob(".*")), "what the kill left is cleared away"


def test_all_is_on_the_disk_before_the_name_is_and_the_name_after(tokens, tmp_path, monkeypatch):
    events, rename = [], pretrain.Path.rename
    monkeypatch.setattr(pretrain.os, "fsync", lambda handle: events.append(
        pretrain.Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(pretrain.Path, "rename", lambda self, new: (events.append("RENAME"), rename(self, new))[1])
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to see which file is meant")
    model = tiny()
    loader = TokenLoader(tokens, 2, 16)
    save_checkpoint(tmp_path, model, AdamW(model.parameters()), 6, loader, SHORT, pretrain.History())
    place = events.index("RENAME")
    assert {"state.json", "state.safetensors", ".step-000006.part"} <= set(events[:place])
    assert events.index(".step-000006.part") > events.index("state.json") and events[place + 1 :] == [tmp_path.name]


def test_one_flipped_bit_is_noticed(tokens, tmp_path):
    config = dataclasses.replace(SHORT, steps=3)
    train(tiny(), tokens, tokens, config, folder=tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    model = tiny(3)
    with pytest.raises(ValueError, match="step-000003 cannot be read.*SHA-256 differs.*Delete it"):
        train(model, tokens, tokens, config, folder=tmp_path)
    assert same(model, tiny(3)), "nothing of it was taken over"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda record: record.update(format="somebody else's"), "its format is \"somebody else's\""),
    (lambda record: record.update(step=4), "step 4 does not go with batch 3"),
    (lambda record: record.pop("history"), "KeyError: 'history'"),
    (lambda record: record["loader"].update(fingerprint="x"), "other data: fingerprint was 'x'"),
    (lambda record: record["train_config"].update(colour="red"), "unknown 'colour'"),
])
def test_a_damaged_or_foreign_record_is_refused(tokens, tmp_path, damage, message):
    config = dataclasses.replace(SHORT, steps=3)
    train(tiny(), tokens, tokens, config, folder=tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.json"
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    model = tiny(3)
    with pytest.raises(ValueError, match=message):
        train(model, tokens, tokens, config, folder=tmp_path)
    assert same(model, tiny(3)), "nothing of it was taken over"


def test_how_often_to_save_may_change_but_nothing_else(tokens, tmp_path):
    train(tiny(), tokens, tokens, SHORT, folder=tmp_path, stop=lambda: newest(tmp_path) >= 3)
    for name, value in (("weight_decay", 0.2), ("seed", 1), ("steps", 13), ("precision", "bfloat16"),
                        ("eval_every", 5)):
        with pytest.raises(ValueError, match=f"of another run: {name} was {getattr(SHORT, name)!r}, is {value!r}"):
            train(tiny(), tokens, tokens, dataclasses.replace(SHORT, **{name: value}), folder=tmp_path)
    free = dataclasses.replace(SHORT, save_every=5, keep=3, sample_every=2)
    straight, resumed = tiny(0), tiny(1)
    assert train(straight, tokens, tokens, SHORT) == train(resumed, tokens, tokens, free, folder=tmp_path)
    assert same(straight, resumed)


def test_a_checkpoint_of_the_first_format_still_loads(tokens, tmp_path):
    """Before there was a loader, a scaler, a hash and eleven of the settings."""
    config = dataclasses.replace(SHORT, steps=3)
    done = tiny(1)
    train(done, tokens, tokens, config, folder=tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.json"
    record = json.loads(path.read_text())
    for name in ("loader", "engine", "sha256", "best", "val_loss"):
        del record[name]
    for name in ("optimizer", "schedule", "decay_steps", "accumulate", "precision", "compile", "keep", "sample_every"):
        del record["train_config"][name]
    del record["history"]["seconds"]
    record["format"] = "bytes-to-chat checkpoint 1"
    path.write_text(json.dumps(record))
    loaded = tiny(2)
    assert train(loaded, tokens, tokens, config, folder=tmp_path).steps == [1, 2, 3] and same(done, loaded)


# ---------------------------------------------------------------- what later chapters load


def test_the_first_storyteller_is_kept(tmp_path, monkeypatch, capsys):
    tokens = pretrain.prepare_tokens("andersen").folder.parent
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path))
    shutil.copytree(tokens, tmp_path / "tokens")
    shutil.copytree(tokens.parent / "data", tmp_path / "data")
    config = dataclasses.replace(SHORT, steps=2, context_length=32, sample_every=1)
    seen = []
    model, tokenizer, history = pretrain_storyteller(config=config, on_log=lambda *entry: seen.append(entry))
    folder = tmp_path / "pretrain" / "first_storyteller"
    assert len(history.steps) == 2 and not (folder / "checkpoints").exists()
    assert same(model, GPT.from_pretrained(folder)) and json.loads((folder / "history.json").read_text())
    assert [step for name, step, text in seen if name == "sample" and text.startswith("Once upon a time")] == [1, 2]


def test_the_live_run_and_the_tables_are_judged_on_the_same_text():
    assert pretrain.STORYTELLER_RUN.eval_tokens >= len(pretrain.prepare_tokens("andersen").val)
    assert pretrain.STORYTELLER_RUN.steps % pretrain.STORYTELLER_RUN.eval_every == 0, "the end is a point of the curve"


def test_a_storyteller_is_handed_out_without_dropout(tmp_path, monkeypatch, small_tokenizer, tokens):
    """The record was trained with dropout; who goes on from it decides anew."""
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setattr(pretrain, "ROOT", tmp_path)
    trained, folder = tiny(3, dropout=0.1), tmp_path / "ch05_pretrain" / "storyteller"
    folder.mkdir(parents=True)
    save_finished(folder, trained, small_tokenizer, pretrain.History())
    assert json.loads((folder / "config.json").read_text()) and GPT.from_pretrained(folder).config.dropout == 0.1
    loaded, _ = load_storyteller()
    assert not loaded.training and loaded.config == dataclasses.replace(trained.config, dropout=0.0)
    ids = torch.as_tensor(tokens[:32].astype(np.int64)).view(2, 16)
    with torch.no_grad():
        expected = trained.eval()(ids)
        torch.testing.assert_close(loaded(ids), expected)
        assert torch.equal(loaded.train()(ids), loaded.eval()(ids))
        assert not torch.equal(trained.train()(ids), expected), "the original does drop"


def test_your_own_finished_storyteller_comes_before_the_record(tmp_path, monkeypatch, capsys, small_tokenizer):
    """The record is a folder beside the chapter's module; a folder without its history is not finished."""
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setattr(pretrain, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="no storyteller in workspace/pretrain/storyteller or .*train --preset"):
        load_storyteller()
    own, record = tmp_path / "workspace" / "pretrain" / "storyteller", tmp_path / "ch05_pretrain" / "storyteller"
    models = {folder: tiny(seed) for seed, folder in enumerate((own, record))}
    for folder, model in models.items():
        folder.mkdir(parents=True, exist_ok=True)
        save_finished(folder, model.to(torch.bfloat16) if folder == record else model, small_tokenizer,
                      pretrain.History())
    loaded, tokenizer = load_storyteller()
    assert same(loaded, models[own]) and tokenizer.encode("the moon") == small_tokenizer.encode("the moon")
    assert "your own storyteller (workspace/pretrain/storyteller)" in capsys.readouterr().out
    (own / "history.json").unlink()  # not finished
    loaded, _ = load_storyteller()
    assert same(loaded, models[record].float()) and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert "the record run of chapter 5" in capsys.readouterr().out
