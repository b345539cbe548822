"""Reinforcement learning, synchronous and colocated: refit, rollout, log-probs, update, on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from erollout.algorithm import Algorithm
from erollout.algorithm.minibatch import MiniBatch, add_advantages, add_logprobs, reported_samples, split
from erollout.algorithm.mismatch import mismatch_metrics
from erollout.calibration.devices import find_hardware
from erollout.checkpoint.checkpointer import RunState
from erollout.config import Config
from erollout.data.prompts import PromptDataset
from erollout.plots.rollout_figures import rollout_figures
from erollout.policy.actor import Actor
from erollout.rewards.failures import AllScoringFailed
from erollout.rollout.partial import RolloutInterrupted
from erollout.tracking.parameters import config_subject
from erollout.training.evaluation import evaluation_metrics
from erollout.training.groups import GroupCollector
from erollout.training.loop import Phases, StepReport
from erollout.training.sample_log import SampleLog
from erollout.training.step_metrics import rollout_metrics, update_metrics
from erollout.training.updates import Updates
from erollout.types import ScoredRollout


class Trainer:
    """Steps of an RL run, called by RunLoop. All methods are collective."""

    def __init__(
        self, config: Config, actor: Actor, algorithm: Algorithm, groups: GroupCollector, held_out: PromptDataset | None = None
    ) -> None:
        self.config, self.actor, self.algorithm, self.groups, self.held_out = config, actor, algorithm, groups, held_out
        self.context, self.worker = actor.context, groups.worker
        self.hardware = find_hardware(self.context.device_name)
        self.samples = SampleLog(config.tracking, config.train, groups.data, held_out, self.worker.text)
        self.updates = Updates(actor, algorithm, config.fault_tolerance, config.train.output_dir)

    def train_step(self, step: int, phase: Phases) -> StepReport:
        """Make one step, with the phases in order. Responses are scored while others are still being sampled."""
        with phase("refit"):
            self.actor.sleep()
            refit = self.worker.refit(self.actor.local_tensors(), policy_version=step)
        with phase("rollout"), self._awake_at_failure():
            rollouts = self.groups.collect(step)
        with phase("logprobs"):
            self.actor.wake_up()
            batches = self._mini_batches(rollouts.samples)
            add_logprobs(batches, self.actor, self.algorithm.uses_reference)
        with phase("update"):
            metrics = mismatch_metrics(reported_samples(batches, self.context), self.context.device)
            metrics |= add_advantages(batches, rollouts.samples, self.algorithm, self.context)
            metrics |= self.updates.make(batches, step)
        seconds = phase.seconds()
        metrics |= rollout_metrics(rollouts.result, seconds["seconds/rollout"], refit, self.context.world_size)
        metrics |= rollouts.metrics | seconds
        shape, ranks = self.actor.architecture, self.context.world_size
        metrics |= update_metrics(shape, rollouts.samples, seconds["seconds/update"], ranks, self.hardware)
        subject = f"{config_subject(self.config)}, step {step + 1}"
        figures = partial(rollout_figures, rollouts.results[-1], self.worker.coordination.last, subject)
        shown = self.samples.of_step(step, rollouts.samples)
        return StepReport(metrics, figures, shown, rollouts.trained, self.groups.epochs)

    def evaluate(self, step: int) -> StepReport:
        """Evaluate the policy after `step` steps on held-out prompts."""
        assert self.held_out is not None
        self.actor.sleep()
        self.worker.refit(self.actor.local_tensors(), policy_version=step)
        with self._awake_at_failure():
            result = self.worker.evaluate(self.held_out, step)
        self.actor.wake_up()
        metrics = evaluation_metrics(result.scored, sum(result.failures.values()))
        return StepReport(metrics, samples=self.samples.of_evaluation(result.scored))

    def saved(self, state: RunState) -> RunState:
        """With what the rollouts have learnt, left and drawn."""
        groups, day = self.groups, self.groups.data.renderer.date.isoformat()
        return replace(
            state,
            rollout=self.worker.state_dict(),
            partial_rollouts=groups.partial_rollouts,
            date=day,
            cursor=groups.cursor.position,
        )

    def _mini_batches(self, samples: list[ScoredRollout]) -> list[MiniBatch]:
        size, raw = self.config.train.global_batch_size or len(samples), self.config.rollout.truncates
        ranks, rank = self.context.train.data, self.context.data_parallel_rank
        # The actor's log-probs include the temperature but no truncation: with truncation the raw ones are compared.
        return split(samples, size, ranks, rank, self.algorithm, raw)

    @contextmanager
    def _awake_at_failure(self) -> Iterator[None]:
        """A rollout that ends early leaves an actor that can be saved."""
        try:
            yield
        except (RolloutInterrupted, AllScoringFailed):
            self.actor.wake_up()
            raise
