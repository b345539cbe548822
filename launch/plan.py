"""Plan of a Slurm submission: sbatch options, variables of the batch script, configuration, code, and its description."""

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from erollout.config import Config
from erollout.environment import variable
from erollout.errors import UserError
from erollout.launch.run_directory import RunDirectory, dump_config
from erollout.launch.sites import Site
from erollout.launch.snapshot import Snapshot
from erollout.parallel.layout import layouts
from erollout.resilience.atomic_write import write_atomically
from erollout.schedulers.slurm_jobs import Refused

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a submission writes and prints."""

    run: RunDirectory
    config: Config
    site: Site
    nodes: int
    spares: int
    """Number of spare nodes, to replace those excluded by the checks."""
    ranks: int
    """Ranks per node."""
    gpus: int
    """GPUs per node."""
    time: str | None
    grace: int | None
    """Seconds for saving before the time limit; None: the run saves nothing and can't be resumed."""
    chain: int
    max_requeues: int | None
    preflight: bool
    name: str
    snapshot: Snapshot

    @property
    def requeues(self) -> bool:
        return self.site.requeue and self.chain == 1 and self.grace is not None

    def command(self) -> list[str]:
        """sbatch and its arguments, without those that depend on other jobs or on events."""
        run = self.run.path
        cpus = self.site.cpus_per_task or (None if self.gpus or self.site.exclusive else self.ranks)
        options = [
            f"--job-name={self.name}",
            f"--nodes={self.nodes + self.spares}",
            "--ntasks-per-node=1",
            self.site.gpus.option(self.gpus),
            f"--cpus-per-task={cpus}" if cpus else None,
            f"--time={self.time}" if self.time else None,
            f"--signal=B:USR1@{self.grace or 0}",  # 0: never; the script's own default would end a run unsaved
            "--requeue" if self.requeues else "--no-requeue",
            "--open-mode=append",
            "--export=ALL",
            f"--chdir={run}",
            f"--output={str(run).replace('%', '%%')}/slurm-%j.out",
            *self.site.sbatch_options(),
        ]
        script = [str(self.run.script), str(run), "--config", str(self.run.config)]
        return ["sbatch", "--parsable", *(option for option in options if option), *script]

    def variables(self) -> dict[str, str]:
        """Variables for the batch script; unset ones are empty, to override those of the submitting shell."""
        container = self.site.container
        python = variable("EROLLOUT_PYTHON") or (sys.executable if container is None else "python3")
        found = {
            "EROLLOUT_PYTHON": python,
            "EROLLOUT_CODE": str(self.run.code / self.snapshot.name),
            "EROLLOUT_RANKS_PER_NODE": str(self.ranks),
            "EROLLOUT_GPUS_PER_NODE": str(self.gpus),
            "EROLLOUT_CHECKPOINTS": str(self.config.checkpoint_directory),
            "EROLLOUT_SPARES": str(self.spares) if self.spares else None,
            "EROLLOUT_PREFLIGHT": str(int(self.preflight)),
            "EROLLOUT_REQUEUE": str(int(self.requeues)),
            "EROLLOUT_MAX_REQUEUES": str(self.max_requeues) if self.max_requeues is not None else None,
            "EROLLOUT_SETUP": str(self.run.setup) if self.site.setup else None,
            "EROLLOUT_INTERFACE": self.site.interface,
            "EROLLOUT_CONTAINER": container.image if container else None,
            "EROLLOUT_CONTAINER_KIND": container.kind if container else None,
            "EROLLOUT_CONTAINER_MOUNTS": ",".join(container.mounts) if container and container.mounts else None,
        }
        path = _absolute_path_list(variable("PYTHONPATH"))
        python_finds = {"PYTHONSAFEPATH": "1"}  # otherwise the job's directory, possibly a checkout, precedes PYTHONPATH
        python_finds |= {"PYTHONPATH": path} if path else {}
        return {name: value or "" for name, value in found.items()} | python_finds | self.site.env

    def files(self) -> dict[Path, str]:
        """Files written besides the code."""
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.variables().items())
        files = {
            self.run.config: dump_config(self.config),
            self.run.script: batch_script().read_text(),
            self.run.environment: exports,
        }
        return files | ({self.run.setup: self.site.setup} if self.site.setup else {})


