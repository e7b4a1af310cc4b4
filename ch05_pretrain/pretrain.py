"""Chapter 5: Pretraining.

Written from ch05_pretrain/pretrain.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "cross_entropy",
    "Evaluation",
    "measures",
    "NGramModel",
    "estimate_discount",
    "KneserNey",
    "compressed_bits_per_byte",
    "SGD",
    "AdamW",
    "orthogonalize",
    "sharded_like",
    "Muon",
    "tallness",
    "step_apart",
    "parameter_groups",
    "cosine_schedule",
    "wsd_schedule",
    "clip_grad_norm",
    "TrainConfig",
    "POSITIVE",
    "NOT_NEGATIVE",
    "TRAIN_CHOICES",
    "check_train_config",
    "is_a",
    "History",
    "TokenLoader",
    "as_shards",
    "windows_in",
    "shuffled_windows",
    "fingerprint",
    "check_vocabulary",
    "check_loader",
    "check_training",
    "evaluate",
    "sync",
    "finish_folder",
    "whole_folder",
    "checkpoints",
    "best_checkpoint",
    "remove_old_checkpoints",
    "random_states",
    "set_random_states",
    "CHECKPOINT_FORMAT",
    "checkpoint_record",
    "save_checkpoint",
    "FREE_TO_CHANGE",
    "differences",
    "check_record",
    "readable",
    "read_checkpoint",
    "load_optimizer",
    "load_checkpoint",
    "learning_rate",
    "make_optimizer",
    "autocast",
    "all_finite",
    "LossScaler",
    "StepEngine",
    "OneProcess",
    "first_bad_module",
    "train_step",
    "Log",
    "log_averages",
    "replay",
    "log_step",
    "Run",
    "train",
    "STORYTELLER_RUN",
    "continue_text",
    "save_finished",
    "pretrain_storyteller",
    "FINISHED",
    "load_storyteller",
]

import dataclasses
import gzip
import hashlib
import json
import lzma
import math
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .previous_chapters import PRESETS, GPT, BPETokenizer, file_sha256, from_keys, generate, prepare_tokens
from utils.progress import progress
from utils.workspace import ROOT, explain_disk_error, short_path, workspace, write_text


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Surprise of the right tokens in nats: their mean, or their sum.

    logits (..., V), targets int64 (...) -> scalar. ``ValueError`` if the shapes do not go together, or if
    ``reduction`` is neither "mean" nor "sum".
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, "
                         f"not {tuple(targets.shape)}: one right token for each position.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}; it must be "mean" or "sum".')
    log_probabilities = torch.log_softmax(logits, dim=-1)  # the logits less their log-sum-exp
    surprise = -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return surprise.mean() if reduction == "mean" else surprise.sum()


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text: mean surprise in nats per token, and the same in other units."""

    loss: float
    perplexity: float
    bits_per_byte: float | None


def measures(loss: float, n_tokens: int, n_bytes: int | None) -> Evaluation:
    """A loss in nats per token of a text with ``n_tokens`` tokens and ``n_bytes`` UTF-8 bytes, in all units."""
    bits_per_byte = loss / math.log(2) * n_tokens / n_bytes if n_bytes else None
    return Evaluation(loss, math.exp(min(loss, 700.0)), bits_per_byte)


class NGramModel:
    """A table of counts with interpolated absolute discounting. Ney, Essen and Kneser 1994, section 4.

    ``order`` 1 looks at no context (unigram), 3 at two tokens (trigram); below the unigram lies the
    uniform distribution, so that every token has a probability. ``discount`` from 0 to 1 is taken from
    every count; None estimates it for each length of context from the counts of one and two.
    """

    def __init__(self, tokens: Sequence[int], order: int, vocab_size: int, discount: float | None = 0.75):
        if order < 1 or len(tokens) < order:
            raise ValueError(f"order is {order} with {len(tokens)} tokens; it must be from 1 to the number of tokens.")
        if discount is not None and not 0 < discount <= 1:
            raise ValueError(f"discount is {discount}; it must be above 0 and at most 1, or None to estimate it.")
        self.order, self.vocab_size = order, vocab_size
        self.counts = self.count([int(t) for t in tokens])
        self.discounts = [estimate_discount(grams) if discount is None else discount for grams in self.counts]
        self.followed, self.different = defaultdict(int), defaultdict(int)
        for grams in self.counts:
            for gram, count in grams.items():
                context = gram[:-1]
                self.followed[context] += count
                self.different[context] += 1

    def count(self, tokens: list[int]) -> list[Counter]:
        """How often each run of 1, 2, ... ``order`` tokens occurs."""
        return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, self.order + 1)]

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        """The probability of ``token`` after ``context`` (at most order - 1 tokens)."""
        below = self.probability(token, context[1:]) if context else 1.0 / self.vocab_size
        total, discount = self.followed.get(context, 0), self.discounts[len(context)]
        if not total:
            return below
        seen = max(self.counts[len(context)].get((*context, token), 0) - discount, 0.0)
        return (seen + discount * self.different[context] * below) / total

    def loss(self, tokens: Sequence[int]) -> float:
        """Mean surprise of a text in nats per token."""
        tokens = [int(t) for t in tokens]
        contexts = (tuple(tokens[max(0, i - self.order + 1) : i]) for i in range(len(tokens)))
        return -sum(math.log(self.probability(t, c)) for t, c in zip(tokens, contexts, strict=True)) / len(tokens)


def estimate_discount(grams: Counter) -> float:
    """The share that single sightings deserve to lose. Ney, Essen and Kneser 1994; 0.75 if there is too little."""
    ones, twos = (sum(count == n for count in grams.values()) for n in (1, 2))
    return ones / (ones + 2 * twos) if ones and twos else 0.75


class KneserNey(NGramModel):
    """Interpolated Kneser-Ney: below the longest context, a run of tokens counts once for each different token
    seen in front of it. Kneser and Ney 1995; in this form Chen and Goodman 1999, section 2.7.
    """

    def __init__(self, tokens: Sequence[int], order: int, vocab_size: int, discount: float | None = None):
        super().__init__(tokens, order, vocab_size, discount)

    def count(self, tokens: list[int]) -> list[Counter]:
        """Continuation counts for runs shorter than ``order``, occurrences for the longest."""
        occurrences = super().count(tokens)
        return [*(Counter(gram[1:] for gram in longer) for longer in occurrences[1:]), occurrences[-1]]


