"""Whether speculation is held back for whole rollouts, because it lost time in earlier ones. Pure."""

from typing import Any

LONGEST = 8
"""Rollouts without speculation before it is tried again."""


class HoldBack:
    def __init__(self) -> None:
        self.losses = 0
        """Rollouts with a loss since the last one without, as far as there was speculation in them."""
        self.left = 0
        """Rollouts that go without from now on."""

    def end_rollout(self, lost: bool | None) -> None:
        """`lost`: whether speculation lost time; None where there was too little of it to tell."""
        if self.left:
            self.left -= 1
        elif lost:
            self.left = min(2**self.losses, LONGEST)
            self.losses += 1
        elif lost is not None:
            self.losses = 0

    def state_dict(self) -> dict[str, object]:
        return {"losses": self.losses, "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what is no state."""
        losses, left = state["losses"], state["left"]
        if not (isinstance(losses, int) and isinstance(left, int) and losses >= 0 and 0 <= left <= LONGEST):
            raise ValueError(f"{losses!r} losses, {left!r} rollouts without speculation")
        self.losses, self.left = losses, left
