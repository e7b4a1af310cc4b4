"""Deep dive "What happens inside": what is kept adds up, heads can be switched off, scores mean what they say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch02_tokenizer.tokenizer import BPETokenizer
from ch04_gpt.gpt import GPT, GPTConfig
from ch04_gpt.inside import attention_reader, head_scores, head_writes, heads_off, look_inside, resume, votes
from utils.attention_viewer import MAX_TOKENS

LLAMA = GPTConfig(90, 64, 24, 3, 6, n_kv_heads=2, d_ff=40, norm="rmsnorm", mlp="swiglu", position="rope", bias=False)
GPT2 = GPTConfig(90, 64, 24, 3, 4)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def model(request):
    """A model with weights large enough that every part matters, biases and norms included."""
    torch.manual_seed(0)
    model = GPT(request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def ids():
    return torch.randint(90, (1, 11), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- one pass, everything kept


def test_the_parts_add_up_to_what_the_model_computes(model, ids):
    seen = []
    handles = [block.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
               for block in model.blocks]
    with torch.no_grad():
        logits = model(ids)[0]
    for handle in handles:
        handle.remove()
    inside = look_inside(model, ids)
    assert inside.parts.shape == (7, 11, 24) and inside.stream.shape == (4, 11, 24)
    for layer in range(3):
        close(inside.stream[layer + 1], seen[layer])
    with torch.no_grad():
        close(model.lm_head(model.norm(inside.stream[-1])), logits)


def test_weights_are_distributions_over_the_past(model, ids):
    weights = look_inside(model, ids).weights
    assert weights.shape == (3, model.config.n_heads, 11, 11)
    close(weights.sum(-1), torch.ones(3, model.config.n_heads, 11))
    assert weights.triu(1).eq(0).all() and weights.min() >= 0


def test_weights_are_those_of_the_running_model(model, ids):
    """One position's values replaced changes a head's output by its weight times the change, and nothing else does."""
    layer, block = 1, model.blocks[1]
    inside = look_inside(model, ids)
    with torch.no_grad():
        value = block.attention.queries_keys_values(block.norm1(inside.stream[layer][None]))[2][0]
    shared = model.config.n_heads // value.size(0)
    for head in range(model.config.n_heads):
        close(inside.mixed[layer, head], inside.weights[layer, head] @ value[head // shared])


def test_heads_write_what_their_layer_adds(model, ids):
    inside = look_inside(model, ids)
    for layer, block in enumerate(model.blocks):
        bias = block.attention.out_proj.bias
        total = head_writes(model, inside, layer).sum(0) + (0 if bias is None else bias.detach())
        close(total, inside.parts[1 + 2 * layer])


def test_a_window_and_normalised_queries_are_followed(ids):
    torch.manual_seed(4)
    model = GPT(replace(LLAMA, window=4, qk_norm=True)).eval()
    for block in model.blocks:
        torch.nn.init.uniform_(block.attention.q_norm.weight, 0.5, 3.0)
    inside = look_inside(model, ids)
    assert inside.weights.tril(-4).eq(0).all() and inside.weights[..., 10, 7].gt(0).all()
    with torch.no_grad():
        close(model.lm_head(model.norm(inside.stream[-1])), model(ids)[0])


def test_several_texts_and_foreign_ids_are_refused(model):
    with pytest.raises(ValueError, match="2 texts.*one"):
        look_inside(model, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="0 to 89"):
        look_inside(model, torch.tensor([[5, 90]]))
    with pytest.raises(ValueError, match="at least 1"):
        look_inside(model, torch.zeros(1, 0, dtype=torch.long))


def test_nothing_kept_asks_for_a_gradient(model, ids):
    assert not look_inside(model, ids).parts.requires_grad


# ---------------------------------------------------------------- stopping, resuming, voting


def test_resuming_anywhere_ends_at_the_models_logits(model, ids):
    stream = look_inside(model, ids).stream
    with torch.no_grad():
        expected = model(ids)[:, -1]
    for depth in range(4):
        close(resume(model, stream[depth][None], depth), expected)


def test_votes_add_up_to_a_logit_and_to_a_difference(ids):
    torch.manual_seed(3)
    model = GPT(LLAMA).eval()
    torch.nn.init.uniform_(model.norm.weight, 0.5, 2.0)
    inside, table = look_inside(model, ids), model.lm_head.weight.detach()
    with torch.no_grad():
        logits = model(ids)[0]
    for position in (-1, 4):
        close(votes(model, inside, table[7], position).sum(), logits[position, 7])
        close(votes(model, inside, table[7] - table[3], position).sum(), logits[position, 7] - logits[position, 3])
    assert votes(model, inside, table[7]).shape == (7,)


def test_votes_refuse_a_layer_norm(ids):
    model = GPT(GPT2).eval()
    with pytest.raises(ValueError, match="LayerNorm.*RMSNorm"):
        votes(model, look_inside(model, ids), model.lm_head.weight[0])


# ---------------------------------------------------------------- heads off


def test_a_head_that_is_off_adds_nothing_and_comes_back(model, ids):
    inside = look_inside(model, ids)
    with torch.no_grad():
        intact = model(ids)
        without = inside.stream[1] + inside.parts[3] - head_writes(model, inside, 1)[2]
        block = model.blocks[1]
        expected = resume(model, without[None] + block.mlp(block.norm2(without[None])), 2)
        with heads_off(model, [(1, 2)]):
            close(model(ids)[:, -1], expected)
        assert torch.equal(model(ids), intact)
        assert not torch.allclose(expected, intact[:, -1], atol=1e-3)


def test_heads_of_two_layers_are_kept_apart(model, ids):
    with torch.no_grad():
        with heads_off(model, [(0, 0), (2, 1)]):
            together = model(ids)
        with heads_off(model, [(0, 0)]), heads_off(model, [(2, 1)]):
            close(together, model(ids))


def test_what_comes_in_is_not_changed(model):
    mixed = torch.randn(1, 3, 24)
    kept = mixed.clone()
    with torch.no_grad(), heads_off(model, [(0, 1)]):
        model.blocks[0].attention.out_proj(mixed)
    assert torch.equal(mixed, kept)


def test_all_heads_of_a_layer_off_leave_its_bias(model, ids):
    bias = model.blocks[0].attention.out_proj.bias
    with torch.no_grad(), heads_off(model, [(0, head) for head in range(model.config.n_heads)]):
        added = model.blocks[0].attention(torch.randn(2, 5, 24))
    close(added, torch.zeros(2, 5, 24) + (0 if bias is None else bias.detach()))


def test_heads_come_back_after_an_error(model, ids):
    with torch.no_grad():
        intact = model(ids)
        with pytest.raises(KeyError), heads_off(model, [(0, 0), (2, 1)]):
            raise KeyError
        assert torch.equal(model(ids), intact)


@pytest.mark.parametrize("head", [(3, 0), (0, 9), (-1, 0), (0, -1)])
def test_an_unknown_head_is_named(model, head):
    with pytest.raises(ValueError, match=rf"no head {head[0]}\.{head[1]}; layers go from 0 to 2"), \
            heads_off(model, [(0, 0), head]):
        pass
    assert not model.blocks[0].attention.out_proj._forward_pre_hooks


# ---------------------------------------------------------------- scores


def perfect(n, where):
    """Weights (1, 1, n, n) that put everything at where(t), or on t itself if that is None."""
    weights = torch.zeros(1, 1, n, n)
    for t in range(n):
        target = where(t)
        weights[0, 0, t, t if target is None else target] = 1.0
    return weights


def test_a_perfect_head_of_each_kind_scores_one_and_nothing_else():
    period, n = 7, 14
    ids = torch.randperm(50)[:period].repeat(2)
    kinds = {"previous token": lambda t: max(t - 1, 0), "first token": lambda t: 0,
             "same token": lambda t: t - period if t >= period else None,
             "induction": lambda t: t - period + 1 if t >= period else None}
    for kind, where in kinds.items():
        scores = head_scores(perfect(n, where), ids)
        assert list(scores) == list(kinds)
        assert scores[kind].item() == pytest.approx(1)
        for other in set(kinds) - {kind}:  # position 7 repeats the first token: there the two are one
            shared = {("first token", "same token"): 1 / period, ("same token", "first token"): 1 / (n - 2)}
            assert scores[other].item() == pytest.approx(shared.get((kind, other), 0))


def test_every_earlier_occurrence_counts():
    ids = torch.tensor([5, 6, 5, 7, 5])
    weights = torch.zeros(1, 1, 5, 5)
    weights[0, 0] = torch.eye(5)
    weights[0, 0, 4] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])  # the 5 at t = 4: fives at 0 and 2, then 6 and 7
    scores = head_scores(weights, ids)  # t = 2 and t = 4 repeat; t = 2 looks at itself
    assert scores["same token"].item() == pytest.approx((0 + 0.1 + 0.3) / 2)
    assert scores["induction"].item() == pytest.approx((0 + 0.2 + 0.4) / 2)


def test_a_token_twice_in_a_row_is_not_its_own_continuation():
    scores = head_scores(torch.eye(4)[None, None], torch.tensor([1, 2, 2, 3]))
    assert scores["induction"].item() == 0


def test_without_repetition_two_scores_are_zero():
    scores = head_scores(torch.full((2, 3, 6, 6), 1 / 6), torch.arange(6))
    assert scores["same token"].eq(0).all() and scores["induction"].eq(0).all()
    assert scores["same token"].shape == (2, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 20), st.integers(2, 6), st.integers(0, 99))
def test_scores_are_shares(n, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (n,), generator=generator)
    weights = torch.rand(2, 2, n, n, generator=generator).tril()
    scores = head_scores(weights / weights.sum(-1, keepdim=True), ids)
    assert all(0 <= value <= 1.0001 for score in scores.values() for value in score.flatten())


@pytest.mark.parametrize(("n", "shape"), [(2, (1, 1, 2, 2)), (5, (1, 1, 4, 4))])
def test_too_short_or_of_another_length(n, shape):
    with pytest.raises(ValueError, match=f"{n} tokens and weights of shape.*at least 3"):
        head_scores(torch.rand(shape), torch.arange(n))


# ---------------------------------------------------------------- what the viewer reads


def test_the_reader_gives_visible_tokens_and_the_first_weights():
    tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [])
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, 64, 16, 2, 2, norm="rmsnorm", mlp="swiglu", position="rope", bias=False)).eval()
    read = attention_reader(model, tokenizer)
    tokens, weights = read("a b\n")
    assert tokens == ["a", "␣", "b", "↵"] and weights.shape == (2, 2, 4, 4)
    close(weights, look_inside(model, torch.tensor([list(b"a b\n")])).weights)
    tokens, weights = read("x" * 100)  # longer than the model's context, and no error
    assert len(tokens) == 100 and weights.shape == (2, 2, MAX_TOKENS, MAX_TOKENS)
    with pytest.raises(ValueError, match="no token"):
        read("")
