"""A progress bar with the time left, for anything that takes more than a few seconds."""

from __future__ import annotations

import sys

from tqdm import tqdm


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


def progress(iterable=None, description="", *, total=None, unit="it", unit_scale=False) -> tqdm:
    """A bar over ``iterable`` (or driven by ``.update(n)``) that disappears when it is done.

    In a notebook it is written as plain text, so that it looks the same in every viewer.
    """
    notebook = in_notebook()
    return tqdm(
        iterable, desc=description, total=total, unit=unit, unit_scale=unit_scale,
        leave=False, mininterval=0.5, ncols=88 if notebook else None, dynamic_ncols=not notebook,
        file=sys.stdout if notebook else sys.stderr,
        disable=None if not notebook else False,
    )
