"""What chapter 4 takes from earlier chapters, by name."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from ch02_tokenizer.tokenizer import BPETokenizer  # noqa: E402
from ch03_attention.attention import KVCache, MultiHeadAttention, RopeScaling, RotaryEmbedding  # noqa: E402
from utils.export import warn_if_stale  # noqa: E402

__all__ = ["BPETokenizer", "KVCache", "MultiHeadAttention", "RopeScaling", "RotaryEmbedding"]

warn_if_stale("ch02_tokenizer", "ch03_attention")
