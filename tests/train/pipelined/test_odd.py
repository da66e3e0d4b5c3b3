"""Models that are easily wrong in stages: right, or refused with a sentence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import UserError
from shardtrain.pipeline import Costs, Schedule, fastest, lockstep, make
from shardtrain.pipeline.schedules.tick_table import build
from shardtrain.train.pipelined.step import Pipelined


class Deep(nnx.Module):
    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        sizes = (4, 8, 8, 8, 5)
        self.layers = nnx.List([st.nn.Linear(a, b, **kinds) for a, b in itertools.pairwise(sizes)])
        self.drop = st.nn.Dropout(0.1, rngs=nnx.Rngs(1))
        self.turns = nnx.BatchStat(jnp.ones(8, jnp.float64))

    def __call__(self, x):
        *first, last = self.layers
        for layer in first:
            x = jnp.tanh(layer(x))
        return last(x)


class Waves(Deep):
    """Complex numbers cross from stage to stage, and come back as gradients."""

    def __call__(self, x):
        a, b, c, d = self.layers
        x = jnp.tanh(a(x))
        waves = jnp.fft.rfft(x, axis=-1)
        return d(jnp.tanh(c(jnp.tanh(b(x)))) + jnp.fft.irfft(waves * waves, n=8, axis=-1))


class Counting(Deep):
    def __call__(self, x):
        self.turns.set_value(self.turns.get_value() + 1)
        return super().__call__(x * self.turns.get_value()[0])


class Spectral(Deep):
    def __call__(self, x):
        u = self.layers[1].kernel.get_value() @ self.turns.get_value()
        self.turns.set_value(jax.lax.stop_gradient(u))
        return super().__call__(x)


class Reordered(Deep):
    """Layers in another order in evaluation mode."""

    def __call__(self, x):
        a, b, c, d = self.layers
        b, c = (c, b) if self.drop.deterministic else (b, c)
        return d(jnp.tanh(c(jnp.tanh(b(jnp.tanh(a(x)))))))


class Several(Deep):
    def __call__(self, x):
        y = super().__call__(x)
        return {"y": y, "positive": y > 0} | ({} if self.drop.deterministic else {"size": (y**2).mean()})


def batch():
    r = np.random.default_rng(0)
    return r.standard_normal((8, 4)), r.integers(0, 5, 8).astype(np.int32)


def fitted(make_model, mesh="pipe=4", **kwargs):
    options = {"accumulate": 4} | kwargs
    one = st.Trainer(make_model(), optax.sgd(0.1), mesh=st.make_mesh(mesh), **options)
    rows = one.fit([batch()] * 2, steps=2, progress=False)
    return one, [row["loss"] for row in rows]


@pytest.mark.slow
def test_complex_activations_have_gradients():
    assert fitted(Waves)[1] == pytest.approx(fitted(Waves, "data=1")[1], rel=1e-10)


@pytest.mark.parametrize(("model", "count"), [(Counting, 4), (Spectral, 1)])
def test_variables_that_change_by_themselves_are_refused(model, count):
    with pytest.raises(
        UserError, match=r"the variable 'turns' changes in training .*; train this model without"
    ):
        fitted(model, accumulate=count, pipeline=st.Pipeline(make("gpipe", 4, count)))


def test_an_order_of_evaluation_that_stages_do_not_have_is_refused():
    one, _ = fitted(Reordered)
    with pytest.raises(UserError, match=r"'layers\.\d\.\w+' is used in evaluation.*; evaluate trainer.model"):
        one.evaluate([batch()])


@pytest.mark.slow
def test_outputs_that_are_no_numbers_or_have_no_rows():
    def loss(outputs, targets):
        return st.losses.cross_entropy(outputs["y"], targets) + outputs.get("size", 0)

    ours, theirs = (fitted(Several, mesh, loss=loss, metrics={})[0] for mesh in ("pipe=2", "data=1"))
    assert ours.evaluate([batch()]) == pytest.approx(theirs.evaluate([batch()]), rel=1e-10)
    positive, wanted = (one.predict(batch()[0])["positive"] for one in (ours, theirs))
    assert positive.dtype == wanted.dtype == bool
    np.testing.assert_array_equal(positive, wanted)


def test_schedules_by_path_and_what_is_not_known_yet(tmp_path):
    make("zb-h1", 2, 4).save(tmp_path / "mine.csv")
    one = st.Trainer(
        Deep(),
        optax.sgd(0.1),
        mesh=st.make_mesh("pipe=2"),
        accumulate=4,
        pipeline=st.Pipeline(tmp_path / "mine.csv"),
    )
    with pytest.raises(UserError, match="call fit first"):
        _ = one.parameter_bytes
    one.prepare(*batch())
    assert one.pipeline.plan.schedule.orders == make("zb-h1", 2, 4).orders
    assert one.parameter_bytes > 0


def test_overlap_takes_the_ticks_that_the_simulator_says():
    for name in ("gpipe", "1f1b", "zb-v"):
        schedule = make(name, 3, 5)
        ticks = lockstep(schedule, latency=2)
        assert len(build(schedule, ticks, 2).rows) == len(ticks.table)


def test_the_fastest_schedule_is_that_of_the_latency_at_hand():
    rows = [Schedule.from_csv(make("1f1b", p, m).to_csv(), "mine") for p in (2, 4) for m in (2, 8)]
    for one in rows:
        costs = Costs.equal(one.stages)
        ways = (one, one.with_split(), one.with_fused())
        for latency in (1, 2, 3):
            best = lockstep(fastest(one, costs, latency=latency), costs, latency).makespan
            assert best == min(lockstep(way, costs, latency).makespan for way in ways)


class Pooled(nnx.Module):
    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.first, self.pool = st.nn.Conv(2, 4, (3, 3), **kinds), st.nn.MaxPool((2, 2), (2, 2))
        self.second, self.flatten = st.nn.Conv(4, 4, (3, 3), **kinds), st.nn.Flatten()
        self.head = st.nn.Linear(16, 5, **kinds)

    def __call__(self, x):
        return self.head(self.flatten(jnp.tanh(self.second(self.pool(jnp.tanh(self.first(x)))))))


def test_the_stages_that_run_are_those_that_were_asked_for(monkeypatch):
    """A layer without parameters as a stage of its own too, and not only where parameters say so."""
    ran = []
    right = Pipelined._loop
    monkeypatch.setattr(
        Pipelined, "_loop", lambda self, *args: ran.append(right(self, *args)) or right(self, *args)
    )
    stages = "first|pool|second,flatten|head"
    trainer = st.Trainer(
        Pooled(),
        optax.sgd(0.1),
        mesh=st.make_mesh("pipe=4"),
        accumulate=2,
        pipeline=st.Pipeline(stages=stages),
    )
    images = np.random.default_rng(0).standard_normal((4, 4, 4, 2))
    trainer.prepare(images, np.zeros(4, np.int32))
    sent = [[s.shape for s in p.outs] for p in ran[0].programs[:-1]]
    assert sent == [[(2, 4, 4, 4)], [(2, 2, 2, 4)], [(2, 16)]]
    assert sent == [[s.shape for s in p.outs] for p in trainer.pipeline.programs[:-1]]


def test_replicas_resume_on_as_many_replicas_only(tmp_path):
    def replicas(mesh):
        return st.Trainer(Deep(), optax.sgd(0.1, momentum=0.9), mesh=st.make_mesh(mesh), accumulate=4)

    one = replicas("pipe=2,replica=2")
    one.fit([batch()], steps=1, progress=False)
    one.save(tmp_path)
    again = replicas("pipe=2,replica=2")
    assert again.restore(tmp_path) == 1
    losses = [[row["loss"] for row in t.fit([batch()], steps=2, progress=False)] for t in (one, again)]
    assert losses[0] == losses[1]
    for mesh in ("pipe=2", "pipe=2,replica=4"):
        with pytest.raises(UserError, match=r"does not fit this model and optimizer .*resume with the flags"):
            replicas(mesh).restore(tmp_path)
