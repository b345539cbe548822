"""Log ratios of measured over predicted (roofline) seconds, interpolated between the measured points. Pure.

A point's log ratio is a sum of four parts, each fitted as the median of the residuals of the parts before it:

1. a curve over matmul rows, common to all draft lengths and contexts: matmuls depend on the number of rows only, and their
   jumps at whole tiles are at the same rows for any draft length;
2. a curve over matmul rows for each draft length;
3. a curve over the batch size for each context;
4. the point's own residual, up to MOST_OF_ITS_OWN: a larger one means that the sweep ran other sequences than it meant to, as
   where the cache was too small for the batch.

All parts are linear in the logarithms between neighbours, and fade outside the measured range.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log2
from statistics import median_high, median_low

FADE_OCTAVES = 2.0
"""Distance outside the measured range, in octaves, at which a log ratio has fallen to half."""
MOST_OF_ITS_OWN = 0.05
"""Largest log ratio that a single point may have of its own."""

_Row = Sequence[tuple[float, float]]
"""Values by position."""
_Plane = Sequence[tuple[float, _Row]]
"""Rows by position."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of a kind of pass (and drafter format)."""

    batch: int
    context: float
    num_speculative_tokens: int
    log_ratio: float
    """Logarithm of measured over predicted seconds."""


class MeasuredTable:
    """Log ratios of one kind of pass; without points, 0 everywhere."""

    def __init__(self, points: Iterable[Point], rows: Callable[[int, float], float]) -> None:
        """`rows`: number of matmul rows of a pass, from batch and num_speculative_tokens; see Roofline.rows."""
        self.points = tuple(points)
        self._rows = rows
        self._curve: _Row = ()
        self._by_length: _Plane = ()
        self._by_context: _Plane = ()
        self._own: Sequence[tuple[float, _Plane]] = ()
        self.alone: Sequence[tuple[Point, float]] = ()
        """Own residual of each point, without limit: noise, or a sweep that ran other sequences than it meant to."""
        self._curve = _row((self._position(p), rest) for p, rest in self._left())
        self._by_length = _plane((_length(p), self._position(p), rest) for p, rest in self._left())
        self._by_context = _plane((_context(p.context), log2(p.batch), rest) for p, rest in self._left())
        own: dict[float, list[tuple[float, float, float]]] = {}
        self.alone = self._left()
        for p, rest in self.alone:
            bounded = max(-MOST_OF_ITS_OWN, min(MOST_OF_ITS_OWN, rest))
            own.setdefault(_length(p), []).append((_context(p.context), log2(p.batch), bounded))
        self._own = [(length, _plane(entries)) for length, entries in sorted(own.items())]

    def log_ratio(self, batch: int, context: float, num_speculative_tokens: float) -> float:
        """The interpolated log ratio; 0 for batch 0, which is no pass."""
        rows, x = log2(self._rows(batch, num_speculative_tokens)), log2(batch)
        y, z = log2(num_speculative_tokens + 1), _context(context)
        own = [(length, _in_plane(plane, z, x)) for length, plane in _near(self._own, y)]
        common = _in_row(self._curve, rows) + _in_plane(self._by_length, y, rows) + _in_plane(self._by_context, z, x)
        return common + _in_row(own, y)

    def _position(self, point: Point) -> float:
        return log2(self._rows(point.batch, point.num_speculative_tokens))

    def _left(self) -> list[tuple[Point, float]]:
        """Residual of each point after the parts fitted so far."""
        return [(p, p.log_ratio - self.log_ratio(p.batch, p.context, p.num_speculative_tokens)) for p in self.points]


def _length(point: Point) -> float:
    return log2(point.num_speculative_tokens + 1)


def _context(context: float) -> float:
    return log2(max(1.0, context))


def _row(entries: Iterable[tuple[float, float]]) -> _Row:
    """The median at each position."""
    at: dict[float, list[float]] = {}
    for position, value in entries:
        at.setdefault(position, []).append(value)
    return [(position, _middle(values)) for position, values in sorted(at.items())]


def _middle(values: Sequence[float]) -> float:
    """The median; of two middle values, the one nearer to 0."""
    return min(median_low(values), median_high(values), key=abs)


def _plane(entries: Iterable[tuple[float, float, float]]) -> _Plane:
    """Rows by the first position, values in a row by the second."""
    rows: dict[float, list[tuple[float, float]]] = {}
    for first, second, value in entries:
        rows.setdefault(first, []).append((second, value))
    return [(first, _row(row)) for first, row in sorted(rows.items())]


def _near(axis: Sequence[tuple[float, _Plane]], position: float) -> Sequence[tuple[float, _Plane]]:
    """The neighbours of a position, which alone determine its value."""
    index = bisect_left(axis, position, key=lambda entry: entry[0])
    return axis[max(0, index - 1) : index + 1]


def _in_plane(plane: _Plane, first: float, second: float) -> float:
    index = bisect_left(plane, first, key=lambda entry: entry[0])
    return _in_row([(p, _in_row(row, second)) for p, row in plane[max(0, index - 1) : index + 1]], first)


def _in_row(row: _Row, position: float) -> float:
    """Linear between neighbours, fading to 0 beyond the ends; 0 for an empty row."""
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
