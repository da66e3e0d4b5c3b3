"""Tiled matrix products on one GPU: the core of Winograd's convolution, and an example of such kernels."""

from shardtrain.kernels.matmul.api import matmul

__all__ = ["matmul"]
