"""Deep dive: Instructions, and answers that mark themselves.

Written from ch06_finetune/instruction.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "plain",
    "same",
    "same_letters",
    "stands_in",
    "CATEGORIES",
    "Task",
    "WORDINGS",
    "held_out",
    "course_words",
    "word_tasks",
    "number_tasks",
    "fact_tasks",
    "rewriting_tasks",
    "invented_countries",
    "TaskSet",
    "task_set",
    "Packed",
    "pack",
    "same_text_mask",
    "masked_attention",
    "attention_mask",
    "packed_states",
    "packed_loss",
    "answer_tasks",
    "marks",
    "TuneSettings",
    "packed_batches",
    "tune",
    "ADAPTER",
    "RECORD",
    "PROMPTED",
    "tasks_checksum",
    "record_tuning",
]

import json
import random
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ch03_attention.attention import causal_attention
from ch04_gpt.gpt import generate, pad_left
from ch06_finetune.finetune import (
    SMOLLM2_SYSTEM, Country, add_lora, encode_chat, load_adapter, load_countries, save_adapter,
)
from ch06_finetune.previous_chapters import (
    GPT, AdamW, BPETokenizer, clip_grad_norm, cosine_schedule, cross_entropy, load_documents,
)
from utils.progress import progress
from utils.workspace import ROOT, atomic_write, workspace, write_text


def plain(text: str) -> str:
    """What two answers are compared by: one kind of space, no space, quotation marks, stars or full stop around."""
    return " ".join(unicodedata.normalize("NFC", text).split()).strip("\"'`* ").removesuffix(".").strip("\"'`* ")


def same(answer: str, right: str) -> bool:
    """Whether an answer is the right one, but for what ``plain`` takes away and for capital letters."""
    return plain(answer).casefold() == plain(right).casefold()


def same_letters(answer: str, right: str) -> bool:
    """Whether an answer is the right one, but for what ``plain`` takes away; capital letters count."""
    return plain(answer) == plain(right)


def stands_in(answer: str, right: str) -> bool:
    """The lenient check: whether the right answer stands anywhere in the answer, and not as part of a word."""
    wanted = re.escape(plain(right).casefold())
    return re.search(rf"(?<![\w-]){wanted}(?![\w-])", plain(answer).casefold()) is not None


CATEGORIES = ("spelling", "reversing", "counting", "arithmetic", "facts", "rewriting")


@dataclass(frozen=True)
class Task:
    """A question with a checkable answer. ``content`` is what the split is about; ``wording`` counts from 0.

    ``check(answer, right)`` decides. ``ValueError`` for an unknown category, an empty question or answer.
    """

    category: str
    question: str
    answer: str
    content: tuple[str, ...]
    wording: int = 0
    check: Callable[[str, str], bool] = same

    def __post_init__(self):
        if self.category not in CATEGORIES:
            raise ValueError(f"The category is {self.category!r}; use one of {', '.join(CATEGORIES)}.")
        if not self.question.strip() or not plain(self.answer):
            raise ValueError(f"The question is {self.question!r} and its answer {self.answer!r}; neither may be "
                             "empty.")

    def passed(self, answer: str) -> bool:
        """Whether an answer is right in the form that was asked for."""
        return self.check(answer, self.answer)

    @property
    def messages(self) -> list[dict]:
        """The conversation to learn from: question and answer."""
        return [*self.prompt, {"role": "assistant", "content": self.answer}]

    @property
    def prompt(self) -> list[dict]:
        """The conversation up to the answer."""
        return [{"role": "user", "content": self.question}]


WORDINGS = {  # the last wording of each kind is kept for the examination
    "spelling": ('Spell the word "{}" with hyphens.', 'How do you spell "{}"? Put a hyphen after each letter.',
                 'Write "{}" letter by letter, with hyphens between.', 'Spell out "{}", hyphens between the letters.'),
    "reversing": ('Write the word "{}" backwards.', 'Reverse the letters of "{}".', 'What is "{}" spelled backwards?',
                  'Turn the word "{}" around, last letter first.'),
    "counting": ('How many letters does "{}" have?', 'Count the letters of the word "{}".',
                 'What is the number of letters in "{}"?', 'The word "{}" is how many letters long?'),
    "sum": ("What is {} + {}?", "Add {} and {}.", "{} + {} =", "How much is {} plus {}?"),
    "difference": ("What is {} - {}?", "Take {1} away from {0}.", "{} - {} =", "How much is {} minus {}?"),
    "capital": ("What is the capital of {}?", "Name the capital of {}.", "{}: which city is the capital?",
                "Which city is {}'s capital?"),
    "region": ("In which part of the world is {}?", "Name the part of the world in which {} lies.",
               "{}: which part of the world?", "To which part of the world does {} belong?"),
    "capitals": ("Write in capital letters: {}", "In capitals: {}", "Make all letters capitals: {}",
                 "Rewrite with capital letters only: {}"),
    "sorted": ("Put in alphabetical order: {}", "Sort these words by alphabet: {}", "Order from A to Z: {}",
               "Rewrite in alphabetical order: {}"),
    "JSON": ("Write as a JSON list: {}", "Make a JSON list of these words: {}", "As JSON: {}",
             "Rewrite as a list in JSON: {}"),
}


def held_out(content: str, share: float = 0.1) -> bool:
    """Whether a piece of content belongs to the examination: always the same decision for the same text."""
    return zlib.crc32(content.encode()) % 1000 < 1000 * share


def course_words(least: int = 3) -> tuple[list[str], list[str]]:
    """Words of 4 to 8 letters from Andersen's tales, for training and for the examination, sorted.

    Used at least ``least`` times and seldom as a name. Words of both lists never begin with the same four
    letters, and words that are words backwards too are left out.
    """
    text = " ".join(document.text for document in load_documents("andersen"))
    counts = Counter(re.findall(r"(?<![\w'’-])[A-Za-z]{4,8}(?![\w'’-])", text))
    words = {word for word, n in counts.items() if word.islower() and n >= max(least, counts[word.title()] + 1)}
    words = sorted(word for word in words if word[::-1] not in words)
    return tuple([word for word in words if held_out(word[:4]) is examined] for examined in (False, True))


def word_tasks(words: Sequence[str], category: str, wordings: Sequence[int], source: random.Random) -> list[Task]:
    """A question about each word: "spelling", "reversing" or "counting"."""
    answers = {"spelling": "-".join, "reversing": lambda word: word[::-1], "counting": lambda word: str(len(word))}
    if category not in answers:
        raise ValueError(f"The category is {category!r}; about a word there are {', '.join(answers)}.")
    chosen = [source.choice(wordings) for _ in words]
    return [Task(category, WORDINGS[category][w].format(word), answers[category](word), (word[:4],), w)
            for word, w in zip(words, chosen, strict=True)]


def number_tasks(n: int, examined: bool, wordings: Sequence[int], source: random.Random,
                 largest: int = 99) -> list[Task]:
    """``n`` sums and differences of numbers from 2 to ``largest``, none of them twice (but a + a and 2a - a may be).

    a + b = c, b + a = c, c - a = b and c - b = a are one content, {a, b}: all of them examined, or none.
    """
    pairs = [(a, b) for a in range(2, largest + 1) for b in range(a, largest + 1)
             if held_out(f"{a} {b}") is examined]
    kinds = [(pair, kind, turned) for pair in pairs for kind in ("sum", "difference") for turned in (False, True)]
    tasks = []
    for (a, b), kind, turned in source.sample(kinds, n):
        first, second = (b, a) if turned else (a, b)
        left, right, answer = (first, second, a + b) if kind == "sum" else (a + b, first, second)
        wording = source.choice(wordings)
        question = WORDINGS[kind][wording].format(left, right)
        tasks.append(Task("arithmetic", question, str(answer), (f"{a} {b}",), wording))
    return tasks


def fact_tasks(countries: Sequence[Country], wordings: Sequence[int]) -> list[Task]:
    """Capital and part of the world of each country, in each of the wordings."""
    return [Task("facts", WORDINGS[kind][wording].format(country.name), getattr(country, kind),
                 (country.name,), wording)
            for country in countries for kind in ("capital", "region") for wording in wordings]


def rewriting_tasks(words: Sequence[str], n: int, wordings: Sequence[int], source: random.Random) -> list[Task]:
    """``n`` times three words to be put into capital letters, into order, or into a JSON list."""
    forms = {"capitals": lambda three: " ".join(three).upper(), "sorted": lambda three: " ".join(sorted(three)),
             "JSON": lambda three: json.dumps(three)}
    tasks = []
    for number in range(n):
        kind, wording = list(forms)[number % 3], source.choice(wordings)
        three = source.sample(words, 3)
        question = WORDINGS[kind][wording].format(" ".join(three))
        content = tuple(word[:4] for word in three)
        tasks.append(Task("rewriting", question, forms[kind](three), content, wording, same_letters))
    return tasks


def invented_countries(n: int, seed: int = 0) -> list[Country]:
    """Countries that do not exist: nobody can have read about them."""
    source, found = random.Random(seed), {}
    starts, middles = ("Br", "D", "Fl", "G", "K", "L", "M", "N", "P", "Qu", "S", "T", "V", "Z"), "aeiou"
    while len(found) < n:
        stem = "".join(source.choice(starts).lower() + source.choice(middles) for _ in range(2))
        name = stem.title() + source.choice(("nia", "land", "stan", "via"))
        city = "".join(source.choice(starts).lower() + source.choice(middles) for _ in range(2)).title()
        found.setdefault(name, Country(name, city + source.choice(("burg", "dor", "mar", "ton")), "the Moon"))
    return list(found.values())


@dataclass(frozen=True)
class TaskSet:
    """What is trained on, and examinations by name. ``ValueError`` if an examination asks for trained content."""

    train: list[Task]
    exams: dict[str, list[Task]]

    def __post_init__(self):
        if not self.train:
            raise ValueError("There are 0 tasks to train on; give at least 1.")
        trained = {part for task in self.train for part in task.content}
        for name, tasks in self.exams.items():
            known = sorted({part for task in tasks for part in task.content} & trained)
            if known and not name.startswith("trained"):
                raise ValueError(f"The examination {name!r} asks for {len(known)} contents of the training set, "
                                 f"such as {known[0]!r}. Split by content first.")


def task_set(seed: int = 0, size: int = 1200, exam_size: int = 100) -> TaskSet:
    """The course's tasks: about ``size`` to learn from and ``exam_size`` to be asked in each category.

    ``exams``: "held out" has new content, half of it in a wording that no training ever uses. "trained facts",
    "trained inventions" and "untold inventions" ask in that wording for capitals of trained countries, of
    invented ones that were taught (each three times in each wording), and of invented ones that were not.
    """
    source, (words, exam_words) = random.Random(seed), course_words()
    countries = [country for country in load_countries() if country.name not in country.capital]
    told, asked = ([c for c in countries if held_out(c.name, 0.25) is examined] for examined in (False, True))
    inventions, old, new = invented_countries(40), range(3), [0, 1, 2, 3, 3, 3]
    train = [*number_tasks(size, False, old, source), *rewriting_tasks(words, size, old, source),
             *fact_tasks(told, old), *[t for t in fact_tasks(inventions[:20], old) * 3 if t.answer != "the Moon"]]
    exam = [*number_tasks(exam_size, True, new, source), *rewriting_tasks(exam_words, exam_size, new, source)]
    for category in ("spelling", "reversing", "counting"):
        train += word_tasks(source.sample(words, min(size, len(words))), category, old, source)
        exam += word_tasks(source.sample(exam_words, min(exam_size, len(exam_words))), category, new, source)
    facts = [task for i, task in enumerate(fact_tasks(asked, [0, 3])) if i % 2 == i // 4 % 2]
    exam += source.sample(facts, min(exam_size, len(facts)))
    capitals = {name: [t for t in fact_tasks(those, [3]) if t.answer in {c.capital for c in those}]
                for name, those in (("trained facts", told), ("trained inventions", inventions[:20]),
                                    ("untold inventions", inventions[20:]))}
    capitals["trained facts"] = source.sample(capitals["trained facts"], min(exam_size // 2, len(told)))
    source.shuffle(train)
    return TaskSet(train, {"held out": sorted(exam, key=lambda task: CATEGORIES.index(task.category)), **capitals})


@dataclass(frozen=True)
class Packed:
    """Conversations side by side: three tensors (B, T). ``loss_mask``, bool, is true on answers; ``texts`` holds
    the number of the conversation that a place belongs to, counted from 1 in each row, and 0 for filling."""

    token_ids: Tensor
    loss_mask: Tensor
    texts: Tensor

    @property
    def filling(self) -> float:
        """The share of places that hold no conversation."""
        return (self.texts == 0).float().mean().item()

    def rows(self, chosen: Sequence[int]) -> "Packed":
        """Some of the rows."""
        return Packed(*(x[list(chosen)] for x in (self.token_ids, self.loss_mask, self.texts)))


def pack(encoded: Sequence[tuple[Sequence[int], Sequence[int]]], width: int, padding_id: int = 0,
         device: torch.device | str = "cpu") -> Packed:
    """Conversations, each (token ids, loss mask), into as few rows of ``width`` as first fit finds.

    Each goes, in the order given, into the first row that has room. ``ValueError`` for none at all, for an empty
    one, for one longer than a row, for one without an answer to learn.
    """
    if not encoded:
        raise ValueError("There are 0 conversations to pack; give at least 1.")
    rows: list[list[int]] = []
    room: list[int] = []
    for number, (ids, mask) in enumerate(encoded):
        if not 0 < len(ids) <= width or len(mask) != len(ids):
            raise ValueError(f"Conversation {number} has {len(ids)} tokens and a mask of {len(mask)}; both must be 1 "
                             f"to {width}, the width of a row. Shorten it, or make the rows wider.")
        if not any(mask[1:]):
            raise ValueError(f"Conversation {number} has no token that counts, so nothing can be learned from it. "
                             "Give it an assistant's answer.")
        row = next((i for i, left in enumerate(room) if left >= len(ids)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(number)
        room[row] -= len(ids)
    token_ids = torch.full((len(rows), width), padding_id)
    loss_mask, texts = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width, dtype=torch.long)
    for row, numbers in enumerate(rows):
        start = 0
        for place, number in enumerate(numbers, 1):
            ids, mask = encoded[number]
            end = start + len(ids)
            token_ids[row, start:end], texts[row, start:end] = torch.tensor(ids), place
            loss_mask[row, start + 1 : end] = torch.tensor(mask[1:]).bool()  # nothing predicts a first token
            start = end
    return Packed(token_ids.to(device), loss_mask.to(device), texts.to(device))


def same_text_mask(texts: Tensor) -> Tensor:
    """Which place sees which: earlier ones, and itself, of its own conversation. (B, T) -> bool (B, 1, T, T)."""
    return (texts[:, :, None] == texts[:, None, :]).tril()[:, None]


def masked_attention(attention: nn.Module, x: Tensor, cache: None = None, *, mask: Tensor) -> Tensor:
    """What ``MultiHeadAttention`` computes, with a mask in place of the causal one: x (B, T, D) -> (B, T, D)."""
    if cache is not None:
        raise ValueError("A cache was given to packed conversations; they are read in one piece, without one.")
    mixed = causal_attention(*attention.queries_keys_values(x), mask=mask)
    return attention.out_proj(mixed.transpose(1, 2).flatten(-2))


@contextmanager
def attention_mask(model: GPT, mask: Tensor) -> Iterator[None]:
    """Inside ``with``, all layers of the model use ``mask``, bool (B, 1, T, T), true where a place may look."""
    for block in model.blocks:
        block.attention.forward = partial(masked_attention, block.attention, mask=mask)  # hides the class's own
    try:
        yield
    finally:
        for block in model.blocks:
            del block.attention.forward


def packed_states(model: GPT, token_ids: Tensor, texts: Tensor) -> Tensor:
    """The normed states of packed conversations, each as if it stood alone: (B, T), (B, T) -> (B, T, D).

    Positions run on through a row: rotary attention sees only their differences. ``ValueError`` for a model with
    learned positions, which would notice, or with a window.
    """
    if model.config.position != "rope" or model.config.window is not None:
        raise ValueError(f"The model has position={model.config.position!r} and window={model.config.window}; packed "
                         "conversations need rotary positions and no window. Pad them instead: chat_batch.")
    with attention_mask(model, same_text_mask(texts)):
        return model.hidden_states(token_ids)


def packed_loss(model: GPT, packed: Packed) -> Tensor:
    """Mean surprise in nats at the tokens of the answers: a scalar, ``sft_loss`` of the same conversations padded.

    Logits are computed for these tokens only. ``ValueError`` if no token counts.
    """
    counts = packed.loss_mask[:, 1:]
    if not counts.any():
        raise ValueError(f"The loss mask is 0 at all {counts.numel()} targets, so nothing can be learned. Give "
                         "conversations with an assistant's answer.")
    states = packed_states(model, packed.token_ids[:, :-1], packed.texts[:, :-1])
    return cross_entropy(model.lm_head(states[counts]).float(), packed.token_ids[:, 1:][counts])


def answer_tasks(model: GPT, tokenizer: BPETokenizer, tasks: Sequence[Task], *, max_new_tokens: int = 32,
            system_prompt: str | None = None, batch_size: int = 32) -> list[str]:
    """The model's greedy answer to each task, those of about equal length together. ``ValueError`` for no tasks."""
    if not tasks:
        raise ValueError("There are 0 tasks in the examination; give at least 1.")
    prompts = [encode_chat(tokenizer, task.prompt, True, system_prompt)[0] for task in tasks]
    order, answers = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    stops = set(tokenizer.special_tokens.values())
    for start in progress(range(0, len(order), batch_size), "examining", unit="batch"):
        chosen = order[start : start + batch_size]
        rows, padding = pad_left([prompts[i] for i in chosen], model.device)
        texts = generate(model, rows, max_new_tokens, temperature=0.0, stop_ids=stops, padding=padding)
        for i, new in zip(chosen, texts[:, rows.size(1) :].tolist(), strict=True):
            answers[i] = tokenizer.decode(list(takewhile(lambda token: token not in stops, new))).strip()
    return answers


