"""Metrics of sequences of tokens."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer, Shaped

from shardtrain.metrics.base import Metric, Totals, add_up, count, examples, ratio
from shardtrain.metrics.labels import one_hot, refuse_labels, widened


def perplexity(ignore_label: int | None = None) -> Metric:
    """The exponential of the mean negative log-likelihood of a token, over all tokens of the data.

    Scores are unnormalized, `(batch, *time, vocabulary)`; labels have shape `(batch, *time)`. It is no mean
    over sequences: a long sequence counts more than a short one. A label that is outside of the vocabulary
    and is not `ignore_label` makes the perplexity NaN.

    Args:
        ignore_label: tokens with this label count nowhere, such as padding.

    Example:
        >>> metric = st.metrics.perplexity(ignore_label=-1)
        >>> logits, labels = jnp.zeros((2, 3, 8)), jnp.array([[5, 1, 7], [2, -1, -1]])
        >>> round(metric.finish(metric.sums(logits, labels, jnp.ones(2))), 4)
        8.0

    References:
        Jelinek, Mercer, Bahl and Baker, Perplexity: a Measure of the Difficulty of Speech Recognition Tasks,
        1977.
    """
    return Metric(functools.partial(_perplexity_sums, ignore_label), _perplexity)


def _perplexity_sums(
    ignore_label: int | None,
    outputs: Float[Array, "batch *time vocabulary"],
    labels: Integer[Array, "batch *time"],
    weights: Shaped[Array, " batch"],
) -> dict[str, Shaped[Array, ""]]:
    refuse_labels(outputs, labels)
    real = examples(weights, labels.shape)
    if ignore_label is not None:
        real &= widened(labels) != ignore_label
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    # A comparison instead of a gather, which XLA would serve with the whole vocabulary where that is sharded.
    true = one_hot(labels, outputs.shape[-1])
    surprise = jax.nn.logsumexp(outputs, axis=-1) - jnp.where(true, outputs, 0).sum(-1)
    surprise = jnp.where(true.any(-1), surprise, jnp.nan)
    return {"negative_log_likelihood": add_up(surprise, real), "tokens": count(real)}


def _perplexity(total: Totals) -> float:
    try:
        return math.exp(ratio(total["negative_log_likelihood"], total["tokens"]))
    except OverflowError:
        return math.inf
