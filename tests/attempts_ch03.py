"""Solutions to assignment 3 that people hand in: wrong ones, and right ones written differently."""

from tests.attempts import Attempt

ATTEND = '''def attend(query, key, value, blocked=None, scale=None):
    if blocked is not None and blocked.dtype != torch.bool:
        raise TypeError("blocked must be bool")
    scale = query.size(-1) ** -0.5 if scale is None else scale
'''

CHAPTER_ATTEND = '''def attend(query, key, value, blocked=None, scale=None):
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    if blocked is not None:
        if blocked.dtype != torch.bool:
            raise TypeError("bool")
        scores = scores.masked_fill(~blocked, -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    exponentials = torch.exp(scores - largest.masked_fill(largest == -torch.inf, 0.0))
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0, 1.0)
    return weights @ value, weights
'''

MASK_AFTER = ATTEND + '''    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.softmax(query.to(wide) @ key.to(wide).transpose(-2, -1) * scale, dim=-1)
    if blocked is not None:
        weights = weights.masked_fill(blocked, 0.0)
    return (weights @ value.to(wide)).to(query.dtype), weights.to(query.dtype)
'''

NAN_TO_NUM = ATTEND + '''    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if blocked is not None:
        scores = scores.masked_fill(blocked, -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num()
    return (weights @ value.to(wide)).to(query.dtype), weights.to(query.dtype)
'''

MASKED = "scores.masked_fill(blocked, -torch.inf)"
ADDED = "scores + torch.zeros(blocked.shape, dtype=wide).masked_fill(blocked, -torch.inf)"

SCORES_IN_16_BITS = ATTEND + '''    scores = query * scale @ key.transpose(-2, -1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scores.to(wide)
    if blocked is not None:
        scores = scores.masked_fill(blocked, torch.finfo(wide).min)
    weights = torch.softmax(scores, dim=-1)
    if blocked is not None:
        weights = weights.masked_fill(blocked, 0.0)
    return (weights @ value.to(wide)).to(query.dtype), weights.to(query.dtype)
'''

FIXED_SHAPE = ATTEND + '''    wide = torch.promote_types(query.dtype, torch.float32)
    if query.dim() == 2:
        query, key, value = query[None], key[None], value[None]
        out, weights = attend(query, key, value, blocked, scale)
        return out[0], weights[0]
    if query.dim() == 3:
        out, weights = attend(query[:, None], key[:, None], value[:, None], blocked, scale)
        return out[:, 0], weights[:, 0]
    B, H, T, d = query.shape
    scores = query.to(wide) @ key.to(wide).transpose(2, 3) * scale
    if blocked is not None:
        scores = scores.masked_fill(blocked, torch.finfo(wide).min)
    weights = torch.softmax(scores, dim=3)
    if blocked is not None:
        weights = weights.masked_fill(blocked, 0.0)
    return (weights @ value.to(wide)).to(query.dtype), weights.to(query.dtype)
'''

EINSUM_ATTEND = ATTEND + '''    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (part.to(wide) for part in (query, key, value))
    scores = torch.einsum("...td,...sd->...ts", q * scale, k)
    if blocked is None:
        blocked = torch.zeros_like(scores, dtype=torch.bool)
    nothing = blocked.all(-1, keepdim=True)
    scores = scores.masked_fill(blocked & ~nothing, -torch.inf).masked_fill(nothing, 0.0)
    weights = torch.softmax(scores, -1) * ~nothing
    return torch.einsum("...ts,...se->...te", weights, v).to(query.dtype), weights.to(query.dtype)
'''

