"""Attention against PyTorch's own, and the properties that a language model rests on."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ch03_attention import attention
from ch03_attention.attention import (
    GrowingBuffer,
    KVCache,
    MultiHeadAttention,
    RopeScaling,
    RotaryEmbedding,
    apply_rope,
    attention_weights,
    causal_attention,
    causal_mask,
    flash_attention,
    padding_mask,
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


@given(n=st.integers(1, 7), earlier=st.integers(0, 7), window=st.none() | st.integers(1, 9),
       padding=st.lists(st.integers(-3, 12), min_size=1, max_size=3))
def test_causal_mask_with_padding_by_its_definition(n, earlier, window, padding):
    mask = causal_mask(n, n + earlier, window, padding=torch.tensor(padding))
    assert mask.dtype == torch.bool and mask.shape == (len(padding), 1, n, n + earlier)
    plain = causal_mask(n, n + earlier, window)
    for hidden, part in zip(padding, mask[:, 0], strict=True):
        for row in range(n):
            for key in range(n + earlier):
                expected = (plain[row, key].item() and key >= hidden) or key == earlier + row
                assert part[row, key].item() == expected


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


def test_a_mask_given_to_the_fused_kernel_replaces_the_causal_one():
    query, key, value = normal(2, 4, 3, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 8)
    mask = torch.rand(2, 1, 3, 9) < 0.5
    mask[..., 0] = True
    expected = scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask)
    assert_close(causal_attention(query, key, value, mask=mask), expected)


def test_flash_attention_belongs_to_this_library():
    query, key, value = normal(2, 3, 9, 8), normal(2, 3, 9, 8), normal(2, 3, 9, 8)
    assert_close(flash_attention(query, key, value, block_size=4),
                 scaled_dot_product_attention(query, key, value, causal_mask(9)), atol=1e-5, rtol=1e-4)


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


@settings(deadline=None)
@given(data=st.data(), half=st.integers(1, 16), theta=st.sampled_from([100.0, 10_000.0, 500_000.0]),
       scaling=st.sampled_from([None, RopeScaling(8.0, 1.0, 4.0, 64)]), seed=st.integers(0, 9))
def test_rope_scores_depend_on_the_difference_only_for_all_sizes(data, half, theta, scaling, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 5, 2 * half, generator=generator, dtype=torch.float64)
    rope = RotaryEmbedding(2 * half, 200, theta, scaling)
    shift = data.draw(st.integers(0, 150))
    distance = data.draw(st.integers(0, 45))

    def scores(at):
        return rope.rotate(query, at + distance) @ rope.rotate(key, at).T

    assert_close(scores(shift), scores(0), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotate_equals_apply_rope_whatever_was_asked_before(dtype):
    rope, x = RotaryEmbedding(12, 64), normal(2, 3, 20, 12).to(dtype)
    for start, length in ((0, 20), (5, 20), (5, 3), (0, 3), (60, 1), (0, 20), (0, 20)):
        turned = rope.rotate(x[..., :length, :], start)
        assert turned.dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
        assert_close(turned, apply_rope(x[..., :length, :], *rope(start, length)), atol=tolerance, rtol=tolerance)


def test_rotate_after_a_change_of_the_table_and_after_inference():
    rope, x = RotaryEmbedding(8, 16), normal(1, 5, 8, requires_grad=True)
    with torch.inference_mode():
        rope.rotate(normal(1, 5, 8))
    rope.rotate(x).sum().backward()  # what inference prepared serves training
    assert x.grad.isfinite().all()
    before = rope.rotate(x)
    rope.to(torch.float64)
    assert_close(rope.rotate(x.double()), before.double(), atol=1e-6, rtol=1e-6)
    rope.cos, rope.sin = torch.ones(16, 8), torch.zeros(16, 8)
    assert torch.equal(rope.rotate(x), x)


def test_interleaved_pairs_are_half_split_pairs_after_a_permutation():
    x, speeds = normal(20, 12), 10_000.0 ** (-torch.arange(6) / 6)
    phase = torch.polar(torch.ones(20, 6), torch.arange(20.0)[:, None] * speeds)
    interleaved = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (6, 2))) * phase).flatten(-2)
    order = torch.tensor([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])
    rope = RotaryEmbedding(12, 20)
    assert_close(rope.rotate(x[:, order]), interleaved[:, order], atol=1e-5, rtol=1e-4)
    assert (rope.rotate(x) - interleaved).abs().max() > 0.5


def test_scaling_by_the_published_rule():
    scaling, speeds = RopeScaling(32.0, 1.0, 4.0, 8192), 500_000.0 ** (-torch.arange(64).double() / 64)
    for speed, slower in zip(speeds.tolist(), scaling.stretch(speeds).tolist(), strict=True):
        wavelength = 2 * math.pi / speed
        if wavelength < 8192 / 4:
            expected = speed
        elif wavelength > 8192 / 1:
            expected = speed / 32
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * speed / 32 + smooth * speed
        assert slower == pytest.approx(expected, rel=1e-12)


def test_scaling_by_one_changes_nothing_and_by_more_slows_the_slow_pairs():
    plain, x = RotaryEmbedding(64, 128, 500_000.0), normal(128, 64)
    assert_close(RotaryEmbedding(64, 128, 500_000.0, RopeScaling(1.0)).rotate(x), plain.rotate(x))
    stretched = RotaryEmbedding(64, 128, 500_000.0, RopeScaling())
    assert torch.equal(stretched.cos[:, :14], plain.cos[:, :14])
    assert_close(stretched.sin[64, 31] * 32, plain.sin[64, 31], rtol=1e-3, atol=0)


def test_scaling_equals_transformers():
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=2048, num_attention_heads=32, max_position_embeddings=131_072, rope_theta=500_000.0,
        rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192})
    theirs, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](llama, "cpu")
    ours = RopeScaling().stretch(1.0 / 500_000.0 ** (torch.arange(0, 64, 2).float() / 64))
    assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_long_tables_can_be_built_without_memory():
    with torch.device("meta"):
        rope = RotaryEmbedding(128, 131_072, 500_000.0, RopeScaling())
    assert rope.cos.shape == (131_072, 128) and rope.cos.device.type == "meta" and rope.cos.dtype == torch.float32


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


@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_torch_to_one_in_a_million_with_64_bits(bias):
    theirs = nn.MultiheadAttention(48, 6, bias=bias, batch_first=True, dtype=torch.float64)
    ours = MultiHeadAttention(48, 6, bias=bias).double()
    names = {"w_qkv.weight": "in_proj_weight", "out_proj.weight": "out_proj.weight"}
    if bias:
        names |= {"w_qkv.bias": "in_proj_bias", "out_proj.bias": "out_proj.bias"}
        nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict({own: theirs.state_dict()[other] for own, other in names.items()})
    x, direction = normal(2, 10, 48, dtype=torch.float64, requires_grad=True), normal(2, 10, 48, dtype=torch.float64)
    expected, _ = theirs(x, x, x, attn_mask=~causal_mask(10), need_weights=False)
    found = ours(x)
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    mine = torch.autograd.grad((found * direction).sum(), [x, *(own[name] for name in names)])
    reference = torch.autograd.grad((expected * direction).sum(), [x, *(other[name] for name in names.values())])
    for a, b in zip([found, *mine], [expected, *reference], strict=True):
        assert b.abs().max() > 0.01
        assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_layer_with_everything_equals_the_formulas(kv_heads):
    rope = RotaryEmbedding(10, 32, theta=100.0)
    layer = MultiHeadAttention(48, 6, kv_heads, head_dim=10, rope=rope, qk_norm=True, norm_eps=1e-3, bias=True,
                               window=5).double()
    with torch.no_grad():
        layer.q_norm.weight.copy_(normal(10))
        layer.k_norm.weight.copy_(normal(10))
    x = normal(2, 12, 48, dtype=torch.float64, requires_grad=True)
    rows = F.linear(x, layer.w_qkv.weight, layer.w_qkv.bias).split([60, 10 * kv_heads, 10 * kv_heads], dim=-1)
    query, key, value = (part.unflatten(-1, (-1, 10)).transpose(1, 2) for part in rows)

    def normed(part, weight):
        return part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    query = apply_rope(normed(query, layer.q_norm.weight), *rope(0, 12))
    key = apply_rope(normed(key, layer.k_norm.weight), *rope(0, 12)).repeat_interleave(6 // kv_heads, 1)
    value = value.repeat_interleave(6 // kv_heads, 1)
    mixed = scaled_dot_product_attention(query, key, value, causal_mask(12, window=5))
    expected = F.linear(mixed.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)
    found, direction = layer(x), normal(2, 12, 48, dtype=torch.float64)
    assert_close(found, expected, atol=1e-6, rtol=0)
    inputs = [x, *layer.parameters()]
    mine = torch.autograd.grad((found * direction).sum(), inputs)
    reference = torch.autograd.grad((expected * direction).sum(), inputs)
    for a, b in zip(mine, reference, strict=True):
        assert_close(a, b, atol=1e-6, rtol=0)


def test_head_dim_is_free_of_the_width():
    layer = MultiHeadAttention(50, 4, 2, head_dim=6)
    assert layer.w_qkv.weight.shape == (48, 50) and layer.out_proj.weight.shape == (50, 24)
    query, key, value = layer.queries_keys_values(normal(2, 5, 50))
    assert query.shape == (2, 4, 5, 6) and key.shape == value.shape == (2, 2, 5, 6)
    assert layer(normal(2, 5, 50)).shape == (2, 5, 50)


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


@settings(max_examples=30, deadline=None)
@given(sizes=cuts(total=150), window=st.sampled_from([None, 1, 3, 20, 200]), kv_heads=st.sampled_from([6, 2, 1]),
       padding=st.none() | st.lists(st.integers(0, 60), min_size=3, max_size=3), own=st.booleans())
@torch.no_grad()
def test_window_padding_and_shared_heads_together_equal_the_plain_layer(sizes, window, kv_heads, padding, own):
    torch.manual_seed(0)
    layer = MultiHeadAttention(48, 6, kv_heads, rope=RotaryEmbedding(8, 150), window=window).eval()
    text, junk = normal(3, 150, 48), normal(3, 150, 48) * 30
    hidden = [0, 0, 0] if padding is None else padding
    batch = torch.stack([torch.cat([junk[b, :n], text[b, : 150 - n]]) for b, n in enumerate(hidden)])
    tensor = None if padding is None else torch.tensor(padding)
    cache = layer.new_cache(tensor) if own else KVCache(padding=tensor)  # its own rolls, the other keeps all
    found = torch.cat([layer(piece, cache) for piece in batch.split(sizes, dim=1)], dim=1)
    expected = layer(text)
    assert cache.length == 150 and found.isfinite().all()
    for b, n in enumerate(hidden):
        assert_close(found[b, n:], expected[b, : 150 - n], atol=1e-5, rtol=1e-4)


def test_every_length_of_the_prompt_with_a_rolling_cache():
    layer, x = MultiHeadAttention(16, 2, rope=RotaryEmbedding(8, 130), window=6).eval(), normal(1, 130, 16)
    with torch.no_grad():
        whole = layer(x)
        for prompt in range(1, 130):
            cache = layer.new_cache()
            pieces = [layer(piece, cache) for piece in x.split([prompt] + [1] * (130 - prompt), dim=1)]
            assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)


def test_a_rolling_cache_keeps_a_flat_memory_and_returns_the_window():
    key, cache, sizes = normal(1, 2, 3000, 4), KVCache(window=100), set()
    for n in range(3000):
        keys, values = cache.append(key[:, :, n : n + 1], -key[:, :, n : n + 1])
        seen = key[:, :, max(0, n - 99) : n + 1]
        assert torch.equal(keys, seen) and torch.equal(values, -seen)
        if n > 300:
            sizes.add(cache.nbytes)
    assert len(sizes) == 1 and sizes.pop() <= 2 * 4 * 2 * 4 * 4 * 120  # k and v, bytes, heads, numbers, positions
    assert cache.length == 3000


def test_a_rolling_cache_moves_its_past_rarely():
    cache, places = KVCache(window=50), []
    for _ in range(1000):
        cache.append(normal(1, 1, 1, 2), normal(1, 1, 1, 2))
        places.append(id(cache._keys.data))
    assert sum(a != b for a, b in zip(places, places[1:], strict=False)) < 1000 / 50


def test_a_long_prompt_is_not_kept_by_a_rolling_cache():
    cache = KVCache(window=8)
    keys, _ = cache.append(normal(1, 1, 5000, 4), normal(1, 1, 5000, 4))
    assert keys.size(2) == 5000 and cache.nbytes < 5000
    keys, _ = cache.append(normal(1, 1, 3, 4), normal(1, 1, 3, 4))
    assert keys.size(2) == 3 + 7


@settings(max_examples=40, deadline=None)
@given(seen=st.integers(1, 120), back=st.integers(0, 120), window=st.none() | st.integers(1, 30),
       step=st.integers(1, 9))
@torch.no_grad()
def test_truncate_forgets_and_nothing_else(seen, back, window, step):
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(16, 2, rope=RotaryEmbedding(8, 130), window=window).eval(), normal(1, 130, 16)
    cache = layer.new_cache()
    for piece in x[:, :seen].split(step, dim=1):
        layer(piece, cache)
    back = min(back, seen)
    try:
        cache.truncate(seen - back)
    except ValueError:
        assert window is not None and back > KVCache.spare  # so many can always be taken back
        assert cache.length == seen
        return
    assert cache.length == seen - back
    other = x.clone()
    other[:, seen - back :] = normal(1, 130 - seen + back, 16)  # another continuation
    assert_close(layer(other[:, seen - back :], cache), layer(other)[:, seen - back :], atol=1e-5, rtol=1e-4)


def test_a_rolling_cache_can_take_back_sixteen_positions_at_any_time():
    key, cache = normal(1, 1, 200, 4), KVCache(window=7)
    for n in range(199):
        cache.append(key[:, :, n : n + 1], key[:, :, n : n + 1])
        shorter = copy.deepcopy(cache)
        back = max(0, n + 1 - 16)
        shorter.truncate(back)
        keys, _ = shorter.append(key[:, :, 199:], key[:, :, 199:])
        assert torch.equal(keys, torch.cat([key[:, :, max(0, back - 6) : back], key[:, :, 199:]], dim=2))


def test_select_keeps_rows_with_their_padding():
    layer, x = MultiHeadAttention(16, 2, rope=RotaryEmbedding(8, 40)).eval(), normal(3, 20, 16)
    rows, padding = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 4, 9])
    with torch.no_grad():
        cache, expected = layer.new_cache(padding), layer.new_cache(padding[rows])
        layer(x[:, :12], cache)
        layer(x[:, 12:13], cache)
        layer(x[rows, :13], expected)
        cache.select(rows)
        for position in range(13, 20):
            piece = x[rows, position : position + 1]
            assert_close(layer(piece, cache), layer(piece, expected))


def test_single_steps_build_no_mask(monkeypatch):
    layer, masks = MultiHeadAttention(48, 6, 2, rope=RotaryEmbedding(8, 64)).eval(), []
    kernel = F.scaled_dot_product_attention

    def watched(*tensors, attn_mask=None, **options):
        masks.append(attn_mask)
        return kernel(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "causal_mask", lambda *_, **__: pytest.fail("a mask was built"))
    cache = KVCache()
    for n in (5, 1, 1):  # the prompt at once needs none either
        layer(normal(1, n, 48), cache)
    rolling = MultiHeadAttention(48, 6, window=3)
    for cache in (rolling.new_cache(), KVCache()):
        for _ in range(9):
            rolling(normal(1, 1, 48), cache)
    assert masks == [None] * 21


def test_padding_needs_no_new_mask_a_step_and_none_once_it_has_rolled_away(monkeypatch):
    layer = MultiHeadAttention(48, 6, window=6)
    cache = layer.new_cache(torch.tensor([0, 3]))
    layer(normal(2, 5, 48), cache)
    monkeypatch.setattr(attention, "causal_mask", lambda *_, **__: pytest.fail("a mask was built"))
    layer(normal(2, 1, 48), cache)
    mask = padding_mask(cache, 1, 6, 6)
    assert mask.shape == (2, 1, 1, 6) and mask[:, 0, 0].tolist() == [[True] * 6, [False] * 3 + [True] * 3]
    for _ in range(3):
        layer(normal(2, 1, 48), cache)
    assert padding_mask(cache, 1, 6, 6) is None
    assert padding_mask(KVCache(padding=torch.tensor([0, 0])), 0, 0) is None


def test_positions_of_padding_see_themselves_and_leave_the_other_rows_alone():
    layer, x = MultiHeadAttention(48, 6, rope=RotaryEmbedding(8, 64)).eval(), normal(2, 6, 48)
    cache = layer.new_cache(torch.tensor([0, 6]))
    found = torch.cat([layer(piece, cache) for piece in x.split([4, 1, 1], dim=1)], dim=1)
    assert_close(found[0], layer(x)[0], atol=1e-5, rtol=1e-4)
    alone = torch.cat([layer(piece) for piece in x[1:].split(1, dim=1)], dim=1)  # each sees itself
    assert_close(found[1], alone[0], atol=1e-5, rtol=1e-4)


def test_a_buffer_that_keeps_the_last():
    x = torch.arange(200.0).view(1, 1, 200, 1)
    buffer = GrowingBuffer(keep=10)
    for n in range(150):
        held = buffer.append(x[:, :, n : n + 1]).flatten().tolist()
        assert held[-min(10, n + 1) :] == list(range(max(0, n - 9), n + 1))
    assert buffer.append(x[:, :, 150:])[..., -50:, :].flatten().tolist() == list(range(150, 200))
    assert buffer.used == 10


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


def rolled_cache():
    cache = KVCache(window=4)
    cache.append(normal(1, 1, 200, 8), normal(1, 1, 200, 8))
    return cache


@pytest.mark.parametrize(("error", "words", "mistake"), [
    (ValueError, ["50", "4 heads", "multiple", "head_dim"], lambda: MultiHeadAttention(50, 4)),
    (ValueError, ["head_dim is 0", "at least 1"], lambda: MultiHeadAttention(48, 4, head_dim=0)),
    (ValueError, ["turns 8", "= 10", "RotaryEmbedding(10"],
     lambda: MultiHeadAttention(48, 6, head_dim=10, rope=RotaryEmbedding(8, 9))),
    (ValueError, ["factor 0.5", "at least 1"], lambda: RopeScaling(0.5)),
    (ValueError, ["low_freq_factor 4.0", "high_freq_factor 4.0", "<"], lambda: RopeScaling(8.0, 4.0, 4.0)),
    (ValueError, ["original_context is 0", "at least 1"], lambda: RopeScaling(original_context=0)),
    (ValueError, ["window is 0", "at least 1"], lambda: KVCache(window=0)),
    (ValueError, ["[1, -2]", "at least 0", "each row"], lambda: KVCache(padding=torch.tensor([1, -2]))),
    (ValueError, ["[0.5]", "whole number"], lambda: KVCache(padding=torch.tensor([0.5]))),
    (ValueError, ["3", "whole number"], lambda: KVCache(padding=torch.tensor(3))),
    (ValueError, ["3 rows", "keys have 2", "each row"],
     lambda: KVCache(padding=torch.tensor([1, 2, 0])).append(normal(2, 1, 1, 4), normal(2, 1, 1, 4))),
    (ValueError, ["to 5", "seen 4", "0 to 4"], lambda: used_cache().truncate(5)),
    (ValueError, ["to -1", "0 to 4"], lambda: used_cache().truncate(-1)),
    (ValueError, ["to 3", "window of 4", "new cache"], lambda: rolled_cache().truncate(3)),
    (ValueError, ["keeps 4", "all of them", "new_cache()"],
     lambda: MultiHeadAttention(48, 6)(normal(1, 2, 48), KVCache(window=4))),
    (ValueError, ["keeps 4", "back at 5", "new_cache()"],
     lambda: MultiHeadAttention(48, 6, window=5)(normal(1, 2, 48), KVCache(window=4))),
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
    (ValueError, ["5 queries", "3 keys"],
     lambda: causal_attention(normal(1, 2, 5, 8), normal(1, 2, 3, 8), normal(1, 2, 3, 8))),
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
