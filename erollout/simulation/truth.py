"""The simulated hardware: what steps really take, and what is really accepted. Replicas only see what comes of it."""

from collections.abc import Sequence
from math import log2

from erollout.simulation.draft_outcomes import SimulatedAcceptance
from erollout.speculation.cost.cost_model import CONTEXT_STEPS, CalibratedCost, PassTimes
from erollout.speculation.step import OFF, Arm, Load, StepOutcome


class Truth:
    """Shared by all replicas, which are alike."""

    def __init__(self, passes: PassTimes, acceptance: SimulatedAcceptance, arms: Sequence[Arm], noise: float = 0.0) -> None:
        """
        Args:
            arms: what the best choice is sought among.
            noise: standard deviation of the logarithm of a step's time.
        """
        self.acceptance = acceptance
        self.arms = tuple(dict.fromkeys((OFF, *arms)))
        self.noise = noise
        self._cost = CalibratedCost(passes)
        self._best: dict[tuple[int, int], Arm] = {}

    def step_seconds(self, arm: Arm, load: Load) -> float:
        """Without noise."""
        return self._cost.step_seconds(arm, load)

    def seconds_per_token(self, arm: Arm, load: Load) -> float:
        """In which each decoding sequence gets one token; what prompt tokens add is left out."""
        decoding = Load(load.decoding, load.context)
        return self.step_seconds(arm, decoding) / self.acceptance.length(arm.num_speculative_tokens)

    def best(self, load: Load) -> Arm:
        """What an oracle would do; prompt tokens don't count."""
        key = load.decoding, int(CONTEXT_STEPS * log2(max(1.0, load.context)))
        if key not in self._best:
            self._best[key] = min(self.arms, key=lambda arm: self.seconds_per_token(arm, load))
        return self._best[key]


class Oracle:
    """Stands in a replica where the toggle does, and knows the truth."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.arms = truth.arms

    def decide(self, load: Load, imposed: Arm | None = None) -> Arm:
        return self.truth.best(load) if imposed is None else imposed

    def observe(self, outcome: StepOutcome) -> None:
        """Nothing is to be learnt."""

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        return tuple(self.truth.seconds_per_token(arm, load) for arm in self.arms)
