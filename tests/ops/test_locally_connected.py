"""Locally connected layers on every mesh against `lax.conv_general_dilated_local` on one device."""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, UserError, make_mesh, ops
from shardtrain.mesh import parse
from shardtrain.ops.window import Window

from .parity import (
    ALL_MESHES,
    LAYOUTS,
    MESHES,
    PIPES,
    REPEATS,
    around,
    by_stage,
    examples,
    named,
    numbers,
    on_stages,
    parity,
    reference_conv,
)
from .test_census import WORD, C, H, K, N, W, activations, facts, image, sent, total

DEFAULT = Layout()


@dataclass(frozen=True)
class Case:
    """One locally connected layer; its filters have the extents of its output."""

    x: tuple[int, ...]
    window: tuple[int, ...]
    features: int
    bias: bool = True
    strides: Any = 1
    padding: Any = "SAME"
    dilation: Any = 1
    mode: str | None = None
    layout: Layout = DEFAULT

    def args(self, *leading: int) -> list[Any]:
        kernel = (*self.window, self.x[-1], 1)
        shared = reference_conv(self.strides, self.padding, self.dilation)
        pixels = jax.eval_shape(shared, jnp.ones(self.x), jnp.ones(kernel)).shape[1:-1]
        taps = math.prod(self.window) * self.x[-1]
        bias = [numbers(*leading, *pixels, self.features)] if self.bias else []
        return [numbers(*leading, *self.x), numbers(*leading, *pixels, taps, self.features), *bias]

    def op(self, x: Any, kernel: Any, bias: Any = None) -> Any:
        return ops.local(
            x,
            kernel,
            bias,
            window=self.window,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            layout=self.layout,
            channel_mode=self.mode,
        )

    def reference(self, x: Any, kernel: Any, bias: Any = None) -> Any:
        rank = len(self.window)
        letters = "DHW"[3 - rank :]
        strides, dilation = ((v,) * rank if isinstance(v, int) else v for v in (self.strides, self.dilation))
        padding = self.padding
        if padding in REPEATS:
            x, padding = jnp.pad(x, around(self.window, dilation), mode=REPEATS[padding]), "VALID"
        elif padding == "SAME":  # lax forgets the dilation of the kernel here
            spans = [(k - 1) * d + 1 for k, d in zip(self.window, dilation, strict=True)]
            padding = lax.padtype_to_pads(x.shape[1:-1], spans, strides, "SAME")
        y = lax.conv_general_dilated_local(
            x,
            kernel,
            strides,
            padding,
            self.window,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )
        return y if bias is None else y + bias


