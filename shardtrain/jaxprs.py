"""Reading jaxprs, and running parts of them."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from shardtrain import compat


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Returns the variables among the operands of an equation, without the literals."""
    from jax.extend.core import Var

    return [a for a in atoms if isinstance(a, Var)]


def makers(equations: Sequence[Any]) -> dict[Any, int]:
    """Returns, for each variable that some equation computes, the number of that equation."""
    return {v: i for i, e in enumerate(equations) for v in e.outvars}


def behind(
    equations: Sequence[Any], maker_of: Mapping[Any, int], roots: Iterable[Any], known: Collection[Any] = ()
) -> set[int]:
    """Returns the numbers of the equations that must run to compute `roots`.

    Args:
        equations: of one jaxpr.
        maker_of: from `makers`.
        roots: variables to compute; literals among them need nothing.
        known: variables that need not be computed, for instance because they are given.
    """
    found: set[int] = set()
    todo = [v for v in variables(roots) if v not in known]
    while todo:
        i = maker_of.get(todo.pop())
        if i is not None and i not in found:
            found.add(i)
            todo += [v for v in variables(equations[i].invars) if v not in known]
    return found


def inner_jaxpr(value: Any) -> Any:
    """Returns an open or closed jaxpr as an open one."""
    return getattr(value, "jaxpr", value)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """Yields the jaxprs that an equation runs, such as the body of a loop, as open ones."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = inner_jaxpr(part)
            if hasattr(inner, "eqns"):
                yield inner


def closed_jaxprs(equation: Any) -> Iterator[Any]:
    """Yields the jaxprs that an equation runs as closed ones, see `inner_jaxprs`."""
    from jax.extend.core import ClosedJaxpr

    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield part if hasattr(part, "jaxpr") else ClosedJaxpr(part, ())


def where(equation: Any) -> str:
    """Returns `file:line` of the user's code that an equation was traced from."""
    from jax._src import source_info_util  # the public API has no name for it

    frames = list(source_info_util.user_frames(equation.source_info.traceback))
    users = [f for f in frames if "/flax/" not in f.file_name] or frames
    return f"{users[0].file_name}:{users[0].start_line}" if users else "unknown place"


def island_parts(equation: Any) -> tuple[Any, Sequence[Any], Sequence[Any]]:
    """Returns the body of a `shard_map` equation and the PartitionSpecs of its inputs and outputs."""
    p = equation.params
    return inner_jaxpr(p["jaxpr"]), p["in_specs"], p["out_specs"]


def rebind(equation: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Runs an equation on other operands, with some of its parameters changed.

    The new operation keeps the scope names and the line of the user's code of the old one.
    """
    from jax._src import source_info_util  # the public API has no name for it

    stack = source_info_util.current_name_stack() + equation.source_info.name_stack
    # A sharding names the mesh under which the equation was traced, which differs from the mesh of this call.
    shardings = {key: None for key in ("sharding", "out_sharding") if key in equation.params}
    params = {**equation.params, **shardings, **_combiner(equation.params), **changed}
    with source_info_util.user_context(equation.source_info.traceback, name_stack=stack):
        out = compat.bind(equation, values, params)
    return list(out) if equation.primitive.multiple_results else [out]


def _combiner(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the function by which a scatter combines two numbers, traced again under the current mesh.

    If it was traced under a mesh that is manual over some axes only, jax lowers the sum of the two numbers
    with a sharding of its own, a custom call, which XLA's compiler for GPUs fails to evaluate
    ("unhandled HLO ops").
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
    """Returns some equations of a closed jaxpr as a closed jaxpr with its own arguments and results."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    whole = closed.jaxpr
    effects = frozenset().union(*(e.effects for e in eqns))
    inner = Jaxpr(whole.constvars, invars, outvars, eqns, effects, debug_info=whole.debug_info)
    return ClosedJaxpr(inner, closed.consts)
