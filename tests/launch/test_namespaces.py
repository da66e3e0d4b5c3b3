"""Jobs over several hosts: network namespaces with names and addresses of their own, and Slurm on them."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from recipe_process import ROOT, environment

WORKER = [sys.executable, str(ROOT / "tests" / "launch" / "worker.py")]
DOCTOR = [sys.executable, "-m", "shardtrain", "doctor"]
on_cpu = partial(environment, JAX_PLATFORMS="cpu")

_spec = importlib.util.spec_from_file_location("namespace_hosts", ROOT / "tools" / "namespace_hosts.py")
assert _spec is not None
assert _spec.loader is not None
namespace_hosts = importlib.util.module_from_spec(_spec)
sys.modules["namespace_hosts"] = namespace_hosts
_spec.loader.exec_module(namespace_hosts)

installs = os.environ.get("SHARDTRAIN_SLURM") == "1" and os.geteuid() == 0 and shutil.which("apt-get")
if installs and namespace_hosts.missing(slurm=True):
    get = "apt-get update; apt-get install -y --no-install-recommends slurm-wlm munge iproute2"
    subprocess.run(["timeout", "120", "sh", "-c", get], check=False, stdout=subprocess.DEVNULL)


def lacks(*, slurm=False):
    """What this machine lacks for hosts of its own; nothing if it has all."""
    found = namespace_hosts.missing(slurm=slurm)
    probe = ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "probe", "type", "bridge"]
    if not found and subprocess.run(probe, capture_output=True, check=False).returncode:
        return "the right to make namespaces"
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(lacks()), reason=f"hosts of one's own need {lacks()}"),
]


def losses(out):
    """The last loss that each step was done with, and the numbers of processes that did them."""
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    last = {row["step"]: row["loss"] for row in rows}
    return [last[step] for step in sorted(last)], [row["processes"] for row in rows]


@pytest.fixture(scope="module")
def up():
    with namespace_hosts.hosts(4) as found:
        yield found


def start(up, rank, processes, command, coordinator=None):
    """A process on the host of its number."""
    place = {
        "SHARDTRAIN_COORDINATOR": coordinator or f"{up.names[0]}:61500",
        "SHARDTRAIN_PROCESSES": str(processes),
        "SHARDTRAIN_PROCESS_ID": str(rank),
    }
    return subprocess.Popen(
        up.on(up.names[rank], command),
        env=on_cpu(**place),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(jobs, limit=240):
    output = [job.communicate(timeout=limit)[0] for job in jobs]
    return [job.returncode for job in jobs], output


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_give_the_losses_of_one_process(up, tmp_path, processes):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    subprocess.run([*WORKER, str(one), "10"], env=on_cpu(), check=True, cwd=ROOT)
    statuses, output = ends(
        [start(up, rank, processes, [*WORKER, str(many), "10"]) for rank in range(processes)]
    )
    assert statuses == [0] * processes, output
    assert set(losses(many)[1]) == {processes}
    np.testing.assert_allclose(losses(many)[0], losses(one)[0], rtol=1e-5)


def test_doctor_over_hosts(up, tmp_path):
    statuses, output = ends([start(up, rank, 3, [*DOCTOR, "--out", str(tmp_path)]) for rank in range(3)])
    assert statuses == [0, 0, 0], output
    assert "all 3 are there, on 3 hosts" in output[0]
    assert "shared folder" in output[0]


def test_doctor_sees_folders_that_are_not_shared(up, tmp_path):
    commands = [[*DOCTOR, "--out", str(tmp_path / str(rank))] for rank in range(2)]
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    statuses, output = ends([start(up, rank, 2, command) for rank, command in enumerate(commands)])
    assert statuses == [1, 1], output
    assert "is not the folder that process 0 writes to" in output[0]


def test_a_host_that_is_cut_off_is_named(up, tmp_path):
    command = [*DOCTOR, "--out", str(tmp_path), "--start-limit", "5"]
    up.cut(up.names[2])
    try:
        statuses, output = ends([start(up, rank, 3, command) for rank in range(3)])
    finally:
        up.cut(up.names[2], plug=True)
    assert statuses == [1, 1, 1], output
    assert "1 did not come to process 0" in output[0]
    assert "within 5 s: 2" in output[0]
    assert "nothing answers at the coordinator" in output[2]


def test_the_wrong_host_as_coordinator(up, tmp_path):
    (tmp_path / "run").mkdir()
    wrong = f"{up.names[1]}:61500"
    (status,), (output,) = ends([start(up, 0, 2, [*WORKER, str(tmp_path / "run"), "5"], wrong)])
    assert status != 0
    assert f"process 0 is the coordinator and runs on {up.names[0]}, but '{up.names[1]}' is" in output


slurm = pytest.mark.skipif(
    bool(lacks(slurm=True)),
    reason=f"Slurm needs {lacks(slurm=True)}; SHARDTRAIN_SLURM=1 installs Debian's packages",
)


def wait(ready, what, limit=300):
    end = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


def submit(env, folder, command, *flags):
    """Hands a job to Slurm: its number."""
    launch = [sys.executable, "-m", "shardtrain", "launch", "slurm", "--submit", "--time", "20", *flags]
    files = ["--log", str(folder / "log"), "--out", str(folder / "job.sbatch")]
    done = subprocess.run(
        [*launch, *files, "--", *command], env=env, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.split()[-1]


def state(env, number):
    """What Slurm says of a job."""
    show = ["scontrol", "show", "job", number]
    output = subprocess.run(show, env=env, capture_output=True, text=True, check=True).stdout
    return dict(word.strip().split("=", 1) for word in re.split(r"\n| (?=\w+=)", output) if "=" in word)


def until_it_ends(env, number, output):
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    wait(lambda: state(env, number)["JobState"] in ends, output, 600)
    return state(env, number)


@slurm
def test_a_fault_that_always_comes_back_ends_the_job(up, tmp_path):
    """It is not hidden by the other process, which Slurm tells to stop, and which ends with 75 then. A start
    that was really told to stop is free: Slurm keeps the count of failures in between."""
    program = """
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] && exit 75
trap 'echo saved; exit 75' TERM
[ "$SLURM_PROCID" = 1 ] && sleep 1 && exit 1
for k in $(seq 600); do sleep 0.1; done
"""
    with namespace_hosts.slurm(up) as env:
        env = on_cpu(SLURM_CONF=env["SLURM_CONF"])
        number = submit(env, tmp_path, ["sh", "-c", program], "--restarts", "1", "--nodes", "2")
        last = until_it_ends(env, number, lambda: (tmp_path / "log").read_text())
    output = (tmp_path / "log").read_text()
    assert last["JobState"] == "FAILED", output
    assert (last["Restarts"], last["Comment"]) == ("2", "failures: 1")
    ended = [line for line in output.splitlines() if line.startswith("srun ended")]
    assert ended == [
        "srun ended with status 75; restarts: 0, for failures: 0",
        "srun ended with status 1; restarts: 1, for failures: 0",
        "srun ended with status 1; restarts: 2, for failures: 1",
    ]
    assert output.count("saved") == 2


@slurm
def test_a_recipe_is_told_to_stop_and_loses_a_node_and_goes_on(tmp_path):
    """Submit, run on three nodes, SIGTERM, resume, kill a node, resume on two: the losses of one process."""
    recipe = [sys.executable, str(ROOT / "recipes" / "train_cnn.py"), "--model", "lenet", "--x64"]
    recipe += ["--mesh", "data=-1", "--batch-size", "24", "--checkpoint-every", "50", "--steps", "600"]
    one, out = tmp_path / "one", tmp_path / "run"
    command = [*recipe, "--devices", "1", "--out", str(one)]
    subprocess.run(command, env=on_cpu(), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

    def output():
        return (tmp_path / "log").read_text(errors="replace") if (tmp_path / "log").exists() else "no log"

    def steps():
        rows = out / "metrics.jsonl"
        return len(rows.read_text().splitlines()) if rows.exists() else 0

    with namespace_hosts.hosts(3) as up, namespace_hosts.slurm(up) as env:
        env = on_cpu(SLURM_CONF=env["SLURM_CONF"])
        number = submit(env, tmp_path, [*recipe, "--out", str(out)], "--name", "cnn", "--nodes", "2-3")
        wait(lambda: steps() > 60, output)
        subprocess.run(["scancel", "--signal=TERM", number], env=env, check=True)
        wait(lambda: "resumed at step" in output(), output)
        wait(lambda: steps() > 250, output)
        up.end(up.names[1])
        last = until_it_ends(env, number, output)
    print(f"{last}\n{output()}")  # for those who want to see it: pytest -s
    assert last["JobState"] == "COMPLETED", output()
    assert int(last["Restarts"]) == 2
    assert "srun ended with status 75; restarts: 0, for failures: 0" in output()
    first, second = (int(step) for step in re.findall(r"resumed at step (\d+) of 600", output()))
    assert f"step {first} is saved" in output()  # the step at which it was told to stop
    assert first > 60
    assert second >= 200  # or 250, unless the kill fell into that save
    found, expected = (json.loads((run / "result.json").read_text()) for run in (out, one))
    assert found["processes"] == 2
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)
