"""Regret: time per token that a way of choosing arms loses against always choosing the best measured arm.

There are two weightings: all measured (batch, context) alike, and by the steps of a long-tailed rollout, which starts with all
sequences and ends with one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

from erollout.calibration.validate import Cycle, Lengths, Predictor
from erollout.speculation.cost.cost_model import PassTimes
from erollout.speculation.step import OFF, Arm

MEDIAN_TOKENS, SIGMA, MAX_TOKENS = 1024, 1.0, 8192
"""Parameters of the rollout's response lengths: lognormal, up to the longest."""


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """A batch and context of a sweep, with its measured times."""

    batch: int
    context: float
    seconds_per_token: Mapping[Arm, float]
    """Measured seconds per token of each sequence, per arm, OFF included."""

    @property
    def best(self) -> float:
        return min(self.seconds_per_token.values())


Chooser = Callable[[LoadPoint], Arm]


@dataclass(frozen=True, slots=True)
class Regret:
    """Shares of time lost, in both weightings."""

    grid: float
    rollout: float


def measured_places(cycles: Sequence[Cycle], lengths: Lengths) -> list[LoadPoint]:
    places: dict[tuple[int, float], dict[Arm, float]] = {}
    for cycle in cycles:
        arms = places.setdefault((cycle.batch, cycle.context), {OFF: cycle.target})
        arms[cycle.arm] = cycle.seconds / lengths(cycle.num_speculative_tokens)
    return [LoadPoint(batch, context, arms) for (batch, context), arms in sorted(places.items())]


def regrets(places: Sequence[LoadPoint], choosers: Mapping[str, Chooser]) -> dict[str, Regret]:
    """Regret of each chooser."""
    weights = rollout_weights(places)
    return {
        name: Regret(_lost(places, [1 / place.best for place in places], chooser), _lost(places, weights, chooser))
        for name, chooser in choosers.items()
    }


def _lost(places: Sequence[LoadPoint], weights: Sequence[float], chooser: Chooser) -> float:
    chosen = sum(w * place.seconds_per_token[chooser(place)] for place, w in zip(places, weights, strict=True))
    return chosen / sum(w * place.best for place, w in zip(places, weights, strict=True)) - 1


def rollout_weights(places: Sequence[LoadPoint]) -> list[float]:
    """Number of a rollout's steps nearest to each point. It begins with the sweep's largest batch and ends with one."""
    count = max(place.batch for place in places)
    quantiles = (NormalDist(log(MEDIAN_TOKENS), SIGMA).inv_cdf((i + 0.5) / count) for i in range(count))
    ends = sorted(min(MAX_TOKENS, round(exp(quantile))) for quantile in quantiles)
    weights = dict.fromkeys(((place.batch, place.context) for place in places), 0.0)
    finished, position = 0, 0
    step = 16
    while finished < count:
        running = count - finished
        nearest = min(weights, key=lambda at: abs(log(at[0] / running)) + abs(log(at[1] / max(1, position))))
        weights[nearest] += step
        position += step
        while finished < count and ends[finished] <= position:
            finished += 1
    return [weights[place.batch, place.context] for place in places]


def autoregressive(place: LoadPoint) -> Arm:
    return OFF


def always(arm: Arm) -> Chooser:
    """A chooser of the arm wherever it was measured."""
    return lambda place: arm if arm in place.seconds_per_token else OFF


def below(batch: int, arm: Arm) -> Chooser:
    """A chooser of the arm up to a batch size."""
    return lambda place: arm if place.batch <= batch and arm in place.seconds_per_token else OFF


def best_threshold(places: Sequence[LoadPoint]) -> tuple[int, Arm]:
    """The fixed batch size and arm with the least regret over the rollout, known only in hindsight."""
    arms = sorted({arm for place in places for arm in place.seconds_per_token if arm.speculates})
    candidates = [(batch, arm) for batch in sorted({0, *(place.batch for place in places)}) for arm in arms]
    weights = rollout_weights(places)
    return min(candidates, key=lambda candidate: _lost(places, weights, below(*candidate)))


def predicted_best(predictor: Predictor, lengths: Lengths) -> Chooser:
    """A chooser of the arm with the least predicted time per token."""

    def seconds_per_token(passes: PassTimes, place: LoadPoint, arm: Arm) -> float:
        return passes.step_seconds(arm, place.batch, place.context) / (
            lengths(arm.num_speculative_tokens) if arm.speculates else 1
        )

    def choose(place: LoadPoint) -> Arm:
        passes = predictor(place.batch)
        return min(place.seconds_per_token, key=lambda arm: seconds_per_token(passes, place, arm))

    return choose
