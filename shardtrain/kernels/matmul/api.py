"""`matmul`: chooses an implementation, pads the operands to its tiles, and defines the gradients."""

import functools
import importlib
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.kernels import gpu
from shardtrain.kernels.tiles import next_multiple, pad_or_crop

PRECISIONS = ("default", "tf32x3", "highest")
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclass(frozen=True)
class MatmulSettings:
    """The static arguments of a product, see `matmul`."""

    transpose_a: bool
    precision: str
    out_type: Any
    implementation: str


def matmul(
    a: Float[Array, "*batch _ _"],
    b: Float[Array, "*batch _ columns"],
    *,
    transpose_a: bool = False,
    precision: str = "default",
    out_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch _ columns"]:
    """Tiled matrix product on one device, with sums in at least float32.

    Args:
        a: left operand `(*batch, rows, depth)`, or `(*batch, depth, rows)` with `transpose_a`.
        b: right operand `(*batch, depth, columns)`, of the same type.
        transpose_a: whether `a` is given transposed.
        precision: of float32 products: `"default"` (the device's, which is TF32 on GPUs), `"tf32x3"` (three
            TF32 products, 21 bits) or `"highest"` (full float32, which tensor cores do not have).
        out_type: of the result, that of the operands by default.
        implementation: `"mosaic"`, `"triton"`, `"xla"`, or None for the first of them that supports the
            device and the arguments.

    Returns:
        `a @ b`. Its gradients are computed by the same implementation.

    Raises:
        UserError: shapes or types that do not agree, or a named implementation that does not support the
            device or the arguments.

    Example:
        >>> from shardtrain.kernels.matmul import matmul
        >>> matmul(jnp.ones((100, 30)), jnp.ones((30, 70))).shape
        (100, 70)
    """
    matrices = min(a.ndim, b.ndim) >= 2 and a.shape[:-2] == b.shape[:-2] and a.dtype == b.dtype
    if not matrices or b.shape[-2] != a.shape[-2 if transpose_a else -1]:
        raise UserError(
            f"matmul: operands {a.dtype}{a.shape} and {b.dtype}{b.shape} do not agree"
            f"{' with transpose_a' if transpose_a else ''}"
        )
    if precision not in PRECISIONS:
        raise UserError(f"matmul: precision={precision!r}; there are {', '.join(map(repr, PRECISIONS))}")
    batch = a.shape[:-2]
    flat = [x.reshape(math.prod(batch), *x.shape[-2:]) for x in compat.match_varying(a, b)]
    found = pick(implementation, a.dtype, precision, out_type)
    if 0 in (*a.shape, *b.shape):
        found = "xla"  # nothing to multiply
    settings = MatmulSettings(transpose_a, precision, jnp.dtype(out_type or a.dtype), found)
    y = _differentiable(settings, *flat)
    return y.reshape(*batch, *y.shape[-2:])


def pick(
    implementation: str | None, dtype: DTypeLike, precision: str, out_type: DTypeLike | None = None
) -> str:
    """The first implementation that supports these types and this precision here, or the named one.

    Raises:
        UserError: the named one does not support them.
    """
    names = gpu.chosen(implementation, "matmul")
    reasons = {name: refused(name, dtype, precision, out_type) for name in names}
    found = next((name for name, reason in reasons.items() if reason is None), None)
    if found is None:
        raise UserError(f"matmul: {reasons[names[0]]}")
    return found


def refused(
    implementation: str, dtype: DTypeLike, precision: str, out_type: DTypeLike | None = None
) -> str | None:
    """Why an implementation does not support these types and this precision; None if it does."""
    if implementation == "xla":
        return None
    for name, given in (("takes", dtype), ("gives", out_type or dtype)):
        if jnp.dtype(given) not in [jnp.dtype(t) for t in TYPES]:
            known = ", ".join(jnp.dtype(t).name for t in TYPES)
            return f"implementation={implementation!r} {name} {known}, not {jnp.dtype(given).name}"
    at = gpu.card()
    if implementation == "mosaic" and jnp.dtype(dtype) == jnp.float32 and at is not None and at.blackwell:
        return "implementation='mosaic' has no products of float32 on Blackwell; use 'triton'"
    if implementation == "mosaic" and precision == "highest" and jnp.dtype(dtype) == jnp.float32:
        return "implementation='mosaic' has no products of float32; take precision='tf32x3', or 'triton'"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(settings: MatmulSettings, a: Array, b: Array) -> Array:
    return _compute(settings, a, b)


def _forward(settings: MatmulSettings, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _compute(settings, a, b), (a, b)


def _backward(settings: MatmulSettings, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    a, b = saved
    dy = dy.astype(a.dtype)
    plain = replace(settings, transpose_a=False, out_type=a.dtype)
    da = _differentiable(plain, b, dy.mT) if settings.transpose_a else _differentiable(plain, dy, b.mT)
    return da, _differentiable(replace(plain, transpose_a=not settings.transpose_a), a, dy)


_differentiable.defvjp(_forward, _backward)


def _compute(settings: MatmulSettings, a: Array, b: Array) -> Array:
    if settings.implementation == "xla":
        return _by_xla(settings, a, b)
    run = jax.custom_batching.custom_vmap(functools.partial(_by_kernels, settings))

    @run.def_vmap
    def rule(size: int, mapped: Any, a: Array, b: Array) -> tuple[Array, bool]:
        """Merges the mapped dimension into the batch, since the kernels have a fixed number of dimensions."""
        y = run(*(x.reshape(-1, *x.shape[2:]) for x in gpu.all_mapped(size, mapped, (a, b))))
        return y.reshape(size, -1, *y.shape[1:]), True

    return run(a, b)


def _by_kernels(settings: MatmulSettings, a: Array, b: Array) -> Array:
    transpose_a, at = settings.transpose_a, gpu.card()
    assert at is not None
    rows, columns = a.shape[2 if transpose_a else 1], b.shape[2]
    # Imported here, since jax's Mosaic GPU takes most of a second to import and only GPUs need it.
    room = importlib.import_module(f"shardtrain.kernels.matmul.{settings.implementation}")
    bm, bn, bk = room.tile_sizes(rows, next_multiple(columns, 64), a.dtype)
    # Kernels in CUDA check array bounds; here the operands are padded with zeros to whole tiles instead.
    a = _padded(a, (bk, bm) if transpose_a else (bm, bk))
    b = _padded(b, (bk, bn))
    if settings.implementation == "triton":
        presets: dict[str, Any] = {
            "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
            "highest": lax.Precision.HIGHEST,
        }
        exact = a.dtype == jnp.float32 and not at.interpreted  # the interpreter's products are float32's own
        y = room.matmul(
            a,
            b,
            transpose_a=transpose_a,
            precision=presets.get(settings.precision) if exact else None,
            out_type=settings.out_type,
            interpreted=at.interpreted,
        )
    else:
        if transpose_a and a.dtype == jnp.float32:
            a, transpose_a = a.mT, False
        split = settings.precision == "tf32x3" and a.dtype == jnp.float32
        y = room.matmul(
            tf32_parts(a) if split else a[None],
            tf32_parts(b) if split else b[None],
            products=((0, 1), (1, 0), (0, 0)) if split else ((0, 0),),
            transpose_a=transpose_a,
            out_type=settings.out_type,
            blackwell=at.blackwell,
            interpreted=at.interpreted,
        )
    return y[:, :rows, :columns]


def _by_xla(settings: MatmulSettings, a: Array, b: Array) -> Array:
    levels = {"default": None, "tf32x3": lax.Precision.HIGH, "highest": lax.Precision.HIGHEST}
    numbers = (((1 if settings.transpose_a else 2,), (1,)), ((0,), (0,)))
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    precision = levels[settings.precision]
    y = lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=accumulate)
    return y.astype(settings.out_type)


def tf32_parts(x: Float[Array, "*shape"]) -> Float[Array, "2 *shape"]:
    """Float32 numbers as the nearest with TF32's 10 bits of mantissa, and the remainder."""
    leading = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    return jnp.stack([leading, x - leading])


def _padded(x: Array, tile: tuple[int, int]) -> Array:
    return pad_or_crop(x, (x.shape[0], *map(next_multiple, x.shape[1:], tile)))
