"""Eight simulated devices, float64, and shapes checked at run time."""

import ast
import hashlib
import os
import shutil
from pathlib import Path

import jax
import jaxtyping
from beartype import beartype
from jaxtyping import _import_hook, install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)


def _has_shapes(*hints):
    """Whether hints name shapes, as `Float[Array, "batch channels"]`; other strings are names of classes."""
    nodes = [node for hint in hints if hint for node in ast.walk(hint)]
    shaped = [
        node.slice for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
    ]
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) for s in shaped for part in s.elts
    )


def _with_checked_fields(kind):
    """A class whose constructor is checked by beartype, if it is a dataclass with fields of its own alone."""
    fields = vars(kind).get("__dataclass_fields__", {})
    if fields and fields.keys() <= vars(kind).get("__annotations__", {}).keys():
        kind.__init__ = beartype(kind.__init__)
    return kind


class _Checks(_import_hook.JaxtypingTransformer):
    """Hints without shapes are left to beartype alone, which is several times as quick.

    Functions in functions are left alone: made at every call, they would be decorated at every call.
    """

    def visit_ClassDef(self, node):  # noqa: N802
        super().visit_ClassDef(node)
        if not _has_shapes(*(part.annotation for part in node.body if isinstance(part, ast.AnnAssign))):
            node.decorator_list[0].func.attr = "with_checked_fields"
            node.decorator_list[0] = node.decorator_list[0].func
        return node

    def visit_FunctionDef(self, node):  # noqa: N802
        inner, node.body = node.body, []
        super().visit_FunctionDef(node)
        node.body = inner
        if not _has_shapes(node.args, node.returns):
            node.decorator_list[-1] = node.decorator_list[-1].keywords[0].value
        return node


jaxtyping.with_checked_fields = _with_checked_fields
_import_hook.JaxtypingTransformer = _Checks
install_import_hook("shardtrain", "beartype.beartype")

from recipe_process import CACHE, IN_HASTE, KEPT_SECONDS  # noqa: E402  (imports shardtrain)

jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_SECONDS)

# XLA reads its flags once, here; what a test starts with the environment as it is, has it as it was.
_before = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{_before or ''} {IN_HASTE}"
jax.devices()
del os.environ["XLA_FLAGS"]
if _before is not None:
    os.environ["XLA_FLAGS"] = _before

import pytest  # noqa: E402

LONGEST = [
    "test_recipe.py",
    "guard/test_processes.py",
    "launch/test_jobs.py",
    "train/pipelined/test_step.py",
    "kernels/test_gpu.py",
    "test_recipe_pipeline.py",
    "test_recipe_hybrid.py",
    "pipeline/runtime/test_parity.py",
    "checkpoint/test_checkpoints.py",
    "pipeline/cut/test_split.py",
    "pipeline/runtime/test_tick_loop.py",
    "launch/test_local.py",
    "train/test_trainer.py",
    "pipeline/localize/test_evaluate.py",
    "nn/test_models.py",
]
"""Files that take a minute and more, those that take most first: begun late, one would keep one process waiting
for the other."""


def _turn(item: pytest.Item) -> int:
    name = item.path.relative_to(Path(__file__).parent).as_posix()
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-share",
        metavar="K/N/SEED",
        help="of the slow tests only the K-th of N shares, which are dealt anew for every SEED such as a commit",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # the workers of pytest-xdist end before
        shutil.rmtree(CACHE, ignore_errors=True)


def in_share(name: str, share: str) -> bool:
    """Whether a test is in one of the shares that the slow tests are dealt into."""
    number, count, seed = share.split("/", 2)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % int(count) == int(number) % int(count)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    if share := config.getoption("slow_share"):
        left_out = [i for i in items if not (i.get_closest_marker("slow") and in_share(i.nodeid, share))]
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU here"))
