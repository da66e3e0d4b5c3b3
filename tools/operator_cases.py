"""Operators of shardtrain and the same in plain jax, for the tools that count and time both."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import ops
from shardtrain.layout import Layout, axes_of
from shardtrain.mesh import size

Operator = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator on one input.

    Attributes:
        name: in the tables.
        ours, plain: functions of the same arrays, the first an activation, the others parameters.
        x: shape of the activation.
        parameters: shapes of the parameters.
        channel: the dimension of the parameters that goes with cut channels.
        space: leading dimensions of the parameters that are pixels.
    """

    name: str
    ours: Operator
    plain: Operator
    x: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    channel: int = -1
    space: int = 0

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [self.x, *self.parameters]

    def out(self) -> tuple[int, ...]:
        return jax.eval_shape(self.plain, *(jax.ShapeDtypeStruct(s, "f4") for s in self.shapes)).shape

    def specs(self, mesh: Mesh) -> list[P]:
        """How activation, parameters and output lie on the mesh."""
        layout = Layout()
        specs = [layout.parameter(shape, self.channel, mesh, self.space) for shape in self.parameters]
        return [layout.activation(self.x, mesh), *specs, layout.activation(self.out(), mesh)]

    def cut_by(self, mesh: Mesh) -> bool:
        """Whether every axis of the mesh cuts the activation, evenly."""
        spec = self.specs(mesh)[0]
        used = {axis for entry in spec for axis in axes_of(entry)}
        even = all(n % size(mesh, axes_of(entry)) == 0 for n, entry in zip(self.x, spec, strict=True))
        return even and used == {axis for axis in mesh.axis_names if size(mesh, axis) > 1}


def cut_out(operator: Operator, **options: Any) -> Operator:
    """With parameters cut on their output channels, as they lie here."""
    return functools.partial(operator, channel_mode="gather", **options)


def plain_conv(x: Array, kernel: Array, **options: Any) -> Array:
    letters = "DHW"[5 - x.ndim :]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    given = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **given)


def plain_circular(x: Array, kernel: Array) -> Array:
    return plain_conv(jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="wrap"), kernel, padding="VALID")


def plain_local(x: Array, kernel: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated_local(x, kernel, (1, 1), "SAME", (3, 3), dimension_numbers=numbers)


def plain_pool(x: Array, window: int, stride: int) -> Array:
    sizes, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, strides, "SAME")


def plain_resize(x: Array, method: str) -> Array:
    shape = (x.shape[0], *(2 * n for n in x.shape[1:-1]), x.shape[-1])
    return jax.image.resize(x, shape, method, antialias=False)


def plain_norm(x: Array, groups: int) -> Array:
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
    return ((grouped - mean) * lax.rsqrt(var + 1e-6)).reshape(x.shape)


def plain_batch_norm(x: Array) -> Array:
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) * lax.rsqrt(x.var(axes) + 1e-5)


