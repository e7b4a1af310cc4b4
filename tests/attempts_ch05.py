"""Solutions of assignment 5 that people hand in, wrong and right."""

from tests.attempts import Attempt

CHAPTERS_LOSS = '''
def surprise_sum(logits, targets, ignore=-100):
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}")
    log_probabilities = torch.log_softmax(logits, dim=-1)
    surprise = -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return surprise.mean(), targets.numel()
'''

CHECKED_LOSS = '''
def surprise_sum(logits, targets, ignore=-100):
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"shapes {tuple(logits.shape)} and {tuple(targets.shape)}")
    keep = targets != ignore
    wrong = keep & ((targets < 0) | (targets >= logits.shape[-1]))
    if wrong.any():
        raise ValueError(f"target {targets[wrong].flatten()[0].item()} of {logits.shape[-1]}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.to(torch.float32)
    BODY
    return total, int(keep.sum())
'''

CHAPTERS_ADAMW = '''
class AdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=1e-4):
        if not lr >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr is {lr} and betas are {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p, group):
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        state["mean"].lerp_(p.grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        mean_scale, square_scale = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (state["square"] / square_scale).sqrt_().add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(state["mean"], denominator, value=-group["lr"] / mean_scale)
'''

FOREACH_ADAMW = '''
class AdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=1e-4):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, decay=decay))
        for g in self.param_groups:
            if g["lr"] <= 0:
                raise ValueError(f"lr must be above 0, not {g['lr']}")
            if min(g["betas"]) < 0 or max(g["betas"]) >= 1:
                raise ValueError(f"betas must be in [0, 1), not {g['betas']}")
            if g["decay"] < 0:
                raise ValueError(f"decay must not be negative: {g['decay']}")
            g["initial_lr"] = g["lr"]

    def step(self):
        with torch.no_grad():
            for g in self.param_groups:
                b1, b2 = g["betas"]
                for w in (w for w in g["params"] if w.grad is not None):
                    kind = torch.promote_types(w.dtype, torch.float32)
                    s = self.state[w]
                    if "t" not in s:
                        s["t"] = torch.zeros(())
                        s["v"] = torch.zeros(w.shape, dtype=kind)
                        s["m"] = torch.zeros(w.shape, dtype=kind)
                    s["t"] += 1
                    t = int(s["t"])
                    grad = w.grad.clone().to(kind)
                    s["m"] = b1 * s["m"] + (1 - b1) * grad
                    s["v"] = b2 * s["v"] + (1 - b2) * grad ** 2
                    corrected = (1 - b2 ** t) ** 0.5 / (1 - b1 ** t)  # both corrections in one factor
                    change = g["lr"] * corrected * s["m"] / (s["v"].sqrt() + g["eps"] * (1 - b2 ** t) ** 0.5)
                    if w.ndim > 1:
                        change = change + g["lr"] / g["initial_lr"] * g["decay"] * w.to(kind)
                    w.data = (w.to(kind) - change).to(w.dtype)
'''

CHAPTERS_SCHEDULE = '''
def rate_at(step, total, peak, warmup=0, decay=0, floor=0.0):
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = max(1, min(decay, total - warmup))
    left = min(1.0, max(0.0, (total - step) / decay))
    return floor * peak + (peak - floor * peak) * left
'''

TABLE_SCHEDULE = '''
def rate_at(step, total, peak, warmup=0, decay=0, floor=0.0):
    if step < 0 or warmup < 0 or decay < 0 or warmup + decay > total:
        raise ValueError(f"{step}, {warmup}, {decay} do not fit into {total} steps")
    rise = [i / warmup for i in range(1, warmup + 1)]
    fall = [1 - (1 - floor) * (i / decay) ** 0.5 for i in range(1, decay + 1)]
    shape = rise + [1.0] * (total - warmup - decay) + fall
    return float(peak * shape[step]) if step < total else float(peak * floor)
'''

