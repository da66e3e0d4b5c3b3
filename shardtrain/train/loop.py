"""The training loop."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shardtrain.checkpoint.checkpoints import Checkpoints
from shardtrain.errors import UserError
from shardtrain.guard.guard import Guard
from shardtrain.guard.health import Row
from shardtrain.guard.profile import peak_memory
from shardtrain.train.batch import scalar
from shardtrain.train.report import Observer

if TYPE_CHECKING:
    from shardtrain.train.trainer import Trainer

log = logging.getLogger(__name__)


def run(
    trainer: "Trainer",
    batches: Iterable[tuple[Any, Any]],
    steps: int,
    observers: Sequence[Observer],
    checkpoints: Checkpoints | None = None,
    guard: Guard | None = None,
) -> list[Row]:
    """Trains until `trainer.state.step` is `steps` or the batches end, under the guard if there is one.

    The order matters: the metrics of a step are read only when the next one is under way, so that the
    devices never wait for the host, but for those of a step that is saved: its arrays are waited for anyway,
    and what is bad is not to be saved.
    """
    if guard is not None and not guard.watching:
        with guard:
            return run(trainer, batches, steps, observers, checkpoints, guard)
    guard = guard or Guard(watchdog=None, on_nan=None)
    rows: list[Row] = []
    begun = done = int(trainer.state.step)
    pending: tuple[int, int, dict[str, jax.Array]] | None = None
    kept: int | None = None
    told = False
    clock = time.perf_counter()
    progress, feed = guard.progress, iter(batches)
    guard.start(done, steps, trainer.mesh.shape)
    guard.health.recall(trainer.recent)
    _refuse(trainer, guard, checkpoints)

    def read() -> bool:
        """Reads the step that is pending; False where its update is to be undone."""
        nonlocal clock, pending
        if pending is None:
            return True
        (step, size, sums), pending = pending, None
        values = {key: float(np.asarray(value)) for key, value in jax.device_get(sums).items()}
        now = time.perf_counter()
        examples = values.pop("examples")
        first = trainer.examples - size  # how many of a batch are real is known when its sums are
        which = range(first, first + int(examples))
        trainer.examples = which.stop
        row = {key: value / max(examples, 1) for key, value in values.items()}
        row |= {"images_per_second": examples / (now - clock), "seconds": now - clock}
        spent = progress.take()
        row |= {f"{what}_seconds": spent.get(what, 0.0) for what in ("data", "compute", "checkpoint")}
        if (peak := peak_memory()) is not None:
            row["peak_memory"] = peak
        clock = now
        good = guard.good(step, row, which)
        rows.append(row)
        for observe in observers:
            observe(step, row)
        return good

    def settle() -> None:
        """Reads what is pending; afterwards the state is one to keep."""
        if not read():
            _roll_back(trainer, guard, checkpoints, done)

    def save() -> None:
        nonlocal kept
        settle()
        trainer.recent = guard.health.losses  # a spike is one beside these
        if checkpoints is not None and kept != done:
            kept = done
            progress.at("checkpoint")
            path = trainer.save(checkpoints, rows[-1] if rows else None)
            guard.say("checkpoint", done, f"being written to {path}", path=str(path))

    while done < steps:
        if told := guard.stops_before(done + 1):
            break
        progress.at("data", done + 1)
        if (item := next(feed, None)) is None:
            break
        batch = trainer.place(*item, limit=guard.health.limit)
        progress.at("compiling")
        step = trainer.compiled_step(batch)
        if guard.profiler.is_edge(done + 1):
            jax.block_until_ready(trainer.state)  # reading could roll back, a step before other processes do
            guard.profile()
        if not rows and pending is None:
            clock = time.perf_counter()  # compiling is no step
            progress.take()
        progress.at("compute")
        with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
            trainer.state, sums = step(trainer.state, batch)
        if not read():
            _roll_back(trainer, guard, checkpoints, done)
            trainer.state, sums = step(trainer.state, batch)
        trainer.examples += batch.rows
        done += 1
        pending = done, batch.rows, sums
        if checkpoints is not None and checkpoints.due(done):
            save()
    if not told or done > begun:
        save()
        if checkpoints is not None:
            checkpoints.wait()
    if guard.profiler.running:
        guard.profile()
    if told or guard.stops_before(done + 1):  # what comes after the last step counts as another one
        raise guard.preempted(done, saved=kept == done)
    progress.at("evaluating")
    if done < steps:
        log.warning("the batches ended after step %d of %d", done, steps)
    guard.say("end", done, f"{done} of {steps} steps are done")
    return rows


def _refuse(trainer: "Trainer", guard: Guard, checkpoints: Checkpoints | None) -> None:
    """Refuses policies that cannot be kept; a run that may go back has a checkpoint to go back to."""
    if guard.on_nan == "skip" and not trainer._program.skip_bad:
        raise UserError("on_nan='skip' leaves out updates within the step; give the Trainer skip_bad=True")
    if guard.on_nan == "rollback":
        if checkpoints is None:
            raise UserError("on_nan='rollback' goes back to checkpoints; give fit some: checkpoints=...")
        trainer.save(checkpoints)  # nothing happens where the run was taken up from one of them


def _roll_back(trainer: "Trainer", guard: Guard, checkpoints: Checkpoints | None, step: int) -> None:
    """Puts the run where it was at its last checkpoint, but for the data, which goes on behind `step`."""
    assert checkpoints is not None  # else it was refused
    guard.progress.at("checkpoint")
    position = trainer.examples
    saved = trainer.restore(checkpoints, checkpoints.newest(own=True)[0])
    trainer.examples = position
    number = scalar(np.int32(step), trainer.state.step.sharding)
    trainer.state = dataclasses.replace(trainer.state, step=number)
    guard.rolled_back(step, saved)
