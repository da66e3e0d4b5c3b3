"""The protocol of callbacks, and the run as they see it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from shardtrain.errors import UserError
from shardtrain.guard.health import Row


class Run(ABC):
    """A run of `Trainer.fit` as its callbacks see it.

    Attributes:
        trainer: the `Trainer`, whose state is that after `step` in the callbacks that set `needs_state`. In
            others it may be one step further: the metrics of a step are read while the next one runs.
        steps: the updates at which the run ends.
        step: the update that the callback is called for, from 1; before the first row those done already.
        rows: the rows of this call of `fit` so far.
        unit: what a row counts in `{unit}_per_second`, "images" for instance.
        error: the exception that ended the run, in `on_end` only; None where it ended well.
    """

    trainer: Any
    steps: int
    step: int
    rows: list[Row]
    unit: str
    error: BaseException | None = None

    @abstractmethod
    def evaluate(self, batches: Iterable[tuple[Any, Any]], prefix: str = "") -> dict[str, Any]:
        """Evaluates, adds the numbers to the row of this step under `prefix`, and tells all callbacks.

        Every process of the job must call it. Only callbacks that set `needs_state` may.
        """

    @abstractmethod
    def save(self) -> Path | None:
        """Saves a checkpoint of this step; None where `fit` was given no `checkpoints`.

        Only callbacks that set `needs_state` may.
        """

    @abstractmethod
    def stop(self, reason: str) -> None:
        """Ends the run: after this step in callbacks that set `needs_state`, in others one step later.

        All processes of a job must agree, as they do on the numbers of a row.
        """

    @property
    @abstractmethod
    def best_metric(self) -> str | None:
        """The metric by which `fit`'s checkpoints keep the best one, None where there is none."""

    @property
    @abstractmethod
    def best_mode(self) -> Literal["max", "min"]:
        """Which of that metric is better."""


class Callback:
    """What a run does besides its steps; subclasses override what they need.

    The methods are called in every process of a job, so that those which evaluate or save do so together. A
    callback that writes files or prints should be given to `fit` in one process alone.

    Attributes:
        every: steps from one call of `on_step` to the next; the last step of a run is always one of them.
            None: `on_step` is never called.
        needs_state: the callback reads or saves the state of the very step that it is called for. The loop
            then waits for the devices at these steps, and only at these.

    Example:
        >>> class PrintLoss(st.callbacks.Callback):
        ...     every = 10
        ...
        ...     def on_step(self, run, row):
        ...         print(run.step, row["loss"])
    """

    every: int | None = 1
    needs_state: ClassVar[bool] = False

    def on_start(self, run: Run) -> None:
        """Called once, before the first step."""

    def on_step(self, run: Run, row: Row) -> None:
        """Called with the row of a step; what is added to the row is in the files, too.

        Callbacks that set `needs_state` are called before the others.
        """

    def on_evaluation(self, run: Run, values: Mapping[str, Any]) -> None:
        """Called when a callback has evaluated, with the values under their prefixed names."""

    def on_end(self, run: Run) -> None:
        """Called once, after the last step or the exception that ended the run (`run.error`)."""

    def due(self, step: int, last: int) -> bool:
        """Whether `on_step` is called for this step of a run that ends with step `last`."""
        return self.every is not None and (step == last or step % self.every == 0)


def refuse_callbacks(callbacks: Any) -> None:
    """Refuses what is no callback, and cadences that are no number of steps.

    Raises:
        UserError: says what is possible.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise UserError(
                f"callbacks: {callback!r} is no st.callbacks.Callback; give instances of its subclasses"
            )
        refuse_cadence(type(callback).__name__, callback.every)


def refuse_cadence(name: str, every: Any) -> None:
    """Refuses a cadence that is no number of steps.

    Raises:
        UserError: says what is possible.
    """
    if every is not None and (not isinstance(every, int) or every < 1):
        raise UserError(f"{name}(every={every!r}): give a number of steps, 1 or more")
