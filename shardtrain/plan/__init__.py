"""What a mesh costs: the collectives of a compiled program, and what a step will send and need."""

from shardtrain.plan import census
from shardtrain.plan.program import compiled_step
from shardtrain.plan.summary import lines

__all__ = ["census", "compiled_step", "lines"]
