"""Every metric is scikit-learn's or the closed form, in whatever ragged batches the examples come."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as some

from shardtrain import metrics
from shardtrain.metrics import Metric
from shardtrain.metrics.base import LARGEST, count

from .table import ABSENT, CASES, CLASSES, Case, calibration_error, confident

BATCH, EXAMPLES = 8, 21


@functools.cache
def compiled(metric):
    return jax.jit(metric.sums)


@functools.cache
def example_data(name, rows=EXAMPLES):
    return CASES[name].data(np.random.default_rng(7), rows)


def nonsense(rng, array):
    """Rows to fill up a batch: what nobody wrote, what nobody counts, and what looks like an example."""
    if np.issubdtype(array.dtype, np.floating):
        return rng.choice([np.nan, np.inf, -np.inf, 1e300, 0.0], array.shape)
    return rng.choice([-1, -7, 10**6, 0, 1], array.shape)


def batches(outputs, targets, sizes, seed=0):
    """Batches of a fixed size, with so many examples each; rows between and after them are nonsense."""
    rng, start = np.random.default_rng(seed), 0
    for size in sizes:
        rows = np.sort(rng.choice(BATCH, size, replace=False))
        weights = np.zeros(BATCH)
        weights[rows] = 1
        filled = []
        for array in (outputs, targets):
            batch = nonsense(rng, np.empty((BATCH, *array.shape[1:]), array.dtype))
            batch[rows] = array[start : start + size]
            filled.append(batch)
        start += size
        yield (*filled, weights)
    assert start == len(outputs)


def total(metric, parts):
    result = None
    for part in parts:
        result = metrics.accumulate(result, compiled(metric)(*part))
    return result


def check(case: Case, outputs, targets, sizes, seed=0):
    """The total of all batches is the sums of the whole, and the finished value the expected one."""
    whole = total(case.metric, [(outputs, targets, np.ones(len(outputs)))])
    parts = total(case.metric, batches(outputs, targets, sizes, seed))
    for mine, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert mine.dtype == theirs.dtype
        if case.exact:
            np.testing.assert_array_equal(mine, theirs)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    value = case.metric.finish(parts)
    assert isinstance(value, float if np.ndim(value) == 0 else np.ndarray)
    np.testing.assert_allclose(value, case.value(outputs, targets), rtol=1e-12, atol=1e-15)


def splits(examples):
    """Sizes of batches, none of them larger than a batch and some of them empty."""

    def close(sizes):
        kept, left = [], examples
        for size in [*sizes, *[BATCH] * examples]:
            kept.append(min(size, left))
            left -= kept[-1]
            if not left:
                return kept

    return some.lists(some.integers(0, BATCH), max_size=6).map(close)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(sizes=splits(EXAMPLES), seed=some.integers(0, 99))
def test_any_split_into_ragged_batches(name, sizes, seed):
    check(CASES[name], *example_data(name), sizes, seed)


def test_the_data_has_what_averages_disagree_on():
    outputs, labels = example_data("f1, macro")
    found = outputs.argmax(-1)
    assert ABSENT not in {*labels, *found}
    assert set(labels) - set(found)


# Each is wrong in one way, and the check of a metric of the table must say so.


def mean_of_means(metric):
    """The mean over batches of each batch's value, computed inside the step."""

    def sums(outputs, targets, weights):
        part = metric.sums(outputs, targets, weights)
        return {"mean": part["hits"] / jnp.maximum(part["count"], 1), "batches": jnp.ones((), int)}

    return Metric(sums, lambda total: float(total["mean"] / total["batches"]))


def fillers_counted(metric):
    return Metric(lambda y, t, w: metric.sums(y, t, jnp.ones_like(w)), metric.finish)


def multiplied(metric):
    """A mask by multiplication, which keeps the NaN of a filler row."""

    def sums(outputs, targets, weights):
        return {
            "total": (((outputs - targets) ** 2).mean(-1) * weights).sum(),
            "count": weights.sum(dtype=int),
        }

    return Metric(sums, metric.finish)


def macro_over_absent(metric):
    return Metric(
        metric.sums, lambda total: float(np.nan_to_num(metrics.f1(CLASSES, None).finish(total)).mean())
    )


def rolled(metric, *names):
    def sums(outputs, targets, weights):
        part = metric.sums(outputs, targets, weights)
        return part | {name: jnp.roll(part[name], 1) for name in names}

    return Metric(sums, metric.finish)


def by_sequence(metric):
    """Perplexity as the mean over sequences, without regard to their lengths."""

    def value(outputs, labels):
        real = labels != 255
        nll = -jnp.take_along_axis(jax.nn.log_softmax(outputs), (labels * real)[..., None], -1)[..., 0]
        return (nll * real).sum(-1) / jnp.maximum(real.sum(-1), 1)

    mean = metrics.per_example(value)
    return Metric(mean.sums, lambda total: float(np.exp(mean.finish(total))))


