"""Which checkpoint a run resumes from, and which flags must be equal."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from shardtrain import Checkpoints, UserError, cli
from shardtrain.cli import resume


@dataclass(frozen=True)
class Flags(cli.RunFlags):
    """Of a recipe."""

    mesh: str = "data=1"
    data: str = "digits"
    out: cli.Folder = Path("runs/mine")
    model: str = "small"
    features: tuple[int, ...] = (8, 16)
    overlap: bool = False
    microbatches: int = 8
    free = frozenset({"overlap", "microbatches"})


def compared(**changed):
    made = {"flags": resume.as_json(Flags()), "step": 3}
    resume.compare(replace(Flags(), **changed), cli.RunFlags, made, Path("there"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr_schedule": "constant"}, r"made with --lr-schedule cosine, not --lr-schedule constant; give"),
        ({"seed": 1}, r"the run in there was made with --seed 0, not --seed 1; give the flags"),
        ({"batch_size": 64}, "--batch-size 128, not --batch-size 64"),
        ({"optimizer": "adam"}, "--optimizer sgd, not --optimizer adam"),
        ({"x64": True}, "--no-x64, not --x64"),
        (
            {"model": "large", "features": (8,)},
            "--model small, --features 8 16, not --model large, --features 8;",
        ),
    ],
)
def test_another_run_is_refused(changed, message):
    with pytest.raises(UserError, match=message):
        compared(**changed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"lr": 0.5, "weight_decay": 0.0},
            "--lr 0.5, --weight-decay 0.0, where the run in there had --lr 0.1",
        ),
        ({"steps": 400}, "--steps 400"),  # the cosine has another length
        ({"data": "elsewhere"}, "--data elsewhere"),
        ({"accumulate": 2}, "--accumulate 2"),
        ({"accumulate": 2, "microbatches": 2}, "WITH OTHER FLAGS: --microbatches 2, where the run"),
    ],
)
def test_a_run_that_bends_is_named_loudly(changed, named, caplog):
    compared(**changed)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("RESUMED WITH OTHER FLAGS: ")
    assert named in record.getMessage()


def test_where_and_how_it_is_computed_may_change(caplog):
    compared(mesh="pipe=2,height=2", devices=4, out=Path("other"), resume="auto", keep=1, checkpoint_every=5)
    compared(remat="nothing", parameters="data", overlap=True)
    assert caplog.text == ""
    made = {"flags": resume.as_json(replace(Flags(), lr_schedule="constant"))}
    resume.compare(replace(Flags(), lr_schedule="constant", steps=999), cli.RunFlags, made, Path("there"))
    assert caplog.text == ""


def test_a_checkpoint_without_flags_is_taken_with_a_word(caplog):
    resume.compare(Flags(), cli.RunFlags, {"step": 3}, Path("there"))
    assert "its flags are not compared" in caplog.text


@pytest.fixture
def run(tmp_path):
    """The folder of a run with one checkpoint."""
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(7, {"x": np.zeros(3)})
    return tmp_path / "run"


def test_a_restart_goes_on_from_its_own_job_and_from_no_older_run(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, manifest={"job": "mine"}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": np.zeros(3)})
    monkeypatch.setenv("SHARDTRAIN_JOB", "mine")
    assert not resume.started_again(Checkpoints(folder))  # a first start
    monkeypatch.setenv("SHARDTRAIN_RESTARTS", "1")
    assert resume.started_again(Checkpoints(folder))
    monkeypatch.setenv("SHARDTRAIN_JOB", "another")
    assert not resume.started_again(Checkpoints(folder))
    monkeypatch.setenv("SHARDTRAIN_JOB", "mine")
    manifests = sorted(folder.glob("*/default/manifest.json"))
    manifests[1].unlink()
    assert resume.started_again(Checkpoints(folder))  # from the one before
    manifests[0].unlink()
    assert not resume.started_again(Checkpoints(folder))  # nothing says that they are this job's


def test_from_where(run, tmp_path):
    own, new = Checkpoints(run / "checkpoints"), Checkpoints(tmp_path / "new" / "checkpoints")
    assert resume.source("never", own) is None
    assert resume.source("auto", own) == (own, None)
    assert resume.source("auto", new) is None
    for path, step in ((run, None), (run / "checkpoints", None), (run / "checkpoints" / "7", 7)):
        found = resume.source(str(path), new)
        assert (found[0].folder, found[1]) == (run / "checkpoints", step)
    numbered = run.rename(tmp_path / "42")
    for path, step in ((numbered, None), (numbered / "checkpoints" / "7", 7)):
        found = resume.source(str(path), new)
        assert (found[0].folder, found[1]) == (numbered / "checkpoints", step)
    numbered.rename(run)
    with pytest.raises(UserError, match=r"is in --out itself; go on with --resume auto"):
        resume.source(str(run), own)
    with pytest.raises(UserError, match=r"there is no checkpoint in .*name a run's folder"):
        resume.source(str(tmp_path / "nowhere"), new)
    with pytest.raises(UserError, match=r"there is no checkpoint in .*aaa;"):
        resume.source("a" * 300, new)
