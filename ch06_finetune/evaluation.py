"""Deep dive: Is it better?.

Written from ch06_finetune/evaluation.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "PromptForm",
    "FORMS",
    "score_form",
    "right_answers",
    "scores_by_rule",
    "rotated",
    "record_formats",
    "ARTICLES",
    "normalize_answer",
    "exact_match",
    "contains_answer",
    "paired_bootstrap",
    "coverage",
    "questions_needed",
    "JUDGE_PROMPT",
    "model_judge",
    "server_judge",
    "STYLES",
    "STOCK",
    "record_judge",
    "main",
]

import argparse
import json
import math
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

from ch06_finetune.finetune import (
    MultipleChoice, answer_batch, bootstrap_interval, capital_questions, choice_log_probs, encode_chat, load_countries,
)
from ch06_finetune.previous_chapters import GPT, BPETokenizer
from utils.progress import progress
from utils.workspace import ROOT, write_text


@dataclass(frozen=True)
class PromptForm:
    """How a question is put to a model.

    ``template`` may hold {question}, {sentence} (the question as the beginning of its answer) and {listed} (the
    options behind labels). ``labels``: what the options are called; if the list is not empty the model chooses
    among the labels, else among the texts. ``examples``: so many answered questions stand before it. ``chat``:
    all of it as a conversation, the answer beginning with ``opening``. ``space`` stands before an option.
    """

    template: str
    labels: str = ""
    examples: int = 0
    chat: bool = False
    opening: str = ""
    space: str = " "

    def text(self, item: MultipleChoice, template: str | None = None) -> str:
        """The question as the model sees it."""
        sentence = re.sub(r"^What is t(.*)\?$", r"T\1 is", item.question)
        listed = "\n".join(f"{label}. {option}" for label, option in zip(self.labels or "ABCDEFGH", item.options,
                                                                        strict=False))
        return (self.template if template is None else template).format(
            question=item.question, sentence=sentence, listed=listed)

    def choices(self, item: MultipleChoice) -> list[str]:
        """What the model chooses among: the labels or the texts."""
        if self.labels and len(self.labels) < len(item.options):
            raise ValueError(f"There are {len(self.labels)} labels for {len(item.options)} options; give one each.")
        return list(self.labels[: len(item.options)] or item.options)

    def encode(self, tokenizer: BPETokenizer, item: MultipleChoice,
               pool: Sequence[MultipleChoice] = ()) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, and of each option after it; examples are the first of ``pool``.

        ``ValueError`` if the pool has too few, or holds the question itself.
        """
        shown = list(pool[: self.examples])
        if len(shown) < self.examples or item in shown:
            raise ValueError(f"The form shows {self.examples} examples and the pool has {len(pool)}; give that many, "
                             "and none that is asked.")
        answered = [(self.text(example), self.choices(example)[example.answer]) for example in shown]
        glue = self.space if not self.chat or self.opening else ""
        options = [tokenizer.encode(glue + choice, allow_special=False) for choice in self.choices(item)]
        if not self.chat:
            before = "".join(f"{text}{self.space}{answer}\n\n" for text, answer in answered)
            return tokenizer.encode(before + self.text(item), allow_special=False), options
        messages = []
        for text, answer in [*answered, (self.text(item), None)]:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        prompt, _ = encode_chat(tokenizer, messages[:-1], True)
        return prompt + tokenizer.encode(self.text(item, self.opening), allow_special=False), options


FORMS: dict[str, PromptForm] = {
    "bare question": PromptForm("{question}"),
    "Q: A:": PromptForm("Q: {question}\nA:"),
    "Question: Answer:": PromptForm("Question: {question}\nAnswer:"),
    "the same in capitals": PromptForm("QUESTION: {question}\nANSWER:"),
    "a space too many": PromptForm("Question: {question}\nAnswer: ", space=""),
    "a sentence to end": PromptForm("{sentence}"),
    "1 example": PromptForm("Question: {question}\nAnswer:", examples=1),
    "3 examples": PromptForm("Question: {question}\nAnswer:", examples=3),
    "chat": PromptForm("{question}", chat=True),
    "chat, answer begun": PromptForm("{question}", chat=True, opening="{sentence}"),
    "options listed, text": PromptForm("Question: {question}\n{listed}\nAnswer:"),
    "letters": PromptForm("Question: {question}\n{listed}\nAnswer:", labels="ABCD"),
    "numbers": PromptForm("Question: {question}\n{listed}\nAnswer:", labels="1234"),
    "letters, 1 example": PromptForm("Question: {question}\n{listed}\nAnswer:", labels="ABCD", examples=1),
    "letters, 3 examples": PromptForm("Question: {question}\n{listed}\nAnswer:", labels="ABCD", examples=3),
    "letters, chat": PromptForm("{question}\n{listed}\nReply with the letter of the right answer.", labels="ABCD",
                                chat=True),
}


