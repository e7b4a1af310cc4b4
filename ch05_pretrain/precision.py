"""Deep dive: Precision and speed.

Written from ch05_pretrain/precision.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "FORMATS",
    "number_bits",
    "bits_value",
    "survival",
    "take_turns",
    "print_turns",
]

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor


FORMATS = {torch.float32: (8, 23), torch.bfloat16: (8, 7), torch.float16: (5, 10)}  # bits of exponent and of fraction


def number_bits(x: float, dtype: torch.dtype) -> str:
    """The bits of ``x`` as a format stores it: "sign exponent fraction". ``ValueError`` for an unknown format."""
    if dtype not in FORMATS:
        raise ValueError(f"The format {dtype} is not known here; there are {', '.join(map(str, FORMATS))}.")
    size, (exponent, _) = 8 * dtype.itemsize, FORMATS[dtype]
    raw = torch.tensor(x, dtype=torch.float64).to(dtype).view({32: torch.int32, 16: torch.int16}[size]).item()
    bits = format(raw % 2**size, f"0{size}b")
    return f"{bits[0]} {bits[1 : 1 + exponent]} {bits[1 + exponent :]}"


def bits_value(bits: str) -> float:
    """The number that "sign exponent fraction" stands for. IEEE 754-2019, section 3.4."""
    sign, exponent, fraction = bits.split()
    bias, power = 2 ** (len(exponent) - 1) - 1, int(exponent, 2)
    part = int(fraction, 2) / 2 ** len(fraction)
    if "0" not in exponent:
        size = float("nan") if part else float("inf")
    elif power:
        size = (1 + part) * 2.0 ** (power - bias)
    else:  # the smallest ones have no leading 1, and fewer and fewer digits
        size = part * 2.0 ** (1 - bias)
    return -size if sign == "1" else size


def survival(values: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Shares of the non-zero numbers of a tensor that a format keeps "whole", or makes "coarse", "zero", "infinite".

    Coarse are those below the smallest normal number, which keep fewer digits. ``ValueError`` if all are zero.
    """
    values = values.detach().double().flatten()
    values = values[values != 0]
    if not len(values):
        raise ValueError("All numbers are zero: there is nothing to keep. Give a tensor with others.")
    stored = values.to(dtype).double().abs()
    shares = {"zero": stored == 0, "coarse": (stored > 0) & (stored < torch.finfo(dtype).smallest_normal),
              "infinite": torch.isinf(stored)}
    shares = {name: found.double().mean().item() for name, found in shares.items()}
    return {"whole": 1 - sum(shares.values()), **shares}


def take_turns(actions: Mapping[str, Callable[[], object]], rounds: int = 9,
               finish: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Median seconds of each action, all of them run once in every round, after one round that is not counted.

    ``finish`` is called before the clock stops; on a GPU it must wait for the work (``torch.cuda.synchronize``).
    ``ValueError`` for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1, and a median wants more.")
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            finish()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def print_turns(seconds: Mapping[str, float], unit: float = 1e-3, label: str = "ms") -> None:
    """One line for each action: its time, and how many times as fast as the first it is."""
    first = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"{name:42} {value / unit:9.2f} {label}   {first / value:5.2f} times as fast")
