"""The groups that a step trains on: prompts are drawn and rolled out until the algorithm has as many as a step needs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice, repeat

from erollout.algorithm import Algorithm
from erollout.config import RolloutConfig
from erollout.data.cursor import DataCursor
from erollout.data.prompts import PromptDataset
from erollout.rollout.partial import PartialRollouts, RolloutInterrupted, as_partial, merge_samples
from erollout.rollout.rollout_worker import TRAINING_STREAM, RolloutResult, RolloutWorker
from erollout.speculation.statistics import merge
from erollout.training.loop import Trained
from erollout.types import Prompt, ScoredRollout

Group = list[ScoredRollout]


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """What the rollouts of one step brought."""

    samples: Group
    """Those that are trained on: whole groups, in the order of their prompts."""
    results: list[RolloutResult]
    """One per rollout, of all that was sampled."""
    dropped: int
    """Groups that were not selected and are not trained on."""

    @property
    def trained(self) -> Trained:
        """What the step trains on."""
        return Trained(len(self.samples), sum(sample.rollout.num_sampled for sample in self.samples))

    @property
    def result(self) -> RolloutResult:
        """The rollouts as one."""
        return self.results[0] if len(self.results) == 1 else _merged(self.results)

    @property
    def metrics(self) -> dict[str, float]:
        """What an algorithm that selects did; nothing where one rollout was all."""
        if len(self.results) == 1 and not self.dropped:
            return {}
        return {"rollout/rollouts": float(len(self.results)), "rollout/dropped_groups": float(self.dropped)}


@dataclass
class GroupCollector:
    """Collects the groups of each step. Collective; the same on every rank."""

    worker: RolloutWorker
    algorithm: Algorithm
    data: PromptDataset
    options: RolloutConfig
    cursor: DataCursor
    """Where the next step begins to draw."""
    partial_rollouts: tuple[PartialRollouts, ...] = ()
    """Samples of the next step's rollouts, in their order, left by an interrupted attempt."""

    @property
    def epochs(self) -> float:
        """Prompts drawn by the steps so far, in passes over the data."""
        return self.cursor.position / len(self.data)

    def collect(self, step: int) -> StepRollouts:
        """The groups of the step after `step` others. Raises RolloutInterrupted; then the step is to be made again."""
        drawn, results = DataCursor(self.cursor.position), list[RolloutResult]()
        selected, others = list[Group](), list[Group]()
        prompts: list[list[Prompt]] = []
        for partial in islice(chain(self.partial_rollouts, repeat(None)), self.algorithm.max_rollouts):
            prompts.append([self.data.prompt(i) for i in drawn.take(self.options.prompts_per_step - len(selected))])
            try:
                results.append(self._rollout(prompts[-1], step, partial))
            except RolloutInterrupted as interrupted:
                if interrupted.partial_rollouts is not None:
                    complete = (self._as_partial(prompts[index], step, result) for index, result in enumerate(results))
                    later = self.partial_rollouts[len(prompts) :]
                    self.partial_rollouts = (*complete, interrupted.partial_rollouts, *later)
                raise
            for group in _groups(results[-1].scored):
                (selected if self.algorithm.select(group) else others).append(group)
            if len(selected) == self.options.prompts_per_step:
                break
        missing = self.options.prompts_per_step - len(selected)
        self.cursor, self.partial_rollouts = drawn, ()
        samples = [sample for group in _in_order(selected + others[:missing]) for sample in group]
        return StepRollouts(samples, results, len(others[missing:]))

    def _rollout(self, prompts: Sequence[Prompt], step: int, partial: PartialRollouts | None) -> RolloutResult:
        sampling, size = self.worker.sampling_params(), self.options.group_size
        return self.worker.rollout(prompts, sampling, size, TRAINING_STREAM, step, partial_rollouts=partial)

    def _as_partial(self, prompts: Sequence[Prompt], step: int, result: RolloutResult) -> PartialRollouts:
        """The samples of a complete rollout, for the next attempt at a step that is interrupted in a later rollout."""
        sampling, size = self.worker.sampling_params(), self.options.group_size
        requests = self.worker.requests(prompts, sampling, size, TRAINING_STREAM, step)
        return merge_samples(requests, (as_partial(sample.rollout) for sample in result.scored))


def _groups(scored: Sequence[ScoredRollout]) -> list[Group]:
    """Samples by their prompts, in order: those of one prompt are adjacent."""
    return [list(group) for _, group in groupby(scored, key=lambda sample: sample.rollout.prompt_index)]


def _in_order(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: group[0].rollout.prompt_index)


def _merged(results: Sequence[RolloutResult]) -> RolloutResult:
    reports = zip(*(result.reports for result in results), strict=True)
    return RolloutResult(
        [sample for result in results for sample in result.scored],
        [{name: sum(report[name] for report in of_replica) for name in of_replica[0]} for of_replica in reports],
        merge(result.speculation for result in results),
        [summary for result in results for summary in result.summaries],
        sum(result.resumed_samples for result in results),
        sum(result.kept_tokens for result in results),
        sum((result.failures for result in results), Counter()),
    )
