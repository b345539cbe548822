"""A decode step as cost model, toggle and coordinator see it: ways to take it, its load, what came of it. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Arm:
    """One way to take a step: autoregressive (`OFF`), or drafting so many tokens and verifying them in one pass."""

    format: str = ""
    """Name of the drafter: its default format (`w4a16_clip`); "" drafts nothing."""
    num_speculative_tokens: int = 0

    @property
    def speculates(self) -> bool:
        return self.num_speculative_tokens > 0

    def __str__(self) -> str:
        return f"{self.format} n={self.num_speculative_tokens}" if self.speculates else "off"


OFF = Arm()


@dataclass(frozen=True, slots=True)
class Load:
    """What one replica is about to compute in its next forward pass, and what waits behind it."""

    decoding: int
    """Sequences that get their next token, or a run of drafts verified."""
    context: float
    """Mean tokens of those in the cache; 0 without any."""
    prefill_tokens: int = 0
    """Prompt (or recomputed) tokens that share the pass."""
    waiting: int = 0
    """Sequences that no pass runs yet."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Of one step: a forward pass, with its drafts."""

    arm: Arm
    """What was done: OFF where no sequence could have drafts."""
    load: Load
    """What was computed: `decoding` and `prefill_tokens` of the pass itself."""
    seconds: float
    """Of the whole step, the host's work included, by the host's clock."""
    seconds_drafting: float = 0.0
    emitted: int = 0
    """Tokens appended to responses."""
    drafted_at: tuple[int, ...] = ()
    """Tokens proposed as a draft's first, second, ..."""
    accepted_at: tuple[int, ...] = ()
    """Of these, accepted."""
    finished: int = 0
    """Responses that ended."""
