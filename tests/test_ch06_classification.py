"""Chapter 6, classification on frozen states: cut models, cached states, heads, recipes, calibration, the record."""

import copy
import dataclasses
import json
import shlex

import pytest
import torch
from torch import nn

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer
from ch04_gpt.gpt import GPT, GPTConfig
from ch06_finetune import classification
from ch06_finetune.classification import (
    QUESTIONS,
    RECORD,
    SpamLab,
    SpamRecipe,
    StateTable,
    at_temperature,
    bag_chances,
    balanced_accuracy,
    both_states,
    chosen_examples,
    counted,
    cross_validate,
    describe,
    encode_texts,
    fit_head,
    fit_temperature,
    log_loss,
    open_envelope,
    padded_states,
    pooled_states,
    reliability,
    remembered,
    some_blocks,
    spam_chance,
    states_fingerprint,
    table_rows,
    texts_mark,
    token_states,
    tuned_classifier,
    words_and_pairs,
)
from ch06_finetune.finetune import (
    LabelledTexts,
    Scores,
    SequenceClassifier,
    classify,
    last_state,
    load_sms_spam,
    mean_state,
    pad_right,
)

SEQUENCES = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6], [20, 21, 22, 23, 24, 25, 26]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 32, 16, 4, 2, d_ff=24, norm="rmsnorm", mlp="swiglu", position="rope", bias=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 if parameter.dim() == 1 else 8  # a model with opinions
    return model.requires_grad_(False)


class TinyLab(SpamLab):
    """The lab with a tiny model, and messages whose spam contains the token 60."""

    def __init__(self, model, n=60):
        generator = torch.Generator().manual_seed(1)
        self.model, self.cut, self.keep, self.found, self.parts, self.tokens = model, 64, False, {}, {}, {}
        for part in ("train", "validation", "test"):
            labels = [int(i % 4 == 0) for i in range(n)]
            lengths = torch.randint(2, 8, (n,), generator=generator).tolist()
            ids = [torch.randint(1, 50, (length,), generator=generator).tolist() + [60] * label
                   for length, label in zip(lengths, labels, strict=True)]
            self.tokens[part] = ids
            self.parts[part] = LabelledTexts([" ".join(map(str, i)) for i in ids], labels)


@pytest.fixture
def lab(model):
    return TinyLab(model)


# --- reading --------------------------------------------------------------------------------------------------

def test_both_states_are_mean_and_last():
    states, lengths = torch.randn(3, 5, 4), torch.tensor([5, 1, 3])
    torch.testing.assert_close(both_states(states, lengths)[:, :4], mean_state(states, lengths))
    torch.testing.assert_close(both_states(states, lengths)[:, 4:], last_state(states, lengths))


def test_texts_are_cut_and_empty_ones_refused():
    tokenizer = BPETokenizer.train("call me now " * 5, 262, [END_OF_TEXT])
    whole = tokenizer.encode("call me now")
    assert encode_texts(tokenizer, ["call me now"], 2) == [whole[:2]]
    assert encode_texts(tokenizer, [END_OF_TEXT], 99) != [[tokenizer.special_tokens[END_OF_TEXT]]]
    with pytest.raises(ValueError, match="2 of 3 texts are empty, number 1 the first.*leave them out"):
        encode_texts(tokenizer, ["a", "", ""])
    with pytest.raises(ValueError, match="cut is 0"):
        encode_texts(tokenizer, ["a"], 0)


def test_some_blocks_share_weights_and_leave_the_model_alone(model):
    ids = torch.tensor([SEQUENCES[0]])
    torch.testing.assert_close(some_blocks(model, 0, 4).hidden_states(ids), model.hidden_states(ids))
    part = some_blocks(model, 1, 3)
    assert part.config.n_layers == len(part.blocks) == 2
    assert part.blocks[0].mlp.w_up.weight is model.blocks[1].mlp.w_up.weight
    assert len(model.blocks) == 4 and model.lm_head is not None and model.config.n_layers == 4
    for start, end in ((0, 5), (2, 2), (-1, 2), (3, 1)):
        with pytest.raises(ValueError, match="give 0 <= start < end <= 4"):
            some_blocks(model, start, end)


