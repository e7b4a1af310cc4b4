"""The speed run: the recipe against nanoGPT's numbers, the parts against references, the record against the code."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

import ch05_pretrain.speed_run as speed
from ch04_gpt.gpt import count_parameters
from ch05_pretrain.pretrain import Muon
from ch05_pretrain.speed_run import (
    CHANGES,
    FAST,
    NANOGPT,
    TRIED,
    BareRMSNorm,
    CharacterText,
    RecentCharacters,
    Recipe,
    SquaredReLU,
    TimedRun,
    build_from_recipe,
    held_out_loss,
    ladder,
    optimizer_of,
    planned_runs,
    read_speed_record,
    relative_time,
    shakespeare_characters,
)

MODERN = list(ladder().values())[-2]  # with all the parts that were tried
TINY = replace(MODERN, steps=20, batch_size=4, context_length=16, d_model=16, n_layers=1, n_heads=2)


@pytest.fixture
def letters():
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randint(0, 4, (3000,), generator=generator).cumsum(0) % 11).to(torch.uint8)
    return CharacterText(numbers[:2000], numbers[2000:], "abcdefghijk")


@pytest.fixture(scope="module")
def record():
    return read_speed_record()


# The recipe -------------------------------------------------------------------------------------------------

def test_the_baseline_has_the_size_that_nanogpt_prints():
    model = build_from_recipe(NANOGPT, 65)  # tiny Shakespeare has 65 characters
    assert count_parameters(model) - 64 * 128 == 4 * 12 * 128**2 + 9 * 128 + 65 * 128 == 795_904  # "0.80M"
    assert NANOGPT.tokens == 2000 * 12 * 64
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert model.lm_head.weight is model.token_embedding.weight


def test_the_baselines_optimizer_and_learning_rate_are_nanogpts(letters):
    run = TimedRun(NANOGPT, letters)
    assert type(run.optimizer) is torch.optim.AdamW
    for group in run.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.99)
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    rates = []
    for step in (0, 49, 99, 100, 1050, 1999):
        run.losses = [0.0] * step
        rates.append(run.rate())
    middle = 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * 950 / 1900))
    assert rates[:5] == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3, middle])
    assert rates[5] == pytest.approx(1e-4, rel=1e-3)


def test_the_fast_recipe_ends_at_zero(letters):
    run = TimedRun(FAST, letters)
    run.losses = [0.0] * (FAST.steps - 1)
    assert 0 < run.rate() < 0.01 * FAST.max_lr
    run.losses = [0.0] * 10
    assert run.rate() > 0.9 * FAST.max_lr


@pytest.mark.parametrize(("field", "value"), [("mlp", "relu3"), ("norm", "none"), ("schedule", "flat"),
                                              ("optimizer", "sgd"), ("position", "alibi"), ("recent", 0), ("steps", 0)])
def test_a_recipe_that_does_not_exist_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*{value}.*must be"):
        Recipe(**{field: value})


# The parts --------------------------------------------------------------------------------------------------

def test_the_norm_without_gains_is_torchs():
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(BareRMSNorm()(x), torch.nn.RMSNorm(16, eps=1e-6, elementwise_affine=False)(x))
    assert list(BareRMSNorm().parameters()) == []
    assert torch.allclose(BareRMSNorm()(7 * x), BareRMSNorm()(x), atol=1e-5)


def test_squared_relu():
    x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    y = SquaredReLU()(x)
    assert torch.allclose(y, torch.where(x > 0, x**2, torch.zeros_like(x)))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, 2 * x.clamp(min=0))


def test_recent_characters_are_a_sum_over_places():
    part = RecentCharacters(torch.nn.Parameter(torch.randn(7, 4)), 4)
    ids = torch.randint(0, 7, (2, 9))
    out = part(ids)
    for b in range(2):
        for t in range(9):
            expected = part.weight[ids[b, t]].clone()
            for back, embedding in enumerate(part.earlier, 1):
                expected += embedding.weight[ids[b, t - back] if t >= back else 7]
            assert torch.allclose(out[b, t], expected, atol=1e-6)


@pytest.mark.parametrize("recipe", [TINY, replace(TINY, recent=1), replace(NANOGPT, d_model=16, n_layers=1)])
def test_no_recipe_looks_ahead(recipe):
    torch.manual_seed(0)
    model = build_from_recipe(recipe, 11)
    for p in model.parameters():  # also where projections begin at zero
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 11, (1, 16))
    other = ids.clone()
    other[0, 10:] = (other[0, 10:] + 1) % 11
    before, after = model(ids), model(other)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_a_model_holds_the_parts_it_asks_for():
    model = build_from_recipe(MODERN, 83)
    norms = [m for m in model.modules() if type(m).__name__ in ("RMSNorm", "LayerNorm")]
    assert norms == []
    assert sum(isinstance(m, BareRMSNorm) for m in model.modules()) == 4 * MODERN.n_layers + 1
    assert all(isinstance(block.mlp.activation, SquaredReLU) for block in model.blocks)
    assert model.position_embedding is None and model.lm_head.weight is model.token_embedding.weight
    d = MODERN.d_model
    assert count_parameters(model) == 12 * MODERN.n_layers * d**2 + 83 * d + 3 * 84 * d
    fast = build_from_recipe(FAST, 83)
    assert count_parameters(fast) == count_parameters(model) + (2 * FAST.n_layers + 1) * d  # gains of layer norms
    assert not any(isinstance(m, BareRMSNorm | SquaredReLU) for m in fast.modules())


def test_blocks_that_begin_at_zero_pass_the_stream_on():
    model = build_from_recipe(MODERN, 83)
    ids = torch.randint(0, 83, (2, 12))
    with torch.no_grad():
        expected = F.rms_norm(model.token_embedding(ids), (MODERN.d_model,), eps=1e-6) @ model.lm_head.weight.T
        assert torch.allclose(model(ids), expected, atol=1e-5)
        plain = build_from_recipe(replace(MODERN, zero_init=False), 83)
        stream = plain.token_embedding(ids)
        assert not torch.allclose(plain.blocks[0](stream), stream, atol=1e-3)


def test_muon_takes_the_number_of_iterations_from_its_group():
    def moved(**options):
        torch.manual_seed(0)
        model = build_from_recipe(TINY, 11)
        groups = optimizer_of(TINY, model).param_groups
        groups = [{k: g[k] for k in ("params", "weight_decay", "orthogonal", "lr_scale")} for g in groups]
        groups[0].update(options)
        optimizer = Muon(groups, lr=0.02)
        for seed in range(3):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(moved(), moved(newton_schulz=5))
    assert not torch.equal(moved(), moved(newton_schulz=3))


def test_only_matrices_of_the_blocks_are_orthogonalised():
    model = build_from_recipe(FAST, 83)
    optimizer = optimizer_of(FAST, model)
    assert isinstance(optimizer, Muon) and optimizer.param_groups[0]["newton_schulz"] == FAST.newton_schulz
    marked = {id(p) for g in optimizer.param_groups if g["orthogonal"] for p in g["params"]}
    assert marked == {id(p) for p in model.blocks.parameters() if p.dim() == 2}
    (rate,) = {g["lr_scale"] for g in optimizer.param_groups if g["orthogonal"]}
    assert rate * FAST.max_lr == pytest.approx(FAST.matrix_lr)
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


# The clock and the exam -------------------------------------------------------------------------------------

def test_the_exam_is_every_window_once(letters):
    torch.manual_seed(1)
    model = build_from_recipe(replace(TINY, recent=2), 11)
    torch.nn.init.normal_(model.token_embedding.weight)
    losses = []
    for start in range(0, len(letters.val) - 16, 16):
        window = letters.val[start : start + 17].long()
        with torch.no_grad():
            log_p = torch.log_softmax(model(window[None, :-1])[0], dim=-1)
        losses.append(-log_p[torch.arange(16), window[1:]])
    assert held_out_loss(model, letters, context_length=16) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    assert held_out_loss(model, letters, every=3, context_length=16) == pytest.approx(
        torch.cat(losses[::3]).mean().item(), abs=1e-5)


def test_a_run_learns_and_repeats_itself(letters):
    def losses(seed):
        run = TimedRun(TINY, letters, seed)
        return [run.step() for _ in range(TINY.steps)], run

    first, run = losses(0)
    assert first == losses(0)[0] != losses(1)[0]
    assert sum(first[-5:]) < sum(first[:5]) - 1
    assert len(run.seconds) == len(run.cpu_seconds) == TINY.steps and min(run.seconds) > 0


def test_times_are_relative_to_the_first(letters):
    large = replace(NANOGPT, batch_size=32)
    times = relative_time({"large": large, "again": large, "small": TINY}, letters, rounds=5)
    assert times["large"] == 1.0
    assert 0.4 < times["again"] < 2.5
    assert times["small"] < 0.5


# The ladder and the record ----------------------------------------------------------------------------------

def test_the_ladder_adds_one_change_at_a_time():
    recipes = ladder()
    assert list(recipes) == list(CHANGES) and list(recipes.values())[-1] == FAST
    before = asdict(NANOGPT)
    for name, recipe in recipes.items():
        changed = {k for k, v in asdict(recipe).items() if v != before[k]}
        assert changed <= set(CHANGES[name]), name
        assert changed - {"steps"} or name == next(iter(CHANGES)), name
        before = asdict(recipe)
    assert all(recipe.context_length <= 64 for recipe in [*recipes.values(), *TRIED.values()])


def test_the_text_is_the_courses_shakespeare():
    text = shakespeare_characters()
    assert len(text.letters) == 83 and len(text.train) > 4_500_000 and len(text.val) > 200_000
    assert int(text.train.max()) < 83 and text.train.dtype == torch.uint8
    assert "HAMLET" in "".join(text.letters[i] for i in text.train.tolist())


def test_the_record_is_complete_and_of_these_recipes(record):
    for name, (recipe, seed) in planned_runs().items():
        run = record["runs"][name]
        assert run["recipe"] == asdict(recipe), name
        assert run["seed"] == seed and len(run["curve"]) == (0 if name == "baseline, seed 0" else 50)
        assert 1.5 < run["loss"] < 3 and run["cpu_seconds"] > 0
    assert set(record["relative_time"]) == {"baseline", *ladder(), *TRIED}


def test_the_record_holds_the_claim(record):
    """A tenth of the time, by steps taken in turn, and the loss of the baseline, with every seed."""
    times, runs = record["relative_time"], record["runs"]
    for name, recipe in {**ladder(), **TRIED}.items():
        assert recipe.steps * times[name] / NANOGPT.steps <= 0.11, name
    name = list(ladder())[-1]
    assert FAST.steps * times[name] / NANOGPT.steps <= 0.1
    worst = max(run["loss"] for key, run in runs.items() if key.startswith("fast"))
    assert worst < min(run["loss"] for key, run in runs.items() if key.startswith("baseline"))
    assert sum(key.startswith("fast") for key in runs) >= 3


@pytest.mark.parametrize(("name", "recipe"), [("fast, seed 1", FAST), ("baseline, seed 1", NANOGPT)])
def test_the_recorded_runs_began_as_these_do(record, name, recipe):
    run = TimedRun(recipe, shakespeare_characters(), seed=1)
    n = recipe.steps // 50
    losses = [run.step() for _ in range(n)]
    assert sum(losses) / n == pytest.approx(record["runs"][name]["curve"][0], abs=0.02)


def test_the_command_adds_what_is_missing_and_leaves_the_rest(tmp_path, monkeypatch, letters):
    monkeypatch.setattr(speed, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(speed, "read_speed_record", lambda: read_speed_record(tmp_path / "record.json"))
    monkeypatch.setattr(speed, "shakespeare_characters", lambda: letters)
    short = replace(TINY, steps=50, context_length=64)
    monkeypatch.setattr(speed, "planned_runs", lambda: {"one": (short, 0), "two": (short, 1)})
    speed.complete_record(["one"])
    first = json.loads((tmp_path / "record.json").read_text())
    assert list(first["runs"]) == ["one"]
    first["runs"]["one"]["loss"] = 0.5
    (tmp_path / "record.json").write_text(json.dumps(first))
    speed.complete_record(["one", "two"])
    second = json.loads((tmp_path / "record.json").read_text())
    assert second["runs"]["one"]["loss"] == 0.5 and 0 < second["runs"]["two"]["loss"] < 3
    assert second["runs"]["two"]["recipe"] == asdict(short)
