"""What was measured, over what the roofline predicts: log ratios, interpolated between the points. Pure.

The ratio of a point has three parts. A curve over the tokens of a pass is common to all draft lengths and contexts: matmuls
see nothing but the number of rows, and their steps, at whole tiles, stand at the same rows for any draft length. What is left
of it at a draft length and batch is common to all contexts. What is left then, at the context, counts up to MOST_AT_CONTEXT:
attention makes no jumps there, but where the cache was too small for the batch, other sequences ran than were meant. All three
are linear in the logarithms between neighbours, and fade outside the measured range.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2
from statistics import median

FADE_OCTAVES = 2.0
"""Distance outside the measured range at which half of a ratio's logarithm is left."""
MOST_AT_CONTEXT = 0.1
"""Log ratio of a point over the median of its batch's other contexts, at most."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of a kind of pass (and a drafter's format)."""

    batch: int
    context: float
    num_speculative_tokens: int
    log_ratio: float
    """Of measured over predicted seconds."""


class MeasuredTable:
    """Ratios of one kind of pass. Without any point: 0 everywhere."""

    def __init__(self, points: Iterable[Point], verifies: bool) -> None:
        """`verifies`: a pass has num_speculative_tokens + 1 tokens of each sequence, not one."""
        self.points = tuple(points)
        self._verifies = verifies
        self._curve = _pooled([(self._tokens(p.batch, p.num_speculative_tokens), p.log_ratio) for p in self.points])
        self._rest = self._left_over()

    def log_ratio(self, batch: int, context: float, num_speculative_tokens: int) -> float:
        if not self.points:
            return 0.0
        return self._curve_at(batch, num_speculative_tokens) + self._rest_at(batch, context, num_speculative_tokens)

    def _tokens(self, batch: int, num_speculative_tokens: int) -> float:
        return log2(batch * (num_speculative_tokens + 1 if self._verifies else 1))

    def _left_over(self) -> "_Axis":
        """By draft length, then context, then batch."""
        tree: dict[float, dict[float, dict[float, list[float]]]] = {}
        for p in self.points:
            rest = p.log_ratio - self._curve_at(p.batch, p.num_speculative_tokens)
            row = tree.setdefault(log2(p.num_speculative_tokens + 1), {}).setdefault(log2(max(1.0, p.context)), {})
            row.setdefault(log2(p.batch), []).append(rest)
        return [(n, _steadied(rows)) for n, rows in sorted(tree.items())]

    def _curve_at(self, batch: int, num_speculative_tokens: int) -> float:
        return _interpolated(self._curve, self._tokens(batch, num_speculative_tokens))

    def _rest_at(self, batch: int, context: float, num_speculative_tokens: int) -> float:
        x, y, z = log2(batch), log2(max(1.0, context)), log2(num_speculative_tokens + 1)
        lengths = [(n, _interpolated([(c, _interpolated(row, x)) for c, row in rows], y)) for n, rows in _near(self._rest, z)]
        return _interpolated(lengths, z)


_Row = Sequence[tuple[float, float]]
_Axis = list[tuple[float, list[tuple[float, _Row]]]]


def _steadied(rows: dict[float, dict[float, list[float]]]) -> list[tuple[float, _Row]]:
    """By context, then batch: the batch's median over its contexts, and as much of the context's own as counts."""
    batches: dict[float, list[float]] = {}
    for row in rows.values():
        for batch, values in row.items():
            batches.setdefault(batch, []).extend(values)
    middle = {batch: median(values) for batch, values in batches.items()}

    def steadied(batch: float, values: list[float]) -> float:
        own = median(values) - middle[batch]
        return middle[batch] + max(-MOST_AT_CONTEXT, min(MOST_AT_CONTEXT, own))

    return [(context, [(b, steadied(b, v)) for b, v in sorted(row.items())]) for context, row in sorted(rows.items())]


def _pooled(pairs: Iterable[tuple[float, float]]) -> _Row:
    """The median value at each position, by position."""
    at: dict[float, list[float]] = {}
    for position, value in pairs:
        at.setdefault(position, []).append(value)
    return [(position, median(values)) for position, values in sorted(at.items())]


def _near(axis: _Axis, position: float) -> _Axis:
    """The neighbours of a position, which alone decide over its value."""
    index = bisect_left(axis, position, key=lambda entry: entry[0])
    return axis[max(0, index - 1) : index + 1]


def _interpolated(row: _Row, position: float) -> float:
    """Linear between neighbours; beyond the ends the last value fades to 0."""
    index = bisect_left(row, position, key=lambda entry: entry[0])
    if index == len(row) or (index == 0 and row[0][0] != position):
        edge, value = row[index - 1] if index else row[0]
        return float(value * 0.5 ** (abs(position - edge) / FADE_OCTAVES))
    right, above = row[index]
    if right == position:
        return above
    left, below = row[index - 1]
    return below + (above - below) * (position - left) / (right - left)
