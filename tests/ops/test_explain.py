"""`explain_conv` says what `conv` does, on one device and on a mesh."""

import importlib
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import shardtrain as st
from shardtrain import UserError, jaxprs, ops
from shardtrain.kernels import conv as kernels

CASES = {
    "fft, gradients too": ((1, 64, 64, 16), (31, 31, 16, 16), {}),
    "by the model": ((1, 70, 70, 16), (29, 29, 16, 16), {}),
    "strides": ((1, 56, 56, 128), (3, 3, 128, 128), {"strides": 2, "padding": 1}),
    "3-D": ((1, 24, 24, 24, 16), (3, 3, 3, 16, 16), {}),
    "groups": ((1, 28, 28, 256), (3, 3, 8, 256), {"groups": 32}),
    "float64": ((1, 64, 64, 16), (31, 31, 16, 16), {"dtype": "float64"}),
    "bfloat16": ((1, 64, 64, 16), (5, 5, 16, 16), {"dtype": "bfloat16"}),
    "1x1": ((1, 56, 56, 256), (1, 1, 256, 64), {}),
    "long numbers": ((128, 224, 224, 2048), (7, 7, 64, 2048), {"groups": 32, "dilation": (11, 13)}),
    "zeros between inputs": ((1, 9, 9, 8), (3, 3, 8, 8), {"input_dilation": 2}),
    "no window": ((4, 8), (8, 3), {}),
}


def primitives(jaxpr):
    """Names of all primitives, those of inner jaxprs too, with the shapes of what they give."""
    found = Counter()
    for equation in jaxpr.eqns:
        inner = list(jaxprs.inner_jaxprs(equation))
        for part in inner:
            found += primitives(part)
        if not inner:
            found[equation.primitive.name, str(equation.outvars[0].aval)] += 1
    return found


def traced(algorithm, shapes, arguments):
    dtype = arguments.get("dtype", "float32")
    x, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    given = {k: v for k, v in arguments.items() if k != "dtype"}
    made = jax.make_jaxpr(lambda x, kernel: ops.conv(x, kernel, algorithm=algorithm, **given))(x, kernel)
    return primitives(made.jaxpr)


@pytest.mark.parametrize("name", CASES)
def test_says_what_conv_does(name):
    """The program of `auto` is that of the algorithm that is named, and of no other."""
    *shapes, arguments = CASES[name]
    found = ops.explain_conv(*shapes, **arguments)
    by_auto = traced("auto", shapes, arguments)
    for row in found.rows:
        if row.pass_name == "forward" and row.multiplications:
            same = traced(row.algorithm, shapes, arguments) == by_auto
            assert same == (row.algorithm == found.choice.forward)


@pytest.mark.parametrize("name", CASES)
def test_fits_100_columns(name):
    *shapes, arguments = CASES[name]
    text = str(ops.explain_conv(*shapes, **arguments))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("* ") == 1 + len(kernels.PASSES)


def test_rows():
    """Losing rows stay, each with its source."""
    found = ops.explain_conv((1, 64, 64, 16), (31, 31, 16, 16))
    assert [(r.pass_name, r.algorithm) for r in found.rows] == [
        (name, algorithm) for name in kernels.PASSES for algorithm in kernels.ALGORITHMS
    ]
    assert found.choice.forward == "fft"
    direct, im2col, fft, winograd = found.rows[:4]
    assert direct.source == im2col.source == fft.source == "measured"
    assert fft.seconds < direct.seconds < im2col.seconds
    assert fft.multiplications < direct.multiplications == 64**2 * 31**2 * 16**2
    assert im2col.workspace == 64**2 * 31**2 * 16 * 4
    assert winograd.refused == "no window of more than 7 rows"
    assert ops.explain_conv((1, 70, 70, 16), (29, 29, 16, 16)).rows[0].source == "model"


def test_what_one_device_computes():
    arguments = (2, 64, 64, 16), (31, 31, 16, 16)
    with jax.set_mesh(st.make_mesh("data=2,height=2,channel=2")):
        found = ops.explain_conv(*arguments)
        named = traced(found.choice.forward, arguments, {})
        assert traced("auto", arguments, {}) == named
    assert found.layer == "1x62x64x8->16,window=31x31,padding=0x15"  # 32 rows and their halo, partial sums
    assert ops.explain_conv(*arguments).layer == "2x64x64x16->16,window=31x31"


def test_takes_what_conv_takes():
    x, kernel = jnp.ones((1, 8, 9, 4), "float32"), jnp.ones((3, 3, 4, 6), "float32")
    found = ops.explain_conv(x, kernel, jnp.ones(6), padding="VALID", dilation=2)
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel)]
    assert ops.explain_conv(*structs, padding="VALID", dilation=2) == found
    assert ops.explain_conv(x.shape, kernel.shape, padding="VALID", dilation=2) == found
    assert found.layer == "1x8x9x4->6,window=3x3,dilation=2x2,padding=0x0"
    assert ops.explain_conv(x, kernel, algorithm="im2col").choice == ("im2col",) * 3


def test_refuses_as_conv_does():
    with pytest.raises(UserError, match=r"conv: algorithm='fft' has no strides=\(2, 2\)"):
        ops.explain_conv((1, 8, 8, 4), (3, 3, 4, 6), algorithm="fft", strides=2)
    with pytest.raises(UserError, match="conv: 4 input channels"):
        ops.explain_conv((1, 8, 8, 4), (3, 3, 5, 6))


def test_leaves_compiled_programs_alone():
    """It traces the island by itself: a call after it compiles nothing anew."""
    x, kernel = jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 6))
    ops.conv(x, kernel)
    convolve = importlib.import_module("shardtrain.ops.conv").convolve
    before = convolve._cache_size()
    assert before
    ops.explain_conv(x, kernel)
    assert convolve._cache_size() == before
