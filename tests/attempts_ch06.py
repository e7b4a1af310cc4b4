"""Solutions of assignment 6 that people hand in, wrong and right."""

from tests.attempts import Attempt

CHAPTERS_SFT = '''
def sft_loss(logits, targets, loss_mask=None):
    loss_mask = targets != -100 if loss_mask is None else loss_mask
    if loss_mask.shape != targets.shape:
        raise ValueError(f"The loss mask has shape {tuple(loss_mask.shape)}")
    if not loss_mask.any():
        raise ValueError("The loss mask is 0 everywhere")
    rows, right = logits[loss_mask.bool()], targets[loss_mask.bool()]
    return -torch.log_softmax(rows, dim=-1).gather(-1, right[:, None]).mean()
'''

CHAPTERS_LORA = '''
class LoRA(nn.Module):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise ValueError(f"rank is {rank}")
        self.base, self.rank, self.alpha, self.scale = base.requires_grad_(False), rank, alpha, alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x):
        low = nn.functional.linear(x.to(self.lora_a.dtype), self.lora_a) * self.scale
        return self.base(x) + nn.functional.linear(low, self.lora_b)
'''

CHAPTERS_DPO = '''
def dpo_loss(policy, reference, beta, smoothing=0.0):
    if policy.shape != reference.shape or policy.dim() != 2 or len(policy) != 2 or policy.shape[1] == 0:
        raise ValueError("shapes")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}; it must be above 0 and finite.")
    chosen = policy[0] - reference[0].detach()
    rejected = policy[1] - reference[1].detach()
    return -nn.functional.logsigmoid(beta * (chosen - rejected)).mean(), beta * (chosen - rejected)
'''

BATCH = '''
def chat_batch(conversations, markers, end, pad, length):
    if not conversations or not all(conversations):
        raise ValueError("nothing to learn from")
    everything = []
    for conversation in conversations:
        pairs = []
        for role, ids in conversation:
            if role not in markers:
                raise ValueError(f"role {role}")
            pairs.append((markers[role], -100))
            for token in list(ids) + [end]:
                pairs.append((token, token if role == "assistant" else -100))
        everything.append(pairs[-(length + 1):])
    T = max(map(len, everything)) - 1
    inputs = torch.tensor([[i for i, _ in (p + [(pad, -100)] * (T + 1 - len(p)))[:T]] for p in everything])
    targets = torch.tensor([[t for _, t in (p + [(pad, -100)] * (T + 1 - len(p)))[1:]] for p in everything])
    if (targets == -100).all():
        raise ValueError("no answer")
    return inputs, targets
'''

MASK_BY_PAD = '''
def chat_batch(conversations, markers, end, pad, length):
    if not conversations or not all(conversations):
        raise ValueError("nothing")
    rows, masks = [], []
    for conversation in conversations:
        ids, mask = [], []
        for role, content in conversation:
            if role not in markers:
                raise ValueError(role)
            ids += [markers[role]] + content + [end]
            mask += [0] + [int(role == "assistant")] * (len(content) + 1)
        rows.append(ids[-length - 1:])
        masks.append(mask[-length - 1:])
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([row + [1] * (width - len(row)) for row in masks])
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[mask[:, 1:] == 0] = -100
    targets[targets == pad] = -100  # the padding
    if (targets == -100).all():
        raise ValueError("no answer")
    return inputs, targets
'''

EINSUM_LORA = '''
class LoRA(nn.Module):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        m, n = base.weight.shape
        if rank < 1 or rank > n or rank > m:
            raise ValueError(f"rank {rank} for {m} x {n}")
        for p in base.parameters():
            p.requires_grad = False
        self.base, self.alpha, self.rank, self.p, self.enabled = base, alpha, rank, dropout, True
        bound = (3 / n) ** 0.5  # evenly spread with variance 1 / n
        self.down = nn.Parameter(torch.empty(n, rank).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(rank, m))

    @property
    def scale(self):
        return self.alpha / self.rank ** 0.5

    def forward(self, x):
        y = self.base(x)
        if self.enabled:
            dropped = nn.functional.dropout(x.to(torch.float32), self.p, self.training)
            y = y + torch.einsum("...n,nr,rm->...m", dropped, self.down, self.up).mul(self.scale).type_as(y)
        return y
'''

