"""The costs of a model's operations: counted from their shapes, or measured on the device at hand."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shardtrain import jaxprs
from shardtrain.errors import UserError
from shardtrain.jaxprs import variables
from shardtrain.pipeline.cut.graph import OperationGraph

BYTE = 8.0
"""The cost of moving a byte, in floating point operations: about what a CPU's memory takes."""

RECOMPUTED = 4 / 3
"""The cost of an operation that is computed again in the backward pass, relative to one that is not.

Forward and backward take three forward passes together, and one more if the forward pass is repeated.
"""

KINDS = ("counted", "measured")

# fmt: off
_MOVES = frozenset(
    {
        "all_gather", "all_to_all", "axis_index", "bitcast_convert_type", "broadcast_in_dim", "concatenate",
        "convert_element_type", "copy", "copy_p", "device_put", "dynamic_slice", "dynamic_update_slice",
        "expand_dims", "gather", "iota", "name", "optimization_barrier", "pad", "pbroadcast", "ppermute",
        "psum", "psum_invariant", "pvary", "random_wrap", "random_unwrap", "reduce_precision", "reshape",
        "reshard", "rev", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "transpose",
    }
)
# fmt: on
"""Operations that compute nothing; the bytes that they write are counted."""

_UNFUSED = frozenset(
    {
        "cond",
        "conv_general_dilated",
        "dot_general",
        "gather",
        "pallas_call",
        "scan",
        "shard_map",
        "sort",
        "while",
    }
)
"""Operations into which compilers fuse nothing, so that their results are written to memory."""

_RUNS_AGAIN = frozenset({"checkpoint", "remat", "remat2"})


@dataclass(frozen=True)
class OperationCosts:
    """The cost of each main operation of a graph, repeated operations that it is the first to need included.

    Attributes:
        costs: one for each main operation: floating point operations and bytes written, or seconds.
        byte: the cost of a byte that is sent to a stage, in the same unit.
    """

    costs: tuple[float, ...]
    byte: float


