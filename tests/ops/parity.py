"""One device against a mesh: values and every gradient, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from hypothesis import Phase, settings
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, make_mesh
from shardtrain.layout import axes_of
from shardtrain.mesh import size

TOLERANCE = 1e-10

# The mixes of cuts that every operator must be exact on; an axis it has no dimension for is idle.
MESHES = (
    "height=2,width=2",
    "data=2,height=2,channel=2",
    "height=4,width=2",
    "data=8",
    "height=8",
    "channel=8",
    "height=2,channel=2",
    "depth=2,width=2",
    "data=2,width=4",
    "width=8",
)

LAYOUTS = (
    Layout(),
    Layout(),  # twice as often as the others
    Layout(parameters=("data",)),
    Layout(batch=("data", "height"), height=()),
    Layout(height=("height", "width"), width=()),
    Layout(parameters=("data", "height", "width")),
    Layout(channels=()),
)


def examples(number: int) -> settings:
    """The same `number` of examples in every run: a compile takes most of a second."""
    phases = (Phase.explicit, Phase.generate)  # shrinking would compile for minutes
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, phases=phases)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def pulled(f: Callable[..., Any], args: Sequence[Any], cotangents: Any) -> tuple[jax.stages.Compiled, Any]:
    """What `f` returns and the gradients of all `args`, as one program."""

    def run(args: Sequence[Any], cotangents: Any) -> Any:
        values, pull = jax.vjp(f, *args)
        return values, pull(cotangents)

    program = jax.jit(run).lower(args, cotangents).compile()
    return program, program(args, cotangents)


def parity(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    args: Sequence[Any],
    mesh: str | Mesh,
    *,
    placed: Sequence[Any] | None = None,
    tolerance: float = TOLERANCE,
) -> jax.stages.Compiled:
    """Asserts that `op` on `mesh` returns what `reference` does without one, and the same gradients.

    All outputs get random cotangents, so one comparison sees every gradient of every output.

    Args:
        op, reference, args, mesh: what to compare, on what, where.
        placed: `args` as they lie on the mesh; by default XLA places them.
        tolerance: relative to the largest value of an array, or absolute below 1.

    Returns:
        The compiled program, for a census.
    """
    shapes = jax.eval_shape(reference, *args)
    cotangents = jax.tree.map(lambda s: numbers(*s.shape, seed=1), shapes)
    _, expected = pulled(reference, args, cotangents)
    with jax.set_mesh(make_mesh(mesh) if isinstance(mesh, str) else mesh):
        program, got = pulled(op, args if placed is None else placed, cotangents)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        name = ("value" if path[0].idx == 0 else "gradient") + jax.tree_util.keystr(path[1:])
        assert a.shape == b.shape, f"{name} on {mesh}: {a.shape} is not {b.shape}"
        limit = tolerance * max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, equal_nan=False, err_msg=f"{name} on {mesh}")
    return program


def reference_conv(strides: Any, padding: Any, dilation: Any = 1, groups: int = 1) -> Callable[..., Any]:
    """`lax.conv_general_dilated` on one device, with a bias."""

    def conv(x: Any, kernel: Any, bias: Any = None) -> Any:
        rank = x.ndim - 2
        letters = "DHW"[3 - rank :]
        many = [(v,) * rank if isinstance(v, int) else tuple(v) for v in (strides, dilation)]
        y = lax.conv_general_dilated(
            x,
            kernel,
            many[0],
            padding,
            rhs_dilation=many[1],
            feature_group_count=groups,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )
        return y if bias is None else y + bias

    return conv


def place(value: Any, mesh: Mesh, spec: P) -> jax.Array:
    """`value` on `mesh`, whole in the dimensions that do not divide."""
    fits = [
        entry if extent % size(mesh, axes_of(entry)) == 0 else None
        for entry, extent in zip((*spec, *[None] * value.ndim), value.shape, strict=False)
    ]
    return jax.device_put(value, NamedSharding(mesh, P(*fits)))
