"""A model's own random draws: the same numbers with and without microbatches, and on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.nn.draws import Part

X = np.random.default_rng(0).normal(size=(16, 4))
PARTS = 4


class Noisy(nnx.Module):
    """Noise, stochastic depth, a plain dropout, and a key for each example; some of it in a later stage.

    Of a batch of keys the generators "rbg" and "unsafe_rbg" use the first alone, so they have none here.
    """

    def __init__(self, impl):
        kinds = {"param_dtype": jnp.result_type(float), "rngs": nnx.Rngs(0)}
        self.first, self.second = st.nn.Linear(4, 4, **kinds), st.nn.Linear(4, 4, **kinds)
        self.by_key = impl == "threefry2x32"
        self.rngs = nnx.Rngs(noise=jax.random.key(1, impl=impl))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(2))

    def __call__(self, x):
        x = self.first(x + jax.random.normal(self.rngs.noise(), x.shape, x.dtype))
        kept = jax.random.bernoulli(self.rngs.noise(), 0.5, (x.shape[0], 1))
        x = self.second(jnp.where(kept, x, 0))
        if not self.by_key:
            return self.drop(x)
        keys = jax.random.split(self.rngs.noise(), x.shape[0])
        return self.drop(x) + jax.vmap(lambda key: jax.random.uniform(key, (4,), x.dtype))(keys)


def fitted(mesh, impl, accumulate):
    trainer = st.Trainer(
        Noisy(impl),
        optax.sgd(0.1),
        loss=st.losses.mean_squared_error,
        mesh=st.make_mesh(mesh),
        accumulate=accumulate,
    )
    rows = trainer.fit([(X, X)] * 2, steps=2, progress=False)
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_noise_in_microbatches_is_that_of_the_batch(impl):
    expected = fitted("data=1", impl, 1)
    np.testing.assert_allclose(fitted("data=1", impl, PARTS), expected, rtol=1e-12)
    if impl == "threefry2x32":  # the bits of the others depend on the device
        np.testing.assert_allclose(fitted("data=2", impl, PARTS), expected, rtol=1e-12)


def test_noise_where_numbers_have_32_bits():
    """As users have it; a number of a microbatch beyond an int32 would overflow there."""
    with jax.enable_x64(False):
        expected = fitted("data=1", "threefry2x32", 1)
        np.testing.assert_allclose(fitted("data=1", "threefry2x32", PARTS), expected, rtol=1e-5)


def test_noise_in_stages_is_that_of_the_batch():
    expected = fitted("data=1", "threefry2x32", 1)
    np.testing.assert_allclose(fitted("pipe=2,data=2", "threefry2x32", PARTS), expected, rtol=1e-12)


def test_the_same_key_in_each_microbatch_is_noticed(monkeypatch):
    """The wrong variant: what a microbatch draws without knowing which one it is."""
    monkeypatch.setattr(Part, "key", lambda self, words, base: jax.random.wrap_key_data(words, impl=base))
    expected = fitted("data=1", "threefry2x32", 1)
    assert abs(np.array(fitted("data=1", "threefry2x32", PARTS)) - expected).max() > 1e-3


@pytest.mark.parametrize("shape", [(3,), (3, 5), (4, 3), (), (1, 3)])
@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.bits, jax.random.uniform])
def test_rows_of_a_draw_are_those_of_the_batch_and_others_are_as_ever(draw, shape):
    words = jax.random.key_data(jax.random.key(3))
    keys = [Part(3, 2, number).key(words, "threefry2x32") for number in range(2)]
    found = [jax.random.fold_in(key, 7) for key in keys]
    found = [draw(jax.random.split(key)[1], shape) for key in found]
    key = jax.random.split(jax.random.fold_in(jax.random.key(3), 7))[1]
    if shape[:1] == (3,):
        whole = draw(key, (6, *shape[1:]))
        found, expected = jnp.stack(found, 1).reshape(whole.shape), whole
    else:
        expected = jnp.stack([draw(key, shape)] * 2)
    np.testing.assert_array_equal(jnp.asarray(found), expected)


class Dropped(nnx.Module):
    """As many features as a microbatch has rows, and so a mask of an example as long as a column of rows."""

    def __init__(self):
        kinds = {"param_dtype": jnp.result_type(float), "rngs": nnx.Rngs(0)}
        self.linear, self.drop = st.nn.Linear(4, 4, **kinds), st.nn.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.drop(self.linear(x))


def test_masks_by_example_are_those_of_the_batch_whatever_the_number_of_rows():
    found = [
        st.Trainer(
            Dropped(), optax.sgd(0.1), loss=st.losses.mean_squared_error, mesh="data=1", accumulate=parts
        ).fit([(X, X)] * 2, steps=2, progress=False)
        for parts in (1, PARTS)
    ]
    losses = [[row["loss"] for row in rows] for rows in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
