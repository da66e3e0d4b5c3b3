"""Bad arguments are refused in one sentence when a metric is made, bad shapes when it is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardtrain as st
from shardtrain import metrics
from shardtrain.errors import UserError, first_line
from shardtrain.metrics.base import LARGEST

BAD = {
    "top_k 0": (lambda: metrics.top_k(0), "k=0; use a whole number of at least 1"),
    "confusion_matrix 0": (
        lambda: metrics.confusion_matrix(0),
        "classes=0; use a whole number of at least 1",
    ),
    "precision 0": (lambda: metrics.precision(0), "classes=0; use a whole number of at least 1"),
    "recall -1": (lambda: metrics.recall(-1), "classes=-1; use a whole number of at least 1"),
    "f1 0": (lambda: metrics.f1(0), "classes=0; use a whole number of at least 1"),
    "iou 0": (lambda: metrics.iou(0), "classes=0; use a whole number of at least 1"),
    "precision foo": (
        lambda: metrics.precision(3, "foo"),
        "average='foo'; there are 'macro', 'micro' and None",
    ),
    "recall foo": (lambda: metrics.recall(3, "foo"), "average='foo'; there are 'macro', 'micro' and None"),
    "f1 foo": (lambda: metrics.f1(3, "foo"), "average='foo'; there are 'macro', 'micro' and None"),
    "iou micro": (lambda: metrics.iou(3, average="micro"), "average='micro'; there are 'macro' and None"),
    "auc 0": (lambda: metrics.auc(0), "bins=0; use a whole number of at least 1"),
    "auc_error_bound 0": (
        lambda: metrics.auc_error_bound(bins=0),
        "bins=0; use a whole number of at least 1",
    ),
    "calibration 0": (
        lambda: metrics.expected_calibration_error(0),
        "bins=0; use a whole number of at least 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, sentence = BAD[name]
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == sentence


def refused(metric, outputs, targets, rows):
    """What the metric says of such shapes. Under a transformation jax adds lines of its own."""
    with pytest.raises(UserError) as error:
        traced(metric, outputs, targets, rows)
    return first_line(error.value)


def traced(metric, outputs, targets, rows):
    return jax.eval_shape(
        metric.sums,
        jax.ShapeDtypeStruct(outputs, jnp.float32),
        jax.ShapeDtypeStruct(targets, jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )


def test_more_guesses_than_classes():
    sentence = "top_k(5) of outputs with 4 classes; use a k of at most 4"
    assert refused(metrics.top_k(5), (8, 4), (8,), 8) == sentence


@pytest.mark.parametrize(
    "metric",
    [metrics.confusion_matrix(3), metrics.precision(3), metrics.recall(3), metrics.f1(3), metrics.iou(3)],
)
def test_another_number_of_classes(metric):
    said = refused(metric, (8, 4), (8,), 8)
    assert said == "the metric was made for 3 classes, and the outputs of shape (8, 4) have 4; give classes=4"


def test_scores_of_more_than_two_classes_have_no_area():
    said = refused(metrics.auc(), (8, 3), (8,), 8)
    assert said.startswith(
        "the area under the ROC curve is for two classes, and the outputs have shape (8, 3); "
    )


def test_more_values_than_an_int32_counts():
    rows = LARGEST + 1
    by_example = metrics.per_example(lambda y, t: y[:, 0])
    for metric in (metrics.accuracy(), metrics.confusion_matrix(4), by_example):
        said = refused(metric, (rows, 4), (rows,), rows)
        assert said.startswith(
            "a batch has 2,147,483,648 values to count, more than the 2,147,483,647 that an "
        )


def test_one_value_per_example():
    said = refused(metrics.per_example(lambda y, t: y), (8, 4), (8,), 8)
    assert said.startswith("<lambda> returned shape (8, 4) for 8 examples; return one value per example, ")


def test_what_a_metric_may_be_given_as():
    metric = metrics.f1(3)
    assert metrics.as_metric(metric) is metric
    made = metrics.as_metric(st.losses.accuracy)
    sums = made.sums(jnp.eye(3), jnp.array([0, 1, 0]), jnp.array([1, 1, 0]))
    assert made.finish(sums) == 1
    assert made.every_step


@pytest.mark.parametrize("value", [0.5, "accuracy", None, metrics.Metric, np.ones(3)])
def test_what_is_no_metric(value):
    with pytest.raises(
        UserError,
        match=r"is no metric; give a shardtrain.metrics.Metric, or a function of \(outputs, targets\)",
    ):
        metrics.as_metric(value)


@pytest.mark.parametrize("name", ["accuracy", "precision", "iou", "auc", "perplexity"])
def test_a_metric_that_nobody_made(name):
    with pytest.raises(
        UserError, match=rf"^{name} is a function that makes a metric; call it, as in {name}\(...\)$"
    ):
        metrics.as_metric(getattr(metrics, name))


def test_what_every_step_computes():
    """Arrays and costly metrics are left to evaluation."""
    costly = [
        metrics.confusion_matrix(3),
        metrics.f1(3, None),
        metrics.iou(3, average=None),
        metrics.auc(),
        metrics.auc_error_bound(),
    ]
    assert not any(metric.every_step for metric in costly)
    cheap = [
        metrics.accuracy(),
        metrics.top_k(2),
        metrics.f1(3),
        metrics.iou(3),
        metrics.perplexity(),
        metrics.expected_calibration_error(),
    ]
    assert all(metric.every_step for metric in cheap)
