"""Who tells the engine, step by step, what to do: how to draft, which requests to take, which sequences to give away. Pure.

The engine asks before every step and reports after it. Under tensor parallelism every rank of the replica has a control, and
all of them give the same orders at the same step.
"""

from dataclasses import dataclass
from typing import Protocol

from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.types import PartialRollout, RolloutRequest


@dataclass(frozen=True, slots=True)
class Arrival:
    """A response that began on another replica: its tokens are computed again here, then it goes on."""

    request: RolloutRequest
    """Of the whole group; only this sample of it comes here."""
    partial: PartialRollout


@dataclass(frozen=True, slots=True)
class Orders:
    """For the next step of one replica."""

    arm: Arm = OFF
    """How decoding sequences are served. Its format must be one of the engine's proposers."""
    requests: tuple[RolloutRequest, ...] = ()
    """To be sampled, behind what is queued."""
    arrivals: tuple[Arrival, ...] = ()
    release: int = 0
    """So many sequences (or all, where there are fewer) are to be given away, first those that cost least to compute again."""
    is_last: bool = False
    """Nothing follows what is queued now: the engine finishes that and returns."""
    interrupts: bool = False
    """It returns at once instead, and leaves what is not complete in Engine.left."""


class Control(Protocol):
    def orders(self, load: Load) -> Orders:
        """Before every step, also when there is nothing to do (then it may wait a moment). Collective over the replica."""
        ...

    def released(self, partials: list[PartialRollout]) -> None:
        """What the last orders' `release` came to; the engine has forgotten them. Called only for release > 0."""
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """After every step that computed something."""
        ...


@dataclass(frozen=True, slots=True)
class FixedControl:
    """The same arm at every step, nothing added and nothing taken away."""

    arm: Arm = OFF

    def orders(self, load: Load) -> Orders:
        return Orders(self.arm, is_last=True)

    def released(self, partials: list[PartialRollout]) -> None:
        raise AssertionError("nothing was to be released")

    def observe(self, outcome: StepOutcome) -> None:
        pass
