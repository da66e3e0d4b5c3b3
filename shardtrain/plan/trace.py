"""The collectives of a jaxpr, before it is compiled.

The operators of this package write their communication out, so a trace already has every collective with its
shape. Tracing needs neither devices nor compilation. Tests compare the two: the census of the compiled
program must have the same bytes. What a model computes between the operators, XLA partitions; where it may
have to move something for that, `left_to_xla` says so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from shardtrain import jaxprs
from shardtrain.mesh import size
from shardtrain.pipeline.localize.rules import elementwise
from shardtrain.plan.census import ring

_KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "ppermute": "collective-permute",
    "all_to_all": "all-to-all",
}


_IN_PLACE = frozenset(
    {*elementwise.RULES, "broadcast_in_dim", "copy", "iota", "name", "optimization_barrier", "pad", "slice"}
)
"""Operations that move nothing; by the last two uneven arrays enter and leave an operator of this package."""

_FOLDS = frozenset({"expand_dims", "reduce_sum", "reshape", "squeeze"})
"""Operations that move nothing where they change dimensions of extent 1 alone."""


@dataclass(frozen=True)
class Sent:
    """One array that one collective of a jaxpr sends.

    Attributes:
        kind: kind of the collective, as in the census.
        axes: mesh axes that the collective spans.
        payload: bytes of the operand on one device, in one run.
        bytes: bytes that one device sends in all runs by the ring algorithm.
        scope: the named scopes in which it was traced.
    """

    kind: str
    axes: tuple[str, ...]
    payload: int
    bytes: int
    scope: str


def sent(jaxpr: Any, mesh: Mesh | AbstractMesh) -> list[Sent]:
    """Returns the collectives of a jaxpr; one in a loop counts as often as the loop runs.

    All branches of a conditional are counted, and one trip of a loop whose length is not known. Collectives
    that XLA adds when it partitions an operator by itself are not in a jaxpr.

    Args:
        jaxpr: the jaxpr, without its constants.
        mesh: the mesh that it was traced for.

    Example:
        >>> mesh = st.make_mesh("data=8")
        >>> total = jax.shard_map(
        ...     lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
        ... )
        >>> [(s.kind, s.axes, s.bytes) for s in sent(jax.make_jaxpr(total)(jnp.ones(8, "f4")).jaxpr, mesh)]
        [('all-reduce', ('data',), 7)]
    """
    return list(_sent(jaxpr, mesh, "", 1))


def _sent(jaxpr: Any, mesh: Mesh | AbstractMesh, scope: str, times: int) -> Iterator[Sent]:
    for equation in jaxpr.eqns:
        here = f"{scope}/{equation.source_info.name_stack}"
        kind = _KINDS.get(equation.primitive.name)
        if kind is not None:
            yield from _rows(kind, equation, mesh, here, times)
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs.inner_jaxprs(equation):
            yield from _sent(inner, mesh, here, times * trips)


def _rows(kind: str, equation: Any, mesh: Mesh | AbstractMesh, scope: str, times: int) -> Iterator[Sent]:
    params = equation.params
    named = params["axes"] if "axes" in params else params["axis_name"]
    axes = tuple(a for a in (named if isinstance(named, tuple) else (named,)) if isinstance(a, str))
    groups = params.get("axis_index_groups")
    n = len(groups[0]) if groups else size(mesh, axes)
    if n == 1:
        return
    axes = tuple(a for a in mesh.axis_names if a in axes)
    for operand in equation.invars:
        payload = math.prod(operand.aval.shape) * operand.aval.dtype.itemsize
        yield Sent(kind, axes, payload, ring(kind, n, payload * times), scope)


def left_to_xla(jaxpr: Any) -> bool:
    """Whether XLA may have to move something for what a jaxpr computes outside of `shard_map`.

    It moves nothing for an operation on each element by itself, however arrays are cut. For sums over a
    dimension, products of matrices, changes of the shape and the like it may, which a jaxpr does not show.

    Args:
        jaxpr: the jaxpr, without its constants.

    Example:
        >>> from shardtrain.plan.trace import left_to_xla
        >>> x = jnp.ones((8, 4, 4, 3))
        >>> left_to_xla(jax.make_jaxpr(nnx.relu)(x).jaxpr), left_to_xla(jax.make_jaxpr(jnp.fft.fft)(x).jaxpr)
        (False, True)
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            continue
        inner = list(jaxprs.inner_jaxprs(equation))
        if any(map(left_to_xla, inner)) or not (inner or _stays_in_place(equation)):
            return True
    return False


def _stays_in_place(equation: Any) -> bool:
    name = equation.primitive.name
    if name not in _FOLDS:
        return name in _IN_PLACE
    return _long(equation.invars[0].aval.shape) == _long(equation.outvars[0].aval.shape)


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the dimensions of extent 1, which are never cut."""
    return tuple(extent for extent in shape if extent > 1)
