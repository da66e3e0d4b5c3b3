"""Draws pictures of a run, without a display."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shardtrain.cli.outputs import refuse_foreign
from shardtrain.errors import UserError

SOFTWARE = "shardtrain"
"""What a picture names as the program that drew it; other pictures are not replaced."""


@contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Provides a figure with a grid of axes, and writes it to a PNG file when the context ends.

    The file is replaced only when the new one is complete.

    Args:
        path: path of the file.
        rows, columns: size of the grid.
        size: width and height in inches.

    Returns:
        The figure, and its axes as an array (rows, columns).

    Example:
        >>> with picture(tmp / "loss.png", 1, 2, (8, 3)) as (figure, axes):
        ...     _ = axes[0, 0].plot([3, 2, 1])
    """
    from matplotlib.figure import Figure  # importing it takes a second, and only pictures need it

    figure = Figure(figsize=size, layout="constrained")
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False))
    yield figure, axes
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png", metadata={"Software": SOFTWARE})
    os.replace(part, path)


def refuse_picture(flag: str, path: Path) -> None:
    """Refuses a file for a picture that is no PNG by its name, or that is there and not one of our pictures.

    Raises:
        UserError: if it is; names the flag.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file in it")
    if path.suffix.lower() != ".png":
        raise UserError(f"{flag} {path}: the picture is a PNG; name a file that ends in .png")
    refuse_foreign(flag, path, f"Software\0{SOFTWARE}".encode())
