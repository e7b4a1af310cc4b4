"""Deep dive: What does a model cost before anyone builds it?.

Written from ch04_gpt/memory_and_compute.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "parameter_counts",
    "GPT3",
    "forward_flops",
    "TRAINING_BYTES",
    "INFERENCE_BYTES",
    "check_run",
    "activation_bytes",
    "training_memory",
    "inference_memory",
    "decoding_bound",
]

from ch04_gpt.gpt import GPTConfig, flops_per_token, kv_cache_bytes


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """How many parameters each part of a GPT has, from its configuration alone."""
    d_model, d_ff, n_layers = config.d_model, config.d_ff, config.n_layers
    heads = config.n_heads * config.head_dim
    outputs = heads + 2 * config.n_kv_heads * config.head_dim  # of w_qkv
    widening = 2 if config.mlp == "swiglu" else 1
    attention = d_model * outputs + heads * d_model + config.bias * (outputs + d_model)
    mlp = (widening + 1) * d_model * d_ff + config.bias * (widening * d_ff + d_model)
    norm = d_model * (2 if config.norm == "layernorm" and config.bias else 1)
    table = config.vocab_size * d_model
    return {
        "token embedding": table,
        "position embedding": config.context_length * d_model if config.position == "learned" else 0,
        "attention": n_layers * attention,
        "MLP": n_layers * mlp,
        "norms": (2 * n_layers + 1) * norm + config.qk_norm * n_layers * 2 * config.head_dim,
        "output head": 0 if config.tie_embeddings else table,
    }


GPT3 = GPTConfig(50_257, context_length=2048, d_model=12_288, n_layers=96, n_heads=96)


def forward_flops(config: GPTConfig, n_tokens: int, n_past: int = 0) -> int:
    """Floating-point operations of the matrix products in one forward pass over ``n_tokens`` of one text.

    ``n_past`` positions come before them in a cache. Attention counts only what the causal mask (and the
    window) lets through. Norms, activations and softmax are left out. ``ValueError`` below 1 token.
    """
    if n_tokens < 1 or n_past < 0:
        raise ValueError(f"n_tokens is {n_tokens} and n_past {n_past}; they must be at least 1 and 0.")
    heads = config.n_heads * config.head_dim
    weights = flops_per_token(config, 1) // 6 - config.n_layers * heads  # without attention's products
    window = config.window or n_past + n_tokens
    short = max(0, min(window - n_past, n_tokens))  # queries that see everything before them, and themselves
    seen = short * n_past + short * (short + 1) // 2 + (n_tokens - short) * window
    return 2 * n_tokens * weights + 4 * config.n_layers * heads * seen


TRAINING_BYTES = {  # precision: bytes a parameter of (weights, gradients, optimizer), bytes an activation
    "float32": ((4, 4, 8), 4),
    "bfloat16": ((2, 2, 12), 2),  # the optimizer keeps the two moments and a float32 copy of the weights
}
INFERENCE_BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 2)}  # a weight, a number in the cache


def check_run(config: GPTConfig, batch_size: int, context_length: int, precision: str, known: dict) -> None:
    """``ValueError`` unless sizes are at least 1 and the context and the precision exist."""
    if batch_size < 1 or context_length < 1:
        raise ValueError(f"batch_size is {batch_size} and context_length {context_length}: both must be 1 or "
                         "more.")
    if config.position == "learned" and context_length > config.context_length:
        raise ValueError(f"This model has learned {config.context_length} positions; a context of "
                         f"{context_length} needs a config with a larger context_length.")
    if precision not in known:
        raise ValueError(f"precision is {precision!r}; here it must be one of {', '.join(known)}.")


def activation_bytes(config: GPTConfig, batch_size: int, context_length: int, precision: str = "float32",
                     checkpointing: bool = False) -> int:
    """Memory that a forward pass keeps for the backward pass, in bytes, with fused attention and no dropout.

    A window shorter than the context needs a mask, which each layer keeps as numbers. ``checkpointing`` keeps
    only the input of each layer and computes one layer at a time again (Chen et al. 2016). The
    log-probabilities are float32 in any precision.
    """
    check_run(config, batch_size, context_length, precision, TRAINING_BYTES)
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = 2 * queries + 2 * keys + (queries + keys if config.position == "rope" else 0)
    mlp = config.d_ff * (4 if config.mlp == "swiglu" else 2)
    layer = 4 * config.d_model + attention + mlp + (2 * queries + keys if config.qk_norm else 0)
    layers = config.n_layers * config.d_model + layer if checkpointing else config.n_layers * layer
    size, windowed = TRAINING_BYTES[precision][1], (config.window or context_length) < context_length
    a_token = size * (layers + 2 * config.d_model) + 4 * config.vocab_size
    masks = windowed * size * context_length**2 * (1 if checkpointing else config.n_layers)
    return batch_size * context_length * a_token + masks


def training_memory(config: GPTConfig, batch_size: int, context_length: int, precision: str = "float32",
                    checkpointing: bool = False) -> dict[str, int]:
    """Bytes of one training step with AdamW: weights, gradients, optimizer, activations.

    ``precision`` "bfloat16" is mixed precision as Rajbhandari et al. 2020, section 3.1, count it: 2 + 2 bytes
    a parameter in the model, 12 in the optimizer. The library's workspace and fragmentation come on top.
    """
    check_run(config, batch_size, context_length, precision, TRAINING_BYTES)
    n_parameters = sum(parameter_counts(config).values())
    weights, gradients, optimizer = (n_parameters * size for size in TRAINING_BYTES[precision][0])
    activations = activation_bytes(config, batch_size, context_length, precision, checkpointing)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations}


def inference_memory(config: GPTConfig, batch_size: int, context_length: int,
                     precision: str = "bfloat16") -> dict[str, int]:
    """Bytes to write ``batch_size`` texts of up to ``context_length`` tokens at once: weights and cache.

    "int8" means weights of one byte with a cache of two. ``ValueError`` as in ``check_run``.
    """
    check_run(config, batch_size, context_length, precision, INFERENCE_BYTES)
    weight, cached = INFERENCE_BYTES[precision]
    return {"weights": weight * sum(parameter_counts(config).values()),
            "cache": kv_cache_bytes(config, batch_size, context_length, cached)}


def decoding_bound(config: GPTConfig, batch_size: int, context_length: int, bandwidth: float, rate: float,
                   precision: str = "bfloat16") -> float:
    """The most tokens a second, over all texts, that a machine can write at a given length of the texts.

    ``bandwidth`` in bytes a second, ``rate`` in operations a second: a step reads weights and cache once and
    computes one token for each text; the slower of the two decides. Pope et al. 2022, section 2.1.
    """
    if bandwidth <= 0 or rate <= 0:
        raise ValueError(f"bandwidth is {bandwidth} and rate {rate}: both must be above 0.")
    reading = sum(inference_memory(config, batch_size, context_length, precision).values()) / bandwidth
    computing = batch_size * forward_flops(config, 1, n_past=context_length - 1) / rate
    return batch_size / max(reading, computing)
