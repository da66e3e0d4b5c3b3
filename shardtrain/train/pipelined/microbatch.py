"""What one microbatch is: on global arrays, and on one device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardtrain.layout import Axes
from shardtrain.mesh import REPLICA
from shardtrain.pipeline.localize.evaluate import Cut, cut_of
from shardtrain.train.batch import Batch

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Microbatch:
    """What one microbatch is, on global arrays and on one device.

    Attributes:
        shapes: of inputs, targets, the mask of real rows if there is one, and the rows' numbers; leaves.
        cuts: how each lies.
        tree: the four of them.
        inputs: how many leaves are the model's inputs.
        parts: microbatches in a batch.
        rows: the mesh axes that cut the rows, `replica` among them: each replica has examples of its own.
    """

    shapes: tuple[Shape, ...]
    cuts: tuple[Cut, ...]
    tree: Any
    inputs: int
    parts: int
    rows: Axes

    @classmethod
    def of(cls, batch: Batch, parts: int) -> "Microbatch":
        given = jax.tree.leaves((batch.inputs, batch.targets))
        axes = cut_of(given[0].sharding.spec, given[0].ndim)[0]
        rows = batch.rows // (given[0].sharding.mesh.shape[REPLICA] if REPLICA in axes else 1)
        shapes = [Shape((rows, *extents), x.dtype) for x, extents in zip(given, batch.extents, strict=True)]
        _, tree = jax.tree.flatten((batch.inputs, batch.targets))
        inputs, targets = jax.tree.unflatten(tree, shapes)
        real = None if batch.real is None else Shape((rows,), batch.real.dtype)
        leaves, tree = jax.tree.flatten((inputs, targets, real, Shape((rows,), jnp.int32)))
        cuts = [cut_of(x.sharding.spec, x.ndim) for x in given]
        cuts = [(tuple(a for a in cut[0] if a != REPLICA), *cut[1:]) for cut in cuts]
        cuts += [cuts[0][:1]] * (len(leaves) - len(cuts))
        shapes = [Shape((rows // parts, *x.shape[1:]), x.dtype) for x in leaves]
        return cls(tuple(shapes), tuple(cuts), tree, len(jax.tree.leaves(inputs)), parts, axes)

    def blocks(self, batch: Batch) -> Callable[[Array], list[Array]]:
        """On a device: its blocks of microbatch `i`, which holds the examples `i, i+m, i+2m, ...`."""
        mine = jax.tree.leaves(batch.inputs)[0].shape[0]
        index = (lax.axis_index(self.rows) * mine if self.rows else 0) + jnp.arange(mine, dtype=jnp.int32)
        leaves = jax.tree.leaves((batch.inputs, batch.targets, batch.real, index))

        def part(i: Array) -> list[Array]:
            rows = [x.reshape(mine // self.parts, self.parts, *x.shape[1:]) for x in leaves]
            return [lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in rows]

        return part
