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


ODD = {
    "result.json": [
        100_000 * "[",
        '{"steps": ' + "9" * 4000 + "}",
        '{"steps": true, "model": "\\u001b[31mred\\u0007", "mesh": {"\\u001b[2J": 3}}',
        '{"steps": -3, "mesh": {"data": [[[1]]], "x": {"y": 1}}, "test_a": 1e400, "final_loss": [1]}',
        json.dumps({"model": 100_000 * "long ", "mesh": {f"axis{k}": 1 for k in range(1000)}}),
        '{"mesh": "data=2", "steps": 2.5, "final_loss": ' + "9" * 400 + "}",
    ],
    "metrics.jsonl": [
        '{"step": ' + "9" * 400 + ', "loss": 1}\n{"step": true}\n{"step": 1, "loss": ' + "9" * 400 + "}",
        '{"step": 1, "loss": {}, "images_per_second": "x", "seconds": []}\n' + 100_000 * "[",
        '{"step": 1, "loss": -1e308}\n{"step": 2, "loss": 1e308}\n{"step": 2}\n',
        '{"step": 3, "loss": NaN, "accuracy": Infinity}\n\x00\n',
    ],
    "events.jsonl": ['{"event": {"a": 1}}\n{"event": "start", "mesh": 7}\n[]\n3\n"x"\n'],
}


def test_odd_files_are_runs_with_unknown_values(tmp_path, capsys):
    """Whatever stands in them: no traceback, nothing that moves the cursor, one row for each run."""
    number = 0
    for name, texts in ODD.items():
        for text in texts:
            place = tmp_path / "runs" / f"r{number}"
            place.mkdir(parents=True)
            (place / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
            (place / name).write_text(text)
            number += 1
    os.utime(tmp_path / "runs" / "r0" / "metrics.jsonl", (2**55, 2**55))  # a date without a calendar
    command.main(["runs", str(tmp_path / "runs"), "--plot", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert all(re.search(rf"^ *r{k}\b", out, re.MULTILINE) for k in range(number))
    assert len(out.splitlines()) < 100


def test_pipes_devices_and_names(tmp_path, capsys):
    """Nothing is waited for, and a name is shown as it can be typed."""
    for name in ("metrics.jsonl", "events.jsonl", "result.json"):
        place = tmp_path / "runs" / f"a pipe for {name[0]}"
        place.mkdir(parents=True)
        os.mkfifo(place / name)
        if name == "events.jsonl":
            (place / "result.json").symlink_to("/dev/zero")
    for name in (b"\x1b[31mred", b"\xff\xfe", b"[bold]x :smile:", b"two\nlines"):
        place = os.fsencode(tmp_path / "runs") + b"/" + name
        os.mkdir(place)
        with open(place + b"/result.json", "w") as file:
            file.write("{}")
    command.main(["runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out.replace("\n", "")
    assert ":smile:" in out
    assert out.count("damaged") + out.count("running") >= 2


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
