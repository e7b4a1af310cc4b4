"""Chapter 3: Attention.

Written from ch03_attention/attention.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "softmax",
    "causal_mask",
    "attention_weights",
    "scaled_dot_product_attention",
    "apply_rope",
    "RotaryEmbedding",
    "RopeScaling",
    "GrowingBuffer",
    "KVCache",
    "padding_mask",
    "causal_attention",
    "MultiHeadAttention",
]

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ch03_attention.flash_attention import flash_attention  # noqa: F401  section 3.12; part of this library


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Exponentials that add up to one along ``dim``; the largest is subtracted first, so none overflows.

    Any shape and floating dtype. A slice of only ``-inf`` (everything masked) gives zeros, not NaN.
    """
    largest = x.detach().amax(dim, keepdim=True)  # cancels out, and so needs no gradient
    exponentials = torch.exp(x - largest.masked_fill(largest == -torch.inf, 0.0))
    total = exponentials.sum(dim, keepdim=True)
    return exponentials / total.masked_fill(total == 0, 1.0)


def causal_mask(n: int, n_keys: int | None = None, window: int | None = None, device=None,
                padding: Tensor | None = None) -> Tensor:
    """Which keys each query may attend to: bool (n, n_keys), True = may attend.

    The queries are the last ``n`` of ``n_keys`` positions (default: all of them). With ``window``, only
    the nearest ``window`` keys, the query's own included. With ``padding``, int64 (B,), bool (B, 1, n, n_keys):
    in row b the first ``padding[b]`` keys are hidden, except each from itself, so that no query sees nothing.
    """
    n_keys = n if n_keys is None else n_keys
    if n > n_keys:
        raise ValueError(f"{n} queries but only {n_keys} keys: the queries are the last positions, so n_keys "
                         "must be at least n.")
    _check_window(window)
    query = torch.arange(n_keys - n, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)[None, :]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    if padding is not None:
        allowed = (allowed & (key >= padding[:, None, None, None])) | (key == query)
    return allowed


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, since a position sees itself.")


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


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: (..., T, d) with cos, sin (T, d).

    Computed in the wider of the two dtypes and returned in that of ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines for rotary position embedding. Su et al. 2021 (RoFormer), section 3.2.2.

    ``forward(start, length)`` gives the tables of positions start ... start+length-1, each
    (length, head_dim). Pair i turns by theta ** (-2i / head_dim) radians a position, less with ``scaling``.
    """

    def __init__(self, head_dim: int, context_length: int, theta: float = 10_000.0,
                 scaling: "RopeScaling | None" = None):
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary positions turn pairs of numbers, so it must be "
                             "even: choose d_model and n_heads so that d_model / n_heads is.")
        self.head_dim, self.context_length = head_dim, context_length
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)  # (head_dim / 2,)
        if scaling is not None:
            frequencies = scaling.stretch(frequencies)
        angles = torch.outer(torch.arange(context_length).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)  # (context_length, head_dim): both halves of a pair
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._latest = (None, 0, 0, None, None)  # the tables asked for last, see rotate

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        end = start + length
        if end > self.context_length:
            raise ValueError(f"Position {end - 1} is beyond the last one, {self.context_length - 1}: shorten the "
                             "text, or build the model with a larger context_length.")
        return self.cos[start:end], self.sin[start:end]

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        """``apply_rope(x, *self(start, T))`` in fewer operations: the layers of a model share this preparation."""
        table, at, length, cos, signed_sin = self._latest
        if at != start or length != x.size(-2) or table is not self.cos:
            with torch.inference_mode(False):  # what is kept must serve training too
                cos, sin = self(start, x.size(-2))
                signed_sin = torch.cat([-sin[:, : self.head_dim // 2], sin[:, self.head_dim // 2 :]], dim=-1)
            self._latest = (self.cos, start, x.size(-2), cos, signed_sin)
        turned = torch.addcmul(x * cos, x.roll(self.head_dim // 2, dims=-1), signed_sin)
        return turned if turned.dtype == x.dtype else turned.to(x.dtype)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's way to stretch rotary positions to longer texts than a model was trained on.

    Pairs that turn at least ``high_freq_factor`` times within ``original_context`` keep their speed, those that
    turn less than ``low_freq_factor`` times become ``factor`` times slower, and between them the speed changes
    gradually. Grattafiori et al. 2024, section 3.4, with the rule as published with the weights.
    """

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        if not self.factor >= 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"RopeScaling has factor {self.factor}, low_freq_factor {self.low_freq_factor} and "
                             f"high_freq_factor {self.high_freq_factor}: make factor at least 1 and keep "
                             "0 < low_freq_factor < high_freq_factor.")
        if self.original_context < 1:
            raise ValueError(f"original_context is {self.original_context}; it is a number of positions, at least 1.")

    def stretch(self, frequencies: Tensor) -> Tensor:
        """The slower speeds for these ``frequencies``, in radians a position: same shape."""
        turns = self.original_context * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0, 1)  # 1 = as before, 0 = factor times slower
        return frequencies * (share + (1 - share) / self.factor)


