"""The training loop."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shardtrain.errors import UserError
from shardtrain.train import place
from shardtrain.train.checkpoint import latest
from shardtrain.train.guard import Guard
from shardtrain.train.metrics import Observer, Row
from shardtrain.train.profile import peak_memory

if TYPE_CHECKING:
    from shardtrain.train.trainer import Trainer

log = logging.getLogger(__name__)


def run(
    trainer: "Trainer",
    batches: Iterable[tuple[Any, Any]],
    steps: int,
    observers: Sequence[Observer],
    guard: Guard | None = None,
) -> list[Row]:
    """Trains until `trainer.state.step` is `steps` or the batches end.

    The order matters: the metrics of a step are read only when the next one is under way, so that the
    devices never wait for the host.
    """
    guard = guard or Guard(watchdog=None, on_nan=None)
    rows: list[Row] = []
    done = begun = int(trainer.state.step)
    pending: tuple[int, int, dict[str, jax.Array]] | None = None
    clock = time.perf_counter()
    progress, feed = guard.progress, iter(batches)
    guard.start(done, steps, trainer.mesh.shape)
    _refuse(trainer, guard)

    def read() -> bool:
        """Reads the step that is pending; False where its update is to be undone."""
        nonlocal clock, pending
        assert pending is not None
        (step, size, sums), pending = pending, None
        values = {key: float(np.asarray(value)) for key, value in jax.device_get(sums).items()}
        now = time.perf_counter()
        examples = values.pop("examples")
        row = {key: value / max(examples, 1) for key, value in values.items()}
        row |= {"images_per_second": examples / (now - clock), "seconds": now - clock}
        spent = progress.take()
        row |= {f"{what}_seconds": spent.get(what, 0.0) for what in ("data", "compute", "checkpoint")}
        if (peak := peak_memory()) is not None:
            row["peak_memory"] = peak
        clock = now
        first = (step - 1) * size
        good = guard.good(step, row, range(first, first + int(examples)))
        rows.append(row)
        for observe in observers:
            observe(step, row)
        return good

    while done < steps and not guard.stops_before(done + 1):
        progress.at("data", done + 1)
        if (item := next(feed, None)) is None:
            break
        batch = trainer.place(*item, limit=guard.health.limit)
        progress.at("compiling")
        step = trainer.compiled_step(batch)
        if guard.profiler.is_edge(done + 1):
            if pending is not None and not read():
                _roll_back(trainer, guard, done)
            guard.profile()
        if pending is None and not rows:
            clock = time.perf_counter()  # compiling is no step
            progress.take()
        progress.at("compute")
        with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
            trainer.state, sums = step(trainer.state, batch)
        done += 1
        if pending is not None and not read():
            _roll_back(trainer, guard, done - 1)
            trainer.state, sums = step(trainer.state, batch)
        pending = done, batch.rows, sums
    if pending is not None and not read():
        _roll_back(trainer, guard, done)
    if guard.profiler.running:
        guard.profile()
    if done < steps and guard.stops_before(done + 1):
        raise guard.preempted(done, _save(trainer, guard, done) if done > begun else None)
    if done < steps:
        log.warning("the batches ended after step %d of %d", done, steps)
    guard.say("end", done, f"{done} of {steps} steps are done")
    return rows


def _refuse(trainer: "Trainer", guard: Guard) -> None:
    """Refuses policies that cannot be kept; a run that may go back has a checkpoint to go back to."""
    if guard.on_nan == "skip" and not trainer._program.skip_bad:
        raise UserError("on_nan='skip' leaves out updates within the step; give the Trainer skip_bad=True")
    if guard.on_nan == "rollback":
        if guard.folder is None:
            raise UserError("on_nan='rollback' goes back to checkpoints; give the Guard a folder for them")
        if latest(guard.folder / "checkpoints") is None:
            _save(trainer, guard, int(trainer.state.step))


def _save(trainer: "Trainer", guard: Guard, step: int) -> Path | None:
    """Saves the run where it has a folder."""
    if guard.folder is None:
        return None
    guard.progress.at("checkpoint")
    saved = trainer.save(guard.folder / "checkpoints")
    guard.say("checkpoint", step, f"saved {saved}", path=str(saved))
    return saved


def _roll_back(trainer: "Trainer", guard: Guard, step: int) -> None:
    """Puts the run where it was at its last checkpoint, but for the data, which goes on behind `step`."""
    assert guard.folder is not None  # else there was nothing to go back to
    guard.progress.at("checkpoint")
    saved = trainer.restore(guard.folder / "checkpoints")
    number = place.scalar(np.int32(step), trainer.state.step.sharding)
    trainer.state = dataclasses.replace(trainer.state, step=number)
    guard.rolled_back(step, saved)
