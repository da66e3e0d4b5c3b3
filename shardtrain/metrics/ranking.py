"""Metrics of the order of scores: the area under the ROC curve."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Integer, Shaped

from shardtrain.errors import UserError
from shardtrain.metrics.arguments import refuse_below
from shardtrain.metrics.base import Metric, Totals, count
from shardtrain.metrics.labels import widened


def auc(bins: int = 1024) -> Metric:
    r"""The area under the ROC curve of two classes, from histograms of the scores.

    The area is the share of pairs of a positive and a negative example in which the positive one has the
    larger score, where pairs of equal scores count one half. That depends on the order of all scores, which
    no sum of a fixed size holds. So the scores of each class are counted in bins, and a pair counts one half
    also if its scores fall in the same bin. With `p_b` and `n_b` positive and negative examples in bin `b`,
    of `p` and `n`:

    .. math::
        \frac{1}{pn} \sum_b p_b \Big(\sum_{c<b} n_c + \frac{n_b}{2}\Big), \qquad
        |\mathrm{error}| \le \frac{1}{2pn} \sum_b p_b n_b

    `auc_error_bound` is the right-hand side. It is 0 for scores that no bin mixes, and about `1 / (2 bins)`
    of scores that fill the bins evenly.

    Scores are any real numbers, and only their order matters: `(batch,)` or `(batch, 1)`, larger for class 1;
    or `(batch, 2)`, one for each class, of which the difference is taken. A score `s` has its bin by
    `s / (1 + |s|)`, so that bins are narrow near 0 and every logit has one. Only `evaluate` computes the
    area. It is NaN without a positive or without a negative example, and where a score is NaN or a label is
    not 0 or 1.

    Args:
        bins: the number of bins, of equal width in `s / (1 + |s|)` between -1 and 1.

    Raises:
        UserError: no bin; by `sums`, outputs of another shape.

    Example:
        >>> metric = st.metrics.auc()
        >>> scores, labels = jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])
        >>> metric.finish(metric.sums(scores, labels, jnp.ones(4)))
        0.75

    References:
        Fawcett, An Introduction to ROC Analysis, 2006.
    """
    return _of_histograms(bins, _area)


def auc_error_bound(bins: int = 1024) -> Metric:
    """How far `auc` of as many bins is at most from the area under the exact ROC curve.

    It is computed from the same histograms, which XLA computes once where both metrics are asked for.

    Args:
        bins: as in `auc`.

    Raises:
        UserError: no bin; by `sums`, outputs of another shape.

    Example:
        >>> metric = st.metrics.auc_error_bound(bins=2)  # all positive scores are in one bin
        >>> scores, labels = jnp.array([-0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1])
        >>> metric.finish(metric.sums(scores, labels, jnp.ones(4)))
        0.25
    """
    return _of_histograms(bins, _mixed_pairs)


def _of_histograms(bins: int, measure: Callable[[np.ndarray, np.ndarray], float]) -> Metric:
    """A metric computed from how many positive and how many negative scores each bin has."""
    refuse_below(1, "bins", bins)

    def finish(total: Totals) -> float:
        positive, negative = (np.asarray(total[name], np.float64) for name in ("positive", "negative"))
        pairs = positive.sum() * negative.sum()
        if not pairs or np.any(total["undefined"]):
            return math.nan
        return measure(positive, negative) / float(pairs)

    return Metric(functools.partial(_histograms, bins), finish, every_step=False)


def _area(positive: np.ndarray, negative: np.ndarray) -> float:
    smaller = np.cumsum(negative) - negative
    return float((positive * (smaller + negative / 2)).sum())


def _mixed_pairs(positive: np.ndarray, negative: np.ndarray) -> float:
    return float((positive * negative).sum() / 2)


def _histograms(
    bins: int,
    outputs: Float[Array, "batch *one"],
    labels: Integer[Array, " batch"],
    weights: Shaped[Array, " batch"],
) -> dict[str, Int32[Array, "..."]]:
    scores = _scores(outputs)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    # As 1 - 1/(1 + |s|), which is 1 for infinite scores.
    squeezed = jnp.sign(scores) * (1 - 1 / (1 + jnp.abs(scores)))
    place = jnp.clip(jnp.floor((squeezed + 1) * (bins / 2)), 0, bins - 1)
    place = jnp.where(jnp.isnan(place), 0, place).astype(jnp.int32)
    inside, labels, real = place[:, None] == jnp.arange(bins), widened(labels), weights > 0
    defined = ~jnp.isnan(scores) & ((labels == 0) | (labels == 1))
    return {
        "positive": count(inside & (real & (labels == 1))[:, None], (0,)),
        "negative": count(inside & (real & (labels == 0))[:, None], (0,)),
        "undefined": count(real & ~defined),
    }


def _scores(outputs: Float[Array, "batch *one"]) -> Float[Array, " batch"]:
    """One score per example, larger for class 1."""
    if outputs.ndim == 1:
        return outputs
    if outputs.ndim == 2 and outputs.shape[1] == 1:
        return outputs[:, 0]
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        return outputs[:, 1] - outputs[:, 0]
    raise UserError(
        f"the area under the ROC curve is for two classes, and the outputs have shape {outputs.shape}; give "
        f"scores of shape (batch,), (batch, 1) or (batch, 2)"
    )
