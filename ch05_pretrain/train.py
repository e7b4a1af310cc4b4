"""Chapter 5: long training runs, from a terminal, on one process or many.

    python -m ch05_pretrain.train --preset storyteller
    torchrun --nproc-per-node 2 -m ch05_pretrain.train --preset storyteller
    python -m ch05_pretrain.train --preset gpt2-124m --data my_shards --dry-run

The model, the loss, the optimizers, the loop and the checkpoints are those of pretrain.ipynb, and the ways to
spread a step over processes those of parallelize.py. Here is only what a run of hours needs around them:
settings from files and flags, tokens found or made, signals, lines in a log, and the files at the end.
"""

import argparse
import dataclasses
import difflib
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ch01_data.data import SOURCES, Document, load_documents, slug, split_documents
from ch02_tokenizer.tokenizer import (
    END_OF_TEXT, SHARD_FORMAT, BPETokenizer, file_sha256, open_shard, prepare_tokens, read_shard_header,
    shards_problem, texts_sha256, write_shard,
)
from ch04_gpt.gpt import PRESETS, GPT, GPTConfig, count_parameters, flops_per_token
from ch04_gpt.memory_and_compute import activation_bytes
from ch05_pretrain.pretrain import (
    History, OneProcess, TrainConfig, checkpoints, continue_text, evaluate, save_finished, train,
)
from utils.device import pick_device
from utils.workspace import short_path, workspace, write_text

HERE = Path(__file__).resolve().parent
PRESET_RUNS = {"storyteller": HERE / "storyteller" / "train.toml"}  # whole records of runs;
GPU_RUN = HERE / "launch" / "gpu.toml"  # for any other model of chapter 4: how it is trained on GPUs


# ---------------------------------------------------------------- settings: TOML files, and flags that win


@dataclass(frozen=True)
class DataConfig:
    """Which text a run learns from. See ``HELP`` for the entries."""

    texts: tuple[str, ...] = ("andersen",)
    weights: tuple[float, ...] = ()
    tokenizer: str = "auto"

    def __post_init__(self) -> None:
        if not self.texts or len(set(self.texts)) < len(self.texts):
            raise ValueError(f"texts is {list(self.texts)}; give at least one text, and each once (weights repeat).")
        if len(self.weights) not in (0, len(self.texts)) or not all(weight > 0 for weight in self.weights):
            raise ValueError(f"weights is {list(self.weights)} for {len(self.texts)} texts; give one number above 0 "
                             "for each text, or none.")


TABLES = {"model": GPTConfig, "train": TrainConfig, "data": DataConfig}

HELP = {
    "model": {
        "preset": f"a model of chapter 4: {', '.join(PRESETS)}",
        "vocab_size": "number of token ids; a tokenizer that is trained gets this size",
        "context_length": "the most positions that the model can see (the context of the training, if not given)",
        "d_model": "width of the residual stream",
        "n_layers": "number of blocks",
        "n_heads": "heads of queries",
        "n_kv_heads": "heads of keys and values",
        "d_ff": "hidden width of the MLP",
        "norm": "layernorm or rmsnorm",
        "mlp": "gelu or swiglu",
        "position": "learned or rope",
        "rope_theta": "base of the rotary frequencies",
        "bias": "biases in linear layers and norms",
        "tie_embeddings": "one table for the embedding and the output head",
        "dropout": "share of activations that is dropped while training",
        "norm_eps": "added to the variance in norms",
        "head_dim": "width of one head",
        "qk_norm": "normalise queries and keys",
        "rope_scaling": "slower rotations for a longer context (in a file only)",
        "window": "how many positions a position sees",
    },
    "train": {
        "steps": "steps of the optimizer, the length of the run",
        "batch_size": "sequences a step, over all processes and micro-batches",
        "context_length": "tokens of a sequence",
        "max_lr": "highest learning rate, of embeddings and vectors",
        "matrix_lr": "highest learning rate of the matrices of the blocks, by Muon",
        "min_lr": "learning rate at the end",
        "warmup_steps": "steps until the learning rate is at its highest",
        "weight_decay": "share of the weights that is taken off a step, times the learning rate",
        "max_grad_norm": "gradients that are longer are shortened to this",
        "eval_every": "steps between two evaluations on held-out text",
        "eval_tokens": "held-out tokens that an evaluation during the run looks at",
        "save_every": "steps between two checkpoints",
        "seed": "of weights, batches and dropout",
        "optimizer": "muon or adamw",
        "split_qkv": "muon takes queries, keys and values as three matrices",
        "schedule": "cosine, or wsd: warm up, stay, decay",
        "decay_steps": "wsd: steps of the decay; 0 is a fifth of all",
        "accumulate": "micro-batches that a step is cut into, to need less memory",
        "precision": "float32, bfloat16 or float16 for the matrix products",
        "compile": "torch.compile: minutes at the start, faster steps then",
        "keep": "how many checkpoints stay, the best not counted",
        "sample_every": "steps between two samples of text; 0 is never",
    },
    "data": {
        "texts": "names (andersen, shakespeare, novels ...), files or folders of texts, or a corpus of "
                 "ch01_data.pipeline; or one folder of token shards. The held-out text is a part of the first",
        "weights": "how often each text is read in an epoch, in the order of the texts; 0.5 is half of it",
        "tokenizer": "gpt2, smollm2, the path of a tokenizer.json, or auto: the published one if vocab_size is its "
                     "size, else one trained on the texts",
    },
}
FLAGS = {("model", "preset"): "--model", ("model", "context_length"): "--model-context-length",
         ("data", "texts"): "--data"}  # where a flag is not called like its entry


