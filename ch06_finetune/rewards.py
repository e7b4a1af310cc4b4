"""Deep dive: Learning from rewards.

Written from ch06_finetune/rewards.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "kl_estimate",
    "RewardSettings",
    "Ask",
    "Check",
    "train_on_rewards",
    "neighbours_in_order",
    "exam_share",
    "record_seeds",
]

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ch06_finetune.finetune import (
    SORT_STOP, crowd_sorter, group_advantages, grpo_loss, is_sorted, sample_answers, sorting_questions,
    token_log_probs,
)
from ch06_finetune.previous_chapters import GPT, AdamW, clip_grad_norm
from utils.progress import progress
from utils.workspace import write_text


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) in nats from each drawn token, 0 or more: two tensors of one shape.

    No gradient flows into the reference. Schulman 2020 (Approximating KL Divergence), the estimator k3.
    """
    difference = reference_log_probs.detach() - log_probs
    return difference.exp() - difference - 1


@dataclass(frozen=True)
class RewardSettings:
    """How to learn from rewards: ``questions`` times ``group_size`` answers a step, ``updates`` updates with them.

    ``kl_price`` is the price of a nat of divergence from the start, a token. ``ValueError`` for what makes no run.
    """

    steps: int = 70
    questions: int = 16
    group_size: int = 8
    updates: int = 2
    max_new_tokens: int = 10
    lr: float = 3e-4
    clip: float = 0.2
    kl_price: float = 0.0
    seed: int = 1

    def __post_init__(self):
        for name, least in (("steps", 1), ("questions", 1), ("group_size", 2), ("updates", 1),
                            ("max_new_tokens", 1), ("kl_price", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0. 3e-4 is a start for small models.")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip is {self.clip}; it must lie between 0 and 1. 0.2 is a common choice.")


Ask = Callable[[int, torch.Generator], Tensor]  # (n, generator) -> prompts (n, P), all of one length
Check = Callable[[Tensor, Tensor], Tensor]  # prompts (N, P), answers (N, T) -> rewards (N,)


def train_on_rewards(policy: GPT, ask: Ask, check: Check, stop_id: int, settings: RewardSettings,
                     on_step: Callable[[int], None] = lambda step: None) -> dict[str, list[float]]:
    """GRPO in place, without dropout: the mean "reward" and the "divergence" of each step's answers.

    The reference is the policy as it comes; the divergence is the mean log ratio to it in nats a token.
    ``on_step(step)`` is called before each step. ``ValueError`` if the check does not give a number for each
    answer. Shao et al. 2024 (arXiv:2402.03300), algorithm 1.
    """
    reference = copy.deepcopy(policy.eval()).requires_grad_(False)
    optimizer = AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    generator = torch.Generator(policy.device).manual_seed(settings.seed)
    history: dict[str, list[float]] = {"reward": [], "divergence": []}
    for step in progress(range(settings.steps), "learning from rewards", unit="step"):
        on_step(step)
        prompts = ask(settings.questions, generator).repeat_interleave(settings.group_size, dim=0)
        answers, mask = sample_answers(policy, prompts, settings.max_new_tokens, stop_id, generator=generator)
        rewards = check(prompts, answers)
        if rewards.shape != answers.shape[:1]:
            raise ValueError(f"The check gave rewards of shape {tuple(rewards.shape)} for {len(answers)} answers; it "
                             f"must give one number for each, ({len(answers)},).")
        advantages = group_advantages(rewards, settings.group_size).to(answers.device)
        with torch.no_grad():
            drawn_with, at_start = (token_log_probs(model, prompts, answers) for model in (policy, reference))
        history["reward"].append(rewards.float().mean().item())
        history["divergence"].append((drawn_with - at_start)[mask].mean().item())
        for _ in range(settings.updates):
            now = token_log_probs(policy, prompts, answers)
            loss = grpo_loss(now, drawn_with, advantages, mask, settings.clip)
            loss = loss + settings.kl_price * kl_estimate(now, at_start)[mask].mean()
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm(policy.parameters(), 1.0)
            optimizer.step()
    return history


def neighbours_in_order(questions: Tensor, answers: Tensor) -> Tensor:
    """A reward that can be gamed: neighbouring digits of each answer (B, T) that do not fall, divided by 5."""
    before_end = (answers == SORT_STOP).cumsum(dim=1) == 0
    pairs = (answers[:, 1:] >= answers[:, :-1]) & before_end[:, 1:]
    return pairs.sum(dim=1) / 5


def exam_share(model: GPT, n: int = 300) -> float:
    """The share of right answers to ``n`` held-out questions at temperature 1."""
    questions = sorting_questions(n, torch.Generator().manual_seed(7), held_out=True)
    return is_sorted(questions, sample_answers(model, questions, 10, SORT_STOP,
                                               generator=torch.Generator().manual_seed(0))[0]).mean().item()


def record_seeds(path: Path, seeds: int = 3) -> None:
    """Rewards and prices from several starts, as JSON: share right before and after, last reward and divergence."""
    rows = []
    for seed in range(seeds):
        start = crowd_sorter(seed=seed)
        for name, check, steps in (("the check", is_sorted, 70), ("pairs in order", neighbours_in_order, 60)):
            for price in (0.0, 0.5):
                settings = RewardSettings(steps=steps, lr=3e-4 if check is is_sorted else 1e-4, kl_price=price,
                                          seed=seed + 1)
                model = copy.deepcopy(start)
                history = train_on_rewards(model, sorting_questions, check, SORT_STOP, settings)
                rows.append({"seed": seed, "reward": name, "kl_price": price, "before": exam_share(start),
                             "after": exam_share(model)}
                            | {f"last_{key}": sum(values[-10:]) / 10 for key, values in history.items()})
                print(rows[-1], flush=True)
    command = ("python -c \"from pathlib import Path; from ch06_finetune.rewards import record_seeds; "
               f"record_seeds(Path('ch06_finetune/records/rewards_seeds.json'), seeds={seeds})\"")
    write_text(path, json.dumps({"command": command, "runs": rows}, indent=1))
