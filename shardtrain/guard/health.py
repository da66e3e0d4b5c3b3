"""Finds bad steps: losses or gradients that are not finite, and spikes of the loss."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float64

Row = dict[str, float]
"""The metrics of one step, by name."""

OnNan = Literal["stop", "skip", "rollback"]
"""What to do after a bad step, see `Guard`."""

WINDOW_STEPS = 32
"""A spike is measured against the median loss of so many steps."""

LEAST_STEPS = 8
"""With fewer steps there is no median yet, and no spike."""

NO_LOSSES = np.full(WINDOW_STEPS, np.nan)
"""`Health.losses` of a run without steps."""


class Health:
    """Judges steps by their metrics.

    Args:
        spike: a loss above this many times the median of the last `WINDOW_STEPS` good steps is bad; None if
            only a loss or gradient that is not finite is bad. It is meant for positive losses.

    Example:
        >>> health = Health(spike=3.0)
        >>> health.remember([1.0] * 8)
        >>> health.reason({"loss": 3.5, "grad_norm": 1.0})
        'the loss 3.5 is above 3 times 1, the median of the last 8 steps'
    """

    def __init__(self, spike: float | None = None) -> None:
        self.spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)

    def remember(self, losses: Iterable[float]) -> None:
        """Adds losses of good steps, oldest first."""
        self._losses.extend(loss for loss in losses if math.isfinite(loss))

    def recall(self, losses: Iterable[float]) -> None:
        """Replaces the losses by those of the run that is resumed, oldest first."""
        self._losses.clear()
        self.remember(losses)

    @property
    def losses(self) -> Float64[np.ndarray, "losses"]:
        """The losses of the window, oldest first, filled up with NaN: as they are stored in a checkpoint."""
        return np.array([*self._losses, *NO_LOSSES[len(self._losses) :]])

    @property
    def limit(self) -> float:
        """The loss above which a step is bad; infinite if there is no such limit."""
        if self.spike is None or len(self._losses) < LEAST_STEPS:
            return math.inf
        middle = statistics.median(self._losses)
        return self.spike * middle if middle > 0 else math.inf

    def reason(self, row: Mapping[str, float]) -> str | None:
        """Returns why a step is bad, or None for a good step.

        Args:
            row: its metrics. An entry `skipped` says that the compiled step found itself bad.
        """
        for key, words in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
            if not math.isfinite(row[key]):
                return f"{words} is {row[key]}"
        if row["loss"] > self.limit or row.get("skipped"):
            if not self._losses:
                return f"the loss is {row['loss']:.4g}"
            middle = statistics.median(self._losses)
            return (
                f"the loss {row['loss']:.4g} is above {self.spike:g} times {middle:.4g}, the median of the "
                f"last {len(self._losses)} steps"
            )
        return None


def not_finite(batch: Any) -> str | None:
    """Describes the values of a host batch that are not finite: how many, and the first row that has one.

    Args:
        batch: a tree of arrays; those that are not numpy arrays of floats are left out.

    Returns:
        None where all values are finite.

    Example:
        >>> from shardtrain.guard.health import not_finite
        >>> not_finite((np.array([[1.0, 2.0], [np.inf, np.nan]]), np.arange(2)))
        'the batch has 2 values that are not finite, first in row 1'
    """
    arrays = [x for x in jax.tree.leaves(batch) if isinstance(x, np.ndarray) and x.ndim]
    bad = [~np.isfinite(x) for x in arrays if np.issubdtype(x.dtype, np.inexact)]
    rows = [int(np.argwhere(where)[0][0]) for where in bad if where.any()]
    if not rows:
        return None
    count = sum(int(where.sum()) for where in bad)
    values = "1 value that is" if count == 1 else f"{count:,} values that are"
    return f"the batch has {values} not finite, first in row {min(rows)}"
