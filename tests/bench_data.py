"""Chapter 1 against its peer: which of many texts are nearly the same, and how the cost of asking grows.

The peer is ``datasketch``, used as its documentation does: a ``MinHash`` for each text, and an index that is asked
for the neighbours of each text as the texts come in.
"""

import random

from ch01_data.data import Document, load_andersen, load_shakespeare, minhash_batch, near_duplicates, shingles
from tests.bench_limits import limit
from utils.bench import COURSE, Aim, Growth, Row

N_PERM, SHINGLE, THRESHOLD = 128, 5, 0.8


def rows(quick: bool = False) -> list[Row | Growth]:
    """What ``course.py bench data`` measures; with ``quick``, the same on a few texts."""
    n, sizes = (300, [100, 300]) if quick else (100_000, [1e3, 1e4, 1e5, 1e6])
    here = __name__
    return [
        Row(f"Near-duplicates among {n:,} texts by MinHash and LSH, {N_PERM} permutations", here,
            {COURSE: "groups_ours", "datasketch": "groups_peer"}, n, n, "texts", [Aim("times", 10.0)],
            {"cutting the texts into words by regular expression": limit("scan", n * 350)}, rounds=2, warm_up=False),
        Growth("Near-duplicates, by the number of texts", here, {"near_duplicates": "groups_ours"}, sizes, "texts",
               {"near_duplicates": 1.0}, rounds=2),
        Growth("Signatures of a stream of texts that nobody keeps", here, {"minhash_batch": "sign_stream"}, sizes,
               "texts", {"minhash_batch": 1.0}, flat_memory=True, rounds=2),
    ]


def texts(n: int) -> list[str]:
    """``n`` passages of about 60 words, each stitched from four places of the course's texts; every fifth is a copy
    of one before, with up to eight of its words replaced. Like those of the deep dive on near-duplicates.
    """
    words = " ".join(document.text for document in load_andersen() + load_shakespeare()).split()
    generator, passages = random.Random(0), []
    for i in range(round(n)):
        if i % 5 == 4:
            passage = generator.choice(passages).split()
            for _ in range(generator.randrange(9)):
                passage[generator.randrange(len(passage))] = generator.choice(words)
        else:
            starts = [generator.randrange(len(words) - 20) for _ in range(4)]
            passage = [word for start in starts for word in words[start:start + generator.randrange(12, 19)]]
        passages.append(" ".join(passage))
    return passages


def groups_ours(n):
    documents = [Document(f"{i:07}", text, "made") for i, text in enumerate(texts(n))]
    near_duplicates(documents[:100], THRESHOLD, N_PERM)
    return lambda: near_duplicates(documents, THRESHOLD, N_PERM)


def groups_peer(n):
    from datasketch import MinHash, MinHashLSH
    pieces = texts(n)

    def run():
        index = MinHashLSH(threshold=THRESHOLD, num_perm=N_PERM)
        for i, text in enumerate(pieces):
            sketch = MinHash(num_perm=N_PERM)
            sketch.update_batch([word.encode() for word in shingles(text, SHINGLE)])
            index.query(sketch)
            index.insert(i, sketch)
        return index
    return run


def sign_stream(n, batch: int = 1000):
    """The signatures of ``n`` texts, a thousand at a time, none of them kept."""
    some = texts(min(n, 10_000))

    def run():
        for start in range(0, round(n), batch):
            minhash_batch(some[start % len(some):][:min(batch, round(n) - start)], N_PERM, SHINGLE)
    return run
