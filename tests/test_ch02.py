"""Chapter 2: the tokenizer against slow references, `tiktoken` and `tokenizers`; shards and batches."""

import json
import os
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from ch02_tokenizer import tokenizer as chapter
from ch02_tokenizer.tokenizer import (
    END_OF_TEXT,
    SMOLLM2_PATTERN,
    BPETokenizer,
    get_batch,
    prepare_tokens,
    split_words,
    train_bpe,
)

SMALL_TEXT = """The soldier came marching along the high road: left, right, left, right. He'd his knapsack on his back
and a sword at his side, for he had been at the wars, and was now on his way home. On the road he met an old witch;

she was so ugly that her under-lip hung down to her breast.  "Good evening, soldier," she said. "What a fine sword,
and what a large knapsack you've got! You shall have as much money as ever you like, 12 or 345 kroner, øl and all."
"""
COMMON = st.sampled_from(" \n\tthecat's12.,!ø鴨😀\u0301\u00a0\u200d<|>")
ANY_TEXT = st.text(st.one_of(COMMON, st.characters(codec="utf-8")), max_size=60)
NASTY = [
    "", " ", "   three   ", "\n\n\nx\r\n\ty \n ", "don't DON'T we'll 'tis it's's 'll",
    "e\u0301 \u00e9 \u0301", "日本語のテキスト",
    "नमस्ते दुनिया", "👩‍👩‍👧 🇩🇰 👍🏽", "١٢٣ 12345 1 22 ½ Ⅷ x²", "\u00a0no\u2003em\u200bzero\u2028line", "a 1 2  3   4\n5 ",
    "--!!?? ... ***", "z" * 300, " " * 300, "ﬁ ǆ ß İ ı 𝒳 𐍈",
    "<|endoftext|>", "a<|endoftext|>b<|endoftext", "\x00\x01\x85\x1c\x7f",
]


@pytest.fixture(scope="module")
def small():
    return BPETokenizer.train(SMALL_TEXT, 330, [END_OF_TEXT, "<|a|>", "<|a|><|b|>"])


@pytest.fixture(scope="module")
def gpt2():
    return BPETokenizer.gpt2()


@pytest.fixture(scope="module")
def smollm2():
    return BPETokenizer.smollm2()


def slow_merges(words, n_merges):
    """Byte pair encoding as the definition says it, on lists of byte strings."""
    words, merges = [([bytes([b]) for b in word], n) for word, n in words.items()], []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words:
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = []
        for word, n in words:
            new, i = [], 0
            while i < len(word):
                joined = tuple(word[i:i + 2]) == best
                new.append(best[0] + best[1] if joined else word[i])
                i += 1 + joined
            merged.append((new, n))
        words = merged
    return merges


# Training

@given(st.dictionaries(st.text("abc", min_size=1, max_size=25), st.integers(1, 5), min_size=1, max_size=10),
       st.integers(0, 40))
@settings(max_examples=400, deadline=None)
def test_fast_merges_equal_the_definition(words, n_merges):
    counts = Counter({word.encode(): n for word, n in words.items()})
    merges = chapter.learn_merges(counts, n_merges)
    assert merges == slow_merges(counts, n_merges)
    assert len({a + b for a, b in merges}) == len(merges)  # every merge makes a new token


def test_training_on_text_equals_the_definition():
    counts = Counter(word.encode() for word in regex.findall(chapter.GPT2_PATTERN, SMALL_TEXT))
    vocab, merges = train_bpe(SMALL_TEXT, 320)
    assert merges == slow_merges(counts, 64)
    assert vocab == dict(enumerate([bytes([i]) for i in range(256)] + [a + b for a, b in merges]))


def test_of_equal_pairs_the_greatest_wins():
    # ab, bc, cd and zz occur twice each. (z, z) is the greatest, then (c, d); now bc is gone, and (b, cd) > (a, b).
    _, merges = train_bpe("abcd zz abcd zz", 256 + 4)
    assert merges[:3] == [(b"z", b"z"), (b"c", b"d"), (b"b", b"cd")]
    # Compared as pairs of byte strings, not by their joined bytes: (b, a) < (ba, ...) and a prefix is smaller.
    assert max([(b"a", b"b"), (b"a", b"ba"), (b"ab", b"")]) == (b"ab", b"")
    assert sorted([b"b", b"ba", b"a", b"\xff", b""], key=chapter.descending) == [b"\xff", b"ba", b"b", b"a", b""]


