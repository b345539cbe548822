"""What a decode replica tells the others at a step border: a short vector of numbers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

CURVE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that a replica tells its speed for."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one replica in one rollout. Counts are totals since the rollout began unless said otherwise."""

    steps: int = 0
    running: int = 0
    """Sequences that decode or prefill now."""
    waiting: int = 0
    """Sequences queued here that no pass runs now."""
    context: float = 0.0
    """Mean tokens of the running ones."""
    finished: int = 0
    """Responses completed here."""
    groups_taken: int = 0
    """Prompts (groups) of the shared queue that this replica has queued: acknowledges what was handed out."""
    moves_out: int = 0
    """Moves (not sequences) that it has answered as the source."""
    moves_in: int = 0
    """Moves that it has taken in as the target."""
    num_drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    """Since the rollout began, by its own clock."""
    prefill_seconds: float = 0.0
    """Predicted, of one prompt token."""
    seconds_per_token: tuple[float, ...] = ()
    """Predicted, per arm of the agreed list: seconds per token of a sequence at the present load (inf: not possible)."""
    curve: tuple[float, ...] = ()
    """Predicted with the best arm, per CURVE_BATCHES: seconds in which every running sequence gets one token."""

    def to_vector(self) -> list[float]:
        """All fields, flat. As long for every replica, where the arms are agreed."""
        values: list[float] = []
        for field in fields(self):
            value = getattr(self, field.name)
            values.extend(value if isinstance(value, tuple) else (float(value),))
        return values

    @classmethod
    def from_vector(cls, vector: Sequence[float], num_arms: int) -> "Occupancy":
        """What `to_vector` made: counts are whole numbers again."""
        *scalars, _, _ = fields(cls)
        values = {f.name: int(v) if f.type is int else v for f, v in zip(scalars, vector, strict=False)}
        start = len(scalars)
        rest = tuple(vector[start : start + num_arms]), tuple(vector[start + num_arms :])
        return cls(**values, seconds_per_token=rest[0], curve=rest[1])  # type: ignore[arg-type]
