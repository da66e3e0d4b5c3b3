"""Distributes the examples of one device among the devices of its group."""

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
    """The examples of the `turn`-th device along `axis`, distributed evenly over the devices of that axis.

    The result is cut as `x` is. XLA's collectives have no single sender, so all `n` devices of the axis send
    `(n-1)/n` of a block in every turn, zeros if it is not theirs. All turns together send `n` times the bytes
    of the examples, and the backward pass as many.

    Args:
        x: an activation whose batch is cut by one or several axes, the last of them `axis`.
        turn: index of a device along `axis`; may be traced.
        layout: which mesh axes cut what; by name by default.
        axis: the mesh axis whose devices take turns.

    Returns:
        The examples of one device of every group: `1/n` of the batch.

    Raises:
        UserError: a batch that `axis` does not cut last, or blocks that do not divide by its devices.

    Example:
        >>> layout = st.Layout(batch="channel", channels=())
        >>> with jax.set_mesh(st.make_mesh("channel=4")):
        ...     st.ops.take_turn(jnp.ones((32, 9)), 1, layout=layout).shape
        (8, 9)

    References:
        Krizhevsky, One Weird Trick for Parallelizing Convolutional Neural Networks, 2014, section 3.
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
