"""What a run keeps of its responses: rows of the samples table, and whole steps as JSON lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erollout.config import TrackingConfig, TrainConfig
from erollout.data.prompts import PromptDataset
from erollout.errors import UserError
from erollout.parallel.collectives import on_rank_zero
from erollout.rollout.sample_rows import sample_rows, write_rollouts
from erollout.types import Rollout, ScoredRollout


@dataclass(frozen=True, slots=True)
class SampleLog:
    """Chooses and writes rows. Methods are collective."""

    tracking: TrackingConfig
    train: TrainConfig
    data: PromptDataset
    held_out: PromptDataset | None
    text: Callable[[Rollout], str]
    """The response as the scorer sees it."""

    def of_step(self, step: int, scored: Sequence[ScoredRollout]) -> list[dict[str, Any]]:
        """Rows to show of step number `step`, from 0. Saves all of it if so configured. Raises UserError if that fails."""
        if self.train.save_rollouts:
            on_rank_zero(lambda: self._save(step, scored))
        interval = self.tracking.train_samples_interval
        due = interval > 0 and (step + 1) % interval == 0
        return sample_rows(scored[: self.tracking.num_sample_rollouts], self.data, self.text) if due else []

    def of_evaluation(self, scored: Sequence[ScoredRollout]) -> list[dict[str, Any]]:
        assert self.held_out is not None
        return sample_rows(scored[: self.tracking.num_sample_rollouts], self.held_out, self.text)

    def _save(self, step: int, scored: Sequence[ScoredRollout]) -> None:
        path = Path(self.train.output_dir) / "rollouts" / f"step_{step + 1:08d}.jsonl"
        try:
            write_rollouts(path, scored, self.data, self.text)
        except OSError as error:
            raise UserError(
                f"train.save_rollouts = true but {path} can't be written: {error.strerror}; free space or unset it"
            ) from error
