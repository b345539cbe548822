"""What was measured, over what the roofline predicts: log ratios, interpolated between the points. Pure.

The ratio of a point is a sum of four parts, each the median of what those before it leave. A curve over the rows of the matmuls
is common to all draft lengths and contexts: matmuls see nothing but the number of rows, and their steps, at whole tiles, stand
at the same rows for any draft length. Each draft length has a curve over the rows too, and each context has one over the batch.
What then is left is the point's own, and counts up to MOST_OF_ITS_OWN: nothing makes a single point jump but other sequences
running than were meant, as where the cache was too small for the batch. All parts are linear in the logarithms between
neighbours, and fade outside the measured range.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log2
from statistics import median_high, median_low

FADE_OCTAVES = 2.0
"""Distance outside the measured range at which half of a ratio's logarithm is left."""
MOST_OF_ITS_OWN = 0.05
"""Log ratio that a single point shares with no other, at most."""

_Row = Sequence[tuple[float, float]]
"""Values by position."""
_Plane = Sequence[tuple[float, _Row]]
"""Rows by position."""


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

    def __init__(self, points: Iterable[Point], rows: Callable[[int, int], int]) -> None:
        """`rows`: of the matmuls of a pass, by batch and num_speculative_tokens; see Roofline.rows."""
        self.points = tuple(points)
        self._rows = rows
        self._curve: _Row = ()
        self._by_length: _Plane = ()
        self._by_context: _Plane = ()
        self._own: Sequence[tuple[float, _Plane]] = ()
        self.alone: Sequence[tuple[Point, float]] = ()
        """Of each point what it shares with no other, without bound: noise, or other sequences running than were meant."""
        self._curve = _row((self._position(p), rest) for p, rest in self._left())
        self._by_length = _plane((_length(p), self._position(p), rest) for p, rest in self._left())
        self._by_context = _plane((_context(p.context), log2(p.batch), rest) for p, rest in self._left())
        own: dict[float, list[tuple[float, float, float]]] = {}
        self.alone = self._left()
        for p, rest in self.alone:
            bounded = max(-MOST_OF_ITS_OWN, min(MOST_OF_ITS_OWN, rest))
            own.setdefault(_length(p), []).append((_context(p.context), log2(p.batch), bounded))
        self._own = [(length, _plane(entries)) for length, entries in sorted(own.items())]

    def log_ratio(self, batch: int, context: float, num_speculative_tokens: int) -> float:
        """0 batch is no pass."""
        rows, x = log2(self._rows(batch, num_speculative_tokens)), log2(batch)
        y, z = log2(num_speculative_tokens + 1), _context(context)
        own = [(length, _in_plane(plane, z, x)) for length, plane in _near(self._own, y)]
        common = _in_row(self._curve, rows) + _in_plane(self._by_length, y, rows) + _in_plane(self._by_context, z, x)
        return common + _in_row(own, y)

    def _position(self, point: Point) -> float:
        return log2(self._rows(point.batch, point.num_speculative_tokens))

    def _left(self) -> list[tuple[Point, float]]:
        """Of each point, what the parts so far leave."""
        return [(p, p.log_ratio - self.log_ratio(p.batch, p.context, p.num_speculative_tokens)) for p in self.points]


def _length(point: Point) -> float:
    return log2(point.num_speculative_tokens + 1)


def _context(context: float) -> float:
    return log2(max(1.0, context))


def _row(entries: Iterable[tuple[float, float]]) -> _Row:
    """The middle value at each position."""
    at: dict[float, list[float]] = {}
    for position, value in entries:
        at.setdefault(position, []).append(value)
    return [(position, _middle(values)) for position, values in sorted(at.items())]


def _middle(values: Sequence[float]) -> float:
    """The median; of two middle values, the one nearer to 0."""
    return min(median_low(values), median_high(values), key=abs)


def _plane(entries: Iterable[tuple[float, float, float]]) -> _Plane:
    """By the first position; rows by the second."""
    rows: dict[float, list[tuple[float, float]]] = {}
    for first, second, value in entries:
        rows.setdefault(first, []).append((second, value))
    return [(first, _row(row)) for first, row in sorted(rows.items())]


def _near(axis: Sequence[tuple[float, _Plane]], position: float) -> Sequence[tuple[float, _Plane]]:
    """The neighbours of a position, which alone decide over its value."""
    index = bisect_left(axis, position, key=lambda entry: entry[0])
    return axis[max(0, index - 1) : index + 1]


def _in_plane(plane: _Plane, first: float, second: float) -> float:
    index = bisect_left(plane, first, key=lambda entry: entry[0])
    return _in_row([(p, _in_row(row, second)) for p, row in plane[max(0, index - 1) : index + 1]], first)


def _in_row(row: _Row, position: float) -> float:
    """Linear between neighbours; beyond the ends the last value fades to 0, which it is without any."""
    if not row:
        return 0.0
    index = bisect_left(row, position, key=lambda entry: entry[0])
    if index == len(row) or (index == 0 and row[0][0] != position):
        edge, value = row[index - 1] if index else row[0]
        return float(value * 0.5 ** (abs(position - edge) / FADE_OCTAVES))
    right, above = row[index]
    if right == position:
        return above
    left, below = row[index - 1]
    return below + (above - below) * (position - left) / (right - left)
