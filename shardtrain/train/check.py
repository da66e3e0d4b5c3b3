"""Finds, in a traced step, operators outside the islands that XLA would get wrong or replicate."""

from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.mesh import SPATIAL, size

_WINDOWED = {
    "conv_general_dilated": ("convolution", "shardtrain.ops.conv or shardtrain.nn.Conv"),
    "reduce_window_max": ("max pooling", "shardtrain.ops.max_pool"),
    "reduce_window_sum": ("average pooling", "shardtrain.ops.avg_pool"),
    "reduce_window": ("window reduction", "shardtrain.ops.max_pool or avg_pool"),
}


def refuse_outside_islands(jaxpr: Any, mesh: Mesh) -> None:
    """Raises for convolutions and pooling that are left to XLA on a mesh where it cannot be trusted.

    On cut pixels or channels XLA's partitioner returns wrong convolutions (height x output channels) and
    replicates uneven outputs; a grouped convolution gathers the whole batch on every device even on a
    data-parallel mesh (openxla/xla#47945).

    Raises:
        UserError: names the operator, where it stands, and what to use instead.
    """
    cut = [axis for axis in (*SPATIAL, "channel") if size(mesh, axis) > 1]
    for equation in _equations(jaxpr):
        name = equation.primitive.name
        if name not in _WINDOWED:
            continue
        what, instead = _WINDOWED[name]
        grouped = equation.params.get("feature_group_count", 1) > 1
        if cut:
            reason = f"which XLA gets wrong or replicates on a mesh with {cut[0]}={size(mesh, cut[0])}"
        elif grouped and mesh.size > 1:
            reason = "with groups, for which XLA gathers the whole batch on every device"
        else:
            continue
        raise UserError(
            f"the model has a {what} outside shardtrain's operators ({compat.where(equation)}), {reason}; "
            f"use {instead}"
        )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations that are not inside a `shard_map`."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            continue
        yield equation
        for inner in compat.inner_jaxprs(equation):
            yield from _equations(inner)
