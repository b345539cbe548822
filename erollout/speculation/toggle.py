"""Which arm a replica's next step takes, and what was learnt from the steps before. Pure."""

from collections.abc import Sequence

from erollout.config import SpeculationConfig
from erollout.speculation.cost_model import CostModel
from erollout.speculation.step import Arm, Load, StepOutcome


class Toggle:
    """Of one replica, over the whole run."""

    def __init__(self, options: SpeculationConfig, formats: Sequence[str], cost: CostModel) -> None:
        """`formats`: the drafters that there are, the default one first; empty with mode off."""
        raise NotImplementedError

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What may be chosen, OFF first where it may be; the same list on all replicas."""
        raise NotImplementedError

    def begin_rollout(self, learns: bool) -> None:
        """`learns`: false for a validation rollout, which leaves no trace in acceptance, costs or ladder."""
        raise NotImplementedError

    def decide(self, load: Load, imposed: Arm | None = None) -> Arm:
        """The arm of the next step; an imposed one (the cluster's) is taken as it is."""
        raise NotImplementedError

    def observe(self, outcome: StepOutcome) -> None:
        """What the step after the last decision came to."""
        raise NotImplementedError

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        """Predicted for every arm: seconds in which each decoding sequence gets one token."""
        raise NotImplementedError

    def end_rollout(self) -> None:
        """Close the rollout's trace; where speculation lost time over the whole of it, say so and hold it back."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, object]:
        """Acceptance, online costs and ladder, as JSON: for the checkpoint."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, object]) -> None:
        raise NotImplementedError
