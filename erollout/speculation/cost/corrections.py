"""Live corrections of a calibration: multiplicative factors, learnt robustly from the run's own steps. Pure.

For each kind of pass (the target's, the verify pass, each drafter's) the logarithm of measured over predicted seconds is a sum
of three parts: one that all steps share (a slower machine today), one of that kind, and one of that kind around a batch size,
for verify passes of each draft length. Each part is a Gaussian random walk, and the surprise of a step, or of its drafting
where that is timed, is split between them in proportion to their uncertainty: a Kalman filter that neglects correlations. So
the first steps move all parts, and a later change moves the common one, whose walk is the widest. A drafter that is twice as
fast as calibrated shows in all draft lengths at once.

A surprise is clipped at CLIP standard deviations, so an outlier moves little, however slow. Several clipped to the same side in
a row are no outliers: all parts, the common one most, become uncertain enough to follow at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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


_COMMON, _KIND, _CELL = 0.2**2, 0.3**2, 0.1**2
"""Prior variances, which are upper limits as well."""
_COMMON_WALK, _KIND_WALK, _CELL_WALK = 4e-5, 1e-6, 1e-6
"""Variance added per step to each part that the step touches."""
_PREFILL = 1.0
"""Prior variance of prompt passes, which are not calibrated. They are corrected apart from decoding."""


class Corrections:
    """The corrections of one replica's cost model."""

    def __init__(self) -> None:
        self._common = _Part(_COMMON)
        self._kinds: dict[str, _Part] = {}
        self._cells: dict[tuple[str, int], _Part] = {}
        """By kind (and draft length), and logarithm of a batch size."""
        self._prefill = _Part(_PREFILL)
        self._noise = 0.05**2
        self._run: list[float] = []
        """Consecutive clipped surprises, all of one sign."""

    def factor(self, arm: Arm, batch: int, drafting: float) -> float:
        """Correction factor for an arm's predicted seconds. `drafting`: share of its drafts in them; 0 for OFF."""
        nodes, total = _nodes(batch), 0.0
        for kind, cell, share in _passes(arm, drafting):
            total += share * exp(self._value(kind, cell, nodes))
        return total * exp(self._common.value)

    def _value(self, kind: str, cell: str, nodes: Sequence[tuple[int, float]]) -> float:
        """A kind of pass's own correction, without the common one."""
        part, cells = self._kinds.get(kind), self._cells
        value = 0.0 if part is None else part.value
        for node, share in nodes:
            known = cells.get((cell, node))
            if known is not None:
                value += share * known.value
        return value

    def _parts(self, kind: str, cell: str, nodes: Sequence[tuple[int, float]], share: float) -> list[tuple[_Part, float]]:
        """The parts of a pass's correction, each with its weight in the logarithm of the step's seconds.

        `share`: share of the pass in the step's seconds."""
        part = self._kinds.setdefault(kind, _Part(_KIND))
        part.widen(_KIND_WALK, _KIND)
        parts = [(part, share)]
        for node, near in nodes:
            known = self._cells.setdefault((cell, node), _Part(_CELL))
            known.widen(_CELL_WALK, _CELL)
            parts.append((known, near * share))
        return parts

    def prefill_factor(self) -> float:
        """Correction factor for the predicted seconds of prompt tokens."""
        return exp(self._common.value + self._prefill.value)

    def observe_prefill(self, ratio: float) -> None:
        """Learn from a pass that consists mostly of prompt tokens, as `observe`."""
        surprise = log(max(ratio, SMALLEST_FACTOR) / self.prefill_factor())
        self._prefill.widen(_KIND_WALK, _PREFILL)
        total = self._prefill.variance + self._noise
        limit = CLIP * total**0.5
        self._prefill.learn(1.0, max(-limit, min(limit, surprise)), total)

    def observe(self, arm: Arm, batch: int, drafting: float, ratio: float, drafting_ratio: float | None = None) -> None:
        """Learn from a step.

        Args:
            drafting: as in `factor`.
            ratio: its measured seconds over those predicted without corrections.
            drafting_ratio: the same of its drafting; None: not timed.
        """
        nodes, common = _nodes(batch), self._common
        if drafting_ratio is not None:
            self.observe_drafting(arm, batch, drafting_ratio)
        factor = self.factor(arm, batch, drafting)
        surprise = log(max(ratio, SMALLEST_FACTOR) / factor)
        common.widen(_COMMON_WALK, _COMMON)
        parts = [(common, 1.0)]
        for kind, cell, share in _passes(arm, drafting):
            corrected = share * exp(self._value(kind, cell, nodes) + common.value) / factor
            parts += self._parts(kind, cell, nodes, corrected)
        surprise = self._clipped(surprise, parts)
        total = _variance(parts) + self._noise
        for part, share in parts:
            part.learn(share, surprise, total)

    def observe_drafting(self, arm: Arm, batch: int, ratio: float) -> None:
        """Learn from the drafting of a step alone, as `observe`."""
        nodes, (kind, cell, _) = _nodes(batch), _passes(arm, 1.0)[0]
        surprise = log(max(ratio, SMALLEST_FACTOR)) - self._value(kind, cell, nodes) - self._common.value
        own = self._parts(kind, cell, nodes, 1.0)
        total = _variance(own) + self._common.variance + self._noise
        limit = CLIP * total**0.5
        for part, share in own:
            part.learn(share, max(-limit, min(limit, surprise)), total)

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
        kind = f"draft {format}"
        self._kinds.pop(kind, None)
        self._cells = {key: part for key, part in self._cells.items() if key[0] != kind}

    def state_dict(self) -> dict[str, object]:
        return {
            "common": [self._common.value, self._common.variance],
            "prefill": [self._prefill.value, self._prefill.variance],
            "noise": self._noise,
            "kinds": [[kind, part.value, part.variance] for kind, part in self._kinds.items()],
            "cells": [[kind, node, part.value, part.variance] for (kind, node), part in self._cells.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state. Only the common parts are taken of older ones, whose corrections are by drafter, not by kind of pass.

        Raises ValueError for an impossible state, and leaves all as it was.
        """
        common, prefill, noise = _part(*state["common"]), _part(*state["prefill"]), float(state["noise"])
        by_kind = "drafters" not in state
        kinds = {str(kind): _part(*part) for kind, *part in (state["kinds"] if by_kind else ())}
        cells = {(str(kind), int(node)): _part(*part) for kind, node, *part in (state["cells"] if by_kind else ())}
        if not 0 < noise < inf:
            raise ValueError(f"a noise of {noise}")
        self._common, self._prefill, self._kinds, self._cells = common, prefill, kinds, cells
        self._noise, self._run = noise, []


def _passes(arm: Arm, drafting: float) -> tuple[tuple[str, str, float], ...]:
    """The passes of a step, each as (kind, key of its cells, share of the step's predicted seconds).

    Cells of verify passes are kept by draft length, so their key holds it; those of drafters and the target are not."""
    if not arm.speculates:
        return (("target", "target", 1.0),)
    draft, verify = _names(arm)
    return (draft, draft, drafting), ("verify", verify, 1 - drafting)


@cache
def _names(arm: Arm) -> tuple[str, str]:
    return f"draft {arm.format}", f"verify {arm.num_speculative_tokens}"


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
