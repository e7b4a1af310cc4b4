"""Chapter 5: the committed record run, the texts it was trained on, and the trials by which it was chosen."""

import dataclasses
import json
import re
import shlex
import tomllib

import numpy as np
import pytest
import torch

from ch01_data.data import contamination, load_documents, split_documents
from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer
from ch04_gpt.gpt import GPT, count_parameters
from ch05_pretrain import storyteller
from ch05_pretrain.pretrain import History, evaluate, load_storyteller
from ch05_pretrain.storyteller import (
    EXPERIMENTS,
    RECORD,
    TRIAL,
    baselines,
    encode_documents,
    first_steps,
    load_novels,
    load_text,
    load_trials,
    run_trials,
    save_record,
    trial,
    trial_data,
    trial_texts,
)
from utils.workspace import ROOT

FILES = {"config.json", "model.safetensors", "tokenizer.json", "history.json", "train.toml", "results.json"}
TINY = {"mix": {"andersen": 1}, "share": 0.002, "vocab_size": 300, "d_model": 32, "n_layers": 1,
        "context_length": 16, "batch_size": 2, "steps": 6}


@pytest.fixture(scope="module")
def held_out():
    return split_documents(load_documents("andersen"))[1]


@pytest.fixture(scope="module")
def record():
    read = {name: json.loads((RECORD / f"{name}.json").read_text()) for name in ("results", "history", "config")}
    return read | {"settings": tomllib.loads((RECORD / "train.toml").read_text())}


@pytest.fixture(scope="module")
def texts():
    return trial_texts()


# ---------------------------------------------------------------- the record


def test_the_folder_is_whole_and_small():
    assert {path.name for path in RECORD.iterdir()} == FILES
    assert sum(path.stat().st_size for path in RECORD.iterdir()) < 20e6


def test_the_record_names_no_place_on_a_machine():
    for path in RECORD.iterdir():
        if path.suffix in (".json", ".toml"):
            found = re.findall(r"/(?:tmp|home|root|work|Users)/|[A-Z]:\\", path.read_text(encoding="utf-8"))
            assert not found or path.name == "tokenizer.json", path.name


def test_weights_are_16_bit_and_loaded_as_32(monkeypatch, tmp_path, record, capsys):
    from safetensors import safe_open
    with safe_open(RECORD / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path))  # where the reader has no run of their own
    model, tokenizer = load_storyteller()
    assert "record run" in capsys.readouterr().out
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert tokenizer.vocab_size == model.config.vocab_size == record["config"]["vocab_size"]
    assert END_OF_TEXT in tokenizer.special_tokens
    assert count_parameters(model) == record["results"]["parameters"]


def test_the_model_is_the_one_that_the_settings_describe(record):
    model, wanted = GPT.from_pretrained(RECORD), record["settings"]["model"]
    assert {name: getattr(model.config, name) for name in wanted} == wanted


def test_held_out_bits_per_byte_again(held_out, record):
    model, tokenizer = GPT.from_pretrained(RECORD).float(), BPETokenizer.load(RECORD / "tokenizer.json")
    ids, n_bytes = encode_documents(tokenizer, held_out), sum(len(d.text.encode()) for d in held_out)
    assert record["results"]["held_out"] == {"tokens": len(ids), "bytes": n_bytes}
    found, results = evaluate(model, ids, n_bytes), record["results"]
    assert found.bits_per_byte == pytest.approx(results["bits_per_byte"]["this model"], abs=5e-4)
    assert found.loss == pytest.approx(results["loss"], abs=2e-3)
    assert results["in float32"]["bits_per_byte"] == pytest.approx(found.bits_per_byte, abs=1e-3)


def test_the_record_beats_every_table_of_counts(record):
    bits = dict(record["results"]["bits_per_byte"])
    ours = bits.pop("this model")
    assert {"uniform", "trigram (tales)", "Kneser-Ney 4 (tales)", "Kneser-Ney 4 (mixture)"} <= set(bits)
    assert ours < min(bits.values()) and ours < 1.628  # the short live run of chapter 5


def test_history_fits_settings_and_results(record):
    history, results, settings = History(**record["history"]), record["results"], record["settings"]["train"]
    assert history.steps == list(range(1, results["steps"] + 1)) and results["steps"] == settings["steps"]
    assert len(history.train_loss) == len(history.grad_norm) == len(history.seconds) == results["steps"]
    assert results["tokens"] == results["steps"] * settings["batch_size"] * settings["context_length"]
    assert history.eval_steps[-1] == results["steps"] and settings["seed"] == results["seed"]
    assert history.val_loss[-1] == pytest.approx(results["in float32"]["loss"], abs=0.02)  # it ran in bfloat16
    assert sum(history.seconds) / 3600 == pytest.approx(results["hours"], abs=0.01)


