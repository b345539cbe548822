"""Scoring failures by kind: counted in the metrics, logged once."""

from collections import Counter
from collections.abc import Iterable

from erollout.errors import UserError

KINDS = {"scorer took more than": "time_limit", "scorer ended its process": "process_ended"}
"""Kinds of failure, by the beginning of the error's text; an exception's kind is its class name."""


class AllScoringFailed(UserError):
    """Raised if no response of a rollout was scored, because there is nothing to train on."""


def kind_of(error: str) -> str:
    for beginning, kind in KINDS.items():
        if error.startswith(beginning):
            return kind
    name = error.partition(":")[0]
    return name if name.isidentifier() else "not_started"


class FailureLog:
    """The first error of each kind so far."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def note(self, errors: Iterable[str]) -> tuple[Counter[str], list[str]]:
        """Counts of the errors by kind, and the first text of each new kind."""
        counts: Counter[str] = Counter()
        new = []
        for error in errors:
            kind = kind_of(error)
            counts[kind] += 1
            if kind not in self._known:
                self._known.add(kind)
                new.append(error)
        return counts, new
