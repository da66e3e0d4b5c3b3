"""Embedding tables cut by rows."""

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
    """Rows of a table by their numbers, the table cut by rows over the axes that cut channels.

    One island. Every device looks up what it has and has zeros for the rest; the sums are reduce-scattered
    over the features (all-reduced where those cannot be cut). The gradient adds to a device's own rows.

    Args:
        indices: negative ones count from the end; beyond the table the result is NaN, as in Flax.
        table: the embeddings. Rows that do not divide by the axes are padded on the way in.
        layout: which mesh axes cut what; by name by default. Dimensions of `indices` after the batch count
            as pixels: the last is `width`.

    Raises:
        UserError: indices that are no integers, a table that is no matrix.

    Example:
        >>> embed(jnp.array([[0, 2, 1]]), jnp.ones((3, 8))).shape
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
    indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))  # bytes could not count the rows
    rows, features = table.shape
    space = [layout.cut(name, mesh) for name in spatial_names(indices.ndim - 1)]
    cut = [layout.cut("batch", mesh), *space]
    by_rows, by_features = layout.cut("channels", mesh), layout.channel_cut(features, mesh)
    vary = tuple(a for axes in cut for a in axes)
    kept = island.at_rest(layout, table.shape, 0, mesh)
    spread = island.spread_axes(kept, layout)
    kept = spec([by_rows + spread[0], spread[1]])
    extents = (*indices.shape, features)

    def local(indices: Array, table: Array) -> Array:
        table = island.gather(table, kept, layout, vary)
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
    indices, table = island.fill_up(indices, cut, mesh), island.fill_up(table, [axes_of(kept[0]), ()], mesh)
    y = island.run(local, mesh, (spec(cut), kept), spec([*cut, by_features]), indices, table)
    return island.crop_to(y, extents)
