"""Which steps a run had better not have taken: losses that are no numbers, and spikes."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float64

OnNan = Literal["stop", "skip", "rollback"]

WINDOW = 32
"""Steps whose median loss is the measure of a spike."""

LEAST = 8
"""Steps below which there is no such median yet."""

NONE = np.full(WINDOW, np.nan)
"""The losses of a run that has none."""


class Health:
    """Judges steps by their metrics.

    Args:
        spike: a loss above this many times the median of the last `WINDOW` good steps is bad; None: only
            what is not finite. It is for losses that are positive.

    Example:
        >>> health = Health(spike=3.0)
        >>> health.remember([1.0] * 8)
        >>> health.reason({"loss": 3.5, "grad_norm": 1.0})
        'the loss 3.5 is above 3 times 1, the median of the last 8 steps'
    """

    def __init__(self, spike: float | None = None) -> None:
        self.spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def remember(self, losses: Iterable[float]) -> None:
        """Losses of good steps, oldest first."""
        self._losses.extend(loss for loss in losses if math.isfinite(loss))

    def recall(self, losses: Iterable[float]) -> None:
        """The same of a run that goes on: what other runs were judged by is forgotten."""
        self._losses.clear()
        self.remember(losses)

    @property
    def losses(self) -> Float64[np.ndarray, "losses"]:
        """Those that count, oldest first, then NaNs: as a checkpoint has them."""
        return np.array([*self._losses, *NONE[len(self._losses) :]])

    @property
    def limit(self) -> float:
        """The loss above which a step is bad."""
        if self.spike is None or len(self._losses) < LEAST:
            return math.inf
        middle = statistics.median(self._losses)
        return self.spike * middle if middle > 0 else math.inf

    def reason(self, row: Mapping[str, float]) -> str | None:
        """Why a step is bad, None for a good one.

        Args:
            row: its metrics; `skipped` in it says that the step was found bad where it ran.
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


Row = dict[str, float]