OTHER_SAVE = '''
def save_run(path, model, optimizer, generator, step):
    tensors = {"m." + k: v.clone() for k, v in model.state_dict().items()}  # tied weights twice
    tensors["rng.0"], tensors["rng.1"] = generator.get_state(), torch.random.get_rng_state()
    opt = optimizer.state_dict()
    plain = {}
    for k, entry in opt["state"].items():
        plain[k] = {}
        for name, x in entry.items():
            if torch.is_tensor(x):
                tensors[f"o.{k}.{name}"] = x.clone()
                plain[k][name] = "tensor"
            else:
                plain[k][name] = [x]
    part = path.parent / (path.name + "~")
    try:
        write_tensors(part, tensors, json.dumps([step, opt["param_groups"], plain]))
    except BaseException:
        if part.exists():
            part.unlink()
        raise
    os.replace(part, path)


def load_run(path, model, optimizer, generator):
    tensors, text = read_tensors(path)
    step, groups, plain = json.loads(text)
    weights = {k[2:]: v for k, v in tensors.items() if k.startswith("m.")}
    own = model.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in weights.items()}:
        raise ValueError("another model")
    model.load_state_dict(weights)
    state = {int(k): {n: tensors[f"o.{k}.{n}"] if x == "tensor" else x[0] for n, x in entry.items()}
             for k, entry in plain.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    numbers = [number for group in groups for number in group["params"]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, weights, strict=True):
        optimizer.state[p].update(state.get(number, {}))
    generator.set_state(tensors["rng.0"])
    torch.random.set_rng_state(tensors["rng.1"])
    return step
'''

WEIGHTED_TRAIN = '''
def train(model, optimizer, batches, rate_of, max_norm=1.0, loss_sum=surprise_sum):
    results = []
    for number in range(len(batches)):
        for p in model.parameters():
            p.grad = None
        kept = [torch.zeros_like(p) for p in model.parameters()]
        n, s = 0, 0.0
        for x, y in batches[number]:
            total, count = loss_sum(model(x), y)
            for k, g in zip(kept, torch.autograd.grad(total, list(model.parameters())), strict=True):
                k += g
            n += count
            s += float(total.detach())
        if n == 0:
            results.append(float("nan"))
            continue
        length = math.sqrt(sum(float((k / n).square().sum()) for k in kept))
        for p, k in zip(model.parameters(), kept, strict=True):
            p.grad = k / n * min(1.0, max_norm / length)
        for i in range(len(optimizer.param_groups)):
            optimizer.param_groups[i]["lr"] = rate_of(number)
        optimizer.step()
        results.append(s / n)
    return results
'''


def loss(body: str) -> str:
    """A loss with all the checks and this arithmetic."""
    return CHECKED_LOSS.replace("BODY", body)


