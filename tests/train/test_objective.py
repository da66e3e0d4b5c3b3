"""Objectives: what a user's own function minimizes, on every mesh as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pipelined_models import Deep, batches, close, trainer
from unchecked import made

import shardtrain as st
from shardtrain import UserError

MESHES = ["channel=4", "pipe=2,data=2"]
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("data=2,channel=2", "pipe=2,channel=2")]
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


def test_rates_that_a_schedule_computes_are_refused_and_groups_change_together():
    schedule = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.1, 0.0, 10))
    ours = trainer("data=2", model=Deep(), optimizer=schedule)
    assert ours.hyperparameters == {}
    with pytest.raises(UserError, match="the optimizer has none"):
        ours.set_hyperparameters(learning_rate=0.0)
    part = optax.inject_hyperparams(optax.sgd)
    groups = optax.multi_transform(
        {"a": part(learning_rate=0.1), "b": part(learning_rate=0.2)},
        lambda params: {name: "a" if "head" in name else "b" for name in params},
    )
    for options in ({}, {"parameters": "data"}):
        ours = trainer("data=2", model=Deep(), optimizer=groups, **options)
        before = {name: np.array(value) for name, value in ours.state.params.items()}
        with pytest.raises(UserError, match="give a number"):
            ours.set_hyperparameters(learning_rate="fast")
        ours.set_hyperparameters(learning_rate=0.0)
        ours.fit(iter(DATA), steps=2, progress=False)
        close(dict(ours.state.params), before, 0)


def test_names_that_an_objective_returns_are_looked_at_too():
    def lying(model, batch, context):
        loss = st.losses.cross_entropy(model(batch[0]), batch[1])
        return loss, {"loss": 0 * loss}

    def alone(model, batch, context):
        return st.losses.cross_entropy(model(batch[0]), batch[1])

    for objective, words in (
        (lying, "use this name for a number of their own"),
        (alone, "return the loss of each"),
    ):
        with pytest.raises(UserError, match=words):
            trainer("data=2", model=Deep(), objective=objective).fit(iter(DATA), steps=1, progress=False)


def test_sums_are_taken_in_float32_at_least():
    """In float16 a thousand losses of 30 would be infinite."""

    def large(model, batch, context):
        loss = st.losses.cross_entropy(model(batch[0]), batch[1])
        return (30.0 + 0 * loss).astype(jnp.float16), {"level": (60.0 + 0 * loss).astype(jnp.float16)}

    x, y = batches(size=2048, count=2048)[0]
    ours = trainer("data=2", model=Deep(), objective=large, dtype="float16")
    (row,) = ours.fit(iter([(x, y)]), steps=1, progress=False)
    assert (row["loss"], row["level"]) == (30.0, 60.0)


def test_the_context_tells_examples_apart_and_which_are_real():
    """By microbatch, stage and mesh the same numbers; rows that fill up may hold anything."""

    def numbered(model, batch, context):
        loss = st.losses.cross_entropy(model(batch[0]), batch[1])
        index = context.index.astype(loss.dtype)
        garbage = loss if context.real is None else jnp.where(context.real, loss, jnp.nan)
        return garbage, {"index": index**2, "filled": index - 100 * (1 - context.weights)}

    ragged = [DATA[0], (DATA[1][0][:7], DATA[1][1][:7])]
    for mesh in ("data=1", "data=4", "pipe=2,data=2"):
        rows = trainer(mesh, model=Deep(), objective=numbered).fit(iter(ragged), steps=2, progress=False)
        expected = [float((np.arange(n) ** 2).mean()) for n in (16, 7)]
        assert [row["index"] for row in rows] == pytest.approx(expected), mesh
        assert rows[1]["filled"] == pytest.approx(3.0)
        assert np.isfinite(rows[1]["loss"])


@pytest.mark.parametrize("mesh", ["data=2", "pipe=2"])
def test_an_objective_without_targets_trains_and_is_evaluated(mesh):
    def spread_out(model, batch, context):
        images, nothing = batch
        assert nothing is None
        return ((model(images) - 1) ** 2).mean(-1), {}

    given = [(x, None) for x, _ in DATA]
    ours, plain = (trainer(m, model=Deep(), objective=spread_out) for m in (mesh, "data=1"))
    rows, expected = (one.fit(iter(given), steps=3, progress=False) for one in (ours, plain))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-10)
    found = ours.evaluate(given)["loss"]
    outputs = np.concatenate([ours.predict(x) for x, _ in given])
    assert found == pytest.approx(((outputs - 1) ** 2).mean(), rel=1e-10)


def wrong_labels():
    x, y = DATA[0]
    return {
        "the labels have dtype float64 and shape (16,); cross_entropy takes classes": (x, y.astype(float)),
        "a number for each class; cross_entropy takes one class: give labels.argmax(-1)": (x, np.eye(5)[y]),
        "shape (16, 1) for outputs of shape (16, 5); give labels.squeeze(-1)": (x, y[:, None]),
        "shape (16, 2) for outputs of shape (16, 5); give labels of shape (16,)": (x, np.stack([y, y], 1)),
        "the targets are NoneType, and cross_entropy takes an array of labels": (x, None),
    }


@pytest.mark.parametrize("words", wrong_labels())
def test_targets_that_are_no_labels_are_refused(words):
    ours = trainer("data=1", model=Deep(), accumulate=1)
    with pytest.raises(UserError) as refused:
        ours.fit(iter([wrong_labels()[words]]), steps=1, progress=False)
    assert words in str(refused.value)


def test_metrics_that_do_not_fit_their_sums_are_refused():
    def forgetful(model, batch, context):
        return st.losses.cross_entropy(model(batch[0]), batch[1]), {}

    def values(model, batch, context):
        loss = st.losses.cross_entropy(model(batch[0]), batch[1])
        return loss, {"top2": loss}

    sums = st.metrics.Metric(lambda outputs, targets, weights: weights.sum(), lambda total: {"all": total})
    options = {"metrics": {"top2": TOP}}
    with pytest.raises(UserError, match="the objective returned no 'top2' in evaluation"):
        trainer("data=1", model=Deep(), objective=forgetful, **options).evaluate(DATA)
    with pytest.raises(UserError, match=r"metric 'top2': finish failed on sums of the shapes \(16,\)"):
        trainer("data=1", model=Deep(), objective=values, **options).evaluate(DATA)
    with pytest.raises(UserError, match=r"metric 'odd': finish failed .* return .* a number or an array"):
        trainer("data=1", model=Deep(), metrics={"odd": sums}).evaluate(DATA)
    with pytest.raises(UserError, match="give a dictionary of names and metrics"):
        made(st.Trainer, Deep(), optax.sgd(0.1), metrics=[TOP])


@pytest.mark.parametrize("unit", ["", "images per hour", 3])
def test_a_unit_is_a_word(unit):
    with pytest.raises(UserError, match="rows name it"):
        made(st.Trainer, Deep(), optax.sgd(0.1), unit=unit)


class Pixels(nnx.Module):
    def __init__(self):
        self.conv = st.nn.Conv(3, 4, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.conv(x)


@pytest.mark.parametrize("mesh", ["data=2", "data=2,height=3"])
def test_pixels_that_are_ignored_have_no_part_in_loss_and_gradient(mesh):
    """The reference is the loss of the other pixels alone, written out."""
    r = np.random.default_rng(0)
    x, y = r.normal(size=(8, 6, 5, 3)), r.integers(0, 4, (8, 6, 5))
    y[:, :3], y[5] = 255, 255
    model = Pixels()

    def loss(kernel, bias):
        z = st.ops.conv(jnp.asarray(x), kernel, bias, padding="SAME")
        nll = -jnp.take_along_axis(jax.nn.log_softmax(z), np.where(y == 255, 0, y)[..., None], -1)[..., 0]
        counts = y != 255
        return (jnp.where(counts, nll, 0).sum((1, 2)) / np.maximum(counts.sum((1, 2)), 1)).mean()

    value, grads = jax.value_and_grad(loss, (0, 1))(model.conv.kernel[...], model.conv.bias[...])
    ignoring = functools.partial(st.losses.pixel_cross_entropy, ignore_label=255)
    dice = functools.partial(st.losses.dice, ignore_label=255)
    options = {"accumulate": 1}
    ours = trainer(mesh, optax.sgd(1.0), model, loss=ignoring, metrics={"dice": dice}, **options)
    (row,) = ours.fit([(x, y)], steps=1, progress=False)
    assert row["loss"] == pytest.approx(float(value), rel=1e-10)
    new = ours._named().params
    close(np.asarray(new["conv.kernel"]), np.asarray(model.conv.kernel[...] - grads[0]))
    close(np.asarray(new["conv.bias"]), np.asarray(model.conv.bias[...] - grads[1]))
    with pytest.raises(UserError, match=r"label 255, and .* 4 classes, from 0 to 3.*ignore_label=255"):
        trainer(mesh, model=Pixels(), loss=st.losses.pixel_cross_entropy, **options).fit(
            [(x, y)], steps=1, progress=False
        )


@pytest.mark.parametrize("label", [-1, 5, 255])
def test_labels_that_are_no_classes_are_refused_or_not_a_number(label):
    x, y = DATA[0][0], np.where(np.arange(16) == 3, label, DATA[0][1])
    for call in ("fit", "evaluate"):
        ours = trainer("data=2", model=Deep(), accumulate=1)
        given = {"steps": 1, "progress": False} if call == "fit" else {}
        with pytest.raises(UserError, match=f"the label {label}, and the model's outputs are for 5 classes"):
            getattr(ours, call)([(x, y)], **given)
    logits, labels = jnp.zeros((2, 5)), jnp.array([1, label])
    assert jnp.isnan(st.losses.cross_entropy(logits, labels)).tolist() == [False, True]
    maps = jnp.zeros((2, 1, 1, 5)), labels.reshape(2, 1, 1)
    assert jnp.isnan(st.losses.pixel_cross_entropy(*maps)).tolist() == [False, True]
