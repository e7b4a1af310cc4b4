"""Chapter 6, quantisation: rounding in blocks as ggml does, packed layers, files, adapters on a packed base."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ch04_gpt.gpt import GPT, PRESETS, generate
from ch04_gpt.weights import GGUFHeader
from ch05_pretrain.pretrain import load_storyteller
from ch06_finetune import quantization
from ch06_finetune.finetune import add_lora, merge_lora
from ch06_finetune.quantization import (
    BLOCK_FORMATS,
    MATRICES,
    NF4_LEVELS,
    PACKINGS,
    QUANTIZATION_RECORD,
    TRAININGS,
    BlockFormat,
    PackedEmbedding,
    PackedLinear,
    PackedProduct,
    bytes_held,
    compare_formats,
    held_out_tale,
    load_packed,
    most_memory,
    pack_model,
    pack_nf4,
    pack_pairs,
    pack_q4_1,
    pack_q8_0,
    quantize_gguf,
    round_model,
    round_scales,
    round_signed,
    round_to_normal,
    round_with_offset,
    shifted,
    spelling_batches,
    tale_bits,
    to_blocks,
    train_adapter,
    train_and_weigh,
    unpack_rows,
)
from ch06_finetune.serving import export_gguf


def matrix(seed=0, rows=24, width=192):
    """Weights as models have them: normal, with an outlier here and there, and two blocks of equal numbers."""
    weight = 0.05 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight[::5, 7] *= 20
    weight[3], weight[4, 64:128] = 0.0, 0.125
    return weight


def tiny(tie=True, d_model=64, seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(PRESETS["storyteller"], vocab_size=96, context_length=32, d_model=d_model,
                                   n_layers=2, n_heads=2, n_kv_heads=None, d_ff=128, tie_embeddings=tie,
                                   **changes)).eval()


@pytest.fixture(scope="module")
def storyteller():
    return load_storyteller()


# --- rounding -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "form"), [
    ("Q4_0", BlockFormat(4, 32, "signed")), ("Q5_0", BlockFormat(5, 32, "signed")), ("Q4_1", BlockFormat(4)),
    ("Q5_1", BlockFormat(5)), ("Q8_0", BlockFormat(8, 32, "symmetric"))])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_numbers_as_ggml(kind, form, seed):
    weight, kind = matrix(seed), GGMLQuantizationType[kind]
    theirs = dequantize(quantize(weight.numpy(), kind), kind)
    assert np.array_equal(form.round(weight).numpy(), theirs)


@pytest.mark.parametrize(("kind", "pack"), [("Q4_1", pack_q4_1), ("Q8_0", pack_q8_0)])
def test_the_same_bytes_as_ggml(kind, pack):
    weight = matrix(2)
    assert np.array_equal(pack(weight).numpy(), quantize(weight.numpy(), GGMLQuantizationType[kind]))


def test_nf4_levels_are_the_published_ones():
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(NF4_LEVELS, torch.tensor(published), atol=1e-6, rtol=0)


def test_nf4_takes_the_nearest_level():
    blocks = to_blocks(matrix(3), 64)
    numbers, largest = round_to_normal(blocks)
    exact = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    distance = (blocks[..., None] / exact[..., None] - NF4_LEVELS).abs()
    chosen = distance.gather(2, numbers.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.amin(2))
    assert torch.equal(largest, blocks.abs().amax(1, keepdim=True).half())


def test_nf4_lies_where_the_weights_are(monkeypatch):
    monkeypatch.setattr(quantization, "to_blocks", lambda weight, block: weight.reshape(-1, block))
    monkeypatch.setattr(quantization, "to_half", lambda scale: scale.half())  # these two look at the numbers
    weight = torch.empty(4, 64, device="meta")  # stands for an accelerator
    assert {part.device.type for part in round_to_normal(weight)} == {"meta"}
    assert BlockFormat(4, 64, "normal").round(weight).device.type == "meta"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.sampled_from([8, 16, 32, 64]), st.integers(0, 10_000))
def test_half_a_step_at_most_and_both_ends_kept(bits, block, seed):
    blocks = to_blocks(matrix(seed), block)
    numbers, scale, minimum = round_with_offset(blocks, bits)
    assert numbers.dtype == torch.uint8 and int(numbers.max()) <= 2**bits - 1
    error = (numbers * scale.float() + minimum.float() - blocks).abs()
    slack = 2.0**-10 * (blocks.abs().amax(1, keepdim=True) * 2)  # scale and minimum are float16
    assert (error <= scale.float() / 2 + slack + 1e-6).all()
    assert (numbers.amin(1) == 0).all()


def test_signed_levels_put_the_extreme_on_the_lowest():
    blocks = torch.tensor([[1.0, -0.5, 0.25, 0.0], [-2.0, 1.75, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0]])
    numbers, scale = round_signed(blocks, 4)
    assert numbers.tolist() == [[-8, 4, -2, 0], [-8, 7, 0, 1], [0, 0, 0, 0]]
    assert scale.flatten().tolist() == [-0.125, 0.25, 0.0]


@pytest.mark.parametrize("form", [BlockFormat(4), BlockFormat(3), BlockFormat(8, 32, "symmetric"), BlockFormat(2, 16)],
                         ids=str)
def test_blocks_that_were_rounded_stay_as_they_are(form):
    once = form.round(matrix(4))
    assert torch.equal(form.round(once), once)


def test_blocks_that_begin_elsewhere_do_not():
    once = BlockFormat(4).round(matrix(5))
    assert (shifted(once) != once).float().mean() > 0.3
    assert torch.equal(shifted(once.roll(-16, dims=1)).roll(16, dims=1), once)


def test_one_outlier_spoils_its_block_and_no_other():
    weight = 0.05 * torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    with_outlier = weight.clone()
    with_outlier[0, 40] = 30.0
    plain, spoilt = (BlockFormat(4).round(w)[0] for w in (weight, with_outlier))
    others = torch.arange(128) // 32 != 1
    assert torch.equal(plain[others], spoilt[others])
    assert (spoilt - with_outlier[0])[~others].abs().mean() > 5 * (plain - weight[0])[~others].abs().mean()
    by_row = BlockFormat(4, None, "symmetric").round(with_outlier)[0]
    assert not by_row[others].any()  # a scale a row: everything but the outlier is gone


def test_bits_a_weight_count_the_scales():
    assert BlockFormat(4).bits_per_weight(576) == 5.0
    assert BlockFormat(4, 32, "signed").bits_per_weight(576) == 4.5
    assert BlockFormat(4, 64, "normal").bits_per_weight(576) == 4.25
    assert BlockFormat(4, 64, "normal", double=True).bits_per_weight(576) == 4 + (8 + 32 / 256) / 64
    assert BlockFormat(8, None, "symmetric").bits_per_weight(576) == 8 + 16 / 576
    for kind, form in {"q4_1": BlockFormat(4), "q8_0": BlockFormat(8, 32, "symmetric"),
                       "nf4": BlockFormat(4, 64, "normal")}.items():
        assert 8 * PACKINGS[kind].n_bytes / PACKINGS[kind].block == form.bits_per_weight(576)


def test_scales_rounded_to_eight_bits():
    scale = torch.rand(700, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    rounded = round_scales(scale)
    assert rounded.shape == scale.shape
    assert 0 < (rounded - scale).abs().max() < 0.003  # a step is 1/255
    weight = matrix(6)
    plain, double = BlockFormat(4, 64, "normal").round(weight), BlockFormat(4, 64, "normal", double=True).round(weight)
    assert not torch.equal(plain, double)


@pytest.mark.parametrize(("attempt", "message"), [
    (lambda: BlockFormat(9), r"bits is 9; it must be 1 to 8"),
    (lambda: BlockFormat(0), r"bits is 0; it must be 1 to 8"),
    (lambda: BlockFormat(1, 32, "symmetric"), r"bits is 1; it must be 2 to 8"),
    (lambda: BlockFormat(5, 64, "normal"), r"bits is 5; .* must be 4"),
    (lambda: BlockFormat(4, 32, "log"), r"levels is 'log'; it must be one of symmetric, signed, offset, normal"),
    (lambda: BlockFormat(4, 32, "offset", double=True), r"minima, too"),
    (lambda: round_with_offset(torch.ones(1, 32), 12), r"bits is 12"),
    (lambda: round_signed(torch.ones(1, 32), 0), r"bits is 0"),
    (lambda: to_blocks(torch.ones(4, 48)), r"row of 48 numbers does not divide into blocks of 32"),
    (lambda: to_blocks(torch.ones(4, 48), 0), r"blocks of 0"),
    (lambda: to_blocks(torch.ones(64)), r"shape \(64,\); .* matrix"),
    (lambda: pack_nf4(torch.ones(4, 96)), r"96 numbers .* blocks of 64"),
    (lambda: pack_q4_1(torch.tensor([[float("inf")] * 32])), r"32 of 32 weights are not finite"),
    (lambda: BlockFormat(4).round(torch.full((2, 32), float("nan"))), r"64 of 64 weights are not finite"),
    (lambda: pack_q4_1(torch.linspace(0, 1e7, 32)[None]), r"beyond float16, whose largest number is 65,504"),
    (lambda: round_model(tiny(), lambda w: w, ["norms"]), r"no matrices of kind 'norms'; there are embedding"),
    (lambda: pack_model(tiny(), "q2"), r"no packing 'q2'; there are q4_1, q8_0, nf4"),
    (lambda: PackedLinear(torch.zeros(4, 34, dtype=torch.uint8), "q4_1"), r"multiple of 20 bytes"),
    (lambda: PackedLinear(torch.zeros(4, 40), "q4_1"), r"torch.float32; q4_1 needs uint8"),
    (lambda: PackedLinear(torch.zeros(40, dtype=torch.uint8), "q4_1"), r"\(40,\)"),
    (lambda: PackedLinear(pack_q8_0(torch.ones(4, 64)), "q8_0")(torch.ones(1, 32)), r"32 wide; this layer takes 64"),
    (lambda: train_and_weigh("half"), r"way is 'half'; it must be one of full, LoRA, QLoRA"),
])
def test_bad_input_says_the_value_and_the_bound(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


# --- packing --------------------------------------------------------------------------------------------------

def test_two_numbers_in_a_byte():
    packed = pack_pairs(torch.tensor([[3, 15, 0, 9]], dtype=torch.uint8))
    assert packed.tolist() == [[3, 15 + 9 * 16]]


@pytest.mark.parametrize(("kind", "form"), [("q4_1", BlockFormat(4)), ("q8_0", BlockFormat(8, 32, "symmetric")),
                                            ("nf4", BlockFormat(4, 64, "normal"))])
def test_packed_and_unpacked_is_rounded(kind, form):
    weight = matrix(7)
    packed = PACKINGS[kind].pack(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (24, 192 // PACKINGS[kind].block * PACKINGS[kind].n_bytes)
    assert torch.equal(unpack_rows(packed, kind), form.round(weight))


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("rows", [24, 6000])  # the latter takes several slices
def test_a_packed_layer_multiplies_and_passes_gradients_on(kind, rows):
    weight = matrix(8, rows=rows)
    bias = torch.randn(rows)
    layer = PackedLinear(PACKINGS[kind].pack(weight), kind, bias)
    assert (layer.in_features, layer.out_features) == (192, rows)
    assert not list(layer.parameters())
    x = torch.randn(2, 3, 192, requires_grad=True)
    found, expected = layer(x), F.linear(x, unpack_rows(layer.blocks, kind), bias)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    down = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad((y * down).sum(), x)[0] for y in (found, expected)),
                               atol=1e-3, rtol=1e-4)


def test_the_way_back_keeps_only_bytes():
    blocks, kept = pack_q4_1(matrix(9)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        PackedProduct.apply(torch.randn(1, 192, requires_grad=True), blocks, "q4_1")
    assert [t.data_ptr() for t in kept] == [blocks.data_ptr()]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", PACKINGS)
def test_a_packed_model_is_the_rounded_model(tie, kind):
    model = tiny(tie)
    form = {"q4_1": BlockFormat(4), "q8_0": BlockFormat(8, 32, "symmetric"), "nf4": BlockFormat(4, 64, "normal")}[kind]
    packed, rounded = pack_model(model, kind), round_model(model, form.round)
    if not tie:  # an embedding of its own is looked up, not multiplied with: it stays as it is
        rounded.token_embedding.weight.data = model.token_embedding.weight.data
    ids = torch.randint(96, (2, 9))
    torch.testing.assert_close(packed(ids), rounded(ids), atol=1e-5, rtol=1e-4)
    assert bytes_held(packed) < bytes_held(model)
    assert torch.equal(generate(packed, ids, 5, temperature=0), generate(rounded, ids, 5, temperature=0))


def test_a_packed_model_leaves_the_original_alone():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_model(model)
    round_model(model, BlockFormat(2).round)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bad", [-1, 96])
def test_an_unknown_token_is_refused(bad):
    with pytest.raises((IndexError, ValueError)):
        pack_model(tiny())(torch.tensor([[bad]]))


def test_one_kind_at_a_time():
    model = tiny()
    for kind, touched in {"embedding and head": {"token_embedding.weight"}, "attention": {"w_qkv", "out_proj"},
                          "MLP": {"w_gate", "w_up", "w_down"}}.items():
        rounded = dict(round_model(model, BlockFormat(2).round, [kind]).named_parameters())
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, rounded[name])}
        assert changed and all(any(part in name for part in touched) for name in changed)
        assert rounded["blocks.0.norm1.weight"].equal(model.blocks[0].norm1.weight)
    assert set(MATRICES) == {"embedding and head", "attention", "MLP"}


# --- what it costs --------------------------------------------------------------------------------------------

def test_the_storyteller_loses_little_at_four_bits_in_blocks(storyteller):
    model, tokenizer = storyteller
    ids, n_bytes = held_out_tale(tokenizer)
    short = ids[:800], n_bytes * 800 / len(ids)
    chosen = {name: BLOCK_FORMATS[name] for name in ("8 bits, a scale a row", "4 bits, a scale a row",
                                               "4 bits and offset (Q4_1)", "2 bits and offset")}
    costs = compare_formats(model, short, chosen)
    base = costs["float32"][1]
    assert base == pytest.approx(tale_bits(model, short))
    assert costs["bfloat16"][1] == pytest.approx(base)  # its file is bfloat16
    lost = {name: costs[name][1] - base for name in chosen}
    assert abs(lost["8 bits, a scale a row"]) < 0.005
    assert lost["4 bits and offset (Q4_1)"] < 0.5 * lost["4 bits, a scale a row"]
    assert lost["2 bits and offset"] > 0.1
    assert costs["4 bits and offset (Q4_1)"][0] == 5.0


# --- files ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def exported(storyteller, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    export_gguf(*storyteller, path, "Tale teller")
    return path


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_a_quantised_file_is_read_back(storyteller, exported, kind, tmp_path):
    model, tokenizer = storyteller
    path = tmp_path / "small.gguf"
    quantize_gguf(exported, path, kind)
    plain, small = GGUFHeader(exported), GGUFHeader(path)
    changed = {key for key in plain.metadata.keys() | small.metadata.keys()
               if plain.metadata.get(key) != small.metadata.get(key)}
    assert changed == {"general.file_type", "general.quantization_version"}
    kinds = {name: entry[1].name.lower() for name, entry in small.tensors.items()}
    assert kinds["token_embd.weight"] == "q8_0" and kinds["output_norm.weight"] == "f32"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.3.ffn_down.weight"] == kind
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a little mermaid")])
    logits = GPT.from_pretrained(path)(ids)
    for other in (load_packed(path), pack_model(model, kind, head="q8_0")):
        torch.testing.assert_close(other(ids), logits, atol=1e-4, rtol=1e-4)
    assert path.stat().st_size < exported.stat().st_size / (3.5 if kind == "q8_0" else 4.5)


def test_files_that_cannot_be_quantised(exported, tmp_path):
    target = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match="kind is 'nf4'; a GGUF file is written here as q8_0 or q4_1"):
        quantize_gguf(exported, target, "nf4")
    quantize_gguf(exported, tmp_path / "once.gguf")
    with pytest.raises(ValueError, match="is Q8_0|is Q4_1"):
        quantize_gguf(tmp_path / "once.gguf", target)
    assert not target.exists()
    with pytest.raises(ValueError, match="is F32; only q4_1, q8_0, nf4 are kept packed.*quantize_gguf"):
        load_packed(exported)
    whole = (tmp_path / "once.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        load_packed(tmp_path / "cut.gguf")


# --- adapters on a packed base --------------------------------------------------------------------------------

def test_the_same_values_give_the_same_losses(storyteller):
    model, tokenizer = storyteller
    rounded = round_model(model, BlockFormat(4).round)
    batches = [(torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(i)),
                torch.ones(2, 24)) for i in range(4)]
    plain, packed = train_adapter(rounded, batches), train_adapter(pack_model(model), batches)
    assert plain == pytest.approx(packed, abs=1e-4)
    assert plain[0] != plain[-1]
    other = train_adapter(pack_model(model, "nf4"), batches)
    assert max(abs(a - b) for a, b in zip(packed, other, strict=True)) > 1e-3


def test_only_the_adapter_learns_and_it_is_not_merged(storyteller):
    packed = pack_model(storyteller[0])
    before = packed.blocks[0].mlp.w_up.blocks.clone()
    add_lora(packed, 4, 8.0, ["w_up"])
    assert {name.split(".")[-1] for name, p in packed.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    packed(torch.tensor([[1, 2, 3]])).sum().backward()
    assert packed.blocks[0].mlp.w_up.lora_b.grad.abs().sum() > 0
    assert torch.equal(packed.blocks[0].mlp.w_up.base.blocks, before)
    with pytest.raises((TypeError, ValueError)):
        merge_lora(packed)


# --- SmolLM2 and the record -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def smollm2():
    try:
        path = quantization.extract(*quantization.SMOLLM2_FILE)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"SmolLM2 could not be had: {error}")
    return GPT.from_pretrained(path), load_packed(path)


@torch.inference_mode()
def test_smollm2_in_its_own_blocks_is_smollm2(smollm2):
    plain, packed = smollm2
    ids = torch.randint(0, 49_152, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(ids), plain(ids), atol=1e-3, rtol=1e-4)
    assert bytes_held(packed) < bytes_held(plain) / 5
    assert packed.token_embedding.kind == packed.lm_head.kind == "q8_0"
    assert isinstance(packed.token_embedding, PackedEmbedding)
    for name in ("blocks.0.attention.w_qkv", "blocks.17.mlp.w_down"):
        weight, layer = plain.get_submodule(name).weight, packed.get_submodule(name)
        assert torch.equal(unpack_rows(layer.blocks, layer.kind), weight)
        assert torch.equal(BlockFormat(4).round(weight), weight)  # the way back into its blocks is exact


def test_spelling_batches_ask_for_what_they_teach():
    tokenizer = quantization.BPETokenizer.smollm2()
    batches = spelling_batches(tokenizer, 2, 3)
    assert len(batches) == 2 and batches[0][0].shape == batches[0][1].shape and len(batches[0][0]) == 3
    for ids, mask in batches:
        for row, keep in zip(ids, mask, strict=True):
            word = re.search(r"Spell the word ([a-z]+)\.", tokenizer.decode(row.tolist()))[1]
            assert tokenizer.decode(row[keep].tolist()).startswith("-".join(word))
    assert torch.equal(batches[0][0], spelling_batches(tokenizer, 2, 3)[0][0])


def test_most_memory_grows_with_what_is_held():
    before = most_memory()
    held = torch.ones(300_000_000, dtype=torch.uint8)
    assert most_memory() >= before and most_memory() > held.nbytes


def test_the_record_tells_the_story():
    record = json.loads(QUANTIZATION_RECORD.read_text(encoding="utf-8"))
    assert record["command"] == "python -m ch06_finetune.quantization"
    assert set(record["formats"]) == {"float32", "bfloat16", *BLOCK_FORMATS, "Q4_1, blocks shifted"}
    lost = {name: value - record["formats"]["float32"][1] for name, (_, value) in record["formats"].items()}
    assert abs(lost["8 bits, blocks of 32 (Q8_0)"]) < 0.01 < lost["2 bits and offset"]
    assert lost["4 bits, blocks of 32 (Q4_0)"] < lost["4 bits, a scale a row"]
    assert record["losses"]["float32"] == pytest.approx(record["losses"]["its own blocks"], abs=1e-3)
    assert list(record["memory"]) == list(TRAININGS)
    most = [found["most"] - found["before"] for found in record["memory"].values()]
    assert most[0] > most[1] > most[2]
