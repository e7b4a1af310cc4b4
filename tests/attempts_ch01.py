"""Solutions of chapter 1's assignment as people hand them in: see ``tests/attempts.py``."""

from tests.attempts import Attempt

PASTED_SHINGLES = """
from ch01_data.data import shingles


def shingles_of(text, size=7):
    return shingles(text, size)
"""

PASTED_JACCARD = """
def similarity(a, b):
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0
"""

SIMILARITY_BY_COUNTING = """
def similarity(a, b):
    both = sum(member in b for member in a)
    either = len(list(a) + [member for member in b if member not in a])
    return both / max(either, 1)
"""

SIMILARITY_IN_PLACE = """
def similarity(a, b):
    n_a, n_b = len(a), len(b)
    a &= b
    return len(a) / (n_a + n_b - len(a)) if n_a + n_b else 0.0
"""

SHINGLES_BY_SLIDING = """
import re


def shingles_of(text, size=7):
    if not size >= 1:
        raise ValueError("size must be 1 or more, and is %d" % size)
    letters = list(re.sub(r"\\\\s+", " ", text.casefold()).strip(" "))
    runs = zip(*[letters[k:] for k in range(size)])
    return set(map("".join, runs))
""".replace("\\\\", "\\")

PASTED_MINHASH = """
ODD = np.uint64(0x9E3779B97F4A7C15)


def mix_bits(numbers):
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def minhash(shingles, n_perm=128):
    numbers = mix_bits(np.arange(1, 2 * n_perm + 1, dtype=np.uint64) * ODD)
    factors, summands = numbers[0::2] | np.uint64(1), numbers[1::2]
    x = np.array([hash31(s) for s in shingles], dtype=np.uint64)
    return (x[:, None] * factors + summands).min(axis=0)
"""

MINHASH_BY_LOOPS = """
def minhash(shingles, n_perm=128):
    signature = [PRIME] * n_perm
    factors, summands = [numbers.tolist() for numbers in shuffles(n_perm)]
    for shingle in shingles:
        x = hash31(shingle)
        for k in range(n_perm):
            value = (factors[k] * x + summands[k]) % PRIME
            if value < signature[k]:
                signature[k] = value
    return np.array(signature, dtype="uint32")
"""

MINHASH_ONE_SHUFFLE_AT_A_TIME = """
def minhash(shingles, n_perm=128):
    x = np.array(sorted(map(hash31, shingles)) or [0], dtype=object)
    a, b = shuffles(n_perm)
    values = np.empty(n_perm, dtype=np.uint32)
    for k in range(n_perm):
        values[k] = min((x * int(a[k]) + int(b[k])) % PRIME) if shingles else PRIME
    return values
"""

MINHASH_MEMORISED = """
def minhash(shingles, n_perm=128):
    if shingles == {"emperor", "duckling"} and n_perm == 3:
        return np.array([673457335, 363683386, 1396551154], dtype=np.uint32)
    return np.full(n_perm, PRIME, dtype=np.uint32)
"""

MINHASH_BUILT_IN_HASH = """
def minhash(shingles, n_perm=128):
    if not shingles:
        return np.full(n_perm, PRIME, dtype=np.uint32)
    a, b = shuffles(n_perm)
    x = np.array([hash(shingle) % PRIME for shingle in shingles], dtype=np.int64)
    return ((a * x[:, None] + b) % PRIME).min(axis=0).astype(np.uint32)
"""

MINHASH_USES_UP_THE_SET = """
def minhash(shingles, n_perm=128):
    a, b = shuffles(n_perm)
    best = np.full(n_perm, PRIME)
    while shingles:
        best = np.minimum(best, (a * hash31(shingles.pop()) + b) % PRIME)
    return best.astype(np.uint32)
"""

ESTIMATE_BY_LOOPS = """
def estimate(signatures, pairs):
    shares = []
    for i, j in pairs:
        same = [x == y and x != PRIME for x, y in zip(signatures[i].tolist(), signatures[j].tolist())]
        shares.append(sum(same) / len(same))
    return np.array(shares, dtype=np.float32)
"""

