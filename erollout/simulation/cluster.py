"""A simulated cluster: replicas under the real state machine, with windows, dispatch of prompts and migration."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from erollout.config import CoordinatorConfig
from erollout.coordinator.state_machine import ClusterDecision, Move, StateMachine
from erollout.simulation.replica import Replica

EXCHANGE_SECONDS = 0.001
"""Seconds from the last replica's post of an operation until all have its result."""


@dataclass(slots=True)
class Traffic:
    """The coordinator's traffic in one rollout."""

    windows: int = 0
    moves: int = 0
    sequences_moved: int = 0


class Cluster:
    """One rollout."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        machine: StateMachine,
        options: CoordinatorConfig,
        exchange_seconds: float = EXCHANGE_SECONDS,
    ) -> None:
        """`machine`: new, for these replicas and their workload."""
        assert not options.lock_step, "replicas that share collectives are not simulated"
        self.replicas = replicas
        self.machine = machine
        self.options = options
        self.exchange_seconds = exchange_seconds
        self.traffic = Traffic()
        self._handed_out = 0

    def run(self) -> float:
        """Seconds until the last response is complete."""
        self._carry_out(self.machine.start())
        time = 0.0
        while self._may_change():
            known = self._at(time + self.options.window_seconds)
            decision = self.machine.advance([replica.occupancy() for replica in self.replicas])
            if decision.finished:
                break
            self.traffic.windows += 1
            time = self._at(known + self.exchange_seconds)
            self._carry_out(decision)
            if decision.moves:
                time = self._move(decision.moves)
        for replica in self.replicas:
            replica.run_until(inf)
        return max(replica.finished_at for replica in self.replicas)

    def _may_change(self) -> bool:
        """Whether further windows can change anything."""
        everything = self._handed_out == self.replicas[0].workload.num_prompts
        return not (everything and self.options.policy == "replica")

    def _at(self, time: float) -> float:
        """Run every replica to its first step border at or after `time`. Returns the time of the last one's."""
        for replica in self.replicas:
            replica.run_until(time)
        return max(replica.now for replica in self.replicas)

    def _carry_out(self, decision: ClusterDecision) -> None:
        arms = self.replicas[0].chooser.arms
        imposed = None if decision.arm is None else arms[decision.arm]
        for replica in self.replicas:
            replica.imposed = imposed
        for replica, prompts in zip(self.replicas, decision.dispatched, strict=False):
            if prompts:
                replica.take(prompts)
                self._handed_out += len(prompts)

    def _move(self, moves: Sequence[Move]) -> float:
        """Migrate sequences between replicas. Returns the time at which all have arrived."""
        parcels = []
        for move in moves:
            parts = self.replicas[move.source].release(move.num_sequences)
            parcels.append((move.target, parts))
            self.traffic.sequences_moved += len(parts)
        self.traffic.moves += len(moves)
        landed = self._at(max(self.replicas[move.source].now for move in moves) + self.exchange_seconds)
        for target, parts in parcels:
            self.replicas[target].arrive(parts)
        return landed