def compressed_bits_per_byte(train_text: str, text: str, name: str) -> float:
    """What a compressor needs for ``text`` once it has read ``train_text`` ("" for none), in bits per byte.

    name: "gzip", which remembers only the last 32 KiB, or "xz", here with a memory as long as all of the text.
    The difference of two compressed sizes, as in Cilibrasi and Vitanyi 2005. ``ValueError`` for another name or
    an empty text.
    """
    before, new = train_text.encode(), text.encode()
    if not new:
        raise ValueError("text is empty: there are no bytes to divide by. Give at least one character.")

    def xz(raw: bytes) -> bytes:
        options = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, len(before) + len(new))}
        return lzma.compress(raw, format=lzma.FORMAT_XZ, filters=[options])

    compressors = {"gzip": lambda raw: gzip.compress(raw, 9, mtime=0), "xz": xz}
    if name not in compressors:
        raise ValueError(f"No compressor {name!r}; there are {', '.join(compressors)}.")
    compress = compressors[name]
    return 8 * (len(compress(before + new)) - len(compress(before))) / len(new)


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent, with heavy-ball momentum if asked for. Polyak 1964; Sutskever et al. 2013.

    params: parameters or groups of them; lr: step size; momentum: share of the velocity that is kept from
    step to step. ``ValueError`` unless lr is at least 0 and momentum from 0 to below 1.
    """

    def __init__(self, params, lr: float, momentum: float = 0.0):
        if not lr >= 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr is {lr} and momentum {momentum}; lr must be at least 0 "
                             "and momentum from 0 to below 1.")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p: Tensor, group: dict) -> None:
        """One step of one parameter, in place."""
        velocity = p.grad
        if group["momentum"]:
            state = self.state[p]
            if not state:
                state["velocity"] = torch.zeros_like(p)
            velocity = state["velocity"].mul_(group["momentum"]).add_(p.grad)  # u = momentum u + g
        p.add_(velocity, alpha=-group["lr"])


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as in PyTorch: Loshchilov and Hutter 2019, algorithm 2, but for the
    decay, which the whole learning rate multiplies and not the schedule alone.

    params: parameters, or groups of them with options of their own; lr: step size;
    betas: how slowly the means of gradients and of their squares forget; weight_decay: share of
    each weight that is taken off per step, times lr. Parameters sharded over processes (DTensor) work too.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1):
        if not lr >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr is {lr} and betas are {betas}; lr must be at least 0 and betas from 0 to below 1.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p: Tensor, group: dict) -> None:
        """One step of one parameter, in place."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        state["mean"].lerp_(p.grad, 1 - beta1)  # m = beta1 m + (1 - beta1) g
        state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        mean_scale, square_scale = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (state["square"] / square_scale).sqrt_().add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(state["mean"], denominator, value=-group["lr"] / mean_scale)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix with its singular values pushed to about 1 by a Newton-Schulz iteration: (..., m, n) -> same.

    Jordan et al. 2024 (Muon), whose coefficients reach 0.7 to 1.2 in five steps rather than exactly 1 in more.
    A matrix sharded over processes (DTensor) is gathered: each process computes it all and keeps its share.
    """
    if hasattr(matrix, "full_tensor"):
        return sharded_like(orthogonalize(matrix.full_tensor(), steps), matrix)
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda else matrix  # a GPU multiplies these many times as fast
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    tall = matrix.size(-2) > matrix.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds whole, distributed as the DTensor ``like`` is, without sending anything."""
    from torch.distributed.tensor import DTensor, Replicate  # costs seconds, and only many processes need it

    everywhere = [Replicate()] * like.device_mesh.ndim
    copy = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    return copy.redistribute(placements=like.placements)


class Muon(AdamW):
    """Orthogonalised running mean of the gradient for the groups marked ``orthogonal``, AdamW for the others.

    Jordan et al. 2024. ``lr`` of an orthogonal group is the size of the step along every direction; tall
    matrices get more of it. Its ``newton_schulz`` is the number of iterations, 5 if not given. With ``rows``, its
    parameters are several matrices each, one below the other: so many rows of the first, so many of the second...
    """

    def update(self, p: Tensor, group: dict) -> None:
        """One step of one parameter, in place."""
        if not group.get("orthogonal"):
            super().update(p, group)
            return
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p)
        state["mean"].lerp_(p.grad, 0.05)
        ahead = p.grad.lerp(state["mean"], 0.95)  # looks one step ahead (Nesterov)
        rows, rounds = group.get("rows"), group.get("newton_schulz", 5)
        direction = step_apart(ahead, rows, rounds) if rows else orthogonalize(ahead, rounds)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction, alpha=-group["lr"] * (1.0 if rows else tallness(p)))


def tallness(matrix: Tensor) -> float:
    """By how much Muon lengthens the step of a matrix (m, n) with more rows than columns: sqrt(max(1, m / n))."""
    return max(1.0, matrix.size(-2) / matrix.size(-1)) ** 0.5


def step_apart(matrix: Tensor, rows: list[int], steps: int = 5) -> Tensor:
    """Each of several matrices that lie below one another orthogonalised by itself, at its own length: (m, n) -> same.

    ``rows``: how many rows each has. In a parameter that tensor parallel has cut, these are the rows on one process,
    and each process's rows follow in turn; what belongs to one matrix is first put together.
    """
    if hasattr(matrix, "full_tensor"):
        return sharded_like(step_apart(matrix.full_tensor(), rows, steps), matrix)
    parts = matrix.unflatten(0, (-1, sum(rows))).split(rows, dim=1)
    whole = [part.flatten(0, 1) for part in parts]
    done = [tallness(x) * orthogonalize(x, steps).reshape(part.shape) for x, part in zip(whole, parts, strict=True)]
    return torch.cat(done, dim=1).flatten(0, 1)


def parameter_groups(model: GPT, weight_decay: float, matrix_lr_scale: float = 1.0,
                     split_qkv: bool = False) -> list[dict]:
    """Three groups for ``Muon``: matrices of the blocks, embeddings, and vectors, which do not decay.

    ``lr_scale`` of a group multiplies the scheduled learning rate. ``split_qkv`` takes the parameters that hold
    queries, keys and values below one another into a fourth group, with their ``rows``: those of one process, so
    call this when tensor parallel, if any, has cut the model.
    """
    inside = {id(p) for p in model.blocks.parameters()}
    matrices = [p for p in model.parameters() if p.dim() >= 2 and id(p) in inside]
    tables = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in inside]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay, "orthogonal": True, "lr_scale": matrix_lr_scale},
              {"params": tables, "weight_decay": weight_decay, "orthogonal": False, "lr_scale": 1.0},
              {"params": vectors, "weight_decay": 0.0, "orthogonal": False, "lr_scale": 1.0}]
    if split_qkv:
        layers = [module for module in model.blocks.modules() if hasattr(module, "w_qkv")]
        fused = {id(layer.w_qkv.weight): layer.w_qkv.weight for layer in layers}
        rows = [n * layers[0].head_dim for n in (layers[0].n_heads, layers[0].n_kv_heads, layers[0].n_kv_heads)]
        groups[0]["params"] = [p for p in matrices if id(p) not in fused]
        groups.append(groups[0] | {"params": list(fused.values()), "rows": rows})
    return groups


