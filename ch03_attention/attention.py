"""Chapter 3: Attention.

Written from ch03_attention/attention.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "softmax",
    "causal_mask",
    "attention_weights",
    "scaled_dot_product_attention",
    "RotaryEmbedding",
    "apply_rope",
    "KVCache",
    "causal_attention",
    "MultiHeadAttention",
]

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Exponentials that add up to one along ``dim``; the largest is subtracted first, so none overflows.

    Any shape and floating dtype. A slice of only ``-inf`` (everything masked) gives zeros, not NaN.
    """
    largest = x.detach().amax(dim, keepdim=True)  # cancels out, and so needs no gradient
    exponentials = torch.exp(x - largest.masked_fill(largest == -torch.inf, 0.0))
    total = exponentials.sum(dim, keepdim=True)
    return exponentials / total.masked_fill(total == 0, 1.0)


def causal_mask(n: int, n_keys: int | None = None, window: int | None = None, device=None) -> Tensor:
    """Which keys each query may attend to: bool (n, n_keys), True = may attend.

    The queries are the last ``n`` of ``n_keys`` positions (default: all of them). With ``window``, only
    the nearest ``window`` keys, the query's own included.
    """
    n_keys = n if n_keys is None else n_keys
    if n > n_keys:
        raise ValueError(f"{n} queries but only {n_keys} keys: the queries are the last positions, so n_keys "
                         "must be at least n.")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, since a position sees itself.")
    query = torch.arange(n_keys - n, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)[None, :]
    allowed = key <= query
    return allowed if window is None else allowed & (key > query - window)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much each query attends to each key; rows add up to one. Vaswani et al. 2017, section 3.2.1.

    query (..., T, d), key (..., S, d) -> (..., T, S); mask bool, broadcastable to (..., T, S), True =
    may attend. A query that may attend to nothing gets zeros.
    """
    if query.size(-1) != key.size(-1):
        raise ValueError(f"Queries hold {query.size(-1)} numbers and keys {key.size(-1)}: a dot product "
                         "needs the same number in both, so project them to one head size.")
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (..., T, S)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"The mask is {mask.dtype}; it must be torch.bool with True = may attend. Write "
                            "mask.bool() for ones and zeros, mask == 0 for a mask of zeros and -inf.")
        scores = scores.masked_fill(~mask, -torch.inf)
    return softmax(scores)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor,
                                 mask: Tensor | None = None) -> Tensor:
    """Mix the values by how well each query matches each key. Vaswani et al. 2017, equation 1.

    query (..., T, d), key (..., S, d), value (..., S, e) -> (..., T, e); mask as for ``attention_weights``.
    """
    return attention_weights(query, key, mask) @ value


class RotaryEmbedding(nn.Module):
    """Cosines and sines for rotary position embedding. Su et al. 2021 (RoFormer), section 3.4.

    ``forward(start, length)`` gives the tables of positions start ... start+length-1, each
    (length, head_dim). Pair i turns by theta ** (-2i / head_dim) radians a position.
    """

    def __init__(self, head_dim: int, context_length: int, theta: float = 10_000.0):
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary positions turn pairs of numbers, so it must be "
                             "even: choose d_model and n_heads so that d_model / n_heads is.")
        self.head_dim, self.context_length = head_dim, context_length
        frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)  # (head_dim / 2,)
        angles = torch.outer(torch.arange(context_length).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)  # (context_length, head_dim): both halves of a pair
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        if start + length > self.context_length:
            last = self.context_length - 1
            raise ValueError(f"Position {start + length - 1} is beyond the last one, {last}: shorten the "
                             "text, or build the model with a larger context_length.")
        return self.cos[start : start + length], self.sin[start : start + length]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: (..., T, d) with cos, sin (T, d).

    Computed in the wider of the two dtypes and returned in that of ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class KVCache:
    """The keys and values that one attention layer has computed, in a buffer that doubles when full."""

    def __init__(self):
        self.length = 0
        self._keys = self._values = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, d); return all of them, (B, K, length, d)."""
        end = self.length + key.size(2)
        if self._keys is not None:
            batch, heads, _, dim = self._keys.shape
            if (batch, heads, dim) != (key.size(0), key.size(1), key.size(3)):
                raise ValueError(
                    f"The cache holds {batch} sequences with {heads} heads of {dim} numbers, the new keys "
                    f"have shape {tuple(key.shape)}: make a new KVCache() for each layer and each new batch.")
        if self._keys is None or end > self._keys.size(2):
            self._keys = self._grown(self._keys, key, end)
            self._values = self._grown(self._values, value, end)
        self._keys[:, :, self.length : end] = key
        self._values[:, :, self.length : end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _grown(self, old: Tensor | None, like: Tensor, end: int) -> Tensor:
        batch, heads, _, dim = like.shape
        new = like.new_empty(batch, heads, max(64, 2 * end), dim)
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new


def causal_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None = None,
                     dropout: float = 0.0) -> Tensor:
    """Causal attention by PyTorch's fused kernel; the queries are the last T of the S positions.

    query (B, H, T, d), key and value (B, K, S, d) with K a divisor of H -> (B, H, T, d). Query heads
    h * H/K ... (h + 1) * H/K - 1 share key-value head h. Ainslie et al. 2023, section 2.2.
    """
    n, n_keys = query.size(2), key.size(2)
    mask = None
    if 1 < n < n_keys or (window is not None and window < n_keys):
        mask = causal_mask(n, n_keys, window, device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and n > 1, dropout_p=dropout,
        enable_gqa=query.size(1) != key.size(1))


def _check_layer(d_model: int, n_heads: int, n_kv_heads: int, rope: RotaryEmbedding | None,
                 window: int | None, dropout: float) -> None:
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads: make it a multiple of "
                         "n_heads.")
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly: make "
                         "n_heads a multiple of n_kv_heads.")
    if rope is not None and rope.head_dim != d_model // n_heads:
        raise ValueError(f"rope turns {rope.head_dim} numbers, a head has d_model / n_heads = "
                         f"{d_model // n_heads}: make it with RotaryEmbedding({d_model // n_heads}, ...).")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, since a position sees itself.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it is a share of weights to drop, at least 0 and below 1.")


class MultiHeadAttention(nn.Module):
    """Causal multi-head attention; with ``n_kv_heads < n_heads``, grouped-query attention.

    Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023. ``rope`` may be shared by all layers,
    ``qk_norm`` normalises queries and keys by RMS, ``window`` limits how far back a position looks.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int | None = None, *, dropout: float = 0.0,
                 bias: bool = False, rope: RotaryEmbedding | None = None, qk_norm: bool = False,
                 window: int | None = None):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        _check_layer(d_model, n_heads, n_kv_heads, rope, window, dropout)
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim = d_model // n_heads
        self.w_qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.rope, self.dropout, self.window = rope, dropout, window

    def queries_keys_values(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> query (B, H, T, d), key and value (B, K, T, d), positions from ``start`` on."""
        if x.dim() != 3 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, positions, {self.d_model}).")
        heads = self.w_qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2K, T, d)
        query, key, value = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.rope is not None:
            cos, sin = self.rope(start, x.size(1))
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        return query, key, value

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). With a cache, x is the continuation of what the cache has seen."""
        query, key, value = self.queries_keys_values(x, start=0 if cache is None else cache.length)
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = causal_attention(query, key, value, self.window, self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))  # (B, H, T, d) -> (B, T, D)
