"""Models whose stages differ, small enough to be compiled often."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardtrain as st

KINDS: dict[str, Any] = {"param_dtype": jnp.float64}


def wide(model: nnx.Module) -> nnx.Module:
    """The model with running statistics of float64, which `nnx` keeps in float32."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for statistic in (module.mean, module.var):
                statistic.set_value(statistic.get_value().astype(jnp.float64))
    return model


class Unequal(nnx.Module):
    """Nine layers of quite different cost and shape, with skips across several of them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        kinds = KINDS | {"rngs": rngs}
        self.stem = st.nn.Conv(2, 8, (3, 3), **kinds)
        self.norm = st.nn.BatchNorm(8, momentum=0.9, **kinds)
        self.wide = st.nn.Conv(8, 16, (5, 5), strides=2, **kinds)
        self.deep = nnx.List([st.nn.Conv(16, 16, (1, 1), **kinds) for _ in range(4)])
        self.drop = st.nn.Dropout(0.3, rngs=rngs)
        self.pool = st.nn.MaxPool((2, 2), (2, 2))
        self.flatten = st.nn.Flatten()
        self.hidden = st.nn.Linear(2 * 2 * 16, 32, **kinds)
        self.head = st.nn.Linear(32, 8, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        x = self.wide(x)
        early = x
        for layer in self.deep:
            x = nnx.gelu(layer(x))
        x = self.drop(x + early)
        return self.head(nnx.relu(self.hidden(self.flatten(self.pool(x)))))


def resnet(rngs: nnx.Rngs) -> nnx.Module:
    return st.models.ResNet(18, 8, 2, stem="small", width=8, **KINDS, rngs=rngs)


def alexnet(rngs: nnx.Rngs) -> nnx.Module:
    return st.models.AlexNet(8, 2, width=4, hidden=16, **KINDS, rngs=rngs)


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "unequal": (Unequal, (8, 8, 2)),
    "resnet": (resnet, (8, 8, 2)),
    "alexnet": (alexnet, (64, 63, 2)),
}


def data(name: str, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels for a model."""
    r = np.random.default_rng(seed)
    return r.standard_normal((rows, *MODELS[name][1])), r.integers(0, 8, rows).astype(np.int32)
