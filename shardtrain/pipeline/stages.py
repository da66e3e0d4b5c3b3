"""A stage as the programs that one device runs: forward, input gradient, weight gradient.

The stage and its gradient are traced together on global arrays, brought into local form, and that one
straight program is cut three ways: what depends on no gradient is `F`; what the gradients of the stage's
inputs need is `I`; the rest is `W`. Values that cross from one to the other are what has to be kept. No
weight is among them, and no program is traced twice.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Var
from jax.sharding import AbstractMesh

from shardtrain import compat
from shardtrain.layout import Axes
from shardtrain.pipeline.costs import Costs
from shardtrain.pipeline.cut import Stage
from shardtrain.pipeline.local import Block, Cut, block_shape, evaluate
from shardtrain.pipeline.work import cost_of

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Programs:
    """What a device of a stage computes, as jaxprs of its blocks.

    Attributes:
        stage: which one.
        forward: `(params, state, sides, ins)` to `(outs, moving, saved, lasting)`.
        input_gradient: `(params, sides, cotangents, saved, lasting)` to `(cotangents of ins, between)`.
        weight_gradient: `(params, sides, lasting, between)` to gradients of the parameters.
        ins, outs: blocks of the activations, and which of them have gradients.
        saved, lasting, between: blocks kept from `F` to `I`, from `F` to `W`, from `I` to `W`.
        sums: mesh axes over which each parameter's gradient is still to be summed.
    """

    stage: Stage
    forward: ClosedJaxpr
    input_gradient: ClosedJaxpr
    weight_gradient: ClosedJaxpr
    ins: tuple[Shape, ...]
    outs: tuple[Shape, ...]
    ins_cut: tuple[Cut, ...]
    outs_cut: tuple[Cut, ...]
    saved: tuple[Shape, ...]
    lasting: tuple[Shape, ...]
    between: tuple[Shape, ...]
    sums: tuple[Axes, ...]


def is_float(shape: Any) -> bool:
    """Whether values have gradients: floating ones, complex ones among them."""
    return jnp.issubdtype(shape.dtype, jnp.inexact)


def localize(
    stage: Stage,
    given: Sequence[Cut],
    ins_cut: Sequence[Cut],
    mesh: AbstractMesh,
    *,
    last: bool,
    remat: bool = False,
    backward: bool = True,
) -> Programs:
    """Brings a stage and its gradient into local form and cuts them into `F`, `I` and `W`.

    Args:
        stage: from `Flow.cut`.
        given: how its parameters, variables and sides lie.
        ins_cut: how its other arguments lie.
        mesh: with the pipeline's axes manual and the others automatic.
        last: whether its outputs are the loss and sums rather than activations.
        remat: save only the stage's inputs and compute forward again in the backward pass.
        backward: whether it is ever run; without, only `F` is of use.
    """
    sizes = {n: s for n, s in mesh.shape.items() if n not in compat.manual_axes(mesh)}
    jaxpr = stage.closed.jaxpr
    avals = [Shape(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
    np_, nm = len(stage.params), len(stage.moving)
    first_in = len(avals) - len(stage.ins)
    ends = [Shape(v.aval.shape, v.aval.dtype) for v in jaxpr.outvars]
    ne = len(ends) - nm
    cuts = [*given, *ins_cut]
    env = [(name, size) for name, size in mesh.shape.items()]
    flows = [i for i, s in enumerate(avals[first_in:], first_in) if is_float(s)]
    pulled = [0] if last else [i for i, s in enumerate(ends[:ne]) if is_float(s)]

    def blocks(values: Sequence[Any], shapes: Sequence[Shape], lie: Sequence[Cut]) -> list[Block]:
        return [Block(v, s.shape, c, sizes) for v, s, c in zip(values, shapes, lie, strict=True)]

    def mine(shapes: Sequence[Shape], lie: Sequence[Cut]) -> list[Shape]:
        return [Shape(block_shape(s.shape, c, sizes), s.dtype) for s, c in zip(shapes, lie, strict=True)]

    def traced(function: Callable, *shapes: Any) -> ClosedJaxpr:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.make_jaxpr(function)(*shapes)

    def traced_locally(function: Callable, shapes: Sequence[Shape]) -> ClosedJaxpr:
        with jax.sharding.use_abstract_mesh(compat.with_manual(mesh, mesh.axis_names)):
            return jax.make_jaxpr(function, axis_env=env)(*shapes)

    def joint(values: list[Any], cotangents: list[Any]) -> Any:
        moved = [*range(np_), *flows]

        def run(*some: Any) -> Any:
            full = list(values)
            for i, v in zip(moved, some, strict=True):
                full[i] = v
            outs = jax.core.eval_jaxpr(jaxpr, stage.closed.consts, *full)
            return [outs[i] for i in pulled], outs

        _, pull, outs = jax.vjp(run, *(values[i] for i in moved), has_aux=True)
        return outs, pull(cotangents)

    seen: dict[str, list[Cut]] = {}

    def forward_blocks(*values: Any) -> list[Block]:
        return evaluate(stage.closed, blocks(values, avals, cuts), sizes)

    def forward(*values: Any) -> Any:
        found = forward_blocks(*values)
        seen["outs"] = [b.cut for b in found]
        return [b.value for b in found]

    traced_locally(forward, mine(avals, cuts))
    outs_cut = seen["outs"][:ne]
    state_cut = dict(zip(stage.state, cuts[np_ : np_ + len(stage.state)], strict=True))
    wanted = outs_cut + [state_cut[n] for n in stage.moving]
    boundary = mine(ends[:ne], outs_cut)
    if not backward:
        closed = traced_locally(lambda *v: _moved(forward_blocks(*v), wanted), mine(avals, cuts))
        nothing = compat.subprogram(closed, [], [], [])
        mine_in = tuple(mine(avals[first_in:], ins_cut))
        return Programs(
            stage,
            closed,
            nothing,
            nothing,
            mine_in,
            tuple(boundary),
            tuple(ins_cut),
            tuple(outs_cut),
            (),
            (),
            (),
            ((),) * np_,
        )
    wanted += [cuts[i] for i in [*range(np_), *flows]]

    whole = traced(joint, avals, [ends[i] for i in pulled])

    def local(*values: Any) -> Any:
        lie = cuts + [outs_cut[i] for i in pulled]
        return _moved(evaluate(whole, blocks(values, avals + [ends[i] for i in pulled], lie), sizes), wanted)

    shapes = mine(avals, cuts) + mine([ends[i] for i in pulled], [outs_cut[i] for i in pulled])
    straight = traced_locally(local, shapes)
    split = _Split(straight, len(avals), np_, ne + nm, len(stage.state))
    f, i, w, saved, lasting, between = split.cut(first_in, remat)
    return Programs(
        stage,
        f,
        i,
        w,
        tuple(mine(avals[first_in:], ins_cut)),
        tuple(boundary),
        tuple(ins_cut),
        tuple(outs_cut),
        saved,
        lasting,
        between,
        split.sums,
    )


def costs_of(programs: Sequence[Programs]) -> Costs:
    """What the stages' programs cost by their counted operations, see `pipeline.work`."""
    rows = [
        tuple(cost_of(closed.jaxpr) for closed in row)
        for row in zip(*((p.forward, p.input_gradient, p.weight_gradient) for p in programs), strict=True)
    ]
    return Costs(*rows)


