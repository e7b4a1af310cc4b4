"""Deep dive: Distillation, or what a teacher says besides the answer.

Written from ch06_finetune/distillation.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "distillation_loss",
    "cut_tokenizer",
    "first_pieces",
    "fold",
    "transplant",
    "School",
    "FAMOUS",
    "lesson_tales",
    "open_school",
    "lump_rest",
    "TeacherNotes",
    "cut_windows",
    "listen",
    "take_notes",
    "notes_fingerprint",
    "save_notes",
    "load_notes",
    "METHODS",
    "lesson_loss",
    "teach",
    "write_samples",
    "mean_entropy",
    "teacher_bits",
    "examine_pupil",
    "RECORD_OF_LESSONS",
    "LESSONS",
    "COMMAND",
    "prepare_notes",
    "pupil_bits",
    "first_marks",
    "new_pupil",
    "give_lesson",
    "record_lessons",
    "main",
]

import argparse
import copy
import dataclasses
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ch01_data.data import Document
from ch02_tokenizer.tokenizer import index_vocab, merge_word
from ch05_pretrain.overfitting import distinct_n
from ch05_pretrain.pretrain import evaluate, measures
from ch05_pretrain.storyteller import encode_documents
from ch06_finetune.finetune import fine_tune
from ch06_finetune.previous_chapters import (
    END_OF_TEXT, GPT, BPETokenizer, cross_entropy, generate_tokens, load_documents, load_storyteller, split_documents,
)
from utils.progress import progress
from utils.workspace import ROOT, atomic_write, short_path, workspace, write_text


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0,
                      direction: str = "forward") -> Tensor:
    """Kullback-Leibler divergence between teacher and student in nats a token, times temperature squared.

    Both logits (..., V); the mean over all but the last dimension. "forward" is KL(teacher || student), "reverse"
    KL(student || teacher). No gradient flows into the teacher. ``ValueError`` for shapes that differ, a temperature
    that is not above 0, an unknown direction, or teacher's logits that are not finite.
    Hinton et al. 2015 (arXiv:1503.02531), section 2; Gu et al. 2023 (arXiv:2306.08543) for the reverse.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student_logits have shape {tuple(student_logits.shape)} and teacher_logits "
                         f"{tuple(teacher_logits.shape)}; both must be (..., V) over the same vocabulary: cut the "
                         "teacher's to the student's first.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0. 1 leaves the distributions as they are.")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction is {direction!r}; it must be 'forward' or 'reverse'.")
    if bad := int((~torch.isfinite(teacher_logits)).sum()):
        raise ValueError(f"{bad} of {teacher_logits.numel()} teacher_logits are not finite; every one must be. Look at "
                         "the teacher's precision, or at the notes that were read.")
    student = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    return (first.exp() * (first - second)).sum(dim=-1).mean() * temperature**2


def cut_tokenizer(tokenizer: BPETokenizer, token_ids: Iterable[int], size: int) -> tuple[BPETokenizer, Tensor]:
    """The tokenizer with only ``size`` of its tokens, and the old id of each: (size,).

    All single bytes and ``<|endoftext|>`` stay, then the tokens most frequent among ``token_ids``, each together with
    the shorter tokens that it is merged from. Words whose tokens all stay are encoded as before, others in shorter
    pieces. ``ValueError`` if the size leaves no room, or there are too few tokens to fill it.
    """
    parts = defaultdict(set)
    for a, b in tokenizer.merges:
        parts[a + b] |= {a, b}
    id_of = index_vocab(tokenizer.vocab, tokenizer.merges)[0]
    kept = {i for i, token in tokenizer.vocab.items() if len(token) == 1} | {tokenizer.special_tokens[END_OF_TEXT]}
    if not len(kept) < size <= tokenizer.vocab_size:
        raise ValueError(f"size is {size}; it must be above {len(kept)}, the single bytes and {END_OF_TEXT}, and at "
                         f"most {tokenizer.vocab_size}, the whole vocabulary.")
    for token_id, _ in Counter(token_ids).most_common():
        family, new = [token_id], set()
        while family:
            member = family.pop()
            if member not in kept | new:
                new.add(member)
                family += [id_of[part] for part in parts[tokenizer.vocab[member]]]
        if len(kept) + len(new) <= size:
            kept |= new
    if len(kept) < size:
        raise ValueError(f"The text uses only {len(kept)} tokens with their parts, and size is {size}: give more text, "
                         "or a smaller size.")
    old_ids = sorted(kept)
    tokens = {tokenizer.vocab[i] for i in old_ids}
    merges = [(a, b) for a, b in tokenizer.merges if a in tokens and b in tokens and a + b in tokens]
    vocab = {new: tokenizer.vocab[old] for new, old in enumerate(old_ids)}
    return BPETokenizer(vocab, merges, [END_OF_TEXT], tokenizer.pattern), torch.tensor(old_ids)


