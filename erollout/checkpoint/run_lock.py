"""Lock that admits one run at a time to a directory: a file names the owner, which renews its modification time.

Another run takes the lock over only if the owner is dead: its process is gone from this machine, Slurm ended its job, or the
file has not been renewed for long. It is created by O_EXCL and replaced by rename, so it works on network filesystems too; ages
are measured by the filesystem's own clock.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from shlex import quote

import psutil

from erollout.environment import cluster_name, job_and_attempt
from erollout.errors import UserError
from erollout.schedulers import slurm_jobs

logger = logging.getLogger(__name__)

LOCK = "lock"
LOST = 71
"""Exit status of a process that has lost its lock to another one."""
_BEAT_SECONDS = 5.0
_DEAD_SECONDS = 120.0
"""Age at which the lock of an owner on another machine, and not in a Slurm job known here, counts as abandoned."""
_JOB_SECONDS = 3600.0
"""The same for a job whose ranks have not started: its batch script does not renew the lock."""
_ENDING_SECONDS = 10.0
"""Time to wait for a live owner, which may be about to end."""
_SETTLE_SECONDS = 1.0
"""Pause before a takeover counts: two processes may take over at once, and the last one wins."""
_LEFT = re.compile(r"lock\.([0-9a-f]{32}(\.now)?|\d+\.\d+)")
"""Temporary files beside the lock, of this module and train.sbatch, which a killed process may leave."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Owner of a run directory."""

    host: str
    pid: int
    """Process id; 0: a job as a whole, before its ranks start."""
    started: float
    """Start time of the process, to tell it from a later one with the same id."""
    machine: str
    """Identity of the process id namespace: machine, boot and PID namespace."""
    job: str
    """Slurm job number, or name of the `launch ray` job; empty: neither."""
    attempt: int
    """Number of times that the job was requeued."""
    token: str
    cluster: str = ""
    """Name of the Slurm cluster, because job numbers are unique only within one; empty: unknown."""

    def is_of_job_of(self, other: "Owner") -> bool:
        """Whether both belong to one job; an unknown cluster counts as the same."""
        return self.job != "" and self.job == other.job and may_be_same(self.cluster, other.cluster)

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}" if self.pid else f"a job on {self.host}"
        if not self.job:
            return process
        where = f" of cluster {self.cluster}" if self.cluster else ""
        return f"{process} ({'Slurm ' * self.job.isdigit()}job {self.job}{where})"


def may_be_same(cluster: str, other: str) -> bool:
    """Whether two cluster names, empty if unknown, may be of the same cluster."""
    return not cluster or not other or cluster == other


def this_process() -> Owner:
    started = _started(os.getpid()) or 0.0
    return Owner(socket.gethostname(), os.getpid(), started, _machine(), *job_and_attempt(), uuid.uuid4().hex, cluster_name())


