"""Inputs declare their dimensions: what is time is never cut as pixels."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain import UserError


class Sequence(nnx.Module):
    """Mixes the steps of a sequence, which a cut of `time` would have to gather."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.inner = st.nn.Linear(4, 8, **kinds)
        self.head = st.nn.Linear(8, 3, **kinds)

    def __call__(self, x):
        return self.head(jnp.cumsum(nnx.tanh(self.inner(x)), axis=1)[:, -1])


class Two(nnx.Module):
    """An image and a sequence beside it."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv = st.nn.Conv(1, 8, (3, 3), **kinds)
        self.inner = st.nn.Linear(4, 8, **kinds)
        self.head = st.nn.Linear(8, 3, **kinds)

    def __call__(self, inputs):
        image = st.ops.global_avg_pool(nnx.relu(self.conv(inputs["image"])))
        return self.head(image + self.inner(inputs["series"]).sum(1))


def data(rows=8):
    r = np.random.default_rng(0)
    return r.standard_normal((rows, 6, 4)), r.integers(0, 3, rows).astype(np.int32)


def losses(mesh, model, inputs, targets, dimensions):
    ours = st.Trainer(model, optax.sgd(0.1), mesh=st.make_mesh(mesh), dimensions=dimensions)
    rows = ours.fit([(inputs, targets)] * 3, steps=3, progress=False)
    return ours, [row["loss"] for row in rows]


def test_time_is_not_cut_as_width():
    x, y = data()
    ours, found = losses("data=2,channel=2", Sequence(), x, y, "batch time features")
    _, expected = losses("data=1", Sequence(), x, y, "batch time features")
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    placed = ours.place(x, y).inputs
    assert placed.sharding.spec == P("data", None, "channel")
    guessed = st.Trainer(Sequence(), optax.sgd(0.1), mesh=st.make_mesh("data=2,channel=2"))
    assert guessed.place(x, y).inputs.sharding.spec == P("data", None, "channel")


def test_a_cut_of_width_is_none_of_time():
    """On a mesh with width the two readings of one shape differ; the image beside the sequence is cut."""
    r = np.random.default_rng(1)
    inputs = {"image": r.standard_normal((8, 8, 6, 1)), "series": r.standard_normal((8, 6, 4))}
    targets = r.integers(0, 3, 8).astype(np.int32)
    dimensions = {"image": "batch height width channels", "series": "batch time features"}
    ours, found = losses("data=2,width=2", Two(), inputs, targets, dimensions)
    _, expected = losses("data=1", Two(), inputs, targets, dimensions)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    placed = ours.place(inputs, targets).inputs
    assert placed["series"].sharding.spec == P("data", None, None)
    assert placed["image"].sharding.spec == P("data", None, "width", None)
    guessed = st.Trainer(Two(), optax.sgd(0.1), mesh=st.make_mesh("data=2,width=2"))
    assert guessed.place(inputs, targets).inputs["series"].sharding.spec == P("data", "width", None)


def test_targets_of_every_pixel_are_cut_as_the_pixels_of_a_video():
    frames = np.zeros((4, 5, 8, 6, 1))
    mesh, names = st.make_mesh("data=2,height=2"), "batch time height width channels"
    ours = st.Trainer(Two(), optax.sgd(0.1), mesh=mesh, dimensions=names)
    batch = ours.place(frames, np.zeros((4, 5, 8, 6), np.int32))
    assert batch.inputs.sharding.spec == P("data", None, "height", None, None)
    assert batch.targets.sharding.spec == P("data", None, "height", None)


@pytest.mark.parametrize(
    ("dimensions", "sentence"),
    [
        ("time batch features", "the first must be 'batch'"),
        ("batch time", "has 3 dimensions, and 'batch time' names 2"),
        ({"image": "batch time features"}, "give one string for each input"),
        (7, "give names in a string"),
    ],
)
def test_what_does_not_fit_is_refused(dimensions, sentence):
    x, y = data()
    with pytest.raises(UserError, match=sentence):
        losses("data=2", Sequence(), x, y, dimensions)