def entries(table: str) -> dict[str, typing.Any]:
    """The entries of a table of settings and their types."""
    return ({"preset": str} if table == "model" else {}) | typing.get_type_hints(TABLES[table])


def nearest(name: str, known: Iterable[str]) -> str:
    """" Did you mean ...?" for a name that is not known, or nothing."""
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def fits(value, kind) -> bool:
    """Whether a value from a TOML file is of the type of a dataclass's field."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    kinds = typing.get_args(kind) or (kind,)
    if isinstance(value, dict):
        return any(dataclasses.is_dataclass(kind) for kind in kinds)
    return type(value) in kinds or (float in kinds and type(value) is int)


def check_tables(tables: Mapping, source: str) -> dict[str, dict]:
    """The tables [model], [train] and [data], all there; ``ValueError`` for what is unknown or of a wrong type."""
    for table, given in tables.items():
        if table not in TABLES or not isinstance(given, dict):
            raise ValueError(f"{source}: there is no table {table!r}.{nearest(table, TABLES)} It knows "
                             f"{', '.join(f'[{name}]' for name in TABLES)}; an entry stands below one of them.")
        known = entries(table)
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"{source}: [{table}] has no entry {name!r}.{nearest(name, known)} "
                                 f"It knows {', '.join(known)}.")
            if not fits(value, known[name]):
                kind = getattr(known[name], "__name__", "") if known[name] in (int, float, str, bool) else known[name]
                raise ValueError(f"{source}: {name} in [{table}] is {value!r}; it must be of type {kind}.")
    return {table: dict(tables.get(table, {})) for table in TABLES}


def read_toml(path: Path) -> dict[str, dict]:
    """The tables of a settings file; ``ValueError`` or ``OSError`` says what is wrong with it."""
    try:
        return check_tables(tomllib.loads(path.read_text(encoding="utf-8")), short_path(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{short_path(path)} is not TOML: {error}.") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no settings file {path}, seen from {Path.cwd()}. Check its name.") from None


def preset_tables(name: str) -> dict[str, dict]:
    """The settings of a preset: a whole recorded run, or a model of chapter 4 with the settings for GPUs."""
    if name in PRESET_RUNS:
        return read_toml(PRESET_RUNS[name])
    if name in PRESETS:
        tables = read_toml(GPU_RUN)
        length = min(tables["train"]["context_length"], PRESETS[name].context_length)
        return tables | {"model": {"preset": name}, "train": tables["train"] | {"context_length": length}}
    known = [*PRESET_RUNS, *(preset for preset in PRESETS if preset not in PRESET_RUNS)]
    raise ValueError(f"There is no preset {name!r}.{nearest(name, known)} There are {', '.join(known)}.")


def read_settings(chosen: argparse.Namespace) -> dict[str, dict]:
    """The three tables of a run: the preset's, over them the file's, over them the flags'."""
    layers = [preset_tables(chosen.preset)] if chosen.preset else []
    layers += [read_toml(chosen.config)] if chosen.config else []
    flags: dict[str, dict] = {table: {} for table in TABLES}
    for name, value in vars(chosen).items():
        table, _, entry = name.partition(".")
        if entry:
            flags[table][entry] = value
    tables: dict[str, dict] = {table: {} for table in TABLES}
    for layer in [*layers, flags]:
        for table, name in (("model", "preset"), ("data", "texts")):
            if name in layer[table]:
                tables[table] = {}  # another model or text: nothing of the one before
        tables = {table: tables[table] | layer[table] for table in TABLES}
    return tables


def to_toml(tables: Mapping[str, Mapping]) -> str:
    """Tables of settings as TOML; entries that are None are left out, as TOML has no word for it."""
    def spell(value) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{name} = {spell(item)}" for name, item in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(spell, value)) + "]"
        return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)

    lines = []
    for table, given in tables.items():
        lines += [f"[{table}]", *(f"{name} = {spell(value)}" for name, value in given.items() if value is not None), ""]
    return "\n".join(lines)


