"""Chapter 2 against its peers: learning a vocabulary, encoding with one, and how the cost of both grows."""

import random
import string
from collections import deque
from functools import cache
from itertools import cycle

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ch01_data.data import load_documents
from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer, count_words, learn_merges, train_bpe
from tests.bench_limits import limit
from utils.bench import COURSE, Aim, Growth, Row
from utils.workspace import workspace, write_text

VOCAB_SIZE = 4096


def rows(quick: bool = False) -> list[Row | Growth]:
    """What ``course.py bench tokenizer`` measures; with ``quick``, the same on a fraction of the text."""
    size, more = (200_000, 400_000) if quick else (5_000_000, 10_000_000)
    sizes = [2e5, 4e5] if quick else [1e6, 4e6, 16e6, 64e6]
    vocabularies = [512, 768] if quick else [1024, 2048, 4096, 8192, 16384]
    here = __name__
    return [
        Row("Train byte-level BPE to 4,096 tokens", here,
            {COURSE: "train_ours", "tokenizers, by document": "train_by_document",
             "tokenizers, by line": "train_by_line", "tokenizers, from a file": "train_from_file"},
            size, size / 1e6, "MB", [Aim("times", 2.0), Aim("cpu times", 2.0)],
            {"cutting the text into words by regular expression": limit("scan", size)}),
        Row("Encode with that vocabulary", here,
            {COURSE: "encode_ours", f"{COURSE}, to_tiktoken": "encode_tiktoken", "tokenizers": "encode_peer",
             "tokenizers, batch": "encode_peer_batch"}, more, more / 1e6, "MB", [Aim("rate", 2.0)],
            {"cutting the text into words by regular expression": limit("scan", more)}),
        Row("Encode with GPT-2's vocabulary", here,
            {f"{COURSE}, to_tiktoken": "gpt2_by_course", "tiktoken": "gpt2_by_tiktoken",
             "tokenizers": "gpt2_by_tokenizers"}, more, more / 1e6, "MB",
            [Aim("times", 0.95, f"{COURSE}, to_tiktoken")],
            {"cutting the text into words by regular expression": limit("scan", more)}),
        Growth("Training and encoding, by the size of the text", here,
               {"train to 4,096": "train_on", "encode": "encode_all"}, sizes, "bytes",
               {"train to 4,096": 1.0, "encode": 1.0}),
        Growth("Training on 5 MB, by the number of merges", here, {"merges alone": "merge_to"}, vocabularies, "tokens",
               {"merges alone": 1.0}),
        Growth("Encoding a stream of texts that nobody keeps, the same 5 MB again and again", here,
               {"encode_iterable": "encode_stream"}, sizes, "bytes",
               {"encode_iterable": 1.0}, flat_memory=True),
    ]


@cache
def texts(size: int) -> tuple[str, ...]:
    """The first ``size`` bytes or so of Shakespeare's plays and poems, Andersen's tales, and the First Folio.

    That is 12 MB; what goes beyond are the same texts with their letters exchanged, another exchange each time.
    Such words have not been seen before, as most new words of a longer text have, and more of them are new than
    in any real text.
    """
    documents = [document for source in ("shakespeare", "andersen", "folio") for document in load_documents(source)]
    taken, left, letters, generator = [], size, {}, random.Random(0)
    while left > 0:
        for document in documents:
            taken.append(document.text[:max(left, 0)].translate(letters))
            left -= len(taken[-1].encode())
        exchanged = generator.sample(string.ascii_lowercase, 26)
        letters = str.maketrans(string.ascii_lowercase, "".join(exchanged))
    return tuple(text for text in taken if text)


# ---------------------------------------------------------------- training


def train_ours(size):
    text = texts(size)
    return lambda: train_bpe(text, VOCAB_SIZE)


