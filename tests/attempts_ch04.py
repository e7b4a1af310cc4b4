"""Solutions to assignment 4 that people hand in: wrong ones, and right ones written differently."""

from tests.attempts import Attempt

CHAPTER_NORM = '''class OffsetNorm(nn.Module):
    def __init__(self, d_model, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
'''

LIBRARY_NORM = '''class OffsetNorm(nn.Module):
    def __init__(self, d_model, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(d_model))

    def forward(self, x):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return F.rms_norm(x.to(wide), self.weight.shape, (1 + self.weight).to(wide), self.eps).to(x.dtype)
'''

LENGTH_NORM = '''class OffsetNorm(nn.Module):
    def __init__(self, d_model, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.zeros(d_model)))

    def forward(self, x):
        kept = x.dtype
        x = x.double()
        length = torch.sqrt(torch.einsum("...d,...d->...", x, x) / x.size(-1) + self.eps)
        x = x / length.unsqueeze(-1)
        return (x + x * self.weight).to(kept)
'''

BLOCK = '''class Block(nn.Module):
    def __init__(self, attention, d_model, d_ff):
        super().__init__()
        self.attention = attention
        self.attention_in, self.attention_out = OffsetNorm(d_model), OffsetNorm(d_model)
        self.mlp_in, self.mlp_out = OffsetNorm(d_model), OffsetNorm(d_model)
        self.w_gate = nn.Linear(d_model, d_ff, bias=False)
        self.w_up = nn.Linear(d_model, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, d_model, bias=False)

'''

INLINE_BLOCK = BLOCK + '''    def mlp(self, x):
        g = x @ self.w_gate.weight.T
        g = g * 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * g.pow(3))))
        return torch.einsum("...f,df->...d", g * (x @ self.w_up.weight.T), self.w_down.weight)

    def forward(self, x, cache=None):
        answer = self.attention(self.attention_in(x), cache)
        stream = self.attention_out(answer) + x
        gate, up = self.w_gate(self.mlp_in(stream)), self.w_up(self.mlp_in(stream))
        return stream.add(self.mlp_out(self.w_down(F.gelu(gate, approximate="tanh") * up)))
'''

CHAPTER_BLOCK = BLOCK + '''    def mlp(self, x):
        return self.w_down(F.gelu(self.w_gate(x), approximate="tanh") * self.w_up(x))

    def forward(self, x, cache=None):
        x = x + self.attention(self.attention_in(x), cache)
        return x + self.mlp(self.mlp_in(x))
'''

IN_PLACE_BLOCK = BLOCK + '''    def mlp(self, x):
        return self.w_down(F.gelu(self.w_gate(x), approximate="tanh") * self.w_up(x))

    def forward(self, x, cache=None):
        x.data += self.attention_out(self.attention(self.attention_in(x), cache)).data
        return x + self.mlp_out(self.mlp(self.mlp_in(x)))
'''

CHAPTER_INIT = '''@torch.no_grad()
def initialise(model, n_layers, generator):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            writes = name.endswith(("out_proj.weight", "w_down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers) if writes else 0.02, generator=generator)
'''

LINEAR_LAST_INIT = '''@torch.no_grad()
def initialise(model, n_layers, generator):
    for parameter in model.parameters():
        parameter.zero_()
    for kind in (nn.Embedding, nn.Linear):
        for name, module in model.named_modules():
            if isinstance(module, kind):
                std = 0.02 if kind is nn.Embedding else module.in_features ** -0.5
                if name.split(".")[-1] in ("out_proj", "w_down"):
                    std /= math.sqrt(2 * n_layers)
                module.weight.normal_(std=std, generator=generator)
'''

UNTYING_INIT = '''def initialise(model, n_layers, generator):
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Linear)):
            std = 0.02 if isinstance(module, nn.Embedding) else module.in_features ** -0.5
            if name.endswith(("out_proj", "w_down")):
                std /= math.sqrt(2 * n_layers)
            module.weight = nn.Parameter(std * torch.randn(module.weight.shape, generator=generator))
'''

EMBEDDING_LAST_INIT = '''def initialise(model, n_layers, generator):
    for parameter in model.parameters():
        parameter.data.fill_(0)
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            scale = 1 / math.sqrt(module.in_features)
            if name.split(".")[-1] in ("out_proj", "w_down"):
                scale = scale / math.sqrt(2 * n_layers)
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * scale)
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * 0.02)
'''

