"""Signals that request a stop, and how to defer them until a process is ready. Light: scorers load it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
"""Stop signals, which schedulers and terminals send to all processes of a job."""

AGAIN_SECONDS = 0.3
"""A second SIGINT within this time counts as the first one: terminal, launcher and wrappers may each have sent it."""
ENDED_AT_ONCE = "SIGINT again: aborted; run the same command to resume from the newest checkpoint, if there is one"
"""Last line of a run after a second Ctrl-C."""


@contextmanager
def stops_wait() -> Iterator[None]:
    """Context that blocks the stop signals for this thread. Processes started in it inherit this, through exec, until they
    unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def starting(speaks: bool = True) -> Iterator[None]:
    """Context for loading libraries, in which Ctrl-C ends the process at once: there is nothing to save yet, and a library may
    turn an interrupt into another error. Only for the main thread.

    speaks: whether to print a line, which one process of a run does.
    """

    def end(number: int, frame: object) -> None:
        if speaks:
            os.write(2, b"erollout: interrupted\n")
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not _PYTHONS:
        yield  # a handler set by others, or SIG_IGN, takes precedence
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _PYTHONS)


_PYTHONS = signal.default_int_handler
