"""Chapter 4's bill of a model: formulas against counts, counters and the memory that tensors really take."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ch04_gpt.gpt import GPT, PRESETS, GPTConfig, count_parameters, flops_per_token, kv_cache_bytes, llama_style
from ch04_gpt.memory_and_compute import (
    GPT3,
    activation_bytes,
    decoding_bound,
    forward_flops,
    inference_memory,
    parameter_counts,
    training_memory,
)

SHAPE = {"d_model": 96, "n_layers": 3, "n_heads": 6}
FAMILIES = {
    "gpt2": GPTConfig(500, 128, **SHAPE),
    "llama": llama_style(500, 128, **SHAPE, n_kv_heads=2, d_ff=256),
    "untied": llama_style(500, 128, **SHAPE, d_ff=200, tie_embeddings=False),
    "qwen3": llama_style(500, 128, **SHAPE, n_kv_heads=2, d_ff=256, head_dim=32, qk_norm=True),
}
WINDOW = llama_style(500, 128, **SHAPE, n_kv_heads=2, d_ff=256, window=16)
GPT2, LLAMA = PRESETS["gpt2-124m"], PRESETS["llama3.2-1b"]


def on_meta(config):
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("config", [*PRESETS.values(), *FAMILIES.values()], ids=[*PRESETS, *FAMILIES])
def test_parameters_equal_the_count(config):
    assert sum(parameter_counts(config).values()) == count_parameters(on_meta(config))


@settings(max_examples=30, deadline=None)
@given(layers=st.integers(1, 3), heads=st.integers(1, 4), width=st.integers(1, 6), bias=st.booleans(),
       tie=st.booleans(), norm=st.sampled_from(["layernorm", "rmsnorm"]), mlp=st.sampled_from(["gelu", "swiglu"]),
       position=st.sampled_from(["learned", "rope"]), qk_norm=st.booleans())
def test_parameters_of_any_mixture(layers, heads, width, bias, tie, norm, mlp, position, qk_norm):
    config = GPTConfig(11, 7, 2 * width * heads, layers, heads, 1, 13, norm, mlp, position, bias=bias,
                       tie_embeddings=tie, qk_norm=qk_norm)
    parts, model = parameter_counts(config), on_meta(config)
    named = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(parts.values()) == sum(named.values())
    assert parts["MLP"] == sum(n for name, n in named.items() if ".mlp." in name)
    assert parts["norms"] == sum(n for name, n in named.items() if "norm" in name)
    assert parts["attention"] == sum(n for name, n in named.items() if "w_qkv" in name or "out_proj" in name)


def test_published_sizes():
    published = {"gpt2-124m": 124_439_808, "smollm2-135m": 134_515_008, "llama3.2-1b": 1_235_814_400,
                 "llama3.2-3b": 3_212_749_824, "qwen3-0.6b": 596_049_920}
    assert {name: sum(parameter_counts(PRESETS[name]).values()) for name in published} == published
    assert sum(parameter_counts(GPT3).values()) == pytest.approx(175e9, rel=0.005)  # Brown et al. 2020, table 2.1
    assert 300e9 * 6 * sum(parameter_counts(GPT3).values()) == pytest.approx(3.14e23, rel=0.005)  # and table D.1


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_flops_equal_pytorchs_counter(config):
    T, counter = 40, FlopCounterMode(display=False)
    model, ids = on_meta(config), torch.zeros(1, T, dtype=torch.long, device="meta")
    with counter:
        total = model(ids).sum()
    masked = 4 * config.n_layers * config.n_heads * config.head_dim * T * (T - 1) // 2
    assert counter.get_total_flops() == forward_flops(config, T) + masked
    forward = counter.get_total_flops()
    with counter:
        total.backward()
    assert counter.get_total_flops() == 2 * forward


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), past=st.integers(0, 30), window=st.one_of(st.none(), st.integers(1, 40)))
def test_attention_counts_what_the_mask_lets_through(n, past, window):
    config = llama_style(10, 64, 8, 2, 2, d_ff=8, window=window)
    seen = sum(min(past + i + 1, window or 10**9) for i in range(n))
    weights = 2 * (8 * 24 + 8 * 8 + 3 * 8 * 8) + 10 * 8
    assert forward_flops(config, n, past) == 2 * n * weights + 4 * 2 * 8 * seen


def test_flops_add_up_over_steps_and_match_chapter_four():
    for config in (GPT2, LLAMA, PRESETS["qwen3-0.6b"]):
        steps = forward_flops(config, 100) + sum(forward_flops(config, 1, n_past=t) for t in range(100, 160))
        assert steps == forward_flops(config, 160)  # with a cache nothing is computed twice
        assert 3 * forward_flops(config, 1000) / 1000 == pytest.approx(flops_per_token(config, 1000), rel=1e-3)


def saved_bytes(model, ids):
    """Bytes of the distinct storages that a forward pass keeps, besides the model's own."""
    own, kept = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("config", [*FAMILIES.values(), WINDOW], ids=[*FAMILIES, "window"])
def test_activations_equal_what_autograd_keeps(config):
    ids = torch.randint(500, (2, 128))
    assert saved_bytes(GPT(config), ids) == pytest.approx(activation_bytes(config, 2, 128), rel=0.03)


