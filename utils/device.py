"""The one place that chooses where tensors live, and the check that the choice computes correctly."""

from __future__ import annotations

import copy
import os

import torch


def wanted_device() -> str:
    """The name in ``COURSE_DEVICE``, else "cuda" where there is one, else "cpu"."""
    return os.environ.get("COURSE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU; ``COURSE_DEVICE`` (cpu, cuda, cuda:1, mps) overrides.

    Prints what it chose. Apple's MPS is taken only when asked for, because its results have been
    silently wrong in several PyTorch releases: see ``compare_with_cpu``.
    """
    wanted = wanted_device()
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except Exception as error:
        raise ValueError(
            f"COURSE_DEVICE={wanted!r} cannot be used here: {str(error).splitlines()[0]} "
            "Use cpu, cuda or mps, or unset it."
        ) from error
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' * (threads > 1)}"
    else:
        name = device.type.upper()
    print(f"Running on {name} · PyTorch {torch.__version__.split('+')[0]}")
    return device


def compare_with_cpu(model: torch.nn.Module, inputs: torch.Tensor, device: torch.device,
                     tolerance: float = 1e-3) -> float:
    """Run one forward and backward pass on ``device`` and on the CPU; the largest relative difference.

    ``model`` maps ``inputs`` to a tensor. Differences are relative to the largest entry of each
    tensor. Raises ``ArithmeticError`` above ``tolerance``; dropout is off while comparing.
    """
    def gradients(place):
        twin = copy.deepcopy(model).to(place).eval()
        output = twin(inputs.to(place))
        output.float().square().mean().backward()
        found = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        return {"the output": output.detach(), **found}

    reference, measured, worst = gradients("cpu"), gradients(device), 0.0
    for name, expected in reference.items():
        scale = expected.abs().max().clamp_min(1e-12)
        difference = ((measured[name].cpu().float() - expected.float()).abs().max() / scale).item()
        worst = max(worst, difference)
        if not difference <= tolerance:
            raise ArithmeticError(
                f"{device} disagrees with the CPU: {name} differs by {difference:.1e} of its largest "
                f"value (bound {tolerance:.0e}). Do not train on it: set COURSE_DEVICE=cpu, or update PyTorch."
            )
    print(f"{device} agrees with the CPU: forward and backward differ by at most {worst:.1e}")
    return worst
