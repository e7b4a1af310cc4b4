"""Chapters 4 and 5 against their peers: a training step, and the time until a held-out loss is reached."""

from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

from ch04_gpt.gpt import GPT, PRESETS, GPTConfig, flops_per_token, llama_style
from ch05_pretrain.speed_run import FAST, NANOGPT, TimedRun, held_out_loss, read_speed_record, shakespeare_characters
from tests.bench_limits import limit
from tests.bench_peers import book_gpt2, book_llama, transformers_gpt2, transformers_llama
from utils.bench import COURSE, Aim, Row

GPT2 = GPTConfig(vocab_size=1024, context_length=256, d_model=256, n_layers=4, n_heads=4)
LLAMA = llama_style(1024, 256, 256, 4, 4, d_ff=688)
LARGER = PRESETS["512d-8h-6l"]
PRODUCTS = "matrix products alone, float32"


def rows(quick: bool = False) -> list[Row]:
    """What ``course.py bench train`` measures; with ``quick``, one small step, and a few of the long run's."""
    steps, batch = (1, 1) if quick else (4, 4)
    return [
        step_row("GPT-2's parts", GPT2, batch, steps, "gpt2", [Aim("times", 1.5), Aim("share", 0.75)]),
        step_row("Llama's parts", LLAMA, batch, steps, "llama", [Aim("times", 1.5), Aim("share", 0.75)]),
        step_row("Llama's parts", LARGER, 1 if quick else 32, 1, "larger", [Aim("times", 1.3)],
                 rounds=3, warm_up=False),
        Row("Character-level Shakespeare to the held-out loss of nanoGPT's recipe", __name__,
            {COURSE: "reach_ours", "nanoGPT's recipe for a CPU": "reach_nanogpt"}, 0.01 if quick else 1.0, 1, "run",
            [] if quick else [Aim("times", 10.0)],
            {PRODUCTS: limit("multiply_float32", (0.01 if quick else 1) * run_flops())}, rounds=3, warm_up=False),
    ]


def step_row(parts, config, batch, steps, kind, aims, **options) -> Row:
    flops = flops_per_token(config, config.context_length) * steps * batch * config.context_length
    functions = {COURSE: f"train_ours_{kind}", "transformers": f"train_transformers_{kind}",
                 "llms-from-scratch": f"train_book_{kind}"}
    return Row(f"Training step, {batch} x {config.context_length} tokens, {config.n_layers} layers, width "
               f"{config.d_model}, {parts}, float32", __name__, functions, (batch, steps), flops / 1e9, "GFLOP", aims,
               {PRODUCTS: limit("multiply_float32", flops)}, **options)


def train(model, logits, config: GPTConfig, argument: tuple[int, int]):
    """Forward, loss, backward, clipping and AdamW: everybody with PyTorch's own, fused."""
    batch, steps = argument
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(config.vocab_size, (batch, config.context_length + 1),
                        generator=torch.Generator().manual_seed(0))
    model.train()

    def run(rows=slice(None), count=steps):
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits(ids[rows, :-1]).flatten(0, 1), ids[rows, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    run(slice(1), 1)  # wakes the libraries, also where no round is spent on that
    return run


def train_with(build, config: GPTConfig, argument, **options):
    model = build(config)
    return train(model, model, config, argument)


def train_transformers(build, config: GPTConfig, argument):
    model = build(config)
    return train(model, lambda ids: model(ids, use_cache=False).logits, config, argument)


train_ours_gpt2, train_ours_llama, train_ours_larger = (
    partial(train_with, GPT, config) for config in (GPT2, LLAMA, LARGER))
train_book_gpt2, train_book_llama, train_book_larger = (
    partial(train_with, build, config) for build, config in
    ((book_gpt2, GPT2), (book_llama, LLAMA), (book_llama, LARGER)))
train_transformers_gpt2, train_transformers_llama, train_transformers_larger = (
    partial(train_transformers, build, config) for build, config in
    ((transformers_gpt2, GPT2), (transformers_llama, LLAMA), (transformers_llama, LARGER)))


# ---------------------------------------------------------------- time to a loss

SHORTER = replace(FAST, steps=330)  # the fast recipe of chapter 5 ends below the other's loss; this one at it


def run_flops() -> float:
    """Operations of the course's recipe, without those of its optimizer."""
    config = GPTConfig(100, SHORTER.context_length, SHORTER.d_model, SHORTER.n_layers, SHORTER.n_heads)
    return flops_per_token(config, SHORTER.context_length) * SHORTER.tokens


def reach(recipe, share: float):
    """Carry out ``share`` of a recipe. A whole one must end at the loss of nanoGPT's, as chapter 5 recorded it."""
    text, runs = shakespeare_characters(), []
    target = read_speed_record()["runs"]["baseline, seed 0"]["loss"]

    def run():
        runs.append(TimedRun(recipe, text))
        for _ in range(max(1, round(share * recipe.steps))):
            runs[-1].step()

    def check():
        loss = held_out_loss(runs[-1].model, text)
        if share == 1 and loss > target + 0.02:
            raise ValueError(f"the held-out loss is {loss:.3f}; the run is only worth its time below {target:.3f}.")
    run.check = check
    TimedRun(recipe, text).step()
    return run


reach_ours, reach_nanogpt = partial(reach, SHORTER), partial(reach, NANOGPT)
