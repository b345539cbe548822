"""Summaries of a step: percentiles, lengths, seconds per phase, memory; and the names under which the figures are tracked.

Names are `group/figure`: `reward/mean`, `response_length/p90`, `mismatch/kl`, `seconds/rollout`, `evaluation/pass_at_1`.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from erollout.resilience.unattended import ignore

REWARD = "reward/mean"
SCORING_ERRORS = "reward/scoring_errors"
LOSS = "train/loss"
RESPONSE_LENGTH = "response_length"
TOKENS_PER_SECOND = "rollout/tokens_per_second"
MISMATCH_KL = "mismatch/kl"
ACCURACY = "evaluation/pass_at_1"
EVALUATION_REWARD = "evaluation/reward_mean"
SECONDS = "seconds"
STEP_SECONDS = "seconds/step"


def percentiles(values: Sequence[float], points: Sequence[float]) -> list[float]:
    """The given percentiles (0-100) of `values`, interpolated linearly between neighbours. ValueError without values."""
    if not values:
        raise ValueError("percentiles of no values")
    ordered = sorted(values)
    return [_interpolate(ordered, point / 100 * (len(ordered) - 1)) for point in points]


def _interpolate(ordered: Sequence[float], position: float) -> float:
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))


def summarize_lengths(lengths: Sequence[int]) -> dict[str, float]:
    """mean, p50, p90, p99 and max of lengths in tokens; empty without lengths. Tracked as `response_length/mean`, ..."""
    if not lengths:
        return {}
    p50, p90, p99 = percentiles(lengths, (50, 90, 99))
    return {"mean": sum(lengths) / len(lengths), "p50": p50, "p90": p90, "p99": p99, "max": float(max(lengths))}


class PhaseTimer:
    """Wall seconds of each phase of a step.

        with timer("rollout"):
            ...
        metrics |= timer.collect()

    A phase inside another one suspends the outer: every second counts once, so shares of the step add up to at most 1.
    `synchronize` waits for the device before a clock reading (`torch.cuda.synchronize` on a GPU).
    """

    def __init__(self, synchronize: Callable[[], None] = ignore, clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._active: list[str] = []
        self._step_began = self._reading = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._credit()
        self._active.append(phase)
        try:
            yield
        finally:
            self._credit()
            self._active.pop()

    def collect(self) -> dict[str, float]:
        """`seconds/<phase>` and `seconds/step` (everything since the last call), and start the next step."""
        self._credit()
        figures = {f"{SECONDS}/{phase}": seconds for phase, seconds in self._seconds.items()}
        figures[STEP_SECONDS] = self._reading - self._step_began
        self._seconds = {}
        self._step_began = self._reading
        return figures

    def _credit(self) -> None:
        """Credit the time since the last reading to the innermost phase."""
        self._synchronize()
        now = self._clock()
        if self._active:
            self._seconds[self._active[-1]] = self._seconds.get(self._active[-1], 0.0) + now - self._reading
        self._reading = now


def memory_metrics(device: str = "cpu") -> dict[str, float]:
    """Peak resident memory of this process and, on `cuda`, peak allocated and reserved memory of the device; GiB."""
    figures = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # Linux counts KiB
    if device.startswith("cuda"):
        import torch  # imported here, because the rest of the module works without torch

        figures["memory/peak_cuda_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        figures["memory/peak_cuda_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return figures