LOOP_ATTEND = ATTEND + '''    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    if blocked is not None:
        blocked = blocked.expand(*query.shape[:-1], key.size(-2))
    rows = []
    for t in range(query.size(-2)):
        scores = (q[..., t : t + 1, :] * k).sum(-1) * scale
        allowed = torch.ones_like(scores, dtype=torch.bool) if blocked is None else ~blocked[..., t, :]
        hidden = torch.where(allowed, scores, torch.full_like(scores, -1e30))
        e = torch.exp(hidden - hidden.max(-1, keepdim=True).values) * allowed
        rows.append(e / (e.sum(-1, keepdim=True) + ~allowed.any(-1, keepdim=True)))
    weights = torch.stack(rows, dim=-2)
    return (weights @ v).to(query.dtype), weights.to(query.dtype)
'''

CHAPTER_MASK = '''def blocked_pairs(document, n_queries=None):
    n_keys = document.size(1)
    n = n_keys if n_queries is None else n_queries
    query = torch.arange(n_keys - n, n_keys)[:, None]
    key = torch.arange(n_keys)[None, :]
    padding = (document < 0).int().cumprod(1).sum(1)
    allowed = key <= query
    allowed = (allowed & (key >= padding[:, None, None, None])) | (key == query)
    return ~allowed
'''

LOOP_MASK = '''def blocked_pairs(document, n_queries=None):
    B, T = document.shape
    n = T if n_queries is None else n_queries
    blocked = torch.ones(B, 1, n, T, dtype=torch.bool)
    for b in range(B):
        row = document[b].tolist()
        for i, t in enumerate(range(T - n, T)):
            for s in range(t + 1):
                if row[t] != -1 and row[t] == row[s]:
                    blocked[b, 0, i, s] = False
    return blocked
'''

CHAPTER_ROPE = '''def rotate(x, positions, theta=10_000.0, rotary_dim=None):
    d = x.size(-1)
    r = d if rotary_dim is None else rotary_dim
    if r % 2 or not 2 <= r <= d:
        raise ValueError(f"{r} {d}")
    frequencies = 1.0 / theta ** (torch.arange(0, r, 2).float() / r)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-3)
    part = x[..., :r]
    first, second = part.chunk(2, dim=-1)
    turned = (part * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(x.dtype)
    return torch.cat([turned, x[..., r:]], dim=-1)
'''

CHAPTER_INTERLEAVED = '''def rotate(x, positions, theta=10_000.0, rotary_dim=None):
    d = x.size(-1)
    r = d if rotary_dim is None else rotary_dim
    if r % 2 or not 2 <= r <= d:
        raise ValueError(f"{r} {d}")
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)
    angles = (positions.float()[..., None] * frequencies).unsqueeze(-3)
    cos, sin = angles.cos()[..., : r // 2], angles.sin()[..., : r // 2]
    first, second = x[..., :r:2], x[..., 1:r:2]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., r:]], dim=-1)
'''

COMPLEX_ROPE = '''def rotate(x, positions, theta=10_000.0, rotary_dim=None):
    d = x.shape[-1]
    r = rotary_dim if rotary_dim is not None else d
    if r < 2 or r > d or r % 2 == 1:
        raise ValueError(f"rotary_dim {r} does not fit a head of {d}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = positions.to(wide).unsqueeze(-1) / theta ** (torch.arange(r // 2).to(wide) * 2 / r)
    if positions.dim() == 2:
        angles = angles[:, None]
    pairs = torch.view_as_complex(x[..., :r].to(wide).unflatten(-1, (-1, 2)).contiguous())
    result = x.clone()
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    result[..., :r] = turned.to(x.dtype)
    return result
'''

LOOP_ROPE = '''def rotate(x, positions, theta=10_000.0, rotary_dim=None):
    d = x.shape[-1]
    rotary_dim = d if rotary_dim is None else rotary_dim
    if rotary_dim not in range(2, d + 1, 2):
        raise ValueError(f"rotary_dim {rotary_dim}, head size {d}")
    positions = positions.expand(x.size(0), -1)
    result = x.clone()
    for i in range(rotary_dim // 2):
        angle = positions.double() * theta ** (-2 * i / rotary_dim)
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., 2 * i].double(), x[..., 2 * i + 1].double()
        result[..., 2 * i] = (a * c - b * s).to(x.dtype)
        result[..., 2 * i + 1] = (a * s + b * c).to(x.dtype)
    return result
'''

