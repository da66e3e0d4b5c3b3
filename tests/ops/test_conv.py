"""Convolution and linear maps on every mesh against `lax.conv_general_dilated` on one device."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, UserError, make_mesh, ops
from shardtrain.mesh import parse
from shardtrain.plan.census import census

from .parity import LAYOUTS, MESHES, examples, numbers, parity, place, reference_conv

CHANNEL_SHARDS = {mesh: parse(mesh).get("channel", 1) for mesh in MESHES}


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
            groups=self.groups,
            layout=self.layout,
            channel_mode=self.mode,
        )

    @property
    def reference(self) -> Any:
        return reference_conv(self.strides, self.padding, self.dilation, self.groups)


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
    kind = draw(st.sampled_from(("SAME", "VALID", "pairs")))
    padding: Any = kind
    if kind == "pairs":
        padding = tuple((draw(st.integers(-1, s)), draw(st.integers(-1, s))) for s in spans)
    if kind != "SAME":
        extra = [0] * rank if kind == "VALID" else [min(0, a) + min(0, b) for a, b in padding]
        total = [0] * rank if kind == "VALID" else [a + b for a, b in padding]
        extents = [max(e, s - t, 1 - low) for e, s, t, low in zip(extents, spans, total, extra, strict=True)]
    groups = draw(st.sampled_from((1, 1, 1, channel_shards, 2 * channel_shards)))
    per_group = [draw(st.integers(1, 3)) for _ in range(2)]
    whole = draw(st.booleans()) and groups == 1  # channels that the axis divides, or whatever comes
    c_in, c_out = (groups * n * (channel_shards if whole else 1) for n in per_group)
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
    )


@st.composite
def on_meshes(draw: Any) -> tuple[str, Case]:
    mesh = draw(st.sampled_from(MESHES))
    return mesh, draw(convolutions(CHANNEL_SHARDS[mesh]))


@examples(16)
@given(on_meshes())
def test_any_convolution_on_any_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(400)
@given(on_meshes())
def test_many_convolutions_on_any_mesh(drawn):
    mesh, case = drawn
    parity(case.op, case.reference, case.args(), mesh)


def case(x, kernel, *, bias=True, strides=1, padding="SAME", dilation=1, groups=1, mode=None, layout=None):
    rank = len(x) - 2
    many = [(v,) * rank if isinstance(v, int) else v for v in (strides, dilation)]
    return Case(x, kernel, bias, many[0], padding, many[1], groups, mode, layout or Layout())


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
    "1x1, stride 2, uneven": ("height=2,width=2", case((2, 7, 9, 3), (1, 1, 3, 4), strides=2)),
    "8 channel shards": ("channel=8", case((2, 5, 5, 8), (3, 3, 8, 16), mode="gather")),
    "8 channel shards, scatter": ("channel=8", case((2, 5, 5, 16), (3, 3, 16, 8), mode="scatter")),
    "3-D on depth and height": (
        "depth=2,height=2,channel=2",
        case((2, 5, 3, 4, 2), (3, 3, 3, 2, 4), strides=(2, 1, 1)),
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


@pytest.mark.parametrize(("mesh", "case"), NOTORIOUS.values(), ids=NOTORIOUS)
def test_notorious(mesh, case):
    parity(case.op, case.reference, case.args(), mesh)


@pytest.mark.parametrize("mode", ["gather", "scatter"])
def test_both_channel_modes_from_cut_arrays(mode):
    """Arrays that lie as the layout says, and no jit around the operator."""
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


# --- inside a pipeline: manual over `pipe`, other axes left to the islands -------------------------------


def manual_over_pipe(f, in_specs, out_specs):
    # jax 0.10 cannot lower the gradient of a nested shard_map whose outer one checks varying axes.
    return jax.shard_map(f, axis_names={"pipe"}, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_stages(op):
    """`op` on every stage's own arrays, which lie along a leading dimension of 2."""

    def staged(*args):
        def stage(*args):
            return op(*(a[0] for a in args))[None]

        return manual_over_pipe(stage, (P("pipe"),) * len(args), P("pipe"))(*args)

    return staged