def model_config(given: Mapping, vocab_size: int, context_length: int) -> GPTConfig:
    """The model that a [model] table describes; what it leaves open follows from tokenizer and training."""
    changes = {name: value for name, value in given.items() if name != "preset"}
    if "preset" not in given:
        return GPTConfig.from_dict({"vocab_size": vocab_size, "context_length": context_length} | changes)
    base = find_model(given["preset"]).to_dict()
    for name, causes in {"head_dim": ("d_model", "n_heads"), "d_ff": ("d_model",), "n_kv_heads": ("n_heads",)}.items():
        if any(cause in changes for cause in causes):
            base[name] = None  # belongs to the old sizes: filled in anew
    return GPTConfig.from_dict(base | changes)


def find_model(name: str) -> GPTConfig:
    """A configuration of chapter 4 by name; ``ValueError`` names the nearest."""
    if name not in PRESETS:
        raise ValueError(f"There is no model {name!r}.{nearest(name, PRESETS)} There are {', '.join(PRESETS)}.")
    return PRESETS[name]


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from (shards, memory-mapped) and held-out ones, their bytes of text, and the tokenizer."""

    tokenizer: BPETokenizer
    train: list[np.ndarray]
    val: np.ndarray
    val_bytes: int
    folder: Path


def wanted_vocab_size(model: Mapping) -> int | None:
    """The number of ids that a [model] table asks for, if it does."""
    return model.get("vocab_size") or (find_model(model["preset"]).vocab_size if "preset" in model else None)


def token_folder(data: DataConfig) -> Path | None:
    """The folder of token shards that ``texts`` names, or None if it names texts."""
    folder = Path(data.texts[0])
    return folder if len(data.texts) == 1 and folder.is_dir() and any(folder.glob("*.bin")) else None


def find_tokenizer(name: str, vocab_size: int | None) -> BPETokenizer | None:
    """The tokenizer that a run names; None if one is to be trained on its texts."""
    published = {"gpt2": (50_257, BPETokenizer.gpt2), "smollm2": (49_152, BPETokenizer.smollm2)}
    if name in published:
        return published[name][1]()
    if name == "auto":
        return next((make() for size, make in published.values() if size == vocab_size), None)
    if not Path(name).is_file():
        raise ValueError(f"There is no tokenizer {name!r}: give gpt2, smollm2, auto or the path of a tokenizer.json.")
    return BPETokenizer.load(name)


def prepare_corpus(data: DataConfig, vocab_size: int | None) -> Corpus:
    """The tokens of a run: read from a folder of shards, or made from texts in ``workspace/tokens``, once.

    ``ValueError`` for shards of another tokenizer than the one asked for, or damaged ones.
    """
    folder = token_folder(data)
    tokenizer = find_tokenizer(data.tokenizer, None if folder else vocab_size)
    if folder is None:
        first = data.texts[0]
        known = first in SOURCES or (Path(first).exists() and not corpus_parts(first))
        plain = tokenizer is None and len(data.texts) == 1 and known  # then it is chapter 2's own folder
        folder = (prepare_tokens(data.texts[0], vocab_size or 2048).folder if plain
                  else prepare_texts(data.texts, tokenizer, vocab_size or 2048))
    return read_shards(folder, tokenizer, data.weights)


def read_shards(folder: Path, tokenizer: BPETokenizer | None = None, weights: Sequence[float] = ()) -> Corpus:
    """The shards ``train*.bin`` and ``val*.bin`` of a folder and its ``tokenizer.json``, as chapter 2 writes them."""
    paths = {side: sorted(folder.glob(f"{side}*.bin")) for side in ("train", "val")}
    missing = [f"{side}*.bin" for side, found in paths.items() if not found]
    missing += [] if (folder / "tokenizer.json").exists() or tokenizer else ["tokenizer.json"]
    if missing:
        raise ValueError(f"The folder {short_path(folder)} has no {' and no '.join(missing)}. Give a folder that "
                         "prepare_tokens of chapter 2 has written, or texts.")
    tokenizer = tokenizer or BPETokenizer.load(folder / "tokenizer.json")
    train, val = ([open_shard(path, tokenizer) for path in paths[side]] for side in ("train", "val"))
    if len(weights) not in (0, len(train)):
        raise ValueError(f"There are {len(weights)} weights for {len(train)} shards in {short_path(folder)}: "
                         f"give one for each of {', '.join(path.name for path in paths['train'])}, or none.")
    if weights:
        train = [piece for shard, weight in zip(train, weights, strict=True) for piece in repeat(shard, weight)]
    n_bytes = sum(read_shard_header(path)["bytes"] for path in paths["val"])
    return Corpus(tokenizer, train, val[0] if len(val) == 1 else np.concatenate(val), n_bytes, folder)


def repeat(shard: np.ndarray, weight: float) -> list[np.ndarray]:
    """A shard as often as ``weight`` says: 2.5 is twice the whole and its first half."""
    rest = shard[:int(len(shard) * (weight % 1))]
    return [shard] * int(weight) + ([rest] if len(rest) else [])


def corpus_parts(text: str) -> tuple[Path, Path] | None:
    """train/ and val/ of a corpus that ``ch01_data.pipeline`` wrote, or None."""
    parts = Path(text) / "train", Path(text) / "val"
    return parts if all(part.is_dir() for part in parts) else None


def load_parts(texts: Sequence[str]) -> tuple[dict[str, list[Document]], list[Document]]:
    """Training documents by text, and the held-out documents, which are a part of the first text."""
    from ch05_pretrain.storyteller import load_text  # only now: a run on shards does not need it
    train, val = {}, []
    for i, text in enumerate(texts):
        if parts := corpus_parts(text):
            train[text], held_out = (load_documents(part) for part in parts)
        else:
            train[text], held_out = split_documents(load_text(text)) if i == 0 else (load_text(text), [])
        val = val or held_out
    return train, val


def prepare_texts(texts: Sequence[str], tokenizer: BPETokenizer | None, vocab_size: int) -> Path:
    """A folder of ``workspace/tokens`` with one training shard for each text, the held-out shard and the tokenizer.

    Built if it is not there or does not fit; a tokenizer is trained on all training documents if none is given.
    """
    train, val = load_parts(texts)
    label = tokenizer.fingerprint()[:8] if tokenizer else str(vocab_size)
    folder = workspace("tokens", "-".join([*(slug(Path(text).stem) for text in texts), label])[-100:])
    problem = shards_problem(folder, texts_sha256(*train.values(), val))
    if problem:
        tokenizer = tokenizer or BPETokenizer.train(
            (d.text for documents in train.values() for d in documents), vocab_size, [END_OF_TEXT])
        (folder / "manifest.json").unlink(missing_ok=True)
        tokenizer.save(folder / "tokenizer.json")
        parts = {f"train-{i:02}-{slug(Path(text).stem)}": train[text] for i, text in enumerate(texts)} | {"val": val}
        for old in folder.glob("*.bin"):
            old.unlink()
        manifest = {"format": SHARD_FORMAT, "texts_sha256": texts_sha256(*train.values(), val)}
        for name, documents in parts.items():
            manifest[name] = write_shard(folder / f"{name}.bin", documents, tokenizer)
        files = ["tokenizer.json", *(f"{name}.bin" for name in parts)]
        manifest["files"] = {name: file_sha256(folder / name) for name in files}
        write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    print(f"{'Built' if problem else 'Using'} {short_path(folder)}.")
    return folder


# ---------------------------------------------------------------- signals


class StopRequest:
    """SIGTERM and SIGINT ask a run to save and stop; a second SIGINT, a second later or more, stops it at once.

    Call it to learn whether a stop was asked for; use it as a context manager around the run.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, speak: bool = True) -> None:
        self.speak, self.number, self.when = speak, 0, 0.0

    def __call__(self) -> bool:
        return bool(self.number)

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self.ask) for number in self.signals}
        return self

    def __exit__(self, *problem) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame) -> None:
        """The handler. One Ctrl-C may arrive twice, from the terminal and from torchrun: hence the second."""
        if self.number:
            if number == signal.SIGINT and time.monotonic() - self.when > 1:
                raise KeyboardInterrupt
            return
        self.number, self.when = number, time.monotonic()
        if self.speak:  # straight to the descriptor: a handler may interrupt a print
            again = " Ctrl-C again stops at once." if number == signal.SIGINT else ""
            os.write(2, f"\n{self.name}: finishing this step, then saving.{again}\n".encode())

    @property
    def name(self) -> str:
        """Who asked."""
        return signal.Signals(self.number).name if self.number else "another process"


