"""A compiled step of a model on a mesh, from shapes alone."""

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
    """A step of plain gradient descent, compiled and not run.

    The loss is half the sum of the outputs' squares: a training step without its targets and the scalars of
    its metrics, and without an optimizer's state. No array is made, so a model from `nnx.eval_shape` will
    do, and one that no device here could hold.

    Args:
        model: any NNX model of one output.
        mesh: from `make_mesh`.
        inputs: the batch, `(batch, *spatial, channels)`.
        layout, parameters: as for `Trainer`.

    Raises:
        UserError: what the model cannot do on this mesh.

    Example:
        >>> model = nnx.eval_shape(lambda: models.AlexNet(rngs=nnx.Rngs(0)))
        >>> images = jax.ShapeDtypeStruct((256, 224, 224, 3), jnp.float32)
        >>> program = compiled_step(model, make_mesh("data=8"), images)  # doctest: +SKIP
        >>> program.memory_analysis().temp_size_in_bytes  # doctest: +SKIP
    """
    model = nnx.clone(model)  # the caller's keeps the layouts that it has
    default = partition.assign(model, mesh, Layout(parameters=parameters), layout or {})
    specs = partition.parameter_spec(model, mesh, default)
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    def placed(state: nnx.State) -> nnx.State:
        def at(path: tuple, variable: nnx.Variable) -> nnx.Variable:
            value = variable.get_value()
            where = NamedSharding(mesh, specs[path])
            return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where))

        return nnx.from_flat_state([(path, at(path, v)) for path, v in nnx.to_flat_state(state)])

    def step(params: Any, rest: Any, x: Array) -> Any:
        def half_of_squares(params: Any) -> Array:
            merged: Any = nnx.merge(graph, params, rest, copy=True)
            with transitions.resharded(merged, default, x):
                return (merged(x) ** 2).sum() / 2

        return jax.tree.map(jnp.subtract, params, jax.grad(half_of_squares)(params))

    lies: P = default.activation(inputs.shape, mesh)
    whole = NamedSharding(mesh, lies)
    x = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype, sharding=whole)
    where = jax.tree.map(lambda s: s.sharding, placed(params))
    with jax.set_mesh(mesh):
        return (
            jax.jit(step, out_shardings=where, donate_argnums=0)
            .lower(placed(params), placed(rest), x)
            .compile()
        )
