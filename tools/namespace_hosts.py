"""Several hosts on one Linux machine: network namespaces with own names and addresses, and Slurm on them.

Every host is a network namespace on a bridge; a command on it sees the host's own name, address and
/etc/hosts, and the machine's own files, as a cluster with a shared disk does. It needs root and `ip`; Slurm
needs `apt-get install -y --no-install-recommends slurm-wlm munge`.

    python tools/namespace_hosts.py --hosts 3 --slurm -- bash   # a shell with sbatch, srun and squeue
"""

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Bind mounts are private to a command, so each sees the names of its own host.
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def missing(*, slurm: bool = False) -> str:
    """What this machine lacks for hosts of its own; nothing if it has all."""
    if os.geteuid():
        return "root"
    programs = ["ip", "nsenter", "unshare", *(["slurmctld", "slurmd", "munged", "sbatch"] if slurm else [])]
    return ", ".join(program for program in programs if not shutil.which(program))


def root(*command: str) -> str:
    """Runs a command to its end; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Hosts:
    """Hosts that are up.

    Attributes:
        names: of the hosts.
        net: the first three numbers of their addresses; the machine itself has number 254.
        folder: for what they write.
    """

    names: tuple[str, ...]
    net: str
    folder: Path

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"{self.net}.{self.names.index(name) + 1}"

    def on(self, name: str, command: Sequence[str]) -> list[str]:
        """The command that runs a command on a host."""
        enter = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "--"]
        return [*enter, "sh", "-c", ENTER, "sh", str(self.folder / "hosts"), name, *command]

    def end(self, name: str) -> None:
        """Kills all that runs on a host, as a power cut does."""
        for pid in root("ip", "netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self, name: str, *, plug: bool = False) -> None:
        """Pulls the network cable of a host, or plugs it in again."""
        root("ip", "link", "set", f"v{name}", "up" if plug else "down")


@contextmanager
def hosts(number: int) -> Iterator[Hosts]:
    """Brings hosts up, and down at the end with all that runs on them.

    Example:
        >>> with hosts(2) as up:
        ...     subprocess.run(up.on(up.names[1], ["hostname"]))
    """
    tag = secrets.token_hex(2)
    bridge = f"st{tag}"
    names = tuple(f"n{tag}{k}" for k in range(1, number + 1))
    net = f"10.{128 + secrets.randbelow(100)}.{secrets.randbelow(256)}"
    with tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as folder:
        up = Hosts(names, net, Path(folder))
        os.chmod(folder, 0o755)
        lines = ["127.0.0.1 localhost", f"{net}.254 {controller()}"]
        lines += [f"{up.address(name)} {name}" for name in names]
        (up.folder / "hosts").write_text("\n".join(lines) + "\n")
        try:
            root("ip", "link", "add", bridge, "type", "bridge")
            root("ip", "addr", "add", f"{net}.254/24", "dev", bridge)
            root("ip", "link", "set", bridge, "up")
            for name in names:
                root("ip", "netns", "add", name)
                root("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
                root("ip", "link", "set", f"v{name}", "master", bridge, "up")
                root("ip", "-n", name, "addr", "add", f"{up.address(name)}/24", "dev", "eth0")
                root("ip", "-n", name, "link", "set", "lo", "up")
                root("ip", "-n", name, "link", "set", "eth0", "up")
            yield up
        finally:
            for name in names:
                with suppress(subprocess.CalledProcessError):
                    up.end(name)
                    root("ip", "netns", "delete", name)
            with suppress(subprocess.CalledProcessError):
                root("ip", "link", "delete", bridge)


def controller() -> str:
    """The name of the machine itself, where slurmctld runs."""
    return os.uname().nodename.partition(".")[0]


CONF = """\
ClusterName=namespaces
SlurmctldHost={controller}({net}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={port}
SlurmdPort={next_port}
SlurmdTimeout=10
KillWait=10
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""Dead nodes are noticed in 10 s instead of 5 min, and requeued jobs start in seconds instead of 2 min."""


def daemon(*command: str) -> subprocess.Popen[bytes]:
    """Starts a program that goes on; it keeps its log in a file."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_node(up: Hosts, name: str) -> None:
    """Starts Slurm's daemon on a host."""
    subprocess.run(up.on(name, ["slurmd", "-f", str(up.folder / "slurm.conf")]), check=True)


@contextmanager
def slurm(up: Hosts) -> Iterator[dict[str, str]]:
    """Slurm with a node on every host.

    Returns:
        The environment in which its commands find it.

    Example:
        >>> with hosts(3) as up, slurm(up) as env:
        ...     subprocess.run(["srun", "-N3", "hostname"], env=env)
    """
    port = 20000 + secrets.randbelow(10000)
    size = "CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
    nodes = "\n".join(f"NodeName={name} NodeAddr={up.address(name)} {size}" for name in up.names)
    conf = up.folder / "slurm.conf"
    text = CONF.format(
        controller=controller(), net=up.net, folder=up.folder, port=port, next_port=port + 1, nodes=nodes
    )
    conf.write_text(text)
    (up.folder / "state").mkdir()
    for name in up.names:
        (up.folder / f"spool.{name}").mkdir()
    env = os.environ | {"SLURM_CONF": str(conf)}
    key = up.folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    socket, pid = f"--socket={up.folder}/munge.socket", f"--pid-file={up.folder}/munge.pid"
    files = [
        f"--key-file={key}",
        pid,
        f"--log-file={up.folder}/munge.log",
        f"--seed-file={up.folder}/munge.seed",
    ]
    daemons = [daemon("munged", "--foreground", "--force", socket, *files)]
    try:
        wait(lambda: (up.folder / "munge.socket").exists(), "munged")
        daemons.append(
            subprocess.Popen(["slurmctld", "-D", "-c", "-f", str(conf)], stderr=subprocess.DEVNULL)
        )
        for name in up.names:
            start_node(up, name)
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]

        def idle() -> bool:
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            return len(done.stdout.split()) == len(up.names)

        wait(idle, "Slurm")
        yield env
    finally:
        for name in up.names:
            up.end(name)
        for job in reversed(daemons):
            job.terminate()
            job.wait(20)


def wait(ready: Callable[[], bool], what: str, limit: float = 30.0) -> None:
    """Waits until `ready()` is true."""
    end = time.monotonic() + limit
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} is not up after {limit:g} s")
        time.sleep(0.1)


def main() -> None:
    """Brings up what is asked for, and runs a command in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("command", nargs="+", help="after --; it runs on the machine itself")
    args = parser.parse_args()
    if lacks := missing(slurm=args.slurm):
        sys.exit(f"error: this needs {lacks}")
    with hosts(args.hosts) as up:
        if not args.slurm:
            sys.exit(subprocess.run(args.command, env=os.environ | {"HOSTS": " ".join(up.names)}).returncode)
        with slurm(up) as env:
            sys.exit(subprocess.run(args.command, env=env).returncode)


if __name__ == "__main__":
    main()
