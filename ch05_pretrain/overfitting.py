"""Deep dive: Overfitting, told honestly.

Written from ch05_pretrain/overfitting.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "EpochCurve",
    "train_and_watch",
    "small_gpt",
    "FEW",
    "SMALL_RUN",
    "LONG",
    "RECIPES",
    "other_text",
    "recipe_texts",
    "run_recipe",
    "record_recipes",
    "record_dropout",
    "TURN_SIZES",
    "record_turns",
    "BOOK_RUN",
    "BOOK_MODELS",
    "record_book",
    "suffix_array",
    "later",
    "SpanIndex",
    "common_prefix",
    "mark_spans",
    "Cloze",
    "BETWEEN_SENTENCES",
    "sentences_of",
    "make_cloze",
    "ending_log_probabilities",
    "wilson_interval",
    "score_cloze",
    "distinct_n",
]

import dataclasses
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ch01_data.data import Document, load_documents
from ch05_pretrain.previous_chapters import PRESETS, GPT, BPETokenizer, flops_per_token, prepare_tokens
from ch02_tokenizer.tokenizer import TokenData
from ch05_pretrain.pretrain import TrainConfig, checkpoints, evaluate, train
from ch05_pretrain.storyteller import load_novels
from utils.workspace import workspace, write_text


@dataclass
class EpochCurve:
    """Losses of a run in nats per token, dropout off, against the number of times it has read its text."""

    epochs: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)

    def turn(self) -> int:
        """The index of the lowest held-out loss: from here on, more training makes the model worse."""
        return int(np.argmin(np.nan_to_num(self.val_loss, nan=math.inf)))


def train_and_watch(model: GPT, train_tokens: Sequence, val_tokens, config: TrainConfig, *,
                    on_look: Callable[[EpochCurve], None] = lambda curve: None, begun: EpochCurve | None = None,
                    folder: Path | None = None) -> tuple[EpochCurve, dict[str, Tensor]]:
    """Train and evaluate on both texts every ``eval_every`` steps: (curve, the weights at the turn).

    ``train_tokens``: a list of 1-D rows of ids; the first is the one whose loss is shown as training loss.
    ``on_look(curve)`` is called after each look. A run with checkpoints in ``folder`` goes on with the curve ``begun``;
    the weights are {} if the turn came before. ``ValueError`` if that curve ends before the checkpoints.
    """
    curve, best = begun or EpochCurve(), {}
    steps_an_epoch = sum(len(row) for row in train_tokens) / (config.batch_size * config.context_length)
    looked = round(curve.epochs[-1] * steps_an_epoch) if curve.epochs else 0  # up to this step

    found = checkpoints(folder) if folder else []
    stands = int(found[-1].name.removeprefix("step-")) if found else 0
    if looked < (stands if stands == config.steps else stands - stands % config.eval_every):
        raise ValueError(f"The checkpoints in {folder} stand at step {stands:,}, the curve ends at step {looked:,}: "
                         "give the curve that was recorded with them, or delete that folder to begin anew.")

    def on_log(name: str, step: int, value) -> None:
        if name != "held out" or step <= looked:
            return
        shown = evaluate(model, train_tokens[0], max_tokens=config.eval_tokens, context_length=config.context_length)
        curve.epochs.append(step / steps_an_epoch)
        curve.train_loss.append(shown.loss)
        curve.val_loss.append(value)
        if curve.turn() == len(curve.val_loss) - 1:
            best.update({name: p.detach().clone() for name, p in model.named_parameters()})
        on_look(curve)

    train(model, list(train_tokens), val_tokens, config, on_log=on_log, folder=folder)
    return curve, best


def small_gpt(d_model: int = 64, n_layers: int = 2, dropout: float = 0.0, context_length: int = 128,
              seed: int = 0) -> GPT:
    """An untrained GPT in the manner of the storyteller with other sizes; ``seed`` fixes its first weights."""
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(
        PRESETS["storyteller"], d_model=d_model, n_layers=n_layers, dropout=dropout,
        context_length=context_length, d_ff=None, head_dim=None, n_heads=4, n_kv_heads=None))


FEW = 8192  # tokens: about 28,000 characters, half a dozen tales
SMALL_RUN = TrainConfig(steps=256, batch_size=4, context_length=64, warmup_steps=20, eval_every=32)
LONG = {"steps": 1024, "eval_every": 64, "eval_tokens": 4096}  # thirty-two readings, a look after every second


RECIPES: dict[str, dict] = {  # what differs from the plain run: in the model, in the run, in the text
    "plain": {},
    "stop early, as planned": {"run": {"steps": 96, "eval_every": 8}},
    "dropout 0.2": {"model": {"dropout": 0.2}},
    "weight decay 1.0": {"run": {"weight_decay": 1.0}},
    "half as wide": {"model": {"d_model": 32}},
    "and novels and plays": {"text": ("novels", "plays")},
    "four times the tales": {"text": ("tales",)},
}


def other_text(name: str, characters: int) -> str:
    """Text by others, from the middle of their books: "novels" or Shakespeare's "plays"."""
    books = load_novels() if name == "novels" else load_documents("shakespeare")
    each = characters // len(books) + 1
    return "\n\n".join(book.text[20_000 : 20_000 + each] for book in books)[:characters]


