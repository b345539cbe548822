"""`erollout launch torchrun`: starts this node's ranks of a multi-node run. The same command is given on each node.

The nodes meet at the gate of the head node (launch/gate.py), then every rank runs `erollout train` with the same configuration,
as launch/local.py starts it on one machine. Light at import: torch is loaded when ranks are started.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from erollout.config import Config, load_config, require_trainable
from erollout.configuration.arguments import add_run_arguments, overrides
from erollout.environment import STORE, loopback_variables, set_variable, variable
from erollout.errors import UserError
from erollout.launch.addresses import address_of, interface_variables
from erollout.launch.meeting import Meeting, digest, find_head, joined, meeting, take_seat
from erollout.launch.parent import require_one_task
from erollout.launch.secret import secret_of


@dataclass(frozen=True, slots=True)
class Node:
    """This node's part in a multi-node run."""

    nodes: int
    ranks: int
    """Ranks per node."""
    meeting: Meeting


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `torchrun` to the commands of `erollout launch`."""
    parser = commands.add_parser("torchrun", help="start this node's ranks of a run; give the same command on each node")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the run")
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="M", help="ranks per node: its GPUs")
    parser.add_argument("--head", metavar="HOST[:PORT]", help="rendezvous node; default of PORT: derived from the run id")
    parser.add_argument(
        "--interface", metavar="NAME", help="network interface of the ranks; default: the one on the route to the head"
    )
    parser.add_argument(
        "--run-id", help="run id, equal on all nodes and different from other runs; default: derived from the command"
    )
    parser.add_argument("--wait", type=int, default=600, metavar="SECONDS", help="time to wait for the other nodes")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="directory for the output of each rank")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    add_run_arguments(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    config = _check(options)
    train = ["train", "--config", options.config, *overrides(options)]
    node = None if options.nodes == 1 else _node(options, train)
    variables = _variables(options.interface, node)
    if options.dry_run:
        print(_describe(node, options.nproc_per_node, variables, train))
        return 0
    for name, value in variables.items():
        set_variable(name, value)
    if node is not None:
        return launch_node(train, node, secret_of(Path(config.train.output_dir)), options.log_dir)
    require_one_task(options.config)
    from erollout.launch.local import launch_local

    return launch_local(train, options.nproc_per_node, options.log_dir, options.interface)


def _variables(chosen: str | None, node: Node | None) -> dict[str, str]:
    """Environment of the ranks. The user's variables win, but a single machine listens beyond itself only with `chosen`."""
    interface = chosen if node is None else node.meeting.interface
    own = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **interface_variables(interface, chosen)}
    found = {name: variable(name) or value for name, value in own.items()}
    return found | (loopback_variables() if interface is None and node is None else {})


def launch_node(arguments: Sequence[str], node: Node, secret: str, log_dir: Path | None = None) -> int:
    """Run `erollout <arguments>` on this node's ranks, together with those of the other nodes, and wait for them.

    Returns the exit status as run_ranks. Raises UserError if the rendezvous fails.
    """
    from torch.distributed import DistError

    from erollout.launch.local import run_ranks
    from erollout.launch.rendezvous import FixedRendezvous, among_nodes

    meeting = node.meeting
    print(f"erollout: node {meeting.address} waits for {node.nodes - 1} others at {meeting.place}", file=sys.stderr, flush=True)
    set_variable(STORE, "")
    try:
        with joined(meeting, secret, node.nodes) as access:
            rendezvous = FixedRendezvous(
                meeting.run_id,
                lambda: among_nodes(access.port, take_seat(meeting, secret, node.nodes), node.nodes, meeting.wait_seconds),
            )
            return run_ranks(arguments, rendezvous, node.ranks, log_dir, meeting.address)
    except DistError as error:
        raise UserError(
            f"the {node.nodes} nodes have lost each other at {meeting.place} ({error}); look at the head's log"
        ) from error


def _check(options: argparse.Namespace) -> Config:
    """Raise UserError for errors in the command line itself."""
    for name in ("nodes", "nproc_per_node", "wait"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} = {getattr(options, name)}; it must be at least 1")
    if options.nodes > 1 and options.head is None:
        raise UserError(
            f"--nodes {options.nodes} needs --head HOST: the rendezvous node, by a name or address that all nodes know"
        )
    if options.head is not None:
        find_head(options.head)  # also where a single node needs none, to try a command for several
    config = load_config(options.config, overrides(options))
    require_trainable(config)
    wanted, ranks = config.parallel.world_size, options.nodes * options.nproc_per_node
    if wanted not in (None, ranks):
        raise UserError(
            f"parallel.world_size = {wanted}, but --nodes {options.nodes} x --nproc-per-node {options.nproc_per_node} "
            f"= {ranks} ranks; unset it or start {wanted}"
        )
    if options.interface is not None:
        address_of(options.interface)
    return config


def _node(options: argparse.Namespace, train: Sequence[str]) -> Node:
    run_id = options.run_id or digest([*train, str(options.nodes), options.head])
    return Node(options.nodes, options.nproc_per_node, meeting(options.head, options.interface, run_id, options.wait))


def _describe(node: Node | None, ranks: int, variables: dict[str, str], train: Sequence[str]) -> str:
    """The output of --dry-run."""
    lines = {"ranks": f"{ranks} on this machine"}
    if node is not None:
        role = "holds the rendezvous store" if node.meeting.is_head else "joins the head"
        lines = {
            "ranks": f"{node.nodes} nodes x {ranks} = {node.nodes * ranks}",
            "this node": f"{node.meeting.address} on {node.meeting.interface or 'an unknown interface'}, {role}",
            "nodes meet at": f"{node.meeting.place}, run {node.meeting.run_id}, for {node.meeting.wait_seconds} s",
        }
    lines["environment"] = " ".join(f"{name}={value}" for name, value in variables.items())
    lines["each rank runs"] = shlex.join(["python", "-m", "erollout.cli", *train])
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
