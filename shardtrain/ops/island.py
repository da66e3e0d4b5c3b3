"""An island: one `shard_map` that computes one operator, with its communication written out.

Arrays enter an island padded to whole blocks, and leave it cropped to their own extents again. XLA stores an
uneven array in blocks of the same size, so neither sends anything.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Axes, Layout, axes_of, spec
from shardtrain.mesh import size
from shardtrain.ops.window import Reach


def run(local: Callable[..., Any], mesh: AnyMesh, in_specs: Any, out_specs: Any, *args: Any) -> Any:
    """Runs `local` on every device's shards.

    Under an outer `shard_map` that is manual over some axes, the island is manual over the others.


    Raises:
        UserError: a spec names an axis over which the outer `shard_map` is manual already.
    """
    manual = compat.manual_axes(mesh)
    named = {a for s in jax.tree.leaves((in_specs, out_specs)) for entry in s for a in axes_of(entry)}
    if named & manual:
        raise UserError(
            f"an operator cut on {sorted(named & manual)} was called inside a shard_map that is manual over "
            f"it; make the outer shard_map manual over its own axis only, such as axis_names={{'pipe'}}"
        )
    names = frozenset(mesh.axis_names) - manual
    return jax.shard_map(local, axis_names=names, in_specs=in_specs, out_specs=out_specs)(*args)


def grouped(mesh: AnyMesh | None) -> bool:
    """Whether halos must travel by grouped collectives, see `halo.exchange`.

    They must under a manual outer axis such as `pipe`: the operator may then be in a branch that only some
    devices take.
    """
    return mesh is not None and bool(compat.manual_axes(mesh))


def pad_to(x: Array, extents: Sequence[int]) -> Array:
    """`x` padded with zeros at the end of every dimension to `extents`."""
    widths = [(0, extent - have) for extent, have in zip(extents, x.shape, strict=True)]
    return jnp.pad(x, widths) if any(high for _, high in widths) else x


def mask_padding(
    x: Array, extents: Sequence[int], cuts: Sequence[Axes], mesh: AnyMesh | None, fill: float | int = 0.0
) -> Array:
    """This device's block with `fill` written past the global `extents`; for use inside an island.

    The zeros of `pad_to_blocks` cannot be relied on: XLA of jax 0.10 pads an uneven array once, with one
    value, for all its uses. Masking the outputs too keeps the gradient of their padding out of the sums.
    """
    for dim, (extent, axes) in enumerate(zip(extents, cuts, strict=True)):
        if round_up(extent, axes, mesh) != extent:
            row = lax.axis_index(axes) * x.shape[dim] + lax.broadcasted_iota(jnp.int32, x.shape, dim)
            x = jnp.where(row < extent, x, jnp.asarray(fill, x.dtype))
    return x


def pad_to_blocks(x: Array, cuts: Sequence[Axes], mesh: AnyMesh | None) -> Array:
    """`x` padded so that `cuts` cut every dimension into whole blocks."""
    return pad_to(x, [round_up(n, axes, mesh) for n, axes in zip(x.shape, cuts, strict=True)])


def entry_of_shard(table: np.ndarray, reach: Reach) -> Array:
    """This shard's entry of a table with one entry for every shard of a dimension."""
    if all((entry == table[0]).all() for entry in table):
        return jnp.asarray(table[0])
    return jnp.asarray(table)[lax.axis_index(reach.axes)]


def crop_to(x: Array, extents: Sequence[int]) -> Array:
    """`x` cropped at the end of every dimension to `extents`."""
    return x if x.shape == tuple(extents) else lax.slice(x, (0,) * x.ndim, extents)


def round_up(extent: int, axes: Axes, mesh: AnyMesh | None) -> int:
    """The extent rounded up to a multiple of the number of shards that `axes` cut it into."""
    shards = size(mesh, axes) if mesh is not None else 1
    return -(-extent // shards) * shards


def stored_spec(
    layout: Layout, shape: Sequence[int], channel: int | None, mesh: AnyMesh | None, space: int = 0
) -> P:
    """The PartitionSpec of a stored parameter, without axes that are manual outside of the island."""
    outside = compat.manual_axes(mesh) if mesh is not None else frozenset()
    entries = layout.parameter(shape, channel, mesh, space)
    return spec([tuple(a for a in axes_of(entry) if a not in outside) for entry in entries])


def gather(parameter: Array, stored: P, layout: Layout, vary: Axes, space: int = 0) -> Array:
    """A parameter gathered over the `parameters` axes of its layout; its gradient is reduce-scattered.

    Args:
        parameter: this device's shard.
        stored: its PartitionSpec.
        layout: names the axes over which it is gathered.
        vary: axes over which the data differ. The gradient is summed over them after it was scattered.
        space: how many leading dimensions are pixels, which are not gathered.
    """
    gathered: list[Axes] = [()] * space + gathered_axes(stored, layout)[space:]
    if not any(gathered):
        return parameter
    missing = tuple(a for a in vary if not any(a in axes_of(entry) for entry in stored))
    parameter = lax.pcast(parameter, missing, to="varying") if missing else parameter
    for dim, axes in enumerate(gathered):
        idle = [a for a in axes if a not in vary]
        if axes and not idle:
            parameter = lax.all_gather(parameter, axes, axis=dim, tiled=True)
            continue
        for axis in reversed(axes):  # over an idle axis every device has the same afterwards
            to = "invarying" if axis in idle else "varying"
            parameter = lax.all_gather(parameter, axis, axis=dim, tiled=True, to=to)
    return parameter


def gather_same(parameter: Array, stored: P, layout: Layout) -> Array:
    """`gather` for an operator that sums the gradient itself: each device slices its part out of the sum."""
    for dim, axes in enumerate(gathered_axes(stored, layout)):
        if axes:
            parameter = lax.all_gather(parameter, axes, axis=dim, tiled=True, to="invarying")
    return parameter


def gathered_axes(stored: P, layout: Layout) -> list[Axes]:
    """For every dimension of a stored parameter, the `parameters` axes that `gather` removes."""
    return [tuple(a for a in axes_of(entry) if a in axes_of(layout.parameters)) for entry in stored]
