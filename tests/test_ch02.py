"""Chapter 2: the tokenizer against slow references, `tiktoken` and `tokenizers`; shards and batches."""

import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from ch02_tokenizer import tokenizer as chapter
from ch02_tokenizer.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    GPT4_PATTERN,
    SAFE_CUTS,
    SMOLLM2_PATTERN,
    BPETokenizer,
    get_batch,
    open_shard,
    prepare_tokens,
    split_chunks,
    split_words,
    train_bpe,
    write_shard,
)

ROOT = Path(__file__).resolve().parent.parent

SMALL_TEXT = """The soldier came marching along the high road: left, right, left, right. He'd his knapsack on his back
and a sword at his side, for he had been at the wars, and was now on his way home. On the road he met an old witch;

she was so ugly that her under-lip hung down to her breast.  "Good evening, soldier," she said. "What a fine sword,
and what a large knapsack you've got! You shall have as much money as ever you like, 12 or 345 kroner, øl and all."
"""
COMMON = st.sampled_from(" \n\tthecat's12.,!ø鴨😀\u0301\u00a0\u200d<|>")
ANY_TEXT = st.text(st.one_of(COMMON, st.characters(codec="utf-8")), max_size=60)
# Few kinds of character at a time, so that they meet in all ways: every white space, signs that patterns name
NASTIEST = st.lists(st.sampled_from(" \n\r\t\u00a0\u3000\x1c\x85\u2028aAſsSlvetmdLVE1٣½'’!.<|>-鴨ø\u0301😀\u200d\x00"),
                    min_size=1, max_size=6).flatmap(lambda some: st.text(st.sampled_from(some), max_size=24))
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "smollm2": SMOLLM2_PATTERN}
NASTY = [
    "", " ", "   three   ", "\n\n\nx\r\n\ty \n ", "don't DON'T we'll 'tis it's's 'll",
    "e\u0301 \u00e9 \u0301", "日本語のテキスト",
    "नमस्ते दुनिया", "👩‍👩‍👧 🇩🇰 👍🏽", "١٢٣ 12345 1 22 ½ Ⅷ x²", "\u00a0no\u2003em\u200bzero\u2028line", "a 1 2  3   4\n5 ",
    "--!!?? ... ***", "z" * 300, " " * 300, "ﬁ ǆ ß İ ı 𝒳 𐍈",
    "<|endoftext|>", "a<|endoftext|>b<|endoftext", "\x00\x01\x85\x1c\x7f", "mixed\r\nline\rends\n\r\n",
    "Z\u0351\u036b\u0343a\u030al\u0321go", "long" + " " * 100 + "runs" + "\n" * 50 + "of" + "\t " * 30 + "space",
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


def slow_merges(words, n_merges, tie=lambda pair: pair):
    """Byte pair encoding as the definition says it, on lists of byte strings."""
    words, merges = [([bytes([b]) for b in word], n) for word, n in words.items()], []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words:
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], tie(pair)))
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


@pytest.mark.parametrize("word", [b"aaaa", b"aaaaa", b"ababab", b"aabaabaab", b"abaababa", bytes([0, 255] * 4)])
def test_fast_merges_equal_the_definition_where_pairs_overlap(word):
    for counts in (Counter({word: 3}), Counter({word: 1, word[1:]: 2, word * 2: 5, word[:1]: 7, b"": 1})):
        assert chapter.learn_merges(counts, 30) == slow_merges(counts, 30)


def test_the_row_holds_every_pair_where_it_is():
    dice = random.Random(2)
    counts = Counter({bytes(dice.choices([0, 1, 98, 255], k=dice.randint(0, 6))): dice.randint(1, 2**40)
                      for _ in range(50)})
    row, weight = chapter.words_in_a_row(counts)
    found = {(a, b): places for a, b, places in chapter.find_pairs(row)}
    expected = {}
    for place, pair in enumerate(pairwise(row.tolist())):
        if chapter.WALL not in pair:
            expected.setdefault(pair, []).append(place)
    assert found == expected
    occurs = Counter()
    for word, n in counts.items():
        for pair in pairwise(word):
            occurs[pair] += n
    assert {pair: sum(weight[places].tolist()) for pair, places in found.items()} == occurs


