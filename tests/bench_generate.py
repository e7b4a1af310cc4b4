"""Chapter 4 against its peers: writing token by token, one text and many, and the wait for the first token."""

import torch

from ch04_gpt.fast_generation import FusedDecoder, prepare_for_decoding, quantize_int8
from ch04_gpt.gpt import GPT, PRESETS, GPTConfig, flops_per_token, generate, llama_style
from tests.bench_limits import limit
from tests.bench_peers import book, book_llama, smollm2, transformers_llama, transformers_smollm2
from utils.bench import COURSE, Aim, Growth, Row

SMALL = llama_style(1024, 256, 256, 4, 4, d_ff=688)
LONG = llama_style(1024, 1100, 256, 4, 4, d_ff=688)
SMOLLM2 = PRESETS["smollm2-135m"]
PROMPT = 16
INT8 = f"{COURSE}, int8 weights"
MODULES = f"{COURSE}, module by module"


def rows(quick: bool = False) -> list[Row | Growth]:
    """What ``course.py bench generate`` measures; with ``quick``, the same with fewer tokens."""
    small, real, prompt = (8, 2, 60) if quick else (200, 48, 1900)
    lengths, uncached = ([8, 16], [8, 16]) if quick else ([128, 256, 512, 1024], [64, 128, 256, 512])
    return [
        *(small_row(batch, small) for batch in (1, 16)),
        Row(f"Write {real} tokens, one text, SmolLM2-135M", __name__,
            {COURSE: "smollm2_ours", f"{COURSE}, weights as published": "smollm2_plain", INT8: "smollm2_int8",
             "transformers": "smollm2_transformers"}, real, real, "tokens",
            [Aim("times", 1.5), Aim("times", 3.0, INT8)],
            {"reading the weights, float32": limit("read_memory", (size_of(SMOLLM2), real * size_of(SMOLLM2)))}),
        Row(f"First token after a prompt of {prompt:,}, SmolLM2-135M", __name__,
            {COURSE: "first_ours", "transformers": "first_transformers"}, prompt, prompt, "tokens", [Aim("times", 1.0)],
            {"matrix products alone, float32": limit("multiply_float32", prompt_flops(prompt))}, rounds=3),
        Growth("Writing with a cache, by the number of tokens", __name__, {"with a cache": "write_cached"}, lengths,
               "tokens", {"with a cache": 1.0}),
        Growth("Writing without a cache, by the number of tokens", __name__, {"without": "write_uncached"}, uncached,
               "tokens", {"without": 2.0}),
    ]


def small_row(batch: int, n: int) -> Row:
    texts = "one text" if batch == 1 else f"{batch} texts at once"
    return Row(f"Write {n} tokens, {texts}, a Llama of 4 layers, width 256", __name__,
               {COURSE: "small_ours", MODULES: "small_plain", "transformers": "small_transformers",
                "llms-from-scratch": "small_book"},
               (batch, n), batch * n, "tokens", [Aim("times", 2.0)],
               {"reading the weights, float32": limit("read_memory", (size_of(SMALL), n * size_of(SMALL)))})


def size_of(config: GPTConfig) -> int:
    """Bytes of a model's parameters in float32."""
    with torch.device("meta"):
        return 4 * sum(parameter.numel() for parameter in GPT(config).parameters())


def prompt_flops(n: int) -> float:
    """Operations of reading ``n`` tokens: forward only, and the head for the last of them alone."""
    head = 2 * SMOLLM2.vocab_size * SMOLLM2.d_model
    return n * (flops_per_token(SMOLLM2, n) / 3 - head) + head


def prompt(config: GPTConfig, n: int = PROMPT, batch: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, n), generator=torch.Generator().manual_seed(0))


def write(model: GPT, n: int, ids: torch.Tensor):
    return lambda: generate(model, ids, n, temperature=0)


def write_with_transformers(model, n: int, ids: torch.Tensor):
    model.eval()
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                  do_sample=False, pad_token_id=0)


# ---------------------------------------------------------------- a small model


def small_ours(argument):
    batch, n = argument
    return write(FusedDecoder(prepare_for_decoding(GPT(SMALL))), n, prompt(SMALL, batch=batch))


def small_plain(argument):
    batch, n = argument
    return write(prepare_for_decoding(GPT(SMALL)), n, prompt(SMALL, batch=batch))


def small_transformers(argument):
    batch, n = argument
    return write_with_transformers(transformers_llama(SMALL), n, prompt(SMALL, batch=batch))


def small_book(argument):
    batch, n = argument
    model, loop = book_llama(SMALL).eval(), book("kv_cache.generate").generate_text_simple
    return lambda: loop(model, prompt(SMALL, batch=batch), n)


# ---------------------------------------------------------------- SmolLM2


def smollm2_ours(n):
    return write(prepare_for_decoding(smollm2()), n, prompt(SMOLLM2))


def smollm2_plain(n):
    return write(smollm2(), n, prompt(SMOLLM2))


def smollm2_int8(n):
    return write(quantize_int8(smollm2()), n, prompt(SMOLLM2))


def smollm2_transformers(n):
    return write_with_transformers(transformers_smollm2(), n, prompt(SMOLLM2))


def first_ours(n):
    return write(smollm2(), 1, prompt(SMOLLM2, n))


def first_transformers(n):
    return write_with_transformers(transformers_smollm2(), 1, prompt(SMOLLM2, n))


# ---------------------------------------------------------------- growth


def write_cached(n):
    model, ids = prepare_for_decoding(GPT(LONG)), prompt(LONG)
    generate(model, ids, 8, temperature=0)
    return lambda: generate(model, ids, round(n), temperature=0)


def write_uncached(n):
    model, ids = GPT(LONG), prompt(LONG)
    generate(model, ids, 8, temperature=0, use_cache=False)
    return lambda: generate(model, ids, round(n), temperature=0, use_cache=False)
