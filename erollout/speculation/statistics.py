"""What speculation achieved: the counts, and the figures that are defined by them. Pure; sums over replicas by `merge`."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest


@dataclass(slots=True)
class SpeculationStatistics:
    """Of one rollout. A draft is one sequence's run of proposed tokens, verified in one pass."""

    num_drafts: int = 0
    drafted: int = 0
    """Tokens proposed."""
    accepted: int = 0
    """Tokens that the target took over."""
    emitted: int = 0
    """Accepted tokens that stand in a response: not those after a token that ended it."""
    drafted_at: list[int] = field(default_factory=list)
    """Tokens proposed as a draft's first, second, ..."""
    accepted_at: list[int] = field(default_factory=list)
    """Tokens accepted as a draft's first, second, ...; as long as drafted_at."""
    seconds_drafting: float = 0.0
    """By the host's clock: on an accelerator, which works on while the host returns, a part of it counts as verifying."""
    seconds_verifying: float = 0.0
    """In passes with drafts: the target's forward pass, over whatever shares it, and the decision."""

    @property
    def acceptance_rate(self) -> float:
        """Of the proposed tokens, the share accepted; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens that a pass with a draft yields on average, the recovered or bonus token included; 1 without any draft."""
        return 1 + self.accepted / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of a draft's first, second, ... tokens that were accepted: a token counts as rejected once one before it is."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted_at, self.drafted_at, strict=True)]

    @property
    def wasted(self) -> int:
        """Tokens proposed that stand in no response."""
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
        """Count what another one has counted."""
        self.num_drafts += part.num_drafts
        self.drafted += part.drafted
        self.accepted += part.accepted
        self.emitted += part.emitted
        self.drafted_at = _added(self.drafted_at, part.drafted_at)
        self.accepted_at = _added(self.accepted_at, part.accepted_at)
        self.seconds_drafting += part.seconds_drafting
        self.seconds_verifying += part.seconds_verifying


def merge(parts: Iterable[SpeculationStatistics]) -> SpeculationStatistics:
    """The statistics of several replicas or rollouts together; seconds are added too."""
    total = SpeculationStatistics()
    for part in parts:
        total.add(part)
    return total


def _added(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]
