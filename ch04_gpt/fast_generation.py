"""Deep dive: How fast can it write?.

Written from ch04_gpt/fast_generation.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "in_pieces",
    "few_rows",
    "RowLinear",
    "prepare_for_decoding",
    "divide_by_rms",
    "FusedLayer",
    "FusedDecoder",
    "quantize_rows",
    "int8_product",
    "Int8Linear",
    "Int8Embedding",
    "quantize_int8",
    "lookup_draft",
    "next_distribution",
    "accept_draft",
    "Propose",
    "speculative_steps",
    "speculative_generate",
    "DraftModel",
]

import copy
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ch03_attention.attention import KVCache
from ch04_gpt.gpt import GPT, TransformerBlock, check_logits, check_prompt, check_sampling, evaluating, keep_likely


def in_pieces(weight: Tensor) -> Tensor:
    """A matrix (out, in) cut along its outputs: (4, out / 4, in), or (1, out, in) where four do not divide them."""
    return weight.reshape(1 if len(weight) % 4 else 4, -1, weight.size(1))


def few_rows(x: Tensor, pieces: Tensor) -> Tensor:
    """x (B, in) times the transpose of a matrix in pieces, as a batch of W xᵀ: (B, out), which lies as (out, B)."""
    return torch.bmm(pieces, x.t().expand(len(pieces), -1, -1)).view(-1, len(x)).t()


class RowLinear(nn.Linear):
    """A linear layer that multiplies up to ``most_rows`` rows on a CPU by ``few_rows``, which all threads share.

    (..., in) -> (..., out), equal to ``nn.Linear`` up to rounding; more rows, and other devices, take its way.
    """

    most_rows = 64

    @classmethod
    def sharing(cls, linear: nn.Linear) -> "RowLinear":
        """The same layer with the same parameters."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        if not 0 < len(rows) <= self.most_rows or x.device.type != "cpu":
            return super().forward(x)
        y = few_rows(rows, in_pieces(self.weight)).contiguous().view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def prepare_for_decoding(model: nn.Module) -> nn.Module:
    """Make every linear layer inside a model a ``RowLinear``, in place; names and values stay. Returns the model."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, RowLinear.sharing(layer))
    return model


def divide_by_rms(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without its weight, x (B, D) -> (B, D); for a single row of float32 the root is taken in Python."""
    if len(x) == 1 and x.dtype == torch.float32:
        return x * (torch.dot(x[0], x[0]).item() / x.size(1) + eps) ** -0.5
    return F.rms_norm(x, (x.size(1),), eps=eps)


class FusedLayer:
    """A layer of a Llama for one new token in each text, in few operations: a ``TransformerBlock``, written out."""

    @torch.no_grad()
    def __init__(self, block: TransformerBlock):
        attention, mlp = block.attention, block.mlp
        self.rope, self.head_dim, self.n_heads = attention.rope, attention.head_dim, attention.n_heads
        self.n_kv_heads, self.eps = attention.n_kv_heads, block.norm1.eps
        gate_up = torch.cat([mlp.w_gate.weight, mlp.w_up.weight])
        self.w_qkv = in_pieces(attention.w_qkv.weight * block.norm1.weight)
        self.w_out = in_pieces(attention.out_proj.weight)
        self.w_gate_up = in_pieces(gate_up * block.norm2.weight)
        self.w_down = in_pieces(mlp.w_down.weight)

    def __call__(self, x: Tensor, cache: KVCache) -> Tensor:
        """x (B, D) -> (B, D)."""
        n, matched = len(x), self.n_heads + self.n_kv_heads
        heads = few_rows(divide_by_rms(x, self.eps), self.w_qkv).contiguous().view(n, -1, 1, self.head_dim)
        query, key = self.rope.rotate(heads[:, :matched], cache.length).tensor_split((self.n_heads,), dim=1)
        key, value = cache.append(key, heads[:, matched:])
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.n_heads != self.n_kv_heads)
        x = x + few_rows(mixed.reshape(n, -1), self.w_out)
        gate, up = few_rows(divide_by_rms(x, self.eps), self.w_gate_up).tensor_split(2, dim=1)
        hidden = F.silu(gate).mul_(up)
        if n < 16:  # few_rows wants each row in one piece of memory: two rows take a quarter of the time, eight half
            hidden = hidden.contiguous()
        return x + few_rows(hidden, self.w_down)


