"""Sharded training in JAX: one Flax model, one program, any mesh.

import shardtrain as st
mesh = st.make_mesh("data=2,height=2,channel=2")
trainer = st.Trainer(st.models.ResNet(8, classes=10, channels=1, rngs=nnx.Rngs(0)), optax.sgd(0.1), mesh=mesh)
trainer.fit(batches, steps=500)
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardtrain.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Imports a module of the package, or all public names, when they are first used.

    Importing them takes seconds, and `shardtrain.cli` makes sure of Ctrl-C before.
    """
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("_") or name == "__all__":
        api = importlib.import_module(f"{__name__}.api")
        if hasattr(api, name):
            return globals().setdefault(name, getattr(api, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
