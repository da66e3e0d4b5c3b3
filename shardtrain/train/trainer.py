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
from jax.typing import DTypeLike
from rich.table import Table

from shardtrain.checkpoint.checkpoints import Checkpoints
from shardtrain.checkpoint.storage import Copies
from shardtrain.errors import UserError
from shardtrain.guard.guard import Guard
from shardtrain.guard.health import Row
from shardtrain.interrupts import resent, uninterrupted
from shardtrain.layout import Axes, Layout, axes_of
from shardtrain.mesh import PIPE, REPLICA, make_mesh, size, text, without
from shardtrain.metrics import Metric, PerExample, accumulate, as_metric
from shardtrain.nn import partition
from shardtrain.nn.base import Partitioned, name
from shardtrain.nn.norm import BatchNorm
from shardtrain.nn.variables import Variables
from shardtrain.train import check, losses
from shardtrain.train.batch import (
    Batch,
    InputDimensions,
    batch_shapes,
    fetch,
    global_batch_size,
    indivisible,
    local_rows,
    place_batch,
    rows_of,
    scalar,
    with_limit,
)
from shardtrain.train.callbacks.base import refuse_callbacks
from shardtrain.train.callbacks.terminal import Terminal
from shardtrain.train.extra import POSITION, copies, on_devices, refuse_extra, with_copies, with_position
from shardtrain.train.initial import initial_state, state_specs
from shardtrain.train.loop import Loop
from shardtrain.train.objective import Measured, Objective, refuse_classes, refuse_names
from shardtrain.train.optimizer import Optimizer
from shardtrain.train.pipelined.plan import Pipeline, PipelinePlan
from shardtrain.train.pipelined.step import Pipelined
from shardtrain.train.state import TrainState, by_field, bytes_on_a_device, is_shapes, one_replica, shardings
from shardtrain.train.step import Mode, Program, Remat, compiled


