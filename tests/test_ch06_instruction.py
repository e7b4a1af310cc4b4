"""Chapter 6, instruction tuning: graders, tasks split by content, packing without cross-talk, the tuned adapter."""

import copy
import dataclasses
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ch06_finetune.instruction as module
from ch02_tokenizer.tokenizer import BPETokenizer
from ch04_gpt.gpt import GPT, PRESETS
from ch06_finetune.finetune import (
    Country,
    add_lora,
    encode_chat,
    load_adapter,
    load_countries,
    lora_layers,
    pad_right,
    sft_loss,
)
from ch06_finetune.instruction import (
    ADAPTER,
    CATEGORIES,
    RECORD,
    WORDINGS,
    Packed,
    Task,
    TaskSet,
    TuneSettings,
    answer_tasks,
    attention_mask,
    course_words,
    fact_tasks,
    held_out,
    invented_countries,
    marks,
    number_tasks,
    pack,
    packed_batches,
    packed_loss,
    packed_states,
    plain,
    record_tuning,
    rewriting_tasks,
    same,
    same_letters,
    same_text_mask,
    stands_in,
    task_set,
    tasks_checksum,
    tune,
    word_tasks,
)

TINY = dataclasses.replace(PRESETS["storyteller"], vocab_size=100, context_length=64, d_model=32, n_layers=2, n_heads=4,
                           n_kv_heads=2, d_ff=48, head_dim=None)


@pytest.fixture(scope="module")
def tasks():
    try:
        return task_set()
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(TINY).eval()


def conversations(n=12, seed=0, longest=20):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        length = int(torch.randint(6, longest + 1, (), generator=generator))
        found.append((torch.randint(1, 100, (length,), generator=generator).tolist(), [0] * (length - 4) + [1] * 4))
    return found


# --- graders


@pytest.mark.parametrize(("answer", "right", "strict", "lenient"), [
    ("42", "42", True, True), (" 42.\n", "42", True, True), ("**42**", "42", True, True), ('"42"', "42", True, True),
    ("The answer is 42.", "42", False, True), ("42 or 43", "42", False, True), ("142", "42", False, False),
    ("42.5", "42", False, True), ("4 2", "42", False, False), ("", "42", False, False),
    ("paris", "Paris", True, True), ("Paris, of course", "Paris", False, True), ("Parisian", "Paris", False, False),
    ("S-E-A", "s-e-a", True, True), ("It is s-e-a.", "s-e-a", False, True), ("s-e-a-l", "s-e-a", False, False),
    ("a s-e-a b", "a", False, True), ("s-e-a", "a", False, False),
    ('["one",  "two"]', '["one", "two"]', True, True), ("Côte", "Co\u0302te", True, True),
])
def test_strict_and_lenient_graders(answer, right, strict, lenient):
    assert (same(answer, right), stands_in(answer, right)) == (strict, lenient)


def test_capital_letters_count_only_where_they_are_the_task():
    assert same("sea bird", "SEA BIRD") and not same_letters("sea bird", "SEA BIRD")
    assert same_letters(" SEA  BIRD. ", "SEA BIRD")
    assert plain(plain(' *"Oslo". ')) == plain(' *"Oslo". ') == "Oslo"


# --- tasks


def test_answers_follow_their_rules():
    source = random.Random(0)
    words = ["river", "stone", "thumb", "afford"]
    for category, rule in (("spelling", lambda w: "-".join(w)), ("reversing", lambda w: "".join(reversed(w))),
                           ("counting", lambda w: str(sum(1 for _ in w)))):
        for word, task in zip(words, word_tasks(words, category, [0, 1, 2, 3], source), strict=True):
            assert f'"{word}"' in task.question and task.answer == rule(word) and task.passed(f" {task.answer}. ")
    for task in number_tasks(200, False, [0, 1, 2, 3], source):
        numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in task.question).split()]
        if any(mark in task.question for mark in ("+", "Add", "plus")):
            assert int(task.answer) == sum(numbers)
        elif task.question.startswith("Take"):
            assert int(task.answer) == numbers[1] - numbers[0]
        else:
            assert int(task.answer) == numbers[0] - numbers[1]
        assert not held_out(task.content[0])
    asked = Counter(task.question for task in number_tasks(400, False, [0], source, largest=20))
    assert {question for question, n in asked.items() if n > 1} <= {
        text for a in range(2, 21) for text in (f"What is {a} + {a}?", f"What is {a + a} - {a}?")}
    for task in rewriting_tasks(words, 30, [0, 1, 2, 3], source):
        three = task.question.split(": ")[1].split()
        assert task.answer in (" ".join(three).upper(), " ".join(sorted(three)), json.dumps(three))


