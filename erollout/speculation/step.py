"""A decode step as cost model, toggle and coordinator see it: its arm, its load and its outcome. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Arm:
    """One way to take a step: autoregressive (`OFF`), or drafting num_speculative_tokens and verifying them in one pass."""

    format: str = ""
    """Name of the drafter, its default format (`w4a16_clip`); "" drafts nothing."""
    num_speculative_tokens: int = 0

    @property
    def speculates(self) -> bool:
        return self.num_speculative_tokens > 0

    def __str__(self) -> str:
        return f"{self.format} n={self.num_speculative_tokens}" if self.speculates else "off"


OFF = Arm()


@dataclass(frozen=True, slots=True)
class Load:
    """Load of one replica's next forward pass, and the sequences waiting behind it."""

    decoding: int
    """Number of sequences that decode their next token or have a draft verified."""
    context: float
    """Mean number of their tokens in the KV cache; 0 without any."""
    prefill_tokens: int = 0
    """Number of prompt (or recomputed) tokens that share the pass."""
    waiting: int = 0
    """Number of sequences that are not in any pass yet."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome of one step: a forward pass with its drafts."""

    arm: Arm
    """The arm taken, with or without drafts from its proposer; OFF if no draft was requested."""
    load: Load
    """The load computed, with `decoding` and `prefill_tokens` of the pass itself."""
    seconds: float
    """Duration of the whole step, host work included, by the host's clock."""
    seconds_drafting: float = 0.0
    """Seconds of them that drafting took; 0 where the host's clock does not tell, as on an accelerator."""
    emitted: int = 0
    """Number of tokens appended to responses."""
    drafted_at: tuple[int, ...] = ()
    """Number of tokens drafted at the first, second, ... position."""
    accepted_at: tuple[int, ...] = ()
    """Number of these that were accepted."""
    finished: int = 0
    """Number of responses completed."""
    requested: int = 0
    """Number of draft tokens requested of the arm's proposer, which may have had fewer, or none; 0: as many as drafted."""

    @property
    def drafted(self) -> int:
        """Number of drafted tokens."""
        return sum(self.drafted_at)

    @property
    def proposed_share(self) -> float:
        """Share of the requested draft tokens that the proposer had; 1 if none was requested."""
        return self.drafted / self.requested if self.requested else 1.0