def test_pooled_states_are_those_of_each_text_alone(model):
    found = pooled_states(model, SEQUENCES, [2, 4])
    assert found.shape == (2, 5, 32)
    for i, sequence in enumerate(SEQUENCES):
        alone = some_blocks(model, 0, 2).hidden_states(torch.tensor([sequence]))[0]
        torch.testing.assert_close(found[0, i], torch.cat([alone.mean(0), alone[-1]]), atol=1e-4, rtol=1e-4)
        alone = model.hidden_states(torch.tensor([sequence]))[0]
        torch.testing.assert_close(found[1, i], torch.cat([alone.mean(0), alone[-1]]), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="Layer 5 of a model of 4"):
        pooled_states(model, SEQUENCES, [5])


def test_a_table_of_states_takes_the_place_of_the_blocks_below(model):
    top = some_blocks(model, 3, 4, StateTable(token_states(model, SEQUENCES, 3)))
    rows = table_rows(SEQUENCES)
    assert [list(r) for r in rows[:3]] == [[0, 1, 2, 3, 4], [5], [6, 7, 8]]
    whole, looked_up = SequenceClassifier(model, 2), SequenceClassifier(top, 2)
    looked_up.head = whole.head
    nn.init.normal_(whole.head.weight)
    torch.testing.assert_close(classify(looked_up, rows), classify(whole, SEQUENCES), atol=5e-3, rtol=0)
    assert not top.token_embedding.weight.requires_grad


def test_states_too_large_for_float16_are_refused(model):
    large = some_blocks(model, 0, 4, nn.Embedding(64, 16))
    nn.init.constant_(large.token_embedding.weight, 1e5)
    with pytest.raises(ValueError, match="65504"):
        token_states(large, SEQUENCES, 0)


def test_padding_that_nobody_knows_about_moves_the_state(model):
    known = pooled_states(model, SEQUENCES, [3])[0, :, 16:]
    for padding in ("left", "ignored"):
        torch.testing.assert_close(padded_states(model, SEQUENCES, 3, padding, 1), known, atol=1e-4, rtol=1e-4)
        moved = (padded_states(model, SEQUENCES, 3, padding, 5) - known).norm(dim=1) / known.norm(dim=1)
        assert moved[4] < 1e-4 and (moved[:4] > 0.01).all()  # only the longest needs no padding


# --- the cache ------------------------------------------------------------------------------------------------

def test_states_are_computed_once_and_a_stale_file_is_refused(tmp_path):
    path, calls = tmp_path / "states.safetensors", []

    def compute():
        calls.append(1)
        return torch.arange(6.0).view(2, 3)

    first, second = remembered(path, "a" * 64, compute), remembered(path, "a" * 64, compute)
    assert calls == [1] and first.dtype == torch.float16
    torch.testing.assert_close(first, second)
    with pytest.raises(ValueError, match="fingerprint aaaaaaaa, wanted bbbbbbbb.*Delete"):
        remembered(path, "b" * 64, compute)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="damaged.*Delete"):
        remembered(path, "a" * 64, compute)
    assert calls == [1] and [p.name for p in tmp_path.iterdir()] == ["states.safetensors"]


def test_the_fingerprint_knows_weights_texts_and_layers(model):
    other = GPT(model.config)
    other.load_state_dict(model.state_dict())
    mark = states_fingerprint(model, SEQUENCES, [2])
    assert states_fingerprint(other, SEQUENCES, [2]) == mark
    with torch.no_grad():
        other.blocks[3].mlp.w_up.weight += 1
    assert states_fingerprint(other, SEQUENCES, [2]) == mark  # above what is used
    with torch.no_grad():
        other.blocks[1].mlp.w_up.weight[0, 0] += 1e-3
    assert states_fingerprint(other, SEQUENCES, [2]) != mark
    assert len({mark, states_fingerprint(model, SEQUENCES[1:], [2]), states_fingerprint(model, SEQUENCES, [1]),
                states_fingerprint(model, [[5, 6, 7, 8], [9, 10], *SEQUENCES[2:]], [2])}) == 4


# --- heads ----------------------------------------------------------------------------------------------------

