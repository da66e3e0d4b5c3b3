"""Ordinary mistakes from Python: one sentence with what was given, what is possible, and what to type."""

import inspect
import logging

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pipelined_models import Deep, batches, trainer
from unchecked import made

import shardtrain as st
from shardtrain import UserError

((X, Y),) = batches(count=16)


class Linen(flax.linen.Module):
    pass


class Odd(Deep):
    """A layer more, or an output that a user has added."""

    def __init__(self, variable=None, output=None):
        super().__init__()
        self.variable, self.output = variable, output

    def __call__(self, x):
        y = super().__call__(x)
        return y if self.output is None else (y, self.output(y))


def first(outputs, targets):
    return st.losses.cross_entropy(outputs[0], targets)


def trained(batches, **options):
    one = trainer("data=2", model=Deep(), accumulate=1)
    return inspect.unwrap(st.Trainer.fit)(one, batches, **({"steps": 1, "progress": False} | options))


def predicted(inputs, **options):
    one = trainer("data=2", **({"model": Deep(), "accumulate": 1} | options))
    one.fit([(X, Y)], steps=1, progress=False)
    return one.predict(inputs)


MISTAKES = {
    "the model is the class Deep; give an instance, such as Deep(": lambda: made(
        st.Trainer, Deep, optax.sgd(0.1)
    ),
    "a Linen module; write it with flax.nnx": lambda: made(st.Trainer, Linen(), optax.sgd(0.1)),
    "the model is builtins.int; give an instance": lambda: made(st.Trainer, 3, optax.sgd(0.1)),
    "make_mesh(4): give axes and sizes as text, such as make_mesh('data=4')": lambda: made_mesh(4),
    "such as make_mesh('data=2,height=2')": lambda: made_mesh({"data": 2, "height": 2}),
    "there is no axis 'hight'": lambda: made(st.Trainer, Deep(), optax.sgd(0.1), mesh="hight=2"),
    "a batch is an array of shape (16, 4, 4, 2), and must be (inputs, targets)": lambda: trained((X, Y)),
    "a batch is an array of shape (4, 4, 2), and": lambda: trained(X),
    "a batch is a tuple of 3": lambda: trained([(X, Y, Y)]),
    "a batch is a dictionary of image, label": lambda: trained([{"image": X, "label": Y}]),
    "a batch's inputs are a list of numbers": lambda: predicted([1.0, 2.0]),
    "for one example inputs[None]": lambda: predicted(X[0]),
    "fit(steps=7.5): give a whole number": lambda: trained([(X, Y)], steps=7.5),
    "a batch has an array of <U1 and shape (16,)": lambda: trained(
        [({"x": X, "file": np.array(list("a" * 16))}, Y)]
    ),
    "'variable' is an nnx.Variable of int; give it an array": lambda: trainer(
        "data=2", model=Odd(nnx.Variable(0)), accumulate=1
    ),
    "an output of shape () for 16 examples has no row": lambda: predicted(
        X, model=Odd(output=lambda y: y.mean()), loss=first
    ),
}


def made_mesh(spec):
    return inspect.unwrap(st.make_mesh)(spec)


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_a_sentence(words):
    with pytest.raises(UserError) as refused:
        MISTAKES[words]()
    assert words in str(refused.value)


def test_a_mesh_may_be_text():
    one = st.Trainer(Deep(), optax.sgd(0.1), mesh="data=2")
    assert dict(one.mesh.shape) == {"data": 2}


def test_a_second_fit_with_as_many_steps_says_that_they_are_done(caplog):
    one = trainer("data=2", model=Deep(), accumulate=1)
    one.fit([(X, Y)] * 2, steps=2, progress=False)
    with caplog.at_level(logging.WARNING, "shardtrain"):
        assert one.fit([(X, Y)] * 2, steps=2, progress=False) == []
    assert "steps=2 counts all updates, and 2 are done: there is nothing to do" in caplog.text


class Loss(nnx.Variable):
    pass


class Keeps(Deep):
    """Keeps a part of its loss, as Flax's example of a variational autoencoder does."""

    def __call__(self, x):
        self.part = Loss((x**2).mean((1, 2, 3)))
        return super().__call__(x)


