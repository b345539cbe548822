"""Delivery of the journal to the tracking store by a background thread: in order, in batches, with retries."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from erollout.security.redaction import redact
from erollout.tracking.journal import Journal, JournalEntry

logger = logging.getLogger(__name__)

METRICS_PER_BATCH = 1000
"""MLflow's limit per call."""
ASIDE_AT_ONCE = 20
"""Number of records set aside that are retried at a time."""


class RejectedError(Exception):
    """Raised if the store rejects records for good."""


class RefusedForNow(Exception):
    """Raised if the store accepts other records but not these, for unknown reasons: it may be damaged and be restored later."""


class Delivery:
    """Sends the journal's records after its delivered offset.

    If the store does not answer, this is logged once and retried with growing pauses; its return is logged too. A record that
    the store rejects for good is counted and skipped, so that it does not block those after it. One that it rejects for now is
    set aside and retried; the delivered offset stays before it, so that the next attempt at the run retries it too.
    """

    def __init__(
        self,
        journal: Journal,
        send: Callable[[list[dict[str, Any]]], None],
        store_name: str,
        interval: float = 1.0,
        longest_pause: float = 60.0,
    ) -> None:
        """`interval`, `longest_pause`: seconds between deliveries, and between attempts while the store does not answer."""
        self._journal = journal
        self._send = send
        self._store_name = store_name
        self._interval = interval
        self._longest_pause = longest_pause
        self._wake = threading.Event()
        self._finishing = False
        self._away = False
        self.rejected = 0
        self._position = journal.delivered
        """Byte offset up to which all records are in the store, except for those set aside."""
        self._aside: deque[tuple[int, JournalEntry]] = deque()
        """Records set aside, with the offsets of their lines."""
        self._thread = threading.Thread(target=self._run, name="tracking-delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_seconds: float) -> int:
        """Deliver the rest in one attempt with a time limit. Returns the number of undelivered records."""
        self._finishing = True
        self._wake.set()
        self._thread.join(timeout_seconds)
        return len(self._aside) + self._journal.undelivered(self._position)

    def _run(self) -> None:
        pause = self._interval
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            last = self._finishing
            pause = self._interval if self._deliver_all() else min(self._longest_pause, 2 * pause)
            if last:
                return

    def _deliver_all(self) -> bool:
        """Deliver everything in the journal. Returns False if the store does not answer.

        Whatever a tracking client, its database driver or its network stack raises must not end this thread, let alone
        training: hence the broad except, which reports and tries again.
        """
        try:
            refused_again = self._try_aside()
            while entries := self._journal.read(self._position, limit=1000):
                self._journal.sync()  # delivered records must be marked even so, or they would be sent again
                for batch in group_entries(entries):
                    self._deliver(batch)
        except Exception as error:
            self._say_away(error)
            return False
        return not refused_again

    def _try_aside(self) -> bool:
        """Retry records set aside, a few at a time, because each costs several calls. Returns whether some remain."""
        for _ in range(min(len(self._aside), ASIDE_AT_ONCE)):
            start, entry = self._aside.popleft()
            self._aside.append((start, entry))
            with suppress(RefusedForNow):
                self._send_or_leave_out([entry])
                self._aside.pop()
        self._mark()
        return bool(self._aside)

    def _deliver(self, batch: list[JournalEntry]) -> None:
        try:
            self._send_or_leave_out(batch)
        except (RejectedError, RefusedForNow) as error:
            if len(batch) > 1:
                for entry in batch:
                    self._deliver([entry])
                return
            self._say_set_aside(batch[0], error)
            self._aside.append((self._position, batch[0]))
        self._position = batch[-1].end
        self._mark()

    def _send_or_leave_out(self, batch: list[JournalEntry]) -> None:
        """Send records. Raises RejectedError if some of them may be accepted singly, else what sending raises."""
        records = [entry.record for entry in batch if entry.record is not None]
        try:
            if records:
                self._send(records)
        except RejectedError as error:
            if len(batch) > 1:
                raise
            self._say_rejected(records[0], error)
        else:
            self._say_back()

    def _mark(self) -> None:
        done = min([start for start, _ in self._aside], default=self._position)
        if done != self._journal.delivered:
            self._journal.mark_delivered(done)

    def _say_away(self, error: Exception) -> None:
        if not self._away:
            logger.warning(
                "tracking store %s does not answer; training continues, metrics are kept in %s and delivered later (%s)",
                self._store_name,
                self._journal.path,
                _one_line(error),
            )
        self._away = True

    def _say_back(self) -> None:
        if self._away:
            logger.warning("tracking store %s answers again; delivering the kept records", self._store_name)
        self._away = False

    def _say_set_aside(self, entry: JournalEntry, error: Exception) -> None:
        if not self._aside and entry.record is not None:
            logger.warning(
                "tracking store %s does not accept a %s record; it is kept in %s and retried, without blocking others (%s)",
                self._store_name,
                entry.record["kind"],
                self._journal.path,
                _one_line(error),
            )

    def _say_rejected(self, record: dict[str, Any], error: RejectedError) -> None:
        if not self.rejected:
            logger.warning("tracking store %s rejects a %s record (%s)", self._store_name, record["kind"], _one_line(error))
        self.rejected += 1


def group_entries(entries: list[JournalEntry]) -> list[list[JournalEntry]]:
    """Group adjacent metrics records up to the limit per call; other records stay single. Keeps the order."""
    groups: list[list[JournalEntry]] = []
    room = 0
    for entry in entries:
        size = len(entry.record["values"]) if entry.record and entry.record["kind"] == "metrics" else 0
        if groups and 0 < size <= room:
            groups[-1].append(entry)
            room -= size
        else:
            groups.append([entry])
            room = METRICS_PER_BATCH - size if size else 0
    return groups


def _one_line(error: Exception) -> str:
    text = redact(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}"
