"""The signals that ask a run to stop, and how they wait for a process that does not listen yet. Light: scorers load it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = frozenset({signal.SIGTERM, signal.SIGUSR1})
"""A scheduler sends them to all processes of a job, whichever of them it means."""


@contextmanager
def stops_wait() -> Iterator[None]:
    """In the block they wait for this thread. A process that is started there inherits that, also beyond its exec, until it
    unblocks them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
