"""The summary predicts from a trace what the compiled step sends, byte for byte."""

import io
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from rich.console import Console

import shardtrain as st
from shardtrain import Layout, UserError, make_mesh, models, nn
from shardtrain.layout import axes_of
from shardtrain.nn import partition, transitions
from shardtrain.plan import census, summary
from shardtrain.plan.summary import lines

LATE = {"batch": ("data", "height"), "height": ()}
LATE_LENET = dict.fromkeys(("conv2", "pool2", "flatten", "linear*", "head"), LATE)


def float64(make, *args, **options):
    return make(*args, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


class Odd(nnx.Module):
    """What does not divide: channels that are joined, rows with filters of their own; and a loop and a branch."""

    def __init__(self, *, param_dtype, rngs):
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        self.left, self.right = nn.Conv(1, 6, (3, 3), **kinds), nn.Conv(1, 2, (3, 3), **kinds)
        self.join = nn.Concat()
        self.local = nn.LocallyConnected(8, 4, (8, 8), (4, 1), padding="VALID", **kinds)  # 5 rows
        self.again, self.flatten = nn.Conv(4, 4, (3, 3), **kinds), nn.Flatten()
        self.head = nn.Linear(160, 4, **kinds)

    def __call__(self, x):
        x = self.local(self.join(self.left(x), self.right(jnp.sin(x))))
        x = jax.lax.cond(jax.device_count() > 0, jnp.sin, jnp.cos, x)
        return self.head(self.flatten(self.again(x)))


CASES = {
    "odd numbers": (Odd, {}, "height=2,channel=4", (4, 8, 8, 1), {}, ()),
    "lenet": (models.LeNet, {"image": (16, 16, 1)}, "data=2,height=2,channel=2", (8, 16, 16, 1), {}, ()),
    "lenet, batch cut late": (
        models.LeNet,
        {"image": (16, 16, 1)},
        "data=2,height=4",
        (8, 16, 16, 1),
        LATE_LENET,
        (),
    ),
    "resnet, spread": (
        models.ResNet,
        {"depth": 8, "classes": 10, "channels": 1},
        "data=4,height=2",
        (8, 16, 16, 1),
        {},
        ("data",),
    ),
    "resnet, batch cut in the middle of the residual sums": (
        models.ResNet,
        {"depth": 8, "classes": 10, "channels": 1},
        "data=2,height=4",
        (8, 16, 16, 1),
        {"blocks.1.*": LATE, "blocks.2.conv2": LATE, "head": LATE},
        (),
    ),
    "unet, its lowest layers cut otherwise, odd extents": (
        models.UNet,
        {"classes": 4, "rank": 2, "features": (4, 4, 4, 8)},
        "height=2,width=2",
        (4, 12, 12, 1),
        {"down.3.*": {"batch": ("height", "width"), "height": (), "width": ()}},
        (),
    ),
    "local": (models.LocalNet, {"image": (8, 8, 1)}, "height=2,width=2,channel=2", (8, 8, 8, 1), {}, ()),
    "unet": (
        models.UNet,
        {"classes": 4, "rank": 3, "features": (8, 16)},
        "depth=2,height=2,channel=2",
        (2, 8, 8, 8, 1),
        {},
        (),
    ),
}


def compiled_step(model, mesh, shape, table, parameters):
    """The compiled forward and backward pass from arrays that lie as the layouts say."""
    default = Layout(parameters=parameters)
    partition.assign(model, mesh, default, table)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    specs = partition.parameter_spec(model, mesh, default)

    def struct(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float64, sharding=NamedSharding(mesh, spec))

    x = struct(shape, default.activation(shape, mesh))
    flat = [(path, v.replace(struct(v.shape, specs[path]))) for path, v in nnx.to_flat_state(params)]
    params = nnx.from_flat_state(flat)

    def step(params, x, cotangent):
        def forward(params):
            merged = nnx.merge(graph, params, rest, copy=True)
            with transitions.resharded(merged, default, x):
                return merged(x)

        y, pull = jax.vjp(forward, params)
        return y, pull(cotangent)[0]

    with jax.set_mesh(mesh):
        out = jax.eval_shape(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x)
        last = partition.leaves(model)["head"].layout
        cotangent = struct(out.shape, last.activation(out.shape, mesh))
        places = jax.tree.map(lambda s: s.sharding, (cotangent, params))
        return jax.jit(step, out_shardings=places).lower(params, x, cotangent).compile()


def by_kind_and_axes(rows):
    total = Counter()
    for row in rows:
        total[row.kind, row.axes] += row.bytes
    return total


SELDOM = ("unet, its lowest layers cut otherwise, odd extents", "resnet, spread", "unet")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=name, marks=[pytest.mark.slow] if name in SELDOM else [])
        for name, c in CASES.items()
    ],
)
def test_the_trace_foretells_every_byte(case):
    make, options, mesh, shape, table, parameters = case
    mesh, model = make_mesh(mesh), float64(make, **options)
    foretold = lines(
        model, mesh, jax.ShapeDtypeStruct(shape, jnp.float64), layout=table, parameters=parameters
    )
    sent = census.census(compiled_step(model, mesh, shape, table, parameters), mesh)
    assert by_kind_and_axes(s for line in foretold for s in line.sent) == by_kind_and_axes(sent)
    assert all(line.path for line in foretold), "some bytes belong to no layer"

    specs = partition.parameter_spec(model, mesh, Layout(parameters=parameters))
    kept = sum(
        v.get_value().addressable_shards[0].data.nbytes
        if not any(map(axes_of, specs[p]))
        else jax.device_put(v.get_value(), NamedSharding(mesh, specs[p])).addressable_shards[0].data.nbytes
        for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    )
    assert sum(line.parameters for line in foretold) == kept


