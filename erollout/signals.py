"""The signals that ask a run to stop, and how they wait for a process that does not listen yet. Light: scorers load it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
"""A scheduler, and a terminal, send them to all processes of a job, whichever of them is meant."""

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
