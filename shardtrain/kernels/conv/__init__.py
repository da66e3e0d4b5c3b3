"""Convolution on one device by several algorithms."""

from shardtrain.kernels.conv.direct import direct, transposed

__all__ = ["direct", "transposed"]
