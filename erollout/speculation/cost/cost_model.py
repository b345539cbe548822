"""Predicted seconds of every arm at a load. Pure.

Three layers: a roofline where nothing was measured; the ratios to it from a sweep, which prevail where there are any; and
corrections from the run's own steps.
"""

from collections.abc import Mapping
from math import exp, log2
from typing import Protocol

from erollout.speculation.cost.corrections import Corrections
from erollout.speculation.cost.measured_table import MeasuredTable
from erollout.speculation.cost.roofline import Parts, Pass, Roofline
from erollout.speculation.step import OFF, Arm, Load

CONTEXT_STEPS = 8
"""Number of contexts per octave for which predictions are made and cached."""


class CostModel(Protocol):
    """Predicted seconds of one step of this model on this hardware, learnt from the steps taken."""

    def step_seconds(self, arm: Arm, load: Load, proposed: float = 1.0) -> float:
        """Seconds of one target pass for OFF, else of n drafter steps and a verify pass over n + 1 tokens, with host work.

        `proposed`: probability that a sequence has a draft; where none has one, the pass is that of OFF.
        """
        ...

    def observe(self, arm: Arm, load: Load, seconds: float, drafting: float = 0.0, proposed: float = 1.0) -> None:
        """Learn from a step. Robust to outliers: one slow step changes little.

        Args:
            drafting: seconds of drafts; 0: not timed.
            proposed: share of the arm's draft tokens that the step had.
        """
        ...

    def forget(self, format: str) -> None:
        """Drop what was learnt about one drafter, because it has been replaced."""
        ...

    def state_dict(self) -> dict[str, object]:
        """The state learnt online, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> None: ...


class PassTimes:
    """Seconds of single passes from a roofline and, where available, measurements. Nothing is learnt online."""

    def __init__(self, roofline: Roofline, tables: Mapping[tuple[Pass, str], MeasuredTable] | None = None) -> None:
        """`tables`: measured ratios by pass and drafter format, which is "" for target and verify."""
        self.roofline = roofline
        self.tables = dict(tables or {})

    @property
    def formats(self) -> tuple[str, ...]:
        """Drafter formats with known times."""
        return tuple(self.roofline.draft)

    def target_seconds(self, batch: int, context: float) -> float:
        """Seconds of an autoregressive step."""
        return self.seconds("target", "", batch, context, 0)

    def draft_seconds(self, format: str, batch: int, context: float, num_speculative_tokens: int) -> float:
        """Seconds of one drafter step, in a cycle of num_speculative_tokens."""
        return self.seconds("draft", format, batch, context, num_speculative_tokens)

    def verify_seconds(self, batch: int, context: float, num_speculative_tokens: float) -> float:
        """Seconds of the target's pass over num_speculative_tokens + 1 tokens per sequence (a mean), including acceptance."""
        return self.seconds("verify", "", batch, context, num_speculative_tokens)

    def seconds(self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: float) -> float:
        seconds = self.roofline.seconds(kind, format, batch, context, num_speculative_tokens)
        table = self.tables.get((kind, format))
        return seconds if table is None else seconds * exp(table.log_ratio(batch, context, num_speculative_tokens))

    def parts(self, kind: Pass, format: str, batch: int, context: float, num_speculative_tokens: int) -> Parts[float]:
        """Seconds by cause as in the roofline, scaled to the measured total."""
        parts = self.roofline.parts(kind, format, batch, context, num_speculative_tokens)
        scale = self.seconds(kind, format, batch, context, num_speculative_tokens) / parts.seconds
        return Parts(*(scale * part for part in (parts.memory, parts.compute, parts.overhead, parts.communication)))

    def step_seconds(self, arm: Arm, batch: int, context: float) -> float:
        """Seconds of a whole step over `batch` decoding sequences."""
        if not arm.speculates:
            return self.target_seconds(batch, context)
        n = arm.num_speculative_tokens
        return n * self.draft_seconds(arm.format, batch, context, n) + self.verify_seconds(batch, context, n)

    def speed_up(self, arm: Arm, batch: int, context: float, acceptance_length: float) -> float:
        """Speed-up of an arm over autoregressive decoding: L / (n r + v), with acceptance_length L."""
        return acceptance_length * self.target_seconds(batch, context) / self.step_seconds(arm, batch, context)

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds of a pass over prompt tokens alone."""
        return self.roofline.prefill_seconds(tokens)


class CalibratedCost:
    """CostModel from PassTimes and live corrections. A cached prediction takes a few microseconds."""

    def __init__(self, passes: PassTimes) -> None:
        self.passes = passes
        self.corrections = Corrections()
        self._known: dict[tuple[Arm, int, int], tuple[float, float]] = {}

    def step_seconds(self, arm: Arm, load: Load, proposed: float = 1.0) -> float:
        """See CostModel. `arm.format` is one of `passes.formats`.

        Each sequence is taken to have a whole draft or none, independently of the others. Where matches come together, as among
        siblings, a verify pass is rarer and longer than predicted; the corrections of verify passes take up the mean error.
        """
        prefill = self._prefill_seconds(arm, load) if load.prefill_tokens else 0.0
        batch = load.decoding
        if not batch:
            return prefill
        verifies = 1 - (1 - proposed) ** batch if arm.speculates else 1.0  # the probability that any sequence has a draft
        if not verifies:
            return self._without_drafts(arm, load) + prefill
        seconds, drafting = self._decode_seconds(arm, load, proposed / verifies)
        seconds *= self.corrections.factor(arm, batch, drafting)
        if verifies < 1:
            seconds = verifies * seconds + (1 - verifies) * self._without_drafts(arm, load)
        return seconds + prefill

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds of a pass over prompt tokens alone."""
        return self.step_seconds(OFF, Load(0, 0.0, tokens))

    def observe(self, arm: Arm, load: Load, seconds: float, drafting: float = 0.0, proposed: float = 1.0) -> None:
        """See CostModel. A pass with prompt tokens corrects the cost of prompt tokens, not of decoding."""
        if not load.prefill_tokens:
            if load.decoding:
                self._observe_decoding(arm, load, seconds, drafting, proposed)
            return
        whole = self.step_seconds(arm, load, proposed)
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

    def _observe_decoding(self, arm: Arm, load: Load, seconds: float, drafting: float, proposed: float) -> None:
        predicted, share = self._decode_seconds(arm, load, proposed)
        ratio = drafting / (share * predicted) if share and drafting else None
        if proposed:
            self.corrections.observe(arm, load.decoding, share, seconds / predicted, ratio)
            return
        if ratio is not None:
            self.corrections.observe_drafting(arm, load.decoding, ratio)
        once, _ = self._decode_seconds(OFF, load)
        rest = seconds - (drafting or self._without_drafts(arm, load) - self.step_seconds(OFF, load))
        self.corrections.observe(OFF, load.decoding, 0.0, rest / once)

    def _without_drafts(self, arm: Arm, load: Load) -> float:
        """Corrected seconds of a step for which the arm's proposer has nothing: its search and the pass of OFF."""
        batch = load.decoding
        seconds, drafting = self._decode_seconds(arm, load)
        once, _ = self._decode_seconds(OFF, load)
        return drafting * seconds * self.corrections.factor(arm, batch, 1.0) + once * self.corrections.factor(OFF, batch, 0.0)

    def _decode_seconds(self, arm: Arm, load: Load, proposed: float = 1.0) -> tuple[float, float]:
        """Seconds of decoding without corrections, at the centre of the context's bucket, and the share of drafting in them.

        `proposed`: share of the arm's draft tokens in the verify pass.
        """
        bucket = int(CONTEXT_STEPS * log2(load.context)) if load.context > 1 else 0
        batch, context, n = load.decoding, 2 ** ((bucket + 0.5) / CONTEXT_STEPS), arm.num_speculative_tokens
        key = (arm, batch, bucket)
        known = self._known.get(key)
        if known is None:
            seconds = self.passes.step_seconds(arm, batch, context)
            drafting = n * self.passes.draft_seconds(arm.format, batch, context, n) / seconds if n else 0.0
            known = self._known[key] = seconds, drafting
        if proposed == 1 or not n:
            return known
        drafting = known[0] * known[1]
        seconds = drafting + self.passes.verify_seconds(batch, context, proposed * n)
        return seconds, drafting / seconds

    def _prefill_seconds(self, arm: Arm, load: Load) -> float:
        """Corrected seconds that prompt tokens add to a pass: equal for all arms, because they are prefilled once."""
        tokens = load.prefill_tokens
        factor = self.corrections.prefill_factor()
        if not load.decoding:
            return self.passes.prefill_seconds(tokens) * factor
        roofline = self.passes.roofline
        together = roofline.seconds("verify", "", load.decoding, load.context, 0, tokens)
        return (together - roofline.seconds("verify", "", load.decoding, load.context)) * factor
