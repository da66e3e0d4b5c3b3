"""Measured times of convolutions, one table for every kind of device; `tools/tune_conv.py` writes them.

JSON: `version`, `device_kind`, `jax`, `machine`, `rates` of the model fitted to it (or null), and `rows`,
each a `layer` as `task.parse` reads it and `seconds` by pass and algorithm.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardtrain.errors import UserError
from shardtrain.kernels.conv.costs import Rates
from shardtrain.kernels.conv.task import ALGORITHMS, PASSES, ConvTask, parse

VERSION = 1

NEAR = 2.0
"""How many times larger or smaller a measured batch may be."""

Seconds = Mapping[str, float]
"""By algorithm."""


@dataclass(frozen=True, eq=False)
class TimingTable:
    """What was measured on one kind of device.

    Attributes:
        kind: `jax.Device.device_kind`.
        rates: of the cost model, fitted to the rows, for float32.
        rows: convolution and pass -> batch -> seconds of one image.
    """

    kind: str
    rates: Rates | None
    rows: Mapping[tuple[object, ...], Mapping[int, Seconds]]

    def seconds(self, task: ConvTask, name: str) -> Seconds:
        """Times of a pass, of the nearest batch that was measured; nothing if none is near."""
        measured = self.rows.get((name, *task.key), {})
        near = min(measured, key=lambda batch: _ratio(batch, task.batch), default=0)
        if not near or _ratio(near, task.batch) > NEAR:
            return {}
        return {algorithm: task.batch * value for algorithm, value in measured[near].items()}


def _ratio(a: int, b: int) -> float:
    return max(a, b) / max(1, min(a, b))


_loaded: dict[str, TimingTable] = {}


def load(path: str | Path) -> None:
    """Uses the times in a file that `tools/tune_conv.py --out` wrote, before those that come with shardtrain.

    Choices are made when a program is traced: load it first, and the same file on every process.

    Raises:
        UserError: a file that cannot be read or is no such table.

    Example:
        >>> st.ops.load_conv_table("mine.json")
    """
    try:
        text = Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); tools/tune_conv.py writes one") from error
    table = read(text, str(path))
    shipped = _shipped(table.kind)
    rows = {**(shipped.rows if shipped else {}), **table.rows}
    _loaded[table.kind] = replace(table, rows=rows, rates=table.rates or (shipped.rates if shipped else None))
    of.cache_clear()


@functools.lru_cache(maxsize=64)
def of(kind: str) -> TimingTable | None:
    """The table of a kind of device: one that was loaded, one that comes with shardtrain, or None."""
    return _loaded.get(kind) or _shipped(kind)


def shipped_path(kind: str) -> Path:
    """Where the table of a kind of device is that comes with shardtrain, or would be."""
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower())
    return Path(__file__).parent / "tables" / f"{name}.json"


def _shipped(kind: str) -> TimingTable | None:
    path = shipped_path(kind)
    return read(path.read_text(), path.name) if path.is_file() else None


def read(text: str, name: str) -> TimingTable:
    """A table from JSON.

    Raises:
        UserError: JSON that is no table, or one of another version.
    """
    try:
        found = json.loads(text)
        if found["version"] != VERSION:
            raise ValueError(f"its version is {found['version']!r}, not {VERSION}")
        rows: dict[tuple[object, ...], dict[int, Seconds]] = {}
        for row in found["rows"]:
            _add(rows, parse(row["layer"]), row["seconds"])
        return TimingTable(str(found["device_kind"]), _rates(found["rates"]), rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        says = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{name} is no table of tools/tune_conv.py: {says}") from error


def _add(rows: dict[tuple[object, ...], dict[int, Seconds]], task: ConvTask, measured: Any) -> None:
    """One layer's times; that of its input's gradient is one of the dual convolution's too."""
    if unknown := set(measured) - set(PASSES):
        raise ValueError(f"{task} has a pass {min(unknown)!r}; there are {', '.join(PASSES)}")
    for name, by_algorithm in measured.items():
        if unknown := set(by_algorithm) - set(ALGORITHMS):
            raise ValueError(f"{task} has an algorithm {min(unknown)!r}")
        if not all(isinstance(v, int | float) and 0 < v < float("inf") for v in by_algorithm.values()):
            raise ValueError(f"{task} has times that are no positive numbers")
        one = {algorithm: value / task.batch for algorithm, value in by_algorithm.items()}
        rows.setdefault((name, *task.key), {})[task.batch] = one
        if name == "input" and task.problem.dense:
            rows.setdefault(("forward", *task.dual.key), {}).setdefault(task.batch, one)


def _rates(found: Any) -> Rates | None:
    if found is None:
        return None
    by_pass = {
        name: {a: (float(r[0]), float(r[1])) for a, r in by_algorithm.items()}
        for name, by_algorithm in found["by_pass"].items()
    }
    margins = {
        name: {a: max(1.0, float(m)) for a, m in by_algorithm.items()}
        for name, by_algorithm in found["margins"].items()
    }
    return Rates(by_pass, float(found["launch"]), int(found["workspace"]), margins)