CHECKS = '''def next_distribution(logits, temperature=1.0, top_k=None, top_p=None):
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}")
    if top_k is not None and not 1 <= top_k <= logits.size(-1):
        raise ValueError(f"top_k is {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}")
'''

CHAPTER_DIALS = CHECKS + '''    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        best, order = logits.sort(dim=-1, descending=True)
        mass = best.softmax(-1).cumsum(-1)
        before = F.pad(mass[..., :-1], (1, 0))
        kept = best.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, kept)
    return logits.softmax(-1)
'''

SORTED_DIALS = CHECKS + '''    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best, order = logits.sort(dim=-1, descending=True)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None:
        kept &= logits >= best[:, top_k - 1 : top_k]
    if top_p is not None and top_p < 1:
        mass = best.softmax(-1).cumsum(-1)
        inside = F.pad(mass[:, :-1], (1, 0)) < top_p
        kept &= UNSORT
    if temperature == 0:
        largest = (logits == best[:, :1]).to(logits.dtype)
        return largest / largest.sum(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(~kept, -torch.inf) / temperature, dim=-1)
'''

LOOP_DIALS = CHECKS + '''    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = []
    for row in logits.tolist():
        largest = max(row)
        p = [math.exp(z - largest) for z in row]
        p = [value / sum(p) for value in p]
        order = sorted(range(len(row)), key=lambda i, row=row: -row[i])
        edge = -math.inf
        if top_k is not None:
            edge = row[order[top_k - 1]]
        if top_p is not None and top_p != 1:
            total = 0.0
            for i in order:
                total += p[i]
                if total >= top_p:
                    edge = max(edge, row[i])
                    break
        if temperature == 0:
            heated = [float(z == largest) for z in row]
        else:
            heated = [math.exp((z - largest) / temperature) if z >= edge else 0.0 for z in row]
        rows.append([value / sum(heated) for value in heated])
    return torch.tensor(rows, dtype=wide)
'''

TOPK_DIALS = CHECKS + '''    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    p = logits.softmax(dim=-1)
    drop = torch.zeros_like(logits, dtype=torch.bool)
    if top_k is not None:
        drop |= logits < logits.topk(top_k, dim=-1).values.min(dim=-1, keepdim=True).values
    if top_p not in (None, 1):
        higher = logits[:, None, :] > logits[:, :, None]  # (B, V, V): the tokens better than each
        drop |= (p[:, None, :] * higher).sum(-1) >= top_p
        ranked = logits.argsort(-1, descending=True)
        before = p.gather(-1, ranked).cumsum(-1) - p.gather(-1, ranked)
        last = (before < top_p).sum(-1, keepdim=True) - 1
        drop |= logits < logits.gather(-1, ranked.gather(-1, last))
    if temperature == 0:
        p = (logits == logits.amax(-1, keepdim=True)).to(p.dtype)
    else:
        p = (logits / temperature).softmax(-1) if not drop.any() else torch.where(
            drop, torch.tensor(-torch.inf, dtype=p.dtype), logits / temperature).softmax(-1)
    return p / p.sum(-1, keepdim=True)
'''

WRITE = '''def write(model, prompt, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, stop=(),
          generator=None):
    if len(prompt) == 0:
        raise ValueError("empty prompt")
'''

CUT_AFTERWARDS = WRITE + '''    text, training = list(prompt), model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits = model(torch.tensor([text[-model.context_length:]]))[:, -1]
            chances = next_distribution(logits, temperature, top_k, top_p)
            text.append(torch.multinomial(chances, 1, generator=generator).item())
    finally:
        model.train(training)
    new = text[len(prompt):]
    for end in range(1, len(new) + 1):
        marks = [len(mark) for mark in stop if tuple(new[:end][-len(mark):]) == tuple(mark)]
        if marks:
            return new[:end - max(marks)]
    return new
'''

