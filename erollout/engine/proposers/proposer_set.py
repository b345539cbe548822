"""The proposers of one decode rank over the run, and what may be done with them between rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erollout.configuration.speculation import SpeculationConfig
from erollout.engine.engine import Engine
from erollout.engine.proposers.base import Proposer
from erollout.speculation.step import OFF, Arm
from erollout.types import Rollout


@dataclass(frozen=True, slots=True)
class RequantizeStats:
    """Cost of one update to a new policy; 0 for proposers without weights."""

    seconds: float = 0.0
    """Seconds of quantising and packing on this rank."""
    peak_extra_bytes: int = 0
    """Peak memory besides the weights and the proposers' own buffers."""
    buffer_bytes: int = 0
    """Size of the proposers' own persistent buffers."""


class ProposerSet:
    """The proposers of one decode rank, by their names in Arm.format.

    Proposers without weights need no more than this. Where there are weights, a subclass overrides what a refit calls
    (`tensor_landed`, `all_landed`, `complete`); where they depend on rollouts, also `learns_at`, `learn_from` and the state.
    Methods are collective over the replica, `learn_from` over the world.
    """

    def __init__(self, options: SpeculationConfig, engine: Engine, proposers: Mapping[str, Proposer]) -> None:
        """The engine does not draft before `switch`."""
        self.options = options
        self.engine = engine
        self.proposers = proposers
        """Proposers by name, the default one first; the same on all ranks."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the proposers, the default one first."""
        return tuple(self.proposers)

    def switch(self, on: bool) -> None:
        """Switch drafting of `engine.generate` with the default proposer on or off."""
        arm = Arm(self.formats[0], self.options.num_speculative_tokens) if on else OFF
        self.engine.speculate(self.proposers, arm, self.options.verification)

    def tensor_landed(self, name: str) -> None:
        """One of the engine's local tensors has the new policy."""

    def all_landed(self) -> None:
        """All of the engine's local tensors have the new policy."""
        for name in self.engine.local_tensors():
            self.tensor_landed(name)

    def complete(self, policy_version: int) -> RequantizeStats:
        """Complete the update to this version."""
        return RequantizeStats()

    @property
    def wants_rollouts(self) -> bool:
        """Whether `learn_from` makes a difference."""
        return False

    def learns_at(self, step: int) -> bool:
        """Whether to learn from the rollout of this step; equal on all ranks."""
        return False

    def learn_from(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from a rollout. The engine is awake and idle."""

    def state_dict(self) -> dict[str, Any]:
        """State for later attempts, as JSON; empty: there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load, before the first weights. Collective over the world."""
