"""The transition from data-parallel layers to model-parallel ones, in one or several rounds."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from shardtrain import ops
from shardtrain.errors import UserError
from shardtrain.layout import active_mesh
from shardtrain.mesh import size
from shardtrain.nn.base import Partitioned, in_layout, name
from shardtrain.nn.examples import current_examples, examples

Scheme = Literal["gather", "turns", "spread"]


class Rounds(Partitioned, nnx.Module):
    """Runs the layers that follow on parts of the batch, one after the other, with the same results.

    It belongs where the K devices along a mesh axis pass from data to model parallelism: layers before it cut
    their batch by the axis, B examples a device; layers after it cut their channels by the axis, so that each
    of their devices needs all K*B examples. The layout of this layer must cut the batch as the layers before
    it do, by `axis` last. There are three schemes:

    - `"gather"`: one round with all K*B examples.
    - `"turns"`: round k has the B examples of device k. The device distributes them evenly, and the layers
      that follow gather them; the two together are a broadcast. See `shardtrain.ops.take_turn`, by which this
      scheme sends more bytes than the others.
    - `"spread"`: every round has B/K examples of each device, so that all devices send equally much.

    Sums over other axes, such as those of gradients over `data`, are made in every round. The backward pass
    runs its rounds after all rounds of the forward pass. In evaluation mode there is one round.

    Args:
        scheme: `"gather"`, `"turns"` or `"spread"`.
        axis: the mesh axis.
        remat: whether to save only the examples of each round and to recompute its forward pass, with its
            communication, in the backward pass; the activations of one round at a time are then in memory.

    Raises:
        UserError: at construction, for an unknown scheme. When called on a mesh, for a layout that does not
            cut the batch by `axis` last, for a batch that does not divide into the rounds, and for layers
            with batch statistics, which would be those of a round.

    Example:
        >>> class Classifier(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.rounds = st.nn.Rounds("spread")
        ...         self.hidden = st.nn.Linear(16, 32, rngs=rngs)
        ...         self.head = st.nn.Linear(32, 10, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.rounds(Classifier.classify, self, x)
        ...     def classify(self, x):
        ...         return self.head(nnx.relu(self.hidden(x)))
        >>> Classifier(nnx.Rngs(0))(jnp.ones((8, 16))).shape
        (8, 10)

    References:
        Krizhevsky, One Weird Trick for Parallelizing Convolutional Neural Networks, 2014, section 3.
    """

    def __init__(self, scheme: str = "gather", axis: str = "channel", *, remat: bool = False) -> None:
        if scheme not in get_args(Scheme):
            raise UserError(f"nn.Rounds: scheme={scheme!r}; use {', '.join(map(repr, get_args(Scheme)))}")
        self.scheme, self.axis, self.remat = scheme, axis, remat
        self.deterministic = False  # what model.eval() sets

    def __call__(self, function: Callable[[Any, Array], Array], module: nnx.Module, x: Array) -> Array:
        """`function(module, x)`, computed in rounds on a mesh."""
        mesh = active_mesh()
        x = self.whole(x)
        rounds = 1 if mesh is None or self.scheme == "gather" or self.deterministic else size(mesh, self.axis)
        if rounds == 1:
            return function(module, x)
        parts = self._parts(x.shape[0], rounds)

        def by_round(rows: Array | None) -> Array | None:
            """`(batch, ...)` as `(rounds, part, ...)`."""
            return None if rows is None else _swapped(rows, parts, rounds)

        here = current_examples(x.shape[0])
        graph, random, rest = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]

        def one(_: Any, share: tuple[Any, ...]) -> tuple[Any, Array]:
            number, rows, index, real = share
            inside: Any = nnx.merge(graph, random, rest, copy=True)  # dropout draws by example
            with examples(index, real):
                y = function(inside, self.part(x if rows is None else rows, number))
            _, after, changed = nnx.split(inside, nnx.RngState, ...)  # type: ignore[misc]
            _check_same(rest, changed)
            return after, y

        rows = None if self.scheme == "turns" else by_round(x)
        shares = jnp.arange(rounds), rows, by_round(here.index), by_round(here.real)
        after, y = lax.scan(jax.checkpoint(one) if self.remat else one, random, shares)
        nnx.update(module, after)
        return _swapped(y.reshape(-1, *y.shape[2:]), rounds, parts).reshape(-1, *y.shape[2:])

    def _parts(self, rows: int, rounds: int) -> int:
        """How many runs of neighbouring examples a round consists of."""
        mesh = active_mesh()
        assert mesh is not None
        batch = self.layout.cut("batch", mesh)
        if batch[-1:] != (self.axis,):
            raise UserError(
                f"layer {self.path!r}: its batch is cut by {'*'.join(batch) or 'nothing'}, and the last axis "
                f"must be {self.axis!r}; put {self.path!r} into the layout table with the layers before it, "
                f"such as {{'batch': ('data', {self.axis!r}), 'channels': ()}}"
            )
        shards = size(mesh, batch)
        if rows % (shards * rounds):
            raise UserError(
                f"layer {self.path!r}: a batch of {rows} does not divide into {rounds} rounds on "
                f"{'*'.join(batch)}={shards} devices; use a multiple of {shards * rounds}"
            )
        return shards if self.scheme == "spread" else shards // rounds

    @in_layout
    def whole(self, x: Array) -> Array:
        """The batch in this layer's layout, to which `in_layout` redistributes it."""
        return x

    @in_layout
    def part(self, x: Array, number: Array) -> Array:
        """The examples of a round in the layout of the batch."""
        if self.scheme == "spread":
            return x
        return ops.take_turn(x, number, layout=self.layout, axis=self.axis)


def _swapped(rows: Array, outer: int, inner: int) -> Array:
    """`(outer * inner * n, ...)` as `(inner, outer * n, ...)`."""
    split = rows.reshape(outer, inner, -1, *rows.shape[1:])
    return jnp.swapaxes(split, 0, 1).reshape(inner, -1, *rows.shape[1:])


def _check_same(before: nnx.State, after: nnx.State) -> None:
    """Refuses changes to variables other than random streams within a round."""
    old = {path: variable.get_value() for path, variable in nnx.to_flat_state(before)}
    for path, variable in nnx.to_flat_state(after):
        if variable.get_value() is not old.get(path):
            raise UserError(
                f"nn.Rounds: {name(path)!r} changes in a round, as statistics of the batch do, and would be "
                f"that of a part of the batch; use scheme='gather', or layers without such statistics"
            )
