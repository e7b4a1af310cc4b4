"""Attention in blocks against PyTorch's kernel, gradcheck, and a count of what it saves."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from ch03_attention import flash_attention as module
from ch03_attention.flash_attention import flash_attention, flash_backward, flash_forward


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(*shapes, dtype=torch.float32, grad=False):
    return [torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def reference(query, key, value, causal):
    """PyTorch's attention with a mask made here."""
    n, n_keys = query.size(-2), key.size(-2)
    mask = torch.ones(n, n_keys, dtype=torch.bool).tril(n_keys - n) if causal else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=query.dim() > 2)


def assert_equals_torch(query, key, value, causal, block_size, **tolerance):
    ours, theirs = flash_attention(query, key, value, causal, block_size), reference(query, key, value, causal)
    assert_close(ours, theirs, **tolerance)
    direction = torch.randn_like(theirs)
    for mine, expected in zip(torch.autograd.grad(ours, (query, key, value), direction),
                              torch.autograd.grad(theirs, (query, key, value), direction), strict=True):
        assert_close(mine, expected, **tolerance)


# ---------------------------------------------------------------- the same numbers and gradients


@pytest.mark.parametrize("block_size", [1, 7, 64, 500])
@pytest.mark.parametrize(("n", "n_keys", "causal"), [
    (1, 1, True), (64, 64, True), (65, 65, True), (130, 130, True), (1, 90, True), (40, 90, True), (90, 40, False),
    (30, 100, False)])
def test_equals_torch_in_output_and_gradients(n, n_keys, causal, block_size):
    query, key, value = inputs((2, 3, n, 16), (2, 3, n_keys, 16), (2, 3, n_keys, 16), grad=True)
    assert_equals_torch(query, key, value, causal, block_size, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 45), st.booleans(), st.integers(1, 9),
       st.floats(0.1, 40))
def test_any_sizes_and_any_size_of_scores(n, earlier, block_size, causal, d, scale):
    shapes = (2, n, d), (2, n + earlier, d), (2, n + earlier, 5)
    query, key, value = (x.mul(scale).requires_grad_() for x in inputs(*shapes, dtype=torch.float64))
    assert_equals_torch(query, key, value, causal, block_size, atol=1e-8 * scale**4, rtol=1e-8)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
