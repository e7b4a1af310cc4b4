"""Chapter 4: A GPT.

Written from ch04_gpt/gpt.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "LayerNorm",
    "RMSNormGradient",
    "RMSNorm",
    "GELU",
    "MLP",
    "SwiGLU",
    "GPTConfig",
    "SIZES",
    "CHOICES",
    "check_config",
    "check_heads",
    "from_keys",
    "make_norm",
    "TransformerBlock",
    "init_weights",
    "check_shape",
    "check_tokens",
    "learned_positions",
    "Published",
    "GPT",
    "llama_style",
    "llama32",
    "qwen3",
    "PRESETS",
    "count_parameters",
    "flops_per_token",
    "kv_cache_bytes",
    "check_sampling",
    "keep_top_k",
    "keep_top_p",
    "keep_min_p",
    "keep_likely",
    "seen_tokens",
    "penalise_repeats",
    "check_logits",
    "sample",
    "chooser",
    "evaluating",
    "TextReader",
    "decode_steps",
    "check_prompt",
    "check_padding",
    "pad_left",
    "generate_tokens",
    "generate",
    "beam_search",
]

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .previous_chapters import KVCache, MultiHeadAttention, RopeScaling, RotaryEmbedding


class LayerNorm(nn.Module):
    """Move each vector to mean 0 and variance 1: (x - mean) / sqrt(variance + eps) * weight + bias.

    (..., D) -> (..., D). Ba, Kiros and Hinton 2016, section 3.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNormGradient(torch.autograd.Function):
    """RMSNorm with its gradient by formula: faster for training on a CPU, to be differentiated once.

    With n = x / rms(x) and a gradient g of the output, x receives (g w - n mean(g w n)) / rms(x).
    """

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = x * scale
        context.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = context.saved_tensors
        product = grad * normed
        along = (product @ weight / weight.numel()).unsqueeze(-1)  # mean(g w n)
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square: x / sqrt(mean(x²) + eps) * weight.

    (..., D) -> (..., D). Zhang and Sennrich 2019, equation 4.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        if (torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32
                and x.dim() > 1 and x.size(-1) == len(self.weight) and not torch.compiler.is_compiling()):
            return RMSNormGradient.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GELU(nn.Module):
    """x times the probability that a standard normal number is below x, in GPT-2's tanh form.

    Any shape. Hendrycks and Gimpel 2016, section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Widen each position's vector, bend it, narrow it again: (..., D) -> (..., d_ff) -> (..., D).

    Vaswani et al. 2017, section 3.3, with GELU for ReLU as in GPT-2.
    """

    def __init__(self, d_model: int, d_ff: int, bias: bool = True):
        super().__init__()
        self.w_up = nn.Linear(d_model, d_ff, bias=bias)
        self.activation = GELU()
        self.w_down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(self.activation(self.w_up(x)))