# ---------------------------------------------------------------- what is said during a run


class Log:
    """``on_log`` of a run in a terminal: a line for every evaluation, samples, and TensorBoard if asked for.

    ``begun`` is the step that the run goes on from: what came before is in the terminal's past already.
    """

    def __init__(self, config: TrainConfig, begun: int, board: Callable | None = None) -> None:
        self.config, self.begun, self.board = config, begun, board
        self.latest: dict[str, float] = {}
        self.start = time.monotonic()

    def __call__(self, name: str, step: int, value) -> None:
        if self.board:
            self.board(name, step, value)
        self.latest[name] = value
        if step > self.begun and name == "held out":
            tqdm.write(self.line(step))
        elif step > self.begun and name == "sample":
            tqdm.write(f"  it writes: {' '.join(value.split())}")

    def line(self, step: int) -> str:
        """The state of the run in one line."""
        left = (time.monotonic() - self.start) / (step - self.begun) * (self.config.steps - step)
        formats = {"held out": ".4f", "training": ".4f", "learning rate": ".2e", "gradient norm": ".2f",
                   "tokens per second": ",.0f"}
        parts = [f"{name} {self.latest[name]:{style}}" for name, style in formats.items() if name in self.latest]
        return " | ".join([f"step {step:,} of {self.config.steps:,}", *parts, f"{spell_time(left)} left"])


