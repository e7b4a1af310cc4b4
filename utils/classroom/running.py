"""Running one submission: every cell in a sandboxed kernel, every test all or nothing.

A cell that kills or hangs the kernel loses its own points only: the kernel is started again and the other cells
run without it. A test counts as passed if its last line was reached and nothing that checks rely on was replaced
before or after it (``guard`` says how that is known, and what it cannot know).
"""

from __future__ import annotations

import ast
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import nbformat
from nbgrader.utils import determine_grade

from .assignments import (
    Assignment,
    defined_names,
    grade_id,
    hidden_lines,
    imported_modules,
    kind,
    shadowed_builtins,
    special_methods,
    used_names,
)
from .guard import NAMES, check_code, given_call, read_report, report_call, setup_code
from .kernel import PATIENCE, Reply, SandboxedKernel
from .sandbox import Limits
from .submissions import Step, runs

RESTARTS = 5
CELL_SHARE = 4  # one cell may take a quarter of a submission's time
LATER_SHARE = 12  # a check a twelfth, once a cell has used up its quarter: a hanging function has many checks
MESSAGE_LETTERS = 1000


@dataclass
class Result:
    """One run: a test's grade_id with its message ("" if it passed), and remarks for the teacher."""

    tests: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class GradedRun:
    """One submission on its way through the sandbox. ``seconds`` of computing are for all of it."""

    def __init__(self, assignment: Assignment, steps: list[Step], limits: Limits, seconds: float,
                 make_kernel: Callable[[], SandboxedKernel]) -> None:
        self.assignment, self.steps, self.limits, self.seconds = assignment, steps, limits, seconds
        self.make_kernel = make_kernel
        self.hidden = hidden_lines(assignment)
        self.own_builtins = shadowed_builtins(assignment)
        self.result = Result()
        self.end, self.left = time.monotonic() + PATIENCE * seconds + 60, seconds  # a minute to start kernels
        self.timeouts, self.slowest = 0, 0.0
        tests = "\n".join(step.source for step in steps if step.kind == "test")
        given = "\n".join(step.source for step in steps if step.kind == "given")
        imported = imported_modules(tests) | imported_modules(given)
        packages = {name.split(".")[0] for name in imported} | {"inspect", "math"}
        self.modules = sorted({name for name in NAMES if name.split(".")[0] in packages}
                              | {name for name in imported if name.startswith("ch0")})

    def run(self) -> Result:
        """Run the steps; start again without a cell that ended the kernel, ``RESTARTS`` times at most."""
        skipped: set[int] = set()
        for _ in range(RESTARTS + 1):
            culprit = self._attempt(skipped)
            if culprit is None:
                break
            skipped.add(culprit)
        for step in self.steps:
            if step.kind == "test" and step.grade_id not in self.result.tests:
                self.result.tests[step.grade_id] = (
                    "This check was not reached: the notebook ended its kernel too often or used up the time "
                    f"for one notebook ({self.seconds:g} s).")
        return self.result

    def _attempt(self, skipped: set[int]) -> int | None:
        """One kernel from the first cell on. Returns the number of the cell that ended it, or None."""
        self.guard, self.key = f"course_{secrets.token_hex(8)}", secrets.token_hex(32)
        kernel = self.make_kernel()
        kernel.start()
        try:
            setup = setup_code(self.guard, self.key, self.modules, special_methods(self.assignment))
            reply = kernel.run(setup, 120)
            if reply.status != "ok":
                reason = f"{reply.status} {reply.name} {reply.message} {kernel.killed}"
                raise RuntimeError(f"The grader's own first cell failed ({reason.strip()}). "
                                   "Are the memory and process limits too low for PyTorch?")
            for number, step in enumerate(self.steps):
                if number in skipped or (step.kind == "test" and step.grade_id in self.result.tests):
                    continue
                if time.monotonic() > self.end or self.left < 0:
                    self._remark("ran out of the time for one notebook")
                    return None
                if not self._step(kernel, step):
                    return number
            return None
        finally:
            kernel.stop()

    def _step(self, kernel: SandboxedKernel, step: Step) -> bool:
        """Run one cell. False if the kernel did not survive it."""
        later = self.timeouts and step.kind in ("test", "own")
        seconds = self.seconds / (LATER_SHARE if later else CELL_SHARE)
        if step.kind == "test":
            message = self._test(kernel, step, seconds)
        else:
            names = sorted(defined_names(step.source)) if step.kind == "given" else []
            reply = kernel.run(step.source, seconds, {"given": given_call(self.guard, names)} if names else None)
            message = self._trouble(kernel, reply, seconds)
            if message and (reply.status in ("timeout", "dead") or out_of_memory(reply)):
                self._remark(f"{step.grade_id or 'a cell of the student'}: {message}")
        alive = kernel.alive() and not kernel.killed
        if step.kind == "test":
            self.result.tests[step.grade_id] = message
        return alive

    def _test(self, kernel: SandboxedKernel, step: Step, seconds: float) -> str:
        """Run a check. Returns "" if it passed, else what the student is told."""
        names = sorted(used_names(step.source) - self.own_builtins)
        before = self._report(kernel, "before", names)
        token = secrets.token_hex(16)
        reply = kernel.run(check_code(step.source, self.guard, token), seconds)
        trouble = self._trouble(kernel, reply, seconds)
        if reply.status in ("timeout", "dead") or out_of_memory(reply):
            self._remark(f"{step.grade_id}: {trouble}")
            return trouble
        after = self._report(kernel, "after", names)
        if before is None or after is None:
            self._remark(f"{step.grade_id}: the guard in the kernel was removed or did not answer")
            return "This check could not be trusted: the notebook changed how its cells are run."
        changed = [name for name in sorted({*before[0], *after[0]}) if matters(name, step.source)]
        if changed:
            self._remark(f"{step.grade_id}: {', '.join(changed)} replaced")
            return (f"This check relies on {', '.join(changed)}, which your notebook replaces. "
                    "Take another name for what is yours.")
        if reply.status == "ok" and after[1] != token:
            self._remark(f"{step.grade_id}: its last line was not reached, although no error was reported")
            return "This check did not run to its last line."
        return trouble if self._points(step, reply) == 0 else ""

    def _points(self, step: Step, reply: Reply) -> float:
        """The points of a test cell by nbgrader's rule, with its outputs cleared of what is merely printed."""
        cell = next(cell for cell in self.assignment.cells if grade_id(cell) == step.grade_id)
        outputs = [] if reply.status == "ok" else [
            nbformat.v4.new_output("error", ename=reply.name, evalue=reply.message, traceback=[])]
        return determine_grade(nbformat.from_dict({**cell, "outputs": outputs}))[0]

    def _report(self, kernel: SandboxedKernel, when: str, names: list[str]) -> tuple[list[str], str] | None:
        challenge = f"{when} {secrets.token_hex(16)}"
        reply = kernel.run("", 20, {"report": report_call(self.guard, challenge, names)})
        return read_report((reply.values or {}).get("report", ""), self.key, challenge)

    def _trouble(self, kernel: SandboxedKernel, reply: Reply, seconds: float) -> str:
        """What a student is told about a cell that did not end well; "" if it did."""
        self.timeouts += reply.status == "timeout"
        self.left, self.slowest = self.left - reply.seconds, max(self.slowest, reply.seconds)
        if kernel.killed:
            return f"The kernel was ended: {kernel.killed}."
        if reply.status == "timeout":
            return f"It ran past its time limit of {seconds:.3g} s. Often: a loop that does not end."
        if reply.status == "dead":
            return "It ended the kernel. Often: a call of exit, or more memory than there is."
        if reply.status == "ok":
            return ""
        if out_of_memory(reply):
            return f"It asked for more memory than a notebook may hold ({self.limits.memory_gb:g} GB)."
        text = reply.message if reply.name == "AssertionError" else f"{reply.name}: {reply.message}"
        text = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text).strip()
        if self._quotes(text):
            self._remark("an error message quoted a hidden test; it was withheld")
            return "The check did not pass. (The message quoted the check and is withheld.)"
        text = text if len(text) <= MESSAGE_LETTERS else text[:MESSAGE_LETTERS] + " ..."
        return text or "The check did not pass."

    def _quotes(self, text: str) -> bool:
        pressed = "".join(text.split())
        return any("".join(line.split()) in pressed for line in self.hidden | self._as_sent())

    def _as_sent(self) -> set[str]:
        """Hidden lines as they look after Python has parsed and written them again."""
        found = set()
        for line in self.hidden:
            try:
                found.add(ast.unparse(ast.parse(line)))
            except (SyntaxError, ValueError):
                continue
        return {line for line in found if len(line) >= 12}

    def _remark(self, text: str) -> None:
        if text not in self.result.remarks:
            self.result.remarks.append(text)


def out_of_memory(reply: Reply) -> bool:
    """Whether a cell failed because the system gave it no more memory, before the watcher saw how much it held."""
    return reply.status == "error" and (reply.name == "MemoryError" or "can't allocate memory" in reply.message)


def matters(changed: str, source: str) -> bool:
    """Whether a check relies on a thing that was replaced.

    A function of a library matters to the checks that name it or use some ``assert_...``, everything else to all.
    """
    words = set(re.findall(r"\w+", source))
    module, _, name = changed.rpartition(".")
    if module in NAMES:
        return name in words or any(word.startswith("assert_") for word in words)
    return True


def solution_steps(assignment: Assignment) -> list[Step]:
    """The assignment with its own solutions, as it is run to see that full marks can be had on this machine."""
    names = {"test": "test", "solution": "solution"}
    return [Step(names.get(kind(cell), "given"), cell.source, grade_id(cell))
            for cell in assignment.cells if runs(cell)]
