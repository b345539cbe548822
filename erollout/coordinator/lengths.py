"""Predicted remaining tokens of responses, from the response lengths of the last rollout. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

UNKNOWN_QUANTILES = 256
"""Number of points in the assumed distribution when there is no last rollout."""

BEYOND = 1.25
"""Length of the response added for lengths not seen before, in multiples of the longest one."""


class RemainingLengths:
    """The distribution of response lengths.

    One response of BEYOND times the longest known length is added, for responses that grow longer than any before. Without
    known lengths, all lengths up to max_tokens are equally likely.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int) -> None:
        assumed = [max_tokens * (i + 1) / UNKNOWN_QUANTILES for i in range(UNKNOWN_QUANTILES)]
        self._sorted = sorted([*lengths, min(BEYOND * max(lengths), max_tokens)] if lengths else assumed)
        self._sums = [0.0, *accumulate(self._sorted)]
        """Total length of the k shortest responses, by k."""

    def mean_residual(self, age: float) -> float:
        """Expected remaining tokens of a response that has `age` tokens; at least 1."""
        longer = bisect_right(self._sorted, age)
        count = len(self._sorted) - longer
        return max(1.0, (self._sums[-1] - self._sums[longer]) / count - age) if count else 1.0

    def residual(self, age: float, share: float) -> float:
        """Further tokens after which the given share (0 to 1) of the responses with `age` tokens is complete; at least 1."""
        longer = bisect_right(self._sorted, age)
        if longer == len(self._sorted):
            return 1.0
        place = share * (len(self._sorted) - longer) + longer - 0.5
        low = min(max(int(place), longer), len(self._sorted) - 1)
        high = min(low + 1, len(self._sorted) - 1)
        between = self._sorted[low] + (self._sorted[high] - self._sorted[low]) * min(max(place - low, 0.0), 1.0)
        return max(1.0, between - age)
