"""What a decode replica tells the others at a step border: a short vector of numbers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

CURVE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that a replica tells its speed for: powers of two."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one replica in one rollout, once it has carried out the last decision. Counts of work done are the rollout's."""

    steps: int = 0
    arm: int = 0
    """Index into the agreed arms: what its last step did."""
    running: int = 0
    """Responses that decode or prefill now."""
    waiting: int = 0
    """Responses queued here that no pass runs now, siblings that wait for their prompt included."""
    finished: int = 0
    """Responses completed here."""
    claimed: int = 0
    """Prompts that it has claimed while no window came (`StateMachine.claim`)."""
    asked: int = 0
    """1: it was asked to stop."""
    num_drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    context: float = 0.0
    """Mean tokens of the running ones."""
    age: float = 0.0
    """Mean response tokens of the running ones."""
    seconds: float = 0.0
    """Since the rollout began, by its own clock."""
    prefill_seconds: float = 0.0
    """Predicted, of one prompt token."""
    seconds_per_token: tuple[float, ...] = ()
    """Predicted, per arm of the agreed list: seconds per token of a sequence at the present load (inf: not possible)."""
    curve: tuple[float, ...] = ()
    """Predicted with the best arm, per CURVE_BATCHES: seconds in which every running sequence gets one token."""

    @property
    def outstanding(self) -> int:
        """Responses that it still has to complete."""
        return self.running + self.waiting

    def to_vector(self) -> list[float]:
        """All fields, flat. As long for every replica, where the arms are agreed."""
        return [*(float(getattr(self, name)) for name in _SCALARS), *self.seconds_per_token, *self.curve]

    @classmethod
    def from_vector(cls, vector: Sequence[float], num_arms: int) -> "Occupancy":
        """What `to_vector` made: counts are whole numbers again."""
        start = len(_SCALARS)
        arms, curve = tuple(vector[start : start + num_arms]), tuple(vector[start + num_arms :])
        return cls(*map(int, vector[:_COUNTS]), *vector[_COUNTS:start], arms, curve)  # type: ignore[call-arg, arg-type]


_SCALARS = tuple(field.name for field in fields(Occupancy) if field.type in (int, float))
"""All fields but the last two."""
_COUNTS = sum(field.type is int for field in fields(Occupancy))
"""So many come first."""
