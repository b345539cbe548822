"""`erollout launch torchrun`: starts this node's ranks of a run of several nodes. The same command is given on each node.

The nodes meet in a store that the head node holds (torch's c10d rendezvous), then every rank is `erollout train` with the same
configuration, as launch/local.py starts it on one machine. Light at import: torch is loaded when ranks are started.
"""

import argparse
import hashlib
import logging
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from erollout.config import load_config
from erollout.environment import set_default, variable
from erollout.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_FIRST_PORT, _NUM_PORTS = 20000, 10000
"""Derived ports lie below those that Linux gives to outgoing connections (32768 and more)."""
_RUN_KEY = "erollout/run"
_ANSWER_SECONDS = 10
"""For whoever listens at the head's port to say which run it is of."""
_RETRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Node:
    """This node's part in a run of several."""

    nodes: int
    ranks: int
    """On each node."""
    run_id: str
    head: str
    """IPv4 address where the nodes meet."""
    port: int
    address: str
    """Of this node, towards the head."""
    interface: str | None
    """That has the address; None where none is known to have it."""
    is_head: bool
    wait_seconds: int


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `torchrun` to the commands of `erollout launch`."""
    parser = commands.add_parser("torchrun", help="start this node's ranks of a run; give the same command on each node")
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="M", help="ranks on each node: its GPUs")
    parser.add_argument("--head", metavar="HOST[:PORT]", help="node where all meet; default of PORT: derived from the run id")
    parser.add_argument("--interface", metavar="NAME", help="network interface of the ranks; default: the one towards the head")
    parser.add_argument("--run-id", help="equal on all nodes, and unlike that of other runs; default: derived from the command")
    parser.add_argument("--wait", type=int, default=600, metavar="SECONDS", help="for the other nodes (default 600)")
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="configuration values that win over the file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    _check(options)
    train = ["train", "--config", options.config, *options.overrides]
    node = None if options.nodes == 1 else _node(options, train)
    variables = _variables(options.interface if node is None else node.interface, chosen=options.interface)
    if options.dry_run:
        print(_describe(node, options.nproc_per_node, variables, train))
        return 0
    for name, value in variables.items():
        set_default(name, value)
    if node is not None:
        return launch_node(train, node)
    from erollout.launch.local import launch_local

    return launch_local(train, options.nproc_per_node)


def launch_node(arguments: Sequence[str], node: Node) -> int:
    """Run `erollout <arguments>` on this node's ranks, together with those of the other nodes, and wait for them.

    Returns the exit status, as launch_local does. Raises UserError when the nodes can't meet.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from erollout.launch.local import _passing_on

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks report their own errors
    place = f"{node.head}:{node.port}"
    print(f"erollout: node {node.address} meets {node.nodes - 1} others at {place}", file=sys.stderr, flush=True)
    store = _join_store(node)
    config = LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=node.ranks,
        rdzv_backend="c10d",
        rdzv_endpoint=place,
        rdzv_configs={"is_host": store is not None, "join_timeout": node.wait_seconds},
        run_id=node.run_id,
        local_addr=node.address,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        with _passing_on() as passed:
            elastic_launch(config, sys.executable)("-m", "erollout.cli", *arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, DistError) as error:
        raise UserError(
            f"the {node.nodes} nodes don't meet at {place} within {node.wait_seconds} s, or have lost it ({error}); "
            "give the same command on each node, and look at the head's log"
        ) from error
    return 128 + signal.SIGTERM if signal.SIGTERM in passed else 0


def _check(options: argparse.Namespace) -> None:
    """What is wrong with the command line alone."""
    for name in ("nodes", "nproc_per_node", "wait"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} = {getattr(options, name)}; it must be at least 1")
    if options.nodes > 1 and options.head is None:
        raise UserError(f"--nodes {options.nodes} needs --head HOST: the node where all meet, by a name or address all know")
    wanted, ranks = load_config(options.config, options.overrides).parallel.world_size, options.nodes * options.nproc_per_node
    if wanted not in (None, ranks):
        raise UserError(
            f"parallel.world_size = {wanted}, but --nodes {options.nodes} x --nproc-per-node {options.nproc_per_node} "
            f"= {ranks} ranks; unset it or start {wanted}"
        )
    if options.interface is not None:
        _address_of(options.interface)


