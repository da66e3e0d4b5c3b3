"""Compiles a training step of a model for a mesh from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.layout import Axes, Layout
from shardtrain.nn import partition, transitions


def compiled_step(
    model: nnx.Module,
    mesh: Mesh,
    inputs: jax.ShapeDtypeStruct,
    *,
    layout: partition.LayoutTable | None = None,
    parameters: str | Axes = (),
) -> jax.stages.Compiled:
    """Compiles a step of plain gradient descent for a mesh, without running it.

    The loss is half the sum of the squares of all outputs. The step is thus a training step without targets,
    metrics and optimizer state. No array is created, so the model may come from `nnx.eval_shape`, and it may
    be larger than the memory of the devices here.

    Args:
        model: any NNX model with one input.
        mesh: a mesh from `make_mesh`.
        inputs: shape and dtype of the batch, `(batch, *spatial, channels)`.
        layout, parameters: as for `Trainer`.

    Returns:
        The compiled program, with its `memory_analysis()` and `cost_analysis()`; see also `census`.

    Raises:
        UserError: if the model cannot be partitioned over this mesh.

    Example:
        >>> model = nnx.eval_shape(lambda: st.models.LeNet(10, (16, 16, 1), rngs=nnx.Rngs(0)))
        >>> images = jax.ShapeDtypeStruct((64, 16, 16, 1), jnp.float32)
        >>> program = compiled_step(model, st.make_mesh("data=2,height=4"), images)
        >>> program.memory_analysis().temp_size_in_bytes > 0
        True
    """
    model = nnx.clone(model)  # the layouts of the caller's model stay as they are
    default = partition.assign(model, mesh, Layout(parameters=parameters), layout or {})
    return compiled_assigned(model, mesh, default, inputs)


def compiled_assigned(
    model: nnx.Module, mesh: Mesh, default: Layout, inputs: jax.ShapeDtypeStruct
) -> jax.stages.Compiled:
    """Compiles the step of `compiled_step` for a model whose layers have their layouts already.

    Args:
        model: after `partition.assign`, which returns the layout of the input.
        mesh: the mesh that it was called with.
        default: the layout of the input.
        inputs: shape and dtype of the batch.
    """
    specs = partition.parameter_spec(model, mesh, default)
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    def placed(state: nnx.State) -> nnx.State:
        def at(path: tuple, variable: nnx.Variable) -> nnx.Variable:
            value = variable.get_value()
            sharding = NamedSharding(mesh, specs[path])
            return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

        return nnx.from_flat_state([(path, at(path, v)) for path, v in nnx.to_flat_state(state)])

    def step(params: Any, rest: Any, x: Array) -> Any:
        def half_of_squares(params: Any) -> Array:
            merged: Any = nnx.merge(graph, params, rest, copy=True)
            with transitions.resharded(merged, default, x):
                return sum((y**2).sum() / 2 for y in jax.tree.leaves(merged(x)))

        return jax.tree.map(jnp.subtract, params, jax.grad(half_of_squares)(params))

    spec: P = default.activation(inputs.shape, mesh)
    x = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype, sharding=NamedSharding(mesh, spec))
    shardings = jax.tree.map(lambda s: s.sharding, placed(params))
    with jax.set_mesh(mesh):
        return (
            jax.jit(step, out_shardings=shardings, donate_argnums=0)
            .lower(placed(params), placed(rest), x)
            .compile()
        )
