"""A stage as the programs that one device runs: forward, input gradient, weight gradient.

The stage and its gradient are traced together on global arrays, brought into local form, and that one
straight program is cut into the three. No program is traced twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh

from shardtrain import compat, jaxprs
from shardtrain.layout import Axes
from shardtrain.pipeline.cut.graph import Stage
from shardtrain.pipeline.cut.operation_costs import cost_of
from shardtrain.pipeline.localize.evaluate import Block, Cut, Sizes, block_shape, evaluate
from shardtrain.pipeline.runtime.backward_split import BackwardSplit
from shardtrain.pipeline.schedules.costs import Costs

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Programs:
    """What a device of a stage computes, as jaxprs of its blocks.

    Attributes:
        stage: which one.
        forward: `(params, state, sides, ins)` to `(outs, moving, saved, lasting)`.
        input_gradient: `(params, sides, cotangents, saved, lasting)` to `(cotangents of ins, between)`.
        weight_gradient: `(params, sides, lasting, between)` to gradients of the parameters.
        ins, outs: blocks of the activations.
        outs_cut: how those that leave lie.
        saved, lasting, between: blocks kept from `F` to `I`, from `F` to `W`, from `I` to `W`.
        sums: mesh axes over which each parameter's gradient is still to be summed.
    """

    stage: Stage
    forward: ClosedJaxpr
    input_gradient: ClosedJaxpr
    weight_gradient: ClosedJaxpr
    ins: tuple[Shape, ...]
    outs: tuple[Shape, ...]
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
    warned: set[str] | None = None,
) -> Programs:
    """Brings a stage and its gradient into local form and cuts them into `F`, `I` and `W`.

    Args:
        stage: from `OperationGraph.cut`.
        given: how its parameters, variables and sides lie.
        ins_cut: how its other arguments lie.
        mesh: with the pipeline's axes manual and the others automatic.
        last: whether its outputs are the loss and sums rather than activations.
        remat: save only the stage's inputs and compute forward again in the backward pass.
        backward: whether it is ever run; without, only `F` is of use.
        warned: see `evaluate`.
    """
    one = _Local(stage, [*given, *ins_cut], mesh, set() if warned is None else warned, last=last)
    sums: tuple[Axes, ...] = ((),) * len(stage.params)
    saved = lasting = between = ()
    if backward:
        arguments, results = len(stage.closed.jaxpr.invars), len(stage.closed.jaxpr.outvars)
        passes = BackwardSplit(one.with_gradient(), arguments, len(stage.params), results, len(stage.state))
        forward, inputs, weights, saved, lasting, between = passes.cut(one.first_in, remat)
        sums = passes.sums
    else:
        forward = one.forward()
        inputs = weights = jaxprs.subprogram(forward, [], [], [])
    ins, outs = one.arguments.blocks(one.sizes)[one.first_in :], one.outs.blocks(one.sizes)
    return Programs(stage, forward, inputs, weights, ins, outs, one.outs.cuts, saved, lasting, between, sums)


@dataclass(frozen=True)
class _Arrays:
    """Global arrays, and how each lies on the mesh."""

    shapes: tuple[Shape, ...]
    cuts: tuple[Cut, ...]

    @classmethod
    def of(cls, variables: Sequence[Any], cuts: Sequence[Cut]) -> "_Arrays":
        return cls(tuple(Shape(v.aval.shape, v.aval.dtype) for v in variables), tuple(cuts))

    def and_of(self, other: "_Arrays", which: Sequence[int]) -> "_Arrays":
        """These, and some of others."""
        shapes = *self.shapes, *(other.shapes[i] for i in which)
        return _Arrays(shapes, (*self.cuts, *(other.cuts[i] for i in which)))

    def blocks(self, sizes: Sizes) -> tuple[Shape, ...]:
        """What a device has of each."""
        pairs = zip(self.shapes, self.cuts, strict=True)
        return tuple(Shape(block_shape(s.shape, cut, sizes), s.dtype) for s, cut in pairs)


class _Local:
    """A stage, and its gradient with it, as what one device computes on its blocks.

    Args:
        stage, mesh, warned, last: see `localize`.
        cuts: how its arguments lie.

    Attributes:
        sizes: of the mesh axes that cut arrays.
        arguments, outs: of the stage; `outs` without the variables' new values.
        first_in: number of the first argument that the stage before sends.
        differentiated: numbers of the arguments that have gradients.
        pulled: numbers of the results whose gradients arrive: of the last stage the loss.
        wanted: how all results are to lie: variables as they did before.
    """

    def __init__(
        self, stage: Stage, cuts: Sequence[Cut], mesh: AbstractMesh, warned: set[str], *, last: bool
    ) -> None:
        self.stage, self.mesh, self.warned = stage, mesh, warned
        self.sizes = {n: s for n, s in mesh.shape.items() if n not in compat.manual_axes(mesh)}
        jaxpr, params = stage.closed.jaxpr, len(stage.params)
        self.arguments = _Arrays.of(jaxpr.invars, cuts)
        self.first_in = len(jaxpr.invars) - len(stage.ins)
        ends = jaxpr.outvars[: len(jaxpr.outvars) - len(stage.moving)]
        floats = [i for i in range(self.first_in, len(jaxpr.invars)) if is_float(self.arguments.shapes[i])]
        self.differentiated = [*range(params), *floats]
        self.pulled = [0] if last else [i for i, v in enumerate(ends) if is_float(v.aval)]
        self.outs = _Arrays.of(ends, self._lying()[: len(ends)])
        before = dict(zip(stage.state, cuts[params : params + len(stage.state)], strict=True))
        self.wanted = [*self.outs.cuts, *(before[name] for name in stage.moving)]

    def _lying(self) -> list[Cut]:
        """How the results lie as they come."""
        found: list[Cut] = []

        def seen(blocks: list[Block]) -> list[Block]:
            found.extend(b.cut for b in blocks)
            return blocks

        self._traced(self.stage.closed, self.arguments, seen)
        return found

    def forward(self) -> ClosedJaxpr:
        """Arguments to results."""
        return self._traced(self.stage.closed, self.arguments, _moving(self.wanted))

    def with_gradient(self) -> ClosedJaxpr:
        """Arguments, and gradients of results, to results and gradients of arguments."""
        given = self.arguments.and_of(self.outs, self.pulled)
        count = len(self.arguments.shapes)
        with jax.sharding.use_abstract_mesh(self.mesh):
            whole = jax.make_jaxpr(self._joint)(given.shapes[:count], given.shapes[count:])
        lie = [self.arguments.cuts[i] for i in self.differentiated]
        return self._traced(whole, given, _moving([*self.wanted, *lie]))

    def _joint(self, values: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        """The same on global arrays."""
        closed = self.stage.closed

        def run(*some: Any) -> Any:
            full = list(values)
            for i, v in zip(self.differentiated, some, strict=True):
                full[i] = v
            outs = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *full)
            return [outs[i] for i in self.pulled], outs

        _, pull, outs = jax.vjp(run, *(values[i] for i in self.differentiated), has_aux=True)
        return outs, pull(list(cotangents))

    def _traced(self, closed: ClosedJaxpr, given: _Arrays, end: Callable[[list[Block]], Any]) -> ClosedJaxpr:
        """A program of global arrays on their blocks; `end` has the last word on its results."""

        def run(*values: Any) -> list[Any]:
            rows = zip(values, given.shapes, given.cuts, strict=True)
            blocks = [Block(v, s.shape, cut, self.sizes) for v, s, cut in rows]
            return [b.value for b in end(evaluate(closed, blocks, self.sizes, self.warned))]

        with jax.sharding.use_abstract_mesh(compat.with_manual(self.mesh, self.mesh.axis_names)):
            return jax.make_jaxpr(run, axis_env=list(self.mesh.shape.items()))(*given.blocks(self.sizes))


def _moving(cuts: Sequence[Cut]) -> Callable[[list[Block]], list[Block]]:
    return lambda found: [b.moved(cut) for b, cut in zip(found, cuts, strict=True)]


def costs_of(programs: Sequence[Programs]) -> Costs:
    """What the stages' programs cost by their counted operations, see `pipeline.work`."""
    rows = [
        tuple(cost_of(closed.jaxpr) for closed in row)
        for row in zip(*((p.forward, p.input_gradient, p.weight_gradient) for p in programs), strict=True)
    ]
    return Costs(*rows)
