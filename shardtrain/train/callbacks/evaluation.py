"""Callbacks that look at data which the run does not train on, and act on what they see."""

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from shardtrain.errors import UserError
from shardtrain.guard.health import Row
from shardtrain.train.callbacks.base import Callback, Run, refuse_cadence

log = logging.getLogger(__name__)


class Evaluation(Callback):
    """Evaluates every so many steps, for instance on a validation set, and after the last step.

    The loss and all metrics of the trainer are added to the row of the step, under names with a prefix.

    Args:
        batches: a function that returns the batches from the first one on, such as
            `lambda: st.data.eval_batches(validation, 128)`, or a list of them.
        every: steps from one evaluation to the next.
        prefix: of the names in the row.

    Raises:
        UserError: batches that can be iterated over only once.

    Example:
        >>> digits = st.data.load("digits")
        >>> validation = st.callbacks.Evaluation(lambda: st.data.eval_batches(digits.test, 128), every=50)
    """

    needs_state: ClassVar[bool] = True

    def __init__(
        self,
        batches: Any,
        *,
        every: int,
        prefix: str = "validation_",
    ) -> None:
        refuse_cadence("Evaluation", every)
        if not callable(batches) and not isinstance(batches, list | tuple):
            raise UserError(
                f"Evaluation: batches of {type(batches).__name__} can be read only once; give a function "
                f"that returns them, such as lambda: st.data.eval_batches(arrays, 128), or a list"
            )
        self.batches, self.every, self.prefix = batches, every, prefix

    def on_step(self, run: Run, row: Row) -> None:
        run.evaluate(self.batches() if callable(self.batches) else self.batches, self.prefix)


class Best:
    """The best value of a metric so far.

    Args:
        mode: "max" where more is better, "min" where less is.
    """

    def __init__(self, mode: str) -> None:
        if mode not in ("max", "min"):
            raise UserError(f"mode={mode!r}; there are 'max' and 'min'")
        self.sign = 1 if mode == "max" else -1
        self.value = -math.inf

    def improves(self, value: float, by: float = 0.0) -> bool:
        """Whether a value is better than all before by more than `by`; remembers it then."""
        if not self.sign * value > self.value + by:
            return False
        self.value = self.sign * value
        return True


def refuse_array(callback: str, name: str, value: Any) -> None:
    """Refuses to compare values that are no numbers, such as a confusion matrix.

    Raises:
        UserError: names the metric.
    """
    if not isinstance(value, int | float):
        raise UserError(
            f"{callback}: {name!r} is an array, which has no best value; name a metric of one number"
        )


class EarlyStopping(Callback):
    """Ends a run when a metric has not improved for a while.

    Args:
        metric: a name in the rows, such as "validation_loss" of an `Evaluation`; steps whose row has no such
            name do not count.
        patience: rows with the metric, one after the other, that need not improve on the best.
        mode: "min" or "max": which of the metric is better.
        least: an improvement smaller than this is none.

    Raises:
        UserError: a patience below 1, or a mode that there is not; a run whose rows never have the metric,
            when it ends.

    Example:
        >>> stopping = st.callbacks.EarlyStopping("validation_accuracy", patience=3, mode="max")
    """

    def __init__(self, metric: str, *, patience: Any, mode: str = "min", least: float = 0.0) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise UserError(f"EarlyStopping(patience={patience!r}): give 1 or more")
        self.metric, self.patience, self.mode, self.least = metric, patience, mode, least
        self._best, self._waited, self._seen = Best(mode), 0, False

    def on_start(self, run: Run) -> None:
        self._best, self._waited, self._seen = Best(self.mode), 0, False

    def on_step(self, run: Run, row: Row) -> None:
        if self.metric not in row:
            return
        refuse_array("EarlyStopping", self.metric, row[self.metric])
        self._seen = True
        self._waited = 0 if self._best.improves(row[self.metric], self.least) else self._waited + 1
        if self._waited >= self.patience:
            run.stop(f"{self.metric} has not improved for {self.patience} evaluations")

    def on_end(self, run: Run) -> None:
        if run.error is None and run.rows and not self._seen:
            raise UserError(
                f"EarlyStopping: no row has {self.metric!r}; the last one has {', '.join(run.rows[-1])}"
            )


class BestCheckpoint(Callback):
    """Saves a checkpoint whenever an evaluation gives the best value so far.

    The metric is the one by which `Checkpoints(best=, mode=)` keeps the best, for instance
    `best="validation_accuracy"`.

    Raises:
        UserError: when the run starts without such checkpoints, or evaluates without that metric.

    Example:
        >>> checkpoints = st.Checkpoints("runs/mine/checkpoints", best="validation_accuracy")
        >>> best = st.callbacks.BestCheckpoint()
    """

    every = None
    needs_state: ClassVar[bool] = True

    def on_start(self, run: Run) -> None:
        if run.best_metric is None:
            raise UserError(
                "BestCheckpoint saves by the metric of fit's checkpoints; give fit "
                "checkpoints=st.Checkpoints(folder, best='validation_accuracy')"
            )
        self._best = Best(run.best_mode)

    def on_evaluation(self, run: Run, values: Mapping[str, Any]) -> None:
        assert run.best_metric is not None
        if run.best_metric not in values:
            raise UserError(
                f"BestCheckpoint: an evaluation has no {run.best_metric!r}, the metric of fit's checkpoints; "
                f"it has {', '.join(values)}"
            )
        refuse_array("BestCheckpoint", run.best_metric, values[run.best_metric])
        if self._best.improves(float(values[run.best_metric])):
            run.save()
