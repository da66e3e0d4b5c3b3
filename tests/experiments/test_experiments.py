"""Experiments are a library: they print nothing, run again and again, and give what the trainer gives."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain import UserError
from shardtrain.experiments import Config, Experiment, Task, make_optimizer, run

DIGITS = st.data.load("digits")


class Net(nnx.Module):
    def __init__(self, seed):
        self.flatten = st.nn.Flatten()
        self.hidden = st.nn.Linear(64, 16, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
        self.head = st.nn.Linear(16, 10, param_dtype=jnp.float64, rngs=nnx.Rngs(seed + 1))

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(self.flatten(x))))


def task(seed=0, **kwargs):
    return Task(
        name="net",
        make=lambda: Net(seed),
        train=partial(st.data.train_batches, DIGITS.train, 64, seed=0),
        test=lambda rows: st.data.eval_batches(DIGITS.test, 64, rows=rows),
        **kwargs,
    )


CONFIG = Config(mesh="data=2", steps=6, batch_size=64, lr=0.1, lr_schedule="constant")


def test_a_run_prints_and_writes_nothing_and_repeats_itself(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = [run(task(), CONFIG) for _ in range(2)]
    other = run(task(seed=5), CONFIG)
    assert results[0].losses == results[1].losses != other.losses
    assert results[0].test == results[1].test
    said = capfd.readouterr()
    assert said.out == ""
    assert "step" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_what_the_trainer_does():
    found = run(task(), CONFIG)
    decay = optax.add_decayed_weights(5e-4, mask=lambda p: {name: name.endswith("kernel") for name in p})
    optimizer = optax.chain(decay, optax.sgd(0.1, momentum=0.9))
    plain = st.Trainer(Net(0), optimizer, mesh=st.make_mesh("data=2"))
    rows = plain.fit(st.data.train_batches(DIGITS.train, 64, seed=0), steps=6, progress=False)
    np.testing.assert_allclose(found.losses, [row["loss"] for row in rows], rtol=1e-6)
    assert found.test["accuracy"] == pytest.approx(
        plain.evaluate(st.data.eval_batches(DIGITS.test, 64))["accuracy"], abs=1e-9
    )
    assert {row["kind"] for row in found.census} == {"all-reduce"}


@pytest.mark.parametrize("name", st.experiments.OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_optimizers_by_name_are_those_of_optax(name, schedule):
    """With numbers in their state, which change nothing while nobody changes them."""
    config = Config(optimizer=name, lr=0.01, lr_schedule=schedule, steps=5, weight_decay=0.1)
    rate = 0.01
    if schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.001, 0.01, 1, 5)

    def kernels(params):
        return {key: key.endswith("kernel") for key in params}

    plain = {
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(0.1, mask=kernels), optax.sgd(rate, momentum=0.9)
        ),
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate, weight_decay=0.1, mask=kernels),
        "lamb": lambda: optax.lamb(rate, weight_decay=0.1, mask=kernels),
    }[name]()
    params = {"a.kernel": jnp.linspace(-1, 2, 6).reshape(2, 3), "a.bias": jnp.ones(3)}
    ours, theirs = params, params
    one = make_optimizer(config)
    states = [one.init(params), plain.init(params)]
    for step in range(5):
        grads = jax.tree.map(lambda x, k=step: jnp.cos(x + k), params)
        updates, states[0] = one.update(grads, states[0], ours)
        ours = optax.apply_updates(ours, updates)
        updates, states[1] = plain.update(grads, states[1], theirs)
        theirs = optax.apply_updates(theirs, updates)
    for key in params:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-6, err_msg=key)


def test_a_rate_is_changed_while_the_experiment_runs():
    """A callback halves it; the program is compiled once."""

    class Halving(st.callbacks.Callback):
        needs_state = True

        def on_step(self, run, row):
            if run.step == 3:
                run.trainer.set_hyperparameters(learning_rate=0.05)

    experiment = Experiment(task(), CONFIG)
    halved = experiment.run(callbacks=[Halving()])
    kept = run(task(), CONFIG)
    assert halved.losses[:4] == kept.losses[:4]
    assert halved.losses[4:] != kept.losses[4:]
    assert len([kind for kind, *_ in experiment.trainer._steps if kind == "train"]) == 1


def test_validation_is_in_the_rows():
    held_out = st.data.Arrays(DIGITS.train.images[:100], DIGITS.train.labels[:100])
    with_validation = task(validation=lambda rows: st.data.eval_batches(held_out, 64, rows=rows))
    found = run(with_validation, Config(mesh="data=2", steps=5, batch_size=64, validate_every=2))
    assert [step for step, row in enumerate(found.rows, 1) if "validation_accuracy" in row] == [2, 4, 5]
    last = found.trainer.evaluate(st.data.eval_batches(held_out, 64))
    assert found.rows[-1]["validation_loss"] == pytest.approx(last["loss"], rel=1e-12)


def test_what_a_configuration_gets_wrong_is_one_sentence():
    with pytest.raises(UserError, match="optimizer='adamax'; there are sgd, adam, adamw, lamb"):
        run(task(), Config(mesh="data=2", optimizer="adamax"))
    with pytest.raises(UserError, match="the task 'net' has no validation batches"):
        run(task(), Config(mesh="data=2", validate_every=5))
    with pytest.raises(UserError, match="a batch of 64 does not divide"):
        run(task(), Config(mesh="data=2", batch_size=64, accumulate=5))
    whole = dataclasses.replace(
        task(), train=lambda *, start, rows: iter([next(task().train(start=0, rows=range(64)))])
    )
    with pytest.raises(UserError, match="have 64 rows in this process, and batch_size=32 means 32"):
        run(whole, Config(mesh="data=2", batch_size=32))
    for name, value in {"steps": 0, "lr": "a", "on_nan": "x", "lr_schedule": "linear"}.items():
        config = Config(mesh="data=2", batch_size=64)
        object.__setattr__(config, name, value)  # past the checks of types that are on in tests alone
        with pytest.raises(UserError, match=f"{name}={value!r}"):
            run(task(), config)


def test_a_bad_step_is_acted_on_as_the_configuration_says():
    def broken(*, start, rows):
        for number, (x, y) in enumerate(st.data.train_batches(DIGITS.train, 64, seed=0)):
            yield (x * np.nan if number == 1 else x), y

    bad = dataclasses.replace(task(), train=broken)
    config = Config(mesh="data=2", steps=4, batch_size=64)
    with pytest.raises(UserError, match="step 2, examples 64 to 127: the loss is nan"):
        run(bad, config)
    found = run(bad, dataclasses.replace(config, on_nan="skip"))
    assert np.isfinite(found.losses[2:]).all()


def margins(model, batch, context):
    """An objective whose metric is in no table."""
    images, labels = batch
    logits = model(images)
    return st.losses.cross_entropy(logits, labels), {"margin": logits.max(-1) - logits.min(-1)}


@pytest.mark.parametrize(
    ("options", "score"),
    [
        ({}, "accuracy"),
        ({"score": "loss"}, "loss"),
        ({"metrics": {"top2": st.metrics.top_k(2), "accuracy": st.losses.accuracy}}, "top2"),
        ({"metrics": {}}, "loss"),
        ({"objective": margins}, "margin"),
    ],
)
def test_the_score_is_the_first_of_the_metrics_unless_the_task_names_one(options, score):
    experiment = Experiment(task(**options), CONFIG)
    experiment.prepare()
    assert experiment.score == score
    if "objective" in options:
        assert experiment.trainer.measured == ["margin"]
        assert set(experiment.run().test) == {"loss", "margin"}


def test_a_score_that_is_not_measured_is_refused_before_the_run():
    experiment = Experiment(task(score="f1"), CONFIG)
    with pytest.raises(UserError, match="score='f1'; there are loss, accuracy"):
        experiment.prepare()
