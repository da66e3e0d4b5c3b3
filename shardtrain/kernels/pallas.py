"""Pallas kernels for GPUs, as ours are written: in Mosaic GPU and Triton, compiled or interpreted."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from shardtrain import compat


def mosaic_kernel(
    body: Callable, *, name: str, out_shape: Sequence[int], out_type: Any, interpreted: bool, **kwargs: Any
) -> Callable:
    """`plgpu.kernel` with the semantics that our kernels are written in, or in the interpreter.

    jax 0.10's default is `Lane` and 0.11's `Warpgroup`, whose vectors take no scalars.
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
        return compat.match_varying(y, *operands)[0]  # it forgets over which axes they vary

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
    """`pl.pallas_call` lowered by Triton, or in the interpreter."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    params = plt.CompilerParams(num_warps=warps, num_stages=stages)

    def call(*operands: Array) -> Array:
        same = compat.match_varying(*operands)
        varying = jax.typeof(same[0]).manual_axis_type
        out = jax.ShapeDtypeStruct(tuple(out_shape), out_type, manual_axis_type=varying)
        with jax.enable_x64(False), warnings.catch_warnings():
            # jax 0.11 says that this back end will go: it is our second choice.
            warnings.filterwarnings("ignore", ".*Triton backend is deprecated.*", DeprecationWarning)
            kernel = pl.pallas_call(
                body, out_shape=out, compiler_params=params, interpret=interpreted, name=name, **kwargs
            )
            return kernel(*same)

    return call
