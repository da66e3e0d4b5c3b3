"""What training minimizes: a loss and metrics of each example, as a function of the model and the batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from shardtrain.errors import UserError
from shardtrain.metrics import Metric, PerExample
from shardtrain.train import losses


@dataclass(frozen=True)
class Context:
    """What an objective may know about a step besides the model and the batch.

    Attributes:
        train: True in a training step, False in evaluation.
        rows: examples in the batch or, under accumulation and on pipeline stages, in the microbatch.
        index: the number of each example in the whole batch, from 0. Random numbers that are drawn from it
            are the same on every mesh and for every number of microbatches.
        real: False for the rows that fill up a ragged batch; None where all rows are real. The trainer leaves
            out those rows by itself: an objective needs the mask only for sums of its own.
    """

    train: bool
    rows: int
    index: Int[Array, " rows"]
    real: Bool[Array, " rows"] | None

    @property
    def weights(self) -> Float[Array, " rows"]:
        """1 for each real example and 0 for each row that fills up, as `Metric.sums` takes them."""
        return jnp.ones(self.rows, jnp.float32) if self.real is None else self.real.astype(jnp.float32)


Objective = Callable[[nnx.Module, tuple[Any, Any], Context], tuple[Array, Mapping[str, Any]]]
"""`(model, (inputs, targets), context) -> (loss of each example, metrics by name)`, see `Trainer`."""


@dataclass(frozen=True)
class Measured:
    """The objective that `Trainer(loss=, metrics=)` stands for: outputs of the model against the targets.

    Attributes:
        loss: one value per example.
        metrics: by name, metrics or functions that return one value per example.
        sizes: the last extents of the outputs, of each call that was traced; the numbers of classes where the
            targets are labels.
    """

    loss: PerExample
    metrics: Mapping[str, Metric | PerExample]
    sizes: list[int] = field(default_factory=list, compare=False)

    def __call__(self, model: Any, batch: tuple[Any, Any], context: Context) -> tuple[Array, dict[str, Any]]:
        inputs, targets = batch
        outputs = jax.tree.map(widened, model(inputs))
        losses.refuse_labels(self.loss, outputs, targets)
        self.sizes.extend(y.shape[-1] for y in jax.tree.leaves(outputs)[:1] if y.ndim)
        found: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            if not isinstance(metric, Metric):
                losses.refuse_labels(metric, outputs, targets)
                found[name] = metric(outputs, targets)
            elif metric.every_step or not context.train:
                found[name] = metric.sums(outputs, targets, context.weights)
        return self.loss(outputs, targets), found


def refuse_classes(objective: Any, targets: Any) -> None:
    """Refuses targets of a host batch that are labels of classes that the model does not have.

    Args:
        objective: one that knows nothing of classes, or has not been traced, refuses nothing.
        targets: of the batch.

    Raises:
        UserError: names such a label.
    """
    labels = np.asarray(targets) if isinstance(targets, np.ndarray | jax.Array) else None
    if isinstance(objective, Measured) and objective.sizes and labels is not None:
        losses.refuse_classes(objective.loss, labels, objective.sizes[-1])


def widened(y: Array) -> Array:
    """Returns an array in float32 at least, in which losses are computed whatever the model computes in."""
    return y.astype(jnp.promote_types(y.dtype, jnp.float32))


def summed(found: Any, declared: Mapping[str, Metric], context: Context, unit: str) -> dict[str, Any]:
    """Sums over the real examples of a batch: the one place where means are prepared.

    Args:
        found: what an objective returned: the loss of each example, and metrics by name, each one value per
            example or the sums of a declared metric.
        declared: the metrics whose finish the trainer knows.
        context: of the batch.
        unit: of the trainer, whose names a row has.

    Returns:
        `{"examples": their number, "loss": the summed loss, "metrics": sums by name}`. The sum of a metric
        that is not declared is one number, whose mean over the examples is its value.

    Raises:
        UserError: a loss or a metric that is neither one value per example nor declared; a declared metric
            that is missing in evaluation; a name that a row uses for something else.
    """
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
        raise UserError(
            f"the objective returned {type(found).__name__}; return the loss of each example and a "
            f"dictionary of metrics, such as (loss, {{}})"
        )
    loss, metrics = found
    refuse_names(metrics, unit)
    if missing := [key for key in declared if key not in metrics and not context.train]:
        raise UserError(
            f"the objective returned no {missing[0]!r} in evaluation, which metrics= declares; return "
            f"{missing[0]!r} with its sums, or leave it out of metrics="
        )
    real = context.real
    count = jnp.asarray(context.rows if real is None else real.sum(), jnp.float32)

    def total(name: str, values: Any) -> Array:
        values = jnp.asarray(values) if isinstance(values, np.ndarray) else values
        if not isinstance(values, jax.Array) or values.shape != (context.rows,):
            shape = getattr(values, "shape", type(values).__name__)
            raise UserError(
                f"{name} returned shape {shape} for {context.rows} examples; return one value per "
                f"example, the mean over the batch is taken here"
            )
        values = widened(values)
        return (values if real is None else jnp.where(real, values, 0)).sum()

    sums = {name: value if name in declared else total(name, value) for name, value in metrics.items()}
    return {"examples": count, "loss": total("loss", loss), "metrics": sums}


def refuse_names(names: Mapping[str, Any], unit: Any) -> None:
    """Refuses metrics by names that a run's rows use for something else, and a unit that is no name.

    Raises:
        UserError: names the metric.
    """
    if not isinstance(unit, str) or not unit.isidentifier():
        raise UserError(
            f"unit={unit!r}: rows name it, as in images_per_second; give a word such as 'sequences'"
        )
    taken = {"loss", "examples", "grad_norm", "step", "seconds", "skipped", "rolled_back", "peak_memory"}
    taken |= {f"{unit}_per_second", "data_seconds", "compute_seconds", "checkpoint_seconds"}
    for name in names:
        if name in taken or not isinstance(name, str) or not name:
            raise UserError(
                f"metrics={{{name!r}: ...}}: a run's rows use this name for a number of their own; name the "
                f"metric otherwise, for example {f'my_{name}'!r}"
            )
