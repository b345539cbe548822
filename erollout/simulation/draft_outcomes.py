"""Acceptance of drafts by the simulated target."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from erollout.errors import UserError

LONGEST = 64
"""Longest draft for which shares are kept."""


class SimulatedAcceptance:
    """Share of drafts whose first, second, ... token is accepted, independent of sequence and time."""

    def __init__(self, shares: Sequence[float]) -> None:
        """`shares`: never rising, as a run reports them. They are continued with the ratio of the last two."""
        ratios = [share / before for share, before in zip(shares, [1.0, *shares], strict=False)]
        steps = ratios + [ratios[-1]] * (LONGEST - len(ratios))
        self.shares = tuple(np.cumprod(steps).tolist())
        self._moments = cache(self._moments_of)

    @classmethod
    def constant(cls, share: float) -> "SimulatedAcceptance":
        """Acceptance with the same probability at every position, given that all before it are accepted."""
        return cls((share,))

    def length(self, num_speculative_tokens: int) -> float:
        """Mean number of tokens per cycle, including the recovered or bonus token."""
        return self._moments(num_speculative_tokens)[0]

    def variance(self, num_speculative_tokens: int) -> float:
        """Variance of the number of tokens per cycle."""
        return self._moments(num_speculative_tokens)[1]

    def draw(self, num_speculative_tokens: int, chance: float) -> int:
        """Number of accepted tokens of one draft. `chance`: uniform in [0, 1)."""
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
    """Parse `0.9`, a conditional acceptance at every position, or `0.95,0.9,0.84`, shares by position. Raises UserError."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"acceptance {text!r} must be numbers with commas between them") from None
    falling = all(a >= b for a, b in zip([1.0, *shares], shares, strict=False))
    if not falling or shares[-1] < 0 or 0.0 in shares[:-1]:
        raise UserError(f"acceptance {text!r}: shares by position lie between 0 and 1 and never rise")
    return SimulatedAcceptance(shares)
