"""Flax NNX layers and models over partitioned operators."""

from shardtrain.nn.base import Partitioned
from shardtrain.nn.context import examples
from shardtrain.nn.contract import Conv, ConvTranspose, Embed, Linear, LocallyConnected
from shardtrain.nn.flow import resharded
from shardtrain.nn.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm
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
    Upsample,
)
from shardtrain.nn.rounds import Rounds

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
    "Embed",
    "Flatten",
    "GlobalAvgPool",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LayoutTable",
    "Linear",
    "LocallyConnected",
    "MaxPool",
    "Partitioned",
    "Rounds",
    "Upsample",
    "assign",
    "examples",
    "partition_table",
    "resharded",
]
