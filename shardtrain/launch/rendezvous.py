"""The processes of a job meet at the coordinator's port before jax uses it, and exchange their identities.

jax ends a process without an exception if the coordinator or a peer is missing. Here every process raises an
exception that names what is missing, within a time limit.
"""

import errno
import ipaddress
import json
import os
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shardtrain.errors import StartError, UserError
from shardtrain.launch.cluster import Cluster
from shardtrain.launch.identity import ProcessIdentity

NAME_LIMIT_SECONDS = 10.0
"""How long a name may fail to resolve before it is refused. In Kubernetes names appear with their pods."""

LONGEST_MESSAGE_BYTES = 1 << 20
"""A longer message does not come from a process of this job."""

CLOSE_SECONDS = 5.0
"""How long a process has to read the answer of process 0 and to close the connection."""

RETRY_SECONDS = 0.2
"""Time between two attempts to connect or to resolve a name."""

DAY_SECONDS = 86400.0
"""The longest limit of waiting; sockets cannot wait for ever."""


def meet(cluster: Cluster, identity: ProcessIdentity, limit: float) -> list[ProcessIdentity]:
    """Waits until all processes of the job have come, and exchanges their identities.

    Args:
        cluster: the place of this process.
        identity: of this process; JSON must be able to represent it.
        limit: seconds to wait.

    Returns:
        The identities in the order of the processes. Each has an entry `"skew"`: by how many seconds its
        clock is ahead of that of process 0, up to the time that a message takes.

    Raises:
        StartError: if a process or the coordinator is missing after `limit` seconds, or if the port is in
            use; a new start may succeed.
        UserError: if a name, number or address is wrong, which no new start changes.
    """
    end = time.monotonic() + limit
    in_kubernetes = cluster.scheduler == "Kubernetes"  # where names appear with their pods
    name_end = end if in_kubernetes else min(end, time.monotonic() + NAME_LIMIT_SECONDS)
    with naming(cluster):
        host, port = split_address(cluster.coordinator)
        try:
            address = resolve(host, name_end)
        except UserError as error:
            if cluster.source and not in_kubernetes:  # a user wrote it; the names of schedulers are right
                raise
            raise StartError(str(error)) from error
        if cluster.apart and ipaddress.ip_address(address).is_loopback:
            raise UserError(
                f"the coordinator {host!r} is {address} here, which is this host itself "
                f"({socket.gethostname()}), but process 0 runs on another; give it its real address in "
                f"/etc/hosts or in DNS"
            )
        if cluster.process_id == 0:
            refuse_elsewhere(host, address)
        else:
            here = f"process {cluster.process_id} on {socket.gethostname()}"
            connection = _connect(cluster, here, address, port, limit, end)
    if cluster.process_id == 0:
        return _gather(cluster, identity, port, limit, end)
    return _report(cluster, identity, connection, here, limit, end)


def refuse_endless(name: str, limit: float) -> None:
    """Refuses a limit of waiting that is not above 0 and at most a day.

    Raises:
        UserError: if it is not; names the flag.

    Example:
        >>> refuse_endless("--start-limit", 1e9)
        Traceback (most recent call last):
        shardtrain.errors.UserError: --start-limit 1e+09: use seconds above 0, and 86400 (a day) at most
    """
    if not 0 < limit <= DAY_SECONDS:
        raise UserError(f"{name} {limit:g}: use seconds above 0, and {DAY_SECONDS:.0f} (a day) at most")


@contextmanager
def naming(cluster: Cluster | None) -> Iterator[None]:
    """Adds the flag or variable that gave the coordinator to the message of a `UserError` about it."""
    try:
        yield
    except UserError as error:
        if cluster is None or not cluster.given:
            raise
        raise type(error)(f"{cluster.given}: {error}") from error


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of an address `host:port`.

    Raises:
        UserError: if the text is not of this form.

    Example:
        >>> split_address("node1:62000")
        ('node1', 62000)
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{address!r} is no address; write HOST:PORT of process 0, such as node1:62000")
    return host.strip("[]"), int(port)


