"""Live corrections of a calibration: multiplicative factors, learnt robustly from the run's own steps. Pure.

For each kind of pass (the target's, the verify pass, each drafter's) the logarithm of measured over predicted seconds is a sum
of three parts: one that all steps share (a slower machine today), one of that kind, and one of that kind around a batch size,
for verify passes of each draft length. Each part is a Gaussian random walk. The common part and those of the kinds are
estimated together, with their covariances, by an extended Kalman filter: drafting has another share in each draft length, so
steps of several lengths tell a wrong drafter from a wrong verify pass, though only their sum is timed. Where the drafting is
timed, it and the rest of the step are two observations. The parts of batch sizes are many and small; their covariances are
neglected. A later change moves mostly the common part, whose walk is the widest.

A surprise is clipped at CLIP standard deviations, so an outlier moves little, however slow. Several clipped to the same side in
a row are no outliers: all parts, the common one most, become uncertain enough to follow at once. Simulated: without that four
rollouts lose 17 points more where drafting becomes three times slower for good (docs/benchmarks/ablation.md, `jump`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, floor, inf, isfinite, log, log2
from typing import Any

from erollout.speculation.step import Arm

logger = logging.getLogger(__name__)

CLIP = 2.5
PERSISTENCE = 5
"""Number of consecutive clipped surprises of the same sign that count as a lasting change."""
COMMON_BLAME = 16.0
"""Variance that a lasting change adds to the common part, over what it adds to others: most often the machine has changed.
Were it equal, arms that don't run would keep predictions of before."""
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
"""Prior variances, beyond which no walk leads."""
_NOISE = 0.15**2
"""Assumed variance of a step's log time. One that is learnt gains nothing (docs/benchmarks/ablation.md)."""
_COMMON_WALK, _KIND_WALK, _CELL_WALK = 4e-4, 1e-6, 1e-6
"""Variance added per step to each part that the step touches."""
_PREFILL = 1.0
"""Prior variance of prompt passes, which are not calibrated. They are corrected apart from decoding."""


_Shares = Sequence[tuple[int, float]]
"""Indices of the parts that a joint estimate has of a sum, with their shares in it."""