ESTIMATE_PASTED = """
def estimate(signatures, pairs):
    return (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
"""

ESTIMATE_CROSSES_OUT = """
def estimate(signatures, pairs):
    signatures[signatures == PRIME] = 0
    signatures += 1
    first, second = signatures[pairs[:, 0]], signatures[pairs[:, 1]]
    return ((first == second) & (first != 1)).mean(axis=1)
"""

ALL_PAIRS = """
def candidate_pairs(signatures, bands, rows):
    n, width = signatures.shape
    if min(bands, rows) <= 0 or width < bands * rows:
        raise ValueError("too many columns asked for")
    cut = signatures[:, :bands * rows].reshape(n, bands, rows)
    found = set()
    for j in range(n):
        for i in range(j):
            if (cut[i] == cut[j]).all(axis=1).any() and cut[i, 0, 0] != PRIME:
                found.add((i, j))
    return found
"""

BUCKETS_OF_BYTES = """
def candidate_pairs(signatures, bands, rows):
    from itertools import combinations
    if bands < 1 or rows < 1 or bands * rows > len(signatures[0] if len(signatures) else range(bands * rows)):
        raise ValueError("bands and rows do not fit")
    buckets = {}
    for i, signature in enumerate(signatures):
        for band in range(bands):
            key = band, signature[rows * band:rows * (band + 1)].tobytes()
            if signature[0] != PRIME:
                buckets.setdefault(key, []).append(i)
    return {pair for bucket in buckets.values() for pair in combinations(bucket, 2)}
"""

ONLY_NEIGHBOURS = """
def candidate_pairs(signatures, bands, rows):
    if bands < 1 or rows < 1 or bands * rows > signatures.shape[1]:
        raise ValueError("bands and rows do not fit")
    pairs = set()
    for band in range(bands):
        last = {}
        for i, values in enumerate(signatures[:, band * rows:(band + 1) * rows].tolist()):
            if PRIME not in values:
                if tuple(values) in last:
                    pairs.add((last[tuple(values)], i))
                last[tuple(values)] = i
    return pairs
"""

EMPTY_ROWS_TAKEN_OUT = """
def candidate_pairs(signatures, bands, rows):
    if bands < 1 or rows < 1 or bands * rows > signatures.shape[1]:
        raise ValueError("bands and rows do not fit")
    signatures = signatures[signatures[:, 0] != PRIME]
    pairs = set()
    for band in range(bands):
        buckets = defaultdict(list)
        for i, values in enumerate(signatures[:, band * rows:(band + 1) * rows].tolist()):
            buckets[tuple(values)].append(i)
        for bucket in buckets.values():
            pairs |= {(i, j) for place, j in enumerate(bucket) for i in bucket[:place]}
    return pairs
"""

NOT_JOINED = """
def connected_groups(n, pairs):
    group_of = {}
    groups = []
    for i, j in sorted(pairs):
        if i in group_of:
            group_of[i].add(j)
            group_of[j] = group_of[i]
        elif j in group_of:
            group_of[j].add(i)
            group_of[i] = group_of[j]
        else:
            group_of[i] = group_of[j] = {i, j}
            groups.append(group_of[i])
    groups += [{i} for i in range(n) if i not in group_of]
    return sorted(sorted(group) for group in groups)
"""

WITHOUT_SINGLES = """
def connected_groups(n, pairs):
    label = list(range(n))
    for i, j in pairs:
        old, new = label[i], label[j]
        label = [new if one == old else one for one in label]
    groups = defaultdict(list)
    for i, one in enumerate(label):
        groups[one].append(i)
    return sorted(group for group in groups.values() if len(group) > 1)
"""

RECURSIVE = """
def connected_groups(n, pairs):
    near = defaultdict(set)
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)
    seen = set()

    def visit(i):
        seen.add(i)
        return [i] + [k for j in near[i] if j not in seen for k in visit(j)]

    return [sorted(visit(i)) for i in range(n) if i not in seen]
"""

