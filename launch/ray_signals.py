"""Signals to a command that waits for remote ranks: kept for forwarding, and as its stop request."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 5
"""Time after the first Ctrl-C from which on a second one ends the command at once."""


class Asked:
    """Received signals, to be forwarded."""

    def __init__(self) -> None:
        self.first: str | None = None
        self._waiting: list[signal.Signals] = []
        self._interrupted_at: float | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > _AGAIN_SECONDS:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        passed = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        self.first = self.first or passed.name
        self._waiting.append(passed)

    def take(self) -> list[signal.Signals]:
        """Signals received since the last call."""
        taken, self._waiting = self._waiting, []
        return taken


@contextmanager
def listening() -> Iterator[Asked]:
    asked = Asked()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, asked.note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
