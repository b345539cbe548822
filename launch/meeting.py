"""Where the nodes of a run meet: a store on the head, by which they know that they are of the same run.

Light at import: torch is loaded when the store is joined.
"""

import hashlib
import re
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from erollout.errors import UserError
from erollout.launch.network import address_of, address_towards, interface_with, is_here, resolve

if TYPE_CHECKING:
    from torch.distributed import TCPStore

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Derived ports lie below those that Linux gives to outgoing connections (32768 and more)."""
_RUN_KEY = "erollout/run"
_ANSWER_SECONDS = 10
"""For whoever listens at the head's port to say which run it is of."""
_RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Meeting:
    """As this node sees it."""

    run_id: str
    head: str
    """IPv4 address."""
    port: int
    address: str
    """Of this node, towards the head."""
    interface: str | None
    """That has the address; None where none is known to have it."""
    is_head: bool
    wait_seconds: int

    @property
    def place(self) -> str:
        return f"{self.head}:{self.port}"


def meeting(head: str, interface: str | None, run_id: str, wait_seconds: int) -> Meeting:
    """`head`: HOST or HOST:PORT; without PORT it follows from the run id. Raises UserError where the head can't be known."""
    match = re.fullmatch(r"([^:]+)(?::(\d{1,5}))?", head)
    if match is None or not 0 < int(match[2] or 1) < 2**16:
        raise UserError(f"--head = {head}; give HOST or HOST:PORT, with a name or an IPv4 address")
    port = int(match[2]) if match[2] else FIRST_PORT + int(digest([run_id]), 16) % NUM_PORTS
    there = resolve(match[1])
    address = address_towards(there) if interface is None else address_of(interface)
    if address.startswith("127.") and match[1] != "localhost" and not match[1].startswith("127."):
        raise UserError(
            f"--head = {head} is {there} here, where other nodes can't reach it; give the head's address "
            "in their network, or --interface"
        )
    return Meeting(run_id, there, port, address, interface or interface_with(address), is_here(there), wait_seconds)


def digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def join_store(meeting: Meeting) -> "TCPStore | None":
    """The store of the run, on the head; torch's rendezvous in this process then shares it. None where it is elsewhere.

    Several agents may be on the head: the first holds the store. Raises UserError for a head that does not answer in time, or a
    port that something else has taken.
    """
    from torch.distributed import DistError, TCPStore

    end = time.monotonic() + meeting.wait_seconds
    while True:
        try:
            socket.create_connection((meeting.head, meeting.port), timeout=_ANSWER_SECONDS).close()
            _require_same_run(meeting)
            return None
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--head = {meeting.place} can't be reached within {meeting.wait_seconds} s "
                    f"({error.strerror or error}); give the same command there, and let the port through"
                ) from error
        if meeting.is_head:
            with suppress(DistError):  # taken since, by the run's own other agent or by a stranger
                store = TCPStore(meeting.head, meeting.port, is_master=True, multi_tenant=True, wait_for_workers=False)
                store.set(_RUN_KEY, meeting.run_id)
                return store
        time.sleep(_RETRY_SECONDS)


def _require_same_run(meeting: Meeting) -> None:
    """Asked in a thread: torch's client waits without end for a listener that is no store."""
    found: list[str] = []
    asking = threading.Thread(target=_ask_run, args=(meeting, found), daemon=True)
    asking.start()
    asking.join(2 * _ANSWER_SECONDS)
    if found != [meeting.run_id]:
        whose = f"run {found[0]}, and this is {meeting.run_id}" if found else "something else"
        raise UserError(
            f"port {meeting.port} of {meeting.head} is taken by {whose}; "
            "give the same command on each node, or --head HOST:PORT with a free port"
        )


def _ask_run(meeting: Meeting, found: list[str]) -> None:
    """Appends the id of the run whose store this is; nothing where it is none."""
    from torch.distributed import DistError, TCPStore

    with suppress(DistError):
        store = TCPStore(meeting.head, meeting.port, is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS))
        found.append(store.get(_RUN_KEY).decode())
