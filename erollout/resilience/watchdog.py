"""Watchdog: heartbeats of all ranks in small files, and the end of a rank that stays in one phase for too long.

A collective that one rank never enters blocks all others. On each rank, one thread writes `heartbeats/rank_00000.json`, and
another one measures the time in the present phase. The first rank to exceed the limit reads the others' files, reports which
rank is behind, dumps the stacks of its threads and ends its process; the launcher then ends the other ranks. A hanging disk
delays only the report.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from erollout.resilience.atomic_write import write_atomically

logger = logging.getLogger(__name__)

HUNG = 70
"""Exit status of a rank that exceeded the limit."""
_LAST_WORDS_SECONDS = 15.0
"""Time for the report, after which a rank ends even if its filesystem hangs."""
_SILENT_BEATS = 3.0
"""Age of a rank's file, in heartbeats, above which the rank counts as silent."""
_LATEST = 1e11
"""Latest time, in seconds since the epoch, that can be shown as a date."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Progress of a rank. Times are in seconds since the epoch."""

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = "start"
    phases: int = 0
    """Number of phases entered: equal on all ranks at the same point, so it shows which rank is behind."""
    since: float = 0.0
    """Start of the present phase."""
    beat: float = 0.0
    """Time at which this was written."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Sequence number of the last collective, by process group name, if the backend counts them."""


_HEARTBEAT = TypeAdapter(Heartbeat)


class Watchdog:
    """The watchdog of a rank. `enter` is cheap; all else happens in threads inside `watching`."""

    def __init__(self, output_dir: str, rank: int, world_size: int, heartbeat_seconds: float, hang_seconds: float) -> None:
        self._directory = Path(output_dir) / "heartbeats"
        self._world_size = world_size
        self._period, self._limit = heartbeat_seconds, hang_seconds
        self._place = Heartbeat(rank, socket.gethostname(), os.getpid(), since=time.time())
        self._signs = 0
        self._ended = threading.Event()
        self._write_failed = False

    def enter(self, step: int, phase: str) -> None:
        """Enter the next phase."""
        self._place = replace(self._place, step=step, phase=phase, phases=self._place.phases + 1, since=time.time())

    def alive(self) -> None:
        """Report progress within a long phase."""
        self._signs += 1

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Context in which hangs are detected."""
        works = [self._beat, *([self._watch] if self._limit else [])]
        threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in works]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(self._period)  # so that a hanging disk doesn't keep the process alive

    def _beat(self) -> None:
        if self._place.rank == 0:
            self._forget_others()
        self._write()
        while not self._ended.wait(self._period):
            self._write()

    def _watch(self) -> None:
        """Count the seconds of a phase in ticks, so that the time in which the process was suspended does not count."""
        tick = min(self._period, self._limit / 4)
        watched, waited = (self._place.phases, self._signs), 0.0
        last = time.monotonic()
        while not self._ended.wait(tick):
            now, place = time.monotonic(), (self._place.phases, self._signs)
            waited = waited + min(now - last, 2 * tick) if watched == place else 0.0
            watched, last = place, now
            if waited >= self._limit:
                self._end(waited)

    def _forget_others(self) -> None:
        """Remove heartbeats of an earlier attempt with more ranks, which would look silent."""
        mine = {_file(self._directory, rank) for rank in range(self._world_size)}
        with suppress(OSError):
            for path in set(self._directory.glob("rank_*.json")) - mine:
                path.unlink()

    def _write(self) -> None:
        path = _file(self._directory, self._place.rank)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(asdict(replace(self._place, beat=time.time(), collectives=_collectives()))))
        except OSError as error:
            if not self._write_failed:
                logger.warning("can't write heartbeats to %s: %s", self._directory, error.strerror)
            self._write_failed = True

    def _end(self, waited: float) -> None:
        surely = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (HUNG,))
        surely.daemon = True
        surely.start()
        others = [beat for beat in read_heartbeats(self._directory, self._world_size) if beat.rank != self._place.rank]
        mine = replace(self._place, collectives=_collectives())
        stacks = self._directory / f"stacks_rank_{mine.rank:05d}.txt"
        with suppress(OSError), open(stacks, "w") as file:
            faulthandler.dump_traceback(file)
        message = f"erollout: error: {describe_hang(mine, others, waited, self._period)}; stacks in {stacks}"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{message}\n".encode())
        os._exit(HUNG)


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Context with a time limit, which ends the process after a line that says that `what` hangs."""

    def end() -> None:
        with suppress(OSError):
            os.write(2, f"erollout: error: {what} takes more than {seconds:g} s: ending this process\n".encode())
        os._exit(HUNG)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_heartbeats(directory: Path, world_size: int) -> list[Heartbeat]:
    """The last heartbeat of every rank in rank order, without unreadable files."""
    beats = []
    for rank in range(world_size):
        with suppress(OSError, ValueError):
            beat = _HEARTBEAT.validate_json(_file(directory, rank).read_bytes())
            if min(beat.since, beat.beat) >= 0 and max(beat.since, beat.beat) < _LATEST:
                beats.append(beat)
    return beats


def describe_hang(mine: Heartbeat, others: list[Heartbeat], waited: float, period: float) -> str:
    """One line on a hang: which rank waits where, since when and for which ranks."""
    now = time.time()
    silent = [beat for beat in others if now - beat.beat > _SILENT_BEATS * period]
    behind = [beat for beat in others if beat not in silent and beat.phases < mine.phases]
    fewer = [beat for beat in others if beat not in silent + behind and _groups_behind(beat, mine)]
    parts = [
        f"rank {mine.rank} has been in phase {_where(mine)} for {waited:.0f} s, since {_clock(mine.since)} "
        f"(host {mine.host}, pid {mine.pid})"
    ]
    for what, beats in (("silent", silent), ("behind", behind), ("in the same phase, behind in collectives", fewer)):
        parts += [
            f"{what}: rank {b.rank}, in {_where(b)} since {_clock(b.since)}, last heard {now - b.beat:.0f} s ago "
            f"(host {b.host}, pid {b.pid}{_numbers(b, mine)})"
            for b in beats
        ]
    if len(parts) == 1:
        parts.append("no other rank is behind")
    return "; ".join(parts)


def _where(beat: Heartbeat) -> str:
    return f"{beat.phase} of step {beat.step + 1}"


def _groups_behind(beat: Heartbeat, mine: Heartbeat) -> list[str]:
    """Process groups in which the other rank has completed fewer collectives."""
    return [name for name, number in mine.collectives.items() if beat.collectives.get(name, number) < number]


def _numbers(beat: Heartbeat, mine: Heartbeat) -> str:
    groups = [f"{beat.collectives[name]} of {mine.collectives[name]} in group {name}" for name in _groups_behind(beat, mine)]
    return f", collective {', '.join(groups)}" if groups else ""


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _collectives() -> dict[str, int]:
    torch: Any = sys.modules.get("torch.distributed")
    if torch is None or not torch.is_initialized():
        return {}
    groups = list(torch.distributed_c10d._world.pg_map)
    return {group.group_name: int(group._get_sequence_number_for_group()) for group in groups}


def _file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank:05d}.json"
