"""Timelines: what the text and the picture show, and the command that shows them."""

import io
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

import shardtrain
from shardtrain.cli.command import main
from shardtrain.cli.pipeline import _panel, draw
from shardtrain.pipeline import NAMES, Action, Costs, Schedule, classical, make
from shardtrain.pipeline.schedules.show import bars, timeline

ROOT = Path(shardtrain.__file__).parent.parent


def text(schedule, costs=None, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    console.print(timeline(schedule, costs))
    return console.file.getvalue()


SMALL = """\
1f1b: 2 ranks, 2 microbatches
F forward, B backward

       0              5
rank 0 F0 F1 ·  ·  B0    ·  B1
rank 1 ·  F0 B0    F1 B1    ·  ·
"""


def test_a_small_timeline():
    lines = [line.rstrip() for line in text(make("1f1b", 2, 2)).splitlines()]
    assert "\n".join(lines).startswith(SMALL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (3, 5), (8, 32), (4, 120)])
def test_every_action_is_drawn_and_lines_fit(name, ranks, microbatches):
    one = make(name, ranks, microbatches)
    drawn = bars(one)
    line = classical(one)
    assert {bar.action: (bar.start, bar.end) for bar in drawn} == {
        action: (line.start[action], line.end[action]) for action in line.start
    }
    shown = text(one)
    assert max(map(len, shown.splitlines())) <= 100
    words = " ".join(row for row in shown.splitlines() if row.startswith("rank "))
    assert all(bar.label in words for bar in drawn)
    assert f"{float(line.makespan):g}" in shown


def test_figures_are_those_of_the_simulators():
    rows = [line.replace("┃", "│").split("│") for line in text(make("1f1b", 4, 8)).splitlines()]
    cells = {row[1].strip(): [cell.strip() for cell in row[2:5]] for row in rows if len(row) > 4}
    assert cells[""] == ["classical", "lockstep", "lockstep, split"]
    assert cells["makespan"] == ["33", "40", "30"]
    assert cells["idle"] == ["3/11 = 27.3 %", "2/5 = 40.0 %", "1/5 = 20.0 %"]
    assert cells["ticks"] == ["", "22", "30"]
    peaks = [row[-3:-1] for row in rows if len(row) > 8 and row[-3].strip().isdigit()]
    assert [[cell.strip() for cell in row] for row in peaks] == [["0", "4"], ["1", "3"], ["2", "2"]]


def test_costs_stretch_what_they_cost():
    costs = Costs((1, 2), (1, 1), (3, 1))
    by = {str(bar.action): (bar.start, bar.end) for bar in bars(make("1f1b", 2, 2), costs)}
    assert by["0B0"] == (5, 9)
    assert by["1F0"] == (1, 3)
    far = bars(make("1f1b", 2, 2), Costs((1, 1000), (1, 1000), (1, 1000)))
    assert max(bar.end for bar in far) < 100  # columns are no finer than can be read
    assert bars(make("1f1b", 1, 1), Costs((0,), (0,), (0,)))[0].end == 0
    assert "makespan" in text(make("1f1b", 1, 1), Costs((0,), (0,), (0,)))


@pytest.mark.parametrize("costs", [(1, 30), (1, 100), (100, 1), (7, 90)])
def test_cheap_actions_are_drawn_too(costs):
    one = make("1f1b", 2, 4)
    costs = Costs(costs, costs, (1, 1))
    drawn, line = bars(one, costs), classical(one, costs)
    assert all(bar.start < bar.end for bar in drawn)
    for bar in drawn:
        for other in drawn:  # whatever is rounded, what waits for something stands behind it
            if line.end[bar.action] <= line.start[other.action]:
                assert bar.end <= other.start
    shown = text(one, costs).splitlines()
    for rank in range(2):
        words = {word for row in shown if row.startswith(f"rank {rank}") for word in row[7:].split()}
        assert words - {"·"} == {bar.label for bar in drawn if bar.rank == rank}


def test_chunks_differ_in_letters_and_colour():
    by = {bar.action: bar for bar in bars(make("zb-v", 2, 4))}
    assert by[Action(0, "F", 1)].label == "F1"
    assert by[Action(3, "F", 1)].label == "f1"
    assert by[Action(0, "F", 1)].colour != by[Action(3, "F", 1)].colour
    assert "\x1b[" in text(make("zb-v", 2, 4), force_terminal=True, color_system="truecolor")


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("1f1b", 4, 8), pytest.param("zb-v", 3, 24, marks=pytest.mark.slow), ("gpipe", 1, 1)],
)
def test_the_picture_has_the_colours_of_the_bars(name, ranks, microbatches, tmp_path):
    one = make(name, ranks, microbatches)
    draw(one, tmp_path / "a.png")
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]
    image = (255 * imread(tmp_path / "a.png")[..., :3] + 0.5).astype(int).reshape(-1, 3)
    pixels = set(map(tuple, np.unique(image, axis=0).tolist()))
    assert {tuple(bytes.fromhex(bar.colour[1:])) for bar in bars(one)} <= pixels


