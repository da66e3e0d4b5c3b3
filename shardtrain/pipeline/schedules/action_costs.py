"""The costs of the actions of a schedule, for the simulator: times of `F`, `I` and `W` for each stage."""

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.actions import Action

Number = Fraction | float | int


@dataclass(frozen=True)
class Costs:
    """The times of the actions of each stage for one microbatch, in any unit.

    Integers and fractions are kept exact, so that the simulator computes exact times.

    Args:
        forward: for each stage the time of its `F`.
        input: for each stage the time of its `I`.
        weight: for each stage the time of its `W`; a whole backward `B` takes both.

    Raises:
        UserError: three rows that are not equally long, a number that is negative or not finite.

    Example:
        >>> st.pipeline.Costs(forward=(1, 2), input=(1, 2), weight=(1, 0)).of(st.pipeline.Action(0, "B", 3))
        Fraction(2, 1)
    """

    forward: tuple[Number, ...]
    input: tuple[Number, ...]
    weight: tuple[Number, ...]

    def __post_init__(self) -> None:
        lengths = len(self.forward), len(self.input), len(self.weight)
        if len(set(lengths)) > 1:
            raise UserError(f"costs of {lengths} stages; give forward, input and weight for the same stages")
        for name in ("forward", "input", "weight"):
            row = getattr(self, name)
            if bad := [value for value in row if not (math.isfinite(value) and value >= 0)]:
                raise UserError(f"the cost {bad[0]} in {name}; use numbers from 0 up")
            exact = tuple(Fraction(v) if isinstance(v, Rational) else float(v) for v in row)
            object.__setattr__(self, name, exact)

    @classmethod
    def equal(cls, stages: int, chunks: int = 1) -> "Costs":
        """Returns costs by which `F`, `I` and `W` take 1 each; with several chunks on a rank, all together.

        Example:
            >>> st.pipeline.Costs.equal(4, chunks=2).of(st.pipeline.Action(3, "B", 0))
            Fraction(1, 1)
        """
        row = (Fraction(1, chunks),) * stages
        return cls(row, row, row)

    def of(self, action: Action) -> Number:
        """Returns the time of an action."""
        s = action.stage
        if action.kind == "B":
            return self.input[s] + self.weight[s]
        return {"F": self.forward, "I": self.input, "W": self.weight}[action.kind][s]
