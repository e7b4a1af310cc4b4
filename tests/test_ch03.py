"""Attention against PyTorch's own, and the properties that a language model rests on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ch03_attention.attention import (
    KVCache,
    MultiHeadAttention,
    RotaryEmbedding,
    apply_rope,
    attention_weights,
    causal_attention,
    causal_mask,
    scaled_dot_product_attention,
    softmax,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, **options):
    return torch.randn(*shape, **options)


# ---------------------------------------------------------------- softmax


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax_equals_torch_at_any_size_of_scores(scale, dim):
    x = normal(4, 5, 6) * scale
    assert_close(softmax(x, dim), torch.softmax(x, dim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_softmax_keeps_the_dtype(dtype):
    x = normal(3, 8).to(dtype)
    assert softmax(x).dtype == dtype
    assert_close(softmax(x), torch.softmax(x, -1), atol=4e-3, rtol=2e-2)


def test_softmax_with_some_scores_masked_equals_torch():
    x = normal(50, 9).masked_fill(torch.rand(50, 9) < 0.5, -torch.inf)
    x[:, 0] = 0.5  # at least one is allowed
    assert_close(softmax(x), torch.softmax(x, -1))


def test_softmax_of_nothing_allowed_is_zero_with_zero_gradient():
    x = normal(3, 4, requires_grad=True)
    masked = x.masked_fill(torch.tensor([[True], [False], [False]]), -torch.inf)
    weights = softmax(masked)
    assert torch.equal(weights[0], torch.zeros(4))
    (weights * normal(3, 4)).sum().backward()
    assert torch.equal(x.grad[0], torch.zeros(4))
    assert x.grad.isfinite().all() and x.grad[1:].abs().max() > 0


def test_softmax_gradient_equals_torch():
    x, direction = normal(5, 7, dtype=torch.float64, requires_grad=True), normal(5, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((torch.softmax(x, -1) * direction).sum(), x)
    (found,) = torch.autograd.grad((softmax(x) * direction).sum(), x)
    assert_close(found, expected)


# ---------------------------------------------------------------- masks


@given(n=st.integers(1, 9), earlier=st.integers(0, 9), window=st.none() | st.integers(1, 12))
def test_causal_mask_by_its_definition(n, earlier, window):
    mask = causal_mask(n, n + earlier, window)
    assert mask.dtype == torch.bool and mask.shape == (n, n + earlier)
    for row in range(n):
        position = earlier + row
        for key in range(n + earlier):
            near = window is None or position - key < window
            assert mask[row, key].item() == (key <= position and near)


# ---------------------------------------------------------------- attention


MASKS = {"none": None, "causal": causal_mask(7), "window": causal_mask(7, window=2),
         "each head its own": torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.7}


@pytest.mark.parametrize("name", MASKS)
def test_attention_equals_torch(name):
    query, key, value = normal(2, 3, 7, 16), normal(2, 3, 7, 16), normal(2, 3, 7, 5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=MASKS[name])
    assert_close(scaled_dot_product_attention(query, key, value, MASKS[name]), expected)


def test_attention_equals_torch_on_many_keys_and_without_batch():
    query, key, value = normal(3, 8), normal(11, 8), normal(11, 2)
    mask = causal_mask(3, 11)
    expected = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)[0]
    assert_close(scaled_dot_product_attention(query, key, value, mask), expected)


def test_attention_gradients_equal_torch():
    tensors = [normal(2, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    direction = normal(2, 7, 8, dtype=torch.float64)
    expected = torch.autograd.grad(
        (F.scaled_dot_product_attention(*tensors, is_causal=True) * direction).sum(), tensors)
    found = torch.autograd.grad((scaled_dot_product_attention(*tensors, causal_mask(7)) * direction).sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_weights_add_up_to_one_and_never_touch_the_future():
    weights = attention_weights(normal(2, 4, 9, 8), normal(2, 4, 9, 8), causal_mask(9))
    assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))


def test_a_query_that_may_see_nothing_gets_zeros():
    mask = causal_mask(4)
    mask[2] = False
    mixed = scaled_dot_product_attention(normal(4, 8), normal(4, 8), normal(4, 8), mask)
    assert torch.equal(mixed[2], torch.zeros(8)) and mixed.isfinite().all()


def test_attention_without_positions_is_permutation_equivariant():
    x, order = normal(10, 8, dtype=torch.float64), torch.randperm(10)
    assert_close(scaled_dot_product_attention(x[order], x[order], x[order]),
                 scaled_dot_product_attention(x, x, x)[order])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("n", "n_keys"), [(1, 1), (1, 9), (9, 9), (4, 9)])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_fused_attention_equals_ours(heads, kv_heads, n, n_keys, window):
    query, key, value = normal(2, heads, n, 8), normal(2, kv_heads, n_keys, 8), normal(2, kv_heads, n_keys, 8)
    shared = heads // kv_heads
    expected = scaled_dot_product_attention(
        query, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), causal_mask(n, n_keys, window))
    assert_close(causal_attention(query, key, value, window), expected)


# ---------------------------------------------------------------- rotary positions


def test_rope_equals_multiplication_by_a_complex_phase():
    x, theta = normal(2, 3, 20, 12), 500.0
    speeds = theta ** (-torch.arange(6) * 2 / 12)
    phase = torch.polar(torch.ones(20, 6), torch.arange(5.0, 25.0)[:, None] * speeds)
    turned = torch.complex(x[..., :6], x[..., 6:]) * phase
    found = apply_rope(x, *RotaryEmbedding(12, 32, theta)(5, 20))
    assert_close(found, torch.cat([turned.real, turned.imag], -1), atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(first=st.integers(0, 30), second=st.integers(0, 30), shift=st.integers(0, 200))
def test_rope_scores_depend_on_the_difference_only(first, second, shift):
    rope = RotaryEmbedding(16, 256)
    query, key = torch.linspace(-1, 2, 16)[None], torch.linspace(1, -3, 16)[None]

    def score(i, j):
        return (apply_rope(query, *rope(i, 1)) * apply_rope(key, *rope(j, 1))).sum()

    assert_close(score(first + shift, second + shift), score(first, second), atol=2e-4, rtol=1e-4)


def test_rope_scores_do_depend_on_the_difference():
    rope, query, key = RotaryEmbedding(16, 64), normal(1, 16), normal(1, 16)
    turned = apply_rope(key.expand(64, 16), *rope(0, 64))
    scores = (apply_rope(query, *rope(63, 1)) * turned).sum(-1)
    assert scores.std() > 0.1


def test_rope_keeps_lengths_and_leaves_position_zero_alone():
    x = normal(2, 3, 40, 16)
    turned = apply_rope(x, *RotaryEmbedding(16, 64)(0, 40))
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 0, :], x[..., 0, :])
    assert (turned[..., 1:, :] - x[..., 1:, :]).abs().amax() > 0.5


def test_rope_keeps_the_dtype_and_is_not_saved():
    rope = RotaryEmbedding(8, 16)
    assert apply_rope(normal(5, 8).bfloat16(), *rope(0, 5)).dtype == torch.bfloat16
    assert rope.state_dict() == {}


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_torch_in_outputs_and_gradients(bias):
    theirs = nn.MultiheadAttention(48, 6, bias=bias, batch_first=True)
    ours = MultiHeadAttention(48, 6, bias=bias)
    pairs = [(ours.w_qkv.weight, theirs.in_proj_weight), (ours.out_proj.weight, theirs.out_proj.weight)]
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
        pairs += [(ours.w_qkv.bias, theirs.in_proj_bias), (ours.out_proj.bias, theirs.out_proj.bias)]
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)
    mine, other, direction = normal(2, 10, 48, requires_grad=True), None, normal(2, 10, 48)
    other = mine.detach().clone().requires_grad_()
    found = ours(mine)
    expected, _ = theirs(other, other, other, attn_mask=~causal_mask(10), need_weights=False)
    assert_close(found, expected)
    found.backward(direction)
    expected.backward(direction)
    assert_close(mine.grad, other.grad)
    for own, other in pairs:
        assert own.grad.abs().max() > 0
        assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_state_dict_names():
    assert set(MultiHeadAttention(48, 6).state_dict()) == {"w_qkv.weight", "out_proj.weight"}
    layer = MultiHeadAttention(48, 6, 2, bias=True, qk_norm=True, rope=RotaryEmbedding(8, 16))
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "w_qkv.weight": (80, 48), "w_qkv.bias": (80,), "out_proj.weight": (48, 48), "out_proj.bias": (48,),
        "q_norm.weight": (8,), "k_norm.weight": (8,)}


def layers():
    """One layer of each kind, by name."""
    rope = RotaryEmbedding(8, 64)
    kinds = {
        "plain": {}, "rope": {"rope": rope}, "shared heads": {"n_kv_heads": 2, "rope": rope},
        "one key-value head": {"n_kv_heads": 1}, "window": {"window": 5, "rope": rope},
        "everything": {"n_kv_heads": 3, "rope": rope, "window": 7, "qk_norm": True, "bias": True},
    }
    return {name: MultiHeadAttention(48, 6, **options).eval() for name, options in kinds.items()}


KINDS = list(layers())


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_leaves_earlier_outputs_unchanged(kind):
    layer, x = layers()[kind], normal(2, 24, 48)
    before = layer(x)
    for position in (1, 10, 23):
        changed = x.clone()
        changed[:, position:] = normal(2, 24 - position, 48) * 30
        after = layer(changed)
        assert_close(after[:, :position], before[:, :position], atol=1e-6, rtol=0)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-2


def test_a_window_forgets_what_lies_before_it():
    layer, x = layers()["window"], normal(1, 24, 48)  # sees itself and four before
    changed = x.clone()
    changed[:, 10] += 5
    moved = (layer(changed) - layer(x)).abs().amax(-1)[0] > 1e-5
    assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


def test_shared_heads_equal_a_full_layer_with_copied_rows():
    shared = layers()["shared heads"]
    full = MultiHeadAttention(48, 6, rope=shared.rope)
    query, key, value = shared.w_qkv.weight.detach().split([48, 16, 16])
    copies = [rows.view(2, 8, 48).repeat_interleave(3, 0).reshape(48, 48) for rows in (key, value)]
    full.load_state_dict({"w_qkv.weight": torch.cat([query, *copies]), "out_proj.weight": shared.out_proj.weight})
    x = normal(2, 12, 48)
    assert_close(full(x), shared(x))


def test_positions_make_the_order_of_earlier_words_visible():
    words = normal(1, 8, 48)
    swapped = words[:, [3, 1, 2, 0, 4, 5, 6, 7]]
    for kind, visible in (("plain", False), ("rope", True)):
        layer = layers()[kind]
        difference = (layer(words)[0, -1] - layer(swapped)[0, -1]).abs().max()
        assert (difference > 1e-4) == visible, kind


def test_dropout_only_while_training():
    layer, x = MultiHeadAttention(48, 6, dropout=0.5), normal(1, 12, 48)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_runs_in_bfloat16():
    layer = layers()["everything"].bfloat16()
    assert layer(normal(1, 12, 48).bfloat16(), KVCache()).dtype == torch.bfloat16


# ---------------------------------------------------------------- the cache


@st.composite
def cuts(draw, total=40):
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes)) | st.just(1)))
    return sizes


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(sizes=cuts())
@torch.no_grad()
def test_every_way_of_cutting_equals_the_uncached_layer(kind, sizes):
    torch.manual_seed(0)
    layer, x, cache = layers()[kind], normal(2, 40, 48), KVCache()
    pieces = [layer(piece, cache) for piece in x.split(sizes, dim=1)]
    assert cache.length == 40
    assert_close(torch.cat(pieces, 1), layer(x), atol=1e-5, rtol=1e-4)


def test_cache_returns_everything_in_order_and_grows():
    key, value, cache = normal(2, 3, 300, 4), normal(2, 3, 300, 4), KVCache()
    for start, end in ((0, 1), (1, 63), (63, 64), (64, 65), (65, 300)):
        keys, values = cache.append(key[:, :, start:end], value[:, :, start:end])
        assert torch.equal(keys, key[:, :, :end]) and torch.equal(values, value[:, :, :end])
        assert cache.length == end


def test_cache_does_not_copy_its_past_at_every_step():
    cache, places = KVCache(), set()
    for _ in range(1000):
        keys, _ = cache.append(normal(1, 1, 1, 2), normal(1, 1, 1, 2))
        places.add(keys.data_ptr())
    assert len(places) <= 1 + math.ceil(math.log2(1000 / 64)) + 1


def test_a_refused_position_leaves_the_cache_as_it_was():
    layer, cache = MultiHeadAttention(48, 6, rope=RotaryEmbedding(8, 10)), KVCache()
    layer(normal(1, 8, 48), cache)
    with pytest.raises(ValueError, match="Position 10 is beyond the last one, 9"):
        layer(normal(1, 3, 48), cache)
    assert cache.length == 8
    assert layer(normal(1, 2, 48), cache).shape == (1, 2, 48)


# ---------------------------------------------------------------- messages: the value, the bound, the mend


def used_cache():
    cache = KVCache()
    cache.append(normal(2, 3, 4, 8), normal(2, 3, 4, 8))
    return cache


@pytest.mark.parametrize(("error", "words", "mistake"), [
    (ValueError, ["50", "4 heads", "multiple"], lambda: MultiHeadAttention(50, 4)),
    (ValueError, ["48", "0 heads"], lambda: MultiHeadAttention(48, 0)),
    (ValueError, ["6 query heads", "4 key-value heads", "multiple"], lambda: MultiHeadAttention(48, 6, 4)),
    (ValueError, ["6 query heads", "0 key-value heads"], lambda: MultiHeadAttention(48, 6, 0)),
    (ValueError, ["16", "= 8", "RotaryEmbedding(8"], lambda: MultiHeadAttention(48, 6, rope=RotaryEmbedding(16, 9))),
    (ValueError, ["window is 0", "at least 1"], lambda: MultiHeadAttention(48, 6, window=0)),
    (ValueError, ["dropout is 1.5", "below 1"], lambda: MultiHeadAttention(48, 6, dropout=1.5)),
    (ValueError, ["(10, 48)", "(batch, positions, 48)"], lambda: MultiHeadAttention(48, 6)(normal(10, 48))),
    (ValueError, ["(1, 10, 40)", "(batch, positions, 48)"], lambda: MultiHeadAttention(48, 6)(normal(1, 10, 40))),
    (ValueError, ["head_dim is 7", "even"], lambda: RotaryEmbedding(7, 9)),
    (ValueError, ["Position 16", "15", "context_length"], lambda: RotaryEmbedding(8, 16)(10, 7)),
    (ValueError, ["5 queries", "3 keys"], lambda: causal_mask(5, 3)),
    (ValueError, ["window is -1", "at least 1"], lambda: causal_mask(5, window=-1)),
    (ValueError, ["8 numbers", "keys 6", "same"], lambda: attention_weights(normal(2, 8), normal(2, 6))),
    (TypeError, ["torch.float32", "torch.bool", "mask.bool()"],
     lambda: attention_weights(normal(2, 8), normal(2, 8), torch.ones(2, 2))),
    (TypeError, ["torch.int64", "True = may attend"],
     lambda: scaled_dot_product_attention(normal(2, 8), normal(2, 8), normal(2, 8), torch.ones(2, 2).long())),
    (ValueError, ["2 sequences", "3 heads", "(1, 3, 1, 8)", "KVCache()"],
     lambda: used_cache().append(normal(1, 3, 1, 8), normal(1, 3, 1, 8))),
    (ValueError, ["3 heads of 8", "(2, 3, 1, 16)"],
     lambda: used_cache().append(normal(2, 3, 1, 16), normal(2, 3, 1, 16))),
])
def test_messages_give_the_value_the_bound_and_the_mend(error, words, mistake):
    with pytest.raises(error) as caught:
        mistake()
    for word in words:
        assert word in str(caught.value)
