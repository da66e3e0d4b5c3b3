"""What the operators send, byte for byte, in the compiled programs of 8 devices."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, make_mesh, ops
from shardtrain.layout import spec
from shardtrain.ops.window import Window
from shardtrain.plan.census import census

from .parity import reference_conv

WORD = 8  # bytes of a float64
N, H, W, C, K = 4, 16, 8, 4, 6  # batch, rows, columns, channels in and out
SPATIAL = {"depth", "height", "width"}


def cut(mesh, *names):
    """A PartitionSpec of those axes that the mesh has."""
    return spec([(name,) if name in mesh.shape else () for name in names])


def activations(mesh):
    return cut(mesh, "data", "height", "width", "channel")


def sent(f, mesh, shapes, specs, *, out=None, backward=True):
    """The census of `f`, or of `f` and all its gradients; arguments and gradients are sharded by `specs`."""
    places = [NamedSharding(mesh, s) for s in specs]
    args = [jax.ShapeDtypeStruct(s, jnp.float64, sharding=p) for s, p in zip(shapes, places, strict=True)]
    home = NamedSharding(mesh, out if out is not None else activations(mesh))

    def both(cotangent, *args):
        y, pull = jax.vjp(f, *args)
        return y, pull(cotangent)

    with jax.set_mesh(mesh):
        if backward:
            like = jax.eval_shape(f, *args)
            cotangent = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=home)
            program = jax.jit(both, out_shardings=(home, tuple(places))).lower(cotangent, *args)
        else:
            program = jax.jit(f, out_shardings=home).lower(*args)
    return census(program.compile(), mesh)


def total(rows, *kinds):
    return sum(row.bytes for row in rows if not kinds or row.kind in kinds)


def facts(rows, *kinds):
    """Kind, axes and payload of every array that moves."""
    return Counter((row.kind, row.axes, row.payload) for row in rows if not kinds or row.kind in kinds)


def image(mesh):
    """Batch, rows, columns and channels of one device's block."""
    return [
        e // mesh.shape.get(a, 1)
        for e, a in zip((N, H, W, C), ("data", "height", "width", "channel"), strict=True)
    ]


# --- halos ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["height=4", "height=2,width=2", "data=2,height=4"])
def test_halos_and_no_more_than_xla(text):
    """One row on each side, then one column that carries the corners; the backward pass sends them back."""
    mesh = make_mesh(text)
    n, h, w, c = image(mesh)
    row, column = n * w * c * WORD, n * (h + 2) * c * WORD
    halos = Counter({("collective-permute", ("height",), row): 2})
    if "width" in text:
        halos["collective-permute", ("width",), column] = 2
    kernel = 3 * 3 * C * K * WORD
    gradient = Counter({("all-reduce", mesh.axis_names, kernel): 1})

    programs = [((N, H, W, C), (3, 3, C, K)), (activations(mesh), P())]
    forward = sent(ops.conv, mesh, *programs, backward=False)
    both = sent(ops.conv, mesh, *programs)
    assert facts(forward) == halos
    assert facts(both) == halos + halos + gradient

    shards = mesh.size
    assert total(both) == 4 * row + ("width" in text) * 4 * column + 2 * (shards - 1) * kernel // shards
    for ours, backward in ((forward, False), (both, True)):
        theirs = sent(reference_conv(1, "SAME"), mesh, *programs, backward=backward)
        assert 0 < total(ours) <= total(theirs)