CLASS = '''class GroupedAttention(nn.Module):
    def __init__(self, d_model, n_heads, n_kv_heads, rotary_dim=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, d_model // n_heads
        self.rotary_dim = rotary_dim
        self.w_qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=False)

'''

CHAPTER_HEADS = '''groups = self.w_qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = groups.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)'''

LOOP_LAYER = CLASS + '''    def heads(self, x):
        flat, d, g = self.w_qkv(x), self.head_dim, self.n_heads // self.n_kv_heads
        queries, keys, values = [], [], []
        for j in range(self.n_kv_heads):
            pieces = flat[..., j * (g + 2) * d : (j + 1) * (g + 2) * d].split(d, dim=-1)
            queries += pieces[:g]
            keys.append(pieces[g])
            values.append(pieces[g + 1])
        return torch.stack(queries, 1), torch.stack(keys, 1), torch.stack(values, 1)

    def forward(self, x, document=None):
        query, key, value = self.heads(x)
        at = torch.arange(x.size(1)).expand(x.size(0), -1)
        blocked = blocked_pairs(torch.full(x.shape[:2], 8) if document is None else document)
        query, key = rotate(query, at, 10_000.0, self.rotary_dim), rotate(key, at, 10_000.0, self.rotary_dim)
        out = []
        for h in range(self.n_heads):
            j = h // (self.n_heads // self.n_kv_heads)
            out.append(attend(query[:, h], key[:, j], value[:, j], blocked[:, 0])[0])
        return self.out_proj(torch.cat(out, dim=-1))
'''

CACHE = '''class SinkCache:
    def __init__(self, n_sinks, window):
        self.n_sinks, self.window, self.length = n_sinks, window, 0
        self.keys = self.values = self.positions = None

'''

CHAPTER_CACHE = CACHE + '''    def append(self, key, value):
        n = key.size(2)
        at = torch.arange(self.length, self.length + n)
        if self.keys is not None:
            key = torch.cat([self.keys, key], dim=2)
            value = torch.cat([self.values, value], dim=2)
            at = torch.cat([self.positions, at])
        self.length += n
        self.keys, self.values, self.positions = (
            key[:, :, -self.window:], value[:, :, -self.window:], at[-self.window:])
        return key, value, at
'''

SLICED_CACHE = CACHE + '''    def append(self, key, value):
        n = key.size(2)
        at = torch.arange(self.length, self.length + n)
        if self.keys is not None:
            key = torch.cat([self.keys, key], dim=2)
            value = torch.cat([self.values, value], dim=2)
            at = torch.cat([self.positions, at])
        self.length += n
        s, w = self.n_sinks, self.window
        self.keys = torch.cat([key[:, :, :s], key[:, :, -w:]], dim=2)
        self.values = torch.cat([value[:, :, :s], value[:, :, -w:]], dim=2)
        self.positions = torch.cat([at[:s], at[-w:]])
        return key, value, at
'''

BUFFER_CACHE = CACHE + '''    def append(self, key, value):
        if self.keys is None:
            self.buffer = torch.zeros(2, *key.shape[:2], 64, key.size(-1))
            self.keys, self.values = self.buffer[0][:, :, :0], self.buffer[1][:, :, :0]
            self.positions = torch.arange(0)
        held, n = self.keys.size(2), key.size(2)
        self.buffer[0][:, :, :held], self.buffer[1][:, :, :held] = self.keys.clone(), self.values.clone()
        self.buffer[0][:, :, held : held + n], self.buffer[1][:, :, held : held + n] = key, value
        at = torch.cat([self.positions, torch.arange(self.length, self.length + n)])
        keys, values = self.buffer[0][:, :, : held + n], self.buffer[1][:, :, : held + n]
        self.length += n
        keep = (at < self.n_sinks) | (at >= self.length - self.window)
        self.keys, self.values, self.positions = keys[:, :, keep], values[:, :, keep], at[keep]
        return keys, values, at
'''

