"""Deep dive: Many conversations at once.

Written from ch06_finetune/serving.ipynb by `python course.py export`:
edit the notebook, not this file.
"""

__all__ = [
    "attend_apart",
    "step_together",
    "Answer",
    "CacheShelf",
    "shared_length",
    "Batch",
    "Reception",
    "Engine",
    "TEMPLATE",
    "PRE_TOKENIZERS",
    "half_split_to_interleaved",
    "gguf_tensors",
    "check_gguf",
    "export_gguf",
]

import codecs
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFWriter, LlamaFileType, TokenType
from torch import Tensor, nn

from ch02_tokenizer.tokenizer import END_OF_TEXT, GPT2_PATTERN, SMOLLM2_PATTERN, BPETokenizer, spell
from ch03_attention.attention import KVCache, apply_rope, causal_attention
from ch04_gpt.gpt import GPT, check_sampling, sample
from ch04_gpt.weights import GGUF_NAMES, check_unchanged, family_of, their_tensors
from ch06_finetune.finetune import END, SMOLLM2_SYSTEM, START, check_messages, encode_chat
from utils.workspace import atomic_write


def attend_apart(attention: nn.Module, x: Tensor, positions: Tensor, lengths: Sequence[int],
                 caches: Sequence[KVCache]) -> Tensor:
    """``MultiHeadAttention`` for several texts that stand in one row: x (1, N, D) -> (1, N, D).

    Text b has the next ``lengths[b]`` of the N places; there it goes on from ``caches[b]``, which grows.
    ``positions`` (N,) count in each text. Yu et al. 2022 (Orca), section 3.2, "selective batching".
    """
    heads = attention.w_qkv(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (1, H + 2K, N, d)
    query, key, value = heads.split([attention.n_heads, attention.n_kv_heads, attention.n_kv_heads], dim=1)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if attention.rope is not None:
        cos, sin = attention.rope.cos[positions], attention.rope.sin[positions]
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
    texts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), caches, strict=True)
    mixed = [causal_attention(q, *cache.append(k, v), attention.window) for q, k, v, cache in texts]
    return attention.out_proj(torch.cat(mixed, dim=2).transpose(1, 2).flatten(-2))


def step_together(model: GPT, pieces: Sequence[Sequence[int]], caches: Sequence[list[KVCache]]) -> Tensor:
    """One pass through a model for several texts: the normed state (B, D) at the end of each one's piece.

    ``pieces[b]`` are ids, at least one, that go on from what ``caches[b]`` has seen, which begins as
    ``model.new_cache()``. The model must be in evaluation mode.
    """
    lengths, starts = [len(piece) for piece in pieces], [cache[0].length for cache in caches]
    ids = torch.tensor([[token for piece in pieces for token in piece]], device=model.device)  # (1, N)
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    positions = positions.to(model.device)
    x = model.token_embedding(ids)
    if model.position_embedding is not None:
        x = x + model.position_embedding(positions)
    for number, block in enumerate(model.blocks):
        layer = [cache[number] for cache in caches]
        x = x + attend_apart(block.attention, block.norm1(x), positions, lengths, layer)
        x = x + block.mlp(block.norm2(x))
    ends = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    return model.norm(x[0, ends])


@dataclass(eq=False, repr=False)
class Answer:
    """One answer under way. ``finish_reason`` is None until it is "stop" (ended by itself) or "length"."""

    token_ids: list[int]  # the prompt, and then what was chosen
    max_new_tokens: int
    choose: Callable[[Tensor], Tensor]  # logits (1, V) -> id (1,)
    finish_reason: str | None = None
    reused_tokens: int = 0  # of the prompt, found in a cache that was put aside

    def __post_init__(self):
        self.prompt_tokens, self.cache = len(self.token_ids), None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # half characters wait for the rest

    @property
    def new_tokens(self) -> int:
        """How many tokens it has so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def unread(self) -> int:
        """How many tokens the model has yet to read: all of a prompt at first, then always the newest."""
        return len(self.token_ids) - (self.cache[0].length if self.cache else 0)

    @property
    def reserved(self) -> int:
        """The most tokens that its cache can come to hold."""
        return self.prompt_tokens + self.max_new_tokens

    def take(self, token: int, stop_ids: Collection[int], tokenizer: BPETokenizer) -> str:
        """The answer's next token; the text that it adds, which may be empty."""
        text = ""
        if token in stop_ids:
            self.finish_reason = "stop"
        else:
            self.token_ids.append(token)
            text = self.decoder.decode(tokenizer.decode_bytes([token]))
            if self.new_tokens == self.max_new_tokens:
                self.finish_reason = "length"
        return text + self.decoder.decode(b"", final=True) if self.finish_reason else text


