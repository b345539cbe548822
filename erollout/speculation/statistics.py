"""Counts of drafts and the figures defined by them, summed over replicas by `merge`. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

ENOUGH_TO_JUDGE, BROKEN_BELOW = 500, 0.05
"""Drafted tokens, and acceptance rate, from and below which a rollout's drafter counts as broken."""


@dataclass(slots=True)
class SpeculationStatistics:
    """Draft counts of one rollout. A draft is the run of tokens proposed for one sequence and verified in one pass."""

    num_drafts: int = 0
    requested: int = 0
    """Number of draft tokens requested of a proposer, which may have had fewer."""
    drafted: int = 0
    """Number of drafted tokens."""
    accepted: int = 0
    """Number of draft tokens that the target accepted."""
    emitted: int = 0
    """Number of accepted tokens that are part of a response: those after a token that ended it are not."""
    drafted_at: list[int] = field(default_factory=list)
    """Number of tokens drafted at the first, second, ... position."""
    accepted_at: list[int] = field(default_factory=list)
    """Number of tokens accepted at the first, second, ... position; as long as drafted_at."""
    seconds_drafting: float = 0.0
    """Drafting time by the host's clock: on an accelerator, which works asynchronously, a part of it counts as verifying."""
    seconds_verifying: float = 0.0
    """Time of passes with drafts: the target's forward pass, including other sequences that share it, and acceptance."""

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def proposed_share(self) -> float:
        """Share of the requested tokens that the proposer had; 1 if none was requested."""
        return self.drafted / self.requested if self.requested else 1.0

    @property
    def acceptance_length(self) -> float:
        """Mean number of tokens per verify pass of a sequence, including the recovered or bonus token; 1 without drafts."""
        return 1 + self.accepted / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of tokens accepted at the first, second, ... position: a token counts as rejected once one before it is."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted_at, self.drafted_at, strict=True)]

    @property
    def wasted(self) -> int:
        """Number of drafted tokens that are part of no response."""
        return self.drafted - self.emitted

    def record(self, drafted: int, accepted: int, emitted: int) -> None:
        """Count one draft. 0 <= emitted <= accepted <= drafted, and drafted is at least 1."""
        assert 0 <= emitted <= accepted <= drafted and drafted
        self.num_drafts += 1
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted
        self.drafted_at = _added(self.drafted_at, [1] * drafted)
        self.accepted_at = _added(self.accepted_at, [int(i < accepted) for i in range(drafted)])

    def add(self, part: "SpeculationStatistics") -> None:
        """Add the counts of another instance."""
        self.num_drafts += part.num_drafts
        self.requested += part.requested
        self.drafted += part.drafted
        self.accepted += part.accepted
        self.emitted += part.emitted
        self.drafted_at = _added(self.drafted_at, part.drafted_at)
        self.accepted_at = _added(self.accepted_at, part.accepted_at)
        self.seconds_drafting += part.seconds_drafting
        self.seconds_verifying += part.seconds_verifying


def merge(parts: Iterable[SpeculationStatistics]) -> SpeculationStatistics:
    """The sum of the statistics of several replicas or rollouts, seconds included."""
    total = SpeculationStatistics()
    for part in parts:
        total.add(part)
    return total


def _added(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]


def looks_broken(statistics: SpeculationStatistics) -> bool:
    """Whether a drafter made of the policy's own weights agrees with it so rarely that its numbers must be wrong.

    Coarse formats of a trained policy reach 0.6 and more; a drafter whose scales or layout are wrong is at chance.
    """
    return statistics.drafted >= ENOUGH_TO_JUDGE and statistics.acceptance_rate < BROKEN_BELOW
