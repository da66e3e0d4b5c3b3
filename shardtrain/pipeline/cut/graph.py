"""Where a traced model is cut into stages, and each stage as a function of its own."""

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Var

from shardtrain import jaxprs
from shardtrain.errors import UserError


@dataclass(frozen=True)
class Traced:
    """One microbatch of training, traced on global arrays.

    Attributes:
        closed: its jaxpr. Arguments in this order: parameters, other variables of the model, sides (what a
            microbatch is: inputs, targets, ...). Results: the loss, sums to report, new values of the
            variables.
        params, state: names of the first two groups of arguments.
        inputs: how many of the sides are the model's inputs; they come first.
        sums: how many sums are reported.
        layers: paths of the model's layers, which layouts and tables name; without them those that have
            parameters.
    """

    closed: ClosedJaxpr
    params: tuple[str, ...]
    state: tuple[str, ...]
    inputs: int
    sums: int
    layers: tuple[str, ...] = ()

    def groups(self) -> tuple[list[Var], list[Var], list[Var]]:
        """Arguments: parameters, other variables, sides."""
        invars, a = self.closed.jaxpr.invars, len(self.params)
        b = a + len(self.state)
        return invars[:a], invars[a:b], invars[b:]


@dataclass(frozen=True)
class Stage:
    """Consecutive operations of a model as a function of its own.

    Attributes:
        closed: its jaxpr. Arguments: `params`, `state`, all sides, `ins`. Results: `outs` (of the last stage
            the loss and the sums), new values of `moving`.
        params: names of the parameters it uses; no other stage does.
        state: names of the other variables it reads.
        moving: names of those it gives new values.
        ins, outs: what arrives from the stage before and leaves for the one behind, skip connections that
            pass through among them.
    """

    closed: ClosedJaxpr
    params: tuple[str, ...]
    state: tuple[str, ...]
    moving: tuple[str, ...]
    ins: tuple[Var, ...]
    outs: tuple[Var, ...]