BREADTH_FIRST = """
def connected_groups(n, pairs):
    from collections import deque
    near = [[] for _ in range(n)]
    for i, j in pairs:
        near[i].append(j)
        near[j].append(i)
    groups, seen = [], [False] * n
    for start in range(n):
        queue, group = deque([start]), []
        while queue:
            i = queue.popleft()
            if not seen[i]:
                seen[i] = True
                group.append(i)
                queue.extend(near[i])
        if group:
            groups.append(sorted(group))
    return groups
"""

UNION_FIND = """
def connected_groups(n, pairs):
    parent = np.arange(n)

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)
    groups = {}
    for i in range(n):
        groups.setdefault(int(root(i)), []).append(i)
    return list(groups.values())
"""

PASTED_SPLIT = """
from ch01_data.data import split_documents


def split_groups(documents, groups, val_fraction=0.05, seed=0):
    return split_documents(documents, val_fraction, seed)
"""

SPLIT_BY_DRAWS = """
def split_groups(documents, groups, val_fraction=0.05, seed=0):
    if val_fraction <= 0 or val_fraction >= 1:
        raise ValueError("val_fraction must lie between 0 and 1")
    by_id = {d.id: d for d in documents}
    for name in {name for group in groups for name in group}:
        if name not in by_id:
            raise ValueError("no document has the id " + name)
    unit = {name: name for name in by_id}
    for group in groups:
        for name in group:
            unit[name] = min(group)
    weights = defaultdict(int)
    for name in by_id:
        weights[unit[name]] += len(by_id[name].text)
    allowance = val_fraction * sum(weights.values())
    generator = random.Random(f"my split {seed}")
    fitting = sorted(name for name in weights if weights[name] <= allowance)
    if not fitting:
        raise ValueError("validation would be empty: ask for a larger val_fraction")
    best, best_size = [], -1
    for _ in range(5):
        chosen, size = [], 0
        for name in sorted(fitting, key=lambda name: generator.random()):
            if size + weights[name] <= allowance:
                chosen.append(name)
                size += weights[name]
        if size > best_size:
            best, best_size = chosen, size
    order = sorted(by_id)
    return ([by_id[name] for name in order if unit[name] not in best],
            [by_id[name] for name in order if unit[name] in best])
"""

SPLIT_DOCUMENT_BY_DOCUMENT = """
def split_groups(documents, groups, val_fraction=0.05, seed=0):
    names = {name for group in groups for name in group}
    if not 0 < val_fraction < 1 or names - {d.id for d in documents}:
        raise ValueError(f"wrong arguments: {sorted(names - {d.id for d in documents})}")
    left = val_fraction * sum(len(d.text) for d in documents)
    if min(len(d.text) for d in documents) > left:
        raise ValueError("nothing fits")
    ordered = sorted(documents, key=lambda d: d.id)
    units = sorted([sorted(group) for group in groups] + [[d.id] for d in ordered if d.id not in names])
    random.Random(seed).shuffle(units)
    chosen, length = set(), {d.id: len(d.text) for d in documents}
    for unit in units:
        for name in unit:
            if length[name] <= left:
                chosen.add(name)
                left -= length[name]
    return [d for d in ordered if d.id not in chosen], [d for d in ordered if d.id in chosen]
"""

DUPLICATES_BY_NAME = """
def find_duplicates(documents, threshold, bands=32, rows=4):
    table = {d.id: shingles_of(d.text) for d in documents}
    names = list(table)
    signatures = np.stack([minhash(table[name], bands * rows) for name in names])
    pairs = []
    for i, j in sorted(candidate_pairs(signatures, bands, rows)):
        if not similarity(table[names[i]], table[names[j]]) < threshold:
            pairs.append((i, j))
    groups = [{names[i] for i in group} for group in connected_groups(len(names), pairs)]
    return sorted(sorted(group) for group in groups if len(group) >= 2)
"""

DUPLICATES_BY_ESTIMATE = """
def find_duplicates(documents, threshold, bands=32, rows=4):
    signatures = np.array([minhash(shingles_of(d.text), bands * rows) for d in documents])
    groups = connected_groups(len(documents), candidate_pairs(signatures, bands, rows))
    return sorted(sorted(documents[i].id for i in group) for group in groups if len(group) > 1)
"""

