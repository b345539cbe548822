"""Stop requests: a signal sets a flag, which interrupts a rollout; all ranks agree, and a file records how the run ended.

SIGUSR1 requests a checkpoint and a requeue (a time limit is near); SIGTERM and SIGINT (Ctrl-C) request a checkpoint and the end
of the run. A second SIGINT ends the process at once, even while it waits in a collective.
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
from erollout.resilience.atomic_write import write_atomically
from erollout.resilience.signals import AGAIN_SECONDS, ENDED_AT_ONCE

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

VERDICT = "verdict"
"""File in train.output_dir with one word: done, requeue or stopped. Not every launcher passes exit statuses on."""

_REPEAT_SECONDS = 5.0
"""Age of the first SIGTERM after which a second one ends the process at once. Earlier, it is a launcher's copy of the first."""
_URGENCY = {signal.SIGUSR1: 1, signal.SIGINT: 2, signal.SIGTERM: 3}
"""Precedence if ranks got different signals: SIGTERM wins, because a cancelled run must not be requeued."""


class Stop:
    """Stop request of this rank, and the agreement of all ranks."""

    def __init__(self, saves: bool, file: Path) -> None:
        """
        Args:
            saves: whether the run saves checkpoints.
            file: path of the verdict.
        """
        self.saves = saves
        self.file = file
        self.agreed: signal.Signals | None = None
        self._urgency = 0
        self._terminated_at: float | None = None

    def begin(self) -> None:
        """Remove the verdict of the previous attempt. Called once all checks have passed."""
        if current_rank() == 0:
            self.file.unlink(missing_ok=True)

    def is_requested(self) -> bool:
        """Whether a stop was requested in this process."""
        return self._urgency > 0

    def agree(self, step: int, device: "torch.device") -> bool:
        """Whether all ranks stop after `step` steps, because a stop was requested on any of them. Collective."""
        urgency = all_max([self._urgency], device)[0]
        self.agreed = next((requested for requested, rank in _URGENCY.items() if rank == urgency), None)
        if self.agreed is None:
            return False
        logger.info("%s: stopping after step %d", self.agreed.name, step)
        if not self.saves:
            logger.warning("checkpoint.interval = 0: nothing is saved, and the run can't be resumed")
        return True

    @property
    def verdict(self) -> str:
        """The verdict. A run without checkpoints is not requeued, because it would start from scratch each time."""
        if self.agreed is None:
            return "done"
        return "requeue" if self._urgency < _URGENCY[signal.SIGINT] and self._requeues else "stopped"

    @property
    def _requeues(self) -> bool:
        return self.agreed is signal.SIGUSR1 and self.saves

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        requested, now = signal.Signals(number), time.monotonic()
        if requested is signal.SIGTERM:
            if self._terminated_at is not None and now - self._terminated_at > _REPEAT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._terminated_at = self._terminated_at or now
        is_first, self._urgency = not self._urgency, max(self._urgency, _URGENCY[requested])
        if is_first and current_rank() == 0:
            again = "; a second one aborts the run without saving" if requested is signal.SIGINT else ""
            say(f"{requested.name}: stopping at once in a rollout, otherwise at the end of this step{again}")


def say(text: str) -> None:
    """Write a line to stderr, safe in a signal handler: the signal may interrupt a print, and the reader may be gone."""
    with suppress(OSError):
        os.write(2, f"erollout: {text}\n".encode())


@contextmanager
def _ended_by_a_second_interrupt() -> Iterator[None]:
    """End the process at a second SIGINT, from a thread: the main thread handles signals only between Python instructions, and
    may be blocked in a collective."""
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
    """Context that handles stop signals and writes the verdict at its end. If it fails after `begin`, there is no verdict.

    Afterwards a rank ignores the signals, because others may still be in the context, and a rank that a late signal ends would
    count as crashed.

    Raises SystemExit(143) after a SIGTERM and SystemExit(130) after a SIGINT, unless a launcher started this process, which
    would take that for a crash.
    Raises UserError if the verdict can't be written.
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
    try:
        write_atomically(path, f"{verdict}\n")
    except OSError as error:
        raise UserError(f"train.output_dir: can't write {path}: {error.strerror}; free space or make it writable") from error
