"""Jobs over several hosts: network namespaces with names and addresses of their own, and Slurm on them."""

import importlib.util
import json
import os
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        bool(namespace_hosts.missing()), reason=f"hosts of one's own need {namespace_hosts.missing()}"
    ),
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
    said = [job.communicate(timeout=limit)[0] for job in jobs]
    return [job.returncode for job in jobs], said


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_give_the_losses_of_one_process(up, tmp_path, processes):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    subprocess.run([*WORKER, str(one), "10"], env=on_cpu(), check=True, cwd=ROOT)
    statuses, said = ends(
        [start(up, rank, processes, [*WORKER, str(many), "10"]) for rank in range(processes)]
    )
    assert statuses == [0] * processes, said
    assert set(losses(many)[1]) == {processes}
    np.testing.assert_allclose(losses(many)[0], losses(one)[0], rtol=1e-5)


def test_doctor_over_hosts(up, tmp_path):
    statuses, said = ends([start(up, rank, 3, [*DOCTOR, "--out", str(tmp_path)]) for rank in range(3)])
    assert statuses == [0, 0, 0], said
    assert "all 3 are there, on 3 hosts" in said[0]
    assert "shared folder" in said[0]


def test_doctor_sees_folders_that_are_not_shared(up, tmp_path):
    commands = [[*DOCTOR, "--out", str(tmp_path / str(rank))] for rank in range(2)]
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    statuses, said = ends([start(up, rank, 2, command) for rank, command in enumerate(commands)])
    assert statuses == [1, 1], said
    assert "is not the folder that process 0 writes to" in said[0]


def test_a_host_that_is_cut_off_is_named(up, tmp_path):
    command = [*DOCTOR, "--out", str(tmp_path), "--start-limit", "5"]
    up.cut(up.names[2])
    try:
        statuses, said = ends([start(up, rank, 3, command) for rank in range(3)])
    finally:
        up.cut(up.names[2], plug=True)
    assert statuses == [1, 1, 1], said
    assert "1 did not come to process 0" in said[0]
    assert "within 5 s: 2" in said[0]
    assert "nothing answers at the coordinator" in said[2]


def test_the_wrong_host_as_coordinator(up, tmp_path):
    (tmp_path / "run").mkdir()
    wrong = f"{up.names[1]}:61500"
    (status,), (said,) = ends([start(up, 0, 2, [*WORKER, str(tmp_path / "run"), "5"], wrong)])
    assert status != 0
    assert f"process 0 is the coordinator and runs on {up.names[0]}, but '{up.names[1]}' is" in said


lacks_slurm = namespace_hosts.missing(slurm=True)
if lacks_slurm and os.environ.get("SHARDTRAIN_SLURM") == "1" and os.geteuid() == 0:
    install = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    lacks_slurm = namespace_hosts.missing(slurm=True)
slurm = pytest.mark.skipif(
    bool(lacks_slurm), reason=f"Slurm needs {lacks_slurm}; SHARDTRAIN_SLURM=1 installs Debian's packages"
)


def wait(ready, what, limit=300):
    end = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


@slurm
def test_slurm_takes_the_script(up, tmp_path):
    write = [
        sys.executable,
        "-m",
        "shardtrain",
        "launch",
        "slurm",
        "--nodes",
        "2-3",
        "--out",
        str(tmp_path / "job"),
    ]
    subprocess.run([*write, "--", "true"], env=on_cpu(), check=True, cwd=ROOT)
    with namespace_hosts.slurm(up) as env:
        subprocess.run(["sbatch", "--test-only", str(tmp_path / "job")], env=env, check=True)


@slurm
def test_a_node_dies_and_the_job_goes_on(tmp_path):
    """Submit, run on three nodes, kill one, requeue, resume on two, finish: the losses of one process."""
    one, out = tmp_path / "one", tmp_path / "run"
    one.mkdir()
    out.mkdir()
    x64 = {"JAX_ENABLE_X64": "1"}  # no difference can hide in rounding
    subprocess.run([*WORKER, str(one), "60"], env=on_cpu(**x64), check=True, cwd=ROOT)
    submit = [sys.executable, "-m", "shardtrain", "launch", "slurm", "--submit", "--name", "drill"]
    flags = ["--nodes", "2-3", "--time", "20", "--log", str(out / "log"), "--out", str(out / "job.sbatch")]
    with namespace_hosts.hosts(3) as up, namespace_hosts.slurm(up) as env:
        env = on_cpu(SLURM_CONF=env["SLURM_CONF"], **x64)
        done = subprocess.run(
            [*submit, *flags, "--", *WORKER, str(out), "60", "0.3"],
            env=env,
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        number = done.stdout.split()[-1]

        def said():
            return (out / "log").read_text(errors="replace") if (out / "log").exists() else "no log"

        wait((out / "at-17").exists, said)
        up.end(up.names[1])

        def state():
            show = subprocess.run(
                ["scontrol", "show", "job", number], env=env, capture_output=True, text=True
            ).stdout
            return dict(word.split("=", 1) for word in show.split() if "=" in word)

        wait(lambda: state()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), said, 600)
        last = state()
    print(f"{last}\n{said()}")  # for those who want to see it: pytest -s
    assert last["JobState"] == "COMPLETED", said()
    assert int(last["Restarts"]) >= 1
    assert "process 0 of 3 begins at step 0" in said()
    assert "process 0 of 2 begins at step 15" in said()
    got, processes = losses(out)
    assert len(got) == 60
    assert set(processes) == {2, 3}
    np.testing.assert_allclose(got, losses(one)[0], rtol=1e-6)
