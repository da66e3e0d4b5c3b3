"""Winograd's convolution: exact matrices, plain jax, and kernels for GPUs."""

from shardtrain.kernels.winograd.api import tile_outputs, winograd

__all__ = ["tile_outputs", "winograd"]