TENSOR_WRITE = WRITE + '''    was, out = model.training, torch.empty(0, dtype=torch.int64)
    model.train(False)
    try:
        while len(out) < max_new_tokens:
            ids = torch.cat([torch.tensor(prompt), out])[None]
            if ids.size(1) > model.context_length:
                ids = ids[:, -model.context_length:]
            with torch.inference_mode():
                p = next_distribution(model(ids)[0, -1:], temperature, top_k, top_p)
                new = torch.multinomial(p[0], 1, generator=generator)
            out = torch.cat([out, new.clone()])
            for mark in sorted(stop, key=len, reverse=True):
                if len(out) >= len(mark) and tuple(out[len(out) - len(mark):].tolist()) == tuple(mark):
                    return out[: len(out) - len(mark)].tolist()
        return out.tolist()
    finally:
        if was:
            model.train()
'''

ENTROPY_SCORE = '''def log_probability(model, prompt, continuation):
    if min(len(prompt), len(continuation)) == 0:
        raise ValueError("both need at least one id")
    text = torch.tensor(prompt + continuation)
    if len(text) - 1 > model.context_length:
        raise ValueError("too long")
    with torch.inference_mode():
        logits = model(text[None, :-1])[0, len(prompt) - 1 :]
    return -float(F.cross_entropy(logits, text[len(prompt) :], reduction="sum"))
'''

STABLE_RANK = '''def rank(model, prompt, answers):
    means = torch.tensor([log_probability(model, prompt, answer) / len(answer) for answer in answers])
    return torch.argsort(means, descending=True, stable=True).tolist()
'''

NORM_AND_BLOCK = [
    Attempt("the chapter's RMSNorm pasted", "offset_norm", "norm_weight", code=CHAPTER_NORM),
    Attempt("weight in place of 1 + weight", "offset_norm", "norm_weight", edits=(
        ("(1 + self.weight.to(wide.dtype))", "self.weight"),
            ("torch.zeros", "torch.ones"))),
    Attempt("a plain tensor in place of a parameter", "offset_norm", "norm_weight", edits=(
        ("nn.Parameter(torch.zeros(d_model))", "torch.zeros(d_model)"),)),
    Attempt("the mean subtracted, as in LayerNorm", "offset_norm", "norm_values", edits=(
        ("        normed =", "        wide = wide - wide.mean(-1, keepdim=True)\n        normed ="),)),
    Attempt("the sum of squares in place of the mean", "offset_norm", "norm_values", edits=(
        (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),)),
    Attempt("eps added outside the root", "offset_norm", "norm_values", edits=(
        ("torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)",
         "1 / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps)"),)),
    Attempt("eps fixed", "offset_norm", "norm_values", edits=(("+ self.eps)", "+ 1e-6)"),)),
    Attempt("the mean over the positions", "offset_norm", "norm_values", edits=(
        (".mean(-1, keepdim=True)", ".mean(0, keepdim=True)"),)),
    Attempt("squares in 16 bits", "offset_norm", "norm_precision", edits=(
        ("x.to(torch.promote_types(x.dtype, torch.float32))", "x"),)),
    Attempt("64-bit inputs in 32 bits", "offset_norm", "norm_precision", edits=(
        ("x.to(torch.promote_types(x.dtype, torch.float32))", "x.float()"),)),
    Attempt("the result in the dtype of the weight", "offset_norm", "norm_precision", edits=(
        (".to(x.dtype)", ""),)),
    Attempt("x divided in place", "offset_norm", "norm_input_kept", edits=(
        ("normed = wide * torch", "normed = wide.mul_(torch"), ("+ self.eps)", "+ self.eps))"))),
    Attempt("PyTorch's rms_norm on wide inputs", "offset_norm", code=LIBRARY_NORM),
    Attempt("by the vector's length, in 64 bits", "offset_norm", code=LENGTH_NORM),
    Attempt("silu, as in the chapter's SwiGLU", "block", "block_mlp", edits=(
        ('F.gelu(self.w_gate(x), approximate="tanh")', "F.silu(self.w_gate(x))"),)),
    Attempt("gelu without its tanh form", "block", "block_mlp", edits=((', approximate="tanh"', ""),)),
    Attempt("the other branch bent", "block", "block_mlp", edits=(
        ('F.gelu(self.w_gate(x), approximate="tanh") * self.w_up(x)',
         'self.w_gate(x) * F.gelu(self.w_up(x), approximate="tanh")'),)),
    Attempt("no gate", "block", "block_mlp", edits=((" * self.w_up(x)", ""),)),
    Attempt("the chapter's block: no norm after the branches", "block", "block_order", code=CHAPTER_BLOCK),
    Attempt("norms on the stream, as in 2017", "block", "block_order", edits=(
        ("x = x + self.attention_out(self.attention(self.attention_in(x), cache))",
         "x = self.attention_out(x + self.attention(self.attention_in(x), cache))"),)),
    Attempt("both branches read the same stream", "block", "block_order", edits=(
        ("x = x + self.attention_out(self.attention(self.attention_in(x), cache))",
         "a = self.attention_out(self.attention(self.attention_in(x), cache))"),
        ("return x + self.mlp_out(self.mlp(self.mlp_in(x)))",
         "return x + a + self.mlp_out(self.mlp(self.mlp_in(x)))"))),
    Attempt("attention's norms used for the MLP, too", "block", "block_order", edits=(
        ("self.mlp_out(self.mlp(self.mlp_in(x)))", "self.attention_out(self.mlp(self.attention_in(x)))"),)),
    Attempt("the second addition left out", "block", "block_residual", edits=(
        ("return x + self.mlp_out", "return self.mlp_out"),)),
    Attempt("the normed x added in place of x", "block", "block_residual", edits=(
        ("x = x + self.attention_out", "x = self.attention_in(x) + self.attention_out"),)),
    Attempt("the stream changed in place", "block", "block_residual", code=IN_PLACE_BLOCK),
    Attempt("the cache not passed on", "block", "block_cache", edits=((", cache))", "))"),)),
    Attempt("gelu written out, the MLP inlined", "block", code=INLINE_BLOCK),
]