@st.composite
def locally_connected(draw: Any, channel_shards: int = 1, ranks: tuple[int, ...] = (1, 2, 2, 2, 3)) -> Case:
    rank = draw(st.sampled_from(ranks))
    window = [draw(st.integers(1, 4 if rank < 3 else 2)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilation = [draw(st.sampled_from((1, 1, 2))) for _ in range(rank)]
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    padding: Any = draw(st.sampled_from(("SAME", "VALID", "pairs", "CIRCULAR", "REFLECT")))
    extents = [draw(st.integers(1, 9 if rank < 3 else 5)) for _ in range(rank)]
    if padding == "pairs":
        padding = tuple((draw(st.integers(0, s - 1)), draw(st.integers(0, s - 1))) for s in spans)
    if padding != "SAME":
        extents = [max(e, s) for e, s in zip(extents, spans, strict=True)]
    whole = channel_shards if draw(st.booleans()) else 1
    return Case(
        x=(draw(st.integers(1, 4)), *extents, draw(st.integers(1, 3)) * whole),
        window=tuple(window),
        features=draw(st.integers(1, 3)) * whole,
        bias=draw(st.booleans()),
        strides=tuple(strides),
        padding=padding,
        dilation=tuple(dilation),
        mode=draw(st.sampled_from((None, "gather", "scatter"))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def on_meshes(draw: Any, meshes: tuple[str, ...] = MESHES) -> tuple[str, Case]:
    mesh = draw(st.sampled_from(meshes))
    return mesh, draw(locally_connected(parse(mesh).get("channel", 1)))


@examples(5)
@given(on_meshes())
def test_any_locally_connected_layer_on_any_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(200)
@given(on_meshes(ALL_MESHES))
def test_many_locally_connected_layers_on_every_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(30)
@given(st.sampled_from(PIPES), locally_connected(2, ranks=(1, 2, 2)))
def test_many_on_stages_of_a_pipeline(mesh, case):
    parity(on_stages(case.op), by_stage(case.reference), case.args(2), mesh)


SPREAD = Layout(parameters=("data",))

NOTORIOUS = {
    "batch, rows and channels, all uneven or odd": (
        "data=2,height=2,channel=2",
        Case((3, 7, 5, 4), (3, 2), 6, strides=(1, 2)),
    ),
    "partial sums scattered, parameters spread": (
        "data=2,height=2,channel=2",
        Case((4, 6, 4, 4), (3, 3), 4, mode="scatter", layout=SPREAD),
    ),
    "uneven on two axes, dilated": (
        "height=4,width=2",
        Case((2, 9, 7, 2), (3, 2), 3, padding="VALID", dilation=2),
    ),
}
SELDOM = {
    "3-D": ("depth=2,height=2,width=2", Case((2, 3, 4, 5, 2), (2, 3, 2), 2)),
    "depth and channels": ("depth=2,width=2,channel=2", Case((2, 5, 3, 4, 2), (2, 1, 3), 4, strides=2)),
    "two hops": ("height=8", Case((2, 9, 2, 2), (7, 1), 2)),
    "fewer outputs than shards": ("width=8", Case((2, 9, 2), (4,), 3, strides=2, padding="VALID")),
    "fewer rows than shards": ("height=4", Case((2, 2, 3, 2), (3, 3), 2)),
    "ring": ("width=4", Case((2, 7, 2), (4,), 3, padding="CIRCULAR")),
    "mirror": ("width=4", Case((2, 7, 2), (5,), 3, padding="REFLECT", layout=SPREAD)),
    "causal": ("width=4", Case((2, 7, 2), (3,), 3, padding=((2, 0),))),
    "inputs gathered, parameters spread": (
        "data=2,height=2,channel=2",
        Case((4, 6, 4, 4), (3, 3), 4, mode="gather", layout=SPREAD),
    ),
    "outputs that cannot be cut": ("height=2,channel=2", Case((2, 5, 4, 4), (2, 2), 3)),
    "inputs that cannot be cut": ("height=2,channel=2", Case((2, 5, 4, 3), (2, 2), 4)),
    "window of one pixel": ("height=2,width=2", Case((2, 5, 4, 3), (1, 1), 4, strides=2)),
    "two axes on the rows": (
        "height=2,width=4",
        Case((2, 9, 3, 2), (3, 3), 2, layout=Layout(height=("height", "width"), width=())),
    ),
}


@pytest.mark.parametrize(("mesh", "case"), named(NOTORIOUS, SELDOM))
def test_notorious(mesh, case):
    parity(case.op, case.reference, case.args(), mesh)


def test_parameters_spread_over_an_axis_that_cuts_uneven_pixels():
    """3 pixels do not divide by 2; the taps must not be spread over the axis in their place."""
    case = Case((1, 3, 2), (1,), 1, layout=Layout(parameters=("width",)))
    parity(case.op, case.reference, case.args(), "width=2")


def test_without_a_mesh():
    case = Case((2, 7, 5, 3), (3, 2), 4, strides=2, dilation=(1, 2))
    args = jax.tree.map(jnp.asarray, case.args())
    np.testing.assert_allclose(case.op(*args), case.reference(*args), atol=1e-10)


def test_equal_filters_are_a_convolution():
    """The order of `taps`: channels slowest, then the window row by row."""
    x, kernel = jnp.asarray(numbers(2, 6, 5, 3)), jnp.asarray(numbers(3, 2, 3, 4))
    everywhere = jnp.broadcast_to(jnp.moveaxis(kernel, 2, 0).reshape(-1, 4), (6, 5, 18, 4))
    np.testing.assert_allclose(ops.local(x, everywhere, window=(3, 2)), ops.conv(x, kernel), atol=1e-10)


# --- what is sent, and what a device holds ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride"),
    [(3, 1), pytest.param(5, 2, marks=pytest.mark.slow), pytest.param(11, 1, marks=pytest.mark.slow)],
)
def test_filters_stay_with_their_pixels(size, stride):
    """Halo rows and sums over the batch; no filter moves, none is summed over pixels."""
    mesh = make_mesh("data=2,height=4")
    layout, (n, h, w, c) = Layout(), image(mesh)
    window = Window(H, size, stride, lax.padtype_to_pads((H,), (size,), (stride,), "SAME")[0], 4, ("height",))
    kernel, bias = (window.extent_out, W, size * 3 * C, K), (window.extent_out, W, K)
    home = layout.parameter(kernel, -1, mesh, 2), layout.parameter(bias, -1, mesh, 2)
    assert home == (P("height", None, None, None), P("height", None, None))
    op = functools.partial(ops.local, window=(size, 3), strides=(stride, 1))
    moved = sent(op, mesh, [(N, H, W, C), kernel, bias], [activations(mesh), *home])
    assert {row.kind for row in moved} == {"all-reduce", "collective-permute"}
    sums = {("all-reduce", ("data",), math.prod(shape) // 4 * WORD): 1 for shape in (kernel, bias)}
    assert facts(moved, "all-reduce") == sums
    assert {row.axes for row in moved if row.kind == "collective-permute"} == {("height",)}
    assert total(moved, "collective-permute") == 2 * sum(window.halo) * n * w * c * WORD  # there and back
    assert (h, sum(window.halo)) == (4, {3: 2, 5: 3, 11: 10}[size])


@pytest.mark.parametrize("mode", ["gather", "scatter"])
@pytest.mark.parametrize(
    "layout", [DEFAULT, pytest.param(SPREAD, marks=pytest.mark.slow)], ids=["whole", "spread"]
)
def test_channels(mode, layout):
    """As in a convolution; the filters' taps are cut where partial sums are scattered."""
    mesh = make_mesh("data=2,height=2,channel=2")
    n, h, w, c = image(mesh)
    kernel = (H, W, 3 * C, K)
    home = layout.parameter(kernel, -1 if mode == "gather" else -2, mesh, 2)
    op = functools.partial(ops.local, window=(3, 1), channel_mode=mode, layout=layout)
    moved = sent(op, mesh, [(N, H, W, C), kernel], [activations(mesh), home])
    inputs, outputs = n * (h + 2) * w * c * WORD, n * h * w * (K // 2) * WORD
    block = math.prod(kernel) // 4 * WORD
    if mode == "gather":
        expected = Counter(
            {("all-gather", ("channel",), inputs): 1, ("reduce-scatter", ("channel",), 2 * inputs): 1}
        )
    else:
        expected = Counter(
            {("all-gather", ("channel",), outputs): 1, ("reduce-scatter", ("channel",), 2 * outputs): 1}
        )
    if layout == SPREAD:
        expected += Counter(
            {("all-gather", ("data",), block // 2): 1, ("reduce-scatter", ("data",), block): 1}
        )
    else:
        expected += Counter({("all-reduce", ("data",), block): 1})
    expected += Counter({("collective-permute", ("height",), n * w * c * WORD): 4})
    assert facts(moved) == expected


def test_padding_is_not_gathered():
    """8 columns that nothing cuts travel as 8, as in `ops.conv`, which leaves their padding to the receiver."""
    mesh = make_mesh("height=2,channel=2")
    shapes = [(N, H, W, C), (H, W, 9 * C, K)]
    specs = [activations(mesh), P("height", None, None, "channel")]
    op = functools.partial(ops.local, window=(3, 3), channel_mode="gather")
    moved = sent(op, mesh, shapes, specs, backward=False)
    assert total(moved, "all-gather") == N * (H // 2 + 2) * W * C // 2 * WORD


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("height=2,width=2,channel=2", 8),
        pytest.param("data=2,height=4", 4, marks=pytest.mark.slow),
        pytest.param("width=4,channel=2", 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mode", ["gather", pytest.param("scatter", marks=pytest.mark.slow)])
def test_a_device_holds_its_pixels_filters_alone(text, cuts, mode):
    mesh, layout = make_mesh(text), Layout()
    kernel = (H, W, 9 * C, K)
    home = layout.parameter(kernel, -1 if mode == "gather" else -2, mesh, 2)
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float64, sharding=NamedSharding(mesh, where))
        for shape, where in (((N, H, W, C), activations(mesh)), (kernel, home))
    ]
    with jax.set_mesh(mesh):
        op = functools.partial(ops.local, window=(3, 3), channel_mode=mode)
        program = jax.jit(op).lower(*args).compile()
    held = program.memory_analysis().argument_size_in_bytes
    assert held == (N * H * W * C // 8 + math.prod(kernel) // cuts) * WORD


# --- what is refused --------------------------------------------------------------------------------------

X, FILTERS = jnp.ones((2, 6, 6, 4)), jnp.ones((6, 6, 36, 5))


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        (X[0], FILTERS, {}, r"takes inputs \(batch, 2 spatial, channels\)"),
        (X, FILTERS, {"window": (3,)}, "local: a window of 1 dimensions takes"),
        (X, FILTERS, {"padding": "VALID"}, r"needs a kernel of \(4, 4, 36, 5\), not \(6, 6, 36, 5\)"),
        (X, FILTERS, {"window": (3, 2)}, r"needs a kernel of \(6, 6, 24, 5\)"),
        (X, FILTERS, {"window": (7, 3), "padding": "VALID"}, "window of 7 rows does not fit the height of 6"),
        (X, FILTERS, {"padding": "SYMMETRIC"}, "padding='SYMMETRIC'"),
        (X, FILTERS, {"padding": ((1, 1),)}, "2 spatial dimensions need 2 entries"),
        (X, FILTERS, {"strides": 0}, "strides=0 for 2 spatial dimensions"),
        (X, FILTERS, {"window": (0, 3)}, r"window=\(0, 3\) for 2 spatial"),
    ],
)
def test_refused(x, kernel, options, message):
    options = {"window": (3, 3)} | options
    with pytest.raises(UserError, match=message):
        ops.local(x, kernel, **options)
    with jax.set_mesh(make_mesh("height=2,channel=2")), pytest.raises(UserError, match=message):
        ops.local(x, kernel, **options)


def test_axis_that_is_manual_outside():
    op = functools.partial(ops.local, window=(1, 1))
    with jax.set_mesh(make_mesh("data=2,height=4")):
        ends = {"in_specs": (P("data"), P()), "out_specs": P("data")}
        manual = jax.shard_map(op, axis_names={"data"}, **ends)
        with pytest.raises(
            UserError, match=r"cut on \['data'\] was called inside a shard_map that is manual"
        ):
            jax.jit(manual)(X, jnp.ones((6, 6, 4, 5)))