def blobs(n=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = [int(i % 4 == 0) for i in range(n)]
    return torch.randn(n, 3, generator=generator) + torch.tensor(labels)[:, None], labels


def test_a_head_is_the_minimum_of_its_loss():
    features, labels = blobs()
    head = fit_head(features, labels, decay=0.05, standardise=False).requires_grad_(True)
    loss = nn.functional.cross_entropy(head(features), torch.tensor(labels)) + 0.05 * head.weight.square().sum()
    loss.backward()
    assert head.weight.grad.abs().max() < 1e-3 and head.bias.grad.abs().max() < 1e-3


def test_scales_and_shifts_of_the_columns_do_not_matter():
    features, labels = blobs()
    plain = spam_chance(fit_head(features, labels), features)
    moved = features * torch.tensor([1.0, 100.0, 0.01]) + 7
    torch.testing.assert_close(torch.tensor(spam_chance(fit_head(moved, labels), moved)), torch.tensor(plain),
                               atol=2e-3, rtol=0)


def test_a_weight_of_three_is_three_copies():
    features, labels = blobs()
    spam = [i for i, label in enumerate(labels) if label]
    thrice = [*range(len(labels)), *spam, *spam]
    weighted = fit_head(features, labels, decay=0.01, class_weights=(1.0, 3.0), standardise=False)
    copied = fit_head(features[thrice], [labels[i] for i in thrice], decay=0.01, standardise=False)
    torch.testing.assert_close(weighted.weight, copied.weight, atol=2e-3, rtol=0)
    assert sum(spam_chance(weighted, features)) > sum(spam_chance(fit_head(features, labels, decay=0.01), features)) + 3


@pytest.mark.parametrize(("labels", "words"), [
    ([0, 1, 2], "3 texts have 3 labels, 0 to 2; give each text one from 0 to 1"), ([0, 1, -1], "-1 to 1"),
    ([0, 1], "3 texts have 2 labels"), ([1, 1, 1], "All 3 labels are 1.*at least 2 classes")])
def test_labels_that_make_no_task_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        fit_head(torch.randn(3, 4), labels)


def test_words_pairs_and_their_bag():
    assert words_and_pairs("WIN £5 win") == {"win", "£", "5", "win £", "£ 5", "5 win"}
    train = LabelledTexts(["free prize"] * 5 + ["hello you"] * 5, [1] * 5 + [0] * 5)
    spam, ham = bag_chances(train, ["a free prize", "hello friend"])
    assert spam > 0.8 and ham < 0.2


# --- recipes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "words"), [
    ({"pool": "max"}, "pool is 'max'; it must be one of mean, last, both"), ({"layers": ()}, "at least one"),
    ({"layers": (0,)}, "from 1"), ({"train": "lora"}, "only a head"), ({"bound": 1.0}, "bound is 1.0"),
    ({"padding": "left", "layers": (3,)}, "pool last"), ({"examples": -1}, "examples is -1"), ({"lr": 0.0}, "lr")])
def test_recipes_that_make_no_classifier_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        SpamRecipe(**change)


def test_examples_are_chosen_as_the_recipe_says(lab):
    labels = lab.parts["train"].labels
    assert sorted(chosen_examples(labels, SpamRecipe())) == list(range(60))
    some = chosen_examples(labels, SpamRecipe(examples=20))
    assert len(set(some)) == 20 and sum(labels[i] for i in some) == 5
    fewer = chosen_examples(labels, SpamRecipe(balance="fewer"))
    assert len(set(fewer)) == 30 and sum(labels[i] for i in fewer) == 15
    copied = chosen_examples(labels, SpamRecipe(layers=(2,), train="blocks"))
    assert sum(labels[i] for i in copied) == len(copied) / 2 == 45
    with pytest.raises(ValueError, match="examples is 61; there are 60"):
        chosen_examples(labels, SpamRecipe(examples=61))
    with pytest.raises(ValueError, match="All 1 labels are 0. There is nothing to tell apart"):
        chosen_examples(labels, SpamRecipe(layers=(2,), train="blocks", examples=1))


