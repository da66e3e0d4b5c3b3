"""One of several devices hands its examples round."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from shardtrain.errors import UserError
from shardtrain.layout import Layout, active_mesh, chosen, spec
from shardtrain.mesh import size
from shardtrain.ops import island


def take_turn(
    x: Float[Array, "batch *spatial channels"],
    turn: int | Int[Array, ""],
    *,
    layout: Layout | None = None,
    axis: str = "channel",
) -> Float[Array, "part *spatial channels"]:
    """The examples of device number `turn` of each group along `axis`, dealt out evenly in the group.

    The result is cut as `x` is. A device sends `(n-1)/n` of its block in every turn, whoever's turn it is:
    XLA's collectives have no single sender, so what is no one's turn travels as zeros. After all turns
    that is n times what the examples amount to, and the gradient sends as much on its way back.

    Args:
        x: an activation whose batch is cut by several axes, `axis` the last of them.
        turn: which device along `axis`; may be traced.
        layout: which mesh axes cut what.
        axis: the mesh axis whose devices take turns.

    Raises:
        UserError: a batch that `axis` does not cut last, or blocks that do not divide by its devices.

    Example:
        >>> with jax.set_mesh(make_mesh("channel=4")):
        ...     part = take_turn(jnp.ones((32, 9)), 1, layout=Layout(batch="channel", channels=()))
        >>> part.shape
        (8, 9)
    """
    mesh, layout = active_mesh(), chosen(layout)
    n = 1 if mesh is None else size(mesh, axis)
    if n == 1:
        return x
    batch = layout.cut("batch", mesh)
    if batch[-1:] != (axis,):
        raise UserError(
            f"take_turn: the batch is cut by {'*'.join(batch) or 'nothing'}, and its last axis must be "
            f"{axis!r}, whose devices take turns; give Layout(batch=('data', {axis!r}), channels=())"
        )
    shards = size(mesh, batch)  # type: ignore[arg-type]
    if x.shape[0] % (shards * n):
        raise UserError(
            f"take_turn: {x.shape[0]} examples do not divide by {'*'.join(batch)}={shards} and by the "
            f"{n} devices of {axis!r} once more; use a multiple of {shards * n}"
        )
    return _take_turn(x, jnp.asarray(turn), layout, axis)


@functools.partial(jax.jit, static_argnames=("layout", "axis"))
def _take_turn(x: Array, turn: Array, layout: Layout, axis: str) -> Array:
    mesh = active_mesh()
    assert mesh is not None
    cut = layout.activation(x.shape, mesh)

    def local(x: Array, turn: Array) -> Array:
        mine = jnp.where(lax.axis_index(axis) == turn, x, 0)
        return lax.psum_scatter(mine, axis, scatter_dimension=0, tiled=True)

    return island.run(local, mesh, (cut, spec([])), cut, x, turn)