LIST_CACHE = CACHE + '''    def append(self, key, value):
        held = [] if self.keys is None else list(zip(
            self.positions.tolist(), self.keys.unbind(2), self.values.unbind(2), strict=True))
        held += zip(range(self.length, self.length + key.size(2)), key.unbind(2), value.unbind(2), strict=True)
        self.length += key.size(2)
        kept = [item for item in held if item[0] < self.n_sinks or item[0] + self.window >= self.length]
        self.positions, self.keys, self.values = self.together(kept)
        positions, keys, values = self.together(held)
        return keys, values, positions

    def together(self, items):
        return (torch.tensor([item[0] for item in items]), torch.stack([item[1] for item in items], dim=2),
                torch.stack([item[2] for item in items], dim=2))
'''

STEPWISE_STREAM = '''def stream(layer, x, cache):
    out = []
    for one in x.split(1, dim=1):
        query, key, value = layer.heads(one)
        keys, values, at = cache.append(key, value)
        now = at[-1]
        seen = (at < cache.n_sinks) | (at > now - cache.window)
        keys, values, at = keys[:, :, seen], values[:, :, seen], at[seen]
        query = rotate(query, now[None], rotary_dim=layer.rotary_dim)
        keys = rotate(keys, at, rotary_dim=layer.rotary_dim)
        g = layer.n_heads // layer.n_kv_heads
        mixed = [attend(query[:, h], keys[:, h // g], values[:, h // g])[0] for h in range(layer.n_heads)]
        out.append(layer.out_proj(torch.cat(mixed, dim=-1)))
    return torch.cat(out, dim=1)
'''

LOOP_IMPORT = '''def import_weights(layer, w_q, w_k, w_v, w_o):
    d, g, new = layer.head_dim, layer.n_heads // layer.n_kv_heads, []
    for j in range(layer.n_kv_heads):
        for matrix, number in [(w_q, j * g + i) for i in range(g)] + [(w_k, j)]:
            for i in range(d // 2):
                new += [matrix[number * d + i], matrix[number * d + i + d // 2]]
        new += [w_v[j * d + i] for i in range(d)]
    layer.w_qkv.weight.data = torch.stack(new)
    layer.out_proj.weight.data = w_o.clone()
'''

LOOP_PRECISION = '''errors, first_bad = {}, {}
speeds = torch.tensor([10_000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
for dtype in (torch.bfloat16, torch.float16):
    name, values, found = str(dtype).split(".")[1], [], []
    while len(values) < 400 or len(found) < 2:
        position = float(len(values))
        wrong = (torch.tensor(position).to(dtype) * speeds.to(dtype)).double().cos()
        values.append(max((wrong - (position * speeds).cos()).abs().tolist()))
        if len(found) < 2 and values[-1] > (0.1, 1)[len(found)]:
            found.append(len(values) - 1)
    errors[name], first_bad[name] = values, tuple(found)
'''

BISECTION = '''needed = {}
torch.manual_seed(5)
for n in (16, 256, 4096, 65536):
    found = []
    for _ in range(50):
        others, low, high = torch.randn(n - 1).double().exp().sum(), 0.0, 30.0
        for _ in range(40):
            middle = (low + high) / 2
            share = math.exp(middle) / (math.exp(middle) + others)
            low, high = (middle, high) if share < 0.5 else (low, middle)
        found.append(low)
    needed[n] = sum(found) / 50
longest = int(math.exp(8) / math.exp(0.5))
'''

