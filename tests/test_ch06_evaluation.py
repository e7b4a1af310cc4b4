"""Chapter 6, evaluation: multiple choice by log-likelihood, intervals, marking, judges, prompt forms, the records."""

import json
import math
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer
from ch04_gpt.gpt import GPT, GPTConfig
from ch05_pretrain.overfitting import wilson_interval
from ch06_finetune.evaluation import (
    FORMS,
    PromptForm,
    contains_answer,
    coverage,
    exact_match,
    main,
    model_judge,
    normalize_answer,
    paired_bootstrap,
    questions_needed,
    right_answers,
    rotated,
    score_form,
    scores_by_rule,
    server_judge,
)
from ch06_finetune.finetune import (
    END,
    START,
    Country,
    MultipleChoice,
    batches_of_equal,
    bootstrap_interval,
    capital_questions,
    choice_log_probs,
    judge_pairs,
    length_controlled_win_rate,
    load_countries,
)
from ch06_finetune.serving import Engine
from utils.server import ChatServer, reserve_port
from utils.workspace import ROOT

WORDS = ("What is the capital of Italy? Question: Answer: Rome Paris Oslo Lima A. B. C. D. "
         "the nightingale sang to the emperor. Which answer is better? Reply with the letter A or B only. ")
ITALY = MultipleChoice("What is the capital of Italy?", ("Oslo", "Rome", "Paris"), 1)


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(WORDS * 3, 300, [END_OF_TEXT, START, END])


def small(vocab_size=300, context_length=96, **choices):
    torch.manual_seed(0)
    style = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "bias": False, "n_kv_heads": 2, **choices}
    model = GPT(GPTConfig(vocab_size, context_length, 32, 2, 4, **style)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model


@torch.no_grad()
def slow_log_prob(model, prompt, option):
    """One option on its own, without a cache: the independent reference."""
    log_probs = torch.log_softmax(model(torch.tensor([[*prompt, *option[:-1]]]))[0].double(), dim=-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(option))


# --- choice_log_probs -------------------------------------------------------------------------------------------

def ids(dice, low, high):
    return [dice.randrange(300) for _ in range(dice.randint(low, high))]


STYLES = [{}, {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True, "n_kv_heads": 4}]


@pytest.mark.parametrize("choices", STYLES, ids=["llama", "gpt2"])
@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("max_rows", [1, 5, 128])
def test_log_probs_are_those_of_the_slow_way(choices, shared, max_rows):
    model, dice = small(**choices), random.Random(shared)
    begin = ids(dice, shared, shared)
    prompts = [begin + ids(dice, 1, 6) for _ in range(9)]
    options = [[ids(dice, 1, 4) for _ in range(dice.randint(1, 4))] for _ in prompts]
    found = choice_log_probs(model, prompts, options, max_rows)
    for prompt, choices_, sums in zip(prompts, options, found, strict=True):
        expected = [slow_log_prob(model, prompt, option) for option in choices_]
        torch.testing.assert_close(sums.tolist(), expected, atol=2e-4, rtol=1e-5)


def test_log_probs_of_a_model_whose_window_drops_the_beginning():
    model, dice = small(window=8), random.Random(0)
    prompts, options = [[1, 2, *ids(dice, 60, 60)] for _ in range(3)], [[3], [4, 5]]
    for prompt, sums in zip(prompts, choice_log_probs(model, prompts, [options] * 3, max_rows=2), strict=True):
        expected = [slow_log_prob(model, prompt, option) for option in options]
        torch.testing.assert_close(sums.tolist(), expected, atol=2e-4, rtol=1e-5)


def test_equal_prompts_and_options_of_one_token():
    model, prompt = small(), [5, 6, 7]
    found = choice_log_probs(model, [prompt] * 3, [[[1], [2]]] * 3)
    everything = torch.log_softmax(model(torch.tensor([prompt]))[0, -1], dim=-1).detach()
    for sums in found:
        torch.testing.assert_close(sums, everything[[1, 2]], atol=1e-5, rtol=1e-5)


def test_all_continuations_together_are_certain():
    """The probabilities of all options of one token add up to 1."""
    (sums,) = choice_log_probs(small(), [[3, 1, 4]], [[[i] for i in range(300)]])
    assert sums.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("prompts, options, words", [
    ([], [], "0 prompts"), ([[1]], [], "options for 0"), ([[1], [2]], [[[1]]], "2 prompts and options for 1"),
    ([[]], [[[1]]], "prompt of 0 tokens"), ([[1]], [[]], r"options of \[\]"),
    ([[1], [2]], [[[1]], [[1], []]], r"\[1, 0\]"),
    ([[1], [1] * 90], [[[2]], [[3] * 8]], "Question 1 has 90 tokens and an option of 8; at most 97"),
])
def test_log_probs_refuse(prompts, options, words):
    with pytest.raises(ValueError, match=words):
        choice_log_probs(small(), prompts, options)


def test_the_longest_that_fits_is_scored():
    model = small()
    (sums,) = choice_log_probs(model, [[1] * 90], [[[3] * 7, [4]]])
    expected = [slow_log_prob(model, [1] * 90, option) for option in ([3] * 7, [4])]
    torch.testing.assert_close(sums.tolist(), expected, atol=1e-4, rtol=1e-4)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 7))
