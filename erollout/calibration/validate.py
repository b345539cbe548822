"""Validation of a calibration: does it predict where speculation pays, against the measured passes of a sweep?

A cycle at a batch, context and draft length n is measured where the sweep has all three of its passes. Its speed-up is
L T_T / (n T_D + T_V) with the acceptance length L; the prediction is right if it lies on the same side of 1. Cycles whose
measured speed-up is within NEAR of 1 are near the boundary: the others are easy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, isclose

from erollout.calibration.file import Calibration, Identity
from erollout.calibration.fit import Measured, accuracy, fit
from erollout.errors import UserError
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.cost.roofline import ModelSize, Pass
from erollout.speculation.format_choice import expected_length
from erollout.speculation.step import Arm

NEAR = 0.15
FEWEST_NEAR = 10
"""Least number of cycles near the boundary for a meaningful share."""

Lengths = Callable[[int], float]
"""Acceptance length by num_speculative_tokens."""
Predictor = Callable[[int], PassTimes]
"""Pass times that predict a batch size: the same for all, or fitted without this batch size."""


def lengths_at(acceptance: float) -> Lengths:
    """Acceptance lengths with the same acceptance at every position of a draft: 1 + a + ... + a^n."""
    return lambda n: expected_length(acceptance, n)


@dataclass(frozen=True, slots=True)
class Cycle:
    """Measured seconds of one cycle's passes."""

    format: str
    batch: int
    context: float
    num_speculative_tokens: int
    target: float
    draft: float
    """Seconds of one drafter step."""
    verify: float

    @property
    def arm(self) -> Arm:
        return Arm(self.format, self.num_speculative_tokens)

    @property
    def seconds(self) -> float:
        return self.num_speculative_tokens * self.draft + self.verify

    def speed_up(self, acceptance_length: float) -> float:
        return acceptance_length * self.target / self.seconds


def measured_cycles(points: Sequence[Measured]) -> list[Cycle]:
    """Cycles of all (format, batch, context, n) with a drafter step, a verify pass and a target step."""
    at: dict[tuple[Pass, int, float, int], float] = {
        (p.kind, p.batch, p.context, p.num_speculative_tokens): p.seconds for p in points if p.kind != "draft"
    }
    cycles = []
    for p in points:
        target = at.get(("target", p.batch, p.context, 0))
        verify = at.get(("verify", p.batch, p.context, p.num_speculative_tokens))
        if p.kind == "draft" and target and verify:
            cycles.append(Cycle(p.format, p.batch, p.context, p.num_speculative_tokens, target, p.seconds, verify))
    return cycles


@dataclass(slots=True)
class Score:
    """Count of right predictions."""

    right: int = 0
    total: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.total += 1

    @property
    def share(self) -> float:
        """Share of right predictions; NaN without any."""
        return self.right / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.right}/{self.total} = {100 * self.share:.1f} %" if self.total else "none"


@dataclass(frozen=True, slots=True)
class Validation:
    components: dict[str, dict[str, float]]
    """Accuracy of the seconds, by pass and format."""
    sign: Score
    """Predictions whether speculation pays."""
    near: Score
    """The same for cycles near the boundary."""
    by_length: dict[int, Score]
    """The same by num_speculative_tokens."""
    wrong: list[tuple[Cycle, float, float]]
    """Cycles with a wrong sign, with their measured and predicted speed-up."""


@dataclass(frozen=True, slots=True)
class Gates:
    """Accuracy that a calibration must reach."""

    sign: float = 0.97
    near: float = 0.92
    mape: float = 15.0
    """Largest mean absolute percentage error of every component."""

    def failures(self, validation: Validation) -> list[str]:
        """Failures, one line each; none if all is well."""
        failures = []
        if not validation.sign.share >= self.sign:
            failures.append(f"sign accuracy {validation.sign} is below {100 * self.sign:.0f} %")
        if validation.near.total >= FEWEST_NEAR and validation.near.share < self.near:
            failures.append(f"sign accuracy near the boundary {validation.near} is below {100 * self.near:.0f} %")
        for name, figures in validation.components.items():
            if not figures["mape"] <= self.mape:
                failures.append(f"MAPE of {name} is {figures['mape']:.1f} %, above {self.mape:.0f} %")
        return failures


def validate(points: Sequence[Measured], predictor: Predictor, lengths: Lengths) -> Validation:
    """Compare predictions with a sweep."""
    sign, near = Score(), Score()
    by_length: dict[int, Score] = {}
    wrong = []
    for cycle in measured_cycles(points):
        length = lengths(cycle.num_speculative_tokens)
        measured = cycle.speed_up(length)
        predicted = predictor(cycle.batch).speed_up(cycle.arm, cycle.batch, cycle.context, length)
        right = (measured > 1) == (predicted > 1)
        sign.add(right)
        by_length.setdefault(cycle.num_speculative_tokens, Score()).add(right)
        if abs(measured - 1) < NEAR:
            near.add(right)
        if not right:
            wrong.append((cycle, measured, predicted))
    kinds = dict.fromkeys((p.kind, p.format) for p in points)
    components = {
        " ".join(kind).strip(): accuracy([p for p in points if (p.kind, p.format) == kind], predictor) for kind in kinds
    }
    return Validation(components, sign, near, dict(sorted(by_length.items())), wrong)


def held_out(points: Sequence[Measured], size: ModelSize, identity: Identity) -> Predictor:
    """For each batch size, a calibration fitted to the points of all other batch sizes. Points that differ only in context are
    too alike to be held out singly.

    Raises UserError for fewer than two batch sizes.
    """
    batches = {p.batch for p in points}
    if len(batches) < 2:
        raise UserError(f"can't hold out batch sizes: the sweep has {len(batches)} batch size; measure a second one too")
    passes = {batch: fit([p for p in points if p.batch != batch], size, identity).passes() for batch in batches}
    return passes.__getitem__


def seen(calibration: Calibration, points: Sequence[Measured]) -> int:
    """Number of these points that the calibration was fitted to: its tables have the same time at the same point.

    Times are compared, not file names, because a copy or a part of the sweep is in sample too. 0 for a calibration without
    tables.
    """
    times = {
        (kind, format, p.batch, p.context, p.num_speculative_tokens): exp(p.log_ratio)
        * calibration.roofline.seconds(kind, format, p.batch, p.context, p.num_speculative_tokens)
        for (kind, format), table in calibration.tables.items()
        for p in table
    }
    return sum(
        isclose(times.get((p.kind, p.format, p.batch, p.context, p.num_speculative_tokens), 0.0), p.seconds, rel_tol=1e-9)
        for p in points
    )
