"""The protocol of every metric: sums over examples, and what is computed from their total.

A mean of the means of batches is wrong where batches differ in size, and the F1 score of a data set is no
mean of the scores of its parts at all. Sums can be added in any order and grouping, so a metric that is
written as sums has one value for a data set, whatever batches, devices, pipeline stages and processes it was
split over.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree, Shaped

from shardtrain.errors import UserError

PerExample = Callable[[Any, Any], Array]
"""A function of `(outputs, targets)` that returns one value per example."""

Totals = Mapping[str, np.ndarray | Array]
"""Sums by name: the tree that the shipped metrics return and finish."""

LARGEST = 2**31 - 1
"""The largest count that an int32 holds."""


@dataclass(frozen=True)
class Metric:
    """A metric as sums over examples and a finish.

    The trainer calls `sums` on every batch, inside `jit`, adds the results over microbatches, devices,
    pipeline stages and processes, and then over batches on the host, in int64 and float64 (see
    `accumulate`). It calls `finish` on the total. To write a metric of your own, give these two functions;
    where the metric is the mean of one value per example, `per_example` makes it of the function that
    computes the value.

    Rows with weight 0 fill up a ragged batch and may hold anything: NaN, infinities, labels that do not
    exist. `sums` must return exactly what it would return without them, so it must select with `jnp.where`
    (a product of NaN and 0 is NaN). `sums` should count in integers: a float32 cannot count beyond 2**24.

    Attributes:
        sums: `(outputs, targets, weights) -> tree of arrays`, traced inside `jit`. `weights` has shape
            `(batch,)` and is 1 for an example and 0 for a row that fills up the batch. Every leaf is a sum
            over the examples of the batch, of a shape that does not depend on their number.
        finish: `tree of arrays -> float or array`, on the host, of the total of all sums in int64 and
            float64.
        every_step: whether the metric is computed in every training step too. False for metrics that only
            `evaluate` computes, because they are costly or because their value is an array.

    Example:
        >>> def sums(outputs, targets, weights):
        ...     wrong = (outputs.argmax(-1) != targets) & (weights > 0)
        ...     return {"wrong": wrong.sum(), "all": (weights > 0).sum()}
        >>> error_rate = st.metrics.Metric(sums, lambda total: float(total["wrong"] / total["all"]))
        >>> logits, labels = jnp.eye(4), jnp.array([0, 1, 2, 0])
        >>> error_rate.finish(error_rate.sums(logits, labels, jnp.ones(4)))
        0.25
        >>> error_rate.finish(error_rate.sums(logits, labels, jnp.array([1.0, 1.0, 1.0, 0.0])))
        0.0
    """

    sums: Callable[[Any, Any, Array], Any]
    finish: Callable[[Any], float | np.ndarray]
    every_step: bool = True


def per_example(function: PerExample) -> Metric:
    """The mean over all examples of a function of outputs and targets.

    Args:
        function: `(outputs, targets) -> one value per example`, such as those in `shardtrain.losses`.

    Returns:
        A metric whose sums are `{"total", "count"}`.

    Raises:
        UserError: by `sums`, if the function returns another shape than `(batch,)`.

    Example:
        >>> metric = st.metrics.per_example(lambda outputs, targets: abs(outputs - targets).max(-1))
        >>> outputs, weights = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), jnp.array([1.0, 0.0])
        >>> metric.finish(metric.sums(outputs, jnp.zeros((2, 2)), weights))
        2.0
    """

    def sums(outputs: Any, targets: Any, weights: Array) -> dict[str, Array]:
        value = function(outputs, targets)
        if value.shape != weights.shape:
            raise UserError(
                f"{_name(function)} returned shape {value.shape} for {weights.shape[0]} examples; return one "
                f"value per example, the mean over the batch is taken here"
            )
        real = weights > 0
        return {"total": add_up(value, real), "count": count(real)}

    return Metric(sums, lambda total: ratio(total["total"], total["count"]))


def as_metric(value: Any) -> Metric:
    """The metric itself, or the metric that `per_example` makes of a function.

    Args:
        value: a metric, or a function `(outputs, targets) -> one value per example`.

    Raises:
        UserError: for anything else, and for a function of this package that was not called.

    Example:
        >>> st.metrics.as_metric(st.losses.dice).every_step
        True
    """
    if isinstance(value, Metric):
        return value
    if not callable(value) or inspect.isclass(value):
        raise UserError(
            f"{value!r} is no metric; give a shardtrain.metrics.Metric, or a function of (outputs, targets) "
            f"that returns one value per example"
        )
    if getattr(value, "__annotations__", {}).get("return") is Metric:
        raise UserError(
            f"{_name(value)} is a function that makes a metric; call it, as in {_name(value)}(...)"
        )
    return per_example(value)


def accumulate(total: PyTree | None, sums: PyTree) -> PyTree[Shaped[np.ndarray, "..."]]:
    """Adds the sums of one more batch to a total on the host, in int64 and float64.

    A batch's counts are int32 inside `jit`, which does not overflow below 2**31 examples, tokens or pixels
    per step. In int64 the total of all batches does not overflow below 2**63.

    Args:
        total: the total of the batches before, None for the first batch.
        sums: what `Metric.sums` returned for one batch.

    Returns:
        The new total. Leaves that are integers or truth values become int64, all others float64.

    Example:
        >>> total = st.metrics.accumulate(None, {"count": jnp.int32(2**31 - 1)})
        >>> int(st.metrics.accumulate(total, {"count": jnp.int32(1)})["count"])
        2147483648
    """
    wide = jax.tree.map(_widened, sums)
    return wide if total is None else jax.tree.map(lambda a, b: np.asarray(a + b), total, wide)


def finished(name: str, metric: Metric, total: PyTree) -> float | np.ndarray:
    """The value of a metric from the total of its sums, as a float or an array.

    Args:
        name: of the metric, for messages.
        metric: whose `finish` is called.
        total: of its sums.

    Raises:
        UserError: sums that `finish` cannot read, or a value that is neither a number nor an array.

    Example:
        >>> metric = st.metrics.per_example(st.losses.accuracy)
        >>> finished("accuracy", metric, {"total": np.float64(3), "count": np.int64(4)})
        0.75
    """
    try:
        value = np.asarray(metric.finish(total))
        return value if value.ndim else float(value)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        sums = jax.tree.map(np.shape, total)
        raise UserError(
            f"metric {name!r}: finish failed on sums of the shapes {sums} ({type(error).__name__}: {error}); "
            f"return the metric's own sums from the objective, and a number or an array from finish"
        ) from error


def _widened(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.int64 if array.dtype.kind in "biu" else np.float64)


def examples(weights: Shaped[Array, " batch"], shape: tuple[int, ...]) -> Array:
    """A mask of a shape `(batch, ...)` that is true for all elements of examples of positive weight."""
    column = (weights > 0).reshape(-1, *[1] * (len(shape) - 1))
    return jnp.broadcast_to(column, shape)


def add_up(
    values: Shaped[Array, "*shape"], mask: Shaped[Array, "*shape"], axis: tuple[int, ...] | None = None
) -> Array:
    """The sum of the values where a mask is true; of floating-point numbers in float32 at least."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    return jnp.where(mask, values, 0).sum(axis)


def count(mask: Shaped[Array, "*shape"], axis: tuple[int, ...] | None = None) -> Array:
    """The number of true elements, as int32.

    Raises:
        UserError: a mask of so many elements that an int32 could overflow.
    """
    counted = mask.size if axis is None else math.prod(mask.shape[dim] for dim in axis)
    refuse_overflow(counted)
    return mask.sum(axis, dtype=jnp.int32)


def refuse_overflow(counted: int) -> None:
    """Raises if an int32 cannot count so many elements.

    Raises:
        UserError: says how many there are.
    """
    if counted > LARGEST:
        raise UserError(
            f"a batch has {counted:,} values to count, more than the {LARGEST:,} that an int32 holds; use "
            f"smaller batches, totals over batches have no such limit"
        )


def ratio(numerator: Any, denominator: Any) -> float:
    """A quotient of two totals as a float; NaN where the denominator is 0.

    Example:
        >>> ratio(1, 4), ratio(1, 0)
        (0.25, nan)
    """
    return float(numerator) / float(denominator) if denominator else math.nan


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
