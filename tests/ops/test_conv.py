"""Convolution and linear maps on every mesh against `lax.conv_general_dilated` on one device."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, UserError, make_mesh, ops
from shardtrain.kernels.conv import ALGORITHMS
from shardtrain.mesh import parse

from .parity import (
    ALL_MESHES,
    LAYOUTS,
    MESHES,
    examples,
    named,
    numbers,
    parity,
    place,
    reference_conv,
)


@dataclass(frozen=True)
class Case:
    """One convolution, small enough to compile in half a second."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: bool
    strides: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    mode: str | None
    layout: Layout
    input_dilation: tuple[int, ...] | int = 1
    algorithm: str = "direct"

    def args(self) -> list[Any]:
        return [numbers(*self.x), numbers(*self.kernel), numbers(self.kernel[-1]) if self.bias else None]

    def op(self, x: Any, kernel: Any, bias: Any = None) -> Any:
        return ops.conv(
            x,
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            input_dilation=self.input_dilation,
            groups=self.groups,
            layout=self.layout,
            channel_mode=self.mode,
            algorithm=self.algorithm,
        )

    @property
    def reference(self) -> Any:
        return reference_conv(self.strides, self.padding, self.dilation, self.groups, self.input_dilation)


@st.composite
def convolutions(draw: Any, channel_shards: int = 1, ranks: tuple[int, ...] = (1, 2, 2, 2, 3)) -> Case:
    """Convolutions that are defined: the window fits the padded input, the groups fit the channels."""
    rank = draw(st.sampled_from(ranks))
    size = st.sampled_from((1, 2, 3, 5, 7, 11) if rank < 3 else (1, 2, 3))
    kernel = [draw(size) for _ in range(rank)]
    strides = [draw(st.integers(1, 4)) for _ in range(rank)]
    dilation = [draw(st.sampled_from((1, 1, 2))) for _ in range(rank)]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    extents = [draw(st.integers(1, 13 if rank < 3 else 6)) for _ in range(rank)]
    kind = draw(st.sampled_from(("SAME", "VALID", "pairs", "CIRCULAR", "REFLECT")))
    padding: Any = kind
    if kind == "pairs":
        padding = tuple((draw(st.integers(-1, s)), draw(st.integers(-1, s))) for s in spans)
    if kind in ("CIRCULAR", "REFLECT"):  # padding repeats no row twice
        extents = [max(e, s // 2 + (kind == "REFLECT")) for e, s in zip(extents, spans, strict=True)]
    elif kind != "SAME":
        extra = [0] * rank if kind == "VALID" else [min(0, a) + min(0, b) for a, b in padding]
        total = [0] * rank if kind == "VALID" else [a + b for a, b in padding]
        extents = [max(e, s - t, 1 - low) for e, s, t, low in zip(extents, spans, total, extra, strict=True)]
    input_dilation = (1,) * rank
    if kind in ("SAME", "VALID", "pairs") and draw(st.booleans()):
        input_dilation = tuple(draw(st.sampled_from((1, 2, 3))) for _ in range(rank))
    even = channel_shards, 2 * channel_shards, max(1, channel_shards // 2)
    groups = draw(st.sampled_from((1, 1, 1, *even, 3, 5)))
    # Channels that the axis divides, or whatever comes.
    c_in, c_out = (groups * draw(st.sampled_from((1, 2, 3, channel_shards))) for _ in range(2))
    return Case(
        x=(draw(st.integers(1, 4)), *extents, c_in),
        kernel=(*kernel, c_in // groups, c_out),
        bias=draw(st.booleans()),
        strides=tuple(strides),
        padding=padding,
        dilation=tuple(dilation),
        groups=groups,
        mode=draw(st.sampled_from((None, "gather", "scatter"))),
        layout=draw(st.sampled_from(LAYOUTS)),
        input_dilation=input_dilation,
        algorithm=draw(st.sampled_from(("direct", "direct", *ALGORITHMS)))
        if max(strides) == 1 and max(kernel) <= 7
        else draw(st.sampled_from(("direct", "im2col"))),
    )


@st.composite
def on_meshes(draw: Any, meshes: tuple[str, ...] = MESHES) -> tuple[str, Case]:
    mesh = draw(st.sampled_from(meshes))
    return mesh, draw(convolutions(parse(mesh).get("channel", 1)))


@examples(16)
@given(on_meshes())
def test_any_convolution_on_any_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(400)
@given(on_meshes(ALL_MESHES))
def test_many_convolutions_on_every_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


def case(
    x, kernel, *, bias=True, strides=1, padding="SAME", dilation=1, groups=1, mode=None, layout=None, **more
):
    rank = len(x) - 2
    many = [(v,) * rank if isinstance(v, int) else v for v in (strides, dilation)]
    return Case(x, kernel, bias, many[0], padding, many[1], groups, mode, layout or Layout(), **more)


NOTORIOUS = {
    "7 rows on 2 shards": ("height=2", case((2, 7, 6, 3), (3, 3, 3, 4))),
    "7 rows on 2 shards, stride 2": ("height=2,width=2", case((2, 7, 7, 3), (3, 3, 3, 4), strides=2)),
    "2 rows on 4 shards": ("height=4,width=2", case((2, 2, 5, 3), (3, 3, 3, 4))),
    "1 row on 8 shards": ("height=8", case((1, 1, 4, 2), (3, 3, 2, 2))),
    "halo of 5 rows, shards of 1": ("height=8", case((2, 8, 3, 2), (11, 1, 2, 3))),
    "halo of 10 rows, shards of 2": ("width=8", case((2, 13, 2), (11, 2, 3), dilation=2)),
    "one output row for 8 shards": ("height=8", case((2, 11, 3, 2), (11, 3, 2, 2), padding="VALID")),
    "shards without outputs, stride 4": (
        "height=8",
        case((2, 9, 3, 2), (3, 3, 2, 2), strides=(4, 1), padding="VALID"),
    ),
    "outputs drift over the blocks": (
        "width=4",
        case((2, 13, 2), (5, 2, 3), strides=3, padding=((0, 7),)),
    ),
    "padding wider than the window": (
        "height=4",
        case((2, 6, 3, 2), (3, 1, 2, 2), padding=((5, 9), (0, 0))),
    ),
    "cropped by negative padding": (
        "height=4,width=2",
        case((2, 9, 9, 2), (3, 3, 2, 2), padding=((-2, 1), (1, -3))),
    ),
    "even window, SAME, stride 2": ("height=2,width=2", case((2, 9, 9, 2), (2, 4, 2, 2), strides=2)),
    "batch of 3 on 2, channels 3 on 2": (
        "data=2,height=2,channel=2",
        case((3, 7, 5, 3), (3, 3, 3, 5)),
    ),
    "input cut, output not": (
        "data=2,height=2,channel=2",
        case((2, 5, 5, 4), (3, 3, 4, 3), strides=2, layout=Layout(parameters=("data",))),
    ),
    "output cut, input not": (
        "data=2,height=2,channel=2",
        case((2, 5, 5, 3), (3, 3, 3, 4), mode="scatter"),
    ),
    "depthwise": ("height=2,channel=2", case((2, 7, 5, 4), (3, 3, 1, 8), groups=4)),
    "3 groups on 2 devices": ("height=2,channel=2", case((2, 5, 4, 6), (3, 3, 2, 6), groups=3)),
    "6 groups on 4 devices, parameters spread": (
        "data=2,channel=4",
        case((2, 5, 4, 12), (3, 3, 2, 24), groups=6, layout=Layout(parameters=("data",))),
    ),
    "groups with outputs that cannot be cut": ("channel=4", case((2, 5, 8), (3, 4, 6), groups=2)),
    "groups with inputs that cannot be cut": ("channel=4", case((2, 5, 6), (3, 3, 8), groups=2)),
    "by Winograd's algorithm": (
        "data=2,height=2,channel=2",
        case((2, 9, 6, 4), (3, 3, 4, 2), algorithm="winograd", layout=Layout(parameters=("data",))),
    ),
    "by Fourier transforms": ("height=4,width=2", case((2, 9, 6, 2), (5, 4, 2, 3), algorithm="fft")),
    "rows cut by columns' axis first": (
        "height=2,width=4",
        case((2, 17, 3, 2), (5, 3, 2, 3), layout=Layout(height=("width", "height"), width=())),
    ),
    "1x1, stride 2, uneven": ("height=2,width=2", case((2, 7, 9, 3), (1, 1, 3, 4), strides=2)),
    "8 channel shards": ("channel=8", case((2, 5, 5, 8), (3, 3, 8, 16), mode="gather")),
    "8 channel shards, scatter": ("channel=8", case((2, 5, 5, 16), (3, 3, 16, 8), mode="scatter")),
    "3-D on depth and height": (
        "depth=2,height=2,channel=2",
        case((2, 5, 3, 4, 2), (3, 3, 3, 2, 4), strides=(2, 1, 1)),
    ),
    "ring of 7 rows on 4 shards, 5 columns on 2": (
        "height=4,width=2",
        case((2, 7, 5, 2), (3, 4, 2, 3), padding="CIRCULAR"),
    ),
    "mirrored at both borders, uneven": (
        "height=4,width=2",
        case((2, 7, 5, 2), (5, 4, 2, 3), padding="REFLECT"),
    ),
    "input dilated, shards begin in other phases": (
        "height=4,width=2",
        case((2, 7, 5, 2), (3, 2, 2, 3), strides=2, input_dilation=(3, 2)),
    ),
    "2 devices share a group, ring of pixels": (
        "height=2,channel=4",
        case((2, 5, 3, 8), (3, 3, 4, 4), groups=2, padding="CIRCULAR", layout=Layout(parameters=("height",))),
    ),
    "parameters spread over all data axes": (
        "data=2,height=2,width=2",
        case((2, 6, 6, 8), (3, 3, 8, 8), layout=Layout(parameters=("data", "height", "width"))),
    ),
    "parameters spread, scatter": (
        "data=2,height=2,channel=2",
        case((2, 6, 6, 4), (3, 3, 4, 4), mode="scatter", layout=Layout(parameters=("data",))),
    ),
}
SELDOM = {
    "ring once around, shards of 1": ("height=8", case((1, 5, 3, 2), (11, 1, 2, 2), padding="CIRCULAR")),
    "ring, stride 2, dilated": (
        "width=4",
        case((2, 10, 2), (4, 2, 3), strides=2, dilation=2, padding="CIRCULAR"),
    ),
    "mirror reaches two shards away": ("width=4", case((2, 7, 2), (12, 2, 2), padding="REFLECT")),
    "4 devices share a group": ("channel=8", case((2, 5, 3, 8), (3, 3, 4, 16), groups=2, strides=2)),
}


@pytest.mark.parametrize(("mesh", "case"), named(NOTORIOUS, SELDOM))
def test_notorious(mesh, case):
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.parametrize("mode", ["gather", "scatter"])
def test_both_channel_modes_from_cut_arrays(mode):
    """Arrays sharded as the layout says, and no jit around the operator."""
    mesh = make_mesh("data=2,height=2,channel=2")
    x, kernel = numbers(4, 8, 6, 4), numbers(3, 3, 4, 6)
    expected = reference_conv(2, "SAME")(x, kernel)
    spec = Layout().activation(x.shape, mesh)
    cut = P(None, None, None, "channel") if mode == "gather" else P(None, None, "channel")
    with jax.set_mesh(mesh):
        y = ops.conv(place(x, mesh, spec), place(kernel, mesh, cut), strides=2, channel_mode=mode)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, Layout().activation(y.shape, mesh)), y.ndim)
    np.testing.assert_allclose(y, expected, atol=1e-10)


def test_causal_and_numeric_padding():
    x, kernel = numbers(2, 9, 3), numbers(4, 3, 2)
    causal = functools.partial(ops.conv, padding="CAUSAL")
    parity(causal, reference_conv(1, ((3, 0),)), [x, kernel], "width=4")
    parity(functools.partial(ops.conv, padding=2), reference_conv(1, ((2, 2),)), [x, kernel], "width=4")


def test_without_a_mesh():
    given_case = case((2, 7, 5, 4), (3, 3, 2, 6), strides=2, groups=2)
    args = jax.tree.map(jnp.asarray, given_case.args())
    np.testing.assert_allclose(given_case.op(*args), given_case.reference(*args), atol=1e-10)


@examples(6)
@given(
    st.sampled_from(("data=2,height=2,channel=2", "channel=8", "data=8", "height=2,channel=2")),
    st.integers(0, 2),
    st.sampled_from(((8, 16), (16, 8), (3, 8), (8, 3), (5, 7))),
    st.booleans(),
    st.sampled_from((None, "gather", "scatter")),
    st.sampled_from(LAYOUTS),
)
def test_linear(mesh, rank, channels, bias, mode, layout):
    args = [numbers(3, *(5, 4)[:rank], channels[0]), numbers(*channels)]
    op = functools.partial(ops.linear, channel_mode=mode, layout=layout)
    if bias:
        parity(op, lambda x, w, b: x @ w + b, [*args, numbers(channels[1])], mesh)
    else:
        parity(op, lambda x, w: x @ w, args, mesh)


IDLE = Layout(parameters=("height",))
ROW = (3, 4, 8)  # one spatial dimension: `height` cuts nothing of it

ON_IDLE = {
    "linear": (lambda x, k: ops.linear(x, k, layout=IDLE), lambda x, k: x @ k, [(3, 8), (8, 6)]),
    "convolution": (
        lambda x, k: ops.conv(x, k, layout=IDLE),
        reference_conv(1, "SAME"),
        [ROW, (3, 8, 6)],
    ),
    "locally connected": (
        lambda x, k: ops.local(x, k, window=(1,), layout=IDLE),
        lambda x, k: jnp.einsum("nwc,wco->nwo", x, k),
        [ROW, (4, 8, 6)],
    ),
    "layer norm": (
        lambda x, s: ops.layer_norm(x, s, layout=IDLE),
        lambda x, s: (x - x.mean(2, keepdims=True)) / jnp.sqrt(x.var(2, keepdims=True) + 1e-6) * s,
        [ROW, (8,)],
    ),
    "embedding": (
        lambda t: ops.embed(jnp.arange(6).reshape(2, 3), t, layout=IDLE),
        lambda t: t[:6].reshape(2, 3, 8),
        [(7, 8)],
    ),
}


@pytest.mark.parametrize(("op", "reference", "shapes"), ON_IDLE.values(), ids=ON_IDLE)
def test_parameters_spread_over_an_idle_axis(op, reference, shapes):
    """As in the head of a network whose images are cut by height: rows are gone, parameters still spread."""
    parity(op, reference, [numbers(*shape) for shape in shapes], "height=2")


# --- what is refused --------------------------------------------------------------------------------------


X, KERNEL = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 4))


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        (X[0], KERNEL, {}, r"takes inputs \(batch, 2 spatial, channels\), not \(6, 6, 4\)"),
        (X, jnp.ones((3, 3, 3, 4)), {}, "4 input channels, a kernel of shape .* do not agree"),
        (X, jnp.ones((3, 3, 2, 5)), {"groups": 2}, "groups=2 do not agree"),
        (X, KERNEL, {"groups": 2}, "groups=2 do not agree"),
        (X, jnp.ones((7, 1, 4, 4)), {"padding": "VALID"}, "window of 7 rows does not fit the height of 6"),
        (X, KERNEL, {"padding": "VALID", "dilation": 3}, "window of 7 rows does not fit"),
        (X, KERNEL, {"padding": "SYMMETRIC"}, "padding='SYMMETRIC'.*use 'SAME'"),
        (X, jnp.ones((13, 1, 4, 4)), {"padding": "REFLECT"}, "extent of 6, which has 5 to give"),
        (X, jnp.ones((14, 1, 4, 4)), {"padding": "CIRCULAR"}, "extent of 6, which has 6 to give"),
        (X, KERNEL, {"padding": "CIRCULAR", "input_dilation": 2}, "use conv_transpose for a ring"),
        (X, KERNEL, {"padding": "CAUSAL"}, "padding='CAUSAL'"),
        (X, KERNEL, {"padding": ((1, 1),)}, "2 spatial dimensions need 2 entries"),
        (X, KERNEL, {"strides": 0}, "strides=0 for 2 spatial dimensions"),
        (X, KERNEL, {"strides": (1, 2, 1)}, r"strides=\(1, 2, 1\) for 2 spatial"),
        (X, KERNEL, {"dilation": (1,)}, r"dilation=\(1,\) for 2 spatial"),
    ],
)
def test_refused(x, kernel, options, message):
    with pytest.raises(UserError, match=message):
        ops.conv(x, kernel, **options)
    with jax.set_mesh(make_mesh("height=2,channel=2")), pytest.raises(UserError, match=message):
        ops.conv(x, kernel, **options)


