"""The state that a decode replica reports to the others at a step border: a short vector of numbers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

CURVE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes for which a replica reports its predicted step time: powers of two."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """State of one replica after it has carried out the last decision. Counters run from the start of the rollout."""

    steps: int = 0
    arm: int = 0
    """Arm of its last step, an index into the agreed list of arms."""
    running: int = 0
    """Responses in decoding or prefill."""
    waiting: int = 0
    """Responses queued here and not in any pass, including siblings that wait for their shared prompt."""
    finished: int = 0
    """Responses completed here."""
    claimed: int = 0
    """Prompts claimed while no window arrived (`StateMachine.claim`)."""
    asked: int = 0
    """1: a stop was requested here."""
    num_drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    context: float = 0.0
    """Mean number of tokens of the running sequences, prompt included."""
    age: float = 0.0
    """Mean number of response tokens of the running sequences."""
    seconds: float = 0.0
    """Seconds since the rollout began, by its own clock."""
    prefill_seconds: float = 0.0
    """Predicted seconds per prompt token."""
    seconds_per_token: tuple[float, ...] = ()
    """Predicted seconds per token of a sequence at the present load, per agreed arm; inf: not available."""
    curve: tuple[float, ...] = ()
    """Predicted seconds per token of every running sequence with the best arm, at each of CURVE_BATCHES."""

    @property
    def outstanding(self) -> int:
        """Responses that it has not completed yet."""
        return self.running + self.waiting

    def to_vector(self) -> list[float]:
        """All fields, flat. The length is the same on every replica, because the arms are agreed."""
        return [*(float(getattr(self, name)) for name in _SCALARS), *self.seconds_per_token, *self.curve]

    @classmethod
    def from_vector(cls, vector: Sequence[float], num_arms: int) -> "Occupancy":
        """The inverse of `to_vector`; counters are integers again."""
        start = len(_SCALARS)
        arms, curve = tuple(vector[start : start + num_arms]), tuple(vector[start + num_arms :])
        return cls(*map(int, vector[:_COUNTS]), *vector[_COUNTS:start], arms, curve)  # type: ignore[call-arg, arg-type]


_SCALARS = tuple(field.name for field in fields(Occupancy) if field.type in (int, float))
"""All fields but the last two, counters first."""
_COUNTS = sum(field.type is int for field in fields(Occupancy))
"""Number of counters."""
