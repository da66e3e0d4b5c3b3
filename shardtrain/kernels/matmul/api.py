"""The front door: pads to whole tiles, picks an implementation, and differentiates."""

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
from shardtrain.kernels.tiles import filled, whole

PRECISIONS = ("default", "tf32x3", "highest")
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclass(frozen=True)
class MatmulSettings:
    """What is static of a product; see `matmul`."""

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
    """Matrix product on one device by tiles, sums in at least float32.

    Args:
        a: left operand `(*batch, rows, depth)`, or `(*batch, depth, rows)` with `transpose_a`.
        b: right operand `(*batch, depth, columns)`, of the same type.
        transpose_a: whether `a` is given transposed.
        precision: of the products of float32: `"default"` (the device's, TF32 on GPUs), `"tf32x3"` (three
            products of TF32: 21 bits) or `"highest"` (float32's own, which the tensor cores do not have).
        out_type: of the result, the operands' by default.
        implementation: `"mosaic"`, `"triton"`, `"xla"`, or None for the first of them that does it here.

    Returns:
        `a @ b`. Gradients by the same implementation.

    Raises:
        UserError: shapes or types that do not agree, a named implementation that cannot do it.

    Example:
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
    static = MatmulSettings(transpose_a, precision, jnp.dtype(out_type or a.dtype), found)
    y = _differentiable(static, *flat)
    return y.reshape(*batch, *y.shape[-2:])


def pick(
    implementation: str | None, dtype: DTypeLike, precision: str, out_type: DTypeLike | None = None
) -> str:
    """The first implementation that takes this type and precision here, or the named one.

    Raises:
        UserError: the named one does not.
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
    """Why an implementation does not multiply this, None if it does."""
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
def _differentiable(static: MatmulSettings, a: Array, b: Array) -> Array:
    return _compute(static, a, b)


def _forward(static: MatmulSettings, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _compute(static, a, b), (a, b)


def _backward(static: MatmulSettings, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    a, b = saved
    dy = dy.astype(a.dtype)
    plain = replace(static, transpose_a=False, out_type=a.dtype)
    da = _differentiable(plain, b, dy.mT) if static.transpose_a else _differentiable(plain, dy, b.mT)
    return da, _differentiable(replace(plain, transpose_a=not static.transpose_a), a, dy)


_differentiable.defvjp(_forward, _backward)


def _compute(static: MatmulSettings, a: Array, b: Array) -> Array:
    if static.implementation == "xla":
        return _by_xla(static, a, b)
    run = jax.custom_batching.custom_vmap(functools.partial(_by_kernels, static))

    @run.def_vmap
    def rule(size: int, mapped: Any, a: Array, b: Array) -> tuple[Array, bool]:
        """One product of a larger batch: kernels have no dimension to spare."""
        y = run(*(x.reshape(-1, *x.shape[2:]) for x in gpu.all_mapped(size, mapped, (a, b))))
        return y.reshape(size, -1, *y.shape[1:]), True

    return run(a, b)


def _by_kernels(static: MatmulSettings, a: Array, b: Array) -> Array:
    transpose_a, at = static.transpose_a, gpu.card()
    assert at is not None
    rows, columns = a.shape[2 if transpose_a else 1], b.shape[2]
    # Here, for jax's Mosaic GPU takes most of a second to import, which only GPUs need.
    room = importlib.import_module(f"shardtrain.kernels.matmul.{static.implementation}")
    bm, bn, bk = room.tile_sizes(rows, whole(columns, 64), a.dtype)
    # The boundary check of the CUDA example: the borders are filled to whole tiles instead, with zeros.
    a = _padded(a, (bk, bm) if transpose_a else (bm, bk))
    b = _padded(b, (bk, bn))
    if static.implementation == "triton":
        presets: dict[str, Any] = {
            "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
            "highest": lax.Precision.HIGHEST,
        }
        exact = a.dtype == jnp.float32 and not at.interpreted  # the interpreter's products are float32's own
        y = room.matmul(
            a,
            b,
            transpose_a=transpose_a,
            precision=presets.get(static.precision) if exact else None,
            out_type=static.out_type,
            interpreted=at.interpreted,
        )
    else:
        if transpose_a and a.dtype == jnp.float32:
            a, transpose_a = a.mT, False
        split = static.precision == "tf32x3" and a.dtype == jnp.float32
        y = room.matmul(
            tf32_parts(a) if split else a[None],
            tf32_parts(b) if split else b[None],
            products=((0, 1), (1, 0), (0, 0)) if split else ((0, 0),),
            transpose_a=transpose_a,
            out_type=static.out_type,
            blackwell=at.blackwell,
            interpreted=at.interpreted,
        )
    return y[:, :rows, :columns]


def _by_xla(static: MatmulSettings, a: Array, b: Array) -> Array:
    levels = {"default": None, "tf32x3": lax.Precision.HIGH, "highest": lax.Precision.HIGHEST}
    numbers = (((1 if static.transpose_a else 2,), (1,)), ((0,), (0,)))
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    precision = levels[static.precision]
    y = lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=accumulate)
    return y.astype(static.out_type)


def tf32_parts(x: Float[Array, "*shape"]) -> Float[Array, "2 *shape"]:
    """Float32 as a number of TF32's 10 bits of mantissa and what it leaves out."""
    leading = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    return jnp.stack([leading, x - leading])


def _padded(x: Array, tile: tuple[int, int]) -> Array:
    return filled(x, (x.shape[0], *map(whole, x.shape[1:], tile)))
