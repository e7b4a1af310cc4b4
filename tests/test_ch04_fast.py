"""Chapter 4, fast generation: faster ways must say the same, and be wrong by no more than they admit."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ch04_gpt.fast_generation import (
    DraftModel,
    FusedDecoder,
    Int8Linear,
    RowLinear,
    accept_draft,
    divide_by_rms,
    in_pieces,
    int8_product,
    lookup_draft,
    next_distribution,
    prepare_for_decoding,
    quantize_int8,
    quantize_rows,
    speculative_generate,
    speculative_steps,
)
from ch04_gpt.gpt import GPT, GPTConfig, generate, generate_tokens
from tests.test_ch04_generation import lively, seed, tokens  # noqa: F401  seed is a fixture for every test

LLAMA = GPTConfig(97, 128, 48, 2, 6, n_kv_heads=2, d_ff=80, norm="rmsnorm", mlp="swiglu", position="rope", bias=False)
GPT2 = GPTConfig(97, 128, 48, 2, 4, tie_embeddings=False)
WINDOW = dataclasses.replace(LLAMA, window=9)
CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA, WINDOW], ids=["gpt2", "llama", "window"])


def same_distribution(counts, expected, n):
    """Whether counts of n draws agree with probabilities to within four standard errors and a little."""
    error = (expected * (1 - expected) / n).sqrt()
    return ((counts / n - expected).abs() <= 4 * error + 1e-4).all()


# ---------------------------------------------------------------- few rows at a time


@CONFIGS
def test_a_model_prepared_is_the_same_model(config):
    model, ids = lively(config), tokens(3, 20)
    before, text = model(ids), generate(model, ids, 15, temperature=0)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    for _ in range(2):  # twice is as once
        assert prepare_for_decoding(model) is model
        torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(generate(model, ids, 15, temperature=0), text)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == names
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert (model.lm_head.weight is model.token_embedding.weight) is config.tie_embeddings
    model(ids).sum().backward()  # it can still be trained
    other = GPT(config)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(ids), before, atol=1e-4, rtol=1e-4)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out", "n_pieces"), [(8, 12, 4), (12, 8, 4), (6, 9, 1), (9, 6, 1), (1, 4, 4),
                                                         (4, 1, 1)])
def test_a_few_rows_in_pieces_are_the_same_product(monkeypatch, n_in, n_out, n_pieces, bias):
    linear = torch.nn.Linear(n_in, n_out, bias=bias)
    layer = RowLinear.sharing(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    calls, product = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *both: calls.append(both[0].shape) or product(*both))
    few = [(n_in,), (1, n_in), (1, 1, n_in), (3, n_in), (2, 1, n_in), (8, 8, n_in)]
    for shape in [*few, (65, n_in), (0, n_in), (5, 13, n_in)]:
        x = torch.randn(shape, requires_grad=True)
        ours, theirs = layer(x), linear(x)
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs)
        grad = torch.randn_like(ours)
        for a, b in zip(torch.autograd.grad(ours, (x, layer.weight), grad),
                        torch.autograd.grad(theirs, (x, layer.weight), grad), strict=True):
            torch.testing.assert_close(a, b)
    assert calls == [(n_pieces, n_out // n_pieces, n_in)] * len(few)
    assert in_pieces(layer.weight).data_ptr() == layer.weight.data_ptr()  # no weight was moved
    layer.to("meta")(torch.empty(1, n_in, device="meta"))
    assert len(calls) == len(few)  # other devices have their own ways
    with pytest.raises(RuntimeError):
        RowLinear(n_in, n_out)(torch.randn(1, 2 * n_in))


def test_a_model_prepared_writes_the_same_on_two_threads(two_threads):
    for config in (GPT2, LLAMA):
        model, ids = lively(config), tokens(1, 20)
        text = generate(model, ids, 20, temperature=0)
        assert torch.equal(generate(prepare_for_decoding(model), ids, 20, temperature=0), text)
        assert sum(type(module) is RowLinear for module in model.modules()) > 4


def test_a_model_prepared_can_be_saved(tmp_path):
    model, ids = prepare_for_decoding(lively(LLAMA)), tokens(1, 9)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(ids), model(ids), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- a step in few calls


@pytest.mark.parametrize("config", [LLAMA, dataclasses.replace(LLAMA, n_kv_heads=6, d_ff=81, tie_embeddings=False),
                                    dataclasses.replace(LLAMA, head_dim=12, norm_eps=0.1, dropout=0.2)])
@pytest.mark.parametrize("batch", [1, 2, 15, 16])
def test_fused_steps_are_the_model_s(config, batch):
    model, ids = lively(config), tokens(batch, 20)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)  # what is multiplied into the matrices must show
    fused, ours, theirs = FusedDecoder(model), model.new_cache(), model.new_cache()
    for new in (ids[:, :7], *ids[:, 7:].split(1, dim=1)):
        torch.testing.assert_close(fused.lm_head(fused.hidden_states(new, ours)), model(new, theirs),
                                   atol=1e-4, rtol=1e-4)
    assert [part.length for part in ours] == [20] * config.n_layers
    assert torch.equal(generate(fused, ids[:, :1], 30, temperature=0), generate(model, ids[:, :1], 30, temperature=0))


def test_a_fused_decoder_stands_in_for_a_model_wherever_texts_are_written(two_threads):
    model, ids = lively(LLAMA), tokens(1, 20)
    fused = FusedDecoder(prepare_for_decoding(model))
    for options in ({}, {"rolling": True}, {"stop_ids": [3, 5]}):
        n = 150 if options.get("rolling") else 60
        assert torch.equal(generate(fused, ids, n, temperature=0, **options),
                           generate(model, ids, n, temperature=0, **options))
    assert torch.equal(speculative_generate(fused, ids, 60, temperature=0), generate(model, ids, 60, temperature=0))
    with pytest.raises(ValueError, match="shorten the text"):
        cache = fused.new_cache()
        fused(tokens(1, 128), cache)
        fused(tokens(1, 1), cache)


def test_one_row_in_half_precision_does_not_overflow():
    x = torch.full((1, 256), 100.0)
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        torch.testing.assert_close(divide_by_rms(x.to(kind), 1e-5), torch.ones(1, 256, dtype=kind))


def test_a_fused_decoder_leaves_padded_texts_and_the_model_alone():
    model, padding = lively(LLAMA), torch.tensor([3, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = tokens(2, 9)
    expected = generate(model, ids, 12, temperature=0, padding=padding)
    assert torch.equal(generate(FusedDecoder(model), ids, 12, temperature=0, padding=padding), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("config", "said"), [(GPT2, "layernorm"), (WINDOW, "'window': 9"),
                                              (dataclasses.replace(LLAMA, qk_norm=True), "'qk_norm': True")])
def test_a_model_of_another_kind_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        FusedDecoder(lively(config))


def test_a_quantised_model_is_refused():
    with pytest.raises(ValueError, match="Int8Linear"):
        FusedDecoder(quantize_int8(lively(LLAMA)))


# ---------------------------------------------------------------- eight bits


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 8), st.floats(1e-6, 1e6))
def test_rounding_is_never_off_by_more_than_half_a_step(rows, columns, bits, size):
    weight = size * torch.randn(rows, columns)
    integers, scale = quantize_rows(weight, bits)
    assert integers.dtype == torch.int8
    assert integers.abs().max() <= 2 ** (bits - 1) - 1
    error = (integers * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] * 0.5 * (1 + 1e-4)).all()
    largest = weight.abs().argmax(dim=1, keepdim=True)
    assert (integers.gather(1, largest).abs() == 2 ** (bits - 1) - 1).all()  # the whole range is used


def test_a_row_of_zeros_stays_zero():
    integers, scale = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert integers.tolist() == [[0, 0], [64, -127]]
    assert torch.isfinite(integers * scale[:, None]).all()


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_that_do_not_fit(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; it must be 2 to 8"):
        quantize_rows(torch.ones(2, 2), bits)


@pytest.mark.parametrize("shape", [(5, 7), (3000, 64), (2500, 1024), (3000, 1000), (4, 2**21)])
def test_a_product_in_slices_equals_the_product(shape):
    integers = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale, x = torch.rand(shape[0], dtype=torch.float64), torch.randn(6, shape[1], dtype=torch.float64)
    expected = x @ (integers * scale[:, None]).T
    torch.testing.assert_close(int8_product(x, integers, scale), expected)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 50])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
def test_the_layer_equals_its_definition(rows, bias, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(Int8Linear, "kernel", None)
    linear, x = nn.Linear(96, 160, bias=bias), torch.randn(1, rows, 96)
    integers, scale = quantize_rows(linear.weight.detach())
    with torch.no_grad():
        layer = Int8Linear(integers, scale, linear.bias)
        expected = F.linear(x, integers * scale[:, None], linear.bias)
        exact = not (kernel and rows <= 16)
        torch.testing.assert_close(layer(x), expected, atol=1e-5 if exact else 0.02, rtol=1e-5 if exact else 0.02)
        assert layer(x).dtype == x.dtype
        assert layer(x[0]).shape == (rows, 160)


def test_the_kernel_is_used_for_few_rows_of_whole_sixteens_only(monkeypatch):
    calls = []

    def kernel(x, integers, scale):  # the real one reads past the end of other widths
        assert x.is_contiguous()
        calls.append(tuple(x.shape))
        return x @ integers.to(x.dtype).T * scale

    monkeypatch.setattr(Int8Linear, "kernel", staticmethod(kernel))
    for width in (4, 16, 48, 100, 341, 344):
        layer = Int8Linear(*quantize_rows(torch.randn(8, width)))
        for rows in (1, 16, 17):
            x = torch.randn(width, rows).T
            exact = F.linear(x, layer.integers * layer.scale[:, None])
            torch.testing.assert_close(layer(x), exact, atol=0.2, rtol=0.02)
    assert calls == [(1, 16), (16, 16), (1, 48), (16, 48)]


def test_eight_bits_refuse_an_id_outside_the_vocabulary():
    small = quantize_int8(lively(LLAMA))
    for ids in ([[1, -1]], [[97]]):
        with pytest.raises(ValueError, match="the vocabulary has 0 to 96"):
            small(torch.tensor(ids))


@CONFIGS
def test_a_quantised_model_generates_through_the_same_function(config):
    model, ids = lively(config, std=0.1), tokens(2, 12)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    small = quantize_int8(model)
    with torch.no_grad():
        error = (small(ids) - model(ids)).abs().max() / model(ids).abs().max()
    assert error < 0.05
    text = generate(small, ids, 20, temperature=0)
    assert torch.equal(generate(small, ids, 20, temperature=0, use_cache=True), text)
    assert text.shape == (2, 32)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())  # a copy
    assert not any(isinstance(module, nn.Linear) for module in small.modules())
    assert small.device == model.device
    next(generate_tokens(small, ids, 3, top_p=0.9))


def test_a_model_prepared_for_decoding_can_be_quantised():
    model, ids = lively(LLAMA), tokens(1, 12)
    expected = generate(quantize_int8(model), ids, 20, temperature=0)
    assert torch.equal(generate(quantize_int8(prepare_for_decoding(model)), ids, 20, temperature=0), expected)


def test_the_fallback_makes_prefill_and_steps_agree(monkeypatch):
    monkeypatch.setattr(Int8Linear, "kernel", None)
    small, ids = quantize_int8(lively(LLAMA)), tokens(2, 12)
    texts = [generate(small, ids, 20, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)


def test_eight_bits_take_a_quarter_of_the_memory_and_tied_matrices_are_kept_once():
    model = lively(dataclasses.replace(LLAMA, vocab_size=4000))
    small = quantize_int8(model)
    tensors = {t.data_ptr(): t.nbytes for t in [*small.parameters(), *small.buffers()]}
    before = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert sum(tensors.values()) < 0.33 * sum(before.values())
    assert small.token_embedding.integers is small.lm_head.integers
    torch.testing.assert_close(small.token_embedding(torch.arange(50)), model.token_embedding.weight[:50].detach(),
                               atol=0.01, rtol=0.01)


def test_fewer_bits_are_less_exact():
    model, ids = lively(LLAMA), tokens(1, 60)
    with torch.no_grad():
        errors = [(quantize_int8(model, bits)(ids) - model(ids)).square().mean() for bits in (8, 6, 4, 3)]
    assert errors == sorted(errors)
    assert errors[-1] > 20 * errors[0]


# ---------------------------------------------------------------- speculative decoding


def test_lookup_finds_the_last_time():
    text = torch.tensor([1, 2, 3, 9, 9, 1, 2, 3, 7, 8, 5, 1, 2, 3])
    assert lookup_draft(text, 2)[0].tolist() == [7, 8]
    assert lookup_draft(text, 10)[0].tolist() == [7, 8, 5, 1, 2, 3]
    assert lookup_draft(text[:5], 4)[0].tolist() == []
    assert lookup_draft(torch.tensor([4, 4, 4, 4]), 3)[0].tolist() == [4]
    assert lookup_draft(torch.tensor([5, 6, 1, 5, 6]), 3)[0].tolist() == []
    assert lookup_draft(torch.tensor([5, 6, 1, 5, 6]), 3, size=2)[0].tolist() == [1, 5, 6]
    assert lookup_draft(torch.tensor([5]), 3)[0].tolist() == []
    assert lookup_draft(text, 0)[0].tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 6), st.integers(1, 4))
def test_lookup_equals_a_slow_search(ids, n, size):
    starts = [i for i in range(len(ids) - size) if ids[i : i + size] == ids[-size:]]
    expected = ids[starts[-1] + size :][:n] if starts else []
    assert lookup_draft(torch.tensor(ids), n, size)[0].tolist() == expected


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("case", range(3))
def test_accepted_text_is_distributed_as_the_model_says(certain, case):
    torch.manual_seed(case)
    model_says = (1.5 * torch.randn(3, 6)).softmax(-1)
    draft_says = (1.5 * torch.randn(2, 6)).softmax(-1)
    generator, n = torch.Generator().manual_seed(case), 8_000
    first, second = torch.zeros(6), torch.zeros(6)
    for _ in range(n):
        draft = torch.tensor([2, 4]) if certain else torch.multinomial(draft_says, 1, generator=generator)[:, 0]
        new = accept_draft(model_says, draft, None if certain else draft_says, generator)
        first[new[0]] += 1
        if len(new) > 1:
            second[new[1]] += 1
    assert same_distribution(first, model_says[0], n)
    assert same_distribution(second, model_says[1], second.sum())  # these distributions do not depend on the first


def test_a_perfect_draft_is_always_accepted_and_an_impossible_one_never():
    says = torch.tensor([[0.3, 0.7, 0.0]] * 4)
    for _ in range(50):
        assert len(accept_draft(says, torch.tensor([0, 1, 1]), says[:3])) == 4
        assert accept_draft(says, torch.tensor([2, 1, 1]))[0] != 2


@pytest.mark.parametrize("dials", [{"temperature": 0}, {"top_p": 0.99}, {"top_p": 0.95}])
def test_sixteen_bit_logits_are_cut_off_where_the_same_numbers_in_32_bits_are(dials):
    logits = (4 * torch.randn(8, 49_152) + 12).bfloat16()
    assert torch.equal(next_distribution(logits, **dials), next_distribution(logits.float(), **dials))


@CONFIGS
@pytest.mark.parametrize("n_draft", [0, 1, 6])
def test_greedy_text_is_token_for_token_the_same(config, n_draft):
    for number in range(4):
        torch.manual_seed(number)
        model, prompt = lively(config, std=0.15), tokens(1, 5).repeat(1, 3)  # something to look up
        expected = generate(model, prompt, 60, temperature=0)
        assert torch.equal(speculative_generate(model, prompt, 60, temperature=0, n_draft=n_draft), expected)


def test_drafts_save_calls_when_text_repeats():
    model = lively(dataclasses.replace(LLAMA, window=2))  # sees so little that it must run into a circle
    circle = generate(model, tokens(1, 5), 100, temperature=0)
    assert len(circle[0, 50:].unique()) < 25
    steps = list(speculative_steps(model, circle[:, :60], 60, temperature=0))
    assert sum(map(len, steps)) == 60
    assert len(steps) < 20


@pytest.mark.parametrize(("draft", "dials"), [
    ("lookup", {"temperature": 1.0}),
    ("model", {"temperature": 0.7, "top_p": 0.9}),
    ("model", {"min_p": 0.2, "top_k": 4}),
])
def test_sampled_text_has_the_distribution_of_plain_sampling(draft, dials):
    config = GPTConfig(5, 16, 16, 1, 2)
    model, other = lively(config, std=0.5), lively(config, std=0.5)
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    with torch.no_grad():  # the probability of all 125 texts of three ids
        texts = torch.cartesian_prod(*[torch.arange(5)] * 3)
        whole = torch.cat([prompt.expand(125, 5), texts], dim=1)
        says = next_distribution(model(whole)[:, 4:7], **dials)
        expected = says.gather(-1, texts[..., None]).prod(dim=1)[:, 0]
    generator, n = torch.Generator().manual_seed(3), 1_500
    propose = lookup_draft if draft == "lookup" else DraftModel(other, generator, **dials)
    counts = torch.zeros(125)
    for _ in range(n):
        text = speculative_generate(model, prompt, 3, propose=propose, generator=generator, **dials)[0, 5:]
        counts[text @ torch.tensor([25, 5, 1])] += 1
    assert same_distribution(counts, expected, n)


@CONFIGS
def test_a_model_drafts_for_itself_without_a_refusal(config):
    model, prompt = lively(config), tokens(1, 5)
    steps = list(speculative_steps(model, prompt, 42, temperature=0, propose=DraftModel(model, temperature=0)))
    assert [len(step) for step in steps] == [7] * 6
    assert torch.equal(torch.cat(steps), generate(model, prompt, 42, temperature=0)[0, 5:])


@CONFIGS
def test_a_bad_draft_model_costs_time_but_no_token(config):
    model, other, prompt = lively(config), lively(config), tokens(1, 5)
    propose = DraftModel(other, temperature=0)
    text = speculative_generate(model, prompt, 40, temperature=0, propose=propose)
    assert torch.equal(text, generate(model, prompt, 40, temperature=0))
    again = speculative_generate(model, tokens(1, 3), 20, temperature=0, propose=propose)  # another text
    assert again.shape == (1, 23)


@CONFIGS
def test_a_draft_model_forgets_what_was_refused(config):
    other, text = lively(config), tokens(12)
    propose = DraftModel(other, temperature=0)
    for _ in range(4):
        draft, _ = propose(text, 5)
        assert torch.equal(draft, DraftModel(other, temperature=0)(text, 5)[0])
        text = torch.cat([text, draft[:2], (draft[2:3] + 1) % 97])  # two accepted, the third refused
    another = torch.cat([(text[:4] + 1) % 97, text[4:]])
    assert torch.equal(propose(another, 5)[0], DraftModel(other, temperature=0)(another, 5)[0])


def test_a_call_reads_the_newest_id_and_the_draft_and_no_more(monkeypatch):
    model, prompt, read, drafted = lively(LLAMA), tokens(1, 9), [], []
    right, inner = generate(model, prompt, 40, temperature=0)[0], model.hidden_states

    def counted(ids, cache=None):
        read.append(ids.size(1))
        return inner(ids, cache)

    def propose(text, n):
        drafted.append(min(n, len(drafted) % 4))
        return right[len(text) :][: drafted[-1]], None  # every guess is right

    monkeypatch.setattr(model, "hidden_states", counted)
    speculative_generate(model, prompt, 30, temperature=0, propose=propose)
    assert read[0] == 9 + drafted[0]
    assert read[1:] == [1 + n for n in drafted[1:]]


@CONFIGS
def test_stop_ids_end_the_text_within_a_draft(config):
    model, prompt = lively(config), tokens(1, 5)
    free = generate(model, prompt, 60, temperature=0)
    for stop in free[0, 5:].unique().tolist()[:6]:
        expected = generate(model, prompt, 60, temperature=0, stop_ids=[stop])
        for propose in (lookup_draft, DraftModel(model, temperature=0)):
            text = speculative_generate(model, prompt, 60, temperature=0, stop_ids=[stop], propose=propose)
            assert torch.equal(text, expected)


def test_an_int8_draft_speaks_for_float32():
    model, prompt = lively(LLAMA, std=0.1), tokens(1, 5)
    draft = DraftModel(quantize_int8(model), temperature=0)
    steps = list(speculative_steps(model, prompt, 40, temperature=0, propose=draft))
    assert torch.equal(torch.cat(steps), generate(model, prompt, 40, temperature=0)[0, 5:])
    assert len(steps) < 25


@pytest.mark.parametrize(("prompt", "options", "message"), [
    (torch.zeros(2, 3, dtype=torch.long), {}, r"2 prompts and n_draft 6"),
    (torch.zeros(1, 3, dtype=torch.long), {"n_draft": 16}, r"n_draft 16: .* n_draft 0 to 15"),
    (torch.zeros(1, 3, dtype=torch.long), {"n_draft": -1}, r"n_draft -1"),
    (torch.zeros(1, 0, dtype=torch.long), {}, r"prompt has shape \(1, 0\)"),
    (torch.zeros(1, 125, dtype=torch.long), {}, r"do not fit the context length 128"),
    (torch.zeros(1, 3, dtype=torch.long), {"temperature": -1.0}, r"temperature is -1.0"),
    (torch.zeros(1, 3, dtype=torch.long), {"top_k": 98}, r"top_k is 98"),
])
def test_what_is_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        speculative_generate(GPT(LLAMA), prompt, 5, **options)


def test_weights_that_are_not_finite():
    model = lively(LLAMA)
    with torch.no_grad():
        model.blocks[0].mlp.w_up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="largest logit of row 0 is nan"):
        speculative_generate(model, tokens(1, 4), 5)


def test_up_to_the_last_place_of_the_context_and_no_further():
    model, prompt = lively(LLAMA), tokens(1, 20)
    text = speculative_generate(model, prompt, 108, temperature=0)
    assert torch.equal(text, generate(model, prompt, 108, temperature=0))
    assert torch.equal(speculative_generate(model, prompt, 0), prompt)
    assert not text.is_inference()
