"""Runs a traced function of global arrays as the program of one device: every value is a block.

XLA's partitioner has no part in a pipeline stage, since a stage is one branch of a program that is manual
over every mesh axis. What our operators do on one device is in their islands already. What a model computes
between them (sums of residuals, activations, losses) is localized here, by one rule for each kind of
primitive (`rules`). The operands of a primitive without a rule are gathered, and it is computed whole on
every device, with a warning; if a rule gathers an operand, there is a warning, too.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import lax

from shardtrain import compat, jaxprs
from shardtrain.layout import Axes
from shardtrain.pipeline.localize import islands
from shardtrain.pipeline.localize.block import Block, Cut, Sizes, block_shape, cut_of, finest, noticing, whole
from shardtrain.pipeline.localize.islands import CALLS, IDENTITIES, Values, constant, read
from shardtrain.pipeline.localize.rules import RULES

__all__ = ["Block", "Cut", "Sizes", "block_shape", "cut_of", "evaluate"]

log = logging.getLogger(__name__)


def evaluate(
    closed: Any, blocks: Sequence[Block], sizes: Sizes, warned: set[str] | None = None
) -> list[Block]:
    """Returns one device's blocks of the results of a jaxpr of global arrays; inside a manual `shard_map`.

    Args:
        closed: traced where the mesh is manual over at least one outer axis, so that its islands use grouped
            collectives, which may be in a branch that only some devices take.
        blocks: of its arguments.
        sizes: of all mesh axes that may cut an array.
        warned: texts of warnings that are not to be repeated; new ones are added.

    Returns:
        The blocks of its results; their cuts follow from those of the arguments and the islands.
    """
    return _Evaluator(sizes, set() if warned is None else warned).run(closed, blocks)


class _Evaluator:
    def __init__(self, sizes: Sizes, warned: set[str]) -> None:
        self.sizes, self.warned = sizes, warned
        self.calls: list[Any] = []

    def run(self, closed: Any, blocks: Sequence[Block]) -> list[Block]:
        jaxpr = closed.jaxpr
        known = {
            v: whole(constant(c), self.sizes) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)
        }
        known |= dict(zip(jaxpr.invars, blocks, strict=True))

        def block(atom: Any) -> Block:
            return whole(read(atom), self.sizes) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            outs = self.apply(equation, [block(atom) for atom in equation.invars])
            known |= dict(zip(equation.outvars, outs, strict=True))
        return [block(atom) for atom in jaxpr.outvars]

    def apply(self, equation: Any, blocks: list[Block]) -> list[Block]:
        name = equation.primitive.name
        if name in CALLS:
            if equation.params.get("differentiated"):  # it must not be computed before the backward pass
                blocks = _with(blocks, lax.optimization_barrier([b.value for b in blocks]))
            self.calls.append(equation)
            outs = self.run(next(jaxprs.closed_jaxprs(equation)), blocks)
            self.calls.pop()
            return outs
        if name in IDENTITIES:
            return blocks
        own = {"shard_map": self.island, "scan": self.scan, "while": self.while_, "cond": self.cond}
        rule = own.get(name) or RULES.get(name)

        def gathered(block: Block, axes: Axes) -> None:
            self.warn(equation, f"gathers an operand of shape {block.shape} over {', '.join(axes)}")

        with noticing(None if rule == self.island else gathered):  # what an island moves is its own business
            found = rule(equation, blocks) if rule else None
            return self.replicated(equation, blocks) if found is None else found

    def replicated(self, equation: Any, blocks: list[Block]) -> list[Block]:
        """Gathers the operands and computes the whole on every device of the stage, as a last resort."""
        if any(any(b.cut) for b in blocks):
            self.warn(equation, "is gathered and computed whole on every device of its pipeline stage")
        outs = jaxprs.rebind(equation, [b.whole_on(range(len(b.shape))).value for b in blocks])
        return [whole(v, self.sizes) for v in outs]

    def warn(self, equation: Any, what: str) -> None:
        """Logs what an operation gathers, once for each operation and line of the user's code."""
        places = [jaxprs.where(e) for e in (equation, *reversed(self.calls))]
        # jax traces some of its own functions just once, so that they have no line of the user's.
        place = next((p for p in places if p != "unknown place"), places[0])
        text = f"{equation.primitive.name} ({place})"
        if text not in self.warned:
            self.warned.add(text)
            log.warning("%s %s", text, what)

    def island(self, equation: Any, blocks: list[Block]) -> list[Block]:
        jaxpr, in_specs, out_specs = jaxprs.island_parts(equation)
        given = [b.moved(cut_of(s, len(b.shape))).value for b, s in zip(blocks, in_specs, strict=True)]
        shapes = [v.aval.shape for v in equation.outvars]
        return [
            Block(v, shape, cut_of(s, len(shape)), self.sizes)
            for v, shape, s in zip(islands.run(jaxpr, (), given), shapes, out_specs, strict=True)
        ]

    def scan(self, equation: Any, blocks: list[Block]) -> list[Block]:
        p = equation.params
        nc, nk = compat.scan_extents(p)
        consts, carry = blocks[:nc], blocks[nc : nc + nk]
        xs = [b.whole_on([0]) for b in blocks[nc + nk :]]
        rows = [
            replace(
                b,
                value=jax.ShapeDtypeStruct(b.value.shape[1:], b.value.dtype),
                shape=b.shape[1:],
                cut=b.cut[1:],
            )
            for b in xs
        ]
        carry, outs = self.settled(p["jaxpr"], consts, carry, rows)
        body = self.inner(p["jaxpr"], [*consts, *carry, *rows], [b.cut for b in [*carry, *outs[nk:]]])
        values = islands.control(equation, [b.value for b in [*consts, *carry, *xs]], [body])
        ys = [replace(b, shape=(p["length"], *b.shape), cut=((), *b.cut)) for b in outs[nk:]]
        return _with([*carry, *ys], values)

    def while_(self, equation: Any, blocks: list[Block]) -> list[Block]:
        p = equation.params
        nt, nb = p["cond_nconsts"], p["body_nconsts"]
        asked, consts = blocks[:nt], blocks[nt : nt + nb]
        carry, _ = self.settled(p["body_jaxpr"], consts, blocks[nt + nb :], [])
        condition = self.inner(p["cond_jaxpr"], [*asked, *carry], [()])
        body = self.inner(p["body_jaxpr"], [*consts, *carry], [b.cut for b in carry])
        values = islands.control(equation, [b.value for b in [*asked, *consts, *carry]], [condition, body])
        return _with(carry, values)

    def cond(self, equation: Any, blocks: list[Block]) -> list[Block]:
        branches = equation.params["branches"]
        found = [self.abstract(branch, blocks[1:]) for branch in branches]
        outs = [replace(same[0], cut=finest(b.cut for b in same)) for same in zip(*found, strict=True)]
        inner = [self.inner(branch, blocks[1:], [b.cut for b in outs]) for branch in branches]
        return _with(outs, islands.control(equation, [b.value for b in blocks], inner))

    def settled(
        self, body: Any, consts: list[Block], carry: list[Block], rows: list[Block]
    ) -> tuple[list[Block], list[Block]]:
        """Returns a loop's carry with the cuts that it keeps from turn to turn, and the results of a turn.

        A carry often starts whole (zeros) and becomes cut by what is added to it. The results have no values.
        """
        while True:
            outs = self.abstract(body, [*consts, *carry, *rows])
            cuts = [finest([b.cut, o.cut]) for b, o in zip(carry, outs, strict=False)]
            if cuts == [b.cut for b in carry]:
                return carry, outs
            carry = [b.moved(c) for b, c in zip(carry, cuts, strict=True)]

    def abstract(self, closed: Any, blocks: list[Block]) -> list[Block]:
        """Returns the results of `run` without values."""
        found: list[Block] = []

        def run(values: list[Any]) -> list[Any]:
            found[:] = self.run(closed, _with(blocks, values))
            return [b.value for b in found]

        return _with(found, values) if (values := jax.eval_shape(run, [b.value for b in blocks])) else []

    def inner(self, closed: Any, blocks: list[Block], cuts: list[Cut]) -> Values:
        """Returns a body or branch as a function of the values of `blocks`; its results are cut as `cuts`."""
        return lambda values: [
            b.moved(c).value for b, c in zip(self.run(closed, _with(blocks, values)), cuts, strict=True)
        ]


def _with(blocks: Sequence[Block], values: Sequence[Any]) -> list[Block]:
    return [replace(b, value=v) for b, v in zip(blocks, values, strict=True)]
