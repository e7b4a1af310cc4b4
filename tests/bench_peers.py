"""The peers of the models: ``transformers``, and the code of "Build a Large Language Model (From Scratch)".

The book's code is read from its wheel without installing it: its requirements pin another numpy and TensorFlow.
"""

import importlib
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ch04_gpt.gpt import GPT, GPTConfig
from utils.downloads import fetch
from utils.workspace import workspace

logging.disable_progress_bar()


def book(module: str):
    """A module of the book's package, from its wheel."""
    wheel = str(fetch("llms-from-scratch"))
    if wheel not in sys.path:
        sys.path.append(wheel)
    return importlib.import_module(f"llms_from_scratch.{module}")


def book_gpt2(config: GPTConfig):
    """The book's GPT-2 in these sizes (its head is not tied: the same products)."""
    return book("ch04").GPTModel(
        {"vocab_size": config.vocab_size, "context_length": config.context_length, "emb_dim": config.d_model,
         "n_heads": config.n_heads, "n_layers": config.n_layers, "drop_rate": 0.0, "qkv_bias": True})


def book_llama(config: GPTConfig):
    """The book's Llama with a key-value cache, in these sizes (its head is not tied either)."""
    return book("kv_cache.llama3").Llama3Model(
        {"vocab_size": config.vocab_size, "context_length": config.context_length, "emb_dim": config.d_model,
         "n_heads": config.n_heads, "n_layers": config.n_layers, "hidden_dim": config.d_ff,
         "n_kv_groups": config.n_kv_heads, "rope_base": config.rope_theta, "dtype": torch.float32, "rope_freq": None})


def transformers_gpt2(config: GPTConfig) -> GPT2LMHeadModel:
    """The library's GPT-2 in these sizes."""
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.d_model,
        n_layer=config.n_layers, n_head=config.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None))


def transformers_llama(config: GPTConfig) -> LlamaForCausalLM:
    """The library's Llama in these sizes."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.context_length, hidden_size=config.d_model,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, intermediate_size=config.d_ff, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None))


def smollm2() -> GPT:
    """SmolLM2-135M in the course's class."""
    return GPT.from_pretrained("smollm2-135m")


def smollm2_folder() -> Path:
    """The same weights in a folder of the library's layout, written once."""
    folder = workspace("bench") / "smollm2-135m"
    if not (folder / "config.json").exists():
        smollm2().save_pretrained(folder)
    return folder


def transformers_smollm2() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
