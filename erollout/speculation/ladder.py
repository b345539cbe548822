"""The paper's rule for the draft length: at most one rung up or down between rollouts. Pure.

EfficientRollout (arXiv 2606.18967): a high acceptance rate calls for longer drafts, a low one for shorter ones. The length
changes when several rollouts in a row call for the same direction.
"""

from typing import Any

from erollout.configuration.speculation import LadderConfig


class Ladder:
    def __init__(self, options: LadderConfig) -> None:
        self.options = options
        self.position = 0
        self._wish = 0
        """Number of rollouts in a row that called for longer drafts (positive) or shorter ones (negative)."""

    @property
    def rung(self) -> int:
        """The present num_speculative_tokens."""
        return self.options.rungs[self.position]

    def end_rollout(self, acceptance_rate: float) -> bool:
        """Returns whether the rung changed. `acceptance_rate`: over the rollout's drafts, of which there is at least one."""
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
        """Takes the nearest rung if the saved one no longer exists. Raises ValueError for an invalid state."""
        rung, wish = state["rung"], state["wish"]
        if not isinstance(rung, int) or not isinstance(wish, int):
            raise ValueError(f"ladder at rung {rung!r} with wish {wish!r}")
        rungs = self.options.rungs
        self.position = min(range(len(rungs)), key=lambda index: abs(rungs[index] - rung))
        self._wish = wish
