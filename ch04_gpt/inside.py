"""Deep dive: What happens inside, on your sentence.

Written from ch04_gpt/inside.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "Inside",
    "look_inside",
    "attention_reader",
    "head_scores",
    "heads_off",
    "votes",
    "head_writes",
    "resume",
]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ch02_tokenizer.tokenizer import BPETokenizer
from ch02_tokenizer.vocabulary import visible
from ch03_attention.attention import attention_weights, causal_mask
from ch04_gpt.gpt import GPT, RMSNorm, check_tokens
from utils.attention_viewer import MAX_TOKENS


@dataclass(frozen=True)
class Inside:
    """One text's way through a model of L layers with H heads: see ``look_inside``.

    ``parts`` (1 + 2L, T, D): what the embedding, then each layer's attention and MLP, added to the stream.
    ``weights`` (L, H, T, T): row looks, column is looked at. ``mixed`` (L, H, T, d): values, so weighted.
    """

    parts: Tensor
    weights: Tensor
    mixed: Tensor

    @property
    def stream(self) -> Tensor:
        """The residual stream before the first layer and after each: (L + 1, T, D)."""
        return self.parts.cumsum(0)[::2]


@torch.no_grad()
def look_inside(model: GPT, token_ids: Tensor) -> Inside:
    """Run a model on one text (1, T), keeping everything. ``ValueError`` for more than one text."""
    check_tokens(model.config, token_ids)
    if token_ids.size(0) != 1:
        raise ValueError(f"There are {token_ids.size(0)} texts; look_inside takes one: token_ids[:1].")
    x = model.token_embedding(token_ids)
    if model.position_embedding is not None:
        x = x + model.position_embedding(torch.arange(x.size(1), device=x.device))
    parts, weights, mixed = [x[0]], [], []
    for block in model.blocks:
        layer = block.attention
        mask = causal_mask(x.size(1), window=layer.window, device=x.device)
        query, key, value = layer.queries_keys_values(block.norm1(x))
        # grouped heads: each key and value serves several queries
        key, value = (heads.repeat_interleave(layer.n_heads // layer.n_kv_heads, dim=1) for heads in (key, value))
        weights.append(attention_weights(query, key, mask)[0])
        mixed.append(weights[-1] @ value[0])                                    # (H, T, d)
        parts.append(layer.out_proj(mixed[-1].transpose(0, 1).flatten(1)))      # (T, D)
        x = x + parts[-1]
        parts.append(block.mlp(block.norm2(x))[0])
        x = x + parts[-1]
    return Inside(torch.stack(parts), torch.stack(weights), torch.stack(mixed))


def attention_reader(model: GPT, tokenizer: BPETokenizer) -> Callable[[str], tuple[list[str], Tensor]]:
    """What ``utils.attention_viewer.view_attention`` asks for: text -> (tokens, weights (L, H, T, T))."""
    def read(text: str) -> tuple[list[str], Tensor]:
        ids = tokenizer.encode(text, allow_special=False)
        if not ids:
            raise ValueError("The text has no token. Type something.")
        token_ids = torch.tensor([ids[:MAX_TOKENS]], device=model.device)
        return [visible(tokenizer.decode([i])) for i in ids], look_inside(model, token_ids).weights.cpu()
    return read


def head_scores(weights: Tensor, token_ids: Tensor) -> dict[str, Tensor]:
    """How much weight each head puts where a name says, averaged over positions: {name: (L, H)}.

    weights (L, H, T, T) of the text token_ids (T,), T at least 3. "same token" and "induction" average
    over the positions whose token stood earlier, and are 0 where none did. Olsson et al. 2022 call the
    last one the prefix matching score.
    """
    n = len(token_ids)
    if n < 3 or weights.shape[-2:] != (n, n):
        raise ValueError(f"{n} tokens and weights of shape {tuple(weights.shape)}: give at least 3 tokens, and "
                         "weights (layers, heads, T, T) for the same T.")
    t = torch.arange(2, n)
    same = (token_ids[:, None] == token_ids).tril(-1)           # (T, T): the same token, earlier
    after = same.roll(1, dims=1).tril(-1)                       # one step right of it, still earlier than t

    def mean_weight(where: Tensor) -> Tensor:
        rows = where.any(-1)
        return (weights * where).sum(-1)[..., rows].sum(-1) / rows.sum().clamp(min=1)

    return {"previous token": weights[..., t, t - 1].mean(-1), "first token": weights[..., t, 0].mean(-1),
            "same token": mean_weight(same), "induction": mean_weight(after)}


@contextmanager
def heads_off(model: GPT, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Within this context the given heads, (layer, head) each, add nothing to the stream.

    ``ValueError`` for a head that the model does not have.
    """
    n_layers, n_heads = model.config.n_layers, model.config.n_heads
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"There is no head {layer}.{head}; layers go from 0 to {n_layers - 1}, heads from 0 to "
                             f"{n_heads - 1}.")

    def silence(chosen: list[int]) -> Callable:
        def hook(module, inputs):
            mixed = inputs[0].unflatten(-1, (n_heads, -1)).clone()  # (B, T, H, d)
            mixed[..., chosen, :] = 0
            return (mixed.flatten(-2),)
        return hook

    handles = []
    try:
        for layer in {layer for layer, _ in heads}:
            chosen = [head for at, head in heads if at == layer]
            handles.append(model.blocks[layer].attention.out_proj.register_forward_pre_hook(silence(chosen)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def votes(model: GPT, inside: Inside, direction: Tensor, position: int = -1) -> Tensor:
    """What each part of the stream adds to ``direction @ final normed vector``: (1 + 2L,), exact in sum.

    direction (D,) is a row of ``lm_head.weight`` for a logit, the difference of two rows for a difference.
    The scale of the final norm is taken from the whole. ``ValueError`` unless that norm is an RMSNorm.
    """
    if not isinstance(model.norm, RMSNorm):
        raise ValueError(f"The final norm is a {type(model.norm).__name__}; votes divides by an RMSNorm's scale "
                         "only, because a LayerNorm also moves the mean.")
    scale = torch.rsqrt(inside.stream[-1, position].square().mean() + model.norm.eps)
    return inside.parts[:, position] * scale @ (model.norm.weight * direction)


@torch.no_grad()
def head_writes(model: GPT, inside: Inside, layer: int) -> Tensor:
    """What each head of a layer adds to the stream: (H, T, D); their sum, with the bias, is the layer's part."""
    heads = inside.mixed[layer]                                                   # (H, T, d)
    weight = model.blocks[layer].attention.out_proj.weight
    return torch.einsum("htd,ohd->hto", heads, weight.unflatten(1, (len(heads), -1)))


@torch.no_grad()
def resume(model: GPT, x: Tensor, depth: int) -> Tensor:
    """The logits of the last position (B, V) from a stream x (B, T, D) that has passed ``depth`` layers."""
    for block in model.blocks[depth:]:
        x = block(x)
    return model.lm_head(model.norm(x[:, -1]))
