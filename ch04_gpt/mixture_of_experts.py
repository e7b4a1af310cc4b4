"""Deep dive: Many experts, few at work.

Written from ch04_gpt/mixture_of_experts.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "Routing",
    "Router",
    "expert_counts",
    "limit_places",
    "MoE",
    "add_experts",
    "moe_layers",
    "recorded_routing",
    "active_parameters",
    "load_balancing_loss",
    "router_z_loss",
    "update_balance",
]

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ch04_gpt.gpt import GPT, SwiGLU, init_weights


class Routing(NamedTuple):
    """What a router decided for N tokens."""

    logits: Tensor   # (N, E)
    experts: Tensor  # (N, k): the experts of each token
    weights: Tensor  # (N, k): by which their answers are multiplied


class Router(nn.Module):
    """Scores all experts for each token and chooses the best k: x (N, D) -> ``Routing``.

    With k > 1 the weights add up to 1 (Jiang et al. 2024, section 2.1); with k = 1 the weight is the
    probability, or nothing would be learned (Fedus et al. 2021, section 2.1). ``balance`` (E,) takes part in
    the choice and not in the weights (DeepSeek-AI 2024, section 2.1.2).
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k is {top_k}; with {n_experts} experts it must be 1 to {n_experts}.")
        self.top_k = top_k
        self.scores = nn.Linear(d_model, n_experts, bias=False)
        self.register_buffer("balance", torch.zeros(n_experts))

    def forward(self, x: Tensor) -> Routing:
        logits = self.scores(x)
        probabilities = logits.softmax(-1)
        experts = (probabilities + self.balance).topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, experts)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, experts, weights)


def expert_counts(experts: Tensor, n_experts: int) -> Tensor:
    """How many of the chosen places (N, k) each expert has: (E,)."""
    return torch.bincount(experts.flatten(), minlength=n_experts)


def limit_places(order: Tensor, counts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Keep the first ``capacity`` places of each expert: sorted places and counts (E,) -> the same, shorter.

    Who comes later in the text is dropped. Fedus et al. 2021, section 2.2.
    """
    starts = counts.cumsum(0) - counts
    in_queue = torch.arange(len(order), device=order.device) - starts.repeat_interleave(counts)
    return order[in_queue < capacity], counts.clamp(max=capacity)


class MoE(nn.Module):
    """A mixture of experts in place of an MLP: k of E gated MLPs answer each token, (..., D) -> (..., D).

    Shazeer et al. 2017, section 2; Jiang et al. 2024, section 2.1. With ``capacity_factor`` c, an expert takes
    at most c * N * k / E places of N tokens, rounded up; a place beyond is dropped and adds nothing.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int, top_k: int,
                 capacity_factor: float | None = None):
        super().__init__()
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor is {capacity_factor}; it must be above 0, or None for no "
                             "limit.")
        self.router = Router(d_model, n_experts, top_k)
        self.experts = nn.ModuleList(SwiGLU(d_model, d_ff) for _ in range(n_experts))
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, D)
        _, experts, weights = self.router(tokens)
        order = experts.flatten().argsort(stable=True)  # the N * k places, expert by expert
        counts = expert_counts(experts, len(self.experts))
        if self.capacity_factor is not None:
            order, counts = limit_places(order, counts, self.capacity(len(tokens)))
        rows = order // self.router.top_k
        pieces = tokens[rows].split(counts.tolist())
        answers = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces, strict=True)])
        answers = answers * weights.flatten()[order, None]
        return answers.new_zeros(tokens.shape).index_add(0, rows, answers).view_as(x)

    def capacity(self, n_tokens: int) -> int:
        """The most places that an expert takes of ``n_tokens``."""
        fair_share = n_tokens * self.router.top_k / len(self.experts)
        return math.ceil(self.capacity_factor * fair_share)


def add_experts(model: GPT, n_experts: int, top_k: int, d_ff: int | None = None,
                capacity_factor: float | None = None) -> GPT:
    """Put a ``MoE`` in place of every block's MLP, draw all weights anew, and return the model.

    Each expert is ``d_ff`` wide, by default the MLP's width / ``top_k``: a token's arithmetic stays as it was.
    ``ValueError`` if the model has no gated MLPs or its width does not divide.
    """
    config = model.config
    if config.mlp != "swiglu":
        raise ValueError(f"This model's mlp is {config.mlp!r}; the experts are gated MLPs: build it with "
                         "mlp='swiglu'.")
    if d_ff is None and config.d_ff % max(top_k, 1):  # a top_k of 0 is for the router to refuse
        raise ValueError(f"The MLP's width {config.d_ff} does not divide among {top_k} experts: give d_ff.")
    with torch.device(model.device):
        for block in model.blocks:
            block.mlp = MoE(config.d_model, d_ff or config.d_ff // max(top_k, 1), n_experts, top_k, capacity_factor)
    init_weights(model)
    return model


def moe_layers(model: nn.Module) -> list[MoE]:
    """The mixtures of experts of a model, from the first layer to the last."""
    return [module for module in model.modules() if isinstance(module, MoE)]


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Inside ``with recorded_routing(model) as routings``, every router that runs appends its ``Routing``."""
    routings: list[Routing] = []
    hooks = [layer.router.register_forward_hook(lambda module, inputs, routing: routings.append(routing))
             for layer in moe_layers(model)]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


def active_parameters(model: nn.Module) -> int:
    """How many parameters take part in one token: all but those of the experts that were not chosen."""
    resting = sum(parameter.numel() for layer in moe_layers(model)
                  for expert in layer.experts[layer.router.top_k:] for parameter in expert.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - resting


def load_balancing_loss(routing: Routing) -> Tensor:
    """n_experts times the sum of (share of the places) * (mean probability): 1 if even, up to E if not.

    Fedus, Zoph and Shazeer 2021, equations 4 to 6.
    """
    n_experts = routing.logits.size(-1)
    share = expert_counts(routing.experts, n_experts) / routing.experts.numel()
    return n_experts * (share * routing.logits.softmax(-1).mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean squared log of the softmax's denominator, for logits (N, E). Zoph et al. 2022, equation 5."""
    return logits.logsumexp(-1).square().mean()


@torch.no_grad()
def update_balance(router: Router, experts: Tensor, rate: float) -> None:
    """Lower ``balance`` of the experts with more than a fair share of the places (N, k), raise the others.

    In place, by ``rate``. DeepSeek-AI 2024, section 2.1.2; Wang et al. 2024, algorithm 1.
    """
    counts = expert_counts(experts, len(router.balance)).float()
    router.balance += rate * torch.sign(counts.mean() - counts)
