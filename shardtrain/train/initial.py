"""The state of a run before its first update, and how it is placed on the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shardtrain.guard.health import NO_LOSSES
from shardtrain.layout import Layout
from shardtrain.nn.variables import Variables
from shardtrain.train.extra import POSITION, Extra, extra_specs, initial_extra
from shardtrain.train.optimizer import Optimizer
from shardtrain.train.state import TrainState, is_shapes, owners, shardings, with_shardings


def state_specs(
    model: nnx.Module,
    variables: Variables,
    optimizer: Optimizer,
    extra: Mapping[str, Extra],
    mesh: Mesh,
    layout: Layout,
) -> TrainState:
    """The PartitionSpec of every array of a state of named arrays, `pipe` aside."""
    params, _ = variables.values()
    param_specs, model_state = variables.specs(model, mesh, layout)
    optimizer_specs = opt_state_specs(optimizer, params, param_specs)
    extras = {name: extra_specs(one, params, param_specs, mesh) for name, one in extra.items()}
    return TrainState(P(), param_specs, model_state, optimizer_specs, extras)


def initial_state(
    variables: Variables,
    optimizer: Optimizer,
    extra: Mapping[str, Extra],
    mesh: Mesh,
    specs: TrainState,
    *,
    staged: bool,
) -> TrainState:
    """The state before the first update; of a model of shapes, shapes.

    Args:
        variables: of the model.
        optimizer: makes its own state.
        extra: declarations of more trees, which make their own states.
        mesh, specs: where arrays are placed.
        staged: whether the mesh has stages. Which device stores which array is then known only when the first
            batch is seen, and until then all arrays are on the host.
    """
    params, model_state = variables.values()
    position = {POSITION: {"examples": np.int64(0), "recent": NO_LOSSES}}

    def rest(params: Any) -> tuple[Any, Any]:
        return optimizer.init(params), {n: initial_extra(one, params, mesh) for n, one in extra.items()}

    if is_shapes(params):
        step = jax.ShapeDtypeStruct((), jnp.int32)
        shapes = TrainState(step, params, model_state, *jax.eval_shape(rest, params))
        shapes = shapes if staged else with_shardings(shapes, shardings(mesh, specs))
        return shapes.replace(extra={**shapes.extra, **position})
    if staged:
        params, model_state = jax.tree.map(np.array, (params, model_state))
        opt_state, trees = jax.tree.map(np.asarray, rest(params))
        return TrainState(np.zeros((), np.int32), params, model_state, opt_state, {**trees, **position})
    where = shardings(mesh, specs)
    # A copy: the step donates its state, and the caller's model keeps its own arrays.
    params, model_state = jax.tree.map(
        lambda x, s: jax.device_put(np.array(x), s),
        (params, model_state),
        (where.params, where.model_state),
    )
    opt_state, trees = jax.jit(rest, out_shardings=(where.opt_state, where.extra))(params)
    step = jax.device_put(np.zeros((), np.int32), where.step)
    return TrainState(step, params, model_state, opt_state, {**trees, **position})


def opt_state_specs(optimizer: Optimizer, params: Mapping[str, Any], specs: Mapping[str, P]) -> Any:
    """The PartitionSpecs of the optimizer's state: a leaf of a parameter's shape has the parameter's."""
    shapes = jax.eval_shape(optimizer.init, dict(params))
    return jax.tree.map(
        lambda leaf, name: specs[name] if name and leaf.shape == params[name].shape else P(),
        shapes,
        owners(shapes, params),
    )
