"""Redistributes activations from one layout to another, where layouts change along a network."""

import functools
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from shardtrain.layout import AnyMesh, Axes, Layout, active_mesh, axes_of, chosen, spec
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.halo import sent_by

Cuts = tuple[Axes, ...]

SCOPE = "change of layout"
"""The `jax.named_scope` of the collectives of a reshard, in jaxprs and profiles."""


@dataclass(frozen=True)
class Move:
    """One step of a reshard.

    Attributes:
        kind: `"all-to-all"`: `axis`, the last of the axes that cut dimension `source`, cuts dimension
            `target` instead; `"all-gather"`: `axis` cuts no dimension any more; `"slice"`: `axis`, which cut
            nothing, cuts `target`, without communication; `"permute"`: devices exchange whole blocks.
        after: the axes that cut every dimension after this step.
        axis: the mesh axis that the step is about.
        source: the dimension that the axis cut before, -1 for none.
        target: the dimension that the axis cuts afterwards, -1 for none.
    """

    kind: Literal["all-to-all", "all-gather", "slice", "permute"]
    after: Cuts
    axis: str = ""
    source: int = -1
    target: int = -1


def reshard(
    x: Float[Array, "batch *spatial channels"], before: Layout, after: Layout
) -> Float[Array, "batch *spatial channels"]:
    """Redistributes an activation from one layout to another; its gradient is redistributed back.

    An axis that cuts another dimension afterwards takes an all-to-all, which sends `(n-1)/n` of a device's
    block; an axis that cuts nothing afterwards takes an all-gather; an axis that cut nothing before takes a
    slice, without communication; and where blocks only change their devices they are permuted. Among all
    sequences of such steps the one that sends the fewest bytes is taken.

    Args:
        x: an activation, channels last.
        before: the layout that `x` has. If it has another one, the numbers are right all the same, and XLA
            redistributes once more.
        after: the layout of the result.

    Returns:
        The same values in the layout `after`.

    Raises:
        UserError: arguments that are not layouts.

    Example:
        >>> early, late = st.Layout(), st.Layout(batch=("data", "height"), height=())
        >>> with jax.set_mesh(st.make_mesh("data=2,height=4")):
        ...     y = jax.jit(lambda x: st.ops.reshard(x, early, late))(jnp.ones((8, 16, 16, 4)))
        >>> y.sharding.spec[0]
        ('data', 'height')
    """
    mesh, before, after = active_mesh(), chosen(before), chosen(after)
    if mesh is None:
        return x
    old, new = (_cuts(layout, x.shape, mesh) for layout in (before, after))
    return move(x, old, new)


def move(x: Array, before: Cuts, after: Cuts) -> Array:
    """`reshard` for layouts given as the axes that cut every dimension."""
    return x if before == after else _reshard(x, before, after)


def _cuts(layout: Layout, shape: Sequence[int], mesh: AnyMesh) -> Cuts:
    return tuple(axes_of(entry) for entry in layout.activation(shape, mesh))


@functools.lru_cache(maxsize=1024)
def moves(shape: tuple[int, ...], before: Cuts, after: Cuts, mesh: AnyMesh) -> list[Move]:
    """The sequence of steps from one cut of `shape` to another that sends the fewest bytes.

    A dimension whose old and new blocks are padded to different extents is gathered first.

    Args:
        shape: of the global array.
        before: the axes that cut every dimension at first.
        after: the axes that cut every dimension at last.
        mesh: the mesh.
    """
    uneven = [
        _padded_differently(n, old, new, mesh) for n, old, new in zip(shape, before, after, strict=True)
    ]
    steps, now = [], before
    for dim in itertools.compress(range(len(shape)), uneven):
        for axis in reversed(before[dim]):
            now = _with(now, dim, now[dim][:-1])
            steps.append(Move("all-gather", now, axis, source=dim))
    cuts = [old or new for old, new in zip(now, after, strict=True)]
    blocks = [island.round_up(n, axes, mesh) for n, axes in zip(shape, cuts, strict=True)]
    return steps + _cheapest(tuple(blocks), now, after, mesh)


def _padded_differently(extent: int, old: Axes, new: Axes, mesh: AnyMesh) -> bool:
    """Whether old and new blocks of a dimension are padded to different extents."""
    uneven = extent % size(mesh, old) or extent % size(mesh, new)
    return bool(
        old and new and uneven and island.round_up(extent, old, mesh) != island.round_up(extent, new, mesh)
    )


def _with(cuts: Cuts, dim: int, axes: Axes) -> Cuts:
    return (*cuts[:dim], axes, *cuts[dim + 1 :])


def _cheapest(shape: tuple[int, ...], start: Cuts, goal: Cuts, mesh: AnyMesh) -> list[Move]:
    """Dijkstra's shortest path: the nodes are cuts of `shape`, the lengths of the edges are bytes sent."""
    paid: dict[Cuts, float] = {start: 0.0}
    came: dict[Cuts, tuple[Cuts, Move]] = {}
    queue = [(0.0, 0, start)]
    tickets = itertools.count(1)  # among equal costs the first found; steps cost a little, so few of them
    while queue:
        cost, _, here = heapq.heappop(queue)
        if here == goal:
            break
        if cost > paid[here]:
            continue
        for move, price in _next(shape, here, goal, mesh):
            total = cost + price + 1e-6
            if total < paid.get(move.after, math.inf):
                paid[move.after] = total
                came[move.after] = here, move
                heapq.heappush(queue, (total, next(tickets), move.after))
    path = []
    while here != start:
        here, move = came[here]
        path.append(move)
    return path[::-1]


