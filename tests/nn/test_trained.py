"""A model of the layers of this room, trained on meshes and in stages, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st

MESHES = {
    "data=2,height=2,channel=2": {},
    "data=2": {"parameters": "data"},
    "pipe=2,height=2": {"pipeline": st.Pipeline()},
    "pipe=2,channel=2": {"pipeline": st.Pipeline()},
}


class Net(nnx.Module):
    """Masked statistics, a vector of its own, attention, and products of several dimensions."""

    def __init__(self, rngs):
        more = {"rngs": rngs, "param_dtype": jnp.float64}
        self.conv = st.nn.Conv(4, 8, (3, 3), **more)
        self.batch_norm = st.nn.BatchNorm(8, use_fast_variance=False, **more)
        self.group_norm = st.nn.GroupNorm(8, 4, use_fast_variance=False, **more)
        self.rms_norm = st.nn.RMSNorm(8, **more)
        self.prelu = st.nn.PReLU(0.3, param_dtype=jnp.float64)
        self.gamma = nnx.Param(jnp.full(8, 0.7, jnp.float64))
        self.pool = st.nn.MinPool((2, 2), (2, 2))
        self.attention = st.nn.MultiHeadAttention(4, 8, decode=False, **more)
        self.einsum = st.nn.Einsum("nla,ab->nlb", (8, 8), (8,), **more)
        self.heads = st.nn.LinearGeneral(8, (4, 3), **more)
        self.join = st.nn.LinearGeneral((4, 3), 5, axis=(-2, -1), **more)

    def __call__(self, x):
        mask = (jnp.arange(6) < 4).reshape(1, 6, 1, 1)
        x = self.prelu(self.batch_norm(self.conv(x), mask=mask))
        x = self.pool(self.rms_norm(self.group_norm(x, mask=mask)) * self.gamma[...])
        x = x.reshape(x.shape[0], 9, 8)
        x = x + self.attention(x, is_causal=True)
        return self.join(self.heads(self.einsum(x))).mean(1)


def losses(mesh, **options):
    """Of three steps, so that gradients and running statistics are in them."""
    shards = int(np.prod([int(axis.split("=")[1]) for axis in mesh.split(",")]))
    mesh = st.make_mesh(mesh, devices=jax.devices()[:shards])
    trainer = st.Trainer(Net(nnx.Rngs(0)), optax.sgd(0.1), mesh=mesh, accumulate=2, **options)
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 4))
    rows = trainer.fit([(x, np.arange(8) % 5)] * 3, steps=3, progress=False)
    return [row["loss"] for row in rows]


one_device = functools.cache(lambda: losses("data=1"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_training_is_that_of_one_device(mesh):
    np.testing.assert_allclose(losses(mesh, **MESHES[mesh]), one_device(), rtol=1e-9)
