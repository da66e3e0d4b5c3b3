"""Chooses the fastest algorithm for every pass of a convolution, when a program is traced.

Times measured on this kind of device decide where there are any, and the cost model elsewhere. Both depend on
static shapes, types and the kind of device only, so all processes of a program choose alike.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import jax.numpy as jnp

from shardtrain import compat
from shardtrain.kernels.conv import costs, tables
from shardtrain.kernels.conv.task import ALGORITHMS, PASSES, ConvTask, Passes, refused

MARGIN = 1.04
"""How many times faster than direct convolution another algorithm must have been measured."""

LARGEST_ERROR = 1e-5
"""Relative error beyond which `auto` refuses an algorithm in float32."""

LEAST_CHANNELS = 8
"""Channels and filters of a group below which matrix products are too thin for the model."""


@dataclass(frozen=True)
class Estimate:
    """What is known of one algorithm for one pass.

    Attributes:
        pass_name: one of `PASSES`.
        algorithm: one of `ALGORITHMS`.
        seconds: its time; None where it is unknown.
        source: of the time: `"measured"`, `"model"`, or empty.
        multiplications: without those of the transforms.
        workspace: bytes beside input, filters and output.
        error: relative root mean square of the rounding errors.
        refused: why `auto` does not choose it whatever its time; None if it may.
        margin: how many times faster than direct convolution it must be to be chosen.
    """

    pass_name: str
    algorithm: str
    seconds: float | None
    source: str
    multiplications: int
    workspace: int
    error: float
    refused: str | None
    margin: float = 1.0


def passes_of(task: ConvTask) -> Passes:
    """The chosen algorithm of every pass, on the device that the program is traced for."""
    if not jnp.issubdtype(task.dtype, jnp.floating):
        return Passes("direct", "direct", "direct")
    return _passes(task, compat.device_kind())


def rows_of(task: ConvTask, kind: str) -> dict[str, tuple[Estimate, ...]]:
    """The estimates of all algorithms, by pass."""
    return {name: _rows(task, name, kind, tables.of(kind)) for name in PASSES}


def _passes(task: ConvTask, kind: str) -> Passes:
    return Passes(*(chosen(rows) for rows in rows_of(task, kind).values()))


def chosen(rows: tuple[Estimate, ...]) -> str:
    """The fastest algorithm, which is direct convolution unless another one is faster by its margin.

    Where any times were measured, those of the model do not count.
    """
    source = "measured" if any(row.source == "measured" for row in rows) else "model"
    known = {r.algorithm: r.seconds * r.margin for r in rows if r.seconds and r.source == source}
    if "direct" not in known:
        return "direct"
    allowed = [r.algorithm for r in rows if r.algorithm in known and not r.refused]
    return min(allowed, key=lambda algorithm: known[algorithm])  # direct comes first


@functools.lru_cache(maxsize=4096)
def _rows(task: ConvTask, name: str, kind: str, table: tables.TimingTable | None) -> tuple[Estimate, ...]:
    return tuple(_row(task, name, algorithm, kind, table) for algorithm in ALGORITHMS)


def _row(task: ConvTask, name: str, algorithm: str, kind: str, table: tables.TimingTable | None) -> Estimate:
    """The estimate of one algorithm for one pass, without numbers if it cannot compute the pass."""
    reason = _impossible(task, name, algorithm)
    if reason is not None:
        return Estimate(name, algorithm, None, "", 0, 0, 0.0, reason)
    run = task.dual if name == "input" and task.problem.dense else task
    measured = (table.seconds(task, name) if table else {}).get(algorithm)
    rates = _rates(task, kind, table)
    if measured is None:
        seconds, source = _modelled(run, name, algorithm, rates), "model"
    else:
        seconds, source = measured, "measured"
    space, error = costs.workspace(run, algorithm), costs.error(run, algorithm, kind)
    reason = _unwise(run, algorithm, kind, space, error, rates.workspace if rates else None)
    count = costs.multiplications(run, algorithm)
    margin = 1.0
    if algorithm != "direct" and seconds:
        margin = MARGIN if source == "measured" or rates is None else rates.margins[name][algorithm]
    return Estimate(name, algorithm, seconds, source if seconds else "", count, space, error, reason, margin)


def _rates(task: ConvTask, kind: str, table: tables.TimingTable | None) -> costs.Rates | None:
    """Rates fitted to the table, which are of float32, or those of a data sheet."""
    if table is not None and table.rates is not None:
        return table.rates if task.dtype == "float32" else None
    return costs.sheet_rates(kind, task.dtype, task.problem.precision)


def _modelled(task: ConvTask, name: str, algorithm: str, rates: costs.Rates | None) -> float | None:
    """The time by the model; None where it does not apply."""
    p = task.problem
    thin = p.groups > 1 and min(task.channels, task.filters) // p.groups < LEAST_CHANNELS
    if rates is None or thin or algorithm not in rates.by_pass.get(name, {}):
        return None
    return costs.seconds(task, algorithm, rates.by_pass[name][algorithm], rates.launch)


def _impossible(task: ConvTask, name: str, algorithm: str) -> str | None:
    """Why an algorithm cannot compute a pass; None if it can."""
    p = task.problem
    if algorithm == "direct":
        return None
    if not 1 <= len(p.window) <= 3 or task.products < 1:
        return "nothing to choose from here"
    if max(p.input_dilation) > 1:
        return "zeros between inputs"
    if name == "input" and not p.dense:
        return "zeros between the rows of a gradient"
    if refused(algorithm, p.window, p.strides):
        return "no strides" if max(p.strides) > 1 else "no window of more than 7 rows"
    return None


def _unwise(
    task: ConvTask, algorithm: str, kind: str, space: int, error: float, limit: int | None
) -> str | None:
    """Why `auto` refuses an algorithm that can compute the pass; None if it does not."""
    if algorithm == "direct":
        return None
    if algorithm == "winograd":
        beyond = [f for f in costs.tiles(task) if f.tile > 4]
        if beyond and costs.few_digits(kind, task.dtype, task.problem.precision):
            name = task.dtype if jnp.finfo(task.dtype).nmant < 20 else "TF32"
            return f"F({beyond[0].outputs}, {beyond[0].taps}) in {name} loses too many digits"
        if error > LARGEST_ERROR and task.dtype == "float32":
            return f"errors beyond {LARGEST_ERROR:.0e}"
    if limit is not None and space > limit:
        return f"a workspace of more than {limit >> 20} MiB"
    return None


_listening: ContextVar[list[tuple[ConvTask, Passes]] | None] = ContextVar("_listening", default=None)


def heard(task: ConvTask, passes: Passes) -> None:
    """Tells the enclosing `listening` which algorithms compute a convolution."""
    if (found := _listening.get()) is not None:
        found.append((task, passes))


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[ConvTask, Passes]]]:
    """Collects the convolutions that are traced within it, with their algorithms."""
    found: list[tuple[ConvTask, Passes]] = []
    token = _listening.set(found)
    try:
        yield found
    finally:
        _listening.reset(token)
