"""Deep dive: A speed run.

Written from ch05_pretrain/speed_run.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "Recipe",
    "NANOGPT",
    "CharacterText",
    "shakespeare_characters",
    "BareRMSNorm",
    "SquaredReLU",
    "RecentCharacters",
    "build_from_recipe",
    "optimizer_of",
    "TimedRun",
    "held_out_loss",
    "RECORD",
    "planned_runs",
    "measure_run",
    "read_speed_record",
    "complete_record",
    "CHANGES",
    "ladder",
    "FAST",
    "TRIED",
    "relative_time",
]

import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ch01_data.data import load_documents, split_documents
from ch02_tokenizer.tokenizer import get_batch
from ch04_gpt.gpt import GPT, GPTConfig
from ch05_pretrain.pretrain import (
    Muon,
    cosine_schedule,
    parameter_groups,
    wsd_schedule,
)
from utils.progress import progress
from utils.workspace import ROOT, write_text


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained. The defaults are those of nanoGPT's example for a computer without GPU."""

    steps: int = 2000
    batch_size: int = 12
    context_length: int = 64
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    optimizer: str = "adamw"    # or "muon" for the matrices of the blocks
    max_lr: float = 1e-3
    min_lr: float = 1e-4
    matrix_lr: float = 0.02     # of Muon
    newton_schulz: int = 5      # iterations of Muon
    warmup_steps: int = 100
    schedule: str = "cosine"    # or "linear"
    position: str = "learned"   # or "rope"
    norm: str = "layernorm"     # or "bare": RMSNorm without gains
    qk_norm: bool = False
    mlp: str = "gelu"           # or "relu2"
    zero_init: bool = False     # of the projections that write to the stream
    recent: int = 1             # how many characters each position's first vector is made of

    def __post_init__(self):
        known = {"optimizer": ("adamw", "muon"), "schedule": ("cosine", "linear"), "position": ("learned", "rope"),
                 "norm": ("layernorm", "bare"), "mlp": ("gelu", "relu2")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}.")
        for name in ("steps", "batch_size", "recent", "newton_schulz"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def tokens(self) -> int:
        """Characters that the run reads."""
        return self.steps * self.batch_size * self.context_length


NANOGPT = Recipe()


@dataclass(frozen=True)
class CharacterText:
    """A text as numbers of characters: training and held-out part, uint8 (n,), and the characters by number."""

    train: Tensor
    val: Tensor
    letters: str


@cache
def shakespeare_characters() -> CharacterText:
    """Shakespeare's works, character by character; held out are the documents that chapter 1 holds out."""
    parts = ["\n\n".join(d.text for d in part) for part in split_documents(load_documents("shakespeare"))]
    letters = "".join(sorted(set("".join(parts))))
    number_of = {letter: number for number, letter in enumerate(letters)}
    train, val = (torch.tensor([number_of[letter] for letter in part], dtype=torch.uint8) for part in parts)
    return CharacterText(train, val, letters)


class BareRMSNorm(nn.Module):
    """RMSNorm without gains: each vector divided by its root mean square, (..., D) -> (..., D)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class SquaredReLU(nn.Module):
    """max(x, 0)², any shape. So et al. 2021 (Primer), section 4.2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class RecentCharacters(nn.Module):
    """Each position's vector is a sum over its last ``n`` characters, each place with a table of its own.

    Token ids (B, T) -> (B, T, D). ``table`` (V, D) is the place of the character itself. Bengio et al. 2003,
    section 2, whose network reads its last n words side by side.
    """

    def __init__(self, table: nn.Parameter, n: int):
        super().__init__()
        self.weight, self.nothing = table, len(table)
        self.earlier = nn.ModuleList(nn.Embedding(len(table) + 1, table.size(1)) for _ in range(n - 1))
        for embedding in self.earlier:
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = F.embedding(token_ids, self.weight)
        for back, embedding in enumerate(self.earlier, start=1):
            before = F.pad(token_ids, (back, 0), value=self.nothing)[:, : token_ids.size(1)]
            x = x + embedding(before)
        return x


def build_from_recipe(recipe: Recipe, vocab_size: int) -> GPT:
    """An ordinary GPT of chapter 4 in which the parts that the recipe asks for have been replaced."""
    model = GPT(GPTConfig(
        vocab_size, recipe.context_length, recipe.d_model, recipe.n_layers, recipe.n_heads, bias=False,
        position=recipe.position, norm="layernorm" if recipe.norm == "layernorm" else "rmsnorm",
        qk_norm=recipe.qk_norm))
    for block in model.blocks:
        if recipe.norm == "bare":
            block.norm1, block.norm2 = BareRMSNorm(), BareRMSNorm()
        if recipe.norm == "bare" and recipe.qk_norm:
            block.attention.q_norm, block.attention.k_norm = BareRMSNorm(), BareRMSNorm()
        if recipe.mlp == "relu2":
            block.mlp.activation = SquaredReLU()
        if recipe.zero_init:
            nn.init.zeros_(block.attention.out_proj.weight)
            nn.init.zeros_(block.mlp.w_down.weight)
    if recipe.norm == "bare":
        model.norm = BareRMSNorm()
    if recipe.recent > 1:
        model.token_embedding = RecentCharacters(model.token_embedding.weight, recipe.recent)
    return model


def optimizer_of(recipe: Recipe, model: GPT) -> torch.optim.Optimizer:
    """The recipe's optimizer over three groups: matrices of the blocks, tables, and vectors, which do not decay."""
    groups = parameter_groups(model, weight_decay=0.1)
    if recipe.optimizer == "muon":
        groups[0]["lr_scale"] = recipe.matrix_lr / recipe.max_lr
        groups[0]["newton_schulz"] = recipe.newton_schulz
        return Muon(groups, lr=recipe.max_lr, betas=(0.9, 0.95))
    return torch.optim.AdamW(groups, lr=recipe.max_lr, betas=(0.9, 0.99))


class TimedRun:
    """A recipe being carried out: ``step()`` trains one batch and adds to the clocks; evaluation is not timed.

    ``seconds`` is wall time and ``cpu_seconds`` processor time of the training loop, ``losses`` one a step.
    """

    def __init__(self, recipe: Recipe, text: CharacterText, seed: int = 0):
        torch.manual_seed(seed)
        self.recipe, self.text, self.seed = recipe, text, seed
        self.model = build_from_recipe(recipe, len(text.letters))
        self.optimizer = optimizer_of(recipe, self.model)
        self.generator = torch.Generator().manual_seed(seed)
        self.losses, self.seconds, self.cpu_seconds = [], [], []

    def rate(self) -> float:
        """The learning rate of the next step."""
        step, r = len(self.losses), self.recipe
        if r.schedule == "cosine":
            return cosine_schedule(step, r.max_lr, r.min_lr, r.warmup_steps, r.steps)
        return wsd_schedule(step, r.max_lr, r.min_lr, r.warmup_steps, r.steps, decay_steps=r.steps)

    def step(self) -> float:
        """Train on one batch; its loss in nats per character."""
        wall, cpu = time.perf_counter(), time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group["lr_scale"]
        inputs, targets = get_batch(self.text.train, self.recipe.batch_size, self.recipe.context_length,
                                    generator=self.generator)
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)
        return self.losses[-1]

    @property
    def done(self) -> float:
        """The share of the steps that has been carried out."""
        return len(self.losses) / self.recipe.steps