def spell_time(seconds: float) -> str:
    """Seconds as 1:02:03, or 3 days, 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def spell_bytes(size: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"


@contextmanager
def quiet_unless(speaks: bool) -> Iterator[None]:
    """Nothing on the terminal from a process that is not the first; errors at the end go to the real stderr."""
    if speaks:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def writer(tokenizer: BPETokenizer, vocab_size: int) -> Callable[[GPT], str] | None:
    """A function that lets a model begin a text; None if the model knows ids that the tokenizer cannot spell."""
    if tokenizer.vocab_size != vocab_size or END_OF_TEXT not in tokenizer.special_tokens:
        return None
    return lambda model: continue_text(model, tokenizer, END_OF_TEXT, min(60, model.config.context_length - 1))


# ---------------------------------------------------------------- what a run would cost


def measured_rows(model: GPT, config: TrainConfig, engine: OneProcess) -> int:
    """How many sequences a measured step has on each process: all of its share, or, on a CPU, what seconds allow.

    They can be cut into ``accumulate`` micro-batches, as the run's.
    """
    share = config.batch_size // engine.ranks
    if engine.device.type != "cpu":
        return share
    a_sequence = config.context_length * flops_per_token(model.config, config.context_length)
    rows = max(1, min(share, int(2e11 // a_sequence)))
    return rows - rows % min(config.accumulate, rows)


def measure_steps(model: GPT, tokens: np.ndarray, config: TrainConfig, engine: OneProcess,
                  seconds: float = 5.0) -> float:
    """The seconds that one step takes: the median of real ones, by ``train`` itself, without the slow first.

    Steps of fewer sequences than ``batch_size``, see ``measured_rows``, count as their share of a step.
    """
    ends = [time.perf_counter()]

    def stop() -> bool:
        ends.append(time.perf_counter())
        return len(ends) > 3 and ends[-1] - ends[1] > seconds

    rows = measured_rows(model, config, engine)
    steps = max(config.steps, 100)  # a run that ends after two steps would measure the start alone
    short = dataclasses.replace(config, steps=steps, eval_every=steps, sample_every=0, batch_size=rows * engine.ranks,
                                accumulate=min(config.accumulate, rows))
    train(model, tokens, tokens, short, engine=engine, stop=stop)
    return float(np.median(np.diff(ends)[1:])) * config.batch_size / short.batch_size


def training_bytes(model: GPT, config: TrainConfig, shards: int = 1, ranks: int = 1) -> dict[str, int]:
    """Memory of a step on each process, in bytes: weights, gradients and optimizer in float32, activations.

    ``shards``: processes that share one copy of the model; ``ranks``: processes that share the batch.
    """
    everything = count_parameters(model)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() >= 2) if config.optimizer == "muon" else 0
    sequences = math.ceil(config.batch_size / ranks / config.accumulate)
    precision = "float32" if config.precision == "float32" else "bfloat16"  # float16 is of the same size
    return {"weights": 4 * everything // shards, "gradients": 4 * everything // shards,
            "optimizer": (8 * everything - 4 * matrices) // shards,  # Muon remembers one number a weight, AdamW two
            "activations": activation_bytes(model.config, sequences, config.context_length, precision)}


def memory_plan(chosen: argparse.Namespace, model: GPT, config: TrainConfig, engine: OneProcess) -> dict[str, int]:
    """``training_bytes`` on the mesh that was chosen."""
    shards = int(os.environ.get("WORLD_SIZE", 1)) // engine.ranks * chosen.fsdp  # tp x pp x fsdp
    return training_bytes(model, config, shards, engine.ranks)


def describe_plan(model: GPT, config: TrainConfig, train_tokens: int | None, memory: Mapping[str, int]) -> list[str]:
    """What a run is, in lines of ``name: value``, before anything has been measured."""
    tokens = config.steps * config.batch_size * config.context_length
    flops = tokens * flops_per_token(model.config, config.context_length)
    epochs = f", {tokens / train_tokens:,.1f} times through {train_tokens:,}" if train_tokens else ""
    parts = ", ".join(f"{name} {spell_bytes(size)}" for name, size in memory.items())
    whole = training_bytes(model, config)
    return [f"parameters:      {count_parameters(model):,}",
            f"memory:          {spell_bytes(sum(memory.values()))} on each process ({parts})",
            f"a checkpoint:    {spell_bytes(whole['weights'] + whole['optimizer'])}, from all processes together; the "
            f"last {config.keep} and the best are kept",
            f"tokens:          {tokens:,} in {config.steps:,} steps{epochs}",
            f"operations:      {flops:.2e} FLOPs"]


def dry_run(chosen: argparse.Namespace, tables: Mapping, config: TrainConfig, data: DataConfig,
            engine: OneProcess) -> None:
    """Print what a run would take, from a few real steps; on random ids, unless the tokens lie there already."""
    vocab_size = wanted_vocab_size(tables["model"])
    folder = token_folder(data)
    corpus = read_shards(folder, find_tokenizer(data.tokenizer, None), data.weights) if folder else None
    found = corpus.tokenizer if corpus else find_tokenizer(data.tokenizer, None)
    model = make_model(tables["model"], found.vocab_size if found else vocab_size or 2048, config, found)
    model.to(engine.device)
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    n_tokens = sum(map(len, corpus.train)) if corpus else None
    print("\n".join(describe_plan(model, config, n_tokens, memory_plan(chosen, model, config, engine))))
    rows = measured_rows(model, config, engine)
    size = 2 + max(config.batch_size, 8) * 2 * (config.context_length + 1)
    random_ids = np.random.default_rng(0).integers(model.config.vocab_size, size=size)
    seconds = measure_steps(model, random_ids, config, engine)
    a_step = config.batch_size * config.context_length
    evaluations = config.steps // config.eval_every * config.eval_tokens / a_step / 3  # in steps: forward is a third,
    evaluations *= engine.ranks * chosen.pp  # done in full by every data rank, by one stage after the other
    rate = a_step * flops_per_token(model.config, config.context_length) / seconds
    hours = seconds * (config.steps + evaluations) / 3600
    print(f"measured:        {seconds:.3f} s a step, {a_step / seconds:,.0f} tokens a second, {rate / 1e12:.3g} TFLOP/s"
          + (f", {rate / n_processes / chosen.peak / 1e12:.0%} of the peak" if chosen.peak else "")
          + f", {peak_memory(engine.device)}"
          + (f"; from steps of {rows} of {config.batch_size // engine.ranks} sequences" if rows * engine.ranks <
             config.batch_size else ""))
    print(f"expected:        {spell_time(3600 * hours)} on {n_processes} process{'es' * (n_processes > 1)}"
          + (f", {hours * n_processes * chosen.price:,.2f} at {chosen.price:g} an hour each" if chosen.price else
             "; --price adds the cost"))
    print("Nothing was written.")


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, in words."""
    if device.type == "cuda":
        return f"{spell_bytes(torch.cuda.max_memory_allocated(device))} of GPU memory at most"
    try:
        import resource  # not on Windows
    except ImportError:
        return "memory not measured"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{spell_bytes(peak)} of memory at most, Python included"


