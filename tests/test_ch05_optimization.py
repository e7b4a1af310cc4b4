"""Chapter 5, sections 5.1 to 5.5: the loss, what it is compared with, the optimizers, schedules and guards."""

import itertools
import math
import random
import zlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ch05_pretrain import pretrain
from ch05_pretrain.pretrain import (
    SGD,
    AdamW,
    KneserNey,
    Muon,
    NGramModel,
    clip_grad_norm,
    compressed_bits_per_byte,
    cosine_schedule,
    cross_entropy,
    estimate_discount,
    orthogonalize,
    wsd_schedule,
)


def corpus(n=400, words=12, seed=0):
    """Tokens in which some follow others more often than not."""
    generator = random.Random(seed)
    tokens = [0]
    for _ in range(n - 1):
        step = generator.choice((1, 1, 1, 2, 5))
        tokens.append((tokens[-1] + step) % words)
    return tokens


# ---------------------------------------------------------------- the loss


def test_the_sum_of_surprises_is_torchs_and_divides_to_the_mean():
    logits, targets = torch.randn(3, 5, 9), torch.randint(9, (3, 5))
    total = cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(total, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    torch.testing.assert_close(total / 15, cross_entropy(logits, targets))
    with pytest.raises(ValueError, match='reduction is \'none\'; it must be "mean" or "sum"'):
        cross_entropy(logits, targets, reduction="none")


def test_a_sure_and_wrong_model_has_a_finite_loss_and_gradient():
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([2]))
    assert loss.item() == 2e4
    assert torch.autograd.grad(loss, logits)[0].tolist() == [[1.0, 0.0, -1.0]]


@pytest.mark.parametrize("lengths", [(64, 16, 4), (7, 7, 7)])
def test_accumulated_sums_are_the_gradient_of_the_whole_batch(lengths):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 10)
    pieces = [(torch.randn(n, 6), torch.randint(10, (n,))) for n in lengths]
    x, y = (torch.cat(part) for part in zip(*pieces, strict=True))
    whole = torch.autograd.grad(cross_entropy(layer(x), y), layer.weight)[0]
    for a, b in pieces:
        (cross_entropy(layer(a), b, reduction="sum") / sum(lengths)).backward()
    torch.testing.assert_close(layer.weight.grad, whole)
    means = sum(torch.autograd.grad(cross_entropy(layer(a), b) / 3, layer.weight)[0] for a, b in pieces)
    assert torch.allclose(means, whole, atol=1e-6) == (len(set(lengths)) == 1)


# ---------------------------------------------------------------- counting and copying


def kneser_ney_by_definition(tokens, order, vocab_size, discount):
    """The formula read aloud, with nothing shared or precomputed: p(token | context)."""
    text = tuple(tokens)

    def occurrences(gram):
        return sum(text[i : i + len(gram)] == gram for i in range(len(text) - len(gram) + 1))

    def continuations(gram):
        return sum(occurrences((first, *gram)) > 0 for first in range(vocab_size))

    def probability(token, context):
        count = occurrences if len(context) == order - 1 else continuations
        row = [count((*context, other)) for other in range(vocab_size)]
        below = probability(token, context[1:]) if context else 1 / vocab_size
        if not sum(row):
            return below
        return (max(row[token] - discount, 0) + discount * sum(c > 0 for c in row) * below) / sum(row)

    return probability


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_is_its_definition(order):
    tokens, vocab_size = corpus(40, 5), 6
    model, reference = KneserNey(tokens, order, vocab_size, discount=0.6), kneser_ney_by_definition(
        tokens, order, vocab_size, 0.6)
    for length in range(order):
        for context in itertools.product(range(vocab_size), repeat=length):
            for token in range(vocab_size):
                assert model.probability(token, context) == pytest.approx(reference(token, context), abs=1e-12)