def test_the_command_makes_the_recorded_run(record):
    """Texts, tokenizer, weights and batches again from nothing; the tokenizer must be the committed one."""
    assert record["results"]["command"] == "python -m ch05_pretrain.train --preset storyteller"
    losses = first_steps(4)
    assert losses == pytest.approx(record["history"]["train_loss"][:4], abs=1e-4)
    from ch05_pretrain import train as script
    assert script.PRESET_RUNS["storyteller"] == RECORD / "train.toml"
    _, data = script.settings_of(record["settings"])
    corpus = script.prepare_corpus(data, record["settings"]["model"]["vocab_size"])
    assert corpus.tokenizer.fingerprint() == BPETokenizer.load(RECORD / "tokenizer.json").fingerprint()


def test_other_runs_are_those_of_their_commands(record):
    """What the command asks for today, with the record's settings for the rest, is what was run."""
    from ch05_pretrain import train as script
    rows = json.loads((ROOT / "ch05_pretrain" / "records" / "storyteller_runs.json").read_text())
    held_out = record["results"]["held_out"]
    assert len(rows) == 4 and len({row["name"] for row in rows}) == 4
    for row in rows:
        tables = script.read_settings(script.training_parser().parse_args(shlex.split(row["command"])[3:]))
        config = script.settings_of(tables)[0]
        model = GPT(script.model_config(tables["model"], record["config"]["vocab_size"], config.context_length))
        assert count_parameters(model) == row["parameters"], row["name"]
        assert (config.steps, config.seed) == (row["steps"], row["seed"])
        assert config.steps * config.batch_size * config.context_length == row["tokens"]
        assert row["eval_steps"] == list(range(config.eval_every, config.steps, config.eval_every)) + [config.steps]
        bits = row["val_loss"][-1] * held_out["tokens"] / held_out["bytes"] / np.log(2)
        assert bits == pytest.approx(row["bits_per_byte"], abs=0.01)


# ---------------------------------------------------------------- the texts


def test_no_text_of_the_mixture_contains_the_held_out_tales(held_out, record):
    first, *others = record["settings"]["data"]["texts"]
    train = split_documents(load_documents(first))[0]
    assert first == "andersen" and contamination(train, held_out) == 0
    for name in others:
        assert contamination(load_text(name), held_out) == 0
    assert contamination([*load_novels(), held_out[0]], held_out) > 0  # it would be found


def test_novels_are_the_seven_free_ones():
    novels = load_novels()
    assert len(novels) == 7 and [d.id for d in load_text("novels")] == sorted(d.id for d in novels)
    everything = "".join(d.text for d in novels)
    for open_text in ("It is a truth universally acknowledged", "Mrs. Dalloway", "Marlow", "Moreau"):
        assert open_text in everything
    for protected in ("Vincent Vega", "Gregor", "Gombauld"):  # Pulp Fiction, Metamorphosis, Crome Yellow
        assert protected not in everything
    assert "\r" not in everything and "\ufeff" not in everything


def test_load_text_knows_chapter_1s_names_too():
    assert [d.id for d in load_text("andersen")] == sorted(d.id for d in load_documents("andersen"))
    with pytest.raises(ValueError, match="Unknown source 'nowhere'"):
        load_text("nowhere")


def test_judges_are_training_tales(texts, held_out):
    train = {d.id for d in split_documents(load_documents("andersen"))[0]}
    practice, judges = ({d.id for d in texts[name]} for name in ("andersen", "judges"))
    assert practice | judges == train and not practice & judges and len(judges) >= 5
    assert not (practice | judges) & {d.id for d in held_out}
    assert contamination([*texts["andersen"], *texts["novels"], *texts["shakespeare"]], texts["judges"]) == 0


# ---------------------------------------------------------------- the trials


def test_mixture_repeats_and_share_shortens(texts):
    plan = TRIAL | TINY | {"share": 0.01}
    one, judges, n_bytes = trial_data(plan, texts)
    two, _, _ = trial_data(plan | {"mix": {"andersen": 2, "novels": 1}}, texts)
    assert np.array_equal(two[: 2 * len(one)], np.tile(one, 2)) and len(two) > 2 * len(one)
    whole, _, _ = trial_data(plan | {"share": 1.0}, texts)
    assert len(one) == int(0.01 * len(whole))
    assert n_bytes == sum(len(d.text.encode()) for d in texts["judges"]) and len(judges) < n_bytes


