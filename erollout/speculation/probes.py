"""Probes: a few steps with an arm that is not the chosen one, to keep its estimates up to date. Pure.

Probes are paid from a budget, SHARE of the elapsed seconds. Arms never measured near the present batch size come first; an arm
that agreed with its prediction is probed again after `interval` steps, and a hopeless one ever more rarely.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any

from erollout.speculation.step import OFF, Arm

SHARE = 0.003
"""Share of all seconds that probes may lose, as predicted."""
FIRST_STEPS = 6.0
"""Initial budget, in autoregressive steps; restored after a change of the machine."""
EARLY = 8
"""Divisor of the interval that gives the pause between any two probes, and before repeating one that ended in a surprise."""
AT_ONCE = 4
"""Number of steps before the first probe: until then the cost model is not checked against the machine."""
HOPELESS = 1.5
"""Ratio to the chosen arm's seconds per token above which a probed arm counts as hopeless."""
RAREST = 16
"""Longest wait between probes of a hopeless arm, in intervals."""
SURPRISE = 1.25
"""Ratio of measured to predicted seconds, or its inverse, above which another probe follows soon."""
LASTING = 4
"""Number of consecutive surprises to the same side that count as a change of the machine."""
EXTENSIONS = 2
"""Number of times that a probe is extended when it ends in a surprise."""

Kind = tuple[Arm, int]
"""An arm and the bit length of the batch size."""


@dataclass(slots=True)
class _Plan:
    due: int
    """First step at which a probe is due."""
    wait: int
    """Number of steps between two probes."""


class Probes:
    """The probes of one replica, over the whole run."""

    def __init__(self, interval: int, steps: int) -> None:
        """See ToggleConfig.probe_interval and probe_steps."""
        self.interval = interval
        self.steps = steps
        self.arm: Arm | None = None
        """The arm being probed; None: none is."""
        self._early = max(1, interval // EARLY)
        self._step = 0
        self._quiet_until = AT_ONCE
        self._budget: float | None = None
        self._plans: dict[Kind, _Plan] = {}
        self._kind: Kind = (OFF, 0)
        self._worth = 0.0
        self._left = self._extensions = 0
        self._hopeless = False
        self._surprises = 0
        """Number of consecutive surprises: positive for slow steps, negative for fast ones."""

    def passed(self, seconds: float) -> None:
        """Account for one completed step of any arm."""
        self._step += 1
        if self._budget is not None:
            self._budget += SHARE * seconds

    def seen(self, arm: Arm, batch: int, predicted: float, seconds: float) -> None:
        """Account for a measured step of the chosen arm: no probe of it is due for a while.

        Several surprises in a row to the same side mean that the machine has changed: all other arms become due.
        """
        plan = self._plans.get((arm, batch.bit_length()))
        if plan is None:
            self._plans[(arm, batch.bit_length())] = _Plan(self._step + self.interval, self.interval)
        else:
            plan.due, plan.wait = self._step + self.interval, self.interval
        if predicted / SURPRISE < seconds < predicted * SURPRISE:
            self._surprises = 0
            return
        sign = 1 if seconds > predicted else -1
        self._surprises = self._surprises + sign if self._surprises * sign > 0 else sign
        if abs(self._surprises) == LASTING and self._budget is not None:
            self._plans.clear()
            self._quiet_until = self._step
            self._budget = max(self._budget, FIRST_STEPS * seconds / (1 + arm.num_speculative_tokens))

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
        plan = self._plans.get(kind)
        if (seconds - worth) * self.steps > self._budget or (plan is not None and self._step < plan.due):
            return False
        self.arm, self._kind, self._worth = arm, kind, worth
        self._left, self._extensions, self._hopeless = self.steps, 0, seconds > HOPELESS * worth
        return True

    def measured(self, predicted: float, seconds: float) -> None:
        """Account for a step of the probed arm, with its predicted and measured seconds."""
        assert self._budget is not None
        self._budget -= max(0.0, min(seconds, SURPRISE * predicted) - self._worth)
        self._left -= 1
        if self._left > 0:
            return
        surprising = not predicted / SURPRISE < seconds < predicted * SURPRISE
        worse = self._hopeless and seconds > predicted
        if surprising and not worse and self._extensions < EXTENSIONS:
            self._extensions += 1
            self._left = self.steps
        else:
            self._finish(surprising and not worse)

    def spoilt(self, seconds: float) -> None:
        """Account for a probe's step that teaches nothing about its arm, because drafts were cut or prompts were prefilled."""
        assert self._budget is not None
        self._budget -= max(0.0, seconds - self._worth)
        self._left -= 1
        if self._left <= 0:
            self._finish(surprising=False)

    def cancel(self) -> None:
        """Stop probing without changing the plan."""
        self.arm = None

    def _finish(self, surprising: bool) -> None:
        plan = self._plans.setdefault(self._kind, _Plan(0, self.interval))
        if surprising:
            plan.wait = self._early
        elif self._hopeless:
            plan.wait = min(max(self.interval, 2 * plan.wait), RAREST * self.interval)
        else:
            plan.wait = self.interval
        plan.due = self._step + plan.wait
        self._quiet_until = self._step + self._early
        self.arm = None

    def state_dict(self) -> dict[str, object]:
        """The state, with steps counted from now."""
        plans = [
            [arm.format, arm.num_speculative_tokens, size, plan.due - self._step, plan.wait]
            for (arm, size), plan in self._plans.items()
        ]
        return {"budget": self._budget, "quiet": max(0, self._quiet_until - self._step), "plans": plans}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for an invalid state."""
        budget = None if state["budget"] is None else float(state["budget"])
        if budget is not None and not isfinite(budget):
            raise ValueError(f"a budget of {budget} s for probes")
        self._step, self._quiet_until, self._budget = 0, int(state["quiet"]), budget
        self._plans = {
            (Arm(str(format), int(n)), int(size)): _Plan(int(due), int(wait)) for format, n, size, due, wait in state["plans"]
        }
        self.arm = None