class FusedDecoder(nn.Module):
    """A model of Llama's kind that takes single steps on a CPU through ``FusedLayer``; for ``generate``.

    The layers hold some weights as copies and share the others: make a new one after training. ``ValueError``
    for a model with other parts than RMSNorm, SwiGLU, RoPE and plain matrices, with biases, QK-norm or a window.
    """

    wanted = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "bias": False, "qk_norm": False, "window": None}

    def __init__(self, model: GPT):
        super().__init__()
        other = {name: getattr(model.config, name) for name, value in self.wanted.items()
                 if getattr(model.config, name) != value}
        if other:
            raise ValueError(f"FusedDecoder is written for {self.wanted}; this model has {other}. Use the model "
                             "itself, or prepare_for_decoding(model).")
        matrices = [m for b in model.blocks for m in (b.attention.w_qkv, b.attention.out_proj, *b.mlp.children())]
        if strange := sorted({type(m).__name__ for m in matrices if not isinstance(m, nn.Linear)}):
            raise ValueError(f"FusedDecoder needs plain matrices; this model has {', '.join(strange)}. Fuse a model "
                             "before it is quantised, and after LoRA is merged.")
        self.model, self.config, self.lm_head = model, model.config, model.lm_head
        self.layers = [FusedLayer(block) for block in model.blocks]

    def new_cache(self, padding: Tensor | None = None) -> list[KVCache]:
        """An empty cache, as the model's."""
        return self.model.new_cache(padding)

    @torch.no_grad()
    def hidden_states(self, token_ids: Tensor, cache: list[KVCache]) -> Tensor:
        """Ids (B, T) that continue what the cache has seen -> the normed stream (B, T, D)."""
        if token_ids.size(1) != 1 or token_ids.device.type != "cpu" or cache[0].padding is not None:
            return self.model.hidden_states(token_ids, cache)
        x = self.model.token_embedding(token_ids[:, 0])
        for layer, part in zip(self.layers, cache, strict=True):
            x = layer(x, part)
        return (divide_by_rms(x, self.model.norm.eps) * self.model.norm.weight)[:, None]

    def forward(self, token_ids: Tensor, cache: list[KVCache]) -> Tensor:
        """Ids (B, T) that continue what the cache has seen -> logits (B, T, V)."""
        return self.lm_head(self.hidden_states(token_ids, cache))


def quantize_rows(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round each row of a matrix to whole numbers of so many bits, one scale a row.

    (out, in) -> int8 (out, in) and scales (out,), with weight ≈ integers * scale. ``ValueError`` for bits
    other than 2 to 8. Dettmers et al. 2022, section 2.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; it must be 2 to 8, since the numbers are kept in 8.")
    largest = 2 ** (bits - 1) - 1  # 127
    scale = torch.linalg.vector_norm(weight, float("inf"), dim=1) / largest
    integers = (weight / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]).round_()
    return integers.to(torch.int8).contiguous(), scale