def test_batches_hold_every_position_once_and_one_length(lengths, size):
    batches = batches_of_equal(lengths, size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size and len({lengths[i] for i in batch}) == 1 for batch in batches)


# --- questions ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, answer, words", [
    ((), 0, "at least 2"), (("Rome",), 0, "at least 2"), (("Rome", "Rome"), 0, "no two of them equal"),
    (("Rome", "Oslo"), 2, "answer is 2, but the options are numbered 0 to 1"), (("Rome", "Oslo"), -1, "answer is -1"),
])
def test_a_choice_needs_options(options, answer, words):
    with pytest.raises(ValueError, match=words):
        MultipleChoice("What is the capital of Italy?", options, answer)


def test_capital_questions_follow_their_rule():
    countries = [Country(f"country {i}", f"capital {i}", "north" if i < 6 else "south") for i in range(8)]
    questions = capital_questions(countries, seed=3)
    assert len(questions) == 6  # the south has too few capitals
    north = {f"capital {i}" for i in range(6)}
    for item in questions:
        number = item.question.split()[-1][:-1]
        assert item.options[item.answer] == f"capital {number}"
        assert set(item.options) <= north and len(item.options) == 4
    assert questions == capital_questions(countries, seed=3) != capital_questions(countries, seed=4)
    with pytest.raises(ValueError, match="n_options is 1"):
        capital_questions(countries, n_options=1)


def test_false_options_are_never_a_second_capital_of_that_name():
    twins = [Country("one", "Kingston", "sea"), Country("two", "Kingston", "sea"),
             *(Country(f"{i}", f"town {i}", "sea") for i in range(4))]
    for item in capital_questions(twins):
        assert len(set(item.options)) == 4


def test_true_answers_stand_everywhere():
    places = [item.answer for item in capital_questions(load_countries())]
    assert len(places) > 150 and all(0.15 < places.count(place) / len(places) < 0.35 for place in range(4))


def test_rotation_moves_truth_and_options_alike():
    for by in range(7):
        moved = rotated(ITALY, by)
        assert moved.options[moved.answer] == "Rome" and moved.options[by % 3] == "Oslo"
    assert rotated(ITALY, 3) == ITALY


# --- forms -------------------------------------------------------------------------------------------------------

def decoded(form, tokenizer, item=ITALY, pool=()):
    prompt, options = form.encode(tokenizer, item, pool)
    return tokenizer.decode(prompt), [tokenizer.decode(option) for option in options]


OTHER = MultipleChoice("What is the capital of Norway?", ("Oslo", "Lima", "Rome"), 0)