# ---------------------------------------------------------------- a run


def make_model(given: Mapping, vocab_size: int, config: TrainConfig, tokenizer: BPETokenizer | None) -> GPT:
    """The untrained model of a run; ``ValueError`` if the tokenizer has ids that it does not know."""
    described = model_config(given, vocab_size, config.context_length)
    if tokenizer and tokenizer.vocab_size > described.vocab_size:
        raise ValueError(f"The tokenizer has {tokenizer.vocab_size:,} ids, the model {described.vocab_size:,} "
                         f"(vocab_size). Use the tokenizer of that size, or --vocab-size {tokenizer.vocab_size}.")
    torch.manual_seed(config.seed)
    return GPT(described)


def make_engine(chosen: argparse.Namespace) -> OneProcess:
    """How steps are carried out: by this process alone, or by all that torchrun has started, as a mesh."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        check_restart()
        from ch05_pretrain.parallelize import ManyProcesses
        return ManyProcesses(dp=chosen.dp, fsdp=chosen.fsdp, tp=chosen.tp, pp=chosen.pp, device=chosen.device)
    wanted = max(chosen.dp, 1) * chosen.fsdp * chosen.tp * chosen.pp
    if wanted != 1:
        raise ValueError(f"A mesh of dp {max(chosen.dp, 1)}, fsdp {chosen.fsdp}, tp {chosen.tp} and pp {chosen.pp} is "
                         f"{wanted} processes, and this is one. Start it with torchrun --nproc-per-node {wanted} "
                         "-m ch05_pretrain.train ...")
    if chosen.device:
        os.environ["COURSE_DEVICE"] = chosen.device
    return OneProcess(device=pick_device())


def check_restart() -> None:
    """``ValueError`` where torchrun starts processes again in a way that PyTorch's groups would wait in for ever.

    They find each other through a store, and torchrun keeps that of the first attempt, with the addresses of
    processes that are gone; unless it is told not to.
    """
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if again != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(f"torchrun has started this process again (restart {again}) with the store of its first "
                         "attempt. Give the command once more, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before "
                         "torchrun: the run goes on from the last checkpoint, and restarts work.")


def run_folder(chosen: argparse.Namespace) -> Path:
    """Where a run's files go: ``--out``, or a folder of ``workspace/pretrain`` with the name of its settings."""
    name = Path(chosen.config).stem if chosen.config else chosen.preset or "run"
    folder = Path(chosen.out) if chosen.out else workspace() / "pretrain" / name
    found = checkpoints(folder / "checkpoints")
    if found and chosen.resume == "never":
        raise ValueError(f"{short_path(folder)} holds a run already, at {found[-1].name}, and --resume is never. "
                         "Choose another --out, or delete that folder.")
    return folder


