"""Convolution on one device by several algorithms, and the choice between them."""

from shardtrain.kernels.conv.api import conv, implementation
from shardtrain.kernels.conv.select import Estimate, listening, rows_of
from shardtrain.kernels.conv.tables import load
from shardtrain.kernels.conv.task import ALGORITHMS, PASSES, ConvTask, Passes, refused
from shardtrain.kernels.tiles import transposed, window_sizes

__all__ = [
    "ALGORITHMS",
    "PASSES",
    "ConvTask",
    "Estimate",
    "Passes",
    "conv",
    "implementation",
    "listening",
    "load",
    "refused",
    "rows_of",
    "transposed",
    "window_sizes",
]