def test_cross_validation_never_touches_the_other_parts(lab):
    lab.parts = {"train": lab.parts["train"]}
    lab.tokens = {"train": lab.tokens["train"]}
    found = cross_validate(lab, SpamRecipe(layers=(2, 4), pool="both", bound=0.5, decay=1e-2))
    assert sum(found["scores"].values()) == 60
    assert balanced_accuracy(Scores(**found["scores"])) > 0.8
    once = cross_validate(lab, SpamRecipe(layers=(2, 4), bound=0.5, decay=1e-2), folds=1)
    assert sum(once["scores"].values()) == 12
    with pytest.raises(ValueError, match="folds is 6"):
        cross_validate(lab, SpamRecipe(), folds=6)
    with pytest.raises(ValueError, match="cut is 9, the lab's is 64"):
        cross_validate(lab, SpamRecipe(cut=9))


def test_every_message_is_examined_by_a_head_that_has_not_seen_it(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(classification, "examine_fold", lambda lab, recipe, learn, exam: seen.append((learn, exam)) or
                        [0.5] * len(exam))
    cross_validate(lab, SpamRecipe())
    assert sorted(i for _, exam in seen for i in exam) == list(range(60))
    assert all(sorted([*learn, *exam]) == list(range(60)) for learn, exam in seen)


@pytest.mark.parametrize(("train", "blocks", "moved"), [
    ("blocks", 1, {"blocks.0."}), ("blocks", 2, {"blocks.0.", "blocks.1."}), ("lora", 3, {"lora"}),
    ("all", 1, {"token"})])
def test_training_moves_what_it_should_and_never_the_lab(lab, train, blocks, moved):
    before = {name: tensor.clone() for name, tensor in lab.model.state_dict().items()}
    recipe = SpamRecipe(layers=(3,), train=train, blocks=blocks, rank=2, lr=1e-2, epochs=1, balance="natural")
    classifier = tuned_classifier(lab, recipe, range(40))
    for name, tensor in lab.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])
    trainable = {name for name, p in classifier.model.named_parameters() if p.requires_grad}
    assert all(any(part in name for name in trainable) for part in moved) and classifier.head.weight.requires_grad
    assert ("token_embedding.weight" in trainable) == (train == "all")
    assert all("lora" in name for name in trainable) or train != "lora"
    assert isinstance(classifier.model.token_embedding, StateTable) == (train == "blocks")
    found = cross_validate(lab, recipe, folds=1)
    assert sum(found["scores"].values()) == 12


@pytest.mark.parametrize("train", ["blocks", "lora", "all"])
def test_the_head_lies_where_the_model_is(lab, train, monkeypatch):
    recipe = SpamRecipe(layers=(3,), train=train, rank=2)
    lab.read("train", [3])
    lab.table = lambda part, layer: StateTable(torch.zeros(9, 16, device="meta"))
    lab.model = copy.deepcopy(lab.model).to("meta")  # stands for an accelerator
    monkeypatch.setattr(classification, "train_classifier", lambda *args, **options: None)
    assert {p.device.type for p in tuned_classifier(lab, recipe, range(40)).parameters()} == {"meta"}


def test_the_envelope_learns_from_training_only(lab):
    recipe = SpamRecipe(layers=(2, 4), bound=0.5, decay=1e-2)
    result = open_envelope(lab, recipe)
    for part in ("validation", "test"):
        lab.tokens[part] = lab.tokens[part][::-1]
    lab.found = {}
    again = open_envelope(lab, recipe)
    assert result["chances"]["test"] == pytest.approx(again["chances"]["test"][::-1], abs=1e-4)
    assert result["test texts"] == texts_mark(lab.parts["test"].texts)
    with pytest.raises(ValueError, match="only a head"):
        open_envelope(lab, SpamRecipe(layers=(2,), train="blocks"))


# --- judging --------------------------------------------------------------------------------------------------

def test_balanced_accuracy_and_counts_by_hand():
    scores = counted([1, 1, 0, 0, 0], [0.9, 0.2, 0.1, 0.3, 0.8], 0.3)
    assert dataclasses.astuple(scores) == (1, 2, 1, 1)
    assert balanced_accuracy(scores) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert "balanced accuracy" in describe(scores) and "40.00%" in describe(scores)
    assert balanced_accuracy(Scores.count([0, 1], [0, 0])) == 0.5


