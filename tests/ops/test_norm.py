"""Normalization on every mesh against plain formulas and Flax on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jaxtyping import config as jaxtyping_config

from shardtrain import Layout, UserError, make_mesh, ops

from .parity import ALL_MESHES, LAYOUTS, MESHES, examples, numbers, parity

EPSILON = 1e-5


def batch_norm(x, scale=None, bias=None, *, real=None):
    """Statistics of the real examples only; all are normalized. Mean and variance carry no gradient."""
    dims = tuple(range(x.ndim - 1))
    counted = x if real is None else x[np.flatnonzero(real)]
    mean, var = counted.mean(dims), counted.var(dims)
    y = (x - mean) / jnp.sqrt(var + EPSILON)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


@st.composite
def shapes(draw):
    rank = draw(st.sampled_from((0, 1, 2, 2, 3)))
    space = [draw(st.integers(1, 9 if rank < 3 else 3)) for _ in range(rank)]
    # two examples at least: of a single value the variance is 0, and its gradient only noise
    return (draw(st.integers(3, 9)), *space, draw(st.sampled_from((1, 2, 3, 4, 8))))


@st.composite
def masks(draw, count):
    """None, or which of `count` examples are real: at least two."""
    real = [draw(st.booleans()) for _ in range(count)]
    return np.array([True, True, *real[2:]])[::-1].copy() if draw(st.booleans()) else None


def statistics_parity(mesh, shape, affine, real, layout=None):
    args = [numbers(*shape) * 3 + 1]
    args += [numbers(shape[-1], seed=i) for i in range(2)] if affine else []
    mask = None if real is None else jnp.asarray(real)
    op = functools.partial(ops.batch_norm, examples=mask, layout=layout)
    # E[x^2] - E[x]^2 loses a few digits more than the formula of the reference.
    return parity(op, functools.partial(batch_norm, real=real), args, mesh)


@examples(9)
@given(st.data(), st.sampled_from(MESHES), shapes(), st.booleans(), st.sampled_from(LAYOUTS))
def test_batch_norm(data, mesh, shape, affine, layout):
    statistics_parity(mesh, shape, affine, data.draw(masks(shape[0])), layout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(200)
@given(st.data(), st.sampled_from(ALL_MESHES), shapes(), st.booleans(), st.sampled_from(LAYOUTS))
def test_many_batch_norms(data, mesh, shape, affine, layout):
    statistics_parity(mesh, shape, affine, data.draw(masks(shape[0])), layout)


@pytest.mark.parametrize(
    ("mesh", "shape", "real"),
    [
        ("data=2,height=2,channel=2", (4, 7, 5, 4), None),
        ("data=2,height=2,channel=2", (3, 7, 5, 3), [True, True, False]),
        ("data=8", (6, 4, 4, 3), [True] * 4 + [False] * 2),  # some devices have padding only
        ("height=8", (2, 3, 4, 3), None),  # some devices have no row at all
        ("height=4,width=2", (3, 7, 5, 3), [False, True, True]),
    ],
)
def test_uneven_and_ragged(mesh, shape, real):
    statistics_parity(mesh, shape, True, None if real is None else np.array(real))


@pytest.mark.parametrize("mesh", ["data=2,height=2,channel=2", "data=8"])
def test_spread_scale_and_bias(mesh):
    statistics_parity(mesh, (4, 6, 6, 8), True, None, Layout(parameters=("data",)))


@pytest.mark.parametrize("mesh", ["data=2,height=4", "data=8"])
def test_padded_examples_leave_no_trace(mesh):
    """The same statistics and gradients, whatever stands in the rows of padding."""
    real = np.array([True, True, True, False, False])
    x, scale = numbers(5, 7, 4, 3), numbers(3)

    def loss(x, scale):
        y, mean, var = ops.batch_norm(x, scale, None, examples=jnp.asarray(real))
        weights = numbers(*x.shape, seed=2)
        return (y * weights)[:3].sum(), (y[:3], mean, var)

    results = []
    with jax.set_mesh(make_mesh(mesh)):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        for filler in (0.0, 1e3):
            padded = x.copy()
            padded[3:] = filler
            results.append(step(padded, scale))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    np.testing.assert_array_equal(results[1][1][0][3:], 0)  # no gradient to padding


def test_all_examples_padded():
    """An empty batch has statistics of zero, not of NaN."""
    with jax.set_mesh(make_mesh("data=8")):
        y, mean, var = ops.batch_norm(jnp.ones((8, 4, 3)), examples=jnp.zeros(8, bool))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(var, 0)


def test_low_precision_in_wide_statistics():
    """bf16 comes back as bf16, but is summed in float32."""
    x = jnp.full((8, 16, 16, 2), 1.0, jnp.bfloat16).at[:, 0].set(300.0)
    with jax.set_mesh(make_mesh("data=2,height=4")):
        y, mean, var = ops.batch_norm(x)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-5)


def test_without_a_mesh():
    args = [jnp.asarray(numbers(*shape)) for shape in ((4, 5, 3), (3,), (3,))]
    for got, expected in zip(ops.batch_norm(*args), batch_norm(*args), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-10)


def flax_norm(kind, channels, affine, **options):
    """The Flax layer as a function of its input, scale and bias."""

    def f(x, scale=None, bias=None):
        layer = kind(
            channels,
            **options,
            use_scale=affine,
            use_bias=affine,
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        if affine:
            layer.scale[...], layer.bias[...] = scale, bias
        return layer(x)

    return f


def affine_args(shape, affine):
    return [numbers(*shape)] + [numbers(shape[-1], seed=i) for i in range(2) if affine]


@examples(6)
@given(
    st.sampled_from(MESHES),
    st.sampled_from(((3, 7, 5), (2, 4, 6), (3, 5), (8,), (2, 3, 2, 2))),
    st.sampled_from(((4, 2), (8, 8), (6, 3), (8, 1), (3, 3))),
    st.booleans(),
)
def test_group_norm(mesh, leading, channels_and_groups, affine):
    channels, groups = channels_and_groups
    shape = (*leading, channels)
    if len(shape) == 2 and groups == channels:
        groups = 1  # one value is its own mean
    reference = flax_norm(nnx.GroupNorm, channels, affine, num_groups=groups)
    op = lambda x, *more: ops.group_norm(x, groups, *more)  # noqa: E731
    parity(op, reference, affine_args(shape, affine), mesh)


@examples(4)
@given(
    st.sampled_from(MESHES),
    st.sampled_from(((3, 7, 5, 4), (2, 4, 6, 8), (3, 5, 3), (8, 16))),
    st.booleans(),
)
def test_layer_norm(mesh, shape, affine):
    reference = flax_norm(nnx.LayerNorm, shape[-1], affine)
    parity(ops.layer_norm, reference, affine_args(shape, affine), mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(150)
@given(
    st.sampled_from(ALL_MESHES),
    st.sampled_from(((3, 7, 5), (2, 4, 6), (3, 5), (8,), (2, 3, 2, 2), (1, 5, 3, 4))),
    st.sampled_from(((4, 2), (8, 8), (6, 3), (8, 1), (3, 3), (12, 4))),
    st.booleans(),
    st.sampled_from(LAYOUTS),
    st.sampled_from(("group", "instance", "layer")),
)
def test_many_norms_on_every_mesh(mesh, leading, channels_and_groups, affine, layout, kind):
    channels, groups = channels_and_groups
    shape = (*leading, channels)
    if kind == "layer":
        op, reference = ops.layer_norm, flax_norm(nnx.LayerNorm, channels, affine)
    else:
        groups = channels if kind == "instance" else groups
        groups = 1 if len(shape) == 2 and groups == channels else groups  # one value is its own mean
        op = functools.partial(_group_norm, groups)
        reference = flax_norm(nnx.GroupNorm, channels, affine, num_groups=groups)
    parity(functools.partial(op, layout=layout), reference, affine_args(shape, affine), mesh)


def _group_norm(groups, x, *affine, layout):
    return ops.group_norm(x, groups, *affine, layout=layout)


def test_norms_of_an_uneven_array_that_is_cut():
    """After an island devices have different numbers of rows: sums must not count the padding."""
    x, kernel = numbers(2, 7, 6, 4), numbers(1, 1, 4, 4)

    def op(x, kernel):
        y = ops.conv(x, kernel)
        return ops.group_norm(y, 2), ops.layer_norm(y), ops.global_avg_pool(y)

    def reference(x, kernel):
        y = x @ kernel[0, 0]
        group = flax_norm(nnx.GroupNorm, 4, False, num_groups=2)(y)
        return group, flax_norm(nnx.LayerNorm, 4, False)(y), y.mean((1, 2))

    parity(op, reference, [x, kernel], "height=4,channel=2")


@pytest.fixture
def no_shape_checks():
    """Wrong shapes get past jaxtyping, as they do where users are."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("no_shape_checks")
def test_refused():
    x = jnp.ones((2, 4, 6))
    with pytest.raises(UserError, match=r"scale has shape \(5,\) for 6 channels"):
        ops.batch_norm(x, jnp.ones(5))
    with pytest.raises(UserError, match=r"bias has shape \(1,\) for 6 channels"):
        ops.batch_norm(x, None, jnp.ones(1))
    for groups in (0, 4):
        with pytest.raises(UserError, match=f"6 channels do not divide into {groups} groups"):
            ops.group_norm(x, groups)
