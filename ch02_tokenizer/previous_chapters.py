"""What chapter 2 takes from chapter 1."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from ch01_data.data import (  # noqa: E402
    Document,
    decode_utf8,
    load_documents,
    normalize,
    slug,
    split_documents,
)
from utils.export import warn_if_stale  # noqa: E402

__all__ = ["Document", "decode_utf8", "load_documents", "normalize", "slug", "split_documents"]

warn_if_stale("ch01_data")
