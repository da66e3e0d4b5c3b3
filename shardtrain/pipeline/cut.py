"""Where a traced model is cut into stages, and each stage as a function of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Var

from shardtrain import compat
from shardtrain.errors import UserError


@dataclass(frozen=True)
class Traced:
    """One microbatch of training, traced on global arrays.

    Attributes:
        closed: its jaxpr. Arguments in this order: parameters, other variables of the model, sides (what a
            microbatch is: inputs, targets, ...). Results: the loss, sums to report, new values of the variables.
        params, state: names of the first two groups of arguments.
        inputs: how many of the sides are the model's inputs; they come first.
        sums: how many sums are reported.
    """

    closed: ClosedJaxpr
    params: tuple[str, ...]
    state: tuple[str, ...]
    inputs: int
    sums: int

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


class Flow:
    """Which operations of a traced microbatch carry activations, and what they need."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        jaxpr = traced.closed.jaxpr
        params, state, sides = traced.groups()
        self.makers = {v: e for e in jaxpr.eqns for v in e.outvars}
        active = set(sides[: traced.inputs])
        # Operations that the model's inputs reach are cut into stages; all others (casts of weights, masks
        # of dropout, counts of examples) cost little and are repeated in each stage that needs them.
        self.main = []
        for equation in jaxpr.eqns:
            if any(v in active for v in _variables(equation.invars)):
                active |= set(equation.outvars)
                self.main.append(equation)
        self.active = active - set(sides[: traced.inputs])
        self.uses: list[frozenset[Var]] = [self.support(_variables(e.invars)) for e in self.main]

    def support(self, variables: Sequence[Var]) -> frozenset[Var]:
        """The activations and arguments that `variables` are computed from by repeated operations."""
        found: set[Var] = set()
        todo, seen = list(variables), set()
        while todo:
            v = todo.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in self.active or v not in self.makers:
                found.add(v)
            else:
                todo += _variables(self.makers[v].invars)
        return frozenset(found)

    def repeated(self, variables: Sequence[Var]) -> list[Any]:
        """The repeated operations behind `variables`."""
        needed: set[int] = set()
        todo = list(variables)
        while todo:
            v = todo.pop()
            if v in self.active or v not in self.makers or id(self.makers[v]) in needed:
                continue
            needed.add(id(self.makers[v]))
            todo += _variables(self.makers[v].invars)
        return [e for e in self.traced.closed.jaxpr.eqns if id(e) in needed]

    def moving(self) -> dict[Var, int]:
        """The variables that activations change, each with the main operation that makes its new value."""
        traced = self.traced
        at = {v: i for i, e in enumerate(self.main) for v in e.outvars}
        news = traced.closed.jaxpr.outvars[1 + traced.sums :]
        return {v: at[n] for v, n in zip(traced.groups()[1], news, strict=True) if n in at}

    def crossing(self, position: int) -> list[Var]:
        """The activations that a cut at a position among the main operations would send on."""
        before = {v for e in self.main[:position] for v in e.outvars}
        results = self.support(_variables(self.traced.closed.jaxpr.outvars[: 1 + self.traced.sums]))
        behind = frozenset().union(results, *self.uses[position:])
        return [v for v in before if v in behind]

    def owners(self, positions: Sequence[int]) -> dict[Var, list[int]]:
        """The stages that use each parameter, when `positions` say where the stages but the first begin."""
        params = set(self.traced.groups()[0])
        found: dict[Var, list[int]] = {}
        for stage, uses in enumerate(_parts(self.uses, positions)):
            for v in frozenset().union(*uses) & params:
                found.setdefault(v, []).append(stage)
        return found

    def cut(self, positions: Sequence[int]) -> list[Stage]:
        """The stages, of which each but the first begins at one of `positions` among the main operations.

        Raises:
            UserError: a parameter that two stages use.
        """
        traced, jaxpr = self.traced, self.traced.closed.jaxpr
        params, state, sides = traced.groups()
        names = dict(zip(params, traced.params, strict=True))
        for v, stages in self.owners(positions).items():
            if len(stages) > 1:
                raise UserError(
                    f"pipeline: {names[v]!r} is used in the stages {stages}, which would each need it; "
                    f"cut the model so that one stage has all of its uses"
                )
        stages = _parts(self.main, positions)
        at = {v: k for k, part in enumerate(stages) for e in part for v in e.outvars}
        results = jaxpr.outvars[: 1 + traced.sums]
        news = dict(zip(traced.state, jaxpr.outvars[1 + traced.sums :], strict=True))
        last = len(stages) - 1
        needed = [set(frozenset().union(*uses)) for uses in _parts(self.uses, positions)]
        needed[last] |= self.support(_variables(results))
        out = []
        for k, part in enumerate(stages):
            moving = [n for n, v in news.items() if isinstance(v, Var) and at.get(v) == k]
            ins = self._crossing(at, needed, k)
            outs = self._crossing(at, needed, k + 1) if k < last else ()
            ends = list(outs) if k < last else list(results)
            inner = [v for e in part for v in _variables(e.invars)]
            inner += _variables(ends) + [news[n] for n in moving]
            eqns = self.repeated(inner)
            used = self.support(inner) | {v for e in eqns for v in _variables(e.invars)}
            mine = [v for v in params if v in used]
            read = [n for n, v in zip(traced.state, state, strict=True) if v in used or n in moving]
            own = dict(zip(traced.state, state, strict=True))
            closed = compat.subprogram(
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


def _variables(atoms: Sequence[Any]) -> list[Var]:
    return [a for a in atoms if isinstance(a, Var)]


def _parts(items: Sequence[Any], positions: Sequence[int]) -> list[list[Any]]:
    ends = [0, *positions, len(items)]
    return [list(items[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
