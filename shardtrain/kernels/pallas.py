"""Calls Pallas kernels for GPUs, written in Mosaic GPU or Triton, compiled or interpreted."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from shardtrain import compat


def mosaic_kernel(
    body: Callable, *, name: str, out_shape: Sequence[int], out_type: Any, interpreted: bool, **kwargs: Any
) -> Callable:
    """`plgpu.kernel` with `Lane` semantics, compiled or interpreted.

    The kernels here are written in these semantics, the default of jax 0.10. Under those of jax 0.11,
    `Warpgroup`, vectors and scalars do not mix.

    Args:
        body: the kernel.
        name: of the kernel, in profiles.
        out_shape: of the result.
        out_type: of the result.
        interpreted: whether to run on the CPU and look for races.
        kwargs: further arguments of `plgpu.kernel`.

    Returns:
        A function of the operands. Its result varies over the manual mesh axes that the operands vary over.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    semantics = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(tuple(out_shape), out_type),
        compiler_params=semantics,
        interpret=compat.mosaic_interpreter() if interpreted else None,
        kernel_name=name,
        **kwargs,
    )

    def call(*operands: Array) -> Array:
        with jax.enable_x64(False):  # indices of 64 bits are not for kernels
            y = kernel(*operands)
        return compat.match_varying(y, *operands)[0]  # plgpu.kernel drops the axes they vary over

    return call


def triton_kernel(
    body: Callable,
    *,
    name: str,
    out_shape: Sequence[int],
    out_type: Any,
    warps: int,
    stages: int,
    interpreted: bool,
    **kwargs: Any,
) -> Callable:
    """`pl.pallas_call` lowered by Triton, or interpreted.

    Args:
        body: the kernel.
        name: of the kernel, in profiles.
        out_shape: of the result.
        out_type: of the result.
        warps: of a program.
        stages: of Triton's software pipeline.
        interpreted: whether to run on the CPU.
        kwargs: further arguments of `pl.pallas_call`.

    Returns:
        A function of the operands.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    params = plt.CompilerParams(num_warps=warps, num_stages=stages)

    def call(*operands: Array) -> Array:
        same = compat.match_varying(*operands)
        varying = jax.typeof(same[0]).manual_axis_type
        out = jax.ShapeDtypeStruct(tuple(out_shape), out_type, manual_axis_type=varying)
        with jax.enable_x64(False), warnings.catch_warnings():
            # Deprecated since jax 0.11; it serves the GPUs that Mosaic GPU does not.
            warnings.filterwarnings("ignore", ".*Triton backend is deprecated.*", DeprecationWarning)
            kernel = pl.pallas_call(
                body, out_shape=out, compiler_params=params, interpret=interpreted, name=name, **kwargs
            )
            return kernel(*same)

    return call
