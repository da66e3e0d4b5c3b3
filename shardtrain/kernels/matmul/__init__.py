"""Matrix product on one GPU by tiles: Winograd's core, and the worked example of how kernels are written."""

from shardtrain.kernels.matmul.api import matmul

__all__ = ["matmul"]
