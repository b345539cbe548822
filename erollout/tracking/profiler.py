"""Profiles of steps: a Chrome trace per rank by torch's profiler, in which the phases of a step are named ranges."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.autograd import profiler

logger = logging.getLogger(__name__)

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """Context that is a named range of the profile; while nothing is profiled, it costs the look at a flag."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NOTHING


class StepProfiler:
    """Profiles the chosen steps of a run on this rank."""

    def __init__(self, steps: Sequence[int], output_dir: str, rank: int) -> None:
        """`steps`: numbers of the steps, from 1."""
        self.steps = frozenset(steps)
        self.directory = Path(output_dir) / "profile"
        self.rank = rank

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Context of step number `step`, from 1. A profile that can't be written is an error in the log; the run goes on."""
        if step not in self.steps:
            yield
            return
        on_gpu = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *on_gpu]) as profiled:
            yield
        path = self.directory / f"step_{step:08d}_rank_{self.rank:05d}.json.gz"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.error(
                "train.profile.steps: rank %d can't write %s: %s; free space or leave %d out", self.rank, path, error, step
            )
            return
        if self.rank == 0:
            logger.info("profile of step %d: %s, a file per rank; open it in https://ui.perfetto.dev", step, path)
