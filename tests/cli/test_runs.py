"""`shardtrain runs`: the table and the picture, of runs that are whole, cut short or damaged."""

import json
import os
import re
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from shardtrain import UserError
from shardtrain.cli import command, runs

PNG = b"\x89PNG\r\n\x1a\n"


def row(step, loss=1.0, **more):
    return {"step": step, "loss": loss, "accuracy": 0.5, "images_per_second": 100.0, "seconds": 0.1} | more


def write(place, steps=20, *, result=True, events=(), age=0.0, losses=None):
    place.mkdir(parents=True)
    losses = np.linspace(2, 0.5, steps) if losses is None else losses
    lines = [json.dumps(row(k + 1, float(loss))) for k, loss in enumerate(losses)]
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (place / "events.jsonl").write_text("".join(json.dumps({"event": e}) + "\n" for e in events))
    if result:
        found = {"model": "resnet8", "mesh": {"data": 2, "height": 4}, "steps": steps, "test_accuracy": 0.9}
        (place / "result.json").write_text(json.dumps(found))
    for file in place.iterdir():
        os.utime(file, (time.time() - age,) * 2)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "whole", age=400)
    write(tmp_path / "sweep" / "lr-0.1", steps=30, result=False, age=300, events=["start", "preempted"])
    write(tmp_path / "under way", steps=5, result=False, events=["start"])
    write(tmp_path / "gone", steps=7, result=False, age=200, events=["start"])
    write(tmp_path / "diverged", steps=9, result=False, age=150, events=["start", "exit"],
          losses=[2, 2, 2, 1e30, 1e31, 1e31, float("nan"), float("inf"), 1e33])  # fmt: skip
    cut = tmp_path / "cut"
    write(cut, steps=12, age=100)
    (cut / "result.json").write_text('{"mesh": {"da')
    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step": 13\n[1]\n{"step": "x"}\n{"loss": 3}\n')
    for file in cut.iterdir():
        os.utime(file, (time.time() - 100,) * 2)
    for name, text in (("empty", ""), ("list", "[]"), ("odd", '{"mesh": 3, "test_x": "y", "steps": "z"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    (tmp_path / "directory" / "result.json").mkdir(parents=True)
    write(tmp_path / "whole" / "earlier-20260101-000000")
    (tmp_path / "whole" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "3" / "result.json").write_text("{}")
    return tmp_path


def test_the_table(folder, capsys):
    command.main(["runs", str(folder)])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    lines = out.splitlines()[2:]
    rows = {re.split(r"  +", line)[0]: line.split() for line in lines}
    names = {"whole", "sweep/lr-0.1", "under way", "gone", "diverged", "cut", "empty", "list", "odd"}
    assert set(rows) == names
    whole = ["whole", "resnet8", "data=2,height=4", "20", "0.5000", "0.9000", "100", "finished"]
    assert rows["whole"][:-2] == whole
    assert "stopped" in rows["sweep/lr-0.1"]
    assert "running" in rows["under way"]
    assert "stopped" in rows["gone"]
    assert {"damaged", "12"} <= set(rows["cut"])
    assert "1.0e+33" in rows["diverged"]


def test_a_run_itself_and_one_that_goes_on_after_its_result(folder, capsys):
    write(folder / "longer")
    old = time.time() - 1000
    os.utime(folder / "longer" / "result.json", (old, old))
    command.main(["runs", str(folder / "longer")])
    assert "running" in capsys.readouterr().out


def test_the_picture(folder, tmp_path):
    runs.Runs(folder, tmp_path / "curves.png").run()
    assert (tmp_path / "curves.png").read_bytes()[:8] == PNG


def test_names_with_brackets_dollars_and_underscores(tmp_path, capsys):
    names = ["[/red]", "[bold]", "$x^$", "_under"]
    for name in names:
        write(tmp_path / name)
    runs.Runs(tmp_path, tmp_path / "curves.png").run()
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in names)
    axis = Figure().subplots()
    runs._curves(axis, [runs.read(tmp_path / name, tmp_path) for name in names], "loss")
    assert axis.get_legend_handles_labels()[1] == [*names[:3], "./_under"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no"], "is no folder"),
        (["bare"], "there are no runs"),
        ([".", "no/x.png"], "cannot be written"),
        ([".", "whole"], "is a folder; name a file"),
        (["empty", "x.png"], "none of the runs has a step"),
    ],
)
def test_refused_in_a_sentence(folder, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "bare").mkdir()
    with pytest.raises(UserError, match=message):
        runs.Runs(*map(type(folder), arguments)).run()
