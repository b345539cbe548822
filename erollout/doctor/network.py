"""Interfaces, the one that ranks of several nodes would use, InfiniBand and RoCE cards, and free ports."""

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from erollout.doctor.report import Finding
from erollout.environment import variable
from erollout.errors import UserError
from erollout.launch.addresses import address_towards, interface_with, interfaces
from erollout.launch.meeting import FIRST_PORT, NUM_PORTS

_CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_FABRIC = Path("/sys/class/infiniband")
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SOCKETS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ELSEWHERE = "198.51.100.1"
"""An unassigned address (RFC 5737) for finding the default route; nothing is sent there."""
_SLOW_LOOKUP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    address: str
    mbit: int
    """Speed in Mbit/s; 0: unknown."""
    is_card: bool
    """Whether it is a hardware interface, not a virtual one such as a bridge."""

    def __str__(self) -> str:
        return f"{self.name} {self.address}" + (f" ({self.mbit / 1000:g} Gbit/s)" if self.mbit else "")


def found_interfaces() -> list[Interface]:
    """Interfaces that are up and have an IPv4 address."""
    states = psutil.net_if_stats()
    return [
        Interface(name, address, max(states[name].speed, 0), Path(f"/sys/class/net/{name}/device").exists())
        for name, address in interfaces().items()
        if name in states and states[name].isup
    ]


def check_network() -> Iterator[Finding]:
    found = found_interfaces()
    yield Finding("interfaces", ", ".join(map(str, found)) or "none with an IPv4 address")
    yield from check_way_out(way_out(), found)
    for name in _CHOICES:
        yield from check_choice(name, variable(name), {interface.name: interface.address for interface in found})
    yield check_own_name(socket.gethostname())
    yield check_fabric(_FABRIC)
    yield check_ports()


def way_out() -> str | None:
    """The interface of the default route; None: there is none."""
    with suppress(UserError):
        return interface_with(address_towards(_ELSEWHERE))
    return None


def check_way_out(name: str | None, found: list[Interface]) -> Iterator[Finding]:
    """Check which interface ranks of several nodes would use, and whether there is a faster one."""
    chosen = next((interface for interface in found if interface.name == name), None)
    rule = "launchers use the interface on the route to the head, or --interface"
    if chosen is None:
        yield Finding("ranks meet on", f"only this machine: it has no route to other networks; {rule}")
        return
    yield Finding("ranks meet on", f"{chosen.name}, {chosen.address}, on the default route; {rule}")
    faster = [interface for interface in found if interface.is_card and 0 < chosen.mbit < interface.mbit]
    if faster:
        best = max(faster, key=lambda interface: interface.mbit)
        text = f"{best} is faster than {chosen}, which ranks may use"
        yield Finding("interfaces", text, "warning", f"if all nodes have it, give --interface {best.name}")


def check_choice(name: str, chosen: str | None, found: Mapping[str, str]) -> Iterator[Finding]:
    """Check an interface set by the user: gloo takes names, NCCL also prefixes of names, or exclusions (^)."""
    if chosen is None:
        return
    missing = [part for part in chosen.lstrip("=").split(",") if not any(known.startswith(part) for known in found)]
    if missing and not chosen.startswith("^"):
        text = f"{chosen}, and there is no such interface with an address: {', '.join(missing)}"
        yield Finding(name, text, "error", f"set it to one of {', '.join(found) or 'none'}, or unset it")
    else:
        yield Finding(name, chosen)


def check_own_name(host: str) -> Finding:
    """Check name resolution: every rank looks names up at start, and a missing name server costs seconds each time."""
    start = time.monotonic()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    seconds = time.monotonic() - start
    if seconds > _SLOW_LOOKUP_SECONDS:
        text = f"{host} takes {seconds:.0f} s to resolve"
        return Finding("own name", text, "warning", "put it in /etc/hosts, or check the name servers in /etc/resolv.conf")
    if not address:
        return Finding("own name", f"{host} has no address", "warning", "put it in /etc/hosts")
    loopback = "; as --head of several nodes give an address" if address.startswith("127.") else ""
    return Finding("own name", f"{host} resolves to {address}{loopback}")


def check_fabric(root: Path) -> Finding:
    """InfiniBand and RoCE cards listed by the kernel, grouped by state."""
    names: dict[str, list[str]] = {}
    for port in sorted(root.glob("*/ports/*")):
        layer, state, rate = (_read(port / name) for name in ("link_layer", "state", "rate"))
        kind = "RoCE" if layer == "Ethernet" else layer
        text = f"{kind}, {rate}, {state.partition(':')[2].strip().lower() or 'state unknown'}"
        names.setdefault(text, []).append(f"{port.parent.parent.name}:{port.name}")
    text = "; ".join(f"{', '.join(ports)}: {state}" for state, ports in names.items())
    if names and not any(state.endswith(", active") for state in names):
        fix = "check cables and the subnet manager (ibstat); until then NCCL uses sockets"
        return Finding("InfiniBand, RoCE", f"no port is active: {text}", "warning", fix)
    return Finding("InfiniBand, RoCE", text or "none")


def has_fabric(root: Path = _FABRIC) -> bool:
    return any(root.glob("*/ports/*"))


def check_ports() -> Finding:
    """Check ports: ranks of one machine use any free port; nodes meet on one below those of outgoing connections."""
    try:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
    except OSError as error:
        fix = "end processes that hold ports, or widen net.ipv4.ip_local_port_range"
        return Finding("free ports", f"none on localhost ({error.strerror})", "error", fix)
    last = FIRST_PORT + NUM_PORTS - 1
    taken = {port for file in _SOCKETS for port in parse_ports(_read(file)) if FIRST_PORT <= port <= last}
    text = f"{NUM_PORTS - len(taken)} of {FIRST_PORT}-{last}, where nodes meet unless --head names a port"
    lowest = (_read(_PORT_RANGE).split() or ["32768"])[0]
    if int(lowest) <= last:
        fix = f"give --head HOST:PORT, or set net.ipv4.ip_local_port_range to begin above {last}"
        return Finding("free ports", f"{text}; outgoing connections may take them, from {lowest} on", "warning", fix)
    return Finding("free ports", text)


def parse_ports(table: str) -> set[int]:
    """Local ports in a table like /proc/net/tcp."""
    return {int(line.split()[1].rpartition(":")[2], 16) for line in table.splitlines()[1:] if line.strip()}


def _read(file: Path) -> str:
    """Content of a file; empty if it is missing."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
