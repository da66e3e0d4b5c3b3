"""The kernels for GPUs: their numbers in both interpreters, what surrounds them on many shapes and on meshes,
what chooses among them, and wrong variants. What the compiler says of them is in test_gpu_compiled.py."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as some
from jax import lax

import shardtrain as st
from shardtrain import UserError, compat
from shardtrain.kernels import gpu
from shardtrain.kernels.conv import api as conv
from shardtrain.kernels.matmul import matmul
from shardtrain.kernels.matmul import mosaic as matmul_mosaic
from shardtrain.kernels.matmul.api import tf32_parts
from shardtrain.kernels.winograd import api as winograd_api
from shardtrain.kernels.winograd import bilinear, cook_toom, mosaic, stages, winograd, xla
from shardtrain.kernels.winograd import triton as winograd_triton
from tests.kernels import plain

BOTH = "mosaic", "triton"
LIMITS = {"float32": 2e-6, "bfloat16": 5e-3, "float16": 1e-3}


def numbers(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def error(found, right):
    """Relative root mean square."""
    found, right = np.asarray(found, float), np.asarray(right, float)
    return float(np.sqrt(((found - right) ** 2).mean() / max((right**2).mean(), 1e-30)))


def exact(x, kernel, bias=None, relu=False):
    x, kernel = x.astype(float), kernel.astype(float)
    rank = x.ndim - 2
    one = (1,) * rank
    y = conv.conv(x, kernel, strides=one, dilation=one, padding=((0, 0),) * rank, algorithm="direct")
    y = y if bias is None else y + bias.astype(float)
    return jnp.maximum(y, 0) if relu else y


def interpreted(f, *operands):
    """`f` jitted in the interpreters, and whether a race was found."""
    with gpu.interpreted():
        y = jax.block_until_ready(jax.jit(f)(*operands))
    return y


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Iterator[None]:
    compat.mosaic_races()
    yield
    compat.mosaic_races()


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        ("bfloat16", "default"),
        pytest.param("float16", "default", marks=pytest.mark.slow),
        ("float32", "default"),
        ("float32", "tf32x3"),
    ],
)
@pytest.mark.parametrize("implementation", BOTH)
def test_product(implementation, dtype, precision, transpose_a):
    a, b = numbers(2, 70, 100, dtype=dtype), numbers(2, 100, 40, dtype=dtype)
    y = interpreted(
        lambda a, b: matmul(
            a,
            b,
            transpose_a=transpose_a,
            precision=precision,
            out_type=jnp.float32,
            implementation=implementation,
        ),
        a.mT if transpose_a else a,
        b,
    )
    assert error(y, a.astype(float) @ b.astype(float)) < 3e-7
    assert not compat.mosaic_races()


@pytest.mark.parametrize("implementation", BOTH)
def test_product_of_many_tiles(implementation):
    a, b = numbers(2, 200, 100), numbers(2, 100, 300)
    y = interpreted(lambda a, b: matmul(a, b, implementation=implementation), a, b)
    assert error(y, a.astype(float) @ b.astype(float)) < 3e-7
    assert not compat.mosaic_races()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="jax 0.12's interpreter is the first with tcgen05")
@pytest.mark.parametrize("transpose_a", [False, True])
def test_product_on_blackwell(transpose_a):
    a, b = numbers(2, 70, 200, dtype="bfloat16"), numbers(2, 200, 140, dtype="bfloat16")
    with gpu.interpreted((10, 0)):
        y = jax.jit(
            lambda a, b: matmul(a, b, transpose_a=transpose_a, out_type=jnp.float32, implementation="mosaic")
        )(a.mT if transpose_a else a, b)
    assert error(y, a.astype(float) @ b.astype(float)) < 3e-7


def test_product_and_its_gradients():
    a, b = numbers(30, 50), numbers(50, 20)

    def f(a, b):
        return (matmul(a, b, implementation="triton") ** 2).sum()

    def right(a, b):
        return (jnp.matmul(a.astype(float), b.astype(float)) ** 2).sum()

    for found, expected in zip(
        interpreted(jax.grad(f, (0, 1)), a, b), jax.grad(right, (0, 1))(a, b), strict=True
    ):
        assert error(found, expected) < 1e-6
    np.testing.assert_allclose(matmul(a, b), a @ b, rtol=1e-5, atol=1e-5)  # plain jax here


def test_tf32_parts_are_the_number():
    x = numbers(1000)
    leading, rest = tf32_parts(x)
    assert error(leading, x) > 1e-5
    np.testing.assert_array_equal(leading + rest, x)
    bits = np.asarray(leading).view(np.int32)
    assert not (bits & 0x1FFF).any()


CASES = [  # (shape, filters, window, outputs, type, fused)
    ((2, 7, 6, 5), 7, (3, 3), (4, 4), "float32", False),
    ((1, 6, 7, 70), 20, (3, 3), (2, 2), "bfloat16", False),
    ((1, 5, 6, 3), 4, (3, 3), (2, 2), "bfloat16", True),
    ((1, 4, 5, 40), 20, (3, 3), (2, 2), "float32", True),
    ((2, 30, 3), 4, (3,), (4,), "float16", False),
    ((1, 5, 6, 3), 4, (3, 2), (2, 2), "float32", False),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c in (CASES[0], CASES[1], CASES[5]) else c for c in CASES],
    ids=[f"{c[2]}-{c[4]}-{'fused' if c[5] else ''}" for c in CASES],
)
@pytest.mark.parametrize("implementation", BOTH)
def test_values(implementation, case):
    shape, filters, window, outputs, dtype, fused = case
    x, kernel = numbers(*shape, dtype=dtype), numbers(*window, shape[-1], filters, dtype=dtype)
    bias = numbers(filters)
    y = interpreted(
        lambda x, kernel, bias: winograd(
            x, kernel, bias, outputs=outputs, relu=True, implementation=implementation, fused=fused
        ),
        x,
        kernel,
        bias,
    )
    assert error(y, exact(x, kernel, bias, relu=True)) < LIMITS[dtype]
    assert y.dtype == x.dtype
    assert not compat.mosaic_races()


def gradients(f, right, operands, dtype):
    """Pulls the same numbers back through both, in the interpreters and in float64."""

    def pulled(*operands):
        y, pull = jax.vjp(f, *operands)
        return pull(numbers(*y.shape, seed=3).astype(y.dtype))

    y, pull = jax.vjp(right, *operands)
    expected = pull(numbers(*y.shape, seed=3).astype(dtype).astype(float))
    for name, a, b in zip(
        ("input", "filters", "bias"), interpreted(pulled, *operands), expected, strict=False
    ):
        assert error(a, b) < LIMITS[dtype], name


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", [pytest.param("mosaic", marks=pytest.mark.slow), "triton"])
def test_gradients(implementation, dtype):
    outputs = conv.tile_outputs((3, 3), dtype)
    x, kernel = numbers(1, 6, 7, 3, dtype=dtype), numbers(3, 3, 3, 4, dtype=dtype)

    def f(x, kernel, bias):
        return winograd(x, kernel, bias, outputs=outputs, relu=True, implementation=implementation)

    def right(x, kernel, bias):
        y = exact(x, kernel, bias)
        return jnp.where(f32(x, kernel, bias) > 0, y, 0.0)

    def f32(x, kernel, bias):
        return lax.stop_gradient(interpreted(f, x, kernel, bias))  # numbers near 0 fall to either side

    gradients(f, right, (x, kernel, numbers(4)), dtype)
    assert not compat.mosaic_races()


@pytest.mark.slow
def test_gradients_of_the_mosaic_kernels_of_one_line():
    x, kernel = numbers(1, 9, 3), numbers(3, 3, 4)
    gradients(
        lambda x, k: winograd(x, k, outputs=(2,), implementation="mosaic"), exact, (x, kernel), "float32"
    )
    assert not compat.mosaic_races()


def test_vmap():
    x, kernel = numbers(2, 1, 6, 6, 3), numbers(3, 3, 3, 4)
    y = interpreted(jax.vmap(lambda x: winograd(x, kernel, outputs=(2, 2), implementation="triton")), x)
    for a, b in zip(y, x, strict=True):
        assert error(a, exact(b, kernel)) < LIMITS["float32"]


@pytest.mark.parametrize("mapped", ["both", "filters"])
def test_vmap_of_filters_and_of_gradients(plain_kernels, mapped):
    x, kernels = numbers(3, 1, 6, 6, 3), numbers(3, 3, 3, 3, 4)

    def f(kernel, x):
        return (winograd(x, kernel, outputs=(2, 2), implementation="triton", fused=False) ** 2).sum()

    axes = (0, 0) if mapped == "both" else (0, None)
    x = x if mapped == "both" else x[0]
    found = interpreted(jax.vmap(jax.grad(f), axes), kernels, x)
    right = jax.vmap(jax.grad(lambda k, x: (exact(x, k) ** 2).sum()), axes)(kernels.astype(float), x)
    assert error(found, right) < 2e-6


def test_second_derivatives_are_refused(plain_kernels):
    x, kernel = numbers(1, 6, 6, 3), numbers(3, 3, 3, 4)

    def f(x):
        return (winograd(x, kernel, outputs=(2, 2), implementation="triton") ** 2).sum()

    with pytest.raises(UserError, match="cannot be differentiated again; take implementation='xla'"):
        interpreted(jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum()), x)


@pytest.mark.parametrize(
    ("precision", "level"),
    [
        (None, "default"),
        ("tensorfloat32", "tf32x3"),
        (lax.Precision.HIGH, "tf32x3"),
        (("default", "highest"), "highest"),
        (lax.DotAlgorithmPreset.TF32_TF32_F32_X3, "tf32x3"),
        (lax.DotAlgorithmPreset.F64_F64_F64, "highest"),
    ],
)
def test_precisions(precision, level):
    assert winograd_api._level(precision) == level
    with jax.default_matmul_precision("highest"):
        assert winograd_api._level(None) == "highest"


def test_indices_of_32_bits():
    """The input's gradient and the filters count, too."""
    for x, kernel, outputs in (
        ((2048, 56, 56, 512), (3, 3, 512, 512), (2, 2)),
        ((8192, 9, 9, 256), (7, 7, 256, 256), (2, 2)),
        ((1, 9, 9, 16384), (3, 3, 16384, 16384), (2, 2)),
        ((0, 9, 9, 16), (3, 3, 16, 16), (2, 2)),
    ):
        with gpu.interpreted():
            assert winograd_api.picked(x, kernel, "bfloat16", outputs=outputs) is None
            with pytest.raises(UserError, match=r"2\^31 numbers|nothing to compute"):
                winograd_api.picked(x, kernel, "bfloat16", outputs=outputs, implementation="mosaic")