def plain_rms_norm(x: Array) -> Array:
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def plain_adaptive(x: Array, extent: int) -> Array:
    for dim in range(1, x.ndim - 1):
        n = x.shape[dim]
        bounds = [(i * n // extent, -(-(i + 1) * n // extent)) for i in range(extent)]
        parts = [lax.slice_in_dim(x, a, b, axis=dim).mean(dim, keepdims=True) for a, b in bounds]
        x = jnp.concatenate(parts, axis=dim)
    return x


IMAGE = (8, 32, 32, 32)
KERNEL = (3, 3, 32, 32)
ROWS = np.random.default_rng(0).integers(0, 1000, 64)

CASES = (
    Case("conv 3x3", cut_out(ops.conv), plain_conv, IMAGE, (KERNEL,)),
    Case(
        "conv 3x3, dilation 4",
        cut_out(ops.conv, dilation=4),
        functools.partial(plain_conv, rhs_dilation=(4, 4)),
        IMAGE,
        (KERNEL,),
    ),
    Case(
        "conv 3x3, circular",
        cut_out(ops.conv, padding="CIRCULAR"),
        plain_circular,
        IMAGE,
        (KERNEL,),
    ),
    Case("conv 3x3x3", cut_out(ops.conv), plain_conv, (2, 16, 16, 16, 16), ((3, 3, 3, 16, 16),)),
    Case(
        "depthwise 3x3",
        functools.partial(ops.conv, groups=32),
        functools.partial(plain_conv, feature_group_count=32),
        IMAGE,
        ((3, 3, 1, 32),),
    ),
    Case(
        "grouped 3x3, 8 groups",
        functools.partial(ops.conv, groups=8),
        functools.partial(plain_conv, feature_group_count=8),
        IMAGE,
        ((3, 3, 4, 32),),
    ),
    Case(
        "grouped 3x3, 4 groups",
        functools.partial(ops.conv, groups=4),
        functools.partial(plain_conv, feature_group_count=4),
        IMAGE,
        ((3, 3, 8, 32),),
    ),
    Case(
        "transposed 2x2 s2",
        cut_out(ops.conv_transpose, strides=2, padding="VALID"),
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        IMAGE,
        ((2, 2, 32, 32),),
    ),
    Case(
        "transposed 4x4 s2",
        cut_out(ops.conv_transpose, strides=2),
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        IMAGE,
        ((4, 4, 32, 32),),
    ),
    Case(
        "local 3x3",
        cut_out(ops.local, window=(3, 3)),
        plain_local,
        (8, 16, 16, 16),
        ((16, 16, 144, 16),),
        space=2,
    ),
    Case(
        "max pool 3x3 s2",
        functools.partial(ops.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME"),
        functools.partial(plain_pool, window=3, stride=2),
        IMAGE,
    ),
    Case(
        "adaptive mean to 16x16",
        functools.partial(ops.adaptive_avg_pool, extents=(16, 16)),
        functools.partial(plain_adaptive, extent=16),
        (8, 40, 40, 32),
    ),
    Case("global mean", ops.global_avg_pool, lambda x: x.mean((1, 2)), IMAGE),
    Case(
        "nearest x2",
        lambda x: ops.resize(x, (64, 64)),
        functools.partial(plain_resize, method="nearest"),
        IMAGE,
    ),
    Case(
        "linear x2",
        lambda x: ops.resize(x, (64, 64), method="linear"),
        functools.partial(plain_resize, method="linear"),
        IMAGE,
    ),
    Case("batch norm", lambda x: ops.batch_norm(x)[0], plain_batch_norm, IMAGE),
    Case(
        "group norm, 4 groups",
        lambda x: ops.group_norm(x, 4),
        functools.partial(plain_norm, groups=4),
        IMAGE,
    ),
    Case(
        "min pool 3x3 s2",
        functools.partial(ops.min_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME"),
        lambda x: -plain_pool(-x, window=3, stride=2),
        IMAGE,
    ),
    Case("rms norm", ops.rms_norm, plain_rms_norm, IMAGE),
    Case("instance norm", ops.instance_norm, functools.partial(plain_norm, groups=32), IMAGE),
    Case("flatten", ops.flatten, lambda x: x.reshape(x.shape[0], -1), (8, 8, 8, 32)),
    Case("linear 512", cut_out(ops.linear), jnp.matmul, (64, 512), ((512, 512),)),
    Case(
        "embedding of 1000",
        lambda x, table: ops.embed(jnp.asarray(ROWS), table) * x,
        lambda x, table: table[ROWS] * x,
        (64, 64),
        ((1000, 64),),
        channel=0,
    ),
    Case(
        "concat",
        lambda x: ops.concat([x, 2 * x]),
        lambda x: jnp.concatenate([x, 2 * x], axis=-1),
        IMAGE,
    ),
)


def compiled(case: Case, side: Operator, mesh: Mesh, dtype: str) -> jax.stages.Compiled:
    """Forward and backward pass, compiled: (x, parameters, dy) to (y, dx, gradients).

    Whatever a side does, its arrays start and end where the layout has them.
    """
    where = [NamedSharding(mesh, spec) for spec in case.specs(mesh)]

    def step(arrays: Sequence[Array], cotangent: Array) -> tuple[Array, ...]:
        y, pull = jax.vjp(side, *arrays)
        return y, *pull(cotangent)

    structs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, place in zip([*case.shapes, case.out()], where, strict=True)
    ]
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=(where[-1], *where[:-1]))
        return jitted.lower(structs[:-1], structs[-1]).compile()


def inputs(case: Case, mesh: Mesh, dtype: str) -> tuple[list[Array], Array]:
    """Random arrays, placed."""
    random = np.random.default_rng(0)
    placed = [
        jax.device_put(random.standard_normal(shape).astype(dtype), NamedSharding(mesh, spec))
        for shape, spec in zip([*case.shapes, case.out()], case.specs(mesh), strict=True)
    ]
    return placed[:-1], placed[-1]
