"""A compiled pipeline: the memory it needs, the bytes it sends next to their closed form, what it copies."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from shardtrain import hlo
from shardtrain.errors import UserError
from shardtrain.pipeline.runtime.tick_loop import message_lengths
from shardtrain.pipeline.schedules.tick_table import TickTable, build
from shardtrain.plan.census import Collective, census
from shardtrain.plan.trace import sent
from shardtrain.train.pipelined.step import Pipelined


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and purpose, in one call of the program.

    The census counts the collectives of all actions and routes at every tick of the loop, although in a tick
    a device does one action, and messages are sent only on the routes that have any, see `sends`.

    Attributes:
        what: `"messages"` between stages, `"in stages"` at every tick, `"gradients"` or `"others"` (sums of
            losses, norms) once a step.
        kind: of the collective, as in the census.
        axes: the mesh axes that it spans.
        count: how many arrays are moved.
        payload: the bytes of all operands on one device.
        expected: the same by the schedule and the traced stages; None if there is no closed form.
        merged: as `expected`, if collectives of the same operands are done once, as XLA may see.
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
        """Whether the bytes are those of the closed form."""
        if self.expected is None or self.merged is None:
            return True
        return self.merged <= self.payload <= self.expected


def ticks(pipeline: Pipelined) -> int:
    """Returns the number of trips of the compiled loop."""
    return len(_table(pipeline).rows)


def sends(pipeline: Pipelined) -> tuple[int, int]:
    """Returns how often messages are sent on a route between ranks; and ticks times routes."""
    table = _table(pipeline)
    travels = table.travels(table.rows)[:, [distance != 0 for distance in table.routes]]
    return int(travels.sum()) if table.latency == 1 else travels.size, travels.size


def _table(pipeline: Pipelined) -> TickTable:
    return build(pipeline.schedule, pipeline.ticks, pipeline.plan.latency)


def traffic(pipeline: Pipelined, compiled: jax.stages.Compiled | str) -> list[Traffic]:
    """Returns what a compiled training step sends, next to its closed form.

    Messages: ticks times the routes of the schedule, each as large as the largest message. In stages: the
    collectives of the traced `F`, `I` and `W`. Gradients: each parameter's once a step, over the mesh axes
    over which the devices of its stage have parts of the sum.
    """
    found: dict[_Row, Counter[str]] = {}
    table = _table(pipeline)
    parts = (
        _compiled(pipeline, compiled, len(table.rows)),
        _messages(pipeline, table),
        _in_stages(pipeline, table),
        _gradients(pipeline),
    )
    for row, numbers in itertools.chain(*parts):
        found.setdefault(row, Counter()).update(numbers)
    _move_others(found)
    rows = []
    for row, n in sorted(found.items(), key=lambda item: _ORDER.index(item[0].what)):
        expected = None if row.what == "others" else n["expected"]
        merged = n["merged"] if row.what == "in stages" else expected
        rows.append(Traffic(*row, n["count"], n["payload"], expected, merged))
    return rows


class _Row(NamedTuple):
    """Collectives that are counted together, see `Traffic`."""

    what: str
    kind: str
    axes: tuple[str, ...]


_Counts = Iterator[tuple[_Row, dict[str, int]]]


def _compiled(pipeline: Pipelined, compiled: jax.stages.Compiled | str, trips: int) -> _Counts:
    """Yields the collectives of the compiled program."""
    for row in census(compiled, pipeline.mesh):
        numbers = {"count": row.count, "payload": row.count * row.payload}
        yield _Row(_what(row, trips), row.kind, row.axes or ()), numbers


def _messages(pipeline: Pipelined, table: TickTable) -> _Counts:
    """Yields the messages between ranks, as the schedule has them."""
    message = sum(n * jnp.dtype(d).itemsize for d, n in message_lengths(pipeline.programs).items())
    routes = sum(distance != 0 for distance in table.routes)
    yield _Row("messages", "collective-permute", ("pipe",)), {"expected": len(table.rows) * routes * message}


def _in_stages(pipeline: Pipelined, table: TickTable) -> _Counts:
    """Yields the collectives of the traced programs of the stages."""
    trips = len(table.rows)
    for k, kind in {branch for branch in table.branches if branch is not None}:
        program = pipeline.programs[k]
        halves = {"I": [program.input_gradient], "W": [program.weight_gradient]}
        bodies = {"F": [program.forward], **halves, "B": halves["I"] + halves["W"]}
        for body in bodies[kind]:
            for one in sent(body.jaxpr, pipeline.mesh):
                yield _Row("in stages", one.kind, one.axes), {"expected": trips * one.payload}
            for one in sent(_merged(body.jaxpr), pipeline.mesh):
                yield _Row("in stages", one.kind, one.axes), {"merged": trips * one.payload}


def _gradients(pipeline: Pipelined) -> _Counts:
    """Yields the sums of gradients."""
    mesh, packing = pipeline.mesh, pipeline.packing
    places = packing.by_name("params", packing.arrays["params"].places)
    for program in pipeline.programs:
        for name, axes in zip(program.stage.params, program.unsummed_axes, strict=True):
            over = tuple(axis for axis in mesh.axis_names if axis in axes and mesh.shape[axis] > 1)
            if over:
                numbers = {"expected": places[name].size * places[name].dtype.itemsize}
                yield _Row("gradients", "all-reduce", over), numbers


_ORDER = ("messages", "in stages", "gradients", "others")


def _merged(jaxpr: Any) -> Any:
    """Returns a jaxpr in which equations that compute the same from the same operands appear once."""
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


def _move_others(found: dict[_Row, Counter[str]]) -> None:
    """Counts sums once a step over axes that no gradient is summed over among the others."""
    for row, numbers in list(found.items()):
        if row.what == "gradients" and not numbers["expected"]:
            found.setdefault(row._replace(what="others"), Counter()).update(numbers)
            del found[row]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler planned them.

    Attributes:
        arguments: of the state and the batch.
        temporary: of all else, among it what is kept between `F`, `I` and `W`.
        peak: of all at once; 0 if the compiler does not say.
    """

    arguments: int
    temporary: int
    peak: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Returns the memory that a compiled program needs on each device."""
    found: Any = compiled.memory_analysis()
    peak = getattr(found, "peak_memory_in_bytes", 0)
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, peak)


@dataclass(frozen=True)
class Copies:
    """Bytes that one tick copies from a buffer to another one of the same shape.

    Attributes:
        loop: on every device, in every tick.
        branch: in the action that copies most.
        carried: the bytes of all arrays that the loop carries, for comparison.
    """

    loop: int
    branch: int
    carried: int


def copies(text: str) -> Copies:
    """Returns what the loop over ticks of a compiled pipeline copies in every tick.

    Raises:
        UserError: the program has no loop over loops that run at most once.
    """
    entry, computations = hlo.parse(text)

    def copied(name: str) -> int:
        return sum(_size(i) for i in computations[name] if i.op in ("copy", "copy-start"))

    def inner(name: str) -> list[str]:
        return [i.called("body") for i in computations[name] if i.at_most_once]

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
