"""Chapter 5: Pretraining.

Written from ch05_pretrain/pretrain.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "cross_entropy",
    "Evaluation",
    "measures",
    "NGramModel",
    "AdamW",
    "orthogonalize",
    "Muon",
    "parameter_groups",
    "cosine_schedule",
    "clip_grad_norm",
    "TrainConfig",
    "History",
    "evaluate",
    "save_checkpoint",
    "checkpoints",
    "differences",
    "load_checkpoint",
    "train_step",
    "replay",
    "log_step",
    "train",
    "STORYTELLER_RUN",
    "pretrain_storyteller",
    "load_storyteller",
]

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .previous_chapters import PRESETS, GPT, BPETokenizer, get_batch, prepare_tokens
from utils.progress import progress
from utils.workspace import explain_disk_error, short_path, workspace, write_text


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean surprise of the right tokens, in nats.

    logits (..., V), targets int64 (...) -> scalar. ``ValueError`` if the shapes do not go together.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, "
                         f"not {tuple(targets.shape)}: one right token for each position.")
    right = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (torch.logsumexp(logits, dim=-1) - right).mean()


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
    uniform distribution, so that every token has a probability.
    """

    def __init__(self, tokens: Sequence[int], order: int, vocab_size: int, discount: float = 0.75):
        if order < 1 or len(tokens) < order:
            raise ValueError(f"order is {order} with {len(tokens)} tokens; it must be from 1 to the number of tokens.")
        self.order, self.vocab_size, self.discount = order, vocab_size, discount
        tokens = [int(t) for t in tokens]
        self.counts = [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, order + 1)]
        self.followed, self.different = Counter(), Counter()
        for grams in self.counts:
            for gram, count in grams.items():
                self.followed[gram[:-1]] += count
                self.different[gram[:-1]] += 1

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        """The probability of ``token`` after ``context`` (at most order - 1 tokens)."""
        below = self.probability(token, context[1:]) if context else 1.0 / self.vocab_size
        total = self.followed[context]
        if not total:
            return below
        seen = max(self.counts[len(context)][(*context, token)] - self.discount, 0.0)
        return (seen + self.discount * self.different[context] * below) / total

    def loss(self, tokens: Sequence[int]) -> float:
        """Mean surprise of a text in nats per token."""
        tokens = [int(t) for t in tokens]
        contexts = (tuple(tokens[max(0, i - self.order + 1) : i]) for i in range(len(tokens)))
        return -sum(math.log(self.probability(t, c)) for t, c in zip(tokens, contexts, strict=True)) / len(tokens)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay. Loshchilov and Hutter 2019, algorithm 2.

    params: parameters, or groups of them with options of their own; lr: step size;
    betas: how slowly the means of gradients and of their squares forget; weight_decay: share of
    each weight that is taken off per step, times lr.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1):
        if lr < 0 or not all(0 <= beta < 1 for beta in betas):
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
    """The matrix with its singular values pushed to about 1 by a Newton-Schulz iteration: (m, n) -> (m, n).

    Jordan et al. 2024 (Muon), whose coefficients reach 0.7 to 1.2 in five steps rather than exactly 1 in more.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)  # now no singular value is above 1
    x = x.mT if matrix.size(0) > matrix.size(1) else x
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if matrix.size(0) > matrix.size(1) else x


class Muon(AdamW):
    """Orthogonalised running mean of the gradient for the groups marked ``orthogonal``, AdamW for the others.

    Jordan et al. 2024. ``lr`` of an orthogonal group is the size of the step along every direction; tall
    matrices get more of it.
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
        direction = orthogonalize(p.grad.lerp(state["mean"], 0.95))  # looks one step ahead (Nesterov)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(direction, alpha=-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


def parameter_groups(model: GPT, weight_decay: float, matrix_lr_scale: float = 1.0) -> list[dict]:
    """Three groups for ``Muon``: matrices of the blocks, embeddings, and vectors, which do not decay.

    ``lr_scale`` of a group multiplies the scheduled learning rate.
    """
    inside = {id(p) for p in model.blocks.parameters()}
    matrices = [p for p in model.parameters() if p.dim() >= 2 and id(p) in inside]
    tables = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in inside]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay, "orthogonal": True, "lr_scale": matrix_lr_scale},
            {"params": tables, "weight_decay": weight_decay, "orthogonal": False, "lr_scale": 1.0},
            {"params": vectors, "weight_decay": 0.0, "orthogonal": False, "lr_scale": 1.0}]


def cosine_schedule(step: int, max_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up to ``max_lr``, then a cosine down to ``min_lr``.

    Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * done))


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients in place so that their joint length is at most ``max_norm``; the length before.

    Pascanu, Mikolov and Bengio 2013, section 3.2.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm.item()


