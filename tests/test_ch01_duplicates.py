"""Chapter 1, duplicates: shingles and Jaccard by hand, MinHash and banding against theory and brute force."""

import hashlib
import os
import random
import subprocess
import sys
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_data.data import (
    Document,
    candidate_probability,
    choose_bands,
    containment,
    estimated_jaccard,
    exact_duplicates,
    exact_jaccard,
    group_signatures,
    hash_shingles,
    jaccard,
    merge_groups,
    minhash,
    minhash_batch,
    near_duplicates,
    shingles,
    shuffles,
)
from utils.workspace import ROOT

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]  # 720 words


def passage(generator, length=60):
    return " ".join(generator.choices(VOCABULARY, k=length))


def related_pairs(n, seed=0):
    """2 n texts, rows 2 i and 2 i + 1 a pair of any similarity; the pairs and their true similarities."""
    generator, texts = random.Random(seed), []
    for _ in range(n):
        first, second = passage(generator).split(), passage(generator).split()
        kept = generator.randrange(61)
        texts += [" ".join(first), " ".join(first[:kept] + second[kept:])]
    pairs = np.arange(2 * n).reshape(-1, 2)
    return texts, pairs, exact_jaccard(texts, pairs)


def graded_documents(families=120, seed=0):
    """Each family: an original and four copies with one to five changed words."""
    generator, documents = random.Random(seed), []
    for family in range(families):
        original = passage(generator, generator.randrange(45, 80)).split()
        documents.append(Document(f"{family:03}/0", " ".join(original), "made"))
        for copy in range(1, 5):
            words = list(original)
            for place in generator.sample(range(len(words)), generator.randrange(1, 6)):
                words[place] = generator.choice(VOCABULARY)
            documents.append(Document(f"{family:03}/{copy}", " ".join(words), "made"))
    return documents


def brute_force_groups(documents, threshold):
    """Connected groups over all pairs, by a search that shares nothing with the code under test."""
    sets = {d.id: {tuple(w[i:i + 5]) for w in [d.text.split()] for i in range(len(w) - 4)} for d in documents}
    near = {name: set() for name in sets}
    for a, b in combinations(sets, 2):
        if len(sets[a] & sets[b]) >= threshold * len(sets[a] | sets[b]):
            near[a].add(b)
            near[b].add(a)
    groups, seen = [], set()
    for name in sorted(near):
        group, todo = set(), [name]
        while todo:
            if (one := todo.pop()) not in seen:
                seen.add(one)
                group.add(one)
                todo += near[one]
        if len(group) > 1:
            groups.append(group)
    return groups


# --- Shingles, Jaccard, exact duplicates -------------------------------------------------------------

def test_shingles_and_jaccard_by_hand():
    a, b = shingles("The emperor has nothing on at all.", 3), shingles("But the emperor has nothing on!", 3)
    assert a == {"the emperor has", "emperor has nothing", "has nothing on", "nothing on at", "on at all"}
    assert b == {"but the emperor", "the emperor has", "emperor has nothing", "has nothing on"}
    assert jaccard(a, b) == 0.5
    assert containment(a, b) == 3 / 5
    assert containment(b, a) == 3 / 4


@pytest.mark.parametrize(("text", "expected"), [
    ("To be, or not", {"to be or not"}),  # fewer words than the shingle: the text is one shingle
    ("", {""}), ("  \n", {""}),
    ("*** !!!", {"*** !!!"}),             # no word at all: its pieces
    ("A B C D E F", {"a b c d e", "b c d e f"}),
])
def test_shingles_of_short_texts(text, expected):
    assert shingles(text) == expected


def test_jaccard_of_empty_sets():
    assert jaccard(set(), set()) == 1
    assert jaccard(set(), {1}) == 0
    assert containment(set(), {1}) == 1


def test_exact_duplicates_are_equal_to_the_letter():
    documents = [Document(name, text, "") for name, text in
                 [("b", "x, y"), ("a", "x, y"), ("c", "x y"), ("e", ""), ("d", ""), ("f", "\ud83d")]]
    assert exact_duplicates(documents) == [{"a", "b"}, {"d", "e"}]
    assert exact_duplicates(reversed(documents)) == [{"a", "b"}, {"d", "e"}]
    assert exact_duplicates([]) == []


# --- Signatures --------------------------------------------------------------------------------------

