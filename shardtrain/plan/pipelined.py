"""A compiled pipeline: what it needs, what it sends beside what it should, what it copies."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from shardtrain import hlo
from shardtrain.errors import UserError
from shardtrain.pipeline.runtime.machine import message
from shardtrain.pipeline.schedules.table import TickTable, build
from shardtrain.plan.census import Collective, census
from shardtrain.plan.trace import sent
from shardtrain.train.pipelined.step import Pipelined


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and purpose, in one call of the program.

    A loop's collectives are those of all actions and routes at every tick, as the census counts them; in a
    tick a device does one action, and messages go along the routes that have any, see `sends`.

    Attributes:
        what: `"messages"` between stages, `"in stages"` at every tick, `"gradients"`, or `"others"` (sums of
            losses, norms) once a step.
        kind, axes: as in the census.
        count: arrays that are moved, one for each run.
        payload: bytes of all operands on one device.
        expected: the same by the schedule and the traced stages; None where there is no closed form.
        merged: the same if what a stage sends twice, out of the same operands, is sent once: XLA may see it.
    """

    what: str
    kind: str
    axes: tuple[str, ...]
    count: int
    payload: int
    expected: int | None
    merged: int | None

    @property
    def right(self) -> bool:
        """Whether it is what was expected."""
        if self.expected is None or self.merged is None:
            return True
        return self.merged <= self.payload <= self.expected


def ticks(pipeline: Pipelined) -> int:
    """Trips of the compiled loop."""
    return len(_table(pipeline).rows)


def sends(pipeline: Pipelined) -> tuple[int, int]:
    """How often messages go along a route between ranks; and ticks times routes."""
    table = _table(pipeline)
    travels = table.travels(table.rows)[:, [distance != 0 for distance in table.routes]]
    return int(travels.sum()) if table.hop == 1 else travels.size, travels.size


def _table(pipeline: Pipelined) -> TickTable:
    return build(pipeline.schedule, pipeline.ticks, pipeline.plan.hop)


def traffic(pipeline: Pipelined, compiled: jax.stages.Compiled | str) -> list[Traffic]:
    """What a compiled training step sends, beside its closed form.

    Messages: ticks times the routes that the schedule has, each as large as the largest. In stages:
    the collectives of the traced `F`, `I` and `W`. Gradients: every parameter's, once a step, over the axes
    over which the ranks of its stage hold parts of the sum.
    """
    table = _table(pipeline)
    trips, mesh = len(table.rows), pipeline.mesh
    found: dict[tuple[str, str, tuple[str, ...]], Counter[str]] = {}

    def add(what: str, kind: str, axes: tuple[str, ...], **numbers: int) -> None:
        found.setdefault((what, kind, axes), Counter()).update(numbers)

    for row in census(compiled, mesh):
        what = _what(row, trips)
        add(what, row.kind, row.axes or (), count=row.count, payload=row.count * row.payload)
    size = sum(n * jnp.dtype(d).itemsize for d, n in message(pipeline.programs).items())
    routes = [distance for distance in table.routes if distance]
    add("messages", "collective-permute", ("pipe",), expected=trips * len(routes) * size)
    kinds = {doing for doing in table.branches if doing is not None}
    for k, kind in kinds:
        program = pipeline.programs[k]
        bodies = {"F": [program.forward], "I": [program.input_gradient], "W": [program.weight_gradient]}
        bodies["B"] = bodies["I"] + bodies["W"]
        for body in bodies[kind]:
            for one in sent(body.jaxpr, mesh):
                add("in stages", one.kind, one.axes, expected=trips * one.payload)
            for one in sent(_merged(body.jaxpr), mesh):
                add("in stages", one.kind, one.axes, merged=trips * one.payload)
    for k, program in enumerate(pipeline.programs):
        places = {pipeline.names["params"][i]: pipeline.params.places[i] for i in pipeline.params.at_stage[k]}
        for name, axes in zip(program.stage.params, program.sums, strict=True):
            over = tuple(axis for axis in mesh.axis_names if axis in axes and mesh.shape[axis] > 1)
            if over:
                place = places[name]
                add("gradients", "all-reduce", over, expected=place.size * place.dtype.itemsize)
    _move_others(found)
    rows = []
    for (what, kind, axes), n in sorted(found.items(), key=lambda item: _ORDER.index(item[0][0])):
        expected = None if what == "others" else n["expected"]
        merged = n["merged"] if what == "in stages" else expected
        rows.append(Traffic(what, kind, axes, n["count"], n["payload"], expected, merged))
    return rows


_ORDER = ("messages", "in stages", "gradients", "others")


def _merged(jaxpr: Any) -> Any:
    """A jaxpr in which equal equations of equal operands stand once."""
    first: dict[Any, Any] = {}
    same: dict[Any, Any] = {}
    for equation in jaxpr.eqns:
        operands = tuple(same.get(v, v) if isinstance(v, Var) else str(v) for v in equation.invars)
        known = first.setdefault((equation.primitive, str(equation.params), operands), equation)
        same |= zip(equation.outvars, (same.get(v, v) for v in known.outvars), strict=True)
    return jaxpr.replace(eqns=list(first.values()))


def _what(row: Collective, trips: int) -> str:
    if row.count == 1:
        return "gradients" if row.kind == "all-reduce" and "pipe" not in (row.axes or ()) else "others"
    return "messages" if row.kind == "collective-permute" and row.axes == ("pipe",) else "in stages"


def _move_others(found: dict[tuple[str, str, tuple[str, ...]], Counter[str]]) -> None:
    """Sums once a step over axes that no gradient is summed over are others."""
    for (what, kind, axes), numbers in list(found.items()):
        if what == "gradients" and not numbers["expected"]:
            found.setdefault(("others", kind, axes), Counter()).update(numbers)
            del found[what, kind, axes]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler planned them.

    Attributes:
        arguments: the state and the batch.
        temporary: all else, what waits between `F`, `I` and `W` among it.
        peak: the most at once; 0 if the compiler does not say.
    """

    arguments: int
    temporary: int
    peak: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What a compiled program needs on each device."""
    found: Any = compiled.memory_analysis()
    peak = getattr(found, "peak_memory_in_bytes", 0)
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, peak)


@dataclass(frozen=True)
class Copies:
    """Bytes that one tick copies from one buffer into another of the same shape, and computes nothing.

    Attributes:
        loop: on every device, at every tick.
        branch: in the action that copies most.
        carried: of all arrays that the loop carries, for comparison.
    """

    loop: int
    branch: int
    carried: int


def copies(text: str) -> Copies:
    """What the loop over ticks of a compiled pipeline copies at every tick.

    Raises:
        UserError: a program without a loop over loops of one turn.
    """
    entry, computations = hlo.parse(text)

    def copied(name: str) -> int:
        return sum(_size(i) for i in computations[name] if i.op in ("copy", "copy-start"))

    def inner(name: str) -> list[str]:
        return [i.called("body") for i in computations[name] if i.once]

    def most(name: str) -> int:
        return copied(name) + max(map(most, inner(name)), default=0)

    todo = [entry]
    for name in todo:  # from outside to inside
        for call in (c for i in computations.get(name, ()) for c in i.calls):
            if call.role == "body" and (actions := inner(call.name)):
                carried = next(i for i in computations[call.name] if i.op == "parameter")
                return Copies(copied(call.name), max(map(most, actions)), _size(carried))
            todo.append(call.name)
    raise UserError("the program has no loop over loops of one turn; give the text of a pipelined step")


def _size(instruction: hlo.Instruction) -> int:
    return sum(size for _, size in hlo.arrays(instruction.shape))