def _node(options: argparse.Namespace, train: Sequence[str]) -> Node:
    match = re.fullmatch(r"([^:]+)(?::(\d{1,5}))?", options.head)
    if match is None or not 0 < int(match[2] or 1) < 2**16:
        raise UserError(f"--head = {options.head}; give HOST or HOST:PORT, with a name or an IPv4 address")
    run_id = options.run_id or _digest([*train, str(options.nodes), options.head])
    port = int(match[2]) if match[2] else _FIRST_PORT + int(_digest([run_id]), 16) % _NUM_PORTS
    head = _resolve(match[1])
    address = _address_towards(head) if options.interface is None else _address_of(options.interface)
    if address.startswith("127.") and match[1] != "localhost" and not match[1].startswith("127."):
        raise UserError(
            f"--head = {options.head} is {head} here, where other nodes can't reach it; give the head's address "
            "in their network, or --interface"
        )
    interface = options.interface or next((name for name, known in _interfaces().items() if known == address), None)
    return Node(options.nodes, options.nproc_per_node, run_id, head, port, address, interface, _is_here(head), options.wait)


def _variables(interface: str | None, chosen: str | None) -> dict[str, str]:
    """What ranks get unless the user has set it. Raises UserError when that contradicts the interface on the command line."""
    names = {name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface is not None}
    for name in names:
        if chosen is not None and variable(name) not in (None, chosen):
            raise UserError(f"--interface = {chosen}, but {name} = {variable(name)} is set; unset one of them")
    return {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **names}


def _join_store(node: Node) -> "TCPStore | None":
    """The store of the run, on the head; torch's rendezvous in this process then shares it. None where it is elsewhere.

    Several agents may be on the head: the first holds the store. Raises UserError for a head that does not answer in time, or a
    port that something else has taken.
    """
    from torch.distributed import DistError, TCPStore

    if node.is_head:
        with suppress(DistError):  # taken: by the run's own other agent, or by a stranger
            store = TCPStore(node.head, node.port, is_master=True, multi_tenant=True, wait_for_workers=False)
            store.set(_RUN_KEY, node.run_id)
            return store
    _wait_for_head(node)
    _require_same_run(node)
    return None


def _wait_for_head(node: Node) -> None:
    end = time.monotonic() + node.wait_seconds
    while True:
        try:
            socket.create_connection((node.head, node.port), timeout=_ANSWER_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--head = {node.head}:{node.port} can't be reached within {node.wait_seconds} s "
                    f"({error.strerror or error}); give the same command there, and let the port through"
                ) from error
        time.sleep(_RETRY_SECONDS)


def _require_same_run(node: Node) -> None:
    """Asked in a thread: torch's client waits without end for a listener that is no store."""
    found: list[str] = []
    asking = threading.Thread(target=_ask_run, args=(node, found), daemon=True)
    asking.start()
    asking.join(2 * _ANSWER_SECONDS)
    if found != [node.run_id]:
        whose = f"run {found[0]}, and this is {node.run_id}" if found else "something else"
        raise UserError(
            f"port {node.port} of {node.head} is taken by {whose}; "
            "give the same command on each node, or --head HOST:PORT with a free port"
        )


def _ask_run(node: Node, found: list[str]) -> None:
    """Appends the id of the run whose store this is; nothing where it is none."""
    from torch.distributed import DistError, TCPStore

    with suppress(DistError):
        store = TCPStore(node.head, node.port, is_master=False, timeout=timedelta(seconds=_ANSWER_SECONDS))
        found.append(store.get(_RUN_KEY).decode())


def _interfaces() -> dict[str, str]:
    """IPv4 addresses by interface."""
    entries = ((name, entry) for name, found in psutil.net_if_addrs().items() for entry in found)
    return {name: entry.address for name, entry in entries if entry.family == socket.AF_INET}


def _address_of(interface: str) -> str:
    known = _interfaces()
    if interface not in known:
        raise UserError(f"--interface = {interface} has no IPv4 address on this node; there are {', '.join(known)}")
    return known[interface]


def _resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"--head = {host} is not known here ({error.strerror}); give its IPv4 address") from error


def _address_towards(head: str) -> str:
    """This node's address on the way to the head. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((head, 1))
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"--head = {head} has no way from here ({error.strerror}); give an address in this network") from error


def _is_here(address: str) -> bool:
    """Only an address of this machine can be listened on."""
    with socket.socket() as probe, suppress(OSError):
        probe.bind((address, 0))
        return True
    return False


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _describe(node: Node | None, ranks: int, variables: dict[str, str], train: Sequence[str]) -> str:
    """The page of --dry-run."""
    values = {name: variable(name) or value for name, value in variables.items()}
    lines = {"ranks": f"{ranks} on this machine"}
    if node is not None:
        role = "holds the store where the nodes meet" if node.is_head else "joins the head"
        lines = {
            "ranks": f"{node.nodes} nodes x {ranks} = {node.nodes * ranks}",
            "this node": f"{node.address} on {node.interface or 'an unknown interface'}, {role}",
            "nodes meet at": f"{node.head}:{node.port}, run {node.run_id}, for {node.wait_seconds} s",
        }
    lines["environment"] = " ".join(f"{name}={value}" for name, value in values.items())
    lines["each rank runs"] = shlex.join(["python", "-m", "erollout.cli", *train])
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
