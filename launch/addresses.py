"""Network interfaces and addresses of this node, for the launcher."""

import socket
from contextlib import suppress

import psutil

from erollout.environment import variable
from erollout.errors import UserError


def interfaces() -> dict[str, str]:
    """IPv4 addresses by interface."""
    entries = ((name, entry) for name, found in psutil.net_if_addrs().items() for entry in found)
    return {name: entry.address for name, entry in entries if entry.family == socket.AF_INET}


def address_of(interface: str) -> str:
    known = interfaces()
    if interface not in known:
        raise UserError(f"--interface = {interface} has no IPv4 address on this node; there are {', '.join(known)}")
    return known[interface]


def interface_with(address: str) -> str | None:
    return next((name for name, known in interfaces().items() if known == address), None)


def interface_variables(interface: str | None, chosen: str | None) -> dict[str, str]:
    """Variables that set the interface of gloo and NCCL, unless the user has set them. `chosen`: given on the command line.

    Raises UserError if that contradicts a variable.
    """
    names = {name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface is not None}
    for name in names:
        if chosen is not None and variable(name) not in (None, chosen):
            raise UserError(f"--interface = {chosen}, but {name} = {variable(name)} is set; unset one of them")
    return names


def resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UserError(
            f"--head = {host} can't be resolved here ({error.strerror}); give its IPv4 address, or try on one of the nodes"
        ) from error


def address_towards(head: str) -> str:
    """This node's address on the route to the head. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((head, 1))
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"--head = {head} has no route from here ({error.strerror}); give an address in this network"
        ) from error


def is_here(address: str) -> bool:
    """Whether the address belongs to this machine, which it can then listen on."""
    with socket.socket() as probe, suppress(OSError):
        probe.bind((address, 0))
        return True
    return False
