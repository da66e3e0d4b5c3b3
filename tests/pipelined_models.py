"""Small models, and trainers of them on meshes with `pipe` beside one device, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import shardtrain as st

MICROBATCHES = 4
TOLERANCE = 1e-10


def wide(model):
    """Running statistics of float64 too, which `nnx` keeps in float32."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for statistic in (module.mean, module.var):
                statistic.set_value(statistic.get_value().astype(jnp.float64))
    return model


class Small(nnx.Module):
    """One of everything: batch norm, dropout, a skip across stages, a parameter that nothing uses."""

    def __init__(self, rate=0.25, norm=True):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.stem = st.nn.Conv(2, 4, (3, 3), 2, **kinds)
        self.norm = st.nn.BatchNorm(4, momentum=0.9, **kinds) if norm else None
        self.drop = st.nn.Dropout(rate, rngs=nnx.Rngs(1))
        self.flatten = st.nn.Flatten()
        self.wide = st.nn.Linear(16, 12, **kinds)
        self.deep = st.nn.Linear(12, 12, **kinds)
        self.head = st.nn.Linear(12, 5, **kinds)
        self.idle = st.nn.Linear(3, 3, **kinds)

    def __call__(self, x):
        x = self.stem(x)
        x = x if self.norm is None else self.norm(x)
        x = early = self.wide(self.flatten(self.drop(nnx.relu(x))))
        return self.head(nnx.tanh(self.deep(x)) + early)


class Deep(nnx.Module):
    """Linear layers alone, which compile fast."""

    def __init__(self):
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.flatten = st.nn.Flatten()
        self.first = st.nn.Linear(32, 6, **kinds)
        self.second = st.nn.Linear(6, 6, **kinds)
        self.head = st.nn.Linear(6, 5, **kinds)

    def __call__(self, x):
        x = nnx.tanh(self.first(self.flatten(x)))
        return self.head(nnx.tanh(self.second(x)) + x)


def images(count, seed=0):
    r = np.random.default_rng(seed)
    return r.standard_normal((count, 4, 4, 2)), r.integers(0, 5, count).astype(np.int32)


def batches(size=16, count=48, make=images):
    x, y = make(count)
    return [(x[at : at + size], y[at : at + size]) for at in range(0, count, size)]


def trainer(mesh, optimizer=None, model=None, **kwargs):
    asked = {key: kwargs.pop(key) for key in ("schedule", "stages", "in_flight", "overlap") if key in kwargs}
    options = {"accumulate": MICROBATCHES, "pipeline": st.Pipeline(**asked)} | kwargs
    optimizer = optimizer or optax.sgd(0.1, momentum=0.9)
    one = st.Trainer(model or wide(Small()), optimizer, mesh=st.make_mesh(mesh), **options)
    if one._plan is not None:  # nothing that was never written may be read
        one._plan = dataclasses.replace(one._plan, filler=float("nan"))
    return one


def close(ours, theirs, tolerance=TOLERANCE):
    """The same tree of arrays, of the same shapes and dtypes; names what differs."""
    ours, theirs = (jax.tree_util.tree_flatten_with_path(jax.device_get(tree)) for tree in (ours, theirs))
    assert ours[1] == theirs[1]
    for (path, a), (_, b) in zip(ours[0], theirs[0], strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        scale = max(1.0, np.abs(b.astype(float)).max(initial=0))
        np.testing.assert_allclose(
            a.astype(float),
            b.astype(float),
            rtol=0,
            atol=tolerance * scale,
            err_msg=jax.tree_util.keystr(path),
        )


def fit(one, data, steps=None):
    rows = one.fit(data, steps=int(one.state.step) + (steps or len(data)), progress=False)
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def same(ours, theirs, data, tolerance=TOLERANCE):
    """Both trained on the same batches: what is reported and the whole state are the same."""
    close(fit(ours, data), fit(theirs, data), tolerance)
    close(ours._named(), theirs._named(), tolerance)


def masked_adamw():
    return optax.adamw(
        0.01, weight_decay=0.1, mask=lambda params: {name: "kernel" in name for name in params}
    )
