"""The machine itself: how fast it multiplies, reads memory and disk, and scans text, whatever the program."""

import os

import numpy as np
import regex
import torch

from ch02_tokenizer.tokenizer import GPT2_PATTERN
from utils.bench import Contender, Row
from utils.workspace import workspace

SIDE = 1024  # of the square matrices


def rows(quick: bool = False) -> list[Row]:
    """What every bench is held against, measured by itself."""
    flops, memory, disk, text = (1e10, 2e8, 2e7, 2e5) if quick else (4e11, 8e9, 4e8, 5e6)

    def row(work, function, argument, size, unit):
        return Row(work, __name__, {}, None, size, unit, limits={"": limit(function, argument)})
    return [
        row("Matrix products, float32", "multiply_float32", flops, flops / 1e9, "GFLOP"),
        row("Matrix products, bfloat16", "multiply_bfloat16", flops, flops / 1e9, "GFLOP"),
        row("Reading memory", "read_memory", (min(memory, 5e8), memory), memory / 1e9, "GB"),
        row("Writing to disk until it is safe", "write_disk", disk, disk / 1e6, "MB"),
        row("Reading from disk, not from its cache", "read_disk", disk, disk / 1e6, "MB"),
        row("Cutting text by GPT-2's regular expression", "scan", text, text / 1e6, "MB"),
    ]


def limit(function: str, argument) -> Contender:
    """A job of this file, as a limit for a row of another."""
    return Contender(__name__, function, argument)


def multiply_float32(flops: float, dtype=torch.float32):
    """About ``flops`` operations (a multiplication and an addition are two) in products of 1,024 x 1,024."""
    left, right = torch.randn(2, SIDE, SIDE).to(dtype)

    def run():
        for _ in range(max(1, round(flops / (2 * SIDE**3)))):
            torch.mm(left, right)
    return run


def multiply_bfloat16(flops: float):
    return multiply_float32(flops, torch.bfloat16)


def read_memory(argument: tuple[float, float]):
    """Read ``(size, total)`` bytes: an array of so many, again and again until there are so many in all."""
    size, total = argument
    array = torch.ones(round(size / 4))

    def run():
        for _ in range(max(1, round(total / size))):
            array.sum()
    return run


def write_disk(size: float):
    block = np.random.default_rng(0).integers(0, 256, round(size), dtype=np.uint8).tobytes()
    path = workspace("bench") / "disk.bin"

    def run():
        with open(path, "wb") as file:
            file.write(block)
            os.fsync(file.fileno())
        path.unlink()
    return run


def read_disk(size: float):
    """Where the system cannot be told to forget a file (macOS, Windows), this reads its cache."""
    path = workspace("bench") / "disk-read.bin"
    with open(path, "wb") as file:
        file.write(os.urandom(round(size)))
        os.fsync(file.fileno())

    def run():
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 22):
                pass
    return run


def scan(size: float):
    """Cut ``size`` bytes of the course's text into words, one core, and keep none of them."""
    from tests.bench_tokenizer import texts  # which imports this file

    pieces, find = texts(round(size)), regex.compile(GPT2_PATTERN).finditer

    def run():
        for text in pieces:
            for _ in find(text):
                pass
    return run