ATTEND_CELL = [
    Attempt("the scale forgotten", "attend", "attend_scale", edits=(("query.size(-1) ** -0.5 if", "1.0 if"),)),
    Attempt("1/4 memorised from the visible check", "attend", "attend_scale", edits=(
        ("query.size(-1) ** -0.5 if", "0.25 if"),)),
    Attempt("`scale or`, so that a scale of 0 is ignored", "attend", "attend_scale", edits=(
        ("query.size(-1) ** -0.5 if scale is None else scale", "scale or query.size(-1) ** -0.5"),)),
    Attempt("divided by d in place of its root", "attend", "attend_scale", edits=(("** -0.5", "** -1"),)),
    Attempt("softmax over the queries", "attend", "attend_scale", edits=(
        ("exponentials.sum(-1, keepdim=True)", "exponentials.sum(-2, keepdim=True)"),)),
    Attempt("the chapter's function pasted", "attend", "attend_blocked", code=CHAPTER_ATTEND),
    Attempt("the mask after the softmax", "attend", "attend_blocked", code=MASK_AFTER),
    Attempt("-1e4 added to blocked scores", "attend", "attend_blocked", edits=(
        ("scores.masked_fill(blocked, torch.finfo(wide).min)", "scores - 1e4 * blocked"),
        ("weights = weights.masked_fill(blocked, 0.0)", "weights = weights * ~blocked.all(-1, keepdim=True)"))),
    Attempt("-inf, so that 0/0 where all is blocked", "attend", "attend_nothing", edits=(
        ("torch.finfo(wide).min", "-torch.inf"), ("weights.masked_fill(blocked, 0.0)", "weights"))),
    Attempt("minus infinity added, nan_to_num after the softmax: nan in the gradients", "attend", "attend_nothing",
            code=NAN_TO_NUM.replace(MASKED, ADDED)),
    Attempt("-1e9, so that a fully blocked row is an average", "attend", "attend_nothing", edits=(
        ("torch.finfo(wide).min", "-1e9"), ("weights.masked_fill(blocked, 0.0)", "weights"))),
    Attempt("written for two to four dimensions", "attend", "attend_shapes", code=FIXED_SHAPE),
    Attempt("scores in 16 bits, softmax in 32", "attend", "attend_precision", code=SCORES_IN_16_BITS),
    Attempt("everything in 32 bits, 64-bit inputs too", "attend", "attend_precision", edits=(
        ("torch.promote_types(query.dtype, torch.float32)", "torch.float32"),)),
    Attempt("32-bit results for 16-bit inputs", "attend", "attend_precision", edits=(
        ("(weights @ value.to(wide)).to(query.dtype), weights.to(query.dtype)",
         "weights @ value.to(wide), weights"),)),
    Attempt("the largest score not subtracted", "attend", "attend_precision", edits=(
        ("scores - scores.amax(-1, keepdim=True).detach()", "scores"),)),
    Attempt("any mask turned into bool", "attend", "attend_refuses", edits=(
        ("if blocked is not None and blocked.dtype != torch.bool:\n        raise TypeError(", "str("),
        (" with True = must not be looked at.\")",
        "\")\n    blocked = None if blocked is None else blocked.bool()"))),
    Attempt("the query scaled in place", "attend", "attend_inputs_kept", edits=(
        ("scores = query.to(wide)", "query *= scale\n    scores = query.to(wide)"),
        (".transpose(-2, -1) * scale", ".transpose(-2, -1)"))),
    Attempt("nan_to_num after masked_fill, whose gradient is clean", "attend", code=NAN_TO_NUM),
    Attempt("einsum, and -inf only where something is allowed", "attend", code=EINSUM_ATTEND),
    Attempt("a loop over queries", "attend", code=LOOP_ATTEND),
    Attempt("the output from rounded weights", "attend", "attend_precision", edits=(
        ("(weights @ value.to(wide)).to(query.dtype)", "weights.to(query.dtype) @ value"),)),
]

