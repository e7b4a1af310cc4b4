"""Deep dive: What if the cache is too large?.

Written from ch03_attention/attention_variants.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "LatentAttention",
    "layers_needed",
    "sink_mask",
    "linear_attention",
    "linear_attention_recurrent",
    "gated_delta_rule_recurrent",
    "gated_delta_rule",
]

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ch03_attention.attention import RotaryEmbedding, apply_rope, causal_mask


class LatentAttention(nn.Module):
    """Multi-head latent attention: one latent and one small rotary key are cached for each position.

    DeepSeek-AI 2024 (DeepSeek-V2), section 2.1. ``rope.head_dim`` is the size of the rotary part.
    """

    def __init__(self, d_model: int, n_heads: int, head_dim: int, latent_dim: int, rope: RotaryEmbedding):
        super().__init__()
        for name, size in {"n_heads": n_heads, "head_dim": head_dim, "latent_dim": latent_dim}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        self.n_heads, self.head_dim, self.latent_dim, self.rope = n_heads, head_dim, latent_dim, rope
        self.w_query = nn.Linear(d_model, n_heads * (head_dim + rope.head_dim), bias=False)
        self.w_down = nn.Linear(d_model, latent_dim + rope.head_dim, bias=False)
        self.norm = nn.RMSNorm(latent_dim, eps=1e-6)
        self.w_key, self.w_value = (
            nn.Parameter(torch.randn(n_heads, latent_dim, head_dim) / latent_dim**0.5) for _ in range(2))
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    def compress(self, x: Tensor, start: int = 0) -> Tensor:
        """What the cache keeps of x (B, T, D): latent and rotary key, (B, T, c + r)."""
        latent, rotary_key = self.w_down(x).split([self.latent_dim, self.rope.head_dim], dim=-1)
        rotary_key = apply_rope(rotary_key, *self.rope(start, x.size(1)))
        return torch.cat([self.norm(latent), rotary_key], dim=-1)

    def queries(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> what (B, H, T, d) and, rotated, where (B, H, T, r)."""
        heads = self.w_query(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, d + r)
        what, where = heads.split([self.head_dim, self.rope.head_dim], dim=-1)
        return what, apply_rope(where, *self.rope(start, x.size(1)))

    def expanded(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D), with the keys and values of all heads written out: for training."""
        latent, rotary_key = self.compress(x)[:, None].split([self.latent_dim, self.rope.head_dim], dim=-1)
        key = torch.cat([latent @ self.w_key, rotary_key.expand(-1, self.n_heads, -1, -1)], dim=-1)
        mixed = F.scaled_dot_product_attention(torch.cat(self.queries(x), dim=-1), key, latent @ self.w_value,
                                               is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and cache (B, S, c + r) -> (B, T, D) and the longer cache; nothing is expanded."""
        start = 0 if cache is None else cache.size(1)
        cache = self.compress(x) if cache is None else torch.cat([cache, self.compress(x, start)], dim=1)
        what, where = self.queries(x, start)
        query = torch.cat([what @ self.w_key.mT, where], dim=-1)             # (B, H, T, c + r)
        shared = cache[:, None].expand(-1, self.n_heads, -1, -1)             # one for all heads, no copy
        mixed = F.scaled_dot_product_attention(
            query, shared, shared[..., : self.latent_dim], scale=(self.head_dim + self.rope.head_dim) ** -0.5,
            attn_mask=causal_mask(x.size(1), cache.size(1), device=x.device))  # (B, H, T, c)
        return self.out_proj((mixed @ self.w_value).transpose(1, 2).flatten(-2)), cache


def layers_needed(n: int, windows: list[int | None]) -> Tensor:
    """How many layers until position t (row) can know of position s (column): int (n, n), -1 = never.

    ``windows`` has one entry a layer, from the bottom; None is a layer without a window.
    """
    reached = torch.eye(n, dtype=torch.bool)
    needed = torch.where(reached, 0, -1)
    for layer, window in enumerate(windows, start=1):
        reached = (causal_mask(n, window=window).float() @ reached.float()) > 0
        needed[reached & (needed < 0)] = layer
    return needed


