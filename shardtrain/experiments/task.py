"""What an experiment trains, and on what."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from rich.table import Table

from shardtrain import compat
from shardtrain.metrics import Metric, PerExample
from shardtrain.nn import LayoutTable
from shardtrain.train import Trainer
from shardtrain.train.objective import Objective


@runtime_checkable  # a recipe may be imported where types are checked at run time
class Batches(Protocol):
    """The training batches from step `start` on: those `rows` of each that this process trains on."""

    def __call__(self, *, start: int, rows: range) -> Iterator[tuple[Any, Any]]: ...


@dataclass(frozen=True)
class Report:
    """What a task has to say of a run besides what every run says.

    Attributes:
        result: more entries of the result.
        rows: more rows of the closing table, name and value.
        tables: more tables to print.
    """

    result: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Task:
    """What an experiment trains, and on what.

    Attributes:
        name: of the model, `"resnet8"`.
        make: makes the network.
        train: the training batches.
        test: the test batches, those rows of each that this process evaluates.
        validation: as `test`, batches to evaluate on during training; None where the task has none.
        loss, objective, metrics, dimensions, unit: as `Trainer` takes them.
        score: the metric that the run is judged by, or `"loss"`; by default the first of the metrics, and the
            loss where there are none.
        layout: layouts that differ from the default, as `Trainer` takes them.
        trainer: more arguments of `Trainer`.
        report: called after the evaluation with the trainer and the run's folder, for pictures and numbers
            of the task's own.
    """

    name: str
    make: Callable[[], nnx.Module]
    train: Batches
    test: Callable[[range], Iterable[tuple[Any, Any]]]
    validation: Callable[[range], Iterable[tuple[Any, Any]]] | None = None
    loss: PerExample | None = None
    objective: Objective | None = None
    metrics: Mapping[str, Metric | PerExample] | None = None
    dimensions: Any = None
    unit: str = "images"
    score: str | None = None
    layout: LayoutTable | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[Trainer, Path], Report] = lambda trainer, out: Report()

    @cached_property
    def model(self) -> nnx.Module:
        """The network with its initial values.

        One program makes them all. It is compiled with little optimization, because it runs once.
        """
        kept = []

        def values() -> nnx.State:
            graph, state = nnx.split(self.make())
            kept.append(graph)
            return state

        state = jax.jit(values, compiler_options=compat.in_haste())()
        return nnx.merge(kept[0], state)