@given(st.lists(ANY_TEXT | NASTIEST, max_size=4), st.integers(0, 30), st.sampled_from([*PATTERNS.values()]))
@example(["a !", "\nfoo"], 0, GPT4_PATTERN)  # two chunks that may not be cut together
@settings(max_examples=200, deadline=None)
def test_the_fast_trainer_learns_what_the_slow_one_learns(texts, n_merges, pattern):
    words = Counter(word.encode() for text in texts for word in regex.findall(pattern, text))
    assert chapter.count_words(texts, (), pattern) == words
    expected = slow_merges(words, n_merges)
    if words and len(expected) == n_merges:
        assert train_bpe(texts, 256 + n_merges, (), pattern)[1] == expected


@given(st.lists(NASTIEST, max_size=30), st.sampled_from([*PATTERNS.values(), r"\s+|\S+"]), st.integers(0, 40))
@settings(max_examples=400, deadline=None)
def test_texts_are_counted_alike_in_batches_of_any_size(texts, pattern, batch):
    expected = Counter(word.encode() for text in texts for word in regex.findall(pattern, text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "BATCH", batch)
        assert chapter.count_words(texts, (), pattern) == expected


def test_chunks_of_all_lengths_are_counted():
    words = [letters * n for n in range(1, 20) for letters in ("a", "b", "ø", "\0")]
    assert chapter.count_words([" ".join(words * 3)]) == Counter(
        {word.encode(): n for word, n in Counter(split_words(" ".join(words * 3))).items()})


def test_many_short_texts_are_counted_as_fast_as_one():
    """Arrays have a price for each; with one array a text, this would take minutes."""
    start = time.process_time()
    assert chapter.count_words(["Once upon a time\n"] * 100_000)[b" upon"] == 100_000
    assert time.process_time() - start < 5


def test_counts_stay_right_while_pairs_are_merged():
    dice = random.Random(1)
    counts = Counter({"".join(dice.choices("ab", k=dice.randint(1, 9))).encode(): dice.randint(1, 5)
                      for _ in range(30)})
    pairs, merges = chapter.PairCounts(counts), slow_merges(counts, 12)
    number = {bytes([i]): i for i in range(256)}
    words = [([bytes([b]) for b in word], n) for word, n in counts.items()]
    for a, b in merges:
        number[a + b] = len(number)
        new = pairs.merge(number[a], number[b], number[a + b])
        words = [(chapter.merge_pair(word, (a, b), a + b), n) for word, n in words]
        expected = Counter()
        for word, n in words:
            for x, y in pairwise(word):
                expected[number[x] * chapter.PAIR + number[y]] += n
        assert {pair: n for pair, n in pairs.count.items() if n} == expected
        assert all(number[a + b] in (x, y) for _, x, y in new)


def test_the_garbage_collector_is_as_it_was():
    import gc
    assert gc.isenabled()
    train_bpe(SMALL_TEXT, 300)
    assert gc.isenabled()
    gc.disable()
    try:
        train_bpe(SMALL_TEXT, 300)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_merges_equal_those_of_tokenizers_but_for_ties():
    """Up to the first tie the library learns the same; with its rule for ties, our slow trainer learns all of it."""
    text = SMALL_TEXT * 3
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    merges = [tuple(map(chapter.unspell, pair)) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    number = {bytes([chapter.BYTE_OF[letter]]): i for i, letter in enumerate(sorted(chapter.BYTE_OF))}
    for a, b in merges:
        number[a + b] = len(number)
    words = chapter.count_words(text)
    assert slow_merges(words, len(merges), tie=lambda pair: (-number[pair[0]], -number[pair[1]])) == merges
    ours = train_bpe(text, 256 + len(merges))[1]
    first = next(i for i, (a, b) in enumerate(zip(ours, merges, strict=True)) if a != b)
    assert first > 3
    pairs = Counter()
    number = {bytes([i]): i for i in range(256)}
    counted = chapter.PairCounts(words)
    for a, b in ours[:first]:
        number[a + b] = len(number)
        counted.merge(number[a], number[b], number[a + b])
    pairs = [counted.count[number[a] * chapter.PAIR + number[b]] for a, b in (ours[first], merges[first])]
    assert pairs[0] == pairs[1]


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


def test_training_is_the_same_in_another_process():
    """The order of dictionaries and sets depends on PYTHONHASHSEED; the merges must not."""
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
    ((SMALL_TEXT, 300, ["<|x|>", ""]), ["Special token 1 of 2 is empty", "1 character or more"]),
    ((SMALL_TEXT, 300, ["<|x|>", "<|x|>"]), ["'<|x|>'", "twice"]),
    (("hop hop hop", 1000), ["1000", "3 pairs", "259"]),
    ((" ", 300), ["300", "0 pairs", "256"]),
    ((["a\ud800b"], 300), ["U+D800", "surrogate", "replace"]),
])
def test_training_refuses(arguments, words):
    with pytest.raises(ValueError) as caught:
        train_bpe(*arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_training_on_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "old.txt").write_bytes(b"s\xe5 dejligt")
    with pytest.raises(ValueError, match="byte 1 is 0xe5"):
        train_bpe(tmp_path / "old.txt", 300)


