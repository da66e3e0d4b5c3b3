"""Measured times of convolutions: one table for each kind of device, written by `tools/tune_conv.py`.

A table is JSON with the fields `version`, `device_kind`, `jax`, `machine`, `rates` of the cost model fitted
to it (or null), and `rows`, each with a `layer` as `task.parse` reads it and `seconds` by pass and algorithm.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardtrain.errors import UserError
from shardtrain.files import expanded
from shardtrain.kernels.conv.costs import Rates
from shardtrain.kernels.conv.task import ALGORITHMS, PASSES, ConvTask, parse

VERSION = 1

NEAR = 2.0
"""By what factor a measured batch may be larger or smaller than that of a task."""

Seconds = Mapping[str, float]
"""Algorithm -> seconds."""


@dataclass(frozen=True, eq=False)
class TimingTable:
    """The times measured on one kind of device.

    Attributes:
        kind: `jax.Device.device_kind`.
        rates: of the cost model, fitted to the rows, for float32.
        rows: convolution and pass -> batch -> seconds of one image.
    """

    kind: str
    rates: Rates | None
    rows: Mapping[tuple[object, ...], Mapping[int, Seconds]]

    def seconds(self, task: ConvTask, name: str) -> Seconds:
        """Times of a pass, from the nearest measured batch; empty if none is near."""
        measured = self.rows.get((name, *task.key), {})
        near = min(measured, key=lambda batch: _ratio(batch, task.batch), default=0)
        if not near or _ratio(near, task.batch) > NEAR:
            return {}
        return {algorithm: task.batch * value for algorithm, value in measured[near].items()}


def _ratio(a: int, b: int) -> float:
    return max(a, b) / max(1, min(a, b))


_loaded: dict[str, TimingTable] = {}


def load(path: str | Path) -> None:
    """Loads measured times of convolutions, which then take precedence over those shipped with shardtrain.

    Algorithms are chosen when a program is traced, so the table must be loaded first, and the same one in
    every process.

    Args:
        path: of a file that `tools/tune_conv.py --out` has written.

    Raises:
        UserError: a file that cannot be read or is no such table.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "times.json"
        >>> row = {"layer": "1x8x8x4->4,window=3", "seconds": {"forward": {"direct": 1e-5}}}
        >>> table = {"version": 1, "device_kind": "my device", "rates": None, "rows": [row]}
        >>> _ = path.write_text(json.dumps(table))
        >>> st.ops.load_conv_table(path)
    """
    try:
        text = expanded(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); tools/tune_conv.py writes one") from error
    table = read(text, str(path))
    shipped = _shipped(table.kind)
    rows = {**(shipped.rows if shipped else {}), **table.rows}
    _loaded[table.kind] = replace(table, rows=rows, rates=table.rates or (shipped.rates if shipped else None))
    of.cache_clear()


@functools.lru_cache(maxsize=64)
def of(kind: str) -> TimingTable | None:
    """The table of a kind of device: one that was loaded, else one shipped with shardtrain, else None."""
    return _loaded.get(kind) or _shipped(kind)


def shipped_path(kind: str) -> Path:
    """The path of the shipped table of a kind of device, whether it exists or not."""
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower())
    return Path(__file__).parent / "tables" / f"{name}.json"


def _shipped(kind: str) -> TimingTable | None:
    path = shipped_path(kind)
    return read(path.read_text(), path.name) if path.is_file() else None


def read(text: str, name: str) -> TimingTable:
    """Reads a table from JSON; `name` is for messages.

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
    """Adds a layer's times; that of its input's gradient also counts for the dual convolution."""
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
