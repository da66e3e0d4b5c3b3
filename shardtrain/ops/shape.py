"""Flattening and concatenation, which change which devices own which channels."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.layout import Layout, active_mesh, chosen, spatial_names, spec
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.halo import rerouted
from shardtrain.ops.reshard import move
from shardtrain.ops.window import reroute


def flatten(
    x: Float[Array, "batch *spatial channels"], *, layout: Layout | None = None
) -> Float[Array, "batch features"]:
    """All pixels and channels of an example as one vector of features, which is cut as channels are.

    Pixels are gathered, so this operator belongs where images are small. Where their number divides by the
    axes that cut channels, an all-to-all then turns cut channels into cut features; otherwise channels are
    gathered too, and every device keeps its part of the features.

    Args:
        x: input, channels last.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The features in row-major order, as `x.reshape(x.shape[0], -1)`.

    Example:
        >>> st.ops.flatten(jnp.ones((2, 4, 4, 3))).shape
        (2, 48)
    """
    return _flatten(x, chosen(layout))


@functools.partial(jax.jit, static_argnames="layout")
def _flatten(x: Array, layout: Layout) -> Array:
    mesh, extents = active_mesh(), x.shape
    space = [layout.cut(name, mesh) for name in spatial_names(x.ndim - 2)]
    channels = layout.channel_cut(x.shape[-1], mesh)
    cut = [layout.cut("batch", mesh), *space, channels]
    pixels = math.prod(extents[1:-1])
    features = pixels * extents[-1]
    shards = 1 if mesh is None else size(mesh, channels)
    turns = bool(channels) and pixels % shards == 0

    def local(x: Array) -> Array:
        # All devices then have the same values: each slices its part out of the gradient and sends nothing.
        for dim, axes in enumerate(cut[1:] if not turns else space, start=1):
            if axes:
                x = lax.all_gather(x, axes, axis=dim, tiled=True, to="invarying")
        x = island.crop_to(x, (x.shape[0], *extents[1:-1], x.shape[-1]))
        x = x.reshape(x.shape[0], pixels, x.shape[-1])
        if turns:
            x = lax.all_to_all(x, channels, 1, 2, tiled=True)
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2])

    if mesh is None:
        return local(x)
    rest = channels if turns else ()
    y = island.run(local, mesh, (spec(cut),), spec([cut[0], rest]), island.pad_to_blocks(x, cut, mesh))
    y = island.crop_to(y, (extents[0], features))
    return move(y, (cut[0], rest), (cut[0], layout.channel_cut(features, mesh)))


def concat(
    arrays: Sequence[Float[Array, "batch *spatial _"]], *, layout: Layout | None = None
) -> Float[Array, "batch *spatial channels"]:
    """Concatenates activations along their channels, as `jnp.concatenate(arrays, axis=-1)`.

    Where channels are cut, other devices own some of the channels of a device's block of the result. Only
    those are sent; if the channels of some array do not divide by their axes, all arrays are gathered. XLA's
    own partitioner sends whole arrays here.

    Args:
        arrays: activations with the same batch and pixels.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The concatenation, cut as the inputs are.

    Raises:
        UserError: arrays with different batches or pixels, or no arrays.

    Example:
        >>> st.ops.concat([jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4, 5))]).shape
        (2, 4, 4, 8)
    """
    if len({x.shape[:-1] for x in arrays}) != 1:
        raise UserError(f"concat: shapes {[x.shape for x in arrays]}; all but the channels must agree")
    return _concat(tuple(arrays), chosen(layout))


@functools.partial(jax.jit, static_argnames="layout")
def _concat(arrays: tuple[Array, ...], layout: Layout) -> Array:
    mesh = active_mesh()
    total = sum(x.shape[-1] for x in arrays)
    if mesh is None or not layout.cut("channels", mesh):
        return jnp.concatenate(arrays, axis=-1)
    extents = arrays[0].shape[:-1]
    space = [layout.cut(name, mesh) for name in spatial_names(len(extents) - 1)]
    others = (layout.cut("batch", mesh), *space)
    channels = [layout.channel_cut(n, mesh) for n in (*(x.shape[-1] for x in arrays), total)]
    if () in channels:  # some do not divide and are whole: the others must be, too
        whole = [move(x, (*others, c), (*others, ())) for x, c in zip(arrays, channels[:-1], strict=True)]
        return move(jnp.concatenate(whole, axis=-1), (*others, ()), (*others, channels[-1]))
    cut = [*others, channels[-1]]
    shards = size(mesh, cut[-1])
    blocks = [x.shape[-1] // shards for x in arrays]
    # Every channel of the result as (owner, index among the owner's channels of all arrays).
    places = [
        (c // block, sum(blocks[:k]) + c % block)
        for k, block in enumerate(blocks)
        for c in range(block * shards)
    ]
    wanted = [places[i * total // shards : (i + 1) * total // shards] for i in range(shards)]
    rounds, table = reroute(wanted, sum(blocks))

    def local(*arrays: Array) -> Array:
        x = jnp.concatenate(arrays, axis=-1)
        return rerouted(x, x.ndim - 1, rounds, table, cut[-1], grouped=island.grouped(mesh))

    padded = [island.pad_to_blocks(x, cut, mesh) for x in arrays]
    y = island.run(local, mesh, (spec(cut),) * len(arrays), spec(cut), *padded)
    return island.crop_to(y, (*extents, total))