def test_a_document_of_one_space(small):
    vocab, merges = train_bpe(" ", 257, [END_OF_TEXT])
    tokenizer = BPETokenizer(vocab, merges, [END_OF_TEXT])
    assert (merges, tokenizer.encode(" "), tokenizer.decode([32, 256])) == ([], [32], " " + END_OF_TEXT)
    assert small.decode(small.encode(" ")) == " "


def test_invalid_utf8_is_refused_or_replaced_and_said(tmp_path, capsys):
    path = tmp_path / "old.txt"
    path.write_bytes(b"s\xe5 dejligt, s\xe5 dejligt \xef\xbf\xbd")
    with pytest.raises(ValueError, match="byte 1 is 0xe5"):
        train_bpe(path, 300)
    assert not capsys.readouterr().out
    merges = train_bpe(path, 260, errors="replace")[1]
    assert "2 places became U+FFFD" in capsys.readouterr().out  # the third was there before
    assert merges == train_bpe("s\ufffd dejligt, s\ufffd dejligt \ufffd", 260)[1]
    with pytest.raises(ValueError, match="'ignore'; it must be 'strict' or 'replace'"):
        train_bpe(path, 300, errors="ignore")


# Cutting

@given(NASTIEST | ANY_TEXT, NASTIEST, st.sampled_from([*PATTERNS.values()]))
@settings(max_examples=600, deadline=None)
def test_no_piece_crosses_a_cut(one, two, pattern):
    assume(not chapter.RARE_SPACE.search(one + two))
    raw = one.encode() + chapter.WALL_BYTE + two.encode()
    chunks = [raw[start:end] for start, end in pairwise([0, *chapter.find_cuts(raw, pattern).tolist(), len(raw)])]
    pieces = [[word for chunk in some for word in split_words(chunk.decode(), pattern)] for some in
              (chunks[:chunks.index(chapter.WALL_BYTE)], chunks[chunks.index(chapter.WALL_BYTE) + 1:])]
    assert pieces == [split_words(one, pattern), split_words(two, pattern)]


@given(NASTIEST | ANY_TEXT, st.sampled_from([*PATTERNS.values()]))
@settings(max_examples=600, deadline=None)
def test_pieces_of_chunks_are_the_pieces_of_the_text(text, pattern):
    chunks = split_chunks(text, pattern)
    assert "".join(chunks) == text
    assert [word for chunk in chunks for word in split_words(chunk, pattern)] == split_words(text, pattern)


@given(NASTIEST, st.integers(0, 24), st.sampled_from([*PATTERNS.values()]))
@settings(max_examples=600, deadline=None)
def test_what_follows_a_safe_cut_changes_nothing_before_it(text, end, pattern):
    """Nor does an end of the text anywhere after the cut, as where a special token begins."""
    for match in SAFE_CUTS[pattern].finditer(text):
        cut = match.start()
        for end in {len(text), max(cut, min(end, len(text)))}:  # noqa: B020
            assert 0 < cut < len(text)
            assert split_words(text[:cut], pattern) + split_words(text[cut:end], pattern) == \
                split_words(text[:end], pattern)


