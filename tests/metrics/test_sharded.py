"""Sums of sharded outputs are those of one device, and only sums cross the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain import compat, metrics
from shardtrain.metrics import Metric
from shardtrain.pipeline.localize.evaluate import Block, cut_of, evaluate
from shardtrain.plan.census import census

from .table import CLASSES, IGNORED, binary, numbers, scores, with_ignored

ROWS, PIXELS = 4, (4, 8)
CUT = ("data", "height", "width")
CASES = {
    "accuracy": (metrics.accuracy(), scores(*PIXELS)),
    "top_k": (metrics.top_k(2), scores(*PIXELS)),
    "confusion_matrix": (metrics.confusion_matrix(CLASSES), scores(*PIXELS)),
    "precision": (metrics.precision(CLASSES), scores(*PIXELS)),
    "iou": (metrics.iou(CLASSES, IGNORED), with_ignored(*PIXELS)),
    "perplexity": (metrics.perplexity(IGNORED), with_ignored(*PIXELS)),
    "calibration": (metrics.expected_calibration_error(), scores(*PIXELS)),
    "mean_squared_error": (metrics.mean_squared_error(), numbers(*PIXELS)),
    "mean_absolute_error": (metrics.mean_absolute_error(), numbers(*PIXELS)),
    "dice": (metrics.per_example(st.losses.dice), scores(*PIXELS)),
    "auc": (metrics.auc(64), binary),
}


def example(name, rows=ROWS):
    """A batch whose last row fills it up."""
    outputs, targets = CASES[name][1](np.random.default_rng(3), rows)
    outputs[-1] = np.nan
    weights = np.arange(rows) < rows - 1
    return outputs, targets, weights.astype(float)


def close(mine, theirs):
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=0)


def on_mesh(sums, batch, specs, mesh):
    """The sums of a sharded batch, and the collectives of their program."""
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(batch, specs, strict=True)]
    with jax.set_mesh(mesh):
        program = jax.jit(sums).lower(*placed).compile()
    return program(*placed), census(program, mesh)


def only_sums_cross(found, rows, per_example=0):
    """Every collective is an all-reduce, and those over one mesh axis together carry no more than the sums."""
    assert {row.kind for row in rows} == {"all-reduce"}, rows
    weight = sum(leaf.nbytes for leaf in jax.tree.leaves(found)) + per_example
    for axis in CUT:
        assert sum(row.payload * row.count for row in rows if axis in row.axes) <= weight, rows


@pytest.mark.parametrize("name", CASES)
def test_sharded_over_batch_and_pixels(name):
    mesh = st.make_mesh("data=2,height=2,width=2")
    batch = example(name, rows=16 if name == "auc" else ROWS)
    cut = P(CUT) if name == "auc" else P(*CUT)
    sums = CASES[name][0].sums
    found, rows = on_mesh(sums, batch, (cut, cut, P(CUT) if name == "auc" else P("data")), mesh)
    close(found, sums(*map(jnp.asarray, batch)))
    # Dice is a quotient for every example: three counts for each of 5 classes and the 2 examples of a device.
    only_sums_cross(found, rows, per_example=3 * 5 * 2 * 8 if name == "dice" else 0)


def flattened():
    """A confusion matrix as the histogram of flattened pixels, as most libraries count."""

    def sums(outputs, labels, weights):
        real = jnp.broadcast_to((weights > 0)[:, None, None], labels.shape)
        pairs = jnp.where(real, labels * CLASSES + outputs.argmax(-1), CLASSES**2).reshape(-1)
        counts = jnp.zeros(CLASSES**2, jnp.int32).at[pairs].add(1, mode="drop")
        return {"matrix": counts.reshape(CLASSES, CLASSES)}

    return Metric(sums, metrics.confusion_matrix(CLASSES).finish)


def sorted_top_k():
    """Top-k by a sort of the scores of all pixels, flattened as scikit-learn wants them."""

    def sums(outputs, labels, weights):
        _, best = lax.top_k(outputs.reshape(-1, CLASSES), 2)
        hits = (best == labels.reshape(-1, 1)).any(-1) & jnp.repeat(weights > 0, labels[0].size)
        return {"hits": hits.sum(dtype=jnp.int32), "count": hits.size * jnp.ones((), jnp.int32)}

    return Metric(sums, metrics.top_k(2).finish)


@pytest.mark.parametrize("wrong", [flattened, sorted_top_k])
def test_a_metric_that_gathers_pixels_is_seen(wrong):
    mesh = st.make_mesh("data=2,height=2,width=2")
    found, rows = on_mesh(wrong().sums, example("confusion_matrix"), (P(*CUT), P(*CUT), P("data")), mesh)
    with pytest.raises(AssertionError):
        only_sums_cross(found, rows)


def test_classes_that_are_sharded():
    """Scores of a vocabulary that is sharded over `channel`: sums of each token cross, the scores do not."""
    mesh = st.make_mesh("data=2,channel=4")
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((4, 8, 64)), rng.integers(0, 64, (4, 8)), np.ones(4)
    for metric in (metrics.perplexity(), metrics.top_k(3)):
        found, rows = on_mesh(metric.sums, batch, (P("data", None, "channel"), P("data"), P("data")), mesh)
        close(found, metric.sums(*map(jnp.asarray, batch)))
        assert {row.kind for row in rows} == {"all-reduce"}


SIZES = {"data": 2, "height": 2}


@pytest.mark.parametrize("name", CASES)
def test_in_a_pipeline_stage(name, caplog):
    """The local form of a metric inside a pipeline stage gathers nothing and is computed nowhere as a whole."""
    mesh = st.make_mesh("pipe=2,data=2,height=2")
    batch, sums = example(name), CASES[name][0].sums
    specs = [P("data", "height"), P("data", "height"), P("data")] if name != "auc" else [P("data")] * 3
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in batch]
    with jax.sharding.use_abstract_mesh(compat.with_manual(mesh, ["pipe"])):
        closed, tree = jax.make_jaxpr(sums, return_shape=True)(*shapes)

    def stage(*values):
        blocks = [
            Block(value, x.shape, cut_of(spec, x.ndim), SIZES)
            for value, x, spec in zip(values, batch, specs, strict=True)
        ]
        return [b.whole_on(range(len(b.shape))).value[None] for b in evaluate(closed, blocks, SIZES)]

    everywhere = P(("pipe", "data", "height"))
    run = jax.shard_map(stage, mesh=mesh, in_specs=tuple(specs), out_specs=everywhere, check_vma=False)
    expected = jax.tree.leaves(sums(*map(jnp.asarray, batch)))
    for mine, theirs in zip(jax.jit(run)(*batch), expected, strict=True):
        for device in np.asarray(mine):
            np.testing.assert_allclose(device, theirs, rtol=1e-13)
    assert jax.tree.structure(tree).num_leaves == len(expected)
    assert not caplog.records
