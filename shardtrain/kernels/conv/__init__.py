"""Convolution on one device by several algorithms."""

from shardtrain.kernels.conv.api import ALGORITHMS, conv, refused
from shardtrain.kernels.conv.direct import transposed
from shardtrain.kernels.conv.tiles import window_sizes

__all__ = ["ALGORITHMS", "conv", "refused", "transposed", "window_sizes"]
