"""Dispatch of prompts to replicas. Pure.

Prompts are dispatched in ascending order and never recalled. A replica that no window reaches claims prompts of its home (every
replicas-th one, starting at its own number) in descending order, so that dispatch and claims meet only near the end. The other
replicas learn of a claim from the next occupancy. A prompt dispatched to another replica in between is sampled twice, which
costs time and nothing else.
"""

import heapq
from collections.abc import Iterator, Sequence

from erollout.coordinator.lengths import RemainingLengths
from erollout.coordinator.occupancy import Occupancy
from erollout.coordinator.throughput import seconds_per_token

RESERVE_FACTOR = 2
"""Target length of a replica's queue, in multiples of the responses that it completed between the last two windows."""


class Dispatch:
    """The dispatch of one rollout. The same arguments on every replica."""

    def __init__(self, replicas: int, num_prompts: int, group_size: int, max_num_seqs: int, lengths: RemainingLengths) -> None:
        self.replicas = replicas
        self.num_prompts = num_prompts
        self.group_size = group_size
        self.max_num_seqs = max_num_seqs
        self.lengths = lengths
        self._next = 0
        """The first prompt that is neither dispatched nor claimed."""
        self._claimed = [0] * replicas
        """Number of claimed prompts per replica, from the last window."""
        self._finished = [0] * replicas

    @property
    def is_done(self) -> bool:
        """Every prompt belongs to a replica."""
        return self._next >= self.num_prompts

    def everything(self) -> tuple[tuple[int, ...], ...]:
        """All prompts, round-robin."""
        self._next = self.num_prompts
        return tuple(tuple(range(replica, self.num_prompts, self.replicas)) for replica in range(self.replicas))

    def first(self) -> tuple[tuple[int, ...], ...]:
        """The initial prompts, round-robin: enough to fill every replica's slots, and one more each for the first free slot."""
        rounds = -(-self.max_num_seqs // self.group_size) + 1
        self._next = min(rounds * self.replicas, self.num_prompts)
        return tuple(tuple(range(replica, self._next, self.replicas)) for replica in range(self.replicas))

    def skip_claims(self, window: Sequence[Occupancy]) -> None:
        """Skip the prompts that replicas have claimed. Called before `more`, with the same window."""
        self._claimed = [occupancy.claimed for occupancy in window]
        self._skip_claimed()

    def more(self, window: Sequence[Occupancy]) -> tuple[tuple[int, ...], ...]:
        """The prompts that replicas with short queues get now. When too few are left, the replica predicted to be free first
        gets the next one."""
        given: dict[int, list[int]] = {}
        if not self.is_done:
            for replica in self._turns(window, self._room(window)):
                if (prompt := self._take()) is None:
                    break
                given.setdefault(replica, []).append(prompt)
        self._finished = [occupancy.finished for occupancy in window]
        return tuple(tuple(given.get(replica, ())) for replica in range(self.replicas)) if given else ()

    def claimable(self, replica: int, claimed: int) -> int | None:
        """The next prompt that a replica with `claimed` claims may claim, by the decisions known here; None: there is none."""
        prompt = self._home_end(replica) - claimed * self.replicas
        return prompt if prompt >= self._next else None

    def is_claim(self, prompt: int, replica: int, claimed: int) -> bool:
        """Whether the prompt is among the first `claimed` ones that the replica claims."""
        return prompt % self.replicas == replica and prompt > self._home_end(replica) - claimed * self.replicas

    def _home_end(self, replica: int) -> int:
        """The last prompt of a replica's home; negative if there is none."""
        last = self.num_prompts - 1
        return last - (last - replica) % self.replicas

    def _skip_claimed(self) -> None:
        while not self.is_done:
            home = self._next % self.replicas
            if not self.is_claim(self._next, home, self._claimed[home]):
                return
            self._next += 1

    def _take(self) -> int | None:
        """The next prompt that is neither dispatched nor claimed; None: there is none."""
        if self.is_done:
            return None
        prompt = self._next
        self._next += 1
        self._skip_claimed()
        return prompt

    def _room(self, window: Sequence[Occupancy]) -> dict[int, int]:
        """Number of prompts that each replica has room for: in its slots and in a queue that lasts until a late window."""
        room = {}
        for replica, (occupancy, before) in enumerate(zip(window, self._finished, strict=True)):
            reserve = max(self.group_size, RESERVE_FACTOR * (occupancy.finished - before))
            missing = self.max_num_seqs + reserve - occupancy.running - occupancy.waiting
            if missing >= self.group_size:
                room[replica] = missing // self.group_size
        return room

    def _turns(self, window: Sequence[Occupancy], room: dict[int, int]) -> Iterator[int]:
        """The replicas that get the next prompts, in order."""
        if sum(room.values()) <= self.num_prompts - self._next:
            yield from (replica for replica, prompts in room.items() for _ in range(prompts))
            return
        rate = {replica: self._seconds_per_response(window[replica]) for replica in room}
        heap = [(self._free_in(window[replica], 0, rate[replica]), replica, 0) for replica in room]
        heapq.heapify(heap)
        while heap:
            _, replica, given = heap[0]
            yield replica
            if given + 1 < room[replica]:
                free_in = self._free_in(window[replica], given + 1, rate[replica])
                heapq.heapreplace(heap, (free_in, replica, given + 1))
            else:
                heapq.heappop(heap)

    def _free_in(self, occupancy: Occupancy, given: int, seconds_per_response: float) -> float:
        """Predicted seconds until a slot is free after `given` more prompts; negative: slots are free now."""
        sequences = occupancy.outstanding + given * self.group_size
        return (sequences + 1 - self.max_num_seqs) * seconds_per_response

    def _seconds_per_response(self, occupancy: Occupancy) -> float:
        """Predicted seconds between two completed responses, at the present load."""
        running = min(max(occupancy.outstanding, 1), self.max_num_seqs)
        residual = self.lengths.mean_residual(occupancy.age)
        return residual * seconds_per_token(occupancy.curve, running, self.max_num_seqs) / running
