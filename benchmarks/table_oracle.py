"""The oracle of rollout_modes.py: takes the arm with the most tokens per second, by a table measured in the same run."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from statistics import fmean, median

from erollout.configuration.speculation import SpeculationConfig
from erollout.speculation.cost.cost_model import CostModel
from erollout.speculation.step import OFF, Arm, Load
from erollout.speculation.toggle import Toggle
from erollout.speculation.trace import DecisionTrace

Table = Mapping[tuple[Arm, int], float]
"""Measured seconds per token of each sequence, by arm and bit length of the batch size."""
Steps = dict[tuple[Arm, int], list[tuple[float, float]]]
"""Tokens per sequence and seconds of steps, by the same."""


def steps_of(trace: DecisionTrace) -> Steps:
    """The steps without prompts."""
    steps: Steps = {}
    for step, seconds in enumerate(trace.columns["seconds"]):
        load = trace.load(step)
        if load.decoding and not load.prefill_tokens:
            steps.setdefault((trace.arm(step), load.decoding.bit_length()), []).append((trace.tokens(step), seconds))
    return steps


def table_of(parts: Iterable[Steps]) -> Table:
    """Mean tokens and median seconds: one slow step changes nothing."""
    steps: Steps = {}
    for part in parts:
        for key, values in part.items():
            steps.setdefault(key, []).extend(values)
    return {
        key: median(seconds for _, seconds in values) / fmean(tokens for tokens, _ in values) for key, values in steps.items()
    }


class TableOracle(Toggle):
    """A toggle whose predictions are the table's: no probes, nothing learnt."""

    def __init__(self, options: SpeculationConfig, formats: Sequence[str], cost: CostModel, table: Table) -> None:
        super().__init__(options, formats, cost)
        self.table = table

    def seconds_per_token(self, load: Load) -> tuple[float, ...]:
        size = load.decoding.bit_length()
        return tuple(self.table.get((arm, size), 1.0 if arm == OFF else inf) for arm in self.arms)

    def end_rollout(self, acceptance_rate: float | None = None) -> None:
        """Nothing is held back."""
        self._metrics = self._measured()
