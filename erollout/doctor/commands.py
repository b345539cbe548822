"""`erollout doctor`: what this machine and environment are like, what is wrong with them, and how to mend it."""

import argparse
import socket
from collections.abc import Iterator
from pathlib import Path

from erollout.config import Config, load_config
from erollout.doctor.report import Finding, as_json, could_start, node_lines, page
from erollout.errors import UserError


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` to the command line. Its exit status: 0 training could start, 1 it could not."""
    parser = commands.add_parser("doctor", help="look at this machine and environment, and say what is wrong")
    parser.add_argument("--config", help="YAML file: also check what this run needs")
    parser.add_argument("--node", action="store_true", help="the quick checks of a node before a job, one line for each")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="this machine must have so many GPUs")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="configuration values that win over the file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.overrides and options.config is None:
        raise UserError(f"{options.overrides[0]}: overrides need --config")
    config: Config | None = None
    findings: list[Finding] = []
    try:
        config = load_config(options.config, options.overrides) if options.config else None
    except UserError as error:
        findings.append(Finding("configuration", str(error), "error"))
    findings += _node(config, options.gpus) if options.node else _machine(config, options.gpus)
    host = socket.gethostname()
    if options.json:
        print(as_json(host, findings))
    else:
        print(node_lines(host, findings) if options.node else page(findings))
    return 0 if could_start(findings) else 1


def _node(config: Config | None, gpus: int) -> Iterator[Finding]:
    from erollout.doctor import devices, storage, versions

    requirements, _ = versions.declared()
    yield versions.check_fingerprint(requirements, None if config is None else repr(config))
    yield from devices.check_gpus(gpus, strict=True)
    yield devices.check_bandwidth(devices.memory_bandwidth(), strict=True)
    yield from storage.check_directory(_output(config))
    yield from storage.check_shared_memory()


def _machine(config: Config | None, gpus: int) -> Iterator[Finding]:
    from erollout.doctor import devices, network, storage, versions
    from erollout.doctor.kernels import check_kernels

    requirements, python = versions.declared()
    packages = [versions.check_python(python), *versions.check_packages(requirements)]
    yield from packages
    found = list(devices.check_gpus(gpus))
    yield from found
    yield from devices.check_topology()
    yield devices.check_cpu()
    yield devices.check_bandwidth(devices.memory_bandwidth())
    yield from network.check_network()
    yield from storage.check_directory(_output(config))
    yield from storage.check_shared_memory()
    if not could_start(packages):
        yield Finding("kernels", "not looked at, nor the configuration: the packages come first")
        return
    num_gpus = sum(finding.topic.startswith("GPU ") for finding in found)
    if config is None:
        yield from check_kernels(num_gpus=num_gpus)
        return
    yield from check_kernels(config.rollout.kernels, config.rollout.dtype, num_gpus)
    store = [storage.check_store(config.tracking.uri)] if config.tracking.enabled else []
    yield from store
    checked = _preflight(config)
    if checked.text not in [finding.text for finding in store]:  # it looks at the store too
        yield checked


def _preflight(config: Config) -> Finding:
    from erollout.preflight import preflight

    try:
        preflight(config)
    except UserError as error:
        return Finding("configuration", str(error), "error")
    return Finding("configuration", "model, layouts, tokenizer, data, scorer and paths are as a run needs them")


def _output(config: Config | None) -> Path:
    """Where a run writes; without a configuration, here."""
    return Path(config.train.output_dir if config else ".")
