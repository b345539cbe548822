"""Where speculation is held back for whole rollouts, because it lost time in earlier ones. Pure."""

from collections.abc import Mapping
from typing import Any

LOSS = 0.01
"""Share of a rollout's seconds that speculation must have lost, in all and at a size that is held back."""
LONGEST = 8
"""Rollouts without speculation before it is tried again."""


class HoldBack:
    """By size: the number of binary digits of the batch size."""

    def __init__(self) -> None:
        self.losses: dict[int, int] = {}
        """Rollouts that lost there since one gained."""
        self.left: dict[int, int] = {}
        """Rollouts that go without speculation from now on."""

    def holds(self, batch: int) -> bool:
        return bool(self.left) and batch.bit_length() in self.left

    def end_rollout(self, saved: Mapping[int, float], seconds: float) -> list[int]:
        """The sizes that are held back from now on, since speculation lost time in the whole rollout, and there.

        Args:
            saved: by it, in seconds, by size.
            seconds: of the rollout.
        """
        self.left = {size: left - 1 for size, left in self.left.items() if left > 1}
        held = []
        for size, gain in saved.items():
            if gain >= 0:
                self.losses.pop(size, None)
            elif -max(gain, sum(saved.values())) > LOSS * seconds:
                self.left[size] = min(2 ** self.losses.get(size, 0), LONGEST)
                self.losses[size] = self.losses.get(size, 0) + 1
                held.append(size)
        return sorted(held)

    def state_dict(self) -> dict[str, object]:
        return {"losses": sorted(self.losses.items()), "left": sorted(self.left.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.left = ({int(size): int(count) for size, count in state[key]} for key in ("losses", "left"))
