"""Metrics of predicted numbers."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num, Shaped

from shardtrain.errors import UserError
from shardtrain.metrics.base import Metric, add_up, count, examples, ratio


def mean_squared_error() -> Metric:
    """The mean of squared differences between outputs and targets, over all their elements.

    Example:
        >>> metric = st.metrics.mean_squared_error()
        >>> metric.finish(metric.sums(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 5.0]]), jnp.ones(1)))
        4.5
    """
    return _mean_of(jnp.square)


def mean_absolute_error() -> Metric:
    """The mean of absolute differences between outputs and targets, over all their elements.

    Example:
        >>> metric = st.metrics.mean_absolute_error()
        >>> metric.finish(metric.sums(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 5.0]]), jnp.ones(1)))
        1.5
    """
    return _mean_of(jnp.abs)


def _mean_of(function: Callable[[Array], Array]) -> Metric:
    """The mean of a function of the difference of every element."""
    return Metric(
        functools.partial(_difference_sums, function), lambda total: ratio(total["total"], total["count"])
    )


def _difference_sums(
    function: Callable[[Array], Array],
    outputs: Float[Array, "batch *features"],
    targets: Num[Array, "batch *features"],
    weights: Shaped[Array, " batch"],
) -> dict[str, Shaped[Array, ""]]:
    if outputs.shape != targets.shape:
        raise UserError(
            f"outputs of shape {outputs.shape} do not fit targets of shape {targets.shape}; give arrays of "
            f"one shape"
        )
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    real = examples(weights, outputs.shape)
    return {"total": add_up(function(outputs - targets), real), "count": count(real)}
