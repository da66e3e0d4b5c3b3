"""The processes of a job meet at the coordinator's port, before jax uses it, and exchange cards.

jax ends a process without an exception where the coordinator or a peer is missing. Here that is a sentence
that names what is missing, on every process, within a limit.
"""

import errno
import ipaddress
import json
import os
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shardtrain.errors import StartError, UserError
from shardtrain.launch.cluster import Cluster
from shardtrain.launch.identity import ProcessIdentity

NAME_LIMIT = 10.0
"""Seconds until a name that does not resolve is called wrong. In Kubernetes names appear with their pods."""

LONGEST = 1 << 20
"""Bytes of a message beyond which it is from someone else."""

FAREWELL = 5.0
"""Seconds that a process has to take the answer of process 0, and to close."""

PAUSE = 0.2
"""Seconds between two attempts to connect."""

DAY = 86400.0
"""Seconds that processes wait for each other at most; sockets cannot wait for ever."""


def meet(cluster: Cluster, card: ProcessIdentity, limit: float) -> list[ProcessIdentity]:
    """Waits until all processes of the job are there; gives each the cards of all.

    Args:
        cluster: the place of this process.
        card: of this process; JSON must be able to hold it.
        limit: seconds to wait.

    Returns:
        The cards in the order of the processes. Those of others have `"skew"`, by how many seconds their
        clock is ahead of that of process 0, as far as a message's travel lets it be seen.

    Raises:
        StartError: who or what is missing when the limit is over, or in the way; a new start may succeed.
        UserError: a name, number or address that is wrong and stays so.
    """
    end = time.monotonic() + limit
    in_kubernetes = cluster.scheduler == "Kubernetes"  # whose names appear with their pods
    name_end = end if in_kubernetes else min(end, time.monotonic() + NAME_LIMIT)
    with naming(cluster):
        host, port = split_address(cluster.coordinator)
        try:
            address = resolve(host, name_end)
        except UserError as error:
            if cluster.source and not in_kubernetes:  # someone wrote it; a scheduler's names are right
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
            connection = _connected(cluster, here, address, port, limit, end)
    if cluster.process_id == 0:
        return _gather(cluster, card, port, limit, end)
    return _report(cluster, card, connection, here, limit, end)


def refuse_endless(name: str, limit: float) -> None:
    """Refuses a limit of waiting that is none.

    Example:
        >>> refuse_endless("--start-limit", 1e9)
        Traceback (most recent call last):
        shardtrain.errors.UserError: --start-limit 1e+09: use seconds above 0, and 86400 (a day) at most
    """
    if not 0 < limit <= DAY:
        raise UserError(f"{name} {limit:g}: use seconds above 0, and {DAY:.0f} (a day) at most")


@contextmanager
def naming(cluster: Cluster | None) -> Iterator[None]:
    """Says of what is wrong with the coordinator's address which flag or variable gave it."""
    try:
        yield
    except UserError as error:
        if cluster is None or not cluster.given:
            raise
        raise type(error)(f"{cluster.given}: {error}") from error


def split_address(address: str) -> tuple[str, int]:
    """Reads `host:port`.

    Raises:
        UserError: anything else.

    Example:
        >>> split_address("node1:62000")
        ('node1', 62000)
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{address!r} is no address; write HOST:PORT of process 0, such as node1:62000")
    return host.strip("[]"), int(port)


def resolve(host: str, end: float) -> str:
    """The address of a host; a name that does not resolve is asked for again until `end`.

    Raises:
        UserError: a name that has no address.
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
        time.sleep(PAUSE)


