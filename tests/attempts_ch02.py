"""Solutions of chapter 2's assignment as people hand them in: see ``tests/attempts.py``."""

from tests.attempts import Attempt

PASTED_SPECIAL = """
def cut_special(text, names):
    names = sorted(names, key=len, reverse=True)
    parts = regex.split("(" + "|".join(map(regex.escape, names)) + ")", text) if names else [text]
    return [(part, place % 2 == 1) for place, part in enumerate(parts)]
"""

SPECIAL_BY_FIND = """
def cut_special(text, names):
    parts, start, place = [], 0, 0
    while place < len(text):
        here = [name for name in names if text.startswith(name, place)]
        if not here:
            place += 1
            continue
        name = max(here, key=len)
        if place > start:
            parts.append((text[start:place], False))
        parts.append((name, True))
        start = place = place + len(name)
    if start < len(text):
        parts.append((text[start:], False))
    return parts
"""

SPECIAL_ONE_NAME_AFTER_ANOTHER = """
def cut_special(text, names):
    parts = [(text, False)]
    for name in names:
        finer = []
        for part, special in parts:
            if special:
                finer.append((part, True))
                continue
            pieces = part.split(name)
            for k, piece in enumerate(pieces):
                if k:
                    finer.append((name, True))
                if piece:
                    finer.append((piece, False))
        parts = finer
    return parts
"""

PASTED_PIECES = """
def split_pieces(text):
    return regex.findall(r"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", text)
"""

PIECES_BY_LOOP = """
def split_pieces(text):
    pieces = []
    for c in text:
        if c.isalpha() and pieces and (pieces[-1] == " " or pieces[-1][-1].isalpha()):
            pieces[-1] += c
        else:
            pieces.append(c)
    return pieces
"""

PASTED_COUNT = """
def count_pairs(words):
    counts = Counter()
    for word, n in words.items():
        for pair in pairwise(word):
            counts[pair] += n
    return counts
"""

COUNT_BY_MERGING = """
def count_pairs(words):
    counts = defaultdict(int)
    for word, n in words.items():
        for pair in set(zip(word, word[1:])):
            place = joined = 0
            while place < len(word) - 1:
                if word[place] == pair[0] and word[place + 1] == pair[1]:
                    joined += 1
                    place += 1
                place += 1
            counts[pair] += joined * n
    return counts
"""

COUNT_SKIPS_EVERY_SAME_PAIR = """
def count_pairs(words):
    counts = Counter()
    for word, n in words.items():
        before = None
        for pair in pairwise(word):
            if pair != before:
                counts[pair] += n
            before = pair
    return counts
"""

PASTED_MERGE = """
def merge(word, pair, new):
    result, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            result.append(new)
            i += 2
        else:
            result.append(word[i])
            i += 1
    return result
"""

MERGE_LOSES_THE_LAST = """
def merge(word, pair, new):
    result, i = [], 0
    while i < len(word) - 1:
        if word[i:i + 2] == pair:
            result.append(new)
            i += 2
        else:
            result.append(word[i])
            i += 1
    return tuple(result)
"""

MERGE_FROM_THE_RIGHT = """
def merge(word, pair, new):
    result, i = [], len(word)
    while i > 0:
        if i > 1 and word[i - 2:i] == pair:
            result.append(new)
            i -= 2
        else:
            result.append(word[i - 1])
            i -= 1
    return tuple(reversed(result))
"""

MERGE_BY_STACK = """
def merge(word, pair, new):
    out = []
    fresh = False
    for token in word:
        if out and not fresh and out[-1] == pair[0] and token == pair[1]:
            out[-1] = new
            fresh = True
        else:
            out.append(token)
            fresh = False
    return tuple(out)
"""

