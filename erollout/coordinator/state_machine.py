"""The cluster's decisions: a deterministic state machine that every replica runs over the same windows of occupancies. Pure.

Equal inputs give equal decisions: nothing local enters, neither a clock nor a replica's own cost model. What a replica predicts
for itself is part of its occupancy, which it reports after it has carried out the previous decision. So a window counts every
dispatched prompt and every migrated sequence at exactly one replica, and the rollout is complete when none has any left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from erollout.config import CoordinatorConfig
from erollout.coordinator.dispatch import Dispatch
from erollout.coordinator.lengths import RemainingLengths
from erollout.coordinator.migration import Migration, Move
from erollout.coordinator.occupancy import Occupancy

ARM_MARGIN = 0.03
"""Least relative gain for which the cluster changes its arm."""


@dataclass(frozen=True, slots=True)
class ClusterDecision:
    """The decision that all replicas take from one window."""

    epoch: int
    """Number of the window, from 1; 0 before the first."""
    arm: int | None = None
    """Index into the agreed arms, for all replicas; None: each replica chooses its own."""
    dispatched: tuple[tuple[int, ...], ...] = ()
    """Prompts dispatched to each replica, as positions in the rollout's list; empty: none to any replica."""
    moves: tuple[Move, ...] = ()
    """Carried out before the next window."""
    finished: bool = False
    """Every response is complete: no window follows."""
    interrupted: bool = False
    """A stop was requested at a replica: all abort their remaining responses, and no window follows."""

    @property
    def is_last(self) -> bool:
        return self.finished or self.interrupted


class StateMachine:
    """The cluster's decisions in one rollout. The same arguments on every replica."""

    def __init__(
        self,
        options: CoordinatorConfig,
        replicas: int,
        num_prompts: int,
        group_size: int,
        max_num_seqs: int,
        lengths: Sequence[int],
        max_tokens: int,
        num_done: int = 0,
    ) -> None:
        """
        Args:
            num_prompts: number of prompts of the whole cluster, each sampled group_size times.
            max_num_seqs: largest batch of one replica.
            lengths: response lengths of the last rollout on all replicas; empty before the first.
            num_done: number of responses that an interrupted attempt has completed.
        """
        self.options = options
        self.num_responses = num_prompts * group_size - num_done
        known = RemainingLengths(lengths, max_tokens)
        self._dispatch = Dispatch(replicas, num_prompts, group_size, max_num_seqs, known)
        self._migration = Migration(max_num_seqs, known, options.window_seconds)
        self._epoch = 0
        self._arm = 0 if options.policy == "cluster" else None
        self._claimed_here = 0
        """Number of prompts claimed by this process's replica; the others and `advance` learn it from its occupancy."""

    def start(self) -> ClusterDecision:
        """The decision before the first window: the initial prompts of every replica."""
        static = self.options.dispatch == "static"
        return ClusterDecision(0, self._arm, self._dispatch.everything() if static else self._dispatch.first())

    def advance(self, window: Sequence[Occupancy]) -> ClusterDecision:
        """The next decision, from one occupancy per replica."""
        self._epoch += 1
        self._dispatch.skip_claims(window)
        if self._dispatch.is_done and not any(occupancy.outstanding for occupancy in window):
            done = sum(occupancy.finished for occupancy in window)
            assert done >= self.num_responses, f"{self.num_responses - done} responses were lost"
            return ClusterDecision(self._epoch, self._arm, finished=True)
        if any(occupancy.stop_requested for occupancy in window):
            return ClusterDecision(self._epoch, self._arm, interrupted=True)
        if self._arm is not None:
            self._arm = self._best_arm(window, self._arm)
        moves = self._dispatch.is_done and self.options.policy == "makespan"
        return ClusterDecision(
            self._epoch,
            self._arm,
            dispatched=self._dispatch.more(window),
            moves=self._migration.moves(window) if moves else (),
        )

    def claim(self, replica: int) -> int | None:
        """Claim a prompt for this process's replica when no window arrives; None: there is none left to claim.

        The replica's occupancies report the claim from now on, as `claimed`.
        """
        prompt = self._dispatch.claimable(replica, self._claimed_here)
        self._claimed_here += prompt is not None
        return prompt

    @property
    def claimed(self) -> int:
        """Number of prompts that this process's replica has claimed, for its occupancy."""
        return self._claimed_here

    def mine(self, decision: ClusterDecision, replica: int) -> tuple[int, ...]:
        """The prompts that a decision dispatches to this process's replica, without those that it has already claimed."""
        given = decision.dispatched[replica] if decision.dispatched else ()
        return tuple(prompt for prompt in given if not self._dispatch.is_claim(prompt, replica, self._claimed_here))

    def _best_arm(self, window: Sequence[Occupancy], present: int) -> int:
        """The arm for all replicas: least time of the slowest one in lock step, else least sum over outstanding responses."""
        busy = [occupancy for occupancy in window if occupancy.running]
        if not busy:
            return present
        columns = zip(*(occupancy.seconds_per_token for occupancy in busy), strict=True)
        if self.options.lock_step:
            costs = [max(column) for column in columns]
        else:
            weights = [occupancy.outstanding for occupancy in busy]
            costs = [sum(w * s for w, s in zip(weights, column, strict=True)) for column in columns]
        best = min(range(len(costs)), key=costs.__getitem__)
        return best if costs[best] < (1 - ARM_MARGIN) * costs[present] else present
