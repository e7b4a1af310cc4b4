"""Deep dive: how little must change?.

Written from ch06_finetune/lora.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "LORA_RECORD",
    "PLAYS",
    "storyteller_and_plays",
    "read_plays",
    "losses_on",
    "truncated_update",
    "LoRARun",
    "learn_plays",
    "LORA_PLACES",
    "lora_sweep",
    "step_of_smollm2",
    "MEASURED",
    "record_lora",
]

import dataclasses
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ch06_finetune.finetune import Adapter, add_lora, answer_loss, fine_tune, linear_layers
from ch06_finetune.previous_chapters import (
    GPT, AdamW, cross_entropy, evaluate, get_batch, load_documents, load_storyteller, split_documents,
)
from utils.bench import Row, measure
from utils.workspace import ROOT, short_path, write_text

LORA_RECORD = ROOT / "ch06_finetune" / "records" / "lora.json"


PLAYS = ("as-you-like-it", "much-ado-about-nothing", "twelfth-night", "merchant-of-venice")


def storyteller_and_plays() -> tuple[GPT, dict[str, Tensor]]:
    """The storyteller, and token ids: "plays" to learn from, a held-out "play", and held-out "tales" to forget."""
    model, tokenizer = load_storyteller("cpu")
    play = {document.id.split("/")[1]: document.text for document in load_documents("shakespeare")}
    _, tales = split_documents(load_documents("andersen"))
    texts = {"plays": "\n\n".join(play[name] for name in PLAYS), "play": play["tempest"],
             "tales": "\n\n".join(document.text for document in tales)}
    return model, {name: torch.tensor(tokenizer.encode(text, allow_special=False)) for name, text in texts.items()}


def read_plays(model: GPT, plays: Tensor, *, lr: float, steps: int = 120, batch_size: int = 8, length: int = 64,
               seed: int = 0) -> list[float]:
    """Go on training on random windows of the plays; the loss of each step in nats per token."""
    generator = torch.Generator().manual_seed(seed)
    batches = [get_batch(plays, batch_size, length, generator=generator) for _ in range(steps)]
    return fine_tune(model, batches, lambda batch: cross_entropy(model(batch[0]), batch[1]), max_lr=lr)


def losses_on(model: GPT, tokens: dict[str, Tensor], most: int = 8192) -> dict[str, float]:
    """Nats per token on the held-out play and on the held-out tales, of the first ``most`` tokens of each."""
    return {name: evaluate(model, tokens[name], max_tokens=most).loss for name in ("play", "tales")}


def truncated_update(before: GPT, after: GPT, rank: int) -> Adapter:
    """The best adapter of that rank for the change of all the blocks' matrices from ``before`` to ``after``.

    Eckart and Young 1936: keep the largest singular values. alpha is the rank, so that the scale is 1.
    """
    tensors, targets = {}, set()
    old, new = linear_layers(before), linear_layers(after)
    for name in (name for name in old if name.startswith("blocks.")):
        left, values, right = torch.linalg.svd((new[name].weight - old[name].weight).detach(), full_matrices=False)
        tensors[f"{name}.lora_a"] = values[:rank, None] * right[:rank]
        tensors[f"{name}.lora_b"] = left[:, :rank]
        targets.add(name.split(".")[-1])
    return Adapter(rank, float(rank), tuple(sorted(targets)), tensors)


@dataclass(frozen=True)
class LoRARun:
    """One run of the sweep; ``rank`` None trains all weights. ``targets`` None means all matrices of the blocks."""

    rank: int | None
    lr: float
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    steps: int = 120
    seed: int = 0


def learn_plays(run: LoRARun, start: GPT, tokens: dict[str, Tensor]) -> dict:
    """What a run learned of the play and forgot of the tales, with its settings, as a row of the record."""
    model = GPT(start.config)
    model.load_state_dict(start.state_dict())
    torch.manual_seed(run.seed)
    if run.rank is not None:
        add_lora(model, run.rank, run.alpha, run.targets)
    began = time.perf_counter()
    read_plays(model, tokens["plays"], lr=run.lr, steps=run.steps, seed=run.seed)
    seconds = time.perf_counter() - began
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return dataclasses.asdict(run) | {"trained": trained, **losses_on(model, tokens), "seconds": round(seconds, 1)}


LORA_PLACES = {"attention only": ("out_proj", "w_qkv"), "MLP only": ("w_down", "w_gate", "w_up"),
               "everywhere": None}


def lora_sweep(rows: Sequence[dict] = ()) -> list[LoRARun]:
    """The runs of the record. The ranks are tried with the learning rate that is best at rank 8 in ``rows``."""
    rates = [LoRARun(None, lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]
    rates += [LoRARun(rank, lr) for rank in (8, 64) for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
    tried = {row["lr"]: row["play"] for row in rows if (row["rank"], row["alpha"], row["targets"], row["seed"])
             == (8, 16.0, None, 0)}
    full = {row["lr"]: row["play"] for row in rows if row["rank"] is None and row["seed"] == 0}
    if len(tried) < 4 or len(full) < 5:
        return rates
    lr, full_lr = min(tried, key=tried.get), min(full, key=full.get)
    others = [LoRARun(rank, lr) for rank in (1, 2, 4, 16, 32, 64)]
    others += [LoRARun(rank, lr, targets=LORA_PLACES[place])
               for rank, place in ((23, "attention only"), (12, "MLP only"))]
    others += [LoRARun(8, lr, alpha) for alpha in (4.0, 64.0)]
    others += [LoRARun(rank, rate, seed=1) for rank, rate in ((8, lr), (None, full_lr))]
    return list(dict.fromkeys(rates + others))


def step_of_smollm2(kind: str):
    """A training step on SmolLM2, ready to run, for ``utils.bench`` to measure in a process of its own.

    ``kind``: "load" only answers, "LoRA" trains rank 8 on all matrices, "LoRA, base in bfloat16" the same on a base
    of half the size, "full" trains every weight. 4 texts of 128 tokens, of which the last 32 count; chapter 5's AdamW.
    """
    model = GPT.from_pretrained("smollm2-135m")
    if kind == "LoRA, base in bfloat16":
        model.to(torch.bfloat16)
    if kind.startswith("LoRA"):
        add_lora(model, rank=8, alpha=16)
    ids = torch.randint(model.config.vocab_size, (4, 129), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(129) > 96).expand(4, -1)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)

    def run():
        with torch.set_grad_enabled(kind != "load"):
            loss = answer_loss(model, ids, mask)
        if kind != "load":
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return run


MEASURED = ("load", "LoRA", "LoRA, base in bfloat16", "full")


def record_lora(path: Path = LORA_RECORD, kinds: Collection[str] = MEASURED) -> None:
    """Do what of the sweep and of the memory measurements ``path`` does not hold yet, and write it there."""
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": [], "memory": {}}
    done |= {"command": "python -m ch06_finetune.lora", "threads": torch.get_num_threads()}
    for kind in (kind for kind in kinds if kind not in done["memory"]):
        row = Row(f"memory of {kind}", "ch06_finetune.lora", {kind: "step_of_smollm2"}, kind, 1, "steps")
        found = measure(row, rounds=1)[kind]
        done["memory"][kind] = {"peak_bytes": found.memory, "seconds": found.wall[0]}
        write_text(path, json.dumps(done, indent=1) + "\n")
    start, tokens = storyteller_and_plays()
    now = losses_on(start, tokens)
    if abs((was := done.setdefault("start", now))["tales"] - now["tales"]) > 1e-3:
        raise ValueError(f"{short_path(path)} was made from another storyteller: {was['tales']:.4f} nats on the tales, "
                         f'this one {now["tales"]:.4f}. Empty its "runs" and remove its "start".')
    settings = [field.name for field in dataclasses.fields(LoRARun)]
    while todo := [run for run in lora_sweep(done["runs"]) if json.loads(json.dumps(dataclasses.asdict(run)))
                   not in [{name: row[name] for name in settings} for row in done["runs"]]]:
        print(todo[0], f"({len(todo)} left)", flush=True)
        done["runs"].append(json.loads(json.dumps(learn_plays(todo[0], start, tokens))))
        write_text(path, json.dumps(done, indent=1) + "\n")


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    record_lora()