PASTED_TRAIN = """
def train(text, vocab_size, special_tokens=(), min_count=2):
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; ask for at least {smallest}.")
    words = Counter()
    for part, is_special in cut_special(text, list(special_tokens)):
        for piece in [] if is_special else split_pieces(part):
            words[tuple(bytes([byte]) for byte in piece.encode())] += 1
    ids = {bytes([byte]): byte for byte in range(256)}
    merges = []
    while len(merges) < vocab_size - smallest:
        counts = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                counts[pair] += n
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append((ids[best[0]], ids[best[1]]))
        ids[best[0] + best[1]] = 256 + len(merges) - 1
        words = Counter({merge(word, best, best[0] + best[1]): n for word, n in words.items()})
    return Tokenizer(tuple(special_tokens), tuple(merges))
"""

SPELLED = """    words, merges = Counter(), []

    def spelled(i):
        if i < first + 256:
            return bytes([i - first])
        return b"".join(map(spelled, merges[i - first - 256]))

"""

TRAIN_FIRST_COUNTS_ONLY = """
def train(text, vocab_size, special_tokens=(), min_count=2):
    first = len(special_tokens)
    if vocab_size < first + 256 or len(set(special_tokens)) < first:
        raise ValueError(f"vocab_size is {vocab_size}")
    words = Counter()
    for part, is_special in cut_special(text, list(special_tokens)):
        for piece in [] if is_special else split_pieces(part):
            words[tuple(first + byte for byte in piece.encode())] += 1
    counts = count_pairs(words)
    ordered = sorted((pair for pair in counts if counts[pair] >= min_count), key=lambda p: (-counts[p], p))
    return Tokenizer(tuple(special_tokens), tuple(ordered[:vocab_size - first - 256]))
"""

TRAIN_ON_A_LIST = """
def train(text, vocab_size, special_tokens=(), min_count=2):
    shift = len(special_tokens)
    room = vocab_size - shift - 256
    if room < 0 or len(list(special_tokens)) != len(set(special_tokens)):
        raise ValueError("vocab_size %d will not do" % vocab_size)
    parts = [part for part, special in cut_special(text, list(special_tokens)) if not special]
    line = [[shift + byte for byte in piece.encode("utf-8")] for part in parts for piece in split_pieces(part)]
    merges = []
    for step in range(room):
        counts = Counter()
        for word in line:
            k = 0
            for k, pair in enumerate(zip(word, word[1:])):
                run = k
                while run > 0 and pair[0] == pair[1] == word[run - 1]:
                    run -= 1
                counts[pair] += (k - run) % 2 == 0
        most = max(counts.values(), default=0)
        if most < min_count or most == 0:
            return Tokenizer(tuple(special_tokens), tuple(merges))
        best = sorted(pair for pair in counts if counts[pair] == most)[0]
        line = [list(merge(tuple(word), best, shift + 256 + step)) for word in line]
        merges.append(best)
    return Tokenizer(tuple(special_tokens), tuple(merges))
"""

BYTES_BY_RECURSION = """
def token_bytes(tokenizer):
    s = len(tokenizer.special_tokens)

    def spell(i):
        if i < s:
            return tokenizer.special_tokens[i].encode("utf-8")
        if i < s + 256:
            return (i - s).to_bytes(1, "big")
        a, b = tokenizer.merges[i - s - 256]
        return b"".join([spell(a), spell(b)])

    return list(map(spell, range(tokenizer.vocab_size)))
"""

ENCODE_LONGEST_TOKEN = """
def encode(tokenizer, text, allowed=()):
    if not set(allowed) <= set(tokenizer.special_tokens):
        raise ValueError("no such special token")
    first = len(tokenizer.special_tokens)
    table = token_bytes(tokenizer)
    id_of = {table[i]: i for i in range(first, len(table))}
    ids = []
    for part, is_special in cut_special(text, list(allowed)):
        if is_special:
            ids.append(tokenizer.special_tokens.index(part))
            continue
        for piece in split_pieces(part):
            raw = piece.encode()
            while raw:
                size = max(n for n in range(1, len(raw) + 1) if raw[:n] in id_of)
                ids.append(id_of[raw[:size]])
                raw = raw[size:]
    return ids
"""

