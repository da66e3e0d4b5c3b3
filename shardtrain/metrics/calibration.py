"""Metrics of probabilities: whether a model is as often right as it says."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, Shaped

from shardtrain.metrics.arguments import refuse_below
from shardtrain.metrics.base import Metric, Totals, add_up, count, examples, ratio
from shardtrain.metrics.labels import refuse_labels


def expected_calibration_error(bins: int = 15) -> Metric:
    r"""The mean distance between confidence and accuracy, over bins of equal width of the confidence.

    The confidence of a prediction is the largest softmax probability. With `n` predictions, of which `n_b`
    have a confidence in bin `b`, the interval `(b/bins, (b+1)/bins]`:

    .. math::
        \sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Scores are unnormalized, `(batch, *positions, classes)`. A score that is NaN makes the error NaN.

    Args:
        bins: the number of bins.

    Raises:
        UserError: no bin.

    Example:
        >>> metric = st.metrics.expected_calibration_error()
        >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25]] * 4)), jnp.array([0, 0, 1, 1])
        >>> round(metric.finish(metric.sums(logits, labels, jnp.ones(4))), 4)  # right in half of the cases
        0.25

    References:
        Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    refuse_below(1, "bins", bins)
    return Metric(functools.partial(_calibration_sums, bins), _calibration_error)


def _calibration_sums(
    bins: int,
    outputs: Float[Array, "batch *positions classes"],
    labels: Integer[Array, "batch *positions"],
    weights: Shaped[Array, " batch"],
) -> dict[str, Shaped[Array, " bins"]]:
    refuse_labels(outputs, labels)
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    # The largest of softmax's probabilities is exp(0) over the sum of all exp(x - max(x)).
    confidence = 1 / jnp.exp(outputs - outputs.max(-1, keepdims=True)).sum(-1)
    right = outputs.argmax(-1) == labels
    place = jnp.clip(jnp.ceil(confidence * bins) - 1, 0, bins - 1)
    place = jnp.where(jnp.isnan(confidence), 0, place).astype(jnp.int32)
    inside = (place[..., None] == jnp.arange(bins)) & examples(weights, labels.shape)[..., None]
    positions = tuple(range(labels.ndim))
    confidences = jnp.broadcast_to(confidence[..., None], inside.shape)
    return {
        "confidence": add_up(confidences, inside, positions),
        "hits": count(inside & right[..., None], positions),
        "count": count(inside, positions),
    }


def _calibration_error(total: Totals) -> float:
    # n_b |hits/n_b - confidence/n_b| is |hits - confidence|, and an empty bin adds nothing.
    return ratio(np.abs(np.subtract(total["hits"], total["confidence"])).sum(), np.sum(total["count"]))