TIKTOKEN_GPT4 = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
                 r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")


@given(NASTIEST | ANY_TEXT)
@settings(max_examples=400, deadline=None)
def test_gpt4_s_pattern_cuts_as_tiktoken_s_does(text):
    """With each piece as a token of its own, the ids show where tiktoken cuts."""
    assume(all(unicodedata.category(c) != "Cn" for c in text))  # which later versions of Unicode may call letters
    pieces = sorted({piece.encode() for piece in split_words(text, GPT4_PATTERN) if len(piece.encode()) > 1})
    assert split_words(text, GPT4_PATTERN) == split_words(text, TIKTOKEN_GPT4)
    ranks = {bytes([i]): i for i in range(256)} | {piece: 256 + i for i, piece in enumerate(pieces)}
    theirs = tiktoken.Encoding("cuts", pat_str=TIKTOKEN_GPT4, mergeable_ranks=ranks, special_tokens={})
    assert theirs.encode_ordinary(text) == [ranks[piece.encode()] for piece in split_words(text, GPT4_PATTERN)]

@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_words_joined_are_the_text(text):
    assert "".join(split_words(text)) == text
    assert "".join(split_words(text, SMOLLM2_PATTERN)) == text
    assert "".join(split_words(text, GPT4_PATTERN)) == text


def test_a_pattern_that_leaves_something_out():
    with pytest.raises(ValueError, match="does not take every character"):
        split_words("two words", r"\w+")


# Encoding

@given(st.text("abn", max_size=80), st.integers(0, 28))
@settings(max_examples=500, deadline=None)
def test_long_words_are_merged_like_short_ones(text, n_merges):
    vocab, merges = train_bpe("abcabcaabbccabcbca bcacbaabcabcaaaabbbb nanacanan " * 2, 256 + n_merges)
    id_of, rank, merged_id = chapter.index_vocab(vocab, merges)
    ids = [id_of[bytes([b])] for b in text.encode()]
    expected = chapter.merge_word(ids, merged_id, rank)
    assert chapter.merge_long_word(ids, merged_id, rank) == expected
    if len(ids) < 64:
        assert BPETokenizer(vocab, merges).encode(text) == expected


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=14), st.text("ab", max_size=40))
@settings(max_examples=1000, deadline=None)
def test_long_words_are_merged_like_short_ones_by_any_merges(picks, text):
    """Also by merges that no training makes, where two of them make the same token."""
    tokens, merges = [b"a", b"b"], []
    for i, j in picks:
        pair = tokens[i % len(tokens)], tokens[j % len(tokens)]
        if len(pair[0] + pair[1]) <= 8 and pair not in merges:
            merges.append(pair)
            tokens += [pair[0] + pair[1]] * (pair[0] + pair[1] not in tokens)
    id_of, rank, merged_id = chapter.index_vocab(dict(enumerate(tokens)), merges)
    ids = [id_of[bytes([b])] for b in text.encode()]
    assert chapter.merge_long_word(ids, merged_id, rank) == chapter.merge_word(ids, merged_id, rank)


@pytest.mark.parametrize("kind", ["one letter", "random letters", "Thai"])
def test_a_word_of_a_hundred_thousand_letters_does_not_hang(gpt2, kind):
    dice = random.Random(0)
    word = {"one letter": "a" * 100_000, "random letters": "".join(dice.choices("etaoinshrdlu", k=100_000)),
            "Thai": "".join(dice.choices("กขคงจฉชซญดตถทธนบปผพมยรลวสหอ", k=40_000))}[kind]
    assert gpt2.encode(word) == tiktoken.get_encoding("gpt2").encode_ordinary(word)


def test_the_memory_of_an_encoder_is_bounded(small):
    memory = chapter.Memory(lambda key: (len(key),), size=100, longest=10)
    for i in range(1000):
        assert memory[str(i)] == (len(str(i)),)
        assert len(memory) <= 100
    assert memory["x" * 11] == (11,) and "x" * 11 not in memory and "999" in memory


