"""One training step and one evaluation step, as functions of global arrays."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from shardtrain.errors import UserError
from shardtrain.layout import Layout, active_mesh
from shardtrain.mesh import size
from shardtrain.nn.examples import examples
from shardtrain.nn.transitions import resharded
from shardtrain.nn.variables import Variables
from shardtrain.ops.contraction import CONTRACTION
from shardtrain.pipeline.runtime.divergence import refuse_divergent
from shardtrain.train import check
from shardtrain.train.batch import Batch
from shardtrain.train.state import TrainState

PerExample = Callable[[Any, Any], Array]


Remat = str | Callable[..., bool] | Collection[int] | None
"""What the backward pass keeps of the forward pass, see `shardtrain.train.Trainer`."""


@dataclass(frozen=True)
class Program:
    """What a step computes; see `shardtrain.train.Trainer` for the meaning of the fields."""

    variables: Variables
    optimizer: optax.GradientTransformation
    loss: PerExample
    metrics: Mapping[str, PerExample]
    accumulate: int
    dtype: DTypeLike | None
    remat: Remat
    layout: Layout
    deferred: Mapping[str, float] | None = None
    """Momenta of the batch norms by path, where running statistics are those of the whole batch."""
    skip_bad: bool = False

    def _sums(
        self, outputs: Any, targets: Any, real: Array | None, rows: int, lies: Layout
    ) -> dict[str, Array]:
        """Sums over the real examples; the one place where means are prepared, so none is a mean of means.

        Targets, which arrive as the inputs do, follow the batch of the outputs, which lie as `lies` says:
        XLA by itself would move the outputs.
        """
        mesh = active_mesh()
        cut = lies.cut("batch", mesh)
        if mesh is not None and cut != self.layout.cut("batch", mesh) and rows % size(mesh, cut) == 0:
            targets, real = jax.tree.map(
                lambda t: lax.with_sharding_constraint(t, P(cut, *[P.UNCONSTRAINED] * (t.ndim - 1))),
                (targets, real),
            )
        outputs = jax.tree.map(lambda y: y.astype(jnp.promote_types(y.dtype, jnp.float32)), outputs)
        sums = {"examples": jnp.asarray(rows if real is None else real.sum(), jnp.float32)}
        for key, function in {"loss": self.loss, **self.metrics}.items():
            value = function(outputs, targets)
            if value.shape != (rows,):
                raise UserError(
                    f"{key} returned shape {value.shape} for {rows} examples; return one value per "
                    f"example, the mean over the batch is taken here"
                )
            sums[key] = (value if real is None else jnp.where(real, value, 0)).sum()
        return sums

    def _cast(self, tree: Any) -> Any:
        if self.dtype is None:
            return tree
        return jax.tree.map(
            lambda x: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def _policy(self) -> Callable[..., bool] | None:
        """What the backward pass may keep of the forward pass."""
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
    ) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        """The summed loss of one (micro)batch, all sums, and the model's state after it."""
        model: Any = self.variables.model(self._cast(params), model_state, train=True)
        inputs = self._cast(inputs)
        summing = self.deferred is not None
        with examples(index, real, summing=summing), resharded(model, self.layout, inputs) as lies:
            outputs = model(inputs)
        sums = self._sums(outputs, targets, real, index.shape[0], lies)
        return sums["loss"], (sums, Variables.state_of(model))

    def _gradients(self, params: dict, *args: Any) -> Any:
        """Gradient of the summed loss, the sums, and the model's state after one (micro)batch."""
        policy = self._policy()
        function = self.microbatch if policy is None else jax.checkpoint(self.microbatch, policy=policy)
        return jax.grad(function, has_aux=True)(params, *args)

    def before(self, model_state: dict[str, Array]) -> dict[str, Array]:
        """The model's other variables as the first microbatch finds them."""
        if self.deferred is None:
            return model_state
        sums = {f"{path}.{which}" for path in self.deferred for which in ("mean", "var")}
        return {key: jnp.zeros_like(v) if key in sums else v for key, v in model_state.items()}

    def finish(
        self, state: TrainState, grads: dict, moved: dict[str, Array], sums: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update from a batch's summed gradients, and what is reported of it.

        Args:
            state: before the batch.
            grads: of the summed loss.
            moved: the model's other variables after the last microbatch.
            sums: over all real examples; where bad updates are left out, the batch's `limit` is with them.
        """
        count = jnp.maximum(sums["examples"], 1)
        grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        model_state = dict(moved)
        for path, momentum in (self.deferred or {}).items():
            mean = moved[f"{path}.mean"] / count
            whole = {"mean": mean, "var": jnp.maximum(moved[f"{path}.var"] / count - mean**2, 0)}
            for which, new in whole.items():
                old = state.model_state[key := f"{path}.{which}"]
                model_state[key] = (momentum * old + (1 - momentum) * new).astype(old.dtype)
        norm = optax.tree.norm(grads)
        after = TrainState(state.step + 1, params, model_state, opt_state)
        if not self.skip_bad:
            return after, sums | {"grad_norm": norm * count}
        loss = sums["loss"] / count
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= sums["limit"])
        before = dataclasses.replace(state, step=after.step)  # the batch counts: it is not met again
        after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        reported = {key: value for key, value in sums.items() if key != "limit"}
        return after, reported | {"grad_norm": norm * count, "skipped": jnp.where(good, 0, count)}

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update.

        With `accumulate=m`, microbatch `i` holds the examples `i, i+m, i+2m, ...`: every device cuts it out
        of the rows that it has already.
        """
        inputs, targets = batch.cropped()
        real = batch.real
        rows, parts = batch.rows, self.accumulate
        first_state = self.before(state.model_state)
        if parts == 1:
            grads, (sums, model_state) = self._gradients(
                state.params, first_state, inputs, targets, real, jnp.arange(rows)
            )
        else:
            split = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(rows // parts, parts, *x.shape[1:]), 0, 1),
                (inputs, targets, real, jnp.arange(rows)),
            )
            random = self.variables.is_random()

            def one(carry: Any, micro: Any) -> tuple[Any, Any]:
                grads, sums, moving = carry
                # Each microbatch starts from the same random streams: dropout draws by example.
                before = {k: state.model_state[k] if random[k] else v for k, v in moving.items()}
                new, (more, after) = self._gradients(state.params, before, *micro)
                return (jax.tree.map(jnp.add, grads, new), jax.tree.map(jnp.add, sums, more), after), None

            first = jax.tree.map(lambda x: x[0], split)
            grads, (sums, _) = jax.eval_shape(self._gradients, state.params, state.model_state, *first)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums))
            (grads, sums, model_state), _ = lax.scan(one, (*zeros, first_state), split)
        if self.skip_bad:
            sums = sums | {"limit": batch.limit}
        return self.finish(state, grads, model_state, sums)

    def evaluated(
        self, params: dict, model_state: dict, inputs: Any, targets: Any, real: Array | None, index: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Outputs in evaluation mode, and the sums over real examples (if there are targets)."""
        model: Any = self.variables.model(self._cast(params), model_state, train=False)
        inputs = self._cast(inputs)
        with examples(index, real), resharded(model, self.layout, inputs) as lies:
            outputs = model(inputs)
        return outputs, {} if targets is None else self._sums(outputs, targets, real, index.shape[0], lies)

    def eval_step(self, state: TrainState, batch: Batch) -> tuple[Any, dict[str, Array]]:
        """Outputs of a batch in evaluation mode, and the sums over its real examples (if it has targets)."""
        index = jnp.arange(batch.rows)
        return self.evaluated(state.params, state.model_state, *batch.cropped(), batch.real, index)


def compiled(
    function: Callable, state: TrainState, batch: Batch, mesh: Mesh, out: TrainState | None, *, staged: bool
) -> Any:
    """A step, compiled for a state and batches that lie as these do.

    Args:
        function: `(state, batch) -> two results`.
        state, batch: arrays or shapes.
        mesh: that they lie on.
        out: shardings of the first result, which then takes the memory of the state.
        staged: it has pipeline stages, which differ from rank to rank.

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
        refuse_divergent(program.as_text(), mesh, ["pipe"])
    return program
