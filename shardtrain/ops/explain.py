"""Explains which algorithm computes a convolution, and why."""

import functools
import inspect
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.kernels import conv as kernels
from shardtrain.ops.conv import conv_settings, convolve

load_conv_table = kernels.load

WIDTH = 100
"""Columns of the printed table."""


@runtime_checkable
class Shaped(Protocol):
    """An array, or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class Explanation:
    """The algorithms that compute a convolution on one device, and the alternatives.

    Attributes:
        kind: `device_kind` of the device.
        layer: the convolution of one device, in the form that `tools/tune_conv.py --layer` takes.
        choice: the algorithm of the output and of each gradient.
        rows: an estimate for every pass and algorithm.
        implementation: the implementation that Winograd's algorithm would have here.
    """

    kind: str
    layer: str
    choice: kernels.Passes
    rows: tuple[kernels.Estimate, ...]
    implementation: str

    def __str__(self) -> str:
        """The estimates as a table of at most 100 columns, with a star at each choice."""
        table = Table(title=f"{self.layer} on one {self.kind}", title_justify="left", expand=False)
        for name in ("pass", "algorithm", "ms", "from", "products", "MiB", "error", "why not"):
            table.add_column(name, justify="right" if name in ("ms", "products", "MiB", "error") else "left")
        last = ""
        for row in self.rows:
            if last not in ("", row.pass_name):
                table.add_section()
            table.add_row(row.pass_name if row.pass_name != last else "", *self._cells(row))
            last = row.pass_name
        out = io.StringIO()
        Console(file=out, width=WIDTH, color_system=None, force_terminal=False).print(table)
        note = "* chosen; products: multiplications; MiB: workspace; error: relative rms, by a model"
        return f"{out.getvalue()}{note}\nwinograd here in {self.implementation}\n"

    def _why_not(self, row: kernels.Estimate) -> str:
        best = next(
            r
            for r in self.rows
            if r.pass_name == row.pass_name and r.algorithm == getattr(self.choice, r.pass_name)
        )
        sooner = row.seconds is not None and best.seconds is not None and row.seconds < best.seconds
        return row.refused or ("not surely faster" if sooner else "")

    def _cells(self, row: kernels.Estimate) -> list[str]:
        star = "*" if getattr(self.choice, row.pass_name) == row.algorithm else " "
        known = bool(row.multiplications)
        return [
            f"{star} {row.algorithm}",
            "" if row.seconds is None else f"{1e3 * row.seconds:.3g}",
            row.source,
            f"{row.multiplications:.2e}" if known else "",
            f"{row.workspace / 2**20:.1f}" if known else "",
            f"{row.error:.0e}" if known else "",
            self._why_not(row),
        ]


def explain_conv(
    x: Shaped | Sequence[int],
    kernel: Shaped | Sequence[int],
    bias: Array | None = None,
    *,
    dtype: Any = "float32",
    **arguments: Any,
) -> Explanation:
    """The algorithms that `conv` would use for the same arguments, and why; nothing is computed.

    Inside `with jax.set_mesh(mesh):` it explains the part of the convolution that one device computes.

    Args:
        x: an array, a `jax.ShapeDtypeStruct` or a shape.
        kernel: likewise.
        bias: ignored.
        dtype: of `x` and `kernel` where they are given as shapes.
        arguments: the other arguments of `conv`. If they name an `algorithm`, the rows are those that
            `"auto"` would choose from.

    Returns:
        The choice, and a row for every pass and algorithm with its time (measured, or by the model from
        operations, bytes and the device's rates), multiplications, workspace, rounding error (by a model
        fitted to `docs/measurements.md`) and, where `"auto"` refuses it, the reason. `print` shows a table.

    Raises:
        UserError: as `conv`, and for arrays that are not floating point.

    Example:
        >>> found = st.ops.explain_conv((8, 56, 56, 64), (3, 3, 64, 64), strides=2)
        >>> found.choice.input
        'direct'
    """
    del bias
    given = [
        jax.ShapeDtypeStruct(tuple(a), dtype)
        if isinstance(a, Sequence)
        else jax.ShapeDtypeStruct(a.shape, a.dtype)
        for a in (x, kernel)
    ]

    if not jnp.issubdtype(given[0].dtype, jnp.floating):
        raise UserError(f"explain_conv: {given[0].dtype} is always computed by 'direct'; there is no choice")
    settings = conv_settings(*given, **arguments)
    traced_anew = functools.partial(inspect.unwrap(convolve), bias=None, settings=settings)

    def both(x: Array, kernel: Array) -> Any:
        y, pull = jax.vjp(traced_anew, x, kernel)
        return pull(y)

    with kernels.listening() as heard:
        jax.eval_shape(both, *given)
    return _explanation(heard)


def _explanation(heard: list[tuple[kernels.ConvTask, kernels.Passes]]) -> Explanation:
    """The explanation of the convolutions that one island ran.

    The first is that of the output. One of another shape is the convolution that gives the input's gradient.
    """
    task, choice = heard[0]
    kind = compat.device_kind()
    rows = kernels.rows_of(task, kind)
    for other, passes in heard[1:]:
        if other != task:
            choice = choice._replace(input=passes.forward)
            forward = kernels.rows_of(other, kind)["forward"]
            rows["input"] = tuple(replace(row, pass_name="input") for row in forward)
    found = tuple(row for name in kernels.PASSES for row in rows[name])
    return Explanation(kind, str(task), choice, found, kernels.implementation(task))
