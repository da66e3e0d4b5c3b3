"""Where to cut: stages of equal cost, where little crosses."""

import math
from collections.abc import Sequence
from typing import Any

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.pipeline.cut import Flow

BYTE = 8.0
"""What moving a byte costs, in floating point operations: about what a CPU's memory takes."""


def flops(equation: Any) -> float:
    """Floating point operations of an equation of a jaxpr, what it calls included."""
    name, p = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = p["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = p["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(out) * math.prod(kernel) / kernel[features]
    inner = list(compat.inner_jaxprs(equation))
    if not inner:
        return float(sum(math.prod(v.aval.shape) for v in equation.outvars))
    times = p.get("length", 1)
    if name == "shard_map":  # its body is one device's part
        newly = p.get("manual_axes") or p.get("newly_manual_axes") or ()
        times *= math.prod(p["mesh"].shape[axis] for axis in newly)
    return times * sum(flops(e) for body in inner for e in body.eqns)


def _bytes(variables: Any) -> int:
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)


def cost(equation: Any) -> float:
    """What an equation costs: its operations and the bytes it writes."""
    return flops(equation) + BYTE * _bytes(equation.outvars)


def allowed(flow: Flow) -> list[int]:
    """Positions among the main operations at which a stage may begin: no parameter is used on both sides."""
    params, state, _ = flow.traced.groups()
    first: dict[Any, int] = {}
    last: dict[Any, int] = {}
    moving = flow.moving()
    for i, uses in enumerate(flow.uses):
        for v in uses:
            if v in moving or v in params:
                first.setdefault(v, i)
                last[v] = i
    for v, i in moving.items():
        first.setdefault(v, i)
        last[v] = max(last.get(v, i), i)
    shut = {c for v in first for c in range(first[v] + 1, last[v] + 1)}
    return [c for c in range(1, len(flow.main)) if c not in shut]


def balance(flow: Flow, stages: int, costs: Sequence[float] | None = None) -> list[int]:
    """The positions at which `stages` stages begin (but the first), so that the costliest costs least.

    A stage costs its operations and the bytes that arrive at it.

    Raises:
        UserError: fewer places to cut than stages.
    """
    places = allowed(flow)
    if len(places) < stages - 1:
        raise UserError(
            f"pipeline: the model can be cut into {len(places) + 1} stages at most, not {stages}; "
            f"use pipe={len(places) + 1} or a deeper model"
        )
    sums = [0.0]
    for value in costs or [cost(e) for e in flow.main]:
        sums.append(sums[-1] + value)
    arriving = {c: BYTE * _bytes(flow.crossing(c)) for c in places} | {0: 0.0}
    ends = [0, *places, len(flow.main)]
    # best[k][j]: (costliest stage, bytes) of the first k stages that end at ends[j], and where the last began
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for k in range(1, stages + 1):
        row: dict[int, tuple[float, float, int]] = {}
        for j in range(k, len(ends)):
            if (j == len(ends) - 1) != (k == stages):
                continue
            for i, (most, total, _) in best[-1].items():
                if i < j:
                    here = sums[ends[j]] - sums[ends[i]] + arriving[ends[i]]
                    one = (max(most, here), total + arriving[ends[i]], i)
                    row[j] = min(row.get(j, one), one)
        best.append(row)
    positions, j = [], len(ends) - 1
    for k in range(stages, 1, -1):
        j = best[k][j][2]
        positions.append(ends[j])
    return positions[::-1]