def test_four_spatial_dimensions():
    with pytest.raises(UserError, match="an array of 6 dimensions"):
        ops.conv(jnp.ones((1, 2, 2, 2, 2, 1)), jnp.ones((1, 1, 1, 1, 1, 1)))


def test_mesh_with_explicit_axes():
    mesh = Mesh(np.array(jax.devices()[:2]), ("height",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"Explicit axes .*'height'.*make_mesh"):
        ops.conv(X, KERNEL)


def test_axis_that_is_manual_outside():
    def outer(x):
        return ops.conv(x, KERNEL)

    with jax.set_mesh(make_mesh("data=2,height=4")):
        manual = jax.shard_map(outer, axis_names={"data"}, in_specs=P("data"), out_specs=P("data"))
        with pytest.raises(
            UserError, match=r"cut on \['data'\] was called inside a shard_map that is manual"
        ):
            jax.jit(manual)(X)


# --- the bug that islands are for -------------------------------------------------------------------------


def test_xla_still_wrong():
    """XLA's partitioner doubles a convolution cut on height and output channels; ours is exact there."""
    mesh = make_mesh("height=2,channel=2")
    x, kernel = numbers(4, 32, 32, 8), numbers(3, 3, 8, 16)
    reference = reference_conv(1, "SAME")
    expected = reference(x, kernel)
    placed = place(x, mesh, P(None, "height")), place(kernel, mesh, P(None, None, None, "channel"))
    out = NamedSharding(mesh, P(None, "height", None, "channel"))
    plain = jax.jit(reference, out_shardings=out)(*placed)
    with jax.set_mesh(mesh):
        ours = jax.jit(ops.conv, out_shardings=out)(*placed)
    np.testing.assert_allclose(ours, expected, atol=1e-10)
    parity(ops.conv, reference, [x, kernel], mesh)
    assert not np.allclose(plain, expected, atol=1e-3), "upstream fixed: tell the README"
    np.testing.assert_allclose(plain, 2 * expected, atol=1e-10)  # the way in which it is wrong