def score_form(model: GPT, tokenizer: BPETokenizer, form: PromptForm, items: Sequence[MultipleChoice],
               pool: Sequence[MultipleChoice] = ()) -> Tensor:
    """Summed log-probabilities in nats of the options in a form: (questions, options), all with as many options."""
    encoded = [form.encode(tokenizer, item, pool) for item in items]
    return torch.stack(choice_log_probs(model, *zip(*encoded, strict=True)))


def right_answers(scores: Tensor, items: Sequence[MultipleChoice]) -> list[float]:
    """1.0 where the option with the largest score is the true one, else 0.0; scores (questions, options)."""
    if scores.shape != (len(items), len(items[0].options)):
        raise ValueError(f"The scores have the shape {tuple(scores.shape)}; for {len(items)} questions with "
                         f"{len(items[0].options)} options it must be ({len(items)}, {len(items[0].options)}).")
    return [float(chosen == item.answer) for chosen, item in zip(scores.argmax(dim=1).tolist(), items, strict=True)]


def scores_by_rule(model: GPT, tokenizer: BPETokenizer, sums: Tensor, items: Sequence[MultipleChoice],
                   no_question: str = "Answer:") -> dict[str, Tensor]:
    """Four ways to score options that were summed after " ": each (questions, options).

    The sum; per token; per byte (Gao 2021, as in the LM Evaluation Harness); and minus the log-probability after
    ``no_question`` alone (Holtzman et al. 2021, arXiv:2104.08315), which is the pointwise mutual information.
    """
    different = sorted({option for item in items for option in item.options})
    ids = {option: tokenizer.encode(f" {option}", allow_special=False) for option in different}
    (alone,) = choice_log_probs(model, [tokenizer.encode(no_question)], [list(ids.values())])
    alone_of = dict(zip(different, alone.tolist(), strict=True))

    def table(value: Callable[[str], float]) -> Tensor:
        return torch.tensor([[float(value(option)) for option in item.options] for item in items])

    return {"sum": sums, "per token": sums / table(lambda o: len(ids[o])),
            "per byte": sums / table(lambda o: len(o.encode())), "against no question": sums - table(alone_of.get)}


def rotated(item: MultipleChoice, by: int) -> MultipleChoice:
    """The same question with its options moved ``by`` places to the right, round the end."""
    n = len(item.options)
    return MultipleChoice(item.question, tuple(item.options[(i - by) % n] for i in range(n)), (item.answer + by) % n)


