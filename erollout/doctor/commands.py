"""`erollout doctor`: what this machine and environment are like, what is wrong with them, and how to mend it."""

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
    """Add `doctor` to the command line. Its exit status: 0 training could start, 1 it could not."""
    parser = commands.add_parser("doctor", help="look at this machine and environment, and say what is wrong")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--node", action="store_true", help="the quick checks of a node before a job, one line for each")
    kinds.add_argument("--collective", action="store_true", help="meet the other nodes of a job; give the same command on each")
    parser.add_argument("--config", help="YAML file: also check what this run needs")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="this machine must have so many GPUs, idle")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    meeting = parser.add_argument_group("with --collective")
    meeting.add_argument("--nodes", type=int, metavar="N", help="so many nodes, one process on each")
    meeting.add_argument("--head", metavar="HOST[:PORT]", help="node where all meet; default of PORT: derived from the run id")
    meeting.add_argument("--run-id", help="equal on all nodes, and unlike that of other runs")
    meeting.add_argument("--interface", metavar="NAME", help="network interface; default: the one towards the head")
    meeting.add_argument("--wait", type=int, default=120, metavar="SECONDS", help="for the other nodes")
    meeting.add_argument("--expect", default="", metavar="NAME,NAME", help="the nodes' names, to say who does not come")
    meeting.add_argument("--shared", type=Path, metavar="DIRECTORY", help="that all nodes must see")
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
    """Of this node: the scheduler's, by which it can be left out, else its own."""
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
        yield Finding("kernels", "not looked at, nor the configuration: the packages come first")
        return
    if config is None:
        yield from check_kernels(num_gpus=len(found))
        return
    yield from check_kernels(config.rollout.kernels, config.rollout.dtype, len(found))
    yield from _run_of(config)


def _gpus(are_wanted: bool) -> "tuple[list[Gpu], Finding | None]":
    """Those that are there, and what is wrong with the driver."""
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
    """What this run needs beyond a machine that is fit."""
    from erollout.doctor.storage import check_store

    store = [check_store(config.tracking, config.train.output_dir)] if config.tracking.enabled else []
    yield from store
    checked = _preflight(config)
    if checked.text not in [finding.text for finding in store]:  # it looks at the store too
        yield checked


def _preflight(config: Config) -> Finding:
    from erollout.train.preflight import preflight

    try:
        preflight(config)
    except UserError as error:
        return Finding("configuration", str(error), "error")
    return Finding("configuration", "model, layouts, tokenizer, data, scorer and paths are as a run needs them")


def _output(config: Config | None) -> Path:
    """Where a run writes; without a configuration, here."""
    return Path(config.train.output_dir if config else ".")


def _meet(options: argparse.Namespace) -> int:
    missing = [f"--{name}" for name in ("nodes", "head", "run-id") if getattr(options, name.replace("-", "_")) is None]
    if missing:
        raise UserError(f"--collective needs {', '.join(missing)}, equal on all nodes")
    for name in ("nodes", "wait"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} = {getattr(options, name)}; it must be at least 1")
    set_default("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a node that leaves early shows as stack traces of the others
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
