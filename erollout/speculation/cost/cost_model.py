"""What a step costs: predicted seconds of every arm at a load. Pure.

Three layers: a roofline, for what nothing is known of; over it the ratios that a sweep measured, which win where there are any;
over both what the run's own steps teach.
"""

from collections.abc import Mapping
from math import exp, log2
from typing import Protocol

from erollout.speculation.cost.corrections import Corrections
from erollout.speculation.cost.measured_table import MeasuredTable
from erollout.speculation.cost.roofline import Parts, Pass, Roofline
from erollout.speculation.step import OFF, Arm, Load

CONTEXT_STEPS = 8
"""Contexts per octave that predictions are made for, and kept."""


class CostModel(Protocol):
    """Seconds of one step on this hardware, for this model, and what they are known from."""

    def step_seconds(self, arm: Arm, load: Load) -> float:
        """One pass of the target for OFF; otherwise n drafter steps and the verify pass of n + 1, the host's work included."""
        ...

    def observe(self, arm: Arm, load: Load, seconds: float) -> None:
        """Learn from a step that was taken. Robust to outliers: one slow step changes little."""
        ...

    def forget(self, format: str) -> None:
        """Drop what was learnt of one drafter: it is another one now."""
        ...

    def state_dict(self) -> dict[str, object]:
        """What was learnt online, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> None: ...


class PassTimes:
    """Seconds of single passes: a roofline, corrected where there are measurements. Nothing is learnt here."""

    def __init__(self, roofline: Roofline, tables: Mapping[tuple[Pass, str], MeasuredTable] | None = None) -> None:
        """`tables`: by pass and the drafter's format, which is "" for target and verify."""
        self.roofline = roofline
        self.tables = dict(tables or {})

    @property
    def formats(self) -> tuple[str, ...]:
        """Drafters that there are times of."""
        return tuple(self.roofline.draft)

    def target_seconds(self, batch: int, context: float) -> float:
        """An autoregressive step."""
        return self.seconds("target", "", batch, context, 0)

    def draft_seconds(self, format: str, batch: int, context: float, num_speculative_tokens: int) -> float:
        """One step of the drafter, in a cycle of so many."""
        return self.seconds("draft", format, batch, context, num_speculative_tokens)

    def verify_seconds(self, batch: int, context: float, num_speculative_tokens: int) -> float:
        """The target's pass over num_speculative_tokens + 1 tokens of each sequence, and the decision."""
        return self.seconds("verify", "", batch, context, num_speculative_tokens)

    def seconds(self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: int) -> float:
        seconds = self.roofline.seconds(kind, format, batch, context, num_speculative_tokens)
        table = self.tables.get((kind, format))
        return seconds if table is None else seconds * exp(table.log_ratio(batch, context, num_speculative_tokens))

    def parts(self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: int) -> Parts:
        """By cause, as the roofline has it, scaled to the measured total."""
        parts = self.roofline.parts(kind, format, batch, context, num_speculative_tokens)
        scale = self.seconds(kind, format, batch, context, num_speculative_tokens) / parts.seconds
        return Parts(*(scale * part for part in (parts.memory, parts.compute, parts.overhead, parts.communication)))

    def step_seconds(self, arm: Arm, batch: int, context: float) -> float:
        """A whole step over `batch` decoding sequences."""
        if not arm.speculates:
            return self.target_seconds(batch, context)
        n = arm.num_speculative_tokens
        return n * self.draft_seconds(arm.format, batch, context, n) + self.verify_seconds(batch, context, n)

    def speed_up(self, arm: Arm, batch: int, context: float, acceptance_length: float) -> float:
        """Of an arm over none: L / (n r + v), with acceptance_length L."""
        return acceptance_length * self.target_seconds(batch, context) / self.step_seconds(arm, batch, context)

    def prefill_seconds(self, tokens: int) -> float:
        """A pass over prompt tokens alone."""
        return self.roofline.prefill_seconds(tokens)


class CalibratedCost:
    """The CostModel over PassTimes, with live corrections. A prediction takes a few microseconds once its load was seen."""

    def __init__(self, passes: PassTimes) -> None:
        self.passes = passes
        self.corrections = Corrections()
        self._seconds: dict[tuple[Arm, int, int], float] = {}

    def step_seconds(self, arm: Arm, load: Load) -> float:
        """See CostModel. `arm.format` is one of `passes.formats`."""
        prefill = self._prefill_seconds(arm, load) if load.prefill_tokens else 0.0
        if not load.decoding:
            return prefill
        return self._decode_seconds(arm, load) * self.corrections.factor(arm, load.decoding) + prefill

    def prefill_seconds(self, tokens: int) -> float:
        """A pass over prompt tokens alone."""
        return self.step_seconds(OFF, Load(0, 0.0, tokens))

    def observe(self, arm: Arm, load: Load, seconds: float) -> None:
        """See CostModel. A pass with prompt tokens in it teaches what those cost, not what decoding does."""
        if not load.prefill_tokens:
            if load.decoding:
                self.corrections.observe(arm, load.decoding, seconds / self._decode_seconds(arm, load))
            return
        whole = self.step_seconds(arm, load)
        prefill = self._prefill_seconds(arm, load)
        if prefill > 0.5 * whole:
            ratio = max(seconds - (whole - prefill), 0.0) / prefill
            self.corrections.observe_prefill(ratio * self.corrections.prefill_factor())

    def forget(self, format: str) -> None:
        self.corrections.forget(format)

    def state_dict(self) -> dict[str, object]:
        return self.corrections.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.corrections.load_state_dict(state)

    def _decode_seconds(self, arm: Arm, load: Load) -> float:
        """Without corrections, at the middle of the context's step."""
        bucket = int(CONTEXT_STEPS * log2(load.context)) if load.context > 1 else 0
        key = (arm, load.decoding, bucket)
        seconds = self._seconds.get(key)
        if seconds is None:
            seconds = self.passes.step_seconds(arm, load.decoding, 2 ** ((bucket + 0.5) / CONTEXT_STEPS))
            self._seconds[key] = seconds
        return seconds

    def _prefill_seconds(self, arm: Arm, load: Load) -> float:
        """What prompt tokens add to a pass, with their correction: the same whatever the arm, since they are paid once."""
        tokens = load.prefill_tokens
        factor = self.corrections.prefill_factor()
        if not load.decoding:
            return self.passes.prefill_seconds(tokens) * factor
        roofline = self.passes.roofline
        together = roofline.seconds("verify", "", load.decoding, load.context, 0, tokens)
        return (together - roofline.seconds("verify", "", load.decoding, load.context)) * factor
