"""Chapter 6, rewards: advantages of groups, the clipped loss, the KL estimate, a bandit, and the sorting task."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ch04_gpt.gpt import GPT, PRESETS
from ch06_finetune.finetune import (
    SORT_STOP,
    SORT_TOKENS,
    group_advantages,
    grpo_loss,
    is_sorted,
    sample_answers,
    sorted_answers,
    sorting_questions,
    token_log_probs,
)
from ch06_finetune.rewards import RewardSettings, kl_estimate, neighbours_in_order, train_on_rewards
from utils.workspace import ROOT

WHOLE = st.integers(-1000, 1000).map(float)


def tiny_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(PRESETS["storyteller"], vocab_size=len(SORT_TOKENS), context_length=32, d_model=16,
                                   n_layers=1, n_heads=2, n_kv_heads=None, d_ff=32)).eval()


def ids(text):
    return torch.tensor([SORT_TOKENS.index(c) for c in text])


# --- group_advantages -----------------------------------------------------------------------------------------

def test_advantages_by_hand():
    root = math.sqrt(3)
    expected = torch.tensor([-1 / root, -1 / root, root, -1 / root, 1.0, -1.0, 1.0, -1.0])
    found = group_advantages(torch.tensor([0, 0, 1, 0, 9, 5, 9, 5]), group_size=4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_second_group_knows_nothing_of_the_first():
    rewards = torch.tensor([1.0, 2.0, 3.0, 100.0, 200.0, 300.0])
    found = group_advantages(rewards, 3)
    torch.testing.assert_close(found[:3], found[3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:3], group_advantages(rewards[:3], 3))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(WHOLE, min_size=5, max_size=5), min_size=1, max_size=4), st.floats(0.5, 50), WHOLE)
def test_mean_zero_unit_spread_and_neither_scale_nor_shift_matters(groups, scale, shift):
    rewards = torch.tensor(groups, dtype=torch.float64).flatten()
    found = group_advantages(rewards, 5).view(-1, 5)
    for row, group in zip(found, groups, strict=True):
        assert abs(row.mean().item()) < 1e-5
        assert row.square().mean().item() == pytest.approx(float(len(set(group)) > 1), abs=1e-4)
    torch.testing.assert_close(group_advantages(scale * rewards + shift, 5), found.flatten(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -7.3, 1e8, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exact_zeros(value, dtype):
    assert torch.equal(group_advantages(torch.full((6,), value, dtype=dtype), 3), torch.zeros(6))


def test_tiny_differences_are_damped_by_eps():
    assert group_advantages(torch.tensor([0.0, 1e-9], dtype=torch.float64), 2).abs().max() < 1e-2
    assert group_advantages(torch.tensor([0.0, 1e-9], dtype=torch.float64), 2, eps=0.0).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("rewards", "group_size", "message"), [
    (torch.ones(4), 1, "group_size is 1; .* at least 2"),
    (torch.ones(4), 0, "group_size is 0"),
    (torch.ones(7), 4, r"\(7,\); give \(N,\) with N a multiple of the group_size 4"),
    (torch.ones(0), 4, r"\(0,\)"),
    (torch.ones(2, 4), 4, r"\(2, 4\)"),
    (torch.tensor([0.0, math.nan, 1.0, math.inf]), 2, "2 of 4 rewards are not finite"),
])
def test_rewards_that_make_no_groups(rewards, group_size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, group_size)


# --- grpo_loss ------------------------------------------------------------------------------------------------

# ratio, advantage, what counts with clip 0.2, whether it is still pushed
CASES = [(1.5, 1.0, 1.2, False), (1.1, 1.0, 1.1, True), (0.5, 1.0, 0.5, True),
         (1.5, -2.0, -3.0, True), (0.9, -2.0, -1.8, True), (0.5, -2.0, -1.6, False)]


@pytest.mark.parametrize(("ratio", "advantage", "counts", "pushed"), CASES)
def test_one_token_by_hand(ratio, advantage, counts, pushed):
    old = torch.tensor([[-1.0]], requires_grad=True)
    now = torch.tensor([[-1.0 + math.log(ratio)]], requires_grad=True)
    loss = grpo_loss(now, old, torch.tensor([advantage]), torch.tensor([[True]]))
    assert loss.item() == pytest.approx(-counts, rel=1e-5)
    loss.backward()
    assert now.grad.item() == pytest.approx(-ratio * advantage if pushed else 0.0, rel=1e-5)
    assert old.grad is None


def test_the_width_of_the_clip_is_the_argument():
    now, old, one = torch.tensor([[math.log(1.5)]]), torch.zeros(1, 1), torch.ones(1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert grpo_loss(now, old, one, mask, clip=0.4).item() == pytest.approx(-1.4)
    assert grpo_loss(now, old, one, mask, clip=0.6).item() == pytest.approx(-1.5)


def random_case(seed=0, rows=5, width=7):
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=generator)
    now = old + 0.4 * torch.randn(rows, width, generator=generator)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    return now, old, torch.randn(rows, generator=generator), mask


def test_against_a_loop_over_the_tokens():
    now, old, advantages, mask = random_case()
    terms = []
    for b, t in mask.nonzero().tolist():
        rho, a = math.exp(now[b, t] - old[b, t]), advantages[b].item()
        terms.append(min(rho * a, max(0.8, min(1.2, rho)) * a))
    assert grpo_loss(now, old, advantages, mask).item() == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def test_where_nothing_has_moved_it_is_the_policy_gradient():
    now, _, advantages, mask = random_case()
    a, b = now.clone().requires_grad_(), now.clone().requires_grad_()
    grpo_loss(a, now, advantages, mask).backward()
    (-(advantages[:, None] * b)[mask].mean()).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_what_the_mask_leaves_out_has_no_influence():
    now, old, advantages, mask = random_case()
    expected = grpo_loss(now, old, advantages, mask)
    spoilt = now.masked_fill(~mask, -math.inf).requires_grad_()
    loss = grpo_loss(spoilt, old.masked_fill(~mask, math.nan), advantages, mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(spoilt.grad).all()
    assert not spoilt.grad[~mask].any() and spoilt.grad[mask].any()
    torch.testing.assert_close(grpo_loss(now, old, advantages, mask.long()), expected)


def test_the_order_of_the_batch_does_not_matter():
    case, order = random_case(), torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(grpo_loss(*(x[order] for x in case)), grpo_loss(*case))


def test_no_advantage_no_gradient():
    now, old, _, mask = random_case()
    now.requires_grad_()
    grpo_loss(now, old, group_advantages(torch.ones(5), 5), mask).backward()
    assert torch.equal(now.grad, torch.zeros_like(now))


@pytest.mark.parametrize(("change", "message"), [
    ({1: torch.zeros(5, 6)}, r"\(5, 7\), \(5, 6\)"),
    ({2: torch.zeros(7)}, r"\(7,\), \(5, 7\); give \(B, T\), \(B, T\), \(B,\) and \(B, T\)"),
    ({2: torch.zeros(5, 7)}, "shapes"),
    ({3: torch.ones(5, 1)}, r"\(5, 1\)"),
    ({3: torch.zeros(5, 7)}, "mask is 0 at all 35 tokens"),
])
def test_batches_that_do_not_go_together(change, message):
    case = [change.get(i, x) for i, x in enumerate(random_case())]
    with pytest.raises(ValueError, match=message):
        grpo_loss(*case)


@pytest.mark.parametrize("clip", [0.0, -0.2, 1.0, 5.0, math.nan])
def test_clip_outside_its_bounds(clip):
    with pytest.raises(ValueError, match="clip is .* between 0 and 1"):
        grpo_loss(*random_case(), clip=clip)


# --- the KL estimate ------------------------------------------------------------------------------------------

def test_the_estimate_has_the_exact_divergence_as_its_mean():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = (policy * (policy / reference).log()).sum()
    each = kl_estimate(policy.log(), reference.log())
    torch.testing.assert_close(policy @ each, exact)
    assert (each >= 0).all()
    assert each[0].item() == pytest.approx(2 / 7 - math.log(2 / 7) - 1, rel=1e-5)


def test_the_estimate_is_zero_only_without_a_difference_and_trains_the_policy_alone():
    now = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    reference = torch.tensor([-1.0, -2.5, -2.0], requires_grad=True)
    each = kl_estimate(now, reference)
    assert each[0] == 0 and each[1] > 0 and each[2] > 0
    each.sum().backward()
    assert reference.grad is None and now.grad[0] == 0 and now.grad[1] > 0 > now.grad[2]


# --- the sorting task -----------------------------------------------------------------------------------------

def test_questions_of_the_two_kinds_share_no_set_of_digits():
    generator = torch.Generator().manual_seed(0)
    seen, held = (sorting_questions(300, generator, held_out) for held_out in (False, True))
    assert seen.shape == held.shape == (300, 7)
    for questions in (seen, held):
        assert all(len(set(row)) == 6 for row in questions[:, :-1].tolist())
        assert (questions[:, -1] == SORT_TOKENS.index(">")).all()
    sets = [{frozenset(row) for row in questions[:, :-1].tolist()} for questions in (seen, held)]
    assert not sets[0] & sets[1]
    assert len({tuple(row) for row in seen.tolist()}) > 290


@pytest.mark.parametrize(("answer", "right"), [
    ("012579.", 1.0), ("012579....", 1.0), ("012579.3..", 1.0),  # what stands after the end is no part of it
    ("012579999.", 0.0), ("0125799", 0.0), ("975210.", 0.0), ("02579..", 0.0), ("01257", 0.0), ("......", 0.0)])
def test_the_check(answer, right):
    question = ids("702195>")[None]
    assert "".join(SORT_TOKENS[i] for i in sorted_answers(question)[0]) == "012579."
    assert "".join(SORT_TOKENS[i] for i in sorted_answers(question, descending=True)[0]) == "975210."
    assert is_sorted(question, ids(answer)[None]).tolist() == [right]


def test_the_reward_that_can_be_gamed_pays_for_length():
    question = ids("702195>")[None]
    honest, long, short = (neighbours_in_order(question, ids(a)[None]).item()
                           for a in ("012579....", "0000000000", "9........."))
    assert long > honest > short == 0
    assert honest == 1.0


# --- sampling and log-probabilities ---------------------------------------------------------------------------

def test_answers_are_filled_up_and_masked_to_their_end():
    questions = sorting_questions(64, torch.Generator().manual_seed(0))
    answers, mask = sample_answers(tiny_gpt(), questions, 12, SORT_STOP, generator=torch.Generator().manual_seed(1))
    assert answers.shape == mask.shape == (64, 12)
    lengths = set()
    for row, counted in zip(answers.tolist(), mask.tolist(), strict=True):
        end = row.index(SORT_STOP) if SORT_STOP in row else 11
        assert counted == [i <= end for i in range(12)]
        assert set(row[end + 1 :]) <= {SORT_STOP}
        lengths.add(end)
    assert len(lengths) > 4


def test_log_probabilities_are_those_of_the_whole_model_and_of_the_draws():
    model, questions = tiny_gpt(), sorting_questions(3, torch.Generator().manual_seed(0))
    questions = questions[:1].expand(4000, -1)
    answers, _ = sample_answers(model, questions, 2, SORT_STOP, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = token_log_probs(model, questions, answers)
        whole = torch.log_softmax(model(torch.cat([questions, answers], dim=1)), dim=-1)
    torch.testing.assert_close(found[:, 0], whole[:, 6].gather(1, answers[:, :1])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 1], whole[:, 7].gather(1, answers[:, 1:])[:, 0], atol=1e-5, rtol=1e-5)
    for token in range(len(SORT_TOKENS)):  # temperature 1 and nothing cut off: frequencies are probabilities
        expected = whole[0, 6, token].exp().item()
        share = (answers[:, 0] == token).float().mean().item()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 4000)


# --- the loop -------------------------------------------------------------------------------------------------

class TwoTokens(nn.Module):
    """A policy with two answers of one token each; only what the loss needs."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([0.0, 1.0]))

    def draw(self, n, generator):
        return torch.multinomial(torch.softmax(self.scores.detach(), 0), n, replacement=True, generator=generator)


