"""Chapter 2 against its peers: learning a vocabulary, and encoding with one."""

from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ch01_data.data import load_documents
from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer, train_bpe
from utils.bench import COURSE, Row
from utils.workspace import workspace, write_text

VOCAB_SIZE = 4096


def rows(quick: bool = False) -> list[Row]:
    """What ``course.py bench tokenizer`` measures; with ``quick``, the same on a fraction of the text."""
    size = 200_000 if quick else 5_000_000
    more = size * 7 // 5  # as much different text as the course's own sources hold
    here = __name__
    return [
        Row("Train byte-level BPE to 4,096 tokens", here,
            {COURSE: "train_ours", "tokenizers, by document": "train_by_document",
             "tokenizers, by line": "train_by_line", "tokenizers, from a file": "train_from_file"},
            size, size / 1e6, "MB", aim=2.0),
        Row("Encode with that vocabulary", here,
            {COURSE: "encode_ours", f"{COURSE}, to_tiktoken": "encode_tiktoken",
             "tokenizers": "encode_peer", "tokenizers, batch": "encode_peer_batch"}, more, more / 1e6, "MB"),
    ]


@cache
def texts(size: int) -> tuple[str, ...]:
    """The first ``size`` bytes or so of Shakespeare's plays and poems and Andersen's tales."""
    documents = load_documents("shakespeare") + load_documents("andersen")
    taken, left = [], size
    for document in documents:
        if left > 0:
            taken.append(document.text[:left])
            left -= len(taken[-1].encode())
    return tuple(taken)


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
