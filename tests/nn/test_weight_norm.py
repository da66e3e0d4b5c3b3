"""Weight normalization against nnx's outputs, and its training against the formula on one device."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st

X = np.random.default_rng(0).normal(size=(8, 6, 6, 3))
LABELS = np.arange(8) % 5
ones = nnx.initializers.ones

ARGUMENTS = {
    "feature_axes": (-2, -1),
    "use_scale": False,
    "scale_init": nnx.initializers.constant(2.0),
    "epsilon": 0.5,
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.float16,
    "variable_filter": nnx.PathContains("bias"),
    "promote_dtype": lambda args, *, dtype=None: [None if a is None else 2 * a.astype(dtype) for a in args],
}


def outputs(library, **given):
    layer = library.Conv(3, 4, (3, 3), bias_init=ones, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    return library.WeightNorm(layer, **given, rngs=nnx.Rngs(1))(jnp.asarray(X))


def test_every_argument_is_decided():
    names = set(inspect.signature(nnx.WeightNorm.__init__).parameters) - {"self", "layer_instance", "rngs"}
    assert names == set(ARGUMENTS)


@pytest.mark.parametrize("name", [n for n in ARGUMENTS if n not in ("param_dtype", "promote_dtype")])
def test_an_argument_is_that_of_nnx(name):
    given = {name: ARGUMENTS[name]}
    tolerance = 0.03 if name == "dtype" else 1e-6
    np.testing.assert_allclose(outputs(st.nn, **given), outputs(nnx, **given), rtol=tolerance, atol=tolerance)
    assert not np.allclose(outputs(nnx, **given), outputs(nnx), rtol=1e-6) or name in (
        "scale_init",
        "use_scale",
    )


def test_arguments_that_nnx_leaves_out():
    layer = st.nn.WeightNorm(st.nn.Linear(3, 4, rngs=nnx.Rngs(0)), param_dtype=jnp.float16, rngs=nnx.Rngs(1))
    assert layer.scales["kernel"].dtype == jnp.float16
    doubled = outputs(st.nn, promote_dtype=ARGUMENTS["promote_dtype"], dtype=jnp.float64, epsilon=0.0)
    bias = 1.0
    np.testing.assert_allclose(doubled - bias, 2 * (outputs(st.nn, epsilon=0.0) - bias), rtol=1e-9)


class Net(nnx.Module):
    def __init__(self, norm, layers):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv = norm(layers.Conv(3, 8, (3, 3), **kinds), **kinds)
        self.deep = norm(layers.Conv(8, 8, (3, 3), **kinds), **kinds)
        self.head = norm(layers.Linear(8, 5, **kinds), **kinds)

    def __call__(self, x):
        return self.head(nnx.relu(self.deep(nnx.relu(self.conv(x)))).mean((1, 2)))


class Written(nnx.Module):
    """The formula, around a layer of nnx whose kernel is of length 1 and not trained."""

    def __init__(self, layer, param_dtype, rngs):
        self.kernel = nnx.Param(layer.kernel[...])
        self.scale = nnx.Param(jnp.ones(layer.kernel.shape[-1], param_dtype))
        self.layer = layer
        layer.kernel = nnx.Variable(layer.kernel[...])

    def __call__(self, x):
        kernel = self.kernel[...]
        length = jnp.sqrt((kernel**2).sum(tuple(range(kernel.ndim - 1))) + 1e-12)
        self.layer.kernel = nnx.Variable(self.scale[...] * kernel / length)
        return self.layer(x)


@pytest.fixture(scope="module")
def expected():
    model = Net(Written, nnx)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params):
        def loss(params):
            outputs = nnx.merge(graph, params, rest, copy=True)(jnp.asarray(X))
            return optax.softmax_cross_entropy_with_integer_labels(outputs, LABELS).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    losses = []
    for _ in range(4):
        value, params = step(params)
        losses.append(float(value))
    return losses


MESHES = ["data=2,height=2,channel=2", "pipe=2,channel=2"]
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("channel=4", "data=2", "pipe=2,height=2")]


@pytest.mark.parametrize("mesh", MESHES)
def test_it_trains_as_on_one_device(mesh, expected):
    one = st.Trainer(
        Net(st.nn.WeightNorm, st.nn),
        optax.sgd(0.1),
        mesh=mesh,
        accumulate=2,
        parameters="data" if mesh == "data=2" else (),
    )
    found = [row["loss"] for row in one.fit([(X, LABELS)] * 4, steps=4, progress=False)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_length_that_is_no_part_of_the_gradient_is_noticed(expected, monkeypatch):
    """The first loss is the same then."""
    right = st.nn.WeightNorm._normalized

    def wrong(self, path, kernel):
        fixed = jax.lax.stop_gradient(kernel)
        return right(self, path, fixed) + (kernel - fixed)

    monkeypatch.setattr(st.nn.WeightNorm, "_normalized", wrong)
    one = st.Trainer(Net(st.nn.WeightNorm, st.nn), optax.sgd(0.1), mesh="data=1")
    found = [row["loss"] for row in one.fit([(X, LABELS)] * 2, steps=2, progress=False)]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
    assert not np.isclose(found[1], expected[1], rtol=1e-6)
