"""Latents, windows, sinks and states against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from ch03_attention.attention import RotaryEmbedding, causal_mask
from ch03_attention.attention_variants import (
    LatentAttention,
    gated_delta_rule,
    gated_delta_rule_recurrent,
    layers_needed,
    linear_attention,
    linear_attention_recurrent,
    sink_mask,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- latent attention


def latent_layer(**options):
    sizes = {"d_model": 48, "n_heads": 6, "head_dim": 8, "latent_dim": 12, "rope": RotaryEmbedding(4, 64)}
    return LatentAttention(**(sizes | options)).double()


def through_cache(layer, x, pieces):
    outputs, cache = [], None
    for piece in x.split(pieces, dim=1):
        out, cache = layer(piece, cache)
        outputs.append(out)
    return torch.cat(outputs, dim=1), cache


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [23, 1, 1, 7, 1, 7], [1, 39]])
@torch.no_grad()
def test_absorbed_through_the_cache_equals_expanded(pieces):
    layer, x = latent_layer(), torch.randn(2, 40, 48, dtype=torch.float64)
    out, cache = through_cache(layer, x, pieces)
    assert_close(out, layer.expanded(x))
    assert cache.shape == (2, 40, 12 + 4)
    assert_close(cache, layer.compress(x))


@torch.no_grad()
def test_latent_attention_equals_its_definition_head_by_head():
    layer, x = latent_layer(), torch.randn(1, 9, 48, dtype=torch.float64)
    latent, turned_key = layer.compress(x)[0].split([12, 4], dim=-1)
    what, where = layer.queries(x)
    heads = []
    for h in range(6):
        key, value = latent @ layer.w_key[h], latent @ layer.w_value[h]
        scores = (what[0, h] @ key.T + where[0, h] @ turned_key.T) / (8 + 4) ** 0.5
        heads.append(scores.masked_fill(~causal_mask(9), -torch.inf).softmax(-1) @ value)
    assert_close(layer.expanded(x)[0], layer.out_proj(torch.cat(heads, dim=-1)))


@torch.no_grad()
def test_latent_attention_gradients_agree_in_both_forms():
    with torch.enable_grad():
        layer, x = latent_layer(), torch.randn(2, 15, 48, dtype=torch.float64)
        direction = torch.randn(2, 15, 48, dtype=torch.float64)
        absorbed = torch.autograd.grad(layer(x)[0], list(layer.parameters()), direction)
        expanded = torch.autograd.grad(layer.expanded(x), list(layer.parameters()), direction)
    for mine, expected in zip(absorbed, expanded, strict=True):
        assert_close(mine, expected)


@torch.no_grad()
def test_latent_scores_depend_on_distances_only():
    layer, x = latent_layer(), torch.randn(1, 10, 48, dtype=torch.float64)
    what, where = layer.queries(x, start=0)
    later_what, later_where = layer.queries(x, start=30)
    assert_close(what, later_what)
    for start, query in ((0, where), (30, later_where)):
        scores = query[0, 0] @ layer.compress(x, start)[0, :, 12:].T
        assert_close(scores, where[0, 0] @ layer.compress(x, 0)[0, :, 12:].T, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(where, later_where)


@torch.no_grad()
def test_latent_attention_sees_no_future():
    layer, x = latent_layer(), torch.randn(1, 20, 48, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12:] = 7.0
    for form in (layer.expanded, lambda x: layer(x)[0]):
        assert_close(form(changed)[:, :12], form(x)[:, :12])
        assert not torch.allclose(form(changed)[:, 12:], form(x)[:, 12:])


@pytest.mark.parametrize("name", ["n_heads", "head_dim", "latent_dim"])
def test_latent_attention_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        latent_layer(**{name: 0})


# ---------------------------------------------------------------- windows and sinks


def test_windows_add_up():
    needed = layers_needed(60, [8] * 4)
    distance = torch.arange(60)[:, None] - torch.arange(60)
    expected = torch.where((distance >= 0) & (distance <= 4 * 7), (distance + 6) // 7, -1)
    assert torch.equal(needed, expected)


@given(st.lists(st.one_of(st.integers(1, 9), st.none()), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_layers_needed_says_where_a_change_arrives(windows):
    n = 16
    needed = layers_needed(n, windows)
    x = torch.eye(n, dtype=torch.float64)  # column s: what came from position s
    for depth, window in enumerate([None, *windows]):
        if depth:
            mask = causal_mask(n, window=window).double()
            x = mask / mask.sum(1, keepdim=True) @ x
        assert torch.equal(x > 0, (needed >= 0) & (needed <= depth))


@pytest.mark.parametrize(("n", "window", "sinks"), [(20, 5, 0), (20, 5, 3), (20, 1, 1), (6, 9, 2), (6, 2, 9)])
def test_sink_mask_entry_by_entry(n, window, sinks):
    expected = [[s <= t and (t - s < window or s < sinks) for s in range(n)] for t in range(n)]
    assert sink_mask(n, window, sinks).tolist() == expected


def test_sink_mask_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="sinks is -1; .* at least 0"):
        sink_mask(10, 4, -1)
    with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
        sink_mask(10, 0, 4)


# ---------------------------------------------------------------- linear attention


def tensors(*shapes):
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def test_linear_attention_equals_its_definition():
    query, key, value = tensors((12, 4), (12, 4), (12, 3))
    for t in range(12):
        weights = torch.stack([(F.elu(query[t]) + 1) @ (F.elu(key[s]) + 1) for s in range(t + 1)])
        expected = weights @ value[: t + 1] / weights.sum()
        assert_close(linear_attention(query, key, value)[t], expected)


def test_linear_attention_forms_agree_and_the_state_continues():
    query, key, value = tensors((2, 3, 30, 4), (2, 3, 30, 4), (2, 3, 30, 5))
    expected = linear_attention(query, key, value)
    out, state = linear_attention_recurrent(query, key, value)
    assert_close(out, expected)
    first, middle = linear_attention_recurrent(query[..., :13, :], key[..., :13, :], value[..., :13, :])
    rest, last = linear_attention_recurrent(query[..., 13:, :], key[..., 13:, :], value[..., 13:, :], middle)
    assert_close(torch.cat([first, rest], dim=-2), expected)
    assert_close(last, state)
    assert state.shape == (2, 3, 4, 6)


def test_linear_attention_is_an_average():
    query, key, _ = tensors((10, 4), (10, 4), (10, 1))
    assert_close(linear_attention(query, key, torch.full((10, 2), 3.0, dtype=torch.float64)),
                 torch.full((10, 2), 3.0, dtype=torch.float64))


# ---------------------------------------------------------------- the gated delta rule


def delta_inputs(*batch, n=50, d=6, e=5):
    query, key, value = tensors((*batch, n, d), (*batch, n, d), (*batch, n, e))
    gates = torch.rand(2, *batch, n, dtype=torch.float64)
    return query, F.normalize(key, dim=-1), value, gates[0], gates[1].clamp(min=0.01)


def test_recurrent_form_equals_equation_10():
    query, key, value, beta, decay = delta_inputs()
    state = torch.zeros(5, 6, dtype=torch.float64)  # the paper's S: values by keys
    out, last = gated_delta_rule_recurrent(query, key, value, beta, decay)
    for t in range(50):
        k, v = key[t], value[t]
        state = state @ (decay[t] * (torch.eye(6, dtype=torch.float64) - beta[t] * torch.outer(k, k)))
        state = state + beta[t] * torch.outer(v, k)
        assert_close(out[t], state @ query[t])
    assert_close(last, state.T)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 50, 64])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_chunks_equal_steps(chunk_size, batch):
    inputs = delta_inputs(*batch)
    expected, state = gated_delta_rule_recurrent(*inputs)
    out, last = gated_delta_rule(*inputs, chunk_size=chunk_size)
    assert_close(out, expected)
    assert_close(last, state)


def test_chunks_continue_from_a_state():
    inputs = delta_inputs(2)
    expected, state = gated_delta_rule_recurrent(*inputs)
    cut = [x[:, :21] for x in inputs], [x[:, 21:] for x in inputs]
    first, middle = gated_delta_rule(*cut[0], chunk_size=8)
    rest, last = gated_delta_rule(*cut[1], state=middle, chunk_size=8)
    assert_close(torch.cat([first, rest], dim=1), expected)
    assert_close(last, state)


def test_chunks_and_steps_have_the_same_gradients():
    inputs = [x.requires_grad_() for x in delta_inputs(2, n=20)]
    grads = []
    for function in (gated_delta_rule_recurrent, lambda *x: gated_delta_rule(*x, chunk_size=6)):
        out, state = function(*inputs)
        grads.append(torch.autograd.grad(out.square().sum() + state.sum(), inputs))
    for mine, expected in zip(*grads, strict=True):
        assert_close(mine, expected)


def test_strong_forgetting_over_a_long_chunk_stays_finite():
    query, key, value, beta, decay = (x.float() for x in delta_inputs(n=200))
    decay = decay.fill_(1e-3)  # the product over the chunk is far below the smallest float
    out, state = gated_delta_rule(query, key, value, beta, decay, chunk_size=200)
    expected, last = gated_delta_rule_recurrent(query, key, value, beta, decay)
    assert torch.isfinite(out).all()
    assert_close(out, expected)
    assert_close(state, last)


def test_the_delta_rule_overwrites_and_a_beta_of_zero_writes_nothing():
    keys = torch.eye(3)[[0, 1, 0, 2]]
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0], [9.0, 9.0]])
    _, state = gated_delta_rule(keys, keys, values, torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.ones(4))
    assert_close(state, torch.tensor([[5.0, 5.0], [0.0, 1.0], [0.0, 0.0]]))


def test_as_many_perpendicular_keys_as_dimensions_are_recalled_exactly():
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    values = torch.randn(8, 3, dtype=torch.float64)
    ones = torch.ones(8, dtype=torch.float64)
    _, state = gated_delta_rule(keys, keys, values, ones, ones)
    assert_close(keys @ state, values)


@pytest.mark.parametrize(("decay", "words"), [(0.0, "above 0"), (1.5, "at most 1"), (-0.1, "sigmoid"),
                                              (float("nan"), "nan")])
def test_a_decay_outside_its_bounds_is_refused(decay, words):
    query, key, value, beta, _ = delta_inputs(2)
    with pytest.raises(ValueError, match=words):
        gated_delta_rule(query, key, value, beta, torch.full_like(beta, decay))


def test_a_sigmoid_that_rounds_to_zero_is_refused_with_the_mend_that_works():
    query, key, value, beta, decay = (x.float() for x in delta_inputs(2, n=9))
    decay[:, 4] = torch.sigmoid(torch.tensor(-200.0))
    with pytest.raises(ValueError, match=r"clamp\(min=1e-30\)"):
        gated_delta_rule(query, key, value, beta, decay)
    out, state = gated_delta_rule(query, key, value, beta, decay.clamp(min=1e-30), chunk_size=4)
    expected, last = gated_delta_rule_recurrent(query, key, value, beta, decay)
    assert_close(out, expected)
    assert_close(state, last)


@pytest.mark.parametrize("chunk_size", [0, -5])
def test_a_chunk_below_one_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size is {chunk_size}; it must be at least 1"):
        gated_delta_rule(*delta_inputs(), chunk_size=chunk_size)