def flops(equation: Any) -> float:
    """Returns the number of floating point operations of an equation, including those that it calls.

    A multiplication with an addition counts as two, any other function of a number as one, and moving data as
    none. A convolution counts padding as if it were pixels, but no zeros between pixels (`lhs_dilation`). The
    body of a `scan` counts as often as it runs, and that of a `shard_map` once for every device. Of the
    branches of a conditional the costliest counts, of a loop of unknown length one trip.
    """
    name, p = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = p["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
        features = p["dimension_numbers"].rhs_spec[0]
        each = 2.0 * math.prod(kernel) / kernel[features] / math.prod(p["lhs_dilation"])
        return math.prod(out) * each
    bodies = [sum(map(flops, body.eqns)) for body in jaxprs.inner_jaxprs(equation)]
    if name == "cond":
        return float(max(bodies))
    if name.startswith("scatter"):
        return float(math.prod(equation.invars[2].aval.shape))
    if bodies and not name.startswith("reduce"):
        return float(_runs(equation) * sum(bodies))
    if name in _MOVES:
        return 0.0
    numbers = sum(math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
    if name.startswith("reduce_window"):
        return float(numbers * math.prod(p["window_dimensions"]))
    if name.startswith(("reduce", "arg")):
        return float(math.prod(equation.invars[0].aval.shape))
    return float(numbers)


def _runs(equation: Any) -> int:
    """Returns how often the body of an equation runs."""
    name, p = equation.primitive.name, equation.params
    if name == "scan":
        return p["length"]
    if name == "shard_map":  # its body is one device's part
        newly = p.get("manual_axes") or p.get("newly_manual_axes") or ()
        return math.prod(p["mesh"].shape[axis] for axis in newly)
    if name == "pallas_call":
        return math.prod(n for n in p["grid_mapping"].grid if isinstance(n, int))
    return 1


def size_of(variables: Any) -> int:
    """Returns the bytes of some variables of a jaxpr."""
    return sum(math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 4) for v in variables)


def cost_of(jaxpr: Any) -> float:
    """Returns the cost of one device's program: what it computes, and the bytes that it writes.

    Only operations into which nothing is fused are taken to write their results.
    """
    written = [v for e in jaxpr.eqns if e.primitive.name in _UNFUSED for v in e.outvars]
    return sum(map(flops, jaxpr.eqns)) + BYTE * size_of(written)


def _groups(graph: OperationGraph) -> list[list[Any]]:
    """Returns each main operation with the repeated operations that no main operation before it needs."""
    seen: set[int] = set()
    groups = []
    for equation in graph.main:
        new = [e for e in graph.repeated(variables(equation.invars)) if id(e) not in seen]
        seen |= {id(e) for e in new}
        groups.append([equation, *new])
    return groups


def _times(equation: Any) -> float:
    return RECOMPUTED if equation.primitive.name in _RUNS_AGAIN else 1.0


def counted(graph: OperationGraph) -> OperationCosts:
    """Returns the counted costs of a graph's operations: what they compute, and the bytes they write.

    A result of an elementwise operation that only one other elementwise operation reads is not written, since
    compilers fuse the two.
    """
    jaxpr = graph.traced.closed.jaxpr
    readers: dict[Any, list[Any]] = {}
    for equation in jaxpr.eqns:
        for v in variables(equation.invars):
            readers.setdefault(v, []).append(equation)
    for v in variables(jaxpr.outvars):
        readers.setdefault(v, []).append(None)

    def written(equation: Any, v: Any) -> bool:
        reading = readers.get(v, [])
        fused = (
            len(reading) == 1
            and reading[0] is not None
            and _elementwise(reading[0])
            and _elementwise(equation)
        )
        return bool(reading) and not fused

    def spent(equation: Any) -> float:
        moved = size_of(v for v in equation.outvars if written(equation, v))
        return _times(equation) * flops(equation) + BYTE * moved

    return OperationCosts(tuple(sum(map(spent, group)) for group in _groups(graph)), BYTE)


def _elementwise(equation: Any) -> bool:
    """Whether each element of a result is computed from one element of each operand."""
    name = equation.primitive.name
    if name in _UNFUSED or name.startswith(("reduce", "arg", "cum", "scatter")):
        return False
    return all(_elementwise(e) for body in jaxprs.inner_jaxprs(equation) for e in body.eqns)


def measured(graph: OperationGraph, mesh: Mesh | None = None) -> OperationCosts:
    """Returns the costs of a graph's operations in seconds: each is compiled and run by itself.

    Equal operations are measured once, and forward only: the backward pass of an operation is taken to be
    proportional. Fusion across operations is not seen. A byte between stages costs as many floating point
    operations as when costs are counted, at the speed that the whole model reaches.

    Args:
        graph: of a model that was traced on `mesh`.
        mesh: of devices at hand; without one the operations run on the default device.
    """
    known: dict[str, float] = {}
    constants = set(graph.traced.closed.jaxpr.constvars)
    idle = _seconds(lambda x: x, [jnp.zeros(())], mesh)

    def spent(equation: Any) -> float:
        used = [v for v in dict.fromkeys(variables(equation.invars)) if v not in constants]
        alone = jaxprs.subprogram(graph.traced.closed, used, [equation], equation.outvars)
        key = re.sub(r"0x[0-9a-f]+", "", str(alone.jaxpr.replace(constvars=())))
        if key not in known:
            run = jax.extend.core.jaxpr_as_fun(alone)
            known[key] = max(0.0, _seconds(run, [_filled(v.aval) for v in used], mesh) - idle)
        return _times(equation) * known[key]

    costs = tuple(sum(map(spent, group)) for group in _groups(graph))
    return OperationCosts(costs, BYTE * sum(costs) / max(1.0, sum(map(flops, graph.main))))


def _filled(aval: Any) -> Any:
    """Returns an array of a type, to measure with."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    return jnp.full(aval.shape, 0.5 if jnp.issubdtype(aval.dtype, jnp.floating) else 0, aval.dtype)


def _seconds(function: Callable, values: Sequence[Any], mesh: Mesh | None) -> float:
    """Returns the time of the shortest of a few runs."""
    if mesh is None:
        return _timed(jax.jit(function), values)
    with jax.set_mesh(mesh):
        return _timed(jax.jit(function), values)


def _timed(run: Callable, values: Sequence[Any]) -> float:
    jax.block_until_ready(run(*values))
    found, times = math.inf, 1
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(times):
            out = run(*values)
        jax.block_until_ready(out)
        found = min(found, (time.perf_counter() - start) / times)
        times = max(1, min(20, int(2e-3 / found)))
    return found


def operation_costs(
    graph: OperationGraph, costs: str = "counted", mesh: Mesh | None = None
) -> OperationCosts:
    """Returns the costs of a graph's operations, `"counted"` or `"measured"` (on `mesh`).

    Raises:
        UserError: another kind of costs.
    """
    if costs not in KINDS:
        raise UserError(f"pipeline: costs={costs!r}; there are 'counted' and 'measured'")
    return counted(graph) if costs == "counted" else measured(graph, mesh)
