"""Each check of the doctor, on a host that has the defect it looks for."""

import os
import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path

import jax
import pytest

from shardtrain import UserError
from shardtrain.cli.doctor import Doctor
from shardtrain.launch import Cluster, doctor, identity
from shardtrain.launch.identity import own_identity

FAR = Cluster("Slurm", "n1:62000", 2, 1, hosts=2)


def bad(findings):
    return [(finding.check, finding.found, finding.fix) for finding in findings if not finding.good]


def install(monkeypatch, **versions):
    """Pretends that these packages for GPUs are installed, with jaxlib 0.10.2."""
    found = {"jax": "0.10.2", "jaxlib": "0.10.2"} | {k.replace("_", "-"): v for k, v in versions.items()}
    dist = namedtuple("Distribution", "metadata")
    every = [dist({"Name": name.replace("-", "_")}) for name in found]
    monkeypatch.setattr(identity.metadata, "distributions", lambda: every)
    for module in (identity, doctor):
        monkeypatch.setattr(module, "installed", lambda names: {n: found[n] for n in names if n in found})


def test_versions_that_hang_are_named(monkeypatch):
    install(monkeypatch, nvidia_nccl_cu13="2.28.9", jax_cuda13_plugin="0.10.2")
    ((check, found, fix),) = bad(doctor.packages())
    assert check == "packages"
    assert found == "nvidia-nccl-cu13 2.28.9: collectives across hosts can hang, 2.30.7 does not"
    assert fix.startswith("pip install 'nvidia-nccl-cu13>=2.31.2' (https://github.com/")
    install(monkeypatch, nvidia_nccl_cu13="2.31.2")
    assert bad(doctor.packages()) == []


def test_a_plugin_beside_another_jaxlib(monkeypatch):
    install(monkeypatch, jax_cuda13_plugin="0.9.0", jax_cuda13_pjrt="0.10.2")
    assert bad(doctor.packages()) == [
        (
            "packages",
            "jax-cuda13-plugin 0.9.0 beside jaxlib 0.10.2",
            "pip install 'jax-cuda13-plugin==0.10.2'",
        )
    ]


def identities(*others):
    """The identities of process 0 on host a, and of others with these differences."""
    first = own_identity() | {"host": "a", "skew": 0.0}
    return [first] + [
        first | {"host": "b", "versions": first["versions"] | more.pop("versions", {})} | more
        for more in others
    ]


def test_processes_that_are_alike():
    assert bad(doctor.together(identities({}, {"skew": -0.9}))) == []


@pytest.mark.parametrize("package", ["jax", "python", "numpy", "nvidia-nccl-cu13"])
def test_versions_that_differ_between_hosts(package):
    ((check, found, fix),) = bad(doctor.together(identities({}, {"versions": {package: "0.1"}})))
    assert check == "versions"
    assert found.startswith(f"{package} is 0.1 in process 2 (b) and ")
    assert fix == "install the same on all hosts"


def test_what_gpus_need_is_compared(monkeypatch):
    install(monkeypatch, nvidia_nccl_cu13="2.31.2", jax_cuda13_plugin="0.10.2", grain="0.2", numpy="2.1")
    assert own_identity()["versions"].items() >= {
        ("nvidia-nccl-cu13", "2.31.2"),
        ("jax-cuda13-plugin", "0.10.2"),
        ("grain", "0.2"),
        ("numpy", "2.1"),
    }


@pytest.mark.parametrize("skew", [1.2, -3.0])
def test_clocks_of_hosts(skew):
    ((check, found, fix),) = bad(doctor.together(identities({"skew": 0.5}, {"skew": skew})))
    assert (check, found) == ("clocks", f"process 2 (b) is {skew:+.1f} s off process 0")
    assert fix == "let b keep its time by NTP"


def test_the_clock_of_the_disk(monkeypatch, tmp_path):
    assert bad(doctor.folder(tmp_path)) == []
    now = time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now - 10)
    ((check, found, fix),) = bad(doctor.folder(tmp_path))
    assert check == "clock"
    assert found.startswith(f"files of {tmp_path} are +10.")
    assert fix == "let both keep their time by NTP"