def test_the_kept_wording_is_the_last_and_never_trained(tasks):
    assert all(len(set(four)) == 4 for four in WORDINGS.values())
    assert {task.wording for task in tasks.train} == {0, 1, 2}
    assert {task.wording for task in tasks.exams["held out"]} == {0, 1, 2, 3}


def test_no_content_is_asked_that_was_trained(tasks):
    trained = {part for task in tasks.train for part in task.content}
    for name in ("held out", "untold inventions"):
        assert not trained & {part for task in tasks.exams[name] for part in task.content}
    # and by hand, from the questions alone
    words = {word[:4] for task in tasks.train if '"' in task.question for word in [task.question.split('"')[1]]}
    asked = [task.question.split('"')[1] for task in tasks.exams["held out"] if '"' in task.question]
    assert len(asked) == 300 and not {word[:4] for word in asked} & words
    assert not {word[::-1] for word in asked} & set(asked)

    def triple(task):  # a + b = c, however it is asked
        numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in task.question).split()]
        return tuple(sorted({*numbers, int(task.answer)}))

    sums = {triple(task) for task in tasks.train if task.category == "arithmetic"}
    assert not sums & {triple(task) for task in tasks.exams["held out"] if task.category == "arithmetic"}
    names = {country.name for country in load_countries() if not held_out(country.name, 0.25)}
    facts = [task for task in tasks.exams["held out"] if task.category == "facts"]
    assert len(facts) == 100 and all(task.content[0] not in names for task in facts)


def test_the_set_is_large_balanced_and_the_same_each_time(tasks):
    assert len(tasks.train) > 6_000 and len({task.question for task in tasks.train}) > 5_000
    for category in CATEGORIES:
        assert sum(task.category == category for task in tasks.train) >= 1_000
        assert sum(task.category == category for task in tasks.exams["held out"]) == 100
    assert task_set() == tasks and task_set(seed=1) != tasks
    assert {task.category for task in tasks.train} == set(CATEGORIES)


def test_words_are_words_of_the_tales(tasks):
    train, examined = course_words()
    assert not set(train) & set(examined) and all(4 <= len(word) <= 8 and word.islower() for word in train + examined)
    assert not {word[:4] for word in train} & {word[:4] for word in examined}
    everything = set(train) | set(examined)
    assert not any(word[::-1] in everything for word in everything)


def test_invented_countries_are_many_and_none_is_real():
    found = invented_countries(40)
    assert len({country.name for country in found}) == 40 and found == invented_countries(40)
    assert not {country.name for country in found} & {country.name for country in load_countries()}
    asked = fact_tasks([Country("Zukania", "Dotaton", "the Moon")], [3])
    assert [(task.question, task.answer) for task in asked] == [
        ("Which city is Zukania's capital?", "Dotaton"),
        ("To which part of the world does Zukania belong?", "the Moon")]


def test_bad_tasks_are_refused(tasks):
    with pytest.raises(ValueError, match="'cooking'.*spelling"):
        Task("cooking", "How long?", "7", ("egg",))
    with pytest.raises(ValueError, match="empty"):
        Task("facts", "What?", " . ", ("x",))
    with pytest.raises(ValueError, match="'facts'.*spelling"):
        word_tasks(["sea"], "facts", [0], None)
    with pytest.raises(ValueError, match="0 tasks"):
        TaskSet([], {})
    with pytest.raises(ValueError, match="'held out'.*contents of the training set"):
        TaskSet(tasks.train[:5], {"held out": tasks.train[:1]})


def test_marks_count_strictly_and_leniently():
    asked = [Task("arithmetic", "2 + 2 =", "4", ("2 2",)), Task("arithmetic", "2 + 3 =", "5", ("2 3",)),
             Task("rewriting", "In capitals: sea", "SEA", ("sea",), 0, same_letters)]
    assert marks(asked, ["It is 4.", "5", "sea"]) == {"arithmetic": {"tasks": 2, "right": 1, "in it": 2},
                                                      "rewriting": {"tasks": 1, "right": 0, "in it": 1}}
    with pytest.raises(ValueError):
        marks(asked, ["4"])


# --- packing


