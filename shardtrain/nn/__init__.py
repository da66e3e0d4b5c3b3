"""Flax NNX layers and models that run on any mesh, over the partitioned operators of `shardtrain.ops`.

Layers with a namesake in `nnx` take its arguments and have its parameter names, so models and checkpoints
move over unchanged.
"""

from shardtrain.nn.activation import PReLU
from shardtrain.nn.attention import MultiHeadAttention
from shardtrain.nn.base import Partitioned
from shardtrain.nn.conv import Conv, ConvTranspose, LocallyConnected
from shardtrain.nn.examples import examples
from shardtrain.nn.linear import Einsum, Embed, Linear, LinearGeneral
from shardtrain.nn.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from shardtrain.nn.partition import LayoutTable, assign, partition_table
from shardtrain.nn.pool import (
    AdaptiveAvgPool,
    AdaptiveMaxPool,
    AvgPool,
    Concat,
    Crop,
    Dropout,
    Flatten,
    GlobalAvgPool,
    MaxPool,
    MinPool,
    Upsample,
)
from shardtrain.nn.rounds import Rounds
from shardtrain.nn.transitions import resharded
from shardtrain.nn.weight_norm import WeightNorm

__all__ = [
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "BatchNorm",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Crop",
    "Dropout",
    "Einsum",
    "Embed",
    "Flatten",
    "GlobalAvgPool",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LayoutTable",
    "Linear",
    "LinearGeneral",
    "LocallyConnected",
    "MaxPool",
    "MinPool",
    "MultiHeadAttention",
    "PReLU",
    "Partitioned",
    "RMSNorm",
    "Rounds",
    "Upsample",
    "WeightNorm",
    "assign",
    "examples",
    "partition_table",
    "resharded",
]
