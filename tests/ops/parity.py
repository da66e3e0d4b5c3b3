"""One device against a mesh: values and every gradient, in float64."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, make_mesh
from shardtrain.layout import axes_of
from shardtrain.mesh import parse, size

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

# Every subset of these axes that 8 devices can be cut by, in all sizes; for the slow grids.
_SUBSETS = [
    zip(names, sizes, strict=True)
    for rank in (1, 2, 3)
    for names in itertools.combinations(("data", "depth", "height", "width", "channel"), rank)
    for sizes in itertools.product(range(2, 9), repeat=rank)
    if math.prod(sizes) <= 8
]
ALL_MESHES = tuple(",".join(f"{name}={count}" for name, count in axes) for axes in _SUBSETS)

# A stage of a pipeline: manual over `pipe`, the other axes left to the islands.
PIPES = ("pipe=2,height=4", "pipe=2,height=2,width=2", "pipe=2,data=2,channel=2", "pipe=2,width=4")

ALL_PIPES = tuple(f"pipe=2,{mesh}" for mesh in ALL_MESHES if math.prod(parse(mesh).values()) <= 4)

LAYOUTS = (
    Layout(),
    Layout(),  # twice as often as the others
    Layout(parameters=("data",)),
    Layout(batch=("data", "height"), height=()),
    Layout(height=("height", "width"), width=()),
    Layout(height=("width", "height"), width=()),
    Layout(parameters=("data", "height", "width")),
    Layout(channels=()),
)


def examples(number: int) -> settings:
    """The same `number` of examples in every run: a compile takes most of a second."""
    phases = (Phase.explicit, Phase.generate)  # shrinking would compile for minutes
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, phases=phases)


def named(often: dict[str, tuple], seldom: dict[str, tuple]) -> list[Any]:
    """Cases by their names for `pytest.mark.parametrize`; `seldom` are marked slow."""
    slow = [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in seldom.items()]
    return [pytest.param(*case, id=name) for name, case in often.items()] + slow


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
        placed: `args` placed on the mesh; by default XLA places them.
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


REPEATS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def around(window: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """The padding that keeps extents at stride 1, for `jnp.pad`; even windows lean to the end."""
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    return [(0, 0), *(((k - 1) // 2, k // 2) for k in spans), (0, 0)]


def reference_conv(
    strides: Any, padding: Any, dilation: Any = 1, groups: int = 1, input_dilation: Any = 1
) -> Callable[..., Any]:
    """`lax.conv_general_dilated` on one device, with a bias; a repeating padding as `jnp.pad` does it."""

    def conv(x: Any, kernel: Any, bias: Any = None) -> Any:
        rank = x.ndim - 2
        letters = "DHW"[3 - rank :]
        many = [(v,) * rank if isinstance(v, int) else tuple(v) for v in (strides, dilation, input_dilation)]
        pads = padding
        if padding in REPEATS:
            x, pads = jnp.pad(x, around(kernel.shape[:rank], many[1]), mode=REPEATS[padding]), "VALID"
        elif isinstance(padding, str) and max(many[2], default=1) > 1:  # lax wants numbers here
            extents, spans = (
                [(n - 1) * d + 1 for n, d in zip(sizes, dilations, strict=True)]
                for sizes, dilations in ((x.shape[1:-1], many[2]), (kernel.shape[:rank], many[1]))
            )
            pads = lax.padtype_to_pads(extents, spans, many[0], padding)
        y = lax.conv_general_dilated(
            x,
            kernel,
            many[0],
            pads,
            lhs_dilation=many[2],
            rhs_dilation=many[1],
            feature_group_count=groups,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )
        return y if bias is None else y + bias

    return conv


def reference_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    kept: Any = None,
    *,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Scaled dot-product attention on one device as its formula says, and its weights."""
    key, value = (jnp.repeat(x, query.shape[-2] // key.shape[-2], axis=-2) for x in (key, value))
    products = jnp.einsum("...qhd,...khd->...hqk", query, key) / np.sqrt(query.shape[-1])
    products = products if bias is None else products + bias
    if is_causal:
        products = jnp.where(jnp.tri(*products.shape[-2:], dtype=bool), products, -jnp.inf)
    products = products if mask is None else jnp.where(mask, products, -jnp.inf)
    weights = jax.nn.softmax(products)
    return jnp.einsum("...hqk,...khd->...qhd", weights if kept is None else weights * kept, value), weights


def place(value: Any, mesh: Mesh, spec: P) -> jax.Array:
    """`value` on `mesh`, whole in the dimensions that do not divide."""
    fits = [
        entry if extent % size(mesh, axes_of(entry)) == 0 else None
        for entry, extent in zip((*spec, *[None] * value.ndim), value.shape, strict=False)
    ]
    return jax.device_put(value, NamedSharding(mesh, P(*fits)))


def manual_over_pipe(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    # jax 0.10 cannot lower the gradient of a nested shard_map whose outer one checks varying axes.
    return jax.shard_map(f, axis_names={"pipe"}, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_stages(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` on every stage's own arrays, which a leading dimension of 2 indexes."""

    def staged(*args: Any) -> Any:
        def stage(*args: Any) -> Any:
            return op(*(a[0] for a in args))[None]

        return manual_over_pipe(stage, (P("pipe"),) * len(args), P("pipe"))(*args)

    return staged


def by_stage(reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference` on one device for what `on_stages` takes."""

    def staged(*args: Any) -> Any:
        return jnp.stack([reference(*(a[i] for a in args)) for i in range(2)])

    return staged
