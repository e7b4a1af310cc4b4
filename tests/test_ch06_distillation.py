"""Chapter 6, distillation: the losses, the cut vocabulary, folding, the transplant, the notes, and the lessons."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ch02_tokenizer.tokenizer import END_OF_TEXT, SMOLLM2_PATTERN, BPETokenizer
from ch04_gpt.gpt import GPT, PRESETS
from ch06_finetune.distillation import (
    LESSONS,
    METHODS,
    RECORD_OF_LESSONS,
    TeacherNotes,
    cut_tokenizer,
    cut_windows,
    distillation_loss,
    first_pieces,
    fold,
    lesson_loss,
    listen,
    load_notes,
    lump_rest,
    mean_entropy,
    new_pupil,
    notes_fingerprint,
    pupil_bits,
    record_lessons,
    save_notes,
    take_notes,
    teach,
    transplant,
    write_samples,
)

TEXT = ("the little tin soldier stood on the little table, and the little dancer stood there too. the wind blew the "
        "window open, and the tin soldier fell from the third storey to the street. ") * 3
RARE = "xylophones quizzically jumbled zephyrs; xylophones quizzically jumbled zephyrs; "


def tiny_gpt(vocab_size, seed=0, **changes):
    torch.manual_seed(seed)
    small = {"context_length": 32, "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": None, "d_ff": 32}
    config = dataclasses.replace(PRESETS["storyteller"], vocab_size=vocab_size, **(small | changes))
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)  # far from uniform
    return model


@pytest.fixture(scope="module")
def whole():
    return BPETokenizer.train(TEXT + RARE, 350, [END_OF_TEXT, "<|im_start|>"], SMOLLM2_PATTERN)


@pytest.fixture(scope="module")
def cut(whole):
    return cut_tokenizer(whole, whole.encode(TEXT), 290)


@pytest.fixture(scope="module")
def notes(whole, cut):
    tokenizer, old_ids = cut
    windows = cut_windows(torch.tensor(tokenizer.encode(TEXT * 2)), 8 * 16, 16)
    return take_notes(tiny_gpt(whole.vocab_size), windows, old_ids, first_pieces(whole, tokenizer), k=8)


# --- the loss ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_loss_is_torchs_kl_div(direction, temperature):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    p, q = (torch.log_softmax(x / temperature, -1).flatten(0, 1) for x in (teacher, student))
    first, second = (p, q) if direction == "forward" else (q, p)
    expected = F.kl_div(second, first, reduction="batchmean", log_target=True) * temperature**2
    found = distillation_loss(student, teacher, temperature=temperature, direction=direction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradient_by_hand(direction):
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(1, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    teacher.requires_grad_()
    loss = distillation_loss(student, teacher, direction=direction)
    loss.backward()
    q, p = torch.softmax(student.detach(), -1), torch.softmax(teacher.detach(), -1)
    by_hand = q - p if direction == "forward" else q * ((q / p).log() - (q * (q / p).log()).sum())
    torch.testing.assert_close(student.grad, by_hand, atol=1e-6, rtol=1e-5)
    assert teacher.grad is None


def test_gradient_hardly_depends_on_a_high_temperature():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(1, 20, generator=generator) for _ in range(2))
    sizes = []
    for temperature in (50.0, 100.0):
        logits = student.clone().requires_grad_()
        distillation_loss(logits, teacher, temperature=temperature).backward()
        sizes.append(logits.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    z, v = (x - x.mean() for x in (student, teacher))
    assert sizes[1] == pytest.approx(((z - v) / 20).norm().item(), rel=0.05)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-20, 20), min_size=6, max_size=6), st.lists(st.floats(-20, 20), min_size=6, max_size=6))
def test_loss_is_zero_only_for_equal_distributions_and_never_negative(a, b):
    a, b = torch.tensor([a]), torch.tensor([b])
    for direction in ("forward", "reverse"):
        assert distillation_loss(a, b, direction=direction) >= -1e-5
        assert distillation_loss(a, a + 3, direction=direction).abs() < 1e-5


def test_a_hard_target_makes_the_forward_loss_the_cross_entropy():
    logits, target = torch.randn(4, 9, generator=torch.Generator().manual_seed(4)), torch.tensor([1, 0, 8, 3])
    teacher = torch.where(F.one_hot(target, 9).bool(), 0.0, -200.0)
    torch.testing.assert_close(distillation_loss(logits, teacher), F.cross_entropy(logits, target))


@pytest.mark.parametrize(("arguments", "words"), [
    ((torch.zeros(2, 5), torch.zeros(2, 6)), ["(2, 5)", "(2, 6)", "same vocabulary"]),
    ((torch.zeros(2, 5), torch.zeros(5)), ["(2, 5)", "(5,)"]),
    ((torch.zeros(5), torch.tensor([0.0, math.nan, 0, 0, math.inf])), ["2 of 5", "finite"]),
])
def test_loss_refuses_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError) as error:
        distillation_loss(*arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_loss_refuses_temperatures(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}; it must be above 0"):
        distillation_loss(torch.zeros(3), torch.zeros(3), temperature=temperature)


def test_loss_refuses_another_direction():
    with pytest.raises(ValueError, match="'sideways'; it must be 'forward' or 'reverse'"):
        distillation_loss(torch.zeros(3), torch.zeros(3), direction="sideways")


# --- two vocabularies ----------------------------------------------------------------------------------------------

def test_the_cut_has_its_size_all_bytes_and_whole_families(whole, cut):
    tokenizer, old_ids = cut
    assert tokenizer.vocab_size == 290 == len(old_ids) == len(set(old_ids.tolist()))
    assert all(tokenizer.vocab[new] == whole.vocab[old] for new, old in enumerate(old_ids.tolist()))
    tokens = set(tokenizer.vocab.values())
    assert {bytes([byte]) for byte in range(256)} <= tokens
    made = {a + b for a, b in tokenizer.merges}
    assert all(len(token) == 1 or token == END_OF_TEXT.encode() or token in made for token in tokens)


@settings(deadline=None, max_examples=60)
@given(words=st.lists(st.sampled_from(sorted(set((TEXT + RARE).split()))), min_size=1, max_size=12))
def test_a_text_survives_the_cut_and_words_that_stay_keep_their_tokens(whole, cut, words):
    tokenizer, old_ids = cut
    text, kept = " ".join(words), set(old_ids.tolist())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in words:
        before = whole.encode(" " + word)
        after = old_ids[tokenizer.encode(" " + word)].tolist()
        if set(before) <= kept:
            assert after == before
        else:
            assert len(after) > len(before)


def test_the_most_frequent_tokens_stay(whole, cut):
    kept = set(cut[1].tolist())
    assert whole.encode(" little")[0] in kept
    assert not set(whole.encode(" xylophones")) <= kept


@pytest.mark.parametrize("size", [10, 257, 5000])
def test_cut_refuses_sizes(whole, size):
    with pytest.raises(ValueError, match=f"size is {size}; it must be above 257"):
        cut_tokenizer(whole, whole.encode(TEXT), size)


def test_cut_refuses_a_text_with_too_few_tokens(whole):
    with pytest.raises(ValueError, match="uses only .* size is 349: give more text"):
        cut_tokenizer(whole, whole.encode("the wind"), 349)


def test_first_pieces_are_what_the_cut_tokenizer_writes_first(whole, cut):
    tokenizer, old_ids = cut
    landing = first_pieces(whole, tokenizer)
    assert len(landing) == whole.vocab_size
    assert torch.equal(landing[old_ids], torch.arange(290))
    for i, token in whole.vocab.items():
        if i not in whole.special_tokens.values() and all(byte < 128 for byte in token):
            assert landing[i] == tokenizer.encode_ordinary(token.decode())[0], token
    end = tokenizer.special_tokens[END_OF_TEXT]
    assert landing[whole.special_tokens["<|im_start|>"]] == landing[whole.special_tokens[END_OF_TEXT]] == end


def test_fold_by_a_loop_and_nothing_is_lost():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(5))
    landing = torch.tensor([0, 1, 2, 3, 0, 0, 2])
    expected = torch.zeros(2, 3, 4)
    for i, place in enumerate(landing.tolist()):
        expected[..., place] += torch.softmax(logits, -1)[..., i]
    found = fold(logits, landing, 4).exp()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
    assert fold(logits[0, 0], landing, 4).shape == (4,)


def test_fold_stays_finite_and_refuses_other_sizes():
    assert torch.isfinite(fold(torch.tensor([[0.0, -500.0, 900.0]]), torch.tensor([0, 1, 2]), 3)).all()
    with pytest.raises(ValueError, match="3 logits and 2 places"):
        fold(torch.zeros(1, 3), torch.tensor([0, 1]), 2)


def test_transplant_keeps_blocks_and_averages_pieces(whole, cut):
    words = BPETokenizer.train(TEXT, 280, [END_OF_TEXT])
    model = tiny_gpt(words.vocab_size)
    grown = transplant(model, words, cut[0])
    assert grown.config.vocab_size == 290 and grown.lm_head.weight is grown.token_embedding.weight
    for name, parameter in model.blocks.named_parameters():
        assert torch.equal(parameter, dict(grown.blocks.named_parameters())[name])
    old, new = model.token_embedding.weight, grown.token_embedding.weight
    i = cut[0].encode(" soldier")[0]
    torch.testing.assert_close(new[i], old[words.encode_ordinary(cut[0].decode([i]))].mean(0))
    assert torch.equal(new[cut[0].special_tokens[END_OF_TEXT]], old[words.special_tokens[END_OF_TEXT]])


def test_transplant_to_the_same_vocabulary_changes_nothing(whole):
    model = tiny_gpt(whole.vocab_size)
    ids = torch.tensor([whole.encode("the little tin soldier")])
    torch.testing.assert_close(transplant(model, whole, whole)(ids), model(ids))


def test_transplant_refuses_untied_embeddings(whole):
    with pytest.raises(ValueError, match="tie_embeddings is False"):
        transplant(tiny_gpt(whole.vocab_size, tie_embeddings=False), whole, whole)


# --- notes ---------------------------------------------------------------------------------------------------------

def test_lump_by_hand_with_gradient():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(6)).requires_grad_()
    log_probs, top_ids = torch.log_softmax(logits, -1), torch.tensor([[0, 5], [2, 1], [3, 4]])
    found = lump_rest(log_probs, top_ids)
    p = log_probs.exp()
    expected = torch.stack([torch.stack([p[i, a], p[i, b], p[i].sum() - p[i, a] - p[i, b]])
                            for i, (a, b) in enumerate(top_ids.tolist())])
    torch.testing.assert_close(found.exp(), expected)
    found[:, 2].sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 8), scale=st.floats(0.1, 10))
def test_a_lump_never_makes_the_divergence_larger(seed, k, scale):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.log_softmax(scale * torch.randn(1, 9, generator=generator), -1) for _ in range(2))
    top = p.topk(k).indices
    for direction in ("forward", "reverse"):
        lumped = distillation_loss(lump_rest(q, top), lump_rest(p, top), direction=direction)
        assert -1e-5 <= lumped <= distillation_loss(q, p, direction=direction) + 1e-4
        if k == 8:  # a lump of one loses nothing
            torch.testing.assert_close(lumped, distillation_loss(q, p, direction=direction), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("k", [6, 0])
def test_lump_refuses_k(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to 5"):
        lump_rest(torch.zeros(2, 6), torch.zeros(2, k, dtype=torch.int64))


def test_notes_say_what_the_teacher_said(whole, cut, notes):
    tokenizer, old_ids = cut
    teacher = tiny_gpt(whole.vocab_size)
    with torch.no_grad():
        heard = fold(teacher(old_ids[notes.windows[:, :-1]]), first_pieces(whole, tokenizer), 290)
    assert notes.top_ids.shape == (8, 16, 8) and notes.log_probs.shape == (8, 16, 9)
    torch.testing.assert_close(notes.log_probs.float(), lump_rest(heard, heard.topk(8).indices), atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(notes.log_probs.float().exp().sum(-1), torch.ones(8, 16), atol=5e-3, rtol=0)


@pytest.mark.parametrize("k", [0, 290, 291])
def test_notes_refuse_k(whole, cut, k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to 289"):
        take_notes(tiny_gpt(whole.vocab_size), torch.zeros(1, 5, dtype=torch.int64), cut[1], torch.zeros(350), k)


def test_notes_refuse_a_teacher_that_is_not_finite(whole, cut):
    teacher = tiny_gpt(whole.vocab_size)
    with torch.no_grad():
        teacher.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite from window 0"):
        take_notes(teacher, torch.zeros(1, 5, dtype=torch.int64), cut[1], first_pieces(whole, cut[0]), 4)


def test_windows_overlap_by_one_token():
    assert cut_windows(torch.arange(10), 9, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    for n in (2, 10):
        with pytest.raises(ValueError, match=f"n_tokens is {n}; it must be from 3, one window, to 9"):
            cut_windows(torch.arange(10), n, 3)


def test_notes_come_back_from_the_disk_and_stale_ones_are_refused(tmp_path, cut, notes):
    path, tokenizer_ids = tmp_path / "notes.safetensors", cut[1]
    right = notes_fingerprint(notes.windows, tokenizer_ids, 8, "tiny")
    save_notes(notes, path, right)
    found = load_notes(path, right)
    for field in dataclasses.fields(TeacherNotes):
        assert torch.equal(getattr(found, field.name), getattr(notes, field.name))
    others = [notes_fingerprint(notes.windows + 1, tokenizer_ids, 8, "tiny"),
              notes_fingerprint(notes.windows, tokenizer_ids + 1, 8, "tiny"),
              notes_fingerprint(notes.windows, tokenizer_ids, 9, "tiny"),
              notes_fingerprint(notes.windows, tokenizer_ids, 8, "another")]
    assert len({right, *others}) == 5
    for other in others:
        with pytest.raises(ValueError, match=f"{right[:12]}, and {other[:12]} is needed.*Delete the file"):
            load_notes(path, other)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        load_notes(path, right)


def test_the_first_notes(notes):
    assert len(notes.first(40).windows) == 2
    for n in (10, 1000):
        with pytest.raises(ValueError, match=f"{n} tokens are"):
            notes.first(n)


# --- lessons -------------------------------------------------------------------------------------------------------

def test_each_method_has_its_gradient(notes):
    logits = torch.randn(8, 16, 290, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    targets, p = notes.windows[:, 1:], notes.log_probs.double().exp()
    gradients = {}
    for method in METHODS:
        z = logits.clone().requires_grad_()
        lesson_loss(z, targets, notes.top_ids, notes.log_probs, method).backward()
        gradients[method] = z.grad * targets.numel()
    q = torch.softmax(logits, -1)
    torch.testing.assert_close(gradients["hard targets"], q - F.one_hot(targets, 290), atol=1e-5, rtol=1e-3)
    at_top = (q.gather(-1, notes.top_ids) - p[..., :-1] / p.sum(-1, keepdim=True))
    torch.testing.assert_close(gradients["forward KL"].gather(-1, notes.top_ids), at_top, atol=1e-4, rtol=1e-3)
    half = (gradients["hard targets"] + gradients["forward KL"]) / 2
    torch.testing.assert_close(gradients["half and half"], half, atol=1e-6, rtol=1e-4)
    assert (gradients["reverse KL"] - gradients["forward KL"]).abs().max() > 0.01


def test_lesson_refuses_another_method(notes):
    with pytest.raises(ValueError, match="method is 'magic'; it must be one of hard targets"):
        lesson_loss(torch.zeros(8, 16, 290), notes.windows[:, 1:], notes.top_ids, notes.log_probs, "magic")


@pytest.mark.parametrize("method", METHODS)
def test_students_learn_and_repeat_themselves(method, notes, whole, cut):
    start = tiny_gpt(290, seed=1)
    losses = []
    for _ in range(2):
        student = copy.deepcopy(start)
        losses.append(teach(student, notes, method, steps=40, batch_size=4, max_lr=1e-2, seed=3))
    assert losses[0] == losses[1]
    assert sum(losses[0][-5:]) < 0.8 * sum(losses[0][:5])


def test_a_student_of_the_teachers_kind_comes_close_to_it(notes, whole, cut):
    """With the teacher's own distribution as the target the divergence falls; with hard targets it does not so."""
    ends = {}
    for method in ("hard targets", "forward KL"):
        student = tiny_gpt(290, seed=1)
        teach(student, notes, method, steps=60, batch_size=4, max_lr=1e-2)
        with torch.no_grad():
            ends[method] = lesson_loss(student(notes.windows[:, :-1]), notes.windows[:, 1:], notes.top_ids,
                                       notes.log_probs, "forward KL").item()
    assert ends["forward KL"] < 0.5 * ends["hard targets"]


