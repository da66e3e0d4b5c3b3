"""The front door: pads to whole tiles, picks an implementation, and differentiates."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.kernels import gpu
from shardtrain.kernels.matmul import mosaic, triton

PRECISIONS = ("default", "tf32x3", "highest")
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


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
    depth = a.shape[-2 if transpose_a else -1]
    if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or b.shape[-2] != depth or a.dtype != b.dtype:
        raise UserError(
            f"matmul: operands {a.dtype}{a.shape} and {b.dtype}{b.shape} do not agree"
            f"{' with transpose_a' if transpose_a else ''}"
        )
    if precision not in PRECISIONS:
        raise UserError(f"matmul: precision={precision!r}; there are {', '.join(map(repr, PRECISIONS))}")
    batch = a.shape[:-2]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in compat.alike(a, b)]
    found = pick(implementation, a.dtype, precision)
    y = _differentiable(transpose_a, precision, jnp.dtype(out_type or a.dtype), found, *flat)
    return y.reshape(*batch, *y.shape[-2:])


def pick(implementation: str | None, dtype: DTypeLike, precision: str, what: str = "matmul") -> str:
    """The first implementation that takes this type and precision here, or the named one.

    Raises:
        UserError: the named one does not.
    """
    names = gpu.chosen(implementation, what)
    reasons = {name: refused(name, dtype, precision) for name in names}
    found = next((name for name, reason in reasons.items() if reason is None), None)
    if found is None:
        raise UserError(f"{what}: {reasons[names[0]]}")
    return found


def refused(implementation: str, dtype: DTypeLike, precision: str) -> str | None:
    """Why an implementation does not multiply this, None if it does."""
    if implementation == "xla":
        return None
    if jnp.dtype(dtype) not in [jnp.dtype(t) for t in TYPES]:
        known = ", ".join(jnp.dtype(t).name for t in TYPES)
        return f"implementation={implementation!r} takes {known}, not {jnp.dtype(dtype).name}"
    if implementation == "mosaic" and precision == "highest" and jnp.dtype(dtype) == jnp.float32:
        return "implementation='mosaic' has no products of float32; take precision='tf32x3', or 'triton'"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _differentiable(
    transpose_a: bool, precision: str, out_type: jnp.dtype, implementation: str, a: Array, b: Array
) -> Array:
    return _compute(transpose_a, precision, out_type, implementation, a, b)


def _forward(
    transpose_a: bool, precision: str, out_type: jnp.dtype, implementation: str, a: Array, b: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _compute(transpose_a, precision, out_type, implementation, a, b), (a, b)


def _backward(
    transpose_a: bool,
    precision: str,
    out_type: jnp.dtype,
    implementation: str,
    saved: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    a, b = saved
    dy = dy.astype(a.dtype)
    run = functools.partial(_differentiable, False, precision, a.dtype, implementation)
    da = run(b, dy.mT) if transpose_a else run(dy, b.mT)
    db = _differentiable(not transpose_a, precision, b.dtype, implementation, a, dy)
    return da, db


_differentiable.defvjp(_forward, _backward)


def _compute(
    transpose_a: bool, precision: str, out_type: jnp.dtype, implementation: str, a: Array, b: Array
) -> Array:
    if implementation == "xla":
        return _by_xla(transpose_a, precision, out_type, a, b)
    rows, columns = a.shape[2 if transpose_a else 1], b.shape[2]
    room = mosaic if implementation == "mosaic" else triton
    bm, bn, bk = room.tile_sizes(rows, _whole(columns, 64), a.dtype)
    # The boundary check of the CUDA example: the borders are filled to whole tiles instead, with zeros.
    a = _padded(a, (bk, bm) if transpose_a else (bm, bk))
    b = _padded(b, (bk, bn))
    interpreted = bool((at := gpu.card()) and at.interpreted)
    if implementation == "triton":
        presets: dict[str, Any] = {
            "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
            "highest": lax.Precision.HIGHEST,
        }
        exact = a.dtype == jnp.float32 and not interpreted  # the interpreter's products are float32's own
        chosen = presets.get(precision) if exact else None
        y = triton.matmul(
            a[None],
            b[None],
            transpose_a=transpose_a,
            precision=chosen,
            out_type=out_type,
            interpreted=interpreted,
        )
    else:
        if transpose_a and a.dtype == jnp.float32:
            a, transpose_a = a.mT, False
        split = precision == "tf32x3" and a.dtype == jnp.float32
        y = mosaic.matmul(
            tf32_parts(a) if split else a[None],
            tf32_parts(b) if split else b[None],
            products=((0, 1), (1, 0), (0, 0)) if split else ((0, 0),),
            transpose_a=transpose_a,
            out_type=out_type,
            interpreted=interpreted,
        )
    return y[:, :rows, :columns]


def _by_xla(transpose_a: bool, precision: str, out_type: jnp.dtype, a: Array, b: Array) -> Array:
    levels = {"default": None, "tf32x3": lax.Precision.HIGH, "highest": lax.Precision.HIGHEST}
    numbers = (((1 if transpose_a else 2,), (1,)), ((0,), (0,)))
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    y = lax.dot_general(a, b, numbers, precision=levels[precision], preferred_element_type=accumulate)
    return y.astype(out_type)


def tf32_parts(x: Float[Array, "*shape"]) -> Float[Array, "2 *shape"]:
    """Float32 as a number of TF32's 10 bits of mantissa and what it leaves out."""
    leading = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    return jnp.stack([leading, x - leading])


def _whole(n: int, tile: int) -> int:
    return -(-n // tile) * tile


def _padded(x: Array, tile: tuple[int, int]) -> Array:
    config = [(0, 0, 0)] + [(0, _whole(n, t) - n, 0) for n, t in zip(x.shape[1:], tile, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)
