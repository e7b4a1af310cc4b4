"""Deep dive: Choosing a vocabulary.

Written from ch02_tokenizer/vocabulary.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "first_merges",
    "witten_bell",
    "bigram_bits",
    "odd_tokens",
    "SIGNS",
    "Piece",
    "visible",
    "token_pieces",
    "MAX_CHARACTERS",
    "MAX_TOKENS",
    "COLORS",
    "BOX",
    "token_box",
    "limited",
    "summary",
    "render_tokens",
    "UNIT",
    "LINE",
    "MAX_LINES",
    "picture_font",
    "drawable",
    "picture_label",
    "picture_line",
    "lay_out",
    "draw_box",
    "draw_token_rows",
    "AS_ID",
    "AS_TEXT",
    "course_tokenizers",
    "explore_tokens",
]

from ch02_tokenizer.tokenizer import BPETokenizer, prepare_tokens


def first_merges(merges: list[tuple[bytes, bytes]], vocab_size: int) -> BPETokenizer:
    """The smaller tokenizer inside a larger one: the 256 bytes and the first merges.

    ``ValueError`` if ``vocab_size`` is below 256 or above 256 + the number of merges.
    """
    if not 256 <= vocab_size <= 256 + len(merges):
        raise ValueError(f"vocab_size is {vocab_size}; with {len(merges)} merges it can be 256 to "
                         f"{256 + len(merges)}. Train with a larger vocab_size to get more merges.")
    merges = merges[:vocab_size - 256]
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
    return BPETokenizer(dict(enumerate(tokens)), merges)


import numpy as np


def witten_bell(counts, totals, kinds, simpler):
    """Counts mixed with a simpler model's probabilities: (counts + kinds * simpler) / (totals + kinds)."""
    return (counts + kinds * simpler) / (totals + kinds)


def bigram_bits(train: np.ndarray, targets: np.ndarray, vocab_size: int) -> np.ndarray:
    """Bits that a bigram model, counted on ``train``, needs for each of ``targets`` but the first.

    Arrays of ids (N,) and (M,) -> (M - 1,). Interpolated with single counts and these with a uniform
    distribution (Witten and Bell 1991, method C). ``ValueError`` for an id from ``vocab_size`` on.
    """
    train, targets = np.asarray(train, np.int64), np.asarray(targets, np.int64)
    if min(len(train), len(targets)) < 2:
        raise ValueError(f"train has {len(train)} tokens and targets {len(targets)}; a pair needs 2 in each.")
    if (largest := max(train.max(), targets.max())) >= vocab_size:
        raise ValueError(f"There is an id {largest}; with vocab_size {vocab_size} they end at "
                         f"{vocab_size - 1}. Was the text encoded with a larger vocabulary?")
    single = np.bincount(train, minlength=vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    followed = np.bincount(train[:-1], minlength=vocab_size)         # how often a token has a successor
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)   # how many different ones

    before, after = targets[:-1], targets[1:]
    wanted = before * vocab_size + after
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    p_single = witten_bell(single[after], len(train), np.count_nonzero(single), 1 / vocab_size)
    return -np.log2(witten_bell(count, followed[before], np.maximum(kinds[before], 1), p_single))


def odd_tokens(tokenizer: BPETokenizer) -> dict[str, list[int]]:
    """Ids of ``partial`` tokens, not whole characters, and ``unreachable`` ones, whose text gives other ids.

    Special tokens and single bytes are left out. Land and Bartolo 2024 (arXiv:2405.05417).
    """
    odd: dict[str, list[int]] = {"partial": [], "unreachable": []}
    special = set(tokenizer.special_tokens.values())
    for i, token in tokenizer.vocab.items():
        if i in special or len(token) == 1:
            continue
        try:
            if tokenizer.encode_ordinary(token.decode("utf-8")) != [i]:
                odd["unreachable"].append(i)
        except UnicodeDecodeError:
            odd["partial"].append(i)
    return odd


import unicodedata
from dataclasses import dataclass

SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Piece:
    """One token of a text: its id, its bytes, and ``label``, which shows them."""

    id: int
    raw: bytes
    label: str
    part_of: str = ""  # the characters that it belongs to, if it is not whole characters itself


def visible(text: str) -> str:
    """Text in which nothing is hidden: spaces, line ends and control characters get signs or code points."""
    shown = []
    for character in text:
        kind = unicodedata.category(character)
        if character in SIGNS:
            shown.append(SIGNS[character])
        elif kind[0] in "CZ":                # control, format, private, surrogate, unassigned; other spaces
            shown.append(f"[U+{ord(character):04X}]")
        elif kind[0] == "M" and not shown:   # a mark that sits on nothing gets a circle to sit on
            shown.append("◌" + character)
        else:
            shown.append(character)
    return "".join(shown)