class SwiGLU(nn.Module):
    """A gated MLP: w_down(silu(w_gate(x)) * w_up(x)), (..., D) -> (..., D).

    Shazeer 2020, equation 6. For the size of an ``MLP`` of width 4 D, choose d_ff near 8 D / 3.
    """

    def __init__(self, d_model: int, d_ff: int, bias: bool = False):
        super().__init__()
        self.w_gate = nn.Linear(d_model, d_ff, bias=bias)
        self.w_up = nn.Linear(d_model, d_ff, bias=bias)
        self.w_down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT and its choices between the parts of GPT-2, Llama and Qwen3.

    ``ValueError`` if they do not fit together. ``dataclasses.replace`` keeps what was filled in: with a new
    ``d_model``, also pass ``head_dim=None`` and ``d_ff=None``; with a new ``n_heads``, ``head_dim=None`` and
    ``n_kv_heads=None``.
    """

    vocab_size: int                 # V
    context_length: int             # the most positions it can see, T
    d_model: int                    # D, the width of the residual stream
    n_layers: int
    n_heads: int                    # H, of queries; divides d_model unless head_dim is given
    n_kv_heads: int | None = None   # K, of keys and values; divides n_heads; n_heads if not given
    d_ff: int | None = None         # the MLP's hidden width; 4 * d_model if not given
    norm: str = "layernorm"         # or "rmsnorm"
    mlp: str = "gelu"               # or "swiglu"
    position: str = "learned"       # or "rope"
    rope_theta: float = 10_000.0
    bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-5
    head_dim: int | None = None     # d, the width of one head; d_model / n_heads if not given
    qk_norm: bool = False           # normalise queries and keys, as Qwen3 does
    rope_scaling: RopeScaling | None = None  # slower rotations for a longer context, as in Llama 3.2
    window: int | None = None       # how many positions a position sees; all before it if not given

    def __post_init__(self):
        check_config(self)
        filled_in = {"n_kv_heads": self.n_heads, "d_ff": 4 * self.d_model,
                     "head_dim": self.d_model // self.n_heads}
        for name, value in filled_in.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def to_dict(self) -> dict:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict) -> "GPTConfig":
        """The configuration that ``to_dict`` wrote; ``ValueError`` for an unknown or a missing key."""
        scaling = given.get("rope_scaling")
        if isinstance(scaling, dict):
            given = given | {"rope_scaling": from_keys(RopeScaling, scaling)}
        return from_keys(cls, given)


SIZES = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "head_dim",
         "window")
CHOICES = {"norm": ("layernorm", "rmsnorm"), "mlp": ("gelu", "swiglu"), "position": ("learned", "rope")}


def check_config(config: GPTConfig) -> None:
    """Raise ``ValueError``, with the value, the bound and the mend, if the sizes do not fit together."""
    optional = {field.name for field in fields(config) if field.default is None}
    for name in SIZES:
        value = getattr(config, name)
        if not (value is None and name in optional) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(known)}.")
    for name in ("norm_eps", "rope_theta"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be above 0.")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout is {config.dropout}; it must be at least 0 and below 1.")
    check_heads(config)


def check_heads(config: GPTConfig) -> None:
    """``ValueError`` unless the heads divide the width, share keys evenly and can be turned in pairs."""
    d_model, n_heads, n_kv_heads = config.d_model, config.n_heads, config.n_kv_heads or config.n_heads
    if config.head_dim is None and d_model % n_heads:
        near = max(d_model // n_heads, 1) * n_heads
        raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads: make it a multiple of "
                         f"n_heads, {near} or {near + n_heads} for instance, or give head_dim.")
    if n_heads % n_kv_heads:
        divisors = ", ".join(str(k) for k in range(1, n_heads + 1) if n_heads % k == 0)
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly: "
                         f"n_kv_heads must be one of {divisors}.")
    head_dim = config.head_dim or d_model // n_heads
    if config.position == "rope" and head_dim % 2:
        raise ValueError(f"Each head has {head_dim} dimensions; rotary positions turn pairs, so that must be "
                         "even: change d_model, n_heads or head_dim, or choose position='learned'.")
    if config.position != "rope" and config.rope_scaling is not None:
        raise ValueError("rope_scaling is given, but position is 'learned': there is no rotation to slow "
                         "down. Leave it out, or choose position='rope'.")


def from_keys(kind: type, given: dict):
    """``kind(**given)`` for a dataclass; a ``ValueError`` names unknown and missing keys."""
    known = {field.name: field for field in fields(kind)}
    unknown = [repr(name) for name in given if name not in known]
    missing = [repr(name) for name, field in known.items() if field.default is MISSING and name not in given]
    if unknown or missing:
        problems = [f"{word} {', '.join(names)}"
                    for word, names in (("unknown", unknown), ("missing", missing)) if names]
        raise ValueError(f"These are not the entries of a {kind.__name__}: {'; '.join(problems)}. "
                         f"It knows {', '.join(known)}.")
    return kind(**given)


def make_norm(config: GPTConfig) -> nn.Module:
    """The normalisation that the configuration asks for."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, config.bias)