class RunLock:
    """The lock of one run directory."""

    def __init__(self, directory: Path, key: str) -> None:
        """`key`: configuration key that names the directory."""
        self.path = directory / LOCK
        self.key = key
        self.owner = this_process()
        self._released = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context that holds the lock. Raises UserError, naming the owner, if another run holds it."""
        self.take()
        self._remove_left()
        thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._released.set()
            thread.join(_BEAT_SECONDS)  # so that a hanging filesystem doesn't keep the process alive
            self._release()

    def take(self) -> None:
        """Acquire the lock. Waits briefly for a live owner, and for one of unknown state until it renews or counts as dead."""
        deadline = time.monotonic() + _ENDING_SECONDS
        silent = time.monotonic() + _DEAD_SECONDS  # by the local clock too, because a date may be in the future
        first: tuple[str, float] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                other = read_owner(self.path)
                seconds = 0.0 if other is None else self._seconds_to_live(other)
                is_silent = first is not None and seconds < inf and time.monotonic() > silent and first[1] == self._date()
                if other is None or seconds <= 0 or is_silent:
                    if self._take_over(other, patient=time.monotonic() < deadline):
                        return
                    continue
                sign = (other.token, self._date())
                if first is None and seconds <= _DEAD_SECONDS:
                    logger.info("%s is held by %s: waiting up to %.0f s for a sign of life", self.path.parent, other, seconds)
                first = first or sign
                is_late = time.monotonic() > deadline
                if is_late and sign[1] < inf and (sign != first or seconds > _DEAD_SECONDS):
                    raise self._refusal(other)
                time.sleep(2.0 if is_late else 0.5)  # asks Slurm each time
        except OSError as error:
            raise UserError(
                f"{self.key} = {self.path.parent} can't be written: {error.strerror}; choose another directory"
            ) from error

    def _create(self) -> bool:
        try:
            with open(self.path, "x") as file:
                file.write(json.dumps(asdict(self.owner)))
        except FileExistsError:
            return False
        return True

    def _take_over(self, dead: Owner | None, *, patient: bool) -> bool:
        """Take the lock over. `dead`: the old owner; None: unreadable, because it has just gone or was killed while writing."""
        if dead is None and patient and self._age() < _ENDING_SECONDS:
            time.sleep(0.2)
            return False
        mine = self.path.with_name(f"{LOCK}.{self.owner.token}")
        mine.write_text(json.dumps(asdict(self.owner)))
        if read_owner(self.path) != dead:
            mine.unlink()
            return False
        mine.replace(self.path)
        is_of_this_job = dead is not None and self.owner.is_of_job_of(dead)
        if not is_of_this_job:
            time.sleep(_SETTLE_SECONDS)
        if read_owner(self.path) != self.owner:
            return False
        if not is_of_this_job:
            logger.info("%s was left by %s: taken over by this run", self.path.parent, dead or "an unknown owner")
        return True

    def _seconds_to_live(self, other: Owner) -> float:
        """Age in seconds at which an owner's lock counts as abandoned: 0 if it is surely dead, infinite if surely alive."""
        mine = self.owner
        if mine.is_of_job_of(other) and (other.attempt != mine.attempt or not other.pid):
            return 0.0  # an earlier attempt of this job
        if other.pid and other.machine and other.machine == mine.machine:
            return inf if other.pid != mine.pid and _started(other.pid) == other.started else 0.0
        lives = None if mine.is_of_job_of(other) else self._job_lives(other)
        if lives is not None:
            return inf if lives else 0.0
        return (_DEAD_SECONDS if other.pid else _JOB_SECONDS) - self._age()

    def _job_lives(self, other: Owner) -> bool | None:
        """An owner's job in Slurm; None: Slurm does not know it, possibly because it is another cluster's."""
        if not other.job.isdigit():
            return None
        with suppress(UserError):  # no Slurm here, or it does not answer
            if other.cluster and not may_be_same(self.owner.cluster or slurm_jobs.cluster(), other.cluster):
                return None  # a local job with that number is not the owner's
            known = slurm_jobs.jobs([int(other.job)], self.path.parent)
            return next((job.is_alive for job in known if job.id == int(other.job)), None)
        return None

    def _age(self) -> float:
        """Seconds since the owner's last renewal, 0 if the file is gone; both times are the filesystem's."""
        probe = self.path.with_name(f"{LOCK}.{self.owner.token}.now")
        probe.touch()
        try:
            return max(0.0, probe.stat().st_mtime - self._date())
        finally:
            probe.unlink(missing_ok=True)

    def _date(self) -> float:
        """Time of the owner's last renewal; infinite if there is no file."""
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return inf

    def _remove_left(self) -> None:
        """Remove temporary files left by processes that were killed while checking or taking the lock."""
        with suppress(OSError):
            now = self._date()
            for path in self.path.parent.glob(f"{LOCK}.*"):
                if _LEFT.fullmatch(path.name) and now - path.stat().st_mtime > _DEAD_SECONDS:
                    path.unlink()

    def _refusal(self, other: Owner) -> UserError:
        gone = "" if other.machine == self.owner.machine else f", or remove {self.path} if you are sure that it is gone"
        return UserError(
            f"{self.key} = {self.path.parent} is in use by {other}: two runs would write to one place; end that one "
            f"(`erollout launch stop {quote(str(self.path.parent))}`) or choose another directory{gone}"
        )

    def _keep(self) -> None:
        """Renew the lock; end this process if another one has taken it, because this one was suspended or cut off for long."""
        while not self._released.wait(_BEAT_SECONDS):
            with suppress(OSError):  # the filesystem may be unavailable for a while
                holder = read_owner(self.path)
                if holder is not None and holder != self.owner:
                    os.write(2, f"erollout: error: {self.path.parent} is now held by {holder}: ending this process\n".encode())
                    os._exit(LOST)
                if holder is None and not self.path.exists():
                    self._create()
                os.utime(self.path)

    def _release(self) -> None:
        with suppress(OSError):
            if read_owner(self.path) == self.owner:
                self.path.unlink()


def read_owner(path: Path) -> Owner | None:
    """The owner in a lock file; None: there is no file, or it is incomplete."""
    try:
        if not path.is_file():  # reading from a pipe would block
            return None
        return Owner(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _started(pid: int) -> float | None:
    """Start time of a process; None: no such process runs."""
    with suppress(OSError):  # not Linux, or the process is gone
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else float(fields[18])  # ticks since boot, independent of clock changes
    with suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"
