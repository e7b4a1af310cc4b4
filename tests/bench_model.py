"""Chapters 3 and 4 against their peers: a training step, and writing token by token.

The peers are ``transformers`` and the code of "Build a Large Language Model (From Scratch)", which is read
from its wheel without installing it: its requirements pin another numpy and TensorFlow.
"""

import importlib
import sys
from functools import partial

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ch04_gpt.fast_generation import lay_out_for_decoding, quantize_int8
from ch04_gpt.gpt import GPT, PRESETS, GPTConfig, flops_per_token, generate, llama_style
from utils.bench import COURSE, MACHINE, Row
from utils.downloads import fetch
from utils.workspace import workspace

BATCH, CONTEXT, WIDTH, LAYERS, HEADS, VOCAB = 4, 256, 256, 4, 4, 1024
GPT2 = GPTConfig(VOCAB, CONTEXT, WIDTH, LAYERS, HEADS)
LLAMA = llama_style(VOCAB, CONTEXT, WIDTH, LAYERS, HEADS, d_ff=688)
PROMPT = 16
logging.disable_progress_bar()


def rows(quick: bool = False) -> list[Row]:
    """What ``course.py bench model`` measures; with ``quick``, the same with fewer steps and tokens."""
    steps, small, real = (1, 8, 2) if quick else (4, 200, 48)
    here, trained = __name__, steps * BATCH * CONTEXT
    work = f"Training step, {BATCH} x {CONTEXT} tokens, {LAYERS} layers, width {WIDTH}, float32"
    gigaflops = {config.norm: flops_per_token(config, CONTEXT) * trained / 1e9 for config in (GPT2, LLAMA)}
    return [
        Row(f"{work}, GPT-2's parts", here,
            {COURSE: "train_ours_gpt2", "transformers": "train_transformers_gpt2",
             "llms-from-scratch": "train_book_gpt2", f"{MACHINE}, matrix products alone": "multiply_gpt2"},
            steps, gigaflops["layernorm"], "GFLOP", aim=1.5),
        Row(f"{work}, Llama's parts", here,
            {COURSE: "train_ours_llama", "transformers": "train_transformers_llama",
             "llms-from-scratch": "train_book_llama", f"{MACHINE}, matrix products alone": "multiply_llama"},
            steps, gigaflops["rmsnorm"], "GFLOP", aim=1.5),
        Row(f"Write {small} tokens, one text, that small Llama, with a cache", here,
            {COURSE: "write_ours", "transformers": "write_transformers", "llms-from-scratch": "write_book"},
            small, small, "tokens", aim=2.0),
        Row(f"Write {real} tokens, one text, SmolLM2-135M", here,
            {COURSE: "write_smollm2_ours", f"{COURSE}, weights as published": "write_smollm2_plain",
             f"{COURSE}, int8 weights": "write_smollm2_int8",
             "transformers": "write_smollm2_transformers", f"{MACHINE}, reading the weights": "read_smollm2"},
            real, real, "tokens", aim=1.5),
    ]


def book(module: str):
    """A module of the book's package, from its wheel."""
    wheel = str(fetch("llms-from-scratch"))
    if wheel not in sys.path:
        sys.path.append(wheel)
    return importlib.import_module(f"llms_from_scratch.{module}")


def book_llama(config: GPTConfig):
    """The book's Llama with a key-value cache, in these sizes (its head is not tied: the same products)."""
    return book("kv_cache.llama3").Llama3Model(
        {"vocab_size": config.vocab_size, "context_length": config.context_length, "emb_dim": config.d_model,
         "n_heads": config.n_heads, "n_layers": config.n_layers, "hidden_dim": config.d_ff,
         "n_kv_groups": config.n_kv_heads, "rope_base": config.rope_theta, "dtype": torch.float32, "rope_freq": None})


def transformers_llama(config: GPTConfig) -> LlamaForCausalLM:
    """The library's Llama in these sizes."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.context_length, hidden_size=config.d_model,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, intermediate_size=config.d_ff, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None))


# ---------------------------------------------------------------- training


def train(model, logits, steps: int):
    """Forward, loss, backward, clipping and AdamW: everybody with PyTorch's own, fused."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    model.train()

    def run():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return run


def train_ours(config, steps):
    model = GPT(config)
    return train(model, model, steps)


def train_transformers_gpt2(steps):
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
    return train(model, lambda ids: model(ids, use_cache=False).logits, steps)


def train_transformers_llama(steps):
    model = transformers_llama(LLAMA)
    return train(model, lambda ids: model(ids, use_cache=False).logits, steps)


def train_book_gpt2(steps):
    model = book("ch04").GPTModel({"vocab_size": VOCAB, "context_length": CONTEXT, "emb_dim": WIDTH,
                                   "n_heads": HEADS, "n_layers": LAYERS, "drop_rate": 0.0, "qkv_bias": True})
    return train(model, model, steps)


def train_book_llama(steps):
    model = book_llama(LLAMA)
    return train(model, model, steps)


def multiply(config, steps):
    """As many operations as the training steps hold, in square matrix products."""
    side = 1024
    left, right = torch.randn(2, side, side)
    products = round(steps * BATCH * CONTEXT * flops_per_token(config, CONTEXT) / (2 * side**3))

    def run():
        for _ in range(products):
            torch.mm(left, right)
    return run


train_ours_gpt2, train_ours_llama = partial(train_ours, GPT2), partial(train_ours, LLAMA)
multiply_gpt2, multiply_llama = partial(multiply, GPT2), partial(multiply, LLAMA)


# ---------------------------------------------------------------- writing


def prompt(config):
    return torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def write(model, n):
    ids = prompt(model.config)
    return lambda: generate(model, ids, n, temperature=0)


def with_transformers(model, ids, n):
    model.eval()
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                  do_sample=False, pad_token_id=0)


def write_ours(n):
    return write(lay_out_for_decoding(GPT(LLAMA)), n)


def write_transformers(n):
    return with_transformers(transformers_llama(LLAMA), prompt(LLAMA), n)


def write_book(n):
    model, loop = book_llama(LLAMA), book("kv_cache.generate").generate_text_simple
    return lambda: loop(model, prompt(LLAMA), n)


def smollm2():
    return GPT.from_pretrained("smollm2-135m")


def write_smollm2_ours(n):
    return write(lay_out_for_decoding(smollm2()), n)


def write_smollm2_plain(n):
    return write(smollm2(), n)


def write_smollm2_int8(n):
    return write(quantize_int8(smollm2()), n)


def write_smollm2_transformers(n):
    """The same weights, through a folder in the library's own layout."""
    folder = workspace("bench") / "smollm2-135m"
    if not (folder / "config.json").exists():
        smollm2().save_pretrained(folder)
    return with_transformers(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
                             prompt(PRESETS["smollm2-135m"]), n)


def read_smollm2(n):
    """Read as many bytes as the weights have, once a token: the least that writing one text can do."""
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in GPT(PRESETS["smollm2-135m"]).parameters())
    weights = torch.ones(size)

    def run():
        for _ in range(n):
            weights.sum()
    return run