OTHER_FUNCTIONS = [
    Attempt("the chapter's mask pasted and inverted", "blocked_pairs", "blocked_documents", code=CHAPTER_MASK),
    Attempt("texts taken to be numbered in order", "blocked_pairs", "blocked_documents", edits=(
        ("document[:, :, None] == document", "document[:, :, None] <= document"),)),
    Attempt("the first row's texts for all rows", "blocked_pairs", "blocked_documents", edits=(
        ("length = document.size(1)",
         "document = document[:1].expand_as(document)\n    length = document.size(1)"),)),
    Attempt("a position does not see itself", "blocked_pairs", "blocked_future", edits=(
        (">= index)", "> index)"),)),
    Attempt("the first n queries in place of the last", "blocked_pairs", "blocked_future", edits=(
        ("length - n_queries:]", ":n_queries]"),)),
    Attempt("True = may look, as in the chapter", "blocked_pairs", "blocked_future", edits=(("~seen", "seen"),)),
    Attempt("padding is a text of its own", "blocked_pairs", "blocked_padding", edits=(
        (" & (document[:, :, None] >= 0)", ""),)),
    Attempt("padding taken to stand at the end only", "blocked_pairs", "blocked_padding", edits=(
        ("(document[:, :, None] >= 0)", "(index < (document >= 0).sum(1, keepdim=True))[:, :, None]"),)),
    Attempt("three loops", "blocked_pairs", code=LOOP_MASK),
    Attempt("the chapter's half-split pairs", "rotate", "rotate_layout", code=CHAPTER_ROPE),
    Attempt("turned the other way", "rotate", "rotate_layout", edits=(
        ("a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin"),)),
    Attempt("first numbers, then second ones, not put back", "rotate", "rotate_layout", edits=(
        ("torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)",
         "torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)"),)),
    Attempt("speeds 10,000^(-i/r): half the exponent", "rotate", "rotate_layout", edits=(
        ("torch.arange(0, rotary_dim, 2, device=x.device)", "torch.arange(rotary_dim // 2, device=x.device)"),)),
    Attempt("the chapter's interleaved version, speeds of the whole head", "rotate", "rotate_partial",
            code=CHAPTER_INTERLEAVED),
    Attempt("theta ignored", "rotate", "rotate_partial", edits=(("theta ** (", "10_000.0 ** ("),)),
    Attempt("only the turned part returned", "rotate", "rotate_partial", edits=(
        ("torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)", "turned.to(x.dtype)"),)),
    Attempt("rows of positions broadcast against heads", "rotate", "rotate_positions", edits=(
        (".unsqueeze(-3)", ""),)),
    Attempt("the first row's positions for all rows", "rotate", "rotate_positions", edits=(
        ("positions.double()", "positions.view(-1, positions.size(-1))[0].double()"),)),
    Attempt("angles in the dtype of x", "rotate", "rotate_precision", edits=(
        ("positions.double()[..., None] * speeds", "positions.to(x.dtype)[..., None] * speeds.to(x.dtype)"),)),
    Attempt("x turned in place", "rotate", "rotate_precision", edits=(
        ("return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)",
         "x[..., :rotary_dim] = turned.to(x.dtype)\n    return x"),)),
    Attempt("no check of rotary_dim", "rotate", "rotate_refuses", edits=(
        ("if rotary_dim % 2 or not 2 <= rotary_dim <= size:", "if False:"),)),
    Attempt("only odd sizes refused", "rotate", "rotate_refuses", edits=(
        (" or not 2 <= rotary_dim <= size", ""),)),
    Attempt("complex numbers in 32 bits", "rotate", code=COMPLEX_ROPE),
    Attempt("a loop over pairs in 64 bits", "rotate", code=LOOP_ROPE),
]

