"""Objectives: what a user's own function minimizes, on every mesh as on one device."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pipelined_models import Deep, batches, close, trainer

import shardtrain as st
from shardtrain import UserError

MESHES = ["data=2,channel=2", "channel=4", "pipe=2,data=2", "pipe=2,channel=2"]
DATA = batches()


def weighted(model, batch, context):
    """Class weights, an auxiliary loss on the outputs, and two metrics, one of them as sums."""
    images, labels = batch
    logits = model(images)
    weights = jnp.array([1.0, 2.0, 0.5, 1.0, 3.0])[labels]
    loss = weights * st.losses.cross_entropy(logits, labels) + 0.01 * (logits**2).mean(-1)
    sums = TOP.sums(logits, labels, context.weights)
    return loss, {"margin": logits.max(-1) - logits.min(-1), "top2": sums}


def unweighted(model, batch, context):
    """A wrong variant: the weights are forgotten."""
    images, labels = batch
    logits = model(images)
    return st.losses.cross_entropy(logits, labels) + 0.01 * (logits**2).mean(-1), {}


TOP = st.metrics.top_k(2)


def fitted(mesh, objective=weighted, **kwargs):
    ours = trainer(mesh, model=Deep(), objective=objective, metrics={"top2": TOP}, **kwargs)
    return ours, ours.fit(iter([*DATA, (DATA[0][0][:5], DATA[0][1][:5])]), steps=4, progress=False)


@pytest.fixture(scope="module")
def reference():
    return fitted("data=1")


@pytest.mark.parametrize("mesh", MESHES)
def test_an_objective_is_the_same_on_every_mesh(mesh, reference):
    """The last batch is ragged, and the batch is accumulated."""
    ours, rows = fitted(mesh)
    for row, expected in zip(rows, reference[1], strict=True):
        for name in ("loss", "margin", "top2", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-10), name
    close(ours._named().params, reference[0]._named().params)
    values = [one.evaluate(batches(count=40)) for one in (ours, reference[0])]
    assert values[0] == pytest.approx(values[1], rel=1e-10)
    assert set(values[0]) == {"loss", "margin", "top2"}


def test_an_objective_is_what_its_closed_form_says(reference):
    """The first loss, from numpy alone."""
    x, y = DATA[0]
    logits = np.asarray(trainer("data=1", model=Deep()).model(jnp.asarray(x)), np.float64)
    weights = np.array([1.0, 2.0, 0.5, 1.0, 3.0])[y]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(y)), y]
    expected = (weights * nll + 0.01 * (logits**2).mean(-1)).mean()
    assert reference[1][0]["loss"] == pytest.approx(expected, rel=1e-12)
    assert reference[1][0]["margin"] == pytest.approx((logits.max(-1) - logits.min(-1)).mean(), rel=1e-12)
    best = np.argsort(-logits, axis=-1)[:, :2]
    assert reference[1][0]["top2"] == pytest.approx((best == y[:, None]).any(-1).mean(), rel=1e-12)
    assert abs(fitted("data=1", unweighted)[1][0]["loss"] - expected) > 0.1, "the wrong variant passes"


def test_the_short_form_is_an_objective():
    def plain(model, batch, context):
        outputs = model(batch[0])
        right = (outputs.argmax(-1) == batch[1]).astype(outputs.dtype)
        return st.losses.cross_entropy(outputs, batch[1]), {"accuracy": right}

    losses = []
    for options in ({"objective": plain}, {"loss": st.losses.cross_entropy}, {}):
        rows = trainer("data=2", model=Deep(), **options).fit(iter(DATA), steps=3, progress=False)
        losses.append([(row["loss"], row["accuracy"]) for row in rows])
    assert losses[0] == losses[1] == losses[2]


def test_training_and_evaluation_are_told_apart():
    """Metrics that are not for every step are in evaluations only."""
    counts = {"confusion": st.metrics.confusion_matrix(5), "top2": TOP}
    ours = trainer("data=2,channel=2", model=Deep(), metrics=counts)
    rows = ours.fit(iter(DATA), steps=3, progress=False)
    assert {"top2"} == set(rows[0]) & set(counts)
    x, y = DATA[0]
    found = ours.evaluate([(x, y), (x[:3], y[:3])])
    predicted = ours.predict(x).argmax(-1)
    expected = np.zeros((5, 5), int)
    for label, guess in zip([*y, *y[:3]], [*predicted, *predicted[:3]], strict=True):
        expected[label, guess] += 1
    np.testing.assert_array_equal(found["confusion"], expected)


@pytest.mark.parametrize("name", ["loss", "examples", "images_per_second", "grad_norm", "step", ""])
def test_names_that_rows_use_are_refused(name):
    """With such a name the model would be trained on the metric, or means would be wrong."""
    with pytest.raises(UserError, match="a run's rows use this name for a number of their own"):
        trainer("data=2", model=Deep(), metrics={name: st.losses.cross_entropy})


def test_what_an_objective_may_not_return():
    def mean(model, batch, context):
        return st.losses.cross_entropy(model(batch[0]), batch[1]).mean(), {}

    def scalar(model, batch, context):
        loss = st.losses.cross_entropy(model(batch[0]), batch[1])
        return loss, {"norm": (loss**2).sum()}

    for objective, words in ((mean, "loss returned shape ()"), (scalar, "norm returned shape ()")):
        with pytest.raises(UserError) as refused:
            trainer("data=2", model=Deep(), objective=objective).fit(iter(DATA), steps=1, progress=False)
        assert words in str(refused.value)
    with pytest.raises(UserError, match="both loss= and objective= say what to minimize"):
        trainer("data=2", model=Deep(), objective=mean, loss=st.losses.cross_entropy)


def test_sequences_are_counted_as_sequences():
    rows = trainer("data=2", model=Deep(), unit="sequences").fit(iter(DATA), steps=1, progress=False)
    assert "sequences_per_second" in rows[0]
    assert not [name for name in rows[0] if "images" in name]


def test_rates_change_between_steps_without_compiling_again():
    """Half of the steps at another rate are those of an optimizer with that schedule."""
    for mesh in ("data=2", "pipe=2"):
        ours = trainer(mesh, model=Deep(), optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
        rows = ours.fit(iter(DATA), steps=2, progress=False)
        assert ours.hyperparameters == pytest.approx({"learning_rate": 0.1})
        ours.set_hyperparameters(learning_rate=0.02)
        assert ours.hyperparameters == pytest.approx({"learning_rate": 0.02})
        rows += ours.fit(iter([DATA[2], *DATA]), steps=6, progress=False)
        assert len([kind for kind, *_ in ours._steps if kind == "train"]) == 1
        schedule = optax.piecewise_constant_schedule(0.1, {2: 0.2})
        theirs = trainer("data=1", model=Deep(), optimizer=optax.sgd(schedule))
        expected = theirs.fit(iter([*DATA, *DATA]), steps=6, progress=False)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
        with pytest.raises(
            UserError, match=r"set_hyperparameters\(rate=...\): the optimizer has learning_rate"
        ):
            ours.set_hyperparameters(rate=0.1)