@pytest.mark.parametrize("kind", [NGramModel, KneserNey])
@pytest.mark.parametrize("discount", [None, 0.5, 1.0])
def test_probabilities_add_up_to_one_in_every_context(kind, discount):
    model = kind(corpus(), 3, 14, discount=discount)
    for context in ((), (3,), (13,), (3, 4), (4, 3), (13, 13)):
        row = [model.probability(token, context) for token in range(14)]
        assert sum(row) == pytest.approx(1) and min(row) > 0


def test_a_token_bound_to_its_partner_is_unlikely_elsewhere():
    """Token 1 is frequent, but only ever after 0; token 2 is rarer and follows everything."""
    tokens = [0, 1, 3, 0, 1, 4, 0, 1, 5, 2, 3, 2, 4, 2, 0, 1, 2, 5, 0, 1] * 4
    counted, versatile = NGramModel(tokens, 2, 7), KneserNey(tokens, 2, 7, discount=0.75)
    assert counted.probability(1, (6,)) > counted.probability(2, (6,))
    assert versatile.probability(1, (6,)) < versatile.probability(2, (6,))
    assert versatile.probability(1, (0,)) > 0.8
    assert KneserNey(tokens, 1, 7, 0.75).loss(tokens) == NGramModel(tokens, 1, 7).loss(tokens)


def test_discounts_are_estimated_from_single_and_double_sightings():
    from collections import Counter

    assert estimate_discount(Counter("aabbcdef")) == pytest.approx(4 / (4 + 2 * 2))
    assert estimate_discount(Counter("aaab")) == 0.75 and estimate_discount(Counter()) == 0.75
    model = KneserNey(corpus(), 3, 12)
    assert model.discounts == [estimate_discount(grams) for grams in model.counts]
    with pytest.raises(ValueError, match="discount is 0; it must be above 0 and at most 1, or None"):
        NGramModel([1, 2, 3], 2, 4, discount=0)


def test_compressors_charge_only_for_what_they_have_not_read():
    generator = random.Random(0)
    text = "".join(generator.choices("abcdefgh ", k=20_000))
    for name in ("gzip", "xz"):
        alone = compressed_bits_per_byte("", text, name)
        assert math.log2(9) < alone < 1.25 * math.log2(9)
        assert compressed_bits_per_byte(text, text, name) < 0.2
    far = text + "".join(generator.choices("ijklmnop ", k=60_000))
    assert compressed_bits_per_byte(far, text, "xz") < 0.2, "xz remembers everything"
    assert compressed_bits_per_byte(far, text, "gzip") > 3, "gzip remembers 32 KiB"
    with pytest.raises(ValueError, match="No compressor 'zip'; there are gzip, xz"):
        compressed_bits_per_byte("", text, "zip")
    with pytest.raises(ValueError, match="text is empty"):
        compressed_bits_per_byte(text, "", "gzip")


def test_gzip_needs_what_zlib_needs_with_a_dictionary():
    words = ["moon", "house", "the", "and", "garden", "little", "said", "window", "of"]
    generator = random.Random(1)
    before, text = (" ".join(generator.choices(words, k=k)) for k in (20_000, 4_000))
    packer = zlib.compressobj(9, zdict=before.encode()[-32768:])
    size = len(packer.compress(text.encode()) + packer.flush())
    assert compressed_bits_per_byte(before, text, "gzip") == pytest.approx(8 * size / len(text), rel=0.02)


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_over_a_thousand_steps(momentum):
    torch.manual_seed(0)
    ours = torch.randn(7, 3).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    optimizers = SGD([ours], lr=0.01, momentum=momentum), torch.optim.SGD([theirs], lr=0.01, momentum=momentum)
    for _ in range(1000):
        ours.grad = torch.randn(7, 3)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    for bad in ({"lr": -1.0}, {"lr": 0.1, "momentum": 1.0}, {"lr": math.nan}):
        with pytest.raises(ValueError, match="lr must be at least 0 and momentum from 0 to below 1"):
            SGD([ours], **bad)


