"""Deep dive: Preferences, and what they do not say.

Written from ch06_finetune/preferences.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "pairs_by_rule",
    "pair_log_probs",
    "PreferenceRun",
    "train_preferences",
    "Distance",
    "distance_to_reference",
]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ch02_tokenizer.tokenizer import BPETokenizer
from ch04_gpt.gpt import GPT, evaluating, generate
from ch06_finetune.finetune import (
    SMOLLM2_SYSTEM, Preference, batches_by_length, dpo_loss, encode_chat, fine_tune, preference_log_probs,
)


def pairs_by_rule(prompts: Sequence[Sequence[dict]], answers: Sequence[Sequence[str]],
                  score: Callable[[str], float]) -> list[Preference]:
    """A preference for each prompt whose two answers differ in ``score``: the higher one is chosen.

    ``answers`` are two for each prompt. ``ValueError`` if the numbers of prompts and answers differ.
    """
    if len(answers) != len(prompts) or any(len(two) != 2 for two in answers):
        raise ValueError(f"{len(prompts)} prompts have {len(answers)} entries of answers, of the sizes "
                         f"{sorted({len(two) for two in answers})}; give two answers for each prompt.")
    pairs = []
    for prompt, two in zip(prompts, answers, strict=True):
        better, worse = sorted(two, key=score, reverse=True)
        if score(better) > score(worse):
            pairs.append(Preference(prompt, better, worse))
    return pairs


@torch.no_grad()
def pair_log_probs(model: GPT, tokenizer: BPETokenizer, pairs: Sequence[Preference],
                   system_prompt: str | None = SMOLLM2_SYSTEM, batch_size: int = 32) -> Tensor:
    """Summed log-probabilities of all chosen and rejected answers, in batches, without gradients: (2, N)."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].chosen) + len(pairs[i].rejected))
    found = torch.zeros(2, len(pairs))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found[:, batch] = torch.stack(preference_log_probs(
                model, tokenizer, [pairs[i] for i in batch], system_prompt)).cpu()
    return found


@dataclass
class PreferenceRun:
    """What ``train_preferences`` saw: the loss of every step, and means over held-out pairs at ``steps``.

    ``margin``: beta times (gain of the chosen - gain of the rejected answer), ``accuracy``: share of pairs
    with a margin above 0, ``chosen`` and ``rejected``: the gains in nats, against the reference.
    """

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)

    def add(self, step: int, gains: Tensor, beta: float) -> None:
        """Note the gains (2, N) of held-out pairs after ``step`` steps."""
        chosen, rejected = gains
        self.steps.append(step)
        self.margin.append(beta * (chosen - rejected).mean().item())
        self.accuracy.append((chosen > rejected).float().mean().item())
        self.chosen.append(chosen.mean().item())
        self.rejected.append(rejected.mean().item())