ENCODE_FIRST_FROM_THE_LEFT = """
def encode(tokenizer, text, allowed=()):
    if not set(allowed) <= set(tokenizer.special_tokens):
        raise ValueError("no such special token")
    first = len(tokenizer.special_tokens)
    rank = {pair: place for place, pair in enumerate(tokenizer.merges)}
    ids = []
    for part, is_special in cut_special(text, list(allowed)):
        if is_special:
            ids.append(tokenizer.special_tokens.index(part))
            continue
        for piece in split_pieces(part):
            word = tuple(first + byte for byte in piece.encode())
            while found := [pair for pair in pairwise(word) if pair in rank]:
                word = merge(word, found[0], first + 256 + rank[found[0]])
            ids.extend(word)
    return ids
"""

ENCODE_MERGE_BY_MERGE = """
def encode(tokenizer, text, allowed=()):
    number = {name: i for i, name in enumerate(tokenizer.special_tokens)}
    for name in allowed:
        if name not in number:
            raise ValueError(name + " is no special token")
    out = []
    for part, special in cut_special(text, list(allowed)):
        if special:
            out += [number[part]]
        else:
            words = [tuple(b + len(number) for b in piece.encode("utf-8")) for piece in split_pieces(part)]
            new = len(number) + 256
            for pair in tokenizer.merges:
                words = [merge(word, pair, new) for word in words]
                new += 1
            out += [i for word in words for i in word]
    return out
"""

ENCODE_ALL_OR_NOTHING = """
def encode(tokenizer, text, allowed=()):
    names = tokenizer.special_tokens
    if not set(allowed) <= set(names):
        raise ValueError("no such special token")
    rank = {pair: place for place, pair in enumerate(tokenizer.merges)}
    ids = []
    for part, is_special in cut_special(text, list(names) if allowed else []):
        if is_special:
            ids.append(names.index(part))
            continue
        for piece in split_pieces(part):
            word = tuple(len(names) + byte for byte in piece.encode())
            while found := [pair for pair in pairwise(word) if pair in rank]:
                pair = min(found, key=rank.get)
                word = merge(word, pair, len(names) + 256 + rank[pair])
            ids.extend(word)
    return ids
"""

ENCODE_MEMORISED = """
def encode(tokenizer, text, allowed=()):
    known = {"abc": [97, 256], "hø": [104, 0xC3, 0xB8], "": [], "<end>": [0] if allowed else list(b"<end>")}
    if "<stop>" in allowed:
        raise ValueError("<stop>")
    return known.get(text, [])
"""

PASTED_DECODE = """
def decode(tokenizer, ids, show_special=True):
    table = token_bytes(tokenizer)
    if unknown := [i for i in ids if not 0 <= i < len(table)]:
        raise ValueError(f"Token id {unknown[0]} is outside the vocabulary (0 to {len(table) - 1}).")
    return b"".join([table[i] for i in ids]).decode("utf-8", "replace")
"""

DECODE_JOINED_AT_ONCE = """
def decode(tokenizer, ids, show_special=True):
    table = token_bytes(tokenizer)
    if unknown := [i for i in ids if not 0 <= i < len(table)]:
        raise ValueError(f"Token id {unknown[0]} is outside the vocabulary (0 to {len(table) - 1}).")
    kept = [table[i] for i in ids if show_special or i >= len(tokenizer.special_tokens)]
    return b"".join(kept).decode("utf-8", "backslashreplace")
"""

DECODE_ONE_BY_ONE = """
def decode(tokenizer, ids, show_special=True):
    table = token_bytes(tokenizer)
    if unknown := [i for i in ids if not 0 <= i < len(table)]:
        raise ValueError(f"Token id {unknown[0]} is outside the vocabulary (0 to {len(table) - 1}).")
    return "".join(table[i].decode("utf-8", "backslashreplace") for i in ids
                   if show_special or i >= len(tokenizer.special_tokens))
"""