def first_pieces(tokenizer: BPETokenizer, cut: BPETokenizer) -> Tensor:
    """For each token of the whole tokenizer, the id of its first piece in the cut one: (V,).

    A token that stays is its own first piece; special tokens that are gone count as the end of the text.
    """
    id_of, rank, merged_id = index_vocab(cut.vocab, cut.merges)
    end, special = cut.special_tokens[END_OF_TEXT], set(tokenizer.special_tokens.values())
    return torch.tensor([
        end if i in special else merge_word([id_of[bytes([byte])] for byte in token], merged_id, rank)[0]
        for i, token in sorted(tokenizer.vocab.items())])


def fold(logits: Tensor, landing: Tensor, size: int) -> Tensor:
    """Log-probabilities over the cut vocabulary: each token's probability goes to its first piece.

    logits (..., V), landing (V,) from ``first_pieces`` -> (..., size). They sum to 1: nothing is lost.
    ``ValueError`` if there is not one place to land for each logit.
    """
    if logits.size(-1) != len(landing):
        raise ValueError(f"There are {logits.size(-1)} logits and {len(landing)} places to land; give one for each "
                         "token of the teacher's vocabulary.")
    probabilities = torch.softmax(logits.float(), dim=-1).reshape(-1, len(landing))  # (N, V)
    folded = probabilities.new_zeros(len(probabilities), size)
    folded.scatter_add_(1, landing.expand(len(probabilities), -1), probabilities)
    return folded.clamp_min(1e-30).log().view(*logits.shape[:-1], size)


def transplant(model: GPT, tokenizer: BPETokenizer, new_tokenizer: BPETokenizer) -> GPT:
    """The same blocks under another vocabulary: a copy of ``model`` whose embeddings are made anew.

    The embedding of a new token is the mean of the old embeddings of its pieces. ``ValueError`` unless input and
    output embeddings are one (``tie_embeddings``).
    """
    if not model.config.tie_embeddings:
        raise ValueError("tie_embeddings is False; the output layer would keep the old vocabulary. Give a model with "
                         "tied embeddings.")
    id_of, rank, merged_id = index_vocab(tokenizer.vocab, tokenizer.merges)
    grown = GPT(dataclasses.replace(model.config, vocab_size=new_tokenizer.vocab_size)).to(model.device)
    old, rows = model.token_embedding.weight.detach(), []
    for i in range(new_tokenizer.vocab_size):
        token = new_tokenizer.vocab[i]
        special = tokenizer.special_tokens.get(token.decode("utf-8", "replace"))
        pieces = [special] if special is not None else merge_word(
            [id_of[bytes([byte])] for byte in token], merged_id, rank)
        rows.append(old[pieces].mean(dim=0))
    tables = {"token_embedding.weight": torch.stack(rows), "lm_head.weight": torch.stack(rows)}
    grown.load_state_dict(model.state_dict() | tables)
    return grown.eval()


@dataclass(frozen=True)
class School:
    """All that a lesson needs: both models, the cut tokenizer, and the text as its tokens."""

    teacher: GPT
    student: GPT
    tokenizer: BPETokenizer
    old_ids: Tensor
    landing: Tensor
    train: Sequence[int]
    held_out: Sequence[int]
    held_out_bytes: int


FAMOUS = ("andersen/little-tiny-or-thumbelina", "andersen/the-little-mermaid")  # SmolLM2 may know them by heart