def seconds_of(text: str) -> int:
    """Seconds of a time limit in Slurm's formats: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises UserError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(f"--time = {text}; give HH:MM:SS, days-hours or minutes")
    numbers = [int(number) for number in match.group("first", "second", "third") if number is not None]
    if match["days"]:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@contextmanager
def written(plan: Plan) -> Iterator[None]:
    """Context in which the run directory has the job's files. If Slurm rejects the first job, the earlier files are restored,
    so that `requeue` resubmits what was submitted. Raises UserError if the directory is not writable."""
    submitted = len(plan.run.submissions())
    before = {path: path.read_text() for path in plan.files() if path.is_file()}
    _write(plan)
    try:
        yield
    except Refused:
        if len(plan.run.submissions()) == submitted:
            for path, text in before.items():
                write_atomically(path, text)
        raise


def _write(plan: Plan) -> None:
    try:
        plan.run.path.mkdir(parents=True, exist_ok=True)
        plan.snapshot.write(plan.run.code)
        for path, text in plan.files().items():
            write_atomically(path, text)
    except OSError as error:
        raise UserError(
            f"train.output_dir = {plan.run.path} can't be written: {error.strerror}; choose another place"
        ) from error


def describe(plan: Plan) -> str:
    """The output of --dry-run."""
    files = plan.files()
    lines = [*_summary(plan), "", "== command", _wrapped(plan.command())]
    for path in (plan.run.environment, plan.run.setup, plan.run.script):
        lines += [f"== {path}", files[path].rstrip()] if path in files else []
    return "\n".join(lines)


def _summary(plan: Plan) -> list[str]:
    config, snapshot = plan.config, plan.snapshot
    train, decode = layouts(config.parallel, config.rollout, plan.nodes * plan.ranks)
    what = f"{plan.gpus} GPUs, a rank for each" if plan.gpus else f"{plan.ranks} ranks, no GPUs"
    checkpoint = plan.run.newest_checkpoint() if plan.run.config.is_file() else None
    interval = config.checkpoint.interval
    values = {
        "run directory": str(plan.run.path),
        "begins": f"from {checkpoint.name}" if checkpoint else "from step 0",
        "nodes": f"{plan.nodes}, each with {what}: {train.world_size} ranks{f'; {plan.spares} spare' if plan.spares else ''}",
        "training": f"tensor {train.tensor} x data {train.data} x pipeline {train.pipeline}",
        "decoding": f"{decode.replicas} replicas of {decode.tensor} ranks",
        "time": _describe_time(plan),
        "GPU hours": _describe_gpu_hours(plan),
        "checkpoints": f"every {interval} steps in {config.checkpoint_directory}" if interval else "none: it can't be resumed",
        "node checks": "before each start; bad nodes are reported and excluded" if plan.preflight else "none",
        "bad nodes": ", ".join(plan.run.bad_nodes()) or "none known",
        "code": f"{len(snapshot.files)} files, {snapshot.num_bytes / 2**20:.1f} MiB{_describe_source(snapshot)}, "
        f"copied to {plan.run.code / snapshot.name}",
    }
    width = max(map(len, values))
    return [f"{name:<{width}}  {value}" for name, value in values.items()]


def _describe_source(snapshot: Snapshot) -> str:
    return f", commit {snapshot.commit[:12]}{' and changes' if snapshot.dirty else ''}" if snapshot.commit else ""


def _describe_time(plan: Plan) -> str:
    limit = plan.time or "the partition's limit"
    if plan.grace is None:
        return f"{limit}, once"
    starts = f"{plan.chain} jobs, one after the other" if plan.chain > 1 else "once"
    if plan.requeues:
        starts = f"requeued each time, at most {plan.max_requeues} times" if plan.max_requeues else "requeued each time"
    return f"{limit}; {plan.grace} s before it the run saves and ends; {starts}"


def _describe_gpu_hours(plan: Plan) -> str:
    if not plan.gpus:
        return "0"
    gpus = (plan.nodes + plan.spares) * plan.gpus
    if not plan.time:
        return f"{gpus:,} for each hour"
    return f"{gpus * seconds_of(plan.time) / 3600:,.0f} at most for each start: {gpus:,} GPUs x {plan.time}"


def _wrapped(command: list[str]) -> str:
    return " \\\n  ".join(shlex.quote(word) for word in command)


def batch_script() -> Path:
    spec = importlib.util.find_spec("erollout.slurm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "train.sbatch"


def _absolute_path_list(value: str | None) -> str | None:
    return os.pathsep.join(str(Path(part).absolute()) for part in value.split(os.pathsep)) if value else None
