"""The toggle: chooses the arm of a replica's next step, and learns from the steps taken. Pure.

It chooses the arm with the least predicted seconds per token: the cost of its step at the present load over the tokens that it
yields. Both are estimated from the steps taken; other arms are probed now and then.
"""

import logging
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from math import inf, log2, nan
from typing import Any

from erollout.configuration.speculation import SpeculationConfig
from erollout.speculation.acceptance import AcceptanceByContext
from erollout.speculation.cost.cost_model import CostModel
from erollout.speculation.ladder import Ladder
from erollout.speculation.probes import Probes
from erollout.speculation.step import OFF, Arm, Load, StepOutcome
from erollout.speculation.trace import DecisionTrace, Reason, StepDecision

logger = logging.getLogger(__name__)

_LOSS_TO_LOG = 0.01
"""Least share of a rollout's seconds lost to speculation that is logged."""
_LOSS_TO_WARN_OF = 0.1
"""Seconds lost in a rollout from which on the log line is a warning."""

REFRESH = 8
"""Number of decisions for which predictions are cached while the load stays about the same."""
SAME_CONTEXT = 4
"""Number of parts of an octave of contexts: loads in one part share the predictions of a decision."""
WHOLE = 0.9
"""Least share of the arm's draft tokens that must have been requested in a step for its time to count as the arm's."""
ENDING_WINDOW = 2000.0
"""Number of tokens after which an old one weighs e times less in the rate of tokens that end their response."""
FIRST_TOKENS = 100.0
"""Initial count of tokens that did not end their response."""