def test_packing_keeps_every_token_and_mask():
    encoded = conversations(30)
    packed = pack(encoded, 40, padding_id=77)
    found = []
    for ids, mask, texts in zip(packed.token_ids, packed.loss_mask, packed.texts, strict=True):
        assert (ids[texts == 0] == 77).all() and not mask[texts == 0].any()
        assert (texts[texts > 0].diff() >= 0).all()
        for number in range(1, int(texts.max()) + 1):
            found.append((ids[texts == number].tolist(), mask[texts == number].int().tolist()))
    assert sorted(found) == sorted(encoded)
    assert packed.filling == pytest.approx(1 - sum(len(ids) for ids, _ in encoded) / packed.texts.numel())
    assert packed.filling < 0.25 < 1 - sum(len(ids) for ids, _ in encoded) / (20 * 30)


def test_a_first_token_never_counts():
    packed = pack([([1, 2, 3], [1, 1, 1]), ([4, 5, 6], [1, 0, 1])], 8)
    assert packed.loss_mask.tolist() == [[False, True, True, False, False, True, False, False]]


def test_each_place_sees_its_own_conversation_up_to_itself():
    mask = same_text_mask(torch.tensor([[1, 1, 2, 2, 2, 0, 0]]))[0, 0]
    expected = torch.block_diag(*(torch.ones(n, n) for n in (2, 3, 2))).tril().bool()
    assert torch.equal(mask, expected) and mask.diagonal().all()


def test_no_conversation_hears_another(model):
    first, other, second = (ids for ids, _ in conversations(3, seed=1, longest=6))
    rows = torch.tensor([first + second, other + second])
    texts = torch.tensor([[1] * 6 + [2] * len(second)] * 2)
    with torch.no_grad():
        apart, alone = packed_states(model, rows, texts)[:, 6:], model.hidden_states(torch.tensor([second]))[0]
        causal = model.hidden_states(rows)[:, 6:]
    assert torch.equal(apart[0], apart[1])  # exactly zero
    torch.testing.assert_close(apart[0], alone, atol=1e-5, rtol=1e-5)
    assert (causal[0] - causal[1]).abs().max() > 0.05


def test_packed_and_padded_have_one_loss_and_one_gradient(model):
    encoded = conversations(12)
    ids, _ = pad_right([ids for ids, _ in encoded], 0)
    counts, _ = pad_right([mask for _, mask in encoded], 0)
    padded = sft_loss(model(ids[:, :-1]), ids[:, 1:], counts[:, 1:])
    packed = packed_loss(model, pack(encoded, 40))
    torch.testing.assert_close(packed, padded)
    for one, two in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (packed, padded)),
                        strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_packing_again_in_another_order_changes_nothing(model):
    encoded = conversations(12)
    with torch.no_grad():
        losses = [packed_loss(model, pack(order, width)) for order, width in ((encoded, 24), (encoded[::-1], 60))]
    torch.testing.assert_close(*losses)


def test_the_model_is_as_before_even_after_an_error(model):
    row = torch.randint(0, 100, (1, 12))
    with torch.no_grad():
        before = model(row)
        with pytest.raises(RuntimeError), attention_mask(model, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()):
            model(row)
        assert torch.equal(model(row), before)
        with pytest.raises(ValueError, match="cache"), attention_mask(model, same_text_mask(torch.ones(1, 12))):
            model(row, model.new_cache())


def test_bad_packs_are_refused(model):
    with pytest.raises(ValueError, match="0 conversations"):
        pack([], 10)
    with pytest.raises(ValueError, match="Conversation 1 has 11 tokens.*1 to 10"):
        pack([([1, 2], [0, 1]), ([1] * 11, [1] * 11)], 10)
    with pytest.raises(ValueError, match="Conversation 0 has 0 tokens"):
        pack([([], [])], 10)
    with pytest.raises(ValueError, match="Conversation 0 .*mask of 1"):
        pack([([1, 2], [1])], 10)
    with pytest.raises(ValueError, match="no token that counts"):
        pack([([1, 2, 3], [0, 0, 0])], 10)
    masked = Packed(torch.ones(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8))
    with pytest.raises(ValueError, match="0 at all 7 targets"):
        packed_loss(model, masked)
    with pytest.raises(ValueError, match="context length 64"):
        packed_loss(model, pack([([1] * 70, [1] * 70)], 80))
    for change in ({"position": "learned"}, {"window": 8}):
        with pytest.raises(ValueError, match="rotary"):
            packed_states(GPT(dataclasses.replace(TINY, **change)), torch.ones(1, 4).long(), torch.ones(1, 4))