def test_ids_are_bytes_then_merges_then_special_tokens():
    vocab, merges = train_bpe(SMALL_TEXT, 300, ["<|x|>", END_OF_TEXT])
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [vocab[256 + i] for i in range(len(merges))] == [a + b for a, b in merges]
    assert [vocab[298], vocab[299]] == [b"<|x|>", END_OF_TEXT.encode()]


def test_strings_paths_and_pieces_train_alike(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(SMALL_TEXT.encode())
    whole = train_bpe(SMALL_TEXT, 300)
    assert train_bpe(path, 300) == whole == train_bpe(iter([SMALL_TEXT]), 300)
    # No token may join two strings: only "ab" inside each of them counts.
    assert train_bpe(["ab", "ab"], 257)[1] == [(b"a", b"b")]
    with pytest.raises(ValueError, match="only 1 pairs"):
        train_bpe(["ab", "ab"], 258)


def test_nothing_is_learned_from_special_tokens_or_across_them():
    texts = ["aab", "baa", "aab"] * 5
    with_special = train_bpe("<|end|>".join(texts), 258 + 1, ["<|end|>"])[1]
    assert with_special == train_bpe(texts, 258)[1]
    assert not any(b"|" in a + b or b"<" in a + b for a, b in with_special)


def test_training_is_the_same_in_another_process(tmp_path):
    """The order of dictionaries and sets depends on PYTHONHASHSEED; the merges must not."""
    import subprocess
    import sys
    program = ("import sys; sys.path.insert(0, sys.argv[1]); from ch02_tokenizer.tokenizer import train_bpe; "
               f"print(train_bpe({SMALL_TEXT!r}, 330)[1])")
    results = {subprocess.run([sys.executable, "-c", program, os.getcwd()], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert results == {f"{train_bpe(SMALL_TEXT, 330)[1]}\n"}


@pytest.mark.parametrize(("arguments", "words"), [
    (("", 300), ["no text", "empty"]),
    (("<|x|>", 300, ["<|x|>"]), ["no text", "special tokens"]),
    (([], 300), ["no text"]),
    ((SMALL_TEXT, 255), ["255", "256"]),
    ((SMALL_TEXT, 257, ["<|x|>", "<|y|>"]), ["257", "258"]),
    ((SMALL_TEXT, 300, ["<|x|>", ""]), ["empty"]),
    ((SMALL_TEXT, 300, ["<|x|>", "<|x|>"]), ["'<|x|>'", "twice"]),
    (("hop hop hop", 1000), ["1000", "3 pairs", "259"]),
])
def test_training_refuses(arguments, words):
    with pytest.raises(ValueError) as caught:
        train_bpe(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_training_on_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "old.txt").write_bytes(b"s\xe5 dejligt")
    with pytest.raises(ValueError, match="byte 1 is 0xe5"):
        train_bpe(tmp_path / "old.txt", 300)


# Cutting

@given(ANY_TEXT)
@settings(max_examples=300)
def test_words_joined_are_the_text(text):
    assert "".join(split_words(text)) == text
    assert "".join(split_words(text, SMOLLM2_PATTERN)) == text


def test_a_pattern_that_leaves_something_out():
    with pytest.raises(ValueError, match="does not take every character"):
        split_words("two words", r"\w+")


# Encoding

@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_every_text_comes_back(small, text):
    assert small.decode(small.encode(text)) == text
    assert small.decode(small.encode(text, allow_special=False)) == text


@pytest.mark.parametrize("text", NASTY)
def test_gpt2_gives_the_ids_of_tiktoken(gpt2, text):
    reference = tiktoken.get_encoding("gpt2")
    assert gpt2.encode(text) == reference.encode(text, allowed_special="all")
    assert gpt2.encode(text, allow_special=False) == reference.encode(text, disallowed_special=())


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_gpt2_gives_the_ids_of_tiktoken_on_any_text(gpt2, text):
    assert gpt2.encode(text, allow_special=False) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_gpt2_has_its_vocabulary(gpt2):
    assert gpt2.vocab_size == 50_257
    assert gpt2.special_tokens == {END_OF_TEXT: 50_256}
    assert gpt2.encode("Hello world" + END_OF_TEXT) == [15496, 995, 50256]


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_to_tiktoken_gives_the_same_ids(small, text):
    assert small.encode(text, allow_special=False) == small.to_tiktoken().encode_ordinary(text)


@given(st.text("abcn", max_size=40))
@settings(max_examples=300, deadline=None)
def test_to_tiktoken_gives_the_same_ids_where_many_merges_compete(text):
    dense = BPETokenizer.train("abcabcaabbccabcbca bcacbaabcabcaaaabbbb nanacanan " * 2, 284)
    assert dense.encode(text) == dense.to_tiktoken().encode_ordinary(text)


def smollm2_by_tokenizers(ours):
    """SmolLM2's tokenizer as its authors configured it in Hugging Face's library, with our vocabulary."""
    special = {i: name for name, i in ours.special_tokens.items()}
    vocab = {special.get(i) or chapter.spell(token): i for i, token in ours.vocab.items()}
    theirs = tokenizers.Tokenizer(models.BPE(
        vocab=vocab, merges=[(chapter.spell(a), chapter.spell(b)) for a, b in ours.merges]))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(list(ours.special_tokens))
    return theirs


def test_smollm2_gives_the_ids_of_tokenizers(smollm2):
    theirs = smollm2_by_tokenizers(smollm2)
    for text in [*NASTY, "<|im_start|>user\nHi 2 you<|im_end|>\n"]:
        assert smollm2.encode(text) == theirs.encode(text).ids, text

    @given(ANY_TEXT)
    @settings(max_examples=300, deadline=None)
    def on_any_text(text):
        if {byte for byte in text.encode() if bytes([byte]) not in smollm2.vocab.values()}:
            with pytest.raises(ValueError, match="has no token in this vocabulary"):
                smollm2.encode(text, allow_special=False)
        else:
            assert smollm2.encode(text) == theirs.encode(text).ids

    on_any_text()


def test_smollm2_has_its_vocabulary(smollm2):
    assert smollm2.vocab_size == 49_152
    assert smollm2.special_tokens["<|im_start|>"] == 1
    assert smollm2.decode(smollm2.encode("The capital of France is")) == "The capital of France is"
    with pytest.raises(ValueError, match="Byte 0x04 .* has no token .*normalize"):
        smollm2.encode("a\x04b")


# Special tokens

def test_special_tokens_are_found_longest_first_or_not_at_all(small):
    a, ab = small.special_tokens["<|a|>"], small.special_tokens["<|a|><|b|>"]
    assert small.encode("<|a|><|b|><|a|><|b") == [ab, a, *small.encode("<|b")]
    plain = small.encode("x<|a|><|endoftext|>", allow_special=False)
    assert not set(plain) & set(small.special_tokens.values())
    assert small.decode(plain) == "x<|a|><|endoftext|>"


PIECES = ["<|a|>", "<|a b|>", "<|a", " b|>", "<|", "a|", ">", "the", " ", "\n", "'", "ll", "   ", "1"]
SPACED = BPETokenizer.train("the   the  ll 'll'l\n\n   a|><|  <| b|> \n\n a  b " * 2, 274, ["<|a|>", "<|a b|>"])


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.lists(st.integers(0, 60), max_size=8), st.booleans())
@settings(max_examples=1000, deadline=None)
def test_encode_iterable_equals_encode_of_the_whole(parts, cuts, allow_special):
    text = "".join(parts)
    places = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert list(SPACED.encode_iterable(pieces, allow_special)) == SPACED.encode(text, allow_special)


def test_encode_iterable_does_not_hoard(small):
    pulled = 0

    def lines():
        nonlocal pulled
        for _ in range(1000):
            pulled += 1
            yield "the soldier\nmet a witch "

    next(small.encode_iterable(lines()))
    assert pulled < 5


def test_special_tokens_that_look_like_ordinary_ones():
    tokenizer = BPETokenizer.train("thaw the then\n\nthe", 260, ["the", "\n"])
    the, newline = tokenizer.special_tokens["the"], tokenizer.special_tokens["\n"]
    assert {the, newline} == {258, 259}
    assert tokenizer.encode("the\n") == [the, newline]
    assert tokenizer.encode("\n", allow_special=False) == [10]


def test_a_special_token_never_takes_an_ordinary_token_s_id():
    vocab, merges = train_bpe("the then the then", 258)
    name = vocab[257].decode()
    tokenizer = BPETokenizer(vocab, merges, [name, "h"])
    assert tokenizer.special_tokens == {name: 258, "h": 259}
    assert tokenizer.encode("h", allow_special=False) == [ord("h")]


def test_special_tokens_that_are_not_in_the_vocabulary_get_the_next_ids():
    vocab, merges = train_bpe(SMALL_TEXT, 280)
    tokenizer = BPETokenizer(vocab, merges, ["<|x|>", "<|y|>"])
    assert tokenizer.special_tokens == {"<|x|>": 280, "<|y|>": 281}
    assert tokenizer.vocab_size == 282
    assert tokenizer.decode([281, 280]) == "<|y|><|x|>"


# Decoding and tables

def test_decode_takes_lists_arrays_and_tensors_and_mends_half_characters(small):
    ids = small.encode("øl")
    assert small.decode(np.array(ids, np.uint16)) == small.decode(torch.tensor(ids)) == small.decode(iter(ids)) == "øl"
    assert small.decode_bytes([0xC3]) == b"\xc3"
    assert small.decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("wrong", [330, -1, 10**9])
def test_decode_refuses_an_id_outside_the_vocabulary(small, wrong):
    with pytest.raises(ValueError, match=rf"{wrong} is outside the vocabulary \(0 to 329\)"):
        small.decode([1, wrong])


def test_vocabularies_that_do_not_fit():
    vocab, merges = train_bpe(SMALL_TEXT, 280)
    with pytest.raises(ValueError, match="0 to 278 without gaps"):
        BPETokenizer({i: t for i, t in vocab.items() if i != 5}, merges)
    with pytest.raises(ValueError, match="Merge 20 needs the token"):
        BPETokenizer({i: vocab[i] for i in range(276)}, merges)


# Files

@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_the_saved_file_opens_in_tokenizers_with_the_same_ids(small, saved_by_small, text):
    assert tokenizers.Tokenizer.from_file(str(saved_by_small)).encode(text).ids == small.encode(text)


@pytest.fixture(scope="module")
def saved_by_small(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    small.save(path)
    return path


def test_tokenizers_decodes_and_saves_the_same(small, saved_by_small, tmp_path):
    theirs = tokenizers.Tokenizer.from_file(str(saved_by_small))
    for text in NASTY:
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == text
    theirs.save(str(tmp_path / "theirs.json"))
    again = BPETokenizer.load(tmp_path / "theirs.json")
    assert (again.vocab, again.merges, again.special_tokens) == (small.vocab, small.merges, small.special_tokens)


@pytest.mark.parametrize("name", ["small", "gpt2", "smollm2"])
def test_load_gives_back_what_was_saved(request, tmp_path, name):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "t.json")
    again = BPETokenizer.load(tmp_path / "t.json")
    assert again.vocab == tokenizer.vocab
    assert again.merges == tokenizer.merges
    assert again.special_tokens == tokenizer.special_tokens
    assert again.pattern == tokenizer.pattern
    for text in NASTY:
        assert again.encode(text) == tokenizer.encode(text)
        assert tokenizers.Tokenizer.from_file(str(tmp_path / "t.json")).encode(text).ids == tokenizer.encode(text)


def changed(*path, to):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to
    return change


@pytest.mark.parametrize(("change", "words"), [
    (changed("version", to="2.0"), ["version", '"2.0"', '"1.0"']),
    (changed("normalizer", to={"type": "NFC"}), ["normalizer", "NFC"]),
    (changed("model", "type", to="WordPiece"), ["model.type", "WordPiece", "BPE"]),
    (changed("model", "dropout", to=0.1), ["model.dropout", "0.1"]),
    (changed("pre_tokenizer", to={"type": "ByteLevel"}), ["pre_tokenizer", "ByteLevel"]),
    (changed("added_tokens", 0, "lstrip", to=True), ["added_tokens[0].lstrip", "true"]),
    (changed("padding", to={"strategy": "BatchLongest"}), ["padding"]),
    (changed("something_new", to=1), ["something_new"]),
    (changed("model", "merges", to=["h e"]), ["model.merges[0]", '"h e"']),
    (changed("model", to=None), ["model is null"]),
])
def test_load_names_what_differs(saved_by_small, tmp_path, change, words):
    content = json.loads(saved_by_small.read_text("utf-8"))
    change(content)
    (tmp_path / "other.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError) as caught:
        BPETokenizer.load(tmp_path / "other.json")
    assert all(word in str(caught.value) for word in ["other.json", *words]), str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "3", "\x80"])
def test_load_refuses_what_is_no_tokenizer(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.json"):
        BPETokenizer.load(tmp_path / "t.json")


# Batches

@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda ids: np.array(ids, np.uint16)])
def test_batches_are_windows_shifted_by_one(kind):
    tokens = kind([7 * i % 101 for i in range(50)])
    inputs, targets = get_batch(tokens, 64, 8, generator=torch.Generator().manual_seed(1))
    assert inputs.shape == targets.shape == (64, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal((inputs + 7) % 101, targets)


def test_batches_reach_both_ends_and_the_seed_decides():
    tokens = np.arange(12)
    starts = get_batch(tokens, 2000, 9, generator=torch.Generator().manual_seed(0))[0][:, 0]
    assert set(starts.tolist()) == {0, 1, 2}
    assert get_batch(np.arange(10), 1, 9)[1][0, -1] == 9  # the only window there is
    same = [get_batch(np.arange(999), 4, 8, generator=torch.Generator().manual_seed(5))[0] for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize(("arguments", "words"), [
    ((np.arange(8), 4, 8), ["8 tokens", "needs 9"]),
    ((np.arange(0), 4, 8), ["0 tokens", "needs 9"]),
    ((np.arange(80), 0, 8), ["batch_size is 0", "1 or more"]),
    ((np.arange(80), 4, 0), ["context_length 0", "1 or more"]),
])
def test_batches_that_cannot_be(arguments, words):
    with pytest.raises(ValueError) as caught:
        get_batch(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Shards

@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of ten texts, and a workspace of its own."""
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    for i in range(10):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(SMALL_TEXT * (i + 1) + END_OF_TEXT + " ø", "utf-8")
    return tmp_path / "texts"


def test_shards_hold_the_texts_with_an_end_after_each(texts, capsys):
    data = prepare_tokens(texts, 300)
    end = data.tokenizer.special_tokens[END_OF_TEXT]
    assert data.train.dtype == np.uint16
    for ids, size, count in ((data.train, data.train_bytes, 9), (data.val, data.val_bytes, 1)):
        assert isinstance(ids, np.memmap)
        assert ids[-1] == end
        assert (ids == end).sum() == count  # what looks like a special token in a text is not one
        text = data.tokenizer.decode(ids)
        assert len(text.encode()) - count * len(END_OF_TEXT) == size
        assert text.count(SMALL_TEXT + END_OF_TEXT + " ø" + END_OF_TEXT) == count
    assert "Built" in capsys.readouterr().out


def test_shards_are_used_again(texts, capsys):
    before = prepare_tokens(texts, 300)
    stamp = (before.folder / "train.bin").stat().st_mtime_ns
    capsys.readouterr()
    after = prepare_tokens(texts, 300)
    assert "Using" in capsys.readouterr().out
    assert (after.folder / "train.bin").stat().st_mtime_ns == stamp
    assert np.array_equal(before.train, after.train)


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda folder: os.truncate(folder / "train.bin", 100), "train.bin is damaged"),
    (lambda folder: (folder / "val.bin").write_bytes(bytes((folder / "val.bin").stat().st_size)), "val.bin is damaged"),
    (lambda folder: (folder / "val.bin").unlink(), "val.bin is missing"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is damaged"),
    (lambda folder: (folder / "manifest.json").write_bytes(b"\x80"), "manifest.json is damaged"),
])
def test_damaged_shards_are_built_again(texts, capsys, damage, reason):
    before = prepare_tokens(texts, 300)
    expected = [np.array(before.train), np.array(before.val)]
    damage(before.folder)
    capsys.readouterr()
    after = prepare_tokens(texts, 300)
    assert reason in capsys.readouterr().out
    assert np.array_equal(after.train, expected[0])
    assert np.array_equal(after.val, expected[1])
    prepare_tokens(texts, 300)
    assert "Using" in capsys.readouterr().out


def test_shards_follow_the_text(texts, capsys):
    prepare_tokens(texts, 300)
    (texts / "3.txt").write_text("another text altogether")
    data = prepare_tokens(texts, 300)
    assert "the text has changed" in capsys.readouterr().out
    assert "another text altogether" in data.tokenizer.decode([*data.train, *data.val])


def test_a_build_that_was_interrupted_is_not_mistaken_for_whole(texts, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(chapter, "write_shard", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens(texts, 300)
    assert prepare_tokens(texts, 300).train[-1] == 299
    assert "manifest.json is missing" in capsys.readouterr().out


def test_large_vocabularies_take_four_bytes(texts, tmp_path, monkeypatch):
    train = chapter.load_documents(texts)
    tokenizer = BPETokenizer.train((d.text for d in train), 300, [END_OF_TEXT])
    large = BPETokenizer(tokenizer.vocab | {i: f"<|{i}|>".encode() for i in range(300, 70_000)}, tokenizer.merges,
                         [END_OF_TEXT, "<|69999|>"])
    about = chapter.write_shard(tmp_path / "large.bin", train, large)
    ids = np.fromfile(tmp_path / "large.bin", about["dtype"])
    assert ids.dtype == np.uint32
    assert len(ids) == about["tokens"]
    assert large.decode(ids[:20]) == large.decode(large.encode(train[0].text)[:20])