@dataclass(frozen=True)
class TrainConfig:
    """The choices of a training run. Lengths in tokens, rates per step, ``*_every`` in steps."""

    steps: int = 1000
    batch_size: int = 4
    context_length: int = 256
    max_lr: float = 5e-3  # embeddings and vectors
    matrix_lr: float = 0.02  # matrices of the blocks, by Muon
    min_lr: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    eval_every: int = 100
    eval_tokens: int = 8192
    save_every: int = 100
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "context_length", "max_lr", "matrix_lr", "max_grad_norm",
                     "eval_every", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must be from 0 to max_lr {self.max_lr}.")


@dataclass
class History:
    """What a run recorded: losses in nats per token, by step; it goes into checkpoints as JSON."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)


@torch.no_grad()
def evaluate(model: GPT, tokens, n_bytes: int | None = None, *, context_length: int | None = None,
             batch_size: int = 16, max_tokens: int | None = None) -> Evaluation:
    """How well the model predicts a text given as token ids (array or tensor, 1-D).

    ``n_bytes``: UTF-8 bytes of the whole text, for bits per byte. ``max_tokens`` looks at the beginning only.
    ``ValueError`` for fewer than two tokens.
    """
    length = context_length or model.config.context_length
    chosen = torch.as_tensor(np.asarray(tokens[: max_tokens or len(tokens)]).astype(np.int64), device=model.device)
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
            total += cross_entropy(model(x), y).item() * y.numel()
    model.train(was_training)
    share = len(chosen) / len(tokens)
    return measures(total / (len(chosen) - 1), len(chosen), n_bytes and n_bytes * share)


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
                    generator: torch.Generator, config: TrainConfig, history: History, keep: int = 2) -> Path:
    """Write ``folder/step-000123`` whole or not at all, and keep the newest ``keep`` of them.

    Holds weights, optimizer state, both random states, step, configurations and history.
    ``OSError`` says what to do if the disk is full; earlier checkpoints stay.
    """
    tensors = {f"model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    tensors.update({"random.batches": generator.get_state(), "random.torch": torch.get_rng_state()})
    numbers = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.cpu().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    record = {"format": "bytes-to-chat checkpoint 1", "step": step, "optimizer": numbers,
              "model_config": dataclasses.asdict(model.config), "train_config": dataclasses.asdict(config),
              "history": dataclasses.asdict(history)}
    target, temporary = Path(folder) / f"step-{step:06}", Path(folder) / f".step-{step:06}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "state.safetensors")
        write_text(temporary / "state.json", json.dumps(record))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise explain_disk_error(error, target) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(Path(folder).glob("step-[0-9]*"))


def differences(saved: dict, here: dict) -> str:
    """The entries in which two configurations differ, for an error message."""
    return "; ".join(f"{name} was {saved.get(name)!r}, is {here.get(name)!r}"
                     for name in {**saved, **here} if saved.get(name) != here.get(name))


@torch.no_grad()
def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer,
                    generator: torch.Generator, config: TrainConfig) -> tuple[int, History]:
    """Put a run back as it was when ``path`` was written: (steps done, history).

    ``ValueError`` names what differs if the checkpoint belongs to another model or other settings, or is damaged.
    """
    try:
        record = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
        with safe_open(Path(path) / "state.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"The checkpoint {short_path(path)} cannot be read ({error}). Delete it: "
                         "training then goes on from the one before, or from the start.") from error
    then = {"model_config": dataclasses.asdict(model.config.from_dict(record["model_config"])),  # older ones hold
            "train_config": record["train_config"]}                                            # fewer keys
    for name, here in (("model_config", model.config), ("train_config", config)):
        here = json.loads(json.dumps(dataclasses.asdict(here)))
        if then[name] != here:
            raise ValueError(f"The checkpoint {short_path(path)} is of another run: {differences(then[name], here)}. "
                             "Use the same settings, or another folder, or delete it to begin anew.")
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
    layout = optimizer.state_dict()
    state: dict[int, dict] = {}
    for name, value in [*tensors.items(), *((f"optimizer.{k}", v) for k, v in record["optimizer"].items())]:
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": layout["param_groups"]})
    generator.set_state(tensors["random.batches"])
    torch.set_rng_state(tensors["random.torch"])
    return record["step"], History(**record["history"])


def train_step(model: GPT, optimizer: torch.optim.Optimizer, tokens, config: TrainConfig, step: int,
               generator: torch.Generator) -> tuple[float, float]:
    """One step of training: (loss in nats per token, length of the gradient before clipping)."""
    for group in optimizer.param_groups:
        rate = cosine_schedule(step, config.max_lr, config.min_lr, config.warmup_steps, config.steps)
        group["lr"] = rate * group["lr_scale"]
    inputs, targets = get_batch(tokens, config.batch_size, config.context_length, model.device, generator)
    loss = cross_entropy(model(inputs), targets)
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"The loss became {loss.item()} at step {step + 1}. Lower max_lr (now {config.max_lr}), lengthen the "
            "warm-up, or begin again from the last checkpoint with another seed.")
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm(model.parameters(), config.max_grad_norm)
    optimizer.step()
    return loss.item(), norm


def replay(history: History, on_log: Callable[[str, int, float], None]) -> None:
    """Report a resumed run's past again, so that its curves are whole."""
    for step in range(10, len(history.steps) + 1, 10):
        on_log("training", step, float(np.mean(history.train_loss[step - 10 : step])))
    for step, loss in zip(history.eval_steps, history.val_loss, strict=True):
        on_log("held out", step, loss)


