"""`erollout doctor`: checks of this machine and environment, with a fix for each problem."""

import argparse
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from erollout.config import Config, load_config
from erollout.configuration.arguments import add_overrides
from erollout.doctor.report import Finding, as_json, could_start, meeting_lines, node_lines, page
from erollout.environment import set_default, variable
from erollout.errors import UserError

if TYPE_CHECKING:
    from erollout.doctor.gpus import Gpu


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` to the command line. Its exit status: 0: training could start; 1: it could not."""
    parser = commands.add_parser("doctor", help="check this machine and environment, and report problems")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--node", action="store_true", help="quick checks of a node before a job, one line per finding")
    kinds.add_argument(
        "--collective",
        action="store_true",
        help="check communication with the other nodes of a job; give the same command on each",
    )
    parser.add_argument("--config", help="YAML file: also check the requirements of this run")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="number of idle GPUs that this machine must have")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    meeting = parser.add_argument_group("with --collective")
    meeting.add_argument("--nodes", type=int, metavar="N", help="number of nodes, with one process on each")
    meeting.add_argument("--head", metavar="HOST[:PORT]", help="rendezvous node; default of PORT: derived from the run id")
    meeting.add_argument("--run-id", help="run id, equal on all nodes and different from other runs")
    meeting.add_argument("--interface", metavar="NAME", help="network interface; default: the one on the route to the head")
    meeting.add_argument("--wait", type=int, default=120, metavar="SECONDS", help="time to wait for the other nodes")
    meeting.add_argument("--expect", default="", metavar="NAME,NAME", help="names of the nodes, to report the missing ones")
    meeting.add_argument("--shared", type=Path, metavar="DIRECTORY", help="directory that all nodes must share")
    add_overrides(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.overrides and options.config is None:
        raise UserError(f"{options.overrides[0]}: overrides need --config")
    if options.collective:
        return _meet(options)
    config: Config | None = None
    refused: list[Finding] = []
    try:
        config = load_config(options.config, options.overrides) if options.config else None
    except UserError as error:
        refused.append(Finding("configuration", str(error), "error"))
    findings = [*(_node(config, options.gpus) if options.node else _machine(config, options.gpus)), *refused]
    if options.json:
        print(as_json(_name(), findings))
    else:
        print(node_lines(_name(), findings) if options.node else page(findings))
    return 0 if could_start(findings) else 1


def _name() -> str:
    """This node's name: the scheduler's, by which it can be excluded, else its own."""
    return variable("SLURMD_NODENAME") or socket.gethostname()


def _node(config: Config | None, gpus: int) -> Iterator[Finding]:
    from erollout.doctor import cpu, limits, network, storage, versions
    from erollout.doctor.gpus import check_gpus

    requirements, _ = versions.declared()
    yield versions.check_fingerprint(requirements, None if config is None else repr(config))
    found, trouble = _gpus(are_wanted=gpus > 0)
    yield from [trouble] if trouble else check_gpus(found, gpus)
    yield from cpu.check_cores(len(os.sched_getaffinity(0)), gpus)
    yield cpu.check_bandwidth(cpu.memory_bandwidth(), strict=True)
    yield from storage.check_directory(_output(config))
    yield from storage.check_shared_memory()
    yield from limits.check_limits(network.has_fabric())


def _machine(config: Config | None, gpus: int) -> Iterator[Finding]:
    from erollout.doctor import versions
    from erollout.doctor.kernels import check_kernels

    requirements, python = versions.declared()
    packages = [versions.check_python(python), *versions.check_packages(requirements)]
    yield from packages
    found, trouble = _gpus(are_wanted=True)
    yield from _hardware(found, trouble, gpus)
    yield from _surroundings(config)
    if not could_start(packages):
        yield Finding("kernels", "not checked, nor the configuration: fix the packages first")
        return
    if config is None:
        yield from check_kernels(num_gpus=len(found))
        return
    yield from check_kernels(config.rollout.kernels, config.rollout.dtype, len(found))
    yield from _run_of(config)


def _gpus(are_wanted: bool) -> "tuple[list[Gpu], Finding | None]":
    """The GPUs found, and a problem of the driver, if any."""
    from erollout.doctor.gpus import driver_trouble, find_gpus

    try:
        return find_gpus(), None
    except (OSError, subprocess.SubprocessError) as error:
        return [], driver_trouble(error, are_wanted)


def _hardware(found: "list[Gpu]", trouble: Finding | None, wanted: int) -> Iterator[Finding]:
    from erollout.doctor import cpu
    from erollout.doctor.gpus import check_gpus, check_links

    yield from [trouble] if trouble else check_gpus(found, wanted)
    if len(found) > 1:
        yield check_links()
    yield from cpu.check_cpu()
    yield cpu.check_bandwidth(cpu.memory_bandwidth())


def _surroundings(config: Config | None) -> Iterator[Finding]:
    from erollout.doctor import limits, network, schedulers, storage

    yield from network.check_network()
    yield from schedulers.check_schedulers()
    yield from storage.check_directory(_output(config))
    yield from storage.check_shared_memory()
    yield from limits.check_limits(network.has_fabric())
    yield limits.check_clock()


def _run_of(config: Config) -> Iterator[Finding]:
    """Checks of the run's requirements beyond a working machine."""
    from erollout.doctor.storage import check_store

    store = [check_store(config.tracking, config.train.output_dir)] if config.tracking.enabled else []
    yield from store
    checked = _preflight(config)
    if checked.text not in [finding.text for finding in store]:  # includes a check of the store
        yield checked


def _preflight(config: Config) -> Finding:
    from erollout.training.preflight import preflight

    try:
        preflight(config)
    except UserError as error:
        return Finding("configuration", str(error), "error")
    return Finding("configuration", "model, layouts, tokenizer, data, scorer and paths are valid")


def _output(config: Config | None) -> Path:
    """Directory that the run writes to; without a configuration, the current one."""
    return Path(config.train.output_dir if config else ".")


def _meet(options: argparse.Namespace) -> int:
    missing = [f"--{name}" for name in ("nodes", "head", "run-id") if getattr(options, name.replace("-", "_")) is None]
    if missing:
        raise UserError(f"--collective needs {', '.join(missing)}, equal on all nodes")
    for name in ("nodes", "wait"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} = {getattr(options, name)}; it must be at least 1")
    set_default("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise a node that leaves early causes stack traces on the others
    from erollout.doctor.collective import check_collective
    from erollout.doctor.judgement import Attendance
    from erollout.launch.secret import given_secret

    expected = tuple(filter(None, options.expect.split(",")))
    attendance = Attendance(_name(), options.nodes, expected, options.shared)
    outcome = check_collective(options.head, options.interface, options.run_id, options.wait, attendance, given_secret() or "")
    if options.json:
        others = [Finding(f"node {name}", reason, "error") for name, reason in outcome.others.items()]
        problem = [Finding("nodes", outcome.problem, "error")] if outcome.problem else []
        print(as_json(_name(), [*problem, *others, *outcome.findings]))
    else:
        print(meeting_lines(_name(), outcome.findings, outcome.problem, outcome.others))
    return 0 if could_start(outcome.findings) and not outcome.problem else 1
