"""The bibliography, collected from the notebooks: what they list as read, and where they name it.

A work is listed once with its title in one of three forms, ``Su et al. 2021, *RoFormer* (arXiv:2104.09864)``,
``Su et al. (2021), *RoFormer*, arXiv 2104.09864`` or ``Su et al. 2021 (*RoFormer*, arXiv:2104.09864)``, and
named in the text as "Su et al. 2021". So no list of references has to be kept beside the notebooks.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field, replace

_NAME = r"(?:(?:van|von|der|de|la|Ben|El) ){0,2}[A-ZÀ-ÞŁŚŽČ][\w’'\-]*[\w](?: [A-Z][\w\-]+)?"
AUTHORS = rf"{_NAME}(?:,\s+{_NAME})*(?:,?\s+and\s+{_NAME})?(?:\s+et\s+al\.)?"
YEAR = r"(?:19|20)\d\d"
_ARXIV = r"arXiv[:\s]\s*(?P<arxiv>\d{4}\.\d{4,5})"
_TITLE = r"\*(?P<title>[^*\n]+(?:\n[^*\n]+)?)\*"
LISTED = re.compile(
    rf"(?P<authors>{AUTHORS}),?\s+\(?(?P<year>{YEAR})\)?,?\s+\(?{_TITLE}"
    rf"(?:,?\s+\(?{_ARXIV}\)?|,?\s+\((?P<where>[^()\n]{{3,80}})\)|,\s+(?P<venue>[A-Z][^.;:,()\n]{{3,80}}\d[^.;:,\n]*))?")
NAMED = re.compile(rf"(?<![\w:]){AUTHORS},?\s+(?:\({YEAR}\)|\(?{YEAR}(?![\d.]*\d))")


@dataclass(frozen=True)
class Reference:
    """A work that the course names: ``label`` for links, ``cited`` the labels of the pages that name it."""

    label: str
    authors: str
    year: str
    title: str
    where: str
    url: str
    cited: tuple[str, ...] = field(default=())

    @property
    def key(self) -> tuple[str, str]:
        """Surname of the first author and the year, by which the text names it."""
        return _surname(self.authors), self.year


def collect(texts: dict[str, str]) -> list[Reference]:
    """The works listed in ``texts`` (Markdown by label of the page), sorted by author and year.

    A work that several pages list is one entry, with the longest form of its authors and title; ``cited`` holds
    the labels of the pages that list it.
    """
    found: dict[str, Reference] = {}
    for page, text in texts.items():
        for match in LISTED.finditer(text):
            entry = replace(_reference(match), cited=(page,))
            known = found.get(entry.label)
            found[entry.label] = _merged(known, entry) if known else entry
    return sorted(found.values(), key=lambda entry: (_plain(entry.authors), entry.year, entry.title))


def _reference(match: re.Match) -> Reference:
    authors = re.sub(r"['\u2019]s$", "", " ".join(match["authors"].split()))
    title = " ".join(match["title"].split()).rstrip(".,")
    if match["arxiv"]:
        number = match["arxiv"]
        return Reference(f"ref-arxiv-{number.replace('.', '-')}", authors, match["year"], title, f"arXiv:{number}",
                         f"https://arxiv.org/abs/{number}")
    words = re.findall(r"[a-z0-9]+", _plain(title))[:3]
    label = "-".join(["ref", re.sub(r"[^a-z]+", "", _surname(authors)), match["year"], *words])
    where = " ".join((match["where"] or match["venue"] or "").split())
    where = "" if re.search(r"-\d", where) else where  # the name of a model, not of a journal
    return Reference(label, authors, match["year"], title, where, "")


def _merged(one: Reference, other: Reference) -> Reference:
    return replace(one, authors=max(one.authors, other.authors, key=len), title=max(one.title, other.title, key=len),
                   where=max(one.where, other.where, key=len), year=min(one.year, other.year),
                   cited=tuple(dict.fromkeys(one.cited + other.cited)))


def cite(text: str, page: str, references: dict[tuple[str, str], list[Reference]],
         named: dict[str, set[str]]) -> str:
    """Plain Markdown text with each "Su et al. 2021" as a link to its entry; ``named`` notes who named what."""
    def link(match: re.Match) -> str:
        words, entries = _known(match[0], re.search(rf"{YEAR}\)?$", match[0])[0].rstrip(")"), references)
        entries = _closest(entries, words, page, text[match.end():match.end() + 250])
        if len(entries) != 1:
            return match[0]
        named.setdefault(entries[0].label, set()).add(page)
        return f"{match[0].removesuffix(words)}[{words}](#{entries[0].label})"
    return NAMED.sub(link, text)


def _known(words: str, year: str, references: dict) -> tuple[str, list[Reference]]:
    """The works that ``words`` may name, and those words; "RoPE, Su et al. 2021" names as "Su et al. 2021" does."""
    while words:
        entries = references.get((_surname(re.split(rf",?\s+\(?{year}", words)[0]), year), [])
        if entries or ", " not in words:
            return words, entries
        words = words.split(", ", 1)[1]
    return words, []


def _closest(entries: list[Reference], words: str, page: str, after: str) -> list[Reference]:
    """Of several works of one author and year, the one whose number or title follows, or that the page lists."""
    entries = [entry for entry in entries if words.startswith(entry.authors)] or entries
    if len(entries) < 2:
        return entries
    after = " ".join(after.split())
    places = {entry.label: min((after.find(sign) for sign in (entry.where.removeprefix("arXiv:"), entry.title)
                                if sign and sign in after), default=10**6) for entry in entries}
    nearest = [entry for entry in entries if places[entry.label] == min(places.values()) < 10**6]
    return nearest or [entry for entry in entries if page in entry.cited]


def _surname(authors: str) -> str:
    first = re.split(r",|\s+and\s+|\s+et\s+al", authors)[0].split()
    return _plain(first[0] if len(first) > 1 and first[1] in ("Team", "AI") else first[-1])


def _plain(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