LAYER = [
    Attempt("the chapter's order: queries, keys, values", "grouped_attention", "layer_heads", edits=(
        ("groups = self.w_qkv(x).unflatten(-1, (self.n_kv_heads, -1, self.head_dim))  # (B, T, K, g + 2, d)\n"
         "        query, key, value = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]",
         CHAPTER_HEADS),)),
    Attempt("a view in place of the transpose", "grouped_attention", "layer_heads", edits=(
        ("return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)",
         "return tuple(p.reshape(p.size(0), p.size(2), p.size(1), -1) for p in (query, key, value))"),)),
    Attempt("key and value exchanged", "grouped_attention", "layer_heads", edits=(
        ("groups[..., -2, :], groups[..., -1, :]", "groups[..., -1, :], groups[..., -2, :]"),)),
    Attempt("heads joined by a reshape alone", "grouped_attention", "layer_output", edits=(
        ("output.transpose(1, 2).flatten(-2)", "output.reshape(x.size(0), x.size(1), -1)"),)),
    Attempt("values turned as well", "grouped_attention", "layer_output", edits=(
        ("query, key = (rotate(part, positions, rotary_dim=self.rotary_dim) for part in (query, key))",
         "query, key, value = (rotate(p, positions, rotary_dim=self.rotary_dim) for p in (query, key, value))"),)),
    Attempt("rotary_dim not passed on", "grouped_attention", "layer_output", edits=(
        (", rotary_dim=self.rotary_dim)", ")"),)),
    Attempt("out_proj left out", "grouped_attention", "layer_output", edits=(
        ("return self.out_proj(", "return ("),)),
    Attempt("repeat: key-value heads 0 1 0 1", "grouped_attention", "layer_groups", edits=(
        ("part.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)",
         "part.repeat(1, self.n_heads // self.n_kv_heads, 1, 1)"),)),
    Attempt("the first key-value head for all", "grouped_attention", "layer_groups", edits=(
        ("part.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)",
         "part[:, [0] * self.n_heads] if self.n_kv_heads < self.n_heads else part"),)),
    Attempt("document ignored", "grouped_attention", "layer_packed", edits=(
        ("if document is None:\n            document", "if True:\n            document"),)),
    Attempt("the first row's document for all rows", "grouped_attention", "layer_packed", edits=(
        ("blocked_pairs(document)", "blocked_pairs(document[:1])"),)),
    Attempt("cut by loops, one attention a head", "grouped_attention", code=LOOP_LAYER),
]

CACHE_CELLS = [
    Attempt("the chapter's window: no sinks", "sink_cache", "cache_keeps", code=CHAPTER_CACHE),
    Attempt("slices that overlap in a short text", "sink_cache", "cache_keeps", code=SLICED_CACHE),
    Attempt("a window one too long", "sink_cache", "cache_keeps", edits=(
        ("positions >= self.length - self.window", "positions >= self.length - self.window - 1"),)),
    Attempt("length counts what is held", "sink_cache", "cache_keeps", edits=(
        ("return held", "self.length = len(self.positions)\n        return held"),)),
    Attempt("drops before it returns", "sink_cache", "cache_returns", edits=(
        ("return held", "return self.keys, self.values, self.positions"),)),
    Attempt("returns the new ones only", "sink_cache", "cache_returns", edits=(
        ("return held", "return key, value, new"),)),
    Attempt("positions counted within the cache", "sink_cache", "cache_positions", edits=(
        ("return held", "return keys, values, torch.arange(keys.size(2))"),)),
    Attempt("a buffer that is written over", "sink_cache", "cache_separate", code=BUFFER_CACHE),
    Attempt("a list of single positions", "sink_cache", code=LIST_CACHE),
    Attempt("each piece turned as if it began at 0", "stream", "stream_pieces", edits=(
        ("own = positions[-x.size(1):]", "own = torch.arange(x.size(1))"),)),
    Attempt("turned keys put into the cache, and turned again", "stream", "stream_pieces", edits=(
        ("keys, values, positions = cache.append(key, value)",
         "key = rotate(key, torch.arange(cache.length, cache.length + x.size(1)), rotary_dim=layer.rotary_dim)\n"
         "    keys, values, positions = cache.append(key, value)"),)),
    Attempt("no mask: new positions see later ones", "stream", "stream_pieces", edits=((", ~seen)", ")"),)),
    Attempt("sees all that the cache hands over", "stream", "stream_window", edits=(
        (" & ((positions < cache.n_sinks) | (positions > own[:, None] - cache.window))", ""),)),
    Attempt("the window off by one", "stream", "stream_window", edits=(
        ("positions > own[:, None] - cache.window", "positions >= own[:, None] - cache.window"),)),
    Attempt("sinks not seen from outside the window", "stream", "stream_window", edits=(
        ("(positions < cache.n_sinks) | ", ""),)),
    Attempt("one position after the other, no mask needed", "stream", code=STEPWISE_STREAM),
]