def lesson_tales() -> tuple[list[Document], list[Document]]:
    """Andersen's tales to learn from, and the held-out ones to judge by, without the two that are ``FAMOUS``."""
    train, held_out = split_documents(load_documents("andersen"))
    return train, [tale for tale in held_out if tale.id not in FAMOUS]


def open_school(teacher: GPT, whole: BPETokenizer, size: int = 4096) -> School:
    """A teacher with its tokenizer, the storyteller with ``size`` of its tokens, and Andersen's tales for both."""
    train, held_out = lesson_tales()
    cut, old_ids = cut_tokenizer(whole, encode_documents(whole, train).tolist(), size)
    storyteller, words = load_storyteller()
    return School(teacher, transplant(storyteller, words, cut), cut, old_ids, first_pieces(whole, cut),
                  encode_documents(cut, train), encode_documents(cut, held_out),
                  sum(len(tale.text.encode()) for tale in held_out))


def lump_rest(log_probs: Tensor, top_ids: Tensor) -> Tensor:
    """The log-probabilities of some tokens, and of all others as one lump.

    log_probs (..., V), which sum to 1, top_ids (..., k) -> (..., k + 1). ``ValueError`` if k leaves nothing to lump.
    """
    if not 0 < top_ids.size(-1) < log_probs.size(-1):
        raise ValueError(f"k is {top_ids.size(-1)}; it must be from 1 to {log_probs.size(-1) - 1}, one below the "
                         "vocabulary, so that a rest is left.")
    rest = log_probs.scatter(-1, top_ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, top_ids), rest], dim=-1)


@dataclass(frozen=True)
class TeacherNotes:
    """What a teacher said of a text: the text's windows, and of each next token the likeliest, and the rest.

    windows (N, T + 1) int64, top_ids (N, T, k) int64, log_probs (N, T, k + 1) float16, the last of them the lump.
    """

    windows: Tensor
    top_ids: Tensor
    log_probs: Tensor

    def first(self, n_tokens: int) -> "TeacherNotes":
        """The notes on the first windows, as many as ``n_tokens`` fill."""
        n = n_tokens // (self.windows.size(1) - 1)
        if not 0 < n <= len(self.windows):
            raise ValueError(f"{n_tokens} tokens are {n} windows; there are 1 to {len(self.windows)}.")
        return TeacherNotes(self.windows[:n], self.top_ids[:n], self.log_probs[:n])


def cut_windows(token_ids, n_tokens: int, length: int) -> Tensor:
    """The first ``n_tokens`` of a row as windows that overlap by one token: (n_tokens // length, length + 1)."""
    if n_tokens < length or n_tokens >= len(token_ids):
        raise ValueError(f"n_tokens is {n_tokens}; it must be from {length}, one window, to {len(token_ids) - 1}.")
    row = torch.tensor(token_ids[: n_tokens // length * length + 1].tolist())
    return row.unfold(0, length + 1, length).contiguous()


@torch.inference_mode()
def listen(teacher: GPT, windows: Tensor, old_ids: Tensor, landing: Tensor, batch_size: int = 2) -> Iterator[Tensor]:
    """The teacher's folded log-probabilities (b, T, V) of each few windows (N, T + 1) in the cut vocabulary."""
    for rows in progress(windows.split(batch_size), "the teacher reads", unit="batch"):
        yield fold(teacher(old_ids[rows[:, :-1]]), landing, len(old_ids))


def take_notes(teacher: GPT, windows: Tensor, old_ids: Tensor, landing: Tensor, k: int = 64) -> TeacherNotes:
    """Let the teacher read every window once, and note its k likeliest next tokens and the rest.

    ``ValueError`` for k that leaves no rest, or if the teacher's numbers are not finite.
    """
    if not 0 < k < len(old_ids):
        raise ValueError(f"k is {k}; it must be from 1 to {len(old_ids) - 1}, one below the vocabulary.")
    ids, log_probs = [], []
    for heard in listen(teacher, windows, old_ids, landing):
        if not torch.isfinite(heard).all():
            raise ValueError(f"The teacher's numbers are not finite from window {2 * len(ids)} on; all must be. "
                             "Run it in float32.")
        ids.append(heard.topk(k, dim=-1).indices)
        log_probs.append(lump_rest(heard, ids[-1]).half())
    return TeacherNotes(windows, torch.cat(ids), torch.cat(log_probs))


def notes_fingerprint(windows: Tensor, old_ids: Tensor, k: int, teacher: str) -> str:
    """A SHA-256 of all that decides what the notes say: text, vocabulary, k, and the teacher's name."""
    parts = json.dumps([windows.tolist(), old_ids.tolist(), k, teacher])
    return hashlib.sha256(parts.encode()).hexdigest()


def save_notes(notes: TeacherNotes, path: Path, fingerprint: str) -> None:
    """Write notes as safetensors, ids in 16 bits, with their fingerprint."""
    tensors = {"windows": notes.windows.to(torch.int32), "top_ids": notes.top_ids.to(torch.uint16),
               "log_probs": notes.log_probs}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"fingerprint": fingerprint})


