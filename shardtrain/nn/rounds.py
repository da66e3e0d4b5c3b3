"""From data parallel layers to model parallel ones: whose examples travel when."""

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
from shardtrain.nn.base import Partitioned, name, placed
from shardtrain.nn.examples import current_examples, examples

Scheme = Literal["gather", "turns", "spread"]


class Rounds(Partitioned, nnx.Module):
    """Calls the layers that follow on a part of the batch at a time, with the numbers of the whole batch.

    Stands where K devices along `axis`, each with B examples so far, go on as one that cuts the features:
    every device needs all K*B examples. Its layout must cut the batch by `axis` last, as the layers before
    it do, and the layers that it calls cut their channels by `axis`.

    - `"gather"`: all K*B examples at once, in one round.
    - `"turns"`: in round k the B examples of device k, which deals them out; the layers' own change of
      layout does the rest, so the two together are a broadcast.
    - `"spread"`: in every round B/K examples of each device, so all devices send equally much.

    Only `"turns"` sends more: see `ops.take_turn`. Whatever the layers sum over other axes, such as
    gradients over `data`, they sum in every round. The rounds of the backward pass come after all those
    of the forward pass. In evaluation mode there is one round.

    Args:
        scheme: one of these.
        axis: the mesh axis.
        remat: keep of a round only its examples, and do its forward pass again, with what it sends, in the
            backward pass: then the activations of one round at most are held at a time.

    Raises:
        UserError: at construction, another scheme. When called on a mesh, before anything is compiled: a
            layout that does not cut the batch by `axis` last, a batch that does not divide into rounds,
            and layers with statistics of the batch, which would be those of a round.

    Example:
        >>> def classify(model, x):
        ...     return model.head(nnx.relu(model.hidden(x)))
        >>> y = self.rounds(classify, self, x)  # doctest: +SKIP

    References:
        Krizhevsky, One Weird Trick for Parallelizing Convolutional Neural Networks, 2014, section 3.
    """

    def __init__(self, scheme: str = "gather", axis: str = "channel", *, remat: bool = False) -> None:
        if scheme not in get_args(Scheme):
            raise UserError(f"nn.Rounds: scheme={scheme!r}; use {', '.join(map(repr, get_args(Scheme)))}")
        self.scheme, self.axis, self.remat = scheme, axis, remat
        self.deterministic = False  # what model.eval() sets

    def __call__(self, function: Callable[[Any, Array], Array], module: nnx.Module, x: Array) -> Array:
        """`function(module, x)`, in rounds."""
        mesh = active_mesh()
        x = self.whole(x)
        rounds = 1 if mesh is None or self.scheme == "gather" or self.deterministic else size(mesh, self.axis)
        if rounds == 1:
            return function(module, x)
        parts = self._parts(x.shape[0], rounds)

        def dealt(rows: Array | None) -> Array | None:
            """`(batch, ...)` as `(rounds, part, ...)`."""
            return None if rows is None else _swapped(rows, parts, rounds)

        here = current_examples(x.shape[0])
        graph, random, rest = nnx.split(module, nnx.RngState, ...)  # type: ignore[misc]

        def one(_: Any, share: tuple[Any, ...]) -> tuple[Any, Array]:
            number, rows, index, real = share
            inside: Any = nnx.merge(graph, random, rest, copy=True)  # streams start anew: drawn by example
            with examples(index, real):
                y = function(inside, self.part(x if rows is None else rows, number))
            _, after, changed = nnx.split(inside, nnx.RngState, ...)  # type: ignore[misc]
            _check_same(rest, changed)
            return after, y

        rows = None if self.scheme == "turns" else dealt(x)
        shares = jnp.arange(rounds), rows, dealt(here.index), dealt(here.real)
        after, y = lax.scan(jax.checkpoint(one) if self.remat else one, random, shares)
        nnx.update(module, after)
        return _swapped(y.reshape(-1, *y.shape[2:]), rounds, parts).reshape(-1, *y.shape[2:])

    def _parts(self, rows: int, rounds: int) -> int:
        """How many runs of neighbouring examples make up a round."""
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

    @placed
    def whole(self, x: Array) -> Array:
        """The batch, cut as this layer's layout says."""
        return x

    @placed
    def part(self, x: Array, number: Array) -> Array:
        """The examples of a round, cut as the batch is."""
        if self.scheme == "spread":
            return x
        return ops.take_turn(x, number, layout=self.layout, axis=self.axis)


def _swapped(rows: Array, outer: int, inner: int) -> Array:
    """`(outer * inner * n, ...)` as `(inner, outer * n, ...)`."""
    split = rows.reshape(outer, inner, -1, *rows.shape[1:])
    return jnp.swapaxes(split, 0, 1).reshape(inner, -1, *rows.shape[1:])


def _check_same(before: nnx.State, after: nnx.State) -> None:
    """Refuses what a round has changed besides random streams."""
    old = {path: variable.get_value() for path, variable in nnx.to_flat_state(before)}
    for path, variable in nnx.to_flat_state(after):
        if variable.get_value() is not old.get(path):
            raise UserError(
                f"nn.Rounds: {name(path)!r} changes in a round, as statistics of the batch do, and would be "
                f"that of a part of the batch; use scheme='gather', or layers without such statistics"
            )
