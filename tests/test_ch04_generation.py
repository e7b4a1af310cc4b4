"""Chapter 4, choosing the next token: every dial against another implementation, batches, beams, bad input."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import generation as theirs

from ch04_gpt.fast_generation import FusedDecoder
from ch04_gpt.gpt import (
    GPT,
    GPTConfig,
    TextReader,
    beam_search,
    check_logits,
    decode_steps,
    generate,
    generate_tokens,
    keep_likely,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    pad_left,
    penalise_repeats,
    sample,
    seen_tokens,
)

LLAMA = GPTConfig(97, 64, 48, 2, 6, n_kv_heads=2, d_ff=80, norm="rmsnorm", mlp="swiglu", position="rope", bias=False)
GPT2 = GPTConfig(97, 64, 48, 2, 4)
WINDOW = dataclasses.replace(LLAMA, window=9)
CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA, WINDOW], ids=["gpt2", "llama", "window"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lively(config: GPTConfig, std: float = 0.2) -> GPT:
    """A model whose random weights are large enough that every token of the text matters."""
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (std if parameter.dim() == 2 else 0.5))
    return model.eval()


def tokens(*shape, vocab_size=97):
    return torch.randint(vocab_size, shape)


def kept(logits):
    return set(torch.isfinite(logits).nonzero().flatten().tolist())


# ---------------------------------------------------------------- the dials

LOGITS = st.lists(st.floats(-8, 8, allow_nan=False, width=32), min_size=2, max_size=40, unique=True).map(torch.tensor)
SHARES = st.floats(0.01, 0.99)


@settings(max_examples=60, deadline=None)
@given(LOGITS, SHARES)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    probabilities = logits.double().softmax(-1)
    chosen = kept(keep_top_p(logits.double(), p))
    mass = probabilities[sorted(chosen)].sum()
    assert mass >= p - 1e-9
    assert mass - probabilities[sorted(chosen)].min() < p + 1e-9  # without its least likely it would not
    left_out = set(range(len(logits))) - chosen
    assert not left_out or probabilities[sorted(left_out)].max() <= probabilities[sorted(chosen)].min()


@settings(max_examples=60, deadline=None)
@given(LOGITS, SHARES)
def test_min_p_keeps_what_is_likely_enough_beside_the_best(logits, p):
    probabilities = logits.double().softmax(-1)
    expected = {i for i, q in enumerate(probabilities.tolist()) if q >= p * probabilities.max().item() * (1 + 1e-9)}
    allowed = {i for i, q in enumerate(probabilities.tolist()) if q >= p * probabilities.max().item() * (1 - 1e-9)}
    assert expected <= kept(keep_min_p(logits.double(), p)) <= allowed


@pytest.mark.parametrize("vocab_size", [50, 5000])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_cut_offs_equal_those_of_transformers(vocab_size, spread):
    logits = spread * torch.randn(6, vocab_size, dtype=torch.float64)
    none = torch.zeros(6, 0, dtype=torch.long)
    for ours, other in [
        (keep_top_k(logits, 7), theirs.TopKLogitsWarper(7)),
        (keep_top_p(logits, 0.9), theirs.TopPLogitsWarper(0.9)),
        (keep_top_p(logits, 0.05), theirs.TopPLogitsWarper(0.05)),
        (keep_min_p(logits, 0.1), theirs.MinPLogitsWarper(0.1)),
    ]:
        assert torch.equal(ours, other(none, logits.clone()))


def test_cut_offs_combine_in_the_order_of_transformers():
    logits = 2 * torch.randn(8, 200, dtype=torch.float64)
    expected = logits.clone()
    for other in (theirs.TopKLogitsWarper(40), theirs.TopPLogitsWarper(0.8), theirs.MinPLogitsWarper(0.15)):
        expected = other(None, expected)
    assert torch.equal(keep_likely(logits, top_k=40, top_p=0.8, min_p=0.15), expected)


def test_top_p_of_one_keeps_everything_even_in_float32():
    logits = 5 * torch.randn(3, 49_152)
    assert torch.equal(keep_top_p(logits, 1.0), logits)
    assert all(len(kept(row)) > 1024 for row in keep_top_p(logits / 50, 0.9))  # more than the first thousand


def test_repetition_penalty_equals_that_of_transformers():
    ids, logits = tokens(4, 30), 3 * torch.randn(4, 97)
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    assert torch.equal(penalise_repeats(logits, seen_tokens(ids, 97), 1.3), expected)
    assert torch.equal(penalise_repeats(logits, seen_tokens(ids, 97), 1.0), logits)


@settings(max_examples=40, deadline=None)
@given(LOGITS, st.floats(1.01, 3))
def test_a_penalty_never_helps_a_token(logits, penalty):
    after = penalise_repeats(logits[None], torch.ones(1, len(logits), dtype=torch.bool), penalty)[0]
    assert (after <= logits).all()


def test_padding_is_no_text_for_the_penalty():
    ids, padding = pad_left([[5, 6], [7, 8, 9, 7]])
    seen = seen_tokens(ids, 12, padding)
    assert [row.nonzero().flatten().tolist() for row in seen] == [[5, 6], [7, 8, 9]]


def test_sampling_follows_the_distribution_that_is_left():
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
    draws = sample(logits.expand(40_000, 6), temperature=1.5, min_p=0.3, generator=torch.Generator().manual_seed(1))
    expected = torch.softmax(logits[:3] / 1.5, dim=-1)  # exp(-2 / 1.5) is 0.26: the fourth is too unlikely
    assert kept(keep_min_p(logits / 1.5, 0.3)) == {0, 1, 2}
    torch.testing.assert_close(torch.bincount(draws, minlength=6)[:3] / 40_000, expected, atol=0.01, rtol=0)
    assert draws.max() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits_are_sampled_as_the_same_numbers_in_32_bits(dtype):
    logits = (4 * torch.randn(8, 49_152) + 12).to(dtype)
    for dials in ({"top_p": 0.95}, {"temperature": 1e-4}):  # so divided, 16 bits cannot hold them
        draws = [sample(x, **dials, generator=torch.Generator().manual_seed(1)) for x in (logits, logits.float())]
        assert torch.equal(*draws)


def test_a_temperature_too_small_to_divide_by_takes_the_largest():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, 1e-45).tolist() == sample(logits, 0.0).tolist() == [1]


def test_sampling_with_the_penalty_equals_transformers_choice_by_choice():
    ours = lively(LLAMA)
    text = tokens(2, 6)
    out = generate(ours, text, 25, temperature=0, repetition_penalty=1.4)
    penalty = theirs.RepetitionPenaltyLogitsProcessor(1.4)
    for n in range(6, 31):
        with torch.no_grad():
            expected = penalty(out[:, :n], ours(out[:, :n])[:, -1]).argmax(-1)
        assert torch.equal(out[:, n], expected)
    assert not torch.equal(out, generate(ours, text, 25, temperature=0))


# ---------------------------------------------------------------- the loop


@CONFIGS
@pytest.mark.parametrize("dials", [{"temperature": 0}, {"top_p": 0.9, "repetition_penalty": 1.2}, {"min_p": 0.2}])
def test_the_cache_changes_no_token(config, dials):
    model, prompt = lively(config), tokens(3, 7)
    texts = [generate(model, prompt, 40, generator=torch.Generator().manual_seed(5), use_cache=use_cache, **dials)
             for use_cache in (True, False)]
    assert torch.equal(*texts)


@CONFIGS
def test_each_token_is_the_best_after_all_before_it(config):
    model = lively(config)
    text = generate(model, tokens(2, 5), 30, temperature=0)
    with torch.no_grad():
        assert torch.equal(model(text)[:, 4:-1].argmax(-1), text[:, 5:])


@CONFIGS
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("dials", [{"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.5}])
def test_a_row_of_a_batch_is_what_it_is_alone(config, use_cache, dials):
    model = lively(config)
    prompts = [tokens(n).tolist() for n in (3, 11, 1, 7)]
    ids, padding = pad_left(prompts)
    together = generate(model, ids, 20, padding=padding, use_cache=use_cache, **dials)
    assert together.shape == (4, 31)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, torch.tensor([prompt]), 20, **dials)
        assert row[11 - len(prompt) :].tolist() == alone[0].tolist()


def test_forgotten_padding_would_be_noticed():
    model = lively(LLAMA)
    ids, padding = pad_left([tokens(3).tolist(), tokens(11).tolist()])
    with_mask = generate(model, ids, 20, padding=padding, temperature=0)
    without = generate(model, ids, 20, temperature=0)
    assert not torch.equal(with_mask[0], without[0])
    assert torch.equal(with_mask[1], without[1])


def test_pad_left_of_equal_lengths_needs_no_padding():
    ids, padding = pad_left([[1, 2], [3, 4]])
    assert ids.tolist() == [[1, 2], [3, 4]]
    assert padding.tolist() == [0, 0]
    model = lively(LLAMA)
    assert torch.equal(generate(model, ids, 9, padding=padding, temperature=0), generate(model, ids, 9, temperature=0))


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_ids_in_a_padded_batch(use_cache):
    model, (ids, padding) = lively(LLAMA), pad_left([[3], [5, 6, 7]])

    def written(stop_ids):
        generator = torch.Generator().manual_seed(3)
        return generate(model, ids, 20, padding=padding, generator=generator, stop_ids=stop_ids, use_cache=use_cache)

    free = written([])
    stop = next(int(i) for i in free[0, 5:12] if i not in free[1, 3:])
    text, end = written([stop]), 3 + free[0, 3:].tolist().index(stop)
    assert text[0, : end + 1].tolist() == free[0, : end + 1].tolist()
    assert set(text[0, end:].tolist()) == {stop}  # the row that has stopped repeats it
    assert torch.equal(text[1], free[1])  # the other goes on, undisturbed


def test_ids_that_come_out_can_be_trained_on():
    model = lively(LLAMA)
    text = generate(model, tokens(2, 4), 5)
    step = next(generate_tokens(model, tokens(2, 4), 5))
    beams = beam_search(model, tokens(1, 4), 5)
    for ids in (text, step[:, None], beams):
        assert not ids.is_inference()
        model(ids).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_a_choice_of_ones_own_may_change_the_logits_in_place():
    model = lively(LLAMA)

    def never_even(logits):
        logits[:, ::2] = -torch.inf
        return logits.argmax(dim=-1)

    steps = torch.stack(list(decode_steps(model, tokens(2, 4), 12, never_even)), dim=1)
    assert (steps % 2 == 1).all()


def test_steps_do_not_read_the_text_again(monkeypatch):
    model, lengths = lively(LLAMA), []
    inner = model.hidden_states

    def counted(ids, cache=None):
        lengths.append(ids.size(1))
        return inner(ids, cache)

    monkeypatch.setattr(model, "hidden_states", counted)
    generate(model, tokens(1, 9), 6, temperature=0)
    assert lengths == [9, 1, 1, 1, 1, 1]


# ---------------------------------------------------------------- beyond the context


def slow_rolling(model, text, n, limit):
    """Greedy, reading all that is visible at each step; visible is what the newer half has grown to."""
    visible = text.size(1)
    for _ in range(n):
        visible = limit - limit // 2 if visible > limit else visible
        with torch.no_grad():
            text = torch.cat([text, model(text[:, -visible:])[:, -1:].argmax(-1)], dim=1)
        visible += 1
    return text


@CONFIGS
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("use_cache", [True, False])
def test_rolling_forgets_the_older_half_when_the_context_is_full(config, length, use_cache):
    model, prompt = lively(config), tokens(2, length)
    text = generate(model, prompt, 80, temperature=0, rolling=True, use_cache=use_cache)
    assert text.shape == (2, length + 80)
    assert torch.equal(text, slow_rolling(model, prompt, 80, 64))


def test_rolling_within_the_context_changes_nothing():
    model, prompt = lively(LLAMA), tokens(2, 10)
    assert torch.equal(generate(model, prompt, 54, temperature=0, rolling=True),
                       generate(model, prompt, 54, temperature=0))


def test_rolling_a_padded_batch_is_each_row_alone_once_the_padding_is_gone():
    model = lively(LLAMA)
    ids, padding = pad_left([tokens(20).tolist(), tokens(60).tolist()])
    text = generate(model, ids, 40, temperature=0, padding=padding, rolling=True)
    reader = TextReader(model, padding)
    with torch.no_grad():
        for n in range(60, 90):
            logits = reader.read(ids if n == 60 else text[:, n - 1 : n])
            assert torch.equal(logits.argmax(-1), text[:, n])
    assert reader.padding.tolist() == [7, 0]  # of 40 positions, 33 forgotten at the 65th
    alone = generate(model, text[:1, 40:65], 7, temperature=0)
    assert torch.equal(alone[0], text[0, 40:72])


# ---------------------------------------------------------------- beams

TINY = GPTConfig(6, 16, 16, 2, 2)


def log_probability(model, text, n_prompt):
    with torch.no_grad():
        log_p = model(text[:, :-1]).log_softmax(-1)
    return log_p.gather(-1, text[:, 1:, None])[:, n_prompt - 1 :, 0].sum(-1)


@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_what_trying_everything_finds(seed):
    torch.manual_seed(seed)
    model, prompt = lively(TINY, std=0.6), tokens(1, 2, vocab_size=6)
    everything = torch.tensor(list(itertools.product(range(6), repeat=4)))
    texts = torch.cat([prompt.expand(len(everything), 2), everything], dim=1)
    best = texts[log_probability(model, texts, 2).argmax()]
    assert torch.equal(beam_search(model, prompt, 4, n_beams=6**3)[0], best)


@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_stop_token_too(seed, length_penalty):
    torch.manual_seed(seed)
    model, prompt, stop = lively(TINY, std=0.6), tokens(1, 2, vocab_size=5), 5
    best, best_score = None, -math.inf
    for n in range(1, 5):
        ends = torch.tensor(list(itertools.product(range(6), repeat=n)))
        whole = (ends[:, :-1] != stop).all(-1) & ((ends[:, -1] == stop) | (n == 4))
        texts = torch.cat([prompt.expand(int(whole.sum()), 2), ends[whole]], dim=1)
        scores = log_probability(model, texts, 2) / n**length_penalty
        if scores.max() > best_score:
            best, best_score = texts[scores.argmax()], scores.max()
    assert torch.equal(beam_search(model, prompt, 4, 6**3, length_penalty, [stop])[0], best)


def test_beams_equal_those_of_transformers():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4,
                                       bos_token_id=1, eos_token_id=11, pad_token_id=0)).eval()
    ours = GPT(GPT2).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25)
        copy_gpt2(ours, other)
    for seed, penalty in itertools.product(range(4), (0.0, 1.0, 1.5)):
        prompt = torch.randint(12, 97, (1, 5), generator=torch.Generator().manual_seed(seed))
        expected = other.generate(prompt, attention_mask=torch.ones_like(prompt), num_beams=4, do_sample=False,
                                  max_new_tokens=15, length_penalty=penalty, early_stopping="never")
        found = beam_search(ours, prompt, 15, 4, penalty, [11])
        assert found[0].tolist() == expected[0, : found.size(1)].tolist()


def copy_gpt2(ours, other):
    """The weights of a GPT-2 of transformers in our class; its linear layers are stored transposed."""
    state = other.transformer.state_dict()
    names = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f", "norm1": "ln_1", "norm2": "ln_2",
             "attention.w_qkv": "attn.c_attn", "attention.out_proj": "attn.c_proj", "mlp.w_up": "mlp.c_fc",
             "mlp.w_down": "mlp.c_proj"}
    for name, parameter in ours.named_parameters():
        part, kind = name.rsplit(".", 1)
        block = part.startswith("blocks.")
        key = names[part.split(".", 2)[2] if block else part]
        tensor = state[f"h.{part.split('.')[1]}.{key}.{kind}" if block else f"{key}.{kind}"]
        parameter.copy_(tensor.T if ".c_" in key and tensor.dim() == 2 else tensor)


def test_one_beam_is_greedy_and_more_are_at_least_as_likely():
    model, prompt = lively(LLAMA), tokens(1, 5)
    greedy = generate(model, prompt, 12, temperature=0)
    assert torch.equal(beam_search(model, prompt, 12, n_beams=1), greedy)
    assert log_probability(model, beam_search(model, prompt, 12, n_beams=8), 5) >= log_probability(model, greedy, 5)
    assert torch.equal(beam_search(model, prompt, 0), prompt)


@CONFIGS
def test_beams_carry_their_own_cache(config):
    model, prompt = lively(config, std=0.15), tokens(1, 5)
    found = beam_search(model, prompt, 20, n_beams=5)
    texts, scores = prompt, torch.zeros(1)
    with torch.no_grad():
        for _ in range(20):  # the same without a cache
            totals = (scores[:, None] + model(texts)[:, -1].log_softmax(-1)).flatten()
            scores, index = totals.topk(5)
            texts = torch.cat([texts[index // 97], index[:, None] % 97], dim=1)
    assert torch.equal(found, texts[:1])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("options", "message"), [
    ({"min_p": 0.0}, r"min_p is 0.0; it must be above 0 and at most 1"),
    ({"min_p": 1.2}, r"min_p is 1.2"),
    ({"top_p": math.nan}, r"top_p is nan"),
    ({"temperature": math.nan}, r"temperature is nan"),
    ({"temperature": math.inf}, r"temperature is inf; it must be 0 \(greedy\) or above, and finite"),
    ({"temperature": -1.0}, r"temperature is -1.0"),
    ({"top_k": 98}, r"top_k is 98; it must be 1 to 97"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0; it must be above 0"),
    ({"repetition_penalty": -1.2}, r"repetition_penalty is -1.2"),
    ({"max_new_tokens": -2}, r"-2 new tokens after 4 of the prompt: ask for 0 or more"),
    ({"max_new_tokens": -2, "rolling": True}, r"-2 new tokens after 4"),
    ({"max_new_tokens": 61}, r"do not fit the context length 64: ask for 0 to 60, shorten the prompt, or pass rolling"),
    ({"padding": torch.tensor([0, 4])}, r"padding is 4 in row 1; it must be 0 to 3"),
    ({"padding": torch.tensor([-1, 0])}, r"padding is -1 in row 0"),
    ({"padding": torch.tensor([1])}, r"padding has shape \(1,\) .* each of the 2 rows"),
    ({"padding": torch.tensor([0.0, 1.0])}, r"type torch.float32"),
])
def test_dials_and_padding_out_of_range(options, message):
    options = {"max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        generate_tokens(GPT(LLAMA), tokens(2, 4), **options)  # the call itself refuses, before the first step


@pytest.mark.parametrize("function", [generate, beam_search])
@pytest.mark.parametrize(("prompt", "message"), [
    (torch.zeros(1, 0, dtype=torch.long), r"prompt has shape \(1, 0\).*begin with the end-of-text token"),
    (torch.zeros(1, 65, dtype=torch.long), r"65 tokens exceed the context length 64"),
    (torch.tensor([[5, 97]]), r"reach from 5 to 97; the vocabulary has 0 to 96"),
    (torch.tensor([5, 6]), r"shape \(2,\)"),
])
def test_prompts_that_cannot_be_continued(function, prompt, message):
    with pytest.raises(ValueError, match=message):
        function(GPT(LLAMA), prompt, 3)


def test_a_rolling_prompt_is_checked_to_its_end():
    prompt = torch.zeros(1, 200, dtype=torch.long)
    prompt[0, 150] = 97
    with pytest.raises(ValueError, match="reach from 0 to 97"):
        generate(GPT(LLAMA), prompt, 3, rolling=True)


@pytest.mark.parametrize("prompts", [[], [[1, 2], []]])
def test_empty_prompts_are_not_padded(prompts):
    with pytest.raises(ValueError, match=rf"Of {len(prompts)} prompts"):
        pad_left(prompts)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite(bad, temperature):
    model = lively(LLAMA)
    with torch.no_grad():
        model.blocks[1].mlp.w_down.weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"The largest logit of row 0 is nan.*named_parameters"):
        generate(model, tokens(2, 4), 3, temperature=temperature)
    with pytest.raises(ValueError, match="named_parameters"):
        beam_search(model, tokens(1, 4), 3)


@pytest.mark.parametrize("row", [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3])
def test_logits_that_are_not_finite(row):
    logits = torch.tensor([[0.0, 1.0, 2.0], row])
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="largest logit of row 1"):
            sample(logits, temperature)
    check_logits(torch.tensor([[-math.inf, 0.0]]))  # a token may be forbidden


def test_beams_continue_one_prompt():
    for prompt, n_beams in ((tokens(2, 4), 4), (tokens(1, 4), 0)):
        with pytest.raises(ValueError, match="beam search continues one prompt"):
            beam_search(GPT(LLAMA), prompt, 3, n_beams)


def test_a_model_in_training_mode_is_left_in_it():
    model = lively(dataclasses.replace(LLAMA, dropout=0.5)).train()
    prompt = tokens(1, 4)
    found = beam_search(model, prompt, 8)
    assert model.training
    assert torch.equal(found, beam_search(model.eval(), prompt, 8))


def test_each_part_of_a_model_is_left_in_the_mode_it_was_in():
    model = lively(dataclasses.replace(LLAMA, dropout=0.5))
    generate(FusedDecoder(model), tokens(1, 4), 2)  # the decoder is new, so in training mode; the model is not
    assert not any(module.training for module in model.modules())
    model.train().blocks[0].eval()
    before = [module.training for module in model.modules()]
    generate(model, tokens(1, 4), 2)
    assert [module.training for module in model.modules()] == before


def test_greedy_loss_of_the_text_is_what_the_model_says():
    model = lively(LLAMA)
    text = generate(model, tokens(1, 4), 10, temperature=0)
    with torch.no_grad():
        loss = F.cross_entropy(model(text)[0, 3:-1], text[0, 4:], reduction="sum")
    torch.testing.assert_close(-loss, log_probability(model, text, 4)[0])