def test_a_pattern_of_one_s_own():
    pattern = r"[a-z]+|[^a-z]+"
    tokenizer = BPETokenizer.train("ab - ab - ab", 258, pattern=pattern)
    assert tokenizer.merges == [(b"a", b"b"), (b"-", b" ")] or len(tokenizer.merges) == 2
    text = "ab - abab  -x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert list(tokenizer.encode_iterable(text)) == tokenizer.encode(text)
    with pytest.raises(ValueError, match="longest is 3"):
        list(tokenizer.encode_iterable(text, longest=3))


def test_half_a_surrogate_pair(small):
    with pytest.raises(ValueError, match=r"U\+DC00.*replace"):
        small.encode("a\udc00")
    with pytest.raises(ValueError, match=r"^'\\udc00' holds U\+DC00.*replace"):
        train_bpe(["once", "upon a x\udc00 time"], 257)
    for wrong in (None, 5, b"bytes", ["list"]):
        with pytest.raises(TypeError):
            train_bpe(["text", wrong], 257)

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


@given(NASTIEST, st.lists(st.integers(0, 24), max_size=6), st.sampled_from([*PATTERNS.values()]),
       st.lists(st.sampled_from(["<|", "<|>", "s", "  ", "a b", "\n<", "'s"]), max_size=3, unique=True))
@settings(max_examples=500, deadline=None)
def test_encode_iterable_equals_encode_for_any_pattern_and_special_tokens(text, cuts, pattern, names):
    tokenizer = BPETokenizer(SPACED.vocab, SPACED.merges, names, pattern)
    places = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert list(tokenizer.encode_iterable(pieces)) == tokenizer.encode(text)


STREAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import ch02_tokenizer.tokenizer as chapter
text, pattern, part, size = sys.argv[2], getattr(chapter, sys.argv[3]), sys.argv[4], int(sys.argv[5])
tokenizer = chapter.BPETokenizer.train(text, 330, [chapter.END_OF_TEXT], pattern)
string = part * (60_000 // len(part.encode()))
count = size // len(string.encode()) + 1
expected = len(tokenizer.encode(string)) * count
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 20_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(sum(1 for _ in tokenizer.encode_iterable(string for _ in range(count))), expected)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit a process's memory")
@pytest.mark.parametrize(("part", "pattern", "megabytes"), [
    ("the soldier met a witch on the high road; left, right, <|endoftext|>", "GPT2_PATTERN", 100),
    ("小鴨子很醜，但是後來變成了天鵝。", "GPT2_PATTERN", 100),  # not one space
    ("c29sZGllcg+Wtch/9Zm9vYmFy8", "GPT4_PATTERN", 25),
    ("alpha\nbeta\n\ngamma--\n", "GPT4_PATTERN", 25),
    ("3", "SMOLLM2_PATTERN", 25),
])
def test_a_long_stream_passes_through_20_mb_of_memory(part, pattern, megabytes):
    done = subprocess.run([sys.executable, "-c", STREAM, str(ROOT), SMALL_TEXT, pattern, part, f"{megabytes}000000"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    counted, expected = map(int, done.stdout.split())
    assert abs(counted - expected) < expected / 100  # strings may join at their ends


def test_a_stream_without_a_safe_cut_is_refused_before_it_fills_the_memory(small):
    pulled = 0

    def endless():
        nonlocal pulled
        while True:
            pulled += 1
            yield "a" * 1000

    with pytest.raises(ValueError, match=r"26[0-9],000 characters, from 'aaaa.* longest is 262,144.*larger longest"):
        list(small.encode_iterable(endless()))
    assert pulled == 263
    word = ["a" * 1000] * 100
    assert list(small.encode_iterable(word, longest=100_000)) == small.encode("a" * 100_000)


def test_encode_iterable_does_not_hoard(small):
    pulled = 0

    def lines():
        nonlocal pulled
        for _ in range(1000):
            pulled += 1
            yield "the soldier\nmet a witch "

    next(small.encode_iterable(lines()))
    assert pulled < 5


def test_encode_iterable_is_lazy_about_long_words(small):
    """Letters that come one by one are looked at a few times in all, not once for each letter."""
    looked = []
    real = chapter.safe_cut
    try:
        chapter.safe_cut = lambda text, *rest: looked.append(len(text)) or real(text, *rest)
        assert list(small.encode_iterable("a" * 20_000)) == small.encode("a" * 20_000)
    finally:
        chapter.safe_cut = real
    assert len(looked) < 30


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


@given(ANY_TEXT, st.randoms())
@settings(max_examples=300, deadline=None)
def test_decode_iterable_yields_whole_characters(small, text, dice):
    ids = small.encode(text, allow_special=False)
    pieces = list(small.decode_iterable(ids))
    assert "".join(pieces) == text and "" not in pieces
    cut = ids[:dice.randint(0, len(ids))]
    assert "".join(small.decode_iterable(cut)) == small.decode(cut)


def test_decode_iterable_holds_back_and_shows_what_is_lost(small):
    duck = list("🦆".encode())
    assert list(small.decode_iterable([97, *duck, 98])) == ["a", "🦆", "b"]
    assert list(small.decode_iterable([97, *duck[:2]])) == ["a", "\ufffd"]
    assert list(small.decode_iterable([duck[0], 98])) == ["\ufffdb"]
    stream = small.decode_iterable(iter([97, duck[0]]))
    assert next(stream) == "a"
    with pytest.raises(ValueError, match="330 is outside the vocabulary"):
        list(small.decode_iterable([330]))


def test_decode_strict_refuses_half_a_character(small):
    assert small.decode(small.encode("øl"), errors="strict") == "øl"
    with pytest.raises(ValueError, match=r"Byte 1 of the 2 .* 0xc3 .*decode_iterable"):
        small.decode([97, 0xC3], errors="strict")


def test_the_fingerprint_changes_with_whatever_decides_the_ids(small):
    same = BPETokenizer(small.vocab, small.merges, small.special_tokens, small.pattern)
    assert same.fingerprint() == small.fingerprint()
    others = [BPETokenizer(small.vocab, small.merges, small.special_tokens, SMOLLM2_PATTERN),
              BPETokenizer(small.vocab, small.merges[:-1], small.special_tokens),
              BPETokenizer(small.vocab, small.merges, [END_OF_TEXT]),
              BPETokenizer({**small.vocab, 5: b"x", 120: b"\x05"}, small.merges, small.special_tokens)]
    assert len({t.fingerprint() for t in [small, *others]}) == 5


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_cuda_device_are_the_same():
    cpu, cuda = (get_batch(np.arange(999), 4, 8, device, torch.Generator().manual_seed(5))
                 for device in ("cpu", "cuda"))
    assert cuda[0].device.type == "cuda"
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, cuda, strict=True))


# Shards

@pytest.fixture
def shard(small, tmp_path):
    documents = [chapter.Document(str(i), SMALL_TEXT * (i + 1), "test") for i in range(3)]
    about = write_shard(tmp_path / "demo.bin", iter(documents), small)
    return tmp_path / "demo.bin", about, documents


def test_a_shard_holds_the_ids_and_says_what_it_is(shard, small):
    path, about, documents = shard
    ids = open_shard(path, small)
    expected = [i for d in documents for i in [*small.encode(d.text), small.special_tokens[END_OF_TEXT]]]
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16 and ids.tolist() == expected
    assert about == {"format": 2, "dtype": "<u2", "tokens": len(expected), "documents": 3,
                     "bytes": 6 * len(SMALL_TEXT.encode()), "tokenizer": small.fingerprint()}
    raw = path.read_bytes()
    assert json.loads(raw[:1024].split(b"\n")[1]) == about
    assert np.frombuffer(raw[1024:], "<u2").tolist() == expected


def test_a_shard_of_no_documents(small, tmp_path):
    write_shard(tmp_path / "none.bin", [], small)
    assert open_shard(tmp_path / "none.bin", small).shape == (0,)


def change_header(**changes):
    def change(path):
        raw = path.read_bytes()
        about = json.loads(raw[:1024].split(b"\n")[1]) | changes
        path.write_bytes(chapter.shard_header(about) + raw[1024:])
    return change


@pytest.mark.parametrize(("damage", "words"), [
    (lambda path: os.truncate(path, path.stat().st_size - 2), ["bytes, but", "tokens of 2 bytes", "cut off", "Write"]),
    (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), ["bytes, but", "added to", "Write"]),
    (lambda path: os.truncate(path, 1024), ["1,024 bytes, but", "cut off"]),
    (lambda path: os.truncate(path, 500), ["500 bytes, but", "cut off"]),
    (lambda path: os.truncate(path, 80), ["header", "80 of 1,024", "damaged", "Write"]),
    (lambda path: os.truncate(path, 0), ["no token shard", "b''"]),
    (lambda path: path.write_bytes(np.arange(99, dtype="<u2").tobytes()), ["no token shard", "format 1", "write"]),
    (change_header(format=3), ["format 3", "reads format 2"]),
    (change_header(dtype="<f4"), ["type <f4", "<u2 or <u4"]),
    (change_header(dtype="O"), ["type |O", "<u2 or <u4"]),
    (change_header(dtype="<u4"), ["tokens of 4 bytes", "cut off"]),
    (change_header(tokens="many"), ["damaged"]),
    (change_header(tokens=-1), ["bytes, but"]),
    (change_header(tokenizer="0" * 64), ["tokenizer 000000000000, but", "Load the one"]),
])
def test_a_damaged_shard_is_refused(shard, small, damage, words):
    damage(shard[0])
    with pytest.raises(ValueError) as caught:
        open_shard(shard[0], small)
    assert all(word in str(caught.value) for word in ["demo.bin", *words]), str(caught.value)