def test_too_little_space(monkeypatch, tmp_path):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30 - 1))
    ((check, found, fix),) = bad(doctor.folder(tmp_path / "not" / "yet"))
    assert (check, found) == ("folder", f"1.0 GiB free in {tmp_path}")
    assert fix == "make room, or name another --out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30))
    assert bad(doctor.folder(tmp_path)) == []


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there are GPUs here, and jax uses them")
@pytest.mark.parametrize(
    ("platforms", "fix"),
    [("cpu", "unset JAX_PLATFORMS=cpu"), (None, "pip install 'shardtrain[cuda13]'")],
)
def test_gpus_that_jax_does_not_use(monkeypatch, platforms, fix):
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: [Path("0"), Path("1")])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    ((check, found, proposal),) = bad(doctor.devices(None))
    assert (check, proposal) == ("devices", fix)
    assert found.endswith("but the host has 2 NVIDIA GPUs")


def test_a_host_that_does_not_know_itself(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host")
    ((check, found, fix),) = bad([doctor.own_name(None)])
    assert (check, found) == ("host name", "no-such-host does not resolve")
    assert fix == "add a line to /etc/hosts: ADDRESS no-such-host"


def test_a_host_that_others_cannot_reach_by_its_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    ((_, found, fix),) = bad([doctor.own_name(FAR)])
    assert found == "localhost is 127.0.0.1, which other hosts cannot reach"
    assert fix == "give localhost its real address in /etc/hosts"
    assert doctor.own_name(None).good  # alone nobody else is to


@pytest.mark.parametrize("cluster", [None, FAR])
def test_a_loopback_coordinator_of_several_hosts(cluster):
    ((check, found, fix),) = bad([doctor.address("localhost:62000", cluster)])
    assert (check, found) == ("coordinator", "localhost is 127.0.0.1, this host itself")
    assert fix.startswith("give localhost its real address in /etc/hosts")
    assert doctor.address("localhost:62000", Cluster("launch local", "localhost:62000", 2, 1, hosts=1)).good


def test_a_slurm_job_without_srun(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert bad([doctor.place(None)]) == [
        ("job", "one process of a Slurm job of 4", "start it with srun: srun shardtrain doctor")
    ]
    monkeypatch.setenv("SLURM_NTASKS", "abc")
    with pytest.raises(UserError, match=r"^SLURM_NTASKS=abc: set this variable to a whole number"):
        doctor.place(None)


def command(monkeypatch, **flags):
    """The place in a job, and the coordinator, that the command looks at with these flags."""
    seen = []
    monkeypatch.setattr(
        "shardtrain.cli.doctor.examine",
        lambda out, cluster, coordinator, limit: (
            seen.append((cluster, coordinator))
            or [doctor.Finding("job", True, "here", process=cluster.process_id if cluster else 0)]
        ),
    )
    with pytest.raises(SystemExit):
        Doctor(**flags).run([])
    return seen[0]


def test_a_coordinator_beside_a_job_is_the_jobs(monkeypatch):
    """As in `launch local -n 2 -- shardtrain doctor --coordinator ...`."""
    assert command(monkeypatch, coordinator="n1:5555") == (None, "n1:5555")
    for name, value in {"LOCAL": "1", "PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(f"SHARDTRAIN_{name}", value)
    cluster, _ = command(monkeypatch, coordinator="n1:5555")
    assert (cluster.coordinator, cluster.processes, cluster.process_id) == ("n1:5555", 2, 1)


@pytest.mark.parametrize("limit", [1e9, float("inf"), float("nan"), 0.0])
def test_a_limit_that_has_no_end(limit):
    with pytest.raises(
        UserError, match=rf"^--start-limit {limit:g}: use seconds above 0".replace("+", r"\+")
    ):
        Doctor(start_limit=limit).run([])
