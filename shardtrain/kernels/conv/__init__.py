"""Convolution on one device by several algorithms."""

from shardtrain.kernels.conv.api import ALGORITHMS, conv, refused
from shardtrain.kernels.conv.direct import transposed

__all__ = ["ALGORITHMS", "conv", "refused", "transposed"]
