"""A pipelined model traced again, for batches of another shape or in evaluation mode, and what cannot be."""

from collections.abc import Mapping

from shardtrain.errors import UserError
from shardtrain.pipeline.cut.graph import OperationGraph, Stage, variables


def following(flow: OperationGraph, stage_of: Mapping[str, int], stages: int) -> list[int]:
    """Positions that put every parameter of a flow into the stage where `stage_of` has it."""
    params, state, _ = flow.traced.groups()
    names = dict(zip((*params, *state), (*flow.traced.params, *flow.traced.state), strict=True))
    moved = {i: names[v] for v, i in flow.moving().items()}
    positions: list[int] = []
    for i, uses in enumerate(flow.uses):
        mine = [names[v] for v in uses if v in names] + ([moved[i]] if i in moved else [])
        at = max((stage_of[name] for name in mine if name in stage_of), default=0)
        positions += [i] * (at - len(positions))
    return positions + [len(flow.main)] * (stages - 1 - len(positions))


def retrace_stages(flow: OperationGraph, stage_of: Mapping[str, int], stages: int) -> list[Stage]:
    """The stages of a model that was cut already, so that each has the variables that it keeps.

    Raises:
        UserError: a layer that runs in another stage than when the model was cut, or ran in none then.
    """
    parts = flow.cut(following(flow, stage_of, stages))
    params = frozenset(flow.traced.params)
    for k, stage in enumerate(parts):
        for name in (*stage.params, *stage.state):
            if stage_of.get(name, -1 if name in params else k) != k:
                raise UserError(
                    f"pipeline: {name!r} is used in evaluation, or for batches of this shape, by layers that "
                    f"do not run in the order (or at all) in which the first training batch ran them; "
                    f"evaluate trainer.model instead, or train without pipe"
                )
    return parts


def refuse_counters(
    flow: OperationGraph, stage_of: Mapping[str, int], random: Mapping[str, bool], microbatches: int
) -> None:
    """Refuses variables that change by themselves, whatever the inputs are, but for random streams.

    Stages that are at different microbatches would not see the same values.

    Args:
        flow: of training.
        stage_of: the stage of what is kept in one; no activation changes the others.
        random: which variables are random streams: each microbatch starts from the same.
        microbatches: in a batch.

    Raises:
        UserError: names the variable.
    """
    params, before, _ = flow.traced.groups()
    after = flow.traced.closed.jaxpr.outvars[1 + flow.traced.sums :]
    for name, old, new in zip(flow.traced.state, before, after, strict=True):
        if name in stage_of or new is old:
            continue
        of_weights = not flow.support(variables([new])).isdisjoint(params)
        if of_weights or (microbatches > 1 and not random[name]):
            raise UserError(
                f"pipeline: the variable {name!r} changes in training whatever the inputs are (as counters "
                f"and spectral norms do), which stages at different microbatches would not see alike; train "
                f"this model without pipe"
            )
