"""One rank's part in coordinated rollouts: its toggle over the run, and a control for each rollout."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erollout.config import Config
from erollout.coordinator.exchange import Exchange
from erollout.coordinator.state_machine import StateMachine
from erollout.engine.engine import Engine
from erollout.engine.orders import Control
from erollout.engine.proposers.proposer_set import ProposerSet
from erollout.parallel.collectives import all_sum
from erollout.parallel.groups import ParallelContext
from erollout.resilience.unattended import ignore, never
from erollout.rollout.control import AgreedControl, ReplicaControl
from erollout.rollout.costs import RunCosts
from erollout.rollout.summary import RolloutSummary, summarize
from erollout.speculation.cost.cost_model import CalibratedCost
from erollout.speculation.toggle import Toggle
from erollout.speculation.trace import forget_others
from erollout.types import RolloutRequest

logger = logging.getLogger(__name__)


class Coordination:
    """Coordination of rollouts on one rank. `begin` and `end` are collective over the world."""

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        engine: Engine,
        speculation: ProposerSet | None,
        stop_requested: Callable[[], bool] = never,
        alive: Callable[[], None] = ignore,
    ) -> None:
        """Arguments as for RolloutWorker. Raises UserError for a calibration that is not for this run."""
        self.config = config
        self.context = context
        self.engine = engine
        self.stop_requested = stop_requested
        self.alive = alive
        self.was_interrupted = False
        """Whether the last rollout was interrupted on any replica, as agreed by all ranks."""
        self.formats = speculation.formats if speculation is not None else ()
        self._drafters = speculation.proposers if speculation is not None else {}
        self._known_drafters = dict(self._drafters)
        self.costs = RunCosts(config.speculation, engine, self.formats)
        self.lengths: tuple[int, ...] = ()
        """Response lengths of the last training rollout on all replicas."""
        self.toggle: Toggle | None = None
        """The run's toggle; None before the first rollout."""
        self.last: Toggle | None = None
        """Toggle of the last rollout, with its trace; None on ranks that take no decisions."""
        self._state: dict[str, Any] = {}
        self._control: ReplicaControl | None = None
        self._has_split = False
        """Whether replicas lost each other in the last rollout, as agreed by all ranks."""

    def begin(self, requests: Sequence[RolloutRequest], learns: bool, speculates: bool = True) -> Control:
        """The control of the next rollout. The first call measures step costs if there is no calibration.

        Args:
            requests: requests of the whole cluster, the same on every rank.
            learns: False: later rollouts do not learn from this one.
            speculates: False: autoregressive, whatever the mode.

        Raises RuntimeError after a rollout in which replicas lost each other.
        """
        if self._has_split:
            raise RuntimeError("replicas lost each other in the last rollout and can't be coordinated again; resume the run")
        max_num_seqs, group_size = self.engine.rollout.max_num_seqs, requests[0].group_size
        if self.toggle is None:
            most = min(max_num_seqs, max(len(requests) * group_size, self.config.samples_per_step))
            self.toggle = self.costs.first_toggle(most, self._state)
        self._forget_replaced(self.toggle)
        toggle = self.toggle if speculates else self._without_speculation(self.toggle)
        toggle.begin_rollout(learns)
        if self.context.is_decode_leader:
            exchange, lock_step = self._exchange(requests, toggle), self.config.coordinator.lock_step
            self._control = ReplicaControl(requests, max_num_seqs, toggle, exchange, lock_step, self.stop_requested, self.alive)
        interval = self.config.speculation.decision_interval
        return AgreedControl(self._control, self.context.control_group, toggle.arms, requests, interval, self.alive)

    def end(self, decisions: Path | None) -> RolloutSummary:
        """Close the rollout. Collective over the world. `decisions`: file for the decision trace; None: not written."""
        control, self._control = self._control, None
        statistics = self.engine.stats.speculation
        counts = [0.0] * 4
        if control is not None:
            counts = [statistics.drafted, statistics.accepted, control.has_lost_others, control.interrupted]
        drafted, accepted, split, interrupted = all_sum(counts, self.context.device)
        self._has_split, self.was_interrupted = split > 0, interrupted > 0
        if control is None:
            return RolloutSummary()
        self.last = toggle = control.toggle
        toggle.end_rollout(accepted / drafted if drafted else None)
        if decisions is not None and toggle.trace.write(decisions):
            forget_others(decisions)
        return summarize(toggle, self.engine.stats.seconds, control.report(), control.moves)

    def state_dict(self) -> dict[str, Any]:
        """State for later rollouts, as JSON."""
        calibration = self.costs.calibration
        if self.toggle is None or calibration is None:
            return self._state | {"lengths": list(self.lengths)}
        return {"toggle": self.toggle.state_dict(), "calibration": calibration.to_dict(), "lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a run with this or another configuration; what does not fit is measured and learnt again."""
        self._state = state
        self.lengths = tuple(state["lengths"])
        self._known_drafters = dict(self._drafters)  # the formats chosen by `auto` have been restored before

    def _exchange(self, requests: Sequence[RolloutRequest], toggle: Toggle) -> Exchange | None:
        """The replicas' exchange of one rollout; None for the only replica."""
        options, context, first = self.config.coordinator, self.context, requests[0]
        if context.coordination_group is None:
            return None
        counts = context.decode.replicas, len(requests), first.group_size, self.engine.rollout.max_num_seqs
        done = sum(len(request.finished) for request in requests)
        max_tokens, patience = first.sampling.max_tokens, self.config.parallel.timeout_seconds
        machine = StateMachine(options, *counts, self.lengths, max_tokens, done)
        return Exchange(context.coordination_group, machine, len(toggle.arms), max_tokens, options, patience)

    def _forget_replaced(self, toggle: Toggle) -> None:
        """Forget what was learnt about drafters whose formats `auto` has changed since the last rollout."""
        for name, drafter in self._drafters.items():
            if drafter is not self._known_drafters[name]:
                logger.info("drafter %s has changed: its acceptance and its cost corrections are reset", name)
                toggle.forget(name)
        self._known_drafters = dict(self._drafters)

    def _without_speculation(self, toggle: Toggle) -> Toggle:
        """A toggle without speculation that shares the run's costs but does not change its state."""
        assert isinstance(toggle.cost, CalibratedCost)
        return Toggle(replace(self.config.speculation, mode="off"), (), toggle.cost)  # type: ignore[type-var]
