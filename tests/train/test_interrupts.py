"""Whatever ends `fit`, the trainer has the state after the last update, and goes on as if nothing had happened."""

import os
import random
import signal
import threading
import time

import numpy as np
import optax
import pytest
from pipelined_models import Deep, images, trainer

import shardtrain as st
from shardtrain.interrupts import uninterrupted

ROWS = 16
X, Y = images(4 * ROWS)


def feed(example):
    """Batches from an example on, round and round."""
    while True:
        at = example % len(X)
        yield X[at : at + ROWS], Y[at : at + ROWS]
        example += ROWS


def undisturbed(mesh, steps, **options):
    one = trainer(mesh, model=Deep(), **options)
    return [row["loss"] for row in one.fit(feed(0), steps=steps, progress=False)]


def consistent(one):
    assert one.examples == ROWS * int(one.state.step)
    assert all(np.isfinite(np.asarray(v)).all() for v in one._named().params.values())


class Losses(st.callbacks.Callback):
    """Keeps the loss of every step that it sees."""

    def __init__(self):
        self.seen = {}

    def on_step(self, run, row):
        assert run.step not in self.seen
        self.seen[run.step] = row["loss"]


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("mesh", "tries"),
    [("data=2", 100), pytest.param("pipe=2,data=2", 30, marks=pytest.mark.slow)],
)
def test_an_interrupt_leaves_the_last_update_with_its_examples_and_its_row(mesh, tries):
    """SIGINT at random moments, as the stop button of a notebook sends it.

    Some come while Python runs jax's callback of the garbage collector, which swallows exceptions.
    """
    one, losses, chance = trainer(mesh, model=Deep()), Losses(), random.Random(0)
    one.fit(feed(0), steps=1, progress=False, callbacks=[losses])
    interrupted = 0
    for _ in range(tries):
        timer = threading.Timer(chance.uniform(0.001, 0.03), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            one.fit(feed(one.examples), steps=10**6, progress=False, callbacks=[losses])
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        consistent(one)
    assert interrupted == tries
    steps = int(one.state.step) + 2
    assert steps > 20
    one.fit(feed(one.examples), steps=steps, progress=False, callbacks=[losses])
    assert list(losses.seen) == list(range(1, steps + 1))
    assert list(losses.seen.values()) == pytest.approx(undisturbed(mesh, steps), rel=1e-12)


class Fails(st.callbacks.Callback):
    def on_step(self, run, row):
        if run.step == 3:
            raise ValueError("the disk is on fire")


def test_a_callback_that_raises_leaves_the_last_update_with_its_examples(tmp_path):
    one = trainer("data=2", model=Deep())
    with pytest.raises(ValueError, match="on fire"):
        one.fit(feed(0), steps=9, progress=False, callbacks=[Fails()])
    consistent(one)
    one.save(tmp_path)
    again = trainer("data=2", model=Deep())
    again.restore(tmp_path)
    losses = [row["loss"] for row in again.fit(feed(again.examples), steps=9, progress=False)]
    assert losses == pytest.approx(undisturbed("data=2", 9)[-len(losses) :], rel=1e-12)


def test_a_ragged_batch_that_was_not_read_counts_its_real_examples():
    def batches():
        yield X[:ROWS], Y[:ROWS]
        yield X[:5], Y[:5]
        raise KeyboardInterrupt

    one = trainer("data=2", model=Deep())
    with pytest.raises(KeyboardInterrupt):
        one.fit(batches(), steps=9, progress=False)
    assert (int(one.state.step), one.examples) == (2, ROWS + 5)


def test_an_interrupt_waits_for_the_end_of_a_section():
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append("first")
        done.append("second")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_rates_and_rolled_back_steps_count_once(tmp_path):
    """A bad step is undone, while the next one has been started already; the data goes on."""
    x = X.copy()
    x[2 * ROWS] = np.nan
    given = [(x[at : at + ROWS], Y[at : at + ROWS]) for at in range(0, len(X), ROWS)] * 2
    one = trainer("data=2", optax.sgd(0.1), Deep())
    with st.Checkpoints(tmp_path, every=1) as checkpoints:
        guard = st.Guard(watchdog=None, on_nan="rollback")
        rows = one.fit(given[:4], steps=8, progress=False, checkpoints=checkpoints, guard=guard)
    assert len(rows) == 4
    assert (int(one.state.step), one.examples) == (4, 4 * ROWS)