def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up to ``max_lr``, then a cosine down to ``min_lr``.

    Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * done))


def wsd_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int,
                 decay_steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up, ``max_lr``, then a line down to ``min_lr``.

    The line covers the last ``decay_steps`` steps, at most all that follow the warm-up.
    Hu et al. 2024 (MiniCPM), section 4.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    decay = max(1, min(decay_steps, total_steps - warmup_steps))
    left = min(1.0, max(0.0, (total_steps - step) / decay))
    return min_lr + (max_lr - min_lr) * left


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients in place so that their joint length is at most ``max_norm``; the length before.

    Pascanu, Mikolov and Bengio 2013, section 3.2. Gradients may be sharded over processes (DTensor): then every
    process must call this. ``ValueError`` unless ``max_norm`` is above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be above 0 (math.inf never clips).")
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [gradient.norm() for gradient in gradients]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    length = torch.stack(norms).norm().item() if norms else 0.0
    if not length <= max_norm:  # a length that is nan makes all gradients nan: nothing is hidden
        for gradient in gradients:
            gradient.mul_(max_norm / (length + 1e-6))
    return length


@dataclass(frozen=True)
class TrainConfig:
    """The choices of a training run. Lengths in tokens, rates per step, ``*_every`` in steps."""

    steps: int = 1000
    batch_size: int = 4  # windows per step, over all processes and micro-batches
    context_length: int = 256
    max_lr: float = 5e-3  # embeddings and vectors; with AdamW, everything
    matrix_lr: float = 0.02  # matrices of the blocks, by Muon
    min_lr: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    eval_every: int = 100
    eval_tokens: int = 8192
    save_every: int = 100
    seed: int = 0
    optimizer: str = "muon"  # or "adamw"
    split_qkv: bool = False  # Muon takes queries, keys and values as three matrices
    schedule: str = "cosine"  # or "wsd"
    decay_steps: int = 0  # of "wsd"; 0 means a fifth of the steps
    accumulate: int = 1  # micro-batches that share a step
    precision: str = "float32"  # or "bfloat16", "float16"
    compile: bool = False
    keep: int = 2  # checkpoints, besides the best
    sample_every: int = 0  # 0: never

    def __post_init__(self):
        check_train_config(self)

    def to_dict(self) -> dict:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: dict) -> "TrainConfig":
        """The configuration that ``to_dict`` wrote; ``ValueError`` for an unknown key."""
        return from_keys(cls, given)


POSITIVE = ("steps", "batch_size", "context_length", "max_lr", "matrix_lr", "max_grad_norm", "eval_every",
            "eval_tokens", "save_every", "accumulate", "keep")
NOT_NEGATIVE = ("min_lr", "warmup_steps", "weight_decay", "seed", "decay_steps", "sample_every")
TRAIN_CHOICES = {"optimizer": ("muon", "adamw"), "schedule": ("cosine", "wsd"),
                 "precision": ("float32", "bfloat16", "float16")}


def check_train_config(config: TrainConfig) -> None:
    """``ValueError``, with the value, the bound and the mend, for choices that make no run."""
    for entry in dataclasses.fields(config):
        name, value, good = entry.name, getattr(config, entry.name), f"for instance {entry.default}."
        if name in TRAIN_CHOICES and value not in TRAIN_CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(TRAIN_CHOICES[name])}.")
        if entry.type in (int, float, bool) and not is_a(entry.type, value):
            kind = {int: "a whole number", float: "a number", bool: "true or false"}[entry.type]
            raise ValueError(f"{name} is {value!r}; it must be {kind}, {good}")
        if name in POSITIVE and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0, {good}")
        if name in NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0, {good}")
    if max(config.max_lr, config.matrix_lr) == math.inf:
        raise ValueError(f"max_lr is {config.max_lr} and matrix_lr {config.matrix_lr}; both must be finite.")
    if config.eval_tokens < 2:
        raise ValueError(f"eval_tokens is {config.eval_tokens}; it must be at least 2, one to predict the other from.")
    if not config.min_lr <= config.max_lr:
        raise ValueError(f"min_lr is {config.min_lr}; it must be from 0 to max_lr {config.max_lr}.")
    if config.accumulate > config.batch_size:
        raise ValueError(f"accumulate is {config.accumulate}; a batch of {config.batch_size} windows makes at most "
                         f"{config.batch_size} micro-batches: lower accumulate or raise batch_size.")


def is_a(kind: type, value) -> bool:
    """Whether a value is a bool, int or float; an int is a float too, a bool is neither."""
    return isinstance(value, bool) if kind is bool else (
        not isinstance(value, bool) and isinstance(value, (int, float) if kind is float else int))


@dataclass
class History:
    """What a run recorded: losses in nats per token, by step; it goes into checkpoints as JSON.

    ``seconds`` each step took; two histories are equal if all the rest is.
    """

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list, compare=False)

    def best_step(self) -> int | None:
        """The step after which the held-out loss was lowest; None before the first one that is finite."""
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.val_loss]
        return self.eval_steps[int(np.argmin(losses))] if min(losses, default=math.inf) < math.inf else None