def test_adams_first_step_is_the_learning_rate_whatever_the_gradient():
    for scale in (1e-3, 1.0, 1e6):
        p = torch.zeros(4, requires_grad=True)
        p.grad = scale * torch.tensor([1.0, -2.0, 3.0, -4.0])
        AdamW([p], lr=0.1, weight_decay=0.0).step()
        torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, -0.1, 0.1]), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="lr is nan"):
        AdamW([p], lr=math.nan)


def test_decay_is_decoupled_and_parameters_without_gradient_stay():
    for scale in (1e-2, 1e2):
        p, still = torch.ones(2000, requires_grad=True), torch.ones(3, requires_grad=True)
        optimizer = AdamW([p, still], lr=1e-2, weight_decay=0.5)
        torch.manual_seed(0)
        for _ in range(100):
            p.grad = scale * torch.randn(2000)
            optimizer.step()
        assert p.mean().item() == pytest.approx((1 - 0.005) ** 100, abs=0.01)
        assert torch.equal(still, torch.ones(3))


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
def test_muon_is_torchs_for_every_shape(shape):
    """The length of a step depends on the shape. torch computes in bfloat16, so the comparison is as wide as that."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    muon = Muon([{"params": [ours], "orthogonal": True}], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(8):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    moved, expected = ((p - start).detach().flatten() for p in (ours, theirs))
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.999
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)


@pytest.mark.parametrize("rows", [(16, 16, 16), (24, 8, 8)])  # as many heads of each; wide queries, few keys
@pytest.mark.parametrize("turns", [1, 2])
def test_a_parameter_of_three_matrices_takes_the_steps_of_three_parameters(rows, turns):
    """Also where each turn holds a half of every matrix, as in two processes of tensor parallel."""
    torch.manual_seed(0)
    start, weights = torch.randn(turns, sum(rows), 16), torch.tensor([0.01, 1.0, 100.0])
    fused = start.flatten(0, 1).clone().requires_grad_()
    apart = [part.flatten(0, 1).clone().requires_grad_() for part in start.split(rows, dim=1)]
    ours = Muon([{"params": [fused], "orthogonal": True, "rows": rows}], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(apart, lr=0.02, weight_decay=0.1)
    for _ in range(8):
        gradient = torch.randn(turns, sum(rows), 16) * weights.repeat_interleave(torch.tensor(rows)).view(1, -1, 1)
        fused.grad = gradient.flatten(0, 1).clone()
        for p, part in zip(apart, gradient.split(rows, dim=1), strict=True):
            p.grad = part.flatten(0, 1)
        ours.step()
        theirs.step()
    for p, part, began in zip(apart, fused.detach().view_as(start).split(rows, dim=1), start.split(rows, dim=1),
                              strict=True):
        moved, expected = (part - began).flatten(), (p.detach() - began.flatten(0, 1)).flatten()
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.999
        assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)


def test_orthogonalize_brings_singular_values_to_one_and_works_on_stacks():
    torch.manual_seed(0)
    stack = torch.stack([torch.randn(40, 20), 100 * torch.randn(40, 20)])
    result = orthogonalize(stack)
    assert result.shape == stack.shape and result.dtype == stack.dtype
    for one, of_stack in zip(stack, result, strict=True):
        torch.testing.assert_close(orthogonalize(one), of_stack, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(orthogonalize(stack[0].T), result[0].T, rtol=1e-3, atol=1e-4)
    before = torch.linalg.svdvals(stack[0] / stack[0].norm())
    after = [torch.linalg.svdvals(orthogonalize(stack[0], steps)) for steps in (1, 3, 5)]
    assert before.min() < after[0].min() < after[1].min()
    assert after[2].min() > 0.6 and after[2].max() < 1.25
    assert orthogonalize(torch.zeros(3, 3)).abs().max() == 0


@pytest.fixture
def mesh(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_sharded_matrix_is_gathered_and_its_share_handed_back(mesh, monkeypatch):
    from torch.distributed.tensor import Shard, distribute_tensor

    seen = []
    original = pretrain.sharded_like
    monkeypatch.setattr(pretrain, "sharded_like", lambda whole, like: seen.append(type(whole)) or original(whole, like))
    matrix = torch.randn(10, 6)
    result = orthogonalize(distribute_tensor(matrix, mesh, [Shard(1)]))
    assert seen == [torch.Tensor] and result.placements == (Shard(1),)
    torch.testing.assert_close(result.full_tensor(), orthogonalize(matrix))


def test_sharded_parameters_take_the_same_steps(mesh):
    """One process holds the whole of a DTensor here; what is tested is that no operation meets a plain tensor."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.manual_seed(0)
    plain = [torch.randn(12, 8), torch.randn(8)]
    sharded = [distribute_tensor(t.clone(), mesh, [Shard(0)]).requires_grad_() for t in plain]
    plain = [t.requires_grad_() for t in plain]
    optimizers = [Muon([{"params": [p[0]], "orthogonal": True}, {"params": [p[1]]}], lr=0.02)
                  for p in (plain, sharded)]
    for _ in range(3):
        gradients = [10 * torch.randn(12, 8), torch.randn(8)]
        norms = []
        for parameters, optimizer in zip((plain, sharded), optimizers, strict=True):
            for p, gradient in zip(parameters, gradients, strict=True):
                own = gradient.clone()
                p.grad = distribute_tensor(own, mesh, [Shard(0)]) if parameters is sharded else own
            norms.append(clip_grad_norm(parameters, 1.0))
            optimizer.step()
        assert norms[0] == pytest.approx(norms[1])
    for p, s in zip(plain, sharded, strict=True):
        assert isinstance(s, DTensor) and s.placements == (Shard(0),)
        torch.testing.assert_close(s.full_tensor(), p)