@given(st.lists(st.text(st.one_of(st.sampled_from("ab c\n.,"), st.characters()), max_size=60), min_size=1, max_size=6),
       st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_hashed_shingles_are_as_many_as_the_shingles(texts, shingle):
    numbers, starts = hash_shingles(texts, shingle)
    assert numbers.dtype == np.uint64
    assert starts[-1] == len(numbers)
    for i, text in enumerate(texts):
        assert len(set(numbers[starts[i]:starts[i + 1]].tolist())) == len(shingles(text, shingle))


@given(st.lists(st.text(max_size=80), min_size=1, max_size=8), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_batch_is_single(texts, n_perm, shingle):
    batch = minhash_batch(texts, n_perm, shingle)
    assert batch.shape == (len(texts), n_perm)
    assert batch.dtype == np.uint64
    for text, row in zip(texts, batch, strict=True):
        assert np.array_equal(row, minhash(text, n_perm, shingle))


def test_batch_is_single_across_blocks():
    generator = random.Random(1)
    texts = [passage(generator, n) for n in (3, 60_000, 0, 5, 90_000, 40)]  # longer than a block, and tiny
    for text, row in zip(texts, minhash_batch(texts), strict=True):
        assert np.array_equal(row, minhash(text))


def plain_minhash(words, n_perm, shingle=5):
    """The definition in Python's unbounded integers, one step at a time."""
    odd = 0x9E3779B97F4A7C15

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    numbers = [int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "little") for w in words]
    numbers += [0] * (shingle - len(numbers))
    shingle_numbers = {mix(sum(n * odd**(shingle - 1 - k) for k, n in enumerate(numbers[i:i + shingle])) % 2**64)
                       for i in range(len(numbers) - shingle + 1)}
    return [min(((mix((2 * k + 1) * odd % 2**64) | 1) * x + mix((2 * k + 2) * odd % 2**64)) % 2**64
                for x in shingle_numbers) for k in range(n_perm)]


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 60])
def test_signature_is_the_definition_in_plain_python(n):
    text = passage(random.Random(2), n)
    assert minhash(text, n_perm=32).tolist() == plain_minhash(text.split(), 32)


def test_shuffles_are_permutations_and_differ():
    factors, summands = shuffles(256)
    assert np.all(factors % 2 == 1)  # odd: has an inverse modulo 2**64
    assert all((int(a) * pow(int(a), -1, 2**64)) % 2**64 == 1 for a in factors)
    assert len(set(factors.tolist())) == len(set(summands.tolist())) == 256
    assert np.array_equal(shuffles(8)[0], factors[:8])  # a shorter signature is the head of a longer one


def test_only_words_and_their_order_matter():
    assert np.array_equal(minhash("To be, or NOT to be?"), minhash("to be or not to be"))
    assert not np.array_equal(minhash("not to be or to be"), minhash("to be or not to be"))
    repeated = " ".join(["row row row your boat gently"] * 40)
    assert len(shingles(repeated)) == 6
    assert np.array_equal(minhash(repeated), minhash(repeated + " row row row your boat gently"))  # a set, not a bag


@pytest.mark.parametrize("n_perm", [16, 128, 512])
def test_estimate_is_within_its_standard_error(n_perm):
    texts, pairs, true = related_pairs(3000, seed=n_perm)
    estimate = estimated_jaccard(minhash_batch(texts, n_perm), pairs)
    inside = (true > 0.1) & (true < 0.9)
    error = (estimate - true)[inside] / np.sqrt(true * (1 - true) / n_perm)[inside]
    n = inside.sum()
    assert n > 1500
    assert abs(error.mean()) < 4 / n**0.5           # no bias
    assert abs(error.std() - 1) < 4 / (2 * n)**0.5  # neither wider nor narrower than independent draws
    assert abs(np.mean(np.abs(error) < 2) - 0.954) < 0.03


