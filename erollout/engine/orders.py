"""The engine's control, which gives orders step by step: how to draft, which requests to take, what to release. Pure.

The engine asks before every step and reports after it. Under tensor parallelism every rank of the replica has a control, and
all of them give the same orders at the same step.
"""

from dataclasses import dataclass
from typing import Protocol

from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.types import PartialRollout, RolloutRequest


@dataclass(frozen=True, slots=True)
class Arrival:
    """A response to be resumed here: its tokens are prefilled again first."""

    request: RolloutRequest
    """Request of the whole group, of which only this sample is resumed here."""
    partial: PartialRollout


@dataclass(frozen=True, slots=True)
class Orders:
    """Orders for the next step of one replica."""

    arm: Arm = OFF
    """Arm of the step. Its format must be one of the engine's proposers."""
    requests: tuple[RolloutRequest, ...] = ()
    """New requests, to be queued."""
    arrivals: tuple[Arrival, ...] = ()
    release: int = 0
    """Number of sequences to release (or all if there are fewer), cheapest to prefill again first."""
    is_last: bool = False
    """No further requests follow: the engine completes its queue and returns."""
    interrupts: bool = False
    """The engine returns at once, and leaves incomplete responses in Engine.left."""


class Control(Protocol):
    def orders(self, load: Load) -> Orders:
        """Called before every step, also if there is nothing to do (then it may wait a moment). Collective over the replica."""
        ...

    def released(self, partials: list[PartialRollout]) -> None:
        """Called with the sequences released by the last orders, if their `release` is above 0."""
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Called after every step that computed something."""
        ...


@dataclass(frozen=True, slots=True)
class FixedControl:
    """A control with the same arm at every step, without further requests or releases."""

    arm: Arm = OFF

    def orders(self, load: Load) -> Orders:
        return Orders(self.arm, is_last=True)

    def released(self, partials: list[PartialRollout]) -> None:
        raise AssertionError("nothing was to be released")

    def observe(self, outcome: StepOutcome) -> None:
        pass
