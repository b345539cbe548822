"""The cluster's decisions: a deterministic machine that every replica runs over the same windows of occupancies. Pure.

Equal inputs, equal decisions: nothing local enters, no clock, no cost model of one's own. What a replica predicts for itself
stands in its occupancy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from erollout.config import CoordinatorConfig
from erollout.coordinator.occupancy import Occupancy


@dataclass(frozen=True, slots=True)
class Move:
    """Sequences to go from one replica to another, by their tokens."""

    source: int
    target: int
    num_sequences: int
    """At most; the source gives what it still has."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Of one window."""

    epoch: int
    """Number of the window, from 1."""
    arm: int | None = None
    """Index into the agreed arms, for all replicas; None: each for itself."""
    hand_out: tuple[tuple[int, ...], ...] = ()
    """Per replica: prompts (positions in the rollout's list) that are its own from now on."""
    moves: tuple[Move, ...] = ()
    """Carried out in this order before the next window."""
    finished: bool = False
    """Every response is complete: no window follows."""


class StateMachine:
    """Of one rollout. The same arguments on every replica."""

    def __init__(
        self,
        options: CoordinatorConfig,
        replicas: int,
        num_prompts: int,
        group_size: int,
        max_num_seqs: int,
        lengths: Sequence[int],
        max_tokens: int,
    ) -> None:
        """
        Args:
            num_prompts: of the whole cluster, each sampled group_size times.
            max_num_seqs: that one replica decodes at once.
            lengths: of the last rollout's responses, of all replicas; empty before the first.
        """
        raise NotImplementedError

    def start(self) -> Decision:
        """Before the first window: what every replica begins with."""
        raise NotImplementedError

    def advance(self, window: Sequence[Occupancy]) -> Decision:
        """The next decision, from one occupancy per replica."""
        raise NotImplementedError