def test_a_shard_refuses_another_tokenizer(shard, small, gpt2):
    with pytest.raises(ValueError, match=f"{small.fingerprint()[:12]}, but this one is {gpt2.fingerprint()[:12]}"):
        open_shard(shard[0], gpt2)


def test_writing_a_shard_that_fails_leaves_the_old_one(shard, small):
    path, _, documents = shard
    before = path.read_bytes()
    with pytest.raises(ValueError, match="surrogate"):
        write_shard(path, [*documents, chapter.Document("bad", "\ud800", "test")], small)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["demo.bin"]


def test_shards_of_the_old_format_are_built_again_and_said(texts, capsys):
    data = prepare_tokens(texts, 300)
    expected = np.array(data.train)
    manifest = json.loads((data.folder / "manifest.json").read_text())
    (data.folder / "train.bin").write_bytes(expected.tobytes())
    del manifest["format"]
    (data.folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert np.array_equal(prepare_tokens(texts, 300).train, expected)
    assert "format 1, without a header" in capsys.readouterr().out


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
    (lambda folder: os.truncate(folder / "train.bin", 2000), "train.bin is damaged"),
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


def test_shards_that_a_notebook_holds_open_say_so(texts, monkeypatch):
    """Windows neither removes nor replaces a file that is memory-mapped."""
    def unless_held(function, *paths):
        if "train.bin" in [Path(path).name for path in paths]:
            error = PermissionError(13, "The process cannot access the file")
            error.winerror = 32
            raise error
        return function(*paths)

    folder = prepare_tokens(texts, 300).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (texts / "3.txt").write_text("another text altogether")
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, partial(unless_held, getattr(os, name)))
        with pytest.raises(PermissionError, match=r"train\.bin.*notebook.*kernel") as error:
            prepare_tokens(texts, 300)
    assert "Free some space" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    data = prepare_tokens(texts, 300)  # once it is let go, all is built
    assert "another text altogether" in data.tokenizer.decode([*data.train, *data.val])


def test_large_vocabularies_take_four_bytes(texts, tmp_path, monkeypatch):
    train = chapter.load_documents(texts)
    tokenizer = BPETokenizer.train((d.text for d in train), 300, [END_OF_TEXT])
    large = BPETokenizer(tokenizer.vocab | {i: f"<|{i}|>".encode() for i in range(300, 70_000)}, tokenizer.merges,
                         [END_OF_TEXT, "<|69999|>"])
    about = chapter.write_shard(tmp_path / "large.bin", train, large)
    ids = open_shard(tmp_path / "large.bin", large)
    assert ids.dtype == np.uint32
    assert len(ids) == about["tokens"]
    assert large.decode(ids[:20]) == large.decode(large.encode(train[0].text)[:20])