@pytest.mark.parametrize("start", [0, 10])
def test_a_panel_has_every_bar_that_reaches_into_it(start):
    drawn, columns = bars(make("zb-v", 2, 4)), 15
    (axis,) = Figure().subplots(1, 1, squeeze=False)[0]
    _panel(axis, drawn, 2, start, columns)
    there = [bar for bar in drawn if bar.end > start and bar.start < start + columns]
    spans = [(max(bar.start, start), min(bar.end, start + columns)) for bar in there]
    assert 0 < len(there) < len(drawn)
    boxes = [(p.get_x(), p.get_x() + p.get_width(), round(p.get_y() + 0.45)) for p in axis.patches]
    assert boxes == [(*span, bar.rank) for span, bar in zip(spans, there, strict=True)]
    assert [words.get_text() for words in axis.texts] == [bar.label for bar in there]


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_shows_and_writes(tmp_path, capsys):
    csv, png = str(tmp_path / "a.csv"), str(tmp_path / "a.png")
    flags = [
        "pipeline",
        "show",
        "--schedule",
        "zb-h1",
        "--stages",
        "3",
        "--microbatches",
        "4",
        "--costs",
        "1,1,1.5",
        "--csv",
    ]
    main([*flags, csv, "--png", png])
    assert capsys.readouterr().out.startswith("zb-h1: 3 ranks, 4 microbatches\n")
    assert Schedule.load(tmp_path / "a.csv").orders == make("zb-h1", 3, 4).orders
    assert (tmp_path / "a.png").exists()
    main(["pipeline", "show", "--schedule", str(tmp_path / "a.csv")])
    assert capsys.readouterr().out.startswith("a.csv: 3 ranks, 4 microbatches\n")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--schedule foo", "error: there is no schedule 'foo'; there are gpipe, 1f1b"),
        ("--stages 0", "error: schedule '1f1b' of 0 ranks and 8 microbatches; use 1 or more"),
        ("--chunks 3", "error: schedule '1f1b' with 3 chunks on each rank; 1f1b has 1"),
        ("--costs 1,2", "error: --costs 1,2: 1f1b has 4 stages; write 4 positive numbers"),
        ("--costs 1,2,3,0", "error: --costs 1,2,3,0: 1f1b has 4 stages; write 4 positive numbers"),
        ("--costs 1,a,2,1", "error: --costs 1,a,2,1: write a number for each stage, such as 1,1,2,1"),
        ("--costs 1,1,2,1/0", "error: --costs 1,1,2,1/0: 1f1b has 4 stages; write 4 positive numbers"),
        ("--costs 1e99999999,1,1,1", "error: --costs 1e99999999,1,1,1: 1f1b has 4 stages; write 4 positive"),
        ("--costs 1e-99999999,1,1,1", "error: --costs 1e-99999999,1,1,1: 1f1b has 4 stages; write 4 positive"),
        ("--microbatches 1000000000", "error: --stages 4 --microbatches 1000000000: a timeline of 12,000,000,000 actions"),
        ("--schedule {tmp}/no.csv", "error: schedule file {tmp}/no.csv cannot be read (No such file"),
        ("--csv {tmp}/no/a.csv", "error: schedule file {tmp}/no/a.csv cannot be written (No such file"),
        ("--png {tmp}/no/a.png", "error: --png {tmp}/no/a.png cannot be written (No such file"),
        ("--png {tmp}", "error: --png {tmp} is a folder; name a file in it"),
        ("--png {tmp}/x.xyz", "error: --png {tmp}/x.xyz: the picture is a PNG; name a file that ends in .png"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["pipeline", "show", *flags.format(tmp=tmp_path).split()])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.startswith(sentence.format(tmp=tmp_path))
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_file_keeps_its_own_sizes(tmp_path, capsys):
    make("1f1b", 2, 3).save(tmp_path / "A.CSV")
    with pytest.raises(SystemExit):
        main(["pipeline", "show", "--schedule", str(tmp_path / "A.CSV"), "--stages", "0"])
    assert "of 0 ranks and 3 microbatches" in capsys.readouterr().err


def test_the_command_is_installed_under_its_name():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"shardtrain": "shardtrain.cli.command:main"}
    done = subprocess.run(
        [sys.executable, "-m", "shardtrain", "pipeline", "show", "--stages", "0"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: schedule '1f1b' of 0 ranks")