def recipe_texts(kinds: Sequence[str], data: TokenData) -> list[np.ndarray]:
    """The training text of a recipe as rows of ids; the first row is always the few tales.

    "tales" adds three times as many; "novels" and "plays" add half of that amount each.
    """
    rows = [np.asarray(data.train[:FEW])]
    for kind in kinds:
        if kind == "tales":
            rows.append(np.asarray(data.train[FEW : 4 * FEW]))
        else:
            ids = data.tokenizer.encode(other_text(kind, 8 * FEW), allow_special=False)
            rows.append(np.array(ids[: 3 * FEW // 2]))
    return rows


def run_recipe(recipe: Mapping, data: TokenData, seed: int = 0) -> tuple[GPT, EpochCurve, dict[str, Tensor]]:
    """Train by a recipe at the plain one's compute, unless it plans fewer steps: (model, curve, best weights)."""
    model = small_gpt(**recipe.get("model", {}), seed=seed)
    length = SMALL_RUN.context_length
    cheaper = flops_per_token(small_gpt().config, length) / flops_per_token(model.config, length)
    config = dataclasses.replace(SMALL_RUN, seed=seed, steps=round(SMALL_RUN.steps * cheaper),
                                 eval_every=round(SMALL_RUN.eval_every * cheaper))
    config = dataclasses.replace(config, **recipe.get("run", {}))
    return model, *train_and_watch(model, recipe_texts(recipe.get("text", ()), data), data.val, config)


def record_recipes(path: Path, seeds: int = 3) -> None:
    """Run every recipe with several seeds and write the curves as JSON: {recipe: [curve, ...]}. Takes minutes."""
    data = prepare_tokens("andersen")
    curves = {name: [dataclasses.asdict(run_recipe(recipe, data, seed)[1]) for seed in range(seeds)]
              for name, recipe in RECIPES.items()}
    write_text(path, json.dumps({"train": SMALL_RUN.to_dict(), "recipes": RECIPES, "curves": curves}, indent=1))


def record_dropout(path: Path) -> None:
    """Thirty-two readings of the few tales with dropout 0.2; write the curve as JSON. Less than a minute."""
    recipe = {"model": {"dropout": 0.2}, "run": LONG}
    _, curve, _ = run_recipe(recipe, prepare_tokens("andersen"))
    write_text(path, json.dumps({"recipe": recipe, "curve": dataclasses.asdict(curve)}, indent=1))


TURN_SIZES = (4096, 8192, 16_384, 32_768)  # tokens of text


def record_turns(path: Path, epochs: int = 16) -> None:
    """Train the small model on more and more tales, each read ``epochs`` times; write the curves as JSON, by size."""
    data, curves = prepare_tokens("andersen"), {}
    for size in TURN_SIZES:
        steps = size // (SMALL_RUN.batch_size * SMALL_RUN.context_length)
        config = dataclasses.replace(SMALL_RUN, steps=epochs * steps, eval_every=steps)
        curve, _ = train_and_watch(small_gpt(), [data.train[:size]], data.val, config)
        curves[size] = dataclasses.asdict(curve)
        write_text(path, json.dumps({"train": SMALL_RUN.to_dict(), "epochs": epochs, "curves": curves}, indent=1))


BOOK_RUN = dataclasses.replace(  # ten readings; a constant rate, so that a shorter run is the beginning of a longer
    SMALL_RUN, steps=2710, batch_size=32, weight_decay=0.0, schedule="wsd", decay_steps=1, precision="bfloat16",
    warmup_steps=50, eval_every=135, eval_tokens=16_384)
BOOK_MODELS: dict[str, dict] = {"plain": {"d_model": 256}, "dropout 0.2": {"d_model": 256, "dropout": 0.2}}


def record_book(path: Path, name: str) -> None:
    """Train a ``BOOK_MODELS`` entry on all the tales; after each look write its curve to the JSON file.

    The curves of other models in the file stay. A run that was stopped goes on from its last checkpoint,
    which lies in ``pretrain`` of the workspace.
    """
    data, model = prepare_tokens("andersen"), small_gpt(**BOOK_MODELS[name], context_length=BOOK_RUN.context_length)

    def written() -> dict:
        return json.loads(path.read_text(encoding="utf-8"))["curves"] if path.exists() else {}

    def write(curve: EpochCurve) -> None:
        write_text(path, json.dumps({
            "command": f"record_book(Path('ch05_pretrain/records/{path.name}'), name) for each name",
            "train": BOOK_RUN.to_dict(), "models": BOOK_MODELS, "tokens": len(data.train),
            "parameters": sum(p.numel() for p in model.parameters()),
            "curves": written() | {name: dataclasses.asdict(curve)}}, indent=1))

    train_and_watch(model, [data.train], data.val, BOOK_RUN, on_look=write, begun=EpochCurve(**written().get(name, {})),
                    folder=workspace("pretrain", f"overfitting {name}"))


def suffix_array(text: str) -> np.ndarray:
    """Where the suffixes of a text begin, in alphabetical order: int64 (characters,).

    By doubling: suffixes in the order of their first k characters are put into that of 2k by the ranks
    of their halves. Manber and Myers 1993. About 160 bytes a character meanwhile.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    alphabet, rank = np.unique(codes, return_inverse=True)
    rank, base, length = rank.astype(np.int64) + 1, len(alphabet) + 1, 1  # 0 stands for "after the end"
    while base ** (2 * length) < 2**62 and length < len(text):  # as many characters as fit into one number
        rank = rank * base**length + later(rank, length)
        length *= 2
    while True:
        order = np.argsort(rank, kind="stable")
        is_new = np.diff(rank[order], prepend=-1) > 0
        rank[order] = np.cumsum(is_new)
        if is_new.all():
            return order
        rank = rank * (len(text) + 1) + later(rank, length)
        length *= 2


def later(rank: np.ndarray, length: int) -> np.ndarray:
    """The rank of what begins ``length`` characters later, 0 where that is beyond the end."""
    moved = np.zeros_like(rank)
    moved[: max(len(rank) - length, 0)] = rank[length:]
    return moved


class SpanIndex:
    """Finds which pieces of a text occur, character for character, in a corpus.

    ``longest_asked``: spans are followed for at most so many characters.
    """

    def __init__(self, corpus: str, longest_asked: int = 1000):
        self.corpus, self.limit, self.order = corpus, longest_asked, suffix_array(corpus).tolist()
        self.known: dict[str, list[int]] = {}  # the lengths of texts that were asked before

    def lengths(self, text: str) -> np.ndarray:
        """How many characters from each place on are found in the corpus in one piece: int64 (characters,)."""
        if text not in self.known:
            self.known[text] = [self.length_at(text, start) for start in range(len(text))]
        return np.array(self.known[text], dtype=np.int64)

    def length_at(self, text: str, start: int) -> int:
        """How many characters of ``text[start:]`` are found in one piece: bisection among the sorted suffixes."""
        piece = text[start : start + self.limit]
        place = bisect_left(self.order, piece, key=lambda i: self.corpus[i : i + self.limit])
        neighbours = self.order[max(place - 1, 0) : place + 1]  # the two that begin most like it
        return max((common_prefix(piece, self.corpus[i : i + self.limit]) for i in neighbours), default=0)

    def longest(self, text: str) -> str:
        """The longest piece of the text that the corpus holds; the first of several."""
        lengths = self.lengths(text)
        start = int(lengths.argmax()) if len(lengths) else 0
        return text[start : start + lengths[start]] if len(lengths) else ""

    def spans(self, text: str, at_least: int) -> list[tuple[int, int]]:
        """Start and end of the places of ``text`` that lie in shared pieces of ``at_least`` characters.

        ``ValueError`` for ``at_least`` below 1.
        """
        if at_least < 1:
            raise ValueError(f"at_least is {at_least}; a span has at least 1 character, and 50 is a usual choice.")
        found: list[tuple[int, int]] = []
        for start, length in enumerate(self.lengths(text).tolist()):
            if length >= at_least and (not found or start >= found[-1][1]):
                found.append((start, start + length))
            elif length >= at_least:  # it ends no earlier: what lacks its first character occurs as well
                found[-1] = (found[-1][0], start + length)
        return found

    def share(self, text: str, at_least: int) -> float:
        """The share of the text's characters that lie in such places; 0 for an empty text."""
        return sum(end - start for start, end in self.spans(text, at_least)) / max(len(text), 1)


def common_prefix(a: str, b: str) -> int:
    """How many characters two strings share at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is quicker than comparing characters one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def mark_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with square brackets, 【 and 】, around each span."""
    for start, end in sorted(spans, reverse=True):
        text = f"{text[:start]}【{text[start:end]}】{text[end:]}"
    return text


@dataclass(frozen=True)
class Cloze:
    """What comes next? A context, one true ending and false ones; ``answer`` is the index of the true one."""

    context: str
    endings: tuple[str, ...]
    answer: int
    story: str


BETWEEN_SENTENCES = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["']?[A-Z])""")


def sentences_of(text: str) -> list[list[str]]:
    """The sentences of a text, paragraph by paragraph. Good enough for prose; "Mr. Bear" is cut in two."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return [re.split(BETWEEN_SENTENCES, part) for part in paragraphs if part]


def make_cloze(stories: Sequence[Document], n_questions: int, n_endings: int = 4, seed: int = 0,
               lengths: tuple[int, int] = (30, 120), context_characters: int = 300) -> list[Cloze]:
    """Questions from stories: some sentences, then the one that follows, among as long ones of other stories.

    False endings are drawn from the 40 sentences of other stories that are nearest in length, so that
    length is no hint. ``lengths`` in characters. ``ValueError`` for too few stories, endings or sentences.
    """
    if n_endings < 2 or len(stories) < 2:
        raise ValueError(f"{n_endings} endings from {len(stories)} stories; both must be at least 2, for the false "
                         "endings come from other stories.")
    pool = [(document.id, " ".join(paragraph[:i]), paragraph[i])
            for document in stories for paragraph in sentences_of(document.text) for i in range(len(paragraph))
            if lengths[0] <= len(paragraph[i]) <= lengths[1]]
    asked = [entry for entry in pool if len(entry[1]) >= context_characters // 2]
    if n_questions < 1 or len(asked) < n_questions:
        raise ValueError(f"n_questions is {n_questions}, but the stories have {len(asked)} sentences of "
                         f"{lengths[0]} to {lengths[1]} characters with enough before them: ask for 1 to that many.")
    generator, questions = np.random.default_rng(seed), []
    for index in generator.permutation(len(asked))[:n_questions]:
        story, context, truth = asked[index]
        others = sorted({text for name, _, text in pool if name != story and text != truth},
                        key=lambda text: (abs(len(text) - len(truth)), text))[:40]
        if len(others) < n_endings - 1:
            raise ValueError(f"{n_endings} endings need {n_endings - 1} sentences of other stories; there are "
                             f"{len(others)}: lower n_endings or give more stories.")
        endings = [others[i] for i in generator.permutation(len(others))[: n_endings - 1]]
        answer = int(generator.integers(n_endings))
        endings.insert(answer, truth)
        cut = context[-context_characters:]
        questions.append(Cloze(cut[cut.find(" ") + 1 :] if cut != context else cut, tuple(endings), answer, story))
    return questions


@torch.no_grad()
def ending_log_probabilities(model: GPT, tokenizer: BPETokenizer, context: str, endings: Sequence[str]) -> Tensor:
    """The log-probability of each ending after the context, in nats, summed over its tokens: (endings,).

    The context loses its beginning where the model's window is too short. ``ValueError`` for an ending
    that does not fit at all.
    """
    rows, room = [tokenizer.encode(" " + ending) for ending in endings], model.config.context_length
    longest = max(map(len, rows))
    if longest >= room:
        raise ValueError(f"An ending has {longest} tokens and the model sees {room}: it must be shorter, at most "
                         f"{room - 1}.")
    before = tokenizer.encode(context)[-(room - longest) :]
    inputs = torch.tensor([before + row + [0] * (longest - len(row)) for row in rows], device=model.device)
    logits = model(inputs[:, :-1])[:, len(before) - 1 :]  # (endings, longest, V)
    targets = inputs[:, len(before) :]
    scores = torch.log_softmax(logits.float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    real = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    return (scores * real.to(scores.device)).sum(-1)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The probabilities that ``successes`` out of ``n`` do not contradict; 95% by default. Wilson 1927.

    ``ValueError`` unless 0 <= successes <= n and n is at least 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes out of {n}; give 0 to n successes, and n of at least 1.")
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_cloze(questions: Sequence[Cloze], judge: Callable[[str, Sequence[str]], Sequence[float]]) -> list[bool]:
    """Which questions a judge gets right: it gives every ending a number, and the largest is its choice.

    Two endings with the same largest number count as wrong: it did not choose. ``ValueError`` if the judge does
    not give one number for each ending.
    """
    right = []
    for question in questions:
        scores = [float(score) for score in judge(question.context, question.endings)]
        if len(scores) != len(question.endings):
            raise ValueError(f"The judge gave {len(scores)} numbers for {len(question.endings)} endings; it must give "
                             "one for each.")
        best = scores[question.answer]
        right.append(all(best > score for i, score in enumerate(scores) if i != question.answer))
    return right


def distinct_n(words: Sequence, n: int) -> float:
    """Different n-grams divided by all n-grams, from above 0 to 1. Li et al. 2016, section 5.

    It falls with the length of the text: compare equal lengths only. ``ValueError`` if there is no n-gram.
    """
    if not 1 <= n <= len(words):
        raise ValueError(f"n is {n} for {len(words)} words; it must be from 1 to their number.")
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams)