START = [
    Attempt("the chapter's init_weights pasted", "initialise", "init_spread", code=CHAPTER_INIT),
    Attempt("outputs counted in place of inputs", "initialise", "init_spread", edits=(
        ("parameter.size(1) ** -0.5", "parameter.size(0) ** -0.5"),)),
    Attempt("Xavier: inputs and outputs", "initialise", "init_spread", edits=(
        ("parameter.size(1) ** -0.5", "(2 / sum(parameter.shape)) ** 0.5"),)),
    Attempt("a uniform distribution", "initialise", "init_spread", edits=(
        ("parameter.normal_(std=std, generator=generator)",
         "parameter.uniform_(-std * 3**0.5, std * 3**0.5, generator=generator)"),)),
    Attempt("norms start at 1", "initialise", "init_spread", edits=(
        ("parameter.zero_()", "parameter.fill_(1.0)"),)),
    Attempt("biases left as they were", "initialise", "init_spread", edits=(
        ("parameter.zero_()", "parameter.mul_(1.0)"),)),
    Attempt("the variance divided in place of the standard deviation", "initialise", "init_writes", edits=(
        ("math.sqrt(2 * n_layers)", "(2 * n_layers)"),)),
    Attempt("one addition a layer counted, not two", "initialise", "init_writes", edits=(
        ("math.sqrt(2 * n_layers)", "math.sqrt(n_layers)"),)),
    Attempt("w_down forgotten", "initialise", "init_writes", edits=(('("out_proj", "w_down")', '("out_proj",)'),)),
    Attempt("names compared whole, not their ends", "initialise", "init_writes", edits=(
        ('.split(".")[-1] in ("out_proj"', ' in ("out_proj"'),)),
    Attempt("the linear layer decides over a shared weight", "initialise", "init_tied", code=LINEAR_LAST_INIT),
    Attempt("new parameters: the weight is not shared any more", "initialise", "init_tied", code=UNTYING_INIT),
    Attempt("the generator not used", "initialise", "init_generator", edits=(
        ("parameter.normal_(std=std, generator=generator)", "parameter.normal_(std=std)"),)),
    Attempt("PyTorch's own generator seeded", "initialise", "init_generator", edits=(
        ("    embeddings =", "    torch.manual_seed(generator.initial_seed())\n    embeddings ="),
        ("parameter.normal_(std=std, generator=generator)", "parameter.normal_(std=std)"))),
    Attempt("linear layers first, embeddings over them", "initialise", code=EMBEDDING_LAST_INIT),
]

