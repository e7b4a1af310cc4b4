"""Chapter 4's mixture of experts: against a loop, against published sizes, and what its losses must do."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ch04_gpt.gpt import GPT, GPTConfig, SwiGLU, count_parameters, generate, llama_style
from ch04_gpt.mixture_of_experts import (
    MoE,
    Router,
    Routing,
    active_parameters,
    add_experts,
    expert_counts,
    limit_places,
    load_balancing_loss,
    moe_layers,
    recorded_routing,
    router_z_loss,
    update_balance,
)

SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 2}


def small(d_ff=24, n_experts=4, top_k=2, **options):
    torch.manual_seed(0)
    return add_experts(GPT(llama_style(50, 32, **SHAPE, d_ff=d_ff)), n_experts, top_k, **options)


def by_loop(moe, x, capacity=None):
    """Token by token; with a capacity, who comes later in the text finds no room."""
    logits = x @ moe.router.scores.weight.T
    probabilities, taken = logits.softmax(-1), dict.fromkeys(range(len(moe.experts)), 0)
    rows = []
    for row, token in enumerate(x):
        chosen = (probabilities[row] + moe.router.balance).topk(moe.router.top_k).indices.tolist()
        weights = probabilities[row, chosen]
        if moe.router.top_k > 1:
            weights = weights / weights.sum()
        total = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            taken[expert] += 1
            if capacity is None or taken[expert] <= capacity:
                part = moe.experts[expert]
                total = total + weight * part.w_down(F.silu(part.w_gate(token)) * part.w_up(token))
        rows.append(total)
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), experts=st.integers(1, 6), data=st.data())
def test_layer_equals_the_loop(n, experts, data):
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(n)
    moe, x = MoE(8, 12, experts, k), torch.randn(n, 8)
    torch.testing.assert_close(moe(x), by_loop(moe, x))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), factor=st.sampled_from([0.3, 0.5, 1.0, 1.25, 2.0, 10.0]), k=st.integers(1, 3))
def test_capacity_drops_those_who_come_later(n, factor, k):
    torch.manual_seed(n)
    moe, x = MoE(8, 12, 4, k, capacity_factor=factor), torch.randn(n, 8)
    capacity = -int(-(factor * n * k / 4) // 1)  # rounded up
    assert moe.capacity(n) == capacity
    torch.testing.assert_close(moe(x), by_loop(moe, x, capacity))


def test_gradients_equal_those_of_the_loop():
    torch.manual_seed(1)
    moe, x, direction = MoE(8, 12, 4, 2), torch.randn(30, 8, requires_grad=True), torch.randn(30, 8)
    ours = torch.autograd.grad((moe(x) * direction).sum(), [x, *moe.parameters()])
    loop = torch.autograd.grad((by_loop(moe, x) * direction).sum(), [x, *moe.parameters()])
    assert ours[1].abs().max() > 0  # the router learns
    for a, b in zip(ours, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_expert_at_a_time_still_teaches_the_router():
    torch.manual_seed(2)
    moe = MoE(8, 12, 4, top_k=1)
    moe(torch.randn(20, 8)).square().sum().backward()
    assert moe.router.scores.weight.grad.abs().max() > 1e-5
    routing = moe.router(torch.randn(20, 8))
    torch.testing.assert_close(routing.weights[:, 0], routing.logits.softmax(-1).amax(-1))


def test_shapes_order_and_equal_experts():
    torch.manual_seed(3)
    moe, x = MoE(8, 12, 4, 2), torch.randn(3, 5, 8)
    y = moe(x)
    assert y.shape == x.shape
    order = torch.randperm(5)
    torch.testing.assert_close(moe(x[:, order]), y[:, order])  # without a limit, neighbours do not matter
    for expert in moe.experts[1:]:
        expert.load_state_dict(moe.experts[0].state_dict())
    torch.testing.assert_close(moe(x), moe.experts[0](x))  # weights add up to 1: equal experts are one


def test_balance_moves_the_choice_and_not_the_weights():
    torch.manual_seed(4)
    router, x = Router(8, 4, 2), torch.randn(50, 8)
    router.balance[3] = 10.0
    routing = router(x)
    assert (routing.experts == 3).any(-1).all()
    kept = routing.logits.softmax(-1).gather(-1, routing.experts)
    torch.testing.assert_close(routing.weights, kept / kept.sum(-1, keepdim=True))


def test_update_balance_goes_against_the_load():
    router = Router(8, 4, 1)
    update_balance(router, torch.tensor([[0], [0], [0], [1], [2], [2], [2], [3]]), 0.1)
    torch.testing.assert_close(router.balance, torch.tensor([-0.1, 0.1, -0.1, 0.1]))


def lopsided():
    """A router that likes expert 0 for every token, and 400 tokens."""
    torch.manual_seed(5)
    router, x = Router(8, 4, 2), torch.randn(400, 8)
    x[:, 0] = 1.0
    with torch.no_grad():
        router.scores.weight[0, 0] += 3.0
    assert expert_counts(router(x).experts, 4)[0] > 350
    return router, x


def test_nudging_evens_a_lopsided_router():
    router, x = lopsided()
    for rate in (0.01, 0.001):
        for _ in range(200):
            update_balance(router, router(x).experts, rate)
    assert expert_counts(router(x).experts, 4).max() < 230  # 200 would be even


def test_the_loss_evens_a_lopsided_router():
    router, x = lopsided()
    optimizer = torch.optim.SGD(router.parameters(), lr=2.0)
    for _ in range(100):
        optimizer.zero_grad()
        load_balancing_loss(router(x)).backward()
        optimizer.step()
    assert expert_counts(router(x).experts, 4).max() < 230


def test_load_balancing_loss():
    def uniform(experts):
        return Routing(torch.zeros(len(experts), 4), experts, torch.ones_like(experts, dtype=torch.float))
    assert load_balancing_loss(uniform(torch.arange(8)[:, None] % 4)).item() == pytest.approx(1.0)
    one = Routing(torch.tensor([[40.0, 0, 0, 0]]).expand(6, 4), torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1))
    assert load_balancing_loss(one).item() == pytest.approx(4.0)
    logits = torch.tensor([[0.5, 0.0, 0.0, 0.0]]).repeat(6, 1).requires_grad_()
    load_balancing_loss(Routing(logits, torch.tensor([[0, 1]] * 6), torch.ones(6, 2))).backward()
    assert (logits.grad[:, :2] > 0).all() and (logits.grad[:, 2:] < 0).all()  # the busy ones are pushed down


def test_router_z_loss():
    logits = torch.randn(7, 5, requires_grad=True)
    expected = torch.log(torch.exp(logits).sum(-1)).pow(2).mean()
    torch.testing.assert_close(router_z_loss(logits), expected)
    assert router_z_loss(logits + 10) > router_z_loss(logits)


def test_limit_places():
    order, counts = limit_places(torch.tensor([4, 7, 0, 1, 9, 2]), torch.tensor([2, 0, 3, 1]), 1)
    assert order.tolist() == [4, 0, 2] and counts.tolist() == [1, 0, 1, 1]


def test_inside_the_gpt():
    model = small()
    ids = torch.randint(50, (2, 12))
    logits = model(ids)
    cache = model.new_cache()
    pieces = [model(ids[:, :7], cache), model(ids[:, 7:8], cache), model(ids[:, 8:], cache)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits)
    cached = generate(model, ids, 8, temperature=0)
    assert torch.equal(cached, generate(model, ids, 8, temperature=0, use_cache=False))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    torch.testing.assert_close(model(changed)[:, :-1], logits[:, :-1])  # it does not look ahead
    torch.testing.assert_close(copy.deepcopy(model)(ids), logits)


def test_recorded_routing_leaves_no_hooks():
    model, ids = small(), torch.randint(50, (2, 12))
    with pytest.raises(KeyError), recorded_routing(model):
        raise KeyError
    with recorded_routing(model) as routings:
        model(ids)
    model(ids)
    assert [tuple(r.experts.shape) for r in routings] == [(24, 2)] * 2
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


def test_equal_arithmetic_and_counts():
    dense = GPT(llama_style(50, 32, **SHAPE, d_ff=24))
    model = small(d_ff=24, n_experts=6, top_k=3)
    routers = 2 * 16 * 6
    assert active_parameters(model) == count_parameters(dense) + routers
    assert count_parameters(model) == count_parameters(dense) + routers + 2 * 3 * 3 * 16 * 8
    assert active_parameters(dense) == count_parameters(dense)


@pytest.mark.parametrize("config, experts, k, d_ff, total, active", [
    # parameters of the published files; active as their makers round them
    (llama_style(32_000, 32_768, 4096, 32, 32, n_kv_heads=8, tie_embeddings=False),
     8, 2, 14_336, 46_702_792_704, 12.9e9),
    (llama_style(151_936, 40_960, 2048, 48, 32, n_kv_heads=4, head_dim=128, qk_norm=True, tie_embeddings=False),
     128, 8, 768, 30_532_122_624, 3.3e9),
])
def test_published_models(config, experts, k, d_ff, total, active):
    counts = []
    for n_layers in (1, 2):
        with torch.device("meta"):
            model = add_experts(GPT(replace(config, n_layers=n_layers)), experts, k, d_ff)
        counts.append((count_parameters(model), active_parameters(model)))
    (one, active_one), (two, active_two) = counts
    assert one + (config.n_layers - 1) * (two - one) == total
    assert active_one + (config.n_layers - 1) * (active_two - active_one) == pytest.approx(active, rel=0.02)


def test_start_is_chapter_fours():
    torch.manual_seed(0)
    model = add_experts(GPT(llama_style(50, 32, 128, 2, 2, d_ff=256)), 4, 2)
    expert = model.blocks[0].mlp.experts[3]
    assert expert.w_up.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert expert.w_down.weight.std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 * 2 layers)
    assert isinstance(expert, SwiGLU) and expert.w_up.out_features == 128


@pytest.mark.parametrize("make, message", [
    (lambda: MoE(8, 8, 4, 5), "top_k is 5; with 4 experts it must be 1 to 4"),
    (lambda: MoE(8, 8, 4, 0), "top_k is 0; with 4 experts it must be 1 to 4"),
    (lambda: MoE(8, 8, 4, 2, capacity_factor=0.0), "capacity_factor is 0.0; it must be above 0, or None"),
    (lambda: small(top_k=0), "top_k is 0; with 4 experts it must be 1 to 4"),
    (lambda: small(d_ff=25), "width 25 does not divide among 2 experts: give d_ff"),
    (lambda: add_experts(GPT(GPTConfig(50, 16, 16, 1, 2)), 4, 2), "mlp is 'gelu'"),
])
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
