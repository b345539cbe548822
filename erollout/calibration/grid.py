"""Which batches and contexts a sweep measures, in which order and how often. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

LEAST_REPETITIONS = 3
"""Of a place: a median of fewer is no protection from a slow step."""
MOST_REPETITIONS = 40
"""More make medians no better."""
BASE_LOAD = 8
"""A pass costs as much before its first sequence as so many sequences add: a guess, to share out the budget by."""


@dataclass(frozen=True, slots=True)
class SweepPoint:
    batch: int
    """Sequences that decode."""
    context: int
    """Tokens of each in the cache, roughly: they grow while they are measured."""

    @property
    def weight(self) -> int:
        """Of its share of the budget."""
        return BASE_LOAD + self.batch


@dataclass(frozen=True, slots=True)
class SweepGrid:
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    num_speculative_tokens: tuple[int, ...]

    def places(self) -> list[SweepPoint]:
        """From coarse to fine, so that a budget that ends early has covered the whole range."""
        batches, contexts = _levels(self.batches), _levels(self.contexts)
        ranked = sorted((max(batches[b], contexts[c]), b, c) for b in batches for c in contexts)
        return [SweepPoint(batch, context) for _, batch, context in ranked]


def coarse_to_fine(values: Iterable[int]) -> list[int]:
    """Both ends, then the middle, then the quarters, ...: any beginning of it spans the range."""
    levels = _levels(values)
    return sorted(levels, key=lambda value: (levels[value], value))


def repetitions(share: float, left: float, once: float, least: int) -> int:
    """How often to take steps that take `once` seconds together: for their share of the seconds left, but `least` times where
    there is time for so many."""
    wanted = min(MOST_REPETITIONS, max(least, int(share / once)))
    return max(1, min(wanted, int(left / once)))


def _levels(values: Iterable[int]) -> dict[int, int]:
    """By value, the round of halving in which it comes up: 0 for both ends, 1 for the middle, 2 for the quarters, ..."""
    ordered = sorted(set(values))
    levels = {ordered[0]: 0, ordered[-1]: 0}
    spans = [(0, len(ordered) - 1)]
    for level in range(1, len(ordered)):
        middles = [(low, (low + high) // 2, high) for low, high in spans if high - low > 1]
        levels |= {ordered[middle]: level for _, middle, _ in middles}
        spans = [half for low, middle, high in middles for half in ((low, middle), (middle, high))]
    return levels
