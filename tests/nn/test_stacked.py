"""Layers stacked by `nnx.vmap` for `nnx.scan`, against the same stack of plain nnx layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardtrain as st


class Block(nnx.Module):
    def __init__(self, layers, rngs):
        more = {"param_dtype": jnp.float64, "rngs": rngs}
        self.conv, self.norm = layers.Conv(4, 4, (3, 3), **more), layers.GroupNorm(4, 2, **more)
        self.up = layers.ConvTranspose(4, 4, (2, 2), transpose_kernel=True, **more)

    def __call__(self, x):
        return x + nnx.relu(self.up(self.norm(self.conv(x))))


class Net(nnx.Module):
    def __init__(self, layers, rngs):
        make = nnx.vmap(lambda rngs: Block(layers, rngs), in_axes=(0,), out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
        self.head = layers.Linear(4, 2, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(run(self.blocks, x).mean((1, 2)))


def fitted(layers, mesh, **options):
    x = np.asarray(jax.random.normal(jax.random.key(0), (8, 6, 6, 4), jnp.float64))
    model = Net(layers, nnx.Rngs(0))
    mesh = st.make_mesh(mesh, devices=jax.devices()[: 4 if "=4" in mesh or "," in mesh else 2])
    trainer = st.Trainer(model, optax.sgd(0.1), mesh=mesh, **options)
    rows = trainer.fit([(x, np.arange(8) % 2)] * 2, steps=2, progress=False)
    return trainer, [row["loss"] for row in rows]


expected = functools.cache(lambda: fitted(nnx, "data=2")[1])


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("height=2,channel=2", {}),
        pytest.param("data=2", {"parameters": "data"}, marks=pytest.mark.slow),
        pytest.param("data=2,height=2", {}, marks=pytest.mark.slow),
        pytest.param("channel=4", {}, marks=pytest.mark.slow),
    ],
)
def test_stacked_layers_train_as_in_nnx(mesh, options):
    """The second loss is after an update, so the gradients of the whole stack are in it."""
    _, losses = fitted(st.nn, mesh, **options)
    np.testing.assert_allclose(losses, expected(), rtol=1e-9)


def test_where_stacked_variables_are_cut():
    mesh = st.make_mesh("data=4,channel=2")
    model = Net(st.nn, nnx.Rngs(0))
    specs = st.nn.partition.parameter_spec(model, mesh, st.Layout())
    found = {path[1:]: specs[path] for path in specs if path[0] == "blocks"}
    assert found["conv", "kernel"] == P(None, None, None, None, "channel")
    assert found["conv", "bias"] == found["norm", "scale"] == P(None, "channel")
    assert found["up", "kernel"] == P(None, None, None, "channel", None)


def test_stacks_along_another_dimension_are_refused():
    make = nnx.vmap(lambda rngs: st.nn.Linear(4, 4, rngs=rngs), in_axes=(0,), out_axes=1)
    model = nnx.Sequential(nnx.split_rngs(splits=3)(make)(nnx.Rngs(0)))
    mesh = st.make_mesh("data=4,channel=2")
    with pytest.raises(st.UserError, match=r"'layers.0.bias' has the shape \(4, 3\), .* out_axes=0"):
        st.nn.partition.parameter_spec(model, mesh, st.Layout())
