"""Interfaces, the one that gloo and NCCL would take, and free ports."""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from erollout.doctor.report import Finding
from erollout.environment import variable

_CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_FABRIC = Path("/sys/class/infiniband")
_CHOOSE = "where ranks are on several nodes, give `erollout launch torchrun --interface NAME`"

Interfaces = Mapping[str, str]
"""IPv4 address by name, of those that are up."""


def interfaces() -> dict[str, str]:
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in up
    }


def is_loopback(address: str) -> bool:
    return address.startswith("127.")


def check_network() -> Iterator[Finding]:
    found = interfaces()
    listed = ", ".join(f"{name} {address}" for name, address in found.items()) or "none with an IPv4 address"
    fabric = sorted(path.name for path in _FABRIC.iterdir()) if _FABRIC.is_dir() else []
    yield Finding("interfaces", listed + (f"; InfiniBand {', '.join(fabric)}" if fabric else ""))
    for name in _CHOICES:
        yield from check_choice(name, variable(name), found)
    if variable("GLOO_SOCKET_IFNAME") is None:
        yield check_own_name(socket.gethostname(), own_address(), found)
    yield check_ports()


def check_choice(name: str, chosen: str | None, found: Interfaces) -> Iterator[Finding]:
    """What the user has set: gloo takes names, NCCL also beginnings of names, or all but some (^)."""
    if chosen is None:
        return
    missing = [part for part in chosen.lstrip("=").split(",") if not any(known.startswith(part) for known in found)]
    if missing and not chosen.startswith("^"):
        text = f"{chosen}, and there is no such interface with an address: {', '.join(missing)}"
        yield Finding(name, text, "error", f"set it to one of {', '.join(found) or 'none'}, or unset it")
    else:
        yield Finding(name, chosen)


def own_address() -> str | None:
    """What this host's name stands for; None where nothing knows it."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def check_own_name(host: str, address: str | None, found: Interfaces) -> Finding:
    """Gloo listens where the host's own name points to; other nodes don't reach that when it is a loopback address."""
    others = [name for name, known in found.items() if not is_loopback(known)]
    if address is None:
        text = f"gloo would take the loopback interface: the name of this host, {host}, has no address"
    elif is_loopback(address):
        text = f"gloo would take the loopback interface: the name of this host, {host}, stands for {address}"
    else:
        name = next((name for name, known in found.items() if known == address), "an unknown interface")
        return Finding("ranks meet on", f"{name}, {address}")
    if not others:
        return Finding("ranks meet on", f"{text}; enough on this machine, which has no other")
    return Finding("ranks meet on", f"{text}; enough on one machine", "warning", f"{_CHOOSE}: {', '.join(others)}")


def check_ports() -> Finding:
    """The ranks of one machine meet on any free port."""
    try:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            return Finding("free ports", f"yes, as {probe.getsockname()[1]}")
    except OSError as error:
        fix = "end processes that hold ports, or widen net.ipv4.ip_local_port_range"
        return Finding("free ports", f"none on localhost ({error.strerror})", "error", fix)