def int8_product(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """x (B, in) times a quantised matrix (out, in): (B, out), in the type of x.

    The integers become floating-point numbers a slice at a time, small enough to stay in the cache.
    """
    rows = 4 * max(1, 2**18 // integers.size(1))
    slices = [few_rows(x, in_pieces(part.to(x.dtype))) for part in integers.split(rows)]
    return torch.cat(slices, dim=-1) * scale


class Int8Linear(nn.Module):
    """A linear layer whose matrix is kept as integers of 8 bits and a scale a row, for inference.

    (..., in) -> (..., out). A few rows on a CPU go through PyTorch's own kernel, with x rounded to bfloat16,
    if their width is a multiple of 16.
    """

    kernel = staticmethod(getattr(torch, "_weight_int8pack_mm", None))

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("scale_bfloat16", scale.bfloat16(), persistent=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        fits = len(rows) <= 16 and rows.size(1) % 16 == 0  # it reads 16 numbers at a time, past a row's end
        if self.kernel and fits and x.device.type == "cpu":
            y = self.kernel(rows.bfloat16().contiguous(), self.integers, self.scale_bfloat16).to(x.dtype)
        else:
            y = int8_product(rows, self.integers, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """The rows of a quantised matrix by their number: ids (B, T) -> (B, T, D)."""

    def __init__(self, integers: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The integers, under the name by which a model asks where its weights lie."""
        return self.integers

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.integers) * F.embedding(token_ids, self.scale[:, None])


@torch.no_grad()
def quantize_int8(model: GPT, bits: int = 8) -> GPT:
    """A copy of a model with the matrices of all linear layers as 8-bit integers; it generates as before.

    A tied embedding shares the integers of the head. Norms, biases and position tables stay as they are.
    """
    replaced = {}  # what deepcopy shall take in place of a module, by its id
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach()
            replaced[id(module)] = Int8Linear(*quantize_rows(module.weight.detach(), bits), bias)
    if model.lm_head.weight is model.token_embedding.weight:
        head = replaced[id(model.lm_head)]
        replaced[id(model.token_embedding)] = Int8Embedding(head.integers, head.scale)
    return copy.deepcopy(model, replaced).eval()


def lookup_draft(text: Tensor, n: int, size: int = 3) -> tuple[Tensor, None]:
    """Guess that the text goes on as it did the last time that its last ``size`` ids stood there.

    Ids (T,) -> at most ``n`` ids, none if they never did; no probabilities. "Prompt lookup", Saxena 2023.
    """
    if len(text) <= size:
        return text[:0], None
    before = text[:-1].unfold(0, size, 1)  # all runs of that length but the last
    places = (before == text[-size:]).all(dim=1).nonzero()
    begin = int(places[-1]) + size if len(places) else len(text)
    return text[begin : begin + n], None


def next_distribution(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                      top_p: float | None = None, min_p: float | None = None) -> Tensor:
    """The probabilities that ``sample`` draws from: (..., V) -> float32 (..., V). Temperature 0: all on the best."""
    if temperature < 1e-6:  # to divide by less can overflow
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    return torch.softmax(keep_likely(logits.float() / temperature, top_k, top_p, min_p), dim=-1)


def accept_draft(model_says: Tensor, draft: Tensor, draft_says: Tensor | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
    """The ids that come out of a draft: those accepted, and one more from the model.

    ``model_says`` (n + 1, V): its distribution at each drafted id and after the last; ``draft`` (n,);
    ``draft_says`` (n, V): what the ids were drawn from, or None if they were certain. An id x is accepted
    with probability min(1, p(x) / q(x)); the first that is not is drawn anew from max(0, p - q), normalised.
    The result is distributed as if drawn from the model. Leviathan et al. 2023, section 2.3.
    """
    if draft_says is None:
        draft_says = F.one_hot(draft, model_says.size(-1)).to(model_says.dtype)
    p = model_says[:-1].gather(1, draft[:, None])[:, 0]
    q = draft_says.gather(1, draft[:, None])[:, 0]
    chance = torch.rand(len(draft), generator=generator, device=draft.device)
    kept = int((chance * q < p).long().cumprod(dim=0).sum())  # up to the first refusal
    left = model_says[kept]
    if kept < len(draft):
        left = (left - draft_says[kept]).clamp(min=0)
    return torch.cat([draft[:kept], torch.multinomial(left, 1, generator=generator)])


Propose = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


def speculative_steps(model: GPT, token_ids: Tensor, max_new_tokens: int, *, propose: Propose = lookup_draft,
                      n_draft: int = 6, stop_ids: Collection[int] = (),
                      generator: torch.Generator | None = None, **dials) -> Iterator[Tensor]:
    """Yield the ids (n,) that each call of the model brings, n from 1 to ``n_draft`` + 1."""
    text, end = token_ids[0], token_ids.size(1) + max_new_tokens
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=text.device)
    with evaluating(model):
        cache = model.new_cache()
        while len(text) < end:
            with torch.inference_mode():
                draft, draft_says = propose(text, min(n_draft, end - len(text) - 1))
                unread = torch.cat([text[cache[0].length :], draft])
                states = model.hidden_states(unread[None], cache)[0, -len(draft) - 1 :]
                logits = model.lm_head(states)
                check_logits(logits)
                new = accept_draft(next_distribution(logits, **dials), draft, draft_says, generator)
                stops = torch.isin(new, stop).nonzero()
                new = new[: stops[0, 0] + 1] if len(stops) else new
                text = torch.cat([text, new])
                for layer in cache:
                    layer.truncate(len(text) - 1)  # forget refused ids; the newest has not been read yet
            yield new.clone()
            if len(stops):
                return


def speculative_generate(model: GPT, token_ids: Tensor, max_new_tokens: int, *,
                         propose: Propose = lookup_draft, n_draft: int = 6, temperature: float = 1.0,
                         top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
                         stop_ids: Collection[int] = (),
                         generator: torch.Generator | None = None) -> Tensor:
    """``generate`` for one prompt (1, T), several ids to a call of the model: (1, T + new).

    ``propose(text (T,), n)`` drafts up to n ids and says from which distributions, or None. Greedy text is
    the same as without drafts; sampled text is another draw from the same distribution. Leviathan et al.
    2023; Chen et al. 2023. ``ValueError`` as in ``generate``, and for more than one prompt.
    """
    check_prompt(model.config, token_ids, max_new_tokens)
    check_sampling(model.config.vocab_size, temperature, top_k, top_p, min_p)
    if len(token_ids) != 1 or not 0 <= n_draft <= 15:
        raise ValueError(f"{len(token_ids)} prompts and n_draft {n_draft}: drafts are checked for one prompt "
                         "at a time, ids of shape (1, T), with n_draft 0 to 15.")
    steps = speculative_steps(model, token_ids, max_new_tokens, propose=propose, n_draft=n_draft,
                              stop_ids=stop_ids, generator=generator, temperature=temperature, top_k=top_k,
                              top_p=top_p, min_p=min_p)
    return torch.cat([token_ids[0], *steps])[None]


class DraftModel:
    """Drafts by another, faster model with the same vocabulary; ``dials`` as the text is drawn with."""

    def __init__(self, model: GPT, generator: torch.Generator | None = None, **dials):
        self.model, self.generator, self.dials = model, generator, dials
        self.cache, self.read = model.new_cache(), torch.empty(0, dtype=torch.long)

    def __call__(self, text: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
        """Ids (T,) -> ``n`` drawn ids and the distributions (n, V) that they were drawn from."""
        shared = min(len(self.read), len(text) - 1)
        same = (self.read[:shared].to(text.device) == text[:shared]).long().cumprod(dim=0)
        for layer in self.cache:
            layer.truncate(int(same.sum()))  # from there on, the last draft was refused
        begin, says = len(text), []
        for _ in range(n):
            states = self.model.hidden_states(text[None, self.cache[0].length :], self.cache)[:, -1]
            says.append(next_distribution(self.model.lm_head(states), **self.dials))
            text = torch.cat([text, torch.multinomial(says[-1], 1, generator=self.generator)[0]])
        self.read = text[: self.cache[0].length]
        return text[begin:], torch.cat(says) if says else None