LAST = [
    Attempt("the chapter's order: queries, keys, values", "import_weights", "import_order", edits=(
        ("torch.cat([query, key, value], dim=1).flatten(0, 2)",
         "torch.cat([query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)])"),)),
    Attempt("values permuted as well", "import_weights", "import_order", edits=(
        ("w_v.view(layer.n_kv_heads, 1, d, -1)", "w_v.view(layer.n_kv_heads, 1, d, -1)[:, :, order]"),)),
    Attempt("w_o itself made the parameter", "import_weights", "import_order", edits=(
        ("layer.out_proj.weight.copy_(w_o)", "layer.out_proj.weight = nn.Parameter(w_o)"),)),
    Attempt("written in place while gradients are recorded", "import_weights", "import_order", edits=(
        ("with torch.no_grad():", "if True:"),)),
    Attempt("no permutation", "import_weights", "import_rotary", edits=(
        ("torch.arange(d).view(2, -1).T.flatten()", "torch.arange(d)"),)),
    Attempt("the permutation the other way round", "import_weights", "import_rotary", edits=(
        ("torch.arange(d).view(2, -1).T.flatten()", "torch.arange(d).view(-1, 2).T.flatten()"),)),
    Attempt("queries permuted, keys not", "import_weights", "import_rotary", edits=(
        ("w_k.view(layer.n_kv_heads, 1, d, -1)[:, :, order]", "w_k.view(layer.n_kv_heads, 1, d, -1)"),)),
    Attempt("row by row, through .data", "import_weights", code=LOOP_IMPORT),
    Attempt("the product in 32 bits", "exp_precision", "exp_precision_answer", edits=(
        ("at.to(dtype)[:, None] * speeds.to(dtype)",
         "at.to(dtype)[:, None].float() * speeds.to(dtype).float()"),)),
    Attempt("the slowest pair only", "exp_precision", "exp_precision_answer", edits=(
        (".abs().amax(1)", ".abs()[:, 1]"),)),
    Attempt("one position after the other", "exp_precision", code=LOOP_PRECISION),
    Attempt("the key's own score among the others", "exp_context", "exp_context_answer", edits=(
        ("logsumexp(-1).mean().item()", "logsumexp(-1).mean().item() + 0.7"),)),
    Attempt("ln 8 in place of 8", "exp_context", "exp_context_answer", edits=(
        ("(8 - needed[256])", "(math.log(8) - needed[256])"),)),
    Attempt("bisection, then the formula", "exp_context", code=BISECTION),
    Attempt("guessed, not trained: sharing is always better", "exp_cache", "exp_cache_answer", code=(
        "losses = {(task, way): 0.1 for task in ('near', 'far') for way in ('sharing', 'forgetting')}\n"
        "better = {'near': 'sharing', 'far': 'sharing'}\nlonger, stuck = 0.1, ('far', 'forgetting')\n")),
    Attempt("slow learning taken for something that cannot be learnt", "exp_cache", "exp_cache_answer", code=(
        "losses = {('near', 'sharing'): 1.0, ('near', 'forgetting'): 0.01, ('far', 'sharing'): 0.31,\n"
        "          ('far', 'forgetting'): 2.78}\n"
        "better = {'near': 'forgetting', 'far': 'sharing'}\nlonger, stuck = 0.47, ('near', 'sharing')\n")),
]

ATTEMPTS = ATTEND_CELL + OTHER_FUNCTIONS + LAYER + CACHE_CELLS + LAST
