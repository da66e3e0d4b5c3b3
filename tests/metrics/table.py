"""Every shipped metric with data to compute it from, and its value by another way. A new metric adds a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special
import sklearn.metrics as sk

import shardtrain as st
from shardtrain import metrics
from shardtrain.metrics import Metric

CLASSES, ABSENT, NEVER_PREDICTED = 6, 3, 4
"""Class 3 is neither a label nor a prediction; class 4 is a label only."""
IGNORED = 255


@dataclass(frozen=True)
class Case:
    """A metric, data of so many rows, and the value that it must have."""

    metric: Metric
    data: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    value: Callable[[np.ndarray, np.ndarray], Any]
    exact: bool = True  # sums of integers or of binary fractions, which float64 adds without rounding


def scores(*space):
    """Class scores and labels, of pixels or tokens if there is a space."""

    def draw(rng, rows):
        outputs = rng.standard_normal((rows, *space, CLASSES)) * 3
        outputs[..., [ABSENT, NEVER_PREDICTED]] -= 40
        labels = rng.integers(0, CLASSES, (rows, *space))
        labels[labels == ABSENT] = 0
        labels.flat[0] = NEVER_PREDICTED
        sure = rng.random(labels.shape) < 0.4
        right = sure & (labels != NEVER_PREDICTED)
        outputs += 9 * right[..., None] * (labels[..., None] == np.arange(CLASSES))
        return outputs, labels

    return draw


def with_ignored(*space, label=IGNORED):
    def draw(rng, rows):
        outputs, labels = scores(*space)(rng, rows)
        return outputs, np.where(rng.random(labels.shape) < 0.3, label, labels)

    return draw


def confident(rng, rows):
    """Scores of two classes whose probabilities lie on the edges of bins, 1/2 and 1, and between them."""
    outputs = np.zeros((rows, 2))
    outputs[:, 1] = rng.choice([0, 0.3, 1.2, 2, 1000], rows)
    return outputs, rng.integers(0, 2, rows)


def binary(rng, rows):
    """Scores in the middle of 12 of 1024 bins, which have negative and positive examples by turns: the area from
    histograms is exact, and is not that of positive examples one bin further."""
    labels = np.arange(rows) % 2
    middle = (2 * rng.integers(253, 259, rows) + labels + 0.5) / 512 - 1
    return middle / (1 - abs(middle)), labels


def binary_logits(rng, rows):
    outputs, labels = binary(rng, rows)
    return np.stack([np.ones(rows), outputs + 1], -1), labels


def numbers(*features):
    """Eighths, whose squares are exact."""

    def draw(rng, rows):
        return tuple(rng.integers(-40, 40, (2, rows, *features)) / 8)

    return draw


def predicted(outputs):
    return outputs.argmax(-1).ravel()


def sklearn(function, average):
    """What a function of scikit-learn says of labels and predicted classes; it leaves absent classes out."""

    def value(outputs, labels):
        found = predicted(outputs)
        if average is not None:
            return function(labels.ravel(), found, average=average, zero_division=0)
        values = function(labels.ravel(), found, labels=range(CLASSES), average=None, zero_division=0)
        occurs = np.isin(range(CLASSES), [*labels.ravel(), *found])
        return np.where(occurs, values, np.nan)

    return value


def ignoring(value, label=IGNORED):
    def kept(outputs, labels):
        keep = labels != label
        return value(outputs[keep], labels[keep])

    return kept


def perplexity(outputs, labels):
    likelihoods = scipy.special.log_softmax(outputs.reshape(-1, CLASSES), axis=1)
    return np.exp(-np.mean(likelihoods[np.arange(labels.size), labels.ravel()]))


def calibration_error(bins, lower_end_inside=False):
    """Equation 3 of Guo et al., read aloud."""

    def value(outputs, labels):
        probabilities = scipy.special.softmax(outputs.reshape(-1, outputs.shape[-1]), axis=1)
        confidence, right = probabilities.max(1), predicted(outputs) == labels.ravel()
        total = 0.0
        for b in range(bins):
            low, high = b / bins, (b + 1) / bins
            inside = (confidence > low) & (confidence <= high)
            if lower_end_inside:
                inside = (confidence >= low) & (confidence < high)
            if inside.any():
                total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        return total

    return value


def ignored_class(outputs, labels):
    """The mean over the classes that occur, but for class 1, which is ignored."""
    keep = labels != 1
    found, labels = predicted(outputs[keep]), labels[keep]
    classes = sorted({*labels, *found} - {1})
    return sk.jaccard_score(labels, found, labels=classes, average="macro", zero_division=0)


PIXELS = (3, 4)
CASES = {
    "accuracy": Case(metrics.accuracy(), scores(), lambda y, t: sk.accuracy_score(t, predicted(y))),
    "accuracy of pixels": Case(
        metrics.accuracy(), scores(*PIXELS), lambda y, t: sk.accuracy_score(t.ravel(), predicted(y))
    ),
    "top 2": Case(
        metrics.top_k(2), scores(), lambda y, t: sk.top_k_accuracy_score(t, y, k=2, labels=range(CLASSES))
    ),
    "confusion matrix": Case(
        metrics.confusion_matrix(CLASSES),
        scores(),
        lambda y, t: sk.confusion_matrix(t, predicted(y), labels=range(CLASSES)),
    ),
    "confusion matrix of pixels": Case(
        metrics.confusion_matrix(CLASSES),
        scores(*PIXELS),
        lambda y, t: sk.confusion_matrix(t.ravel(), predicted(y), labels=range(CLASSES)),
    ),
    **{
        f"{name}, {average}": Case(make(CLASSES, average=average), scores(), sklearn(function, average))
        for name, make, function in [
            ("precision", metrics.precision, sk.precision_score),
            ("recall", metrics.recall, sk.recall_score),
            ("f1", metrics.f1, sk.f1_score),
        ]
        for average in ("macro", "micro", None)
    },
    **{
        f"iou, {average}": Case(
            metrics.iou(CLASSES, average=average), scores(*PIXELS), sklearn(sk.jaccard_score, average)
        )
        for average in ("macro", None)
    },
    "iou, ignored pixels": Case(
        metrics.iou(CLASSES, ignore_label=IGNORED),
        with_ignored(*PIXELS),
        ignoring(sklearn(sk.jaccard_score, "macro")),
    ),
    "iou, an ignored class": Case(
        metrics.iou(CLASSES, ignore_label=1), with_ignored(*PIXELS, label=1), ignored_class
    ),
    "auc": Case(metrics.auc(), binary, lambda y, t: sk.roc_auc_score(t, y)),
    "auc of two logits": Case(metrics.auc(), binary_logits, lambda y, t: sk.roc_auc_score(t, y[:, 1])),
    "auc error bound": Case(metrics.auc_error_bound(), binary, lambda y, t: 0.0),
    "perplexity": Case(metrics.perplexity(), scores(5), perplexity, exact=False),
    "perplexity, ignored tokens": Case(
        metrics.perplexity(IGNORED), with_ignored(5), ignoring(perplexity), exact=False
    ),
    "calibration error": Case(
        metrics.expected_calibration_error(), scores(), calibration_error(15), exact=False
    ),
    "calibration error on edges": Case(
        metrics.expected_calibration_error(bins=4), confident, calibration_error(4), exact=False
    ),
    "mean squared error": Case(
        metrics.mean_squared_error(), numbers(3), lambda y, t: sk.mean_squared_error(t, y)
    ),
    "mean absolute error": Case(
        metrics.mean_absolute_error(), numbers(), lambda y, t: sk.mean_absolute_error(t, y)
    ),
    "dice, by example": Case(
        metrics.per_example(st.losses.dice),
        scores(*PIXELS),
        lambda y, t: np.mean(
            [
                float(st.losses.dice(jnp.asarray(a[None]), jnp.asarray(b[None]))[0])
                for a, b in zip(y, t, strict=True)
            ]
        ),
        exact=False,
    ),
}