def test_forms_read_as_they_should(tokenizer):
    assert decoded(FORMS["Question: Answer:"], tokenizer) == (
        "Question: What is the capital of Italy?\nAnswer:", [" Oslo", " Rome", " Paris"])
    assert decoded(FORMS["a space too many"], tokenizer) == (
        "Question: What is the capital of Italy?\nAnswer: ", ["Oslo", "Rome", "Paris"])
    assert decoded(FORMS["a sentence to end"], tokenizer)[0] == "The capital of Italy is"
    assert decoded(FORMS["letters, 1 example"], tokenizer, pool=[OTHER]) == (
        "Question: What is the capital of Norway?\nA. Oslo\nB. Lima\nC. Rome\nAnswer: A\n\n"
        "Question: What is the capital of Italy?\nA. Oslo\nB. Rome\nC. Paris\nAnswer:", [" A", " B", " C"])
    prompt, options = decoded(FORMS["chat, answer begun"], tokenizer)
    assert prompt.endswith("\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\nThe capital of Italy is")
    assert options == [" Oslo", " Rome", " Paris"]
    assert decoded(FORMS["chat"], tokenizer)[1] == ["Oslo", "Rome", "Paris"]


def test_a_chat_shows_its_examples_as_turns(tokenizer):
    prompt, _ = decoded(PromptForm("{question}", chat=True, examples=1), tokenizer, pool=[OTHER])
    assert "Norway?<|im_end|>\n<|im_start|>assistant\nOslo<|im_end|>\n<|im_start|>user\nWhat is the" in prompt


def test_forms_refuse(tokenizer):
    with pytest.raises(ValueError, match="shows 3 examples and the pool has 1"):
        FORMS["3 examples"].encode(tokenizer, ITALY, [OTHER])
    with pytest.raises(ValueError, match="none that is asked"):
        FORMS["1 example"].encode(tokenizer, ITALY, [ITALY])
    with pytest.raises(ValueError, match="2 labels for 3 options"):
        PromptForm("{listed}", labels="AB").encode(tokenizer, ITALY)
    with pytest.raises(ValueError, match="at most 97 fit"):
        score_form(small(), tokenizer, FORMS["Question: Answer:"], [
            MultipleChoice("What? " * 100, ITALY.options, 0)])


def test_four_rules_by_hand(tokenizer):
    model = small()
    item = MultipleChoice(ITALY.question, ("Oslo", "Rome", "Brasília"), 1)  # more bytes than characters
    sums = score_form(model, tokenizer, FORMS["Question: Answer:"], [item, OTHER])
    rules = scores_by_rule(model, tokenizer, sums, [item, OTHER])
    assert list(rules) == ["sum", "per token", "per byte", "against no question"]
    before = tokenizer.encode("Answer:")
    asked = tokenizer.encode("Question: What is the capital of Italy?\nAnswer:")
    for i, option in enumerate(item.options):
        end = tokenizer.encode(" " + option)
        alone, total = slow_log_prob(model, before, end), slow_log_prob(model, asked, end)
        expected = [total, total / len(end), total / len(option.encode()), total - alone]
        assert [scores[0, i].item() for scores in rules.values()] == pytest.approx(expected, abs=2e-4, rel=1e-4)


def test_right_answers_and_their_shape():
    assert right_answers(torch.tensor([[0.0, 3.0, 1.0], [0.0, 2.0, 1.0]]), [ITALY, OTHER]) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"\(2, 4\); for 2 questions with 3 options"):
        right_answers(torch.zeros(2, 4), [ITALY, OTHER])


# --- marking -----------------------------------------------------------------------------------------------------

def test_marking():
    assert normalize_answer(" The  Hague, (A city)!") == "hague city"
    assert exact_match("the Port-Louis.", ["Rome", "PortLouis"]) and not exact_match("It is Rome", ["Rome"])
    assert contains_answer("It is Rome, of course.", ["Rome"]) and not contains_answer("The Romans", ["Roman"])
    assert not contains_answer("", ["Rome"]) and not exact_match("", ["Rome"])
    for mark in (exact_match, contains_answer):
        for truths in ([], "Rome"):
            with pytest.raises(ValueError, match="a list of at least 1"):
                mark("Rome", truths)


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(text):
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


# --- intervals ---------------------------------------------------------------------------------------------------

def test_bootstrap_is_the_normal_interval_where_that_is_right():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    low, high = bootstrap_interval(values.tolist(), n_resamples=4000)
    half = 1.96 * values.std().item() / 20
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.06)
    narrow = bootstrap_interval(values.tolist(), level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) * 0.674 / 1.96, rel=0.1)


