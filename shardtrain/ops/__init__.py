"""Partitioned operators: they give the same numbers on every mesh, with their communication written out.

Each operator takes global arrays, channels last, and works eagerly and under `jit`: on one device without a
mesh, and partitioned inside `with jax.set_mesh(mesh):`.
"""

from shardtrain.ops.attention import attention
from shardtrain.ops.channels import ChannelPlan, channel_plan
from shardtrain.ops.conv import conv
from shardtrain.ops.embed import embed
from shardtrain.ops.example_norm import group_norm, instance_norm, layer_norm, rms_norm
from shardtrain.ops.explain import Explanation, explain_conv, load_conv_table
from shardtrain.ops.linear import linear
from shardtrain.ops.locally_connected import local
from shardtrain.ops.norm import batch_norm
from shardtrain.ops.pool import avg_pool, global_avg_pool, max_pool, min_pool
from shardtrain.ops.resample import adaptive_avg_pool, adaptive_max_pool, pad, resize
from shardtrain.ops.reshard import reshard
from shardtrain.ops.shape import concat, flatten
from shardtrain.ops.transpose import conv_transpose, torch_padding
from shardtrain.ops.turns import take_turn

__all__ = [
    "ChannelPlan",
    "Explanation",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "attention",
    "avg_pool",
    "batch_norm",
    "channel_plan",
    "concat",
    "conv",
    "conv_transpose",
    "embed",
    "explain_conv",
    "flatten",
    "global_avg_pool",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear",
    "load_conv_table",
    "local",
    "max_pool",
    "min_pool",
    "pad",
    "reshard",
    "resize",
    "rms_norm",
    "take_turn",
    "torch_padding",
]
