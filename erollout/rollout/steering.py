"""How a replica's rollouts are steered: what steps cost here, its toggle over the whole run, its part in the coordination."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from erollout.calibration.file import Calibration, read_calibration
from erollout.calibration.resolve import GUESSED, named_calibration, present_calibration
from erollout.calibration.sweep import identify
from erollout.config import Config
from erollout.coordinator.exchange import Exchange
from erollout.coordinator.migration import Move
from erollout.coordinator.state_machine import StateMachine
from erollout.drafter.self_speculation import SelfSpeculation
from erollout.engine.engine import Engine
from erollout.engine.orders import Control
from erollout.errors import UserError
from erollout.parallel.collectives import all_sum, from_rank_zero
from erollout.parallel.groups import ParallelContext
from erollout.resilience.unattended import ignore, never
from erollout.rollout.control import AgreedControl, ReplicaControl
from erollout.speculation.cost.cost_model import CalibratedCost
from erollout.speculation.step import Load
from erollout.speculation.toggle import Toggle
from erollout.speculation.trace import Bin, DecisionTrace, forget_others
from erollout.types import RolloutRequest

logger = logging.getLogger(__name__)

BINS = 200
"""Spans of a rollout's time that replicas tell each other about."""


@dataclass(slots=True)
class Share:
    """Of a rollout, the steps at batches up to a power of two, and beyond the one before."""

    seconds: float = 0.0
    emitted: int = 0
    """Tokens."""
    speculating: float = 0.0
    """Of the seconds, in steps that speculate."""
    num_speculative_tokens: float = 0.0
    """Summed over those seconds."""

    def add(self, other: "Share") -> None:
        self.seconds += other.seconds
        self.emitted += other.emitted
        self.speculating += other.speculating
        self.num_speculative_tokens += other.num_speculative_tokens


@dataclass(frozen=True, slots=True)
class Course:
    """How one replica's rollout went."""

    seconds: float = 0.0
    """Until the rollout was over for this replica, waiting for the others included."""
    metrics: dict[str, float] = field(default_factory=dict)
    bins: list[Bin] = field(default_factory=list)
    """Equal spans of these seconds."""
    shares: dict[int, Share] = field(default_factory=dict)
    """By the largest batch of each: 1, 2, 4, 8, ...; passes with prompt tokens in them: 0."""
    moves: list[tuple[float, Move]] = field(default_factory=list)
    """Of sequences between replicas, of all of them, with the seconds at which this one learnt of them."""
    why: tuple[str, ...] = ()
    """In words, why it would speculate or not at the most and at the fewest sequences that it had at once."""


