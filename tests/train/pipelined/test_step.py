"""Training on meshes with `pipe`: step by step what the same microbatches are on one device, in float64."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pipelined_models import (
    MICROBATCHES,
    Deep,
    Small,
    batches,
    close,
    fit,
    images,
    masked_adamw,
    same,
    trainer,
    wide,
)

import shardtrain as st
from shardtrain.errors import UserError

OPTIMIZERS = {
    "adamw with a mask by name": masked_adamw,
    "lamb": lambda: optax.lamb(0.01, weight_decay=0.1),
    "lars": lambda: optax.lars(0.1, weight_decay=0.01, trust_coefficient=0.1),
    "clipped by the global norm": lambda: optax.chain(
        optax.clip_by_global_norm(0.05), optax.trace(0.9), optax.scale_by_learning_rate(0.1)
    ),
    "adafactor, factored": lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
    "with a schedule": lambda: optax.sgd(optax.linear_schedule(0.1, 0.01, 3)),
    "by groups of names": lambda: optax.partition(
        {"kernel": optax.adam(0.01), "other": optax.sgd(0.1)},
        lambda params: {name: "kernel" if "kernel" in name else "other" for name in params},
    ),
    "skipping what is not finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "every second step": lambda: optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    "averages of parameters": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
}


def some(cases, quick):
    """All cases, of which those that are not `quick` are slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


QUICK = [
    "adamw with a mask by name",
    "adafactor, factored",
    "by groups of names",
    "skipping what is not finite",
]


def test_a_step_is_that_of_one_device():
    """Momentum, clipping, batch norm, dropout by example, metrics, a parameter that nothing uses."""
    ours = trainer("pipe=2,data=2", clip_norm=0.5)
    theirs = trainer("data=1", clip_norm=0.5)
    same(ours, theirs, batches())
    assert not np.array_equal(ours.model.norm.mean[...], np.zeros(4))
    np.testing.assert_array_equal(ours.model.idle.kernel[...], Small().idle.kernel[...])


@pytest.fixture(scope="module")
def alone():
    """Three steps of SGD with momentum on one device: what is reported, and the state afterwards."""
    one = trainer("data=1")
    return fit(one, batches()), one._named()


