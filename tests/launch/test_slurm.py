"""The batch script: what it asks for, and what it does when srun ends, with a bash that runs it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardtrain import UserError
from shardtrain.cli.launch import Slurm, write_or_print
from shardtrain.launch.slurm import WRAP, SlurmJob, script, submit, time_limit

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
    assert "srun --kill-on-bad-exit=1 --ntasks=$((SLURM_NNODES * 8)) --cpus-per-task=2 \\\n" in text


SRUN = """\
#!/bin/bash
# Like srun: options, then a command, which each task runs; the largest status is the step's.
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
printf '%s\\n' "${{options[@]}}" > {folder}/options
worst=0
for ((task = 0; task < {tasks}; task++)); do
    SLURM_PROCID=$task "$@"; status=$?
    ((worst = status > worst ? status : worst))
done
exit $worst
"""


def run(tmp_path, *statuses, comment="(null)", restarts=3, command=None):
    """Runs the script with tasks that end with these statuses, in a job with a comment: the script's status and
    what Slurm is asked to do."""
    ends = ["sh", "-c", 'shift "$SLURM_PROCID"; exit "$1"', "sh", *map(str, statuses)]
    text = script(SlurmJob("cnn", restarts=restarts), command or ends)
    # Slurm's own commands are not here; the shell's logic is what is run.
    (tmp_path / "srun").write_text(SRUN.format(folder=tmp_path, tasks=len(statuses)))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{comment}'\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("srun", "squeue", "scontrol", "sleep"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-eu", "-c", f"set +e\n{text}"], env=env, capture_output=True, text=True)
    requests = tmp_path / "asked"
    scontrol_calls = requests.read_text().splitlines() if requests.exists() else []
    assert f"srun ended with status {done.returncode};" in done.stdout, done.stderr
    return done.returncode, scontrol_calls


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
    ended, scontrol_calls = run(tmp_path, status, comment=comment)
    assert ended == status
    assert scontrol_calls[-1:] == (["requeue 7"] if again else [])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 180), ("2:01", 121), ("01:00:00", 3600), ("1-0", 86400), ("1-0:30", 88200), ("1-2:03:04", 93784),
     ("UNLIMITED", float("inf")), ("0", float("inf"))],
)  # fmt: skip
def test_times_as_slurm_reads_them(text, seconds):
    assert time_limit(text) == seconds
    assert asked(script(SlurmJob("cnn", time=text), COMMAND))["time"] == text


@pytest.mark.parametrize(
    "text",
    ["foo", "", "1:2:3:4", "1-", "-1", "1-2:3:4:5", "1:60", "1.5", "1h", "00:00:90:00", "٣", "9" * 5000],
)
def test_times_that_slurm_would_not_take(text):
    with pytest.raises(UserError, match=r"write a time such as 90 .minutes.|write it without blanks"):
        SlurmJob("cnn", time=text)


@pytest.mark.parametrize("text", ["2", "2:00", "00:01:59", "0-0:2", "1"])
def test_times_in_which_nothing_can_be_saved(text):
    with pytest.raises(UserError, match="told to save 120 s before its end; give more, such as 00:10:00"):
        SlurmJob("cnn", time=text)


def test_every_start_has_a_secret_token_of_its_own(tmp_path):
    tokens = set()
    for _ in range(2):
        run(tmp_path, 0, command=["sh", "-c", f'echo "$SHARDTRAIN_TOKEN" > {tmp_path}/token'])
        tokens.add((tmp_path / "token").read_text())
    assert len(tokens) == 2
    assert all(re.fullmatch("[0-9a-f]{32}\n", token) for token in tokens)


def test_failures_are_counted_and_being_told_to_stop_is_not(tmp_path):
    assert run(tmp_path, 76)[1] == ["update job=7 comment=failures: 1", "requeue 7"]
    assert run(tmp_path, 134, comment="failures: 1")[1][2:] == [
        "update job=7 comment=failures: 2",
        "requeue 7",
    ]
    assert run(tmp_path, 75, comment="failures: 2")[1][4:] == ["requeue 7"]


@pytest.mark.parametrize("status", [1, 2, 74, 76, 137])
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_is_not_hidden_by_those_that_were_stopped_for_it(tmp_path, status, first):
    """They save, and say that they were told to stop."""
    statuses = [status, 75, 0] if first else [75, 75, status]
    ended, scontrol_calls = run(tmp_path, *statuses, comment="failures: 3")
    assert (ended, scontrol_calls) == (status, [])
    assert run(tmp_path, 75, 0, 75, comment="failures: 3") == (75, ["requeue 7"])


def test_the_command_arrives_word_for_word(tmp_path):
    words = ["python", "a b", "it's", '"$HOME"', "--out", "/shared/my runs", ""]
    program = "import sys; open(sys.argv[1], 'w').write(repr(sys.argv[2:]))"
    run(tmp_path, 0, command=[sys.executable, "-c", program, str(tmp_path / "words"), *words])
    assert (tmp_path / "words").read_text() == repr(words)
    assert (tmp_path / "options").read_text() == "--kill-on-bad-exit=1\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_process_has_the_signals_and_its_status_is_passed_on(number):
    """Slurm sends them to all processes of a task, the shell around it too."""
    program = f"trap 'sleep 0.3; exit 75' {number}; echo there; for k in $(seq 100); do sleep 0.1; done"
    before = signal.signal(number, signal.SIG_DFL)  # a suite in the background was started to ignore SIGINT
    job = subprocess.Popen(
        ["bash", "-c", WRAP, "bash", "sh", "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    signal.signal(number, before)
    assert job.stdout is not None
    assert job.stdout.readline() == b"there\n"
    os.killpg(job.pid, number)
    job.communicate(timeout=10)
    assert job.returncode == 1  # as srun is to see 75


def test_a_process_that_does_not_answer_signals_ends_as_usual():
    job = subprocess.Popen(
        ["bash", "-c", WRAP, "bash", "sh", "-c", "echo there; exec sleep 60"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == b"there\n"
    os.killpg(job.pid, signal.SIGTERM)
    job.communicate(timeout=10)
    assert job.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck here")
def test_shellcheck(tmp_path):
    write_or_print(tmp_path / "job.sbatch", script(SlurmJob("cnn", "2-3"), COMMAND))
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
        write_or_print(tmp_path / "file" / "job.sbatch", "") if (tmp_path / "file").write_text(
            ""
        ) == 0 else None