def test_a_few_steps_raise_the_reward_of_a_bandit():
    bandit, generator = TwoTokens(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(bandit.parameters(), lr=0.5)
    before = torch.softmax(bandit.scores, 0)[0].item()
    for _ in range(25):
        drawn = bandit.draw(16, generator)
        advantages = group_advantages((drawn == 0).float(), group_size=8)
        old = torch.log_softmax(bandit.scores, 0).detach()[drawn][:, None]
        for _ in range(2):
            now = torch.log_softmax(bandit.scores, 0)[drawn][:, None]
            optimizer.zero_grad()
            grpo_loss(now, old, advantages, torch.ones(16, 1, dtype=torch.bool)).backward()
            optimizer.step()
    assert before < 0.3 and torch.softmax(bandit.scores, 0)[0].item() > 0.8


SETTINGS = RewardSettings(steps=12, questions=8, group_size=8, max_new_tokens=2, lr=5e-3)


def first_digit_is_low(questions, answers):
    return (answers[:, 0] < 5).float()


def ask(n, generator):
    return sorting_questions(n, generator)


def test_the_loop_raises_a_reward_and_the_price_of_the_divergence_holds_it_back():
    free, priced = tiny_gpt(), tiny_gpt()
    loose = train_on_rewards(free, ask, first_digit_is_low, SORT_STOP, SETTINGS)
    tight = train_on_rewards(priced, ask, first_digit_is_low, SORT_STOP, dataclasses.replace(SETTINGS, kl_price=10.0))
    assert loose["reward"][-1] > loose["reward"][0] + 0.25
    assert abs(loose["divergence"][0]) < 1e-6  # the first answers come from the start itself
    assert loose["divergence"][-1] > 4 * tight["divergence"][-1]
    assert len(loose["reward"]) == len(loose["divergence"]) == 12


def test_the_loop_is_repeatable_and_leaves_the_mode_of_the_model():
    runs = []
    for _ in range(2):
        model = tiny_gpt()
        runs.append(train_on_rewards(model, ask, first_digit_is_low, SORT_STOP, dataclasses.replace(SETTINGS, steps=3)))
        assert not model.training
    assert runs[0] == runs[1]


def test_equal_rewards_leave_the_weights_as_they_are():
    model, untouched = tiny_gpt(), tiny_gpt()
    history = train_on_rewards(model, ask, lambda questions, answers: torch.ones(len(answers)), SORT_STOP, SETTINGS)
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert history["reward"] == [1.0] * 12


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": 0}, "steps is 0"), ({"group_size": 1}, "group_size is 1"), ({"questions": 0}, "questions is 0"),
    ({"updates": 0}, "updates is 0"), ({"kl_price": -0.1}, "kl_price is -0.1"), ({"lr": 0.0}, "lr is 0.0"),
    ({"clip": 1.0}, "clip is 1.0")])
