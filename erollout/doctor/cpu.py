"""Checks of processor, memory, memory limit and memory bandwidth."""

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from erollout.doctor.report import Finding
from erollout.environment import variable

_SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_COPY_BYTES = 64 * 2**20
"""Size of the copied block, larger than the caches of most CPUs."""
_COPIES, _COPY_SECONDS = 5, 0.3
"""Least number of copies and least total seconds."""
SLOW_BANDWIDTH = 1e9
"""Bytes/s, read and written, below which a node counts as faulty."""


def check_cpu() -> Iterator[Finding]:
    """Check the CPU. Cores are those that this process may use."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    flags, model = processor()
    known = [flag for flag in _SHOWN_FLAGS if flag in flags]
    threads = variable("OMP_NUM_THREADS")
    text = f"{model}, {cores} cores, load {load:.1f}, OMP_NUM_THREADS {threads or 'not set (ranks get 1)'}"
    yield Finding("CPU", f"{text}\n{' '.join(known) or 'instruction sets unknown'}")
    yield Finding("memory", _memory())
    if threads is not None and (not threads.isdecimal() or not 0 < int(threads) <= cores):
        fix = "set OMP_NUM_THREADS=1: threads of several ranks on few cores slow each other"
        yield Finding("OMP_NUM_THREADS", f"{threads}, on {cores} cores", "warning", fix)
    machine = os.cpu_count() or cores
    if load > 1.5 * machine:
        text = f"{load:.1f} on {machine} cores: other processes compute here"
        yield Finding("load", text, "warning", "the run will be slow until they end")


def check_cores(cores: int, ranks: int) -> Iterator[Finding]:
    """Check the number of usable cores for `ranks` ranks with GPUs."""
    if cores < ranks:
        fix = "request more from the scheduler (cpus_per_task of the site file): at least one core per rank"
        yield Finding("cores", f"{cores} usable by {ranks} ranks", "error", fix)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[set[str], str]:
    """Instruction sets and model name; if unknown, no instruction sets and the architecture."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set(), platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return set(fields.get("flags", "").split()), fields.get("model name", platform.machine())


def _memory() -> str:
    state, limit = psutil.virtual_memory(), memory_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    text = f"{state.available / 2**30:.0f} GiB free of {state.total / 2**30:.0f}"
    return text if limit is None or limit >= state.total else f"{text}, of which this job may use {limit / 2**30:.1f}"


def memory_limit(own: Path, root: Path) -> int | None:
    """Memory limit in bytes from the control groups of this process, as set by a scheduler; None: no limit."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in lines:
        tree, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        if controllers in ("", "memory"):
            group = tree / path.strip("/")
            limits += [_limit(folder / name) for folder in (group, *group.parents) if folder.is_relative_to(tree)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def memory_bandwidth() -> float:
    """Bytes/s that one thread reads and writes in a copy: the best of several, in the thread's CPU time."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = source.copy()  # touched first, so that page faults are not measured
    times: list[float] = []
    end = time.perf_counter() + _COPY_SECONDS
    while time.perf_counter() < end or len(times) < _COPIES:
        start = time.thread_time()  # excludes time in which other processes have the core
        np.copyto(target, source)
        times.append(time.thread_time() - start)
    return 2 * _COPY_BYTES / min(times)


def check_bandwidth(bandwidth: float, strict: bool = False) -> Finding:
    """Check a bandwidth in bytes/s. `strict`: too little is an error instead of a warning."""
    text = f"{bandwidth / 1e9:.1f} GB/s, read and written by one thread"
    if bandwidth < SLOW_BANDWIDTH:
        text += f"; at least {SLOW_BANDWIDTH / 1e9:.1f} is expected"
        return Finding("memory bandwidth", text, "error" if strict else "warning", "see whether memory modules fail")
    return Finding("memory bandwidth", text)