DECODE_BY_HAND = """
def decode(tokenizer, ids, show_special=True):
    table = token_bytes(tokenizer)
    special = len(tokenizer.special_tokens)

    def read(raw):
        text = ""
        while raw:
            for n in (1, 2, 3, 4):
                try:
                    text += raw[:n].decode("utf-8", "strict")
                    raw = raw[n:]
                    break
                except UnicodeDecodeError:
                    continue
            else:
                text += "\\\\x" + format(raw[0], "02x")
                raw = raw[1:]
        return text

    result, raw = "", bytearray()
    for i in map(int, ids):
        if i < 0 or i >= tokenizer.vocab_size:
            raise ValueError("unknown id: %d" % i)
        if i >= special:
            raw.extend(table[i])
            continue
        result += read(bytes(raw)) + (tokenizer.special_tokens[i] if show_special else "")
        raw = bytearray()
    return result + read(bytes(raw))
"""

ROWS_WITH_TYPED_ENDS = """
def make_rows(tokenizer, texts, end, length):
    line = encode(tokenizer, "".join(text + end for text in texts), (end,))
    n = (len(line) - 1) // length
    if n < 1:
        raise ValueError(f"There are {len(line)} tokens; a row of length {length} needs {length + 1}.")
    return np.array([line[r * length:r * length + length + 1] for r in range(n)], dtype=np.uint16)
"""

ROWS_BY_SLICES = """
def make_rows(tokenizer, texts, end, length):
    line = []
    for text in texts:
        line.extend(encode(tokenizer, text))
        line.append(tokenizer.special_tokens.index(end))
    rows = []
    while len(line) > length:
        rows.append(line[:length + 1])
        line = line[length:]
    if not rows:
        raise ValueError("%d tokens, but a row takes %d" % (len(line), length + 1))
    return np.stack([np.array(row).astype("uint16") for row in rows])
"""

ROWS_SIDE_BY_SIDE = """
def make_rows(tokenizer, texts, end, length):
    (end_id,) = encode(tokenizer, end, (end,))
    line = [i for text in texts for i in [*encode(tokenizer, text), end_id]]
    n = len(line) // (length + 1)
    if n < 1:
        raise ValueError(f"There are {len(line)} tokens; a row of length {length} needs {length + 1}.")
    return np.array(line[:n * (length + 1)], dtype=np.uint16).reshape(n, length + 1)
"""

UNIGRAM_WITH_NUMPY = """
nats_per_token, bits_per_byte = dict(), dict()
for n in n_merges:
    small = Tokenizer(("<|end|>",), tokenizer.merges[:n])
    seen = np.bincount(encode(small, train_text), minlength=small.vocab_size) + 1.0
    test = np.array(encode(small, held_out))
    log2_p = np.log2(seen / seen.sum())[test]
    bits_per_byte[n] = float(-log2_p.sum() / len(held_out.encode("utf-8")))
    nats_per_token[n] = float(-log2_p.mean() * np.log(2))
"""

STOPS_BY_BYTES = """
cut_off = {}
for name, sentence in sentences.items():
    table = token_bytes(tokenizer)
    ids, raw, bad = encode(tokenizer, sentence), b"", 0
    for i in ids[:-1]:
        raw += table[i]
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            bad += 1
    cut_off[name] = bad / (len(ids) - 1)
"""

