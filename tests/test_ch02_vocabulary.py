"""Deep dive "Choosing a vocabulary": the token explorer, smaller vocabularies, a fair measure, odd tokens."""

import io
import math
import re
import unicodedata
import warnings
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import FancyBboxPatch

from ch02_tokenizer import vocabulary
from ch02_tokenizer.tokenizer import END_OF_TEXT, SMOLLM2_PATTERN, BPETokenizer, train_bpe
from ch02_tokenizer.vocabulary import (
    MAX_CHARACTERS,
    MAX_LINES,
    MAX_TOKENS,
    Piece,
    bigram_bits,
    draw_token_rows,
    explore_tokens,
    first_merges,
    lay_out,
    odd_tokens,
    picture_label,
    render_tokens,
    token_pieces,
    visible,
    witten_bell,
)

TEXT = ("the little duckling 1842 and the little swan 1843, the ducks, the swans\n" * 4 + "小鸭子小鸭子 øl øl "
        "every morning the old stork walked about on his long red legs, chattering in a language that nobody knew")
VOCAB, MERGES = train_bpe(TEXT, 320)
TOKENIZER = BPETokenizer(VOCAB, MERGES, [END_OF_TEXT])
ONE = {"one": TOKENIZER}
LACKING = BPETokenizer({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")])  # two of 256 bytes
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


# ---------------------------------------------------------------- pieces


@given(anything)
def test_pieces_are_the_tokens_and_their_bytes_are_the_text(text):
    pieces = token_pieces(TOKENIZER, text, special=False)
    assert [piece.id for piece in pieces] == TOKENIZER.encode(text, allow_special=False)
    assert b"".join(piece.raw for piece in pieces) == text.encode("utf-8")


def test_a_part_of_a_character_says_of_which():
    pieces = token_pieces(TOKENIZER, "a 🦆b")
    assert [(p.label, p.part_of) for p in pieces[-5:]] == [
        ("f0", "🦆"), ("9f", "🦆"), ("a6", "🦆"), ("86", "🦆"), ("b", "")]
    assert token_pieces(BPETokenizer.gpt2(), " 🦆")[0] == Piece(12520, b" \xf0\x9f", "20 f0 9f", "␣🦆")


def test_special_tokens_are_one_piece_or_ordinary_characters():
    assert [p.label for p in token_pieces(TOKENIZER, "a" + END_OF_TEXT)] == ["a", END_OF_TEXT]
    assert len(token_pieces(TOKENIZER, END_OF_TEXT, special=False)) > 1
    assert render_tokens(END_OF_TEXT, ONE, special=True) != render_tokens(END_OF_TEXT, ONE, special=False)


@given(anything)
def test_nothing_stays_invisible(text):
    assert not any(unicodedata.category(character)[0] in "CZ" for character in visible(text))


@pytest.mark.parametrize(("text", "shown"), [
    (" a\n\t\r", "␣a↵⇥␍"), ("\u200b\u00a0", "[U+200B][U+00A0]"), ("\u0301", "◌\u0301"), ("e\u0301", "e\u0301"),
])
def test_signs_for_the_invisible(text, shown):
    assert visible(text) == shown


# ---------------------------------------------------------------- HTML


class Balanced(HTMLParser):
    """Collects text and styles; fails if tags do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.styles, self.text = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.styles.append(dict(attributes).get("style") or "")
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_shows_every_token_with_id_and_bytes():
    page = Balanced(render_tokens("the ducks", ONE))
    for piece in token_pieces(TOKENIZER, "the ducks"):
        assert {piece.label, str(piece.id), piece.raw.hex(" ")} <= set(page.text)
    assert "2 tokens, 9 bytes, 4.50 bytes per token" in "".join(page.text)


@given(anything | st.sampled_from(["<script>alert(1)</script>", "<b>&amp;\"'", "]]><!--"]))
def test_what_is_typed_stays_text(text):
    page = Balanced(render_tokens(text, {"<i>name</i>": TOKENIZER, "lacking <b>": LACKING}))
    assert set(page.tags) <= {"div", "p", "b", "span", "br", "small"}
    assert "<i>name</i>: " in "".join(page.text) and "lacking <b>" in "".join(page.text)


def test_a_token_that_looks_like_html_is_escaped():
    page = render_tokens("a<img src=x>", {"one": BPETokenizer(VOCAB, MERGES, ["<img src=x>"])})
    assert "<img" not in page and "&lt;img" in page


def test_colours_come_in_pairs_and_are_not_alone():
    page = Balanced(render_tokens("the duck 🦆", ONE))
    for style in page.styles:
        assert ("background" in style) == bool(re.search(r"(^|;)color:", style))
    assert any("dashed" in style for style in page.styles) and any("1px solid" in style for style in page.styles)
    assert "part of 🦆" in "".join(page.text)


def test_long_texts_are_cut_with_a_note():
    page = render_tokens("鴨" * (MAX_CHARACTERS + 1), ONE)
    assert "The text has 1,001 characters; the first 1,000 are shown. Use tokenizer.encode" in page
    assert page.count("listitem") == MAX_TOKENS and f"and {3 * MAX_CHARACTERS - MAX_TOKENS:,} more" in page
    assert "are shown" not in render_tokens("a" * MAX_CHARACTERS, ONE)


def test_a_tokenizer_that_cannot_encode_says_why_in_its_row():
    page = render_tokens("abc", {"lacking": LACKING, "one": TOKENIZER})
    assert "Byte 0x63 of &#x27;abc&#x27; has no token in this vocabulary" in page and "one</b>: 3 tokens" in page
    assert "surrogates not allowed" in render_tokens("\ud800", ONE)


def test_an_empty_text_has_no_boxes():
    assert "listitem" not in render_tokens("", ONE) and "0 tokens, 0 bytes" in render_tokens("", ONE)


# ---------------------------------------------------------------- picture


def boxes(fig):
    return [patch.get_path().get_extents() for patch in fig.axes[0].patches if isinstance(patch, FancyBboxPatch)]


@pytest.mark.parametrize("text", [
    "", "the ducks", "小鸭子 🦆 ठंड", "سبح فرخ", "הברווזון", "cost $5 and $x^2$ \\alpha", "\x00\x07\ud7a3", "a" * 5000,
])
def test_the_picture_draws_anything_without_warnings(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = draw_token_rows(text, {"one": TOKENIZER, "lacking": LACKING})
        fig.savefig(io.BytesIO(), format="png")
    assert fig.get_figheight() < 12
    assert not any(drawn.get_parse_math() for drawn in fig.axes[0].texts)  # a dollar is a dollar


def test_the_picture_has_a_box_for_each_token_inside_its_frame():
    fig = draw_token_rows(TEXT[:60], ONE)
    extents, axes = boxes(fig), fig.axes[0]
    assert len(extents) == len(token_pieces(TOKENIZER, TEXT[:60]))
    for box in extents:
        assert axes.get_xlim()[0] <= box.x0 and box.x1 <= axes.get_xlim()[1] + 0.01
        assert box.y0 >= 0 and box.y1 <= axes.get_ylim()[0]
    drawn = " ".join(text.get_text() for text in axes.texts)
    assert all(piece.raw.hex() in drawn and str(piece.id) in drawn for piece in token_pieces(TOKENIZER, TEXT[:60]))


@pytest.mark.parametrize("name", ["i", "x" * 8, "鴨" * 10, "a" * 40])
def test_the_picture_does_not_cut_a_tokens_bytes(name):
    fig = draw_token_rows(name, {"one": BPETokenizer(VOCAB, MERGES, [name])})
    assert name.encode().hex() in [text.get_text() for text in fig.axes[0].texts]


@given(anything)
def test_boxes_do_not_overlap_and_keep_their_order(text):
    rows = lay_out(token_pieces(TOKENIZER, text), 60)
    for (line, left, width, _), (next_line, next_left, _, _) in pairwise(rows):
        assert (next_line, next_left) > (line, left)
        assert next_line > line or next_left >= left + width
    assert all(left + width <= 60 for _, left, width, _ in rows)


def test_a_long_text_is_cut_in_the_picture_too():
    fig = draw_token_rows("鴨" * 900, ONE)
    assert len({round(box.y0, 3) for box in boxes(fig)}) == MAX_LINES
    assert "are shown)" in fig.axes[0].texts[-1].get_text() + fig.axes[0].texts[-2].get_text()


@pytest.mark.parametrize(("label", "raw", "shown"), [
    ("øl", "øl".encode(), "øl"), ("鴨", "鴨".encode(), "e9 b4 a8"), ("سبح", "سبح".encode(), "d8 b3 d8 a8 d8 ad"),
])
def test_what_the_font_cannot_write_is_shown_as_bytes(label, raw, shown):
    assert picture_label(Piece(1, raw, label)) == shown


def test_the_explorer_passes_the_choice_on(monkeypatch):
    called = {}
    monkeypatch.setattr(vocabulary, "explore", lambda render, controls, **rest: called.update(
        rest, html=render(**{c.name: c.value or c.options[0] for c in controls}),
        other=render(text=controls[0].value, special=controls[1].options[1]), controls=controls))
    explore_tokens(ONE, "a" + END_OF_TEXT)
    assert called["html"] == render_tokens("a" + END_OF_TEXT, ONE, True)
    assert called["other"] == render_tokens("a" + END_OF_TEXT, ONE, False) and "one" in called["alt"]


def test_the_explorer_runs_as_it_is():
    explore_tokens(ONE, "the duck 🦆")


# ---------------------------------------------------------------- smaller vocabularies


@pytest.mark.parametrize("size", [256, 257, 300, 320])
def test_first_merges_are_the_smaller_training(size):
    smaller = first_merges(MERGES, size)
    assert (smaller.vocab, smaller.merges) == train_bpe(TEXT, size)
    assert smaller.decode(smaller.encode(TEXT)) == TEXT


@pytest.mark.parametrize("size", [255, 321])
def test_first_merges_out_of_range(size):
    with pytest.raises(ValueError, match=f"vocab_size is {size}; with 64 merges it can be 256 to 320. Train with"):
        first_merges(MERGES, size)


# ---------------------------------------------------------------- a fair measure


def slow_bits(train, targets, vocab_size):
    """The same model from dictionaries, one token at a time."""
    single, pairs = Counter(train), Counter(pairwise(train))
    bits = []
    for before, after in pairwise(targets):
        p_single = (single[after] + len(single) / vocab_size) / (len(train) + len(single))
        kinds = max(sum(a == before for a, _ in pairs), 1)
        followed = sum(n for (a, _), n in pairs.items() if a == before)
        bits.append(-math.log2((pairs[before, after] + kinds * p_single) / (followed + kinds)))
    return bits


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.lists(st.integers(0, 6), min_size=2, max_size=20))
def test_bigram_bits_equal_the_slow_way(train, targets):
    np.testing.assert_allclose(bigram_bits(train, targets, 7), slow_bits(train, targets, 7))


@pytest.mark.parametrize(("count", "kinds", "p"), [(0, 1, 0.01 / 11), (10, 1, 10.01 / 11), (0, 10, 0.1 / 20)])
def test_witten_bell_gives_the_simpler_model_as_much_weight_as_there_were_kinds(count, kinds, p):
    assert witten_bell(count, 10, kinds, 0.01) == pytest.approx(p)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 8))
def test_probabilities_add_up_to_one(train, before):
    every = np.stack([np.full(9, before), np.arange(9)], axis=1).ravel()
    assert np.sum(2.0 ** -bigram_bits(train, every, 9)[::2]) == pytest.approx(1)


def test_bits_of_a_text_that_repeats_itself_go_to_zero():
    assert bigram_bits([0, 1] * 5000, [0, 1] * 50, 2).mean() < 0.001


@pytest.mark.parametrize(("train", "targets", "message"), [
    ([0], [0, 1], "train has 1 tokens and targets 2; a pair needs 2 in each"),
    ([0, 1], [], "train has 2 tokens and targets 0"),
    ([0, 9], [0, 1], "There is an id 9; with vocab_size 9 they end at 8. Was the text encoded with a larger"),
])
def test_bigram_bits_of_bad_input(train, targets, message):
    with pytest.raises(ValueError, match=message):
        bigram_bits(train, targets, 9)


# ---------------------------------------------------------------- odd tokens


def test_odd_tokens_of_a_healthy_vocabulary_are_partial_only():
    odd = odd_tokens(TOKENIZER)
    assert odd["unreachable"] == []
    halves = [TOKENIZER.vocab[i] for i in odd["partial"]]
    assert halves and all(len(half) > 1 and "\ufffd" in half.decode("utf-8", "replace") for half in halves)


def test_another_pattern_makes_tokens_unreachable():
    changed = odd_tokens(BPETokenizer(VOCAB, MERGES, pattern=SMOLLM2_PATTERN))
    unreachable = {VOCAB[i] for i in changed["unreachable"]}
    digits = {token for token in VOCAB.values() if len(token) > 1 and re.search(rb"\d", token)}
    assert digits and digits <= unreachable


def test_a_token_added_by_hand_is_unreachable():
    by_hand = BPETokenizer(VOCAB | {320: b" swanling"}, MERGES)
    assert odd_tokens(by_hand)["unreachable"] == [320]


def test_special_tokens_are_not_odd():
    assert TOKENIZER.special_tokens[END_OF_TEXT] not in sum(odd_tokens(TOKENIZER).values(), [])
