"""Measuring contenders side by side: interleaved rounds, medians with their spread, CPU time, memory.

Each contender lives in a process of its own, so that neither memory nor threads of one count for
another. The rounds go round: first contender, second, ..., first again; a slow minute of the machine
then falls on all of them. This file knows how to measure; what is measured stands in ``tests/bench_*.py``,
and ``bench_report.py`` says what came out.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .progress import progress

COURSE = "this course"
MACHINE = "this machine"  # a contender of this name is no peer: the least that the machine needs for such work


@dataclass(frozen=True)
class Contender:
    """What one process does: ``function`` of ``module``, called with ``argument``, returns what is timed.

    That may have a function ``check`` as its attribute, called after the clock has stopped.
    """

    module: str
    function: str
    argument: object


@dataclass(frozen=True)
class Aim:
    """What ``who`` is to reach at least: so many ``times`` as fast as the fastest peer by the clock (``cpu times``:
    in processor time), such a ``share`` of the limit, or such a ``rate`` in the row's unit per second."""

    kind: str
    least: float
    who: str = COURSE

    def __post_init__(self):
        if self.kind not in ("times", "cpu times", "share", "rate"):
            raise ValueError(f"kind is {self.kind!r}; it must be times, cpu times, share or rate.")


@dataclass(frozen=True)
class Row:
    """One piece of work and who does it.

    ``contenders`` names functions of ``module``: each is called with ``argument``, prepares (not timed) and
    returns the function that is timed. ``size`` is how much work that is, in ``unit``. ``limits`` are jobs that
    do only what the work cannot do without, or read and multiply at the machine's own rate: everybody else is
    given as a share of their rate. Long work takes at most ``rounds`` rounds, and with ``warm_up=False`` no
    round before them: its functions warm up on something small as they prepare.
    """

    work: str
    module: str
    contenders: Mapping[str, str]
    argument: object
    size: float
    unit: str
    aims: Sequence[Aim] = ()
    limits: Mapping[str, Contender] = field(default_factory=dict)
    rounds: int | None = None
    warm_up: bool = True

    def jobs(self) -> dict[str, Contender]:
        ours = {name: Contender(self.module, function, self.argument) for name, function in self.contenders.items()}
        return ours | {f"{MACHINE}, {name}".rstrip(", "): job for name, job in self.limits.items()}


@dataclass(frozen=True)
class Growth:
    """How the cost of one work grows: ``functions`` of ``module`` by name, each called with every one of ``sizes``.

    ``expected`` is the exponent that the course claims for each name: 1 for linear. ``flat_memory`` claims that
    the peak of the largest size is hardly above that of the smallest.
    """

    work: str
    module: str
    functions: Mapping[str, str]
    sizes: Sequence[float]
    unit: str
    expected: Mapping[str, float]
    flat_memory: bool = False
    rounds: int | None = 3

    def jobs(self) -> dict[tuple[str, float], Contender]:
        return {(name, size): Contender(self.module, function, size)
                for size in self.sizes for name, function in self.functions.items()}


@dataclass(frozen=True)
class Measurement:
    """Seconds of each round, on the clock and on all cores together, and peak memory in bytes."""

    wall: list[float]
    cpu: list[float]
    memory: int


def measure(jobs: Mapping, rounds: int = 5, title: str = "", warm_up: bool = True) -> dict:
    """Run jobs in turn, one warm-up and then ``rounds`` times: measurements by the jobs' names."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1, and 5 for a median worth the name.")
    context = multiprocessing.get_context("spawn")
    workers: dict = {}
    timings: dict = {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            here, there = context.Pipe()
            process = context.Process(target=_contend, args=(there, job), daemon=True)
            process.start()
            there.close()
            workers[name] = process, here
        for name, (process, pipe) in workers.items():
            _ask(process, pipe, f"{title}, {name}")  # everybody is prepared before anybody is timed
        order = [name for _ in range(rounds + warm_up) for name in jobs]
        for name in progress(order, title[:40], unit="run"):
            process, pipe = workers[name]
            pipe.send("run")
            timings[name].append(_ask(process, pipe, f"{title}, {name}"))
    finally:
        for _, pipe in workers.values():
            pipe.close()  # the process sees the end of the pipe and leaves
        for process, _ in workers.values():
            process.join(5)
            process.terminate()
    return {name: Measurement([t[0] for t in runs[warm_up:]], [t[1] for t in runs[warm_up:]],
                              max(t[2] for t in runs)) for name, runs in timings.items()}


def _ask(process, pipe, name: str):
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join(10)
        answer = f"its process ended with exit code {process.exitcode}"
    if isinstance(answer, str):
        raise RuntimeError(f"{name}: {answer}")
    return answer


def _contend(pipe, job: Contender) -> None:
    """What a contender's process does: prepare once, then one timed run for each message."""
    try:
        timed = getattr(importlib.import_module(job.module), job.function)(job.argument)
        pipe.send(None)
        while pipe.recv():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            timed()
            took = time.perf_counter() - wall, time.process_time() - cpu
            if check := getattr(timed, "check", None):
                check()  # whether the work was done; not timed
            pipe.send((*took, peak_memory_bytes()))
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):  # another contender has failed already
            pipe.send(f"{type(error).__name__}: {error}")


def peak_memory_bytes() -> int:
    if sys.platform == "linux":  # getrusage would count what the parent had when it started this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def machine() -> dict[str, str | int]:
    """What these figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"processor": model, "cores": cores, "system": platform.system(), "python": platform.python_version()}


# ---------------------------------------------------------------- what the figures say


def is_peer(name: str) -> bool:
    return not name.startswith((COURSE, MACHINE))


def times_as_fast(measured: Mapping[str, Measurement], who: str = COURSE) -> dict[str, float]:
    """How many times as fast as the fastest peer ``who`` is, by the clock and in CPU time; {} without a peer."""
    peers = [m for name, m in measured.items() if is_peer(name)]
    return {kind: min(statistics.median(getattr(m, kind)) for m in peers)
            / statistics.median(getattr(measured[who], kind)) for kind in ("wall", "cpu")} if peers else {}


def shares(measured: Mapping[str, Measurement]) -> dict[str, dict[str, float]]:
    """For each limit: its time as a share of everybody else's, by the clock."""
    bare = {name: m for name, m in measured.items() if name.startswith(MACHINE)}
    return {limit: {name: statistics.median(fastest.wall) / statistics.median(m.wall)
                    for name, m in measured.items() if name not in bare} for limit, fastest in bare.items()}


def reached(row: Row, measured: Mapping[str, Measurement], aim: Aim) -> float:
    """What stands against ``aim.least``."""
    if aim.kind == "rate":
        return row.size / statistics.median(measured[aim.who].wall)
    if aim.kind == "share":
        return max(share[aim.who] for share in shares(measured).values())
    return times_as_fast(measured, aim.who)["cpu" if aim.kind == "cpu times" else "wall"]


def exponent(sizes: Sequence[float], measured: Sequence[Measurement]) -> tuple[float, float, float]:
    """The slope of log seconds over log size: (of the medians, least and most of any round)."""
    logs = np.log(sizes)
    rounds = np.log([m.wall for m in measured])  # (sizes, rounds)
    slopes = np.polyfit(logs, rounds, 1)[0]
    return float(np.polyfit(logs, np.median(rounds, axis=1), 1)[0]), float(slopes.min()), float(slopes.max())