def tensorboard(folder: Path):
    """A writer of TensorBoard's files."""
    from utils.dashboard import TensorBoard
    return TensorBoard(folder)


def run(chosen: argparse.Namespace, tables: dict, engine: OneProcess, command: str) -> int:
    """One run, or what is left of it; the exit code."""
    config, data = settings_of(tables)
    if chosen.dry_run:
        dry_run(chosen, tables, config, data, engine)
        return 0
    folder = run_folder(chosen)
    vocab_size = wanted_vocab_size(tables["model"])
    corpus = prepare_corpus(data, vocab_size) if engine.is_main else None  # the first process makes it,
    engine.barrier()
    corpus = corpus or prepare_corpus(data, vocab_size)  # the others find it,
    engine.barrier()  # which takes its time too
    model = make_model(tables["model"], corpus.tokenizer.vocab_size, config, corpus.tokenizer)
    model.to(engine.device)
    memory = memory_plan(chosen, model, config, engine)
    print("\n".join(describe_plan(model, config, sum(map(len, corpus.train)), memory)))
    done = checkpoints(folder / "checkpoints")
    board = tensorboard(folder / "tensorboard") if chosen.tensorboard and engine.is_main else None
    log = Log(config, int(done[-1].name.split("-")[1]) if done else 0, board.log if board else None)
    with StopRequest(engine.is_main) as stop:
        history = train(model, corpus.train, corpus.val, config, folder=folder / "checkpoints", on_log=log,
                        engine=engine, stop=stop, sample=writer(corpus.tokenizer, model.config.vocab_size))
    if board:
        board.close()
    if len(history.steps) < config.steps:
        print(f"Stopped by {stop.name} after step {len(history.steps):,} of {config.steps:,}; all of it is saved in "
              f"{short_path(folder)}. The same command goes on from there:\n  {command}")
        return 128 + (stop.number or signal.SIGTERM)
    engine.export(model, folder)
    if engine.is_main:
        write_results(folder, corpus, config, data, history, engine, command)
    return 0


def settings_of(tables: Mapping) -> tuple[TrainConfig, DataConfig]:
    """The tables [train] and [data] as configurations; ``ValueError`` for values out of their range."""
    data = {name: tuple(value) if isinstance(value, list) else value for name, value in tables["data"].items()}
    return TrainConfig.from_dict(tables["train"]), DataConfig(**data)


def write_results(folder: Path, corpus: Corpus, config: TrainConfig, data: DataConfig, history: History,
                 engine: OneProcess, command: str) -> None:
    """What a finished run leaves beside its weights: settings, results, tokenizer and, last, the history.

    The results are those of the weights as they lie in the folder, on the whole held-out text.
    """
    model = GPT.from_pretrained(folder).to(engine.device).eval()
    result = evaluate(model, corpus.val, corpus.val_bytes, context_length=config.context_length)
    uniform = math.log2(model.config.vocab_size) * len(corpus.val) / corpus.val_bytes
    device = engine.device
    results = {
        "loss": result.loss, "perplexity": result.perplexity,
        "bits_per_byte": {"uniform": uniform, "this model": result.bits_per_byte},
        "held_out": {"tokens": len(corpus.val), "bytes": corpus.val_bytes},
        "parameters": count_parameters(model), "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.context_length,
        "hours": sum(history.seconds) / 3600, "processes": int(os.environ.get("WORLD_SIZE", 1)), "command": command,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process",
        "sample": write(model) if (write := writer(corpus.tokenizer, model.config.vocab_size)) else "",
    }
    tables = {"model": model.config.to_dict(), "train": config.to_dict(), "data": dataclasses.asdict(data)}
    write_text(folder / "train.toml", to_toml(tables))
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    save_finished(folder, model, corpus.tokenizer, history)
    print(f"Finished: held-out loss {result.loss:.4f} nats a token, perplexity {result.perplexity:,.1f}, "
          f"{result.bits_per_byte:.3f} bits a byte (uniform {uniform:.3f}).\n"
          f"The model, its tokenizer, history, results and settings are in {short_path(folder)}.")


# ---------------------------------------------------------------- the command line


EPILOG = """\
Flags win over --config, and that over --preset. The same command again goes on from the last checkpoint, also after
a power cut; SIGTERM and Ctrl-C save and stop, a second Ctrl-C stops at once.

On several GPUs or machines the command is the same under torchrun; the mesh must multiply to its processes:
  torchrun --nproc-per-node 8 -m ch05_pretrain.train --preset gpt2-124m --data SHARDS --fsdp 8
With --max-restarts, torchrun starts all again when one dies; it needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for that.
The first process encodes the texts and the others wait half an hour for it: encode more than that beforehand, as a
folder of shards or by the same run on one process.
ch05_pretrain/launch/ holds files for Slurm and Kubernetes.
"""


