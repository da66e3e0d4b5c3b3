"""A stage as the programs that one device runs: forward, input gradient, weight gradient.

The stage and its gradient are traced together on global arrays. The trace is localized: it becomes the
program of one device on its blocks. That one straight program is then split into the three, so that no
operation is traced twice.
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
from shardtrain.pipeline.runtime.backward_split import BackwardSplit, Passes
from shardtrain.pipeline.schedules.action_costs import Costs

Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class StagePrograms:
    """What a device of a stage computes, as jaxprs of its blocks.

    Attributes:
        stage: on global arrays.
        forward: `(params, state, examples, ins)` to `(outs, updated, saved, lasting)`.
        input_gradient: `(params, examples, cotangents, saved, lasting)` to `(cotangents of ins, between)`.
        weight_gradient: `(params, examples, lasting, between)` to the gradients of the parameters.
        ins: the blocks of the activations that the stage before sends.
        outs: the blocks of the activations that it sends; for the last stage of the loss, the sums and the
            outputs.
        outs_cut: for each of `outs` the mesh axes that cut its dimensions.
        saved: the blocks kept from `F` to `I`.
        lasting: the blocks kept from `F` to `W`.
        between: the blocks kept from `I` to `W`.
        unsummed_axes: for each parameter the mesh axes over which its gradient is still to be summed.
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
    unsummed_axes: tuple[Axes, ...]


def is_float(shape: Any) -> bool:
    """Whether values of this dtype have gradients: floating and complex ones do."""
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
) -> StagePrograms:
    """Returns the programs of one device for a stage: its `F`, `I` and `W`.

    Args:
        stage: from `OperationGraph.cut`.
        given: the cuts of its parameters, variables and examples.
        ins_cut: the cuts of the activations that the stage before sends.
        mesh: with the pipeline's axes manual and the others automatic.
        last: whether its results are the loss and sums rather than activations.
        remat: keep only what the stage before sends, and compute the forward pass again in the backward pass.
        backward: whether gradients are needed; without them only `F` is of use.
        warned: see `evaluate`.
    """
    local = _LocalStage(stage, [*given, *ins_cut], mesh, set() if warned is None else warned, last=last)
    if backward:
        arguments, results = len(stage.closed.jaxpr.invars), len(stage.closed.jaxpr.outvars)
        both = local.with_gradient()
        halves = BackwardSplit(both, arguments, len(stage.params), results, len(stage.state))
        passes, unsummed = halves.split(local.first_in, remat), halves.unsummed_axes
    else:
        forward = local.forward()
        nothing = jaxprs.subprogram(forward, [], [], [])
        passes, unsummed = Passes(forward, nothing, nothing, (), (), ()), ((),) * len(stage.params)
    return StagePrograms(
        stage=stage,
        ins=local.arguments.blocks(local.sizes)[local.first_in :],
        outs=local.outs.blocks(local.sizes),
        outs_cut=local.outs.cuts,
        unsummed_axes=unsummed,
        **vars(passes),
    )


@dataclass(frozen=True)
class _Arrays:
    """The shapes of global arrays, and the mesh axes that cut their dimensions."""

    shapes: tuple[Shape, ...]
    cuts: tuple[Cut, ...]

    @classmethod
    def of(cls, variables: Sequence[Any], cuts: Sequence[Cut]) -> "_Arrays":
        return cls(tuple(Shape(v.aval.shape, v.aval.dtype) for v in variables), tuple(cuts))

    def and_of(self, other: "_Arrays", which: Sequence[int]) -> "_Arrays":
        """Returns these arrays and some of others."""
        shapes = *self.shapes, *(other.shapes[i] for i in which)
        return _Arrays(shapes, (*self.cuts, *(other.cuts[i] for i in which)))

    def blocks(self, sizes: Sizes) -> tuple[Shape, ...]:
        """Returns the shapes of the blocks of one device."""
        pairs = zip(self.shapes, self.cuts, strict=True)
        return tuple(Shape(block_shape(s.shape, cut, sizes), s.dtype) for s, cut in pairs)