class Toggle:
    """The toggle of one replica, over the whole run."""

    def __init__(
        self,
        options: SpeculationConfig,
        formats: Sequence[str],
        cost: CostModel,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            formats: available drafters, the default one first; empty with mode off.
            clock: returns seconds; only the trace depends on it.
        """
        assert formats or options.mode == "off"
        self.options = options
        self.cost = cost
        self.acceptance = {format: AcceptanceByContext(options.toggle.acceptance_window) for format in formats}
        self.ladder = Ladder(options.toggle.ladder) if options.mode == "ladder" else None
        self.probes = Probes(options.toggle.probe_interval, options.toggle.probe_steps)
        self.trace = DecisionTrace()
        """The decisions of the present rollout, or of the last one."""
        self._clock = clock
        self._arms = _arms(options, formats)
        self._index = {arm: index for index, arm in enumerate(self._arms)}
        self._chooses = options.mode not in ("off", "always")
        self._ended = self._emitted = 0.0
        self._began = 0.0
        self._learns = True
        self._metrics: dict[str, float] = {}
        self._current = 0
        self._values: tuple[float, ...] = ()
        self._best = self._second = 0
        self._key: tuple[int, int, int] | None = None
        self._age, self._fresh = 0, False
        self._load = Load(0, 0.0)
        self._decision = StepDecision(self._arms[0], Reason.FIXED)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Arms that may be chosen, OFF first if it is one of them; the same list on all replicas."""
        return self._arms

    def forget(self, format: str) -> None:
        """Drop what was learnt about one drafter, between rollouts, because it has been replaced."""
        self.acceptance[format] = AcceptanceByContext(self.options.toggle.acceptance_window)
        self.cost.forget(format)

    def begin_rollout(self, learns: bool) -> None:
        """`learns`: False for a validation rollout, which does not change acceptance, costs, ladder or probes."""
        self._learns = learns
        self.trace = DecisionTrace()
        self._began = self._clock()
        self._start_over()
        if learns:
            for acceptance in self.acceptance.values():
                acceptance.begin_rollout()

    def decide(self, load: Load, imposed: Arm | None = None) -> Arm:
        """Choose the arm of the next step. An imposed one (the cluster's) is taken as it is."""
        if imposed is not None:
            self.probes.cancel()
            self._current = self._index.get(imposed, self._current)
        if load.decoding:
            self._load = load
            self._evaluate(load)
            self._decision = self._decided(load) if imposed is None else self._taken(imposed, Reason.IMPOSED)
        elif imposed is None:
            self._decision = StepDecision(OFF, Reason.IDLE)
        else:
            self._decision = StepDecision(imposed, Reason.IMPOSED)
        return self._decision.arm

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from the outcome of the step after the last decision."""
        self.trace.append(self._clock() - self._began - outcome.seconds, self._carried_out(outcome), outcome)
        if not self._learns:
            return
        arm, load = outcome.arm, outcome.load
        self.probes.passed(outcome.seconds)
        requested = max(outcome.requested, outcome.drafted)
        whole = requested >= WHOLE * arm.num_speculative_tokens * load.decoding
        probed = self.probes.arm
        if probed is not None and (arm != probed or not whole or load.prefill_tokens or not load.decoding):
            self.probes.spoilt(outcome.seconds)
        if whole:
            self._observe_cost(outcome)
        if arm.speculates:
            known = self.acceptance[arm.format]
            known.observe(outcome.drafted_at, outcome.accepted_at, load.context)
            if whole:
                known.proposed.observe(load.decoding, outcome.proposed_share)
        keep = 1 - min(1.0, outcome.emitted / ENDING_WINDOW)
        self._emitted = self._emitted * keep + outcome.emitted
        self._ended = self._ended * keep + outcome.finished

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        """Predicted seconds per token of each decoding sequence, per arm; inf for an arm that the ladder excludes now.

        The cost of prompt tokens is left out: it is the same for all arms.
        """
        values = self._predictions(load)
        if self.ladder is None:
            return values
        open_lengths = (0, self.ladder.rung)
        return tuple(
            value if arm.num_speculative_tokens in open_lengths else inf for arm, value in zip(self._arms, values, strict=True)
        )

    def end_rollout(self, acceptance_rate: float | None = None) -> None:
        """Close the rollout's trace, and log it if speculation lost time. What was learnt from it decides the next one.

        Args:
            acceptance_rate: acceptance rate of the whole cluster, for the ladder; None: that of this replica.
        """
        trace = self.trace
        self._metrics = self._measured()
        if not self._learns or not self._chooses:
            return
        drafted, accepted = trace.total("drafted"), trace.total("accepted")
        if self.ladder is not None and drafted:
            self.ladder.end_rollout(accepted / drafted if acceptance_rate is None else acceptance_rate)
        saved = trace.saved(self.cost.step_seconds, probes=False)
        lost = -sum(saved.values())
        if lost > _LOSS_TO_LOG * trace.seconds:
            where = [f"{-gain:.3g} s at {2 ** (size - 1)}-{2**size - 1} sequences" for size, gain in saved.items() if gain < 0]
            level = logging.WARNING if lost >= _LOSS_TO_WARN_OF else logging.INFO
            logger.log(level, "speculation lost %.3g s of this rollout's %.3g s: %s", lost, trace.seconds, ", ".join(where))

    def metrics(self) -> dict[str, float]:
        """Metrics of the last complete rollout; empty before the first."""
        return dict(self._metrics)

    def explain(self, load: Load | None = None) -> str:
        """One line that says why speculation is on or off: in the last decision, or in the best one at a given load."""
        if not self.acceptance:
            return "off: speculation.mode is off"
        now = load is None and self._decision.reason is not Reason.IDLE
        load = self._load if load is None else load
        if not load.decoding:
            return "off: no sequence decodes"
        values = self.seconds_per_token(load)
        chosen = self._decision.arm if now else self._arms[min(range(len(values)), key=values.__getitem__)]
        drafting = [index for index, arm in enumerate(self._arms) if arm.speculates]
        arm = chosen if chosen.speculates else self._arms[min(drafting, key=values.__getitem__)]
        bare = Load(load.decoding, load.context)
        cost = self._step_seconds(arm, bare) / self.cost.step_seconds(OFF, bare)
        length = self._lengths(load.context)[arm.format][arm.num_speculative_tokens]
        state, sequences = "on" if chosen.speculates else "off", f"{load.decoding} sequence{'s' * (load.decoding > 1)}"
        return (
            f"{state}{_BECAUSE.get(self._decision.reason, '') if now else ''}: at {sequences} {arm} costs {cost:.2f}x a step "
            f"and yields {length:.2f} tokens, {length / cost:.2f}x the speed"
        )

    def state_dict(self) -> dict[str, object]:
        """State for the checkpoint, as JSON: acceptance, online costs, ladder and probes."""
        return {
            "acceptance": {format: known.state_dict() for format, known in self.acceptance.items()},
            "cost": self.cost.state_dict(),
            "ladder": None if self.ladder is None else self.ladder.state_dict(),
            "probes": self.probes.state_dict(),
            "endings": [self._ended, self._emitted],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what fits the present drafters; costs may be missing.

        Raises ValueError for an invalid state, and leaves all as it was.
        """
        acceptance, ladder, probes = deepcopy((self.acceptance, self.ladder, self.probes))
        try:
            for format, known in state["acceptance"].items():
                if format in acceptance:
                    acceptance[format].load_state_dict(known)
                else:
                    logger.info(
                        "the checkpoint has an acceptance of drafter %s, which is not configured now; it is dropped", format
                    )
            if ladder is not None and state["ladder"] is not None:
                ladder.load_state_dict(state["ladder"])
            probes.load_state_dict(state["probes"])
            ended, emitted = map(float, state["endings"])
            if not 0 <= ended <= emitted < inf:
                raise ValueError(f"{ended} endings in {emitted} tokens")
            if "cost" in state:  # last, because it loads all or nothing
                self.cost.load_state_dict(state["cost"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"no state of a toggle: {error!r}") from error
        self.acceptance, self.ladder, self.probes = acceptance, ladder, probes
        self._ended, self._emitted = ended, emitted
        self._start_over()

    def _decided(self, load: Load) -> StepDecision:
        """The decision from predictions, at a load with decoding sequences."""
        if not self._chooses:
            return self._taken(self._arms[0], Reason.FIXED)
        if self.probes.arm is not None:
            if not load.prefill_tokens:
                return self._taken(self.probes.arm, Reason.PROBE)
            self.probes.cancel()
        reason = self._choose()
        if self._fresh and self._learns and not load.prefill_tokens and self.probes.may_start():
            self._start_probe(load)
            if self.probes.arm is not None:
                return self._taken(self.probes.arm, Reason.PROBE)
        return self._taken(self._arms[self._current], reason)

    def _carried_out(self, outcome: StepOutcome) -> StepDecision:
        """The last decision as the trace shows it."""
        if outcome.drafted_at or not outcome.requested or self._decision.reason is Reason.PROBE:
            return self._decision
        return replace(self._decision, reason=Reason.EMPTY)

    def _choose(self) -> Reason:
        """Take the best arm. Neither a margin nor a backoff gains in simulated rollouts (docs/benchmarks/ablation.md)."""
        reason = Reason.KEPT if self._best == self._current else Reason.BETTER
        self._current = self._best
        return reason

    def _start_probe(self, load: Load) -> None:
        """Start a probe of an arm other than the present one, if one is due."""
        values, chosen = self._values, self._values[self._current]
        for target in self._alternatives():
            seconds = self._step_seconds(self._arms[target], load)
            if self.probes.start(self._arms[target], load.decoding, seconds, seconds * chosen / values[target], chosen):
                return

    def _alternatives(self) -> list[int]:
        """Arms worth a probe: the best of each other drafter, OFF, the next longer and shorter draft, and the best other one.

        Other drafters come first: one probe corrects all their arms, while the first ones chosen may never change.
        """
        values, current = self._values, self._current
        others = [index for index in range(1, len(values)) if index != current and values[index] < inf]
        best: dict[str, int] = {}
        for index in sorted(others, key=values.__getitem__):
            best.setdefault(self._arms[index].format, index)
        if not current:
            return list(best.values())
        arm = self._arms[current]
        mine = best.pop(arm.format, 0)
        near = (self._index.get(Arm(arm.format, arm.num_speculative_tokens + step), 0) for step in (1, -1))
        return list(dict.fromkeys([*best.values(), 0, *(index for index in near if index in others), mine]))

    def _observe_cost(self, outcome: StepOutcome) -> None:
        """Learn the cost of a step for which all of its arm's drafts were requested."""
        arm, load, seconds = outcome.arm, outcome.load, outcome.seconds
        if load.decoding and not load.prefill_tokens:
            predicted = self._step_seconds(arm, load)
            if arm == self.probes.arm:
                self.probes.measured(predicted, seconds)
                self._age = REFRESH  # so that the measurement counts at once
            else:
                self.probes.seen(arm, load.decoding)
        self.cost.observe(arm, load, seconds, outcome.seconds_drafting, outcome.proposed_share)

    def _evaluate(self, load: Load) -> None:
        """Predict for a load, or reuse the predictions of one that was about the same."""
        key = _about(load)
        self._fresh = key != self._key or self._age >= REFRESH
        self._age += 1
        if self._fresh:
            values = self._values = self.seconds_per_token(load)
            ranked = sorted(range(len(values)), key=values.__getitem__)
            self._best, self._second = ranked[0], ranked[1 % len(ranked)]
            self._key, self._age = key, 1

    def _taken(self, arm: Arm, reason: Reason) -> StepDecision:
        """A decision with its prediction and that of the best other arm."""
        index, values = self._index.get(arm), self._values
        other = self._second if index == self._best else self._best
        predicted = values[index] if index is not None and values[index] < inf else nan
        return StepDecision(arm, reason, predicted, self._arms[other], values[other])

    def _predictions(self, load: Load) -> tuple[float, ...]:
        """Predictions as in `seconds_per_token`, for all arms."""
        step_seconds, lengths = self._step_seconds, self._lengths(load.context)
        common = self._prefill_seconds(load)
        return tuple((step_seconds(arm, load) - common) / lengths[arm.format][arm.num_speculative_tokens] for arm in self._arms)

    def _lengths(self, context: float) -> dict[str, list[float]]:
        """Expected tokens per step and sequence, by format and num_speculative_tokens."""
        survival = 1 - self._ended / (self._emitted + FIRST_TOKENS)
        longest = max(arm.num_speculative_tokens for arm in self._arms)
        return {"": [1.0]} | {format: known.lengths(context, longest, survival) for format, known in self.acceptance.items()}

    def _step_seconds(self, arm: Arm, load: Load) -> float:
        """Predicted seconds of a step for which the arm's proposer has drafts as often as it had lately."""
        return self.cost.step_seconds(arm, load, self.acceptance[arm.format].proposed.value if arm.speculates else 1.0)

    def _prefill_seconds(self, load: Load) -> float:
        """Seconds that prompt tokens add to an autoregressive pass."""
        if not load.prefill_tokens:
            return 0.0
        whole = self.cost.step_seconds(OFF, load)
        return whole - self.cost.step_seconds(OFF, Load(load.decoding, load.context)) if load.decoding else whole

    def _measured(self) -> dict[str, float]:
        """The rollout's metrics."""
        trace, options = self.trace, self.options
        steps, lengths = max(1, len(trace)), [n for n in trace.num_speculative_tokens if n]
        known: dict[tuple[int, int, int], tuple[float, ...]] = {}

        def in_hindsight(load: Load) -> tuple[float, ...]:
            key = _about(load)
            if key not in known:
                known[key] = self._predictions(load)
            return known[key]

        metrics = {
            "share_speculating": len(lengths) / steps,
            "mean_num_speculative_tokens": sum(lengths) / max(1, len(lengths)),
            "switches": float(trace.count(Reason.BETTER)),
            "share_probing": trace.count(Reason.PROBE) / steps,
            "share_without_drafts": trace.count(Reason.EMPTY) / steps,
            "saved_seconds": sum(trace.saved(self.cost.step_seconds).values()),
            "regret_seconds": trace.regret(in_hindsight, self._arms),
            "predicted_over_measured": trace.predicted_over_measured,
        }
        for format, known_acceptance in self.acceptance.items():
            known_lengths = known_acceptance.whole.lengths(options.num_speculative_tokens, 1.0, known_acceptance.proposed.value)
            metrics[f"expected_length/{format}"] = known_lengths[-1]
        return metrics

    def _start_over(self) -> None:
        """Reset the state that belongs to one rollout."""
        self.probes.cancel()
        self._current = 0
        self._key, self._age = None, 0
        self._load = Load(0, 0.0)
        self._decision = StepDecision(self._arms[0], Reason.FIXED)


_BECAUSE = {
    Reason.PROBE: " (a probe)",
    Reason.IMPOSED: " (the cluster's choice)",
}


def _about(load: Load) -> tuple[int, int, int]:
    """Key of a load: loads with equal keys share their predictions."""
    return load.decoding, int(SAME_CONTEXT * log2(load.context)) if load.context > 1 else 0, load.prefill_tokens


def _arms(options: SpeculationConfig, formats: Sequence[str]) -> tuple[Arm, ...]:
    """The arms that a mode may choose from."""
    if options.mode == "off":
        return (OFF,)
    fixed = Arm(formats[0], options.num_speculative_tokens)
    if options.mode == "always":
        return (fixed,)
    if options.mode == "toggle":
        return (OFF, fixed)
    if options.mode == "ladder":
        return (OFF, *(Arm(formats[0], rung) for rung in sorted(set(options.toggle.ladder.rungs))))
    lengths = range(1, options.toggle.max_speculative_tokens + 1)
    return (OFF, *(Arm(format, n) for format in formats for n in lengths))