def add_flags(parser: argparse.ArgumentParser, table: str, title: str) -> None:
    """A flag for every entry of a table of settings that a flag can spell."""
    group = parser.add_argument_group(title)
    defaults = {field.name: field.default for field in dataclasses.fields(TABLES[table])}
    for name, kind in entries(table).items():
        repeated = typing.get_origin(kind) is tuple
        kinds = [k for k in typing.get_args(kind) or (kind,) if k in (int, float, str, bool)]
        if not kinds:
            continue
        default = defaults.get(name, dataclasses.MISSING)
        shown = f" ({default})" if default not in (dataclasses.MISSING, None, ()) else ""
        options = {"dest": f"{table}.{name}", "default": argparse.SUPPRESS, "help": HELP[table].get(name, name) + shown}
        if bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kinds[0], "metavar": "NAME" if kinds[0] is str else "N"}
            options |= {"nargs": "+"} if repeated else {}
        group.add_argument(FLAGS.get((table, name), "--" + name.replace("_", "-")), **options)


def training_parser() -> argparse.ArgumentParser:
    """The options of ``python -m ch05_pretrain.train``."""
    parser = argparse.ArgumentParser(
        "python -m ch05_pretrain.train", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        allow_abbrev=False, description="Train a language model, in one process or, under torchrun, in many.")
    add = parser.add_argument
    add("--preset", metavar="NAME", help=f"settings that were tried: {', '.join(PRESET_RUNS)}, or a model of chapter 4 "
        "with settings for GPUs, for instance gpt2-124m")
    add("--config", type=Path, metavar="FILE", help="a TOML file with the tables [model], [train] and [data]")
    add("--out", metavar="FOLDER", help="where the run's files go (workspace/pretrain/ and the name of the settings)")
    add("--resume", default="auto", choices=["auto", "never"], help="auto goes on from the last checkpoint in --out; "
        "never refuses a folder that holds one")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps (a GPU if there is one)")
    add("--tensorboard", action="store_true", help="also write the curves for TensorBoard, into --out")
    add = parser.add_argument_group("before a run").add_argument
    add("--dry-run", action="store_true", help="print parameters, memory, tokens, operations, expected time and cost, "
        "from a few measured steps, and write nothing")
    add("--price", type=float, metavar="N", help="what an hour of one process's device costs, for the cost")
    add("--peak", type=float, metavar="TFLOPS", help="the device's peak in TFLOP/s, for the share of it")
    add = parser.add_argument_group("the mesh of processes, under torchrun").add_argument
    add("--dp", type=int, default=0, metavar="N", help="copies of the model that share the batch (what is left)")
    add("--fsdp", type=int, default=1, metavar="N", help="processes that share batch, weights and optimizer (1)")
    add("--tp", type=int, default=1, metavar="N", help="processes that share every matrix: tensor parallel (1)")
    add("--pp", type=int, default=1, metavar="N", help="stages of blocks, one after the other: pipeline (1)")
    for table, title in {"data": "the text", "train": "the training", "model": "the model"}.items():
        add_flags(parser, table, title)
    return parser


def started_with() -> list[str]:
    """How this process was started, up to the module's name; HOST is the first of several machines."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ["python", "-m"]
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    meeting = ["--nnodes", machines, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return ["torchrun", *(meeting if machines != "1" else []), "--nproc-per-node", here, "-m"]


def complain(error: BaseException) -> int:
    """Say what went wrong, on the real stderr; which process says it, if it is not the first. Exit code 1."""
    rank = os.environ.get("RANK", "0")
    process = f"[process {rank}] " * (rank != "0")
    print(f"{process}{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 for bad input, 128 + the signal for a run that was stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is said
    chosen = training_parser().parse_args(arguments)
    first = os.environ.get("RANK", "0") == "0"
    try:
        tables = read_settings(chosen)
        settings_of(tables)
        with quiet_unless(first):
            engine = make_engine(chosen)
    except (ValueError, OSError) as error:  # the same in every process
        return complain(error) if first else 1
    try:
        with quiet_unless(engine.is_main):
            return run(chosen, tables, engine, shlex.join([*started_with(), "ch05_pretrain.train", *arguments]))
    except KeyboardInterrupt:
        print("\nStopped at once. The last checkpoint stands: the same command goes on from it.", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        return complain(MemoryError(f"{str(error).splitlines()[0]} Double --accumulate (now "
                                    f"{settings_of(tables)[0].accumulate}): the same step in smaller pieces."))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        return complain(error)
    except RuntimeError as error:
        if "lost another process" not in str(error):
            raise
        return complain(error)
    finally:
        engine.close()


if __name__ == "__main__":
    sys.exit(main())
