"""GPUs and the links between them, as nvidia-smi tells of them. Loads no torch."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from erollout.doctor.report import Finding
from erollout.environment import variable

_COMMAND_SECONDS = 30
"""Where the driver does not stay loaded, it starts every GPU anew for each question."""
_FIELDS = "index,uuid,name,memory.total,memory.used,driver_version"
_IDLE_MIB = 1024
"""The driver itself holds some hundred MiB of a GPU that nobody uses."""


@dataclass(frozen=True, slots=True)
class Gpu:
    index: str
    uuid: str
    name: str
    total_mib: int
    used_mib: int
    driver: str
    holders: tuple[str, ...] = ()
    """Processes on it, as far as they can be seen from here."""

    @property
    def facts(self) -> str:
        return f"{self.name}, {self.total_mib / 1024:.0f} GiB, driver {self.driver}"


def nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing where it is missing. Raises OSError or SubprocessError when it fails or hangs."""
    command = ["nvidia-smi", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True).stdout
    except FileNotFoundError:
        return ""


def find_gpus() -> list[Gpu]:
    """Those that a process here would see. Raises as nvidia_smi does."""
    table = nvidia_smi(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    processes = nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader") if table else ""
    return visible(parse_gpus(table, parse_holders(processes)), variable("CUDA_VISIBLE_DEVICES"))


def parse_gpus(text: str, holders: dict[str, tuple[str, ...]]) -> list[Gpu]:
    """Of `--query-gpu=<_FIELDS> --format=csv,noheader,nounits`. A figure that the driver does not give ("[N/A]") is 0."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(row[0], row[1], row[2], _whole(row[3]), _whole(row[4]), row[5], holders.get(row[1], ())) for row in rows]


def parse_holders(text: str) -> dict[str, tuple[str, ...]]:
    """Processes by the GPU's uuid, of `--query-compute-apps=gpu_uuid,pid,process_name --format=csv,noheader`."""
    holders: dict[str, tuple[str, ...]] = {}
    for line in filter(str.strip, text.splitlines()):
        uuid, pid, name = (cell.strip() for cell in line.split(",", 2))
        holders[uuid] = (*holders.get(uuid, ()), f"pid {pid} {name}")
    return holders


def visible(gpus: Iterable[Gpu], allowed: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves; nvidia-smi shows them all."""
    if allowed is None:
        return list(gpus)
    names = [name.strip() for name in allowed.split(",")]
    return [gpu for gpu in gpus if gpu.index in names or any(name and gpu.uuid.startswith(name) for name in names)]


def driver_trouble(error: Exception, is_error: bool) -> Finding:
    """No error where no GPUs are wanted: a node without them may have the driver's programs."""
    text = f"nvidia-smi fails: {getattr(error, 'stdout', None) or error}"
    fix = "look at the driver (dmesg, nvidia-smi), or leave this node out"
    return Finding("GPUs", text, "error" if is_error else "warning", fix)


def check_gpus(gpus: Sequence[Gpu], wanted: int = 0) -> Iterator[Finding]:
    """`wanted`: so many at least must be there, and then one that is in use is an error, else a warning."""
    if len(gpus) < wanted:
        yield Finding("GPUs", f"{len(gpus)} visible, {wanted} wanted", "error", "look at CUDA_VISIBLE_DEVICES and the driver")
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
    """How the GPUs are connected: the kinds of link between two of them, and how many pairs have each."""
    try:
        kinds = parse_links(nvidia_smi("topo", "-m"))
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPU links", f"nvidia-smi topo fails: {error}", "warning", "look at the driver")
    return Finding("GPU links", ", ".join(f"{kind} between {number} pairs" for kind, number in kinds.items()) or "not known")


def parse_links(text: str) -> Counter[str]:
    """Of `topo -m`: a row and a column for each GPU, then those of network cards. NV18: 18 NVLinks; SYS and the like: PCIe."""
    lines = [line.split() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines()]
    rows = [cells[1:] for cells in lines if cells and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells]
    return Counter(row[column] for index, row in enumerate(rows) for column in range(index + 1, len(rows)))


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0
