"""Chapters 3 and 4 part by part, against the same parts of ``torch.nn``, and loading weights."""

from functools import partial

import torch
from torch import nn

from ch03_attention.attention import MultiHeadAttention
from ch04_gpt.gpt import GPT, GPTConfig, LayerNorm, RMSNorm, TransformerBlock
from tests.bench_limits import limit
from tests.bench_peers import smollm2_folder, transformers_smollm2
from utils.bench import COURSE, Row

BATCH, WIDTH, HEADS = 4, 512, 8


def rows(quick: bool = False) -> list[Row]:
    """What ``course.py bench model`` measures; with ``quick``, the same on shorter texts."""
    length, times = (32, 2) if quick else (512, 10)
    tokens = BATCH * length * times
    size = f"{BATCH} x {length} x {WIDTH}, {times} times forward and backward"
    causal = 6 * 2 * WIDTH * length / 2  # scores and sums, of which causal attention needs half
    here, argument, memory = __name__, (length, times), 4.0 * tokens * WIDTH

    def products(weights):
        flops = tokens * (6 * weights * WIDTH**2 + causal)
        return {"matrix products alone, float32": limit("multiply_float32", flops)}
    return [
        Row(f"Causal self-attention, {size}", here,
            {COURSE: "attention_ours", "torch.nn.MultiheadAttention": "attention_torch"}, argument, tokens, "tokens",
            (), products(4)),
        Row(f"Transformer block, {size}", here,
            {COURSE: "block_ours", "torch.nn.TransformerEncoderLayer": "block_torch"}, argument, tokens, "tokens",
            (), products(12)),
        *(Row(f"{name}, {size}", here, {COURSE: f"{kind}_ours", f"torch.nn.{name}": f"{kind}_torch"}, argument, tokens,
              "tokens", (), {"reading and writing twice as much": limit("read_memory", (memory / times, 4 * memory))})
          for name, kind in (("LayerNorm", "layer_norm"), ("RMSNorm", "rms_norm"))),
        Row("Load SmolLM2-135M from a folder in the Hugging Face layout", here,
            {COURSE: "load_ours", "transformers": "load_transformers"}, None, 538, "MB", (),
            {"reading that file from disk": limit("read_disk", 538e6 / (20 if quick else 1))}, rounds=3),
    ]


def passes(module: nn.Module, call, argument):
    """``times`` passes forward and backward, with gradients for the input and for the weights."""
    length, times = argument
    torch.manual_seed(0)
    x = torch.randn(BATCH, length, WIDTH, requires_grad=True)

    def run():
        for _ in range(times):
            call(module, x).sum().backward()
            x.grad = None
            module.zero_grad(set_to_none=True)
    return run


def simple(build, argument):
    return passes(build(), lambda module, x: module(x), argument)


def causal(length: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def attention_torch(argument):
    mask = causal(argument[0])
    return passes(nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True),
                  lambda module, x: module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], argument)


def block_torch(argument):
    mask = causal(argument[0])
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation=nn.GELU("tanh"),
                                       batch_first=True, norm_first=True)
    return passes(layer, lambda module, x: module(x, src_mask=mask, is_causal=True), argument)


attention_ours = partial(simple, lambda: MultiHeadAttention(WIDTH, HEADS))
block_ours = partial(simple, lambda: TransformerBlock(GPTConfig(1024, 512, WIDTH, 1, HEADS, bias=True)))
layer_norm_ours, layer_norm_torch, rms_norm_ours, rms_norm_torch = (
    partial(simple, lambda kind=kind: kind(WIDTH)) for kind in (LayerNorm, nn.LayerNorm, RMSNorm, nn.RMSNorm))


def load_ours(_):
    folder = smollm2_folder()
    return lambda: GPT.from_pretrained(folder)


def load_transformers(_):
    return transformers_smollm2
