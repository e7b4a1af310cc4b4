"""Chapter 4: the GPT equals independent implementations, and refuses what would fail later."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ch03_attention.attention import RopeScaling
from ch04_gpt.gpt import (
    CHOICES,
    GELU,
    GPT,
    MLP,
    PRESETS,
    GPTConfig,
    LayerNorm,
    RMSNorm,
    SwiGLU,
    TransformerBlock,
    count_parameters,
    flops_per_token,
    generate,
    generate_tokens,
    init_weights,
    kv_cache_bytes,
    learned_positions,
)

LLAMA = GPTConfig(97, 64, 48, 3, 6, n_kv_heads=2, d_ff=80, norm="rmsnorm", mlp="swiglu", position="rope",
                  rope_theta=5_000.0, bias=False, tie_embeddings=False, norm_eps=1e-6)
GPT2 = GPTConfig(97, 64, 48, 3, 4)
QWEN = dataclasses.replace(LLAMA, head_dim=16, qk_norm=True, norm_eps=1e-4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lively(model: GPT) -> GPT:
    """The model with weights large enough that attention and norms matter in a comparison."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 2 else 0.5))
    return model.eval()


def tokens(*shape, vocab_size=97):
    return torch.randint(vocab_size, shape)


# ---------------------------------------------------------------- parts against PyTorch


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_torch_and_its_definition(bias):
    ours, theirs, x = LayerNorm(24, 1e-2, bias), nn.LayerNorm(24, 1e-2, bias=bias), 0.2 + 0.1 * torch.randn(2, 7, 24)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    by_hand = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-2).sqrt() * ours.weight
    torch.testing.assert_close(ours(x), by_hand + ours.bias if bias else by_hand)


def test_rms_norm_equals_torch_and_its_definition():
    ours, theirs, x = RMSNorm(24, 1e-2), nn.RMSNorm(24, 1e-2), 0.2 + 0.1 * torch.randn(2, 7, 24)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * ours.weight)


