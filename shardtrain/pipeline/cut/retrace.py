"""A model that was cut before, traced again: for batches of another shape, or in evaluation mode."""

from collections.abc import Mapping

from shardtrain.errors import UserError
from shardtrain.jaxprs import variables
from shardtrain.pipeline.cut.graph import OperationGraph, Stage


def starts_by_owner(graph: OperationGraph, stage_of: Mapping[str, int], stages: int) -> list[int]:
    """Returns the starts of stages that put every variable of a graph into the stage that stores it.

    Args:
        graph: of the new trace.
        stage_of: the stage that stores each parameter and variable.
        stages: how many.
    """
    params, state, _ = graph.traced.groups()
    names = dict(zip((*params, *state), (*graph.traced.params, *graph.traced.state), strict=True))
    updated = {i: names[v] for v, i in graph.updated().items()}
    starts: list[int] = []
    for i, uses in enumerate(graph.uses):
        own = [names[v] for v in uses if v in names] + ([updated[i]] if i in updated else [])
        stage = max((stage_of[name] for name in own if name in stage_of), default=0)
        starts += [i] * (stage - len(starts))
    return starts + [len(graph.main)] * (stages - 1 - len(starts))


def cut_by_owner(graph: OperationGraph, stage_of: Mapping[str, int], stages: int) -> list[Stage]:
    """Returns the stages of a graph, cut so that each uses only variables that it stores.

    Args:
        graph: of the new trace.
        stage_of: the stage that stores each parameter and variable.
        stages: how many.

    Raises:
        UserError: a layer runs in another stage than when the model was cut, or ran in none then.
    """
    parts = graph.cut(starts_by_owner(graph, stage_of, stages))
    params = frozenset(graph.traced.params)
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
    graph: OperationGraph, stage_of: Mapping[str, int], random: Mapping[str, bool], microbatches: int
) -> None:
    """Refuses variables that change whatever the inputs are, with the exception of random streams.

    Stages that work on different microbatches at a time would see different values of them.

    Args:
        graph: of training.
        stage_of: the stage of each variable that is stored in one; no activation changes the others.
        random: which variables are random streams, from which each microbatch starts anew.
        microbatches: in a batch.

    Raises:
        UserError: names the variable.
    """
    traced = graph.traced
    params, before, _ = traced.groups()
    for (name, new), old in zip(traced.new_state.items(), before, strict=True):
        if name in stage_of or new is old:
            continue
        of_weights = not graph.support(variables([new])).isdisjoint(params)
        if of_weights or (microbatches > 1 and not random[name]):
            raise UserError(
                f"pipeline: the variable {name!r} changes in training whatever the inputs are (as counters "
                f"and spectral norms do), so that stages at different microbatches would not see the same "
                f"value; train this model without pipe"
            )
