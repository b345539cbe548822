"""Updates skipped because of a non-finite loss or gradient: a few are tolerated, many in a row end the run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from erollout.errors import UserError
from erollout.policy.batch import TrainSample


class SkippedUpdates:
    """Counter of skipped updates in a row, equal on all ranks."""

    def __init__(self, limit: int, directory: Path, rank: int) -> None:
        """`directory`: directory for the batch that ends the run, one file per rank."""
        self.limit = limit
        self.in_a_row = 0
        self._directory = directory
        self._rank = rank

    def count(self, step: int, metrics: Mapping[str, float], samples: Sequence[TrainSample]) -> int:
        """Number of skipped updates in a row, after an update with these metrics from this rank's samples.

        Raises UserError on all ranks once it reaches `limit`.
        """
        self.in_a_row = self.in_a_row + 1 if metrics["update_skipped"] else 0
        if self.in_a_row >= self.limit:
            kept = self._keep(step, metrics, samples)
            raise UserError(
                f"fault_tolerance.max_nonfinite_steps = {self.limit}: loss or gradient of the last {self.in_a_row} updates, "
                f"up to step {step + 1}, was not finite; {kept}; lower optimizer.lr, or resume from an earlier checkpoint"
            )
        return self.in_a_row

    def _keep(self, step: int, metrics: Mapping[str, float], samples: Sequence[TrainSample]) -> str:
        file = self._directory / f"step_{step + 1:08d}.rank_{self._rank:05d}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"metrics": dict(metrics), "samples": [asdict(sample) for sample in samples]}))
        except OSError as error:
            return f"the batch can't be kept in {self._directory} ({error.strerror})"
        return f"the batch is in {self._directory}"