@pytest.mark.parametrize(("steps", "batch_size"), [(0, 2), (3, 0), (3, 9)])
def test_teach_refuses(notes, steps, batch_size):
    with pytest.raises(ValueError, match=f"steps is {steps} and batch_size {batch_size}"):
        teach(tiny_gpt(290), notes, "hard targets", steps, batch_size=batch_size)


def test_entropy_and_samples(cut, notes):
    student = tiny_gpt(290)
    with torch.no_grad():
        expected = torch.distributions.Categorical(logits=student(notes.windows[:, :-1])).entropy().mean().item()
        assert mean_entropy(student, notes.windows) == pytest.approx(expected, rel=1e-4)
    told = write_samples(student, cut[0], n=3, length=8)
    assert told.shape == (3, 9) and torch.equal(told, write_samples(student, cut[0], n=3, length=8))
    assert (told[:, 0] == cut[0].special_tokens[END_OF_TEXT]).all()


def test_listening_gives_whole_distributions(whole, cut, notes):
    heard = torch.cat(list(listen(tiny_gpt(whole.vocab_size), notes.windows, cut[1], first_pieces(whole, cut[0]))))
    torch.testing.assert_close(heard.exp().sum(-1), torch.ones(8, 16))


# --- the record ----------------------------------------------------------------------------------------------------