class GrowingBuffer:
    """Tensors (B, K, n, d) put one after the other; its memory doubles when full, or keeps the last ``keep``."""

    def __init__(self, keep: int | None = None):
        self.keep, self.used, self.data = keep, 0, None

    def append(self, new: Tensor) -> Tensor:
        """Add ``new`` (B, K, n, d) and return what is held with it, (B, K, used, d)."""
        n = new.size(2)
        if self.keep is not None and n > self.keep:  # longer than what is kept: only its end goes in
            everything = torch.cat([self.data[:, :, : self.used], new], dim=2) if self.used else new
            self.data, self.used = None, 0
            self.append(new[:, :, -self.keep :])
            return everything
        if self.data is None or self.used + n > self.data.size(2):
            self._make_room(new)
        self.data[:, :, self.used : self.used + n] = new
        self.used += n
        return self.data[:, :, : self.used]

    @property
    def nbytes(self) -> int:
        """Its memory, in bytes."""
        return 0 if self.data is None else self.data.nbytes

    def _make_room(self, new: Tensor) -> None:
        batch, heads, n, dim = new.shape
        kept = self.used if self.keep is None else min(self.used, self.keep)
        larger = new.new_empty(batch, heads, max(64, 2 * (kept + n)), dim)
        if kept:
            larger[:, :, :kept] = self.data[:, :, self.used - kept : self.used]
        self.data, self.used = larger, kept


class KVCache:
    """The keys and values that one attention layer has computed.

    ``window``: positions that no later one can see are dropped, and the memory stays flat. ``padding``, int64
    (B,): so many positions at the left of each row are no text and must not be seen. ``length`` counts all
    positions, the dropped ones too.
    """

    spare = 16  # a rolling cache keeps so many positions more than it needs, for ``truncate``

    def __init__(self, window: int | None = None, padding: Tensor | None = None):
        _check_window(window)
        self.window, self.padding, self.length = window, padding, 0
        self._most_padding, self._is_text = _most_padding(padding), None
        keep = None if window is None else window - 1 + self.spare
        self._keys, self._values = GrowingBuffer(keep), GrowingBuffer(keep)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, d); return all, with a window all that these may see, (B, K, S, d)."""
        _check_fit(self, key)
        keys, values = self._keys.append(key), self._values.append(value)
        self.length += key.size(2)
        if self.window is not None:
            seen = key.size(2) + self.window - 1
            keys, values = keys[:, :, -seen:], values[:, :, -seen:]
        return keys, values

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on. ``ValueError`` if those needed before it were dropped."""
        first = self.length - self._keys.used  # the earliest that is still there
        _check_truncate(self, length, first)
        self._keys.used = self._values.used = max(0, length - first)
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64, in this order; a row may be taken more than once."""
        if self.length:
            self._keys.data, self._values.data = self._keys.data[rows], self._values.data[rows]
        if self.padding is not None:
            self.padding, self._is_text = self.padding[rows], None

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return self._keys.nbytes + self._values.nbytes


def _most_padding(padding: Tensor | None) -> int:
    if padding is None:
        return 0
    if padding.dim() != 1 or padding.numel() == 0 or padding.is_floating_point() or padding.min() < 0:
        raise ValueError(f"padding is {padding.tolist()}; give one whole number of at least 0 for each row.")
    return int(padding.max())


def _check_fit(cache: KVCache, key: Tensor) -> None:
    held = cache._keys.data
    if held is not None and (held.size(0), held.size(1), held.size(3)) != (key.size(0), key.size(1), key.size(3)):
        raise ValueError(
            f"The cache holds {held.size(0)} sequences with {held.size(1)} heads of {held.size(3)} numbers, the "
            f"new keys have shape {tuple(key.shape)}: make a new KVCache() for each layer and each new batch.")
    if cache.padding is not None and cache.padding.size(0) != key.size(0):
        raise ValueError(f"padding is given for {cache.padding.size(0)} rows, the keys have {key.size(0)}: give "
                         "one number for each row of the batch.")


def _check_truncate(cache: KVCache, length: int, first: int) -> None:
    if not 0 <= length <= cache.length:
        raise ValueError(f"Cannot truncate to {length} positions: the cache has seen {cache.length}; give a "
                         f"length from 0 to {cache.length}.")
    if cache.window is not None and length > 0 and max(0, length + 1 - cache.window) < first:
        raise ValueError(f"Cannot truncate to {length} positions: with a window of {cache.window}, those before "
                         f"{first} are gone. Make a new cache and read the text again.")


def padding_mask(cache: KVCache, n: int, n_keys: int, window: int | None = None) -> Tensor | None:
    """What the ``n`` newest positions may see of the ``n_keys`` newest, bool (B, 1, n, n_keys).

    None if there is no padding among these keys, and so no need for a mask.
    """
    first, most = cache.length - n_keys, cache._most_padding
    if first >= most:
        return None
    if n > 1 or cache.length <= most or (window is not None and window < n_keys):
        device = cache._keys.data.device
        return causal_mask(n, n_keys, window, device, cache.padding.to(device) - first)
    if cache._is_text is None or cache._is_text.size(-1) < cache.length:  # made for many steps to come
        position = torch.arange(2 * cache.length, device=cache._keys.data.device)
        cache._is_text = position >= cache.padding.to(position.device)[:, None, None, None]
    return cache._is_text[..., first : cache.length]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None = None,
                     dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Causal attention by PyTorch's fused kernel; the queries are the last T of the S positions.

    query (B, H, T, d), key and value (B, K, S, d) with K a divisor of H -> (B, H, T, d). Query heads
    h * H/K ... (h + 1) * H/K - 1 share key-value head h. Ainslie et al. 2023, section 2.2. A ``mask``,
    broadcastable to (B, H, T, S), replaces the causal one.
    """
    n, n_keys = query.size(2), key.size(2)
    if mask is None and n == 1 and window is not None and window < n_keys:  # a single query needs no mask
        key, value = key[:, :, -window:], value[:, :, -window:]
    elif mask is None and (1 < n != n_keys or (window is not None and window < n_keys)):
        mask = causal_mask(n, n_keys, window, device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=bool(mask is None and n > 1), dropout_p=dropout,
        enable_gqa=query.size(1) != key.size(1))


