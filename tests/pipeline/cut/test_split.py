"""A model cut into stages computes what it computed whole, and is cut where the stages cost alike."""

import functools
import inspect
import io
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as hs
from jax.sharding import PartitionSpec as P
from rich.console import Console

import shardtrain as st
from shardtrain import UserError, models, nn
from shardtrain.pipeline import split
from shardtrain.pipeline.cut.balance import SLACK, balanced_starts, best_starts, stage_starts
from shardtrain.pipeline.cut.graph import _Cutting
from shardtrain.pipeline.cut.layers import allowed_starts
from shardtrain.pipeline.cut.operation_costs import flops, measured
from shardtrain.pipeline.cut.split import trace

F64 = {"param_dtype": jnp.float64}


def resnet8(**options):
    return nnx.eval_shape(lambda: models.ResNet(8, 10, 1, rngs=nnx.Rngs(0), **options))


class Sin(nnx.Module):
    """A model with a loss that is not linear in its outputs."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return jnp.sin(self.inner(x) * 3.0)


class Tied(nnx.Module):
    """Three layers, of which the first and the last share a kernel; and a parameter that is not used."""

    def __init__(self, **kinds):
        kinds = {"rngs": nnx.Rngs(0)} | kinds
        self.first, self.middle, self.end = (nn.Linear(6, 6, **kinds) for _ in range(3))
        self.head = nn.Linear(6, 3, **kinds)
        self.end.kernel = self.first.kernel
        self.idle = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return self.head(self.end(jnp.sin(self.middle(jnp.sin(self.first(x))))))


def plain(**kinds):
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(8, rngs=rngs, **kinds)
    norm.mean, norm.var = nnx.BatchStat(jnp.zeros(8)), nnx.BatchStat(jnp.ones(8))  # in float64
    return nnx.Sequential(
        nnx.Linear(6, 8, rngs=rngs, **kinds),
        nnx.relu,
        norm,
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(8, 4, rngs=rngs, **kinds),
    )


def recurrent(cell, **kinds):
    rngs = nnx.Rngs(0)
    layers = [nnx.RNN(cell(4 if i else 3, 4, rngs=rngs, **kinds)) for i in range(3)]
    return nnx.Sequential(*layers, nnx.Linear(4, 2, rngs=rngs, **kinds))


def dropped(**kinds):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nn.Linear(6, 8, rngs=rngs, **kinds), nn.Dropout(0.5, rngs=rngs), nn.Linear(8, 4, rngs=rngs, **kinds)
    )


MODELS = {
    "resnet 8": (lambda: resnet8(**F64), (4, 8, 8, 1), 4),
    "resnet 8, blocks computed again": (lambda: resnet8(remat=True, **F64), (4, 8, 8, 1), 3),
    "resnet 18": (
        lambda: models.ResNet(18, 5, 3, width=4, rngs=nnx.Rngs(0), **F64),
        (2, 32, 32, 3),
        5,
    ),
    "alexnet": (
        lambda: models.AlexNet(5, hidden=32, rngs=nnx.Rngs(0), **F64),
        (2, 64, 64, 3),
        4,
    ),
    "vgg": (lambda: models.VGG(11, 5, width=4, hidden=32, rngs=nnx.Rngs(0), **F64), (2, 32, 32, 3), 4),
    "unet": (
        lambda: models.UNet(3, features=(2, 4, 8, 8), rngs=nnx.Rngs(0), **F64),
        (2, 12, 12, 1),
        6,
    ),
    "lenet": (lambda: models.LeNet(image=(16, 16, 1), rngs=nnx.Rngs(0), **F64), (4, 16, 16, 1), 3),
    "plain layers": (lambda: plain(**F64), (4, 6), 3),
    "LSTM": (lambda: recurrent(nnx.LSTMCell, **F64), (2, 5, 3), 4),
    "GRU": (lambda: recurrent(nnx.GRUCell, **F64), (2, 5, 3), 3),
    "dropout": (lambda: dropped(**F64), (4, 6), 3),
    "a parameter used twice": (lambda: Tied(**F64), (4, 6), 2),
}


def graph_of(model, shape):
    return trace(model, jax.ShapeDtypeStruct(shape, jnp.float64))


def filled(graph):
    """Values of the parameters, other variables and examples of a graph."""
    rng = np.random.default_rng(0)

    def value(v, small=0.3):
        aval = v.aval
        if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
            return jax.random.key(3)
        if jnp.issubdtype(aval.dtype, jnp.floating):
            return jnp.asarray(0.2 + small * rng.standard_normal(aval.shape), aval.dtype)
        return jnp.arange(5, 5 + aval.shape[0], dtype=aval.dtype) if aval.shape else jnp.ones((), aval.dtype)

    params, state, examples = graph.traced.groups()
    params = {n: value(v) for n, v in zip(graph.traced.params, params, strict=True)}
    state = {
        n: abs(v) if jnp.issubdtype(v.dtype, jnp.floating) else v
        for n, v in zip(graph.traced.state, map(value, state), strict=True)
    }
    return params, state, [value(v, 1.0) for v in examples]


def run(closed, *values):
    return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *values)


def whole(graph, params, state, examples):
    loss, *after = run(graph.traced.closed, *params.values(), *state.values(), *examples)
    return loss, dict(zip(graph.traced.state, after, strict=True))


def chained(stages, params, state, examples, spoilt=lambda k, values: values):
    """The loss and the variables that move, from one stage after the other."""
    values, after = [], {}
    for k, stage in enumerate(stages):
        given = [params[n] for n in stage.params], [state[n] for n in stage.state]
        found = run(stage.closed, *given[0], *given[1], *examples, *spoilt(k, values))
        ends = len(found) - len(stage.updated)
        values = found[:ends]
        after |= dict(zip(stage.updated, found[ends:], strict=True))
    return values[0], after


@functools.cache
def expected(graph):
    params, state, examples = values = filled(graph)
    return values, jax.value_and_grad(lambda p: whole(graph, p, state, examples), has_aux=True)(params)


def assert_same(graph, cuts, **spoilt):
    """Loss, gradients of all parameters and new variables of the chained stages are those of the whole."""
    stages = graph.cut(cuts)
    assert sorted(n for s in stages for n in s.params) == sorted(
        graph.spans().keys() & set(graph.traced.params)
    )
    (params, state, examples), ((loss, after), grads) = expected(graph)
    (loss2, after2), grads2 = jax.value_and_grad(
        lambda p: chained(stages, p, state, examples, **spoilt), has_aux=True
    )(params)
    assert loss.dtype == jnp.float64
    assert float(loss2) == pytest.approx(float(loss), rel=1e-12)
    for name, gradient in grads.items():
        np.testing.assert_allclose(
            grads2[name], gradient, rtol=1e-9, atol=1e-11 * (1 + abs(gradient).max()), err_msg=name
        )
    for name, value in after2.items():
        np.testing.assert_allclose(value, after[name], rtol=1e-12, err_msg=name)
    moved = {
        n
        for n in after
        if not jax.dtypes.issubdtype(after[n].dtype, jax.dtypes.prng_key) and (after[n] != state[n]).any()
    }
    assert {n for n in moved if "count" not in n} <= after2.keys()


OFTEN = ["resnet 8", "unet", "plain layers", "LSTM"]


@pytest.mark.parametrize(
    "case", [pytest.param(m, marks=[] if m in OFTEN else pytest.mark.slow) for m in MODELS]
)
def test_the_stages_one_after_the_other_are_the_model(case):
    make, shape, stages = MODELS[case]
    graph = graph_of(Sin(nnx.eval_shape(make)), shape)
    cuts = balanced_starts(graph, stages)
    assert len(cuts) == stages - 1
    assert cuts == sorted(set(cuts))
    assert_same(graph, cuts)


@pytest.mark.slow
def test_every_position_of_a_small_resnet_is_right():
    graph = graph_of(Sin(resnet8(width=2, **F64)), (2, 8, 8, 1))
    places = allowed_starts(graph)
    assert len(places) > 30
    assert max(len(graph.cut([c])[1].ins) for c in places) > 1
    for place in places:
        assert_same(graph, [place])


def test_a_trace_is_the_model():
    model = Sin(models.LeNet(image=(16, 16, 1), rngs=nnx.Rngs(0), **F64))
    graph = graph_of(model, (4, 16, 16, 1))
    _, params, _ = nnx.split(model, nnx.Param, ...)
    values = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(params)}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 16, 1)))
    loss, _ = whole(graph, values, {}, [x, jnp.arange(4, dtype=jnp.int32)])
    assert float(loss) == pytest.approx(float(model(x).sum()), rel=1e-12)


def test_a_skip_that_is_dropped_or_lost_on_the_way_is_seen(monkeypatch):
    graph = graph_of(Sin(models.UNet(3, features=(2, 4, 8), rngs=nnx.Rngs(0), **F64)), (2, 8, 8, 1))
    cuts = balanced_starts(graph, 5)
    assert max(len(stage.ins) for stage in graph.cut(cuts)) >= 3

    def zeroed(k, values):
        return [values[0] * 0, *values[1:]] if k == 2 else values

    with pytest.raises(AssertionError):
        assert_same(graph, cuts, spoilt=zeroed)
    right = _Cutting._crossing
    monkeypatch.setattr(
        _Cutting,
        "_crossing",
        lambda self, k: tuple(v for v in right(self, k) if self.stage_of[v] == k - 1),
    )
    with pytest.raises(KeyError):
        assert_same(graph, cuts)


def test_masks_of_dropout_are_those_of_the_examples():
    graph = graph_of(dropped(**F64), (4, 6))
    params, state, (x, _) = filled(graph)
    stages = graph.cut(balanced_starts(graph, 3))
    together, _ = chained(stages, params, state, [x, jnp.arange(4, dtype=jnp.int32)])
    one = graph_of(dropped(**F64), (1, 6))
    apart = [
        chained(one.cut(balanced_starts(one, 3)), params, state, [x[i : i + 1], jnp.array([i], jnp.int32)])[0]
        for i in range(4)
    ]
    assert float(together) == pytest.approx(float(sum(apart)), rel=1e-12)


def test_casts_of_weights_stay_at_home():
    done = split(resnet8(dtype=jnp.bfloat16), (8, 8, 8, 1), 6)
    assert {kind.split("[")[0] for part in done.parts for kind in part.arrives} == {"bfloat16"}
    assert all(kind.startswith("bfloat16[8,") for part in done.parts for kind in part.arrives)


def test_a_parameter_used_twice_stays_in_one_stage():
    graph = graph_of(Tied(**F64), (4, 6))
    (cut,) = balanced_starts(graph, 2)
    stages = graph.cut([cut])
    assert {"end.kernel", "middle.kernel"} <= set(stages[0].params)
    assert "head.kernel" in stages[1].params
    with pytest.raises(
        UserError, match=r"'end.kernel' is used in the stages 0 and 1, which would each need it"
    ):
        graph.cut([2])
    with pytest.raises(
        UserError,
        match=r"begins with 'middle' would divide the uses of the parameter 'end.kernel' between two stages; put first, middle, end into one",
    ):
        split(Tied(), (4, 6), "first|middle,end,head")


def test_what_statistics_change_stays_in_one_stage():
    graph = graph_of(resnet8(**F64), (4, 8, 8, 1))
    first, last = graph.spans()["norm.mean"]
    assert last > first
    with pytest.raises(UserError, match=r"norm\.(mean|var)"):
        graph.cut([last])


# ---- balance


@pytest.mark.parametrize(
    ("make", "shape", "stages", "least"),
    [
        (lambda rngs: models.ResNet(8, 10, 1, rngs=rngs), (8, 8, 8, 1), 4, 0.88),
        (lambda rngs: models.ResNet(8, 10, 1, rngs=rngs), (8, 8, 8, 1), 8, 0.75),
        (lambda rngs: models.ResNet(50, 1000, 3, rngs=rngs), (8, 224, 224, 3), 4, 0.96),
        (lambda rngs: models.AlexNet(rngs=rngs), (8, 224, 224, 3), 4, 0.83),
        (lambda rngs: models.UNet(3, rngs=rngs), (2, 64, 64, 1), 3, 0.9),
    ],
)
def test_stages_cost_alike_and_hold_whole_layers(make, shape, stages, least):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    done = split(model, shape, stages)
    assert done.balance >= least
    again = split(model, shape, done.stages_text())
    assert again.starts == done.starts
    names = [path for part in done.parts for path in part.layers]
    assert len(names) == len(set(names))
    assert all(part.layers for part in done.parts)


@settings(max_examples=200, deadline=None)
@given(hs.data())
def test_starts_are_the_best_there_are(data):
    n = data.draw(hs.integers(2, 9))
    costs = data.draw(hs.lists(hs.integers(0, 60).map(float), min_size=n, max_size=n))
    places = data.draw(hs.lists(hs.integers(1, n - 1), min_size=1, unique=True).map(sorted))
    arrivals = {c: float(data.draw(hs.integers(0, 30))) for c in places}
    inner = {c: data.draw(hs.booleans()) for c in places}
    stages = data.draw(hs.integers(1, len(places) + 1))

    def most(cuts):
        ends = [0, *cuts, n]
        return max(sum(costs[a:b]) + arrivals.get(a, 0) for a, b in itertools.pairwise(ends))

    every = [list(c) for c in itertools.combinations(places, stages - 1)]
    least = min(map(most, every))

    def rank(cuts):
        return sum(inner[c] for c in cuts), sum(arrivals[c] for c in cuts), -sum(cuts)

    found = best_starts(costs, arrivals, inner, stages)
    assert most(found) <= SLACK * least
    assert rank(found) == min(rank(c) for c in every if most(c) <= SLACK * least)


def total(function, *shapes):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr
    return sum(map(flops, jaxpr.eqns))


def conv(**options):
    def function(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            **{"window_strides": (1, 1), "padding": "VALID"} | options,
        )

    return function


def test_operations_are_counted():
    assert total(conv(), (2, 8, 8, 4), (3, 3, 4, 16)) == 2 * (2 * 6 * 6 * 16) * (3 * 3 * 4)
    assert total(conv(feature_group_count=4), (2, 8, 8, 4), (3, 3, 1, 16)) == 2 * (2 * 6 * 6 * 16) * 9
    assert total(conv(rhs_dilation=(2, 2)), (2, 8, 8, 4), (3, 3, 4, 16)) == 2 * (2 * 4 * 4 * 16) * (9 * 4)
    assert total(conv(window_strides=(2, 2)), (2, 8, 8, 4), (2, 2, 4, 16)) == 2 * (2 * 4 * 4 * 16) * (4 * 4)
    # a transposed convolution of stride 2 with filters of 2x2: each output pixel is made from one
    turned = total(
        lambda x, k: conv(lhs_dilation=(2, 2), padding=[(1, 1)] * 2)(x, k),
        (1, 3, 3, 4),
        (2, 2, 4, 8),
    )
    assert turned == 2 * (6 * 6 * 8) * 4
    assert total(jnp.matmul, (5, 7), (7, 3)) == 2 * 5 * 7 * 3
    assert total(lambda x: jnp.tanh(x) + 1, (5, 7)) == 70
    assert total(lambda x: x.reshape(7, 5).T, (5, 7)) == 0
    assert total(jnp.sum, (5, 7)) == 35
    assert (
        total(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=6)[0], (4, 4)) == 6 * 2 * 64
    )
    assert total(lambda x: jax.lax.cond(True, lambda y: y @ y, jnp.sin, x), (4, 4)) >= 2 * 64
    assert total(jax.checkpoint(lambda x: x @ x), (4, 4)) == 2 * 64


def test_the_body_of_a_shard_map_counts_for_every_device():
    mesh = st.make_mesh("data=2,height=4").abstract_mesh
    mapped = jax.shard_map(
        lambda x: jnp.sin(x), mesh=mesh, in_specs=P("data", "height"), out_specs=P("data", "height")
    )
    assert total(mapped, (8, 16)) == 8 * 16
    one = graph_of(models.LeNet(image=(16, 16, 1), rngs=nnx.Rngs(0)), (8, 16, 16, 1))
    cut = trace(
        models.LeNet(image=(16, 16, 1), rngs=nnx.Rngs(0)),
        jax.ShapeDtypeStruct((8, 16, 16, 1), jnp.float64),
        st.make_mesh("data=2"),
    )
    assert sum(map(flops, cut.main)) == pytest.approx(sum(map(flops, one.main)), rel=0.01)


def test_measured_costs():
    model = models.LeNet(image=(16, 16, 1), rngs=nnx.Rngs(0))
    done = split(model, (8, 16, 16, 1), 2, costs="measured", mesh=st.make_mesh("pipe=2,data=2"))
    assert done.costs == "measured"
    assert all(0 < part.cost < 10 for part in done.parts)
    graph = graph_of(model, (8, 16, 16, 1))
    work = measured(graph)
    assert len(work.costs) == len(graph.main)
    assert sum(work.costs) > 0
    with pytest.raises(UserError, match="costs='timed'; there are 'counted' and 'measured'"):
        split(model, (8, 16, 16, 1), 2, costs="timed")


# ---- stages as text


@pytest.mark.parametrize(
    "text",
    [
        "stem,norm,blocks.0|blocks.1|blocks.2,mean,head",
        "...|blocks.1,...|blocks.2,...",
        "stem,...|blocks.1|...,head",
        "stem, norm, blocks.0.* | blocks.1.conv?, blocks.1.norm[12], blocks.1.shortcut | ...",
        "stem,...,blocks.0|...|blocks.2,...,head",
    ],
)
def test_ways_to_write_stages(text):
    done = split(resnet8(), (8, 8, 8, 1), text)
    assert done.stages_text() == "stem,norm,blocks.0|blocks.1|blocks.2,mean,head"
    assert [part.arrives for part in done.parts] == [
        (),
        ("float32[8,8,8,16]",),
        ("float32[8,4,4,32]",),
    ]  # behind sum and relu
    assert stage_starts(trace(resnet8(), jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)), 3, text) == list(
        done.starts
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "...|blocks.1,...",
            r"has 2 stages, 3 are asked for; write the layers of 3 stages with \| between them, such as '...\|.+,...\|.+,...'",
        ),
        (
            "...|blocks.1,...|block.2,...",
            "the pattern 'block.2' matches no layer; the layers are stem, norm, blocks.0.conv1",
        ),
        (
            "stem,blocks.0|blocks.1|blocks.2,mean,head",
            r"norm are in no stage; name them, for example in stage 0, or write '...' there",
        ),
        (
            "stem,norm,blocks.0|blocks.1|blocks.2",
            "mean, head are in no stage; name them, for example in stage 2",
        ),
        (
            "...|blocks.2,...|blocks.1,...",
            "the layer 'blocks.1.shortcut.layers.1' runs before 'blocks.2.conv1' but is in the later stage 2",
        ),
        (
            "...|blocks.*|blocks.2,...",
            r"'blocks.\*' in stage 1 and 'blocks.2' in stage 2 both match the layer 'blocks.2.conv1'",
        ),
        (
            "stem,...|...,blocks.1|blocks.2,...",
            r"norm, blocks.0.conv1.* could be in any of the stages 0, 1; name the first layer of each",
        ),
        (
            "...|...|...",
            r"could be in any of the stages 0, 1, 2; name the first layer of each, as in '...\|.+,...\|.+,...'",
        ),
        ("stem,norm,blocks||mean,head", "no layer is left for stage 1; name one"),
        ("|...|mean,head", "no layer is left for stage 0; name one"),
        ("stem,relu,...|blocks.1,...|head", r"'relu' matches no layer; .*, \.\.\. \(functions in between"),
    ],
)
def test_stages_that_a_model_does_not_have(text, says):
    with pytest.raises(UserError, match=says):
        stage_starts(trace(resnet8(), jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)), 3, text)


class Pooling(nnx.Module):
    """The same layer, one without parameters, runs several times."""

    def __init__(self, rngs):
        self.pool = nn.MaxPool((2, 2), strides=(2, 2))
        self.convs = nnx.List([nn.Conv(n, 8, (3, 3), rngs=rngs) for n in (1, 8, 8)])
        self.head = nn.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = self.pool(nnx.relu(conv(x)))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("make", [resnet8, lambda: Pooling(nnx.Rngs(0))])
def test_the_text_of_a_cut_cuts_there_again_or_is_refused(make):
    layers = split(make(), (8, 8, 8, 1), 1)._layers
    assert len(layers.begins) > 3
    for both in itertools.combinations(layers.begins, 2):
        assert layers.starts(layers.text(both), 3) == list(both)
    graph = trace(make(), jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32))
    inside = [p for p in allowed_starts(graph) if p not in layers.begins]
    assert inside
    for position in inside:
        with pytest.raises(UserError, match="begins inside a layer") as refused:
            layers.text([position])
        near = re.search(r"the nearest that can be written, '(.*)'$", str(refused.value))
        (found,) = layers.starts(near[1], 2)
        assert abs(found - position) == min(abs(p - position) for p in layers.begins)
    with pytest.raises(UserError, match=r"or fewer stages$"):
        layers.text(range(1, len(graph.main)))


def test_what_runs_in_one_operation_is_not_cut():
    with pytest.raises(UserError, match=r"'blocks.1.conv1' and 'blocks.1.norm1' run in one operation"):
        split(resnet8(remat=True), (8, 8, 8, 1), "...|blocks.1.norm1,...")


def test_more_stages_than_there_are_places():
    with pytest.raises(
        UserError, match=r"can be cut into (\d+) stages at most, not 900, .* use \1 stages \(pipe=\1\)"
    ):
        split(resnet8(), (8, 8, 8, 1), 900)
    with pytest.raises(
        UserError,
        match=r"4 stages at most, not 5, .* 'end.kernel' is used from the layer 'first' to 'end'; "
        r"use 4 stages \(pipe=4\) or give these layers parameters of their own",
    ):
        split(Tied(), (4, 6), 5)
    for stages in (0, True):
        with pytest.raises(UserError, match="give a number from 1 up"):
            split(resnet8(), (8, 8, 8, 1), stages)
    for inputs in (8, (), "8,8,8,1", (-8, 8, 8, 1), (0, 8, 8, 1)):
        with pytest.raises(UserError, match="give the shape of a microbatch"):
            split(resnet8(), inputs, 2)
    bare = inspect.unwrap(split)  # jaxtyping, at work in tests alone, would speak first
    with pytest.raises(
        UserError, match=r"stages=\['stem'\]; give a number .*, or write the layers of each, such as"
    ):
        bare(resnet8(), (8, 8, 8, 1), ["stem"])
    with pytest.raises(UserError, match=r"mesh='pipe=2'; give st\.make_mesh"):
        bare(resnet8(), (8, 8, 8, 1), 2, mesh="pipe=2")
    with pytest.raises(UserError, match="no NNX model"):
        split(len, (8, 8, 8, 1), 2)


def test_the_table():
    done = st.pipeline.split(resnet8(), (8, 8, 8, 1), 4)
    out = io.StringIO()
    Console(file=out, width=100).print(done)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "ResNet in 4 stages, microbatches 8x8x8x1" in lines[0]
    assert f"balance {done.balance:.0%}" in out.getvalue()
    assert sum(part.parameters for part in done.parts) == 4 * sum(
        v.get_value().size for _, v in nnx.to_flat_state(nnx.state(resnet8(), nnx.Param))
    )
    kernel = 2 * (8 * 8 * 8 * 16)
    assert done.parts[1].flops >= kernel * 9 * 16  # blocks.0.conv2
    assert done.parts[0].bytes == 0
    assert done.parts[2].bytes == 8 * 8 * 8 * 16 * 4
    alone = split(resnet8(), (8, 8, 8, 1), 1)
    assert alone.balance == 1
    assert alone.stages_text() == "stem,norm,blocks,mean,head"
