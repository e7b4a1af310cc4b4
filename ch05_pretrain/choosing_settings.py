"""Deep dive: Choosing settings without fooling yourself.

Written from ch05_pretrain/choosing_settings.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "RangeTest",
    "find_learning_rate",
    "NoiseScale",
    "gradient_noise_scale",
    "steps_to_reach",
    "critical_batch_size",
    "visible_difference",
    "chance_of_difference",
]

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ch05_pretrain.pretrain import AdamW, cross_entropy


@dataclass(frozen=True)
class RangeTest:
    """What a learning-rate range test saw: the rates, the smoothed losses, and the rate of the steepest fall."""

    rates: list[float]
    losses: list[float]
    suggestion: float


def find_learning_rate(model: nn.Module, next_batch: Callable[[], tuple[Tensor, Tensor]],
                       make_optimizer: Callable = AdamW, low: float = 1e-5, high: float = 3.0,
                       steps: int = 80, smoothing: float = 0.8) -> RangeTest:
    """Train a copy of the model with a rate that grows from ``low`` to ``high``; the model itself stays as it is.

    next_batch() -> inputs, targets for ``cross_entropy(model(inputs), targets)``; make_optimizer(parameters, lr).
    Stops early when the smoothed loss is 1.5 times its best, or no number. Smith 2015, section 3.3; the steepest
    fall as the suggestion is a custom of fastai's. ``ValueError`` for an empty range or fewer than 10 steps.
    """
    if not 0 < low < high or steps < 10:
        raise ValueError(f"low is {low}, high {high}, steps {steps}; low must be above 0 and below high, steps 10 "
                         "or more.")
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model.parameters(), lr=low)
    rates, losses, average = [], [], 0.0
    for step in range(steps):
        rate = low * (high / low) ** (step / (steps - 1))
        optimizer.param_groups[0]["lr"] = rate
        inputs, targets = next_batch()
        loss = cross_entropy(model(inputs), targets)
        average = smoothing * average + (1 - smoothing) * loss.item()
        smooth = average / (1 - smoothing ** (step + 1))  # the bias correction of chapter 5
        if not math.isfinite(smooth) or (losses and smooth > 1.5 * min(losses)):
            break
        rates.append(rate)
        losses.append(smooth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if len(losses) < 3:
        raise ValueError(f"The loss exploded after {len(losses)} steps, at a rate of {rate:.2g}: "
                         f"lower low (now {low}).")
    slopes = np.gradient(np.array(losses), np.log(rates))
    return RangeTest(rates, losses, float(rates[int(np.argmin(slopes))]))


@dataclass(frozen=True)
class NoiseScale:
    """The squared length of the true gradient, the variance of one window's, and their quotient, in windows."""

    signal: float
    noise: float
    scale: float