def _next(shape: tuple[int, ...], here: Cuts, goal: Cuts, mesh: AnyMesh) -> Iterator[tuple[Move, float]]:
    """The steps that are possible from `here`, each with what it sends as a share of the global array."""
    block = 1 / math.prod(size(mesh, axes) for axes in here)
    used = {a for axes in here for a in axes}

    def fits(dim: int, axis: str) -> bool:
        return shape[dim] % (size(mesh, here[dim]) * size(mesh, axis)) == 0

    dims = range(len(shape))
    for dim in dims:
        if not here[dim]:
            continue
        rest, axis = here[dim][:-1], here[dim][-1]
        n = size(mesh, axis)
        without = _with(here, dim, rest)
        yield Move("all-gather", without, axis, source=dim), (n - 1) * block
        for to in dims:
            if to != dim and fits(to, axis):
                there = _with(without, to, (*here[to], axis))
                yield Move("all-to-all", there, axis, dim, to), (n - 1) / n * block
    for axis in sorted({a for axes in goal for a in axes} - used):  # sorted: all processes must choose alike
        for to in dims:
            if fits(to, axis):
                yield Move("slice", _with(here, to, (*here[to], axis)), axis, target=to), 0.0
    for there in _orders(here, goal, mesh):
        yield Move("permute", there), block


def _orders(here: Cuts, goal: Cuts, mesh: AnyMesh) -> Iterator[Cuts]:
    """Cuts that permutes reach: the goal, one axis of a dimension made its last, or two axes exchanged."""

    def blocks(cuts: Cuts) -> tuple[list[str], list[int]]:
        return sorted(a for axes in cuts for a in axes), [size(mesh, axes) for axes in cuts]

    if here != goal and blocks(here) == blocks(goal):
        yield goal
    for dim, axes in enumerate(here):
        for axis in axes[:-1]:
            yield _with(here, dim, (*(a for a in axes if a != axis), axis))
    for first, second in itertools.combinations([a for axes in here for a in axes], 2):
        if size(mesh, first) == size(mesh, second):
            change = {first: second, second: first}
            yield tuple(tuple(change.get(a, a) for a in axes) for axes in here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: Array, before: Cuts, after: Cuts) -> Array:
    return _move(x, before, after)


def _forward(x: Array, before: Cuts, after: Cuts) -> tuple[Array, None]:
    return _move(x, before, after), None


def _backward(before: Cuts, after: Cuts, _: None, cotangent: Array) -> tuple[Array]:
    return (_move(cotangent, after, before),)


_reshard.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("before", "after"))
def _move(x: Array, before: Cuts, after: Cuts) -> Array:
    mesh = active_mesh()
    assert mesh is not None
    extents = x.shape
    steps = moves(extents, before, after, mesh)

    @jax.named_scope(SCOPE)
    def local(x: Array) -> Array:
        now = before
        for step in steps:
            if step.kind == "all-to-all":
                x = lax.all_to_all(x, step.axis, step.target, step.source, tiled=True)
            elif step.kind == "all-gather":
                x = lax.all_gather(x, step.axis, axis=step.source, tiled=True, to="invarying")
                if (
                    after[step.source] and not step.after[step.source]
                ):  # now whole, and padded as `after` cuts it
                    rows = island.round_up(extents[step.source], after[step.source], mesh)
                    x = _repadded(x, step.source, extents[step.source], rows)
            elif step.kind == "slice":
                rows = x.shape[step.target] // size(mesh, step.axis)
                x = lax.dynamic_slice_in_dim(x, lax.axis_index(step.axis) * rows, rows, step.target)
            else:
                x = _permuted(x, now, step.after, mesh)
            now = step.after
        return x

    either = [old or new for old, new in zip(before, after, strict=True)]
    y = island.run(local, mesh, (spec(before),), spec(after), island.pad_to_blocks(x, either, mesh))
    return island.crop_to(y, extents)


def _repadded(x: Array, dim: int, extent: int, rows: int) -> Array:
    """The array with dimension `dim`, which is whole, padded to `rows` instead of its present extent."""
    x = lax.slice_in_dim(x, 0, min(extent, x.shape[dim]), axis=dim)
    return island.pad_to(x, [*x.shape[:dim], rows, *x.shape[dim + 1 :]])


def _permuted(x: Array, here: Cuts, there: Cuts, mesh: AnyMesh) -> Array:
    """The block that this device has under the cut `there`, sent by the device that has it under `here`."""
    axes = tuple(a for cut in here for a in cut)
    places = [dict(zip(axes, place, strict=True)) for place in np.ndindex(*(size(mesh, a) for a in axes))]

    def block(place: Mapping[str, int], cuts: Cuts) -> tuple[int, ...]:
        """The index of the block at `place` in every dimension that is cut."""
        shapes = [[size(mesh, a) for a in cut] for cut in cuts if cut]
        numbers = [[place[a] for a in cut] for cut in cuts if cut]
        return tuple(int(np.ravel_multi_index(n, s)) for n, s in zip(numbers, shapes, strict=True))

    owner = {block(place, here): i for i, place in enumerate(places)}
    senders = [owner[block(place, there)] for place in places]
    return sent_by(x, senders, axes, grouped=island.grouped(mesh))