MUTANTS = {
    "mean of means": ("accuracy", mean_of_means),
    "fillers counted": ("accuracy", fillers_counted),
    "fillers counted in a matrix": ("confusion matrix", fillers_counted),
    "fillers counted in bins": ("auc", fillers_counted),
    "fillers multiplied by zero": ("mean squared error", multiplied),
    "macro over absent classes": ("f1, macro", macro_over_absent),
    "one class more": ("top 2", lambda metric: metrics.top_k(3)),
    "rows and columns exchanged": (
        "confusion matrix",
        lambda metric: Metric(metric.sums, lambda total: metric.finish(total).T),
    ),
    "bins of positives shifted by one": ("auc", lambda metric: rolled(metric, "positive")),
    "bins of confidences shifted by one": ("calibration error", lambda metric: rolled(metric, "confidence")),
    "ignored pixels counted": ("iou, ignored pixels", lambda metric: metrics.iou(CLASSES)),
    "union counted twice": (
        "iou, macro",
        lambda metric: Metric(metric.sums, lambda total: metrics.f1(CLASSES).finish(total)),
    ),
    "mean over sequences": ("perplexity, ignored tokens", by_sequence),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_metric_is_rejected(name):
    of, mutate = MUTANTS[name]
    case, sizes = CASES[of], [8, 3, 0, 7, 3]
    check(case, *example_data(of), sizes)
    wrong = Case(mutate(case.metric), case.data, case.value, exact=False)
    with pytest.raises(AssertionError):
        check(wrong, *example_data(of), sizes)


def test_a_bin_has_its_upper_end():
    """Confidences on the edges of bins tell the two conventions apart."""
    outputs, labels = example_data("calibration error on edges")
    metric = CASES["calibration error on edges"].metric
    mine = metric.finish(metric.sums(jnp.asarray(outputs), jnp.asarray(labels), jnp.ones(len(labels))))
    assert abs(mine - calibration_error(4)(outputs, labels)) < 1e-12
    assert abs(mine - calibration_error(4, lower_end_inside=True)(outputs, labels)) > 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=some.integers(0, 10**6),
    bins=some.sampled_from([1, 2, 7, 64, 1024]),
    spread=some.sampled_from([1e-3, 1.0, 30.0]),
    probabilities=some.booleans(),
)
def test_the_area_is_within_its_bound(seed, bins, spread, probabilities):
    rng = np.random.default_rng(seed)
    labels = np.arange(64) % 2
    scores = (rng.standard_normal(64) + labels) * spread
    scores = np.round(1 / (1 + np.exp(-scores)), 2) if probabilities else scores
    given = jnp.asarray(scores), jnp.asarray(labels), jnp.ones(64)
    area, bound = (compiled_by_bins(make, bins)(*given) for make in (metrics.auc, metrics.auc_error_bound))
    exact = sk.roc_auc_score(labels, scores)
    assert abs(area - exact) <= bound + 1e-12
    assert bound <= 0.5


@functools.cache
def compiled_by_bins(make, bins):
    metric = make(bins)
    sums = jax.jit(metric.sums)
    return lambda *given: metric.finish(sums(*given))


def test_the_bound_is_the_share_of_mixed_pairs_and_shrinks_with_the_bins():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    scores = rng.standard_normal(4000) + labels
    given = jnp.asarray(scores), jnp.asarray(labels), jnp.ones(4000)
    bounds = [compiled_by_bins(metrics.auc_error_bound, bins)(*given) for bins in (1, 16, 256, 1024)]
    assert bounds[0] == 0.5
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 1e-3
    squeezed = scores / (1 + abs(scores))
    place = np.digitize(squeezed, np.linspace(-1, 1, 17))
    mixed = (place[labels == 1][:, None] == place[labels == 0]).mean()
    assert abs(bounds[1] - mixed / 2) < 1e-12


def test_a_bound_of_shifted_bins_is_rejected():
    """The bound is not so loose that a histogram that is off by one bin stays within it."""
    outputs, labels = example_data("auc", 200)
    wrong = rolled(metrics.auc(), "positive")
    given = jnp.asarray(outputs), jnp.asarray(labels), jnp.ones(200)
    bound = compiled_by_bins(metrics.auc_error_bound, 1024)(*given)
    assert abs(wrong.finish(wrong.sums(*given)) - sk.roc_auc_score(labels, outputs)) > bound


def value_of(metric, outputs, targets):
    return metric.finish(metric.sums(jnp.asarray(outputs), jnp.asarray(targets), jnp.ones(len(outputs))))


def test_ties_go_to_the_first_class():
    for k in (1, 2, 3):
        first = [value_of(metrics.top_k(k), np.zeros((1, 3)), np.array([label])) for label in range(3)]
        assert first == [float(label < k) for label in range(3)]
        _, best = jax.lax.top_k(jnp.zeros(3), k)
        assert [float(label in best) for label in range(3)] == first