def peer():
    """An untrained tokenizer of the library, set to the rules of this course: GPT-2's cuts, all bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainer


def train_peer(pieces):
    def run():
        tokenizer, trainer = peer()
        tokenizer.train_from_iterator(pieces, trainer)
        return tokenizer
    return run


def train_by_document(size):
    return train_peer(texts(size))


def train_by_line(size):
    return train_peer([line for text in texts(size) for line in text.splitlines(keepends=True)])


def train_from_file(size):
    """As the library's own introduction does it: the trainer is given the name of a file."""
    path = workspace("bench") / f"text-{size}.txt"
    write_text(path, "".join(texts(size)))

    def run():
        tokenizer, trainer = peer()
        tokenizer.train([str(path)], trainer)
        return tokenizer
    return run


# ---------------------------------------------------------------- encoding


def ours(size):
    """A tokenizer of this course, trained on half of the text once and kept in the workspace."""
    path = workspace("bench") / f"tokenizer-{size}.json"
    if not path.exists():
        BPETokenizer.train(texts(size // 2), VOCAB_SIZE, [END_OF_TEXT]).save(path)
    return BPETokenizer.load(path), path


def encode_ours(size):
    text = texts(size)
    _, path = ours(size)

    def run():
        tokenizer = BPETokenizer.load(path)  # a fresh one, so that no word has been seen before
        return [tokenizer.encode(piece, allow_special=False) for piece in text]
    return run


def encode_tiktoken(size):
    text = texts(size)
    encoding = ours(size)[0].to_tiktoken()
    return lambda: [encoding.encode_ordinary(piece) for piece in text]


def encode_peer(size):
    text = texts(size)
    tokenizer = Tokenizer.from_file(str(ours(size)[1]))
    return lambda: [tokenizer.encode(piece).ids for piece in text]


def encode_peer_batch(size):
    text = list(texts(size))
    tokenizer = Tokenizer.from_file(str(ours(size)[1]))
    return lambda: [encoded.ids for encoded in tokenizer.encode_batch(text)]


def gpt2_by_course(size):
    text, encoding = texts(size), BPETokenizer.gpt2().to_tiktoken()
    return lambda: [encoding.encode_ordinary(piece) for piece in text]


def gpt2_by_tiktoken(size):
    """The library as it comes, from files whose bytes are OpenAI's."""
    tokenizer = BPETokenizer.gpt2()  # which also puts the files where tiktoken looks for them
    text, encoding = texts(size), tiktoken.get_encoding("gpt2")
    if encoding.encode_ordinary(text[0]) != tokenizer.encode(text[0], allow_special=False):
        raise ValueError("tiktoken and the course's tokenizer differ on the first text.")
    return lambda: [encoding.encode_ordinary(piece) for piece in text]


def gpt2_by_tokenizers(size):
    path = workspace("bench") / "gpt2.json"
    BPETokenizer.gpt2().save(path)
    text, tokenizer = texts(size), Tokenizer.from_file(str(path))
    return lambda: [tokenizer.encode(piece, add_special_tokens=False).ids for piece in text]


# ---------------------------------------------------------------- growth


def train_on(size):
    text = texts(round(size))
    return lambda: train_bpe(text, VOCAB_SIZE)


def merge_to(vocab_size):
    """Learning so many tokens, the words counted beforehand."""
    counts = count_words(texts(5_000_000 if vocab_size >= 1024 else 200_000))
    return lambda: learn_merges(counts, vocab_size - 256)


def encode_all(size):
    text, (_, path) = texts(round(size)), ours(5_000_000 if size >= 1e6 else 200_000)

    def run():
        tokenizer = BPETokenizer.load(path)
        for piece in text:
            tokenizer.encode(piece, allow_special=False)
    return run


def encode_stream(size):
    """``size`` bytes that come one text after another, encoded, and nothing kept of either. After 5 MB the texts
    come again, so that no more than that is ever in memory."""
    tales, (_, path) = texts(min(5_000_000, round(size))), ours(5_000_000 if size >= 1e6 else 200_000)

    def stream():
        left = size
        for text in cycle(tales):
            yield text[:round(left)]
            left -= len(text)
            if left <= 0:
                return
    return lambda: deque(BPETokenizer.load(path).encode_iterable(stream(), allow_special=False), maxlen=0)