class Steering:
    """Of one rank. `begin` and `end` are collective over the world."""

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        engine: Engine,
        speculation: SelfSpeculation | None,
        asked: Callable[[], bool] = never,
        alive: Callable[[], None] = ignore,
    ) -> None:
        """As RolloutWorker. Raises UserError for a calibration that is not of this run."""
        self.config = config
        self.context = context
        self.engine = engine
        self.asked = asked
        self.alive = alive
        self.was_interrupted = False
        """The last rollout, on some replica, as all ranks know."""
        self.formats = speculation.formats if speculation is not None else ()
        self._drafters = speculation.drafters if speculation is not None else {}
        self._known_drafters = dict(self._drafters)
        self._calibration = named_calibration(config, engine, self.formats)
        self.lengths: tuple[int, ...] = ()
        """Of the last training rollout's responses, of all replicas."""
        self.toggle: Toggle | None = None
        """None until the first rollout."""
        self.last: Toggle | None = None
        """Of the last rollout, with its trace; None on ranks that decide nothing."""
        self._state: dict[str, Any] = {}
        self._control: ReplicaControl | None = None
        self._has_split = False
        """Replicas lost each other in the last rollout, as all ranks know."""

    def begin(self, requests: Sequence[RolloutRequest], learns: bool, speculates: bool = True) -> Control:
        """The control of the next rollout. The first one measures what steps cost, where that is to be measured.

        Args:
            requests: of the whole cluster, the same on every rank.
            learns: false: nothing of the rollout is kept for later ones.
            speculates: false: autoregressive, whatever the mode.

        Raises RuntimeError after a rollout in which replicas lost each other.
        """
        if self._has_split:
            raise RuntimeError("replicas lost each other in the last rollout and can't be coordinated again; resume the run")
        options, context = self.config.coordinator, self.context
        max_num_seqs = self.engine.rollout.max_num_seqs
        group_size, max_tokens = requests[0].group_size, requests[0].sampling.max_tokens
        if self.toggle is None:
            self.toggle = self._first_toggle(min(max_num_seqs, max(len(requests) * group_size, self.config.samples_per_step)))
        self._forget_replaced(self.toggle)
        toggle = self.toggle if speculates else self._without_speculation(self.toggle)
        toggle.begin_rollout(learns)
        if context.is_decode_leader:
            exchange = None
            if context.coordination_group is not None:
                counts = context.decode.replicas, len(requests), group_size, max_num_seqs
                done = sum(len(request.finished) for request in requests)
                machine = StateMachine(options, *counts, self.lengths, max_tokens, done)
                patience = self.config.parallel.timeout_seconds
                exchange = Exchange(context.coordination_group, machine, len(toggle.arms), max_tokens, options, patience)
            self._control = ReplicaControl(requests, max_num_seqs, toggle, exchange, options.lock_step, self.asked, self.alive)
        interval = self.config.speculation.decision_interval
        return AgreedControl(self._control, context.control_group, toggle.arms, requests, interval, self.alive)

    def end(self, decisions: Path | None) -> Course:
        """Close the rollout; collective over the world. `decisions`: file for what was decided; None: it is not kept."""
        control, self._control = self._control, None
        statistics = self.engine.stats.speculation
        counts = [0.0] * 4
        if control is not None:
            counts = [statistics.drafted, statistics.accepted, control.has_lost_others, control.interrupted]
        drafted, accepted, split, interrupted = all_sum(counts, self.context.device)
        self._has_split, self.was_interrupted = split > 0, interrupted > 0
        if control is None:
            return Course()
        self.last = toggle = control.toggle
        toggle.end_rollout(accepted / drafted if drafted else None)
        if decisions is not None and toggle.trace.write(decisions):
            forget_others(decisions)
        metrics = {f"toggle/{name}": value for name, value in toggle.metrics().items()}
        metrics |= {f"coordinator/{name}": value for name, value in control.report().items()}
        seconds = max(self.engine.stats.seconds, toggle.trace.seconds)
        return Course(
            seconds, metrics, toggle.trace.binned(BINS, seconds), shares(toggle.trace), control.moves, _reasons(toggle)
        )

    def state_dict(self) -> dict[str, Any]:
        """What later rollouts know, as JSON."""
        if self.toggle is None or self._calibration is None:
            return self._state | {"lengths": list(self.lengths)}
        calibration = self._calibration.to_dict()
        return {"toggle": self.toggle.state_dict(), "calibration": calibration, "lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a run with the same configuration or another; what does not fit this one is measured and learnt again."""
        self._state = state
        self.lengths = tuple(state["lengths"])
        self._known_drafters = dict(self._drafters)  # those that it was learnt of: formats that `auto` had chosen are there now

    def _first_toggle(self, num_sequences: int) -> Toggle:
        """With the costs and the acceptance of the run so far, where they are of this model, hardware and drafters."""
        saved = from_rank_zero(self._saved_calibration())
        found = self._calibration or saved or present_calibration(self.config, self.engine, self.formats, num_sequences)
        self._calibration = found
        toggle = Toggle(self.config.speculation, self.formats, found.cost_model())
        if saved is not None:
            state = dict(self._state["toggle"])
            if (saved.roofline, saved.tables) != (found.roofline, found.tables):  # corrections are relative to these
                logger.info("speculation.calibration is not that of the checkpoint: what live steps added to it is dropped")
                del state["cost"]
            try:
                toggle.load_state_dict(state)
            except ValueError as error:
                raise UserError(f"the checkpoint's rollout state is damaged: {error}; resume from an earlier one") from error
        return toggle

    def _forget_replaced(self, toggle: Toggle) -> None:
        """A drafter's name may stand for other formats since the last rollout: `auto` has chosen them."""
        for name, drafter in self._drafters.items():
            if drafter is not self._known_drafters[name]:
                logger.info(
                    "drafter %s is another one now: its acceptance and what live steps said of its costs start anew", name
                )
                toggle.forget(name)
        self._known_drafters = dict(self._drafters)

    def _saved_calibration(self) -> Calibration | None:
        if "calibration" not in self._state:
            return None
        try:
            saved = read_calibration(self._state["calibration"], "of the checkpoint")
            saved.require(identify(self.engine, self.formats))
            if saved.provenance.get("source") == GUESSED and self.config.speculation.mode != "always":
                raise UserError("they were guessed")
        except UserError as error:
            if self.config.speculation.mode != "off":  # where they are always guessed
                logger.info("costs and acceptance of the run so far are not used: %s", error)
            return None
        return saved

    def _without_speculation(self, toggle: Toggle) -> Toggle:
        """One that leaves no trace in the run's own, but knows its costs."""
        assert isinstance(toggle.cost, CalibratedCost)
        return Toggle(replace(self.config.speculation, mode="off"), (), toggle.cost)  # type: ignore[type-var]


def shares(trace: DecisionTrace) -> dict[int, Share]:
    """Where a rollout's seconds went, by batch size; passes with prompt tokens in them are batch 0."""
    found: dict[int, Share] = {}
    columns = trace.columns
    for step, (batch, prompts) in enumerate(zip(columns["decoding"], columns["prefill_tokens"], strict=True)):
        seconds, n = columns["seconds"][step], trace.arm(step).num_speculative_tokens
        share = Share(seconds, columns["emitted"][step], seconds * (n > 0), seconds * n)
        found.setdefault(0 if prompts else 1 << (batch - 1).bit_length(), Share()).add(share)
    return dict(sorted(found.items()))


def _reasons(toggle: Toggle) -> tuple[str, ...]:
    """At the largest and the smallest batch of the rollout."""
    decoding, contexts = (toggle.trace.columns[name] for name in ("decoding", "context"))
    loads = [Load(batch, context) for batch, context in zip(decoding, contexts, strict=True) if batch]
    ends = [end(loads, key=lambda load: load.decoding) for end in (max, min)] if loads else []
    return tuple(dict.fromkeys(toggle.explain(load) for load in ends))
