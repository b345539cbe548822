"""Limits of this process, which those that it starts inherit, and whether its clock is kept."""

import ctypes
import resource
from collections.abc import Iterator

from erollout.doctor.report import Finding

_LEAST = {"open files": (resource.RLIMIT_NOFILE, 4096, "-n"), "processes": (resource.RLIMIT_NPROC, 4096, "-u")}
"""Ranks hold a connection to every other one and a thread for each worker; Debian's own limit of 1024 files is soon reached."""
_WHERE = "in the shell that starts or submits the run (Slurm passes its limits on), or in /etc/security/limits.d"
_CLOCK_ERROR = 5
_TIMEX_BYTES = 256
"""At least the size of the kernel's struct timex."""


def check_limits(has_fabric: bool) -> Iterator[Finding]:
    """`has_fabric`: there are InfiniBand or RoCE cards, whose memory must be locked."""
    values = {name: resource.getrlimit(limit)[0] for name, (limit, _, _) in _LEAST.items()}
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    yield from describe_limits(values, locked, has_fabric)


def describe_limits(values: dict[str, int], locked: int, has_fabric: bool) -> Iterator[Finding]:
    """`locked` in bytes."""
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
    """Whether the kernel's clock is kept by a time server, as it says itself. Changes nothing."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state == _CLOCK_ERROR:
        fix = "start chronyd or systemd-timesyncd: nodes tell by their clocks since when another one is silent"
        return Finding("clock", "not kept by a time server, says the kernel", "warning", fix)
    return Finding("clock", "kept by a time server" if state >= 0 else "not known")


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