RECURSIVE_ADD = '''
def add_lora(model, names, rank, alpha, dropout=0.0):
    modules = list(model.named_modules())
    wanted = [(name, m) for name, m in modules if type(m) is nn.Linear and name.rsplit(".", 1)[-1] in names]
    if any(type(m) is LoRA for _, m in modules) or set(names) != {n.rsplit(".", 1)[-1] for n, _ in wanted}:
        raise ValueError(f"{names} in this model")
    if any(not 1 <= rank <= min(m.in_features, m.out_features) for _, m in wanted):
        raise ValueError(f"rank {rank}")
    for p in model.parameters():
        p.requires_grad = False

    def visit(module, prefix):
        for name, child in list(module.named_children()):
            if any(child is m for _, m in wanted):
                module._modules[name] = LoRA(child, rank, alpha, dropout).train(child.training)
            else:
                visit(child, prefix + name + ".")

    visit(model, "")
    return [name for name, _ in wanted]
'''

MERGE_BY_PROBING = '''
def merge_lora(model):
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA)]
    if len(found) == 0:
        raise ValueError("no LoRA in the model")
    for name, module in found:
        parent = model.get_submodule(name.rpartition(".")[0])
        change = torch.einsum("nr,rm->mn", module.down.data, module.up.data) * module.alpha_over_root
        weight = module.base.weight.data.float() + change
        module.base.weight = nn.Parameter(weight.to(module.base.weight.dtype))
        setattr(parent, name.rpartition(".")[2], module.base)
    for p in model.parameters():
        p.requires_grad_()
'''.replace("module.alpha_over_root", "module.scale")

LOOP_LOG_PROBS = '''
def answer_log_probs(logits, targets):
    if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(targets.shape):
        raise ValueError(f"{tuple(logits.shape)} and {tuple(targets.shape)}")
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    sums = []
    for z, y in zip(logits, targets):
        keep = y.ne(-100)
        z, y = z[keep], y[keep]
        sums.append((z[torch.arange(len(y)), y] - z.logsumexp(-1)).sum())
    return torch.stack(sums)
'''

SOFTPLUS_DPO = '''
def dpo_loss(policy, reference, beta, smoothing=0.0):
    if tuple(policy.shape) != tuple(reference.shape) or policy.ndim != 2 or len(policy) != 2 or not policy.numel():
        raise ValueError("two of (2, B)")
    if beta <= 0 or smoothing < 0 or smoothing >= 0.5:
        raise ValueError(f"beta {beta}, smoothing {smoothing}")
    with torch.no_grad():
        fixed = reference.clone()
    pi, rho = policy[0] - policy[1], fixed[0] - fixed[1]
    x = beta * (pi - rho)
    each = nn.functional.softplus(-x) + smoothing * x  # the two terms in one
    return each.sum() / each.numel(), x.detach().clone()
'''

TOGETHER_TRAIN = '''
def train_dpo(model, optimizer, batches, beta, smoothing=0.0, log_probs=answer_log_probs, loss_of=dpo_loss,
              switched_off=without_lora):
    mode = model.training
    model.train(False)
    with torch.no_grad():
        with switched_off(model):  # the frozen model does not change, so all at once
            references = [torch.stack([log_probs(model(x), y) for x, y in pair]) for pair in batches]
    model.train(True)
    log = []
    for ((x1, y1), (x2, y2)), reference in zip(batches, references):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        policy = torch.stack((log_probs(model(x1), y1), log_probs(model(x2), y2)))
        loss, margins = loss_of(policy, reference, beta, smoothing)
        loss.backward()
        log.append((float(loss.detach()), sum(m > 0 for m in margins.tolist()) / len(margins)))
        optimizer.step()
    model.train(mode)
    return log
'''

