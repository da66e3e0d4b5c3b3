"""Metrics of class scores against labels: accuracy, top-k, confusion matrix, precision, recall, F1.

Scores have the classes last, labels the same shape without them: one label per example, or one for every
token or pixel. The predicted class is the one of the largest score. Classes are counted by comparing labels
with all class numbers and adding up over the dimensions as they are, which needs no communication but the
sum. For the histogram of flattened labels that is more usual, XLA gathers pixels sharded over several axes.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Integer, Shaped

from shardtrain.errors import UserError
from shardtrain.metrics.arguments import refuse_average, refuse_below
from shardtrain.metrics.base import Metric, Totals, count, examples, ratio, refuse_overflow
from shardtrain.metrics.labels import one_hot, refuse_labels, widened


def accuracy() -> Metric:
    """The share of labels whose class has the largest score; of equal scores the first class's counts.

    It is `top_k(1)`. A label that is no class counts as wrong, and so does one whose score is NaN.

    Example:
        >>> metric = st.metrics.accuracy()
        >>> logits, labels = jnp.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), jnp.array([0, 1, 1])
        >>> round(metric.finish(metric.sums(logits, labels, jnp.ones(3))), 4)
        0.6667
    """
    return top_k(1)


def top_k(k: int) -> Metric:
    """The share of labels whose class is among the `k` of the largest scores.

    Of equal scores those of the first classes count as larger, as in `jax.lax.top_k`. A label that is no
    class counts as wrong, and so does one whose score is NaN.

    Args:
        k: how many classes may be named.

    Raises:
        UserError: a `k` below 1; by `sums`, a `k` above the number of classes.

    Example:
        >>> metric = st.metrics.top_k(2)
        >>> logits = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
        >>> metric.finish(metric.sums(logits, jnp.array([1, 2]), jnp.ones(2)))
        0.5
    """
    refuse_below(1, "k", k)
    return Metric(functools.partial(_top_k_sums, k), lambda total: ratio(total["hits"], total["count"]))


def confusion_matrix(classes: int) -> Metric:
    """How often each label was predicted as each class: rows are labels, columns predictions.

    A label that is no class is in no row. The value is an array, so only `evaluate` computes it.

    Args:
        classes: the number of classes.

    Raises:
        UserError: no class; by `sums`, scores of another number of classes.

    Example:
        >>> metric = st.metrics.confusion_matrix(2)
        >>> logits, labels = jnp.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), jnp.array([0, 1, 1])
        >>> metric.finish(metric.sums(logits, labels, jnp.ones(3)))
        array([[1, 0],
               [1, 1]])
    """
    refuse_below(1, "classes", classes)
    return Metric(
        functools.partial(_confusion_sums, classes),
        lambda total: np.asarray(total["matrix"]).astype(np.int64),
        every_step=False,
    )


def precision(classes: int, average: str | None = "macro") -> Metric:
    """Of what was predicted as a class, the share that has its label: TP / (TP + FP).

    Args:
        classes: the number of classes.
        average: `"macro"` for the mean over classes, `"micro"` for the share over all predictions, None for
            an array with the value of each class, which only `evaluate` computes. A class that is neither a
            label nor a prediction anywhere in the data is left out of the mean, as scikit-learn does where
            it is given no list of labels, and is NaN in the array. A class that occurs and was never
            predicted counts as 0.

    Raises:
        UserError: no class, or another average; by `sums`, scores of another number of classes.

    Example:
        >>> metric = st.metrics.precision(3)
        >>> logits, labels = jnp.array([[2.0, 1.0, 0.0], [5.0, 4.0, 0.0]]), jnp.array([0, 1])
        >>> metric.finish(metric.sums(logits, labels, jnp.ones(2)))  # 1/2 and 0; class 2 is nowhere
        0.25
    """
    return by_class(lambda both, labelled, predicted: (both, predicted), classes, average)


def recall(classes: int, average: str | None = "macro") -> Metric:
    """Of what has the label of a class, the share that was predicted as it: TP / (TP + FN).

    Args:
        classes: the number of classes.
        average: as in `precision`; a class that was predicted and is never a label counts as 0.

    Raises:
        UserError: no class, or another average; by `sums`, scores of another number of classes.

    Example:
        >>> metric = st.metrics.recall(3)
        >>> logits, labels = jnp.array([[2.0, 1.0, 0.0], [5.0, 4.0, 0.0]]), jnp.array([0, 1])
        >>> metric.finish(metric.sums(logits, labels, jnp.ones(2)))  # 1 and 0; class 2 is nowhere
        0.5
    """
    return by_class(lambda both, labelled, predicted: (both, labelled), classes, average)


def f1(classes: int, average: str | None = "macro") -> Metric:
    """The harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN).

    Args:
        classes: the number of classes.
        average: as in `precision`.

    Raises:
        UserError: no class, or another average; by `sums`, scores of another number of classes.

    Example:
        >>> metric = st.metrics.f1(3, average=None)
        >>> logits, labels = jnp.array([[2.0, 1.0, 0.0], [5.0, 4.0, 0.0]]), jnp.array([0, 1])
        >>> metric.finish(metric.sums(logits, labels, jnp.ones(2))).round(4)
        array([0.6667, 0.    ,    nan])

    References:
        van Rijsbergen, Information Retrieval, 1979, chapter 7.
    """
    return by_class(lambda both, labelled, predicted: (2 * both, labelled + predicted), classes, average)


Fraction = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Numerators and denominators of all classes, from three counts of each: how often label and prediction are
both the class, how often the label is, and how often the prediction is."""