@pytest.mark.parametrize(("ours", "theirs"), [
    (RMSNorm(24, 1e-2), nn.RMSNorm(24, 1e-2)), (LayerNorm(24, 1e-2), nn.LayerNorm(24, 1e-2)),
    (GELU(), nn.GELU("tanh"))], ids=["rms", "layer", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_equal_those_of_torch(ours, theirs, dtype):
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(mine)
        other.data = mine.data.clone()
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, grad = 0.2 + 3 * torch.randn(4, 7, 24, dtype=dtype), torch.randn(4, 7, 24, dtype=dtype)
    found, expected = [], []
    for module, results in ((ours, found), (theirs, expected)):
        given = x.clone().requires_grad_()
        y = module(given)
        results += [y, *torch.autograd.grad(y, (given, *module.parameters()), grad)]
        assert all(result.dtype == dtype for result in results)
    loose = {"atol": 0.1, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(found, expected, **loose)
    ours.float(), theirs.float()


def test_a_single_vector_and_a_width_that_does_not_fit():
    norm, x = RMSNorm(8), torch.randn(8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == norm.weight.grad.shape == (8,)
    for width in (1, 4):
        with pytest.raises(RuntimeError, match=r"normalized_shape=\[8\]"):
            norm(torch.randn(2, width))


def test_without_gradients_the_same_numbers_come_out():
    norm, x = RMSNorm(24), torch.randn(3, 5, 24) * 4
    with torch.no_grad():
        plain = norm(x)
    torch.testing.assert_close(norm(x), plain, atol=2e-6, rtol=1e-5)


def test_in_sixteen_bits_the_library_computes():
    x = (torch.randn(50, 24) * 4).bfloat16()  # its kernels round once, not after each step
    assert torch.equal(RMSNorm(24).bfloat16()(x), F.rms_norm(x, (24,), torch.ones(24).bfloat16(), 1e-5))


def test_a_gradient_by_formula_refuses_to_be_differentiated_twice():
    x = torch.randn(2, 8, requires_grad=True)
    first, = torch.autograd.grad(RMSNorm(8)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(GELU()(x), x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def test_mlps_equal_their_formulas_position_by_position():
    x, mlp, gated = torch.randn(2, 5, 12), MLP(12, 30), SwiGLU(12, 30)
    hidden = F.gelu(x @ mlp.w_up.weight.T + mlp.w_up.bias, approximate="tanh")
    torch.testing.assert_close(mlp(x), hidden @ mlp.w_down.weight.T + mlp.w_down.bias)
    gate = x @ gated.w_gate.weight.T
    hidden = gate * torch.sigmoid(gate) * (x @ gated.w_up.weight.T)
    torch.testing.assert_close(gated(x), hidden @ gated.w_down.weight.T)
    torch.testing.assert_close(gated(x)[:, 3], gated(x[:, 3]))
    assert all(layer.bias is None for layer in (gated.w_gate, gated.w_up, gated.w_down))


def test_block_equals_torch_encoder_layer():
    block = TransformerBlock(GPT2)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = nn.TransformerEncoderLayer(48, 4, 192, dropout=0.0, activation=GELU(), batch_first=True, norm_first=True)
    names = {"norm1.": "norm1.", "norm2.": "norm2.", "self_attn.in_proj_": "attention.w_qkv.",
             "self_attn.out_proj.": "attention.out_proj.", "linear1.": "mlp.w_up.", "linear2.": "mlp.w_down."}
    state = block.state_dict()
    theirs.load_state_dict({f"{a}{kind}": state[f"{b}{kind}"] for a, b in names.items() for kind in ("weight", "bias")})
    x = torch.randn(2, 9, 48)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_future_does_not_change_the_past_and_the_past_changes_the_future(config):
    model, ids = lively(GPT(config)), tokens(2, 20)
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 97
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12], atol=1e-5, rtol=1e-5)
    assert ((after[:, 12:] - before[:, 12:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("change", [
    {"norm": "layernorm"}, {"norm_eps": 1e-2}, {"rope_theta": 100.0}, {"window": 3},
    {"rope_scaling": RopeScaling(8.0)}],
    ids=lambda change: next(iter(change)))
def test_every_setting_reaches_the_model(change):
    """Two models with the same weights and one setting apart give different logits."""
    base = dataclasses.replace(QWEN, context_length=4096, rope_theta=5_000.0)
    models = [lively(GPT(base)), lively(GPT(dataclasses.replace(base, **change)))]
    models[1].load_state_dict(models[0].state_dict())
    ids = tokens(1, 40)
    with torch.no_grad():
        assert (models[0](ids) - models[1](ids)).abs().max() > 1e-3


def test_head_dim_and_qk_norm_have_their_shapes_and_eps():
    attention = GPT(QWEN).blocks[0].attention
    assert attention.w_qkv.weight.shape == ((6 + 2 * 2) * 16, 48)
    assert attention.out_proj.weight.shape == (48, 6 * 16)
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (16,)
    assert attention.q_norm.eps == QWEN.norm_eps
    assert GPT(QWEN).blocks[0].norm1.eps == QWEN.norm_eps


@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN], ids=["gpt2", "llama", "qwen"])
def test_padding_on_the_left_changes_nothing(config):
    model, padding = lively(GPT(config)), torch.tensor([0, 3, 7])
    ids, cache = tokens(3, 12), model.new_cache(padding)
    with torch.no_grad():
        found = torch.cat([model(ids[:, :9], cache), *(model(ids[:, i : i + 1], cache) for i in range(9, 12))], dim=1)
        for row, empty in enumerate(padding.tolist()):
            torch.testing.assert_close(found[row, empty:], model(ids[row : row + 1, empty:])[0], atol=1e-4, rtol=1e-4)


def test_learned_positions_count_from_the_end_of_the_padding():
    weight = torch.arange(10.0)[:, None]
    assert learned_positions(weight, 4, 3).flatten().tolist() == [4, 5, 6]
    padded = learned_positions(weight, 4, 3, torch.tensor([0, 2, 6]))
    assert padded.squeeze(-1).tolist() == [[4, 5, 6], [2, 3, 4], [0, 0, 0]]


@pytest.mark.parametrize("config", [GPT2, QWEN, dataclasses.replace(QWEN, window=5)], ids=["gpt2", "qwen", "window"])
def test_reading_in_pieces_equals_reading_at_once(config):
    model, ids = lively(GPT(config)), tokens(2, 24)
    with torch.no_grad():
        expected = model(ids)
        for cuts in ((1,), (7, 8, 20), tuple(range(1, 24))):
            cache = model.new_cache()
            pieces = [model(piece, cache) for piece in ids.tensor_split(cuts, dim=1)]
            torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_only():
    model, ids = lively(GPT(dataclasses.replace(GPT2, dropout=0.5))), tokens(1, 10)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# ---------------------------------------------------------------- initialisation, counts


def test_initial_standard_deviations_and_loss():
    model = GPT(GPTConfig(512, 64, 128, 8, 4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            writes = name.endswith(("out_proj.weight", "w_down.weight"))
            expected = 0.02 / math.sqrt(16) if writes else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < expected / 10, name
    ids = tokens(8, 64, vocab_size=512)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_init_weights_is_the_same_for_the_same_seed():
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(GPT(GPT2))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    torch.manual_seed(6)
    init_weights(models[1])
    assert not torch.equal(models[0].token_embedding.weight, models[1].token_embedding.weight)


@pytest.mark.parametrize(("name", "parameters"), [
    ("gpt2-124m", 124_439_808), ("gpt2-355m", 354_823_168), ("gpt2-774m", 774_030_080),
    ("gpt2-1558m", 1_557_611_200), ("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120),
    ("llama3.2-1b", 1_235_814_400), ("llama3.2-3b", 3_212_749_824),
    ("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976), ("qwen3-4b", 4_022_468_096)])
def test_presets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        assert count_parameters(GPT(PRESETS[name])) == parameters


def test_promised_presets_and_tying():
    assert {"gpt2-124m", "gpt2-1558m", "smollm2-135m", "storyteller", "512d-8h-6l", "512d-8h-12l"} <= set(PRESETS)
    for name, config in PRESETS.items():
        if name.startswith("llama3.2"):
            assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192) and config.rope_theta == 500_000
        if name.startswith("qwen3"):
            assert (config.head_dim, config.qk_norm, config.rope_theta, config.norm_eps) == (128, True, 1e6, 1e-6)
        assert config.tie_embeddings
    untied = dataclasses.replace(GPT2, tie_embeddings=False)
    assert count_parameters(GPT(untied)) == count_parameters(GPT(GPT2)) + 97 * 48


@pytest.mark.parametrize("config", [GPT2, LLAMA, dataclasses.replace(LLAMA, tie_embeddings=True), QWEN],
                         ids=["gpt2", "llama", "tied llama", "qwen"])
def test_flops_per_token_equals_torch_counter(config):
    model, ids = GPT(config), tokens(2, 32)
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_only:
        model(ids).sum().backward()
    # The counter sees attention's full T x T products; a causal mask needs half of them.
    unneeded = 6 * config.n_layers * config.n_heads * config.head_dim * 32
    # ... and no gradient is computed for the embedding's input, which has no matrix product either.
    assert counter.get_total_flops() == 2 * 32 * (flops_per_token(config, 32) + unneeded)


def test_flops_of_no_context_are_refused():
    with pytest.raises(ValueError, match="context_length is 0; it must be at least 1"):
        flops_per_token(GPT2, 0)


def test_flops_with_a_window_count_the_positions_that_are_seen():
    def attention(window, length):
        config = dataclasses.replace(QWEN, window=window)
        seen = sum(min(i + 0.5, window) if i >= window else i + 0.5 for i in range(length)) / length
        return flops_per_token(config, length), 12 * config.n_layers * config.n_heads * config.head_dim * seen
    (narrow, expected), (wide, more) = attention(8, 64), attention(64, 64)
    assert wide == flops_per_token(QWEN, 64)
    assert wide - narrow == pytest.approx(more - expected, rel=0.01)
    assert attention(8, 4)[0] == flops_per_token(QWEN, 4)


@pytest.mark.parametrize("config", [LLAMA, QWEN, dataclasses.replace(QWEN, window=4)], ids=["llama", "qwen", "window"])
def test_kv_cache_bytes_is_what_the_cache_holds(config):
    model = GPT(config)
    cache = model.new_cache()
    model(tokens(3, 10), cache)
    key = torch.zeros(3, 2, 1, config.head_dim)
    held = [tensor for layer in cache for tensor in layer.append(key, key)]  # now 11 positions
    assert kv_cache_bytes(config, 3, 11, bytes_per_value=4) == sum(t.numel() * t.element_size() for t in held)


# ---------------------------------------------------------------- generating (more in test_ch04_generation.py)


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_ids_end_rows_one_by_one(use_cache):
    model, prompt = lively(GPT(LLAMA)), tokens(4, 5)
    generator = torch.Generator().manual_seed(3)
    free = generate(model, prompt, 30, generator=generator, use_cache=use_cache)
    stop = {int(free[0, 8]), int(free[1, 15])}
    generator = torch.Generator().manual_seed(3)
    text = generate(model, prompt, 30, stop_ids=stop, generator=generator, use_cache=use_cache)
    stopped = 0
    for row, full in zip(text[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in stop]
        until = ends[0] + 1 if ends else len(row)
        stopped += bool(ends)
        assert row[:until] == full[:until]  # a row that stops does not disturb the others
        assert set(row[until:]) <= {row[until - 1]}
    assert stopped >= 2


def test_generation_ends_when_all_rows_have_stopped():
    model, prompt = lively(GPT(LLAMA)), tokens(2, 5)
    first = generate(model, prompt, 1, temperature=0)[:, -1]
    assert generate(model, prompt, 30, temperature=0, stop_ids=first.tolist()).shape == (2, 6)
    assert torch.equal(generate(model, prompt, 0), prompt)


def test_the_same_generator_gives_the_same_text_and_another_seed_another():
    model, prompt = lively(GPT(LLAMA)), tokens(1, 5)
    texts = [generate(model, prompt, 30, temperature=2.0, generator=torch.Generator().manual_seed(seed))
             for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_generate_tokens_streams_what_generate_returns():
    model, prompt = lively(GPT(GPT2)), tokens(2, 5)
    steps = list(generate_tokens(model, prompt, 10, temperature=0))
    assert all(step.shape == (2,) and not step.requires_grad for step in steps)
    assert torch.equal(torch.stack(steps, 1), generate(model, prompt, 10, temperature=0)[:, 5:])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("change", "message"), [
    ({"n_heads": 5, "n_kv_heads": None, "head_dim": None}, "d_model 48 does not divide into 5 heads: .*45 or 50"),
    ({"n_kv_heads": 4}, "6 query heads cannot share 4 key-value heads evenly: n_kv_heads must be one of 1, 2, 3, 6"),
    ({"n_heads": 16, "n_kv_heads": 16, "head_dim": None}, "Each head has 3 dimensions; .*must be even"),
    ({"head_dim": 7}, "Each head has 7 dimensions; .*must be even"),
    ({"head_dim": 0}, "head_dim is 0; it must be a whole number of at least 1"),
    ({"window": 0}, "window is 0; it must be a whole number of at least 1"),
    ({"n_kv_heads": 0}, "n_kv_heads is 0; it must be a whole number of at least 1"),
    ({"n_heads": "6"}, "n_heads is '6'; it must be a whole number of at least 1"),
    ({"d_model": None}, "d_model is None; it must be a whole number of at least 1"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be above 0"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be above 0"),
    ({"position": "learned", "rope_scaling": RopeScaling()}, "rope_scaling is given, but position is 'learned'"),
    ({"n_layers": 0}, "n_layers is 0; it must be a whole number of at least 1"),
    ({"vocab_size": 9.5}, "vocab_size is 9.5; it must be a whole number"),
    ({"norm": "batchnorm"}, "norm is 'batchnorm'; it must be one of layernorm, rmsnorm"),
    ({"mlp": "relu"}, "mlp is 'relu'; it must be one of gelu, swiglu"),
    ({"position": "alibi"}, "position is 'alibi'; it must be one of learned, rope"),
    ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
])
def test_configurations_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_configuration_fills_in_and_is_frozen():
    assert (GPT2.n_kv_heads, GPT2.d_ff, GPT2.head_dim) == (4, 192, 12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPT2.n_layers = 5


def test_to_replace_heads_or_width_what_was_filled_in_is_emptied_as_the_docstring_says():
    names = [field.name for field in dataclasses.fields(GPTConfig)
             if field.default is None and getattr(GPT2, field.name) is not None]
    assert len(names) == 3 and all(f"``{name}=None``" in GPTConfig.__doc__ for name in names)
    more = dataclasses.replace(GPT2, n_heads=8, head_dim=None, n_kv_heads=None)
    assert (more.n_kv_heads, more.head_dim) == (8, 6)


@pytest.mark.parametrize("name", [*PRESETS, "window"])
def test_configurations_go_through_json_and_back(name):
    config = PRESETS.get(name) or dataclasses.replace(QWEN, window=9)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("change", "message"), [
    ({"n_head": 4, "dim": 3}, "a GPTConfig: unknown 'n_head', 'dim'. It knows vocab_size, .*, window."),
    ({"d_model": ...}, "missing 'd_model'"),
    ({"rope_scaling": {"factor": 8.0, "kind": "yarn"}}, "a RopeScaling: unknown 'kind'. It knows factor"),
    ({"n_layers": 0}, "n_layers is 0"),
])
def test_dictionaries_that_are_no_configuration(change, message):
    given = {name: value for name, value in (LLAMA.to_dict() | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict(given)


def test_configurations_of_before_the_new_settings_still_load():
    old = {name: value for name, value in LLAMA.to_dict().items()
           if name not in ("head_dim", "qk_norm", "rope_scaling", "window")}
    assert GPTConfig.from_dict(old) == LLAMA


def test_every_choice_builds():
    for norm in CHOICES["norm"]:
        for mlp in CHOICES["mlp"]:
            for position in CHOICES["position"]:
                assert GPT(GPTConfig(20, 8, 8, 1, 2, norm=norm, mlp=mlp, position=position))(tokens(1, 8, vocab_size=20)
                                                                                         ).shape == (1, 8, 20)


def test_an_unknown_id_is_named_on_the_way_too():
    model = GPT(LLAMA)
    cache = model.new_cache()
    model(tokens(1, 4), cache)
    for ids in ([[97]], [[-1]]):
        with pytest.raises(ValueError, match="the vocabulary has 0 to 96"):
            model(torch.tensor(ids), cache)


@pytest.mark.parametrize(("ids", "message"), [
    (torch.zeros(1, 65, dtype=torch.long), "65 tokens exceed the context length 64: keep 64"),
    (torch.tensor([[3, 97]]), "reach from 3 to 97; the vocabulary has 0 to 96: .*another tokenizer"),
    (torch.tensor([[-1, 5]]), "reach from -1 to 5; the vocabulary has 0 to 96"),
    (torch.tensor([3, 4]), r"shape \(2,\); the model takes \(B, T\)"),
    (torch.zeros(1, 0, dtype=torch.long), r"shape \(1, 0\); the model takes \(B, T\)"),
])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_token_ids_that_do_not_fit(config, ids, message):
    model = GPT(config)
    for attempt in (lambda: model(ids), lambda: generate(model, ids, 0)):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_a_cache_counts_towards_the_context():
    model = GPT(GPT2)
    cache = model.new_cache()
    model(tokens(1, 60), cache)
    with pytest.raises(ValueError, match="65 tokens exceed the context length 64"):
        model(tokens(1, 5), cache)