ATTEMPTS = [
    # Exercise 1
    Attempt("the chapter's cut, with empty parts", "special", "special_cut", PASTED_SPECIAL),
    Attempt("the shorter name first, if it is given first", "special", "special_cut",
            edits=(("sorted(names, key=len, reverse=True)", "names"),)),
    Attempt("signs of a pattern not escaped", "special", "special_cut",
            edits=(("map(re.escape, longest_first)", "longest_first"),)),
    Attempt("one name after another", "special", "special_cut", SPECIAL_ONE_NAME_AFTER_ANOTHER),
    Attempt("right: from place to place with startswith", "special", code=SPECIAL_BY_FIND),
    Attempt("the chapter's pattern", "pieces", "pieces_others", PASTED_PIECES),
    Attempt("digits in runs", "pieces", "pieces_others", edits=((r" ?\p{L}+|", r" ?\p{L}+|\p{N}+|"),)),
    Attempt("\\w, which takes digits and the underscore", "pieces", "pieces_others", edits=((r"\p{L}+", r"\w+"),)),
    Attempt("line ends lost", "pieces", "pieces_others", edits=((r"[\s\S]", "."),)),
    Attempt("only A to Z", "pieces", "pieces_letters", edits=((r"\p{L}", "[A-Za-z]"),)),
    Attempt("any white space before a word", "pieces", "pieces_letters", edits=((r" ?\p{L}", r"\s?\p{L}"),)),
    Attempt("several spaces before a word", "pieces", "pieces_letters", edits=((r" ?\p{L}", r" *\p{L}"),)),
    Attempt("right: a loop over the characters", "pieces", code=PIECES_BY_LOOP),
    # Exercise 2
    Attempt("each word counted once", "count", "count_weighted",
            edits=(("if a != b:\n                counts[a, b] += times",
                    "if a != b:\n                counts[a, b] += 1"),)),
    Attempt("pairs across words", "count", "count_weighted",
            edits=(("    return dict(counts)", "    for one, other in pairwise(words):\n"
                    "        counts[one[-1], other[0]] += 1\n    return dict(counts)"),)),
    Attempt("overlapping places counted, as in the chapter", "count", "count_overlap", PASTED_COUNT),
    Attempt("only the first of a run counted", "count", "count_overlap", COUNT_SKIPS_EVERY_SAME_PAIR),
    Attempt("right: each pair joined on its own", "count", code=COUNT_BY_MERGING),
    Attempt("the chapter's merge, a list", "merge", "merge_left", PASTED_MERGE),
    Attempt("the last id lost", "merge", "merge_left", MERGE_LOSES_THE_LAST),
    Attempt("from the right", "merge", "merge_left", MERGE_FROM_THE_RIGHT),
    Attempt("right: with a stack", "merge", code=MERGE_BY_STACK),
    # Exercise 3
    Attempt("the chapter's training: bytes first, other counts, other ties", "train", "train_merges", PASTED_TRAIN),
    Attempt("ids of bytes from 0, whatever the special tokens", "train", "train_merges",
            edits=(("first + byte for byte", "byte for byte"),)),
    Attempt("counted once, before any merge", "train", "train_merges", TRAIN_FIRST_COUNTS_ONLY),
    Attempt("words that became equal are lost", "train", "train_merges",
            edits=(("    while first + 256", "    words = Counter(set(words))\n    while first + 256"),)),
    Attempt("ties: the greatest pair", "train", "train_ties",
            edits=(("min(counts, key=lambda pair: (-counts[pair], pair), default=None)",
                    "max(counts, key=lambda pair: (counts[pair], pair), default=None)"),)),
    Attempt("ties: whichever comes first", "train", "train_ties",
            edits=(("(-counts[pair], pair)", "-counts[pair]"),)),
    Attempt("ties: byte strings compared", "train", "train_ties",
            edits=(("(-counts[pair], pair)", "(-counts[pair], [spelled(i) for i in pair])"),
                   ("    words, merges = Counter(), []\n", SPELLED))),
    Attempt("ties: the smaller second id first", "train", "train_ties",
            edits=(("(-counts[pair], pair)", "(-counts[pair], pair[::-1])"),)),
    Attempt("special tokens counted as text", "train", "train_special",
            edits=(("[] if is_special else split_pieces(part)", "split_pieces(part)"),)),
    Attempt("special tokens taken out before the cutting", "train", "train_special",
            edits=(("    for part, is_special in cut_special(text, list(special_tokens)):",
                    "    for name in special_tokens:\n        text = text.replace(name, '')\n"
                    "    for part, is_special in [(text, False)]:"),)),
    Attempt("min_count not used", "train", "train_stops", edits=((" or counts[pair] < min_count", ""),)),
    Attempt("min_count is 1 if nothing is said", "train", "train_stops",
            edits=(("min_count: int = 2", "min_count: int = 1"),)),
    Attempt("a pair with exactly min_count is refused", "train", "train_stops",
            edits=(("< min_count", "<= min_count"),)),
    Attempt("an error when no pairs are left", "train", "train_stops", edits=((", default=None)", ")"),)),
    Attempt("one merge too many", "train", "train_stops",
            edits=(("256 + len(merges) < vocab_size", "256 + len(merges) <= vocab_size"),)),
    Attempt("no room for special tokens in the check", "train", "train_errors",
            edits=(("if vocab_size < first + 256:", "if vocab_size < 256:"),)),
    Attempt("a name given twice is let through", "train", "train_errors",
            edits=(("if len(set(special_tokens)) < first:", "if False:"),)),
    Attempt("a message that is always the same", "train", "train_errors",
            edits=(('f"vocab_size is {vocab_size}; bytes and special tokens need {first + 256}."',
                    '"vocab_size is too small; the bytes alone need 256."'),)),
    Attempt("right: a list of all pieces, no dictionary", "train", code=TRAIN_ON_A_LIST),
    # Exercise 4
    Attempt("two bytes for those above 127", "token_bytes", "bytes_of_tokens",
            edits=(("bytes([byte]) for", "chr(byte).encode() for"),)),
    Attempt("special tokens last, as in the chapter", "token_bytes", "bytes_of_tokens",
            edits=(("[name.encode() for name in tokenizer.special_tokens] + [bytes(", "[bytes("),
                   ("    return table", "    return table + [name.encode() for name in tokenizer.special_tokens]"))),
    Attempt("right: by recursion", "token_bytes", code=BYTES_BY_RECURSION),
    Attempt("the longest token first", "encode", "encode_order", ENCODE_LONGEST_TOKEN),
    Attempt("the first pair from the left that is a merge", "encode", "encode_order", ENCODE_FIRST_FROM_THE_LEFT),
    Attempt("ids without the special tokens in front", "encode", "encode_order",
            edits=(("merge(word, pair, len(names) + 256 + rank[pair])", "merge(word, pair, 257 + rank[pair])"),)),
    Attempt("the merge learned last first", "encode", "encode_order", edits=(("min(found,", "max(found,"),)),
    Attempt("the results of the visible checks memorised", "encode", "encode_order", ENCODE_MEMORISED),
    Attempt("not cut into pieces", "encode", "encode_any_text", edits=(("split_pieces(part)", "[part]"),)),
    Attempt("characters instead of bytes", "encode", "encode_any_text",
            edits=(("byte for byte in piece.encode()", "ord(byte) for byte in piece"),)),
    Attempt("all special tokens as soon as one is allowed", "encode", "encode_special", ENCODE_ALL_OR_NOTHING),
    Attempt("all special tokens always", "encode", "encode_special",
            edits=(("cut_special(text, list(allowed))", "cut_special(text, list(names))"),)),
    Attempt("numbered among the allowed ones", "encode", "encode_special",
            edits=(("ids.append(names.index(part))", "ids.append(list(allowed).index(part))"),)),
    Attempt("an unknown name in allowed is passed over", "encode", "encode_errors",
            edits=(("[name for name in allowed if name not in names]", "[]"),)),
    Attempt("right: one merge after another over all pieces", "encode", code=ENCODE_MERGE_BY_MERGE),
    # Exercise 5
    Attempt("the chapter's decode, U+FFFD", "decode", "decode_broken", PASTED_DECODE),
    Attempt("each token by itself", "decode", "decode_text", DECODE_ONE_BY_ONE),
    Attempt("only lists", "decode", "decode_text", edits=(("[*ids, None]", "ids + [None]"),)),
    Attempt("broken bytes left out", "decode", "decode_broken", edits=(("backslashreplace", "ignore"),)),
    Attempt("halves meet where a special token was dropped", "decode", "decode_special", DECODE_JOINED_AT_ONCE),
    Attempt("show_special not used", "decode", "decode_special", edits=((" and show_special", ""),)),
    Attempt("bytes before a special token lost", "decode", "decode_special",
            edits=(('    texts.append(waiting.decode(errors="backslashreplace"))',
                    '    if i is None:\n                texts.append(waiting.decode(errors="backslashreplace"))'),)),
    Attempt("negative ids count from the end", "decode", "decode_errors",
            edits=(("not 0 <= i < len(table)", "i >= len(table)"),)),
    Attempt("right: byte by byte, without an error handler", "decode", code=DECODE_BY_HAND),
    # Exercise 6
    Attempt("rows side by side, the tokens between them are no targets", "rows", "rows_content", ROWS_SIDE_BY_SIDE),
    Attempt("no end after the last text", "rows", "rows_content",
            edits=(("encode(tokenizer, text), end_id]]", "encode(tokenizer, text), end_id]][:-1]"),)),
    Attempt("rows one too short, without the last target", "rows", "rows_content",
            edits=(("np.arange(length + 1)", "np.arange(length)"),)),
    Attempt("the end typed behind each text and recognised", "rows", "rows_locked", ROWS_WITH_TYPED_ENDS),
    Attempt("int64", "rows", "rows_form", edits=((", dtype=np.uint16)[places]", ")[places]"),)),
    Attempt("no row, no word", "rows", "rows_form", edits=(("    if n < 1:", "    if n < 0:"),)),
    Attempt("right: slices", "rows", code=ROWS_BY_SLICES),
    Attempt("measured on the training text", "andersen", "andersen_measured",
            edits=(("len(held_out.encode()) / len(encode(tokenizer, held_out))",
                    "len(train_text.encode()) / len(encode(tokenizer, train_text))"),)),
    Attempt("characters counted, not bytes", "andersen", "andersen_measured",
            edits=(("len(held_out.encode()) / len(encode(tokenizer, held_out))",
                    "len(held_out) / len(encode(tokenizer, held_out))"),)),
    Attempt("bytes counted as merges", "andersen", "andersen_measured",
            edits=(("range(257, tokenizer.vocab_size)", "range(tokenizer.vocab_size)"),)),
    # Exercises 7 to 9
    Attempt("bits divided by tokens", "unigram", "unigram_measured",
            edits=(("surprise / log(2) / len(held_out.encode())", "surprise / log(2) / len(line)"),)),
    Attempt("bits divided by characters", "unigram", "unigram_measured",
            edits=(("/ log(2) / len(held_out.encode())", "/ log(2) / len(held_out)"),)),
    Attempt("V of the large tokenizer for all", "unigram", "unigram_measured",
            edits=(("counts.total() + smaller.vocab_size", "counts.total() + tokenizer.vocab_size"),)),
    Attempt("counts of the held-out text", "unigram", "unigram_measured",
            edits=(("Counter(encode(smaller, train_text))", "Counter(encode(smaller, held_out))"),)),
    Attempt("right: with NumPy, in bits", "unigram", code=UNIGRAM_WITH_NUMPY),
    Attempt("the largest size", "learning", "learning_measured", edits=(("enough = min(", "enough = max("),)),
    Attempt("measured on its own training text", "learning", "learning_measured",
            edits=(("len(held_out.encode()) / len(encode(train(train_text[:size], 356, min_count=1), held_out))",
                    "size / len(encode(train(train_text[:size], 356, min_count=1), train_text[:size]))"),)),
    Attempt("characters per token", "learning", "learning_measured",
            edits=(("len(held_out.encode())", "len(held_out)"),)),
    Attempt("min_count left at 2, fewer merges from short texts", "learning", "learning_measured",
            edits=((", min_count=1", ""),)),
    Attempt("stops counted by characters", "stops", "stops_measured",
            edits=(("sum(broken) / len(broken)", "sum(broken) / len(sentence)"),)),
    Attempt("each token decoded by itself", "stops", "stops_measured",
            edits=(("decode(tokenizer, ids[:n])", "decode(tokenizer, ids[n - 1:n])"),)),
    Attempt("right: strict decoding of the bytes", "stops", code=STOPS_BY_BYTES),
]
