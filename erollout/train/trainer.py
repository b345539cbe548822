"""Reinforcement learning, synchronous and colocated: refit, rollout, log-probs, update, on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from erollout.algorithm import Algorithm
from erollout.algorithm.minibatch import MiniBatch, add_advantages, add_logprobs, reported_samples, split
from erollout.algorithm.mismatch import mismatch_metrics
from erollout.checkpoint.checkpointer import RunState
from erollout.config import Config
from erollout.data.prompts import PromptDataset
from erollout.plots.rollout_figures import rollout_figures
from erollout.policy.actor import Actor
from erollout.rewards.failures import AllScoringFailed
from erollout.rollout.partial import KeptRollouts, RolloutInterrupted
from erollout.rollout.rollout_worker import TRAINING_STREAM, RolloutResult, RolloutWorker
from erollout.train.evaluation import evaluation_metrics
from erollout.train.loop import Phases, StepReport
from erollout.train.step_metrics import rollout_metrics
from erollout.train.updates import Updates
from erollout.types import Prompt


@dataclass
class Trainer:
    """Steps of an RL run, called by RunLoop. All methods are collective."""

    config: Config
    actor: Actor
    worker: RolloutWorker
    algorithm: Algorithm
    data: PromptDataset
    held_out: PromptDataset | None = None
    kept: KeptRollouts | None = None
    """Samples of the next step's rollout that an interrupted attempt has left."""

    def __post_init__(self) -> None:
        self.context = self.actor.context
        self.updates = Updates(self.actor, self.algorithm, self.config.fault_tolerance, self.config.train.output_dir)

    def train_step(self, step: int, phase: Phases) -> StepReport:
        """Make one step, with the phases in order. Responses are scored while others are still being sampled."""
        with phase("refit"):
            self.actor.sleep()
            refit = self.worker.refit(self.actor.local_tensors(), policy_version=step)
        with phase("rollout"), self._awake_at_failure():
            prompts, sampling, size = self._prompts(step), self.worker.sampling_params(), self.config.rollout.group_size
            result = self.worker.rollout(prompts, sampling, size, TRAINING_STREAM, step, kept=self.kept)
            self.kept = None
        with phase("logprobs"):
            self.actor.wake_up()
            batches = self._mini_batches(result)
            add_logprobs(batches, self.actor, self.algorithm.uses_reference)
        with phase("update"):
            metrics = mismatch_metrics(reported_samples(batches, self.context), self.context.device)
            add_advantages(batches, result.scored, self.algorithm, self.context)
            metrics |= self.updates.make(batches, step)
        seconds = phase.seconds()
        metrics |= rollout_metrics(result, seconds["seconds/rollout"], refit) | seconds
        return StepReport(metrics, partial(rollout_figures, result, self.worker.coordination.last))

    def evaluate(self, step: int) -> StepReport:
        """Evaluate the policy after `step` steps on held-out prompts."""
        assert self.held_out is not None
        self.actor.sleep()
        self.worker.refit(self.actor.local_tensors(), policy_version=step)
        with self._awake_at_failure():
            result = self.worker.evaluate(self.held_out, step)
        self.actor.wake_up()
        shown = result.scored[: self.config.tracking.num_sample_rollouts]
        metrics = evaluation_metrics(result.scored, sum(result.failures.values()))
        return StepReport(metrics, samples=[self.worker.sample_row(scored) for scored in shown])

    def saved(self, state: RunState) -> RunState:
        """With what the rollouts have learnt and left."""
        return replace(state, rollout=self.worker.state_dict(), kept=self.kept, date=self.data.renderer.date.isoformat())

    def _prompts(self, step: int) -> list[Prompt]:
        count = self.config.rollout.prompts_per_step
        return [self.data.prompt(step * count + i) for i in range(count)]

    def _mini_batches(self, result: RolloutResult) -> list[MiniBatch]:
        size, raw = self.config.train.global_batch_size or len(result.scored), self.config.rollout.truncates
        ranks, rank = self.context.train.data, self.context.data_parallel_rank
        # The actor's log-probs include the temperature but no truncation: with truncation the raw ones are compared.
        return split(result.scored, size, ranks, rank, self.algorithm.aggregation, raw)

    @contextmanager
    def _awake_at_failure(self) -> Iterator[None]:
        """A rollout that ends early leaves an actor that can be saved, and the samples that it has."""
        try:
            yield
        except (RolloutInterrupted, AllScoringFailed) as error:
            self.actor.wake_up()
            self.kept = getattr(error, "kept", None) or self.kept
            raise