DIALS = [
    Attempt("the chapter's order: heat, top-k, top-p", "next_distribution", "dist_order", code=CHAPTER_DIALS),
    Attempt("heated before the cut", "next_distribution", "dist_order", edits=(
        ("    best = logits.sort", "    logits = logits / (temperature or 1)\n    best = logits.sort"),
        ("-torch.inf) / temperature", "-torch.inf)"))),
    Attempt("top-p measured on what top-k has left", "next_distribution", "dist_order", edits=(
        ("mass = best.softmax(-1)", "mass = best[:, : top_k or best.size(-1)].softmax(-1)"),
        (".clamp(max=logits.size(-1))", ".clamp(max=mass.size(-1))"))),
    Attempt("argmax at temperature 0", "next_distribution", "dist_temperature", edits=(
        ("largest = logits == best[:, :1]", "largest = F.one_hot(logits.argmax(-1), logits.size(-1))"),)),
    Attempt("divided by a temperature of 0", "next_distribution", "dist_temperature", edits=(
        ("if temperature == 0:", "if temperature < 0:"),)),
    Attempt("probabilities divided by the temperature", "next_distribution", "dist_temperature", edits=(
        ("torch.softmax(logits.masked_fill(~kept, -torch.inf) / temperature, dim=-1)",
         "torch.softmax(logits.masked_fill(~kept, -torch.inf), dim=-1) / temperature"),)),
    Attempt("multiplied by the temperature", "next_distribution", "dist_temperature", edits=(
        ("-torch.inf) / temperature", "-torch.inf) * temperature"),)),
    Attempt("64-bit logits in 32 bits", "next_distribution", "dist_temperature", edits=(
        ("logits.to(torch.promote_types(logits.dtype, torch.float32))", "logits.float()"),)),
    Attempt("exactly k, ties cut by their place", "next_distribution", "dist_top_k", edits=(
        ("kept &= logits >= best[:, top_k - 1 : top_k]",
         "kept &= torch.zeros_like(kept).scatter(-1, logits.topk(top_k).indices, True)"),)),
    Attempt("only what is above the k-th", "next_distribution", "dist_top_k", edits=(
        ("logits >= best[:, top_k - 1 : top_k]", "logits > best[:, top_k - 1 : top_k]"),)),
    Attempt("the first row's k-th logit for all rows", "next_distribution", "dist_top_k", edits=(
        ("best[:, top_k - 1 : top_k]", "best[0, top_k - 1]"),)),
    Attempt("not divided by what is left", "next_distribution", "dist_top_k", edits=(
        ("torch.softmax(logits.masked_fill(~kept, -torch.inf) / temperature, dim=-1)",
         "torch.softmax(logits / temperature, dim=-1) * kept"),)),
    Attempt("the token that passes top_p dropped", "next_distribution", "dist_top_p", edits=(
        ("(mass < top_p).sum(-1, keepdim=True) + 1)", "(mass < top_p).sum(-1, keepdim=True).clamp(min=1))"),)),
    Attempt("the sorted order not undone", "next_distribution", "dist_top_p",
            code=SORTED_DIALS.replace("UNSORT", "inside")),
    Attempt("ties in top-p cut by the order of sorting", "next_distribution", "dist_top_p",
            code=SORTED_DIALS.replace("UNSORT", "torch.zeros_like(kept).scatter(-1, order, inside)")),
    Attempt("unsorted by indexing with the order", "next_distribution", "dist_top_p", code=SORTED_DIALS.replace(
        "UNSORT", "inside.gather(-1, order)")),
    Attempt("top_p = 1 loses the tail by rounding", "next_distribution", "dist_top_p", edits=(
        ("if top_p is not None and top_p < 1:", "if top_p is not None:"),)),
    Attempt("tokens at least as likely as 1 - top_p", "next_distribution", "dist_top_p", edits=(
        ("kept &= logits >= best.gather(-1, n - 1)", "kept &= logits.softmax(-1) >= 1 - top_p"),)),
    Attempt("the logits cut in place", "next_distribution", "dist_top_p", edits=(
        ("logits.masked_fill(~kept, -torch.inf)", "logits.masked_fill_(~kept, -torch.inf)"),)),
    Attempt("no checks", "next_distribution", "dist_refuses", edits=(
        ("if not 0 <= temperature < math.inf:", "if False:"),
        ("if top_k is not None and not 1", "if top_k and not 1"))),
    Attempt("nan and infinity let through", "next_distribution", "dist_refuses", edits=(
        ("if not 0 <= temperature < math.inf:", "if temperature < 0:"),)),
    Attempt("`if top_p`, so that 0 means none", "next_distribution", "dist_refuses", edits=(
        ("if top_p is not None and not 0 < top_p <= 1:", "if top_p and not 0 < top_p <= 1:"),)),
    Attempt("row by row in plain Python", "next_distribution", code=LOOP_DIALS),
    Attempt("ties found by equal probabilities", "next_distribution", edits=(
        ("kept &= logits >= best[:, top_k - 1 : top_k]",
         "kept &= logits.softmax(-1) >= logits.softmax(-1).topk(top_k).values[:, -1:]"),
        ("kept &= logits >= best.gather(-1, n - 1)",
         "kept &= logits.softmax(-1) >= logits.softmax(-1).sort(dim=-1, descending=True).values.gather(-1, n - 1)"))),
    Attempt("pairs of tokens compared", "next_distribution", code=TOPK_DIALS),
]

