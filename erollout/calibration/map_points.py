"""Data for plots/speculation_map.py: predictions on a grid of batches and contexts, and measured points of a sweep."""

from collections.abc import Callable, Sequence

from erollout.calibration.file import Calibration
from erollout.calibration.regret import LoadPoint, predicted_best
from erollout.plots.speculation_map import Measurement, Prediction
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.step import OFF, Arm

CELLS_PER_OCTAVE = 8
SMALL_BATCHES = 64
"""Largest batch size up to which each one is a column: the boundary rises and falls there."""


def measured_lengths(calibration: Calibration) -> list[int]:
    """The measured values of num_speculative_tokens."""
    verify = calibration.tables.get(("verify", ""), ())
    return sorted({point.num_speculative_tokens for point in verify})


def predictions(
    passes: PassTimes, lengths: Callable[[int], float], arms: Sequence[Arm], batches: Sequence[int], contexts: Sequence[int]
) -> Prediction:
    """The best arm and its speed-up at every batch and context.

    Args:
        lengths: acceptance length by num_speculative_tokens.
        arms: arms that draft.
    """

    def best_draft(batch: int, context: int) -> tuple[float, Arm]:
        ups = ((passes.speed_up(arm, batch, context, lengths(arm.num_speculative_tokens)), arm) for arm in arms)
        return max(ups, key=lambda pair: pair[0])

    cells = [[best_draft(batch, context) for batch in batches] for context in contexts]
    best = [[arm if up > 1 else OFF for up, arm in row] for row in cells]
    return Prediction(batches, contexts, best, [[up for up, _ in row] for row in cells])


def measurements(places: Sequence[LoadPoint], passes: PassTimes, lengths: Callable[[int], float]) -> list[Measurement]:
    """The best measured arm at every point, and the one predicted best among those measured."""
    choose = predicted_best(lambda batch: passes, lengths)
    return [
        Measurement(
            place.batch,
            round(place.context),
            min(place.seconds_per_token, key=lambda arm: place.seconds_per_token[arm]),
            choose(place),
        )
        for place in places
    ]


def axis(low: float, high: float, dense_to: int = 0) -> list[int]:
    """Integers from low to high: all up to `dense_to`, above that CELLS_PER_OCTAVE per octave."""
    values, value = list(range(int(low), min(dense_to, int(high)) + 1)), max(low, dense_to)
    while value < high:
        value *= 2 ** (1 / CELLS_PER_OCTAVE)
        values.append(round(min(value, high)))
    return sorted(set(values) | {int(low)})