def log_step(history: History, model: GPT, val_tokens, config: TrainConfig, step: int, loss: float, norm: float,
           on_log: Callable[[str, int, float], None]) -> None:
    """Note a finished step; every ``eval_every`` steps, and at the end, evaluate on held-out tokens too."""
    history.steps.append(step)
    history.train_loss.append(loss)
    history.grad_norm.append(norm)
    if step % 10 == 0:
        on_log("training", step, float(np.mean(history.train_loss[-10:])))
    if step % config.eval_every == 0 or step == config.steps:
        result = evaluate(model, val_tokens, max_tokens=config.eval_tokens, context_length=config.context_length)
        history.eval_steps.append(step)
        history.val_loss.append(result.loss)
        on_log("held out", step, result.loss)


def train(model: GPT, train_tokens, val_tokens, config: TrainConfig, *, folder: str | Path | None = None,
          on_log: Callable[[str, int, float], None] = lambda name, step, value: None) -> History:
    """Train in place and return what was recorded; with ``folder``, save checkpoints there and resume from them.

    Tokens are 1-D arrays of ids. ``on_log(name, step, loss)`` is called with "training" and "held out" as the run
    goes. ``FloatingPointError`` if the loss stops being a number.
    """
    optimizer = Muon(parameter_groups(model, config.weight_decay, config.matrix_lr / config.max_lr))
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    done, history = 0, History()
    if folder and checkpoints(folder):
        done, history = load_checkpoint(checkpoints(folder)[-1], model, optimizer, generator, config)
        print(f"Going on from step {done:,} of {config.steps:,} (delete {short_path(folder)} to begin anew).")
        replay(history, on_log)

    def save():
        if folder:
            save_checkpoint(folder, model, optimizer, done, generator, config, history)

    model.train()
    try:
        with progress(description="training", total=config.steps, unit="step") as bar:
            bar.update(done)
            while done < config.steps:
                loss, norm = train_step(model, optimizer, train_tokens, config, done, generator)
                done += 1
                log_step(history, model, val_tokens, config, done, loss, norm, on_log)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                if done % config.save_every == 0 and done < config.steps:
                    save()
    except KeyboardInterrupt:  # perhaps in the middle of a step, and half a step must not be saved
        print(f"Stopped in step {done + 1:,}." + " Run this again to go on from the last checkpoint." * bool(folder))
        raise
    save()
    return history


STORYTELLER_RUN = TrainConfig(steps=1500, batch_size=4, context_length=256, eval_every=150, save_every=50)


def pretrain_storyteller(device: torch.device | str = "cpu", config: TrainConfig = STORYTELLER_RUN,
                         on_log: Callable[[str, int, float], None] = lambda name, step, value: None,
                         ) -> tuple[GPT, BPETokenizer, History]:
    """Train the storyteller on Andersen's tales and keep it in ``workspace/pretrain/storyteller``.

    Interrupted, it goes on from its last checkpoint. Returns model, tokenizer and history.
    """
    data, folder = prepare_tokens("andersen"), workspace("pretrain", "storyteller")
    torch.manual_seed(config.seed)
    model = GPT(PRESETS["storyteller"]).to(device)
    history = train(model, data.train, data.val, config, folder=folder / "checkpoints", on_log=on_log)
    model.eval().save_pretrained(folder)
    data.tokenizer.save(folder / "tokenizer.json")
    write_text(folder / "history.json", json.dumps(dataclasses.asdict(history)))
    shutil.rmtree(folder / "checkpoints")
    return model, data.tokenizer, history


def load_storyteller(device: torch.device | str = "cpu") -> tuple[GPT, BPETokenizer]:
    """The pretrained storyteller and its tokenizer; trains it first (some minutes) if there is none yet."""
    folder = workspace("pretrain", "storyteller")
    if not (folder / "history.json").exists():
        print("There is no pretrained storyteller yet: training it now, once, as chapter 5 does.")
        model, tokenizer, _ = pretrain_storyteller(device)
        return model, tokenizer
    model, tokenizer = GPT.from_pretrained(folder).to(device), BPETokenizer.load(folder / "tokenizer.json")
    print(f"Loaded the storyteller that chapter 5 trained ({short_path(folder)}).")
    return model, tokenizer
