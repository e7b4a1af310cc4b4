"""``tokenizer.json``, the format of Hugging Face's ``tokenizers``: written, and read back with care.

Only what a byte-level BPE needs. Tokens are spelled in GPT-2's printable letters ("Ġthe"); what the
letters mean is the tokenizer's business, not this file's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .workspace import write_text


def write_tokenizer_json(path: Path, vocab: Mapping[str, int], merges: Iterable[tuple[str, str]],
                         special_tokens: Mapping[str, int], pattern: str) -> None:
    """Write version 1.0 of the format: {token: id}, merges in order, {special token: id}, the cutting pattern.

    Special tokens are in ``vocab`` too, under their own names.
    """
    content = _frame(pattern)
    content["added_tokens"] = _added_tokens(dict(sorted(special_tokens.items(), key=lambda item: item[1])))
    content["model"] |= {"vocab": dict(vocab), "merges": [list(pair) for pair in merges]}
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1))


def read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int], str]:
    """What ``write_tokenizer_json`` wrote: vocabulary, merges, special tokens, pattern.

    ``ValueError`` names the first thing in the file that would make a different tokenizer of it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer.json: {error}. Save the tokenizer again.") from None
    pattern = _dig(content, "pre_tokenizer", "pretokenizers", 0, "pattern", "Regex") or ""
    added, vocab, merges = (_dig(content, *keys) or [] for keys in
                            (("added_tokens",), ("model", "vocab"), ("model", "merges")))
    special_tokens = {_dig(token, "content"): _dig(token, "id") for token in added}
    expected = _frame(pattern)
    expected["added_tokens"] = _added_tokens(special_tokens)
    expected["model"] |= {"vocab": vocab, "merges": merges}
    if difference := _first_difference(content, expected):
        raise ValueError(f"{path} holds another kind of tokenizer: {difference}. Only files that BPETokenizer.save "
                         "wrote are read here; open others with tokenizers.Tokenizer.from_file.")
    for place, pair in enumerate(merges):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"{path}: model.merges[{place}] is {json.dumps(pair)[:60]}, not a list of two tokens.")
    return vocab, [(a, b) for a, b in merges], special_tokens, pattern


def _dig(value, *keys):
    """``value[key][key]...``, or None where there is no such thing."""
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _frame(pattern: str) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {}, "merges": []}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level, "model": model}


def _added_tokens(special_tokens: Mapping[str, int]) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": name, **flags} for name, i in special_tokens.items()]


def _first_difference(found, expected, where: str = "it") -> str:
    """Where two JSON values differ first, in words; empty if nowhere."""
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [(found.get(key), expected.get(key), f"{where}.{key}".removeprefix("it."))
                 for key in [*expected, *(found.keys() - expected.keys())]]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(found, expected, strict=True))]
    else:
        return "" if found == expected else f"{where} is {json.dumps(found)[:60]}, not {json.dumps(expected)[:60]}"
    return next((text for pair in pairs if (text := _first_difference(*pair))), "")
