"""Rows that fill up a ragged batch: whatever the model and the loss divide by, they add nothing."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(8, 6, 6, 3))
LABELS, VALUES = RANDOM.integers(0, 4, 8), RANDOM.normal(size=(8, 1))
MESHES = ["data=2", "data=8", "data=2,height=2,channel=2", "pipe=2,data=2"]


class Net(nnx.Module):
    def __init__(self, outputs, *, unit):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv = st.nn.Conv(3, 8, (3, 3), use_bias=False, **kinds)
        self.head, self.unit = st.nn.Linear(8, outputs, **kinds), unit

    def __call__(self, x):
        features = st.ops.global_avg_pool(self.conv(x))
        if self.unit:
            features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
        return self.head(features)


def rmse(outputs, targets):
    """Its derivative is infinite where outputs and targets are equal, as they are for rows of zeros."""
    return jnp.sqrt(((outputs - targets) ** 2).mean(-1))


CASES = {
    "unit vectors": (4, True, st.losses.cross_entropy, LABELS),
    "root mean square": (1, False, rmse, VALUES),
}


def fitted(case, mesh, batches, **options):
    outputs, unit, loss, targets = CASES[case]
    trainer = st.Trainer(
        Net(outputs, unit=unit), optax.sgd(0.1), loss=loss, mesh=st.make_mesh(mesh), **options
    )
    given = [(IMAGES[rows], targets[rows]) for rows in batches]
    return trainer, trainer.fit(given, steps=len(given), progress=False)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_rows_that_fill_up_have_finite_gradients_that_count_for_nothing(case, mesh):
    """The second batch has 5 rows of 8; one device without a first batch has no rows to fill up."""
    batches = [slice(0, 8), slice(1, 6)]
    options = {"accumulate": 2} if "pipe" in mesh else {}
    ours, rows = fitted(case, mesh, batches, **options)
    plain, (first,) = fitted(case, "data=1", batches[:1])
    alone = st.Trainer(plain.model, optax.sgd(0.1), loss=CASES[case][2], mesh=st.make_mesh("data=1"))
    (second,) = alone.fit([(IMAGES[1:6], CASES[case][3][1:6])], steps=1, progress=False)
    for row, expected in zip(rows, (first, second), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-10)
    for name, value in ours._named().params.items():
        np.testing.assert_allclose(value, alone.state.params[name], rtol=1e-9, atol=1e-12)


def test_a_batch_without_rows_is_filled_with_a_row_of_an_earlier_one():
    """As a process meets it whose part of the last batch is empty."""
    trainer = st.Trainer(Net(4, unit=True), optax.sgd(0.1), mesh=st.make_mesh("data=2"))
    trainer.prepare(IMAGES, LABELS)
    batch = trainer._placed(IMAGES[:0], LABELS[:0], 8)
    assert not np.asarray(batch.real).any()
    np.testing.assert_array_equal(batch.inputs, np.repeat(IMAGES[:1], 8, 0))
    np.testing.assert_array_equal(batch.targets, np.repeat(LABELS[:1], 8, 0))
    assert trainer._placed(IMAGES[:0], None, 8).targets is None