class OperationGraph:
    """Which operations of a traced microbatch carry activations, and what they need."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        jaxpr = traced.closed.jaxpr
        sides = traced.groups()[2]
        self.makers = {v: e for e in jaxpr.eqns for v in e.outvars}
        active = set(sides[: traced.inputs])
        # Operations that the model's inputs reach are cut into stages; all others (casts of weights, masks
        # of dropout, counts of examples) cost little and are repeated in each stage that needs them.
        self.main = []
        for equation in jaxpr.eqns:
            if any(v in active for v in variables(equation.invars)):
                active |= set(equation.outvars)
                self.main.append(equation)
        self.active = active - set(sides[: traced.inputs])
        self.uses: list[frozenset[Var]] = [self.support(variables(e.invars)) for e in self.main]

    def support(self, values: Sequence[Var]) -> frozenset[Var]:
        """The activations and arguments that `values` are computed from by repeated operations."""
        found: set[Var] = set()
        todo, seen = list(values), set()
        while todo:
            v = todo.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in self.active or v not in self.makers:
                found.add(v)
            else:
                todo += variables(self.makers[v].invars)
        return frozenset(found)

    def repeated(self, values: Sequence[Var]) -> list[Any]:
        """The repeated operations behind `values`."""
        needed: set[int] = set()
        todo = list(values)
        while todo:
            v = todo.pop()
            if v in self.active or v not in self.makers or id(self.makers[v]) in needed:
                continue
            needed.add(id(self.makers[v]))
            todo += variables(self.makers[v].invars)
        return [e for e in self.traced.closed.jaxpr.eqns if id(e) in needed]

    def moving(self) -> dict[Var, int]:
        """The variables that activations change, each with the main operation that makes its new value."""
        traced = self.traced
        at = {v: i for i, e in enumerate(self.main) for v in e.outvars}
        news = traced.closed.jaxpr.outvars[1 + traced.sums :]
        return {v: at[n] for v, n in zip(traced.groups()[1], news, strict=True) if n in at}

    def results(self) -> frozenset[Var]:
        """What the loss and the sums need of activations and arguments; the last stage computes them."""
        return self.support(variables(self.traced.closed.jaxpr.outvars[: 1 + self.traced.sums]))

    def lives(self) -> dict[Var, tuple[int, int]]:
        """The main operations that make and last use each activation; results are used behind the last."""
        at = {v: i for i, e in enumerate(self.main) for v in e.outvars}
        last = {v: i for i, uses in enumerate(self.uses) for v in uses if v in at}
        last |= dict.fromkeys((v for v in self.results() if v in at), len(self.main))
        return {v: (at[v], last[v]) for v in at if v in last}

    def spans(self) -> dict[str, tuple[int, int]]:
        """The first and the last main operation that use each parameter or variable with one home.

        Those are the parameters, whose gradients are made where they are used, and the variables that
        activations change. Operations between the two must be in one stage. What the loss and the sums use
        by themselves is used behind the last operation, in the last stage.
        """
        params, state, _ = self.traced.groups()
        moving = self.moving()
        names = dict(zip(params, self.traced.params, strict=True))
        names |= {v: n for v, n in zip(state, self.traced.state, strict=True) if v in moving}
        found: dict[str, tuple[int, int]] = {}

        def add(v: Var, i: int) -> None:
            if v in names:
                first, last = found.get(names[v], (i, i))
                found[names[v]] = min(first, i), max(last, i)

        for i, uses in enumerate(self.uses):
            for v in uses:
                add(v, i)
        for v in self.results():
            add(v, len(self.main))
        for v, i in moving.items():
            add(v, i)
        return found

    def cut(self, positions: Sequence[int]) -> list[Stage]:
        """The stages, of which each but the first begins at one of `positions` among the main operations.

        Raises:
            UserError: a parameter, or a variable that activations change, that two stages use.
        """
        traced, jaxpr = self.traced, self.traced.closed.jaxpr
        params, state, sides = traced.groups()
        names = dict(zip(params, traced.params, strict=True))
        for name, (first, last) in self.spans().items():
            a, b = bisect_right(positions, first), bisect_right(positions, last)
            if a != b:
                raise UserError(
                    f"pipeline: {name!r} is used in the stages {a} and {b}, which would each need it; "
                    f"cut the model so that one stage has all of its uses"
                )
        stages = _parts(self.main, positions)
        at = {v: k for k, part in enumerate(stages) for e in part for v in e.outvars}
        results = jaxpr.outvars[: 1 + traced.sums]
        news = dict(zip(traced.state, jaxpr.outvars[1 + traced.sums :], strict=True))
        last = len(stages) - 1
        needed = [set(frozenset().union(*uses)) for uses in _parts(self.uses, positions)]
        needed[last] |= self.results()
        out = []
        for k, part in enumerate(stages):
            moving = [n for n, v in news.items() if isinstance(v, Var) and at.get(v) == k]
            ins = self._crossing(at, needed, k)
            outs = self._crossing(at, needed, k + 1) if k < last else ()
            ends = list(outs) if k < last else list(results)
            inner = [v for e in part for v in variables(e.invars)]
            inner += variables(ends) + [news[n] for n in moving]
            eqns = self.repeated(inner)
            used = self.support(inner) | {v for e in eqns for v in variables(e.invars)}
            mine = [v for v in params if v in used]
            read = [n for n, v in zip(traced.state, state, strict=True) if v in used or n in moving]
            own = dict(zip(traced.state, state, strict=True))
            closed = jaxprs.subprogram(
                traced.closed,
                [*mine, *(own[n] for n in read), *sides, *ins],
                [*eqns, *part],
                [*ends, *(news[n] for n in moving)],
            )
            out.append(Stage(closed, tuple(names[v] for v in mine), tuple(read), tuple(moving), ins, outs))
        return out

    @staticmethod
    def _crossing(at: Mapping[Var, int], needed: Sequence[set[Var]], k: int) -> tuple[Var, ...]:
        """Activations made before stage `k` and needed in it or behind it."""
        behind = frozenset().union(*needed[k:]) if k < len(needed) else frozenset()
        return tuple(v for v, stage in at.items() if stage < k and v in behind)


def variables(atoms: Sequence[Any]) -> list[Var]:
    """The variables among the operands of an equation, without literals."""
    return [a for a in atoms if isinstance(a, Var)]


def _parts(items: Sequence[Any], positions: Sequence[int]) -> list[list[Any]]:
    ends = [0, *positions, len(items)]
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)]
