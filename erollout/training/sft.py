"""Supervised fine-tuning: prompts with given responses; the same actor, run loop and checkpoints as reinforcement learning."""

from dataclasses import dataclass, replace

from erollout.algorithm.minibatch import share
from erollout.algorithm.supervised import Supervised
from erollout.checkpoint.checkpointer import RunState
from erollout.config import FaultToleranceConfig
from erollout.data.cursor import DataCursor
from erollout.data.prompts import PromptDataset
from erollout.policy.actor import Actor
from erollout.policy.batch import TrainSample
from erollout.training.loop import Phases, StepReport, Trained
from erollout.training.updates import Updates


@dataclass
class SupervisedTrainer:
    """Steps of a supervised run, called by RunLoop. All methods are collective."""

    actor: Actor
    data: PromptDataset
    cursor: DataCursor
    batch_size: int
    limits: FaultToleranceConfig
    output_dir: str

    def __post_init__(self) -> None:
        self.loss = Supervised()
        self.updates = Updates(self.actor, self.loss, self.limits, self.output_dir)

    def train_step(self, step: int, phase: Phases) -> StepReport:
        """Make one optimizer step on the next batch_size examples."""
        context = self.actor.context
        samples = [TrainSample(*self.data.supervised_example(i)) for i in self.cursor.take(self.batch_size)]
        batch = share(samples, range(self.batch_size), context.train.data, context.data_parallel_rank, self.loss)
        with phase("update"):
            metrics = self.updates.make([batch], step)
        trained = Trained(self.batch_size, sum(len(sample.response_ids) for sample in samples))
        return StepReport(metrics | phase.seconds(), trained=trained, epochs=self.cursor.position / len(self.data))

    def evaluate(self, step: int) -> StepReport:
        raise NotImplementedError("a supervised run has no rollouts, and so no evaluation")

    def saved(self, state: RunState) -> RunState:
        return replace(state, date=self.data.renderer.date.isoformat(), cursor=self.cursor.position)