def test_numbers_that_are_none():
    """A model of NaNs is not right, and does not look calibrated."""
    nan, labels = np.full((4, 3), np.nan), np.array([0, 1, 2, 0])
    assert value_of(metrics.accuracy(), nan, labels) == 0
    assert value_of(metrics.top_k(3), nan, labels) == 0
    assert np.isnan(value_of(metrics.expected_calibration_error(), nan, labels))
    assert np.isnan(value_of(metrics.perplexity(), nan, labels))
    assert np.isnan(value_of(metrics.auc(), np.array([0.1, np.nan]), np.array([0, 1])))
    assert value_of(metrics.auc(), np.array([-np.inf, np.inf]), np.array([0, 1])) == 1


def test_labels_that_are_no_class():
    scores, labels = np.eye(3)[[0, 1, 2]], np.array([0, 7, -1])
    assert value_of(metrics.accuracy(), scores, labels) == 1 / 3
    assert value_of(metrics.top_k(3), scores, labels) == 1 / 3
    assert value_of(metrics.confusion_matrix(3), scores, labels).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert value_of(metrics.precision(3), scores, labels) == sk.precision_score(
        labels, [0, 1, 2], labels=[0, 1, 2], average="macro", zero_division=0
    )
    assert np.isnan(value_of(metrics.perplexity(), scores, labels))
    assert np.isnan(value_of(metrics.auc(), np.array([0.1, 0.2, 0.3]), np.array([0, 1, 2])))


def test_bytes_as_labels():
    labels = np.array([0, 1, 255], np.uint8)
    for ignored in (255, -1):
        expected = (
            1.0
            if ignored == 255
            else sk.jaccard_score([0, 1, 255], [0, 1, 2], average="macro", labels=[0, 1, 2], zero_division=0)
        )
        assert value_of(metrics.iou(3, ignore_label=ignored), np.eye(3), labels) == expected


@pytest.mark.parametrize("name", CASES)
def test_no_example_at_all(name):
    """A share of nothing is NaN, and warns of nothing."""
    outputs, targets = example_data(name)
    metric = CASES[name].metric
    empty = total(metric, [(outputs[:BATCH], targets[:BATCH], np.zeros(BATCH))])
    assert not any(leaf.any() for leaf in jax.tree.leaves(empty))
    value = metric.finish(empty)
    assert (value == 0).all() if name.startswith("confusion") else np.isnan(value).all()


def test_counts_do_not_stop_at_the_end_of_a_dtype():
    """float32 has no odd number above 2**24, and int32 nothing above 2**31."""
    metric, result = metrics.accuracy(), None
    for _ in range(3):
        step = {"hits": jnp.int32(LARGEST), "count": jnp.int32(LARGEST)}
        result = metrics.accumulate(result, step)
    result = metrics.accumulate(result, {"hits": jnp.int32(0), "count": jnp.int32(1)})
    assert result["count"] == 3 * LARGEST + 1
    assert result["hits"].dtype == np.int64
    assert metric.finish(result) == 3 * LARGEST / (3 * LARGEST + 1) != 1.0
    as_float32 = np.float32(3 * LARGEST) + np.float32(1)
    assert int(as_float32) != 3 * LARGEST + 1


def test_sums_of_a_step_count_exactly_without_x64():
    """2**24 + 1 pixels, of which a float32 would lose one."""
    rows = 2**24 + 1
    with jax.enable_x64(False):
        mask = jnp.ones(rows, bool)
        assert count(mask).dtype == jnp.int32
        assert int(count(mask)) == rows
        assert int(mask.sum(dtype=jnp.float32)) != rows or int(jnp.float32(rows)) != rows
        sums = jax.eval_shape(
            metrics.confusion_matrix(2).sums,
            jax.ShapeDtypeStruct((8, 2), jnp.float32),
            jax.ShapeDtypeStruct((8,), jnp.int32),
            jax.ShapeDtypeStruct((8,), jnp.float32),
        )
    assert sums["matrix"].dtype == jnp.int32


@pytest.mark.parametrize("name", CASES)
def test_half_precision_outputs_are_summed_in_float32(name):
    outputs, targets = example_data(name)
    shapes = jax.eval_shape(
        CASES[name].metric.sums,
        jax.ShapeDtypeStruct(outputs.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct(targets.shape, jnp.bfloat16 if targets.dtype == float else jnp.int32),
        jax.ShapeDtypeStruct(outputs.shape[:1], jnp.float32),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} <= {jnp.dtype("int32"), jnp.dtype("float32")}


def test_confident_data_lies_on_edges():
    outputs, _ = confident(np.random.default_rng(7), EXAMPLES)
    confidence = np.asarray(jax.nn.softmax(outputs)).max(1)
    assert {0.5, 1.0} <= set(confidence.tolist())