def _moved(found: Sequence[Block], cuts: Sequence[Cut]) -> list[Any]:
    return [b.moved(c).value for b, c in zip(found, cuts, strict=True)]


class _Split:
    """One straight program of a stage and its gradient, cut into F, I and W."""

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
            return compat.subprogram(self.closed, list(ins), [self.eqns[i] for i in sorted(run)], list(outs))

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
        todo = list(frontier)
        while todo:
            v = todo.pop(0)
            if v in free or v not in varying or v in self.closed.jaxpr.constvars:
                continue
            i = self.makers.get(v)
            if v in ins or v in self.state or i is None:
                out[v] = None
                continue
            equation = self.eqns[i]
            if (remat and equation.primitive.name not in _SENDS) or (
                equation.primitive.name in _GROWING and _bytes(equation.invars[0]) < _bytes(v)
            ):
                todo += _vars(equation.invars)
            else:
                out[v] = None
        return list(out)


_GROWING = frozenset({"broadcast_in_dim", "convert_element_type"})
_LINEAR = frozenset({"reshape", "transpose", "squeeze", "reduce_sum", "convert_element_type", "neg", "copy"})
_SENDS: frozenset[str] = frozenset()


def _bytes(atom: Any) -> int:
    return atom.aval.size * atom.aval.dtype.itemsize


def _vars(atoms: Sequence[Any]) -> list[Any]:
    return [a for a in atoms if isinstance(a, Var)]