def _gather(
    cluster: Cluster, card: ProcessIdentity, port: int, limit: float, end: float
) -> list[ProcessIdentity]:
    """What process 0 does: collects the cards of all others, then sends the whole list to each."""
    cards: dict[int, ProcessIdentity] = {0: card | {"skew": 0.0}}
    with listen(port) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        peers: dict[socket.socket, bytearray] = {}
        who: dict[socket.socket, int] = {}
        try:
            while len(cards) < cluster.processes and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fileobj is server:
                        peer, _ = server.accept()
                        selector.register(peer, selectors.EVENT_READ)
                        peers[peer] = bytearray()
                        continue
                    peer = key.fileobj  # type: ignore[assignment]
                    data = _received(peer)
                    peers[peer] += data
                    if not data or len(peers[peer]) > LONGEST:
                        cards.pop(who.pop(peer, -1), None)
                        selector.unregister(peer)
                        del peers[peer]
                        peer.close()
                    elif peers[peer].endswith(b"\n") and (found := _card(peers[peer])):
                        rank = who[peer] = found.pop("process_id")
                        _refuse_impostor(cluster, cards, rank, found)
                        cards[rank] = found | {"skew": found["time"] - time.time()}
            missing = sorted(set(range(cluster.processes)) - set(cards))
            if missing:
                raise StartError(
                    f"of {cluster.processes} processes {len(missing)} did not come to process 0 at "
                    f"{cluster.coordinator} within {limit:g} s: {', '.join(map(str, missing))}; see what "
                    f"they say, and whether their hosts reach this port"
                )
            answer: Any = [cards[rank] for rank in range(cluster.processes)]
        except UserError as error:
            _send_all(peers, {"error": str(error), "may_pass": isinstance(error, StartError)})
            raise
        server.close()  # before anyone who has the answer comes again
        _send_all(peers, answer)
        return answer


def _refuse_impostor(
    cluster: Cluster, cards: dict[int, ProcessIdentity], rank: int, card: ProcessIdentity
) -> None:
    if (processes := card.pop("processes")) != cluster.processes or not 0 <= rank < processes:
        raise UserError(
            f"process {rank} on {card['host']} was told of {processes} processes, process 0 of "
            f"{cluster.processes}; give all the same --processes"
        )
    if rank in cards:
        raise UserError(
            f"there are two processes with the number {rank}, on {cards[rank]['host']} and on "
            f"{card['host']}; give each its own --process-id"
        )


def _report(
    cluster: Cluster, card: ProcessIdentity, connection: socket.socket, here: str, limit: float, end: float
) -> list[ProcessIdentity]:
    """What the others do: send their card to process 0, and wait for those of all."""
    with connection as server:
        message = card | {
            "process_id": cluster.process_id,
            "processes": cluster.processes,
            "time": time.time(),
        }
        answer = bytearray()
        try:
            server.sendall(json.dumps(message).encode() + b"\n")
            # Process 0 may have started later than this one, and says who is missing when its own limit ends.
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
        cards = json.loads(answer)
    except ValueError as error:
        raise StartError(
            f"{here}: what answers at {cluster.coordinator} is no process of this job; name another port"
        ) from error
    if "error" in cards:
        raise (StartError if cards["may_pass"] else UserError)(cards["error"])
    return cards


def _connected(
    cluster: Cluster, here: str, address: str, port: int, limit: float, end: float
) -> socket.socket:
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
        time.sleep(PAUSE)


def refuse_elsewhere(host: str, address: str) -> None:
    """Refuses a coordinator that is another host than this one, which is to be it.

    Whoever gives `JAX_COORDINATOR_BIND_ADDRESS` knows better (a router in between).

    Raises:
        UserError: an address that this host does not have.
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
    """A server on all addresses of this host.

    Raises:
        StartError: a port that is taken.
        UserError: one that is not allowed.
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


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1 << 16)
    except OSError:
        return b""


def _card(message: bytearray) -> ProcessIdentity | None:
    """The card in a message, None in one of someone else's."""
    try:
        card = json.loads(message)
    except ValueError:
        return None
    wanted = {"process_id": int, "processes": int, "host": str, "time": float, "versions": dict}
    good = isinstance(card, dict) and all(isinstance(card.get(key), kind) for key, kind in wanted.items())
    return card if good else None


def _send_all(peers: dict[socket.socket, bytearray], answer: Any) -> None:
    """Sends to all, and lets them close first: a port whose server closed first is not free at once."""
    message = json.dumps(answer).encode() + b"\n"
    for peer in peers:
        peer.settimeout(FAREWELL)
        try:
            peer.sendall(message)
        except OSError:
            continue
    for peer in peers:
        _received(peer)
        peer.close()
