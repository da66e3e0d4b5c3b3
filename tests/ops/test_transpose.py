"""Transposed convolution on every mesh against `flax.nnx.ConvTranspose` on one device."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from shardtrain import Layout, UserError, make_mesh, ops
from shardtrain.mesh import parse

from .parity import (
    ALL_MESHES,
    LAYOUTS,
    MESHES,
    PIPES,
    by_stage,
    examples,
    named,
    numbers,
    on_stages,
    parity,
)

DEFAULT = Layout()


@dataclass(frozen=True)
class Case:
    """One transposed convolution; the kernel as `transpose_kernel` wants it."""

    x: tuple[int, ...]
    window: tuple[int, ...]
    features: int
    bias: bool = True
    strides: Any = 1
    padding: Any = "SAME"
    dilation: Any = 1
    groups: int = 1
    transpose_kernel: bool = False
    mode: str | None = None
    layout: Layout = DEFAULT

    def args(self, *leading: int) -> list[Any]:
        ends = (self.x[-1] // self.groups, self.features)
        if self.transpose_kernel:
            ends = (self.features // self.groups, self.x[-1])
        kernel = numbers(*leading, *self.window, *ends)
        bias = [numbers(*leading, self.features)] if self.bias else []
        return [numbers(*leading, *self.x), kernel, *bias]

    def op(self, x: Any, kernel: Any, bias: Any = None) -> Any:
        return ops.conv_transpose(
            x,
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            transpose_kernel=self.transpose_kernel,
            layout=self.layout,
            channel_mode=self.mode,
        )

    def reference(self, x: Any, kernel: Any, bias: Any = None) -> Any:
        """A layer of Flax's for every group."""

        def layer(x: Any, kernel: Any) -> Any:
            ends = kernel.shape[-2:][::-1] if self.transpose_kernel else kernel.shape[-2:]
            flax = nnx.ConvTranspose(
                *ends,
                self.window,
                self.strides,
                padding=self.padding,
                kernel_dilation=self.dilation,
                transpose_kernel=self.transpose_kernel,
                use_bias=False,
                param_dtype=jnp.float64,
                kernel_init=nnx.initializers.zeros,
                rngs=nnx.Rngs(0),
            )
            flax.kernel[...] = kernel
            return flax(x)

        parts = [jnp.split(a, self.groups, axis=-1) for a in (x, kernel)]  # the last is inputs if transposed
        y = jnp.concatenate([layer(*part) for part in zip(*parts, strict=True)], axis=-1)
        return y if bias is None else y + bias