# ---------------------------------------------------------------- schedules and clipping


def test_wsd_warms_up_stays_and_decays():
    rates = [wsd_schedule(step, 1.0, 0.1, 10, 100, 20) for step in range(101)]
    assert rates[:10] == [cosine_schedule(step, 1.0, 0.1, 10, 100) for step in range(10)]
    assert set(rates[10:81]) == {1.0} and rates[90] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert np.allclose(np.diff(rates[80:101]), -0.9 / 20)
    assert wsd_schedule(500, 1.0, 0.1, 10, 100, 20) == pytest.approx(0.1)
    linear = [wsd_schedule(step, 1.0, 0.0, 10, 100, decay) for decay in (90, 1000) for step in range(10, 101)]
    assert np.allclose(linear, 2 * [1 - k / 90 for k in range(91)])
    assert wsd_schedule(99, 1.0, 0.1, 10, 100, 0) == 1.0


def test_clipping_keeps_the_direction_and_hides_nothing():
    def parameters(*gradients):
        made = [torch.zeros(len(g), requires_grad=True) for g in gradients]
        for p, g in zip(made, gradients, strict=True):
            p.grad = torch.tensor(g)
        return made

    long = parameters([3.0, 0.0], [4.0])
    assert clip_grad_norm(long, 2.5) == pytest.approx(5)
    torch.testing.assert_close(torch.cat([p.grad for p in long]), torch.tensor([1.5, 0.0, 2.0]), rtol=1e-5, atol=0)
    short = parameters([0.3], [0.4])
    assert clip_grad_norm(iter(short), 0.6) == pytest.approx(0.5)
    assert [p.grad.item() for p in short] == [torch.tensor(0.3).item(), torch.tensor(0.4).item()]
    wild = parameters([math.inf], [1.0])
    assert clip_grad_norm(wild, 1.0) == math.inf
    lost = parameters([math.nan], [1.0])
    assert math.isnan(clip_grad_norm(lost, 1.0)) and all(p.grad.isnan().all() for p in lost)
    assert clip_grad_norm(parameters([1e30]), math.inf) == pytest.approx(1e30)
    assert clip_grad_norm([torch.zeros(3, requires_grad=True)], 1.0) == 0.0
    with pytest.raises(ValueError, match="max_norm is 0; it must be above 0"):
        clip_grad_norm(long, 0)