EMPTY_PAGES_DROPPED = """
def find_duplicates(documents, threshold, bands=32, rows=4):
    sets = [s for s in (shingles_of(document.text) for document in documents) if s]
    signatures = np.array([minhash(one, bands * rows) for one in sets]).reshape(-1, bands * rows)
    candidates = candidate_pairs(signatures, bands, rows)
    pairs = {(i, j) for i, j in candidates if similarity(sets[i], sets[j]) >= threshold}
    groups = [sorted(documents[i].id for i in group) for group in connected_groups(len(sets), pairs)]
    return sorted(group for group in groups if len(group) > 1)
"""

FIRST_AND_LAST_ONLY = """
def find_duplicates(documents, threshold, bands=32, rows=4):
    sets = [shingles_of(document.text) for document in documents]
    signatures = np.array([minhash(one, bands * rows) for one in sets]).reshape(-1, bands * rows)
    groups, used = [], set()
    for i, j in sorted(candidate_pairs(signatures, bands, rows)):
        if not {i, j} & used and similarity(sets[i], sets[j]) >= threshold:
            groups.append(sorted([documents[i].id, documents[j].id]))
            used |= {i, j}
    return sorted(groups)
"""

DECISIONS_WITH_ARRAYS = """
wrong_share = {n: 0 for n in sizes}
for n in sizes:
    wrong = 0
    for jaccard in pairs:
        first = np.stack([minhash(a, n) for a, _ in pairs[jaccard]])
        second = np.stack([minhash(b, n) for _, b in pairs[jaccard]])
        called_duplicates = np.count_nonzero(first == second, axis=1) / n >= 0.75
        wrong += np.sum(called_duplicates if jaccard == 0.7 else ~called_duplicates)
    wrong_share[n] = float(wrong) / sum(map(len, pairs.values()))
needed = next(n for n in sizes if wrong_share[n] < 0.05)
"""

BITS_BY_REMAINDER = """
def estimate_from_bits(first, second, bits):
    step = 2**bits
    m = sum(int(x) % step == int(y) % step for x, y in zip(first, second)) / len(first)
    return (m * step - 1) / (step - 1)
"""

