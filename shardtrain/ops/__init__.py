"""Partitioned operators: the numbers of one device on every mesh, every byte written out.

Each takes global arrays, channels last, and works eagerly, under `jit`, and inside `jax.set_mesh(mesh)`.
"""

from shardtrain.ops.conv import ChannelPlan, channel_plan, conv, linear
from shardtrain.ops.norm import batch_norm, group_norm, layer_norm
from shardtrain.ops.pool import avg_pool, flatten, global_avg_pool, max_pool

__all__ = [
    "ChannelPlan",
    "avg_pool",
    "batch_norm",
    "channel_plan",
    "conv",
    "flatten",
    "global_avg_pool",
    "group_norm",
    "layer_norm",
    "linear",
    "max_pool",
]
