"""Resource limits of this process, which its children inherit, and clock synchronisation."""

import ctypes
import resource
from collections.abc import Iterator

from erollout.doctor.report import Finding

_LEAST = {"open files": (resource.RLIMIT_NOFILE, 4096, "-n"), "processes": (resource.RLIMIT_NPROC, 4096, "-u")}
"""Least limits: ranks have connections to all others and a thread per worker; Debian's limit of 1024 files is soon reached."""
_WHERE = "in the shell that starts or submits the run (Slurm passes its limits on), or in /etc/security/limits.d"
_CLOCK_ERROR = 5
_TIMEX_BYTES = 256
"""Buffer size, at least that of the kernel's struct timex."""


def check_limits(has_fabric: bool) -> Iterator[Finding]:
    """Check the limits. `has_fabric`: there are InfiniBand or RoCE cards, whose memory must be locked."""
    values = {name: resource.getrlimit(limit)[0] for name, (limit, _, _) in _LEAST.items()}
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    yield from describe_limits(values, locked, has_fabric)


def describe_limits(values: dict[str, int], locked: int, has_fabric: bool) -> Iterator[Finding]:
    """Findings on limits; `locked` in bytes."""
    memory = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB"
    yield Finding(
        "limits", ", ".join([*(f"{name} {_shown(value)}" for name, value in values.items()), f"locked memory {memory}"])
    )
    for name, (_, least, option) in _LEAST.items():
        if values[name] != resource.RLIM_INFINITY and values[name] < least:
            yield Finding(name, f"{values[name]} are allowed", "warning", f"ulimit {option} 65536, {_WHERE}")
    if has_fabric and locked != resource.RLIM_INFINITY:
        text = f"{memory} may be locked: NCCL locks its buffers for InfiniBand and RoCE"
        yield Finding("locked memory", text, "warning", f"ulimit -l unlimited, {_WHERE}")


def check_clock() -> Finding:
    """Check whether the kernel's clock is synchronised to a time server. Changes nothing."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state == _CLOCK_ERROR:
        fix = "start chronyd or systemd-timesyncd: nodes use their clocks to tell how long another one is silent"
        return Finding("clock", "not synchronised to a time server", "warning", fix)
    return Finding("clock", "synchronised to a time server" if state >= 0 else "not known")


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