def test_a_change_of_layout_moves_the_closed_form():
    """(n-1)/n of a device's block of conv2's input, there and back; nothing else is moved for it."""
    mesh = make_mesh("data=2,height=4")
    model = float64(models.LeNet, image=(16, 16, 1))
    found = {
        line.path: line
        for line in lines(model, mesh, jax.ShapeDtypeStruct((8, 16, 16, 1), "f8"), layout=LATE_LENET)
    }
    moved = {path: [s for s in line.sent if "change of layout" in s.scope] for path, line in found.items()}
    assert {path for path, rows in moved.items() if rows} == {"conv2"}
    block = 4 * 2 * 8 * 8 * 8  # 8/2 images, 8/4 rows, 8 columns, 8 channels of 8 bytes
    assert [(s.kind, s.axes, s.payload) for s in moved["conv2"]] == [("all-to-all", ("height",), block)] * 2
    assert sum(s.bytes for s in moved["conv2"]) == 2 * 3 * block // 4
    assert found["pool1"].cut == (("data",), ("height",), (), ())
    assert found["pool2"].cut == (("data", "height"), (), (), ())


@pytest.mark.slow
def test_the_table_fits_a_terminal():
    mesh = make_mesh("data=2,height=2,channel=2")
    model = models.ResNet(18, classes=10, rngs=nnx.Rngs(0))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(st.summary(model, mesh, (64, 64, 64, 3)))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 100
    for word in (
        "blocks.7.conv2",
        "64/2x2/2x2x512/2",
        "halos",
        "gather",
        "scatter",
        "sum",
        "ResNet on data=2",
    ):
        assert word in shown
    parameters_only = Console(width=100, record=True, file=io.StringIO())
    parameters_only.print(st.summary(model, mesh))
    assert "halos" not in parameters_only.export_text()


def test_what_is_refused():
    model, mesh = models.LeNet(image=(16, 16, 1), rngs=nnx.Rngs(0)), make_mesh("data=2,height=4")
    with pytest.raises(UserError, match=r"inputs=7; give the batch's shape, such as \(64, 28, 28, 1\)"):
        st.summary(model, mesh, 7)
    with pytest.raises(UserError, match="the pattern 'nothing' matches no layer"):
        st.summary(model, mesh, layout={"nothing": LATE})


def test_a_wrong_trace_is_noticed(monkeypatch):
    """A halo row too many in the operator shows in both; one that the trace leaves out does not."""
    right = summary.sent
    monkeypatch.setattr(summary, "sent", lambda *args: right(*args)[1:])
    with pytest.raises(AssertionError):
        test_the_trace_foretells_every_byte(CASES["lenet"])


class Spectral(nnx.Module):
    """An operation between the layers for which XLA moves something, and a parameter of no layer."""

    def __init__(self, *, param_dtype, rngs):
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        self.enter, self.head = nn.Conv(1, 4, (3, 3), **kinds), nn.Conv(4, 4, (3, 3), **kinds)
        self.scale = nnx.Param(jnp.ones(4, param_dtype))

    def __call__(self, x):
        x = jnp.fft.fft2(self.enter(x), axes=(1, 2)).real * self.scale[...]
        return self.head(x)


def test_what_xla_moves_between_the_layers_is_counted():
    """By the program: whole images for a transform and for its gradient, a sum for a parameter of no layer."""
    shape, mesh = (8, 8, 8, 1), make_mesh("data=2,height=2")
    model = float64(Spectral)
    found = lines(model, mesh, jax.ShapeDtypeStruct(shape, jnp.float64))
    program = census.census(compiled_step(model, mesh, shape, {}, ()), mesh)
    assert by_kind_and_axes(s for line in found for s in line.sent) == by_kind_and_axes(program)
    outside = found[-1]
    assert (outside.path, outside.kind) == ("", "Spectral")
    images = 4 * 4 * 8 * 4 * 8  # half of the batch and of the rows, 8 columns and 4 channels of 8 bytes
    assert sum(s.bytes for s in outside.sent) >= 2 * images
    assert any(s.kind == "all-reduce" and s.payload == 4 * 8 for s in outside.sent)


def test_a_trace_is_enough_where_xla_has_nothing_to_move(monkeypatch):
    monkeypatch.setattr(summary, "compiled_assigned", None)
    model = float64(models.ResNet, depth=8, classes=10, channels=1)
    assert lines(model, make_mesh("data=2,height=2,channel=2"), (8, 16, 16, 1))
    assert lines(float64(Spectral), make_mesh("data=1"), (8, 8, 8, 1))
    with pytest.raises(TypeError):
        lines(float64(Spectral), make_mesh("data=2"), (8, 8, 8, 1))
