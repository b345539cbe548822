"""Rendezvous of a run's nodes: a gate on the head, with a store behind it, for nodes that know the run's secret.

Light at import: torch is loaded when the store is joined.
"""

import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erollout.errors import UserError
from erollout.launch.addresses import address_of, address_towards, interface_with, is_here, resolve
from erollout.launch.gate import BACKLOG, Gate, GateEntry, Stranger, ask, read_line

if TYPE_CHECKING:
    from torch.distributed import TCPStore

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Range of derived ports, below those of outgoing connections on Linux (from 32768)."""
_RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Meeting:
    """The rendezvous as seen from this node."""

    run_id: str
    head: str
    """IPv4 address of the head."""
    port: int
    address: str
    """Address of this node on the route to the head."""
    interface: str | None
    """Interface with this address; None: unknown."""
    is_head: bool
    wait_seconds: int

    @property
    def place(self) -> str:
        return f"{self.head}:{self.port}"


def meeting(head: str, interface: str | None, run_id: str, wait_seconds: int) -> Meeting:
    """The rendezvous at `head`, HOST or HOST:PORT; the default port is derived from the run id. Raises UserError."""
    host, there, chosen = find_head(head)
    port = chosen or FIRST_PORT + int(digest([run_id]), 16) % NUM_PORTS
    address = address_towards(there) if interface is None else address_of(interface)
    if address.startswith("127.") and host != "localhost" and not host.startswith("127."):
        raise UserError(
            f"--head = {head} is {there} here, where other nodes can't reach it; give the head's address "
            "in their network, or --interface"
        )
    return Meeting(run_id, there, port, address, interface or interface_with(address), is_here(there), wait_seconds)


def find_head(head: str) -> tuple[str, str, int | None]:
    """Host as given, its IPv4 address and the port, if given. Raises UserError if the host can't be resolved."""
    match = re.fullmatch(r"([^:]+)(?::(\d{1,5}))?", head)
    if match is None or not 0 < int(match[2] or 1) < 2**16:
        raise UserError(f"--head = {head}; give HOST or HOST:PORT, with a name or an IPv4 address")
    return match[1], resolve(match[1]), int(match[2]) if match[2] else None


def digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Access:
    """This node's access to the run's store."""

    port: int
    """Loopback port of the store."""
    holds: bool
    """Whether the store is in this process."""


@contextmanager
def joined(meeting: Meeting, secret: str, nodes: int) -> Iterator[Access]:
    """Context with access to the run's store.

    There may be several agents on the head, of which the first holds the store. Raises UserError if the head does not answer in
    time or something else has taken the port.
    """
    end = time.monotonic() + meeting.wait_seconds
    while True:
        try:
            ask((meeting.head, meeting.port), meeting.run_id, secret, "nothing").close()
            break
        except Stranger as stranger:
            raise _taken(meeting, stranger) from stranger
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--head = {meeting.place} can't be reached within {meeting.wait_seconds} s "
                    f"({error.strerror or error}); give the same command there and let the port through, "
                    "or give --head HOST:PORT with a port that nothing else has"
                ) from error
        if meeting.is_head and (opened := _open_gate(meeting, secret, nodes)) is not None:
            store, gate = opened
            try:
                yield Access(store.port, holds=True)
            finally:
                gate.close()
            return
        time.sleep(_RETRY_SECONDS)
    entry = GateEntry((meeting.head, meeting.port), meeting.run_id, secret)
    try:
        yield Access(entry.port, holds=False)
    finally:
        entry.close()


def take_seat(meeting: Meeting, secret: str, nodes: int) -> int:
    """This node's number, once all nodes have arrived. Raises UserError if they don't in time, or if too many do."""
    try:
        with ask((meeting.head, meeting.port), meeting.run_id, secret, f"seat {meeting.address}") as connection:
            connection.settimeout(meeting.wait_seconds)
            answer = read_line(connection)
    except Stranger as stranger:
        raise _taken(meeting, stranger) from stranger
    except OSError as error:
        raise UserError(
            f"the {nodes} nodes don't meet at {meeting.place} within {meeting.wait_seconds} s ({error}); "
            "give the same command on each node"
        ) from error
    if not answer.startswith("{"):
        why = f"there are already {nodes} nodes" if answer else "it has closed the connection"
        raise UserError(f"the head {meeting.place} assigns this node no number: {why}; see the output of the other nodes")
    return int(json.loads(answer)["node"])


def _open_gate(meeting: Meeting, secret: str, nodes: int) -> "tuple[TCPStore, Gate] | None":
    """Open the gate with the store. Returns None if the port has been taken, by another agent of the run or by a stranger."""
    from torch.distributed import TCPStore

    own = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    port = own.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=own.detach())
    try:
        listener = socket.create_server((meeting.head, meeting.port), backlog=BACKLOG)
    except OSError:
        return None
    return store, Gate(listener, meeting.run_id, secret, nodes, port)


def _taken(meeting: Meeting, stranger: Stranger) -> UserError:
    return UserError(
        f"port {meeting.port} of {meeting.head} is taken by {stranger}; "
        "give the same command on each node, or --head HOST:PORT with a free port"
    )