def load_notes(path: Path, fingerprint: str) -> TeacherNotes:
    """Notes that ``save_notes`` wrote; ``ValueError`` if they are damaged or about something else."""
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("fingerprint", "none")
            if found != fingerprint:
                raise ValueError(f"{short_path(path)} has the fingerprint {found[:12]}, and {fingerprint[:12]} is "
                                 "needed: text, vocabulary, k or teacher were others. Delete the file, and take notes "
                                 "again.")
            tensors = {name: file.get_tensor(name) for name in ("windows", "top_ids", "log_probs")}
    except SafetensorError as error:
        raise ValueError(f"{short_path(path)} is damaged ({error}). Delete the file, and take notes again.") from None
    return TeacherNotes(tensors["windows"].long(), tensors["top_ids"].long(), tensors["log_probs"])


METHODS = ("hard targets", "forward KL", "reverse KL", "half and half")


def lesson_loss(logits: Tensor, targets: Tensor, top_ids: Tensor, log_probs: Tensor, method: str) -> Tensor:
    """The loss of a student by one of ``METHODS``: from the text's own tokens, the teacher's notes, or both.

    logits (B, T, V), targets (B, T), top_ids (B, T, k), log_probs (B, T, k + 1). ``ValueError`` for another method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if method == "hard targets":
        return cross_entropy(logits, targets)
    student = lump_rest(torch.log_softmax(logits, dim=-1), top_ids)
    loss = distillation_loss(student, log_probs, direction="reverse" if method == "reverse KL" else "forward")
    return (loss + cross_entropy(logits, targets)) / 2 if method == "half and half" else loss


def teach(student: GPT, notes: TeacherNotes, method: str, steps: int, *, batch_size: int = 4, max_lr: float = 1e-3,
          seed: int = 0) -> list[float]:
    """Train in place on the windows of the notes, in an order that the seed decides; the loss of each step."""
    if steps < 1 or not 0 < batch_size <= len(notes.windows):
        raise ValueError(f"steps is {steps} and batch_size {batch_size}; steps must be at least 1, and batch_size from "
                         f"1 to the {len(notes.windows)} windows.")
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(notes.windows), generator=generator).tolist()
    batches = torch.tensor(order[: steps * batch_size]).view(steps, batch_size)

    def loss_of(rows: Tensor) -> Tensor:
        windows = notes.windows[rows]
        return lesson_loss(student(windows[:, :-1]), windows[:, 1:], notes.top_ids[rows], notes.log_probs[rows], method)

    return fine_tune(student, list(batches), loss_of, max_lr=max_lr)


@torch.inference_mode()
def write_samples(student: GPT, tokenizer: BPETokenizer, n: int = 16, length: int = 64, seed: int = 0) -> Tensor:
    """``n`` beginnings of tales at temperature 1, each from ``<|endoftext|>``: (n, length + 1)."""
    start = torch.full((n, 1), tokenizer.special_tokens[END_OF_TEXT])
    steps = generate_tokens(student, start, length, generator=torch.Generator().manual_seed(seed))
    return torch.cat([start, *(step[:, None] for step in steps)], dim=1)


@torch.inference_mode()
def mean_entropy(model: GPT, windows: Tensor) -> float:
    """How undecided a model is about the next token of windows (N, T + 1): mean entropy in nats."""
    total = 0.0
    for rows in windows[:, :-1].split(4):
        log_probs = torch.log_softmax(model(rows).float(), dim=-1)
        total -= (log_probs.exp() * log_probs).sum(dim=-1).mean(dim=-1).sum().item()
    return total / len(windows)


def teacher_bits(school: School, windows: Tensor) -> float:
    """Bits per byte that the teacher needs for windows (N, T + 1) of the cut vocabulary."""
    heard = listen(school.teacher, windows, school.old_ids, school.landing)
    bits = sum(-log_probs.gather(-1, rows[:, 1:, None]).sum().item()
               for log_probs, rows in zip(heard, windows.split(2), strict=True))
    n_bytes = sum(len(school.tokenizer.decode_bytes(row)) for row in windows[:, 1:])
    return measures(bits, 1, n_bytes).bits_per_byte


def examine_pupil(school: School, student: GPT, *, by_teacher: bool = True) -> dict[str, float]:
    """What became of a student: "bits_per_byte" and "entropy" on held-out tales, "distinct" pairs in its samples.

    With ``by_teacher`` also "samples_by_teacher": bits per byte that the teacher needs for the samples.
    """
    told = write_samples(student, school.tokenizer)
    words = " ".join(school.tokenizer.decode(row[1:]) for row in told).split()
    windows = cut_windows(school.held_out, 10 * 256, 256)
    marks = {"bits_per_byte": evaluate(student, school.held_out, school.held_out_bytes).bits_per_byte,
             "entropy": mean_entropy(student, windows), "distinct": distinct_n(words[:500], 2)}
    return marks | ({"samples_by_teacher": teacher_bits(school, told)} if by_teacher else {})


RECORD_OF_LESSONS = ROOT / "ch06_finetune" / "records" / "distillation.json"
LESSONS = {"classes": [["storyteller", 15_360], ["storyteller", 61_440], ["newcomer", 15_360]], "seeds": [0, 1],
           "steps": 50, "batch_size": 4, "max_lr": {"storyteller": 5e-4, "newcomer": 2e-3}, "k": 64, "window": 256,
           "vocabulary": 4096}  # a class: the student, and of how many tokens the text is
COMMAND = "python -m ch06_finetune.distillation"


def prepare_notes(school: School, n_tokens: int, k: int, name: str, window: int = 256) -> TeacherNotes:
    """Notes on the first ``n_tokens`` of the training tales, from the workspace if they are there, else taken now.

    Says which. Notes about another text, vocabulary, teacher or k are taken again.
    """
    path = workspace("finetune", "distillation") / f"notes-{n_tokens}-{k}.safetensors"
    windows = cut_windows(school.train, n_tokens, window)
    fingerprint = notes_fingerprint(windows, school.old_ids, k, name)
    if path.exists():
        try:
            notes = load_notes(path, fingerprint)
            print(f"Using the teacher's notes in {short_path(path)}.")
            return notes
        except ValueError as error:
            print(f"The notes are taken again: {error}")
    notes = take_notes(school.teacher, windows, school.old_ids, school.landing, k)
    save_notes(notes, path, fingerprint)
    print(f"The teacher has read {windows[:, 1:].numel():,} tokens; its notes are in {short_path(path)}.")
    return notes


def pupil_bits() -> float:
    """Bits per byte of the storyteller, as it is and with its own tokens, on the held-out tales."""
    storyteller, words = load_storyteller()
    held_out = lesson_tales()[1]
    n_bytes = sum(len(tale.text.encode()) for tale in held_out)
    return evaluate(storyteller, encode_documents(words, held_out), n_bytes).bits_per_byte


def first_marks(school: School) -> dict[str, float]:
    """Bits per byte on the held-out tales before any lesson: both models, with their own and the cut tokens."""
    theirs = encode_documents(BPETokenizer.smollm2(), lesson_tales()[1])
    windows = cut_windows(school.held_out, len(school.held_out) - 1, 256)
    return {"storyteller, its own tokens": pupil_bits(),
            "storyteller, cut tokens, untrained": evaluate(school.student, school.held_out,
                                                           school.held_out_bytes).bits_per_byte,
            "SmolLM2, its own tokens": evaluate(school.teacher, theirs, school.held_out_bytes, context_length=256,
                                                batch_size=2).bits_per_byte,
            "SmolLM2, cut tokens": teacher_bits(school, windows)}


def new_pupil(school: School, name: str) -> GPT:
    """A copy of the "storyteller" as transplanted, or a "newcomer": the same model with random weights."""
    if name not in ("storyteller", "newcomer"):
        raise ValueError(f"name is {name!r}; it must be 'storyteller' or 'newcomer'.")
    if name == "storyteller":
        return copy.deepcopy(school.student)
    torch.manual_seed(0)
    return GPT(school.student.config).eval()


def give_lesson(school: School, notes: TeacherNotes, pupil: str, tokens: int, method: str, seed: int) -> dict:
    """One row of the record: what became of a pupil after ``LESSONS["steps"]`` steps by one method."""
    student, began = new_pupil(school, pupil), time.process_time()
    losses = teach(student, notes.first(tokens), method, LESSONS["steps"], batch_size=LESSONS["batch_size"],
                   max_lr=LESSONS["max_lr"][pupil], seed=seed)
    seconds = round(time.process_time() - began, 1)
    marks = {name: round(value, 4) for name, value in examine_pupil(school, student).items()}
    return {"seed": seed, "pupil": pupil, "tokens": tokens, "method": method} | marks | {
        "last_loss": round(sum(losses[-10:]) / 10, 4), "cpu_seconds": seconds}


def record_lessons(path: Path = RECORD_OF_LESSONS, precision: str = "float32", at_most: int = 1000) -> None:
    """Teach by every method, with little and more text, from several seeds; each finished lesson is written at once.

    Lessons that are in the record are not given again, so it can be interrupted; ``at_most`` ends it after so many.
    ``ValueError`` if the record was made with other settings, or from another storyteller.
    """
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"lessons": []}
    if record.get("settings", LESSONS) != LESSONS:
        raise ValueError(f"{short_path(path)} was made with other settings than LESSONS. Delete it and begin anew.")
    was = record.get("before", {}).get("storyteller, its own tokens")
    if was and abs(was - (now := pupil_bits())) > 1e-3:
        raise ValueError(f"{short_path(path)} was made from another storyteller: {was:.4f} bits per byte, this one "
                         f"{now:.4f}. Delete it and begin anew.")
    teacher = GPT.from_pretrained("smollm2-135m").to(getattr(torch, precision))
    school = open_school(teacher, BPETokenizer.smollm2(), LESSONS["vocabulary"])
    most = max(tokens for _, tokens in LESSONS["classes"])
    notes = prepare_notes(school, most, LESSONS["k"], f"smollm2-135m {precision}", LESSONS["window"])
    if "before" not in record:
        command = COMMAND if precision == "float32" else f"{COMMAND} --precision {precision}"
        record |= {"command": command, "settings": LESSONS, "teacher_precision": precision,
                   "threads": torch.get_num_threads(), "before": first_marks(school),
                   "untaught": {name: examine_pupil(school, new_pupil(school, name)) for name in LESSONS["max_lr"]}}
        write_text(path, json.dumps(record, indent=1))
    done = {tuple(lesson[name] for name in ("pupil", "tokens", "method", "seed")) for lesson in record["lessons"]}
    plan = [(*one, method, seed) for seed in LESSONS["seeds"] for one in LESSONS["classes"] for method in METHODS]
    for lesson in progress([lesson for lesson in plan if lesson not in done][:at_most], "lessons", unit="lesson"):
        record["lessons"].append(give_lesson(school, notes, *lesson))
        print(record["lessons"][-1], flush=True)
        write_text(path, json.dumps(record, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command that makes the record."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Let SmolLM2 teach the storyteller, and record it.")
    parser.add_argument("--path", type=Path, default=RECORD_OF_LESSONS, help="where the record is written")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32",
                        help="the teacher's; bfloat16 is faster on processors that have it in hardware")
    parser.add_argument("--at-most", type=int, default=1000, help="stop after so many lessons; the next call goes on")
    chosen = parser.parse_args(arguments)
    record_lessons(chosen.path, chosen.precision, chosen.at_most)

if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    main()