class CacheShelf:
    """Caches of answers that have ended, for prompts that begin in the same way; the oldest go first."""

    def __init__(self, model: GPT, most: int):
        self.model, self.kept = model, deque(maxlen=most)  # of (ids, cache)

    @property
    def tokens(self) -> int:
        """How many tokens lie on the shelf."""
        return sum(len(ids) for ids, _ in self.kept)

    def put(self, answer: Answer) -> None:
        """Take the cache off an answer and keep it."""
        self.kept.append((answer.token_ids[: answer.cache[0].length], answer.cache))
        answer.cache = None

    def keep_at_most(self, tokens: int) -> None:
        """Throw the oldest away until no more than so many tokens are left."""
        while self.kept and self.tokens > tokens:
            self.kept.popleft()

    def hand_to(self, answer: Answer) -> None:
        """Give an answer a cache of which its prompt shares at least half, cut to that; else a new one."""
        answer.cache = self.model.new_cache()
        if self.model.config.window is not None:  # such a cache has dropped what a cut may need
            return
        shared = [shared_length(ids, answer.token_ids[:-1]) for ids, _ in self.kept]
        fitting = [i for i, (ids, _) in enumerate(self.kept) if shared[i] and 2 * shared[i] >= len(ids)]
        if fitting:
            best = max(fitting, key=shared.__getitem__)
            answer.cache, answer.reused_tokens = self.kept[best][1], shared[best]
            del self.kept[best]
            for layer in answer.cache:
                layer.truncate(answer.reused_tokens)


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items two sequences have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
                min(len(first), len(second)))