@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_of_outputs_travel_where_they_are_fewer(groups):
    """No more channels out than in: their halos come back, not those of the input, and no row is twice computed."""
    mesh, k = make_mesh("height=4"), 2 if groups == 1 else C
    row = N * W * WORD
    shapes, specs = [(N, H, W, C), (3, 3, C // groups, k)], [activations(mesh), P()]
    both = sent(functools.partial(ops.conv, groups=groups), mesh, shapes, specs)
    there, back = (("collective-permute", ("height",), row * channels) for channels in (C, k))
    assert facts(both, "collective-permute") == Counter([there, there, back, back])
    theirs = sent(reference_conv(1, "SAME", groups=groups), mesh, shapes, specs)
    assert 0 < total(both) <= total(theirs)


@pytest.mark.parametrize(
    ("rows", "size", "strides", "padding", "below", "above"),
    [
        (16, 11, 1, "SAME", 5, 5),  # shards of 2: hops of 2, 2 and 1
        (8, 11, 1, "SAME", 5, 5),  # shards of 1: 5 hops
        (16, 3, 2, "SAME", 0, 1),  # SAME pads at the end only
        (16, 2, 2, "VALID", 0, 0),
        (16, 1, 1, "SAME", 0, 0),
        (16, 5, 1, ((4, 0), (0, 0)), 4, 0),
    ],
)
def test_halos_of_several_hops(rows, size, strides, padding, below, above):
    """As many rows as the neediest shard reads of its neighbours, however many hold them."""
    mesh = make_mesh("height=8")
    op = functools.partial(ops.conv, strides=(strides, 1), padding=padding)
    moved = sent(op, mesh, [(N, rows, W, C), (size, 1, C, K)], [activations(mesh), P()], backward=False)
    assert {row.kind for row in moved} <= {"collective-permute"}
    assert total(moved) == (below + above) * N * W * C * WORD
    hops = math.ceil(below / (rows // 8)) + math.ceil(above / (rows // 8))
    assert sum(row.count for row in moved) == hops


def test_halos_of_pooling():
    mesh = make_mesh("data=2,height=2,width=2")
    n, h, w, c = image(mesh)
    pool = functools.partial(ops.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    moved = sent(pool, mesh, [(N, H, W, C)], [activations(mesh)])
    rows = {("height",): n * w * c * WORD, ("width",): n * (h + 1) * c * WORD}
    assert facts(moved) == {("collective-permute", a, size): 2 for a, size in rows.items()}  # there and back


def network(x, first, second, scale, layout):
    """16 rows become 14, 7, 7, 4 and 1; 8 columns become 6, 3, 3, 2 and 1."""
    x = ops.conv(x, first, padding="VALID", layout=layout)
    x = ops.batch_norm(x, scale, layout=layout)[0]
    x = ops.max_pool(jax.nn.relu(x), (2, 2), strides=(2, 2), padding="SAME", layout=layout)
    x = x + ops.conv(x, second, layout=layout)
    x = ops.avg_pool(ops.group_norm(x, 2), (3, 3), strides=(2, 2), padding="SAME", layout=layout)
    return ops.global_avg_pool(x, layout=layout)


@pytest.mark.parametrize(
    "text",
    [
        "height=4",
        "data=2,height=2,width=2",
        pytest.param("height=8", marks=pytest.mark.slow),
        pytest.param("height=2,channel=2", marks=pytest.mark.slow),
    ],
)
def test_an_uneven_network_sends_halos_only(text):
    """No pixel is gathered or moved to another block, forward or backward, though little divides."""
    mesh = make_mesh(text)
    f = functools.partial(network, layout=Layout(parameters=("data",)))
    shapes = [(N, H, W, C), (3, 3, C, 8), (3, 3, 8, 8), (8,)]
    moved = sent(f, mesh, shapes, [activations(mesh), P(), P(), P()], out=cut(mesh, "data", "channel"))
    for row in moved:
        if row.kind == "collective-permute":
            assert len(row.axes) == 1
            assert row.axes[0] in SPATIAL
        elif row.kind != "all-reduce":
            assert not SPATIAL & set(row.axes), row

    if set(mesh.shape) == {"height"}:
        shards = mesh.shape["height"]
        halos = [
            (Window(H, 3, 1, (0, 0), shards), W * C),
            (Window(14, 2, 2, (0, 0), shards), 6 * 8),
            (Window(7, 3, 1, (1, 1), shards), 3 * 8),
            (Window(7, 3, 2, (1, 1), shards), 3 * 8),
        ]
        there = sum(sum(window.halo) * values for window, values in halos) * N * WORD
        assert total(moved, "collective-permute") == 2 * there


# --- channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gather", "scatter"])
def test_channels(mode):
    """Gather: the inputs of a device with their halo rows, no padding. Scatter: its outputs, all channels of them."""
    mesh = make_mesh("data=2,height=2,channel=2")
    n, h, w, c = image(mesh)
    inputs, outputs = n * (h + 2) * w * c * WORD, n * h * w * (K // 2) * WORD
    kernel = P(None, None, None, "channel") if mode == "gather" else P(None, None, "channel")
    op = functools.partial(ops.conv, channel_mode=mode)
    shapes = [(N, H, W, C), (3, 3, C, K)]
    forward = sent(op, mesh, shapes, [activations(mesh), kernel], backward=False)
    both = sent(op, mesh, shapes, [activations(mesh), kernel])

    kinds = "all-gather", "reduce-scatter"
    gathered, scattered = ("all-gather", ("channel",), inputs), ("reduce-scatter", ("channel",), 2 * outputs)
    if mode == "gather":
        back = "reduce-scatter", ("channel",), 2 * inputs
        assert facts(forward, *kinds) == {gathered: 1}
        assert facts(both, *kinds) == {gathered: 1, back: 1}
        assert total(forward, *kinds) == inputs
    else:
        back = "all-gather", ("channel",), outputs
        assert facts(forward, *kinds) == {scattered: 1}
        assert facts(both, *kinds) == {scattered: 1, back: 1}
        assert total(forward, *kinds) == outputs
    assert total(both, *kinds) == 2 * total(forward, *kinds)

    halo = "collective-permute", ("height",), n * w * c * WORD
    gradient = "all-reduce", ("data", "height"), 9 * C * K // 2 * WORD
    assert facts(both, "collective-permute", "all-reduce") == {halo: 4, gradient: 1}


def test_outputs_that_cannot_be_cut():
    """3 output channels on 2 shards: partial sums are all-reduced, the gradient needs nothing."""
    mesh = make_mesh("height=2,channel=2")
    n, h, w, _ = image(mesh)
    shapes, specs = [(N, H, W, C), (1, 1, C, 3)], [activations(mesh), P(None, None, "channel")]
    moved = sent(ops.conv, mesh, shapes, specs, out=P(None, "height"))
    sums = "all-reduce", ("channel",), n * h * w * 3 * WORD
    gradient = "all-reduce", ("height",), C // 2 * 3 * WORD
    assert facts(moved) == {sums: 1, gradient: 1}


@pytest.mark.parametrize(
    ("text", "channels", "size", "strides"),
    [
        ("height=2,channel=2", (4, 8), 3, 1),
        ("height=2,channel=2", (8, 4), 3, 1),
        ("height=2,channel=2", (8, 8), 3, 1),
        ("channel=4", (8, 16), 3, 2),
        ("data=2,channel=4", (4, 24), 3, 2),
        ("height=2,channel=2", (8, 12), 1, 2),
    ],
)
def test_the_automatic_choice_is_the_cheaper(text, channels, size, strides):
    mesh = make_mesh(text)
    x, kernel = (N, H, W, channels[0]), (size, size, *channels)
    bill = {}
    for mode in ("gather", "scatter", None):
        op = functools.partial(ops.conv, strides=strides, channel_mode=mode)
        moved = sent(op, mesh, [x, kernel], [activations(mesh), P()], backward=False)
        bill[mode] = total(moved)
    assert bill["gather"] != bill["scatter"]
    assert bill[None] == min(bill.values())


# --- parameters -------------------------------------------------------------------------------------------


def test_one_sum_per_parameter():
    """Gradients cross data, height and width in one all-reduce, not one for each axis."""
    mesh = make_mesh("data=2,height=2,width=2")
    shapes, specs = [(N, H, W, C), (3, 3, C, K), (K,)], [activations(mesh), P(), P()]
    moved = sent(ops.conv, mesh, shapes, specs)
    axes = "data", "height", "width"
    sums = Counter({("all-reduce", axes, 9 * C * K * WORD): 1, ("all-reduce", axes, K * WORD): 1})
    assert facts(moved, "all-reduce") == sums
    assert {row.kind for row in moved} == {"all-reduce", "collective-permute"}


@pytest.mark.parametrize(
    ("text", "spread"),
    [("data=4,height=2", ("data",)), ("data=4,height=2", ("data", "height")), ("data=8", ("data",))],
)
def test_spread_parameters(text, spread):
    """The kernel is gathered and its gradient reduce-scattered; only shards are ever summed further."""
    mesh = make_mesh(text)
    layout = Layout(parameters=spread)
    kernel = (3, 3, C, 8)
    home = layout.parameter(kernel, -1, mesh)
    shards = math.prod(mesh.shape[a] for a in spread)
    assert [axes for axes in home if axes] == [spread if len(spread) > 1 else spread[0]]
    moved = sent(
        functools.partial(ops.conv, layout=layout),
        mesh,
        [(N * 2, H, W, C), kernel],
        [activations(mesh), home],
    )
    whole = math.prod(kernel) * WORD
    parameters = facts(moved, "all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    expected = Counter({("all-gather", spread, whole // shards): 1, ("reduce-scatter", spread, whole): 1})
    if mesh.size > shards:
        expected["all-reduce", ("height",), whole // shards] = 1
    assert parameters == expected
    assert total(moved, "all-gather", "reduce-scatter") == 2 * (shards - 1) * whole // shards


# --- norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_batch_norm_is_one_sum_each_way(ragged):
    mesh = make_mesh("data=2,height=2,width=2")

    def norm(x, scale, bias):
        real = jnp.arange(N) < N - 1 if ragged else None
        return ops.batch_norm(x, scale, bias, examples=real)[0]

    shapes, specs = [(N, H, W, C), (C,), (C,)], [activations(mesh), P(), P()]
    forward, both = (sent(norm, mesh, shapes, specs, backward=b) for b in (False, True))
    axes, moments = mesh.axis_names, 3 if ragged else 2
    statistics = Counter({("all-reduce", axes, moments * C * WORD): 1})
    assert facts(forward) == statistics
    assert facts(both) == statistics + Counter({("all-reduce", axes, 2 * C * WORD): 1})


def test_group_and_layer_norm_send_moments_only():
    """XLA's own partitioning: per axis the sums of values and squares, and as many again backward."""
    mesh = make_mesh("data=2,height=2,width=2")
    n, _, _, c = image(mesh)
    group = sent(lambda x: ops.group_norm(x, 2), mesh, [(N, H, W, C)], [activations(mesh)])
    assert {row.kind for row in group} == {"all-reduce"}
    for axis in ("height", "width"):
        payload = sum(row.payload * row.count for row in group if axis in row.axes)
        assert 0 < payload <= 2 * 2 * n * c * WORD

    mesh = make_mesh("data=2,height=2,channel=2")
    n, h, w, _ = image(mesh)
    for norm, moments in ((ops.layer_norm, 2), (ops.rms_norm, 1)):
        layer = sent(norm, mesh, [(N, H, W, C)], [activations(mesh)])
        assert {(row.kind, row.axes) for row in layer} == {("all-reduce", ("channel",))}
        assert sum(row.payload * row.count for row in layer) <= 2 * moments * n * h * w * WORD


@pytest.mark.parametrize("masked", [False, True])
def test_two_passes_are_two_sums(masked):
    """The mean (and with a mask the number of values) first, the variance then; one sum backward, as ever."""
    mesh = make_mesh("data=2,height=2,width=2")

    def norm(x):
        mask = jnp.arange(W)[:, None] % 2 > 0 if masked else None
        return ops.batch_norm(x, mask=mask, use_fast_variance=False)[0]

    forward, both = (sent(norm, mesh, [(N, H, W, C)], [activations(mesh)], backward=b) for b in (False, True))
    axes = mesh.axis_names
    sums = Counter([("all-reduce", axes, (2 if masked else 1) * C * WORD), ("all-reduce", axes, C * WORD)])
    assert facts(forward) == sums
    assert facts(both) == sums + Counter({("all-reduce", axes, 2 * C * WORD): 1})


# --- inside a pipeline ------------------------------------------------------------------------------------


def test_grouped_halos():
    """Under a manual outer axis the edges travel by all-gather: the same rows, to all of the axis."""
    mesh = make_mesh("pipe=2,height=4")

    def staged(x, kernel):
        def stage(x, kernel):
            return ops.conv(x[0], kernel[0])[None]

        ends = {"in_specs": (P("pipe"), P("pipe")), "out_specs": P("pipe")}
        return jax.shard_map(stage, axis_names={"pipe"}, check_vma=False, **ends)(x, kernel)

    home = P("pipe", None, "height")
    shapes = [(2, N, H, W, C), (2, 3, 3, C, K)]
    moved = sent(staged, mesh, shapes, [home, P("pipe")], out=home, backward=False)
    edges = 2 * N * W * C * WORD  # the first row and the last
    assert facts(moved) == {("all-gather", ("height",), edges): 1}
    assert total(moved) == 3 * edges
