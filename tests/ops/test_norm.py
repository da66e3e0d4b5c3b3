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


# Which of the values (4, 7, 6, 8) count: shapes that broadcast, in all ways that a mesh cuts them.
WHICH = {
    "examples": np.array([True, False, True, True]).reshape(4, 1, 1, 1),
    "pixels": (np.arange(42) % 3 > 0).reshape(1, 7, 6, 1),
    "rows": (np.arange(7) % 4 > 0).reshape(7, 1, 1),
    "channels": np.arange(8) % 4 > 0,
    "values": np.random.default_rng(0).random((4, 7, 6, 8)) > 0.5 * (np.arange(8) > 2),
}
NORMS = {
    "batch": (lambda x, s, b, **o: ops.batch_norm(x, s, b, **o)[0], nnx.BatchNorm, {"epsilon": 1e-5}),
    "group": (lambda x, s, b, **o: ops.group_norm(x, 4, s, b, **o), nnx.GroupNorm, {"num_groups": 4}),
    "wide group": (lambda x, s, b, **o: ops.group_norm(x, 1, s, b, **o), nnx.GroupNorm, {"num_groups": 1}),
    "instance": (ops.instance_norm, nnx.InstanceNorm, {}),
    "layer": (ops.layer_norm, nnx.LayerNorm, {}),
    "rms": (lambda x, s, b, **o: ops.rms_norm(x, s, **o) + b, nnx.RMSNorm, {}),
}


def nnx_values(kind, which, **options):
    """The nnx layer as a function of its input, scale and bias; of the input `which` says what counts."""

    def f(x, scale, bias):
        more = {} if kind is nnx.RMSNorm else {"use_bias": False}
        layer = kind(x.shape[-1], **more, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        layer.scale[...] = scale
        if kind is nnx.BatchNorm:  # whose running statistics are in float32 whatever is asked for
            layer.mean, layer.var = (nnx.BatchStat(jnp.zeros(x.shape[-1:])) for _ in range(2))
        mask = None if which is None else jnp.broadcast_to(which, x.shape)
        return layer(x, mask=mask) + bias

    return f


def mask_parity(name, which, mesh, two_passes=False):
    op, kind, options = NORMS[name]
    more = {"use_fast_variance": False} if two_passes else {}
    shown = {} if name == "rms" else more
    mask = None if which is None else jnp.asarray(WHICH[which])
    reference = nnx_values(kind, None if which is None else WHICH[which], **options, **more)
    args = [numbers(4, 7, 6, 8) * 3 + 1, numbers(8), numbers(8, seed=1)]
    return parity(lambda *args: op(*args, mask=mask, **shown), reference, args, mesh)


def has_statistics(name, which):
    """Whether every statistic is of some value; without any it is NaN."""
    nothing = {("batch", "channels"), ("instance", "channels")}
    nothing |= {(name, "examples") for name in NORMS if name != "batch"}
    nothing |= {(name, where) for name in ("layer", "rms") for where in ("pixels", "rows")}
    return (name, which) not in nothing


CHEAP = {("batch", "values"), ("group", "values"), ("wide group", "channels"), ("layer", "values")}
CHEAP |= {("batch", "examples"), ("rms", "channels"), ("batch", "rows"), ("instance", "pixels")}
MASKED = [(name, which) for name in NORMS for which in WHICH if has_statistics(name, which)]


@pytest.mark.parametrize(
    ("name", "which"), [pytest.param(*c, marks=[] if c in CHEAP else pytest.mark.slow) for c in MASKED]
)
@pytest.mark.parametrize("mesh", ["height=2,channel=2", pytest.param("data=8", marks=pytest.mark.slow)])
def test_masks(name, which, mesh):
    mask_parity(name, which, mesh, two_passes=which != "values")


@pytest.mark.parametrize("name", [name for name in NORMS if name != "rms"])
@pytest.mark.parametrize(
    "mesh", ["height=2,channel=4", pytest.param("data=2,height=2", marks=pytest.mark.slow)]
)
def test_two_passes(name, mesh):
    mask_parity(name, None, mesh, two_passes=True)


@pytest.mark.parametrize("name", [name for name in NORMS if name != "rms"])
def test_two_passes_keep_the_digits_of_a_large_mean(name):
    """In float32 a mean of 3000 leaves the mean square no digits of a variance of 1."""
    op, _, _ = NORMS[name]
    x, one = jnp.asarray(numbers(4, 6, 6, 8) + 3000), jnp.ones(8, jnp.float32)
    right = op(x, one, 0 * one)
    with jax.set_mesh(make_mesh("height=2,channel=2")):
        slow, fast = (
            op(jnp.asarray(x, jnp.float32), one, 0 * one, use_fast_variance=fast) for fast in (False, True)
        )
    np.testing.assert_allclose(slow, right, atol=2e-3)
    assert np.abs(fast - right).max() > 0.1


@pytest.mark.parametrize("mesh", ["data=1", "data=8", "data=2,height=4"])
@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_nothing_are_nan_as_in_nnx(name, mesh):
    """Rows that only pad the blocks of a mesh have no part in it."""
    op, kind, options = NORMS[name]
    x, mask = (
        jnp.asarray(numbers(3, 5, 3, 2)),
        np.array([True, False]),
    )  # of the second channel nothing counts
    if name not in ("batch", "instance"):
        mask = np.array([True, False, True]).reshape(3, 1, 1, 1)  # of the second example nothing does
    options = options | ({"num_groups": 1} if kind is nnx.GroupNorm else {})
    one = jnp.ones(2)
    expected = nnx_values(kind, mask, **options)(x, one, 0 * one)
    op = (lambda x, s, b, **o: ops.group_norm(x, 1, s, b, **o)) if kind is nnx.GroupNorm else op
    with jax.set_mesh(make_mesh(mesh)):
        found = op(x, one, 0 * one, mask=jnp.asarray(mask))
    assert 0 < np.isnan(expected).mean() < 1
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_mask_counts_among_real_examples():
    x, scale = jnp.asarray(numbers(4, 6, 4, 8)), jnp.asarray(numbers(8))
    real = np.array([True, True, True, False])
    mask = WHICH["rows"][:6]

    def reference(x, scale):
        counted = x[:3][:, mask.ravel()]
        mean, var = counted.mean((0, 1, 2)), counted.var((0, 1, 2))
        return (x - mean) / jnp.sqrt(var + EPSILON) * scale

    def op(x, scale, examples=jnp.asarray(real)):
        return ops.batch_norm(x, scale, examples=examples, mask=jnp.asarray(mask))[0]

    parity(op, reference, [x, scale], "data=2,height=2")
    assert np.isfinite(op(x, scale, jnp.zeros(4, bool))).all()  # a microbatch that is padding only


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
    for mask in (jnp.ones(2, bool), jnp.ones((1, 2, 4, 6), bool), jnp.ones(6)):
        with pytest.raises(UserError, match=r"a mask of .* broadcast .*: one .* mask.reshape\(-1, 1, 1\)"):
            ops.layer_norm(x, mask=mask)
    for groups in (0, 4):
        with pytest.raises(UserError, match=f"6 channels do not divide into {groups} groups"):
            ops.group_norm(x, groups)
