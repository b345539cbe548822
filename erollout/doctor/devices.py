"""GPUs as nvidia-smi tells of them, the CPU, and how fast memory is. Loads no torch: it takes seconds."""

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from erollout.doctor.report import Finding
from erollout.environment import variable

_COMMAND_SECONDS = 5
_FIELDS = "index,uuid,name,memory.total,memory.used,driver_version"
_IDLE_MIB = 1024
"""The driver itself holds some hundred MiB of a GPU that nobody uses."""
_SHOWN_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_COPY_BYTES = 64 * 2**20
"""More than the caches of most CPUs."""
_COPIES, _COPY_SECONDS = 5, 0.3
"""At least."""
SLOW_BANDWIDTH = 1e9
"""Bytes/s, read and written, below which something is wrong with a node, or it is very busy."""


@dataclass(frozen=True, slots=True)
class Gpu:
    index: str
    uuid: str
    name: str
    total_mib: int
    used_mib: int
    driver: str


def nvidia_smi(*arguments: str) -> str | None:
    """What it prints; None where it is missing. Raises OSError or SubprocessError when it fails or hangs."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
    except FileNotFoundError:
        return None
    return done.stdout


def parse_gpus(text: str) -> list[Gpu]:
    """Of `--query-gpu=<_FIELDS> --format=csv,noheader,nounits`. A figure that the driver does not give ("[N/A]") is 0."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(row[0], row[1], row[2], _whole(row[3]), _whole(row[4]), row[5]) for row in rows]


def parse_holders(text: str) -> dict[str, list[str]]:
    """Processes on each GPU, by its uuid, of `--query-compute-apps=gpu_uuid,pid,process_name --format=csv,noheader`."""
    holders: dict[str, list[str]] = {}
    for line in filter(str.strip, text.splitlines()):
        uuid, pid, name = (cell.strip() for cell in line.split(",", 2))
        holders.setdefault(uuid, []).append(f"pid {pid} {name}")
    return holders


def visible(gpus: Iterable[Gpu], allowed: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves; nvidia-smi shows them all."""
    if allowed is None:
        return list(gpus)
    names = [name.strip() for name in allowed.split(",")]
    return [gpu for gpu in gpus if gpu.index in names or any(name and gpu.uuid.startswith(name) for name in names)]


def check_gpus(wanted: int = 0, strict: bool = False) -> Iterator[Finding]:
    """`wanted`: so many at least must be there. `strict`: one that is in use is an error, else a warning."""
    try:
        table = nvidia_smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits") or ""
        holders = parse_holders(nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader") or "")
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("GPU", f"nvidia-smi fails: {error}", "error", "look at the driver (dmesg), or leave this node out")
        return
    yield from describe_gpus(visible(parse_gpus(table), variable("CUDA_VISIBLE_DEVICES")), holders, wanted, strict)


def describe_gpus(gpus: list[Gpu], holders: dict[str, list[str]], wanted: int, strict: bool) -> Iterator[Finding]:
    if len(gpus) < wanted:
        yield Finding("GPU", f"{len(gpus)} visible, {wanted} wanted", "error", "look at CUDA_VISIBLE_DEVICES and the driver")
    elif not gpus:
        yield Finding("GPU", "none: training runs on the CPU")
    for gpu in gpus:
        facts = f"{gpu.name}, {gpu.total_mib / 1024:.0f} GiB, driver {gpu.driver}"
        if gpu.uuid not in holders and gpu.used_mib <= _IDLE_MIB:
            yield Finding(f"GPU {gpu.index}", f"{facts}, idle")
            continue
        who = ", ".join(holders.get(gpu.uuid, [])) or "a process that can't be seen from here"
        text = f"{facts}, {gpu.used_mib / 1024:.1f} GiB held by {who}"
        yield Finding(f"GPU {gpu.index}", text, "error" if strict else "warning", "end it, or choose other devices")


def check_cpu() -> Finding:
    """Cores are those that this process may use."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    flags, model = _processor()
    threads = variable("OMP_NUM_THREADS")
    known = [flag for flag in _SHOWN_FLAGS if flag in flags]
    text = (
        f"{model}, {cores} cores, load {load:.1f}, {psutil.virtual_memory().available / 2**30:.0f} GiB of memory free, "
        f"OMP_NUM_THREADS {threads or 'not set (ranks get 1)'}\n{' '.join(known) or 'instruction sets unknown'}"
    )
    if threads is not None and (not threads.isdecimal() or int(threads) > cores):
        return Finding("CPU", text, "warning", "set OMP_NUM_THREADS=1: threads of several ranks on few cores slow each other")
    if load > 1.5 * cores:
        return Finding("CPU", text, "warning", "others compute here; the run will be slow until they end")
    return Finding("CPU", text)


def memory_bandwidth() -> float:
    """Bytes/s that one thread reads and writes in a copy: the best of some, as others may compute here."""
    source = np.ones(_COPY_BYTES, np.uint8)
    target = source.copy()  # touched, as page faults would be measured otherwise
    times: list[float] = []
    end = time.perf_counter() + _COPY_SECONDS
    while (start := time.perf_counter()) < end or len(times) < _COPIES:
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * _COPY_BYTES / min(times)


def check_bandwidth(bandwidth: float, strict: bool = False) -> Finding:
    """In bytes/s. `strict`: too little is an error, else a warning."""
    text = f"{bandwidth / 1e9:.1f} GB/s, read and written by one thread"
    if bandwidth < SLOW_BANDWIDTH:
        text += f"; at least {SLOW_BANDWIDTH / 1e9:.1f} is expected"
        fix = "see what else runs here, and whether memory modules fail"
        return Finding("memory bandwidth", text, "error" if strict else "warning", fix)
    return Finding("memory bandwidth", text)


def check_topology() -> Iterator[Finding]:
    """How the GPUs are connected, where there are several."""
    try:
        text = nvidia_smi("topo", "-m")
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("topology", f"nvidia-smi topo fails: {error}", "warning", "look at the driver")
        return
    if text and "GPU1" in text:
        yield Finding("topology", text.partition("Legend")[0].strip())


def _processor() -> tuple[set[str], str]:
    """Instruction sets and model name; empty and the architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set(), platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return set(fields.get("flags", "").split()), fields.get("model name", platform.machine())


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0