class Trainer:
    """Trains one Flax NNX model on one mesh, with the numbers of one device.

    The whole step (forward, backward, update) is one jitted program. State and batches are global arrays,
    sharded by the layers' layouts.

    Args:
        model: any `nnx.Module` that maps inputs to outputs. Plain `nnx` layers train data parallel and with
            sharded parameters; to shard pixels and channels use the layers of `shardtrain.nn`. A model of
            shapes alone, from `nnx.eval_shape`, compiles for any mesh and does not train.
        optimizer: any optax transformation but line searches, which evaluate the loss at points of their own.
            The loss is passed on to those that take `value`.
        mesh: from `make_mesh`, or its text; all devices data parallel by default.
        loss: `(outputs, targets) -> one value per example`, `losses.cross_entropy` by default. The mean over
            the real examples is taken by the trainer.
        objective: in place of `loss`, a function `(model, (inputs, targets), context) -> (loss, metrics)`
            that calls the model itself. The loss is one value per example; metrics are a dictionary of
            values per example, or of sums of the metrics named in `metrics`. It is called in training and in
            evaluation (`context.train`), see `shardtrain.train.objective.Context`.
        metrics: by name, metrics from `shardtrain.metrics` or functions as `loss` is one; the accuracy by
            default where the loss is `cross_entropy`.
        dimensions: what the dimensions of the inputs are, such as `"batch time features"`, or a tree of such
            strings for several inputs; see `shardtrain.layout.Dimensions`. By default inputs of 3 to 5
            dimensions are images, `(batch, *spatial, channels)`, and of others only the batch is cut.
        unit: what an example is called in the rows, as in `images_per_second`.
        layout: patterns on layer paths to layouts that differ from the default, see `Layout`; `""` is the
            model's input.
        parameters: mesh axes over which parameters and optimizer state are sharded (ZeRO-3).
        accumulate: microbatches per update, which pass through the stages on a mesh with `pipe`. The update
            is that of the whole batch, except that batch norm normalizes by the statistics of a microbatch.
        pipeline: how the stages of a mesh with `pipe` run, see `Pipeline`.
        statistics: running statistics of batch norms move with each `"microbatch"` as scheduled, or once with
            those of the whole `"batch"`.
        dtype: computes in this dtype (`"bfloat16"`); parameters and optimizer keep the model's own.
        remat: what the backward pass keeps of the forward pass: `None` everything, `"contractions"` the
            outputs of convolutions and linear maps, `"nothing"`, or a policy of `jax.checkpoint_policies`.
            With `pipe` everything, `"nothing"` except the stages' inputs, or the numbers of the stages that
            do so.
        clip_norm: clips gradients to this global norm.
        skip_bad: leaves out updates whose loss or gradient is not finite, or whose loss is above a limit.
        extra: more trees of the run's state by name, such as `{"ema": st.EMA(0.999)}`, see `Extra`.

    Attributes:
        state: the whole state of the run, see `TrainState`.
        pipeline: on a mesh with `pipe`, once `prepare` or `fit` has seen a batch, the model as it was cut.

    Raises:
        UserError: whatever this model cannot do on this mesh, at construction; operators that XLA cannot
            be trusted with, when the first batch is seen.

    Example:
        >>> mesh = st.make_mesh("data=2,height=2,channel=2")
        >>> model = st.models.ResNet(8, classes=10, channels=1, rngs=nnx.Rngs(0))
        >>> trainer = st.Trainer(model, optax.sgd(0.1), mesh=mesh)
        >>> digits = st.data.load("digits")
        >>> rows = trainer.fit(st.data.train_batches(digits.train, 64, seed=0), steps=2, progress=False)
        >>> len(rows)
        2
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh | str | None = None,
        loss: PerExample | None = None,
        objective: Objective | None = None,
        metrics: Mapping[str, Metric | PerExample] | None = None,
        dimensions: Any = None,
        unit: str = "images",
        layout: partition.LayoutTable | None = None,
        parameters: str | Axes = (),
        accumulate: int = 1,
        pipeline: Pipeline | None = None,
        statistics: str = "microbatch",
        dtype: DTypeLike | None = None,
        remat: Remat = None,
        clip_norm: float | None = None,
        skip_bad: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        check.refuse_arguments(remat, accumulate, clip_norm, dtype, statistics)
        check.refuse_two_objectives(loss, objective)
        check.refuse_no_model(model)
        self.mesh = mesh if isinstance(mesh, Mesh) else make_mesh("data=-1" if mesh is None else mesh)
        within = without(without(self.mesh, PIPE), REPLICA)
        self.layout = partition.assign(model, within, Layout(parameters=parameters), layout or {})
        check.refuse_replicas_alone(self.mesh)
        # Each replica has examples of its own.
        several = (REPLICA,) if REPLICA in self.mesh.shape else ()
        self._rows = dataclasses.replace(self.layout, batch=(*several, *axes_of(self.layout.batch)))
        self.unit, self.accumulate, self.skips_bad = unit, accumulate, skip_bad
        named = _metrics(loss, objective, metrics)
        refuse_names(named, unit)
        self._metrics = list(named)
        self._variables, self._extra = Variables(model), dict(extra or {})
        check.refuse_model(model, accumulate, statistics)
        params, _ = self._variables.values()
        refuse_extra(self._extra, params, self.mesh)
        own = Optimizer.of(optimizer, params, clip_norm)
        self._program = Program(
            variables=self._variables,
            optimizer=own,
            objective=objective or Measured(loss or losses.cross_entropy, named),
            metrics={name: metric for name, metric in named.items() if isinstance(metric, Metric)},
            accumulate=accumulate,
            dtype=dtype,
            remat=remat,
            layout=self.layout,
            deferred=_momenta(model) if statistics == "batch" else None,
            skip_bad=skip_bad,
            unit=unit,
            extra=self._extra,
        )
        self._plan = PipelinePlan.of(self.mesh, accumulate, pipeline, remat)
        self.pipeline: Pipelined | None = None
        self._plain_norms = check.plain(model, nnx.BatchNorm)
        partitioned = any(isinstance(m, Partitioned) for _, m in nnx.iter_modules(model))
        self._any_pixels = partition.has_any_pixels(m for _, m in nnx.iter_modules(model))
        self._dimensions = InputDimensions.parse(dimensions, pixels=partitioned)
        self._batch_size: int | None = None
        self._sample: Any = None
        self._steps: dict[Any, Any] = {}
        self._specs = state_specs(model, self._variables, own, self._extra, self.mesh, self.layout)
        self.state = initial_state(
            self._variables, own, self._extra, self.mesh, self._specs, staged=self._plan is not None
        )
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), on_devices(self.state))

    # The state.

    @property
    def examples(self) -> int:
        """Real examples that the run has trained on; with the seed it is the position in the data."""
        return int(self.state.extra[POSITION]["examples"])

    @examples.setter
    def examples(self, count: int) -> None:
        self._move_position(examples=np.int64(count))

    @property
    def recent(self) -> Any:
        """The losses that a spike is measured by, oldest first, then NaNs."""
        return self.state.extra[POSITION]["recent"]

    @recent.setter
    def recent(self, losses: Any) -> None:
        self._move_position(recent=losses)

    def _move_position(self, **changes: Any) -> None:
        extra = self.state.extra
        self.state = self.state.replace(extra={**extra, POSITION: {**extra[POSITION], **changes}})

    def _with_position(self, state: TrainState) -> TrainState:
        """A state from the devices with the position of now beside it."""
        return with_position(state, self.state.extra[POSITION])

    def _named(self) -> TrainState:
        """The state on devices as ordinary named arrays."""
        return self._arrays() if self.pipeline is None else self.pipeline.packing.unpack(self._arrays())

    def _arrays(self) -> TrainState:
        if is_shapes(self.state):
            raise UserError(
                "the model is one of shapes (nnx.eval_shape), which compiles but has no numbers to train or "
                "save; build it with arrays"
            )
        return on_devices(self.state)

    # Models.

    @property
    def model(self) -> nnx.Module:
        """The model with the weights of now, in evaluation mode; of several replicas the first."""
        return self.replica(0)

    def replica(self, number: int) -> nnx.Module:
        """One of the models that a mesh with `replica` trains, in evaluation mode; elsewhere there is just 0.

        Raises:
            UserError: a number that there is not.
        """
        named = self._named()
        return self._model_of(named.params, named.model_state, number)

    def extra_model(self, name: str) -> nnx.Module:
        """The model with the weights of an extra tree such as `"ema"`, in evaluation mode.

        Raises:
            UserError: an extra tree that there is not, or that is not placed as the parameters are.
        """
        mine = [key for key, one in self._extra.items() if one.placement == "parameters"]
        if name not in mine:
            raise UserError(
                f"extra_model({name!r}): there are {', '.join(mine) or 'none'}; give Trainer extra="
            )
        named = self._named()
        return self._model_of(named.extra[name], named.model_state, 0)

    def _model_of(self, params: Any, model_state: Any, number: int) -> nnx.Module:
        count = size(self.mesh, REPLICA)
        if not 0 <= number < count:
            raise UserError(f"replica {number}: there are {count}, from 0")
        values = params, model_state
        if REPLICA in self.mesh.shape:
            values = one_replica(values, (self._shapes.params, self._shapes.model_state), number)
        if self.pipeline is not None:  # each stage's arrays are elsewhere, and a call needs them together
            values = jax.device_put(values, self.mesh.devices.flat[0])
        elif self._plan is not None:  # on the host until then
            values = jax.tree.map(jnp.asarray, values)
        return self._variables.model(*values, train=False)

    # Batches and programs.

    def rows(self, batch_size: int) -> range:
        """The rows of a global batch that this process must bring (all of them in a job of one process)."""
        return local_rows(self.mesh, self._rows, batch_size)

    def place(self, inputs: Any, targets: Any, limit: float = np.inf) -> Batch:
        """A host batch on the mesh, filled up to the size that `prepare` was given, or else its own.

        Args:
            inputs, targets: this process's rows.
            limit: of the loss, see `skip_bad`.

        Raises:
            UserError: a batch larger than the prepared one, or, before `prepare`, one that does not divide by
                the mesh and `accumulate`.
        """
        rows = rows_of(inputs)
        check.refuse_empty(rows)
        refuse_classes(self._program.objective, targets)
        whole = self._batch_size or self._divisible(rows)
        batch = self._placed(inputs, targets, whole)
        if rows < len(self.rows(whole)):
            check.refuse_ragged(rows, self._plain_norms)
        return with_limit(batch, limit, self.mesh) if self.skips_bad else batch

    def _divisible(self, rows: int) -> int:
        """The size of the global batch of which this process brings `rows`, which must divide."""
        check.refuse_empty(rows)
        whole = global_batch_size(rows, self.mesh, self._rows)
        mine = len(self.rows(whole))
        if mine != rows or (whole // self._shards()) % self.accumulate:
            raise indivisible(rows, rows * whole / mine, self.mesh, self._shards(), self.accumulate)
        return whole

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
        batch = batch_shapes(inputs, targets, self.mesh, self._rows, self._dimensions)
        return with_limit(batch, None, self.mesh) if self.skips_bad else batch

    def _shards(self) -> int:
        return size(self.mesh, self._rows.cut("batch", self.mesh))

    def _placed(self, inputs: Any, targets: Any, batch_size: int) -> Batch:
        if rows_of(inputs):
            self._sample = jax.tree.map(lambda x: np.array(np.asarray(x)[:1]), (inputs, targets))
        where = self.mesh, self._rows, self._dimensions
        return place_batch(inputs, targets, batch_size, *where, self._sample)

    def prepare(self, inputs: Any, targets: Any) -> Any:
        """Compiles the training step for batches of this size, before any step is made.

        Smaller batches are filled up to this size from now on. On a mesh with `pipe` the model is cut into
        stages here, and every stage's arrays move to its devices. `fit` prepares by its first batch; to train
        on batches of another size, prepare again.

        Args:
            inputs, targets: this process's rows of a batch; or `jax.ShapeDtypeStruct`s of a global batch, for
                a model of shapes too.

        Returns:
            The compiled step, whose memory and collectives can be read.

        Raises:
            UserError: a batch that does not divide by the mesh and `accumulate`, a model that cannot be cut
                into stages, operators that XLA cannot be trusted with.

        Example:
            >>> model = nnx.eval_shape(lambda: st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0)))
            >>> trainer = st.Trainer(model, optax.sgd(0.1), mesh=st.make_mesh("data=8"))
            >>> images = jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.float32)
            >>> program = trainer.prepare(images, jax.ShapeDtypeStruct((64,), jnp.int32))
            >>> program.memory_analysis().temp_size_in_bytes > 0
            True
        """
        if is_shapes((inputs, targets)):
            batch, whole = self.shapes_of(inputs, targets), rows_of(inputs)
        else:
            whole = self._divisible(rows_of(inputs))
            batch = self._placed(inputs, targets, whole)
            batch = with_limit(batch, np.inf, self.mesh) if self.skips_bad else batch
        if self._any_pixels:
            check.refuse_idle(batch.inputs, self.mesh)
        if self._plan is not None and self.pipeline is None:
            self._cut(batch)
        program = self.compiled_step(batch)
        self._batch_size = whole
        return program

    def _cut(self, batch: Batch) -> None:
        """Cuts the model into stages, and packs the state on the devices of each."""
        assert self._plan is not None
        cut = Pipelined(self._program, self._shapes, self._specs, self.mesh, batch, self._plan)
        packed = self._with_position(cut.packing.pack(on_devices(self.state)))
        with uninterrupted():
            self.pipeline, self._specs, self.state = cut, cut.packing.specs, packed

    def ready(self, inputs: Any, targets: Any) -> None:
        """Prepares by a batch where nothing was prepared before."""
        if self._batch_size is None:
            self.prepare(inputs, targets)

    def compiled_step(self, batch: Batch) -> Any:
        """The compiled training step for batches as `place` and `shapes_of` return them.

        Raises:
            UserError: on a mesh with `pipe`, before `prepare` or `fit` has seen a batch.
        """
        check.refuse_uncut(self._plan, self.pipeline)
        return self._compiled("train", batch)

    def _compiled(self, kind: Mode, batch: Batch) -> Any:
        leaves, tree = jax.tree.flatten(batch)
        key = (kind, tree, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._steps:
            function = (self._program if self.pipeline is None else self.pipeline).step(kind, batch)
            out = shardings(self.mesh, self._specs) if kind == "train" else None
            staged, state = self.pipeline is not None, on_devices(self.state)
            self._steps[key] = compiled(function, state, batch, self.mesh, out, staged=staged)
        return self._steps[key]

    def compiled_text(self) -> str:
        """The compiled training step as HLO text, which `census` reads.

        Raises:
            UserError: before the first step, when there is no program yet.
        """
        return self._newest_step().as_text()

    def _newest_step(self) -> Any:
        programs = [program for (kind, *_), program in self._steps.items() if kind == "train"]
        if not programs:
            raise UserError("there is no compiled step yet; call fit or prepare(inputs, targets) first")
        return programs[-1]

    # Training and evaluation.

    def fit(
        self,
        batches: Iterable[tuple[Any, Any]],
        *,
        steps: int,
        callbacks: Sequence[Any] = (),
        checkpoints: Checkpoints | None = None,
        progress: bool = True,
        guard: Guard | None = None,
    ) -> list[Row]:
        """Trains until `steps` updates are done in all.

        Args:
            batches: `(inputs, targets)` of host arrays, this process's `rows`; the last may be ragged.
            steps: updates in all, those before a restore included.
            callbacks: what the run does besides its steps, see `shardtrain.callbacks`.
            checkpoints: saved to as they are due, while steps go on, and at the end.
            progress: show a progress bar.
            guard: watches over the run, see `Guard`.

        Returns:
            A row for every step: mean loss and metrics over the real examples, `grad_norm`,
            `images_per_second` (or the trainer's unit), `seconds`, those in which the host waited for data,
            devices and checkpoints, and what callbacks add.

        Raises:
            UserError: batches that do not divide by the mesh, see the class; a bad step, see `Guard`.
            Preempted: the guard was told to stop.

        Example:
            >>> trainer = st.Trainer(st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0)), optax.adam(0.01))
            >>> digits = st.data.load("digits")
            >>> rows = trainer.fit(st.data.train_batches(digits.train, 64, seed=0), steps=3, progress=False)
            >>> [round(row["loss"]) for row in rows]
            [2, 2, 2]
        """
        with resent():
            check.refuse_steps(steps, int(self._arrays().step))
            refuse_callbacks(callbacks)
            shown = [Terminal()] if progress and jax.process_index() == 0 else []
            return Loop(self, batches, steps, [*shown, *callbacks], checkpoints, guard).run()

    def advance(self, batch: Batch) -> dict[str, Any]:
        """Makes one update with a placed batch, all of whose rows count as examples.

        Returns:
            Its sums, which may still be in computation.
        """
        program, position = self.compiled_step(batch), self.state.extra[POSITION]
        position = {**position, "examples": position["examples"] + batch.rows}
        with uninterrupted():  # the program takes the memory of the state
            state, sums = program(on_devices(self.state), batch)
            self.state = with_position(state, position)
        return sums

    def row(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Means over examples and finished metrics, from the sums of `advance` on the host."""
        return self._program.row(sums)

    def evaluate(self, batches: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
        """Means of the loss and the metrics over all real examples, in evaluation mode.

        The model must treat each row by itself: ragged batches are filled up, and with `pipe` a batch is
        evaluated in microbatches.

        Raises:
            UserError: no batches at all.

        Example:
            >>> trainer = st.Trainer(st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0)), optax.adam(0.01))
            >>> digits = st.data.load("digits")
            >>> sorted(trainer.evaluate(st.data.eval_batches(digits.test, 120)))
            ['accuracy', 'loss']
        """
        totals: Any = None
        whole: int | None = None
        for item in batches:
            check.refuse_item(item)
            inputs, targets = item
            whole = whole or global_batch_size(rows_of(inputs), self.mesh, self._rows)
            _, sums = self._evaluated("evaluate", self._placed(inputs, targets, whole))
            refuse_classes(self._program.objective, targets)
            totals = accumulate(totals, sums)
        if totals is None or not totals["examples"]:
            raise UserError("evaluate: there are no examples in the batches")
        return self._program.row(totals)

    def predict(self, inputs: Any) -> Any:
        """The model's outputs for a host batch of any size, in evaluation mode, as numpy arrays.

        The model must treat each row by itself, see `evaluate`. In a job of several processes each brings
        equally many rows and gets the outputs of its own.

        Example:
            >>> trainer = st.Trainer(st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0)), optax.adam(0.01))
            >>> trainer.predict(np.zeros((5, 8, 8, 1), np.float32)).shape
            (5, 10)
        """
        rows = rows_of(inputs)
        whole = global_batch_size(rows, self.mesh, self._rows)
        check.refuse_other_rank(inputs, self._sample)
        outputs, _ = self._evaluated("predict", self._placed(inputs, None, whole))
        check.refuse_rowless(jax.tree.leaves(outputs), whole)
        return fetch(outputs, rows, whole, self.mesh, self._rows)

    def _evaluated(self, kind: Mode, batch: Batch) -> tuple[Any, dict[str, Any]]:
        check.refuse_uncut(self._plan, self.pipeline)
        return self._compiled(kind, batch)(self._arrays(), batch)

    # Hyperparameters.

    @property
    def hyperparameters(self) -> dict[str, float]:
        """The optimizer's numbers that can be changed between steps, by name.

        They are those of `optax.inject_hyperparams`, such as `learning_rate`, which no schedule computes.
        """
        self._arrays()
        return {name: float(np.asarray(self._opt_leaf(at[0]))) for name, at in self._injected().items()}

    def set_hyperparameters(self, **values: Any) -> None:
        """Changes numbers of the optimizer from the next step on, without compiling again.

        Args:
            values: by the names in `hyperparameters`.

        Raises:
            UserError: a name that the optimizer does not have or that a schedule computes at every step; a
                value that is no number. Nothing is changed then.

        Example:
            >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
            >>> trainer = st.Trainer(st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0)), optimizer)
            >>> trainer.set_hyperparameters(learning_rate=0.05)
            >>> round(trainer.hyperparameters["learning_rate"], 6)
            0.05
        """
        self._arrays()
        places = self._injected()
        for key, value in values.items():
            if not isinstance(value, int | float):
                raise UserError(f"set_hyperparameters({key}={value!r}): give a number")
            if key not in places:
                raise UserError(
                    f"set_hyperparameters({key}=...): the optimizer has {', '.join(places) or 'none'}; make "
                    f"it with optax.inject_hyperparams, such as optax.inject_hyperparams(optax.adam)(1e-3)"
                )
        for key, value in values.items():
            for at in places[key]:
                self._set_opt_leaf(at, value)

    def _injected(self) -> dict[str, list[int]]:
        """The numbers of each injected hyperparameter among the leaves of the optimizer's state.

        Optax stores them in `hyperparams`, and in `hyperparams_states` the counters of those that a schedule
        computes anew at every step. An optimizer of several groups may have a name several times.
        """
        found: dict[str, list[int]] = {}
        scheduled: set[str] = set()
        paths, _ = jax.tree_util.tree_flatten_with_path(self._shapes.opt_state)
        for at, (path, leaf) in enumerate(paths):
            fields = [getattr(key, "name", getattr(key, "key", None)) for key in path]
            if "hyperparams_states" in fields:
                scheduled.add(str(fields[fields.index("hyperparams_states") + 1]))
            elif "hyperparams" in fields[:-1] and not leaf.shape:
                found.setdefault(str(fields[-1]), []).append(at)
        return {name: numbers for name, numbers in found.items() if name not in scheduled}

    def _opt_leaf(self, at: int) -> Any:
        if self.pipeline is not None:
            return self.state.opt_state[1][at]
        return jax.tree.leaves(self.state.opt_state)[at]

    def _set_opt_leaf(self, at: int, value: float) -> None:
        old = self._opt_leaf(at)
        new = np.asarray(value, old.dtype)
        placed = scalar(new, old.sharding) if isinstance(old, Array) else new
        if self.pipeline is not None:
            buffers, shared = self.state.opt_state
            self.state = self.state.replace(opt_state=(buffers, {**shared, at: placed}))
            return
        leaves, tree = jax.tree.flatten(self.state.opt_state)
        leaves[at] = placed
        self.state = self.state.replace(opt_state=jax.tree.unflatten(tree, leaves))

    # Checkpoints.

    def save(self, folder: str | Path | Checkpoints, metrics: Mapping[str, float] | None = None) -> Path:
        """Saves the whole run under `folder/<step>`, by parameter name: any mesh can take it up again.

        Args:
            folder: the checkpoint is complete when this returns; with `Checkpoints` it is written meanwhile.
            metrics: of this step.

        Raises:
            UserError: a folder that cannot be written.
        """
        if not isinstance(folder, Checkpoints):
            with Checkpoints(folder) as checkpoints:
                return self.save(checkpoints, metrics)
        arrays = self._arrays()
        named = arrays if self.pipeline is None else self.pipeline.packing.unpack_onto_all_ranks(arrays)
        about = {"mesh": text(self.mesh), "examples": self.examples}
        tree = by_field(self._with_position(named))
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
        like = self._arrays() if self.pipeline is None else self.pipeline.packing.shapes_on_all_ranks
        like = like.replace(extra={name: self._as_copies(name, tree) for name, tree in like.extra.items()})
        _, tree = checkpoints.restore(by_field(self._with_position(like)), several, step)
        named = TrainState(**tree)
        position, named = named.extra[POSITION], on_devices(named)
        named = named.replace(extra={name: self._recopied(name, tree) for name, tree in named.extra.items()})
        state = named if self.pipeline is None else self.pipeline.packing.pack_from_all_ranks(named)
        self.state = with_position(state, position)
        return int(state.step)

    def _as_copies(self, name: str, tree: Any) -> Any:
        """An extra tree to be read: of one that has copies, any number of them."""
        if copies(self._extra[name], self.mesh) is None:
            return tree
        return jax.tree.map(lambda x: Copies(x.shape[1:], x.dtype), tree)

    def _recopied(self, name: str, tree: Any) -> Any:
        """An extra tree that was read, with as many copies as this mesh has."""
        count = copies(self._extra[name], self.mesh)
        if count is None:
            return tree
        specs = self._specs.extra[name]
        return jax.tree.map(
            lambda x, s: jax.device_put(with_copies(x, count), s), tree, shardings(self.mesh, specs)
        )

    def roll_back(self, checkpoints: Checkpoints, step: int, examples: int) -> int:
        """Takes up the run's last checkpoint, but counts as if `step` updates were done on `examples`.

        Returns:
            The step of the checkpoint.
        """
        saved = self.restore(checkpoints, checkpoints.newest(own=True)[0])
        number = scalar(np.int32(step), self.state.step.sharding)
        self.state = self.state.replace(step=number)
        self.examples = examples
        return saved

    # What the trainer says of itself.

    @property
    def measured(self) -> list[str]:
        """Names of the metrics that it evaluates.

        Raises:
            UserError: of an objective, whose names are not all in `metrics`, before it has been called.
        """
        if isinstance(self._program.objective, Measured):
            return self._metrics
        tree = self._newest_step().out_tree
        _, sums = tree.unflatten(range(tree.num_leaves))
        return [*self._metrics, *sorted(set(sums["metrics"]) - set(self._metrics))]

    @property
    def parameter_bytes(self) -> int:
        """Bytes that parameters take on the device that has most of them.

        Raises:
            UserError: on a mesh with `pipe`, before the first batch says which device has what.
        """
        check.refuse_uncut(self._plan, self.pipeline)
        return bytes_on_a_device(self.state.params)

    def partition_table(self) -> Table:
        """A table of the parameters, how each is sharded, and its bytes on each device."""
        return partition.partition_table(self.model, self.mesh, self.layout)


def _metrics(
    loss: PerExample | None, objective: Objective | None, metrics: Any
) -> dict[str, Metric | PerExample]:
    """The metrics by name; the accuracy where nothing is said and the loss is cross-entropy."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise UserError(
            f"metrics={metrics!r}: give a dictionary of names and metrics, such as "
            f"{{'top5': st.metrics.top_k(5)}}"
        )
    if metrics is None:
        plain = objective is None and loss in (None, losses.cross_entropy)
        return {"accuracy": losses.accuracy} if plain else {}
    for value in metrics.values():
        as_metric(value)  # refuses what is none
    return dict(metrics)


def _momenta(model: nnx.Module) -> dict[str, float]:
    """The momentum of each batch norm by its path."""
    return {name(path): m.momentum for path, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)}
