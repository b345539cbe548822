"""Status of a run, from its directory and from Slurm, on one page."""

import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil

from erollout.config import FaultToleranceConfig, load_config
from erollout.errors import UserError
from erollout.launch.run_directory import RunDirectory
from erollout.resilience.watchdog import Heartbeat
from erollout.schedulers import slurm_jobs

_SHOWN = 5
"""Number of jobs, and of ranks that are behind, that are shown."""
_MISSED_BEATS = 3
_MEANINGS = {
    "done": "all steps are complete",
    "requeue": "saved before its time limit, to resume at the next start",
    "stopped": "stopped on request, and saved if it has checkpoints",
}


def status_page(run: RunDirectory) -> str:
    """The status page. Raises UserError for an unreadable configuration."""
    verdict, attempts, checkpoint = run.verdict(), run.attempts(), run.newest_checkpoint()
    jobs, alive = _jobs(run)
    lines = [
        ("run directory", str(run.path)),
        *jobs,
        ("verdict", f"{verdict}: {_MEANINGS.get(verdict, 'not known')}" if verdict else f"none: {alive}"),
        ("checkpoint", f"{checkpoint.name}, {_ago(checkpoint)}" if checkpoint else "none yet"),
        *_ranks(run, verdict is not None),
    ]
    if bad := run.bad_nodes():
        lines.append(("bad nodes", f"{', '.join(bad)}; why: {run.path}/logs/*/preflight-NODE.out"))
    if attempts:
        newest = attempts[-1]
        lines.append(("logs", f"{run.output(newest.job)}, {newest.directory.relative_to(run.path)} (start {len(attempts)})"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _jobs(run: RunDirectory) -> tuple[list[tuple[str, str]], str]:
    """The newest jobs with their state in Slurm, and whether the run is alive."""
    if not (ids := run.jobs()):
        alive = f"{len(here)} of its ranks run on this machine" if (here := ranks_here(run)) else "none of its ranks runs here"
        return [("jobs", "none in Slurm")], alive
    try:
        known = {job.id: job for job in slurm_jobs.jobs(ids, run.path)}
    except UserError as error:
        return [("jobs", ", ".join(map(str, ids[-_SHOWN:])))], f"the state of the jobs is unknown: {error}"
    lines = [
        (f"job {job}", known[job].describe() if job in known else f"ended; Slurm has forgotten it, see {run.output(job)}")
        for job in sorted({*ids, *known})
    ]
    is_alive = any(job.is_alive for job in known.values())
    return lines[-_SHOWN:], "it is running or pending" if is_alive else "its last start crashed or was killed; the logs say why"


def _ranks(run: RunDirectory, ended: bool) -> list[tuple[str, str]]:
    """Last heartbeats of the ranks, and the ranks that are behind."""
    beats = run.heartbeats()
    if not beats:
        return [("ranks", "none has started")]
    first = max(beats, key=lambda beat: beat.phases)
    where = f"the foremost {_phase(first)}"
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(beat.beat for beat in beats)))
    if ended:
        return [("ranks", f"{len(beats)}, last heard from at {last}, {where}")]
    limit = _MISSED_BEATS * _period(run)
    silent = [beat for beat in beats if time.time() - beat.beat > limit]
    behind = [beat for beat in beats if beat not in silent and beat.phases < first.phases]
    lines = [("ranks", f"{len(beats) - len(silent)} of {len(beats)} heard from within {limit:.0f} s, last at {last}, {where}")]
    for what, found in (("silent", silent), ("behind", behind)):
        if found:
            more = f"; {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            lines.append((what, "; ".join(map(_place, found[:_SHOWN])) + more))
    return lines


def _place(beat: Heartbeat) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(beat.since))
    return f"rank {beat.rank} ({beat.host}, pid {beat.pid}) {_phase(beat)} since {since}"


def _phase(beat: Heartbeat) -> str:
    return f"at the end, after step {beat.step}" if beat.phase == "end" else f"in {beat.phase} of step {beat.step + 1}"


def ranks_here(run: RunDirectory) -> list[psutil.Process]:
    """The run's ranks on this machine, in rank order."""
    found = []
    for beat in run.heartbeats():
        if beat.host != socket.gethostname():
            continue
        with suppress(psutil.Error):  # the process has ended
            process = psutil.Process(beat.pid)
            if process.create_time() < beat.beat and any("erollout" in word for word in process.cmdline()):
                found.append(process)
    return found


def _period(run: RunDirectory) -> float:
    known = load_config(run.config).fault_tolerance if run.config.is_file() else FaultToleranceConfig()
    return known.heartbeat_seconds


def _ago(path: Path) -> str:
    seconds = time.time() - path.stat().st_mtime
    units = (("days", 86400), ("hours", 3600), ("minutes", 60))
    unit, size = next((unit for unit in units if seconds > 2 * unit[1]), ("seconds", 1))
    return f"{seconds / size:.0f} {unit} ago"