@pytest.mark.parametrize("config", [FAMILIES["gpt2"], replace(FAMILIES["gpt2"], window=16)], ids=["gpt2", "window"])
def test_bfloat16_halves_all_activations_but_the_log_probabilities(config):
    ids = torch.randint(500, (2, 128))
    by_formula = activation_bytes(config, 2, 128, "bfloat16")
    assert saved_bytes(GPT(config).bfloat16(), ids) == pytest.approx(by_formula, rel=0.05)
    assert 2 * by_formula - activation_bytes(config, 2, 128) == 2 * 128 * 500 * 4


@pytest.mark.parametrize("config", [FAMILIES["llama"], WINDOW], ids=["llama", "window"])
def test_checkpointing_keeps_the_inputs_of_the_layers(config):
    model, ids = GPT(config), torch.randint(500, (2, 128))
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    shallow = replace(config, n_layers=2)
    inside = activation_bytes(config, 2, 128) - activation_bytes(shallow, 2, 128)
    assert saved_bytes(model, ids) == pytest.approx(
        activation_bytes(config, 2, 128, checkpointing=True) - inside, rel=0.02)


def test_training_memory_equals_tensors():
    config, ids = FAMILIES["qwen3"], torch.randint(500, (2, 64))
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    bill = training_memory(config, 2, 64)
    assert bill["weights"] == sum(p.nbytes for p in model.parameters())
    assert bill["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert bill["optimizer"] == sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    for precision in ("float32", "bfloat16"):  # 16 bytes a parameter either way
        bill = training_memory(config, 2, 64, precision)
        assert sum(bill.values()) - bill["activations"] == 16 * count_parameters(model)


def test_memory_grows_as_it_should():
    one, many = training_memory(GPT2, 1, 512), training_memory(GPT2, 8, 512)
    assert many["activations"] == 8 * one["activations"] and many["weights"] == one["weights"]
    lean = training_memory(GPT2, 8, 512, checkpointing=True)
    assert lean["activations"] < many["activations"] / 2 and lean["optimizer"] == many["optimizer"]
    assert inference_memory(LLAMA, 3, 1000)["cache"] == 3 * inference_memory(LLAMA, 1, 1000)["cache"]


def test_inference_memory():
    n = sum(parameter_counts(LLAMA).values())
    assert inference_memory(LLAMA, 1, 4096) == {"weights": 2 * n, "cache": kv_cache_bytes(LLAMA, 1, 4096, 2)}
    assert inference_memory(LLAMA, 1, 4096, "int8") == {"weights": n, "cache": kv_cache_bytes(LLAMA, 1, 4096, 2)}
    config = FAMILIES["llama"]
    cache, model = kv_cache_bytes(config, 2, 50, 4), GPT(config)
    pairs = [block.attention.queries_keys_values(torch.randn(2, 50, 96))[1:] for block in model.blocks]
    assert inference_memory(config, 2, 50, "float32")["cache"] == cache == sum(
        t.numel() * t.element_size() for pair in pairs for t in pair)


def test_gpt3_fits_no_laptop_and_124m_fits_one_gpu():
    assert inference_memory(GPT3, 1, 2048, "int8")["weights"] > 10 * 16e9
    assert sum(inference_memory(GPT3, 1, 2048).values()) > 4 * 80e9
    assert sum(training_memory(GPT3, 1, 2048, "bfloat16", checkpointing=True).values()) > 30 * 80e9
    assert sum(training_memory(GPT2, 32, 1024, "bfloat16").values()) < 80e9


def test_decoding_bound():
    slow_memory = decoding_bound(GPT2, 1, 1024, bandwidth=1e9, rate=1e18)
    assert slow_memory == pytest.approx(1e9 / sum(inference_memory(GPT2, 1, 1024).values()))
    slow_products = decoding_bound(GPT2, 1, 1024, bandwidth=1e18, rate=1e9)
    assert slow_products == pytest.approx(1e9 / forward_flops(GPT2, 1, n_past=1023))
    both = decoding_bound(GPT2, 4, 64, bandwidth=1e9, rate=4e9)  # the slower decides, they do not add up
    assert both == min(decoding_bound(GPT2, 4, 64, 1e9, 1e18), decoding_bound(GPT2, 4, 64, 1e18, 4e9))
    assert decoding_bound(GPT2, 8, 64, 1e9, 1e18) > 7 * decoding_bound(GPT2, 1, 64, 1e9, 1e18)
    assert decoding_bound(GPT2, 8, 64, 1e18, 1e9) == pytest.approx(decoding_bound(GPT2, 1, 64, 1e18, 1e9))


@pytest.mark.parametrize("make, message", [
    (lambda: training_memory(GPT2, 1, 512, "int8"), "precision is 'int8'; here it must be one of float32, bfloat16"),
    (lambda: inference_memory(GPT2, 1, 512, "int4"), "precision is 'int4'; here it must be one of float32, bfloat16, "),
    (lambda: training_memory(GPT2, 0, 512), "batch_size is 0 and context_length 512: both must be 1 or more"),
    (lambda: inference_memory(GPT2, 1, 0), "batch_size is 1 and context_length 0: both must be 1 or more"),
    (lambda: activation_bytes(GPT2, 1, 2048), "learned 1024 positions; a context of 2048 needs a config"),
    (lambda: forward_flops(GPT2, 0), "n_tokens is 0 and n_past 0; they must be at least 1 and 0"),
    (lambda: decoding_bound(GPT2, 1, 64, 0.0, 1e9), "bandwidth is 0.0 and rate 1000000000.0: both must be above 0"),
])
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
