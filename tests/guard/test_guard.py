"""Bad steps are skipped, rolled back or refused exactly; events, profiles and times of phases."""

import dataclasses
import json
import math
import os
import signal
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pipelined_models import Deep, batches, close, trainer

import shardtrain as st
from shardtrain.errors import UserError
from shardtrain.guard.health import Health
from shardtrain.guard.profile import Progress

DATA = batches(16, 96)
MESHES = ["data=2", "pipe=2"]


def deep(mesh, **kwargs):
    return trainer(mesh, optax.adam(0.01), Deep(), **kwargs)


def poisoned(at, value=np.nan):
    """The batches, with one pixel of the batch of step `at` that is not finite."""
    data = [(x.copy(), y) for x, y in DATA]
    data[at - 1][0][5, 0, 0, 0] = value
    return data


def run(one, data, guard=None, checkpoints=None):
    steps = int(one.state.step) + len(data)
    return one.fit(data, steps=steps, progress=False, guard=guard, checkpoints=checkpoints)


def weights(one):
    """The whole state of a run except the number of the step."""
    return dataclasses.replace(one._named(), step=0)


def events(folder, kind):
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def unwatched(folder=None, **kwargs):
    return st.Guard(folder, watchdog=None, **kwargs)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_skipped_update_is_as_if_there_was_no_such_batch(mesh, value, tmp_path):
    ours, theirs = deep(mesh, skip_bad=True), deep(mesh)
    rows = run(ours, poisoned(4, value), unwatched(tmp_path, on_nan="skip"))
    run(theirs, DATA[:3] + DATA[4:])
    assert int(ours.state.step) == 6
    close(weights(ours), weights(theirs), 1e-12)
    assert [row.get("skipped") for row in rows] == [None] * 3 + [1.0] + [None] * 2
    (event,) = events(tmp_path, "nan")
    assert (event["step"], event["first_example"], event["last_example"]) == (4, 48, 63)
    assert " is nan; its update is left out" in event["message"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_program_that_could_skip_computes_the_same(mesh):
    ours, theirs = deep(mesh, skip_bad=True), deep(mesh)
    losses = [[row["loss"] for row in run(one, DATA)] for one in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-12)
    close(weights(ours), weights(theirs), 1e-12)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("at", [pytest.param(4, marks=pytest.mark.slow), 6])  # in the middle, and the last
def test_rollback_goes_on_behind_the_batch_with_the_weights_of_the_checkpoint(mesh, at, tmp_path):
    ours, theirs = deep(mesh), deep(mesh)
    with st.Checkpoints(tmp_path / "checkpoints") as kept:
        run(ours, DATA[:2], checkpoints=kept)
        rows = run(ours, poisoned(at)[2:], unwatched(tmp_path, on_nan="rollback"), kept)
    run(theirs, DATA[:2] + DATA[at:])
    assert int(ours.state.step) == 6
    close(weights(ours), weights(theirs), 0)
    assert [k + 3 for k, row in enumerate(rows) if "rolled_back" in row] == [at]
    (event,) = events(tmp_path, "rollback")
    assert (event["step"], event["checkpoint"]) == (at, 2)


def test_rollback_goes_back_on_its_own_way(tmp_path):
    """It does not restore later checkpoints of a continuation that the run has left."""
    ours, theirs = deep("data=2"), deep("data=2")
    with st.Checkpoints(tmp_path / "checkpoints", every=2) as kept:
        run(ours, DATA, checkpoints=kept)
        ours.restore(kept, step=2)
        run(ours, poisoned(3)[2:4], unwatched(on_nan="rollback"), kept)
    run(theirs, [*DATA[:2], DATA[3]])
    close(weights(ours), weights(theirs), 0)


def test_rollback_without_a_checkpoint_goes_back_to_where_the_run_began(tmp_path):
    ours, theirs = deep("data=2"), deep("data=2")
    with st.Checkpoints(tmp_path / "checkpoints") as kept:
        run(ours, poisoned(3), unwatched(tmp_path, on_nan="rollback"), kept)
        kept.wait()
        assert kept.steps() == [0, 6]
    run(theirs, DATA[3:])
    close(weights(ours), weights(theirs), 0)
    assert ours.examples == 96


def test_a_bad_step_is_never_saved(tmp_path):
    with st.Checkpoints(tmp_path / "checkpoints", every=2, keep=None) as kept:
        one = deep("data=2")
        run(one, poisoned(4), unwatched(tmp_path, on_nan="rollback"), kept)
        kept.wait()
        assert kept.steps() == [0, 2, 4, 6]
        for step in kept.steps():
            one.restore(kept, step)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights(one)))
    with st.Checkpoints(tmp_path / "stopped", every=2) as kept:
        with pytest.raises(UserError, match="step 4"):
            run(deep("data=2"), poisoned(4), unwatched(), kept)
        kept.wait()
        assert kept.steps() == [2]


def test_stop_names_the_step_and_its_examples(tmp_path):
    with pytest.raises(UserError, match="step 4, examples 48 to 63: the loss is nan"):
        run(deep("data=2"), poisoned(4), unwatched(tmp_path))
    assert events(tmp_path, "nan")


