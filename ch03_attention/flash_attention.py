"""Deep dive: Attention without the table.

Written from ch03_attention/flash_attention.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "flash_forward",
    "flash_backward",
    "FlashAttention",
    "flash_attention",
]

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _blocks(end: int, size: int) -> Iterator[slice]:
    """0 ... end in slices of ``size``; the last one may be shorter."""
    return (slice(start, min(start + size, end)) for start in range(0, end, size))


def _visible(rows: slice, n: int, n_keys: int, causal: bool) -> int:
    """How many keys the last of these rows may see; the ones after it are hidden from the whole block."""
    return n_keys - n + rows.stop if causal else n_keys


def _block_scores(query: Tensor, key: Tensor, hide_from: int | None) -> Tensor:
    """Scaled scores of one block, (..., t, d) and (..., s, d) -> (..., t, s); hidden keys get -inf.

    From the first query, key ``hide_from`` and later ones of the block are hidden; from the second
    query, those after that; and so on. None hides nothing.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    if hide_from is None or hide_from >= key.size(-2):
        return scores  # even the first query sees the whole block: no mask to make
    row = torch.arange(query.size(-2), device=query.device)
    column = torch.arange(key.size(-2), device=query.device)
    return scores.masked_fill(column >= row[:, None] + hide_from, -torch.inf)


def flash_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool,
                  block_size: int) -> tuple[Tensor, Tensor]:
    """Attention block by block: the output, and each row's log of its sum of exponentials.

    (..., T, d), (..., S, d), (..., S, e) -> (..., T, e) and (..., T). Dao 2023, algorithm 1.
    """
    n, n_keys = query.size(-2), key.size(-2)
    wide = torch.promote_types(query.dtype, torch.float32)             # sums are kept in at least float32
    out = query.new_empty(*query.shape[:-1], value.size(-1))
    log_sum = query.new_empty(query.shape[:-1], dtype=wide)
    for rows in _blocks(n, block_size):
        q = query[..., rows, :].to(wide)                               # (..., t, d)
        largest = q.new_full(q.shape[:-1], -torch.inf)                 # (..., t), so far
        total = torch.zeros_like(largest)
        mixed = q.new_zeros(*q.shape[:-1], value.size(-1))             # (..., t, e)
        for columns in _blocks(_visible(rows, n, n_keys, causal), block_size):
            k, v = key[..., columns, :].to(wide), value[..., columns, :].to(wide)
            first = n_keys - n + rows.start + 1 - columns.start if causal else None
            scores = _block_scores(q, k, hide_from=first)              # (..., t, s)
            new_largest = torch.maximum(largest, scores.amax(-1))
            rescale = torch.exp(largest - new_largest)                 # what the older sums are worth now
            exponentials = torch.exp(scores - new_largest[..., None])
            total = total * rescale + exponentials.sum(-1)
            mixed = mixed * rescale[..., None] + exponentials @ v
            largest = new_largest
        out[..., rows, :] = mixed / total[..., None]
        log_sum[..., rows] = largest + total.log()
    return out, log_sum


def flash_backward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, grad_out: Tensor,
                   causal: bool, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; each block's weights are made again from ``log_sum``.

    ``out`` and ``log_sum`` are what ``flash_forward`` returned. Dao 2023, algorithm 2, whose loops are
    the other way round.
    """
    n, n_keys, wide, scale = query.size(-2), key.size(-2), log_sum.dtype, query.size(-1) ** -0.5
    grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (query, key, value))
    row_sum = (grad_out.to(wide) * out).sum(-1)                        # D: (..., T)
    for rows in _blocks(n, block_size):
        q, grad = query[..., rows, :].to(wide), grad_out[..., rows, :].to(wide)
        for columns in _blocks(_visible(rows, n, n_keys, causal), block_size):
            k, v = key[..., columns, :].to(wide), value[..., columns, :].to(wide)
            first = n_keys - n + rows.start + 1 - columns.start if causal else None
            scores = _block_scores(q, k, hide_from=first)
            weights = torch.exp(scores - log_sum[..., rows, None])     # P: (..., t, s)
            grad_scores = weights * (grad @ v.transpose(-2, -1) - row_sum[..., rows, None]) * scale
            grad_value[..., columns, :] += weights.transpose(-2, -1) @ grad
            grad_query[..., rows, :] += grad_scores @ k
            grad_key[..., columns, :] += grad_scores.transpose(-2, -1) @ q
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


class FlashAttention(torch.autograd.Function):
    """Exact attention in blocks, which keeps one number a row for the way back instead of the table.

    Dao et al. 2022; Dao 2023 (FlashAttention-2). Use it through ``flash_attention``.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, causal: bool, block_size: int) -> Tensor:
        out, log_sum = flash_forward(query, key, value, causal, block_size)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.options = causal, block_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        return *flash_backward(*ctx.saved_tensors, grad_out, *ctx.options), None, None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool = True,
                    block_size: int = 64) -> Tensor:
    """Attention that never holds the table of scores. Dao et al. 2022 (FlashAttention); Dao 2023.

    query (..., T, d), key (..., S, d), value (..., S, e) -> (..., T, e). Causal: the queries are the
    last T of the S positions. Heads, at dimension -3, may share keys and values: H a multiple of K.
    Sums are kept in at least float32. Raises ValueError for sizes, TypeError for dtypes.
    """
    _check_flash(query, key, value, causal, block_size)
    if query.dim() == 2 or query.size(-3) == key.size(-3):
        return FlashAttention.apply(query, key, value, causal, block_size)
    group = query.size(-3) // key.size(-3)
    query = query.unflatten(-3, (-1, group))                           # (..., K, H / K, T, d)
    key, value = (x.unsqueeze(-3).expand(*x.shape[:-2], group, *x.shape[-2:]) for x in (key, value))
    return FlashAttention.apply(query, key, value, causal, block_size).flatten(-4, -3)


def _check_flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, block_size: int) -> None:
    dtypes, shapes = {query.dtype, key.dtype, value.dtype}, [tuple(x.shape) for x in (query, key, value)]
    if len(dtypes) > 1 or not query.is_floating_point():
        raise TypeError(f"dtypes are {', '.join(sorted(map(str, dtypes)))}; query, key and value need one "
                        "and the same floating dtype: convert with .float() or .to(query.dtype).")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1. 64 is a good choice.")
    dims = {len(shape) for shape in shapes}
    if len(dims) > 1 or min(dims) < 2 or shapes[1][:-1] != shapes[2][:-1] or shapes[0][-1] != shapes[1][-1]:
        raise ValueError(f"query, key and value have shapes {shapes}; they must be (..., T, d), (..., S, d) "
                         "and (..., S, e), with as many dimensions each; queries and keys of one size.")
    (*batch, heads), (*kv_batch, kv_heads) = ([1, *shape[:-2]] for shape in shapes[:2])
    if batch != kv_batch or (heads != kv_heads and (kv_heads == 0 or heads % kv_heads)):
        raise ValueError(f"query and key have shapes {shapes[:2]}: dimensions before the last three must be "
                         "equal, and the number of query heads a multiple of that of key-value heads.")
    n, n_keys, d = query.size(-2), *key.shape[-2:]
    if n_keys == 0 or d == 0 or (causal and n > n_keys):
        raise ValueError(f"{n} queries and {n_keys} keys of {d} numbers: there must be at least one key and "
                         "one number, and with causal=True no more queries than keys, as they are the last.")