@given(st.integers(0, 60), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_estimate_of_one_pair_is_near_the_truth(kept, seed):
    generator = random.Random(seed)
    first, second = passage(generator).split(), passage(generator).split()
    texts = [" ".join(first), " ".join(first[:kept] + second[kept:])]
    true = exact_jaccard(texts, np.array([[0, 1]]))[0]
    estimate = estimated_jaccard(minhash_batch(texts, 512), np.array([[0, 1]]))[0]
    assert abs(estimate - true) <= 6 * (true * (1 - true) / 512)**0.5 + 1e-12


def test_the_smallest_shingle_is_a_fair_draw():
    """Each of eight shingles is the first in about an eighth of the shuffles."""
    numbers = hash_shingles(["one two three four five six seven eight nine ten eleven twelve"])[0]
    factors, summands = shuffles(8000)
    first = np.argmin(numbers[None, :] * factors[:, None] + summands[:, None], axis=1)
    counts = np.bincount(first, minlength=len(numbers))
    assert len(counts) == 8
    assert np.sum((counts - 1000)**2 / 1000) < 30  # chi-square with 7 degrees of freedom: p < 0.0001


# --- Banding -----------------------------------------------------------------------------------------

def test_measured_s_curve_is_the_theory():
    texts, pairs, true = related_pairs(6000, seed=3)
    signatures = minhash_batch(texts)
    equal = signatures[pairs[:, 0]] == signatures[pairs[:, 1]]
    for bands, rows in ((64, 2), (21, 6), (8, 16)):
        met = equal[:, :bands * rows].reshape(-1, bands, rows).all(axis=2).any(axis=1)
        expected = candidate_probability(true, bands, rows)
        for low in np.arange(0, 1, 0.1):
            some = (true >= low) & (true < low + 0.1)
            spread = np.sqrt(np.sum(expected[some] * (1 - expected[some]))) + 1
            assert some.sum() > 100
            assert abs(met[some].sum() - expected[some].sum()) < 4 * spread, (bands, rows, low)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("n_perm", [64, 128, 256])
def test_choose_bands_keeps_its_recall_with_the_most_rows(threshold, n_perm):
    bands, rows = choose_bands(threshold, n_perm)
    assert bands * rows <= n_perm
    assert candidate_probability(threshold, bands, rows) >= 0.99
    assert rows == n_perm or all(
        candidate_probability(threshold, n_perm // more, more) < 0.99 for more in range(rows + 1, n_perm + 1))


def test_choose_bands_does_its_best_below_reach():
    assert choose_bands(0.001) == (128, 1)
    assert choose_bands(0.8) == (21, 6)


# --- Groups ------------------------------------------------------------------------------------------

@given(st.integers(1, 30).flatmap(lambda n: st.tuples(
    st.just(n), st.lists(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=20), max_size=4))))
@settings(max_examples=300, deadline=None)
def test_merge_groups_is_union_find(case):
    n, batches = case
    labels, parent = np.arange(n), list(range(n))

    def find(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for batch in batches:
        labels = merge_groups(labels, np.array(batch, dtype=int).reshape(-1, 2))
        for a, b in batch:
            parent[max(find(a), find(b))] = min(find(a), find(b))
    assert labels.tolist() == [find(i) for i in range(n)]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_near_duplicates_against_brute_force(threshold):
    """Precision 1; recall of linked pairs at least 0.99 (the promise of choose_bands, here over 120 families)."""
    documents = graded_documents()
    expected = brute_force_groups(documents, threshold)
    found = near_duplicates(documents, threshold)

    def linked(groups):
        return {pair for group in groups for pair in combinations(sorted(group), 2)}

    assert len(expected) > 5
    assert linked(found) <= linked(expected)
    assert len(linked(found)) >= 0.99 * len(linked(expected))


def test_the_estimate_is_a_little_worse_and_the_bands_alone_much():
    texts, pairs, true = related_pairs(4000, seed=5)
    signatures = minhash_batch(texts)
    bands, rows = choose_bands(0.8)
    equal = signatures[pairs[:, 0]] == signatures[pairs[:, 1]]
    met = equal[:, :bands * rows].reshape(-1, bands, rows).all(axis=2).any(axis=1)
    estimated = met & (equal.mean(axis=1) >= 0.8)
    assert met[true >= 0.8].mean() > 0.99
    assert 0.9 < estimated[true >= 0.8].mean() <= met[true >= 0.8].mean()
    assert np.mean(true[met] >= 0.8) < np.mean(true[estimated] >= 0.8)
    assert np.all(true[estimated] > 0.8 - 6 * 0.035)


def test_every_candidate_is_asked_for_once():
    documents = graded_documents(40)
    texts, signatures, asked = [d.text for d in documents], minhash_batch([d.text for d in documents]), []

    def similarity(pairs):
        asked.extend(tuple(sorted(pair)) for pair in pairs.tolist())
        return exact_jaccard(texts, pairs)

    group_signatures([d.id for d in documents], signatures, 0.8, similarity)
    assert len(asked) > 50
    assert len(asked) == len(set(asked))


def test_ten_thousand_copies_of_one_page_are_no_trouble():
    """All of them share nearly all buckets: all pairs would be fifty million."""
    page, asked = passage(random.Random(7), 300), 0
    texts = [f"{page} page number {i}" for i in range(10_000)]

    def similarity(pairs):
        nonlocal asked
        asked += len(pairs)
        return np.ones(len(pairs))

    (group,) = group_signatures(range(10_000), minhash_batch(texts), 0.8, similarity)
    assert len(group) == 10_000
    assert asked < 30_000


def test_a_chain_is_one_group():
    words = passage(random.Random(8), 100).split()
    chain = []
    for i in range(12):
        words[8 * i] = f"changed{i}"
        chain.append(Document(f"{i:02}", " ".join(words), "made"))
    assert near_duplicates(chain, 0.8) == [{d.id for d in chain}]
    assert near_duplicates([chain[0], chain[-1]], 0.8) == []


def test_texts_without_words_and_short_ones():
    documents = [Document(name, text, "") for name, text in
                 [("a", ""), ("b", "  "), ("c", "To be"), ("d", "to be!"), ("e", "\U0001f600"), ("f", "\U0001f680"),
                  ("g", "be to")]]
    assert near_duplicates(documents) == [{"a", "b"}, {"c", "d"}]
    assert near_duplicates([]) == []
    assert near_duplicates(documents[:1]) == []


def test_the_threshold_itself_is_included():
    words = [f"w{i}" for i in range(49)]
    other = [*words[:24], "changed", *words[25:]]
    pair = [Document("a", " ".join(words), ""), Document("b", " ".join(other), "")]
    assert jaccard(shingles(pair[0].text), shingles(pair[1].text)) == 0.8
    assert near_duplicates(pair, 0.8) == [{"a", "b"}]
    assert near_duplicates(pair, 0.81) == []


# --- Determinism and memory --------------------------------------------------------------------------

def test_groups_do_not_depend_on_the_order():
    documents = graded_documents(60, seed=9)
    expected = near_duplicates(documents)
    signatures = {d.id: row for d, row in zip(documents, minhash_batch([d.text for d in documents]), strict=True)}
    by_estimate = group_signatures(list(signatures), np.array(list(signatures.values())))
    for seed in range(3):
        shuffled = random.Random(seed).sample(documents, len(documents))
        assert near_duplicates(shuffled) == expected
        ids = [d.id for d in shuffled]
        assert group_signatures(ids, np.array([signatures[i] for i in ids])) == by_estimate


def test_signatures_are_the_same_in_another_process_with_another_hash_seed():
    program = ("from ch01_data.data import minhash_batch\n"
               "print(minhash_batch(['To be, or not to be, that is the question', '', 'Gerda'], 4).tolist())")
    outputs = {subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    here = minhash_batch(["To be, or not to be, that is the question", "", "Gerda"], 4).tolist()
    assert outputs == {f"{here}\n"}


def test_the_signature_of_a_known_text_never_changes():
    """Pipelines store signatures, so these values (computed by ``plain_minhash``) are part of a format."""
    words = ["to", "be", "or", "not", "to", "be", "that", "is", "the", "question"]
    assert plain_minhash(words, 3) == KNOWN_SIGNATURE
    assert minhash("To be, or not to be, that is the question", 3).tolist() == KNOWN_SIGNATURE


KNOWN_SIGNATURE = [835086911689819, 3557759988533453303, 7362536289271391415]


def test_memory_is_linear():
    def peak(n):
        generator = random.Random(11)
        documents = [Document(str(i), passage(generator, 50), "") for i in range(n)]
        tracemalloc.start()
        near_duplicates(documents)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small, large = peak(4000), peak(8000)
    assert large < 2.1 * small
    assert large < 8000 * 1.5 * 1024 + 8e6  # a signature is one kilobyte


def test_a_batch_of_one_long_text_needs_no_table_of_all_shuffles():
    text = passage(random.Random(12), 200_000)
    tracemalloc.start()
    minhash(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 * 8 * 30  # a table of 128 shuffles would be 200 MB


# --- Bad input ---------------------------------------------------------------------------------------

TWO = [Document("a", "x", ""), Document("b", "y", "")]


@pytest.mark.parametrize(("call", "error", "parts"), [
    (lambda: near_duplicates(TWO, threshold=1.5), ValueError, ["1.5", "above 0 and at most 1", "for instance 0.8"]),
    (lambda: near_duplicates(TWO, threshold=0), ValueError, ["threshold is 0", "above 0"]),
    (lambda: near_duplicates(TWO, threshold=80), ValueError, ["80", "at most 1"]),
    (lambda: near_duplicates(TWO, n_perm=0), ValueError, ["n_perm is 0", "at least 1"]),
    (lambda: near_duplicates(TWO, shingle=-2), ValueError, ["shingle is -2", "at least 1"]),
    (lambda: near_duplicates([*TWO, TWO[0]]), ValueError, ["'a'", "2 times", "id of its own"]),
    (lambda: exact_duplicates([*TWO, TWO[0]]), ValueError, ["'a'", "2 times", "id of its own"]),
    (lambda: minhash("x", n_perm=0), ValueError, ["n_perm is 0"]),
    (lambda: minhash("x", shingle=0), ValueError, ["shingle is 0"]),
    (lambda: shingles("x", 0), ValueError, ["shingle is 0"]),
    (lambda: minhash_batch("a text"), TypeError, ["list of texts", "one str", "[text]"]),
    (lambda: choose_bands(0.8, 0), ValueError, ["n_perm is 0"]),
    (lambda: group_signatures(["a"], minhash_batch(["x", "y"])), ValueError, ["(2, 128)", "1 ids", "minhash_batch"]),
    (lambda: group_signatures(["a"], minhash("x")), ValueError, ["(128,)", "(1, n_perm)"]),
    (lambda: group_signatures(["a", "a"], minhash_batch(["x", "y"])), ValueError, ["1 of 2", "id of its own"]),
])
def test_bad_input(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
