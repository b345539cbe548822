"""How a replica's rollouts are steered: what steps cost here, its toggle over the whole run, its part in the coordination."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from erollout.calibration.resolve import resolve_calibration
from erollout.config import Config
from erollout.coordinator.control import AgreedControl, ReplicaControl
from erollout.coordinator.exchange import Exchange
from erollout.coordinator.state_machine import StateMachine
from erollout.drafter.self_speculation import SelfSpeculation
from erollout.engine.control import Control
from erollout.engine.engine import Engine
from erollout.parallel.groups import ParallelContext
from erollout.speculation.cost_model import CalibratedCost
from erollout.speculation.toggle import Toggle
from erollout.speculation.trace import Bin
from erollout.types import RolloutRequest

logger = logging.getLogger(__name__)

BINS = 200
"""Spans of a rollout's time that replicas tell each other about."""


@dataclass(frozen=True, slots=True)
class Course:
    """How one replica's rollout went."""

    seconds: float = 0.0
    """Until the rollout was over for this replica, waiting for the others included."""
    metrics: dict[str, float] = field(default_factory=dict)
    bins: list[Bin] = field(default_factory=list)
    """Equal spans of these seconds."""
    why: str = ""
    """Its last decision, in words."""


class Steering:
    """Of one rank. `begin` is collective over the world: costs are measured in the first rollout that needs them."""

    def __init__(self, config: Config, context: ParallelContext, engine: Engine, speculation: SelfSpeculation | None) -> None:
        self.config = config
        self.context = context
        self.engine = engine
        self.formats = speculation.formats if speculation is not None else ()
        self.lengths: tuple[int, ...] = ()
        """Of the last training rollout's responses, of all replicas."""
        self.toggle: Toggle | None = None
        """None until the first rollout."""
        self._state: dict[str, Any] = {}
        self._control: ReplicaControl | None = None

    def begin(self, requests: Sequence[RolloutRequest], learns: bool, speculates: bool = True) -> Control:
        """The control of the next rollout.

        Args:
            requests: of the whole cluster, the same on every rank.
            learns: false: nothing of the rollout is kept for later ones.
            speculates: false: autoregressive, whatever the mode.
        """
        options, context = self.config.coordinator, self.context
        max_num_seqs = self.engine.rollout.max_num_seqs
        group_size, max_tokens = requests[0].group_size, requests[0].sampling.max_tokens
        if self.toggle is None:
            self.toggle = self._first_toggle(min(max_num_seqs, len(requests) * group_size))
        toggle = self.toggle if speculates else self._without_speculation(self.toggle)
        toggle.begin_rollout(learns)
        if context.is_decode_leader:
            exchange = None
            if context.coordination_group is not None:
                counts = context.decode.replicas, len(requests), group_size, max_num_seqs
                machine = StateMachine(options, *counts, self.lengths, max_tokens)
                patience = self.config.parallel.timeout_seconds
                exchange = Exchange(context.coordination_group, machine, len(toggle.arms), max_tokens, options, patience)
            self._control = ReplicaControl(requests, max_num_seqs, toggle, exchange, options.lock_step)
        interval = self.config.speculation.decision_interval
        return AgreedControl(self._control, context.control_group, toggle.arms, requests, interval)

    def end(self, decisions: Path | None) -> Course:
        """Close the rollout. `decisions`: file for what was decided; None: it is not kept."""
        control, self._control = self._control, None
        if control is None:
            return Course()
        toggle = control.toggle
        toggle.end_rollout()
        if decisions is not None:
            toggle.trace.write(decisions)
        metrics = {f"toggle/{name}": value for name, value in toggle.metrics().items()}
        metrics |= {f"coordinator/{name}": value for name, value in control.report().items()}
        seconds = max(self.engine.stats.seconds, toggle.trace.seconds)
        return Course(seconds, metrics, toggle.trace.binned(BINS, seconds), toggle.explain())

    def state_dict(self) -> dict[str, Any]:
        """What later rollouts know, as JSON."""
        toggle = self.toggle.state_dict() if self.toggle is not None else self._state.get("toggle")
        return {"toggle": toggle, "lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state
        self.lengths = tuple(state["lengths"])

    def _first_toggle(self, num_sequences: int) -> Toggle:
        calibration = resolve_calibration(self.config, self.engine, self.formats, num_sequences)
        toggle = Toggle(self.config.speculation, self.formats, calibration.cost_model())
        if saved := self._state.get("toggle"):
            toggle.load_state_dict(saved)
        return toggle

    def _without_speculation(self, toggle: Toggle) -> Toggle:
        """One that leaves no trace in the run's own, but knows its costs."""
        assert isinstance(toggle.cost, CalibratedCost)
        return Toggle(replace(self.config.speculation, mode="off"), (), toggle.cost)  # type: ignore[type-var]