def gradient_noise_scale(model: nn.Module, next_batch: Callable[[int], tuple[Tensor, Tensor]], small: int = 4,
                         big: int = 64, repeats: int = 4, loss: Callable = cross_entropy) -> NoiseScale:
    """The simple noise scale tr(Sigma) / |G|^2 of a model as it is, without changing it.

    next_batch(n) -> n windows and their targets. Each repeat takes ``big`` windows in pieces of ``small`` and
    compares the squared lengths of the pieces' gradients with that of their mean; both estimates are unbiased.
    McCandlish et al. 2018, appendix A.1. A signal that drowns altogether gives an infinite scale.
    ``ValueError`` unless small is below big and divides it.
    """
    if not 0 < small < big or big % small or repeats < 1:
        raise ValueError(f"small is {small}, big {big}, repeats {repeats}; small must divide big and be less, "
                         "repeats at least 1.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    small_square, big_square = [], []
    for _ in range(repeats):
        mean = 0.0
        for _ in range(big // small):
            inputs, targets = next_batch(small)
            gradients = torch.autograd.grad(loss(model(inputs), targets), parameters)
            gradient = torch.cat([g.flatten() for g in gradients])
            small_square.append(gradient.square().sum().item())
            mean = mean + gradient / (big // small)
        big_square.append(mean.square().sum().item())
    few, many = float(np.mean(small_square)), float(np.mean(big_square))
    signal = (big * many - small * few) / (big - small)
    noise = (few - many) / (1 / small - 1 / big)
    return NoiseScale(signal, noise, noise / signal if signal > 0 else math.inf)


def steps_to_reach(losses: Sequence[float], target: float, width: int = 1) -> int | None:
    """The first step (from 1) at which the mean of the last ``width`` losses is at most ``target``, or None."""
    means = np.convolve(losses, np.ones(width) / width, "valid") if len(losses) >= width else np.array([])
    below = np.nonzero(means <= target)[0]
    return int(below[0]) + width if len(below) else None


def critical_batch_size(batch_sizes: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """(critical batch size, least number of steps) from the steps that each batch size needed for one loss.

    Fits steps = least (1 + critical / batch) by least squares of the relative errors. McCandlish et al. 2018,
    equation 2.11. ``ValueError`` for fewer than two batch sizes, or if the steps do not fall as batches grow.
    """
    if len(batch_sizes) != len(steps) or len(set(batch_sizes)) < 2:
        raise ValueError(f"{len(batch_sizes)} batch sizes and {len(steps)} numbers of steps; give at least two "
                         "different sizes with one number each.")
    inverse, steps = 1 / np.asarray(batch_sizes, float), np.asarray(steps, float)
    rows = np.stack([np.ones_like(inverse), inverse], axis=1) / steps[:, None]
    least, slope = np.linalg.lstsq(rows, np.ones_like(steps), rcond=None)[0]
    if least <= 0 or slope <= 0:
        raise ValueError(f"Steps {steps.tolist()} for batches {list(batch_sizes)} do not follow the law: "
                         "they must fall as batches grow, but less than in proportion.")
    return float(slope / least), float(least)


def visible_difference(spread: float, seeds: int) -> float:
    """The smallest difference of two means that is worth believing, given the spread between seeds.

    spread: standard deviation between seeds; seeds: runs of each setting. Three standard deviations of the
    difference, which chance alone exceeds less than once in a hundred times if it is bell-shaped.
    ``ValueError`` for no seeds or a negative spread.
    """
    if seeds < 1 or spread < 0:
        raise ValueError(f"seeds is {seeds} and spread {spread}; seeds must be at least 1, spread not negative.")
    return 3 * spread * math.sqrt(2 / seeds)


def chance_of_difference(a: Sequence[float], b: Sequence[float], paired: bool = False) -> float:
    """How often chance alone gives means that differ at least as much as those of ``a`` and ``b``: 0 to 1.

    An exact permutation test (Fisher 1935, chapter 3): all ways to deal out the results, or with ``paired`` (a[i]
    and b[i] share a seed) all signs of the differences. ``ValueError`` for fewer than two results of a kind,
    unequal numbers of paired ones, or so many that the ways exceed a million.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        raise ValueError(f"{len(a)} and {len(b)} results; give at least 2 of each, and as many if they are paired.")
    ways = 2 ** len(a) if paired else math.comb(len(a) + len(b), len(a))
    if ways > 1_000_000:
        raise ValueError(f"{ways:,} ways to deal out the results; at most 1,000,000. Give fewer of them.")
    if paired:
        signs = np.array(list(itertools.product((1, -1), repeat=len(a))))
        means = (signs * (a - b)).mean(axis=1)
    else:
        together = np.concatenate([a, b])
        deals = itertools.combinations(range(len(together)), len(a))
        sums = np.array([together[list(chosen)].sum() for chosen in deals])
        means = sums / len(a) - (together.sum() - sums) / len(b)
    return float(np.mean(np.abs(means) >= abs(a.mean() - b.mean()) - 1e-12))