class _Joint:
    """The common part and the kinds of passes, with their covariances: a Kalman filter."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {"": 0}
        """By kind; "" is the common part."""
        self.values = [0.0]
        self.covariances = [_COMMON]
        """A symmetric matrix, row by row."""

    def of(self, kind: str) -> int:
        """The index of a kind, which is added if it is new."""
        index = self.index.get(kind)
        if index is None:
            rows = self.rows()
            index = self.index[kind] = len(rows)
            self.values.append(0.0)
            self.covariances = [value for row in rows for value in (*row, 0.0)] + [0.0] * index + [_KIND]
        return index

    def rows(self) -> list[list[float]]:
        """The covariances."""
        size = len(self.values)
        return [self.covariances[start : start + size] for start in range(0, size * size, size)]

    def widen(self, index: int, walk: float, limit: float = inf) -> None:
        place = index * (len(self.values) + 1)
        self.covariances[place] += max(0.0, min(walk, limit - self.covariances[place]))

    def products(self, shares: _Shares) -> list[float]:
        """Covariances of all parts with a sum, in which the common part has the share of 1 and comes first."""
        size, known = len(self.values), self.covariances
        products = known[:size]
        for index, share in shares[1:]:
            row = known[index * size : (index + 1) * size]
            products = [sofar + share * value for sofar, value in zip(products, row, strict=True)]
        return products

    def learn(self, products: Sequence[float], surprise: float, total: float) -> None:
        """Update with the `products` of a sum, whose variance including noise is `total`."""
        step = surprise / total
        self.values = [value + product * step for value, product in zip(self.values, products, strict=True)]
        less = [one * other / total for one in products for other in products]
        self.covariances = [known - change for known, change in zip(self.covariances, less, strict=True)]

    def drop(self, kind: str) -> None:
        """Forget a kind."""
        gone = self.index.pop(kind, None)
        if gone is None:
            return
        kept = [index for index in range(len(self.values)) if index != gone]
        rows = self.rows()
        self.covariances = [rows[one][other] for one in kept for other in kept]
        self.values = [self.values[index] for index in kept]
        self.index = {name: index - (index > gone) for name, index in self.index.items()}


_Passes = Sequence[tuple[str, str, float]]
"""The passes of a step, each as (kind, key of its cells, share of the step's predicted seconds).

Cells of verify passes are kept by draft length, so their key holds it; those of drafters and the target are not.
"""


class Corrections:
    """The corrections of one replica's cost model."""

    def __init__(self) -> None:
        self._joint = _Joint()
        self._cells: dict[tuple[str, int], _Part] = {}
        """By kind (and draft length), and logarithm of a batch size."""
        self._prefill = _Part(_PREFILL)
        self._steps: list[float] = []
        """Consecutive clipped surprises of steps, or of what is left of them without their drafting; all of one sign."""
        self._drafts: list[float] = []
        """The same of drafting."""

    def factor(self, arm: Arm, batch: int, drafting: float) -> float:
        """Correction factor for an arm's predicted seconds. `drafting`: share of its drafts in them; 0 for OFF."""
        nodes, total = _nodes(batch), 0.0
        for kind, cell, share in _passes(arm, drafting):
            total += share * exp(self._value(kind, cell, nodes))
        return total * exp(self._joint.values[0])

    def _value(self, kind: str, cell: str, nodes: Sequence[tuple[int, float]]) -> float:
        """A kind of pass's own correction, without the common one."""
        index, cells = self._joint.index.get(kind), self._cells
        value = 0.0 if index is None else self._joint.values[index]
        for node, share in nodes:
            known = cells.get((cell, node))
            if known is not None:
                value += share * known.value
        return value

    def prefill_factor(self) -> float:
        """Correction factor for the predicted seconds of prompt tokens."""
        return exp(self._joint.values[0] + self._prefill.value)

    def observe_prefill(self, ratio: float) -> None:
        """Learn from a pass that consists mostly of prompt tokens, as `observe`."""
        surprise = log(max(ratio, SMALLEST_FACTOR) / self.prefill_factor())
        self._prefill.widen(_KIND_WALK, _PREFILL)
        total = self._prefill.variance + _NOISE
        limit = CLIP * total**0.5
        self._prefill.learn(1.0, max(-limit, min(limit, surprise)), total)

    def observe(self, arm: Arm, batch: int, drafting: float, ratio: float, drafting_ratio: float | None = None) -> None:
        """Learn from a step; where its drafting is timed, from that and from the rest of the step, which is the verify pass.

        Args:
            drafting: as in `factor`.
            ratio: its measured seconds over those predicted without corrections.
            drafting_ratio: the same of its drafting; None: not timed.
        """
        nodes, passes = _nodes(batch), _passes(arm, drafting)
        if drafting_ratio is None or not arm.speculates:
            self._learn(passes, nodes, ratio, self._steps)
            return
        self.observe_drafting(arm, batch, drafting_ratio)
        (verify, name, rest) = passes[1]
        self._learn([(verify, name, 1.0)], nodes, (ratio - drafting * drafting_ratio) / rest, self._steps)

    def observe_drafting(self, arm: Arm, batch: int, ratio: float) -> None:
        """Learn from the drafting of a step alone, as `observe`."""
        draft, _ = _names(arm)
        self._learn([(draft, draft, 1.0)], _nodes(batch), ratio, self._drafts)

    def _learn(self, passes: _Passes, nodes: Sequence[tuple[int, float]], ratio: float, run: list[float]) -> None:
        """Learn from the measured over the predicted seconds of passes that were timed together.

        Args:
            passes: as from `_passes`.
            run: clipped surprises before it; updated.
        """
        joint = self._joint
        indices, near, corrected = [], [], []
        joint.widen(0, _COMMON_WALK, _COMMON)
        for kind, name, share in passes:
            index = joint.of(kind)
            joint.widen(index, _KIND_WALK, _KIND)
            value = joint.values[index]
            parts = [(self._cell(name, node), weight) for node, weight in nodes]
            for part, weight in parts:
                value += weight * part.value
            indices.append(index)
            near.append(parts)
            corrected.append(share * exp(value))
        factor = sum(corrected)
        shares, cells = [(0, 1.0)], []
        for index, parts, seconds in zip(indices, near, corrected, strict=True):
            share = seconds / factor
            shares.append((index, share))
            cells += [(part, weight * share) for part, weight in parts]
        self._update(log(max(ratio, SMALLEST_FACTOR) / factor) - joint.values[0], shares, cells, run)

    def _update(self, surprise: float, shares: _Shares, cells: Sequence[tuple[_Part, float]], run: list[float]) -> None:
        """Split a surprise between the parts of a sum."""
        joint = self._joint
        products = joint.products(shares)
        variance = sum([share * products[index] for index, share in shares]) + _variance(cells)
        limit = CLIP * (variance + _NOISE) ** 0.5
        change = _change(run, surprise, limit)
        if change is None:
            surprise = max(-limit, min(limit, surprise))
        elif change * change > variance:
            self._jump(shares, cells, change * change - variance)
            surprise, variance, products = change, change * change, joint.products(shares)
        total = variance + _NOISE
        joint.learn(products, surprise, total)
        for part, share in cells:
            part.learn(share, surprise, total)

    def _cell(self, name: str, node: int) -> _Part:
        """The part of a batch size, after a step of its walk."""
        part = self._cells.get((name, node))
        if part is None:
            part = self._cells[name, node] = _Part(_CELL)
        part.variance = min(part.variance + _CELL_WALK, _CELL)
        return part

    def _jump(self, shares: _Shares, cells: Sequence[tuple[_Part, float]], variance: float) -> None:
        """Add so much variance to a sum, COMMON_BLAME times as much to the common part as to the others."""
        kinds = shares[1:]
        unit = COMMON_BLAME + sum([share * share for _, share in kinds]) + sum([share * share for _, share in cells])
        each = variance / unit
        self._joint.widen(0, COMMON_BLAME * each)
        for index, _ in kinds:
            self._joint.widen(index, each)
        for part, _ in cells:
            part.variance += each

    def forget(self, format: str) -> None:
        """Drop what was learnt about one drafter."""
        kind = f"draft {format}"
        self._joint.drop(kind)
        self._cells = {key: part for key, part in self._cells.items() if key[0] != kind}

    def state_dict(self) -> dict[str, object]:
        joint = self._joint
        rows = joint.rows()
        return {
            "common": [joint.values[0], rows[0][0]],
            "prefill": [self._prefill.value, self._prefill.variance],
            "kinds": [[kind, joint.values[index], rows[index][index]] for kind, index in joint.index.items() if index],
            "covariances": [row[:index] for index, row in enumerate(rows) if index],
            "cells": [[kind, node, part.value, part.variance] for (kind, node), part in self._cells.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state. Only the common parts are taken of older ones, whose corrections are by drafter, not by kind of pass.

        Raises ValueError for an impossible state, and leaves all as it was.
        """
        try:
            common, prefill = _part(*state["common"]), _part(*state["prefill"])
            by_drafter = [(str(drafter), _part(*part)) for drafter, *part in state.get("drafters", ())]
            known = {"kinds": (), "cells": ()} if "drafters" in state else state
            kinds = {str(kind): _part(*part) for kind, *part in known["kinds"]}
            cells = {(str(kind), int(node)): _part(*part) for kind, node, *part in known["cells"]}
            joint = _restored(common, kinds, known.get("covariances", ()))
        except (KeyError, TypeError) as error:
            raise ValueError(f"corrections of another form: {error!r}") from error
        if by_drafter:
            logger.info(
                "the checkpoint corrects the costs of whole steps by drafter; only what all steps share is taken, and what is "
                "specific to drafters is learnt anew"
            )
        self._joint, self._prefill, self._cells = joint, prefill, cells
        self._steps, self._drafts = [], []


def _passes(arm: Arm, drafting: float) -> _Passes:
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


def _change(run: list[float], surprise: float, limit: float) -> float | None:
    """The smallest of PERSISTENCE clipped surprises in a row to the same side; None while there are fewer. Updates the run."""
    if abs(surprise) <= limit or (run and run[0] * surprise < 0):
        run.clear()
    if abs(surprise) > limit:
        run.append(surprise)
    if len(run) < PERSISTENCE:
        return None
    least = min(run, key=abs)
    run.clear()
    return least


def _restored(common: _Part, kinds: Mapping[str, _Part], covariances: Sequence[Sequence[float]]) -> _Joint:
    """Restore the joint estimate. `covariances`: of each kind with what stands before it; empty: none. Raises ValueError."""
    if "" in kinds:
        raise ValueError("a correction of a kind of pass without a name")
    joint, parts = _Joint(), [common, *kinds.values()]
    for kind in kinds:
        joint.of(kind)
    joint.values = [part.value for part in parts]
    rows = joint.rows()
    for index, part in enumerate(parts):
        rows[index][index] = part.variance
    if covariances and [len(row) for row in covariances] != list(range(1, len(parts))):
        raise ValueError("covariances that do not fit the kinds of passes")
    for index, row in enumerate(covariances, 1):
        for other, value in enumerate(map(float, row)):
            most = (parts[index].variance * parts[other].variance) ** 0.5
            if not abs(value) <= most * (1 + 1e-6):
                raise ValueError(f"a covariance of {value}, where {most} is the largest possible")
            rows[index][other] = rows[other][index] = value
    joint.covariances = [value for row in rows for value in row]
    return joint


def _variance(parts: Sequence[tuple[_Part, float]]) -> float:
    """Variance of the sum of the parts."""
    return sum(share * share * part.variance for part, share in parts)


@cache
def _nodes(batch: int) -> tuple[tuple[int, float], ...]:
    """The powers of two around a batch size, with their shares."""
    position = log2(batch)
    low = floor(position)
    return ((low, 1.0),) if low == position else ((low, low + 1 - position), (low + 1, position - low))