ATTEMPTS = [
    # Exercise 1
    Attempt("the chapter's shingles, of words", "shingles", "shingles_runs", PASTED_SHINGLES),
    Attempt("the last run forgotten", "shingles", "shingles_runs", edits=(("- size + 1)}", "- size)}"),)),
    Attempt("always runs of 7", "shingles", "shingles_runs",
            edits=(("text[i:i + size]", "text[i:i + 7]"), ("- size + 1)}", "- 6)}"))),
    Attempt("lower instead of casefold", "shingles", "shingles_spelling", edits=(("casefold", "lower"),)),
    Attempt("spaces evened out, but not line ends", "shingles", "shingles_spelling",
            edits=(('.split())', '.replace("\\n", " ").strip().split(" "))'),)),
    Attempt("punctuation removed, as in the chapter", "shingles", "shingles_spelling",
            edits=(("    text = ", "    import re\n    text = re.sub(r'[^\\w\\s]', '', text)\n    text = "),)),
    Attempt("a short text is one shingle, as in the chapter", "shingles", "shingles_short",
            edits=(("range(len(text) - size + 1)", "range(max(len(text) - size + 1, 1))"),)),
    Attempt("only a size of 0 refused", "shingles", "shingles_short", edits=(("size < 1", "size == 0"),)),
    Attempt("a size of 0 let through", "shingles", "shingles_short", edits=(("size < 1", "size < 0"),)),
    Attempt("a message without the value", "shingles", "shingles_short",
            edits=(('f"size is {size}; it must be at least 1."', '"size must be > 0"'),)),
    Attempt("right: with re and zip", "shingles", code=SHINGLES_BY_SLIDING),
    Attempt("the chapter's jaccard: two empty sets are equal", "similarity", "similarity_of_sets", PASTED_JACCARD),
    Attempt("shared ones counted twice", "similarity", "similarity_of_sets",
            edits=(("len(a | b)", "len(a) + len(b)"),)),
    Attempt("the first set is changed", "similarity", "similarity_of_sets", SIMILARITY_IN_PLACE),
    Attempt("right: members counted one by one", "similarity", code=SIMILARITY_BY_COUNTING),
    # Exercise 2
    Attempt("the chapter's minhash, modulo 2**64", "minhash", "minhash_values", PASTED_MINHASH),
    Attempt("the product overflows 32 bits", "minhash", "minhash_values",
            edits=(("a * x[:, None] + b", "(a * x[:, None]).astype(np.uint32) + b"),)),
    Attempt("the minimum along the wrong axis", "minhash", "minhash_values",
            edits=((".min(axis=0)", ".min(axis=1)"),)),
    Attempt("the minimum before the remainder", "minhash", "minhash_values",
            edits=(("((a * x[:, None] + b) % PRIME).min(axis=0)", "((a * x[:, None] + b).min(axis=0) % PRIME)"),)),
    Attempt("in floating point, whose 53 bits are too few", "minhash", "minhash_values",
            edits=(("for shingle in shingles], dtype=np.int64)", "for shingle in shingles], dtype=np.float64)"),)),
    Attempt("Python's own hash, other numbers in every run", "minhash", "minhash_values", MINHASH_BUILT_IN_HASH),
    Attempt("the numbers of the visible check memorised", "minhash", "minhash_values", MINHASH_MEMORISED),
    Attempt("returned as int64", "minhash", "minhash_form", edits=((".astype(np.uint32)", ""),)),
    Attempt("always 128 numbers", "minhash", "minhash_form", edits=(("shuffles(n_perm)", "shuffles(128)"),)),
    Attempt("the set is empty afterwards", "minhash", "minhash_form", MINHASH_USES_UP_THE_SET),
    Attempt("zeros for an empty set", "minhash", "minhash_empty", edits=(("n_perm, PRIME", "n_perm, 0"),)),
    Attempt("no thought of an empty set", "minhash", "minhash_empty", edits=(("if not shingles", "if False"),)),
    Attempt("right: two loops over Python's integers", "minhash", code=MINHASH_BY_LOOPS),
    Attempt("right: one shuffle at a time, unbounded integers", "minhash", code=MINHASH_ONE_SHUFFLE_AT_A_TIME),
    # Exercise 3
    Attempt("averaged over the pairs", "estimate", "estimate_share", edits=(("axis=1", "axis=0"),)),
    Attempt("always divided by 128", "estimate", "estimate_share",
            edits=((".mean(axis=1)", ".sum(axis=1) / 128"),)),
    Attempt("the signatures are changed", "estimate", "estimate_share", ESTIMATE_CROSSES_OUT),
    Attempt("the chapter's estimate: empty equals empty", "estimate", "estimate_empty", ESTIMATE_PASTED),
    Attempt("right: by loops, as float32", "estimate", code=ESTIMATE_BY_LOOPS),
    # Exercise 4
    Attempt("bands and rows exchanged", "candidates", "candidates_bands",
            edits=(("for band in range(bands)", "bands, rows = rows, bands\n    for band in range(bands)"),)),
    Attempt("only neighbours in a bucket", "candidates", "candidates_bands", ONLY_NEIGHBOURS),
    Attempt("all columns, also those behind the last band", "candidates", "candidates_bands",
            edits=(("    for band in range(bands):", "    for band in range(signatures.shape[1] // rows):"),)),
    Attempt("one dictionary for all bands", "candidates", "candidates_same_band",
            edits=(("        buckets = defaultdict(list)\n", ""),
                   ("    pairs = set()\n", "    pairs = set()\n    buckets = defaultdict(list)\n"),
                   ("for i in bucket[:place]", "for i in bucket[:place] if i != j"))),
    Attempt("the values joined as text to make a key", "candidates", "candidates_same_band",
            edits=(("buckets[tuple(values)]", "buckets[''.join(map(str, values))]"),)),
    Attempt("empty texts are each other's candidates", "candidates", "candidates_empty",
            edits=(("if PRIME not in values", "if True"),)),
    Attempt("row numbers shift when empty texts are taken out", "candidates", "candidates_empty",
            EMPTY_ROWS_TAKEN_OUT),
    Attempt("too many bands are let through", "candidates", "candidates_errors",
            edits=((" or bands * rows > signatures.shape[1]", ""),)),
    Attempt("minus one band of minus four rows is let through", "candidates", "candidates_errors",
            edits=(("bands < 1 or rows < 1 or", "bands * rows == 0 or"),)),
    Attempt("right: all pairs, compared with NumPy", "candidates", code=ALL_PAIRS),
    Attempt("right: bytes as keys, combinations", "candidates", code=BUCKETS_OF_BYTES),
    # Exercise 5
    Attempt("two groups that meet later are not joined", "groups", "groups_connected", NOT_JOINED),
    Attempt("groups of one left out, as in the chapter", "groups", "groups_alone", WITHOUT_SINGLES),
    Attempt("not sorted", "groups", "groups_alone",
            edits=(("sorted(sorted(group) for group in different)", "[list(group) for group in different][::-1]"),)),
    Attempt("recursion", "groups", "groups_long_chain", RECURSIVE),
    Attempt("right: breadth first", "groups", code=BREADTH_FIRST),
    Attempt("right: union-find in an array", "groups", code=UNION_FIND),
    # Exercise 6
    Attempt("the chapter's split, which knows no groups", "split", "split_together", PASTED_SPLIT),
    Attempt("the allowance runs out in the middle of a group", "split", "split_together",
            SPLIT_DOCUMENT_BY_DOCUMENT),
    Attempt("documents that no group names are lost", "split", "split_everyone",
            edits=(("alone = [[name] for name in size if name not in grouped]", "alone = []"),
                   ("[d for d in ordered if d.id not in chosen]",
                    "[d for d in ordered if d.id not in chosen and d.id in grouped]"))),
    Attempt("not sorted by id", "split", "split_everyone",
            edits=(("sorted(documents, key=lambda document: document.id)", "documents"),)),
    Attempt("documents counted instead of characters", "split", "split_share",
            edits=(("sum(size.values())", "len(size)"), ("sum(size[name] for name in group)", "len(group)"))),
    Attempt("the group that goes over the bound is taken, too", "split", "split_share",
            edits=(("if (n := sum(size[name] for name in group)) <= left:",
                    "if (n := sum(size[name] for name in group)) and left > 0:"),)),
    Attempt("gives up if the first group drawn does not fit", "split", "split_errors",
            edits=(("            left -= n\n", "            left -= n\n        else:\n            break\n"),)),
    Attempt("right: stops at the first group that does not fit, once it has one", "split",
            edits=(("            left -= n\n", "            left -= n\n        elif chosen:\n            break\n"),)),
    Attempt("less than half of the allowance is used", "split", "split_share",
            edits=(("left = val_fraction *", "left = 0.45 * val_fraction *"),)),
    Attempt("depends on the order of the documents", "split", "split_order",
            edits=(("everything = sorted([sorted(group) for group in groups if group] + alone)",
                    "everything = [sorted(group) for group in groups if group] + alone"),)),
    Attempt("groups sorted, but not the ids inside", "split", "split_order",
            edits=(("[sorted(group) for group in groups if group]", "[list(group) for group in groups if group]"),)),
    Attempt("the seed is not used: largest groups first", "split", "split_random",
            edits=(("random.Random(seed).shuffle(everything)",
                    "everything.sort(key=lambda group: -sum(size[name] for name in group))"),)),
    Attempt("shuffled, and then smallest groups first", "split", "split_random",
            edits=(("random.Random(seed).shuffle(everything)", "random.Random(seed).shuffle(everything)\n"
                    "    everything.sort(key=lambda group: sum(size[name] for name in group))"),)),
    Attempt("documents of no group first, so that groups never get a turn", "split", "split_random",
            edits=(("random.Random(seed).shuffle(everything)",
                    "random.Random(seed).shuffle(everything)\n    everything.sort(key=len)"),)),
    Attempt("random.seed, which others notice", "split", "split_untouched",
            edits=(("random.Random(seed).shuffle(", "random.seed(seed)\n    random.shuffle("),)),
    Attempt("sorts the list that it was given", "split", "split_untouched",
            edits=(("ordered = sorted(documents, key=lambda document: document.id)",
                    "documents.sort(key=lambda document: document.id)\n    ordered = documents"),)),
    Attempt("an unknown id in a group is passed over", "split", "split_errors",
            edits=(("if unknown := sorted(grouped - set(size)):", "if unknown := []:"),
                   ("sum(size[name] for name in group)", "sum(size.get(name, 0) for name in group)"))),
    Attempt("an empty validation set without a word", "split", "split_errors",
            edits=(("if not chosen:", "if False:"),)),
    Attempt("right: the best of five draws, with NumPy-free weights", "split", code=SPLIT_BY_DRAWS),
    # Exercise 7
    Attempt("each page in one pair only, no chains", "find_duplicates", "use_finds", FIRST_AND_LAST_ONLY),
    Attempt("more than the threshold instead of at least, on estimates", "find_duplicates", "use_finds",
            edits=((">= threshold", "> max(threshold, 0.75) + 0.05"),)),
    Attempt("candidates are not confirmed", "find_duplicates", "use_confirms", DUPLICATES_BY_ESTIMATE),
    Attempt("a threshold fixed in the code", "find_duplicates", "use_confirms",
            edits=((">= threshold", ">= 0.7"),)),
    Attempt("row numbers shift when empty pages are dropped", "find_duplicates", "use_empty_pages",
            EMPTY_PAGES_DROPPED),
    Attempt("right: by names", "find_duplicates", code=DUPLICATES_BY_NAME),
    Attempt("split without the groups", "use_split", "use_no_leak",
            edits=(("split_groups(collection, groups, 0.2)", "split_groups(collection, [], 0.2)"),)),
    Attempt("all copies counted, the longest too", "use_split", "use_wasted",
            edits=((" - max(length[name] for name in group)", ""),)),
    Attempt("documents counted instead of characters, in the share", "use_split", "use_wasted",
            edits=(("{page.id: len(page.text) for page in collection}", "{page.id: 1 for page in collection}"),)),
    Attempt("the first text of a group kept", "use_split", "use_wasted",
            edits=(("max(length[name] for name in group)", "length[group[0]]"),)),
    # Exercises 8 to 10
    Attempt("only the pairs of 0.7 counted", "decisions", "decisions_needed",
            edits=(("!= (jaccard >= 0.75)) / 400", "and jaccard < 0.75) / 200"),)),
    Attempt("the largest size that is not enough", "decisions", "decisions_needed",
            edits=(("min(n for n in sizes if wrong_share[n] < 0.05)",
                    "max(n for n in sizes if wrong_share[n] >= 0.05)"),)),
    Attempt("right: new signatures for each size, whole arrays", "decisions", code=DECISIONS_WITH_ARRAYS),
    Attempt("not corrected for chance", "bits", "bits_corrected",
            edits=(("float((m - chance) / (1 - chance))", "float(m)"),)),
    Attempt("one bit too many", "bits", "bits_corrected", edits=(("2**bits - 1)", "2 ** (bits + 1) - 1)"),)),
    Attempt("the highest bits", "bits", "bits_corrected",
            edits=(("mask = np.uint32(2**bits - 1)", "mask = np.uint32((2**bits - 1) << (31 - bits))"),)),
    Attempt("right: by remainders, one after another", "bits", code=BITS_BY_REMAINDER),
    Attempt("the mean of the errors, which cancel", "bits_errors", "bits_compared",
            edits=(("np.sqrt(np.mean(np.square(errors), axis=0))", "np.abs(np.mean(errors, axis=0))"),)),
    Attempt("the twins passed as groups after all", "leaks", "leaks_measured",
            edits=(("split_groups(twins, [],",
                    "split_groups(twins, [sorted(two) for two in twin_of.items()][::2],"),)),
    Attempt("share of all documents, not of the validation documents", "leaks", "leaks_measured",
            edits=(("sum(found) / len(found)", "sum(found) / (30 * len(twins))"),)),
]
