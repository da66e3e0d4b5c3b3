"""A model small enough that thousands of schedules of it can be run, each beside one device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardtrain as st
from shardtrain.pipeline import Schedule, lockstep
from shardtrain.pipeline.runtime.resident_arrays import ResidentArrays
from shardtrain.pipeline.runtime.tick_loop import TickLoop
from shardtrain.pipeline.schedules.tick_table import TickTable, build

from .models import wide
from .parity import Case, largest_difference, merged, rows_in


class Tiny(nnx.Module):
    """Five layers of unequal width, with skips across one and across three of them."""

    def __init__(self) -> None:
        kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.norm = st.nn.BatchNorm(4, **kinds)
        self.first = st.nn.Linear(4, 6, **kinds)
        self.second = st.nn.Linear(6, 3, **kinds)
        self.third = st.nn.Linear(3, 6, **kinds)
        self.fourth = st.nn.Linear(6, 6, **kinds)
        self.head = st.nn.Linear(6, 5, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = early = nnx.tanh(self.first(self.norm(x)))
        x = nnx.tanh(self.second(x))
        x = late = nnx.tanh(self.third(x) + early)
        x = nnx.tanh(self.fourth(x) * early)
        return self.head(x + late)


@dataclasses.dataclass
class Runs:
    """One compiled program for all of some schedules, and what one device computes.

    Attributes:
        case: the model on its mesh.
        together: the table that has all that the schedules need.
        ticks: of the longest.
        program: see `Case.program`.
        whole: packed gradients, packed variables and sums of one device.
    """

    case: Case
    together: TickTable
    ticks: int
    program: Any
    whole: Any

    @classmethod
    def of(
        cls,
        mesh: str,
        schedules: Sequence[Schedule],
        latency: int = 1,
        change: Callable[[TickLoop], TickLoop] = lambda loop: loop,
    ) -> "Runs":
        draw = np.random.default_rng(0)
        inputs, targets = draw.standard_normal((24, 4)), draw.integers(0, 5, 24).astype(np.int32)
        # Statistics of the batch, since those of microbatches depend on their order.
        case = Case.of(wide(Tiny()), mesh, inputs, targets, schedules[0], statistics="batch")
        arrays, names = case.pipeline.packing.arrays, case.pipeline.packing.names
        grads, moved, sums = case.alone()
        expected, _ = arrays["params"].pack([grads[name] for name in names["params"]])
        before = case.trainer.state.model_state
        after, _ = arrays["model_state"].pack(
            [moved.get(name, before[name]) for name in names["model_state"]]
        )
        tables = [build(s, lockstep(s, latency=latency), latency) for s in schedules]
        together = merged(tables)
        program = case.program(together, change)
        whole = jax.device_get((expected, after, sums))
        return cls(case, together, max(len(t.rows) for t in tables), program, whole)

    def rows(self, schedule: Schedule) -> np.ndarray:
        latency = self.together.latency
        return rows_in(
            build(schedule, lockstep(schedule, latency=latency), latency), self.together, self.ticks
        )

    def gap(self, rows: np.ndarray) -> float:
        """How much gradients, variables and sums differ from those of one device."""
        ours = jax.device_get(self.program(jnp.asarray(rows), self.case.state, self.case.batch))
        packed = self.case.pipeline.packing.arrays
        arrays = (packed["params"], packed["model_state"], None)
        return max(
            largest_difference(_parts(resident, mine), _parts(resident, alone))
            for resident, mine, alone in zip(arrays, ours, self.whole, strict=True)
        )


def _parts(arrays: ResidentArrays | None, values: Any) -> Any:
    """Packed arrays one by one, as every device has them; and the buffers, whose padding counts too."""
    if arrays is None:
        return values
    axis = arrays.mesh.axis_names.index("pipe")
    return values, [
        values[place.buffer].take(arrays.ranks[i], axis)[..., place.start : place.start + place.size]
        for i, place in arrays.places.items()
    ]