@examples(6)
@given(
    st.sampled_from(("pipe=2,height=4", "pipe=2,height=2,width=2", "pipe=2,data=2,channel=2")),
    convolutions(2, ranks=(1, 2, 2)),
)
def test_halos_by_grouped_collectives(mesh, case):
    args = [numbers(2, *case.x), numbers(2, *case.kernel)]
    parity(on_stages(case.op), jax.vmap(case.reference), args, mesh)


TICKS = 5  # 4 microbatches through 2 stages


def first_stage(p, x, conv, max_pool, batch_norm):
    return max_pool(nnx.relu(conv(x, p["kernel"])), (3, 3), strides=(1, 1), padding="SAME") + x


def second_stage(p, x, conv, max_pool, batch_norm):
    y = batch_norm(x, p["scale"], None)[0]
    return jnp.tanh(conv(y, p["kernel"][:, :2]) - max_pool(x, (2, 1), strides=(1, 1), padding="SAME"))


def pipeline(parameters, batches, stages):
    """GPipe over 2 stages; every device runs the branch of its own stage, tick by tick."""
    me, count = lax.axis_index("pipe"), batches.shape[0]
    own = jax.tree.map(lambda p: p[0], parameters)

    def tick(carry, t):
        arrived, out = carry
        x = jnp.where(me == 0, batches[jnp.clip(t, 0, count - 1)], arrived)
        y = lax.switch(me, stages, own, x)
        last = out.at[jnp.clip(t - 1, 0, count - 1)].set(y)
        return (lax.ppermute(y, "pipe", [(0, 1)]), jnp.where((me == 1) & (t >= 1), last, out)), None

    (_, out), _ = lax.scan(tick, (jnp.zeros_like(batches[0]), jnp.zeros_like(batches)), jnp.arange(TICKS))
    return lax.psum(jnp.where(me == 1, out, 0), "pipe")


def plain_batch_norm(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * scale, None


STAGES = (first_stage, second_stage)


@pytest.mark.parametrize(
    "spec", ["pipe=2,height=4", pytest.param("pipe=2,data=2,height=2", marks=pytest.mark.slow)]
)
def test_different_stages_of_a_pipeline(spec):
    """Operators in branches that only some devices take: no deadlock, and exact."""
    mesh = make_mesh(spec)
    rows = 7 if "height=4" in spec else 8  # uneven on 4
    batches = numbers(TICKS - 1, 4, rows, 6, 5)
    parameters = {"kernel": numbers(2, 3, 3, 5, 5) * 0.3, "scale": numbers(2, 5)}
    branches = [
        functools.partial(f, conv=ops.conv, max_pool=ops.max_pool, batch_norm=ops.batch_norm) for f in STAGES
    ]

    def piped(parameters, batches):
        run = functools.partial(pipeline, stages=branches)
        return manual_over_pipe(run, (P("pipe"), P()), P())(parameters, batches)

    def reference(parameters, batches):
        plain = reference_conv(1, "SAME"), nnx.max_pool, plain_batch_norm
        for i, stage in enumerate(STAGES):
            own = jax.tree.map(lambda p, i=i: p[i], parameters)
            batches = jax.vmap(lambda x, own=own, stage=stage: stage(own, x, *plain))(batches)
        return batches

    cut = P(None, "data" if "data" in spec else None, "height")
    placed = jax.tree.map(lambda p: place(p, mesh, P("pipe")), parameters), place(batches, mesh, cut)
    compiled = parity(piped, reference, (parameters, batches), mesh, placed=placed)
    permutes = [c for c in census(compiled, mesh) if c.kind == "collective-permute"]
    assert {c.axes for c in permutes} == {("pipe",)}
    assert sum(c.count for c in permutes) == 2 * TICKS  # there, and the gradients back


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
        (X, KERNEL, {"padding": "REFLECT"}, "padding='REFLECT'.*use 'SAME'"),
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


def test_groups_that_the_channel_axis_cannot_cut():
    with jax.set_mesh(make_mesh("channel=8")):
        with pytest.raises(UserError, match="groups=2 with 8 -> 8 channels cannot be cut 8-fold"):
            ops.conv(jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 4, 8)), groups=2)
        with pytest.raises(UserError, match="groups=2 with 8 -> 6 channels cannot be cut"):
            ops.conv(jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 4, 6)), groups=2)


def test_four_spatial_dimensions():
    with pytest.raises(UserError, match="4 spatial dimensions"):
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
