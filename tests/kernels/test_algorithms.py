"""Every algorithm against direct convolution in float64: values and both gradients."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from shardtrain import UserError
from shardtrain.kernels.conv import api, im2col
from shardtrain.kernels.winograd import cook_toom
from shardtrain.kernels.winograd import xla as winograd

FAST = "im2col", "fft", "winograd"


def numbers(*shape, seed=0, dtype=float):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def gradients(algorithm, x, kernel, **static):
    def f(x, kernel):
        return api.conv(x, kernel, algorithm=algorithm, **static)

    y, pull = jax.vjp(f, x, kernel)
    return y, *pull(jnp.asarray(numbers(*y.shape, seed=1), y.dtype))


def compare(algorithm, x, kernel, tolerance=1e-10, **static):
    run = jax.jit(gradients, static_argnames=("algorithm", *static))
    expected = run("direct", x, kernel, **static)
    for name, a, b in zip(
        ("value", "input", "filter"), run(algorithm, x, kernel, **static), expected, strict=True
    ):
        limit = tolerance * max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=f"{algorithm}: {name}")


@st.composite
def problems(draw: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    rank, algorithm = draw(st.sampled_from((1, 2, 2, 3))), draw(st.sampled_from(FAST))
    sizes = (1, 2, 3, 4, 5, 7) if rank < 3 else (1, 2, 3)
    window = [draw(st.sampled_from(sizes)) for _ in range(rank)]
    dilation = tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in range(rank))
    input_dilation = tuple(draw(st.sampled_from((1, 1, 1, 2))) for _ in range(rank))
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    pads = tuple((draw(st.integers(-1, s)), draw(st.integers(-1, s))) for s in spans)
    extents = [
        max(draw(st.integers(1, 15 if rank < 3 else 6)), s - sum(p), 1 - min(0, p[0]) - min(0, p[1]))
        for s, p in zip(spans, pads, strict=True)
    ]
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    a, b = (draw(st.integers(1, 4)) for _ in range(2))
    strides = tuple(draw(st.integers(1, 3)) if algorithm == "im2col" else 1 for _ in range(rank))
    static = {
        "strides": strides,
        "dilation": dilation,
        "input_dilation": input_dilation,
        "padding": pads,
        "groups": groups,
    }
    return algorithm, (draw(st.integers(1, 3)), *extents, groups * a), (*window, a, groups * b), static


def seldom(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
    )


@seldom(12)
@given(problems())
@pytest.mark.slow
def test_any_convolution_by_any_algorithm(drawn):
    algorithm, x, kernel, static = drawn
    compare(algorithm, numbers(*x), numbers(*kernel), **static)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@seldom(300)
@given(problems())
def test_many_convolutions_by_any_algorithm(drawn):
    algorithm, x, kernel, static = drawn
    compare(algorithm, numbers(*x), numbers(*kernel), **static)


PLAIN = {"strides": (1, 1), "dilation": (1, 1), "padding": ((1, 1), (1, 1))}


@pytest.mark.parametrize("window", [(3, 3), (9, 9), pytest.param((15, 31), marks=pytest.mark.slow)])
def test_images_larger_than_a_tile_of_the_transform(window):
    static = PLAIN | {"padding": tuple((k // 2, k // 2) for k in window)}
    compare("fft", numbers(1, 100, 150, 2), numbers(*window, 2, 3), **static)


# --- Winograd's matrices ----------------------------------------------------------------------------------


def exactly(found, x, w):
    """The bilinear algorithm in fractions."""

    def times(rows, v):
        return [sum(a * b for a, b in zip(row, v, strict=True)) for row in rows]

    product = [a * b for a, b in zip(times(found.filter, w), times(found.input, x), strict=True)]
    return times(found.output, product)


@pytest.mark.parametrize("taps", range(1, 8))
@pytest.mark.parametrize("outputs", range(1, 7))
def test_exact_in_fractions(outputs, taps):
    if outputs + taps > 13:
        pytest.skip("a larger tile than there is")
    found = cook_toom.algorithm(outputs, taps)
    rng = np.random.default_rng([outputs, taps])
    x, w = ([Fraction(int(v), 7) for v in rng.integers(-99, 99, n)] for n in (found.tile, taps))
    assert exactly(found, x, w) == [sum(x[i + k] * w[k] for k in range(taps)) for i in range(outputs)]
    assert found.tile == outputs + taps - 1 == len(found.input) == len(found.filter)


def test_the_matrices_of_the_textbook():
    """F(2, 3) of Lavin and Gray, sign for sign."""
    found = cook_toom.algorithm(2, 3)
    assert cook_toom.matrix(found.input).tolist() == [
        [1, 0, -1, 0],
        [0, 1, 1, 0],
        [0, -1, 1, 0],
        [0, 1, 0, -1],
    ]
    assert cook_toom.matrix(found.filter).tolist() == [
        [1, 0, 0],
        [0.5, 0.5, 0.5],
        [0.5, -0.5, 0.5],
        [0, 0, 1],
    ]
    assert cook_toom.matrix(found.output).tolist() == [[1, 1, 1, 0], [0, 1, -1, -1]]


@pytest.mark.parametrize(("outputs", "fewer"), [(2, 2.25), (4, 4.0)])
def test_multiplications_in_the_program(outputs, fewer):
    """Counted in the jaxpr, for images that tiles fill."""
    x, kernel = jnp.ones((1, 4 * outputs + 2, 4 * outputs + 2, 8)), jnp.ones((3, 3, 8, 8))
    program = jax.make_jaxpr(lambda x, k: winograd.winograd(x, k, outputs=(outputs,) * 2))(x, kernel)
    (product,) = [e for e in program.jaxpr.eqns if e.primitive.name == "dot_general"]
    multiplications = product.outvars[0].aval.size * 8
    direct = (4 * outputs) ** 2 * 9 * 8 * 8
    assert direct / multiplications == fewer
    assert 9 / winograd.multiplications((3, 3), (outputs, outputs)) == fewer


def test_points_that_lose_fewer_digits():
    """Those that we take against the usual ones, by the model and in float32."""
    usual = tuple(map(Fraction, (0, 1, -1, 2, -2)))
    ours, theirs = cook_toom.algorithm(4, 3), cook_toom.algorithm(4, 3, usual)
    assert theirs.amplification / ours.amplification > 1.4

    def rms(found):
        x, kernel = numbers(2, 18, 18, 256, dtype="f4"), numbers(3, 3, 256, 16, dtype="f4") / 48
        u = winograd.transform_filters(jnp.asarray(kernel), (found,) * 2)
        y = winograd.from_filters(jnp.asarray(x), u, (found,) * 2)
        static = PLAIN | {"padding": ((0, 0), (0, 0))}
        right = api.conv(jnp.asarray(x, float), jnp.asarray(kernel, float), **static)
        return float(np.sqrt(((y - right) ** 2).mean() / (right**2).mean()))

    assert rms(ours) < 1e-6 < 1.5 * rms(theirs)


def test_filters_are_transformed_once():
    found = winograd.algorithms((3, 3), (4, 4))
    x, kernel = jnp.asarray(numbers(2, 9, 8, 4)), jnp.asarray(numbers(3, 3, 4, 5))
    u = winograd.transform_filters(kernel, found)
    np.testing.assert_array_equal(
        winograd.from_filters(x, u, found), winograd.winograd(x, kernel, outputs=(4, 4))
    )


# --- types, workspaces, errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-6), ("bfloat16", 2e-2), ("float16", 3e-3)])
def test_types(algorithm, dtype, limit):
    x, kernel = jnp.asarray(numbers(2, 12, 12, 64), dtype), jnp.asarray(numbers(3, 3, 64, 32) / 24, dtype)
    y = api.conv(x, kernel, algorithm=algorithm, **PLAIN)
    right = api.conv(x.astype(float), kernel.astype(float), **PLAIN)
    assert y.dtype == dtype
    assert float(jnp.sqrt(((y - right) ** 2).mean() / (right**2).mean())) < limit
    wide = api.conv(x, kernel, algorithm=algorithm, **PLAIN, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32


def test_workspace_is_what_the_windows_take():
    shape, window = (2, 9, 8, 4), (3, 2)
    x, kernel = jnp.ones(shape), jnp.ones((*window, 4, 5))
    program = jax.make_jaxpr(lambda x: im2col.im2col(x, kernel, strides=(2, 1), dilation=(1, 2)))(x)
    largest = max(e.outvars[0].aval.size for e in program.jaxpr.eqns) * 8
    assert im2col.workspace(shape, window, (2, 1), (1, 2), 8) == largest


@pytest.mark.parametrize("algorithm", FAST)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(algorithm, value):
    """Wherever direct convolution gives no finite number no algorithm does; they may spread it further."""
    x = numbers(1, 12, 12, 3)
    x[0, 5, 7, 1] = value
    static = PLAIN
    direct, found = (
        api.conv(jnp.asarray(x), jnp.asarray(numbers(3, 3, 3, 4)), algorithm=a, **static)
        for a in ("direct", algorithm)
    )
    assert not np.isfinite(found)[~np.isfinite(direct)].any()
    if algorithm == "im2col":
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(direct))


@pytest.mark.parametrize(
    ("algorithm", "window", "strides", "message"),
    [
        ("strassen", (3, 3), (1, 1), "algorithm='strassen'; there are 'auto', 'direct', 'im2col'"),
        ("fft", (3, 3), (2, 1), r"algorithm='fft' has no strides=\(2, 1\); use 'direct'"),
        ("winograd", (3, 3), (1, 2), r"algorithm='winograd' has no strides=\(1, 2\)"),
        ("winograd", (9, 3), (1, 1), r"algorithm='winograd' has no window of \(9, 3\)"),
    ],
)
def test_refused(algorithm, window, strides, message):
    with pytest.raises(UserError, match=message):
        api.conv(
            jnp.ones((1, 12, 12, 2)),
            jnp.ones((*window, 2, 2)),
            strides=strides,
            dilation=(1, 1),
            padding=((0, 0), (0, 0)),
            algorithm=algorithm,
        )


def test_points_are_checked():
    with pytest.raises(ValueError, match="takes 3 different points, not 0, 1, 1"):
        cook_toom.algorithm(2, 3, tuple(map(Fraction, (0, 1, 1))))
    with pytest.raises(ValueError, match="12 is the largest"):
        cook_toom.algorithm(8, 7)
    with pytest.raises(ValueError, match="1 or more"):
        cook_toom.algorithm(0, 3)


# --- wrong variants ---------------------------------------------------------------------------------------


def wrong_points(patch):
    """The interpolation is that of other points than the evaluation."""
    right = cook_toom.algorithm

    def wrong(outputs, taps):
        other = right(outputs, taps, tuple(map(Fraction, (0, 1, -1, 2, -2)))[: outputs + taps - 2])
        found = right(outputs, taps)
        return cook_toom.Algorithm(outputs, taps, found.points, found.output, other.filter, found.input)

    patch.setattr(winograd, "algorithm", wrong)


def transposed_output(patch):
    right = cook_toom.algorithm

    def wrong(outputs, taps):
        f = right(outputs, taps)
        rows = tuple(tuple(reversed(row)) for row in f.output)
        return cook_toom.Algorithm(outputs, taps, f.points, rows, f.filter, f.input)

    patch.setattr(winograd, "algorithm", wrong)


def tiles_one_off(patch):
    right = lax.slice_in_dim

    def wrong(x, start, stop, stride=1, axis=0):
        return right(x, max(0, start - 1), max(0, start - 1) + stop - start, stride, axis)

    patch.setattr(winograd.lax, "slice_in_dim", wrong)


@pytest.mark.parametrize("mutate", [wrong_points, transposed_output, tiles_one_off])
def test_a_wrong_algorithm_is_noticed(monkeypatch, mutate):
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"value|input|filter"):
        compare("winograd", numbers(1, 9, 9, 2), numbers(3, 3, 2, 2), **PLAIN)