class _LocalStage:
    """A stage and its gradient as programs of one device on its blocks.

    Args:
        stage, mesh, warned, last: see `localize`.
        cuts: of its arguments.

    Attributes:
        sizes: of the mesh axes that cut arrays.
        arguments: of the stage.
        outs: the results of the stage but the variables' new values.
        first_in: the number of the first argument that the stage before sends.
        differentiated: the numbers of the arguments that have gradients.
        with_cotangents: the numbers of the results whose gradients are given; for the last stage the loss.
        result_cuts: of all results; variables are cut as they were before.
    """

    def __init__(
        self, stage: Stage, cuts: Sequence[Cut], mesh: AbstractMesh, warned: set[str], *, last: bool
    ) -> None:
        self.stage, self.mesh, self.warned = stage, mesh, warned
        self.sizes = {n: s for n, s in mesh.shape.items() if n not in compat.manual_axes(mesh)}
        jaxpr, params = stage.closed.jaxpr, len(stage.params)
        self.arguments = _Arrays.of(jaxpr.invars, cuts)
        self.first_in = len(jaxpr.invars) - len(stage.ins)
        ends = jaxpr.outvars[: len(jaxpr.outvars) - len(stage.updated)]
        floats = [i for i in range(self.first_in, len(jaxpr.invars)) if is_float(self.arguments.shapes[i])]
        self.differentiated = [*range(params), *floats]
        self.with_cotangents = [0] if last else [i for i, v in enumerate(ends) if is_float(v.aval)]
        self.outs = _Arrays.of(ends, self._natural_cuts()[: len(ends)])
        before = dict(zip(stage.state, cuts[params : params + len(stage.state)], strict=True))
        self.result_cuts = [*self.outs.cuts, *(before[name] for name in stage.updated)]

    def _natural_cuts(self) -> list[Cut]:
        """Returns the cuts that the results have without being moved."""
        found: list[Cut] = []

        def noted(blocks: list[Block]) -> list[Block]:
            found.extend(b.cut for b in blocks)
            return blocks

        self._traced(self.stage.closed, self.arguments, noted)
        return found

    def forward(self) -> ClosedJaxpr:
        """Returns the program from arguments to results."""
        return self._traced(self.stage.closed, self.arguments, _moved_to(self.result_cuts))

    def with_gradient(self) -> ClosedJaxpr:
        """Returns the program from arguments and cotangents to results and gradients of arguments."""
        given = self.arguments.and_of(self.outs, self.with_cotangents)
        count = len(self.arguments.shapes)
        with jax.sharding.use_abstract_mesh(self.mesh):
            both = jax.make_jaxpr(self._with_pullback)(given.shapes[:count], given.shapes[count:])
        gradient_cuts = [self.arguments.cuts[i] for i in self.differentiated]
        return self._traced(both, given, _moved_to([*self.result_cuts, *gradient_cuts]))

    def _with_pullback(self, values: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        """Returns results and gradients, on global arrays."""
        closed = self.stage.closed

        def run(*some: Any) -> Any:
            full = list(values)
            for i, v in zip(self.differentiated, some, strict=True):
                full[i] = v
            outs = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *full)
            return [outs[i] for i in self.with_cotangents], outs

        _, pull, outs = jax.vjp(run, *(values[i] for i in self.differentiated), has_aux=True)
        return outs, pull(list(cotangents))

    def _traced(self, closed: ClosedJaxpr, given: _Arrays, end: Callable[[list[Block]], Any]) -> ClosedJaxpr:
        """Returns a program of global arrays as one of blocks; `end` is applied to the resulting blocks."""

        def run(*values: Any) -> list[Any]:
            rows = zip(values, given.shapes, given.cuts, strict=True)
            blocks = [Block(v, s.shape, cut, self.sizes) for v, s, cut in rows]
            return [b.value for b in end(evaluate(closed, blocks, self.sizes, self.warned))]

        with jax.sharding.use_abstract_mesh(compat.with_manual(self.mesh, self.mesh.axis_names)):
            return jax.make_jaxpr(run, axis_env=list(self.mesh.shape.items()))(*given.blocks(self.sizes))


def _moved_to(cuts: Sequence[Cut]) -> Callable[[list[Block]], list[Block]]:
    return lambda blocks: [b.moved(cut) for b, cut in zip(blocks, cuts, strict=True)]


def costs_of(programs: Sequence[StagePrograms]) -> Costs:
    """Returns the costs of the stages' programs, by their counted operations; see `operation_costs`."""
    rows = [
        tuple(cost_of(closed.jaxpr) for closed in row)
        for row in zip(*((p.forward, p.input_gradient, p.weight_gradient) for p in programs), strict=True)
    ]
    return Costs(*rows)