def record_formats(path: Path, n_questions: int = 100) -> None:
    """Every form of ``FORMS`` with SmolLM2 on the same questions, and its written answers; as JSON.

    Also the forms with letters in all four orders of the options, and three examples drawn three times.
    """
    began = time.perf_counter()
    model, tokenizer = GPT.from_pretrained("smollm2-135m").eval(), BPETokenizer.smollm2()
    questions = capital_questions(load_countries())
    items, pool = questions[:n_questions], questions[n_questions:]
    runs = {(name, 0, 0): (form, items, pool) for name, form in FORMS.items()}
    for name in ("letters", "letters, 3 examples"):
        runs |= {(name, by, 0): (FORMS[name], [rotated(item, by) for item in items], pool) for by in (1, 2, 3)}
    runs |= {("3 examples", 0, draw): (FORMS["3 examples"], items, pool[3 * draw :]) for draw in (1, 2)}
    rows = []
    for (name, by, draw), (form, asked, examples) in progress(runs.items(), "scoring", unit="form"):
        scores = score_form(model, tokenizer, form, asked, examples)
        rows.append({"form": name, "rotated": by, "draw": draw,
                     "scores": [[round(x, 3) for x in row] for row in scores.tolist()]})
    ids = [tokenizer.encode(f" {option}") for option in sorted({o for item in items for o in item.options})]
    (alone,) = choice_log_probs(model, [tokenizer.encode("Answer:")], [ids])
    written = answer_batch(model, tokenizer, [[{"role": "user", "content": item.question}] for item in items],
                           max_new_tokens=24, temperature=0.0, top_p=None)
    write_text(path, json.dumps({
        "command": f"python -m ch06_finetune.evaluation formats --questions {n_questions}",
        "model": "SmolLM2-135M-Instruct", "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began), "questions": [item.question for item in items],
        "no_question": [round(x, 3) for x in alone.tolist()], "written": written, "runs": rows}))


ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Small letters, no punctuation, no articles, single spaces. Rajpurkar et al. 2016 (SQuAD's marking)."""
    plain = re.sub(r"[^\w\s]", "", text.lower())
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, truths: Sequence[str]) -> bool:
    """Whether an answer equals one of the accepted ones after ``normalize_answer``; ValueError without any."""
    if isinstance(truths, str) or not truths:
        raise ValueError(f"The accepted answers are {truths!r}; give a list of at least 1.")
    return normalize_answer(answer) in {normalize_answer(truth) for truth in truths}


def contains_answer(answer: str, truths: Sequence[str]) -> bool:
    """Whether an accepted answer stands, as whole words, anywhere in the answer after ``normalize_answer``."""
    if isinstance(truths, str) or not truths:
        raise ValueError(f"The accepted answers are {truths!r}; give a list of at least 1.")
    return any(f" {normalize_answer(truth)} " in f" {normalize_answer(answer)} " for truth in truths)


