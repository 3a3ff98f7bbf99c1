"""Draw which tokens of a digit each block prunes, merges and keeps."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from src.report.figures import AMBER, SLATE, TEAL, styled
from src.vision.tokens import CENTRE, MERGED, PRUNED, nearest

_STYLES = {PRUNED: (AMBER, (0, (3, 2))), MERGED: (SLATE, "-"), CENTRE: (TEAL, "-")}


@styled
def picture(image_SS: Tensor, part_LP: Tensor, first: int, columns: int) -> Figure:
    """Draw an image once for each compressed block, with a frame for each patch and an arrow for each merge.

    Args:
        image_SS: the image, a square.
        part_LP: part of each patch in each compressed block.
        first: number of the first compressed block.
        columns: patches in a row of the grid.
    """
    figure = Figure(figsize=(8.6, 2.7), layout="constrained")
    size = len(image_SS) // columns
    for at, (axis, part_P) in enumerate(zip(figure.subplots(1, len(part_LP)), part_LP, strict=True)):
        axis.imshow(image_SS, cmap="Greys", extent=(0, columns * size, columns * size, 0), alpha=0.6)
        centre_P = nearest(part_P, columns).tolist()
        for patch, part in enumerate(part_P.tolist()):
            (row, column), (colour, line) = divmod(patch, columns), _STYLES[part]
            axis.add_patch(Rectangle(
                (column * size + 0.12, row * size + 0.12), size - 0.24, size - 0.24,
                fill=False, edgecolor=colour, linestyle=line, linewidth=1.8, hatch="xx" * (part == PRUNED),
            ))  # fmt: skip
            if part == MERGED:
                there, here = (((i % columns + 0.5) * size, (i // columns + 0.5) * size)
                               for i in (centre_P[patch], patch))  # fmt: skip
                axis.annotate("", there, here, arrowprops={"arrowstyle": "-|>", "color": SLATE, "lw": 1.8})
        kept, merged, pruned = ((part_P == part).sum() for part in (CENTRE, MERGED, PRUNED))
        axis.set_title(f"Block {first + at}: {kept} kept,\n{merged} merged, {pruned} pruned")
        axis.axis("off")
    return figure
