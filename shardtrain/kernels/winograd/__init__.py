"""Winograd's convolution: exact matrices, plain jax, and kernels for GPUs."""

from shardtrain.kernels.winograd.api import picked, tile_outputs, winograd

__all__ = ["picked", "tile_outputs", "winograd"]