SWITCH_CLASS = '''
class without_lora:
    def __init__(self, model):
        self.layers = [m for m in model.modules() if hasattr(m, "enabled")]

    def __enter__(self):
        self.states = [m.enabled for m in self.layers]
        for m in self.layers:
            m.enabled = False

    def __exit__(self, *problem):
        for m, state in zip(self.layers, self.states):
            m.enabled = state
        return False
'''

ATTEMPTS = [
    # exercise 1
    Attempt("targets not shifted", "chat_batch", "chat_shift",
            edits=(("torch.tensor(counts[1:], dtype=torch.bool), torch.tensor(ids[1:])",
                    "torch.tensor(counts[:-1], dtype=torch.bool), torch.tensor(ids[:-1])"),)),
    Attempt("shifted by two", "chat_batch", "chat_shift",
            edits=(("torch.tensor(counts[1:], dtype=torch.bool), torch.tensor(ids[1:])",
                    "torch.tensor([*counts[2:], False], dtype=torch.bool), torch.tensor([*ids[2:], 0])"),)),
    Attempt("the mask is not shifted with the targets", "chat_batch", "chat_shift",
            edits=(("torch.tensor(counts[1:],", "torch.tensor(counts[:-1],"),)),
    Attempt("the end of an answer does not count", "chat_batch", "chat_end",
            edits=(('[role == "assistant"] * (len(content) + 1)', '[role == "assistant"] * len(content), False'),
                   )),
    Attempt("the end is appended to the turn itself", "chat_batch", "chat_end",
            edits=(("            ids += [markers[role], *content, end]\n",
                    "            content.append(end)\n            ids += [markers[role], *content]\n"),
                   ("(len(content) + 1)", "len(content)"))),
    Attempt("the marker of an answer counts", "chat_batch", "chat_mask",
            edits=(("counts += [False, ", 'counts += [role == "assistant", '),)),
    Attempt("everything counts", "chat_batch", "chat_mask",
            edits=(('[role == "assistant"] * (len(content) + 1)', "[True] * (len(content) + 1)"),)),
    Attempt("only the last answer counts", "chat_batch", "chat_mask",
            edits=(("            counts += [False", "            counts = [False] * len(counts) + [False"),)),
    Attempt("everything after the first answer's marker counts", "chat_batch", "chat_mask",
            edits=(('[role == "assistant"] * (len(content) + 1)',
                    '[role == "assistant" or any(counts)] * (len(content) + 1)'),)),
    Attempt("the mask made from the padding's id", "chat_batch", "chat_padding", MASK_BY_PAD),
    Attempt("padding counts as a target", "chat_batch", "chat_padding",
            edits=(("torch.full((len(rows), width), -100)", "torch.full((len(rows), width), pad)"),)),
    Attempt("padding on the left", "chat_batch", "chat_padding",
            edits=(("inputs[row, :n]", "inputs[row, width - n :]"),
                   ("targets[row, :n]", "targets[row, width - n :]"))),
    Attempt("the first tokens are kept", "chat_batch", "chat_cut",
            edits=(("(ids[-length - 1 :], counts[-length - 1 :])", "(ids[: length + 1], counts[: length + 1])"),)),
    Attempt("one token too few is kept", "chat_batch", "chat_cut",
            edits=(("(ids[-length - 1 :], counts[-length - 1 :])", "(ids[-length:], counts[-length:])"),)),
    Attempt("nothing to learn is let through", "chat_batch", "chat_errors",
            edits=(("    if not any(any(counts[1:]) for _, counts in rows):\n", "    if not rows:\n"),)),
    Attempt("each conversation must have an answer", "chat_batch", "chat_errors",
            edits=(("if not any(any(counts[1:])", "if not rows or not all(any(counts[1:])"),)),
    Attempt("right: pairs of token and label", "chat_batch", code=BATCH),
    Attempt("the chapter's loss, with a mask for the weights", "sft_loss", "sft_value", CHAPTERS_SFT),
    Attempt("divides by all targets", "sft_loss", "sft_value",
            edits=(("(share * surprise).sum() / share.sum()", "(share * surprise).sum() / targets.numel()"),)),
    Attempt("divides by the number that counts, not by their weight", "sft_loss", "sft_value",
            edits=(("(share * surprise).sum() / share.sum()", "(share * surprise).mean()"),)),
    Attempt("a mean of the rows' means", "sft_loss", "sft_value",
            edits=(("    return (share * surprise).sum() / share.sum()",
                    "    n = counts.sum(dim=1)[:, None].expand(targets.shape)[counts]\n"
                    "    return (share * surprise / n).sum() / (share / n).sum()"),)),
    Attempt("computes in bfloat16", "sft_loss", "sft_value",
            edits=(("torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),)),
    Attempt("looks at the shapes of the targets alone", "sft_loss", "sft_errors",
            edits=((" or weights.shape != targets.shape[:1]", ""),
                   ("weights.to(", "weights[: len(targets)].to("))),
    Attempt("nan where nothing has a weight", "sft_loss", "sft_errors",
            edits=(("if not share.sum() > 0:", "if not len(share):"),)),
    Attempt("right: all positions, where instead of an index", "sft_loss",
            edits=(("    rows = logits[counts].to(share.dtype)  # (N, V)\n"
                    "    surprise = torch.logsumexp(rows, dim=-1) - rows.gather(-1, targets[counts][:, None])[:, "
                    "0]\n"
                    "    return (share * surprise).sum() / share.sum()",
                    "    log_probs = torch.log_softmax(logits.to(share.dtype), dim=-1)\n"
                    "    picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)\n"
                    "    w = torch.where(counts, weights[:, None].to(share.dtype), 0.0)\n"
                    "    return -torch.einsum(\"bt,bt->\", w, picked) / w.sum()"),)),
    # exercise 2
    Attempt("the chapter's layer, pasted", "lora", "lora_forward", CHAPTERS_LORA),
    Attempt("alpha / rank", "lora", "lora_forward", edits=(("alpha / math.sqrt(rank)", "alpha / rank"),)),
    Attempt("no scale at all", "lora", "lora_forward", edits=(("alpha / math.sqrt(rank)", "1.0"),)),
    Attempt("only for one row after the other", "lora", "lora_forward",
            edits=(("change = self.scale * (self.dropout(x.float()) @ self.down @ self.up)",
                    'change = self.scale * torch.einsum("bn,nr,rm->bm", self.dropout(x.float()), self.down, '
                    'self.up)'),)),
    Attempt("the base is left out while there is a change", "lora", "lora_forward",
            edits=(("return out + change.to(out.dtype)", "return change.to(out.dtype) if self.up.any() else out"),
                   )),
    Attempt("both matrices random", "lora", "lora_start",
            edits=(("torch.zeros(rank, base.out", "torch.randn(rank, base.out"),)),
    Attempt("both matrices zero", "lora", "lora_start",
            edits=(("torch.randn(base.in_features", "torch.zeros(base.in_features"),)),
    Attempt("down with a variance of 1", "lora", "lora_start", edits=((" / math.sqrt(base.in_features))", ")"),)),
    Attempt("the base is not frozen", "lora", "lora_start", edits=(("base.requires_grad_(False)", "base"),)),
    Attempt("any rank is taken", "lora", "lora_start",
            edits=(("if not 1 <= rank <= min(base.in_features, base.out_features):", "if False:"),)),
    Attempt("dropout on everything", "lora", "lora_switches",
            edits=(("return out + change.to(out.dtype)", "return self.dropout(out + change.to(out.dtype))"),
                   ("self.dropout(x.float())", "x.float()"))),
    Attempt("dropout also in evaluation mode", "lora", "lora_switches",
            edits=(("self.dropout(x.float())", "nn.functional.dropout(x.float(), self.dropout.p)"),)),
    Attempt("the switch is not looked at", "lora", "lora_switches",
            edits=(("if not self.enabled:", "if False:"),)),
    Attempt("matrices in the base's type", "lora", "lora_types",
            edits=(("self.down = nn.Parameter(torch.randn(base.in_features, rank, device=device)",
                    "self.down = nn.Parameter(torch.randn(base.in_features, rank, "
                    "device=device).to(base.weight.dtype)"),
                   ("rank, base.out_features, device=device)",
                    "rank, base.out_features, device=device).to(base.weight.dtype)"),
                   ("x.float()", "x"))),
    Attempt("the change computed in bfloat16", "lora", "lora_types",
            edits=(("self.dropout(x.float()) @ self.down @ self.up",
                    "self.dropout(x) @ self.down.to(x.dtype) @ self.up.to(x.dtype)"),)),
    Attempt("right: einsum, evenly spread numbers", "lora", code=EINSUM_LORA),
    Attempt("the rest is not frozen", "add_lora", "lora_added",
            edits=(("    model.requires_grad_(False)\n", ""),)),
    Attempt("all is frozen, LoRA too", "add_lora", "lora_added",
            edits=(("    return list(found)", "    model.requires_grad_(False)\n    return list(found)"),)),
    Attempt("in training mode, whatever the layer is in", "add_lora", "lora_added",
            edits=((".train(module.training)", ""),)),
    Attempt("the mode of LoRA itself, not of its dropout", "add_lora", "lora_added",
            edits=(("        model.set_submodule(name, LoRA(module, rank, alpha, dropout).train(module.training))\n",
                    "        layer = LoRA(module, rank, alpha, dropout)\n        layer.training = module.training\n"
                    "        model.set_submodule(name, layer)\n"),)),
    Attempt("names that end alike", "add_lora", "lora_added",
            edits=(('name.split(".")[-1] in names}', 'name.endswith(tuple(names))}'),)),
    Attempt("only children of the model itself", "add_lora", "lora_added",
            edits=(("modules = dict(model.named_modules())", "modules = dict(model.named_children())"),)),
    Attempt("one name that fits is enough", "add_lora", "lora_refuses",
                          edits=(('    if missing := set(names) - {name.split(".")[-1] for name in found}:\n',
                                  "    if missing := set(names) if not found else set():\n"),)),
    Attempt("freezes first, looks afterwards", "add_lora", "lora_refuses",
            edits=(("    modules = dict(model.named_modules())\n",
                    "    model.requires_grad_(False)\n    modules = dict(model.named_modules())\n"),
                   ("    model.requires_grad_(False)\n    for name", "    for name"))),
    Attempt("the rank is looked at while layers are replaced", "add_lora", "lora_refuses",
            edits=(("    if not 1 <= rank <= most:\n", "    if most < 1:\n"),)),
    Attempt("LoRA on LoRA", "add_lora", "lora_refuses",
            edits=(("    if any(isinstance(module, LoRA) for module in modules.values()):\n", "    if False:\n"),
                   )),
    Attempt("right: a walk through the children", "add_lora", code=RECURSIVE_ADD),
    Attempt("the change is not scaled", "merge_lora", "lora_merged",
            edits=(("layer.scale * (layer.down @ layer.up).T", "(layer.down @ layer.up).T"),)),
    Attempt("the change is not transposed", "merge_lora", "lora_merged",
            edits=(("(layer.down @ layer.up).T  #", "(layer.down @ layer.up).reshape(layer.base.weight.shape)  #"),
                   )),
    Attempt("taken off instead of added", "merge_lora", "lora_merged",
            edits=((".float() + change", ".float() - change"),)),
    Attempt("merged in place, into the embedding too", "merge_lora", "lora_merged",
            edits=(("layer.base.weight = nn.Parameter(merged)", "layer.base.weight.data.copy_(merged)"),)),
    Attempt("merged, and LoRA left in place", "merge_lora", "lora_merged",
            edits=(("        model.set_submodule(name, layer.base)\n", ""),)),
    Attempt("merged weights stay frozen", "merge_lora", "lora_merged",
            edits=(("    model.requires_grad_(True)\n", ""),)),
    Attempt("what is switched off is dropped", "merge_lora", "lora_merged",
            edits=((".float() + change", ".float() + change * layer.enabled"),)),
    Attempt("right: through the parent, with einsum", "merge_lora", code=MERGE_BY_PROBING),
    # exercise 3
    Attempt("a mean over the answer", "answer_log_probs", "log_probs_summed",
            edits=(("masked_fill(~counts, 0.0).sum(dim=1)",
                    "masked_fill(~counts, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)"),)),
    Attempt("surprise instead of log-probability", "answer_log_probs", "log_probs_summed",
            edits=(("    return log_probs.", "    return -log_probs."),)),
    Attempt("one number for the whole batch", "answer_log_probs", "log_probs_summed",
            edits=((".sum(dim=1)", ".sum()"),)),
    Attempt("the logarithm of a softmax", "answer_log_probs", "log_probs_summed",
            edits=(("torch.log_softmax(logits, dim=-1)", "torch.softmax(logits, dim=-1).log()"),)),
    Attempt("computes in bfloat16", "answer_log_probs", "log_probs_summed",
            edits=(("    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits\n",
                    ""),)),
    Attempt("ignored targets count as token 0", "answer_log_probs", "log_probs_masked",
            edits=(("log_probs.masked_fill(~counts, 0.0)", "log_probs"),)),
    Attempt("writes 0 over the ignored targets, in place", "answer_log_probs", "log_probs_masked",
            edits=(("targets.masked_fill(", "targets.masked_fill_("),)),
    Attempt("refuses a row without an answer", "answer_log_probs", "log_probs_masked",
            edits=(("    counts = targets != -100\n",
                    "    counts = targets != -100\n    if not counts.any(dim=1).all():\n        raise "
                    "ValueError(\"empty\")\n"),)),
    Attempt("right: a loop over the rows", "answer_log_probs", code=LOOP_LOG_PROBS),
    Attempt("the chapter's loss for stacked rows", "dpo_loss", "dpo_smoothed", CHAPTERS_DPO),
    Attempt("no reference", "dpo_loss", "dpo_value",
            edits=(("gain = policy - reference.detach()", "gain = policy"),)),
    Attempt("chosen and rejected swapped", "dpo_loss", "dpo_value",
            edits=(("(gain[0] - gain[1])", "(gain[1] - gain[0])"),)),
    Attempt("a sum over the pairs", "dpo_loss", "dpo_value", edits=(("return loss.mean()", "return loss.sum()"),)),
    Attempt("margins without beta", "dpo_loss", "dpo_value",
            edits=(("margins.detach()", "margins.detach() / beta"),)),
    Attempt("smoothing of the margin, not of the loss", "dpo_loss", "dpo_smoothed",
            edits=(("    loss = -(1 - smoothing) * log_sigmoid(margins) - smoothing * log_sigmoid(-margins)",
                    "    loss = -log_sigmoid((1 - smoothing) * margins - smoothing * margins)"),)),
    Attempt("smoothing shared by both classes", "dpo_loss", "dpo_smoothed",
            edits=(("    log_sigmoid =", "    smoothing = smoothing / 2\n    log_sigmoid ="),)),
    Attempt("a gradient into the reference", "dpo_loss", "dpo_gradient",
            edits=(("reference.detach()", "reference"),)),
    Attempt("margins with a gradient", "dpo_loss", "dpo_gradient", edits=(("margins.detach()", "margins"),)),
    Attempt("the policy is detached too", "dpo_loss", "dpo_gradient",
            edits=(("gain = policy - reference.detach()",
                    "gain = policy - reference.detach()\n    gain[1] = gain[1].detach()"),)),
    Attempt("the logarithm of a sigmoid", "dpo_loss", "dpo_stable",
            edits=(("log_sigmoid = nn.functional.logsigmoid",
                    "log_sigmoid = lambda x: torch.sigmoid(x).log()  # noqa: E731"),)),
    Attempt("a sigmoid kept from 0 by a small number", "dpo_loss", "dpo_stable",
            edits=(("log_sigmoid = nn.functional.logsigmoid",
                    "log_sigmoid = lambda x: (torch.sigmoid(x) + 1e-9).log()  # noqa: E731"),)),
    Attempt("a smoothing of one half is taken", "dpo_loss", "dpo_errors",
            edits=(("0 <= smoothing < 0.5", "0 <= smoothing <= 0.5"),)),
    Attempt("shapes left to broadcasting", "dpo_loss", "dpo_errors",
            edits=(("policy.shape != reference.shape or policy.dim()", "policy.dim()"),)),
    Attempt("right: both terms in one", "dpo_loss", code=SOFTPLUS_DPO),
    # exercise 4
    Attempt("switches on whatever was off", "without_lora", "switch_restored",
            edits=(("            module.enabled = value", "            module.enabled = True"),)),
    Attempt("an exception leaves it off", "without_lora", "switch_restored",
            edits=(("    try:\n", "    if True:\n"), ("    finally:\n", "    if True:\n"))),
    Attempt("only children of the model", "without_lora", "switch_off",
            edits=(("for module in model.modules() if", "for module in model.children() if"),)),
    Attempt("every module gets the attribute", "without_lora", "switch_off",
            edits=(("[(module, module.enabled) for module in model.modules() if hasattr(module, \"enabled\")]",
                    "[(module, getattr(module, \"enabled\", True)) for module in model.modules()]"),)),
    Attempt("right: a class", "without_lora", code=SWITCH_CLASS),
    Attempt("the reference with the change switched on", "train_dpo", "dpo_reference",
            edits=(("with torch.no_grad(), switched_off(model):", "with torch.no_grad():"),)),
    Attempt("the reference with dropout", "train_dpo", "dpo_reference", edits=(("        model.eval()\n", ""),)),
    Attempt("the reference with gradients", "train_dpo", "dpo_reference",
            edits=(("with torch.no_grad(), switched_off(model):", "with switched_off(model):"),)),
    Attempt("the policy in evaluation mode", "train_dpo", "dpo_reference",
            edits=(("        model.train()\n", ""),)),
    Attempt("gradients are not cleared", "train_dpo", "dpo_steps",
            edits=(("        optimizer.zero_grad()\n", ""),)),
    Attempt("smoothing is not handed on", "train_dpo", "dpo_steps",
            edits=(("reference, beta, smoothing)", "reference, beta)"),)),
    Attempt("chosen and rejected swapped", "train_dpo", "dpo_steps",
            edits=(("    for batch in batches:\n",
                    "    for rejected, chosen in batches:\n        batch = chosen, rejected\n"),)),
    Attempt("the pair from after the update", "train_dpo", "dpo_steps",
            edits=(("        results.append((loss.item()",
                    "        policy = torch.stack([log_probs(model(inputs), targets) for inputs, targets in "
                    "batch])\n"
                    "        loss, margins = loss_of(policy, reference, beta, smoothing)\n        "
                    "results.append((loss.item()"),)),
    Attempt("left in training mode", "train_dpo", "dpo_leaves", edits=(("    model.train(was_training)\n", ""),)),
    Attempt("left in evaluation mode", "train_dpo", "dpo_leaves",
            edits=(("    model.train(was_training)\n", "    model.eval()\n"),)),
    Attempt("right: all references first", "train_dpo", code=TOGETHER_TRAIN),
    # exercise 5
    Attempt("the rank of the matrix", "answer_rank", "rank_measured",
            edits=(('= 3, "the change"', '= 32, "the matrix"'),)),
    Attempt("the first share that changes anything", "answer_replay", "replay_measured",
            edits=(("= 20, 0.01", "= 5, 0.01"),)),
    Attempt("the price on the wrong source", "answer_replay", "replay_measured",
            edits=(("= 20, 0.01", "= 20, -1.05"),)),
    Attempt("the two questions mixed up", "answer_similar", "similar_measured",
            edits=(("= 0.75, 0.9", "= 0.9, 0.75"),)),
]
