"""The batch script: what it asks for, and what it does when srun ends, with a bash that runs it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from shardtrain import UserError
from shardtrain.cli.launch import Slurm, put
from shardtrain.launch.slurm import SlurmJob, script, submit

COMMAND = ["python", "recipes/train_cnn.py", "--out", "/shared/my runs"]


def asked(text):
    """The script's options, without what the comments say."""
    lines = [
        line.split("#SBATCH --")[1].split(" #")[0].strip() for line in text.splitlines() if "#SBATCH" in line
    ]
    return dict(line.split("=") if "=" in line else (line, True) for line in lines)


def test_one_process_for_each_gpu():
    options = asked(script(SlurmJob("cnn", "2", 8, 8, 4, "01:00:00", "gpu"), COMMAND))
    assert options == {
        "job-name": "cnn",
        "partition": "gpu",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "4",
        "time": "01:00:00",
        "requeue": True,
        "signal": "TERM@120",
        "open-mode": "append",
        "output": "slurm-%j.out",
    }


def test_a_range_of_nodes_leaves_the_tasks_to_srun():
    text = script(SlurmJob("cnn", "2-4", tasks_per_node=8, cpus_per_task=2), COMMAND)
    assert "ntasks-per-node" not in asked(text)
    assert asked(text)["cpus-per-task"] == "16"
    assert "srun --kill-on-bad-exit=1 --ntasks=$((SLURM_NNODES * 8)) --cpus-per-task=2 python" in text


def run(tmp_path, status, comment="(null)", restarts=3):
    """Runs the script with a srun that ends with `status`, in a job with a comment: the script's status, srun's
    words, what Slurm is asked to do."""
    text = script(SlurmJob("cnn", restarts=restarts), COMMAND)
    # Slurm's own commands are not here; the shell's logic is what is run.
    (tmp_path / "srun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit {status}\n')
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{comment}'\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("srun", "squeue", "scontrol", "sleep"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-eu", "-c", f"set +e\n{text}"], env=env, capture_output=True, text=True)
    requests = tmp_path / "asked"
    said = requests.read_text().splitlines() if requests.exists() else []
    return done.returncode, (tmp_path / "words").read_text().splitlines(), said


@pytest.mark.parametrize(
    ("status", "comment", "again"),
    [
        (0, "(null)", False),
        (2, "(null)", False),
        (1, "(null)", True),
        (76, "a comment of 2024", True),
        (137, "failures: 2", True),
        (1, "failures: 3", False),
        (76, "failures: 3", False),
        (75, "(null)", True),
        (75, "failures: 3", True),
    ],
)
def test_what_starts_again(tmp_path, status, comment, again):
    ended, _, said = run(tmp_path, status, comment)
    assert ended == status
    assert said[-1:] == (["requeue 7"] if again else [])


def test_failures_are_counted_and_being_told_to_stop_is_not(tmp_path):
    assert run(tmp_path, 76)[2] == ["update job=7 comment=failures: 1", "requeue 7"]
    assert run(tmp_path, 134, "failures: 1")[2][2:] == ["update job=7 comment=failures: 2", "requeue 7"]
    assert run(tmp_path, 75, "failures: 2")[2][4:] == ["requeue 7"]


def test_the_command_arrives_word_for_word(tmp_path):
    _, words, _ = run(tmp_path, 0)
    assert words == ["--kill-on-bad-exit=1", *COMMAND]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck here")
def test_shellcheck(tmp_path):
    put(tmp_path / "job.sbatch", script(SlurmJob("cnn", "2-3"), COMMAND))
    subprocess.run(["shellcheck", "-e", "SC2086", str(tmp_path / "job.sbatch")], check=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"nodes": "two"}, "--nodes two"),
        ({"nodes": "0"}, "--nodes 0"),
        ({"nodes": "3-2"}, "--nodes 3-2: write the smaller number first, 2-3"),
        ({"tasks_per_node": 0}, "above 0"),
        ({"cpus_per_task": 0}, "above 0"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "write it without blanks"),
        ({"partition": ""}, "--partition '': write it .* not empty"),
        ({"time": '1"'}, "without blanks, quotes"),
        ({"output": "it's"}, '--log "it\'s": write it without blanks, quotes'),
    ],
)
def test_mistakes_are_sentences(more, message):
    with pytest.raises(UserError, match=message):
        SlurmJob("cnn", **more)


def test_no_command_and_no_slurm(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="write it after --"):
        script(SlurmJob("cnn"), [])
    with pytest.raises(UserError, match="cannot be written down"):
        script(SlurmJob("cnn"), ["python", os.fsdecode(b"\xff.py")])
    with pytest.raises(UserError, match="--out - makes none"):
        Slurm(out=Path("-"), submit=True).run(COMMAND)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        submit(tmp_path / "job.sbatch")
    with pytest.raises(UserError, match="cannot be written"):
        put(tmp_path / "file" / "job.sbatch", "") if (tmp_path / "file").write_text("") == 0 else None
