"""Backoff of speculation for whole rollouts, at batch sizes where it lost time in earlier ones. Pure."""

from collections.abc import Mapping
from typing import Any

LOSS = 0.01
"""Least share of a rollout's seconds lost to speculation, overall and at the batch size, that starts a backoff."""
LONGEST = 8
"""Longest backoff, in rollouts."""


class Backoff:
    """Exponential backoff per size, the bit length of the batch size."""

    def __init__(self) -> None:
        self.losses: dict[int, int] = {}
        """Number of rollouts that lost time, since the last one that gained, by size."""
        self.left: dict[int, int] = {}
        """Number of rollouts still to go without speculation, by size."""

    def holds(self, batch: int) -> bool:
        return bool(self.left) and batch.bit_length() in self.left

    def end_rollout(self, saved: Mapping[int, float], seconds: float) -> list[int]:
        """Start a backoff where speculation lost time, at the size and over the whole rollout. Returns the sizes concerned.

        Args:
            saved: seconds that speculation saved, by size; negative: lost.
            seconds: duration of the rollout.
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
