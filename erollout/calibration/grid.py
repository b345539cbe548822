"""The grid of a sweep: batches and contexts, in which order and how often. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

LEAST_REPETITIONS = 3
"""Least repetitions at a point: a median of fewer is no protection from a slow step."""
MOST_REPETITIONS = 40
"""Most repetitions at a point: more do not improve medians."""
BASE_LOAD = 8
"""Assumed fixed cost of a pass, in sequences, for sharing out the budget."""


@dataclass(frozen=True, slots=True)
class SweepPoint:
    batch: int
    """Number of decoding sequences."""
    context: int
    """Approximate tokens of each in the cache: they grow during the measurement."""

    @property
    def weight(self) -> int:
        """Weight of the point's share of the budget."""
        return BASE_LOAD + self.batch


@dataclass(frozen=True, slots=True)
class SweepGrid:
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    num_speculative_tokens: tuple[int, ...]

    def places(self) -> list[SweepPoint]:
        """All points from coarse to fine, so that a budget that ends early has covered the whole range."""
        batches, contexts = _levels(self.batches), _levels(self.contexts)
        ranked = sorted((max(batches[b], contexts[c]), b, c) for b in batches for c in contexts)
        return [SweepPoint(batch, context) for _, batch, context in ranked]


def coarse_to_fine(values: Iterable[int]) -> list[int]:
    """The values with both ends first, then the middle, then the quarters, ...: any prefix spans the range."""
    levels = _levels(values)
    return sorted(levels, key=lambda value: (levels[value], value))


def repetitions(share: float, left: float, once: float, least: int) -> int:
    """Number of repetitions of steps that take `once` seconds together: as many as their share of the seconds left allows, and
    at least `least` if there is time."""
    wanted = min(MOST_REPETITIONS, max(least, int(share / once)))
    return max(1, min(wanted, int(left / once)))


def _levels(values: Iterable[int]) -> dict[int, int]:
    """Round of halving in which each value comes up: 0 for both ends, 1 for the middle, 2 for the quarters, ..."""
    ordered = sorted(set(values))
    levels = {ordered[0]: 0, ordered[-1]: 0}
    spans = [(0, len(ordered) - 1)]
    for level in range(1, len(ordered)):
        middles = [(low, (low + high) // 2, high) for low, high in spans if high - low > 1]
        levels |= {ordered[middle]: level for _, middle, _ in middles}
        spans = [half for low, middle, high in middles for half in ((low, middle), (middle, high))]
    return levels
