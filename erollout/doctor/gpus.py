"""GPUs and the links between them, from nvidia-smi. Does not load torch."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from erollout.doctor.report import Finding
from erollout.environment import variable

_COMMAND_SECONDS = 30
"""Time limit of nvidia-smi: a driver that is not persistent initialises every GPU for each query."""
_FIELDS = "index,uuid,name,memory.total,memory.used,driver_version"
_IDLE_MIB = 1024
"""Memory use below which a GPU counts as idle: the driver itself takes some hundred MiB."""


@dataclass(frozen=True, slots=True)
class Gpu:
    index: str
    uuid: str
    name: str
    total_mib: int
    used_mib: int
    driver: str
    holders: tuple[str, ...] = ()
    """Processes on it, as far as they are visible from here."""

    @property
    def facts(self) -> str:
        return f"{self.name}, {self.total_mib / 1024:.0f} GiB, driver {self.driver}"


def nvidia_smi(*arguments: str) -> str:
    """Output of nvidia-smi; empty if it is missing. Raises OSError or SubprocessError if it fails or hangs."""
    command = ["nvidia-smi", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True).stdout
    except FileNotFoundError:
        return ""


def find_gpus() -> list[Gpu]:
    """GPUs visible to a process here. Raises as nvidia_smi."""
    table = nvidia_smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    processes = nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader") if table else ""
    return visible(parse_gpus(table, parse_holders(processes)), variable("CUDA_VISIBLE_DEVICES"))


def parse_gpus(text: str, holders: dict[str, tuple[str, ...]]) -> list[Gpu]:
    """Parse `--query-gpu=<_FIELDS> --format=csv,noheader,nounits`. A value that the driver lacks ("[N/A]") is 0."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(row[0], row[1], row[2], _whole(row[3]), _whole(row[4]), row[5], holders.get(row[1], ())) for row in rows]


def parse_holders(text: str) -> dict[str, tuple[str, ...]]:
    """Processes by GPU uuid, from `--query-compute-apps=gpu_uuid,pid,process_name --format=csv,noheader`."""
    holders: dict[str, tuple[str, ...]] = {}
    for line in filter(str.strip, text.splitlines()):
        uuid, pid, name = (cell.strip() for cell in line.split(",", 2))
        holders[uuid] = (*holders.get(uuid, ()), f"pid {pid} {name}")
    return holders


def visible(gpus: Iterable[Gpu], allowed: str | None) -> list[Gpu]:
    """GPUs allowed by CUDA_VISIBLE_DEVICES; nvidia-smi shows all."""
    if allowed is None:
        return list(gpus)
    names = [name.strip() for name in allowed.split(",")]
    return [gpu for gpu in gpus if gpu.index in names or any(name and gpu.uuid.startswith(name) for name in names)]


def driver_trouble(error: Exception, is_error: bool) -> Finding:
    """Finding for a failed driver. No error if no GPUs are wanted: a node without GPUs may have the driver's programs."""
    text = f"nvidia-smi fails: {getattr(error, 'stdout', None) or error}"
    fix = "check the driver (dmesg, nvidia-smi), or exclude this node"
    return Finding("GPUs", text, "error" if is_error else "warning", fix)


def check_gpus(gpus: Sequence[Gpu], wanted: int = 0) -> Iterator[Finding]:
    """Check the GPUs. `wanted`: least number; if it is not 0, a GPU in use is an error instead of a warning."""
    if len(gpus) < wanted:
        yield Finding("GPUs", f"{len(gpus)} visible, {wanted} wanted", "error", "check CUDA_VISIBLE_DEVICES and the driver")
    elif not gpus:
        yield Finding("GPUs", "none: training runs on the CPU")
    for facts, number in Counter(gpu.facts for gpu in gpus).items():
        yield Finding("GPUs", f"{number} x {facts}")
    for gpu in gpus:
        if gpu.holders or gpu.used_mib > _IDLE_MIB:
            who = ", ".join(gpu.holders) or "a process that can't be seen from here"
            text = f"{gpu.used_mib / 1024:.1f} GiB held by {who}"
            yield Finding(f"GPU {gpu.index}", text, "error" if wanted else "warning", "end it, or choose other devices")


def check_links() -> Finding:
    """Links between GPUs: kinds of link, with the number of pairs of each."""
    try:
        kinds = parse_links(nvidia_smi("topo", "-m"))
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPU links", f"nvidia-smi topo fails: {error}", "warning", "check the driver")
    return Finding("GPU links", ", ".join(f"{kind} between {number} pairs" for kind, number in kinds.items()) or "not known")


def parse_links(text: str) -> Counter[str]:
    """Parse `topo -m`: a row and a column per GPU, then those of network cards. NV18: 18 NVLinks; SYS and the like: PCIe."""
    lines = [line.split() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    rows = [cells[1:] for cells in lines if cells and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells]
    return Counter(row[column] for index, row in enumerate(rows) for column in range(index + 1, len(rows)))


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0