@st.composite
def transposed(draw: Any, channel_shards: int = 1, ranks: tuple[int, ...] = (1, 2, 2, 2, 3)) -> Case:
    rank = draw(st.sampled_from(ranks))
    window = [draw(st.integers(1, 5 if rank < 3 else 3)) for _ in range(rank)]
    strides = [draw(st.integers(1, 4 if rank < 3 else 2)) for _ in range(rank)]
    dilation = [draw(st.sampled_from((1, 1, 2))) for _ in range(rank)]
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    extents = [draw(st.integers(1, 9 if rank < 3 else 4)) for _ in range(rank)]
    padding: Any = draw(st.sampled_from(("SAME", "VALID", "CIRCULAR", "pairs")))
    if padding == "pairs":  # what is left of the dilated input is as long as the window
        padding = tuple((draw(st.integers(-1, k)), draw(st.integers(-1, k))) for k in spans)
        short = [k - sum(p) for k, p in zip(spans, padding, strict=True)]
        extents = [max(e, -(-(n - 1) // s) + 1, 3) for e, n, s in zip(extents, short, strides, strict=True)]
    elif padding == "CIRCULAR":  # a ring at least as long as the window
        extents = [max(e, -(-k // s)) for e, k, s in zip(extents, spans, strides, strict=True)]
    groups = draw(st.sampled_from((1, 1, 1, channel_shards, 2 * channel_shards)))
    whole = draw(st.booleans()) and groups == 1
    c_in, c_out = (groups * draw(st.integers(1, 3)) * (channel_shards if whole else 1) for _ in range(2))
    return Case(
        x=(draw(st.integers(1, 4)), *extents, c_in),
        window=tuple(window),
        features=c_out,
        bias=draw(st.booleans()),
        strides=tuple(strides),
        padding=padding,
        dilation=tuple(dilation),
        groups=groups,
        transpose_kernel=draw(st.booleans()),
        mode=draw(st.sampled_from((None, "gather", "scatter"))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def on_meshes(draw: Any, meshes: tuple[str, ...] = MESHES) -> tuple[str, Case]:
    mesh = draw(st.sampled_from(meshes))
    return mesh, draw(transposed(parse(mesh).get("channel", 1)))


@examples(8)
@given(on_meshes())
def test_any_transposed_convolution_on_any_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(300)
@given(on_meshes(ALL_MESHES))
def test_many_transposed_convolutions_on_every_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(40)
@given(st.sampled_from(PIPES), transposed(2, ranks=(1, 2, 2)))
def test_many_on_stages_of_a_pipeline(mesh, case):
    parity(on_stages(case.op), by_stage(case.reference), case.args(2), mesh)


SPREAD = Layout(parameters=("data",))

NOTORIOUS = {
    "stride 2, window 3, uneven on two axes": (
        "height=2,width=4",
        Case((2, 7, 9, 3), (3, 3), 4, strides=2),
    ),
    "stride 3, window 4, phases differ": ("height=4,width=2", Case((2, 7, 5, 2), (4, 4), 3, strides=3)),
    "ring, even window, mirrored": (
        "height=4",
        Case((2, 6, 5, 2), (4, 3), 3, strides=(2, 3), padding="CIRCULAR", transpose_kernel=True),
    ),
    "groups stay on their devices": (
        "height=2,channel=2",
        Case((2, 5, 3, 4), (3, 2), 8, strides=2, groups=4, transpose_kernel=True),
    ),
    "a group on four devices": ("channel=8", Case((2, 5, 8), (3,), 16, strides=2, groups=2)),
    "3-D, cropped on one side": (
        "depth=2,height=2,width=2",
        Case((2, 3, 4, 3, 2), (3, 2, 3), 2, strides=2, padding=((2, 1), (-1, 2), (0, 3))),
    ),
}
SELDOM = {
    "input cut, output gathered": (
        "data=2,height=2,channel=2",
        Case((3, 5, 4, 4), (3, 3), 6, strides=2, mode="gather", layout=SPREAD),
    ),
    "stride 2, window 2, as in a U-Net": (
        "height=2,width=2",
        Case((2, 5, 7, 3), (2, 2), 4, strides=2, padding="VALID"),
    ),
    "stride 4, window 2: rows of nothing but bias": (
        "width=4",
        Case((2, 6, 3), (2,), 2, strides=4, padding="VALID"),
    ),
    "fewer rows than shards": ("height=8", Case((2, 3, 2, 2), (3, 1), 2, strides=(2, 1))),
    "ring, even window": ("height=4,width=2", Case((2, 6, 5, 2), (4, 2), 3, strides=2, padding="CIRCULAR")),
    "ring of 3 rows on 8 shards": ("height=8", Case((2, 3, 2, 2), (5, 1), 2, strides=2, padding="CIRCULAR")),
    "dilated, mirrored": (
        "height=2,width=2",
        Case((2, 5, 6, 3), (3, 2), 4, strides=2, dilation=2, transpose_kernel=True),
    ),
    "partial sums scattered": (
        "data=2,height=2,channel=2",
        Case((3, 5, 4, 4), (3, 3), 6, strides=2, mode="scatter", layout=SPREAD),
    ),
}


@pytest.mark.parametrize(("mesh", "case"), named(NOTORIOUS, SELDOM))
def test_notorious(mesh, case):
    parity(case.op, case.reference, case.args(), mesh)


def test_causal():
    """Outputs see no later input: the same as that many rows of padding in front."""
    args, strides = [numbers(2, 7, 3), numbers(3, 3, 2)], 2
    causal = Case((2, 7, 3), (3,), 2, strides=strides, padding="CAUSAL")
    parity(causal.op, Case((2, 7, 3), (3,), 2, strides=strides, padding=((2, 0),)).reference, args, "width=4")


def test_shapes_of_a_mirrored_kernel():
    """Its last two dimensions are outputs and inputs, and are checked as such."""
    y = ops.conv_transpose(jnp.ones((2, 5, 4)), jnp.ones((3, 6, 4)), jnp.ones(6), transpose_kernel=True)
    assert y.shape == (2, 5, 6)


def test_without_a_mesh():
    case = Case((2, 5, 4, 4), (4, 3), 6, strides=(3, 2), groups=2, transpose_kernel=True)
    args = jax.tree.map(jnp.asarray, case.args())
    np.testing.assert_allclose(case.op(*args), case.reference(*args), atol=1e-10)


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_extents(padding, stride, window):
    """Both give `stride` rows of output for one of input; no array is made."""
    y = jax.eval_shape(
        lambda x, k: ops.conv_transpose(x, k, strides=stride, padding=padding),
        jnp.ones((1, 7, 1)),
        jnp.ones((window, 1, 1)),
    )
    assert y.shape == (1, 7 * stride, 1)


def test_the_transpose_of_a_convolution():
    """With `transpose_kernel` it is the map that takes a convolution's gradients to its input."""
    x, kernel, dy = map(jnp.asarray, (numbers(2, 8, 6, 3), numbers(3, 3, 3, 4), numbers(2, 4, 3, 4)))
    with jax.set_mesh(make_mesh("height=2,channel=2")):
        _, pull = jax.vjp(lambda x: ops.conv(x, kernel, strides=2, padding=1), x)
        pads = ops.torch_padding((3, 3), 1, output_padding=1)
        y = ops.conv_transpose(dy, kernel, strides=2, padding=pads, transpose_kernel=True)
    np.testing.assert_allclose(y, pull(dy)[0], atol=1e-10)


X, KERNEL = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 6))


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        (X[0], KERNEL, {}, r"takes inputs \(batch, 2 spatial, channels\), not \(6, 6, 4\)"),
        (X, KERNEL, {"groups": 2}, "conv_transpose: 4 input channels, .* groups=2 do not agree"),
        (
            X,
            jnp.ones((3, 3, 4, 5)),
            {"groups": 2, "transpose_kernel": True},
            "5 input channels do not divide",
        ),
        (X, KERNEL, {"transpose_kernel": True}, "do not agree"),
        (X, KERNEL, {"padding": "REFLECT"}, "padding='REFLECT' is not defined"),
        (X, KERNEL, {"padding": "SYMMETRIC"}, "padding='SYMMETRIC'"),
        (X, KERNEL, {"padding": "CAUSAL"}, "padding='CAUSAL'"),
        (X, KERNEL, {"padding": ((1, 1),)}, "2 spatial dimensions need 2 entries"),
        (X, jnp.ones((15, 1, 4, 6)), {"padding": "CIRCULAR"}, "wrap padding of .* which has 6 to give"),
        (X, KERNEL, {"padding": -2}, "window of 3 rows does not fit the height of 6"),
        (X, KERNEL, {"strides": 0}, "strides=0 for 2 spatial dimensions"),
        (X, KERNEL, {"dilation": (1, 1, 1)}, r"dilation=\(1, 1, 1\) for 2 spatial"),
    ],
)
def test_refused(x, kernel, options, message):
    with pytest.raises(UserError, match=message):
        ops.conv_transpose(x, kernel, **options)
    with jax.set_mesh(make_mesh("height=2,channel=2")), pytest.raises(UserError, match=message):
        ops.conv_transpose(x, kernel, **options)


def test_refused_by_torch_padding():
    with pytest.raises(UserError, match="2 spatial dimensions need 2 entries"):
        ops.torch_padding((3, 3), (1, 1, 1))
    with pytest.raises(UserError, match="dilation=0 for 2 spatial"):
        ops.torch_padding((3, 3), 1, dilation=0)
