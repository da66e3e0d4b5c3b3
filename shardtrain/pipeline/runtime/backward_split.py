"""A stage and its gradient as one straight program, cut three ways.

What depends on no gradient is `F`; what the gradients of the stage's inputs need is `I`; the rest is `W`.
Values that cross from one to the other are what has to be kept. No weight is among them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Var

from shardtrain import jaxprs
from shardtrain.layout import Axes

Shape = jax.ShapeDtypeStruct


class BackwardSplit:
    """One straight program of a stage and its gradient, to be cut into `F`, `I` and `W`.

    Args:
        closed: stage arguments and cotangents to results, gradients of parameters, gradients of inputs.
        arguments: how many the stage has, of which `params` parameters come first, then `state` variables.
        results: how many the stage has.

    Attributes:
        sums: mesh axes over which each parameter's gradient is still to be summed.
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
        self.makers = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        self.arguments = list(jaxpr.invars[:arguments])
        self.params = self.arguments[:params]
        self.state = set(self.arguments[params : params + state])
        self.cotangents = list(jaxpr.invars[arguments:])
        self.results = list(jaxpr.outvars[:results])
        self.weights, self.sums = self._unsummed(jaxpr.outvars[results : results + params])
        self.inputs = list(jaxpr.outvars[results + params :])
        self.late = self._after(self.cotangents)

    def _after(self, roots: Sequence[Any]) -> set[Any]:
        found = set(roots)
        for equation in self.eqns:
            if any(v in found for v in _vars(equation.invars)):
                found |= set(equation.outvars)
        return found

    def _unsummed(self, gradients: Sequence[Any]) -> tuple[list[Any], tuple[Axes, ...]]:
        """Gradients before they are summed over the mesh: that is done once, for all microbatches."""
        uses = Counter(v for e in self.eqns for v in _vars(e.invars))
        uses.update(_vars(self.closed.jaxpr.outvars))
        out, axes = [], []
        for gradient in gradients:
            v, after = gradient, None
            while isinstance(v, Var) and uses[v] == 1 and v in self.makers:
                equation = self.eqns[self.makers[v]]
                if equation.primitive.name == "psum" and len(equation.invars) == 1:
                    axes.append(tuple(equation.params["axes"]))
                    if after is None:
                        gradient = equation.invars[0]
                    else:
                        self.eqns[after] = self.eqns[after].replace(invars=equation.invars)
                    break
                if equation.primitive.name not in _LINEAR:
                    axes.append(())
                    break
                v, after = equation.invars[0], self.makers[v]
            else:
                axes.append(())
            out.append(gradient)
        return out, tuple(axes)

    def needed(self, roots: Sequence[Any], stop: frozenset[Any] | set[Any] = frozenset()) -> set[int]:
        """Operations behind `roots`, up to the values in `stop`."""
        found: set[int] = set()
        todo = [v for v in _vars(roots) if v not in stop]
        while todo:
            i = self.makers.get(todo.pop())
            if i is not None and i not in found:
                found.add(i)
                todo += [v for v in _vars(self.eqns[i].invars) if v not in stop]
        return found

    def cut(self, first_in: int, remat: bool) -> tuple[Any, ...]:
        """The three programs, and the shapes of what is saved, lasts and passes between, see `Programs`.

        Args:
            first_in: number of the first argument that the stage before sends.
            remat: keep only those, and compute forward again.
        """
        late = {i for i, e in enumerate(self.eqns) if any(v in self.late for v in e.outvars)}
        backward = self.needed([*self.inputs, *self.weights]) & late
        chain = self._chain(backward)
        rest = backward - chain
        kept = self._kept(backward, first_in, remat)
        forward = self.needed([*self.results, *kept])

        def reach(group: set[int], roots: Sequence[Any]) -> tuple[set[int], set[Any]]:
            """With what is computed again from the kept: all operations, and the kept that are used."""
            consumed = [v for i in group for v in _vars(self.eqns[i].invars)] + _vars(roots)
            again = self.needed([v for v in consumed if v not in self.late], set(kept))
            inner = [v for i in again for v in _vars(self.eqns[i].invars)] + consumed
            return group | again, {v for v in inner if v in kept}

        made = {v for i in chain for v in self.eqns[i].outvars}
        between = [
            v
            for v in dict.fromkeys(
                [v for i in sorted(rest) for v in _vars(self.eqns[i].invars)] + _vars(self.weights)
            )
            if v in made or v in self.cotangents
        ]
        run_i, _ = reach(chain, [*self.inputs])
        run_w, used_w = reach(rest, self.weights)
        lasting = [v for v in kept if v in used_w]
        saved = [v for v in kept if v not in used_w]
        sides = [v for v in self.arguments[len(self.params) : first_in] if v not in self.state]

        def program(ins: Sequence[Any], run: set[int], outs: Sequence[Any]) -> Any:
            return jaxprs.subprogram(self.closed, list(ins), [self.eqns[i] for i in sorted(run)], list(outs))

        f = program(self.arguments, forward, [*self.results, *saved, *lasting])
        i = program(
            [*self.params, *sides, *self.cotangents, *saved, *lasting], run_i, [*self.inputs, *between]
        )
        w = program([*self.params, *sides, *lasting, *between], run_w, self.weights)
        shapes = [
            tuple(Shape(v.aval.shape, v.aval.dtype) for v in group) for group in (saved, lasting, between)
        ]
        return (f, i, w, *shapes)

    def _chain(self, backward: set[int]) -> set[int]:
        """What `I` runs: all that the inputs' gradients need, and all that several parameters' share.

        The second keeps the first stage, whose inputs need no gradient, as even as the others: a first layer
        with a bias leaves its kernel and its bias alone to `W`.
        """
        chain = self.needed(self.inputs) & backward
        reaches: dict[Any, frozenset[int]] = {}

        def add(v: Any, more: frozenset[int]) -> None:
            if isinstance(v, Var):
                reaches[v] = reaches.get(v, frozenset()) | more

        for number, v in enumerate(self.weights):
            add(v, frozenset([number]))
        for i in sorted(backward, reverse=True):
            found = frozenset().union(*(reaches.get(v, frozenset()) for v in self.eqns[i].outvars))
            for v in _vars(self.eqns[i].invars):
                add(v, found)
        shared = {
            i
            for i in backward
            if len(frozenset().union(*(reaches.get(v, frozenset()) for v in self.eqns[i].outvars))) > 1
        }
        return chain | shared

    def _kept(self, backward: set[int], first_in: int, remat: bool) -> list[Any]:
        """What the backward pass starts from, but no weights or sides, nor what is made of weights alone."""
        consumed = [v for i in sorted(backward) for v in _vars(self.eqns[i].invars)]
        consumed += _vars([*self.inputs, *self.weights])
        frontier = dict.fromkeys(v for v in consumed if v not in self.late)
        ins = set(self.arguments[first_in:])
        varying = self._after([*self.arguments[len(self.params) :]])
        free = set(self.arguments[:first_in]) - self.state
        out: dict[Any, None] = {}
        todo, seen = list(frontier), set(free)
        while todo:
            v = todo.pop(0)
            if v in seen or v not in varying or v in self.closed.jaxpr.constvars:
                continue
            seen.add(v)
            i = self.makers.get(v)
            if v in ins or v in self.state or i is None:
                out[v] = None
                continue
            equation = self.eqns[i]
            if remat or (equation.primitive.name in _GROWING and _bytes(equation.invars[0]) < _bytes(v)):
                todo += _vars(equation.invars)
            else:
                out[v] = None
        return list(out)


_GROWING = frozenset({"broadcast_in_dim", "convert_element_type"})
_LINEAR = frozenset({"reshape", "transpose", "squeeze", "reduce_sum", "convert_element_type", "neg", "copy"})


def _bytes(atom: Any) -> int:
    return atom.aval.size * atom.aval.dtype.itemsize


def _vars(atoms: Sequence[Any]) -> list[Any]:
    return [a for a in atoms if isinstance(a, Var)]
