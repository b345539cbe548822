"""The signals that ask a run to stop, and how they wait for a process that does not listen yet. Light: scorers load it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
"""A scheduler, and a terminal, send them to all processes of a job, whichever of them is meant."""

AGAIN_SECONDS = 0.3
"""A second SIGINT sooner is the first one: a terminal, a launcher and what wraps them have all sent it."""
ENDED_AT_ONCE = "SIGINT again: ended at once; the same command goes on from the newest checkpoint, if there is one"
"""The last line of a run that Ctrl-C was pressed twice in."""


@contextmanager
def stops_wait() -> Iterator[None]:
    """In the block they wait for this thread. A process that is started there inherits that, also beyond its exec, until it
    unblocks them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def starting(speaks: bool = True) -> Iterator[None]:
    """In the block, which loads libraries, Ctrl-C ends the process at once: nothing is to be saved yet, and a library may make
    another error of an interrupt. Not outside the main thread.

    speaks: says so, which one process of a run does.
    """

    def end(number: int, frame: object) -> None:
        if speaks:
            os.write(2, b"erollout: interrupted\n")
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not _PYTHONS:
        yield  # whoever has set another handler, or ignores it, knows better
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _PYTHONS)


_PYTHONS = signal.default_int_handler