# --- tuning


def test_every_epoch_packs_every_conversation_once():
    encoded, settings = conversations(30), TuneSettings(steps=9, rows=2, width=40)
    batches = list(packed_batches(encoded, settings))
    assert len(batches) == 9 and all(batch.texts.shape[1] == 40 for batch in batches)
    rows = len(pack(encoded, 40).texts)
    seen, places = [], 0
    for batch in batches:  # the first epoch ends with its last, perhaps shorter batch
        for ids, texts in zip(batch.token_ids, batch.texts, strict=True):
            seen += [ids[texts == k].tolist() for k in range(1, int(texts.max()) + 1)]
        places += len(batch.texts)
        if len(seen) == 30:
            break
    assert sorted(seen) == sorted(ids for ids, _ in encoded) and abs(places - rows) <= 2
    assert [b.token_ids.tolist() for b in batches] == [
        b.token_ids.tolist() for b in packed_batches(encoded, settings)]


def test_tuning_learns_and_moves_the_adapter_only(model):
    add_lora(model, 4, 8.0, ("w_qkv", "w_up", "w_down"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    encoded = conversations(4)
    log = tune(model, list(packed_batches(encoded, TuneSettings(steps=60, rows=2, width=40))), 1e-2)
    assert len(log["loss"]) == 60 and sum(log["loss"][-5:]) < 0.9 * sum(log["loss"][:5])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(("lora_a", "lora_b"))} and not model.training


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(model, tmp_path):
    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 33:
            raise Stop

    add_lora(model, 2, 4.0, "w_qkv")
    batches = list(packed_batches(conversations(6), TuneSettings(steps=40, rows=2, width=40)))
    whole, halves, again = (copy.deepcopy(model) for _ in range(3))
    expected = tune(whole, batches, 1e-3)
    with pytest.raises(Stop):
        tune(halves, batches, 1e-3, tmp_path / "progress.safetensors", stop)
    heard = []
    log = tune(again, batches, 1e-3, tmp_path / "progress.safetensors", lambda step, loss: heard.append(step))
    assert heard == list(range(26, 41)) and log["loss"] == expected["loss"] and len(log["seconds"]) == 40
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_stopped_run_goes_on_where_its_weights_are(model, tmp_path):
    add_lora(model, 2, 4.0, "w_qkv")
    tune(model, [pack(conversations(2), 40)], 1e-3, tmp_path / "progress.safetensors")
    learned = {name: p for name, p in model.to("meta").named_parameters() if p.requires_grad}  # as an accelerator
    optimizer = module.AdamW(learned.values(), lr=1e-3)
    module._read_progress(tmp_path / "progress.safetensors", learned, optimizer)
    assert {state[kind].device.type for state in optimizer.state.values() for kind in ("mean", "square")} == {"meta"}


def test_tuning_refuses_bad_settings_and_stops_at_nonsense(model):
    for bad in ({"steps": 0}, {"rows": 0}, {"width": 1}, {"max_lr": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            TuneSettings(**bad)
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        tune(model, [pack(conversations(2), 40)], 1e-3)


# --- examination


class Echo(nn.Module):
    """Continues any text with 7, 8 and then the stop id 9; shorter prompts must not change that."""

    config = dataclasses.replace(TINY, context_length=64)
    device = torch.device("cpu")

    def new_cache(self, padding=None):
        return [SimpleNamespace(length=0, padding=padding)]

    def hidden_states(self, ids, cache=None):
        step = {7: 8, 8: 9}
        answer = torch.tensor([step.get(int(row[-1]), 7) for row in ids])
        return nn.functional.one_hot(answer, 100).float()[:, None]

    def lm_head(self, states):
        return states


class Letters:
    """A tokenizer of one letter a token."""

    special_tokens = {"<|im_start|>": 9, "<|im_end|>": 9}

    def encode(self, text, allow_special=False):
        return [10 + ord(c) % 80 for c in text]

    def decode(self, ids):
        return "".join(map(str, ids))


def test_an_examination_gives_each_task_its_own_answer_up_to_the_stop():
    asked = [Task("facts", "?" * n, "78", (str(n),)) for n in (3, 11, 5, 7, 2)]
    assert answer_tasks(Echo(), Letters(), asked, max_new_tokens=6, batch_size=2) == ["78"] * 5
    assert answer_tasks(Echo(), Letters(), asked, max_new_tokens=1, batch_size=2) == ["7"] * 5
    with pytest.raises(ValueError, match="0 tasks"):
        answer_tasks(Echo(), Letters(), [])


# --- the committed run


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_record_is_about_these_tasks_and_its_marks_are_right(tasks, record):
    assert record["fingerprint"] == tasks_checksum(tasks.train) and len(record["loss"]) == record["settings"]["steps"]
    for name, exam in tasks.exams.items():
        kept = record["exams"][name]
        assert kept["tasks"] == [[task.category, task.question, task.answer, task.wording] for task in exam]
        for when in ("before", "after"):
            assert kept["marks"][when] == marks(exam, kept[when])


def test_tuning_helped(record):
    total = {when: sum(mark["right"] for mark in record["exams"]["held out"]["marks"][when].values())
             for when in ("before", "after")}
    assert total["after"] > 2 * total["before"]
    assert record["exams"]["untold inventions"]["marks"]["after"]["facts"]["right"] == 0  # nobody can know these


def test_the_adapter_on_smollm2_answers_as_recorded(tasks, record):
    try:
        model, tokenizer = GPT.from_pretrained("smollm2-135m").eval(), BPETokenizer.smollm2()
    except ConnectionError as error:
        pytest.skip(str(error))
    load_adapter(model, ADAPTER)
    assert lora_layers(model) and sum(p.stat().st_size for p in ADAPTER.iterdir()) < 3.5e6
    exam = tasks.exams["held out"][::100]
    heard = answer_tasks(model, tokenizer, exam, max_new_tokens=20)
    recorded = record["exams"]["held out"]["after"][::100]
    assert sum(a == b for a, b in zip(heard, recorded, strict=True)) >= 4  # float32 here, bfloat16 there
    ids, mask = encode_chat(tokenizer, exam[0].messages, system_prompt=None)
    assert tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts][:-1]) == exam[0].answer


@pytest.fixture
def base(monkeypatch):
    """A random model that takes the place of SmolLM2."""
    torch.manual_seed(0)
    base = GPT(dataclasses.replace(PRESETS["storyteller"], vocab_size=49_152, context_length=128, d_model=16,
                                   n_layers=1, n_heads=2, n_kv_heads=2, d_ff=16, head_dim=None))
    monkeypatch.setattr(module.GPT, "from_pretrained", lambda name: copy.deepcopy(base))
    try:
        BPETokenizer.smollm2()
    except ConnectionError as error:
        pytest.skip(str(error))
    return base


def test_a_whole_small_run_writes_adapter_and_record(base, tasks, tmp_path, monkeypatch):
    few = TaskSet(tasks.train[:8], {"held out": tasks.exams["held out"][::60]})
    monkeypatch.setattr(module, "task_set", lambda: few)
    settings = TuneSettings(steps=3, rows=1, width=64, rank=2)
    for _ in range(2):  # the second time everything is there already
        record_tuning(settings, torch.float32, tmp_path / "run", tmp_path / "adapter", tmp_path / "record.json")
    written = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert len(written["loss"]) == 3 and len(written["exams"]["held out"]["after"]) == 10
    load_adapter(base, tmp_path / "adapter")


def test_a_task_that_was_edited_begins_another_run(base, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "workspace", tmp_path.joinpath)
    monkeypatch.setattr(module, "answer_tasks", lambda model, tokenizer, exam, **_: [task.question for task in exam])
    few = TaskSet(tasks.train[:8], {"held out": tasks.exams["held out"][::100]})
    edited = [dataclasses.replace(task, question=f"Please: {task.question}") for task in few.exams["held out"]]
    others = TaskSet([dataclasses.replace(few.train[0], question="What is it?"), *few.train[1:]], few.exams)
    losses = []
    for given in (few, others, TaskSet(few.train, {"held out": edited})):
        monkeypatch.setattr(module, "task_set", lambda given=given: given)
        record_tuning(TuneSettings(steps=2, rows=1, width=64, rank=2), torch.float32, None, tmp_path / "adapter",
                      tmp_path / "record.json")
        written = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
        exam = written["exams"]["held out"]
        assert exam["before"] == exam["after"] == [task.question for task in given.exams["held out"]]
        losses.append(written["loss"])
    assert losses[0] == losses[2] != losses[1]
