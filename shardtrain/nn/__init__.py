"""Flax NNX layers and models over partitioned operators."""

from shardtrain.nn.context import examples
from shardtrain.nn.layers import (
    AvgPool,
    BatchNorm,
    Conv,
    Dropout,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool,
    Partitioned,
)
from shardtrain.nn.partition import LayoutTable, assign, partition_table

__all__ = [
    "AvgPool",
    "BatchNorm",
    "Conv",
    "Dropout",
    "GroupNorm",
    "LayerNorm",
    "LayoutTable",
    "Linear",
    "MaxPool",
    "Partitioned",
    "assign",
    "examples",
    "partition_table",
]
