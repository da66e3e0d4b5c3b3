"""Finds collectives that would wait for ever, because some of their devices run another branch."""

from collections.abc import Collection, Iterator

from jax.sharding import AbstractMesh, Mesh

from shardtrain import hlo
from shardtrain.errors import UserError


def refuse_divergent(text: str, mesh: Mesh | AbstractMesh, axes: Collection[str] = ("pipe",)) -> None:
    """Refuses a compiled program that would wait for ever, because devices of other stages never join.

    The branches of a conditional, a loop whose length XLA does not know, and all that they call must have

    - no collective-permute: all devices of the program meet in one, also those that send nothing,
    - no collective whose groups span any of `axes`, along which devices take different branches.

    A conditional or loop is excepted if its condition is computed from constants and loop counters alone, so
    that all devices do the same.

    Args:
        text: optimized HLO, of any backend.
        mesh: that the program was compiled for.
        axes: along which devices may take different branches.

    Raises:
        UserError: names the instruction and the conditional or loop.

    Example:
        >>> refuse_divergent(step.lower(state, batch).compile().as_text(), mesh)  # doctest: +SKIP
    """
    devices = hlo.devices(text)
    for branch, instruction in in_branches(text):
        name = f"{branch.name!r}{_of(branch)}"
        where, do = (
            (f"a branch of the conditional {name}", "take the branch")
            if branch.op == "conditional"
            else (f"the loop {name}, whose length XLA does not know", "run it as often")
        )
        what = f"{instruction.collective} {instruction.name!r}{_of(instruction)}"
        if instruction.collective == "collective-permute":
            reason = "all devices must meet in it"
        else:
            crossed = hlo.crossed(hlo.groups(instruction, devices), mesh)
            shared = [axis for axis in crossed if axis in axes]
            if not shared:
                continue
            reason = f"its groups span {','.join(shared)}"
        raise UserError(
            f"the compiled program has the {what} in {where}: {reason}, but only some devices {do}, and "
            f"they would wait forever; use psum, all_gather or another collective of groups that stay inside "
            f"a stage"
        )


def in_branches(text: str) -> Iterator[tuple[hlo.Instruction, hlo.Instruction]]:
    """Yields each collective that some devices may not run, after the conditional or loop that has it."""
    entry, computations = hlo.parse(text)
    uniform = _UniformValues(computations)
    seen: set[tuple[str, bool]] = set()
    todo: list[tuple[str, hlo.Instruction | None]] = [(entry, None)]
    while todo:
        name, branch = todo.pop()
        if (name, branch is not None) in seen or name not in computations:
            continue
        seen.add((name, branch is not None))
        for instruction in computations[name]:
            if branch is not None and instruction.collective:
                yield branch, instruction
            inner = branch
            if branch is None and instruction.divergent and not uniform.decide(name, instruction):
                inner = instruction
            todo += [(call.name, inner) for call in instruction.calls]


Value = tuple[str, str, int | None]
"""A computation, an instruction of it, and the number of an element if its result is a tuple (None: all)."""


class _UniformValues:
    """Which values are the same on all devices: those computed from constants, by operations and loops."""

    def __init__(self, computations: hlo.Computations) -> None:
        self.computations = computations
        self.by_name = {name: {i.name: i for i in body} for name, body in computations.items()}
        self.loops: dict[str, list[tuple[str, hlo.Instruction]]] = {}
        """For each computation the loops that run it, with the computations that they are in."""
        for name, body in computations.items():
            for instruction in body:
                if instruction.op == "while":
                    for call in instruction.calls:
                        self.loops.setdefault(call.name, []).append((name, instruction))

    def decide(self, computation: str, branch: hlo.Instruction) -> bool:
        """Whether uniform values decide which branch of a conditional is run, or how many turns of a loop."""
        todo: list[Value] = [
            (computation, branch.operands[0], None)
            if branch.op == "conditional"
            else self._root(branch.called("condition"), None)
        ]
        seen = set(todo)
        for value in todo:
            needed = self._needed(value)
            if needed is None:
                return False
            todo += [v for v in needed if v not in seen]
            seen |= set(needed)
        return True

    def _needed(self, value: Value) -> list[Value] | None:
        """Returns the values that a value is computed from; None if it may differ between devices."""
        computation, name, index = value
        instruction = self.by_name[computation][name]
        operands = instruction.operands
        if instruction.op == "get-tuple-element":
            return [(computation, operands[0], hlo.index(instruction))]
        if instruction.op == "tuple" and index is not None:
            return [(computation, operands[index], None)]
        if instruction.op == "while":
            return self._carried(computation, instruction, index)
        if instruction.op == "parameter":
            loops = self.loops.get(computation, [])
            return [v for where, loop in loops for v in self._carried(where, loop, index)] or None
        if instruction.op in ("constant", "iota"):
            return []
        if not self._pure(instruction):
            return None
        return [(computation, operand, None) for operand in operands]

    def _pure(self, instruction: hlo.Instruction) -> bool:
        inner = [i for call in instruction.calls for i in self.computations[call.name]]
        return instruction.op in _PURE and all(map(self._pure, inner))

    def _carried(self, computation: str, loop: hlo.Instruction, index: int | None) -> list[Value]:
        """Returns the values that a value carried by a loop is computed from."""
        return [
            (computation, loop.operands[0], index),
            self._root(loop.called("body"), index),
            self._root(loop.called("condition"), None),
        ]

    def _root(self, computation: str, index: int | None) -> Value:
        return computation, hlo.root(self.computations[computation]).name, index


# fmt: off
_PURE = frozenset(
    {
        "add", "and", "bitcast", "broadcast", "call", "clamp", "compare", "constant", "convert", "copy",
        "dynamic-slice", "fusion", "get-tuple-element", "iota", "maximum", "minimum", "multiply", "negate",
        "not", "or", "parameter", "reduce", "reshape", "select", "slice", "subtract", "transpose",
        "tuple", "xor",
    }
)
# fmt: on
"""Operations whose result is uniform if their operands are."""


def _of(instruction: hlo.Instruction) -> str:
    return f" ({instruction.source})" if instruction.source else ""
