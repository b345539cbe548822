"""The synchronous, colocated training loop: refit, rollout, log-probs, update. Every rank runs it; only rank 0 tracks."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from erollout.algorithm import Algorithm
from erollout.algorithm.minibatch import MiniBatch, split
from erollout.algorithm.mismatch import mismatch_metrics
from erollout.checkpoint.checkpointer import Checkpointer, RunState
from erollout.config import Config
from erollout.data.prompts import PromptDataset
from erollout.parallel.collectives import all_sum
from erollout.parallel.groups import ParallelContext
from erollout.plots.rollout_figures import rollout_figures
from erollout.policy.actor import Actor
from erollout.policy.nonfinite import SkippedUpdates
from erollout.rewards.failures import AllScoringFailed
from erollout.rollout.partial import KeptRollouts, RolloutInterrupted
from erollout.rollout.rollout_worker import TRAINING_STREAM, RolloutResult, RolloutWorker
from erollout.tracking.metrics import PhaseTimer, memory_metrics
from erollout.tracking.tracker import Tracker
from erollout.train.evaluation import evaluation_metrics
from erollout.train.step_metrics import rollout_metrics
from erollout.types import ScoredRollout

logger = logging.getLogger(__name__)


def never_stops(step: int) -> bool:
    """Of a run that no signal ends."""
    return False


def unwatched(step: int, phase: str) -> None:
    """Of a run without a watchdog."""


@dataclass
class Trainer:
    """The parts of a run and its position. All methods are collective."""

    config: Config
    context: ParallelContext
    train_data: PromptDataset
    test_data: PromptDataset | None
    actor: Actor
    worker: RolloutWorker
    algorithm: Algorithm
    tracker: Tracker
    checkpointer: Checkpointer
    run_id: str
    report: Callable[[int, Mapping[str, float]], None]
    """Shows a finished step, or an evaluation, on the console."""
    step: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    kept: KeptRollouts | None = None
    """Of the next step's rollout, which an attempt before this one began."""
    stops: Callable[[int], bool] = never_stops
    """Whether the ranks agree to stop after so many steps. Collective."""
    enter: Callable[[int, str], None] = unwatched
    """Tells the watchdog of this rank that a phase begins in the step after so many."""

    def __post_init__(self) -> None:
        directory = Path(self.config.train.output_dir) / "nonfinite"
        self._changed = False
        """There is something that the last checkpoint doesn't know."""
        self.skipped = SkippedUpdates(self.config.fault_tolerance.max_nonfinite_steps, directory, self.context.rank)

    def run(self) -> None:
        """Train to the configured number of steps, or until asked to stop, evaluating and saving on the way."""
        try:
            self._close_step()  # an evaluation may be left to do
            while self.step < self.config.train.steps:
                if self.stops(self.step):
                    if self.config.checkpoint.interval and self._changed:
                        self.save()
                    break
                self.train_step()
                self.checkpointer.advance()
                if self._due(self.config.fault_tolerance.checksum_interval):
                    self._require_equal_replicas()
                self._close_step()
        except RolloutInterrupted as interrupted:
            self._stop_in_rollout(interrupted.kept)
        except AllScoringFailed:
            self._save_before_failing()
            raise
        self.checkpointer.wait()
        self.enter(self.step, "end")

    def save(self) -> None:
        self.enter(self.step, "checkpoint")
        self._require_equal_replicas()
        day = self.train_data.renderer.date.isoformat()
        rollout = self.worker.state_dict()
        self.checkpointer.save(RunState(self.step, self.run_id, tuple(self.evaluations), rollout, self.kept, day))
        self.tracker.log_saved(self.step)
        self._changed = False

    def train_step(self) -> None:
        """One RL step (the order of phases is the method's)."""
        timer = PhaseTimer()
        first, count = self.step * self.config.rollout.prompts_per_step, self.config.rollout.prompts_per_step
        prompts = [self.train_data.prompt(first + i) for i in range(count)]
        with self._phase(timer, "refit"):
            self.actor.sleep()
            refit = self.worker.refit(self.actor.local_tensors(), policy_version=self.step)
        with self._phase(timer, "rollout"):
            sampling, group_size = self.worker.sampling_params(), self.config.rollout.group_size
            result = self.worker.rollout(prompts, sampling, group_size, TRAINING_STREAM, self.step, kept=self.kept)
            self.kept = None
        with self._phase(timer, "logprobs"):
            self.actor.wake_up()
            batches = self._with_logprobs(self._split(result.scored))
        with self._phase(timer, "update"):
            metrics = self._update(batches, result.scored)
        self.step += 1
        self._changed = True
        seconds = timer.collect()
        metrics |= rollout_metrics(result, seconds["seconds/rollout"], refit)
        metrics |= seconds | memory_metrics(self.context.device.type)
        self.tracker.log_metrics(self.step, metrics)
        self.report(self.step, metrics)
        if self._due(self.config.evaluation.interval) or self.step == self.config.train.steps:
            self._log_figures(result)

    def evaluate(self) -> None:
        """Held-out accuracy of the present policy."""
        if self.test_data is None:
            return
        self.enter(self.step, "evaluation")
        self.actor.sleep()
        self.worker.refit(self.actor.local_tensors(), policy_version=self.step)
        result = self.worker.evaluate(self.test_data, self.step)
        self.actor.wake_up()
        metrics = evaluation_metrics(result.scored, sum(result.failures.values()))
        self.evaluations.append({"step": float(self.step), **metrics})
        self._changed = True
        self.tracker.log_metrics(self.step, metrics)
        self.tracker.log_samples(self.step, self._sample_rows(result))
        self.report(self.step, metrics)

    def _close_step(self) -> None:
        """Evaluate and save, where that is due and not done."""
        if self._due(self.config.evaluation.interval) and not any(row["step"] == self.step for row in self.evaluations):
            self.evaluate()
        if self._due(self.config.checkpoint.interval) and self._changed and self.step:
            self.save()

    def _stop_in_rollout(self, kept: KeptRollouts | None) -> None:
        """The end of a run whose rollout was interrupted. `kept`: of the next step's; None: it was an evaluation's."""
        self.actor.wake_up()
        self.stops(self.step)
        if kept is not None:
            logger.info("stopped in mid-rollout of step %d: %s", self.step + 1, kept.summary(self.config.samples_per_step))
            self.kept, self._changed = kept, self._changed or bool(kept.samples)
        if self.config.checkpoint.interval and self._changed:
            self.save()

    def _save_before_failing(self) -> None:
        """What was learnt before the scorer failed is not lost with it."""
        self.actor.wake_up()
        if self.config.checkpoint.interval and self._changed and self.step:
            self.save()
        self.checkpointer.wait()

    @contextmanager
    def _phase(self, timer: PhaseTimer, name: str) -> Iterator[None]:
        self.enter(self.step, name)
        with timer(name):
            yield

    def _split(self, scored: list[ScoredRollout]) -> list[MiniBatch]:
        size = self.config.train.global_batch_size or len(scored)
        # The actor's log-probs know the temperature but no truncation; of a truncated distribution the raw ones compare.
        raw = self.config.rollout.truncates
        return split(scored, size, self.context.train.data, self.context.data_parallel_rank, self.algorithm.aggregation, raw)

    def _with_logprobs(self, batches: list[MiniBatch]) -> list[MiniBatch]:
        """The same mini-batches with old (and reference) log-probs, before any of them changes the policy."""
        for batch in batches:
            old = self.actor.compute_logprobs(batch.samples)
            ref = self.actor.compute_logprobs(batch.samples, reference=True) if self.algorithm.uses_reference else old
            for sample, old_logprobs, ref_logprobs in zip(batch.samples, old, ref, strict=True):
                sample.old_logprobs, sample.ref_logprobs = old_logprobs, ref_logprobs
        return batches

    def _update(self, batches: list[MiniBatch], scored: list[ScoredRollout]) -> dict[str, float]:
        """One optimizer step per mini-batch; metrics are the mean over them."""
        local = [sample for batch in batches for sample in batch.samples] if self.context.is_replica_leader else []
        metrics = mismatch_metrics(local, self.context.device)
        self._set_advantages(batches, scored)
        updates = [self._update_on(batch) for batch in batches]
        return metrics | {f"train/{name}": sum(u[name] for u in updates) / len(updates) for name in updates[0]}

    def _update_on(self, batch: MiniBatch) -> dict[str, float]:
        metrics = self.actor.update(batch.samples, batch.weights, self.algorithm)
        return metrics | {"nonfinite_in_a_row": float(self.skipped.count(self.step, metrics, batch.samples))}

    def _set_advantages(self, batches: list[MiniBatch], scored: list[ScoredRollout]) -> None:
        shaped = [0.0] * len(scored)
        if self.context.is_replica_leader:  # each sample's log-probs are known to one model replica only
            for batch in batches:
                for index, sample in zip(batch.indices, batch.samples, strict=True):
                    shaped[index] = self.algorithm.shaped_reward(scored[index].reward, sample)
        groups = [s.rollout.prompt_index for s in scored]
        advantages = self.algorithm.advantages(all_sum(shaped, self.context.device), groups)
        for batch in batches:
            for index, sample in zip(batch.indices, batch.samples, strict=True):
                sample.advantage = advantages[index]

    def _log_figures(self, result: RolloutResult) -> None:
        if self.context.rank == 0:
            for name, figure in rollout_figures(result, self.worker.steering.last).items():
                self.tracker.log_figure(f"{name}_step_{self.step:08d}", figure)

    def _sample_rows(self, result: RolloutResult) -> list[dict[str, object]]:
        chosen = result.scored[: self.config.tracking.num_sample_rollouts]
        return [
            {
                "prompt": self.worker.tokenizer.decode(list(s.rollout.prompt_ids)),
                "response": self.worker.text(s.rollout),
                "reward": s.reward,
                "finish_reason": s.rollout.finish_reason,
            }
            for s in chosen
        ]

    def _require_equal_replicas(self) -> None:
        """Before a checkpoint too: what has gone wrong unseen is not to take the place of what was right."""
        if self.config.fault_tolerance.checksum_interval and self.context.train.data > 1:
            self.actor.require_equal_replicas(self.step)

    def _due(self, interval: int) -> bool:
        return bool(interval) and (self.step % interval == 0 or self.step == self.config.train.steps)
