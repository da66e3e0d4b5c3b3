"""One training step and one evaluation step, as functions of global arrays."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from shardtrain.layout import Layout, active_mesh
from shardtrain.mesh import PIPE, SPATIAL, size
from shardtrain.metrics import Metric, finished
from shardtrain.nn.draws import Part
from shardtrain.nn.examples import examples
from shardtrain.nn.transitions import resharded
from shardtrain.nn.variables import Variables
from shardtrain.ops.contraction import CONTRACTION
from shardtrain.pipeline.runtime.divergence import refuse_divergent
from shardtrain.train import check
from shardtrain.train.batch import Batch
from shardtrain.train.extra import Extra, updated
from shardtrain.train.objective import Context, Objective, summed
from shardtrain.train.optimizer import Optimizer
from shardtrain.train.state import TrainState

Remat = str | Callable[..., bool] | Collection[int] | None
"""What the backward pass keeps of the forward pass, see `shardtrain.train.Trainer`."""


Mode = Literal["train", "evaluate", "predict"]


@dataclass(frozen=True)
class Program:
    """What a step computes, as functions of global arrays; see `shardtrain.Trainer` for the fields.

    Attributes:
        objective: of the model in training and in evaluation.
        metrics: those whose sums the objective may return, with their finish.
        deferred: momenta of the batch norms by path, where running statistics are those of the whole batch.
        extra: trees that the step updates beside parameters and optimizer state, by name.
    """

    variables: Variables
    optimizer: Optimizer
    objective: Objective
    metrics: Mapping[str, Metric]
    accumulate: int
    dtype: DTypeLike | None
    remat: Remat
    layout: Layout
    deferred: Mapping[str, float] | None = None
    skip_bad: bool = False
    unit: str = "images"
    extra: Mapping[str, Extra] = field(default_factory=dict)

    def _sums(
        self, model: Any, inputs: Any, targets: Any, context: Context, summing: bool = False
    ) -> dict[str, Any]:
        """Calls the objective, and sums what it returns over the real examples.

        Targets are placed as the inputs are. They are moved to where the model's outputs are: XLA by itself
        would move the outputs.
        """
        rows, real = context.rows, context.real
        with (
            examples(context.index, real, summing=summing),
            resharded(model, self.layout, inputs) as outputs_layout,
        ):
            mesh = active_mesh()
            cut = outputs_layout.cut("batch", mesh)
            if mesh is not None and cut != self.layout.cut("batch", mesh) and rows % size(mesh, cut) == 0:
                targets, real = jax.tree.map(
                    lambda t: lax.with_sharding_constraint(t, P(cut, *[P.UNCONSTRAINED] * (t.ndim - 1))),
                    (targets, real),
                )
            context = dataclasses.replace(context, real=real)
            found = self.objective(model, (inputs, targets), context)
        return summed(found, self.metrics, context, self.unit)

    def _cast(self, tree: Any) -> Any:
        if self.dtype is None:
            return tree
        return jax.tree.map(
            lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def _policy(self) -> Callable[..., bool] | None:
        """Returns the policy for what the backward pass may keep of the forward pass."""
        policies = jax.checkpoint_policies
        if callable(self.remat):
            return self.remat
        if self.remat == "contractions":
            return policies.save_only_these_names(CONTRACTION)
        if self.remat == "nothing":
            return policies.nothing_saveable
        return self._all_but_gathered if self.layout.parameters else None

    def _all_but_gathered(self, primitive: Any, *_: Any, **params: Any) -> bool:
        """Parameters are gathered again in the backward pass rather than kept whole between the passes."""
        axes = params.get("axis_name", ())
        return not (primitive.name.startswith("all_gather") and set(axes) <= set(self.layout.parameters))

    def microbatch(
        self, params: dict, model_state: dict, inputs: Any, targets: Any, real: Array | None, index: Array
    ) -> tuple[Array, tuple[dict[str, Any], dict[str, Array]]]:
        """The summed loss of one (micro)batch, all sums, and the model's state after it."""
        rows, parts = index.shape[0], self.accumulate
        part = None if parts == 1 else Part(rows, parts, index[0] % parts)
        model = self.variables.model(self._cast(params), model_state, train=True, part=part)
        context = Context(True, rows, index, real)
        sums = self._sums(model, self._cast(inputs), targets, context, summing=self.deferred is not None)
        after = self.variables.state_of(model)
        if part is not None:
            after |= {name: model_state[name] for name in self.variables.key_names()}
        return sums["loss"], (sums, after)

    def _gradients(self, params: dict, *args: Any) -> Any:
        """Returns the gradient of the summed loss, the sums, and the model's state after one (micro)batch."""
        policy = self._policy()
        function = self.microbatch if policy is None else jax.checkpoint(self.microbatch, policy=policy)
        return jax.grad(function, has_aux=True)(params, *args)

    def before(self, model_state: dict[str, Array]) -> dict[str, Array]:
        """Returns the model's other variables as the first microbatch receives them."""
        if self.deferred is None:
            return model_state
        sums = {f"{path}.{which}" for path in self.deferred for which in ("mean", "var")}
        return {key: jnp.zeros_like(v) if key in sums else v for key, v in model_state.items()}

    def finish(
        self, state: TrainState, grads: dict, moved: dict[str, Array], sums: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        """One update from a batch's summed gradients, and what is reported of it.

        Args:
            state: before the batch.
            grads: of the summed loss.
            moved: the model's other variables after the last microbatch.
            sums: over all real examples; where bad updates are left out, the batch's `limit` is with them.
        """
        count = jnp.maximum(sums["examples"], 1)
        # For complex parameters jax returns the conjugate of the direction of steepest ascent.
        grads = jax.tree.map(lambda g: (g / count).astype(g.dtype).conj(), grads)
        loss = sums["loss"] / count
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, loss)
        params = optax.apply_updates(state.params, updates)
        model_state = self._with_statistics(state.model_state, moved, count)
        after = TrainState(state.step + 1, params, model_state, opt_state, state.extra)
        extra = {name: updated(name, one, after) for name, one in self.extra.items()}
        after = dataclasses.replace(after, extra=extra)
        norm = optax.tree.norm(grads)
        if not self.skip_bad:
            return after, sums | {"grad_norm": norm * count}
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= sums["limit"])
        before = dataclasses.replace(state, step=after.step)  # the batch counts: it is not met again
        after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        reported = {key: value for key, value in sums.items() if key != "limit"}
        return after, reported | {"grad_norm": norm * count, "skipped": jnp.where(good, 0, count)}

    def _with_statistics(
        self, before: Mapping[str, Array], moved: Mapping[str, Array], count: Array
    ) -> dict[str, Array]:
        """Returns the model's variables after a batch; running statistics move by the whole batch's."""
        after = dict(moved)
        for path, momentum in (self.deferred or {}).items():
            mean = moved[f"{path}.mean"] / count
            whole = {"mean": mean, "var": jnp.maximum(moved[f"{path}.var"] / count - mean**2, 0)}
            for which, new in whole.items():
                old = before[key := f"{path}.{which}"]
                after[key] = (momentum * old + (1 - momentum) * new).astype(old.dtype)
        return after

    def row(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """Means and finished metrics from the sums that `train_step` and `eval_step` return, on the host."""
        examples = max(float(sums["examples"]), 1)
        row: dict[str, Any] = {"loss": float(sums["loss"]) / examples}
        for name, total in sums["metrics"].items():
            declared = self.metrics.get(name)
            row[name] = float(total) / examples if declared is None else finished(name, declared, total)
        return row | {key: float(sums[key]) / examples for key in ("grad_norm", "skipped") if key in sums}

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One update.

        With `accumulate=m`, microbatch `i` holds the examples `i, i+m, i+2m, ...`: every device cuts it out
        of the rows that it has already.
        """
        whole = (*batch.cropped(), batch.real, jnp.arange(batch.rows))
        if self.accumulate == 1:
            first_state = self.before(state.model_state)
            grads, (sums, model_state) = self._gradients(state.params, first_state, *whole)
        else:
            grads, sums, model_state = self._accumulated(state, whole)
        if self.skip_bad:
            sums = sums | {"limit": batch.limit}
        return self.finish(state, grads, model_state, sums)

    def _accumulated(self, state: TrainState, whole: Any) -> tuple[dict, dict[str, Any], dict[str, Array]]:
        """Returns gradients and sums over the microbatches, and the model's other variables afterwards."""
        parts = self.accumulate
        split = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), whole
        )
        random = self.variables.is_random()

        def one(carry: Any, micro: Any) -> tuple[Any, None]:
            grads, sums, moving = carry
            # Each microbatch starts from the same random streams: dropout draws by example.
            before = {k: state.model_state[k] if random[k] else v for k, v in moving.items()}
            new, (more, after) = self._gradients(state.params, before, *micro)
            return (jax.tree.map(jnp.add, grads, new), jax.tree.map(jnp.add, sums, more), after), None

        first = jax.tree.map(lambda x: x[0], split)
        grads, (sums, _) = jax.eval_shape(self._gradients, state.params, state.model_state, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums))
        carry, _ = lax.scan(one, (*zeros, self.before(state.model_state)), split)
        return carry

    def evaluated(
        self,
        params: dict,
        model_state: dict,
        inputs: Any,
        targets: Any,
        real: Array | None,
        index: Array,
        *,
        predict: bool,
    ) -> tuple[Any, dict[str, Any]]:
        """In evaluation mode: the outputs, or the sums over real examples."""
        model: Any = self.variables.model(self._cast(params), model_state, train=False)
        inputs = self._cast(inputs)
        if not predict:
            return (), self._sums(model, inputs, targets, Context(False, index.shape[0], index, real))
        with examples(index, real), resharded(model, self.layout, inputs):
            return model(inputs), {}

    def eval_step(self, state: TrainState, batch: Batch, *, predict: bool) -> tuple[Any, dict[str, Array]]:
        """In evaluation mode: the outputs of a batch, or the sums over its real examples."""
        given = (*batch.cropped(), batch.real, jnp.arange(batch.rows))
        return self.evaluated(state.params, state.model_state, *given, predict=predict)

    def step(self, mode: Mode, like: Batch) -> Callable[[TrainState, Batch], tuple[Any, Any]]:
        """Returns the step of a mode; jit makes a program for batches such as `like`."""
        return self.train_step if mode == "train" else partial(self.eval_step, predict=mode == "predict")


def compiled(
    function: Callable, state: TrainState, batch: Batch, mesh: Mesh, out: TrainState | None, *, staged: bool
) -> Any:
    """Compiles a step for states and batches that are placed as these are.

    Args:
        function: `(state, batch) -> two results`.
        state, batch: arrays or shapes, placed on the mesh.
        mesh: of the run.
        out: shardings of the first result, which then takes the memory of the state.
        staged: whether the step has pipeline stages, whose programs differ from rank to rank.

    Raises:
        UserError: operators that XLA cannot be trusted with.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)
    )
    updates = out is not None
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            function,
            donate_argnums=0 if updates else (),
            out_shardings=(out, None) if updates else None,
        )
        traced = jitted.trace(*shapes)
        check.refuse_outside_islands(traced.jaxpr, mesh)
        program = traced.lower().compile()
    if staged:
        refuse_divergent(program.as_text(), mesh, [PIPE])
    elif updates and any(size(mesh, axis) > 1 for axis in (*SPATIAL, "channel")):
        check.warn_of_foreign_collectives(program.as_text(), mesh)
    return program
