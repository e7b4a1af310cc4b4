"""Nothing comes before chapter 1: this file only makes ``utils`` importable from its notebook."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

__all__: list[str] = []