def token_pieces(tokenizer: BPETokenizer, text: str, special: bool = True) -> list[Piece]:
    """The tokens of a text, in order; ``special=False`` takes special tokens in it as ordinary characters."""
    owners = [character for character in text for _ in character.encode("utf-8")]  # of each byte
    pieces, start = [], 0
    for i in tokenizer.encode(text, allow_special=special):
        raw = tokenizer.decode_bytes([i])
        try:
            pieces.append(Piece(i, raw, visible(raw.decode("utf-8"))))
        except UnicodeDecodeError:
            part_of = "".join(dict.fromkeys(owners[start:start + len(raw)]))
            pieces.append(Piece(i, raw, raw.hex(" "), visible(part_of)))
        start += len(raw)
    return pieces


from html import escape

MAX_CHARACTERS = 1000  # longer texts are cut before they are shown
MAX_TOKENS = 250       # in one row
COLORS = ["#cfe5f3", "#fbe0cc", "#d9f0e3"]  # boxes, in turn; all with black text

BOX = ("display:inline-block;margin:2px;padding:2px 5px;border-radius:4px;text-align:center;"
       "vertical-align:top;max-width:100%;overflow-wrap:anywhere;"
       "color:#111;background:{color};border:{border} #444;")


def token_box(piece: Piece, number: int) -> str:
    """One token as HTML: label, id and bytes in a box."""
    border = "2px dashed" if piece.part_of else "1px solid"
    style = BOX.format(color=COLORS[number % len(COLORS)], border=border)
    label = f'<b style="font:bold 15px monospace">{escape(piece.label)}</b>'
    part = f"<br><small>part of {escape(piece.part_of)}</small>" if piece.part_of else ""
    return (f'<span role="listitem" style="{style}">{label}{part}<br><span style="font-size:11px">{piece.id}'
            f'</span><br><span style="font:10px monospace">{piece.raw.hex(" ")}</span></span>')


def limited(text: str) -> tuple[str, str]:
    """The text, cut if it is very long, and a note that says so."""
    if len(text) <= MAX_CHARACTERS:
        return text, ""
    return text[:MAX_CHARACTERS], (f"The text has {len(text):,} characters; the first {MAX_CHARACTERS:,} are "
                                   "shown. Use tokenizer.encode for longer ones.")


def summary(pieces: list[Piece]) -> str:
    """How many tokens for how many bytes."""
    n_bytes = sum(len(piece.raw) for piece in pieces)
    counted = [f"{n:,} {noun}{'s' * (n != 1)}" for n, noun in ((len(pieces), "token"), (n_bytes, "byte"))]
    rate = [f"{n_bytes / len(pieces):.2f} bytes per token"] if pieces else []
    return ", ".join(counted + rate)


def render_tokens(text: str, tokenizers: dict[str, BPETokenizer], special: bool = True) -> str:
    """Each tokenizer's tokens of a text, as HTML: a heading and a row of boxes for each."""
    text, note = limited(text)
    html = [f"<p><i>{escape(note)}</i></p>"] if note else []
    for name, tokenizer in tokenizers.items():
        try:
            pieces = token_pieces(tokenizer, text, special)
        except ValueError as error:
            html.append(f"<p><b>{escape(name)}</b>: {escape(str(error))}</p>")
            continue
        boxes = "".join(token_box(piece, n) for n, piece in enumerate(pieces[:MAX_TOKENS]))
        more = f" … and {len(pieces) - MAX_TOKENS:,} more" if len(pieces) > MAX_TOKENS else ""
        html.append(f"<p style='margin:8px 0 2px'><b>{escape(name)}</b>: {summary(pieces)}</p>"
                    f'<div role="list" aria-label="Tokens of {escape(name)}">{boxes}</div>{more}')
    return f'<div style="max-width:100%">{"".join(html)}</div>'


from functools import cache
from textwrap import shorten

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import FancyBboxPatch

from utils.plots import figure

UNIT = 0.105        # width of one letter in inches
LINE = 0.62         # height of a line of boxes
MAX_LINES = 8       # of boxes in one row of the picture


@cache
def picture_font() -> FT2Font:
    """The font of the picture, which comes with matplotlib."""
    return FT2Font(font_manager.findfont("DejaVu Sans Mono"))


def drawable(text: str) -> bool:
    """Whether the picture's font has every sign, and none of a script written from the right."""
    return all(picture_font().get_char_index(ord(character)) for character in text) and not any(
        unicodedata.bidirectional(character) in ("R", "AL") for character in text)