def test_settings_that_make_no_run(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_a_check_that_forgets_answers_is_refused():
    with pytest.raises(ValueError, match="gave rewards of shape .* for 64 answers"):
        train_on_rewards(tiny_gpt(), ask, lambda questions, answers: torch.ones(3), SORT_STOP, SETTINGS)


# --- the record -----------------------------------------------------------------------------------------------

def test_the_record_holds_what_the_text_says_of_it():
    runs = json.loads((ROOT / "ch06_finetune" / "records" / "rewards_seeds.json").read_text(encoding="utf-8"))["runs"]
    by_kind = {}
    for row in runs:
        by_kind.setdefault((row["reward"], row["kl_price"]), []).append(row)
    honest, dear = by_kind["the check", 0.0], by_kind["the check", 0.5]
    gamed, held = by_kind["pairs in order", 0.0], by_kind["pairs in order", 0.5]
    assert len(honest) == len(dear) == len(gamed) == len(held) >= 2
    for h, d, g, p in zip(honest, dear, gamed, held, strict=True):
        assert h["after"] > h["before"] + 0.4 and h["after"] > d["after"] > d["before"] + 0.2
        assert d["last_divergence"] < 0.75 * h["last_divergence"]
        assert g["after"] < 0.02 and g["last_reward"] > 1.2
        assert g["after"] + 0.1 < p["after"] < h["after"] and p["last_divergence"] < 0.2 * g["last_divergence"]
