"""Moving an activation from one layout to another, where layouts change along a network."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array, lax
from jaxtyping import Float

from shardtrain.layout import AnyMesh, Axes, Layout, active_mesh, axes_of, spec
from shardtrain.mesh import size
from shardtrain.ops import island

log = logging.getLogger(__name__)

Cuts = tuple[Axes, ...]


@dataclass(frozen=True)
class Move:
    """One step of a reshard: `axis` leaves dimension `source` and comes to cut dimension `target`.

    `"all-to-all"` does both, `"all-gather"` only the first, `"slice"` only the second, and sends nothing.
    """

    kind: Literal["all-to-all", "all-gather", "slice"]
    axis: str
    source: int = -1
    target: int = -1


def reshard(
    x: Float[Array, "batch *spatial channels"], before: Layout, after: Layout
) -> Float[Array, "batch *spatial channels"]:
    """`x`, cut as `before` says, cut as `after` says; the gradient goes back the same way.

    One island: an axis that comes to cut another dimension moves by an all-to-all of `(n-1)/n` of a
    device's block, one that cuts nothing afterwards by an all-gather, one that cut nothing by no
    communication at all. Where uneven blocks would not line up the change is left to XLA's partitioner,
    which is exact too but may gather the whole array; `moves` says which it is.

    Args:
        x: an activation, channels last.
        before, after: the layouts. A wrong `before` costs a second move, never a wrong number.

    Example:
        >>> with jax.set_mesh(make_mesh("data=2,height=4")):
        ...     reshard(jnp.ones((8, 16, 16, 4)), Layout(), Layout(batch=("data", "height"), height=()))
    """
    mesh = active_mesh()
    if mesh is None:
        return x
    old, new = (_cuts(layout, x.shape, mesh) for layout in (before, after))
    return move(x, old, new)


def move(x: Array, before: Cuts, after: Cuts) -> Array:
    """`reshard` for the axes that cut every dimension."""
    return x if before == after else _reshard(x, before, after)


def _cuts(layout: Layout, shape: Sequence[int], mesh: AnyMesh) -> Cuts:
    return tuple(axes_of(entry) for entry in layout.activation(shape, mesh))


def moves(shape: Sequence[int], before: Cuts, after: Cuts, mesh: AnyMesh) -> list[Move] | None:
    """The steps that lead from one cut of `shape` to another, None if blocks would not line up.

    An axis can leave a dimension only as its last (the fastest), and come only as the last of those that
    are to cut the dimension; whatever stands in its way is gathered.
    """
    for extent, old, new in zip(shape, before, after, strict=True):
        if old and new and old != new and (extent % size(mesh, old) or extent % size(mesh, new)):
            return None
    now = [list(axes) for axes in before]
    goal = {axis: dim for dim, axes in enumerate(after) for axis in axes}
    steps: list[Move] = []

    def ready(axis: str) -> bool:
        """All that are to come before `axis` in its new dimension are there, and nothing else."""
        dim = goal[axis]
        return tuple(now[dim]) == after[dim][: after[dim].index(axis)]

    while tuple(map(tuple, now)) != after:
        leaving = [(d, axes[-1]) for d, axes in enumerate(now) if tuple(axes) != after[d][: len(axes)]]
        absent = [a for a in goal if not any(a in axes for axes in now) and ready(a)]
        direct = [(d, a) for d, a in leaving if a in goal and goal[a] != d and ready(a)]
        if direct:
            dim, axis = direct[0]
            now[dim].pop()
            now[goal[axis]].append(axis)
            steps.append(Move("all-to-all", axis, dim, goal[axis]))
        elif absent:
            now[goal[absent[0]]].append(absent[0])
            steps.append(Move("slice", absent[0], target=goal[absent[0]]))
        else:
            dim, axis = leaving[0]
            now[dim].pop()
            steps.append(Move("all-gather", axis, dim))
    return steps


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
    if steps is None:
        log.warning(
            "%s cut by %s and then by %s: blocks do not line up, so XLA moves them by itself",
            "x".join(map(str, extents)),
            spec(before),
            spec(after),
        )
        return lax.with_sharding_constraint(x, spec(after))

    @jax.named_scope("reshard")
    def local(x: Array) -> Array:
        for step in steps:
            if step.kind == "all-to-all":
                x = lax.all_to_all(x, step.axis, step.target, step.source, tiled=True)
            elif step.kind == "all-gather":
                x = lax.all_gather(x, step.axis, axis=step.source, tiled=True, to="invarying")
            else:
                rows = x.shape[step.target] // size(mesh, step.axis)
                start = lax.axis_index(step.axis) * rows
                x = lax.dynamic_slice_in_dim(x, start, rows, step.target)
        return x

    either = [old or new for old, new in zip(before, after, strict=True)]
    y = island.run(local, mesh, (spec(before),), spec(after), island.fill_up(x, either, mesh))
    return island.crop_to(y, extents)
