"""Runs the jaxpr of an island on the values of one device.

An island is the body of a `shard_map`: it is a program of one device already. It was traced where jax tracks
the mesh axes over which a value varies, and it is run where jax does not, so operations that only change
these axes are left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from shardtrain import compat, jaxprs

Values = Callable[[list[Any]], list[Any]]

CALLS = frozenset(
    {"checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
)
IDENTITIES = frozenset(
    {
        "copy",
        "copy_p",
        "mesh_cast",
        "name",
        "optimization_barrier",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
    }
)
_CASTS = frozenset(
    {"pcast", "preduced", "pvary", "reduced_vary_cast_p", "vary_unreduced_cast", "vary_unreduced_cast_p"}
)


def run(jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Returns the results of an island's jaxpr for the values of one device."""
    known = {v: constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    known |= dict(zip(jaxpr.invars, values, strict=True))

    def value(atom: Any) -> Any:
        return read(atom) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        outs = _apply(equation, [value(atom) for atom in equation.invars])
        known |= dict(zip(equation.outvars, outs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, values: list[Any]) -> list[Any]:
    name, p = equation.primitive.name, equation.params
    if name in _CASTS or name in IDENTITIES:
        return values
    if name == "psum_invariant":
        return [lax.psum(v, p["axes"]) for v in values]
    if name == "all_gather_invariant":
        axes, dim, tiled = p["axis_name"], p["all_gather_dimension"], p["tiled"]
        return [lax.all_gather(v, axes, axis=dim, tiled=tiled) for v in values]
    if name in CALLS:
        return _inner(next(jaxprs.closed_jaxprs(equation)))(values)
    if name == "scan":
        return control(equation, values, [_inner(p["jaxpr"])])
    if name == "while":
        return control(equation, values, [_inner(p["cond_jaxpr"]), _inner(p["body_jaxpr"])])
    if name == "cond":
        return control(equation, values, [_inner(branch) for branch in p["branches"]])
    return jaxprs.rebind(equation, values)


def _inner(closed: Any) -> Values:
    return lambda values: run(closed.jaxpr, closed.consts, values)


def control(equation: Any, values: list[Any], inner: Sequence[Values]) -> list[Any]:
    """Runs a `scan`, `while` or `cond` with other functions in it.

    Args:
        equation: of the jaxpr.
        values: of its operands.
        inner: the body of the scan; the condition and the body of the loop; or the branches.
    """
    p = equation.params
    if equation.primitive.name == "scan":
        nc, nk = compat.scan_extents(p)

        def body(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = inner[0]([*values[:nc], *carry, *rows])
            return outs[:nk], outs[nk:]

        init, xs = values[nc : nc + nk], values[nc + nk :]
        carry, ys = lax.scan(body, init, xs, p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return [*carry, *ys]
    if equation.primitive.name == "while":
        nt, nb = p["cond_nconsts"], p["body_nconsts"]
        asked, consts, init = values[:nt], values[nt : nt + nb], values[nt + nb :]
        condition, body_of = inner
        return lax.while_loop(lambda c: condition([*asked, *c])[0], lambda c: body_of([*consts, *c]), init)
    return lax.switch(values[0], inner, values[1:])


def read(literal: Any) -> Array:
    """Returns the value of a literal of a jaxpr."""
    return jnp.asarray(np.asarray(literal.val, literal.aval.dtype))


def constant(value: Any) -> Any:
    """Returns the value of a constant of a jaxpr, without the mesh under which it was traced."""
    key = jnp.issubdtype(getattr(value, "dtype", np.bool_), jax.dtypes.extended)
    return value if key or isinstance(value, jax.core.Tracer) else jnp.asarray(np.asarray(value))
