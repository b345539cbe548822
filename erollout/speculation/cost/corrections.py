"""Live corrections of a calibration: multiplicative factors, learnt robustly from the run's own steps. Pure.

The logarithm of measured over predicted seconds is a sum of three parts: one that all steps share (a slower machine today), one
per drafter (or none), and one per arm around a batch size. Each part is a Gaussian random walk, and a step's surprise is
split between them in proportion to their uncertainty: a Kalman filter that neglects correlations. So the first steps move all
parts, and a later change moves the common one, whose walk is the widest.

A surprise is clipped at CLIP standard deviations, so an outlier moves little, however slow. Several clipped to the same side in
a row are no outliers: all parts, the common one most, become uncertain enough to follow at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, floor, inf, isfinite, log, log2
from typing import Any

from erollout.speculation.step import Arm

CLIP = 2.5
PERSISTENCE = 5
"""Number of consecutive clipped surprises of the same sign that count as a lasting change."""
COMMON_BLAME = 4.0
"""Factor by which a lasting change widens the common part more than the others: most often the machine has changed."""
NOISE_RANGE = (0.005, 0.3)
"""Least and largest accepted standard deviation of a step's time, relative."""
NOISE_RATE = 0.05
SMALLEST_FACTOR = 0.01
"""Least ratio of measured over predicted seconds: a smaller one comes from a clock that jumped."""


@dataclass(slots=True)
class _Part:
    """One summand of the correction."""

    variance: float
    value: float = 0.0

    def widen(self, walk: float, limit: float) -> None:
        self.variance = min(self.variance + walk, limit)

    def learn(self, share: float, surprise: float, total: float) -> None:
        """Update with the part's `share` of the sum, whose variance including noise is `total`."""
        gain = self.variance * share / total
        self.value += gain * surprise
        self.variance *= 1 - gain * share


_COMMON, _DRAFTER, _CELL = 0.2**2, 0.15**2, 0.1**2
"""Prior variances, which are upper limits as well."""
_COMMON_WALK, _DRAFTER_WALK, _CELL_WALK = 4e-5, 1e-6, 1e-6
"""Variance added per step to each part that the step touches."""
_PREFILL = 1.0
"""Prior variance of prompt passes, which are not calibrated. They are corrected apart from decoding."""


class Corrections:
    """The corrections of one replica's cost model."""

    def __init__(self) -> None:
        self._common = _Part(_COMMON)
        self._drafters: dict[str, _Part] = {}
        self._cells: dict[tuple[Arm, int], _Part] = {}
        self._prefill = _Part(_PREFILL)
        self._noise = 0.05**2
        self._run: list[float] = []
        """Consecutive clipped surprises, all of one sign."""

    def factor(self, arm: Arm, batch: int) -> float:
        """Correction factor for an arm's predicted seconds."""
        value = self._common.value
        drafter = self._drafters.get(arm.format)
        if drafter is not None:
            value += drafter.value
        cells = self._cells
        for node, share in _nodes(batch):
            cell = cells.get((arm, node))
            if cell is not None:
                value += share * cell.value
        return exp(value)

    def prefill_factor(self) -> float:
        """Correction factor for the predicted seconds of prompt tokens."""
        return exp(self._common.value + self._prefill.value)

    def observe_prefill(self, ratio: float) -> None:
        """Learn from a pass that consists mostly of prompt tokens, as `observe`."""
        surprise = log(max(ratio, SMALLEST_FACTOR) / self.prefill_factor())
        self._prefill.widen(_DRAFTER_WALK, _PREFILL)
        total = self._prefill.variance + self._noise
        limit = CLIP * total**0.5
        self._prefill.learn(1.0, max(-limit, min(limit, surprise)), total)

    def observe(self, arm: Arm, batch: int, ratio: float) -> None:
        """Learn from a step. `ratio`: its measured seconds over those predicted without corrections."""
        surprise = log(max(ratio, SMALLEST_FACTOR) / self.factor(arm, batch))
        drafter = self._drafters.setdefault(arm.format, _Part(_DRAFTER))
        cells = [(self._cells.setdefault((arm, node), _Part(_CELL)), share) for node, share in _nodes(batch)]
        self._common.widen(_COMMON_WALK, _COMMON)
        drafter.widen(_DRAFTER_WALK, _DRAFTER)
        for cell, _ in cells:
            cell.widen(_CELL_WALK, _CELL)
        parts = ((self._common, 1.0), (drafter, 1.0), *cells)
        surprise = self._clipped(surprise, parts)
        total = _variance(parts) + self._noise
        for part, share in parts:
            part.learn(share, surprise, total)

    def _clipped(self, surprise: float, parts: Sequence[tuple[_Part, float]]) -> float:
        """The clipped surprise. Updates the noise level, and widens the parts after a lasting change."""
        variance = _variance(parts)
        limit = CLIP * (variance + self._noise) ** 0.5
        if (change := self._change(surprise, limit)) is not None:
            self._common.variance *= COMMON_BLAME
            scale = change * change / _variance(parts)
            for part, _ in parts:
                part.variance *= scale
            return change
        clipped = max(-limit, min(limit, surprise))
        low, high = NOISE_RANGE
        self._noise += NOISE_RATE * (max(0.0, clipped * clipped - variance) - self._noise)
        self._noise = max(low * low, min(high * high, self._noise))
        return clipped

    def _change(self, surprise: float, limit: float) -> float | None:
        """The smallest of PERSISTENCE clipped surprises in a row to the same side; None while there are fewer."""
        if abs(surprise) <= limit or (self._run and self._run[0] * surprise < 0):
            self._run = []
        if abs(surprise) > limit:
            self._run.append(surprise)
        if len(self._run) < PERSISTENCE:
            return None
        least = min(self._run, key=abs)
        self._run = []
        return least

    def forget(self, format: str) -> None:
        """Drop what was learnt about one drafter."""
        self._drafters.pop(format, None)
        self._cells = {key: part for key, part in self._cells.items() if key[0].format != format}

    def state_dict(self) -> dict[str, object]:
        return {
            "common": [self._common.value, self._common.variance],
            "prefill": [self._prefill.value, self._prefill.variance],
            "noise": self._noise,
            "drafters": [[name, part.value, part.variance] for name, part in self._drafters.items()],
            "cells": [
                [arm.format, arm.num_speculative_tokens, node, part.value, part.variance]
                for (arm, node), part in self._cells.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for an impossible state, and leaves all as it was."""
        common, prefill = _part(*state["common"]), _part(*state["prefill"])
        drafters = {str(name): _part(*part) for name, *part in state["drafters"]}
        cells = {(Arm(str(format), int(n)), int(node)): _part(*part) for format, n, node, *part in state["cells"]}
        noise = float(state["noise"])
        if not 0 < noise < inf:
            raise ValueError(f"a noise of {noise}")
        self._common, self._prefill, self._drafters, self._cells = common, prefill, drafters, cells
        self._noise, self._run = noise, []


def _part(value: float, variance: float) -> _Part:
    """Restore a part from a state. Raises ValueError."""
    if not (isfinite(value) and 0 <= variance < inf):
        raise ValueError(f"a correction of {value} with a variance of {variance}")
    return _Part(float(variance), float(value))


def _variance(parts: Sequence[tuple[_Part, float]]) -> float:
    """Variance of the sum of the parts."""
    return sum(share * share * part.variance for part, share in parts)


def _nodes(batch: int) -> tuple[tuple[int, float], ...]:
    """The powers of two around a batch size, with their shares."""
    position = log2(batch)
    low = floor(position)
    return ((low, 1.0),) if low == position else ((low, low + 1 - position), (low + 1, position - low))
