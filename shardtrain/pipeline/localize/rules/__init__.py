"""How an operation on global arrays runs on one device's blocks, by the name of its primitive.

A rule takes the equation and the blocks of its operands, and gives the blocks of its results, or None where
it does not apply. Rules use grouped collectives only (all-gathers and sums): they may stand in a branch that
the devices of other stages do not take.
"""

from collections.abc import Callable, Sequence
from typing import Any

from shardtrain.pipeline.localize.block import Block
from shardtrain.pipeline.localize.rules import elementwise, lookups, shapes, sums

Rule = Callable[[Any, Sequence[Block]], list[Block] | None]

RULES: dict[str, Rule] = {**elementwise.RULES, **shapes.RULES, **sums.RULES, **lookups.RULES}