def resolve(host: str, end: float) -> str:
    """Returns the address of a host name; asks again until `end` while the name does not resolve.

    Raises:
        UserError: if the name still does not resolve.
    """
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"the coordinator's name {host!r} does not resolve on {socket.gethostname()} "
                    f"({error.strerror}); give the address of process 0's host, or add the name to /etc/hosts"
                ) from error
        time.sleep(RETRY_SECONDS)


def _gather(
    cluster: Cluster, identity: ProcessIdentity, port: int, limit: float, end: float
) -> list[ProcessIdentity]:
    """Process 0: collects the identities of all others, then sends the whole list to each."""
    gathering = _Gathering(cluster, identity)
    with listen(port) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        try:
            while not gathering.is_complete and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fileobj is server:
                        peer, _ = server.accept()
                        selector.register(peer, selectors.EVENT_READ)
                        gathering.accept(peer)
                    elif not gathering.receive(peer := key.fileobj):  # type: ignore[assignment,arg-type]
                        selector.unregister(peer)
                        peer.close()
            gathering.refuse_missing(limit)
        except UserError as error:
            answer = {"error": str(error), "may_pass": isinstance(error, StartError)}
            _send_all(gathering.connections, answer)
            raise
        server.close()  # before a process that has the answer connects again
        _send_all(gathering.connections, gathering.all)
        return gathering.all


