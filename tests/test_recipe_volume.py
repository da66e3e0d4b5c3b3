"""The volume recipe in processes of its own, on volumes of few voxels."""

import json

import pytest
from recipe_process import PNG, check_refused, gaps, run

pytest.importorskip("nilearn")

SMALL = ("--features", 4, 8, "--voxel", 8)


def test_a_run_leaves_what_it_promises(tmp_path):
    out = tmp_path / "run"
    done = run("train_volume.py", *SMALL, "--steps", 30, "--mesh", "depth=2,height=2", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["mesh"] == {"depth": 2, "height": 2}
    assert (result["model"], result["data"], len(result["losses"])) == ("UNet", "mni152", 30)
    assert result["losses"][-1] < result["losses"][0] / 2
    assert result["test_dice"] > 0.4  # labels drawn at random come to 0.25
    assert {"collective-permute", "all-reduce"} <= {row["kind"] for row in result["census"]}
    for name in ("curve.png", "predictions.png"):
        assert (out / name).read_bytes()[:8] == PNG
    assert not (out / "memory.png").exists()
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.slow
def test_memory_falls_with_the_cut_and_the_losses_are_those_of_one_device(tmp_path):
    out = tmp_path / "run"
    flags = ("--steps", 4, "--size", 16, 8, 15, "--mesh", "depth=2,height=2", "--batch-size", 2)
    done = run("train_volume.py", *SMALL, *flags, "--x64", "--compare", "--memory", "--out", out)
    assert done.returncode == 0, done.stderr
    assert max(gaps(done)) < 1e-9
    needs = json.loads((out / "result.json").read_text())["memory"]
    assert [row["mesh"] for row in needs] == ["data=1", "depth=2", "depth=2,height=2"]
    for row in needs:
        assert row["bytes"] == row["arguments"] + row["temporaries"] + row["outputs"]
        assert row["bytes"] < 1.25 * needs[0]["bytes"] / row["devices"]  # the halos' share
    assert (out / "memory.png").read_bytes()[:8] == PNG
    assert "on 128x64x120 voxels" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "data 'nowhere': there are no such volumes; use mni152"),
        (["--voxel", "0"], "a voxel of 0 mm: use 1 to 16"),
        (["--voxel", "8", "--size", "64", "8", "8"], "crops of 64x8x8 are no boxes in volumes of 20x"),
        (["--features", "8", "0"], "--features 8 0: use 1 or more"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, message, tmp_path):
    out = tmp_path / "run"
    check_refused(run("train_volume.py", *flags, "--out", out), message, out)
