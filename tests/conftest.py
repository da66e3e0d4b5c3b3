"""Eight simulated devices, float64, and shapes checked at run time."""

import os

import jax
from jaxtyping import _import_hook, install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)


class _Outer(_import_hook.JaxtypingTransformer):
    """Leaves functions in functions alone: made at every call, they would be decorated at every call."""

    def visit_FunctionDef(self, node):  # noqa: N802
        inner, node.body = node.body, []
        super().visit_FunctionDef(node)
        node.body = inner
        return node


_import_hook.JaxtypingTransformer = _Outer
install_import_hook("shardtrain", "beartype.beartype")

from recipe_process import IN_HASTE  # noqa: E402  (imports shardtrain)

# XLA reads its flags once, here; what a test starts with the environment as it is, has it as it was.
_before = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_before or ''} {IN_HASTE}"
jax.devices()
del os.environ["XLA_FLAGS"]
if _before is not None:
    os.environ["XLA_FLAGS"] = _before

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU here"))
