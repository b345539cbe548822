"""When an arm that is not chosen is run for a few steps, so that what is known of it stays true. Pure.

Probes are paid from a budget, SHARE of the seconds that pass. Within it, what was never measured at about the present batch
size comes soon, what agreed with its prediction after `interval` steps, and what was found hopeless ever more rarely.
"""

from dataclasses import dataclass
from math import log
from typing import Any

from erollout.speculation.step import Arm

SHARE = 0.004
"""Of all seconds, what probes may lose by prediction."""
FIRST_STEPS = 6.0
"""Steps whose time stands in the budget at first."""
EARLY = 8
"""Parts of the interval after which something unknown is due."""
HOPELESS = 1.5
"""Times the seconds per token of the chosen arm."""
RAREST = 16
"""Intervals between probes of what stays hopeless."""
SURPRISE = log(1.25)
"""Measured over predicted seconds that call for another probe soon."""
EXTENSIONS = 2
"""Of a probe that ends in a surprise."""

Kind = tuple[bool, bool, int]
"""What a probe measures: speculation or none, an alternative to the speculation that is chosen, about which batch size."""


@dataclass(slots=True)
class _Plan:
    due: int
    """Step from which on a probe is welcome."""
    wait: int
    """Steps between two."""


class Probes:
    """Of one replica, over the whole run."""

    def __init__(self, interval: int, steps: int) -> None:
        """See ToggleConfig.probe_interval and probe_steps."""
        self.interval = interval
        self.steps = steps
        self.arm: Arm | None = None
        """What is being probed."""
        self._kind: Kind = (False, False, 0)
        self._left = 0
        self._extensions = 0
        self._hopeless = False
        self._step = 0
        self._quiet_until = 0
        self._budget = 0.0
        self._is_new = True
        self._plans: dict[Kind, _Plan] = {}

    def passed(self, seconds: float) -> None:
        """A step is over."""
        self._step += 1
        self._budget += SHARE * seconds

    def seen(self, kind: Kind) -> None:
        """A chosen arm was measured: no probe of it is due for a while."""
        plan = self._plans.get(kind)
        if plan is None:
            self._plans[kind] = _Plan(self._step + self.interval, self.interval)
        else:
            plan.due, plan.wait = self._step + self.interval, self.interval

    def start(self, arm: Arm, kind: Kind, ratio: float, loss: float, chosen: float) -> bool:
        """Whether to probe an arm now. It then is `arm` until enough steps have been measured.

        Args:
            ratio: its predicted seconds per token over those of the chosen arm.
            loss: predicted seconds that each step of it loses.
            chosen: predicted seconds of a step of the chosen arm.
        """
        if self._is_new:
            self._is_new = False
            self._budget += FIRST_STEPS * chosen
        cost = max(0.0, loss) * self.steps
        if not self.interval or self._step < self._quiet_until or cost > self._budget:
            return False
        plan = self._plans.get(kind)
        if plan is None:
            early = max(1, self.interval // EARLY)
            plan = self._plans[kind] = _Plan(self._step if self._step >= early else early, early)
        if self._step < plan.due:
            return False
        self._budget -= cost
        self.arm, self._kind, self._left, self._extensions, self._hopeless = arm, kind, self.steps, 0, ratio > HOPELESS
        return True

    def measured(self, predicted: float, seconds: float) -> None:
        """A step of the probed arm was taken: predicted and measured seconds of it."""
        self._left -= 1
        if self._left > 0:
            return
        surprising = abs(log(max(seconds, 1e-9) / predicted)) > SURPRISE
        if surprising and self._extensions < EXTENSIONS:
            self._extensions += 1
            self._left = self.steps
        else:
            self._finish(surprising)

    def cancel(self) -> None:
        """Stop probing; the plan stays as it was."""
        self.arm = None

    def _finish(self, surprising: bool) -> None:
        plan = self._plans[self._kind]
        early = max(1, self.interval // EARLY)
        if surprising:
            plan.wait = early
        elif self._hopeless:
            plan.wait = min(max(self.interval, 2 * plan.wait), RAREST * self.interval)
        else:
            plan.wait = self.interval
        plan.due = self._step + plan.wait
        self._quiet_until = self._step + early
        self.arm = None

    def state_dict(self) -> dict[str, object]:
        """Steps are counted from now."""
        plans = [[*kind, plan.due - self._step, plan.wait] for kind, plan in self._plans.items()]
        return {"new": self._is_new, "budget": self._budget, "plans": plans}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = self._quiet_until = 0
        self._is_new, self._budget = bool(state["new"]), float(state["budget"])
        self._plans = {
            (bool(on), bool(other), int(size)): _Plan(int(due), int(wait)) for on, other, size, due, wait in state["plans"]
        }
        self.arm = None
