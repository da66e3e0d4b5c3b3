"""A stage and its gradient as one straight program, split into `F`, `I` and `W`.

The forward and the backward pass of a stage are traced together, and each operation of that trace goes into
one of three programs. `F` has the operations that depend on no gradient. `I` has those that the gradients of
the stage's inputs need, for which the stage before waits. `W` has the rest, which only the gradients of the
parameters need. Values that one program computes and another one uses are kept in between. Parameters are
never among them, nor is anything that is computed from parameters alone.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Var

from shardtrain import jaxprs
from shardtrain.jaxprs import variables
from shardtrain.layout import Axes

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Passes:
    """The three programs of a stage, and the values that are kept between them.

    Attributes:
        forward: `(stage arguments)` to `(stage results, saved, lasting)`.
        input_gradient: `(params, examples, cotangents, saved, lasting)` to `(gradients of inputs, between)`.
        weight_gradient: `(params, examples, lasting, between)` to gradients of the parameters.
        saved: the values kept from `F` to `I`.
        lasting: the values kept from `F` to `W`.
        between: the values kept from `I` to `W`.
    """

    forward: ClosedJaxpr
    input_gradient: ClosedJaxpr
    weight_gradient: ClosedJaxpr
    saved: tuple[Shape, ...]
    lasting: tuple[Shape, ...]
    between: tuple[Shape, ...]


class BackwardSplit:
    """One straight program of a stage and its gradient, to be split into `F`, `I` and `W`.

    Args:
        closed: `(stage arguments, cotangents)` to `(stage results, gradients of the parameters, gradients of
            the inputs)`.
        arguments: the number of the stage's arguments. The first `params` of them are parameters, then come
            `state` other variables, the examples, and the inputs that the stage before sends.
        params: the number of parameters.
        results: the number of the stage's results.
        state: the number of other variables.

    Attributes:
        unsummed_axes: for each parameter the mesh axes over which its gradient is still to be summed.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        arguments: int,
        params: int,
        results: int,
        state: int,
    ) -> None:
        self.closed, jaxpr = closed, closed.jaxpr
        self.eqns = list(jaxpr.eqns)
        self.maker_of = jaxprs.makers(self.eqns)
        self.arguments = list(jaxpr.invars[:arguments])
        self.params = self.arguments[:params]
        self.state = set(self.arguments[params : params + state])
        self.cotangents = list(jaxpr.invars[arguments:])
        self.results = list(jaxpr.outvars[:results])
        uses = Counter(v for e in jaxpr.eqns for v in variables(e.invars))
        uses.update(variables(jaxpr.outvars))
        found = [self._unsummed(v, uses) for v in jaxpr.outvars[results : results + params]]
        self.weights = [gradient for gradient, _ in found]
        self.unsummed_axes: tuple[Axes, ...] = tuple(axes for _, axes in found)
        self.inputs = list(jaxpr.outvars[results + params :])
        self.backward = self._computed_from(self.cotangents)

    def split(self, first_in: int, remat: bool) -> Passes:
        """Splits the program.

        Args:
            first_in: the number of the first argument that the stage before sends.
            remat: keep only what the stage before sends, and compute the forward pass again in `I` and `W`.
        """
        operations = self._behind([*self.inputs, *self.weights])
        operations &= {i for i, e in enumerate(self.eqns) if any(v in self.backward for v in e.outvars)}
        for_inputs = self._operations_of_i(operations)
        for_weights = operations - for_inputs
        kept = self._kept(operations, first_in, remat)
        run_i, _ = self._with_recomputed(for_inputs, self.inputs, kept)
        run_w, used_by_w = self._with_recomputed(for_weights, self.weights, kept)
        lasting = [v for v in kept if v in used_by_w]
        saved = [v for v in kept if v not in used_by_w]
        between = self._between(for_inputs, for_weights)
        examples = [v for v in self.arguments[len(self.params) : first_in] if v not in self.state]
        run_f = self._behind([*self.results, *kept])
        return Passes(
            self._program(self.arguments, run_f, [*self.results, *saved, *lasting]),
            self._program(
                [*self.params, *examples, *self.cotangents, *saved, *lasting],
                run_i,
                [*self.inputs, *between],
            ),
            self._program([*self.params, *examples, *lasting, *between], run_w, self.weights),
            *(_shapes(group) for group in (saved, lasting, between)),
        )

    def _program(self, arguments: Sequence[Any], run: Collection[int], results: Sequence[Any]) -> Any:
        equations = [self.eqns[i] for i in sorted(run)]
        return jaxprs.subprogram(self.closed, list(arguments), equations, list(results))

    def _behind(self, roots: Sequence[Any], known: Collection[Any] = ()) -> set[int]:
        return jaxprs.behind(self.eqns, self.maker_of, roots, known)

    def _computed_from(self, roots: Sequence[Any]) -> set[Any]:
        """Returns `roots` and all variables that depend on them."""
        found = set(roots)
        for equation in self.eqns:
            if any(v in found for v in variables(equation.invars)):
                found |= set(equation.outvars)
        return found

    def _unsummed(self, gradient: Any, uses: Counter[Any]) -> tuple[Any, Axes]:
        """Returns a parameter's gradient before it is summed over the mesh, and the axes of that sum.

        The sum is linear, so it can follow the sum over all microbatches, and is then done once a step. It is
        taken out if only linear operations stand behind it that nothing else uses.
        """
        v, after = gradient, None
        while isinstance(v, Var) and uses[v] == 1 and v in self.maker_of:
            number = self.maker_of[v]
            equation = self.eqns[number]
            if equation.primitive.name == "psum" and len(equation.invars) == 1:
                if after is not None:
                    self.eqns[after] = self.eqns[after].replace(invars=equation.invars)
                return (equation.invars[0] if after is None else gradient), tuple(equation.params["axes"])
            if equation.primitive.name not in _LINEAR:
                break
            v, after = equation.invars[0], number
        return gradient, ()

    def _operations_of_i(self, backward: set[int]) -> set[int]:
        """Returns the backward operations that `I` runs.

        Those are the ones that gradients of inputs need, and the ones that gradients of several parameters
        share. The latter matter for the first stage, whose inputs need no gradients: they leave only the last
        step of each gradient to `W`, as in the other stages, so that its `I` and `W` cost about the same.
        """
        users = self._parameters_behind(backward)
        shared = {i for i in backward if len(_union(users, self.eqns[i].outvars)) > 1}
        return (self._behind(self.inputs) & backward) | shared

    def _parameters_behind(self, backward: set[int]) -> dict[Any, frozenset[int]]:
        """Returns the numbers of the parameters whose gradients depend on each variable."""
        found: dict[Any, frozenset[int]] = {}
        for number, gradient in enumerate(self.weights):
            for v in variables([gradient]):
                found[v] = found.get(v, frozenset()) | {number}
        for i in sorted(backward, reverse=True):
            users = _union(found, self.eqns[i].outvars)
            for v in variables(self.eqns[i].invars):
                found[v] = found.get(v, frozenset()) | users
        return found

    def _with_recomputed(
        self, operations: set[int], roots: Sequence[Any], kept: Sequence[Any]
    ) -> tuple[set[int], set[Any]]:
        """Returns backward operations with the forward ones that they run again, and the kept values used."""
        used = [v for i in operations for v in variables(self.eqns[i].invars)] + variables(roots)
        again = self._behind([v for v in used if v not in self.backward], set(kept))
        used += [v for i in again for v in variables(self.eqns[i].invars)]
        return operations | again, set(used) & set(kept)

    def _between(self, for_inputs: set[int], for_weights: set[int]) -> list[Any]:
        """Returns the values that `I` computes or is given, and `W` uses."""
        made = {v for i in for_inputs for v in self.eqns[i].outvars} | set(self.cotangents)
        used = [v for i in sorted(for_weights) for v in variables(self.eqns[i].invars)]
        return [v for v in dict.fromkeys(used + variables(self.weights)) if v in made]

    def _kept(self, backward: set[int], first_in: int, remat: bool) -> list[Any]:
        """Returns the forward values from which the backward pass starts.

        Parameters and examples are not kept, since they are at hand, nor is what is computed from parameters
        alone. A value that is just a larger form of a smaller one (a broadcast, a cast to a wider type) is
        computed again from the smaller one.
        """
        used = [v for i in sorted(backward) for v in variables(self.eqns[i].invars)]
        used += variables([*self.inputs, *self.weights])
        todo = list(dict.fromkeys(v for v in used if v not in self.backward))
        given = {*self.arguments[first_in:], *self.state}
        seen = set(self.arguments[:first_in]) - self.state
        varying = self._computed_from(self.arguments[len(self.params) :]) - set(self.closed.jaxpr.constvars)
        kept: dict[Any, None] = {}
        while todo:
            v = todo.pop(0)
            if v in seen or v not in varying:
                continue
            seen.add(v)
            maker = None if v in given or v not in self.maker_of else self.eqns[self.maker_of[v]]
            if maker is not None and (remat or _grows(maker, v)):
                todo += variables(maker.invars)
            else:
                kept[v] = None
        return list(kept)


_GROWING = frozenset({"broadcast_in_dim", "convert_element_type"})
_LINEAR = frozenset({"reshape", "transpose", "squeeze", "reduce_sum", "convert_element_type", "neg", "copy"})


def _grows(equation: Any, result: Any) -> bool:
    """Whether an operation only writes its operand in a larger form."""
    return equation.primitive.name in _GROWING and _bytes(equation.invars[0]) < _bytes(result)


def _bytes(atom: Any) -> int:
    return atom.aval.size * atom.aval.dtype.itemsize


def _shapes(group: Sequence[Any]) -> tuple[Shape, ...]:
    return tuple(Shape(v.aval.shape, v.aval.dtype) for v in group)


def _union(sets: dict[Any, frozenset[int]], keys: Sequence[Any]) -> frozenset[int]:
    return frozenset().union(*(sets.get(key, frozenset()) for key in keys))
