"""What a mesh costs before launch: the collectives, memory and parameters of a training step."""

from shardtrain.plan import census
from shardtrain.plan.program import compiled_step
from shardtrain.plan.summary import lines

__all__ = ["census", "compiled_step", "lines"]