def test_log_loss_is_torch_s():
    labels, chances = [1, 0, 1, 0], [0.9, 0.2, 0.4, 0.6]
    expected = nn.functional.binary_cross_entropy(torch.tensor(chances), torch.tensor(labels).float())
    assert log_loss(labels, chances) == pytest.approx(expected.item(), rel=1e-5)
    assert log_loss([1, 0], [0.0, 0.0]) < 20  # an impossible label costs much, and stays a number


def test_the_temperature_that_was_applied_is_found_again():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, generator=generator)
    labels = (torch.rand(20_000, generator=generator) < torch.sigmoid(logits)).int().tolist()
    sure = torch.sigmoid(3 * logits.double()).tolist()
    temperature = fit_temperature(labels, sure)
    assert temperature == pytest.approx(3, rel=0.06)
    assert log_loss(labels, at_temperature(sure, temperature)) < log_loss(labels, sure)
    assert at_temperature([0.2, 0.5, 0.9], 1.0) == pytest.approx([0.2, 0.5, 0.9])
    assert at_temperature([0.9], 2.0)[0] == pytest.approx(0.75)  # odds 9 -> 3
    with pytest.raises(ValueError, match="temperature is 0"):
        at_temperature([0.5], 0)


def test_reliability_counts_everything_once():
    bins = reliability([0, 1, 1, 0], [0.0, 0.5, 1.0, 0.55], [0, 0.5, 1])
    assert bins == [(0.0, 0, 1), (pytest.approx((0.5 + 1.0 + 0.55) / 3), 2, 3)]


# --- the command line and the record --------------------------------------------------------------------------

def run_main(monkeypatch, words):
    asked = {}
    monkeypatch.setattr(classification, "SpamLab", lambda cut: asked.update(cut=cut))
    monkeypatch.setattr(classification, "cross_validate", lambda lab, recipe, folds: asked.update(
        recipe=recipe, folds=folds) or {"scores": {"true_positives": 1, "false_positives": 0, "false_negatives": 0,
                                                   "true_negatives": 1}, "log loss": 0.0})
    classification.main(words)
    return asked


def test_every_command_of_the_questions_means_its_recipe(monkeypatch, capsys):
    for recipe, folds in {(recipe, folds) for recipes in QUESTIONS.values() for recipe, folds in recipes}:
        words = shlex.split(recipe.command(folds))
        assert words[:3] == ["python", "-m", "ch06_finetune.classification"]
        asked = run_main(monkeypatch, words[3:])
        assert (asked["recipe"], asked["folds"], asked["cut"]) == (recipe, folds, recipe.cut)
    assert "GB" in capsys.readouterr().out


def test_bad_options_end_with_a_sentence(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, ["--layers", "0"])
    assert stop.value.code == 1 and "from 1" in capsys.readouterr().err


def test_the_record_keeps_its_promises():
    """At least 99% of the test messages and 98% balanced, for these test messages; and a row for each question."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert {row["question"] for row in record["rows"]} == set(QUESTIONS)
    for row in record["rows"]:
        assert row["command"] in {r.command(f) for r, f in QUESTIONS[row["question"]]}
        assert sum(row["scores"].values()) in (724, 3620)
    test = load_sms_spam()["test"]
    assert record["test"]["test texts"] == texts_mark(test.texts)
    scores = counted(test.labels, record["test"]["chances"]["test"], record["test"]["bound"])
    assert scores.accuracy >= 0.99 and balanced_accuracy(scores) >= 0.98


def test_smollm2_cut_after_two_blocks_is_smollm2():
    """The real weights, once: a table after block 1 and block 2 on top give what the first two blocks give."""
    try:
        real, tokenizer = GPT.from_pretrained("smollm2-135m").requires_grad_(False), BPETokenizer.smollm2()
    except ConnectionError as error:
        pytest.skip(str(error))
    sequences = encode_texts(tokenizer, ["WINNER! Claim your prize now", "Ok, see you later then"])
    top = some_blocks(real, 1, 2, StateTable(token_states(real, sequences, 1)))
    ids, lengths = pad_right(sequences, 0)
    rows, _ = pad_right(table_rows(sequences), 0)
    with torch.no_grad():
        expected = both_states(some_blocks(real, 0, 2).hidden_states(ids), lengths)
        torch.testing.assert_close(both_states(top.hidden_states(rows), lengths), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(pooled_states(real, sequences, [2])[0], expected, atol=1e-3, rtol=1e-3)
