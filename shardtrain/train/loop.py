"""The training loop."""

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shardtrain.train.checkpoint import Checkpoints
from shardtrain.train.metrics import Observer, Row
from shardtrain.train.place import rows_of

if TYPE_CHECKING:
    from shardtrain.train.trainer import Trainer

log = logging.getLogger(__name__)


def run(
    trainer: "Trainer",
    batches: Iterable[tuple[Any, Any]],
    steps: int,
    observers: Sequence[Observer],
    checkpoints: Checkpoints | None = None,
) -> list[Row]:
    """Trains until `trainer.state.step` is `steps` or the batches end.

    The order matters: the metrics of a step are read only when the next one is under way, so that the
    devices never wait for the host, but for those of a step that is saved: its arrays are waited for anyway.
    """
    rows: list[Row] = []
    done = int(trainer.state.step)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    clock = time.perf_counter()

    def read(step: int, sums: dict[str, jax.Array]) -> None:
        nonlocal clock
        values = {key: float(np.asarray(value)) for key, value in jax.device_get(sums).items()}
        now = time.perf_counter()
        examples = values.pop("examples")
        row = {key: value / max(examples, 1) for key, value in values.items()}
        row |= {"images_per_second": examples / (now - clock), "seconds": now - clock}
        clock = now
        rows.append(row)
        for observe in observers:
            observe(step, row)

    def save() -> None:
        nonlocal pending
        if pending is not None:
            read(*pending)
            pending = None
        if checkpoints is not None:
            trainer.save(checkpoints, rows[-1] if rows else None)

    for inputs, targets in itertools.islice(batches, steps - done):
        batch = trainer.place(inputs, targets)
        step = trainer.compiled_step(batch)
        if not rows and pending is None:
            clock = time.perf_counter()  # compiling is no step
        trainer.state, sums = step(trainer.state, batch)
        trainer.examples += rows_of(inputs) if jax.process_count() == 1 else batch.rows
        done += 1
        if pending is not None:
            read(*pending)
        pending = (done, sums)
        if checkpoints is not None and checkpoints.due(done):
            save()
    save()
    if done < steps:
        log.warning("the batches ended after step %d of %d", done, steps)
    return rows
