"""Winograd's convolution: its exact matrices, and implementations in plain JAX and for GPUs."""

from shardtrain.kernels.winograd.api import picked, tile_outputs, winograd

__all__ = ["picked", "tile_outputs", "winograd"]
