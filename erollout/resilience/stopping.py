"""Ends a run on request: a signal sets a flag, which interrupts a rollout; all ranks agree, and a file says how the run ended.

SIGUSR1 asks for a checkpoint and a later start (a time limit is near), SIGTERM and SIGINT (Ctrl-C) for a checkpoint and the
end. A second SIGINT ends the process at once, whatever it is waiting in.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from erollout.environment import launcher_environment
from erollout.errors import UserError
from erollout.parallel.collectives import all_max
from erollout.parallel.groups import current_rank
from erollout.resilience.signals import AGAIN_SECONDS, ENDED_AT_ONCE

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

VERDICT = "verdict"
"""File in train.output_dir, of one word: done, requeue or stopped. Exit statuses don't survive every launcher."""

_REPEAT_SECONDS = 5.0
"""A second SIGTERM after so long ends the process at once. Sooner, it is the first one, passed on by a launcher too."""
_URGENCY = {signal.SIGUSR1: 1, signal.SIGINT: 2, signal.SIGTERM: 3}
"""Where ranks were asked for different things, SIGTERM wins: who cancels a run doesn't want it back."""


class Stop:
    """What this rank was asked for, and what all ranks have agreed on."""

    def __init__(self, saves: bool, file: Path) -> None:
        """
        Args:
            saves: whether the run has checkpoints at all.
            file: for the verdict.
        """
        self.saves = saves
        self.file = file
        self.agreed: signal.Signals | None = None
        self._asked = 0
        self._terminated_at: float | None = None

    def begin(self) -> None:
        """All checks are passed: from here on the verdict of the attempt before is out of date."""
        if current_rank() == 0:
            self.file.unlink(missing_ok=True)

    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked > 0

    def agree(self, step: int, device: "torch.device") -> bool:
        """Whether all ranks stop after `step` steps: one of them was asked to. Collective."""
        urgency = all_max([self._asked], device)[0]
        self.agreed = next((asked for asked, rank in _URGENCY.items() if rank == urgency), None)
        if self.agreed is None:
            return False
        logger.info("%s: stopping after step %d", self.agreed.name, step)
        if not self.saves:
            logger.warning("checkpoint.interval = 0: nothing is saved, and the run can't be continued")
        return True

    @property
    def verdict(self) -> str:
        """A run that saves nothing is not to be requeued: it would begin again each time."""
        if self.agreed is None:
            return "done"
        return "requeue" if self._asked < _URGENCY[signal.SIGINT] and self._requeues else "stopped"

    @property
    def _requeues(self) -> bool:
        return self.agreed is signal.SIGUSR1 and self.saves

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        asked, now = signal.Signals(number), time.monotonic()
        if asked is signal.SIGTERM:
            if self._terminated_at is not None and now - self._terminated_at > _REPEAT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._terminated_at = self._terminated_at or now
        is_first, self._asked = not self._asked, max(self._asked, _URGENCY[asked])
        if is_first and current_rank() == 0:
            again = "; once more ends it at once, unsaved" if asked is signal.SIGINT else ""
            say(f"{asked.name}: stops a rollout at once, anything else at the end of this step{again}")


def say(text: str) -> None:
    """A line on stderr: a signal may come in the middle of a print, and after the end of who reads it."""
    with suppress(OSError):
        os.write(2, f"erollout: {text}\n".encode())


@contextmanager
def _ended_by_a_second_interrupt() -> Iterator[None]:
    """A thread is told of each signal when it comes. The main thread hears of it only between two instructions of Python, and
    may be waiting for other ranks for ever."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        first: float | None = None
        while number := os.read(reader, 1):
            now = time.monotonic()
            if number[0] == signal.SIGINT and first is not None and now - first > AGAIN_SECONDS:
                if current_rank() == 0:
                    say(ENDED_AT_ONCE)
                os._exit(128 + signal.SIGINT)
            first = first or (now if number[0] == signal.SIGINT else None)
        os.close(reader)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


@contextmanager
def stoppable(output_dir: str, saves: bool) -> Iterator[Stop]:
    """The signals are heard in the block; at its end the verdict is written. A block that fails after `begin` leaves none.

    A rank that is through ignores them from then on: others may still be at it, and one that a late signal ended would be taken
    for a crash.

    Raises SystemExit(143) after a SIGTERM, 130 after a SIGINT, where no launcher started this process: a launcher would take it
    for a crash.
    Raises UserError when the verdict can't be written.
    """
    stop = Stop(saves, Path(output_dir) / VERDICT)
    after = {number: signal.signal(number, stop.note) or signal.SIG_DFL for number in _URGENCY}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _URGENCY)  # our launcher starts the ranks with SIGUSR1 blocked
    try:
        with _ended_by_a_second_interrupt():
            yield stop
        if current_rank() == 0:
            _write(stop.file, stop.verdict)
        if launcher_environment() is not None:
            after = dict.fromkeys(_URGENCY, signal.SIG_IGN)
    finally:
        for number, handler in after.items():
            signal.signal(number, handler)
    if stop.agreed in (signal.SIGTERM, signal.SIGINT) and launcher_environment() is None:
        raise SystemExit(128 + stop.agreed)


def _write(path: Path, verdict: str) -> None:
    partial = path.with_name(f"{VERDICT}.partial")
    try:
        partial.write_text(f"{verdict}\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"train.output_dir: can't write {path}: {error.strerror}; free space or make it writable") from error
