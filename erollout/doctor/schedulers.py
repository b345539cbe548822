"""Checks of Slurm and Ray, if present."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from erollout.doctor.report import Finding
from erollout.environment import variable

_ANSWER_SECONDS = 5
_SHOWN_PARTITIONS = 8
_RAY_CLUSTER = Path("/tmp/ray/ray_current_cluster")
"""File in which `ray start` stores the address of this machine's cluster."""


def check_schedulers() -> Iterator[Finding]:
    yield check_slurm(shutil.which("sinfo"))
    yield check_ray(variable("RAY_ADDRESS"), _RAY_CLUSTER)


def check_slurm(sinfo: str | None) -> Finding:
    if sinfo is None:
        return Finding("Slurm", "not here")
    try:
        version = _ask(sinfo, "--version").split()[-1]
        partitions = parse_partitions(_ask(sinfo, "--noheader", "--format=%P %F"))
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()[0]
        fix = "is slurmctld running, and slurm.conf the cluster's?"
        return Finding("Slurm", f"is installed, and no cluster answers: {said}", "warning", fix)
    job = variable("SLURM_JOB_ID")
    shown = ", ".join([*partitions[:_SHOWN_PARTITIONS], *(["..."] if len(partitions) > _SHOWN_PARTITIONS else [])])
    return Finding("Slurm", f"{version}{f', job {job}' if job else ''}; nodes idle of all: {shown or 'no partition'}")


def parse_partitions(text: str) -> list[str]:
    """Parse lines `partition allocated/idle/other/total` into idle and total nodes; a star marks the default partition."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return [f"{name} {counts.split('/')[1]}/{counts.split('/')[3]}" for name, counts in rows]


def check_ray(address: str | None, noted: Path) -> Finding:
    """Check Ray. `address`: as set by the user. `noted`: file in which `ray start` stores it."""
    try:
        address = noted.read_text().strip() if address in (None, "auto") else address
    except OSError:
        return Finding("Ray", "no cluster here")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    fix = "start one with `ray start`, or correct or unset RAY_ADDRESS"
    if not host or not port.isdecimal():
        return Finding("Ray", f"RAY_ADDRESS = {address} is no HOST:PORT", "warning", fix)
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        return Finding("Ray", f"no cluster answers at {address} ({error.strerror or error})", "warning", fix)
    return Finding("Ray", f"a cluster answers at {address}")


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True).stdout
