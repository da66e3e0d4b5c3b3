"""Callbacks see the run as it is: at their cadence, with the state of the very step, in order."""

import io
import json
import sys
import types

import numpy as np
import optax
import pytest
from pipelined_models import Deep, batches, trainer
from rich.console import Console

import shardtrain as st
from shardtrain import UserError

DATA = batches()
HELD_OUT = batches(count=32, size=16)


def forever():
    while True:
        yield from DATA


class Watching(st.callbacks.Callback):
    """Notes what it is called with."""

    def __init__(self, every=1):
        self.every, self.calls = every, []

    def on_start(self, run):
        self.calls.append(("start", run.step))

    def on_step(self, run, row):
        self.calls.append(("step", run.step, row["loss"]))

    def on_evaluation(self, run, values):
        self.calls.append(("evaluation", run.step, dict(values)))

    def on_end(self, run):
        self.calls.append(("end", run.step, type(run.error).__name__))


class Looking(Watching):
    """Evaluates by itself, without saying that it needs the state."""

    def on_step(self, run, row):
        run.evaluate(HELD_OUT)


def model(mesh="data=2", **kwargs):
    return trainer(
        mesh, optimizer=optax.adam(0.01), model=Deep(), accumulate=kwargs.pop("accumulate", 1), **kwargs
    )


def test_a_callback_is_called_at_its_cadence_and_at_the_last_step():
    every, third = Watching(), Watching(every=3)
    rows = model().fit(forever(), steps=8, callbacks=[every, third], progress=False)
    steps = [("step", number, row["loss"]) for number, row in enumerate(rows, 1)]
    assert every.calls == [("start", 0), *steps, ("end", 8, "NoneType")]
    assert third.calls == [("start", 0), steps[2], steps[5], steps[7], ("end", 8, "NoneType")]


@pytest.mark.parametrize("mesh", [pytest.param("data=2", marks=pytest.mark.slow), "pipe=2"])
def test_an_evaluation_sees_the_weights_of_its_own_step(mesh):
    """Steps are read one behind the devices: a loop that did not wait would evaluate one update further."""
    parts = 4 if mesh.startswith("pipe") else 1
    ours, seen = model(mesh, accumulate=parts), Watching()
    evaluation = st.callbacks.Evaluation(lambda: iter(HELD_OUT), every=2)
    rows = ours.fit(forever(), steps=5, callbacks=[seen, evaluation], progress=False)
    assert [number for number, row in enumerate(rows, 1) if "validation_loss" in row] == [2, 4, 5]
    for steps in (2, 4, 5):
        alone = model(mesh, accumulate=parts)
        alone.fit(forever(), steps=steps, progress=False)
        expected = {f"validation_{name}": value for name, value in alone.evaluate(HELD_OUT).items()}
        assert rows[steps - 1]["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-12)
        assert ("evaluation", steps, {k: rows[steps - 1][k] for k in expected}) in seen.calls
    order = [call[:2] for call in seen.calls]
    assert order.index(("evaluation", 2)) < order.index(("step", 2)), "the row was not complete"


def test_an_evaluation_does_not_change_the_run():
    looked, plain = model(), model()
    evaluation = st.callbacks.Evaluation(HELD_OUT, every=1)
    ours = looked.fit(forever(), steps=6, callbacks=[evaluation], progress=False)
    theirs = plain.fit(forever(), steps=6, progress=False)
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert looked.examples == plain.examples == 96


def test_a_callback_that_evaluates_a_step_late_is_refused():
    with pytest.raises(
        UserError, match=r"evaluates at step 1 when the state is that of step .* needs_state = True"
    ):
        model().fit(forever(), steps=4, callbacks=[Looking()], progress=False)


def test_early_stopping_ends_where_the_metric_has_not_improved():
    values = iter([5.0, 4.0, 4.5, 3.9, 3.95, 3.94, 1.0])

    class Measured(st.callbacks.Callback):
        needs_state = True

        def on_step(self, run, row):
            row["validation_loss"] = next(values)

    stopping = st.callbacks.EarlyStopping("validation_loss", patience=2)
    ours = model()
    rows = ours.fit(forever(), steps=20, callbacks=[stopping, Measured()], progress=False)
    assert [row["validation_loss"] for row in rows] == [5.0, 4.0, 4.5, 3.9, 3.95, 3.94]
    assert int(ours.state.step) == 6, "a step was made after the end"


def test_early_stopping_by_more_counts_up_and_least_counts():
    stopping = st.callbacks.EarlyStopping("accuracy", patience=1, mode="max", least=0.1)
    for values, steps in (((0.5, 0.7, float("nan"), 1.0), 3), ((0.5, 0.55, 1.0), 2), ((0.7, 0.5, 1.0), 2)):
        stopping, given = st.callbacks.EarlyStopping("value", patience=1, mode="max", least=0.1), iter(values)

        class Giving(st.callbacks.Callback):
            needs_state = True

            def on_step(self, run, row, given=given):
                row["value"] = next(given)

        ours = model()
        ours.fit(forever(), steps=9, callbacks=[Giving(), stopping], progress=False)
        assert len(values) - len(list(given)) == steps


def test_the_best_checkpoint_is_the_best_by_validation(tmp_path):
    """The saves are at the evaluations that improve; a later, worse one does not replace the best."""
    values = iter([0.3, 0.8, 0.5, 0.6])

    class Measured(st.callbacks.Callback):
        needs_state, every = True, 2

        def on_step(self, run, row):
            value = {"validation_accuracy": next(values)}
            row |= value
            for callback in run.callbacks:
                callback.on_evaluation(run, value)

    ours = model()
    with st.Checkpoints(tmp_path, keep=1, best="validation_accuracy") as checkpoints:
        best = st.callbacks.BestCheckpoint()
        ours.fit(forever(), steps=7, callbacks=[Measured(), best], checkpoints=checkpoints, progress=False)
        assert checkpoints.best() == 4
        assert checkpoints.steps() == [4, 7]
        again = model()
        again.restore(checkpoints, 4)
    alone = model()
    alone.fit(forever(), steps=4, progress=False)
    for name, value in alone.state.params.items():
        np.testing.assert_array_equal(again.state.params[name], value)


def test_what_a_callback_raises_ends_the_run_and_every_callback_hears_of_it(tmp_path):
    class Failing(st.callbacks.Callback):
        def on_step(self, run, row):
            raise RuntimeError("the printer is on fire")

    seen, lines = Watching(), st.callbacks.JsonLines(tmp_path / "rows.jsonl")
    with pytest.raises(RuntimeError, match="printer"):
        model().fit(forever(), steps=4, callbacks=[seen, lines, Failing()], progress=False)
    assert seen.calls[-1] == ("end", 1, "RuntimeError")
    assert lines._file.closed
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1]


