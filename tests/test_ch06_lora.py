"""LoRA: the layers, merging, adapters in files and in the chat, and equality with Hugging Face's peft."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
from torch import nn

from ch02_tokenizer.tokenizer import END_OF_TEXT, BPETokenizer
from ch04_gpt.gpt import GPT, PRESETS
from ch06_finetune import lora
from ch06_finetune.finetune import (
    END,
    START,
    Adapter,
    LoRALinear,
    add_lora,
    answer_loss,
    chat_batch,
    fine_tune,
    linear_layers,
    load_adapter,
    lora_layers,
    merge_lora,
    open_chat_model,
    put_adapter,
    remove_lora,
    save_adapter,
    sft_loss,
    take_adapter,
    unmerge_lora,
)

MATRICES = ("out_proj", "w_down", "w_gate", "w_qkv", "w_up")
IDS = torch.randint(290, (3, 12), generator=torch.Generator().manual_seed(1))


def small(seed=0, **choices):
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(PRESETS["storyteller"], **{"vocab_size": 300, "context_length": 64, "d_model": 32,
                                                              "d_ff": 88, "n_layers": 2, **choices}))


def stir(model, seed=1):
    """Give every B random numbers, so that LoRA does something."""
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    return model


def with_lora(rank=4, alpha=8.0, targets=None, seed=1, **choices):
    model = small(**choices)
    add_lora(model, rank, alpha, targets)
    return stir(model, seed)


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, model):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- layers


def test_the_formula():
    base = nn.Linear(6, 5)
    layer = LoRALinear(base, rank=2, alpha=3.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 6)
    expected = x @ (base.weight + 3 / 2 * layer.lora_b @ layer.lora_a).T + base.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.change(), 1.5 * (layer.lora_b @ layer.lora_a).detach())


def test_nothing_changes_before_the_first_step_and_only_lora_trains():
    model, before = small(), small()
    add_lora(model, 4, 8)
    assert torch.equal(model(IDS), before(IDS))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{kind}" for name in lora_layers(model) for kind in ("lora_a", "lora_b")}
    assert {name.split(".")[-1] for name in lora_layers(model)} == set(MATRICES) and len(lora_layers(model)) == 10
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    first_a = model.blocks[0].mlp.w_up.lora_a.clone()
    losses = fine_tune(model, [IDS] * 8, lambda ids: sft_loss(model(ids[:, :-1]), ids[:, 1:], ids[:, 1:] >= 0),
                       max_lr=1e-2)
    assert losses[-1] < losses[0] and not torch.equal(first_a, model.blocks[0].mlp.w_up.lora_a)
    assert all(torch.equal(frozen[name], dict(model.named_parameters())[name]) for name in frozen)


def test_targets_by_name():
    assert len(lora_layers(with_lora(targets="w_qkv"))) == 2
    assert {name.split(".")[-1] for name in lora_layers(with_lora(targets=["w_up", "w_down"]))} == {"w_up", "w_down"}
    assert set(linear_layers(with_lora())) == set(linear_layers(small()))
    untied = with_lora(targets=["lm_head"], tie_embeddings=False)
    assert list(lora_layers(untied)) == ["lm_head"]


@pytest.mark.parametrize(("options", "words"), [
    ({"rank": 0}, r"rank is 0; blocks\.0\.attention\.\w+ is a matrix .* 1 to 32"),
    ({"rank": 33}, r"rank is 33; .* 1 to 32"), ({"alpha": 0}, "alpha is 0; it must be above 0"),
    ({"alpha": float("nan")}, "alpha is nan"), ({"targets": ["w_qvk"]}, r"called w_qvk; .*w_qkv"),
    ({"targets": ["token_embedding"]}, "An embedding is a table"), ({"targets": []}, "called nothing"),
    ({"targets": ["lm_head"]}, r"lm_head shares its matrix with token_embedding \(they are tied\)"),
    ({"targets": ["w_up", "lm_head"]}, "tied"),
])
def test_what_cannot_have_lora_is_named_and_left_alone(options, words):
    model, before = small(), states(small())
    with pytest.raises(ValueError, match=words):
        add_lora(model, **{"rank": 4, "alpha": 8.0, "targets": None, **options})
    assert same(before, model) and all(p.requires_grad for p in model.parameters())


def test_twice_and_none():
    model = with_lora()
    with pytest.raises(ValueError, match="LoRA on 10 layers already"):
        add_lora(model, 2, 2)
    for action in (take_adapter, merge_lora, lambda model: save_adapter(model, "nowhere")):
        with pytest.raises(ValueError, match="LoRA on 0 layers"):
            action(small())


def test_a_base_of_half_precision_and_one_that_is_no_nn_linear():
    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("blocks", (linear.weight.detach() * 50).round().to(torch.int8))

        def forward(self, x):
            return x @ (self.blocks.float() / 50).T

    half = small().to(torch.bfloat16)
    add_lora(half, 4, 8)
    stir(half)
    assert half.blocks[0].mlp.w_up.lora_a.dtype == torch.float32 and half(IDS).dtype == torch.bfloat16
    half(IDS).float().sum().backward()
    model = small()
    for block in model.blocks:
        block.mlp.w_up = Packed(block.mlp.w_up)
    add_lora(model, 4, 8, ["w_up", "w_qkv"])
    stir(model)
    model(IDS).sum().backward()
    assert model.blocks[0].mlp.w_up.lora_b.grad.abs().sum() > 0
    before = states(model)
    with pytest.raises(TypeError, match="w_up is a Packed, and a change can only be added to an nn.Linear"):
        merge_lora(model)
    assert same(before, model)


def test_autocast_takes_lora_along():
    model = with_lora()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(IDS)
    torch.testing.assert_close(found.float(), model(IDS), atol=0.05, rtol=0.05)
    found.float().square().sum().backward()
    assert all(layer.lora_b.grad.abs().sum() > 0 for layer in lora_layers(model).values())


def test_fine_tune_needs_something_to_train():
    with pytest.raises(ValueError, match="0 weights may be trained"):
        fine_tune(small().requires_grad_(False), [0], lambda batch: None, max_lr=1e-3)


# ---------------------------------------------------------------- merging, swapping


@pytest.mark.parametrize("targets", [None, ["w_qkv"], ["w_gate", "w_down"]])
def test_merged_is_the_same_and_plain(targets, tmp_path):
    model, base = with_lora(targets=targets), small()
    beside, adapter = model(IDS), take_adapter(model)
    assert (beside - base(IDS)).abs().max() > 1e-2
    taken = merge_lora(model)
    torch.testing.assert_close(model(IDS), beside, rtol=1e-5, atol=1e-5)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    assert taken.tensors.keys() == adapter.tensors.keys()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(IDS), beside, rtol=1e-5, atol=1e-5)
    unmerge_lora(model, taken)
    torch.testing.assert_close(model(IDS), beside, rtol=1e-5, atol=1e-5)
    remove_lora(model)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=1e-5, atol=1e-5)


def test_removed_is_the_base_bit_for_bit():
    model = with_lora()
    remove_lora(model)
    assert same(states(small()), model) and model.lm_head.weight is model.token_embedding.weight


def test_a_model_with_lora_is_not_saved_as_a_plain_one(tmp_path):
    with pytest.raises(ValueError, match="merge the change into its weights first"):
        with_lora().save_pretrained(tmp_path)


def test_adapters_are_swapped_on_one_base(tmp_path):
    models = {"a": with_lora(rank=4), "b": with_lora(rank=2, alpha=1.0, targets=["w_up"], seed=5)}
    for name, model in models.items():
        save_adapter(model, tmp_path / name)
    base = small()
    for name in ("a", "b", "a"):
        load_adapter(base, tmp_path / name)
        assert torch.equal(base(IDS), models[name](IDS))
    assert base.token_embedding.weight is base.lm_head.weight
    remove_lora(base)
    assert same(states(small()), base)


def test_an_adapter_that_does_not_fit_changes_nothing():
    model = with_lora()
    before, good = states(model), take_adapter(model)
    missing = dict(list(good.tensors.items())[1:])
    for tensors in (missing, good.tensors | {"blocks.9.mlp.w_up.lora_a": torch.zeros(4, 32)},
                    {name: tensor[:1] for name, tensor in good.tensors.items()}):
        with pytest.raises(ValueError, match="does not fit the model: .* of its tensors"):
            put_adapter(model, dataclasses.replace(good, tensors=tensors))
    with pytest.raises(ValueError, match="rank is 99"):
        put_adapter(model, Adapter(99, 1.0, good.targets, good.tensors))
    assert same(before, model)


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    save_adapter(with_lora(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_file_holds_the_adapter_and_not_the_base(saved, tmp_path):
    model = with_lora()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 4 * numbers < (saved / "adapter.safetensors").stat().st_size < 4 * numbers + 12_000
    assert json.loads((saved / "adapter.json").read_text())["targets"] == list(MATRICES)
    assert not list(saved.glob(".*"))
    save_adapter(model, tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(folder / "adapter.safetensors").stat().st_size for folder in (tmp_path / "half", saved)]
    assert sizes[1] - sizes[0] == 2 * numbers
    other = small()
    load_adapter(other, tmp_path / "half")
    assert next(iter(lora_layers(other).values())).lora_a.dtype == torch.float32
    torch.testing.assert_close(other(IDS), model(IDS), rtol=1e-2, atol=1e-2)


def test_it_goes_on_a_base_of_half_precision_or_after_unmerging(saved):
    load_adapter(small().to(torch.bfloat16), saved)
    model = with_lora()
    unmerge_lora(model, merge_lora(model))
    load_adapter(model, saved)


@pytest.mark.parametrize(("base", "words"), [
    (lambda: small(seed=3), r"the sizes agree, but token_embedding\.weight has other numbers"),
    (lambda: small(d_ff=96), "another base, with d_ff 88 instead of 96"),
    (lambda: small(n_layers=3), "n_layers 2 instead of 3"),
    (lambda: small(rope_theta=500.0), "rope_theta 10000.0 instead of 500.0"),
])
def test_another_base_is_refused_by_what_differs(saved, base, words):
    model = base()
    before = states(model)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, saved)
    assert same(before, model)


def test_a_base_trained_further_is_refused(saved):
    model = small()
    with torch.no_grad():
        model.blocks[1].mlp.w_up.weight.mul_(1.05)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.w_up\.weight has other numbers"):
        load_adapter(model, saved)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(("name", "change", "words"), [
    ("adapter.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "damaged, or half of another save"),
    ("adapter.safetensors", lambda raw: raw[:200], "damaged, or half of another save"),
    ("adapter.safetensors", lambda raw: b"", "damaged, or half of another save"),
    ("adapter.json", lambda raw: raw[:50], r"adapter\.json .* is damaged \(JSONDecodeError"),
    ("adapter.json", lambda raw: b"[]", "is damaged"), ("adapter.json", lambda raw: b"\xff", "is damaged"),
    ("adapter.json", lambda raw: raw.replace(b'"rank"', b'"rink"'), r"damaged \(KeyError"),
    ("adapter.json", lambda raw: raw.replace(b'"rank": 4', b'"rank": 3'), "does not fit the model"),
    ("adapter.json", lambda raw: raw.replace(b'"rank": 4', b'"rank": "x"'), "is damaged"),
])
def test_damaged_files_are_refused(saved, name, change, words):
    damage(saved, name, change)
    model, before = small(), states(small())
    with pytest.raises(ValueError, match=words):
        load_adapter(model, saved)
    assert same(before, model)


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter\.json and no adapter\.safetensors in"):
        load_adapter(small(), tmp_path)
    (saved / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no adapter\.safetensors"):
        load_adapter(small(), saved)


# ---------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def tokenizer():
    text = "The sun shone warm upon the sea, and the little duck swam. " * 20
    return BPETokenizer.train(text, 290, [END_OF_TEXT, START, END])


def test_answer_loss_is_sft_loss(tokenizer):
    chats = [[{"role": "user", "content": "sun"}, {"role": "assistant", "content": answer}]
             for answer in ("The sun shone.", "The little duck swam upon the sea.")]
    ids, mask = chat_batch(tokenizer, chats, 64, system_prompt=None)
    model, other = (small(vocab_size=tokenizer.vocab_size) for _ in range(2))
    loss, expected = answer_loss(model, ids, mask), sft_loss(other(ids[:, :-1]), ids[:, 1:], mask[:, 1:])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="0 at all 2"):
        answer_loss(model, ids[:, :2], mask[:, :2] & False)
    with pytest.raises(ValueError, match="has shape"):
        answer_loss(model, ids, mask[:, :-1])


# ---------------------------------------------------------------- peft


@pytest.mark.parametrize("targets", [["w_qkv", "out_proj"], ["w_gate", "w_up", "w_down"], list(MATRICES)])
def test_peft_computes_the_same_forward_backward_and_merged(targets):
    model = with_lora(rank=4, alpha=12.0, targets=targets)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets,
                                                          lora_dropout=0.0), small())
    layers = {name: m for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert layers.keys() == lora_layers(model).keys()
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layers[name].lora_A["default"].weight.copy_(layer.lora_a)
            layers[name].lora_B["default"].weight.copy_(layer.lora_b)
    logits, expected = model(IDS), theirs(IDS)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.lora_a.grad, layers[name].lora_A["default"].weight.grad)
        torch.testing.assert_close(layer.lora_b.grad, layers[name].lora_B["default"].weight.grad)
    for name, layer in layers.items():
        torch.testing.assert_close(lora_layers(model)[name].change(), layer.get_delta_weight("default"))
        layer.merge()
    merge_lora(model)
    torch.testing.assert_close(model(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the deep dive's module


def test_the_truncated_update_is_the_best_of_its_rank():
    before, after = small(seed=0), small(seed=1)
    whole = lora.truncated_update(before, after, 32)
    start = copy.deepcopy(before)
    put_adapter(start, whole)
    old, new = linear_layers(before), linear_layers(after)
    for name, layer in lora_layers(start).items():
        torch.testing.assert_close(layer.change(), new[name].weight - old[name].weight, rtol=1e-4, atol=1e-5)
    put_adapter(start, lora.truncated_update(before, after, 3))
    name, layer = next(iter(lora_layers(start).items()))
    change = (new[name].weight - old[name].weight).detach()
    assert torch.linalg.matrix_rank(layer.change()) == 3
    torch.testing.assert_close((change - layer.change()).norm(), torch.linalg.svdvals(change)[3:].norm())


def test_the_record_is_whole():
    record = json.loads(lora.LORA_RECORD.read_text(encoding="utf-8"))
    settings = [field.name for field in dataclasses.fields(lora.LoRARun)]
    there = [{name: row[name] for name in settings} for row in record["runs"]]
    assert all(json.loads(json.dumps(dataclasses.asdict(run))) in there for run in lora.lora_sweep(record["runs"]))
    assert record["memory"]["LoRA"]["peak_bytes"] < record["memory"]["full"]["peak_bytes"]
    assert record["command"] == "python -m ch06_finetune.lora"
    start, tokens = lora.storyteller_and_plays()
    assert lora.losses_on(start, tokens) == pytest.approx(record["start"], abs=1e-3), "made from another storyteller"


def test_a_record_of_another_storyteller_is_not_gone_on_with(tmp_path):
    record = json.loads(lora.LORA_RECORD.read_text(encoding="utf-8"))
    record["start"]["tales"] -= 0.01
    path = tmp_path / "lora.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lora.json was made from another storyteller: \d.\d+ nats on the tales"):
        lora.record_lora(path)
    assert json.loads(path.read_text(encoding="utf-8")) == record


# ---------------------------------------------------------------- the chat


def test_an_adapter_is_opened_by_name_or_folder_and_merged(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORKSPACE", str(tmp_path / "workspace"))
    model = with_lora(vocab_size=tokenizer.vocab_size)
    small(vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path / "mine")
    tokenizer.save(tmp_path / "mine" / "tokenizer.json")
    save_adapter(model, tmp_path / "workspace" / "finetune" / "witch")
    for adapter in ("witch", str(tmp_path / "workspace" / "finetune" / "witch")):
        opened, _, name, _ = open_chat_model(str(tmp_path / "mine"), adapter)
        assert name == "mine+witch" and not lora_layers(opened)
        torch.testing.assert_close(opened.cpu()(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert open_chat_model(str(tmp_path / "mine"))[2] == "mine"
    with pytest.raises(FileNotFoundError, match=r"no adapter 'wich': .* one of .*witch"):
        open_chat_model(str(tmp_path / "mine"), "wich")
    save_adapter(with_lora(vocab_size=tokenizer.vocab_size, d_ff=96), tmp_path / "other")
    with pytest.raises(ValueError, match="another base, with d_ff 96 instead of 88"):
        open_chat_model(str(tmp_path / "mine"), str(tmp_path / "other"))