def test_heads_that_share_keys_and_values(n_kv_heads):
    query, key, value = inputs((2, 6, 33, 8), (2, n_kv_heads, 50, 8), (2, n_kv_heads, 50, 8), grad=True)
    assert_equals_torch(query, key, value, True, 16, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_dimensions_and_another_value_size(batch):
    query, key, value = inputs((*batch, 20, 8), (*batch, 20, 8), (*batch, 20, 3), grad=True)
    assert_equals_torch(query, key, value, True, 8, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal):
    query, key, value = inputs((1, 4, 5, 3), (1, 2, 7, 3), (1, 2, 7, 2), dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *x: flash_attention(*x, causal, 3), (query, key, value))


def test_tensors_that_are_not_contiguous():
    query, key, value = (x.transpose(1, 2) for x in inputs(*[(2, 40, 3, 8)] * 3, grad=True))
    assert_equals_torch(query, key, value, True, 16, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the online softmax


@pytest.mark.parametrize("where", [0, 50, 99])
def test_the_largest_score_may_come_at_any_time_and_be_huge(where):
    query, key, value = inputs((1, 8), (100, 8), (100, 4), dtype=torch.float64)
    key[where] = 1000 * query[0]
    assert_close(flash_attention(query, key, value, block_size=10), reference(query, key, value, True))
    assert_close(flash_attention(query, key, value, block_size=10), value[where : where + 1])


def test_very_negative_scores_do_not_vanish():
    query, key, value = torch.ones(3, 4), torch.full((3, 4), -1e4), torch.arange(3.0)[:, None]
    assert_close(flash_attention(query, key, value, block_size=1), torch.tensor([[0.0], [0.5], [1.0]]))


def test_forward_returns_the_log_of_the_sum_of_exponentials():
    query, key, value = inputs((5, 40, 8), (5, 40, 8), (5, 40, 8))
    scores = (query @ key.mT / 8**0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    _, log_sum = flash_forward(query, key, value, True, 16)
    assert_close(log_sum, scores.logsumexp(-1))


def test_nothing_leaks_from_later_positions():
    query, key, value = inputs((2, 50, 8), (2, 50, 8), (2, 50, 8))
    before = flash_attention(query, key, value, block_size=16)
    key[:, 30:], value[:, 30:] = torch.nan, torch.nan
    assert torch.equal(flash_attention(query, key, value, block_size=16)[:, :16], before[:, :16])
    key[:, 30:], value[:, 30:] = 1e3, -1e3
    assert_close(flash_attention(query, key, value, block_size=16)[:, :30], before[:, :30])


# ---------------------------------------------------------------- 16-bit numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float32(dtype):
    query, key, value = inputs(*[(1024, 32)] * 3)
    value += 1  # a mean that a narrow sum would lose
    query, key, value = (x.to(dtype).requires_grad_() for x in (query, key, value))
    out = flash_attention(query, key, value)
    truth = reference(*(x.double() for x in (query, key, value)), True)
    assert out.dtype == dtype
    rounding = (truth.to(dtype).double() - truth).abs().mean()
    assert (out.double() - truth).abs().mean() < 1.1 * rounding
    out.sum().backward()
    assert query.grad.dtype == key.grad.dtype == value.grad.dtype == dtype
    _, log_sum = flash_forward(query.detach(), key.detach(), value.detach(), True, 64)
    assert log_sum.dtype == torch.float32


def test_float64_stays_float64():
    query, key, value = inputs(*[(30, 8)] * 3, dtype=torch.float64)
    assert flash_attention(query, key, value).dtype == torch.float64


# ---------------------------------------------------------------- memory and work


def saved_bytes(n):
    saved = {}
    query, key, value = inputs(*[(1, n, 16)] * 3, grad=True)

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        flash_attention(query, key, value)
    return sum(x.untyped_storage().nbytes() for x in saved.values())


def test_saves_inputs_output_and_one_number_a_row():
    assert saved_bytes(300) == 300 * 4 * (4 * 16 + 1)
    assert saved_bytes(600) == 2 * saved_bytes(300)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_hidden_blocks_are_not_computed(direction, monkeypatch):
    entries, original = [], module._block_scores
    monkeypatch.setattr(module, "_block_scores", lambda q, k, hide_from: entries.append(
        q.size(-2) * k.size(-2)) or original(q, k, hide_from))
    query, key, value = inputs(*[(64, 4)] * 3)
    out, log_sum = flash_forward(query, key, value, True, 16)
    if direction == "backward":
        entries.clear()
        flash_backward(query, key, value, out, log_sum, torch.ones_like(out), True, 16)
    assert len(entries) == 10 and sum(entries) == 10 * 16 * 16, "four rows of blocks: 1 + 2 + 3 + 4"


def test_no_block_is_larger_than_asked():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else [result]:
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return result

    query, key, value = inputs(*[(512, 4)] * 3, grad=True)
    with Largest() as mode:
        flash_attention(query, key, value, block_size=32).sum().backward()
    assert mode.size <= 512 * 4


def test_second_derivatives_are_refused_not_wrong():
    query, key, value = inputs(*[(4, 2)] * 3, grad=True)
    (grad,) = torch.autograd.grad(flash_attention(query, key, value).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_queries_give_no_rows():
    query, key, value = inputs((2, 0, 4), (2, 5, 4), (2, 5, 4))
    assert flash_attention(query, key, value).shape == (2, 0, 4)


# ---------------------------------------------------------------- errors: value, bound, mend


@pytest.mark.parametrize(("shapes", "options", "words"), [
    ([(5, 4), (5, 4), (5, 4)], {"block_size": 0}, ["block_size is 0", "at least 1", "64"]),
    ([(5, 4), (5, 4), (5, 4)], {"block_size": -3}, ["-3", "at least 1"]),
    ([(5, 4), (3, 4), (3, 4)], {}, ["5 queries", "3 keys", "causal"]),
    ([(5, 4), (0, 4), (0, 4)], {"causal": False}, ["0 keys", "at least one"]),
    ([(5, 0), (5, 0), (5, 4)], {}, ["0 numbers", "at least one"]),
    ([(5, 4), (5, 6), (5, 4)], {}, ["(5, 6)", "(..., S, d)"]),
    ([(5, 4), (5, 4), (6, 4)], {}, ["(6, 4)", "(..., S, e)"]),
    ([(5, 4), (1, 5, 4), (1, 5, 4)], {}, ["as many dimensions"]),
    ([(4,), (4,), (4,)], {}, ["(4,)", "(..., T, d)"]),
    ([(1, 4, 5, 4), (1, 3, 5, 4), (1, 3, 5, 4)], {}, ["(1, 3, 5, 4)", "a multiple"]),
    ([(1, 2, 5, 4), (1, 4, 5, 4), (1, 4, 5, 4)], {}, ["a multiple"]),
    ([(2, 4, 5, 4), (1, 4, 5, 4), (1, 4, 5, 4)], {}, ["must be equal"]),
    ([(1, 4, 5, 4), (1, 0, 5, 4), (1, 0, 5, 4)], {}, ["a multiple"]),
])
def test_sizes_that_do_not_fit(shapes, options, words):
    with pytest.raises(ValueError) as error:
        flash_attention(*inputs(*shapes), **options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("dtypes", [["int64"] * 3, ["bool"] * 3, ["float32", "float64", "float32"]])
def test_dtypes_that_do_not_fit(dtypes):
    with pytest.raises(TypeError) as error:
        flash_attention(*(torch.ones(5, 4).to(getattr(torch, dtype)) for dtype in dtypes))
    assert "torch." + dtypes[0] in str(error.value) and ".float()" in str(error.value)


def test_does_not_import_attention():
    code = "import sys, ch03_attention.flash_attention; print('ch03_attention.attention' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