def test_the_terminal_counts_what_the_trainer_counts():
    text = io.StringIO()
    shown = st.callbacks.Terminal(Console(file=text, width=200))
    model(unit="sequences").fit(forever(), steps=3, callbacks=[shown], progress=False)
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    assert all("sequences/s" in line and "images" not in line for line in lines)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: st.callbacks.Evaluation(HELD_OUT, every=0),
            r"Evaluation\(every=0\): give a number of steps",
        ),
        (lambda: st.callbacks.Evaluation(iter(HELD_OUT), every=2), "can be read only once; give a function"),
        (lambda: st.callbacks.EarlyStopping("loss", patience=0), r"patience=0\): give 1 or more"),
        (lambda: st.callbacks.EarlyStopping("loss", patience=1, mode="up"), "there are 'max' and 'min'"),
        (lambda: st.callbacks.MLflow("mine", every=-1), "MLflow"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_metric_that_no_row_has_is_told_at_the_end():
    stopping = st.callbacks.EarlyStopping("validation_los", patience=2)
    with pytest.raises(UserError, match=r"no row has 'validation_los'; the last one has loss, accuracy"):
        model().fit(forever(), steps=2, callbacks=[stopping], progress=False)


def test_the_best_checkpoint_needs_checkpoints_that_have_a_best(tmp_path):
    with pytest.raises(UserError, match="BestCheckpoint saves by the metric of fit's checkpoints"):
        model().fit(forever(), steps=2, callbacks=[st.callbacks.BestCheckpoint()], progress=False)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"Weights & Biases needs the package wandb; type `pip install wandb`"
    ):
        st.callbacks.WandB("mine")


class Saving(st.callbacks.Callback):
    """Saves without saying that it needs the state."""

    def on_step(self, run, row):
        run.save()


def test_a_callback_that_saves_a_step_late_is_refused(tmp_path):
    """The state would be that of the next step, and its position that of this one."""
    with (
        st.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="a callback saves at step 1"),
    ):
        model().fit(forever(), steps=4, callbacks=[Saving()], checkpoints=checkpoints, progress=False)
    assert st.Checkpoints(tmp_path).steps() == []


@pytest.mark.parametrize("saves", [None, 1])
@pytest.mark.parametrize("stop", [False, True])
def test_the_last_step_is_evaluated_however_the_run_ends(saves, stop, tmp_path):
    """The batches may end early, a callback may stop the run, and a checkpoint may have read the step before."""

    class Stopping(st.callbacks.Callback):
        needs_state = True

        def on_step(self, run, row):
            if run.step == 3:
                run.stop("enough")

    feed = forever() if stop else iter(DATA)
    evaluation = st.callbacks.Evaluation(HELD_OUT, every=10)
    ours = model()
    with st.Checkpoints(tmp_path, every=saves) as checkpoints:
        rows = ours.fit(
            feed,
            steps=20,
            callbacks=[evaluation, *([Stopping()] if stop else [])],
            checkpoints=checkpoints,
            progress=False,
        )
    assert len(rows) == 3 == int(ours.state.step)
    assert ["validation_loss" in row for row in rows] == [False, False, True]
    assert rows[-1]["validation_loss"] == pytest.approx(ours.evaluate(HELD_OUT)["loss"], rel=1e-12)


