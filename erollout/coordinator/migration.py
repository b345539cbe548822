"""Migration of the tail's sequences between replicas. Pure.

When every prompt is dispatched, some replicas finish early and others have long responses left. A sequence can resume on any
replica: its tokens are sent and prefilled again. This pays where smaller batches are faster, which depends on the device, the
drafter and the batch: 4 sequences instead of 2 cost nothing where a step only reads weights, but do cost with speculation.

The time that a replica takes for k of n sequences follows from the lengths of the last rollout at the sequences' present age:
half are complete after q(1/2) more tokens, three quarters after q(3/4), ..., and the last after q(n / (n + 1)):

    seconds(k) = sum over j of (q(1 - 2^-(j+1)) - q(1 - 2^-j)) * seconds_per_token(3/4 k 2^-j)

Splitting does not shorten the longest of n responses: it only makes each of its tokens faster.

Only an idle replica receives sequences, because it has no response of its own that they could delay. The source keeps some, so
sequences do not migrate back and forth: between two opposite moves of a pair, one of the two completed all that it had.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from erollout.coordinator.lengths import RemainingLengths
from erollout.coordinator.occupancy import Occupancy
from erollout.coordinator.throughput import seconds_per_token

MOVES_PER_WINDOW = 64
GAIN = 0.05
"""Least share of the source's remaining time that a move must save."""


@dataclass(frozen=True, slots=True)
class Move:
    """Migration of sequences, as their tokens, from one replica to another."""

    source: int
    target: int
    num_sequences: int
    """Upper limit: the source sends what it still has."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the time until a batch of sequences is complete, during which the number alive is taken as constant."""

    tokens: float
    """Tokens that each living sequence gets in this stage."""
    alive: float
    """Mean share of the sequences that are alive."""


class Migration:
    """The migration decisions of one rollout. The same arguments on every replica."""

    def __init__(self, max_num_seqs: int, lengths: RemainingLengths, window_seconds: float) -> None:
        self.max_num_seqs = max_num_seqs
        self.lengths = lengths
        self.window_seconds = window_seconds
        self._before: Sequence[Occupancy] = ()

    def moves(self, window: Sequence[Occupancy]) -> tuple[Move, ...]:
        """Moves from the replicas that take longest to idle ones, at most one per replica.

        Called with every window once every prompt is dispatched.
        """
        moves = []
        targets = [replica for replica, occupancy in enumerate(window) if not occupancy.outstanding][:MOVES_PER_WINDOW]
        for source, target in zip(self._slowest(window, len(targets)), targets, strict=False):
            if (count := self._count(window, source, target)) > 0:
                moves.append(Move(source, target, count))
        self._before = window
        return tuple(moves)

    def seconds(self, occupancy: Occupancy, sequences: int, stages: Sequence[Stage]) -> float:
        """Predicted seconds of a replica for `sequences`."""
        return sum(s.tokens * seconds_per_token(occupancy.curve, s.alive * sequences, self.max_num_seqs) for s in stages)

    def stages(self, sequences: int, age: float) -> list[Stage]:
        """The stages until all of `sequences` responses with `age` tokens are complete."""
        stages, done, tokens = [], 0.0, 0.0
        while done < sequences / (sequences + 1):
            until = min((1 + done) / 2, sequences / (sequences + 1))
            residual = self.lengths.residual(age, until)
            stages.append(Stage(residual - tokens, 0.75 * (1 - done)))
            done, tokens = until, residual
        return stages

    def _slowest(self, window: Sequence[Occupancy], count: int) -> list[int]:
        """The `count` replicas that take longest among those with sequences to spare, slowest first."""
        if not count:
            return []
        load = {replica: self._load(occupancy) for replica, occupancy in enumerate(window) if occupancy.outstanding > 1}
        return heapq.nlargest(count, load, load.__getitem__)

    def _load(self, occupancy: Occupancy) -> float:
        """Rough seconds until a replica is idle."""
        residual = self.lengths.mean_residual(occupancy.age)
        return residual * seconds_per_token(occupancy.curve, occupancy.outstanding, self.max_num_seqs)

    def _count(self, window: Sequence[Occupancy], source: int, target: int) -> int:
        """Number of sequences to move so that the later of the two finishes soonest; 0 if the gain is too small."""
        giver, taker = window[source], window[target]
        has = giver.outstanding
        stages = self.stages(has, giver.running * giver.age / has)
        since = giver.seconds - self._before[source].seconds if self._before else 0.0
        latency = max(self.window_seconds, since)

        def end(count: int) -> float:
            arrival = latency + count * giver.context * taker.prefill_seconds
            return max(self.seconds(giver, has - count, stages), self.seconds(taker, count, stages) + arrival)

        now = self.seconds(giver, has, stages)
        best = min({has // 2, has // 4, 3 * has // 4} - {0}, key=lambda count: (end(count), count))
        return best if now - end(best) > GAIN * now else 0