def test_a_trial_learns_and_repeats_itself(texts):
    first, again, other = (trial(texts, 3, **TINY | {"seed": seed}) for seed in (0, 0, 1))
    assert first["curve"] == again["curve"] != other["curve"]
    assert [step for step, _ in first["curve"]] == [2, 4, 6]
    assert first["bits_per_byte"] == first["curve"][-1][1] < first["curve"][0][1]
    assert first["tokens"] == 6 * 2 * 16 and first["plan"] == TRIAL | TINY
    assert first["inside"] == again["inside"] != other["inside"] and len(first["inside"]) == TINY["n_layers"]
    with pytest.raises(ValueError, match="No entry width in a trial's plan; there are mix, share"):
        trial(texts, width=3)


@torch.no_grad()
def test_living_parts_counts_what_is_dead():
    model = storyteller.trial_model(TRIAL | TINY | {"n_layers": 2})
    first, last = model.blocks[0], model.blocks[-1]
    last.mlp.w_gate.weight[[1, 4]] *= 0.001
    first.attention.w_qkv.weight.chunk(3)[1].zero_()
    found = storyteller.living_parts(model)
    assert [layer["dead"] for layer in found] == [0] * (len(found) - 1) + [2]
    assert found[0]["keys"] == 0 < min(found[0]["queries"], found[0]["values"])
    values = last.attention.w_qkv.weight[-model.config.d_model:]
    assert found[-1]["values"] == pytest.approx(values.norm().item(), abs=0.001)


def test_recorded_trials_are_those_of_the_list():
    rows = load_trials()
    assert [row["name"] for row in rows] == [name for name in EXPERIMENTS if name in {r["name"] for r in rows}]
    assert len(rows) >= 15
    for row in rows:
        questions, changes = EXPERIMENTS[row["name"]]
        assert row["plan"] == TRIAL | changes and row["questions"] == list(questions)
        assert row["curve"][-1] == [row["plan"]["steps"], row["bits_per_byte"]]
        assert row["tokens"] == row["plan"]["steps"] * row["plan"]["batch_size"] * row["plan"]["context_length"]
        assert "decay" not in questions or len(row["inside"]) == row["plan"]["n_layers"]  # older trials did not look


def test_the_record_of_a_small_trial_can_be_made_again(texts):
    name = "small, with novels, seed 0"
    (row,) = (row for row in load_trials() if row["name"] == name)
    assert trial(texts, **EXPERIMENTS[name][1])["bits_per_byte"] == pytest.approx(row["bits_per_byte"], abs=0.01)


def test_run_trials_adds_and_replaces_rows(texts, monkeypatch, tmp_path):
    monkeypatch.setattr(storyteller, "trial_texts", lambda: texts)
    listed = {"a": (("size",), TINY), "b": (("text", "size"), TINY | {"seed": 1})}
    monkeypatch.setattr(storyteller, "EXPERIMENTS", listed)
    path = tmp_path / "records.json"
    run_trials(["b"], path)
    rows = run_trials(["a"], path)
    assert [row["name"] for row in rows] == ["a", "b"] and rows[1]["questions"] == ["text", "size"]
    changed = run_trials(["b"], path)
    assert [row["name"] for row in changed] == ["a", "b"] and changed[1]["curve"] == rows[1]["curve"]


# ---------------------------------------------------------------- writing a record


def test_baselines_and_save_record(texts, tmp_path):
    plan = TRIAL | TINY
    practice, judges, n_bytes = trial_data(plan, texts)
    judges, n_bytes = judges[:2000], n_bytes * 2000 / len(judges)
    found = baselines({"few": practice}, judges, n_bytes, 300)
    assert found["uniform"] == pytest.approx(np.log2(300) * 2000 / n_bytes)
    assert found["unigram (few)"] < found["uniform"] and found["bigram (few)"] < found["unigram (few)"]
    tokenizer = BPETokenizer.train((d.text for d in texts["andersen"]), 300, [END_OF_TEXT])
    model, history = storyteller.trial_model(plan), History(steps=[1], train_loss=[5.123456789])
    exact = evaluate(model, judges, n_bytes)
    results = save_record(tmp_path, model, tokenizer, "seed = 0\n", {
        "held_out": judges, "held_out_bytes": n_bytes, "train": {"few": practice}, "steps": 1},
        dataclasses.asdict(history))
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["in float32"]["loss"] == pytest.approx(exact.loss, abs=1e-6)
    assert results["loss"] == pytest.approx(exact.loss, abs=1e-3) and results["loss"] != exact.loss
    assert results["bits_per_byte"]["bigram (few)"] == found["bigram (few)"] and results["steps"] == 1
    assert json.loads((tmp_path / "history.json").read_text())["train_loss"] == [5.12346]


def test_the_module_lies_beside_the_folder_of_its_name():
    assert storyteller.__file__ == str(ROOT / "ch05_pretrain" / "storyteller.py") and RECORD.is_dir()