def test_what_is_no_number_to_compute_with():
    whole = jnp.ones((1, 8, 8, 4), jnp.int32)
    with pytest.raises(UserError, match="algorithm='fft' is for floating point, not int32; use 'direct'"):
        inspect.unwrap(conv.conv)(
            whole,
            jnp.ones((3, 3, 4, 4), jnp.int32),
            strides=(1, 1),
            dilation=(1, 1),
            padding=((0, 0),) * 2,
            algorithm="fft",
        )
    with pytest.raises(UserError, match="gives float32, bfloat16, float16, not float64"), gpu.interpreted():
        winograd(
            numbers(1, 6, 6, 4), numbers(3, 3, 4, 4), outputs=(2, 2), out_type=float, implementation="mosaic"
        )
    for algorithm in ("im2col", "fft", "winograd"):
        y = st.ops.conv(jnp.ones((0, 8, 8, 4)), jnp.ones((3, 3, 4, 5)), algorithm=algorithm)
        assert y.shape == (0, 8, 8, 5)
    assert matmul(jnp.ones((0, 3)), jnp.ones((3, 2))).shape == (0, 2)
    with pytest.raises(UserError, match="do not agree"):
        inspect.unwrap(matmul)(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", BOTH)
def test_what_is_not_finite_stays_so(implementation, bad):
    x, kernel = numbers(1, 6, 6, 3).at[0, 3, 2, 1].set(bad), numbers(3, 3, 3, 4)
    y = interpreted(
        lambda x, k: winograd(x, k, outputs=(2, 2), relu=False, implementation=implementation, fused=False),
        x,
        kernel,
    )
    wrong = np.isfinite(np.asarray(y)) & ~np.isfinite(np.asarray(exact(x, kernel)))
    assert not wrong.any()


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of `implementation="triton"` in plain jax."""
    monkeypatch.setitem(sys.modules, "shardtrain.kernels.winograd.triton", plain)
    monkeypatch.setitem(sys.modules, "shardtrain.kernels.matmul.triton", plain)


@some.composite
def problems(draw: Any) -> tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, ...], bool | None]:
    rank = draw(some.sampled_from((1, 2, 2)))
    window = tuple(draw(some.sampled_from((1, 2, 3, 3, 5))) for _ in range(rank))
    outputs = tuple(draw(some.integers(1, 9 - r)) if r > 1 else 1 for r in window)
    extents = tuple(r + draw(some.integers(0, 12)) for r in window)
    shape = draw(some.integers(1, 3)), *extents, draw(some.sampled_from((1, 3, 33, 64, 100, 130)))
    tile = {m for m, r in zip(outputs, window, strict=True) if r > 1}
    fused = (
        draw(some.sampled_from((None, True)))
        if rank == 2 and min(window) > 1 and (tile == {2} or tile == {4})
        else None
    )
    return shape, draw(some.sampled_from((1, 5, 64, 70, 129))), window, outputs, fused


@settings(deadline=None, max_examples=8, database=None, derandomize=True)
@given(problem=problems())
@pytest.mark.slow
def test_any_shape(problem):
    """Padding, images side by side, chunks and crops, with gradients."""
    shape, filters, window, outputs, fused = problem
    x, kernel, bias = numbers(*shape), numbers(*window, shape[-1], filters), numbers(filters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "shardtrain.kernels.winograd.triton", plain)
        patch.setitem(sys.modules, "shardtrain.kernels.matmul.triton", plain)

        def f(x, kernel, bias):
            return winograd(x, kernel, bias, outputs=outputs, implementation="triton", fused=fused)

        y, pull = interpreted(lambda *o: jax.vjp(f, *o), x, kernel, bias)
        right, back = jax.vjp(exact, x, kernel, bias)
        dy = numbers(*y.shape, seed=1)
        grown = np.prod(
            [cook_toom.algorithm(m, r).amplification for m, r in zip(outputs, window, strict=True)]
        )
        assert error(y, right) < 1e-6 * max(1, grown)
        with gpu.interpreted():
            found = jax.jit(pull)(dy)
    for a, b in zip(found, back(dy.astype(float)), strict=True):
        assert error(a, b) < 1e-6 * max(1, grown)


@pytest.mark.parametrize(
    "cut", ["height=2,channel=2", "data=2,width=2", "channel=4", "data=2,height=2,width=2"]
)
def test_on_a_mesh(plain_kernels, cut):
    x, kernel, bias = numbers(2, 8, 9, 6), numbers(3, 3, 6, 8), numbers(8)

    def f(x, kernel, bias):
        return st.ops.conv(x, kernel, bias, algorithm="winograd", implementation="triton")

    def right(x, kernel, bias):
        return st.ops.conv(x.astype(float), kernel.astype(float), bias.astype(float), algorithm="direct")

    dy = numbers(2, 8, 9, 8, seed=1)
    y, pull = jax.vjp(right, x, kernel, bias)
    with gpu.interpreted(), jax.set_mesh(st.make_mesh(cut)):
        found, *backward = jax.jit(lambda *o: (lambda y, pull: (y, *pull(dy)))(*jax.vjp(f, *o)))(
            x, kernel, bias
        )
    assert error(found, y) < 2e-6
    for a, b in zip(backward, pull(dy.astype(float)), strict=True):
        assert error(a, b) < 2e-6


def test_kernels_of_dilated_windows(plain_kernels):
    x, kernel = numbers(1, 11, 12, 3), numbers(3, 3, 3, 4)
    found = interpreted(
        lambda x, k: st.ops.conv(x, k, dilation=2, algorithm="winograd", implementation="triton"), x, kernel
    )
    right = st.ops.conv(x.astype(float), kernel.astype(float), dilation=2, algorithm="direct")
    assert error(found, right) < 2e-6


def test_which_is_tried_when():
    hopper, ampere, blackwell, volta = (
        gpu.Card("", capability) for capability in ((9, 0), (8, 6), (10, 0), (7, 0))
    )
    names = {
        at: [name for name in gpu.IMPLEMENTATIONS if gpu.why_not(name, at) is None]
        for at in (hopper, ampere, blackwell, volta, None)
    }
    assert names == {
        hopper: ["mosaic", "triton", "xla"],
        ampere: ["triton", "xla"],
        blackwell: ["mosaic", "triton", "xla"],
        volta: ["xla"],
        None: ["xla"],
    }
    assert gpu.chosen(None, "conv") == ("xla",)  # here is no GPU


@pytest.mark.parametrize(
    ("said", "shape", "options"),
    [
        (r"implementation='mosaic' is for NVIDIA GPUs", (1, 6, 6, 4), {}),
        (
            r"implementation='cuda'; there are 'mosaic', 'triton', 'xla'",
            (1, 6, 6, 4),
            {"implementation": "cuda"},
        ),
    ],
)
def test_named_fails_loudly_without_a_gpu(said, shape, options):
    with pytest.raises(UserError, match=said):
        winograd(
            numbers(*shape), numbers(3, 3, 4, 4), outputs=(2, 2), **({"implementation": "mosaic"} | options)
        )


@pytest.mark.parametrize(
    ("said", "shape", "kernel", "dtype", "options"),
    [
        ("has no groups, not 2", (1, 6, 6, 4), (3, 3, 2, 4), "float32", {"groups": 2}),
        (
            "has 1 and 2 dimensions, not 3",
            (1, 5, 5, 5, 2),
            (3, 3, 3, 2, 2),
            "float32",
            {"outputs": (2, 2, 2)},
        ),
        ("takes float32, bfloat16, float16, not float64", (1, 6, 6, 4), (3, 3, 4, 4), "float64", {}),
        ("has no products of float32", (1, 6, 6, 4), (3, 3, 4, 4), "float32", {"precision": "highest"}),
        ("holds tiles of 8 pixels, not 10", (1, 12, 12, 4), (3, 3, 4, 4), "float32", {"outputs": (8, 8)}),
        (
            "has no fused product for 5x5",
            (1, 6, 6, 4),
            (3, 3, 4, 4),
            "float32",
            {"outputs": (3, 3), "fused": True},
        ),
    ],
)
def test_what_kernels_do_not_compute(said, shape, kernel, dtype, options):
    """A named implementation refuses it; without a name plain jax computes it."""
    x, kernel = numbers(*shape, dtype=dtype), numbers(*kernel, dtype=dtype)
    options = {"outputs": (2, 2)} | options
    with gpu.interpreted():
        with pytest.raises(UserError, match=said):
            winograd(x, kernel, **options, implementation="mosaic")
        program = str(jax.make_jaxpr(lambda x, k: winograd(x, k, **options | {"fused": None}))(x, kernel))
    if not {"precision", "fused"} & set(options):  # Triton multiplies float32, and tiles need not be fused
        assert "pallas" not in program
        assert "mpmd" not in program


def test_conv_refuses_an_implementation_of_another_algorithm():
    x, kernel = numbers(1, 6, 6, 4), numbers(3, 3, 4, 4)
    with pytest.raises(UserError, match=r"implementation='mosaic' is of algorithm='winograd', not of 'fft'"):
        st.ops.conv(x, kernel, algorithm="fft", implementation="mosaic")
    with pytest.raises(UserError, match=r"nn.Conv: implementation='cuda'; there are"):
        st.nn.Conv(3, 4, (3, 3), algorithm="winograd", implementation="cuda", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"matmul: operands float32\(2, 3\) and float32\(4, 5\) do not agree"):
        matmul(numbers(2, 3), numbers(4, 5))
    with pytest.raises(UserError, match=r"precision='x'; there are 'default', 'tf32x3', 'highest'"):
        matmul(numbers(2, 3), numbers(3, 5), precision="x")


def test_halves_are_shared():
    """Rows of points p and -p: half the multiplications."""
    rows = cook_toom.algorithm(4, 3).input
    parts = [numbers(5, seed=i) for i in range(6)]
    found = bilinear.apply(rows, parts)
    np.testing.assert_allclose(
        jnp.stack(found), cook_toom.matrix(rows) @ jnp.stack(parts), rtol=2e-5, atol=1e-5
    )
    count = str(jax.make_jaxpr(lambda *p: bilinear.apply(rows, p))(*parts)).count(" mul ")
    assert count < sum(abs(w) not in (0, 1) for row in rows for w in row)


def wrong_points(patch):
    right = cook_toom.algorithm

    def wrong(outputs, taps, points=None):
        found, other = right(outputs, taps), right(outputs, taps, tuple(map(cook_toom.Fraction, (0, 1, 2))))
        return cook_toom.Algorithm(outputs, taps, found.points, found.output, other.filter, found.input)

    patch.setattr(xla, "algorithm", wrong)


def transposed_output(patch):
    for room in (mosaic, winograd_triton):
        right = room.apply_2d

        def wrong(rows, tile, right=right):
            found = right(rows, tile)
            return [list(line) for line in zip(*found, strict=True)] if len(rows[0]) == 2 else found

        patch.setattr(room, "apply_2d", wrong)


def tile_off_by_one(patch):
    right = stages._side_by_side

    def wrong(x, p, extents, channels):
        return jnp.roll(right(x, p, extents, channels), 1, 2)

    patch.setattr(stages, "_side_by_side", wrong)


def a_product_left_out(patch):
    right = matmul_mosaic.matmul

    def wrong(a, b, *, products, **kwargs):
        return right(a, b, products=products[1:] if len(products) > 1 else products, **kwargs)

    patch.setattr(matmul_mosaic, "matmul", wrong)


@pytest.mark.parametrize("implementation", [pytest.param("mosaic", marks=pytest.mark.slow), "triton"])
@pytest.mark.parametrize("mutant", [wrong_points, transposed_output, tile_off_by_one])
def test_wrong_kernels_are_noticed(monkeypatch, implementation, mutant):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_values(implementation, ((1, 5, 6, 3), 4, (3, 3), (2, 2), "float32", False))


def test_a_product_of_parts_left_out_is_noticed(monkeypatch):
    a_product_left_out(monkeypatch)
    with pytest.raises(AssertionError):
        test_product("mosaic", "float32", "tf32x3", False)


@pytest.mark.parametrize("room", [mosaic], ids=["transforms"])
@pytest.mark.slow
def test_a_missing_barrier_is_a_race(monkeypatch, room):
    """The interpreter may compute the right numbers all the same."""
    monkeypatch.setattr(room.plgpu, "barrier_wait", lambda *_: None)
    x, kernel = numbers(1, 5, 6, 3), numbers(3, 3, 3, 4)

    def f(x, k):
        return winograd(x, k, outputs=(2, 2), implementation="mosaic", fused=False)

    try:
        interpreted(f, x, kernel)
        found = compat.mosaic_races()
    except jax.errors.JaxRuntimeError as raised:  # jax 0.11 and later
        found = "race" in str(raised).lower()
    assert found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", BOTH)
def test_on_the_card(implementation, dtype):
    if reason := gpu.why_not(implementation, gpu.card()):
        pytest.skip(reason)
    x, kernel = numbers(4, 30, 30, 96, dtype=dtype), numbers(3, 3, 96, 64, dtype=dtype)
    outputs = conv.tile_outputs((3, 3), dtype)
    y, pull = jax.vjp(
        jax.jit(
            lambda x, k: winograd(x, k, outputs=outputs, precision="high", implementation=implementation)
        ),
        x,
        kernel,
    )
    right, back = jax.vjp(exact, x, kernel)
    assert error(y, right) < LIMITS[dtype]
    dy = numbers(*y.shape, seed=1).astype(dtype)
    for a, b in zip(pull(dy), back(dy.astype(float)), strict=True):
        assert error(a, b) < LIMITS[dtype]