def test_the_record_is_whole():
    record = json.loads(RECORD_OF_LESSONS.read_text(encoding="utf-8"))
    assert record["settings"] == LESSONS
    found = [(row["pupil"], row["tokens"], row["method"], row["seed"]) for row in record["lessons"]]
    wanted = [(*one, method, seed) for seed in LESSONS["seeds"] for one in LESSONS["classes"] for method in METHODS]
    assert sorted(found) == sorted(tuple(lesson) for lesson in wanted)
    for row in record["lessons"]:
        assert 0.8 < row["bits_per_byte"] < 6 and 0 < row["distinct"] <= 1 and row["entropy"] > 0
    assert record["before"]["SmolLM2, its own tokens"] < record["before"]["SmolLM2, cut tokens"]
    assert record["before"]["storyteller, its own tokens"] == pytest.approx(pupil_bits(), abs=1e-3)


def test_a_record_of_another_storyteller_is_not_gone_on_with(tmp_path):
    record = json.loads(RECORD_OF_LESSONS.read_text(encoding="utf-8"))
    record["before"]["storyteller, its own tokens"] -= 0.01
    path = tmp_path / "lessons.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lessons.json was made from another storyteller: 1.\d+ bits per byte, this"):
        record_lessons(path)
    assert json.loads(path.read_text(encoding="utf-8")) == record


def test_another_pupil_is_refused():
    with pytest.raises(ValueError, match="name is 'master'; it must be 'storyteller' or 'newcomer'"):
        new_pupil(None, "master")