class Batch:
    """Who takes part in the next step: ``rows``, and behind them the queue ``waiting``.

    At most ``max_rows`` answers, whose caches can together grow to at most ``max_cached`` tokens.
    """

    def __init__(self, model: GPT, max_rows: int, max_cached: int):
        self.model, self.max_rows, self.max_cached = model, max_rows, max(max_cached, model.config.context_length)
        self.forget()

    def forget(self) -> None:
        """Drop everything: answers under way, answers that wait, caches put aside."""
        self.waiting: deque[Answer] = deque()
        self.rows: list[Answer] = []
        self.aside = CacheShelf(self.model, self.max_rows)

    @property
    def busy(self) -> bool:
        """Whether any answer is under way or waits."""
        return bool(self.rows or self.waiting)

    def add(self, answer: Answer) -> None:
        """Put an answer into the queue; it takes part as soon as there is room."""
        self.waiting.append(answer)

    def remove(self, answer: Answer) -> None:
        """Take an answer out, wherever it is; nothing happens if it is not there."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        if answer in self.rows:
            self.rows.remove(answer)
            self.aside.put(answer)

    def let_in(self) -> None:
        """From the queue into the rows, in order, as long as the next one fits."""
        while self.waiting and len(self.rows) < self.max_rows:
            reserved = sum(answer.reserved for answer in (*self.rows, self.waiting[0]))
            if reserved > self.max_cached:
                return
            self.rows.append(self.waiting.popleft())
            self.aside.hand_to(self.rows[-1])
            self.aside.keep_at_most(self.max_cached - reserved)

    def turns(self, chunk: int) -> list[tuple[Answer, int]]:
        """(answer, how many tokens it may read in the next step); of prompts, ``chunk`` in all."""
        taking = []
        for answer in self.rows:
            n = answer.unread if answer.unread == 1 else min(answer.unread, chunk)
            chunk -= n * (answer.unread > 1)
            taking += [(answer, n)] * (n > 0)
        return taking


class Reception:
    """A model that answers conversations, and the dials that hold where a question names none."""

    def __init__(self, model: GPT, tokenizer: BPETokenizer, name: str, system_prompt: str | None = SMOLLM2_SYSTEM,
                 *, temperature: float = 0.2, top_p: float | None = 0.9, max_new_tokens: int = 512):
        check_sampling(model.config.vocab_size, temperature, None, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.system_prompt = system_prompt
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens

    def open(self, messages: Sequence[dict], *, temperature: float | None = None, top_p: float | None = None,
             max_new_tokens: int | None = None, seed: int | None = None) -> Answer:
        """An answer to a conversation, not yet begun; dials that are None are the engine's own.

        Nothing is left out of a long conversation: ``OverflowError`` if it does not fit the context together
        with the answer. Otherwise ``ValueError`` and ``TypeError`` as in ``check_messages``.
        """
        temperature = self.temperature if temperature is None else temperature
        top_p = self.top_p if top_p is None else top_p
        check_sampling(self.model.config.vocab_size, temperature, None, top_p)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1, or None.")
        check_messages(messages)
        if messages[-1]["role"] != "user":
            raise ValueError(f"The last message has the role {messages[-1]['role']!r}; it must be 'user', so "
                             "that there is something to answer.")
        prompt, _ = encode_chat(self.tokenizer, messages, True, self.system_prompt)
        limit = self.model.config.context_length
        room = limit - len(prompt)
        if room < (max_new_tokens or 1):
            raise OverflowError(f"The conversation has {len(prompt):,} tokens and the answer may have "
                                f"{max_new_tokens or 1:,}; the model's context holds {limit:,} for both. "
                                "Leave out its oldest messages, or ask for a shorter answer.")
        generator = torch.Generator(self.model.device)
        generator.manual_seed(generator.seed() if seed is None else seed)
        choose = partial(sample, temperature=temperature, top_p=top_p, generator=generator)
        return Answer(prompt, max_new_tokens or min(self.max_new_tokens, room), choose)


class Engine(Reception, Batch):
    """Answers many conversations at once: ``open`` one, ``add`` it, and ``step`` until none is left.

    Each step is one pass through the model for all answers under way; answers come and go between steps. A
    greedy answer is the one that ``Assistant`` gives, up to rounding. At most ``max_rows`` answers take part,
    with at most ``max_cached`` tokens in their caches (never fewer than one full context), and a step reads
    at most ``chunk`` tokens of prompts. ``dials`` as for ``Reception``. For one thread at a time; only ``open``
    may be called by another.
    """

    def __init__(self, model: GPT, tokenizer: BPETokenizer, name: str, system_prompt: str | None = SMOLLM2_SYSTEM,
                 *, max_rows: int = 16, max_cached: int = 16_384, chunk: int = 256, **dials):
        if min(max_rows, chunk) < 1:
            raise ValueError(f"max_rows is {max_rows} and chunk {chunk}; each must be at least 1.")
        Reception.__init__(self, model, tokenizer, name, system_prompt, **dials)
        Batch.__init__(self, model, max_rows, max_cached)
        self.chunk, self.stop_ids = chunk, set(tokenizer.special_tokens.values())

    def step(self) -> list[tuple[Answer, str]]:
        """One pass of the model for all: (answer, its new text) of each answer that has got a token.

        The text may be empty. If the pass fails, ``forget`` everything and raise.
        """
        self.let_in()
        try:
            return self._advance(taking) if (taking := self.turns(self.chunk)) else []
        except BaseException:  # stopped in the middle: some layers have the new tokens, some have not
            self.forget()
            raise

    @torch.inference_mode()
    def _advance(self, taking: list[tuple[Answer, int]]) -> list[tuple[Answer, str]]:
        begins = [(answer, len(answer.token_ids) - answer.unread, n) for answer, n in taking]
        pieces = [answer.token_ids[begin : begin + n] for answer, begin, n in begins]
        states = step_together(self.model, pieces, [answer.cache for answer, _ in taking])
        ready = [i for i, (answer, _) in enumerate(taking) if answer.unread == 0]
        answers = [taking[i][0] for i in ready]
        logits = self.model.lm_head(states[ready])  # (answers that have been read to their end, V)
        tokens = [int(answer.choose(row[None])) for answer, row in zip(answers, logits, strict=True)]
        heard = [(answer, answer.take(token, self.stop_ids, self.tokenizer))
                 for answer, token in zip(answers, tokens, strict=True)]
        for answer in answers:
            if answer.finish_reason:
                self.remove(answer)
        return heard


TEMPLATE = ("{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
PRE_TOKENIZERS = {GPT2_PATTERN: "gpt-2", SMOLLM2_PATTERN: "smollm"}  # llama.cpp's names for our patterns


def half_split_to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows (n_heads * d, ...) of a projection: rotary pairs (0, d/2), ... become (0, 1), ..."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_tensors(model: GPT) -> dict[str, Tensor]:
    """The parameters of a Llama model by their names in a GGUF file, and in its order of rows."""
    config, tensors = model.config, {}
    ours = {theirs: name for name, theirs in GGUF_NAMES.items()}
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    for name, tensor in their_tensors(model).items():
        layer, part = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
        part = ours[part]
        tensor = half_split_to_interleaved(tensor, heads[part]) if part in heads else tensor
        tensors[f"blk.{layer}.{part}.weight" if layer else f"{part}.weight"] = tensor.float().cpu()
    return tensors


def check_gguf(model: GPT, tokenizer: BPETokenizer) -> None:
    """``ValueError`` for a model or a tokenizer that a Llama GGUF file cannot hold."""
    check_unchanged(model)
    config, width = model.config, model.config.head_dim * model.config.n_heads
    wrong = {
        "its parts are not Llama's": family_of(config) != "llama",
        f"its heads are {width} wide together, not d_model, {config.d_model}": width != config.d_model,
        "its positions are stretched (rope_scaling)": config.rope_scaling is not None,
        "it has a window": config.window is not None,
        f"it knows {config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}":
            config.vocab_size != tokenizer.vocab_size,
        "llama.cpp has no name for the tokenizer's pattern": tokenizer.pattern not in PRE_TOKENIZERS,
    }
    if problems := [problem for problem, holds in wrong.items() if holds]:
        raise ValueError(f"This model cannot be a Llama GGUF file: {'; '.join(problems)}. Take the model's "
                         "own tokenizer, and for another family save_pretrained.")


def export_gguf(model: GPT, tokenizer: BPETokenizer, path: str | Path, name: str = "bytes-to-chat") -> None:
    """Write a Llama model, its tokenizer and its chat template as a GGUF file, in float32.

    ``ValueError`` as in ``check_gguf``; nothing is written then.
    """
    check_gguf(model, tokenizer)
    config, special = model.config, tokenizer.special_tokens
    names = {i: token for token, i in special.items()}
    with atomic_write(Path(path)) as temporary:
        writer = GGUFWriter(temporary, "llama")
        writer.add_name(name)
        writer.add_file_type(LlamaFileType.ALL_F32)
        for add, value in (
                (writer.add_vocab_size, config.vocab_size), (writer.add_block_count, config.n_layers),
                (writer.add_context_length, config.context_length), (writer.add_head_count, config.n_heads),
                (writer.add_embedding_length, config.d_model), (writer.add_feed_forward_length, config.d_ff),
                (writer.add_head_count_kv, config.n_kv_heads), (writer.add_rope_freq_base, config.rope_theta),
                (writer.add_rope_dimension_count, config.head_dim),
                (writer.add_layer_norm_rms_eps, config.norm_eps)):
            add(value)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(PRE_TOKENIZERS[tokenizer.pattern])
        ids = range(tokenizer.vocab_size)
        writer.add_token_list([names.get(i) or spell(tokenizer.vocab[i]) for i in ids])
        writer.add_token_types([TokenType.CONTROL if i in names else TokenType.NORMAL for i in ids])
        writer.add_token_merges([f"{spell(a)} {spell(b)}" for a, b in tokenizer.merges])
        writer.add_add_bos_token(False)
        writer.add_eos_token_id(special[END] if END in special else special[END_OF_TEXT])
        if START in special and END in special:
            writer.add_chat_template(TEMPLATE)
        for tensor_name, tensor in gguf_tensors(model).items():
            writer.add_tensor(tensor_name, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
