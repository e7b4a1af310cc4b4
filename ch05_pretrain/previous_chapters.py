"""What chapter 5 takes from earlier chapters, by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ch02_tokenizer.tokenizer import BPETokenizer, file_sha256, get_batch, prepare_tokens  # noqa: E402
from ch04_gpt.gpt import PRESETS, GPT, count_parameters, flops_per_token, from_keys, generate  # noqa: E402
from utils.export import warn_if_stale  # noqa: E402

__all__ = ["GPT", "PRESETS", "BPETokenizer", "count_parameters", "file_sha256", "flops_per_token", "from_keys",
           "generate", "get_batch", "prepare_tokens"]
warn_if_stale("ch02_tokenizer", "ch04_gpt")
