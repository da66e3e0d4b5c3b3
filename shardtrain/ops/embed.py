"""Lookups in embedding tables that are cut by rows."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Num

from shardtrain.errors import UserError
from shardtrain.layout import Layout, active_mesh, axes_of, chosen, spatial_names, spec
from shardtrain.ops import island


def embed(
    indices: Num[Array, "batch *spatial"],
    table: Float[Array, "rows *features"],
    *,
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial features"]:
    """Looks up rows of a table whose rows are cut over the axes that cut channels.

    Every device looks up the indices of its own rows and takes zeros for all others; the sum over devices is
    reduce-scattered over the features, or all-reduced where those cannot be cut. The gradient of a row is
    added on the device that stores the row.

    Args:
        indices: integers. Negative ones count from the end; those beyond the table give NaN, as in Flax.
        table: the embeddings. Rows that do not divide by the axes are padded at each call.
        layout: which mesh axes cut what; by name by default. Dimensions of `indices` after the batch count
            as pixels: the last is `width`.

    Returns:
        The rows, cut as `indices` are, with their features cut as channels.

    Raises:
        UserError: indices that are not integers, or a table that is not a matrix.

    Example:
        >>> st.ops.embed(jnp.array([[0, 2, 1]]), jnp.ones((3, 8))).shape
        (1, 3, 8)

    References:
        Shoeybi et al., Megatron-LM, 2019, section 3 (the vocabulary-parallel embedding).
    """
    if table.ndim != 2 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise UserError(
            f"embed: indices of {indices.dtype} and a table of shape {table.shape}; give integers and a "
            f"table (rows, features)"
        )
    return _embed(indices, table, chosen(layout))


@functools.partial(jax.jit, static_argnames="layout")
def _embed(indices: Array, table: Array, layout: Layout) -> Array:
    mesh = active_mesh()
    indices = indices.astype(
        jnp.promote_types(indices.dtype, jnp.int32)
    )  # integers of 8 bits could not count the rows
    rows, features = table.shape
    space = [layout.cut(name, mesh) for name in spatial_names(indices.ndim - 1)]
    cut = [layout.cut("batch", mesh), *space]
    by_rows, by_features = layout.cut("channels", mesh), layout.channel_cut(features, mesh)
    vary = tuple(a for axes in cut for a in axes)
    gathered = island.gathered_axes(island.stored_spec(layout, table.shape, 0, mesh), layout)
    stored = spec([by_rows + gathered[0], gathered[1]])
    extents = (*indices.shape, features)

    def local(indices: Array, table: Array) -> Array:
        table = island.gather(table, stored, layout, vary)
        wanted = jnp.where(indices < 0, indices + rows, indices)
        mine = wanted - (lax.axis_index(by_rows) * table.shape[0] if by_rows else 0)
        have = (mine >= 0) & (mine < table.shape[0])
        found = jnp.take(table, jnp.where(have, mine, 0), axis=0)
        found = jnp.where(have[..., None], found, 0)
        if by_rows and by_features:
            found = lax.psum_scatter(found, by_rows, scatter_dimension=found.ndim - 1, tiled=True)
        elif by_rows:
            found = lax.psum(found, by_rows)
        exists = (wanted >= 0) & (wanted < rows)
        found = jnp.where(exists[..., None], found, jnp.nan)
        return island.mask_padding(found, extents, [*cut, by_features], mesh)

    if mesh is None:
        return local(indices, table)
    indices = island.pad_to_blocks(indices, cut, mesh)
    table = island.pad_to_blocks(table, [axes_of(stored[0]), ()], mesh)
    y = island.run(local, mesh, (spec(cut), stored), spec([*cut, by_features]), indices, table)
    return island.crop_to(y, extents)
