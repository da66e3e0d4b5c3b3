"""Reading jaxprs, and running parts of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from shardtrain import compat


def inner_jaxpr(value: Any) -> Any:
    """An open or closed jaxpr as an open one."""
    return getattr(value, "jaxpr", value)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = inner_jaxpr(part)
            if hasattr(inner, "eqns"):
                yield inner


def closed_jaxprs(equation: Any) -> Iterator[Any]:
    """As `inner_jaxprs`, closed."""
    from jax.extend.core import ClosedJaxpr

    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield part if hasattr(part, "jaxpr") else ClosedJaxpr(part, ())


def where(equation: Any) -> str:
    """`file:line` of the user's code that made a jaxpr equation."""
    from jax._src import source_info_util  # the public API has no name for it

    frames = list(source_info_util.user_frames(equation.source_info.traceback))
    users = [f for f in frames if "/flax/" not in f.file_name] or frames
    return f"{users[0].file_name}:{users[0].start_line}" if users else "unknown place"


def island_parts(equation: Any) -> tuple[Any, Sequence[Any], Sequence[Any]]:
    """Of a `shard_map` in a jaxpr: its body, and the PartitionSpecs of its inputs and outputs."""
    p = equation.params
    return inner_jaxpr(p["jaxpr"]), p["in_specs"], p["out_specs"]


def rebind(equation: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Runs an equation of a jaxpr on other operands, with some of its parameters changed."""
    from jax._src import source_info_util  # names of scopes and the user's line stay with it

    stack = source_info_util.current_name_stack() + equation.source_info.name_stack
    # Shardings name the mesh that the equation was traced under, which is not the one it runs under now.
    shardings = {key: None for key in ("sharding", "out_sharding") if key in equation.params}
    params = {**equation.params, **shardings, **_combiner(equation.params), **changed}
    with source_info_util.user_context(equation.source_info.traceback, name_stack=stack):
        out = compat.bind(equation, values, params)
    return list(out) if equation.primitive.multiple_results else [out]


def _combiner(params: dict[str, Any]) -> dict[str, Any]:
    """What a scatter combines by, traced under the mesh of now.

    Under one that is manual over some axes only, jax lowers the sum of two numbers with a sharding of its
    own, a custom call, which XLA's compiler for GPUs fails to evaluate ("unhandled HLO ops").
    """
    old = params.get("update_jaxpr")
    if old is None or params["update_consts"]:
        return {}

    def run(*numbers: Any) -> list[Any]:
        known = dict(zip(old.invars, numbers, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else known[atom]

        for equation in old.eqns:
            outs = rebind(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, outs, strict=True))
        return [read(atom) for atom in old.outvars]

    new = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct((), v.aval.dtype) for v in old.invars))
    return {"update_jaxpr": new.jaxpr, "update_consts": ()}


def subprogram(closed: Any, invars: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]) -> Any:
    """Some of a closed jaxpr's equations as a closed jaxpr of their own."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    whole = closed.jaxpr
    effects = frozenset().union(*(e.effects for e in eqns))
    inner = Jaxpr(whole.constvars, invars, outvars, eqns, effects, debug_info=whole.debug_info)
    return ClosedJaxpr(inner, closed.consts)