def picture_label(piece: Piece) -> str:
    """The label, or the bytes if the label cannot be drawn correctly."""
    return piece.label if drawable(piece.label) else piece.raw.hex(" ")


def picture_line(text: str) -> str:
    """A line for the picture: shortened to its width, with a box for each sign that cannot be drawn."""
    line = shorten(visible(text).replace("␣", " "), 105, placeholder=" …")
    return "".join(character if drawable(character) else "□" for character in line)


def lay_out(pieces: list[Piece], columns: int) -> list[tuple[int, int, int, Piece]]:
    """Boxes in lines, as (line, left, width, piece); all but the piece are counted in letters or lines."""
    boxes, line, left = [], 0, 0
    for piece in pieces:
        width = max(len(picture_label(piece)), len(str(piece.id)) * 0.75, len(piece.raw) * 1.2) + 0.8
        if left and left + width > columns:
            line, left = line + 1, 0
        boxes.append((line, left, min(width, columns), piece))
        left += width + 0.3
    return boxes


def draw_box(axes, line: float, left: float, width: float, piece: Piece, color: str) -> None:
    """One token in the picture: label, id, bytes."""
    axes.add_patch(FancyBboxPatch((left, line), width, 0.86, boxstyle="round,pad=0,rounding_size=0.12",
                                  facecolor=color, edgecolor="#444444", linewidth=0.9,
                                  linestyle="--" if piece.part_of else "-"))
    rows = (0.27, picture_label(piece), 11), (0.53, str(piece.id), 8), (0.73, piece.raw.hex(), 7)
    for height, text, size in rows:
        fits = int(width * 12 / size)
        axes.text(left + width / 2, line + height, text if len(text) <= fits else text[:fits - 1] + "…",
                  ha="center", va="center", fontsize=size, color="#111111", family="DejaVu Sans Mono",
                  parse_math=False)


def draw_token_rows(text: str, tokenizers: dict[str, BPETokenizer], special: bool = True,
                    width: float = 7.2) -> Figure:
    """Each tokenizer's tokens of a text, as a picture ``width`` inches wide."""
    text, note = limited(text)
    columns, bottom, boxes, headings = int(width / UNIT) - 1, 0.0, [], []
    for name, tokenizer in tokenizers.items():
        try:
            pieces = token_pieces(tokenizer, text, special)
            heading, rows = f"{name}: {summary(pieces)}", lay_out(pieces, columns)
        except ValueError as error:
            heading, rows = f"{name}: {error}", []
        shown = [box for box in rows if box[0] < MAX_LINES]
        cut = f" (the first {len(shown)} are shown)" if len(shown) < len(rows) else ""
        headings.append((bottom + 0.32, heading + cut))
        boxes += [(bottom + 0.5 + line, *rest, COLORS[n % len(COLORS)])
                  for n, (line, *rest) in enumerate(shown)]
        bottom += 0.62 + (shown[-1][0] + 1 if shown else 0)
    fig, axes = figure(width=width, height=max(bottom + 0.3 * bool(note), 1) * LINE)
    for box in boxes:
        draw_box(axes, *box)
    for height, heading in headings + ([(bottom + 0.2, note)] if note else []):
        axes.text(0, height, picture_line(heading), fontsize=9, va="baseline", parse_math=False)
    axes.set(xlim=(-0.2, columns + 0.8), ylim=(max(bottom + 0.3 * bool(note), 1), 0))
    axes.set_axis_off()
    return fig


from utils.widgets import Choice, Text, explore

AS_ID, AS_TEXT = "one token", "ordinary characters"


def course_tokenizers() -> dict[str, BPETokenizer]:
    """The three tokenizers of the course by name: ours for the tales, GPT-2's and SmolLM2's."""
    return {"ours (2,048)": prepare_tokens().tokenizer, "GPT-2": BPETokenizer.gpt2(),
            "SmolLM2": BPETokenizer.smollm2()}


def explore_tokens(tokenizers: dict[str, BPETokenizer] | None = None,
                   text: str = "The ugly duckling 🦆") -> None:
    """A field to type into, and the tokens of what is typed; a picture of ``text`` where no kernel runs."""
    tokenizers = tokenizers or course_tokenizers()
    explore(lambda text, special: render_tokens(text, tokenizers, special == AS_ID),
            [Text("text", "Text", value=text), Choice("special", "<|endoftext|> is", [AS_ID, AS_TEXT])],
            picture=lambda text, special: draw_token_rows(text, tokenizers, special == AS_ID),
            alt=f"The text {text!r} cut into tokens by {', '.join(tokenizers)}: one row of boxes for each, "
                "with the id and the bytes of every token.")
