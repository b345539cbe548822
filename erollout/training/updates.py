"""Optimizer steps of a run, one per mini-batch. Many non-finite ones in a row end the run."""

from collections.abc import Sequence
from pathlib import Path

from erollout.algorithm.minibatch import MiniBatch
from erollout.config import FaultToleranceConfig
from erollout.policy.actor import Actor, TokenLoss
from erollout.policy.nonfinite import SkippedUpdates


class Updates:
    """The actor's updates with one loss. Collective."""

    def __init__(self, actor: Actor, loss: TokenLoss, options: FaultToleranceConfig, output_dir: str) -> None:
        self.actor = actor
        self.loss = loss
        self.skipped = SkippedUpdates(options.max_nonfinite_steps, Path(output_dir) / "nonfinite", actor.context.rank)

    def make(self, batches: Sequence[MiniBatch], step: int) -> dict[str, float]:
        """Make one update per mini-batch, in step number `step` from 0. Returns the mean metrics, named `train/...`."""
        updates = [self._update(batch, step) for batch in batches]
        return {f"train/{name}": sum(update[name] for update in updates) / len(updates) for name in updates[0]}

    def _update(self, batch: MiniBatch, step: int) -> dict[str, float]:
        metrics = self.actor.update(batch.samples, batch.weights, self.loss)
        return metrics | {"nonfinite_in_a_row": float(self.skipped.count(step, metrics, batch.samples))}