def train_preferences(policy: GPT, reference: GPT, tokenizer: BPETokenizer, pairs: Sequence[Preference],
                      held_out: Sequence[Preference], *, steps: int, beta: float = 0.1, batch_size: int = 8,
                      max_lr: float = 3e-4, every: int = 10, seed: int = 0,
                      loss: Callable[..., Tensor] = dpo_loss, system_prompt: str | None = SMOLLM2_SYSTEM,
                      on_look: Callable[[int], None] = lambda step: None) -> PreferenceRun:
    """Train ``policy`` in place on pairs, ``fine_tune``'s way; the reference stays as it is.

    ``loss`` is called as ``dpo_loss`` is. Held-out pairs are looked at before, every ``every`` steps (a
    multiple of 5) and at the end, each time followed by ``on_look(step)``. ``ValueError`` for no pairs or no
    held-out ones, fewer than 1 step, another ``every``, or a policy that is the reference itself.
    """
    if policy is reference:
        raise ValueError("policy and reference are the same model, so every margin would stay 0; train a "
                         "copy: copy.deepcopy(reference).")
    if not pairs or not held_out:
        raise ValueError(f"There are {len(pairs)} pairs and {len(held_out)} held-out pairs; give at least 1 "
                         "of each.")
    if steps < 1 or every < 5 or every % 5:
        raise ValueError(f"steps is {steps} and every {every}; give at least 1 step, and a multiple of 5.")
    before = pair_log_probs(reference, tokenizer, pairs, system_prompt).to(policy.device)
    held_out_before = pair_log_probs(reference, tokenizer, held_out, system_prompt)
    run, generator, batches = PreferenceRun(), torch.Generator().manual_seed(seed), []
    lengths = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
    while len(batches) < steps:
        batches += batches_by_length(lengths, batch_size, generator)

    def look(step: int, _: float = math.nan) -> None:
        if step % every == 0 or step == steps:
            run.add(step, pair_log_probs(policy, tokenizer, held_out, system_prompt) - held_out_before, beta)
            with evaluating(policy):
                on_look(step)

    def loss_of(batch: list[int]) -> Tensor:
        now = preference_log_probs(policy, tokenizer, [pairs[i] for i in batch], system_prompt)
        return loss(*now, *before[:, batch], beta)

    look(0)
    run.losses = fine_tune(policy, batches[:steps], loss_of, max_lr=max_lr, on_log=look)
    if run.steps[-1] != steps:
        look(steps)
    return run


@dataclass
class Distance:
    """Answers of a policy, their numbers of tokens (N,), and two estimates of its KL divergence in nats (N,).

    ``by_sample``: log-ratio of each sampled answer. ``by_position``: exact divergence of the next token,
    summed over the answer's positions. Both have the same mean. An answer that was cut off counts as far as
    it went.
    """

    answers: list[str]
    n_tokens: Tensor
    by_sample: Tensor
    by_position: Tensor


@torch.no_grad()
def distance_to_reference(policy: GPT, reference: GPT, tokenizer: BPETokenizer,
                          prompts: Sequence[Sequence[dict]], *, max_new_tokens: int = 40, seed: int = 0,
                          system_prompt: str | None = SMOLLM2_SYSTEM) -> Distance:
    """An answer of the policy to each prompt at temperature 1, and how far from the reference it leads.

    The ids that were sampled are judged, not the text encoded anew, which may fall into other tokens.
    ``ValueError`` for no prompts.
    """
    if not prompts:
        raise ValueError("There are 0 prompts; give at least 1, for the distance is measured on answers.")
    encoded = [encode_chat(tokenizer, prompt, True, system_prompt)[0] for prompt in prompts]
    stops = torch.tensor(sorted(tokenizer.special_tokens.values()), device=policy.device)
    generator, found = torch.Generator(policy.device).manual_seed(seed), torch.zeros(3, len(prompts))
    answers, groups = [""] * len(prompts), {}
    for number, ids in enumerate(encoded):
        groups.setdefault(len(ids), []).append(number)
    with evaluating(policy), evaluating(reference):
        for length, numbers in groups.items():
            together = torch.tensor([encoded[number] for number in numbers], device=policy.device)
            ids = generate(policy, together, max_new_tokens, stop_ids=set(stops.tolist()),
                           generator=generator)
            new = ids[:, length:]
            ended = torch.isin(new, stops).long()
            counts = ended.cumsum(dim=1) - ended == 0  # up to the first stop, which is part of the answer
            ours, theirs = (torch.log_softmax(model(ids[:, :-1])[:, length - 1 :].float(), dim=-1)
                            for model in (policy, reference))
            log_ratio = ours - theirs
            sampled = log_ratio.gather(2, new[..., None])[..., 0]
            exact = (ours.exp() * log_ratio).sum(dim=-1)
            for row, values in enumerate((torch.ones_like(exact), sampled, exact)):
                found[row, numbers] = (values * counts).sum(dim=1).cpu()
            ends = (counts & (ended == 0)).sum(dim=1).tolist()
            for number, row, end in zip(numbers, new.tolist(), ends, strict=True):
                answers[number] = tokenizer.decode(row[:end])
    return Distance(answers, *found)
