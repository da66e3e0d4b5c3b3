"""Eight simulated devices, float64, and shapes checked at run time."""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

# Tests compile much and compute little: machine code is left as it comes, a third of the time is saved. XLA
# reads its flags once, here; processes that tests start get the environment as it was.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_before = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_before or ''} {_FLAGS}"
jax.devices()
del os.environ["XLA_FLAGS"]
if _before is not None:
    os.environ["XLA_FLAGS"] = _before

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("shardtrain", "beartype.beartype")

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU here"))
