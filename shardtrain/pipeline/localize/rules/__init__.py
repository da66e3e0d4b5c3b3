"""Rules by which operations on global arrays run on one device's blocks, by the name of the primitive.

A rule takes the equation and the blocks of its operands. It returns the blocks of its results, or None if it
does not apply. Rules use grouped collectives only (all-gathers and sums), since they may be in a branch that
the devices of other stages do not take.
"""

from collections.abc import Callable, Sequence
from typing import Any

from shardtrain.pipeline.localize.block import Block
from shardtrain.pipeline.localize.rules import elementwise, lookups, reductions, shapes

Rule = Callable[[Any, Sequence[Block]], list[Block] | None]

RULES: dict[str, Rule] = {**elementwise.RULES, **shapes.RULES, **reductions.RULES, **lookups.RULES}
