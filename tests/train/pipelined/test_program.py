"""The compiled step of a pipeline: how many ticks it runs and what it sends; wrong steps are noticed."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pipelined_models import Deep, Small, batches, close, fit, trainer, wide

import shardtrain as st
from shardtrain.pipeline.runtime.flat_buffers import dtype_of
from shardtrain.pipeline.runtime.resident_arrays import ResidentArrays
from shardtrain.plan import census
from shardtrain.train.extra import on_devices
from shardtrain.train.step import Program

# schedule, sends that overlap
PROGRAMS = [("1f1b", False), ("gpipe", True), pytest.param("zb-v", False, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("schedule", "overlap"), PROGRAMS)
def test_the_step_runs_the_simulated_ticks_and_sends_one_message_in_each(schedule, overlap):
    one = trainer("pipe=2,data=2", schedule=schedule, overlap=overlap)
    text = one.prepare(*batches()[0]).as_text()
    pipe = one.pipeline
    ticks = len(pipe.ticks.table)
    assert f'"known_trip_count":{{"n":"{ticks}"}}' in text
    rows = census.census(text, one.mesh)

    sent = [row for row in rows if row.kind == "collective-permute"]
    assert [(row.count, row.axes) for row in sent] == [(ticks, ("pipe",))]
    largest = max(8 * sum(s.size for s in program.outs) for program in pipe.programs[:-1])
    assert sum(row.count * row.payload for row in sent) == ticks * largest

    summed = [row for row in rows if row.axes == ("data",)]
    assert {row.kind for row in summed} == {"all-reduce"}
    once = Counter(row.payload for row in summed if row.count == 1)
    # The idle layer's are zeros, and the batch norm's are sums over the batch in every microbatch.
    shapes = pipe.shapes.params
    used = {name: s for name, s in shapes.items() if name.split(".")[0] not in ("idle", "norm")}
    assert once == Counter(8 * s.size for s in used.values())
    # In a tick: both statistics of the one batch norm, forward and backward, and the sums to report.
    assert {row.count for row in summed} <= {1, ticks}
    often = Counter(row.payload for row in summed if row.count == ticks)
    assert set(often) == {2 * 4 * 8, 8}
    assert often[2 * 4 * 8] <= 3  # forward, `I` and where it is fused `B`


def difference(ours, theirs, data):
    """Whether training differs in what is reported or in the state afterwards."""
    try:
        close(fit(ours, data), fit(theirs, data), 1e-6)
        close(ours._named(), theirs._named(), 1e-6)
    except AssertionError:
        return True
    return False


def ragged():
    x, y = batches()[0]
    return [(x, y), (x[:5], y[:5])]


@pytest.mark.parametrize("wrong", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_mean_of_means_is_noticed(wrong, monkeypatch):
    """Five rows in four microbatches; of one microbatch it is the right mean."""
    right = Program._sums

    def mean(self, *args, **kwargs):
        sums = right(self, *args, **kwargs)
        count = jnp.maximum(sums["examples"], 1)
        return jax.tree.map(lambda value: value / count, sums)

    if wrong:
        monkeypatch.setattr(Program, "_sums", mean)
    ours, theirs = trainer("pipe=2", model=Deep()), trainer("data=1", model=Deep(), accumulate=1)
    assert difference(ours, theirs, ragged()) == wrong


class Forgetful(st.nn.BatchNorm):
    """Sums up nothing: the statistics of the whole batch are those of its last microbatch."""

    def __call__(self, x, *args, **kwargs):
        for statistic in (self.mean, self.var):
            statistic.set_value(0 * statistic.get_value())
        return super().__call__(x, *args, **kwargs)


@pytest.mark.parametrize("wrong", [pytest.param(False, marks=pytest.mark.slow), True])
def test_statistics_of_one_microbatch_are_noticed(wrong):
    model = Small(rate=0.0)
    if wrong:
        model.norm = Forgetful(4, momentum=0.9, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    options = {"statistics": "batch"}
    ours = trainer("pipe=2", model=wide(model), **options)
    theirs = trainer("data=1", model=wide(Small(rate=0.0)), **options)
    assert difference(ours, theirs, batches()) == wrong


def spoiled(one):
    """Not a number wherever the packed state holds no array."""
    pipe, parts, state = one.pipeline, [], on_devices(one.state)
    for group, arrays in pipe.packing.arrays.items():
        buffers, shared = getattr(state, group)
        real, _ = arrays.pack([np.ones(s.shape, s.dtype) for s in arrays.shapes])
        floats = {d for d in buffers if jnp.issubdtype(dtype_of(d), jnp.floating)}
        parts.append(
            (
                {d: jnp.where(real[d] == 0, jnp.nan, b) if d in floats else b for d, b in buffers.items()},
                shared,
            )
        )
    padding = sum(int(jnp.isnan(b).sum()) for buffers, _ in parts for b in buffers.values())
    assert padding > 0
    spoilt = type(state)(state.step, *parts)
    one.state = one._with_position(jax.device_put(spoilt, jax.tree.map(lambda x: x.sharding, state)))


@pytest.mark.parametrize("wrong", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_lies_between_the_arrays_is_never_used(wrong, monkeypatch):
    """Neither in the update nor in the norm of all gradients; an update that reads it is noticed."""
    if wrong:
        places = ResidentArrays.places_on

        def shifted(self, rank):
            return {
                i: dataclasses.replace(place, start=place.start + 1)
                for i, place in places(self, rank).items()
            }

        monkeypatch.setattr(
            ResidentArrays,
            "read",
            lambda self, rank, buffers: {i: p.read(buffers) for i, p in shifted(self, rank).items()},
        )
    ours, theirs = (trainer(mesh, clip_norm=0.5) for mesh in ("pipe=2,data=2", "data=1"))
    ours.prepare(*batches()[0])
    spoiled(ours)
    assert difference(ours, theirs, batches()) == wrong