def paired_bootstrap(first: Sequence[float], second: Sequence[float], n_resamples: int = 2000,
                     level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Mean of second minus first on the same questions, and the ends of its interval.

    ``ValueError`` for lists of different length, and as ``bootstrap_interval``.
    """
    if len(first) != len(second):
        raise ValueError(f"There are {len(first)} and {len(second)} results; a paired comparison needs both models' "
                         "results on the same questions, in the same order.")
    gains = [b - a for a, b in zip(first, second, strict=True)]
    low, high = bootstrap_interval(gains, n_resamples, level, seed)
    return sum(gains) / len(gains), low, high


def coverage(ends: Sequence[tuple[float, float]], truth: float) -> float:
    """How often an interval holds the true share, exactly: ``ends[k]`` belongs to k right out of n = len - 1."""
    if len(ends) < 2 or not 0 <= truth <= 1:
        raise ValueError(f"There are {len(ends)} intervals, and the true share is {truth}; give those of 0 to n right "
                         "with n of at least 1, and a share between 0 and 1.")
    right = torch.arange(len(ends), dtype=torch.float64)  # k; turned round it is n - k
    factorials = torch.lgamma(right + 1)  # their logarithms: the factorials themselves outgrow a float
    ways = factorials[-1] - factorials - factorials.flip(0)
    chances = torch.exp(ways + torch.xlogy(right, truth) + torch.special.xlog1py(right.flip(0), -truth))
    return sum(chance for chance, (low, high) in zip(chances.tolist(), ends, strict=True) if low <= truth <= high)


def questions_needed(difference: float, spread: float, power: float = 0.8, level: float = 0.95) -> int:
    """How many questions show a difference of means with probability ``power``, its interval leaving out 0.

    ``spread``: standard deviation of the quantity that is averaged, in the units of the difference; for two models on
    different questions, of the difference of one result each. ``ValueError`` for what is not above 0.
    """
    if difference == 0 or not spread > 0 or not 0 < power < 1 or not 0 < level < 1:
        raise ValueError(f"difference is {difference}, spread {spread}, power {power}, level {level}; the first must "
                         "not be 0, the second be above 0, and the others lie between 0 and 1.")
    z = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)
    return math.ceil((z * spread / difference) ** 2)


JUDGE_PROMPT = ("Question: {question}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
                "Which answer is better? Reply with the letter A or B only.")


def model_judge(model: GPT, tokenizer: BPETokenizer) -> Callable[[str, str, str], float]:
    """A judge for ``judge_pairs``: the model's probability of "A" against "B" as the better answer."""
    letters = [tokenizer.encode(letter) for letter in "AB"]

    def judge(question: str, a: str, b: str) -> float:
        text = JUDGE_PROMPT.format(question=question, a=a, b=b)
        prompt, _ = encode_chat(tokenizer, [{"role": "user", "content": text}], True)
        (scores,) = choice_log_probs(model, [prompt], [letters])
        return torch.softmax(scores, dim=0)[0].item()

    return judge


def server_judge(address: str, model: str = "smollm2-135m", key: str | None = None,
                 timeout: float = 60.0) -> Callable[[str, str, str], float]:
    """A judge behind an OpenAI-compatible address, such as the one that ``python3 course.py serve`` prints.

    The verdict is 1 if the reply names A, 0 if it names B. ``ConnectionError`` if nothing answers there,
    ``ValueError`` if the server refuses, or replies with neither letter or both.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def judge(question: str, a: str, b: str) -> float:
        text = JUDGE_PROMPT.format(question=question, a=a, b=b)
        body = {"model": model, "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": text}]}
        place = f"{address.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        request = urllib.request.Request(place, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                reply = json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{address} refused with status {error.code}: {error.read().decode()[:300]}") from error
        except OSError as error:
            raise ConnectionError(f"Nothing answers at {address} ({error}). Start a server, for instance with "
                                  "python3 course.py serve, and give the address that it prints.") from error
        letters = set(re.findall(r"\b[AB]\b", reply))
        if len(letters) != 1:
            raise ValueError(f"The judge replied {reply!r}, which names {len(letters)} of the letters A and B; it must "
                             "name one. A larger model follows the instruction more often.")
        return float(letters == {"A"})

    return judge


STYLES = {"brief": "Answer in one short sentence.", "wordy": "Explain at length, with as many details as you can."}
STOCK = " I hope that this answers your question. Please ask again if you would like to know more."


def record_judge(path: Path, n_questions: int = 32) -> None:
    """Answers of SmolLM2 in two styles, and what SmolLM2 as a judge says of them in both orders; as JSON.

    The third answerer is the brief one with a stock phrase behind each answer. Answers end after 64 tokens.
    """
    began = time.perf_counter()
    model, tokenizer = GPT.from_pretrained("smollm2-135m").eval(), BPETokenizer.smollm2()
    countries = random.Random(0).sample(load_countries(), n_questions)
    questions = [f"What is {country.name} known for?" for country in countries]
    answers = {style: [text for text, _ in answer_batch(
        model, tokenizer, [[{"role": "user", "content": question}] for question in questions], max_new_tokens=64,
        temperature=0.0, top_p=None, system_prompt=prompt)] for style, prompt in STYLES.items()}
    answers["padded"] = [text + STOCK for text in answers["brief"]]
    judge, said = model_judge(model, tokenizer), {}
    for style in ("wordy", "padded"):
        rows = zip(questions, answers[style], answers["brief"], strict=True)
        said[style] = [[round(judge(question, a, b), 4), round(judge(question, b, a), 4)]
                       for question, a, b in progress(list(rows), f"judging {style}", unit="pair")]
    write_text(path, json.dumps({
        "command": f"python -m ch06_finetune.evaluation judge --questions {n_questions}",
        "model": "SmolLM2-135M-Instruct", "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began), "questions": questions, "answers": answers, "said": said}))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: makes a record of this notebook again, on one thread, in a few minutes."""
    parser = argparse.ArgumentParser("python -m ch06_finetune.evaluation", description="Make a record again.")
    parser.add_argument("record", choices=["formats", "judge"])
    parser.add_argument("--questions", type=int, help="how many (formats: 100, judge: 32)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    make, usual = {"formats": (record_formats, 100), "judge": (record_judge, 32)}[chosen.record]
    make(ROOT / "ch06_finetune" / "records" / f"evaluation_{chosen.record}.json", chosen.questions or usual)


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    main()