LOOP = [
    Attempt("the prompt returned as well", "write", "write_greedy", edits=(
        ("    return new\n    ###", "    return prompt + new\n    ###"),)),
    Attempt("the model given only the last id", "write", "write_greedy", edits=(
        ("[[*prompt, *new][-model.context_length :]]", "[[*prompt, *new][-1:]]"),)),
    Attempt("the caller's prompt appended to", "write", "write_greedy", edits=(
        ("    new, was_training = [], model.training",
         "    given, new, was_training = prompt, [], model.training"),
        ("                ended =", "                given.append(new[-1])\n                ended ="),
        ("[*prompt, *new]", "[*given]"))),
    Attempt("ids as tensors", "write", "write_greedy", edits=(
        (", generator=generator).item())", ", generator=generator)[0, 0])"),)),
    Attempt("an empty prompt let through", "write", "write_greedy", edits=(
        ("if not prompt:", "if prompt is None:"),)),
    Attempt("the mark kept", "write", "write_stop", edits=(("return new[: -max(ended)]", "return new"),)),
    Attempt("marks that begin in the prompt", "write", "write_stop", edits=(
        ("new[-len(mark) :] == list(mark)", "[*prompt, *new][-len(mark) :] == list(mark)"),)),
    Attempt("only the first mark looked for", "write", "write_stop", edits=(
        ("for mark in stop if", "for mark in stop[:1] if"),)),
    Attempt("the mark's last id alone", "write", "write_stop", edits=(
        ("new[-len(mark) :] == list(mark)", "new[-1] == mark[-1]"),)),
    Attempt("the shorter of two marks cut off", "write", "write_stop", edits=(("-max(ended)", "-min(ended)"),)),
    Attempt("written to the end, then cut", "write", "write_stop", code=CUT_AFTERWARDS),
    Attempt("the text not cut to the context", "write", "write_context", edits=((" :]]", " * 9 :]]"),)),
    Attempt("the first ids kept, not the last", "write", "write_context", edits=(
        ("[-model.context_length :]", "[: model.context_length]"),)),
    Attempt("one id fewer than there is room for", "write", "write_context", edits=(
        ("-model.context_length :", "-max(1, model.context_length - 1) :"),)),
    Attempt("evaluation mode forgotten", "write", "write_mode", edits=(("    model.eval()\n", ""),)),
    Attempt("gradients recorded", "write", "write_mode", edits=(("torch.no_grad()", "torch.enable_grad()"),)),
    Attempt("always training afterwards", "write", "write_mode", edits=(
        ("model.train(was_training)", "model.train()"),)),
    Attempt("left in evaluation mode by an error", "write", "write_mode", edits=(
        ("    finally:\n        model.train(was_training)",
         "    except ZeroDivisionError:\n        pass\n    model.train(was_training)"),
        ("return new[: -max(ended)]",
         "model.train(was_training)\n                    return new[: -max(ended)]"))),
    Attempt("the generator not passed on", "write", "write_draws", edits=((", generator=generator)", ")"),)),
    Attempt("always the likeliest id", "write", "write_draws", edits=(
        ("torch.multinomial(chances, 1, generator=generator)", "chances.argmax()"),)),
    Attempt("tensors joined, marks sorted by length", "write", code=TENSOR_WRITE),
]

