"""Which sequences of the tail go to another replica. Pure.

When every prompt has its replica, some replicas end early and others have long responses left. A sequence can go on anywhere:
its tokens are sent and computed again. That is worth it where smaller batches are faster, and this depends on the device, the
drafter and the batch: 4 sequences instead of 2 cost nothing where a step only reads weights, but with speculation they do.

How long a replica takes for k of n sequences, of which half are complete after q(1/2) more tokens, three quarters after q(3/4),
..., and the last after q(n / (n + 1)), as the lengths of the last rollout say for their present age:

    seconds(k) = sum over j of (q(1 - 2^-(j+1)) - q(1 - 2^-j)) * seconds_per_token(3/4 k 2^-j)

The longest of n responses does not get shorter when they are split: only each of its tokens comes faster.

Only a replica with nothing left takes sequences: it has no response of its own that they could make late. And the source keeps
some, so nothing goes back and forth: between two moves of a pair in opposite directions one of them completed all it had.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from erollout.coordinator.lengths import RemainingLengths
from erollout.coordinator.occupancy import Occupancy
from erollout.coordinator.throughput import seconds_per_token

MOVES_PER_WINDOW = 64
GAIN = 0.05
"""Share of the source's time that a move must save."""


@dataclass(frozen=True, slots=True)
class Move:
    """Sequences to go from one replica to another, by their tokens."""

    source: int
    target: int
    num_sequences: int
    """At most; the source gives what it still has."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Of the time until several sequences are complete."""

    tokens: float
    """That each of them gets which is alive."""
    alive: float
    """Share of the sequences that are, on the mean."""


class Rebalancing:
    """Of one rollout. The same arguments on every replica."""

    def __init__(self, max_num_seqs: int, lengths: RemainingLengths, window_seconds: float) -> None:
        self.max_num_seqs = max_num_seqs
        self.lengths = lengths
        self.window_seconds = window_seconds
        self._before: Sequence[Occupancy] = ()

    def moves(self, window: Sequence[Occupancy]) -> tuple[Move, ...]:
        """From the replicas that take longest to those that have nothing left; each one in one move at most.

        Called with every window in which every prompt has its replica.
        """
        moves = []
        targets = [replica for replica, occupancy in enumerate(window) if not occupancy.outstanding][:MOVES_PER_WINDOW]
        for source, target in zip(self._slowest(window, len(targets)), targets, strict=False):
            if (count := self._count(window, source, target)) > 0:
                moves.append(Move(source, target, count))
        self._before = window
        return tuple(moves)

    def seconds(self, occupancy: Occupancy, sequences: int, stages: Sequence[Stage]) -> float:
        """Predicted time of a replica for so many sequences."""
        return sum(s.tokens * seconds_per_token(occupancy.curve, s.alive * sequences, self.max_num_seqs) for s in stages)

    def stages(self, sequences: int, age: float) -> list[Stage]:
        """Until so many sequences of that age are complete."""
        stages, done, tokens = [], 0.0, 0.0
        while done < sequences / (sequences + 1):
            until = min((1 + done) / 2, sequences / (sequences + 1))
            residual = self.lengths.residual(age, until)
            stages.append(Stage(residual - tokens, 0.75 * (1 - done)))
            done, tokens = until, residual
        return stages

    def _slowest(self, window: Sequence[Occupancy], count: int) -> list[int]:
        """The replicas that take longest, of those with sequences to spare, the slowest first."""
        if not count:
            return []
        load = {replica: self._load(occupancy) for replica, occupancy in enumerate(window) if occupancy.outstanding > 1}
        return heapq.nlargest(count, load, load.__getitem__)

    def _load(self, occupancy: Occupancy) -> float:
        """Roughly the seconds until a replica has nothing left."""
        residual = self.lengths.mean_residual(occupancy.age)
        return residual * seconds_per_token(occupancy.curve, occupancy.outstanding, self.max_num_seqs)

    def _count(self, window: Sequence[Occupancy], source: int, target: int) -> int:
        """How many sequences to move: so that both are done first; 0 if that gains too little."""
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
