"""Chapter 6, preferences: log-probabilities of answers, the DPO loss, pairs, the deep dive's functions."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer
from ch04_gpt.gpt import GPT, GPTConfig, generate
from ch06_finetune.finetune import (
    END,
    START,
    Preference,
    dpo_loss,
    encode_chat,
    preference_log_probs,
    sequence_log_probs,
)
from ch06_finetune.preferences import (
    distance_to_reference,
    pair_log_probs,
    pairs_by_rule,
    train_preferences,
)

WORDS = "the nightingale sang to the emperor and the emperor wept; then the sun rose over the sea. "
ASK = [{"role": "user", "content": "Tell me about the sun."}]


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(WORDS * 3, 300, [END_OF_TEXT, START, END])


def tiny(vocab_size, seed=0, context_length=96, dropout=0.0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=vocab_size, context_length=context_length, d_model=16, n_layers=2,
                         n_heads=2, dropout=dropout)).eval()


def four(seed=0, n=5, scale=20.0):
    """Four (B,) of log-probabilities, in float64, the first two with gradients."""
    generator = torch.Generator().manual_seed(seed)
    values = [-scale * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [value.requires_grad_(i < 2) for i, value in enumerate(values)]


# sequence_log_probs


def test_sequence_log_probs_by_hand():
    """Two tokens with probabilities 1/2 and 1/4 count, the others do not."""
    logits = torch.log(torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]],
                                     [[0.2, 0.2, 0.6], [0.9, 0.05, 0.05], [0.1, 0.1, 0.8]]]))
    targets = torch.tensor([[0, 1, 1], [2, 0, 0]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    expected = torch.tensor([math.log(0.5 * 0.25), math.log(0.9 * 0.1)])
    torch.testing.assert_close(sequence_log_probs(logits, targets, mask), expected)
    torch.testing.assert_close(sequence_log_probs(logits, targets, mask.bool()), expected)
    torch.testing.assert_close(sequence_log_probs(logits + 7.0, targets, mask), expected)  # any offset


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_sequence_log_probs_against_torch(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 6, 11, generator=generator)
    targets = torch.randint(0, 11, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.6
    mask[:, seed % 6] = True
    surprise = F.cross_entropy(logits.transpose(1, 2), targets.masked_fill(~mask, -100), reduction="none")
    found = sequence_log_probs(logits, targets, mask)
    torch.testing.assert_close(found, -surprise.sum(dim=1), rtol=1e-5, atol=1e-4)


def test_what_the_mask_hides_has_no_influence():
    """Padding may hold anything, even numbers that are none: neither value nor gradient notices."""
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    sequence_log_probs(logits, targets, mask).sum().backward()
    spoiled = logits.detach().masked_fill(~mask[..., None], math.nan).requires_grad_()
    found = sequence_log_probs(spoiled, targets, mask)
    found.sum().backward()
    torch.testing.assert_close(found, sequence_log_probs(logits, targets, mask))
    torch.testing.assert_close(spoiled.grad, logits.grad)
    assert not logits.grad[~mask].any()


def test_sums_are_not_means():
    """An answer of twice the length with equally likely tokens has twice the log-probability."""
    logits, targets = torch.zeros(2, 8, 5), torch.zeros(2, 8, dtype=torch.long)
    mask = torch.tensor([[1] * 4 + [0] * 4, [1] * 8])
    short, long = sequence_log_probs(logits, targets, mask).tolist()
    assert short == pytest.approx(-4 * math.log(5)) and long == pytest.approx(2 * short)


def test_half_precision_is_summed_in_single():
    logits = torch.zeros(1, 3000, 8, dtype=torch.bfloat16)
    found = sequence_log_probs(logits, torch.zeros(1, 3000, dtype=torch.long), torch.ones(1, 3000))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(-3000 * math.log(8), rel=1e-4)


def test_sequence_log_probs_says_what_is_wrong():
    logits, targets = torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 3\).*give \(B, T, V\), \(B, T\) and \(B, T\)"):
        sequence_log_probs(logits, targets, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        sequence_log_probs(logits[0], targets[0], torch.ones(4))
    with pytest.raises(ValueError, match=r"0 everywhere in rows \[1\].*Shift the mask"):
        sequence_log_probs(logits, targets, torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]))


# dpo_loss


def test_dpo_loss_by_hand():
    """(-11 - -12) - (-11 - -10) = 2; times 0.5 is 1; -log sigma(1) = log(1 + 1/e)."""
    pair = [torch.tensor([value]) for value in (-11.0, -11.0, -12.0, -10.0)]
    assert dpo_loss(*pair, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    other = [torch.tensor([value]) for value in (-20.0, -8.0, -14.0, -8.0)]  # margin 0.1 * (-6 - 0)
    assert dpo_loss(*other, beta=0.1).item() == pytest.approx(math.log(1 + math.exp(0.6)), abs=1e-6)
    both = [torch.cat(values) for values in zip(pair, other, strict=True)]
    mean = (math.log(1 + math.exp(-0.2)) + math.log(1 + math.exp(0.6))) / 2
    assert dpo_loss(*both, beta=0.1).item() == pytest.approx(mean, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 5.0), st.integers(1, 9))
def test_dpo_loss_against_trl(seed, beta, n):
    """The formula as ``trl`` 1.16 has it (DPOTrainer, loss type "sigmoid", reverse KL), and the paper's.

    trl: scores are log-ratios to the reference, the loss is -logsigmoid(beta * their difference). The paper's
    equation 7 groups the same four numbers by answer; older versions of trl by model.
    """
    pc, pr, rc, rr = four(seed, n)
    trl = -F.logsigmoid(beta * ((pc - rc) - (pr - rr))).mean()
    by_model = torch.log1p(torch.exp(-beta * ((pc - pr) - (rc - rr)))).mean()
    ratios = (torch.exp(pc - rc) ** beta, torch.exp(pr - rr) ** beta)
    as_odds = -torch.log(ratios[0] / (ratios[0] + ratios[1])).mean()  # Bradley-Terry, written with odds
    for expected in (trl, by_model, as_odds):
        torch.testing.assert_close(dpo_loss(pc, pr, rc, rr, beta), expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 2.0))
def test_the_gradient_is_beta_times_the_chance_of_the_wrong_choice(seed, beta):
    """d loss / d policy_chosen = -beta sigma(-margin) / B, and the opposite for the rejected answers."""
    pc, pr, rc, rr = four(seed, 4)
    dpo_loss(pc, pr, rc, rr, beta).backward()
    margin = beta * ((pc - rc) - (pr - rr)).detach()
    weight = beta * torch.sigmoid(-margin) / 4
    torch.testing.assert_close(pc.grad, -weight)
    torch.testing.assert_close(pr.grad, weight)
    order = margin.argsort()
    assert (weight[order].diff() <= 0).all()  # the wronger the ranking, the stronger the push


def test_no_gradient_reaches_the_reference():
    values = [value.detach().requires_grad_() for value in four()]
    dpo_loss(*values, beta=0.3).backward()
    assert values[0].grad is not None and values[1].grad is not None
    assert values[2].grad is None and values[3].grad is None


def test_at_the_reference_the_loss_is_log_2_for_every_beta():
    pc, pr, _, _ = four()
    for beta in (1e-3, 0.1, 10.0):
        assert dpo_loss(pc, pr, pc.detach(), pr.detach(), beta).item() == pytest.approx(math.log(2))


def test_limits_of_beta():
    """beta to 0: log 2 for any model. Large beta: 0 for a right ranking, beta * gap for a wrong one."""
    right = [torch.tensor([value], dtype=torch.float64) for value in (-5.0, -9.0, -7.0, -7.0)]
    wrong = [right[1], right[0], right[2], right[3]]
    assert dpo_loss(*right, beta=1e-9).item() == pytest.approx(math.log(2), abs=1e-8)
    assert dpo_loss(*right, beta=100.0).item() == pytest.approx(0.0, abs=1e-12)
    assert dpo_loss(*wrong, beta=100.0).item() == pytest.approx(400.0)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e30])
def test_very_unlikely_answers_give_numbers(far):
    """Answers of a thousand or of 1e30 nats of surprise: loss and gradient stay numbers, on both sides."""
    for policy in ((-far, -1.0), (-1.0, -far), (-far, -far)):
        pc, pr = (torch.tensor([value], requires_grad=True) for value in policy)
        loss = dpo_loss(pc, pr, torch.tensor([-2.0]), torch.tensor([-3.0]), 0.1)
        loss.backward()
        assert math.isfinite(loss.item()) and math.isfinite(pc.grad.item()) and math.isfinite(pr.grad.item())


def test_very_long_answers_give_numbers():
    """4,000 tokens, each about as unlikely as float32 can say: finite, and the loss is right."""
    logits = torch.zeros(2, 4000, 3)
    logits[0, :, 0], logits[1, :, 0] = -1e4, 1e4
    found = sequence_log_probs(logits, torch.zeros(2, 4000, dtype=torch.long), torch.ones(2, 4000))
    assert found[0].item() == pytest.approx(-4e7, rel=1e-3)
    assert found[1].item() == pytest.approx(0.0, abs=1e-3)
    assert math.isfinite(dpo_loss(found[:1], found[1:], found[:1] + 1, found[1:] - 1, 0.1).item())


def test_order_of_the_batch_and_constants_do_not_matter():
    """Shuffling pairs changes nothing; nor does what both answers share, such as log Z or the prompt."""
    values = [value.detach() for value in four(3, 8)]
    loss = dpo_loss(*values, beta=0.2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dpo_loss(*(value[order] for value in values), beta=0.2), loss)
    shift = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(dpo_loss(values[0] + shift, values[1] + shift, *values[2:], beta=0.2), loss)
    torch.testing.assert_close(dpo_loss(*values[:2], values[2] - shift, values[3] - shift, beta=0.2), loss)
    swapped = dpo_loss(values[1], values[0], values[3], values[2], beta=0.2)
    margin = 0.2 * ((values[0] - values[2]) - (values[1] - values[3])).mean()
    torch.testing.assert_close(swapped - loss, margin)  # -log s(-x) + log s(x) = x


def test_dpo_loss_says_what_is_wrong():
    values = [value.detach() for value in four()]
    for beta in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"beta is {beta}; it must be above 0 and finite"):
            dpo_loss(*values, beta=beta)
    with pytest.raises(ValueError, match=r"\(5,\), \(5,\), \(4,\), \(5,\); give four of one shape"):
        dpo_loss(values[0], values[1], values[2][:4], values[3], beta=0.1)
    with pytest.raises(ValueError, match=r"\(1,\).*give four of one shape"):  # would be broadcast in silence
        dpo_loss(values[0], values[1], values[2][:1], values[3], beta=0.1)
    with pytest.raises(ValueError, match="at least 1 pair"):
        dpo_loss(*(value[:0] for value in values), beta=0.1)
    with pytest.raises(ValueError, match="give four of one shape"):
        dpo_loss(*(value[0] for value in values), beta=0.1)


# pairs


def test_equal_answers_are_refused():
    with pytest.raises(ValueError, match=r"'Tell me about the sun.' are 'It shone.'.*leave it out"):
        Preference(ASK, "It shone.", "It shone.")
    assert Preference(ASK, "It shone.", "It shone").rejected == "It shone"


def test_a_preference_needs_a_question():
    with pytest.raises(ValueError, match="0 messages"):
        Preference([], "a", "b")
    with pytest.raises(ValueError, match="role 'assistant'.*role 'user'"):
        Preference([*ASK, {"role": "assistant", "content": "Yes."}], "a", "b")
    with pytest.raises(ValueError, match="'robot'"):
        Preference([{"role": "robot", "content": "Hello"}], "a", "b")


def test_no_pairs_are_refused(tokenizer):
    with pytest.raises(ValueError, match="0 pairs; give at least 1"):
        preference_log_probs(tiny(tokenizer.vocab_size), tokenizer, [])


def test_a_pair_too_long_for_the_context_is_refused(tokenizer):
    model = tiny(tokenizer.vocab_size, context_length=24)
    with pytest.raises(ValueError, match="with a context length of 24, 25 fit"):
        pair = Preference(ASK, "It rose over the sea. " * 9, "It shone.")
        preference_log_probs(model, tokenizer, [pair], None)


def by_steps(model, tokenizer, prompt, answer):
    """Log-probability of an answer the slow way: one forward pass a token, after the generation prompt."""
    ids, _ = encode_chat(tokenizer, prompt, True, None)
    total = 0.0
    for token in [*tokenizer.encode(answer, allow_special=False), tokenizer.special_tokens[END]]:
        total += torch.log_softmax(model(torch.tensor([ids]))[0, -1], dim=-1)[token].item()
        ids.append(token)
    return total


@torch.no_grad()
def test_log_probs_of_pairs_one_token_at_a_time(tokenizer):
    """Prompt excluded, end marker included, padding without influence, chosen and rejected not mixed up."""
    model = tiny(tokenizer.vocab_size)
    talk = [*ASK, {"role": "assistant", "content": "It rose."}, {"role": "user", "content": "And the sea?"}]
    pairs = [Preference(ASK, "The sun rose.", "The sun rose over the sea and the emperor wept."),
             Preference(talk, "", "the sea")]
    found = preference_log_probs(model, tokenizer, pairs, system_prompt=None)
    for values, name in zip(found, ("chosen", "rejected"), strict=True):
        expected = [by_steps(model, tokenizer, pair.prompt, getattr(pair, name)) for pair in pairs]
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_training_by_hand_opens_the_gap(tokenizer):
    """Twenty plain gradient steps: the margin of the pair grows, the reference stays as it was."""
    reference, policy = tiny(tokenizer.vocab_size), tiny(tokenizer.vocab_size)
    pairs = [Preference(ASK, "The sun rose.", "The emperor wept; then the emperor sang.")]
    with torch.no_grad():
        before = preference_log_probs(reference, tokenizer, pairs, None)
    optimizer, losses = torch.optim.Adam(policy.parameters(), lr=1e-2), []
    for _ in range(20):
        now = preference_log_probs(policy, tokenizer, pairs, None)
        loss = dpo_loss(*now, *before, beta=0.1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.3
    with torch.no_grad():
        torch.testing.assert_close(preference_log_probs(reference, tokenizer, pairs, None), before)


# the deep dive


def test_pairs_by_rule():
    """The higher score is chosen, whatever the order; equal scores and equal answers make no pair."""
    prompts = [[{"role": "user", "content": word}] for word in "abcd"]
    answers = [("long answer", "short"), ("one", "three"), ("equal", "lengt"), ("same", "same")]
    found = pairs_by_rule(prompts, answers, lambda answer: -len(answer))
    assert [(p.prompt[0]["content"], p.chosen, p.rejected) for p in found] == [
        ("a", "short", "long answer"), ("b", "one", "three")]
    with pytest.raises(ValueError, match=r"4 prompts have 3 entries"):
        pairs_by_rule(prompts, answers[:3], len)
    with pytest.raises(ValueError, match=r"sizes \[1, 2\]; give two answers"):
        pairs_by_rule(prompts[:2], [("a", "b"), ("a",)], len)


def some_pairs():
    short = ["The sun rose.", "It sang.", "The sea.", "The emperor wept."]
    words = ["sun", "nightingale", "sea", "emperor"]
    return [Preference([{"role": "user", "content": f"Tell me about the {word}."}], answer,
                       answer[:-1] + " and then the nightingale sang to the emperor.")
            for word, answer in zip(words, short, strict=True)]


def test_log_probs_in_batches_keep_their_order(tokenizer):
    model, pairs = tiny(tokenizer.vocab_size), some_pairs()
    with torch.no_grad():
        expected = torch.stack(preference_log_probs(model, tokenizer, pairs, None))
    torch.testing.assert_close(pair_log_probs(model, tokenizer, pairs, None, batch_size=3), expected,
                               rtol=1e-5, atol=1e-4)


def test_training_on_preferences(tokenizer):
    """Margins start at 0, grow, are looked at where promised; the reference stays; seeds repeat."""
    reference, pairs = tiny(tokenizer.vocab_size), some_pairs()
    weights = {name: p.clone() for name, p in reference.named_parameters()}

    def train(seed=0):
        policy, seen = copy.deepcopy(reference), []
        run = train_preferences(policy, reference, tokenizer, pairs[:3], pairs[3:], steps=24, every=10,
                                max_lr=1e-2, batch_size=2, seed=seed, system_prompt=None, on_look=seen.append)
        return run, seen

    run, seen = train()
    assert seen == run.steps == [0, 10, 20, 24] and len(run.losses) == 24
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert run.margin[0] == run.accuracy[0] == run.chosen[0] == run.rejected[0] == 0
    assert run.margin[-1] > 0.3 and run.accuracy[-1] == 1
    assert run.margin[-1] == pytest.approx(0.1 * (run.chosen[-1] - run.rejected[-1]), rel=1e-5)
    assert all(torch.equal(p, weights[name]) for name, p in reference.named_parameters())
    assert train()[0] == run and train(seed=1)[0].losses != run.losses


def test_looks_are_taken_without_dropout(tokenizer):
    """With dropout in the model, a look still finds what the model at rest gives."""
    reference, pairs = tiny(tokenizer.vocab_size, dropout=0.3), some_pairs()
    policy, modes = copy.deepcopy(reference), []
    run = train_preferences(policy, reference, tokenizer, pairs, pairs, steps=10, every=5, system_prompt=None,
                            on_look=lambda step: modes.append(policy.training))
    assert run.margin[0] == 0 and modes == [False] * 3
    at_rest, before = (pair_log_probs(model, tokenizer, pairs, None) for model in (policy, reference))
    gains = (at_rest - before).mean(dim=1).tolist()
    assert [run.chosen[-1], run.rejected[-1]] == pytest.approx(gains, abs=1e-4)
    assert run.losses[0] != pytest.approx(math.log(2), abs=1e-4)  # dropout is at work in the steps themselves


def test_another_loss_can_be_handed_in(tokenizer):
    """It gets the four log-probabilities of the batch and beta; at the start policy and reference agree."""
    reference, pairs, seen = tiny(tokenizer.vocab_size), some_pairs(), []

    def squared(pc, pr, rc, rr, beta):
        seen.append(([x.detach().clone() for x in (pc, pr, rc, rr)], beta))
        return ((pc - rc) - (pr - rr) - 1 / (2 * beta)).square().mean()

    train_preferences(copy.deepcopy(reference), reference, tokenizer, pairs, pairs, steps=5, beta=0.7,
                      loss=squared, batch_size=4, system_prompt=None)
    (pc, pr, rc, rr), beta = seen[0]
    assert beta == 0.7 and len(seen) == 5
    torch.testing.assert_close((pc, pr), (rc, rr), rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        every = torch.stack(preference_log_probs(reference, tokenizer, pairs, None))
    torch.testing.assert_close(rc.sort().values, every[0].sort().values, rtol=1e-5, atol=1e-4)
    assert (rc - rr).abs().min() > 1  # the right column for each pair, not the same twice


def test_training_says_what_is_wrong(tokenizer):
    reference, pairs = tiny(tokenizer.vocab_size), some_pairs()
    with pytest.raises(ValueError, match="same model.*copy.deepcopy"):
        train_preferences(reference, reference, tokenizer, pairs, pairs, steps=5)
    policy = copy.deepcopy(reference)
    with pytest.raises(ValueError, match="0 pairs and 4 held-out pairs; give at least 1 of each"):
        train_preferences(policy, reference, tokenizer, [], pairs, steps=5)
    with pytest.raises(ValueError, match="4 pairs and 0 held-out"):
        train_preferences(policy, reference, tokenizer, pairs, [], steps=5)
    for steps, every in ((0, 5), (5, 7), (5, 0)):
        with pytest.raises(ValueError, match=f"steps is {steps} and every {every}; .*multiple of 5"):
            train_preferences(policy, reference, tokenizer, pairs, pairs, steps=steps, every=every)
    with pytest.raises(ValueError, match="beta is -1; it must be above 0"):
        train_preferences(policy, reference, tokenizer, pairs, pairs, steps=5, beta=-1, system_prompt=None)
    with pytest.raises(ValueError, match="0 prompts; give at least 1"):
        distance_to_reference(policy, reference, tokenizer, [])


def test_a_model_has_no_distance_from_itself(tokenizer):
    model = tiny(tokenizer.vocab_size)
    found = distance_to_reference(model, copy.deepcopy(model), tokenizer, [ASK] * 5, max_new_tokens=6,
                                  system_prompt=None)
    assert not found.by_sample.any() and not found.by_position.any() and len(found.answers) == 5


def test_distance_of_one_token_is_the_divergence_of_two_distributions(tokenizer):
    """With answers of one token the distance is exact for every sample; prompts of two lengths."""
    policy, reference = tiny(tokenizer.vocab_size, seed=1), tiny(tokenizer.vocab_size, seed=2)
    prompts = [ASK, [{"role": "user", "content": "The sea?"}], ASK]
    found = distance_to_reference(policy, reference, tokenizer, prompts, max_new_tokens=1, system_prompt=None)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([encode_chat(tokenizer, prompt, True, None)[0]])
        with torch.no_grad():
            ours, theirs = (torch.log_softmax(model(ids)[0, -1], dim=-1) for model in (policy, reference))
        expected = F.kl_div(theirs, ours, log_target=True, reduction="sum")
        torch.testing.assert_close(found.by_position[number], expected, rtol=1e-4, atol=1e-6)
    assert found.n_tokens.tolist() == [1, 1, 1]


def test_both_estimates_of_the_distance_are_right_on_average(tokenizer):
    """Answers of up to two tokens: the estimates meet the expectation over all first tokens."""
    policy, reference = tiny(tokenizer.vocab_size, seed=1), tiny(tokenizer.vocab_size, seed=2)
    with torch.no_grad():
        for model in (policy, reference):
            model.lm_head.weight *= 8  # far from uniform, and a stop is common enough to matter
            model.lm_head.weight[tokenizer.special_tokens[END]] *= 3
        ids, _ = encode_chat(tokenizer, ASK, True, None)
        both = torch.tensor([[*ids, first] for first in range(tokenizer.vocab_size)])
        ours, theirs = (torch.log_softmax(model(both)[:, -2:], dim=-1) for model in (policy, reference))
        exact = (ours.exp() * (ours - theirs)).sum(dim=-1)  # (V, 2)
        goes_on = torch.ones(tokenizer.vocab_size)
        goes_on[list(tokenizer.special_tokens.values())] = 0
        expected = (exact[0, 0] + (ours[0, 0].exp() * goes_on * exact[:, 1]).sum()).item()
    found = distance_to_reference(policy, reference, tokenizer, [ASK] * 1000, max_new_tokens=2,
                                  system_prompt=None)
    for values in (found.by_sample, found.by_position):
        assert values.mean().item() == pytest.approx(expected, abs=4 * values.std().item() / 1000**0.5)
    assert found.by_position.std() < found.by_sample.std() and found.by_position.min() >= 0


def test_answers_end_where_the_model_stopped(tokenizer):
    """The end marker counts as a token of the answer and is no part of its text."""
    policy, end = tiny(tokenizer.vocab_size), tokenizer.special_tokens[END]
    found = distance_to_reference(policy, tiny(tokenizer.vocab_size, 3), tokenizer, [ASK] * 300,
                                  max_new_tokens=8, seed=5, system_prompt=None)
    ids, _ = encode_chat(tokenizer, ASK, True, None)
    new = generate(policy, torch.tensor([ids] * 300), 8, stop_ids=set(tokenizer.special_tokens.values()),
                   generator=torch.Generator().manual_seed(5))[:, len(ids):].tolist()
    stops = set(tokenizer.special_tokens.values())
    kept = [row[: next((i for i, token in enumerate(row) if token in stops), 8)] for row in new]
    assert found.answers == [tokenizer.decode(row) for row in kept]
    assert found.n_tokens.tolist() == [min(8, len(row) + 1) for row in kept]
    assert any(len(row) < 8 for row in kept) and any(end in row for row in new)