class TokenLoader:
    """Deals out a text in windows of T + 1 tokens, every window once an epoch, in an order fixed by the seed.

    ``tokens``: one row of ids, or a list of rows (memory-mapped shards). ``position`` counts the batches dealt;
    of each batch, every one of ``ranks`` processes takes its share of rows. Each epoch cuts the text at other
    places. ``ValueError`` for ids outside ``vocab_size``, for a text shorter than a window or than a batch.
    """

    def __init__(self, tokens, batch_size: int, context_length: int, *, seed: int = 0, rank: int = 0,
                 ranks: int = 1, vocab_size: int | None = None):
        self.shards = as_shards(tokens)
        self.batch_size, self.context_length, self.seed, self.position = batch_size, context_length, seed, 0
        self.rank, self.ranks, self.vocab_size = rank, ranks, vocab_size
        self.windows = [windows_in(len(shard), context_length) for shard in self.shards]
        check_loader(self)
        self.epochs, self.fingerprint = {}, fingerprint(self.shards)  # the epochs: this one and the one before

    def next(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """This process's rows of the next batch, and the same one token later: int64 (B / ranks, T) each."""
        share = self.batch_size // self.ranks
        first = (self.position * self.ranks + self.rank) * share  # windows dealt before this share
        batch = torch.from_numpy(np.stack([self.window(first + row) for row in range(share)]).astype(np.int64))
        if self.vocab_size:
            check_vocabulary(batch.numpy().reshape(-1), self.vocab_size, f"batch {self.position:,}")
        self.position += 1
        batch = batch.pin_memory() if torch.device(device).type == "cuda" else batch
        batch = batch.to(device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def window(self, number: int) -> np.ndarray:
        """Window ``number``, counted from the beginning of the first epoch: (T + 1,) ids."""
        epoch, place = divmod(number, sum(self.windows))
        if epoch not in self.epochs:
            self.epochs = {e: order for e, order in self.epochs.items() if e == epoch - 1}
            self.epochs[epoch] = shuffled_windows(self, epoch)
        order, offsets = self.epochs[epoch]
        chosen, shard = int(order[place]), 0
        while chosen >= self.windows[shard]:
            chosen, shard = chosen - self.windows[shard], shard + 1
        start = offsets[shard] + chosen * self.context_length
        return self.shards[shard][start : start + self.context_length + 1]

    def state_dict(self) -> dict:
        """The position and what it is a position in; the same for every rank."""
        return {"position": self.position, "seed": self.seed, "batch_size": self.batch_size,
                "context_length": self.context_length, "tokens": sum(len(shard) for shard in self.shards),
                "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Go to the position of ``state``; ``ValueError`` names what differs if it is one in other data."""
        here = self.state_dict() | {"position": state.get("position")}
        if state != here:
            raise ValueError(f"The position belongs to other data: {differences(state, here)}. Give the run the "
                             "tokens and sizes that it began with, or begin anew in another folder.")
        self.position = state["position"]


def as_shards(tokens) -> list[np.ndarray]:
    """One row of token ids, or a list of rows, as a list of arrays; memory-mapped ones stay on the disk."""
    rows = tokens if isinstance(tokens, (list, tuple)) and len(tokens) and np.ndim(tokens[0]) else [tokens]
    shards = [row.detach().cpu().numpy() if isinstance(row, Tensor) else np.asarray(row) for row in rows]
    for shard in shards:
        if shard.ndim != 1 or (shard.size and shard.dtype.kind not in "iu"):
            raise ValueError(f"Tokens have shape {shard.shape} and type {shard.dtype}; they must be whole numbers "
                             "in one row: give one encoded text, or a list of them.")
    return shards


def windows_in(n_tokens: int, context_length: int) -> int:
    """How many windows of ``context_length`` an epoch takes from a text, wherever it begins to cut."""
    return max(1, (n_tokens - context_length) // context_length) if n_tokens > context_length else 0


def shuffled_windows(loader: TokenLoader, epoch: int) -> tuple[np.ndarray, list[int]]:
    """The order of an epoch's windows, and the place in each shard at which its first window begins."""
    random, length = np.random.default_rng([loader.seed, epoch]), loader.context_length
    slack = [min(length - 1, len(shard) - 1 - n * length) if n else 0
             for shard, n in zip(loader.shards, loader.windows, strict=True)]
    return random.permutation(sum(loader.windows)), [int(random.integers(room + 1)) for room in slack]


def fingerprint(shards: Sequence[np.ndarray]) -> str:
    """A short text that changes with the tokens: a hash of their numbers and of samples from all over them."""
    digest = hashlib.sha256()
    for shard in shards:
        starts = np.linspace(0, max(0, len(shard) - 64), 64).astype(int)
        digest.update(str(len(shard)).encode())
        digest.update(np.concatenate([shard[start : start + 64] for start in starts]).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def check_vocabulary(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """``ValueError`` unless all token ids are from 0 to ``vocab_size`` - 1."""
    for start in range(0, len(tokens), 2**22):  # in pieces: a memory-mapped shard need not fit into memory
        piece = tokens[start : start + 2**22]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= vocab_size:
            bad = start + int(np.argmax((piece < 0) | (piece >= vocab_size)))
            raise ValueError(f"Token {bad:,} of {where} is {int(tokens[bad])}; the model's vocabulary has 0 to "
                             f"{vocab_size - 1}: encode the text with the model's own tokenizer.")


def check_loader(loader: TokenLoader, at_once: int = 100_000_000) -> None:
    """``ValueError`` if sizes, ranks and tokens make no batches; looks at ``at_once`` tokens, later ones as dealt."""
    batch_size, ranks, length = loader.batch_size, loader.ranks, loader.context_length
    if batch_size < 1 or batch_size % ranks or not 0 <= loader.rank < ranks:
        raise ValueError(f"batch_size is {batch_size} for {ranks} processes (this is number {loader.rank}); it must "
                         f"be a multiple of {ranks}, for instance {max(1, round(batch_size / ranks)) * ranks}.")
    total, longest = sum(map(len, loader.shards)), max(map(len, loader.shards))
    if not sum(loader.windows):
        raise ValueError(f"The longest text has {longest} tokens; a window of context_length {length} needs "
                         f"{length + 1}, one more. Give more text or a shorter context_length.")
    if sum(loader.windows) < batch_size:
        raise ValueError(f"batch_size is {batch_size}, but {total:,} tokens hold only {sum(loader.windows)} windows "
                         f"of {length}: lower batch_size or context_length, or give more text.")
    for index, shard in enumerate(loader.shards if loader.vocab_size else []):
        check_vocabulary(shard[:at_once], loader.vocab_size, f"shard {index}" if len(loader.shards) > 1 else "the text")
        at_once = max(0, at_once - len(shard))


def check_training(model: GPT, val_tokens, config: TrainConfig) -> np.ndarray:
    """The held-out text as one row of ids; ``ValueError`` if it or the model does not fit the run."""
    if config.context_length > model.config.context_length:
        raise ValueError(f"context_length is {config.context_length}; the model sees at most "
                         f"{model.config.context_length}: shorten it, or build the model with more.")
    held_out = as_shards(val_tokens)
    if len(held_out) != 1:
        raise ValueError(f"The held-out text comes in {len(held_out)} rows; give one: np.concatenate(rows).")
    if len(held_out[0]) <= config.context_length:
        raise ValueError(f"The held-out text has {len(held_out[0])} tokens; one window of context_length "
                         f"{config.context_length} needs {config.context_length + 1}. Hold out more text, or "
                         "shorten the context.")
    check_vocabulary(held_out[0][: config.eval_tokens], model.config.vocab_size, "the held-out text")
    return held_out[0]


@torch.no_grad()
def evaluate(model: GPT, tokens, n_bytes: int | None = None, *, context_length: int | None = None,
             batch_size: int = 16, max_tokens: int | None = None) -> Evaluation:
    """How well the model predicts a text given as token ids (array or tensor, 1-D).

    ``n_bytes``: UTF-8 bytes of the whole text, for bits per byte. ``max_tokens`` looks at the beginning only.
    ``ValueError`` for fewer than two tokens or more than one row.
    """
    length = context_length or model.config.context_length
    chosen = as_shards([tokens[: max_tokens or len(tokens)]])[0]
    chosen = torch.as_tensor(chosen.astype(np.int64), device=model.device)
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} tokens leave nothing to predict: give at least 2.")
    full = (len(chosen) - 1) // length * length
    windows = []
    if full:
        windows.append((chosen[:full].view(-1, length), chosen[1 : full + 1].view(-1, length)))
    if full < len(chosen) - 1:  # the shorter rest
        windows.append((chosen[None, full:-1], chosen[None, full + 1 :]))
    was_training, total = model.training, 0.0
    model.eval()
    for inputs, targets in windows:
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            total += cross_entropy(model(x).float(), y).item() * y.numel()
    model.train(was_training)
    share = len(chosen) / len(tokens)
    return measures(total / (len(chosen) - 1), len(chosen), n_bytes and n_bytes * share)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only on its way there."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def finish_folder(temporary: Path, target: Path) -> None:
    """Give a folder that is complete its name: first all of it is on the disk, then the name."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` that takes its name if the block ends well.

    ``OSError`` says what to do if the disk is full; nothing of the attempt is left.
    """
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        finish_folder(temporary, target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise explain_disk_error(error, target) from error


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def best_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint with the lowest held-out loss: the newest that was the best when it was written."""
    for path in reversed(checkpoints(folder)):
        try:
            if json.loads((path / "state.json").read_text(encoding="utf-8"))["best"]:
                return path
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged, or older than the mark
    return None


def remove_old_checkpoints(folder: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` and the best one, and what a killed process left half written."""
    best = best_checkpoint(folder)
    unfinished = [path for path in Path(folder).glob(".step-*") if path.suffix in (".part", ".old")]
    for path in [*checkpoints(folder)[:-keep], *unfinished]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def random_states(device: torch.device | str) -> dict[str, Tensor]:
    """The states of the generators that dropout draws from."""
    cuda = {"random.cuda": torch.cuda.get_rng_state(device)} if torch.device(device).type == "cuda" else {}
    return {"random.torch": torch.get_rng_state(), **cuda}


def set_random_states(states: dict[str, Tensor], device: torch.device | str) -> None:
    """Put back what ``random_states`` returned."""
    torch.set_rng_state(states["random.torch"])
    if torch.device(device).type == "cuda" and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"], device)


CHECKPOINT_FORMAT = "bytes-to-chat checkpoint 2"


def checkpoint_record(model: nn.Module, step: int, loader: TokenLoader, config: TrainConfig, history: History,
                      **more) -> dict:
    """All of a checkpoint that is no tensor, ready for JSON: whose it is, where it stands, what happened."""
    return {"format": CHECKPOINT_FORMAT, "step": step, "best": history.best_step() == step,
            "val_loss": history.val_loss[-1] if history.eval_steps[-1:] == [step] else None,
            "model_config": model.config.to_dict(), "train_config": config.to_dict(),
            "loader": loader.state_dict(), "history": dataclasses.asdict(history), **more}


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
                    loader: TokenLoader, config: TrainConfig, history: History, *, keep: int | None = None,
                    engine: dict | None = None) -> Path:
    """Write ``folder/step-000123`` whole or not at all; the newest ``keep`` and the best stay.

    Holds weights, optimizer state, random states, the loader's position, step, configurations and history.
    ``OSError`` says what to do if the disk is full; earlier checkpoints stay.
    """
    tensors = {f"model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    tensors.update(random_states(next(model.parameters()).device))
    numbers = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.cpu().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    target = Path(folder) / f"step-{step:06}"
    with whole_folder(target) as temporary:
        save_file(tensors, temporary / "state.safetensors")
        record = checkpoint_record(
            model, step, loader, config, history, optimizer=numbers, engine=engine or {},
            sha256={"state.safetensors": file_sha256(temporary / "state.safetensors")})
        (temporary / "state.json").write_text(json.dumps(record), encoding="utf-8")
    remove_old_checkpoints(folder, keep or config.keep)
    return target


FREE_TO_CHANGE = {"keep": 2, "save_every": 100, "sample_every": 0}  # what cannot change the weights


def differences(saved: dict, here: dict) -> str:
    """The entries in which two configurations differ, for an error message."""
    return "; ".join(f"{name} was {saved.get(name)!r}, is {here.get(name)!r}"
                     for name in {**saved, **here} if saved.get(name) != here.get(name))


def check_record(record: dict, path: Path, model: nn.Module, config: TrainConfig) -> None:
    """``ValueError`` names what differs if a checkpoint belongs to another model or to other settings."""
    kinds = {"model_config": (type(model.config), model.config), "train_config": (TrainConfig, config)}
    for name, (kind, here) in kinds.items():  # older checkpoints hold fewer keys: from_dict fills them in
        then, now = (json.loads(json.dumps(c.to_dict())) for c in (kind.from_dict(record[name]), here))
        if name == "train_config":
            then, now = then | FREE_TO_CHANGE, now | FREE_TO_CHANGE
        if then != now:
            raise ValueError(f"The checkpoint {short_path(path)} is of another run: {differences(then, now)}. "
                             "Use the same settings, or another folder, or delete it to begin anew.")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ``ValueError`` that names the checkpoint and the way on."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"The checkpoint {short_path(path)} cannot be read ({type(error).__name__}: {error}). "
                         "Delete it: training then goes on from the one before, or from the start.") from error


def read_checkpoint(path: str | Path) -> dict:
    """The JSON part of a checkpoint; ``ValueError`` if it, or a file that it vouches for, is damaged."""
    with readable(Path(path)):
        record = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
        if not str(record["format"]).startswith(CHECKPOINT_FORMAT[:-1]):
            raise ValueError(f"its format is {record['format']!r}, not {CHECKPOINT_FORMAT!r}")
        for name, digest in record.get("sha256", {}).items():
            if file_sha256(Path(path) / name) != digest:
                raise ValueError(f"{name} is not what was written: its SHA-256 differs")
        if record.get("loader", {}).get("position", record["step"]) != record["step"]:
            raise ValueError(f"step {record['step']} does not go with batch {record['loader']['position']}")
        return {"loader": None, "engine": {}} | record


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict) -> None:
    """Put back an optimizer's state from names like ``optimizer.3.mean``."""
    state: dict[int, dict] = {}
    for name, value in [*tensors.items(), *((f"optimizer.{key}", value) for key, value in numbers.items())]:
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            value = value.clone() if isinstance(value, Tensor) else value  # what was read is a view of the file
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, loader: TokenLoader,
                    config: TrainConfig) -> tuple[int, History]:
    """Put a run back as it was when ``path`` was written: (steps done, history).

    ``ValueError`` names what differs if the checkpoint belongs to another model, other settings or other data,
    or says that it is damaged; nothing is changed then.
    """
    record = read_checkpoint(path)
    check_record(record, Path(path), model, config)
    if record["format"].endswith("distributed"):
        raise ValueError(f"The checkpoint {short_path(path)} was written by several processes: go on with "
                         "torchrun --nproc-per-node 1 -m ch05_pretrain.train and the same settings.")
    with readable(Path(path)):
        with safe_open(Path(path) / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        weights = {name: tensors[f"model.{name}"].view(p.shape) for name, p in model.named_parameters()}
        history = History(**record["history"])
    loader.load_state_dict(record["loader"] or loader.state_dict() | {"position": record["step"]})
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    load_optimizer(optimizer, tensors, record["optimizer"])
    set_random_states(tensors, next(model.parameters()).device)
    return record["step"], history


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step (from 0) by the configuration's schedule."""
    common = (step, config.max_lr, config.min_lr, config.warmup_steps, config.steps)
    if config.schedule == "cosine":
        return cosine_schedule(*common)
    return wsd_schedule(*common, config.decay_steps or max(1, config.steps // 5))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration asks for, with the groups of ``parameter_groups``."""
    if config.optimizer == "adamw":
        return AdamW(parameter_groups(model, config.weight_decay), lr=config.max_lr)
    groups = parameter_groups(model, config.weight_decay, config.matrix_lr / config.max_lr, config.split_qkv)
    return Muon(groups, lr=config.max_lr)


def autocast(device: torch.device | str, precision: str):
    """The context in which matrix products are computed in "float32", "bfloat16" or "float16"."""
    return torch.autocast(torch.device(device).type, getattr(torch, precision), enabled=precision != "float32")


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is infinite or nan; of a tensor spread over processes, in the part that lies here."""
    return all(bool(torch.isfinite(t.to_local() if hasattr(t, "to_local") else t).all()) for t in tensors)


class LossScaler:
    """Keeps float16 gradients from becoming zero: multiply the loss, divide the gradients.

    The factor halves when a gradient overflows and doubles after ``growth_steps`` good steps. Micikevicius et
    al. 2018, section 3.2.
    """

    def __init__(self, scale: float = 2.0**16, growth_steps: int = 2000):
        self.scale, self.growth_steps, self.good_steps = scale, growth_steps, 0

    def unscale(self, gradients: Iterable[Tensor]) -> bool:
        """Divide gradients by the scale in place; False if one of them is not finite."""
        gradients = list(gradients)
        for gradient in gradients:
            gradient.div_(self.scale)
        return all_finite(gradients)

    def adapt(self, good: bool) -> None:
        """Note how a step went and choose the next factor."""
        self.good_steps = self.good_steps + 1 if good else 0
        if not good:
            self.scale /= 2
        elif self.good_steps % self.growth_steps == 0:
            self.scale *= 2


class StepEngine:
    """The arithmetic of a step in one process: forward, backward, micro-batches, precision, clipping."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device, self.scaler = torch.device(device), LossScaler()

    def forward_backward(self, model: GPT, inputs: Tensor, targets: Tensor, config: TrainConfig) -> float:
        """Mean loss of a batch (B, T) in nats per token; leaves the gradients of that mean in ``.grad``."""
        before, loss = dict(vars(self.scaler)), self.accumulate(model, inputs, targets, config)
        while config.precision == "float16" and not self.unscale(model):
            if self.any(not math.isfinite(loss)) or self.scaler.scale < 1e-3:
                loss = math.nan  # no scale would help
                break
            model.zero_grad()  # an overflow: the same batch again, with half the scale
            loss = self.accumulate(model, inputs, targets, config)
        if not math.isfinite(loss):
            vars(self.scaler).update(before)  # the step is undone
        return loss

    def accumulate(self, model: GPT, inputs: Tensor, targets: Tensor, config: TrainConfig) -> float:
        """Forward and backward for each micro-batch, weighted by its share of the tokens."""
        scale, total = self.scaler.scale if config.precision == "float16" else 1.0, 0.0
        micro_batches = zip(*(t.tensor_split(config.accumulate) for t in (inputs, targets)), strict=True)
        for x, y in micro_batches:
            if y.numel():
                loss = self.loss(model, x, y, config) * (y.numel() / targets.numel())
                (loss * scale).backward()
                total += loss.detach()
        return float(total)

    def loss(self, model: GPT, inputs: Tensor, targets: Tensor, config: TrainConfig) -> Tensor:
        """Mean surprise of a micro-batch in nats per token, computed from logits in float32."""
        with autocast(inputs.device, config.precision):
            logits = model(inputs)
        return cross_entropy(logits.float(), targets)

    def unscale(self, model: GPT) -> bool:
        """Divide float16's gradients by the loss scale; False if a process found an overflow."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        good = not self.any(not self.scaler.unscale(gradients))
        self.scaler.adapt(good)
        return good

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients to a joint length of at most ``max_norm``; the length before."""
        return clip_grad_norm(parameters, max_norm)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(flag)


class OneProcess(StepEngine):
    """How a step is carried out: here by one process on one device; parallelize.py does it with many.

    ``rank`` and ``ranks`` say which share of each batch is read here; ``is_main`` who prints and writes;
    ``dropout_seed`` is added to the run's, so that no two processes drop the same positions.
    """

    rank, ranks, is_main, dropout_seed = 0, 1, True, 0

    def prepare(self, model: GPT, config: TrainConfig) -> GPT:
        """The model as the run uses it; called once, before the optimizer is made."""
        if config.compile:
            model.compile()
        return model

    def optimizer(self, model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
        """The run's optimizer."""
        return make_optimizer(model, config)

    def evaluate(self, model: GPT, tokens, config: TrainConfig) -> Evaluation:
        """How well the model predicts the beginning of the held-out tokens."""
        with autocast(next(model.parameters()).device, config.precision):
            return evaluate(model, tokens, max_tokens=config.eval_tokens, context_length=config.context_length)

    def sample(self, model: GPT, write: Callable[[GPT], str]) -> str:
        """What ``write(model)`` makes the model write; the run's random numbers stay as they were."""
        states = random_states(next(model.parameters()).device)
        text = write(model)
        set_random_states(states, next(model.parameters()).device)
        return text

    def first_bad_module(self, model: GPT, inputs: Tensor, targets: Tensor, config: TrainConfig) -> str:
        """Where the loss of a batch stopped being a number; it runs in the micro-batches of the step."""
        pieces = zip(*(t.tensor_split(config.accumulate) for t in (inputs, targets)), strict=True)
        with autocast(inputs.device, config.precision):
            return next(filter(None, (first_bad_module(model, x, y) for x, y in pieces if y.numel())), "")

    def save(self, folder: str | Path, model: GPT, optimizer: torch.optim.Optimizer, step: int,
             loader: TokenLoader, config: TrainConfig, history: History) -> Path:
        """Write a checkpoint."""
        state = {"scale": self.scaler.scale, "good_steps": self.scaler.good_steps}
        return save_checkpoint(folder, model, optimizer, step, loader, config, history, engine=state)

    def load(self, path: str | Path, model: GPT, optimizer: torch.optim.Optimizer, loader: TokenLoader,
             config: TrainConfig) -> tuple[int, History]:
        """Go back to a checkpoint: (steps done, history)."""
        result = load_checkpoint(path, model, optimizer, loader, config)
        vars(self.scaler).update(read_checkpoint(path)["engine"])
        return result

    def export(self, model: GPT, folder: str | Path) -> None:
        """Write the whole model in the Hugging Face layout."""
        model.eval().save_pretrained(folder)

    def barrier(self) -> None:
        """Wait until every process is here."""

    def close(self) -> None:
        """Leave the other processes."""


def first_bad_module(model: nn.Module, inputs: Tensor, targets: Tensor) -> str:
    """Where a loss stops being a number: the first module whose output, or else gradient, is not finite.

    Runs the batch once more, forward and backward; gradients are lost. "" if all is finite.
    """
    bad: list[str] = []

    def watch(name: str, tensor, what: str) -> None:
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
            bad.append(f"{what} of {name}")

    def after_forward(name: str):
        def hook(module, given, output):
            watch(name, output, "the output")
            if not bad and isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: watch(name, gradient, "the gradient"))
        return hook

    hooks = [m.register_forward_hook(after_forward(name or "the model")) for name, m in model.named_modules()]
    hooks += [p.register_hook(lambda gradient, name=name: watch(name, gradient, "the gradient"))
              for name, p in model.named_parameters() if p.requires_grad]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled model would not call the hooks
            loss = cross_entropy(model(inputs).float(), targets)
        if not bad and not torch.isfinite(loss):
            bad.append("the loss of the logits")
        if not bad:
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return bad[0] if bad else ""


def train_step(model: GPT, optimizer: torch.optim.Optimizer, loader: TokenLoader, config: TrainConfig,
               step: int, engine: OneProcess) -> tuple[float, float]:
    """One step of training: (loss in nats per token, length of the gradient before clipping).

    ``FloatingPointError`` if one of them is no finite number; all is then as it was before the step.
    """
    device = next(model.parameters()).device
    before, rate = random_states(device), learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    inputs, targets = loader.next(device)
    optimizer.zero_grad()
    loss = engine.forward_backward(model, inputs, targets, config)
    norm = engine.clip(model.parameters(), config.max_grad_norm)
    if engine.any(not math.isfinite(loss + norm)):
        set_random_states(before, device)
        where = engine.first_bad_module(model, inputs, targets, config) or "nothing, when it was run once more"
        set_random_states(before, device)
        loader.position = step
        what = f"length of the gradient became {norm}" if math.isfinite(loss) else f"loss became {loss}"
        raise FloatingPointError(
            f"The {what} at step {step + 1}. First not finite: {where}. Begin anew in another folder with a lower "
            f"max_lr (now {config.max_lr}) or matrix_lr (now {config.matrix_lr}), a longer warm-up or another seed: a "
            "checkpoint goes on with its own settings only.")
    optimizer.step()
    return loss, norm


Log = Callable[[str, int, float | str], None]  # called with a name, a step and a value


def log_averages(history: History, config: TrainConfig, step: int, on_log: Log) -> None:
    """Report the ten steps that end with ``step``."""
    on_log("training", step, float(np.mean(history.train_loss[step - 10 : step])))
    on_log("gradient norm", step, float(np.mean(history.grad_norm[step - 10 : step])))
    on_log("learning rate", step, learning_rate(step - 1, config))
    seconds = history.seconds[-10:] if step == len(history.steps) else []
    if sum(seconds):
        on_log("tokens per second", step, len(seconds) * config.batch_size * config.context_length / sum(seconds))


def replay(history: History, config: TrainConfig, on_log: Log) -> None:
    """Report a resumed run's past again, so that its curves are whole."""
    for step in range(10, len(history.steps) + 1, 10):
        log_averages(history, config, step, on_log)
    for step, loss in zip(history.eval_steps, history.val_loss, strict=True):
        on_log("held out", step, loss)


def log_step(history: History, model: GPT, val_tokens, config: TrainConfig, step: int, on_log: Log,
             engine: OneProcess, sample: Callable[[GPT], str] | None = None) -> None:
    """After a step: report every tenth, evaluate every ``eval_every`` and at the end, write now and then."""
    if step % 10 == 0:
        log_averages(history, config, step, on_log)
    if step % config.eval_every == 0 or step == config.steps:
        loss = engine.evaluate(model, val_tokens, config).loss
        history.eval_steps.append(step)
        history.val_loss.append(loss)
        on_log("held out", step, loss)
    if sample and config.sample_every and step % config.sample_every == 0:
        text = engine.sample(model, sample)
        if text:
            on_log("sample", step, text)


class Run:
    """A training run in progress: model, optimizer, loader, history and the number of steps done."""

    def __init__(self, model: GPT, train_tokens, config: TrainConfig, engine: OneProcess, folder: str | Path | None):
        self.config, self.engine, self.folder = config, engine, folder
        self.loader = TokenLoader(train_tokens, config.batch_size, config.context_length, seed=config.seed,
                                  rank=engine.rank, ranks=engine.ranks, vocab_size=model.config.vocab_size)
        self.model = engine.prepare(model, config)
        self.optimizer = engine.optimizer(self.model, config)
        self.done, self.saved, self.history = 0, None, History()
        torch.manual_seed(config.seed + engine.dropout_seed)

    def resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one."""
        found = checkpoints(self.folder) if self.folder else []
        if found:
            self.done, self.history = self.engine.load(
                found[-1], self.model, self.optimizer, self.loader, self.config)
            self.saved = self.done
        if found and self.engine.is_main:
            print(f"Going on from step {self.done:,} of {self.config.steps:,} (delete {short_path(self.folder)} "
                  "to begin anew).")
        return bool(found)

    def step(self) -> float:
        """One step; the loss."""
        began = time.perf_counter()
        loss, norm = train_step(self.model, self.optimizer, self.loader, self.config, self.done, self.engine)
        self.done += 1
        self.history.steps.append(self.done)
        self.history.train_loss.append(loss)
        self.history.grad_norm.append(norm)
        self.history.seconds.append(round(time.perf_counter() - began, 4))
        return loss

    def must_save(self) -> bool:
        """Whether it is time: every ``save_every`` steps, at the best held-out loss so far, at the end."""
        return (self.done % self.config.save_every == 0 or self.history.best_step() == self.done
                or self.done == self.config.steps)

    def save(self) -> None:
        """Write a checkpoint, unless this very state is on the disk."""
        if self.folder and self.saved != self.done:
            self.engine.save(self.folder, self.model, self.optimizer, self.done, self.loader, self.config,
                             self.history)
            self.saved = self.done


def train(model: GPT, train_tokens, val_tokens, config: TrainConfig, *, folder: str | Path | None = None,
          on_log: Log = lambda name, step, value: None, engine: OneProcess | None = None,
          stop: Callable[[], bool] = lambda: False, sample: Callable[[GPT], str] | None = None) -> History:
    """Train in place and return what was recorded; with ``folder``, save checkpoints there and resume from them.

    ``train_tokens``: ids in one row, or a list of shards; ``val_tokens``: one row. ``on_log(name, step, value)``
    hears "training" and "held out" losses, "learning rate", "gradient norm", "tokens per second", and, as
    "sample", ``sample(model)``. ``stop()`` is asked after each step; True saves and ends. ``ValueError`` for what
    does not fit; ``FloatingPointError``, when a loss is no number, names step and module after saving the state
    before that step.
    """
    engine = engine or OneProcess()
    val_tokens = check_training(model, val_tokens, config)
    run = Run(model, train_tokens, config, engine, folder)
    on_log = on_log if engine.is_main else lambda name, step, value: None
    if run.resume():
        replay(run.history, config, on_log)
    run.model.train()
    try:
        with progress(description="training", total=config.steps, unit="step") as bar:
            bar.update(run.done)
            while run.done < config.steps:
                loss = run.step()
                log_step(run.history, run.model, val_tokens, config, run.done, on_log, engine, sample)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                stopping = engine.any(stop())
                if stopping or run.must_save():
                    run.save()
                if stopping:
                    break
    except KeyboardInterrupt:  # perhaps in the middle of a step, and half a step must not be saved
        hint = " Run this again to go on from the last checkpoint." if folder else ""
        print(f"Stopped in step {run.done + 1:,}.{hint}")
        raise
    except FloatingPointError:
        if not engine.any(not all_finite(p.detach() for p in run.model.parameters())):
            run.save()
        raise
    return run.history


STORYTELLER_RUN = TrainConfig(steps=1400, batch_size=4, context_length=256, eval_every=140, save_every=140,
                              eval_tokens=30_000, sample_every=350)  # more tokens than are held out: all of them


def continue_text(model: GPT, tokenizer: BPETokenizer, prompt: str, length: int = 40, *, seed: int = 0,
                  temperature: float = 0.8, top_k: int = 50) -> str:
    """The prompt and at most ``length`` tokens that the model writes after it, the same for the same seed."""
    end = [tokenizer.special_tokens[name] for name in tokenizer.special_tokens if name == "<|endoftext|>"]
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    told = generate(model, ids, length, temperature=temperature, top_k=top_k, stop_ids=end, generator=generator)
    return tokenizer.decode(token for token in told[0].tolist() if token not in end)


def save_finished(folder: str | Path, model: GPT, tokenizer: BPETokenizer, history: History) -> None:
    """Write a finished model as later chapters load it: Hugging Face layout, tokenizer, and last the history."""
    model.eval().save_pretrained(folder)
    tokenizer.save(Path(folder) / "tokenizer.json")
    write_text(Path(folder) / "history.json", json.dumps(dataclasses.asdict(history)))


def pretrain_storyteller(device: torch.device | str = "cpu", config: TrainConfig = STORYTELLER_RUN,
                         on_log: Log = lambda name, step, value: None) -> tuple[GPT, BPETokenizer, History]:
    """Train a small storyteller on Andersen's tales and keep it in ``workspace/pretrain/first_storyteller``.

    Interrupted, it goes on from its last checkpoint. Returns model, tokenizer and history.
    """
    data, folder = prepare_tokens("andersen"), workspace("pretrain", "first_storyteller")
    torch.manual_seed(config.seed)
    model = GPT(PRESETS["storyteller"]).to(device)
    history = train(model, data.train, data.val, config, folder=folder / "checkpoints", on_log=on_log,
                    sample=lambda model: continue_text(model, data.tokenizer, "Once upon a time"))
    save_finished(folder, model, data.tokenizer, history)
    shutil.rmtree(folder / "checkpoints")
    return model, data.tokenizer, history


FINISHED = ("config.json", "model.safetensors", "tokenizer.json", "history.json")


def load_storyteller(device: torch.device | str = "cpu") -> tuple[GPT, BPETokenizer]:
    """The best storyteller there is: your finished ``workspace/pretrain/storyteller``, else the course's record.

    Says which. In float32, ready to use, and without dropout: pretraining needed it against repeated text, later
    chapters train briefly. ``FileNotFoundError`` if both are missing.
    """
    own, record = workspace("pretrain", "storyteller"), ROOT / "ch05_pretrain" / "storyteller"
    whole = [folder for folder in (own, record) if all((folder / name).exists() for name in FINISHED)]
    if not whole:
        raise FileNotFoundError(
            f"There is no storyteller in {short_path(own)} or {short_path(record)}. Get the course's folder again, or "
            "train one: python -m ch05_pretrain.train --preset storyteller")
    loaded = GPT.from_pretrained(whole[0]).float()
    model = GPT(dataclasses.replace(loaded.config, dropout=0.0))
    model.load_state_dict(loaded.state_dict())
    model.to(device).eval()
    tokenizer = BPETokenizer.load(whole[0] / "tokenizer.json")
    whose = "your own storyteller" if whole[0] == own else "the course's storyteller, the record run of chapter 5"
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"Loaded {whose} ({short_path(whole[0])}): {n_parameters:,} parameters.")
    return model, tokenizer