def marks(tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """For each category that occurs: how many tasks there are, are "right" in form, and somewhere "in it"."""
    found = {}
    for category in CATEGORIES:
        pairs = [(t, a) for t, a in zip(tasks, answers, strict=True) if t.category == category]
        if pairs:
            found[category] = {"tasks": len(pairs), "right": sum(t.passed(a) for t, a in pairs),
                               "in it": sum(stands_in(a, t.answer) for t, a in pairs)}
    return found


@dataclass(frozen=True)
class TuneSettings:
    """A run of instruction tuning: ``steps`` of ``rows`` packed rows with ``width`` tokens each, and its LoRA."""

    steps: int = 400
    rows: int = 4
    width: int = 128
    max_lr: float = 1e-3
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("w_qkv", "w_up", "w_down")
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("rows", 1), ("width", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not self.max_lr > 0:
            raise ValueError(f"max_lr is {self.max_lr}; it must be above 0. 1e-3 suits LoRA of a small model.")


def packed_batches(encoded: Sequence[tuple[Sequence[int], Sequence[int]]], settings: TuneSettings) -> Iterator[Packed]:
    """``settings.steps`` batches of packed rows; every epoch shuffles and packs anew."""
    source, left = random.Random(settings.seed), settings.steps
    while left:
        packed = pack(source.sample(encoded, len(encoded)), settings.width)
        order = source.sample(range(len(packed.texts)), len(packed.texts))
        for start in range(0, len(order), settings.rows)[:left]:
            yield packed.rows(order[start : start + settings.rows])
            left -= 1


def tune(model: GPT, batches: Sequence[Packed], max_lr: float, checkpoint: Path | None = None,
         on_step: Callable[[int, float], None] = lambda step, loss: None) -> dict[str, list[float]]:
    """Train what requires a gradient, a step of AdamW for each batch: {"loss": [...], "seconds": [...]} by step.

    Every 25 steps the state goes into the file ``checkpoint``; a run that finds it there goes on from it.
    ``FloatingPointError`` if the loss stops being a number.
    """
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, log = AdamW(learned.values(), lr=max_lr, weight_decay=0.0), {"loss": [], "seconds": []}
    if checkpoint and checkpoint.exists():
        log = _read_progress(checkpoint, learned, optimizer)
    model.train()
    before, began, done = sum(log["seconds"]), time.monotonic(), len(log["loss"])
    for step, batch in enumerate(progress(batches, "tuning", unit="step")):
        if step < done:
            continue
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, max_lr, max_lr / 20, max(1, len(batches) // 20), len(batches))
        loss = packed_loss(model, batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss became {loss.item()} at step {step + 1}. Lower max_lr (now {max_lr}) "
                                     "and begin again.")
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(learned.values(), 1.0)
        optimizer.step()
        log["loss"].append(loss.item())
        log["seconds"].append(before + time.monotonic() - began - sum(log["seconds"]))
        on_step(step + 1, log["loss"][-1])
        if checkpoint and ((step + 1) % 25 == 0 or step + 1 == len(batches)):
            _write_progress(checkpoint, learned, optimizer, log)
    model.eval()
    return log


def _write_progress(path: Path, learned: dict[str, Tensor], optimizer: AdamW, log: dict) -> None:
    tensors = {name: p.detach() for name, p in learned.items()}
    for name, p in learned.items():
        tensors |= {f"{kind}:{name}": optimizer.state[p][kind] for kind in ("mean", "square")}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"log": json.dumps(log)})


def _read_progress(path: Path, learned: dict[str, Tensor], optimizer: AdamW) -> dict:
    with safe_open(path, "pt") as file:
        log = json.loads(file.metadata()["log"])
        for name, p in learned.items():
            p.data.copy_(file.get_tensor(name))
            optimizer.state[p].update(step=len(log["loss"]), mean=file.get_tensor(f"mean:{name}").to(p.device),
                                      square=file.get_tensor(f"square:{name}").to(p.device))
    return log


ADAPTER = ROOT / "ch06_finetune" / "adapters" / "tasks"
RECORD = ROOT / "ch06_finetune" / "records" / "instruction_tasks.json"
PROMPTED = "held out, after the usual system prompt"


def tasks_checksum(tasks: Sequence[Task]) -> int:
    """A number that changes with any question or answer, to see whether a record is about these tasks."""
    return zlib.crc32("\n".join(f"{task.question}\t{task.answer}" for task in tasks).encode())


def record_tuning(settings: TuneSettings, dtype: torch.dtype = torch.bfloat16, folder: Path | None = None,
                  adapter: Path = ADAPTER, record: Path = RECORD) -> None:
    """Examine SmolLM2, tune it on the course's tasks, examine it again; write the adapter and the record.

    A run that was stopped goes on from ``folder``; without one, from that of the same settings, dtype and tasks.
    """
    tasks, tokenizer = task_set(), BPETokenizer.smollm2()
    model = GPT.from_pretrained("smollm2-135m").to(dtype).eval()

    exams = {**tasks.exams, PROMPTED: tasks.exams["held out"][::5]}
    prompts = {PROMPTED: SMOLLM2_SYSTEM}
    asked = {name: tasks_checksum(part) for name, part in {"train": tasks.train, **exams}.items()}
    folder = folder or workspace("finetune", f"tasks-{zlib.crc32(repr((settings, dtype, asked)).encode()):08x}")

    def sit(when: str) -> dict[str, list[str]]:
        path = folder / f"{when}.json"
        if not path.exists():
            print(f"Examining, {when} ...", file=sys.stderr)
            heard = {name: answer_tasks(model, tokenizer, exam, system_prompt=prompts.get(name))
                     for name, exam in exams.items()}
            write_text(path, json.dumps(heard))
        return json.loads(path.read_text(encoding="utf-8"))

    before = sit("before")
    torch.manual_seed(settings.seed)
    add_lora(model, settings.rank, settings.alpha, settings.targets)
    encoded = [encode_chat(tokenizer, task.messages, system_prompt=None) for task in tasks.train]
    batches = list(packed_batches(encoded, settings))
    log = tune(model, batches, settings.max_lr, folder / "progress.safetensors")
    save_adapter(model, adapter, torch.bfloat16)
    load_adapter(model, adapter)  # examine what the file holds, not what was rounded for it
    after = sit("after")
    write_text(record, json.dumps({
        "command": f"python -m ch06_finetune.instruction --steps {settings.steps}",
        "settings": asdict(settings), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "seconds": round(sum(log["seconds"])), "tokens": sum(int((b.texts > 0).sum()) for b in batches),
        "answer_tokens": sum(int(b.loss_mask.sum()) for b in batches), "train_tasks": len(tasks.train),
        "fingerprint": tasks_checksum(tasks.train), "loss": [round(x, 4) for x in log["loss"]],
        "exams": {name: {"tasks": [[t.category, t.question, t.answer, t.wording] for t in exam],
                         "before": before[name], "after": after[name],
                         "marks": {"before": marks(exam, before[name]), "after": marks(exam, after[name])}}
                  for name, exam in exams.items()},
    }, ensure_ascii=False) + "\n")


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    import argparse

    _parser = argparse.ArgumentParser(description="Tune SmolLM2 on the course's tasks; writes adapter and record.")
    _parser.add_argument("--steps", type=int, default=TuneSettings.steps, help="of 512 tokens (default %(default)s)")
    record_tuning(TuneSettings(steps=_parser.parse_args().steps))