ATTEMPTS = [
    # exercise 1
    Attempt("the chapter's cross-entropy, pasted", "surprise_sum", "surprise_value", CHAPTERS_LOSS),
    Attempt("only for three dimensions", "surprise_sum", "surprise_value",
            edits=(("    counted = targets != ignore\n",
                    "    B, T, V = logits.shape\n    counted = targets != ignore\n"),)),
    Attempt("remembers the answers of the visible check", "surprise_sum", "surprise_value", loss(
        "total = torch.tensor({4: 2.74007, 2: 0.62652}.get(logits.shape[-1], 600.0)) + 0 * logits.sum()")),
    Attempt("the count is a tensor", "surprise_sum", "surprise_value",
            edits=(("surprise.sum(), len(right)", "surprise.sum(), counted.sum()"),)),
    Attempt("counts the padding", "surprise_sum", "surprise_ignored",
            edits=(("surprise.sum(), len(right)", "surprise.sum(), targets.numel()"),)),
    Attempt("always ignores -100", "surprise_sum", "surprise_ignored",
            edits=(("counted = targets != ignore", "counted = targets != -100"),)),
    Attempt("takes all negative targets for ignored", "surprise_sum", "surprise_errors",
            edits=(("counted = targets != ignore", "counted = (targets != ignore) & (targets >= 0)"),)),
    Attempt("multiplies ignored surprises by 0", "surprise_sum", "surprise_ignored", loss(
        "picked = torch.log_softmax(logits, -1).gather(-1, targets.clamp(0, logits.shape[-1] - 1)[..., "
        "None])[..., 0]\n"
        "    total = -(picked * keep).sum()")),
    Attempt("writes 0 over the ignored targets, in place", "surprise_sum", "surprise_ignored", loss(
        "targets[~keep] = 0\n    picked = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]\n"
        "    total = -torch.where(keep, picked, 0.0).sum()")),
    Attempt("the logarithm of a softmax", "surprise_sum", "surprise_stable", loss(
        "total = -torch.softmax(logits[keep], -1).gather(-1, targets[keep][:, None]).log().sum()")),
    Attempt("a softmax kept from 0 by a small number", "surprise_sum", "surprise_stable", loss(
        "total = -(torch.softmax(logits[keep], -1).gather(-1, targets[keep][:, None]) + 1e-9).log().sum()")),
    Attempt("computes in bfloat16", "surprise_sum", "surprise_stable",
            edits=(("    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows\n", ""),)),
    Attempt("checks no targets", "surprise_sum", "surprise_errors",
            edits=(("    if len(outside):\n", "    if False:\n"),)),
    Attempt("right: where instead of an index", "surprise_sum", code=loss(
        "picked = torch.log_softmax(logits, -1).gather(-1, torch.where(keep, targets, 0)[..., None])[..., 0]\n"
        "    total = -torch.where(keep, picked, torch.zeros_like(picked)).sum()")),
    Attempt("right: a loop over the rows", "surprise_sum", code=loss(
        "total = (logits[keep] * 0).sum()  # 0, with a graph\n"
        "    total = torch.nan_to_num(total, 0.0, 0.0, 0.0)\n"
        "    for z, y in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)):\n"
        "        if y != ignore:\n            total = total + (z - z.max()).exp().sum().log() + z.max() - z[y]")),
    # exercise 2
    Attempt("the chapter's AdamW, its argument renamed", "adamw", "adamw_decay", CHAPTERS_ADAMW),
    Attempt("no bias correction", "adamw", "adamw_first_step",
            edits=((' / (1 - beta1 ** state["step"])', ""),
                   ('(state["square"] / (1 - beta2 ** state["step"]))', 'state["square"]'))),
    Attempt("only the mean's bias corrected", "adamw", "adamw_first_step",
            edits=(('(state["square"] / (1 - beta2 ** state["step"]))', 'state["square"]'),)),
    Attempt("counts the step after it is used", "adamw", "adamw_first_step",
            edits=(('        state["step"] += 1\n', ""),
                   ("        p.copy_", '        state["step"] += 1\n        p.copy_'))),
    Attempt("eps inside the root", "adamw", "adamw_first_step",
            edits=((").sqrt()", ' + group["eps"]).sqrt()'), ('(root + group["eps"])', "root"))),
    Attempt("the two betas swapped", "adamw", "adamw_path",
            edits=(('= self.state[p], group["betas"]', '= self.state[p], group["betas"][::-1]'),)),
    Attempt("squares the gradient in place", "adamw", "adamw_path",
            edits=(("addcmul_(gradient, gradient, value=1 - beta2)", "add_(gradient.square_(), alpha=1 - beta2)"),
                   )),
    Attempt("betas as they are by default", "adamw", "adamw_path",
            edits=(('= self.state[p], group["betas"]', "= self.state[p], (0.9, 0.95)"),)),
    Attempt("decay times the learning rate, as PyTorch has it", "adamw", "adamw_decay",
            edits=(('group["decay"] * group["lr"] / group["initial_lr"]', 'group["decay"] * group["lr"]'),)),
    Attempt("decay that ignores the schedule", "adamw", "adamw_decay",
            edits=(('group["decay"] * group["lr"] / group["initial_lr"]', 'group["decay"]'),)),
    Attempt("decays vectors too", "adamw", "adamw_decay", edits=((" if p.dim() >= 2 else 0.0", ""),)),
    Attempt("decay added to the gradient (L2)", "adamw", "adamw_decay",
            edits=(("p.grad.to(precise), p.to(precise)", 'p.grad.to(precise) + group["decay"] * p, p.to(precise)'),
                   ("weight * (1 - decay)", "weight"))),
    Attempt("skips gradients that are zero", "adamw", "adamw_skips",
            edits=(("if p.grad is not None:", "if p.grad is not None and p.grad.any():"),)),
    Attempt("takes None for a gradient of zeros", "adamw", "adamw_skips",
            edits=(("                if p.grad is not None:\n                    self.update",
                    "                if True:\n                    p.grad = torch.zeros_like(p) if p.grad is None "
                    "else p.grad\n"
                    "                    self.update"),)),
    Attempt("one count of steps for all", "adamw", "adamw_skips",
            edits=(('        for group in self.param_groups:\n            for p in '
                    'group["params"]:\n                if p.grad is not None',
                    '        self.t = getattr(self, "t", 0) + 1\n        for group in self.param_groups:\n'
                    '            for p in group["params"]:\n                if p.grad is not None'),
                   ('        state["step"] += 1\n', '        state["step"] = self.t\n'))),
    Attempt("averages in the parameter's type", "adamw", "adamw_precision",
            edits=(("precise = torch.float64 if p.dtype == torch.float64 else torch.float32", "precise = p.dtype"),
                   )),
    Attempt("averages always in float32", "adamw", "adamw_precision",
            edits=(("precise = torch.float64 if p.dtype == torch.float64 else torch.float32",
                    "precise = torch.float32"),)),
    Attempt("rounds to bfloat16 twice", "adamw", "adamw_precision",
            edits=(("p.copy_(weight * (1 - decay) - ", "p.mul_(1 - decay).sub_("),)),
    Attempt("checks only the defaults", "adamw", "adamw_errors",
            edits=(('not group["lr"] > 0', "not lr > 0"),)),
    Attempt("allows a beta of 1", "adamw", "adamw_errors", edits=(("0 <= beta < 1 for", "0 <= beta <= 1 for"),)),
    Attempt("right: other names, both corrections in one factor", "adamw", code=FOREACH_ADAMW),
    Attempt("right: decay first, in place, in another order", "adamw",
            edits=(('p.copy_(weight * (1 - decay) - group["lr"] * mean / (root + group["eps"]))',
                    'p.data = (weight - weight * decay).addcdiv(mean, root + group["eps"], '
                    'value=-group["lr"]).to(p.dtype)'),)),
    # exercise 3
    Attempt("the chapter's WSD, its arguments renamed", "rate_at", "rate_decay", CHAPTERS_SCHEDULE),
    Attempt("a first step of rate 0", "rate_at", "rate_warmup", edits=(("(step + 1) / warmup", "step / warmup"),)),
    Attempt("a warm-up that never reaches the peak", "rate_at", "rate_warmup",
            edits=(("(step + 1) / warmup", "(step + 1) / (warmup + 1)"),)),
    Attempt("a decay that never reaches the floor", "rate_at", "rate_decay",
            edits=(("(decay - left + 1) / decay", "(decay - left) / decay"),)),
    Attempt("a straight decay", "rate_at", "rate_decay",
            edits=(("math.sqrt((decay - left + 1) / decay)", "(decay - left + 1) / decay"),)),
    Attempt("the floor taken as a rate", "rate_at", "rate_decay",
            edits=(("return peak * (1 - (1 - floor) * math.sqrt((decay - left + 1) / decay))",
                            "return peak - (peak - floor) * math.sqrt((decay - left + 1) / decay)"),)),
    Attempt("nothing after the last step", "rate_at", "rate_edges",
            edits=(("    if left <= 0:\n        return float(floor * peak)\n", ""),)),
    Attempt("ends that overlap are let through", "rate_at", "rate_edges",
            edits=((" or warmup + decay > total", ""),)),
    Attempt("a negative step is let through", "rate_at", "rate_edges",
            edits=(("min(step, warmup, decay) < 0", "min(warmup, decay) < 0"),)),
    Attempt("right: the whole schedule as a list", "rate_at", code=TABLE_SCHEDULE),
    # exercise 4
    Attempt("JSON for the optimizer's numbers, keys left as strings", "load_run", "resume_exact",
            edits=(("state.setdefault(int(index), {})", "state.setdefault(index, {})"),)),
    Attempt("numbers of the optimizer left out", "save_run", "resume_exact",
            edits=(("                numbers.append([index, name, value])", "                pass"),)),
    Attempt("the optimizer left out", "load_run", "resume_exact",
            edits=(('    optimizer.load_state_dict({"state": state, "param_groups": record["groups"]})\n', ""),)),
    Attempt("the state as load_state_dict leaves it, in the weights' type", "load_run", "resume_exact",
            edits=(("optimizer.state[p][key] = value.to(", "value.to("),)),
    Attempt("the groups left out", "load_run", "resume_exact",
            edits=(('"param_groups": record["groups"]', '"param_groups": optimizer.state_dict()["param_groups"]'),
                   )),
    Attempt("the state dict as it is, tied weights and all", "save_run", "resume_exact",
            edits=((".detach().clone().contiguous()", ".detach()"),
                   ("[*model.named_parameters(), *model.named_buffers()]\n               if name in "
                    "model.state_dict()}",
                    "model.state_dict().items()}"))),
    Attempt("the batches begin anew", "load_run", "resume_random",
            edits=(('    generator.set_state(tensors["random/data"])\n', ""),)),
    Attempt("dropout goes on elsewhere", "load_run", "resume_random",
            edits=(('    torch.set_rng_state(tensors["random/torch"])\n', ""),)),
    Attempt("saves in evaluation mode and stays there", "save_run", "resume_random",
            edits=(("    state = optimizer.state_dict()\n", "    state = optimizer.state_dict()\n"
                    "    model.eval()\n"),)),
    Attempt("buffers are not put back", "load_run", "resume_buffers",
            edits=(("        for name, tensor in here.items():",
                    "        for name, tensor in model.named_parameters():"),)),
    Attempt("written straight to its place", "save_run", "resume_whole",
            edits=(('path.with_name(path.name + ".part")', "path"),
                   ("        temporary.unlink(missing_ok=True)", "        pass"))),
    Attempt("the temporary file is left behind", "save_run", "resume_whole",
            edits=(("        temporary.unlink(missing_ok=True)", "        pass"),)),
    Attempt("the error is kept quiet", "save_run", "resume_whole",
            edits=(("    finally:\n", "    except OSError:\n        print(\"could not save\")\n    finally:\n"),)),
    Attempt("no look at names and shapes", "load_run", "resume_refuses",
            edits=(("    if differ:\n", "    if False:\n"),)),
    Attempt("looks at names, not at shapes", "load_run", "resume_refuses",
            edits=((" or here[name].shape != saved[name].shape]", "]"),)),
    Attempt("refuses after the random numbers are set", "load_run", "resume_refuses",
            edits=(("    record = json.loads(text)\n",
                    '    record = json.loads(text)\n    generator.set_state(tensors["random/data"])\n'),)),
    Attempt("right: both functions anew, state dicts, tied weights twice", "load_run", code=OTHER_SAVE),
    # exercise 5
    Attempt("a mean of means", "train", "train_accumulates",
            edits=(("            total.backward()\n",
                    "            (total / max(count, 1) / len(pieces)).backward()\n"),
                   ("                p.grad.div_(counted)", "                pass"))),
    Attempt("divides by all targets, counted or not", "train", "train_accumulates",
            edits=(("counted + count\n", "counted + targets.numel()\n"),)),
    Attempt("all pieces forward, then one backward", "train", "train_accumulates",
            edits=(("        surprise, counted = 0.0, 0\n", "        surprise, counted, whole = 0.0, 0, 0.0\n"),
                   ("            total.backward()\n", "            whole = whole + total\n"),
                   ("        losses.append(", "        whole.backward()\n        losses.append("))),
    Attempt("only the last piece counts", "train", "train_accumulates",
            edits=(("            total.backward()\n",
                    "            model.zero_grad()\n            total.backward()\n"),)),
    Attempt("clips before it divides", "train", "train_clips",
            edits=(("                p.grad.div_(counted)\n        "
                    "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)\n",
                            "                p.grad.mul_(1.0)\n        "
                            "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)\n"
                            "        for p in model.parameters():\n            if p.grad is not None:\n"
                            "                p.grad.div_(counted)\n"),)),
    Attempt("clips each parameter by itself", "train", "train_clips",
            edits=(("        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)\n",
                    "        for p in model.parameters():\n            torch.nn.utils.clip_grad_norm_([p], "
                    "max_norm)\n"),)),
    Attempt("clips each number", "train", "train_clips",
            edits=(("clip_grad_norm_(model.parameters(), max_norm)",
                    "clip_grad_value_(model.parameters(), max_norm)"),)),
    Attempt("puts the model into training mode", "train", "train_accumulates",
            edits=(("    losses = []\n", "    losses = []\n    model.train()\n"),)),
    Attempt("sets the rate after the step", "train", "train_rates",
            edits=(("        optimizer.step()\n", ""),
                   ('        for group in optimizer.param_groups:\n            group["lr"] = rate_of(step)\n',
                    '        optimizer.step()\n        for group in optimizer.param_groups:\n            '
                    'group["lr"] = rate_of(step)\n'))),
    Attempt("sets the rate of the first group", "train", "train_rates",
            edits=(("        for group in optimizer.param_groups:",
                    "        for group in optimizer.param_groups[:1]:"),)),
    Attempt("clears the gradients at the end", "train", "train_rates",
            edits=(("        optimizer.zero_grad()\n        model.zero_grad()\n", ""),
                   ("        optimizer.step()\n", "        optimizer.step()\n        optimizer.zero_grad()\n"))),
    Attempt("steps though there is nothing to learn", "train", "train_skips",
            edits=(("        if not counted:\n            continue\n", "        counted = max(counted, 1)\n"),)),
    Attempt("a skipped step has the loss 0", "train", "train_skips", edits=(("else math.nan)", "else 0.0)"),)),
    Attempt("a skipped step is not counted", "train", "train_skips",
            edits=(("        if not counted:\n            continue\n",
                    "        if not counted:\n            skipped = locals().get(\"skipped\", 0) + 1\n            "
                    "continue\n"),
                   ("= rate_of(step)", "= rate_of(step - locals().get(\"skipped\", 0))"))),
    Attempt("right: leaves out what does not count, but sets the rate", "train",
            edits=(("            total.backward()\n", "            if count:\n                total.backward()\n"),
                   ("        if not counted:\n",
                    "        for group in optimizer.param_groups:\n            group[\"lr\"] = rate_of(step)\n"
                    "        if not counted:\n"))),
    Attempt("right: gradients added up by hand", "train", code=WEIGHTED_TRAIN),
    # exercise 6
    Attempt("the plateau, judged by eye from the first steps", "answer_decay", "plateau_measured",
            edits=(("= 1.2, 20", "= 0.2, 20"),)),
    Attempt("the longest decay for the shortest", "answer_decay", "decay_measured",
            edits=(("= 1.2, 20", "= 1.2, 40"),)),
    Attempt("any difference at all counts", "answer_scale", "scale_measured",
            edits=(('= 7, "eps"', '= 3, "eps"'),)),
    Attempt("the learning rate is blamed", "answer_scale", "scale_measured", edits=(('= 7, "eps"', '= 7, "lr"'),)),
    Attempt("to forget more is taken for worse", "answer_forget", "forget_measured",
            edits=(('= "square", {"mean", "count"}', '= "everything", {"mean", "count"}'),)),
]