class _Gathering:
    """The connections and identities that process 0 has so far.

    Args:
        cluster: the place of process 0.
        identity: of process 0.

    Attributes:
        connections: the sockets of other processes.
    """

    def __init__(self, cluster: Cluster, identity: ProcessIdentity) -> None:
        self.cluster = cluster
        self.connections: list[socket.socket] = []
        self._identities: dict[int, ProcessIdentity] = {0: identity | {"skew": 0.0}}
        self._received: dict[socket.socket, bytearray] = {}
        self._ranks: dict[socket.socket, int] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the identities of all processes are there."""
        return len(self._identities) == self.cluster.processes

    @property
    def all(self) -> list[ProcessIdentity]:
        """The identities in the order of the processes."""
        return [self._identities[rank] for rank in range(self.cluster.processes)]

    def accept(self, peer: socket.socket) -> None:
        """Takes a new connection."""
        self.connections.append(peer)
        self._received[peer] = bytearray()

    def receive(self, peer: socket.socket) -> bool:
        """Reads from a connection; False if its other end has closed it or is no process of ours."""
        data = _receive(peer)
        received = self._received[peer]
        received += data
        if not data or len(received) > LONGEST_MESSAGE_BYTES:
            self._identities.pop(self._ranks.pop(peer, -1), None)
            self.connections.remove(peer)
            del self._received[peer]
            return False
        if received.endswith(b"\n") and (found := _parse_identity(received)):
            rank = self._ranks[peer] = found.pop("process_id")
            self._refuse_impostor(rank, found)
            self._identities[rank] = found | {"skew": found["time"] - time.time()}
        return True

    def _refuse_impostor(self, rank: int, identity: ProcessIdentity) -> None:
        expected = self.cluster.processes
        if (processes := identity.pop("processes")) != expected or not 0 <= rank < processes:
            raise UserError(
                f"process {rank} on {identity['host']} was told of {processes} processes, process 0 of "
                f"{expected}; give all the same --processes"
            )
        if rank in self._identities:
            raise UserError(
                f"there are two processes with the number {rank}, on {self._identities[rank]['host']} and on "
                f"{identity['host']}; give each its own --process-id"
            )

    def refuse_missing(self, limit: float) -> None:
        """Raises a `StartError` that names the processes that did not come."""
        missing = sorted(set(range(self.cluster.processes)) - set(self._identities))
        if missing:
            raise StartError(
                f"of {self.cluster.processes} processes {len(missing)} did not come to process 0 at "
                f"{self.cluster.coordinator} within {limit:g} s: {', '.join(map(str, missing))}; see what "
                f"they say, and whether their hosts reach this port"
            )


def _report(
    cluster: Cluster,
    identity: ProcessIdentity,
    connection: socket.socket,
    here: str,
    limit: float,
    end: float,
) -> list[ProcessIdentity]:
    """Every other process: sends its identity to process 0, and waits for those of all."""
    with connection as server:
        message = identity | {
            "process_id": cluster.process_id,
            "processes": cluster.processes,
            "time": time.time(),
        }
        answer = bytearray()
        try:
            server.sendall(json.dumps(message).encode() + b"\n")
            # Process 0 may have started later, and says who is missing when its own limit is over.
            server.settimeout(max(0.0, end - time.monotonic()) + limit)
            while not answer.endswith(b"\n") and (data := server.recv(1 << 16)):
                answer += data
        except OSError:
            answer.clear()
    if not answer.endswith(b"\n"):
        raise StartError(
            f"{here}: process 0 at {cluster.coordinator} broke off before all processes were there; "
            f"see what it says"
        )
    try:
        identities = json.loads(answer)
    except ValueError as error:
        raise StartError(
            f"{here}: what answers at {cluster.coordinator} is no process of this job; name another port"
        ) from error
    if "error" in identities:
        raise (StartError if identities["may_pass"] else UserError)(identities["error"])
    return identities


def _connect(cluster: Cluster, here: str, address: str, port: int, limit: float, end: float) -> socket.socket:
    """Connects to process 0, as soon as it listens."""
    while True:
        left = end - time.monotonic()
        try:
            return socket.create_connection((address, port), timeout=max(0.1, min(5.0, left)))
        except OSError as error:
            if left <= 0:
                loopback = ipaddress.ip_address(address).is_loopback
                itself = f", and {address} is this host itself" if loopback else ""
                raise StartError(
                    f"{here}: nothing answers at the coordinator {cluster.coordinator} within {limit:g} s "
                    f"({error.strerror or error}{itself}); see whether process 0 runs there and lets this "
                    f"port through"
                ) from error
        time.sleep(RETRY_SECONDS)


def refuse_elsewhere(host: str, address: str) -> None:
    """Refuses a coordinator address that this host, which runs process 0, does not have.

    With `JAX_COORDINATOR_BIND_ADDRESS` nothing is refused: there may be a router in between.

    Raises:
        UserError: if the address belongs to another host.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and not os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
            raise UserError(
                f"process 0 is the coordinator and runs on {socket.gethostname()}, but {host!r} is "
                f"{address}, another host; name process 0's own host, or start it there"
            ) from error


def listen(port: int) -> socket.socket:
    """Returns a server socket on all addresses of this host.

    Raises:
        StartError: if the port is in use.
        UserError: if this user may not use the port.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise (StartError if error.errno == errno.EADDRINUSE else UserError)(
            f"port {port} of {socket.gethostname()}, the coordinator, cannot be used "
            f"({os.strerror(error.errno or 0)}); another job may have it: give another in --coordinator or "
            f"JAX_COORDINATOR_PORT"
        ) from error


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1 << 16)
    except OSError:
        return b""


def _parse_identity(message: bytearray) -> ProcessIdentity | None:
    """Returns the identity in a message; None if the message is not from a process of a job."""
    try:
        found = json.loads(message)
    except ValueError:
        return None
    wanted = {"process_id": int, "processes": int, "host": str, "time": float, "versions": dict}
    good = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in wanted.items())
    return found if good else None


def _send_all(peers: Sequence[socket.socket], answer: Any) -> None:
    """Sends an answer to all, who close first: a port whose server closes first is not free at once."""
    message = json.dumps(answer).encode() + b"\n"
    for peer in peers:
        peer.settimeout(CLOSE_SECONDS)
        try:
            peer.sendall(message)
        except OSError:
            continue
    for peer in peers:
        _receive(peer)
        peer.close()
