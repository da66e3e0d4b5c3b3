"""The program of one microbatch, traced on global arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from shardtrain import compat
from shardtrain.mesh import PIPE, REPLICA
from shardtrain.pipeline.cut.graph import TracedMicrobatch
from shardtrain.train import check
from shardtrain.train.pipelined.microbatch import Microbatch
from shardtrain.train.step import Mode, Program


@dataclass(frozen=True)
class Trace:
    """One microbatch of training or evaluation.

    Attributes:
        microbatch: its jaxpr. The results behind the loss are the leaves of the sums, then those of the
            outputs.
        sums: the tree of the sums.
        outputs: the tree of the model's outputs; without leaves where nobody asks for them.
    """

    microbatch: TracedMicrobatch
    sums: Any
    outputs: Any

    @property
    def sum_shapes(self) -> list[Any]:
        """The shapes of the leaves of the sums."""
        return self._results[: self.sums.num_leaves]

    @property
    def output_shapes(self) -> list[Any]:
        """The shapes of the leaves of the outputs."""
        return self._results[self.sums.num_leaves :]

    @property
    def _results(self) -> list[Any]:
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.microbatch.results[1:]]


def trace(
    program: Program,
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    micro: Microbatch,
    mesh: Mesh,
    *,
    mode: Mode,
) -> Trace:
    """Returns the trace of one microbatch.

    Args:
        program: what a step computes.
        params: the shapes of the parameters by name.
        state: the shapes of the model's other variables by name.
        micro: the shapes of the examples.
        mesh: with `pipe`.
        mode: trace the loss; or, in evaluation mode, the sums or the outputs.

    Raises:
        UserError: an operator that a stage cannot run outside of an island.
    """
    param_names, state_names = sorted(params), sorted(state)
    trees: dict[str, Any] = {}

    def run(values: list, variables: list, *examples: Array) -> list:
        inputs, targets, real, index = jax.tree.unflatten(micro.tree, examples)
        before = dict(zip(state_names, variables, strict=True))
        args = dict(zip(param_names, values, strict=True)), before, inputs, targets, real, index
        outputs: Any = ()
        if mode == "train":
            loss, (sums, after) = program.microbatch(*args)
        else:
            outputs, sums = program.evaluated(*args, predict=mode == "predict")
            loss, after = jnp.zeros(()), before
        sum_leaves, trees["sums"] = jax.tree.flatten(sums)
        output_leaves, trees["outputs"] = jax.tree.flatten(outputs)
        return [loss, *sum_leaves, *output_leaves, *(after[name] for name in state_names)]

    given = [params[name] for name in param_names], [state[name] for name in state_names]
    with jax.sharding.use_abstract_mesh(compat.with_manual(mesh, [PIPE, REPLICA])):
        closed = jax.make_jaxpr(run)(*given, *micro.shapes)
    check.refuse_outside_islands(closed.jaxpr, mesh, staged=True)
    results = trees["sums"].num_leaves + trees["outputs"].num_leaves
    layers = program.variables.layers
    names = tuple(param_names), tuple(state_names)
    traced = TracedMicrobatch(closed, *names, micro.inputs, results, layers)
    return Trace(traced, trees["sums"], trees["outputs"])
