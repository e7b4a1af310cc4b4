"""Deep dive: Spam, with a model that has read more.

Written from ch06_finetune/classification.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "balanced_accuracy",
    "log_loss",
    "counted",
    "describe",
    "check_labels",
    "fit_head",
    "spam_chance",
    "word_features",
    "words_and_pairs",
    "fit_bag",
    "bag_chances",
    "both_states",
    "POOLS",
    "encode_texts",
    "some_blocks",
    "layer_by_layer",
    "pooled_states",
    "token_states",
    "states_fingerprint",
    "remembered",
    "CHOICES",
    "SpamRecipe",
    "SINGLE",
    "QUESTIONS",
    "RECORD",
    "StateTable",
    "table_rows",
    "SpamLab",
    "chosen_examples",
    "fitted_head",
    "tuned_classifier",
    "padded_states",
    "examine_fold",
    "cross_validate",
    "at_temperature",
    "fit_temperature",
    "reliability",
    "texts_mark",
    "open_envelope",
    "make_table",
    "main",
    "layer_numbers",
    "report_test",
]

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ch06_finetune.finetune import (
    LabelledTexts, Scores, SequenceClassifier, add_lora, classify, last_state, load_sms_spam, mean_state, pad_right,
    stratified_split, train_classifier,
)
from ch06_finetune.previous_chapters import GPT, BPETokenizer, pad_left, wilson_interval
from utils.bench import peak_memory_bytes
from utils.device import pick_device
from utils.progress import progress
from utils.workspace import ROOT, atomic_write, short_path, workspace, write_text


def balanced_accuracy(scores: Scores) -> float:
    """The mean of the shares of spam and of ham that were judged rightly; 0.5 for whoever always says the same."""
    ham = scores.true_negatives + scores.false_positives
    return (scores.recall + (scores.true_negatives / ham if ham else math.nan)) / 2


def log_loss(labels: Sequence[int], chances: Sequence[float]) -> float:
    """The mean surprise in nats at the labels (1 or 0), given the probability of 1 for each."""
    check_labels(labels, len(chances), 2)
    chance = torch.tensor(chances, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    right = torch.where(torch.tensor(labels) == 1, chance, 1 - chance)
    return -right.log().mean().item()


def counted(labels: Sequence[int], chances: Sequence[float], bound: float) -> Scores:
    """``Scores`` of calling spam what has at least the probability ``bound``."""
    return Scores.count(labels, [int(chance >= bound) for chance in chances])


def describe(scores: Scores) -> str:
    """All shares of a result, each with its 95% interval."""
    t = scores
    rows = (("accuracy", t.true_positives + t.true_negatives, sum(dataclasses.astuple(t))),
            ("precision", t.true_positives, t.true_positives + t.false_positives),
            ("recall (spam caught)", t.true_positives, t.true_positives + t.false_negatives),
            ("ham let through", t.true_negatives, t.true_negatives + t.false_positives))
    lines = [f"{name:21}{k / n:7.2%}  ({low:.1%} to {high:.1%}), {k:,} of {n:,}"
             for name, k, n in rows if n for low, high in [wilson_interval(k, n)]]
    return "\n".join([*lines, f"{'balanced accuracy':21}{balanced_accuracy(t):7.2%}"])


def check_labels(labels: Sequence[int], n_texts: int, n_classes: int) -> None:
    """``ValueError`` unless there is a label from 0 to ``n_classes`` - 1 for each text, and more than one class."""
    if len(labels) != n_texts or not set(labels) <= set(range(n_classes)):
        raise ValueError(f"{n_texts} texts have {len(labels)} labels, {min(labels, default=None)} to "
                         f"{max(labels, default=None)}; give each text one from 0 to {n_classes - 1}.")
    if len(set(labels)) < 2:
        raise ValueError(f"All {len(labels)} labels are {labels[0] if labels else 'missing'}. There is nothing to tell "
                         "apart: give texts of at least 2 classes.")


def fit_head(features: Tensor, labels: Sequence[int], *, n_classes: int = 2, decay: float = 1e-3,
             class_weights: Sequence[float] | None = None, standardise: bool = True) -> nn.Linear:
    """The linear head (D -> n_classes) with the least cross-entropy plus ``decay`` times its squared weights.

    To ``standardise`` is to bring each column of ``features`` (N, D) to mean 0 and spread 1 for the fit; the head
    that comes back takes them as they are. ``class_weights`` say how much a text of each class counts. By L-BFGS.
    ``ValueError`` for labels that are out of range or all the same.
    """
    check_labels(labels, len(features), n_classes)
    features, targets = features.float(), torch.tensor(labels, device=features.device)
    centre, spread = torch.zeros_like(features[0]), torch.ones_like(features[0])
    if standardise:
        centre, spread = features.mean(dim=0), features.std(dim=0) + 1e-5
    weights = None if class_weights is None else torch.tensor(class_weights, device=features.device)
    head = nn.Linear(features.size(1), n_classes, device=features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    standard = (features - centre) / spread
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(standard), targets, weights)
        loss = loss + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        head.weight /= spread
        head.bias -= head.weight @ centre
    return head.requires_grad_(False)


def spam_chance(head: nn.Linear, features: Tensor) -> list[float]:
    """The probability of class 1 for each row of the features."""
    return torch.softmax(head(features.float()), dim=-1)[:, 1].tolist()


def word_features(texts: Sequence[str], known: Sequence[str]) -> Tensor:
    """Which of the ``known`` words, or pairs of words, each text holds: zeros and ones, (N, len(known))."""
    column = {word: i for i, word in enumerate(known)}
    matrix = torch.zeros(len(texts), len(known))
    for row, text in enumerate(texts):
        matrix[row, [column[word] for word in words_and_pairs(text) if word in column]] = 1.0
    return matrix


def words_and_pairs(text: str) -> set[str]:
    """The words, numbers and signs of a text in lower case, and each pair of neighbours, joined by a space."""
    words = re.findall(r"[a-z']+|\d+|[^\w\s]", text.lower())
    return {*words, *map(" ".join, zip(words, words[1:], strict=False))}


def fit_bag(learn: LabelledTexts, decay: float = 3e-4, pairs: bool = True) -> tuple[nn.Linear, list[str]]:
    """A logistic regression on the words (and pairs) that occur twice in ``learn``, and these in their order."""
    counts = Counter(word for text in learn.texts for word in words_and_pairs(text))
    known = sorted(word for word, n in counts.items() if n > 1 and (pairs or " " not in word))
    return fit_head(word_features(learn.texts, known), learn.labels, decay=decay, standardise=False), known


def bag_chances(learn: LabelledTexts, exam: Sequence[str], decay: float = 3e-4, pairs: bool = True) -> list[float]:
    """The probability of spam for each text of ``exam``, by ``fit_bag``."""
    head, known = fit_bag(learn, decay, pairs)
    return spam_chance(head, word_features(exam, known))


def both_states(states: Tensor, lengths: Tensor) -> Tensor:
    """The mean and the last state of each row, side by side: (B, T, D), lengths (B,) -> (B, 2 D)."""
    return torch.cat([mean_state(states, lengths), last_state(states, lengths)], dim=1)


POOLS = {"mean": mean_state, "last": last_state, "both": both_states}


def encode_texts(tokenizer: BPETokenizer, texts: Sequence[str], cut: int = 64) -> list[list[int]]:
    """The first ``cut`` tokens of each text; ``ValueError`` for a text without any."""
    if cut < 1:
        raise ValueError(f"cut is {cut}; keep at least 1 token of each text.")
    sequences = [tokenizer.encode(text, allow_special=False)[:cut] for text in texts]
    if empty := [number for number, sequence in enumerate(sequences) if not sequence]:
        raise ValueError(f"{len(empty)} of {len(texts)} texts are empty, number {empty[0]} the first. A text needs at "
                         "least 1 token: leave them out.")
    return sequences


def some_blocks(model: GPT, start: int, end: int, embedding: nn.Module | None = None) -> GPT:
    """A GPT of the blocks ``start`` to ``end`` - 1 of ``model``, with its final norm; it shares all weights.

    ``embedding`` takes the place of the token embedding. There is no language model head.
    ``ValueError`` unless 0 <= start < end <= n_layers.
    """
    if not 0 <= start < end <= len(model.blocks):
        raise ValueError(f"Blocks {start} to {end} of a model of {len(model.blocks)}: give 0 <= start < end <= "
                         f"{len(model.blocks)}.")
    part = copy.copy(model)
    part._modules = dict(model._modules)  # the copy's own list of parts; the parts are the model's
    part.config = dataclasses.replace(model.config, n_layers=end - start)
    part.blocks, part.lm_head = model.blocks[start:end], None
    part.token_embedding = model.token_embedding if embedding is None else embedding
    return part


@torch.no_grad()
def layer_by_layer(model: GPT, sequences: Sequence[Sequence[int]], n_layers: int,
                   batch_size: int = 32) -> Iterator[tuple[list[int], int, Tensor, Tensor]]:
    """The stream of a frozen model as it passes through: (positions, layer, stream (B, T, D), lengths (B,)).

    Layer 0 is the embedding, layer k what leaves block k; ``positions`` says which sequences are in the batch.
    Sequences of about equal length go together.
    """
    if not 0 <= n_layers <= len(model.blocks):
        raise ValueError(f"Layer {n_layers} of a model of {len(model.blocks)}; give 0 to {len(model.blocks)}.")
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    with progress(total=sum(map(len, sequences)), description="frozen layers", unit="token") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            token_ids, lengths = pad_right([sequences[i] for i in chosen], 0, model.device)
            stream = model.token_embedding(token_ids)
            yield chosen, 0, stream, lengths
            for layer in range(1, n_layers + 1):
                stream = model.blocks[layer - 1](stream)
                yield chosen, layer, stream, lengths
            bar.update(int(lengths.sum()))


def pooled_states(model: GPT, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> Tensor:
    """What a head may read after each of the ``layers``: normed, pooled by ``both_states``: (layers, N, 2 D)."""
    found = torch.empty(len(layers), len(sequences), 2 * model.config.d_model)
    for chosen, layer, stream, lengths in layer_by_layer(model, sequences, max(layers)):
        if layer in layers:
            found[layers.index(layer), chosen] = both_states(model.norm(stream), lengths).cpu()
    return found


def token_states(model: GPT, sequences: Sequence[Sequence[int]], layer: int) -> Tensor:
    """What leaves block ``layer`` for each token, one sequence after another, in float16: (all tokens, D).

    ``ValueError`` if a number is too large for float16.
    """
    starts = [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence))
    found = torch.empty(starts[-1], model.config.d_model, dtype=torch.float16)
    for chosen, at, stream, lengths in layer_by_layer(model, sequences, layer):
        if at == layer:
            real = torch.arange(stream.size(1), device=stream.device) < lengths[:, None]
            rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
            found[rows] = stream[real].half().cpu()
    if not torch.isfinite(found).all():
        raise ValueError("A state is above 65504, the largest number of float16. Keep these states in float32.")
    return found


def states_fingerprint(model: GPT, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> str:
    """A hash of all that frozen states depend on: the texts' tokens, the layers, and the weights up to the last."""
    digest = hashlib.sha256(json.dumps([list(map(list, sequences)), list(layers)]).encode())
    used = [model.token_embedding, *model.blocks[: max(layers)], model.norm]
    for tensor in (tensor for part in used for tensor in part.state_dict().values()):
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def remembered(path: Path, mark: str, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor in ``path``, or else what ``compute`` gives, written there for the next time.

    ``ValueError`` if the file is damaged, or holds something of another fingerprint than ``mark``.
    """
    mend = f"Delete {short_path(path)} and run again: it will be computed anew."
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                found, states = file.metadata()["fingerprint"], file.get_tensor("states")
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"{short_path(path)} is damaged or not a file of states ({error}). {mend}") from error
        if found != mark:
            raise ValueError(f"{short_path(path)} holds states of other texts, layers or weights (fingerprint "
                             f"{found[:8]}, wanted {mark[:8]}). {mend}")
        return states
    states = compute().half()
    with atomic_write(path) as temporary:
        save_file({"states": states}, temporary, metadata={"fingerprint": mark})
    return states


CHOICES = {"pool": ("mean", "last", "both"), "train": ("head", "blocks", "lora", "all"),
           "balance": ("natural", "weighted", "fewer"), "padding": ("known", "left", "ignored")}


@dataclass(frozen=True)
class SpamRecipe:
    """How a classifier is made of the frozen model. ``ValueError`` for what makes none.

    ``layers``: after which blocks it reads. ``train``: "head"; "blocks", the last ``blocks`` too; "lora", adapters in
    these; "all". ``examples``: 0 means all. ``balance``: "natural"; "weighted", so that both classes count the same;
    "fewer", no more ham than spam. ``padding``: "known" is right, the others show what goes wrong. Spam is what has at
    least the probability ``bound``.
    """

    layers: tuple[int, ...] = (8, 16)
    pool: str = "both"
    balance: str = "weighted"
    bound: float = 0.3
    decay: float = 1e-3
    train: str = "head"
    blocks: int = 1
    rank: int = 8
    epochs: int = 2
    lr: float = 1e-4
    examples: int = 0
    padding: str = "known"
    cut: int = 64
    seed: int = 0

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        for name, least in (("blocks", 1), ("rank", 1), ("epochs", 1), ("examples", 0), ("cut", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"layers is {self.layers}; give at least one, from 1 (the first block) on.")
        if len(self.layers) > 1 and (self.train != "head" or self.padding != "known"):
            raise ValueError(f"layers is {self.layers}; only a head can read after several. Give one.")
        if self.padding != "known" and (self.train != "head" or self.pool != "last"):
            raise ValueError(f"padding {self.padding!r} shows what the last state suffers; give train head, pool last.")
        if not 0 < self.bound < 1 or not self.decay >= 0 or not self.lr > 0:
            raise ValueError(f"bound is {self.bound}, decay {self.decay}, lr {self.lr}; the bound must lie between 0 "
                             "and 1, decay be at least 0 and lr above 0.")

    def command(self, folds: int = 5) -> str:
        """What to type for this recipe."""
        given = [("folds", folds, 5), *((field.name, getattr(self, field.name), field.default)
                                        for field in dataclasses.fields(self))]
        words = [f"--{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
                 for name, value, usual in given if value != usual]
        return " ".join(["python -m ch06_finetune.classification", *words])


SINGLE = SpamRecipe(layers=(16,))
QUESTIONS: dict[str, list[tuple[SpamRecipe, int]]] = {
    "After which layer?": [(SpamRecipe(layers=layers), 5) for layers in (
        (1,), (2,), (4,), (8,), (12,), (16,), (20,), (24,), (28,), (30,), (8, 16), (8, 16, 24), (8, 16, 30))],
    "Which token's state?": [(replace(SINGLE, layers=(layer,), pool=pool), 5)
                             for layer in (16, 30) for pool in ("last", "mean", "both")],
    "How many examples?": [(SpamRecipe(examples=n), 5) for n in (50, 100, 200, 400, 800, 1600, 0)],
    "Natural, weighted or fewer?": [(SpamRecipe(balance=balance, bound=bound), 5) for balance, bound in (
        ("natural", 0.5), ("natural", 0.3), ("weighted", 0.5), ("weighted", 0.3), ("fewer", 0.5))],
    "Whose padding?": [(SpamRecipe(layers=(8,), pool="last", examples=200, padding=padding), 1)
                       for padding in ("known", "left", "ignored")],
    "How much is trained?": [
        (SpamRecipe(layers=(8,), balance="natural", bound=0.5, examples=400, train=train, blocks=blocks), 1)
        for train, blocks in (("head", 1), ("blocks", 1), ("lora", 8), ("all", 1))],
}
RECORD = ROOT / "ch06_finetune" / "records" / "classification.json"


class StateTable(nn.Embedding):
    """A frozen table of float16 states whose row numbers take the place of token ids; it gives out float32."""

    def __init__(self, states: Tensor):
        super().__init__(*states.shape, _weight=states, _freeze=True)

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows).float()


def table_rows(sequences: Sequence[Sequence[int]]) -> list[range]:
    """For each sequence the rows of its tokens in ``token_states``' table."""
    rows, end = [], 0
    for sequence in sequences:
        rows.append(range(end, end := end + len(sequence)))
    return rows


class SpamLab:
    """The frozen SmolLM2 and the messages as its tokens, with what was computed of them; recipes work here.

    ``keep`` writes frozen states to ``workspace/finetune`` and reads them back the next time.
    """

    def __init__(self, cut: int = 64, keep: bool = True):
        self.model = GPT.from_pretrained("smollm2-135m").to(pick_device()).requires_grad_(False)
        self.cut, self.keep, self.parts = cut, keep, load_sms_spam()
        self.tokens = {name: encode_texts(BPETokenizer.smollm2(), part.texts, cut)
                       for name, part in self.parts.items()}
        self.found: dict[tuple[str, int], Tensor] = {}

    def read(self, part: str, layers: Sequence[int]) -> None:
        """``pooled_states`` of a part of the messages after each of the layers, all in one pass."""
        layers = sorted(set(layers))
        name = "-".join(map(str, layers)) if len(layers) < 4 else f"{layers[0]}-to-{layers[-1]}"
        states = self._kept(f"pooled-{part}-{name}", part, layers,
                            lambda: pooled_states(self.model, self.tokens[part], layers))
        self.found |= {(part, layer): states[row] for row, layer in enumerate(layers)}

    def features(self, part: str, recipe: SpamRecipe) -> Tensor:
        """What a recipe's head reads of a part of the messages: (N, D), or 2 D for both pools, times the layers."""
        if missing := [layer for layer in recipe.layers if (part, layer) not in self.found]:
            self.read(part, missing)
        d_model = self.model.config.d_model
        columns = {"mean": slice(d_model), "last": slice(d_model, None), "both": slice(None)}[recipe.pool]
        return torch.cat([self.found[part, layer][:, columns].float() for layer in recipe.layers], dim=1)

    def table(self, part: str, layer: int) -> StateTable:
        """``token_states`` of a part of the messages."""
        return StateTable(self._kept(f"tokens-{part}-{layer}", part, [layer], lambda: token_states(
            self.model, self.tokens[part], layer)).to(self.model.device))

    def _kept(self, name: str, part: str, layers: list[int], compute: Callable[[], Tensor]) -> Tensor:
        if not self.keep:
            return compute().half()
        path = workspace("finetune") / f"sms-{name}-cut-{self.cut}.safetensors"
        return remembered(path, states_fingerprint(self.model, self.tokens[part], layers), compute)


def chosen_examples(labels: Sequence[int], recipe: SpamRecipe) -> list[int]:
    """The positions that a recipe learns from, in random order; spam repeated or ham left out as it says.

    ``ValueError`` for more examples than there are labels, or if all of them are of one class.
    """
    n = recipe.examples or len(labels)
    if n > len(labels):
        raise ValueError(f"examples is {n}; there are {len(labels)} to learn from.")
    positions = list(range(len(labels)))
    if n < len(labels):
        positions = stratified_split(labels, (n / len(labels), 1 - n / len(labels)), recipe.seed)[0]
    check_labels([labels[i] for i in positions], len(positions), 2)
    ham, spam = ([i for i in positions if labels[i] == label] for label in (0, 1))
    if recipe.balance == "fewer":
        return ham[: len(spam)] + spam
    if recipe.balance == "weighted" and recipe.train != "head":  # for a head, weights do it
        return ham + (spam * (len(ham) // len(spam) + 1))[: len(ham)]
    return positions


def fitted_head(features: Tensor, labels: Sequence[int], recipe: SpamRecipe) -> nn.Linear:
    """``fit_head`` as a recipe says."""
    share = sum(labels) / len(labels)
    weights = (0.5 / (1 - share), 0.5 / share) if recipe.balance == "weighted" and 0 < share < 1 else None
    return fit_head(features, labels, decay=recipe.decay, class_weights=weights)


def tuned_classifier(lab: SpamLab, recipe: SpamRecipe, learn: Sequence[int]) -> SequenceClassifier:
    """Blocks, adapters or all weights trained on the training messages ``learn``. The model of the lab stays as it is.

    Frozen blocks are not run: their states are looked up. The head is fitted first, so that the pretrained blocks are
    not bent after random numbers: Kumar et al. 2022 (arXiv:2202.10054), section 3.4.
    """
    layer, labels = recipe.layers[0], lab.parts["train"].labels
    below = 0 if recipe.train == "all" else max(0, layer - recipe.blocks)
    sequences, table = lab.tokens["train"], None
    if below:
        sequences, table = table_rows(sequences), lab.table("train", below)
    model = copy.deepcopy(some_blocks(lab.model, below, layer, table)).requires_grad_(True)
    if recipe.train != "all":
        model.token_embedding.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    if recipe.train == "lora":
        add_lora(model, recipe.rank, 2.0 * recipe.rank)
    classifier = SequenceClassifier(model, 2, POOLS[recipe.pool])
    features, learn = lab.features("train", recipe), list(learn)
    head = fit_head(features[learn], [labels[i] for i in learn], decay=recipe.decay)
    classifier.head = head.to(lab.model.device).requires_grad_(True)
    train_classifier(classifier, [sequences[i] for i in learn], [labels[i] for i in learn],
                     epochs=recipe.epochs, max_lr=recipe.lr, seed=recipe.seed)
    return classifier


@torch.no_grad()
def padded_states(model: GPT, sequences: Sequence[Sequence[int]], layer: int, padding: str,
                  batch_size: int) -> Tensor:
    """The last column after a block, where batches are padded and nobody is told: "left" or "ignored" (right)."""
    part, found = some_blocks(model, 0, layer), []
    pad = pad_left if padding == "left" else lambda batch, device: pad_right(batch, 0, device)
    for start in progress(range(0, len(sequences), batch_size), "padded batches", unit="batch"):
        token_ids, _ = pad(sequences[start : start + batch_size], model.device)
        found.append(part.hidden_states(token_ids)[:, -1].cpu())
    return torch.cat(found)


def examine_fold(lab: SpamLab, recipe: SpamRecipe, learn: list[int], exam: list[int]) -> list[float]:
    """The probability of spam for the training messages ``exam``, by a recipe that has learned from ``learn``."""
    labels = lab.parts["train"].labels
    learn = [learn[i] for i in chosen_examples([labels[i] for i in learn], recipe)]
    if recipe.padding != "known":
        states = [padded_states(lab.model, [lab.tokens["train"][i] for i in part], recipe.layers[0], recipe.padding,
                                batch_size) for part, batch_size in ((learn, 32), (exam, 1))]
        return spam_chance(fitted_head(states[0], [labels[i] for i in learn], recipe), states[1])
    if recipe.train == "head":
        features = lab.features("train", recipe)
        return spam_chance(fitted_head(features[learn], [labels[i] for i in learn], recipe), features[exam])
    classifier = tuned_classifier(lab, recipe, learn)
    below = isinstance(classifier.model.token_embedding, StateTable)
    sequences = table_rows(lab.tokens["train"]) if below else lab.tokens["train"]
    return classify(classifier, [sequences[i] for i in exam])[:, 1].tolist()


def cross_validate(lab: SpamLab, recipe: SpamRecipe, folds: int = 5) -> dict:
    """A recipe's counts on training messages that it has not learned from, in ``folds`` of 5 parts.

    Also the seconds of processor time for each part, and the log loss. Neither the validation nor the test messages
    are touched. ``ValueError`` unless ``folds`` is 1 to 5.
    """
    if not 1 <= folds <= 5:
        raise ValueError(f"folds is {folds}; give 1 (quick) to 5 (every training message is examined once).")
    if lab.cut != recipe.cut:
        raise ValueError(f"cut is {recipe.cut}, the lab's is {lab.cut}: make a SpamLab(cut={recipe.cut}).")
    labels = lab.parts["train"].labels
    parts = stratified_split(labels, [0.2] * 5, seed=0)
    truth, chances, began = [], [], time.process_time()
    for k in range(folds):
        learn = sorted(i for j, part in enumerate(parts) if j != k for i in part)
        chances += examine_fold(lab, recipe, learn, parts[k])
        truth += [labels[i] for i in parts[k]]
    seconds = (time.process_time() - began) / folds
    scores = Scores.count(truth, [int(chance >= recipe.bound) for chance in chances])
    return {"scores": dataclasses.asdict(scores), "processor seconds": round(seconds, 1),
            "log loss": log_loss(truth, chances)}


def at_temperature(chances: Sequence[float], temperature: float) -> list[float]:
    """Probabilities with their log odds divided by ``temperature``; 1 changes nothing, above 1 makes them milder."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    chance = torch.tensor(chances, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return torch.sigmoid(torch.logit(chance) / temperature).tolist()


def fit_temperature(labels: Sequence[int], chances: Sequence[float]) -> float:
    """The temperature with the least ``log_loss``, from 0.1 to 10 in steps of 1%. Guo et al. 2017, section 4.2."""
    choices = [0.1 * 1.01**step for step in range(464)]
    return min(choices, key=lambda temperature: log_loss(labels, at_temperature(chances, temperature)))


def reliability(labels: Sequence[int], chances: Sequence[float],
                edges: Sequence[float]) -> list[tuple[float, int, int]]:
    """For each bin of probabilities that is not empty: (mean probability, how many are spam, how many there are)."""
    bins = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = [(chance, label) for chance, label in zip(chances, labels, strict=True)
                  if low <= chance < high or chance == high == edges[-1]]
        if inside:
            bins.append((sum(c for c, _ in inside) / len(inside), sum(y for _, y in inside), len(inside)))
    return bins


def texts_mark(texts: Sequence[str]) -> str:
    """A short hash of texts in their order, by which a record says what it is about."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def open_envelope(lab: SpamLab, recipe: SpamRecipe) -> dict:
    """Learn from the training messages, set the temperature on the validation messages, then judge the test messages.

    For the end, when nothing is left to choose. Only for recipes that train a head.
    """
    if recipe.train != "head" or recipe.padding != "known":
        raise ValueError(f"train is {recipe.train!r}, padding {recipe.padding!r}: only a head is taken to the test.")
    train, validation, test = (lab.parts[name] for name in ("train", "validation", "test"))
    features = lab.features("train", recipe)
    learn = chosen_examples(train.labels, recipe)
    head = fitted_head(features[learn], [train.labels[i] for i in learn], recipe)
    chances = {name: spam_chance(head, lab.features(name, recipe)) for name in ("validation", "test")}
    return {"test texts": texts_mark(test.texts), "bound": recipe.bound,
            "temperature": fit_temperature(validation.labels, chances["validation"]),
            "chances": {name: [round(chance, 6) for chance in values] for name, values in chances.items()},
            "bag of words": {name: [round(chance, 6) for chance in bag_chances(train, lab.parts[name].texts)]
                             for name in ("validation", "test")}}


def make_table(lab: SpamLab, path: Path) -> None:
    """Every row of ``QUESTIONS`` and then the test, into a JSON record; rows that are there already stay."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    record["command"] = "python -m ch06_finetune.classification --table"
    there = {(row["question"], row["command"]) for row in record["rows"]}
    missing = [(question, recipe, folds) for question, recipes in QUESTIONS.items() for recipe, folds in recipes
               if (question, recipe.command(folds)) not in there]
    if layers := {layer for _, recipe, _ in missing if recipe.padding == "known" for layer in recipe.layers}:
        lab.read("train", sorted(layers))
    for question, recipe, folds in missing:
        row = {"question": question, "command": recipe.command(folds), **cross_validate(lab, recipe, folds)}
        record["rows"].append(row)
        write_text(path, json.dumps(record, indent=1))
        scores = Scores(**row["scores"])
        print(f"{row['command'][39:]:62} {scores}, balanced {balanced_accuracy(scores):.1%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: one recipe cross-validated, with ``--test`` the envelope, with ``--table`` the record."""
    parser = argparse.ArgumentParser(prog="python -m ch06_finetune.classification", description=(
        "SMS spam with SmolLM2-135M. Without options: the chosen recipe, cross-validated on the training messages."))
    for field in dataclasses.fields(SpamRecipe):
        kind = layer_numbers if field.name == "layers" else type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, choices=CHOICES.get(field.name))
    parser.add_argument("--folds", type=int, default=5, help="how many of 5 parts are examined")
    parser.add_argument("--test", action="store_true", help="open the test set: for the end")
    parser.add_argument("--table", action="store_true", help=f"all rows of {short_path(RECORD)}")
    given = vars(parser.parse_args(arguments))
    folds, test, table = (given.pop(name) for name in ("folds", "test", "table"))
    try:
        recipe = SpamRecipe(**given)
        lab = SpamLab(recipe.cut)
        if table:
            make_table(lab, RECORD)
        elif test:
            report_test(lab, recipe)
        else:
            found = cross_validate(lab, recipe, folds)
            print(f"{recipe.command(folds)}\n{describe(Scores(**found['scores']))}\nlog loss {found['log loss']:.4f}")
    except (ValueError, ConnectionError) as error:
        parser.exit(1, f"{error}\n")
    seconds = time.time() - psutil.Process().create_time()
    print(f"{seconds:.0f} s from the start of the program, {torch.get_num_threads()} threads, at most "
          f"{peak_memory_bytes() / 1e9:.2f} GB")


def layer_numbers(text: str) -> tuple[int, ...]:
    """"8,16" -> (8, 16)."""
    return tuple(int(number) for number in text.split(","))


def report_test(lab: SpamLab, recipe: SpamRecipe) -> None:
    """Open the test set, print the result, and put what it said into the record."""
    result = open_envelope(lab, recipe)
    labels, chances = lab.parts["test"].labels, result["chances"]["test"]
    print(describe(counted(labels, chances, recipe.bound)))
    result |= {"command": recipe.command().split(" --folds")[0] + " --test",
               "seconds": round(time.time() - psutil.Process().create_time()), "threads": torch.get_num_threads(),
               "peak gigabytes": round(peak_memory_bytes() / 1e9, 2)}
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"rows": []}
    write_text(RECORD, json.dumps(record | {"test": result}, indent=1))


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    main()
