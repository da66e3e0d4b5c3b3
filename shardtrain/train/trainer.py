"""The trainer: a model, an optimizer and a mesh as one compiled program."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from rich.table import Table

from shardtrain import pipeline
from shardtrain.checkpoint.checkpoints import Checkpoints
from shardtrain.errors import UserError
from shardtrain.guard.guard import Guard
from shardtrain.guard.health import NO_LOSSES, Row
from shardtrain.layout import Axes, Layout, axes_of
from shardtrain.mesh import PIPE, REPLICA, make_mesh, size, text, without
from shardtrain.nn import partition
from shardtrain.nn.base import Partitioned, name
from shardtrain.nn.norm import BatchNorm
from shardtrain.nn.variables import Variables
from shardtrain.train import check, loop, losses
from shardtrain.train.batch import (
    Batch,
    batch_shapes,
    fetch,
    global_batch_size,
    indivisible,
    local_rows,
    place_batch,
    rows_of,
    with_limit,
)
from shardtrain.train.check import refuse_uncut
from shardtrain.train.pipelined.plan import PipelinePlan
from shardtrain.train.pipelined.step import Pipelined
from shardtrain.train.report import Observer, Terminal
from shardtrain.train.state import (
    TrainState,
    by_field,
    bytes_on_a_device,
    initial_state,
    is_shapes,
    one_replica,
    opt_state_specs,
    shardings,
)
from shardtrain.train.step import PerExample, Program, Remat, compiled


class Trainer:
    """Trains one Flax NNX model on one mesh, with the numbers of one device.

    The whole step (forward, backward, update) is one jitted program. State and batches are global arrays,
    placed by the layers' layouts.

    Args:
        model: any `nnx.Module` that maps inputs to outputs. Plain `nnx` layers train data parallel and with
            sharded parameters; for cut pixels and channels use the layers of `shardtrain.nn`. One of shapes
            alone, from `nnx.eval_shape`, compiles for any mesh and does not train.
        optimizer: any optax transformation.
        mesh: from `make_mesh`; all devices data parallel by default.
        loss: `(outputs, targets) -> one value per example`; the mean over real examples is taken here.
        metrics: more such functions by name; accuracy by default where the loss is `cross_entropy`.
        layout: patterns on layer paths to layouts that differ from the default, see `Layout`; `""` is the
            model's input.
        parameters: mesh axes over which parameters and optimizer state are spread.
        accumulate: microbatches per update, which pass through the stages on a mesh with `pipe`; equal to the
            big batch, but batch norm normalizes by the statistics of a microbatch.
        schedule: with `pipe`: one of `pipeline.NAMES` (1f1b by default), a `.csv` file, or a `Schedule`.
        stages: which layers make up each stage, see `pipeline.split`; of equal cost by default.
        in_flight: activations, of a microbatch in a stage, that a rank may hold; the schedule's by default.
        overlap: what a stage sends travels while the next tick computes, and is used a tick later.
        statistics: running statistics of batch norms move by each `"microbatch"` as scheduled, or `"batch"`.
        dtype: compute in it (`"bfloat16"`), with parameters and optimizer in the model's own dtype.
        remat: what the backward pass keeps of the forward pass: `None` all, `"contractions"` the outputs of
            convolutions and linear maps, `"nothing"`, or a policy of `jax.checkpoint_policies`; with `pipe`
            all, `"nothing"` but the stages' inputs, or the numbers of the stages that keep only these.
        clip_norm: clip gradients to this global norm.
        skip_bad: leave out updates whose loss or gradient is not finite, or whose loss is above a limit.

    Raises:
        UserError: whatever this model cannot do on this mesh, at construction; operators that XLA cannot
            be trusted with, when the first batch is seen.

    Example:
        >>> mesh = make_mesh("data=2,height=2,channel=2")
        >>> trainer = Trainer(models.ResNet(8, 10, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1), mesh=mesh)
        >>> history = trainer.fit(batches, steps=100)
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh | None = None,
        loss: PerExample = losses.cross_entropy,
        metrics: Mapping[str, PerExample] | None = None,
        layout: partition.LayoutTable | None = None,
        parameters: str | Axes = (),
        accumulate: int = 1,
        schedule: str | Path | pipeline.Schedule | None = None,
        stages: str | None = None,
        in_flight: int | None = None,
        overlap: bool = False,
        statistics: str = "microbatch",
        dtype: DTypeLike | None = None,
        remat: Remat = None,
        clip_norm: float | None = None,
        skip_bad: bool = False,
    ) -> None:
        check.refuse_arguments(remat, accumulate, clip_norm, dtype, statistics)
        self.mesh = make_mesh(data=-1) if mesh is None else mesh
        within = without(without(self.mesh, PIPE), REPLICA)
        self.layout = partition.assign(model, within, Layout(parameters=parameters), layout or {})
        check.refuse_replicas_alone(self.mesh)
        # Each replica has examples of its own.
        several = (REPLICA,) if REPLICA in self.mesh.shape else ()
        self._rows = dataclasses.replace(self.layout, batch=(*several, *axes_of(self.layout.batch)))
        if metrics is None:
            metrics = {"accuracy": losses.accuracy} if loss is losses.cross_entropy else {}
        if clip_norm is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
        self.accumulate = accumulate
        variables = self._variables = Variables(model)
        momenta = {name(path): m.momentum for path, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)}
        deferred = momenta if statistics == "batch" else None
        self._program = Program(
            variables, optimizer, loss, metrics, accumulate, dtype, remat, self.layout, deferred, skip_bad
        )
        self._plan = PipelinePlan.of(self.mesh, accumulate, schedule, stages, in_flight, remat, overlap)
        self.pipeline: Pipelined | None = None
        check.refuse_model(model, accumulate, statistics)
        self._plain_norms = check.plain(model, nnx.BatchNorm)
        self._batch_only = not any(isinstance(m, Partitioned) for _, m in nnx.iter_modules(model))
        self._batch_size: int | None = None
        self._steps: dict[Any, Any] = {}
        self._specs = self._state_specs(model, optimizer)
        self.state = initial_state(
            self._variables, optimizer, self.mesh, self._specs, staged=self._plan is not None
        )
        self.examples = 0
        self.recent = NO_LOSSES
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state)

    def _state_specs(self, model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
        params, _ = self._variables.values()
        param_specs, state_specs = self._variables.specs(model, self.mesh, self.layout)
        return TrainState(P(), param_specs, state_specs, opt_state_specs(optimizer, params, param_specs))  # type: ignore[arg-type]

    @property
    def model(self) -> nnx.Module:
        """The model with the weights of now, in evaluation mode; of several replicas the first."""
        return self.replica(0)

    def replica(self, number: int) -> nnx.Module:
        """One of the models that a mesh with `replica` trains, in evaluation mode; elsewhere there is just 0.

        Raises:
            UserError: a number that there is not.
        """
        copies = size(self.mesh, REPLICA)
        if not 0 <= number < copies:
            raise UserError(f"replica {number}: there are {copies}, from 0")
        named = self._named()
        values = named.params, named.model_state
        if REPLICA in self.mesh.shape:
            values = one_replica(values, (self._shapes.params, self._shapes.model_state), number)
        if self.pipeline is not None:  # each stage's arrays are elsewhere, and a call needs them together
            values = jax.device_put(values, self.mesh.devices.flat[0])
        elif self._plan is not None:  # on the host until then
            values = jax.tree.map(jnp.asarray, values)
        return self._variables.model(*values, train=False)

    def _named(self) -> TrainState:
        """The state as ordinary named arrays."""
        return self._arrays() if self.pipeline is None else self.pipeline.named(self._arrays())

    def _arrays(self) -> TrainState:
        if is_shapes(self.state):
            raise UserError(
                "the model is one of shapes (nnx.eval_shape), which compiles but has no numbers to train or "
                "save; build it with arrays"
            )
        return self.state

    def rows(self, batch_size: int) -> range:
        """The rows of a global batch that this process must bring (all of them in a job of one process)."""
        return local_rows(self.mesh, self._rows, batch_size)

    def place(self, inputs: Any, targets: Any, limit: float = np.inf) -> Batch:
        """A host batch on the mesh; the first says how large others may be. For `limit` see `skip_bad`.

        Raises:
            UserError: a first batch that does not divide by the mesh and `accumulate`.
        """
        rows = rows_of(inputs)
        if not rows:
            raise UserError("fit: a batch has no rows; leave empty batches out")
        if self._batch_size is None:
            size = global_batch_size(rows, self.mesh, self._rows)
            mine = len(self.rows(size))
            if mine != rows or (size // self._shards()) % self.accumulate:
                raise indivisible(rows, rows * size / mine, self.mesh, self._shards(), self.accumulate)
            self._batch_size = size
        batch = self._placed(inputs, targets, self._batch_size)
        if rows < len(self.rows(self._batch_size)):
            check.refuse_ragged(rows, self._plain_norms)
        return with_limit(batch, limit, self.mesh) if self._program.skip_bad else batch

    def shapes_of(self, inputs: Any, targets: Any) -> Batch:
        """What a global batch is on the mesh, as shapes; `compiled_step` takes it in place of a batch.

        Args:
            inputs, targets: trees of `jax.ShapeDtypeStruct`, or arrays, whose values are not read.

        Raises:
            UserError: a batch that does not divide by the mesh and `accumulate`.
        """
        rows = rows_of(inputs)
        if rows % (self._shards() * self.accumulate):
            raise indivisible(rows, rows, self.mesh, self._shards(), self.accumulate)
        batch = batch_shapes(inputs, targets, self.mesh, self._rows, batch_only=self._batch_only)
        return with_limit(batch, None, self.mesh) if self._program.skip_bad else batch

    def _shards(self) -> int:
        return size(self.mesh, self._rows.cut("batch", self.mesh))

    def _placed(self, inputs: Any, targets: Any, batch_size: int) -> Batch:
        return place_batch(inputs, targets, batch_size, self.mesh, self._rows, batch_only=self._batch_only)

    def compiled_step(self, batch: Batch) -> Any:
        """The compiled training step for batches as `place` or `shapes_of` gives; `census` reads it."""
        if self._plan is not None and self.pipeline is None:
            self.pipeline = Pipelined(self._program, self._shapes, self._specs, self.mesh, batch, self._plan)
            self._specs = self.pipeline.state_specs
            self.state = self.pipeline.packed(self.state)
        return self._compiled("train", batch)

    def _compiled(self, kind: str, batch: Batch) -> Any:
        leaves, tree = jax.tree.flatten(batch)
        key = (kind, tree, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._steps:
            train = kind == "train"
            if self.pipeline is not None:
                function = self.pipeline.train_step(batch) if train else self.pipeline.eval_step(batch)
            else:
                function = self._program.train_step if train else self._program.eval_step
            out = shardings(self.mesh, self._specs) if train else None
            staged = self.pipeline is not None
            self._steps[key] = compiled(function, self.state, batch, self.mesh, out, staged=staged)
        return self._steps[key]

    def compiled_text(self) -> str:
        """The compiled training step as HLO text, which `census` reads.

        Raises:
            UserError: before the first step, when there is no program yet.
        """
        programs = [program for (kind, *_), program in self._steps.items() if kind == "train"]
        if not programs:
            raise UserError(
                "there is no compiled step yet; call fit first, or compiled_step(trainer.place(...))"
            )
        return programs[-1].as_text()

    def fit(
        self,
        batches: Iterable[tuple[Any, Any]],
        *,
        steps: int,
        observers: Sequence[Observer] = (),
        checkpoints: Checkpoints | None = None,
        progress: bool = True,
        guard: Guard | None = None,
    ) -> list[Row]:
        """Trains until `steps` updates are done in all.

        Args:
            batches: `(inputs, targets)` of host arrays, this process's `rows`; the last may be ragged.
            steps: updates in all, those before a restore included.
            observers: called after every step with its number and metrics.
            checkpoints: saved to as they are due, while steps go on, and at the end.
            progress: show a progress bar.
            guard: watches over the run, see `Guard`.

        Returns:
            A row for every step: mean loss and metrics over real examples, `grad_norm`, `images_per_second`,
            `seconds`, and those in which the host waited for data, devices and checkpoints.

        Raises:
            UserError: batches that do not divide by the mesh, see the class; a bad step, see `Guard`.
            Preempted: the guard was told to stop.

        Example:
            >>> losses = [row["loss"] for row in trainer.fit(batches, steps=20, progress=False)]
        """
        done = int(self._arrays().step)
        if not progress or jax.process_index():
            return loop.run(self, batches, steps, observers, checkpoints, guard)
        with Terminal(steps, done) as terminal:
            return loop.run(self, batches, steps, (terminal, *observers), checkpoints, guard)

    def evaluate(self, batches: Iterable[tuple[Any, Any]]) -> dict[str, float]:
        """Means of the loss and the metrics over all real examples, in evaluation mode.

        The model must treat each row by itself: ragged batches are filled up, and with `pipe` a batch is
        evaluated in microbatches.

        Raises:
            UserError: no batches at all.

        Example:
            >>> trainer.evaluate([(images, labels)])["accuracy"]
        """
        totals: dict[str, Array] = {}
        size: int | None = None
        for inputs, targets in batches:
            size = size or global_batch_size(rows_of(inputs), self.mesh, self._rows)
            _, sums = self._evaluated(self._placed(inputs, targets, size))
            totals = sums if not totals else jax.tree.map(jnp.add, totals, sums)
        values = {key: float(value) for key, value in jax.device_get(totals).items()}
        examples = values.pop("examples", 0.0)
        if not examples:
            raise UserError("evaluate: there are no examples with targets in the batches")
        return {key: value / examples for key, value in values.items()}

    def predict(self, inputs: Any) -> Any:
        """The model's outputs for a host batch of any size, in evaluation mode, as numpy arrays.

        The model must treat each row by itself, see `evaluate`. In a job of several processes each brings
        equally many rows and gets the outputs of its own.

        Example:
            >>> trainer.predict(images).argmax(-1)
        """
        rows = rows_of(inputs)
        size = global_batch_size(rows, self.mesh, self._rows)
        outputs, _ = self._evaluated(self._placed(inputs, None, size))
        return fetch(outputs, rows, size, self.mesh, self._rows)

    def _evaluated(self, batch: Batch) -> tuple[Any, dict[str, Array]]:
        refuse_uncut(self._plan, self.pipeline)
        kind = "evaluate" if batch.targets is not None else "predict"
        return self._compiled(kind, batch)(self._arrays(), batch)

    def save(self, folder: str | Path | Checkpoints, metrics: Mapping[str, float] | None = None) -> Path:
        """Saves the whole run under `folder/<step>`, by parameter name: any mesh can take it up again.

        Args:
            folder: the checkpoint is there when this returns; with `Checkpoints` it is written meanwhile.
            metrics: of this step.

        Raises:
            UserError: a folder that cannot be written.
        """
        if not isinstance(folder, Checkpoints):
            with Checkpoints(folder) as checkpoints:
                return self.save(checkpoints, metrics)
        arrays = self._arrays()
        named = arrays if self.pipeline is None else self.pipeline.spread_out(arrays)
        about = {"mesh": text(self.mesh), "examples": self.examples}
        tree = by_field(named) | {"examples": np.int64(self.examples), "recent": self.recent}
        return folder.save(int(named.step), tree, metrics, about)

    def restore(self, folder: str | Path | Checkpoints, step: int | None = None) -> int:
        """Takes up the newest whole checkpoint in `folder`, whatever mesh wrote it.

        Args:
            folder: what `save` or `fit` was given.
            step: that one and no other.

        Returns:
            The number of updates it had done; batches go on from the example `trainer.examples`.

        Raises:
            UserError: no checkpoint there, none that is whole, or one of another model.
        """
        checkpoints = folder if isinstance(folder, Checkpoints) else Checkpoints(folder)
        several = (size(self.mesh, REPLICA),) if REPLICA in self.mesh.shape else ()
        like = self._arrays() if self.pipeline is None else self.pipeline.spread_shapes
        about = {"examples": np.int64(0), "recent": NO_LOSSES}
        _, tree = checkpoints.restore(by_field(like) | about, several, step)
        self.examples, self.recent = int(tree.pop("examples")), tree.pop("recent")
        named = TrainState(**tree)
        self.state = named if self.pipeline is None else self.pipeline.gathered(named)
        return int(self.state.step)

    @property
    def parameter_bytes(self) -> int:
        """Bytes that parameters take on the device that has most of them.

        Raises:
            UserError: on a mesh with `pipe`, before the first batch says which device has what.
        """
        refuse_uncut(self._plan, self.pipeline)
        return bytes_on_a_device(self.state.params)

    def partition_table(self) -> Table:
        """What lies where: a table of the parameters, their cuts and their bytes on each device."""
        return partition.partition_table(self.model, self.mesh, self.layout)
