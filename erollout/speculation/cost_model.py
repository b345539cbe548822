"""What a step costs: predicted seconds of every arm at a load. Pure."""

from typing import Protocol

from erollout.speculation.step import Arm, Load


class CostModel(Protocol):
    """Seconds of one step on this hardware, for this model, and what they are known from."""

    def step_seconds(self, arm: Arm, load: Load) -> float:
        """One pass of the target for OFF; otherwise n drafter steps and the verify pass of 1 + n tokens, all the host's work included."""
        ...

    def observe(self, arm: Arm, load: Load, seconds: float) -> None:
        """Learn from a step that was taken. Robust to outliers: one slow step changes little."""
        ...

    def state_dict(self) -> dict[str, object]:
        """What was learnt online, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> None: ...
