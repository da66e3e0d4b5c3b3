"""The examples of one microbatch: their global arrays, and the blocks of one device."""

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
    """The arrays of one microbatch, all of the same shapes.

    Attributes:
        shapes: of the leaves of `(inputs, targets, mask of real rows or None, numbers of the rows)`.
        cuts: for each leaf the mesh axes that cut its dimensions.
        tree: of these four.
        inputs: how many leaves are the model's inputs; they come first.
        parts: how many microbatches a batch has.
        rows: the mesh axes that cut the rows of a batch, `replica` among them: each replica has examples of
            its own.
    """

    shapes: tuple[Shape, ...]
    cuts: tuple[Cut, ...]
    tree: Any
    inputs: int
    parts: int
    rows: Axes

    @classmethod
    def of(cls, batch: Batch, parts: int) -> "Microbatch":
        """Returns the microbatch of a batch that is cut into `parts`."""
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
        """Returns a function that gives this device's blocks of microbatch `i`; within a `shard_map`.

        Microbatch `i` of `m` has the examples `i, i+m, i+2m, ...`, so that no example is moved.
        """
        own = jax.tree.leaves(batch.inputs)[0].shape[0]
        first = lax.axis_index(self.rows) * own if self.rows else 0
        index = first + jnp.arange(own, dtype=jnp.int32)
        leaves = jax.tree.leaves((batch.inputs, batch.targets, batch.real, index))

        def part(i: Array) -> list[Array]:
            rows = [x.reshape(own // self.parts, self.parts, *x.shape[1:]) for x in leaves]
            return [lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in rows]

        return part
