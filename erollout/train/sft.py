"""Supervised fine-tuning: prompts with given responses, the same actor, schedules and checkpoints as the RL loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from erollout.algorithm.supervised import Supervised
from erollout.checkpoint.checkpointer import Checkpointer, RunState
from erollout.config import Config
from erollout.data.prompts import PromptDataset
from erollout.parallel.groups import ParallelContext
from erollout.policy.actor import Actor
from erollout.policy.batch import TrainSample, balance, token_weights
from erollout.policy.nonfinite import SkippedUpdates
from erollout.tracking.metrics import PhaseTimer, memory_metrics
from erollout.tracking.tracker import Tracker


@dataclass
class SupervisedTrainer:
    """The parts of a supervised run and its position. All methods are collective."""

    config: Config
    context: ParallelContext
    data: PromptDataset
    actor: Actor
    tracker: Tracker
    checkpointer: Checkpointer
    run_id: str
    report: Callable[[int, Mapping[str, float]], None]
    stops: Callable[[int], bool]
    """Whether the ranks agree to stop after so many steps. Collective."""
    enter: Callable[[int, str], None]
    """Tells the watchdog of this rank that a phase begins in the step after so many."""
    step: int = 0

    def __post_init__(self) -> None:
        directory = Path(self.config.train.output_dir) / "nonfinite"
        self.skipped = SkippedUpdates(self.config.fault_tolerance.max_nonfinite_steps, directory, self.context.rank)

    def run(self) -> None:
        """Train to the configured number of steps, or until asked to stop."""
        steps, interval, saved = self.config.supervised.steps, self.config.checkpoint.interval, self.step
        while self.step < steps:
            if self.stops(self.step):
                if interval and saved < self.step:
                    self.save()
                break
            self.train_step()
            self.checkpointer.advance()
            if (checks := self.config.fault_tolerance.checksum_interval) and self.step % checks == 0:
                self._require_equal_replicas()
            if interval and (self.step % interval == 0 or self.step == steps):
                self.save()
                saved = self.step
        self.checkpointer.wait()
        self.enter(self.step, "end")

    def save(self) -> None:
        self.enter(self.step, "checkpoint")
        self._require_equal_replicas()
        self.checkpointer.save(RunState(self.step, self.run_id, date=self.data.renderer.date.isoformat()))
        self.tracker.log_saved(self.step)

    def train_step(self) -> None:
        """One optimizer step on the next batch_size examples."""
        timer = PhaseTimer()
        size = self.config.supervised.batch_size
        examples = [self.data.supervised_example(self.step * size + i) for i in range(size)]
        samples = [TrainSample(prompt_ids, response_ids) for prompt_ids, response_ids in examples]
        algorithm = Supervised()
        weights = token_weights([len(s.response_ids) for s in samples], algorithm.aggregation)
        mine = balance([s.length for s in samples], self.context.train.data)[self.context.data_parallel_rank]
        self.enter(self.step, "update")
        with timer("update"):
            metrics = self.actor.update([samples[i] for i in mine], [weights[i] for i in mine], algorithm)
        metrics |= {"nonfinite_in_a_row": float(self.skipped.count(self.step, metrics, [samples[i] for i in mine]))}
        self.step += 1
        figures = {f"train/{name}": value for name, value in metrics.items()}
        figures |= memory_metrics(self.context.device.type) | timer.collect()
        self.tracker.log_metrics(self.step, figures)
        self.report(self.step, figures)

    def _require_equal_replicas(self) -> None:
        if self.config.fault_tolerance.checksum_interval and self.context.train.data > 1:
            self.actor.require_equal_replicas(self.step)