def by_class(
    fraction: Fraction,
    classes: int,
    average: str | None,
    *,
    averages: tuple[str, ...] = ("macro", "micro"),
    ignore_label: int | None = None,
) -> Metric:
    """A metric that is a fraction for each class, and an average of these.

    Args:
        fraction: numerators and denominators from the counts of each class.
        classes: the number of classes.
        average: one of `averages`, or None for an array of all classes.
        averages: what there is.
        ignore_label: elements with this label count nowhere, and a class of this number has no value.

    Raises:
        UserError: no class, or another average.

    Example:
        >>> share = by_class(lambda both, labelled, predicted: (labelled, labelled.sum()), 2, None)
    """
    refuse_below(1, "classes", classes)
    refuse_average(average, averages)

    def finish(total: Totals) -> float | np.ndarray:
        both, labelled, predicted = (
            np.asarray(total[name], np.float64) for name in ("both", "labelled", "predicted")
        )
        numerators, denominators = fraction(both, labelled, predicted)
        if average == "micro":
            return ratio(numerators.sum(), denominators.sum())
        found = (labelled + predicted > 0) & (np.arange(classes) != ignore_label)
        values = np.where(found, numerators / np.maximum(denominators, 1), np.nan)
        if average is None:
            return values
        return float(values[found].mean()) if found.any() else math.nan

    return Metric(
        functools.partial(_class_sums, classes, ignore_label), finish, every_step=average is not None
    )


def _top_k_sums(
    k: int,
    outputs: Float[Array, "batch *positions classes"],
    labels: Integer[Array, "batch *positions"],
    weights: Shaped[Array, " batch"],
) -> dict[str, Int32[Array, ""]]:
    """How many labels are among the first `k` classes, by counting the classes whose scores are not smaller.

    Unlike a sort, comparisons need no communication where scores are sharded over batch and positions.
    """
    refuse_labels(outputs, labels)
    if k > outputs.shape[-1]:
        raise UserError(
            f"top_k({k}) of outputs with {outputs.shape[-1]} classes; use a k of at most {outputs.shape[-1]}"
        )
    true = one_hot(labels, outputs.shape[-1])
    score = jnp.where(true, outputs, 0).sum(-1, keepdims=True)
    later = jnp.arange(outputs.shape[-1]) >= widened(labels)[..., None]
    behind = (outputs < score) | ((outputs == score) & later)  # false for NaN, which thus counts as larger
    hits = ((~behind).sum(-1) < k) & true.any(-1) & ~jnp.isnan(score[..., 0])
    real = examples(weights, labels.shape)
    return {"hits": count(hits & real), "count": count(real)}


def _confusion_sums(
    classes: int,
    outputs: Float[Array, "batch *positions classes"],
    labels: Integer[Array, "batch *positions"],
    weights: Shaped[Array, " batch"],
) -> dict[str, Int32[Array, "classes classes"]]:
    refuse_labels(outputs, labels, classes)
    refuse_overflow(labels.size)
    true = one_hot(labels, classes) & examples(weights, labels.shape)[..., None]
    found = one_hot(outputs.argmax(-1), classes)
    # Bytes take the least memory, and tensor cores add their products up in int32.
    matrix = jnp.einsum(
        "...t,...p->tp", true.astype(jnp.int8), found.astype(jnp.int8), preferred_element_type=jnp.int32
    )
    return {"matrix": matrix}


def _class_sums(
    classes: int,
    ignore_label: int | None,
    outputs: Float[Array, "batch *positions classes"],
    labels: Integer[Array, "batch *positions"],
    weights: Shaped[Array, " batch"],
) -> dict[str, Int32[Array, " classes"]]:
    """The margins and the diagonal of the confusion matrix, without the matrix."""
    refuse_labels(outputs, labels, classes)
    real = examples(weights, labels.shape)
    if ignore_label is not None:
        real &= widened(labels) != ignore_label
    true, found = one_hot(labels, classes), one_hot(outputs.argmax(-1), classes)
    all_but_classes = tuple(range(labels.ndim))
    return {
        name: count(mask & real[..., None], all_but_classes)
        for name, mask in {"both": true & found, "labelled": true, "predicted": found}.items()
    }
