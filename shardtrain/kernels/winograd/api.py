"""`winograd`: chooses an implementation and defines the gradients."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.kernels import gpu
from shardtrain.kernels.matmul import api as products
from shardtrain.kernels.winograd import stages, xla
from shardtrain.kernels.winograd.cook_toom import algorithm
from shardtrain.kernels.winograd.stages import WinogradSettings


def tile_outputs(window: Sequence[int], dtype: DTypeLike) -> tuple[int, ...]:
    """`m` of F(m, r) in every dimension: tiles of 6 pixels, or of 4 for types with few digits."""
    few = jnp.finfo(dtype).nmant < 20
    return tuple(max(1, (5 if few else 7) - r if r <= 4 else 9 - r) for r in window)


def winograd(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    bias: Float[Array, " channels_out"] | None = None,
    *,
    outputs: Sequence[int],
    groups: int = 1,
    relu: bool = False,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
    implementation: str | None = None,
    fused: bool | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution without padding and with stride 1 on one device, by F(m, r) in every dimension.

    Args:
        x: input.
        kernel: filters.
        bias: added to every pixel, as part of the output transform.
        outputs: `m` of every dimension.
        groups: feature groups.
        relu: whether to apply ReLU, as part of the output transform.
        precision: of float32 products; `"high"` is three TF32 products on GPUs.
        out_type: of the result, the input's by default.
        implementation: `"mosaic"`, `"triton"`, `"xla"`, or None for the first of them that supports the
            device and the arguments.
        fused: whether one GPU kernel computes the product and the output transform; None for whichever moves
            fewer bytes.

    Returns:
        The output. Its gradients are computed by the same algorithm and implementation; those of the GPU
        kernels cannot be differentiated again.

    Raises:
        UserError: a named implementation that does not support the device or the arguments.

    Example:
        >>> from shardtrain.kernels.winograd import winograd
        >>> winograd(jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 6)), outputs=(4, 4)).shape
        (1, 6, 7, 6)

    References:
        Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
    """
    settings = picked(
        x.shape,
        kernel.shape,
        x.dtype,
        outputs=outputs,
        groups=groups,
        relu=relu,
        precision=precision,
        out_type=out_type,
        implementation=implementation,
        fused=fused,
    )
    if settings is None:
        y = xla.winograd(x, kernel, outputs=outputs, groups=groups, precision=precision, out_type=out_type)
        if bias is not None:
            y = y + bias.astype(y.dtype)
        return jax.nn.relu(y) if relu else y
    line = x.ndim == 3
    if line:  # a line is an image of one row
        x, kernel = x[:, None], kernel[None]
    operands = compat.match_varying(x, kernel, *([] if bias is None else [bias]))
    y = _by_kernels(settings, *operands, *([None] if bias is None else []))
    return y[:, 0] if line else y


def picked(
    x: Sequence[int],
    kernel: Sequence[int],
    dtype: DTypeLike,
    *,
    outputs: Sequence[int],
    groups: int = 1,
    relu: bool = False,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
    implementation: str | None = None,
    fused: bool | None = None,
) -> WinogradSettings | None:
    """The settings of the GPU kernels for a convolution; None if plain JAX computes it.

    Args:
        x: shape of the input.
        kernel: shape of the filters.
        dtype: of both.
        outputs: see `winograd`, as all further arguments.

    Raises:
        UserError: a named implementation that does not support the device or the arguments.
    """
    reasons = []
    for name in gpu.chosen(implementation, "winograd"):
        if name == "xla":
            return None
        level = _level(precision)
        reason = _no_kernels(name, len(kernel) - 2, groups) or products.refused(name, dtype, level, out_type)
        if reason is None:
            found = xla.algorithms(kernel[:-2], outputs)
            pair = (algorithm(1, 1), found[0]) if len(found) == 1 else (found[0], found[1])
            settings = WinogradSettings(pair, name, level, jnp.dtype(out_type or dtype), relu, fused)
            image = (x[0], 1, *x[1:]) if len(found) == 1 else tuple(x)
            reason = stages.refused(settings, image, kernel[-1], dtype)
            if reason is None:
                return settings
        reasons.append(reason)
    raise UserError(f"winograd: {reasons[0]}")


def _no_kernels(name: str, rank: int, groups: int) -> str | None:
    if not 1 <= rank <= 2:
        return f"implementation={name!r} has 1 and 2 dimensions, not {rank}; use 'xla'"
    if groups > 1:
        return f"implementation={name!r} has no groups, not {groups}; use 'xla'"
    return None


def _level(precision: lax.PrecisionLike) -> str:
    """The precision of `kernels.matmul` for one of `lax`, by the stricter one of a pair."""
    if precision is None:
        precision = compat.default_precision()
    names: dict[Any, str] = {
        "none": "default", "default": "default", "bfloat16": "default", "fastest": "default",
        "high": "tf32x3", "bfloat16_3x": "tf32x3", "tensorfloat32": "tf32x3",
        "tf32_tf32_f32": "default", "tf32_tf32_f32_x3": "tf32x3",
        "highest": "highest", "float32": "highest",
    }  # fmt: skip
    given = precision if isinstance(precision, tuple) else (precision,)
    levels = [names.get(str(getattr(p, "name", p)).lower(), "highest") for p in given]
    return max(levels, key=products.PRECISIONS.index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernels(settings: WinogradSettings, x: Array, kernel: Array, bias: Array | None) -> Array:
    return stages.convolve(settings, x, kernel, bias)


def _forward(
    settings: WinogradSettings, x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None, Array | None]]:
    y = _by_kernels(settings, x, kernel, bias)  # which has a gradient rule of its own
    return y, (x, kernel, bias, y if settings.relu else None)


def _backward(
    settings: WinogradSettings, saved: tuple[Array, Array, Array | None, Array | None], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias, y = saved
    if y is not None:
        dy = jnp.where(y > 0, dy, jnp.zeros_like(dy))
    dbias = None if bias is None else dy.astype(jnp.float32).sum((0, 1, 2)).astype(bias.dtype)
    dx, dkernel = _pulled(settings, x, kernel, dy.astype(x.dtype))
    return dx, dkernel, dbias


_by_kernels.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pulled(settings: WinogradSettings, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    dkernel = stages.filter_gradient(settings, x, dy)
    return stages.input_gradient(settings, kernel, dy).astype(x.dtype), dkernel.astype(kernel.dtype)


def _no_second(settings: WinogradSettings, *_: Array) -> Any:
    raise UserError(
        f"winograd: the gradients of implementation={settings.implementation!r} cannot be differentiated "
        f"again; take implementation='xla'"
    )


_pulled.defvjp(_no_second, _no_second)
