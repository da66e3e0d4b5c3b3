"""The operations of a traced microbatch as a graph, which is cut into stages.

A stage is a run of consecutive *main* operations: those that the model's inputs reach. All other operations
(casts of weights, masks of dropout, counts of examples) cost little and are *repeated* in every stage that
needs their results, so that nothing but activations travels between stages.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Var

from shardtrain import jaxprs
from shardtrain.errors import UserError
from shardtrain.jaxprs import variables


@dataclass(frozen=True)
class TracedMicrobatch:
    """The training of one microbatch, traced on global arrays.

    Attributes:
        closed: the jaxpr. Its arguments are the parameters, the other variables of the model, and the
            examples: the arrays of a microbatch (inputs, targets, ...). Its results are the loss, the sums to
            report, and the new values of the variables.
        params: the names of the parameters.
        state: the names of the other variables.
        inputs: how many of the examples' arrays are the model's inputs; they come first.
        sums: how many sums are reported.
        layers: the paths of the model's layers, by which users name stages; if there are none, the paths of
            the modules that have parameters are used.
    """

    closed: ClosedJaxpr
    params: tuple[str, ...]
    state: tuple[str, ...]
    inputs: int
    sums: int
    layers: tuple[str, ...] = ()

    def groups(self) -> tuple[list[Var], list[Var], list[Var]]:
        """Returns the arguments: parameters, other variables, examples."""
        invars, a = self.closed.jaxpr.invars, len(self.params)
        b = a + len(self.state)
        return invars[:a], invars[a:b], invars[b:]

    @property
    def results(self) -> list[Any]:
        """The loss and the sums to report."""
        return self.closed.jaxpr.outvars[: 1 + self.sums]

    @property
    def new_state(self) -> dict[str, Any]:
        """The new value of each variable, by name; a variable that does not change is its own new value."""
        return dict(zip(self.state, self.closed.jaxpr.outvars[1 + self.sums :], strict=True))


@dataclass(frozen=True)
class Stage:
    """Consecutive operations of a model as a function of its own.

    Attributes:
        closed: the jaxpr. Its arguments are `params`, `state`, all arrays of the examples, and `ins`. Its
            results are `outs` (for the last stage: the loss and the sums), and the new values of `updated`.
        params: the names of the parameters that the stage uses; no other stage uses them.
        state: the names of the other variables that it reads.
        updated: the names of the variables to which it gives new values.
        ins: the activations that the stage before sends, skip connections that pass through among them.
        outs: the activations that it sends to the stage behind it.
    """

    closed: ClosedJaxpr
    params: tuple[str, ...]
    state: tuple[str, ...]
    updated: tuple[str, ...]
    ins: tuple[Var, ...]
    outs: tuple[Var, ...]


class OperationGraph:
    """The operations of a traced microbatch, and what each of them needs.

    Args:
        traced: the microbatch.

    Attributes:
        main: the operations that the model's inputs reach, in the order in which they run. Stages are made
            of these.
        uses: for each main operation the activations and arguments that it is computed from.
    """

    def __init__(self, traced: TracedMicrobatch) -> None:
        self.traced = traced
        jaxpr = traced.closed.jaxpr
        self.equations = jaxpr.eqns
        self.maker_of = jaxprs.makers(jaxpr.eqns)
        inputs = set(traced.groups()[2][: traced.inputs])
        active = set(inputs)
        self.main = []
        for equation in jaxpr.eqns:
            if any(v in active for v in variables(equation.invars)):
                active |= set(equation.outvars)
                self.main.append(equation)
        self.activations = active - inputs
        self.uses: list[frozenset[Var]] = [self.support(variables(e.invars)) for e in self.main]

    def support(self, values: Sequence[Var]) -> frozenset[Var]:
        """Returns the activations and arguments that repeated operations compute `values` from."""
        found: set[Var] = set()
        todo, seen = list(values), set()
        while todo:
            v = todo.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in self.activations or v not in self.maker_of:
                found.add(v)
            else:
                todo += variables(self.equations[self.maker_of[v]].invars)
        return frozenset(found)

    def repeated(self, values: Sequence[Any]) -> list[Any]:
        """Returns the repeated operations that compute `values`."""
        needed = jaxprs.behind(self.equations, self.maker_of, values, self.activations)
        return [self.equations[i] for i in sorted(needed)]

    def updated(self) -> dict[Var, int]:
        """Returns the variables that activations change, with the main operation that makes the new value."""
        maker = {v: i for i, e in enumerate(self.main) for v in e.outvars}
        pairs = zip(self.traced.groups()[1], self.traced.new_state.values(), strict=True)
        return {old: maker[new] for old, new in pairs if new in maker}

    def results(self) -> frozenset[Var]:
        """Returns the activations and arguments that the loss and the sums are computed from."""
        return self.support(variables(self.traced.results))

    def lives(self) -> dict[Var, tuple[int, int]]:
        """Returns, for each activation, the main operations that make it and that use it last.

        The loss and the sums count as used behind the last operation.
        """
        maker = {v: i for i, e in enumerate(self.main) for v in e.outvars}
        last = {v: i for i, uses in enumerate(self.uses) for v in uses if v in maker}
        last |= dict.fromkeys((v for v in self.results() if v in maker), len(self.main))
        return {v: (maker[v], last[v]) for v in maker if v in last}

    def spans(self) -> dict[str, tuple[int, int]]:
        """Returns the first and the last main operation that use each variable with one home.

        Those are the parameters, whose gradients are made where they are used, and the variables that
        activations change. The operations between the two must be in one stage. What the loss and the sums
        use by themselves counts as used behind the last operation, in the last stage.
        """
        params, state, _ = self.traced.groups()
        updated = self.updated()
        names = dict(zip(params, self.traced.params, strict=True))
        names |= {v: n for v, n in zip(state, self.traced.state, strict=True) if v in updated}
        found: dict[str, tuple[int, int]] = {}
        used = [(v, i) for i, uses in enumerate(self.uses) for v in uses]
        used += [(v, len(self.main)) for v in self.results()]
        for v, i in (*used, *updated.items()):
            if v in names:
                first, last = found.get(names[v], (i, i))
                found[names[v]] = min(first, i), max(last, i)
        return found

    def cut(self, starts: Sequence[int]) -> list[Stage]:
        """Returns the stages.

        Args:
            starts: for each stage but the first the number of the main operation with which it begins.

        Raises:
            UserError: two stages use one parameter, or one variable that activations change.
        """
        self._refuse_shared(starts)
        return _Cutting(self, starts).stages()

    def _refuse_shared(self, starts: Sequence[int]) -> None:
        for name, (first, last) in self.spans().items():
            a, b = bisect_right(starts, first), bisect_right(starts, last)
            if a != b:
                raise UserError(
                    f"pipeline: {name!r} is used in the stages {a} and {b}, which would each need it; "
                    f"cut the model so that one stage has all of its uses"
                )


class _Cutting:
    """One way to cut a graph into stages.

    Attributes:
        parts: the main operations of each stage.
        stage_of: the stage that makes each activation.
        needed: the activations and arguments that each stage uses.
    """

    def __init__(self, graph: OperationGraph, starts: Sequence[int]) -> None:
        self.graph, self.traced = graph, graph.traced
        self.parts = _parts(graph.main, starts)
        self.stage_of = {v: k for k, part in enumerate(self.parts) for e in part for v in e.outvars}
        self.needed = [set(frozenset().union(*uses)) for uses in _parts(graph.uses, starts)]
        self.needed[-1] |= graph.results()

    def stages(self) -> list[Stage]:
        return [self._stage(k) for k in range(len(self.parts))]

    def _stage(self, k: int) -> Stage:
        graph, traced, part = self.graph, self.traced, self.parts[k]
        last = k == len(self.parts) - 1
        new = {n: v for n, v in traced.new_state.items() if isinstance(v, Var) and self.stage_of.get(v) == k}
        ins, outs = self._crossing(k), () if last else self._crossing(k + 1)
        ends = traced.results if last else list(outs)
        values = [v for e in part for v in variables(e.invars)] + variables(ends) + list(new.values())
        repeated = graph.repeated(values)
        used = graph.support(values) | {v for e in repeated for v in variables(e.invars)}
        params, state, examples = traced.groups()
        own_params = {n: v for n, v in zip(traced.params, params, strict=True) if v in used}
        own_state = {n: v for n, v in zip(traced.state, state, strict=True) if v in used or n in new}
        closed = jaxprs.subprogram(
            traced.closed,
            [*own_params.values(), *own_state.values(), *examples, *ins],
            [*repeated, *part],
            [*ends, *new.values()],
        )
        return Stage(closed, tuple(own_params), tuple(own_state), tuple(new), ins, outs)

    def _crossing(self, k: int) -> tuple[Var, ...]:
        """Returns the activations that are made before stage `k` and needed in it or behind it."""
        behind: set[Var] = set().union(*self.needed[k:])
        return tuple(v for v, stage in self.stage_of.items() if stage < k and v in behind)


def _parts(items: Sequence[Any], starts: Sequence[int]) -> list[list[Any]]:
    ends = [0, *starts, len(items)]
    return [list(items[a:b]) for a, b in itertools.pairwise(ends)]
