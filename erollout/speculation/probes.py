"""Probes: a few steps with an arm that is not the chosen one, to keep its estimates up to date. Pure.

Probes are paid from a budget, SHARE of the elapsed seconds, and are `interval` steps apart; an arm is probed again only after
that many steps without it. Simulated: without probes four rollouts lose 4 points more where the calibration takes the drafter
for twice as slow as it is (docs/benchmarks/ablation.md, also for the following). Without the budget they lose 2 points more
where a drafter step takes eight times as long as the calibration's: hopeless arms are probed as often as others. With probes of
one step an outlier closes an arm until the next probe: at worst 11 % of a rollout, against 2 % with two.
"""

from math import isfinite
from typing import Any

from erollout.speculation.step import OFF, Arm

SHARE = 0.003
"""Share of all seconds that probes may lose, as predicted."""
FIRST_STEPS = 6.0
"""Initial budget, in autoregressive steps."""
AT_ONCE = 4
"""Number of steps before the first probe: until then the cost model is not checked against the machine."""
MOST_CHARGED = 1.25
"""Largest multiple of a step's predicted seconds that is charged to the budget: an outlier does not end probing."""

Kind = tuple[Arm, int]
"""An arm and the bit length of the batch size."""


class Probes:
    """The probes of one replica, over the whole run."""

    def __init__(self, interval: int, steps: int) -> None:
        """See ToggleConfig.probe_interval and probe_steps."""
        self.interval = interval
        self.steps = steps
        self.arm: Arm | None = None
        """The arm being probed; None: none is."""
        self._step = 0
        self._quiet_until = AT_ONCE
        self._budget: float | None = None
        self._due: dict[Kind, int] = {}
        """First step at which a probe of an arm is due."""
        self._kind: Kind = (OFF, 0)
        self._worth = 0.0
        self._left = 0

    def passed(self, seconds: float) -> None:
        """Account for one completed step of any arm."""
        self._step += 1
        if self._budget is not None:
            self._budget += SHARE * seconds

    def seen(self, arm: Arm, batch: int) -> None:
        """Account for a measured step of the chosen arm: no probe of it is due for a while."""
        self._due[arm, batch.bit_length()] = self._step + self.interval

    def may_start(self) -> bool:
        return self.interval > 0 and self._step >= self._quiet_until

    def start(self, arm: Arm, batch: int, seconds: float, worth: float, per_token: float) -> bool:
        """Start probing an arm if its probe is due and affordable; it then is `arm` until enough steps are measured.

        Args:
            seconds: predicted seconds of a step with the arm.
            worth: predicted seconds in which the chosen arm yields as many tokens.
            per_token: predicted seconds per token of the chosen arm.
        """
        if self._budget is None:
            self._budget = FIRST_STEPS * per_token
        kind = (arm, batch.bit_length())
        if (seconds - worth) * self.steps > self._budget or self._step < self._due.get(kind, 0):
            return False
        self.arm, self._kind, self._worth = arm, kind, worth
        self._left = self.steps
        return True

    def measured(self, predicted: float, seconds: float) -> None:
        """Account for a step of the probed arm, with its predicted and measured seconds."""
        self._charge(min(seconds, MOST_CHARGED * predicted))

    def spoilt(self, seconds: float) -> None:
        """Account for a probe's step that teaches nothing about its arm, because drafts were cut or prompts were prefilled."""
        self._charge(seconds)

    def _charge(self, seconds: float) -> None:
        """Pay for one step of a probe, which may be its last."""
        assert self._budget is not None
        self._budget -= max(0.0, seconds - self._worth)
        self._left -= 1
        if self._left <= 0:
            self._due[self._kind] = self._quiet_until = self._step + self.interval
            self.arm = None

    def cancel(self) -> None:
        """Stop probing without changing the plan."""
        self.arm = None

    def state_dict(self) -> dict[str, object]:
        """The state, with steps counted from now."""
        plans = [[arm.format, arm.num_speculative_tokens, size, due - self._step] for (arm, size), due in self._due.items()]
        return {"budget": self._budget, "quiet": max(0, self._quiet_until - self._step), "plans": plans}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for an invalid state."""
        budget = None if state["budget"] is None else float(state["budget"])
        if budget is not None and not isfinite(budget):
            raise ValueError(f"a budget of {budget} s for probes")
        self._step, self._quiet_until, self._budget = 0, int(state["quiet"]), budget
        plans = [(Arm(str(format), int(n)), int(size), int(due)) for format, n, size, due, *_ in state["plans"]]
        self._due = {(arm, size): due for arm, size, due in plans}
        self.arm = None