@torch.no_grad()
def held_out_loss(model: GPT, text: CharacterText, every: int = 1, context_length: int = 64) -> float:
    """Nats per character over the held-out text, cut into windows of ``context_length``; every ``every``-th of them.

    The same windows for every recipe, whatever it was trained on.
    """
    n = (len(text.val) - 1) // context_length
    places = (torch.arange(0, n, every) * context_length)[:, None] + torch.arange(context_length + 1)
    windows, total = text.val[places].long(), 0.0
    for part in windows.split(128):
        logits = model(part[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


RECORD = ROOT / "ch05_pretrain" / "records" / "speed_run.json"


def planned_runs() -> dict[str, tuple[Recipe, int]]:
    """Every run of the record by name: (recipe, seed)."""
    runs = {f"fast, seed {seed}": (FAST, seed) for seed in (0, 1, 2)}
    runs |= {f"baseline, seed {seed}": (NANOGPT, seed) for seed in (0, 1)}
    runs |= {name: (recipe, 0) for name, recipe in {**ladder(), **TRIED}.items() if recipe != FAST}
    return runs


def measure_run(recipe: Recipe, seed: int, text: CharacterText) -> dict:
    """Carry a recipe out: its held-out loss, times in seconds, and the training loss in fifty parts of the run."""
    run = TimedRun(recipe, text, seed)
    for _ in progress(range(recipe.steps), "Training"):
        run.step()
    ends = [recipe.steps * part // 50 for part in range(51)]
    curve = [round(statistics.mean(run.losses[a:b]), 4) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return {"recipe": asdict(recipe), "seed": seed, "loss": round(held_out_loss(run.model, text), 4),
            "seconds": round(sum(run.seconds), 2), "cpu_seconds": round(sum(run.cpu_seconds), 2), "curve": curve}


def read_speed_record(path: Path = RECORD) -> dict:
    """The record as it is: {"runs": {name: run}, "relative_time": {name: time of a step}, ...}."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}, "relative_time": {}}


def complete_record(words: Sequence[str] = ()) -> None:
    """Add to the record the runs that it lacks, or those of them whose names contain one of ``words``."""
    text, record = shakespeare_characters(), read_speed_record()
    for name, (recipe, seed) in planned_runs().items():
        known = record["runs"].get(name, {})
        if known.get("recipe") == asdict(recipe) or words and not any(word in name for word in words):
            continue
        print(name, flush=True)
        record["runs"][name] = measure_run(recipe, seed, text)
        write_text(RECORD, json.dumps(record, indent=1) + "\n")
    if not words or "time" in words:
        recipes = {"baseline": NANOGPT, **ladder(), **TRIED}
        record["relative_time"] = {name: round(value, 4) for name, value in relative_time(recipes, text).items()}
        record["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread, PyTorch {torch.__version__}"
        write_text(RECORD, json.dumps(record, indent=1) + "\n")


CHANGES = {  # one after another, each with everything above it; steps fill a tenth of the baseline's time
    "nanoGPT's recipe, stopped early": {"steps": 190},
    "learning rate 3e-3, down a line to 0": {
        "steps": 190, "max_lr": 3e-3, "min_lr": 0.0, "schedule": "linear", "warmup_steps": 10},
    "2 layers of width 96": {"steps": 510, "d_model": 96, "n_layers": 2},
    "Muon for the matrices": {"steps": 400, "optimizer": "muon", "max_lr": 0.01, "matrix_lr": 0.03},
    "three iterations in Muon, not five": {"steps": 440, "newton_schulz": 3},
    "rotary positions": {"steps": 430, "position": "rope"},
    "RMSNorm without gains": {"steps": 420, "norm": "bare"},
    "normalised queries and keys": {"steps": 400, "qk_norm": True},
    "squared ReLU": {"steps": 400, "mlp": "relu2"},
    "output projections begin at 0": {"steps": 400, "zero_init": True},
    "the last four characters at the entrance": {"steps": 400, "recent": 4},
    "out again: the four parts before it": {
        "steps": 420, "norm": "layernorm", "qk_norm": False, "mlp": "gelu", "zero_init": False},
}


def ladder(changes: Mapping[str, Mapping] = CHANGES) -> dict[str, Recipe]:
    """The recipes by name, each with its change and all changes before it."""
    recipes, so_far = {}, {}
    for name, change in changes.items():
        so_far = {**so_far, **change}
        recipes[name] = Recipe(**so_far)
    return recipes


FAST = list(ladder().values())[-1]
TRIED = {  # from the fast recipe, and not taken
    "the size of the original": replace(FAST, d_model=128, n_layers=4, steps=140),
}


def relative_time(recipes: Mapping[str, Recipe], text: CharacterText, rounds: int = 10) -> dict[str, float]:
    """Processor time of a step of each recipe, over that of the first, as the median of ``rounds`` rounds.

    In every round each recipe takes a step, one right after another, so that whatever else the machine does
    falls on all of them.
    """
    runs = {name: TimedRun(recipe, text) for name, recipe in recipes.items()}
    for _ in range(rounds + 2):
        for run in runs.values():
            run.step()
    first = next(iter(runs.values())).cpu_seconds[2:]  # without the two that wake the libraries
    return {name: statistics.median(a / b for a, b in zip(run.cpu_seconds[2:], first, strict=True))
            for name, run in runs.items()}


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    complete_record(sys.argv[1:])