def test_evaluations_save_the_best_with_its_scores(tmp_path):
    """By a real evaluation: the checkpoint that is the best by it, and the value in its manifest."""
    ours = model()
    with st.Checkpoints(tmp_path, keep=2, best="validation_loss", mode="min") as checkpoints:
        callbacks = [st.callbacks.BestCheckpoint(), st.callbacks.Evaluation(HELD_OUT, every=2)]
        rows = ours.fit(forever(), steps=8, callbacks=callbacks, checkpoints=checkpoints, progress=False)
        values = {number: row["validation_loss"] for number, row in enumerate(rows, 1) if number % 2 == 0}
        best = min(values, key=values.get)
        assert checkpoints.best() == best
        assert checkpoints.manifest(best)["metrics"]["validation_loss"] == values[best]


def test_evaluations_of_one_name_do_not_hide_each_other():
    callbacks = [st.callbacks.Evaluation(HELD_OUT, every=1) for _ in range(2)]
    with pytest.raises(UserError, match="has 'validation_accuracy' already; give each Evaluation a prefix"):
        model().fit(forever(), steps=1, callbacks=callbacks, progress=False)
    alone = st.callbacks.Evaluation(HELD_OUT, every=1, prefix="")
    with pytest.raises(UserError, match="already; give each Evaluation a prefix"):
        model().fit(forever(), steps=1, callbacks=[alone], progress=False)


def test_every_callback_that_started_hears_of_the_end():
    """One that fails at the end keeps no other from it; one that never started is not told."""

    class Failing(st.callbacks.Callback):
        def on_end(self, run):
            raise RuntimeError("the mail server is away")

    class NotStarting(st.callbacks.Callback):
        def on_start(self, run):
            raise RuntimeError("no such printer")

    first, last = Watching(), Watching()
    with pytest.raises(RuntimeError, match="mail server"):
        model().fit(forever(), steps=1, callbacks=[first, Failing(), last], progress=False)
    assert first.calls[-1][0] == last.calls[-1][0] == "end"
    first, last = Watching(), Watching()
    with pytest.raises(RuntimeError, match="no such printer"):
        model().fit(forever(), steps=1, callbacks=[first, NotStarting(), last], progress=False)
    assert [call[0] for call in first.calls] == ["start", "end"]
    assert last.calls == []


def test_early_stopping_begins_anew_with_every_run():
    stopping, ours = st.callbacks.EarlyStopping("loss", patience=100), model()
    ours.fit(forever(), steps=2, callbacks=[stopping], progress=False)
    stopping._best.value, stopping._waited = float("inf"), 99
    assert len(ours.fit(forever(), steps=8, callbacks=[stopping], progress=False)) == 6


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (print, "is no st.callbacks.Callback"),
        (Watching, "is no st.callbacks.Callback"),
        (Watching(0), r"Watching\(every=0\): give a number of steps"),
        (Watching(2.5), r"Watching\(every=2.5\)"),
        (
            st.callbacks.EarlyStopping("validation_confusion", patience=2),
            "'validation_confusion' is an array",
        ),
    ],
)
def test_what_is_no_callback_is_refused(callback, sentence):
    ours = model(metrics={"confusion": st.metrics.confusion_matrix(5)})
    evaluation = st.callbacks.Evaluation(HELD_OUT, every=1)
    with pytest.raises(UserError, match=sentence):
        ours.fit(forever(), steps=2, callbacks=[evaluation, callback], progress=False)


def test_services_get_every_row(monkeypatch):
    """Against modules that note what they are called with; the real ones are not installed everywhere."""
    logged = []

    class Noting(types.ModuleType):
        def __getattr__(self, name):
            return lambda *args, **kwargs: logged.append((name, args, kwargs)) or self

    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, Noting(name))
    callbacks = [st.callbacks.MLflow("mine", parameters={"lr": 0.1}, every=2), st.callbacks.WandB("mine")]
    rows = model().fit(forever(), steps=4, callbacks=callbacks, progress=False)
    sent = [(kwargs["step"], args[0]["loss"]) for name, args, kwargs in logged if name == "log_metrics"]
    assert sent == [(2, rows[1]["loss"]), (4, rows[3]["loss"])]
    sent = [(kwargs["step"], args[0]["loss"]) for name, args, kwargs in logged if name == "log"]
    assert sent == [(number, row["loss"]) for number, row in enumerate(rows, 1)]
    assert ("log_params", ({"lr": 0.1},), {}) in logged
    assert [args for name, args, _ in logged if name == "end_run"] == [("FINISHED",)]
    assert [kwargs for name, _, kwargs in logged if name == "finish"] == [{"exit_code": 0}]
