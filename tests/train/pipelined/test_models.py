"""Models of the toolkit and of plain nnx train in two stages as they do on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st


def vgg(**kinds):
    return st.models.VGG(11, 5, width=4, hidden=32, **kinds)


def sequential(**kinds):
    norm = nnx.BatchNorm(8, **kinds)
    norm.mean, norm.var = nnx.BatchStat(jnp.zeros(8)), nnx.BatchStat(jnp.ones(8))  # in float64
    layers = nnx.Linear(6, 8, **kinds), norm, nnx.relu, st.nn.Dropout(0.5, rngs=kinds["rngs"])
    return nnx.Sequential(*layers, nnx.Linear(8, 8, **kinds), nnx.relu, nnx.Linear(8, 5, **kinds))


class Recurrent(nnx.Module):
    """A class for a sequence."""

    def __init__(self, cell, **kinds):
        self.layers = nnx.List([nnx.RNN(cell(4 if i else 3, 4, **kinds)) for i in range(3)])
        self.head = nnx.Linear(4, 5, **kinds)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, -1])


def lstm(**kinds):
    return Recurrent(nnx.LSTMCell, **kinds)


def gru(**kinds):
    return Recurrent(nnx.GRUCell, **kinds)


@pytest.mark.parametrize(
    ("make", "shape", "microbatches"),
    [
        (sequential, (6,), 4),
        pytest.param(gru, (5, 3), 2, marks=pytest.mark.slow),
        pytest.param(lstm, (5, 3), 4, marks=pytest.mark.slow),
        pytest.param(vgg, (32, 32, 3), 2, marks=pytest.mark.slow),
    ],
)
def test_two_stages_train_as_one_device_does(make, shape, microbatches):
    random = np.random.default_rng(0)
    batch = random.standard_normal((8, *shape)), random.integers(0, 5, 8).astype(np.int32)

    def fitted(mesh):
        model = make(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        options = {"mesh": st.make_mesh(mesh), "accumulate": microbatches}
        one = st.Trainer(model, optax.sgd(0.1, momentum=0.9), **options)
        losses = [row["loss"] for row in one.fit([batch] * 2, steps=2, progress=False)]
        return losses, nnx.state(one.model, (nnx.Param, nnx.BatchStat))

    losses, state = fitted("pipe=2")
    wanted, whole = fitted("data=1")
    assert losses == pytest.approx(wanted, rel=1e-12)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
