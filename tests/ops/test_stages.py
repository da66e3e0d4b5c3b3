"""Operators inside a stage of a pipeline: manual over `pipe`, the other axes left to the islands.

Halos are grouped collectives there: a collective-permute would wait for devices that run another stage.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from shardtrain import Layout, make_mesh, ops
from shardtrain.plan.census import census

from .parity import (
    ALL_PIPES,
    PIPES,
    by_stage,
    examples,
    manual_over_pipe,
    named,
    numbers,
    on_stages,
    parity,
    place,
    reference_conv,
)
from .test_conv import convolutions


@examples(6)
@given(st.sampled_from(PIPES), convolutions(2, ranks=(1, 2, 2)))
def test_halos_by_grouped_collectives(mesh, case):
    args = [numbers(2, *case.x), numbers(2, *case.kernel)]
    parity(on_stages(case.op), jax.vmap(case.reference), args, mesh)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(100)
@given(st.sampled_from(ALL_PIPES), convolutions(2))
def test_many_halos_by_grouped_collectives(mesh, case):
    args = [numbers(2, *case.x), numbers(2, *case.kernel)]
    parity(on_stages(case.op), jax.vmap(case.reference), args, mesh)


def nearest(x):
    return jax.image.resize(x, (x.shape[0], 8, 9, x.shape[-1]), "nearest")


def halves(x):
    """Adaptive pooling of 7 rows and 6 columns to 2 and 3, window by window."""
    rows = x[:, 0:4], x[:, 3:7]
    return jnp.stack([jnp.stack([r[:, :, j : j + 2] for j in (0, 2, 4)], 1) for r in rows], 1)


SAME = {"strides": (2, 1), "padding": "SAME"}
IMAGE = (3, 7, 6, 4)

TURNED = Layout(height=("width", "height"), width=("data",), batch=("channel",), channels=())

STAGED = {
    "circular convolution": (
        lambda x, k: ops.conv(x, k, padding="CIRCULAR"),
        reference_conv(1, "CIRCULAR"),
        [(3, 3, 4, 2)],
    ),
    "transposed convolution": (
        lambda x, k: ops.conv_transpose(x, k, strides=2),
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
        [(3, 3, 4, 2)],
    ),
    "locally connected": (
        lambda x, k: ops.local(x, k, window=(3, 2), padding="VALID"),
        lambda x, k: lax.conv_general_dilated_local(
            x, k, (1, 1), "VALID", (3, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        [(5, 5, 24, 2)],
    ),
    "max pool": (lambda x: ops.max_pool(x, (3, 3), **SAME), lambda x: nnx.max_pool(x, (3, 3), **SAME), []),
    "mean pool": (lambda x: ops.avg_pool(x, (3, 3), **SAME), lambda x: nnx.avg_pool(x, (3, 3), **SAME), []),
    "resize": (lambda x: ops.resize(x, (8, 9)), nearest, []),
    "linear resize": (
        lambda x: ops.resize(x, (9, 4), method="linear"),
        lambda x: jax.image.resize(x, (3, 9, 4, 4), "linear", antialias=False),
        [],
    ),
    "pad": (
        lambda x: ops.pad(x, ((2, 1), (0, 3)), mode="reflect"),
        lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 3), (0, 0)), mode="reflect"),
        [],
    ),
    "adaptive mean": (lambda x: ops.adaptive_avg_pool(x, (2, 3)), lambda x: halves(x).mean((3, 4)), []),
    "adaptive maximum": (lambda x: ops.adaptive_max_pool(x, (2, 3)), lambda x: halves(x).max((3, 4)), []),
    "global mean": (ops.global_avg_pool, lambda x: x.mean((1, 2)), []),
    "flatten": (ops.flatten, lambda x: x.reshape(3, -1), []),
    "batch norm": (
        lambda x, s, b: ops.batch_norm(x, s, b)[0],
        lambda x, s, b: (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5) * s + b,
        [(4,), (4,)],
    ),
    "group norm": (
        lambda x, s, b: ops.group_norm(x, 2, s, b),
        lambda x, s, b: standard(x.reshape(3, 7, 6, 2, 2), (1, 2, 4)).reshape(x.shape) * s + b,
        [(4,), (4,)],
    ),
    "instance norm": (ops.instance_norm, lambda x, s, b: standard(x, (1, 2)) * s + b, [(4,), (4,)]),
    "grouped convolution": (
        lambda x, k: ops.conv(x, k, groups=2, dilation=2),
        reference_conv(1, "SAME", 2, groups=2),
        [(3, 3, 2, 4)],
    ),
    "linear map": (ops.linear, lambda x, k: x @ k, [(4, 6)]),
    "concatenation": (
        lambda x, y: ops.concat([x, y]),
        lambda x, y: jnp.concatenate([x, y], -1),
        [(3, 7, 6, 8)],
    ),
    "change of layout": (lambda x: jnp.sin(ops.reshard(x, Layout(), TURNED)), jnp.sin, []),
    "layer norm": (ops.layer_norm, lambda x, s, b: standard(x, 3) * s + b, [(4,), (4,)]),
}


VOLUME = (2, 5, 3, 4, 4)
PIPES_3D = "pipe=2,depth=2,channel=2", "pipe=2,depth=4"

STAGED_3D = {
    "convolution": (lambda x, k: ops.conv(x, k, strides=2), reference_conv(2, "SAME"), [(3, 2, 3, 4, 2)]),
    "transposed convolution": (
        lambda x, k: ops.conv_transpose(x, k, strides=2),
        lambda x, k: lax.conv_transpose(x, k, (2, 2, 2), "SAME"),
        [(3, 2, 2, 4, 2)],
    ),
    "locally connected": (
        lambda x, k: ops.local(x, k, window=(2, 1, 2), padding="VALID"),
        lambda x, k: sum(
            jnp.einsum("bdhwi,dhwio->bdhwo", x[:, i : i + 4, :, j : j + 3], k[..., 2 * i + j :: 4, :])
            for i in range(2)
            for j in range(2)
        ),
        [(4, 3, 3, 16, 2)],
    ),
    "max pool": (
        lambda x: ops.max_pool(x, (3, 2, 2), strides=2, padding="SAME"),
        lambda x: nnx.max_pool(x, (3, 2, 2), strides=(2, 2, 2), padding="SAME"),
        [],
    ),
    "resize": (
        lambda x: ops.resize(x, (7, 3, 4), method="linear"),
        lambda x: jax.image.resize(x, (2, 7, 3, 4, 4), "linear", antialias=False),
        [],
    ),
    "group norm": (
        lambda x, s, b: ops.group_norm(x, 2, s, b),
        lambda x, s, b: standard(x.reshape(2, 5, 3, 4, 2, 2), (1, 2, 3, 5)).reshape(x.shape) * s + b,
        [(4,), (4,)],
    ),
    "concatenation": (
        lambda x, y: ops.concat([x, y]),
        lambda x, y: jnp.concatenate([x, y], -1),
        [(2, 5, 3, 4, 8)],
    ),
}


def standard(x, dims):
    return (x - x.mean(dims, keepdims=True)) / jnp.sqrt(x.var(dims, keepdims=True) + 1e-6)


OFTEN = "circular convolution", "transposed convolution", "linear resize", "group norm", "change of layout"
EVERY_STAGE = {(name, mesh): (mesh, *STAGED[name]) for name in STAGED for mesh in PIPES}
DAILY = {
    f"{name} on {mesh}": v for (name, mesh), v in EVERY_STAGE.items() if name in OFTEN and mesh == PIPES[1]
}
OTHERS = {f"{name} on {mesh}": v for (name, mesh), v in EVERY_STAGE.items()}
OTHERS = {name: v for name, v in OTHERS.items() if name not in DAILY}


VOLUMES = {f"{name} on {mesh}": (mesh, *STAGED_3D[name]) for name in STAGED_3D for mesh in PIPES_3D}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "op", "reference", "shapes"), VOLUMES.values(), ids=VOLUMES)
def test_every_operator_on_stages_in_3d(mesh, op, reference, shapes):
    args = [numbers(2, *VOLUME), *(numbers(2, *shape, seed=i) for i, shape in enumerate(shapes))]
    parity(on_stages(op), by_stage(reference), args, mesh)


@pytest.mark.parametrize(("mesh", "op", "reference", "shapes"), named(DAILY, OTHERS))
def test_every_operator_on_stages(mesh, op, reference, shapes):
    args = [numbers(2, *IMAGE), *(numbers(2, *shape, seed=i) for i, shape in enumerate(shapes))]
    parity(on_stages(op), by_stage(reference), args, mesh)


@pytest.mark.parametrize("mesh", [PIPES[2], pytest.param(PIPES[0], marks=pytest.mark.slow)])
def test_embedding_on_stages(mesh):
    indices = np.random.default_rng(0).integers(-5, 5, (2, 3, 4))

    def op(table):
        stage = lambda i, t: ops.embed(i[0], t[0])[None]  # noqa: E731
        return manual_over_pipe(stage, (P("pipe"), P("pipe")), P("pipe"))(jnp.asarray(indices), table)

    def reference(table):
        return jnp.stack([jnp.take(table[i], indices[i], axis=0) for i in range(2)])

    parity(op, reference, [numbers(2, 5, 4)], mesh)


TICKS = 5  # 4 microbatches through 2 stages


def first_stage(p, x, conv, max_pool, batch_norm):
    return max_pool(nnx.relu(conv(x, p["kernel"])), (3, 3), strides=(1, 1), padding="SAME") + x


def second_stage(p, x, conv, max_pool, batch_norm):
    y = batch_norm(x, p["scale"], None)[0]
    return jnp.tanh(conv(y, p["kernel"][:, :2]) - max_pool(x, (2, 1), strides=(1, 1), padding="SAME"))


def pipeline(parameters, batches, stages):
    """GPipe over 2 stages; every device runs the branch of its own stage, tick by tick."""
    me, count = lax.axis_index("pipe"), batches.shape[0]
    own = jax.tree.map(lambda p: p[0], parameters)

    def tick(carry, t):
        arrived, out = carry
        x = jnp.where(me == 0, batches[jnp.clip(t, 0, count - 1)], arrived)
        y = lax.switch(me, stages, own, x)
        last = out.at[jnp.clip(t - 1, 0, count - 1)].set(y)
        return (lax.ppermute(y, "pipe", [(0, 1)]), jnp.where((me == 1) & (t >= 1), last, out)), None

    (_, out), _ = lax.scan(tick, (jnp.zeros_like(batches[0]), jnp.zeros_like(batches)), jnp.arange(TICKS))
    return lax.psum(jnp.where(me == 1, out, 0), "pipe")


def plain_batch_norm(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * scale, None


STAGES = (first_stage, second_stage)


@pytest.mark.parametrize(
    "spec", ["pipe=2,height=4", pytest.param("pipe=2,data=2,height=2", marks=pytest.mark.slow)]
)
def test_different_stages_of_a_pipeline(spec):
    """Operators in branches that only some devices take: no deadlock, and exact."""
    mesh = make_mesh(spec)
    rows = 7 if "height=4" in spec else 8  # uneven on 4
    batches = numbers(TICKS - 1, 4, rows, 6, 5)
    parameters = {"kernel": numbers(2, 3, 3, 5, 5) * 0.3, "scale": numbers(2, 5)}
    branches = [
        functools.partial(f, conv=ops.conv, max_pool=ops.max_pool, batch_norm=ops.batch_norm) for f in STAGES
    ]

    def piped(parameters, batches):
        run = functools.partial(pipeline, stages=branches)
        return manual_over_pipe(run, (P("pipe"), P()), P())(parameters, batches)

    def reference(parameters, batches):
        plain = reference_conv(1, "SAME"), nnx.max_pool, plain_batch_norm
        for i, stage in enumerate(STAGES):
            own = jax.tree.map(lambda p, i=i: p[i], parameters)
            batches = jax.vmap(lambda x, own=own, stage=stage: stage(own, x, *plain))(batches)
        return batches

    cut = P(None, "data" if "data" in spec else None, "height")
    placed = jax.tree.map(lambda p: place(p, mesh, P("pipe")), parameters), place(batches, mesh, cut)
    compiled = parity(piped, reference, (parameters, batches), mesh, placed=placed)
    permutes = [c for c in census(compiled, mesh) if c.kind == "collective-permute"]
    assert {c.axes for c in permutes} == {("pipe",)}
    assert sum(c.count for c in permutes) == 2 * TICKS  # there, and the gradients back
