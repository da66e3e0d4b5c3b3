"""What a mesh costs: the collectives of a compiled program."""

from shardtrain.plan import census

__all__ = ["census"]