@pytest.mark.parametrize("mesh", ["pipe=2,data=2", pytest.param("pipe=4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", some(st.pipeline.NAMES, ["1f1b", "zb-v"]))
def test_every_schedule_trains_as_one_device(alone, schedule, mesh):
    one = trainer(mesh, schedule=schedule)
    close(fit(one, batches()), alone[0])
    close(one._named(), alone[1])
    assert one.pipeline.schedule.name.startswith(schedule)


def test_microbatches_are_the_big_batch():
    """Where nothing is normalized by a microbatch: masks of dropout are those of the batch, too."""
    ours = trainer("pipe=2,data=2", model=Small(norm=False))
    same(ours, trainer("data=1", model=Small(norm=False), accumulate=1), batches())


@pytest.mark.parametrize("optimizer", some(OPTIMIZERS, QUICK))
def test_optimizers(optimizer):
    make = OPTIMIZERS[optimizer]
    same(trainer("pipe=2", make(), Deep()), trainer("data=1", make(), Deep()), batches())


def test_an_optimizer_of_all_parameters_at_once():
    """Its state belongs to no parameter, so that every device has it; large ones are refused."""
    make = lambda: optax.flatten(optax.adam(0.01))  # noqa: E731
    same(trainer("pipe=2", make(), Deep()), trainer("data=1", make(), Deep()), batches())


def test_an_optimizer_that_joins_large_arrays_of_several_stages_is_refused(monkeypatch):
    monkeypatch.setattr("shardtrain.pipeline.runtime.rankwise_update.LARGEST", 1000)
    with pytest.raises(
        UserError, match=r"the optimizer joins .* of several stages.*; use transformations that"
    ):
        fit(trainer("pipe=2", optax.flatten(optax.adam(0.01)), Deep()), batches())


@pytest.mark.parametrize("skip_bad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_clipping_by_the_norm_of_all_gradients_sends_numbers_alone(skip_bad, monkeypatch):
    """Every rank knows the norm, and a gradient stays where it is divided by it: no limit is met."""
    monkeypatch.setattr("shardtrain.pipeline.runtime.rankwise_update.LARGEST", 200)
    options = {"clip_norm": 0.05, "skip_bad": skip_bad, "model": Deep()}
    ours = trainer("pipe=2", **options)
    same(ours, trainer("data=1", **options), batches())
    sent = ours.pipeline._update.update.rounds.sent
    assert sent
    assert {v.aval.shape for v in sent} == {()}


@pytest.mark.slow
def test_many_stages_on_a_rank_and_sends_that_overlap():
    ours = trainer("pipe=2,data=2", model=wide(Small(norm=True)), schedule="zb-v", overlap=True)
    same(ours, trainer("data=1"), batches())
    assert ours.pipeline.schedule.stages == 4


@pytest.mark.parametrize("statistics", some(["microbatch", "batch"], ["microbatch"]))
def test_ragged_batches(statistics):
    """Rows that fill up count nowhere, be it in a microbatch of which some are real or of which none is."""
    x, y = images(16 + 9 + 3 + 1 + 16)
    ends = list(itertools.accumulate([0, 16, 9, 3, 1, 16]))
    data = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]
    kinds = {"statistics": statistics, "metrics": {"top": st.losses.accuracy}}
    same(trainer("pipe=2,data=2", **kinds), trainer("data=1", **kinds), data)


def test_statistics_of_the_batch_are_those_without_microbatches():
    """On data that drifts from row to row and thus from microbatch to microbatch: the first layer's."""
    x, y = images(16)
    x = x * (1 + np.arange(16) % 4)[:, None, None, None] + 3 * (np.arange(16) % 4)[:, None, None, None]

    def running(mesh, **kwargs):
        one = trainer(mesh, **kwargs)
        fit(one, [(x, y)])
        return {key: np.array(one._named().model_state[key]) for key in ("norm.mean", "norm.var")}

    whole = running("data=1", accumulate=1)
    close(running("pipe=2,data=2", statistics="batch"), whole)
    for key, value in running("pipe=2,data=2").items():
        assert np.abs(value - whole[key]).max() > 0.1


@pytest.mark.slow
def test_running_statistics_move_in_the_order_of_the_schedules_forwards():
    """Microbatches done last first are those of a batch whose rows are so arranged, in order."""
    forth = st.pipeline.make("gpipe", 2, MICROBATCHES)
    back = dataclasses.replace(
        forth,
        orders=tuple(
            tuple(a._replace(microbatch=MICROBATCHES - 1 - a.microbatch) for a in order)
            for order in forth.orders
        ),
    )
    x, y = images(16)
    x = x + np.arange(16)[:, None, None, None] % MICROBATCHES
    turned = np.arange(16).reshape(-1, MICROBATCHES)[:, ::-1].ravel()

    def running(mesh, rows=slice(None), **kwargs):
        one = trainer(mesh, model=wide(Small(rate=0.0)), **kwargs)
        fit(one, [(x[rows], y[rows])])
        return np.array(one._named().model_state["norm.mean"])

    ours = running("pipe=2", schedule=back)
    close(ours, running("data=1", turned))
    assert np.abs(ours - running("data=1")).max() > 1e-3


@pytest.mark.slow
def test_low_precision_is_sent_as_such():
    ours, theirs = (
        trainer(mesh, dtype="bfloat16", model=wide(Small(rate=0.0))) for mesh in ("pipe=2", "data=1")
    )
    rows = fit(ours, batches())
    np.testing.assert_allclose(
        [row["loss"] for row in rows], [row["loss"] for row in fit(theirs, batches())], rtol=0.02
    )
    (sent,) = {s.dtype for program in ours.pipeline.programs[:-1] for s in program.outs}
    assert sent == jnp.bfloat16
    assert {p.dtype for p in ours._named().params.values()} == {jnp.dtype("float64")}


def kept(one):
    return sum(s.size * s.dtype.itemsize for p in one.pipeline.programs for s in (*p.saved, *p.lasting))


@pytest.mark.slow
def test_stages_that_keep_their_inputs_alone():
    none, every, first, second = (trainer("pipe=2", remat=remat) for remat in (None, "nothing", (0,), [1]))
    for one in (every, first):
        same(one, trainer("data=1"), batches())
    for one in (none, second):
        fit(one, batches(), 1)
    assert kept(every) < 0.7 * kept(none)
    for one, again in ((first, (every, none)), (second, (none, every))):
        expected = [other.pipeline.programs[k] for k, other in enumerate(again)]
        assert [(p.saved, p.lasting) for p in one.pipeline.programs] == [
            (p.saved, p.lasting) for p in expected
        ]
    assert kept(none) > max(kept(first), kept(second)) >= min(kept(first), kept(second)) > kept(every)


def test_parameters_spread_inside_stages():
    # Without batch norm, behind which the gradient of a bias is zero, and Adam makes steps of its rounding.
    ours, theirs = (
        trainer(mesh, masked_adamw(), Small(norm=False), parameters=spread)
        for mesh, spread in (("pipe=2,data=2", "data"), ("data=1", ()))
    )
    same(ours, theirs, batches())
    shapes, stage_of = ours.pipeline.shapes.params, ours.pipeline.stage_of
    whole = [sum(8 * s.size for name, s in shapes.items() if stage_of.get(name) == k) for k in (0, 1)]
    assert ours.parameter_bytes < 0.7 * max(whole)


@pytest.mark.slow
def test_layers_of_a_stage_that_are_cut_otherwise():
    """Channels cut in the first layers, examples in the last ones."""
    layout = {name: {"batch": ("data", "channel"), "channels": ()} for name in ("deep", "head")}
    ours = trainer("pipe=2,channel=2,data=2", layout=layout, clip_norm=0.3)
    same(ours, trainer("data=1", clip_norm=0.3), batches())


def test_evaluation_and_prediction():
    """Of a trained model: ragged, of other sizes than in training, smaller than the mesh."""
    ours, theirs = trainer("pipe=2,data=2"), trainer("data=1")
    x, y = images(40, seed=3)
    with pytest.raises(UserError, match=r"call fit first"):
        ours.predict(x)
    for one in (ours, theirs):
        fit(one, batches())
    for rows in (21, 1, 24):  # 24: several microbatches, whose rows come back in order
        close(ours.evaluate([(x[:rows], y[:rows])]), theirs.evaluate([(x[:rows], y[:rows])]))
        close(ours.predict(x[:rows]), theirs.predict(x[:rows]))
    parts = [(x[:24], y[:24]), (x[24:], y[24:])]
    close(ours.evaluate(parts), theirs.evaluate(parts))
    close(ours.predict(x[:5]), ours.model(jnp.asarray(x[:5])))
    before = ours.evaluate(parts)
    fit(ours, batches(), 1)
    assert ours.evaluate(parts) != before


class Pixels(nnx.Module):
    """Five numbers for every pixel."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.first = st.nn.Conv(2, 4, (3, 3), **kinds)
        self.second = st.nn.Conv(4, 4, (3, 3), **kinds)
        self.head = st.nn.Conv(4, 5, (3, 3), **kinds)

    def __call__(self, x):
        return self.head(nnx.tanh(self.second(nnx.tanh(self.first(x)))))


@pytest.mark.slow
def test_predictions_for_pixels_that_blocks_do_not_divide():
    """Nothing that fills up blocks is in them, in one microbatch and in several."""
    r = np.random.default_rng(0)
    data = [(r.standard_normal((8, 7, 7, 2)), r.integers(0, 5, (8, 7, 7)).astype(np.int32))]

    def loss(outputs, targets):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean((1, 2))

    ours, theirs = (
        trainer(mesh, model=Pixels(), loss=loss, metrics={}) for mesh in ("pipe=2,height=2", "data=1")
    )
    same(ours, theirs, data)
    for rows in (8, 3):
        close(ours.predict(data[0][0][:rows]), theirs.predict(data[0][0][:rows]))


HEADS = [
    {"batch": ("data", "channel"), "channels": ()},
    pytest.param({"batch": ()}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_predictions_of_a_head_that_is_cut_otherwise(head):
    """Rows come back as the batch lies, which is by `data` alone."""
    ours = trainer("pipe=2,channel=2,data=2", model=Deep(), layout={"second": head, "head": head})
    theirs = trainer("data=1", model=Deep())
    same(ours, theirs, batches()[:1])
    x, _ = images(16, seed=3)
    for rows in (16, 6):
        close(ours.predict(x[:rows]), theirs.predict(x[:rows]))


class Pooled(nnx.Module):
    """For images of any size."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.first = st.nn.Conv(2, 4, (3, 3), **kinds)
        self.second = st.nn.Conv(4, 4, (3, 3), 2, **kinds)
        self.head = st.nn.Linear(4, 5, **kinds)

    def __call__(self, x):
        x = nnx.tanh(self.first(x))
        return self.head(nnx.tanh(self.second(x)).mean((1, 2)))


@pytest.mark.slow
def test_batches_of_another_shape_in_between():
    x, y = images(48)
    large = np.random.default_rng(1).standard_normal((16, 7, 6, 2))
    data = [(x[:16], y[:16]), (large, y[16:32]), (x[32:], y[32:])]
    same(trainer("pipe=2", model=Pooled()), trainer("data=1", model=Pooled()), data)


class Plain(nnx.Module):
    """Layers of flax alone."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.first = nnx.Linear(32, 8, **kinds)
        self.norm = nnx.LayerNorm(8, **kinds)
        self.second = nnx.Linear(8, 8, **kinds)
        self.head = nnx.Linear(8, 5, **kinds)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.first(x.reshape(x.shape[0], -1))))
        return self.head(nnx.relu(self.second(x)) + x)


def test_a_model_of_plain_layers():
    same(trainer("pipe=2,data=2", model=Plain()), trainer("data=1", model=Plain()), batches())


class Words(nnx.Module):
    """Integers in, whose embeddings are averaged."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.embed = st.nn.Embed(11, 6, **kinds)
        self.hidden = st.nn.Linear(6, 6, **kinds)
        self.head = st.nn.Linear(6, 5, **kinds)

    def __call__(self, words):
        return self.head(nnx.tanh(self.hidden(self.embed(words).mean(1))))


def sentences(count):
    r = np.random.default_rng(0)
    return r.integers(0, 11, (count, 7)).astype(np.int32), r.integers(0, 5, count).astype(np.int32)


def test_integers_as_inputs():
    data = batches(make=sentences)
    same(trainer("pipe=2,data=2", model=Words()), trainer("data=1", model=Words()), data)


class Two(nnx.Module):
    """A tree of inputs, of which the second arrives at the last stage; two outputs."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.first = st.nn.Linear(4, 6, **kinds)
        self.second = st.nn.Linear(6, 6, **kinds)
        self.head = st.nn.Linear(6, 3, **kinds)

    def __call__(self, inputs):
        x = nnx.tanh(self.first(inputs["a"]))
        x = nnx.tanh(self.second(x)) * inputs["b"]
        return {"mean": self.head(x), "size": (x**2).sum(-1)}


@pytest.mark.slow
def test_trees_of_inputs_and_outputs():
    r = np.random.default_rng(0)

    def loss(outputs, targets):
        return ((outputs["mean"] - targets["mean"]) ** 2).sum(-1) + outputs["size"] * targets["weight"]

    data = [
        (
            {"a": r.standard_normal((rows, 4)), "b": r.standard_normal((rows, 6))},
            {"mean": r.standard_normal((rows, 3)), "weight": r.standard_normal(rows)},
        )
        for rows in (16, 16, 5)
    ]
    ours, theirs = (trainer(mesh, model=Two(), loss=loss) for mesh in ("pipe=2,data=2", "data=1"))
    same(ours, theirs, data)
    close(ours.predict(data[2][0]), theirs.predict(data[2][0]))
    close(ours.evaluate(data), theirs.evaluate(data))


class PlainNorm(Plain):
    """With a batch norm of flax."""

    def __init__(self):
        super().__init__()
        self.norm = nnx.BatchNorm(8, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mesh", ["data=2", "pipe=1"])
@pytest.mark.parametrize(
    "asked",
    [{"schedule": "1f1b"}, {"stages": "wide|deep"}, {"in_flight": 2}, {"overlap": True}, {"remat": (0, 1)}],
    ids=str,
)
def test_what_is_asked_of_stages_that_there_are_not_is_refused(mesh, asked):
    ((name, value),) = asked.items()
    name, typed = ("remat", repr(value)) if name == "remat" else ("pipeline", f"Pipeline({name}={value!r})")
    message = rf"on mesh {mesh}, which has no stages; add pipe=2 .* or leave {name} out"
    with pytest.raises(UserError, match=re.escape(f"{name}={typed} ") + message):
        trainer(mesh, model=Deep(), **asked)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trainer("pipe=2", schedule="2f2b"), "there is no schedule '2f2b'; there are gpipe, 1f1b,"),
        (
            lambda: trainer("pipe=2", schedule=st.pipeline.make("1f1b", 2, 3)),
            "'1f1b' is of 2 ranks and 3 microbatches, the mesh has pipe=2 and accumulate is 4; make them equal",
        ),
        (lambda: trainer("pipe=2", schedule=st.pipeline.make("1f1b", 4, 4)), "is of 4 ranks.*make them equal"),
        (
            lambda: trainer("pipe=2", schedule=st.pipeline.Schedule.from_csv("0F0,0B0\n1F0", "mine")),
            r"schedule 'mine': 1I0 \(or 1B0 for both halves\) is missing; add it to rank 1",
        ),
        (lambda: trainer("pipe=2", schedule="mine.csv"), "schedule file mine.csv cannot be read"),
        (lambda: trainer("pipe=2", schedule="interleaved", in_flight=1), "holds 5 activations on a rank, not 1; allow 5"),
        (lambda: trainer("pipe=2", parameters="pipe"), "parameters='pipe', but a mesh with pipe keeps each stage's"),
        (lambda: trainer("pipe=2", remat="contractions"), "stages keep all .* or only their inputs \\('nothing', or"),
        (lambda: trainer("pipe=2", remat=jax.checkpoint_policies.dots_saveable), "on a mesh with pipe=2; stages keep all"),
        (lambda: trainer("pipe=2", remat=(1, 2)), r"remat=\(1, 2\): schedule '1f1b' has the stages 0 to 1; name"),
        (lambda: trainer("pipe=2", stages="stem|norm|drop"), "stage"),
        (lambda: trainer("pipe=2", stages="stem|neck"), "neck"),
        (lambda: trainer("pipe=2", schedule=st.pipeline.make("interleaved", 2, 4, 200)), "can be cut into .* stages at most, not 400"),
        (lambda: trainer("pipe=2", accumulate=1), "with accumulate=1: .* one at a time; .* such as accumulate=8"),
        (
            lambda: trainer("pipe=2", model=PlainNorm(), statistics="batch"),
            "'norm' is a plain nnx.BatchNorm, .* not once, as statistics='batch' asks; use shardtrain.nn.BatchNorm",
        ),
        (lambda: trainer("pipe=2", statistics="epoch"), "statistics='epoch'; there are 'microbatch' and 'batch'"),
        (lambda: trainer("pipe=2,data=2", accumulate=16), "batch of 16 does not divide by the 2 shards .* use 32"),
        (lambda: trainer("pipe=2", stages="0F0"), "stages"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_do_is_said_in_one_sentence(make, message):
    with pytest.raises(UserError, match=message) as caught:
        fit(make(), batches(), 1)
    assert "\n" not in str(caught.value)
