"""The paper's rule for the draft length: one rung up or down between rollouts. Pure.

EfficientRollout (arXiv 2606.18967): a rollout whose acceptance rate is high asks for longer drafts, a low one for shorter ones;
what several rollouts in a row ask for is done.
"""

from typing import Any

from erollout.configuration.speculation import LadderConfig


class Ladder:
    def __init__(self, options: LadderConfig) -> None:
        self.options = options
        self.position = 0
        self._wish = 0
        """Rollouts in a row that asked for longer drafts (positive) or shorter ones (negative)."""

    @property
    def rung(self) -> int:
        """The present num_speculative_tokens."""
        return self.options.rungs[self.position]

    def end_rollout(self, acceptance_rate: float) -> bool:
        """Whether the rung changed. `acceptance_rate`: of the rollout's drafts, of which there were some."""
        options = self.options
        direction = (acceptance_rate > options.raise_above) - (acceptance_rate < options.lower_below)
        self._wish = self._wish + direction if self._wish * direction > 0 else direction
        if abs(self._wish) < options.persistence:
            return False
        position = min(max(self.position + direction, 0), len(options.rungs) - 1)
        moved = position != self.position
        self.position, self._wish = position, 0
        return moved

    def state_dict(self) -> dict[str, object]:
        return {"rung": self.rung, "wish": self._wish}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where there is no such rung any more, the nearest. Raises ValueError for what is no state."""
        rung, wish = state["rung"], state["wish"]
        if not isinstance(rung, int) or not isinstance(wish, int):
            raise ValueError(f"ladder at rung {rung!r} with wish {wish!r}")
        rungs = self.options.rungs
        self.position = min(range(len(rungs)), key=lambda index: abs(rungs[index] - rung))
        self._wish = wish
