"""Moving an activation from one layout to another, where layouts change along a network."""

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
"""Names what a reshard sends, in jaxprs and profiles."""


@dataclass(frozen=True)
class Move:
    """One step of a reshard.

    Attributes:
        kind: `"all-to-all"`: the last of the axes that cut dimension `source` comes to cut `target`;
            `"all-gather"`: it leaves, and cuts nothing; `"slice"`: `axis` comes to cut `target` and sends
            nothing; `"permute"`: whole blocks change places.
        axis: the axis that moves.
        source, target: dimensions.
        after: the axes that cut every dimension after this step.
    """

    kind: Literal["all-to-all", "all-gather", "slice", "permute"]
    after: Cuts
    axis: str = ""
    source: int = -1
    target: int = -1


def reshard(
    x: Float[Array, "batch *spatial channels"], before: Layout, after: Layout
) -> Float[Array, "batch *spatial channels"]:
    """`x`, cut as `before` says, cut as `after` says; the gradient goes back the same way.

    One island: an axis that comes to cut another dimension moves by an all-to-all of `(n-1)/n` of a
    device's block, one that cuts nothing afterwards by an all-gather, one that cut nothing by no
    communication at all, and where only the places of blocks change, they are permuted. Of all ways to
    get there by such steps it goes the one that sends the fewest bytes.

    Args:
        x: an activation, channels last.
        before, after: the layouts. A wrong `before` costs a second move, never a wrong number.

    Raises:
        UserError: something else than two layouts.

    Example:
        >>> with jax.set_mesh(make_mesh("data=2,height=4")):
        ...     reshard(jnp.ones((8, 16, 16, 4)), Layout(), Layout(batch=("data", "height"), height=()))
    """
    mesh, before, after = active_mesh(), chosen(before), chosen(after)
    if mesh is None:
        return x
    old, new = (_cuts(layout, x.shape, mesh) for layout in (before, after))
    return move(x, old, new)


def move(x: Array, before: Cuts, after: Cuts) -> Array:
    """`reshard` for the axes that cut every dimension."""
    return x if before == after else _reshard(x, before, after)


def _cuts(layout: Layout, shape: Sequence[int], mesh: AnyMesh) -> Cuts:
    return tuple(axes_of(entry) for entry in layout.activation(shape, mesh))


@functools.lru_cache(maxsize=1024)
def moves(shape: tuple[int, ...], before: Cuts, after: Cuts, mesh: AnyMesh) -> list[Move]:
    """The steps that lead from one cut of `shape` to another and send the fewest bytes.

    Args:
        shape: of the whole array.
        before, after: the axes that cut every dimension.
        mesh: says how many devices an axis has.

    A dimension whose old and new blocks are both padded and do not line up is gathered first.
    """
    torn = [_torn(n, old, new, mesh) for n, old, new in zip(shape, before, after, strict=True)]
    steps, now = [], before
    for dim in itertools.compress(range(len(shape)), torn):
        for axis in reversed(before[dim]):
            now = _with(now, dim, now[dim][:-1])
            steps.append(Move("all-gather", now, axis, source=dim))
    cuts = [old or new for old, new in zip(now, after, strict=True)]
    blocks = [island.round_up(n, axes, mesh) for n, axes in zip(shape, cuts, strict=True)]
    return steps + _cheapest(tuple(blocks), now, after, mesh)


def _torn(extent: int, old: Axes, new: Axes, mesh: AnyMesh) -> bool:
    """Whether old and new blocks of a dimension are padded to different extents."""
    uneven = extent % size(mesh, old) or extent % size(mesh, new)
    return bool(
        old and new and uneven and island.round_up(extent, old, mesh) != island.round_up(extent, new, mesh)
    )


def _with(cuts: Cuts, dim: int, axes: Axes) -> Cuts:
    return (*cuts[:dim], axes, *cuts[dim + 1 :])


def _cheapest(shape: tuple[int, ...], start: Cuts, goal: Cuts, mesh: AnyMesh) -> list[Move]:
    """Dijkstra's shortest path: places are cuts of `shape`, the way from one to the next is bytes sent."""
    paid: dict[Cuts, float] = {start: 0.0}
    came: dict[Cuts, tuple[Cuts, Move]] = {}
    queue = [(0.0, 0, start)]
    tickets = itertools.count(1)  # of equal costs the first found, and fewest steps: a step costs a little
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
    """The steps that can be made from `here` and what each sends, in shares of the whole array."""
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
    for axis in sorted({a for axes in goal for a in axes} - used):  # all processes must go the same way
        for to in dims:
            if fits(to, axis):
                yield Move("slice", _with(here, to, (*here[to], axis)), axis, target=to), 0.0
    for there in _orders(here, goal, mesh):
        yield Move("permute", there), block


def _orders(here: Cuts, goal: Cuts, mesh: AnyMesh) -> Iterator[Cuts]:
    """Cuts into as many blocks by the same axes: the goal, one axis made the last, or two exchanged."""

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
                if after[step.source] and not step.after[step.source]:  # whole: padded as it will be cut
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
    y = island.run(local, mesh, (spec(before),), spec(after), island.fill_up(x, either, mesh))
    return island.crop_to(y, extents)


def _repadded(x: Array, dim: int, extent: int, rows: int) -> Array:
    """A dimension that is whole, padded to `rows` instead of what it was."""
    x = lax.slice_in_dim(x, 0, min(extent, x.shape[dim]), axis=dim)
    return island.pad_to(x, [*x.shape[:dim], rows, *x.shape[dim + 1 :]])


def _permuted(x: Array, here: Cuts, there: Cuts, mesh: AnyMesh) -> Array:
    """Every device's block as `there` cuts, from the one that has it as `here` cuts."""
    axes = tuple(a for cut in here for a in cut)
    places = [dict(zip(axes, place, strict=True)) for place in np.ndindex(*(size(mesh, a) for a in axes))]

    def block(place: Mapping[str, int], cuts: Cuts) -> tuple[int, ...]:
        """Its number in every dimension; in none that is not cut."""
        shapes = [[size(mesh, a) for a in cut] for cut in cuts if cut]
        numbers = [[place[a] for a in cut] for cut in cuts if cut]
        return tuple(int(np.ravel_multi_index(n, s)) for n, s in zip(numbers, shapes, strict=True))

    owner = {block(place, here): i for i, place in enumerate(places)}
    senders = [owner[block(place, there)] for place in places]
    return sent_by(x, senders, axes, grouped=island.grouped(mesh))
