"""What a program sends, read from its jaxpr before any compiler has seen it.

Our operators write their communication out, so a trace already holds every collective with its shape. It
needs no device and no compilation, and it is what XLA's program is held to: the census of the compiled
program must have the same bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from shardtrain import jaxprs
from shardtrain.mesh import size
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


@dataclass(frozen=True)
class Sent:
    """One array that one collective of a jaxpr moves.

    Attributes:
        kind: as in the census.
        axes: the mesh axes that it crosses.
        payload: bytes of the operand on one device, for one run.
        bytes: what one device sends in all runs by the ring algorithm.
        scope: the named scopes it was traced in.
    """

    kind: str
    axes: tuple[str, ...]
    payload: int
    bytes: int
    scope: str


def sent(jaxpr: Any, mesh: Mesh | AbstractMesh) -> list[Sent]:
    """The collectives of a jaxpr, those in loops as often as the loop runs.

    All branches of a conditional are counted, and one trip of a loop whose length is not known. Operators
    that XLA partitions by itself are not seen.

    Example:
        >>> sum(s.bytes for s in sent(jax.make_jaxpr(step)(state, batch).jaxpr, mesh))  # doctest: +SKIP
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