def test_bootstrap_covers_what_it_promises():
    generator, hits = torch.Generator().manual_seed(1), 0
    for seed in range(300):
        values = torch.rand(60, generator=generator).tolist()
        low, high = bootstrap_interval(values, n_resamples=200, seed=seed)
        hits += low <= 0.5 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_bootstrap_repeats_and_stays_inside():
    values = [0.0, 1.0, 1.0, 3.0]
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    low, high = bootstrap_interval(values)
    assert 0 <= low < 1.25 < high <= 3
    assert bootstrap_interval([2.0]) == (2.0, 2.0)


@pytest.mark.parametrize("values, options, words", [
    ([], {}, r"shape \(0,\)"), ([1.0, math.nan], {}, "1 numbers that are not finite"), ([[1.0]], {}, r"\(1, 1\)"),
    ([1.0], {"n_resamples": 0}, "n_resamples is 0"), ([1.0], {"level": 1.0}, "level 1.0"),
    ([1.0], {"level": 0}, "level 0"),
])
def test_bootstrap_refuses(values, options, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(values, **options)


def test_paired_is_narrower_where_the_questions_are_shared():
    dice = random.Random(0)
    first = [float(dice.random() < 0.6) for _ in range(200)]
    second = [1.0 if dice.random() < 0.1 else x for x in first]
    gain, low, high = paired_bootstrap(first, second)
    assert gain == pytest.approx(sum(second) / 200 - sum(first) / 200) and low < gain < high
    widths = [b - a for a, b in map(bootstrap_interval, (first, second))]
    assert high - low < 0.6 * math.hypot(*widths)
    backwards = paired_bootstrap(second, first)
    assert backwards[0] == pytest.approx(-gain) and backwards[1:] == pytest.approx((-high, -low), abs=0.011)
    with pytest.raises(ValueError, match="200 and 199"):
        paired_bootstrap(first, second[1:])


def test_coverage_is_exact():
    everything, nothing = [(0.0, 1.0)] * 11, [(2.0, 3.0)] * 11
    assert coverage(everything, 0.3) == pytest.approx(1) and coverage(nothing, 0.3) == 0
    assert coverage([(0.0, 0.4), (0.0, 1.0), (0.6, 1.0)], 0.5) == pytest.approx(0.5)
    assert coverage([wilson_interval(k, 50) for k in range(51)], 0.7) == pytest.approx(0.95, abs=0.03)
    assert coverage([(0, 0.5)] * 11, 0) == 1 and coverage([(0.6, 1)] * 11, 1) == 1
    assert coverage([wilson_interval(k, 2000) for k in range(2001)], 0.7) == pytest.approx(0.95, abs=0.005)
    with pytest.raises(ValueError, match="1 intervals"):
        coverage([(0, 1)], 0.5)
    with pytest.raises(ValueError, match="share is 2"):
        coverage(everything, 2)


def test_as_many_questions_as_needed_are_enough():
    n, difference, spread = questions_needed(0.1, 0.8), 0.1, 0.8
    assert n == math.ceil(((1.959964 + 0.841621) * 8) ** 2)
    draws = torch.randn(4000, n, generator=torch.Generator().manual_seed(0)) * spread + difference
    found = draws.mean(dim=1) - 1.96 * draws.std(dim=1) / n**0.5 > 0
    assert found.float().mean().item() == pytest.approx(0.8, abs=0.025)
    assert questions_needed(-0.1, 0.8) == n and abs(questions_needed(0.05, 0.8) - 4 * n) <= 4
    for bad in ({"difference": 0}, {"spread": 0}, {"power": 1}, {"level": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            questions_needed(**{"difference": 0.1, "spread": 0.8, **bad})


# --- judges ------------------------------------------------------------------------------------------------------

def test_order_bias_cancels():
    first_wins = judge_pairs(lambda question, a, b: 1.0, ["?"] * 3, ["x"] * 3, ["y"] * 3)
    assert first_wins.tolist() == [0.5] * 3 and first_wins.dtype == torch.float64
    longer = judge_pairs(lambda q, a, b: 1 if len(a) > len(b) else 0 if len(a) < len(b) else 0.5,
                         ["?"] * 3, ["long", "s", "same"], ["no", "longer", "size"])
    assert longer.tolist() == [1.0, 0.0, 0.5]
    shy = judge_pairs(lambda q, a, b: 0.8 if a == "x" else 0.6, ["?"], ["x"], ["y"])
    assert shy.tolist() == pytest.approx([0.6])


@pytest.mark.parametrize("verdict", [2, -0.1, math.nan, "A", None])
def test_a_judge_must_judge(verdict):
    with pytest.raises(ValueError, match="must return 1"):
        judge_pairs(lambda question, a, b: verdict, ["?"], ["x"], ["y"])


@pytest.mark.parametrize("lists", [([], [], []), (["?"], ["x", "z"], ["y"]), (["?"], ["x"], [])])
def test_pairs_must_be_whole(lists):
    with pytest.raises(ValueError, match="at least 1"):
        judge_pairs(lambda question, a, b: 1.0, *lists)


def contest(theta, phi, n=4000, shift=0, seed=0):
    """Verdicts drawn from the model itself, with the lengths that go with them."""
    generator = torch.Generator().manual_seed(seed)
    second = torch.randint(50, 150, (n,), generator=generator)
    difference = torch.randint(-40, 41, (n,), generator=generator) + shift
    x = torch.tanh(difference / difference.double().square().mean().sqrt())
    return torch.bernoulli(torch.sigmoid(theta + phi * x), generator=generator), second + difference, second


@pytest.mark.parametrize("theta, phi, shift", [(0.0, 2.0, 20), (0.7, -1.0, 0), (-1.0, 1.0, 15), (0.0, 0.0, 30)])
def test_control_finds_what_was_put_in(theta, phi, shift):
    controlled, weight = length_controlled_win_rate(*contest(theta, phi, shift=shift))
    assert controlled == pytest.approx(1 / (1 + math.exp(-theta)), abs=0.04) and weight == pytest.approx(phi, abs=0.25)


def test_control_is_symmetric_and_the_fit_is_a_maximum():
    verdicts, first, second = contest(0.4, 1.0, n=200, shift=5)
    controlled, weight = length_controlled_win_rate(verdicts, first.tolist(), second.tolist())
    back, same = length_controlled_win_rate(1 - verdicts, second.tolist(), first.tolist())
    assert back == pytest.approx(1 - controlled) and same == pytest.approx(weight)
    difference = (first - second).double()
    x = torch.tanh(difference / difference.square().mean().sqrt())
    free = torch.tensor([math.log(controlled / (1 - controlled)), weight], dtype=torch.float64, requires_grad=True)
    logits = free[0] + free[1] * x
    loss = nn.functional.binary_cross_entropy_with_logits(logits, verdicts.double(), reduction="sum")
    (loss + free.square().sum() / 18).backward()
    torch.testing.assert_close(free.grad, torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_without_a_difference_of_length_control_changes_little():
    verdicts = torch.tensor([1.0] * 70 + [0.0] * 30)
    controlled, weight = length_controlled_win_rate(verdicts, [9] * 100, [9] * 100)
    assert controlled == pytest.approx(0.7, abs=0.002) and weight == 0
    assert length_controlled_win_rate(torch.full((5,), 0.5), [3] * 5, [3] * 5) == (0.5, 0.0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 500), st.integers(0, 500)), min_size=1,
                max_size=12))
def test_control_stays_finite(rows):
    controlled, weight = length_controlled_win_rate(*map(list, zip(*rows, strict=True)))
    assert 0 < controlled < 1 and math.isfinite(weight)


@pytest.mark.parametrize("arguments, words", [
    (([], [], []), "0 verdicts"), (([1.0], [1, 2], [1]), "2 and 1 lengths"), (([1.5], [1], [2]), "go from 1.5"),
    (([math.nan], [1], [2]), "must be 0 to 1"), (([1.0], [1], [2], 0.0), "prior is 0.0"),
])
def test_control_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        length_controlled_win_rate(*arguments)


class Fixed(nn.Module):
    """A head that always says one token, and then another."""

    def __init__(self, vocab_size, token, then):
        super().__init__()
        self.size, self.tokens, self.said = vocab_size, (token, then), 0

    def forward(self, states):
        logits = torch.zeros(*states.shape[:-1], self.size)
        logits[..., self.tokens[self.said % 2]] = 50.0
        self.said += 1
        return logits


def test_a_model_judges_by_the_probability_of_its_letters(tokenizer):
    model = small(context_length=256)
    judge = model_judge(model, tokenizer)
    value = judge("Why?", "so {a}", "because")
    assert 0 < value < 1
    model.lm_head = Fixed(tokenizer.vocab_size, *[tokenizer.encode("B")[0]] * 2)
    assert judge("Why?", "so", "because") == pytest.approx(0, abs=1e-6)
    assert judge_pairs(judge, ["Why?"], ["so"], ["because"]).item() == pytest.approx(0.5)


@pytest.fixture
def serving(tokenizer):
    """The course's own server around a model that says a given letter: a function of the letter -> address."""
    servers = []

    def serve(letter):
        model = small(tokenizer.vocab_size, context_length=512)
        model.lm_head = Fixed(tokenizer.vocab_size, tokenizer.encode(letter)[0], tokenizer.special_tokens[END])
        sockets = reserve_port(0)
        server = ChatServer(Engine(model, tokenizer, "tiny", None), sockets)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert server.ready.wait(20)
        servers.append((server, thread))
        return f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"

    yield serve
    for server, thread in servers:
        server.stop()
        thread.join(20)


@pytest.mark.parametrize("letter, verdict", [("A", 1.0), ("B", 0.0)])
def test_a_judge_behind_the_courses_server(serving, letter, verdict):
    assert server_judge(serving(letter), "tiny")("Why?", "So.", "Because.") == verdict


def test_a_server_that_says_nonsense_or_refuses_or_is_not_there(serving):
    address = serving("C")
    with pytest.raises(ValueError, match="names 0 of the letters"):
        server_judge(address, "tiny")("Why?", "So.", "Because.")
    with pytest.raises(ValueError, match="status 404"):
        server_judge(address, "another")("Why?", "So.", "Because.")
    port = reserve_port(0)
    gone = f"http://127.0.0.1:{port[0].getsockname()[1]}"
    for socket in port:
        socket.close()
    with pytest.raises(ConnectionError, match="course.py serve"):
        server_judge(gone, timeout=5)("Why?", "So.", "Because.")


# --- the records -------------------------------------------------------------------------------------------------

def record(name):
    return json.loads((ROOT / "ch06_finetune" / "records" / f"evaluation_{name}.json").read_text(encoding="utf-8"))


def test_the_record_of_formats_is_whole():
    found = record("formats")
    n = len(found["questions"])
    assert {run["form"] for run in found["runs"]} == set(FORMS) and found["command"].startswith("python -m ch06_fin")
    assert len(found["written"]) == n and all(len(run["scores"]) == n for run in found["runs"])
    known = {item.question for item in capital_questions(load_countries())}
    assert set(found["questions"]) <= known


def test_the_record_of_judges_is_whole():
    found = record("judge")
    n = len(found["questions"])
    assert all(len(answers) == n for answers in found["answers"].values())
    assert all(len(rows) == n and all(0 <= p <= 1 for row in rows for p in row) for rows in found["said"].values())


def test_the_record_is_smollm2s():
    try:
        model, tokenizer = GPT.from_pretrained("smollm2-135m").eval(), BPETokenizer.smollm2()
    except (ConnectionError, ModuleNotFoundError) as error:
        pytest.skip(str(error))
    found, questions = record("formats"), capital_questions(load_countries())
    items, pool = questions[:2], questions[len(found["questions"]) :]
    for name in ("a sentence to end", "letters"):
        (run,) = [r for r in found["runs"] if (r["form"], r["rotated"], r["draw"]) == (name, 0, 0)]
        scores = score_form(model, tokenizer, FORMS[name], items, pool)
        torch.testing.assert_close(scores, torch.tensor(run["scores"][:2]), atol=0.05, rtol=0)


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["everything"])
    assert "formats" in capsys.readouterr().err
