"""How many of a run of drafts the simulated target accepts."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from erollout.errors import UserError

LONGEST = 64
"""Drafts in a run that shares are kept for."""


class SimulatedAcceptance:
    """Shares of a draft's first, second, ... tokens that are accepted, all independent of sequence and time."""

    def __init__(self, shares: Sequence[float]) -> None:
        """`shares`: falling, as a run reports them. Beyond the last, each is to the one before as the last two are."""
        ratios = [share / before for share, before in zip(shares, [1.0, *shares], strict=False)]
        steps = ratios + [ratios[-1]] * (LONGEST - len(ratios))
        self.shares = tuple(np.cumprod(steps).tolist())
        self._moments = cache(self._moments_of)

    @classmethod
    def constant(cls, share: float) -> "SimulatedAcceptance":
        """Every draft is accepted with this chance where all before it were."""
        return cls((share,))

    def length(self, num_speculative_tokens: int) -> float:
        """Mean tokens of a cycle, the recovered or bonus token included."""
        return self._moments(num_speculative_tokens)[0]

    def variance(self, num_speculative_tokens: int) -> float:
        """Of a cycle's tokens."""
        return self._moments(num_speculative_tokens)[1]

    def draw(self, num_speculative_tokens: int, chance: float) -> int:
        """Accepted drafts of one run. `chance`: uniform in [0, 1)."""
        accepted = 0
        while accepted < num_speculative_tokens and chance < self.shares[accepted]:
            accepted += 1
        return accepted

    def _moments_of(self, n: int) -> tuple[float, float]:
        shares = self.shares[:n]
        mean = sum(shares)
        square = sum((2 * k + 1) * share for k, share in enumerate(shares))  # k^2 - (k-1)^2 = 2k - 1 for the k-th
        return 1 + mean, square - mean * mean


def parse_acceptance(text: str) -> SimulatedAcceptance:
    """`0.9`: of each draft, given those before it; `0.95,0.9,0.84`: shares by position. Raises UserError."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"acceptance {text!r} must be numbers with commas between them") from None
    falling = all(a >= b for a, b in zip([1.0, *shares], shares, strict=False))
    if not falling or shares[-1] < 0 or 0.0 in shares[:-1]:
        raise UserError(f"acceptance {text!r}: shares by position lie between 0 and 1 and never rise")
    return SimulatedAcceptance(shares)