def _check_layer(d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None,
                 rope: RotaryEmbedding | None, window: int | None, dropout: float) -> None:
    if n_heads < 1 or (head_dim is None and d_model % n_heads):
        raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads: make it a multiple of "
                         "n_heads, or choose head_dim.")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim is {head_dim}; it must be at least 1, or None for d_model / n_heads.")
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly: make "
                         "n_heads a multiple of n_kv_heads.")
    size = d_model // n_heads if head_dim is None else head_dim
    if rope is not None and rope.head_dim != size:
        raise ValueError(f"rope turns {rope.head_dim} numbers, a head has head_dim = {size}: make it with "
                         f"RotaryEmbedding({size}, ...).")
    _check_window(window)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it is a share of weights to drop, at least 0 and below 1.")


def _check_cache(cache: KVCache, window: int | None) -> None:
    if cache.window is not None and (window is None or cache.window < window):
        raise ValueError(f"The cache keeps {cache.window} positions, the layer looks back at "
                         f"{window or 'all of them'}: make the cache with the layer's own new_cache().")


class MultiHeadAttention(nn.Module):
    """Causal multi-head attention; with ``n_kv_heads < n_heads``, grouped-query attention.

    Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023. ``rope`` may be shared by all layers, ``qk_norm``
    normalises queries and keys by RMS, ``window`` limits how far back a position looks.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int | None = None, *,
                 head_dim: int | None = None, dropout: float = 0.0, bias: bool = False,
                 rope: RotaryEmbedding | None = None, qk_norm: bool = False, norm_eps: float = 1e-6,
                 window: int | None = None):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        _check_layer(d_model, n_heads, n_kv_heads, head_dim, rope, window, dropout)
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.w_qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity() for _ in range(2))
        self.rope, self.qk_norm, self.dropout, self.window = rope, qk_norm, dropout, window

    def new_cache(self, padding: Tensor | None = None) -> KVCache:
        """An empty cache for this layer."""
        return KVCache(self.window, padding)

    def queries_keys_values(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> query (B, H, T, d), key and value (B, K, T, d), positions from ``start`` on."""
        if x.dim() != 3 or x.size(-1) != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, positions, {self.d_model}).")
        heads = self.w_qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2K, T, d)
        matched, value = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        if self.qk_norm:
            query, key = matched.split([self.n_heads, self.n_kv_heads], dim=1)
            matched = torch.cat([self.q_norm(query), self.k_norm(key)], dim=1)
        if self.rope is not None:  # queries and keys are turned together since that is faster
            matched = self.rope.rotate(matched, start)
        query, key = matched.split([self.n_heads, self.n_kv_heads], dim=1)
        return query, key, value

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). With a cache, x is the continuation of what the cache has seen."""
        query, key, value = self.queries_keys_values(x, start=0 if cache is None else cache.length)
        mask = None
        if cache is not None:
            _check_cache(cache, self.window)
            key, value = cache.append(key, value)
            mask = padding_mask(cache, x.size(1), key.size(2), self.window)
        mixed = causal_attention(query, key, value, self.window, self.dropout if self.training else 0.0, mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))  # (B, H, T, d) -> (B, T, H * d) -> (B, T, D)
