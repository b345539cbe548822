"""`erollout launch ray`: starts the ranks of a run on an existing Ray cluster, and restarts them when a node dies.

One actor per node (launch/ray_agent.py) starts that node's ranks with `erollout launch torchrun`, as by hand. This process
waits, forwards signals, and decides from the verdict file and the checkpoints whether to restart the run.
"""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from erollout.config import load_config, require_trainable
from erollout.configuration.arguments import add_run_arguments, overrides
from erollout.environment import variable
from erollout.errors import UserError
from erollout.launch.ray_job import RayJob, rank_variables
from erollout.launch.run_directory import RunDirectory
from erollout.parallel.layout import layouts
from erollout.schedulers.ray_cluster import join_cluster

_OPTION = "erollout launch ray"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ray` to the commands of `erollout launch`."""
    parser = commands.add_parser("ray", help="run on nodes of an existing Ray cluster, with restarts when a node dies")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the run")
    parser.add_argument("--ranks-per-node", type=int, required=True, metavar="M", help="ranks per node: its GPUs")
    parser.add_argument(
        "--address",
        default="auto",
        metavar="HOST:PORT",
        help="HOST:PORT of the cluster's head; default: RAY_ADDRESS, else the cluster of this machine",
    )
    parser.add_argument(
        "--gpus-per-rank",
        type=int,
        metavar="G",
        help="GPUs that Ray reserves per rank; default: 1 if the cluster has GPUs, else 0",
    )
    parser.add_argument("--cpus-per-rank", type=int, default=1, metavar="C", help="CPUs that Ray reserves per rank")
    parser.add_argument(
        "--max-restarts", type=int, default=20, metavar="K", help="number of restarts after which the run fails"
    )
    parser.add_argument("--wait", type=int, default=600, metavar="SECONDS", help="time to wait for free nodes")
    parser.add_argument("--skip-checks", action="store_true", help="skip the node checks before each start")
    parser.add_argument(
        "--interface", metavar="NAME", help="network interface of the ranks; default: the one on the route to the head"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be reserved and started")
    add_run_arguments(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    job = _job(options)
    if options.dry_run:
        print(_describe(job, options.address))
        return 0
    cluster = join_cluster(options.address, _OPTION)
    from erollout.launch.ray_driver import drive

    return drive(job, cluster)


def _job(options: argparse.Namespace) -> RayJob:
    """The job of a command line. Raises UserError for an impossible one."""
    least = {"nodes": 1, "ranks_per_node": 1, "cpus_per_rank": 0, "gpus_per_rank": 0, "max_restarts": 0, "wait": 1}
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} = {value}; it must be at least {minimum}")
    if options.cpus_per_rank == 0 and not options.gpus_per_rank:
        raise UserError("--cpus-per-rank = 0 needs --gpus-per-rank: ranks must reserve something on a node")
    config = load_config(options.config, overrides(options))
    require_trainable(config)
    wanted, ranks = config.parallel.world_size, options.nodes * options.ranks_per_node
    if wanted not in (None, ranks):
        raise UserError(
            f"parallel.world_size = {wanted}, but --nodes {options.nodes} x --ranks-per-node {options.ranks_per_node} "
            f"= {ranks} ranks; unset it or start {wanted}"
        )
    layouts(config.parallel, config.rollout, ranks)
    return RayJob(
        name=f"ray-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        nodes=options.nodes,
        ranks=options.ranks_per_node,
        cpus=options.cpus_per_rank,
        gpus=options.gpus_per_rank,
        wait_seconds=options.wait,
        max_restarts=options.max_restarts,
        folder=str(Path.cwd()),
        checks=not options.skip_checks,
        interface=options.interface,
        run=("--config", str(Path(options.config).absolute()), *overrides(options)),
        directory=RunDirectory(Path(config.train.output_dir).absolute()),
        checkpoints=config.checkpoint_directory,
    )


def _describe(job: RayJob, address: str) -> str:
    """The output of --dry-run."""
    gpus = "1 per rank if the cluster has GPUs" if job.gpus is None else f"{job.ranks * job.gpus}"
    cluster = address if address != "auto" else variable("RAY_ADDRESS") or "that this machine is a node of"
    environment = {name: value for name, value in rank_variables(cluster).items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    lines = {
        "Ray cluster": cluster,
        "ranks": f"{job.nodes} nodes x {job.ranks} = {job.nodes * job.ranks}",
        "each node has free": f"CPU {job.ranks * job.cpus}, GPU {gpus}, within {job.wait_seconds} s",
        "restarts": f"at most {job.max_restarts}",
        "run directory": str(job.directory.path),
        "logs": str(job.logs(1)),
        "environment": " ".join(f"{name}={value}" for name, value in environment.items()),
        "each node runs": shlex.join(["python", "-m", "erollout.cli", *job.launcher(1, "FIRST_NODE:FREE_PORT")]),
        "in": job.folder,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
