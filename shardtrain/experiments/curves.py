"""The picture of a run: its losses and metrics against the step."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_curves(
    rows: Sequence[Mapping[str, Any]], path: Path, title: str = "", metrics: Sequence[str] = ("accuracy",)
) -> None:
    """Draws the loss and metrics against the step as a PNG: every step thin, the running mean thick.

    Args:
        rows: of `metrics.jsonl`.
        path: of the picture.
        title: above it.
        metrics: drawn beside the loss, where the rows have them; their validation values with them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    keys = [key for key in ("loss", *metrics) if rows and key in rows[0]]
    count = max(1, len(keys))
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 3.6), layout="constrained")
    for key, axis in zip(keys, np.atleast_1d(axes), strict=False):
        _draw(axis, key, rows)
    figure.suptitle(title, fontsize=10, parse_math=False)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, path)
    plt.close(figure)


def _draw(axis: Any, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One metric against the step."""
    import numpy as np

    steps = np.array([row["step"] for row in rows])
    values = np.array([row[key] for row in rows])
    span = max(1, len(values) // 25)
    smooth = np.convolve(values, np.ones(span) / span, "valid")
    axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    middle = steps[(span - 1) // 2 :][: len(smooth)]
    axis.plot(middle, smooth, color="tab:blue", label=f"mean of {span} steps")
    held_out = [(row["step"], row[f"validation_{key}"]) for row in rows if f"validation_{key}" in row]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=3, label="validation")
    if key == "loss" and (values > 0).all():
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel=f"training {key}" if not held_out else key)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
