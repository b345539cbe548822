"""Slurm through its commands. It may be busy, down or absent, so each call is bounded in time."""

import re
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from erollout.environment import outside_of_jobs
from erollout.errors import UserError

_ANSWER_SECONDS = 60
"""Time limit of a call: Slurm's commands wait for ever for a controller that is down."""
_PAUSES = (5, 15, 45)
"""Pauses in seconds before sbatch is retried."""
_BUSY = re.compile(
    r"timed out|unable to contact|connection (refused|reset)|zero bytes|temporarily|busy|try again|slow down|not respond",
    re.IGNORECASE,
)
"""Messages of sbatch after which a retry may succeed."""
_PREFIXES = re.compile(r"^(\w+: )?(error: |fatal: )?")
_FIELDS = ("JobID", "State", "RestartCnt", "Reason", "NodeList", "TimeUsed", "TimeLimit", "StartTime", "WorkDir")
_SUBMITTED = re.compile(r"^(\d+)(?:;.*)?$", re.MULTILINE)
"""Output of `sbatch --parsable`, among lines that a site's own sbatch may add."""
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "DEADLINE", "REVOKED"),
}


class Refused(UserError):
    """Raised for a job that Slurm has definitely not accepted."""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """State of a job as reported by Slurm."""

    id: int
    state: str
    attempt: int
    """Number of times that it was requeued."""
    reason: str
    """Reason why it is pending."""
    nodes: str
    """Nodes in Slurm's notation: `n[1-4]`."""
    used: str
    limit: str
    start: str
    directory: str

    @property
    def is_alive(self) -> bool:
        """Whether it runs or may still run."""
        return self.state not in _ENDED

    @property
    def waits(self) -> bool:
        return self.state in _WAITING

    def describe(self) -> str:
        if self.waits:
            return f"{self.state} ({self.reason}), expected to start {self.start}"
        where = f" on {self.nodes}" if self.nodes else ""
        return f"{self.state}{where}, {self.used} of {self.limit}"


def answers() -> str | None:
    """None if a scheduler answers; otherwise why none does."""
    try:
        done = _call("scontrol", "ping")
    except UserError as error:
        return str(error)
    return None if "is UP" in done.stdout else _words(done)


def cluster() -> str:
    """Name of the cluster whose Slurm answers here; empty: unknown. Raises UserError if none answers."""
    found = re.search(r"^ClusterName\s*= (\S+)", _must("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else ""


def try_submission(command: Sequence[str]) -> str:
    """Output of a test submission, which starts no job. Raises UserError if the scheduler would reject the job."""
    done = _call(command[0], "--test-only", *command[1:])
    if done.returncode:
        raise UserError(f"the scheduler would reject the job: {_words(done)}")
    return _words(done)


def submit(command: Sequence[str], directory: Path, known: Collection[int]) -> int:
    """Submit a job, with retries while the controller is busy. Returns the job's id.

    If the answer is lost but not the job, the job is the one in `directory` whose id is not `known`. Raises UserError, and its
    subclass Refused.
    """
    reason = ""
    for pause in (0, *_PAUSES):
        time.sleep(pause)
        try:
            if pause and (taken := [job.id for job in jobs((), directory) if job.id not in known]):
                return max(taken)
            done = _call(*command)
        except UserError as error:
            reason = str(error)
        else:
            reason = _words(done)
            if done.returncode == 0:
                if answers := _SUBMITTED.findall(done.stdout):
                    return int(answers[-1])
                raise UserError(f"sbatch has accepted a job but did not report its id: {reason}; see squeue --me")
            if not _BUSY.search(reason):
                raise (UserError if pause else Refused)(f"sbatch: {reason}")  # an earlier attempt may have been accepted
    raise UserError(f"sbatch: {reason}")


def jobs(ids: Collection[int], directory: Path) -> list[SlurmJob]:
    """The jobs with these ids that Slurm still knows (for minutes after their end), and mine in the directory; oldest first."""
    names = ",".join(map(str, [*ids, *ids]))  # a single unknown id is an error, in a list it is not
    found = [*(_jobs(f"--jobs={names}") if ids else []), *(job for job in _jobs("--me") if job.directory == str(directory))]
    return [job for _, job in sorted({job.id: job for job in found}.items())]


def cancel(job: SlurmJob) -> None:
    """Cancel a job; a pending one ends at once."""
    _must("scancel", str(job.id))


def terminate(job: SlurmJob) -> None:
    """Send SIGTERM to the batch shell, which lets the ranks save and exit in their own time."""
    _must("scancel", "--batch", "--signal=TERM", str(job.id))


def _jobs(which: str) -> list[SlurmJob]:
    lines = _must("squeue", "--noheader", "--states=all", which, "--Format=" + ",".join(f"{name}:|" for name in _FIELDS))
    rows = [line.strip().split("|") for line in lines.splitlines()]
    return [SlurmJob(int(row[0]), row[1], int(row[2]), *row[3:9]) for row in rows if row[0].isdigit()]


def _must(*command: str) -> str:
    done = _call(*command)
    if done.returncode:
        raise UserError(f"{command[0]}: {_words(done)}")
    return done.stdout


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False, env=outside_of_jobs()
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not found: there is no Slurm on this machine; log in to the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} timed out after {_ANSWER_SECONDS} s; is the controller up (`scontrol ping`)?") from None


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """Output of a command in one line."""
    lines = f"{done.stdout}\n{done.stderr}".splitlines()
    return "; ".join(words for line in lines if (words := _PREFIXES.sub("", line.strip()))) or f"status {done.returncode}"
