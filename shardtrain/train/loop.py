"""The training loop: steps, what is read of them, and what a run does besides them."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from shardtrain.checkpoint.checkpoints import Checkpoints
from shardtrain.errors import UserError
from shardtrain.guard.guard import Guard
from shardtrain.guard.health import Row
from shardtrain.guard.profile import peak_memory
from shardtrain.interrupts import uninterrupted
from shardtrain.train.batch import Batch
from shardtrain.train.callbacks.base import Callback, Run
from shardtrain.train.check import refuse_item
from shardtrain.train.state import TrainState

log = logging.getLogger(__name__)


@runtime_checkable
class Trains(Protocol):
    """What the loop needs of a trainer; see `shardtrain.Trainer`."""

    state: TrainState
    examples: int
    recent: Any
    unit: str
    skips_bad: bool

    @property
    def mesh(self) -> Mesh: ...
    def place(self, inputs: Any, targets: Any, limit: float) -> Batch: ...
    def advance(self, batch: Batch) -> dict[str, Any]: ...
    def ready(self, inputs: Any, targets: Any) -> None: ...
    def compiled_step(self, batch: Batch) -> Any: ...
    def row(self, sums: Mapping[str, Any]) -> dict[str, Any]: ...
    def evaluate(self, batches: Iterable[tuple[Any, Any]]) -> dict[str, Any]: ...
    def save(self, folder: Checkpoints, metrics: Mapping[str, float] | None = None) -> Path: ...
    def roll_back(self, checkpoints: Checkpoints, step: int, examples: int) -> int: ...


class Started(NamedTuple):
    """A step that was started and whose sums have not been read.

    Its rows, those that fill up a ragged batch included, count as examples until the sums are read. Its host
    batch is looked at only where the step turns out to be bad.
    """

    step: int
    rows: int
    sums: dict[str, Any]
    item: Any


class Loop(Run):
    """Trains until `steps` updates are done in all or the batches end.

    The metrics of a step are read only when the next step has been started, so that the devices never wait
    for the host. A step is read at once where its state is to be saved or looked at: at a checkpoint, and for
    callbacks that set `needs_state`. Nothing bad is saved that way.

    Wherever an exception or an interrupt ends the run, the trainer has the state after the last update, with
    its number and the examples it has trained on. The step is counted together with the assignment of its
    state, which no interrupt comes between.

    Args:
        trainer: whose state is advanced.
        batches: host batches `(inputs, targets)`.
        steps: updates in all.
        callbacks: called in this order, those that need the state first.
        checkpoints: saved to as they are due, and at the end.
        guard: watches over the run.
    """

    def __init__(
        self,
        trainer: Trains,
        batches: Iterable[Any],
        steps: int,
        callbacks: Sequence[Callback],
        checkpoints: Checkpoints | None,
        guard: Guard | None,
    ) -> None:
        self.trainer, self.steps, self.unit, self.rows = trainer, steps, trainer.unit, []
        self.callbacks = sorted(callbacks, key=lambda callback: not callback.needs_state)
        self.checkpoints, self.watched = checkpoints, guard is not None
        self.guard = guard or Guard(watchdog=None, on_nan=None)
        self.begun = self.done = self.step = int(trainer.state.step)
        self._feed = iter(batches)
        self._called: list[Callback] = []
        self._unread: list[Started] = []
        self._saved: int | None = None
        self._reason: str | None = None
        self._told = False
        self._last = steps
        self._clock = time.monotonic()

    def run(self) -> list[Row]:
        """Trains, under the guard.

        Returns:
            The rows of this run's steps.
        """
        watch = self.guard if self.watched and not self.guard.watching else nullcontext()
        with watch:
            self.guard.start(self.done, self.steps, self.trainer.mesh.shape)
            self.guard.health.recall(self.trainer.recent)
            self._refuse_policy()
            try:
                for callback in self.callbacks:
                    callback.on_start(self)
                    self._called.append(callback)
                self._train()
            except BaseException as error:
                self.error = error
                try:
                    self._read_rest(interrupted=isinstance(error, KeyboardInterrupt))
                finally:
                    self._end()
                raise
            self._end()
        return self.rows

    # What callbacks may ask of a run.

    def evaluate(self, batches: Iterable[tuple[Any, Any]], prefix: str = "") -> dict[str, Any]:
        self._refuse_late("evaluates")
        self.guard.progress.at("validating")
        values = {f"{prefix}{name}": value for name, value in self.trainer.evaluate(batches).items()}
        if self.rows:
            self._refuse_taken(values)
            self.rows[-1] |= values
        for callback in self.callbacks:
            callback.on_evaluation(self, values)
        return values

    def _refuse_late(self, what: str) -> None:
        """Refuses what needs the state of `step` when the state is already that of the next one."""
        if self.done != self.step:
            raise UserError(
                f"a callback {what} at step {self.step} when the state is that of step {self.done}; set "
                f"needs_state = True in its class"
            )

    def _refuse_taken(self, values: Mapping[str, Any]) -> None:
        """Refuses numbers of an evaluation whose names the row of the step has already."""
        if taken := sorted(values.keys() & self.rows[-1].keys()):
            raise UserError(
                f"the row of step {self.step} has {taken[0]!r} already; give each Evaluation a prefix of its "
                f"own, such as prefix='validation_'"
            )

    def save(self) -> Path | None:
        self._refuse_late("saves")
        return self._save()

    def _save(self) -> Path | None:
        self._settle()
        self.trainer.recent = self.guard.health.losses  # a spike is measured by these
        if self.checkpoints is None or self._saved == self.done:
            return None
        self._saved = self.done
        self.guard.progress.at("checkpoint")
        path = self.trainer.save(self.checkpoints, self._scores())
        self.guard.say("checkpoint", self.done, f"being written to {path}", path=str(path))
        return path

    def stop(self, reason: str) -> None:
        self._reason = reason

    @property
    def best_metric(self) -> str | None:
        return None if self.checkpoints is None else self.checkpoints.best_metric

    @property
    def best_mode(self) -> Literal["max", "min"]:
        return "max" if self.checkpoints is None else self.checkpoints.mode

    # The steps.

    def _train(self) -> None:
        while self.done < self.steps and self._reason is None:
            if self.guard.stops_before(self.done + 1):
                self._told = True
                break
            self.guard.progress.at("data", self.done + 1)
            if (item := next(self._feed, None)) is None:
                break
            self._step(item)
        self._conclude()

    def _step(self, item: Any) -> None:
        """Starts a step, and reads the one before it."""
        refuse_item(item)
        guard, trainer, number = self.guard, self.trainer, self.done + 1
        if number == self.begun + 1:
            guard.progress.at("compiling")  # which may take longer than to wait for data may
            trainer.ready(*item)
        batch = trainer.place(*item, limit=guard.health.limit)
        guard.progress.at("compiling")
        trainer.compiled_step(batch)
        if guard.profiler.is_edge(number):
            # Reading here could roll back, one step before other processes do.
            jax.block_until_ready(trainer.state)
            guard.profile()
        if not self.rows and not self._unread:
            self._clock, _ = guard.progress.take()  # compiling is no step
        guard.progress.at("compute")
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            self._advance(batch, item)
        if len(self._unread) > 1 and not self._read():
            self._roll_back()
            self._advance(batch, item)
        if self.checkpoints is not None and self.checkpoints.due(number):
            self._save()
        elif any(c.needs_state and c.due(number, self._last) for c in self.callbacks):
            self._settle()

    def _advance(self, batch: Batch, item: Any) -> None:
        """Starts an update and counts it."""
        with uninterrupted():
            sums = self.trainer.advance(batch)
            self.done += 1
            self._unread.append(Started(self.done, batch.rows, sums, item))

    def _read(self) -> bool:
        """Reads the first step that was not read, and calls the callbacks.

        Returns:
            False where its update is to be undone.
        """
        step, size, sums, item = self._unread[0]
        values = jax.device_get(sums)
        examples = int(values["examples"])
        row = self.trainer.row(values) | self._times(examples)
        with uninterrupted():
            self._unread.pop(0)
            self.trainer.examples += examples - size  # how many rows of a batch are real is known by its sums
            self.step = step
            self.rows.append(row)
        end = self.trainer.examples - sum(later.rows for later in self._unread)
        good = self.guard.good(step, row, range(end - examples, end), item)
        due = [callback for callback in self.callbacks if callback.due(step, self._last)]
        for callback in due if good else [c for c in due if not c.needs_state]:
            callback.on_step(self, row)
        return good

    def _read_rest(self, interrupted: bool) -> None:
        """Reads the steps that an exception has left unread.

        After an interrupt the callbacks are called, too; otherwise just the examples are counted. With
        several processes nothing is read: another one may be gone, and the devices wait for it.
        """
        while self._unread and jax.process_count() == 1:
            step, size, sums, _ = self._unread[0]
            try:
                if interrupted:
                    self._read()
                else:
                    self.trainer.examples += int(jax.device_get(sums["examples"])) - size
            except Exception as error:
                log.error("step %d: %s", step, error)
            if self._unread and self._unread[0].step == step:
                self._unread.pop(0)

    def _call_rest(self) -> None:
        """Calls the callbacks to which the last step is due only because the run ends with it.

        The batches may have ended, or a callback may have stopped the run, after the step was read.
        """
        if not self._unread and self.rows and self.step == self.done < self.steps:
            for callback in self.callbacks:
                if callback.due(self.done, self.done) and not callback.due(self.done, self.steps):
                    callback.on_step(self, self.rows[-1])

    def _times(self, examples: int) -> dict[str, float]:
        """How long the step took, and what the host waited for meanwhile."""
        now, spent = self.guard.progress.take()
        seconds, self._clock = now - self._clock, now
        row = {f"{self.unit}_per_second": examples / seconds, "seconds": seconds}
        row |= {f"{what}_seconds": spent.get(what, 0.0) for what in ("data", "compute", "checkpoint")}
        if (peak := peak_memory()) is not None:
            row["peak_memory"] = peak
        return row

    def _settle(self) -> None:
        """Reads the pending step, after which the state is one to keep."""
        if self._unread and not self._read():
            self._roll_back()

    def _scores(self) -> Mapping[str, float] | None:
        """The metrics that a checkpoint is judged by.

        None at a step without an evaluation, where the checkpoints are judged by a metric of one.
        """
        if not self.rows:
            return None
        if self.best_metric not in (None, *self.rows[-1]) and self._evaluates():
            return None
        return {key: value for key, value in self.rows[-1].items() if isinstance(value, float)}

    def _evaluates(self) -> bool:
        return any(callback.needs_state for callback in self.callbacks)

    def _roll_back(self) -> None:
        """Puts the run where it was at its last checkpoint, except for the data, which goes on from here."""
        assert self.checkpoints is not None  # else the policy was refused
        self.guard.progress.at("checkpoint")
        examples = self.trainer.examples - sum(later.rows for later in self._unread)
        with uninterrupted():
            saved = self.trainer.roll_back(self.checkpoints, self.step, examples)
            self.done = self.step
            self._unread.clear()
        self.guard.rolled_back(self.done, saved)

    # The ends.

    def _refuse_policy(self) -> None:
        """Refuses policies that the guard cannot keep; a run that may roll back begins with a checkpoint."""
        if self.guard.on_nan == "skip" and not self.trainer.skips_bad:
            raise UserError(
                "on_nan='skip' leaves out updates within the step; give the Trainer skip_bad=True"
            )
        if self.guard.on_nan == "rollback":
            if self.checkpoints is None:
                raise UserError("on_nan='rollback' goes back to checkpoints; give fit some: checkpoints=...")
            self.trainer.save(self.checkpoints)  # nothing happens where the run was taken up from one of them

    def _conclude(self) -> None:
        """Reads and saves the last step, and says how the run ended."""
        guard = self.guard
        told = self._told
        if not told:
            self._last = self.done
            self._call_rest()
        if not told or self.done > self.begun:
            self._save()
            if self.checkpoints is not None:
                self.checkpoints.wait()
        if guard.profiler.running:
            guard.profile()
        if told or guard.stops_before(self.done + 1):  # what comes after the last step counts as another one
            raise guard.preempted(self.done, saved=self._saved == self.done)
        guard.progress.at("evaluating")
        if self._reason is not None:
            guard.say("stop", self.done, self._reason)
            log.info("stopped after step %d of %d: %s", self.done, self.steps, self._reason)
        elif self.done < self.steps:
            log.warning("the batches ended after step %d of %d", self.done, self.steps)
        guard.say("end", self.done, f"{self.done} of {self.steps} steps are done")

    def _end(self) -> None:
        """Calls `on_end` of all callbacks that have started; the first error is raised, others are logged."""
        first: Exception | None = None
        for callback in self._called:
            try:
                callback.on_end(self)
            except Exception as error:
                if self.error is None:
                    first = self.error = error
                else:
                    log.error("%s.on_end: %s", type(callback).__name__, error)
        if first is not None:
            raise first
