"""The simulated hardware: true step times and true acceptance. Replicas only observe outcomes."""

from collections.abc import Sequence
from math import log2

from erollout.simulation.draft_outcomes import SimulatedAcceptance
from erollout.speculation.cost.cost_model import CONTEXT_STEPS, CalibratedCost, PassTimes
from erollout.speculation.step import OFF, Arm, Load, StepOutcome


class Truth:
    """True times and acceptance, shared by all replicas, which are alike."""

    def __init__(self, passes: PassTimes, acceptance: SimulatedAcceptance, arms: Sequence[Arm], noise: float = 0.0) -> None:
        """
        Args:
            arms: candidates for the best arm.
            noise: standard deviation of the logarithm of a step's time.
        """
        self.acceptance = acceptance
        self.arms = tuple(dict.fromkeys((OFF, *arms)))
        self.noise = noise
        self._cost = CalibratedCost(passes)
        self._best: dict[tuple[int, int], Arm] = {}

    def step_seconds(self, arm: Arm, load: Load) -> float:
        """True seconds of a step, without noise."""
        return self._cost.step_seconds(arm, load)

    def seconds_per_token(self, arm: Arm, load: Load) -> float:
        """True seconds per token of each decoding sequence, without the cost of prompt tokens."""
        decoding = Load(load.decoding, load.context)
        return self.step_seconds(arm, decoding) / self.acceptance.length(arm.num_speculative_tokens)

    def best(self, load: Load) -> Arm:
        """The best arm at a load; prompt tokens don't count."""
        key = load.decoding, int(CONTEXT_STEPS * log2(max(1.0, load.context)))
        if key not in self._best:
            self._best[key] = min(self.arms, key=lambda arm: self.seconds_per_token(arm, load))
        return self._best[key]


class Oracle:
    """A chooser in place of the toggle that knows the truth."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.arms = truth.arms

    def decide(self, load: Load, imposed: Arm | None = None) -> Arm:
        return self.truth.best(load) if imposed is None else imposed

    def observe(self, outcome: StepOutcome) -> None:
        """Does nothing: the oracle has nothing to learn."""

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        return tuple(self.truth.seconds_per_token(arm, load) for arm in self.arms)