LAST = [
    Attempt("logits read one position too late", "log_probability", "score_sum", edits=(
        ("torch.arange(len(prompt) - 1, len(inputs))",
         "torch.arange(len(prompt), len(inputs) + 1).clamp(max=len(inputs) - 1)"),)),
    Attempt("the first id left out", "log_probability", "score_sum", edits=(
        ("at = torch", "continuation = continuation[1:] or continuation\n    at = torch"),
        ("len(prompt) - 1, len", "len(inputs) - len(continuation), len"))),
    Attempt("the mean", "log_probability", "score_sum", edits=((".sum().item()", ".mean().item()"),)),
    Attempt("logarithm to base 2", "log_probability", "score_sum", edits=(
        (".sum().item()", ".sum().item() / math.log(2)"),)),
    Attempt("logits, no softmax", "log_probability", "score_sum", edits=((".log_softmax(-1)", ""),)),
    Attempt("the last id is an input, too", "log_probability", "score_inputs", edits=(
        ("model(torch.tensor([inputs]))[0]", "model(torch.tensor([[*prompt, *continuation]]))[0, :-1]"),)),
    Attempt("too long by one refused", "log_probability", "score_inputs", edits=(
        ("len(inputs) > model.context_length", "len(inputs) >= model.context_length"),)),
    Attempt("nothing refused", "log_probability", "score_inputs", edits=(
        ("if not prompt or not continuation or len(inputs) > model.context_length:", "if False:"),)),
    Attempt("gradients recorded", "log_probability", "score_inputs", edits=(
        ("torch.no_grad()", "torch.enable_grad()"),)),
    Attempt("the model put into evaluation mode", "log_probability", "score_inputs", edits=(
        ("    with torch.no_grad", "    model.eval()\n    with torch.no_grad"),)),
    Attempt("minus the cross-entropy", "log_probability", code=ENTROPY_SCORE),
    Attempt("sums compared", "rank", "rank_mean", edits=((" / len(answer)", ""),)),
    Attempt("the worst first", "rank", "rank_mean", edits=(("-means[i]", "means[i]"),)),
    Attempt("the place of each answer in place of the indices", "rank", "rank_mean", edits=(
        ("return sorted(range(len(answers)), key=lambda i: -means[i])",
         "return [sorted(means, reverse=True).index(mean) for mean in means]"),)),
    Attempt("divided by the length of the whole text", "rank", "rank_mean", edits=(
        ("/ len(answer)", "/ (len(prompt) + len(answer))"),)),
    Attempt("sorted, then reversed", "rank", "rank_ties", edits=(
        ("sorted(range(len(answers)), key=lambda i: -means[i])",
         "sorted(range(len(answers)), key=lambda i: means[i])[::-1]"),)),
    Attempt("a stable argsort", "rank", code=STABLE_RANK),
    Attempt("the share of one token, not of a text", "exp_dials", "exp_dials_answer", edits=(
        ("1 - (1 - chances[0, 100:].sum().item()) ** 50", "chances[0, 100:].sum().item()"),)),
    Attempt("the two orders exchanged", "exp_dials", "exp_dials_answer", edits=(
        ('{"cut first": next', '{"heat first": next'),
        ('"heat first": next_distribution(ranked / 1.5',
         '"cut first": next_distribution(ranked / 1.5'))),
    Attempt("one answer a layer counted", "exp_loudness", "exp_loudness_answer", edits=(
        ("1 / math.sqrt(2 * 8) - 1", "1 / math.sqrt(8) - 1"),)),
    Attempt("twice the answers counted", "exp_loudness", "exp_loudness_answer", edits=(
        ("1 / math.sqrt(2 * 8) - 1", "1 / math.sqrt(4 * 8) - 1"),)),
    Attempt("tried out in steps, not derived", "exp_loudness", edits=(
        ("quiet = 1 / math.sqrt(2 * 8) - 1",
         "quiet = min((-0.72, -0.74, -0.76, -0.78), key=lambda o: abs(loudness(8, offset=o) - 2**0.5))"),)),
    Attempt("guessed, not measured", "exp_mistakes", "exp_mistakes_answer", code=(
        "share = {0: 0.2, 0.5: 0.2, 1.0: 0.2, 1.5: 0.2, 'top-p': 0.2}\nfaithful = 0.5\n")),
]

ATTEMPTS = NORM_AND_BLOCK + START + DIALS + LOOP + LAST