@pytest.mark.parametrize("mesh", ["data=2", "pipe=2"])
def test_a_variable_that_the_forward_pass_makes_is_there_for_the_objective_and_dropped(mesh):
    def both(model, batch, context):
        logits = model(batch[0])
        return st.losses.cross_entropy(logits, batch[1]) + model.part[...], {}

    for objective in (both, None):
        one = trainer(mesh, model=Keeps(), objective=objective)
        (row,) = one.fit([(X, Y)], steps=1, progress=False)
        (plain,) = trainer("data=1", model=Deep()).fit([(X, Y)], steps=1, progress=False)
        more = 0 if objective is None else float(jnp.mean(X**2))
        assert row["loss"] == pytest.approx(plain["loss"] + more, rel=1e-10)
        assert not [name for name in one._named().model_state if "part" in name]


class Spectral(nnx.Module):
    """A Fourier layer of a user's own between two of ours."""

    def __init__(self, own=True):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.first, self.norm, self.own = st.nn.Conv(1, 8, (3, 3), **kinds), st.nn.BatchNorm(8, **kinds), own
        self.last = st.nn.Conv(8, 1, (1, 1), **kinds)

    def __call__(self, x):
        x = nnx.gelu(self.norm(self.first(x)))
        if self.own:
            x = jnp.fft.irfft2(jnp.fft.rfft2(x, axes=(1, 2)), x.shape[1:3], axes=(1, 2))
        return self.last(x)


# XLA on CPUs stops at a layout of a transform that it has chosen itself.
MICROBATCHES = pytest.param(
    {"accumulate": 2, "remat": "nothing"},
    marks=pytest.mark.xfail(
        jax.__version_info__ >= (0, 12),
        reason="XLA's own fft of jax 0.12 fails",
        raises=jax.errors.JaxRuntimeError,
    ),
)


@pytest.mark.parametrize("options", [{}, MICROBATCHES, {"parameters": "height"}])
def test_what_xla_gathers_between_layers_is_said(options, caplog):
    """586 KiB in silence, once; layers of ours alone are no reason for a word."""
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 1))
    said = {}
    for own in (True, False):
        caplog.clear()
        one = st.Trainer(
            Spectral(own),
            optax.sgd(0.1),
            loss=st.losses.mean_squared_error,
            mesh="data=2,height=2,channel=2",
            **options,
        )
        with caplog.at_level(logging.WARNING, "shardtrain"):
            one.fit([(x, x)], steps=1, progress=False)
        said[own] = [text for text in caplog.messages if "between the layers" in text]
    assert said[False] == []
    assert any("(Spectral.__call__)" in text and "KiB of it over height" in text for text in said[True])


class Sorts(nnx.Module):
    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.conv, self.head = st.nn.Conv(1, 4, (3, 3), **kinds), st.nn.Linear(4, 5, **kinds)

    def __call__(self, x):
        x = jnp.sort(self.conv(x), axis=2)
        return self.head(st.ops.global_avg_pool(jnp.tanh(x) * jnp.arange(x.shape[2])[:, None]))


def rows(extent):
    return np.random.default_rng(0).normal(size=(8, extent, 10, 1)), np.arange(8) % 5


def test_a_sort_that_xla_cannot_compile_is_refused_and_others_are_right():
    """13 rows on eight devices would abort the process, without an exception."""
    with pytest.raises(
        UserError, match=r"sorts an array of shape \(8, 13, 10, 4\).*height of 13 does not divide"
    ):
        st.Trainer(Sorts(), optax.sgd(0.1), mesh="height=8").fit([rows(13)], steps=1, progress=False)
    found = [
        st.Trainer(Sorts(), optax.sgd(0.1), mesh=mesh).fit([rows(8)], steps=1, progress=False)[0]["loss"]
        for mesh in ("data=1", "height=4", "height=2,width=2")
    ]
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-10)


class AnyPixels(nnx.Module):
    """Pixels are cut by operators and by layers that take any number of them."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.one, self.pool, self.head = (
            st.nn.Linear(1, 4, **kinds),
            st.nn.MaxPool(3, 1),
            st.nn.Linear(4, 5, **kinds),
        )

    def __call__(self, x):
        x = st.ops.conv(self.one(x), jnp.ones((3, 3, 4, 4)) / 36)
        return self.head(st.ops.global_avg_pool(self.pool(x)))


def test_layers_of_any_pixels_are_cut_where_the_inputs_have_pixels():
    found = [
        st.Trainer(AnyPixels(), optax.sgd(0.1), mesh=mesh).fit([rows(8)], steps=1, progress=False)[0]["loss"]
        for mesh in ("data=1", "height=2", "height=2,width=2")
    ]
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-10)
    with pytest.raises(UserError, match="depth=2 cuts nothing in this model with inputs of shape"):
        st.Trainer(AnyPixels(), optax.sgd(0.1), mesh="depth=2").fit([rows(8)], steps=1, progress=False)
