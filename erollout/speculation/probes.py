"""When an arm that is not chosen is run for a few steps, so that what is known of it stays true. Pure.

Probes are paid from a budget, SHARE of the seconds that pass. Within it, what was never measured at about the present batch
size comes first, what agreed with its prediction after `interval` steps, and what was found hopeless ever more rarely.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any

from erollout.speculation.step import OFF, Arm

SHARE = 0.003
"""Of all seconds, what probes may lose by prediction."""
FIRST_STEPS = 6.0
"""Autoregressive steps whose time stands in the budget at first, and after a change of the machine."""
EARLY = 8
"""Parts of the interval between two probes, and after which one that ended in a surprise is repeated."""
AT_ONCE = 4
"""Steps after which the first probe ever may come: until then the cost model is not checked against the machine."""
HOPELESS = 1.5
"""Times the seconds per token of the chosen arm."""
RAREST = 16
"""Intervals between probes of what stays hopeless."""
SURPRISE = 1.25
"""Measured over predicted seconds, or the inverse, that call for another probe soon."""
LASTING = 4
"""Surprises in a row, to the same side, that are no outliers."""
EXTENSIONS = 2
"""Of a probe that ends in a surprise."""

Kind = tuple[Arm, int]
"""An arm, and about which batch size: its number of binary digits."""


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
        """In a row: positive for slow steps, negative for quick ones."""

    def passed(self, seconds: float) -> None:
        """A step is over."""
        self._step += 1
        if self._budget is not None:
            self._budget += SHARE * seconds

    def seen(self, arm: Arm, batch: int, predicted: float, seconds: float) -> None:
        """A step of a chosen arm was measured: no probe of it is due for a while.

        Several surprises in a row, to the same side: the machine has changed, and nothing that is known of the others counts.
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
        """Whether to probe an arm now. It then is `arm` until enough steps have been measured.

        Args:
            seconds: predicted, of a step of it.
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
        """A step of the probed arm was taken: predicted and measured seconds of it."""
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
        """A step of the probe was not its arm's (its drafts were cut, or prompts came in): paid for, but nothing is learnt."""
        assert self._budget is not None
        self._budget -= max(0.0, seconds - self._worth)
        self._left -= 1
        if self._left <= 0:
            self._finish(surprising=False)

    def cancel(self) -> None:
        """Stop probing; the plan stays as it was."""
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
        """Steps are counted from now."""
        plans = [
            [arm.format, arm.num_speculative_tokens, size, plan.due - self._step, plan.wait]
            for (arm, size), plan in self._plans.items()
        ]
        return {"budget": self._budget, "quiet": max(0, self._quiet_until - self._step), "plans": plans}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what is no state."""
        budget = None if state["budget"] is None else float(state["budget"])
        if budget is not None and not isfinite(budget):
            raise ValueError(f"a budget of {budget} s for probes")
        self._step, self._quiet_until, self._budget = 0, int(state["quiet"]), budget
        self._plans = {
            (Arm(str(format), int(n)), int(size)): _Plan(int(due), int(wait)) for format, n, size, due, wait in state["plans"]
        }
        self.arm = None
