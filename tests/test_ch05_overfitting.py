"""Chapter 5, deep dive on overfitting: curves, copied spans, the exam of endings, and variety."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ch01_data.data import Document
from ch02_tokenizer.tokenizer import BPETokenizer
from ch05_pretrain import overfitting
from ch05_pretrain.overfitting import (
    BOOK_MODELS,
    BOOK_RUN,
    LONG,
    RECIPES,
    SMALL_RUN,
    Cloze,
    EpochCurve,
    SpanIndex,
    common_prefix,
    distinct_n,
    ending_log_probabilities,
    make_cloze,
    mark_spans,
    record_book,
    score_cloze,
    sentences_of,
    small_gpt,
    suffix_array,
    train_and_watch,
    wilson_interval,
)
from ch05_pretrain.pretrain import TrainConfig, evaluate

LETTERS = st.text("ab \n", max_size=40)
ANYTHING = st.text(max_size=30)


# --- copied spans ---------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(st.one_of(LETTERS, ANYTHING, st.text("a", max_size=70)))
@example("")
@example("banana")
@example("a" * 65)
def test_suffixes_are_in_alphabetical_order(text):
    assert suffix_array(text).tolist() == sorted(range(len(text)), key=lambda start: text[start:])


def test_a_long_text_with_long_repeats_is_sorted():
    generator = np.random.default_rng(0)
    text = "".join(generator.choice(list("abcdefgh "), 700)) * 3  # suffixes that are equal for 1,400 characters
    assert suffix_array(text).tolist() == sorted(range(len(text)), key=lambda start: text[start:])


def brute_force(text, corpus, limit=1000):
    lengths = []
    for start in range(len(text)):
        found = [n for n in range(1, min(len(text) - start, limit) + 1) if text[start : start + n] in corpus]
        lengths.append(max(found, default=0))
    return lengths


@settings(deadline=None)
@given(LETTERS, LETTERS)
@example("", "abc")
@example("abc", "")
@example("b", "a")
@example("zz", "abz")
def test_lengths_are_those_of_a_search(text, corpus):
    assert SpanIndex(corpus).lengths(text).tolist() == brute_force(text, corpus)


@settings(deadline=None)
@given(ANYTHING, ANYTHING)
def test_lengths_with_any_characters(text, corpus):
    assert SpanIndex(corpus + text[: len(text) // 2]).lengths(text).tolist() == brute_force(
        text, corpus + text[: len(text) // 2])


@settings(deadline=None)
@given(LETTERS, LETTERS, st.integers(1, 5))
def test_spans_are_followed_up_to_the_limit_only(text, corpus, limit):
    assert SpanIndex(corpus, limit).lengths(text).tolist() == brute_force(text, corpus, limit)


@settings(deadline=None)
@given(LETTERS, LETTERS, st.integers(1, 6))
def test_spans_cover_the_places_in_long_shared_pieces(text, corpus, at_least):
    index, lengths = SpanIndex(corpus), brute_force(text, corpus)
    inside = {place for start, n in enumerate(lengths) if n >= at_least for place in range(start, start + n)}
    spans = index.spans(text, at_least)
    assert {place for start, end in spans for place in range(start, end)} == inside
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
    assert index.share(text, at_least) == pytest.approx(len(inside) / max(len(text), 1))


def test_longest_and_marks_by_hand():
    index = SpanIndex("the king sat down. the queen stood up.")
    text = "so the king sat up and the queen sat down."
    assert index.longest(text) == "the king sat "
    assert index.spans(text, 11) == index.spans(text, 12) == [(3, 16), (22, 34)]
    assert index.spans(text, 13) == [(3, 16)] and index.spans(text, 14) == []
    assert SpanIndex("abc. bcd. def").spans("abcdef", 3) == [(0, 6)]  # three pieces, each overlapping the next
    assert mark_spans("abcdef", [(1, 3), (3, 5)]) == "a【bc】【de】f"
    assert SpanIndex("abc").longest("") == "" and SpanIndex("").share("abc", 1) == 0.0


def test_a_copy_is_found_whole_and_a_stranger_not_at_all():
    corpus = "Far out in the ocean, where the water is as blue as the prettiest cornflower."
    assert SpanIndex(corpus).share(corpus[10:60], 50) == 1.0
    assert SpanIndex(corpus).share("ZZZZZ QQQQQ", 2) == 0.0
    with pytest.raises(ValueError, match="at_least is 0.*at least 1"):
        SpanIndex(corpus).spans("abc", 0)


def test_a_text_is_looked_up_once_and_answers_are_the_askers_own(monkeypatch):
    index = SpanIndex("the king sat down")
    first = index.lengths("a king sat up")
    kept = first.copy()
    first[:] = 99  # whoever changes an answer must not change the next
    monkeypatch.setattr(index, "length_at", lambda text, start: pytest.fail("looked up again"))
    assert index.lengths("a king sat up").tolist() == kept.tolist()


@settings(deadline=None)
@given(LETTERS, LETTERS)
def test_common_prefix(a, b):
    assert a[: common_prefix(a, b)] == b[: common_prefix(a, b)]
    assert common_prefix(a, b) == len(a) or common_prefix(a, b) == len(b) or a[common_prefix(a, b)] != b[
        common_prefix(a, b)]


# --- variety --------------------------------------------------------------------------------------------------

def test_distinct_by_hand():
    assert distinct_n(list("ababa"), 1) == 2 / 5
    assert distinct_n(list("ababa"), 2) == 2 / 4
    assert distinct_n(list("ababa"), 5) == 1.0


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4))
def test_distinct_against_a_set(words, n):
    if n > len(words):
        with pytest.raises(ValueError, match=f"n is {n} for {len(words)} words"):
            distinct_n(words, n)
    else:
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert distinct_n(words, n) == len(set(grams)) / len(grams)


def test_n_below_one_is_refused():
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n(["a"], 0)


# --- the exam -------------------------------------------------------------------------------------------------

def tale(name: str, n: int = 30) -> Document:
    """A tale whose sentences name it and count themselves, so that the truth can be told from the text."""
    return Document(name, " ".join(f"Then {name} went over the hill for the {i:02}nd time." for i in range(n)), "test")


def test_questions_hold_the_sentence_that_follows():
    stories = [tale("anna"), tale("bert"), tale("carl")]
    questions = make_cloze(stories, 40, n_endings=4, seed=3)
    assert len(questions) == 40 and len({(q.story, q.endings[q.answer]) for q in questions}) == 40
    for question in questions:
        truth = question.endings[question.answer]
        number, last = int(truth[-10:-8]), question.context[-10:-8]
        assert int(last) == number - 1 and question.story in truth and question.story in question.context
        assert sum(question.story in ending for ending in question.endings) == 1  # the others are of other stories
        assert len(set(question.endings)) == 4
        assert len(question.context) <= 300


def test_answers_stand_at_every_place_and_seeds_decide():
    stories = [tale("anna"), tale("bert")]
    questions = make_cloze(stories, 45, n_endings=3)
    assert {q.answer for q in questions} == {0, 1, 2}
    assert questions == make_cloze(stories, 45, n_endings=3) != make_cloze(stories, 45, n_endings=3, seed=1)


def test_false_endings_are_as_long_as_the_true_one():
    long, short = "x" * 80, "y" * 20
    body = " ".join(f"A {long if i % 2 else short} number {i:02}." for i in range(90))
    stories = [Document("a", body, ""), Document("b", body.replace("number", "figure"), "")]
    for question in make_cloze(stories, 30):
        lengths = [len(ending) for ending in question.endings]
        assert max(lengths) - min(lengths) <= 2


def test_an_exam_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="n_questions is 1000, but the stories have .* ask for 1 to that many"):
        make_cloze([tale("anna"), tale("bert")], 1000)
    with pytest.raises(ValueError, match="n_questions is 0"):
        make_cloze([tale("anna"), tale("bert")], 0)
    with pytest.raises(ValueError, match="from 1 stories; both must be at least 2"):
        make_cloze([tale("anna")], 1)
    with pytest.raises(ValueError, match="4 endings need 3 sentences of other stories; there are 2"):
        make_cloze([tale("anna", 10), tale("bert", 2)], 5)


def test_sentences():
    assert sentences_of('One. "Two?" asked he. "Three!" Four\n\nFive.') == [
        ["One.", '"Two?" asked he.', '"Three!"', "Four"], ["Five."]]
    assert sentences_of("") == []


def test_scores():
    questions = [Cloze("", ("a", "b"), 0, ""), Cloze("", ("a", "b"), 1, ""), Cloze("", ("b", "a"), 0, "")]
    assert score_cloze(questions, lambda context, endings: [e == "a" for e in endings]) == [True, False, False]
    assert score_cloze(questions, lambda context, endings: [1.0, 1.0]) == [False] * 3  # a tie is no choice
    with pytest.raises(ValueError, match="1 numbers for 2 endings"):
        score_cloze(questions, lambda context, endings: [1.0])


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train("the king and the queen went to the hill again and again " * 5, 280)


@pytest.fixture(scope="module")
def model():
    model = small_gpt(16, 1, context_length=32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform
    return model


def test_log_probabilities_are_those_of_one_text_at_a_time(model, tokenizer):
    context, endings = "the king went", ["and the queen", "to the hill again and again", "up"]
    scores = ending_log_probabilities(model, tokenizer, context, endings)
    for score, ending in zip(scores, endings, strict=True):
        before, after = tokenizer.encode(context), tokenizer.encode(" " + ending)
        probabilities = torch.softmax(model(torch.tensor([before + after])), -1)[0].detach()
        expected = sum(math.log(probabilities[len(before) - 1 + i, token]) for i, token in enumerate(after))
        assert score.item() == pytest.approx(expected, rel=1e-4)


def test_a_long_context_loses_its_beginning_and_a_long_ending_is_refused(model, tokenizer):
    endings = ["and the queen"]
    room = 32 - len(tokenizer.encode(" " + endings[0]))
    ids = tokenizer.encode("the hill again " * 40)
    whole = ending_log_probabilities(model, tokenizer, tokenizer.decode(ids), endings)
    end = ending_log_probabilities(model, tokenizer, tokenizer.decode(ids[-room:]), endings)
    assert whole.item() == pytest.approx(end.item(), rel=1e-5)
    with pytest.raises(ValueError, match="the model sees 32: it must be shorter, at most 31"):
        ending_log_probabilities(model, tokenizer, "the king", ["again and " * 30])


@pytest.mark.parametrize(("right", "asked", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634),
                                                             (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)])
def test_wilson_against_published_values(right, asked, low, high):
    """The last row: Newcombe 1998, table I (81 of 263), method 3."""
    assert wilson_interval(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_wilson_by_its_definition_and_bounds():
    low, high = wilson_interval(37, 150)
    for p in (low, high):  # the ends are where the observed share is exactly z standard errors away
        assert abs(37 / 150 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 150))
    for n in range(1, 300):  # rounding must not carry an end out of the bounds
        assert 0 <= wilson_interval(0, n)[0] < wilson_interval(n, n)[1] <= 1
    for right, asked in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{right} successes out of {asked}; give 0 to n"):
            wilson_interval(right, asked)


# --- curves ---------------------------------------------------------------------------------------------------

def test_the_turn_is_the_lowest_held_out_loss():
    assert EpochCurve([1, 2, 3], [3, 2, 1], [5.0, 4.0, 4.5]).turn() == 1
    assert EpochCurve([1, 2, 3], [3, 2, 1], [5.0, math.nan, 4.5]).turn() == 2


def test_watching_keeps_the_weights_of_the_turn():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 25, (n,), generator=generator).numpy() for n in (300, 200)]
    held_out = torch.randint(0, 50, (200,), generator=generator).numpy()  # half of it is never read: it must turn
    config = dataclasses.replace(SMALL_RUN, steps=30, eval_every=3, batch_size=2, context_length=16, warmup_steps=2,
                                 matrix_lr=0.1, max_lr=0.05)
    model = small_gpt(16, 1, context_length=16)
    curve, best = train_and_watch(model, rows, held_out, config)
    assert curve.epochs == pytest.approx([step / (500 / 32) for step in range(3, 31, 3)])
    assert curve.turn() < len(curve.val_loss) - 1 and curve.train_loss[-1] < curve.train_loss[0]
    model.load_state_dict(best, strict=False)
    assert evaluate(model, held_out, context_length=16).loss == pytest.approx(min(curve.val_loss), rel=1e-5)
    assert evaluate(model, rows[0], context_length=16).loss == pytest.approx(curve.train_loss[curve.turn()], rel=1e-5)


def test_old_checkpoints_make_no_new_curve(tmp_path):
    ids = torch.randint(0, 50, (300,), generator=torch.Generator().manual_seed(0)).numpy()
    config = dataclasses.replace(SMALL_RUN, steps=6, eval_every=4, batch_size=2, context_length=16, warmup_steps=2)
    curve, best = train_and_watch(small_gpt(16, 1, context_length=16), [ids], ids, config, folder=tmp_path)
    assert len(curve.epochs) == 2 and best
    first = EpochCurve(curve.epochs[:1], curve.train_loss[:1], curve.val_loss[:1])
    for begun, ends in ((None, 0), (first, 4)):
        with pytest.raises(ValueError, match=f"stand at step 6, the curve ends at step {ends}: give the curve"):
            train_and_watch(small_gpt(16, 1, context_length=16), [ids], ids, config, folder=tmp_path, begun=begun)
    whole = dataclasses.replace(curve)
    assert train_and_watch(small_gpt(16, 1, context_length=16), [ids], ids, config, folder=tmp_path,
                           begun=curve) == (whole, {}), "the turn came before"


TINY_BOOK = dataclasses.replace(BOOK_RUN, steps=6, eval_every=2, batch_size=2, context_length=16, warmup_steps=1,
                                eval_tokens=64, save_every=1, precision="float32")


def test_the_record_survives_a_stop_and_keeps_other_curves(monkeypatch, tmp_path):
    ids = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setattr(overfitting, "prepare_tokens", lambda name: SimpleNamespace(train=ids[:300], val=ids[300:]))
    monkeypatch.setattr(overfitting, "BOOK_RUN", TINY_BOOK)
    monkeypatch.setattr(overfitting, "BOOK_MODELS", {name: {"d_model": 16, "n_layers": 1} for name in ("a", "b")})
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "whole"))
    record_book(tmp_path / "whole.json", "a")
    expected = json.loads((tmp_path / "whole.json").read_text())
    assert expected["curves"]["a"]["epochs"] == pytest.approx([step * 32 / 300 for step in (2, 4, 6)])
    assert expected["train"] == TINY_BOOK.to_dict() and expected["tokens"] == 300

    def stop_after(text, steps):
        if len(json.loads(text)["curves"]["a"]["epochs"]) == steps:
            raise KeyboardInterrupt

    written = overfitting.write_text
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "parts"))
    path = tmp_path / "parts.json"
    path.write_text(json.dumps({"curves": {"b": {"epochs": [1.0], "train_loss": [2.0], "val_loss": [3.0]}}}))
    monkeypatch.setattr(overfitting, "write_text", lambda p, text: (written(p, text), stop_after(text, 2)))
    with pytest.raises(KeyboardInterrupt):
        record_book(path, "a")
    assert len(json.loads(path.read_text())["curves"]["a"]["val_loss"]) == 2
    monkeypatch.setattr(overfitting, "write_text", written)
    record_book(path, "a")
    found = json.loads(path.read_text())["curves"]
    assert found["a"] == expected["curves"]["a"]
    assert found["b"] == {"epochs": [1.0], "train_loss": [2.0], "val_loss": [3.0]}


def test_the_records_were_made_with_todays_settings():
    folder = Path(overfitting.__file__).parent / "records"
    kept = {name: json.loads((folder / f"overfitting_{name}.json").read_text(encoding="utf-8"))
            for name in ("book", "dropout", "recipes", "turns")}
    made = {name: TrainConfig.from_dict(kept[name]["train"]) for name in ("book", "recipes", "turns")}
    assert made == {"book": BOOK_RUN, "recipes": SMALL_RUN, "turns": SMALL_RUN}  # an entry added later: its default
    assert kept["book"]["models"] == BOOK_MODELS
    assert set(kept["book"]["curves"]) <= set(BOOK_MODELS) and "plain" in kept["book"]["curves"]
    assert kept["dropout"]["recipe"] == {"model": {"dropout": 0.2}, "run": LONG}
    assert kept["recipes"]["recipes"] == json.loads(json.dumps(RECIPES))
    for curve in [kept["dropout"]["curve"], *kept["book"]["curves"].values(), *kept["turns"]["curves"].values()]:
        assert len(curve["epochs"]) == len(curve["train_loss"]) == len(curve["val_loss"]) > 0
        assert curve["epochs"] == sorted(set(curve["epochs"]))


def test_small_gpt_is_the_same_for_the_same_seed():
    a, b, c = (next(small_gpt(16, 1, seed=seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert small_gpt(32, 1, dropout=0.3).config.dropout == 0.3
