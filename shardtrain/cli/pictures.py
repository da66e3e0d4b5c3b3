"""Pictures of a run, drawn without a display."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure with a grid of axes, written to `path` as a PNG, whole or not at all, when the block ends.

    Args:
        path: of the file.
        rows, columns: of the grid.
        size: width and height in inches.

    Returns:
        The figure and its axes, an array (rows, columns).

    Example:
        >>> with picture(Path("loss.png"), 1, 2, (8, 3)) as (figure, axes):
        ...     axes[0, 0].plot([3, 2, 1])
    """
    from matplotlib.figure import Figure  # takes a second to import, and only pictures need it

    figure = Figure(figsize=size, layout="constrained")
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False))
    yield figure, axes
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, path)