class TransformerBlock(nn.Module):
    """One layer: attention, then an MLP, each reading the stream through a norm and adding to it.

    (B, T, D) -> (B, T, D). Radford et al. 2019, section 2.3. ``rope`` is shared by all layers.
    """

    def __init__(self, config: GPTConfig, rope: RotaryEmbedding | None = None):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention = MultiHeadAttention(
            config.d_model, config.n_heads, config.n_kv_heads, head_dim=config.head_dim,
            dropout=config.dropout, bias=config.bias, rope=rope, qk_norm=config.qk_norm,
            norm_eps=config.norm_eps, window=config.window)
        mlp = MLP if config.mlp == "gelu" else SwiGLU
        self.mlp = mlp(config.d_model, config.d_ff, config.bias)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Read, answer, add, twice; with a cache, x continues what it has seen."""
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


@torch.no_grad()
def init_weights(model: "GPT") -> None:
    """Matrices normal with standard deviation 0.02, or 0.02 / sqrt(2 n_layers) if they write to the stream.

    Biases 0; the weights of norms keep their 1. Radford et al. 2019, section 2.3.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            writes = name.endswith(("out_proj.weight", "w_down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * model.config.n_layers) if writes else 0.02)


def check_shape(config: GPTConfig, token_ids: Tensor, start: int = 0) -> None:
    """``ValueError`` unless token ids are (B, T) and, after ``start`` positions, end within the context."""
    if token_ids.dim() != 2 or token_ids.numel() == 0:
        raise ValueError(f"Token ids have shape {tuple(token_ids.shape)}; the model takes (B, T), both at "
                         "least 1: for a single text of n tokens, (1, n).")
    end, limit = start + token_ids.size(1), config.context_length
    if end > limit:
        raise ValueError(f"{end} tokens exceed the context length {limit}: keep {limit} of them, or build "
                         "the model with a larger context_length.")


def check_tokens(config: GPTConfig, token_ids: Tensor) -> None:
    """``check_shape``, and every id must be in the vocabulary."""
    check_shape(config, token_ids)
    low, high = (int(bound) for bound in token_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"Token ids reach from {low} to {high}; the vocabulary has 0 to "
                         f"{config.vocab_size - 1}: was the text encoded with another tokenizer?")


def learned_positions(weight: Tensor, start: int, length: int, padding: Tensor | None = None) -> Tensor:
    """The vectors of positions from ``start`` on, weight (context, D) -> (T, D).

    (B, T, D) where row b begins with ``padding[b]`` places that are no text: its positions count from there.
    """
    if padding is None:
        return weight[start : start + length]
    index = torch.arange(start, start + length, device=weight.device) - padding.to(weight.device)[:, None]
    return F.embedding(index.clamp(min=0), weight)


class Published:
    """What makes a model with a ``config`` one that can be loaded and saved; weights.py does the work."""

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT":
        """Published weights: "smollm2-135m", a folder in the Hugging Face layout, or a .gguf file."""
        from ch04_gpt.weights import load_pretrained  # only now: that file needs this one
        return load_pretrained(cls, name_or_folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which Hugging Face's ``transformers`` opens."""
        from ch04_gpt.weights import save_pretrained
        save_pretrained(self, folder)


class GPT(Published, nn.Module):
    """A decoder-only transformer: GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023), Qwen3, by config."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        learned = config.position == "learned"
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model) if learned else None
        rope = None if learned else RotaryEmbedding(
            config.head_dim, config.context_length, config.rope_theta, config.rope_scaling)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(TransformerBlock(config, rope) for _ in range(config.n_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        init_weights(self)

    def hidden_states(self, token_ids: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Token ids (B, T) -> the normed stream (B, T, D); with a cache, ids continue what it has seen."""
        start = cache[0].length if cache else 0
        check_shape(self.config, token_ids, start)
        try:
            x = self.token_embedding(token_ids)
        except IndexError:  # on a CPU the embedding looks for unknown ids itself; say which
            check_tokens(self.config, token_ids)
            raise
        if self.position_embedding is not None:
            padding = cache[0].padding if cache else None
            x = x + learned_positions(self.position_embedding.weight, start, x.size(1), padding)
        x = self.dropout(x)
        for block, part in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, part)
        return self.norm(x)

    def forward(self, token_ids: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.lm_head(self.hidden_states(token_ids, cache))

    def new_cache(self, padding: Tensor | None = None) -> list[KVCache]:
        """An empty key-value cache, one part a layer; of row b, the first ``padding[b]`` positions are none."""
        return [block.attention.new_cache(padding) for block in self.blocks]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.token_embedding.weight.device


llama_style = partial(GPTConfig, norm="rmsnorm", mlp="swiglu", position="rope", bias=False)
llama32 = partial(llama_style, 128_256, 131_072, n_kv_heads=8, d_ff=8192, rope_theta=500_000.0,
                  rope_scaling=RopeScaling(factor=32.0))
qwen3 = partial(llama_style, 151_936, 40_960, n_kv_heads=8, head_dim=128, qk_norm=True,
                rope_theta=1_000_000.0, norm_eps=1e-6)

PRESETS: dict[str, GPTConfig] = {
    "gpt2-124m": GPTConfig(50_257, 1024, 768, 12, 12),
    "gpt2-355m": GPTConfig(50_257, 1024, 1024, 24, 16),
    "gpt2-774m": GPTConfig(50_257, 1024, 1280, 36, 20),
    "gpt2-1558m": GPTConfig(50_257, 1024, 1600, 48, 25),
    "smollm2-135m": llama_style(49_152, 8192, 576, 30, 9, n_kv_heads=3, d_ff=1536, rope_theta=100_000.0),
    "smollm2-360m": llama_style(49_152, 8192, 960, 32, 15, n_kv_heads=5, d_ff=2560, rope_theta=100_000.0),
    "llama3.2-1b": llama32(d_model=2048, n_layers=16, n_heads=32),
    "llama3.2-3b": llama32(d_model=3072, n_layers=28, n_heads=24),
    "qwen3-0.6b": qwen3(d_model=1024, n_layers=28, n_heads=16, d_ff=3072),
    "qwen3-1.7b": qwen3(d_model=2048, n_layers=28, n_heads=16, d_ff=6144),
    "qwen3-4b": qwen3(d_model=2560, n_layers=36, n_heads=32, d_ff=9728),
    "storyteller": llama_style(2048, 256, 128, 4, 4, d_ff=352),
    "512d-8h-6l": llama_style(4096, 256, 512, 6, 8, d_ff=1408),
    "512d-8h-12l": llama_style(4096, 1024, 512, 12, 8, d_ff=1408),
}


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model has learned; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: GPTConfig, context_length: int) -> int:
    """Floating-point operations to train on one token of a text of ``context_length``, forward and backward.

    Two for each weight of a matrix product forward and four backward. Attention's two products add 12 for each
    number of the queries and each position that they see, on average T / 2 of T, or w - w² / 2T with a window.
    Kaplan et al. 2020, section 2.1.
    """
    if context_length < 1:
        raise ValueError(f"context_length is {context_length}; it must be at least 1.")
    heads = config.head_dim * config.n_heads
    attention = config.d_model * (2 * heads + 2 * config.head_dim * config.n_kv_heads)
    mlp = config.d_model * config.d_ff * (3 if config.mlp == "swiglu" else 2)
    weights = config.n_layers * (attention + mlp) + config.vocab_size * config.d_model
    seen = min(config.window or context_length, context_length)
    return 6 * weights + 6 * config.n_layers * heads * seen * (2 * context_length - seen) // context_length


def kv_cache_bytes(config: GPTConfig, batch_size: int, context_length: int, bytes_per_value: int = 2) -> int:
    """Memory of all layers' keys and values for so many texts of that length, in bytes."""
    kept = min(config.window or context_length, context_length)
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * kept * batch_size * bytes_per_value


def check_sampling(vocab_size: int, temperature: float = 1.0, top_k: int | None = None,
                   top_p: float | None = None, min_p: float | None = None,
                   repetition_penalty: float = 1.0) -> None:
    """``ValueError`` for a dial outside its range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or above, and finite.")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k}; it must be 1 to {vocab_size}, the vocabulary size, or None.")
    for name, value in {"top_p": top_p, "min_p": min_p}.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must be above 0 and at most 1, or None.")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty is {repetition_penalty}; it must be above 0 and finite: 1 "
                         "changes nothing, 1.1 to 1.3 discourages repeating.")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the ``k`` largest logits to -inf: (..., V) -> (..., V). Fan, Lewis and Dauphin 2018."""
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all beyond the smallest set of most likely tokens with probability ``p`` to -inf.

    (..., V) -> (..., V). Holtzman et al. 2020, section 3.1. Sorts the whole vocabulary only if its first
    thousand do not reach ``p``.
    """
    if p == 1:
        return logits
    total = logits.logsumexp(dim=-1, keepdim=True)
    for n in (min(1024, logits.size(-1)), logits.size(-1)):
        best, order = logits.topk(n, dim=-1)
        mass = torch.exp(best - total).cumsum(dim=-1)
        if n == logits.size(-1) or (mass[..., -1] >= p).all():
            break
    before = F.pad(mass[..., :-1], (1, 0))  # the mass of all better tokens; once it is enough, we stop
    kept = best.masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, kept)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Set to -inf the tokens less than ``p`` times as likely as the best one.

    (..., V) -> (..., V). Nguyen et al. 2024, section 3. A ratio of probabilities is a distance of logits.
    """
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -torch.inf)


def keep_likely(logits: Tensor, top_k: int | None = None, top_p: float | None = None,
                min_p: float | None = None) -> Tensor:
    """Apply the given cut-offs one after another: (..., V) -> (..., V), -inf for what is cut off."""
    check_sampling(logits.size(-1), 1.0, top_k, top_p, min_p)
    for keep, bound in ((keep_top_k, top_k), (keep_top_p, top_p), (keep_min_p, min_p)):
        logits = logits if bound is None else keep(logits, bound)
    return logits


def seen_tokens(token_ids: Tensor, vocab_size: int, padding: Tensor | None = None) -> Tensor:
    """Which tokens a text holds: ids (B, T) -> bool (B, V). ``padding`` (B,) ids on the left do not count."""
    if padding is not None:  # read the last id, which is never padding, in place of it
        padded = torch.arange(token_ids.size(1), device=token_ids.device) < padding[:, None]
        token_ids = torch.where(padded, token_ids[:, -1:], token_ids)
    seen = torch.zeros(len(token_ids), vocab_size, dtype=torch.bool, device=token_ids.device)
    return seen.scatter_(1, token_ids, True)


def penalise_repeats(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of the text so far less likely: divide their logits if positive, else multiply.

    logits and ``seen`` (B, V) -> (B, V). Keskar et al. 2019, section 4.1, with the repair for negative
    logits, which dividing would make larger.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def check_logits(logits: Tensor) -> None:
    """``ValueError`` unless the largest logit of each row (B, V) is a finite number."""
    best = logits.amax(dim=-1)  # NaN if any is
    if not best.isfinite().all():
        row = int((~best.isfinite()).nonzero()[0, 0])
        raise ValueError(f"The largest logit of row {row} is {best[row].item()}, so no token can be chosen. "
                         "Look for weights that are not finite: [name for name, p in "
                         "model.named_parameters() if not p.isfinite().all()]. If all are finite, 16-bit "
                         "arithmetic has overflowed: try float32.")


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None, min_p: float | None = None) -> Tensor:
    """Choose one token id a row: logits (B, V) -> (B,). Temperature 0 takes the largest, the dials unseen.

    ``ValueError`` for logits that are not finite; a GPU, which would have to be waited for, is not asked.
    """
    check_sampling(logits.size(-1), temperature, top_k, top_p, min_p)
    if logits.device.type == "cpu":
        check_logits(logits)
    if temperature < 1e-6:  # to divide by less can overflow
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(keep_likely(logits.float() / temperature, top_k, top_p, min_p), dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def chooser(token_ids: Tensor, vocab_size: int, *, repetition_penalty: float = 1.0,
            padding: Tensor | None = None, **dials) -> Callable[[Tensor], Tensor]:
    """A function from logits (B, V) to ids (B,): ``sample`` with its ``dials``, and the repetition penalty.

    The penalty needs a memory: it counts the tokens of the prompt, ids (B, T), and all chosen since.
    """
    check_sampling(vocab_size, repetition_penalty=repetition_penalty)
    choose = partial(sample, **dials)
    if repetition_penalty == 1:
        return choose
    seen = seen_tokens(token_ids, vocab_size, padding)

    def choose_anew(logits: Tensor) -> Tensor:
        chosen = choose(penalise_repeats(logits, seen, repetition_penalty))
        seen.scatter_(1, chosen[:, None], True)
        return chosen

    return choose_anew


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside ``with evaluating(model):`` it computes without dropout; then each part is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


class TextReader:
    """A model and a text that grows: reads what is new and gives the logits for what comes next.

    The first ``padding`` (B,) positions of each row are no text. When the text outgrows the context, its
    older half is forgotten and the rest is read again, from position 0.
    """

    def __init__(self, model: GPT, padding: Tensor | None = None, use_cache: bool = True):
        self.model, self.padding, self.use_cache = model, padding, use_cache
        self.pieces, self.length, self.cache = [], 0, model.new_cache(padding)

    def read(self, token_ids: Tensor) -> Tensor:
        """Ids (B, T) that continue the text -> logits (B, V) for the id after them."""
        self.pieces.append(token_ids)
        self.length += token_ids.size(1)
        if self.length > self.model.config.context_length:
            token_ids = self._forget()
        elif not self.use_cache:
            token_ids, self.cache = torch.cat(self.pieces, dim=1), self.model.new_cache(self.padding)
        states = self.model.hidden_states(token_ids, self.cache)
        return self.model.lm_head(states[:, -1])  # only the last position chooses

    def _forget(self) -> Tensor:
        limit = self.model.config.context_length
        kept = limit - limit // 2
        text = torch.cat(self.pieces, dim=1)[:, -kept:]
        if self.padding is not None:
            self.padding = (self.padding - (self.length - kept)).clamp(min=0)
        self.pieces, self.length, self.cache = [text], kept, self.model.new_cache(self.padding)
        return text


def decode_steps(model: GPT, token_ids: Tensor, max_new_tokens: int, choose: Callable[[Tensor], Tensor],
                 stop_ids: Collection[int] = (), use_cache: bool = True,
                 padding: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the next ids (B,), step by step; ``choose`` maps logits (B, V) to them, without gradients.

    A row that has met a stop id repeats it; all rows stopped ends the loop. The model computes in
    evaluation mode and is left in the mode it was in.
    """
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=token_ids.device)
    finished, last = torch.zeros_like(token_ids[:, 0], dtype=torch.bool), token_ids[:, -1]
    with evaluating(model):
        reader, new = TextReader(model, padding, use_cache), token_ids
        for step in range(max_new_tokens):
            with torch.inference_mode():
                logits = reader.read(new)
                if step == 0:
                    check_logits(logits)
                chosen = choose(logits)
                last = torch.where(finished, last, chosen) if stop_ids else chosen
                new = last[:, None]
            yield last.clone()  # an ordinary tensor: one of inference mode could not be trained on
            if stop_ids:
                finished = finished | (new == stop).any(dim=1)
                if finished.all():
                    return


def check_prompt(config: GPTConfig, token_ids: Tensor, max_new_tokens: int, padding: Tensor | None = None,
                 rolling: bool = False) -> None:
    """``ValueError`` for a prompt (B, T) that cannot be continued by ``max_new_tokens``."""
    if token_ids.numel() == 0:
        raise ValueError(f"The prompt has shape {tuple(token_ids.shape)}; the model takes (B, T), both "
                         "at least 1. An empty prompt leaves nothing to continue: begin with the end-of-text "
                         "token.")
    for part in token_ids.cpu().split(config.context_length, dim=-1) if rolling else (token_ids.cpu(),):
        check_tokens(config, part)
    length, limit = token_ids.size(1), config.context_length
    if max_new_tokens < 0:
        raise ValueError(f"{max_new_tokens} new tokens after {length} of the prompt: ask for 0 or more.")
    if not rolling and length + max_new_tokens > limit:
        raise ValueError(f"{max_new_tokens} new tokens after {length} of the prompt do not fit the context "
                         f"length {limit}: ask for 0 to {limit - length}, shorten the prompt, or pass "
                         "rolling=True to forget the oldest tokens.")
    if padding is not None:
        check_padding(token_ids, padding)


def check_padding(token_ids: Tensor, padding: Tensor) -> None:
    """``ValueError`` unless ``padding`` (B,) leaves at least one id in each row of (B, T)."""
    rows, length = token_ids.shape
    if padding.shape != (rows,) or padding.is_floating_point():
        raise ValueError(f"padding has shape {tuple(padding.shape)} and type {padding.dtype}; it must hold "
                         f"one whole number for each of the {rows} rows, as pad_left returns it.")
    for row, n in enumerate(padding.tolist()):
        if not 0 <= n < length:
            raise ValueError(f"padding is {n} in row {row}; it must be 0 to {length - 1}, so that at "
                             f"least one of the row's {length} ids is text.")


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch, filled up with zeros on the left.

    -> ids (B, T), and how many of each row are filling (B,), the ``padding`` of ``generate``.
    """
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty or not prompts:
        raise ValueError(f"Of {len(prompts)} prompts, those with the numbers {empty} are empty; give at "
                         "least one prompt, and each at least one token, the end-of-text token for instance.")
    length = max(map(len, prompts))
    rows = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    padding = [length - len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(padding, device=device)


def generate_tokens(model: GPT, token_ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
                    top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
                    repetition_penalty: float = 1.0, stop_ids: Collection[int] = (),
                    generator: torch.Generator | None = None, use_cache: bool = True,
                    padding: Tensor | None = None, rolling: bool = False) -> Iterator[Tensor]:
    """``generate``, one step at a time: yields the next ids (B,) until all rows have stopped."""
    check_prompt(model.config, token_ids, max_new_tokens, padding, rolling)
    check_sampling(model.config.vocab_size, temperature, top_k, top_p, min_p, repetition_penalty)
    if padding is not None and not padding.any():
        padding = None
    choose = chooser(token_ids, model.config.vocab_size, repetition_penalty=repetition_penalty,
                     padding=padding, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                     generator=generator)
    return decode_steps(model, token_ids, max_new_tokens, choose, stop_ids, use_cache, padding)


def generate(model: GPT, token_ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             repetition_penalty: float = 1.0, stop_ids: Collection[int] = (),
             generator: torch.Generator | None = None, use_cache: bool = True,
             padding: Tensor | None = None, rolling: bool = False) -> Tensor:
    """Continue token ids (B, T) by at most ``max_new_tokens``: (B, T + new).

    Temperature 0 is greedy. The same ``generator`` state, on the model's device, gives the same text. A row
    that has met one of ``stop_ids`` repeats it. ``padding`` (B,) ids on the left of each row are no text
    (``pad_left``). ``rolling`` lets the text outgrow the context: whenever it is full, the older half is
    forgotten. ``ValueError`` for what does not fit the model.
    """
    steps = generate_tokens(
        model, token_ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop_ids=stop_ids, generator=generator, use_cache=use_cache,
        padding=padding, rolling=rolling)
    return torch.cat([token_ids, *(step[:, None] for step in steps)], dim=1)


def beam_search(model: GPT, token_ids: Tensor, max_new_tokens: int, n_beams: int = 4,
                length_penalty: float = 1.0, stop_ids: Collection[int] = ()) -> Tensor:
    """The likeliest continuation that is found with ``n_beams`` texts at a time: (1, T) -> (1, T + new).

    A text's score is its log-probability divided by (new tokens) ** ``length_penalty``: 0 compares the sums,
    which favours short texts, 1 the means. Sutskever et al. 2014, section 3.2; Wu et al. 2016, section 7.
    """
    check_prompt(model.config, token_ids, max_new_tokens)
    if len(token_ids) != 1 or n_beams < 1:
        raise ValueError(f"{len(token_ids)} prompts and n_beams {n_beams}: beam search continues one prompt, "
                         "ids of shape (1, T), with at least 1 beam.")
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=token_ids.device)
    text, scores, best, best_score = token_ids, torch.zeros(1, device=token_ids.device), token_ids, -math.inf
    with evaluating(model), torch.inference_mode():
        cache, new = model.new_cache(), token_ids
        for n in range(1, max_new_tokens + 1):
            logits = model.lm_head(model.hidden_states(new, cache)[:, -1])  # (beams, V)
            check_logits(logits)
            totals = (scores[:, None] + torch.log_softmax(logits.float(), dim=-1)).flatten()
            top = totals.topk(min((1 + len(stop)) * n_beams, len(totals)))  # so that n_beams do not stop
            beam, new = top.indices // logits.size(1), top.indices % logits.size(1)
            text = torch.cat([text[beam], new[:, None]], dim=1)
            ended = torch.isin(new, stop) | (n == max_new_tokens)
            score = torch.where(ended, top.values / n**length_penalty, -torch.inf)[:n_beams].max(dim=0)
            if score.values > best_score:
                best, best_score = text[score.indices][None], score.values.item()
            going = (~ended).nonzero()[:n_beams, 0]
            longest = max_new_tokens if length_penalty > 0 else n + 1  # what would suit the leader best
            if len(going) == 0 or best_score >= top.values[going[0]] / longest**length_penalty:
                break
            text, scores, new = text[going], top.values[going], new[going, None]
            for layer in cache:
                layer.select(beam[going])
    return best.clone()  # an ordinary tensor