def test_bad_steps_without_end_end_the_run(tmp_path):
    bad = poisoned(1)[:1] * 12
    with pytest.raises(UserError, match=r"step 10, .*so are all of the last 10 steps"):
        run(deep("data=2", skip_bad=True), bad, unwatched(on_nan="skip"))
    with pytest.raises(UserError, match="went back to the checkpoint of step 0 3 times"):
        run(deep("data=2"), bad, unwatched(on_nan="rollback"), st.Checkpoints(tmp_path / "checkpoints"))


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_a_spike_counts_as_not_finite(on_nan, tmp_path):
    """The loss counts labels from 10 on a hundredfold; the median is that of earlier steps."""

    def loss(outputs, labels):
        each = optax.softmax_cross_entropy_with_integer_labels(outputs, labels % 10)
        return each * jnp.where(labels < 10, 1, 100)

    data = DATA + DATA
    data[9] = (data[9][0], data[9][1] + 10)
    one = deep("data=2", skip_bad=on_nan == "skip", loss=loss)
    with st.Checkpoints(tmp_path / "checkpoints") as kept:
        rows = run(one, data, unwatched(tmp_path, on_nan=on_nan, spike=4.0), kept)
    mark = {"skip": "skipped", "rollback": "rolled_back"}[on_nan]
    assert [k + 1 for k, row in enumerate(rows) if mark in row] == [10]
    assert math.isfinite(rows[9]["loss"])
    (event,) = events(tmp_path, "nan")
    assert "is above 4 times" in event["message"]


def test_limits_of_spikes():
    health = Health(spike=3.0)
    assert health.limit == math.inf
    health.remember([1.0] * 7 + [math.nan])
    assert health.limit == math.inf
    health.remember([5.0])
    assert health.limit == 3.0
    assert health.reason({"loss": 3.1, "grad_norm": 1.0}).startswith("the loss 3.1 is above 3 times 1,")
    assert health.reason({"loss": 2.9, "grad_norm": 1.0}) is None
    assert health.reason({"loss": 0.1, "grad_norm": math.inf}) == "the gradient's norm is inf"
    resumed = Health(spike=3.0)
    resumed.remember([90.0] * 8)
    resumed.recall(health.losses)
    assert resumed.limit == 3.0
    np.testing.assert_array_equal(resumed.losses, [1.0] * 7 + [5.0] + [np.nan] * 24)
    resumed.remember(map(float, range(40)))
    np.testing.assert_array_equal(resumed.losses, range(8, 40))


def test_a_run_that_is_taken_up_knows_what_a_spike_is(tmp_path):
    one, other = deep("data=2"), deep("pipe=2")
    rows = run(one, DATA + DATA[:4])
    one.save(tmp_path)
    run(other, DATA[:1])
    other.restore(tmp_path)
    np.testing.assert_array_equal(other.recent[:10], [row["loss"] for row in rows])
    guard = unwatched(tmp_path / "run", spike=1.0001)
    dearer = [(100 * x, y) for x, y in DATA]  # and nothing is known of them but what was restored
    with pytest.raises(
        UserError, match=r"the loss .* is above 1.0001 times .* the median of the last 1\d steps"
    ):
        run(other, dearer, guard)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_nan": "skip"}, "give the Trainer skip_bad=True"),
        ({"on_nan": "rollback"}, "give fit some"),
        ({"watchdog": -1.0}, "watchdog=-1.0: give seconds"),
        ({"spike": 0.5}, "spike=0.5: a spike is more"),
    ],
)
def test_refused_in_a_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        run(deep("data=2"), DATA, st.Guard(**arguments))


def steps_in(folder):
    """The steps that a trace holds."""
    (file,) = folder.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    with warnings.catch_warnings(action="ignore"):  # of jaxlib 0.12's own type, which as an error is an abort
        events = [event for plane in data.planes for line in plane.lines for event in line.events]
        found = [dict(event.stats).get("step_num") for event in events if event.name == "train"]
    return {step for step in found if step is not None}


def test_a_profile_holds_the_steps_asked_for(tmp_path):
    run(deep("data=2"), DATA, unwatched(tmp_path, profile=range(3, 5)))
    assert steps_in(tmp_path / "profile") == {3, 4}
    assert [row["step"] for row in events(tmp_path, "profile")] == [3, 5]


def test_sigusr1_profiles_the_next_steps(tmp_path):
    one = deep("data=2")

    def feed():
        for k, batch in enumerate(DATA * 4):
            if k == 6:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.3)
            yield batch

    before = signal.getsignal(signal.SIGUSR1)
    with st.Guard(tmp_path) as guard:
        one.fit(feed(), steps=20, progress=False, guard=guard)
    assert signal.getsignal(signal.SIGUSR1) == before
    assert len(steps_in(tmp_path / "profile")) == 5
    assert "steps 9 to 13 will be traced" in events(tmp_path, "profile")[0]["message"]


def test_rows_say_what_the_host_waited_for():
    def slow():
        for batch in DATA:
            time.sleep(0.05)
            yield batch

    rows = deep("data=2").fit(slow(), steps=6, progress=False)
    for row in rows[1:-1]:
        assert 0.045 < row["data_seconds"] <= row["seconds"]
        assert (
            row["data_seconds"] + row["compute_seconds"] + row["checkpoint_seconds"] <= row["seconds"] * 1.01
        )


def test_progress_counts_what_the_time_went_to():
    progress = Progress()
    progress.at("data", step=7)
    time.sleep(0.02)
    progress.at("compute")
    _, taken = progress.take()
    assert (progress.step, progress.what) == (7, "compute")
    assert 0.02 <= taken["data"] < 0.2
    assert "data" not in progress.take()[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_is_blamed_and_not_the_learning_rate(value, caplog):
    said = r"step 2, examples 16 to 31: .*; the batch has 1 value that is not finite, first in row 5; leave "
    with pytest.raises(UserError, match=said + r"such steps out \(--on-nan skip\), .*, or mend the data$"):
        run(deep("data=2"), poisoned(2, value)[:3], unwatched(on_nan="stop"))
    with pytest.raises(UserError, match=r"or try a lower learning rate or clipped gradients\Z"):
        run(deep("data=2", loss=lambda y, _: y.sum(-1) / 0.0), DATA[:2], unwatched(on_nan="stop"))
