"""A run on a mesh with `pipe` taken up on any other mesh, and back."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from pipelined_models import Deep, batches, close, fit, masked_adamw, trainer

MESHES = ["pipe=4", "data=4", "data=1"]


def deep(mesh):
    return trainer(mesh, masked_adamw(), Deep())


def snapshot(one):
    return jax.tree.map(np.array, one._named())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Losses of four steps on one mesh, its state and checkpoint after two, and its state after four."""
    folder = tmp_path_factory.mktemp("run")
    one = deep("pipe=2,data=2")
    data = batches(count=64)
    rows = fit(one, data[:2])
    one.save(folder)
    middle = snapshot(one)
    rows += fit(one, data[2:])
    return folder, data, middle, rows, snapshot(one), one


@pytest.mark.parametrize(
    "started",
    [
        pytest.param(False, marks=pytest.mark.slow, id="before the first batch"),
        pytest.param(True, id="after it"),
    ],
)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_goes_on_elsewhere(run, mesh, started, tmp_path):
    folder, data, middle, rows, end, _ = run
    other = deep(mesh)
    if started:
        fit(other, batches(count=16), 1)
    assert other.restore(folder) == 2
    close(other._named(), middle, 0)
    close(fit(other, data[2:]), rows[2:])
    close(other._named(), end)
    other.save(tmp_path)
    back = deep("pipe=2,data=2")
    assert back.restore(tmp_path) == 4
    close(back._named(), other._named(), 0)


def test_back_to_where_it_was_written(run):
    folder, data, _, rows, _, one = run
    again = deep("data=1")
    again.restore(folder)
    fit(again, data[2:3])
    again.save(folder.parent / "back")
    assert one.restore(folder.parent / "back") == 3
    close(one._named(), again._named(), 0)
    close(fit(one, data[3:]), rows[3:])


def test_a_pipeline_that_has_seen_no_batch_is_saved(tmp_path):
    one, other = deep("pipe=2"), deep("data=1")
    one.save(tmp_path)
    fit(other, batches(), 1)
    assert other.restore(tmp_path) == 0
    close(fit(other, batches()), fit(one, batches()))


def test_names_are_the_ordinary_ones(run, tmp_path):
    """Of parameters and the optimizer's state alike."""
    plain = deep("data=1")
    fit(plain, batches(), 1)
    assert names(plain.save(tmp_path)) == names(run[0] / "2")
    assert "['opt_state'][0]['mu']['head.kernel']" in names(run[0] / "2")


def names(folder):
    found = ocp.StandardCheckpointer().metadata(folder / "default").item_metadata.tree
    return sorted(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(found))