def sink_mask(n: int, window: int, sinks: int) -> Tensor:
    """A causal window that never loses the first positions: bool (n, n), True = may attend.

    Xiao et al. 2023, section 3.2. ``sinks`` positions at the start stay visible besides the window.
    """
    if sinks < 0:
        raise ValueError(f"sinks is {sinks}; it is a number of positions, at least 0. The paper uses 4.")
    return causal_mask(n) & (causal_mask(n, window=window) | (torch.arange(n) < sinks))


def _positive(x: Tensor) -> Tensor:
    """elu(x) + 1, the feature map of Katharopoulos et al. 2020, section 3.2.1."""
    return F.elu(x) + 1


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal linear attention, all positions at once: (..., T, d), (..., T, d), (..., T, e) -> (..., T, e).

    Katharopoulos et al. 2020, equation 8. Equal to ``linear_attention_recurrent``.
    """
    weights = (_positive(query) @ _positive(key).mT).tril()
    return weights @ value / weights.sum(-1, keepdim=True)


def linear_attention_recurrent(query: Tensor, key: Tensor, value: Tensor,
                               state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same, token by token: the output (..., T, e) and the state (..., d, e + 1), which can be passed on.

    Katharopoulos et al. 2020, equations 18 to 20; the last column of the state is the sum of the keys.
    """
    query, key = _positive(query), _positive(key)
    value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)       # the ones add up the weights
    state = key.new_zeros(*key.shape[:-2], key.size(-1), value.size(-1)) if state is None else state
    outputs = []
    for t in range(key.size(-2)):
        state = state + key[..., t, :, None] * value[..., t, None, :]
        mixed = (query[..., t, None, :] @ state).squeeze(-2)                  # (..., e + 1)
        outputs.append(mixed[..., :-1] / mixed[..., -1:])
    return torch.stack(outputs, dim=-2), state


def gated_delta_rule_recurrent(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor,
                               state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A state that is corrected and forgets, token by token. Gated DeltaNet (Yang et al. 2024), equation 10.

    query, key (..., T, d), keys of length 1; value (..., T, e); beta, decay (..., T) in (0, 1] ->
    output (..., T, e) and state (..., d, e). With decay 1 it is the delta rule.
    """
    state = key.new_zeros(*key.shape[:-2], key.size(-1), value.size(-1)) if state is None else state
    outputs = []
    for t in range(key.size(-2)):
        q, k, v = query[..., t, None, :], key[..., t, None, :], value[..., t, None, :]  # rows: (..., 1, d)
        state = decay[..., t, None, None] * state
        state = state + k.mT @ (beta[..., t, None, None] * (v - k @ state))
        outputs.append(q @ state)
    return torch.cat(outputs, dim=-2), state


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor,
                     state: Tensor | None = None, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
    """The same as ``gated_delta_rule_recurrent``, a chunk of tokens at a time. Gated DeltaNet, section 3.3.

    Shapes as there. ValueError for chunk_size < 1 and for a decay of 0 or below or above 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1. 64 is a good choice.")
    if not ((decay > 0) & (decay <= 1)).all():
        raise ValueError(f"decay goes from {decay.min():g} to {decay.max():g}; it is the share of the state "
                         "that is kept, above 0 and at most 1: make it with a sigmoid, and clamp(min=1e-30) "
                         "where that rounds to 0.")
    state = key.new_zeros(*key.shape[:-2], key.size(-1), value.size(-1)) if state is None else state
    outputs = []
    parts = ((query, -2), (key, -2), (value, -2), (beta, -1), (decay, -1))
    for q, k, v, b, a in zip(*(x.split(chunk_size, dim) for x, dim in parts), strict=True):
        log_kept = a.log().cumsum(-1)                                         # log g: (..., c)
        kept, b = log_kept.exp()[..., None], b[..., None]                     # (..., c, 1)
        later = torch.ones(k.size(-2), k.size(-2), dtype=torch.bool, device=k.device).triu(1)
        passed = log_kept[..., None] - log_kept[..., None, :]                 # log of g_t / g_i
        passed = passed.masked_fill(later, -torch.inf).exp()
        system = (b * passed * (k @ k.mT)).tril(-1)
        missing = b * (v - kept * (k @ state))
        u = torch.linalg.solve_triangular(system, missing, upper=False, unitriangular=True)
        outputs.append(kept * (q @ state) + (passed * (q @ k.mT)) @ u)
        state = kept[..., -1:, :] * state + (passed[..., -1, :, None] * k).mT @ u
    return torch.cat(outputs, dim=-2), state
