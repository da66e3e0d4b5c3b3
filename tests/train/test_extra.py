"""Extra trees of a run: updated in the step, placed as declared, saved, and taken up on another mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pipelined_models import Deep, Small, batches, close, trainer, wide

import shardtrain as st
from shardtrain import UserError
from shardtrain.train.extra import on_devices, with_copies

DATA = batches()
DECAY = 0.9


class Count(st.Extra):
    """Updates, and the sum of the first parameter, as numbers on every device."""

    placement = "whole"

    def init(self, params):
        return {"updates": jnp.zeros((), jnp.int32), "norm": jnp.zeros(())}

    def update(self, tree, state):
        return {"updates": tree["updates"] + 1, "norm": jnp.vdot(*[state.params["head.bias"]] * 2)}


class Clocks(st.Extra):
    """A number and an array for each copy, by which the copies differ."""

    def __init__(self, placement):
        self.placement = placement

    def init(self, params):
        return {"ticks": jnp.zeros((), jnp.int32), "memory": jnp.zeros((3,))}

    def update(self, tree, state):
        own = jnp.arange(len(tree["ticks"]))
        return {"ticks": tree["ticks"] + own.astype(jnp.int32), "memory": tree["memory"] + own[:, None]}


def averages(steps, decay=DECAY, **kwargs):
    """The averages of the parameters, from the weights after every step of a run without any."""
    plain = trainer("data=1", **kwargs)
    mean = {name: np.asarray(value) for name, value in plain.state.params.items()}
    for step in range(1, steps + 1):
        plain.fit(iter([DATA[(step - 1) % 3]]), steps=step, progress=False)
        mean = {n: decay * m + (1 - decay) * np.asarray(plain.state.params[n]) for n, m in mean.items()}
    return mean


def feed(steps):
    return iter([DATA[step % 3] for step in range(steps)])


def averaged(mesh, **kwargs):
    return trainer(mesh, extra={"ema": st.EMA(DECAY), "count": Count()}, **kwargs)


@pytest.fixture(scope="module")
def expected():
    return averages(5, optimizer=optax.adam(0.01))


@pytest.mark.parametrize(
    "mesh", [pytest.param("data=1", marks=pytest.mark.slow), "data=2,height=2,channel=2", "pipe=2,data=2"]
)
def test_averaged_weights_are_the_average_of_the_weights(mesh, expected):
    ours = averaged(mesh, optimizer=optax.adam(0.01))
    ours.fit(feed(5), steps=5, progress=False)
    found = ours._named().extra
    close(dict(found["ema"]), expected)
    assert int(found["count"]["updates"]) == 5
    bias = np.asarray(ours._named().params["head.bias"])
    assert float(found["count"]["norm"]) == pytest.approx(float((bias**2).sum()), rel=1e-10)
    wrong = averages(5, decay=1 - DECAY, optimizer=optax.adam(0.01))
    with pytest.raises(AssertionError):
        close(dict(found["ema"]), wrong)


def test_the_averaged_model_has_the_averaged_weights(expected):
    ours = averaged("data=2,channel=2", optimizer=optax.adam(0.01))
    ours.fit(feed(5), steps=5, progress=False)
    model = ours.extra_model("ema")
    np.testing.assert_allclose(model.head.kernel[...], expected["head.kernel"], rtol=1e-10)
    assert not np.allclose(ours.model.head.kernel[...], expected["head.kernel"], rtol=1e-6)
    with pytest.raises(UserError, match=r"extra_model\('count'\): there are ema"):
        ours.extra_model("count")


def test_averages_are_sharded_as_their_parameters_are():
    ours = averaged("data=2,channel=2", parameters="data")
    for name, value in ours.state.params.items():
        assert ours.state.extra["ema"][name].sharding == value.sharding


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("data=2", "pipe=2,data=2"),
        pytest.param("pipe=2", "data=4", marks=pytest.mark.slow),
        ("data=4", "data=1"),
    ],
)
def test_averages_are_saved_and_taken_up_on_another_mesh(first, then, tmp_path, expected):
    one, other = (averaged(mesh, optimizer=optax.adam(0.01)) for mesh in (first, then))
    one.fit(feed(3), steps=3, progress=False)
    one.save(tmp_path)
    if "pipe" in then:
        other.prepare(*DATA[0])
    assert other.restore(tmp_path) == 3
    assert other.examples == 48
    other.fit(iter([DATA[0], DATA[1]]), steps=5, progress=False)
    close(dict(other._named().extra["ema"]), expected)


def test_a_bad_step_leaves_the_averages_alone():
    ours = averaged("data=2", skip_bad=True, model=wide(Small(rate=0.0, norm=False)))
    ours.fit(feed(2), steps=2, progress=False)
    before = jax.device_get(on_devices(ours.state).extra["ema"])
    x, y = DATA[0]
    rows = ours.fit(iter([(x * np.nan, y)]), steps=3, progress=False, guard=None)
    assert np.isnan(rows[0]["loss"])
    close(dict(ours.state.extra["ema"]), dict(before), 0)


@pytest.mark.parametrize(("placement", "spec"), [("device", ("data", "channel"))])
def test_every_device_has_a_copy_of_its_own(placement, spec, tmp_path):
    """A run on other devices gives each the mean of the copies, and of whole numbers the smallest."""
    one = trainer("data=2,channel=2", model=Deep(), extra={"clocks": Clocks(placement)})
    one.fit(feed(3), steps=3, progress=False)
    clocks = one.state.extra["clocks"]
    assert clocks["ticks"].tolist() == [0, 3, 6, 9]
    assert clocks["memory"].sharding.spec[0] == spec
    assert {shard.data.shape for shard in clocks["memory"].addressable_shards} == {(1, 3)}
    one.save(tmp_path)
    same = trainer("channel=2,data=2", model=Deep(), extra={"clocks": Clocks(placement)})
    same.restore(tmp_path)
    assert same.state.extra["clocks"]["ticks"].tolist() == [0, 3, 6, 9]
    other = trainer("data=2", model=Deep(), extra={"clocks": Clocks(placement)})
    other.restore(tmp_path)
    assert other.state.extra["clocks"]["ticks"].tolist() == [0, 0]
    np.testing.assert_allclose(other.state.extra["clocks"]["memory"], np.full((2, 3), 4.5))


@pytest.mark.parametrize(
    ("extra", "mesh", "sentence"),
    [
        ({"position": st.EMA(0.9)}, "data=2", "give names such as 'ema'"),
        ({"ema": 0.9}, "data=2", "instances of st.Extra"),
        ({"clocks": Clocks("device")}, "pipe=2", "leave out pipe, or place it as 'parameters' or 'whole'"),
        ({"clocks": Clocks("parameters")}, "data=2", "return one array for each parameter"),
    ],
)
def test_what_cannot_be_placed_is_refused(extra, mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(mesh, model=Deep(), extra=extra)


def test_a_decay_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"EMA\(decay=1.5\): give a number between 0 and 1"):
        st.EMA(1.5)


def test_the_mean_of_copies_is_one_in_every_floating_dtype():
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        copies = np.array([[2.0], [4.0], [6.0], [8.0]]).astype(jnp.dtype(dtype))
        assert with_copies(copies, 2).astype(float).tolist() == [[5.0], [5.0]], dtype
    assert with_copies(np.array([[3], [1]]), 3).tolist() == [[1], [1], [1]]


class Whole(st.Extra):
    placement = "whole"


class Nothing(Whole):
    def init(self, params):
        return None


class Widened(Whole):
    def init(self, params):
        return {"n": jnp.zeros((), jnp.int32)}

    def update(self, tree, state):
        return {"n": tree["n"] + 0.5}


class Grown(Widened):
    def update(self, tree, state):
        return {**tree, "m": tree["n"]}


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (Whole(), "extra 'mine': Whole has no init"),
        (Nothing(), "extra 'mine': init returned no arrays"),
        (Widened(), "extra 'mine': update returned .*float.* for .*int32"),
        (Grown(), "extra 'mine': update returned .*'m'.*; return a tree of the same structure"),
    ],
)
@pytest.mark.parametrize("mesh", ["data=2", "pipe=2"])
def test_trees_that_are_not_made_or_change_their_kind_are_refused(mesh, one, words):
    with pytest.raises(UserError, match=words):
        trainer(mesh, model=Deep(), extra={"mine": one}).fit(feed(1), steps=1, progress=False)
