"""The picture of the README: one figure from each chapter, as its notebook drew it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib.image
import nbformat

from .plots import figure
from .workspace import atomic_write

TAG = "cover"


def cover_figure(notebook: Path):
    """The image of the cell that is tagged ``cover``: an array (height, width, 4)."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if TAG in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    return matplotlib.image.imread(io.BytesIO(base64.b64decode(output.data["image/png"])))
    raise ValueError(f"{notebook.parent.name}/{notebook.name} has no executed cell with the tag {TAG!r} and a figure.")


def draw_overview(notebooks: list[Path], target: Path) -> None:
    """Lay out the cover figures of the chapters in two rows, numbered, and write them as a PNG file."""
    fig, grid = figure(ncols=(len(notebooks) + 1) // 2, nrows=2, width=13, height=6)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("NW")
    for axes, (number, notebook) in zip(grid.flat, enumerate(notebooks, 1), strict=False):
        axes.imshow(cover_figure(notebook), interpolation="lanczos")
        axes.set_title(f"{number}  {notebook.stem}", fontsize=13, fontweight="bold")
    with atomic_write(target) as temporary:
        fig.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
